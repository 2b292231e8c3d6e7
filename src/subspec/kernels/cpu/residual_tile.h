// One tile of a residual back into exact weights.  The format is written down in substitute/residual.py.
//
// Fields of at most 8 bits lie one after another; where each starts follows from the codes.  Eight fields make at most
// 64 bits: one unaligned word holds them, and one instruction spreads them into eight bytes: a multishift (AVX-512
// VBMI), or a bit deposit (BMI2); in portable code, a loop of shifts.
#pragma once
#include "lowbit_numbers.h"

namespace lowbit {

constexpr int32_t kFloorSteps = 1024;
constexpr int32_t kMaxWidth = 11;
constexpr int kMainBits = 8, kExtraBits = 3;
constexpr int64_t kTailBytes = 128;   // readable after the last payload
constexpr int64_t kAheadBytes = 2048; // fields of two tiles, to fetch in advance

constexpr int low_bits(int dtype) { return dtype == kFloat16 ? 3 : 0; }

template <int dtype> LOWBIT_INLINE int32_t pattern_of(float value) {
  return dtype == kFloat16 ? to_float16(value) : to_bfloat16(value);
}
template <int dtype> LOWBIT_INLINE int32_t magnitude_of(int32_t pattern) { return (pattern & 0x7fff) >> low_bits(dtype); }
template <int dtype> LOWBIT_INLINE int32_t place_of(int32_t pattern, int32_t floor) {
  int32_t above = magnitude_of<dtype>(pattern) - floor;
  above = above < 0 ? 0 : above;
  return pattern & 0x8000 ? -above : above;
}
template <int dtype> LOWBIT_INLINE int32_t floor_of(float scale) {
  int32_t floor = magnitude_of<dtype>(pattern_of<dtype>(scale)) - kFloorSteps;
  return floor < 0 ? 0 : floor;
}

LOWBIT_INLINE int32_t at_most(int32_t value, int32_t limit) { return value < limit ? value : limit; }

// What the codes of one group of one row mean: sixteen bins.
struct Bins {
  int16_t base[16];
  uint8_t width[16];
  int32_t floor;
};

#if defined(__AVX2__)
// Finite numbers rounded to the dtype, as it stores them: `first` holds 0 to 3 and 8 to 11 of them, `second` the others.
template <int dtype> LOWBIT_INLINE __m256i sixteen_patterns(__m256 first, __m256 second) {
  if (dtype == kFloat16) {
    const __m128i early = _mm256_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m128i late = _mm256_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_set_m128i(_mm_unpackhi_epi64(early, late), _mm_unpacklo_epi64(early, late));
  }
  const auto rounded = [](__m256 value) {
    const __m256i bits = _mm256_castps_si256(value), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  };
  return _mm256_packus_epi32(rounded(first), rounded(second));
}

template <int dtype> LOWBIT_INLINE void find_bins(float scale, float mid, Bins& bins) {
  bins.floor = floor_of<dtype>(scale);
  const __m256i zero = _mm256_setzero_si256();
  const auto edges = [&](__m256 steps) { return _mm256_add_ps(_mm256_mul_ps(steps, _mm256_set1_ps(scale)), _mm256_set1_ps(mid)); };
  const __m256i pattern = sixteen_patterns<dtype>(edges(_mm256_setr_ps(-8.5f, -7.5f, -6.5f, -5.5f, -0.5f, 0.5f, 1.5f, 2.5f)),
                                                  edges(_mm256_setr_ps(-4.5f, -3.5f, -2.5f, -1.5f, 3.5f, 4.5f, 5.5f, 6.5f)));
  const __m256i magnitude = _mm256_srli_epi16(_mm256_and_si256(pattern, _mm256_set1_epi16(0x7fff)), low_bits(dtype));
  const __m256i place = _mm256_sign_epi16(_mm256_subs_epu16(magnitude, _mm256_set1_epi16((int16_t)bins.floor)), pattern);
  const __m256i next = _mm256_alignr_epi8(_mm256_permute2x128_si256(place, place, 0x81), place, 2); // nothing behind the last
  // Bit lengths of spans: these are below 2^16, and the exponent of one as a float tells.
  const __m256i span = _mm256_sub_epi16(next, place);
  const auto exponents = [](__m256i spans) { return _mm256_srli_epi32(_mm256_castps_si256(_mm256_cvtepi32_ps(spans)), 23); };
  const __m256i exponent = _mm256_packus_epi32(exponents(_mm256_unpacklo_epi16(span, zero)), exponents(_mm256_unpackhi_epi16(span, zero)));
  const __m256i length = _mm256_subs_epu16(exponent, _mm256_set1_epi16(126));
  // The end bins: one more than their neighbours.
  const __m256i inward = _mm256_setr_epi8(2, 3, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                                          0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 12, 13);
  const __m256i more = _mm256_setr_epi16(1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1);
  const __m256i width = _mm256_min_epi16(_mm256_add_epi16(_mm256_shuffle_epi8(length, inward), more), _mm256_set1_epi16(kMaxWidth));
  // The first bin ends where the second begins.
  const __m128i size = _mm_sllv_epi32(_mm_set1_epi32(1), _mm_cvtepu16_epi32(_mm256_castsi256_si128(width)));
  const __m128i begin = _mm_sub_epi16(_mm_add_epi16(_mm256_castsi256_si128(next), _mm_set1_epi16(1)), size);
  const __m128i early = _mm_blend_epi16(_mm256_castsi256_si128(place), begin, 0x01);
  _mm256_storeu_si256((__m256i*)bins.base, _mm256_blend_epi32(place, _mm256_castsi128_si256(early), 0x0f));
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(width), _mm256_extracti128_si256(width, 1));
  _mm_storeu_si128((__m128i*)bins.width, bytes);
}
#else
template <int dtype> LOWBIT_INLINE void find_bins(float scale, float mid, Bins& bins) {
  const int32_t floor = bins.floor = floor_of<dtype>(scale);
  float edge[16];
  int32_t lower[17], width[16];
  for (int q = 0; q < 16; q++) {
    const float product = ((float)q - 8.5f) * scale;
    edge[q] = product + mid;
  }
  for (int q = 0; q < 16; q++) { // a form of place_of that compilers turn into vectors
    const int32_t raw = bits<int32_t>(edge[q]), rounded = (raw + 0x7fff + (raw >> 16 & 1)) >> 16;
    const int32_t magnitude = magnitude_of<dtype>(dtype == kFloat16 ? to_float16(edge[q]) : rounded);
    const int32_t above = magnitude - floor, negative = raw >> 31;
    lower[q] = ((above & ~(above >> 31)) ^ negative) - negative;
  }
  lower[16] = lower[15]; // of no use, but defined
  for (int q = 0; q < 16; q++) { // spans are below 2^16: the exponent of one as a float tells its bit length
    const int32_t length = (bits<int32_t>((float)(lower[q + 1] - lower[q])) >> 23) - 126, over = kMaxWidth - length;
    width[q] = (length & ~(length >> 31)) + (over & over >> 31);
  }
  width[0] = at_most(width[1] + 1, kMaxWidth);
  width[15] = at_most(width[14] + 1, kMaxWidth);
  lower[0] = lower[1] - (1 << width[0]) + 1;
  for (int q = 0; q < 16; q++) bins.base[q] = (int16_t)lower[q], bins.width[q] = (uint8_t)width[q];
}
#endif

