// The small operations between the products: RMS norm, gated SiLU, rotary embedding with the cache write.
// Each row, and in the gate each element, is a function of its own inputs alone.
#include "numeric.h"
#include "operations.h"

namespace {

constexpr int64_t MAX_HEAD_DIM = 512;
constexpr int64_t SERIAL_ELEMENTS = 1 << 15;  // less work than this is not worth waking threads for

// 1 / sqrt(mean(x^2) + eps) of n values; lanes are summed in a fixed order.
template <class Scalar>
float inverse_rms(const Scalar* x, int64_t n, float eps) {
    Vec sum = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Vec v = load_lanes(x + i);
        sum = fma(v, v, sum);
    }
    if (i < n) {
        Scalar tail[LANES] = {};
        memcpy(tail, x + i, (n - i) * sizeof(Scalar));
        const Vec v = load_lanes(tail);
        sum = fma(v, v, sum);
    }
    return 1.0f / std::sqrt(sum_lanes(sum) / float(n) + eps);
}

template <class Scalar>
SUBSPEC_INLINE void normalise(const Scalar* x, const Scalar* weight, float factor, Scalar* y) {
    store_lanes(y, load_lanes(x) * factor * load_lanes(weight));
}

template <class Scalar>
void rms_norm_row(const Scalar* x, const Scalar* weight, int64_t n, float eps, Scalar* y) {
    const float factor = inverse_rms(x, n, eps);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) normalise(x + i, weight + i, factor, y + i);
    if (i < n) {
        Scalar x_tail[LANES] = {}, w_tail[LANES] = {}, y_tail[LANES];
        memcpy(x_tail, x + i, (n - i) * sizeof(Scalar));
        memcpy(w_tail, weight + i, (n - i) * sizeof(Scalar));
        normalise(x_tail, w_tail, factor, y_tail);
        memcpy(y + i, y_tail, (n - i) * sizeof(Scalar));
    }
}

template <class Scalar>
void rms_norm(const Scalar* x, const Scalar* weight, Scalar* y, int64_t T, int64_t C, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (T * C > SERIAL_ELEMENTS)
    for (int64_t t = 0; t < T; t++) rms_norm_row(x + t * C, weight, C, eps, y + t * C);
}

template <class Scalar>
SUBSPEC_INLINE void gate_lanes(const Scalar* gate, const Scalar* up, Scalar* y) {
    const Vec g = load_lanes(gate);
    store_lanes(y, g / (exponential(-g) + 1.0f) * load_lanes(up));
}

template <class Scalar>
void silu_mul_span(const Scalar* gate, const Scalar* up, int64_t n, Scalar* y) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) gate_lanes(gate + i, up + i, y + i);
    if (i < n) {
        Scalar g_tail[LANES] = {}, u_tail[LANES] = {}, y_tail[LANES];
        memcpy(g_tail, gate + i, (n - i) * sizeof(Scalar));
        memcpy(u_tail, up + i, (n - i) * sizeof(Scalar));
        gate_lanes(g_tail, u_tail, y_tail);
        memcpy(y + i, y_tail, (n - i) * sizeof(Scalar));
    }
}

template <class Scalar>
void silu_mul(const Scalar* gate_up, Scalar* y, int64_t T, int64_t F, int threads) {
    constexpr int64_t SPAN = 1024;
    const int64_t spans = (F + SPAN - 1) / SPAN;
#pragma omp parallel for num_threads(threads) schedule(static) if (T * F > SERIAL_ELEMENTS)
    for (int64_t piece = 0; piece < T * spans; piece++) {
        const int64_t t = piece / spans, start = piece % spans * SPAN;
        const Scalar* gate = gate_up + t * 2 * F + start;
        silu_mul_span(gate, gate + F, smaller_of(SPAN, F - start), y + t * F + start);
    }
}

// One head: optional norm (rounded to the storage type), then rotation of its halves (rounded once).
template <class Scalar>
void rotate_head(const Scalar* from, const Scalar* norm, float eps, const float* cosine, const float* sine, int64_t D,
                 Scalar* to) {
    Scalar normed[MAX_HEAD_DIM];
    float wide[MAX_HEAD_DIM + LANES], turned[MAX_HEAD_DIM + LANES];
    if (norm != nullptr) {
        rms_norm_row(from, norm, D, eps, normed);
        from = normed;
    }
    const int64_t half = D / 2;
    widen_row(from, D, wide, 0);
    for (int64_t i = 0; i < half; i++) {
        turned[i] = wide[i] * cosine[i] - wide[half + i] * sine[i];
        turned[half + i] = wide[half + i] * cosine[i] + wide[i] * sine[i];
    }
    for (int64_t i = D; i < round_up(D, LANES); i++) turned[i] = 0.0f;
    narrow_row(turned, D, to);
}

