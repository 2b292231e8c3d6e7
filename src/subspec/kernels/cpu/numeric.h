// Numbers, vectors and dot products that give the same bits wherever they are used.
//
// Everything the exact kernels share: storage types and their conversions, one vector type per instruction-set
// level, sums in a fixed order, an exponential, and the dot-product tile.  A function here computes each output
// from that output's own inputs alone, in an order that depends on lengths only; so a caller may cut its work
// into any shape, for any number of threads, without changing a bit.  Levels may differ from one another.
//
// All of it is in an anonymous namespace: a copy per source file, never shared with another file's functions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define SUBSPEC_EXPORT extern "C" __attribute__((visibility("default")))
#define SUBSPEC_INLINE inline __attribute__((always_inline))

namespace {

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

// ---------------------------------------------------------------------------------------------- vectors

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int TILE_COLUMNS = 6;  // 4 x 6 accumulators of 32 registers
typedef __m512 Vec;
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int TILE_COLUMNS = 3;  // 4 x 3 accumulators of 16 registers
typedef __m256 Vec;
#else
constexpr int LANES = 4;
#if defined(__aarch64__)
constexpr int TILE_COLUMNS = 5;
#else
constexpr int TILE_COLUMNS = 2;
#endif
typedef float Vec __attribute__((vector_size(16)));
#endif
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t WordVec __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * LANES)));

constexpr int STEP = 2 * LANES;  // elements of one step of a dot product
constexpr int TILE_ROWS = 4;     // weight rows (or keys) of one dot-product tile

SUBSPEC_INLINE Vec splat(float value) { return value - Vec{}; }
SUBSPEC_INLINE Vec load(const float* from) {
    Vec v;
    memcpy(&v, from, sizeof v);
    return v;
}
SUBSPEC_INLINE void store(float* to, Vec v) { memcpy(to, &v, sizeof v); }

SUBSPEC_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

SUBSPEC_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// The sums of the lanes of four vectors, each in the same order.
SUBSPEC_INLINE void sum_lanes(Vec a, Vec b, Vec c, Vec d, float out[4]) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    auto fold = [](Vec v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); };
    const __m256 e = fold(a), f = fold(b), g = fold(c), h = fold(d);
#else
    const __m256 e = a, f = b, g = c, h = d;
#endif
    const __m256 ef = _mm256_add_ps(_mm256_unpacklo_ps(e, f), _mm256_unpackhi_ps(e, f));
    const __m256 gh = _mm256_add_ps(_mm256_unpacklo_ps(g, h), _mm256_unpackhi_ps(g, h));
    const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(ef, gh, 0x44), _mm256_shuffle_ps(ef, gh, 0xee));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
    const Vec all[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) out[i] = (all[i][0] + all[i][2]) + (all[i][1] + all[i][3]);
#endif
}

SUBSPEC_INLINE float sum_lanes(Vec v) {
    float out[4];
    sum_lanes(v, Vec{}, Vec{}, Vec{}, out);
    return out[0];
}

SUBSPEC_INLINE float max_lanes(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(v);
#else
    float best = v[0];
    for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
    return best;
#endif
}

// ------------------------------------------------------------------------------------- storage types

SUBSPEC_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
SUBSPEC_INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

SUBSPEC_INLINE float widen(float value) { return value; }
SUBSPEC_INLINE float widen(Bf16 value) { return float_of(uint32_t(value.bits) << 16); }
inline float widen(Fp16 value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    if (magnitude < 0x0400u) {  // zero and subnormals: units of 2^-24
        return float_of(sign | bits_of(float(magnitude) * 0x1p-24f));
    }
    return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

// Round to nearest, ties to even; infinities and NaN stay what they are.
SUBSPEC_INLINE void narrow(float value, float& to) { to = value; }
SUBSPEC_INLINE void narrow(float value, Bf16& to) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = uint16_t(value != value ? (bits >> 16) | 0x40u : rounded);
}
inline void narrow(float value, Fp16& to) {
    const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t result;
    if (magnitude > 0x7f800000u) {
        result = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) {  // rounds to 65520 or more
        result = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds at 2^-24
        result = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        result = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    to.bits = uint16_t(sign | result);
}

// LANES consecutive elements, in order.
SUBSPEC_INLINE Vec load_lanes(const float* from) { return load(from); }
SUBSPEC_INLINE Vec load_lanes(const Bf16* from) {
    HalfVec halves;
    memcpy(&halves, from, sizeof halves);
    return (Vec)(__builtin_convertvector(halves, WordVec) << 16);
}
SUBSPEC_INLINE Vec load_lanes(const Fp16* from) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
    Vec v;
    for (int i = 0; i < LANES; i++) v[i] = widen(from[i]);
    return v;
#endif
}

