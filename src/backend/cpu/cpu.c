/* The verbs of the door: memory, the driver thread, steps in and results out, KV pages. See cpu.h.
 *
 *   engine thread   submit(n)  submit(n+1)   wait -> n    submit(n+2)   wait -> n+1
 *   driver                |-- step n --||-- step n+1 --|          |-- step n+2 ...
 *
 * The driver is worker 0 of the pool. kv_copy is queued and done by the driver before the next step, so that a copy
 * never stops the overlap; kv_read and kv_write are plain copies on their caller's thread, beside the driver.
 *
 * One more thread gives the KV cache its memory between steps, somewhat ahead of the pages in use: else prompts would
 * wait for the system to find and clear it, 2 MiB at a time, in the middle of their steps. */
#include "backend/cpu/cpu_state.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    HUGE = 2 << 20,
    BUSY_US = 20000, /* between looks whether a step is running */
};

static cpu_backend *of(ern_backend *base) { return (cpu_backend *)(void *)base; }

/* ---- memory ------------------------------------------------------------------------------------------------------ */

static size_t huge_bytes(size_t bytes) { return (bytes + HUGE - 1) / HUGE * HUGE; }

/* Zeroed memory on a huge-page boundary, with huge pages where the machine gives them. */
static void *take(size_t bytes) {
    const size_t want = huge_bytes(bytes), all = want + HUGE;
    unsigned char *raw = mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) return NULL;
    unsigned char *at = (unsigned char *)(((uintptr_t)raw + HUGE - 1) / HUGE * HUGE);
    if (at > raw) munmap(raw, (size_t)(at - raw));
    munmap(at + want, (size_t)(raw + all - (at + want)));
    (void)madvise(at, want, MADV_HUGEPAGE);
    return at;
}

/* Where linears round what they take, the panels are those of the rounding ones: exact ones read rows. */
static int32_t panel_out(const cpu_backend *b) {
    return b->o.act_exact && b->kernels->linear_rounds ? 0 : b->kernels->panel_out;
}

static ern_status cpu_plan(ern_backend_plan *out, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    cpu_backend *b = calloc(1, sizeof *b);
    if (!b) return ERN_FAIL(err, ERN_ERR_MEMORY, "out of memory planning the cpu backend");
    ern_status status = cpu_state_init(b, m, o, err);
    if (status == ERN_OK && !cpu_weights_open(&b->weights, m, panel_out(b)))
        status = ERN_FAIL(err, ERN_ERR_MEMORY, "out of memory planning the cpu backend");
    if (status == ERN_OK)
        *out = (ern_backend_plan){.weight_bytes = huge_bytes(b->weights.bytes), /* the rest is read where it lies */
                                  .page_bytes = (uint64_t)b->page_bytes,
                                  .page_step = CPU_KV_SHELF,
                                  .scratch_bytes = huge_bytes(cpu_layout(b, NULL)),
                                  .kernels = b->kernels->name};
    cpu_weights_close(&b->weights);
    free(b);
    return status;
}

/* Memory for the KV cache, CPU_KV_AHEAD beyond what steps have used; what is in it stays. A cache of which a part is
 * used has memory for that part and no more than so much else. */
static void *populate_main(void *arg) {
    cpu_backend *b = arg;
    const size_t all = huge_bytes(b->kv_bytes);
    size_t at = 0;
    pthread_mutex_lock(&b->lock);
    while (!b->closing && at < all) {
        if (at >= b->kv_used + CPU_KV_AHEAD) {
            pthread_cond_wait(&b->used_more, &b->lock);
            continue;
        }
        const bool busy = b->n_computed < b->n_submitted;
        pthread_mutex_unlock(&b->lock);
        if (busy)
            usleep(BUSY_US);
        else if (madvise(b->kv + at, HUGE, MADV_POPULATE_WRITE) != 0) /* before Linux 5.14 steps find it */
            return NULL;
        else
            at += HUGE;
        pthread_mutex_lock(&b->lock);
    }
    pthread_mutex_unlock(&b->lock);
    return NULL;
}

