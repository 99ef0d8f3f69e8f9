// Attention of one new token for each sequence over its cached keys and values, and the new token's own; or of ROWS
// consecutive ones, whose keys and values append_tokens has put into the caches before.
//
// Flash-decoding: grid SPLITS x (KV_HEADS * PARTS) x (BATCH * ROWS). A block reads a stretch of one head's keys and
// values once, for PART of the query heads that share it (Dao et al., 2023; Milakov and Gimelshein, 2018, for the
// softmax as it goes); the last block of those heads puts the stretches together. A warp takes TOKENS tokens at a time,
// on the tensor cores: scores are queries (16 rows, PART of them used) times keys, sums are values transposed times
// weights.
//
// Macros: BATCH, ROWS, KV_HEADS, GROUP (query heads for each of them), HEAD, ROTARY, GATE (0 or 1: a gate follows each
// query in p), QK_NORM (0 or 1), EPSILON, P_STRIDE, PARTS (blocks that share a key head's GROUP), SPLITS,
// LEAST (tokens of a split, at least), THREADS.

#include "common.cuh"
#include "tensor_cores.cuh"

#define QUERY_STRIDE (HEAD * (1 + GATE))
#define KEYS_AT (KV_HEADS * GROUP * QUERY_STRIDE)
#define VALUES_AT (KEYS_AT + KV_HEADS * HEAD)
#define PART ((GROUP + PARTS - 1) / PARTS)
#define DIMS 8 // of a load of 16 bytes
#define TOKENS 8
#define WARPS (THREADS / WARP)
#define TILE (WARPS * TOKENS)
#define CHUNKS (HEAD / 32) // loads of a key: four lanes of 8 dimensions each
#define STRIPS (HEAD / 64) // loads of a value: eight lanes
// Half a warp prepares a query, or the key, where whole ones would not do at once.
#define LANES (PART < WARPS ? WARP : WARP / 2)
#define SLOTS (THREADS / LANES)
#define NEW ((HEAD / 2 + THREADS - 1) / THREADS) // pairs of the new key and value for each thread
#define LOWEST -1e30f // finite, so that no difference is NaN
#define LOADS 16 // of results at a time, when a block puts the stretches together
#define NEW_TOKENS (BATCH * ROWS)

#include "heads.cuh"

constexpr int FITTING = 8192 / (WARPS * HEAD) > 0 ? 8192 / (WARPS * HEAD) : 1;
constexpr int ROUND = PART < FITTING ? PART : FITTING; // heads merged at a time
constexpr int STAGED = (WARPS * ROUND > PART + 1 ? WARPS * ROUND : PART + 1) * HEAD;
static_assert(HEAD % 64 == 0 && PART <= 8 && WARPS <= WARP && LEAST % TILE == 0, "sizes");

__device__ __forceinline__ void unpack(uint4 bits, float *values) {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = half_bits_to_float2(words[i]);
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_step(const float *p, __half *key_cache, __half *value_cache, const int *lengths, const int *control,
#if ROWS > 1
                   const int *appended, // says nothing, but who takes it comes after append_tokens
#endif
                   float *y, float *scratch, const float *query_norm, const float *key_norm, const __half *cosines,
                   const __half *sines, int *counters) {
    const int split = blockIdx.x, kv_head = blockIdx.y / PARTS, part = blockIdx.y % PARTS;
    const int newest_token = blockIdx.z, sequence = blockIdx.z / ROWS;
    const int lane = lane_index(), warp = warp_index(), row = lane / 4, column = lane % 4;
    // Both at once: a plain load of the second would be put off behind the return below.
    const int position = load_streamed((const unsigned *)lengths + newest_token);
    const int capacity = load_streamed((const unsigned *)control + 1);
    const int share = (position + SPLITS) / SPLITS; // of position + 1 tokens, rounded up
    const int stretch = share > LEAST ? (share + TILE - 1) / TILE * TILE : LEAST;
    const int active = position / stretch + 1;
    if (split >= active) return;
    const int start = split * stretch;
    const bool latest = split == active - 1, owner = ROWS == 1 && latest; // of the new token
    const int last = latest ? position : start + stretch - 1;
    const int turns = (last - start) / TILE + 1;

    __shared__ __align__(16) float staged[STAGED]; // first the queries, at the end the warps' results
    __shared__ __align__(16) unsigned newest[2][HEAD / 2]; // the new token's key and value, as the cache holds them
    __shared__ float warp_best[WARPS][8], warp_total[WARPS][8], factors[WARPS][8];

    const long long cached = ((long long)sequence * KV_HEADS + kv_head) * capacity * HEAD;
    uint4 keys[CHUNKS], values[STRIPS][2];
    // Rows past the end repeat the last one, with weights of zero.
    const auto load_keys = [&](int token) {
        const int of = token + row < last ? token + row : last;
        const __half *from = key_cache + cached + (long long)of * HEAD + column * DIMS;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) keys[c] = *(const uint4 *)(from + c * 32);
    };
    const auto load_values = [&](int token) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int of = token + 2 * column + i < last ? token + 2 * column + i : last;
            const __half *from = value_cache + cached + (long long)of * HEAD + row * DIMS;
#pragma unroll
            for (int s = 0; s < STRIPS; s++) values[s][i] = *(const uint4 *)(from + s * 64);
        }
    };
    int token = start + warp * TOKENS;
    if (ROWS == 1) {
        // Earlier steps wrote what the cache holds. Of the new token's row and those after it, whatever lies there is
        // read.
        load_keys(token);
        load_values(token);
    }
    const int slot = threadIdx.x / LANES, place = threadIdx.x % LANES;
    Rotation rotation;
    rotation.load(cosines + (long long)position * (ROTARY / 2), sines + (long long)position * (ROTARY / 2), place);
    Head head;
    head.load_norm(slot < PART ? query_norm : key_norm, place);

    grid_launch_dependents();
    grid_dependency_wait();

    if (ROWS > 1) {
        load_keys(token);
        load_values(token);
    }
    const float *projected = p + (long long)newest_token * P_STRIDE;
    float2 new_value[NEW];
