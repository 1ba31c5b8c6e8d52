/* The server's parts that need no engine: keys, error objects, the field table at its boundaries, metrics text. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "base/jsonr.h"
#include "server/auth.h"
#include "server/fields.h"
#include "server/kv_view.h"
#include "server/metrics.h"

static void sha256_of_known_texts(void **state) {
    (void)state;
    static const struct {
        const char *text, *hex;
    } known[] = {/* FIPS 180-4 examples */
                 {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
                 {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
                 {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
                  "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"}};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        uint8_t d[32];
        char hex[65];
        auth_sha256(known[i].text, strlen(known[i].text), d);
        for (int b = 0; b < 32; b++) (void)snprintf(hex + 2 * b, 3, "%02x", d[b]);
        assert_string_equal(hex, known[i].hex);
    }
    /* a million letters a: many blocks, and the length beyond one of them */
    char *a = malloc(1000000);
    assert_non_null(a);
    memset(a, 'a', 1000000);
    uint8_t d[32];
    auth_sha256(a, 1000000, d);
    free(a);
    static const uint8_t want[4] = {0xcd, 0xc7, 0x6e, 0x5c};
    assert_memory_equal(d, want, 4);
}

static void keys(void **state) {
    (void)state;
    auth_keys k;
    assert_true(auth_open(&k, NULL, 0));
    assert_true(auth_allows(&k, NULL)); /* open */
    static const char *const key[] = {"one", "second-key"};
    assert_true(auth_open(&k, key, 2));
    assert_false(auth_allows(&k, NULL));
    assert_true(auth_allows(&k, "Bearer one"));
    assert_true(auth_allows(&k, "bearer second-key"));
    assert_false(auth_allows(&k, "Bearer two"));
    assert_false(auth_allows(&k, "Bearer one "));
    assert_false(auth_allows(&k, "Bearer"));
    assert_false(auth_allows(&k, "Basic one"));
    assert_false(auth_allows(&k, "one"));
    auth_close(&k);
}

static void error_object(void **state) {
    (void)state;
    api_error e;
    assert_false(api_fail(&e, 429, "too_many_requests", NULL, "say \"%s\"", "no"));
    ern_buf b;
    ern_buf_init(&b, 4096);
    api_error_write(&b, &e);
    assert_string_equal(b.data,
                        "{\"error\":{\"message\":\"say \\\"no\\\"\",\"type\":\"rate_limit_error\",\"param\":null,"
                        "\"code\":\"too_many_requests\"}}");
    ern_buf_free(&b);
}

/* Read {name: value}; true when taken. The error must name the field and say something. */
static bool take(const field *f, unsigned where, json_t *value, params *p) {
    json_t *body = json_object();
    if (where == FIELD_STREAM_OPTIONS) {
        json_t *inner = json_object();
        json_object_set_new(inner, f->name, value);
        json_object_set_new(body, "stream_options", inner);
        json_object_set_new(body, "stream", json_true());
        where = FIELD_CHAT;
    } else {
        json_object_set_new(body, f->name, value);
    }
    if (strcmp(f->name, "stream_options") == 0) json_object_set_new(body, "stream", json_true());
    ern_arena a;
    ern_arena_open(&a, 0);
    api_error e = {0};
    bool ok = fields_read(p, body, where, 1000, &a, &e, NULL, NULL);
    if (!ok) {
        assert_int_equal(e.status, 400);
        assert_string_equal(e.param, f->name);
        assert_true(strlen(e.message) > 10);
        assert_non_null(strstr(e.message, f->name));
        assert_non_null(e.code);
    }
    ern_arena_close(&a);
    json_decref(body);
    return ok;
}

static json_t *texts(int n, size_t bytes) {
    char *t = malloc(bytes + 1);
    assert_non_null(t);
    memset(t, 'x', bytes);
    t[bytes] = 0;
    json_t *list = json_array();
    for (int i = 0; i < n; i++) json_array_append_new(list, json_string(t));
    free(t);
    return list;
}

static json_t *text_of(size_t bytes) {
    json_t *list = texts(1, bytes), *t = json_incref(json_array_get(list, 0));
    json_decref(list);
    return t;
}

static json_t *object_of(int n) {
    json_t *o = json_object();
    for (int i = 0; i < n; i++) {
        char key[32];
        (void)snprintf(key, sizeof key, "k%d", i);
        json_object_set_new(o, key, json_integer(1));
    }
    return o;
}

static json_t *ids_of(int n, int id) {
    json_t *list = json_array();
    for (int i = 0; i < n; i++) json_array_append_new(list, json_integer(id));
    return list;
}

