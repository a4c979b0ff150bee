// The two passes where the channels of a position are contiguous (channels_last, and (N, C)).
//
// Rows of few channels are folded, several into one, so that a row fills whole vectors in any number
// of channels. A group that fits in cache is one task; a larger one is cut into pieces of a fixed
// size, whose sums are added in their order, whatever the number of threads.
#pragma once

#include <numeric>
#include <type_traits>

#include "contiguous.h"

namespace normlab {

template <class T> struct Fold {
    int64_t channels, rows, width;
    std::vector<int32_t> slots;  // of each column

    explicit Fold(int64_t channels) : channels(channels) {
        int64_t whole = BLOCK / std::gcd(channels, (int64_t)BLOCK);
        rows = whole * ((8 * WIDTH + whole * channels - 1) / (whole * channels));
        width = rows * channels;
        slots.resize((size_t)width);
        for (int64_t column = 0; column < width; ++column)
            slots[(size_t)column] = (int32_t)slot<T>(column);
    }

    static constexpr bool IN_ORDER = std::is_same_v<T, float>;  // each column is its own slot

    // Values of the channels, in the place of each column.
    void spread(const float* from, float* to) const {
        for (int64_t r = 0; r < width; r += channels)
            if (IN_ORDER)
                std::copy_n(from, channels, to + r);
            else
                for (int64_t c = 0; c < channels; ++c) to[slots[(size_t)(r + c)]] = from[c];
    }

    // Sums of the columns as those of the channels.
    void gather(const double* __restrict from, double* __restrict to) const {
        for (int64_t c = 0; c < channels; ++c) to[c] = from[IN_ORDER ? c : slots[(size_t)c]];
        for (int64_t r = channels; r < width; r += channels)
            for (int64_t c = 0; c < channels; ++c)
                to[c] += from[IN_ORDER ? r + c : slots[(size_t)(r + c)]];
    }
};

// Part of a group: `rows` rows in the memory from `start` on (counted in rows of C).
struct Piece {
    int64_t start, rows;
};

// Groups as pieces. Interleaved samples are pieces of their own.
struct Cut {
    int64_t runs, run, limit, each;  // runs of `run` rows, cut into `each` pieces of up to `limit`
    const Shape& shape;

    Cut(const Shape& s, int64_t limit) : limit(limit), shape(s) {
        runs = s.sample == 1 ? 1 : s.samples;
        run = s.sample == 1 ? s.samples * s.positions : s.positions;
        each = (run + limit - 1) / limit;
    }

    int64_t pieces() const { return runs * each; }

    // Whether a group is one task.
    bool small() const { return shape.samples * shape.positions <= limit; }

