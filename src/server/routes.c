/* Which path does what: keys, hosts, CORS, the small answers, and the way of the large ones into the front. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>

#include "base/jsonw.h"
#include "base/log.h"
#include "base/os.h"
#include "server/job.h"
#include "server/kv_view.h"

enum { GET = 1, POST = 2, SMALL_ANSWER_BYTES = 4 * 1024 * 1024 };

typedef void route_fn(ern_server *s, ern_http_request *r);

typedef struct route {
    const char *path;
    unsigned methods;
    bool prefix;
    bool key; /* needs a key when keys are set */
    route_fn *fn;
    int kind; /* job_kind, when fn is NULL */
} route;

static route_fn models, model, health, version, load_routes, load_now, config_info, prometheus, debug_kv;

static const route routes[] = {
    {"/v1/chat/completions", POST, false, true, NULL, JOB_CHAT},
    {"/v1/completions", POST, false, true, NULL, JOB_COMPLETION},
    {"/v1/models", GET, false, true, models, 0},
    {"/v1/models/", GET, true, true, model, 0},
    {"/v1/load", GET, false, true, load_now, 0},
    {"/tokenize", POST, false, true, NULL, JOB_TOKENIZE},
    {"/detokenize", POST, false, true, NULL, JOB_DETOKENIZE},
    {"/health", GET, false, false, health, 0},
    {"/ping", GET | POST, false, false, health, 0},
    {"/version", GET, false, false, version, 0},
    {"/load", GET, false, false, load_routes, 0},
    {"/metrics", GET, false, false, prometheus, 0},
    {"/config-info", GET, false, false, config_info, 0},
    {"/debug/kv", GET, false, true, debug_kv, 0},
};
enum { N_ROUTE = sizeof routes / sizeof routes[0] };

static unsigned method_bit(const char *method) {
    if (strcmp(method, "GET") == 0 || strcmp(method, "HEAD") == 0) return GET;
    return strcmp(method, "POST") == 0 ? POST : 0;
}

void routes_fail(ern_http_request *r, const api_error *e) {
    if (e->status == 429 || e->status == 503) {
        int64_t ms = e->retry_ms ? e->retry_ms : server_spread_ms(1000);
        char text[24];
        (void)snprintf(text, sizeof text, "%lld", (long long)(ms < 1500 ? 1 : (ms + 500) / 1000));
        http_add_header(r, "Retry-After", text);
        (void)snprintf(text, sizeof text, "%lld", (long long)ms);
        http_add_header(r, "retry-after-ms", text);
    }
    if (e->status == 401) http_add_header(r, "WWW-Authenticate", "Bearer");
    ern_buf b;
    ern_buf_init(&b, 8192);
    api_error_write(&b, e);
    http_reply(r, e->status, "application/json", b.data, b.len);
    ern_buf_free(&b);
}

/* ---- before the body ------------------------------------------------------------------------------------------- */

static void request_id(ern_http_request *r) {
    const char *in = http_header(r, "X-Request-Id");
    size_t n = in ? strlen(in) : 0;
    bool ok = n > 0 && n <= 200;
    for (size_t i = 0; ok && i < n; i++) ok = in[i] > ' ' && in[i] < 127;
    if (ok) {
        http_add_header(r, "X-Request-Id", in);
        return;
    }
    uint64_t x[2] = {0};
    if (getrandom(x, sizeof x, 0) != (ssize_t)sizeof x) x[0] = (uint64_t)ern_now_us();
    char made[48];
    (void)snprintf(made, sizeof made, "req-%016llx%016llx", (unsigned long long)x[0], (unsigned long long)x[1]);
    http_add_header(r, "X-Request-Id", made);
}

/* A server bound to this machine alone answers to this machine's names only, so that a web page elsewhere cannot point
 * its own name at it (DNS rebinding). */
