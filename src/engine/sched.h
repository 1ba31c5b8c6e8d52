/* The scheduler: which sequences run in the next step, how many rows of each, and on which pages.
 *
 * A function over plain data: no clock, no threads, no backend; the same state gives the same plan. The rules are
 * FastDeploy's V1 (fastdeploy.md 4.3):
 *   1. running decodes (one row left) have their rows set aside from the budget of max_rows;
 *   2. the running are served in order: a decode its row, a partial prefill a chunk of what is left of the budget;
 *   3. pages come on demand; a decode with few cells left takes two at once while there are two. When the rows of this
 *      step have no page, the last of the running is preempted (all its pages given back, computed = 0, back to the
 *      queue) until they have, or until the needy one was the last itself; parked sequences go first, they lose no
 * time;
 *   4. after a preemption nothing is admitted in that step, and for a while admission leaves head-room;
 *   5. else the waiting are admitted in order until the first that does not fit. What the cache has of their tokens is
 *      not computed again; what it has below the pool is loaded first, and the sequence runs when that has arrived.
 * With reserve_all (FastDeploy's V0) a sequence is admitted only when the pool can hold all it may come to beside all
 * that the running may come to: nothing is preempted then.
 *
 * Order, everywhere: (priority, id). Ids grow, so equals are first come, first served; a preempted sequence is older
 * than all that never ran and is therefore at the front again; and the first of the running is never preempted for
 * another, so it ends, and then the next: no livelock.
 *
 * Steps in flight: n_computed counts rows handed to the backend, done or not. Pages dropped while a step that uses them
 * runs may be handed out at once: the backend runs steps in order, so the next holder's rows come after.
 *
 * Owner: the core. Thread: the engine thread. */
#ifndef ERN_ENGINE_SCHED_H
#define ERN_ENGINE_SCHED_H

#include "engine/cache.h"

typedef enum sched_where {
    SCHED_OUT,     /* not known to the scheduler */
    SCHED_WAITING, /* in the queue: new, or preempted (then it has a slot) */
    SCHED_RUNNING, /* holds pages and a seat; perhaps still loading */
    SCHED_LEAVING, /* ended; holds its slot until no step in flight names it */
} sched_where;

/* One sequence, as far as scheduling goes. Written by the core: all but where, slot, loading, path, n_preempted. */
typedef struct sched_seq {
    uint64_t id;
    int32_t priority; /* lower runs first */
    sched_where where;
    int32_t n_prompt;
    int32_t n_token;      /* known tokens, prompt and output */
    int32_t n_pending;    /* tokens being sampled by the step in flight: 0 or 1 */
    int32_t n_computed;   /* rows handed to the backend: positions 0 .. n_computed-1 are in its pages */
    int32_t n_len_max;    /* most tokens it can come to; the last one is never computed */
    int32_t n_asked;      /* prompt tokens whose logprobs were asked for, n_prompt when none are (any more) */
    int32_t credit;       /* events it may cause before its reader must catch up */
    bool parked;          /* its reader is too far behind: do not run it */
    const int32_t *token; /* [n_token] what it knows; borrowed, the core moves it to the slot's buffer when it starts */
    int32_t n_keep;       /* tokens whose blocks may be kept for others: the prompt's, or all */
    int32_t slot;         /* index of its token buffer and page table; -1 until it first runs */
    bool loading;         /* blocks of its path have not arrived: it cannot run yet */
    cache_path path;      /* its pages */
    int32_t blocked;      /* room that did not do for it when it was tried last; INT32_MIN: not tried */
    int32_t n_preempted;
} sched_seq;

typedef struct sched_rules {
    int32_t max_seqs;     /* seats */
    int32_t max_rows;     /* rows of a step */
    int32_t max_wants;    /* wanted rows of a step */
    int32_t chunk_tokens; /* most rows of one sequence in a step; 0: max_rows */
    int32_t page_cells;   /* P */
    int32_t max_len;      /* longest sequence */
    int32_t spare_slots;  /* slots beyond the seats, for the preempted: above all those whose readers are slow */
    bool chunked;         /* false: a sequence's missing rows go in one step or not at all */
    bool reserve_all;     /* see above */
    int32_t prompt_pages; /* reserve_all: pages that the running's prompts may take together */
    int32_t max_partial;  /* running sequences that still lack more than this step's rows; 0: no bound */
    int32_t max_long;     /* of them, those that lack more than long_tokens; 0: no bound. Shorter ones pass them */
    int32_t long_tokens;
} sched_rules;

typedef struct sched {
    sched_rules rules;
    cache cache;
    int32_t n_seq, n_slot;
    sched_seq *seq;                  /* [n_seq] */
    int32_t *running, n_running;     /* [max_seqs] indices into seq, in order */
    int32_t *waiting, n_waiting;     /* [n_seq] the same */
    int32_t n_resumable;             /* the waiting that hold a slot */
    int32_t *slot_free, n_slot_free; /* [n_slot] a stack */
    page_hold *table;                /* [n_slot, table_pages] */
    int32_t *table_node;             /* [n_slot, table_pages] */
    int32_t table_pages;
    int32_t reserve_milli; /* head-room per running sequence, thousandths of a page */
} sched;

/* Rows pos .. pos+n_row-1 of one sequence. Wanted: first the rows that report prompt tokens report0 ..
 * report0+n_report-1 (row i reports token i+1), then, when samples, the last row. */
typedef struct sched_item {
    int32_t seq, pos, n_row, report0, n_report;
    bool samples;
} sched_item;

typedef struct sched_plan {
    sched_item *item; /* [max_seqs] */
    int32_t n_item, n_row, n_want, n_preempted;
    bool waits; /* the last of the running waits for a page that a transfer reads; nobody is admitted before it */
} sched_plan;

/* What one step may hold beside the rules. */
typedef struct sched_budget {
    int32_t n_want;       /* wanted rows: room for their events */
    int32_t n_prompt_row; /* rows of prompts while replies are running, so that these do not wait long */
} sched_budget;

/* Take the tables for n_seq sequences known at once. */
void sched_open(sched *s, layout *l, const sched_rules *rules, int32_t n_seq, const cache_options *kv);
/* Put seq[i], filled in (path.salt too) and SCHED_OUT, into the queue. */
void sched_add(sched *s, int32_t i);
/* Plan a step; moves sequences, pages and n_computed, n_asked, n_pending accordingly. An empty plan means that nothing
 * can run. */
void sched_make(sched *s, const sched_budget *budget, sched_plan *out);
/* The rows of seq[i] before position n_done were computed: keep its full blocks. sound: one of them was wanted, and its
 * logits were numbers. */
void sched_done(sched *s, int32_t i, int32_t n_done, bool sound);
/* seq[i] is over: out of its list, pages dropped, SCHED_LEAVING. */
void sched_leave(sched *s, int32_t i);
/* Forget a leaving seq[i]: slot back, SCHED_OUT. */
void sched_forget(sched *s, int32_t i);
/* Walk everything; false with *why when an invariant is broken. */
bool sched_check(sched *s, const char **why);

#endif
