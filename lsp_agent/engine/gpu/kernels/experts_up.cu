// silu(gate) * up of each token's routed experts, of 4- or 8-bit integers in CUTLASS' layout for mixed GEMMs.
//
// Grid: 2 * WIDTH / (ROWS * WARPS) x BATCH * USED. A warp owns ROWS rows (gate and up alternate) of one token's expert,
// asks for all of their codes at once and keeps the token's activations in registers.
//
// Macros: BATCH, USED, HIDDEN, WIDTH, BITS, BLOCK (columns of a scale), ZERO (with zero points), ADDRESSES (of an expert, in
// `table`), ROWS (2, 4, 8), WARPS. Dynamic shared memory: a warp's codes.

#include "codes.cuh"

#define COLUMNS HIDDEN
#define CHUNKS (COLUMNS / CHUNK<BITS>)
#define LANE_CHUNKS ((CHUNKS + WARP - 1) / WARP)
#define BLOCKS (COLUMNS / BLOCK)
#define THREADS (WARPS * WARP)

static_assert(COLUMNS % 64 == 0 && COLUMNS % BLOCK == 0 && BLOCK % CHUNK<BITS> == 0, "columns come in whole chunks");
static_assert(ROWS % 2 == 0 && ROWS <= 8 && 2 * WIDTH % (ROWS * WARPS) == 0, "a warp owns pairs of gate and up");

#include "expert_rows.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    experts_up(const __half *__restrict__ normed, const int *__restrict__ experts, __half *__restrict__ act,
               const long long *__restrict__ table) {
    DYNAMIC_SHARED(dynamic);
    uint4 *staged = (uint4 *)dynamic + threadIdx.x;
    const int lane = lane_index(), pair = blockIdx.y, first = (blockIdx.x * WARPS + warp_index()) * ROWS;
    grid_dependency_wait();
    const long long *entry = table + (long long)experts[pair] * ADDRESSES;
    const uint4 *codes = (const uint4 *)entry[0];
    const __half *scales = (const __half *)entry[1];
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
#pragma unroll
        for (int i = 0; i < LANE_CHUNKS; ++i) {
            const int chunk = i * WARP + lane;
            const bool present = CHUNKS % WARP == 0 || chunk < CHUNKS;
            copy_async(staged + (row * LANE_CHUNKS + i) * THREADS, codes + chunk_place(first + row, present ? chunk : 0), present);
        }
        copies_commit();
    }
    float factors[ROWS][LANE_CHUNKS];
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
#pragma unroll
        for (int i = 0; i < LANE_CHUNKS; ++i) {
            const int chunk = i * WARP + lane;
            const bool present = CHUNKS % WARP == 0 || chunk < CHUNKS;
            factors[row][i] = present ? __half2float(__ldg(scales + scale_place(first + row, chunk))) : 0.0f;
        }
    __half2 x[LANE_CHUNKS][CHUNK<BITS> / 2];
#pragma unroll
    for (int i = 0; i < LANE_CHUNKS; ++i) {
        const int chunk = i * WARP + lane;
        const bool present = CHUNKS % WARP == 0 || chunk < CHUNKS;
        const uint4 *pieces = (const uint4 *)(normed + (long long)(pair / USED) * COLUMNS) + (present ? chunk : 0) * (CHUNK<BITS> / 8);
#pragma unroll
        for (int piece = 0; piece < CHUNK<BITS> / 8; ++piece) unpack_activations(x[i] + 4 * piece, pieces[piece]);
    }
    float sums[ROWS] = {};
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        copies_wait(ROWS - 1 - row);
#pragma unroll
        for (int i = 0; i < LANE_CHUNKS; ++i) {
            const int chunk = i * WARP + lane;
            const bool present = CHUNKS % WARP == 0 || chunk < CHUNKS;
            const Zero<BITS> zero = zero_of((const unsigned char *)(ZERO ? entry[4] : 0), first + row, present ? chunk : 0);
            sums[row] += factors[row][i] * dot_chunk<BITS>(staged[(row * LANE_CHUNKS + i) * THREADS], x[i], zero);
        }
    }
    scatter_sums<ROWS>(sums);
    const float other = __shfl_xor_sync(FULL_WARP, sums[0], WARP / ROWS);
    if (lane % (2 * WARP / ROWS) == 0)
        act[(long long)pair * WIDTH + (first + lane / (WARP / ROWS)) / 2] =
            __float2half(silu(sums[0] * CODE_UNIT<BITS>) * (other * CODE_UNIT<BITS>));
}