/* ---- the driver -------------------------------------------------------------------------------------------------- */

static void *driver_main(void *arg) {
    cpu_backend *b = arg;
    ern_pool_enter(b->pool);
    pthread_mutex_lock(&b->lock);
    for (;;) {
        while (!b->closing && b->n_computed == b->n_submitted) pthread_cond_wait(&b->work, &b->lock);
        if (b->n_computed == b->n_submitted) break;
        const uint64_t n = b->n_computed;
        pthread_mutex_unlock(&b->lock);
        cpu_step(b, &b->slot[n % CPU_SLOTS], n ? &b->slot[(n - 1) % CPU_SLOTS] : NULL);
        pthread_mutex_lock(&b->lock);
        b->n_computed++;
        pthread_cond_broadcast(&b->done);
    }
    pthread_mutex_unlock(&b->lock);
    return NULL;
}

/* Wait until n steps have been computed. */
static void reach(cpu_backend *b, uint64_t n) {
    pthread_mutex_lock(&b->lock);
    while (b->n_computed < n) pthread_cond_wait(&b->done, &b->lock);
    pthread_mutex_unlock(&b->lock);
}

static void cpu_close(ern_backend *base) {
    if (!base) return;
    cpu_backend *b = of(base);
    pthread_mutex_lock(&b->lock);
    b->closing = true;
    pthread_cond_broadcast(&b->work);
    pthread_cond_broadcast(&b->used_more);
    pthread_mutex_unlock(&b->lock);
    if (b->has_driver) pthread_join(b->driver, NULL);
    if (b->has_populator) pthread_join(b->populator, NULL);
    ern_pool_close(b->pool);
    if (b->kv) munmap(b->kv, huge_bytes(b->kv_bytes));
    if (b->tiles) munmap(b->tiles, huge_bytes(b->weights.bytes));
    cpu_weights_close(&b->weights);
    if (b->scratch) munmap(b->scratch, huge_bytes(b->scratch_bytes));
    pthread_mutex_destroy(&b->lock);
    pthread_cond_destroy(&b->work);
    pthread_cond_destroy(&b->done);
    pthread_cond_destroy(&b->used_more);
    free(b);
}

/* Everything that takes memory or threads. */
static ern_status take_all(cpu_backend *b, ern_err *err) {
    b->scratch_bytes = cpu_layout(b, NULL);
    if (!cpu_weights_open(&b->weights, b->model, panel_out(b)))
        return ERN_FAIL(err, ERN_ERR_MEMORY, "out of memory opening the cpu backend");
    const uint64_t all = huge_bytes(b->kv_bytes) + huge_bytes(b->scratch_bytes) + huge_bytes(b->weights.bytes),
                   free_bytes = ern_memory_available_bytes();
    b->kv = all <= free_bytes ? take(b->kv_bytes) : NULL;
    b->scratch = b->kv ? take(b->scratch_bytes) : NULL;
    if (!b->scratch)
        return ERN_FAIL(err, ERN_ERR_MEMORY,
                        "the cpu backend needs %llu MiB (KV cache %llu, scratch %llu) and %llu MiB are free; lower the "
                        "KV pages or the batched tokens",
                        (unsigned long long)(all >> 20), (unsigned long long)(b->kv_bytes >> 20),
                        (unsigned long long)(b->scratch_bytes >> 20), (unsigned long long)(free_bytes >> 20));
    (void)cpu_layout(b, b->scratch);
    const ern_config *m = &b->model->config;
    for (int32_t j = 0; j < m->n_head_dim / 2; j++)
        b->inv_freq[j] = 1.0f / (float)pow(m->rope_theta, (double)((float)(2 * j) / (float)m->n_head_dim));
    ERN_TRY(ern_pool_open(&b->pool, b->n_worker, true, err));
    if (b->weights.bytes > 0 && !(b->tiles = take(b->weights.bytes)))
        return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for a copy of %zu MiB of weights", b->weights.bytes >> 20);
    if (b->tiles) cpu_weights_fill(&b->weights, b->model, b->tiles, b->pool);
    if (pthread_create(&b->driver, NULL, driver_main, b) != 0)
        return ERN_FAIL(err, ERN_ERR_MEMORY, "cannot start the cpu backend's thread; lower --threads");
    b->has_driver = true;
    b->has_populator = pthread_create(&b->populator, NULL, populate_main, b) == 0; /* without it steps find memory */
    return ERN_OK;
}

