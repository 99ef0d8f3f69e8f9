// What every kernel shares. Include this first, and nothing else of CUDA: the same sources are compiled by NVRTC and,
// for tests without a GPU, as C++ by the emulator, which brings a cuda_fp16.h of its own. PTX stays in this file.
#pragma once

#include <cuda_fp16.h>

constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr int WARP = 32;

// The kernel's dynamic shared memory (Launch.shared bytes), aligned to 16 bytes; DYNAMIC_SHARED(name) at a kernel's
// top.
#ifdef CUDA_EMULATOR
#define DYNAMIC_SHARED(name) unsigned char *const name = emulator::dynamic_shared
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// ---- Programmatic dependent launch: a kernel may start while the one before it still runs ----

// Wait until the kernels before this one are done and their writes visible. Returns at once where the launch does not
// overlap. Every kernel calls it in every thread, before it reads what others wrote, and before it writes anything.
__device__ __forceinline__ void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let the next kernel start, as soon as every block has called this or left: its wait still lasts until this one ends.
__device__ __forceinline__ void grid_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// ---- Loads ----

// Loads of weights: read once, by one thread, never written while the kernel runs; they do not displace L1's contents.
// Volatile, so that the compiler leaves them where they are written: all of a thread's loads before their first use.
__device__ __forceinline__ uint4 load_streamed(const uint4 *address) {
#ifdef __CUDA_ARCH__
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(address));
    return v;
#else
    return *address;
#endif
}

__device__ __forceinline__ uint2 load_streamed(const uint2 *address) {
#ifdef __CUDA_ARCH__
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
    return v;
#else
    return *address;
#endif
}

__device__ __forceinline__ unsigned load_streamed(const unsigned *address) {
#ifdef __CUDA_ARCH__
    unsigned v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(address));
    return v;
#else
    return *address;
#endif
}

// A load of what an earlier kernel of the step wrote, which the compiler leaves where it is written.
__device__ __forceinline__ float load_now(const float *address) {
#ifdef __CUDA_ARCH__
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(address) : "memory");
    return v;
#else
    return *address;
#endif
}

__device__ __forceinline__ unsigned short load_streamed(const unsigned short *address) {
#ifdef __CUDA_ARCH__
    unsigned short v;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(address));
    return v;
#else
    return *address;
#endif
}

// Ask for the line of `address` in L2, without waiting.
__device__ __forceinline__ void prefetch_l2(const void *address) {
#ifdef __CUDA_ARCH__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
    (void)address;
#endif
}

// Copies of 16 bytes from global to shared memory that need no registers while they are under way: a compiler may put
// off a load until its value is wanted, but not these. `shared` gets zeros where `present` is false. A thread may read
// what it has copied itself after copies_wait(n), which leaves at most its n latest groups (copies_commit, n up to 7)
// under way; others' copies need a barrier, too.
__device__ __forceinline__ void copy_async(uint4 *shared, const uint4 *global, bool present = true) {
#ifdef __CUDA_ARCH__
    const unsigned target = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(global),
                 "r"(present ? 16 : 0)
                 : "memory");
#else
    *shared = present ? *global : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void copies_commit() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

__device__ __forceinline__ void copies_wait(int groups) {
#ifdef __CUDA_ARCH__
    switch (groups) { // a constant, once loops are unrolled
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    case 4: asm volatile("cp.async.wait_group 4;" ::: "memory"); break;
    case 5: asm volatile("cp.async.wait_group 5;" ::: "memory"); break;
    case 6: asm volatile("cp.async.wait_group 6;" ::: "memory"); break;
    case 7: asm volatile("cp.async.wait_group 7;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
#endif
}

// ---- Counting blocks ----

// Count one more at `counter`, in one thread of a block, between barriers; returns the count before. What the block
// wrote before is visible to the blocks that count later, after the barrier that follows.
__device__ __forceinline__ int arrive(int *counter) {
#ifdef __CUDA_ARCH__
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
#else
    return atomicAdd(counter, 1);
#endif
}

// ---- Threads ----

__device__ __forceinline__ int block_threads() { return blockDim.x * blockDim.y * blockDim.z; }
__device__ __forceinline__ int thread_rank() {
    return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
__device__ __forceinline__ int lane_index() { return thread_rank() % WARP; }
__device__ __forceinline__ int warp_index() { return thread_rank() / WARP; }

// ---- Reductions. Every thread of the warp or block calls them and gets the result; blocks are multiples of 32. ----

// Over groups of LANES neighbouring lanes, a power of two.
template <int LANES = WARP> __device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(FULL_WARP, value, offset);
    return value;
}

template <int LANES = WARP> __device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2)
        value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, offset));
    return value;
}

// The largest value and where it was found, ties to the lower index.
template <int LANES = WARP> __device__ __forceinline__ void warp_argmax(float &value, int &index) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(FULL_WARP, value, offset);
        const int other_index = __shfl_xor_sync(FULL_WARP, index, offset);
        if (other > value || (other == value && other_index < index)) {
            value = other;
            index = other_index;
        }
    }
}

