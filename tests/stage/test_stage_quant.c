/* cpu against the law of quant.h, linear by linear: what each quantized linear made of the very numbers it was given.
 *
 * The cpu shows the input of every linear but down (attn_norm, attn, ffn_norm, norm). Each is quantized here by the
 * scalar law and multiplied in double. An integer sum is exact on both sides, so what is left is the f32 chain over
 * groups: bounds of a few u per group, u = 2^-24, argued at chain(). down's input is not shown: it is computed here
 * from ffn_norm with its own bound, and where a number within that bound could be quantized one way or the other,
 * down's bound grows by that step (span()). Dense and experts, all formats, every level; prefill, chunks and single
 * rows. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>

#include "base/counter.h"
#include "base/os.h"
#include "made_model.h"
#include "quant_model.h"
#include "records.h"
#include "step.h"

enum { P = 16, N_PAGE = 24, WIDE = 4096 };
#define U 0x1p-24

typedef struct watch {
    records cpu; /* what it showed */
    int64_t n_judged;
    double worst; /* share of the bound */
} watch;

static watch seen;

static const float *shown(const char *stage, int32_t layer, int32_t row) {
    const record *r = records_find(&seen.cpu, stage, layer, row, 1);
    if (!r) fail_msg("no %s of layer %d row %d", stage, layer, row);
    return r->data + (size_t)(row - r->row) * (size_t)r->n_col;
}

static void judge(const char *what, int32_t layer, int32_t row, const float *have, const double *want,
                  const double *bound, int32_t n) {
    for (int32_t i = 0; i < n; i++) {
        const double off = fabs((double)have[i] - want[i]), most = bound[i] * 1.01 + 1e-30;
        if (!(off <= most))
            fail_msg("%s of layer %d row %d, element %d: %.9g, expected %.9g within %.3g", what, layer, row, i,
                     (double)have[i], want[i], most);
        if (off / most > seen.worst) seen.worst = off / most;
    }
    seen.n_judged += n;
}

/* ---- the law ----------------------------------------------------------------------------------------------------- */

/* An input row as a linear takes it: q and scales; slip: how far each q may be from the cpu's; rel: the scales'
 * relative error. A row that was shown has neither. */
typedef struct input {
    double q[WIDE], scale[WIDE / ERN_ACT_GROUP], slip[WIDE], rel;
} input;

static double fp8_value(double v) { return (double)ern_e4m3_to_f32(ern_e4m3_from_f32((float)v)); }

/* x[i] is within off[i] of the cpu's number (off NULL: it is that number). */
static void take(input *in, const ern_linear *w, const float *x, const double *off) {
    static int8_t q[WIDE];
    static uint8_t c[WIDE];
    static float s[WIDE / ERN_ACT_GROUP];
    const bool fp8 = w->dtype == ERN_DTYPE_F8E4M3;
    const double top = fp8 ? 448.0 : 127.0;
    if (fp8)
        quant_act_fp8(c, s, x, w->n_in);
    else
        quant_act_int8(q, s, x, w->n_in);
    in->rel = 0;
    for (int32_t i = 0; off && i < w->n_in;
         i++) { /* the maximum is off by at most the largest of offs; 2u: its quotient */
        const double amax = (double)s[i / ERN_ACT_GROUP] * top;
        if (amax > 0) in->rel = fmax(in->rel, off[i] / amax + 2 * U);
    }
    for (int32_t i = 0; i < w->n_in; i++) {
        const int32_t g = i / ERN_ACT_GROUP;
        in->scale[g] = (double)s[g];
        in->q[i] = fp8 ? (double)ern_e4m3_to_f32(c[i]) : (double)q[i];
        in->slip[i] = 0;
        if (!off || !(s[g] > 0)) continue;
        const double v = (double)x[i] / in->scale[g], d = off[i] / in->scale[g] + fabs(v) * (in->rel + 4 * U);
        in->slip[i] = fp8 ? fp8_value(v + d) - fp8_value(v - d) : nearbyint(v + d) - nearbyint(v - d);
    }
}

/* Roundings behind a linear's sum. Integer sums: per group a product and a sum, then the output's scale. fp8: a group
 * is a chain of 128 products and sums and a tree of two more, and the two scales' product. */
static double chain(const ern_linear *w) {
    const double groups = ceil(w->n_in / 128.0);
    return w->dtype == ERN_DTYPE_F8E4M3 ? 129 + 3 + 2 * groups : 2 * groups + 1;
}

static void multiply(double *y, double *bound, const ern_linear *w, const input *in) {
    const int32_t n_block = (w->n_in + 127) / 128;
    for (int32_t o = 0; o < w->n_out; o++) {
        double size = 0, loose = 0;
        y[o] = 0;
        for (int32_t i = 0; i < w->n_in; i++) {
            const double ws = w->dtype == ERN_DTYPE_F8E4M3
                                  ? (double)((const float *)w->scale)[o / 128 * n_block + i / 128]
                                  : (double)ern_bf16_to_f32(((const ern_bf16 *)w->scale)[o]);
            const double c = (double)quant_code_at(w, o, i) * ws * in->scale[i / 128];
            y[o] += c * in->q[i];
            size += fabs(c * in->q[i]);
            loose += fabs(c) * (in->slip[i] + fabs(in->q[i]) * in->rel);
        }
        bound[o] = chain(w) * U * (size + loose) + loose;
    }
}

