// Number formats and fixed-order sums that the low-bit kernels share.
//
// Everything here is written so that each instruction-set level, and the reference in Python, gives the same bits:
// sums over a group of 64 run in 16 lanes (element i in lane i % 16, lower i first), then by halving the lanes.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Vectors wider than the level's registers are passed between inlined functions only.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace lowbit {

constexpr int64_t kGroup = 64;                     // input columns that share a scale and a mid
constexpr int64_t kRows = 16;                      // output rows of a tile
constexpr int64_t kCodeBytes = kRows * kGroup / 2; // codes of a tile
constexpr int64_t kTileBytes = kCodeBytes + 4 * kRows;

enum Dtype { kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2 };
#define LOWBIT_API extern "C" __attribute__((visibility("default")))
#define LOWBIT_INLINE static inline __attribute__((always_inline))

typedef float v16f __attribute__((vector_size(64)));
typedef float v8f __attribute__((vector_size(32)));
typedef float v4f __attribute__((vector_size(16)));

template <class To, class From> LOWBIT_INLINE To bits(const From& value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}
template <class Vector> LOWBIT_INLINE Vector load(const void* from) {
  Vector result;
  memcpy(&result, from, sizeof result);
  return result;
}

LOWBIT_INLINE float from_bfloat16(uint16_t value) { return bits<float>((uint32_t)value << 16); }

// Round to nearest even; NaN stays NaN.
LOWBIT_INLINE uint16_t to_bfloat16(float value) {
  uint32_t raw = bits<uint32_t>(value);
  if ((raw & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((raw >> 16) | 0x40);
  return (uint16_t)((raw + 0x7fffu + ((raw >> 16) & 1)) >> 16);
}
LOWBIT_INLINE float round_bfloat16(float value) { return from_bfloat16(to_bfloat16(value)); }

LOWBIT_INLINE float from_float16(uint16_t value) {
#if defined(__F16C__)
  return _cvtsh_ss(value);
#else
  uint32_t sign = (uint32_t)(value & 0x8000) << 16, rest = (uint32_t)(value & 0x7fff) << 13;
  if (rest >= 0x0f800000u) return bits<float>(sign | (rest + 0x70000000u)); // inf, NaN
  return bits<float>(bits<uint32_t>(bits<float>(rest) * 0x1p112f) | sign);
#endif
}

LOWBIT_INLINE uint16_t to_float16(float value) {
#if defined(__F16C__)
  return (uint16_t)_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t raw = bits<uint32_t>(value), sign = (raw >> 16) & 0x8000, rest = raw & 0x7fffffffu;
  if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
  if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
  if (rest < 0x38800000u) // subnormal: the addition rounds
    return (uint16_t)(sign | (bits<uint32_t>(bits<float>(rest) + 0.5f) - 0x3f000000u));
  return (uint16_t)(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1)) >> 13));
#endif
}

template <int dtype> LOWBIT_INLINE float element(const void* base, int64_t index) {
  if (dtype == kBfloat16) return from_bfloat16(((const uint16_t*)base)[index]);
  if (dtype == kFloat16) return from_float16(((const uint16_t*)base)[index]);
  return ((const float*)base)[index];
}

// Sixteen fp32 lanes, as vectors of the level's own width.
#if defined(__AVX512F__)
typedef v16f Part;
#elif defined(__AVX2__)
typedef v8f Part;
#else
typedef v4f Part;
#endif
constexpr int kPartLanes = sizeof(Part) / 4, kParts = 16 / kPartLanes;
typedef int32_t PartInts __attribute__((vector_size(sizeof(Part))));

struct Lanes {
  Part part[kParts];
};
#define LOWBIT_EACH _Pragma("GCC unroll 4") for (int p = 0; p < kParts; p++)
#define LOWBIT_OPERATOR(op)                          \
  LOWBIT_INLINE Lanes operator op(Lanes a, Lanes b) { \
    Lanes r;                                         \
    LOWBIT_EACH r.part[p] = a.part[p] op b.part[p];  \
    return r;                                        \
  }                                                  \
  LOWBIT_INLINE Lanes operator op(Lanes a, float b) { \
    Lanes r;                                         \
    LOWBIT_EACH r.part[p] = a.part[p] op b;          \
    return r;                                        \
  }
LOWBIT_OPERATOR(+)
LOWBIT_OPERATOR(-)
LOWBIT_OPERATOR(*)

