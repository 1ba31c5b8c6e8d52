/* Feed-forward layers: dense, shared and routed experts (docs/model.md 3.5, 3.6).
 *
 * Rows go through in chunks of CPU_FFN_ROWS, which bounds the scratch; a row's sums do not know its chunk. Routed rows
 * are sorted by expert, so an expert's weights are read once for all its rows; whoever owns columns of the output adds
 * the experts in ascending id, so every row's sum has one order whoever its neighbours are.
 * A piece of gate and up is 128 columns or more of them: the one who computed both makes the SwiGLU and quantizes it, a
 * whole group of down's inputs, and nobody meets in between. */
#include "backend/cpu/cpu_state.h"

#include <string.h>

enum { NEAR_ROWS = 16 }; /* so many rows are worth a scratch of their own */

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
static int32_t pieces(int32_t n, int32_t each) { return (n + each - 1) / each; }

/* Rows y0..y0+n-1 of mid, inputs from..to-1, of gate and up, whose column `from` is their first; rows are `stride`
 * apart. Overwrites gate. */
static void swiglu(const cpu_backend *b, const ern_linear *down, int64_t y0, int32_t n, float *gate, const float *up,
                   int64_t stride, int32_t from, int32_t to) {
    const bool codes = b->kernels->silu_int8 && cpu_act_for(b, down) == CPU_ACT_INT8 && to - from == ERN_ACT_GROUP;
    const cpu_act at = cpu_act_at(b, b->mid, down, y0);
    const int64_t groups = cpu_groups(down->n_in), g = from / ERN_ACT_GROUP;
    for (int64_t r = 0; r < n; r++, gate += stride, up += stride) {
        if (codes) {
            int8_t *q = (int8_t *)at.q + r * cpu_act_stride(down->n_in) + from;
            b->kernels->silu_int8(q, at.scale + r * groups + g, at.sum + r * groups + g, gate, up);
        } else {
            b->kernels->silu_mul(gate, up, to - from);
            cpu_act_put(b, b->mid, down, y0 + r, from, gate, to - from);
        }
    }
}

/* Columns from..to-1 of gate <- silu(gate x) * (up x), and of mid; rows y0.. of the scratch. gate: the job of w->gate.
 * Of many rows a group of down's inputs at a time is made, in a scratch that stays in L2, unless down reads gate itself
 * or the weights are read in long runs. */
static void gate_up_part(const cpu_run *c, const ern_ffn *w, const cpu_linear_job *gate, int64_t y0, int32_t from,
                         int32_t to) {
    const cpu_backend *b = c->b;
    const int32_t F = w->gate.n_out, n = gate->n_row;
    const bool near = n >= NEAR_ROWS && cpu_act_for(b, &w->down) != CPU_ACT_F32 && !cpu_is_fixed(&w->gate);
    for (int32_t at = from, end; at < to; at = end) {
        end = near ? least(at + ERN_ACT_GROUP, to) : to;
        cpu_linear_job g = *gate, u = *gate;
        u.w = &w->up;
        u.y = b->up + y0 * F;
        if (near) {
            const int64_t plane = (int64_t)cpu_ffn_rows(b) * ERN_ACT_GROUP;
            g.y_stride = u.y_stride = ERN_ACT_GROUP;
            g.y = b->near + c->worker * 2 * plane - at; /* column `at` is its first */
            u.y = g.y + plane;
        }
        cpu_linear_part(b, &g, at, end);
        cpu_linear_part(b, &u, at, end);
        swiglu(b, &w->down, y0, n, g.y + at, u.y + at, g.y_stride, at, end);
    }
}

static cpu_linear_job gate_job(const cpu_backend *b, const ern_ffn *w, int64_t y0, int32_t n) {
    const int32_t F = w->gate.n_out;
    return (cpu_linear_job){.w = &w->gate,
                            .x = b->xn,
                            .x_stride = w->gate.n_in,
                            .act = b->act,
                            .y = b->gate + y0 * F,
                            .y_stride = F,
                            .n_row = n};
}

