/* The engine without its threads. See core.h. */
#include "engine/core.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#if defined(ERN_CHECKS)
_Thread_local bool core_sealed;
#endif

enum {
    EVENT_BATCH = 256, /* events handed out at once */
    CHUNK_LEAST = 16,  /* prompt rows that a step may always have: prompts get on, whatever the target */
    CHUNK_FIRST = 64,  /* before a pace is known */
    ROWS_EACH = 16,    /* for each that runs or waits, prompt rows that itl_times leaves a step: seats get filled */
    TILE_ROWS = 128,   /* kernels take so many: itl_times makes a step's rows a multiple where they are many */
    BASE_EVERY = 32,   /* of steps that bear both, one leaves prompts out, so that what it takes alone stays known */
};

/* ---- memory ---------------------------------------------------------------------------------------------------- */

static void take_tables(core *c, const core_options *o, layout *l) {
    const ern_engine_options *e = o->engine;
    const ern_backend_options *b = &e->backend_options;
    const sched_rules rules = {
        .max_seqs = e->max_num_seqs,
        .max_rows = e->max_batched_tokens,
        .max_wants = b->n_want_max,
        .chunk_tokens = e->chunk_tokens,
        .page_cells = b->n_page_cell,
        .max_len = e->max_model_len,
        .spare_slots = o->n_spare_slot,
        .chunked = e->chunked_prefill,
        .reserve_all = e->reserve_all,
        .prompt_pages = (int32_t)(e->prompt_share * o->n_page),
        .max_partial = e->max_partial,
        .max_long = e->max_long_partial,
        .long_tokens = e->long_prompt_tokens,
    };
    const cache_options kv = {
        .n_page = o->n_page,
        .page_tokens = b->n_page_cell,
        .step_tokens = e->max_batched_tokens,
        .prefix = e->prefix_cache,
        .n_host_page = o->n_host_page,
        .disk = e->store_dir != NULL,
        .move = o->move,
        .move_ud = o->move_ud,
    };
    *c = (core){.o = *o, .next_deadline_us = INT64_MAX};
    sched_open(&c->sched, l, &rules, o->n_seq, &kv);
    c->seq = LAYOUT_NEW(l, core_seq, o->n_seq);
    c->token = LAYOUT_NEW(l, int32_t, (int64_t)c->sched.n_slot * e->max_model_len);
    c->ban = LAYOUT_NEW(l, int32_t, (int64_t)c->sched.n_slot * (ERN_BAN_MAX + ERN_STOP_MAX));
    for (int i = 0; i < 2; i++) c->step[i].plan.item = LAYOUT_NEW(l, sched_item, e->max_num_seqs);
    c->row_token = LAYOUT_NEW(l, int32_t, e->max_batched_tokens);
    c->row_next = b->mtp ? LAYOUT_NEW(l, int32_t, e->max_batched_tokens) : NULL;
    c->row_pos = LAYOUT_NEW(l, int32_t, e->max_batched_tokens);
    c->row_cell = LAYOUT_NEW(l, int32_t, e->max_batched_tokens);
    c->row0 = LAYOUT_NEW(l, int32_t, e->max_num_seqs + 1);
    c->kv_len = LAYOUT_NEW(l, int32_t, e->max_num_seqs);
    c->page = LAYOUT_NEW(l, int32_t, (int64_t)e->max_num_seqs * c->sched.table_pages);
    c->want = LAYOUT_NEW(l, int32_t, b->n_want_max);
    c->sample = LAYOUT_NEW(l, ern_sample, b->n_want_max);
    c->event = LAYOUT_NEW(l, ern_event, EVENT_BATCH);
}

uint64_t core_bytes(const core_options *o) {
    core c;
    layout l = {0};
    take_tables(&c, o, &l);
    return l.bytes;
}

