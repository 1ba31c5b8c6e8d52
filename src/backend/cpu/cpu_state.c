/* Sizes, checks and the scratch layout of the cpu backend. See cpu_state.h. */
#include "backend/cpu/cpu_state.h"

#include <string.h>

/* One linear can be run; what it wants of act and mid is noted. */
static ern_status linear_check(cpu_backend *b, const ern_linear *w, const char *name, int32_t layer, ern_err *err) {
    if (!w->data) return ERN_OK;
    if (!cpu_linear_of(b->kernels, w, b->o.act_exact))
        return ERN_FAIL(err, ERN_ERR_UNSUPPORTED, "the cpu backend has no kernel for %s of layer %d, stored as %s",
                        name, layer, ern_dtype_name(w->dtype));
    const cpu_act_kind kind = cpu_act_for(b, w);
    static const size_t size[] = {[CPU_ACT_F32] = 0, [CPU_ACT_BF16] = 2, [CPU_ACT_INT8] = 1, [CPU_ACT_FP8] = 4};
    const size_t each = size[kind];
    if (b->act_each < each) b->act_each = each;
    return ERN_OK;
}

/* Linears that read the same rows take them the same way. */
static ern_status same_check(cpu_backend *b, const ern_linear *a, const ern_linear *w, const char *name, int32_t layer,
                             ern_err *err) {
    ERN_TRY(linear_check(b, w, name, layer, err));
    if (cpu_act_for(b, a) == cpu_act_for(b, w)) return ERN_OK;
    return ERN_FAIL(err, ERN_ERR_UNSUPPORTED,
                    "%s of layer %d is stored as %s beside %s, which the cpu backend cannot mix", name, layer,
                    ern_dtype_name(w->dtype), ern_dtype_name(a->dtype));
}

static ern_status ffn_check(cpu_backend *b, const ern_ffn *f, const char *name, int32_t layer, ern_err *err) {
    ERN_TRY(linear_check(b, &f->gate, name, layer, err));
    ERN_TRY(same_check(b, &f->gate, &f->up, name, layer, err));
    return linear_check(b, &f->down, name, layer, err);
}

static ern_status layer_check(cpu_backend *b, const ern_layer *w, int32_t layer, ern_err *err) {
    ERN_TRY(linear_check(b, &w->q, "q_proj", layer, err));
    ERN_TRY(same_check(b, &w->q, &w->k, "k_proj", layer, err));
    ERN_TRY(same_check(b, &w->q, &w->v, "v_proj", layer, err));
    ERN_TRY(linear_check(b, &w->o, "o_proj", layer, err));
    if (!w->is_moe) return ffn_check(b, &w->ffn, "the feed-forward", layer, err);
    for (int32_t e = 0; e < b->model->config.n_expert; e++) {
        ERN_TRY(ffn_check(b, &w->expert[e], "an expert", layer, err));
        ERN_TRY(same_check(b, &w->expert[0].gate, &w->expert[e].gate, "an expert", layer, err));
        ERN_TRY(same_check(b, &w->expert[0].down, &w->expert[e].down, "an expert", layer, err));
    }
    b->gathers |= cpu_act_for(b, &w->expert[0].gate) == CPU_ACT_INT8;
    return ffn_check(b, &w->shared, "the shared expert", layer, err);
}

static ern_status model_check(cpu_backend *b, ern_err *err) {
    const ern_model *m = b->model;
    const ern_config *c = &m->config;
    for (int32_t l = 0; l < c->n_layer; l++) ERN_TRY(layer_check(b, &m->layer[l], l, err));
    ERN_TRY(linear_check(b, &m->head, "lm_head", c->n_layer, err));
    if (!b->o.mtp) return ERN_OK;
    ERN_TRY(linear_check(b, &m->mtp.proj, "mtp_linear_proj", c->n_layer, err));
    return layer_check(b, &m->mtp.layer, c->n_layer, err);
}

