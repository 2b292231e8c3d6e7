// The inner loop of the low-bit product: one stripe of tiles (16 output rows, all columns) times a few rows of int8.
//
// Per group, acc += (s * xs) * sum(q * xq), then acc += (m - 8 s) * (xs * sum(xq)).  The integer sums are the same at every
// level.  Activations of a row block lie as [group][row][64], their scales and sums as [group][row].
#pragma once
#include "lowbit_numbers.h"

namespace lowbit {

struct Activations {
  const int8_t* codes;
  const float* scales;
  const float* sums;
  int64_t groups;
};

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

constexpr int kMaxRows = 8;
constexpr int kMaxStripes = 2;

LOWBIT_INLINE __m512 sixteen_bfloat16(const void* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}

// `out` is [stripe][row][16].  `ahead` is where to prefetch, in bytes from the tile at hand.
template <int rows, int stripes>
static void stripe_product(const uint8_t* tiles, int64_t stripe_bytes, const Activations& x, int64_t ahead, float* out) {
  constexpr int split = rows * stripes <= 2 ? 2 : 1; // more sums in flight where there would be few
  const __m512i low_nibbles = _mm512_set1_epi8(15);
  __m512 acc[stripes][rows];
#pragma GCC unroll 8
  for (int b = 0; b < stripes; b++)
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) acc[b][m] = _mm512_setzero_ps();
  for (int64_t g = 0; g < x.groups; g++) {
    const uint8_t* tile = tiles + g * kTileBytes;
    const int32_t* codes = (const int32_t*)(x.codes + g * rows * kGroup);
    __m512i sum[stripes][rows][split];
#pragma GCC unroll 8
    for (int b = 0; b < stripes; b++)
#pragma GCC unroll 8
      for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int h = 0; h < split; h++) sum[b][m][h] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int t = 0; t < 8; t++) {
      __m512i low[stripes], high[stripes];
#pragma GCC unroll 8
      for (int b = 0; b < stripes; b++) {
        const uint8_t* line = tile + b * stripe_bytes + t * 64;
        _mm_prefetch((const char*)line + ahead, _MM_HINT_T0);
        __m512i both = _mm512_loadu_si512(line);
        low[b] = _mm512_and_si512(both, low_nibbles);
        high[b] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_nibbles);
      }
#pragma GCC unroll 8
      for (int m = 0; m < rows; m++) {
        __m512i first = _mm512_set1_epi32(codes[m * 16 + 2 * t]), second = _mm512_set1_epi32(codes[m * 16 + 2 * t + 1]);
#pragma GCC unroll 8
        for (int b = 0; b < stripes; b++) {
          sum[b][m][0] = _mm512_dpbusd_epi32(sum[b][m][0], low[b], first);
          sum[b][m][split - 1] = _mm512_dpbusd_epi32(sum[b][m][split - 1], high[b], second);
        }
      }
    }
#pragma GCC unroll 8
    for (int b = 0; b < stripes; b++) {
      const uint8_t* ends = tile + b * stripe_bytes + kCodeBytes;
      _mm_prefetch((const char*)ends + ahead, _MM_HINT_T0);
      __m512 scale = sixteen_bfloat16(ends);
      __m512 base = _mm512_sub_ps(sixteen_bfloat16(ends + 32), _mm512_mul_ps(scale, _mm512_set1_ps(8.0f)));
#pragma GCC unroll 8
      for (int m = 0; m < rows; m++) {
        __m512i whole = split == 2 ? _mm512_add_epi32(sum[b][m][0], sum[b][m][split - 1]) : sum[b][m][0];
        __m512 step = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[g * rows + m]));
        acc[b][m] = _mm512_fmadd_ps(step, _mm512_cvtepi32_ps(whole), acc[b][m]);
        acc[b][m] = _mm512_fmadd_ps(base, _mm512_set1_ps(x.sums[g * rows + m]), acc[b][m]);
      }
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < stripes; b++)
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) _mm512_storeu_ps(out + (b * rows + m) * 16, acc[b][m]);
}

#elif defined(__AVX2__)

constexpr int kMaxRows = 4;
constexpr int kMaxStripes = 1;

LOWBIT_INLINE __m256 eight_bfloat16(const void* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16));
}