ern_status core_open(core *c, const core_options *o, ern_arena *arena, ern_err *err) {
    layout l = {.arena = arena};
    take_tables(c, o, &l);
    if (l.out)
        return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the scheduler's tables (%.1f MiB); lower --max-model-len",
                        (double)l.bytes / (1 << 20));
    c->batch = (ern_batch){.token = c->row_token,
                           .next = c->row_next,
                           .pos = c->row_pos,
                           .cell = c->row_cell,
                           .row0 = c->row0,
                           .kv_len = c->kv_len,
                           .page = c->page,
                           .want = c->want,
                           .sample = c->sample};
    c->stats.n_page = o->n_page;
    return ERN_OK;
}

void core_connect(core *c, ern_backend *backend, void *move_ud) {
    c->backend = backend;
    c->sched.cache.o.move_ud = move_ud;
}

uint64_t core_request_bytes(const ern_request *r) {
    return sizeof *r + sizeof(int32_t) * ((uint64_t)r->n_prompt + (uint64_t)r->n_stop + (uint64_t)r->sample.n_ban) +
           sizeof *r->sample.bias * (uint64_t)r->sample.n_bias;
}

static int32_t *tokens_of(const core *c, const sched_seq *q) {
    return c->token + (int64_t)q->slot * c->o.engine->max_model_len;
}

/* ---- events ---------------------------------------------------------------------------------------------------- */

static void flush(core *c) {
    if (c->n_event > 0) c->o.emit(c->o.ud, c->event, c->n_event);
    c->n_event = 0;
}

static ern_event *event_of(core *c, int32_t i, ern_event_kind kind) {
    if (c->n_event == EVENT_BATCH) flush(c);
    ern_event *ev = &c->event[c->n_event++];
    *ev = (ern_event){.id = c->sched.seq[i].id, .request = c->seq[i].request, .kind = kind};
    return ev;
}

static void emit_prompt(core *c, int32_t i, int32_t index, const ern_sampled *sampled) {
    ern_event *ev = event_of(c, i, ERN_EVENT_PROMPT);
    ev->index = index;
    ev->sampled = *sampled;
    c->seq[i].n_emitted++;
}

static bool is_stop(const ern_request *r, int32_t token) {
    for (int32_t k = 0; k < r->n_stop; k++)
        if (r->stop[k] == token) return true;
    return false;
}

/* ---- a request's life ------------------------------------------------------------------------------------------ */

/* It leaves the queue for good: to run, or because it ended. */
static void mark_started(core *c, int32_t i) {
    core_seq *q = &c->seq[i];
    if (q->started_us) return;
    q->started_us = c->o.now_us();
    if (q->started_us == 0) q->started_us = 1; /* 0 means never */
    c->n_started++;
    c->n_started_prompt += q->request->n_prompt;
    c->n_started_bytes += core_request_bytes(q->request);
}

/* Nothing in flight names it any more: say END. Afterwards the request is the server's again. */
static void finish(core *c, int32_t i, bool ran) {
    core_seq *q = &c->seq[i];
    const sched_seq *ss = &c->sched.seq[i];
    ern_event *ev = event_of(c, i, ERN_EVENT_END);
    ev->end = q->end;
    ev->n_prompt = ss->n_prompt;
    ev->n_output = q->n_output;
    ev->n_preempted = ss->n_preempted;
    ev->n_cached_host = q->n_from[TREE_FROM_HOST];
    ev->n_cached_disk = q->n_from[TREE_FROM_DISK];
    ev->n_cached = q->n_from[TREE_FROM_POOL] + ev->n_cached_host + ev->n_cached_disk;
    ev->queued_us = q->queued_us;
    ev->started_us = ran ? q->started_us : 0;
    ev->first_us = q->first_us;
    ev->end_us = c->o.now_us();
    c->stats.n_finished++;
    c->stats.n_cancelled += q->end == ERN_END_CANCELLED;
    sched_forget(&c->sched, i);
    *q = (core_seq){0};
}

static void leave(core *c, int32_t i, ern_end end) {
    c->seq[i].end = end;
    bool ran = c->seq[i].started_us != 0;
    mark_started(c, i);
    sched_leave(&c->sched, i);
    if (c->seq[i].n_flight == 0) finish(c, i, ran);
}