/* Rows row0..row0+n-1: x += down(silu(gate) * up). */
static void dense(cpu_run *c, const ern_ffn *w, int64_t row0, int32_t n) {
    cpu_backend *b = c->b;
    const int32_t D = w->down.n_out, F = w->gate.n_out;
    int32_t from, to;
    cpu_linear_job gate = gate_job(b, w, 0, n);
    gate.x += row0 * D;
    gate.act = cpu_act_at(b, b->act, &w->gate, row0);
    cpu_phase(c);
    if (cpu_is_fixed(&w->gate)) {
        cpu_share(c, F, ERN_ACT_GROUP, &from, &to);
        gate_up_part(c, w, &gate, 0, from, to);
    } else {
        while (cpu_claim(c, pieces(F, ERN_ACT_GROUP), &from, &to))
            gate_up_part(c, w, &gate, 0, from * ERN_ACT_GROUP, least(to * ERN_ACT_GROUP, F));
    }
    cpu_meet(c);
    cpu_linears(c,
                &(cpu_linear_job){.w = &w->down,
                                  .x = b->gate,
                                  .x_stride = F,
                                  .act = b->mid,
                                  .y = b->x + row0 * D,
                                  .y_stride = D,
                                  .add = true,
                                  .n_row = n},
                1);
    cpu_meet(c);
}

/* One row's router logits, in place, to probabilities; its K experts, ascending, and their shares.
 * Chosen by probability + bias, ties to the lower id; weighed by probability alone. */
static void route(const cpu_backend *b, const ern_layer *w, float *prob, int32_t *chosen, float *share) {
    const ern_config *m = &b->model->config;
    uint64_t taken[ERN_EXPERTS_MAX / 64] = {0};
    b->kernels->softmax(prob, m->n_expert);
    for (int32_t rank = 0; rank < m->n_expert_used; rank++) {
        int32_t best = -1;
        float best_score = 0.0f;
        for (int32_t e = 0; e < m->n_expert; e++) {
            if (taken[e / 64] >> (e % 64) & 1) continue;
            float score = prob[e] + (w->router_bias ? w->router_bias[e] : 0.0f);
            if (best >= 0 && !(score > best_score)) continue;
            best = e;
            best_score = score;
        }
        taken[best / 64] |= (uint64_t)1 << (best % 64);
    }
    float sum = 0.0f;
    int32_t n = 0;
    for (int32_t e = 0; e < m->n_expert; e++) {
        if (!(taken[e / 64] >> (e % 64) & 1)) continue;
        chosen[n++] = e;
        sum += prob[e];
    }
    if (sum < m->moe_norm_min) sum = m->moe_norm_min;
    for (int32_t i = 0; i < n; i++) share[i] = prob[chosen[i]] / sum;
}

/* Sort the chunk's (row, expert) pairs by expert, rows ascending within one. Worker 0. */
static void sort_entries(cpu_backend *b, int64_t row0, int32_t n) {
    const int32_t E = b->model->config.n_expert, K = b->model->config.n_expert_used;
    int32_t *first = b->entry_first;
    for (int32_t e = 0; e <= E; e++) first[e] = 0;
    for (int32_t i = 0; i < n * K; i++) first[b->chosen[i]]++;
    for (int32_t e = 0, at = 0; e <= E; e++) at += first[e], first[e] = at; /* first[e]: end of e */
    for (int32_t i = n * K - 1; i >= 0; i--) {
        const int32_t at = --first[b->chosen[i]]; /* in the end: begin of e */
        b->entry_row[at] = (int32_t)row0 + i / K;
        b->entry_share[at] = b->share[i];
    }
    b->n_active = 0;
    for (int32_t e = 0; e < E; e++)
        if (first[e] < first[e + 1]) b->active[b->n_active++] = e;
}

/* Router logits, experts and shares of rows row0..row0+n-1. */
static void choose(const cpu_run *c, const ern_layer *w, int32_t layer, int64_t row0, int32_t n) {
    cpu_backend *b = c->b;
    const int32_t D = b->model->config.n_hidden, E = b->model->config.n_expert, K = b->model->config.n_expert_used;
    int32_t from, to;
    /* rows to workers where there are enough, else experts to workers: one row reads the whole router */
    cpu_share(c, n < c->n_worker ? E : n, n < c->n_worker ? 16 : 1, &from, &to);
    if (n < c->n_worker) {
        for (int64_t t = 0; t < n && from < to; t++)
            b->kernels->linear_f32(b->prob + t * E + from, b->xn + (row0 + t) * D, w->router + (int64_t)from * D,
                                   to - from, D);
    } else {
        for (int64_t t = from; t < to; t++)
            b->kernels->linear_f32(b->prob + t * E, b->xn + (row0 + t) * D, w->router, E, D);
    }
    cpu_meet(c);
    cpu_show(c, "router", layer, (int32_t)row0, b->prob, n, E);
    cpu_share(c, n, 1, &from, &to);
    for (int64_t t = from; t < to; t++) route(b, w, b->prob + t * E, b->chosen + t * K, b->share + t * K);
    cpu_meet(c);
    if (c->worker == 0) sort_entries(b, row0, n);
    cpu_meet(c);
}