static ern_status cpu_open(ern_backend **out, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    *out = NULL;
    cpu_backend *b = calloc(1, sizeof *b);
    if (!b) return ERN_FAIL(err, ERN_ERR_MEMORY, "out of memory opening the cpu backend");
    b->ops = &cpu_backend_ops;
    pthread_mutex_init(&b->lock, NULL);
    pthread_cond_init(&b->work, NULL);
    pthread_cond_init(&b->done, NULL);
    pthread_cond_init(&b->used_more, NULL);
    ern_status status = cpu_state_init(b, m, o, err);
    if (status == ERN_OK) status = take_all(b, err);
    if (status != ERN_OK) {
        cpu_close((ern_backend *)(void *)b);
        return status;
    }
    *out = (ern_backend *)(void *)b;
    return ERN_OK;
}

/* ---- steps ------------------------------------------------------------------------------------------------------- */

static void copy_ints(int32_t *to, const int32_t *from, int32_t n) {
    if (n > 0) memcpy(to, from, (size_t)n * sizeof *to);
}

static void slot_fill(cpu_backend *b, cpu_slot *s, const ern_batch *in) {
    s->n_row = in->n_row;
    s->n_seq = in->n_seq;
    s->n_want = in->n_want;
    s->has_next = in->next != NULL;
    copy_ints(s->token, in->token, in->n_row);
    if (in->next) copy_ints(s->next, in->next, in->n_row);
    copy_ints(s->pos, in->pos, in->n_row);
    copy_ints(s->cell, in->cell, in->n_row);
    copy_ints(s->row0, in->row0, in->n_seq + 1);
    copy_ints(s->kv_len, in->kv_len, in->n_seq);
    copy_ints(s->want, in->want, in->n_want);
    if (in->n_want > 0) memcpy(s->sample, in->sample, (size_t)in->n_want * sizeof *s->sample);
    for (int64_t q = 0; q < in->n_seq; q++) {
        const int32_t n = (in->kv_len[q] + b->o.n_page_cell - 1) / b->o.n_page_cell;
        ERN_ASSERT(in->kv_len[q] <= b->o.n_len_max && n <= in->n_page_max);
        copy_ints(s->page + q * b->n_page_max, in->page + q * in->n_page_max, n);
    }
    for (int32_t t = 0; t < in->n_row; t++)
        ERN_ASSERT(in->cell[t] >= 0 && in->cell[t] / b->o.n_page_cell < b->o.n_page && in->pos[t] < b->o.n_len_max);
    s->n_pair = b->n_pair;
    if (b->n_pair > 0) memcpy(s->pair, b->pair, (size_t)b->n_pair * sizeof *s->pair);
    b->n_pair = 0;
}

/* Bytes of the KV cache up to the last page that the step writes to: pages are handed out lowest first. */
static size_t used_to(const cpu_backend *b, const ern_batch *in) {
    int32_t last = 0;
    for (int32_t t = 0; t < in->n_row; t++) last = in->cell[t] > last ? in->cell[t] : last;
    const int32_t shelf = last / b->o.n_page_cell / CPU_KV_SHELF;
    return (size_t)(shelf + 1) * CPU_KV_SHELF * (size_t)b->page_bytes;
}

