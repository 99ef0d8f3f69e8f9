// Attention of one new token for each sequence over its cached keys and values, and the new token's own.
//
// Flash-decoding: grid SPLITS x (KV_HEADS * PARTS) x BATCH. A block reads a stretch of one head's keys and values once,
// for PART of the query heads that share it (Dao et al., 2023; Milakov and Gimelshein, 2018, for the softmax as it
// goes); the last block of those heads puts the stretches together. A team of LANES threads takes TOKENS tokens at a
// time, each thread 8 dimensions of them.
//
// Macros: BATCH, KV_HEADS, GROUP (query heads for each of them), HEAD, ROTARY, GATE (0 or 1: a gate follows each query
// in p), QK_NORM (0 or 1), EPSILON, P_STRIDE, PARTS (blocks that share a key head's GROUP), SPLITS, LEAST (tokens of a
// split, at least), THREADS.

#include "common.cuh"

#define QUERY_STRIDE (HEAD * (1 + GATE))
#define KEYS_AT (KV_HEADS * GROUP * QUERY_STRIDE)
#define VALUES_AT (KEYS_AT + KV_HEADS * HEAD)
#define PART ((GROUP + PARTS - 1) / PARTS)
#define DIMS 8
#define TOKENS 4
#define LANES (HEAD / DIMS)
#define TEAMS (THREADS / LANES)
#define WARPS (THREADS / WARP)
#define TILE (TEAMS * TOKENS)
#define COLUMNS ((HEAD + WARP - 1) / WARP)
#define LOWEST -1e30f // finite, so that no difference is NaN
#define LOADS 16 // of results at a time, when a block puts the stretches together

__device__ constexpr int power_of_two(int least) {
    int power = 1;
    while (power < least) power *= 2;
    return power;
}
constexpr int PADDED = power_of_two(PART);                        // heads
constexpr int SCORES = PADDED * TOKENS;                           // of a team and turn, tokens of a head together
constexpr int HELD = SCORES > LANES ? SCORES / LANES : 1;         // scores of a lane
constexpr int COPIES = LANES > SCORES ? LANES / SCORES : 1;       // lanes of a score
constexpr int HEAD_LANES = LANES / PADDED;                        // lanes of a head's scores
constexpr int ROUND = PART * HEAD > 1024 ? (PART + 1) / 2 : PART; // heads merged at a time
constexpr int STAGED = (WARPS * ROUND > PART + 1 ? WARPS * ROUND : PART + 1) * HEAD;
static_assert(HEAD_LANES >= 1 && TEAMS <= WARP && LANES <= WARP && LEAST % TILE == 0, "sizes");

// Sums of COUNT values over the lanes of a team, spread over them: lane i of the team ends with HELD of the sums, from
// the one numbered i / COPIES * HELD. Halves what is left at each step, where a sum for every lane would not.
template <int COUNT, int OFFSET> __device__ __forceinline__ void spread_sums(float *values, int lane) {
    if constexpr (OFFSET > 0 && COUNT > 1) {
        const bool upper = lane & OFFSET;
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) {
            const float kept = upper ? values[i + COUNT / 2] : values[i];
            const float given = upper ? values[i] : values[i + COUNT / 2];
            values[i] = kept + __shfl_xor_sync(FULL_WARP, given, OFFSET);
        }
        spread_sums<COUNT / 2, OFFSET / 2>(values, lane);
    } else if constexpr (OFFSET > 0) {
        values[0] += __shfl_xor_sync(FULL_WARP, values[0], OFFSET);
        spread_sums<1, OFFSET / 2>(values, lane);
    }
}

__device__ __forceinline__ void unpack(uint4 bits, float *values) {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = half_bits_to_float2(words[i]);
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
    }
}