// The codes of a tile, by row.
#if defined(__AVX2__) && !defined(__AVX512F__)
LOWBIT_INLINE void tile_codes(const uint8_t* tile, uint8_t codes[kRows][kGroup]) {
  const __m256i nibbles = _mm256_set1_epi8(15);
  for (int first = 0; first < kRows; first += 8) { // 8 lines of 8 rows' words: transpose, in halves of four rows
    __m256i line[8], pair[8], quad[8];
#pragma GCC unroll 8
    for (int t = 0; t < 8; t++) line[t] = _mm256_loadu_si256((const __m256i*)(tile + 64 * t + 4 * first));
#pragma GCC unroll 4
    for (int t = 0; t < 8; t += 2) {
      pair[t] = _mm256_unpacklo_epi32(line[t], line[t + 1]);     // rows 0, 1 | 4, 5
      pair[t + 1] = _mm256_unpackhi_epi32(line[t], line[t + 1]); // rows 2, 3 | 6, 7
    }
#pragma GCC unroll 2
    for (int t = 0; t < 8; t += 4) { // quad[t + r]: lines t .. t + 3 of rows r | r + 4
      quad[t] = _mm256_unpacklo_epi64(pair[t], pair[t + 2]);
      quad[t + 1] = _mm256_unpackhi_epi64(pair[t], pair[t + 2]);
      quad[t + 2] = _mm256_unpacklo_epi64(pair[t + 1], pair[t + 3]);
      quad[t + 3] = _mm256_unpackhi_epi64(pair[t + 1], pair[t + 3]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < 8; t++) { // a line's low nibbles come before its high ones
      const __m256i low = _mm256_and_si256(quad[t], nibbles), high = _mm256_and_si256(_mm256_srli_epi16(quad[t], 4), nibbles);
      const __m256i early = _mm256_unpacklo_epi32(low, high), late = _mm256_unpackhi_epi32(low, high);
      uint8_t* row = codes[first + t % 4] + t / 4 * 32;
      _mm256_store_si256((__m256i*)row, _mm256_permute2x128_si256(early, late, 0x20));
      _mm256_store_si256((__m256i*)(row + 4 * kGroup), _mm256_permute2x128_si256(early, late, 0x31));
    }
  }
}
#else
LOWBIT_INLINE void tile_codes(const uint8_t* tile, uint8_t codes[kRows][kGroup]) {
  for (int t = 0; t < 8; t++)
    for (int r = 0; r < kRows; r++) {
      const uint64_t both = load<uint32_t>(tile + 64 * t + 4 * r);
      const uint64_t eight = (both & 0x0f0f0f0f) | (both >> 4 & 0x0f0f0f0f) << 32;
      memcpy(codes[r] + 8 * t, &eight, 8);
    }
}
#endif

// 64 bits of a byte stream from bit `at` on.
LOWBIT_INLINE uint64_t bits_at(const uint8_t* from, int64_t at) {
  const int shift = at & 7;
  from += at >> 3;
  return load<uint64_t>(from) >> shift | load<uint64_t>(from + 1) << (8 - shift); // where both have a bit, it is the same
}

// One row's 64 weights of one group.  `valid` of them exist; `out` has room for those.  Returns the bytes consumed.
#if defined(__AVX2__) && defined(__BMI2__)

constexpr int kSixteens[4] = {0, 2, 1, 3}; // where a pack of two vectors leaves the masks of each 16 weights

// A row on its way from fields to weights.  Every step stores what the next one loads in other sizes, which takes long
// when it follows at once: so a step is done for all rows of a tile before the next.
struct RowFields {
  alignas(64) uint8_t main_masks[kGroup], main[kGroup], low[kGroup]; // a byte a weight
  alignas(32) uint8_t extra_masks[kGroup / 2], extra[kGroup / 2];    // a nibble a weight; masks in the order of kSixteens
};

// Step 1: ones for the bits of each weight's main and extra fields.
LOWBIT_INLINE void find_masks(const uint8_t codes[kGroup], const Bins& bins, int64_t valid, RowFields& row) {
  const __m256i widths = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)bins.width));
  const __m256i ones = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 3, 7, 15, 31, 63, 127, -1, -1, -1, -1, 0, 0, 0, 0));
  const __m256i extra_ones = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 7, 7, 0, 0, 0, 0));
  const __m256i order = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                                         16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
  __m256i pairs[2];
  for (int i = 0; i < kGroup; i += 32) {
    __m256i width = _mm256_shuffle_epi8(widths, _mm256_loadu_si256((const __m256i*)(codes + i)));
    if (valid < kGroup) width = _mm256_and_si256(width, _mm256_cmpgt_epi8(_mm256_set1_epi8((int8_t)(valid - i)), order));
    _mm256_store_si256((__m256i*)(row.main_masks + i), _mm256_shuffle_epi8(ones, width));
    pairs[i / 32] = _mm256_maddubs_epi16(_mm256_shuffle_epi8(extra_ones, width), _mm256_set1_epi16(0x1001));
  }
  _mm256_store_si256((__m256i*)row.extra_masks, _mm256_packus_epi16(pairs[0], pairs[1]));
}