static void cpu_submit(ern_backend *base, const ern_batch *in) {
    cpu_backend *b = of(base);
    ERN_ASSERT(b->n_submitted - b->n_waited < CPU_SLOTS - 1);
    ERN_ASSERT(in->n_row <= b->o.n_row_max && in->n_seq <= b->o.n_seq_max && in->n_want <= b->o.n_want_max);
    slot_fill(b, &b->slot[b->n_submitted % CPU_SLOTS], in);
    const size_t used = used_to(b, in);
    pthread_mutex_lock(&b->lock);
    b->n_submitted++;
    pthread_cond_signal(&b->work);
    if (used > b->kv_used) {
        b->kv_used = used;
        pthread_cond_signal(&b->used_more);
    }
    pthread_mutex_unlock(&b->lock);
}

static ern_status cpu_wait(ern_backend *base, ern_result *out, ern_err *err) {
    cpu_backend *b = of(base);
    (void)err; /* nothing outside can fail here */
    ERN_ASSERT(b->n_waited < b->n_submitted);
    const cpu_slot *s = &b->slot[b->n_waited % CPU_SLOTS];
    reach(b, ++b->n_waited);
    *out = (ern_result){
        .n_want = s->n_want, .sampled = s->sampled, .draft = b->o.mtp ? s->draft : NULL, .compute_us = s->compute_us};
    return ERN_OK;
}

/* ---- KV pages ---------------------------------------------------------------------------------------------------- */

static void check_page(const cpu_backend *b, int32_t page) { ERN_ASSERT(page >= 0 && page < b->o.n_page); }

/* All that was asked for before has happened. */
static void settle(cpu_backend *b) {
    reach(b, b->n_submitted);
    cpu_copy_pages(b, b->pair, b->n_pair);
    b->n_pair = 0;
}

static void cpu_kv_copy(ern_backend *base, const ern_page_pair *pair, int32_t n) {
    cpu_backend *b = of(base);
    for (int32_t i = 0; i < n; i++) {
        check_page(b, pair[i].to);
        check_page(b, pair[i].from);
        if (b->n_pair == CPU_PAIRS_MAX) settle(b);
        b->pair[b->n_pair++] = pair[i];
    }
}

static bool cpu_kv_read(ern_backend *base, const int32_t *page, int32_t n, void *host) {
    const cpu_backend *b = of(base);
    unsigned char *to = host;
    for (int32_t i = 0; i < n; i++) {
        check_page(b, page[i]);
        for (int32_t p = 0; p < cpu_kv_planes(b); p++, to += b->plane_bytes)
            memcpy(to, cpu_kv_plane(b, page[i], p), (size_t)b->plane_bytes);
    }
    return true;
}

static void cpu_kv_write(ern_backend *base, const int32_t *page, int32_t n, const void *host) {
    const cpu_backend *b = of(base);
    const unsigned char *from = host;
    for (int32_t i = 0; i < n; i++) {
        check_page(b, page[i]);
        for (int32_t p = 0; p < cpu_kv_planes(b); p++, from += b->plane_bytes)
            memcpy(cpu_kv_plane(b, page[i], p), from, (size_t)b->plane_bytes);
    }
}

static void cpu_probe(ern_backend *base, ern_probe_fn *fn, void *ud) {
    cpu_backend *b = of(base);
    reach(b, b->n_submitted);
    b->probe = fn;
    b->probe_ud = ud;
}

const ern_backend_ops cpu_backend_ops = {
    .name = "cpu",
    .plan = cpu_plan,
    .open = cpu_open,
    .close = cpu_close,
    .submit = cpu_submit,
    .wait = cpu_wait,
    .kv_copy = cpu_kv_copy,
    .kv_read = cpu_kv_read,
    .kv_write = cpu_kv_write,
    .probe = cpu_probe,
};