static bool host_ok(const ern_server *s, const char *host) {
    bool local = strncmp(s->host, "127.", 4) == 0 || strcmp(s->host, "localhost") == 0 || strcmp(s->host, "::1") == 0;
    if (!local || !host) return true;
    size_t n = strlen(host);
    const char *colon = strrchr(host, ':');
    if (colon && !strchr(colon, ']')) n = (size_t)(colon - host);
    static const char *const ok[] = {"localhost", "127.0.0.1", "[::1]"};
    for (size_t i = 0; i < 3; i++) {
        if (n == strlen(ok[i]) && strncasecmp(host, ok[i], n) == 0) return true;
    }
    return n == strlen(s->host) && strncasecmp(host, s->host, n) == 0;
}

/* Headers that let a page of an allowed origin read the answer. True when the origin is allowed. */
static bool cors(const ern_server *s, ern_http_request *r) {
    const char *origin = s->o.n_cors_origin ? http_header(r, "Origin") : NULL;
    if (!origin) return false;
    bool ok = false;
    for (int i = 0; i < s->o.n_cors_origin && !ok; i++)
        ok = strcmp(s->cors[i], "*") == 0 || strcasecmp(s->cors[i], origin) == 0;
    if (!ok) return false;
    http_add_header(r, "Access-Control-Allow-Origin", origin);
    http_add_header(r, "Vary", "Origin");
    http_add_header(r, "Access-Control-Expose-Headers", "X-Request-Id, Retry-After, retry-after-ms");
    return true;
}

static int find_route(const char *path) {
    for (int i = 0; i < N_ROUTE; i++) {
        size_t n = strlen(routes[i].path);
        if (routes[i].prefix ? strncmp(path, routes[i].path, n) == 0 && path[n] : strcmp(path, routes[i].path) == 0)
            return i;
    }
    return -1;
}

static void refuse(ern_http_request *r, int status, const char *code, const char *message) {
    api_error e;
    (void)api_fail(&e, status, code, NULL, "%s", message);
    routes_fail(r, &e);
}

void routes_on_headers(void *ud, ern_http_request *r) {
    ern_server *s = ud;
    request_id(r);
    bool allowed = cors(s, r);
    r->route = find_route(r->path);
    if (!host_ok(s, http_header(r, "Host"))) {
        refuse(r, 403, "host_not_allowed",
               "this server is bound to the local machine and answers to localhost, 127.0.0.1, [::1] and its bound "
               "address only; bind it with --host to serve other names");
        return;
    }
    if (strcmp(r->method, "OPTIONS") == 0 && allowed && http_header(r, "Access-Control-Request-Method")) {
        /* What the page asks for, since every SDK has headers of its own; none has a list as long as the limit. */
        const char *want = http_header(r, "Access-Control-Request-Headers");
        bool fits = want && strlen(want) <= HTTP_VALUE_MAX_BYTES;
        http_add_header(r, "Access-Control-Allow-Methods", "GET, POST, OPTIONS");
        http_add_header(r, "Access-Control-Allow-Headers", fits ? want : "Authorization, Content-Type, X-Request-Id");
        http_add_header(r, "Access-Control-Max-Age", "600");
        http_reply(r, 204, NULL, "", 0);
        return;
    }
    bool guarded = r->route >= 0 ? routes[r->route].key : strncmp(r->path, "/v1", 3) == 0;
    if (guarded && strcmp(r->method, "OPTIONS") != 0 && !auth_allows(&s->keys, http_header(r, "Authorization"))) {
        refuse(r, 401, "invalid_api_key", "a valid API key is needed: send Authorization: Bearer KEY");
        return;
    }
    if (r->route < 0) {
        refuse(r, 404, "not_found", "there is no such path here; GET /load lists the ones of the API");
        return;
    }
    if (!(routes[r->route].methods & method_bit(r->method))) {
        unsigned m = routes[r->route].methods;
        http_add_header(r, "Allow", m == GET ? "GET, HEAD" : m == POST ? "POST" : "GET, HEAD, POST");
        refuse(r, 405, "method_not_allowed", "this path does not take that method; see the Allow header");
    }
}

/* ---- the small answers ----------------------------------------------------------------------------------------- */