// Step 2: bits to bytes and nibbles.  Returns the payload's bytes.
template <int dtype> LOWBIT_INLINE int64_t spread_row(const uint8_t* payload, int64_t valid, RowFields& row) {
  int64_t at = 0;
#pragma GCC unroll 8
  for (int i = 0; i < kGroup; i += 8) {
    const uint64_t mask = load<uint64_t>(row.main_masks + i), fields = _pdep_u64(bits_at(payload, at), mask);
    memcpy(row.main + i, &fields, 8);
    at += __builtin_popcountll(mask);
  }
  at = (at + 7) & ~(int64_t)7;
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const uint64_t mask = load<uint64_t>(row.extra_masks + 8 * kSixteens[i]);
    const uint64_t packed = load<uint64_t>(payload + (at >> 3)) >> (at & 7), fields = _pdep_u64(packed, mask); // 48 bits at most
    memcpy(row.extra + 8 * i, &fields, 8);
    at += __builtin_popcountll(mask);
  }
  at = (at + 7) & ~(int64_t)7;
  if (dtype == kFloat16) {
    for (int64_t i = 0; i < valid; i += 8) {
      const uint64_t fields = _pdep_u64(load<uint32_t>(payload + (at + 3 * i) / 8), 0x0707070707070707u);
      memcpy(row.low + i, &fields, 8);
    }
    at += (3 * valid + 7) / 8 * 8;
  }
  return at >> 3;
}

