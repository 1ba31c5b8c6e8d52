/* Attention over one softmax block, AVX-512. Keys lie with 16 positions side by side, so that lanes are positions and
 * a score is one chain of FMAs over the head's dimensions, without a sum across lanes; values lie with their dimensions
 * side by side, so that lanes are these and an output is one chain over the positions. In bf16 a lane of a line is a
 * pair of dimensions, or of positions: a shift makes an f32 of the first, a mask of the second. Register tiles of 8
 * heads by 3 vectors, or 6 by 4: a key or value is loaded and widened once for all heads of the group, 48 FMAs to 19
 * loads. Nothing is shared between rows, hence neither can bits be. */
#include "backend/cpu/attn_early.h"
#include "backend/cpu/table_avx512.h"
#include "backend/cpu/vec_avx512.h"

#include <math.h>

enum { SCORES = CPU_ATTN_BLOCK + 16 /* rows lie a line apart in the cache's sets */, VECS = 4 };

/* 16 codes, those of m. */
CPU_INLINE __m512 codes16(const unsigned char *p, __mmask16 m) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, p)));
}
/* 16 pairs of bf16 numbers, those of m: the first of each, and the second. */
CPU_INLINE void pairs16(__m512 *a, __m512 *b, const unsigned char *p, __mmask16 m) {
    const __m512i x = _mm512_maskz_loadu_epi32(m, p);
    *a = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    *b = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int32_t)0xffff0000u)));
}

/* acc[h][v] += x[h] * w[v] */
CPU_INLINE void add_all(__m512 (*acc)[VECS], const float *x, int64_t next, const __m512 *w, const int nh,
                        const int nv) {
    CPU_UNROLL for (int h = 0; h < nh; h++) {
        const __m512 y = _mm512_set1_ps(x[h * next]);
        CPU_UNROLL for (int v = 0; v < nv; v++) acc[h][v] = _mm512_fmadd_ps(y, w[v], acc[h][v]);
    }
}

/* Scores of nh heads and the positions of nv groups, t0.. */
CPU_INLINE void score_tile(float (*score)[SCORES], int32_t t0, const float *q, int32_t dim, float scale,
                           const cpu_kv_group *g, const int nh, const int nv, const bool int8, early *e) {
    __m512 acc[CPU_HEAD_TILE][VECS];
    CPU_UNROLL for (int h = 0; h < nh; h++) CPU_UNROLL for (int v = 0; v < nv; v++) acc[h][v] = _mm512_setzero_ps();
    for (int32_t c = 0; c < dim; c += 2) {
        __m512 a[VECS], b[VECS];
        const int32_t at = c * CPU_KV_GROUP;
        CPU_UNROLL for (int v = 0; v < nv; v++) {
            if (int8)
                a[v] = codes16(g[v].k + at, 0xffff), b[v] = codes16(g[v].k + at + CPU_KV_GROUP, 0xffff);
            else
                pairs16(&a[v], &b[v], g[v].k + 2 * at, 0xffff);
        }
        if (nv > 1 || !int8 || c % 4 == 0) early_fetch(e, nv > 1 && !int8 ? 2 : 1);
        add_all(acc, q + c, dim, a, nh, nv);
        add_all(acc, q + c + 1, dim, b, nh, nv);
    }
    CPU_UNROLL for (int v = 0; v < nv; v++) {
        __m512 s = _mm512_set1_ps(scale);
        if (int8) s = _mm512_mul_ps(s, _mm512_loadu_ps(g[v].k_scale));
        CPU_UNROLL for (int h = 0; h < nh; h++)
            _mm512_storeu_ps(score[h] + t0 + v * CPU_KV_GROUP, _mm512_mul_ps(acc[h][v], s));
    }
}

/* Scores of whole groups: what lies past n is not looked at. */
CPU_INLINE void score_all(float (*score)[SCORES], const float *q, int32_t dim, float scale, const cpu_kv_block *kv,
                          int32_t n, const int nh, const int wide, const bool int8, early *e) {
    const int32_t end = cpu_kv_groups(n);
    int32_t i = 0;
    for (; wide > 1 && i + wide <= end; i += wide)
        score_tile(score, i * CPU_KV_GROUP, q, dim, scale, kv->group + i, nh, wide, int8, e);
    for (; i < end; i++) score_tile(score, i * CPU_KV_GROUP, q, dim, scale, kv->group + i, nh, 1, int8, e);
}

