/* Life of the server: open (503 while loading), attach (serve), drain, close; its front and events threads. */
#include "server/server.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/counter.h"
#include "base/log.h"
#include "base/os.h"
#include "server/job.h"

enum {
    IDLE_S = 30,          /* a silent connection, a stalled reader */
    RECEIVE_S = 120,      /* a request that is still not whole */
    FLUSH_S = 5,          /* after a drain: time for the last bytes to leave */
    BODIES_MAX_MIB = 256, /* all bodies being received at once */
    RETRY_MAX_MS = 50000, /* with the spread upon it nobody is told to stay away for more than a minute */
};

const char *server_model_name(const ern_server *s) {
    return s->served_model_name ? s->served_model_name : s->model_path ? s->model_path : "default";
}

void server_unknown_field(void *ud, const char *name) {
    ern_server *s = ud;
    char shown[64];
    size_t n = 0;
    for (; name[n] && n < sizeof shown - 1; n++) {
        char c = name[n];
        bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
                     c == '-' || c == '.';
        shown[n] = plain ? c : '?';
    }
    shown[n] = 0;
    pthread_mutex_lock(&s->lock);
    bool known = s->n_unknown == (int)(sizeof s->unknown / sizeof s->unknown[0]);
    for (int i = 0; i < s->n_unknown && !known; i++) known = strcmp(s->unknown[i], shown) == 0;
    if (!known) {
        char *copy = strdup(shown);
        if (copy) s->unknown[s->n_unknown++] = copy;
    }
    pthread_mutex_unlock(&s->lock);
    if (!known) ern_log(ERN_LOG_WARN, "server.unknown_field", "name=%s effect=none", shown);
}

/* ---- when to come back ------------------------------------------------------------------------------------------ */

int64_t server_spread_ms(int64_t ms) {
    static atomic_uint_fast64_t n;
    double part = (double)(ern_counter64((uint64_t)ern_now_us(), atomic_fetch_add(&n, 1)) >> 11) * 0x1p-53;
    return (int64_t)((double)ms * (0.8 + 0.4 * part));
}

int64_t server_retry_ms(const ern_server *s) {
    ern_engine_stats st;
    ern_engine_stats_read(s->engine, &st);
    double ms = (double)atomic_load(&s->n_waiting_token) * (double)st.prefill_ns_per_token / 1e6;
    return server_spread_ms(ms < 1000 ? 1000 : ms > RETRY_MAX_MS ? RETRY_MAX_MS : (int64_t)ms);
}

/* ---- jobs ------------------------------------------------------------------------------------------------------ */

static void choice_free(choice *c) {
    ern_stop_close(c->stop);
    ern_reply_close(c->reply);
    ern_tokens_free(&c->ids);
    ern_buf_free(&c->content);
    ern_buf_free(&c->reasoning);
    ern_buf_free(&c->prompt_lp);
    for (int i = 0; i < 4; i++) ern_buf_free(&c->lp[i]);
    for (int i = 0; i < c->n_call; i++) {
        ern_buf_free(&c->call[i].name);
        ern_buf_free(&c->call[i].args);
    }
}

static void job_log(const job *j) {
    char id[128]; /* the client chose part of it: nothing but plain characters goes to the log */
    size_t k = 0;
    for (; j->id[k] && k < sizeof id - 1; k++) id[k] = j->id[k] > ' ' && j->id[k] < 127 ? j->id[k] : '?';
    id[k] = 0;
    int64_t n_output = 0, n_prompt = 0;
    const char *finish = j->n_choice ? j->choice[0].finish : NULL;
    for (int i = 0; i < j->n_choice; i++) n_output += j->choice[i].n_output;
    for (int i = 0; i < j->n_prompt; i++) n_prompt += j->prompt[i].n;
    const char *end = atomic_load(&j->stalled) ? "client_stalled"
                      : atomic_load(&j->gone)  ? "client_gone"
                      : j->error.status        ? j->error.code ? j->error.code : "error"
                      : finish                 ? finish
                                               : "none";
    ern_log(ERN_LOG_INFO, "server.request", "id=%s end=%s status=%d prompt=%lld output=%lld ms=%lld", id, end,
            j->error.status ? j->error.status : 200, (long long)n_prompt, (long long)n_output,
            (long long)((ern_now_us() - j->begin_us) / 1000));
}

