// silu(gate) * up of each token's routed experts, of 4- or 8-bit integers in CUTLASS' layout for mixed GEMMs.
//
// Grid: 2 * WIDTH / (ROWS * WARPS) x BATCH * USED. A warp owns ROWS rows (gate and up alternate) of one token's expert,
// asks for all of their codes at once and keeps the token's activations in registers.
//
// Macros: BATCH, USED, HIDDEN, WIDTH, BITS, BLOCK (columns of a scale), ZERO (with zero points), ADDRESSES (of an expert, in
// `table`), ROWS (a multiple of INTERLEAVE), WARPS, ROUTED (1: it also does what route does, with EXPERTS, R_STRIDE and
// NORMALISE), CACHED (1: cache_route has chosen, and cache_fetch runs beside). Dynamic shared memory: the codes of a block.

#include "codes.cuh"
#if ROUTED
#include "routing.cuh"
#elif CACHED
#define PAIRS (BATCH * USED)
#include "coming.cuh"
#endif

#define COLUMNS HIDDEN
#define CHUNKS (COLUMNS / CHUNK<BITS>)
#define LANE_CHUNKS ((CHUNKS + WARP - 1) / WARP)
#define BLOCKS (COLUMNS / BLOCK)
#define THREADS (WARPS * WARP)

static_assert(COLUMNS % 64 == 0 && COLUMNS % BLOCK == 0 && BLOCK % CHUNK<BITS> == 0, "columns come in whole chunks");

#include "expert_rows.cuh"

#define UNITS (ROWS * CHUNKS)
#define COPIES ((UNITS + WARP - 1) / WARP)
// Rows that lie together are a group of copies each, so that the first are computed while the last are under way.
#define GROUPS (INTERLEAVE * CHUNKS % WARP == 0 ? ROWS / INTERLEAVE : 1)
static_assert(ROWS % INTERLEAVE == 0 && ROWS <= 8 * INTERLEAVE && ROWS <= WARP && 2 * WIDTH % (ROWS * WARPS) == 0,
              "a warp owns rows that lie together, pairs of gate and up");

extern "C" __global__ void __launch_bounds__(THREADS)
#if ROUTED
    experts_up(const __half *__restrict__ normed, const float *__restrict__ r, __half *__restrict__ act, int *__restrict__ experts,
               float *__restrict__ weights, const long long *__restrict__ table) {
#elif CACHED
    experts_up(const __half *__restrict__ normed, const int *__restrict__ experts, const int *__restrict__ copies,
               const int *, __half *__restrict__ act, const long long *__restrict__ table) {
#else
    experts_up(const __half *__restrict__ normed, const int *__restrict__ experts, __half *__restrict__ act,
               const long long *__restrict__ table) {
#endif
    DYNAMIC_SHARED(dynamic);
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, pair = blockIdx.y;
    const unsigned first = (blockIdx.x * WARPS + warp) * ROWS;
    uint4 *staged = (uint4 *)dynamic + warp * UNITS, *target = staged + staged_unit(lane);
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
    const uint4 *codes = (const uint4 *)entry[0] + first * CHUNKS + lane;
    const __half *scales = (const __half *)entry[1] + first * BLOCKS;
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
        if (UNITS % WARP == 0 || i * WARP + lane < UNITS) copy_async(target + i * WARP, codes + i * WARP);
        if ((i + 1) % (COPIES / GROUPS) == 0) copies_commit();
    }
    float factors[ROWS][LANE_CHUNKS];
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
#pragma unroll
        for (int i = 0; i < LANE_CHUNKS; ++i) {
            const unsigned chunk = i * WARP + lane;
            const bool present = CHUNKS % WARP == 0 || chunk < CHUNKS;
            factors[row][i] = present ? __half2float(__ldg(scales + scale_place(row, chunk))) : 0.0f;
        }
    __half2 x[LANE_CHUNKS][CHUNK<BITS> / 2];
#pragma unroll
    for (int i = 0; i < LANE_CHUNKS; ++i) {
        const unsigned chunk = i * WARP + lane;
        const bool present = CHUNKS % WARP == 0 || chunk < CHUNKS;
        const uint4 *pieces = (const uint4 *)(normed + pair / USED * COLUMNS) + (present ? chunk : 0) * (CHUNK<BITS> / 8);
#pragma unroll
        for (int piece = 0; piece < CHUNK<BITS> / 8; ++piece) unpack_activations(x[i] + 4 * piece, pieces[piece]);
    }
    float sums[ROWS] = {};
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        if (row % (ROWS / GROUPS) == 0) {
            copies_wait(GROUPS - 1 - row / (ROWS / GROUPS));
            __syncwarp();
        }
#pragma unroll
        for (int i = 0; i < LANE_CHUNKS; ++i) {
            const unsigned chunk = i * WARP + lane;
            const bool present = CHUNKS % WARP == 0 || chunk < CHUNKS;
            const uint4 loaded = staged[staged_chunk(0, row, present ? chunk : 0)];
            const Zero<BITS> zero = zero_of((const unsigned char *)(ZERO ? entry[4] : 0), first + row, present ? chunk : 0);
            sums[row] += factors[row][i] * dot_chunk<BITS>(loaded, x[i], zero);
        }
    }
#if CACHED
    grid_dependency_wait(); // before anything is written
#endif
    scatter_sums<ROWS>(sums);
    const float other = __shfl_xor_sync(FULL_WARP, sums[0], WARP / ROWS);
    if (lane % (2 * WARP / ROWS) == 0)
        act[pair * WIDTH + (first + lane / (WARP / ROWS)) / 2] =
            __float2half(silu(sums[0] * CODE_UNIT<BITS>) * (other * CODE_UNIT<BITS>));
}