/* Scores of n positions to 2^(score - max), max and sum per head; then each times its value's scale. */
CPU_INLINE void soften(float *part, float (*score)[SCORES], int32_t n, const cpu_kv_block *kv, const int nh,
                       const bool int8, early *fetched) {
    const __m512 none = _mm512_set1_ps(-INFINITY);
    float scale[CPU_ATTN_BLOCK];
    for (int32_t t = 0; int8 && t < n; t += CPU_KV_GROUP)
        _mm512_storeu_ps(scale + t, _mm512_loadu_ps(kv->group[t / CPU_KV_GROUP].v_scale));
    for (int h = 0; h < nh; h++) {
        __m512 top = none, sum = _mm512_setzero_ps();
        for (int32_t t = 0; t < n; t += 16)
            top = _mm512_max_ps(top, _mm512_mask_loadu_ps(none, cpu_mask(n - t), score[h] + t));
        const float max = _mm512_reduce_max_ps(top);
        top = _mm512_set1_ps(max);
        for (int32_t t = 0; t < n; t += 16) {
            const __mmask16 m = cpu_mask(n - t);
            early_fetch(fetched, int8 ? 1 : 2);
            __m512 e = _mm512_maskz_mov_ps(m, cpu_exp2_16(_mm512_sub_ps(_mm512_loadu_ps(score[h] + t), top)));
            sum = _mm512_add_ps(sum, e);
            if (int8) e = _mm512_maskz_mul_ps(m, e, _mm512_loadu_ps(scale + t));
            _mm512_storeu_ps(score[h] + t, e);
        }
        part[h] = max;
        part[CPU_HEAD_TILE + h] = cpu_sum1(sum);
    }
}

/* Columns c0.. of the outputs: nv vectors, or one that is cut to m. */
CPU_INLINE void weigh_tile(float *part, float (*p)[SCORES], int32_t dim, const cpu_kv_block *kv, int32_t n, int32_t c0,
                           const int nh, const int nv, const bool int8, __mmask16 m, early *e) {
    __m512 acc[CPU_HEAD_TILE][VECS];
    CPU_UNROLL for (int h = 0; h < nh; h++) CPU_UNROLL for (int v = 0; v < nv; v++) acc[h][v] = _mm512_setzero_ps();
    for (int32_t t0 = 0; t0 < n; t0 += CPU_KV_GROUP) {
        const int32_t stop = n - t0 < CPU_KV_GROUP ? n : t0 + CPU_KV_GROUP, row = int8 ? dim : 4 * dim;
        const unsigned char *at = kv->group[t0 / CPU_KV_GROUP].v + (int8 ? c0 : 4 * c0);
        for (int32_t t = t0; t < stop; t += 2, at += int8 ? 2 * row : row) {
            __m512 a[VECS], b[VECS];
            if (!int8 || t % 4 == 0) early_fetch(e, nv);
            CPU_UNROLL for (int v = 0; v < nv; v++) {
                if (int8)
                    a[v] = codes16(at + 16 * v, m), b[v] = codes16(at + row + 16 * v, m);
                else
                    pairs16(&a[v], &b[v], at + 64 * v, m);
            }
            add_all(acc, &p[0][t], SCORES, a, nh, nv);
            if (t + 1 < stop) add_all(acc, &p[0][t + 1], SCORES, b, nh, nv);
        }
    }
    float *out = part + 2 * CPU_HEAD_TILE + c0;
    CPU_UNROLL for (int h = 0; h < nh; h++) CPU_UNROLL for (int v = 0; v < nv; v++)
        _mm512_mask_storeu_ps(out + h * dim + v * 16, m, acc[h][v]);
}

CPU_INLINE void block_heads(float *part, const float *q, int32_t dim, float scale, const cpu_kv_block *kv, int32_t n,
                            const int nh, const int wide, const bool int8) {
    _Alignas(64) float score[CPU_HEAD_TILE][SCORES];
    early e;
    early_begin(&e, kv, dim * CPU_KV_GROUP * (int8 ? 1 : 2));
    score_all(score, q, dim, scale, kv, n, nh, wide, int8, &e);
    soften(part, score, n, kv, nh, int8, &e);
    int32_t c = 0;
    for (; wide == VECS && c + 48 <= dim; c += 48) weigh_tile(part, score, dim, kv, n, c, nh, 3, int8, 0xffff, &e);
    for (; wide == VECS && c + 32 <= dim; c += 32) weigh_tile(part, score, dim, kv, n, c, nh, 2, int8, 0xffff, &e);
    for (; c < dim; c += 16) weigh_tile(part, score, dim, kv, n, c, nh, 1, int8, cpu_mask(dim - c), &e);
    early_end(&e);
}

