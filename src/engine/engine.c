/* The door: one thread around the core, an inbox before it, an outbox behind it. See engine.h.
 *
 *   any thread                    engine thread                              one consumer
 *   submit --> inbox (indices) --> core_add --> core_turn --> outbox (ring) --> next
 *   cancel --> inbox (marks)  --> core_cancel                                    | END: the index is free again
 *
 * A request lives under an index from submit until its END has been taken, so everything here is a fixed table and no
 * queue can overflow: the inbox holds indices, a cancel is a mark on one, and the outbox always has room for two events
 * per index beside the room that core_turn is told of. The id is serial * n_seq + index: it grows, and it finds its
 * index. */
#include "engine/engine.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/log.h"
#include "base/os.h"
#include "base/ring.h"
#include "engine/core.h"
#include "engine/engine_plan.h"

enum { SAVE_GRACE_US = 3 * 1000000 };

typedef struct inbox_slot {
    uint64_t id; /* 0: free */
    ern_request *request;
    int64_t queued_us;
    bool cancelled;
} inbox_slot;

struct ern_engine {
    ern_engine_options options; /* filled in */
    ern_engine_plan plan;
    ern_arena arena;
    ern_ring *outbox;
    int32_t n_seq, event_room;
    pthread_t thread;

    pthread_mutex_t lock;            /* everything down to the next blank line */
    pthread_cond_t wake;             /* the engine thread sleeps here */
    pthread_cond_t told;             /* open and close sleep here */
    inbox_slot *slot;                /* [n_seq] */
    int32_t *free_slot, n_free_slot; /* [n_seq] a stack */
    int32_t *arrived, n_arrived;     /* [n_seq] indices submitted and not yet seen by the core, in order */
    int32_t *marked, n_marked;       /* [n_seq] indices cancelled and not yet seen by the core, each once */
    uint64_t serial, n_submitted;
    int64_t n_submitted_prompt;
    uint64_t n_submitted_bytes;
    uint64_t n_started; /* of the core, after its last turn */
    int64_t n_started_prompt;
    uint64_t n_started_bytes;
    bool poked, stop, opened, stopped;
    int32_t n_reader; /* threads inside ern_engine_next */
    ern_status open_status;
    ern_err open_err;
    ern_engine_stats stats;
    char error[sizeof(((core *)0)->error)]; /* written once, before stats.failed */

    atomic_bool starved; /* the engine waits for room in the outbox */

    store *disk; /* NULL: no such tier */
    core core;   /* the engine thread's */
    ern_backend *backend;
    transfer *transfer;  /* NULL: neither host nor disk tier */
    inbox_slot *news;    /* [n_seq] taken from the inbox */
    int32_t *news_index; /* [n_seq] */
    int32_t *cancels;    /* [n_seq] */
    uint64_t *cancel_id; /* [n_seq] */
};

/* ---- the engine thread ----------------------------------------------------------------------------------------- */

static int32_t outbox_room(const ern_engine *e) {
    int64_t n = (int64_t)ern_ring_count(e->outbox);
    return n < e->event_room ? (int32_t)(e->event_room - n) : 0;
}

static void publish(ern_engine *e) {
    const core *c = &e->core;
    bool failed = c->stats.failed && !e->stats.failed;
    pthread_mutex_lock(&e->lock);
    if (failed) memcpy(e->error, c->error, sizeof e->error);
    e->stats = c->stats;
    e->n_started = c->n_started;
    e->n_started_prompt = c->n_started_prompt;
    e->n_started_bytes = c->n_started_bytes;
    pthread_mutex_unlock(&e->lock);
    if (failed) ern_log(ERN_LOG_ERROR, "engine.failed", "error=\"%s\"", c->error);
}

static void emit(void *ud, const ern_event *event, int32_t n) {
    ern_engine *e = ud;
    if (e->core.stats.failed && !e->stats.failed) publish(e); /* whoever reads END ERROR may ask why at once */
    bool ok = ern_ring_push_n(e->outbox, event, (size_t)n);
    ERN_ASSERT(ok); /* room for token events was checked, room for the others is kept */
}

