/* The demo models that ship with ernest: their held-out likelihood is what PyTorch found for the same weights, and they
 * answer the twenty prompts of models/prompts.json, greedily, through chat format, tokenizer and engine.
 *
 * Bound of the likelihood. Both sides compute docs/model.md; PyTorch in f32. A token's negative log-likelihood moves
 * with its logits as dNLL = sum_i (p_i - y_i) d_i. For errors d_i of deviation s that has the variance s^2 ((1 - p)^2 +
 * sum of the other p_i^2) <= 2 s^2 (1 - p)^2, p the token's own probability; the second order adds at most s^2 p (1 -
 * p). Errors of different tokens add in quadrature, so with Q = sum 2 (1 - p)^2 and R = sum p (1 - p) over the tokens
 *
 *     |total - PyTorch's| <= SIGMAS s sqrt(Q) + s^2 R .
 *
 * s is the relative error of the residual stream times the deviation of the logits (measured here). Each of the 2 L
 * blocks adds step = eps (1 + 2 sqrt(N / 24)), N its widest sum (tests/golden/golden.c argues it), in quadrature,
 * amplified by GROWTH: s = GROWTH sqrt(2 L) step. With a bf16 cache the attention blocks also carry the rounding of K
 * and V, uniform with deviation 2^-8 / sqrt(12) of each element: s grows by GROWTH sqrt(L) 2^-8 / sqrt(12). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/jsonr.h"
#include "engine/engine.h"
#include "made_model.h"
#include "step.h"
#include "text/text.h"

static const double SIGMAS = 6, GROWTH = 4;

/* Sum over rows of the variance of their logits, filled by the probe. */
typedef struct spread {
    double variance;
    int64_t n;
} spread;

static void see_logits(void *ud, const char *stage, int32_t layer, int32_t row, const float *x, int32_t n_row,
                       int32_t n_col) {
    (void)layer, (void)row;
    spread *s = ud;
    if (strcmp(stage, "logits") != 0 || n_row != 1) return;
    double sum = 0, squares = 0;
    for (int32_t i = 0; i < n_col; i++) sum += (double)x[i], squares += (double)x[i] * (double)x[i];
    s->variance += squares / n_col - sum * sum / n_col / n_col;
    s->n++;
}

static ern_model *open_model(const char *name) {
    char dir[64];
    (void)snprintf(dir, sizeof dir, "models/%s", name);
    ern_model *m;
    ern_err err;
    if (ern_model_open(&m, &(ern_model_options){.dir = dir}, &err) != ERN_OK) fail_msg("%s", err.text);
    return m;
}

static json_t *read_json(const char *path) {
    json_t *doc;
    ern_err err;
    if (ern_json_parse_file(&doc, path, 1 << 20, 16, &err) != ERN_OK) fail_msg("%s", err.text);
    return doc;
}

typedef struct likelihood {
    double nll, q, r;
    int64_t n;
} likelihood;

/* One conversation, teacher-forced: every token from `from` on is asked for at the row before it. */
static void add_sample(ern_backend *b, const ern_backend_options *o, const ern_model *m, const json_t *sample,
                       likelihood *sum) {
    static step s;
    static const int32_t page[STEP_PAGES] = {0, 1, 2, 3, 4, 5, 6, 7};
    const json_t *ids = json_object_get(sample, "ids");
    int32_t n = (int32_t)json_array_size(ids), from = (int32_t)json_integer_value(json_object_get(sample, "from"));
    int32_t text[STEP_ROWS];
    assert_true(n > from && from > 0 && n < STEP_ROWS);
    for (int32_t i = 0; i < n; i++) text[i] = (int32_t)json_integer_value(json_array_get(ids, (size_t)i));
    step_clear(&s);
    step_add(&s, text, 0, n - 1, page, 64, true);
    for (int32_t w = 0; w < s.in.n_want; w++) {
        s.sample[w].forced = text[w + 1];
        s.sample[w].n_top = 0;
    }
    ern_result got = step_run(b, &s, o, m->config.n_vocab);
    for (int32_t w = from - 1; w < n - 1; w++) {
        double lp = (double)got.sampled[w].logprob, p = exp(lp);
        assert_false(got.sampled[w].bad);
        sum->nll -= lp;
        sum->q += 2 * (1 - p) * (1 - p);
        sum->r += p * (1 - p);
        sum->n++;
    }
}

