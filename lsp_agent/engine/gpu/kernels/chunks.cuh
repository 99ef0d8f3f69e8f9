// What a lane has of the segments of `project`: chunks, 16 bytes of codes of a row, and what they stand for.
#pragma once

#include "common.cuh"
#include "segments.cuh"

constexpr int SCALES = largest(MOST(scales), 1);

// Chunks of a lane, and their scales, zero points and corrections as they are
// stored.
struct Buffer {
    uint4 codes[BUFFER];
    unsigned scales[BUFFER][SCALES];
    unsigned zero_points[BUFFER][SCALES];
    unsigned corrections[BUFFER][SCALES];
};

// A float of a block, fp16 or fp32, as its bits, and what they stand for.
template <class S> __device__ __forceinline__ unsigned load_float(const void *all, long long index) {
    return S::scale_half ? __ldg((const unsigned short *)all + index) : __ldg((const unsigned *)all + index);
}
template <class S> __device__ __forceinline__ float to_float(unsigned bits) {
    return S::scale_half ? __half2float(__ushort_as_half((unsigned short)bits)) : __uint_as_float(bits);
}

template <class S>
__device__ __forceinline__ void load_chunk(Buffer &buffer, int slot, const Weights &weights, int row, int chunk) {
    buffer.codes[slot] = load_streamed((const uint4 *)weights.codes + (long long)row * S::chunks + chunk);
#pragma unroll
    for (int s = 0; s < S::scales; ++s) {
        const int block = (chunk * S::values) / S::block + s;
        const long long index = (long long)row * S::blocks + block;
        buffer.scales[slot][s] = load_float<S>(weights.scales, index);
        if (S::corrected) buffer.corrections[slot][s] = load_float<S>(weights.corrections, index);
        if (S::zero && S::bits == 4) {
            const long long place = (long long)row * ((S::blocks + 1) / 2) + block / 2;
            buffer.zero_points[slot][s] = __ldg(weights.zero_points + place);
        } else if (S::zero) {
            buffer.zero_points[slot][s] = __ldg(weights.zero_points + index);
        }
    }
}

// The codes of a piece of a chunk less their zero points, as fractions of 1, paired as the activations are; exactly.
template <class S>
__device__ __forceinline__ void decode(const Buffer &buffer, int slot, int chunk, int piece,
                                       __half2 (&w)[4 * S::piece]) {
    const uint4 &codes = buffer.codes[slot];
    const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
    if constexpr (S::bits == 16) {
        // Halves in order: take the pairs apart.
        w[0] = as_half2(__byte_perm(words[0], words[2], 0x5410));
        w[1] = as_half2(__byte_perm(words[0], words[2], 0x7632));
        w[2] = as_half2(__byte_perm(words[1], words[3], 0x5410));
        w[3] = as_half2(__byte_perm(words[1], words[3], 0x7632));
    } else {
        // A code in the low bits of 0x6400 (1024) is 1024 + code, four bits higher 1024 + 16 * code.
        __half2 low = as_half2(S::bits == 4 ? 0xd808d808u : 0xc880c880u); // -(1024 + 8) / 8, -(1024 + 128) / 128
        __half2 high = as_half2(0xc880c880u);                             // -(1024 + 16 * 8) / 128
        const __half2 eighth = as_half2(0x30003000u), fraction = as_half2(0x20002000u); // 1 / 8, 1 / 128
        if (S::zero) {
            const int s = S::scale_of(piece);
            unsigned zero = buffer.zero_points[slot][s];
            if (S::bits == 4) zero = zero >> ((chunk * S::values / S::block + s) % 2 * 4) & 15;
            const __half2 least = as_half2(zero * 0x00010001u | 0x64006400u);
            low = __hmul2(least, as_half2(S::bits == 4 ? 0xb000b000u : 0xa000a000u)); // -1 / 8, -1 / 128
            if (S::bits == 4) high = __hmul2(as_half2(zero * 0x00100010u | 0x64006400u), as_half2(0xa000a000u));
        }
#pragma unroll
        for (int g = 0; g < S::piece; ++g) {
            if constexpr (S::bits == 4) {
                const unsigned word = words[piece * S::piece + g], later = word >> 8;
                w[4 * g] = __hfma2(as_half2(masked_or<0x000f000fu, 0x64006400u>(word)), eighth, low);
                w[4 * g + 1] = __hfma2(as_half2(masked_or<0x00f000f0u, 0x64006400u>(word)), fraction, high);
                w[4 * g + 2] = __hfma2(as_half2(masked_or<0x000f000fu, 0x64006400u>(later)), eighth, low);
                w[4 * g + 3] = __hfma2(as_half2(masked_or<0x00f000f0u, 0x64006400u>(later)), fraction, high);
            } else {
                const int i = 2 * (piece * S::piece + g);
                const unsigned first = __byte_perm(words[i], words[i + 1], 0x5140); // bytes 0, 4, 1, 5
                const unsigned second = __byte_perm(words[i], words[i + 1], 0x7362);
                w[4 * g] = __hfma2(as_half2(__byte_perm(first, 0x64646464u, 0x4140)), fraction, low);
                w[4 * g + 1] = __hfma2(as_half2(__byte_perm(first, 0x64646464u, 0x4342)), fraction, low);
                w[4 * g + 2] = __hfma2(as_half2(__byte_perm(second, 0x64646464u, 0x4140)), fraction, low);
                w[4 * g + 3] = __hfma2(as_half2(__byte_perm(second, 0x64646464u, 0x4342)), fraction, low);
            }
        }
    }
}

template <class S> __device__ __forceinline__ float scale_of(const Buffer &buffer, int slot, int piece) {
    return S::bits == 16 ? 1.0f : to_float<S>(buffer.scales[slot][S::scale_of(piece)]);
}
