/* Answers and events in JSON: the stream contract of docs/api.md (role chunk, deltas, one finish chunk per index, usage
 * when asked, [DONE]) and the whole answers. Everything is written into job->chunk and sent. */
#include <stdio.h>
#include <string.h>

#include "base/jsonw.h"
#include "base/os.h"
#include "server/job.h"

static void text(ern_buf *b, const char *s) { (void)ern_buf_text(b, s); }
static void quote(ern_buf *b, const ern_buf *s) { ern_json_quote(b, s->data ? s->data : "", s->len); }

static void write_ids(ern_buf *b, const int32_t *id, size_t n) {
    text(b, "[");
    for (size_t i = 0; i < n; i++) (void)ern_buf_print(b, "%s%d", i ? "," : "", id[i]);
    text(b, "]");
}

void write_head(job *j) {
    ern_buf *b = &j->head;
    text(b, "{\"id\":");
    ern_json_quote(b, j->id, strlen(j->id));
    text(b, ",\"object\":");
    if (j->kind == JOB_CHAT)
        text(b, j->streaming ? "\"chat.completion.chunk\"" : "\"chat.completion\"");
    else
        text(b, "\"text_completion\"");
    (void)ern_buf_print(b, ",\"created\":%lld,\"model\":", (long long)j->created_s);
    ern_json_quote(b, j->model, strlen(j->model));
    text(b, ",\"choices\":[");
}

/* Prompt tokens that were found in the prefix cache. A prompt is counted once however many choices it has, like
 * prompt_tokens: what even the first of its choices to run did not have to compute, since the others find what that one
 * has computed. FastDeploy adds them all up. */
static int64_t cached_tokens(const job *j) {
    int64_t sum = 0;
    bool strict = j->server->o.strict_fastdeploy;
    for (int i = 0; i < j->n_choice;) {
        int32_t least = j->choice[i].n_cached;
        for (int at = j->choice[i++].prompt; i < j->n_choice && j->choice[i].prompt == at && !strict; i++)
            if (j->choice[i].n_cached < least) least = j->choice[i].n_cached;
        sum += least;
    }
    return sum;
}

static void write_usage(const job *j, ern_buf *b) {
    int64_t prompt_tokens = 0, output = 0, cached = cached_tokens(j), reasoning = 0;
    for (int i = 0; i < j->n_prompt; i++) prompt_tokens += j->prompt[i].n;
    for (int i = 0; i < j->n_choice; i++) {
        output += j->choice[i].n_output;
        reasoning += j->choice[i].n_reasoning;
    }
    (void)ern_buf_print(b,
                        "{\"prompt_tokens\":%lld,\"total_tokens\":%lld,\"completion_tokens\":%lld,"
                        "\"prompt_tokens_details\":{\"cached_tokens\":%lld},"
                        "\"completion_tokens_details\":{\"reasoning_tokens\":%lld}}",
                        (long long)prompt_tokens, (long long)(prompt_tokens + output), (long long)output,
                        (long long)cached, (long long)reasoning);
}

/* ---- events ---------------------------------------------------------------------------------------------------- */

static ern_buf *event(job *j) {
    ern_buf *b = &j->chunk;
    ern_buf_clear(b);
    text(b, "data: ");
    (void)ern_buf_add(b, j->head.data, j->head.len);
    return b;
}

static void send_event(job *j, bool usage) {
    ern_buf *b = &j->chunk;
    text(b, "]");
    if (usage || j->p.continuous_usage_stats) {
        text(b, ",\"usage\":");
        write_usage(j, b);
    } else if (j->include_usage) {
        text(b, ",\"usage\":null");
    }
    text(b, "}\n\n");
    (void)http_stream_write(j->http, b->data, b->len);
}

static void arrival(const job *j, ern_buf *b) {
    (void)ern_buf_print(b, ",\"arrival_time\":%.6f", (double)(ern_now_us() - j->begin_us) / 1e6);
}

/* The opening fields of return_token_ids. */
static void prompt_fields(const choice *c, ern_buf *b) {
    const job *j = c->job;
    const prompt *q = &j->prompt[c->prompt];
    text(b, ",\"prompt_token_ids\":");
    write_ids(b, q->id, (size_t)q->n);
    text(b, ",\"prompt_tokens\":");
    ern_json_quote(b, q->text, q->text_len);
}

void write_role(job *j, choice *c) {
    ern_buf *b = event(j);
    if (j->kind == JOB_CHAT) {
        (void)ern_buf_print(b, "{\"index\":%d,\"delta\":{\"role\":\"assistant\",\"content\":\"\"", c->index);
        if (j->server->o.strict_fastdeploy) text(b, ",\"reasoning_content\":\"\",\"tool_calls\":null");
        if (j->p.return_token_ids) prompt_fields(c, b);
        text(b, "},\"logprobs\":null,\"finish_reason\":null}");
    } else {
        if (!j->p.return_token_ids) return; /* completions open with nothing */
        (void)ern_buf_print(b, "{\"index\":%d,\"text\":\"\"", c->index);
        prompt_fields(c, b);
        text(b, ",\"logprobs\":null,\"finish_reason\":null}");
    }
    send_event(j, false);
}

