/* The step: arrays in, beside the step before, then the layer loop of docs/model.md 3 to 6 as kernels on one stream.
 *
 * A step in which every sequence has one row and all are wanted is launched as a graph of the next larger size: its
 * kernels read fixed addresses, and what it has too many are padding rows (token 0 at position 0 of the spare page
 * behind the cache; all of them write the same numbers there). No bit of a row depends on whether it came by graph,
 * with padding, or kernel by kernel. With a probe set every step goes kernel by kernel, and waits at each stage. */
#include <string.h>

#include "backend/cuda/cu_state.h"
#include "base/half.h"

enum {
    EVERY_SIZE = 16,          /* graphs of each batch up to this, since a padding row may cost its own experts */
    SIZE_STEP = 8,            /* then of every so many */
    SIZE_STEP_MORE = 16,      /* and of every so many above 128 */
    NARROW_BYTES = 256 << 10, /* page tables larger than this are sent only as wide as they are used */
    WARM_ROWS = 1024,
    ONE_PASS_ROWS = 256, /* more rows than these: norm and codes in one pass; fewer are spread over more warps apart */
};

/* A step being queued. */
typedef struct run {
    cu_backend *b;
    cu_slot *slot;
    const ern_batch *in; /* NULL: padding rows alone */
    int32_t n_row, n_seq, n_want;
    bool decode;         /* few rows of every sequence: cu_attend's promise */
    bool wide;           /* many: cu_attend_codes' */
    bool chain;          /* one row of every sequence, and few: all layers in one kernel */
    bool attn_one;       /* the same: the attention half of a layer in one kernel */
    bool greedy;         /* all rules are plain arg-max */
    bool staged;         /* all rules are in the block; else they come pass by pass */
    int64_t n_word;      /* of aux, used */
    int32_t n_page_used; /* entries of the longest page table */
    cu_input host, dev;
    cu_seqs seqs;
    bool ends;        /* few rows are wanted, each the last of its sequence */
    cu_seqs end_seqs; /* these rows alone */
    float *x;         /* residual stream [n_x, D] */
    int32_t n_x;      /* rows of it: the step's, and from the last feed-forward on the wanted ones where they suffice */
    bool wanted_alone; /* they do: row w of x is wanted row w */
    bool normed;       /* the norm in front of the layer to come is made */
} run;

static bool failed(cu_backend *b) { return atomic_load_explicit(&b->error, memory_order_acquire) != cudaSuccess; }

/* ---- probe ------------------------------------------------------------------------------------------------------- */

/* Rows of f32 or bf16, ld numbers apart on the device. */
static void show_rows(const run *r, const char *stage, int32_t layer, int32_t row, const void *from, bool is_bf16,
                      int64_t ld, int32_t n_row, int32_t n_col) {
    cu_backend *b = r->b;
    if (!b->probe) return;
    const size_t each = is_bf16 ? sizeof(cu_bf16) : sizeof(float), n = (size_t)n_row * (size_t)n_col;
    void *to = is_bf16 ? b->show + n : b->show;
    CU_DO(b, cudaMemcpy2DAsync(to, (size_t)n_col * each, from, (size_t)ld * each, (size_t)n_col * each, (size_t)n_row,
                               cudaMemcpyDeviceToHost, b->stream));
    CU_DO(b, cudaStreamSynchronize(b->stream));
    if (failed(b)) return;
    const cu_bf16 *bits = to;
    for (size_t i = 0; is_bf16 && i < n; i++) b->show[i] = ern_bf16_to_f32(bits[i]);
    b->probe(b->probe_ud, stage, layer, row, b->show, n_row, n_col);
}

static void show(const run *r, const char *stage, int32_t layer, int32_t row, const float *from, int32_t n_row,
                 int32_t n_col) {
    show_rows(r, stage, layer, row, from, false, n_col, n_row, n_col);
}

static void show_bf16(const run *r, const char *stage, int32_t layer, int32_t row, const cu_bf16 *from, int32_t n_row,
                      int32_t n_col) {
    show_rows(r, stage, layer, row, from, true, CU_PAD(n_col), n_row, n_col);
}

/* q, k and v after rotation, which a probe has written back. */
static void show_qkv(const run *r, int32_t layer) {
    const ern_config *m = &r->b->model->config;
    const int32_t Q = m->n_head * m->n_head_dim, KV = m->n_kv_head * m->n_head_dim, ld = Q + 2 * KV;
    show_rows(r, "q", layer, 0, r->b->qkv, false, ld, r->n_row, Q);
    show_rows(r, "k", layer, 0, r->b->qkv + Q, false, ld, r->n_row, KV);
    show_rows(r, "v", layer, 0, r->b->qkv + Q + KV, false, ld, r->n_row, KV);
}

/* ---- linears ----------------------------------------------------------------------------------------------------- */

static cu_job job_of(const cu_linear *w, cu_epilogue e, const cu_bf16 *x, int32_t n_row) {
    return (cu_job){.w = *w, .epilogue = e, .x = x, .ldx = CU_PAD(w->n_in), .n_row = n_row};
}

static bool takes_codes(const cu_linear *w) { return cu_codes_of(w->format) != CU_CODES_NONE; }