/* One row at one endpoint: its edges are taken, one step beyond is refused, other types are refused, null is absent. */
static void check_row(const field *f, unsigned where) {
    params p;
    if (f->type == FIELD_IGNORED) {
        assert_true(take(f, where, object_of(1), &p));
        return;
    }
    assert_true(take(f, where, json_null(), &p));
    if (f->type == FIELD_NOT_BUILT) {
        assert_false(take(f, where, json_string("x"), &p));
        assert_false(take(f, where, json_object(), &p));
        return;
    }
    if (f->type != FIELD_ANY) {
        if (f->type != FIELD_BOOL) assert_false(take(f, where, json_true(), &p));
        if (f->type != FIELD_INT && f->type != FIELD_REAL) assert_false(take(f, where, json_integer(1), &p));
        if (f->type != FIELD_TEXT && f->type != FIELD_TEXTS) assert_false(take(f, where, json_string("5"), &p));
        if (f->type != FIELD_OBJECT) assert_false(take(f, where, json_object(), &p));
        if (f->type != FIELD_ARRAY && f->type != FIELD_IDS && f->type != FIELD_TEXTS)
            assert_false(take(f, where, json_array(), &p));
    }
    switch (f->type) {
    case FIELD_BOOL:
        assert_true(take(f, where, json_true(), &p));
        assert_true(take(f, where, json_false(), &p));
        break;
    case FIELD_INT:
        assert_false(take(f, where, json_real(1.5), &p));
        assert_false(take(f, where, json_real(1e300), &p));
        if (f->min <= -0x1p63) {
            assert_true(take(f, where, json_integer(INT64_MIN), &p));
            assert_true(take(f, where, json_integer(INT64_MAX), &p));
            break;
        }
        assert_true(take(f, where, json_integer((int64_t)f->min), &p));
        assert_true(take(f, where, json_real(f->min), &p)); /* 5.0 is 5 */
        assert_true(take(f, where, json_integer((int64_t)f->max), &p));
        assert_false(take(f, where, json_integer((int64_t)f->min - 1), &p));
        assert_false(take(f, where, json_integer((int64_t)f->max + 1), &p));
        break;
    case FIELD_REAL:
        assert_int_equal(take(f, where, json_real(f->min), &p), !f->above_min);
        assert_true(take(f, where, json_real(f->max), &p));
        assert_false(take(f, where, json_real(f->min - 0.001), &p));
        assert_false(take(f, where, json_real(f->max + 0.001), &p));
        assert_false(take(f, where, json_real(1e308), &p));
        break;
    case FIELD_TEXT:
        assert_true(take(f, where, text_of((size_t)f->max_bytes), &p));
        assert_false(take(f, where, text_of((size_t)f->max_bytes + 1), &p));
        break;
    case FIELD_TEXTS:
        assert_true(take(f, where, json_string("a"), &p));
        assert_true(take(f, where, texts(f->max_count, (size_t)f->max_bytes), &p));
        assert_false(take(f, where, texts(f->max_count + 1, 1), &p));
        assert_false(take(f, where, texts(1, (size_t)f->max_bytes + 1), &p));
        assert_false(take(f, where, json_string(""), &p));
        assert_false(take(f, where, ids_of(1, 1), &p));
        break;
    case FIELD_IDS:
        assert_true(take(f, where, ids_of(2, 0), &p));
        assert_true(take(f, where, ids_of(1, 999), &p));
        assert_false(take(f, where, ids_of(1, 1000), &p));
        assert_false(take(f, where, ids_of(1, -1), &p));
        assert_false(take(f, where, texts(1, 1), &p));
        if (f->max_count < 10000) assert_false(take(f, where, ids_of(f->max_count + 1, 1), &p));
        break;
    case FIELD_OBJECT:
        assert_true(take(f, where, json_object(), &p));
        assert_false(take(f, where, object_of(f->max_count + 1), &p));
        break;
    case FIELD_ARRAY:
        assert_true(take(f, where, json_array(), &p));
        if (f->max_count < 10000) assert_false(take(f, where, ids_of(f->max_count + 1, 1), &p));
        break;
    case FIELD_ANY: assert_true(take(f, where, json_true(), &p)); break;
    case FIELD_NOT_BUILT:
    case FIELD_IGNORED: break;
    }
}

static void every_field_at_its_boundaries(void **state) {
    (void)state;
    int n, rows = 0;
    const field *t = field_table(&n);
    for (int i = 0; i < n; i++) {
        for (unsigned where = FIELD_CHAT; where <= FIELD_STREAM_OPTIONS; where *= 2) {
            if (!(t[i].where & where)) continue;
            /* the only row of that name there */
            assert_ptr_equal(field_find(t[i].name, where), &t[i]);
            check_row(&t[i], where);
            rows++;
        }
    }
    assert_true(rows > 100);
}

