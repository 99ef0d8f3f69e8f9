// For kernels that run beside cache_fetch: they need not wait for it unless they want an expert that it copies. What
// cache_route wrote may be read without waiting: cache_fetch let them begin only after it had been done.
// Expects PAIRS (of tokens and their experts) to be defined.
#pragma once

#include "common.cuh"

// Whether `expert`, the same for a whole warp, is among `copies` [1 + 2 * PAIRS].
__device__ __forceinline__ bool is_coming(int expert, const int *copies) {
    const int count = copies[0];
    bool found = false;
#pragma unroll
    for (int i = 0; i < PAIRS; i += WARP) {
        const int place = i + lane_index();
        if (PAIRS % WARP == 0 || place < PAIRS) found = found || (copies[1 + 2 * place] == expert && place < count);
    }
    return __any_sync(FULL_WARP, found);
}
