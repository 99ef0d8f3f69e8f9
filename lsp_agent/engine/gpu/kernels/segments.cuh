// The segments of `project`: their sizes as types, and the choice among them by item.
#pragma once

#include "common.cuh"
#include "prologue.cuh"

struct Weights {
    const unsigned char *codes;
    const void *scales;
    const unsigned char *zero_points;
    const void *corrections;
};

__host__ __device__ constexpr int largest(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int smallest(int a, int b) { return a < b ? a : b; }

template <int ROWS, int BITS, int BLOCK, int SCALE_HALF, int ZERO, int CORRECTED, int AT_ONCE, int FIRST_ROW,
          int FIRST_ITEM>
struct Segment {
    static constexpr int rows = ROWS, bits = BITS, block = BLOCK, at_once = AT_ONCE, first_row = FIRST_ROW;
    static constexpr bool scale_half = SCALE_HALF, zero = ZERO, corrected = CORRECTED;
    static constexpr bool by_columns = BITS == 16 && ROWS > 1; // floats whose rows do not lie in a piece
    static constexpr int values = 128 / BITS, chunks = COLUMNS / values; // of a chunk; of a row
    static constexpr int each = (chunks + WARP - 1) / WARP;              // chunks of a row for each lane
    static constexpr int held = BITS == 16 && ROWS > 1 ? 0 : each < BUFFER / AT_ONCE ? each : BUFFER / AT_ONCE;
    static constexpr int tiles = by_columns ? 1 : (each + (held ? held : 1) - 1) / (held ? held : 1);
    static constexpr bool exact = tiles * held * WARP == chunks; // no lane ever lies beyond the row
    static constexpr int blocks = BITS == 16 ? 1 : COLUMNS / BLOCK;
    static constexpr int scales = BITS == 16 ? 0 : values > BLOCK ? values / BLOCK : 1; // of a chunk
    // Groups whose products are added up in fp16; they share a scale, the chunk's one of this number.
    static constexpr int piece = smallest(TERMS / 4, smallest(values, BITS == 16 ? values : BLOCK) / GROUP);
    static __device__ __forceinline__ constexpr int scale_of(int p) {
        return scales > 1 ? p * piece * GROUP / BLOCK : 0;
    }
    static constexpr float unit = BITS == 4 ? 8.0f : BITS == 8 ? 128.0f : 1.0f;
    static constexpr int first_item = FIRST_ITEM, last_item = FIRST_ITEM + (ROWS + AT_ONCE - 1) / AT_ONCE;
    static_assert(BITS == 16 || COLUMNS % BLOCK == 0, "rows are whole blocks");
    static_assert(by_columns || COLUMNS % values == 0, "rows are whole chunks");
    static_assert(by_columns || AT_ONCE <= BUFFER, "a warp holds a chunk of each row");
};

#define SEGMENT(s, row, item)                                                                                          \
    Segment<ROWS_##s, BITS_##s, BLOCK_##s, SCALE_HALF_##s, ZERO_##s, CORRECTED_##s, AT_ONCE_##s, row, item>
typedef SEGMENT(0, 0, 0) Segment0;
#define LAST Segment0
#if SEGMENTS > 1
typedef SEGMENT(1, ROWS_0, Segment0::last_item) Segment1;
#undef LAST
#define LAST Segment1
#endif
#if SEGMENTS > 2
typedef SEGMENT(2, ROWS_0 + ROWS_1, Segment1::last_item) Segment2;
#undef LAST
#define LAST Segment2
#endif
#if SEGMENTS > 3
typedef SEGMENT(3, ROWS_0 + ROWS_1 + ROWS_2, Segment2::last_item) Segment3;
#undef LAST
#define LAST Segment3
#endif

constexpr int ITEMS = LAST::last_item, ALL_ROWS = LAST::first_row + LAST::rows;
constexpr int WARPS = THREADS / WARP, STRIDE = WARPS * BLOCKS;

// `call(Segment, weights)` for the segment of an item, the same for a whole warp.
#if SEGMENTS == 1
#define BY_SEGMENT(item, call) call(Segment0, 0)
#elif SEGMENTS == 2
#define BY_SEGMENT(item, call)                                                                                         \
    if (item < Segment0::last_item) call(Segment0, 0);                                                                 \
    else call(Segment1, 1)
#elif SEGMENTS == 3
#define BY_SEGMENT(item, call)                                                                                         \
    if (item < Segment0::last_item) call(Segment0, 0);                                                                 \
    else if (item < Segment1::last_item) call(Segment1, 1);                                                            \
    else call(Segment2, 2)
#else
#define BY_SEGMENT(item, call)                                                                                         \
    if (item < Segment0::last_item) call(Segment0, 0);                                                                 \
    else if (item < Segment1::last_item) call(Segment1, 1);                                                            \
    else if (item < Segment2::last_item) call(Segment2, 2);                                                            \
    else call(Segment3, 3)
#endif

#if SEGMENTS == 1
#define MOST(field) Segment0::field
#elif SEGMENTS == 2
#define MOST(field) largest(Segment0::field, Segment1::field)
#elif SEGMENTS == 3
#define MOST(field) largest(largest(Segment0::field, Segment1::field), Segment2::field)
#else
#define MOST(field) largest(largest(Segment0::field, Segment1::field), largest(Segment2::field, Segment3::field))
#endif