// A vector's values as bf16, rounded like one by `narrow`.
template <class Words, class Halves, class Floats>
SUBSPEC_INLINE void store_bf16(Bf16* to, Floats v) {
    const Words bits = (Words)v;
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words chosen = (v != v) ? (bits >> 16) | 0x40u : rounded;
    const Halves halves = __builtin_convertvector(chosen, Halves);
    memcpy(to, &halves, sizeof halves);
}

SUBSPEC_INLINE void store_lanes(float* to, Vec v) { store(to, v); }
SUBSPEC_INLINE void store_lanes(Bf16* to, Vec v) { store_bf16<WordVec, HalfVec>(to, v); }
SUBSPEC_INLINE void store_lanes(Fp16* to, Vec v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < LANES; i++) narrow(v[i], to[i]);
#endif
}

// Four values, rounded alike.
typedef float Quad __attribute__((vector_size(16)));
typedef uint32_t QuadWords __attribute__((vector_size(16)));
typedef uint16_t QuadHalves __attribute__((vector_size(8)));
template <class Scalar>
SUBSPEC_INLINE Quad load_four(const Scalar* from) {
    return Quad{widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3])};
}
SUBSPEC_INLINE void store_four(float* to, Quad v) { memcpy(to, &v, sizeof v); }
SUBSPEC_INLINE void store_four(Bf16* to, Quad v) { store_bf16<QuadWords, QuadHalves>(to, v); }
SUBSPEC_INLINE void store_four(Fp16* to, Quad v) {
#if defined(__AVX2__)
    _mm_storel_epi64((__m128i*)to, _mm_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < 4; i++) narrow(v[i], to[i]);
#endif
}

// One half of the STEP elements at `from`, as fp32.  Which elements make up a half depends on the type only
// (bf16 is cheapest split into even and odd), so two operands always meet in the same order.
template <int HALF>
SUBSPEC_INLINE Vec load_half(const Bf16* from) {
    WordVec words;
    memcpy(&words, from, sizeof words);
    return HALF == 0 ? (Vec)(words << 16) : (Vec)(words & 0xffff0000u);
}
template <int HALF>
SUBSPEC_INLINE Vec load_half(const Fp16* from) {
    return load_lanes(from + HALF * LANES);
}
template <int HALF>
SUBSPEC_INLINE Vec load_half(const float* from) {
    return load(from + HALF * LANES);
}

SUBSPEC_INLINE int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
SUBSPEC_INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
SUBSPEC_INLINE int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

// n elements as fp32 in order, followed by zeros up to `padded` (a multiple of LANES).
template <class Scalar>
inline void widen_row(const Scalar* from, int64_t n, float* to, int64_t padded) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, load_lanes(from + i));
    if (i < n) {
        Scalar tail[LANES] = {};
        memcpy(tail, from + i, (n - i) * sizeof(Scalar));
        store(to + i, load_lanes(tail));
        i += LANES;
    }
    for (; i < padded; i += LANES) store(to + i, Vec{});
}

// n fp32 values rounded to the storage type; `from` is readable up to the next multiple of LANES.
template <class Scalar>
inline void narrow_row(const float* from, int64_t n, Scalar* to) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store_lanes(to + i, load(from + i));
    if (i < n) {
        Scalar tail[LANES];
        store_lanes(tail, load(from + i));
        memcpy(to + i, tail, (n - i) * sizeof(Scalar));
    }
}

