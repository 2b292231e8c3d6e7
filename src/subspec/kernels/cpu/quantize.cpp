// Weights to 4-bit tiles, in one pass per group.  The arithmetic is written down in substitute/quantize.py; every
// operation and every sum's order is the same there, so that the codes are.
#include "lowbit_numbers.h"
#include <algorithm>

using namespace lowbit;

namespace {

constexpr int kStarts = 4;   // (cut below, cut above) of the range that a search starts from
constexpr int kRefits = 2;   // least-squares refits per start
constexpr int kPolish = 2;   // further refits of the best
constexpr float kCut = 0.05f;
constexpr float kTiny = 0x1p-100f, kHuge = 0x1p100f;

struct Line { // weight = code * scale + mid, codes -8 to 7
  float scale, mid;
};

struct Group {
  Lanes weights[4], mask[4]; // mask: what a weight counts, 0 where there is none
  float count, sum;          // of the mask; of the weights, each as often as it counts
  bool even;                 // all 64 weights exist and count alike: the mask is not used
};

LOWBIT_INLINE Lanes codes_of(Lanes weights, Line line, float inverse) {
  return nearest(smaller(larger((weights - line.mid) * inverse, splat(-8.0f)), splat(7.0f)));
}

// Codes for a line; their squared error, and the line that suits these codes best.
template <bool even> LOWBIT_INLINE float refit(const Group& group, Line line, Line& better) {
  const float inverse = 1.0f / line.scale;
  Lanes sum = {}, squares = {}, products = {}, errors = {};
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const Lanes code = codes_of(group.weights[i], line, inverse);
    const Lanes error = (code * line.scale + line.mid) - group.weights[i];
    const Lanes counted = even ? code : code * group.mask[i], off = even ? error : error * group.mask[i];
    sum = i ? sum + counted : counted;
    squares = i ? squares + counted * code : counted * code;
    products = i ? products + counted * group.weights[i] : counted * group.weights[i];
    errors = i ? errors + off * error : off * error;
  }
  const float n = group.count, su = lane_sum(sum), suu = lane_sum(squares), suw = lane_sum(products);
  const float spread = n * suu - su * su;
  float scale = spread > 0.0f ? round_bfloat16((n * suw - su * group.sum) / spread) : line.scale;
  if (!(scale >= kTiny)) scale = line.scale;
  better = {scale, round_bfloat16((group.sum - scale * su) / n)};
  return lane_sum(errors);
}

template <bool even> LOWBIT_INLINE Line search(const Group& group, float low, float high) {
  const float span = high - low;
  Line best = {0.0f, 0.0f}, lines[kStarts];
  float least = __builtin_inff();
  for (int i = 0; i < kStarts; i++) {
    float from = low + (i & 1 ? kCut : 0.0f) * span, to = high - (i & 2 ? kCut : 0.0f) * span;
    float scale = round_bfloat16((to - from) / 15.0f);
    lines[i] = {scale, round_bfloat16(from + 8.0f * scale)};
  }
  best = lines[0];
  for (int round = 0; round <= kRefits; round++)
    for (int i = 0; i < kStarts; i++) {
      Line line = lines[i];
      float error = refit<even>(group, line, lines[i]);
      if (error < least) least = error, best = line;
    }
  Line line = best, next;
  for (int round = 0; round <= kPolish; round++) {
    float error = refit<even>(group, line, next);
    if (error < least) least = error, best = line;
    line = next;
  }
  return best;
}

LOWBIT_INLINE float bounded(float weight) { return std::min(std::max(weight, -kHuge), kHuge); }

// What the weights count: `importance` of the first `count` columns, null: all alike.
void mask_group(Group& group, const float* importance, int64_t count) {
  float mask[kGroup];
  for (int i = 0; i < kGroup; i++) mask[i] = i < count ? importance ? importance[i] : 1.0f : 0.0f;
  memcpy(group.mask, mask, sizeof mask);
  group.count = lane_sum(((group.mask[0] + group.mask[1]) + group.mask[2]) + group.mask[3]);
}

// `with` in all lanes from `count` on.
void fill_up(Lanes& lanes, float with, int64_t count) {
  float values[16];
  memcpy(values, &lanes, sizeof values);
  for (int64_t i = std::max<int64_t>(count, 0); i < 16; i++) values[i] = with;
  memcpy(&lanes, values, sizeof values);
}