void core_add(core *c, int32_t i, ern_request *r, int64_t queued_us) {
    ERN_ASSERT(i >= 0 && i < c->o.n_seq && c->seq[i].request == NULL);
    bool reports = r->n_prompt_top >= 0;
    c->seq[i] = (core_seq){.request = r, .queued_us = queued_us};
    c->sched.seq[i] = (sched_seq){
        .id = r->id,
        .priority = r->priority,
        .n_prompt = r->n_prompt,
        .n_token = r->n_prompt,
        .n_len_max = r->n_prompt + (r->echo_only ? 0 : r->max_tokens),
        .n_asked = reports ? 1 : r->n_prompt, /* token 0 has no row before it, and so no logprob */
        .credit = ERN_EVENT_CREDIT,
        .token = r->prompt,
        .n_keep = c->o.engine->cache_output ? INT32_MAX : r->n_prompt,
        .path = {.salt = r->salt},
        .slot = -1,
    };
    sched_add(&c->sched, i);
    if (r->echo_only && (r->n_prompt == 1 || !reports)) { /* nothing to compute */
        if (reports) emit_prompt(c, i, 0, &(ern_sampled){.token = r->prompt[0]});
        leave(c, i, ERN_END_LENGTH);
    } else if (r->deadline_us > 0 && r->deadline_us < c->next_deadline_us) {
        c->next_deadline_us = r->deadline_us;
    }
}

void core_cancel(core *c, int32_t i, uint64_t id) {
    const sched_seq *q = &c->sched.seq[i];
    if (c->seq[i].request && q->id == id && q->where != SCHED_LEAVING) leave(c, i, ERN_END_CANCELLED);
}

static void end_all(core *c, ern_end end) {
    for (int32_t i = 0; i < c->o.n_seq; i++)
        if (c->seq[i].request && c->sched.seq[i].where != SCHED_LEAVING) leave(c, i, end);
}

void core_cancel_all(core *c) {
    end_all(c, ERN_END_CANCELLED);
    flush(c);
}

/* Drop what is still queued at its deadline, and find the next one. */
static void expire(core *c) {
    int64_t now = c->o.now_us();
    if (now < c->next_deadline_us) return;
    c->next_deadline_us = INT64_MAX;
    for (int32_t at = 0; at < c->sched.n_waiting; at++) {
        int32_t i = c->sched.waiting[at];
        int64_t deadline = c->seq[i].request->deadline_us;
        if (deadline <= 0 || c->seq[i].started_us) continue;
        if (deadline <= now) {
            leave(c, i, ERN_END_DEADLINE);
            at--;
        } else if (deadline < c->next_deadline_us) {
            c->next_deadline_us = deadline;
        }
    }
}

/* ---- from plan to batch ---------------------------------------------------------------------------------------- */

/* Who is too far ahead of its reader. Parked at the limit, free again at half of it, so that a reader who takes token
 * by token does not make its request come and go token by token. */
static void park(core *c, const int32_t *list, int32_t n_started) {
    for (int32_t at = 0; n_started > 0; at++) {
        sched_seq *ss = &c->sched.seq[list[at]];
        const core_seq *q = &c->seq[list[at]];
        if (ss->slot < 0) continue; /* never ran: ahead of nobody */
        n_started--;
        int32_t taken = atomic_load_explicit(&q->request->n_taken, memory_order_acquire);
        ss->credit = ERN_EVENT_CREDIT - (q->n_emitted + q->n_flight_want - taken);
        if (ss->credit <= 0) ss->parked = true;
        if (ss->credit >= ERN_EVENT_CREDIT / 2) ss->parked = false;
        c->stats.n_parked += ss->parked;
    }
}

