/* Attention over one softmax block of bf16 keys and values, AMX, for all rows of a tile at once. A query is one row's
 * head; 32 of them at a time:
 *
 *   S [16 queries, 16 positions] += Q [16, 32 dims] . K [32 dims, 16 positions]
 *   O [16 queries, 16 dims]      += W [16, 32 positions] . V [32 positions, 16 dims]      W = 2^(S - max), rounded
 *
 * Queries and weights are rounded to bf16 as in attn_bf16.c, and the sum of the weights is that of the rounded ones.
 * The second factor of a product of tiles wants pairs of dims, or of positions, side by side, as the pages hold them.
 *
 * A product of tiles occupies its own unit for 16 cycles, and the softmax of a query costs about as much as its
 * products do: so the products of the 32 queries before and after run between the parts of a softmax, which goes four
 * queries abreast.
 *
 * Queries share instructions, but nothing else: what a row computes is a function of its own queries, of the positions
 * that it sees, counted from the block's first, and of zeros. */
#include "backend/cpu/attn_early.h"
#include "backend/cpu/table_avx512.h"
#include "backend/cpu/vec_amx.h"

#include <math.h>
#include <string.h>

enum {
    QUERIES = 2 * TILE_ROWS,
    QUERIES_MAX = CPU_ATTN_ROWS * CPU_HEAD_TILE,
    SCORES = CPU_ATTN_BLOCK + 16, /* so that rows lie a line apart in the cache's sets */
    WEIGHTS = 2 * SCORES,         /* of a row of scores in bf16 */
    DIMS = CPU_HEAD_DIM_MAX + 16,
    TILE = TILE_BYTES / 2, /* bf16 numbers */
    ABREAST = 4,           /* queries whose softmax goes side by side, and whose results */
};

typedef struct room {
    _Alignas(64) ern_bf16 q[QUERIES_MAX * CPU_HEAD_DIM_MAX]; /* [queries, 32 dims * nk] */
    /* copies, where a page does not hold whole tiles (find_sources) */
    _Alignas(64) ern_bf16 k[CPU_ATTN_BLOCK * CPU_HEAD_DIM_MAX]; /* [group of 16 positions, nk] tiles */
    _Alignas(64) ern_bf16 v[CPU_ATTN_BLOCK * CPU_HEAD_DIM_MAX]; /* [32 positions] of 2 nk tiles side by side */
    _Alignas(64) float score[2][QUERIES][SCORES]; /* weights take the place of a row's scores, from its front on */
    _Alignas(64) float out[QUERIES][DIMS];
    _Alignas(64) float adding[ABREAST][2][16]; /* the sums of a softmax at hand */
    float less[ABREAST];                       /* and what its scores are less by: -max */
    float max[2][QUERIES], sum[2][QUERIES];
} room;

size_t cpu_attn_room(void) { return (sizeof(room) + 63) / 64 * 64; }

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

/* ---- what the tiles are read from -------------------------------------------------------------------------------- */

/* Queries in bf16; zeros in rows and dims that fill the last tiles. */
static void pack_queries(room *w, const cpu_attn_job *j) {
    const int32_t C = j->head_dim, width = tiles_of(C, TILE_K) * TILE_K, n = j->n_row * j->n_head;
    for (int32_t i = 0; i < n; i++) {
        const float *q = j->q[i / j->n_head] + i % j->n_head * C;
        for (int32_t c = 0; c < width; c += 16)
            _mm256_storeu_si256((__m256i *)(void *)(w->q + i * width + c),
                                cpu_narrow(_mm512_maskz_loadu_ps(cpu_mask(C - c), q + c)));
    }
    memset(w->q + n * width, 0, (size_t)((tiles_of(n, QUERIES) * QUERIES - n) * width) * sizeof *w->q);
}

/* Where the tiles of a block lie: of 16 positions' keys nk tiles, one behind the other; of 32 positions' values 2 nk
 * side by side, whose rows are 64 nk numbers apart. */
typedef struct sources {
    const ern_bf16 *k[CPU_ATTN_BLOCK / 16], *v[CPU_ATTN_BLOCK / 32];
} sources;

static const ern_bf16 *numbers(const unsigned char *p) { return (const ern_bf16 *)(const void *)p; }