template <int dtype>
LOWBIT_INLINE Line quantize_group(const void* weight, int64_t offset, int64_t count, const float* importance, uint8_t codes[64]) {
  Group group = {};
  const bool whole = count == kGroup;
  group.count = (float)count;
  group.even = whole && !importance;
  memset(codes, 8, kGroup);
  for (int i = 0; i < 4; i++) group.weights[i] = some_elements<dtype>(weight, offset + 16 * i, count - 16 * i);
  const int32_t top = largest_magnitude(group.weights);
  if (top >= kInfinityBits) return {0.0f, 0.0f};
  if (!group.even) mask_group(group, importance, count);
  const float first = bounded(element<dtype>(weight, offset));
  Lanes sum = {}, lows = {}, highs = {};
  for (int i = 0; i < 4; i++) {
    Lanes& w = group.weights[i];
    if (bits<float>(top) > kHuge) w = smaller(larger(w, splat(-kHuge)), splat(kHuge));
    const Lanes counted = group.even ? w : w * group.mask[i];
    sum = i ? sum + counted : counted;
    Lanes filled = w;
    if (!whole) fill_up(filled, first, count - 16 * i);
    lows = i ? smaller(lows, filled) : filled;
    highs = i ? larger(highs, filled) : filled;
  }
  group.sum = lane_sum(sum);
  const float low = -lane_max(splat(0.0f) - lows), high = lane_max(highs);
  if (!(high - low >= 32.0f * kTiny)) return {0.0f, round_bfloat16(0.5f * low + 0.5f * high)};
  const Line line = group.even ? search<true>(group, low, high) : search<false>(group, low, high);
  const float inverse = 1.0f / line.scale;
  for (int i = 0; i < 4; i++) to_bytes(codes_of(group.weights[i], line, inverse) + 8.0f, codes + 16 * i);
  if (!whole) memset(codes + count, 8, kGroup - count);
  return line;
}

void write_row(uint8_t* tile, int64_t row, Line line, const uint8_t codes[64]) {
  for (int t = 0; t < 8; t++) {
    uint32_t low = load<uint32_t>(codes + 8 * t), high = load<uint32_t>(codes + 8 * t + 4);
    uint32_t both = low | high << 4;
    memcpy(tile + t * 64 + 4 * row, &both, 4);
  }
  const uint16_t scale = to_bfloat16(line.scale), mid = to_bfloat16(line.mid);
  memcpy(tile + kCodeBytes + 2 * row, &scale, 2);
  memcpy(tile + kCodeBytes + 32 + 2 * row, &mid, 2);
}

template <int dtype>
void quantize_stripe(const void* weight, int64_t stride, int64_t n, int64_t k, int64_t stripe, const float* importance,
                     uint8_t* tiles) {
  const int64_t groups = (k + kGroup - 1) / kGroup;
  for (int64_t g = 0; g < groups; g++)
    for (int64_t r = 0; r < kRows; r++) {
      const int64_t row = stripe * kRows + r;
      uint8_t codes[64];
      memset(codes, 8, sizeof codes);
      Line line = {0.0f, 0.0f};
      if (row < n)
        line = quantize_group<dtype>(weight, row * stride + g * kGroup, std::min(kGroup, k - g * kGroup),
                                     importance ? importance + g * kGroup : nullptr, codes);
      write_row(tiles + (stripe * groups + g) * kTileBytes, r, line, codes);
    }
}

} // namespace

// tiles = the 4-bit substitute of weight (n, k; row stride in elements); importance: (k) what columns count, or null.
LOWBIT_API void subspec_substitute_quantize(const void* weight, int dtype, int64_t stride, int64_t n, int64_t k,
                                            const float* importance, void* tiles, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t stripe = 0; stripe < (n + kRows - 1) / kRows; stripe++) {
    if (dtype == kBfloat16) quantize_stripe<kBfloat16>(weight, stride, n, k, stripe, importance, (uint8_t*)tiles);
    else if (dtype == kFloat16) quantize_stripe<kFloat16>(weight, stride, n, k, stripe, importance, (uint8_t*)tiles);
    else quantize_stripe<kFloat32>(weight, stride, n, k, stripe, importance, (uint8_t*)tiles);
  }
}
