/* Keys and values fetched beside the arithmetic of the block before theirs, for attn_*.c. Included by nothing else.
 *
 * The fetches walk through memory evenly, a few lines beside each step of a kernel, and in the order of its addresses,
 * a whole block ahead of the loads. So the processor's own prefetchers see one stream and run ahead of it, and the
 * loads, whose order is another one (keys, then values), find everything in the second cache. Where memory is what a
 * kernel of vectors waits for, bursts of 16 lines, and one line of two, cost what a fetch should spare (docs/speed.md);
 * AMX takes 16 lines at a time, one row beside every tile, many rows, which compute for long beside a block, beside
 * every fourth step. Into the first cache, which holds a quarter of a block, they cost Zen 4 a third of its speed. */
#ifndef ERN_BACKEND_CPU_ATTN_EARLY_H
#define ERN_BACKEND_CPU_ATTN_EARLY_H

#include <immintrin.h>

#include "backend/cpu/cpu_kernels.h"
#include "backend/cpu/vec.h"

enum { EARLY_RANGES = 64, EARLY_LINE = 64 };

typedef struct early {
    const unsigned char *p, *end; /* what is left of the range at hand; p >= end: nothing of all */
    int32_t i, n;                 /* the range after it, ranges in all */
    struct {
        const unsigned char *p, *end;
    } range[EARLY_RANGES];
} early;

CPU_INLINE void early_turn(early *e) {
    if (e->p < e->end || e->i == e->n) return;
    e->p = e->range[e->i].p;
    e->end = e->range[e->i++].end;
}

/* The next lines. */
CPU_INLINE void early_fetch(early *e, const int lines) {
    if (e->p >= e->end) return;
    CPU_UNROLL for (int i = 0; i < lines; i++) _mm_prefetch((const char *)e->p + EARLY_LINE * i, _MM_HINT_T1);
    e->p += EARLY_LINE * lines;
    early_turn(e);
}

static inline void early_end(early *e) {
    while (e->p < e->end) early_fetch(e, 1);
}

static inline void early_add(early *e, const void *at, int32_t bytes) {
    const unsigned char *p = at;
    if (e->n > 0 && e->range[e->n - 1].end == p)
        e->range[e->n - 1].end = p + bytes;
    else if (e->n < EARLY_RANGES)
        e->range[e->n].p = p, e->range[e->n++].end = p + bytes;
}

/* Groups i..to-1 of b: their keys, if those are wanted, and their values, with scales where there are any. */
static inline void early_add_groups(early *e, const cpu_kv_block *b, int32_t i, int32_t to, int32_t bytes, bool keys) {
    const cpu_kv_group *g = b->group;
    const int32_t scales = CPU_KV_GROUP * (int32_t)sizeof(float);
    for (int32_t k = i; k < to && keys; k++) early_add(e, g[k].k, bytes);
    for (int32_t k = i; k < to && keys && g[k].k_scale; k++) early_add(e, g[k].k_scale, scales);
    for (int32_t k = i; k < to; k++) early_add(e, g[k].v, bytes);
    for (int32_t k = i; k < to && g[k].v_scale; k++) early_add(e, g[k].v_scale, scales);
}

/* A group has `bytes` of keys, and of values. First the values of a block that nobody fetched, then the next block,
 * page by page. */
static inline void early_begin(early *e, const cpu_kv_block *kv, int32_t bytes) {
    const cpu_kv_block *next = kv->next;
    e->p = e->end = NULL;
    e->i = e->n = 0;
    if (kv->cold) early_add_groups(e, kv, 0, kv->n_group, bytes, false);
    for (int32_t i = 0, j; next && i < next->n_group; i = j) {
        for (j = i + 1; j < next->n_group && next->group[j].k == next->group[j - 1].k + bytes;) j++;
        early_add_groups(e, next, i, j, bytes, true);
    }
    early_turn(e);
}

#endif
