// The loop of the largest dot-product tile on AVX2, written out: 4 weight rows by 3 rows of x.
//
// It takes all sixteen registers: 12 accumulators (with 8, any hiccup shows, as two fmas a cycle and their latency need
// that many in flight), three values of x and one of a weight.  Compilers left to themselves spill accumulators, or
// read x from memory again for each use.  The arithmetic and its order are those of Widened::step.
#pragma once
#include <cstdint>

namespace {

// One weight row, in ymm15 after LOAD, meets three values of x.
#define TILE_ROW(LOAD, W, A, B, C)            \
    LOAD(W)                                   \
    "vfmadd231ps %%ymm12, %%ymm15, %[" A "]\n" \
    "vfmadd231ps %%ymm13, %%ymm15, %[" B "]\n" \
    "vfmadd231ps %%ymm14, %%ymm15, %[" C "]\n"
#define TILE_HALF(LOAD, AT)                      \
    "vmovups " AT "(%[x]), %%ymm12\n"            \
    "vmovups " AT "(%[x], %[stride]), %%ymm13\n" \
    "vmovups " AT "(%[x], %[stride], 2), %%ymm14\n" \
    TILE_ROW(LOAD, "%[w0]", "a0", "b0", "c0")    \
    TILE_ROW(LOAD, "%[w1]", "a1", "b1", "c1")    \
    TILE_ROW(LOAD, "%[w2]", "a2", "b2", "c2")    \
    TILE_ROW(LOAD, "%[w3]", "a3", "b3", "c3")
#define TILE_ZERO(A) "vxorps %[" A "], %[" A "], %[" A "]\n"
#define TILE_COLUMN(NAME, C) [NAME##0] "=&x"(acc[C][0]), [NAME##1] "=&x"(acc[C][1]), [NAME##2] "=&x"(acc[C][2]), [NAME##3] "=&x"(acc[C][3])

// The halves of a step as in load_half; %[k] counts bytes of a weight row up to its end.  Setting a register to zero
// costs no load, as a mask in memory would.
#define BF16_EVEN(W) "vmovdqu (" W ", %[k]), %%ymm15\n vpslld $16, %%ymm15, %%ymm15\n"
#define BF16_ODD(W) "vpxor %%xmm15, %%xmm15, %%xmm15\n vpblendw $0xaa, (" W ", %[k]), %%ymm15, %%ymm15\n"
#define FP16_FIRST(W) "vcvtph2ps (" W ", %[k]), %%ymm15\n"
#define FP16_SECOND(W) "vcvtph2ps 16(" W ", %[k]), %%ymm15\n"
#define FP32_FIRST(W) "vmovups (" W ", %[k]), %%ymm15\n"
#define FP32_SECOND(W) "vmovups 32(" W ", %[k]), %%ymm15\n"

#define TILE_PREFETCH "prefetcht0 (%[ahead0], %[k])\n prefetcht0 (%[ahead1], %[k])\n"

// `w`: ends of four weight rows of `bytes` bytes, a positive multiple of a step; `x`, `stride`: in bytes.  `ahead`: ends of
// two rows that will be wanted next; NAME##_near fetches nothing.  `acc`: by column.
#define TILE_LOOP(NAME, PREFETCH, STEP_BYTES, FIRST, SECOND)                                                          \
    SUBSPEC_INLINE void NAME(const char* const w[4], int64_t bytes, const char* x, int64_t stride,                    \
                             const char* const ahead[2], Vec acc[3][4]) {                                             \
        int64_t k = -bytes;                                                                                           \
        __asm__ volatile(                                                                                             \
            TILE_ZERO("a0") TILE_ZERO("a1") TILE_ZERO("a2") TILE_ZERO("a3") TILE_ZERO("b0") TILE_ZERO("b1")           \
            TILE_ZERO("b2") TILE_ZERO("b3") TILE_ZERO("c0") TILE_ZERO("c1") TILE_ZERO("c2") TILE_ZERO("c3")           \
            ".p2align 5\n"                                                                                            \
            "1:\n"                                                                                                    \
            PREFETCH TILE_HALF(FIRST, "") TILE_HALF(SECOND, "32")                                                     \
            "add $64, %[x]\n"                                                                                         \
            "add $" STEP_BYTES ", %[k]\n"                                                                             \
            "jl 1b\n"                                                                                                 \
            : [x] "+r"(x), [k] "+r"(k), TILE_COLUMN(a, 0), TILE_COLUMN(b, 1), TILE_COLUMN(c, 2)                       \
            : [w0] "r"(w[0]), [w1] "r"(w[1]), [w2] "r"(w[2]), [w3] "r"(w[3]), [stride] "r"(stride),                   \
              [ahead0] "r"(ahead[0]), [ahead1] "r"(ahead[1])                                                          \
            : "memory", "cc", "ymm12", "ymm13", "ymm14", "ymm15");                                                    \
    }
#define TILE_LOOPS(NAME, STEP_BYTES, FIRST, SECOND)            \
    TILE_LOOP(NAME, TILE_PREFETCH, STEP_BYTES, FIRST, SECOND)  \
    TILE_LOOP(NAME##_near, "", STEP_BYTES, FIRST, SECOND)
TILE_LOOPS(tile_loop_bf16, "32", BF16_EVEN, BF16_ODD)
TILE_LOOPS(tile_loop_fp16, "32", FP16_FIRST, FP16_SECOND)
TILE_LOOPS(tile_loop_fp32, "64", FP32_FIRST, FP32_SECOND)

// The same for any type of weights: elements [0, whole) of the rows, whole a positive multiple of STEP.
template <class Weight>
SUBSPEC_INLINE void largest_tile(const Weight* const rows[4], const float* x, int64_t stride, int64_t whole,
                                 const Weight* const* ahead, int ahead_count, Vec acc[3][4]) {
    const char *w[4], *next[2];
    for (int r = 0; r < 4; r++) w[r] = reinterpret_cast<const char*>(rows[r] + whole);
    for (int i = 0; i < 2; i++) next[i] = i < ahead_count ? reinterpret_cast<const char*>(ahead[i] + whole) : w[i];
    const int64_t bytes = whole * int64_t(sizeof(Weight)), x_bytes = stride * int64_t(sizeof(float));
    const char* values = reinterpret_cast<const char*>(x);
#define TILE_RUN(LOOP) ahead_count > 0 ? LOOP(w, bytes, values, x_bytes, next, acc) : LOOP##_near(w, bytes, values, x_bytes, next, acc)
    if constexpr (std::is_same<Weight, Bf16>::value) TILE_RUN(tile_loop_bf16);
    else if constexpr (std::is_same<Weight, Fp16>::value) TILE_RUN(tile_loop_fp16);
    else TILE_RUN(tile_loop_fp32);
#undef TILE_RUN
}

#undef TILE_ROW
#undef TILE_HALF
#undef TILE_ZERO
#undef TILE_COLUMN
#undef TILE_PREFETCH
#undef TILE_LOOP
#undef TILE_LOOPS
#undef BF16_EVEN
#undef BF16_ODD
#undef FP16_FIRST
#undef FP16_SECOND
#undef FP32_FIRST
#undef FP32_SECOND

}  // namespace