/* Sleep until something arrives or the first queued deadline passes. Lock held. */
static void sleep_locked(ern_engine *e) {
    int64_t until_us = e->core.next_deadline_us;
    if (until_us == INT64_MAX) {
        pthread_cond_wait(&e->wake, &e->lock);
        return;
    }
    int64_t left_us = until_us - ern_now_us();
    if (left_us <= 0) return;
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += (time_t)(left_us / 1000000);
    end.tv_nsec += (long)(left_us % 1000000) * 1000;
    if (end.tv_nsec >= 1000000000) end.tv_sec++, end.tv_nsec -= 1000000000;
    pthread_cond_timedwait(&e->wake, &e->lock, &end);
}

/* Move what arrived to the core; when it has nothing to do, sleep first. False: time to stop. */
static bool take_inbox(ern_engine *e, bool idle) {
    pthread_mutex_lock(&e->lock);
    if (idle && !e->stop && !e->poked && e->n_arrived == 0 && e->n_marked == 0) sleep_locked(e);
    e->poked = false;
    int32_t n_news = e->n_arrived, n_cancel = e->n_marked;
    for (int32_t k = 0; k < n_news; k++) {
        e->news_index[k] = e->arrived[k];
        e->news[k] = e->slot[e->arrived[k]];
    }
    for (int32_t k = 0; k < n_cancel; k++) {
        e->cancels[k] = e->marked[k];
        e->cancel_id[k] = e->slot[e->marked[k]].id;
        e->slot[e->marked[k]].cancelled = false;
    }
    e->n_arrived = e->n_marked = 0;
    bool stop = e->stop;
    pthread_mutex_unlock(&e->lock);
    for (int32_t k = 0; k < n_news; k++) core_add(&e->core, e->news_index[k], e->news[k].request, e->news[k].queued_us);
    for (int32_t k = 0; k < n_cancel; k++) core_cancel(&e->core, e->cancels[k], e->cancel_id[k]);
    return !stop;
}

/* Turn until told to stop, then until nothing is inside. */
static void serve(ern_engine *e) {
    bool idle = false;
    while (take_inbox(e, idle)) {
        int32_t room = outbox_room(e);
        idle = !core_turn(&e->core, room);
        publish(e);
        if (!idle || room == e->event_room) continue;
        /* Perhaps the outbox was too full. Whoever takes an event after the mark is set pokes; before it, we see the
         * room. */
        atomic_store(&e->starved, true);
        if (outbox_room(e) > room) idle = false;
    }
    core_cancel_all(&e->core);
    while (core_is_busy(&e->core)) core_turn(&e->core, 0);
    publish(e);
}

/* What was computed and is not on disk yet goes there, as long as a stop may take. */
static void save_rest(ern_engine *e) {
    const struct timespec nap = {.tv_nsec = 1000 * 1000};
    int64_t until_us = ern_now_us() + SAVE_GRACE_US;
    while (e->disk && cache_is_saving(&e->core.sched.cache) && ern_now_us() < until_us) {
        if (!cache_turn(&e->core.sched.cache)) nanosleep(&nap, NULL);
    }
}

static void wake_up(void *ud) { ern_engine_poke(ud); }

/* The tiers below the pool. */
static ern_status open_tiers(ern_engine *e, ern_err *err) {
    if (e->plan.n_host_page == 0 && !e->disk) return ERN_OK;
    const transfer_options o = {
        .backend = e->backend,
        .page_bytes = e->plan.backend.page_bytes,
        .n_host_page = e->plan.n_host_page,
        .disk = e->disk,
        .page_tokens = e->options.backend_options.n_page_cell,
        .wake = wake_up,
        .ud = e,
    };
    return transfer_open(&e->transfer, &o, err);
}

