/* Attention over one softmax block, AVX2. As in attn_avx512.c lanes are positions for scores and dimensions for
 * outputs, in bf16 pairs of either, and each number is one chain of FMAs; a group of 16 positions is a pair of
 * registers. Register tiles of up to 6 heads by 2 vectors, or 3 by 4: 24 FMAs to 14 or 10 loads. */
#include "backend/cpu/table_avx2.h"
#include "backend/cpu/vec_avx2.h"

#include <math.h>

enum { SCORES = CPU_ATTN_BLOCK + 16 /* rows lie a line apart in the cache's sets */, HEADS = 6, VECS = 4 };

/* 8 codes; cut: n of them, which alone are read. */
CPU_INLINE __m256 codes8(const unsigned char *p, const bool cut, int64_t n) {
    unsigned char room[8] = {0};
    if (cut && n > 0) memcpy(room, p, (size_t)(n < 8 ? n : 8));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(cut ? room : p))));
}
/* 8 pairs of bf16 numbers, or n of them, which alone are read: the first of each, and the second. */
CPU_INLINE void pairs8(__m256 *a, __m256 *b, const unsigned char *p, const bool cut, int64_t n) {
    const __m256i x = cut ? _mm256_maskload_epi32((const int *)(const void *)p, cpu_lanes8(n))
                          : _mm256_loadu_si256((const __m256i *)(const void *)p);
    *a = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    *b = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int32_t)0xffff0000u)));
}

/* acc[h][v] += x[h] * w[v] */
CPU_INLINE void add_all(__m256 (*acc)[VECS], const float *x, int64_t next, const __m256 *w, const int nh,
                        const int nv) {
    CPU_UNROLL for (int h = 0; h < nh; h++) {
        const __m256 y = _mm256_broadcast_ss(x + h * next);
        CPU_UNROLL for (int v = 0; v < nv; v++) acc[h][v] = _mm256_fmadd_ps(y, w[v], acc[h][v]);
    }
}

/* Scores of nh heads and the positions of one group, t0.. */
CPU_INLINE void score_tile(float (*score)[SCORES], int32_t t0, const float *q, int32_t dim, float scale,
                           const cpu_kv_group *g, const int nh, const bool int8) {
    __m256 acc[HEADS][VECS];
    CPU_UNROLL for (int h = 0; h < nh; h++) acc[h][0] = acc[h][1] = _mm256_setzero_ps();
    for (int32_t c = 0; c < dim; c += 2) {
        __m256 a[2], b[2];
        const unsigned char *at = g->k + (int64_t)c * CPU_KV_GROUP * (int8 ? 1 : 2);
        CPU_UNROLL for (int v = 0; v < 2; v++) {
            if (int8)
                a[v] = codes8(at + 8 * v, false, 0), b[v] = codes8(at + CPU_KV_GROUP + 8 * v, false, 0);
            else
                pairs8(&a[v], &b[v], at + 32 * v, false, 0);
        }
        add_all(acc, q + c, dim, a, nh, 2);
        add_all(acc, q + c + 1, dim, b, nh, 2);
    }
    CPU_UNROLL for (int v = 0; v < 2; v++) {
        __m256 s = _mm256_set1_ps(scale);
        if (int8) s = _mm256_mul_ps(s, _mm256_loadu_ps(g->k_scale + 8 * v));
        CPU_UNROLL for (int h = 0; h < nh; h++) _mm256_storeu_ps(score[h] + t0 + 8 * v, _mm256_mul_ps(acc[h][v], s));
    }
}

/* Scores of whole groups: what lies past n is not looked at. */
CPU_INLINE void score_all(float (*score)[SCORES], const float *q, int32_t dim, float scale, const cpu_kv_block *kv,
                          int32_t n, const int nh, const bool int8) {
    for (int32_t t = 0; t < n; t += CPU_KV_GROUP)
        score_tile(score, t, q, dim, scale, &kv->group[t / CPU_KV_GROUP], nh, int8);
}

