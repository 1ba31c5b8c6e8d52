/* Attention over one softmax block, AVX-512. Keys lie with 16 positions side by side, so that lanes are positions and
 * a score is one chain of FMAs over the head's dimensions, without a sum across lanes; values lie row by row, so that
 * lanes are dimensions and an output is one chain over the positions. Register tiles of 8 heads by 3
 * vectors, or 6 by 4: a key or value is loaded and widened once for all heads of the group, 24 FMAs to 11 loads.
 * Nothing is shared between rows, hence neither can bits be. */
#include "backend/cpu/attn_early.h"
#include "backend/cpu/table_avx512.h"
#include "backend/cpu/vec_avx512.h"

#include <math.h>

enum { SCORES = CPU_ATTN_BLOCK + 16, VECS = 4 };

/* 16 bf16 numbers or int8 codes from element i on, as f32. */
CPU_INLINE __m512 load16(const unsigned char *p, int64_t i, const bool int8) {
    if (int8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p + i))));
    return cpu_widen(_mm256_loadu_si256((const __m256i *)(const void *)(p + 2 * i)));
}
CPU_INLINE __m512 load16_cut(const unsigned char *p, int64_t i, const bool int8, __mmask16 m) {
    if (int8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, p + i)));
    return cpu_widen(_mm256_maskz_loadu_epi16(m, p + 2 * i));
}

/* Scores of nh heads and the positions of nv runs. */
CPU_INLINE void score_tile(float (*score)[SCORES], const float *q, int32_t dim, float scale, const cpu_kv_run *run,
                           const int nh, const int nv, const bool int8, const bool cut, early *e) {
    __m512 acc[CPU_HEAD_TILE][VECS];
    const __mmask16 m = cut ? cpu_mask(run->n) : 0xffff;
    CPU_UNROLL for (int h = 0; h < nh; h++) CPU_UNROLL for (int v = 0; v < nv; v++) acc[h][v] = _mm512_setzero_ps();
    for (int32_t c = 0; c < dim; c++) {
        __m512 k[VECS];
        CPU_UNROLL for (int v = 0; v < nv; v++) k[v] =
            cut ? load16_cut(run->k, c * CPU_KV_GROUP, int8, m) : load16(run[v].k, c * CPU_KV_GROUP, int8);
        if (c % ((nv > 1 ? 1 : 2) * (int8 ? 2 : 1)) == 0) early_fetch(e, 1);
        CPU_UNROLL for (int h = 0; h < nh; h++) {
            const __m512 x = _mm512_set1_ps(q[h * dim + c]);
            CPU_UNROLL for (int v = 0; v < nv; v++) acc[h][v] = _mm512_fmadd_ps(x, k[v], acc[h][v]);
        }
    }
    CPU_UNROLL for (int v = 0; v < nv; v++) {
        __m512 s = _mm512_set1_ps(scale);
        if (int8) s = _mm512_mul_ps(s, _mm512_maskz_loadu_ps(m, run[v].k_scale));
        CPU_UNROLL for (int h = 0; h < nh; h++) _mm512_storeu_ps(score[h] + run[v].t0, _mm512_mul_ps(acc[h][v], s));
    }
}

/* Lanes past a run's end are overwritten by the next run, or lie past n. */
CPU_INLINE void score_all(float (*score)[SCORES], const float *q, int32_t dim, float scale, const cpu_kv_block *kv,
                          int32_t n, const int nh, const int wide, const bool int8, early *e) {
    const cpu_kv_run *r = kv->run, *end = r + kv->n_run;
    while (r < end && r->t0 < n) {
        bool whole = wide > 1 && end - r >= wide && r[wide - 1].t0 < n;
        for (int v = 0; whole && v < wide; v++) whole = !r[v].cut;
        if (whole)
            score_tile(score, q, dim, scale, r, nh, wide, int8, false, e);
        else if (r->cut)
            score_tile(score, q, dim, scale, r, nh, 1, int8, true, e);
        else
            score_tile(score, q, dim, scale, r, nh, 1, int8, false, e);
        r += whole ? wide : 1;
    }
}

/* Scores of n positions to 2^(score - max), max and sum per head; then each times its value's scale. */
CPU_INLINE void soften(float *part, float (*score)[SCORES], int32_t n, const cpu_kv_block *kv, const int nh,
                       const bool int8, early *fetched) {
    const __m512 none = _mm512_set1_ps(-INFINITY);
    float scale[SCORES];
    for (const cpu_kv_run *r = kv->run, *end = r + kv->n_run; int8 && r < end && r->t0 < n; r++)
        _mm512_storeu_ps(scale + r->t0, _mm512_maskz_loadu_ps(cpu_mask(r->n), r->v_scale));
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

/* Columns c0.. of the outputs: nv vectors, the last one cut to m when cut. */
CPU_INLINE void weigh_tile(float *part, float (*p)[SCORES], int32_t dim, const cpu_kv_block *kv, int32_t n, int32_t c0,
                           const int nh, const int nv, const bool int8, const bool cut, __mmask16 m, early *e) {
    __m512 acc[CPU_HEAD_TILE][VECS];
    const int each = int8 ? 1 : 2;
    CPU_UNROLL for (int h = 0; h < nh; h++) CPU_UNROLL for (int v = 0; v < nv; v++) acc[h][v] = _mm512_setzero_ps();
    for (const cpu_kv_run *r = kv->run, *end = r + kv->n_run; r < end && r->t0 < n; r++) {
        const int32_t stop = r->t0 + r->n < n ? r->t0 + r->n : n;
        const unsigned char *at = r->v + (int64_t)c0 * each;
        for (int32_t t = r->t0; t < stop; t++, at += (int64_t)dim * each) {
            __m512 w[VECS];
            if (t % (int8 ? 4 : 2) == 0) early_fetch(e, nv);
            CPU_UNROLL for (int v = 0; v < nv; v++) w[v] = cut ? load16_cut(at, 0, int8, m) : load16(at, v * 16, int8);
            CPU_UNROLL for (int h = 0; h < nh; h++) {
                const __m512 x = _mm512_set1_ps(p[h][t]);
                CPU_UNROLL for (int v = 0; v < nv; v++) acc[h][v] = _mm512_fmadd_ps(x, w[v], acc[h][v]);
            }
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
    early_begin(&e, kv, dim * CPU_KV_GROUP * (int8 ? 1 : 2), true);
    score_all(score, q, dim, scale, kv, n, nh, wide, int8, &e);
    soften(part, score, n, kv, nh, int8, &e);
    int32_t c = 0;
    for (; wide == VECS && c + 48 <= dim; c += 48)
        weigh_tile(part, score, dim, kv, n, c, nh, 3, int8, false, 0xffff, &e);
    for (; wide == VECS && c + 32 <= dim; c += 32)
        weigh_tile(part, score, dim, kv, n, c, nh, 2, int8, false, 0xffff, &e);
    for (; c < dim; c += 16) weigh_tile(part, score, dim, kv, n, c, nh, 1, int8, true, cpu_mask(dim - c), &e);
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