static void *engine_main(void *ud) {
    ern_engine *e = ud;
    ern_err err = {0};
    const ern_backend_ops *ops = e->options.backend;
    ern_status status = ops->open(&e->backend, e->options.model, &e->options.backend_options, &err);
    if (status == ERN_OK) {
        status = open_tiers(e, &err);
        if (status != ERN_OK) ops->close(e->backend);
    }
    if (status == ERN_OK) { /* whoever asks at once sees how large everything is */
        core_connect(&e->core, e->backend, e->transfer);
        cache_stats(&e->core.sched.cache, &e->core.stats);
    }
    pthread_mutex_lock(&e->lock);
    e->stats = e->core.stats;
    e->opened = true;
    e->open_status = status;
    e->open_err = err;
    pthread_cond_broadcast(&e->told);
    pthread_mutex_unlock(&e->lock);
    if (status == ERN_OK) {
        CORE_SEAL(true);
        serve(e);
        save_rest(e);
        CORE_SEAL(false);
        transfer_close(e->transfer, 0);
        ops->close(e->backend);
    }
    ern_ring_shut(e->outbox);
    pthread_mutex_lock(&e->lock);
    e->stopped = true;
    pthread_cond_broadcast(&e->told);
    pthread_mutex_unlock(&e->lock);
    return NULL;
}

/* ---- open and close -------------------------------------------------------------------------------------------- */

static void release(ern_engine *e) {
    store_close(e->disk);
    ern_ring_close(e->outbox);
    ern_arena_close(&e->arena);
    pthread_cond_destroy(&e->wake);
    pthread_cond_destroy(&e->told);
    pthread_mutex_destroy(&e->lock);
    free(e);
}

static void init_locks(ern_engine *e) {
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&e->wake, &attr);
    pthread_cond_init(&e->told, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&e->lock, NULL);
}

static ern_status take_memory(ern_engine *e, ern_err *err) {
    core_options co = engine_core_options(&e->options, e->plan.n_page, e->plan.n_host_page);
    co.emit = emit;
    co.ud = e;
    e->n_seq = co.n_seq;
    e->event_room = engine_event_room(&e->options);
    ERN_TRY(core_open(&e->core, &co, &e->arena, err));
    ERN_TRY(ern_ring_open(&e->outbox, (size_t)e->event_room + 2 * (size_t)e->n_seq, sizeof(ern_event), err));
    layout l = {.arena = &e->arena};
    e->slot = LAYOUT_NEW(&l, inbox_slot, e->n_seq);
    e->free_slot = LAYOUT_NEW(&l, int32_t, e->n_seq);
    e->arrived = LAYOUT_NEW(&l, int32_t, e->n_seq);
    e->marked = LAYOUT_NEW(&l, int32_t, e->n_seq);
    e->news = LAYOUT_NEW(&l, inbox_slot, e->n_seq);
    e->news_index = LAYOUT_NEW(&l, int32_t, e->n_seq);
    e->cancels = LAYOUT_NEW(&l, int32_t, e->n_seq);
    e->cancel_id = LAYOUT_NEW(&l, uint64_t, e->n_seq);
    if (l.out) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the engine's inbox; lower the queue's limit");
    for (int32_t i = 0; i < e->n_seq; i++) e->free_slot[e->n_free_slot++] = e->n_seq - 1 - i;
    return ERN_OK;
}

static ern_status open_disk(ern_engine *e, ern_err *err) {
    const ern_engine_options *o = &e->options;
    if (!o->store_dir) return ERN_OK;
    store_options so = {
        .dir = o->store_dir,
        .limit_bytes = o->store_bytes,
        .block_bytes = e->plan.backend.page_bytes,
        .n_token = o->backend_options.n_page_cell,
        .now_us = ern_now_us,
    };
    memcpy(so.fingerprint, o->fingerprint, sizeof so.fingerprint);
    return store_open(&e->disk, &so, err);
}

/* Start the thread and wait until the backend is open. */
static ern_status start_thread(ern_engine *e, ern_err *err) {
    if (pthread_create(&e->thread, NULL, engine_main, e) != 0)
        return ERN_FAIL(err, ERN_ERR_MEMORY,
                        "cannot start the engine's thread; raise the limit on threads (ulimit -u)");
    pthread_mutex_lock(&e->lock);
    while (!e->opened) pthread_cond_wait(&e->told, &e->lock);
    ern_status status = e->open_status;
    pthread_mutex_unlock(&e->lock);
    if (status == ERN_OK) return ERN_OK;
    pthread_join(e->thread, NULL);
    if (err) *err = e->open_err;
    return status;
}

