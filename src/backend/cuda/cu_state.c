/* Sizes, checks, the layout of scratch and pinned memory, and errors of the cuda backend. See cu_state.h. */
#include "backend/cuda/cu_state.h"

#include <stdio.h>
#include <string.h>

enum {
    CUT = 512,              /* what a piece of a block is aligned to: groups of packed weights ask for it */
    PIECE = 64,             /* the same inside a step's arrays */
    LANE_BYTES = 4 << 20,   /* most of a page that is moved at once */
    ATTN_BYTES = 512 << 20, /* most for partial results of attention */
    AUX_WORDS = 8 << 20,    /* beyond one row's, most words of a step's rules; more takes turns */
};
/* Of the cache: attention counts its places, of 64 bytes, in 32 bits. */
#define REACH_BYTES ((size_t)INT32_MAX * 64)

/* ---- errors ------------------------------------------------------------------------------------------------------ */

/* What the user can do, as a clause. */
static const char *mends(cudaError_t e) {
    switch (e) {
    case cudaErrorMemoryAllocation:
        return "lower the KV pages, the batched tokens or the share of the GPU's memory that is used";
    case cudaErrorECCUncorrectable:
    case cudaErrorHardwareStackError:
    case cudaErrorDevicesUnavailable:
    case cudaErrorNoDevice:
    case cudaErrorSystemNotReady:
    case cudaErrorUnknown: return "the GPU is lost to this process; look at nvidia-smi and start again";
    case cudaErrorInsufficientDriver:
    case cudaErrorNoKernelImageForDevice:
        return "update the NVIDIA driver, or use another GPU (compute capability 8.0 or more)";
    default: return "this is a mistake in ernest; please report it with this line, and start again";
    }
}

ern_status cu_fail(cudaError_t e, const char *where, ern_err *err) {
    const ern_code code = e == cudaErrorMemoryAllocation ? ERN_ERR_MEMORY : ERN_ERR_DEVICE;
    return ERN_FAIL(err, code, "the GPU reported %s (%s) at %.160s: %s", cudaGetErrorName(e), cudaGetErrorString(e),
                    where, mends(e));
}

void cu_note(cu_backend *b, cudaError_t e, const char *where) {
    int none = cudaSuccess;
    if (e == cudaSuccess || !atomic_compare_exchange_strong(&b->error, &none, (int)e)) return;
    atomic_store(&b->error_where, where);
}

/* ---- checks ------------------------------------------------------------------------------------------------------ */

static ern_status linear_check(const ern_linear *w, const ern_linear *like, const char *name, int32_t layer,
                               ern_err *err) {
    if (!w->data) return ERN_OK;
    if (w->dtype == ERN_DTYPE_F32)
        return ERN_FAIL(err, ERN_ERR_UNSUPPORTED,
                        "%s of layer %d is stored as f32, which the cuda backend does not multiply with; store it as "
                        "bf16",
                        name, layer);
    if (w->dtype == like->dtype) return ERN_OK;
    return ERN_FAIL(err, ERN_ERR_UNSUPPORTED,
                    "%s of layer %d is stored as %s beside %s, which the cuda backend cannot mix", name, layer,
                    ern_dtype_name(w->dtype), ern_dtype_name(like->dtype));
}

static ern_status ffn_check(const ern_ffn *f, const ern_ffn *like, const char *name, int32_t layer, ern_err *err) {
    ERN_TRY(linear_check(&f->gate, &like->gate, name, layer, err));
    ERN_TRY(linear_check(&f->up, &like->gate, name, layer, err));
    return linear_check(&f->down, &like->down, name, layer, err);
}

static ern_status layer_check(const ern_model *m, const ern_layer *w, int32_t layer, ern_err *err) {
    ERN_TRY(linear_check(&w->q, &w->q, "q_proj", layer, err));
    ERN_TRY(linear_check(&w->k, &w->q, "k_proj", layer, err));
    ERN_TRY(linear_check(&w->v, &w->q, "v_proj", layer, err));
    ERN_TRY(linear_check(&w->o, &w->o, "o_proj", layer, err));
    if (!w->is_moe) return ffn_check(&w->ffn, &w->ffn, "the feed-forward", layer, err);
    for (int32_t e = 0; e < m->config.n_expert; e++)
        ERN_TRY(ffn_check(&w->expert[e], &w->expert[0], "an expert", layer, err));
    return ffn_check(&w->shared, &w->shared, "the shared expert", layer, err);
}

