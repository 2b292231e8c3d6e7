// The numbers of a residual, whatever the processor.  The format is written down in substitute/residual.py.
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

// 64 bits of a byte stream from bit `at` on.
LOWBIT_INLINE uint64_t bits_at(const uint8_t* from, int64_t at) {
  const int shift = at & 7;
  from += at >> 3;
  return load<uint64_t>(from) >> shift | load<uint64_t>(from + 1) << (8 - shift); // where both have a bit, it is the same
}

} // namespace lowbit