static cu_x8 x8_in(const cu_rows8 *room, int32_t n_in, int32_t n_row) {
    return (cu_x8){
        .code = room->code, .ldx = CU_PAD(n_in), .scale = room->scale, .ld_scale = (int64_t)(n_row + 3) / 4 * 4};
}
/* Rows of x as codes. */
static cu_x8 to_codes(const run *r, cudaStream_t s, const cu_rows8 *room, const cu_bf16 *x, int32_t n_in,
                      int32_t n_row) {
    const cu_x8 to = x8_in(room, n_in, n_row);
    CU_DO(r->b, cu_quant_x8(s, &to, r->b->codes, x, CU_PAD(n_in), n_row, n_in));
    return to;
}
/* j's rows as codes, where it takes them and does not make them itself. */
static void rows_to_codes(const run *r, cudaStream_t s, cu_job *j, const cu_rows8 *room) {
    if (takes_codes(&j->w) && j->n_row > CU_SKINNY_MAX) j->x8 = to_codes(r, s, room, j->x, j->w.n_in, j->n_row);
}

/* y = W x, or y += W x. */
static void linear(const run *r, const cu_linear *w, cu_epilogue e, float *y, const cu_bf16 *x, int32_t n_row,
                   const cu_rows8 *room) {
    cu_job j = job_of(w, e, x, n_row);
    j.y = y;
    j.ldy = w->n_out;
    rows_to_codes(r, r->b->stream, &j, room);
    CU_DO(r->b, cu_linear_run(r->b->stream, &j));
}

/* What j takes is the norm of n rows of x, rows[i] or the first n: made into xn, or by the linear itself where the rows
 * are few and lie together. */
static void norm_into(const run *r, cu_job *j, const float *x, const int32_t *rows, const cu_bf16 *w, int32_t n) {
    cu_backend *b = r->b;
    const ern_config *m = &b->model->config;
    if (j && !rows && n <= CU_NORM_ROWS && n * m->n_hidden <= CU_NORM_NUMBERS) {
        j->x_f32 = x;
        j->norm_w = w;
        j->eps = m->rms_eps;
        if (!b->probe) return; /* who looks at stages wants xn too */
    }
    if (j && !rows && takes_codes(&j->w) && n > ONE_PASS_ROWS && cu_norm_holds(m->n_hidden)) {
        j->x8 = x8_in(&b->row8, m->n_hidden, n);
        const cu_norm_job norm = {
            .w = w, .eps = m->rms_eps, .xn = b->probe ? b->xn : NULL, .codes = b->codes, .x8 = j->x8};
        CU_DO(b, cu_norm_run(b->stream, &norm, x, n, m->n_hidden));
        return;
    }
    CU_DO(b, cu_norm(b->stream, b->xn, x, rows, w, n, m->n_hidden, m->rms_eps));
    if (j) rows_to_codes(r, b->stream, j, &b->row8);
}

/* ---- one layer --------------------------------------------------------------------------------------------------- */

/* x += down(silu(gate) * up), rows row0..row0+n-1. */
static void dense_ffn(const run *r, const cu_layer *w, int32_t layer, int32_t row0, int32_t n) {
    cu_backend *b = r->b;
    const int32_t D = b->model->config.n_hidden;
    float *x = r->x + (int64_t)row0 * D;
    cu_job up = job_of(&w->ffn.up, CU_SWIGLU, b->xn, n);
    up.h = b->hid;
    up.ldh = CU_PAD(w->ffn.up.n_out);
    norm_into(r, &up, x, NULL, w->ffn_norm, n);
    show_bf16(r, "ffn_norm", layer, row0, b->xn, n, D);
    CU_DO(b, cu_linear_run(b->stream, &up));
    linear(r, &w->ffn.down, CU_ADD, x, b->hid, n, &b->hid8);
}

static void run_experts(const run *r, const cu_layer *w, const cu_routes *routes, int32_t n, const cu_x8 *x8,
                        bool spread) {
    cu_backend *b = r->b;
    const cu_grouped_job up = {.shape = w->shape.up,
                               .experts = w->expert_up,
                               .routes = routes,
                               .n_row = n,
                               .gather = true,
                               .epilogue = CU_SWIGLU,
                               .x = b->xn,
                               .ldx = CU_PAD(w->shape.up.n_in),
                               .by_place = (cu_bf16 *)b->expert_y, /* free until down */
                               .spread = spread,
                               .x8 = *x8,
                               .x8_by_place = {.code = (uint8_t *)b->expert_y, .ldx = x8->ldx},
                               .h = b->expert_hid,
                               .ldh = CU_PAD(w->shape.up.n_out)};
    CU_DO(b, cu_grouped_run(b->stream, &up));
    cu_grouped_job down = {.shape = w->shape.down,
                           .experts = w->expert_down,
                           .routes = routes,
                           .n_row = n,
                           .behind_up = w->shape.up.format == w->shape.down.format,
                           .epilogue = CU_STORE,
                           .x = b->expert_hid,
                           .ldx = CU_PAD(w->shape.down.n_in),
                           .y = b->expert_y,
                           .ldy = w->shape.down.n_out};
    if (takes_codes(&down.shape) && routes->tile_rows > CU_SKINNY_MAX)
        down.x8 = to_codes(r, b->stream, &b->hid8, b->expert_hid, w->shape.down.n_in, n * routes->n_used);
    CU_DO(b, cu_grouped_run(b->stream, &down));
}

