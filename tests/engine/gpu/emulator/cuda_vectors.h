// CUDA's vector types.
#pragma once

#define VECTOR_TYPES(type, name, two, four)                                                                        \
    struct __attribute__((aligned(two))) name##2 { type x, y; };                                                   \
    struct name##3 { type x, y, z; };                                                                              \
    struct __attribute__((aligned(four))) name##4 { type x, y, z, w; };                                            \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                               \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                                    \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTOR_TYPES(float, float, 8, 16)
VECTOR_TYPES(int, int, 8, 16)
VECTOR_TYPES(unsigned, uint, 8, 16)
VECTOR_TYPES(short, short, 4, 8)
VECTOR_TYPES(unsigned short, ushort, 4, 8)
VECTOR_TYPES(signed char, char, 2, 4)
VECTOR_TYPES(unsigned char, uchar, 2, 4)
#undef VECTOR_TYPES