// One head's query or key in `prepared`: normalised and rotated. The lanes of a warp do it together.
__device__ __forceinline__ void prepare(const float *source, const float *norm, const __half *cosines,
                                        const __half *sines, float *prepared) {
    const int lane = lane_index();
    float x[COLUMNS], square = 0.0f;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
        const int column = i * WARP + lane;
        x[i] = column < HEAD ? source[column] : 0.0f;
        square += x[i] * x[i];
    }
    const float scale = QK_NORM ? rsqrtf(warp_sum(square) / HEAD + EPSILON) : 1.0f;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
        const int column = i * WARP + lane;
        if (column < HEAD) prepared[column] = x[i] * scale * (QK_NORM ? norm[column] : 1.0f);
    }
    __syncwarp();
    for (int i = lane; i < ROTARY / 2; i += WARP) {
        const float c = __half2float(cosines[i]), s = __half2float(sines[i]);
        const float first = prepared[i], second = prepared[i + ROTARY / 2];
        prepared[i] = first * c - second * s;
        prepared[i + ROTARY / 2] = second * c + first * s;
    }
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_step(const float *p, __half *key_cache, __half *value_cache, const int *lengths, const int *control,
                   float *y, float *scratch, const float *query_norm, const float *key_norm, const __half *cosines,
                   const __half *sines, int *counters) {
    const int split = blockIdx.x, kv_head = blockIdx.y / PARTS, part = blockIdx.y % PARTS, sequence = blockIdx.z;
    const int lane = threadIdx.x % LANES, team = threadIdx.x / LANES, warp = warp_index();
    const int position = lengths[sequence], capacity = control[1];
    const int share = (position + SPLITS) / SPLITS; // of position + 1 tokens, rounded up
    const int stretch = share > LEAST ? (share + TILE - 1) / TILE * TILE : LEAST;
    const int active = position / stretch + 1;
    if (split >= active) return;
    const int start = split * stretch;
    const bool owner = split == active - 1; // of the new token
    const int last = owner ? position : start + stretch - 1;
    const int turns = (last - start) / TILE + 1;

    __shared__ __align__(16) float staged[STAGED]; // first the queries, at the end the teams' results
    __shared__ __align__(16) float weights[TEAMS][SCORES];
    __shared__ float decays[TEAMS][PADDED], team_best[TEAMS][PADDED], team_total[TEAMS][PADDED];

    const long long cached = ((long long)sequence * KV_HEADS + kv_head) * capacity * HEAD;
    uint4 keys[TOKENS], values[TOKENS];
    const auto load = [&](uint4 *into, const __half *cache, int token) {
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const int row = token + t < last ? token + t : last;
            into[t] = *(const uint4 *)(cache + cached + (long long)row * HEAD + lane * DIMS);
        }
    };
    int token = start + team * TOKENS;
    // Earlier steps wrote what the cache holds: only the new token's row must wait.
    if (!owner) {
        load(keys, key_cache, token);
        load(values, value_cache, token);
    }

    grid_dependency_wait();

    const float *projected = p + (long long)sequence * P_STRIDE;
    const __half *turned_c = cosines + (long long)position * (ROTARY / 2);
    const __half *turned_s = sines + (long long)position * (ROTARY / 2);
    const long long new_row = cached + (long long)position * HEAD;
    for (int item = warp; item < PART + owner; item += WARPS) {
        float *prepared = staged + item * HEAD;
        if (item < PART) {
            // Past the end of the group the last head is computed again.
            const int of_group = part * PART + item < GROUP ? part * PART + item : GROUP - 1;
            const float *query = projected + (kv_head * GROUP + of_group) * QUERY_STRIDE;
            prepare(query, query_norm, turned_c, turned_s, prepared);
        } else {
            prepare(projected + KEYS_AT + kv_head * HEAD, key_norm, turned_c, turned_s, prepared);
            for (int i = lane_index(); i < HEAD; i += WARP) key_cache[new_row + i] = __float2half(prepared[i]);
        }
    }
    if (owner) {
        const float *value = projected + VALUES_AT + kv_head * HEAD;
        for (int i = threadIdx.x; i < HEAD; i += THREADS) value_cache[new_row + i] = __float2half(value[i]);
    }
    __syncthreads();
    if (owner) {
        load(keys, key_cache, token);
        load(values, value_cache, token);
    }

    float query[PART][DIMS], sums[PART][DIMS];
    const float scale = rsqrtf((float)HEAD) * 1.44269504f; // scores to the base of two
#pragma unroll
    for (int h = 0; h < PART; h++) {
#pragma unroll
        for (int d = 0; d < DIMS; d++) {
            query[h][d] = staged[h * HEAD + lane * DIMS + d] * scale;
            sums[h][d] = 0.0f;
        }
    }
    const int first = lane / COPIES * HELD; // the first score that this lane holds
    float best = LOWEST, total = 0.0f;
    for (int turn = 0; turn < turns; turn++, token += TILE) {
        float scores[SCORES];
#pragma unroll
        for (int i = PART * TOKENS; i < SCORES; i++) scores[i] = 0.0f;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            float key[DIMS];
            unpack(keys[t], key);
#pragma unroll
            for (int h = 0; h < PART; h++) {
                float score = 0.0f;
#pragma unroll
                for (int d = 0; d < DIMS; d++) score += query[h][d] * key[d];
                scores[h * TOKENS + t] = score;
            }
        }
        if (turn + 1 < turns) load(keys, key_cache, token + TILE);
        spread_sums<SCORES, LANES / 2>(scores, lane);

        float higher = best;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            if (token + (first + i) % TOKENS > last) scores[i] = 2 * LOWEST;
            higher = fmaxf(higher, scores[i]);
        }
        higher = warp_max<HEAD_LANES>(higher);
        const float decay = exp2f(best - higher);
        best = higher;
        total *= decay;
        __syncwarp(); // the weights of the turn before have been read
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const float weight = exp2f(scores[i] - best);
            total += weight;
            weights[team][first + i] = weight;
        }
        decays[team][first / TOKENS] = decay;
        __syncwarp();

        float value[TOKENS][DIMS];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) unpack(values[t], value[t]);
        if (turn + 1 < turns) load(values, value_cache, token + TILE);