static ern_status weights_check(const ern_model *m, bool mtp, ern_err *err) {
    const int32_t L = m->config.n_layer;
    for (int32_t l = 0; l < L; l++) ERN_TRY(layer_check(m, &m->layer[l], l, err));
    ERN_TRY(linear_check(&m->head, &m->head, "lm_head", L, err));
    if (!mtp) return ERN_OK;
    ERN_TRY(linear_check(&m->mtp.proj, &m->mtp.proj, "mtp_linear_proj", L, err));
    return layer_check(m, &m->mtp.layer, L, err);
}

static ern_status shape_check(const ern_config *c, const ern_backend_options *o, ern_err *err) {
    if (o->kv_dtype == ERN_KV_F32)
        return ERN_FAIL(err, ERN_ERR_UNSUPPORTED,
                        "the cuda backend keeps its KV cache in bf16, int8 or fp8; f32 is the ref backend's");
    if (c->n_head_dim != 16 && c->n_head_dim != 64 && c->n_head_dim != 128)
        return ERN_FAIL(err, ERN_ERR_UNSUPPORTED,
                        "the cuda backend has attention for head sizes 16, 64 and 128; this model has %d",
                        c->n_head_dim);
    if (c->n_head / c->n_kv_head > CU_ATTEND_ROWS)
        return ERN_FAIL(err, ERN_ERR_UNSUPPORTED,
                        "the cuda backend has attention for at most %d query heads to a KV head; this model has %d",
                        (int)CU_ATTEND_ROWS, c->n_head / c->n_kv_head);
    const int64_t P = o->n_page_cell, n_page = (o->n_len_max + P - 1) / P;
    if ((n_page + CU_KEYS) * P * P >= INT32_MAX) /* cu_attend divides places by P in 32 bits */
        return ERN_FAIL(err, ERN_ERR_UNSUPPORTED,
                        "the cuda backend cannot address %d tokens in pages of %d; lower --block-size", o->n_len_max,
                        o->n_page_cell);
    if (c->n_expert > CU_EXPERTS_MAX || (c->n_expert > 0 && c->n_expert_used > CU_USED_MAX))
        return ERN_FAIL(err, ERN_ERR_UNSUPPORTED,
                        "the cuda backend routes to at most %d of %d experts; this model has %d of %d",
                        (int)CU_USED_MAX, (int)CU_EXPERTS_MAX, c->n_expert_used, c->n_expert);
    return ERN_OK;
}

/* ---- derived numbers --------------------------------------------------------------------------------------------- */

static cu_cache cache_of(const ern_config *c, const ern_backend_options *o, int32_t n_kv_layer) {
    const int64_t cells = (o->n_page_cell + 15) / 16 * 16, codes = ern_kv_has_codes(o->kv_dtype);
    cu_cache k = {.n_page_cell = o->n_page_cell,
                  .n_kv_head = c->n_kv_head,
                  .n_head = c->n_head,
                  .n_head_dim = c->n_head_dim,
                  .dtype = o->kv_dtype};
    k.plane_bytes = cells * c->n_head_dim * (codes ? 1 : 2) + (codes ? cells * (int64_t)sizeof(float) : 0);
    k.page_bytes = n_kv_layer * 2 * c->n_kv_head * k.plane_bytes;
    return k;
}

/* What a linear of this type would have its rows be. */
static cu_codes codes_for(ern_dtype t) {
    return t == ERN_DTYPE_F8E4M3 ? CU_CODES_F8 : t == ERN_DTYPE_I8 || t == ERN_DTYPE_I4 ? CU_CODES_I8 : CU_CODES_NONE;
}

cu_format cu_format_of(const cu_backend *b, const ern_linear *w) {
    /* Not the head, which the sampler reads. */
    const bool a8 = b->codes != CU_CODES_NONE && codes_for(w->dtype) == b->codes && w != &b->model->head;
    switch (w->dtype) {
    case ERN_DTYPE_I8: return a8 ? CU_I8A8 : CU_I8;
    case ERN_DTYPE_I4: return a8 ? CU_I4A8 : CU_I4;
    case ERN_DTYPE_F8E4M3: return a8 ? CU_F8A8 : CU_F8;
    case ERN_DTYPE_BF16:
    case ERN_DTYPE_F32: break; /* F32 was refused before */
    }
    return CU_BF16;
}