/* The values of a pair of positions from t on, zeros where there is none before n, and beyond the last dim. */
static void copy_pair(ern_bf16 *to, const cpu_kv_block *kv, int32_t C, int32_t t, int32_t n) {
    const ern_bf16 *from = numbers(kv->group[least(t, n - 1) / 16].v) + t % 16 * C;
    const __mmask32 seen = t + 1 < n ? 0xffffffff : 0x55555555;
    for (int32_t c = 0; c < tiles_of(C, TILE_K) * TILE_K; c += 16, to += 32) {
        const __mmask16 m = t < n ? cpu_mask(C - c) : 0;
        _mm512_store_si512(to, _mm512_maskz_mov_epi16(seen, _mm512_maskz_loadu_epi32(m, from + 2 * c)));
    }
}

/* Find the tiles of the first n positions, rounded up to four of keys. Copied are those of heads that are no multiple
 * of 32 dims, and of values those that two pages share or that reach beyond n. */
CPU_INLINE void find_sources(sources *s, room *w, const cpu_kv_block *kv, int32_t n, const int32_t C) {
    const int32_t nk = tiles_of(C, TILE_K), n_group = cpu_kv_groups(n);
    for (int32_t g = 0; g < tiles_of(n_group, 4) * 4; g++) {
        const ern_bf16 *from = numbers(kv->group[g < n_group ? g : 0].k);
        s->k[g] = from;
        if (C % TILE_K == 0) continue;
        ern_bf16 *to = w->k + (int64_t)g * nk * TILE;
        memcpy(to, from, (size_t)(C * 16) * sizeof *to);
        memset(to + C * 16, 0, (size_t)(nk * TILE - C * 16) * sizeof *to);
        s->k[g] = to;
    }
    for (int32_t p = 0; p < tiles_of(n, 32); p++) {
        const cpu_kv_group *g = kv->group + 2 * p;
        s->v[p] = numbers(g[0].v);
        if (C % TILE_K == 0 && 32 * (p + 1) <= n && g[1].v == g[0].v + 16 * C * 2) continue;
        ern_bf16 *to = w->v + (int64_t)p * 2 * nk * TILE;
        for (int32_t i = 0; i < 16; i++) copy_pair(to + i * 64 * nk, kv, C, 32 * p + 2 * i, n);
        s->v[p] = to;
    }
}

/* Whether values from..to-1 are numbers. */
static bool are_finite(const cpu_kv_block *kv, int32_t C, int32_t from, int32_t to) {
    const __m512i top = _mm512_set1_epi16(0x7f80);
    __mmask32 bad = 0;
    for (int32_t t = from; t < to; t++)
        for (int32_t c = 0; c < C; c += 16) {
            const ern_bf16 *at = numbers(kv->group[t / 16].v) + t % 16 / 2 * 2 * C + 2 * c;
            const __m512i x = _mm512_and_si512(_mm512_maskz_loadu_epi32(cpu_mask(C - c), at), top);
            bad |= _mm512_mask_cmpeq_epi16_mask(0x55555555u << t % 2, x, top);
        }
    return bad == 0;
}

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* 32 queries from m, which see at most n positions. */
typedef struct group {
    int32_t m, n;
    int buffer; /* whose scores and weights are its own */
} group;

/* The weights of query i of a group. */
CPU_INLINE ern_bf16 *weights_of(room *w, const group *g, int32_t i) {
    return (ern_bf16 *)(void *)w->score[g->buffer][i];
}

