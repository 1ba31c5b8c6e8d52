/* Replies whose words are known: a backend that says a given text, so that reasoning, tool calls, stop texts across
 * tokens, split characters and failures in the middle of a stream can be checked to the byte through the socket. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <cmocka.h>

#include "base/jsonr.h"
#include "made_model.h"
#include "raw_http.h"
#include "server/server.h"

enum { WANT_MAX = 64 };

/* What the next request gets, token by token; after its end the end token for ever. */
static ern_tokens said;
static int32_t end_id;
static int32_t bad_at = -1; /* output index whose logits are not finite */
static atomic_bool lost;    /* the device is gone */
static atomic_bool held;    /* steps wait while it is set */
static atomic_bool waiting; /* ... and one does */

static void nap_ms(int ms) {
    (void)nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000}, NULL);
}

typedef struct sayer {
    ern_backend base;
    ern_sampled out[3][WANT_MAX];
    int32_t n_want[3];
    uint64_t n_submit, n_wait;
} sayer;

static ern_status say_plan(ern_backend_plan *out, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    (void)m, (void)o, (void)err;
    *out = (ern_backend_plan){.page_bytes = 64, .scratch_bytes = 4096};
    return ERN_OK;
}

static const ern_backend_ops say_ops;

static ern_status say_open(ern_backend **out, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    (void)m, (void)o, (void)err;
    sayer *s = calloc(1, sizeof *s);
    if (!s) abort();
    s->base.ops = &say_ops;
    *out = &s->base;
    return ERN_OK;
}

static void say_close(ern_backend *b) { free(b); }

static void say_submit(ern_backend *b, const ern_batch *in) {
    sayer *s = (sayer *)(void *)b;
    int k = (int)(s->n_submit++ % 3);
    s->n_want[k] = in->n_want;
    for (int32_t w = 0; w < in->n_want && w < WANT_MAX; w++) {
        int32_t i = in->sample[w].position - in->sample[w].n_prompt;
        int32_t token = i >= 0 && (size_t)i < said.n ? said.id[i] : end_id;
        s->out[k][w] = (ern_sampled){.token = token, .logprob = -0.5f, .rank = 1, .bad = i == bad_at};
    }
}

static ern_status say_wait(ern_backend *b, ern_result *out, ern_err *err) {
    sayer *s = (sayer *)(void *)b;
    int k = (int)(s->n_wait++ % 3);
    if (atomic_load(&lost)) return ERN_FAIL(err, ERN_ERR_DEVICE, "the device is gone");
    while (atomic_load(&held)) {
        atomic_store(&waiting, true);
        nap_ms(1);
    }
    atomic_store(&waiting, false);
    *out = (ern_result){.n_want = s->n_want[k], .sampled = s->out[k], .compute_us = 1};
    return ERN_OK;
}

static void say_copy(ern_backend *b, const ern_page_pair *p, int32_t n) { (void)b, (void)p, (void)n; }
static bool say_read(ern_backend *b, const int32_t *p, int32_t n, void *h) {
    (void)b, (void)p, (void)n, (void)h;
    return true;
}
static void say_write(ern_backend *b, const int32_t *p, int32_t n, const void *h) {
    (void)b, (void)p, (void)n, (void)h;
}
static void say_probe(ern_backend *b, ern_probe_fn *fn, void *ud) { (void)b, (void)fn, (void)ud; }

static const ern_backend_ops say_ops = {.name = "said",
                                        .plan = say_plan,
                                        .open = say_open,
                                        .close = say_close,
                                        .submit = say_submit,
                                        .wait = say_wait,
                                        .kv_copy = say_copy,
                                        .kv_read = say_read,
                                        .kv_write = say_write,
                                        .probe = say_probe};

/* ---- the house ------------------------------------------------------------------------------------------------- */

static made_model made;
static ern_tokenizer *tokenizer;
static ern_engine *engine[2];
static ern_server *server[2]; /* by ern_chat_format */

static int open_all(void **state) {
    (void)state;
    ern_err err;
    made = made_model_open("tiny-dense", false, 3);
    made_check(ern_tokenizer_open(&tokenizer, made.dir, &err), &err, "tokenizer");
    end_id = ern_tokenizer_eos(tokenizer);
    for (int f = 0; f < 2; f++) {
        ern_engine_options e = {.backend = &say_ops,
                                .model = made.model,
                                .max_model_len = 2048,
                                .max_num_seqs = 4,
                                .max_batched_tokens = 512,
                                .chunked_prefill = true,
                                .memory_bytes = 16u << 20,
                                .queue_max = 16,
                                .overlap = true};
        made_check(ern_engine_open(&engine[f], &e, &err), &err, "engine");
        ern_server_options o = {.host = "127.0.0.1",
                                .metrics_port = -1,
                                .max_concurrency = 8,
                                .max_logprobs = 20,
                                .enable_logprob = true,
                                .split_reasoning = true,
                                .parse_tools = true,
                                .sse_ping_s = 15,
                                .drain_s = 5,
                                .body_max_bytes = 1 << 20,
                                .max_stop = 16,
                                .max_stop_bytes = 1024,
                                .max_stop_tokens = 8};
        made_check(ern_server_open(&server[f], &o, &err), &err, "server");
        made_check(ern_server_attach(server[f], engine[f], tokenizer, (ern_chat_format)f, &made.model->config, &err),
                   &err, "attach");
    }
    return 0;
}