/* The kernel of all layers, where the model fits it; without memory. */
static cu_chain chain_of(const cu_backend *b) {
    const ern_model *m = b->model;
    const ern_backend_options *o = &b->o;
    const ern_config *c = &m->config;
    const cu_chain none = {0};
    cu_chain k = {.n_layer = c->n_layer,
                  .n_hidden = c->n_hidden,
                  .n_ffn = c->n_ffn,
                  .n_head = c->n_head,
                  .n_kv_head = c->n_kv_head,
                  .n_head_dim = c->n_head_dim,
                  .format = cu_format_of(b, &m->layer[0].q),
                  .kv_dtype = o->kv_dtype,
                  .eps = c->rms_eps,
                  .n_row_max = o->n_seq_max < CU_CHAIN_ROWS ? o->n_seq_max : CU_CHAIN_ROWS,
                  .n_len_max = o->n_len_max};
    for (int32_t i = 0; i < c->n_layer; i++) {
        const ern_layer *w = &m->layer[i];
        if (w->is_moe) return none;
        const ern_dtype t = m->layer[0].q.dtype;
        if (w->q.dtype != t || w->o.dtype != t || w->ffn.gate.dtype != t || w->ffn.down.dtype != t) return none;
    }
    return cu_chain_fits(&k) ? k : none;
}

/* The kernel of the attention half of a layer, where the model's rows of 8 bits and shape fit it; without memory. */
static cu_attn_one attn_one_of(const cu_backend *b) {
    const ern_backend_options *o = &b->o;
    const ern_config *c = &b->model->config;
    const cu_attn_one none = {0}, k = {.n_hidden = c->n_hidden,
                                       .n_head = c->n_head,
                                       .n_kv_head = c->n_kv_head,
                                       .n_head_dim = c->n_head_dim,
                                       .kv_dtype = o->kv_dtype,
                                       .n_row_max = o->n_seq_max < CU_ATTN_ONE_ROWS ? o->n_seq_max : CU_ATTN_ONE_ROWS,
                                       .n_len_max = o->n_len_max};
    return b->codes != CU_CODES_NONE && cu_attn_one_fits(&k) ? k : none;
}

/* Words of aux for one row that asks for everything. */
static int64_t row_aux_words(const ern_config *c, const ern_backend_options *o) {
    static const int32_t some_id = 0;
    static const uint32_t some_mask = 0;
    static const ern_bias some_bias = {0, 0};
    const ern_sample all = {.temperature = 1,
                            .top_p = 1,
                            .repetition = 2,
                            .frequency = 1,
                            .presence = 1,
                            .seen = &some_id,
                            .n_seen = o->n_len_max,
                            .n_prompt = o->n_len_max,
                            .bias = &some_bias,
                            .n_bias = c->n_vocab,
                            .ban = &some_id,
                            .n_ban = c->n_vocab,
                            .mask = &some_mask,
                            .forced = -1,
                            .n_top = ERN_TOP_MAX};
    return cu_sample_aux_words(&all, c->n_vocab);
}

/* Most inputs of any linear. */
static int64_t widest(const ern_config *c, bool mtp) {
    const int64_t in[] = {mtp ? 2 * (int64_t)c->n_hidden : c->n_hidden, (int64_t)c->n_head * c->n_head_dim, c->n_ffn,
                          c->n_expert_ffn, (int64_t)c->n_shared_expert * c->n_expert_ffn};
    int64_t most = 0;
    for (size_t i = 0; i < sizeof in / sizeof *in; i++)
        if (in[i] > most) most = in[i];
    return most;
}

/* The one kind of codes that all quantized linears of the layers want, of a model with experts; NONE: they want none,
 * or not the same, or one has too many inputs. Dense models have the kernel of all layers, which takes bf16. */