// Step 3: fields to weights.
template <int dtype>
LOWBIT_INLINE void place_row(const uint8_t codes[kGroup], const Bins& bins, const RowFields& row, int64_t valid,
                             uint16_t* out) {
  alignas(64) uint16_t partial[kGroup];
  uint16_t* whole = valid == kGroup ? out : partial;
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  const __m256i split = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)bins.base), order);
  const __m256i low_bytes = _mm256_permute4x64_epi64(split, 0x88), high_bytes = _mm256_permute4x64_epi64(split, 0xdd);
  const __m256i floor = _mm256_set1_epi16((int16_t)bins.floor), zero = _mm256_setzero_si256();
  for (int i = 0; i < kGroup; i += 32) {
    const __m256i code = _mm256_loadu_si256((const __m256i*)(codes + i));
    const __m256i base_low = _mm256_shuffle_epi8(low_bytes, code), base_high = _mm256_shuffle_epi8(high_bytes, code);
    const __m256i lower = _mm256_load_si256((const __m256i*)(row.main + i));
    const __m256i pairs = _mm256_cvtepu8_epi16(_mm_load_si128((const __m128i*)(row.extra + i / 2)));
    const __m256i upper = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(15));
    const __m256i lowest = dtype == kFloat16 ? _mm256_load_si256((const __m256i*)(row.low + i)) : zero;
    __m256i half[2] = {_mm256_add_epi16(_mm256_unpacklo_epi8(base_low, base_high), _mm256_unpacklo_epi8(lower, upper)),
                       _mm256_add_epi16(_mm256_unpackhi_epi8(base_low, base_high), _mm256_unpackhi_epi8(lower, upper))};
    const __m256i tail[2] = {_mm256_unpacklo_epi8(lowest, zero), _mm256_unpackhi_epi8(lowest, zero)};
    for (int h = 0; h < 2; h++) {
      const __m256i number = _mm256_add_epi16(half[h], _mm256_sign_epi16(floor, half[h])); // away from 0, where it is not 0
      __m256i pattern = _mm256_abs_epi16(number);
      if (dtype == kFloat16) pattern = _mm256_or_si256(_mm256_slli_epi16(pattern, 3), tail[h]);
      half[h] = _mm256_or_si256(pattern, _mm256_and_si256(number, _mm256_set1_epi16((int16_t)0x8000)));
    }
    _mm256_storeu_si256((__m256i*)(whole + i), _mm256_permute2x128_si256(half[0], half[1], 0x20));
    _mm256_storeu_si256((__m256i*)(whole + i + 16), _mm256_permute2x128_si256(half[0], half[1], 0x31));
  }
  if (valid < kGroup) memcpy(out, partial, 2 * valid);
}

// All steps for one row at a time.
template <int dtype>
LOWBIT_INLINE int64_t decode_row(const uint8_t* payload, const uint8_t codes[kGroup], const Bins& bins, int64_t valid,
                                 uint16_t* out) {
  RowFields row;
  memset(row.low, 0, sizeof row.low);
  find_masks(codes, bins, valid, row);
  const int64_t used = spread_row<dtype>(payload, valid, row);
  place_row<dtype>(codes, bins, row, valid, out);
  return used;
}

#else

