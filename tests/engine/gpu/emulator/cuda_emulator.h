// Runs a CUDA kernel on the CPU: the threads of a block are fibers of one thread, the blocks run one after another.
//
// A fiber runs until it waits for its warp or block; when all have come, all go on. A barrier that some threads do not
// reach, or that they reach in different lines, ends the launch with an error, as do misaligned vector loads,
// indexes outside of shared arrays, and addresses without memory. Shared memory is filled with NaNs before each block.
#pragma once

#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define CUDA_EMULATOR 1
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// "used" keeps the compiler from reasoning that what it sees no write to is zero.
#define __shared__ static __attribute__((section("emulated_shared"), used))

#define VECTOR_TYPES(type, name, two, four)                                                                        \
    struct __attribute__((aligned(two))) name##2 { type x, y; };                                                   \
    struct name##3 { type x, y, z; };                                                                              \
    struct __attribute__((aligned(four))) name##4 { type x, y, z, w; };                                            \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                               \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                                    \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTOR_TYPES(float, float, 8, 16)
VECTOR_TYPES(int, int, 8, 16)
VECTOR_TYPES(unsigned, uint, 8, 16)
VECTOR_TYPES(short, short, 4, 8)
VECTOR_TYPES(unsigned short, ushort, 4, 8)
VECTOR_TYPES(signed char, char, 2, 4)
VECTOR_TYPES(unsigned char, uchar, 2, 4)
#undef VECTOR_TYPES
typedef uint3 dim3;

static uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

extern "C" unsigned char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern "C" unsigned char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