/* Whether the shared experts begin beside the router, not behind it: of one row. They norm x themselves then, which of
 * more rows takes longer than is gained. */
static bool shared_first(const cu_layer *w, int32_t n) { return w->has_shared && n == 1 && takes_codes(&w->ffn.up); }

/* shared_y = the shared experts. Of few rows they run beside the other experts, of one row beside the router as
 * well: kernels that leave the memory idle. Until shared_join. x8: the rows; route: what makes them, where
 * shared_first. */
static void run_shared(const run *r, const cu_layer *w, int32_t n, const cu_x8 *x8, const cu_route_job *route) {
    cu_backend *b = r->b;
    const bool beside = n <= CU_SIDE_ROWS;
    cudaStream_t s = beside ? b->side : b->stream;
    if (beside) {
        CU_DO(b, cudaEventRecord(b->fork, b->stream));
        CU_DO(b, cudaStreamWaitEvent(b->side, b->fork, 0));
    }
    cu_job up = job_of(&w->ffn.up, CU_SWIGLU, b->xn, n);
    up.h = b->shared_hid;
    up.ldh = CU_PAD(w->ffn.up.n_out);
    up.alone = beside;
    up.x8 = *x8;
    if (shared_first(w, n)) up.x_f32 = route->x, up.norm_w = route->norm_w, up.eps = route->eps;
    CU_DO(b, cu_linear_run(s, &up));
    cu_job down = job_of(&w->ffn.down, CU_STORE, b->shared_hid, n);
    down.y = b->shared_y;
    down.ldy = w->ffn.down.n_out;
    rows_to_codes(r, s, &down, beside ? &b->shared8 : &b->hid8);
    CU_DO(b, cu_linear_run(s, &down));
    if (beside) CU_DO(b, cudaEventRecord(b->join, b->side));
}

static void shared_join(const run *r, int32_t n) {
    if (n <= CU_SIDE_ROWS) CU_DO(r->b, cudaStreamWaitEvent(r->b->stream, r->b->join, 0));
}

/* The layer as one kernel, where that can be. */
static cu_few_job few_of(const run *r, const cu_layer *w, const cu_route_job *route, float *x) {
    const cu_backend *b = r->b;
    cu_few_job j = {.route = *route,
                    .n_expert = b->routes.n_expert,
                    .n_used = b->routes.n_used,
                    .x = x,
                    .up = w->shape.up,
                    .down = w->shape.down,
                    .experts_up = w->expert_up,
                    .experts_down = w->expert_down,
                    .shared_hid = b->shared_hid,
                    .expert_hid = b->expert_hid,
                    .shared_y = b->shared_y,
                    .expert_y = b->expert_y,
                    .count = b->few_count};
    if (w->has_shared) {
        j.shared_up = w->ffn.up;
        j.shared_down = w->ffn.down;
    }
    return j;
}

/* Whether a layer's attention half is one kernel, which makes its norm. */
static bool attends_in_one(const run *r, const cu_layer *w) {
    return r->attn_one && cu_attn_one_takes(&w->qkv) && cu_attn_one_takes(&w->o);
}

/* Whether the sum of a layer's experts makes the norm in front of the next layer, in one pass. */
static bool norms_next(const run *r, int32_t layer) {
    const cu_backend *b = r->b;
    return layer + 1 < b->model->config.n_layer && !attends_in_one(r, &b->weights.layer[layer + 1]) &&
           r->n_row <= b->n_ffn_row && !b->probe;
}

/* The norm in front of `next`, as its first linear takes it. */
static void norm_after(const run *r, cu_norm_job *j, const cu_layer *next) {
    const cu_backend *b = r->b;
    const bool codes = takes_codes(&next->qkv) && r->n_row > CU_SKINNY_MAX;
    j->w = next->attn_norm;
    if (codes) j->codes = b->codes, j->x8 = x8_in(&b->row8, next->qkv.n_in, r->n_row);
    if (!codes || !cu_norm_holds(next->qkv.n_in)) j->xn = b->xn;
}