static void sample_init(core *c, const sched_seq *ss, const ern_request *r, int32_t pos, int32_t forced,
                        ern_sample *out) {
    *out = r->sample;
    out->position = pos + 1;
    out->seen = tokens_of(c, ss);
    out->n_seen = ss->n_token < pos + 1 ? ss->n_token : pos + 1;
    out->n_prompt = ss->n_prompt < pos + 1 ? ss->n_prompt : pos + 1;
    out->forced = forced;
    if (forced >= 0) {
        out->n_top = r->n_prompt_top;
    } else if (pos + 1 - ss->n_prompt < r->min_tokens && r->n_stop > 0) {
        out->ban = c->ban + (int64_t)ss->slot * (ERN_BAN_MAX + ERN_STOP_MAX); /* filled by start() */
        out->n_ban = r->sample.n_ban + r->n_stop;
    }
}

/* First time with rows: the prompt and the bans move into its slot. */
static void start(core *c, int32_t i) {
    const ern_request *r = c->seq[i].request;
    sched_seq *ss = &c->sched.seq[i];
    memcpy(tokens_of(c, ss), r->prompt, (size_t)r->n_prompt * sizeof *r->prompt);
    ss->token = tokens_of(c, ss);
    for (int k = 0; k < TREE_FROMS; k++) c->seq[i].n_from[k] = ss->path.n_from[k] * c->sched.rules.page_cells;
    cache_count_found(&c->sched.cache, &ss->path);
    if (r->min_tokens > 0 && r->n_stop > 0) {
        int32_t *ban = c->ban + (int64_t)ss->slot * (ERN_BAN_MAX + ERN_STOP_MAX);
        if (r->sample.n_ban > 0) memcpy(ban, r->sample.ban, (size_t)r->sample.n_ban * sizeof *ban);
        memcpy(ban + r->sample.n_ban, r->stop, (size_t)r->n_stop * sizeof *ban);
    }
    mark_started(c, i);
    c->stats.n_prompt_token += (uint64_t)r->n_prompt;
}

/* The rows and wants of one item, appended to the batch. */
static void batch_add(core *c, const sched_item *it) {
    ern_batch *b = &c->batch;
    const sched_seq *ss = &c->sched.seq[it->seq];
    core_seq *q = &c->seq[it->seq];
    const int32_t *token = tokens_of(c, ss);
    int32_t P = c->sched.rules.page_cells, row = b->n_row;
    for (int32_t k = 0; k < it->n_row; k++, row++) {
        int32_t pos = it->pos + k;
        bool known = pos < ss->n_token;
        ERN_ASSERT(known || (pos == ss->n_token && q->n_flight == 1 && q->prev_want >= 0));
        c->row_token[row] = known ? token[pos] : ERN_PREV(q->prev_want);
        c->row_pos[row] = pos;
        c->row_cell[row] = ss->path.page[pos / P].page * P + pos % P;
        if (c->row_next) c->row_next[row] = pos + 1 < ss->n_token ? token[pos + 1] : -1;
    }
    for (int32_t k = 0; k < it->n_report; k++) {
        int32_t index = it->report0 + k;
        c->want[b->n_want] = b->n_row + index - 1 - it->pos;
        sample_init(c, ss, q->request, index - 1, token[index], &c->sample[b->n_want++]);
    }
    q->prev_want = -1;
    if (it->samples) {
        q->prev_want = b->n_want;
        c->want[b->n_want] = row - 1;
        sample_init(c, ss, q->request, it->pos + it->n_row - 1, -1, &c->sample[b->n_want++]);
    }
    q->n_flight++;
    q->n_flight_want += it->n_report + it->samples;
    c->kv_len[b->n_seq++] = it->pos + it->n_row;
    c->row0[b->n_seq] = b->n_row = row;
}

/* The page tables, all as wide as the widest that the step needs; -1 beyond a sequence's last page. */
static void batch_pages(core *c, const sched_plan *plan) {
    int32_t P = c->sched.rules.page_cells, widest = 0;
    for (int32_t s = 0; s < plan->n_item; s++) {
        int32_t n = (c->kv_len[s] + P - 1) / P;
        if (n > widest) widest = n;
    }
    c->batch.n_page_max = widest;
    for (int32_t s = 0; s < plan->n_item; s++) {
        const sched_seq *ss = &c->sched.seq[plan->item[s].seq];
        int32_t *to = c->page + (int64_t)s * widest;
        for (int32_t k = 0; k < widest; k++) to[k] = k < ss->path.n_page ? ss->path.page[k].page : -1;
    }
}

