// One token of Gated DeltaNet for each sequence: causal convolution, unit length, gates, and the delta rule; or ROWS
// consecutive ones, one after another, of which the first control[3] count: the state after each of them goes to a
// place of its own in the rings.
//
// Grid: SPLITS x VALUE_HEADS x BATCH. A block owns VALUE_SIZE / SPLITS rows of a value head's state and convolves what
// they need: the key head's q and k again in each of its blocks, its own rows of v alone. ROW_LANES threads share a
// row.
//
// Macros: BATCH, ROWS, KEY_HEADS, VALUE_HEADS, KEY_SIZE, VALUE_SIZE, CONV (the convolution's length), P_STRIDE, GATES
// (where in p the gates of the first key head are), SPLITS, ROW_LANES, THREADS.
// The rings of more than one row have more than ROWS places.

#include "common.cuh"

#define SERVED (VALUE_HEADS / KEY_HEADS)
#define KEY_WIDTH (KEY_HEADS * KEY_SIZE)
#define VALUE_WIDTH (VALUE_HEADS * VALUE_SIZE)
#define CHANNELS (2 * KEY_WIDTH + VALUE_WIDTH)
#define STATE_ROWS (VALUE_SIZE / SPLITS)
#define VECTORS (KEY_SIZE / (4 * ROW_LANES))
#define GROUPS (THREADS / ROW_LANES)
#define TURNS ((STATE_ROWS + GROUPS - 1) / GROUPS)
#define CONVOLVED (2 * KEY_SIZE + STATE_ROWS)
#define EACH ((CONVOLVED + THREADS - 1) / THREADS)
#define READERS (SERVED * SPLITS)

__device__ __forceinline__ float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

__device__ __forceinline__ float4 blend(float decay, float4 state, float scale, float4 key) {
    return make_float4(decay * state.x + scale * key.x, decay * state.y + scale * key.y,
                       decay * state.z + scale * key.z, decay * state.w + scale * key.w);
}

// The channel of the convolution that is the block's `index`-th: q, k, then its rows of v.
__device__ __forceinline__ int channel_of(int index, int key_head, int first_value) {
    if (index < KEY_SIZE) return key_head * KEY_SIZE + index;
    if (index < 2 * KEY_SIZE) return KEY_WIDTH + key_head * KEY_SIZE + index - KEY_SIZE;
    return 2 * KEY_WIDTH + first_value + index - 2 * KEY_SIZE;
}

// Channel i of a block at `place` of what the convolution reads: the window, then the new tokens as a window has them.
__device__ __forceinline__ __half seen(const __half (&window)[CONV - 1], const float (&newest)[ROWS][EACH], int place,
                                       int i) {
    return place < CONV - 1 ? window[place] : __float2half(newest[place - (CONV - 1)][i]);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    delta_step(const float *p, __half *conv_ring, float *delta_ring, const int *control, float *y,
               const float *conv_weight, const float *a, const float *dt, int *counters) {
    const int head = blockIdx.y, sequence = blockIdx.z, key_head = head / SERVED;
    const int lane = threadIdx.x % ROW_LANES, group = threadIdx.x / ROW_LANES;
    const int first_value = head * VALUE_SIZE + blockIdx.x * STATE_ROWS;
    const long long turn = control[0], ring = control[2], next_turn = turn + 1 < ring ? turn + 1 : 0;
    const int count = ROWS > 1 ? control[3] : 1;

    // The rings were last written by an earlier step, so reading them need not wait for this step's other kernels.
    const long long state_size = (long long)VALUE_WIDTH * KEY_SIZE;
    const long long place = (long long)first_value * KEY_SIZE;
    const float4 *past = (const float4 *)(delta_ring + (turn * BATCH + sequence) * state_size + place);
    float4 state[TURNS][VECTORS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const int row = i * GROUPS + group;
#pragma unroll
        for (int j = 0; j < VECTORS; j++) {
            state[i][j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (row < STATE_ROWS) state[i][j] = past[(row * VECTORS + j) * ROW_LANES + lane];
        }
    }
    const __half *past_window = conv_ring + (turn * BATCH + sequence) * (CONV - 1) * CHANNELS;
    __half window[EACH][CONV - 1];
    float weights[EACH][CONV];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int index = i * THREADS + threadIdx.x;
        if (index < CONVOLVED) {
            const int channel = channel_of(index, key_head, first_value);
#pragma unroll
            for (int tap = 0; tap < CONV; tap++) weights[i][tap] = conv_weight[channel * CONV + tap];
#pragma unroll
            for (int tap = 0; tap < CONV - 1; tap++) window[i][tap] = past_window[tap * CHANNELS + channel];
        }
    }
    const float rate = a[head], offset = dt[head];

    grid_launch_dependents();
    grid_dependency_wait();

    const float *projected = p + (long long)sequence * ROWS * P_STRIDE;
    const float *gates = projected + GATES + key_head * 2 * SERVED + head % SERVED;
    float beta_logit[ROWS], step[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        beta_logit[r] = load_now(gates + r * P_STRIDE);
        step[r] = load_now(gates + r * P_STRIDE + SERVED) + offset;
    }
    __shared__ __align__(16) float convolved[ROWS][(CONVOLVED + 3) / 4 * 4]; // loaded as float4
    float newest[ROWS][EACH];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int index = i * THREADS + threadIdx.x;
            if (index < CONVOLVED)
                newest[r][i] = load_now(projected + r * P_STRIDE + channel_of(index, key_head, first_value));
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int index = i * THREADS + threadIdx.x;
            if (index < CONVOLVED) {
                float sum = weights[i][CONV - 1] * newest[r][i];
#pragma unroll
                for (int tap = 0; tap < CONV - 1; tap++)
                    sum += weights[i][tap] * __half2float(seen(window[i], newest, r + tap, i));
                convolved[r][index] = silu(sum);
            }
        }
    }
    float beta[ROWS], decay[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        beta[r] = sigmoid(beta_logit[r]);
        decay[r] = expf(rate * (step[r] > 20.0f ? step[r] : log1pf(expf(step[r]))));
    }

    __syncthreads();
    // In place (a ring of one), whoever reads the key head's q and k last puts their windows into the ring: a block
    // that wrote them earlier would shift them under the others.
    const bool in_place = ROWS == 1 && turn == next_turn;
    int arrived = 0;
    int *counter = counters + sequence * KEY_HEADS + key_head;
    if (in_place && threadIdx.x == 0) arrived = arrive(counter);

    long long written = next_turn;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float4 query[VECTORS], key[VECTORS];
        float query_square = 0.0f, key_square = 0.0f, query_key = 0.0f;
