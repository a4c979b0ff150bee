// What Python calls: functions without any of torch's headers.
#include <new>
#include <utility>

#include "channels_last.h"

namespace {

using namespace normlab;

template <class T>
void forward(const Forward& f, bool last, const void* x, void* y, int64_t threads) {
    (last ? forward_last<T> : forward_contiguous<T>)(f, (const T*)x, (T*)y, threads);
}

template <class T>
void backward(const Backward& f, bool last, const void* dy, const void* x, void* dx,
              int64_t threads) {
    (last ? backward_last<T> : backward_contiguous<T>)(f, (const T*)dy, (const T*)x, (T*)dx,
                                                       threads);
}

// The gradients of bias and weight: of each group, or of all, in their order.
void affine(const Backward& f, float* dbias, float* dweight) {
    const int64_t channels = f.shape.channels, groups = f.own ? 1 : f.shape.groups;
    const int64_t size = f.own ? f.shape.groups * channels : channels;
    std::vector<double> total((size_t)size);
    for (auto [from, to] : {std::pair(f.sums, dbias), std::pair(f.dots, dweight)}) {
        std::fill(total.begin(), total.end(), 0.0);
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t c = 0; c < size; ++c) total[(size_t)c] += from[g * size + c];
        for (int64_t c = 0; c < size; ++c) to[c] = (float)total[(size_t)c];
    }
}

// Those of Batch Renorm's bias and weight, of h * r + d.
void renorm_affine(const Backward& f, const float* r, const float* d, float* to) {
    const int64_t channels = f.shape.channels;
    for (int64_t c = 0; c < channels; ++c) {
        double dbias = 0, dweight = 0;
        for (int64_t at = c; at < f.shape.groups * channels; at += channels) {
            dbias += f.sums[at];
            dweight += r[at] * f.dots[at] + d[at] * f.sums[at];
        }
        to[c] = (float)dbias;
        to[channels + c] = (float)dweight;
    }
}

template <class Call> int guarded(Call call) {
    try {
        call();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// What _library.py packs. half: bfloat16, not float32; last: channels last; passes: 1 the first one, 2
// the second one, 3 both; own: weight and bias are (groups, channels).
struct Common {
    int64_t half, last, passes, threads;
    Shape shape;
    int64_t span;
    double eps;
};

// mean and var are in double, unless single, which needs passes == 2.
struct ForwardCall {
    Common of;
    int64_t own, single;
    const void* x;
    void* y;
    const float *weight, *bias;
    void *mean, *var;
    Correction towards;  // with passes == 3 and a span of 1
};

// sums is (2, groups, channels), affine (2, groups, channels) or, unless own, (2, channels). r and d
// (groups, channels), if given, are Batch Renorm's, and nothing is own.
struct BackwardCall {
    Common of;
    int64_t own;
    double count;
    const void *dy, *x;
    void* dx;
    const float* weight;
    const double *mean, *var;
    double* sums;
    float* affine;
    const float *r, *d;
};

struct MoveCall {
    int64_t groups, channels;
    double unbiased, weight;
    const double *means, *vars;
    float *mean, *var;
};

}  // namespace

// Returned is 1 where memory was short.
extern "C" int normlab_forward(const ForwardCall* call) {
    const Common& of = call->of;
    Forward f{of.shape, of.span, of.eps, (of.passes & 1) != 0, (of.passes & 2) != 0, call->own != 0,
              call->weight, call->bias, (double*)call->mean, (double*)call->var, call->towards};
    return guarded([&] {
        std::vector<double> known;
        if (call->single) {
            const int64_t size = of.shape.groups * of.shape.channels / of.span;
            known.resize((size_t)(2 * size));
            f.mean = call->mean ? known.data() : nullptr;
            f.var = known.data() + size;
            if (call->mean) std::copy_n((const float*)call->mean, size, f.mean);
            std::copy_n((const float*)call->var, size, f.var);
        }
        if (of.half)
            forward<bfloat16>(f, of.last != 0, call->x, call->y, of.threads);
        else
            forward<float>(f, of.last != 0, call->x, call->y, of.threads);
    });
}

extern "C" int normlab_backward(const BackwardCall* call) {
    const Common& of = call->of;
    const int64_t size = of.shape.groups * of.shape.channels;
    Backward f{of.shape, of.span, of.eps, call->count, (of.passes & 1) != 0, (of.passes & 2) != 0,
               call->own != 0, call->weight, call->mean, call->var, call->sums, call->sums + size};
    return guarded([&] {
        std::vector<float> scales;  // r * weight
        if (call->r) {
            scales.assign(call->r, call->r + size);
            for (int64_t i = 0; call->weight && i < size; ++i)
                scales[(size_t)i] *= call->weight[i % of.shape.channels];
            f.own = true;
            f.weight = scales.data();
        }
        if (of.half)
            backward<bfloat16>(f, of.last != 0, call->dy, call->x, call->dx, of.threads);
        else
            backward<float>(f, of.last != 0, call->dy, call->x, call->dx, of.threads);
        if (!call->affine) return;
        if (call->r)
            renorm_affine(f, call->r, call->d, call->affine);
        else
            affine(f, call->affine, call->affine + (f.own ? size : of.shape.channels));
    });
}

// Moves mean and var by `weight` of the way to the averages of the groups' (groups, channels), the
// variances times `unbiased`.
extern "C" void normlab_move(const MoveCall* call) {
    const double *means = call->means, *vars = call->vars, n = (double)call->groups;
    for (int64_t c = 0; c < call->channels; ++c) {
        double m = 0, v = 0;
        for (int64_t g = 0; g < call->groups; ++g)
            m += means[g * call->channels + c], v += vars[g * call->channels + c];
        float &mean = call->mean[c], &var = call->var[c];
        mean = (float)(mean + call->weight * (m / n - mean));
        var = (float)(var + call->weight * (v * (call->unbiased / n) - var));
    }
}
