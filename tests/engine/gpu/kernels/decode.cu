// The weights of few bits in common.cuh: every pair of a word.
#include "common.cuh"

extern "C" __global__ void decode(const unsigned *words, float *nibbles, float *bytes, float *e2m1, float *scaled) {
    const unsigned word = words[threadIdx.x];
    float *n = nibbles + 8 * threadIdx.x, *e = e2m1 + 8 * threadIdx.x, *s = scaled + 8 * threadIdx.x;
    float *b = bytes + 4 * threadIdx.x;
#define PAIR(p)                                                                                                        \
    n[p] = __low2float(nibbles_to_half2<p>(word)), n[p + 4] = __high2float(nibbles_to_half2<p>(word));                 \
    e[p] = __low2float(e2m1_to_half2<p>(word)), e[p + 4] = __high2float(e2m1_to_half2<p>(word));                       \
    s[p] = __low2float(e2m1_to_half2_scaled<p>(word)), s[p + 4] = __high2float(e2m1_to_half2_scaled<p>(word));
    PAIR(0) PAIR(1) PAIR(2) PAIR(3)
    b[0] = __low2float(bytes_to_half2<0>(word)), b[1] = __high2float(bytes_to_half2<0>(word));
    b[2] = __low2float(bytes_to_half2<1>(word)), b[3] = __high2float(bytes_to_half2<1>(word));
}
