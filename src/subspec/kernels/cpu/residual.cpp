// Residuals: exact weights to bytes, and bytes back.  The format is written down in substitute/residual.py.
#include "residual_tile.h"
#include <algorithm>
#include <new>
#include <vector>

using namespace lowbit;

namespace {

// Bits one after another, from bit 0 of a byte up.  Writes up to 8 bytes beyond what it holds.
struct BitWriter {
  uint8_t* at;
  uint64_t held = 0;
  int count = 0;

  void put(uint32_t field, int width) {
    held |= (uint64_t)field << count;
    count += width;
    memcpy(at, &held, 8);
    at += count >> 3;
    held >>= count & ~7;
    count &= 7;
  }
  void finish() {
    at += count > 0;
    held = 0, count = 0;
  }
};

struct Escape {
  uint16_t at, pattern;
};
constexpr int64_t kMostRowBytes = 64 + 24 + 24 + 8; // fields, and what the writer touches behind them

// One row of a tile to `out`; returns where the next one goes.
template <int dtype>
uint8_t* encode_row(const uint16_t* weights, const uint8_t* codes, const Bins& bins, int64_t row, int64_t columns, uint8_t* out,
                    std::vector<Escape>& escapes) {
  uint32_t field[kGroup];
  for (int64_t i = 0; i < columns; i++) {
    const int32_t place = place_of<dtype>(weights[i], bins.floor), from_base = place - bins.base[codes[i]];
    const bool fits = from_base >= 0 && from_base < 1 << bins.width[codes[i]] && (place != 0 || weights[i] == 0);
    field[i] = fits ? from_base : 0;
    if (!fits) escapes.push_back({(uint16_t)(row * kGroup + i), weights[i]});
  }
  BitWriter writer{out};
  for (int64_t i = 0; i < columns; i++) writer.put(field[i] & 255, std::min<int>(bins.width[codes[i]], kMainBits));
  writer.finish();
  for (int64_t i = 0; i < columns; i++)
    if (bins.width[codes[i]] > kMainBits) writer.put(field[i] >> kMainBits, kExtraBits);
  writer.finish();
  for (int64_t i = 0; i < columns && low_bits(dtype); i++) writer.put(weights[i] & 7, 3);
  writer.finish();
  return writer.at;
}

// The payloads of a stripe's tiles, one after another, and where each ends.
struct Stripe {
  std::vector<uint8_t> bytes;
  std::vector<uint32_t> ends;
};

template <int dtype>
void encode_stripe(const uint16_t* weight, int64_t stride, int64_t n, int64_t k, const uint8_t* tiles, int64_t stripe, Stripe& out) {
  const int64_t groups = (k + kGroup - 1) / kGroup, rows = std::min(kRows, n - stripe * kRows);
  std::vector<Escape> escapes;
  for (int64_t g = 0; g < groups; g++) {
    const uint8_t *tile = tiles + (stripe * groups + g) * kTileBytes, *ends = tile + kCodeBytes;
    uint8_t codes[kRows][kGroup];
    tile_codes(tile, codes);
    escapes.clear();
    const size_t start = out.bytes.size();
    out.bytes.resize(start + kRows * kMostRowBytes);
    uint8_t* at = out.bytes.data() + start;
    for (int64_t r = 0; r < rows; r++) {
      Bins bins;
      find_bins<dtype>(from_bfloat16(load<uint16_t>(ends + 2 * r)), from_bfloat16(load<uint16_t>(ends + 32 + 2 * r)), bins);
      at = encode_row<dtype>(weight + (stripe * kRows + r) * stride + g * kGroup, codes[r], bins, r,
                             std::min(kGroup, k - g * kGroup), at, escapes);
    }
    out.bytes.resize(at - out.bytes.data());
    const uint8_t* noted = (const uint8_t*)escapes.data();
    out.bytes.insert(out.bytes.end(), noted, noted + 4 * escapes.size());
    out.ends.push_back((uint32_t)out.bytes.size());
  }
}

} // namespace

// The residual of weight (n, k; bf16 or fp16; row stride in elements) over its tiles.  Returns its bytes, -1 for lack of
// memory, or -2 if they are more than the directory can count; writes it only where `capacity` holds it.
LOWBIT_API int64_t subspec_residual_encode(int dtype, const void* weight, int64_t stride, int64_t n, int64_t k, const void* tiles,
                                           void* out, int64_t capacity, int threads) {
  const int64_t stripes = (n + kRows - 1) / kRows, groups = (k + kGroup - 1) / kGroup;
  std::vector<Stripe> parts;
  bool failed = false;
  try {
    parts.resize(stripes);
  } catch (const std::bad_alloc&) {
    return -1;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t s = 0; s < stripes; s++) {
    try {
      if (dtype == kFloat16) encode_stripe<kFloat16>((const uint16_t*)weight, stride, n, k, (const uint8_t*)tiles, s, parts[s]);
      else encode_stripe<kBfloat16>((const uint16_t*)weight, stride, n, k, (const uint8_t*)tiles, s, parts[s]);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  }
  if (failed) return -1;
  int64_t payload = 0;
  for (const Stripe& part : parts) payload += (int64_t)part.bytes.size();
  const int64_t directory = 4 * (stripes * groups + 1), total = directory + payload + kTailBytes;
  if (payload > UINT32_MAX) return -2;
  if (total > capacity) return total;
  uint8_t *note = (uint8_t*)out, *at = note + directory;
  uint32_t start = 0;
  memcpy(note, &start, 4);
  for (const Stripe& part : parts) {
    for (uint32_t end : part.ends) {
      const uint32_t whole = start + end;
      memcpy(note += 4, &whole, 4);
    }
    start += (uint32_t)part.bytes.size();
    std::copy(part.bytes.begin(), part.bytes.end(), at);
    at += part.bytes.size();
  }
  memset(at, 0, kTailBytes);
  return total;
}

// Rows [first, last) of the exact weight (n, k), `first` a multiple of 16, to out (row stride k).
LOWBIT_API void subspec_residual_decode(int dtype, const void* tiles, const void* residual, int64_t residual_bytes, int64_t n,
                                        int64_t k, int64_t first, int64_t last, void* out, int threads) {
  const ResidualMatrix matrix{(const uint8_t*)tiles, (const uint8_t*)residual, residual_bytes, n, k};
  if (last - first <= kRows || (last - first) * k < 65536) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = first; row < last; row += kRows) {
    uint16_t* rows = (uint16_t*)out + (row - first) * k;
    if (dtype == kFloat16) matrix.decode<kFloat16>(row, std::min(row + kRows, last), rows);
    else matrix.decode<kBfloat16>(row, std::min(row + kRows, last), rows);
  }
}