    Piece piece(int64_t g, int64_t which) const {
        int64_t from = which % each * limit;
        int64_t sample = g * shape.group + which / each * shape.sample;
        return {sample * shape.positions + from, std::min(limit, run - from)};
    }
};

// A piece's sums, per column, to `sum` and `dot`, or added to what is there: see channel_sums. k and
// both are in the order of the slots; floats holds 2 * width.
template <class T, bool BACKWARD>
inline void row_sums(const Fold<T>& fold, const T* x, const T* dy, int64_t rows, const float* k,
                     bool add, float* floats, double* sum, double* dot) {
    const int64_t width = fold.width, whole = rows / fold.rows;
    const int64_t some = std::max<int64_t>(4, (4 << 10) / (width * (int64_t)sizeof(T)));
    float *s = floats, *d = floats + width;
    std::fill(s, s + 2 * width, 0.0f);
    auto flush = [&] {
        if (add) {
            for (int64_t j = 0; j < width; ++j) sum[j] += s[j];
            for (int64_t j = 0; j < width; ++j) dot[j] += d[j];
        } else {
            std::copy_n(s, width, sum);
            std::copy_n(d, width, dot);
            add = true;
        }
    };
    auto columns = [&](const T* from, const T* with, int64_t n, int64_t j) {  // one block
        Block center = {read<Floats>(k + j), read<Floats>(k + j + WIDTH)};
        Block ss = {read<Floats>(s + j), read<Floats>(s + j + WIDTH)};
        Block dd = {read<Floats>(d + j), read<Floats>(d + j + WIDTH)};
        for (int64_t r = 0; r < n; ++r) {
            Block u = load(from + r * width + j);
            u = {u.a - center.a, u.b - center.b};
            Block du = BACKWARD ? load(with + r * width + j) : u;
            ss = {ss.a + du.a, ss.b + du.b};
            dd = {dd.a + du.a * u.a, dd.b + du.b * u.b};
        }
        write(s + j, ss.a), write(s + j + WIDTH, ss.b);
        write(d + j, dd.a), write(d + j + WIDTH, dd.b);
    };
    auto two = [&](const T* from, const T* with, int64_t n, int64_t j) {  // two blocks side by side
        const Floats k0 = read<Floats>(k + j), k1 = read<Floats>(k + j + WIDTH),
                     k2 = read<Floats>(k + j + BLOCK), k3 = read<Floats>(k + j + BLOCK + WIDTH);
        Floats s0 = read<Floats>(s + j), s1 = read<Floats>(s + j + WIDTH),
               s2 = read<Floats>(s + j + BLOCK), s3 = read<Floats>(s + j + BLOCK + WIDTH);
        Floats d0 = read<Floats>(d + j), d1 = read<Floats>(d + j + WIDTH),
               d2 = read<Floats>(d + j + BLOCK), d3 = read<Floats>(d + j + BLOCK + WIDTH);
        for (int64_t r = 0; r < n; ++r) {
            Block u = load(from + r * width + j), v = load(from + r * width + j + BLOCK);
            u = {u.a - k0, u.b - k1};
            v = {v.a - k2, v.b - k3};
            Block du = u, dv = v;
            if (BACKWARD) {
                du = load(with + r * width + j);
                dv = load(with + r * width + j + BLOCK);
            }
            s0 += du.a, s1 += du.b, s2 += dv.a, s3 += dv.b;
            d0 += du.a * u.a, d1 += du.b * u.b, d2 += dv.a * v.a, d3 += dv.b * v.b;
        }
        write(s + j, s0), write(s + j + WIDTH, s1);
        write(s + j + BLOCK, s2), write(s + j + BLOCK + WIDTH, s3);
        write(d + j, d0), write(d + j + WIDTH, d1);
        write(d + j + BLOCK, d2), write(d + j + BLOCK + WIDTH, d3);
    };
    int64_t chain = 0;
    for (int64_t r = 0; r < whole; r += some) {
        const int64_t n = std::min(some, whole - r);
        const T *from = x + r * width, *with = BACKWARD ? dy + r * width : nullptr;
        int64_t j = 0;
        for (; j + 2 * BLOCK <= width; j += 2 * BLOCK) two(from, with, n, j);
        if (j < width) columns(from, with, n, j);
        if ((chain += n) >= CHAIN) {
            flush();
            std::fill(s, s + 2 * width, 0.0f);
            chain = 0;
        }
    }
    const int64_t left = (rows - whole * fold.rows) * fold.channels;
    const T *from = x + whole * width, *with = BACKWARD ? dy + whole * width : nullptr;
    int64_t j = 0;
    for (; j + BLOCK <= left; j += BLOCK) columns(from, with, 1, j);
    for (; j < left; ++j) {
        const int32_t at = fold.slots[(size_t)j];
        float u = value(from[j]) - k[at], du = BACKWARD ? value(with[j]) : u;
        s[at] += du;
        d[at] += du * u;
    }
    flush();
}

// Rows whose factors are read once.
constexpr int AT_ONCE = 4;

// f(place among the factors)(element, element of dy) of ROWS whole rows.
template <class T, bool BACKWARD, bool PAST, int ROWS, class F>
inline void map_rows(const T* x, const T* dy, T* y, int64_t width, F f) {
    for (int64_t j = 0; j < width; j += BLOCK) {
        const auto a = f(j), b = f(j + WIDTH);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const int64_t at = r * width + j;
            Block u = load(x + at), d = BACKWARD ? load(dy + at) : u;
            Block made = {a(u.a, d.a), b(u.b, d.b)};
            PAST ? store_past(y + at, made) : store(y + at, made);
        }
    }
}