ern_status ern_engine_open(ern_engine **out, const ern_engine_options *o, ern_err *err) {
    *out = NULL;
    ern_engine *e = calloc(1, sizeof *e);
    if (!e) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the engine");
    init_locks(e);
    ern_arena_open(&e->arena, 0);
    ern_status status = ern_engine_plan_make(&e->plan, o, err);
    if (status == ERN_OK) status = engine_options_fill(&e->options, o, err);
    if (status == ERN_OK) {
        e->options.backend_options.n_page = e->plan.n_page;
        status = take_memory(e, err);
    }
    if (status == ERN_OK) status = open_disk(e, err);
    if (status == ERN_OK) status = start_thread(e, err);
    if (status != ERN_OK) {
        release(e);
        return status;
    }
    ern_log(ERN_LOG_INFO, "engine.open", "backend=%s pages=%d kv_tokens=%lld seqs=%d rows=%d", e->options.backend->name,
            e->plan.n_page, (long long)e->plan.kv_tokens, e->options.max_num_seqs, e->options.max_batched_tokens);
    *out = e;
    return ERN_OK;
}

void ern_engine_stop(ern_engine *e) {
    pthread_mutex_lock(&e->lock);
    e->stop = true;
    pthread_cond_signal(&e->wake);
    while (!e->stopped) pthread_cond_wait(&e->told, &e->lock);
    pthread_mutex_unlock(&e->lock);
}

void ern_engine_close(ern_engine *e) {
    if (!e) return;
    ern_engine_stop(e);
    pthread_mutex_lock(&e->lock);
    while (e->n_reader > 0) pthread_cond_wait(&e->told, &e->lock);
    pthread_mutex_unlock(&e->lock);
    pthread_join(e->thread, NULL);
    release(e);
}

/* ---- requests in ----------------------------------------------------------------------------------------------- */

static bool ids_ok(const int32_t *id, int32_t n, int32_t n_vocab) {
    for (int32_t i = 0; i < n; i++)
        if (id[i] < 0 || id[i] >= n_vocab) return false;
    return true;
}

static bool finite(float x) { return x - x == 0; }

static ern_status check_sample(const ern_sample *s, int32_t n_vocab, ern_err *err) {
    const char *bad = NULL;
    if (!finite(s->temperature) || s->temperature < 0) bad = "temperature";
    if (!(s->top_p > 0 && s->top_p <= 1)) bad = "top_p";
    if (!(s->min_p >= 0 && s->min_p <= 1)) bad = "min_p";
    if (!finite(s->repetition) || s->repetition <= 0) bad = "repetition_penalty";
    if (!finite(s->frequency)) bad = "frequency_penalty";
    if (!finite(s->presence)) bad = "presence_penalty";
    if (s->n_top < -1 || s->n_top > ERN_TOP_MAX) bad = "top_logprobs";
    if ((unsigned)s->mode > ERN_LOGPROBS_PROCESSED_LOGITS) bad = "logprobs_mode";
    if (s->n_ban < 0 || s->n_ban > ERN_BAN_MAX || !ids_ok(s->ban, s->n_ban, n_vocab)) bad = "bad_words";
    if (s->n_bias < 0 || s->n_bias > n_vocab) bad = "logit_bias";
    for (int32_t i = 0; !bad && i < s->n_bias; i++)
        if (!ids_ok(&s->bias[i].id, 1, n_vocab) || !finite(s->bias[i].add)) bad = "logit_bias";
    return bad ? ERN_FAIL(err, ERN_ERR_INPUT, "%s is out of range", bad) : ERN_OK;
}