template <int dtype>
LOWBIT_INLINE int64_t decode_row(const uint8_t* payload, const uint8_t codes[kGroup], const Bins& bins, int64_t valid,
                                 uint16_t* out) {
  int32_t places[kGroup + 8];
  uint8_t wide[kGroup], main_width[16];
  for (int q = 0; q < 16; q++) main_width[q] = (uint8_t)at_most(bins.width[q], kMainBits);
  int64_t at = 0, wide_count = 0;
  for (int64_t i = 0; i < valid; i += 8) {
    uint64_t window = bits_at(payload, at);
    const int64_t count = valid - i < 8 ? valid - i : 8;
    for (int64_t j = i; j < i + count; j++) {
      const int q = codes[j], width = main_width[q];
      places[j] = bins.base[q] + (int32_t)(window & ((1u << width) - 1));
      window >>= width;
      at += width;
      wide[wide_count] = (uint8_t)j;
      wide_count += bins.width[q] > kMainBits;
    }
  }
  at = (at + 7) & ~(int64_t)7;
  for (int64_t i = 0; i < wide_count; i++, at += kExtraBits)
    places[wide[i]] += (load<uint16_t>(payload + (at >> 3)) >> (at & 7) & 7) << kMainBits;
  at = (at + 7) & ~(int64_t)7;
  for (int64_t i = 0; i < valid; i++) {
    const int32_t place = places[i], negative = place >> 31, distance = (place ^ negative) - negative;
    const int32_t magnitude = distance == 0 ? 0 : distance + bins.floor;
    out[i] = (uint16_t)(magnitude << low_bits(dtype) | (negative & 0x8000));
  }
  if (dtype == kFloat16) {
    for (int64_t i = 0; i < valid; i++, at += 3) out[i] |= load<uint16_t>(payload + (at >> 3)) >> (at & 7) & 7;
    at = (at + 7) & ~(int64_t)7;
  }
  return at >> 3;
}
#endif

#if defined(__AVX512VBMI2__)

// The same with 64 weights to a register.
struct WideBins {
  __m512i table; // sixteen times: base in the lower two bytes, width in the third
  __m512i floor; // words
};

// The scales, mids and floors of a tile's rows, each as it is wanted in every lane of a register.
struct TileLines {
  alignas(64) float scale[kRows], mid[kRows];
  alignas(64) int32_t floor[kRows], floor_twice[kRows]; // the second: once in either half
};

// Magnitudes of sixteen finite numbers, rounded to the dtype.
template <int dtype> LOWBIT_INLINE __m512i sixteen_magnitudes(__m512 value) {
  if (dtype == kFloat16) {
    const __m256i half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_srli_epi32(_mm512_and_si512(_mm512_cvtepu16_epi32(half), _mm512_set1_epi32(0x7fff)), 3);
  }
  const __m512i bits = _mm512_castps_si512(value), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_and_si512(_mm512_srli_epi32(rounded, 16), _mm512_set1_epi32(0x7fff));
}

template <int dtype> LOWBIT_INLINE void find_lines(const uint8_t* ends, TileLines& lines) {
  const __m512i scale = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)ends)), 16);
  const __m512i mid = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(ends + 32))), 16);
  const __m512i above = _mm512_sub_epi32(sixteen_magnitudes<dtype>(_mm512_castsi512_ps(scale)), _mm512_set1_epi32(kFloorSteps));
  const __m512i floor = _mm512_max_epi32(above, _mm512_setzero_si512());
  _mm512_store_si512(lines.scale, scale);
  _mm512_store_si512(lines.mid, mid);
  _mm512_store_si512(lines.floor, floor);
  _mm512_store_si512(lines.floor_twice, _mm512_or_si512(floor, _mm512_slli_epi32(floor, 16)));
}

template <int dtype> LOWBIT_INLINE WideBins find_wide_bins(const TileLines& lines, int64_t row) {
  const __m512 steps = _mm512_setr_ps(-8.5f, -7.5f, -6.5f, -5.5f, -4.5f, -3.5f, -2.5f, -1.5f, -0.5f, 0.5f, 1.5f, 2.5f, 3.5f,
                                      4.5f, 5.5f, 6.5f);
  const __m512i zero = _mm512_setzero_si512(), one = _mm512_set1_epi32(1), most = _mm512_set1_epi32(kMaxWidth);
  const __m512 edge = _mm512_add_ps(_mm512_mul_ps(steps, _mm512_set1_ps(lines.scale[row])), _mm512_set1_ps(lines.mid[row]));
  const __m512i distance = _mm512_sub_epi32(sixteen_magnitudes<dtype>(edge), _mm512_set1_epi32(lines.floor[row]));
  const __m512i above = _mm512_max_epi32(distance, zero);
  const __m512i lower = _mm512_mask_sub_epi32(above, _mm512_movepi32_mask(_mm512_castps_si512(edge)), zero, above);
  const __m512i upper = _mm512_alignr_epi32(lower, lower, 1);
  const __m512i length = _mm512_sub_epi32(_mm512_set1_epi32(32), _mm512_lzcnt_epi32(_mm512_sub_epi32(upper, lower)));
  __m512i width = _mm512_permutexvar_epi32(_mm512_setr_epi32(1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 14), length);
  width = _mm512_min_epu32(_mm512_mask_add_epi32(width, 0x8001, width, one), most);
  const __m512i end = _mm512_sub_epi32(_mm512_add_epi32(upper, one), _mm512_sllv_epi32(one, width));
  const __m512i base = _mm512_mask_mov_epi32(lower, 1, end);
  return {_mm512_mask_blend_epi16(0xaaaaaaaa, base, _mm512_slli_epi32(width, 16)), _mm512_set1_epi32(lines.floor_twice[row])};
}

