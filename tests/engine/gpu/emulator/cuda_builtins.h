// What CUDA's kernels call without a header: barriers, exchanges within a warp, atomics, loads, bits and numbers.
#pragma once

#include "cuda_emulator.h"

namespace emulator {

template <class T> T *slot(int parity, int lane) {
    static_assert(sizeof(T) <= 8, "shuffles take at most 8 bytes");
    return (T *)&slots[current_rank / LANES][parity][lane];
}

// All lanes' values: written before, read after one barrier; the next exchange uses the other half of the slots.
template <class T> int exchange(int line, unsigned mask, T value) {
    if (mask != 0xffffffffu) fail("a warp's mask must be full");
    const int parity = current->parity;
    current->parity ^= 1;
    *slot<T>(parity, current_rank % LANES) = value;
    leave(AT_WARP_BARRIER, line);
    return parity;
}

template <class T> T shuffle_from(int line, unsigned mask, T value, int source, bool inside) {
    const int parity = exchange(line, mask, value);
    return inside ? *slot<T>(parity, source) : value;
}
template <class T> T shuffle(int line, unsigned mask, T value, int source, int width = LANES) {
    const int lane = current_rank % LANES;
    return shuffle_from(line, mask, value, lane / width * width + (source & (width - 1)), true);
}
template <class T> T shuffle_xor(int line, unsigned mask, T value, int other, int width = LANES) {
    const int lane = current_rank % LANES, source = lane ^ other;
    return shuffle_from(line, mask, value, source, source / width <= lane / width && source < LANES);
}
template <class T> T shuffle_down(int line, unsigned mask, T value, unsigned by, int width = LANES) {
    const int lane = current_rank % LANES, source = lane + (int)by;
    return shuffle_from(line, mask, value, source, source / width == lane / width);
}
template <class T> T shuffle_up(int line, unsigned mask, T value, unsigned by, int width = LANES) {
    const int lane = current_rank % LANES, source = lane - (int)by;
    return shuffle_from(line, mask, value, source, source >= lane / width * width);
}
static inline unsigned ballot(int line, unsigned mask, int predicate) {
    const int parity = exchange<int>(line, mask, predicate != 0);
    unsigned result = 0;
    for (int lane = 0; lane < LANES; ++lane) result |= (unsigned)*slot<int>(parity, lane) << lane;
    return result;
}
template <class T> T reduce_add(int line, unsigned mask, T value) {
    const int parity = exchange(line, mask, value);
    T result = 0;
    for (int lane = 0; lane < LANES; ++lane) result += *slot<T>(parity, lane);
    return result;
}
template <class T> T reduce_max(int line, unsigned mask, T value) {
    const int parity = exchange(line, mask, value);
    for (int lane = 0; lane < LANES; ++lane) value = *slot<T>(parity, lane) > value ? *slot<T>(parity, lane) : value;
    return value;
}
template <class T> T reduce_min(int line, unsigned mask, T value) {
    const int parity = exchange(line, mask, value);
    for (int lane = 0; lane < LANES; ++lane) value = *slot<T>(parity, lane) < value ? *slot<T>(parity, lane) : value;
    return value;
}
static inline void warp_barrier(int line, unsigned mask = 0xffffffffu) {
    if (mask != 0xffffffffu) fail("a warp's mask must be full");
    leave(AT_WARP_BARRIER, line);
}
static inline int block_count(int line, int predicate) {
    votes += predicate != 0;
    leave(AT_BLOCK_BARRIER, line);
    const int result = votes;
    leave(AT_BLOCK_BARRIER, line);
    votes = 0;
    leave(AT_BLOCK_BARRIER, line);
    return result;
}

} // namespace emulator

#define __syncthreads() emulator::leave(emulator::AT_BLOCK_BARRIER, __LINE__)
#define __syncthreads_count(p) emulator::block_count(__LINE__, p)
#define __syncthreads_or(p) (emulator::block_count(__LINE__, p) != 0)
#define __syncthreads_and(p) (emulator::block_count(__LINE__, !(p)) == 0)
#define __syncwarp(...) emulator::warp_barrier(__LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(...) emulator::shuffle(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) emulator::shuffle_xor(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) emulator::shuffle_down(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) emulator::shuffle_up(__LINE__, __VA_ARGS__)
#define __ballot_sync(...) emulator::ballot(__LINE__, __VA_ARGS__)
#define __any_sync(...) (emulator::ballot(__LINE__, __VA_ARGS__) != 0)
#define __all_sync(...) (emulator::ballot(__LINE__, __VA_ARGS__) == 0xffffffffu)
#define __reduce_add_sync(...) emulator::reduce_add(__LINE__, __VA_ARGS__)
#define __reduce_max_sync(...) emulator::reduce_max(__LINE__, __VA_ARGS__)
#define __reduce_min_sync(...) emulator::reduce_min(__LINE__, __VA_ARGS__)

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
template <class T> T exchange_with(T *address, T value) { T old = *address; *address = value; return old; }
template <class T> T atomicAdd(T *address, T value) { return exchange_with(address, (T)(*address + value)); }
inline int atomicAdd(int *address, int value) { return exchange_with(address, *address + value); }
inline unsigned atomicAdd(unsigned *address, unsigned value) { return exchange_with(address, *address + value); }
template <class T> T atomicExch(T *address, T value) { return exchange_with(address, value); }
template <class T> T atomicMax(T *address, T value) {
    return exchange_with(address, *address > value ? *address : value);
}
template <class T> T atomicMin(T *address, T value) {
    return exchange_with(address, *address < value ? *address : value);
}
template <class T> T atomicOr(T *address, T value) { return exchange_with(address, (T)(*address | value)); }
template <class T> T atomicAnd(T *address, T value) { return exchange_with(address, (T)(*address & value)); }
template <class T> T atomicCAS(T *address, T expected, T value) {
    return exchange_with(address, *address == expected ? value : *address);
}
inline unsigned atomicInc(unsigned *address, unsigned last) {
    return exchange_with(address, *address >= last ? 0u : *address + 1);
}

template <class T> T __ldg(const T *address) { return *address; }
template <class T> T __ldcg(const T *address) { return *address; }
template <class T> T __ldcs(const T *address) { return *address; }
template <class T> T __ldcv(const T *address) { return *address; }
template <class T> void __stcg(T *address, T value) { *address = value; }
template <class T> void __stcs(T *address, T value) { *address = value; }

template <class To, class From> To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "of one size");
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}
inline float __uint_as_float(unsigned bits) { return bits_as<float>(bits); }
inline float __int_as_float(int bits) { return bits_as<float>(bits); }
inline unsigned __float_as_uint(float value) { return bits_as<unsigned>(value); }
inline int __float_as_int(float value) { return bits_as<int>(value); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t both = (uint64_t)high << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned choice = selector >> (4 * i) & 15, byte = both >> (8 * (choice & 7)) & 255;
        result |= (choice & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
    }
    return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return (unsigned)(((uint64_t)high << 32 | low) >> (by & 31));
}
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; ++i) sum += (int8_t)(a >> (8 * i)) * (int8_t)(b >> (8 * i));
    return sum;
}
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __saturatef(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }
template <class A, class B> constexpr auto min(A a, B b) -> decltype(a + b) { return b < a ? b : a; }
template <class A, class B> constexpr auto max(A a, B b) -> decltype(a + b) { return a < b ? b : a; }
