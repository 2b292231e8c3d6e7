// The library's functions that its own sources call too.  What they do, and the shapes, stand where they are defined.
#pragma once
#include <cstdint>

extern "C" {
void subspec_rms_norm(int dtype, const void* x, const void* weight, void* y, int64_t T, int64_t C, float eps, int threads);
void subspec_silu_mul(int dtype, const void* gate_up, void* y, int64_t T, int64_t F, int threads);
void subspec_rotate_and_store(int dtype, const void* qkv, const float* cosine, const float* sine, const int32_t* positions,
                              const int32_t* slots, void* k_cache, void* v_cache, const void* q_norm, const void* k_norm,
                              void* q_out, int64_t T, int64_t H, int64_t Hkv, int64_t D, int64_t k_stride,
                              int64_t v_stride, float eps, int threads);
int subspec_attend(int dtype, const void* q, const void* k, const void* v, const int32_t* prefix, const int32_t* paths,
                   const int32_t* path_lens, void* out, int64_t T, int64_t H, int64_t Hkv, int64_t D, int64_t k_stride,
                   int64_t v_stride, int64_t P, float scale, int threads);
void subspec_substitute_product(const void* x, int64_t x_stride, int64_t rows, int64_t k, const void* tiles, int64_t n,
                                const float* bias, void* y, int dtype, void* scratch, int threads);
int64_t subspec_substitute_scratch_bytes(int64_t rows, int64_t k);
}
