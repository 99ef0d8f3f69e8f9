// How `project` multiplies with few tokens: lanes share a row, and each multiplies its chunks with every token.
//
// The lanes of a warp take 16 bytes of codes at a time (a chunk) along the columns of an item's rows. Products are summed
// in fp16 for TERMS terms, then in fp32; codes count as fractions of 1 there (code / 8 or / 128), so that these sums do
// not overflow before activations of thousands. Corrections, one added to every value of a block, are multiplied with the
// block's sum of activations, which a warp's rows share.
#pragma once

#include "chunks.cuh"

constexpr int MOST_ROWS = MOST(at_once), HELD_SUMS = MOST_ROWS * BATCH;

__host__ __device__ constexpr int power_of_two(int least) {
    int power = 1;
    while (power < least) power *= 2;
    return power;
}
constexpr int SUMS = power_of_two(MOST_ROWS * BATCH);
static_assert(SUMS <= WARP, "a lane for each sum");

template <class S> __device__ __forceinline__ int chunk_of(int tile, int i) {
    return (tile * S::held + i) * WARP + threadIdx.x % WARP;
}

template <class S> __device__ __forceinline__ void load(Buffer &buffer, const Weights &weights, int item, int tile) {
#pragma unroll
    for (int r = 0; r < S::at_once; ++r) {
        const int wanted = (item - S::first_item) * S::at_once + r, row = wanted < S::rows ? wanted : S::rows - 1;
#pragma unroll
        for (int i = 0; i < S::held; ++i) {
            const int wanted_chunk = chunk_of<S>(tile, i), slot = r * S::held + i;
            const int chunk = S::exact || wanted_chunk < S::chunks ? wanted_chunk : S::chunks - 1;
            load_chunk<S>(buffer, slot, weights, row, chunk);
        }
    }
}

// A piece's products with a token's groups, added up in fp16, and the two halves in fp32.
template <int PIECE> __device__ __forceinline__ float dot(const __half2 (&w)[4 * PIECE], const uint4 (&x)[PIECE]) {
    __half2 sum = __hmul2(w[0], as_half2(x[0].x));
#pragma unroll
    for (int g = 0; g < PIECE; ++g) {
        if (g > 0) sum = __hfma2(w[4 * g], as_half2(x[g].x), sum);
        sum = __hfma2(w[4 * g + 1], as_half2(x[g].y), sum);
        sum = __hfma2(w[4 * g + 2], as_half2(x[g].z), sum);
        sum = __hfma2(w[4 * g + 3], as_half2(x[g].w), sum);
    }
    const float2 both = __half22float2(sum);
    return both.x + both.y;
}

// The sum of a piece's activations, in pairs as far as fp16 holds it.
template <int PIECE> __device__ __forceinline__ float total(const uint4 (&x)[PIECE]) {
    float sum = 0.0f;
#pragma unroll
    for (int g = 0; g < PIECE; ++g) {
        const float2 first = __half22float2(__hadd2(as_half2(x[g].x), as_half2(x[g].y)));
        const float2 second = __half22float2(__hadd2(as_half2(x[g].z), as_half2(x[g].w)));
        sum += (first.x + first.y) + (second.x + second.y);
    }
    return sum;
}

// Floats by columns: a lane takes every 32nd column of AT_ONCE neighbouring rows.
template <class S>
__device__ __forceinline__ void compute_by_columns(const Weights &weights, const uint4 *x, int item,
                                                   float (&sums)[MOST_ROWS * BATCH]) {
    const int row = (item - S::first_item) * S::at_once;
    for (int column = threadIdx.x % WARP; column < COLUMNS; column += WARP) {
        const unsigned short *values = (const unsigned short *)weights.codes + (long long)column * S::rows + row;
        const int within = column % GROUP, group = column / GROUP;
#pragma unroll
        for (int r = 0; r < S::at_once; ++r) {
            const float w = row + r < S::rows ? __half2float(__ushort_as_half(__ldg(values + r))) : 0.0f;
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                const unsigned short *place = (const unsigned short *)(x + b * PLACES + place_of(group));
                sums[r * BATCH + b] += w * __half2float(__ushort_as_half(place[within % 4 * 2 + within / 4]));
            }
        }
    }
}

