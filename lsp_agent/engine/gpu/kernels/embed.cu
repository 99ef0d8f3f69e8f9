// Rows of the embedding as fp16. Grid: BATCH blocks. The table may lie in page-locked host memory.
//
// Macros: HIDDEN (a multiple of 8), THREADS, TYPE: F16, BF16 or F32, how the table is stored.

#include "common.cuh"

#define F16 0
#define BF16 1
#define F32 2

constexpr int GROUPS = HIDDEN / 8; // of eight columns
static_assert(HIDDEN % 8 == 0, "columns come in groups of 8");

__device__ __forceinline__ unsigned narrowed(unsigned word) {
#if TYPE == BF16
    return as_bits(__floats2half2_rn(bfloat16_to_float((unsigned short)word), bfloat16_to_float(word >> 16)));
#else
    return word;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) embed(const long long *ids, uint4 *out, const uint4 *table) {
    grid_dependency_wait();
    const long long row = ids[blockIdx.x];
    for (int group = threadIdx.x; group < GROUPS; group += THREADS) {
        uint4 bits;
#if TYPE == F32
        const uint4 *const from = table + (row * GROUPS + group) * 2;
        const uint4 low = __ldg(from), high = __ldg(from + 1);
        bits.x = as_bits(__floats2half2_rn(__uint_as_float(low.x), __uint_as_float(low.y)));
        bits.y = as_bits(__floats2half2_rn(__uint_as_float(low.z), __uint_as_float(low.w)));
        bits.z = as_bits(__floats2half2_rn(__uint_as_float(high.x), __uint_as_float(high.y)));
        bits.w = as_bits(__floats2half2_rn(__uint_as_float(high.z), __uint_as_float(high.w)));
#else
        bits = __ldg(table + row * GROUPS + group);
        bits.x = narrowed(bits.x), bits.y = narrowed(bits.y), bits.z = narrowed(bits.z), bits.w = narrowed(bits.w);
#endif
        out[blockIdx.x * GROUPS + group] = bits;
    }
}
