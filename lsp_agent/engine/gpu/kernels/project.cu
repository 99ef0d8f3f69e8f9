// Products of up to four matrices, the segments, with the same activations of BATCH tokens: y = W x + bias.
//
// An item is AT_ONCE rows of one segment. A warp takes items, its lanes 16 bytes of codes at a time (a chunk) along the
// columns. A warp holds BUFFER chunks for each lane: the first ones are asked for before the activations are there,
// the next ones while it computes. Products are summed in fp16 for TERMS terms, then in fp32; codes count as fractions
// of 1 there (code / 8 or / 128), so that these sums do not overflow before activations of thousands. Corrections, one
// added to every value of a block, are multiplied with the block's sum of activations, which a warp's rows share.
//
// Macros: BATCH, COLUMNS, THREADS, BLOCKS (the grid), BUFFER, TERMS (4, 8 or 16), OUT_HALF, SEGMENTS; of each segment
// s: ROWS_s, BITS_s (4, 8, or 16: floats, [COLUMNS, ROWS]), BLOCK_s, SCALE_HALF_s, ZERO_s, CORRECTED_s, AT_ONCE_s;
// PROLOGUE, and what it needs (prologue.cuh): DELTA, WRITE_NORMED, EPSILON, HEAD, P_STRIDE, Z_OFFSET.

#include "common.cuh"
#include "prologue.cuh"
#include "segments.cuh"

#if OUT_HALF
typedef __half Out;
#else
typedef float Out;
#endif

constexpr int SCALES = largest(MOST(scales), 1), MOST_ROWS = MOST(at_once), TILES = MOST(tiles);
constexpr bool ONCE = ITEMS <= STRIDE && TILES == 1; // every warp has all of its work before the activations are there

__host__ __device__ constexpr int power_of_two(int least) {
    int power = 1;
    while (power < least) power *= 2;
    return power;
}
constexpr int SUMS = power_of_two(MOST_ROWS * BATCH);
static_assert(SUMS <= WARP, "a lane for each sum");

// What a lane has of its warp's rows and tile: chunks, and their scales, zero points and corrections as they are
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

template <class S> __device__ __forceinline__ int chunk_of(int tile, int i) {
    return (tile * S::held + i) * WARP + threadIdx.x % WARP;
}