// Codes of the four rows 4 l + j, l = 0..3, of a tile whose line-by-line registers were transposed to `first` (lines
// 0..3) and `second` (lines 4..7): rows in order, columns in order.
LOWBIT_INLINE void four_rows(__m512i first, __m512i second, __m512i rows[4]) {
  const __m512i nibbles = _mm512_set1_epi8(15);
  const __m512i low_a = _mm512_and_si512(first, nibbles), high_a = _mm512_and_si512(_mm512_srli_epi16(first, 4), nibbles);
  const __m512i low_b = _mm512_and_si512(second, nibbles), high_b = _mm512_and_si512(_mm512_srli_epi16(second, 4), nibbles);
  const __m512i a = _mm512_unpacklo_epi32(low_a, high_a), b = _mm512_unpackhi_epi32(low_a, high_a);
  const __m512i c = _mm512_unpacklo_epi32(low_b, high_b), d = _mm512_unpackhi_epi32(low_b, high_b);
  // Lane l of a, b, c, d holds columns 0-15, 16-31, 32-47, 48-63 of row l: transpose lanes.
  const __m512i ab_even = _mm512_shuffle_i32x4(a, b, 0x88), ab_odd = _mm512_shuffle_i32x4(a, b, 0xdd); // a0 a2 b0 b2, a1 a3 b1 b3
  const __m512i cd_even = _mm512_shuffle_i32x4(c, d, 0x88), cd_odd = _mm512_shuffle_i32x4(c, d, 0xdd);
  rows[0] = _mm512_shuffle_i32x4(ab_even, cd_even, 0x88);
  rows[2] = _mm512_shuffle_i32x4(ab_even, cd_even, 0xdd);
  rows[1] = _mm512_shuffle_i32x4(ab_odd, cd_odd, 0x88);
  rows[3] = _mm512_shuffle_i32x4(ab_odd, cd_odd, 0xdd);
}

LOWBIT_INLINE void wide_codes(const uint8_t* tile, __m512i codes[kRows]) {
  __m512i pairs[8], quads[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512i even = _mm512_loadu_si512(tile + 128 * i), odd = _mm512_loadu_si512(tile + 128 * i + 64);
    pairs[2 * i] = _mm512_unpacklo_epi32(even, odd);     // rows 4 l and 4 l + 1
    pairs[2 * i + 1] = _mm512_unpackhi_epi32(even, odd); // rows 4 l + 2 and 4 l + 3
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) { // quads[4 i + j]: lines 4 i .. 4 i + 3 of rows 4 l + j
    quads[4 * i] = _mm512_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
    quads[4 * i + 1] = _mm512_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
    quads[4 * i + 2] = _mm512_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
    quads[4 * i + 3] = _mm512_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    __m512i rows[4];
    four_rows(quads[j], quads[4 + j], rows);
    for (int l = 0; l < 4; l++) codes[4 * l + j] = rows[l];
  }
}

// 64 fields of 3 bits, one after another, into bytes.
LOWBIT_INLINE __m512i three_bit_fields(const uint8_t* from) {
  const __m512i words = _mm512_set_epi64(0x1c1b1a1918171615, 0x1918171615141312, 0x161514131211100f, 0x131211100f0e0d0c,
                                         0x100f0e0d0c0b0a09, 0x0d0c0b0a09080706, 0x0a09080706050403, 0x0706050403020100);
  const __m512i shifts = _mm512_set1_epi64(0x15120f0c09060300);
  const __m512i data = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(words, data)), _mm512_set1_epi8(7));
}

