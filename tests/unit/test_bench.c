/* The benchmarks' arithmetic: percentiles, arrivals, prompts, counts of a step, the result's JSON and SVG. No clock is
 * looked at. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "base/jsonr.h"
#include "cli/bench_count.h"
#include "cli/bench_prompts.h"
#include "cli/bench_report.h"
#include "cli/bench_stats.h"

static void near_to(double got, double want, double within) {
    if (!(fabs(got - want) <= within)) fail_msg("%.12g, expected %.12g within %g", got, want, within);
}

/* ---- statistics -------------------------------------------------------------------------------------------------- */

/* Values that numpy.percentile, mean and std give for [4, 1, 3, 2]; exact to a few roundings of numbers below 8. */
static void test_summary_is_numpys(void **state) {
    (void)state;
    double v[] = {4, 1, 3, 2};
    const bench_summary s = bench_summarize(v, 4);
    near_to(s.mean, 2.5, 1e-14);
    near_to(s.std, 1.118033988749895, 1e-14);
    near_to(s.median, 2.5, 0);
    near_to(bench_percentile(v, 4, 90), 3.7, 1e-14);
    near_to(bench_percentile(v, 4, 99), 3.97, 1e-14);
    near_to(bench_percentile(v, 4, 0), 1, 0);
    near_to(bench_percentile(v, 4, 100), 4, 0);
    near_to(bench_percentile(v, 1, 99), 1, 0);
    assert_true(s.least == 1 && s.most == 4 && s.n == 4);
    const bench_summary none = bench_summarize(v, 0);
    assert_true(none.mean == 0 && none.median == 0 && none.std == 0);
}

/* The gaps of a seed are the same each time, and their mean and spread are those of a gamma of shape b and mean 1/rate.
 * The mean of n draws has a standard deviation of 1/(rate sqrt(n b)); six of them is chance's one in 5e8, and the draws
 * are fixed, so this passes always or never. The squared spread's own deviation is about sqrt((2 + 6/b)/n) of it. */
static void test_arrivals(void **state) {
    (void)state;
    const double rate = 8;
    const int n = 20000;
    static double gap[20000];
    for (double b = 0.25; b <= 16; b *= 4) {
        for (int i = 0; i < n; i++) {
            gap[i] = bench_arrival_gap_s(7, (uint64_t)i, rate, b);
            assert_true(gap[i] > 0 && isfinite(gap[i]));
            assert_true(bench_arrival_gap_s(7, (uint64_t)i, rate, b) == gap[i]);
        }
        const bench_summary s = bench_summarize(gap, (size_t)n);
        near_to(s.mean, 1 / rate, 6 / (rate * sqrt(n * b)));
        near_to(s.std * s.std * rate * rate * b, 1, 6 * sqrt((2 + 6 / b) / n));
    }
    assert_true(bench_arrival_gap_s(7, 1, (double)INFINITY, 1) == 0);
    assert_true(bench_arrival_gap_s(7, 1, rate, 1) != bench_arrival_gap_s(8, 1, rate, 1));
}

static void test_lengths(void **state) {
    (void)state;
    int32_t least = 1000, most = 0;
    for (uint64_t i = 0; i < 2000; i++) {
        assert_int_equal(bench_length(3, i, 77, 0), 77);
        const int32_t n = bench_length(3, i, 100, 0.1);
        least = n < least ? n : least;
        most = n > most ? n : most;
    }
    assert_int_equal(least, 90); /* of 21 lengths none stays undrawn in 2000 draws of this seed */
    assert_int_equal(most, 110);
    assert_int_equal(bench_length(3, 0, 1, 0.9) >= 1, 1);
}

static void test_lists(void **state) {
    (void)state;
    double v[3];
    int n = 0;
    ern_err err;
    assert_int_equal(bench_list("batch", "1,16", 1, 64, v, 3, &n, &err), ERN_OK);
    assert_true(n == 2 && v[0] == 1 && v[1] == 16);
    static const char *const bad[] = {"", "1,", "a", "1 2", "0", "65", "1,2,3,4", "nan"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(bench_list("batch", bad[i], 1, 64, v, 3, &n, &err), ERN_ERR_USAGE);
        assert_non_null(strstr(err.text, "--batch"));
    }
}

/* ---- prompts ----------------------------------------------------------------------------------------------------- */