/* The rows of a job side by side: where many outputs read them, in tiles. */
static void gather(const cpu_run *c, cpu_linear_job *j) {
    const cpu_backend *b = c->b;
    const size_t groups = (size_t)cpu_groups(j->w->n_in);
    const int64_t first = (int64_t)c->worker * cpu_ffn_rows(b);
    for (int32_t r = 0; r < j->n_row; r++) {
        const cpu_act from = cpu_act_at(b, b->act, j->w, j->x_row[r]), to = cpu_act_at(b, b->own, j->w, first + r);
        memcpy(to.q, from.q, (size_t)cpu_act_width(j->w->n_in));
        memcpy(to.scale, from.scale, groups * sizeof *to.scale);
        memcpy(to.sum, from.sum, groups * sizeof *to.sum);
    }
    j->act = cpu_act_at(b, b->own, j->w, first);
    j->x_row = NULL;
}

/* gate and up of all entries, piece by piece of (expert, columns). */
static void experts_up(cpu_run *c, const ern_layer *w) {
    cpu_backend *b = c->b;
    const int32_t F = b->model->config.n_expert_ffn, each = pieces(F, ERN_ACT_GROUP), *first = b->entry_first;
    const bool fixed = cpu_is_fixed(&w->expert[0].gate);
    int32_t from, to, at = 0, end = 0;
    cpu_phase(c);
    while (fixed ? at < b->n_active * each : cpu_claim(c, b->n_active * each, &at, &end)) {
        if (fixed) end = at + each; /* a whole expert, of which this worker has a share */
        for (; at < end; at += each - at % each) {
            const int32_t e = b->active[at / each], col = at % each, last = least(end - at, each - col) + col;
            cpu_linear_job gate = gate_job(b, &w->expert[e], first[e], first[e + 1] - first[e]);
            gate.x_row = b->entry_row + first[e];
            if (gate.n_row >= NEAR_ROWS && cpu_act_for(b, gate.w) == CPU_ACT_INT8) gather(c, &gate);
            from = col * ERN_ACT_GROUP, to = least(last * ERN_ACT_GROUP, F);
            if (fixed) cpu_share(c, F, ERN_ACT_GROUP, &from, &to);
            gate_up_part(c, &w->expert[e], &gate, first[e], from, to);
        }
    }
    cpu_meet(c);
}

/* x += share * down(mid) for columns from..to-1 of all entries, experts ascending. */
static void experts_down_part(const cpu_backend *b, const ern_layer *w, int32_t from, int32_t to) {
    const int32_t *first = b->entry_first;
    for (int32_t i = 0; i < b->n_active; i++) {
        const int32_t e = b->active[i];
        const ern_linear *down = &w->expert[e].down;
        const cpu_linear_job j = {.w = down,
                                  .x = b->gate + (int64_t)first[e] * down->n_in,
                                  .x_stride = down->n_in,
                                  .act = cpu_act_at(b, b->mid, down, first[e]),
                                  .y = b->x,
                                  .y_stride = down->n_out,
                                  .y_row = b->entry_row + first[e],
                                  .scale = b->entry_share + first[e],
                                  .add = true,
                                  .n_row = first[e + 1] - first[e]};
        cpu_linear_part(b, &j, from, to);
    }
}

static void experts_down(cpu_run *c, const ern_layer *w) {
    const ern_linear *down = &w->expert[0].down;
    const int32_t D = down->n_out, unit = cpu_unit(1);
    int32_t from, to;
    cpu_phase(c);
    if (cpu_is_fixed(down)) {
        cpu_share(c, D, 32, &from, &to);
        experts_down_part(c->b, w, from, to);
    } else {
        while (cpu_claim(c, pieces(D, unit), &from, &to)) experts_down_part(c->b, w, from * unit, least(to * unit, D));
    }
    cpu_meet(c);
}

void cpu_ffn(cpu_run *c, const ern_layer *w, int32_t layer) {
    const int32_t T = c->rows.n;
    for (int32_t row0 = 0; row0 < T; row0 += CPU_FFN_ROWS) {
        const int32_t n = T - row0 < CPU_FFN_ROWS ? T - row0 : CPU_FFN_ROWS;
        if (!w->is_moe) {
            dense(c, &w->ffn, row0, n);
            continue;
        }
        choose(c, w, layer, row0, n);
        experts_up(c, w);
        experts_down(c, w);
        if (!w->shared.gate.data) continue;
        if (cpu_act_for(c->b, &w->shared.gate) != cpu_act_for(c->b, &w->expert[0].gate))
            cpu_act_rows(c, &w->shared.gate, c->b->xn, row0, n);
        dense(c, &w->shared, row0, n);
    }
}