void job_open(job *j, ern_server *s, ern_http_request *r, job_kind kind) {
    j->server = s;
    j->http = r;
    j->kind = kind;
    j->begin_us = r->begin_us;
    j->created_s = ern_wall_s();
    pthread_mutex_init(&j->lock, NULL);
    ern_arena_open(&j->arena, JOB_ARENA_MAX_BYTES);
    ern_buf_init(&j->head, 64 * 1024);
    ern_buf_init(&j->chunk, 2 * (size_t)JOB_ANSWER_MAX_BYTES);
    ern_buf_init(&j->text, 64 * 1024);
    ern_buf_init(&j->shown, 64 * 1024);
}

void job_free(job *j) {
    for (int i = 0; i < j->n_choice; i++) choice_free(&j->choice[i]);
    ern_buf_free(&j->head);
    ern_buf_free(&j->chunk);
    ern_buf_free(&j->text);
    ern_buf_free(&j->shown);
    ern_arena_close(&j->arena);
    pthread_mutex_destroy(&j->lock);
    free(j);
}

void job_settle(job *j) {
    ern_server *s = j->server;
    if (j->settled) return;
    j->settled = true;
    pthread_mutex_lock(&s->lock);
    j->id_claimed = false;
    pthread_mutex_unlock(&s->lock);
    atomic_fetch_sub(&s->n_place, 1);
}

void job_close(job *j) {
    ern_server *s = j->server;
    job_settle(j);
    http_release(j->http); /* no callback reaches the job after this */
    pthread_mutex_lock(&s->lock);
    if (j->prev)
        j->prev->next = j->next;
    else
        s->jobs = j->next;
    if (j->next) j->next->prev = j->prev;
    pthread_mutex_unlock(&s->lock);
    job_log(j);
    job_free(j);
    atomic_fetch_sub(&s->n_active, 1);
}

/* Take an id that nobody alive has. */
static bool claim_id(job *j) {
    ern_server *s = j->server;
    if (!j->id_given) return true; /* random: nobody has it */
    bool taken = false;
    pthread_mutex_lock(&s->lock);
    for (job *o = s->jobs; o && !taken; o = o->next) taken = o->id_claimed && strcmp(o->id, j->id) == 0;
    j->id_claimed = !taken;
    pthread_mutex_unlock(&s->lock);
    if (taken)
        return api_fail(&j->error, 400, "invalid_value", "request_id", "duplicated request_id: %.200s is still running",
                        j->id);
    return true;
}

static void cancel_all(job *j) {
    int n = atomic_load(&j->n_choice);
    for (int i = 0; i < n; i++) {
        uint64_t id = atomic_load(&j->choice[i].id);
        if (id) ern_engine_cancel(j->server->engine, id);
    }
}

/* Why the engine did not take a request: full, going down, broken, or a value that our validator let through. */
static void fail_submit(job *j, ern_status st, const ern_err *err) {
    if (st == ERN_ERR_LIMIT)
        (void)api_fail(&j->error, 429, "queue_full", NULL, "%s", err->text);
    else if (st == ERN_ERR_CANCELLED)
        (void)api_fail(&j->error, 503, "shutting_down", NULL, "the server is shutting down");
    else if (st == ERN_ERR_DEVICE)
        (void)api_fail(&j->error, 503, "engine_failed", NULL, "the engine has failed and will not run again");
    else
        (void)api_fail(&j->error, 400, "invalid_value", NULL, "%s", err->text);
    if (j->error.status == 429) j->error.retry_ms = server_retry_ms(j->server);
}

/* Prompts that wait. Of the choices of one prompt the first computes it and the others find it, where there is a cache.
 */
static void count_waiting(choice *c) {
    const job *j = c->job;
    ern_server *s = j->server;
    bool again = c->index > 0 && j->choice[c->index - 1].prompt == c->prompt;
    c->n_waiting = again && ern_engine_options_of(s->engine)->prefix_cache ? 0 : c->request.n_prompt;
    atomic_fetch_add(&s->n_waiting_token, c->n_waiting);
}

/* Hand every choice over. False when one was refused: what was taken is cancelled and ends on its own. Locked. */
static bool submit_all(job *j) {
    ern_server *s = j->server;
    for (int i = 0; i < j->n_choice; i++) {
        choice *c = &j->choice[i];
        ern_err err = {0};
        ern_status st = ern_engine_submit(s->engine, &c->request, &err);
        if (st != ERN_OK) {
            fail_submit(j, st, &err);
            cancel_all(j);
            return false;
        }
        c->submitted = true;
        j->n_live++;
        count_waiting(c);
        atomic_store(&c->id, c->request.id);
        metrics_arrived(&s->metrics, c->request.max_tokens);
        /* The client may have left between the last look and the id being known. */
        if (atomic_load(&j->gone) || atomic_load(&j->shutdown)) ern_engine_cancel(s->engine, c->request.id);
    }
    return true;
}

