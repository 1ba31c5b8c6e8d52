/* Attention over one softmax block of bf16 keys and values with vdpbf16ps, for processors where it does twice the work
 * of a multiply-add (cpu_levels.c). Lanes and loops are those of attn_avx512.c; each lane takes two dimensions of a
 * key, or two positions of a value, at a time, as they lie in the pages.
 *
 * Both factors must be bf16. The keys and values are; the queries and the weights are rounded here, each once, to the
 * precision that the numbers they meet have already; the sum of the weights is that of the rounded ones, so an output
 * is an average still. docs/speed.md (Attention) has what it costs. */
#include "backend/cpu/attn_early.h"
#include "backend/cpu/table_avx512.h"
#include "backend/cpu/vec_avx512.h"

#include <math.h>
#include <string.h>

enum { SCORES = CPU_ATTN_BLOCK + 16 /* rows lie a line apart in the cache's sets */, VECS = 4 };

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

CPU_INLINE __m512 dot2(__m512 acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
CPU_INLINE __m512i pair_at(const ern_bf16 *p) {
    int32_t v;
    memcpy(&v, p, sizeof v);
    return _mm512_set1_epi32(v);
}
/* 16 numbers, rounded to nearest. */
CPU_INLINE __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

/* ---- scores ------------------------------------------------------------------------------------------------------ */

/* Scores of nh heads and the positions of nv groups, t0.. */
CPU_INLINE void score_tile(float (*score)[SCORES], int32_t t0, ern_bf16 (*q)[CPU_HEAD_DIM_MAX], int32_t dim,
                           float scale, const cpu_kv_group *g, const int nh, const int nv, early *e) {
    __m512 acc[CPU_HEAD_TILE][VECS];
    CPU_UNROLL for (int h = 0; h < nh; h++) CPU_UNROLL for (int v = 0; v < nv; v++) acc[h][v] = _mm512_setzero_ps();
    for (int32_t c = 0; c < dim; c += 2) {
        __m512i k[VECS];
        CPU_UNROLL for (int v = 0; v < nv; v++) k[v] = _mm512_loadu_si512(g[v].k + c * CPU_KV_GROUP * 2);
        early_fetch(e, nv > 2 ? nv - 1 : nv);
        CPU_UNROLL for (int h = 0; h < nh; h++) {
            const __m512i x = pair_at(q[h] + c);
            CPU_UNROLL for (int v = 0; v < nv; v++) acc[h][v] = dot2(acc[h][v], x, k[v]);
        }
    }
    CPU_UNROLL for (int v = 0; v < nv; v++) CPU_UNROLL for (int h = 0; h < nh; h++)
        _mm512_storeu_ps(score[h] + t0 + v * CPU_KV_GROUP, _mm512_mul_ps(acc[h][v], _mm512_set1_ps(scale)));
}

/* Scores of whole groups: what lies past n is not looked at. */
CPU_INLINE void score_all(float (*score)[SCORES], ern_bf16 (*q)[CPU_HEAD_DIM_MAX], int32_t dim, float scale,
                          const cpu_kv_block *kv, int32_t n, const int nh, const int wide, early *e) {
    const int32_t end = cpu_kv_groups(n);
    int32_t i = 0;
    for (; wide > 1 && i + wide <= end; i += wide)
        score_tile(score, i * CPU_KV_GROUP, q, dim, scale, kv->group + i, nh, wide, e);
    for (; i < end; i++) score_tile(score, i * CPU_KV_GROUP, q, dim, scale, kv->group + i, nh, 1, e);
}

/* Scores of n positions to the weights 2^(score - max), rounded, zeros after them to a multiple of 32; max and sum per
 * head. */
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
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, e[2];
        for (int32_t t = 0; t < n; t += 32) {
            early_fetch(fetched, 4);
            CPU_UNROLL for (int i = 0; i < 2; i++) {
                e[i] = cpu_weight16(_mm512_sub_ps(_mm512_loadu_ps(score[h] + t + 16 * i), top));
                if (t + 32 > n) e[i] = _mm512_maskz_mov_ps(cpu_mask(n - t - 16 * i), e[i]);
                sum[i] = _mm512_add_ps(sum[i], e[i]);
            }
            _mm512_storeu_si512(weight[h] + t, cpu_uppers(e[0], e[1]));
        }
        part[CPU_HEAD_TILE + h] = cpu_sum1(_mm512_add_ps(sum[0], sum[1]));
    }
}

