/* The whole server over a socket: a made model, the cpu backend, the real engine and tokenizer, raw HTTP.
 * One server for most tests; those that need other options open their own. */
#include <ctype.h>
#include <pthread.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <cmocka.h>

#include "base/jsonr.h"
#include "base/os.h"
#include "made_model.h"
#include "raw_http.h"
#include "server/job.h"

/* LONG: room for answers that are certain to be still on their way when a test looks at them. */
enum { CONTEXT = 768, LONG_CONTEXT = 32768 };
#define LONG "\"max_tokens\":30000,\"ignore_eos\":true"

typedef struct house {
    made_model made;
    ern_engine *engine;
    ern_tokenizer *tokenizer;
    ern_server *server;
    int port;
} house;

static ern_server_options options_of(const house *h) {
    return (ern_server_options){.host = "127.0.0.1",
                                .port = 0,
                                .metrics_port = -1,
                                .model_path = h->made.dir,
                                .max_concurrency = 64,
                                .max_logprobs = 20,
                                .enable_logprob = true,
                                .split_reasoning = true,
                                .parse_tools = true,
                                .sse_ping_s = 1,
                                .drain_s = 20,
                                .seed = 7,
                                .body_max_bytes = 1 << 20,
                                .max_stop = 16,
                                .max_stop_bytes = 1024,
                                .max_stop_tokens = 8};
}

static void house_model(house *h, int32_t context) {
    ern_err err;
    h->made = made_model_open("tiny-dense", false, 3);
    made_check(ern_tokenizer_open(&h->tokenizer, h->made.dir, &err), &err, "tokenizer");
    ern_engine_options e = {.backend = ern_backend_find("cpu"),
                            .model = h->made.model,
                            .backend_options = {.n_thread = 1},
                            .max_model_len = context,
                            .max_num_seqs = 8,
                            .max_batched_tokens = 256,
                            .chunked_prefill = true,
                            .memory_bytes = 256u << 20,
                            .queue_max = 64,
                            .overlap = true};
    made_check(ern_engine_open(&h->engine, &e, &err), &err, "engine");
}

static void house_serve(house *h, const ern_server_options *o, ern_chat_format f) {
    ern_err err;
    made_check(ern_server_open(&h->server, o, &err), &err, "server");
    h->port = ern_server_port(h->server);
    made_check(ern_server_attach(h->server, h->engine, h->tokenizer, f, &h->made.model->config, &err), &err, "attach");
}

static void house_close(house *h) {
    ern_server_close(h->server);
    ern_engine_close(h->engine);
    ern_tokenizer_close(h->tokenizer);
    made_model_close(&h->made);
}

static house shared;

static int open_shared(void **state) {
    (void)state;
    house_model(&shared, CONTEXT);
    ern_server_options o = options_of(&shared);
    house_serve(&shared, &o, ERN_CHAT_ERNIE);
    return 0;
}

static int close_shared(void **state) {
    (void)state;
    house_close(&shared);
    return 0;
}

/* A second server with other options over the shared engine's model: its own engine, because events have one reader. */
static void other_house(house *h, ern_server_options *o, ern_chat_format f, int32_t context) {
    house_model(h, context);
    o->model_path = h->made.dir;
    house_serve(h, o, f);
}

/* ---- helpers --------------------------------------------------------------------------------------------------- */

static json_t *parse(const char *text, size_t n) {
    json_t *v;
    ern_err err;
    if (ern_json_parse(&v, text, n, 64, "answer", &err) != ERN_OK) fail_msg("%s in: %.*s", err.text, (int)n, text);
    return v;
}

/* a.b.0.c */
static json_t *at(json_t *v, const char *path) {
    char copy[128];
    (void)snprintf(copy, sizeof copy, "%s", path);
    char *save = NULL;
    for (char *k = strtok_r(copy, ".", &save); k && v; k = strtok_r(NULL, ".", &save))
        v = json_is_array(v) ? json_array_get(v, strtoul(k, NULL, 10)) : json_object_get(v, k);
    return v;
}

static const char *text_at(json_t *v, const char *path) {
    const char *s = json_string_value(at(v, path));
    return s ? s : "(none)";
}

static json_t *post(int port, const char *path, const char *body, int want) {
    raw_answer a = raw_call(port, "POST", path, "", body);
    if (a.status != want) fail_msg("%s %s: %d, wanted %d: %s", path, body, a.status, want, a.body);
    assert_true(a.whole);
    json_t *v = parse(a.body, a.len);
    raw_free(&a);
    return v;
}

/* An error object naming `param`. */
static void refused(int port, const char *path, const char *body, int status, const char *param, const char *code) {
    json_t *v = post(port, path, body, status);
    if (!json_is_string(at(v, "error.message")) || !json_is_string(at(v, "error.type")))
        fail_msg("no error object: %s", body);
    if (param && strcmp(text_at(v, "error.param"), param) != 0)
        fail_msg("%s: param %s, wanted %s", body, text_at(v, "error.param"), param);
    if (code && strcmp(text_at(v, "error.code"), code) != 0)
        fail_msg("%s: code %s, wanted %s", body, text_at(v, "error.code"), code);
    json_decref(v);
}

typedef struct stream_seen {
    char text[65536];
    int n_event, n_role, n_finish, n_usage, n_done, n_error, n_ping;
    char finish[32], id[128];
    long long completion_tokens;
    json_t *error;
} stream_seen;

/* Every event of a stream checked against the contract. */
static void read_stream(const raw_answer *a, stream_seen *s) {
    memset(s, 0, sizeof *s);
    for (const char *p = a->body; *p;) {
        const char *end = strstr(p, "\n\n");
        if (!end) fail_msg("event without an end: %s", p);
        size_t n = (size_t)(end - p);
        if (p[0] == ':') {
            s->n_ping++;
        } else {
            assert_int_equal(strncmp(p, "data: ", 6), 0);
            assert_int_equal(s->n_done, 0); /* nothing follows [DONE] */
            if (n == 12 && memcmp(p + 6, "[DONE]", 6) == 0) {
                s->n_done++;
            } else {
                json_t *v = parse(p + 6, n - 6);
                s->n_event++;
                if (at(v, "error")) {
                    s->n_error++;
                    s->error = json_incref(at(v, "error"));
                } else {
                    if (s->id[0]) assert_string_equal(s->id, text_at(v, "id"));
                    (void)snprintf(s->id, sizeof s->id, "%s", text_at(v, "id"));
                    json_t *choices = at(v, "choices");
                    assert_true(json_is_array(choices));
                    json_t *usage = at(v, "usage");
                    if (json_array_size(choices) == 0) {
                        s->n_usage++;
                        s->completion_tokens = json_integer_value(at(usage, "completion_tokens"));
                    }
                    json_t *c;
                    size_t i;
                    json_array_foreach(choices, i, c) {
                        json_t *finish = at(c, "finish_reason"), *delta = at(c, "delta");
                        assert_non_null(finish); /* null or a text, never absent */
                        assert_non_null(at(c, "logprobs"));
                        if (json_is_string(finish)) {
                            s->n_finish++;
                            (void)snprintf(s->finish, sizeof s->finish, "%s", json_string_value(finish));
                        }
                        if (at(delta, "role")) s->n_role++;
                        const char *piece = json_string_value(delta ? at(delta, "content") : at(c, "text"));
                        if (piece) strncat(s->text, piece, sizeof s->text - strlen(s->text) - 1);
                    }
                }
                json_decref(v);
            }
        }
        p = end + 2;
    }
}

