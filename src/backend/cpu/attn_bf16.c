/* Attention over one softmax block of bf16 keys and values with vdpbf16ps, for processors where it does twice the work
 * of a multiply-add (cpu_levels.c). Lanes and loops are those of attn_avx512.c; each lane takes two dimensions of a
 * key, or two positions of a value, at a time:
 *
 *   K  [c: positions 0..15][c+1: 0..15]     one permutation  ->  [p0: c c+1][p1: c c+1] ...    . q[c] q[c+1]
 *   V  row t [dims]   row t+1 [dims]        two interleavings ->  [d0: t t+1][d1: t t+1] ...    . p[t] p[t+1]
 *
 * Both factors must be bf16. The keys and values are; the queries and the weights are rounded here, each once, to the
 * precision that the numbers they meet have already; the sum of the weights is that of the rounded ones, so an output
 * is an average still. docs/speed.md (Attention) has what it costs. Positions pair up from the block's first on,
 * however the pages cut them: the order of sums knows nothing of pages, rows or workers. */
#include "backend/cpu/attn_early.h"
#include "backend/cpu/table_avx512.h"
#include "backend/cpu/vec_avx512.h"

#include <math.h>
#include <string.h>

enum { SCORES = CPU_ATTN_BLOCK + 16, VECS = 4 };

CPU_INLINE __m512 dot2(__m512 acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
CPU_INLINE __m512i pair_at(const ern_bf16 *p) {
    int32_t v;
    memcpy(&v, p, sizeof v);
    return _mm512_set1_epi32(v);
}
/* 16 numbers, rounded to nearest. */
CPU_INLINE __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

/* ---- scores ------------------------------------------------------------------------------------------------------ */

/* Dimensions c and c+1 of the keys of 16 positions, side by side; cut: of the positions of m. */
CPU_INLINE __m512i two_dims(const unsigned char *k, const bool cut, __mmask16 m) {
    const __m512i turn = _mm512_add_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                          _mm512_set_epi32(31 << 16, 30 << 16, 29 << 16, 28 << 16, 27 << 16, 26 << 16,
                                                           25 << 16, 24 << 16, 23 << 16, 22 << 16, 21 << 16, 20 << 16,
                                                           19 << 16, 18 << 16, 17 << 16, 16 << 16));
    if (!cut) return _mm512_permutexvar_epi16(turn, _mm512_loadu_si512(k));
    const __m512i low = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(m, k));
    return _mm512_permutexvar_epi16(turn, _mm512_inserti64x4(low, _mm256_maskz_loadu_epi16(m, k + 32), 1));
}

/* Scores of nh heads and the positions of nv runs. */
CPU_INLINE void score_tile(float (*score)[SCORES], ern_bf16 (*q)[CPU_HEAD_DIM_MAX], int32_t dim, float scale,
                           const cpu_kv_run *run, const int nh, const int nv, const bool cut, early *e) {
    __m512 acc[CPU_HEAD_TILE][VECS];
    const __mmask16 m = cut ? cpu_mask(run->n) : 0xffff;
    CPU_UNROLL for (int h = 0; h < nh; h++) CPU_UNROLL for (int v = 0; v < nv; v++) acc[h][v] = _mm512_setzero_ps();
    for (int32_t c = 0; c < dim; c += 2) {
        __m512i k[VECS];
        CPU_UNROLL for (int v = 0; v < nv; v++) k[v] = two_dims(run[v].k + c * CPU_KV_GROUP * 2, cut, m);
        early_fetch(e, nv > 2 ? nv - 1 : nv);
        CPU_UNROLL for (int h = 0; h < nh; h++) {
            const __m512i x = pair_at(q[h] + c);
            CPU_UNROLL for (int v = 0; v < nv; v++) acc[h][v] = dot2(acc[h][v], x, k[v]);
        }
    }
    CPU_UNROLL for (int v = 0; v < nv; v++) CPU_UNROLL for (int h = 0; h < nh; h++)
        _mm512_storeu_ps(score[h] + run[v].t0, _mm512_mul_ps(acc[h][v], _mm512_set1_ps(scale)));
}

/* Lanes past a run's end are overwritten by the next run, or lie past n. */
CPU_INLINE void score_all(float (*score)[SCORES], ern_bf16 (*q)[CPU_HEAD_DIM_MAX], int32_t dim, float scale,
                          const cpu_kv_block *kv, int32_t n, const int nh, const int wide, early *e) {
    const cpu_kv_run *r = kv->run, *end = r + kv->n_run;
    while (r < end && r->t0 < n) {
        bool whole = wide > 1 && end - r >= wide && r[wide - 1].t0 < n;
        for (int v = 0; whole && v < wide; v++) whole = !r[v].cut;
        if (whole)
            score_tile(score, q, dim, scale, r, nh, wide, false, e);
        else if (r->cut)
            score_tile(score, q, dim, scale, r, nh, 1, true, e);
        else
            score_tile(score, q, dim, scale, r, nh, 1, false, e);
        r += whole ? wide : 1;
    }
}

