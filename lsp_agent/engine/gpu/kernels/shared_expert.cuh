// The shared expert's down projection: weights [HIDDEN, SHARED_WIDTH] as MatMulNBits packs them, or fp16 [SHARED_WIDTH,
// HIDDEN], times silu(gate) * up, which are in r. Expects HIDDEN, R_STRIDE, SHARED_OFFSET, GATE_OFFSET, SHARED_WIDTH,
// SHARED_BITS (4, 8, 16), SHARED_BLOCK, SHARED_SCALE_HALF and SHARED_ZERO to be defined.
#pragma once

#include "codes.cuh"

#define SHARED_BLOCKS (SHARED_WIDTH / SHARED_BLOCK)
#define SHARED_CHUNKS (SHARED_WIDTH / CHUNK<SHARED_BITS>)
#define SHARED_ITEMS ((SHARED_CHUNKS + WARP - 1) / WARP)
static_assert(SHARED_BITS == 16 || (SHARED_WIDTH % SHARED_BLOCK == 0 && SHARED_BLOCK % CHUNK<SHARED_BITS> == 0),
              "columns come in whole blocks, blocks in whole chunks");

// Stage the activations of a token, `r` [R_STRIDE], into `staged` [SHARED_WIDTH].
__device__ __forceinline__ void stage_shared(const float *r, __half *staged) {
    for (unsigned column = threadIdx.x; column < SHARED_WIDTH; column += blockDim.x) {
        const float gate = r[SHARED_OFFSET + column], up = r[SHARED_OFFSET + SHARED_WIDTH + column];
        const unsigned place = activation_place<SHARED_BITS>(column);
        staged[SHARED_BITS == 16 ? place : swizzled<SHARED_BITS>(place / 8) * 8 + place % 8] = __float2half(silu(gate) * up);
    }
}

// Begin to copy a lane's share of the codes of COUNT rows from `first` on to `staged`, each STRIDE after the one before.
template <int COUNT>
__device__ __forceinline__ void load_shared(uint4 *staged, int stride, unsigned first, const uint4 *codes) {
#if SHARED_BITS != 16
#pragma unroll
    for (int i = 0; i < SHARED_ITEMS; ++i) {
        const unsigned chunk = i * WARP + threadIdx.x % WARP;
        const bool present = SHARED_CHUNKS % WARP == 0 || chunk < SHARED_CHUNKS;
#pragma unroll
        for (int row = 0; row < COUNT; ++row)
            copy_async(staged + (i * COUNT + row) * stride, codes + (first + row) * SHARED_CHUNKS + (present ? chunk : 0), present);
    }
#endif
}

// Add `factor` times a lane's share of the products of these rows, once their codes are there.
template <int COUNT>
__device__ __forceinline__ void add_shared(float (&sums)[COUNT], const uint4 *staged, int stride, unsigned first, float factor,
                                           const __half *activations, const uint4 *codes, const void *scales,
                                           const unsigned char *zero_points) {
    const unsigned lane = threadIdx.x % WARP;
#if SHARED_BITS == 16
#pragma unroll 4
    for (unsigned column = lane; column < SHARED_WIDTH; column += WARP) {
        const float x = factor * __half2float(activations[column]);
#pragma unroll
        for (int row = 0; row < COUNT; ++row)
            sums[row] += x * __half2float(((const __half *)codes)[column * HIDDEN + first + row]);
    }
#else
#pragma unroll
    for (int i = 0; i < SHARED_ITEMS; ++i) {
        const unsigned chunk = i * WARP + lane;
        const bool present = SHARED_CHUNKS % WARP == 0 || chunk < SHARED_CHUNKS;
        const unsigned block = present ? chunk * CHUNK<SHARED_BITS> / SHARED_BLOCK : 0;
        __half2 x[CHUNK<SHARED_BITS> / 2];
        read_activations<SHARED_BITS>(x, (const uint4 *)activations, present ? chunk : 0);
#pragma unroll
        for (int row = 0; row < COUNT; ++row) {
            const unsigned place = (first + row) * SHARED_BLOCKS + block;
            const float scale = SHARED_SCALE_HALF ? __half2float(((const __half *)scales)[place]) : ((const float *)scales)[place];
            const unsigned point = SHARED_ZERO ? zero_point<SHARED_BITS>(zero_points, first + row, SHARED_BLOCKS, block)
                                               : (SHARED_BITS == 4 ? 8u : 128u);
            const float product = dot_chunk<SHARED_BITS>(staged[(i * COUNT + row) * stride], x, Zero<SHARED_BITS>(point));
            sums[row] += present ? factor * CODE_UNIT<SHARED_BITS> * scale * product : 0.0f;
        }
    }
#endif
}
