// As route, for experts behind a cache: also decides which of the chosen experts that are in no slot get one, whose they
// get, and enters it in the table. Grid: one block of a warp for each token.
//
// The least recently used expert leaves, but none that was used within the last MIN_AGE steps (at least 1: this one); an
// expert for which there is no such slot is read where it lies. The slots are filled by cache_fetch.
//
// Macros: BATCH, EXPERTS, USED, R_STRIDE, NORMALISE, SLOTS, ADDRESSES, MIN_AGE.

#include "cache.cuh"
#include "routing.cuh"

#define PAIRS (BATCH * USED)
#define LANE_SLOTS ((SLOTS + WARP - 1) / WARP)
#define THREADS (BATCH * WARP)

static_assert(MIN_AGE >= 1, "an expert that this step uses must not leave");

// `copies` [1 + 2 * PAIRS]: how many, then expert and slot of each.
extern "C" __global__ void __launch_bounds__(THREADS)
    cache_route(const float *__restrict__ r, int *__restrict__ experts, float *__restrict__ weights,
                int *__restrict__ copies, CacheState *state, const long long *__restrict__ home,
                const long long *__restrict__ slots, long long *table) {
    __shared__ int chosen[PAIRS], missing[PAIRS], victims[PAIRS];
    __shared__ bool is_new[PAIRS];
    __shared__ int inserted;
    const int thread = threadIdx.x, lane = thread % WARP, token = thread / WARP;
    grid_dependency_wait();
    const unsigned now = state->clock + 1;
    const Choice choice = choose_experts(r + token * R_STRIDE);
    if (lane < USED) {
        chosen[token * USED + lane] = choice.expert;
        experts[token * USED + lane] = choice.expert;
        weights[token * USED + lane] = choice.weight;
    }
    __syncthreads();
    int hits = 0;
    for (int pair = thread; pair < PAIRS; pair += THREADS) {
        const int expert = chosen[pair], slot = state->slot_of[expert];
        bool is_first = true;
        for (int other = 0; other < pair; ++other) is_first = is_first && chosen[other] != expert;
        is_new[pair] = is_first && slot < 0;
        if (slot >= 0) {
            state->last_used[slot] = now; // the same from all of the expert's tokens
            ++hits;
        }
        atomicAdd(&state->uses[expert], 1u);
    }
    const float all_hits = block_sum((float)hits); // also a barrier: what was used is known to be
    if (thread == 0) {
        state->hits += (long long)all_hits;
        state->misses += PAIRS - (long long)all_hits;
        state->clock = now;
    }
    for (int pair = thread; pair < PAIRS; pair += THREADS) {
        int place = 0;
        for (int other = 0; other < pair; ++other) place += is_new[other];
        if (is_new[pair]) missing[place] = chosen[pair];
    }
    if (token == 0) { // the first warp
        int count = 0;
        for (int pair = 0; pair < PAIRS; ++pair) count += is_new[pair];
        // The longer ago, the larger; 0 for those that stay.
        unsigned ages[LANE_SLOTS];
#pragma unroll
        for (int i = 0; i < LANE_SLOTS; ++i) {
            const int slot = i * WARP + lane;
            const unsigned age = slot < SLOTS ? now - state->last_used[slot] : 0u;
            ages[i] = age >= MIN_AGE ? age : 0u;
        }
        int found = 0;
        for (; found < count; ++found) {
            unsigned best = 0;
            int place = 0;
#pragma unroll
            for (int i = 0; i < LANE_SLOTS; ++i)
                if (ages[i] > best) best = ages[i], place = i;
            const unsigned oldest = warp_largest(best);
            if (oldest == 0) break;
            const int slot = (int)~warp_largest(best == oldest ? ~(unsigned)(place * WARP + lane) : 0u);
#pragma unroll
            for (int i = 0; i < LANE_SLOTS; ++i)
                if (slot == i * WARP + lane) ages[i] = 0;
            if (lane == 0) victims[found] = slot;
        }
        if (lane == 0) inserted = copies[0] = found;
    }
    __syncthreads();
    for (int i = thread; i < inserted; i += THREADS) {
        const int expert = missing[i], slot = victims[i], before = state->expert_in[slot];
        if (before >= 0) {
            state->slot_of[before] = -1;
            for (int j = 0; j < ADDRESSES; ++j) table[before * ADDRESSES + j] = home[before * ADDRESSES + j];
        }
        state->slot_of[expert] = slot;
        state->expert_in[slot] = expert;
        state->last_used[slot] = now;
        for (int j = 0; j < ADDRESSES; ++j) table[expert * ADDRESSES + j] = slots[slot * ADDRESSES + j];
        copies[1 + 2 * i] = expert;
        copies[2 + 2 * i] = slot;
    }
}
