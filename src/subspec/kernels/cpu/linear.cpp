// y = x W^T + b for weights in their natural row-major layout, each output a function of its own row alone.
//
// The rows of x are widened to fp32 once; the weights are read as stored and widened in registers.  Four weight
// rows meet up to TILE_COLUMNS rows of x at a time; while they do, the next four are being fetched.
#include "numeric.h"

namespace {

constexpr int64_t CHUNK_ROWS = 240;            // rows of x widened at a time
constexpr int64_t X_BLOCK_BYTES = 512 * 1024;  // widened rows that stay in the second-level cache
constexpr int64_t W_BLOCK_BYTES = 512 * 1024;  // weight rows that stay there beside them
constexpr int64_t SERIAL_PRODUCTS = 1 << 18;   // less work than this is not worth waking threads for

template <class Scalar>
void widen_in_halves(const Scalar* from, int64_t length, float* to) {
    int64_t k = 0;
    for (; k + STEP <= length; k += STEP) {
        store(to + k, load_half<0>(from + k));
        store(to + k + LANES, load_half<1>(from + k));
    }
    if (k < length) {
        Scalar tail[STEP] = {};
        memcpy(tail, from + k, (length - k) * sizeof(Scalar));
        store(to + k, load_half<0>(tail));
        store(to + k + LANES, load_half<1>(tail));
    }
}

template <class Scalar>
struct Product {
    const float* x;        // (rows, stride) widened
    const Scalar* weight;  // (N, K)
    const Scalar* bias;    // (N,) or null
    Scalar* y;             // (rows, N)
    int64_t rows, stride, N, K;

    // Outputs [first, last) of all rows.
    void block(int64_t first, int64_t last) const {
        const int64_t fit = X_BLOCK_BYTES / (stride * int64_t(sizeof(float))) / TILE_COLUMNS * TILE_COLUMNS;
        const int64_t together = larger_of(fit, TILE_COLUMNS);
        for (int64_t start = 0; start < rows; start += together) {
            const int64_t stop = smaller_of(rows, start + together);
            for (int64_t n = first; n < last; n += TILE_ROWS) strip(n, smaller_of(last, n + TILE_ROWS), start, stop);
        }
    }

    // Up to TILE_ROWS outputs of x rows [start, stop).  A missing weight row is stood in for by the last one.
    void strip(int64_t n, int64_t n_end, int64_t start, int64_t stop) const {
        const Scalar *w[TILE_ROWS], *next[TILE_ROWS];
        for (int r = 0; r < TILE_ROWS; r++) {
            w[r] = weight + smaller_of(n + r, n_end - 1) * K;
            next[r] = weight + smaller_of(n + TILE_ROWS + r, N - 1) * K;
        }
        const int64_t tiles = (stop - start + TILE_COLUMNS - 1) / TILE_COLUMNS;
        int fetched = 0;
        int64_t t = start;
        for (int64_t tile = 0; tile < tiles; tile++) {  // tiles of nearly equal size share the fetching
            const int columns = int((stop - t + tiles - tile - 1) / (tiles - tile));
            const int fetch = int((TILE_ROWS - fetched + tiles - tile - 1) / (tiles - tile));
            float out[TILE_COLUMNS][TILE_ROWS];
            dot_tile_of<Scalar>(columns, w, x + t * stride, stride, K, next + fetched, fetch, out);
            for (int c = 0; c < columns; c++, t++) {
                for (int64_t i = n; i < n_end; i++) {
                    const float sum = out[c][i - n];
                    narrow(bias ? sum + widen(bias[i]) : sum, y[t * N + i]);
                }
            }
            fetched += fetch;
        }
    }
};

template <class Scalar>
int linear(const Scalar* x, const Scalar* weight, const Scalar* bias, Scalar* y, int64_t T, int64_t K, int64_t N,
           int threads) {
    static thread_local Scratch scratch;
    const int64_t stride = round_up(larger_of(K, 1), STEP);
    float* wide = scratch.floats(smaller_of(T, CHUNK_ROWS) * stride);
    if (wide == nullptr) return 1;
    int64_t step = larger_of(W_BLOCK_BYTES / (larger_of(K, 1) * int64_t(sizeof(Scalar))), TILE_ROWS);
    step = smaller_of(step, larger_of(N / (4 * threads), TILE_ROWS));
    step = smaller_of(step, 64) / TILE_ROWS * TILE_ROWS;
    const int64_t blocks = (N + step - 1) / step;
    for (int64_t start = 0; start < T; start += CHUNK_ROWS) {
        const int64_t rows = smaller_of(T - start, CHUNK_ROWS);
        const Product<Scalar> product{wide, weight, bias, y + start * N, rows, stride, N, K};
#pragma omp parallel num_threads(threads) if (rows * K * N > SERIAL_PRODUCTS)
        {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < rows; t++) widen_in_halves(x + (start + t) * K, K, wide + t * stride);
#pragma omp for schedule(dynamic)
            for (int64_t b = 0; b < blocks; b++) product.block(b * step, smaller_of(N, (b + 1) * step));
        }
    }
    return 0;
}

}  // namespace

// x (T, K), weight (N, K), bias (N,) or null, y (T, N), all of one dtype.  Returns 0, or 1 for lack of memory.
SUBSPEC_EXPORT int subspec_linear(int dtype, const void* x, const void* weight, const void* bias, void* y, int64_t T,
                                  int64_t K, int64_t N, int threads) {
    switch (dtype) {
        case 0:
            return linear((const Bf16*)x, (const Bf16*)weight, (const Bf16*)bias, (Bf16*)y, T, K, N, threads);
        case 1:
            return linear((const Fp16*)x, (const Fp16*)weight, (const Fp16*)bias, (Fp16*)y, T, K, N, threads);
        default:
            return linear((const float*)x, (const float*)weight, (const float*)bias, (float*)y, T, K, N, threads);
    }
}
