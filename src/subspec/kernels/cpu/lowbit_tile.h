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

// Add products of unsigned and signed bytes, in twos, as int16: it holds 16 products of at most 15 * 127.
LOWBIT_INLINE __m256i add_products(__m256i sum, __m256i a, __m256i b) {
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
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
#pragma GCC unroll 4
      for (int m = 0; m < rows; m++) whole[m] = _mm256_setzero_si256();
#pragma GCC unroll 2
      for (int part = 0; part < 8; part += 4) {
        __m256i sum[rows];
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) sum[m] = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int t = part; t < part + 4; t++) {
          const uint8_t* line = tile + t * 64 + half * 32;
          if (half == 0) _mm_prefetch((const char*)line + ahead, _MM_HINT_T0);
          __m256i both = _mm256_loadu_si256((const __m256i*)line);
          __m256i low = _mm256_and_si256(both, low_nibbles);
          __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_nibbles);
#pragma GCC unroll 4
          for (int m = 0; m < rows; m++) {
            __m256i first = _mm256_set1_epi32(codes[m * 16 + 2 * t]), second = _mm256_set1_epi32(codes[m * 16 + 2 * t + 1]);
            sum[m] = add_products(add_products(sum[m], low, first), high, second);
          }
        }
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) whole[m] = _mm256_add_epi32(whole[m], _mm256_madd_epi16(sum[m], ones));
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

typedef int16_t v8s __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));

// The codes of a group of x as pairs of int16, bytes (0, 2) and (1, 3) of every four: to multiply a line's even and
// odd bytes by.
LOWBIT_INLINE void byte_pairs(const int8_t* codes, uint32_t* pairs) {
  for (int i = 0; i < 16; i++) {
    const int8_t* four = codes + 4 * i;
    pairs[2 * i] = (uint32_t)(uint16_t)four[0] | (uint32_t)(uint16_t)four[2] << 16;
    pairs[2 * i + 1] = (uint32_t)(uint16_t)four[1] | (uint32_t)(uint16_t)four[3] << 16;
  }
}
LOWBIT_INLINE v8s repeat(uint32_t pair) { return (v8s)(v4i{} + (int32_t)pair); }

template <int rows, int stripes>
static void stripe_product(const uint8_t* tiles, int64_t, const Activations& x, int64_t, float* out) {
  v4f acc[rows][4] = {};
  for (int64_t g = 0; g < x.groups; g++) {
    const uint8_t* tile = tiles + g * kTileBytes;
    uint32_t pairs[rows][32];
    for (int m = 0; m < rows; m++) byte_pairs(x.codes + (g * rows + m) * kGroup, pairs[m]);
    for (int quarter = 0; quarter < 4; quarter++) { // four output rows at a time
      v4i whole[rows] = {};
      for (int part = 0; part < 8; part += 4) { // 16 products of at most 15 * 127 fit int16
        v8s sum[rows] = {};
        for (int t = part; t < part + 4; t++) {
          const v8s both = load<v8s>(tile + t * 64 + quarter * 16);
          const v8s low_even = both & 15, high_even = (both >> 4) & 15, low_odd = (both >> 8) & 15;
          const v8s high_odd = (both >> 12) & 15;
#pragma GCC unroll 4
          for (int m = 0; m < rows; m++)
            sum[m] += low_even * repeat(pairs[m][4 * t]) + low_odd * repeat(pairs[m][4 * t + 1]) +
                      high_even * repeat(pairs[m][4 * t + 2]) + high_odd * repeat(pairs[m][4 * t + 3]);
        }
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) whole[m] += (((v4i)sum[m] << 16) >> 16) + ((v4i)sum[m] >> 16);
      }
      v4f scale, mid;
      for (int i = 0; i < 4; i++) {
        scale[i] = element<kBfloat16>(tile + kCodeBytes, 4 * quarter + i);
        mid[i] = element<kBfloat16>(tile + kCodeBytes + 2 * kRows, 4 * quarter + i);
      }
      const v4f base = mid - scale * 8.0f;
#pragma GCC unroll 4
      for (int m = 0; m < rows; m++) {
        acc[m][quarter] += (scale * x.scales[g * rows + m]) * __builtin_convertvector(whole[m], v4f);
        acc[m][quarter] += base * x.sums[g * rows + m];
      }
    }
  }
  memcpy(out, acc, sizeof acc);
}

#endif

} // namespace lowbit