/* 16 scores of one head to weights; cut: of the positions of m. */
CPU_INLINE __m512 soften16(ern_bf16 *weight, const float *score, __m512 top, const bool cut, __mmask16 m) {
    __m512 e = cpu_exp2_16(_mm512_sub_ps(_mm512_loadu_ps(score), top));
    if (cut) e = _mm512_maskz_mov_ps(m, e);
    const __m256i w = narrow(e);
    _mm256_storeu_si256((__m256i *)(void *)weight, w);
    return cpu_widen(w);
}

/* Scores of n positions to the weights 2^(score - max), rounded, zeros after them; max and sum per head. */
CPU_INLINE void soften(float *part, ern_bf16 (*weight)[SCORES], float (*score)[SCORES], int32_t n, const int nh,
                       early *fetched) {
    const __m512 none = _mm512_set1_ps(-INFINITY);
    const int32_t whole = n / 16 * 16;
    const __mmask16 m = cpu_mask(n - whole);
    for (int h = 0; h < nh; h++) {
        __m512 top = none;
        for (int32_t t = 0; t < whole; t += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(score[h] + t));
        if (m) top = _mm512_max_ps(top, _mm512_mask_loadu_ps(none, m, score[h] + whole));
        part[h] = _mm512_reduce_max_ps(top);
    }
    for (int h = 0; h < nh; h++) {
        const __m512 top = _mm512_set1_ps(part[h]);
        __m512 sum = _mm512_setzero_ps();
        for (int32_t t = 0; t < whole; t += 16) {
            early_fetch(fetched, 2);
            sum = _mm512_add_ps(sum, soften16(weight[h] + t, score[h] + t, top, false, 0));
        }
        if (m) sum = _mm512_add_ps(sum, soften16(weight[h] + whole, score[h] + whole, top, true, m));
        part[CPU_HEAD_TILE + h] = cpu_sum1(sum);
    }
}

/* ---- outputs ----------------------------------------------------------------------------------------------------- */

/* One pair of positions: 32 numbers of the values at a and b for each of nc chunks; b NULL: there is none. */
CPU_INLINE void weigh_pair(__m512 (*acc)[VECS], ern_bf16 (*weight)[SCORES], int32_t t, const unsigned char *a,
                           const unsigned char *b, const int nh, const int nc, __mmask32 m) {
    __m512i w[VECS];
    CPU_UNROLL for (int i = 0; i < nc; i++) {
        const __m512i x = _mm512_maskz_loadu_epi16(m, a + 64 * i);
        const __m512i y = b ? _mm512_maskz_loadu_epi16(m, b + 64 * i) : _mm512_setzero_si512();
        w[2 * i] = _mm512_unpacklo_epi16(x, y);
        w[2 * i + 1] = _mm512_unpackhi_epi16(x, y);
    }
    CPU_UNROLL for (int h = 0; h < nh; h++) {
        const __m512i p = pair_at(weight[h] + t);
        CPU_UNROLL for (int v = 0; v < 2 * nc; v++) acc[h][v] = dot2(acc[h][v], p, w[v]);
    }
}

/* Columns c0.. of the outputs, nc chunks of 32, the only one cut to m when it is not all. row: where the positions'
 * values lie, or NULL: runs hold whole pairs. */
CPU_INLINE void weigh_tile(float *part, ern_bf16 (*weight)[SCORES], int32_t dim, const cpu_kv_block *kv,
                           const unsigned char *const *row, int32_t n, int32_t c0, const int nh, const int nc,
                           __mmask32 m, early *e) {
    __m512 acc[CPU_HEAD_TILE][VECS];
    const int64_t each = (int64_t)dim * 2;
    CPU_UNROLL for (int h = 0; h < nh; h++) CPU_UNROLL for (int v = 0; v < 2 * nc; v++) acc[h][v] = _mm512_setzero_ps();
    for (int32_t t = 0; row && t < n; t += 2)
        weigh_pair(acc, weight, t, row[t] + 2 * c0, t + 1 < n ? row[t + 1] + 2 * c0 : NULL, nh, nc, m);
    for (const cpu_kv_run *r = kv->run, *end = r + kv->n_run; !row && r < end && r->t0 < n; r++) {
        const int32_t stop = least(r->t0 + r->n, n);
        const unsigned char *at = r->v + 2 * (int64_t)c0;
        int32_t t = r->t0;
        for (; t + 2 <= stop; t += 2, at += 2 * each) {
            early_fetch(e, 2 * nc);
            weigh_pair(acc, weight, t, at, at + each, nh, nc, m);
        }
        if (t < stop) weigh_pair(acc, weight, t, at, NULL, nh, nc, m);
    }
    /* interleaving leaves dims 8i..8i+3 in the even vector, 8i+4..8i+7 in the odd one */
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    float *out = part + 2 * CPU_HEAD_TILE + c0;
    CPU_UNROLL for (int h = 0; h < nh; h++) CPU_UNROLL for (int i = 0; i < nc; i++) {
        const __m512 a = _mm512_permutex2var_ps(acc[h][2 * i], first, acc[h][2 * i + 1]);
        const __m512 b = _mm512_permutex2var_ps(acc[h][2 * i], second, acc[h][2 * i + 1]);
        _mm512_mask_storeu_ps(out + h * dim + 32 * i, (__mmask16)m, a);
        _mm512_mask_storeu_ps(out + h * dim + 32 * i + 16, (__mmask16)(m >> 16), b);
    }
}

