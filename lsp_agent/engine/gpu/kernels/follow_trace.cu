// Router logits from a table instead of the router's own, to measure with routing that is known. Grid: a block for each
// token.
//
// Macros: ROWS (tokens of a sequence), EXPERTS, R_STRIDE, TOKENS (rows of the trace), APART (by how many rows
// sequences of a batch differ), THREADS. in r f32 [tokens, R_STRIDE], lengths i32 [tokens] (the new token's
// index); out the same as r, but for its first EXPERTS columns; ptr trace f32 [TOKENS, EXPERTS].

#include "common.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    follow_trace(const float *__restrict__ r, const int *__restrict__ lengths, float *__restrict__ followed,
                 const float *__restrict__ trace) {
    grid_dependency_wait();
    const int token = blockIdx.x;
    const float *row = trace + (long long)((lengths[token] + token / ROWS * APART) % TOKENS) * EXPERTS;
    for (int i = threadIdx.x; i < R_STRIDE; i += THREADS)
        followed[token * R_STRIDE + i] = i < EXPERTS ? row[i] : r[token * R_STRIDE + i];
}
