/* AMX by AVX-512 VNNI, for machines without it: included in front of the *_amx.c files, whose tile instructions it puts
 * into code (test_checkkern_amx). A tile is 16 rows of 64 bytes, of which the configuration may leave some out. Source
 * of what they do: Intel SDM, vol. 2, TDPBSSD, TDPBUSD, TDPBF16PS. */
#ifndef ERN_TESTS_AMX_EMULATED_H
#define ERN_TESTS_AMX_EMULATED_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef struct emulated_tiles {
    _Alignas(64) int8_t tile[8][16][64];
    uint8_t rows[8];
} emulated_tiles;
static _Thread_local emulated_tiles emulated;

static inline void emulated_config(const void *config) { memcpy(emulated.rows, (const char *)config + 48, 8); }
static inline void emulated_zero(int t) { memset(emulated.tile[t], 0, sizeof emulated.tile[t]); }
static inline void emulated_load(int t, const void *from, int64_t stride) {
    emulated_zero(t);
    for (int i = 0; i < emulated.rows[t]; i++) memcpy(emulated.tile[t][i], (const char *)from + i * stride, 64);
}
static inline void emulated_store(int t, void *to, int64_t stride) {
    for (int i = 0; i < emulated.rows[t]; i++) memcpy((char *)to + i * stride, emulated.tile[t][i], 64);
}

/* c += a . b of codes: a's signed ones are made unsigned by adding 128, and 128 times b's sum is taken off again. */
static inline void emulated_codes(int c, int a, int b, int is_signed) {
    const __m512i ones = _mm512_set1_epi8(1), turn = _mm512_set1_epi8(is_signed ? -128 : 0);
    for (int i = 0; i < emulated.rows[c]; i++) {
        __m512i sum = _mm512_load_si512(emulated.tile[c][i]);
        for (int k = 0; k < 16; k++) {
            int32_t four;
            memcpy(&four, emulated.tile[a][i] + 4 * k, sizeof four);
            const __m512i line = _mm512_load_si512(emulated.tile[b][k]);
            sum = _mm512_dpbusd_epi32(sum, _mm512_xor_si512(_mm512_set1_epi32(four), turn), line);
            const __m512i more = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, line);
            if (is_signed) sum = _mm512_sub_epi32(sum, _mm512_slli_epi32(more, 7));
        }
        _mm512_store_si512(emulated.tile[c][i], sum);
    }
}

/* The same of bf16: the even ones of a row and the odd ones are summed apart. Their products are exact in f32. */
static inline void emulated_bf16(int c, int a, int b) {
    const __m512i upper = _mm512_set1_epi32((int32_t)0xffff0000u);
    for (int i = 0; i < emulated.rows[c]; i++) {
        __m512 even = _mm512_setzero_ps(), odd = even;
        for (int k = 0; k < 16; k++) {
            int32_t two;
            memcpy(&two, emulated.tile[a][i] + 4 * k, sizeof two);
            const __m512i x = _mm512_set1_epi32(two), y = _mm512_load_si512(emulated.tile[b][k]);
            even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                                   _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), even);
            odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, upper)),
                                  _mm512_castsi512_ps(_mm512_and_si512(y, upper)), odd);
        }
        const __m512 sum = _mm512_load_ps(emulated.tile[c][i]);
        _mm512_store_ps(emulated.tile[c][i], _mm512_add_ps(sum, _mm512_add_ps(even, odd)));
    }
}

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbusd
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated_config(config)
#define _tile_release() ((void)0)
#define _tile_zero(t) emulated_zero(t)
#define _tile_loadd(t, from, stride) emulated_load(t, from, stride)
#define _tile_stored(t, to, stride) emulated_store(t, to, stride)
#define _tile_dpbssd(c, a, b) emulated_codes(c, a, b, 1)
#define _tile_dpbusd(c, a, b) emulated_codes(c, a, b, 0)
#define _tile_dpbf16ps(c, a, b) emulated_bf16(c, a, b)

#include "backend/cpu/vec_amx.h"

#undef cpu_tile_load
#define cpu_tile_load(t, from, stride) emulated_load(t, from, stride)

#endif
