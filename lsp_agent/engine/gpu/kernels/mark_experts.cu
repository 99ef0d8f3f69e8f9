// Which experts any token of a prompt may use: those whose logit is among its USED largest, ties included, because it is
// another kernel that chooses. Grid: BLOCKS x 1, each for some of the tokens.
//
// `count` is the number of logits [tokens, EXPERTS]; `marks` [BLOCKS, WORDS] has a bit for each expert.
//
// Macros: EXPERTS, USED, WARPS, BLOCKS.

#define NORMALISE 1 // what of the header is not used here wants these
#define R_STRIDE EXPERTS
#include "routing.cuh"

#define WORDS ((EXPERTS + 31) / 32)

extern "C" __global__ void __launch_bounds__(WARPS *WARP)
    mark_experts(const __half *__restrict__ logits, const long long *__restrict__ count, unsigned *__restrict__ marks) {
    __shared__ unsigned found[WORDS];
    grid_dependency_wait();
    for (int word = thread_rank(); word < WORDS; word += WARPS * WARP) found[word] = 0;
    __syncthreads();
    const long long tokens = count[0] / EXPERTS;
    for (long long token = (long long)blockIdx.x * WARPS + warp_index(); token < tokens; token += BLOCKS * WARPS) {
        unsigned keys[LANE_LOGITS], left[LANE_LOGITS];
#pragma unroll
        for (int i = 0; i < LANE_LOGITS; ++i) {
            const int expert = i * WARP + lane_index();
            const bool present = EXPERTS % WARP == 0 || expert < EXPERTS;
            keys[i] = left[i] = present ? ordered(__half2float(logits[token * EXPERTS + expert])) : 0u;
        }
        unsigned least = 0;
        for (int rank = 0; rank < USED; ++rank) {
            unsigned best = 0;
            int place = 0;
#pragma unroll
            for (int i = 0; i < LANE_LOGITS; ++i)
                if (left[i] > best) best = left[i], place = i;
            least = warp_largest(best);
            // One of them goes, the first lane's that has it.
            const unsigned lane = ~warp_largest(best == least ? ~(unsigned)lane_index() : 0u);
#pragma unroll
            for (int i = 0; i < LANE_LOGITS; ++i)
                if (lane == (unsigned)lane_index() && i == place) left[i] = 0;
        }
#pragma unroll
        for (int i = 0; i < LANE_LOGITS; ++i) {
            const int expert = i * WARP + lane_index();
            if (keys[i] && keys[i] >= least) atomicOr(&found[expert / 32], 1u << expert % 32);
        }
    }
    __syncthreads();
    for (int word = thread_rank(); word < WORDS; word += WARPS * WARP) marks[blockIdx.x * WORDS + word] = found[word];
}