// --------------------------------------------------------------------------------------- exponential

// e^x, the same for a value in any lane; 0 below -87.3 (nearly all that is subnormal, which processors handle
// slowly), infinite above 88.73, NaN for NaN.
// x = n ln 2 + r with |r| <= 0.35, a Taylor polynomial of degree 7 (relative error 6e-9) and an exact 2^n.
SUBSPEC_INLINE Vec exponential(Vec x) {
    const IntVec kept = ~(IntVec)(x < splat(-87.3f));
    x = x < splat(-87.3f) ? splat(-87.3f) : x;
    x = x > splat(89.0f) ? splat(89.0f) : x;
    const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec shifted = x * 1.44269504f + shift;
    const Vec n = shifted - shift;
    Vec r = x - n * 0.693359375f;  // 355 / 512: exact products
    r = r + n * 2.12194440e-4f;    // 355 / 512 - ln 2
    Vec p = splat(1.0f / 5040);
    p = fma(p, r, splat(1.0f / 720));
    p = fma(p, r, splat(1.0f / 120));
    p = fma(p, r, splat(1.0f / 24));
    p = fma(p, r, splat(1.0f / 6));
    p = fma(p, r, splat(0.5f));
    p = fma(p * r, r, r) + 1.0f;
    const IntVec exponent = (IntVec)shifted - 0x4b400000;
    const IntVec first = exponent >> 1, second = exponent - first;  // two factors: 2^128 alone is infinite
    p = p * (Vec)((first + 127) << 23) * (Vec)((second + 127) << 23);
    return (Vec)((IntVec)p & kept);
}

// --------------------------------------------------------------------------------------- dot products

// How a dot product takes its operands: weights as stored, x prepared once by `prepare` (zero-padded to a multiple
// of STEP), and what one step of STEP elements adds to the accumulators.
template <class Scalar>
struct Widened {  // both in fp32, x in the order of load_half
    typedef Scalar Weight;
    typedef float Operand;

    static void prepare(const Scalar* from, int64_t length, float* to) {
        int64_t k = 0;
        for (; k + STEP <= length; k += STEP) prepare_step(from + k, to + k);
        if (k < length) {
            Scalar tail[STEP] = {};
            memcpy(tail, from + k, (length - k) * sizeof(Scalar));
            prepare_step(tail, to + k);
        }
    }

    template <int COLUMNS>
    SUBSPEC_INLINE static void step(const Scalar* const rows[TILE_ROWS], int64_t at, const float* x, int64_t stride,
                                    Vec acc[COLUMNS][TILE_ROWS]) {
        half<0, COLUMNS>(rows, at, x, stride, acc);
        half<1, COLUMNS>(rows, at, x + LANES, stride, acc);
    }

  private:
    SUBSPEC_INLINE static void prepare_step(const Scalar* from, float* to) {
        store(to, load_half<0>(from));
        store(to + LANES, load_half<1>(from));
    }

    template <int HALF, int COLUMNS>
    SUBSPEC_INLINE static void half(const Scalar* const rows[TILE_ROWS], int64_t at, const float* x, int64_t stride,
                                    Vec acc[COLUMNS][TILE_ROWS]) {
        Vec w[TILE_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < TILE_ROWS; r++) w[r] = load_half<HALF>(rows[r] + at);
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) {
            const Vec value = load(x + c * stride);
#pragma GCC unroll 4
            for (int r = 0; r < TILE_ROWS; r++) acc[c][r] = fma(w[r], value, acc[c][r]);
        }
    }
};

#if defined(__AVX512BF16__)
struct Paired {  // both in bf16, for the processor's own instruction, which adds products two by two
    typedef Bf16 Weight;
    typedef Bf16 Operand;

    static void prepare(const Bf16* from, int64_t length, Bf16* to) {
        memcpy(to, from, length * sizeof(Bf16));
        memset(to + length, 0, (round_up(length, STEP) - length) * sizeof(Bf16));
    }