/* x += experts + shared, rows row0..row0+n-1. */
static void moe_ffn(run *r, const cu_layer *w, int32_t layer, int32_t row0, int32_t n) {
    cu_backend *b = r->b;
    const ern_config *m = &b->model->config;
    const int32_t D = m->n_hidden;
    float *x = r->x + (int64_t)row0 * D;
    cu_routes routes = b->routes;
    routes.tile_rows = cu_tile_rows(n, m->n_expert_used, m->n_expert);
    const cu_route_job route = {.x = x,
                                .norm_w = w->ffn_norm,
                                .eps = m->rms_eps,
                                .norm_min = m->moe_norm_min,
                                .router = w->router,
                                .bias = w->router_bias,
                                .n_row = n,
                                .n_hidden = D,
                                .beside = shared_first(w, n)};
    const cu_few_job whole = few_of(r, w, &route, x);
    if (!b->probe && cu_moe_few_fits(&whole)) {
        CU_DO(b, cu_moe_few(b->stream, &whole));
        return;
    }
    const bool up_codes = takes_codes(&w->shape.up), shared_codes = w->has_shared && takes_codes(&w->ffn.up);
    const bool codes = up_codes || shared_codes;
    if (!up_codes || !takes_codes(&w->shape.down) || !cu_route_few_tells(&route, &routes)) routes.told = NULL;
    /* norm, codes and router in one launch */
    const bool together = n <= CU_ROUTE_FEW_MAX && cu_route_few_fits(D, m->n_expert);
    const bool spread = !CU_PORTABLE && !together && up_codes == codes && routes.tile_rows == 128 &&
                        cu_norm_spreads(D); /* the norm is told the places */
    cu_x8 x8 = {0};
    if (codes) x8 = x8_in(&b->row8, D, n);
    if (shared_first(w, n)) run_shared(r, w, n, &x8, &route);
    if (together) {
        CU_DO(b, cu_route_few(b->stream, &route, &routes, &x8, codes ? b->codes : CU_CODES_NONE, b->xn));
    } else {
        const bool all_codes = up_codes && (shared_codes || !w->has_shared) && cu_norm_holds(D) && !b->probe;
        const cu_norm_job norm = {.w = w->ffn_norm,
                                  .eps = m->rms_eps,
                                  .xn = all_codes ? NULL : b->xn,
                                  .codes = codes ? b->codes : CU_CODES_NONE,
                                  .x8 = x8,
                                  .by_place = spread ? b->expert_y : NULL, /* free until down */
                                  .routes = &routes};
        CU_DO(b, cu_route(b->stream, &route, &routes));
        CU_DO(b, cu_norm_run(b->stream, &norm, x, n, D));
    }
    show_bf16(r, "ffn_norm", layer, row0, b->xn, n, D);
    show(r, "router", layer, row0, routes.logit, n, m->n_expert);
    if (w->has_shared && !shared_first(w, n)) run_shared(r, w, n, &x8, &route);
    run_experts(r, w, &routes, n, &x8, spread);
    if (w->has_shared) shared_join(r, n);
    float *out = b->probe ? b->qkv : NULL; /* free by now, and large enough */
    cu_norm_job after = {.eps = m->rms_eps};
    r->normed = norms_next(r, layer);
    if (r->normed) norm_after(r, &after, &b->weights.layer[layer + 1]);
    CU_DO(b, cu_combine(b->stream, x, out, b->expert_y, w->has_shared ? b->shared_y : NULL, &routes, n, D,
                        r->normed ? &after : NULL));
    if (out) show(r, "experts", layer, row0, out, n, D);
}

/* Behind the last layer's keys and values rows do not meet any more, and of what follows only the wanted ones are asked
 * for; MTP and who looks at stages want all. */
static bool wanted_suffice(const run *r, int32_t layer) {
    const cu_backend *b = r->b;
    return layer == b->model->config.n_layer - 1 && !b->o.mtp && !b->probe && r->n_want < r->n_row;
}

/* x is the wanted rows from here on. */
static void keep_wanted(run *r) {
    cu_backend *b = r->b;
    const int32_t D = b->model->config.n_hidden;
    r->x = b->qkv; /* free by now, and large enough */
    r->n_x = r->n_want;
    r->wanted_alone = true;
    CU_DO(b, cu_take_rows(b->stream, r->x, b->x, r->dev.want, r->n_want, D * (int32_t)sizeof *r->x));
}

/* x += o(attention), of the wanted rows: q and the cells of all rows are there. */
static void attend_ends(run *r, const cu_layer *w, int32_t layer) {
    cu_backend *b = r->b;
    const ern_config *m = &b->model->config;
    const int32_t n = r->n_want, Q = m->n_head * m->n_head_dim;
    keep_wanted(r);
    /* behind x: wanted rows are half of all at most */
    cu_bf16 *q = (cu_bf16 *)(b->qkv + ((int64_t)n * m->n_hidden + 3) / 4 * 4);
    if (n == 0) return;
    CU_DO(b, cu_take_rows(b->stream, q, b->q, r->dev.want, n, Q * (int32_t)sizeof *q));
    CU_DO(b,
          cu_attend(b->stream, b->att, q, NULL, &b->cache, layer, &r->end_seqs, b->attn, (int64_t)b->attn_bytes, true));
    linear(r, &w->o, CU_ADD, r->x, b->att, n, &b->row8);
}

