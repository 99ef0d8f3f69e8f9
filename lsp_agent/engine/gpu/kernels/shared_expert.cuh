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

// Stage the activations of a token, `r` [R_STRIDE], into `staged` [SHARED_WIDTH], with `threads` threads.
__device__ __forceinline__ void stage_shared(const float *r, __half *staged, unsigned thread, unsigned threads) {
    constexpr unsigned AT_ONCE = 8; // loads are asked for before any is used
    const float *gates = r + SHARED_OFFSET, *ups = gates + SHARED_WIDTH;
    for (unsigned start = 0; start < SHARED_WIDTH; start += AT_ONCE * threads) {
        unsigned gate[AT_ONCE], up[AT_ONCE];
#pragma unroll
        for (unsigned i = 0; i < AT_ONCE; ++i) {
            const unsigned column = start + i * threads + thread;
            gate[i] = load_streamed((const unsigned *)gates + (column < SHARED_WIDTH ? column : 0));
            up[i] = load_streamed((const unsigned *)ups + (column < SHARED_WIDTH ? column : 0));
        }
#pragma unroll
        for (unsigned i = 0; i < AT_ONCE; ++i) {
            const unsigned column = start + i * threads + thread, place = activation_place<SHARED_BITS>(column);
            if (column >= SHARED_WIDTH) break;
            staged[SHARED_BITS == 16 ? place : swizzled<SHARED_BITS>(place / 8) * 8 + place % 8] =
                __float2half(silu(__uint_as_float(gate[i])) * __uint_as_float(up[i]));
        }
    }
}

// What a lane copies of `rows` rows.
__host__ __device__ constexpr unsigned shared_units(unsigned rows) { return SHARED_BITS == 16 ? 0 : SHARED_ITEMS * rows; }

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

// A lane's scales and zero points of these rows.
template <int COUNT> struct SharedScales {
    static constexpr int HELD = SHARED_BITS == 16 ? 1 : SHARED_ITEMS * COUNT;
    unsigned scales[HELD];
    unsigned char points[HELD];
    __device__ __forceinline__ void load(unsigned first, const void *their_scales, const unsigned char *zero_points) {
#if SHARED_BITS != 16
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const unsigned chunk = i / COUNT * WARP + threadIdx.x % WARP, row = first + i % COUNT;
            const unsigned block = SHARED_CHUNKS % WARP == 0 || chunk < SHARED_CHUNKS ? chunk * CHUNK<SHARED_BITS> / SHARED_BLOCK : 0;
            const unsigned place = row * SHARED_BLOCKS + block;
            scales[i] = SHARED_SCALE_HALF ? load_streamed((const unsigned short *)their_scales + place)
                                          : load_streamed((const unsigned *)their_scales + place);
            if (SHARED_ZERO) points[i] = zero_point<SHARED_BITS>(zero_points, row, SHARED_BLOCKS, block);
        }
#endif
    }
    __device__ __forceinline__ float scale(int i) const {
        return SHARED_SCALE_HALF ? __half2float(__ushort_as_half((unsigned short)scales[i])) : __uint_as_float(scales[i]);
    }
};

// Add `factor` times a lane's share of the products of these rows, once their codes are there.
template <int COUNT>
__device__ __forceinline__ void add_shared(float (&sums)[COUNT], const uint4 *staged, int stride, unsigned first, float factor,
                                           const __half *activations, const uint4 *codes, const SharedScales<COUNT> &scales) {
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
        __half2 x[CHUNK<SHARED_BITS> / 2];
        read_activations<SHARED_BITS>(x, (const uint4 *)activations, present ? chunk : 0);
#pragma unroll
        for (int row = 0; row < COUNT; ++row) {
            const int held = i * COUNT + row;
            const Zero<SHARED_BITS> zero(SHARED_ZERO ? scales.points[held] : SHARED_BITS == 4 ? 8 : 128);
            const float product = dot_chunk<SHARED_BITS>(staged[(i * COUNT + row) * stride], x, zero);
            sums[row] += present ? factor * CODE_UNIT<SHARED_BITS> * scales.scale(held) * product : 0.0f;
        }
    }
#endif
}
