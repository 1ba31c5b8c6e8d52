/* A client of the OpenAI protocol. See client.h. */
#include "cli/client.h"

#include <curl/curl.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINE_LIMIT = 16 << 20, BODY_LIMIT = 16 << 20, URL_MAX = 512, JSON_DEPTH = 64 };

struct client {
    CURL *curl;
    struct curl_slist *header;
    volatile sig_atomic_t *stop;
    char url[URL_MAX];
    ern_buf line; /* of a stream: what came since the last newline; else the whole body */
    bool streaming;
    client_event_fn *fn;
    void *ud;
    char refused[256]; /* an error event's message; "" while none came */
};

const char *client_url(const client *c) { return c->url; }

/* The message of {"error": {"message": ...}} or {"error": "..."} or {"detail": "..."}. */
static const char *error_message(const json_t *body) {
    const json_t *e = json_object_get(body, "error");
    if (!e) e = json_object_get(body, "detail");
    const char *text = json_string_value(json_is_object(e) ? json_object_get(e, "message") : e);
    return text;
}

static void take_event(client *c, const char *data, size_t len) {
    if (len == 6 && memcmp(data, "[DONE]", 6) == 0) return;
    json_t *event = NULL;
    ern_err err;
    if (ern_json_parse(&event, data, len, JSON_DEPTH, "the server's event", &err) != ERN_OK) {
        (void)snprintf(c->refused, sizeof c->refused, "%.250s", err.text);
        return;
    }
    const char *message = error_message(event);
    if (message)
        (void)snprintf(c->refused, sizeof c->refused, "%.250s", message);
    else
        c->fn(c->ud, event);
    json_decref(event);
}

/* Whole lines in c->line; "data: x" is an event, anything else (comments, blank lines) is not ours. */
static void take_lines(client *c) {
    size_t from = 0;
    const char *end;
    while (from < c->line.len && (end = memchr(c->line.data + from, '\n', c->line.len - from))) {
        size_t len = (size_t)(end - c->line.data) - from;
        const char *text = c->line.data + from;
        from += len + 1;
        if (len && text[len - 1] == '\r') len--;
        if (len < 5 || memcmp(text, "data:", 5) != 0) continue;
        size_t skip = len > 5 && text[5] == ' ' ? 6 : 5;
        take_event(c, text + skip, len - skip);
    }
    ern_buf_drop(&c->line, from);
}

static size_t on_data(char *data, size_t size, size_t n, void *ud) {
    client *c = ud;
    long status = 0;
    if (!ern_buf_add(&c->line, data, size * n)) return 0;
    (void)curl_easy_getinfo(c->curl, CURLINFO_RESPONSE_CODE, &status);
    if (c->streaming && status == 200) take_lines(c);
    return size * n;
}

static int on_progress(void *ud, curl_off_t a, curl_off_t b, curl_off_t x, curl_off_t y) {
    (void)a, (void)b, (void)x, (void)y;
    return *((client *)ud)->stop ? 1 : 0;
}

ern_status client_open(client **out, const char *url, const char *key, volatile sig_atomic_t *stop, ern_err *err) {
    *out = NULL;
    size_t len = strlen(url);
    while (len && url[len - 1] == '/') len--;
    if ((strncmp(url, "http://", 7) != 0 && strncmp(url, "https://", 8) != 0) || len + 4 > URL_MAX)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--url %.100s is no address; give one such as http://127.0.0.1:8000/v1",
                        url);
    bool v1 = len > 3 && memcmp(url + len - 3, "/v1", 3) == 0;
    client *c = calloc(1, sizeof *c);
    if (!c) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the client");
    (void)snprintf(c->url, sizeof c->url, "%.*s%s", (int)len, url, v1 ? "" : "/v1");
    c->stop = stop;
    ern_buf_init(&c->line, LINE_LIMIT);
    c->curl = curl_easy_init();
    char bearer[600];
    if (key && snprintf(bearer, sizeof bearer, "Authorization: Bearer %s", key) >= (int)sizeof bearer) {
        client_close(c);
        return ERN_FAIL(err, ERN_ERR_USAGE, "--api-key is longer than 500 bytes");
    }
    c->header = curl_slist_append(NULL, "Content-Type: application/json");
    struct curl_slist *with_key = key && c->header ? curl_slist_append(c->header, bearer) : c->header;
    if (with_key) c->header = with_key; /* a failed append leaves the old list ours */
    if (!c->curl || !with_key) {
        client_close(c);
        return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the client");
    }
    *out = c;
    return ERN_OK;
}