/* Plan a step and set it going, if there is one. *moved: something changed, if only that sequences were preempted. */
static bool submit(core *c, int32_t event_room, bool *moved) {
    c->stats.n_parked = 0;
    park(c, c->sched.running, c->sched.n_running);
    park(c, c->sched.waiting, c->sched.n_resumable);
    core_step *step = &c->step[(c->first_step + c->n_flight) % 2];
    /* One want causes at most two events: with the first one of a prompt's report comes token 0's. */
    const sched_budget budget = {.n_want = event_room / 2 - c->n_flight_want, .n_prompt_row = core_prompt_rows(c)};
    sched_make(&c->sched, &budget, &step->plan);
    c->stats.n_preempted += (uint64_t)step->plan.n_preempted;
    *moved = step->plan.n_item > 0 || step->plan.n_preempted > 0;
    if (step->plan.n_item == 0) return false;
    c->batch.n_row = c->batch.n_seq = c->batch.n_want = 0;
    c->row0[0] = 0;
    step->n_decode = 0;
    for (int32_t k = 0; k < step->plan.n_item; k++) {
        step->n_decode += step->plan.item[k].n_row == 1;
        if (c->seq[step->plan.item[k].seq].started_us == 0) start(c, step->plan.item[k].seq);
        batch_add(c, &step->plan.item[k]);
    }
    if (step->n_decode > 0) c->pace.n_mixed = step->plan.n_row > step->n_decode ? c->pace.n_mixed + 1 : 0;
    batch_pages(c, &step->plan);
#if defined(ERN_CHECKS)
    const char *why = "";
    if (!ern_batch_valid(&c->batch, &c->o.engine->backend_options, c->o.n_vocab, &why))
        ern_assert_fail(why, __FILE__, __LINE__);
#endif
    if (c->n_flight == 0) c->stats.step_since_us = c->o.now_us();
    c->n_flight++;
    c->n_flight_want += step->plan.n_want;
    c->backend->ops->submit(c->backend, &c->batch);
    cache_step_submitted(&c->sched.cache);
    return true;
}

/* ---- from result to events ------------------------------------------------------------------------------------- */

static void accept_report(core *c, int32_t i, int32_t index, const ern_sampled *sampled) {
    if (index == 1) emit_prompt(c, i, 0, &(ern_sampled){.token = c->seq[i].request->prompt[0]});
    emit_prompt(c, i, index, sampled);
    if (c->seq[i].request->echo_only && index == c->seq[i].request->n_prompt - 1) leave(c, i, ERN_END_LENGTH);
}

static void accept_token(core *c, int32_t i, const ern_sampled *sampled) {
    core_seq *q = &c->seq[i];
    sched_seq *ss = &c->sched.seq[i];
    const ern_request *r = q->request;
    if (r->n_prompt_top >= 0 && r->n_prompt == 1 && q->n_emitted == 0)
        emit_prompt(c, i, 0, &(ern_sampled){.token = r->prompt[0]});
    tokens_of(c, ss)[ss->n_token++] = sampled->token;
    bool stop = is_stop(r, sampled->token);
    ern_event *ev = event_of(c, i, ERN_EVENT_TOKEN);
    ev->index = q->n_output++;
    ev->is_stop = stop;
    ev->sampled = *sampled;
    q->n_emitted++;
    c->stats.n_output_token++;
    if (q->first_us == 0) q->first_us = c->o.now_us();
    if (stop)
        leave(c, i, ERN_END_STOP);
    else if (q->n_output == r->max_tokens)
        leave(c, i, ERN_END_LENGTH);
}