// COUNT sums at once, for two barriers in all.
template <int COUNT> __device__ __forceinline__ void block_sums(float (&values)[COUNT]) {
    __shared__ float partial[COUNT][WARP];
    const int lane = lane_index(), warp = warp_index(), warps = block_threads() / WARP;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = warp_sum(values[i]);
    __syncthreads(); // an earlier call's sums have been read
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) partial[i][warp] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = warp_sum(lane < warps ? partial[i][lane] : 0.0f);
}

__device__ __forceinline__ float block_sum(float value) {
    float values[1] = {value};
    block_sums(values);
    return values[0];
}

__device__ __forceinline__ float block_max(float value) {
    __shared__ float partial[WARP];
    const int lane = lane_index(), warp = warp_index(), warps = block_threads() / WARP;
    value = warp_max(value);
    __syncthreads();
    if (lane == 0) partial[warp] = value;
    __syncthreads();
    return warp_max(partial[lane < warps ? lane : 0]);
}

// ---- Numbers ----

// A quotient to 2 units in the last place, for denominators up to 2^126 (0 beyond), without the branch of an exact one:
// several of a thread's would wait for each other.
__device__ __forceinline__ float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdividef(a, b);
#else
    return a / b;
#endif
}
__device__ __forceinline__ float sigmoid(float x) { return quotient(1.0f, 1.0f + expf(-x)); }
__device__ __forceinline__ float silu(float x) { return quotient(x, 1.0f + expf(-x)); }

// 32 bits as two halves, the low 16 bits first, and back.
__device__ __forceinline__ __half2 as_half2(unsigned bits) {
    return *reinterpret_cast<const __half2 *>(&bits); // put together from two halves it costs instructions
}
__device__ __forceinline__ unsigned as_bits(__half2 pair) {
    return *reinterpret_cast<const unsigned *>(&pair);
}
__device__ __forceinline__ float2 half_bits_to_float2(unsigned bits) { return __half22float2(as_half2(bits)); }
__device__ __forceinline__ float bfloat16_to_float(unsigned short bits) {
    return __uint_as_float((unsigned)bits << 16);
}

// (word & AND_MASK) | OR_MASK in one instruction; for two constants the compiler takes two.
template <unsigned AND_MASK, unsigned OR_MASK> __device__ __forceinline__ unsigned masked_or(unsigned word) {
#ifdef __CUDA_ARCH__
    unsigned result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(AND_MASK), "r"(OR_MASK));
    return result;
#else
    return (word & AND_MASK) | OR_MASK;
#endif
}

// An E8M0 scale, 2^(code - 127); code 255 (not a number) is never written by us.
__device__ __forceinline__ float e8m0_to_float(unsigned char code) {
    return __uint_as_float(code ? (unsigned)code << 23 : 0x00400000u);
}

// ---- Weights of few bits. `word` holds 8 nibbles, nibble n from bit 4n on, or 4 bytes, byte n from bit 8n on. ----

// Nibbles PAIR and PAIR + 4 (PAIR = 0..3) as unsigned numbers 0 to 15, exactly, in .x and .y.
// Multiply with activations paired likewise: (x[0], x[4]), (x[1], x[5]), (x[2], x[6]), (x[3], x[7]).
// Zero points are the caller's: subtract them with __hsub2, or correct by the sum of the activations.
template <int PAIR> __device__ __forceinline__ __half2 nibbles_to_half2(unsigned word) {
    // 0x6400 is 1024, whose last bit is worth 1: a nibble OR-ed into bits 0 to 3 adds itself, into 4 to 7 16 times.
    const unsigned shifted = PAIR >= 2 ? word >> 8 : word;
    if (PAIR % 2 == 0) return __hsub2(as_half2((shifted & 0x000f000fu) | 0x64006400u), as_half2(0x64006400u));
    const __half2 sixteenth = as_half2(0x2c002c00u), minus_64 = as_half2(0xd400d400u);
    return __hfma2(as_half2((shifted & 0x00f000f0u) | 0x64006400u), sixteenth, minus_64);
}

// Bytes 2 * PAIR and 2 * PAIR + 1 (PAIR = 0..1) as unsigned numbers 0 to 255, exactly, in their order.
template <int PAIR> __device__ __forceinline__ __half2 bytes_to_half2(unsigned word) {
    return __hsub2(as_half2(__byte_perm(word, 0x64646464u, PAIR == 0 ? 0x4140 : 0x4342)), as_half2(0x64006400u));
}

// Nibbles PAIR and PAIR + 4 as E2M1 numbers (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), times 2^-14: that power
// may go into the block's scale, where only fp32 is multiplied; products in fp16 would lose bits.
template <int PAIR> __device__ __forceinline__ __half2 e2m1_to_half2_scaled(unsigned word) {
    const unsigned shifted = word >> (4 * PAIR);
    return as_half2((shifted & 0x00080008u) << 12 | (shifted & 0x00070007u) << 9);
}

// The same, as they are: exact.
template <int PAIR> __device__ __forceinline__ __half2 e2m1_to_half2(unsigned word) {
    return __hmul2(e2m1_to_half2_scaled<PAIR>(word), as_half2(0x74007400u)); // 2^14
}
