// The weighted sum of each token's routed experts in MXFP4, and of its shared expert.
//
// Grid: HIDDEN / BLOCK_ROWS x PARTS x BATCH. Rows lie next to one another, so a block that owned few rows of all experts
// would read scraps of memory: a block owns BLOCK_ROWS rows of one expert (part 0: of the shared one, if there is one),
// and the last block to finish adds up the parts, in their order.
//
// Macros: BATCH, USED, HIDDEN, WIDTH, ADDRESSES, BLOCK_ROWS (32, 64, 128 …), THREADS, SCALES_BY_BLOCK; those of
// shared_expert.cuh (SHARED_WIDTH 0: none) and SHARED_ROWS. Dynamic shared memory: STEP * 16 bytes a thread.

#include "mxfp4.cuh"
#if SHARED_WIDTH
#include "shared_expert.cuh"
#define PARTS (USED + 1)
#else
#define PARTS USED
#endif

#define GROUPS (BLOCK_ROWS / GROUP)
#define STEPS (WIDTH / STEP)
#define WARPS (THREADS / WARP)

static_assert(WIDTH % 32 == 0 && HIDDEN % BLOCK_ROWS == 0, "blocks of 32 columns, whole groups of rows");
static_assert(THREADS % WARP == 0 && THREADS >= GROUPS * STEPS && GROUPS <= WARP, "a thread for every part");
#if SHARED_WIDTH
static_assert(SHARED_ROWS * SHARED_ITEMS <= STEP || SHARED_BITS == 16, "the shared expert's codes fit where the others' do");
static_assert(BLOCK_ROWS % (SHARED_ROWS * WARPS) == 0, "a warp owns whole rows");
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    mxfp4_down(const __half *__restrict__ act, const int *__restrict__ experts, const float *__restrict__ weights,
               const float *__restrict__ r, __half *__restrict__ out, float *__restrict__ scratch,
               const long long *__restrict__ table, int *__restrict__ counters, const uint4 *__restrict__ shared_codes,
               const void *__restrict__ shared_scales, const unsigned char *__restrict__ shared_zero_points) {
    __shared__ float partial[WARPS][BLOCK_ROWS];
    __shared__ bool is_last;
    DYNAMIC_SHARED(dynamic);
    uint4 *staged = (uint4 *)dynamic + threadIdx.x;
    const unsigned thread = threadIdx.x, lane = thread % WARP, token = blockIdx.z, part = blockIdx.y;
    const unsigned first = blockIdx.x * BLOCK_ROWS;
    float *sums_of_part = scratch + (token * PARTS + part) * HIDDEN + first;
#if SHARED_WIDTH
    // A warp takes SHARED_ROWS rows at a time, as many as there is shared memory for. The first of these codes need not
    // wait for what was routed.
    __shared__ __align__(16) __half activations[SHARED_WIDTH];
    const unsigned first_of_warp = thread / WARP * SHARED_ROWS;
    if (part == 0) load_shared<SHARED_ROWS>(staged, THREADS, first + first_of_warp, shared_codes);
#endif
    grid_dependency_wait();
    grid_launch_dependents();
#if SHARED_WIDTH
    if (part == 0) {
        stage_shared(r + token * R_STRIDE, activations, threadIdx.x, THREADS);
        const float gate = sigmoid(r[token * R_STRIDE + GATE_OFFSET]);
        __syncthreads();
#pragma unroll 1
        for (unsigned row = first_of_warp; row < BLOCK_ROWS; row += WARPS * SHARED_ROWS) {
            if (row != first_of_warp) load_shared<SHARED_ROWS>(staged, THREADS, first + row, shared_codes);
            copies_commit();
            SharedScales<SHARED_ROWS> scales;
            scales.load(first + row, shared_scales, shared_zero_points);
            copies_wait(0);
            float sums[SHARED_ROWS] = {};
            add_shared<SHARED_ROWS>(sums, staged, THREADS, first + row, gate, activations, shared_codes, scales);
            scatter_sums<SHARED_ROWS>(sums);
            if (lane % (WARP / SHARED_ROWS) == 0) sums_of_part[row + lane / (WARP / SHARED_ROWS)] = sums[0];
        }
    } else
#endif
    {
        const unsigned pair = token * USED + part - (PARTS - USED);
        const unsigned group = thread % GROUPS, step = thread / GROUPS;
        const bool present = THREADS == GROUPS * STEPS || step < STEPS;
        const unsigned row = first + group * GROUP, column = present ? step * STEP : 0;
        const long long *entry = table + experts[pair] * ADDRESSES;
        load_columns<HIDDEN>(staged, THREADS, (const uint4 *)entry[2], row, column, present);
        unsigned scales[GROUP / 4];
        load_scales<HIDDEN, WIDTH>(scales, (const unsigned char *)entry[3], row, column);
        const uint4 *activations = (const uint4 *)(act + pair * WIDTH + column);
        const uint4 x[2] = {activations[0], activations[1]};
        const float weight = weights[pair];
        float values[GROUP];
        multiply_columns(values, staged, THREADS, x, scales);
        scatter_sums<GROUP, WARP / 2, GROUPS>(values);
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) partial[thread / WARP][group * GROUP + lane / GROUPS * GROUPS + i] = values[i];
        __syncthreads();
        for (unsigned i = thread; i < BLOCK_ROWS; i += THREADS) {
            float sum = 0.0f;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) sum += partial[warp][i];
            sums_of_part[i] = weight * sum;
        }
    }
    __threadfence();
    __syncthreads();
    int *counter = counters + token * gridDim.x + blockIdx.x;
    if (thread == 0) is_last = atomicAdd(counter, 1) == PARTS - 1;
    __syncthreads();
    if (is_last) {
        __threadfence();
        const volatile float *parts = scratch + token * PARTS * HIDDEN + first;
        for (unsigned i = thread; i < BLOCK_ROWS; i += THREADS) {
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < PARTS; ++j) sum += parts[j * HIDDEN + i];
            out[token * HIDDEN + first + i] = __float2half(sum);
        }
        if (thread == 0) *counter = 0;
    }
}
