/* ref with quantized weights, end to end on the tiny models in each format: weight-only is bit for bit what the plain
 * path makes of the same weights widened to f32; quantized activations follow docs/model.md 9.3 at v (which nothing has
 * touched since its linear) and at the logits; and a row's bits do not depend on its neighbours. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>

#include "backend/ref/ref.h"
#include "base/counter.h"
#include "made_model.h"
#include "model/quant.h"
#include "step.h"

enum { N = 40, V = 1024, D_MAX = 80 };

static const char *const format[] = {
    "wint8",
    "wint4",
    "block_wise_fp8",
    "{\"quantization\":\"mix_quant\",\"dense_quant_type\":\"wint4\",\"moe_quant_type\":\"block_wise_fp8\"}",
};

/* ---- the same weights, widened ------------------------------------------------------------------------------------
 */

typedef struct wide {
    ern_model m;
    ern_layer layer[8];
    ern_ffn expert[8][16];
    float *owned[1024];
    int n_owned;
} wide;

static ern_linear widen(wide *x, const ern_linear *w) {
    if (!w->data || w->order != ERN_ORDER_TILED) return *w;
    float *f = malloc((size_t)w->n_out * (size_t)w->n_in * sizeof *f);
    assert_true(f && x->n_owned < 1024);
    x->owned[x->n_owned++] = f;
    for (int32_t o = 0; o < w->n_out; o++)
        for (int32_t i = 0; i < w->n_in; i++) f[o * w->n_in + i] = ern_linear_at(w, o, i);
    return (ern_linear){.data = f,
                        .dtype = ERN_DTYPE_F32,
                        .order = ERN_ORDER_OUT_IN,
                        .n_out = w->n_out,
                        .n_in = w->n_in,
                        .stride = w->n_in};
}

static ern_ffn widen_ffn(wide *x, const ern_ffn *f) {
    return (ern_ffn){widen(x, &f->gate), widen(x, &f->up), widen(x, &f->down)};
}

static void widen_all(wide *x, const ern_model *m) {
    x->m = *m;
    x->n_owned = 0;
    for (int32_t i = 0; i < m->config.n_layer; i++) {
        ern_layer *l = &x->layer[i];
        *l = m->layer[i];
        l->q = widen(x, &l->q), l->k = widen(x, &l->k), l->v = widen(x, &l->v), l->o = widen(x, &l->o);
        l->ffn = widen_ffn(x, &l->ffn), l->shared = widen_ffn(x, &l->shared);
        for (int32_t e = 0; l->is_moe && e < m->config.n_expert; e++)
            x->expert[i][e] = widen_ffn(x, &m->layer[i].expert[e]);
        l->expert = x->expert[i];
    }
    x->m.layer = x->layer;
    x->m.head = widen(x, &m->head);
}

/* ---- running ------------------------------------------------------------------------------------------------------
 */

/* What one text showed, whoever else was in the step. */
typedef struct seen {
    float logits[N][V], norm[N][D_MAX], in[N][D_MAX], v[N][D_MAX]; /* in, v: of layer 1 */
    int32_t from, n;
} seen;

static void see(void *ud, const char *stage, int32_t layer, int32_t row, const float *x, int32_t n_row, int32_t n_col) {
    seen *s = ud;
    if (strcmp(stage, "logits") == 0 && row < s->n) memcpy(s->logits[s->from + row], x, (size_t)n_col * sizeof *x);
    if (strcmp(stage, "norm") == 0 && row < s->n) memcpy(s->norm[s->from + row], x, (size_t)n_col * sizeof *x);
    if (layer != 1 || row != 0) return;
    for (int32_t t = 0; t < n_row && t < s->n; t++) {
        if (strcmp(stage, "attn_norm") == 0) memcpy(s->in[s->from + t], x + t * n_col, (size_t)n_col * sizeof *x);
        if (strcmp(stage, "v") == 0) memcpy(s->v[s->from + t], x + t * n_col, (size_t)n_col * sizeof *x);
    }
}

