// How `project` gets the activations that its matrices are multiplied with: from global memory, through a norm or a
// gate, to shared memory as fp16. Every block does it for itself, all out of L2.
//
// Eight consecutive columns are a group, one uint4, paired as the codes' nibbles are (see common.cuh): columns
// (0, 4), (1, 5), (2, 6), (3, 7).
#pragma once

#include "common.cuh"

#define PLAIN 0
#define NORM 1
#define GATED_NORM 2
#define GATE 3
#define SWIGLU 4

constexpr int GROUP = 8;
constexpr int GROUPS = COLUMNS / GROUP; // of one token
static_assert(COLUMNS % GROUP == 0, "columns come in groups of 8");

constexpr int PLACES = (GROUPS + 3) / 4 * 4; // of one token in shared memory

// Where a token's group lies: moved within its eighth so that lanes that read every second or fourth group, as they do
// beside 16 bytes of codes, meet no bank twice.
__device__ __forceinline__ int place_of(int group) { return group ^ (group >> 3 & 3); }

__device__ __forceinline__ uint4 paired(const float (&v)[GROUP]) {
    uint4 bits;
    bits.x = as_bits(__floats2half2_rn(v[0], v[4]));
    bits.y = as_bits(__floats2half2_rn(v[1], v[5]));
    bits.z = as_bits(__floats2half2_rn(v[2], v[6]));
    bits.w = as_bits(__floats2half2_rn(v[3], v[7]));
    return bits;
}

__device__ __forceinline__ uint4 in_order(const float (&v)[GROUP]) {
    uint4 bits;
    bits.x = as_bits(__floats2half2_rn(v[0], v[1]));
    bits.y = as_bits(__floats2half2_rn(v[2], v[3]));
    bits.z = as_bits(__floats2half2_rn(v[4], v[5]));
    bits.w = as_bits(__floats2half2_rn(v[6], v[7]));
    return bits;
}

__device__ __forceinline__ void unpack(uint4 bits, float (&v)[GROUP]) {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = half_bits_to_float2(words[i]);
        v[2 * i] = pair.x;
        v[2 * i + 1] = pair.y;
    }
}

__device__ __forceinline__ void load_group(const float *from, float (&v)[GROUP]) {
    const float4 low = __ldcg((const float4 *)from), high = __ldcg((const float4 *)from + 1);
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

#if PROLOGUE == NORM

constexpr int TURNS = (GROUPS + THREADS - 1) / THREADS; // of each thread over a token's groups

// The norm's weights of a thread's groups, loaded before the activations are there; of long rows only the first ones.
struct NormWeight {
    static constexpr int HELD = TURNS < 2 ? TURNS : 2;
    float held[HELD][GROUP];
    const float *all;
    __device__ __forceinline__ void load(const float *weight) {
        all = weight;
#pragma unroll
        for (int turn = 0; turn < HELD; ++turn) {
            const int group = threadIdx.x + turn * THREADS;
            if (group < GROUPS) load_group(weight + GROUP * group, held[turn]);
        }
    }
    __device__ __forceinline__ void scale(int turn, float factor, float (&v)[GROUP]) const {
        float w[GROUP];
        if (turn >= HELD) load_group(all + GROUP * (threadIdx.x + turn * THREADS), w);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) v[i] *= factor * (turn < HELD ? held[turn < HELD ? turn : 0][i] : w[i]);
    }
};

// The RMS norm of residual + delta, which is rounded to fp16 first. The first block hands both over.
__device__ __forceinline__ void prepare(uint4 *x, const uint4 *residual, const uint4 *delta,
                                        const NormWeight &weight, uint4 *sum, uint4 *normed) {
    float squares[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
        squares[b] = 0.0f;
        for (int group = threadIdx.x; group < GROUPS; group += THREADS) {
            uint4 bits = __ldcg(residual + b * GROUPS + group);
            float v[GROUP];
            unpack(bits, v);
#if DELTA
            float other[GROUP];
            unpack(__ldcg(delta + b * GROUPS + group), other);
#pragma unroll
            for (int i = 0; i < GROUP; ++i) v[i] += other[i];
            bits = in_order(v);
            unpack(bits, v);
            if (blockIdx.x == 0) sum[b * GROUPS + group] = bits;
#endif
            x[b * PLACES + place_of(group)] = bits;
#pragma unroll
            for (int i = 0; i < GROUP; ++i) squares[b] += v[i] * v[i];
        }
    }
    block_sums(squares);
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
        const float factor = rsqrtf(squares[b] / COLUMNS + EPSILON);
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            const int group = threadIdx.x + turn * THREADS;
            if (group < GROUPS) {
                uint4 &place = x[b * PLACES + place_of(group)]; // written by this thread
                float v[GROUP];
                unpack(place, v);
                weight.scale(turn, factor, v);
                place = paired(v);
#if WRITE_NORMED
                if (blockIdx.x == 0) normed[b * GROUPS + group] = in_order(v);
#endif
            }
        }
    }
    __syncthreads();
}

#else

#if PROLOGUE == GATED_NORM
// The weights of a thread's columns, which are the same of every head that it meets.
struct NormWeight {
    float held[GROUP];
    __device__ __forceinline__ void load(const float *weight) { load_group(weight + GROUP * threadIdx.x % HEAD, held); }
};
static_assert(HEAD <= GROUP * WARP && (HEAD & (HEAD - 1)) == 0 && HEAD >= GROUP, "a warp holds whole heads");
#endif

// Every other prologue computes a group from the same group of y (and its neighbours' squares) and of p.
__device__ __forceinline__ void prepare(uint4 *x, const float *y, const float *p
#if PROLOGUE == GATED_NORM
                                        ,
                                        const NormWeight &weight
#endif
) {
    constexpr int TOTAL = BATCH * GROUPS;
#pragma unroll 1
    for (int first = 0; first < TOTAL; first += THREADS) {
        const int index = first + threadIdx.x;
        const bool active = index < TOTAL;
        const int b = active ? index / GROUPS : 0, group = active ? index % GROUPS : 0, column = group * GROUP;
        float v[GROUP];
#if PROLOGUE == PLAIN
        load_group(y + b * COLUMNS + column, v);
#elif PROLOGUE == SWIGLU
        float up[GROUP];
        load_group(p + b * 2 * COLUMNS + column, v);
        load_group(p + b * 2 * COLUMNS + COLUMNS + column, up);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) v[i] = silu(v[i]) * up[i];
#else
        float gate[GROUP];
        load_group(y + b * COLUMNS + column, v);
#if PROLOGUE == GATE
        load_group(p + b * P_STRIDE + column / HEAD * 2 * HEAD + HEAD + column % HEAD, gate);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) v[i] *= sigmoid(gate[i]);
#else
        float squares = 0.0f;
        load_group(p + b * P_STRIDE + Z_OFFSET + column, gate);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) squares += v[i] * v[i];
        const float factor = rsqrtf(warp_sum<HEAD / GROUP>(squares) / HEAD + EPSILON);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) v[i] = v[i] * factor * weight.held[i] * silu(gate[i]);
#endif
#endif
        if (active) x[b * PLACES + place_of(group)] = paired(v);
    }
    __syncthreads();
}

#endif