/* Heads of 128, which all published models have, by such tiles; other sizes one by one. A function for each
 * number of heads. */
#define HEADS(nh, int8)                                                                                            \
    static void heads_##nh##_##int8(float *part, const float *q, int32_t dim, float scale, const cpu_kv_block *kv, \
                                    int32_t n) {                                                                   \
        if (dim == 128)                                                                                            \
            block_heads(part, q, 128, scale, kv, n, nh, nh > 6 ? 3 : VECS, int8);                                  \
        else                                                                                                       \
            block_heads(part, q, dim, scale, kv, n, nh, 1, int8);                                                  \
    }
#define HEADS_ALL(int8) \
    HEADS(1, int8)      \
    HEADS(2, int8) HEADS(3, int8) HEADS(4, int8) HEADS(5, int8) HEADS(6, int8) HEADS(7, int8) HEADS(8, int8)
HEADS_ALL(0)
HEADS_ALL(1)

typedef void heads_fn(float *part, const float *q, int32_t dim, float scale, const cpu_kv_block *kv, int32_t n);
static heads_fn *const heads[2][CPU_HEAD_TILE] = {
    {heads_1_0, heads_2_0, heads_3_0, heads_4_0, heads_5_0, heads_6_0, heads_7_0, heads_8_0},
    {heads_1_1, heads_2_1, heads_3_1, heads_4_1, heads_5_1, heads_6_1, heads_7_1, heads_8_1},
};

void cpu_attn_bf16_avx512(float *part, const float *q, int32_t n_head, int32_t head_dim, float scale,
                          const cpu_kv_block *kv, int32_t n) {
    heads[0][n_head - 1](part, q, head_dim, scale, kv, n);
}

void cpu_attn_int8_avx512(float *part, const float *q, int32_t n_head, int32_t head_dim, float scale,
                          const cpu_kv_block *kv, int32_t n) {
    heads[1][n_head - 1](part, q, head_dim, scale, kv, n);
}

void cpu_attn_divide_avx512(float *out, const float *acc, int32_t n_head, int32_t head_dim) {
    const float *from = acc + 2 * CPU_HEAD_TILE;
    for (int32_t h = 0; h < n_head; h++, from += head_dim, out += head_dim) {
        const __m512 by = _mm512_set1_ps(1.0f / acc[CPU_HEAD_TILE + h]);
        for (int32_t c = 0; c < head_dim; c += 16) {
            const __mmask16 m = cpu_mask(head_dim - c);
            _mm512_mask_storeu_ps(out + c, m, _mm512_mul_ps(_mm512_maskz_loadu_ps(m, from + c), by));
        }
    }
}

void cpu_attn_join_avx512(float *acc, const float *part, int32_t n_head, int32_t head_dim) {
    const __m256 am = _mm256_loadu_ps(acc), pm = _mm256_loadu_ps(part), top = _mm256_max_ps(am, pm);
    const __m512 diff = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_sub_ps(am, top)), _mm256_sub_ps(pm, top), 1);
    float e[16];
    _mm512_storeu_ps(e, cpu_exp2_16(diff));
    for (int32_t h = 0; h < n_head; h++) {
        const __m512 ea = _mm512_set1_ps(e[h]), ep = _mm512_set1_ps(e[h + 8]);
        float *to = acc + 2 * CPU_HEAD_TILE + h * head_dim;
        const float *from = part + 2 * CPU_HEAD_TILE + h * head_dim;
        acc[h] = acc[h] > part[h] ? acc[h] : part[h];
        acc[CPU_HEAD_TILE + h] = acc[CPU_HEAD_TILE + h] * e[h] + part[CPU_HEAD_TILE + h] * e[h + 8];
        for (int32_t c = 0; c < head_dim; c += 16) {
            const __mmask16 m = cpu_mask(head_dim - c);
            __m512 a = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, to + c), ea);
            a = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(m, from + c), ep, a);
            _mm512_mask_storeu_ps(to + c, m, a);
        }
    }
}
