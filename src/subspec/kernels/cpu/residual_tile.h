// One tile of a residual back into exact weights.  The format is written down in substitute/residual.py.
//
// Fields of at most 8 bits lie one after another; where each starts follows from the codes.  Eight fields make at most
// 64 bits: one unaligned word holds them, and one instruction spreads them into eight bytes: a multishift (AVX-512
// VBMI), or a bit deposit (BMI2); in portable code, a loop of shifts.
#pragma once
#include "residual_avx2.h"
#include "residual_avx512.h"

// A tile's rows take the steps of their rebuilding one step apart, instead of one row all of them: while one's bits are
// spread, by integer units, vector units find the next one's masks and place the last one's fields.
#if defined(__AVX2__) && defined(__BMI2__) && !defined(__AVX512F__)
#define LOWBIT_STEPWISE
#endif

namespace lowbit {

#if !defined(__AVX2__)
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

#if !defined(__AVX2__) || defined(__AVX512F__)
// The codes of a tile, by row.
LOWBIT_INLINE void tile_codes(const uint8_t* tile, uint8_t codes[kRows][kGroup]) {
  for (int t = 0; t < 8; t++)
    for (int r = 0; r < kRows; r++) {
      const uint64_t both = load<uint32_t>(tile + 64 * t + 4 * r);
      const uint64_t eight = (both & 0x0f0f0f0f) | (both >> 4 & 0x0f0f0f0f) << 32;
      memcpy(codes[r] + 8 * t, &eight, 8);
    }
}
#endif

#if !defined(__AVX2__) || !defined(__BMI2__)
// One row's 64 weights of one group.  `valid` of them exist; `out` has room for those.  Returns the bytes consumed.
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

// Asks for what will be needed two tiles on: a row's part of the codes, and about there the fields.
LOWBIT_INLINE void fetch_ahead(const uint8_t* tile, const uint8_t* fields, int64_t row) {
  __builtin_prefetch(fields + kAheadBytes);
  __builtin_prefetch(tile + 2 * kTileBytes + row * (kTileBytes / kRows));
}

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
#if defined(LOWBIT_STEPWISE)
  RowLines lines;
  Bins bins[kRows];
  RowFields fields[kRows];
  find_lines<dtype>(ends, lines);
  for (int64_t r = 0; r < kRows; r += kTogether)
    find_bins<dtype, kTogether>(lines.scale + r, lines.mid + r, lines.floor + r, bins + r);
  for (int64_t r = -1; r <= present; r++) {
    const int64_t next = r + 1, last = r - 1;
    if (next < present) find_masks(codes[next], bins[next], columns, fields[next]);
    if (r >= 0 && r < present) {
      fetch_ahead(tile, from, r);
      from += spread_row<dtype>(from, columns, fields[r]);
    }
    if (last >= 0 && last < rows) place_row<dtype>(codes[last], bins[last], fields[last], columns, out + last * stride);
  }
#else
  for (int64_t r = 0; r < present; r++) {
    fetch_ahead(tile, from, r);
    uint16_t unwanted[kGroup], *row = r < rows ? out + r * stride : unwanted;
#if defined(__AVX512VBMI2__)
    from += decode_wide_row<dtype, whole>(from, codes[r], find_wide_bins<dtype>(lines, r), columns, row);
#else
    Bins bins;
    find_bins<dtype>(from_bfloat16(load<uint16_t>(ends + 2 * r)), from_bfloat16(load<uint16_t>(ends + 32 + 2 * r)), bins);
    from += decode_row<dtype>(from, codes[r], bins, columns, row);
#endif
  }
#endif
  // Escapes lie behind the last row.
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
