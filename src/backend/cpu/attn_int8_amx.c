/* Attention over one softmax block of int8 keys and values by exact integer products of tiles, for the heads of one
 * row.
 *
 * A query is a number of 15 bits in two bytes, and a weight times its value's scale one of 16 bits:
 *
 *   S [heads, positions] = u (128 H + L) . K,    q  = u (128 h + l) to the nearest,  u: a 16256th of the largest |q|
 *   O [heads, dims]      = m (256 H + L) . V,    ws = m (256 h + l) to the nearest,  m: a 65535th of the largest ws
 *
 * so that 8 heads are 16 rows of bytes, as many as a tile has. Codes are multiplied as they lie in the pages; the
 * second factor of a product of tiles wants four dims of a position, or four positions of a dim, side by side. What a
 * head computes is a function of its own query and of the positions that it sees. */
#include "backend/cpu/attn_early.h"
#include "backend/cpu/table_avx512.h"
#include "backend/cpu/vec_amx.h"

#include <math.h>
#include <string.h>

enum {
    QUERIES = 2 * CPU_HEAD_TILE,  /* rows of a tile: upper bytes of the heads, then lower ones */
    CODES = 64,                   /* of a tile's row */
    SCORES = CPU_ATTN_BLOCK + 16, /* so that rows lie a line apart in the cache's sets */
    WEIGHTS = CPU_ATTN_BLOCK + 64,
    DIMS = CPU_HEAD_DIM_MAX + 64,
    FETCHES = 4, /* lines beside each of the 256 steps of a block */
    GROUPS = 2,  /* of 16 positions: one is brought into order while the other is multiplied */
};

typedef struct room {
    _Alignas(64) int8_t q[QUERIES][DIMS];
    _Alignas(64) int8_t k[GROUPS][CPU_HEAD_DIM_MAX / CODES][TILE_BYTES];
    _Alignas(64) int8_t v[2][4 * TILE_BYTES]; /* 64 positions and dims: one is brought into order as k is */
    _Alignas(64) int32_t score[QUERIES][SCORES];
    _Alignas(64) uint8_t weight[QUERIES][WEIGHTS];
    _Alignas(64) int32_t out[QUERIES][DIMS];
    _Alignas(64) float k_scale[SCORES], v_scale[SCORES], soft[SCORES];
    float unit[CPU_HEAD_TILE]; /* u, then m */
} room;

CPU_INLINE __mmask64 mask64(int32_t n) { return n >= 64 ? ~(__mmask64)0 : n <= 0 ? 0 : ((__mmask64)1 << n) - 1; }

/* ---- queries ----------------------------------------------------------------------------------------------------- */

/* A head with a number that is none gets a unit that is none. */
static void pack_queries(room *w, const float *q, int32_t n_head, int32_t C, float scale) {
    for (int32_t h = 0; h < n_head; h++, q += C) {
        __m512 top = _mm512_setzero_ps(), zero = top;
        for (int32_t c = 0; c < C; c += 16) {
            const __m512 x = _mm512_maskz_loadu_ps(cpu_mask(C - c), q + c);
            top = _mm512_max_ps(top, _mm512_abs_ps(x));
            zero = _mm512_fmadd_ps(x, _mm512_setzero_ps(), zero);
        }
        const float max = _mm512_reduce_max_ps(top);
        const __m512 by = _mm512_set1_ps(max > 0x1p-100f ? 16256 / max : 0);
        w->unit[h] = (max / 16256 + cpu_sum1(zero)) * scale;
        for (int32_t c = 0; c < tiles_of(C, CODES) * CODES; c += 16) {
            const __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(cpu_mask(C - c), q + c), by));
            const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(64)), 7);
            const __m512i lower = _mm512_sub_epi32(x, _mm512_slli_epi32(upper, 7));
            _mm_store_si128((__m128i *)(void *)(w->q[h] + c), _mm512_cvtepi32_epi8(upper));
            _mm_store_si128((__m128i *)(void *)(w->q[n_head + h] + c), _mm512_cvtepi32_epi8(lower));
        }
    }
}

/* ---- scores ------------------------------------------------------------------------------------------------------ */

/* Keys of a group: four dims of 16 positions side by side. */
CPU_INLINE void pack_group(int8_t *to, const unsigned char *k, int32_t C, early *e) {
    const __m512i lanes = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
    int32_t c = 0;
    for (; c + 64 <= C; c += 64, to += 16 * 64, k += 16 * 64) {
        early_fetch(e, FETCHES);
        CPU_UNROLL for (int i = 0; i < 16 * 64; i += 64) {
            const __m512i x = _mm512_permutexvar_epi32(lanes, _mm512_loadu_si512(k + i));
            _mm512_store_si512(to + i, _mm512_shuffle_epi8(x, bytes));
        }
    }
    for (; c < C; c += 4, to += 64, k += 64) {
        const __m512i x = c + 4 <= C ? _mm512_loadu_si512(k) : _mm512_maskz_loadu_epi8(0xffffffff, k);
        _mm512_store_si512(to, _mm512_shuffle_epi8(_mm512_permutexvar_epi32(lanes, x), bytes));
    }
    for (; c < tiles_of(C, CODES) * CODES; c += 4, to += 64) _mm512_store_si512(to, _mm512_setzero_si512());
}