#pragma unroll
        for (int h = 0; h < PART; h++) {
            const float fade = decays[team][h];
            const float4 weight = *(const float4 *)&weights[team][h * TOKENS];
#pragma unroll
            for (int d = 0; d < DIMS; d++)
                sums[h][d] = sums[h][d] * fade + weight.x * value[0][d] + weight.y * value[1][d] +
                             weight.z * value[2][d] + weight.w * value[3][d];
        }
    }

    const long long of_heads = ((long long)sequence * KV_HEADS + kv_head) * PARTS + part;
    float *out = y + ((long long)sequence * KV_HEADS + kv_head) * GROUP * HEAD;
    __half *partial = (__half *)scratch + of_heads * SPLITS * PART * HEAD;
    float2 *statistics = (float2 *)(scratch + (long long)BATCH * KV_HEADS * PARTS * SPLITS * PART * (HEAD / 2)) +
                         of_heads * SPLITS * PART;

    // The teams' results become one: scaled to the same highest score, and to weights that sum to one.
    total = warp_sum<HEAD_LANES>(total) / COPIES;
    team_best[team][first / TOKENS] = best;
    team_total[team][first / TOKENS] = total;
    __syncthreads();
    for (int h = warp; h < PART; h += WARPS) {
        const int other = lane_index();
        const float others_best = other < TEAMS ? team_best[other][h] : LOWEST;
        const float block_best = warp_max(others_best), factor = exp2f(others_best - block_best);
        const float block_total = warp_sum(other < TEAMS ? factor * team_total[other][h] : 0.0f);
        if (other < TEAMS) decays[other][h] = factor / block_total;
        if (other == 0 && active > 1) statistics[split * PART + h] = make_float2(block_best, block_total);
    }
    __syncthreads();

    // Of PART heads, those that belong to the group
    const int heads = GROUP - part * PART < PART ? GROUP - part * PART : PART;
#pragma unroll
    for (int merged = 0; merged < PART; merged += ROUND) {
#pragma unroll
        for (int h = merged; h < merged + ROUND && h < PART; h++) {
            const float factor = decays[team][h];
            float sum[DIMS];
#pragma unroll
            for (int d = 0; d < DIMS; d++) {
                sum[d] = sums[h][d] * factor;
#pragma unroll
                for (int offset = LANES; offset < WARP; offset *= 2)
                    sum[d] += __shfl_xor_sync(FULL_WARP, sum[d], offset);
            }
            if (lane_index() < LANES) {
                float4 *to = (float4 *)(staged + (warp * ROUND + h - merged) * HEAD + lane * DIMS);
                to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
                to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
            }
        }
        __syncthreads();
        for (int i = threadIdx.x * 4; i < ROUND * HEAD; i += THREADS * 4) {
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int other = 0; other < WARPS; other++) {
                const float4 x = *(const float4 *)(staged + other * ROUND * HEAD + i);
                sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
            }
            const int at = merged * HEAD + i;
            if (at / HEAD < heads) {
                if (active == 1) {
                    *(float4 *)(out + part * PART * HEAD + at) = sum;
                } else {
                    const unsigned low = as_bits(__floats2half2_rn(sum.x, sum.y));
                    const unsigned high = as_bits(__floats2half2_rn(sum.z, sum.w));
                    *(uint2 *)(partial + (long long)split * PART * HEAD + at) = make_uint2(low, high);
                }
            }
        }
        __syncthreads();
    }
    if (active == 1) return;

    __shared__ int is_last;
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(&counters[of_heads], 1) == active - 1;
        if (is_last) counters[of_heads] = 0;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    for (int item = threadIdx.x; item < heads * LANES; item += THREADS) {
        const int h = item / LANES;
        float best = LOWEST, total = 0.0f, sum[DIMS] = {};
        for (int from = 0; from < active; from += LOADS) {
            uint4 loaded[LOADS];
            float2 known[LOADS];
            float higher = best;
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const int other = from + i < active ? from + i : active - 1;
                loaded[i] = *(const uint4 *)(partial + (long long)other * PART * HEAD + item * DIMS);
                known[i] = statistics[other * PART + h];
                if (from + i >= active) known[i].y = 0.0f;
            }
#pragma unroll
            for (int i = 0; i < LOADS; i++) higher = fmaxf(higher, known[i].x);
            const float decay = exp2f(best - higher);
            best = higher;
            total *= decay;
#pragma unroll
            for (int d = 0; d < DIMS; d++) sum[d] *= decay;
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const float weight = known[i].y * exp2f(known[i].x - best);
                float values[DIMS];
                unpack(loaded[i], values);
                total += weight;
#pragma unroll
                for (int d = 0; d < DIMS; d++) sum[d] += weight * values[d];
            }
        }
#pragma unroll
        for (int d = 0; d < DIMS; d++) out[part * PART * HEAD + item * DIMS + d] = sum[d] / total;
    }
}
