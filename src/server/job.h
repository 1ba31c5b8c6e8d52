/* The server's own structs, shared by the files of this room: a job is one API request, a choice one reply in it.
 *
 *   HTTP thread:   makes the job, puts it into server.front
 *   front thread:  request.c reads the body, builds prompts and choices, submits each choice to the engine
 *   events thread: reply.c turns events into text, write.c into JSON; the last END finishes and frees the job
 * job.lock is held by the front thread while it submits and by the events thread per event. on_gone only touches the
 * atomics, because it runs with the HTTP request locked. Lock order: job, then HTTP request. */
#ifndef ERN_SERVER_JOB_H
#define ERN_SERVER_JOB_H

#include <pthread.h>
#include <stdatomic.h>

#include "base/arena.h"
#include "base/ring.h"
#include "server/api_error.h"
#include "server/auth.h"
#include "server/fields.h"
#include "server/http.h"
#include "server/metrics.h"
#include "server/server.h"

enum {
    JOB_CHOICES_MAX = 256, /* n times prompts */
    JOB_PROMPTS_MAX = 128,
    JOB_ARENA_MAX_BYTES = 96 * 1024 * 1024,  /* prompts, lists, masks of one request */
    JOB_ANSWER_MAX_BYTES = 64 * 1024 * 1024, /* text and logprobs of one choice, a whole answer */
    JOB_CALLS_MAX = 128,
    JOB_PROMPT_LOGPROBS_MAX = 400000, /* prompt tokens times (top + 1) times choices */
    JOB_JSON_DEPTH = 64,
    FRONT_THREADS = 2,
    PIECE_MAX_BYTES = 256, /* far above any tokenizer's longest piece: a longer text cannot fit the context */
    STRICT_STOP_MAX = 16,
    STRICT_STOP_TOKENS_MAX = 64,
};

typedef struct tool_call_out {
    ern_buf name, args;
    char id[48];
} tool_call_out;

typedef struct job job;

typedef enum job_kind { JOB_CHAT, JOB_COMPLETION, JOB_TOKENIZE, JOB_DETOKENIZE } job_kind;

typedef struct choice {
    job *job;
    int index, prompt; /* in the answer; in job->prompt */
    ern_request request;
    atomic_uint_fast64_t id;         /* of the engine, 0 before submit */
    bool submitted, finished, ended; /* finished: the answer is complete; ended: END was taken */
    const char *finish;              /* finish_reason */
    ern_decode decode;
    ern_stop *stop;   /* NULL: no stop texts */
    ern_reply *reply; /* NULL: completions */
    ern_tokens ids;   /* what was generated, when return_token_ids asks */
    size_t n_ids_sent;
    int32_t tail[STRICT_STOP_TOKENS_MAX]; /* last ids, newest last, for token-sequence stops */
    int n_tail;
    int32_t n_waiting; /* its part of server.n_waiting_token, until the first event */
    int32_t n_output, n_reasoning, n_response, n_cached;
    atomic_int n_event;         /* events turned into bytes of the answer */
    int credit_base;            /* <= 0: what request.n_taken starts from, so that n choices share one credit */
    ern_buf content, reasoning; /* streams: since the last chunk; else the whole */
    ern_buf lp[4];              /* logprobs in JSON: chat uses [0]; completions tokens, values, tops, offsets */
    ern_buf prompt_lp;          /* prompt_logprobs in JSON */
    int32_t n_prompt_lp;
    int64_t n_char;          /* characters before the next token, for text_offset */
    int32_t n_since;         /* tokens since the last chunk */
    bool echo_sent, lagging; /* lagging: n_taken was held back because the client is slow */
    tool_call_out *call;     /* [JOB_CALLS_MAX] in the arena, when tools were given */
    int n_call;
    int64_t last_token_us;
} choice;

typedef struct prompt {
    const int32_t *id;
    int32_t n;
    const char *text; /* echo, return_token_ids; NULL otherwise */
    size_t text_len;
} prompt;

struct job {
    struct ern_server *server;
    ern_http_request *http;
    job *next, *prev; /* server->jobs */
    job_kind kind;
    char id[640];
    bool id_given;   /* the client chose it */
    bool id_claimed; /* under server->lock: nobody else alive may have it */
    bool settled;    /* job_settle was called */
    int64_t created_s, begin_us, deadline_us;
    bool has_caller;      /* keys are set, and caches are kept apart by them: */
    uint8_t caller[32];   /* the digest of this one's */
    atomic_bool gone;     /* the client left, or ... */
    atomic_bool stalled;  /* ... was given up because it took nothing */
    atomic_bool shutdown; /* the drain ran out */

