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

LOWBIT_INLINE __m512 sixteen_bfloat16(const void* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}

// sum += products of each four bytes of `codes` (unsigned) with the four at `x`.  As assembly: GCC would spend an
// instruction more on each to copy the four to all lanes first.
LOWBIT_INLINE void add_products(__m512i& sum, __m512i codes, const int32_t& x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(x));
}

// Asks for lines that will be needed later, into L2, since L1 waits for few lines at once.  A stream of tiles alone is
// foreseen by the processor, but for the first lines of each page.  With more codes of activations than `kFewCodes`, found by
// trial with 32 KiB of L1, it is not, and every line is asked for.
constexpr int64_t kPage = 4096, kFewCodes = 10240; // bytes
LOWBIT_INLINE void prefetch_ahead(const uint8_t* tile, bool few_codes) {
  if (few_codes) { // a page has seven tiles: each asks for one of the first lines of the page after the next
    const uint8_t* page = tile - (uintptr_t)tile % kPage;
    _mm_prefetch((const char*)page + 2 * kPage + (tile - page) / 512 * 64, _MM_HINT_T2);
  } else {
#pragma GCC unroll 9
    for (int64_t line = 0; line < kTileBytes; line += 64) _mm_prefetch((const char*)tile + 10 * kTileBytes + line, _MM_HINT_T2);
  }
}

// `out` is [row][16].  High nibbles are multiplied where they lie, times 16; their sums, at most 32 * 240 * 127 in size, are
// divided at the end, which is exact.
template <int rows> static void stripe_product(const uint8_t* tiles, const Activations& x, float* out) {
  const __m512i low_nibbles = _mm512_set1_epi8(0x0f), high_nibbles = _mm512_set1_epi8((char)0xf0);
  const bool few_codes = x.groups * rows * kGroup <= kFewCodes;
  __m512 acc[rows];
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++) acc[m] = _mm512_setzero_ps();
  for (int64_t g = 0; g < x.groups; g++) {
    const uint8_t* tile = tiles + g * kTileBytes;
    const int32_t* codes = (const int32_t*)(x.codes + g * rows * kGroup);
    prefetch_ahead(tile, few_codes);
    __m512i low_sum[rows], high_sum[rows];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) low_sum[m] = high_sum[m] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int t = 0; t < 8; t++) {
      __m512i both = _mm512_loadu_si512(tile + t * 64);
      asm("" : "+v"(both)); // or the compiler loads it twice
      const __m512i low = _mm512_and_si512(both, low_nibbles), high = _mm512_and_si512(both, high_nibbles);
#pragma GCC unroll 8
      for (int m = 0; m < rows; m++) {
        add_products(low_sum[m], low, codes[m * 16 + 2 * t]);
        add_products(high_sum[m], high, codes[m * 16 + 2 * t + 1]);
      }
    }
    const uint8_t* ends = tile + kCodeBytes;
    const __m512 scale = sixteen_bfloat16(ends);
    const __m512 base = _mm512_sub_ps(sixteen_bfloat16(ends + 32), _mm512_mul_ps(scale, _mm512_set1_ps(8.0f)));
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) {
      const __m512 whole = _mm512_cvtepi32_ps(_mm512_add_epi32(low_sum[m], _mm512_srai_epi32(high_sum[m], 4)));
      acc[m] = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(x.scales[g * rows + m])), whole, acc[m]);
      acc[m] = _mm512_fmadd_ps(base, _mm512_set1_ps(x.sums[g * rows + m]), acc[m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++) _mm512_storeu_ps(out + m * 16, acc[m]);
}

#elif defined(__AVX2__)

constexpr int kMaxRows = 8;
constexpr int64_t kAhead = 4 * kTileBytes; // how far ahead of its use a tile is prefetched, to L1; found by trial

