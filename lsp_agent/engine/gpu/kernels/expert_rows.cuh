// Where an expert's codes, scales and zero points lie that are stored by rows: INT4 and INT8.
// Expects BITS, CHUNKS and BLOCKS (of a row), BLOCK and ZERO to be defined.
#pragma once

#include "codes.cuh"

// Rows that alternate every 64 columns in the layout for Ampere, which ONNX Runtime uses on later GPUs too.
constexpr int INTERLEAVE = 16 / BITS;

// Chunk `chunk` of row `row`, in chunks: within INTERLEAVE rows, these alternate every 64 columns.
__device__ __forceinline__ int chunk_place(int row, int chunk) {
    constexpr int TILE = 64 / CHUNK<BITS>;
    const int group = row / INTERLEAVE, within = row % INTERLEAVE;
    return (group * CHUNKS + chunk / TILE * TILE) * INTERLEAVE + within * TILE + chunk % TILE;
}

__device__ __forceinline__ int scale_place(int row, int chunk) { return row * BLOCKS + chunk * CHUNK<BITS> / BLOCK; }

__device__ __forceinline__ Zero<BITS> zero_of(const unsigned char *points, int row, int chunk) {
    if (!ZERO) return Zero<BITS>(BITS == 4 ? 8 : 128);
    return Zero<BITS>(zero_point<BITS>(points, row, BLOCKS, chunk * CHUNK<BITS> / BLOCK));
}
