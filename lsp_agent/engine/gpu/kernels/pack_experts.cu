// Integer codes of experts, by rows as packages have them, in the layout that packing.py describes. Run at load only.
//
// Grid: one block for each INTERLEAVE rows; a thread makes 16 bytes at a time. Source and target do not overlap.
//
// Macros: CODE_BITS, COLUMNS (a multiple of 64).

#include "common.cuh"

constexpr int INTERLEAVE = 16 / CODE_BITS;     // rows that alternate
constexpr int CHUNKS = COLUMNS * CODE_BITS / 128; // of 16 bytes in a row
constexpr int TILE = CODE_BITS / 2;            // chunks of 64 columns

__device__ __forceinline__ unsigned byte_of(unsigned word, int byte) { return word >> 8 * byte & 0xffu; }

extern "C" __global__ void pack_experts(const uint4 *__restrict__ source, uint4 *__restrict__ target) {
    grid_dependency_wait();
    const long long first = (long long)blockIdx.x * INTERLEAVE * CHUNKS;
    for (int place = thread_rank(); place < INTERLEAVE * CHUNKS; place += block_threads()) {
        const int tile = place / (INTERLEAVE * TILE), row = place / TILE % INTERLEAVE;
        const uint4 codes = load_streamed(source + first + row * CHUNKS + tile * TILE + place % TILE);
        const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
        unsigned packed[4];
#pragma unroll
        for (int g = 0; g < 4; ++g) {
            packed[g] = 0;
            if (CODE_BITS == 4) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const unsigned pair = byte_of(words[i], g);
                    packed[g] |= (pair & 15u) << 4 * i | pair >> 4 << (16 + 4 * i);
                }
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) packed[g] |= byte_of(words[i % 2 * 2 + g / 2], g % 2 * 2 + i / 2) << 8 * i;
            }
        }
        target[first + place] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
}
