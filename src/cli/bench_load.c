/* Many streams from one thread. See bench_load.h. */
#include "cli/bench_load.h"

#include <curl/curl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/jsonr.h"
#include "base/os.h"
#include "cli/bench_prompts.h"
#include "cli/bench_stats.h"

enum { LINE_LIMIT = 16 << 20, DEPTH = 32, WAIT_MS = 200, ITL_MAX = 1 << 20 };

/* One place for a request in flight. */
typedef struct slot {
    CURL *curl;
    bench_record *record; /* NULL: free */
    ern_buf line, body;
    int64_t begin_us, last_us; /* last chunk with text; 0: none yet */
} slot;

typedef struct loading {
    const bench_load_options *o;
    bench_run *run;
    CURLM *multi;
    struct curl_slist *header;
    slot *slot; /* [in_flight_max] */
    int32_t n_begun, n_done, n_flying, n_refused;
    double next_s; /* when the next request may begin */
    int64_t begin_us, shown_us;
} loading;

/* ---- what the server sends ------------------------------------------------------------------------------------- */

static bool has_text(const json_t *choice) {
    const json_t *delta = json_object_get(choice, "delta");
    if (json_string_length(json_object_get(choice, "text"))) return true;
    return json_string_length(json_object_get(delta, "content")) ||
           json_string_length(json_object_get(delta, "reasoning_content")) ||
           json_array_size(json_object_get(delta, "tool_calls"));
}

/* A chunk of text came now. */
static void take_chunk(slot *s, int64_t now_us) {
    bench_record *r = s->record;
    if (s->last_us == 0) {
        r->ttft_s = (double)(now_us - s->begin_us) * 1e-6;
        s->last_us = now_us;
        return;
    }
    if (r->n_itl == r->cap_itl && r->cap_itl < ITL_MAX) {
        const int32_t cap = r->cap_itl ? 2 * r->cap_itl : 64;
        double *more = realloc(r->itl_s, (size_t)cap * sizeof *more);
        if (more) r->itl_s = more, r->cap_itl = cap;
    }
    if (r->n_itl < r->cap_itl) r->itl_s[r->n_itl++] = (double)(now_us - s->last_us) * 1e-6;
    s->last_us = now_us;
}

static void take_error(bench_record *r, const json_t *body) {
    const json_t *e = json_object_get(body, "error");
    if (!e) e = json_object_get(body, "detail");
    const char *text = json_string_value(json_is_object(e) ? json_object_get(e, "message") : e);
    if (text) (void)snprintf(r->error, sizeof r->error, "%.110s", text);
}

static void take_event(slot *s, const char *data, size_t len, int64_t now_us) {
    json_t *event = NULL;
    if (len == 6 && memcmp(data, "[DONE]", 6) == 0) return;
    if (ern_json_parse(&event, data, len, DEPTH, "an event", NULL) != ERN_OK) {
        (void)snprintf(s->record->error, sizeof s->record->error, "an event is no JSON");
        return;
    }
    const json_t *usage = json_object_get(event, "usage");
    if (has_text(json_array_get(json_object_get(event, "choices"), 0))) take_chunk(s, now_us);
    if (json_is_object(usage)) {
        s->record->n_in = (int32_t)json_integer_value(json_object_get(usage, "prompt_tokens"));
        s->record->n_out = (int32_t)json_integer_value(json_object_get(usage, "completion_tokens"));
    }
    take_error(s->record, event);
    json_decref(event);
}

static size_t on_data(char *data, size_t size, size_t n, void *ud) {
    slot *s = ud;
    const int64_t now_us = ern_now_us();
    if (!ern_buf_add(&s->line, data, size * n)) return 0;
    long status = 0;
    (void)curl_easy_getinfo(s->curl, CURLINFO_RESPONSE_CODE, &status);
    if (status != 200) return size * n; /* kept whole for its message */
    size_t from = 0;
    const char *end;
    while (from < s->line.len && (end = memchr(s->line.data + from, '\n', s->line.len - from))) {
        size_t len = (size_t)(end - s->line.data) - from;
        const char *text = s->line.data + from;
        from += len + 1;
        if (len && text[len - 1] == '\r') len--;
        if (len < 5 || memcmp(text, "data:", 5) != 0) continue;
        const size_t skip = len > 5 && text[5] == ' ' ? 6 : 5;
        take_event(s, text + skip, len - skip, now_us);
    }
    ern_buf_drop(&s->line, from);
    return size * n;
}

/* ---- begin and end of a request -------------------------------------------------------------------------------- */