/* One text of N tokens in the given pieces, each beside a neighbour when `crowd`. */
static void run(const ern_model *m, bool act_exact, const int32_t *cut, bool crowd, seen *out) {
    static step s;
    static const int32_t page[STEP_PAGES] = {0, 1, 2}, other[STEP_PAGES] = {3, 4, 5};
    const ern_backend_options o = {.n_page = 6,
                                   .n_page_cell = 16,
                                   .n_row_max = 128,
                                   .n_seq_max = 2,
                                   .n_want_max = 128,
                                   .n_len_max = 64,
                                   .kv_dtype = ERN_KV_F32,
                                   .act_exact = act_exact};
    int32_t text[N + 1];
    ern_backend *b;
    ern_err err;
    for (int i = 0; i <= N; i++) text[i] = (int32_t)(ern_counter64(5, (uint64_t)i) % V);
    made_check(ref_backend_ops.open(&b, m, &o, &err), &err, "opening ref");
    b->ops->probe(b, see, out);
    for (int32_t from = 0; from < N; from = *cut++) {
        out->from = from, out->n = *cut - from;
        step_clear(&s);
        step_add(&s, text, from, *cut, page, 16, true);
        if (crowd) step_add(&s, text + 1, 0, 7, other, 16, true);
        (void)step_run(b, &s, &o, V);
    }
    b->ops->close(b);
}

static const int32_t whole[] = {N}, pieces[] = {1, 3, 20, N};

/* ---- 9.3 once more, in double and from the definitions -------------------------------------------------------------
 */

static float twin(const ern_linear *w, const float *x, int32_t o) {
    double y = 0;
    for (int32_t g = 0; g * 128 < w->n_in; g++) {
        const int32_t from = g * 128, n = w->n_in - from < 128 ? w->n_in - from : 128;
        int8_t q[128];
        uint8_t f[128];
        float scale;
        double sum = 0;
        if (w->dtype == ERN_DTYPE_F8E4M3)
            quant_act_fp8(f, &scale, x + from, n);
        else
            quant_act_int8(q, &scale, x + from, n);
        for (int32_t i = 0; i < n; i++)
            sum += (w->dtype == ERN_DTYPE_F8E4M3 ? (double)ern_e4m3_to_f32(f[i]) : (double)q[i]) *
                   (double)quant_code_at(w, o, from + i);
        y += (double)scale * (double)quant_scale_at(w, o, g) * sum;
    }
    return (float)y;
}

static void check_format(const char *shape, const char *text) {
    static seen exact, plain, quantized, crowd;
    static wide x;
    const made_model made = made_model_open(shape, true, 3);
    ern_quant_plan p;
    ern_model *m;
    ern_err err;
    made_check(ern_quant_parse(&p, text, NULL, &err), &err, "reading a format");
    made_check(ern_model_open(&m, &(ern_model_options){.dir = made.dir, .quant = &p}, &err), &err, "opening");
    const int32_t D = m->config.n_hidden, n_kv = m->config.n_kv_head * m->config.n_head_dim;
    assert_true(D <= D_MAX && n_kv <= D_MAX);
    widen_all(&x, m);
    run(m, true, whole, false, &exact);
    run(&x.m, true, whole, false, &plain);
    assert_memory_equal(exact.logits, plain.logits, sizeof exact.logits);
    run(m, false, whole, false, &quantized);
    run(m, false, pieces, true, &crowd);
    assert_memory_equal(quantized.logits, crowd.logits, sizeof crowd.logits);
    assert_memory_not_equal(quantized.logits, exact.logits, sizeof exact.logits);
    for (int32_t t = 0; t < N; t += 7) {
        for (int32_t i = 0; i < n_kv; i++) assert_true(quantized.v[t][i] == twin(&m->layer[1].v, quantized.in[t], i));
        for (int32_t i = 0; i < V; i += 13) assert_true(quantized.logits[t][i] == twin(&m->head, quantized.norm[t], i));
    }
    for (int i = 0; i < x.n_owned; i++) free(x.owned[i]);
    ern_model_close(m);
    ern_model_close(made.model);
    made_dir_remove(made.dir);
}

static void each_format(void **state) {
    (void)state;
    for (size_t k = 0; k < sizeof format / sizeof *format; k++) {
        check_format("tiny-dense", format[k]);
        check_format("tiny-moe", format[k]);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(each_format)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