static ern_status check_request(const ern_engine *e, const ern_request *r, ern_err *err) {
    int32_t n_vocab = e->options.model->config.n_vocab, len = e->options.max_model_len;
    if (r->n_prompt < 1) return ERN_FAIL(err, ERN_ERR_INPUT, "the prompt is empty");
    if (r->n_prompt > len - !r->echo_only)
        return ERN_FAIL(err, ERN_ERR_INPUT, "the prompt has %d tokens, more than the %d that --max-model-len %d allows",
                        r->n_prompt, len - !r->echo_only, len);
    if (!r->echo_only && (r->max_tokens < 1 || r->max_tokens > len - r->n_prompt))
        return ERN_FAIL(err, ERN_ERR_INPUT, "max_tokens is %d; after a prompt of %d tokens it must be 1 to %d",
                        r->max_tokens, r->n_prompt, len - r->n_prompt);
    if (r->min_tokens < 0 || (!r->echo_only && r->min_tokens > r->max_tokens))
        return ERN_FAIL(err, ERN_ERR_INPUT, "min_tokens is %d; it must be 0 to max_tokens (%d)", r->min_tokens,
                        r->max_tokens);
    if (r->n_stop < 0 || r->n_stop > ERN_STOP_MAX || !ids_ok(r->stop, r->n_stop, n_vocab))
        return ERN_FAIL(err, ERN_ERR_INPUT, "stop_token_ids must be at most %d ids below %d", ERN_STOP_MAX, n_vocab);
    if (r->n_prompt_top < -1 || r->n_prompt_top > ERN_TOP_MAX)
        return ERN_FAIL(err, ERN_ERR_INPUT, "prompt_logprobs is %d; it must be 0 to %d", r->n_prompt_top, ERN_TOP_MAX);
    if (!ids_ok(r->prompt, r->n_prompt, n_vocab))
        return ERN_FAIL(err, ERN_ERR_INPUT, "a prompt token is not below the vocabulary's size %d", n_vocab);
    return check_sample(&r->sample, n_vocab, err);
}

/* The wait that those before it in the queue will cost, as far as the pace of late tells. */
static ern_status check_wait_locked(const ern_engine *e, const ern_request *r, int64_t n_prompt, ern_err *err) {
    int64_t wait_us = n_prompt * e->stats.prefill_ns_per_token / 1000, limit_us = e->options.queue_wait_us;
    if (limit_us > 0 && wait_us > limit_us)
        return ERN_FAIL(err, ERN_ERR_LIMIT, "the wait would be about %.1f s, longer than the %.1f s that are allowed",
                        (double)wait_us * 1e-6, (double)limit_us * 1e-6);
    if (r->deadline_us > 0 && ern_now_us() + wait_us > r->deadline_us)
        return ERN_FAIL(err, ERN_ERR_LIMIT, "the wait would be about %.1f s, past the request's deadline",
                        (double)wait_us * 1e-6);
    return ERN_OK;
}

static ern_status enter_locked(ern_engine *e, ern_request *r, ern_err *err) {
    if (e->stats.failed) return ERN_FAIL(err, ERN_ERR_DEVICE, "the backend has failed: %s", e->error);
    if (e->stop) return ERN_FAIL(err, ERN_ERR_CANCELLED, "the engine is stopping");
    uint64_t n_queued = e->n_submitted - e->n_started;
    if (n_queued >= (uint64_t)e->options.queue_max || e->n_free_slot == 0)
        return ERN_FAIL(err, ERN_ERR_LIMIT, "%llu requests are waiting, as many as may", (unsigned long long)n_queued);
    int64_t n_prompt = e->n_submitted_prompt - e->n_started_prompt;
    if (e->options.queue_prompt_max > 0 && n_queued > 0 && n_prompt + r->n_prompt > e->options.queue_prompt_max)
        return ERN_FAIL(err, ERN_ERR_LIMIT,
                        "%lld prompt tokens are waiting; with these %d there would be more than may",
                        (long long)n_prompt, r->n_prompt);
    uint64_t bytes = core_request_bytes(r), n_bytes = e->n_submitted_bytes - e->n_started_bytes;
    if (e->options.queue_bytes > 0 && n_queued > 0 && n_bytes + bytes > e->options.queue_bytes)
        return ERN_FAIL(err, ERN_ERR_LIMIT,
                        "%.1f MiB of requests are waiting; with this one there would be more than may",
                        (double)n_bytes / (1 << 20));
    if (n_queued > 0) ERN_TRY(check_wait_locked(e, r, n_prompt, err));
    int32_t i = e->free_slot[--e->n_free_slot];
    r->id = ++e->serial * (uint64_t)e->n_seq + (uint64_t)i;
    e->slot[i] = (inbox_slot){.id = r->id, .request = r, .queued_us = ern_now_us()};
    e->arrived[e->n_arrived++] = i;
    e->n_submitted++;
    e->n_submitted_prompt += r->n_prompt;
    e->n_submitted_bytes += bytes;
    pthread_cond_signal(&e->wake);
    return ERN_OK;
}

