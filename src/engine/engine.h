/* The door of `engine`: who runs when, and where its KV lives.
 *
 * One engine thread owns the scheduler, the KV page pool and the backend handle. It takes ern_request from a bounded
 * inbox, builds an ern_batch per step, and sends ern_event to a bounded outbox. It prepares step n+1 while n runs.
 * Hides: loop, scheduler, page pool, preemption. Never sees a byte of text. Owner: the cli opens and closes it; the
 * server submits, cancels and drains events from any thread. */
#ifndef ERN_ENGINE_ENGINE_H
#define ERN_ENGINE_ENGINE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "backend/backend.h"

typedef struct ern_engine ern_engine;

enum {
    ERN_SEQS_MAX = 256,     /* most sequences at once (FastDeploy's limit) */
    ERN_EVENT_CREDIT = 256, /* tokens a request may be ahead of its reader before it is parked */
};

/* One sequence to generate: one choice of one prompt. Everything is borrowed by the engine from a successful submit
 * until its ERN_EVENT_END has been taken from the outbox; the server allocates and frees. Tokens were checked against
 * the vocabulary by the server and are checked again at submit. */
typedef struct ern_request {
    uint64_t id;           /* set by submit: never 0, never reused */
    void *ud;              /* the server's own */
    const int32_t *prompt; /* [n_prompt], n_prompt >= 1 */
    int32_t n_prompt;
    int32_t max_tokens;  /* 1 .. max_model_len - n_prompt */
    int32_t min_tokens;  /* stop ids are banned before this many */
    ern_sample sample;   /* temperature .. mode; the engine fills position, seen, n_seen, n_prompt, forced, and adds
                            stop ids to ban. ban must not hold more than ERN_BAN_MAX ids */
    const int32_t *stop; /* [n_stop] ids that end the reply; empty with ignore_eos */
    int32_t n_stop;
    int32_t n_prompt_top; /* -1: no prompt_logprobs; k: one ERN_EVENT_PROMPT per prompt token, top k each */
    bool echo_only;       /* report the prompt's logprobs and end (completions with echo and max_tokens 0) */
    int32_t priority;     /* lower runs first; equal: first come */
    uint8_t salt[16];    /* who may share its cached KV: only requests of the same salt do. The server's hash of the API
                            key and cache_salt; all zero where neither is given */
    int64_t deadline_us; /* ern_now_us() time after which queued work is dropped; 0: none */
    atomic_int n_taken;  /* the server adds one for each TOKEN or PROMPT event that has left for the client */
} ern_request;

enum { ERN_BAN_MAX = 1024, ERN_STOP_MAX = 64 };

typedef enum ern_event_kind { ERN_EVENT_PROMPT, ERN_EVENT_TOKEN, ERN_EVENT_END } ern_event_kind;

typedef enum ern_end {
    ERN_END_STOP,      /* a stop id was sampled (its TOKEN event came before) */
    ERN_END_LENGTH,    /* max_tokens reached */
    ERN_END_CANCELLED, /* ern_engine_cancel */
    ERN_END_DEADLINE,  /* still queued at its deadline */
    ERN_END_NUMERICAL, /* logits were NaN or infinite */
    ERN_END_ERROR,     /* the backend failed; see ern_engine_error */
} ern_end;

typedef struct ern_event {
    uint64_t id;
    ern_request *request; /* valid while no END was taken for it */
    ern_event_kind kind;
    ern_end end;         /* END only */
    int32_t index;       /* TOKEN: 0-based output index; PROMPT: prompt index (0 has no logprob) */
    bool is_stop;        /* TOKEN: this id is in request->stop */
    ern_sampled sampled; /* TOKEN, PROMPT */
    /* END: what happened, for usage and metrics */
    int32_t n_prompt, n_output, n_preempted;
    int32_t n_cached;                     /* prompt tokens found in the prefix cache when it first ran, all tiers */
    int32_t n_cached_host, n_cached_disk; /* of them, from host memory and from disk */
    int64_t queued_us, started_us, first_us,
        end_us; /* ern_now_us(): submit, first scheduled, first token, end; 0: never */
} ern_event;

typedef struct ern_engine_options {
    const ern_backend_ops *backend;
    const ern_model *model;
    ern_backend_options backend_options; /* n_page 0: as many as memory_bytes allow */
    int32_t max_model_len;               /* >= 16 */
    int32_t max_num_seqs;                /* 1..256 */
    int32_t max_batched_tokens;          /* the step's budget, >= max_num_seqs */
    bool chunked_prefill;                /* false: a prompt is computed in one step and must fit the budget */
    int32_t chunk_tokens;                /* most tokens of one prompt per step; 0: the budget. Tests use it */
    uint64_t memory_bytes;               /* for weights' copies, KV and scratch together; 0: from the machine */
    int32_t queue_max;                   /* most requests waiting (4096) */
    int64_t queue_prompt_max;            /* most prompt tokens waiting; 0: no bound */
    bool overlap;                        /* prepare step n+1 while n runs (true except in tests) */

    /* prefix cache, docs/kv.md */
    bool prefix_cache;       /* keep full blocks of prompts for later requests with the same beginning */
    bool cache_output;       /* and those of replies */
    uint64_t swap_bytes;     /* host memory for blocks that left the pool; 0: no host tier */
    const char *store_dir;   /* folder for blocks on disk; NULL: no disk tier. Borrowed until close */
    uint64_t store_bytes;    /* most bytes of files below store_dir */
    uint8_t fingerprint[16]; /* of weights, number formats and program: blocks of another are never read */

    /* who runs */
    bool reserve_all;           /* admit a request only when the pool can hold all it may come to (FastDeploy's V0) */
    double prompt_share;        /* reserve_all: part of the pool that prompts may take, above 0 to 1 (kv-cache-ratio) */
    int32_t max_partial;        /* prompts computed in parts at once; 0: no bound */
    int32_t max_long_partial;   /* of them, long ones; 0: no bound */
    int32_t long_prompt_tokens; /* a prompt that lacks more is long; 0: none is */
    int64_t itl_target_us; /* chunks shrink so that steps with running replies take at most so long; 0: no target */
    double itl_times;      /* and so many times what a step takes that has the replies alone; 0: no target */
    int64_t queue_wait_us; /* refuse when the wait would be longer; 0: no bound */
    uint64_t queue_bytes;  /* most bytes of waiting prompts and sampling tables; 0: no bound */
} ern_engine_options;

