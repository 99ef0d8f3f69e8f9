// Puts the keys and values of ROWS new tokens of each sequence into the caches, for attention_step over all of them.
// What it hands on, `appended`, says nothing, but whoever takes it comes later.
//
// Grid: KV_HEADS x (BATCH * ROWS), blocks of a warp. Of a sequence the first control[3] tokens count; the others, which
// fill the rows up, leave no trace.
//
// Macros: ROWS, KV_HEADS, HEAD, ROTARY, QK_NORM, EPSILON, P_STRIDE, KEYS_AT (where in p the keys begin).

#include "common.cuh"

#define LANES WARP

#include "heads.cuh"

extern "C" __global__ void __launch_bounds__(WARP)
    append_tokens(const float *p, __half *key_cache, __half *value_cache, const int *lengths, const int *control,
                  int *appended, const float *key_norm, const __half *cosines, const __half *sines) {
    const int kv_head = blockIdx.x, token = blockIdx.y, sequence = token / ROWS, lane = threadIdx.x;
    const int position = lengths[token], capacity = control[1], count = control[3];
    __shared__ __align__(16) float prepared[HEAD];
    Rotation rotation;
    rotation.load(cosines + (long long)position * (ROTARY / 2), sines + (long long)position * (ROTARY / 2), lane);
    Head key;
    key.load_norm(key_norm, lane);
    grid_launch_dependents();
    grid_dependency_wait();
    if (kv_head == 0 && token == 0 && lane == 0) appended[0] = 0;
    const float *projected = p + (long long)token * P_STRIDE + KEYS_AT + kv_head * HEAD;
    key.load(projected, lane);
    prepare(key, rotation, lane, true, prepared);
    if (token % ROWS < count) {
        const long long at = (((long long)sequence * KV_HEADS + kv_head) * capacity + position) * HEAD / 2;
        const float2 *value = (const float2 *)(projected + KV_HEADS * HEAD);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int pair = i * WARP + lane;
            const float2 of_key = ((const float2 *)prepared)[pair], of_value = __ldcg(value + pair);
            ((unsigned *)key_cache)[at + pair] = as_bits(__floats2half2_rn(of_key.x, of_key.y));
            ((unsigned *)value_cache)[at + pair] = as_bits(__floats2half2_rn(of_value.x, of_value.y));
        }
    }
}
