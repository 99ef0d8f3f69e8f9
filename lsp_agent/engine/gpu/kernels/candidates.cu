// The BEST largest logits of each token in descending order, ties to the lower id, and the log-sum-exp of all. Exact,
// and independent of the order in which blocks and threads run.
//
// Grid: BLOCKS x BATCH. Logits and ids make keys of 64 bits, all different, in the order that is asked for. A block has
// its share's best keys: the BEST-th largest of its threads' own largest keys bounds them from below, and as no more
// than BEST threads own keys from there on, few are left, which are ranked by counting the larger ones. The last block
// of a token does the same with what all blocks found.
//
// Macros: BATCH, VOCABULARY, BEST, BLOCKS (of a token), THREADS.

#include "common.cuh"

typedef unsigned long long Key; // 0: none

// In pieces of a block's threads, dealt out in turn: likely tokens are often neighbours.
constexpr int PIECES = (VOCABULARY + THREADS - 1) / THREADS;
constexpr int EACH = (PIECES + BLOCKS - 1) / BLOCKS;              // logits of a thread
constexpr int EACH_FOUND = (BLOCKS * BEST + THREADS - 1) / THREADS; // keys of a thread of the last block
constexpr int MOST_EACH = EACH > EACH_FOUND ? EACH : EACH_FOUND;
constexpr int KEPT = (BEST < THREADS ? BEST : THREADS) * MOST_EACH;
static_assert(BEST <= THREADS && BLOCKS <= THREADS, "a thread for each");
static_assert((KEPT + THREADS) * 16 < 46 * 1024, "what is left fits in shared memory");

// NVRTC knows no INFINITY.
__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

__device__ __forceinline__ Key key_of(float logit, int id) {
    const unsigned bits = __float_as_uint(logit == 0.0f ? 0.0f : logit); // -0 is 0
    const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (Key)ordered << 32 | (unsigned)~id;
}
__device__ __forceinline__ float logit_of(Key key) {
    const unsigned ordered = key >> 32;
    return key ? __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered) : minus_infinity();
}
__device__ __forceinline__ int id_of(Key key) { return key ? (int)~(unsigned)key : -1; }

// How many of `count` keys in shared memory are larger; `count` is even.
__device__ __forceinline__ int rank_of(Key key, const Key *keys, int count) {
    int rank = 0;
#pragma unroll 4
    for (int i = 0; i < count; i += 2) {
        const uint4 two = *(const uint4 *)(keys + i);
        rank += ((Key)two.y << 32 | two.x) > key;
        rank += ((Key)two.w << 32 | two.z) > key;
    }
    return rank;
}

// The BEST largest of all threads' keys to `best` in shared memory, in descending order; 0 where there are fewer.
template <int COUNT> __device__ __forceinline__ void select(const Key (&keys)[COUNT], Key *best) {
    __shared__ __align__(16) Key largest[THREADS];
    __shared__ __align__(16) Key kept[KEPT + 2];
    __shared__ Key bound;
    __shared__ int count;
    Key own = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) own = keys[i] > own ? keys[i] : own;
    __syncthreads(); // the last call's results have been read
    largest[threadIdx.x] = own;
    if (threadIdx.x == 0) count = 0, bound = 1;
    for (int i = threadIdx.x; i < BEST; i += THREADS) best[i] = 0;
    __syncthreads();
    if (own && rank_of(own, largest, THREADS) == BEST - 1) bound = own;
    __syncthreads();
    const Key least = bound;
    if (own >= least) {
        int own_count = 0;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) own_count += keys[i] >= least;
        int place = atomicAdd(&count, own_count);
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if (keys[i] >= least) kept[place++] = keys[i];
    }
    __syncthreads();
    if (threadIdx.x == 0) kept[count] = 0; // for an even number
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const int rank = rank_of(kept[i], kept, (count + 1) / 2 * 2);
        if (rank < BEST) best[rank] = kept[i];
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS)
candidates(const float *logits, float *values, int *ids, float *log_sum_exp, float *scratch, int *counters) {
    // Of each token and block: BEST keys, the largest logit, and the sum of all logits' exponentials relative to it.
    constexpr int RECORD = 2 * BEST + 2;
    __shared__ Key best[BEST];
    __shared__ int last;
    const int token = blockIdx.y;
    float *const records = scratch + (long long)token * BLOCKS * RECORD, *const record = records + blockIdx.x * RECORD;
    grid_dependency_wait();
    float own[EACH], maximum = minus_infinity(), sum = 0.0f;
    Key keys[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int id = (i * BLOCKS + blockIdx.x) * THREADS + threadIdx.x;
        own[i] = id < VOCABULARY ? __ldcg(logits + (long long)token * VOCABULARY + id) : minus_infinity();
        keys[i] = id < VOCABULARY ? key_of(own[i], id) : 0;
        maximum = fmaxf(maximum, own[i]);
    }
    maximum = block_max(maximum);
#pragma unroll
    for (int i = 0; i < EACH; ++i) sum += own[i] == minus_infinity() ? 0.0f : expf(own[i] - maximum);
    sum = block_sum(sum);
    select(keys, best);
    for (int i = threadIdx.x; i < BEST; i += THREADS) {
        __stcg((unsigned *)record + 2 * i, (unsigned)best[i]);
        __stcg((unsigned *)record + 2 * i + 1, (unsigned)(best[i] >> 32));
    }
    if (threadIdx.x == 0) {
        __stcg(record + 2 * BEST, maximum);
        __stcg(record + 2 * BEST + 1, sum);
    }
    __syncthreads();
    if (threadIdx.x == 0) last = arrive(counters + token) == BLOCKS - 1;
    __syncthreads();
    if (!last) return;
    Key found[EACH_FOUND];
#pragma unroll
    for (int i = 0; i < EACH_FOUND; ++i) {
        // A block's keys are in order: a thread takes one from each of several blocks.
        const int index = i * THREADS + threadIdx.x, block = index % BLOCKS, place = index / BLOCKS;
        found[i] = 0;
        if (place < BEST) {
            const unsigned *const from = (const unsigned *)(records + block * RECORD) + 2 * place;
            found[i] = (Key)__ldcg(from + 1) << 32 | __ldcg(from);
        }
    }
    float other = minus_infinity(), part = 0.0f;
    if (threadIdx.x < BLOCKS) {
        other = __ldcg(records + threadIdx.x * RECORD + 2 * BEST);
        part = __ldcg(records + threadIdx.x * RECORD + 2 * BEST + 1);
    }
    maximum = block_max(other);
    sum = block_sum(other > minus_infinity() ? expf(other - maximum) * part : 0.0f);
    select(found, best);
    for (int i = threadIdx.x; i < BEST; i += THREADS) {
        values[token * BEST + i] = logit_of(best[i]);
        ids[token * BEST + i] = id_of(best[i]);
    }
    if (threadIdx.x == 0) {
        log_sum_exp[token] = maximum + logf(sum);
        counters[token] = 0;
    }
}