LOWBIT_INLINE Lanes smaller(Lanes a, Lanes b) {
  Lanes r = {};
  LOWBIT_EACH r.part[p] = a.part[p] < b.part[p] ? a.part[p] : b.part[p];
  return r;
}
LOWBIT_INLINE Lanes larger(Lanes a, Lanes b) {
  Lanes r = {};
  LOWBIT_EACH r.part[p] = a.part[p] > b.part[p] ? a.part[p] : b.part[p];
  return r;
}
LOWBIT_INLINE Lanes splat(float value) {
  Lanes r = {};
  LOWBIT_EACH r.part[p] = value - Part{};
  return r;
}

// Round to the nearest integer, ties to even, for |value| < 2^22.
LOWBIT_INLINE Lanes nearest(Lanes value) { return (value + 12582912.0f) - 12582912.0f; }

// Whole numbers from -128 to 255, as bytes.
LOWBIT_INLINE void to_bytes(Lanes value, void* out) {
#if defined(__AVX512F__)
  __m128i bytes = _mm512_cvtepi32_epi8((__m512i)__builtin_convertvector(value.part[0], PartInts));
  memcpy(out, &bytes, sizeof bytes);
#else
  int32_t whole[16];
  LOWBIT_EACH {
    PartInts part = __builtin_convertvector(value.part[p], PartInts);
    memcpy(whole + p * kPartLanes, &part, sizeof part);
  }
  for (int i = 0; i < 16; i++) ((uint8_t*)out)[i] = (uint8_t)whole[i];
#endif
}

LOWBIT_INLINE v4f halves(v8f a) { return load<v4f>(&a) + load<v4f>((const char*)&a + 16); }
LOWBIT_INLINE float lane_sum(Lanes value) {
#if defined(__AVX512F__)
  v4f four = halves(load<v8f>(&value) + load<v8f>((const char*)&value + 32));
#elif defined(__AVX2__)
  v4f four = halves(value.part[0] + value.part[1]);
#else
  v4f four = (value.part[0] + value.part[2]) + (value.part[1] + value.part[3]);
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

LOWBIT_INLINE int32_t lane_max(const PartInts value[kParts]) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)value[0]);
#else
  int32_t lanes[16];
  memcpy(lanes, value, sizeof lanes);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
#endif
}

LOWBIT_INLINE float lane_max(Lanes value) {
  float lanes[16];
  memcpy(lanes, &value, sizeof lanes);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

// The largest magnitude of 64 numbers as its bit pattern: these order as magnitudes do, with NaN above infinity.
LOWBIT_INLINE int32_t largest_magnitude(const Lanes values[4]) {
  PartInts largest[kParts] = {};
  for (int i = 0; i < 4; i++) LOWBIT_EACH {
      PartInts magnitude = (PartInts)values[i].part[p] & 0x7fffffff;
      largest[p] = magnitude > largest[p] ? magnitude : largest[p];
    }
  return lane_max(largest);
}
constexpr int32_t kInfinityBits = 0x7f800000;

template <int dtype> LOWBIT_INLINE Lanes elements(const void* base, int64_t index) {
  if (dtype == kFloat32) return load<Lanes>((const float*)base + index);
  Lanes r = {};
  LOWBIT_EACH {
    const uint16_t* from = (const uint16_t*)base + index + p * kPartLanes;
#if defined(__AVX512F__)
    __m256i raw = _mm256_loadu_si256((const __m256i*)from);
    if (dtype == kFloat16) r.part[p] = (Part)_mm512_cvtph_ps(raw);
    else r.part[p] = (Part)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
#elif defined(__AVX2__) && defined(__F16C__)
    __m128i raw = _mm_loadu_si128((const __m128i*)from);
    if (dtype == kFloat16) r.part[p] = (Part)_mm256_cvtph_ps(raw);
    else r.part[p] = (Part)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
#else
    for (int i = 0; i < kPartLanes; i++) r.part[p][i] = element<dtype>(from, i);
#endif
  }
  return r;
}

// The first `count` of sixteen elements, the rest zero.
template <int dtype> LOWBIT_INLINE Lanes some_elements(const void* base, int64_t index, int64_t count) {
  if (count >= 16) return elements<dtype>(base, index);
  float values[16] = {};
  for (int64_t i = 0; i < count; i++) values[i] = element<dtype>(base, index + i);
  return load<Lanes>(values);
}

LOWBIT_INLINE void store_element(int dtype, void* base, int64_t index, float value) {
  if (dtype == kBfloat16) ((uint16_t*)base)[index] = to_bfloat16(value);
  else if (dtype == kFloat16) ((uint16_t*)base)[index] = to_float16(value);
  else ((float*)base)[index] = value;
}

} // namespace lowbit
