// How `project` multiplies with several tokens: on the tensor cores, eight rows times up to eight tokens.
//
// Lane 4 i + j has chunks of row i, and the same columns of token i: chunk j of each step of four. Which column is
// which of a product is free, as long as weights and activations agree. Codes are multiplied with their scales in fp16, which
// rounds each weight once; products are added up in fp32. Of a team's warps each takes every SPLIT-th step.
#pragma once

#include "chunks.cuh"
#include "tensor_cores.cuh"

constexpr int ROWS = 8, HELD_SUMS = 8; // two sets, so that a product need not wait for the one before
static_assert(BATCH <= ROWS && MOST(at_once) == ROWS, "a product of 8 x 8");

template <class S> __device__ __forceinline__ int step_of(int tile, int turn) {
    return (tile * BUFFER + turn) * SPLIT + threadIdx.x / WARP % SPLIT;
}

template <class S> __device__ __forceinline__ void load(Buffer &buffer, const Weights &weights, int item, int tile) {
    static_assert(!S::by_columns && !S::corrected, "codes in rows, without corrections");
    const int lane = threadIdx.x % WARP;
    const int wanted = (item - S::first_item) * ROWS + lane / 4, row = wanted < S::rows ? wanted : S::rows - 1;
#pragma unroll
    for (int turn = 0; turn < BUFFER; ++turn) {
        const int step = step_of<S>(tile, turn), wanted_chunk = step * 4 + lane % 4;
        if (step < S::steps)
            load_chunk<S>(buffer, turn, weights, row, wanted_chunk < S::chunks ? wanted_chunk : S::chunks - 1);
    }
}

template <class S>
__device__ __forceinline__ void compute(const Buffer &buffer, const Weights &, const uint4 *x, int, int tile,
                                        float (&sums)[HELD_SUMS]) {
    constexpr int CHUNK_GROUPS = S::values / GROUP, PIECE = S::piece;
    const int lane = threadIdx.x % WARP, token = lane / 4;
    float first[4] = {sums[0], sums[1], sums[2], sums[3]}, second[4] = {sums[4], sums[5], sums[6], sums[7]};
#pragma unroll
    for (int turn = 0; turn < BUFFER; ++turn) {
        const int step = step_of<S>(tile, turn);
        if (step >= S::steps) break; // for the whole warp
        const int wanted_chunk = step * 4 + lane % 4;
        const bool inside = wanted_chunk < S::chunks && token < BATCH;
        const int chunk = wanted_chunk < S::chunks ? wanted_chunk : S::chunks - 1;
#pragma unroll
        for (int piece = 0; piece < CHUNK_GROUPS / PIECE; ++piece) {
            __half2 w[4 * PIECE];
            decode<S>(buffer, turn, chunk, piece, w);
            if (S::bits != 16) {
                const __half2 scale = __float2half2_rn(scale_of<S>(buffer, turn, piece) * S::unit);
#pragma unroll
                for (int i = 0; i < 4 * PIECE; ++i) w[i] = __hmul2(w[i], scale);
            }
#pragma unroll
            for (int g = 0; g < PIECE; ++g) {
                uint4 a = make_uint4(0, 0, 0, 0);
                if (inside) a = x[token * PLACES + place_of(chunk * CHUNK_GROUPS + piece * PIECE + g)];
                multiply_16x8x16(first, a.x, a.y, as_bits(w[4 * g]), as_bits(w[4 * g + 1]));
                multiply_16x8x16(second, a.z, a.w, as_bits(w[4 * g + 2]), as_bits(w[4 * g + 3]));
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = first[i], sums[4 + i] = second[i];
}

// Lane 4 i + j has token i's results of rows 2 j and 2 j + 1.
template <class S>
__device__ __forceinline__ void write(Out *y, const float *bias, int item, float2 results) {
    const int lane = threadIdx.x % WARP, token = lane / 4, row = (item - S::first_item) * ROWS + lane % 4 * 2;
    if (token >= BATCH) return;
    Out *const to = y + (long long)token * ALL_ROWS + S::first_row;
    const float *const offsets = bias + S::first_row;
    if (row < S::rows) to[row] = Out(results.x + (bias ? offsets[row] : 0.0f));
    if (row + 1 < S::rows) to[row + 1] = Out(results.y + (bias ? offsets[row + 1] : 0.0f));
}

#if SPLIT > 1
__device__ __forceinline__ float2 *partial() {
    __shared__ __align__(16) float2 results[WARPS * WARP];
    return results;
}

// Put a warp's share where `add_up` finds it, after a barrier.
template <class S>
__device__ __forceinline__ void finish(Out *, const float *, int, const float (&sums)[HELD_SUMS]) {
    partial()[threadIdx.x] = make_float2(sums[0] + sums[4], sums[1] + sums[5]);
}

// In the first warp of a team.
template <class S> __device__ __forceinline__ void add_up(Out *y, const float *bias, int item) {
    const float2 *const shares = partial() + threadIdx.x;
    float2 sum = shares[0];
#pragma unroll
    for (int other = 1; other < SPLIT; ++other) {
        const float2 share = shares[other * WARP];
        sum.x += share.x, sum.y += share.y;
    }
    write<S>(y, bias, item, sum);
}
#else
template <class S>
__device__ __forceinline__ void finish(Out *y, const float *bias, int item, const float (&sums)[HELD_SUMS]) {
    write<S>(y, bias, item, make_float2(sums[0] + sums[4], sums[1] + sums[5]));
}
#endif
