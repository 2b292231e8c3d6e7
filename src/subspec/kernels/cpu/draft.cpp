// A whole layer of the draft over a few rows: the decoder's operations and the low-bit products, one after another, with
// one call from Python.  Every step is the function that the decoder would call, and rounds as it does.
#include "numeric.h"
#include "operations.h"

// What stays the same from pass to pass.  As in kernels/draft.py.
struct DraftMatrix {
    const void* tiles;
    const float* bias;  // may be null
};
struct DraftLayer {
    const void *attention_norm, *mlp_norm;
    const void *q_norm, *k_norm;  // may be null
    DraftMatrix qkv, o, gate_up, down;
    const float *cosine, *sine;
    void *keys, *values;
    int64_t k_stride, v_stride;  // elements from one KV head to the next
    int64_t C, F, H, Hkv, D;
    float eps, scale;
    int32_t dtype;
};

// The rows of a pass.
struct DraftRows {
    const int32_t *positions, *slots, *prefix, *paths, *path_lens;
    int64_t T, P;
};

namespace {

// The layer's intermediate results in the caller's scratch, each at a multiple of 64 bytes.
class Room {
  public:
    Room(const DraftLayer& s, int64_t T, char* memory) : at_(memory) {
        const int64_t size = s.dtype == 2 ? 4 : 2, heads = s.H * s.D;
        normed = take(T * s.C * size);
        qkv = take(T * (heads + 2 * s.Hkv * s.D) * size);
        q = take(T * heads * size);
        mixed = take(T * heads * size);
        gate_up = take(T * 2 * s.F * size);
        gated = take(T * s.F * size);
        added = take(T * s.C * size);
        product = take(subspec_substitute_scratch_bytes(T, larger_of(larger_of(s.C, s.F), heads)));
    }
    void *normed, *qkv, *q, *mixed, *gate_up, *gated, *added, *product;
    char* end() const { return at_; }

  private:
    void* take(int64_t bytes) {
        char* from = at_;
        at_ += round_up(bytes, 64);
        return from;
    }
    char* at_;
};

template <class Scalar>
void add(const Scalar* y, int64_t n, Scalar* x) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store_lanes(x + i, load_lanes(x + i) + load_lanes(y + i));
    for (; i < n; i++) narrow(widen(x[i]) + widen(y[i]), x[i]);
}

void add_to(int dtype, const void* y, int64_t n, void* x) {
    if (dtype == 0) add((const Bf16*)y, n, (Bf16*)x);
    if (dtype == 1) add((const Fp16*)y, n, (Fp16*)x);
    if (dtype == 2) add((const float*)y, n, (float*)x);
}

}  // namespace

// Bytes of scratch for a layer of these sizes over T rows.
SUBSPEC_EXPORT int64_t subspec_draft_scratch_bytes(const DraftLayer* layer, int64_t T) {
    static char none;
    return Room(*layer, T, &none).end() - &none;
}

// Add a layer's attention and feed-forward to x (T, C).  Returns 0, or 1 for lack of memory.
SUBSPEC_EXPORT int subspec_draft_layer(const DraftLayer* layer, const DraftRows* rows, void* x, void* scratch, int threads) {
    const DraftLayer& s = *layer;
    const DraftRows& r = *rows;
    const Room room(s, r.T, (char*)scratch);
    const int64_t heads = s.H * s.D;
    auto multiply = [&](const DraftMatrix& m, const void* from, int64_t k, int64_t n, void* to) {
        subspec_substitute_product(from, k, r.T, k, m.tiles, n, m.bias, to, s.dtype, room.product, threads);
    };
    subspec_rms_norm(s.dtype, x, s.attention_norm, room.normed, r.T, s.C, s.eps, threads);
    multiply(s.qkv, room.normed, s.C, heads + 2 * s.Hkv * s.D, room.qkv);
    subspec_rotate_and_store(s.dtype, room.qkv, s.cosine, s.sine, r.positions, r.slots, s.keys, s.values, s.q_norm,
                             s.k_norm, room.q, r.T, s.H, s.Hkv, s.D, s.k_stride, s.v_stride, s.eps, threads);
    if (subspec_attend(s.dtype, room.q, s.keys, s.values, r.prefix, r.paths, r.path_lens, room.mixed, r.T, s.H, s.Hkv,
                       s.D, s.k_stride, s.v_stride, r.P, s.scale, threads)) {
        return 1;
    }
    multiply(s.o, room.mixed, heads, s.C, room.added);
    add_to(s.dtype, room.added, r.T * s.C, x);
    subspec_rms_norm(s.dtype, x, s.mlp_norm, room.normed, r.T, s.C, s.eps, threads);
    multiply(s.gate_up, room.normed, s.C, 2 * s.F, room.gate_up);
    subspec_silu_mul(s.dtype, room.gate_up, room.gated, r.T, s.F, threads);
    multiply(s.down, room.gated, s.F, s.C, room.added);
    add_to(s.dtype, room.added, r.T * s.C, x);
    return 0;
}
