// Copies the experts that cache_route gave a slot from main memory into it. What it hands on, `fetched`, says nothing, but
// whoever takes it comes later. Grid: BLOCKS.
//
// Macros: ADDRESSES, BYTES_0 to BYTES_5 (bytes of an expert's arrays, multiples of 16), THREADS, BLOCKS,
// PIECES (of 16 bytes that a thread has under way).

#include "common.cuh"

#define STRETCH (THREADS * PIECES)

// 16-byte units of an expert's array, and in how many stretches they are copied.
__device__ __forceinline__ constexpr unsigned units_of(unsigned array) {
    constexpr unsigned SIZES[6] = {BYTES_0, BYTES_1, BYTES_2, BYTES_3, BYTES_4, BYTES_5};
    return SIZES[array] / 16;
}
__device__ __forceinline__ constexpr unsigned stretches_of(unsigned array) {
    return (units_of(array) + STRETCH - 1) / STRETCH;
}
__device__ __forceinline__ constexpr unsigned stretches_of_all() {
    unsigned stretches = 0;
    for (unsigned array = 0; array < ADDRESSES; ++array) stretches += stretches_of(array);
    return stretches;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    cache_fetch(const int *__restrict__ copies, int *__restrict__ fetched, const long long *__restrict__ home,
                const long long *__restrict__ slots) {
    constexpr unsigned STRETCHES = stretches_of_all();
    const unsigned thread = threadIdx.x;
    grid_dependency_wait();
    grid_launch_dependents();
    if (blockIdx.x == 0 && thread == 0) fetched[0] = 0;
    // A block takes stretches, so that its reads cross the bus in large pieces.
    const unsigned wanted = copies[0] * STRETCHES;
    for (unsigned i = blockIdx.x; i < wanted; i += BLOCKS) {
        const int *copy = copies + 1 + 2 * (i / STRETCHES);
        unsigned array = 0, stretch = i % STRETCHES;
        while (stretch >= stretches_of(array)) stretch -= stretches_of(array++);
        const unsigned units = units_of(array), first = stretch * STRETCH + thread;
        const uint4 *source = (const uint4 *)home[copy[0] * ADDRESSES + array] + first;
        uint4 *target = (uint4 *)slots[copy[1] * ADDRESSES + array] + first;
        uint4 pieces[PIECES];
#pragma unroll
        for (unsigned j = 0; j < PIECES; ++j)
            if (first + j * THREADS < units) pieces[j] = __ldcg(source + j * THREADS);
#pragma unroll
        for (unsigned j = 0; j < PIECES; ++j)
            if (first + j * THREADS < units) target[j * THREADS] = pieces[j];
    }
}