/* Loading or draining: 503 with what is going on. True when it answered. */
static bool not_serving(ern_server *s, ern_http_request *r) {
    int state = atomic_load(&s->state);
    api_error e;
    if (state == SERVER_READY) return false;
    if (state == SERVER_DRAINING) {
        (void)api_fail(&e, 503, "shutting_down", NULL, "the server is shutting down");
    } else {
        pthread_mutex_lock(&s->lock);
        double part = s->load_all ? 100.0 * (double)s->load_done / (double)s->load_all : 0;
        (void)api_fail(&e, 503, "loading", NULL, "the model is loading: %s %.0f%% (%llu of %llu bytes)",
                       s->loading[0] ? s->loading : "starting", part, (unsigned long long)s->load_done,
                       (unsigned long long)s->load_all);
        pthread_mutex_unlock(&s->lock);
    }
    routes_fail(r, &e);
    return true;
}

static void health(ern_server *s, ern_http_request *r) {
    if (not_serving(s, r)) return;
    ern_engine_stats st;
    ern_engine_stats_read(s->engine, &st);
    if (st.failed)
        refuse(r, 503, "engine_failed", "the engine has failed and will not run again; restart the server");
    else if (ern_engine_is_stalled(&st, ern_now_us()))
        refuse(r, 503, "engine_stalled",
               "the engine is at one step for far longer than any before; restart the server");
    else
        http_reply(r, 200, NULL, "", 0);
}

static void send_json(ern_http_request *r, const ern_buf *b) {
    if (b->full)
        refuse(r, 500, "internal_error", "the answer did not fit its buffer");
    else
        http_reply(r, 200, "application/json", b->data, b->len);
}

static void write_model(ern_server *s, ern_jsonw *w) {
    ern_jsonw_object(w);
    ern_jsonw_key(w, "id");
    ern_jsonw_text(w, server_model_name(s));
    ern_jsonw_key(w, "object");
    ern_jsonw_text(w, "model");
    ern_jsonw_key(w, "created");
    ern_jsonw_int(w, s->created_s);
    ern_jsonw_key(w, "owned_by");
    ern_jsonw_text(w, "ernest");
    ern_jsonw_key(w, "root");
    ern_jsonw_text(w, s->model_path ? s->model_path : server_model_name(s));
    ern_jsonw_key(w, "parent");
    ern_jsonw_null(w);
    ern_jsonw_key(w, "max_model_len");
    ern_jsonw_int(w, ern_engine_options_of(s->engine)->max_model_len);
    ern_jsonw_key(w, "permission");
    ern_jsonw_array(w);
    ern_jsonw_object(w);
    ern_jsonw_key(w, "id");
    ern_jsonw_text(w, "modelperm-ernest");
    ern_jsonw_key(w, "object");
    ern_jsonw_text(w, "model_permission");
    ern_jsonw_key(w, "created");
    ern_jsonw_int(w, s->created_s);
    static const struct {
        const char *key;
        bool v;
    } flag[] = {{"allow_create_engine", false},  {"allow_sampling", true}, {"allow_logprobs", true},
                {"allow_search_indices", false}, {"allow_view", true},     {"allow_fine_tuning", false}};
    for (size_t i = 0; i < sizeof flag / sizeof flag[0]; i++) {
        ern_jsonw_key(w, flag[i].key);
        ern_jsonw_bool(w, flag[i].v);
    }
    ern_jsonw_key(w, "organization");
    ern_jsonw_text(w, "*");
    ern_jsonw_key(w, "group");
    ern_jsonw_null(w);
    ern_jsonw_key(w, "is_blocking");
    ern_jsonw_bool(w, false);
    ern_jsonw_object_end(w);
    ern_jsonw_array_end(w);
    ern_jsonw_object_end(w);
}