/* One job through the front: read, check, tokenize, submit. */
static void front_job(job *j) {
    if (j->kind == JOB_TOKENIZE || j->kind == JOB_DETOKENIZE) {
        tokenize_answer(j);
        job_close(j);
        return;
    }
    bool ok = !atomic_load(&j->gone) && request_build(j) && claim_id(j);
    if (!ok) {
        job_settle(j);
        if (j->error.status && !atomic_load(&j->gone)) routes_fail(j->http, &j->error);
        job_close(j);
        return;
    }
    pthread_mutex_lock(&j->lock);
    ok = submit_all(j);
    bool over = j->n_live == 0;
    if (over) job_settle(j);
    if (ok)
        reply_begin(j);
    else
        routes_fail(j->http, &j->error);
    pthread_mutex_unlock(&j->lock);
    if (over) job_close(j);
}

static void *front_main(void *arg) {
    ern_server *s = arg;
    job *j;
    while (ern_ring_pop(s->front, &j, -1)) {
        front_job(j); /* the job may be gone after it */
        atomic_fetch_sub(&s->n_front, 1);
    }
    return NULL;
}

static void *events_main(void *arg) {
    ern_server *s = arg;
    ern_event ev;
    while (!atomic_load(&s->stop)) {
        if (!ern_engine_next(s->engine, &ev, 100000)) continue;
        job *j = ((choice *)ev.request->ud)->job;
        pthread_mutex_lock(&j->lock);
        bool done = reply_event(j, &ev);
        pthread_mutex_unlock(&j->lock);
        if (done) job_close(j);
    }
    return NULL;
}

static void on_gone(void *ud, void *arg, bool stalled) {
    (void)ud;
    job *j = arg;
    atomic_store(&j->stalled, stalled);
    atomic_store(&j->gone, true);
    cancel_all(j);
}

/* The client has caught up: everything given to its buffer so far counts as taken. */
static void on_drained(void *ud, void *arg) {
    ern_server *s = ud;
    job *j = arg;
    int n = atomic_load(&j->n_choice);
    for (int i = 0; i < n; i++) {
        choice *c = &j->choice[i];
        atomic_store(&c->request.n_taken, c->credit_base + atomic_load(&c->n_event));
    }
    ern_engine_poke(s->engine);
}

/* ---- open, attach, drain, close -------------------------------------------------------------------------------- */

static bool copy_options(ern_server *s, const ern_server_options *o) {
    s->o = *o;
    s->host = strdup(o->host);
    s->model_path = o->model_path ? strdup(o->model_path) : NULL;
    s->served_model_name = o->served_model_name ? strdup(o->served_model_name) : NULL;
    s->cors = calloc((size_t)o->n_cors_origin + 1, sizeof *s->cors);
    bool ok =
        s->host && s->cors && (!o->model_path || s->model_path) && (!o->served_model_name || s->served_model_name);
    for (int i = 0; ok && i < o->n_cors_origin; i++) ok = (s->cors[i] = strdup(o->cors_origin[i])) != NULL;
    return ok && auth_open(&s->keys, o->api_key, o->n_api_key);
}

