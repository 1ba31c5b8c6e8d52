/* Steps of a model on a backend, as the engine would ask for them; on the cpu one, timed beside the limits of the same
 * rounds.
 * Owner: the command. One thread drives; the backend's and the limits' threads take turns and never run at once. */
#ifndef ERN_CLI_BENCH_WORK_H
#define ERN_CLI_BENCH_WORK_H

#include "backend/backend.h"
#include "backend/bench.h"
#include "cli/bench_count.h"

typedef struct bench_steps bench_steps;

typedef struct bench_steps_options {
    const ern_model *model; /* borrowed */
    const ern_backend_ops *backend;
    int32_t n_thread, level;
    ern_kv_dtype kv_dtype;
    bool act_exact;
    int32_t n_row_max;     /* rows of a step of a prefill */
    int32_t n_seq_max;     /* largest batch */
    int32_t n_context_max; /* longest context of a batch, or prompt and reply of a job: the cache holds n_seq_max of
                              these */
    int32_t n_prompt_max;  /* longest prompt alone */
    int32_t n_round;       /* at most; fewer of what takes seconds */
    bool sampled;          /* replies are sampled by every rule that is common, penalties over the whole context */
    bool quick;
} bench_steps_options;

/* One measurement: the median round; of an even number the worse one of the middle. */
typedef struct bench_result {
    bool prefill;
    int32_t batch, context; /* prefill: 1 and the prompt's tokens */
    double seconds;         /* of one step of decode, of a whole prefill */
    double tokens_per_s, best_tokens_per_s;
    double bytes, operations; /* of that step or prefill */
    double experts;           /* distinct experts a step, summed over the layers */
    double kv_bytes;          /* part of bytes */
    double read, compute;     /* the limits of the median round; 0: not known here */
    ern_rate rate;
    bool has_rate;                                  /* this machine has it, and can measure it */
    bool by_read;                                   /* which binds */
    double fraction, least_fraction, best_fraction; /* median, worst and best round; 0 without limits */
} bench_result;

/* Errors: those of the backend's open; ERN_ERR_MEMORY. */
ERN_MUST_CHECK ern_status bench_steps_open(bench_steps **out, const bench_steps_options *o, ern_err *err);
void bench_steps_close(bench_steps *b);        /* NULL is fine */
int bench_steps_threads(const bench_steps *b); /* 0: another backend than cpu, whose limits are not looked at */
/* `batch` sequences that each have `context` tokens in the cache: rounds of steps of one token each, two in flight as
 * the engine keeps them. Errors: the backend's. */
ERN_MUST_CHECK ern_status bench_decode(bench_steps *b, int32_t batch, int32_t context, bench_result *out, ern_err *err);
/* A sequence with `context` tokens in the cache, held round by round against itself with base_context: what a machine
 * does differently a minute later is no part of it. n_busy > 0: that many processors are taken meanwhile (bench_spin),
 * and share is the rate over the base's, which has the machine to itself; 0: share is the KV bytes that the longer
 * context adds, over the time that it adds and the read limit of the round, or INFINITY (bench_share_added). out and
 * share: the median round by share. Errors: the backend's, and bench_spin's. */
ERN_MUST_CHECK ern_status bench_decode_against(bench_steps *b, int32_t context, int32_t base_context, int n_busy,
                                               bench_result *out, double *share, ern_err *err);
/* A prompt of n tokens, in steps of at most n_row_max rows; the last row is sampled. Where limits are looked at it is
 * repeated until a round has two seconds (a quick one a few milliseconds). */
ERN_MUST_CHECK ern_status bench_prefill(bench_steps *b, int32_t n, bench_result *out, ern_err *err);

/* What a server does for n_seq requests that come at once, without the server: each prompt of n_in tokens (at most
 * n_row_max) in a step of its own, then n_out - 1 steps of all sequences. */
ERN_MUST_CHECK ern_status bench_job(bench_steps *b, int32_t n_seq, int32_t n_in, int32_t n_out, double *seconds,
                                    ern_err *err);

/* n processes that spin, each tied to one processor, the last allowed one first; they end with this process. */
typedef struct bench_spinners {
    int pid[64], n;
} bench_spinners;
ERN_MUST_CHECK ern_status bench_spin(bench_spinners *s, int n, ern_err *err);
void bench_spin_end(bench_spinners *s);

#endif
