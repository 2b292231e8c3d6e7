// Attention in position order: each query reduces over its keys in the order of their positions, wherever the
// cache keeps them.
//
// The keys of a query are cut into blocks of KEYS counted from position 0; softmax runs online, block by block.
// So a result depends on the sequence of keys and values alone: not on their slots, on how the query's row is
// batched, or on whether a key was reached through the prefix or through a path.
#include "numeric.h"
#include "operations.h"

namespace {

constexpr int KEYS = 64;                   // keys of a block
constexpr int OUT_VECS = 4;                // vectors of one output tile
constexpr int OUT_HEADS = LANES == 8 ? 2 : TILE_COLUMNS;  // heads of one output tile
constexpr int64_t STATE_FLOATS = 1 << 15;  // bound on the queries held by one task
constexpr int64_t MAX_TASK_ROWS = 32;
constexpr int64_t SERIAL_PRODUCTS = 1 << 17;  // less work than this is not worth waking threads for

struct Shape {
    int64_t T, H, Hkv, D;
    int64_t k_stride, v_stride;  // elements from one KV head to the next
    int64_t P;                   // row length of paths
    float scale;

    int64_t group() const { return H / Hkv; }
    int64_t padded() const { return round_up(D, OUT_VECS * LANES); }
};

// out[h] += sum over keys, in order, of p[h][key] * v[key][at ...], for OUT_VECS vectors of `heads` heads.
template <class Element, int HEADS>
inline __attribute__((noinline)) void weigh_values(const float* p, const Element* const* v, int64_t at, int64_t keys,
                                                   float* out, int64_t stride) {
    Vec acc[HEADS][OUT_VECS];
#pragma GCC unroll 8
    for (int h = 0; h < HEADS; h++) {
#pragma GCC unroll 4
        for (int i = 0; i < OUT_VECS; i++) acc[h][i] = load(out + h * stride + i * LANES);
    }
    for (int64_t key = 0; key < keys; key++) {
        Vec value[OUT_VECS];
#pragma GCC unroll 4
        for (int i = 0; i < OUT_VECS; i++) value[i] = load_lanes(v[key] + at + i * LANES);
#pragma GCC unroll 8
        for (int h = 0; h < HEADS; h++) {
            const Vec weight = splat(p[h * KEYS + key]);
#pragma GCC unroll 4
            for (int i = 0; i < OUT_VECS; i++) acc[h][i] = fma(weight, value[i], acc[h][i]);
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < HEADS; h++) {
#pragma GCC unroll 4
        for (int i = 0; i < OUT_VECS; i++) store(out + h * stride + i * LANES, acc[h][i]);
    }
}

template <class Element, int HEADS = OUT_HEADS>
inline void weigh_values_of(int heads, const float* p, const Element* const* v, int64_t at, int64_t keys, float* out,
                            int64_t stride) {
    if constexpr (HEADS > 1) {
        if (heads < HEADS) {
            weigh_values_of<Element, HEADS - 1>(heads, p, v, at, keys, out, stride);
            return;
        }
    }
    weigh_values<Element, HEADS>(p, v, at, keys, out, stride);
}

// The queries of a few rows that share one KV head.  Several rows share the widened copy of a block's keys and
// values; a single row reads them from the cache, where its whole vectors allow that.  Both ways do the same
// arithmetic in the same order.
template <class Scalar>
class Task {
  public:
    Task(const Shape& shape, const Scalar* q, const Scalar* k, const Scalar* v, const int32_t* prefix,
         const int32_t* paths, const int32_t* path_lens, Scalar* out)
        : s_(shape), q_(q), k_(k), v_(v), prefix_(prefix), paths_(paths), path_lens_(path_lens), out_(out) {}

    // Scratch of one task, in floats.
    static int64_t scratch_floats(const Shape& s, int64_t rows) {
        return 2 * KEYS * s.padded() + rows * s.group() * (2 * s.padded() + 2) + s.group() * KEYS;
    }

    // Rows [first, last) with the query heads of `kv_head`.
    void run(int64_t kv_head, int64_t first, int64_t last, float* scratch) {
        const int64_t stride = s_.padded(), group = s_.group(), queries = (last - first) * group;
        keys_ = scratch;
        values_ = keys_ + KEYS * stride;
        query_ = values_ + KEYS * stride;
        sum_ = query_ + queries * stride;
        score_ = sum_ + queries * stride;
        best_ = score_ + group * KEYS;
        total_ = best_ + queries;
        int64_t longest = 0;
        for (int64_t t = first; t < last; t++) {
            longest = larger_of(longest, keys_of(t));
            for (int64_t g = 0; g < group; g++) {
                const int64_t at = (t - first) * group + g;
                spread(q_ + (t * s_.H + kv_head * group + g) * s_.D, query_ + at * stride);
                memset(sum_ + at * stride, 0, stride * sizeof(float));
                best_[at] = -std::numeric_limits<float>::infinity();
                total_[at] = 0.0f;
            }
        }
        const bool direct = last - first == 1 && s_.D == stride;
        for (int64_t start = 0; start < longest; start += KEYS) {
            for (int i = 0; i < KEYS; i++) held_[i] = -1;
            for (int64_t t = first; t < last; t++) {
                const int64_t count = smaller_of(keys_of(t) - start, KEYS);
                if (count <= 0) continue;
                if (direct) {
                    find(kv_head, t, start, count);
                } else {
                    gather(kv_head, t, start, count, first);
                }
            }
        }
        finish(kv_head, first, last);
    }

  private:
    int64_t keys_of(int64_t t) const { return int64_t(prefix_[t]) + path_lens_[t]; }

    int64_t slot_of(int64_t t, int64_t position) const {
        return position < prefix_[t] ? position : paths_[t * s_.P + position - prefix_[t]];
    }

    // A row of D values as an operand of score products, zero-padded.
    void spread(const Scalar* from, float* to) const {
        const int64_t used = round_up(s_.D, STEP), stride = s_.padded();
        Widened<Scalar>::prepare(from, s_.D, to);
        memset(to + used, 0, (stride - used) * sizeof(float));
    }

    // Add the keys at positions [start, start + count) of row t, the task's only row, from where they lie.
    void find(int64_t kv_head, int64_t t, int64_t start, int64_t count) {
        const Scalar *k[KEYS], *v[KEYS];
        for (int64_t i = 0; i < count; i++) {
            const int64_t offset = slot_of(t, start + i) * s_.D;
            k[i] = k_ + kv_head * s_.k_stride + offset;
            v[i] = v_ + kv_head * s_.v_stride + offset;
        }
        add_block(0, k, v, count);
    }

    // The same through the task's copy of the block; most of it is there from the row before.
    void gather(int64_t kv_head, int64_t t, int64_t start, int64_t count, int64_t first) {
        const int64_t stride = s_.padded();
        const float *k[KEYS], *v[KEYS];
        for (int64_t i = 0; i < count; i++) {
            const int64_t slot = slot_of(t, start + i);
            k[i] = keys_ + i * stride;
            v[i] = values_ + i * stride;
            if (held_[i] == slot) continue;
            spread(k_ + kv_head * s_.k_stride + slot * s_.D, keys_ + i * stride);
            widen_row(v_ + kv_head * s_.v_stride + slot * s_.D, s_.D, values_ + i * stride, stride);
            held_[i] = slot;
        }
        add_block((t - first) * s_.group(), k, v, count);
    }

    // One block of `count` keys for the heads of one row, whose first query is `at`.
    template <class Element>
    void add_block(int64_t at, const Element* const* k, const Element* const* v, int64_t count) {
        const int64_t stride = s_.padded(), group = s_.group();
        score(query_ + at * stride, k, count);
        for (int64_t g = 0; g < group; g++) {
            const float shrink = soften(score_ + g * KEYS, count, best_[at + g], total_[at + g]);
            if (shrink == 1.0f) continue;
            float* sum = sum_ + (at + g) * stride;
            for (int64_t i = 0; i < stride; i += LANES) store(sum + i, load(sum + i) * shrink);
        }
        for (int64_t i = 0; i < stride; i += OUT_VECS * LANES) {
            for (int64_t g = 0; g < group; g += OUT_HEADS) {
                const int heads = int(smaller_of(group - g, OUT_HEADS));
                float* sum = sum_ + (at + g) * stride + i;
                weigh_values_of(heads, score_ + g * KEYS, v, i, count, sum, stride);
            }
        }
    }

    // Dot products of a row's queries with `count` keys.
    template <class Element>
    void score(const float* query, const Element* const* k, int64_t count) {
        const int64_t stride = s_.padded(), group = s_.group();
        for (int64_t key = 0; key < count; key += TILE_ROWS) {
            const Element* rows[TILE_ROWS];
            for (int r = 0; r < TILE_ROWS; r++) rows[r] = k[smaller_of(key + r, count - 1)];
            for (int64_t g = 0; g < group; g += TILE_COLUMNS) {
                const int columns = int(smaller_of(group - g, TILE_COLUMNS));
                float out[TILE_COLUMNS][TILE_ROWS];
                dot_tile_of<Widened<Element>>(columns, rows, query + g * stride, stride, stride, nullptr, 0, out);
                for (int c = 0; c < columns; c++) memcpy(score_ + (g + c) * KEYS + key, out[c], sizeof out[c]);
            }
        }
    }

    // Turn scores into unnormalised probabilities; returns the factor for what was summed before.
    float soften(float* score, int64_t count, float& best, float& total) const {
        for (int64_t i = 0; i < KEYS; i += LANES) store(score + i, load(score + i) * s_.scale);
        for (int64_t i = count; i < KEYS; i++) score[i] = -std::numeric_limits<float>::infinity();
        Vec highest = load(score);
        for (int64_t i = LANES; i < KEYS; i += LANES) highest = larger(load(score + i), highest);
        const float before = best;
        best = max_lanes(highest);
        best = before > best ? before : best;
        Vec sum = {};
        for (int64_t i = 0; i < KEYS; i += LANES) {
            const Vec p = exponential(load(score + i) - best);
            store(score + i, p);
            sum = sum + p;
        }
        const float shrink = exponential(splat(before - best))[0];
        total = total * shrink + sum_lanes(sum);
        return shrink;
    }

    void finish(int64_t kv_head, int64_t first, int64_t last) {
        const int64_t stride = s_.padded(), group = s_.group();
        for (int64_t t = first; t < last; t++) {
            for (int64_t g = 0; g < group; g++) {
                const int64_t at = (t - first) * group + g;
                const float total = keys_of(t) > 0 ? total_[at] : 1.0f;  // no key at all: zeros
                float* sum = sum_ + at * stride;
                for (int64_t i = 0; i < stride; i += LANES) store(sum + i, load(sum + i) / total);
                narrow_row(sum, s_.D, out_ + (t * s_.H + kv_head * group + g) * s_.D);
            }
        }
    }

    const Shape& s_;
    const Scalar *q_, *k_, *v_;
    const int32_t *prefix_, *paths_, *path_lens_;
    Scalar* out_;
    float *keys_, *values_;    // (KEYS, padded) fp32 of the block
    float *query_, *sum_;      // (rows * group, padded)
    float* score_;             // (group, KEYS)
    float *best_, *total_;     // (rows * group,)
    int64_t held_[KEYS];       // slot of each key in the block
};

template <class Scalar>
int attend(const Shape& shape, const Scalar* q, const Scalar* k, const Scalar* v, const int32_t* prefix,
           const int32_t* paths, const int32_t* path_lens, Scalar* out, int threads) {
    int64_t rows = smaller_of(MAX_TASK_ROWS, STATE_FLOATS / (shape.group() * shape.padded()));
    rows = larger_of(1, smaller_of(rows, shape.T * shape.Hkv / (2 * threads)));
    const int64_t blocks = (shape.T + rows - 1) / rows, tasks = blocks * shape.Hkv;
    int64_t keys = 0;
    for (int64_t t = 0; t < shape.T; t++) keys += int64_t(prefix[t]) + path_lens[t];
    const bool small = keys * shape.H * shape.D <= SERIAL_PRODUCTS;
    [[maybe_unused]] const int workers = small || tasks == 1 ? 1 : threads;
    int failed = 0;
#pragma omp parallel for num_threads(workers) schedule(dynamic, 1) if (workers > 1) reduction(| : failed)
    for (int64_t task = 0; task < tasks; task++) {
        static thread_local Scratch scratch;
        float* room = scratch.floats(Task<Scalar>::scratch_floats(shape, rows));
        if (room == nullptr) {
            failed |= 1;
            continue;
        }
        const int64_t first = (blocks - 1 - task / shape.Hkv) * rows;  // later rows have more keys: first
        Task<Scalar>(shape, q, k, v, prefix, paths, path_lens, out)
            .run(task % shape.Hkv, first, smaller_of(shape.T, first + rows), room);
    }
    return failed;
}

}  // namespace

// q, out (T, H, D); k, v (Hkv, S, D) with the given strides between heads; prefix, path_lens (T,); paths (T, P).
// Returns 0, or 1 for lack of memory.
SUBSPEC_EXPORT int subspec_attend(int dtype, const void* q, const void* k, const void* v, const int32_t* prefix,
                                  const int32_t* paths, const int32_t* path_lens, void* out, int64_t T, int64_t H,
                                  int64_t Hkv, int64_t D, int64_t k_stride, int64_t v_stride, int64_t P, float scale,
                                  int threads) {
    const Shape shape{T, H, Hkv, D, k_stride, v_stride, P, scale};
    switch (dtype) {
        case 0:
            return attend(shape, (const Bf16*)q, (const Bf16*)k, (const Bf16*)v, prefix, paths, path_lens,
                          (Bf16*)out, threads);
        case 1:
            return attend(shape, (const Fp16*)q, (const Fp16*)k, (const Fp16*)v, prefix, paths, path_lens,
                          (Fp16*)out, threads);
        default:
            return attend(shape, (const float*)q, (const float*)k, (const float*)v, prefix, paths, path_lens,
                          (float*)out, threads);
    }
}
