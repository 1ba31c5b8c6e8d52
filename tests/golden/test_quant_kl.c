/* What quantization does to the demo models' predictions, by ref, over the first held-out conversations: the mean
 * Kullback-Leibler divergence, in nats a token,
 *
 *   of the quantized weights from bf16 (activations exact),
 *   of quantized activations from exact ones (the same weights), and
 *   of both from bf16.
 *
 * Bounds: quantized activations must cost at most 1e-3 on wint8 (the project's own requirement). The rest is printed,
 * and held only to what makes it meaningful: all are finite and positive, and int8 is nearer to bf16 than int4.
 * `test_quant_kl DIR [TOKENS]` prints the same for any checkpoint, over made tokens. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/counter.h"
#include "base/jsonr.h"
#include "made_model.h"
#include "step.h"

enum { TOKENS = 50, TOKENS_MAX = 400 };

/* Token ids of whole conversations, and where each ends. */
typedef struct texts {
    int32_t id[TOKENS_MAX], end[TOKENS_MAX];
    int32_t n, n_text;
} texts;

/* Logits [row, V] of one way to compute the texts. */
typedef struct logits {
    float *x;
    int32_t n_row, n_vocab;
    int32_t first; /* row of the step's want 0 */
} logits;

static void keep(void *ud, const char *stage, int32_t layer, int32_t row, const float *x, int32_t n_row,
                 int32_t n_col) {
    logits *l = ud;
    (void)layer;
    if (strcmp(stage, "logits") != 0) return;
    assert_true(n_row == 1 && n_col == l->n_vocab && l->first + row < l->n_row);
    memcpy(l->x + (size_t)(l->first + row) * (size_t)n_col, x, (size_t)n_col * sizeof *x);
}

static logits compute(const char *dir, const ern_quant_plan *plan, bool act_exact, const texts *t) {
    static step s;
    static const int32_t page[STEP_PAGES] = {0, 1, 2, 3, 4, 5, 6, 7};
    ern_model *m;
    ern_backend *b;
    ern_err err;
    made_check(ern_model_open(&m, &(ern_model_options){.dir = dir, .quant = plan}, &err), &err, "opening");
    const ern_backend_options o = {.n_page = 8,
                                   .n_page_cell = 64,
                                   .n_row_max = STEP_ROWS,
                                   .n_seq_max = 1,
                                   .n_want_max = STEP_ROWS,
                                   .n_len_max = 512,
                                   .kv_dtype = ERN_KV_F32,
                                   .act_exact = act_exact};
    made_check(ern_backend_find("ref")->open(&b, m, &o, &err), &err, "opening ref");
    logits l = {.n_row = t->n, .n_vocab = m->config.n_vocab};
    l.x = malloc((size_t)l.n_row * (size_t)l.n_vocab * sizeof *l.x);
    assert_non_null(l.x);
    b->ops->probe(b, keep, &l);
    for (int32_t k = 0; k < t->n_text; l.first = t->end[k++]) {
        int32_t text[TOKENS_MAX + 1] = {0}, n = t->end[k] - l.first;
        memcpy(text, t->id + l.first, (size_t)n * sizeof *text);
        step_clear(&s);
        step_add(&s, text, 0, n, page, 64, true);
        (void)step_run(b, &s, &o, m->config.n_vocab);
    }
    b->ops->close(b);
    ern_model_close(m);
    return l;
}

/* Mean over rows of sum p (ln p - ln q). */
static double divergence(const logits *p, const logits *q) {
    double sum = 0;
    for (int32_t r = 0; r < p->n_row; r++) {
        const float *x = p->x + (size_t)r * (size_t)p->n_vocab, *y = q->x + (size_t)r * (size_t)q->n_vocab;
        double top[2] = {-INFINITY, -INFINITY}, mass[2] = {0, 0}, kl = 0;
        for (int32_t i = 0; i < p->n_vocab; i++)
            top[0] = fmax(top[0], (double)x[i]), top[1] = fmax(top[1], (double)y[i]);
        for (int32_t i = 0; i < p->n_vocab; i++)
            mass[0] += exp((double)x[i] - top[0]), mass[1] += exp((double)y[i] - top[1]);
        for (int32_t i = 0; i < p->n_vocab; i++) {
            const double lp = (double)x[i] - top[0] - log(mass[0]), lq = (double)y[i] - top[1] - log(mass[1]);
            kl += exp(lp) * (lp - lq);
        }
        sum += kl;
    }
    return sum / p->n_row;
}

