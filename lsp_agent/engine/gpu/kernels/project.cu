// Products of up to four matrices, the segments, with the same activations of BATCH tokens: y = W x + bias.
//
// Work is divided into items, AT_ONCE rows of one segment each, of which a team of SPLIT warps takes several one after
// another. The weights of the first are asked for before the activations are there, the next ones' while it computes.
// How a warp multiplies is said in lanes.cuh, for few tokens, and in tiles.cuh, on the tensor cores.
//
// Macros: BATCH, COLUMNS, THREADS, BLOCKS (the grid), TENSOR_CORES (0 or 1), SPLIT (1 without), BUFFER (chunks that a
// lane holds), TERMS (4, 8 or 16), PADDING (see prologue.cuh), OUT_HALF, SEGMENTS; of each segment s: ROWS_s, BITS_s (4,
// 8, or 16: floats, [COLUMNS, ROWS]), BLOCK_s, SCALE_HALF_s, ZERO_s, CORRECTED_s, AT_ONCE_s; PROLOGUE, and what it needs
// (prologue.cuh): DELTA, WRITE_NORMED, EPSILON, HEAD, P_STRIDE, Z_OFFSET.

#include "common.cuh"
#include "prologue.cuh"
#include "segments.cuh"

#if OUT_HALF
typedef __half Out;
#else
typedef float Out;
#endif

#if TENSOR_CORES
#include "tiles.cuh"
#else
#include "lanes.cuh"
#endif

constexpr int TILES = MOST(tiles);
constexpr bool ONCE = ITEMS <= STRIDE && TILES == 1; // every warp has all of its work before the activations are there
static_assert(SPLIT == 1 || ITEMS <= STRIDE, "a team that adds up has one item");

// The biases of a block's first items, which come last of all.
__device__ __forceinline__ void prefetch_bias(const float *bias) {
#pragma unroll 1
    for (int row = threadIdx.x * WARP; row < ALL_ROWS; row += THREADS * WARP) prefetch_l2(bias + row);
}

#define SEGMENT_PARAMETERS(s)                                                                                          \
    , const unsigned char *codes_##s, const void *scales_##s, const unsigned char *zero_points_##s,                    \
        const void *corrections_##s
extern "C" __global__ void __launch_bounds__(THREADS)
project(
#if PROLOGUE == NORM
    const uint4 *residual,
#if DELTA
    const uint4 *delta,
#endif
#elif PROLOGUE == SWIGLU
    const float *p,
#elif PROLOGUE == PLAIN
    const float *y,
#else
    const float *y, const float *p,
#endif
    Out *out,
#if PROLOGUE == NORM && DELTA
    uint4 *sum,
#endif
#if PROLOGUE == NORM && WRITE_NORMED
    uint4 *normed,
#endif
    const float *norm_weight SEGMENT_PARAMETERS(0)
#if SEGMENTS > 1
    SEGMENT_PARAMETERS(1)
#endif
#if SEGMENTS > 2
    SEGMENT_PARAMETERS(2)
#endif
#if SEGMENTS > 3
    SEGMENT_PARAMETERS(3)
#endif
    , const float *bias) {
    DYNAMIC_SHARED(shared);
    uint4 *const x = (uint4 *)shared;
    const Weights weights[SEGMENTS] = {
        {codes_0, scales_0, zero_points_0, corrections_0},
#if SEGMENTS > 1
        {codes_1, scales_1, zero_points_1, corrections_1},
#endif
#if SEGMENTS > 2
        {codes_2, scales_2, zero_points_2, corrections_2},
#endif
#if SEGMENTS > 3
        {codes_3, scales_3, zero_points_3, corrections_3},
#endif
    };
    int item = blockIdx.x + BLOCKS * (threadIdx.x / WARP / SPLIT), tile = 0;
    Buffer buffer;
#define LOAD(S, s) load<S>(buffer, weights[s], item, 0)
    if (item < ITEMS) {
        BY_SEGMENT(item, LOAD);
    }
    if (bias) prefetch_bias(bias);
#if PROLOGUE == NORM || PROLOGUE == GATED_NORM
    NormWeight weight;
    weight.load(norm_weight);
#endif
    grid_launch_dependents(); // whose own weights may be on their way while this kernel computes
    grid_dependency_wait();
#if PROLOGUE == NORM
#if !DELTA
    const uint4 *const delta = nullptr;
    uint4 *const sum = nullptr;
#endif
#if !WRITE_NORMED
    uint4 *const normed = nullptr;
#endif
    prepare(x, residual, delta, weight, sum, normed);
#elif PROLOGUE == SWIGLU
    prepare(x, nullptr, p);
#elif PROLOGUE == PLAIN
    prepare(x, y, nullptr);
#elif PROLOGUE == GATE
    prepare(x, y, p);
#else
    prepare(x, y, p, weight);
#endif
    float sums[HELD_SUMS] = {};
    while (item < ITEMS) {
        int next_item = item + STRIDE, next_tile = 0;
#define COUNT_TILES(S, s) next_item = tile + 1 < S::tiles ? (next_tile = tile + 1, item) : next_item
        if (TILES > 1) {
            BY_SEGMENT(item, COUNT_TILES);
        }
        Buffer next;
#define LOAD_NEXT(S, s) load<S>(next, weights[s], next_item, next_tile)
        if (!ONCE && next_item < ITEMS) {
            BY_SEGMENT(next_item, LOAD_NEXT);
        }
#define COMPUTE(S, s) compute<S>(buffer, weights[s], x, item, tile, sums)
        BY_SEGMENT(item, COMPUTE);
        if (next_tile == 0) {
#define FINISH(S, s) finish<S>(out, bias, item, sums)
            BY_SEGMENT(item, FINISH);
#pragma unroll
            for (int i = 0; i < HELD_SUMS; ++i) sums[i] = 0.0f;
        }
        if (ONCE) break;
        buffer = next;
        item = next_item;
        tile = next_tile;
    }
#if SPLIT > 1
    __syncthreads(); // every team has had its one item
    item = blockIdx.x + BLOCKS * (threadIdx.x / WARP / SPLIT);
    if (item < ITEMS && threadIdx.x / WARP % SPLIT == 0) {
#define ADD_UP(S, s) add_up<S>(out, bias, item)
        BY_SEGMENT(item, ADD_UP);
    }
#endif
}
