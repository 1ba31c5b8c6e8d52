/* From engine events to text: decode, stop texts, reasoning and tool calls, finish reasons, the client's credit. */
#include <stdio.h>
#include <string.h>
#include <sys/random.h>

#include "base/log.h"
#include "base/os.h"
#include "server/job.h"

static void choice_finish(choice *c, const char *reason);

/* Give up on the whole request: what still runs is cancelled, the last END sends the error. */
static void fail(job *j, int status, const char *code, const char *message) {
    if (j->error.status == 0) (void)api_fail(&j->error, status, code, NULL, "%s", message);
    for (int i = 0; i < j->n_choice; i++) {
        choice *c = &j->choice[i];
        c->finished = true;
        if (!c->ended && c->submitted) ern_engine_cancel(j->server->engine, c->request.id);
    }
}

/* ---- text ------------------------------------------------------------------------------------------------------ */

static void call_id(char out[48]) {
    uint64_t x[2] = {0};
    if (getrandom(x, sizeof x, 0) != (ssize_t)sizeof x) x[0] = (uint64_t)ern_now_us();
    (void)snprintf(out, 48, "chatcmpl-tool-%016llx%016llx", (unsigned long long)x[0], (unsigned long long)x[1]);
}

static void on_part(void *ud, ern_reply_kind kind, int call, const char *s, size_t n) {
    choice *c = ud;
    job *j = c->job;
    if (kind == ERN_REPLY_CONTENT) (void)ern_buf_add(&c->content, s, n);
    if (kind == ERN_REPLY_REASONING) (void)ern_buf_add(&c->reasoning, s, n);
    if (kind == ERN_REPLY_CONTENT || kind == ERN_REPLY_REASONING) return;
    if (!c->call || call >= JOB_CALLS_MAX || (call > 0 && !j->p.parallel_tool_calls)) return;
    tool_call_out *t = &c->call[call];
    if (kind == ERN_REPLY_CALL_NAME) {
        ern_buf_init(&t->name, JOB_ANSWER_MAX_BYTES);
        ern_buf_init(&t->args, JOB_ANSWER_MAX_BYTES);
        (void)ern_buf_add(&t->name, s, n);
        call_id(t->id);
        c->n_call = call + 1;
        if (j->streaming) write_call(j, c, call, true, NULL, 0);
    } else if (j->streaming) {
        write_call(j, c, call, false, s, n);
    } else {
        (void)ern_buf_add(&t->args, s, n);
    }
}

static void route(choice *c, const char *s, size_t n) {
    if (n == 0) return;
    if (c->reply)
        ern_reply_feed(c->reply, s, n, on_part, c);
    else
        (void)ern_buf_add(&c->content, s, n);
}

/* Through the stop filter. True when a stop text was found. */
static bool feed(choice *c, const ern_buf *t) {
    if (!c->stop) {
        route(c, t->data, t->len);
        return false;
    }
    if (t->len == 0) return false;
    ern_buf *shown = &c->job->shown;
    ern_buf_clear(shown);
    int found = ern_stop_feed(c->stop, t->data, t->len, c->job->p.include_stop_str_in_output, shown);
    route(c, shown->data, shown->len);
    return found >= 0;
}

/* What was held back at the end of a reply that no stop text ended. */
static void flush_text(choice *c) {
    job *j = c->job;
    ern_buf_clear(&j->text);
    ern_decode_flush(&c->decode, &j->text);
    if (feed(c, &j->text) || !c->stop) return;
    ern_buf_clear(&j->shown);
    ern_stop_flush(c->stop, &j->shown);
    route(c, j->shown.data, j->shown.len);
}

static bool strict_stop(choice *c, int32_t token) {
    const job *j = c->job;
    if (c->n_tail == STRICT_STOP_TOKENS_MAX) {
        memmove(c->tail, c->tail + 1, (STRICT_STOP_TOKENS_MAX - 1) * sizeof c->tail[0]);
        c->n_tail--;
    }
    c->tail[c->n_tail++] = token;
    for (int i = 0; i < j->n_strict; i++) {
        int n = j->n_strict_seq[i];
        if (n <= c->n_tail && memcmp(c->tail + c->n_tail - n, j->strict_seq[i], (size_t)n * sizeof c->tail[0]) == 0)
            return true;
    }
    return false;
}

/* ---- events ---------------------------------------------------------------------------------------------------- */

/* The event has become bytes (or nothing): the client owes us less, unless its buffer is long. */
static void take_credit(choice *c) {
    job *j = c->job;
    int n = atomic_fetch_add(&c->n_event, 1) + 1;
    if (j->streaming && http_stream_unsent(j->http) >= HTTP_LOW_BYTES) {
        c->lagging = true; /* on_drained gives the credit back */
        return;
    }
    atomic_store(&c->request.n_taken, c->credit_base + n);
    if (c->lagging) ern_engine_poke(j->server->engine);
    c->lagging = false;
}

static void observe_times(choice *c) {
    int64_t now = ern_now_us();
    ern_server *s = c->job->server;
    if (c->n_output == 1)
        metrics_observe(&s->metrics, HIST_TTFT, (double)(now - c->job->begin_us) / 1e6);
    else
        metrics_observe(&s->metrics, HIST_TPOT, (double)(now - c->last_token_us) / 1e6);
    c->last_token_us = now;
}