/* x += o(attention of the norm of x); keys and values go to cache layer `layer`. */
static void run_attention(run *r, const cu_layer *w, int32_t layer) {
    cu_backend *b = r->b;
    const ern_config *m = &b->model->config;
    const bool normed = r->normed;
    r->normed = false;
    if (attends_in_one(r, w)) {
        const cu_attn_one_layer one = {.qkv = w->qkv, .o = w->o, .norm = w->attn_norm, .eps = m->rms_eps};
        CU_DO(b, cu_attn_one_run(b->stream, &b->attn_one, &one, b->x, &b->cache, layer, &r->seqs));
        return;
    }
    cu_job qkv = job_of(&w->qkv, CU_STORE, b->xn, r->n_row);
    qkv.y = b->qkv;
    qkv.ldy = w->qkv.n_out;
    if (!normed)
        norm_into(r, &qkv, b->x, NULL, w->attn_norm, r->n_row);
    else if (takes_codes(&w->qkv) && r->n_row > CU_SKINNY_MAX)
        qkv.x8 = x8_in(&b->row8, m->n_hidden, r->n_row);
    show_bf16(r, "attn_norm", layer, 0, b->xn, r->n_row, m->n_hidden);
    const bool apart = !r->decode || b->probe;
    const cu_rope rope = {.q_out = b->q, .cache = &b->cache, .seqs = &r->seqs, .layer = layer};
    if (apart && !b->probe) qkv.rope = &rope;
    CU_DO(b, cu_linear_run(b->stream, &qkv));
    if (b->probe) CU_DO(b, cu_rope_store(b->stream, b->qkv, true, &rope));
    show_qkv(r, layer);
    if (r->ends && wanted_suffice(r, layer)) {
        attend_ends(r, w, layer);
        return;
    }
    if (r->wide && r->n_row > CU_SKINNY_MAX && takes_codes(&w->o) && cu_attend_codes_fits(&b->cache) && !b->probe) {
        cu_job o = job_of(&w->o, CU_ADD, NULL, r->n_row);
        o.y = b->x;
        o.ldy = w->o.n_out;
        o.x8 = x8_in(&b->row8, w->o.n_in, r->n_row);
        CU_DO(b, cu_attend_codes(b->stream, &o.x8, b->codes, b->q, &b->cache, layer, &r->seqs));
        CU_DO(b, cu_linear_run(b->stream, &o));
    } else {
        CU_DO(b, cu_attend(b->stream, b->att, apart ? b->q : NULL, b->qkv, &b->cache, layer, &r->seqs, b->attn,
                           (int64_t)b->attn_bytes, r->decode));
        show_bf16(r, "attn", layer, 0, b->att, r->n_row, m->n_head * m->n_head_dim);
        linear(r, &w->o, CU_ADD, b->x, b->att, r->n_row, &b->row8);
    }
}

/* x -> x; keys and values go to cache layer `layer`. */
static void run_layer(run *r, const cu_layer *w, int32_t layer) {
    cu_backend *b = r->b;
    run_attention(r, w, layer);
    if (!r->wanted_alone && wanted_suffice(r, layer)) keep_wanted(r);
    for (int32_t row0 = 0; row0 < r->n_x; row0 += b->n_ffn_row) {
        const int32_t rest = r->n_x - row0, n = rest < b->n_ffn_row ? rest : b->n_ffn_row;
        if (w->is_moe)
            moe_ffn(r, w, layer, row0, n);
        else
            dense_ffn(r, w, layer, row0, n);
    }
}

/* ---- rules, head, MTP -------------------------------------------------------------------------------------------- */

static bool is_plain(const ern_sample *s) {
    return s->temperature == 0 && s->repetition == 1 && s->frequency == 0 && s->presence == 0 && s->n_bias == 0 &&
           s->n_ban == 0 && !s->mask && s->forced < 0 && s->n_top < 0;
}

/* Fill the rules of wanted rows w0..w0+n-1 and their words, from the first word on; stops at the row whose words find
 * no room. Returns how many; there is room for one. */
static int32_t rules_fill(run *r, int32_t w0, int32_t n) {
    const ern_batch *in = r->in;
    const int32_t V = r->b->model->config.n_vocab;
    int32_t w = w0, q = 0;
    r->n_word = 0;
    for (; w < w0 + n; w++) {
        if (r->n_word + cu_sample_aux_words(&in->sample[w], V) > r->b->n_aux) break;
        const int32_t row = in->want[w];
        while (in->row0[q + 1] <= row) q++;
        r->n_word = cu_sample_prepare(&r->host.rule[w], &in->sample[w], row, in->row0[q], in->pos[row], V, r->host.aux,
                                      r->n_word);
    }
    ERN_ASSERT(w > w0 && r->n_word <= r->b->n_aux);
    return w - w0;
}

/* Rules that do not fit all at once: as many as do now, when the ones before are used up. */
static int32_t rules_turn(run *r, int32_t w0, int32_t n) {
    cu_backend *b = r->b;
    CU_DO(b, cudaStreamSynchronize(b->stream));
    n = rules_fill(r, w0, n);
    CU_DO(b, cudaMemcpyAsync(r->dev.rule + w0, r->host.rule + w0, (size_t)n * sizeof *r->dev.rule,
                             cudaMemcpyHostToDevice, b->stream));
    CU_DO(b, cudaMemcpyAsync(r->dev.aux, r->host.aux, (size_t)r->n_word * sizeof *r->dev.aux, cudaMemcpyHostToDevice,
                             b->stream));
    return n;
}

/* The logits of wanted rows w0..w0+n-1. */
static void head_rows(const run *r, int32_t w0, int32_t n, bool main) {
    cu_backend *b = r->b;
    const int32_t D = b->model->config.n_hidden, V = b->model->config.n_vocab;
    const int32_t first = r->wanted_alone ? w0 : r->host.want[w0];
    const bool together = r->wanted_alone || r->host.want[w0 + n - 1] - first == n - 1; /* they ascend */
    cu_job j = job_of(&b->weights.head, CU_STORE, b->xn, n);
    j.y = b->logits;
    j.ldy = V;
    norm_into(r, &j, together ? r->x + (int64_t)first * D : r->x, together ? NULL : r->dev.want + w0, b->weights.norm,
              n);
    CU_DO(b, cu_linear_run(b->stream, &j));
    for (int32_t i = 0; b->probe && i < n; i++) {
        if (main) show_bf16(r, "norm", -1, w0 + i, b->xn + (int64_t)i * CU_PAD(D), 1, D);
        show(r, main ? "logits" : "mtp_logits", -1, w0 + i, b->logits + (int64_t)i * V, 1, V);
    }
}