static void models(ern_server *s, ern_http_request *r) {
    if (not_serving(s, r)) return;
    ern_buf b;
    ern_buf_init(&b, SMALL_ANSWER_BYTES);
    ern_jsonw w;
    ern_jsonw_init(&w, &b);
    ern_jsonw_object(&w);
    ern_jsonw_key(&w, "object");
    ern_jsonw_text(&w, "list");
    ern_jsonw_key(&w, "data");
    ern_jsonw_array(&w);
    write_model(s, &w);
    ern_jsonw_array_end(&w);
    ern_jsonw_object_end(&w);
    send_json(r, &b);
    ern_buf_free(&b);
}

static void model(ern_server *s, ern_http_request *r) {
    if (not_serving(s, r)) return;
    const char *name = r->path + strlen("/v1/models/");
    if (strcmp(name, server_model_name(s)) != 0 && strcmp(name, "default") != 0) {
        api_error e;
        (void)api_fail(&e, 404, "model_not_found", "model", "the model %.200s is not served here; %.200s is", name,
                       server_model_name(s));
        routes_fail(r, &e);
        return;
    }
    ern_buf b;
    ern_buf_init(&b, SMALL_ANSWER_BYTES);
    ern_jsonw w;
    ern_jsonw_init(&w, &b);
    write_model(s, &w);
    send_json(r, &b);
    ern_buf_free(&b);
}

static void version(ern_server *s, ern_http_request *r) {
    (void)s;
    static const char text[] = "{\"version\":\"" ERN_VERSION "\"}";
    http_reply(r, 200, "application/json", text, sizeof text - 1);
}

/* FastDeploy's /load: the routes, whatever the name says. */
static void load_routes(ern_server *s, ern_http_request *r) {
    (void)s;
    ern_buf b;
    ern_buf_init(&b, SMALL_ANSWER_BYTES);
    ern_jsonw w;
    ern_jsonw_init(&w, &b);
    ern_jsonw_object(&w);
    ern_jsonw_key(&w, "routes");
    ern_jsonw_array(&w);
    for (int i = 0; i < N_ROUTE; i++) {
        if (strncmp(routes[i].path, "/v1", 3) != 0) continue;
        ern_jsonw_object(&w);
        ern_jsonw_key(&w, "path");
        ern_jsonw_text(&w, routes[i].prefix ? "/v1/models/{id}" : routes[i].path);
        ern_jsonw_key(&w, "methods");
        ern_jsonw_array(&w);
        ern_jsonw_text(&w, routes[i].methods == GET ? "GET" : "POST");
        ern_jsonw_array_end(&w);
        ern_jsonw_key(&w, "tags");
        ern_jsonw_array(&w);
        ern_jsonw_array_end(&w);
        ern_jsonw_object_end(&w);
    }
    ern_jsonw_array_end(&w);
    ern_jsonw_object_end(&w);
    send_json(r, &b);
    ern_buf_free(&b);
}

static void load_now(ern_server *s, ern_http_request *r) {
    if (not_serving(s, r)) return;
    ern_engine_stats st;
    ern_engine_stats_read(s->engine, &st);
    ern_buf b;
    ern_buf_init(&b, SMALL_ANSWER_BYTES);
    (void)ern_buf_print(&b,
                        "{\"active_requests\":%d,\"max_concurrency\":%d,\"running\":%d,\"waiting\":%d,\"parked\":%d,"
                        "\"kv_blocks\":%d,\"kv_blocks_free\":%d,\"kv_blocks_cached\":%d}",
                        atomic_load(&s->n_place), s->o.max_concurrency, st.n_running, st.n_waiting, st.n_parked,
                        st.n_page, st.n_page_free, st.n_page_cached);
    send_json(r, &b);
    ern_buf_free(&b);
}

static void config_info(ern_server *s, ern_http_request *r) {
    if (not_serving(s, r)) return;
    const char *text = s->o.config_info_json ? s->o.config_info_json : "{}";
    http_reply(r, 200, "application/json", text, strlen(text));
}

static void prometheus(ern_server *s, ern_http_request *r) {
    ern_buf b;
    ern_buf_init(&b, SMALL_ANSWER_BYTES);
    metrics_write(&s->metrics, atomic_load(&s->state) == SERVER_LOADING ? NULL : s->engine, atomic_load(&s->n_front),
                  &b);
    http_reply(r, 200, "text/plain; version=0.0.4; charset=utf-8", b.data, b.len);
    ern_buf_free(&b);
}