struct RotateShape {
    int64_t T, H, Hkv, D;
    int64_t k_stride, v_stride;  // elements from one KV head to the next
    float eps;
};

template <class Scalar>
void rotate_and_store(const RotateShape& s, const Scalar* qkv, const float* cosine, const float* sine,
                      const int32_t* positions, const int32_t* slots, Scalar* k_cache, Scalar* v_cache,
                      const Scalar* q_norm, const Scalar* k_norm, Scalar* q_out, int threads) {
    const int64_t width = (s.H + 2 * s.Hkv) * s.D;
#pragma omp parallel for num_threads(threads) schedule(static) if (s.T * width > SERIAL_ELEMENTS)
    for (int64_t t = 0; t < s.T; t++) {
        const Scalar *q = qkv + t * width, *k = q + s.H * s.D, *v = k + s.Hkv * s.D;
        const float* c = cosine + positions[t] * (s.D / 2);
        const float* n = sine + positions[t] * (s.D / 2);
        for (int64_t h = 0; h < s.H; h++) {
            rotate_head(q + h * s.D, q_norm, s.eps, c, n, s.D, q_out + (t * s.H + h) * s.D);
        }
        for (int64_t h = 0; h < s.Hkv; h++) {
            const int64_t at = slots[t] * s.D;
            rotate_head(k + h * s.D, k_norm, s.eps, c, n, s.D, k_cache + h * s.k_stride + at);
            memcpy(v_cache + h * s.v_stride + at, v + h * s.D, s.D * sizeof(Scalar));
        }
    }
}

}  // namespace

// x, y (T, C), weight (C,).
SUBSPEC_EXPORT void subspec_rms_norm(int dtype, const void* x, const void* weight, void* y, int64_t T, int64_t C,
                                     float eps, int threads) {
    if (dtype == 0) rms_norm((const Bf16*)x, (const Bf16*)weight, (Bf16*)y, T, C, eps, threads);
    if (dtype == 1) rms_norm((const Fp16*)x, (const Fp16*)weight, (Fp16*)y, T, C, eps, threads);
    if (dtype == 2) rms_norm((const float*)x, (const float*)weight, (float*)y, T, C, eps, threads);
}

// gate_up (T, 2F), y (T, F).
SUBSPEC_EXPORT void subspec_silu_mul(int dtype, const void* gate_up, void* y, int64_t T, int64_t F, int threads) {
    if (dtype == 0) silu_mul((const Bf16*)gate_up, (Bf16*)y, T, F, threads);
    if (dtype == 1) silu_mul((const Fp16*)gate_up, (Fp16*)y, T, F, threads);
    if (dtype == 2) silu_mul((const float*)gate_up, (float*)y, T, F, threads);
}

// qkv (T, (H + 2 Hkv) D), cosine and sine (M, D/2), caches (Hkv, S, D), norms (D,) or null, q_out (T, H, D).
SUBSPEC_EXPORT void subspec_rotate_and_store(int dtype, const void* qkv, const float* cosine, const float* sine,
                                             const int32_t* positions, const int32_t* slots, void* k_cache,
                                             void* v_cache, const void* q_norm, const void* k_norm, void* q_out,
                                             int64_t T, int64_t H, int64_t Hkv, int64_t D, int64_t k_stride,
                                             int64_t v_stride, float eps, int threads) {
    const RotateShape shape{T, H, Hkv, D, k_stride, v_stride, eps};
    if (dtype == 0) {
        rotate_and_store(shape, (const Bf16*)qkv, cosine, sine, positions, slots, (Bf16*)k_cache, (Bf16*)v_cache,
                         (const Bf16*)q_norm, (const Bf16*)k_norm, (Bf16*)q_out, threads);
    } else if (dtype == 1) {
        rotate_and_store(shape, (const Fp16*)qkv, cosine, sine, positions, slots, (Fp16*)k_cache, (Fp16*)v_cache,
                         (const Fp16*)q_norm, (const Fp16*)k_norm, (Fp16*)q_out, threads);
    } else {
        rotate_and_store(shape, (const float*)qkv, cosine, sine, positions, slots, (float*)k_cache, (float*)v_cache,
                         (const float*)q_norm, (const float*)k_norm, (float*)q_out, threads);
    }
}
