// bf16 products on the processor's matrix tiles (Intel AMX): sixteen weight rows meet sixteen rows of x at once.
//
// Weights are the left operand, read as they lie; rows of x are the right one, prepared once, pairs of elements beside
// one another.  Each output has one fp32 accumulator, to which a tile instruction adds 32 products of bf16 in an order
// of its own, the same in every cell: an output depends on its own row alone.  Subnormals count as zero.
#pragma once

#include "numeric.h"

#if defined(__AVX512BF16__) && defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define SUBSPEC_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#if defined(SUBSPEC_TILES)
#define SUBSPEC_ON_TILES __attribute__((target("amx-tile,amx-bf16")))

namespace {
namespace amx {

constexpr int64_t SIDE = 16;                 // rows of a tile: of the weight, or of x
constexpr int64_t DEPTH = 32;                // elements of one row that a tile holds
constexpr int64_t TILE_WORDS = SIDE * SIDE;  // of four bytes: pairs of elements, or sums

// What the tiles hold: 0 to 3 sums, 4 and 5 weights, 6 and 7 rows of x; the latter and the sums `width` of them.
struct __attribute__((packed)) Configuration {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
    explicit Configuration(int64_t width) {
        for (int tile = 0; tile < 8; tile++) {
            row_bytes[tile] = uint16_t(4 * (tile == 4 || tile == 5 ? SIDE : width));
            rows[tile] = SIDE;
        }
    }
};

// Ask the system for the tiles' state; whether the process may use them from now on.
inline bool allowed() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// Rows of x (rows, K) in the order of the right operand, `width` of them, the missing ones zero: for each step of DEPTH
// elements, pair by pair, the pairs of all rows.  `to` has room for width * round_up(K, DEPTH) elements.
inline void prepare(const Bf16* x, int64_t rows, int64_t width, int64_t K, Bf16* to) {
    const int64_t whole = K / DEPTH * DEPTH;
    if (width == 1) {  // they lie so already
        memcpy(to, x, K * sizeof(Bf16));
        memset(to + K, 0, (round_up(K, DEPTH) - K) * sizeof(Bf16));
        return;
    }
    const __m512i ordinals = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 present = __mmask16((1u << rows) - 1), kept = __mmask16((1u << width) - 1);
    const auto step = [&](const Bf16* from, int64_t stride, Bf16* out) {
        const __m512i offsets = _mm512_mullo_epi32(ordinals, _mm512_set1_epi32(int32_t(stride)));
        for (int64_t pair = 0; pair < DEPTH / 2; pair++) {
            const __m512i words = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), present, offsets, from + 2 * pair, 2);
            _mm512_mask_storeu_epi32(out + pair * 2 * width, kept, words);
        }
    };
    for (int64_t k = 0; k < whole; k += DEPTH) step(x + k, K, to + k * width);
    if (whole < K) {
        Bf16 tail[SIDE][DEPTH] = {};
        for (int64_t r = 0; r < rows; r++) memcpy(tail[r], x + r * K + whole, (K - whole) * sizeof(Bf16));
        step(tail[0], DEPTH, to + whole * width);
    }
}

// GCC's tile loads do not tell the compiler that they read memory: what was stored before must be there.
SUBSPEC_INLINE void stored() { asm volatile("" ::: "memory"); }

// What one step of DEPTH elements adds to W x X tiles of sums.  Tiles below the first of the weight, and of x, are so
// many elements on.
template <int W, int X>
SUBSPEC_ON_TILES inline void step(const Bf16* weight, int64_t weight_next, int64_t weight_bytes, const Bf16* x,
                                  int64_t x_next, int64_t width) {
    const int64_t x_bytes = 4 * width;
    _tile_loadd(4, weight, weight_bytes);
    _tile_loadd(6, x, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (X > 1) {
        _tile_loadd(7, x + x_next, x_bytes);
        _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (W > 1) {
        _tile_loadd(5, weight + weight_next, weight_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (X > 1) _tile_dpbf16ps(3, 5, 7);
    }
}

// The sums of W * SIDE rows of a weight (.., K) with X * width prepared rows of x, tiles of it `x_next` elements apart:
// out[i][j] is (SIDE weight rows, SIDE rows of x, of which the first `width` count).
template <int W, int X>
SUBSPEC_ON_TILES inline void sums(const Bf16* weight, int64_t K, const Bf16* x, int64_t x_next, int64_t width,
                                  float out[2][2][TILE_WORDS]) {
    const int64_t whole = K / DEPTH * DEPTH;
    stored();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < whole; k += DEPTH) {
        step<W, X>(weight + k, SIDE * K, K * int64_t(sizeof(Bf16)), x + k * width, x_next, width);
    }
    if (whole < K) {
        Bf16 tail[W * SIDE][DEPTH] = {};
        for (int64_t r = 0; r < W * SIDE; r++) memcpy(tail[r], weight + r * K + whole, (K - whole) * sizeof(Bf16));
        stored();
        step<W, X>(tail[0], SIDE * DEPTH, DEPTH * int64_t(sizeof(Bf16)), x + whole * width, x_next, width);
    }
    _tile_stored(0, out[0][0], 64);
    if constexpr (X > 1) _tile_stored(1, out[0][1], 64);
    if constexpr (W > 1) _tile_stored(2, out[1][0], 64);
    if constexpr (W > 1 && X > 1) _tile_stored(3, out[1][1], 64);
}

// The tiles' shapes, for one thread and as long as it lives.
struct Tiles {
    SUBSPEC_ON_TILES explicit Tiles(int64_t width) {
        const Configuration configuration(width);
        stored();
        _tile_loadconfig(&configuration);
    }
    SUBSPEC_ON_TILES ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

}  // namespace amx
}  // namespace
#endif