static int close_all(void **state) {
    (void)state;
    for (int f = 0; f < 2; f++) {
        ern_server_close(server[f]);
        ern_engine_close(engine[f]);
    }
    ern_tokens_free(&said);
    ern_tokenizer_close(tokenizer);
    made_model_close(&made);
    return 0;
}

static void say(const char *text) {
    ern_err err;
    ern_tokens_free(&said);
    ern_tokens_init(&said, 2000);
    made_check(ern_tokenizer_encode(tokenizer, text, strlen(text), true, &said, &err), &err, "encode");
}

/* A reply put together again from its events, or read whole. */
typedef struct told {
    char content[4096], reasoning[4096], name[4][64], args[4][512], finish[32], error[64];
    int n_call, n_chunk, n_ping, status;
    long long reasoning_tokens;
} told;

static void add(char *to, size_t size, const json_t *v) {
    if (json_is_string(v)) strncat(to, json_string_value(v), size - strlen(to) - 1);
}

static void tell_calls(told *t, json_t *calls, bool stream) {
    size_t i;
    json_t *c;
    json_array_foreach(calls, i, c) {
        size_t at = stream ? (size_t)json_integer_value(json_object_get(c, "index")) : i;
        assert_true(at < 4);
        json_t *f = json_object_get(c, "function");
        if (json_object_get(c, "id")) {
            assert_int_equal(at, t->n_call); /* calls open in order, from 0 */
            t->n_call++;
            assert_int_equal(strncmp(json_string_value(json_object_get(c, "id")), "chatcmpl-tool-", 14), 0);
            assert_string_equal(json_string_value(json_object_get(c, "type")), "function");
            if (stream) assert_string_equal(json_string_value(json_object_get(f, "arguments")), "");
        } else {
            assert_null(json_object_get(f, "name")); /* the name comes once */
        }
        add(t->name[at], sizeof t->name[at], json_object_get(f, "name"));
        add(t->args[at], sizeof t->args[at], json_object_get(f, "arguments"));
    }
}

static void tell_choice(told *t, json_t *c, bool stream) {
    json_t *d = json_object_get(c, stream ? "delta" : "message");
    add(t->content, sizeof t->content, d ? json_object_get(d, "content") : json_object_get(c, "text"));
    add(t->reasoning, sizeof t->reasoning, json_object_get(d, "reasoning_content"));
    tell_calls(t, json_object_get(d, "tool_calls"), stream);
    add(t->finish, sizeof t->finish, json_object_get(c, "finish_reason"));
}

static json_t *parse(const char *text, size_t n) {
    json_t *v;
    ern_err err;
    if (ern_json_parse(&v, text, n, 64, "answer", &err) != ERN_OK) fail_msg("%s: %.*s", err.text, (int)n, text);
    return v;
}

static void tell_object(told *t, json_t *v, bool stream) {
    add(t->error, sizeof t->error, json_object_get(json_object_get(v, "error"), "code"));
    json_t *choices = json_object_get(v, "choices");
    if (json_array_size(choices)) tell_choice(t, json_array_get(choices, 0), stream);
    json_t *details = json_object_get(json_object_get(v, "usage"), "completion_tokens_details");
    if (details) t->reasoning_tokens = json_integer_value(json_object_get(details, "reasoning_tokens"));
}

/* Ask; `more` are further fields with a leading comma. */
static told ask(ern_chat_format f, const char *path, const char *more, bool stream) {
    char body[1024];
    (void)snprintf(body, sizeof body, "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"prompt\":\"x\"%s%s}",
                   more, stream ? ",\"stream\":true,\"stream_options\":{}" : "");
    raw_answer a = raw_call(ern_server_port(server[f]), "POST", path, "", body);
    told t = {.status = a.status};
    assert_true(a.whole);
    if (!stream || a.status != 200) {
        json_t *v = parse(a.body, a.len);
        tell_object(&t, v, false);
        json_decref(v);
    } else {
        bool done = false;
        for (const char *p = a.body; *p;) {
            const char *end = strstr(p, "\n\n");
            assert_non_null(end);
            assert_false(done);
            done = strncmp(p, "data: [DONE]", 12) == 0;
            if (p[0] == ':') {
                t.n_ping++;
            } else if (!done) {
                json_t *v = parse(p + 6, (size_t)(end - p) - 6); /* strict UTF-8: half a character would fail here */
                tell_object(&t, v, true);
                t.n_chunk++;
                json_decref(v);
            }
            p = end + 2;
        }
        assert_true(done);
    }
    raw_free(&a);
    return t;
}