typedef struct cost {
    double weights, activations, both;
} cost;

static cost measure(const char *dir, const char *format, const char *head, const logits *plain, const texts *t) {
    ern_quant_plan p;
    ern_err err;
    char name[ERN_QUANT_TEXT_BYTES];
    made_check(ern_quant_parse(&p, format, head, &err), &err, "reading a format");
    logits exact = compute(dir, &p, true, t), all = compute(dir, &p, false, t);
    const cost c = {divergence(plain, &exact), divergence(&exact, &all), divergence(plain, &all)};
    print_message("%-20s %-52s weights %.2e, activations %.2e, both %.2e\n", dir, ern_quant_text(name, &p), c.weights,
                  c.activations, c.both);
    free(exact.x);
    free(all.x);
    return c;
}

#define ALL_INT4 "{\"quantization\":\"mix_quant\",\"dense_quant_type\":\"wint4\"}"

/* wint8 without and with the head, wint4 (for a dense model the same as wint8), all int4, fp8. */
static void costs(const char *dir, const texts *t, cost out[5]) {
    static const char *const format[] = {"wint8", "wint8", "wint4", ALL_INT4, "block_wise_fp8"};
    logits plain = compute(dir, NULL, true, t);
    for (int k = 0; k < 5; k++) out[k] = measure(dir, format[k], k == 0 ? "none" : NULL, &plain, t);
    free(plain.x);
}

static texts heldout(void) {
    texts t = {0};
    json_t *doc;
    ern_err err;
    made_check(ern_json_parse_file(&doc, "models/heldout.json", 1 << 20, 16, &err), &err, "reading");
    const json_t *samples = json_object_get(doc, "samples");
    for (size_t i = 0; i < json_array_size(samples) && t.n < TOKENS; i++) {
        const json_t *ids = json_object_get(json_array_get(samples, i), "ids");
        if (t.n + (int32_t)json_array_size(ids) > TOKENS_MAX) break;
        for (size_t k = 0; k < json_array_size(ids); k++)
            t.id[t.n++] = (int32_t)json_integer_value(json_array_get(ids, k));
        t.end[t.n_text++] = t.n;
    }
    json_decref(doc);
    return t;
}

static void demo_models(void **state) {
    (void)state;
    static const char *const dir[] = {"models/demo-dense", "models/demo-moe"};
    const texts t = heldout();
    assert_true(t.n >= TOKENS);
    for (int i = 0; i < 2; i++) {
        cost c[5];
        costs(dir[i], &t, c);
        for (int k = 0; k < 5; k++) assert_true(c[k].weights > 0 && isfinite(c[k].both) && c[k].activations > 0);
        assert_true(c[0].activations <= 1e-3 && c[1].activations <= 1e-3);
        assert_true(c[1].weights < c[3].weights);
    }
}

int main(int argc, char **argv) {
    if (argc > 1) {
        texts t = {.n = argc > 2 ? atoi(argv[2]) : 32, .n_text = 1};
        cost c[5];
        if (t.n < 1 || t.n > TOKENS_MAX) return 2;
        for (int32_t i = 0; i < t.n; i++) t.id[i] = (int32_t)(ern_counter64(1, (uint64_t)i) % 1000);
        t.end[0] = t.n;
        costs(argv[1], &t, c);
        return 0;
    }
    const struct CMUnitTest tests[] = {cmocka_unit_test(demo_models)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