static void debug_kv(ern_server *s, ern_http_request *r) {
    if (!s->o.debug_endpoints) {
        refuse(r, 404, "not_found", "/debug/kv is off; start the server with --enable-debug-endpoints to see it");
        return;
    }
    if (not_serving(s, r)) return;
    ern_buf b;
    ern_buf_init(&b, SMALL_ANSWER_BYTES);
    kv_view_write(&s->metrics, s->engine, &b);
    send_json(r, &b);
    ern_buf_free(&b);
}

/* ---- the whole request is there -------------------------------------------------------------------------------- */

static bool deadline(ern_http_request *r, int64_t *out_us, api_error *e) {
    *out_us = 0;
    const char *text = http_header(r, "X-Request-Deadline-Ms");
    if (!text) return true;
    char *end;
    long long ms = strtoll(text, &end, 10);
    if (*end || end == text || ms < 1 || ms > 86400000)
        return api_fail(e, 400, "invalid_value", "X-Request-Deadline-Ms",
                        "X-Request-Deadline-Ms must be from 1 to 86400000, not %.40s", text);
    *out_us = ern_now_us() + ms * 1000;
    return true;
}

static void start_job(ern_server *s, ern_http_request *r, job_kind kind) {
    if (not_serving(s, r)) return;
    api_error e;
    int64_t deadline_us;
    if (!deadline(r, &deadline_us, &e)) {
        routes_fail(r, &e);
        return;
    }
    job *j = NULL;
    if (atomic_fetch_add(&s->n_place, 1) < s->o.max_concurrency) j = calloc(1, sizeof *j);
    if (!j) {
        atomic_fetch_sub(&s->n_place, 1);
        (void)api_fail(&e, 429, "too_many_requests", NULL, "Too many requests, current max concurrency is %d",
                       s->o.max_concurrency);
        e.retry_ms = server_retry_ms(s);
        routes_fail(r, &e);
        return;
    }
    atomic_fetch_add(&s->n_active, 1);
    job_open(j, s, r, kind);
    j->deadline_us = deadline_us;
    j->has_caller = !s->o.share_cache && auth_caller(&s->keys, http_header(r, "Authorization"), j->caller);
    atomic_fetch_add(&s->n_front, 1);
    pthread_mutex_lock(&s->lock);
    j->next = s->jobs;
    if (s->jobs) s->jobs->prev = j;
    s->jobs = j;
    pthread_mutex_unlock(&s->lock);
    http_keep(r, j);
    /* The ring has max_concurrency places, and a job in it holds a place, so it only refuses once it is shut. */
    if (!ern_ring_push(s->front, &j)) {
        refuse(r, 503, "shutting_down", "the server is shutting down");
        atomic_fetch_sub(&s->n_front, 1);
        job_close(j);
    }
}

void routes_on_request(void *ud, ern_http_request *r) {
    ern_server *s = ud;
    const route *t = &routes[r->route];
    if (t->fn)
        t->fn(s, r);
    else
        start_job(s, r, (job_kind)t->kind);
}

/* The metrics port serves what a scraper needs and no more. */
void routes_on_metrics_request(void *ud, ern_http_request *r) {
    const route *t = &routes[r->route];
    if (t->fn == prometheus || t->fn == config_info || t->fn == health)
        t->fn(ud, r);
    else
        refuse(r, 404, "not_found", "this port serves /metrics, /config-info and /health");
}

void routes_on_done(void *ud, const ern_http_request *r, int status) {
    ern_server *s = ud;
    const char *path = r->route >= 0 ? routes[r->route].path : "other";
    const char *method = method_bit(r->method) || strcmp(r->method, "OPTIONS") == 0 ? r->method : "other";
    metrics_http_done(&s->metrics, method, path, status, (double)(ern_now_us() - r->begin_us) / 1e6);
}