ern_status cpu_state_init(cpu_backend *b, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    const ern_config *c = &m->config;
    const ern_cpu_level here = ern_cpu_level_here();
    ERN_ASSERT(o->n_page > 0 && o->n_page_cell > 0 && o->n_row_max > 0 && o->n_seq_max > 0 && o->n_want_max > 0 &&
               o->n_want_max <= o->n_row_max && o->n_len_max > 0);
    if (o->kv_dtype == ERN_KV_F32)
        return ERN_FAIL(err, ERN_ERR_UNSUPPORTED,
                        "the cpu backend keeps its KV cache in bf16 or int8; f32 is the ref backend's");
    if (o->kv_dtype == ERN_KV_F8)
        return ERN_FAIL(err, ERN_ERR_UNSUPPORTED,
                        "the cpu backend keeps its KV cache in bf16 or int8; fp8 is for a GPU: give "
                        "--kv-cache-dtype int8 or bf16");
    if (o->kv_dtype == ERN_KV_I8 && c->n_head_dim > ERN_KV_CODE_HEAD_MAX)
        return ERN_FAIL(err, ERN_ERR_UNSUPPORTED,
                        "an int8 KV cache needs a head size of at most %d; this model has %d, so leave it in bf16",
                        ERN_KV_CODE_HEAD_MAX, c->n_head_dim);
    if (o->level > (int32_t)here)
        return ERN_FAIL(err, ERN_ERR_USAGE, "the cpu level %s was asked for, but this processor (%s) reaches %s",
                        ern_cpu_level_name((ern_cpu_level)o->level), ern_cpu_name(), ern_cpu_level_name(here));
    if (o->n_thread < 0 || o->n_thread > 512)
        return ERN_FAIL(err, ERN_ERR_USAGE, "%d threads were asked for; 1 to 512 are possible, 0 means all processors",
                        o->n_thread);
    if (o->mtp && !m->has_mtp)
        return ERN_FAIL(err, ERN_ERR_USAGE, "the MTP layer was asked for, but %s holds no MTP weights", m->dir);
    if (o->n_page_cell % CPU_KV_GROUP != 0)
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--block-size is %d; the cpu backend needs a multiple of %d, and 64 is usual", o->n_page_cell,
                        CPU_KV_GROUP);
    if (c->n_head_dim > CPU_HEAD_DIM_MAX)
        return ERN_FAIL(err, ERN_ERR_UNSUPPORTED, "the cpu backend handles a head size up to %d; this model has %d",
                        CPU_HEAD_DIM_MAX, c->n_head_dim);
    b->model = m;
    b->o = *o;
    b->kernels = cpu_kernels_for(o->level < 0 ? here : (ern_cpu_level)o->level);
    ERN_TRY(model_check(b, err));
    b->n_worker = o->n_thread ? o->n_thread : ern_cpu_count();
    if (b->n_worker > 512) b->n_worker = 512;
    b->n_page_max = (o->n_len_max + o->n_page_cell - 1) / o->n_page_cell;
    b->n_kv_layer = c->n_layer + (o->mtp ? 1 : 0);
    b->plane_bytes = cpu_kv_plane_bytes(o->n_page_cell, c->n_head_dim, o->kv_dtype == ERN_KV_I8);
    b->page_bytes = (int64_t)b->n_kv_layer * 2 * c->n_kv_head * b->plane_bytes;
    b->kv_bytes = ((size_t)o->n_page + CPU_KV_SHELF - 1) / CPU_KV_SHELF * CPU_KV_SHELF * (size_t)b->page_bytes;
    b->part_floats = cpu_part_floats(c->n_head_dim);
    b->n_slot = cpu_attend_slots(b);
    b->sampler_bytes = (ern_sample_scratch_bytes(c->n_vocab) + 63) / 64 * 64;
    return ERN_OK;
}

/* The cutter: hands out 64-byte aligned pieces of base, or only counts. */
typedef struct cutter {
    unsigned char *base;
    size_t used;
} cutter;

