// Where an expert's codes, scales and zero points lie that are stored by rows: INT4 and INT8.
// Expects BITS, CHUNKS and BLOCKS (of a row), BLOCK and ZERO to be defined.
#pragma once

#include "codes.cuh"

// Rows that alternate every 64 columns in the layout for Ampere, which ONNX Runtime uses on later GPUs too.
constexpr unsigned INTERLEAVE = 16 / BITS;

// A warp's rows lie together, so its lanes copy them in order. Within INTERLEAVE rows these alternate every 64 columns: 8
// units of 16 bytes, a line, hold TILE units of each. In shared memory a line is permuted by its number, so that lanes
// which read neighbouring chunks of one row hit different banks.
constexpr unsigned TILE = 64 / CHUNK<BITS>;

// Where the lane's unit of each 32 goes.
__device__ __forceinline__ unsigned staged_unit(unsigned lane) { return lane ^ lane / 8 % INTERLEAVE * TILE; }

// Where chunk `chunk` of the warp's row `row` is then, if the rows begin at unit `start`.
__device__ __forceinline__ unsigned staged_chunk(unsigned start, unsigned row, unsigned chunk) {
    const unsigned line = (start + row / INTERLEAVE * INTERLEAVE * CHUNKS) / 8 + chunk / TILE;
    return line * 8 + chunk % TILE + (row % INTERLEAVE * TILE ^ line % INTERLEAVE * TILE);
}

// The place of a row's scale for the chunk.
__device__ __forceinline__ unsigned scale_place(unsigned row, unsigned chunk) {
    return row * BLOCKS + chunk * CHUNK<BITS> / BLOCK;
}

__device__ __forceinline__ Zero<BITS> zero_of(const unsigned char *points, unsigned row, unsigned chunk) {
    if (!ZERO) return Zero<BITS>(BITS == 4 ? 8 : 128);
    return Zero<BITS>(zero_point<BITS>(points, row, BLOCKS, chunk * CHUNK<BITS> / BLOCK));
}
