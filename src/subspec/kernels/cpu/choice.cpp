// What choosing tokens takes: the greatest logits of a row, and the numbers that a position's noise is made from.
#include <algorithm>
#include <functional>
#include <new>
#include <vector>

#include "numeric.h"

namespace {

// ------------------------------------------------------------------------------------------ greatest logits

constexpr int32_t LEAST = std::numeric_limits<int32_t>::min(), NOT_A_NUMBER = std::numeric_limits<int32_t>::max();
constexpr int64_t BLOCK = 128;  // logits whose greatest is looked at first; a multiple of LANES
static_assert(BLOCK % LANES == 0, "blocks are whole vectors");

// Floats as integers of the same order: both zeros alike, NaN above all else.
SUBSPEC_INLINE IntVec rank_of(Vec v) {
    const IntVec bits = (IntVec)(v + 0.0f);  // -0 becomes 0
    const IntVec rank = bits ^ ((bits >> 31) & 0x7fffffff);
    return (v != v) ? IntVec{} + NOT_A_NUMBER : rank;
}
SUBSPEC_INLINE int32_t rank_of(float value) {
    const int32_t bits = int32_t(bits_of(value + 0.0f));
    return value != value ? NOT_A_NUMBER : bits ^ ((bits >> 31) & 0x7fffffff);
}

struct Candidate {
    int32_t rank;
    int64_t token;
    bool operator<(const Candidate& other) const {
        return rank != other.rank ? rank > other.rank : token < other.token;
    }
};

// The highest rank of n logits.
template <class Scalar>
int32_t block_greatest(const Scalar* x, int64_t n) {
    int32_t best = LEAST;
    if (n == BLOCK) {
        IntVec lanes = IntVec{} + LEAST;
        for (int64_t i = 0; i < BLOCK; i += LANES) {
            const IntVec ranks = rank_of(load_lanes(x + i));
            lanes = ranks > lanes ? ranks : lanes;
        }
        for (int lane = 0; lane < LANES; lane++) best = std::max(best, lanes[lane]);
        return best;
    }
    for (int64_t i = 0; i < n; i++) best = std::max(best, rank_of(widen(x[i])));
    return best;
}

// The `count` greatest of V logits, falling, equals by their number.  As many blocks have a greatest of at least the
// count-th greatest one, no logit below that can be among them: the few that are not below are sorted.
template <class Scalar>
void greatest_row(const Scalar* x, int64_t V, int64_t count, int64_t* tokens, Scalar* values) {
    const int64_t blocks = (V + BLOCK - 1) / BLOCK;
    std::vector<int32_t> found(blocks), sorted;
    for (int64_t b = 0; b < blocks; b++) found[b] = block_greatest(x + b * BLOCK, smaller_of(BLOCK, V - b * BLOCK));
    int32_t bound = LEAST;
    if (count < blocks) {
        sorted = found;
        std::nth_element(sorted.begin(), sorted.begin() + (count - 1), sorted.end(), std::greater<int32_t>());
        bound = sorted[count - 1];
    }
    std::vector<Candidate> candidates;
    for (int64_t b = 0; b < blocks; b++) {
        if (found[b] < bound) continue;
        const int64_t end = smaller_of(V, (b + 1) * BLOCK);
        for (int64_t i = b * BLOCK; i < end; i++) {
            const int32_t rank = rank_of(widen(x[i]));
            if (rank >= bound) candidates.push_back({rank, i});
        }
    }
    const auto last = candidates.begin() + count;
    if (last != candidates.end()) std::nth_element(candidates.begin(), last, candidates.end());
    std::sort(candidates.begin(), last);
    for (int64_t i = 0; i < count; i++) {
        tokens[i] = candidates[i].token;
        values[i] = x[candidates[i].token];
    }
}

template <class Scalar>
int greatest(const Scalar* x, int64_t stride, int64_t T, int64_t V, int64_t count, int64_t* tokens, Scalar* values,
             int threads) {
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : failed) if (T > 1)
    for (int64_t t = 0; t < T; t++) {
        try {
            greatest_row(x + t * stride, V, count, tokens + t * count, values + t * count);
        } catch (const std::bad_alloc&) {
            failed |= 1;
        }
    }
    return failed;
}

// ------------------------------------------------------------------------------------------ uniform numbers

// Philox4x64-10: four words that are a function of a counter and a key.
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
SUBSPEC_INLINE void philox(uint64_t counter, uint64_t position, uint64_t key, uint64_t out[4]) {
    constexpr uint64_t M0 = 0xD2E7470EE14C6C93u, M1 = 0xCA5A826395121157u;
    constexpr uint64_t W0 = 0x9E3779B97F4A7C15u, W1 = 0xBB67AE8584CAA73Bu;
    uint64_t a = counter, b = position, c = 0, d = 0, k0 = key, k1 = 0;
    for (int round = 0; round < 10; round++) {
        const unsigned __int128 first = (unsigned __int128)M0 * a, second = (unsigned __int128)M1 * c;
        a = uint64_t(second >> 64) ^ b ^ k0;
        b = uint64_t(second);
        c = uint64_t(first >> 64) ^ d ^ k1;
        d = uint64_t(first);
        k0 += W0;
        k1 += W1;
    }
    out[0] = a, out[1] = b, out[2] = c, out[3] = d;
}

// A word as a number strictly inside (0, 1).
SUBSPEC_INLINE double inside(uint64_t word) {
    return std::min(double(word >> 11) * 0x1p-53 + 0x1p-54, 1 - 0x1p-53);
}

}  // namespace

// Each row's `count` greatest logits of x (T, V), falling, equals by their number, NaN first:
// tokens and values (T, count).  Not 0 if memory is lacking.
SUBSPEC_EXPORT int subspec_greatest(int dtype, const void* x, int64_t stride, int64_t T, int64_t V, int64_t count,
                                    int64_t* tokens, void* values, int threads) {
    if (dtype == 0) return greatest((const Bf16*)x, stride, T, V, count, tokens, (Bf16*)values, threads);
    if (dtype == 1) return greatest((const Fp16*)x, stride, T, V, count, tokens, (Fp16*)values, threads);
    return greatest((const float*)x, stride, T, V, count, tokens, (float*)values, threads);
}

// The V numbers of a seed and position.  Counters start at 1: word w of counter c is number 4 (c - 1) + w.
SUBSPEC_EXPORT void subspec_uniform(uint64_t seed, uint64_t position, int64_t V, double* out, int threads) {
    constexpr int64_t SERIAL_NUMBERS = 1 << 13;  // fewer are not worth waking threads for
    const int64_t whole = V / 4;
#pragma omp parallel for num_threads(threads) schedule(static) if (V > SERIAL_NUMBERS)
    for (int64_t i = 0; i < whole; i++) {
        uint64_t words[4];
        philox(uint64_t(i) + 1, position, seed, words);
        for (int w = 0; w < 4; w++) out[4 * i + w] = inside(words[w]);
    }
    if (V % 4) {
        uint64_t words[4];
        philox(uint64_t(whole) + 1, position, seed, words);
        for (int64_t w = 0; w < V % 4; w++) out[4 * whole + w] = inside(words[w]);
    }
}