#pragma unroll
    for (int i = 0; i < NEW; i++) {
        const int pair = i * THREADS + threadIdx.x;
        if (owner && pair < HEAD / 2)
            new_value[i] = __ldcg((const float2 *)(projected + VALUES_AT + kv_head * HEAD) + pair);
    }
#pragma unroll 1
    for (int first = 0; first < PART + owner; first += SLOTS) {
        const int item = first + slot;
        // Past the end of the group the last head is computed again.
        const int of_group = part * PART + item < GROUP ? part * PART + item : GROUP - 1;
        const int query_at = (kv_head * GROUP + of_group) * QUERY_STRIDE;
        head.load(projected + (item < PART ? query_at : KEYS_AT + kv_head * HEAD), place);
        if (first > 0) head.load_norm(item < PART ? query_norm : key_norm, place);
        prepare(head, rotation, place, item < PART + owner, staged + item * HEAD);
    }
    __syncthreads();
    if (owner) { // all of the block's threads, or none
#pragma unroll
        for (int i = 0; i < NEW; i++) {
            const int pair = i * THREADS + threadIdx.x;
            if (pair >= HEAD / 2) break;
            const float2 key = ((const float2 *)(staged + PART * HEAD))[pair];
            newest[0][pair] = as_bits(__floats2half2_rn(key.x, key.y));
            newest[1][pair] = as_bits(__floats2half2_rn(new_value[i].x, new_value[i].y));
            const long long at = (cached + (long long)position * HEAD) / 2 + pair;
            ((unsigned *)key_cache)[at] = newest[0][pair];
            ((unsigned *)value_cache)[at] = newest[1][pair];
        }
        __syncthreads();
    }

    // Which dimension is which column of a product is free, as long as queries and keys agree: 16 bytes of each.
    unsigned query[CHUNKS][4];
    const float scale = rsqrtf((float)HEAD) * 1.44269504f; // scores to the base of two
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const float *from = staged + (row < PART ? row : 0) * HEAD + c * 32 + column * DIMS;
#pragma unroll
        for (int i = 0; i < 4; i++)
            query[c][i] = row < PART ? as_bits(__floats2half2_rn(from[2 * i] * scale, from[2 * i + 1] * scale)) : 0u;
    }
    // Head 2 * column (and the one after it), dimensions 64 s + 8 row + 2 i (and the one after it)
    float sums[STRIPS][4][4] = {};
    float best = LOWEST, total = 0.0f; // of head `row`
    for (int turn = 0; turn < turns; turn++, token += TILE) {
        if (owner && turn == turns - 1) {
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
                if (token + row >= position) keys[c] = ((const uint4 *)newest[0])[c * 4 + column];
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int s = 0; s < STRIPS; s++)
                    if (token + 2 * column + i >= position) values[s][i] = ((const uint4 *)newest[1])[s * 8 + row];
            }
        }
        float scores[2][4] = {};
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            multiply_16x8x16(scores[0], query[c][0], query[c][1], keys[c].x, keys[c].y);
            multiply_16x8x16(scores[1], query[c][2], query[c][3], keys[c].z, keys[c].w);
        }
        if (turn + 1 < turns) load_keys(token + TILE);

        float score[2], higher = best;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            score[i] = token + 2 * column + i > last ? 2 * LOWEST : scores[0][i] + scores[1][i];
            higher = fmaxf(higher, score[i]);
        }
        higher = warp_max<4>(higher);
        const float decay = exp2f(best - higher);
        best = higher;
        const __half2 weights = __floats2half2_rn(exp2f(score[0] - best), exp2f(score[1] - best));
        const float2 rounded = __half22float2(weights);
        total = total * decay + rounded.x + rounded.y;
        if (__any_sync(FULL_WARP, decay != 1.0f)) {
            const float first = __shfl_sync(FULL_WARP, decay, 8 * column);
            const float second = __shfl_sync(FULL_WARP, decay, 8 * column + 4);
#pragma unroll
            for (int s = 0; s < STRIPS; s++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sums[s][i][0] *= first;
                    sums[s][i][1] *= second;
                    sums[s][i][2] *= first;
                    sums[s][i][3] *= second;
                }
            }
        }