ern_status ern_engine_submit(ern_engine *e, ern_request *r, ern_err *err) {
    ERN_TRY(check_request(e, r, err));
    pthread_mutex_lock(&e->lock);
    ern_status status = enter_locked(e, r, err);
    pthread_mutex_unlock(&e->lock);
    return status;
}

void ern_engine_cancel(ern_engine *e, uint64_t id) {
    int32_t i = (int32_t)(id % (uint64_t)e->n_seq);
    pthread_mutex_lock(&e->lock);
    inbox_slot *s = &e->slot[i];
    if (id != 0 && s->id == id && !s->cancelled) {
        s->cancelled = true;
        e->marked[e->n_marked++] = i;
        pthread_cond_signal(&e->wake);
    }
    pthread_mutex_unlock(&e->lock);
}

void ern_engine_poke(ern_engine *e) {
    pthread_mutex_lock(&e->lock);
    e->poked = true;
    pthread_cond_signal(&e->wake);
    pthread_mutex_unlock(&e->lock);
}

/* ---- events out ------------------------------------------------------------------------------------------------ */

/* The request of this END is the server's again; its index is free. A mark still pending on it names an id that the
 * core no longer knows, so it is left to be ignored. */
static void take_end(ern_engine *e, uint64_t id) {
    int32_t i = (int32_t)(id % (uint64_t)e->n_seq);
    pthread_mutex_lock(&e->lock);
    ERN_ASSERT(e->slot[i].id == id);
    if (e->slot[i].cancelled) /* out of the marks, or the next life of this index would be marked twice */
        for (int32_t k = 0; k < e->n_marked; k++)
            if (e->marked[k] == i) e->marked[k] = e->marked[--e->n_marked];
    e->slot[i] = (inbox_slot){0};
    e->free_slot[e->n_free_slot++] = i;
    pthread_mutex_unlock(&e->lock);
}

bool ern_engine_next(ern_engine *e, ern_event *out, int64_t timeout_us) {
    pthread_mutex_lock(&e->lock);
    e->n_reader++;
    pthread_mutex_unlock(&e->lock);
    bool ok = ern_ring_pop(e->outbox, out, timeout_us);
    if (ok && out->kind == ERN_EVENT_END) take_end(e, out->id);
    if (ok && atomic_exchange(&e->starved, false)) ern_engine_poke(e);
    pthread_mutex_lock(&e->lock);
    if (--e->n_reader == 0) pthread_cond_broadcast(&e->told);
    pthread_mutex_unlock(&e->lock);
    return ok;
}

/* ---- looking in ------------------------------------------------------------------------------------------------ */

enum { STALLED_US = 120 * 1000000 };

bool ern_engine_is_stalled(const ern_engine_stats *s, int64_t now_us) {
    int64_t limit = 10 * s->step_most_us > STALLED_US ? 10 * s->step_most_us : STALLED_US;
    return s->step_since_us > 0 && now_us - s->step_since_us > limit;
}

void ern_engine_stats_read(ern_engine *e, ern_engine_stats *out) {
    pthread_mutex_lock(&e->lock);
    *out = e->stats;
    out->n_waiting += e->n_arrived;
    out->busy |= e->n_arrived > 0;
    pthread_mutex_unlock(&e->lock);
    if (!e->disk) return;
    uint64_t n_cached_token = out->disk.n_cached_token;
    store_stats(e->disk, &out->disk); /* as it is: it reads names and writes blocks while the engine sleeps */
    out->disk.n_cached_token = n_cached_token;
}

const char *ern_engine_error(ern_engine *e) { return e->error; }

const ern_engine_options *ern_engine_options_of(const ern_engine *e) { return &e->options; }

const ern_engine_plan *ern_engine_plan_of(const ern_engine *e) { return &e->plan; }
