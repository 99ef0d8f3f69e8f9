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

#include "cuda_vectors.h"

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
        snprintf(error, sizeof error, "%s (block %u %u %u, thread %u %u %u)", reason, blockIdx.x, blockIdx.y,
                 blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
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
        // Thread i differs from the first one: one of both waits here.
        const int waiting = threads[first].state == state ? first : i, other = waiting == i ? first : i;
        snprintf(error, sizeof error,
                 "divergence in block %u %u %u: thread %d waits for its %s in line %d, thread %d %s (line %d)",
                 blockIdx.x, blockIdx.y, blockIdx.z, waiting, state == AT_WARP_BARRIER ? "warp" : "block",
                 threads[waiting].line, other, threads[other].state == DONE ? "has ended" : "waits elsewhere",
                 threads[other].line);
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

// The compiler's checks of undefined behaviour call these.
extern "C" {
void __ubsan_handle_type_mismatch_minimal() { emulator::fail("a misaligned address is read or written"); }
void __ubsan_handle_out_of_bounds_minimal() { emulator::fail("an index lies outside of its array"); }
void __ubsan_handle_shift_out_of_bounds_minimal() { emulator::fail("a shift by too many bits"); }
void __ubsan_handle_divrem_overflow_minimal() { emulator::fail("a division by zero"); }
}