static cu_codes codes_of(const ern_model *m, bool mtp) {
    const ern_config *c = &m->config;
    cu_codes all = CU_CODES_NONE;
    if (c->n_expert == 0 || widest(c, mtp) > CU_A8_INPUTS) return CU_CODES_NONE;
    for (int32_t i = 0; i < c->n_layer; i++) {
        const ern_layer *w = &m->layer[i];
        const ern_ffn *ffn = w->is_moe ? &w->shared : &w->ffn;
        const bool dense = ffn->gate.data != NULL;
        const ern_dtype t[] = {w->q.dtype,
                               w->o.dtype,
                               dense ? ffn->gate.dtype : w->q.dtype,
                               dense ? ffn->down.dtype : w->q.dtype,
                               w->is_moe ? w->expert[0].gate.dtype : w->q.dtype,
                               w->is_moe ? w->expert[0].down.dtype : w->q.dtype};
        for (size_t k = 0; k < sizeof t / sizeof *t; k++) {
            const cu_codes one = codes_for(t[k]);
            if (one == CU_CODES_NONE) continue;
            if (all != CU_CODES_NONE && all != one) return CU_CODES_NONE;
            all = one;
        }
    }
    return all;
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

ern_status cu_state_init(cu_backend *b, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    const ern_config *c = &m->config;
    ERN_ASSERT(o->n_page > 0 && o->n_page_cell > 0 && o->n_row_max > 0 && o->n_seq_max > 0 && o->n_want_max > 0 &&
               o->n_want_max <= o->n_row_max && o->n_len_max > 0);
    ERN_ASSERT(((int64_t)o->n_page + 1) * o->n_page_cell <= INT32_MAX);
    b->model = m;
    b->o = *o;
    if (o->mtp && !m->has_mtp)
        return ERN_FAIL(err, ERN_ERR_USAGE, "%s has no MTP layer; start without speculative method mtp", m->dir);
    ERN_TRY(shape_check(c, o, err));
    ERN_TRY(weights_check(m, o->mtp, err));
    b->codes = o->act_exact || CU_PORTABLE ? CU_CODES_NONE : codes_of(m, o->mtp);
    b->n_page_max = (o->n_len_max + o->n_page_cell - 1) / o->n_page_cell;
    b->n_kv_layer = c->n_layer + (o->mtp ? 1 : 0);
    b->n_ffn_row = (int32_t)smaller(o->n_row_max, CU_FFN_ROWS);
    b->n_logit_row = (int32_t)smaller(o->n_want_max, CU_LOGIT_ROWS);
    b->cache = cache_of(c, o, b->n_kv_layer);
    b->kv_bytes = (size_t)(o->n_page + 1) * (size_t)b->cache.page_bytes;
    if (b->kv_bytes >= REACH_BYTES)
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "the KV cache would be %zu MiB, and the attention kernels reach %zu; lower "
                        "--gpu-memory-utilization or --num-gpu-blocks-override",
                        b->kv_bytes >> 20, (size_t)REACH_BYTES >> 20);
    b->lane_bytes = (size_t)smaller(b->cache.page_bytes, LANE_BYTES);
    const int64_t each = (int64_t)o->n_len_max + c->n_vocab / 32 + 1024;
    b->n_aux = (int32_t)(row_aux_words(c, o) + smaller(each * o->n_seq_max, AUX_WORDS));
    b->attn_bytes = (size_t)cu_attn_scratch_bytes(&b->cache, o->n_row_max, o->n_seq_max, o->n_len_max, ATTN_BYTES);
    b->chain = chain_of(b);
    b->attn_one = attn_one_of(b);
    return ERN_OK;
}

/* ---- layout ------------------------------------------------------------------------------------------------------ */

static void *take(cu_cut *c, size_t n, size_t each_bytes, size_t align) {
    const size_t at = c->used;
    c->used += (n * each_bytes + align - 1) / align * align;
    return c->base ? c->base + at : NULL;
}

void *cu_cut_take(cu_cut *c, size_t n, size_t each_bytes) { return take(c, n, each_bytes, CUT); }

