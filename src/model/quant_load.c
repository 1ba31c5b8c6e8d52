/* Quantizing while loading. See weights.h; the numbers are quant_weights'.
 *
 *   jobs, in table order    |q k v|o|gate up|down|...        a group: whole tensors, about GROUP_BYTES of bf16
 *   each group              read in -> quantize, chunks of outputs to whichever worker is free -> let its pages go
 *   block                   [tiles q][scales q][tiles k]...  each piece at a multiple of 64
 *
 * so that beside the block only a group's bf16 pages are ours at a time. */
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "base/pool.h"
#include "model/quant.h"
#include "model/weights.h"

enum { GROUP_BYTES = 64 << 20, CHUNK_OUT = ERN_F8_BLOCK, HUGE_BYTES = 2 << 20, WORKERS_MAX = 512 };

typedef struct work {
    const quant_job *job;
    const ern_linear *source; /* [n_job] the bf16 windows */
    int32_t n_job;
    atomic_int next;   /* the first chunk that nobody has */
    atomic_int broken; /* 1 + a job whose weights are not finite */
} work;

static uint64_t whole64(uint64_t bytes) { return (bytes + 63) / 64 * 64; }
static int32_t chunks(const ern_linear *w) { return (w->n_out + CHUNK_OUT - 1) / CHUNK_OUT; }
static uint64_t bf16_bytes(const ern_linear *w) { return (uint64_t)w->n_out * (uint64_t)w->n_in * sizeof(ern_bf16); }

/* ---- the block ----------------------------------------------------------------------------------------------------
 */

static uint64_t tiled_bytes(const ern_linear *w, ern_dtype t) {
    return quant_tile_bytes(t, w->n_out, w->n_in) + whole64(quant_scale_bytes(t, w->n_out, w->n_in));
}