static json_t *body_of(const bench_prompts *p, int64_t i) {
    ern_buf b;
    json_t *v = NULL;
    ern_err err;
    ern_buf_init(&b, BENCH_BODY_MAX);
    bench_prompts_body(p, i, &b);
    if (ern_json_parse(&v, b.data, b.len, 16, "body", &err) != ERN_OK) fail_msg("%s", err.text);
    ern_buf_free(&b);
    return v;
}

static void test_random_bodies(void **state) {
    (void)state;
    bench_prompts p = {.model = "m\"x",
                       .seed = 5,
                       .n_in = 40,
                       .n_out = 9,
                       .n_vocab = 100,
                       .ignore_eos = true,
                       .top_p = (double)NAN,
                       .top_k = 3};
    json_t *a = body_of(&p, 0), *again = body_of(&p, 0), *b = body_of(&p, 1);
    assert_true(json_equal(a, again));
    assert_false(json_equal(a, b));
    assert_string_equal(json_string_value(json_object_get(a, "model")), "m\"x");
    assert_int_equal(json_array_size(json_object_get(a, "prompt")), 40);
    for (size_t i = 0; i < 40; i++) {
        const json_int_t id = json_integer_value(json_array_get(json_object_get(a, "prompt"), i));
        assert_true(id >= 10 && id < 100);
    }
    assert_int_equal(json_integer_value(json_object_get(a, "max_tokens")), 9);
    assert_int_equal(json_integer_value(json_object_get(a, "top_k")), 3);
    assert_null(json_object_get(a, "top_p"));
    assert_true(json_is_true(json_object_get(a, "ignore_eos")) && json_is_true(json_object_get(a, "stream")));
    assert_true(json_is_true(json_object_get(json_object_get(a, "stream_options"), "include_usage")));
    p.chat = true;
    json_t *chat = body_of(&p, 0);
    const char *said =
        json_string_value(json_object_get(json_array_get(json_object_get(chat, "messages"), 0), "content"));
    int words = 1;
    for (const char *c = said; *c; c++) words += *c == ' ';
    assert_int_equal(words, 40);
    json_decref(a), json_decref(again), json_decref(b), json_decref(chat);
}

static void test_file_bodies(void **state) {
    (void)state;
    static const char lines[] =
        "A plain line\r\n\n{\"prompt\": \"two\", \"max_tokens\": 4}\n"
        "{\"messages\": [{\"role\": \"user\", \"content\": \"three\"}]}\n{\"prompt\": [11, 12]}";
    static const char talk[] =
        " [{\"conversations\": []}, {\"conversations\": [{\"from\": \"human\", \"value\": \"hey\"}, "
        "{\"from\": \"gpt\", \"value\": \"ho\"}]}]";
    ern_err err;
    bench_prompts p = {.model = "m", .n_out = 7, .top_p = 0.5, .top_k = -1};
    p.row = bench_prompts_parse(lines, sizeof lines - 1, "lines", &err);
    assert_int_equal(json_array_size(p.row), 4);
    static const char *const want[] = {"\"A plain line\"", "\"two\"", "\"three\"", "[11,12]"};
    static const int most[] = {7, 4, 7, 7};
    for (int i = 0; i < 8; i++) { /* it begins again at the end */
        json_t *b = body_of(&p, i);
        char *prompt = json_dumps(json_object_get(b, "prompt"), JSON_COMPACT | JSON_ENCODE_ANY);
        assert_string_equal(prompt, want[i % 4]);
        assert_int_equal(json_integer_value(json_object_get(b, "max_tokens")), most[i % 4]);
        free(prompt);
        json_decref(b);
    }
    p.chat = true;
    json_t *b = body_of(&p, 2);
    assert_string_equal(
        json_string_value(json_object_get(json_array_get(json_object_get(b, "messages"), 0), "content")), "three");
    json_decref(b);
    bench_prompts_close(&p);
    p.row = bench_prompts_parse(talk, sizeof talk - 1, "talk", &err);
    assert_int_equal(json_array_size(p.row), 1);
    b = body_of(&p, 0);
    assert_string_equal(
        json_string_value(json_object_get(json_array_get(json_object_get(b, "messages"), 0), "content")), "hey");
    json_decref(b);
    bench_prompts_close(&p);
    static const char *const bad[] = {"", "\n\n", "{\"prompt\": 3}", "{", "[1, 2]", "ok\n{\"x\": 1}\n"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_null(bench_prompts_parse(bad[i], strlen(bad[i]), "bad.jsonl", &err));
        assert_non_null(strstr(err.text, "bad.jsonl"));
    }
    assert_non_null(strstr(err.text, "line 2"));
}

