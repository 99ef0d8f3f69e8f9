// The part of CUDA's header of this name that the kernels use: fp16 numbers, rounded after every operation.
#pragma once

#include "cuda_builtins.h"

struct __half {
    _Float16 value;
    __half() = default;
    __half(float x) : value((_Float16)x) {}
    __half(int x) : value((_Float16)x) {}
    operator float() const { return (float)value; }
};
struct __attribute__((aligned(4))) __half2 {
    __half x, y;
    __half2() = default;
    __half2(__half x, __half y) : x(x), y(y) {}
};
typedef __half half;
typedef __half2 half2;

inline float __half2float(__half a) { return (float)a.value; }
inline __half __float2half(float a) { return __half(a); }
inline __half __float2half_rn(float a) { return __half(a); }
inline __half __int2half_rn(int a) { return __half((float)a); }
inline __half __ushort_as_half(unsigned short bits) { return bits_as<__half>(bits); }
inline unsigned short __half_as_ushort(__half a) { return bits_as<unsigned short>(a); }
inline __half __short_as_half(short bits) { return bits_as<__half>(bits); }

inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 make_half2(__half a, __half b) { return {a, b}; }
inline __half2 __half2half2(__half a) { return {a, a}; }
inline __half2 __float2half2_rn(float a) { return {__half(a), __half(a)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __half2 __float22half2_rn(float2 a) { return {__half(a.x), __half(a.y)}; }
inline float2 __half22float2(__half2 a) { return {(float)a.x.value, (float)a.y.value}; }
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }
inline float __low2float(__half2 a) { return (float)a.x.value; }
inline float __high2float(__half2 a) { return (float)a.y.value; }
inline __half2 __low2half2(__half2 a) { return {a.x, a.x}; }
inline __half2 __high2half2(__half2 a) { return {a.y, a.y}; }
inline __half2 __lowhigh2highlow(__half2 a) { return {a.y, a.x}; }

// fp32 has more than twice the bits, so that rounding its sum, product or quotient again gives the right fp16.
inline __half __hadd(__half a, __half b) { return __half((float)a.value + (float)b.value); }
inline __half __hsub(__half a, __half b) { return __half((float)a.value - (float)b.value); }
inline __half __hmul(__half a, __half b) { return __half((float)a.value * (float)b.value); }
inline __half __hdiv(__half a, __half b) { return __half((float)a.value / (float)b.value); }
inline __half __hfma(__half a, __half b, __half c) {
    return __half(fmaf((float)a.value, (float)b.value, (float)c.value));
}
inline __half operator+(__half a, __half b) { return __hadd(a, b); }
inline __half operator-(__half a, __half b) { return __hsub(a, b); }
inline __half operator*(__half a, __half b) { return __hmul(a, b); }
inline __half operator/(__half a, __half b) { return __hdiv(a, b); }
inline __half __hneg(__half a) { return __half(-(float)a.value); }
inline __half __habs(__half a) { return __half(fabsf((float)a.value)); }
inline __half __hmax(__half a, __half b) { return a.value > b.value ? a : b; }
inline __half __hmin(__half a, __half b) { return a.value < b.value ? a : b; }
inline bool __hgt(__half a, __half b) { return a.value > b.value; }
inline bool __hlt(__half a, __half b) { return a.value < b.value; }
inline bool __hisnan(__half a) { return a.value != a.value; }

inline __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
inline __half2 __hneg2(__half2 a) { return {__hneg(a.x), __hneg(a.y)}; }
inline __half2 __habs2(__half2 a) { return {__habs(a.x), __habs(a.y)}; }
inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
inline __half2 __hmin2(__half2 a, __half2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }
