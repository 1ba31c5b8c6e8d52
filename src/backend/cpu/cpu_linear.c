/* How linear layers and their inputs are shared between the workers of a step.
 *
 * Outputs are taken, not given: each worker takes pieces of a share of its own, from the front on, which makes one
 * stream of memory of them, and who is done takes what is left of the others' from the back. So a worker whose
 * processor is disturbed delays the others by one small piece. Which worker computes an output changes no bit of it.
 * Weights in Paddle's order are given in fixed shares: one long run of outputs per weight row is what memory likes
 * there. */
#include "backend/cpu/cpu_state.h"

enum {
    UNIT_FEW = 32,  /* outputs of a smallest piece: two bands, or whole cache lines */
    UNIT_MANY = 64, /* where many rows pass: four bands side by side */
    ROWS_FEW = 4,
};

void cpu_phase(cpu_run *c) {
    c->phase++;
    atomic_store_explicit(&c->b->left[(c->phase + 1) % 2][c->worker].taken, 0, memory_order_relaxed);
}

/* A piece of a share a..z-1: of one's own from its front, of another's from its back. */
static bool take_of(cpu_left *left, int32_t a, int32_t z, bool own, int32_t *from, int32_t *to) {
    uint64_t taken = atomic_load_explicit(&left->taken, memory_order_relaxed);
    int32_t front, back, take;
    do {
        front = a + (int32_t)(uint32_t)taken;
        back = z - (int32_t)(taken >> 32);
        if (front == back) return false;
        take = (back - front + 1) / 2; /* large pieces first, small ones to end together */
    } while (!atomic_compare_exchange_weak_explicit(&left->taken, &taken, taken + ((uint64_t)take << (own ? 0 : 32)),
                                                    memory_order_relaxed, memory_order_relaxed));
    *from = own ? front : back - take;
    *to = *from + take;
    return true;
}

bool cpu_claim(const cpu_run *c, int32_t n, int32_t *from, int32_t *to) {
    cpu_left *left = c->b->left[c->phase % 2];
    for (int i = 0; i < c->n_worker; i++) {
        const int who = (c->worker + i) % c->n_worker;
        int64_t a, z;
        ern_pool_share(n, 1, who, c->n_worker, &a, &z);
        if (take_of(&left[who], (int32_t)a, (int32_t)z, i == 0, from, to)) return true;
    }
    return false;
}

/* ---- inputs ------------------------------------------------------------------------------------------------------ */

cpu_act_kind cpu_act_for(const cpu_backend *b, const ern_linear *w) {
    return cpu_act_of(b->kernels, w, b->o.act_exact);
}

cpu_act cpu_act_at(const cpu_backend *b, cpu_act a, const ern_linear *w, int64_t row) {
    const int64_t q = row * cpu_act_stride(w->n_in), g = row * cpu_groups(w->n_in);
    switch (cpu_act_for(b, w)) {
    case CPU_ACT_BF16: return (cpu_act){(ern_bf16 *)a.q + q, NULL, NULL};
    case CPU_ACT_INT8: return (cpu_act){(int8_t *)a.q + q, a.scale + g, a.sum + g};
    case CPU_ACT_FP8: return (cpu_act){(float *)a.q + q, a.scale + g, a.sum + g};
    case CPU_ACT_F32: break;
    }
    return a;
}

void cpu_act_put(const cpu_backend *b, cpu_act a, const ern_linear *w, int64_t row, int32_t from, const float *x,
                 int32_t n) {
    const int32_t g = from / ERN_ACT_GROUP;
    const cpu_act at = cpu_act_at(b, a, w, row);
    switch (cpu_act_for(b, w)) {
    case CPU_ACT_BF16: b->kernels->round_bf16((ern_bf16 *)at.q + from, x, n); break;
    case CPU_ACT_INT8: b->kernels->quant_int8((int8_t *)at.q + from, at.scale + g, at.sum + g, x, n); break;
    case CPU_ACT_FP8: b->kernels->quant_fp8((float *)at.q + from, at.scale + g, x, n); break;
    case CPU_ACT_F32: break;
    }
}

void cpu_act_rows(const cpu_run *c, const ern_linear *w, const float *x, int64_t row0, int32_t n) {
    if (cpu_act_for(c->b, w) == CPU_ACT_F32) return;
    int32_t from, to;
    cpu_share(c, n, 1, &from, &to);
    for (int64_t r = row0 + from; r < row0 + to; r++) cpu_act_put(c->b, c->b->act, w, r, 0, x + r * w->n_in, w->n_in);
    cpu_meet(c);
}

/* ---- outputs ----------------------------------------------------------------------------------------------------- */

void cpu_linear_part(const cpu_backend *b, const cpu_linear_job *j, int32_t from, int32_t to) {
    if (from >= to || j->n_row == 0) return;
    cpu_linear_job part = *j;
    part.from = from;
    part.to = to;
    cpu_linear_of(b->kernels, j->w, b->o.act_exact)(&part);
}

int32_t cpu_unit(int32_t n_row) { return n_row <= ROWS_FEW ? UNIT_FEW : UNIT_MANY; }

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

void cpu_linears(cpu_run *c, const cpu_linear_job *job, int n) {
    const int32_t unit = cpu_unit(job->n_row);
    int32_t all = 0, a, z;
    cpu_phase(c);
    for (int i = 0; i < n; i++) {
        if (cpu_is_fixed(job[i].w)) {
            cpu_share(c, job[i].w->n_out, UNIT_FEW, &a, &z);
            cpu_linear_part(c->b, &job[i], a, z);
        } else {
            all += (job[i].w->n_out + unit - 1) / unit;
        }
    }
    while (cpu_claim(c, all, &a, &z)) {
        int32_t first = 0; /* of linear i, in units */
        for (int i = 0; i < n; i++) {
            if (cpu_is_fixed(job[i].w)) continue;
            const int32_t end = first + (job[i].w->n_out + unit - 1) / unit;
            const int32_t from = a > first ? a : first, to = least(z, end);
            if (from < to)
                cpu_linear_part(c->b, &job[i], (from - first) * unit, least((to - first) * unit, job[i].w->n_out));
            first = end;
        }
    }
}