/* The logprobs gathered since the last event, or null. */
static void take_logprobs(choice *c, ern_buf *b) {
    if (c->job->n_lp < 0 || c->lp[0].len == 0) {
        text(b, "null");
        return;
    }
    static const char *const key[4] = {"\"tokens\":[", "],\"token_logprobs\":[", "],\"top_logprobs\":[",
                                       "],\"text_offset\":["};
    text(b, "{");
    bool chat = c->job->kind == JOB_CHAT;
    for (int i = 0; i < (chat ? 1 : 4); i++) {
        text(b, chat ? "\"content\":[" : key[i]);
        (void)ern_buf_add(b, c->lp[i].data, c->lp[i].len);
        ern_buf_clear(&c->lp[i]);
    }
    text(b, chat ? "],\"refusal\":null}" : "]}");
}

static void take_ids(choice *c, ern_buf *b) {
    if (!c->job->p.return_token_ids) return;
    text(b, ",\"completion_token_ids\":");
    write_ids(b, c->ids.id + c->n_ids_sent, c->ids.n - c->n_ids_sent);
    c->n_ids_sent = c->ids.n;
}

/* The echoed prompt, with its logprobs, before anything else of the choice. */
void write_echo(job *j, choice *c) {
    if (!j->echo || c->echo_sent) return;
    c->echo_sent = true;
    const prompt *q = &j->prompt[c->prompt];
    ern_buf *b = event(j);
    (void)ern_buf_print(b, "{\"index\":%d,\"text\":", c->index);
    ern_json_quote(b, q->text, q->text_len);
    text(b, ",\"logprobs\":");
    take_logprobs(c, b);
    arrival(j, b);
    text(b, ",\"finish_reason\":null}");
    send_event(j, false);
}

void write_delta(job *j, choice *c) {
    c->n_since = 0;
    bool ids = c->ids.n > c->n_ids_sent, lp = j->n_lp >= 0 && c->lp[0].len;
    if (c->content.len == 0 && c->reasoning.len == 0 && !ids && !lp) return;
    ern_buf *b = event(j);
    if (j->kind == JOB_CHAT) {
        (void)ern_buf_print(b, "{\"index\":%d,\"delta\":{\"content\":", c->index);
        quote(b, &c->content);
        if (c->reasoning.len) {
            /* Both names: clients read one or the other, none shows it twice. */
            text(b, ",\"reasoning_content\":");
            quote(b, &c->reasoning);
            text(b, ",\"reasoning\":");
            quote(b, &c->reasoning);
        }
        take_ids(c, b);
        text(b, "},\"logprobs\":");
    } else {
        (void)ern_buf_print(b, "{\"index\":%d,\"text\":", c->index);
        quote(b, &c->content);
        take_ids(c, b);
        text(b, ",\"logprobs\":");
    }
    take_logprobs(c, b);
    arrival(j, b);
    text(b, ",\"finish_reason\":null}");
    ern_buf_clear(&c->content);
    ern_buf_clear(&c->reasoning);
    send_event(j, false);
}

static void write_name(const tool_call_out *t, ern_buf *b) {
    (void)ern_buf_print(b, "\"id\":\"%s\",\"type\":\"function\",\"function\":{\"name\":", t->id);
    quote(b, &t->name);
    text(b, ",\"arguments\":");
}

/* The call opens, with id and name; or more of its arguments. */
void write_call(job *j, choice *c, int call, bool opens, const char *args, size_t n) {
    write_delta(j, c);
    ern_buf *b = event(j);
    (void)ern_buf_print(b, "{\"index\":%d,\"delta\":{\"tool_calls\":[{\"index\":%d,", c->index, call);
    if (opens) {
        write_name(&c->call[call], b);
        text(b, "\"\"");
    } else {
        text(b, "\"function\":{\"arguments\":");
        ern_json_quote(b, args, n);
    }
    text(b, "}}]},\"logprobs\":null,\"finish_reason\":null}");
    send_event(j, false);
}

static void prompt_logprobs(const choice *c, ern_buf *b) {
    if (c->job->p.prompt_logprobs < 0) return;
    text(b, ",\"prompt_logprobs\":[");
    if (c->prompt_lp.len) (void)ern_buf_add(b, c->prompt_lp.data, c->prompt_lp.len);
    text(b, "]");
}

void write_last(job *j, choice *c) {
    write_delta(j, c);
    ern_buf *b = event(j);
    if (j->kind == JOB_CHAT)
        (void)ern_buf_print(b, "{\"index\":%d,\"delta\":{%s}", c->index,
                            j->server->o.strict_fastdeploy ? "\"content\":\"\"" : "");
    else
        (void)ern_buf_print(b, "{\"index\":%d,\"text\":\"\"", c->index);
    prompt_logprobs(c, b);
    arrival(j, b);
    (void)ern_buf_print(b, ",\"logprobs\":null,\"finish_reason\":\"%s\"}", c->finish);
    send_event(j, false);
}