namespace emulator {

constexpr int MOST_THREADS = 1024, LANES = 32;
constexpr size_t STACK = 64 * 1024, STATIC_SHARED_LIMIT = 48 * 1024, SHARED_LIMIT = 227 * 1024;

enum State { READY, AT_WARP_BARRIER, AT_BLOCK_BARRIER, DONE };

struct Thread {
    void *stack_pointer;
    State state;
    int line;   // of the barrier
    int parity; // of the warp's slots in use
    uint3 index;
};

alignas(128) static unsigned char dynamic_shared[SHARED_LIMIT];
static unsigned char *stacks;
static Thread threads[MOST_THREADS];
static Thread *current;
static int current_rank;
static void *scheduler;
static void (*body)(void **);
static void **arguments;
static int backwards; // run blocks and threads in reverse order, which shows other races
static char error[256];
alignas(16) static uint64_t slots[MOST_THREADS / LANES][2][LANES];
static int votes;

#if defined(__x86_64__)
// switch_stack(void **save, void *load): the System V ABI's callee-saved registers go to and come from the stacks.
__asm__(".text\n.local emulator_switch_stack\nemulator_switch_stack:\n"
        "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
        "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
        "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\n"
        "popq %rcx\njmpq *%rcx\n");
constexpr size_t FRAME = 64, RETURN = 48;
#elif defined(__aarch64__)
__asm__(".text\n.local emulator_switch_stack\nemulator_switch_stack:\nsub sp, sp, #160\n"
        "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
        "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\nstp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\n"
        "stp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\nmov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
        "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
        "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\nldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\n"
        "ldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\nadd sp, sp, #160\nret\n");
constexpr size_t FRAME = 160, RETURN = 88;
#else
#error "The emulator knows x86-64 and AArch64 only."
#endif
extern "C" void emulator_switch_stack(void **save, void *load);

static void become(int rank) {
    current = &threads[rank];
    current_rank = rank;
    threadIdx = current->index;
}

// Goes on with the warp's next lane, or with the scheduler after the last.
__attribute__((noinline)) static void leave(State state, int line) {
    Thread *self = current;
    self->state = state;
    self->line = line;
    const bool last = current_rank % LANES == (backwards ? 0 : LANES - 1);
    void *next = scheduler;
    if (!last && !error[0] && self[backwards ? -1 : 1].state == READY) {
        become(current_rank + (backwards ? -1 : 1));
        next = current->stack_pointer;
    }
    emulator_switch_stack(&self->stack_pointer, next);
}

[[noreturn]] __attribute__((noinline)) static void fail(const char *reason) {
    if (!error[0])
        snprintf(error, sizeof error, "%s (block %u %u %u, thread %u %u %u)", reason, blockIdx.x, blockIdx.y, blockIdx.z,
                 threadIdx.x, threadIdx.y, threadIdx.z);
    leave(DONE, 0);
    __builtin_trap();
}

static void enter() {
    body(arguments);
    leave(DONE, 0);
    __builtin_trap();
}

static void start(Thread &thread, int rank) {
    // Staggered, so that the stacks' tops do not compete for the same lines of the cache.
    unsigned char *top = stacks + STACK * (rank + 1) - 192 * (rank % 64);
    unsigned char *pointer = top - FRAME;
    memset(pointer, 0, FRAME);
    void (*entry)() = enter;
    memcpy(pointer + RETURN, &entry, sizeof entry);
    thread.stack_pointer = pointer;
    thread.state = READY;
    thread.parity = 0;
}

static void resume(int rank) {
    become(rank);
    emulator_switch_stack(&scheduler, current->stack_pointer);
}

// Whether all of `count` threads from `first` on wait in one line.
static bool together(int first, int count, State state) {
    for (int i = first; i < first + count; ++i) {
        if (threads[i].state == state && threads[i].line == threads[first].line) continue;
        const char *kind = state == AT_WARP_BARRIER ? "warp" : "block";
        int other = i;
        while (other > first && threads[other].state != state) --other;
        int waiting = first;
        while (threads[waiting].state != state) ++waiting;
        snprintf(error, sizeof error,
                 "divergence in block %u %u %u: thread %d waits for its %s in line %d, thread %d %s (line %d)", blockIdx.x,
                 blockIdx.y, blockIdx.z, waiting, kind, threads[waiting].line, i == waiting ? first : i,
                 threads[i == waiting ? first : i].state == DONE ? "has ended" : "waits elsewhere",
                 threads[i == waiting ? first : i].line);
        return false;
    }
    return true;
}

static bool run_warp(int first, int lanes) {
    for (;;) {
        for (int i = 0; i < lanes; ++i) {
            const int rank = first + (backwards ? lanes - 1 - i : i);
            if (threads[rank].state == READY) resume(rank);
            if (error[0]) return false;
        }
        int waiting = 0;
        for (int i = 0; i < lanes; ++i) waiting += threads[first + i].state == AT_WARP_BARRIER;
        if (waiting == 0) return true;
        if (!together(first, lanes, AT_WARP_BARRIER)) return false;
        for (int i = 0; i < lanes; ++i) threads[first + i].state = READY;
    }
}

static bool run_block(int count) {
    unsigned char *shared = __start_emulated_shared;
    if (shared) memset(shared, 0xff, __stop_emulated_shared - shared);
    for (int i = 0; i < count; ++i) start(threads[i], i);
    votes = 0;
    const int warps = (count + LANES - 1) / LANES;
    for (;;) {
        for (int i = 0; i < warps; ++i) {
            const int first = LANES * (backwards ? warps - 1 - i : i);
            if (!run_warp(first, count - first < LANES ? count - first : LANES)) return false;
        }
        int waiting = 0;
        for (int i = 0; i < count; ++i) waiting += threads[i].state == AT_BLOCK_BARRIER;
        if (waiting == 0) return true;
        if (!together(0, count, AT_BLOCK_BARRIER)) return false;
        for (int i = 0; i < count; ++i) threads[i].state = READY;
    }
}

static const int SIGNALS[] = {SIGSEGV, SIGBUS};

// The thread that did it is left where it is; SA_NODEFER lets the next one be caught, though this never returns.
static void address_fault(int) { fail("an address without memory is read or written"); }

static bool run_blocks(uint3 grid, int count, size_t shared) {
    const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
    for (uint64_t i = 0; i < blocks; ++i) {
        const uint64_t rank = backwards ? blocks - 1 - i : i;
        blockIdx = {(unsigned)(rank % grid.x), (unsigned)(rank / grid.x % grid.y), (unsigned)(rank / grid.x / grid.y)};
        memset(dynamic_shared, 0xff, shared);
        if (!run_block(count)) return false;
    }
    return true;
}

static int run(uint3 grid, uint3 block, size_t shared) {
    error[0] = 0;
    const int count = block.x * block.y * block.z;
    const size_t static_shared = __start_emulated_shared ? __stop_emulated_shared - __start_emulated_shared : 0;
    if (count < 1 || count > MOST_THREADS || count % LANES)
        snprintf(error, sizeof error, "a block of %d threads: it must be a multiple of 32, at most 1024", count);
    else if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535)
        snprintf(error, sizeof error, "a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
    else if (static_shared > STATIC_SHARED_LIMIT || static_shared + shared > SHARED_LIMIT)
        snprintf(error, sizeof error, "%zu bytes of static and %zu of dynamic shared memory", static_shared, shared);
    if (error[0]) return 1;
    if (!stacks) {
        stacks = (unsigned char *)aligned_alloc(2 << 20, STACK * MOST_THREADS);
#ifdef MADV_HUGEPAGE
        madvise(stacks, STACK * MOST_THREADS, MADV_HUGEPAGE); // switches between stacks are misses of the TLB else
#endif
    }
    gridDim = grid;
    blockDim = block;
    for (int i = 0; i < count; ++i)
        threads[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    struct sigaction before[2], handler = {};
    handler.sa_handler = address_fault;
    handler.sa_flags = SA_NODEFER;
    for (int i = 0; i < 2; ++i) sigaction(SIGNALS[i], &handler, &before[i]);
    const bool done = run_blocks(grid, count, shared);
    for (int i = 0; i < 2; ++i) sigaction(SIGNALS[i], &before[i], nullptr);
    return !done;
}

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

// Calls a kernel with its arguments, of which a launch has the addresses.
template <int... I> struct Indexes {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> { typedef Indexes<I...> type; };
template <class... P, int... I> void call(void (*kernel)(P...), void **values, Indexes<I...>) {
    kernel(*(P *)values[I]...);
}
template <class... P> void call(void (*kernel)(P...), void **values) {
    call(kernel, values, typename Count<sizeof...(P)>::type());
}
template <class... P> constexpr int arity(void (*)(P...)) {
    static_assert(((sizeof(P) == 8) && ...), "every argument of a kernel is a pointer");
    return sizeof...(P);
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
template <class T> T atomicMax(T *address, T value) { return exchange_with(address, *address > value ? *address : value); }
template <class T> T atomicMin(T *address, T value) { return exchange_with(address, *address < value ? *address : value); }
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

// The compiler's checks of undefined behaviour call these.
extern "C" {
void __ubsan_handle_type_mismatch_minimal() { emulator::fail("a misaligned address is read or written"); }
void __ubsan_handle_out_of_bounds_minimal() { emulator::fail("an index lies outside of its array"); }
void __ubsan_handle_shift_out_of_bounds_minimal() { emulator::fail("a shift by too many bits"); }
void __ubsan_handle_divrem_overflow_minimal() { emulator::fail("a division by zero"); }
}