static const char chat[] = "/v1/chat/completions", comp[] = "/v1/completions";
static const char tools[] = ",\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"look\"}}]";

/* ---- tests ----------------------------------------------------------------------------------------------------- */

static void reasoning_and_response(void **state) {
    (void)state;
    say("First I look.\nThen I say\n</think>\n\n\n<response>\nGood day, \xe4\xbd\xa0\xe5\xa5\xbd "
        "\xf0\x9f\x98\x80\n</response>\n");
    for (int stream = 0; stream < 2; stream++) {
        told t = ask(ERN_CHAT_THINKING, chat, "", stream);
        assert_string_equal(t.reasoning, "First I look.\nThen I say");
        assert_string_equal(t.content, "Good day, \xe4\xbd\xa0\xe5\xa5\xbd \xf0\x9f\x98\x80");
        assert_string_equal(t.finish, "stop");
        assert_true(t.reasoning_tokens > 3 && t.reasoning_tokens < (long long)said.n);
        assert_int_equal(t.n_call, 0);
    }
}

static void tool_calls(void **state) {
    (void)state;
    say("need it\n</think>\n\n\n<tool_call>\n{\"name\": \"look\", \"arguments\": {\"at\": \"\xe4\xbd\xa0\", \"n\": [1, "
        "2]}}\n"
        "</tool_call>\n\n<tool_call>\n{\"name\": \"again\", \"arguments\": {}}\n</tool_call>\n");
    for (int stream = 0; stream < 2; stream++) {
        told t = ask(ERN_CHAT_THINKING, chat, tools, stream);
        assert_int_equal(t.n_call, 2);
        assert_string_equal(t.name[0], "look");
        assert_string_equal(t.name[1], "again");
        json_t *args = parse(t.args[0], strlen(t.args[0]));
        assert_int_equal(json_array_size(json_object_get(args, "n")), 2);
        json_decref(args);
        assert_string_equal(t.args[1], "{}");
        assert_string_equal(t.finish, "tool_calls");
        assert_string_equal(t.reasoning, "need it");
        assert_string_equal(t.content, "");
        char one[256];
        (void)snprintf(one, sizeof one, "%s,\"parallel_tool_calls\":false", tools);
        t = ask(ERN_CHAT_THINKING, chat, one, stream);
        assert_int_equal(t.n_call, 1);
        (void)snprintf(one, sizeof one, "%s,\"tool_choice\":\"none\"", tools);
        t = ask(ERN_CHAT_THINKING, chat, one, stream);
        assert_int_equal(t.n_call, 0);
        assert_string_equal(t.finish, "stop");
        assert_non_null(strstr(t.content, "<tool_call>")); /* nobody asked: it is text */
    }
}