typedef struct ern_engine_plan {
    ern_backend_plan backend;
    int32_t n_page;                                                  /* pages of KV */
    int32_t n_host_page;                                             /* of the host tier */
    uint64_t kv_bytes, host_bytes, total_bytes, mapped_weight_bytes; /* total holds kv and host */
    int64_t kv_tokens;                                               /* n_page * P */
    double full_concurrency;                                         /* kv_tokens / max_model_len */
} ern_engine_plan;

/* What would be taken. Errors: ERN_ERR_MEMORY when the pool cannot hold one request of max_model_len, naming the
 * max_model_len that would fit; ERN_ERR_USAGE for options that contradict each other, naming the flag. */
ERN_MUST_CHECK ern_status ern_engine_plan_make(ern_engine_plan *out, const ern_engine_options *o, ern_err *err);
/* Open the backend and start the engine thread. */
ERN_MUST_CHECK ern_status ern_engine_open(ern_engine **out, const ern_engine_options *o, ern_err *err);
/* Stop at the next step: every request still inside gets its END (CANCELLED). Returns when nothing runs any more; what
 * is in the outbox can still be taken, then ern_engine_next is false at once. Submits are refused. */
void ern_engine_stop(ern_engine *e);
/* Stop, wait until no thread is inside ern_engine_next, and free everything. The consumer should have seen the last
 * event (stop first, drain, then close); what nobody took is dropped. NULL is fine. */
void ern_engine_close(ern_engine *e);

/* Hand a request over. Errors: ERN_ERR_LIMIT (queue full: answer 429), ERN_ERR_CANCELLED (stopping), ERN_ERR_INPUT (a
 * value out of range: our validator's gap, answer 400), ERN_ERR_DEVICE (the backend has failed). On failure nothing is
 * borrowed. Any thread. */
ERN_MUST_CHECK ern_status ern_engine_submit(ern_engine *e, ern_request *r, ern_err *err);
/* Ask for an early END within one step; unknown or ended ids are ignored. Any thread. */
void ern_engine_cancel(ern_engine *e, uint64_t id);
/* Tell the engine that n_taken of a parked request moved. Any thread. */
void ern_engine_poke(ern_engine *e);
/* Next event in order; false on time-out or when the engine is closed and drained. One consumer thread. */
bool ern_engine_next(ern_engine *e, ern_event *out, int64_t timeout_us);

/* One tier below the pool. */
typedef struct ern_tier_stats {
    int32_t n_block, n_block_max; /* held, and the most it can hold; max 0: there is no such tier */
    uint64_t n_out, n_in;         /* blocks moved down into it, and up out of it */
    uint64_t n_evicted, n_error;  /* blocks given up for room; reads and writes that failed */
    uint64_t n_cached_token;      /* prompt tokens that were found here */
    bool off;                     /* disk: switched off after errors, for a minute */
} ern_tier_stats;

/* A snapshot for /metrics and health; counters grow from 0 at open. Any thread. */
typedef struct ern_engine_stats {
    int32_t n_running, n_waiting, n_parked;
    int32_t n_page, n_page_free; /* free: hold nothing */
    int32_t n_page_cached;       /* hold blocks that no running request uses: handed out when no page is free */
    int32_t n_preempted_waiting; /* of the waiting, those that ran before */
    int32_t n_loading;           /* requests that wait for blocks from host or disk */
    ern_tier_stats host, disk;
    uint64_t n_block_cached, n_block_evicted; /* blocks that entered the prefix tree, and that it gave up */
    uint64_t n_step, n_prompt_token, n_output_token, n_preempted, n_finished, n_cancelled;
    uint64_t n_cached_token;      /* prompt tokens found in the prefix cache, all tiers */
    int64_t prefill_ns_per_token; /* measured lately, of a prompt that is computed; 0: not yet */
    int64_t step_since_us;        /* ern_now_us() since when the backend is at its present step; 0: it has none */
    int64_t step_most_us;         /* its longest step so far */
    bool busy;                    /* work is in flight or waiting */
    bool failed;                  /* the backend failed; nothing more will run */
} ern_engine_stats;
void ern_engine_stats_read(ern_engine *e, ern_engine_stats *out);
/* True when a step takes so long that something must be wrong: two minutes, or ten times the longest one that ended. */
bool ern_engine_is_stalled(const ern_engine_stats *s, int64_t now_us);
/* The backend's failure, when stats.failed. Static for e's life. */
const char *ern_engine_error(ern_engine *e);
/* The options and plan in force. */
const ern_engine_options *ern_engine_options_of(const ern_engine *e);
const ern_engine_plan *ern_engine_plan_of(const ern_engine *e);

#endif
