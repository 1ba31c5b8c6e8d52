/* The step: the layer loop of docs/model.md 3 to 6, run by all workers of the pool in one parallel region.
 *
 * Between two barriers each worker has its own part: rows (norms, rotation), outputs (linear layers), or tasks of
 * attention (cpu_attention.c). No sum is ever split over workers, so their number cannot change a bit. */
#include "backend/cpu/cpu_state.h"

#include <string.h>

/* ---- what every phase uses --------------------------------------------------------------------------------------- */

void cpu_meet(const cpu_run *c) { ern_pool_barrier(c->b->pool); }

void cpu_share(const cpu_run *c, int64_t n, int64_t step, int32_t *from, int32_t *to) {
    int64_t a, z;
    ern_pool_share(n, step, c->worker, c->n_worker, &a, &z);
    *from = (int32_t)a;
    *to = (int32_t)z;
}

void cpu_show(const cpu_run *c, const char *stage, int32_t layer, int32_t row, const float *data, int32_t n_row,
              int32_t n_col) {
    if (!c->b->probe) return;
    if (c->worker == 0) c->b->probe(c->b->probe_ud, stage, layer, row, data, n_row, n_col);
    cpu_meet(c);
}

/* y = W x, or y += W x, for the rows at hand. act: the rows of x as w takes them. */
static cpu_linear_job rows_job(const cpu_run *c, const ern_linear *w, float *y, const float *x, bool add) {
    return (cpu_linear_job){.w = w,
                            .x = x,
                            .x_stride = w->n_in,
                            .act = c->b->act,
                            .y = y,
                            .y_stride = w->n_out,
                            .add = add,
                            .n_row = c->rows.n};
}

/* xn = norm of x, and as the linear that comes next takes it. */
static void norm_rows(const cpu_run *c, const ern_bf16 *w, const ern_linear *next) {
    const cpu_backend *b = c->b;
    const int32_t D = b->model->config.n_hidden;
    int32_t from, to;
    cpu_share(c, c->rows.n, 1, &from, &to);
    for (int64_t t = from; t < to; t++) {
        b->kernels->norm(b->xn + t * D, b->x + t * D, w, D, b->model->config.rms_eps);
        cpu_act_put(b, b->act, next, t, 0, b->xn + t * D, D);
    }
    cpu_meet(c);
}

static void embed_row(float *y, const ern_model *m, int32_t token) {
    const int32_t D = m->config.n_hidden;
    const ern_bf16 *e = m->embed + (int64_t)token * D;
    for (int32_t i = 0; i < D; i++) y[i] = ern_bf16_to_f32(e[i]);
}

/* ---- one layer, the head, MTP ------------------------------------------------------------------------------------ */

/* The wanted rows of x and of the angles to the front; these are the rows at hand from now on. All have met, and meet.
 */
static void leave_wanted(cpu_run *c) {
    cpu_backend *b = c->b;
    const ern_config *m = &b->model->config;
    const cpu_slot *s = c->s;
    ERN_ASSERT(!b->probe && !b->o.mtp);
    c->rows = (cpu_rows){.n = s->n_want, .pos = b->want_pos, .row0 = b->want_row0};
    if (c->worker == 0) {
        for (int64_t i = 0; i < s->n_want; i++) { /* they ascend: what is overwritten has left */
            memmove(b->x + i * m->n_hidden, b->x + (int64_t)s->want[i] * m->n_hidden,
                    (size_t)m->n_hidden * sizeof *b->x);
            memmove(b->rope + i * m->n_head_dim, b->rope + (int64_t)s->want[i] * m->n_head_dim,
                    (size_t)m->n_head_dim * sizeof *b->rope);
        }
        cpu_attend_plan(b, &c->rows, s->n_seq);
    }
    cpu_meet(c);
}

/* x -> x; keys and values go to cache layer `layer`. may_leave: nothing more is made of rows that are not wanted, and x
 * then holds the wanted ones, at the front. */