/* Logits of all wanted rows, a pass at a time; main: sample them, else take the draft. */
static void run_head(run *r, bool main) {
    cu_backend *b = r->b;
    const int32_t V = b->model->config.n_vocab;
    for (int32_t w0 = 0, n; w0 < r->n_want; w0 += n) {
        n = r->n_want - w0 < b->n_logit_row ? r->n_want - w0 : b->n_logit_row;
        if (main && !r->staged) n = rules_turn(r, w0, n);
        head_rows(r, w0, n, main);
        if (main)
            CU_DO(b, cu_sample(b->stream, r->slot->sampled + w0, b->ids + w0, b->logits, n, V, r->dev.rule + w0,
                               r->dev.aux, r->dev.token, r->greedy, b->sampler));
        else
            CU_DO(b, cu_argmax(b->stream, r->slot->draft + w0, b->logits, n, V, b->sampler));
    }
}

/* docs/model.md 3.7: from x before the final norm and the next token's embedding to the draft. */
static void run_mtp(run *r) {
    cu_backend *b = r->b;
    const cu_weights *k = &b->weights;
    const ern_config *m = &b->model->config;
    CU_DO(b, cu_mtp_in(b->stream, b->mtp_in, b->mtp_next, b->x, r->dev.next, r->dev.want, b->ids, r->n_want, k->embed,
                       k->emb_norm, k->hidden_norm, r->n_row, m->n_hidden, m->rms_eps));
    linear(r, &k->proj, CU_STORE, b->x, b->mtp_in, r->n_row, &b->row8);
    show(r, "mtp_in", -1, 0, b->x, r->n_row, m->n_hidden);
    run_layer(r, &k->mtp, m->n_layer);
    show(r, "mtp_resid", -1, 0, b->x, r->n_row, m->n_hidden);
    run_head(r, false);
}

/* All kernels of a step, from its arrays and lists on the device to sampled, ids and draft. */
static void run_kernels(run *r) {
    cu_backend *b = r->b;
    const cu_weights *k = &b->weights;
    const ern_config *m = &b->model->config;
    r->x = b->x;
    r->n_x = r->n_row;
    r->wanted_alone = r->normed = false;
    CU_DO(b, cu_embed(b->stream, b->x, r->dev.token, b->ids, k->embed, r->n_row, m->n_hidden));
    show(r, "embed", -1, 0, b->x, r->n_row, m->n_hidden);
    if (r->chain) CU_DO(b, cu_chain_run(b->stream, &b->chain, b->x, &b->cache, &r->seqs));
    for (int32_t layer = 0; layer < m->n_layer && !r->chain; layer++) {
        run_layer(r, &k->layer[layer], layer);
        show(r, "resid", layer, 0, b->x, r->n_row, m->n_hidden);
    }
    run_head(r, true);
    if (b->o.mtp) run_mtp(r);
}

/* ---- a step's arrays --------------------------------------------------------------------------------------------- */

static run run_of(cu_backend *b, cu_slot *s, int32_t n_row, int32_t n_seq, int32_t n_want) {
    run r = {.b = b,
             .slot = s,
             .n_row = n_row,
             .n_seq = n_seq,
             .n_want = n_want,
             .decode = true,
             .greedy = true,
             .staged = true};
    r.chain = n_row == n_seq && n_row <= b->chain.n_row_max && !b->probe;
    r.attn_one = n_row == n_seq && n_row <= b->attn_one.n_row_max && !b->probe;
    r.host = cu_input_at(b, s->block, n_row, n_seq, n_want);
    r.dev = cu_input_at(b, s->input, n_row, n_seq, n_want);
    r.seqs = (cu_seqs){.n_row = n_row,
                       .n_seq = n_seq,
                       .n_page_max = b->n_page_max,
                       .pos = r.dev.pos,
                       .cell = r.dev.cell,
                       .row0 = r.dev.row0,
                       .kv_len = r.dev.kv_len,
                       .page = r.dev.page,
                       .work = s->attn_work};
    r.end_seqs = r.seqs;
    r.end_seqs.n_row = n_want;
    r.end_seqs.pos = r.dev.end_pos;
    r.end_seqs.row0 = r.dev.end0;
    r.end_seqs.work = s->end_work;
    return r;
}

static int32_t decode_rows(const ern_config *m) { return CU_ATTEND_ROWS / (m->n_head / m->n_kv_head); }

static void copy_ints(int32_t *to, const int32_t *from, int32_t n) {
    if (n > 0) memcpy(to, from, (size_t)n * sizeof *to);
}

