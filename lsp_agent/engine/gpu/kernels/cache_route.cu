// Chooses the experts of each token where they are behind a cache: also decides which of them that are in no slot get one,
// whose they get, and enters it in the table. Grid: one block of a warp for each token.
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
    __shared__ Contest contests[BATCH];
    __shared__ int chosen[PAIRS], missing[PAIRS], victims[PAIRS];
    __shared__ int hits[BATCH], newcomers[BATCH]; // of each token
    __shared__ bool in_use[SLOTS];
    __shared__ int inserted;
    const int thread = threadIdx.x, lane = thread % WARP, token = thread / WARP, pair = token * USED + lane;
    grid_dependency_wait();
    grid_launch_dependents();
    const unsigned now = state->clock + 1;
    // The longer ago, the larger; 0 for those that stay. Asked for before they are known to be wanted: they seldom are,
    // but then without another wait.
    unsigned ages[LANE_SLOTS] = {};
    if (token == 0) { // the first warp
#pragma unroll
        for (int i = 0; i < LANE_SLOTS; ++i) {
            const int slot = i * WARP + lane;
            const unsigned age = slot < SLOTS ? now - state->last_used[slot] : 0u;
            ages[i] = age >= MIN_AGE ? age : 0u;
        }
    }
    for (int slot = thread; slot < SLOTS; slot += THREADS) in_use[slot] = false;
    const Choice choice = choose_experts(r + token * R_STRIDE, contests[token]);
    int slot = 0;
    if (lane < USED) {
        slot = state->slot_of[choice.expert];
        chosen[pair] = choice.expert;
        experts[pair] = choice.expert;
        weights[pair] = choice.weight;
    }
    __syncthreads();
    bool is_new = lane < USED && slot < 0;
    for (int other = 0; other < token * USED; ++other) is_new = is_new && chosen[other] != choice.expert;
    if (lane < USED) {
        if (slot >= 0) {
            state->last_used[slot] = now; // the same from all of the expert's tokens
            in_use[slot] = true;
        }
        atomicAdd(&state->uses[choice.expert], 1u);
    }
    const unsigned hit = __ballot_sync(FULL_WARP, lane < USED && slot >= 0);
    const unsigned missed = __ballot_sync(FULL_WARP, is_new);
    if (lane == 0) hits[token] = __popc(hit), newcomers[token] = __popc(missed);
    __syncthreads();
    int count = 0, before = 0, all_hits = 0;
    for (int i = 0; i < BATCH; ++i) {
        if (i == token) before = count;
        count += newcomers[i];
        all_hits += hits[i];
    }
    if (is_new) missing[before + __popc(missed & ((1u << lane) - 1))] = choice.expert;
    if (thread == 0) {
        state->hits += all_hits;
        state->misses += PAIRS - all_hits;
        state->clock = now;
    }
    if (token == 0) {
        if (count) {
#pragma unroll
            for (int i = 0; i < LANE_SLOTS; ++i)
                if (i * WARP + lane < SLOTS && in_use[i * WARP + lane]) ages[i] = 0;
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
            const int victim = (int)~warp_largest(best == oldest ? ~(unsigned)(place * WARP + lane) : 0u);
#pragma unroll
            for (int i = 0; i < LANE_SLOTS; ++i)
                if (victim == i * WARP + lane) ages[i] = 0;
            if (lane == 0) victims[found] = victim;
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
