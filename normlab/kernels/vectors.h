// Blocks of 2 * WIDTH elements of float32 or bfloat16, as two vectors of float32.
//
// Written with the vector extension that GCC and Clang share, so that one source serves AVX-512,
// AVX2, SSE and NEON. A block of bfloat16 is read without a shuffle: its even elements make the first
// vector and its odd ones the second. What is kept per channel is therefore stored in the order of
// the vectors; slot() says where the element of a column is.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bfloat16 blocks are taken apart in little-endian order"
#endif

namespace normlab {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int WIDTH = BYTES / 4;
constexpr int BLOCK = 2 * WIDTH;

typedef float Floats __attribute__((vector_size(BYTES)));
typedef uint32_t Bits __attribute__((vector_size(BYTES)));

struct bfloat16 {
    uint16_t bits;
};

struct Block {
    Floats a, b;
};

template <class V> inline V read(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V> inline void write(void* to, V v) { std::memcpy(to, &v, sizeof v); }

inline bool aligned(const void* at) { return (uintptr_t)at % BYTES == 0; }

// Past the caches, to memory that is `aligned`: what is too large to stay in them is not first read
// into them. Visible to other threads after fence().
inline void write_past(void* to, Floats v) {
#if defined(__clang__)
    __builtin_nontemporal_store(v, (Floats*)to);
#elif defined(__AVX512F__)
    __builtin_ia32_movntps512((float*)to, v);
#elif defined(__AVX__)
    __builtin_ia32_movntps256((float*)to, v);
#elif defined(__SSE__)
    __builtin_ia32_movntps((float*)to, v);
#else
    write(to, v);
#endif
}

inline void fence() {
#if defined(__SSE__)
    __builtin_ia32_sfence();
#endif
}

inline Floats all(float value) { return Floats{} + value; }

inline Block load(const float* from) { return {read<Floats>(from), read<Floats>(from + WIDTH)}; }

inline void store(float* to, Block v) {
    write(to, v.a);
    write(to + WIDTH, v.b);
}

inline Block load(const bfloat16* from) {
    Bits pairs = read<Bits>(from);
    return {(Floats)(pairs << 16), (Floats)(pairs & 0xffff0000u)};
}

// To the nearest bfloat16, ties to even, in the upper half. A NaN stays one unless all of its lower
// bits are set: none of a bfloat16 is such a one, nor what arithmetic makes, nor a tame() factor.
inline Bits rounded(Floats v) {
    Bits bits = (Bits)v;
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}

inline float tame(double v) { return v == v ? (float)v : __builtin_nanf(""); }

inline void store(bfloat16* to, Block v) {
    write(to, (rounded(v.a) >> 16) | (rounded(v.b) & 0xffff0000u));
}

inline void store_past(float* to, Block v) {
    write_past(to, v.a);
    write_past(to + WIDTH, v.b);
}

inline void store_past(bfloat16* to, Block v) {
    write_past(to, (Floats)((rounded(v.a) >> 16) | (rounded(v.b) & 0xffff0000u)));
}

inline float value(float v) { return v; }

inline float value(bfloat16 v) {
    uint32_t bits = (uint32_t)v.bits << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline void put(float* to, float v) { *to = v; }

inline void put(bfloat16* to, float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    to->bits = v != v ? (uint16_t)((bits >> 16) | 0x40u)
                      : (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class T> inline int64_t slot(int64_t column);

template <> inline int64_t slot<float>(int64_t column) { return column; }

template <> inline int64_t slot<bfloat16>(int64_t column) {
    int64_t within = column % BLOCK;
    return column - within + (within % 2) * WIDTH + within / 2;
}

// Which elements of a block are among its last `count`, in the order of the vectors.
template <class T> struct Last {
    Bits a, b;

    explicit Last(int64_t count) {
        uint32_t chosen[BLOCK];
        for (int column = 0; column < BLOCK; ++column)
            chosen[slot<T>(column)] = column >= BLOCK - count ? 0xffffffffu : 0;
        a = read<Bits>(chosen);
        b = read<Bits>(chosen + WIDTH);
    }

    Block of(Block v) const { return {(Floats)((Bits)v.a & a), (Floats)((Bits)v.b & b)}; }
};

}  // namespace normlab