template <class S>
__device__ __forceinline__ void compute(const Buffer &buffer, const Weights &weights, const uint4 *x, int item,
                                        int tile, float (&sums)[MOST_ROWS * BATCH]) {
    if constexpr (S::by_columns) {
        compute_by_columns<S>(weights, x, item, sums);
        return;
    } else {
        constexpr int CHUNK_GROUPS = S::values / GROUP, PIECE = S::piece;
#pragma unroll
        for (int i = 0; i < S::held; ++i) {
            const int wanted = chunk_of<S>(tile, i);
            const bool inside = S::exact || wanted < S::chunks;
            const int chunk = inside ? wanted : S::chunks - 1;
            // Groups 32 * n + m lie at 32 * n + place_of(m): `start` is known to the compiler, `within` is the lane's.
            const int start = S::exact ? (tile * S::held + i) * WARP * CHUNK_GROUPS : 0;
            const int within = place_of(chunk * CHUNK_GROUPS - start);
#pragma unroll
            for (int piece = 0; piece < CHUNK_GROUPS / PIECE; ++piece) {
                __half2 w[S::at_once][4 * PIECE];
                float scales[S::at_once], corrections[S::at_once];
#pragma unroll
                for (int r = 0; r < S::at_once; ++r) {
                    decode<S>(buffer, r * S::held + i, chunk, piece, w[r]);
                    scales[r] = inside ? scale_of<S>(buffer, r * S::held + i, piece) : 0.0f;
                    if constexpr (S::corrected) {
                        const unsigned bits = buffer.corrections[r * S::held + i][S::scale_of(piece)];
                        corrections[r] = inside ? to_float<S>(bits) / S::unit : 0.0f;
                    }
                }
#pragma unroll
                for (int b = 0; b < BATCH; ++b) {
                    uint4 groups[PIECE];
#pragma unroll
                    for (int g = 0; g < PIECE; ++g)
                        groups[g] = x[b * PLACES + start + (within ^ (piece * PIECE + g))];
#pragma unroll
                    for (int r = 0; r < S::at_once; ++r)
                        sums[r * BATCH + b] += scales[r] * dot<PIECE>(w[r], groups);
                    if constexpr (S::corrected) {
                        const float sum = total<PIECE>(groups);
#pragma unroll
                        for (int r = 0; r < S::at_once; ++r) sums[r * BATCH + b] += corrections[r] * sum;
                    }
                }
            }
        }
    }
}

// Add up the lanes' COUNT values, a power of two: lane l gets the sum of value l / (32 / COUNT), as v[0].
template <int COUNT, int OFFSET, int ALL> __device__ __forceinline__ void gather(float (&v)[ALL], int lane) {
    if constexpr (COUNT > 1) {
        const bool upper = lane & OFFSET;
#pragma unroll
        for (int i = 0; i < COUNT / 2; ++i) {
            const float kept = upper ? v[i + COUNT / 2] : v[i], given = upper ? v[i] : v[i + COUNT / 2];
            v[i] = kept + __shfl_xor_sync(FULL_WARP, given, OFFSET);
        }
        gather<COUNT / 2, OFFSET / 2>(v, lane);
    } else if constexpr (OFFSET > 0) {
        v[0] += __shfl_xor_sync(FULL_WARP, v[0], OFFSET);
        gather<1, OFFSET / 2>(v, lane);
    }
}

// Add up the lanes' sums, each of which ends in lanes of its own, and write them.
template <class S>
__device__ __forceinline__ void finish(Out *y, const float *bias, int item, const float (&sums)[MOST_ROWS * BATCH]) {
    constexpr int COUNT = S::at_once * BATCH, PADDED = power_of_two(COUNT);
    const int lane = threadIdx.x % WARP;
    float v[PADDED];
#pragma unroll
    for (int i = 0; i < PADDED; ++i) v[i] = i < COUNT ? sums[i] : 0.0f;
    gather<PADDED, WARP / 2>(v, lane);
    const int index = lane / (WARP / PADDED), b = index % BATCH;
    const int row = (item - S::first_item) * S::at_once + index / BATCH;
    if (lane % (WARP / PADDED) == 0 && index < COUNT && row < S::rows) {
        const int place = S::first_row + row;
        y[(long long)b * ALL_ROWS + place] = Out(v[0] * S::unit + (bias ? bias[place] : 0.0f));
    }
}
