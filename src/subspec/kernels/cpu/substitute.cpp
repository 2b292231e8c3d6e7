// Products with, and values of, 4-bit substitutes.  The layout of the tiles is written down in substitute/layout.py,
// the arithmetic in substitute/linear.py.
#include "lowbit_tile.h"
#include "operations.h"
#include <algorithm>
#include <atomic>
#include <cmath>
#if defined(_OPENMP)
#include <omp.h>
#endif

using namespace lowbit;

namespace {

constexpr int64_t kPassRows = 64;     // rows of x quantized at once: bounds the scratch
constexpr int64_t kBriefGroups = 128; // so few groups of x are quantized sooner than threads meet

// Quantize one group of one row: codes, scale, and scale times the sum of the codes.
template <int dtype>
void quantize_group(const void* x, int64_t offset, int64_t count, int8_t* codes, float* scale, float* sum) {
  Lanes part[4], total = splat(0.0f);
  for (int i = 0; i < 4; i++) part[i] = some_elements<dtype>(x, offset + 16 * i, count - 16 * i);
  const int32_t top = largest_magnitude(part);
  const bool finite = top < kInfinityBits, used = finite && bits<float>(top) >= 0x1p-100f;
  const float most = used ? bits<float>(top) : 127.0f;
  if (!used) memset(part, 0, sizeof part);
  for (int i = 0; i < 4; i++) {
    Lanes whole = nearest(part[i] * (127.0f / most));
    to_bytes(whole, codes + 16 * i);
    total = total + whole;
  }
  *scale = used ? most / 127.0f : (finite ? 0.0f : NAN);
  *sum = *scale * lane_sum(total);
}

void quantize_any(int dtype, const void* x, int64_t offset, int64_t count, int8_t* codes, float* scale, float* sum) {
  if (dtype == kBfloat16) quantize_group<kBfloat16>(x, offset, count, codes, scale, sum);
  else if (dtype == kFloat16) quantize_group<kFloat16>(x, offset, count, codes, scale, sum);
  else quantize_group<kFloat32>(x, offset, count, codes, scale, sum);
}

// How a pass's rows are cut into blocks of nearly equal size, none above kMaxRows.
struct RowBlocks {
  int64_t rows, count;
  explicit RowBlocks(int64_t rows) : rows(rows), count((rows + kMaxRows - 1) / kMaxRows) {}
  int64_t start(int64_t block) const { return rows * block / count; }
};

// One pass's quantized rows: per block, codes [group][row][64] and scales and sums [group][row].
struct Scratch {
  int8_t* codes;
  float *scales, *sums;
  int64_t groups;
  Scratch(void* memory, int64_t rows, int64_t groups)
      : codes((int8_t*)memory), scales((float*)(codes + rows * groups * kGroup)), sums(scales + rows * groups), groups(groups) {}
  Activations block(int64_t start) const {
    return {codes + start * groups * kGroup, scales + start * groups, sums + start * groups, groups};
  }
};

struct Product {
  const void* x;
  int64_t x_stride, k;
  const uint8_t* tiles;
  int64_t n;
  const float* bias;
  void* y;
  int dtype;
};

void quantize_rows(const Product& p, int64_t first, const RowBlocks& blocks, const Scratch& scratch, int64_t g) {
  int64_t count = std::min(kGroup, p.k - g * kGroup);
  for (int64_t b = 0; b < blocks.count; b++) {
    int64_t start = blocks.start(b), rows = blocks.start(b + 1) - start;
    for (int64_t m = 0; m < rows; m++) {
      int64_t at = start * scratch.groups + g * rows + m;
      quantize_any(p.dtype, p.x, (first + start + m) * p.x_stride + g * kGroup, count, scratch.codes + at * kGroup,
                   scratch.scales + at, scratch.sums + at);
    }
  }
}

void store_sixteen(const Product& p, int64_t row, int64_t column, const float* values) {
  int64_t count = std::min(kRows, p.n - column), at = row * p.n + column;
  float biased[16];
  if (p.bias)
    for (int64_t i = 0; i < count; i++) biased[i] = values[i] + p.bias[column + i];
  const float* from = p.bias ? biased : values;
  for (int64_t i = 0; i < count; i++) store_element(p.dtype, p.y, at + i, from[i]);
}

void multiply(int rows, const uint8_t* tiles, const Activations& x, float* out) {
  switch (rows) {
    case 1: return stripe_product<1>(tiles, x, out);
    case 2: return stripe_product<2>(tiles, x, out);
    case 3: return stripe_product<3>(tiles, x, out);
    case 4: return stripe_product<4>(tiles, x, out);
#if defined(__AVX2__)
    case 5: return stripe_product<5>(tiles, x, out);
    case 6: return stripe_product<6>(tiles, x, out);
    case 7: return stripe_product<7>(tiles, x, out);
    default: return stripe_product<8>(tiles, x, out);
#endif
  }
}

// All of a pass's rows with one stripe.
void stripe_rows(const Product& p, int64_t first, const RowBlocks& blocks, const Scratch& scratch, int64_t stripe) {
  const uint8_t* tiles = p.tiles + stripe * scratch.groups * kTileBytes;
  for (int64_t b = 0; b < blocks.count; b++) {
    int64_t start = blocks.start(b);
    int rows = (int)(blocks.start(b + 1) - start);
    alignas(64) float out[kMaxRows * 16];
    multiply(rows, tiles, scratch.block(start), out);
    for (int m = 0; m < rows; m++) store_sixteen(p, first + start + m, stripe * kRows, out + m * 16);
  }
}

// A pass's stripes in one run per thread, taken share by share: a thread's own run first, so that it reads one stream of
// memory, then the others', so that nobody waits for a late thread.
class Shares {
 public:
  Shares(int64_t stripes, int threads)
      : stripes_(stripes), runs_(std::min(threads, kMaxRuns)), share_(std::max<int64_t>(1, stripes / (8 * runs_))) {
    for (int run = 0; run < runs_; run++) next_[run].stripe.store(start(run), std::memory_order_relaxed);
  }
  template <class Work> void take(int thread, Work work) {
    for (int i = 0; i < runs_; i++) {
      const int run = (thread + i) % runs_;
      const int64_t end = start(run + 1);
      std::atomic<int64_t>& next = next_[run].stripe;
      while (next.load(std::memory_order_relaxed) < end) { // to look at a run that is done costs less than to take from it
        const int64_t from = next.fetch_add(share_, std::memory_order_relaxed);
        for (int64_t stripe = from; stripe < std::min(from + share_, end); stripe++) work(stripe);
      }
    }
  }

