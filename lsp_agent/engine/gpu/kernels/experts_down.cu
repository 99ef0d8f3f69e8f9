// The weighted sum of each token's routed experts, of 4- or 8-bit integers in CUTLASS' layout for mixed GEMMs, and of its
// shared expert.
//
// Grid: HIDDEN / ROWS x BATCH. A block owns ROWS rows of one token, so that nothing is summed across blocks. Of its warps
// the first WARPS share the slices of the token's experts, the others the rows of the shared expert.
//
// Macros: BATCH, USED (at most 32), HIDDEN, WIDTH, BITS, BLOCK, ZERO, ADDRESSES as of experts_up; GROUPS (of INTERLEAVE
// rows), WARPS, RESIDENT (blocks that a multiprocessor should hold); SHARED_WARPS and those of shared_expert.cuh (SHARED_WIDTH 0: none). Dynamic shared memory: of each of the shared expert's warps its
// activations, then their codes.

#define COLUMNS WIDTH
#include "expert_slices.cuh"

#define TASKS (USED * SLICES)

static_assert(WARPS <= TASKS && HIDDEN % ROWS == 0 && ROWS <= WARP, "warps have a slice of an expert each");

#if SHARED_WIDTH
#include "shared_expert.cuh"
#define THREADS ((WARPS + SHARED_WARPS) * WARP)
#define PARTIALS (WARPS + 1)
#define SHARED_ROWS (ROWS / SHARED_WARPS)
static_assert(ROWS % SHARED_WARPS == 0, "the shared expert's warps have the same number of rows");
#else
#define THREADS (WARPS * WARP)
#define PARTIALS WARPS
#endif

struct Task {
    unsigned pair, slice;
    const void *codes, *scales, *points;
    float factor;
    // The next expert of `token` that the warp has; its addresses hang on two loads.
    __device__ __forceinline__ Task(unsigned token, unsigned task, const int *experts, const float *weights, const long long *table)
        : pair(token * USED + task / SLICES), slice(task % SLICES) {
        const long long *entry = table + experts[pair] * ADDRESSES;
        codes = (const void *)entry[2], scales = (const void *)entry[3], points = ZERO ? (const void *)entry[5] : nullptr;
        factor = weights[pair] * CODE_UNIT<BITS>;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    experts_down(const __half *__restrict__ act, const int *__restrict__ experts, const float *__restrict__ weights,
                 const float *__restrict__ r, __half *__restrict__ out, const long long *__restrict__ table,
                 const uint4 *__restrict__ shared_codes, const void *__restrict__ shared_scales,
                 const unsigned char *__restrict__ shared_zero_points) {
    __shared__ float partial[PARTIALS][ROWS];
    const unsigned warp = threadIdx.x / WARP, token = blockIdx.y, first = blockIdx.x * ROWS;
    grid_launch_dependents();
    if (warp < WARPS) {
        grid_dependency_wait();
        unsigned index = warp;
        Activations activations;
        activations.load(act + (token * USED + index / SLICES) * WIDTH, index % SLICES);
        Codes codes;
        float sums[GROUPS] = {};
        {
            const Task task(token, index, experts, weights, table);
            codes.load(task.codes, task.scales, task.points, first, task.slice);
            codes.multiply(sums, activations, task.slice, task.factor);
        }
        if (TASKS > WARPS)
            while ((index += WARPS) < TASKS) {
                const Task task(token, index, experts, weights, table);
                activations.load(act + task.pair * WIDTH, task.slice);
                codes.load(task.codes, task.scales, task.points, first, task.slice);
                codes.multiply(sums, activations, task.slice, task.factor);
            }
        store_sums(partial[warp], sums);
    }
#if SHARED_WIDTH
    else {
        DYNAMIC_SHARED(dynamic);
        const unsigned lane = threadIdx.x % WARP, part = warp - WARPS, row = first + part * SHARED_ROWS;
        __half *const activations = (__half *)dynamic + part * SHARED_WIDTH;
        uint4 *const staged = (uint4 *)((__half *)dynamic + SHARED_WARPS * SHARED_WIDTH) + part * WARP * shared_units(SHARED_ROWS) + lane;
        load_shared<SHARED_ROWS>(staged, WARP, row, shared_codes); // these are the same whatever was routed
        copies_commit();
        SharedScales<SHARED_ROWS> scales;
        scales.load(row, shared_scales, shared_zero_points);
        grid_dependency_wait();
        const float gate = sigmoid(r[token * R_STRIDE + GATE_OFFSET]);
        stage_shared(r + token * R_STRIDE, activations, lane, WARP);
        copies_wait(0);
        __syncwarp();
        float sums[SHARED_ROWS] = {};
        add_shared<SHARED_ROWS>(sums, staged, WARP, row, gate, activations, shared_codes, scales);
        scatter_sums<SHARED_ROWS>(sums);
        if (lane % (WARP / SHARED_ROWS) == 0) partial[WARPS][part * SHARED_ROWS + lane / (WARP / SHARED_ROWS)] = sums[0];
    }
#endif
    __syncthreads();
    if (threadIdx.x < ROWS) {
        float sum = 0.0f;
#pragma unroll
        for (unsigned i = 0; i < PARTIALS; ++i) sum += partial[i][threadIdx.x];
        out[token * HIDDEN + first + threadIdx.x] = __float2half(sum);
    }
}