/* ---- outputs ----------------------------------------------------------------------------------------------------- */

/* The values of a pair of positions at `at`, the lanes of m, times the weights from t on; one: of the first of them. */
CPU_INLINE void weigh_pair(__m512 (*acc)[VECS], ern_bf16 (*weight)[SCORES], int32_t t, const unsigned char *at,
                           const int nh, const int nv, __mmask16 m, const bool one) {
    __m512i w[VECS];
    CPU_UNROLL for (int v = 0; v < nv; v++) {
        w[v] = _mm512_maskz_loadu_epi32(m, at + 64 * v);
        if (one) w[v] = _mm512_maskz_mov_epi16(0x55555555, w[v]);
    }
    CPU_UNROLL for (int h = 0; h < nh; h++) {
        const __m512i p = pair_at(weight[h] + t);
        CPU_UNROLL for (int v = 0; v < nv; v++) acc[h][v] = dot2(acc[h][v], p, w[v]);
    }
}

/* Columns c0.. of the outputs: nv vectors, or one that is cut to m. */
CPU_INLINE void weigh_tile(float *part, ern_bf16 (*weight)[SCORES], int32_t dim, const cpu_kv_block *kv, int32_t n,
                           int32_t c0, const int nh, const int nv, __mmask16 m, early *e) {
    __m512 acc[CPU_HEAD_TILE][VECS];
    CPU_UNROLL for (int h = 0; h < nh; h++) CPU_UNROLL for (int v = 0; v < nv; v++) acc[h][v] = _mm512_setzero_ps();
    for (int32_t t0 = 0; t0 < n; t0 += CPU_KV_GROUP) {
        const int32_t stop = least(n, t0 + CPU_KV_GROUP);
        const unsigned char *at = kv->group[t0 / CPU_KV_GROUP].v + 4 * c0;
        int32_t t = t0;
        for (; t + 2 <= stop; t += 2, at += 4 * dim) {
            early_fetch(e, nv);
            weigh_pair(acc, weight, t, at, nh, nv, m, false);
        }
        if (t < stop) weigh_pair(acc, weight, t, at, nh, nv, m, true);
    }
    float *out = part + 2 * CPU_HEAD_TILE + c0;
    CPU_UNROLL for (int h = 0; h < nh; h++) CPU_UNROLL for (int v = 0; v < nv; v++)
        _mm512_mask_storeu_ps(out + h * dim + 16 * v, m, acc[h][v]);
}

CPU_INLINE void block_heads(float *part, const float *q, int32_t dim, float scale, const cpu_kv_block *kv, int32_t n,
                            const int nh, const int wide) {
    _Alignas(64) float score[CPU_HEAD_TILE][SCORES];
    _Alignas(64) ern_bf16 weight[CPU_HEAD_TILE][SCORES], half[CPU_HEAD_TILE][CPU_HEAD_DIM_MAX];
    for (int h = 0; h < nh; h++)
        for (int32_t c = 0; c < dim; c += 16) {
            const __m512 x = _mm512_maskz_loadu_ps(cpu_mask(dim - c), q + h * dim + c);
            _mm256_storeu_si256((__m256i *)(void *)(half[h] + c), narrow(x));
        }
    early e;
    early_begin(&e, kv, dim * CPU_KV_GROUP * 2);
    score_all(score, half, dim, scale, kv, n, nh, wide, &e);
    soften(part, weight, score, n, nh, &e);
    int32_t c = 0;
    for (; wide == VECS && c + 64 <= dim; c += 64) weigh_tile(part, weight, dim, kv, n, c, nh, 4, 0xffff, &e);
    for (; wide > 1 && c + 32 <= dim; c += 32) weigh_tile(part, weight, dim, kv, n, c, nh, 2, 0xffff, &e);
    for (; c < dim; c += 16) weigh_tile(part, weight, dim, kv, n, c, nh, 1, cpu_mask(dim - c), &e);
    early_end(&e);
}

/* Heads of 128 by wide tiles, other sizes one by one. 7 and 8 heads go by two vectors: the groups of a block divide by
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
