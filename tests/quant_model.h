/* For tests and benchmarks: turns the bf16 linears of an opened model into tiles of a plan, as a quantized checkpoint
 * would have them. The model keeps pointing into this struct's memory: free it after whatever uses the model, before
 * the model is closed. */
#ifndef ERN_TESTS_QUANT_MODEL_H
#define ERN_TESTS_QUANT_MODEL_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/os.h"
#include "base/pool.h"
#include "model/quant.h"

enum { QUANT_BLOCKS_MAX = 1 << 12 };
#define QUANT_BLOCK_BYTES ((uint64_t)32 << 20)

typedef struct quant_model {
    ern_model *model;
    const ern_layer *was_layer;
    ern_linear was_head;
    ern_layer *layer; /* the model's now */
    ern_pool *pool;
    void *block[QUANT_BLOCKS_MAX];
    uint64_t block_bytes[QUANT_BLOCKS_MAX];
    int n_block;
    uint64_t used; /* of the last block */
} quant_model;

/* From blocks in huge pages, where the machine gives them: as a backend reads a checkpoint's tiles. */
static inline void *quant_model_take(quant_model *q, uint64_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (q->n_block == 0 || q->used + bytes > q->block_bytes[q->n_block - 1]) {
        const uint64_t huge = (uint64_t)2 << 20, all = bytes > QUANT_BLOCK_BYTES ? bytes : QUANT_BLOCK_BYTES;
        void *p = q->n_block < QUANT_BLOCKS_MAX ? mmap(NULL, (all + huge - 1) / huge * huge, PROT_READ | PROT_WRITE,
                                                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                                                : MAP_FAILED;
        if (p == MAP_FAILED) abort();
        (void)madvise(p, all, MADV_HUGEPAGE);
        q->block_bytes[q->n_block] = (all + huge - 1) / huge * huge;
        q->block[q->n_block++] = p;
        q->used = 0;
    }
    void *at = (unsigned char *)q->block[q->n_block - 1] + q->used;
    q->used += bytes;
    return at;
}

/* From now on a file backs the tiles, at the same addresses, as if they had been mapped from a checkpoint. */
static inline void quant_model_to_file(quant_model *q) {
    for (int i = 0; i < q->n_block; i++) {
        FILE *f = tmpfile();
        if (!f || fwrite(q->block[i], 1, q->block_bytes[i], f) != q->block_bytes[i] || fflush(f) != 0) abort();
        if (mmap(q->block[i], q->block_bytes[i], PROT_READ, MAP_PRIVATE | MAP_FIXED, fileno(f), 0) == MAP_FAILED)
            abort();
        fclose(f);
    }
}

typedef struct quant_model_work {
    const ern_linear *from;
    ern_linear *to;
    void *tile, *scale;
} quant_model_work;

static inline void quant_model_part(void *ud, int worker, int n_worker) {
    const quant_model_work *w = ud;
    int64_t from, to;
    ern_pool_share(w->from->n_out, ERN_F8_BLOCK, worker, n_worker, &from, &to);
    if (from < to && !quant_weights(w->tile, w->scale, w->to->dtype, w->from, (int32_t)from, (int32_t)to)) abort();
}

static inline void quant_model_linear(quant_model *q, ern_linear *w, ern_quant how) {
    if (how == ERN_QUANT_NONE || !w->data) return;
    const ern_linear from = *w;
    const ern_dtype t = how == ERN_QUANT_WINT8   ? ERN_DTYPE_I8
                        : how == ERN_QUANT_WINT4 ? ERN_DTYPE_I4
                                                 : ERN_DTYPE_F8E4M3;
    void *tile = quant_model_take(q, quant_tile_bytes(t, w->n_out, w->n_in));
    void *scale = quant_model_take(q, quant_scale_bytes(t, w->n_out, w->n_in));
    *w = (ern_linear){
        .data = tile, .dtype = t, .order = ERN_ORDER_TILED, .n_out = from.n_out, .n_in = from.n_in, .scale = scale};
    quant_model_work work = {&from, w, tile, scale};
    ern_pool_run(q->pool, quant_model_part, &work);
}

static inline void quant_model_ffn(quant_model *q, ern_ffn *f, ern_quant how) {
    quant_model_linear(q, &f->gate, how);
    quant_model_linear(q, &f->up, how);
    quant_model_linear(q, &f->down, how);
}

/* NULL of memory aborts: a test without its model has nothing to say. */
static inline quant_model *quant_model_make(ern_model *m, ern_quant_plan plan) {
    quant_model *q = calloc(1, sizeof *q);
    ern_err err;
    if (!q || ern_pool_open(&q->pool, ern_cpu_count(), false, &err) != ERN_OK) abort();
    const size_t L = (size_t)m->config.n_layer, E = (size_t)m->config.n_expert;
    q->model = m;
    q->was_layer = m->layer;
    q->was_head = m->head;
    q->layer = quant_model_take(q, L * sizeof *q->layer);
    memcpy(q->layer, m->layer, L * sizeof *q->layer);
    for (size_t i = 0; i < L; i++) {
        ern_layer *l = &q->layer[i];
        quant_model_linear(q, &l->q, plan.dense);
        quant_model_linear(q, &l->k, plan.dense);
        quant_model_linear(q, &l->v, plan.dense);
        quant_model_linear(q, &l->o, plan.dense);
        quant_model_ffn(q, &l->ffn, plan.dense);
        quant_model_ffn(q, &l->shared, plan.dense);
        if (!l->is_moe) continue;
        ern_ffn *expert = quant_model_take(q, E * sizeof *expert);
        memcpy(expert, l->expert, E * sizeof *expert);
        for (size_t e = 0; e < E; e++) quant_model_ffn(q, &expert[e], plan.expert);
        l->expert = expert;
    }
    quant_model_linear(q, &m->head, plan.head);
    m->layer = q->layer;
    m->quant = plan;
    return q;
}

static inline void quant_model_free(quant_model *q) {
    if (!q) return;
    q->model->layer = q->was_layer;
    q->model->head = q->was_head;
    q->model->quant = (ern_quant_plan){ERN_QUANT_NONE, ERN_QUANT_NONE, ERN_QUANT_NONE};
    for (int i = 0; i < q->n_block; i++) munmap(q->block[i], q->block_bytes[i]);
    ern_pool_close(q->pool);
    free(q);
}

#endif