static void run_layer(cpu_run *c, const ern_layer *w, int32_t layer, bool may_leave) {
    cpu_backend *b = c->b;
    const ern_config *m = &b->model->config;
    const bool leaves = may_leave && c->s->n_want < c->rows.n;
    norm_rows(c, w->attn_norm, &w->q);
    cpu_show(c, "attn_norm", layer, 0, b->xn, c->rows.n, m->n_hidden);
    const cpu_linear_job kvq[] = {rows_job(c, &w->k, b->k, b->xn, false), rows_job(c, &w->v, b->v, b->xn, false),
                                  rows_job(c, &w->q, b->q, b->xn, false)};
    cpu_linears(c, kvq, leaves ? 2 : 3);
    cpu_meet(c);
    cpu_store_rows(c, layer);
    if (leaves) {
        cpu_meet(c);
        leave_wanted(c);
        norm_rows(c, w->attn_norm, &w->q);
        const cpu_linear_job q = rows_job(c, &w->q, b->q, b->xn, false);
        cpu_linears(c, &q, 1);
        cpu_meet(c);
    }
    const int32_t T = c->rows.n;
    cpu_rotate(c);
    if (c->worker == 0) atomic_store_explicit(&b->next_task, 0, memory_order_relaxed);
    cpu_meet(c);
    cpu_show(c, "q", layer, 0, b->q, T, m->n_head * m->n_head_dim);
    cpu_show(c, "k", layer, 0, b->k, T, m->n_kv_head * m->n_head_dim);
    cpu_show(c, "v", layer, 0, b->v, T, m->n_kv_head * m->n_head_dim);
    const bool put = cpu_attend(c, layer, &w->o);
    cpu_meet(c);
    cpu_show(c, "attn", layer, 0, b->q, T, m->n_head * m->n_head_dim);
    if (!put) cpu_act_rows(c, &w->o, b->q, 0, T);
    const cpu_linear_job o = rows_job(c, &w->o, b->x, b->q, true);
    cpu_linears(c, &o, 1);
    cpu_meet(c);
    norm_rows(c, w->ffn_norm, w->is_moe ? &w->expert[0].gate : &w->ffn.gate);
    cpu_show(c, "ffn_norm", layer, 0, b->xn, T, m->n_hidden);
    cpu_ffn(c, w, layer);
}

/* The logits of wanted rows w0..w0+n-1, all workers; they meet at the end. */
static void head_rows(cpu_run *c, int32_t w0, int32_t n) {
    cpu_backend *b = c->b;
    const ern_linear *head = &b->weights.head;
    const int32_t D = b->model->config.n_hidden;
    int32_t from, to;
    cpu_share(c, n, 1, &from, &to);
    for (int64_t i = from; i < to; i++) {
        const int64_t row = c->rows.n == c->s->n_want ? w0 + i : c->s->want[w0 + i];
        b->kernels->norm(b->head_in + i * D, b->x + row * D, b->model->norm, D, b->model->config.rms_eps);
        cpu_act_put(b, b->act, head, i, 0, b->head_in + i * D, D);
    }
    cpu_meet(c);
    cpu_linear_job j = rows_job(c, head, b->logits, b->head_in, false);
    j.n_row = n;
    cpu_linears(c, &j, 1);
    cpu_meet(c);
}

static void sample_one(const cpu_run *c, int32_t w, float *logits) {
    cpu_backend *b = c->b;
    const cpu_slot *s = c->s;
    const ern_sample *rule = &s->sample[w];
    /* the tokens of this sequence's rows up to this one that `seen` does not hold yet */
    const int32_t row = s->want[w], n_own = row + 1 - s->row0[b->want_seq[w]];
    int32_t n_tail = s->pos[row] + 1 - rule->n_seen;
    n_tail = n_tail < 0 ? 0 : n_tail > n_own ? n_own : n_tail;
    ern_sample_row(logits, b->model->config.n_vocab, rule, s->token + row + 1 - n_tail, n_tail,
                   b->sampler + (size_t)c->worker * b->sampler_bytes, &s->sampled[w]);
}