// A sum of products in each of eight int32 lanes.  Without an instruction that adds up four products at once, the sum is
// of int16 in twos until `widened`: they hold 16 products of at most 15 * 127.
#if defined(__AVXVNNI__) && !defined(LOWBIT_DPBUSD)
#define LOWBIT_DPBUSD _mm256_dpbusd_avx_epi32
#endif
#if defined(LOWBIT_DPBUSD)
LOWBIT_INLINE __m256i sum_products(__m256i sum, __m256i codes, __m256i x) { return LOWBIT_DPBUSD(sum, codes, x); }
LOWBIT_INLINE __m256i widened(__m256i sum) { return sum; }
#else
LOWBIT_INLINE __m256i sum_products(__m256i sum, __m256i codes, __m256i x) {
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x));
}
LOWBIT_INLINE __m256i widened(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
#endif

LOWBIT_INLINE __m256 eight_bfloat16(const void* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16));
}

// Two lines of a tile: [columns, in fours][output rows, in eights].  They stay in registers while the rows of x pass by;
// more lines would not fit, and with one half of the output rows each load of x would serve one product only.
LOWBIT_INLINE void unpack_lines(const uint8_t* lines, __m256i codes[4][2]) {
  const __m256i low_nibbles = _mm256_set1_epi8(15);
#pragma GCC unroll 2
  for (int t = 0; t < 2; t++)
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      __m256i both = _mm256_loadu_si256((const __m256i*)(lines + t * 64 + half * 32));
      codes[2 * t][half] = _mm256_and_si256(both, low_nibbles);
      codes[2 * t + 1][half] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_nibbles);
    }
}

LOWBIT_INLINE void add_lines(const __m256i codes[4][2], const int32_t* x, __m256i sum[2]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m256i four = _mm256_set1_epi32(x[i]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      sum[half] = sum_products(sum[half], codes[i][half], four);
      asm("" : "+x"(sum[half])); // or the compiler makes a tree of the sum, for which it has no registers
    }
  }
}

// Sums over half a tile's columns, added to `whole` [row][half].
template <int rows, bool first> LOWBIT_INLINE void add_half_tile(const uint8_t* lines, const int32_t* x, __m256i whole[rows][2]) {
  __m256i codes[4][2], sum[rows][2];
  unpack_lines(lines, codes);
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++) {
    sum[m][0] = sum[m][1] = _mm256_setzero_si256();
    add_lines(codes, x + m * 16, sum[m]);
  }
  unpack_lines(lines + 128, codes);
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++) {
    add_lines(codes, x + m * 16 + 4, sum[m]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++)
      whole[m][half] = first ? widened(sum[m][half]) : _mm256_add_epi32(whole[m][half], widened(sum[m][half]));
  }
}

// Not inlined: among other code the compiler finds fewer registers for it.
template <int rows>
__attribute__((noinline)) static void stripe_product(const uint8_t* tiles, const Activations& x, float* out) {
  __m256 acc[rows][2];
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++) acc[m][0] = acc[m][1] = _mm256_setzero_ps();
  for (int64_t g = 0; g < x.groups; g++) {
    const uint8_t* tile = tiles + g * kTileBytes;
    const int32_t* codes = (const int32_t*)(x.codes + g * rows * kGroup);
#pragma GCC unroll 9
    for (int64_t line = 0; line < kTileBytes; line += 64) _mm_prefetch((const char*)tile + line + kAhead, _MM_HINT_T0);
    __m256i whole[rows][2];
    add_half_tile<rows, true>(tile, codes, whole);
    add_half_tile<rows, false>(tile + 256, codes + 8, whole);
    __m256 scale[2], base[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const uint8_t* ends = tile + kCodeBytes + half * 16;
      scale[half] = eight_bfloat16(ends);
      base[half] = _mm256_sub_ps(eight_bfloat16(ends + 32), _mm256_mul_ps(scale[half], _mm256_set1_ps(8.0f)));
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        __m256 step = _mm256_mul_ps(scale[half], _mm256_set1_ps(x.scales[g * rows + m]));
        acc[m][half] = _mm256_fmadd_ps(step, _mm256_cvtepi32_ps(whole[m][half]), acc[m][half]);
        acc[m][half] = _mm256_fmadd_ps(base[half], _mm256_set1_ps(x.sums[g * rows + m]), acc[m][half]);
      }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) _mm256_storeu_ps(out + m * 16 + half * 8, acc[m][half]);
}

#else // any processor: vectors of the compiler's own making

constexpr int kMaxRows = 4;

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

template <int rows>
static void stripe_product(const uint8_t* tiles, const Activations& x, float* out) {
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