template <int dtype, bool whole>
LOWBIT_INLINE int64_t decode_wide_row(const uint8_t* payload, __m512i codes, const WideBins& bins, int64_t valid, uint16_t* out) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i ones = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 3, 7, 15, 31, 63, 127, -1, 0, 0, 0, 0, 0, 0, 0));
  const __m512i twice = _mm512_add_epi8(codes, codes);
  __m512i width = _mm512_permutexvar_epi8(_mm512_add_epi8(_mm512_add_epi8(twice, twice), _mm512_set1_epi8(2)), bins.table);
  if (!whole) width = _mm512_maskz_mov_epi8(~0ull >> (64 - valid), width);
  const __m512i main_width = _mm512_min_epu8(width, _mm512_set1_epi8(kMainBits));
  const __mmask64 wide = _mm512_cmpgt_epu8_mask(width, _mm512_set1_epi8(kMainBits));
  // Where fields end inside their eight (bytes), and where each eight starts (words).
  __m512i ends = _mm512_add_epi8(main_width, _mm512_slli_epi64(main_width, 8));
  ends = _mm512_add_epi8(ends, _mm512_slli_epi64(ends, 16));
  ends = _mm512_add_epi8(ends, _mm512_slli_epi64(ends, 32));
  const __m512i sizes = _mm512_srli_epi64(ends, 56);
  __m512i sums = _mm512_add_epi64(sizes, _mm512_alignr_epi64(sizes, zero, 7));
  sums = _mm512_add_epi64(sums, _mm512_alignr_epi64(sums, zero, 6));
  sums = _mm512_add_epi64(sums, _mm512_alignr_epi64(sums, zero, 4));
  const __m512i starts = _mm512_sub_epi64(sums, sizes);
  alignas(64) int64_t ends_of_eights[8]; // through memory: cheaper than taking the last out of the register
  _mm512_store_si512(ends_of_eights, sums);
  const int64_t main_bits = ends_of_eights[7];
  // 64 bits from each start on; what lies beyond the register's 64 bytes is never part of a field.
  const __m512i first = _mm512_srli_epi64(starts, 6), second = _mm512_add_epi64(first, _mm512_set1_epi64(1));
  const __m512i data = _mm512_loadu_si512(payload);
  const __m512i window =
      _mm512_shrdv_epi64(_mm512_permutexvar_epi64(first, data), _mm512_permutexvar_epi64(second, data), starts);
  const __m512i main = _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_slli_epi64(ends, 8), window),
                                        _mm512_shuffle_epi8(ones, main_width));
  int64_t used = (main_bits + 7) >> 3;
  const __m512i extra = _mm512_maskz_expand_epi8(wide, three_bit_fields(payload + used));
  used += (kExtraBits * __builtin_popcountll(wide) + 7) >> 3;
  __m512i half[2] = {_mm512_add_epi16(_mm512_permutexvar_epi16(_mm512_unpacklo_epi8(twice, twice), bins.table),
                                      _mm512_unpacklo_epi8(main, extra)),
                     _mm512_add_epi16(_mm512_permutexvar_epi16(_mm512_unpackhi_epi8(twice, twice), bins.table),
                                      _mm512_unpackhi_epi8(main, extra))};
  __m512i low[2] = {zero, zero};
  if (dtype == kFloat16) {
    const __m512i fields = three_bit_fields(payload + used);
    low[0] = _mm512_unpacklo_epi8(fields, zero), low[1] = _mm512_unpackhi_epi8(fields, zero);
    used += (3 * valid + 7) >> 3;
  }
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++) {
    const __m512i place = half[h], magnitude = _mm512_abs_epi16(place);
    __m512i pattern = _mm512_maskz_add_epi16(_mm512_test_epi16_mask(place, place), magnitude, bins.floor);
    if (dtype == kFloat16) pattern = _mm512_or_si512(_mm512_slli_epi16(pattern, 3), low[h]);
    half[h] = _mm512_ternarylogic_epi32(pattern, place, _mm512_set1_epi16((int16_t)0x8000), 0xf8); // pattern | place & sign
  }
  const __m512i early = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), late = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const __m512i left = _mm512_permutex2var_epi64(half[0], early, half[1]);
  const __m512i right = _mm512_permutex2var_epi64(half[0], late, half[1]);
  if (whole) {
    _mm512_storeu_si512(out, left);
    _mm512_storeu_si512(out + 32, right);
  } else {
    const uint64_t kept = ~0ull >> (64 - valid);
    _mm512_mask_storeu_epi16(out, (__mmask32)kept, left);
    _mm512_mask_storeu_epi16(out + 32, (__mmask32)(kept >> 32), right);
  }
  return used;
}
#endif

