// Rows of a residual back into exact weights on AVX2: sixteen bins to a register, eight fields spread by one bit deposit.
#pragma once
#include "residual_numbers.h"

#if defined(__AVX2__)
namespace lowbit {

constexpr int kTogether = 2; // rows whose bins are found together
static_assert(kRows % kTogether == 0);

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

// How far magnitudes are above a floor; 0 where they are not.
template <int dtype> LOWBIT_INLINE __m256i above_floor(__m256i patterns, __m256i floor) {
  const __m256i magnitudes = _mm256_srli_epi16(_mm256_and_si256(patterns, _mm256_set1_epi16(0x7fff)), low_bits(dtype));
  return _mm256_subs_epu16(magnitudes, floor);
}

template <int many, class Step> LOWBIT_INLINE void each(const Step& step) {
#pragma GCC unroll 4
  for (int row = 0; row < many; row++) step(row);
}

// Of `many` rows, a step for all of them before the next: every step waits for the one before, and a processor looks for
// other work only a few hundred instructions ahead.
template <int dtype, int many>
LOWBIT_INLINE void find_bins(const float* scale, const float* mid, const int16_t* floor, Bins* bins) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256 first_steps = _mm256_setr_ps(-8.5f, -7.5f, -6.5f, -5.5f, -0.5f, 0.5f, 1.5f, 2.5f);
  const __m256 second_steps = _mm256_setr_ps(-4.5f, -3.5f, -2.5f, -1.5f, 3.5f, 4.5f, 5.5f, 6.5f);
  __m256 first[many], second[many];
  each<many>([&](int r) { first[r] = _mm256_mul_ps(first_steps, _mm256_broadcast_ss(scale + r)); });
  each<many>([&](int r) { second[r] = _mm256_mul_ps(second_steps, _mm256_broadcast_ss(scale + r)); });
  each<many>([&](int r) { first[r] = _mm256_add_ps(first[r], _mm256_broadcast_ss(mid + r)); });
  each<many>([&](int r) { second[r] = _mm256_add_ps(second[r], _mm256_broadcast_ss(mid + r)); });
  __m256i pattern[many], place[many], next[many], span[many];
  each<many>([&](int r) { pattern[r] = sixteen_patterns<dtype>(first[r], second[r]); });
  each<many>([&](int r) { place[r] = above_floor<dtype>(pattern[r], _mm256_set1_epi16(floor[r])); });
  each<many>([&](int r) { place[r] = _mm256_sign_epi16(place[r], pattern[r]); });
  each<many>([&](int r) { next[r] = _mm256_permute2x128_si256(place[r], place[r], 0x81); });
  each<many>([&](int r) { next[r] = _mm256_alignr_epi8(next[r], place[r], 2); }); // nothing behind the last
  // Bit lengths of spans: these are below 2^16, and the exponent of one as a float tells.
  __m256i low[many], high[many], width[many];
  each<many>([&](int r) { span[r] = _mm256_sub_epi16(next[r], place[r]); });
  const auto exponents = [](__m256i spans) { return _mm256_srli_epi32(_mm256_castps_si256(_mm256_cvtepi32_ps(spans)), 23); };
  each<many>([&](int r) { low[r] = exponents(_mm256_unpacklo_epi16(span[r], zero)); });
  each<many>([&](int r) { high[r] = exponents(_mm256_unpackhi_epi16(span[r], zero)); });
  each<many>([&](int r) { width[r] = _mm256_packus_epi32(low[r], high[r]); });
  each<many>([&](int r) { width[r] = _mm256_subs_epu16(width[r], _mm256_set1_epi16(126)); });
  // The end bins: one more than their neighbours.
  const __m256i inward = _mm256_setr_epi8(2, 3, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                                          0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 12, 13);
  const __m256i more = _mm256_setr_epi16(1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1);
  each<many>([&](int r) { width[r] = _mm256_add_epi16(_mm256_shuffle_epi8(width[r], inward), more); });
  each<many>([&](int r) { width[r] = _mm256_min_epi16(width[r], _mm256_set1_epi16(kMaxWidth)); });
  // The first bin ends where the second begins.
  each<many>([&](int r) {
    const __m128i size = _mm_sllv_epi32(_mm_set1_epi32(1), _mm_cvtepu16_epi32(_mm256_castsi256_si128(width[r])));
    const __m128i begin = _mm_sub_epi16(_mm_add_epi16(_mm256_castsi256_si128(next[r]), _mm_set1_epi16(1)), size);
    const __m128i early = _mm_blend_epi16(_mm256_castsi256_si128(place[r]), begin, 0x01);
    _mm256_storeu_si256((__m256i*)bins[r].base, _mm256_blend_epi32(place[r], _mm256_castsi128_si256(early), 0x0f));
  });
  each<many>([&](int r) {
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(width[r]), _mm256_extracti128_si256(width[r], 1));
    _mm_storeu_si128((__m128i*)bins[r].width, bytes);
    bins[r].floor = floor[r];
  });
}

template <int dtype> LOWBIT_INLINE void find_bins(float scale, float mid, Bins& bins) {
  const int16_t floor = (int16_t)floor_of<dtype>(scale);
  find_bins<dtype, 1>(&scale, &mid, &floor, &bins);
}

// The scales, mids and floors of a tile's rows.
struct RowLines {
  alignas(32) float scale[kRows], mid[kRows];
  alignas(32) int16_t floor[kRows];
};

template <int dtype> LOWBIT_INLINE void find_lines(const uint8_t* ends, RowLines& lines) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i scale = _mm256_loadu_si256((const __m256i*)ends), mid = _mm256_loadu_si256((const __m256i*)(ends + 32));
  const auto widened = [&](__m256i values, __m256i& first, __m256i& second, float* to) {
    first = _mm256_unpacklo_epi16(zero, values), second = _mm256_unpackhi_epi16(zero, values);
    _mm256_store_si256((__m256i*)to, _mm256_permute2x128_si256(first, second, 0x20));
    _mm256_store_si256((__m256i*)(to + 8), _mm256_permute2x128_si256(first, second, 0x31));
  };
  __m256i first, second;
  widened(mid, first, second, lines.mid);
  widened(scale, first, second, lines.scale);
  const __m256i pattern = sixteen_patterns<dtype>(_mm256_castsi256_ps(first), _mm256_castsi256_ps(second));
  _mm256_store_si256((__m256i*)lines.floor, above_floor<dtype>(pattern, _mm256_set1_epi16(kFloorSteps)));
}

#if !defined(__AVX512F__)
// The codes of a tile, by row.
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
#endif

#if defined(__BMI2__)
constexpr int kSixteens[4] = {0, 2, 1, 3}; // where a pack of two vectors leaves the masks of each 16 weights

// A row on its way from fields to weights.  Every step stores what the next one loads in other sizes, which takes long
// when it follows at once: so other rows' steps come between.
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
#endif

} // namespace lowbit
#endif
