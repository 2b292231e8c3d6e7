// y = x W^T + b, each output a function of its own row alone, for weights in their natural row-major layout or in the form
// of substitute and residual.
//
// The rows of x are prepared once; the weights are read as stored.  A few weight rows meet a few rows of x at a time, in
// vectors (the next weight rows are fetched meanwhile) or on matrix tiles.  Weights that must be rebuilt are so a block of
// rows at a time, and multiplied while the block is in the second-level cache.
#include "numeric.h"
#include "residual_tile.h"
#include "tiles_amx.h"

#include <type_traits>

namespace {

constexpr int64_t CHUNK_ROWS = 256;            // rows of x prepared at a time
constexpr int64_t X_BLOCK_BYTES = 512 * 1024;  // prepared rows that stay in the second-level cache
constexpr int64_t W_BLOCK_BYTES = 512 * 1024;  // weight rows that stay there beside them
constexpr int64_t SERIAL_PRODUCTS = 1 << 18;   // less work than this is not worth waking threads for,
constexpr int64_t SERIAL_ELEMENTS = 1 << 15;   // and less than this when preparing rows

// Some rows of a weight in memory: row n is at data + n * K, up to the last that may be fetched ahead.
template <class Scalar>
struct WeightRows {
    const Scalar* data;
    int64_t last;
};

// A weight (N, K) as it lies in a checkpoint.
template <class Scalar>
struct Stored {
    static constexpr int64_t ROW_UNIT = TILE_ROWS;
    static constexpr bool FAR = true;  // in memory: rows are worth fetching ahead
    const Scalar* weight;
    int64_t N;

    bool rows(int64_t, int64_t, int64_t, WeightRows<Scalar>& out) const {
        out = {weight, N - 1};
        return true;
    }
};

// A weight (N, K) that the thread rebuilds, blocks of rows at a time.
template <class Scalar>
struct Rebuilt {
    static constexpr int64_t ROW_UNIT = lowbit::kRows;
    static constexpr bool FAR = false;
    lowbit::ResidualMatrix matrix;

    bool rows(int64_t first, int64_t last, int64_t K, WeightRows<Scalar>& out) const {
        static thread_local Scratch scratch;
        auto* data = reinterpret_cast<Scalar*>(scratch.floats(((last - first) * K + 1) / 2));
        if (data == nullptr) return false;
        constexpr int dtype = std::is_same<Scalar, Fp16>::value ? lowbit::kFloat16 : lowbit::kBfloat16;
        matrix.template decode<dtype>(first, last, reinterpret_cast<uint16_t*>(data));
        out = {data - first * K, last - 1};
        return true;
    }
};

// Weights and rows of x in vectors: a few weight rows meet a few rows of x.
template <class Form, class Weights>
struct Product {
    typedef typename Form::Weight Scalar;
    typedef typename Form::Operand Operand;
    static constexpr int64_t GROUP = 1;  // rows of x that are prepared together, if there are so many
    static constexpr int64_t UNIT = Weights::ROW_UNIT;

    static int64_t prepared_length(int64_t K) { return round_up(larger_of(K, 1), STEP); }
    static void prepare(const Scalar* rows, int64_t, int64_t, int64_t K, Operand* to) { Form::prepare(rows, K, to); }

    const Operand* x;  // (rows, stride) prepared
    Weights weights;
    const Scalar* bias;  // (N,) or null
    Scalar* y;           // (rows, N)
    int64_t rows, stride, N, K;

    // Outputs [first, last) of all rows; false for lack of memory.
    bool block(int64_t first, int64_t last) const {
        WeightRows<Scalar> weight;
        if (!weights.rows(first, last, K, weight)) return false;
        const int64_t fit = X_BLOCK_BYTES / (stride * int64_t(sizeof(Operand))) / TILE_COLUMNS * TILE_COLUMNS;
        const int64_t together = larger_of(fit, TILE_COLUMNS);
        for (int64_t start = 0; start < rows; start += together) {
            const int64_t stop = smaller_of(rows, start + together);
            for (int64_t n = first; n < last; n += TILE_ROWS)
                strip(weight, n, smaller_of(last, n + TILE_ROWS), start, stop);
        }
        return true;
    }

    // Up to TILE_ROWS outputs of x rows [start, stop).  A missing weight row is stood in for by the last one.
    void strip(const WeightRows<Scalar>& weight, int64_t n, int64_t n_end, int64_t start, int64_t stop) const {
        const Scalar *w[TILE_ROWS], *next[TILE_ROWS];
        for (int r = 0; r < TILE_ROWS; r++) {
            w[r] = weight.data + smaller_of(n + r, n_end - 1) * K;
            next[r] = weight.data + smaller_of(n + TILE_ROWS + r, weight.last) * K;
        }
        const int64_t tiles = (stop - start + TILE_COLUMNS - 1) / TILE_COLUMNS;
        int fetched = Weights::FAR ? 0 : TILE_ROWS;
        int64_t t = start;
        for (int64_t tile = 0; tile < tiles; tile++) {  // tiles of nearly equal size share the fetching
            const int columns = int((stop - t + tiles - tile - 1) / (tiles - tile));
            const int fetch = int((TILE_ROWS - fetched + tiles - tile - 1) / (tiles - tile));
            float out[TILE_COLUMNS][TILE_ROWS];
            dot_tile_of<Form>(columns, w, x + t * stride, stride, K, next + fetched, fetch, out);
            for (int c = 0; c < columns; c++, t++) finish(out[c], n, n_end, y + t * N);
            fetched += fetch;
        }
    }