static void check_likelihood(const char *name, const char *backend, ern_kv_dtype kv) {
    ern_model *m = open_model(name);
    json_t *doc = read_json("models/heldout.json");
    const json_t *want = json_object_get(json_object_get(doc, "models"), name);
    ern_backend_options o = {.n_page = 8,
                             .n_page_cell = 64,
                             .n_row_max = STEP_ROWS,
                             .n_seq_max = 1,
                             .n_want_max = STEP_ROWS,
                             .n_len_max = 512,
                             .kv_dtype = kv,
                             .level = -1,
                             .n_thread = 2};
    ern_backend *b;
    ern_err err;
    if (ern_backend_find(backend)->open(&b, m, &o, &err) != ERN_OK) fail_msg("%s", err.text);
    spread logits = {0};
    b->ops->probe(b, see_logits, &logits);
    likelihood sum = {0};
    const json_t *samples = json_object_get(doc, "samples");
    for (size_t i = 0; i < json_array_size(samples); i++) add_sample(b, &o, m, json_array_get(samples, i), &sum);
    const ern_config *c = &m->config;
    int32_t N = c->n_ffn > c->n_head * c->n_head_dim ? c->n_ffn : c->n_head * c->n_head_dim;
    double L = c->n_layer, deviation = sqrt(logits.variance / (double)logits.n);
    double s = GROWTH * sqrt(2 * L) * ldexp(1, -23) * (1 + 2 * sqrt(N / 24.0));
    if (kv == ERN_KV_BF16) s += GROWTH * sqrt(L) * ldexp(1, -8) / sqrt(12);
    s *= deviation;
    double bound = SIGMAS * s * sqrt(sum.q) + s * s * sum.r;
    double torch = json_real_value(json_object_get(want, "nll"));
    print_message("%s on %s: %lld tokens, NLL %.6f, PyTorch %.6f, apart %.2e, bound %.2e\n", name, backend,
                  (long long)sum.n, sum.nll, torch, fabs(sum.nll - torch), bound);
    assert_int_equal(sum.n, json_integer_value(json_object_get(want, "tokens")));
    assert_true(torch > 1 && fabs(sum.nll - torch) <= bound);
    b->ops->close(b);
    json_decref(doc);
    ern_model_close(m);
}

static void likelihoods(void **state) {
    (void)state;
    static const char *const name[] = {"demo-dense", "demo-moe"};
    for (int i = 0; i < 2; i++) {
        check_likelihood(name[i], "ref", ERN_KV_F32);
        check_likelihood(name[i], "cpu", ERN_KV_BF16);
    }
}

/* ---- int8 KV ----------------------------------------------------------------------------------------------------- */

enum { KL_ROWS = 128 };

/* The logits of one sample's rows in bf16 KV, and what those of int8 KV are apart from them. */
typedef struct apart {
    float *logits; /* [KL_ROWS, V] */
    bool compare;
    double kl, variance; /* sums over rows: KL divergence, variance of the logits */
    int64_t n;
} apart;

static void see_apart(void *ud, const char *stage, int32_t layer, int32_t row, const float *x, int32_t n_row,
                      int32_t n_col) {
    (void)layer;
    apart *s = ud;
    if (strcmp(stage, "logits") != 0 || n_row != 1) return;
    assert_true(row < KL_ROWS);
    float *p = s->logits + (size_t)row * (size_t)n_col;
    if (!s->compare) {
        memcpy(p, x, (size_t)n_col * sizeof *x);
        return;
    }
    double sum_p = 0, sum_q = 0, top_p = -INFINITY, top_q = -INFINITY, sum = 0, squares = 0, kl = 0;
    for (int32_t i = 0; i < n_col; i++) top_p = fmax(top_p, (double)p[i]), top_q = fmax(top_q, (double)x[i]);
    for (int32_t i = 0; i < n_col; i++) sum_p += exp((double)p[i] - top_p), sum_q += exp((double)x[i] - top_q);
    const double lse_p = top_p + log(sum_p), lse_q = top_q + log(sum_q);
    for (int32_t i = 0; i < n_col; i++) {
        const double lp = (double)p[i] - lse_p, lq = (double)x[i] - lse_q;
        kl += exp(lp) * (lp - lq);
        sum += (double)p[i], squares += (double)p[i] * (double)p[i];
    }
    s->kl += kl;
    s->variance += squares / n_col - sum * sum / n_col / n_col;
    s->n++;
}