// The first `rows` of a tile's `present` rows, `columns` weights each, to `out` (row stride in elements).  Its payload is
// [from, to).
template <int dtype, bool whole>
LOWBIT_INLINE void decode_tile(const uint8_t* tile, const uint8_t* from, const uint8_t* to, int64_t present, int64_t rows,
                               int64_t columns, uint16_t* out, int64_t stride) {
  const uint8_t* ends = tile + kCodeBytes;
#if defined(__AVX512VBMI2__)
  __m512i codes[kRows];
  TileLines lines;
  wide_codes(tile, codes);
  find_lines<dtype>(ends, lines);
#else
  alignas(64) uint8_t codes[kRows][kGroup];
  tile_codes(tile, codes);
#endif
#if defined(__AVX2__) && defined(__BMI2__) && !defined(__AVX512F__)
  Bins bins[kRows];
  RowFields fields[kRows];
  for (int64_t r = 0; r < present; r++) {
    const float scale = from_bfloat16(load<uint16_t>(ends + 2 * r)), mid = from_bfloat16(load<uint16_t>(ends + 32 + 2 * r));
    find_bins<dtype>(scale, mid, bins[r]);
    find_masks(codes[r], bins[r], columns, fields[r]);
  }
#endif
  for (int64_t r = 0; r < present; r++) { // escapes lie behind the last
    __builtin_prefetch(from + kAheadBytes); // two tiles on: codes, and about there the fields
    __builtin_prefetch(tile + 2 * kTileBytes + r * (kTileBytes / kRows));
#if defined(__AVX512VBMI2__)
    uint16_t unwanted[kGroup], *row = r < rows ? out + r * stride : unwanted;
    from += decode_wide_row<dtype, whole>(from, codes[r], find_wide_bins<dtype>(lines, r), columns, row);
#elif defined(__AVX2__) && defined(__BMI2__) && !defined(__AVX512F__)
    from += spread_row<dtype>(from, columns, fields[r]);
#else
    uint16_t unwanted[kGroup], *row = r < rows ? out + r * stride : unwanted;
    Bins bins;
    find_bins<dtype>(from_bfloat16(load<uint16_t>(ends + 2 * r)), from_bfloat16(load<uint16_t>(ends + 32 + 2 * r)), bins);
    from += decode_row<dtype>(from, codes[r], bins, columns, row);
#endif
  }
#if defined(__AVX2__) && defined(__BMI2__) && !defined(__AVX512F__)
  for (int64_t r = 0; r < rows; r++) place_row<dtype>(codes[r], bins[r], fields[r], columns, out + r * stride);
#endif
  for (; from + 4 <= to; from += 4) {
    const int64_t at = load<uint16_t>(from), row = at / kGroup, column = at % kGroup;
    if (row < rows && column < columns) out[row * stride + column] = load<uint16_t>(from + 2);
  }
}

// A matrix (n, k) in the form of substitute and residual.
struct ResidualMatrix {
  const uint8_t *tiles, *residual;
  int64_t residual_bytes, n, k;

  // Rows [first, last), `first` a multiple of 16, to `out` (row stride k).
  template <int dtype> void decode(int64_t first, int64_t last, uint16_t* out) const {
    const int64_t groups = (k + kGroup - 1) / kGroup, stripes = (n + kRows - 1) / kRows;
    const uint8_t *directory = residual, *payload = residual + 4 * (stripes * groups + 1);
    const int64_t limit = residual_bytes - (payload - residual);
    for (int64_t row = first; row < last; row += kRows) {
      const int64_t rows = last - row < kRows ? last - row : kRows, present = n - row < kRows ? n - row : kRows;
      for (int64_t g = 0, at = row / kRows * groups; g < groups; g++, at++) {
        int64_t start = load<uint32_t>(directory + 4 * at), end = load<uint32_t>(directory + 4 * at + 4);
        if (start > end || end > limit) start = end = 0; // damaged since it was verified: wrong numbers, but no crash
        const uint8_t *from = payload + start, *to = payload + end;
        uint16_t* place = out + (row - first) * k + g * kGroup;
        if (k - g * kGroup >= kGroup) decode_tile<dtype, true>(tiles + at * kTileBytes, from, to, present, rows, kGroup, place, k);
        else decode_tile<dtype, false>(tiles + at * kTileBytes, from, to, present, rows, k - g * kGroup, place, k);
      }
    }
  }
};

} // namespace lowbit