static bool buffers_full(const choice *c) {
    return c->content.full || c->reasoning.full || c->prompt_lp.full || c->lp[0].full || c->lp[1].full || c->lp[2].full;
}

static void on_token(choice *c, const ern_event *ev) {
    job *j = c->job;
    ern_server *s = j->server;
    if (c->finished) return; /* after a stop text: the engine has not heard of it yet */
    c->n_output++;
    observe_times(c);
    if (j->streaming) write_echo(j, c);
    if (j->p.return_token_ids) (void)ern_tokens_add(&c->ids, ev->sampled.token);
    if (j->n_lp >= 0) logprobs_add(c, &ev->sampled, true);
    bool reasoning = c->reply && ern_reply_in_reasoning(c->reply);
    if (reasoning)
        c->n_reasoning++;
    else
        c->n_response++;
    bool found = false;
    if (!ev->is_stop || j->p.include_stop_str_in_output) {
        ern_buf_clear(&j->text);
        bool skip = !j->decode_special && !ev->is_stop;
        ern_decode_token(&c->decode, s->tokenizer, ev->sampled.token, skip, &j->text);
        found = feed(c, &j->text);
    }
    bool strict = j->n_strict && strict_stop(c, ev->sampled.token);
    bool spent = j->p.response_max_tokens > 0 && c->n_response >= j->p.response_max_tokens;
    if (buffers_full(c)) {
        fail(j, 500, "answer_too_large",
             "the answer is larger than one answer may be; ask for fewer logprobs or tokens");
    } else if (!ev->is_stop && (found || strict || spent)) {
        choice_finish(c, found || strict ? "stop" : "length");
        ern_engine_cancel(s->engine, c->request.id);
    } else if (j->streaming && ++c->n_since >= j->p.max_streaming_response_tokens) {
        write_delta(j, c);
    }
}

/* The choice's text is complete. */
static void choice_finish(choice *c, const char *reason) {
    job *j = c->job;
    if (c->finished) return;
    flush_text(c);
    if (c->reply) ern_reply_flush(c->reply, on_part, c);
    c->finished = true;
    c->finish = c->n_call && strcmp(reason, "stop") == 0 ? "tool_calls" : reason;
    if (!j->streaming) return;
    write_echo(j, c);
    write_last(j, c);
}

static void on_end(choice *c, const ern_event *ev) {
    job *j = c->job;
    c->ended = true;
    j->n_live--;
    c->n_cached = ev->n_cached;
    bool ok = c->finished ? j->error.status == 0 : ev->end == ERN_END_STOP || ev->end == ERN_END_LENGTH;
    metrics_ended(&j->server->metrics, ev, ok);
    if (c->finished) return;
    switch (ev->end) {
    case ERN_END_STOP: {
        /* FastDeploy says length when the limit is reached, whatever the last token was. */
        bool length = j->strict_stop && c->n_output >= c->request.max_tokens;
        choice_finish(c, length ? "length" : "stop");
        break;
    }
    case ERN_END_LENGTH: choice_finish(c, "length"); break;
    case ERN_END_CANCELLED:
        if (atomic_load(&j->gone))
            fail(j, 499, "client_gone", "the client left");
        else
            fail(j, 503, "shutting_down", "the server is shutting down and cut this request off");
        break;
    case ERN_END_DEADLINE:
        fail(j, 504, "deadline_exceeded", "the request's deadline passed while it was waiting to run");
        break;
    case ERN_END_NUMERICAL:
        ern_log(ERN_LOG_ERROR, "server.numerical_error", "output=%d", c->n_output);
        fail(j, 500, "numerical_error", "the model produced numbers that are not finite; the answer was stopped");
        break;
    case ERN_END_ERROR:
        ern_log(ERN_LOG_ERROR, "server.engine_error", "text=\"%s\"", ern_engine_error(j->server->engine));
        fail(j, 500, "engine_error", "the engine failed while computing this request");
        break;
    }
}

void reply_begin(job *j) {
    if (!j->streaming) return;
    http_stream_begin(j->http, j->p.sse_ping_interval >= 0 ? (int)j->p.sse_ping_interval : j->server->o.sse_ping_s);
    for (int i = 0; i < j->n_choice; i++) {
        write_role(j, &j->choice[i]);
        if (j->echo && j->n_lp < 0) write_echo(j, &j->choice[i]);
    }
}

bool reply_event(job *j, const ern_event *ev) {
    choice *c = ev->request->ud;
    if (c->n_waiting) atomic_fetch_sub(&j->server->n_waiting_token, c->n_waiting);
    c->n_waiting = 0;
    if (ev->kind == ERN_EVENT_PROMPT && !c->finished) prompt_logprobs_add(c, ev->index, &ev->sampled);
    if (ev->kind == ERN_EVENT_TOKEN) on_token(c, ev);
    if (ev->kind == ERN_EVENT_END)
        on_end(c, ev);
    else
        take_credit(c);
    if (j->n_live > 0) return false;
    reply_finish(j);
    return true;
}

void reply_finish(job *j) {
    job_settle(j);
    if (j->streaming)
        write_stream_end(j);
    else if (j->error.status)
        routes_fail(j->http, &j->error);
    else
        write_answer(j);
}
