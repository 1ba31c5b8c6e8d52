/* The engine without its threads: requests in, steps through the backend, events out.
 *
 * core_turn plans one step, submits it, and collects the oldest step in flight; with overlap, step n+1 is submitted
 * before the result of n is read, its rows naming the tokens of n by ERN_PREV. What follows from that:
 *   - a stop is learnt one step late: the row already submitted for the next token is computed and its result dropped;
 *     its cell lies in a page that later steps may hand out, which is harmless because the backend keeps their order;
 *   - a sequence that reaches max_tokens is known beforehand and gets no such row;
 *   - a request that ended keeps its END, its slot and its borrowed arrays until no step in flight names it, since the
 *     backend may still read them.
 * Hides: sequences, token buffers, the batch's arrays, steps in flight. The clock and the way events leave are given,
 * so that the simulator runs it alone, deterministically; engine.c puts a thread around it. Owner: engine.c or a test.
 * Thread: one. Memory: all taken at open; no malloc afterwards. */
#ifndef ERN_ENGINE_CORE_H
#define ERN_ENGINE_CORE_H

#include "engine/engine.h"
#include "engine/layout.h"
#include "engine/sched.h"

/* Hand n events to whoever listens. Must not fail: core_turn is told how many token events there is room for, and there
 * is always room for one END per request. */
typedef void core_emit_fn(void *ud, const ern_event *event, int32_t n);

typedef struct core_options {
    const ern_engine_options *engine; /* borrowed until close; backend_options filled in by the plan */
    int32_t n_seq;                    /* requests known at once; their index is the caller's */
    int32_t n_page, n_host_page;
    const transfer_ops *move; /* NULL: neither host nor disk tier */
    void *move_ud;
    int32_t n_spare_slot; /* token buffers beyond max_num_seqs, for sequences that ran and wait */
    int32_t n_vocab;
    core_emit_fn *emit;
    void *ud;
    int64_t (*now_us)(void);
} core_options;

/* One request. Its scheduling state is sched.seq[same index]. */
typedef struct core_seq {
    ern_request *request;  /* NULL: this index is free */
    int32_t n_flight;      /* steps in flight that name it */
    int32_t n_flight_want; /* events those will cause */
    int32_t n_emitted;     /* TOKEN and PROMPT events */
    int32_t n_output;
    int32_t prev_want;          /* where the last submit samples its pending token */
    ern_end end;                /* while leaving */
    int32_t n_from[TREE_FROMS]; /* prompt tokens found cached when it first ran, by where */
    int64_t queued_us, started_us, first_us;
} core_seq;

typedef struct core_step {
    sched_plan plan;
    int32_t n_decode; /* rows of its items of one row */
} core_step;

/* What steps have cost lately: base + each prompt row. Seen, never promised. */
typedef struct core_pace {
    double base_us;   /* a step that has replies alone; 0: none seen */
    double prompt_us; /* more for each prompt row; 0: none seen */
    int32_t n_mixed;  /* steps of replies and prompts since one had replies alone */
} core_pace;

typedef struct core {
    core_options o;
    ern_backend *backend; /* the caller's: core_connect */
    sched sched;
    core_seq *seq;     /* [n_seq] */
    int32_t *token;    /* [n_slot, max_model_len] prompt and output of whoever has the slot */
    int32_t *ban;      /* [n_slot, ERN_BAN_MAX + ERN_STOP_MAX] bans and stop ids, while a reply is too short */
    core_step step[2]; /* in flight: step[first_step], then the other */
    int32_t n_flight, first_step;
    int32_t n_flight_want;
    ern_batch batch; /* its arrays, sized for the largest step */
    int32_t *row_token, *row_next, *row_pos, *row_cell, *row0, *kv_len, *page, *want;
    ern_sample *sample;
    ern_event *event; /* events on their way out */
    int32_t n_event;
    core_pace pace;
    int64_t next_deadline_us; /* not after the first deadline in the queue; INT64_MAX: none */
    uint64_t n_started;       /* requests that left the queue, by running or by ending */
    int64_t n_started_prompt; /* their prompt tokens */
    uint64_t n_started_bytes; /* what they lent, by core_request_bytes */
    ern_engine_stats stats;
    char error[480];
} core;

/* Bytes that core_open will take. */
uint64_t core_bytes(const core_options *o);
ERN_MUST_CHECK ern_status core_open(core *c, const core_options *o, ern_arena *arena, ern_err *err);
/* What the first turn needs and core_open need not know: the backend, and what transfers are called with. */
void core_connect(core *c, ern_backend *backend, void *move_ud);
/* Bytes that a waiting request keeps. */
uint64_t core_request_bytes(const ern_request *r);
/* Take request r under index i (free, 0 <= i < n_seq); r->id is set and larger than all before. */
void core_add(core *c, int32_t i, ern_request *r, int64_t queued_us);
/* End request i early if it is still there and is this id. */
void core_cancel(core *c, int32_t i, uint64_t id);
/* One turn: at most one submit and one wait. event_room: TOKEN and PROMPT events that may leave from now on. False:
 * there was nothing to do, and there will not be until something from outside changes. */
bool core_turn(core *c, int32_t event_room);
/* True while a request is inside. */
bool core_is_busy(const core *c);
/* Prompt rows that a step may have while replies run, by the pace and the targets; INT32_MAX without one. */
int32_t core_prompt_rows(const core *c);
/* End everything with CANCELLED; the steps in flight are collected by the next turns. */
void core_cancel_all(core *c);
/* Walk the pool, the scheduler and the steps in flight; aborts when an invariant is broken. */
void core_check(core *c);

#if defined(ERN_CHECKS)
/* True while this thread may not allocate: test programs replace malloc by one that looks here. */
extern _Thread_local bool core_sealed;
#define CORE_SEAL(on) (core_sealed = (on))
#else
#define CORE_SEAL(on) ((void)0)
#endif

#endif
