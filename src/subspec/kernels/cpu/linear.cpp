// y = x W^T + b, each output a function of its own row alone, for weights in their natural row-major layout or in the form
// of substitute and residual.
//
// The rows of x are prepared once; the weights are read as stored and widened in registers.  Four weight rows meet
// up to TILE_COLUMNS rows of x at a time; while they do, the next four are being fetched.  Weights that must be rebuilt
// are so a block of rows at a time, and multiplied while the block is in the second-level cache.
#include "numeric.h"
#include "residual_tile.h"

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

template <class Form, class Weights>
struct Product {
    typedef typename Form::Weight Scalar;
    typedef typename Form::Operand Operand;

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

template <class Form, class Weights, class Scalar>
int linear(const Scalar* x, const Weights& weights, const Scalar* bias, Scalar* y, int64_t T, int64_t K, int64_t N,
           int threads) {
    static thread_local Scratch scratch;
    const int64_t stride = round_up(larger_of(K, 1), STEP);
    auto* prepared = reinterpret_cast<typename Form::Operand*>(scratch.floats(smaller_of(T, CHUNK_ROWS) * stride));
    if (prepared == nullptr) return 1;
    int64_t step = larger_of(W_BLOCK_BYTES / (larger_of(K, 1) * int64_t(sizeof(Scalar))), TILE_ROWS);
    step = smaller_of(step, larger_of(N / (4 * threads), TILE_ROWS));
    step = larger_of(smaller_of(step, 64) / Weights::ROW_UNIT, 1) * Weights::ROW_UNIT;
    const int64_t blocks = (N + step - 1) / step;
    bool complete = true;
    for (int64_t start = 0; start < T; start += CHUNK_ROWS) {
        const int64_t rows = smaller_of(T - start, CHUNK_ROWS);
        const Product<Form, Weights> product{prepared, weights, bias, y + start * N, rows, stride, N, K};
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * K > SERIAL_ELEMENTS)
        for (int64_t t = 0; t < rows; t++) Form::prepare(x + (start + t) * K, K, prepared + t * stride);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (rows * K * N > SERIAL_PRODUCTS)
        for (int64_t b = 0; b < blocks; b++)
            if (!product.block(b * step, smaller_of(N, (b + 1) * step))) complete = false;
    }
    return complete ? 0 : 1;
}

}  // namespace

// Whether bf16 products can use the processor's own bf16 instruction: 0 no, 1 yes, 2 yes and it is the faster way.
// AMD's has twice the throughput of its fp32 multiply-add, Intel's half.
SUBSPEC_EXPORT int subspec_pairs() {
#if defined(__AVX512BF16__)
    return __builtin_cpu_is("amd") ? 2 : 1;
#else
    return 0;
#endif
}

// x (T, K), weight (N, K), bias (N,) or null, y (T, N), all of one dtype; `paired` asks for the bf16 instruction.
// Returns 0, or 1 for lack of memory.
SUBSPEC_EXPORT int subspec_linear(int dtype, int paired, const void* x, const void* weight, const void* bias, void* y,
                                  int64_t T, int64_t K, int64_t N, int threads) {
    const auto run = [&](auto form) {
        typedef typename decltype(form)::Weight Scalar;
        const Stored<Scalar> stored{(const Scalar*)weight, N};
        return linear<decltype(form)>((const Scalar*)x, stored, (const Scalar*)bias, (Scalar*)y, T, K, N, threads);
    };
#if defined(__AVX512BF16__)
    if (dtype == 0 && paired) return run(Paired());
#else
    (void)paired;
#endif
    return dtype == 0 ? run(Widened<Bf16>()) : dtype == 1 ? run(Widened<Fp16>()) : run(Widened<float>());
}

// The same bits for a weight in the form of substitute and residual, bf16 or fp16.
SUBSPEC_EXPORT int subspec_linear_residual(int dtype, int paired, const void* x, const void* tiles, const void* residual,
                                           int64_t residual_bytes, const void* bias, void* y, int64_t T, int64_t K,
                                           int64_t N, int threads) {
    const auto run = [&](auto form) {
        typedef typename decltype(form)::Weight Scalar;
        const Rebuilt<Scalar> rebuilt{{(const uint8_t*)tiles, (const uint8_t*)residual, residual_bytes, N, K}};
        return linear<decltype(form)>((const Scalar*)x, rebuilt, (const Scalar*)bias, (Scalar*)y, T, K, N, threads);
    };
#if defined(__AVX512BF16__)
    if (dtype == 0 && paired) return run(Paired());
#else
    (void)paired;
#endif
    return dtype == 0 ? run(Widened<Bf16>()) : run(Widened<Fp16>());
}