/* Scores of group i of positions, whose keys lie at k. */
CPU_INLINE void score_group(room *w, const int8_t *k, int32_t i, int32_t C, early *e) {
    _tile_zero(0);
    for (int32_t c = 0; c < C; c += CODES, k += TILE_BYTES) {
        early_fetch(e, FETCHES);
        cpu_tile_load(4, w->q[0] + c, DIMS);
        cpu_tile_load(6, k, 64);
        _tile_dpbssd(0, 4, 6);
    }
    _tile_stored(0, w->score[0] + i * 16, SCORES * 4);
}

static void score_all(room *w, const cpu_kv_block *kv, int32_t C, int32_t n, early *e) {
    const int32_t n_group = cpu_kv_groups(n);
    for (int32_t i = 0; i <= n_group; i++) {
        if (i < n_group) pack_group(w->k[i % GROUPS][0], kv->group[i].k, C, e);
        if (i > 0) score_group(w, w->k[(i - 1) % GROUPS][0], i - 1, C, e);
    }
}

/* ---- softmax ----------------------------------------------------------------------------------------------------- */

/* Scores of head h to weights of 16 bits, zeros after them to a multiple of 64. */
CPU_INLINE void soften(room *w, float *part, int32_t h, int32_t n_head, int32_t n, early *fetched) {
    const __m512 none = _mm512_set1_ps(-INFINITY), unit = _mm512_set1_ps(w->unit[h]);
    __m512 top = none, sum = _mm512_setzero_ps(), most = sum, zero = sum;
    for (int32_t t = 0; t < n; t += 16) {
        const __m512i x = _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(w->score[h] + t), 7),
                                           _mm512_load_si512(w->score[n_head + h] + t));
        const __m512 s = _mm512_mul_ps(_mm512_cvtepi32_ps(x), _mm512_mul_ps(unit, _mm512_load_ps(w->k_scale + t)));
        _mm512_store_ps(w->soft + t, s);
        top = _mm512_max_ps(top, _mm512_mask_mov_ps(none, cpu_mask(n - t), s));
    }
    const float max = _mm512_reduce_max_ps(top);
    top = _mm512_set1_ps(max);
    for (int32_t t = 0; t < n; t += 16) {
        const __mmask16 m = cpu_mask(n - t);
        early_fetch(fetched, FETCHES);
        const __m512 e = _mm512_maskz_mov_ps(m, cpu_exp2_16(_mm512_sub_ps(_mm512_load_ps(w->soft + t), top)));
        const __m512 x = _mm512_maskz_mul_ps(m, e, _mm512_load_ps(w->v_scale + t));
        sum = _mm512_add_ps(sum, e);
        most = _mm512_max_ps(most, x);
        zero = _mm512_fmadd_ps(x, _mm512_setzero_ps(), zero);
        _mm512_store_ps(w->soft + t, x);
    }
    const float largest = _mm512_reduce_max_ps(most);
    const __m512 by = _mm512_set1_ps(largest > 0x1p-100f ? 65535 / largest : 0);
    for (int32_t t = 0; t < tiles_of(n, CODES) * CODES; t += 16) {
        const __m512i x = _mm512_maskz_cvtps_epi32(cpu_mask(n - t), _mm512_mul_ps(_mm512_load_ps(w->soft + t), by));
        _mm_store_si128((__m128i *)(void *)(w->weight[h] + t), _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 8)));
        _mm_store_si128((__m128i *)(void *)(w->weight[n_head + h] + t), _mm512_cvtepi32_epi8(x));
    }
    part[h] = max;
    part[CPU_HEAD_TILE + h] = cpu_sum1(sum);
    w->unit[h] = largest / 65535 + cpu_sum1(zero); /* a scale that is none makes outputs that are none */
}

/* ---- outputs ----------------------------------------------------------------------------------------------------- */

/* 64 dims from c of the values of 64 positions from `from`, zeros from position n on: tile i holds dims 4i..4i+3 of
 * each 16. */