/* Every field of FastDeploy's list that is in scope has a row. */
static void fastdeploy_fields_are_known(void **state) {
    (void)state;
    static const char *const both[] = {"prompt_token_ids",
                                       "model",
                                       "max_tokens",
                                       "n",
                                       "stream",
                                       "stream_options",
                                       "temperature",
                                       "top_p",
                                       "top_k",
                                       "min_p",
                                       "frequency_penalty",
                                       "presence_penalty",
                                       "repetition_penalty",
                                       "seed",
                                       "stop",
                                       "stop_token_ids",
                                       "include_stop_str_in_output",
                                       "min_tokens",
                                       "bad_words",
                                       "bad_words_token_ids",
                                       "logprobs",
                                       "prompt_logprobs",
                                       "include_logprobs_decode_token",
                                       "include_draft_logprobs",
                                       "temp_scaled_logprobs",
                                       "top_p_normalized_logprobs",
                                       "logits_processors_args",
                                       "response_format",
                                       "guided_json",
                                       "guided_regex",
                                       "guided_choice",
                                       "guided_grammar",
                                       "return_token_ids",
                                       "max_streaming_response_tokens",
                                       "user",
                                       "request_id",
                                       "metadata",
                                       "disaggregate_info",
                                       "trace_context",
                                       "collect_metrics"};
    static const char *const chat[] = {"messages",
                                       "max_completion_tokens",
                                       "top_logprobs",
                                       "structural_tag",
                                       "tools",
                                       "chat_template",
                                       "chat_template_kwargs",
                                       "disable_chat_template",
                                       "reasoning_max_tokens",
                                       "response_max_tokens",
                                       "reasoning_effort",
                                       "completion_token_ids"};
    static const char *const completion[] = {"prompt", "best_of", "echo", "suffix"};
    for (size_t i = 0; i < sizeof both / sizeof both[0]; i++) {
        assert_non_null(field_find(both[i], FIELD_CHAT));
        assert_non_null(field_find(both[i], FIELD_COMPLETION));
    }
    for (size_t i = 0; i < sizeof chat / sizeof chat[0]; i++) assert_non_null(field_find(chat[i], FIELD_CHAT));
    for (size_t i = 0; i < sizeof completion / sizeof completion[0]; i++)
        assert_non_null(field_find(completion[i], FIELD_COMPLETION));
}

typedef struct seen {
    int n;
    char last[64];
} seen;
static void note(void *ud, const char *name) {
    seen *s = ud;
    s->n++;
    (void)snprintf(s->last, sizeof s->last, "%s", name);
}

static bool read_text(const char *text, unsigned where, params *p, api_error *e, seen *s) {
    json_t *body;
    ern_err err;
    if (ern_json_parse(&body, text, strlen(text), 64, "body", &err) != ERN_OK) return false;
    static ern_arena a; /* kept until the next read: lists in p live there */
    ern_arena_close(&a);
    ern_arena_open(&a, 0);
    *e = (api_error){0};
    bool ok = fields_read(p, body, where, 1000, &a, e, note, s);
    json_decref(body);
    return ok;
}

static void merging_and_defaults(void **state) {
    (void)state;
    params p;
    api_error e;
    seen s = {0};
    assert_true(
        read_text("{\"metadata\":{\"min_tokens\":10,\"top_k\":3,\"nope\":1},\"top_k\":5}", FIELD_CHAT, &p, &e, &s));
    assert_int_equal(p.min_tokens, 10);
    assert_int_equal(p.top_k, 5); /* explicit wins */
    assert_int_equal(s.n, 1);
    assert_string_equal(s.last, "nope");
    assert_false(read_text("{\"metadata\":{\"raw_request\":1}}", FIELD_CHAT, &p, &e, &s));
    assert_string_equal(e.param, "metadata");
    assert_false(read_text("{\"metadata\":{\"n\":0}}", FIELD_CHAT, &p, &e, &s)); /* merged keys are checked too */
    assert_string_equal(e.param, "n");
    /* completions ignore metadata, and merge suffix */
    assert_true(read_text("{\"metadata\":{\"n\":0},\"suffix\":{\"n\":2}}", FIELD_COMPLETION, &p, &e, &s));
    assert_int_equal(p.n, 2);
    assert_false(read_text("{\"suffix\":\"after\"}", FIELD_COMPLETION, &p, &e, &s));
    /* stream_options only with stream; include_usage is true once the object is there */
    assert_false(read_text("{\"stream_options\":{}}", FIELD_CHAT, &p, &e, &s));
    assert_true(read_text("{\"stream\":true,\"stream_options\":{}}", FIELD_CHAT, &p, &e, &s));
    assert_true(p.include_usage);
    assert_true(read_text("{\"stream\":true,\"stream_options\":{\"include_usage\":false}}", FIELD_CHAT, &p, &e, &s));
    assert_false(p.include_usage);
    assert_true(read_text("{}", FIELD_CHAT, &p, &e, &s));
    assert_int_equal(p.n, 1);
    assert_int_equal(p.max_tokens, -1);
    assert_true(p.skip_special_tokens && p.add_generation_prompt && !p.stream);
    assert_false(read_text("[]", FIELD_CHAT, &p, &e, &s));
    assert_false(read_text("5", FIELD_CHAT, &p, &e, &s));
    assert_false(read_text("{\"n\":1,\"n\":1}", FIELD_CHAT, &p, &e, &s));      /* twice */
    assert_false(read_text("{\"user\":\"\\ud800\"}", FIELD_CHAT, &p, &e, &s)); /* half a pair */
}