/* Mean KL(bf16 KV || int8 KV) over the held-out text. To second order KL is half the variance, under p, of the errors
 * of the logits, so at most s^2 / 2 with s their deviation as above: GROWTH sqrt(L) step / sqrt(12) times the logits'
 * deviation, step the distance of two codes over the rms of the head: amax / (127 rms) <= sqrt(C) / 127. The mean of so
 * many rows needs no sigmas. */
static void check_kl(const char *name) {
    ern_model *m = open_model(name);
    const ern_config *c = &m->config;
    json_t *doc = read_json("models/heldout.json");
    apart seen = {.logits = malloc(KL_ROWS * (size_t)c->n_vocab * sizeof(float))};
    likelihood sum = {0};
    ern_backend *b[2];
    ern_backend_options o[2];
    for (int int8 = 0; int8 < 2; int8++) {
        o[int8] = (ern_backend_options){.n_page = 8,
                                        .n_page_cell = 64,
                                        .n_row_max = STEP_ROWS,
                                        .n_seq_max = 1,
                                        .n_want_max = STEP_ROWS,
                                        .n_len_max = 512,
                                        .kv_dtype = int8 ? ERN_KV_I8 : ERN_KV_BF16,
                                        .level = -1,
                                        .n_thread = 2};
        ern_err err;
        if (ern_backend_find("cpu")->open(&b[int8], m, &o[int8], &err) != ERN_OK) fail_msg("%s", err.text);
        b[int8]->ops->probe(b[int8], see_apart, &seen);
    }
    const json_t *samples = json_object_get(doc, "samples");
    for (size_t i = 0; i < json_array_size(samples); i++)
        for (int int8 = 0; int8 < 2; int8++) {
            seen.compare = int8;
            add_sample(b[int8], &o[int8], m, json_array_get(samples, i), &sum);
        }
    const double s = GROWTH * sqrt(c->n_layer) * sqrt(c->n_head_dim) / 127 / sqrt(12);
    const double mean = seen.kl / (double)seen.n, bound = s * s / 2 * seen.variance / (double)seen.n;
    print_message("%s: mean KL of int8 KV against bf16 KV %.2e over %lld rows, bound %.2e\n", name, mean,
                  (long long)seen.n, bound);
    assert_true(seen.n > 1000 && mean > 0 && mean <= bound);
    for (int int8 = 0; int8 < 2; int8++) b[int8]->ops->close(b[int8]);
    free(seen.logits);
    json_decref(doc);
    ern_model_close(m);
}

static void int8_kv(void **state) {
    (void)state;
    check_kl("demo-dense");
    check_kl("demo-moe");
}

/* ---- the twenty prompts ---------------------------------------------------------------------------------------- */

static ern_role role_of(const char *name) {
    return strcmp(name, "system") == 0 ? ERN_ROLE_SYSTEM
           : strcmp(name, "user") == 0 ? ERN_ROLE_USER
                                       : ERN_ROLE_ASSISTANT;
}

static void render(const ern_tokenizer *t, ern_chat_format f, const json_t *messages, ern_tokens *out) {
    enum { MESSAGES = 16 };
    ern_chat_message message[MESSAGES];
    ern_chat chat = {.message = message, .n_message = (int)json_array_size(messages), .add_generation_prompt = true};
    ern_err err;
    assert_true(chat.n_message <= MESSAGES);
    for (int i = 0; i < chat.n_message; i++) {
        const json_t *m = json_array_get(messages, (size_t)i), *content = json_object_get(m, "content");
        message[i] = (ern_chat_message){.role = role_of(json_string_value(json_object_get(m, "role"))),
                                        .content = json_string_value(content),
                                        .content_len = json_string_length(content)};
    }
    if (ern_chat_render(t, f, &chat, out, &err) != ERN_OK) fail_msg("%s", err.text);
}

