// Queries and keys as attention wants them: normalised and rotated.
//
// Expects HEAD, ROTARY, QK_NORM, EPSILON and LANES, the neighbouring lanes that prepare one together, to be defined.
#pragma once

#include "common.cuh"

#define PAIRS (HEAD / 2 / LANES)
#define TURNED (ROTARY ? (ROTARY / 2 + LANES - 1) / LANES : 1)

// A query's or key's share of a group of LANES lanes: pairs of columns, and the rotations that they do.
struct Head {
    float2 x[PAIRS], norm[PAIRS];
    __device__ __forceinline__ void load_norm(const float *from, int lane) {
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
            norm[i] = QK_NORM ? ((const float2 *)from)[i * LANES + lane] : make_float2(1.0f, 1.0f);
    }
    __device__ __forceinline__ void load(const float *from, int lane) {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) x[i] = __ldcg((const float2 *)from + i * LANES + lane);
    }
};

struct Rotation {
    float cosines[TURNED], sines[TURNED];
    __device__ __forceinline__ void load(const __half *c, const __half *s, int lane) {
#pragma unroll
        for (int i = 0; i < TURNED; i++) {
            const int at = i * LANES + lane < ROTARY / 2 ? i * LANES + lane : 0;
            cosines[i] = ROTARY ? __half2float(c[at]) : 1.0f, sines[i] = ROTARY ? __half2float(s[at]) : 0.0f;
        }
    }
};

// Normalise and rotate it, in `prepared` where `present`. All lanes of a warp do it together.
__device__ __forceinline__ void prepare(const Head &head, const Rotation &rotation, int lane, bool present,
                                        float *prepared) {
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) square += head.x[i].x * head.x[i].x + head.x[i].y * head.x[i].y;
    const float scale = QK_NORM ? rsqrtf(warp_sum<LANES>(square) / HEAD + EPSILON) : 1.0f;
    if (present) {
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
            ((float2 *)prepared)[i * LANES + lane] =
                make_float2(head.x[i].x * scale * head.norm[i].x, head.x[i].y * scale * head.norm[i].y);
    }
    __syncwarp();
    if (present) {
#pragma unroll
        for (int i = 0; i < TURNED; i++) {
            const int at = i * LANES + lane;
            if (at < ROTARY / 2) {
                const float first = prepared[at], second = prepared[at + ROTARY / 2];
                prepared[at] = first * rotation.cosines[i] - second * rotation.sines[i];
                prepared[at + ROTARY / 2] = second * rotation.cosines[i] + first * rotation.sines[i];
            }
        }
    }
    __syncwarp();
}
