// A layer's cache of experts: SLOTS places in the GPU's memory for copies of EXPERTS experts that lie in main memory.
// `expert_cache.py` says what its arrays mean.
#pragma once

#include "common.cuh"

struct CacheState {
    long long hits, misses;    // tokens' experts that were in a slot, or were not, when they were chosen
    unsigned clock, reserved;  // steps
    int slot_of[EXPERTS];      // -1: in no slot
    int expert_in[SLOTS];      // -1: none
    unsigned last_used[SLOTS]; // the clock then
    unsigned uses[EXPERTS];    // how often each was chosen
};