static ern_status block_take(struct ern_model_files *f, uint64_t bytes, const ern_model_options *o, ern_err *err) {
    const size_t want = (size_t)(bytes + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES, all = want + HUGE_BYTES;
    const uint64_t there = o->plan_only ? UINT64_MAX : ern_memory_available_bytes();
    const int how = MAP_PRIVATE | MAP_ANONYMOUS | (o->plan_only ? MAP_NORESERVE : 0);
    void *raw =
        bytes > there ? MAP_FAILED : mmap(NULL, all, o->plan_only ? PROT_NONE : PROT_READ | PROT_WRITE, how, -1, 0);
    if (raw == MAP_FAILED)
        return ERN_FAIL(err, ERN_ERR_MEMORY,
                        "quantizing %.200s while loading takes %llu bytes (%.2f GiB) and %.2f GiB are available; "
                        "quantize it once with ernest quantize, whose result is mapped",
                        o->dir, (unsigned long long)bytes, (double)bytes / (1 << 30), (double)there / (1 << 30));
    unsigned char *first = raw, *at = (unsigned char *)(((uintptr_t)raw + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES);
    if (at > first) (void)munmap(first, (size_t)(at - first));
    (void)munmap(at + want, (size_t)(first + all - (at + want)));
    if (!o->plan_only) (void)madvise(at, want, MADV_HUGEPAGE);
    f->block = at;
    f->block_bytes = want;
    return ERN_OK;
}

void quant_load_free(struct ern_model_files *f) {
    if (f->block) (void)munmap(f->block, f->block_bytes);
    free(f->job);
    f->block = NULL;
    f->job = NULL;
    f->n_job = 0;
}

/* Give every job its place in the block; source[] keeps where it came from. */
static ern_status place_all(ern_model *m, ern_linear *source, const ern_model_options *o, ern_err *err) {
    struct ern_model_files *f = m->files;
    uint64_t bytes = 0;
    for (int32_t i = 0; i < f->n_job; i++) bytes += tiled_bytes(f->job[i].to, ern_quant_dtype(f->job[i].as));
    ERN_TRY(block_take(f, bytes, o, err));
    unsigned char *at = f->block;
    for (int32_t i = 0; i < f->n_job; i++) {
        const quant_job *j = &f->job[i];
        const ern_dtype t = ern_quant_dtype(j->as);
        source[i] = *j->to;
        *j->to = (ern_linear){.data = at,
                              .dtype = t,
                              .order = ERN_ORDER_TILED,
                              .n_out = source[i].n_out,
                              .n_in = source[i].n_in,
                              .scale = at + quant_tile_bytes(t, source[i].n_out, source[i].n_in)};
        at += tiled_bytes(&source[i], t);
        if (!j->stays && !j->from->released) m->weight_bytes -= j->from->info->bytes;
        j->from->released = !j->stays;
        m->weight_bytes += ern_linear_bytes(j->to);
    }
    ERN_ASSERT(at <= (unsigned char *)f->block + f->block_bytes);
    m->owned_bytes = bytes;
    return ERN_OK;
}

/* ---- the work -----------------------------------------------------------------------------------------------------
 */

static void quantize_chunk(work *w, int32_t i, int32_t from) {
    const ern_linear *to = w->job[i].to;
    const int32_t end = to->n_out - from < CHUNK_OUT ? to->n_out : from + CHUNK_OUT;
    if (quant_weights((void *)(uintptr_t)to->data, (void *)(uintptr_t)to->scale, to->dtype, &w->source[i], from, end))
        return;
    int none = 0;
    atomic_compare_exchange_strong(&w->broken, &none, i + 1);
}

static void work_run(void *ud, int worker, int n_worker) {
    work *w = ud;
    (void)worker, (void)n_worker;
    int32_t i = 0, before = 0; /* chunks before job i */
    for (int32_t mine = atomic_fetch_add(&w->next, 1); i < w->n_job; mine = atomic_fetch_add(&w->next, 1)) {
        while (i < w->n_job && mine - before >= chunks(&w->source[i])) before += chunks(&w->source[i++]);
        if (i < w->n_job) quantize_chunk(w, i, (mine - before) * CHUNK_OUT);
    }
}

/* Jobs first.. that are done together: at least one tensor, and tensors whole. */
static int32_t group_end(const struct ern_model_files *f, const ern_linear *source, int32_t first) {
    uint64_t bytes = 0;
    int32_t end = first;
    while (end < f->n_job && (bytes < GROUP_BYTES || f->job[end].from == f->job[end - 1].from))
        bytes += bf16_bytes(&source[end++]);
    return end;
}

static ern_status group_run(const struct ern_model_files *f, const ern_linear *source, int32_t first, int32_t end,
                            ern_pool *pool, void **scratch, ern_err *err) {
    work w = {.job = f->job + first, .source = source + first, .n_job = end - first};
    for (int32_t i = first; i < end; i++) {
        const ckpt_tensor *t = f->job[i].from;
        if (i > first && t == f->job[i - 1].from) continue;
        ERN_TRY(st_file_touch(t->file, t->info->from, t->info->bytes, scratch, NULL, NULL, err));
    }
    if (end < f->n_job) st_file_want(f->job[end].from->file, f->job[end].from->info->from, GROUP_BYTES);
    ern_pool_run(pool, work_run, &w);
    const int broken = atomic_load(&w.broken);
    if (broken) {
        const ckpt_tensor *t = w.job[broken - 1].from;
        return ERN_FAIL(err, ERN_ERR_FILE, "%s: tensor %s: expected finite weights to quantize, found NaN or infinity",
                        t->file->path, t->info->name);
    }
    for (int32_t i = first; i < end; i++) {
        const ckpt_tensor *t = f->job[i].from;
        if (t->released) st_file_release(t->file, t->info->from, t->info->bytes);
    }
    return ERN_OK;
}

static ern_status run_all(const struct ern_model_files *f, const ern_linear *source, ern_pool *pool,
                          const ern_model_options *o, ern_err *err) {
    uint64_t done = 0, all = 0;
    void *scratch = NULL;
    ern_status s = ERN_OK;
    for (int32_t i = 0; i < f->n_job; i++) all += bf16_bytes(&source[i]);
    for (int32_t first = 0, end; first < f->n_job && s == ERN_OK; first = end) {
        end = group_end(f, source, first);
        s = group_run(f, source, first, end, pool, &scratch, err);
        for (int32_t i = first; i < end; i++) done += bf16_bytes(&source[i]);
        if (s == ERN_OK && o->progress && !o->progress(o->ud, "quantizing", done, all))
            s = ERN_FAIL(err, ERN_ERR_CANCELLED, "loading %.300s was stopped", o->dir);
    }
    free(scratch);
    return s;
}

ern_status quant_load(ern_model *m, const ern_model_options *o, ern_err *err) {
    const struct ern_model_files *f = m->files;
    if (f->n_job == 0) return ERN_OK;
    ern_linear *source = malloc((size_t)f->n_job * sizeof *source);
    if (!source) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory to list what is to be quantized");
    ern_status s = place_all(m, source, o, err);
    if (s == ERN_OK && !o->plan_only) {
        const int n = ern_cpu_count();
        ern_pool *pool = NULL;
        s = ern_pool_open(&pool, n < WORKERS_MAX ? n : WORKERS_MAX, false, err);
        if (s == ERN_OK) s = run_all(f, source, pool, o, err);
        ern_pool_close(pool);
    }
    free(source);
    return s;
}