    // Outputs [n, n_end) of one row from their sums.
    SUBSPEC_INLINE void finish(const float sums[TILE_ROWS], int64_t n, int64_t n_end, Scalar* to) const {
        if (n_end - n == TILE_ROWS) {
            const Quad four = load_four(sums);
            store_four(to + n, bias ? four + load_four(bias + n) : four);
            return;
        }
        for (int64_t i = n; i < n_end; i++) narrow(bias ? sums[i - n] + widen(bias[i]) : sums[i - n], to[i]);
    }
};
static_assert(TILE_ROWS == 4, "sums are finished by four");

#if defined(SUBSPEC_TILES)
// The same on the processor's matrix tiles.
template <class Weights>
struct TiledProduct {
    typedef Bf16 Scalar;
    typedef Bf16 Operand;
    static constexpr int64_t GROUP = amx::SIDE;
    static constexpr int64_t PAIR = 2 * amx::SIDE;  // two tiles of weight rows, or of rows of x, at a time
    static constexpr int64_t UNIT = PAIR;
    static_assert(PAIR % Weights::ROW_UNIT == 0);

    static int64_t prepared_length(int64_t K) { return round_up(larger_of(K, 1), amx::DEPTH); }
    static void prepare(const Bf16* from, int64_t count, int64_t width, int64_t K, Bf16* to) {
        amx::prepare(from, count, width, K, to);
    }

    const Bf16* x;  // prepared, (rows, stride) by groups
    Weights weights;
    const Bf16* bias;  // (N,) or null
    Bf16* y;           // (rows, N)
    int64_t rows, stride, N, K;

    bool block(int64_t first, int64_t last) const {
        static thread_local Scratch scratch;
        WeightRows<Bf16> weight;
        if (!weights.rows(first, last, K, weight)) return false;
        const amx::Tiles tiles(smaller_of(GROUP, rows));
        const int64_t fit = X_BLOCK_BYTES / (stride * int64_t(sizeof(Bf16))) / PAIR * PAIR;
        const int64_t together = larger_of(fit, PAIR);
        for (int64_t start = 0; start < rows; start += together) {
            const int64_t stop = smaller_of(rows, start + together);
            for (int64_t n = first; n < last; n += PAIR) {
                const int64_t count = smaller_of(PAIR, last - n), whole = round_up(count, amx::SIDE);
                const Bf16* from = weight.data + n * K;
                if (count < whole) {  // stand in for the missing rows
                    auto* padded = reinterpret_cast<Bf16*>(scratch.floats(whole * K / 2));
                    if (padded == nullptr) return false;
                    memcpy(padded, from, count * K * sizeof(Bf16));
                    memset(padded + count * K, 0, (whole - count) * K * sizeof(Bf16));
                    from = padded;
                }
                if (whole == PAIR) strip<2>(from, n, count, start, stop);
                else strip<1>(from, n, count, start, stop);
            }
        }
        return true;
    }

    // `count` outputs of x rows [start, stop), from W tiles of weight rows.
    template <int W>
    void strip(const Bf16* from, int64_t n, int64_t count, int64_t start, int64_t stop) const {
        alignas(64) float out[2][2][amx::TILE_WORDS];
        const int64_t width = smaller_of(GROUP, rows), group = width * stride;
        for (int64_t t = start; t < stop; t += PAIR) {
            const Bf16* operand = x + t * stride;
            if (stop - t > amx::SIDE) amx::sums<W, 2>(from, K, operand, group, width, out);
            else amx::sums<W, 1>(from, K, operand, group, width, out);
            for (int w = 0; w < W; w++)
                for (int64_t c = t; c < smaller_of(stop, t + PAIR); c++)
                    finish(out[w][(c - t) / amx::SIDE] + (c - t) % amx::SIDE, n + w * amx::SIDE, n + count, c);
        }
    }