template <class S> __device__ __forceinline__ void load(Buffer &buffer, const Weights &weights, int item, int tile) {
#pragma unroll
    for (int r = 0; r < S::at_once; ++r) {
        const int wanted = (item - S::first_item) * S::at_once + r, row = wanted < S::rows ? wanted : S::rows - 1;
#pragma unroll
        for (int i = 0; i < S::held; ++i) {
            const int wanted_chunk = chunk_of<S>(tile, i), slot = r * S::held + i;
            const int chunk = S::exact || wanted_chunk < S::chunks ? wanted_chunk : S::chunks - 1;
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

// A piece's products with a token's groups, added up in fp16, and the two halves in fp32.
template <int PIECE> __device__ __forceinline__ float dot(const __half2 (&w)[4 * PIECE], const uint4 (&x)[PIECE]) {
    __half2 sum = __hmul2(w[0], as_half2(x[0].x));
#pragma unroll
    for (int g = 0; g < PIECE; ++g) {
        if (g > 0) sum = __hfma2(w[4 * g], as_half2(x[g].x), sum);
        sum = __hfma2(w[4 * g + 1], as_half2(x[g].y), sum);
        sum = __hfma2(w[4 * g + 2], as_half2(x[g].z), sum);
        sum = __hfma2(w[4 * g + 3], as_half2(x[g].w), sum);
    }
    const float2 both = __half22float2(sum);
    return both.x + both.y;
}

// The sum of a piece's activations, in pairs as far as fp16 holds it.
template <int PIECE> __device__ __forceinline__ float total(const uint4 (&x)[PIECE]) {
    float sum = 0.0f;
#pragma unroll
    for (int g = 0; g < PIECE; ++g) {
        const float2 first = __half22float2(__hadd2(as_half2(x[g].x), as_half2(x[g].y)));
        const float2 second = __half22float2(__hadd2(as_half2(x[g].z), as_half2(x[g].w)));
        sum += (first.x + first.y) + (second.x + second.y);
    }
    return sum;
}

// Floats by columns: a lane takes every 32nd column of AT_ONCE neighbouring rows.
template <class S>
__device__ __forceinline__ void compute_by_columns(const Weights &weights, const uint4 *x, int item,
                                                   float (&sums)[MOST_ROWS * BATCH]) {
    const int row = (item - S::first_item) * S::at_once;
    for (int column = threadIdx.x % WARP; column < COLUMNS; column += WARP) {
        const unsigned short *values = (const unsigned short *)weights.codes + (long long)column * S::rows + row;
        const int within = column % GROUP, group = column / GROUP;
#pragma unroll
        for (int r = 0; r < S::at_once; ++r) {
            const float w = row + r < S::rows ? __half2float(__ushort_as_half(__ldg(values + r))) : 0.0f;
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                const unsigned short *place = (const unsigned short *)(x + b * PLACES + place_of(group));
                sums[r * BATCH + b] += w * __half2float(__ushort_as_half(place[within % 4 * 2 + within / 4]));
            }
        }
    }
}

template <class S>
__device__ __forceinline__ void compute(const Buffer &buffer, const Weights &weights, const uint4 *x, int item,
                                        int tile, float (&sums)[MOST_ROWS * BATCH]) {
    if constexpr (S::by_columns) {
        compute_by_columns<S>(weights, x, item, sums);
        return;
    } else {
        constexpr int CHUNK_GROUPS = S::values / GROUP, PIECE = S::piece;
#pragma unroll
        for (int i = 0; i < S::held; ++i) {
            const int wanted = chunk_of<S>(tile, i);
            const bool inside = S::exact || wanted < S::chunks;
            const int chunk = inside ? wanted : S::chunks - 1;
            // Groups 32 * n + m lie at 32 * n + place_of(m): `start` is known to the compiler, `within` is the lane's.
            const int start = S::exact ? (tile * S::held + i) * WARP * CHUNK_GROUPS : 0;
            const int within = place_of(chunk * CHUNK_GROUPS - start);
#pragma unroll
            for (int piece = 0; piece < CHUNK_GROUPS / PIECE; ++piece) {
                __half2 w[S::at_once][4 * PIECE];
                float scales[S::at_once], corrections[S::at_once];
#pragma unroll
                for (int r = 0; r < S::at_once; ++r) {
                    decode<S>(buffer, r * S::held + i, chunk, piece, w[r]);
                    scales[r] = inside ? scale_of<S>(buffer, r * S::held + i, piece) : 0.0f;
                    if constexpr (S::corrected) {
                        const unsigned bits = buffer.corrections[r * S::held + i][S::scale_of(piece)];
                        corrections[r] = inside ? to_float<S>(bits) / S::unit : 0.0f;
                    }
                }
#pragma unroll
                for (int b = 0; b < BATCH; ++b) {
                    uint4 groups[PIECE];
#pragma unroll
                    for (int g = 0; g < PIECE; ++g)
                        groups[g] = x[b * PLACES + start + (within ^ (piece * PIECE + g))];
#pragma unroll
                    for (int r = 0; r < S::at_once; ++r)
                        sums[r * BATCH + b] += scales[r] * dot<PIECE>(w[r], groups);
                    if constexpr (S::corrected) {
                        const float sum = total<PIECE>(groups);
#pragma unroll
                        for (int r = 0; r < S::at_once; ++r) sums[r * BATCH + b] += corrections[r] * sum;
                    }
                }
            }
        }
    }
}

// Add up the lanes' COUNT values, a power of two: lane l gets the sum of value l / (32 / COUNT), as v[0].
template <int COUNT, int OFFSET, int ALL> __device__ __forceinline__ void gather(float (&v)[ALL], int lane) {
    if constexpr (COUNT > 1) {
        const bool upper = lane & OFFSET;
#pragma unroll
        for (int i = 0; i < COUNT / 2; ++i) {
            const float kept = upper ? v[i + COUNT / 2] : v[i], given = upper ? v[i] : v[i + COUNT / 2];
            v[i] = kept + __shfl_xor_sync(FULL_WARP, given, OFFSET);
        }
        gather<COUNT / 2, OFFSET / 2>(v, lane);
    } else if constexpr (OFFSET > 0) {
        v[0] += __shfl_xor_sync(FULL_WARP, v[0], OFFSET);
        gather<1, OFFSET / 2>(v, lane);
    }
}

// Add up the lanes' sums, each of which ends in lanes of its own, and write them.
template <class S>
__device__ __forceinline__ void finish(Out *y, const float *bias, int item, const float (&sums)[MOST_ROWS * BATCH]) {
    constexpr int COUNT = S::at_once * BATCH, PADDED = power_of_two(COUNT);
    const int lane = threadIdx.x % WARP;
    float v[PADDED];
#pragma unroll
    for (int i = 0; i < PADDED; ++i) v[i] = i < COUNT ? sums[i] : 0.0f;
    gather<PADDED, WARP / 2>(v, lane);
    const int index = lane / (WARP / PADDED), b = index % BATCH;
    const int row = (item - S::first_item) * S::at_once + index / BATCH;
    if (lane % (WARP / PADDED) == 0 && index < COUNT && row < S::rows) {
        const int place = S::first_row + row;
        y[(long long)b * ALL_ROWS + place] = Out(v[0] * S::unit + (bias ? bias[place] : 0.0f));
    }
}

// The biases of a block's first items, which come last of all.
__device__ __forceinline__ void prefetch_bias(const float *bias) {
#pragma unroll 1
    for (int row = threadIdx.x * WARP; row < ALL_ROWS; row += THREADS * WARP) prefetch_l2(bias + row);
}

#define SEGMENT_PARAMETERS(s)                                                                                          \
    , const unsigned char *codes_##s, const void *scales_##s, const unsigned char *zero_points_##s,                    \
        const void *corrections_##s
extern "C" __global__ void __launch_bounds__(THREADS)
project(
#if PROLOGUE == NORM
    const uint4 *residual,
#if DELTA
    const uint4 *delta,
#endif
#elif PROLOGUE == SWIGLU
    const float *p,
#elif PROLOGUE == PLAIN
    const float *y,
#else
    const float *y, const float *p,
#endif
    Out *out,
#if PROLOGUE == NORM && DELTA
    uint4 *sum,
#endif
#if PROLOGUE == NORM && WRITE_NORMED
    uint4 *normed,
#endif
    const float *norm_weight SEGMENT_PARAMETERS(0)
#if SEGMENTS > 1
    SEGMENT_PARAMETERS(1)
#endif
#if SEGMENTS > 2
    SEGMENT_PARAMETERS(2)
#endif
#if SEGMENTS > 3
    SEGMENT_PARAMETERS(3)
#endif
    , const float *bias) {
    DYNAMIC_SHARED(shared);
    uint4 *const x = (uint4 *)shared;
    const Weights weights[SEGMENTS] = {
        {codes_0, scales_0, zero_points_0, corrections_0},
#if SEGMENTS > 1
        {codes_1, scales_1, zero_points_1, corrections_1},
#endif
#if SEGMENTS > 2
        {codes_2, scales_2, zero_points_2, corrections_2},
#endif
#if SEGMENTS > 3
        {codes_3, scales_3, zero_points_3, corrections_3},
#endif
    };
    int item = blockIdx.x + BLOCKS * (threadIdx.x / WARP), tile = 0;
    Buffer buffer;
#define LOAD(S, s) load<S>(buffer, weights[s], item, 0)
    if (item < ITEMS) {
        BY_SEGMENT(item, LOAD);
    }
    if (bias) prefetch_bias(bias);
#if PROLOGUE == NORM || PROLOGUE == GATED_NORM
    NormWeight weight;
    weight.load(norm_weight);
#endif
    grid_launch_dependents(); // whose own weights may be on their way while this kernel computes
    grid_dependency_wait();
#if PROLOGUE == NORM
#if !DELTA
    const uint4 *const delta = nullptr;
    uint4 *const sum = nullptr;
#endif
#if !WRITE_NORMED
    uint4 *const normed = nullptr;
#endif
    prepare(x, residual, delta, weight, sum, normed);
#elif PROLOGUE == SWIGLU
    prepare(x, nullptr, p);
#elif PROLOGUE == PLAIN
    prepare(x, y, nullptr);
#elif PROLOGUE == GATE
    prepare(x, y, p);
#else
    prepare(x, y, p, weight);
#endif
    float sums[MOST_ROWS * BATCH] = {};
    while (item < ITEMS) {
        int next_item = item + STRIDE, next_tile = 0;
#define COUNT_TILES(S, s) next_item = tile + 1 < S::tiles ? (next_tile = tile + 1, item) : next_item
        if (TILES > 1) {
            BY_SEGMENT(item, COUNT_TILES);
        }
        Buffer next;
#define LOAD_NEXT(S, s) load<S>(next, weights[s], next_item, next_tile)
        if (!ONCE && next_item < ITEMS) {
            BY_SEGMENT(next_item, LOAD_NEXT);
        }
#define COMPUTE(S, s) compute<S>(buffer, weights[s], x, item, tile, sums)
        BY_SEGMENT(item, COMPUTE);
        if (next_tile == 0) {
#define FINISH(S, s) finish<S>(out, bias, item, sums)
            BY_SEGMENT(item, FINISH);
#pragma unroll
            for (int i = 0; i < MOST_ROWS * BATCH; ++i) sums[i] = 0.0f;
        }
        if (ONCE) break;
        buffer = next;
        item = next_item;
        tile = next_tile;
    }
}