cu_input cu_input_at(const cu_backend *b, unsigned char *base, int32_t n_row, int32_t n_seq, int32_t n_want) {
    const size_t T = (size_t)n_row, S = (size_t)n_seq, W = (size_t)n_want, id = sizeof(int32_t);
    cu_cut c = {base, 0};
    cu_input in;
    in.token = take(&c, T, id, PIECE);
    in.next = take(&c, b->o.mtp ? T : 0, id, PIECE);
    in.pos = take(&c, T, id, PIECE);
    in.cell = take(&c, T, id, PIECE);
    in.row0 = take(&c, S + 1, id, PIECE);
    in.kv_len = take(&c, S, id, PIECE);
    in.want = take(&c, W, id, PIECE);
    in.end0 = take(&c, S + 1, id, PIECE);
    in.end_pos = take(&c, W, id, PIECE);
    in.page_at = c.used;
    in.page = take(&c, S * (size_t)b->n_page_max, id, PIECE);
    in.rule_at = c.used;
    in.rule = take(&c, W, sizeof *in.rule, PIECE);
    in.aux_at = c.used;
    in.aux = take(&c, 0, id, PIECE);
    return in;
}

static size_t input_bytes(const cu_backend *b) {
    const cu_input in = cu_input_at(b, NULL, b->o.n_row_max, b->o.n_seq_max, b->o.n_want_max);
    return in.aux_at + (size_t)b->n_aux * sizeof *in.aux;
}

/* Work lists for every number of rows up to n_row. */
static int64_t tiles_max(int32_t n_row, int32_t K, int32_t E) {
    int64_t most = 0;
    for (int32_t n = 1; n <= n_row; n++) most = larger(most, cu_tiles_max(n, K, E));
    return most;
}

static void routes_layout(cu_backend *b, cu_cut *c) {
    const ern_config *m = &b->model->config;
    const size_t R = (size_t)b->n_ffn_row, E = (size_t)m->n_expert, K = (size_t)m->n_expert_used, id = sizeof(int32_t);
    const size_t tiles = (size_t)tiles_max(b->n_ffn_row, m->n_expert_used, m->n_expert);
    cu_routes *r = &b->routes;
    r->n_expert = m->n_expert;
    r->n_used = m->n_expert_used;
    r->chosen = cu_cut_take(c, R * K, id);
    r->share = cu_cut_take(c, R * K, sizeof(float));
    r->first = cu_cut_take(c, E + 1, id);
    r->place_entry = cu_cut_take(c, R * K, id);
    r->entry_place = cu_cut_take(c, R * K, id);
    r->tile_expert = cu_cut_take(c, tiles, id);
    r->tile_place = cu_cut_take(c, tiles, id);
    r->n_tile = cu_cut_take(c, 1, id);
    r->logit = cu_cut_take(c, R * E, sizeof(float));
    r->scratch = cu_cut_take(c, 2 * E + 2, id);
    r->told = cu_cut_take(c, K, id);
    const size_t shared_f = (size_t)m->n_shared_expert * (size_t)m->n_expert_ffn, D = (size_t)m->n_hidden;
    b->expert_hid = cu_cut_take(c, R * K * CU_PAD((size_t)m->n_expert_ffn), sizeof(cu_bf16));
    b->expert_y = cu_cut_take(c, R * K * CU_PAD(D), sizeof(float));
    b->shared_hid = cu_cut_take(c, R * CU_PAD(shared_f), sizeof(cu_bf16));
    b->shared_y = cu_cut_take(c, R * D, sizeof(float));
    b->few_count = cu_cut_take(c, CU_FEW_COUNTS, id);
}

/* Room for n rows of at most `width` inputs as codes of 8 bits. */
static cu_rows8 rows8_layout(cu_cut *c, size_t n, size_t width) {
    const size_t n_seg = CU_PAD(width) / CU_SEGMENT;
    cu_rows8 r;
    r.code = cu_cut_take(c, n * n_seg, CU_SEGMENT);
    r.scale = cu_cut_take(c, (n + 3) / 4 * 4 * n_seg, sizeof(float));
    return r;
}

static size_t larger_size(size_t a, size_t b) { return a > b ? a : b; }

static void codes_layout(cu_backend *b, cu_cut *c) {
    const ern_config *m = &b->model->config;
    const size_t T = (size_t)b->o.n_row_max, R = (size_t)b->n_ffn_row, D = (size_t)m->n_hidden;
    const size_t F = (size_t)m->n_expert_ffn, shared_f = (size_t)m->n_shared_expert * F;
    const size_t Q = (size_t)m->n_head * (size_t)m->n_head_dim, in = b->o.mtp ? 2 * D : D;
    b->row8 = rows8_layout(c, T, larger_size(in, Q));
    /* K rows of F or one of the dense layer's or the shared experts' width, whichever is more */
    const size_t wide = larger_size(CU_PAD((size_t)m->n_ffn), CU_PAD(shared_f));
    b->hid8 = rows8_layout(c, (R + 3) / 4 * 4, larger_size(wide, (size_t)m->n_expert_used * CU_PAD(F)));
    b->shared8 = rows8_layout(c, R < CU_SIDE_ROWS ? R : CU_SIDE_ROWS, CU_PAD(shared_f));
}

