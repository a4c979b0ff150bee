// What Python calls: two functions without any of torch's headers.
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

template <class Call> int guarded(Call call) {
    try {
        call();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

// passes: 1 the first one, 2 the second one, 3 both. shape is that of Shape. mean and var are in
// double, unless single, which needs passes == 2. Returned is 1 where memory was short.
extern "C" int normlab_forward(int half, int last, int passes, int64_t threads, const int64_t* shape,
                               int64_t span, double eps, int own, int single, const void* x,
                               void* y, const float* weight, const float* bias, void* mean,
                               void* var) {
    Forward f{{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]},
              span, eps, (passes & 1) != 0, (passes & 2) != 0, own != 0, weight, bias,
              (double*)mean, (double*)var};
    return guarded([&] {
        std::vector<double> known;
        if (single) {
            const int64_t size = shape[2] * shape[0] / span;
            known.resize((size_t)(2 * size));
            f.mean = mean ? known.data() : nullptr;
            f.var = known.data() + size;
            if (mean) std::copy_n((const float*)mean, size, f.mean);
            std::copy_n((const float*)var, size, f.var);
        }
        if (half)
            forward<bfloat16>(f, last != 0, x, y, threads);
        else
            forward<float>(f, last != 0, x, y, threads);
    });
}

extern "C" int normlab_backward(int half, int last, int passes, int64_t threads,
                                const int64_t* shape, int64_t span, double eps, double count,
                                int own, const void* dy, const void* x, void* dx,
                                const float* weight, const double* mean, const double* var,
                                double* sums, double* dots, float* dbias, float* dweight) {
    Backward f{{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]},
               span, eps, count, (passes & 1) != 0, (passes & 2) != 0, own != 0,
               weight, mean, var, sums, dots};
    return guarded([&] {
        if (half)
            backward<bfloat16>(f, last != 0, dy, x, dx, threads);
        else
            backward<float>(f, last != 0, dy, x, dx, threads);
        if (dbias) affine(f, dbias, dweight);
    });
}

// Moves mean and var by `weight` of the way to the averages of the groups' (groups, channels), the
// variances times `unbiased`.
extern "C" void normlab_move(int64_t groups, int64_t channels, double unbiased, double weight,
                             const double* means, const double* vars, float* mean, float* var) {
    for (int64_t c = 0; c < channels; ++c) {
        double m = 0, v = 0;
        for (int64_t g = 0; g < groups; ++g) m += means[g * channels + c], v += vars[g * channels + c];
        m /= (double)groups, v *= unbiased / (double)groups;
        mean[c] = (float)(mean[c] + weight * (m - mean[c]));
        var[c] = (float)(var[c] + weight * (v - var[c]));
    }
}