template <int rows, int stripes>
static void stripe_product(const uint8_t* tiles, int64_t, const Activations& x, int64_t ahead, float* out) {
  const __m256i low_nibbles = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256 acc[rows][2];
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++) acc[m][0] = acc[m][1] = _mm256_setzero_ps();
  for (int64_t g = 0; g < x.groups; g++) {
    const uint8_t* tile = tiles + g * kTileBytes;
    const int32_t* codes = (const int32_t*)(x.codes + g * rows * kGroup);
#pragma GCC unroll 8
    for (int half = 0; half < 2; half++) { // eight output rows at a time
      __m256i whole[rows];
#pragma GCC unroll 8
      for (int part = 0; part < 2; part++) { // 8 pairs of at most 2 * 15 * 127 fit int16
        __m256i sum[rows];
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) sum[m] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int t = 4 * part; t < 4 * part + 4; t++) {
          const uint8_t* line = tile + t * 64 + half * 32;
          if (half == 0) _mm_prefetch((const char*)line + ahead, _MM_HINT_T0);
          __m256i both = _mm256_loadu_si256((const __m256i*)line);
          __m256i low = _mm256_and_si256(both, low_nibbles);
          __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_nibbles);
#pragma GCC unroll 8
          for (int m = 0; m < rows; m++) {
            __m256i first = _mm256_maddubs_epi16(low, _mm256_set1_epi32(codes[m * 16 + 2 * t]));
            __m256i second = _mm256_maddubs_epi16(high, _mm256_set1_epi32(codes[m * 16 + 2 * t + 1]));
            sum[m] = _mm256_add_epi16(sum[m], _mm256_add_epi16(first, second));
          }
        }
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
          __m256i wide = _mm256_madd_epi16(sum[m], ones);
          whole[m] = part ? _mm256_add_epi32(whole[m], wide) : wide;
        }
      }
      __m256 scale = eight_bfloat16(tile + kCodeBytes + half * 16);
      __m256 base = _mm256_sub_ps(eight_bfloat16(tile + kCodeBytes + 32 + half * 16),
                                  _mm256_mul_ps(scale, _mm256_set1_ps(8.0f)));
#pragma GCC unroll 8
      for (int m = 0; m < rows; m++) {
        __m256 step = _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[g * rows + m]));
        acc[m][half] = _mm256_fmadd_ps(step, _mm256_cvtepi32_ps(whole[m]), acc[m][half]);
        acc[m][half] = _mm256_fmadd_ps(base, _mm256_set1_ps(x.sums[g * rows + m]), acc[m][half]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
    for (int half = 0; half < 2; half++) _mm256_storeu_ps(out + m * 16 + half * 8, acc[m][half]);
}

#else // any processor: vectors of the compiler's own making

constexpr int kMaxRows = 4;
constexpr int kMaxStripes = 1;

typedef int32_t v16i __attribute__((vector_size(64)));
typedef int16_t v32s __attribute__((vector_size(64)));

// Two signed bytes as a pair of int16, for multiplying the even and odd bytes of a line separately.
LOWBIT_INLINE v32s byte_pair(const int8_t* x, int even) {
  return (v32s)(v16i{} + (int32_t)((uint32_t)(uint16_t)x[even] | (uint32_t)(uint16_t)x[even + 2] << 16));
}

template <int rows, int stripes>
static void stripe_product(const uint8_t* tiles, int64_t, const Activations& x, int64_t, float* out) {
  v16f acc[rows] = {};
  for (int64_t g = 0; g < x.groups; g++) {
    const uint8_t* tile = tiles + g * kTileBytes;
    v16f scale = bits<v16f>(elements<kBfloat16>(tile + kCodeBytes, 0));
    v16f base = bits<v16f>(elements<kBfloat16>(tile + kCodeBytes, 16)) - scale * 8.0f;
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) {
      const int8_t* codes = x.codes + (g * rows + m) * kGroup;
      v16i whole = {};
#pragma GCC unroll 8
      for (int part = 0; part < 2; part++) { // 16 products of at most 15 * 127 fit int16
        v32s sum = {};
#pragma GCC unroll 8
        for (int t = 4 * part; t < 4 * part + 4; t++) {
          v32s both = load<v32s>(tile + t * 64);
          sum += (both & 15) * byte_pair(codes, 8 * t) + ((both >> 4) & 15) * byte_pair(codes, 8 * t + 4);
          sum += ((both >> 8) & 15) * byte_pair(codes, 8 * t + 1) + ((both >> 12) & 15) * byte_pair(codes, 8 * t + 5);
        }
        whole += (((v16i)sum << 16) >> 16) + ((v16i)sum >> 16);
      }
      acc[m] += (scale * x.scales[g * rows + m]) * __builtin_convertvector(whole, v16f);
      acc[m] += base * x.sums[g * rows + m];
    }
  }
  memcpy(out, acc, sizeof acc);
}

#endif

} // namespace lowbit