static void docs_name_every_field(void **state) {
    (void)state;
    ern_buf b;
    ern_buf_init(&b, 1 << 20);
    fields_write_docs(&b);
    assert_false(b.full);
    int n;
    const field *t = field_table(&n);
    for (int i = 0; i < n; i++) {
        char row[80];
        (void)snprintf(row, sizeof row, "\n| `%s` |", t[i].name);
        assert_non_null(strstr(b.data, row));
    }
    ern_buf_free(&b);
}

static void metrics_text(void **state) {
    (void)state;
    metrics m;
    metrics_open(&m);
    metrics_observe(&m, HIST_TTFT, 0.03);
    metrics_observe(&m, HIST_TTFT, 7);
    metrics_arrived(&m, 100);
    metrics_ended(&m,
                  &(ern_event){.n_prompt = 5,
                               .n_output = 7,
                               .n_cached = 4,
                               .n_cached_host = 2,
                               .n_cached_disk = 1,
                               .queued_us = 1,
                               .started_us = 1000001,
                               .first_us = 1500001,
                               .end_us = 3000001},
                  true);
    metrics_ended(&m, &(ern_event){.n_prompt = 9, .queued_us = 1, .end_us = 2}, false); /* never ran: no miss */
    metrics_http_done(&m, "POST", "/v1/completions", 200, 0.2);
    metrics_http_done(&m, "POST", "/v1/completions", 200, 0.3);
    ern_buf b;
    ern_buf_init(&b, 1 << 20);
    metrics_write(&m, NULL, 0, &b);
    static const char *const want[] = {
        "\nfastdeploy:time_to_first_token_seconds_bucket{le=\"0.02\"} 0\n",
        "\nfastdeploy:time_to_first_token_seconds_bucket{le=\"0.04\"} 1\n",
        "\nfastdeploy:time_to_first_token_seconds_bucket{le=\"1.0\"} 1\n",
        "\nfastdeploy:time_to_first_token_seconds_bucket{le=\"+Inf\"} 2\n",
        "\nfastdeploy:time_to_first_token_seconds_sum 7.03\n",
        "\nfastdeploy:time_to_first_token_seconds_count 2\n",
        "\nfastdeploy:generation_tokens_total 7\n",
        "\nfastdeploy:prompt_tokens_total 14\n",
        "\nfastdeploy:prefix_cache_token_num_total 4\n",
        "\nfastdeploy:prefix_gpu_cache_token_num_total 1\n",
        "\nfastdeploy:prefix_cpu_cache_token_num_total 2\n",
        "\nfastdeploy:prefix_ssd_cache_token_num_total 1\n",
        "\nfastdeploy:hit_req_rate 1\n",
        "\nfastdeploy:hit_token_rate 0.8\n",
        "\nfastdeploy:gpu_hit_token_rate 0.2\n",
        "\nfastdeploy:cpu_hit_token_rate 0.4\n",
        "\nfastdeploy:ssd_hit_token_rate 0.2\n",
        "\nfastdeploy:request_queue_time_seconds_sum 1\n",
        "\nfastdeploy:request_decode_time_seconds_sum 1.5\n",
        "\nhttp_requests_total{method=\"POST\",path=\"/v1/completions\",status_code=\"200\"} 2\n",
        "\nhttp_request_duration_seconds_bucket{method=\"POST\",path=\"/v1/completions\",le=\"0.25\"} 1\n",
        "\nhttp_request_duration_seconds_count{method=\"POST\",path=\"/v1/completions\"} 2\n"};
    for (size_t i = 0; i < sizeof want / sizeof want[0]; i++) {
        if (!strstr(b.data, want[i])) fail_msg("missing: %s in\n%s", want[i], b.data);
    }
    ern_buf_free(&b);
    metrics_close(&m);
}

