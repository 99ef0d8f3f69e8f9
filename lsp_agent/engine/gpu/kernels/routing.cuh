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

// Memory that a warp chooses in: keys and experts. First those that may be among the chosen, then these by rank.
struct Contest {
    uint2 candidates[EXPERTS], chosen[USED];
};

// Of `logits` [EXPERTS]. NORMALISE: the shares of the chosen add up to 1, else they are those of a softmax over all.
//
// Taking the largest of all USED times over would be a long chain of steps. Instead every lane takes the largest of its
// own, and the USED-th of these is one that no chosen one falls short of; few others do not, and they are ranked by
// comparing each with each.
__device__ __forceinline__ Choice choose_experts(const float *logits, Contest &contest) {
    const int lane = lane_index();
    unsigned keys[LANE_LOGITS];
#pragma unroll
    for (int i = 0; i < LANE_LOGITS; ++i) {
        const int expert = i * WARP + lane;
        keys[i] = EXPERTS % WARP == 0 || expert < EXPERTS ? ordered(logits[expert]) : 0u;
    }
    unsigned best = 0;
#pragma unroll
    for (int i = 0; i < LANE_LOGITS; ++i) best = keys[i] > best ? keys[i] : best;
    int larger = 0;
#pragma unroll
    for (int i = 0; i < WARP; ++i) larger += __shfl_sync(FULL_WARP, best, i) > best;
    const unsigned least = ~warp_largest(larger < USED ? ~best : 0u);
#if !NORMALISE
    const float largest = from_ordered(warp_largest(best));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < LANE_LOGITS; ++i)
        if (keys[i]) sum += expf(from_ordered(keys[i]) - largest);
    sum = warp_sum(sum);
#endif
    int own = 0;
#pragma unroll
    for (int i = 0; i < LANE_LOGITS; ++i) own += keys[i] >= least && i * WARP + lane < EXPERTS;
    int place = own;
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        const int before = __shfl_up_sync(FULL_WARP, place, offset);
        place += lane >= offset ? before : 0;
    }
    const int count = __shfl_sync(FULL_WARP, place, WARP - 1);
    place -= own;
#pragma unroll
    for (int i = 0; i < LANE_LOGITS; ++i)
        if (keys[i] >= least && i * WARP + lane < EXPERTS) contest.candidates[place++] = make_uint2(keys[i], i * WARP + lane);
    __syncwarp();
    for (int i = lane; i < count; i += WARP) {
        const uint2 mine = contest.candidates[i];
        int rank = 0;
#pragma unroll 8
        for (int j = 0; j < count; ++j) {
            const uint2 other = contest.candidates[j];
            rank += other.x > mine.x || (other.x == mine.x && other.y < mine.y);
        }
        if (rank < USED) contest.chosen[rank] = mine;
    }
    __syncwarp();
    const uint2 found = contest.chosen[lane < USED ? lane : 0];
    const float value = from_ordered(found.x);
    Choice choice = {(int)found.y, 0.0f};
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
    __shared__ Contest contest;
    __shared__ int chosen;
    const unsigned token = pair / USED, lane = threadIdx.x;
    if (lane < WARP) {
        const Choice choice = choose_experts(r + token * R_STRIDE, contest);
        if (lane == pair % USED) chosen = choice.expert;
        if (writes && lane < USED) {
            experts[token * USED + lane] = choice.expert;
            weights[token * USED + lane] = choice.weight;
        }
    }
    __syncthreads();
    return chosen;
}
