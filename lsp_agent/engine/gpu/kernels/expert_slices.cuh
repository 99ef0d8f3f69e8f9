// A warp's part of an expert's matrix of 4- or 8-bit integers in CUTLASS' layout for mixed GEMMs, from memory to sums.
//
// INTERLEAVE rows, a group, lie together: they alternate every 64 columns. A line of 8 units of 16 bytes holds TILE units
// of each. A warp reads lines in the order of memory, straight into registers, 4 at a time: so a lane always meets the
// same row of a group, and, of as many columns as a slice has, the same ones of every group, whose activations it holds.
// Expects BITS, COLUMNS, BLOCK, ZERO and GROUPS (of a warp, 1, 2, 4 or 8) to be defined.
#pragma once

#include "codes.cuh"

static_assert(COLUMNS % 64 == 0 && COLUMNS % BLOCK == 0 && BLOCK % CHUNK<BITS> == 0, "columns come in whole chunks");
static_assert(GROUPS == 1 || GROUPS == 2 || GROUPS == 4 || GROUPS == 8, "a warp's lanes share the sums out");

constexpr unsigned INTERLEAVE = 16 / BITS, TILE = 64 / CHUNK<BITS>;
constexpr unsigned ROWS = GROUPS * INTERLEAVE, CHUNKS = COLUMNS / CHUNK<BITS>, SCALES = COLUMNS / BLOCK; // of a row
constexpr unsigned UNITS = INTERLEAVE * CHUNKS;                                                          // of a group
constexpr unsigned LOADS = (UNITS + WARP - 1) / WARP, HELD = LOADS < 2 ? LOADS : 2; // of a lane: of a group, of a slice
constexpr unsigned SLICES = (LOADS + HELD - 1) / HELD;

// Where a lane's i-th unit of a slice lies in each group, whether there is one, and which chunk of its row it is.
__device__ __forceinline__ unsigned unit_of(unsigned slice, unsigned i) { return (slice * HELD + i) * WARP + threadIdx.x % WARP; }
__device__ __forceinline__ bool is_unit(unsigned unit) { return UNITS % (HELD * WARP) == 0 || unit < UNITS; }
__device__ __forceinline__ unsigned chunk_of(unsigned unit) { return unit / 8 * TILE + unit % TILE; }
__device__ __forceinline__ unsigned row_of_lane() { return threadIdx.x % 8 / TILE; }

struct Activations {
    __half2 x[HELD][CHUNK<BITS> / 2];
    // Of one token, [COLUMNS].
    __device__ __forceinline__ void load(const __half *activations, unsigned slice) {
#pragma unroll
        for (unsigned i = 0; i < HELD; ++i) {
            const unsigned unit = unit_of(slice, i);
            const uint4 *pieces = (const uint4 *)(activations + (is_unit(unit) ? chunk_of(unit) : 0) * CHUNK<BITS>);
#pragma unroll
            for (unsigned piece = 0; piece < CHUNK<BITS> / 8; ++piece) unpack_activations(x[i] + 4 * piece, load_streamed(pieces + piece));
        }
    }
};

struct Codes {
    uint4 codes[GROUPS][HELD];
    unsigned short scales[GROUPS][HELD];
    unsigned char points[GROUPS][HELD];
    // Of ROWS rows from `first` on.
    __device__ __forceinline__ void load(const void *from, const void *their_scales, const void *their_points, unsigned first, unsigned slice) {
#pragma unroll
        for (unsigned group = 0; group < GROUPS; ++group)
#pragma unroll
            for (unsigned i = 0; i < HELD; ++i) {
                const unsigned unit = is_unit(unit_of(slice, i)) ? unit_of(slice, i) : 0;
                codes[group][i] = load_streamed((const uint4 *)from + (first / INTERLEAVE + group) * UNITS + unit);
            }
#pragma unroll
        for (unsigned group = 0; group < GROUPS; ++group)
#pragma unroll
            for (unsigned i = 0; i < HELD; ++i) {
                const unsigned unit = is_unit(unit_of(slice, i)) ? unit_of(slice, i) : 0;
                const unsigned row = first + group * INTERLEAVE + row_of_lane(), block = chunk_of(unit) * CHUNK<BITS> / BLOCK;
                scales[group][i] = load_streamed((const unsigned short *)their_scales + row * SCALES + block);
                if (ZERO) points[group][i] = zero_point<BITS>((const unsigned char *)their_points, row, SCALES, block);
            }
    }
    // Add a lane's share of the products, one row of each group, times `factor`.
    __device__ __forceinline__ void multiply(float (&sums)[GROUPS], const Activations &activations, unsigned slice, float factor) const {
#pragma unroll
        for (unsigned group = 0; group < GROUPS; ++group)
#pragma unroll
            for (unsigned i = 0; i < HELD; ++i) {
                const Zero<BITS> zero(ZERO ? points[group][i] : BITS == 4 ? 8 : 128);
                const float scale = __half2float(__ushort_as_half(scales[group][i])) * factor;
                const float product = dot_chunk<BITS>(codes[group][i], activations.x[i], zero);
                sums[group] += is_unit(unit_of(slice, i)) ? scale * product : 0.0f;
            }
    }
};

// The sums of a warp's rows, over its lanes, to `total` [ROWS].
__device__ __forceinline__ void store_sums(float *total, float (&sums)[GROUPS]) {
    constexpr unsigned LINES = WARP / 8, KEPT = GROUPS > LINES ? GROUPS / LINES : 1, LANES = WARP * KEPT / GROUPS;
    const unsigned lane = threadIdx.x % WARP;
    scatter_sums<GROUPS, WARP / 2, 8>(sums); // lanes that differ in their line
#pragma unroll
    for (unsigned i = 0; i < KEPT; ++i) {
        float sum = sums[i];
#pragma unroll
        for (unsigned offset = TILE / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, offset);
        if (lane % TILE == 0 && lane % LANES < 8) total[(lane / LANES * KEPT + i) * INTERLEAVE + row_of_lane()] = sum;
    }
}