/* The largest logit, ties to the lowest id. */
static int32_t arg_max(const float *x, int32_t n) {
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

/* Logits of all wanted rows, CPU_LOGIT_ROWS at a time; main: sample them, else take the draft. */
static void run_head(cpu_run *c, bool main) {
    cpu_backend *b = c->b;
    const int32_t V = b->model->config.n_vocab, W = c->s->n_want;
    for (int32_t w0 = 0; w0 < W; w0 += CPU_LOGIT_ROWS) {
        const int32_t n = W - w0 < CPU_LOGIT_ROWS ? W - w0 : CPU_LOGIT_ROWS;
        head_rows(c, w0, n);
        for (int32_t i = 0; i < n; i++) {
            if (main)
                cpu_show(c, "norm", -1, w0 + i, b->head_in + (int64_t)i * b->model->config.n_hidden, 1,
                         b->model->config.n_hidden);
            cpu_show(c, main ? "logits" : "mtp_logits", -1, w0 + i, b->logits + (int64_t)i * V, 1, V);
        }
        int32_t from, to;
        cpu_share(c, n, 1, &from, &to);
        for (int32_t i = from; i < to; i++) {
            float *logits = b->logits + (int64_t)i * V;
            if (main)
                sample_one(c, w0 + i, logits);
            else
                c->s->draft[w0 + i] = arg_max(logits, V);
        }
        cpu_meet(c);
    }
}

/* The token after each row: known, or sampled here; 0 where nobody needs it. Worker 0. */
static void mtp_next(const cpu_run *c) {
    const cpu_slot *s = c->s;
    for (int32_t t = 0, w = 0; t < s->n_row; t++) {
        while (w < s->n_want && s->want[w] < t) w++;
        int32_t next = s->has_next ? s->next[t] : -1;
        if (next < 0) next = w < s->n_want && s->want[w] == t ? s->sampled[w].token : 0;
        c->b->mtp_next[t] = next;
    }
}

/* docs/model.md 3.7: from x before the final norm and the next token's embedding to the draft. */
static void run_mtp(cpu_run *c) {
    cpu_backend *b = c->b;
    const ern_model *m = b->model;
    const int32_t D = m->config.n_hidden, T = c->s->n_row;
    int32_t from, to;
    if (c->worker == 0) mtp_next(c);
    cpu_meet(c);
    cpu_share(c, T, 1, &from, &to);
    for (int64_t t = from; t < to; t++) {
        float *z = b->mtp_in + t * 2 * D;
        embed_row(z, m, b->mtp_next[t]);
        b->kernels->norm(z, z, m->mtp.emb_norm, D, m->config.rms_eps);
        b->kernels->norm(z + D, b->x + t * D, m->mtp.hidden_norm, D, m->config.rms_eps);
        cpu_act_put(b, b->act, &m->mtp.proj, t, 0, z, 2 * D);
    }
    cpu_meet(c);
    const cpu_linear_job proj = rows_job(c, &m->mtp.proj, b->x, b->mtp_in, false);
    cpu_linears(c, &proj, 1);
    cpu_meet(c);
    cpu_show(c, "mtp_in", -1, 0, b->x, T, D);
    run_layer(c, &m->mtp.layer, m->config.n_layer, false);
    cpu_show(c, "mtp_resid", -1, 0, b->x, T, D);
    run_head(c, false);
}

/* ---- the step ---------------------------------------------------------------------------------------------------- */

static cpu_rows all_rows(const cpu_slot *s) { return (cpu_rows){.n = s->n_row, .pos = s->pos, .row0 = s->row0}; }

/* One worker's whole step. */
static void step_worker(void *ud, int worker, int n_worker) {
    cpu_run run = *(const cpu_run *)ud, *c = &run;
    run.worker = worker;
    run.n_worker = n_worker;
    run.rows = all_rows(run.s);
    cpu_backend *b = c->b;
    const ern_config *m = &b->model->config;
    int32_t from, to;
    cpu_share(c, c->s->n_row, 1, &from, &to);
    for (int64_t t = from; t < to; t++) {
        embed_row(b->x + t * m->n_hidden, b->model, c->s->token[t]);
        cpu_rope_table(b->rope + t * m->n_head_dim, b->inv_freq, c->s->pos[t], m->n_head_dim);
    }
    cpu_meet(c);
    cpu_show(c, "embed", -1, 0, b->x, c->s->n_row, m->n_hidden);
    for (int32_t layer = 0; layer < m->n_layer; layer++) {
        /* MTP and a probe want all rows of the last layer, too */
        run_layer(c, &b->weights.layer[layer], layer, layer == m->n_layer - 1 && !b->o.mtp && !b->probe);
        cpu_show(c, "resid", layer, 0, b->x, c->rows.n, m->n_hidden);
    }
    run_head(c, true);
    if (b->o.mtp) run_mtp(c);
}

/* Resolve the tokens of the step before; cut rows into tiles; find each wanted row's sequence and position. */
static void prepare(cpu_backend *b, cpu_slot *s, const cpu_slot *prev) {
    for (int32_t t = 0; t < s->n_row; t++) {
        if (s->token[t] < 0) {
            ERN_ASSERT(prev && -1 - s->token[t] < prev->n_want); /* ERN_PREV(w) == -1 - w */
            s->token[t] = prev->sampled[-1 - s->token[t]].token;
        }
        ERN_ASSERT(s->token[t] >= 0 && s->token[t] < b->model->config.n_vocab);
    }
    for (int32_t q = 0, w = 0; q < s->n_seq; q++) {
        b->want_row0[q] = w;
        for (; w < s->n_want && s->want[w] < s->row0[q + 1]; w++)
            b->want_seq[w] = q, b->want_pos[w] = s->pos[s->want[w]];
        b->want_row0[q + 1] = w;
    }
    const cpu_rows all = all_rows(s);
    cpu_attend_plan(b, &all, s->n_seq);
}

void cpu_step(cpu_backend *b, cpu_slot *s, const cpu_slot *prev) {
    const int64_t begin_us = ern_now_us();
    cpu_copy_pages(b, s->pair, s->n_pair);
    prepare(b, s, prev);
    for (int i = 0; i < 2 * b->n_worker; i++)
        atomic_store_explicit(&b->left[i % 2][i / 2].taken, 0, memory_order_relaxed);
    cpu_run run = {.b = b, .s = s};
    ern_pool_run(b->pool, step_worker, &run);
    s->compute_us = ern_now_us() - begin_us;
}
