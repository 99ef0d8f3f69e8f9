// silu(gate) * up of each token's routed experts in MXFP4.
//
// Grid: 2 * WIDTH / BLOCK_ROWS x BATCH * USED. A block owns BLOCK_ROWS rows (gate and up alternate) of one token's expert
// and all columns: its threads take 32 rows of 16 columns each, the rows' groups next to one another.
//
// Macros: BATCH, USED, HIDDEN, WIDTH, ADDRESSES, BLOCK_ROWS (32, 64, 128 …), THREADS, SCALES_BY_BLOCK,
// ROUTED and CACHED (as of experts_up).
// Dynamic shared memory: STEP * 16 bytes a thread.

#include "mxfp4.cuh"
#if ROUTED
#include "routing.cuh"
#elif CACHED
#define PAIRS (BATCH * USED)
#include "coming.cuh"
#endif

#define GROUPS (BLOCK_ROWS / GROUP)
#define PARTS (HIDDEN / STEP)
#define WARPS (THREADS / WARP)

static_assert(HIDDEN % 32 == 0 && 2 * WIDTH % BLOCK_ROWS == 0, "blocks of 32 columns, whole groups of rows");
static_assert(THREADS % WARP == 0 && THREADS >= GROUPS * PARTS && GROUPS <= WARP, "a thread for every part");

extern "C" __global__ void __launch_bounds__(THREADS)
#if ROUTED
    mxfp4_up(const __half *__restrict__ normed, const float *__restrict__ r, __half *__restrict__ act, int *__restrict__ experts,
             float *__restrict__ weights, const long long *__restrict__ table) {
#elif CACHED
    mxfp4_up(const __half *__restrict__ normed, const int *__restrict__ experts, const int *__restrict__ copies, const int *,
             __half *__restrict__ act, const long long *__restrict__ table) {
#else
    mxfp4_up(const __half *__restrict__ normed, const int *__restrict__ experts, __half *__restrict__ act,
             const long long *__restrict__ table) {
#endif
    __shared__ float partial[WARPS][BLOCK_ROWS];
    DYNAMIC_SHARED(dynamic);
    uint4 *staged = (uint4 *)dynamic + threadIdx.x;
    const unsigned thread = threadIdx.x, pair = blockIdx.y;
    const unsigned group = thread % GROUPS, part = thread / GROUPS;
    const bool present = THREADS == GROUPS * PARTS || part < PARTS;
    const unsigned row = blockIdx.x * BLOCK_ROWS + group * GROUP, column = present ? part * STEP : 0;
#if !CACHED
    grid_dependency_wait();
#endif
    grid_launch_dependents();
#if ROUTED
    const int expert = choose_for_block(r, pair, blockIdx.x == 0 && pair % USED == 0, experts, weights);
#else
    const int expert = experts[pair];
#if CACHED
    if (is_coming(expert, copies)) grid_dependency_wait();
#endif
#endif
    const long long *entry = table + expert * ADDRESSES;
    load_columns<2 * WIDTH>(staged, THREADS, (const uint4 *)entry[0], row, column, present);
    unsigned scales[GROUP / 4];
    load_scales<2 * WIDTH, HIDDEN>(scales, (const unsigned char *)entry[1], row, column);
    const uint4 *activations = (const uint4 *)(normed + pair / USED * HIDDEN + column);
    const uint4 x[2] = {activations[0], activations[1]};
    float values[GROUP];
    multiply_columns(values, staged, THREADS, x, scales);
    scatter_sums<GROUP, WARP / 2, GROUPS>(values);
    constexpr int KEPT = GROUPS; // of the 32 sums of a group, which WARP / GROUPS lanes have shared out
    const unsigned lane = thread % WARP;
#pragma unroll
    for (int i = 0; i < KEPT; ++i) partial[thread / WARP][group * GROUP + lane / GROUPS * KEPT + i] = values[i];
    __syncthreads();
#if CACHED
    grid_dependency_wait(); // before anything is written
#endif
    for (unsigned i = thread; i < BLOCK_ROWS / 2; i += THREADS) {
        float gate = 0.0f, up = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) gate += partial[warp][2 * i], up += partial[warp][2 * i + 1];
        act[pair * WIDTH + blockIdx.x * (BLOCK_ROWS / 2) + i] = __float2half(silu(gate) * up);
    }
}