static bool begin(loading *l, slot *s) {
    const bench_load_options *o = l->o;
    const int32_t i = l->n_begun;
    CURL *h = s->curl ? s->curl : (s->curl = curl_easy_init());
    if (!h) return false;
    ern_buf_clear(&s->line);
    ern_buf_clear(&s->body);
    o->body(o->ud, o->first + i, &s->body);
    s->record = &l->run->record[i];
    s->last_us = 0;
    curl_easy_reset(h);
    (void)curl_easy_setopt(h, CURLOPT_URL, o->url);
    (void)curl_easy_setopt(h, CURLOPT_HTTPHEADER, l->header);
    (void)curl_easy_setopt(h, CURLOPT_WRITEFUNCTION, on_data);
    (void)curl_easy_setopt(h, CURLOPT_WRITEDATA, s);
    (void)curl_easy_setopt(h, CURLOPT_PRIVATE, s);
    (void)curl_easy_setopt(h, CURLOPT_NOSIGNAL, 1L);
    (void)curl_easy_setopt(h, CURLOPT_PROXY, "");
    (void)curl_easy_setopt(h, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)s->body.len);
    (void)curl_easy_setopt(h, CURLOPT_POSTFIELDS, s->body.data);
    s->begin_us = ern_now_us();
    s->record->begun = true;
    s->record->begin_s = (double)(s->begin_us - l->begin_us) * 1e-6;
    if (s->body.full || curl_multi_add_handle(l->multi, h) != CURLM_OK) {
        (void)snprintf(s->record->error, sizeof s->record->error, "%s",
                       s->body.full ? "its body is too long" : "libcurl refused it");
        s->record = NULL;
        l->n_done++;
    } else if (++l->n_flying > l->run->peak) {
        l->run->peak = l->n_flying;
    }
    l->n_begun++;
    l->next_s += bench_arrival_gap_s(o->seed, (uint64_t)l->n_begun, o->rate, o->burstiness);
    return true;
}

static void end(loading *l, slot *s, CURLcode code) {
    bench_record *r = s->record;
    long status = 0;
    json_t *body = NULL;
    r->e2el_s = (double)(ern_now_us() - s->begin_us) * 1e-6;
    (void)curl_easy_getinfo(s->curl, CURLINFO_RESPONSE_CODE, &status);
    if (code == CURLE_COULDNT_CONNECT || code == CURLE_COULDNT_RESOLVE_HOST) l->n_refused++;
    if (code != CURLE_OK) {
        (void)snprintf(r->error, sizeof r->error, "%.110s", curl_easy_strerror(code));
    } else if (status != 200) {
        if (s->line.len && ern_json_parse(&body, s->line.data, s->line.len, DEPTH, "", NULL) == ERN_OK)
            take_error(r, body);
        if (!r->error[0]) (void)snprintf(r->error, sizeof r->error, "status %ld", status);
        json_decref(body);
    } else if (!r->error[0] && r->n_out < 1) {
        (void)snprintf(r->error, sizeof r->error, "the stream ended without usage or without a token");
    }
    r->good = !r->error[0];
    if (r->good && s->last_us == 0)
        r->ttft_s = r->e2el_s; /* tokens without any text, as of a model of random weights */
    (void)curl_multi_remove_handle(l->multi, s->curl);
    s->record = NULL;
    l->n_flying--;
    l->n_done++;
}

/* ---- the run --------------------------------------------------------------------------------------------------- */

static slot *free_slot(loading *l) {
    for (int32_t i = 0; i < l->o->in_flight_max; i++)
        if (!l->slot[i].record) return &l->slot[i];
    return NULL;
}

static double since_s(const loading *l) { return (double)(ern_now_us() - l->begin_us) * 1e-6; }

static void show(loading *l, bool last) {
    const int64_t now_us = ern_now_us();
    if (!l->o->progress || (!last && now_us - l->shown_us < 1000000)) return;
    l->shown_us = now_us;
    l->o->progress(l->o->ud, l->n_done, l->o->n);
}

/* Milliseconds until something of our own is due. */
static int wait_ms(const loading *l) {
    if (l->n_begun == l->o->n || l->n_flying == l->o->in_flight_max) return WAIT_MS;
    const double left_ms = (l->next_s - since_s(l)) * 1e3;
    return left_ms < 0 ? 0 : left_ms > WAIT_MS ? WAIT_MS : (int)left_ms;
}