void client_close(client *c) {
    if (!c) return;
    curl_slist_free_all(c->header);
    if (c->curl) curl_easy_cleanup(c->curl);
    ern_buf_free(&c->line);
    free(c);
}

/* Do one request; body NULL: GET. On return c->line holds what was not taken as events. */
static ern_status transfer(client *c, const char *path, const ern_buf *body, ern_err *err) {
    char url[URL_MAX + 64], why[CURL_ERROR_SIZE] = "";
    (void)snprintf(url, sizeof url, "%s%s", c->url, path);
    ern_buf_clear(&c->line);
    c->refused[0] = 0;
    CURL *h = c->curl;
    curl_easy_reset(h);
    (void)curl_easy_setopt(h, CURLOPT_URL, url);
    (void)curl_easy_setopt(h, CURLOPT_HTTPHEADER, c->header);
    (void)curl_easy_setopt(h, CURLOPT_WRITEFUNCTION, on_data);
    (void)curl_easy_setopt(h, CURLOPT_WRITEDATA, c);
    (void)curl_easy_setopt(h, CURLOPT_NOPROGRESS, 0L);
    (void)curl_easy_setopt(h, CURLOPT_XFERINFOFUNCTION, on_progress);
    (void)curl_easy_setopt(h, CURLOPT_XFERINFODATA, c);
    (void)curl_easy_setopt(h, CURLOPT_ERRORBUFFER, why);
    (void)curl_easy_setopt(h, CURLOPT_NOSIGNAL, 1L);
    if (body) {
        (void)curl_easy_setopt(h, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)body->len);
        (void)curl_easy_setopt(h, CURLOPT_POSTFIELDS, body->data);
    }
    CURLcode code = curl_easy_perform(h);
    (void)curl_easy_setopt(h, CURLOPT_ERRORBUFFER, NULL);
    if (code == CURLE_ABORTED_BY_CALLBACK) return ERN_FAIL(err, ERN_ERR_CANCELLED, "stopped");
    if (code == CURLE_COULDNT_CONNECT || code == CURLE_COULDNT_RESOLVE_HOST)
        return ERN_FAIL(err, ERN_ERR_NET,
                        "no server at %.200s; start one with ernest serve, or name another with --url", c->url);
    if (code != CURLE_OK)
        return ERN_FAIL(err, ERN_ERR_NET, "talking to %.200s failed: %s", c->url,
                        *why ? why : curl_easy_strerror(code));
    long status = 0;
    (void)curl_easy_getinfo(h, CURLINFO_RESPONSE_CODE, &status);
    if (status == 200 && !c->refused[0]) return ERN_OK;
    json_t *answer = NULL;
    ern_err ignored;
    if (c->line.len && ern_json_parse(&answer, c->line.data, c->line.len, JSON_DEPTH, "", &ignored) == ERN_OK &&
        error_message(answer))
        (void)snprintf(c->refused, sizeof c->refused, "%.250s", error_message(answer));
    json_decref(answer);
    if (status == 200) return ERN_FAIL(err, ERN_ERR_NET, "the server ended the answer: %s", c->refused);
    return ERN_FAIL(err, ERN_ERR_NET, "%.200s answered %ld%s%s", url, status, c->refused[0] ? ": " : "", c->refused);
}

ern_status client_stream(client *c, const char *path, const ern_buf *body, client_event_fn *fn, void *ud,
                         ern_err *err) {
    c->streaming = true;
    c->fn = fn;
    c->ud = ud;
    return transfer(c, path, body, err);
}

ern_status client_first_model(client *c, char *out, size_t size, ern_err *err) {
    c->streaming = false;
    ERN_TRY(transfer(c, "/models", NULL, err));
    json_t *list = NULL;
    ERN_TRY(ern_json_parse(&list, c->line.data ? c->line.data : "", c->line.len, JSON_DEPTH, "the model list", err));
    const char *id = json_string_value(json_object_get(json_array_get(json_object_get(list, "data"), 0), "id"));
    int n = id ? snprintf(out, size, "%s", id) : -1;
    json_decref(list);
    if (n < 0 || (size_t)n >= size)
        return ERN_FAIL(err, ERN_ERR_NET, "%.200s lists no model; name one with --model-name", c->url);
    return ERN_OK;
}
