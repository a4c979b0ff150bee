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
    float *center, *scale, *slope, *shift;
};

// Sums of x - k and of its square, over n elements, to mean and sum of squared deviations.
// `again(c, mean, square)` takes them in double where k was too far from the mean, or where a sum is
// not finite: an outlier as the first element, values that a float cannot square.
template <class Again>
inline void moments(int64_t channels, double n, const float* k, double* sum, double* square,
                    Again again) {
    const double share = 1 / n;
    for (int64_t c = 0; c < channels; ++c) {
        double off = sum[c] * share, rest = square[c] - sum[c] * off;
        bool far = off * off * n > 4 * rest && std::fabs(off) > 1e-6 * std::fabs((double)k[c]);
        if (far || !std::isfinite(square[c])) {
            again(c, sum[c], square[c]);
        } else {
            sum[c] = k[c] + off;
            square[c] = rest < 0 ? 0 : rest;
        }
    }
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
        double centre = 0, total = 0;
        for (int64_t c = 0; c < f.span; ++c) centre += m[c];
        centre /= (double)f.span;
        for (int64_t c = 0; c < f.span; ++c)
            total += q[c] + n * (m[c] - centre) * (m[c] - centre);
        f.mean[at + s] = f.span == 1 ? m[0] : centre;
        f.var[at + s] = total / count;
    }
}

// Where the statistics of channels from `first` on are, and 1 / sqrt(var + eps), taken once per span.
template <class F> class Known {
  public:
    Known(const F& f, int64_t g, int64_t first)
        : f_(f), from_(g * (f.shape.channels / f.span)), first_(first) {}

    int64_t at(int64_t c) const {
        return from_ + (f_.span == 1 ? first_ + c : (first_ + c) / f_.span);
    }

    double rstd(int64_t at) {
        if (at != taken_) rstd_ = 1 / std::sqrt(f_.var[at] + f_.eps), taken_ = at;
        return rstd_;
    }

  private:
    const F& f_;
    int64_t from_, first_, taken_ = -1;
    double rstd_ = 0;
};

// As torch.clamp, a NaN stays one.
inline double clamp(double v, double low, double high) { return v < low ? low : v > high ? high : v; }

inline void factors(const Forward& f, int64_t g, int64_t first, int64_t channels, Factors to) {
    int64_t row = f.own ? g * f.shape.channels : 0;
    const float* weight = f.weight ? f.weight + row + first : nullptr;
    const float* bias = f.bias ? f.bias + row + first : nullptr;
    const Correction& running = f.towards;
    Known known(f, g, first);
    for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = known.at(c);
        double mean = f.mean ? f.mean[at] : 0, scale = known.rstd(at), shift = 0;
        if (running.r) {
            const double sigma = std::sqrt(running.var[first + c] + f.eps);
            const double r = std::sqrt(f.var[at] + f.eps) / sigma;
            const double d = (mean - running.mean[first + c]) / sigma;
            // Rounded, as backward takes them.
            scale *= running.r[at] = (float)clamp(r, 1 / running.r_limit, running.r_limit);
            shift = running.d[at] = (float)clamp(d, -running.d_limit, running.d_limit);
        }
        if (weight) scale *= weight[c], shift *= weight[c];
        float center = tame(mean);
        to.center[c] = center;
        to.scale[c] = tame(scale);
        // What rounding took from the mean is not lost.
        to.shift[c] = tame(shift + (bias ? bias[c] : 0.0) - (mean - center) * scale);
    }
}

// The centers alone, for the first pass of a backward.
inline void centers(const Backward& f, int64_t g, int64_t first, int64_t channels, float* center) {
    const Known known(f, g, first);
    for (int64_t c = 0; c < channels; ++c) center[c] = tame(f.mean[known.at(c)]);
}

// Sums of dy * (x - center) to those of dy * h, and both to the results.
inline void keep(const Backward& f, int64_t g, int64_t first, int64_t channels, const double* sum,
                 const double* dot) {
    const int64_t row = g * f.shape.channels + first;
    Known known(f, g, first);
    for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = known.at(c);
        double off = f.mean[at] - (float)f.mean[at];
        f.sums[row + c] = sum[c];
        f.dots[row + c] = (dot[c] - off * sum[c]) * known.rstd(at);
    }
}

inline void factors(const Backward& f, int64_t g, int64_t first, int64_t channels, Factors to) {
    int64_t own = f.own ? g * f.shape.channels : 0;
    const float* weight = f.weight ? f.weight + own + first : nullptr;
    int64_t row = g * f.shape.channels + first;
    int64_t known = g * (f.shape.channels / f.span) + first / f.span;
    for (int64_t s = 0; s < channels / f.span; ++s) {
        double sum = 0, dot = 0;
        for (int64_t c = s * f.span; c < (s + 1) * f.span; ++c) {
            double w = weight ? weight[c] : 1.0;
            sum += w * f.sums[row + c];
            dot += w * f.dots[row + c];
        }
        double mean = f.mean[known + s], rstd = 1 / std::sqrt(f.var[known + s] + f.eps);
        float center = tame(mean);
        double slope = -rstd * rstd * dot / f.count;
        double shift = -rstd * sum / f.count - slope * (mean - center);
        for (int64_t c = s * f.span; c < (s + 1) * f.span; ++c) {
            to.center[c] = center;
            to.scale[c] = tame(weight ? weight[c] * rstd : rstd);
            to.slope[c] = tame(slope);
            to.shift[c] = tame(shift);
        }
    }
}

}  // namespace normlab
