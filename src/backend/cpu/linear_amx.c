/* Linear layers with bf16 weights on bf16 activations, AMX: both layouts and panels, any number of rows.
 *
 *   C [16 rows, 16 outputs] += A [16 rows, 32 inputs] . B [32 inputs, 16 outputs]        tdpbf16ps
 *
 * The order of a sum (Intel SDM, TDPBF16PS): of 32 inputs the even ones in one chain of multiply-adds, the odd ones in
 * another, both from zero; then the two are added, then that to C. Denormals are zeros. Rows of a tile know nothing of
 * each other, so one row and many share all of this and hence the bits: every count of rows goes through tiles.
 *
 * A is rows of activations as they lie. B lies so in panels (CPU_PANEL_TILES); of other weights a block of 32 outputs
 * and BLOCK_IN inputs at a time is brought into that order first, for all rows that follow. Sums wait in memory then,
 * in f32 as in the tiles, so cutting K changes nothing. */
#include "backend/cpu/table_avx512.h"
#include "backend/cpu/vec_amx.h"

#include <string.h>

enum {
    OUTS = CPU_PANEL_TILES,
    ROWS = 2 * TILE_ROWS,
    BLOCK_IN = 512,
    MANY = 512,   /* rows that pass a block of weights together */
    GROUP = 16,   /* blocks of outputs for which gathered rows are gathered once */
    AHEAD = 8192, /* bytes of a panel fetched ahead into L2 where few rows read it */
};
_Static_assert(MANY / ROWS == GROUP, "either is the number of blocks of sums");

typedef float sums[ROWS][OUTS];

/* What a call works with. */
typedef struct place {
    _Alignas(64) sums sum[GROUP];
    _Alignas(64) ern_bf16 b[OUTS * BLOCK_IN];
    _Alignas(64) ern_bf16 a[ROWS * BLOCK_IN];
} place;

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

void cpu_round_bf16_amx(ern_bf16 *q, const float *x, int32_t n) {
    for (int32_t i = 0; i < n; i += 16) {
        const __mmask16 m = cpu_mask(n - i);
        _mm256_storeu_si256((__m256i *)(void *)(q + i), cpu_narrow(_mm512_maskz_loadu_ps(m, x + i)));
    }
    const int32_t end = (n + 15) / 16 * 16, stop = cpu_act_width(n);
    memset(q + end, 0, (size_t)(stop - end) * sizeof *q);
}

/* ---- weights that are not in panels ------------------------------------------------------------------------------ */

/* Lane i of v[j] to lane j of v[i]. */
CPU_INLINE void transpose(__m512i *v) {
    __m512i t[16];
    CPU_UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    CPU_UNROLL for (int i = 0; i < 16; i += 4) CPU_UNROLL for (int h = 0; h < 2; h++) {
        v[i + 2 * h] = _mm512_unpacklo_epi64(t[i + h], t[i + 2 + h]);
        v[i + 2 * h + 1] = _mm512_unpackhi_epi64(t[i + h], t[i + 2 + h]);
    }
    /* v[4i + c]: column c of each 4 x 4 block of rows 4i..4i+3 */
    CPU_UNROLL for (int c = 0; c < 4; c++) {
        const __m512i a = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88),
                      b = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd),
                      e = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(a, b, 0x88), t[8 + c] = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[4 + c] = _mm512_shuffle_i32x4(d, e, 0x88), t[12 + c] = _mm512_shuffle_i32x4(d, e, 0xdd);
    }
    CPU_UNROLL for (int i = 0; i < 16; i++) v[i] = t[i];
}

/* Inputs k.. (at most 32 of them) of 16 outputs from o, rows of W being outputs. */
static void pack_out_in(ern_bf16 *to, const ern_linear *w, int32_t o, int32_t k) {
    const int32_t n = least(w->n_in - k, TILE_K), outs = least(w->n_out - o, 16);
    const __mmask32 m = n == TILE_K ? 0xffffffff : ((__mmask32)1 << n) - 1;
    __m512i v[16];
    CPU_UNROLL for (int i = 0; i < 16; i++) v[i] =
        i < outs ? _mm512_maskz_loadu_epi16(m, (const ern_bf16 *)w->data + (o + i) * w->stride + k)
                 : _mm512_setzero_si512();
    transpose(v);
    CPU_UNROLL for (int i = 0; i < 16; i++) _mm512_store_si512(to + TILE_K * i, v[i]);
}