/* Learn the pace from a step that took us microseconds. */
static void pace_learn(core_pace *p, const core_step *step, int64_t us) {
    const double share = 0.25;     /* of the newest step: follows contexts that grow, forgives one odd step */
    const double base_share = 0.5; /* and seats that fill up */
    int32_t n_prompt = step->plan.n_row - step->n_decode;
    if (us <= 0) return;
    if (n_prompt == 0) {
        p->base_us = p->base_us > 0 ? p->base_us + base_share * ((double)us - p->base_us) : (double)us;
    } else if (n_prompt >= CHUNK_LEAST / 2) { /* of fewer rows there is too little to see */
        double each = ((double)us - (step->n_decode > 0 ? p->base_us : 0)) / n_prompt;
        if (each < 0) each = 0;
        p->prompt_us = p->prompt_us > 0 ? p->prompt_us + share * (each - p->prompt_us) : each;
    }
}

int32_t core_prompt_rows(const core *c) {
    const ern_engine_options *e = c->o.engine;
    const core_pace *p = &c->pace;
    if (e->itl_target_us <= 0 && e->itl_times <= 0) return INT32_MAX;
    if (e->itl_times > 0 && (p->base_us <= 0 || p->n_mixed >= BASE_EVERY)) return 0;
    if (p->prompt_us <= 0) return CHUNK_FIRST;
    double rows = INT32_MAX, least = CHUNK_LEAST;
    if (e->itl_times > 0) {
        least = fmax(least, (double)ROWS_EACH * (c->sched.n_running + c->sched.n_waiting));
        rows = fmax((e->itl_times - 1) * p->base_us / p->prompt_us, least);
    }
    if (e->itl_target_us > 0) rows = fmin(rows, (0.9 * (double)e->itl_target_us - p->base_us) / p->prompt_us);
    if (rows > INT32_MAX / 2) return INT32_MAX;
    if (rows < CHUNK_LEAST) return CHUNK_LEAST;
    const int32_t n = (int32_t)rows, all = (n + c->sched.n_running) / TILE_ROWS * TILE_ROWS - c->sched.n_running;
    if (e->itl_times <= 0 || all <= n / 3) return n;
    return all >= least ? all : n >= least ? all + TILE_ROWS : n;
}

/* The results of one item; sampled points at its first want. An ended sequence's results are dropped. */
static void accept(core *c, const sched_item *it, const ern_sampled *sampled) {
    core_seq *q = &c->seq[it->seq];
    sched_seq *ss = &c->sched.seq[it->seq];
    int32_t n_want = it->n_report + it->samples;
    q->n_flight--;
    q->n_flight_want -= n_want;
    ss->n_pending -= it->samples;
    if (ss->where == SCHED_LEAVING) {
        if (q->n_flight == 0) finish(c, it->seq, true);
        return;
    }
    bool bad = false;
    for (int32_t k = 0; k < n_want; k++) bad |= sampled[k].bad;
    if (bad && ss->where == SCHED_RUNNING) cache_disown(&c->sched.cache, &ss->path);
    if (!bad) sched_done(&c->sched, it->seq, it->pos + it->n_row, n_want > 0);
    for (int32_t k = 0; k < n_want; k++) {
        if (sampled[k].bad) {
            leave(c, it->seq, ERN_END_NUMERICAL);
            return;
        }
        if (k < it->n_report)
            accept_report(c, it->seq, it->report0 + k, &sampled[k]);
        else
            accept_token(c, it->seq, &sampled[k]);
    }
}

/* The backend is gone: every request ends with ERROR, nothing runs any more. The step that may still be in flight is
 * waited for, because it may still read what the requests lent. */
static void fail(core *c, const char *text) {
    ern_result ignored;
    c->stats.step_since_us = 0;
    for (; c->n_flight > 0; c->n_flight--) {
        ern_err err;
        ern_status status = c->backend->ops->wait(c->backend, &ignored, &err);
        (void)status; /* it failed before; what it says now adds nothing */
    }
    snprintf(c->error, sizeof c->error, "%s", text);
    c->stats.failed = true;
    c->n_flight_want = 0;
    for (int32_t i = 0; i < c->o.n_seq; i++) {
        if (!c->seq[i].request) continue;
        c->seq[i].n_flight = 0;
        if (c->sched.seq[i].where == SCHED_LEAVING)
            finish(c, i, true);
        else
            leave(c, i, ERN_END_ERROR);
    }
}

