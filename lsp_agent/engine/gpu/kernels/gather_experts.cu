// The marked experts of a layer, wherever each lies, each at its place in arrays of all experts that ONNX Runtime's
// kernels read: from main memory, or from a slot in the GPU's.
//
// The grid is any; few blocks saturate the bus. `done` is 0, so that what is to come later can add it.
//
// Macros: EXPERTS, ADDRESSES (of a row of the table), PARTS (how many of them are copied), COLUMN_0 to COLUMN_3 (which)
// and BYTES_0 to BYTES_3 (of an expert, multiples of 16), MARKS (rows of `marks`, see mark_experts).

#include "common.cuh"

#define WORDS ((EXPERTS + 31) / 32)

constexpr int AT_ONCE = 4; // loads that a thread has on their way

extern "C" __global__ void gather_experts(const unsigned *__restrict__ marks, __half *__restrict__ done,
                                          const long long *__restrict__ table, const long long *__restrict__ targets) {
    constexpr int COLUMNS[4] = {COLUMN_0, COLUMN_1, COLUMN_2, COLUMN_3}, SIZES[4] = {BYTES_0, BYTES_1, BYTES_2, BYTES_3};
    __shared__ unsigned wanted[WORDS];
    const int thread = thread_rank(), threads = block_threads();
    grid_dependency_wait();
    for (int word = thread; word < WORDS; word += threads) {
        unsigned all = 0;
        for (int row = 0; row < MARKS; ++row) all |= marks[row * WORDS + word];
        wanted[word] = all;
    }
    __syncthreads();
    if (blockIdx.x == 0 && thread == 0) done[0] = __float2half(0.0f);
    for (int expert = blockIdx.x; expert < EXPERTS; expert += gridDim.x) {
        if (!(wanted[expert / 32] >> expert % 32 & 1u)) continue;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int chunks = SIZES[part] / 16;
            const uint4 *source = (const uint4 *)table[expert * ADDRESSES + COLUMNS[part]];
            uint4 *target = (uint4 *)targets[part] + (long long)expert * chunks;
            for (int first = thread; first < chunks; first += AT_ONCE * threads) {
                uint4 loaded[AT_ONCE];
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i)
                    if (first + i * threads < chunks) loaded[i] = __ldcg(source + first + i * threads);
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i)
                    if (first + i * threads < chunks) target[first + i * threads] = loaded[i];
            }
        }
    }
}
