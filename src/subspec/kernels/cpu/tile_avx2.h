// The loop of the largest dot-product tile on AVX2, written out: 4 weight rows by 3 rows of x.
//
// It takes all sixteen registers: 12 accumulators (with 8, any hiccup shows, as two fmas a cycle and their latency need
// that many in flight), three values of x and one of a weight.  Compilers left to themselves spill accumulators, or
// read x from memory again for each use.  The arithmetic and its order are those of Widened::step.
#pragma once
#include <cstdint>

namespace {

// One weight row, in ymm15 after LOAD, meets three values of x.
#define TILE_ROW(LOAD, W, A, B, C)           \
    LOAD(W)                                  \
    "vfmadd231ps %%ymm12, %%ymm15, " A "\n"  \
    "vfmadd231ps %%ymm13, %%ymm15, " B "\n"  \
    "vfmadd231ps %%ymm14, %%ymm15, " C "\n"
#define TILE_HALF(LOAD, AT)                              \
    "vmovups " AT "(%[x]), %%ymm12\n"                    \
    "vmovups " AT "(%[x], %[stride]), %%ymm13\n"         \
    "vmovups " AT "(%[x], %[stride], 2), %%ymm14\n"      \
    TILE_ROW(LOAD, "%[w0]", "%%ymm0", "%%ymm4", "%%ymm8")   \
    TILE_ROW(LOAD, "%[w1]", "%%ymm1", "%%ymm5", "%%ymm9")   \
    TILE_ROW(LOAD, "%[w2]", "%%ymm2", "%%ymm6", "%%ymm10")  \
    TILE_ROW(LOAD, "%[w3]", "%%ymm3", "%%ymm7", "%%ymm11")
#define TILE_ZERO(A) "vxorps " A ", " A ", " A "\n"
#define TILE_STORE(A, AT) "vmovaps " A ", " AT "(%[out])\n"

// The halves of a step as in load_half; %[k] counts bytes of a weight row up to its end.
#define BF16_EVEN(W) "vmovdqu (" W ", %[k]), %%ymm15\n vpslld $16, %%ymm15, %%ymm15\n"
#define BF16_ODD(W) "vmovdqa (%[upper]), %%ymm15\n vpand (" W ", %[k]), %%ymm15, %%ymm15\n"
#define FP16_FIRST(W) "vcvtph2ps (" W ", %[k]), %%ymm15\n"
#define FP16_SECOND(W) "vcvtph2ps 16(" W ", %[k]), %%ymm15\n"
#define FP32_FIRST(W) "vmovups (" W ", %[k]), %%ymm15\n"
#define FP32_SECOND(W) "vmovups 32(" W ", %[k]), %%ymm15\n"

// `w`: ends of four weight rows of `bytes` bytes, a positive multiple of a step; `x`, `stride`: in bytes.  `ahead`: ends of
// two rows that will be wanted next.  `out`: the accumulators, by column.
#define TILE_LOOP(NAME, STEP_BYTES, FIRST, SECOND)                                                                   \
    SUBSPEC_INLINE void NAME(const char* const w[4], int64_t bytes, const char* x, int64_t stride,                   \
                             const char* const ahead[2], float* out) {                                               \
        alignas(32) static const uint32_t upper[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,            \
                                                      0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};           \
        int64_t k = -bytes;                                                                                          \
        __asm__ volatile(                                                                                            \
            TILE_ZERO("%%ymm0") TILE_ZERO("%%ymm1") TILE_ZERO("%%ymm2") TILE_ZERO("%%ymm3")                          \
            TILE_ZERO("%%ymm4") TILE_ZERO("%%ymm5") TILE_ZERO("%%ymm6") TILE_ZERO("%%ymm7")                          \
            TILE_ZERO("%%ymm8") TILE_ZERO("%%ymm9") TILE_ZERO("%%ymm10") TILE_ZERO("%%ymm11")                        \
            ".p2align 5\n"                                                                                           \
            "1:\n"                                                                                                   \
            "prefetcht0 (%[ahead0], %[k])\n"                                                                         \
            "prefetcht0 (%[ahead1], %[k])\n"                                                                         \
            TILE_HALF(FIRST, "") TILE_HALF(SECOND, "32")                                                             \
            "add $64, %[x]\n"                                                                                        \
            "add $" STEP_BYTES ", %[k]\n"                                                                            \
            "jl 1b\n"                                                                                                \
            TILE_STORE("%%ymm0", "0") TILE_STORE("%%ymm1", "32") TILE_STORE("%%ymm2", "64")                          \
            TILE_STORE("%%ymm3", "96") TILE_STORE("%%ymm4", "128") TILE_STORE("%%ymm5", "160")                       \
            TILE_STORE("%%ymm6", "192") TILE_STORE("%%ymm7", "224") TILE_STORE("%%ymm8", "256")                      \
            TILE_STORE("%%ymm9", "288") TILE_STORE("%%ymm10", "320") TILE_STORE("%%ymm11", "352")                    \
            : [x] "+r"(x), [k] "+r"(k)                                                                               \
            : [w0] "r"(w[0]), [w1] "r"(w[1]), [w2] "r"(w[2]), [w3] "r"(w[3]), [stride] "r"(stride),                  \
              [upper] "r"(upper), [ahead0] "r"(ahead[0]), [ahead1] "r"(ahead[1]), [out] "r"(out)                     \
            : "memory", "cc", "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9",        \
              "ymm10", "ymm11", "ymm12", "ymm13", "ymm14", "ymm15");                                                 \
    }
TILE_LOOP(tile_loop_bf16, "32", BF16_EVEN, BF16_ODD)
TILE_LOOP(tile_loop_fp16, "32", FP16_FIRST, FP16_SECOND)
TILE_LOOP(tile_loop_fp32, "64", FP32_FIRST, FP32_SECOND)

// The same for any type of weights: elements [0, whole) of the rows, whole a positive multiple of STEP.
template <class Weight>
SUBSPEC_INLINE void largest_tile(const Weight* const rows[4], const float* x, int64_t stride, int64_t whole,
                                 const Weight* const* ahead, int ahead_count, float* out) {
    const char *w[4], *next[2];
    for (int r = 0; r < 4; r++) w[r] = reinterpret_cast<const char*>(rows[r] + whole);
    for (int i = 0; i < 2; i++) next[i] = i < ahead_count ? reinterpret_cast<const char*>(ahead[i] + whole) : w[i];
    const int64_t bytes = whole * int64_t(sizeof(Weight)), x_bytes = stride * int64_t(sizeof(float));
    const char* values = reinterpret_cast<const char*>(x);
    if constexpr (std::is_same<Weight, Bf16>::value) tile_loop_bf16(w, bytes, values, x_bytes, next, out);
    else if constexpr (std::is_same<Weight, Fp16>::value) tile_loop_fp16(w, bytes, values, x_bytes, next, out);
    else tile_loop_fp32(w, bytes, values, x_bytes, next, out);
}

#undef TILE_ROW
#undef TILE_HALF
#undef TILE_ZERO
#undef TILE_STORE
#undef TILE_LOOP
#undef BF16_EVEN
#undef BF16_ODD
#undef FP16_FIRST
#undef FP16_SECOND
#undef FP32_FIRST
#undef FP32_SECOND

}  // namespace
