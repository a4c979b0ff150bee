// The two passes where each channel of a sample is contiguous (NCHW).
//
// A task is a group of samples and so few of its channels that the second pass finds them in cache.
#pragma once

#include "finish.h"
#include "vectors.h"

namespace normlab {

// Blocks that are added up in float32 before the sums go on in double.
constexpr int64_t CHAIN = 128;

// Over the elements of one channel of a group. dy null: sums of x - k and (x - k)^2; else of dy and
// dy * (x - k).
template <class T, bool BACKWARD>
inline void channel_sums(const T* x, const T* dy, int64_t step, int64_t samples, int64_t positions,
                         float k, double& sum, double& dot) {
    const Floats center = all(k);
    double sums = 0, dots = 0;
    if (positions < BLOCK) {
        for (int64_t i = 0; i < samples; ++i) {
            float s = 0, d = 0;
            for (int64_t p = 0; p < positions; ++p) {
                float off = value(x[i * step + p]) - k;
                float first = BACKWARD ? value(dy[i * step + p]) : off;
                s += first;
                d += first * off;
            }
            sums += s;
            dots += d;
        }
        sum = sums;
        dot = dots;
        return;
    }
    Floats s0{}, s1{}, s2{}, s3{}, d0{}, d1{}, d2{}, d3{};
    double flushed[2 * WIDTH] = {};
    int64_t chain = 0;
    auto flush = [&] {
        Floats s = (s0 + s1) + (s2 + s3), d = (d0 + d1) + (d2 + d3);
        for (int lane = 0; lane < WIDTH; ++lane) flushed[lane] += s[lane];
        for (int lane = 0; lane < WIDTH; ++lane) flushed[WIDTH + lane] += d[lane];
        s0 = s1 = s2 = s3 = d0 = d1 = d2 = d3 = Floats{};
        chain = 0;
    };
    const int64_t rest = positions % BLOCK;
    const Last<T> last(rest);
    for (int64_t i = 0; i < samples; ++i) {
        const T* from = x + i * step;
        const T* with = BACKWARD ? dy + i * step : nullptr;
        int64_t p = 0;
        while (p + BLOCK <= positions) {
            int64_t stop = std::min(positions, p + CHAIN * BLOCK);
            chain += (stop - p) / BLOCK;
            for (; p + 2 * BLOCK <= stop; p += 2 * BLOCK) {
                Block u = load(from + p), v = load(from + p + BLOCK);
                u = {u.a - center, u.b - center};
                v = {v.a - center, v.b - center};
                Block du = u, dv = v;
                if (BACKWARD) {
                    du = load(with + p);
                    dv = load(with + p + BLOCK);
                }
                s0 += du.a, s1 += du.b, s2 += dv.a, s3 += dv.b;
                d0 += du.a * u.a, d1 += du.b * u.b, d2 += dv.a * v.a, d3 += dv.b * v.b;
            }
            for (; p + BLOCK <= stop; p += BLOCK) {
                Block u = load(from + p);
                u = {u.a - center, u.b - center};
                Block du = BACKWARD ? load(with + p) : u;
                s0 += du.a, s1 += du.b;
                d0 += du.a * u.a, d1 += du.b * u.b;
            }
            if (chain >= CHAIN) flush();
        }
        if (rest) {
            Block u = load(from + positions - BLOCK);
            u = last.of({u.a - center, u.b - center});
            Block du = BACKWARD ? last.of(load(with + positions - BLOCK)) : u;
            s2 += du.a, s3 += du.b;
            d2 += du.a * u.a, d3 += du.b * u.b;
            ++chain;
        }
    }
    flush();
    for (int lane = 0; lane < WIDTH; ++lane) sums += flushed[lane];
    for (int lane = 0; lane < WIDTH; ++lane) dots += flushed[WIDTH + lane];
    sum = sums;
    dot = dots;
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

// f(element, element of dy) of every element of one channel of a group.
template <class T, bool BACKWARD, class F>
inline void channel_map(const T* x, const T* dy, T* y, int64_t step, int64_t samples,
                        int64_t positions, F f) {
    const int64_t rest = positions % BLOCK;
    for (int64_t i = 0; i < samples; ++i) {
        const T* from = x ? x + i * step : nullptr;
        const T* with = BACKWARD ? dy + i * step : nullptr;
        T* to = y + i * step;
        auto block = [&](int64_t p) {
            Block u = load(from + p), d = BACKWARD ? load(with + p) : u;
            store(to + p, {f(u.a, d.a), f(u.b, d.b)});
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
}

template <class T> inline int64_t tile(const Shape& s, int64_t span, int64_t streams, int64_t wanted) {
    int64_t bytes = s.samples * s.positions * span * (int64_t)sizeof(T) * streams;
    int64_t spans = s.channels / span;
    int64_t fit = std::max<int64_t>(1, CACHED / std::max<int64_t>(bytes, 1));
    if (s.groups < wanted) fit = std::min(fit, (spans * s.groups + wanted - 1) / wanted);
    return std::max<int64_t>(1, std::min(fit, spans)) * span;
}

// task(g, first, channels, scratch) for all groups and tiles, shared out.
template <class Task>
inline void tiles(Team& team, int member, const Shape& s, int64_t size, int64_t scratch, Task task) {
    int64_t each = (s.channels + size - 1) / size, all = s.groups * each;
    std::vector<double> space((size_t)(scratch * size));
    for (int64_t t = all * member / team.size(); t < all * (member + 1) / team.size(); ++t) {
        int64_t first = t % each * size;
        task(t / each, first, std::min(size, s.channels - first), space.data());
    }
}

template <class T> void forward_contiguous(const Forward& f, const T* x, T* y, int64_t threads) {
    const Shape& s = f.shape;
    const int64_t step = s.channels * s.positions;
    const double n = (double)(s.samples * s.positions);
    const int64_t bytes = s.groups * s.samples * step * (int64_t)sizeof(T);
    const int64_t size = tile<T>(s, f.span, 2, threads);
    Team::run(threads, bytes, [&](Team& team, int member) {
        tiles(team, member, s, size, 4, [&](int64_t g, int64_t first, int64_t channels, double* sum) {
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
                    to.center[c] = k /= (float)some;
                    channel_sums<T, false>(from, nullptr, next, s.samples, s.positions, k, sum[c],
                                           dot[c]);
                }
                moments(channels, n, to.center, sum, dot, [&](int64_t c, double& m, double& q) {
                    channel_moments(x + start + c * s.positions, next, s.samples, s.positions, m, q);
                });
                pool(f, g, first, channels, n, sum, dot);
            }
            if (!f.apply) return;
            factors(f, g, first, channels, to);
            for (int64_t c = 0; c < channels; ++c) {
                const Floats k = all(to.center[c]), a = all(to.scale[c]), b = all(to.shift[c]);
                const int64_t at = start + c * s.positions;
                channel_map<T, false>(x + at, nullptr, y + at, next, s.samples, s.positions,
                                      [=](Floats u, Floats) { return (u - k) * a + b; });
            }
        });
    });
}

template <class T>
void backward_contiguous(const Backward& f, const T* dy, const T* x, T* dx, int64_t threads) {
    const Shape& s = f.shape;
    const int64_t step = s.channels * s.positions;
    const int64_t bytes = 2 * s.groups * s.samples * step * (int64_t)sizeof(T);
    const int64_t size = tile<T>(s, f.span, 3, threads);
    Team::run(threads, bytes, [&](Team& team, int member) {
        tiles(team, member, s, size, 4, [&](int64_t g, int64_t first, int64_t channels, double* sum) {
            double* dot = sum + channels;
            float* floats = (float*)(dot + channels);
            Factors to{floats, floats + channels, floats + 2 * channels, floats + 3 * channels};
            const int64_t start = g * s.group * step + first * s.positions, next = s.sample * step;
            if (f.measure) {
                centers(f, g, first, channels, to.center);
                for (int64_t c = 0; c < channels; ++c) {
                    const int64_t at = start + c * s.positions;
                    channel_sums<T, true>(x + at, dy + at, next, s.samples, s.positions,
                                          to.center[c], sum[c], dot[c]);
                }
                keep(f, g, first, channels, sum, dot);
            }
            if (!f.apply) return;
            factors(f, g, first, channels, to);
            for (int64_t c = 0; c < channels; ++c) {
                const Floats k = all(to.center[c]), a = all(to.scale[c]), b = all(to.slope[c]),
                             e = all(to.shift[c]);
                const int64_t at = start + c * s.positions;
                channel_map<T, true>(x + at, dy + at, dx + at, next, s.samples, s.positions,
                                     [=](Floats u, Floats d) { return d * a + ((u - k) * b + e); });
            }
        });
    });
}

}  // namespace normlab