    // Outputs [n, n_end), at most SIDE of them, of row t of x from a column of sums.
    void finish(const float* sums, int64_t n, int64_t n_end, int64_t t) const {
        Bf16* to = y + t * N;
        if (n_end - n >= amx::SIDE) {
            static_assert(LANES == amx::SIDE);
            const __m512i ordinals = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            const Vec all = _mm512_i32gather_ps(_mm512_slli_epi32(ordinals, 4), sums, 4);
            store_lanes(to + n, bias ? all + load_lanes(bias + n) : all);
            return;
        }
        for (int64_t i = n; i < n_end; i++) {
            const float sum = sums[(i - n) * amx::SIDE];
            narrow(bias ? sum + widen(bias[i]) : sum, to[i]);
        }
    }
};
#endif

template <class Product, class Weights, class Scalar>
int linear(const Scalar* x, const Weights& weights, const Scalar* bias, Scalar* y, int64_t T, int64_t K, int64_t N,
           int threads) {
    static thread_local Scratch scratch;
    typedef typename Product::Operand Operand;
    constexpr int64_t GROUP = Product::GROUP;
    const int64_t stride = Product::prepared_length(K), most = T < GROUP ? T : round_up(smaller_of(T, CHUNK_ROWS), GROUP);
    auto* prepared = reinterpret_cast<Operand*>(scratch.floats(most * stride * int64_t(sizeof(Operand)) / 4));
    if (prepared == nullptr) return 1;
    int64_t step = larger_of(W_BLOCK_BYTES / (larger_of(K, 1) * int64_t(sizeof(Scalar))), TILE_ROWS);
    step = smaller_of(step, larger_of(N / (4 * threads), TILE_ROWS));
    step = larger_of(smaller_of(step, 64) / Product::UNIT, 1) * Product::UNIT;
    const int64_t blocks = (N + step - 1) / step;
    bool complete = true;
    for (int64_t start = 0; start < T; start += CHUNK_ROWS) {
        const int64_t rows = smaller_of(T - start, CHUNK_ROWS);
        const Product product{prepared, weights, bias, y + start * N, rows, stride, N, K};
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * K > SERIAL_ELEMENTS)
        for (int64_t t = 0; t < rows; t += GROUP)
            Product::prepare(x + (start + t) * K, smaller_of(GROUP, rows - t), smaller_of(GROUP, rows), K, prepared + t * stride);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (rows * K * N > SERIAL_PRODUCTS)
        for (int64_t b = 0; b < blocks; b++)
            if (!product.block(b * step, smaller_of(N, (b + 1) * step))) complete = false;
    }
    return complete ? 0 : 1;
}

// The product in a way that the caller chose: 0 widened to fp32, 1 by the processor's bf16 instruction, 2 on its matrix
// tiles.  Only bf16 has the latter two.
template <class Weights, class Scalar>
int linear_in_way(int way, const Scalar* x, const Weights& weights, const Scalar* bias, Scalar* y, int64_t T, int64_t K,
                  int64_t N, int threads) {
    if constexpr (std::is_same<Scalar, Bf16>::value) {
#if defined(SUBSPEC_TILES)
        if (way == 2) return linear<TiledProduct<Weights>>(x, weights, bias, y, T, K, N, threads);
#endif
#if defined(__AVX512BF16__)
        if (way == 1) return linear<Product<Paired, Weights>>(x, weights, bias, y, T, K, N, threads);
#endif
    }
    (void)way;
    return linear<Product<Widened<Scalar>, Weights>>(x, weights, bias, y, T, K, N, threads);
}

}  // namespace

// Whether bf16 products are faster by the processor's own bf16 instruction than in fp32.
// AMD's has twice the throughput of its fp32 multiply-add, Intel's half.
SUBSPEC_EXPORT int subspec_pairs() {
#if defined(__AVX512BF16__)
    return __builtin_cpu_is("amd") ? 1 : 0;
#else
    return 0;
#endif
}

// Whether bf16 products can use matrix tiles; asks the system for leave, which lasts for the process.
SUBSPEC_EXPORT int subspec_tiles() {
#if defined(SUBSPEC_TILES)
    return amx::allowed() ? 1 : 0;
#else
    return 0;
#endif
}

// x (T, K), weight (N, K), bias (N,) or null, y (T, N), all of one dtype.  Returns 0, or 1 for lack of memory.
SUBSPEC_EXPORT int subspec_linear(int dtype, int way, const void* x, const void* weight, const void* bias, void* y,
                                  int64_t T, int64_t K, int64_t N, int threads) {
    const auto run = [&](auto scalar) {
        typedef decltype(scalar) Scalar;
        const Stored<Scalar> stored{(const Scalar*)weight, N};
        return linear_in_way(way, (const Scalar*)x, stored, (const Scalar*)bias, (Scalar*)y, T, K, N, threads);
    };
    return dtype == 0 ? run(Bf16()) : dtype == 1 ? run(Fp16()) : run(0.0f);
}

// The same bits for a weight in the form of substitute and residual, bf16 or fp16.
SUBSPEC_EXPORT int subspec_linear_residual(int dtype, int way, const void* x, const void* tiles, const void* residual,
                                           int64_t residual_bytes, const void* bias, void* y, int64_t T, int64_t K,
                                           int64_t N, int threads) {
    const auto run = [&](auto scalar) {
        typedef decltype(scalar) Scalar;
        const Rebuilt<Scalar> rebuilt{{(const uint8_t*)tiles, (const uint8_t*)residual, residual_bytes, N, K}};
        return linear_in_way(way, (const Scalar*)x, rebuilt, (const Scalar*)bias, (Scalar*)y, T, K, N, threads);
    };
    return dtype == 0 ? run(Bf16()) : run(Fp16());
}