static void *cut(cutter *c, size_t n, size_t each_bytes) {
    size_t at = c->used;
    c->used += (n * each_bytes + 63) / 64 * 64;
    return c->base ? c->base + at : NULL;
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

/* Room for rows of up to n_in inputs. */
static cpu_act cut_act(const cpu_backend *b, cutter *c, size_t n_row, size_t n_in) {
    const size_t groups = b->act_each ? (size_t)cpu_groups((int32_t)n_in) : 0;
    cpu_act a;
    a.q = cut(c, n_row * (size_t)cpu_act_stride((int32_t)n_in), b->act_each);
    a.scale = cut(c, n_row * groups, sizeof *a.scale);
    a.sum = cut(c, n_row * groups, sizeof *a.sum);
    return a;
}

static void slot_layout(cpu_backend *b, cpu_slot *s, cutter *c) {
    const size_t T = (size_t)b->o.n_row_max, S = (size_t)b->o.n_seq_max, W = (size_t)b->o.n_want_max;
    s->token = cut(c, T, sizeof *s->token);
    s->next = cut(c, T, sizeof *s->next);
    s->pos = cut(c, T, sizeof *s->pos);
    s->cell = cut(c, T, sizeof *s->cell);
    s->row0 = cut(c, S + 1, sizeof *s->row0);
    s->kv_len = cut(c, S, sizeof *s->kv_len);
    s->page = cut(c, S * (size_t)b->n_page_max, sizeof *s->page);
    s->want = cut(c, W, sizeof *s->want);
    s->sample = cut(c, W, sizeof *s->sample);
    s->pair = cut(c, CPU_PAIRS_MAX, sizeof *s->pair);
    s->sampled = cut(c, W, sizeof *s->sampled);
    s->draft = cut(c, W, sizeof *s->draft);
}

size_t cpu_layout(cpu_backend *b, unsigned char *base) {
    const ern_config *m = &b->model->config;
    const size_t T = (size_t)b->o.n_row_max, W = (size_t)b->o.n_want_max, D = (size_t)m->n_hidden;
    const size_t R = (size_t)cpu_ffn_rows(b), I = W < CPU_LOGIT_ROWS ? W : CPU_LOGIT_ROWS;
    const size_t C = (size_t)m->n_head_dim, E = (size_t)m->n_expert, K = E ? (size_t)m->n_expert_used : 0;
    const size_t expert_f = E ? (size_t)m->n_expert_ffn : 0, n = (size_t)b->n_worker;
    const size_t wide = larger((size_t)m->n_ffn, larger(K, (size_t)m->n_shared_expert) * expert_f);
    const size_t widest_x = larger(b->o.mtp ? 2 * D : D, (size_t)m->n_head * C);
    cutter c = {base, 0};
    b->x = cut(&c, T * D, sizeof(float));
    b->xn = cut(&c, T * D, sizeof(float));
    b->q = cut(&c, T * (size_t)m->n_head * C, sizeof(float));
    b->k = cut(&c, T * (size_t)m->n_kv_head * C, sizeof(float));
    b->v = cut(&c, T * (size_t)m->n_kv_head * C, sizeof(float));
    b->inv_freq = cut(&c, C / 2, sizeof(float));
    b->rope = cut(&c, T * C, sizeof(float));
    b->gate = cut(&c, R * wide, sizeof(float));
    b->up = cut(&c, R * wide, sizeof(float));
    b->near = cut(&c, n * 2 * R * ERN_ACT_GROUP, sizeof(float));
    b->prob = cut(&c, R * E, sizeof(float));
    b->chosen = cut(&c, R * K, sizeof(int32_t));
    b->share = cut(&c, R * K, sizeof(float));
    b->entry_row = cut(&c, R * K, sizeof(int32_t));
    b->entry_share = cut(&c, R * K, sizeof(float));
    b->entry_first = cut(&c, E + 1, sizeof(int32_t));
    b->active = cut(&c, E, sizeof(int32_t));
    b->mtp_in = cut(&c, b->o.mtp ? T * 2 * D : 0, sizeof(float));
    b->mtp_next = cut(&c, b->o.mtp ? T : 0, sizeof(int32_t));
    b->head_in = cut(&c, I * D, sizeof(float));
    b->logits = cut(&c, I * (size_t)m->n_vocab, sizeof(float));
    b->want_seq = cut(&c, W, sizeof(int32_t));
    b->want_pos = cut(&c, W, sizeof(int32_t));
    b->want_row0 = cut(&c, (size_t)b->o.n_seq_max + 1, sizeof(int32_t));
    b->tile = cut(&c, T + (size_t)b->n_slot, sizeof(cpu_tile));
    b->split = cut(&c, T, sizeof(cpu_tile));
    b->own_part = cut(&c, n * (2 * (size_t)cpu_attend_rows(b) + 1) * (size_t)b->part_floats, sizeof(float));
    b->room = cut(&c, b->kernels->attn_rows ? n * cpu_attn_room() : 0, 1);
    b->part = cut(&c, (size_t)b->n_slot * (size_t)cpu_head_tiles(m) * (size_t)b->part_floats, sizeof(float));
    b->act = cut_act(b, &c, T, widest_x);
    b->own = cut_act(b, &c, b->gathers ? n * R : 0, D);
    b->mid =
        cut_act(b, &c, R * larger(K, 1), larger((size_t)m->n_ffn, larger(1, (size_t)m->n_shared_expert) * expert_f));
    for (int i = 0; i < 2; i++) b->left[i] = cut(&c, n, sizeof(cpu_left));
    b->sampler = cut(&c, n * b->sampler_bytes, 1);
    for (int i = 0; i < CPU_SLOTS; i++) slot_layout(b, &b->slot[i], &c);
    b->pair = cut(&c, CPU_PAIRS_MAX, sizeof(ern_page_pair));
    return c.used;
}