/* The batch's rows and tables, checked where a wrong number would write to foreign memory. */
static void rows_fill(run *r) {
    const cu_backend *b = r->b;
    const ern_batch *in = r->in;
    const cu_input *h = &r->host;
    const int32_t P = b->o.n_page_cell, n_cell = b->o.n_page * P, most = decode_rows(&b->model->config);
    copy_ints(h->token, in->token, in->n_row);
    if (b->o.mtp) copy_ints(h->next, in->next, in->n_row);
    copy_ints(h->pos, in->pos, in->n_row);
    copy_ints(h->cell, in->cell, in->n_row);
    copy_ints(h->row0, in->row0, in->n_seq + 1);
    copy_ints(h->kv_len, in->kv_len, in->n_seq);
    copy_ints(h->want, in->want, in->n_want);
    for (int32_t t = 0; t < in->n_row; t++) {
        ERN_ASSERT(in->cell[t] >= 0 && in->cell[t] < n_cell && in->pos[t] < b->o.n_len_max);
        ERN_ASSERT(in->token[t] < b->model->config.n_vocab && -1 - in->token[t] < b->n_prev_want);
    }
    r->wide = true;
    r->ends = !b->o.mtp && !b->probe && 2 * in->n_want <= in->n_row;
    int32_t w = 0;
    for (int64_t q = 0; q < in->n_seq; q++) {
        const int32_t n = (in->kv_len[q] + P - 1) / P;
        ERN_ASSERT(in->kv_len[q] <= b->o.n_len_max && n <= in->n_page_max);
        copy_ints(h->page + q * b->n_page_max, in->page + q * in->n_page_max, n);
        if (n > r->n_page_used) r->n_page_used = n;
        if (in->row0[q + 1] - in->row0[q] > most)
            r->decode = false;
        else
            r->wide = false;
        h->end0[q] = w;
        for (; w < in->n_want && in->want[w] < in->row0[q + 1]; w++) {
            if (in->want[w] < in->row0[q + 1] - 1) r->ends = false;
            h->end_pos[w] = in->pos[in->want[w]];
        }
    }
    h->end0[in->n_seq] = w;
    if (r->decode) r->ends = false; /* attention itself makes q, and stores */
    for (w = 0; w < in->n_want; w++)
        if (!is_plain(&in->sample[w])) r->greedy = false;
}

/* Sequences from seq on, of len rows each, in the spare page; the last row of each is wanted where want has room. */
static void pads_fill(run *r, int32_t seq, int32_t len) {
    static const ern_sample plain = {.top_p = 1, .repetition = 1, .forced = -1, .n_top = -1, .position = 1};
    const cu_backend *b = r->b;
    const cu_input *h = &r->host;
    const int32_t n_vocab = b->model->config.n_vocab;
    if (seq == 0) h->row0[0] = 0;
    for (int32_t q = seq; q < r->n_seq; q++) {
        const int32_t row0 = h->row0[q], last = row0 + len - 1;
        for (int32_t i = 0; i < len; i++) {
            h->token[row0 + i] = 0;
            if (b->o.mtp) h->next[row0 + i] = 0;
            h->pos[row0 + i] = i;
            h->cell[row0 + i] = b->o.n_page * b->o.n_page_cell + i;
        }
        h->row0[q + 1] = row0 + len;
        h->kv_len[q] = len;
        h->page[(int64_t)q * b->n_page_max] = b->o.n_page;
        if (q >= r->n_want) continue;
        h->want[q] = last;
        r->n_word = cu_sample_prepare(&h->rule[q], &plain, last, row0, len - 1, n_vocab, h->aux, r->n_word);
    }
    if (r->n_page_used < 1) r->n_page_used = 1;
    ERN_ASSERT(h->row0[r->n_seq] == r->n_row && r->n_word <= b->n_aux);
}

/* Bytes from..to-1 of the block. */
static void send_part(const run *r, size_t from, size_t to) {
    if (from < to)
        CU_DO(r->b, cudaMemcpyAsync(r->slot->input + from, (const unsigned char *)r->host.token + from, to - from,
                                    cudaMemcpyHostToDevice, r->b->feed));
}

/* The used part of the block. Rules that are all plain are not looked at. */
static void send(const run *r) {
    cu_backend *b = r->b;
    const cu_input *h = &r->host;
    const bool rules = r->staged && !r->greedy;
    const size_t end = rules ? h->aux_at + (size_t)r->n_word * sizeof *h->aux : h->rule_at;
    const bool narrow = h->rule_at - h->page_at > NARROW_BYTES && 2 * r->n_page_used <= b->n_page_max;
    if (!narrow) {
        send_part(r, 0, end);
        return;
    }
    const size_t pitch = (size_t)b->n_page_max * sizeof *h->page;
    send_part(r, 0, h->page_at);
    CU_DO(b, cudaMemcpy2DAsync(r->dev.page, pitch, h->page, pitch, (size_t)r->n_page_used * sizeof *h->page,
                               (size_t)r->n_seq, cudaMemcpyHostToDevice, b->feed));
    send_part(r, h->rule_at, end);
}

/* Arrays and lists of a step, beside the step before; the kernels behind this wait for them. */
static void feed(const run *r) {
    cu_backend *b = r->b;
    send(r);
    CU_DO(b, cu_attn_plan(b->feed, &b->cache, &r->seqs, b->inv_freq));
    if (r->ends && r->n_want > 0) CU_DO(b, cu_attn_plan(b->feed, &b->cache, &r->end_seqs, b->inv_freq));
    CU_DO(b, cudaEventRecord(r->slot->fed, b->feed));
    CU_DO(b, cudaStreamWaitEvent(b->stream, r->slot->fed, 0));
}

/* ---- graphs ------------------------------------------------------------------------------------------------------ */