/* The same of 32 outputs, rows of W being inputs. */
static void pack_in_out(ern_bf16 *to, const ern_linear *w, int32_t o, int32_t k) {
    const int32_t outs = least(w->n_out - o, OUTS);
    const __mmask32 m = outs == OUTS ? 0xffffffff : ((__mmask32)1 << outs) - 1;
    const ern_bf16 *from = (const ern_bf16 *)w->data + o;
    for (int32_t p = 0; p < TILE_K / 2; p++, k += 2) {
        const __m512i x = k < w->n_in ? _mm512_maskz_loadu_epi16(m, from + k * w->stride) : _mm512_setzero_si512();
        const __m512i y =
            k + 1 < w->n_in ? _mm512_maskz_loadu_epi16(m, from + (k + 1) * w->stride) : _mm512_setzero_si512();
        _mm512_store_si512(to + TILE_K * p, cpu_pairs(x, y, 0));
        _mm512_store_si512(to + TILE_K * p + TILE_BYTES / 2, cpu_pairs(x, y, 1));
    }
}

/* Inputs k0..k1-1 of 32 outputs from o: where they lie in order. */
static const ern_bf16 *weights(place *at, const ern_linear *w, int32_t o, int32_t k0, int32_t k1) {
    if (cpu_is_panels(w))
        return (const ern_bf16 *)w->data + o / OUTS * cpu_panel_numbers(OUTS, w->n_in) + (int64_t)k0 * OUTS;
    ern_bf16 *to = at->b;
    for (int32_t k = k0; k < k1; k += TILE_K, to += OUTS * TILE_K) {
        if (w->order == ERN_ORDER_IN_OUT) {
            pack_in_out(to, w, o, k);
        } else {
            pack_out_in(to, w, o, k);
            pack_out_in(to + TILE_BYTES / 2, w, o + 16, k);
        }
    }
    return at->b;
}

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* sum += A B over n tiles of inputs; set: sum = A B. two: there are more than 16 rows. */
CPU_INLINE void products(sums sum, const ern_bf16 *a, int64_t stride, const ern_bf16 *b, int32_t n, bool set,
                         const bool two, const bool few) {
    const int64_t step = stride * (int64_t)sizeof *a;
    if (set) {
        _tile_zero(0);
        _tile_zero(1);
        if (two) _tile_zero(2);
        if (two) _tile_zero(3);
    } else {
        _tile_loadd(0, sum[0], OUTS * 4);
        _tile_loadd(1, sum[0] + 16, OUTS * 4);
        if (two) _tile_loadd(2, sum[TILE_ROWS], OUTS * 4);
        if (two) _tile_loadd(3, sum[TILE_ROWS] + 16, OUTS * 4);
    }
    for (int32_t t = 0; t < n; t++, a += TILE_K, b += OUTS * TILE_K) {
        if (few)
            for (int i = 0; i < 2 * TILE_BYTES; i += 64)
                _mm_prefetch((const char *)((uintptr_t)b + AHEAD + (uintptr_t)i), _MM_HINT_T1);
        if (!few)
            for (int r = 0; r < ROWS; r++) _mm_prefetch((const char *)(a + r * stride + 2 * TILE_K), _MM_HINT_T0);
        cpu_tile_load(4, a, step);
        if (two) cpu_tile_load(5, a + TILE_ROWS * stride, step);
        cpu_tile_load(6, b, 64);
        cpu_tile_load(7, b + TILE_BYTES / 2, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (two) _tile_dpbf16ps(2, 5, 6);
        if (two) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sum[0], OUTS * 4);
    _tile_stored(1, sum[0] + 16, OUTS * 4);
    if (two) _tile_stored(2, sum[TILE_ROWS], OUTS * 4);
    if (two) _tile_stored(3, sum[TILE_ROWS] + 16, OUTS * 4);
}

/* Inputs k0..k1-1 of n rows from r, side by side. */
static void gather(place *at, const cpu_linear_job *j, int32_t r, int32_t n, int32_t k0, int32_t k1) {
    const int64_t stride = cpu_act_stride(j->w->n_in);
    for (int32_t i = 0; i < n; i++)
        memcpy(at->a + i * BLOCK_IN, (const ern_bf16 *)j->act.q + j->x_row[r + i] * stride + k0,
               (size_t)(k1 - k0) * sizeof *at->a);
}

/* The outputs of n rows from r, at most 32 from o. */
static void put(const cpu_linear_job *j, sums sum, int32_t r, int32_t n, int32_t o) {
    const __mmask16 m0 = cpu_mask(j->to - o), m1 = cpu_mask(j->to - o - 16);
    for (int32_t i = 0; i < n; i++) {
        cpu_put_band(j, r + i, o, m0, _mm512_load_ps(sum[i]));
        if (m1) cpu_put_band(j, r + i, o + 16, m1, _mm512_load_ps(sum[i] + 16));
    }
}

/* n rows from r, which pass together, and the outputs o..oe-1: one block of outputs, or of rows. The last rows, where
 * they do not fill a block, are in one with others before them: their sums are made twice. */
CPU_INLINE void pass(place *at, const cpu_linear_job *j, int32_t r, int32_t n, int32_t o, int32_t oe, const bool two,
                     const bool few) {
    const int32_t n_in = (j->w->n_in + TILE_K - 1) / TILE_K * TILE_K,
                  block = cpu_is_panels(j->w) && !j->x_row ? n_in : BLOCK_IN;
    const int64_t stride = cpu_act_stride(j->w->n_in);
    const int32_t rows = (n + ROWS - 1) / ROWS, own = least(n, ROWS);
    for (int32_t k0 = 0; k0 < n_in; k0 += block) {
        const int32_t k1 = least(k0 + block, n_in);
        if (j->x_row) gather(at, j, r, n, k0, k1);
        for (int32_t i = 0; o + i * OUTS < oe; i++) {
            const ern_bf16 *b = weights(at, j->w, o + i * OUTS, k0, k1);
            for (int32_t q = 0; q < rows; q++) {
                const int32_t first = least(q * ROWS, n - own);
                const ern_bf16 *a = j->x_row ? at->a : (const ern_bf16 *)j->act.q + (r + first) * stride + k0;
                products(at->sum[i + q], a, j->x_row ? BLOCK_IN : stride, b, (k1 - k0) / TILE_K, k0 == 0, two, few);
            }
        }
    }
    for (int32_t i = 0; o + i * OUTS < oe; i++)
        for (int32_t q = 0; q < rows; q++) {
            const int32_t first = least(q * ROWS, n - own), skip = q * ROWS - first;
            put(j, at->sum[i + q] + skip, r + q * ROWS, least(ROWS, n - q * ROWS), o + i * OUTS);
        }
}

void cpu_linear_bf16_amx(const cpu_linear_job *j) {
    const int32_t rows = j->x_row ? ROWS : MANY, outs = j->x_row ? GROUP * OUTS : OUTS;
    place at;
    for (int32_t r = 0; r < j->n_row; r += rows) {
        const int32_t n = least(rows, j->n_row - r);
        cpu_tiles_begin(least(n, 16), n <= 16 ? 16 : least(n - 16, 16));
        for (int32_t o = j->from; o < j->to; o += outs) {
            const int32_t oe = least(o + outs, j->to);
            if (n > ROWS)
                pass(&at, j, r, n, o, oe, true, false);
            else if (n > TILE_ROWS)
                pass(&at, j, r, n, o, oe, true, true);
            else
                pass(&at, j, r, n, o, oe, false, true);
        }
    }
    _tile_release();
}
