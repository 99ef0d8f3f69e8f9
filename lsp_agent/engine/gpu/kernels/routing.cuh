// The router's choice, by one warp: the USED largest of EXPERTS logits, ties to the lower index, and their weights.
//
// Expects EXPERTS, USED (at most 32), R_STRIDE and NORMALISE to be defined.
#pragma once

#include "common.cuh"

#define LANE_LOGITS ((EXPERTS + WARP - 1) / WARP)

__device__ __forceinline__ unsigned warp_largest(unsigned value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_max_sync(FULL_WARP, value);
#else
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        const unsigned other = __shfl_xor_sync(FULL_WARP, value, offset);
        value = other > value ? other : value;
    }
    return value;
#endif
}

// Unsigned numbers in the order of the floats; none is 0 but that of a NaN.
__device__ __forceinline__ unsigned ordered(float value) {
    const unsigned bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct Choice {
    int expert;   // lane u: the expert of rank u
    float weight; // and its share; what lanes from USED on hold means nothing
};

// Of `logits` [EXPERTS]. NORMALISE: the shares of the chosen add up to 1, else they are those of a softmax over all.
__device__ __forceinline__ Choice choose_experts(const float *logits) {
    const int lane = lane_index();
    unsigned keys[LANE_LOGITS];
#pragma unroll
    for (int i = 0; i < LANE_LOGITS; ++i) {
        const int expert = i * WARP + lane;
        keys[i] = EXPERTS % WARP == 0 || expert < EXPERTS ? ordered(logits[expert]) : 0u;
    }
#if !NORMALISE
    float largest = __uint_as_float(0xff800000u), sum = 0.0f; // minus infinity, for which NVRTC has no name
#pragma unroll
    for (int i = 0; i < LANE_LOGITS; ++i)
        if (keys[i]) largest = fmaxf(largest, from_ordered(keys[i]));
    largest = warp_max(largest);
#pragma unroll
    for (int i = 0; i < LANE_LOGITS; ++i)
        if (keys[i]) sum += expf(from_ordered(keys[i]) - largest);
    sum = warp_sum(sum);
#endif
    Choice choice = {0, 0.0f};
    float value = 0.0f;
#pragma unroll 1
    for (int rank = 0; rank < USED; ++rank) {
        unsigned best = 0;
        int place = 0;
#pragma unroll
        for (int i = 0; i < LANE_LOGITS; ++i)
            if (keys[i] > best) best = keys[i], place = i;
        const unsigned winner = warp_largest(best);
        // The lowest index among the lanes that have the largest, as the largest complement.
        const int expert = (int)~warp_largest(best == winner ? ~(unsigned)(place * WARP + lane) : 0u);
#pragma unroll
        for (int i = 0; i < LANE_LOGITS; ++i)
            if (expert == i * WARP + lane) keys[i] = 0;
        if (lane == rank) choice.expert = expert, value = from_ordered(winner);
    }
#if NORMALISE
    const float first = __shfl_sync(FULL_WARP, value, 0);
    choice.weight = lane < USED ? expf(value - first) : 0.0f;
    choice.weight /= warp_sum(choice.weight);
#else
    choice.weight = expf(value - largest) / sum;
#endif
    return choice;
}

// The expert of the pair (token, rank) `pair`, for all threads of a block, which need no kernel before them for it then;
// `writes`: whether the block also writes what its token's warp has found to `experts` and `weights` [tokens, USED].
__device__ __forceinline__ int choose_for_block(const float *r, unsigned pair, bool writes, int *experts, float *weights) {
    __shared__ int chosen;
    const unsigned token = pair / USED, lane = threadIdx.x;
    if (lane < WARP) {
        const Choice choice = choose_experts(r + token * R_STRIDE);
        if (lane == pair % USED) chosen = choice.expert;
        if (writes && lane < USED) {
            experts[token * USED + lane] = choice.expert;
            weights[token * USED + lane] = choice.weight;
        }
    }
    __syncthreads();
    return chosen;
}