static void server_free(ern_server *s) {
    for (int i = 0; s->cors && i < s->o.n_cors_origin; i++) free(s->cors[i]);
    for (int i = 0; i < s->n_unknown; i++) free(s->unknown[i]);
    free(s->cors);
    free(s->host);
    free(s->model_path);
    free(s->served_model_name);
    auth_close(&s->keys);
    ern_ring_close(s->front);
    metrics_close(&s->metrics);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

ern_status ern_server_open(ern_server **out, const ern_server_options *o, ern_err *err) {
    *out = NULL;
    if (o->max_concurrency < 1)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--max-concurrency is %d; it must be at least 1", o->max_concurrency);
    ern_server *s = calloc(1, sizeof *s);
    if (!s) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the server");
    s->created_s = ern_wall_s();
    metrics_open(&s->metrics);
    pthread_mutex_init(&s->lock, NULL);
    ern_status st = copy_options(s, o) ? ern_ring_open(&s->front, (size_t)o->max_concurrency, sizeof(job *), err)
                                       : ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the server");
    http_options h = {.host = s->host,
                      .port = o->port,
                      .body_max_bytes = (size_t)o->body_max_bytes,
                      .body_total_max_bytes = (size_t)BODIES_MAX_MIB << 20,
                      .idle_s = IDLE_S,
                      .receive_s = RECEIVE_S,
                      .on = {s, routes_on_headers, routes_on_request, on_gone, on_drained, routes_on_done}};
    if (st == ERN_OK) st = http_open(&s->http, &h, err);
    if (st == ERN_OK && o->metrics_port >= 0) {
        h.port = o->metrics_port;
        h.on.on_request = routes_on_metrics_request;
        st = http_open(&s->http_metrics, &h, err);
    }
    if (st != ERN_OK) {
        http_close(s->http);
        server_free(s);
        return st;
    }
    *out = s;
    return ERN_OK;
}

int ern_server_port(const ern_server *s) { return http_port(s->http); }

void ern_server_loading(ern_server *s, const char *what, uint64_t done_bytes, uint64_t all_bytes) {
    pthread_mutex_lock(&s->lock);
    (void)snprintf(s->loading, sizeof s->loading, "%s", what);
    s->load_done = done_bytes;
    s->load_all = all_bytes;
    pthread_mutex_unlock(&s->lock);
}

ern_status ern_server_attach(ern_server *s, ern_engine *e, const ern_tokenizer *t, ern_chat_format f,
                             const ern_config *c, ern_err *err) {
    ERN_ASSERT(!s->threads_on);
    s->engine = e;
    s->tokenizer = t;
    s->format = f;
    s->config = c;
    if (pthread_create(&s->events_thread, NULL, events_main, s) != 0)
        return ERN_FAIL(err, ERN_ERR_MEMORY, "cannot start the server's events thread");
    int n = 0;
    while (n < FRONT_THREADS && pthread_create(&s->front_thread[n], NULL, front_main, s) == 0) n++;
    if (n < FRONT_THREADS) {
        ern_ring_shut(s->front);
        while (n > 0) (void)pthread_join(s->front_thread[--n], NULL);
        atomic_store(&s->stop, true);
        (void)pthread_join(s->events_thread, NULL);
        return ERN_FAIL(err, ERN_ERR_MEMORY, "cannot start the server's front threads");
    }
    s->threads_on = true;
    atomic_store(&s->state, SERVER_READY);
    return ERN_OK;
}

void ern_server_write_docs(ern_buf *out) { fields_write_docs(out); }

static void nap(void) { (void)nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL); }

static void wait_zero(ern_server *s, bool http, double at_most_s, bool heed_hurry) {
    int64_t until = ern_now_us() + (int64_t)(at_most_s * 1e6);
    while (ern_now_us() < until && !(heed_hurry && atomic_load(&s->hurry))) {
        if ((http ? http_in_flight(s->http) : atomic_load(&s->n_active)) == 0) return;
        nap();
    }
}

void ern_server_drain(ern_server *s) {
    atomic_store(&s->state, SERVER_DRAINING);
    ern_log(ERN_LOG_INFO, "server.drain", "active=%d limit_s=%d", atomic_load(&s->n_active), s->o.drain_s);
    wait_zero(s, false, s->o.drain_s, true);
    pthread_mutex_lock(&s->lock);
    for (job *j = s->jobs; j; j = j->next) {
        atomic_store(&j->shutdown, true);
        if (s->engine) cancel_all(j);
    }
    pthread_mutex_unlock(&s->lock);
    wait_zero(s, false, FLUSH_S, false);
    wait_zero(s, true, FLUSH_S, true);
    ern_log(ERN_LOG_INFO, "server.drained", "active=%d", atomic_load(&s->n_active));
}

void ern_server_hurry(ern_server *s) { atomic_store(&s->hurry, true); }

void ern_server_close(ern_server *s) {
    if (!s) return;
    if (atomic_load(&s->n_active) > 0) {
        atomic_store(&s->hurry, true);
        ern_server_drain(s);
    }
    atomic_store(&s->state, SERVER_DRAINING);
    /* Every job ends: its choices were cancelled and the engine answers within a step. */
    while (atomic_load(&s->n_active) > 0) nap();
    if (s->threads_on) {
        ern_ring_shut(s->front);
        for (int i = 0; i < FRONT_THREADS; i++) (void)pthread_join(s->front_thread[i], NULL);
        atomic_store(&s->stop, true);
        (void)pthread_join(s->events_thread, NULL);
    }
    http_close(s->http);
    http_close(s->http_metrics);
    server_free(s);
}
