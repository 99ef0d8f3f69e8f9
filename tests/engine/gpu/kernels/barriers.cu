// What the emulator must do, and what it must find: CASE chooses.
#include "common.cuh"

extern "C" __global__ void barriers(const float *x, float *y) {
    __shared__ float values[64];
    const int i = threadIdx.x, lane = lane_index();
#if CASE == 0 // reductions, shuffles and votes; two blocks share a sum
    y[0 * 64 + i] = block_sum(x[i]);
    y[1 * 64 + i] = block_max(x[i]);
    y[2 * 64 + i] = warp_sum<8>(x[i]);
    y[3 * 64 + i] = __shfl_sync(FULL_WARP, x[i], lane + 5);
    y[4 * 64 + i] = __shfl_down_sync(FULL_WARP, x[i], 3);
    y[5 * 64 + i] = __shfl_up_sync(FULL_WARP, x[i], 3);
    y[6 * 64 + i] = __ballot_sync(FULL_WARP, lane % 2) == 0xaaaaaaaau;
    y[7 * 64 + i] = __syncthreads_count(x[i] > 0);
    float most = x[i];
    int where = i;
    warp_argmax(most, where);
    y[8 * 64 + i] = where;
    values[63 - i] = x[i];
    __syncthreads();
    y[9 * 64 + i] = values[i];
    atomicAdd(&y[10 * 64], x[i]);
    y[11 * 64 + i] = sigmoid(x[i]);
    y[12 * 64 + i] = silu(x[i]);
    DYNAMIC_SHARED(dynamic);
    float *more = (float *)dynamic;
    more[i] = x[i];
    __syncwarp();
    y[13 * 64 + i] = more[i ^ 1];
#elif CASE == 1 // one thread misses the barrier
    if (i != 40) __syncthreads();
#elif CASE == 2 // two barriers
    if (i < 32) __syncthreads();
    else __syncthreads();
#elif CASE == 3 // a shuffle of some lanes
    if (i % 32 < 31) y[i] = __shfl_xor_sync(FULL_WARP, x[i], 1);
#elif CASE == 4 // a load that is not aligned
    y[i] = ((const float4 *)(x + i))->x;
#elif CASE == 5 // outside of a shared array
    values[i * 2] = x[i];
    y[i] = values[i];
#elif CASE == 6 // the first page
    y[i] = ((const float *)(size_t)(4 * (i + 1)))[0];
#elif CASE == 7 // shared memory that was not written
    y[i] = values[i];
#elif CASE == 8 // a missing barrier: right in one order of the threads only
    values[i] = x[i];
    y[i] = values[i ? i - 1 : 0];
#elif CASE == 9 // a partial mask
    y[i] = __shfl_xor_sync(0xffffu, x[i], 1);
#endif
}