CPU_INLINE void pack_values(int8_t *to, const cpu_kv_block *kv, int32_t C, int32_t c, int32_t n, int32_t from,
                            early *e) {
    const __mmask64 dims = mask64(C - c);
    for (int32_t t = from; t < from + CODES; t += 4, to += 64) {
        __m512i x[4];
        const unsigned char *row = kv->group[t < n ? t / 16 : 0].v + t % 16 * C + c;
        if (t % 8 == 0) early_fetch(e, FETCHES);
        if (t + 4 <= n)
            CPU_UNROLL for (int i = 0; i < 4; i++) x[i] = _mm512_maskz_loadu_epi8(dims, row + i * C);
        else
            CPU_UNROLL for (int i = 0; i < 4; i++) x[i] =
                t + i < n ? _mm512_maskz_loadu_epi8(dims, row + i * C) : _mm512_setzero_si512();
        const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
        const __m512i d = _mm512_unpacklo_epi8(x[2], x[3]), f = _mm512_unpackhi_epi8(x[2], x[3]);
        _mm512_store_si512(to, _mm512_unpacklo_epi16(a, d));
        _mm512_store_si512(to + TILE_BYTES, _mm512_unpackhi_epi16(a, d));
        _mm512_store_si512(to + 2 * TILE_BYTES, _mm512_unpacklo_epi16(b, f));
        _mm512_store_si512(to + 3 * TILE_BYTES, _mm512_unpackhi_epi16(b, f));
    }
}

/* O of 64 dims from c: the sums stay in their tiles while the values pass, 64 positions brought into order while those
 * before are multiplied. */
static void weigh_dims(room *w, const cpu_kv_block *kv, int32_t C, int32_t c, int32_t n, early *e) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int32_t t = 0, end = tiles_of(n, CODES) * CODES; t <= end; t += CODES) {
        if (t < end) pack_values(w->v[t / CODES % 2], kv, C, c, n, t, e);
        if (t == 0) continue;
        const int8_t *v = w->v[(t / CODES + 1) % 2];
        cpu_tile_load(4, w->weight[0] + t - CODES, WEIGHTS);
        cpu_tile_load(6, v, 64);
        cpu_tile_load(7, v + TILE_BYTES, 64);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        cpu_tile_load(6, v + 2 * TILE_BYTES, 64);
        cpu_tile_load(7, v + 3 * TILE_BYTES, 64);
        _tile_dpbusd(2, 4, 6);
        _tile_dpbusd(3, 4, 7);
    }
    _tile_stored(0, w->out[0] + c, DIMS * 4);
    _tile_stored(1, w->out[0] + c + 16, DIMS * 4);
    _tile_stored(2, w->out[0] + c + 32, DIMS * 4);
    _tile_stored(3, w->out[0] + c + 48, DIMS * 4);
}

/* Outputs of head h from the order of its tiles. */
CPU_INLINE void finish(const room *w, float *part, int32_t h, int32_t n_head, int32_t C) {
    float *to = part + 2 * CPU_HEAD_TILE + h * C;
    const __m512 m = _mm512_set1_ps(w->unit[h]), upper = _mm512_set1_ps(256.0f);
    for (int32_t c = 0; c < C; c += 64) {
        __m512 x[4]; /* lane 4l + i of x[t]: dim 16l + 4t + i */
        CPU_UNROLL for (int t = 0; t < 4; t++) {
            const __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(w->out[h] + c + 16 * t));
            const __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(w->out[n_head + h] + c + 16 * t));
            x[t] = _mm512_mul_ps(m, _mm512_fmadd_ps(high, upper, low));
        }
        const __m512 a = _mm512_shuffle_f32x4(x[0], x[1], 0x88), b = _mm512_shuffle_f32x4(x[0], x[1], 0xdd);
        const __m512 d = _mm512_shuffle_f32x4(x[2], x[3], 0x88), e = _mm512_shuffle_f32x4(x[2], x[3], 0xdd);
        _mm512_mask_storeu_ps(to + c, cpu_mask(C - c), _mm512_shuffle_f32x4(a, d, 0x88));
        _mm512_mask_storeu_ps(to + c + 16, cpu_mask(C - c - 16), _mm512_shuffle_f32x4(b, e, 0x88));
        _mm512_mask_storeu_ps(to + c + 32, cpu_mask(C - c - 32), _mm512_shuffle_f32x4(a, d, 0xdd));
        _mm512_mask_storeu_ps(to + c + 48, cpu_mask(C - c - 48), _mm512_shuffle_f32x4(b, e, 0xdd));
    }
}

void cpu_attn_int8_amx(float *part, const float *q, int32_t n_head, int32_t head_dim, float scale,
                       const cpu_kv_block *kv, int32_t n) {
    room w;
    early e;
    early_begin(&e, kv, head_dim * CPU_KV_GROUP);
    for (int32_t t = 0; t < n; t += 16) {
        _mm512_store_ps(w.k_scale + t, _mm512_loadu_ps(kv->group[t / 16].k_scale));
        _mm512_store_ps(w.v_scale + t, _mm512_loadu_ps(kv->group[t / 16].v_scale));
    }
    pack_queries(&w, q, n_head, head_dim, scale);
    cpu_tiles_begin(2 * n_head, 2 * n_head);
    score_all(&w, kv, head_dim, n, &e);
    for (int32_t h = 0; h < n_head; h++) soften(&w, part, h, n_head, n, &e);
    for (int32_t c = 0; c < head_dim; c += CODES) weigh_dims(&w, kv, head_dim, c, n, &e);
    _tile_release();
    early_end(&e);
    for (int32_t h = 0; h < n_head; h++) finish(&w, part, h, n_head, head_dim);
}
