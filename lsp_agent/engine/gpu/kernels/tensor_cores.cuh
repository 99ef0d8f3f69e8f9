// Products of small matrices, each by the 32 lanes of a warp together: on the tensor cores, or emulated.
#pragma once

#include "common.cuh"

// sums [16, 8] += a [16, 16] b [16, 8], of halves; only the first 8 rows of a are given, the others are zero. In lane
// 4 i + j: a row i, columns 2 j, 2 j + 1 (first), 2 j + 8, 2 j + 9 (second); b column i, these rows; sums (first two)
// row i, columns 2 j, 2 j + 1.
__device__ __forceinline__ void multiply_16x8x16(float (&sums)[4], unsigned a_first, unsigned a_second,
                                                 unsigned b_first, unsigned b_second) {
#ifdef __CUDA_ARCH__
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %5}, {%7, %8}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a_first), "r"(0u), "r"(a_second), "r"(b_first), "r"(b_second));
#else
    const int i = lane_index() / 4, j = lane_index() % 4;
    for (int k = 0; k < 4; k++) {
        const float2 a[2] = {half_bits_to_float2(__shfl_sync(FULL_WARP, a_first, 4 * i + k)),
                             half_bits_to_float2(__shfl_sync(FULL_WARP, a_second, 4 * i + k))};
        for (int n = 0; n < 2; n++) {
            const int from = 4 * (2 * j + n) + k;
            const float2 b[2] = {half_bits_to_float2(__shfl_sync(FULL_WARP, b_first, from)),
                                 half_bits_to_float2(__shfl_sync(FULL_WARP, b_second, from))};
            sums[n] += a[0].x * b[0].x + a[0].y * b[0].y + a[1].x * b[1].x + a[1].y * b[1].y;
        }
    }
#endif
}

// sums [16, 8] += a [16, 8] b [8, 8], of halves. In lane 4 i + j: a rows i and i + 8, columns 2 j, 2 j + 1; b column i,
// rows 2 j, 2 j + 1; sums rows i (first two) and i + 8, columns 2 j, 2 j + 1.
__device__ __forceinline__ void multiply_16x8x8(float (&sums)[4], unsigned a_upper, unsigned a_lower, unsigned b) {
#ifdef __CUDA_ARCH__
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a_upper), "r"(a_lower), "r"(b));
#else
    const int i = lane_index() / 4, j = lane_index() % 4;
    for (int k = 0; k < 4; k++) {
        const float2 upper = half_bits_to_float2(__shfl_sync(FULL_WARP, a_upper, 4 * i + k));
        const float2 lower = half_bits_to_float2(__shfl_sync(FULL_WARP, a_lower, 4 * i + k));
        for (int n = 0; n < 2; n++) {
            const float2 x = half_bits_to_float2(__shfl_sync(FULL_WARP, b, 4 * (2 * j + n) + k));
            sums[n] += upper.x * x.x + upper.y * x.y;
            sums[2 + n] += lower.x * x.x + lower.y * x.y;
        }
    }
#endif
}