/* Where the values of n positions lie, if a pair of them lies in two runs; else false. */
static bool is_ragged(const unsigned char *row[CPU_ATTN_BLOCK], const cpu_kv_block *kv, int32_t dim, int32_t n) {
    const cpu_kv_run *r = kv->run, *end = r + kv->n_run;
    while (r < end && r->t0 < n && r->t0 % 2 == 0) r++;
    if (r == end || r->t0 >= n) return false;
    for (r = kv->run; r < end && r->t0 < n; r++)
        for (int32_t t = r->t0; t < least(r->t0 + r->n, n); t++) row[t] = r->v + (int64_t)(t - r->t0) * dim * 2;
    return true;
}

CPU_INLINE void block_heads(float *part, const float *q, int32_t dim, float scale, const cpu_kv_block *kv, int32_t n,
                            const int nh, const int wide) {
    _Alignas(64) float score[CPU_HEAD_TILE][SCORES];
    _Alignas(64) ern_bf16 weight[CPU_HEAD_TILE][SCORES], half[CPU_HEAD_TILE][CPU_HEAD_DIM_MAX];
    const unsigned char *row[CPU_ATTN_BLOCK];
    const bool ragged = is_ragged(row, kv, dim, n);
    for (int h = 0; h < nh; h++)
        for (int32_t c = 0; c < dim; c += 16) {
            const __m512 x = _mm512_maskz_loadu_ps(cpu_mask(dim - c), q + h * dim + c);
            _mm256_storeu_si256((__m256i *)(void *)(half[h] + c), narrow(x));
        }
    early e;
    early_begin(&e, kv, dim * CPU_KV_GROUP * 2, true);
    score_all(score, half, dim, scale, kv, n, nh, wide, &e);
    soften(part, weight, score, n, nh, &e);
    int32_t c = 0;
    for (; !ragged && wide == VECS && c + 64 <= dim; c += 64)
        weigh_tile(part, weight, dim, kv, NULL, n, c, nh, 2, 0xffffffff, &e);
    for (; !ragged && wide > 1 && c + 32 <= dim; c += 32)
        weigh_tile(part, weight, dim, kv, NULL, n, c, nh, 1, 0xffffffff, &e);
    for (; c < dim; c += 32) {
        const __mmask32 m = (__mmask32)cpu_mask(dim - c) | (__mmask32)cpu_mask(dim - c - 16) << 16;
        weigh_tile(part, weight, dim, kv, ragged ? row : NULL, n, c, nh, 1, m, &e);
    }
    early_end(&e);
}

/* Heads of 128 by wide tiles, other sizes one by one. 7 and 8 heads go by two vectors: the runs of a block divide by
 * two without rest, not by three. */
#define HEADS(nh)                                                                                                      \
    static void heads_##nh(float *part, const float *q, int32_t dim, float scale, const cpu_kv_block *kv, int32_t n) { \
        if (dim == 128)                                                                                                \
            block_heads(part, q, 128, scale, kv, n, nh, nh > 6 ? 2 : VECS);                                            \
        else                                                                                                           \
            block_heads(part, q, dim, scale, kv, n, nh, 1);                                                            \
    }
HEADS(1)
HEADS(2)
HEADS(3)
HEADS(4)
HEADS(5)
HEADS(6)
HEADS(7)
HEADS(8)

typedef void heads_fn(float *part, const float *q, int32_t dim, float scale, const cpu_kv_block *kv, int32_t n);
static heads_fn *const heads[CPU_HEAD_TILE] = {heads_1, heads_2, heads_3, heads_4, heads_5, heads_6, heads_7, heads_8};

void cpu_attn_bf16_bf16(float *part, const float *q, int32_t n_head, int32_t head_dim, float scale,
                        const cpu_kv_block *kv, int32_t n) {
    heads[n_head - 1](part, q, head_dim, scale, kv, n);
}