CPU_INLINE void begin_tiles(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Sum `tile` to where rows of `row` floats lie: in 2 x 2, or four side by side. */
#define put_many(tile, to, row) _tile_stored(tile, (to) + (tile) / 2 * TILE_ROWS * (row) + (tile) % 2 * 16, (row)*4)
#define put_few(tile, to, row) _tile_stored(tile, (to) + 16 * (tile), (row)*4)

/* Before the first product of a sum: the sum before it, if there is one, leaves. */
#define turn_sum(put, tile, is_first, to, row) \
    do {                                       \
        if (is_first) {                        \
            if (to) put(tile, to, row);        \
            _tile_zero(tile);                  \
        }                                      \
    } while (0)

/* Where the four sums of a step go. first: of their steps; last: of all steps, and nobody comes who lets them leave
 * beside his products. before: where the four before go, NULL: there are none. */
typedef struct sums {
    bool first, last;
    float *before, *now; /* rows of `row` floats */
    int32_t row;
} sums;

/* One step of the products: tiles of queries at a and 16 rows on, of `row` numbers; tiles at b and c, of `line`. */
CPU_INLINE void step(const ern_bf16 *a, int32_t row, const ern_bf16 *b, const ern_bf16 *c, int32_t line, sums to) {
    cpu_tile_load(4, a, row * 2);
    cpu_tile_load(5, a + TILE_ROWS * row, row * 2);
    cpu_tile_load(6, b, line * 2);
    cpu_tile_load(7, c, line * 2);
    turn_sum(put_many, 0, to.first, to.before, to.row);
    _tile_dpbf16ps(0, 4, 6);
    turn_sum(put_many, 1, to.first, to.before, to.row);
    _tile_dpbf16ps(1, 4, 7);
    turn_sum(put_many, 2, to.first, to.before, to.row);
    _tile_dpbf16ps(2, 5, 6);
    turn_sum(put_many, 3, to.first, to.before, to.row);
    _tile_dpbf16ps(3, 5, 7);
    if (!to.last) return;
    put_many(0, to.now, to.row);
    put_many(1, to.now, to.row);
    put_many(2, to.now, to.row);
    put_many(3, to.now, to.row);
}

/* Step i of S, of n in all: 32 positions by 32 dims. */
CPU_INLINE void score_step(room *w, const sources *s, const group *g, int32_t nk, int32_t i, int32_t n) {
    const int32_t p = i / nk, t = i % nk;
    float *to = &w->score[g->buffer][0][p * 32];
    step(w->q + (g->m * nk + t) * TILE_K, nk * TILE_K, s->k[2 * p] + t * TILE, s->k[2 * p + 1] + t * TILE, 32,
         (sums){t == 0, i == n - 1, p > 0 ? to - 32 : NULL, to, SCORES});
}

/* Step i of O, of n in all: 32 dims by 32 positions, of which there are 32 * nt. */
CPU_INLINE void weigh_step(room *w, const sources *s, const group *g, int32_t nk, int32_t nt, int32_t i, int32_t n) {
    const int32_t d = i / nt, t = i % nt;
    const ern_bf16 *v = s->v[t] + d * 64;
    float *to = &w->out[0][d * 32];
    step(weights_of(w, g, 0) + t * TILE_K, WEIGHTS, v, v + 32, 64 * nk,
         (sums){t == 0, i == n - 1, d > 0 ? to - 32 : NULL, to, DIMS});
}

/* ---- softmax ----------------------------------------------------------------------------------------------------- */

/* Four queries of a group at their softmax, which goes in parts: their largest scores first, then 32 positions a part.
 */
typedef struct soft {
    int32_t i, part, n_part;   /* the first of the four; the next part */
    int32_t n[ABREAST], least; /* positions that each sees, and the least of these */
} soft;

/* Queries i.. of the group; those past the last one see what that sees. */
CPU_INLINE void soften_at(soft *s, const cpu_attn_job *j, const group *g, int32_t i) {
    const int32_t last = j->n_row * j->n_head - 1;
    s->i = i;
    s->part = 0;
    s->n_part = 1 + tiles_of(g->n, 32);
    for (int32_t k = 0; k < ABREAST; k++) s->n[k] = j->n[least(g->m + i + k, last) / j->n_head];
    s->least = s->n[0]; /* rows' positions ascend */
}

/* Lanes i of the results: the largest of vector i. */
CPU_INLINE __m128 largest4(const __m512 *v) {
    __m128 x[ABREAST];
    CPU_UNROLL for (int k = 0; k < ABREAST; k++) {
        const __m256 y = _mm256_max_ps(_mm512_castps512_ps256(v[k]), _mm512_extractf32x8_ps(v[k], 1));
        x[k] = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    }
    const __m128 a = _mm_max_ps(_mm_unpacklo_ps(x[0], x[1]), _mm_unpackhi_ps(x[0], x[1]));
    const __m128 b = _mm_max_ps(_mm_unpacklo_ps(x[2], x[3]), _mm_unpackhi_ps(x[2], x[3]));
    return _mm_max_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
}

CPU_INLINE void soften_begin(room *w, const group *g, const soft *s, float scale) {
    const __m512 none = _mm512_set1_ps(-INFINITY);
    const float *score = w->score[g->buffer][s->i];
    __m512 top[ABREAST];
    int32_t t = 0;
    CPU_UNROLL for (int k = 0; k < ABREAST; k++) {
        top[k] = none;
        _mm512_store_ps(w->adding[k][0], _mm512_setzero_ps());
        _mm512_store_ps(w->adding[k][1], _mm512_setzero_ps());
    }
    for (; t + 16 <= s->least; t += 16)
        CPU_UNROLL for (int k = 0; k < ABREAST; k++) top[k] =
            _mm512_max_ps(top[k], _mm512_load_ps(score + k * SCORES + t));
    for (; t < g->n; t += 16)
        CPU_UNROLL for (int k = 0; k < ABREAST; k++) top[k] =
            _mm512_max_ps(top[k], _mm512_mask_load_ps(none, cpu_mask(s->n[k] - t), score + k * SCORES + t));
    const __m128 max = _mm_mul_ps(_mm_set1_ps(scale), largest4(top));
    _mm_storeu_ps(w->max[g->buffer] + s->i, max);
    _mm_storeu_ps(w->less, _mm_sub_ps(_mm_set1_ps(-0.0f), max));
}

/* Scores of 32 positions from t to weights, zeros where a query does not see. A weight takes half the room of a score:
 * what is written lies behind what is still to be read. */
CPU_INLINE void soften_some(room *w, const group *g, const soft *s, float scale, int32_t t, const bool whole) {
    const __m512 by = _mm512_set1_ps(scale);
    CPU_UNROLL for (int k = 0; k < ABREAST; k++) {
        const float *score = w->score[g->buffer][s->i + k] + t;
        const __m512 less = _mm512_set1_ps(w->less[k]);
        __m512 a = cpu_weight16(_mm512_fmadd_ps(_mm512_load_ps(score), by, less));
        __m512 b = cpu_weight16(_mm512_fmadd_ps(_mm512_load_ps(score + 16), by, less));
        if (!whole) {
            a = _mm512_maskz_mov_ps(cpu_mask(s->n[k] - t), a);
            b = _mm512_maskz_mov_ps(cpu_mask(s->n[k] - t - 16), b);
        }
        float(*sum)[16] = w->adding[k];
        _mm512_store_ps(sum[0], _mm512_add_ps(_mm512_load_ps(sum[0]), a));
        _mm512_store_ps(sum[1], _mm512_add_ps(_mm512_load_ps(sum[1]), b));
        _mm512_store_si512(weights_of(w, g, s->i + k) + t, cpu_uppers(a, b));
    }
}

CPU_INLINE void soften_end(room *w, const group *g, const soft *s) {
    __m512 sum[ABREAST];
    CPU_UNROLL for (int k = 0; k < ABREAST; k++) sum[k] =
        _mm512_add_ps(_mm512_load_ps(w->adding[k][0]), _mm512_load_ps(w->adding[k][1]));
    _mm_storeu_ps(w->sum[g->buffer] + s->i, cpu_sum4(sum[0], sum[1], sum[2], sum[3]));
}

/* The next part. */
CPU_INLINE void soften(room *w, const group *g, soft *s, float scale) {
    const int32_t t = (s->part - 1) * 32;
    if (s->part == 0)
        soften_begin(w, g, s, scale);
    else if (t + 32 <= s->least)
        soften_some(w, g, s, scale, t, true);
    else
        soften_some(w, g, s, scale, t, false);
    if (++s->part == s->n_part) soften_end(w, g, s);
}

/* ---- results ----------------------------------------------------------------------------------------------------- */

/* The outputs of query i of the group: new ones, or on top of those before. */
CPU_INLINE void finish_query(const room *w, float *to, int32_t i, const int32_t C, const bool join, __m512 ea,
                             __m512 ep) {
    for (int32_t c = 0; c < C; c += 16) {
        const __mmask16 m = cpu_mask(C - c);
        __m512 out = _mm512_load_ps(&w->out[i][c]);
        if (join) out = _mm512_fmadd_ps(out, ep, _mm512_mul_ps(_mm512_maskz_loadu_ps(m, to + c), ea));
        _mm512_mask_storeu_ps(to + c, m, out);
    }
}

/* The results of queries i.. of the group, four or as many as there are, to their rows' parts, as attn_join of
 * attn_avx512.c does it. */
CPU_INLINE void finish(const room *w, const cpu_attn_job *j, const group *g, int32_t i, const int32_t C) {
    const int32_t n = least(ABREAST, j->n_row * j->n_head - g->m - i);
    const float *max = w->max[g->buffer] + i, *sum = w->sum[g->buffer] + i;
    float *part[ABREAST], *to[ABREAST], e[16];
    for (int32_t k = 0; k < ABREAST; k++) {
        const int32_t at = g->m + i + (k < n ? k : 0), row = at / j->n_head, h = at % j->n_head;
        part[k] = j->part[row] + h;
        to[k] = j->part[row] + 2 * CPU_HEAD_TILE + h * C;
    }
    if (!j->join) {
        const __m512 none = _mm512_setzero_ps();
        for (int32_t k = 0; k < n; k++) {
            *part[k] = max[k];
            part[k][CPU_HEAD_TILE] = sum[k];
            finish_query(w, to[k], i + k, C, false, none, none);
        }
        return;
    }
    const __m128 was = _mm_set_ps(*part[3], *part[2], *part[1], *part[0]), now = _mm_loadu_ps(max);
    const __m128 top = _mm_max_ps(was, now);
    _mm512_storeu_ps(
        e, cpu_exp2_16(_mm512_insertf32x4(_mm512_castps128_ps512(_mm_sub_ps(was, top)), _mm_sub_ps(now, top), 1)));
    for (int32_t k = 0; k < n; k++) {
        *part[k] = *part[k] > max[k] ? *part[k] : max[k];
        part[k][CPU_HEAD_TILE] = part[k][CPU_HEAD_TILE] * e[k] + sum[k] * e[ABREAST + k];
        finish_query(w, to[k], i + k, C, true, _mm512_set1_ps(e[k]), _mm512_set1_ps(e[ABREAST + k]));
    }
}

/* ---- a block ----------------------------------------------------------------------------------------------------- */

static group group_at(const cpu_attn_job *j, int32_t i) {
    const int32_t m = i * QUERIES, last = least(m + QUERIES, j->n_row * j->n_head) - 1;
    return (group){m, j->n[last / j->n_head], i % 2};
}

/* What is to be done beside products: the softmax of `now`, then the results of `before`. */
typedef struct side {
    group before, now;
    soft soft;
    int32_t n_soft, n_out, out; /* queries of `now` and of `before`; those with results */
} side;

/* The next piece of it; false: there is none yet. */
CPU_INLINE bool beside(room *w, const cpu_attn_job *j, side *d, bool weighed, const int32_t C) {
    if (d->soft.i < d->n_soft) {
        soften(w, &d->now, &d->soft, j->scale);
        if (d->soft.part == d->soft.n_part) soften_at(&d->soft, j, &d->now, d->soft.i + ABREAST);
        return true;
    }
    if (!weighed || d->out >= d->n_out) return false;
    finish(w, j, &d->before, d->out, C);
    d->out += ABREAST;
    return true;
}

/* Softmax of group i, beside O of the group before and S of the one after. */
CPU_INLINE void turn(room *w, const sources *from, const cpu_attn_job *j, early *e, int32_t i, int32_t n_group,
                     const int32_t C) {
    const int32_t nk = tiles_of(C, TILE_K), all = j->n_row * j->n_head;
    const bool has_before = i > 0, has_now = i >= 0 && i < n_group, has_after = i + 1 < n_group;
    side d = {.n_soft = 0};
    group after = {0};
    if (has_before) d.before = group_at(j, i - 1), d.n_out = least(QUERIES, all - d.before.m);
    if (has_now) d.now = group_at(j, i), d.n_soft = least(QUERIES, all - d.now.m), soften_at(&d.soft, j, &d.now, 0);
    if (has_after) after = group_at(j, i + 1);
    const int32_t nt = tiles_of(d.before.n, 32), n_weigh = has_before ? tiles_of(C, 32) * nt : 0;
    const int32_t n_step = n_weigh + (has_after ? tiles_of(after.n, 32) * nk : 0);
    const int32_t n_piece = tiles_of(d.n_soft, ABREAST) * d.soft.n_part + tiles_of(d.n_out, ABREAST);
    for (int32_t s = 0, done = 0; s <= n_step; s++) {
        if (s < n_weigh)
            weigh_step(w, from, &d.before, nk, nt, s, n_weigh);
        else if (s < n_step)
            score_step(w, from, &after, nk, s - n_weigh, n_step - n_weigh);
        if (s < n_step && s % 4 == 0) early_fetch(e, 16);
        while (s == n_step || done * n_step < n_piece * (s + 1)) {
            if (!beside(w, j, &d, s + 1 >= n_weigh, C)) break;
            done++;
        }
    }
}

CPU_INLINE void attend_many(room *w, const cpu_attn_job *j, int32_t n, const int32_t C) {
    const int32_t n_group = tiles_of(j->n_row * j->n_head, QUERIES);
    sources s;
    early e;
    early_begin(&e, j->kv, C * CPU_KV_GROUP * 2);
    find_sources(&s, w, j->kv, n, C);
    cpu_tiles_begin(TILE_ROWS, TILE_ROWS);
    for (int32_t i = -1; i <= n_group; i++) turn(w, &s, j, &e, i, n_group, C);
    _tile_release();
}

/* ---- a block for up to 16 queries -------------------------------------------------------------------------------- */

/* One row, mostly, and memory is what it waits for: beside each tile as many lines of the block after this one are
 * fetched as it has, and into the first cache the tile that comes four later. The sums are those of 32 queries, in the
 * same order. */

enum { SOFT_FETCHES = 8 /* lines beside a part of a softmax */ };

/* next: the tile that comes four later, rows of `row` bytes. Of the block after this one two lines at a time: where a
 * range ends another begins. */
CPU_INLINE void fetch_beside(early *e, const ern_bf16 *next, int32_t row) {
    CPU_UNROLL for (int i = 0; i < TILE_ROWS; i++) _mm_prefetch((const char *)next + i * row, _MM_HINT_T0);
    CPU_UNROLL for (int i = 0; i < TILE_ROWS; i += 2) early_fetch(e, 2);
}

/* S: 32 dims of 64 positions a step. The scores of four tiles leave while those of the next four begin. */
CPU_INLINE void score_few(room *w, const sources *s, int32_t n_group, const int32_t C, early *e) {
    const int32_t nk = tiles_of(C, TILE_K);
    float *before = NULL;
    for (int32_t g = 0; g < n_group; g += 4) {
        for (int32_t t = 0; t < nk; t++) {
            const bool turns = t + 1 == nk;
            const int32_t next = turns ? 0 : (t + 1) * TILE;
            const ern_bf16 *const *k = s->k + g, *const *k1 = turns && g + 4 < n_group ? k + 4 : k;
            cpu_tile_load(4, w->q + t * TILE_K, nk * TILE_K * 2);
            cpu_tile_load(6, k[0] + t * TILE, 64);
            cpu_tile_load(7, k[1] + t * TILE, 64);
            fetch_beside(e, k1[0] + next, 64);
            turn_sum(put_few, 0, t == 0, before, SCORES);
            _tile_dpbf16ps(0, 4, 6);
            cpu_tile_load(6, k[2] + t * TILE, 64);
            fetch_beside(e, k1[1] + next, 64);
            turn_sum(put_few, 1, t == 0, before, SCORES);
            _tile_dpbf16ps(1, 4, 7);
            cpu_tile_load(7, k[3] + t * TILE, 64);
            fetch_beside(e, k1[2] + next, 64);
            turn_sum(put_few, 2, t == 0, before, SCORES);
            _tile_dpbf16ps(2, 4, 6);
            fetch_beside(e, k1[3] + next, 64);
            turn_sum(put_few, 3, t == 0, before, SCORES);
            _tile_dpbf16ps(3, 4, 7);
        }
        before = &w->score[0][0][g * 16];
    }
    put_few(0, before, SCORES);
    put_few(1, before, SCORES);
    put_few(2, before, SCORES);
    put_few(3, before, SCORES);
}

/* O of 64 dims from c: the sums stay in their tiles while the values pass. Where only 32 dims are left, the others are
 * the same once more, to where nobody looks. */
CPU_INLINE void weigh_few(room *w, const sources *s, const group *g, int32_t c, const int32_t C, early *e) {
    const int32_t row = tiles_of(C, TILE_K) * TILE_K * 4, second = c + 32 < C ? 64 : 0;
    begin_tiles();
    for (int32_t t = 0; t < g->n; t += 32) {
        const ern_bf16 *v = s->v[t / 32] + 2 * c, *v1 = t + 32 < g->n ? s->v[t / 32 + 1] + 2 * c : v;
        cpu_tile_load(4, weights_of(w, g, 0) + t, WEIGHTS * 2);
        cpu_tile_load(6, v, row);
        cpu_tile_load(7, v + 32, row);
        fetch_beside(e, v1, row);
        _tile_dpbf16ps(0, 4, 6);
        cpu_tile_load(6, v + second, row);
        fetch_beside(e, v1 + 32, row);
        _tile_dpbf16ps(1, 4, 7);
        cpu_tile_load(7, v + second + 32, row);
        fetch_beside(e, v1 + second, row);
        _tile_dpbf16ps(2, 4, 6);
        fetch_beside(e, v1 + second + 32, row);
        _tile_dpbf16ps(3, 4, 7);
    }
    float *out = &w->out[0][c];
    put_few(0, out, DIMS);
    put_few(1, out, DIMS);
    put_few(2, out, DIMS);
    put_few(3, out, DIMS);
}

CPU_INLINE void attend_few(room *w, const cpu_attn_job *j, int32_t n, const int32_t C) {
    const int32_t all = j->n_row * j->n_head;
    const group g = {.m = 0, .n = n, .buffer = 0};
    sources s;
    early e;
    early_begin(&e, j->kv, C * CPU_KV_GROUP * 2);
    find_sources(&s, w, j->kv, n, C);
    cpu_tiles_begin(all, all);
    score_few(w, &s, cpu_kv_groups(n), C, &e);
    for (int32_t i = 0; i < all; i += ABREAST) {
        soft four;
        for (soften_at(&four, j, &g, i); four.part < four.n_part;) {
            early_fetch(&e, SOFT_FETCHES);
            soften(w, &g, &four, j->scale);
        }
    }
    for (int32_t c = 0; c < C; c += 64) weigh_few(w, &s, &g, c, C, &e);
    early_end(&e);
    for (int32_t i = 0; i < all; i += ABREAST) finish(w, j, &g, i, C);
    _tile_release();
}

void cpu_attn_rows_amx(const cpu_attn_job *j) {
    room *w = j->room;
    const int32_t C = j->head_dim, least_n = j->n[0], most_n = j->n[j->n_row - 1];
    const int32_t all = j->n_row * j->n_head;
    if (least_n < most_n && !are_finite(j->kv, C, least_n, most_n)) {
        /* a weight of zero does not hide what a later row sees here: each alone */
        for (int32_t i = 0; i < j->n_row; i++) {
            cpu_attn_job one = *j;
            one.part += i, one.q += i, one.n += i;
            one.n_row = 1, one.first = true;
            cpu_attn_rows_amx(&one);
        }
        pack_queries(w, j);
        return;
    }
    if (j->first) pack_queries(w, j);
    if (all <= TILE_ROWS && C == 128) /* which all published models have */
        attend_few(w, j, most_n, 128);
    else if (all <= TILE_ROWS)
        attend_few(w, j, most_n, C);
    else if (C == 128)
        attend_many(w, j, most_n, 128);
    else
        attend_many(w, j, most_n, C);
}

void cpu_attn_bf16_amx(float *part, const float *q, int32_t n_head, int32_t head_dim, float scale,
                       const cpu_kv_block *kv, int32_t n) {
    room w;
    cpu_attn_rows_amx(&(cpu_attn_job){.part = &part,
                                      .q = &q,
                                      .n = &n,
                                      .n_row = 1,
                                      .n_head = n_head,
                                      .head_dim = head_dim,
                                      .scale = scale,
                                      .kv = kv,
                                      .room = &w,
                                      .first = true});
}