static void scratch_layout(cu_backend *b) {
    const ern_config *m = &b->model->config;
    const size_t T = (size_t)b->o.n_row_max, W = (size_t)b->o.n_want_max, R = (size_t)b->n_ffn_row,
                 I = (size_t)b->n_logit_row, D = (size_t)m->n_hidden, C = (size_t)m->n_head_dim,
                 Q = (size_t)m->n_head * C, KV = (size_t)m->n_kv_head * C, f = sizeof(float), id = sizeof(int32_t);
    cu_cut cut = {b->scratch, 0}, *c = &cut;
    b->x = cu_cut_take(c, T * D, f);
    b->xn = cu_cut_take(c, T * CU_PAD(D), sizeof(cu_bf16));
    b->qkv = cu_cut_take(c, T * (size_t)larger((int64_t)(Q + 2 * KV), (int64_t)D), f);
    b->q = cu_cut_take(c, T * Q, sizeof(cu_bf16));
    b->att = cu_cut_take(c, T * CU_PAD(Q), sizeof(cu_bf16));
    b->inv_freq = cu_cut_take(c, C / 2, f);
    b->attn = cu_cut_take(c, b->attn_bytes, 1);
    b->hid = cu_cut_take(c, R * CU_PAD((size_t)m->n_ffn), sizeof(cu_bf16));
    if (m->n_expert > 0) routes_layout(b, c);
    if (b->codes != CU_CODES_NONE) codes_layout(b, c);
    b->chain.memory = cu_cut_take(c, b->chain.n_row_max > 0 ? (size_t)cu_chain_bytes(&b->chain) : 0, 1);
    b->attn_one.memory = cu_cut_take(c, b->attn_one.n_row_max > 0 ? (size_t)cu_attn_one_bytes(&b->attn_one) : 0, 1);
    b->logits = cu_cut_take(c, I * (size_t)m->n_vocab, f);
    b->sampler = cu_cut_take(c, (size_t)cu_sample_scratch_bytes(b->n_logit_row, m->n_vocab), 1);
    b->ids = cu_cut_take(c, W, id);
    b->mtp_in = cu_cut_take(c, b->o.mtp ? T * CU_PAD(2 * D) : 0, sizeof(cu_bf16));
    b->mtp_next = cu_cut_take(c, b->o.mtp ? T : 0, id);
    for (int i = 0; i < CU_SLOTS; i++) {
        b->slot[i].input = cu_cut_take(c, input_bytes(b), 1);
        b->slot[i].attn_work =
            cu_cut_take(c, (size_t)cu_attn_work_count(&b->cache, b->o.n_row_max, b->o.n_seq_max), id);
        b->slot[i].end_work =
            cu_cut_take(c, (size_t)cu_attn_work_count(&b->cache, b->o.n_want_max, b->o.n_seq_max), id);
    }
    b->scratch_bytes = cut.used;
}

void cu_layout(cu_backend *b) {
    const size_t W = (size_t)b->o.n_want_max;
    scratch_layout(b);
    cu_cut pinned = {b->pinned, 0};
    for (int i = 0; i < CU_SLOTS; i++) {
        b->slot[i].block = cu_cut_take(&pinned, input_bytes(b), 1);
        b->slot[i].sampled = cu_cut_take(&pinned, W, sizeof(ern_sampled));
        b->slot[i].draft = cu_cut_take(&pinned, b->o.mtp ? W : 0, sizeof(int32_t));
    }
    b->sampled = cu_cut_take(&pinned, W, sizeof *b->sampled);
    b->draft = cu_cut_take(&pinned, b->o.mtp ? W : 0, sizeof *b->draft);
    for (int i = 0; i < CU_LANES; i++) b->lane[i].bounce = cu_cut_take(&pinned, b->lane_bytes, 1);
    b->pinned_bytes = pinned.used;
}
