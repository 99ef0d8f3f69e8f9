// MXFP4 experts: E2M1 codes [columns, rows / 2], the even row in the low nibble, and E8M0 scales for each row's blocks
// of 32 columns, [rows, columns / 32], or, with SCALES_BY_BLOCK, [columns / 32, rows].
//
// A thread owns 32 rows (16 bytes) and STEP = 16 columns, half a block: products are summed in fp16, of codes divided by
// 8, so that no activation below 5400 overflows, and scaled once.
#pragma once

#include "codes.cuh"

constexpr int STEP = 16;
constexpr int GROUP = 32;

// Nibbles PAIR and PAIR + 4 of a word as E2M1 numbers, divided by 8. Sign, exponent and mantissa go to a half's bits 15, 10
// and 9, which is 2^-14 of the number, and 0x6800 is 2^11.
template <int PAIR> __device__ __forceinline__ __half2 e2m1_eighths(unsigned word) {
    const unsigned magnitude = PAIR == 3 ? word >> 3 : word << (PAIR == 3 ? 0 : 9 - 4 * PAIR);
    return __hmul2(as_half2((word << (12 - 4 * PAIR) & 0x80008000u) | (magnitude & 0x0e000e00u)), as_half2(0x68006800u));
}

// Begin to copy the codes of columns `column` to `column` + STEP - 1 of the 32 rows from `row` on, of a matrix of ROWS_OF
// rows, to `staged`, each `stride` after the one before, in a group for each RUN of columns.
constexpr int RUN = 4;
template <int ROWS_OF>
__device__ __forceinline__ void load_columns(uint4 *staged, int stride, const uint4 *codes, unsigned row, unsigned column, bool present) {
    codes += column * (ROWS_OF / GROUP) + row / GROUP;
#pragma unroll
    for (int i = 0; i < STEP; ++i) {
        copy_async(staged + i * stride, codes + i * (ROWS_OF / GROUP), present);
        if (i % RUN == RUN - 1) copies_commit();
    }
}

template <int ROWS_OF, int COLUMNS_OF>
__device__ __forceinline__ void load_scales(unsigned (&scales)[GROUP / 4], const unsigned char *all, unsigned row, unsigned column) {
#if SCALES_BY_BLOCK
    const uint4 *words = (const uint4 *)(all + column / 32 * ROWS_OF + row);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint4 four = __ldg(words + i);
        scales[4 * i] = four.x;
        scales[4 * i + 1] = four.y;
        scales[4 * i + 2] = four.z;
        scales[4 * i + 3] = four.w;
    }
#else
    const unsigned char *bytes = all + row * (COLUMNS_OF / 32) + column / 32;
#pragma unroll
    for (int i = 0; i < GROUP / 4; ++i) {
        scales[i] = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) scales[i] |= (unsigned)__ldg(bytes + (4 * i + j) * (COLUMNS_OF / 32)) << 8 * j;
    }
#endif
}

// The thread's products, once its codes are there: values[row] for its 32 rows. `x` are the activations of its STEP columns.
__device__ __forceinline__ void multiply_columns(float (&values)[GROUP], const uint4 *staged, int stride, const uint4 (&x)[2],
                                                 const unsigned (&scales)[GROUP / 4]) {
    const unsigned activations[STEP / 2] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
    __half2 products[GROUP / 2];
#pragma unroll
    for (int i = 0; i < GROUP / 2; ++i) products[i] = as_half2(0u);
#pragma unroll
    for (int column = 0; column < STEP; ++column) {
        if (column % RUN == 0) copies_wait((STEP - RUN - column) / RUN);
        const __half2 two = as_half2(activations[column / 2]);
        const __half2 both = column % 2 ? __high2half2(two) : __low2half2(two);
        const uint4 codes = staged[column * stride];
        const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            products[4 * j] = __hfma2(e2m1_eighths<0>(words[j]), both, products[4 * j]);
            products[4 * j + 1] = __hfma2(e2m1_eighths<1>(words[j]), both, products[4 * j + 1]);
            products[4 * j + 2] = __hfma2(e2m1_eighths<2>(words[j]), both, products[4 * j + 2]);
            products[4 * j + 3] = __hfma2(e2m1_eighths<3>(words[j]), both, products[4 * j + 3]);
        }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            const float2 two = __half22float2(products[4 * j + pair]);
            values[8 * j + pair] = two.x * (8.0f * e8m0_to_float(scales[2 * j] >> 8 * pair & 255u));
            values[8 * j + pair + 4] = two.y * (8.0f * e8m0_to_float(scales[2 * j + 1] >> 8 * pair & 255u));
        }
}
