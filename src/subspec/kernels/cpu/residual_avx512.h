// Rows of a residual back into exact weights with 64 weights to a register: AVX-512 with VBMI2.
#pragma once
#include "residual_numbers.h"

#if defined(__AVX512VBMI2__)
namespace lowbit {

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

} // namespace lowbit
#endif