/* The greedy reply to one prompt, as text. */
static void answer(ern_engine *e, const ern_tokenizer *t, const ern_config *c, const ern_tokens *prompt, int32_t max,
                   ern_buf *out) {
    ern_request r = {.prompt = prompt->id,
                     .n_prompt = (int32_t)prompt->n,
                     .max_tokens = max,
                     .sample = {.top_p = 1, .repetition = 1, .forced = -1, .n_top = -1},
                     .stop = c->eos,
                     .n_stop = c->n_eos,
                     .n_prompt_top = -1};
    ern_err err;
    if (ern_engine_submit(e, &r, &err) != ERN_OK) fail_msg("%s", err.text);
    ern_decode d = {0};
    ern_event ev;
    do {
        assert_true(ern_engine_next(e, &ev, 60000000));
        if (ev.kind == ERN_EVENT_TOKEN && !ev.is_stop) ern_decode_token(&d, t, ev.sampled.token, true, out);
    } while (ev.kind != ERN_EVENT_END);
    ern_decode_flush(&d, out);
}

static bool is_right(const json_t *check, const char *text) {
    const char *equal = json_string_value(json_object_get(check, "equals"));
    if (equal) return strcmp(text, equal) == 0;
    const json_t *parts = json_object_get(check, "contains");
    for (size_t i = 0; i < json_array_size(parts); i++)
        if (!strstr(text, json_string_value(json_array_get(parts, i)))) return false;
    return json_array_size(parts) > 0;
}

static void check_prompts(const char *name) {
    ern_model *m = open_model(name);
    ern_tokenizer *t;
    ern_engine *e;
    ern_chat_format f;
    ern_err err;
    if (ern_tokenizer_open(&t, m->dir, &err) != ERN_OK || ern_chat_format_pick(&f, t, m->dir, NULL, &err) != ERN_OK)
        fail_msg("%s", err.text);
    ern_engine_options o = {.backend = ern_backend_find("cpu"),
                            .model = m,
                            .backend_options = {.level = -1, .n_thread = 2},
                            .max_model_len = 1024,
                            .max_num_seqs = 4,
                            .max_batched_tokens = 256,
                            .chunked_prefill = true,
                            .memory_bytes = 1ull << 30,
                            .overlap = true};
    if (ern_engine_open(&e, &o, &err) != ERN_OK) fail_msg("%s", err.text);
    json_t *doc = read_json("models/prompts.json");
    int right = 0, n = (int)json_array_size(doc);
    for (int i = 0; i < n; i++) {
        const json_t *p = json_array_get(doc, (size_t)i);
        ern_tokens prompt;
        ern_buf text;
        ern_tokens_init(&prompt, 1024);
        ern_buf_init(&text, 65536);
        render(t, f, json_object_get(p, "messages"), &prompt);
        answer(e, t, &m->config, &prompt, (int32_t)json_integer_value(json_object_get(p, "max_tokens")), &text);
        bool good = is_right(json_object_get(p, "check"), text.data ? text.data : "");
        if (!good) print_message("%s, %s: %s\n", name, json_string_value(json_object_get(p, "name")), text.data);
        right += good;
        ern_buf_free(&text);
        ern_tokens_free(&prompt);
    }
    print_message("%s: %d of %d right\n", name, right, n);
    assert_int_equal(n, 20);
    assert_true(right >= 18);
    json_decref(doc);
    ern_engine_close(e);
    ern_tokenizer_close(t);
    ern_model_close(m);
}

static void prompts(void **state) {
    (void)state;
    check_prompts("demo-dense");
    check_prompts("demo-moe");
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(likelihoods), cmocka_unit_test(int8_kv),
                                       cmocka_unit_test(prompts)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
