/* The verbs of the door: memory, the three result slots, KV pages in and out. Steps are computed inside submit. */
#include "backend/ref/ref.h"

#include <stdlib.h>
#include <string.h>

#include "backend/ref/ref_state.h"
#include "base/os.h"
#include "model/quant.h"

static ref *of(ern_backend *base) { return (ref *)(void *)base; }

/* Zeroed memory for the step, or only its size while planning. */
static void *take(ref *b, int64_t n, size_t each_bytes) {
    b->scratch_bytes += (uint64_t)n * each_bytes;
    if (b->plan_only) return NULL;
    void *memory = ern_arena_take_n(&b->arena, (size_t)n, each_bytes);
    b->is_exhausted |= !memory;
    return memory;
}

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

static void take_scratch(ref *b) {
    const ern_config *c = &b->m->config;
    int64_t T = b->o.n_row_max, D = c->n_hidden, Q = (int64_t)c->n_head * c->n_head_dim, C = c->n_head_dim;
    int64_t KV = (int64_t)c->n_kv_head * C, E = c->n_expert, W = b->o.n_want_max;
    int64_t F = largest(c->n_ffn, largest(1, c->n_shared_expert) * (int64_t)c->n_expert_ffn);
    size_t f = sizeof(float);
    for (int i = 0; i < REF_SLOTS; i++) {
        b->slot[i].sampled = take(b, W, sizeof *b->slot[i].sampled);
        b->slot[i].draft = b->o.mtp ? take(b, W, sizeof *b->slot[i].draft) : NULL;
    }
    b->token = take(b, T, sizeof *b->token);
    b->x = take(b, T * D, f);
    b->h = take(b, T * D * (b->o.mtp ? 2 : 1), f);
    b->y = take(b, T * D, f);
    b->q = take(b, T * Q, f);
    b->k = take(b, T * KV, f);
    b->v = take(b, T * KV, f);
    b->att = take(b, T * Q, f);
    b->gate = take(b, T * F, f);
    b->up = take(b, T * F, f);
    b->rope = take(b, T * C, f);
    b->routed = take(b, D, f);
    if (E > 0) {
        b->router = take(b, T * E, f);
        b->prob = take(b, E, f);
        b->chosen = take(b, c->n_expert_used, sizeof *b->chosen);
    }
    b->logits = take(b, c->n_vocab, f);
    int64_t widest = largest(largest(2 * D, Q), F);
    b->weight_row = take(b, widest, sizeof *b->weight_row);
    if (ern_quant_any(&b->m->quant) && !b->o.act_exact) {
        b->act_code = take(b, T * widest, f);
        b->act_row = take(b, widest, 1);
        b->act_scale = take(b, T * ((widest + ERN_ACT_GROUP - 1) / ERN_ACT_GROUP), f);
    }
    b->score = take(b, b->o.n_len_max, sizeof *b->score);
    b->kv_row = take(b, 2 * C, sizeof *b->kv_row);
    b->sample_scratch = take(b, (int64_t)ern_sample_scratch_bytes(c->n_vocab), 1);
}

/* Everything that does not take memory. */
static ern_status prepare(ref *b, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    ERN_ASSERT(o->n_page > 0 && o->n_page_cell > 0 && o->n_row_max > 0 && o->n_seq_max > 0 && o->n_want_max > 0);
    ERN_ASSERT(o->n_len_max > 0 && (int64_t)o->n_page * o->n_page_cell <= INT32_MAX);
    if (o->mtp && !m->has_mtp)
        return ERN_FAIL(err, ERN_ERR_USAGE, "%s has no MTP layer; start without speculative method mtp", m->dir);
    memset(b, 0, sizeof *b);
    b->base.ops = &ref_backend_ops;
    b->m = m;
    b->o = *o;
    b->n_kv_layer = m->config.n_layer + (o->mtp ? 1 : 0);
    if (ern_kv_has_codes(o->kv_dtype) && m->config.n_head_dim > ERN_KV_CODE_HEAD_MAX)
        return ERN_FAIL(
            err, ERN_ERR_UNSUPPORTED,
            "an int8 or fp8 KV cache needs a head size of at most %d; this model has %d, so leave it in bf16",
            ERN_KV_CODE_HEAD_MAX, m->config.n_head_dim);
    static const size_t each[] = {
        [ERN_KV_BF16] = sizeof(ern_bf16), [ERN_KV_F32] = sizeof(float), [ERN_KV_I8] = 1, [ERN_KV_F8] = 1};
    b->plane_bytes = ref_plane_cells(b) * ((size_t)m->config.n_head_dim * each[o->kv_dtype] +
                                           (ern_kv_has_codes(o->kv_dtype) ? sizeof(float) : 0));
    b->page_bytes = (size_t)b->n_kv_layer * 2 * (size_t)m->config.n_kv_head * b->plane_bytes;
    return ERN_OK;
}

