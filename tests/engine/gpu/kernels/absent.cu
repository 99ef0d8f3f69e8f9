// y = x - z * scale, where the first and third argument are null.
#include "common.cuh"

extern "C" __global__ void absent(const float *first, const float *x, const float *third, const float *z, float *y,
                                  __half *halves, const float *scale) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (!first && !third) y[i] = x[i] - z[i] * scale[0];
    halves[i] = __float2half(0.0f);
}
