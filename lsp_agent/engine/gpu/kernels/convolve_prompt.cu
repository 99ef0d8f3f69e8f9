// The causal convolution of a prompt's tokens and its SiLU, for Gated DeltaNet: q, k and v apart, from rows of a wider
// projection.
//
// Grid: rows / TOKENS x groups of channels. A thread takes 8 channels of TOKENS rows, one after another. `rows` are all
// sequences' tokens, `length` each. `past` and `present` [sequences, CONV - 1, channels] are the tokens before, oldest
// first.
//
// Macros: TOKENS, CONV (the convolution's length), KEYS and VALUES (channels of q, of k, and of v; multiples of 8), STRIDE
// (of a row of p, which begins with q, k and v; a multiple of 8).

#include "common.cuh"

#define CHANNELS (2 * KEYS + VALUES)
#define BEFORE (CONV - 1)

constexpr int WIDTH = 8, AHEAD = 4; // channels of a thread, and rows that it loads at once

struct Channels {
    float values[WIDTH];
};

__device__ __forceinline__ Channels unpacked(uint4 packed) {
    Channels result;
    const __half2 *pairs = (const __half2 *)&packed;
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) {
        const float2 pair = __half22float2(pairs[i]);
        result.values[2 * i] = pair.x, result.values[2 * i + 1] = pair.y;
    }
    return result;
}

__device__ __forceinline__ uint4 packed(const Channels &channels) {
    uint4 result;
    __half2 *pairs = (__half2 *)&result;
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i)
        pairs[i] = __floats2half2_rn(channels.values[2 * i], channels.values[2 * i + 1]);
    return result;
}

extern "C" __global__ void convolve_prompt(const __half *__restrict__ p, const __half *__restrict__ past,
                                           __half *__restrict__ q, __half *__restrict__ k, __half *__restrict__ v,
                                           __half *__restrict__ present, const float *__restrict__ weight,
                                           const long long rows, const long long length) {
    const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
    grid_dependency_wait();
    if (channel >= CHANNELS) return;
    float taps[WIDTH][CONV];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
#pragma unroll
        for (int tap = 0; tap < CONV; ++tap) taps[i][tap] = weight[(channel + i) * CONV + tap];
    __half *target = channel < KEYS ? q : channel < 2 * KEYS ? k : v;
    const int width = channel < 2 * KEYS ? KEYS : VALUES;
    target += channel < KEYS ? channel : channel < 2 * KEYS ? channel - KEYS : channel - 2 * KEYS;

    const long long first = (long long)blockIdx.x * TOKENS, end = first + TOKENS < rows ? first + TOKENS : rows;
    Channels window[CONV]; // the last is the row's own
    for (long long start = first; start < end; start += AHEAD) {
        uint4 loaded[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (start + i < end) loaded[i] = *(const uint4 *)(p + (start + i) * STRIDE + channel);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const long long row = start + i;
            if (row >= end) break;
            const long long sequence = row / length, token = row % length;
            __half *window_after = present + sequence * BEFORE * CHANNELS + channel;
            if (token == 0 || row == first) {
                const __half *window_before = past + sequence * BEFORE * CHANNELS + channel;
#pragma unroll
                for (int j = 0; j < BEFORE; ++j) {
                    const long long there = token - BEFORE + j;
                    const __half *source = there < 0 ? window_before + (BEFORE + there) * CHANNELS
                                                     : p + (row - BEFORE + j) * STRIDE + channel;
                    window[j] = unpacked(*(const uint4 *)source);
                }
            }
            window[BEFORE] = unpacked(loaded[i]);
            Channels result;
#pragma unroll
            for (int c = 0; c < WIDTH; ++c) {
                float sum = 0.0f;
#pragma unroll
                for (int tap = 0; tap < CONV; ++tap) sum += taps[c][tap] * window[tap].values[c];
                result.values[c] = silu(sum);
            }
            *(uint4 *)(target + row * width) = packed(result);
#pragma unroll
            for (int j = 0; j < BEFORE; ++j) {
                window[j] = window[j + 1];
                if (token == length - 1) *(uint4 *)(window_after + j * CHANNELS) = packed(window[j]);
            }
        }
    }
}