static ern_status run_all(loading *l, ern_err *err) {
    const bench_load_options *o = l->o;
    while (l->n_done < o->n && !*o->stop && since_s(l) < o->time_limit_s) {
        while (l->n_begun < o->n && l->n_flying < o->in_flight_max && l->next_s <= since_s(l))
            if (!begin(l, free_slot(l))) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for a request");
        int running = 0, left = 0;
        (void)curl_multi_perform(l->multi, &running);
        for (CURLMsg *m; (m = curl_multi_info_read(l->multi, &left));) {
            char *s = NULL;
            const CURLcode code = m->data.result;
            if (m->msg != CURLMSG_DONE) continue;
            (void)curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, &s);
            end(l, (slot *)(void *)s, code);
        }
        show(l, false);
        const int ms = wait_ms(l);
        if (l->n_done < o->n && ms > 0) (void)curl_multi_poll(l->multi, NULL, 0, ms, NULL);
        if (l->n_refused > 0 && l->n_refused == l->n_done && l->n_flying == 0)
            return ERN_FAIL(err, ERN_ERR_NET,
                            "no server at %.200s; start one with ernest serve, or name another with --base-url",
                            o->url);
    }
    return ERN_OK;
}

/* What is still flying, or never began, has failed. */
static void abandon(loading *l) {
    const char *why = *l->o->stop ? "stopped" : "not finished when the time was up";
    for (int32_t i = 0; i < l->o->in_flight_max; i++) {
        slot *s = &l->slot[i];
        if (!s->record) continue;
        (void)curl_multi_remove_handle(l->multi, s->curl);
        (void)snprintf(s->record->error, sizeof s->record->error, "%s", why);
        s->record = NULL;
    }
    for (int32_t i = l->n_begun; i < l->o->n; i++)
        (void)snprintf(l->run->record[i].error, sizeof l->run->record[i].error, "%s", why);
}

static ern_status prepare(loading *l, ern_err *err) {
    const bench_load_options *o = l->o;
    char bearer[600];
    l->run->n = o->n;
    l->run->record = calloc((size_t)o->n, sizeof *l->run->record);
    l->slot = calloc((size_t)o->in_flight_max, sizeof *l->slot);
    l->multi = curl_multi_init();
    l->header = curl_slist_append(NULL, "Content-Type: application/json");
    if (!l->run->record || !l->slot || !l->multi || !l->header)
        return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for %d requests", o->n);
    for (int32_t i = 0; i < o->in_flight_max; i++) {
        ern_buf_init(&l->slot[i].line, LINE_LIMIT);
        ern_buf_init(&l->slot[i].body, BENCH_BODY_MAX);
    }
    if (o->key && snprintf(bearer, sizeof bearer, "Authorization: Bearer %s", o->key) >= (int)sizeof bearer)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--api-key is longer than 500 bytes");
    struct curl_slist *more = o->key ? curl_slist_append(l->header, bearer) : l->header;
    if (!more) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for a header");
    l->header = more;
    (void)curl_multi_setopt(l->multi, CURLMOPT_MAXCONNECTS, (long)o->in_flight_max);
    return ERN_OK;
}

ern_status bench_load(const bench_load_options *o, bench_run *out, ern_err *err) {
    ERN_ASSERT(o->n > 0 && o->in_flight_max > 0 && o->in_flight_max <= BENCH_IN_FLIGHT_MAX);
    *out = (bench_run){.n = 0};
    loading l = {.o = o, .run = out};
    ern_status s = prepare(&l, err);
    l.begin_us = l.shown_us = ern_now_us();
    if (s == ERN_OK) s = run_all(&l, err);
    if (s == ERN_OK) {
        if (l.n_done < o->n) out->duration_s = since_s(&l);
        show(&l, true);
        abandon(&l);
    }
    for (int32_t i = 0; l.slot && i < o->in_flight_max; i++) {
        if (l.slot[i].record) (void)curl_multi_remove_handle(l.multi, l.slot[i].curl);
        if (l.slot[i].curl) curl_easy_cleanup(l.slot[i].curl);
        ern_buf_free(&l.slot[i].line);
        ern_buf_free(&l.slot[i].body);
    }
    for (int32_t i = 0; out->record && i < out->n; i++) {
        const double end_s = out->record[i].begin_s + out->record[i].e2el_s;
        if (end_s > out->duration_s) out->duration_s = end_s;
    }
    free(l.slot);
    curl_slist_free_all(l.header);
    if (l.multi) (void)curl_multi_cleanup(l.multi);
    return s;
}

void bench_run_free(bench_run *r) {
    for (int32_t i = 0; r->record && i < r->n; i++) free(r->record[i].itl_s);
    free(r->record);
    *r = (bench_run){.n = 0};
}