/* The engine is done with every request, and the server has given back their places and ids. */
static void wait_idle(house *h) {
    ern_engine_stats st;
    for (int i = 0; i < 100000; i++) {
        ern_engine_stats_read(h->engine, &st);
        bool back = st.n_page_free + st.n_page_cached == st.n_page;
        if (!st.busy && back && atomic_load(&h->server->n_place) == 0) return;
        (void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    fail_msg("pages never came back: %d free and %d cached of %d", st.n_page_free, st.n_page_cached, st.n_page);
}

/* ---- tests ----------------------------------------------------------------------------------------------------- */

static void small_routes(void **state) {
    (void)state;
    raw_answer a = raw_call(shared.port, "GET", "/health", "X-Request-Id: my-id-1\r\n", "");
    char v[256];
    assert_int_equal(a.status, 200);
    assert_int_equal(a.len, 0);
    assert_string_equal(raw_header(&a, "X-Request-Id", v, sizeof v), "my-id-1");
    raw_free(&a);
    static const char *const good[] = {"/ping",    "/version",     "/v1/models", "/load",
                                       "/v1/load", "/config-info", "/metrics"};
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        a = raw_call(shared.port, "GET", good[i], "", "");
        assert_int_equal(a.status, 200);
        raw_free(&a);
    }
    static const struct {
        const char *method, *path, *headers;
        int status;
    } bad[] = {{"GET", "/nope", "", 404},
               {"GET", "/debug/kv", "", 404},
               {"GET", "/v1/nope", "", 404},
               {"GET", "/v1/models/other", "", 404},
               {"GET", "/v1/chat/completions", "", 405},
               {"DELETE", "/v1/models", "", 405},
               {"OPTIONS", "/v1/chat/completions", "Origin: http://x\r\nAccess-Control-Request-Method: POST\r\n", 405},
               {"POST", "/health", "", 405}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        a = raw_call(shared.port, bad[i].method, bad[i].path, bad[i].headers, "");
        assert_int_equal(a.status, bad[i].status);
        json_t *e = parse(a.body, a.len);
        assert_true(json_is_string(at(e, "error.message")));
        json_decref(e);
        raw_free(&a);
    }
    int fd = raw_connect(shared.port);
    static const char rebound[] = "GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n";
    raw_send(fd, rebound, sizeof rebound - 1);
    a = raw_read(fd, 120000);
    assert_int_equal(a.status, 403);
    raw_free(&a);
    close(fd);
}

/* The server's age, not the time of the question. */
static void models_were_created_once(void **state) {
    (void)state;
    int64_t since = shared.server->created_s;
    assert_true(since > 1700000000 && since <= ern_wall_s());
    shared.server->created_s = 1234567890;
    raw_answer a = raw_call(shared.port, "GET", "/v1/models", "", "");
    json_t *v = parse(a.body, a.len);
    assert_int_equal(json_integer_value(at(v, "data.0.created")), 1234567890);
    assert_int_equal(json_integer_value(at(v, "data.0.permission.0.created")), 1234567890);
    json_decref(v);
    raw_free(&a);
    shared.server->created_s = since;
}

/* Where a request ends must have one reading only; what has two is refused and nothing after it is served. */
static void framing(void **state) {
    (void)state;
    static const char body[] = "{\"prompt\":\"x\",\"max_tokens\":1}";
    static const char chunked[] = "20\r\n{\"prompt\":\"x\",\"max_tokens\":1}   \r\n0\r\n\r\n";
    assert_int_equal(sizeof body - 1, 29);
    static const struct {
        const char *headers, *body;
        int status;
        bool closes;
    } ask[] = {
        {"Content-Length: 29\r\n", body, 200, false},
        {"Content-Length: 29\r\nContent-Length: 29\r\n", body, 200, false},
        {"Content-Length: 29\r\ncontent-length: 28\r\n", body, 400, true},
        {"Transfer-Encoding: chunked\r\n", chunked, 200, false},
        {"Content-Length: 29\r\nTransfer-Encoding: chunked\r\n", chunked, 400, true},
        {"Transfer-Encoding: chunked\r\nContent-Length: 29\r\n", chunked, 400, true},
        {"Transfer-Encoding: gzip, chunked\r\n", chunked, 400, true},
        {"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", chunked, 400, true},
        {"Content-Length: 29\r\nContent-Encoding: identity\r\n", body, 200, false},
        {"Content-Length: 29\r\nContent-Encoding: gzip\r\n", body, 415, false},
        {"Content-Length: 29\r\nContent-Encoding: gzip\r\nExpect: 100-continue\r\n", "", 415, true},
    };
    static const char again[] = "GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n";
    for (size_t i = 0; i < sizeof ask / sizeof ask[0]; i++) {
        char text[1024];
        int fd = raw_connect(shared.port);
        int n = snprintf(text, sizeof text, "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n%s\r\n%s",
                         ask[i].headers, ask[i].body);
        raw_send(fd, text, (size_t)n);
        raw_answer a = raw_read(fd, 120000);
        if (a.status != ask[i].status) fail_msg("case %zu: %d: %s", i, a.status, a.body);
        if (a.status != 200) assert_non_null(strstr(a.body, "\"error\":{"));
        raw_free(&a);
        raw_send(fd, again, sizeof again - 1);
        a = raw_read(fd, 120000);
        if (a.status != (ask[i].closes ? 0 : 200)) fail_msg("case %zu, a second request: %d", i, a.status);
        raw_free(&a);
        close(fd);
    }
    /* as a proxy writes the target */
    static const struct {
        const char *target;
        int status;
    } get[] = {{"http://localhost/version", 200},
               {"HTTP://127.0.0.1:80/version?x=1", 200},
               {"https://localhost/v1/models", 200},
               {"http://localhost", 404},
               {"http://localhost/http://x/", 404},
               {"ftp://localhost/version", 404},
               {"http:/version", 404}};
    for (size_t i = 0; i < sizeof get / sizeof get[0]; i++) {
        raw_answer a = raw_call(shared.port, "GET", get[i].target, "", "");
        if (a.status != get[i].status) fail_msg("%s: %d", get[i].target, a.status);
        raw_free(&a);
    }
}

static void chat_and_usage(void **state) {
    (void)state;
    json_t *v = post(shared.port, "/v1/chat/completions",
                     "{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}],\"max_tokens\":9,\"temperature\":0,"
                     "\"ignore_eos\":true,\"return_token_ids\":true,\"user\":\"u1\"}",
                     200);
    assert_string_equal(text_at(v, "object"), "chat.completion");
    assert_int_equal(strncmp(text_at(v, "id"), "chatcmpl-u1-", 12), 0);
    assert_string_equal(text_at(v, "choices.0.finish_reason"), "length");
    assert_string_equal(text_at(v, "choices.0.message.role"), "assistant");
    assert_int_equal(json_integer_value(at(v, "usage.completion_tokens")), 9);
    assert_int_equal(json_array_size(at(v, "choices.0.message.completion_token_ids")), 9);
    assert_int_equal(json_array_size(at(v, "choices.0.message.prompt_token_ids")),
                     json_integer_value(at(v, "usage.prompt_tokens")));
    assert_int_equal(json_integer_value(at(v, "usage.total_tokens")),
                     9 + json_integer_value(at(v, "usage.prompt_tokens")));
    /* the same again: greedy does not move; and the same from its ids */
    json_t *ids = at(v, "choices.0.message.prompt_token_ids");
    json_t *body = json_pack("{s:[],s:O,s:i,s:i,s:b}", "messages", "prompt_token_ids", ids, "max_tokens", 9,
                             "temperature", 0, "ignore_eos", 1);
    char *text = json_dumps(body, 0);
    json_t *again = post(shared.port, "/v1/chat/completions", text, 200);
    assert_string_equal(text_at(again, "choices.0.message.content"), text_at(v, "choices.0.message.content"));
    free(text);
    json_decref(body);
    json_decref(again);
    json_decref(v);
}

static void stream_equals_whole(void **state) {
    (void)state;
    static const char *const body[2] = {
        "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},{\"type\":\"text\",\"text\":"
        "\"b\"}]}],"
        "\"max_tokens\":60,\"seed\":5,\"ignore_eos\":true%s}",
        "{\"prompt\":\"once upon\",\"max_tokens\":60,\"seed\":5,\"ignore_eos\":true%s}"};
    static const char *const path[2] = {"/v1/chat/completions", "/v1/completions"};
    for (int k = 0; k < 2; k++) {
        char text[512];
        (void)snprintf(text, sizeof text, body[k], "");
        json_t *v = post(shared.port, path[k], text, 200);
        (void)snprintf(text, sizeof text, body[k], ",\"stream\":true,\"stream_options\":{\"include_usage\":true}");
        raw_answer a = raw_call(shared.port, "POST", path[k], "", text);
        assert_int_equal(a.status, 200);
        assert_true(a.whole);
        char h[128];
        assert_string_equal(raw_header(&a, "Content-Type", h, sizeof h), "text/event-stream; charset=utf-8");
        assert_string_equal(raw_header(&a, "Cache-Control", h, sizeof h), "no-cache");
        stream_seen s;
        read_stream(&a, &s);
        assert_string_equal(s.text, text_at(v, k ? "choices.0.text" : "choices.0.message.content"));
        assert_int_equal(s.n_role, k ? 0 : 1);
        assert_int_equal(s.n_finish, 1);
        assert_int_equal(s.n_done, 1);
        assert_int_equal(s.n_usage, 1);
        assert_int_equal(s.completion_tokens, 60);
        raw_free(&a);
        /* not asked for: no usage event */
        (void)snprintf(text, sizeof text, body[k], ",\"stream\":true,\"max_streaming_response_tokens\":7");
        a = raw_call(shared.port, "POST", path[k], "", text);
        stream_seen g;
        read_stream(&a, &g);
        assert_string_equal(g.text, s.text);
        assert_int_equal(g.n_usage, 0);
        assert_true(g.n_event < s.n_event);
        raw_free(&a);
        json_decref(v);
    }
}

static void choices_and_prompts(void **state) {
    (void)state;
    json_t *v = post(
        shared.port, "/v1/completions",
        "{\"prompt\":[\"one\",\"two two\",\"three\"],\"n\":2,\"max_tokens\":5,\"seed\":1,\"ignore_eos\":true}", 200);
    assert_int_equal(json_array_size(at(v, "choices")), 6);
    for (size_t i = 0; i < 6; i++) {
        char p[32];
        (void)snprintf(p, sizeof p, "choices.%zu.index", i);
        assert_int_equal(json_integer_value(at(v, p)), i);
    }
    assert_int_equal(json_integer_value(at(v, "usage.completion_tokens")), 30);
    /* choice k depends on its seed and number only: the same prompt alone */
    json_t *one = post(shared.port, "/v1/completions",
                       "{\"prompt\":\"two two\",\"n\":2,\"max_tokens\":5,\"seed\":1,\"ignore_eos\":true}", 200);
    assert_string_equal(text_at(one, "choices.0.text"), text_at(v, "choices.2.text"));
    assert_string_equal(text_at(one, "choices.1.text"), text_at(v, "choices.3.text"));
    json_decref(one);
    json_decref(v);
    v = post(shared.port, "/v1/completions", "{\"prompt\":[[20,21,22],[30]],\"max_tokens\":1}", 200);
    assert_int_equal(json_array_size(at(v, "choices")), 2);
    assert_int_equal(json_integer_value(at(v, "usage.prompt_tokens")), 4);
    json_decref(v);
    raw_answer a =
        raw_call(shared.port, "POST", "/v1/chat/completions", "",
                 "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"n\":3,\"stream\":true,\"max_tokens\":8}");
    stream_seen s;
    read_stream(&a, &s);
    assert_int_equal(s.n_role, 3);
    assert_int_equal(s.n_finish, 3);
    raw_free(&a);
}

static void logprobs(void **state) {
    (void)state;
    json_t *v = post(shared.port, "/v1/chat/completions",
                     "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"logprobs\":true,\"top_logprobs\":3,"
                     "\"max_tokens\":6,\"temperature\":0,\"ignore_eos\":true}",
                     200);
    json_t *list = at(v, "choices.0.logprobs.content"), *e;
    assert_int_equal(json_array_size(list), 6);
    size_t i;
    json_array_foreach(list, i, e) {
        assert_int_equal(json_array_size(at(e, "top_logprobs")), 3);
        /* greedy: the sampled token is the likeliest */
        assert_true(json_real_value(at(e, "logprob")) == json_real_value(at(e, "top_logprobs.0.logprob")));
        assert_true(json_real_value(at(e, "logprob")) < 0);
        assert_true(json_is_array(at(e, "bytes")));
    }
    json_decref(v);
    /* as lm-eval asks: echo, logprobs of the prompt, one token */
    for (int max = 0; max < 2; max++) {
        char body[160];
        (void)snprintf(body, sizeof body,
                       "{\"prompt\":[20,21,22,23],\"echo\":true,\"logprobs\":2,\"max_tokens\":%d,\"temperature\":0,"
                       "\"prompt_logprobs\":1}",
                       max);
        v = post(shared.port, "/v1/completions", body, 200);
        json_t *lp = at(v, "choices.0.logprobs");
        assert_int_equal(json_array_size(at(lp, "tokens")), 4 + max);
        assert_int_equal(json_array_size(at(lp, "token_logprobs")), 4 + max);
        assert_int_equal(json_array_size(at(lp, "text_offset")), 4 + max);
        assert_true(json_is_null(at(lp, "token_logprobs.0")) && json_is_null(at(lp, "top_logprobs.0")));
        assert_true(json_is_number(at(lp, "token_logprobs.1")));
        assert_true(json_object_size(at(lp, "top_logprobs.1")) >= 2);
        assert_int_equal(json_array_size(at(v, "choices.0.prompt_logprobs")), 4);
        assert_true(json_is_null(at(v, "choices.0.prompt_logprobs.0")));
        assert_true(json_object_size(at(v, "choices.0.prompt_logprobs.2")) >= 1);
        assert_int_equal(json_integer_value(at(v, "usage.completion_tokens")), max);
        json_decref(v);
    }
    raw_answer a = raw_call(shared.port, "POST", "/v1/completions", "",
                            "{\"prompt\":\"ab\",\"echo\":true,\"logprobs\":0,\"max_tokens\":3,\"stream\":true}");
    stream_seen s;
    read_stream(&a, &s);
    assert_int_equal(strncmp(s.text, "ab", 2), 0);
    assert_int_equal(s.n_finish, 1);
    raw_free(&a);
}

/* --logprobs-mode, told apart by what a temperature of 1/2 does: logits are doubled by it in the processed modes and
 * left alone in the raw ones, and log-probabilities are logits less one number for all tokens. Bound: six printed
 * digits of numbers below 100. */
static void logprobs_modes(void **state) {
    (void)state;
    enum { TOP = 5 };
    double seen[4][TOP], near = 1e-3;
    for (int mode = ERN_LOGPROBS_RAW; mode <= ERN_LOGPROBS_PROCESSED_LOGITS; mode++) {
        house h;
        ern_server_options o = options_of(&shared);
        o.logprobs_mode = (ern_logprobs_mode)mode;
        other_house(&h, &o, ERN_CHAT_ERNIE, CONTEXT);
        json_t *v = post(h.port, "/v1/chat/completions",
                         "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"logprobs\":true,\"top_logprobs\":5,"
                         "\"max_tokens\":1,\"temperature\":0.5,\"top_p\":1,\"seed\":3}",
                         200);
        for (int i = 0; i < TOP; i++) {
            char path[64];
            (void)snprintf(path, sizeof path, "choices.0.logprobs.content.0.top_logprobs.%d.logprob", i);
            assert_true(json_is_number(at(v, path)));
            seen[mode][i] = json_number_value(at(v, path));
        }
        json_decref(v);
        house_close(&h);
    }
    const double *raw = seen[ERN_LOGPROBS_RAW], *processed = seen[ERN_LOGPROBS_PROCESSED];
    const double *logits = seen[ERN_LOGPROBS_RAW_LOGITS];
    assert_true(fabs(logits[0] - logits[TOP - 1]) > 20 * near); /* or the checks below say nothing */
    assert_true(fabs(logits[0] - raw[0]) > 20 * near);
    for (int i = 0; i < TOP; i++) {
        assert_true(raw[i] < 0 && processed[i] < 0);
        assert_true(fabs(raw[0] - raw[i] - (logits[0] - logits[i])) < near);
        assert_true(fabs(seen[ERN_LOGPROBS_PROCESSED_LOGITS][i] - 2 * logits[i]) < near);
        assert_true(fabs(processed[0] - processed[i] - 2 * (logits[0] - logits[i])) < near);
    }
}

static void stops(void **state) {
    (void)state;
    static const char ask[] =
        "{\"prompt\":\"once\",\"max_tokens\":200,\"temperature\":1,\"top_p\":1,\"seed\":9,\"ignore_eos\":true%s}";
    char body[512], stop[8] = "";
    (void)snprintf(body, sizeof body, ask, "");
    json_t *v = post(shared.port, "/v1/completions", body, 200);
    const char *whole = text_at(v, "choices.0.text");
    /* a pair of letters that occurs in the middle, as the stop text */
    size_t n = strlen(whole);
    assert_true(n > 40);
    for (size_t i = n / 2; i + 2 < n && !stop[0]; i++) {
        if (isalpha((unsigned char)whole[i]) && isalpha((unsigned char)whole[i + 1])) memcpy(stop, whole + i, 2);
    }
    assert_true(stop[0]);
    const char *first = strstr(whole, stop);
    for (int keep = 0; keep < 2; keep++) {
        char extra[128];
        (void)snprintf(extra, sizeof extra, ",\"stop\":[\"zzzzzzq\",\"%s\"],\"include_stop_str_in_output\":%s", stop,
                       keep ? "true" : "false");
        (void)snprintf(body, sizeof body, ask, extra);
        json_t *cut = post(shared.port, "/v1/completions", body, 200);
        assert_string_equal(text_at(cut, "choices.0.finish_reason"), "stop");
        const char *got = text_at(cut, "choices.0.text");
        assert_int_equal(strlen(got), (size_t)(first - whole) + (keep ? 2 : 0));
        assert_memory_equal(got, whole, strlen(got));
        json_decref(cut);
        strcpy(body + strlen(body) - 1, ",\"stream\":true}");
        raw_answer a = raw_call(shared.port, "POST", "/v1/completions", "", body);
        stream_seen s;
        read_stream(&a, &s);
        assert_int_equal(strlen(s.text), (size_t)(first - whole) + (keep ? 2 : 0));
        assert_string_equal(s.finish, "stop");
        raw_free(&a);
    }
    json_decref(v);
    wait_idle(&shared);
}

static void sampling_fields(void **state) {
    (void)state;
    /* nothing but two ids may come; one of them is biased away: only the other comes */
    json_t *v = post(shared.port, "/v1/completions",
                     "{\"prompt\":\"a\",\"max_tokens\":12,\"allowed_token_ids\":[40,41],\"logit_bias\":{\"40\":-100},"
                     "\"return_token_ids\":true,\"ignore_eos\":true}",
                     200);
    json_t *ids = at(v, "choices.0.completion_token_ids"), *id;
    size_t i;
    assert_int_equal(json_array_size(ids), 12);
    json_array_foreach(ids, i, id) assert_int_equal(json_integer_value(id), 41);
    json_decref(v);
    v = post(shared.port, "/v1/completions",
             "{\"prompt\":\"a\",\"max_tokens\":12,\"allowed_token_ids\":[40,41],\"bad_words_token_ids\":[41],"
             "\"return_token_ids\":true,\"ignore_eos\":true}",
             200);
    ids = at(v, "choices.0.completion_token_ids");
    json_array_foreach(ids, i, id) assert_int_equal(json_integer_value(id), 40);
    json_decref(v);
    /* a stop id ends it at once, unless too early */
    v = post(shared.port, "/v1/completions",
             "{\"prompt\":\"a\",\"max_tokens\":12,\"allowed_token_ids\":[40,41],\"stop_token_ids\":[40],\"logit_bias\":"
             "{\"40\":50},"
             "\"min_tokens\":4,\"return_token_ids\":true}",
             200);
    ids = at(v, "choices.0.completion_token_ids");
    assert_int_equal(json_array_size(ids), 5);
    assert_int_equal(json_integer_value(json_array_get(ids, 4)), 40);
    assert_string_equal(text_at(v, "choices.0.finish_reason"), "stop");
    json_decref(v);
}

static void refusals(void **state) {
    (void)state;
    const char *c = "/v1/chat/completions", *p = "/v1/completions";
    refused(shared.port, c, "{", 400, NULL, "invalid_json");
    refused(shared.port, c, "", 400, NULL, "invalid_json");
    refused(shared.port, c, "[]", 400, NULL, "invalid_value");
    refused(shared.port, c, "{}", 400, "messages", "missing_required_parameter");
    refused(shared.port, c, "{\"messages\":[{\"role\":\"king\",\"content\":\"\"}]}", 400, "messages", NULL);
    refused(shared.port, c, "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]}", 400,
            "messages", NULL);
    refused(shared.port, c, "{\"messages\":[{\"role\":\"user\",\"content\":\"\\ud800\"}]}", 400, NULL, "invalid_json");
    refused(shared.port, c,
            "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"tools\":[{\"type\":\"function\",\"function\":{"
            "\"name\":\"f\"}}]}",
            400, "tools", NULL);
    refused(shared.port, c,
            "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"tool_choice\":\"required\",\"tools\":[]}", 400,
            "tool_choice", "unsupported_value");
    refused(shared.port, c,
            "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"response_format\":{\"type\":\"json_object\"}}",
            400, "response_format", "unsupported_value");
    refused(shared.port, c, "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"top_logprobs\":2}", 400,
            "top_logprobs", NULL);
    refused(shared.port, c, "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"max_tokens\":766}", 400,
            "max_tokens", "context_length_exceeded");
    refused(shared.port, p, "{\"prompt\":\"x\",\"max_tokens\":0}", 400, "max_tokens", NULL);
    refused(shared.port, p, "{\"prompt\":\"x\",\"best_of\":2}", 400, "best_of", NULL);
    refused(shared.port, p, "{\"prompt\":[]}", 400, "prompt", NULL);
    refused(shared.port, p, "{\"prompt\":\"\"}", 400, "prompt", NULL);
    refused(shared.port, p, "{\"prompt\":[1,999999]}", 400, "prompt", NULL);
    refused(shared.port, p, "{\"prompt\":\"x\",\"logit_bias\":{\"007\":1}}", 400, "logit_bias", NULL);
    refused(shared.port, p, "{\"prompt\":\"x\",\"logit_bias\":{\"7\":101}}", 400, "logit_bias", NULL);
    refused(shared.port, p, "{\"prompt\":\"x\",\"min_tokens\":9,\"max_tokens\":8}", 400, "min_tokens", NULL);
    refused(shared.port, p, "{\"prompt\":[\"a\",\"b\",\"c\"],\"n\":128}", 400, "n", NULL);
    refused(shared.port, p, "{\"prompt\":\"x\",\"bad_words\":\"a whole sentence of words\"}", 400, "bad_words", NULL);
    /* a prompt one token too long, and one that just fits */
    for (int n = CONTEXT - 1; n <= CONTEXT; n++) {
        json_t *ids = json_array();
        for (int i = 0; i < n; i++) json_array_append_new(ids, json_integer(20 + i % 50));
        json_t *body = json_pack("{s:o}", "prompt", ids);
        char *text = json_dumps(body, 0);
        if (n < CONTEXT)
            json_decref(post(shared.port, p, text, 200));
        else
            refused(shared.port, p, text, 400, "prompt", "context_length_exceeded");
        free(text);
        json_decref(body);
    }
    /* scored only, a prompt may fill the context; one more may not */
    for (int n = CONTEXT; n <= CONTEXT + 1; n++) {
        json_t *ids = json_array();
        for (int i = 0; i < n; i++) json_array_append_new(ids, json_integer(20 + i % 50));
        json_t *body = json_pack("{s:o,s:b,s:i,s:i}", "prompt", ids, "echo", 1, "max_tokens", 0, "logprobs", 0);
        char *text = json_dumps(body, 0);
        if (n == CONTEXT) {
            json_t *v = post(shared.port, p, text, 200);
            assert_int_equal(json_array_size(at(v, "choices.0.logprobs.token_logprobs")), CONTEXT);
            assert_int_equal(json_integer_value(at(v, "usage.completion_tokens")), 0);
            json_decref(v);
        } else {
            refused(shared.port, p, text, 400, "prompt", "context_length_exceeded");
        }
        free(text);
        json_decref(body);
    }
    refused(shared.port, p, "{\"prompt\":\"x\",\"echo\":true,\"max_tokens\":0,\"min_tokens\":1}", 400, "min_tokens",
            NULL);
    /* far more text than any tokenizer could fit: refused by its bytes */
    char *words = malloc(CONTEXT * 256 + 200);
    assert_non_null(words);
    int used = sprintf(words, "{\"messages\":[{\"role\":\"user\",\"content\":\"");
    memset(words + used, 'y', CONTEXT * 256 + 1);
    strcpy(words + used + CONTEXT * 256 + 1, "\"}]}");
    refused(shared.port, c, words, 400, "messages", "context_length_exceeded");
    free(words);
    /* a body over the limit, announced and chunked */
    size_t big = (1 << 20) + 10;
    char *text = malloc(big + 1);
    assert_non_null(text);
    memset(text, ' ', big);
    text[big] = 0;
    refused(shared.port, p, text, 413, NULL, "request_too_large");
    int fd = raw_connect(shared.port);
    static const char head[] = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n";
    raw_send(fd, head, sizeof head - 1);
    char size[32];
    raw_send(fd, size, (size_t)snprintf(size, sizeof size, "%zx\r\n", big));
    raw_send(fd, text, big);
    raw_send(fd, "\r\n0\r\n\r\n", 7);
    raw_answer a = raw_read(fd, 120000);
    assert_int_equal(a.status, 413);
    raw_free(&a);
    close(fd);
    free(text);
    /* headers over the limit */
    fd = raw_connect(shared.port);
    char *flood = malloc(40000);
    assert_non_null(flood);
    memset(flood, 'x', 40000);
    raw_send(fd, "GET /health HTTP/1.1\r\nHost: localhost\r\nA: ", 43);
    raw_send(fd, flood, 40000);
    raw_send(fd, "\r\n\r\n", 4);
    a = raw_read(fd, 120000);
    assert_int_equal(a.status, 431);
    raw_free(&a);
    close(fd);
    free(flood);
    json_decref(post(shared.port, p, "{\"prompt\":\"still here\",\"max_tokens\":1}", 200));
}

static void tokens_both_ways(void **state) {
    (void)state;
    json_t *v = post(shared.port, "/tokenize", "{\"prompt\":\"some words\",\"return_token_strs\":true}", 200);
    size_t n = json_array_size(at(v, "tokens"));
    assert_true(n > 0);
    assert_int_equal(json_integer_value(at(v, "count")), n);
    assert_int_equal(json_array_size(at(v, "token_strs")), n);
    assert_int_equal(json_integer_value(at(v, "max_model_len")), CONTEXT);
    json_t *body = json_pack("{s:O}", "tokens", at(v, "tokens"));
    char *text = json_dumps(body, 0);
    json_t *back = post(shared.port, "/detokenize", text, 200);
    assert_string_equal(text_at(back, "prompt"), "some words");
    free(text);
    json_decref(back);
    json_decref(body);
    json_decref(v);
    v = post(shared.port, "/tokenize", "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}", 200);
    assert_true(json_integer_value(at(v, "count")) > 3);
    json_decref(v);
    refused(shared.port, "/detokenize", "{\"tokens\":[-1]}", 400, "tokens", NULL);
    refused(shared.port, "/tokenize", "{}", 400, "prompt", NULL);
}

static int by_size(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static int64_t median(int64_t *v, size_t n) {
    qsort(v, n, sizeof *v, by_size);
    return v[n / 2];
}

enum leaving { BY_CLOSE, BY_RESET, BY_HALF_CLOSE };

static int open_long(house *h, const char *fields) {
    int fd = raw_connect(h->port);
    char body[256];
    (void)snprintf(body, sizeof body, "{\"prompt\":\"x\"%s}", fields);
    raw_request(fd, "POST", "/v1/completions", "", body);
    ern_engine_stats st;
    do {
        (void)nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
        ern_engine_stats_read(h->engine, &st);
    } while (st.n_running + st.n_parked == 0);
    return fd;
}

/* Ask for what takes far longer than the bound, leave, wait until every page is back: microseconds from leaving. */
static int64_t leave(house *h, bool stream, enum leaving how) {
    int fd = open_long(h, stream ? "," LONG ",\"stream\":true" : "," LONG);
    if (how == BY_RESET) {
        struct linger now = {.l_onoff = 1};
        (void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    }
    int64_t left = ern_now_us();
    if (how == BY_HALF_CLOSE)
        shutdown(fd, SHUT_WR);
    else
        close(fd);
    wait_idle(h);
    int64_t took = ern_now_us() - left;
    if (how == BY_HALF_CLOSE) close(fd);
    return took;
}

static int64_t health(const house *h) {
    int64_t begin = ern_now_us();
    raw_answer a = raw_call(h->port, "GET", "/health", "", "");
    assert_int_equal(a.status, 200);
    raw_free(&a);
    return ern_now_us() - begin;
}

/* A client that leaves frees its place within 100 ms, streaming or not: by close, reset, or half-close (which counts
 * for whole answers only). Every request must have been cancelled. The bound is on our own path: on a machine that is
 * busy with other work its few wake-ups wait as those of /health do, so those are allowed beside it. What is not
 * noticed by an event takes the half second of a sweep on average, or the seconds of the whole answer. */
static void hang_up(void **state) {
    (void)state;
    enum { TRIES = 5 };
    house h;
    ern_server_options o = options_of(&shared);
    other_house(&h, &o, ERN_CHAT_ERNIE, LONG_CONTEXT);
    uint64_t n_left = 0;
    for (int k = 0; k < 5; k++) {
        int64_t took[TRIES], busy[TRIES];
        for (int i = 0; i < TRIES; i++, n_left++) {
            took[i] = leave(&h, k & 1, (enum leaving)(k / 2));
            busy[i] = health(&h);
        }
        int64_t m = median(took, TRIES), allowed = 100000 + 10 * median(busy, TRIES);
        if (m >= allowed)
            fail_msg("left in way %d: freed after %lld us, allowed %lld", k, (long long)m, (long long)allowed);
    }
    ern_engine_stats st;
    ern_engine_stats_read(h.engine, &st);
    assert_int_equal(st.n_cancelled, n_left);
    /* A half-closed stream is served to its end; it is more than sockets hold, so it has not ended before. */
    int fd = open_long(&h, ",\"max_tokens\":1000,\"ignore_eos\":true,\"stream\":true,\"logprobs\":20");
    struct pollfd begun = {.fd = fd, .events = POLLIN}; /* before that a half-close is a hang-up */
    assert_int_equal(poll(&begun, 1, 120000), 1);
    shutdown(fd, SHUT_WR);
    raw_answer a = raw_read(fd, 120000);
    assert_true(a.whole);
    assert_non_null(strstr(a.body, "\"finish_reason\":\"length\""));
    raw_free(&a);
    close(fd);
    house_close(&h);
}

/* A reader that does not read: its request is parked, its buffer stays small, others go on; then it reads all. */
/* A stream that nobody reads, through a small window. */
static int silent_reader(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), small = 4096;
    assert_true(fd >= 0);
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    assert_int_equal(connect(fd, (struct sockaddr *)&a, sizeof a), 0);
    raw_request(fd, "POST", "/v1/completions", "",
                "{\"prompt\":\"x\",\"max_tokens\":700,\"ignore_eos\":true,\"stream\":true,\"logprobs\":20}");
    return fd;
}

static void wait_parked(house *h, int32_t n) {
    ern_engine_stats st;
    for (int i = 0; i < 100000; i++) {
        ern_engine_stats_read(h->engine, &st);
        if (st.n_parked == n) return;
        (void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    fail_msg("%d parked, wanted %d", st.n_parked, n);
}

static void slow_reader(void **state) {
    (void)state;
    int fd = silent_reader(shared.port);
    wait_parked(&shared, 1);
    json_decref(
        post(shared.port, "/v1/completions", "{\"prompt\":\"other\",\"max_tokens\":5,\"ignore_eos\":true}", 200));
    raw_answer got = raw_read(fd, 120000);
    assert_true(got.whole);
    assert_non_null(strstr(got.body, "data: [DONE]"));
    assert_non_null(strstr(got.body, "\"finish_reason\":\"length\""));
    raw_free(&got);
    close(fd);
    wait_idle(&shared);
}

static void duplicate_id_and_deadline(void **state) {
    (void)state;
    house h;
    ern_server_options o = options_of(&shared);
    other_house(&h, &o, ERN_CHAT_ERNIE, LONG_CONTEXT);
    int fd = raw_connect(h.port);
    raw_request(fd, "POST", "/v1/completions", "",
                "{\"prompt\":\"x\"," LONG ",\"stream\":true,\"request_id\":\"same\"}");
    char some[512];
    assert_true(raw_recv(fd, some, sizeof some, 120000) > 0);
    refused(h.port, "/v1/completions", "{\"prompt\":\"x\",\"request_id\":\"same\"}", 400, "request_id", NULL);
    close(fd);
    wait_idle(&h);
    json_t *v = post(h.port, "/v1/completions", "{\"prompt\":\"x\",\"max_tokens\":1,\"request_id\":\"same\"}", 200);
    assert_string_equal(text_at(v, "id"), "cmpl-same");
    json_decref(v);
    raw_answer a = raw_call(h.port, "POST", "/v1/completions", "X-Request-Deadline-Ms: soon\r\n", "{\"prompt\":\"x\"}");
    assert_int_equal(a.status, 400);
    raw_free(&a);
    house_close(&h);
}

/* Whoever has read a whole answer may ask again at once, by the same id and into the only place. */
static void comes_again_at_once(void **state) {
    (void)state;
    house h;
    ern_server_options o = options_of(&shared);
    o.max_concurrency = 1;
    other_house(&h, &o, ERN_CHAT_ERNIE, CONTEXT);
    static const struct {
        const char *path, *body;
        int status;
    } ask[] = {
        {"/v1/completions", "{\"prompt\":\"x\",\"max_tokens\":1,\"request_id\":\"same\"}", 200},
        {"/v1/completions", "{\"prompt\":\"x\",\"max_tokens\":1,\"request_id\":\"same\",\"stream\":true}", 200},
        {"/v1/completions", "{\"prompt\":\"x\",\"max_tokens\":0,\"request_id\":\"same\"}", 400},
        {"/tokenize", "{\"prompt\":\"x\"}", 200},
        {"/tokenize", "{}", 400},
    };
    enum { N_ASK = sizeof ask / sizeof ask[0], ROUNDS = 40 };
    for (int i = 0; i < ROUNDS * N_ASK; i++) {
        raw_answer a = raw_call(h.port, "POST", ask[i % N_ASK].path, "", ask[i % N_ASK].body);
        if (a.status != ask[i % N_ASK].status) fail_msg("call %d: %d: %s", i, a.status, a.body);
        assert_true(a.whole);
        if (i % N_ASK == 0) assert_non_null(strstr(a.body, "\"cmpl-same\""));
        raw_free(&a);
    }
    house_close(&h);
}

static void too_many(void **state) {
    (void)state;
    house h;
    ern_server_options o = options_of(&shared);
    o.max_concurrency = 2;
    static const char *const key[] = {"sesame"};
    static const char *const origin[] = {"http://page.example"};
    o.api_key = key;
    o.n_api_key = 1;
    o.cors_origin = origin;
    o.n_cors_origin = 1;
    o.served_model_name = "ernie";
    o.debug_endpoints = true;
    other_house(&h, &o, ERN_CHAT_ERNIE, LONG_CONTEXT);
    static const char bearer[] = "Authorization: Bearer sesame\r\n";
    static const char long_one[] = "{\"prompt\":\"x\"," LONG ",\"stream\":true}";
    raw_answer a = raw_call(h.port, "POST", "/v1/completions", "", long_one);
    assert_int_equal(a.status, 401);
    assert_non_null(strstr(a.body, "\"error\":{"));
    raw_free(&a);
    for (int i = 0; i < 2; i++) { /* behind the key where there is one */
        a = raw_call(h.port, "GET", "/debug/kv", i ? bearer : "", "");
        assert_int_equal(a.status, i ? 200 : 401);
        json_t *kv = parse(a.body, a.len);
        if (i) assert_true(json_integer_value(at(kv, "pool.pages")) > 0);
        json_decref(kv);
        raw_free(&a);
    }
    int fd[2];
    for (int i = 0; i < 2; i++) {
        char some[256];
        fd[i] = raw_connect(h.port);
        raw_request(fd[i], "POST", "/v1/completions", bearer, long_one);
        assert_true(raw_recv(fd[i], some, sizeof some, 120000) > 0);
    }
    a = raw_call(h.port, "POST", "/v1/completions", bearer, "{\"prompt\":\"x\"}");
    char v[256];
    assert_int_equal(a.status, 429);
    assert_non_null(raw_header(&a, "Retry-After", v, sizeof v));
    assert_non_null(raw_header(&a, "retry-after-ms", v, sizeof v));
    assert_non_null(strstr(a.body, "\"error\":{"));
    raw_free(&a);
    a = raw_call(h.port, "GET", "/health", "", ""); /* answers while all places are taken */
    assert_int_equal(a.status, 200);
    raw_free(&a);
    close(fd[0]);
    close(fd[1]);
    wait_idle(&h);
    a = raw_call(h.port, "POST", "/v1/completions", bearer, "{\"prompt\":\"x\",\"max_tokens\":1,\"model\":\"gpt\"}");
    assert_int_equal(a.status, 404);
    raw_free(&a);
    a = raw_call(h.port, "OPTIONS", "/v1/completions",
                 "Origin: http://page.example\r\nAccess-Control-Request-Method: POST\r\n"
                 "Access-Control-Request-Headers: authorization\r\n",
                 "");
    assert_int_equal(a.status, 204);
    assert_string_equal(raw_header(&a, "Access-Control-Allow-Origin", v, sizeof v), "http://page.example");
    raw_free(&a);
    /* openai-node's own and a few of the page: longer than 255 bytes, and whole or not at all */
    static const char ask[] =
        "authorization,content-type,openai-organization,openai-project,x-request-id,x-stainless-arch,x-stainless-"
        "helper-"
        "method,x-stainless-lang,x-stainless-os,x-stainless-package-version,x-stainless-poll-helper,x-stainless-retry-"
        "count,x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout,http-referer,x-title";
    char preflight[8192], wide[1024];
    for (size_t n = sizeof ask - 1; n < 6000; n += 5500) {
        int len = snprintf(preflight, sizeof preflight,
                           "OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: http://page.example\r\n"
                           "Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: %s%*s\r\n\r\n",
                           ask, (int)(n - (sizeof ask - 1)), "");
        if (n > sizeof ask - 1) memset(strstr(preflight, "x-title") + 7, 'e', n - (sizeof ask - 1));
        int s = raw_connect(h.port);
        raw_send(s, preflight, (size_t)len);
        a = raw_read(s, 120000);
        assert_int_equal(a.status, 204);
        assert_non_null(raw_header(&a, "Access-Control-Allow-Headers", wide, sizeof wide));
        assert_string_equal(wide, n == sizeof ask - 1 ? ask : "Authorization, Content-Type, X-Request-Id");
        raw_free(&a);
        close(s);
    }
    a = raw_call(h.port, "GET", "/health", "Origin: http://elsewhere.example\r\n", "");
    assert_null(raw_header(&a, "Access-Control-Allow-Origin", v, sizeof v));
    raw_free(&a);
    house_close(&h);
}

/* A full server says when to come back: after the prompts that wait, between a second and a minute. */
static void refusals_say_when(void **state) {
    (void)state;
    house h;
    ern_server_options o = options_of(&shared);
    o.max_concurrency = 1;
    other_house(&h, &o, ERN_CHAT_ERNIE, LONG_CONTEXT);
    char body[4096] = "{\"max_tokens\":1,\"prompt\":[20", v[64];
    for (int i = 0; i < 300; i++) strcat(body, ",20");
    strcat(body, "]}");
    json_decref(post(h.port, "/v1/completions", body, 200));
    wait_idle(&h);
    ern_engine_stats st;
    ern_engine_stats_read(h.engine, &st);
    assert_true(st.prefill_ns_per_token > 0);
    assert_int_equal(atomic_load(&h.server->n_waiting_token), 0);
    int fd = open_long(&h, "," LONG ",\"stream\":true");
    static const struct {
        long long wait_s;
        int low, high;
    } ask[] = {{0, 1, 1}, {10, 8, 12}, {40, 32, 48}, {100000, 40, 60}};
    for (size_t i = 0; i < sizeof ask / sizeof ask[0]; i++) {
        ern_engine_stats_read(h.engine, &st);
        long long n = ask[i].wait_s * 1000000000 / st.prefill_ns_per_token;
        atomic_fetch_add(&h.server->n_waiting_token, n);
        raw_answer a = raw_call(h.port, "POST", "/v1/completions", "", "{\"prompt\":\"x\",\"max_tokens\":1}");
        atomic_fetch_sub(&h.server->n_waiting_token, n);
        if (a.status != 429) fail_msg("case %zu: %d: %s", i, a.status, a.body);
        int after = atoi(raw_header(&a, "Retry-After", v, sizeof v));
        if (after < ask[i].low || after > ask[i].high) fail_msg("case %zu: Retry-After %d", i, after);
        double ms = atof(raw_header(&a, "retry-after-ms", v, sizeof v));
        assert_true(ms >= ask[i].low * 1000 - 500 && ms <= ask[i].high * 1000 + 500);
        raw_free(&a);
    }
    close(fd);
    wait_idle(&h);
    assert_int_equal(atomic_load(&h.server->n_waiting_token), 0); /* who leaves is no longer waited for */
    house_close(&h);
}

static void *drain_main(void *arg) {
    ern_server_drain(arg);
    return NULL;
}

/* A drain lets running work finish and refuses new work; a hurried one ends it with an error event. */
static void drains(void **state) {
    (void)state;
    for (int hurry = 0; hurry < 2; hurry++) {
        house h;
        ern_server_options o = options_of(&shared);
        other_house(&h, &o, ERN_CHAT_ERNIE, LONG_CONTEXT);
        int fd[2];
        for (int i = 0; i < 2; i++) {
            fd[i] = raw_connect(h.port);
            char body[128], some[1];
            (void)snprintf(body, sizeof body,
                           "{\"prompt\":\"x\",\"max_tokens\":%d,\"ignore_eos\":true,\"stream\":true}",
                           hurry ? 30000 : 200);
            raw_request(fd[i], "POST", "/v1/completions", "", body);
            struct pollfd p = {.fd = fd[i], .events = POLLIN};
            assert_int_equal(poll(&p, 1, 120000), 1);
            assert_int_equal(recv(fd[i], some, 1, MSG_PEEK), 1);
        }
        pthread_t t;
        assert_int_equal(pthread_create(&t, NULL, drain_main, h.server), 0);
        raw_answer a;
        for (int status = 200; status != 503;) { /* until the other thread has begun it */
            a = raw_call(h.port, "GET", "/health", "", "");
            status = a.status;
            assert_true(status == 200 || status == 503);
            raw_free(&a);
        }
        if (hurry) ern_server_hurry(h.server);
        for (int i = 0; i < 2; i++) {
            a = raw_read(fd[i], 120000);
            assert_true(a.whole);
            stream_seen s;
            read_stream(&a, &s);
            assert_int_equal(s.n_done, 1);
            assert_int_equal(s.n_finish, !hurry); /* the long ones wait for us to read, so they cannot have ended */
            assert_int_equal(s.n_error, hurry);
            json_decref(s.error);
            raw_free(&a);
            close(fd[i]);
        }
        assert_int_equal(pthread_join(t, NULL), 0);
        house_close(&h);
    }
}

/* Before an engine is attached the port answers: 503 and how far the load is. */
static void loading(void **state) {
    (void)state;
    ern_server *s;
    ern_err err;
    ern_server_options o = options_of(&shared);
    made_check(ern_server_open(&s, &o, &err), &err, "server");
    ern_server_loading(s, "weights", 30, 120);
    static const char *const path[] = {"/health", "/v1/models"};
    for (int i = 0; i < 3; i++) {
        raw_answer a = i < 2 ? raw_call(ern_server_port(s), "GET", path[i], "", "")
                             : raw_call(ern_server_port(s), "POST", "/v1/completions", "", "{\"prompt\":\"x\"}");
        assert_int_equal(a.status, 503);
        assert_non_null(strstr(a.body, "weights 25% (30 of 120 bytes)"));
        raw_free(&a);
    }
    ern_server *second;
    o.port = ern_server_port(s);
    assert_int_equal(ern_server_open(&second, &o, &err), ERN_ERR_NET);
    assert_non_null(strstr(err.text, "--port"));
    ern_server_close(s);
}

static void strict_fastdeploy(void **state) {
    (void)state;
    house h;
    ern_server_options o = options_of(&shared);
    o.strict_fastdeploy = true;
    o.max_stop = 5;
    other_house(&h, &o, ERN_CHAT_ERNIE, CONTEXT);
    const char *p = "/v1/completions";
    json_t *v =
        post(h.port, p, "{\"prompt\":\"x\",\"max_tokens\":1000000,\"n\":1,\"ignore_eos\":false,\"stop\":\"q\"}", 200);
    json_decref(v); /* clamped, not refused */
    v = post(h.port, p, "{\"prompt\":\"x\",\"stop\":[\"a\",\"b\",\"c\",\"d\",\"e\",\"f\"]}", 400);
    assert_non_null(strstr(text_at(v, "error.message"), "exceeds the limit max_stop_seqs_num(5)"));
    json_decref(v);
    v = post(h.port, p,
             "{\"prompt\":\"x\",\"stop\":\"one two three four five six seven eight nine ten eleven twelve\"}", 400);
    assert_non_null(strstr(text_at(v, "error.message"), "exceeds the limit stop_seqs_max_len(8)"));
    json_decref(v);
    /* token sequence, kept in the text */
    v = post(h.port, p, "{\"prompt\":\"x\",\"max_tokens\":9,\"allowed_token_ids\":[40],\"return_token_ids\":true}",
             200);
    assert_int_equal(json_array_size(at(v, "choices.0.completion_token_ids")), 9);
    json_decref(v);
    house_close(&h);
}

static void thinking_format(void **state) {
    (void)state;
    house h;
    ern_server_options o = options_of(&shared);
    other_house(&h, &o, ERN_CHAT_THINKING, CONTEXT);
    const char *c = "/v1/chat/completions";
    json_t *v = post(h.port, c,
                     "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"max_tokens\":20,\"ignore_eos\":true,"
                     "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{}}}]}",
                     200);
    /* random weights never end their thinking: all is reasoning */
    assert_string_equal(text_at(v, "choices.0.message.reasoning_content"), text_at(v, "choices.0.message.reasoning"));
    assert_true(json_integer_value(at(v, "usage.completion_tokens_details.reasoning_tokens")) > 0);
    json_decref(v);
    refused(
        h.port, c,
        "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"chat_template_kwargs\":{\"enable_thinking\":false}}",
        400, "chat_template_kwargs", NULL);
    refused(h.port, c, "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"chat_template_kwargs\":{\"own\":1}}",
            400, "chat_template_kwargs", NULL);
    house_close(&h);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(small_routes),
        cmocka_unit_test(models_were_created_once),
        cmocka_unit_test(framing),
        cmocka_unit_test(chat_and_usage),
        cmocka_unit_test(stream_equals_whole),
        cmocka_unit_test(choices_and_prompts),
        cmocka_unit_test(logprobs),
        cmocka_unit_test(logprobs_modes),
        cmocka_unit_test(stops),
        cmocka_unit_test(sampling_fields),
        cmocka_unit_test(refusals),
        cmocka_unit_test(tokens_both_ways),
        cmocka_unit_test(hang_up),
        cmocka_unit_test(slow_reader),
        cmocka_unit_test(duplicate_id_and_deadline),
        cmocka_unit_test(comes_again_at_once),
        cmocka_unit_test(too_many),
        cmocka_unit_test(refusals_say_when),
        cmocka_unit_test(drains),
        cmocka_unit_test(loading),
        cmocka_unit_test(strict_fastdeploy),
        cmocka_unit_test(thinking_format),
    };
    return cmocka_run_group_tests(tests, open_shared, close_shared);
}
