// Each head's RMS norm of a prompt's tokens, times SiLU of its gate, which lies in rows of a wider projection.
//
// Grid: a block for each row. Macros: WARPS, HEADS, HEAD (a multiple of 4), OFFSET and STRIDE (of the gates in p: where
// they begin in a row, and a row; multiples of 4), EPSILON.

#include "common.cuh"

constexpr int WIDTH = 4; // a lane's elements at once

__device__ __forceinline__ float4 halves(const __half *address) {
    const uint2 loaded = *(const uint2 *)address;
    const __half2 *pairs = (const __half2 *)&loaded;
    const float2 low = __half22float2(pairs[0]), high = __half22float2(pairs[1]);
    return make_float4(low.x, low.y, high.x, high.y);
}

extern "C" __global__ void __launch_bounds__(WARPS *WARP)
    gate_prompt(const __half *__restrict__ y, const __half *__restrict__ p, __half *__restrict__ result,
                const float *__restrict__ weight, const long long, const long long) {
    constexpr int STEPS = (HEAD + WARP * WIDTH - 1) / (WARP * WIDTH);
    const long long row = blockIdx.x;
    grid_dependency_wait();
    for (int head = warp_index(); head < HEADS; head += WARPS) {
        const __half *source = y + (row * HEADS + head) * HEAD, *gates = p + row * STRIDE + OFFSET + head * HEAD;
        float4 values[STEPS];
        float squares = 0.0f;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int i = (step * WARP + lane_index()) * WIDTH;
            values[step] = i < HEAD ? halves(source + i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            const float4 x = values[step];
            squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
        }
        const float factor = rsqrtf(warp_sum(squares) / HEAD + EPSILON);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int i = (step * WARP + lane_index()) * WIDTH;
            if (i >= HEAD) continue;
            const float4 x = values[step], z = halves(gates + i), w = *(const float4 *)(weight + i);
            uint2 packed;
            ((__half2 *)&packed)[0] = __floats2half2_rn(x.x * factor * w.x * silu(z.x), x.y * factor * w.y * silu(z.y));
            ((__half2 *)&packed)[1] = __floats2half2_rn(x.z * factor * w.z * silu(z.z), x.w * factor * w.w * silu(z.w));
            *(uint2 *)(result + (row * HEADS + head) * HEAD + i) = packed;
        }
    }
}