/* ---- results ----------------------------------------------------------------------------------------------------- */

/* Three good requests and a failed one: times are chosen so that every figure can be said by hand. */
static bench_record record[4];
static double itl[2] = {0.010, 0.030};

static bench_run made_run(void) {
    memset(record, 0, sizeof record);
    record[0] = (bench_record){
        .begun = true, .good = true, .ttft_s = 0.1, .e2el_s = 0.3, .itl_s = itl, .n_itl = 2, .n_in = 10, .n_out = 3};
    record[1] =
        (bench_record){.begun = true, .good = true, .begin_s = 1, .ttft_s = 0.2, .e2el_s = 0.6, .n_in = 20, .n_out = 5};
    record[2] =
        (bench_record){.begun = true, .good = true, .begin_s = 1, .ttft_s = 0.3, .e2el_s = 1, .n_in = 30, .n_out = 1};
    record[3] = (bench_record){.begun = true, .error = "status 500 <&>"};
    return (bench_run){.record = record, .n = 4, .peak = 2, .duration_s = 2};
}

static void test_sums(void **state) {
    (void)state;
    static const char *const goodput[] = {"ttft:250,e2el:1000", "tpot:99"};
    bench_wish w;
    bench_sum s;
    ern_err err;
    const bench_run run = made_run();
    assert_int_equal(bench_wish_read(&w, "ttft,tpot,itl", "50,90", goodput, 2, &err), ERN_OK);
    assert_int_equal(bench_sum_make(&s, &run, &w, &err), ERN_OK);
    assert_true(s.completed == 3 && s.failed == 1 && s.total_in == 60 && s.total_out == 9);
    near_to(s.requests_per_s, 1.5, 1e-12);
    near_to(s.out_per_s, 4.5, 1e-12);
    near_to(s.tokens_per_s, 34.5, 1e-12);
    near_to(s.ms[BENCH_TTFT].mean, 200, 1e-9);
    near_to(s.percentile_ms[BENCH_TTFT][1], 280, 1e-9);
    near_to(s.ms[BENCH_TPOT].mean, 100, 1e-9); /* 200 ms over 2 and 400 ms over 4; the reply of one token has none */
    assert_int_equal(s.ms[BENCH_TPOT].n, 2);
    near_to(s.ms[BENCH_ITL].mean, 20, 1e-9);
    near_to(s.ms[BENCH_E2EL].most, 1000, 1e-9);
    assert_int_equal(s.n_good, 0); /* 100 ms of TPOT are above 99, and the third waits 300 ms */
    assert_string_equal(s.first_error, "status 500 <&>");
    static const char *const loose[] = {"tpot:101,e2el:700"};
    assert_int_equal(bench_wish_read(&w, "ttft", "99", loose, 1, &err), ERN_OK);
    assert_int_equal(bench_sum_make(&s, &run, &w, &err), ERN_OK);
    assert_int_equal(s.n_good, 2);
    static const char *const bad[] = {"ttft", "ttft:", "ttft:0", "itl:5", "x:5", "ttft:5;tpot:6"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(bench_wish_read(&w, "ttft", "99", &bad[i], 1, &err), ERN_ERR_USAGE);
    assert_int_equal(bench_wish_read(&w, "ttft,x", "99", NULL, 0, &err), ERN_ERR_USAGE);
    assert_int_equal(bench_wish_read(&w, "ttft", "101", NULL, 0, &err), ERN_ERR_USAGE);
}

static void test_json_has_the_known_names(void **state) {
    (void)state;
    bench_wish w;
    bench_sum s;
    ern_err err;
    ern_buf b;
    json_t *v = NULL;
    const bench_run run = made_run();
    const bench_about about = {.date = "20261124-120000",
                               .backend = "openai",
                               .model = "m",
                               .url = "http://h",
                               .commit = "c",
                               .rate = (double)INFINITY,
                               .burstiness = 1};
    assert_int_equal(bench_wish_read(&w, "ttft,tpot,itl,e2el", "90,99.9", NULL, 0, &err), ERN_OK);
    assert_int_equal(bench_sum_make(&s, &run, &w, &err), ERN_OK);
    ern_buf_init(&b, 1 << 20);
    bench_json(&b, &about, &s, &w, &run);
    if (ern_json_parse(&v, b.data, b.len, 16, "result", &err) != ERN_OK) fail_msg("%s", err.text);
    static const char *const names[] = {"date",
                                        "endpoint_type",
                                        "backend",
                                        "model_id",
                                        "tokenizer_id",
                                        "num_prompts",
                                        "request_rate",
                                        "burstiness",
                                        "max_concurrency",
                                        "duration",
                                        "completed",
                                        "failed",
                                        "total_input_tokens",
                                        "total_output_tokens",
                                        "request_throughput",
                                        "request_goodput",
                                        "output_throughput",
                                        "total_token_throughput",
                                        "mean_ttft_ms",
                                        "median_ttft_ms",
                                        "std_ttft_ms",
                                        "p90_ttft_ms",
                                        "p99.9_ttft_ms",
                                        "mean_tpot_ms",
                                        "p90_tpot_ms",
                                        "mean_itl_ms",
                                        "std_itl_ms",
                                        "mean_e2el_ms",
                                        "p99.9_e2el_ms",
                                        "input_lens",
                                        "output_lens",
                                        "ttfts",
                                        "itls",
                                        "errors"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!json_object_get(v, names[i])) fail_msg("no %s", names[i]);
    assert_string_equal(json_string_value(json_object_get(v, "request_rate")), "inf");
    assert_true(json_is_null(json_object_get(v, "request_goodput")) &&
                json_is_null(json_object_get(v, "max_concurrency")));
    assert_int_equal(json_array_size(json_object_get(v, "errors")), 4);
    json_decref(v);
    ern_buf_free(&b);
}

/* Every tag that opens closes, numbers are numbers, and what a model is called is text. */
static void test_svg(void **state) {
    (void)state;
    const bench_point p[] = {{10, 5, 9, 1}, {36, 8, 20, 4}, {61.5, 30, 123, 16}}, flat[] = {{0, 0, 0, 1}};
    ern_buf b;
    ern_buf_init(&b, 1 << 20);
    for (int which = 0; which < 2; which++) {
        ern_buf_clear(&b);
        bench_svg(&b, "m<x> & co", which ? flat : p, which ? flat : p, which ? 1 : 3);
        assert_false(b.full);
        assert_memory_equal(b.data, "<svg ", 5);
        assert_non_null(strstr(b.data, "m&lt;x&gt; &amp; co"));
        assert_non_null(strstr(b.data, "</svg>\n"));
        assert_null(strstr(b.data, "nan"));
        assert_null(strstr(b.data, "inf\""));
        assert_null(strstr(b.data, "<script"));
        int open = 0;
        for (const char *c = b.data; *c; c++) {
            if (*c == '<') open += c[1] == '/' ? -1 : 1;
            if (*c == '/' && c[1] == '>') open--;
            assert_true(open >= 0);
        }
        assert_int_equal(open, 0);
    }
    ern_buf_free(&b);
}

/* ---- counts ------------------------------------------------------------------------------------------------------ */

/* A model of one dense and one MoE layer, whose sizes are told by hand: every linear is 4 x 6 bf16, 48 bytes. */
static const ern_bf16 some[24];
static ern_linear small(void) {
    return (ern_linear){
        .data = some, .dtype = ERN_DTYPE_BF16, .order = ERN_ORDER_OUT_IN, .n_out = 4, .n_in = 6, .stride = 6};
}

static void test_counts(void **state) {
    (void)state;
    const ern_ffn f = {small(), small(), small()};
    const ern_ffn expert[3] = {f, f, f};
    const float router[3 * 6] = {0}, bias[3] = {0, 0, 1};
    const ern_layer layer[2] = {{.q = small(), .k = small(), .v = small(), .o = small(), .ffn = f},
                                {.q = small(),
                                 .k = small(),
                                 .v = small(),
                                 .o = small(),
                                 .is_moe = true,
                                 .router = router,
                                 .router_bias = bias,
                                 .expert = expert,
                                 .shared = f}};
    const ern_model m = {.config = {.n_layer = 2,
                                    .n_hidden = 6,
                                    .n_head = 4,
                                    .n_kv_head = 2,
                                    .n_head_dim = 8,
                                    .n_expert = 3,
                                    .n_expert_used = 2},
                         .layer = layer,
                         .head = small()};
    const double dense = (4 + 3 + 4 + 3) * 48 + 3 * 6 * 4, position = 2 * 2 * 2 * 8 * 2;
    const bench_work w = {
        .n_row = 5, .n_want = 2, .experts = 3, .kv_read = 40, .kv_write = 5, .kv_bytes = position, .pairs = 100};
    near_to(bench_bytes(&m, &w), dense + 48 + 3 * 3 * 48 + 45 * position, 0);
    const double row = (4 + 3 + 4 + 3) * 24 + 18 + 2 * 3 * 24;
    near_to(bench_operations(&m, &w), 2 * (5 * row + 2 * 24 + 100 * 2.0 * 2 * 4 * 8), 0);
    bench_work leaving = w; /* three of five rows are spared q, o, router, shared and two routed experts of one layer */
    leaving.leaves = true, leaving.want_pairs = 60;
    near_to(bench_operations(&m, &leaving),
            bench_operations(&m, &w) - 2 * (3 * ((2 + 3 + 2 * 3) * 24 + 18) + 40 * 2.0 * 4 * 8), 0);
    near_to(bench_bytes(&m, &leaving), bench_bytes(&m, &w), 0);    /* the wanted rows pass all that there is */
    near_to(bench_bytes(&m, &(bench_work){.n_row = 1}), dense, 0); /* no row wanted: the head is not read */
    bench_work none = leaving; /* and where all leave, q, o, router, shared and KV of one layer are not, either */
    none.n_want = none.want_pairs = 0;
    near_to(bench_bytes(&m, &none), dense - (2 + 3) * 48 - 3 * 6 * 4 + 3 * 3 * 48 + (40 / 2 + 5) * position, 0);
    near_to(bench_operations(&m, &none), 2 * (5 * (row - (2 + 3 + 2 * 3) * 24 - 18) + 100 * 2.0 * 4 * 8), 0);
    ern_model short_one = m; /* of one dense layer: its k and v */
    short_one.config.n_layer = 1, none.experts = 0;
    near_to(bench_bytes(&short_one, &none), 2 * 48 + 5 * position, 0);
    near_to(bench_operations(&short_one, &none), 2 * 5 * 2 * 24, 0);
    assert_int_equal(bench_dtype(&m), ERN_DTYPE_BF16);

    /* By logits alone rows 0 and 1 choose {0, 1}; the bias of expert 2 beats any probability. */
    const float logits[6] = {3, 2, 1, 2, 3, 1};
    bool touched[3] = {false};
    assert_int_equal(bench_touch_experts(&m, 1, logits, 1, touched), 2);
    assert_true(touched[0] && !touched[1] && touched[2]);
    assert_int_equal(bench_touch_experts(&m, 1, logits + 3, 1, touched), 1);
    assert_int_equal(bench_touch_experts(&m, 1, logits, 2, touched), 0);
}

/* 3 GB more in half a second more, of a limit of 8 GB/s. Time that is not there is no slow reading, and bytes that come
 * faster than the limit's own noise allows are no reading: the worst of several runs is a finite one, if there is any.
 */
static void test_share_added(void **state) {
    (void)state;
    near_to(bench_share_added(3e9, 0.5, 8e9), 0.75, 1e-15);
    assert_true(isinf(bench_share_added(3e9, 0, 8e9)) && isinf(bench_share_added(3e9, -1e-6, 8e9)));
    near_to(bench_share_added(5e9, 0.5, 8e9), BENCH_SHARE_MOST, 0);
    assert_true(isinf(bench_share_added(5.01e9, 0.5, 8e9)) && isinf(bench_share_added(3e9, 1e-6, 8e9)));
    assert_true(isinf(bench_share_added(3e9, 0.5, 0)) && bench_share_added(3e9, 0, 8e9) > 0.75);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_summary_is_numpys),
        cmocka_unit_test(test_arrivals),
        cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_lists),
        cmocka_unit_test(test_random_bodies),
        cmocka_unit_test(test_file_bodies),
        cmocka_unit_test(test_sums),
        cmocka_unit_test(test_json_has_the_known_names),
        cmocka_unit_test(test_svg),
        cmocka_unit_test(test_counts),
        cmocka_unit_test(test_share_added),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