// f(place among the factors)(element, element of dy) of elements whose factors are the same every
// 2 * BLOCK: these stay in registers. Between its misses a core looks ahead over so many instructions
// only, so that each one saved is time even where memory is what is waited for. Returned is how many
// elements were mapped.
template <class T, bool BACKWARD, bool PAST, class F>
inline int64_t map_periods(const T* x, const T* dy, T* y, int64_t elements, F f) {
    const auto a = f(0), b = f(WIDTH), c = f(BLOCK), d = f(BLOCK + WIDTH);
    int64_t r = 0;
    for (; r + 2 * BLOCK <= elements; r += 2 * BLOCK) {
        Block u = load(x + r), v = load(x + r + BLOCK);
        Block du = BACKWARD ? load(dy + r) : u, dv = BACKWARD ? load(dy + r + BLOCK) : v;
        Block first = {a(u.a, du.a), b(u.b, du.b)}, second = {c(v.a, dv.a), d(v.b, dv.b)};
        PAST ? store_past(y + r, first) : store(y + r, first);
        PAST ? store_past(y + r + BLOCK, second) : store(y + r + BLOCK, second);
    }
    return r;
}

// The same of a piece.
template <class T, bool BACKWARD, class F>
inline void row_map(const Fold<T>& fold, const T* x, const T* dy, T* y, int64_t rows, bool large,
                    F f) {
    const bool past = large && aligned(y);
    const int64_t width = fold.width, elements = rows * fold.channels;
    int64_t r = 0;
    if (2 * BLOCK % fold.channels == 0)
        r = past ? map_periods<T, BACKWARD, true>(x, dy, y, elements, f)
                 : map_periods<T, BACKWARD, false>(x, dy, y, elements, f);
    // What comes from memory and goes there is read and written in its order.
    const int64_t step = (large ? 1 : AT_ONCE) * width;
    for (; r + step <= elements; r += step) {
        const T* with = BACKWARD ? dy + r : nullptr;
        if (past)
            map_rows<T, BACKWARD, true, 1>(x + r, with, y + r, width, f);
        else if (large)
            map_rows<T, BACKWARD, false, 1>(x + r, with, y + r, width, f);
        else
            map_rows<T, BACKWARD, false, AT_ONCE>(x + r, with, y + r, width, f);
    }
    for (; r < elements; r += width) {
        const T *from = x + r, *with = BACKWARD ? dy + r : nullptr;
        T* to = y + r;
        const int64_t here = std::min(width, elements - r);
        int64_t j = 0;
        for (; j + BLOCK <= here; j += BLOCK) {
            Block u = load(from + j), d = BACKWARD ? load(with + j) : u;
            store(to + j, {f(j)(u.a, d.a), f(j + WIDTH)(u.b, d.b)});
        }
        if (j < here) {
            // Fewer than a block: through one of our own.
            T in[BLOCK] = {}, other[BLOCK] = {}, out[BLOCK];
            std::copy(from + j, from + here, in);
            if (BACKWARD) std::copy(with + j, with + here, other);
            Block u = load(in), d = load(other);
            store(out, {f(j)(u.a, d.a), f(j + WIDTH)(u.b, d.b)});
            std::copy(out, out + (here - j), to + j);
        }
    }
    if (past) fence();
}

template <class T> inline int64_t piece_rows(const Fold<T>& fold, int64_t streams) {
    int64_t bytes = fold.width * (int64_t)sizeof(T) * streams;
    return fold.rows * std::max<int64_t>(1, CACHED / bytes);
}