/* y and its bound from a row that was shown. */
static void law(double *y, double *bound, const ern_linear *w, const float *x) {
    static input in;
    take(&in, w, x, NULL);
    multiply(y, bound, w, &in);
}

/* y += share * ffn(x), bound with it. rel: relative error of the share. */
static void add_ffn(double *y, double *bound, const ern_ffn *f, const float *x, double share, double rel) {
    static double g[WIDE], bg[WIDE], u[WIDE], bu[WIDE], off[WIDE], out[WIDE], bout[WIDE];
    static float h[WIDE];
    static input in;
    law(g, bg, &f->gate, x);
    law(u, bu, &f->up, x);
    for (int32_t i = 0; i < f->gate.n_out; i++) {
        const double silu = g[i] / (1 + exp(-g[i])), v = silu * u[i];
        h[i] = (float)v;
        /* |silu'| <= 1.1; the kernel within 7 u of its own input (checkkern), h rounded once here */
        off[i] = 1.1 * bg[i] * (fabs(u[i]) + bu[i]) + fabs(silu) * bu[i] + 9 * U * fabs(v) + 1e-34;
    }
    take(&in, &f->down, h, off);
    multiply(out, bout, &f->down, &in);
    for (int32_t o = 0; o < f->down.n_out; o++) {
        y[o] += share * out[o];
        bound[o] += share * bout[o] + fabs(share * out[o]) * (rel + U) + U * fabs(y[o]); /* added in f32 */
    }
}

/* The K best of softmax + bias; false: two are too near to tell. */
static bool choose(int32_t *chosen, double *share, const float *logit, const ern_layer *l, const ern_config *c) {
    double prob[64], top = -INFINITY, sum = 0, last = 0;
    uint64_t set = 0;
    for (int32_t e = 0; e < c->n_expert; e++) top = fmax(top, (double)logit[e]);
    for (int32_t e = 0; e < c->n_expert; e++) sum += prob[e] = exp((double)logit[e] - top);
    for (int32_t e = 0; e < c->n_expert; e++) prob[e] /= sum;
    for (int32_t k = 0; k <= c->n_expert_used; k++) {
        int32_t best = -1;
        double most = 0;
        for (int32_t e = 0; e < c->n_expert; e++) {
            const double score = prob[e] + (double)(l->router_bias ? l->router_bias[e] : 0);
            if (!(set >> e & 1) && (best < 0 || score > most)) best = e, most = score;
        }
        if (k == c->n_expert_used && last - most < 1e-5) return false;
        last = most;
        if (k < c->n_expert_used) set |= 1ull << best;
    }
    double all = 0;
    for (int32_t e = 0, n = 0; e < c->n_expert; e++)
        if (set >> e & 1) chosen[n++] = e, all += prob[e];
    for (int32_t k = 0; k < c->n_expert_used; k++) share[k] = prob[chosen[k]] / fmax(all, (double)c->moe_norm_min);
    return true;
}

/* ---- one layer of one row ---------------------------------------------------------------------------------------- */

/* Rotate pairs (2i, 2i+1): docs/model.md 3.3. */
static void rotate(double *y, double *bound, int32_t n, const ern_config *c, int32_t pos) {
    for (int32_t i = 0; i < n; i += 2) {
        const int32_t k = i % c->n_head_dim / 2;
        const float inv = 1.0f / (float)pow(c->rope_theta, (double)((float)(2 * k) / (float)c->n_head_dim));
        const double angle = (double)((float)pos * inv), cosine = cos(angle), sine = sin(angle), a = y[i], b = y[i + 1];
        const double off = bound[i] + bound[i + 1] + 3 * U * (fabs(a) + fabs(b)); /* a table entry, a product, a sum */
        y[i] = a * cosine - b * sine;
        y[i + 1] = b * cosine + a * sine;
        bound[i] = bound[i + 1] = off;
    }
}