static ern_status ref_plan(ern_backend_plan *out, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    ref b;
    ERN_TRY(prepare(&b, m, o, err));
    b.plan_only = true;
    take_scratch(&b);
    *out = (ern_backend_plan){
        .weight_bytes = 0, .page_bytes = b.page_bytes, .scratch_bytes = b.scratch_bytes, .kernels = "scalar"};
    return ERN_OK;
}

static void ref_close(ern_backend *base) {
    if (!base) return;
    ern_arena_close(&of(base)->arena);
    free(base);
}

static ern_status ref_open(ern_backend **out, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    *out = NULL;
    ern_backend_plan plan;
    ERN_TRY(ref_plan(&plan, m, o, err));
    ref *b = malloc(sizeof *b);
    if (!b) return ERN_FAIL(err, ERN_ERR_MEMORY, "out of memory opening the ref backend");
    ern_status status = prepare(b, m, o, err);
    if (status != ERN_OK) {
        free(b);
        return status;
    }
    uint64_t kv_bytes = plan.page_bytes * (uint64_t)o->n_page, all = kv_bytes + plan.scratch_bytes;
    uint64_t free_bytes = ern_memory_available_bytes();
    ern_arena_open(&b->arena, 0);
    if (all <= free_bytes) {
        b->kv = ern_arena_take_n(&b->arena, (size_t)o->n_page, b->page_bytes);
        take_scratch(b);
    }
    if (!b->kv || b->is_exhausted) {
        ref_close(&b->base);
        return ERN_FAIL(err, ERN_ERR_MEMORY,
                        "the ref backend needs %llu MiB and %llu MiB are free; lower the KV pages or the batch",
                        (unsigned long long)(all >> 20), (unsigned long long)(free_bytes >> 20));
    }
    *out = &b->base;
    return ERN_OK;
}

static void ref_submit(ern_backend *base, const ern_batch *in) {
    ref *b = of(base);
    ERN_ASSERT(b->n_submit - b->n_wait < REF_SLOTS - 1);
    ERN_ASSERT(in->n_row <= b->o.n_row_max && in->n_seq <= b->o.n_seq_max && in->n_want <= b->o.n_want_max);
    for (int32_t t = 0; t < in->n_row; t++)
        ERN_ASSERT(in->cell[t] >= 0 && in->cell[t] < b->o.n_page * b->o.n_page_cell && in->pos[t] < b->o.n_len_max);
    const ref_slot *prev = b->n_submit ? &b->slot[(b->n_submit - 1) % REF_SLOTS] : NULL;
    ref_slot *out = &b->slot[b->n_submit % REF_SLOTS];
    int64_t begin_us = ern_now_us();
    out->n_want = in->n_want;
    ref_forward(b, in, prev, out);
    out->compute_us = ern_now_us() - begin_us;
    b->n_submit++;
}

static ern_status ref_wait(ern_backend *base, ern_result *out, ern_err *err) {
    ref *b = of(base);
    (void)err; /* nothing can fail: the step was computed in submit */
    ERN_ASSERT(b->n_wait < b->n_submit);
    const ref_slot *s = &b->slot[b->n_wait++ % REF_SLOTS];
    *out = (ern_result){.n_want = s->n_want, .sampled = s->sampled, .draft = s->draft, .compute_us = s->compute_us};
    return ERN_OK;
}

static unsigned char *page_at(const ref *b, int32_t page) {
    ERN_ASSERT(page >= 0 && page < b->o.n_page);
    return b->kv + (size_t)page * b->page_bytes;
}

static void ref_kv_copy(ern_backend *base, const ern_page_pair *pair, int32_t n) {
    for (int32_t i = 0; i < n; i++)
        memmove(page_at(of(base), pair[i].to), page_at(of(base), pair[i].from), of(base)->page_bytes);
}

static bool ref_kv_read(ern_backend *base, const int32_t *page, int32_t n, void *host) {
    size_t bytes = of(base)->page_bytes;
    for (int32_t i = 0; i < n; i++)
        memcpy((unsigned char *)host + (size_t)i * bytes, page_at(of(base), page[i]), bytes);
    return true;
}

static void ref_kv_write(ern_backend *base, const int32_t *page, int32_t n, const void *host) {
    size_t bytes = of(base)->page_bytes;
    for (int32_t i = 0; i < n; i++)
        memcpy(page_at(of(base), page[i]), (const unsigned char *)host + (size_t)i * bytes, bytes);
}

static void ref_probe(ern_backend *base, ern_probe_fn *fn, void *ud) {
    of(base)->probe = fn;
    of(base)->probe_ud = ud;
}

const ern_backend_ops ref_backend_ops = {
    .name = "ref",
    .plan = ref_plan,
    .open = ref_open,
    .close = ref_close,
    .submit = ref_submit,
    .wait = ref_wait,
    .kv_copy = ref_kv_copy,
    .kv_read = ref_kv_read,
    .kv_write = ref_kv_write,
    .probe = ref_probe,
};