static void stop_texts(void **state) {
    (void)state;
    say("say abcab!abcabc then abc");
    static const struct {
        const char *stop, *text, *finish;
    } cases[] = {{"[\"abcabc\"]", "say abcab!", "stop"},
                 {"[\"abcabd\"]", "say abcab!abcabc then abc", "stop"}, /* held back, then let go at the end */
                 {"[\"zz\",\"b!a\"]", "say abca", "stop"},
                 {"\"say\"", "", "stop"},
                 {"\" then abc\"", "say abcab!abcabc", "stop"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        for (int k = 0; k < 4; k++) {
            char more[128];
            (void)snprintf(more, sizeof more, ",\"stop\":%s,\"max_streaming_response_tokens\":%d", cases[i].stop,
                           1 + k);
            told t = ask(ERN_CHAT_ERNIE, k & 2 ? comp : chat, more, k & 1);
            assert_string_equal(t.content, cases[i].text);
            assert_string_equal(t.finish, cases[i].finish);
        }
    }
}

static void characters_stay_whole(void **state) {
    (void)state;
    /* every byte of a four-byte character as its own token; then one cut short */
    ern_tokens_free(&said);
    ern_tokens_init(&said, 100);
    for (int round = 0; round < 3; round++) {
        static const char *const piece[] = {"<0xF0>", "<0x9F>", "<0x98>", "<0x80>"};
        for (int i = 0; i < (round == 2 ? 3 : 4); i++) {
            int32_t id = ern_tokenizer_id(tokenizer, piece[i]);
            assert_true(id >= 0);
            assert_true(ern_tokens_add(&said, id));
        }
    }
    for (int k = 0; k < 4; k++) {
        told t = ask(ERN_CHAT_ERNIE, k & 2 ? comp : chat, k & 2 ? ",\"logprobs\":0" : ",\"logprobs\":true", k & 1);
        assert_string_equal(t.content, "\xf0\x9f\x98\x80\xf0\x9f\x98\x80\xef\xbf\xbd");
    }
}

static void numbers_go_bad(void **state) {
    (void)state;
    say("one two three four five");
    bad_at = 2;
    told t = ask(ERN_CHAT_ERNIE, chat, "", false);
    assert_int_equal(t.status, 500);
    assert_string_equal(t.error, "numerical_error");
    t = ask(ERN_CHAT_ERNIE, chat, "", true); /* the stream had begun: an error event, then [DONE] */
    assert_int_equal(t.status, 200);
    assert_string_equal(t.error, "numerical_error");
    assert_string_equal(t.finish, "");
    bad_at = -1;
    t = ask(ERN_CHAT_ERNIE, chat, "", false);
    assert_string_equal(t.content, "one two three four five");
}

/* A stream over a step that is held: what has come when `until` is in it (or, NULL, after some seconds of silence);
 * then the step is let go and the rest is read. */
static raw_answer ask_held(const char *more, const char *until) {
    char body[256];
    static char got[65536];
    size_t n = 0;
    (void)snprintf(body, sizeof body, "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"stream\":true%s}", more);
    atomic_store(&held, true);
    int fd = raw_connect(ern_server_port(server[ERN_CHAT_ERNIE]));
    raw_request(fd, "POST", chat, "Connection: close\r\n", body);
    while (!atomic_load(&waiting)) nap_ms(1);
    if (!until) nap_ms(2500);
    while (until && !strstr(got, until)) {
        ssize_t k = raw_recv(fd, got + n, sizeof got - 1 - n, 120000);
        assert_true(k > 0);
        got[n += (size_t)k] = 0;
    }
    atomic_store(&held, false);
    for (ssize_t k; (k = raw_recv(fd, got + n, sizeof got - 1 - n, 120000)) > 0; got[n] = 0) n += (size_t)k;
    close(fd);
    raw_answer a = {.status = 200, .head = strdup(got)};
    assert_non_null(a.head);
    got[0] = 0;
    a.body = strstr(a.head, "\r\n\r\n");
    assert_non_null(a.body);
    return a;
}

/* A long silence, as of a long prompt: the role is there at once, then comments, then the words. */
static void silence_is_broken(void **state) {
    (void)state;
    say("at last");
    raw_answer a = ask_held(",\"sse_ping_interval\":1", ": ping\n\n");
    const char *role = strstr(a.body, "\"role\":\"assistant\""), *ping = strstr(a.body, ": ping"),
               *word = strstr(a.body, "\"content\":\"at"), *done = strstr(a.body, "data: [DONE]");
    assert_true(role && ping && word && done && role < ping && ping < word && word < done);
    raw_free(&a);
    a = ask_held(",\"sse_ping_interval\":0", NULL);
    assert_null(strstr(a.body, ": ping"));
    assert_non_null(strstr(a.body, "data: [DONE]"));
    raw_free(&a);
}

/* The backend fails: whoever is inside and whoever comes later hears that it is the server's fault. */
static void engine_breaks(void **state) {
    (void)state;
    say("never");
    atomic_store(&lost, true);
    told t = ask(ERN_CHAT_THINKING, chat, "", false);
    assert_int_equal(t.status, 500);
    assert_string_equal(t.error, "engine_error");
    t = ask(ERN_CHAT_THINKING, chat, "", false);
    assert_int_equal(t.status, 503);
    assert_string_equal(t.error, "engine_failed");
    raw_answer a = raw_call(ern_server_port(server[ERN_CHAT_THINKING]), "GET", "/health", "", "");
    assert_int_equal(a.status, 503);
    raw_free(&a);
    atomic_store(&lost, false);
    t = ask(ERN_CHAT_ERNIE, chat, "", false); /* the other server does not know */
    assert_string_equal(t.content, "never");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reasoning_and_response), cmocka_unit_test(tool_calls),     cmocka_unit_test(stop_texts),
        cmocka_unit_test(characters_stay_whole),  cmocka_unit_test(numbers_go_bad), cmocka_unit_test(silence_is_broken),
        cmocka_unit_test(engine_breaks),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}
