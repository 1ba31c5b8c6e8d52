/* AMX pieces that the *_amx.c files share. Included by nothing else. */
#ifndef ERN_BACKEND_CPU_VEC_AMX_H
#define ERN_BACKEND_CPU_VEC_AMX_H

#include "backend/cpu/vec_avx512.h"

enum { TILE_ROWS = 16, TILE_BYTES = 1024, TILE_K = 32 /* bf16 numbers of a row */ };

static inline int32_t tiles_of(int32_t n, int32_t each) { return (n + each - 1) / each; }

/* Palette 1: tiles of 64 bytes a row; 0, 1 and 4 of `first` rows, 2, 3 and 5 of `second`, 6 and 7 of 16. Layout: Intel
 * SDM, LDTILECFG. A block of products:
 *
 *            6     7
 *      4  [  0 ][  1 ]
 *      5  [  2 ][  3 ] */
CPU_INLINE void cpu_tiles_begin(int first, int second) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } c = {.palette = 1};
    _Static_assert(sizeof c == 64, "LDTILECFG reads 64 bytes");
    for (int i = 0; i < 8; i++) c.row_bytes[i] = 64, c.rows[i] = TILE_ROWS;
    c.rows[0] = c.rows[1] = c.rows[4] = (uint8_t)first;
    c.rows[2] = c.rows[3] = c.rows[5] = (uint8_t)second;
    __asm__ volatile("" : : "r"(&c) : "memory"); /* the intrinsic tells the compiler of 8 of the 64 bytes only */
    _tile_loadconfig(&c);
}

/* A tile from rows at p, `stride` bytes apart. The intrinsic of gcc 12 does not say that it reads memory: what is
 * stored there just before could come after it. */
#define cpu_tile_load(tile, p, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(p), "r"((int64_t)(stride)) : "memory")

/* 16 numbers rounded to bf16, ties to even; NaN stays. vcvtneps2bf16 would make zeros of the smallest ones too, which a
 * product of tiles does anyway. */
CPU_INLINE __m256i cpu_narrow(__m512 x) {
    const __m512i v = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(v, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(v, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_or_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_srli_epi32(v, 16), _mm512_set1_epi32(0x40)));
}

/* Lines x and y as pairs (x[i], y[i]): i = 0..15, or 16..31. */
CPU_INLINE __m512i cpu_pairs(__m512i x, __m512i y, const int half) {
    const __m512i first = _mm512_add_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                           _mm512_set_epi32(47 << 16, 46 << 16, 45 << 16, 44 << 16, 43 << 16, 42 << 16,
                                                            41 << 16, 40 << 16, 39 << 16, 38 << 16, 37 << 16, 36 << 16,
                                                            35 << 16, 34 << 16, 33 << 16, 32 << 16));
    return _mm512_permutex2var_epi16(x, half ? _mm512_add_epi16(first, _mm512_set1_epi16(16)) : first, y);
}

#endif