// Both passes over all groups. sums(g, piece, first, add, few, spread, columns), finish(g, sum, dot,
// space) once per group, map(g, piece, spread factors) with so many `factors` per channel.
template <class T, class Sums, class Finish, class Map>
inline void passes(const Fold<T>& fold, const Cut& cut, int64_t groups, int64_t threads,
                   int64_t bytes, int factors, bool measure, bool apply, Sums sums, Finish finish, Map map) {
    const int64_t width = fold.width, channels = fold.channels, pieces = cut.pieces();
    const bool small = cut.small();
    // Of the whole team, for large groups: sums of each piece, and the factors.
    std::vector<double> parts((size_t)(small ? 0 : 2 * channels * pieces));
    std::vector<float> shared((size_t)(small ? 0 : 4 * width));
    Team::run(threads, bytes, [&](Team& team, int member) {
        std::vector<double> columns((size_t)(2 * width)), total((size_t)(2 * channels));
        std::vector<float> space((size_t)(4 * width + 4 * channels));
        float* spread = space.data();
        float* few = spread + 4 * width;
        double *sum = total.data(), *dot = sum + channels;
        if (small) {
            for (int64_t g = groups * member / team.size();
                 g < groups * (member + 1) / team.size(); ++g) {
                if (measure) {
                    for (int64_t p = 0; p < pieces; ++p)
                        sums(g, cut.piece(g, p), p == 0, p > 0, few, spread, columns.data());
                    fold.gather(columns.data(), sum);
                    fold.gather(columns.data() + width, dot);
                }
                finish(g, sum, dot, few);
                if (!apply) continue;
                for (int64_t v = 0; v < factors; ++v) fold.spread(few + v * channels, spread + v * width);
                for (int64_t p = 0; p < pieces; ++p) map(cut.piece(g, p), spread);
            }
            return;
        }
        const int64_t from = pieces * member / team.size(), to = pieces * (member + 1) / team.size();
        for (int64_t g = 0; g < groups; ++g) {
            if (measure) {
                for (int64_t p = from; p < to; ++p) {
                    sums(g, cut.piece(g, p), p == from, false, few, spread, columns.data());
                    double* part = parts.data() + 2 * channels * p;
                    fold.gather(columns.data(), part);
                    fold.gather(columns.data() + width, part + channels);
                }
                team.meet();
            }
            if (member == 0) {
                std::fill(total.begin(), total.end(), 0.0);
                for (int64_t p = 0; measure && p < pieces; ++p)
                    for (int64_t c = 0; c < 2 * channels; ++c)
                        sum[c] += parts[(size_t)(2 * channels * p + c)];
                finish(g, sum, dot, few);
                for (int64_t v = 0; v < factors; ++v)
                    fold.spread(few + v * channels, shared.data() + v * width);
            }
            team.meet();
            // The pieces that were read last are the likeliest to be in cache.
            for (int64_t p = from; apply && p < to; ++p)
                map(cut.piece(g, measure ? from + to - 1 - p : p), shared.data());
            team.meet();
        }
    });
}