static void check_layer(const ern_model *m, int32_t layer, int32_t row, int32_t pos) {
    static double y[WIDE], bound[WIDE];
    const ern_config *c = &m->config;
    const ern_layer *l = &m->layer[layer];
    const int32_t D = c->n_hidden;
    const float *x = shown("attn_norm", layer, row);
    law(y, bound, &l->q, x);
    rotate(y, bound, l->q.n_out, c, pos);
    judge("q", layer, row, shown("q", layer, row), y, bound, l->q.n_out);
    law(y, bound, &l->k, x);
    rotate(y, bound, l->k.n_out, c, pos);
    judge("k", layer, row, shown("k", layer, row), y, bound, l->k.n_out);
    law(y, bound, &l->v, x);
    judge("v", layer, row, shown("v", layer, row), y, bound, l->v.n_out);

    const float *was = layer ? shown("resid", layer - 1, row) : shown("embed", -1, row);
    law(y, bound, &l->o, shown("attn", layer, row));
    for (int32_t i = 0; i < D; i++) {
        bound[i] += U * fabs(y[i]); /* the product with 1 where there is no fused one */
        y[i] += (double)was[i];
        bound[i] += U * fabs(y[i]);
    }
    x = shown("ffn_norm", layer, row);
    if (!l->is_moe) {
        add_ffn(y, bound, &l->ffn, x, 1, 0);
    } else {
        int32_t chosen[64];
        double share[64];
        if (!choose(chosen, share, shown("router", layer, row), l, c)) return;
        /* softmax within 100 u (checkkern: logits here differ by less than 40), a sum of K, a quotient */
        for (int32_t k = 0; k < c->n_expert_used; k++)
            add_ffn(y, bound, &l->expert[chosen[k]], x, share[k], (2 * 100 + c->n_expert_used + 1) * U);
        if (l->shared.gate.data) add_ffn(y, bound, &l->shared, x, 1, 0);
    }
    judge("resid", layer, row, shown("resid", layer, row), y, bound, D);
}

static void check_step(const ern_model *m, const step *s) {
    static double y[WIDE], bound[WIDE];
    for (int32_t row = 0; row < s->in.n_row; row++)
        for (int32_t l = 0; l < m->config.n_layer; l++) check_layer(m, l, row, s->pos[row]);
    for (int32_t w = 0; w < s->in.n_want; w++) {
        assert_true(m->head.n_out <= WIDE && m->head.order == ERN_ORDER_TILED);
        law(y, bound, &m->head, shown("norm", -1, w));
        judge("logits", -1, w, shown("logits", -1, w), y, bound, m->head.n_out);
    }
    records_clear(&seen.cpu);
}

/* ---- scenarios --------------------------------------------------------------------------------------------------- */

static void scenario(const char *shape, ern_quant_plan plan, int32_t level) {
    made_model made = made_model_open(shape, false, 11);
    quant_model *quant = quant_model_make(made.model, plan);
    const ern_model *m = made.model;
    const ern_backend_options o = {.n_page = N_PAGE,
                                   .n_page_cell = P,
                                   .n_row_max = STEP_ROWS,
                                   .n_seq_max = STEP_SEQS,
                                   .n_want_max = STEP_ROWS,
                                   .n_len_max = 160,
                                   .n_thread = 2,
                                   .level = level};
    ern_err err;
    ern_backend *b;
    static step s;
    int32_t text[2][64], page[2][STEP_PAGES] = {{0}};
    const ern_backend_ops *ops = ern_backend_find("cpu");
    made_check(ops->open(&b, m, &o, &err), &err, "opening cpu");
    memset(&seen, 0, sizeof seen);
    ops->probe(b, records_keep, &seen.cpu);
    for (int i = 0; i < 64; i++) {
        text[0][i] = (int32_t)(ern_counter64(5, (uint64_t)i) % 1024);
        text[1][i] = (int32_t)(ern_counter64(6, (uint64_t)i) % 1024);
        page[0][i % 8] = i % 8, page[1][i % 8] = 20 - i % 8;
    }
    static const int32_t cut[][2][2] = {{{0, 19}, {0, 3}}, {{19, 20}, {3, 4}}, {{20, 21}, {0, 0}}, {{0, 0}, {4, 11}}};
    for (size_t i = 0; i < sizeof cut / sizeof *cut; i++) {
        step_clear(&s);
        for (int q = 0; q < 2; q++)
            if (cut[i][q][1] > cut[i][q][0]) step_add(&s, text[q], cut[i][q][0], cut[i][q][1], page[q], P, q == 1);
        (void)step_run(b, &s, &o, m->config.n_vocab);
        check_step(m, &s);
    }
    print_message("%s level %d, dense %d expert %d: %lld numbers, worst %.2g of the bound\n", shape, level, plan.dense,
                  plan.expert, (long long)seen.n_judged, seen.worst);
    assert_true(seen.n_judged > 20000);
    ops->close(b);
    quant_model_free(quant);
    made_model_close(&made);
}

static void every_level(const char *shape) {
    static const ern_quant how[] = {ERN_QUANT_WINT8, ERN_QUANT_WINT4, ERN_QUANT_FP8};
    for (int32_t level = ERN_CPU_PORTABLE; level <= (int32_t)ern_cpu_level_here(); level++)
        for (size_t i = 0; i < sizeof how / sizeof *how; i++)
            scenario(shape, (ern_quant_plan){how[i], how[(i + 1) % 3], ERN_QUANT_WINT8}, level);
}
static void test_dense(void **state) {
    (void)state;
    every_level("tiny-dense");
}
static void test_moe(void **state) {
    (void)state;
    every_level("tiny-moe");
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_dense), cmocka_unit_test(test_moe)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