 private:
  static constexpr int kMaxRuns = 64;
  int64_t start(int run) const { return stripes_ * run / runs_; }
  const int64_t stripes_;
  const int runs_;
  const int64_t share_;
  struct alignas(64) Next { // a cache line each
    std::atomic<int64_t> stripe;
  } next_[kMaxRuns];
};

int this_thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

void one_pass(const Product& p, int64_t first, int64_t rows, void* memory, int threads) {
  const int64_t groups = (p.k + kGroup - 1) / kGroup, stripes = (p.n + kRows - 1) / kRows;
  const RowBlocks blocks(rows);
  const Scratch scratch(memory, rows, groups);
  Shares shares(stripes, threads);
  const bool brief = groups * rows <= kBriefGroups;
  for (int64_t g = 0; g < groups && brief; g++) quantize_rows(p, first, blocks, scratch, g);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (!brief) {
#pragma omp for schedule(static)
      for (int64_t g = 0; g < groups; g++) quantize_rows(p, first, blocks, scratch, g);
    }
    shares.take(this_thread(), [&](int64_t stripe) { stripe_rows(p, first, blocks, scratch, stripe); });
  }
}

// The sixteen values that a row's codes can have in one group, as bf16.
LOWBIT_INLINE void value_table(const uint8_t* ends, int64_t row, uint16_t table[16]) {
  float scale = from_bfloat16(load<uint16_t>(ends + 2 * row)), mid = from_bfloat16(load<uint16_t>(ends + 32 + 2 * row));
  for (int q = 0; q < 16; q++) {
    float product = (float)(q - 8) * scale;
    table[q] = to_bfloat16(product + mid);
  }
}

// One output row's 64 values of one group, as bf16.
void tile_row(const uint8_t* tile, int64_t row, uint16_t values[64]) {
  uint16_t table[16];
  value_table(tile + kCodeBytes, row, table);
  for (int t = 0; t < 8; t++)
    for (int j = 0; j < 4; j++) {
      uint8_t both = tile[t * 64 + 4 * row + j];
      values[8 * t + j] = table[both & 15];
      values[8 * t + 4 + j] = table[both >> 4];
    }
}

void store_row(int dtype, const uint16_t* values, int64_t count, void* out, int64_t at) {
  if (dtype == kBfloat16) memcpy((uint16_t*)out + at, values, 2 * count);
  else
    for (int64_t i = 0; i < count; i++) store_element(dtype, out, at + i, from_bfloat16(values[i]));
}

} // namespace

// Bytes of scratch that a product of `rows` rows needs.
LOWBIT_API int64_t subspec_substitute_scratch_bytes(int64_t rows, int64_t k) {
  return std::min(rows, kPassRows) * ((k + kGroup - 1) / kGroup) * (kGroup + 2 * (int64_t)sizeof(float));
}

// y (rows, n) = x (rows, k; row stride in elements) times the substitute's transpose, plus bias (n, fp32; may be null).
LOWBIT_API void subspec_substitute_product(const void* x, int64_t x_stride, int64_t rows, int64_t k, const void* tiles, int64_t n,
                                           const float* bias, void* y, int dtype, void* scratch, int threads) {
  Product p = {x, x_stride, k, (const uint8_t*)tiles, n, bias, y, dtype};
  if (n * k < 65536) threads = 1;
  for (int64_t first = 0; first < rows; first += kPassRows) one_pass(p, first, std::min(kPassRows, rows - first), scratch, threads);
}

// out (count, k): the values of output rows `rows[i]`, or `first + i` where rows is null.  Rows must be in range.
LOWBIT_API void subspec_substitute_values(const void* tiles, int64_t k, const int64_t* rows, int64_t first, int64_t count, void* out,
                                          int dtype, int threads) {
  const int64_t groups = (k + kGroup - 1) / kGroup;
  if (count * k < 65536) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; i++) {
    int64_t row = rows ? rows[i] : first + i;
    const uint8_t* stripe = (const uint8_t*)tiles + row / kRows * groups * kTileBytes;
    for (int64_t g = 0; g < groups; g++) {
      uint16_t values[64];
      tile_row(stripe + g * kTileBytes, row % kRows, values);
      store_row(dtype, values, std::min(kGroup, k - g * kGroup), out, i * k + g * kGroup);
    }
  }
}