/* The smallest graph that holds the batch, or NULL. */
static const cu_graph *graph_for(const cu_backend *b, const ern_batch *in) {
    if (b->probe || in->n_row != in->n_seq || in->n_want != in->n_row) return NULL;
    for (int32_t i = 0; i < b->n_graph; i++)
        if (b->graph[i].n >= in->n_row) return &b->graph[i];
    return NULL;
}

/* The next batch that has a graph; past `most`: most itself, then 0. */
static int32_t size_after(int32_t n, int32_t most) {
    const int32_t next = n < EVERY_SIZE ? n + 1 : n < 128 ? n + SIZE_STEP : n + SIZE_STEP_MORE;
    return next <= most ? next : n < most ? most : 0;
}

static void capture(run *r, cudaGraphExec_t *exec) {
    cu_backend *b = r->b;
    cudaGraph_t graph = NULL;
    CU_DO(b, cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal));
    if (failed(b)) return;
    run_kernels(r);
    cu_note(b, cudaStreamEndCapture(b->stream, &graph), "cudaStreamEndCapture");
    CU_DO(b, cudaGraphInstantiate(exec, graph, 0));
    CU_DO(b, cudaGraphUpload(*exec, b->stream));
    if (graph) (void)cudaGraphDestroy(graph);
}

/* The graphs of a batch of n. What they do is first done kernel by kernel: code that was never used is loaded on its
 * first use, which a capture does not allow. */
static void graph_make(cu_backend *b, int32_t n) {
    cu_graph *g = &b->graph[b->n_graph++];
    g->n = n;
    for (int i = 0; i < CU_SLOTS; i++) {
        run r = run_of(b, &b->slot[i], n, n, n);
        pads_fill(&r, 0, 1);
        for (int greedy = 0; greedy < 2; greedy++) {
            r.greedy = greedy;
            if (i == 0) {
                feed(&r);
                run_kernels(&r);
                CU_DO(b, cudaStreamSynchronize(b->stream));
            }
            capture(&r, &g->exec[i][greedy]);
        }
    }
}

/* A prefill step of sequences that fill the spare page. */
static void warm_prefill(cu_backend *b) {
    const int32_t P = b->o.n_page_cell, T = b->o.n_row_max, len0 = P < T ? P : T;
    const int32_t len = len0 < b->o.n_len_max ? len0 : b->o.n_len_max, rows = T < WARM_ROWS ? T : WARM_ROWS;
    int32_t n_seq = rows / len;
    if (n_seq > b->o.n_seq_max) n_seq = b->o.n_seq_max;
    if (n_seq < 1) n_seq = 1;
    run r = run_of(b, &b->slot[0], n_seq * len, n_seq, n_seq < b->o.n_want_max ? n_seq : b->o.n_want_max);
    r.decode = len <= decode_rows(&b->model->config);
    r.wide = !r.decode;
    pads_fill(&r, 0, len);
    feed(&r);
    run_kernels(&r);
    CU_DO(b, cudaStreamSynchronize(b->stream));
}

static int32_t largest_graph(const cu_backend *b) {
    const int32_t most = b->o.n_seq_max < CU_GRAPH_MOST ? b->o.n_seq_max : CU_GRAPH_MOST;
    return b->o.no_graph ? 0 : b->o.n_want_max < most ? b->o.n_want_max : most;
}

int32_t cu_graph_sizes(const cu_backend *b) {
    int32_t count = 0;
    for (int32_t n = 1, most = largest_graph(b); n > 0 && n <= most; n = size_after(n, most)) count++;
    return count;
}

ern_status cu_step_warm(cu_backend *b, ern_err *err) {
    const int32_t most = largest_graph(b);
    warm_prefill(b);
    for (int32_t n = 1; n > 0 && n <= most && !failed(b); n = size_after(n, most)) {
        ERN_ASSERT(b->n_graph < CU_GRAPHS_MAX);
        graph_make(b, n);
    }
    if (!failed(b)) return ERN_OK;
    return cu_fail((cudaError_t)atomic_load(&b->error), atomic_load(&b->error_where), err);
}

/* ---- the step ---------------------------------------------------------------------------------------------------- */

/* Arrays, rules and all: in the slot's block. Returns the graph that runs it, or NULL. */
static const cu_graph *step_fill(run *r, cu_backend *b, cu_slot *s, const ern_batch *in) {
    const cu_graph *g = graph_for(b, in);
    *r = g ? run_of(b, s, g->n, g->n, g->n) : run_of(b, s, in->n_row, in->n_seq, in->n_want);
    r->in = in;
    rows_fill(r);
    if (!r->greedy) r->staged = rules_fill(r, 0, in->n_want) == in->n_want;
    if (g && r->staged) {
        pads_fill(r, in->n_seq, 1);
        return g;
    }
    if (!g) return NULL;
    *r = run_of(b, s, in->n_row, in->n_seq, in->n_want); /* so many words: pass by pass, without padding */
    r->in = in;
    rows_fill(r);
    r->staged = false;
    return NULL;
}

void cu_step(cu_backend *b, cu_slot *s, const ern_batch *in) {
    run r;
    const cu_graph *g = step_fill(&r, b, s, in);
    s->n_want = in->n_want;
    feed(&r);
    if (g)
        CU_DO(b, cudaGraphLaunch(g->exec[s - b->slot][r.greedy], b->stream));
    else
        run_kernels(&r);
    CU_DO(b, cudaEventRecord(s->end, b->stream));
}
