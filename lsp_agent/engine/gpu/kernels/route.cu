// The experts of each token and their weights. Grid: BATCH blocks of one warp.
//
// Macros: BATCH, EXPERTS, USED, R_STRIDE, NORMALISE.

#include "routing.cuh"

extern "C" __global__ void __launch_bounds__(WARP)
    route(const float *__restrict__ r, int *__restrict__ experts, float *__restrict__ weights) {
    __shared__ Contest contest;
    grid_dependency_wait();
    grid_launch_dependents();
    const int token = blockIdx.x, lane = lane_index();
    const Choice choice = choose_experts(r + token * R_STRIDE, contest);
    if (lane < USED) {
        experts[token * USED + lane] = choice.expert;
        weights[token * USED + lane] = choice.weight;
    }
}