void write_stream_end(job *j) {
    ern_buf *b = &j->chunk;
    if (j->error.status) {
        ern_buf_clear(b);
        text(b, "data: ");
        api_error_write(b, &j->error);
        text(b, "\n\n");
        (void)http_stream_write(j->http, b->data, b->len);
    } else if (j->include_usage) {
        (void)event(j);
        send_event(j, true);
    }
    (void)http_stream_write(j->http, "data: [DONE]\n\n", 14);
    http_stream_end(j->http);
}

/* ---- whole answers --------------------------------------------------------------------------------------------- */

static void token_fields(const choice *c, ern_buf *b) {
    const job *j = c->job;
    if (!j->p.return_token_ids) return;
    prompt_fields(c, b);
    text(b, ",\"completion_token_ids\":");
    write_ids(b, c->ids.id, c->ids.n);
    text(b, ",\"completion_tokens\":");
    ern_buf raw;
    ern_buf_init(&raw, JOB_ANSWER_MAX_BYTES);
    /* Step by step: a model may sample ids beyond its tokenizer, which have no text but are no error here. */
    ern_decode d = {0};
    for (size_t i = 0; i < c->ids.n; i++) ern_decode_token(&d, j->server->tokenizer, c->ids.id[i], false, &raw);
    ern_decode_flush(&d, &raw);
    if (raw.full) b->full = true;
    quote(b, &raw);
    ern_buf_free(&raw);
}

static void write_message(choice *c, ern_buf *b) {
    const job *j = c->job;
    (void)ern_buf_print(b, "{\"index\":%d,\"message\":{\"role\":\"assistant\",\"content\":", c->index);
    if (c->n_call && c->content.len == 0)
        text(b, "null");
    else
        quote(b, &c->content);
    text(b, ",\"refusal\":null");
    static const char *const name[] = {",\"reasoning_content\":", ",\"reasoning\":"};
    for (int i = 0; i < 2; i++) {
        text(b, name[i]);
        if (c->reasoning.len)
            quote(b, &c->reasoning);
        else
            text(b, "null");
    }
    text(b, ",\"tool_calls\":");
    if (c->n_call == 0) text(b, "null");
    for (int i = 0; i < c->n_call; i++) {
        text(b, i ? ",{" : "[{");
        write_name(&c->call[i], b);
        quote(b, &c->call[i].args);
        text(b, i == c->n_call - 1 ? "}}]" : "}}");
    }
    token_fields(c, b);
    text(b, "},\"logprobs\":");
    take_logprobs(c, b);
    if (j->p.include_draft_logprobs) text(b, ",\"draft_logprobs\":null");
    prompt_logprobs(c, b);
    (void)ern_buf_print(b, ",\"finish_reason\":\"%s\"}", c->finish);
}

static void write_text(choice *c, ern_buf *b) {
    const job *j = c->job;
    const prompt *q = &j->prompt[c->prompt];
    (void)ern_buf_print(b, "{\"index\":%d,\"text\":", c->index);
    if (j->echo) {
        ern_buf both;
        ern_buf_init(&both, 2 * (size_t)JOB_ANSWER_MAX_BYTES);
        (void)ern_buf_add(&both, q->text, q->text_len);
        if (c->content.len) (void)ern_buf_add(&both, c->content.data, c->content.len);
        if (both.full) b->full = true;
        quote(b, &both);
        ern_buf_free(&both);
    } else {
        quote(b, &c->content);
    }
    token_fields(c, b);
    text(b, ",\"logprobs\":");
    take_logprobs(c, b);
    if (j->p.include_draft_logprobs) text(b, ",\"draft_logprobs\":null");
    prompt_logprobs(c, b);
    (void)ern_buf_print(b, ",\"finish_reason\":\"%s\"}", c->finish);
}

void write_answer(job *j) {
    ern_buf *b = &j->chunk;
    ern_buf_clear(b);
    (void)ern_buf_add(b, j->head.data, j->head.len);
    for (int i = 0; i < j->n_choice; i++) {
        if (i) text(b, ",");
        if (j->kind == JOB_CHAT)
            write_message(&j->choice[i], b);
        else
            write_text(&j->choice[i], b);
    }
    text(b, "],\"usage\":");
    write_usage(j, b);
    text(b, "}");
    if (b->full) {
        (void)api_fail(&j->error, 500, "answer_too_large", NULL,
                       "the answer is larger than the %d MiB one answer may have; ask for fewer logprobs or tokens",
                       2 * (JOB_ANSWER_MAX_BYTES >> 20));
        routes_fail(j->http, &j->error);
        return;
    }
    http_reply(j->http, 200, "application/json", b->data, b->len);
}