/* Scores of n positions to 2^(score - max), max and sum per head; then each times its value's scale. */
CPU_INLINE void soften(float *part, float (*score)[SCORES], int32_t n, const cpu_kv_block *kv, const int nh,
                       const bool int8) {
    const __m256 none = _mm256_set1_ps(-INFINITY);
    float scale[CPU_ATTN_BLOCK];
    for (int32_t t = 0; int8 && t < n; t += 8)
        _mm256_storeu_ps(scale + t, _mm256_loadu_ps(kv->group[t / CPU_KV_GROUP].v_scale + t % CPU_KV_GROUP));
    for (int h = 0; h < nh; h++) {
        __m256 top = none, sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int32_t t = 0; t < n; t += 8)
            top = _mm256_max_ps(
                top, _mm256_blendv_ps(none, _mm256_loadu_ps(score[h] + t), _mm256_castsi256_ps(cpu_lanes8(n - t))));
        const float max = cpu_max1(top);
        top = _mm256_set1_ps(max);
        for (int32_t t = 0; t < n; t += 8) {
            const __m256 live = _mm256_castsi256_ps(cpu_lanes8(n - t));
            __m256 e = _mm256_and_ps(live, cpu_exp2_8(_mm256_sub_ps(_mm256_loadu_ps(score[h] + t), top)));
            sum[t / 8 % 2] = _mm256_add_ps(sum[t / 8 % 2], e);
            if (int8) e = _mm256_and_ps(live, _mm256_mul_ps(e, _mm256_loadu_ps(scale + t)));
            _mm256_storeu_ps(score[h] + t, e);
        }
        part[h] = max;
        part[CPU_HEAD_TILE + h] = cpu_sum1(sum);
    }
}

/* Columns c0.. of the outputs: nv vectors, or one that is cut to `left` columns. */
CPU_INLINE void weigh_tile(float *out, float (*p)[SCORES], int32_t dim, const cpu_kv_block *kv, int32_t n, int32_t c0,
                           const int nh, const int nv, const bool int8, const bool cut, int32_t left) {
    __m256 acc[HEADS][VECS];
    CPU_UNROLL for (int h = 0; h < nh; h++) CPU_UNROLL for (int v = 0; v < nv; v++) acc[h][v] = _mm256_setzero_ps();
    for (int32_t t0 = 0; t0 < n; t0 += CPU_KV_GROUP) {
        const int32_t stop = n - t0 < CPU_KV_GROUP ? n : t0 + CPU_KV_GROUP, row = int8 ? dim : 4 * dim;
        const unsigned char *at = kv->group[t0 / CPU_KV_GROUP].v + (int8 ? c0 : 4 * c0);
        for (int32_t t = t0; t < stop; t += 2, at += int8 ? 2 * row : row) {
            __m256 a[VECS], b[VECS];
            CPU_UNROLL for (int v = 0; v < nv; v++) {
                if (int8)
                    a[v] = codes8(at + 8 * v, cut, left), b[v] = codes8(at + row + 8 * v, cut, left);
                else
                    pairs8(&a[v], &b[v], at + 32 * v, cut, left);
            }
            add_all(acc, &p[0][t], SCORES, a, nh, nv);
            if (t + 1 < stop) add_all(acc, &p[0][t + 1], SCORES, b, nh, nv);
        }
    }
    CPU_UNROLL for (int h = 0; h < nh; h++) CPU_UNROLL for (int v = 0; v < nv; v++) {
        if (cut)
            cpu_store8_cut(out + h * dim + c0, left, acc[h][0]);
        else
            _mm256_storeu_ps(out + h * dim + c0 + v * 8, acc[h][v]);
    }
}

/* nh <= HEADS heads, the first of whose places in part are at `part` and `out`. */
CPU_INLINE void block_heads(float *part, float *out, const float *q, int32_t dim, float scale, const cpu_kv_block *kv,
                            int32_t n, const int nh, const bool int8) {
    const int wide = nh <= 3 ? 4 : 2;
    _Alignas(32) float score[HEADS][SCORES];
    score_all(score, q, dim, scale, kv, n, nh, int8);
    soften(part, score, n, kv, nh, int8);
    int32_t c = 0;
    for (; c + 8 * wide <= dim; c += 8 * wide) weigh_tile(out, score, dim, kv, n, c, nh, wide, int8, false, 0);
    for (; c < dim; c += 8) weigh_tile(out, score, dim, kv, n, c, nh, 1, int8, true, dim - c);
}