    pthread_mutex_t lock; /* everything below, once submitted */
    ern_arena arena;
    params p;
    prompt *prompt;
    int n_prompt;
    choice *choice;
    atomic_int n_choice; /* published once every choice is filled */
    int n_live;          /* submitted, END not taken yet */
    int n_lp;            /* -1: no logprobs; else how many tops */
    bool echo, streaming, include_usage, strict_stop, decode_special;
    const int32_t *strict_seq[STRICT_STOP_MAX];
    int n_strict_seq[STRICT_STOP_MAX], n_strict;
    const char *model;   /* as the answer names it */
    ern_buf head;        /* JSON up to the choices of a chunk */
    ern_buf chunk;       /* scratch */
    ern_buf text, shown; /* scratch: decoded, past the stop filter */
    api_error error;
};

typedef enum server_state { SERVER_LOADING, SERVER_READY, SERVER_DRAINING } server_state;

struct ern_server {
    ern_server_options o;
    char *host, *model_path, *served_model_name;
    char **cors;
    auth_keys keys;
    http_server *http, *http_metrics;
    metrics metrics;
    atomic_int state; /* server_state */
    atomic_bool stop, hurry;
    atomic_int n_place;           /* requests admitted and not yet settled: at most max_concurrency */
    atomic_int n_active;          /* jobs alive */
    atomic_int n_front;           /* jobs whose request is not in the engine yet */
    atomic_llong n_waiting_token; /* prompt tokens handed to the engine of which nothing came back yet */
    atomic_uint_fast64_t n_seed;
    int64_t created_s; /* when it was opened: what /v1/models says */

    pthread_mutex_t lock; /* everything below */
    job *jobs;
    char loading[128];
    uint64_t load_done, load_all;
    char *unknown[256]; /* field names logged once */
    int n_unknown;

    ern_ring *front;
    pthread_t front_thread[FRONT_THREADS], events_thread;
    bool threads_on;
    ern_engine *engine;
    const ern_tokenizer *tokenizer;
    ern_chat_format format;
    const ern_config *config;
};

/* server.c */
const char *server_model_name(const ern_server *s);
void job_open(job *j, ern_server *s, ern_http_request *r, job_kind kind); /* j is zeroed */
void job_free(job *j);
/* Nothing of the job runs any more: give its place and its id back, before the answer's last byte goes out, so that a
 * client which has read the whole answer can come again at once. Again: no effect. */
void job_settle(job *j);
void job_close(job *j); /* answered or given up: let go of the HTTP request, leave the lists, free */
void server_unknown_field(void *ud, const char *name);
/* What a refusal because of load should say about coming back, once the model is loaded: the time that prompts waiting
 * now will take, by the measured speed of prompts, from a second to most of a minute, and spread by a fifth to either
 * side, because a crowd that is refused together should not come back together. A prompt that is being computed counts
 * as if it were all to do. */
int64_t server_retry_ms(const ern_server *s);
int64_t server_spread_ms(int64_t ms); /* the spreading alone */

/* routes.c */
void routes_on_headers(void *ud, ern_http_request *r);
void routes_on_request(void *ud, ern_http_request *r);
void routes_on_metrics_request(void *ud, ern_http_request *r);
void routes_on_done(void *ud, const ern_http_request *r, int status);
void routes_fail(ern_http_request *r, const api_error *e);

/* request.c: read the body and fill the job; false: job->error says why. */
ERN_MUST_CHECK bool request_build(job *j);
/* chat_prompt.c: messages and tools to tokens. */
ERN_MUST_CHECK bool chat_prompt(ern_server *s, const params *p, ern_arena *a, ern_tokens *out, api_error *e);
/* tokenize_api.c: a whole /tokenize or /detokenize. */
void tokenize_answer(job *j);

/* reply.c */
void reply_begin(job *j);                      /* admitted: headers and role chunks of a stream. Locked. */
bool reply_event(job *j, const ern_event *ev); /* true: the job is done. Locked. */
void reply_finish(job *j);                     /* the whole answer, or the end of the stream. Locked. */

/* write.c */
void write_head(job *j);
void write_role(job *j, choice *c);
void write_echo(job *j, choice *c);
void write_delta(job *j, choice *c);
void write_call(job *j, choice *c, int call, bool opens, const char *args, size_t n);
void write_last(job *j, choice *c);
void write_stream_end(job *j);
void write_answer(job *j);

/* logprobs.c: append one token's entry to the choice. */
void logprobs_add(choice *c, const ern_sampled *s, bool known);
void prompt_logprobs_add(choice *c, int32_t index, const ern_sampled *s);

#endif