template <class T> void forward_last(const Forward& f, const T* x, T* y, int64_t threads) {
    const Shape& s = f.shape;
    const int64_t channels = s.channels, rows = s.samples * s.positions;
    const Fold<T> fold(channels);
    const Cut cut(s, piece_rows(fold, 2));
    const bool large = s.groups * rows * channels * (int64_t)sizeof(T) >= PAST;
    const int64_t width = fold.width;
    const bool small = cut.small();
    auto guess = [&](int64_t g, float* k) {  // the mean of a few rows
        const T* from = x + g * s.group * s.positions * channels;
        const int64_t some = std::min<int64_t>(8, s.sample == 1 ? rows : s.positions);
        int64_t c = 0;
        for (; std::is_same_v<T, float> && c + WIDTH <= channels; c += WIDTH) {
            Floats total{};
            for (int64_t r = 0; r < some; ++r) total += read<Floats>(from + r * channels + c);
            write(k + c, total / (float)some);
        }
        for (; c < channels; ++c) {
            k[c] = 0;
            for (int64_t r = 0; r < some; ++r) k[c] += value(from[r * channels + c]);
            T near;  // of bfloat16 elements: an odd k would round every difference the same way
            put(&near, k[c] / (float)some);
            k[c] = value(near);
        }
    };
    passes(
        fold, cut, s.groups, threads, s.groups * rows * channels * (int64_t)sizeof(T), 3,
        f.measure, f.apply,
        [&](int64_t g, Piece piece, bool first, bool add, float* few, float* spread, double* columns) {
            if (first) {
                guess(g, few);
                fold.spread(few, spread);
            }
            row_sums<T, false>(fold, x + piece.start * channels, nullptr, piece.rows, spread, add,
                               spread + width, columns, columns + width);
        },
        [&](int64_t g, double* sum, double* dot, float* few) {
            if (f.measure) {
                if (!small) guess(g, few);  // else it is what the sums left there
                moments(channels, (double)rows, few, sum, dot, [&](int64_t c, double& m, double& q) {
                    // As in NCHW, of elements that are `channels` apart.
                    double total = 0, square = 0;
                    auto each = [&](auto use) {
                        for (int64_t p = 0; p < cut.pieces(); ++p) {
                            Piece piece = cut.piece(g, p);
                            const T* from = x + piece.start * channels + c;
                            for (int64_t r = 0; r < piece.rows; ++r)
                                use((double)value(from[r * channels]));
                        }
                    };
                    each([&](double v) { total += v; });
                    m = total / (double)rows;
                    each([&](double v) { square += (v - m) * (v - m); });
                    q = square;
                });
                pool(f, g, 0, channels, (double)rows, sum, dot);
            }
            if (f.apply)
                factors(f, g, 0, channels,
                        {few, few + channels, nullptr, few + 2 * channels});
        },
        [&](Piece piece, const float* factor) {
            const int64_t at = piece.start * channels;
            const float *k = factor, *a = k + width, *b = a + width;
            row_map<T, false>(fold, x + at, nullptr, y + at, piece.rows, large,
                              [=](int64_t j) {
                                  const Floats center = read<Floats>(k + j),
                                               scale = read<Floats>(a + j),
                                               shift = read<Floats>(b + j);
                                  return [=](Floats u, Floats) {
                                      return (u - center) * scale + shift;
                                  };
                              });
        });
}

template <class T>
void backward_last(const Backward& f, const T* dy, const T* x, T* dx, int64_t threads) {
    const Shape& s = f.shape;
    const int64_t channels = s.channels, rows = s.samples * s.positions;
    const Fold<T> fold(channels);
    const Cut cut(s, piece_rows(fold, 3));
    const bool large = s.groups * rows * channels * (int64_t)sizeof(T) >= PAST;
    const int64_t width = fold.width;
    passes(
        fold, cut, s.groups, threads, 2 * s.groups * rows * channels * (int64_t)sizeof(T), 4,
        f.measure, f.apply,
        [&](int64_t g, Piece piece, bool first, bool add, float* few, float* spread, double* columns) {
            if (first) {
                centers(f, g, 0, channels, few);
                fold.spread(few, spread);
            }
            const int64_t at = piece.start * channels;
            row_sums<T, true>(fold, x + at, dy + at, piece.rows, spread, add, spread + width,
                              columns, columns + width);
        },
        [&](int64_t g, double* sum, double* dot, float* few) {
            if (f.measure) keep(f, g, 0, channels, sum, dot);
            if (f.apply)
                factors(f, g, 0, channels,
                        {few, few + channels, few + 2 * channels, few + 3 * channels});
        },
        [&](Piece piece, const float* factor) {
            const int64_t at = piece.start * channels;
            const float *k = factor, *a = k + width, *b = a + width, *e = b + width;
            row_map<T, true>(fold, x + at, dy + at, dx + at, piece.rows, large,
                             [=](int64_t j) {
                                 const Floats center = read<Floats>(k + j),
                                              scale = read<Floats>(a + j),
                                              slope = read<Floats>(b + j),
                                              shift = read<Floats>(e + j);
                                 return [=](Floats u, Floats d) {
                                     return d * scale + ((u - center) * slope + shift);
                                 };
                             });
        });
}

}  // namespace normlab
