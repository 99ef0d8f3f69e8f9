// The weighted sum of each token's routed experts, of 4- or 8-bit integers in CUTLASS' layout for mixed GEMMs, and of its
// shared expert.
//
// Grid: HIDDEN / (ROWS * WARPS) x BATCH. A warp owns ROWS rows of one token and of all its experts, so that nothing is
// summed across blocks; its lanes take the 16-byte chunks of the rows of one expert after the other.
//
// Macros: BATCH, USED (at most 32), HIDDEN, WIDTH, BITS, BLOCK, ZERO, ADDRESSES, ROWS, WARPS as of experts_up; those of
// shared_expert.cuh (SHARED_WIDTH 0: none). Dynamic shared memory: see below.

#include "codes.cuh"

#define COLUMNS WIDTH
#define CHUNKS (COLUMNS / CHUNK<BITS>)
#define BLOCKS (COLUMNS / BLOCK)
#define ITEMS ((USED * CHUNKS + WARP - 1) / WARP)
#define THREADS (WARPS * WARP)

static_assert(COLUMNS % 64 == 0 && COLUMNS % BLOCK == 0 && BLOCK % CHUNK<BITS> == 0, "columns come in whole chunks");

#include "expert_rows.cuh"

#define UNITS (ROWS * CHUNKS)
#define COPIES ((USED * UNITS + WARP - 1) / WARP)
// Copies come in two groups, so that the first experts are computed while the others are under way: how many are in the
// first, and from which item on the second is needed.
#define FIRST_COPIES (COPIES >= 3 ? COPIES / 2 + 1 : COPIES)
#define FIRST_ITEMS (FIRST_COPIES < COPIES ? FIRST_COPIES * WARP / UNITS * CHUNKS / WARP : 0)
static_assert(ROWS % INTERLEAVE == 0 && ROWS <= WARP && HIDDEN % (ROWS * WARPS) == 0, "a warp owns rows that lie together");
#if SHARED_WIDTH
#include "shared_expert.cuh"
#endif

// A lane's i-th chunk: whether there is one, of which of the token's experts, and which of the row. Of none, a valid place.
__device__ __forceinline__ bool is_item(unsigned i) {
    return USED * CHUNKS % WARP == 0 || i * WARP + threadIdx.x % WARP < USED * CHUNKS;
}
__device__ __forceinline__ unsigned used_of(unsigned i) { return is_item(i) ? (i * WARP + threadIdx.x % WARP) / CHUNKS : 0; }
__device__ __forceinline__ unsigned chunk_of(unsigned i) { return (i * WARP + threadIdx.x % WARP) % CHUNKS; }

extern "C" __global__ void __launch_bounds__(THREADS)
    experts_down(const __half *__restrict__ act, const int *__restrict__ experts, const float *__restrict__ weights,
                 const float *__restrict__ r, __half *__restrict__ out, const long long *__restrict__ table,
                 const uint4 *__restrict__ shared_codes, const void *__restrict__ shared_scales,
                 const unsigned char *__restrict__ shared_zero_points) {
    DYNAMIC_SHARED(dynamic); // of the block: activations, the shared expert's, codes, the shared expert's
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, token = blockIdx.y;
    const unsigned first = (blockIdx.x * WARPS + warp) * ROWS;
    uint4 *const activations = (uint4 *)dynamic, *const shared_activations = activations + USED * WIDTH / 8;
    uint4 *const codes_of_block = shared_activations + SHARED_WIDTH / 8;
    uint4 *const staged = codes_of_block + warp * USED * UNITS, *const target = staged + staged_unit(lane);
#if SHARED_WIDTH
    // These are the same whatever was routed, so they need not wait for it.
    uint4 *const staged_shared = codes_of_block + WARPS * USED * UNITS + threadIdx.x;
    load_shared<ROWS>(staged_shared, THREADS, first, shared_codes);
    copies_commit();
#endif
    grid_dependency_wait();
    // Addresses hang on two loads, so those of all experts are asked for together, by a lane each.
    const unsigned mine = token * USED + (lane < USED ? lane : 0);
    const long long *entry = table + experts[mine] * ADDRESSES;
    const long long codes = entry[2], scales = entry[3], points = ZERO ? entry[5] : 0;
    const float weight = weights[mine] * CODE_UNIT<BITS>;
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
        const unsigned unit = i * WARP + lane;
        const bool present = USED * UNITS % WARP == 0 || unit < USED * UNITS;
        const uint4 *item = (const uint4 *)__shfl_sync(FULL_WARP, codes, present ? unit / UNITS : 0);
        if (present) copy_async(target + i * WARP, item + first * CHUNKS + unit % UNITS);
        if (i == FIRST_COPIES - 1 || i == COPIES - 1) copies_commit();
    }
    float factors[ITEMS][ROWS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const __half *item = (const __half *)__shfl_sync(FULL_WARP, scales, used_of(i));
        const float share = __shfl_sync(FULL_WARP, weight, used_of(i));
#pragma unroll
        for (int row = 0; row < ROWS; ++row)
            factors[i][row] = is_item(i) ? share * __half2float(__ldg(item + scale_place(first + row, chunk_of(i)))) : 0.0f;
    }
    const uint4 *x = (const uint4 *)(act + token * USED * WIDTH);
    for (unsigned piece = threadIdx.x; piece < USED * WIDTH / 8; piece += THREADS) activations[swizzled<BITS>(piece)] = x[piece];
#if SHARED_WIDTH
    stage_shared(r + token * R_STRIDE, (__half *)shared_activations);
#endif
    __syncthreads();
    float sums[ROWS] = {};
#if SHARED_WIDTH
    copies_wait(FIRST_COPIES < COPIES ? 2 : 1);
    const float gate = sigmoid(r[token * R_STRIDE + GATE_OFFSET]);
    add_shared<ROWS>(sums, staged_shared, THREADS, first, gate, (const __half *)shared_activations, shared_codes, shared_scales,
                     shared_zero_points);
#endif
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const unsigned char *points_of_item = (const unsigned char *)(ZERO ? __shfl_sync(FULL_WARP, points, used_of(i)) : 0);
        __half2 x[CHUNK<BITS> / 2];
        read_activations<BITS>(x, activations, used_of(i) * CHUNKS + chunk_of(i));
        if (i == 0 || i == FIRST_ITEMS) {
            copies_wait(i == FIRST_ITEMS ? 0 : 1);
            __syncwarp();
        }
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            const uint4 loaded = staged[staged_chunk(used_of(i) * UNITS, row, chunk_of(i))];
            const Zero<BITS> zero = zero_of(points_of_item, first + row, chunk_of(i));
            sums[row] += factors[i][row] * dot_chunk<BITS>(loaded, x, zero);
        }
    }
    scatter_sums<ROWS>(sums);
    if (lane % (WARP / ROWS) == 0)
        out[token * HIDDEN + first + lane / (WARP / ROWS)] = __float2half(sums[0]);
}
