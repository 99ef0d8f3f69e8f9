// Sixteen bytes of codes of one row, times activations.
//
// A chunk is 16 bytes: 32 columns of 4 bits or 16 of 8. Its products are summed in fp16 over runs of 8, of codes that
// are divided by 16 or 128 (CODE_UNIT), so that no activation below 8190 overflows; the runs are summed in fp32.
#pragma once

#include "common.cuh"

template <int CODE_BITS> constexpr unsigned CHUNK = 128 / CODE_BITS;
template <int CODE_BITS> constexpr float CODE_UNIT = CODE_BITS == 4 ? 16.0f : 128.0f;

// What is subtracted from a code, in the terms of `Chunk::even` and `odd`.
template <int CODE_BITS> struct Zero {
    __half2 even, odd;
    // 0xd400 is -64, 0xc400 is -4 and 0xc800 is -8: the zero point is added to them in units of the last place.
    __device__ __forceinline__ explicit Zero(unsigned point)
        : even(as_half2((CODE_BITS == 4 ? 0xd400d400u : 0xc800c800u) + point * 0x00010001u)),
          odd(as_half2(CODE_BITS == 4 ? 0xc400c400u + point * 0x00100010u : 0xc800c800u + point * 0x00010001u)) {}
};

// Nibbles (0, 4) and (1, 5) of a word, or bytes (0, 2) and (1, 3), less the zero point, divided by CODE_UNIT: exact.
// 0x6400 is 1024, whose last bit is worth 1.
template <int CODE_BITS> __device__ __forceinline__ __half2 even_codes(unsigned word, __half2 zero) {
    if constexpr (CODE_BITS == 4) return __hfma2(as_half2(masked_or<0x000f000fu, 0x64006400u>(word)), as_half2(0x2c002c00u), zero);
    return __hfma2(as_half2(masked_or<0x00ff00ffu, 0x64006400u>(word)), as_half2(0x20002000u), zero);
}
template <int CODE_BITS> __device__ __forceinline__ __half2 odd_codes(unsigned word, __half2 zero) {
    if constexpr (CODE_BITS == 4) return __hfma2(as_half2(masked_or<0x00f000f0u, 0x64006400u>(word)), as_half2(0x1c001c00u), zero);
    return even_codes<CODE_BITS>(word >> 8, zero);
}

// The product of a chunk with x, in units of CODE_UNIT. Where x[i] must hold which columns depends on the layout: word j's
// pair p (see above; nibbles 2 and 3 are pairs 2 and 3) is multiplied with x[4 * p + j]. In CUTLASS' layout for mixed
// GEMMs these are neighbours, in their order: x[i] holds columns 2i and 2i + 1. Of others see `activation_place`.
template <int CODE_BITS>
__device__ __forceinline__ float dot_chunk(uint4 codes, const __half2 (&x)[CHUNK<CODE_BITS> / 2], Zero<CODE_BITS> zero) {
    const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
    float sum = 0.0f;
#pragma unroll
    for (int run = 0; run < 4; run += CODE_BITS == 4 ? 2 : 4) {
        __half2 products = as_half2(0u);
#pragma unroll
        for (int j = run; j < run + (CODE_BITS == 4 ? 2 : 4); ++j) {
            products = __hfma2(even_codes<CODE_BITS>(words[j], zero.even), x[j], products);
            products = __hfma2(odd_codes<CODE_BITS>(words[j], zero.odd), x[4 + j], products);
            if constexpr (CODE_BITS == 4) {
                products = __hfma2(even_codes<4>(words[j] >> 8, zero.even), x[8 + j], products);
                products = __hfma2(odd_codes<4>(words[j] >> 8, zero.odd), x[12 + j], products);
            }
        }
        const float2 both = __half22float2(products);
        sum += both.x + both.y;
    }
    return sum;
}

// MatMulNBits keeps columns in their order, the low nibble first: which half of a chunk's x column `column` belongs in.
template <int CODE_BITS> __device__ __forceinline__ unsigned activation_place(unsigned column) {
    if constexpr (CODE_BITS == 16) return column;
    const unsigned start = column / CHUNK<CODE_BITS> * CHUNK<CODE_BITS>, within = column % CHUNK<CODE_BITS>;
    const unsigned word = within / (32 / CODE_BITS), code = within % (32 / CODE_BITS);
    const unsigned pair = CODE_BITS == 4 ? code % 4 : code % 2, second = CODE_BITS == 4 ? code / 4 : code / 2;
    return start + 2 * (4 * pair + word) + second;
}

// Activations in shared memory: the 16-byte pieces of chunk `chunk` are permuted so that lanes which read the same
// piece of neighbouring chunks hit different banks.
template <int CODE_BITS> __device__ __forceinline__ unsigned swizzled(unsigned piece_of_all) {
    constexpr unsigned PIECES = CHUNK<CODE_BITS> / 8;
    const unsigned chunk = piece_of_all / PIECES, piece = piece_of_all % PIECES;
    return chunk * PIECES + (piece ^ (chunk / (8 / PIECES) % PIECES));
}

__device__ __forceinline__ void unpack_activations(__half2 *x, uint4 piece) {
    x[0] = as_half2(piece.x);
    x[1] = as_half2(piece.y);
    x[2] = as_half2(piece.z);
    x[3] = as_half2(piece.w);
}

template <int CODE_BITS>
__device__ __forceinline__ void read_activations(__half2 (&x)[CHUNK<CODE_BITS> / 2], const uint4 *staged, unsigned chunk) {
    constexpr unsigned PIECES = CHUNK<CODE_BITS> / 8;
#pragma unroll
    for (unsigned piece = 0; piece < PIECES; ++piece)
        unpack_activations(x + 4 * piece, staged[swizzled<CODE_BITS>(chunk * PIECES + piece)]);
}

// Zero points as MatMulNBits and QMoE pack them: [rows, ceil(blocks * CODE_BITS / 8)] bytes, the low nibble first.
template <int CODE_BITS>
__device__ __forceinline__ unsigned zero_point(const unsigned char *points, unsigned row, unsigned blocks, unsigned block) {
    if constexpr (CODE_BITS == 8) return points[row * blocks + block];
    return points[row * ((blocks + 1) / 2) + block / 2] >> block % 2 * 4 & 15u;
}

// Sums over lanes of COUNT values at once: of lanes that differ in bits OFFSET down to LAST, each ends up with COUNT *
// LAST / (2 * OFFSET) of the sums (at least one), those from index lane / LAST * that number on, if COUNT is at least
// as large as the number of lanes; with fewer values, the sum of index lane * COUNT / (2 * OFFSET) ends up in values[0].
template <int COUNT, int OFFSET = WARP / 2, int LAST = 1> __device__ __forceinline__ void scatter_sums(float *values) {
    if constexpr (OFFSET >= LAST && OFFSET > 0) {
        if constexpr (COUNT > 1) {
            const bool upper = threadIdx.x & OFFSET;
#pragma unroll
            for (int i = 0; i < COUNT / 2; ++i) {
                const float sent = upper ? values[i] : values[i + COUNT / 2];
                const float kept = upper ? values[i + COUNT / 2] : values[i];
                values[i] = kept + __shfl_xor_sync(FULL_WARP, sent, OFFSET);
            }
            scatter_sums<COUNT / 2, OFFSET / 2, LAST>(values);
        } else {
            values[0] += __shfl_xor_sync(FULL_WARP, values[0], OFFSET);
            scatter_sums<1, OFFSET / 2, LAST>(values);
        }
    }
}
