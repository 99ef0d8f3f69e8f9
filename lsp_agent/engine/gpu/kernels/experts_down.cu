// The weighted sum of each token's routed experts, of 4- or 8-bit integers in CUTLASS' layout for mixed GEMMs, and of its
// shared expert.
//
// Grid: HIDDEN / (ROWS * WARPS) x BATCH. A warp owns ROWS rows of one token and of all its experts, so that nothing is
// summed across blocks; its lanes take the 16-byte chunks of the rows of one expert after the other.
//
// Macros: BATCH, USED (at most 32), HIDDEN, WIDTH, BITS, BLOCK, ZERO, ADDRESSES, ROWS (1, 2, 4, 8), WARPS as of experts_up; those of
// shared_expert.cuh (SHARED_WIDTH 0: none). Dynamic shared memory: a warp's codes.

#include "codes.cuh"

#define COLUMNS WIDTH
#define CHUNKS (COLUMNS / CHUNK<BITS>)
#define BLOCKS (COLUMNS / BLOCK)
#define ITEMS ((USED * CHUNKS + WARP - 1) / WARP)
#define THREADS (WARPS * WARP)

static_assert(COLUMNS % 64 == 0 && COLUMNS % BLOCK == 0 && BLOCK % CHUNK<BITS> == 0, "columns come in whole chunks");
static_assert(ROWS <= 8 && HIDDEN % (ROWS * WARPS) == 0, "a warp owns whole rows");

#include "expert_rows.cuh"
#if SHARED_WIDTH
#include "shared_expert.cuh"
#endif

// A lane's i-th chunk: whether there is one, of which of the token's experts, and which of the row. Of none, a valid place.
__device__ __forceinline__ bool is_item(int i) { return USED * CHUNKS % WARP == 0 || i * WARP + lane_index() < USED * CHUNKS; }
__device__ __forceinline__ int used_of(int i) { return is_item(i) ? (i * WARP + lane_index()) / CHUNKS : 0; }
__device__ __forceinline__ int chunk_of(int i) { return (i * WARP + lane_index()) % CHUNKS; }

extern "C" __global__ void __launch_bounds__(THREADS)
    experts_down(const __half *__restrict__ act, const int *__restrict__ experts, const float *__restrict__ weights,
                 const float *__restrict__ r, __half *__restrict__ out, const long long *__restrict__ table,
                 const uint4 *__restrict__ shared_codes, const void *__restrict__ shared_scales,
                 const unsigned char *__restrict__ shared_zero_points) {
    __shared__ uint4 activations[USED * WIDTH / 8];
    DYNAMIC_SHARED(dynamic);
    uint4 *staged = (uint4 *)dynamic + threadIdx.x;
    const int lane = lane_index(), token = blockIdx.y, first = (blockIdx.x * WARPS + warp_index()) * ROWS;
#if SHARED_WIDTH
    // These are the same whatever was routed, so they need not wait for it.
    uint4 *const staged_shared = staged + ROWS * ITEMS * THREADS;
    load_shared<ROWS>(staged_shared, THREADS, first, shared_codes);
    copies_commit();
#endif
    grid_dependency_wait();
    // Addresses hang on two loads, so those of all experts are asked for together, by a lane each.
    const int mine = token * USED + (lane < USED ? lane : 0);
    const long long *entry = table + (long long)experts[mine] * ADDRESSES;
    const long long codes = entry[2], scales = entry[3], points = ZERO ? entry[5] : 0;
    const float weight = weights[mine] * CODE_UNIT<BITS>;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const uint4 *item = (const uint4 *)__shfl_sync(FULL_WARP, codes, used_of(i));
#pragma unroll
        for (int row = 0; row < ROWS; ++row)
            copy_async(staged + (i * ROWS + row) * THREADS, item + chunk_place(first + row, chunk_of(i)), is_item(i));
        copies_commit();
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
    const uint4 *x = (const uint4 *)(act + (long long)token * USED * WIDTH);
    for (int piece = threadIdx.x; piece < USED * WIDTH / 8; piece += THREADS) activations[swizzled<BITS>(piece)] = x[piece];
#if SHARED_WIDTH
    __shared__ __align__(16) __half shared_activations[SHARED_WIDTH];
    stage_shared(r + token * R_STRIDE, shared_activations);
#endif
    __syncthreads();
    float sums[ROWS] = {};
#if SHARED_WIDTH
    copies_wait(ITEMS < 8 ? ITEMS : 7);
    const float gate = sigmoid(r[token * R_STRIDE + GATE_OFFSET]);
    add_shared<ROWS>(sums, staged_shared, THREADS, first, gate, shared_activations, shared_codes, shared_scales,
                     shared_zero_points);
#endif
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const unsigned char *points_of_item = (const unsigned char *)(ZERO ? __shfl_sync(FULL_WARP, points, used_of(i)) : 0);
        __half2 x[CHUNK<BITS> / 2];
        read_activations<BITS>(x, activations, used_of(i) * CHUNKS + chunk_of(i));
        copies_wait(ITEMS - 1 - i < 8 ? ITEMS - 1 - i : 7);
#pragma unroll
        for (int row = 0; row < ROWS; ++row)
            sums[row] += factors[i][row] *
                         dot_chunk<BITS>(staged[(i * ROWS + row) * THREADS], x, zero_of(points_of_item, first + row, chunk_of(i)));
    }
    scatter_sums<ROWS>(sums);
    if (lane % (WARP / ROWS) == 0)
        out[(long long)token * HIDDEN + first + lane / (WARP / ROWS)] = __float2half(sums[0]);
}