    template <int COLUMNS>
    SUBSPEC_INLINE static void step(const Bf16* const rows[TILE_ROWS], int64_t at, const Bf16* x, int64_t stride,
                                    Vec acc[COLUMNS][TILE_ROWS]) {
        __m512bh w[TILE_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < TILE_ROWS; r++) w[r] = (__m512bh)_mm512_loadu_si512(rows[r] + at);
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) {
            const __m512bh value = (__m512bh)_mm512_loadu_si512(x + c * stride);
#pragma GCC unroll 4
            for (int r = 0; r < TILE_ROWS; r++) acc[c][r] = _mm512_dpbf16_ps(acc[c][r], w[r], value);
        }
    }
};
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
}  // namespace
#include "tile_avx2.h"
namespace {
#endif

// out[c][r] = sum over k of rows[r][k] * x[c][k]: one accumulator per output steps through k by STEP, its lanes
// are summed last.  `ahead` names `ahead_count` rows of the same length that will be wanted next.
template <class Form, int COLUMNS>
inline __attribute__((noinline)) void dot_tile(const typename Form::Weight* const rows[TILE_ROWS],
                                               const typename Form::Operand* x, int64_t stride, int64_t length,
                                               const typename Form::Weight* const* ahead, int ahead_count,
                                               float out[][TILE_ROWS]) {
    typedef typename Form::Weight Weight;
    const int64_t whole = length / STEP * STEP;
    const Weight* const fixed[TILE_ROWS] = {rows[0], rows[1], rows[2], rows[3]};
    int64_t k = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
    Vec acc[COLUMNS][TILE_ROWS];
    if (COLUMNS == TILE_COLUMNS && whole > 0) {
        largest_tile(fixed, x, stride, whole, ahead, ahead_count, acc);
        k = whole;
    } else {
        memset(acc, 0, sizeof acc);
    }
#else
    Vec acc[COLUMNS][TILE_ROWS] = {};
#endif
    for (; k < whole; k += STEP) {
        for (int i = 0; i < ahead_count; i++) __builtin_prefetch(ahead[i] + k);
        Form::template step<COLUMNS>(fixed, k, x + k, stride, acc);
    }
    if (whole < length) {
        Weight tail[TILE_ROWS][STEP] = {};
        for (int r = 0; r < TILE_ROWS; r++) memcpy(tail[r], rows[r] + whole, (length - whole) * sizeof(Weight));
        const Weight* const padded[TILE_ROWS] = {tail[0], tail[1], tail[2], tail[3]};
        Form::template step<COLUMNS>(padded, 0, x + whole, stride, acc);
    }
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; c++) sum_lanes(acc[c][0], acc[c][1], acc[c][2], acc[c][3], out[c]);
}

// The tile for a number of columns known at run time, at most TILE_COLUMNS.
template <class Form, int COLUMNS = TILE_COLUMNS>
inline void dot_tile_of(int columns, const typename Form::Weight* const rows[TILE_ROWS],
                        const typename Form::Operand* x, int64_t stride, int64_t length,
                        const typename Form::Weight* const* ahead, int ahead_count, float out[][TILE_ROWS]) {
    if constexpr (COLUMNS > 1) {
        if (columns < COLUMNS) {
            dot_tile_of<Form, COLUMNS - 1>(columns, rows, x, stride, length, ahead, ahead_count, out);
            return;
        }
    }
    dot_tile<Form, COLUMNS>(rows, x, stride, length, ahead, ahead_count, out);
}

// ------------------------------------------------------------------------------------------- scratch

// Aligned memory that a thread keeps between calls.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { free(data_); }

    // Room for `count` values of four bytes, not initialised; nullptr if there is no memory.
    float* floats(int64_t count) {
        if (count > capacity_) {
            free(data_);
            capacity_ = round_up(count, 16);
            data_ = static_cast<float*>(aligned_alloc(64, capacity_ * sizeof(float)));
            if (data_ == nullptr) capacity_ = 0;
        }
        return data_;
    }

  private:
    float* data_ = nullptr;
    int64_t capacity_ = 0;
};

}  // namespace