/* Wait for the oldest step in flight and take its results. */
static void collect(core *c) {
    ern_result result;
    ern_err err = {0};
    ern_status status = c->backend->ops->wait(c->backend, &result, &err);
    const core_step *step = &c->step[c->first_step];
    const sched_plan *plan = &step->plan;
    c->first_step = 1 - c->first_step;
    c->n_flight--;
    if (status != ERN_OK) {
        fail(c, err.text);
        return;
    }
    ERN_ASSERT(result.n_want == plan->n_want);
    cache_step_collected(&c->sched.cache);
    pace_learn(&c->pace, step, result.compute_us);
    c->n_flight_want -= plan->n_want;
    const ern_sampled *sampled = result.sampled;
    for (int32_t k = 0; k < plan->n_item; k++) {
        accept(c, &plan->item[k], sampled);
        sampled += plan->item[k].n_report + plan->item[k].samples;
    }
    c->stats.n_step++;
    int64_t now = c->o.now_us(), took = now - c->stats.step_since_us;
    if (took > c->stats.step_most_us) c->stats.step_most_us = took;
    c->stats.step_since_us = c->n_flight > 0 ? now : 0;
}

bool core_is_busy(const core *c) { return c->n_flight > 0 || c->sched.n_running > 0 || c->sched.n_waiting > 0; }

bool core_turn(core *c, int32_t event_room) {
    if (c->stats.failed) end_all(c, ERN_END_ERROR);
    expire(c);
    bool moved = false, submitted = !c->stats.failed && submit(c, event_room, &moved);
    bool runs_on = submitted && c->o.engine->overlap; /* the step just submitted */
    if (c->n_flight > runs_on) {
        collect(c);
        moved = true;
    }
    moved |= cache_turn(&c->sched.cache);
    flush(c);
    c->stats.n_running = c->sched.n_running;
    c->stats.n_waiting = c->sched.n_waiting;
    c->stats.n_preempted_waiting = c->sched.n_resumable;
    c->stats.n_loading = 0;
    for (int32_t at = 0; at < c->sched.n_running; at++)
        c->stats.n_loading += c->sched.seq[c->sched.running[at]].loading;
    c->stats.prefill_ns_per_token = (int64_t)(1000 * c->pace.prompt_us);
    cache_stats(&c->sched.cache, &c->stats);
    c->stats.busy = core_is_busy(c);
#if defined(ERN_CHECKS)
    core_check(c);
#endif
    return moved;
}

/* ---- the walk -------------------------------------------------------------------------------------------------- */

void core_check(core *c) {
    const char *why = "";
    if (!sched_check(&c->sched, &why)) ern_assert_fail(why, __FILE__, __LINE__);
    int32_t n_flight = 0, n_want = 0;
    for (int32_t i = 0; i < c->o.n_seq; i++) {
        const core_seq *q = &c->seq[i];
        const sched_seq *ss = &c->sched.seq[i];
        ERN_ASSERT((q->request == NULL) == (ss->where == SCHED_OUT));
        if (!q->request) continue;
        ERN_ASSERT(q->n_flight >= 0 && q->n_flight <= c->n_flight && q->n_flight_want >= 0);
        ERN_ASSERT(ss->where != SCHED_LEAVING || q->n_flight > 0);
        ERN_ASSERT(ss->where == SCHED_LEAVING || ss->n_token == ss->n_prompt + q->n_output);
        n_flight += q->n_flight;
        n_want += q->n_flight_want;
    }
    int32_t n_item = 0;
    for (int32_t k = 0; k < c->n_flight; k++) n_item += c->step[(c->first_step + k) % 2].plan.n_item;
    ERN_ASSERT(n_flight == n_item && n_want == c->n_flight_want);
}