/* A function for each number of heads. */
#define HEADS_FN(nh, int8)                                                                             \
    static void heads_##nh##_##int8(float *part, float *out, const float *q, int32_t dim, float scale, \
                                    const cpu_kv_block *kv, int32_t n) {                               \
        if (dim == 128)                                                                                \
            block_heads(part, out, q, 128, scale, kv, n, nh, int8);                                    \
        else                                                                                           \
            block_heads(part, out, q, dim, scale, kv, n, nh, int8);                                    \
    }
#define HEADS_ALL(int8) \
    HEADS_FN(1, int8)   \
    HEADS_FN(2, int8) HEADS_FN(3, int8) HEADS_FN(4, int8) HEADS_FN(5, int8) HEADS_FN(6, int8)
HEADS_ALL(0)
HEADS_ALL(1)

typedef void heads_fn(float *part, float *out, const float *q, int32_t dim, float scale, const cpu_kv_block *kv,
                      int32_t n);
static heads_fn *const heads[2][HEADS] = {
    {heads_1_0, heads_2_0, heads_3_0, heads_4_0, heads_5_0, heads_6_0},
    {heads_1_1, heads_2_1, heads_3_1, heads_4_1, heads_5_1, heads_6_1},
};

/* 7 and 8 heads are two halves: the keys and values of a block lie in L2 for the second. */
static void attn(float *part, const float *q, int32_t n_head, int32_t dim, float scale, const cpu_kv_block *kv,
                 int32_t n, const int int8) {
    const int32_t half = n_head > HEADS ? n_head / 2 : n_head;
    for (int32_t h = 0, nh = half; h < n_head; h += nh, nh = n_head - half)
        heads[int8][nh - 1](part + h, part + 2 * CPU_HEAD_TILE + h * dim, q + h * dim, dim, scale, kv, n);
}

void cpu_attn_bf16_avx2(float *part, const float *q, int32_t n_head, int32_t head_dim, float scale,
                        const cpu_kv_block *kv, int32_t n) {
    attn(part, q, n_head, head_dim, scale, kv, n, 0);
}

void cpu_attn_int8_avx2(float *part, const float *q, int32_t n_head, int32_t head_dim, float scale,
                        const cpu_kv_block *kv, int32_t n) {
    attn(part, q, n_head, head_dim, scale, kv, n, 1);
}

void cpu_attn_divide_avx2(float *out, const float *acc, int32_t n_head, int32_t head_dim) {
    const float *from = acc + 2 * CPU_HEAD_TILE;
    for (int32_t h = 0; h < n_head; h++, from += head_dim, out += head_dim) {
        const __m256 by = _mm256_set1_ps(1.0f / acc[CPU_HEAD_TILE + h]);
        for (int32_t c = 0; c < head_dim; c += 8)
            cpu_store8_cut(out + c, head_dim - c, _mm256_mul_ps(cpu_load8_cut(from + c, head_dim - c), by));
    }
}

void cpu_attn_join_avx2(float *acc, const float *part, int32_t n_head, int32_t head_dim) {
    const __m256 am = _mm256_loadu_ps(acc), pm = _mm256_loadu_ps(part), top = _mm256_max_ps(am, pm);
    float e[2][CPU_HEAD_TILE];
    _mm256_storeu_ps(e[0], cpu_exp2_8(_mm256_sub_ps(am, top)));
    _mm256_storeu_ps(e[1], cpu_exp2_8(_mm256_sub_ps(pm, top)));
    for (int32_t h = 0; h < n_head; h++) {
        const __m256 ea = _mm256_set1_ps(e[0][h]), ep = _mm256_set1_ps(e[1][h]);
        float *to = acc + 2 * CPU_HEAD_TILE + h * head_dim;
        const float *from = part + 2 * CPU_HEAD_TILE + h * head_dim;
        acc[h] = acc[h] > part[h] ? acc[h] : part[h];
        acc[CPU_HEAD_TILE + h] = acc[CPU_HEAD_TILE + h] * e[0][h] + part[CPU_HEAD_TILE + h] * e[1][h];
        for (int32_t c = 0; c < head_dim; c += 8) {
            const __m256 a = _mm256_mul_ps(cpu_load8_cut(to + c, head_dim - c), ea);
            cpu_store8_cut(to + c, head_dim - c, _mm256_fmadd_ps(cpu_load8_cut(from + c, head_dim - c), ep, a));
        }
    }
}