static void salts(void **state) {
    (void)state;
    static const char *const key[] = {"one", "two"};
    static const uint8_t none[16];
    uint8_t a[32], b[32], s[16], t[16], want[32];
    auth_keys k;
    assert_true(auth_open(&k, key, 2));
    assert_false(auth_caller(&k, NULL, a));
    assert_false(auth_caller(&k, "Basic one", a));
    assert_true(auth_caller(&k, "Bearer one", a));
    assert_true(auth_caller(&k, "bearer   two", b));
    auth_sha256("one", 3, want);
    assert_memory_equal(a, want, 32);
    auth_close(&k);
    assert_true(auth_open(&k, NULL, 0));
    assert_false(auth_caller(&k, "Bearer one", a)); /* no keys are set: what a client sends means nothing */
    auth_close(&k);

    auth_salt(s, NULL, NULL, 0);
    assert_memory_equal(s, none, 16);
    auth_salt(s, NULL, "", 0);
    assert_memory_equal(s, none, 16);
    /* Written down, because files on disk hold it: 32, key's digest, length in two bytes, salt. */
    uint8_t text[3 + 32 + 2] = {32};
    memcpy(text + 1, a, 32);
    text[34] = 2, text[35] = 'h', text[36] = 'i';
    auth_sha256(text, sizeof text, want);
    auth_salt(s, a, "hi", 2);
    assert_memory_equal(s, want, 16);
    auth_salt(t, b, "hi", 2);
    assert_memory_not_equal(s, t, 16); /* another key */
    auth_salt(t, a, "ho", 2);
    assert_memory_not_equal(s, t, 16); /* another salt */
    auth_salt(t, a, NULL, 0);
    assert_memory_not_equal(s, t, 16);
    assert_memory_not_equal(t, none, 16);
    auth_salt(t, NULL, "hi", 2);
    assert_memory_not_equal(s, t, 16);
    /* A salt that holds what a key's part would look like is not that key. */
    auth_salt(s, NULL, (const char *)a, 32);
    auth_salt(t, a, NULL, 0);
    assert_memory_not_equal(s, t, 16);
}

static void kv_view(void **state) {
    (void)state;
    ern_engine_options o = {.prefix_cache = true, .backend_options.n_page_cell = 64};
    ern_engine_stats st = {.n_page = 100,
                           .n_page_free = 30,
                           .n_page_cached = 20,
                           .n_loading = 3,
                           .n_block_cached = 7,
                           .n_block_evicted = 5,
                           .host = {.n_block = 1, .n_block_max = 9, .n_out = 4, .n_in = 2, .n_evicted = 3},
                           .n_cached_token = 64};
    metrics_hits h = {.request = 0.5, .token = 0.25};
    ern_buf b;
    ern_buf_init(&b, 1 << 16);
    kv_view_print(&o, &st, &h, &b);
    assert_string_equal(
        b.data, "{\"prefix_caching\":true,\"output_caching\":false,\"page_tokens\":64,"
                "\"pool\":{\"pages\":100,\"free\":30,\"cached\":20,\"held\":50},"
                "\"tree\":{\"blocks_cached\":7,\"blocks_evicted\":5},"
                "\"tiers\":{\"host\":{\"blocks\":1,\"max_blocks\":9,\"moved_out\":4,\"moved_in\":2,\"evicted\":3,"
                "\"errors\":0,\"cached_tokens\":0,\"off\":false},\"disk\":null},"
                "\"requests\":{\"running\":0,\"waiting\":0,\"loading\":3,\"parked\":0},"
                "\"hits\":{\"cached_tokens\":64,\"request_rate\":0.5,\"token_rate\":0.25,\"pool_token_rate\":0.0,"
                "\"host_token_rate\":0.0,\"disk_token_rate\":0.0},\"prefill_ns_per_token\":0}");
    ern_buf_free(&b);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sha256_of_known_texts),
        cmocka_unit_test(keys),
        cmocka_unit_test(error_object),
        cmocka_unit_test(every_field_at_its_boundaries),
        cmocka_unit_test(fastdeploy_fields_are_known),
        cmocka_unit_test(merging_and_defaults),
        cmocka_unit_test(docs_name_every_field),
        cmocka_unit_test(metrics_text),
        cmocka_unit_test(salts),
        cmocka_unit_test(kv_view),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
