// The two passes where each channel of a sample is contiguous (NCHW).
//
// A task is a group of samples and so few of its channels that the second pass finds them in cache.
#pragma once

#include "finish.h"
#include "vectors.h"

namespace normlab {

// Blocks that are added up in float32 before the sums go on in double.
constexpr int64_t CHAIN = 128;

// Two sums of one channel that are not in double yet.
struct Running {
    Floats sum_a, sum_b, dot_a, dot_b;
};

// By halves: one after the other, the lanes would wait for each other.
inline double across(Floats v) {
    double lanes[WIDTH];
    for (int lane = 0; lane < WIDTH; ++lane) lanes[lane] = v[lane];
    for (int half = WIDTH / 2; half; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

inline void flush(Running& r, double& sum, double& dot) {
    sum += across(r.sum_a + r.sum_b);
    dot += across(r.dot_a + r.dot_b);
    r = Running{};
}

// Adds elements from x on, of one channel: forward those of x - k and (x - k)^2, backward those of
// dy and dy * (x - k).
template <class T, bool BACKWARD>
inline void blocks_sums(const T* x, const T* dy, int64_t elements, Floats k, Running& r) {
    Floats s0 = r.sum_a, s1 = r.sum_b, d0 = r.dot_a, d1 = r.dot_b;
    int64_t p = 0;
    if (elements >= 8 * BLOCK) {
        Floats s2{}, s3{}, d2{}, d3{};
        for (; p + 2 * BLOCK <= elements; p += 2 * BLOCK) {
            Block u = load(x + p), v = load(x + p + BLOCK);
            u = {u.a - k, u.b - k};
            v = {v.a - k, v.b - k};
            Block du = u, dv = v;
            if (BACKWARD) {
                du = load(dy + p);
                dv = load(dy + p + BLOCK);
            }
            s0 += du.a, s1 += du.b, s2 += dv.a, s3 += dv.b;
            d0 += du.a * u.a, d1 += du.b * u.b, d2 += dv.a * v.a, d3 += dv.b * v.b;
        }
        s0 += s2, s1 += s3, d0 += d2, d1 += d3;
    }
    for (; p + BLOCK <= elements; p += BLOCK) {
        Block u = load(x + p);
        u = {u.a - k, u.b - k};
        Block du = BACKWARD ? load(dy + p) : u;
        s0 += du.a, s1 += du.b;
        d0 += du.a * u.a, d1 += du.b * u.b;
    }
    r = {s0, s1, d0, d1};
}

// The sums over the samples of a group, for some channels: in the order of the memory.
template <class T, bool BACKWARD>
inline void channel_sums(const T* x, const T* dy, int64_t step, int64_t samples, int64_t channels,
                         int64_t positions, const float* k, Running* running, double* sum,
                         double* dot) {
    const int64_t rest = positions % BLOCK, whole = positions - rest;
    const Last<T> last(rest);
    std::fill(sum, sum + channels, 0.0);
    std::fill(dot, dot + channels, 0.0);
    std::fill(running, running + channels, Running{});
    int64_t chain = 0;
    for (int64_t i = 0; i < samples; ++i) {
        const T* from = x + i * step;
        const T* with = BACKWARD ? dy + i * step : from;
        for (int64_t c = 0; c < channels; ++c, from += positions, with += positions) {
            if (!whole) {
                double s = 0, d = 0;
                for (int64_t p = 0; p < positions; ++p) {
                    float off = value(from[p]) - k[c], first = BACKWARD ? value(with[p]) : off;
                    s += first;
                    d += first * off;
                }
                sum[c] += s;
                dot[c] += d;
                continue;
            }
            const Floats center = all(k[c]);
            for (int64_t p = 0; p < whole; p += CHAIN * BLOCK) {
                const int64_t some = std::min(whole - p, CHAIN * BLOCK);
                blocks_sums<T, BACKWARD>(from + p, with + p, some, center, running[c]);
                if (whole > CHAIN * BLOCK) flush(running[c], sum[c], dot[c]);
            }
            if (rest) {
                Block u = load(from + positions - BLOCK);
                u = last.of({u.a - center, u.b - center});
                Block du = BACKWARD ? last.of(load(with + positions - BLOCK)) : u;
                running[c].sum_a += du.a, running[c].sum_b += du.b;
                running[c].dot_a += du.a * u.a, running[c].dot_b += du.b * u.b;
            }
        }
        chain += whole / BLOCK + 1;
        if (chain >= CHAIN || i + 1 == samples) {
            for (int64_t c = 0; c < channels; ++c) flush(running[c], sum[c], dot[c]);
            chain = 0;
        }
    }
}

// Mean and sum of squared deviations in double: slowly.
template <class T>
inline void channel_moments(const T* x, int64_t step, int64_t samples, int64_t positions,
                            double& mean, double& square) {
    double sum = 0, total = 0;
    for (int64_t i = 0; i < samples; ++i)
        for (int64_t p = 0; p < positions; ++p) sum += value(x[i * step + p]);
    mean = sum / (double)(samples * positions);
    for (int64_t i = 0; i < samples; ++i)
        for (int64_t p = 0; p < positions; ++p) {
            double off = value(x[i * step + p]) - mean;
            total += off * off;
        }
    square = total;
}

// f(element, element of dy, channel) of every element of some channels of a group.
template <class T, bool BACKWARD, class F>
inline void channel_map(const T* x, const T* dy, T* y, int64_t step, int64_t samples,
                        int64_t channels, int64_t positions, bool large, F of) {
    const int64_t rest = positions % BLOCK;
    const bool past = large && rest == 0 && aligned(y);
    for (int64_t i = 0; i < samples; ++i)
        for (int64_t c = 0; c < channels; ++c) {
            const int64_t at = i * step + c * positions;
            const T *from = x + at, *with = BACKWARD ? dy + at : from;
            T* to = y + at;
            const auto f = of(c);
            auto block = [&](int64_t p) {
                Block u = load(from + p), d = BACKWARD ? load(with + p) : u;
                Block made = {f(u.a, d.a), f(u.b, d.b)};
                past ? store_past(to + p, made) : store(to + p, made);
            };
            if (positions < BLOCK) {
                for (int64_t p = 0; p < positions; ++p) {
                    float u = value(from[p]), d = BACKWARD ? value(with[p]) : u;
                    put(to + p, f(all(u), all(d))[0]);
                }
                continue;
            }
            for (int64_t p = 0; p + BLOCK <= positions; p += BLOCK) block(p);
            if (rest) block(positions - BLOCK);  // some once more, to the same values
        }
    if (past) fence();
}

// How many channels a task takes: what fits in the cache of a core; if that is less than a page of
// each sample, where prefetching ends, then what fits in the cache of all cores. All of them where
// there is one pass, which goes through the memory in its order.
template <class T>
inline int64_t tile(const Shape& s, int64_t span, int64_t streams, int64_t wanted, bool both) {
    const int64_t of_sample = s.positions * span * (int64_t)sizeof(T);
    const int64_t bytes = std::max<int64_t>(1, s.samples * of_sample * streams);
    const int64_t spans = s.channels / span;
    int64_t fit = CACHED / bytes;
    if (fit < spans && fit * of_sample < 4096) fit = std::max(SHARED / bytes, 4096 / of_sample);
    if (!both) fit = spans;
    if (s.groups < wanted) fit = std::min(fit, (spans * s.groups + wanted - 1) / wanted);
    return std::max<int64_t>(1, std::min(fit, spans)) * span;
}

// task(g, first, channels, scratch, running) for all groups and tiles, shared out.
template <class Task>
inline void tiles(Team& team, int member, const Shape& s, int64_t size, int64_t scratch, Task task) {
    int64_t each = (s.channels + size - 1) / size, all = s.groups * each;
    std::vector<double> space((size_t)(scratch * size));
    std::vector<char> vectors((size_t)(size * (int64_t)sizeof(Running) + 64));
    auto* running = (Running*)(((uintptr_t)vectors.data() + 63) / 64 * 64);
    for (int64_t t = all * member / team.size(); t < all * (member + 1) / team.size(); ++t) {
        int64_t first = t % each * size;
        task(t / each, first, std::min(size, s.channels - first), space.data(), running);
    }
}

template <class T> void forward_contiguous(const Forward& f, const T* x, T* y, int64_t threads) {
    const Shape& s = f.shape;
    const int64_t step = s.channels * s.positions;
    const double n = (double)(s.samples * s.positions);
    const int64_t bytes = s.groups * s.samples * step * (int64_t)sizeof(T);
    const int64_t size = tile<T>(s, f.span, 2, threads, f.measure && f.apply);
    const bool large = bytes >= PAST;
    Team::run(threads, bytes, [&](Team& team, int member) {
        tiles(team, member, s, size, 4, [&](int64_t g, int64_t first, int64_t channels, double* sum, Running* running) {
            double* dot = sum + channels;
            float* floats = (float*)(dot + channels);
            Factors to{floats, floats + channels, nullptr, floats + 2 * channels};
            const int64_t start = g * s.group * step + first * s.positions, next = s.sample * step;
            if (f.measure) {
                for (int64_t c = 0; c < channels; ++c) {
                    const T* from = x + start + c * s.positions;
                    const int64_t some = std::min<int64_t>(s.positions, 16);
                    float k = 0;
                    for (int64_t p = 0; p < some; ++p) k += value(from[p]);
                    to.center[c] = k / (float)some;
                }
                channel_sums<T, false>(x + start, nullptr, next, s.samples, channels, s.positions,
                                       to.center, running, sum, dot);
                moments(channels, n, to.center, sum, dot, [&](int64_t c, double& m, double& q) {
                    channel_moments(x + start + c * s.positions, next, s.samples, s.positions, m, q);
                });
                pool(f, g, first, channels, n, sum, dot);
            }
            if (!f.apply) return;
            factors(f, g, first, channels, to);
            channel_map<T, false>(
                x + start, nullptr, y + start, next, s.samples, channels, s.positions, large,
                [&](int64_t c) {
                    const Floats k = all(to.center[c]), a = all(to.scale[c]), b = all(to.shift[c]);
                    return [=](Floats u, Floats) { return (u - k) * a + b; };
                });
        });
    });
}

template <class T>
void backward_contiguous(const Backward& f, const T* dy, const T* x, T* dx, int64_t threads) {
    const Shape& s = f.shape;
    const int64_t step = s.channels * s.positions;
    const int64_t bytes = 2 * s.groups * s.samples * step * (int64_t)sizeof(T);
    const int64_t size = tile<T>(s, f.span, 3, threads, f.measure && f.apply);
    const bool large = bytes / 2 >= PAST;
    Team::run(threads, bytes, [&](Team& team, int member) {
        tiles(team, member, s, size, 4, [&](int64_t g, int64_t first, int64_t channels, double* sum, Running* running) {
            double* dot = sum + channels;
            float* floats = (float*)(dot + channels);
            Factors to{floats, floats + channels, floats + 2 * channels, floats + 3 * channels};
            const int64_t start = g * s.group * step + first * s.positions, next = s.sample * step;
            if (f.measure) {
                centers(f, g, first, channels, to.center);
                channel_sums<T, true>(x + start, dy + start, next, s.samples, channels,
                                      s.positions, to.center, running, sum, dot);
                keep(f, g, first, channels, sum, dot);
            }
            if (!f.apply) return;
            factors(f, g, first, channels, to);
            channel_map<T, true>(
                x + start, dy + start, dx + start, next, s.samples, channels, s.positions, large,
                [&](int64_t c) {
                    const Floats k = all(to.center[c]), a = all(to.scale[c]), b = all(to.slope[c]),
                                 e = all(to.shift[c]);
                    return [=](Floats u, Floats d) { return d * a + ((u - k) * b + e); };
                });
        });
    });
}

}  // namespace normlab