#pragma unroll
        for (int j = 0; j < VECTORS; j++) {
            query[j] = ((const float4 *)convolved[r])[j * ROW_LANES + lane];
            key[j] = ((const float4 *)(convolved[r] + KEY_SIZE))[j * ROW_LANES + lane];
            query_square += dot(query[j], query[j]);
            key_square += dot(key[j], key[j]);
            query_key += dot(query[j], key[j]);
        }
        const float query_norm = rsqrtf(warp_sum<ROW_LANES>(query_square) + 1e-6f) * rsqrtf((float)KEY_SIZE);
        const float key_norm = rsqrtf(warp_sum<ROW_LANES>(key_square) + 1e-6f);
        query_key = warp_sum<ROW_LANES>(query_key) * query_norm * key_norm;

        float4 *present = (float4 *)(delta_ring + (written * BATCH + sequence) * state_size + place);
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            float by_key = 0.0f, by_query = 0.0f;
#pragma unroll
            for (int j = 0; j < VECTORS; j++) {
                by_key += dot(state[i][j], key[j]);
                by_query += dot(state[i][j], query[j]);
            }
            by_key = warp_sum<ROW_LANES>(by_key) * key_norm;
            by_query = warp_sum<ROW_LANES>(by_query) * query_norm;
            const int row = i * GROUPS + group;
            if (row < STATE_ROWS) {
                const float correction = beta[r] * (convolved[r][2 * KEY_SIZE + row] - decay[r] * by_key);
                const float scale = correction * key_norm;
#pragma unroll
                for (int j = 0; j < VECTORS; j++) {
                    state[i][j] = blend(decay[r], state[i][j], scale, key[j]);
                    if (r < count) present[(row * VECTORS + j) * ROW_LANES + lane] = state[i][j];
                }
                // S'^T q of the new state S', without another sum over its rows
                if (lane == 0)
                    y[((long long)sequence * ROWS + r) * VALUE_WIDTH + first_value + row] =
                        decay[r] * by_query + correction * query_key;
            }
        }
        written = written + 1 < ring ? written + 1 : 0;
    }

    bool writer = head % SERVED == 0 && blockIdx.x == 0;
    if (in_place) {
        __shared__ int is_last;
        if (threadIdx.x == 0) {
            is_last = arrived == READERS - 1;
            if (is_last) *counter = 0;
        }
        __syncthreads();
        writer = is_last;
    }
    written = next_turn;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        __half *present_window = conv_ring + (written * BATCH + sequence) * (CONV - 1) * CHANNELS;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int index = i * THREADS + threadIdx.x;
            if (index < CONVOLVED && r < count && (index >= 2 * KEY_SIZE || writer)) {
                const int channel = channel_of(index, key_head, first_value);
#pragma unroll
                for (int tap = 0; tap < CONV - 1; tap++)
                    present_window[tap * CHANNELS + channel] = seen(window[i], newest, r + 1 + tap, i);
            }
        }
        written = written + 1 < ring ? written + 1 : 0;
    }
}
