// What happens between the two passes, in double, for a few channels at a time.
#pragma once

#include <cmath>
#include <cstdint>

#include "team.h"
#include "vectors.h"

namespace normlab {

// Batch Renorm's running statistics (channels) and limits; its r and d (groups, channels) are
// returned. Nothing of it is there where r is null.
struct Correction {
    const float *mean, *var;
    double r_limit, d_limit;
    float *r, *d;
};

// What a forward is given and returns. mean and var are (groups, channels / span), weight and bias
// (channels) or, where own, (groups, channels); each may be missing (null) but var.
struct Forward {
    Shape shape;
    int64_t span;
    double eps;
    bool measure, apply, own;
    const float *weight, *bias;
    double *mean, *var;
    Correction towards;
};

// The same of a backward. sums and dots are (groups, channels): of dy, and of dy * h with
// h = (x - mean) / sqrt(var + eps).
struct Backward {
    Shape shape;
    int64_t span;
    double eps, count;  // elements behind a mean
    bool measure, apply, own;
    const float* weight;
    const double *mean, *var;
    double *sums, *dots;
};

// Per channel, as the second pass needs it: (x - center) * scale + shift, or with dy
// dy * scale + (x - center) * slope + shift.
struct Factors {
    float *__restrict center, *__restrict scale, *__restrict slope, *__restrict shift;
};

inline void move(float k, double share, double& sum, double& square) {
    const double off = sum * share, rest = square - sum * off;
    sum = k + off;
    square = rest < 0 ? 0 : rest;
}

// Sums of x - k and of its square, over n elements, to mean and sum of squared deviations.
// `again(c, mean, square)` takes them in double where k was too far from the mean, or where a sum is
// not finite: an outlier as the first element, values that a float cannot square.
template <class Again>
inline void moments(int64_t channels, double n, const float* k, double* sum, double* square,
                    Again again) {
    const double share = 1 / n;
    auto unsure = [&](int64_t c) -> int64_t {
        const double off = sum[c] * share, rest = square[c] - sum[c] * off;
        const int64_t outside = off * off * n > 4 * rest ? -1 : 0;
        const int64_t apart = std::fabs(off) > 1e-6 * std::fabs((double)k[c]) ? -1 : 0;
        const int64_t finite = std::fabs(square[c]) < INFINITY ? -1 : 0;
        return (outside & apart) | ~finite;
    };
    // None is, as a rule: then no loop here has a branch, and all run in vectors.
    int64_t any = 0;
    for (int64_t c = 0; c < channels; ++c) any |= unsure(c);
    if (any) {
        for (int64_t c = 0; c < channels; ++c)
            if (unsure(c))
                again(c, sum[c], square[c]);
            else
                move(k[c], share, sum[c], square[c]);
        return;
    }
    for (int64_t c = 0; c < channels; ++c) move(k[c], share, sum[c], square[c]);
}

// v(0) + ... + v(n - 1), in as many sums as one register holds.
template <class V> inline double added(int64_t n, V v) {
    if (n == 1) return v(0);
    double sums[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int lane = 0; lane < 8; ++lane) sums[lane] += v(i + lane);
    for (; i < n; ++i) sums[i % 8] += v(i);
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

// Mean and sum of squares per channel, n elements each, to mean and variance per span of channels:
// for channels from `first` on of group g, which are written to the results.
inline void pool(const Forward& f, int64_t g, int64_t first, int64_t channels, double n,
                 const double* mean, const double* square) {
    int64_t spans = channels / f.span;
    int64_t at = g * (f.shape.channels / f.span) + first / f.span;
    double count = n * (double)f.span;
    for (int64_t s = 0; s < spans; ++s) {
        const double *m = mean + s * f.span, *q = square + s * f.span;
        const double centre = added(f.span, [=](int64_t c) { return m[c]; }) / (double)f.span;
        const double total = added(f.span, [=](int64_t c) {
            return q[c] + n * (m[c] - centre) * (m[c] - centre);
        });
        f.mean[at + s] = f.span == 1 ? m[0] : centre;
        f.var[at + s] = total / count;
    }
}

// f(place of the statistics, first channel, end) of each span of the channels from `first` on of
// group g: counted from `first`. No division per channel, whose sums are as short as a layer norm's.
template <class F, class Use>
inline void spans(const F& f, int64_t g, int64_t first, int64_t channels, Use use) {
    int64_t at = g * (f.shape.channels / f.span) + first / f.span;
    for (int64_t c = 0; c < channels; c += f.span) use(at++, c, c + f.span);
}

template <class F> inline double rstd(const F& f, int64_t at) {
    return 1 / std::sqrt(f.var[at] + f.eps);
}

// As torch.clamp, a NaN stays one.
inline double clamp(double v, double low, double high) { return v < low ? low : v > high ? high : v; }

inline void factors(const Forward& f, int64_t g, int64_t first, int64_t channels, Factors to) {
    int64_t row = f.own ? g * f.shape.channels : 0;
    const float* weight = f.weight ? f.weight + row + first : nullptr;
    const float* bias = f.bias ? f.bias + row + first : nullptr;
    const Correction& running = f.towards;
    spans(f, g, first, channels, [&](int64_t at, int64_t from, int64_t end) {
        const double mean = f.mean ? f.mean[at] : 0;
        double of_span = rstd(f, at), moved = 0;
        if (running.r) {
            const double sigma = std::sqrt(running.var[first + from] + f.eps);
            const double r = std::sqrt(f.var[at] + f.eps) / sigma;
            const double d = (mean - running.mean[first + from]) / sigma;
            // Rounded, as backward takes them.
            of_span *= running.r[at] = (float)clamp(r, 1 / running.r_limit, running.r_limit);
            moved = running.d[at] = (float)clamp(d, -running.d_limit, running.d_limit);
        }
        const float center = tame(mean);
        for (int64_t c = from; c < end; ++c) {
            const double w = weight ? weight[c] : 1.0;
            const double scale = of_span * w, shift = moved * w;
            to.center[c] = center;
            to.scale[c] = tame(scale);
            // What rounding took from the mean is not lost.
            to.shift[c] = tame(shift + (bias ? bias[c] : 0.0) - (mean - center) * scale);
        }
    });
}

// The centers alone, for the first pass of a backward.
inline void centers(const Backward& f, int64_t g, int64_t first, int64_t channels, float* center) {
    spans(f, g, first, channels, [&](int64_t at, int64_t from, int64_t end) {
        std::fill(center + from, center + end, tame(f.mean[at]));
    });
}

// Sums of dy * (x - center) to those of dy * h, and both to the results.
inline void keep(const Backward& f, int64_t g, int64_t first, int64_t channels, const double* sum,
                 const double* dot) {
    const int64_t row = g * f.shape.channels + first;
    double *sums = f.sums + row, *dots = f.dots + row;
    spans(f, g, first, channels, [&](int64_t at, int64_t from, int64_t end) {
        const double off = f.mean[at] - (float)f.mean[at], scale = rstd(f, at);
        for (int64_t c = from; c < end; ++c) {
            sums[c] = sum[c];
            dots[c] = (dot[c] - off * sum[c]) * scale;
        }
    });
}

inline void factors(const Backward& f, int64_t g, int64_t first, int64_t channels, Factors to) {
    int64_t own = f.own ? g * f.shape.channels : 0;
    const float* weight = f.weight ? f.weight + own + first : nullptr;
    int64_t row = g * f.shape.channels + first;
    const double *sums = f.sums + row, *dots = f.dots + row;
    spans(f, g, first, channels, [&](int64_t at, int64_t from, int64_t end) {
        auto weighted = [=](const double* values) {
            return added(end - from, [=](int64_t i) {
                return (weight ? weight[from + i] : 1.0) * values[from + i];
            });
        };
        const double sum = weighted(sums), dot = weighted(dots);
        const double mean = f.mean[at], scale = rstd(f, at);
        const float center = tame(mean);
        const double slope = -scale * scale * dot / f.count;
        const double shift = -scale * sum / f.count - slope * (mean - center);
        const float of_x = tame(slope), constant = tame(shift);
        for (int64_t c = from; c < end; ++c) {
            to.center[c] = center;
            to.scale[c] = tame(weight ? weight[c] * scale : scale);
            to.slope[c] = of_x;
            to.shift[c] = constant;
        }
    });
}

}  // namespace normlab