#pragma unroll
        for (int s = 0; s < STRIPS; s++) {
            const uint4 even = values[s][0], odd = values[s][1];
            const unsigned pairs[4][2] = {{even.x, odd.x}, {even.y, odd.y}, {even.z, odd.z}, {even.w, odd.w}};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const unsigned upper = __byte_perm(pairs[i][0], pairs[i][1], 0x5410);
                const unsigned lower = __byte_perm(pairs[i][0], pairs[i][1], 0x7632);
                multiply_16x8x8(sums[s][i], upper, lower, as_bits(weights));
            }
        }
        if (turn + 1 < turns) load_values(token + TILE);
    }

    const long long of_heads = ((long long)newest_token * KV_HEADS + kv_head) * PARTS + part;
    float *out = y + ((long long)newest_token * KV_HEADS + kv_head) * GROUP * HEAD;
    __half *partial = (__half *)scratch + of_heads * SPLITS * PART * HEAD;
    float2 *statistics = (float2 *)(scratch + (long long)NEW_TOKENS * KV_HEADS * PARTS * SPLITS * PART * (HEAD / 2)) +
                         of_heads * SPLITS * PART;

    // The warps' results become one: scaled to the same highest score, and to weights that sum to one.
    total = warp_sum<4>(total);
    if (column == 0) {
        warp_best[warp][row] = best;
        warp_total[warp][row] = total;
    }
    __syncthreads();
    for (int h = warp; h < PART; h += WARPS) {
        const float others_best = lane < WARPS ? warp_best[lane][h] : LOWEST;
        const float block_best = warp_max(others_best), factor = exp2f(others_best - block_best);
        const float block_total = warp_sum(lane < WARPS ? factor * warp_total[lane][h] : 0.0f);
        if (lane < WARPS) factors[lane][h] = factor / block_total;
        if (lane == 0 && active > 1) statistics[split * PART + h] = make_float2(block_best, block_total);
    }
    __syncthreads();

    // Of PART heads, those that belong to the group
    const int heads = GROUP - part * PART < PART ? GROUP - part * PART : PART;
#pragma unroll
    for (int merged = 0; merged < PART; merged += ROUND) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int h = 2 * column + i;
            if (h >= merged && h < merged + ROUND && h < PART) {
                const float factor = factors[warp][h];
#pragma unroll
                for (int s = 0; s < STRIPS; s++) {
                    float4 *to = (float4 *)(staged + (warp * ROUND + h - merged) * HEAD + s * 64 + row * DIMS);
#pragma unroll
                    for (int j = 0; j < 2; j++)
                        to[j] = make_float4(sums[s][2 * j][i] * factor, sums[s][2 * j][i + 2] * factor,
                                            sums[s][2 * j + 1][i] * factor, sums[s][2 * j + 1][i + 2] * factor);
                }
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
        is_last = arrive(&counters[of_heads]) == active - 1;
        if (is_last) counters[of_heads] = 0;
    }
    __syncthreads();
    if (!is_last) return;
    for (int item = threadIdx.x; item < heads * (HEAD / DIMS); item += THREADS) {
        const int h = item / (HEAD / DIMS);
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
