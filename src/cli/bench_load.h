/* Load on a server: many streamed requests at once from one thread, each chunk's time kept. libcurl's multi interface
 * underneath; no proxy is ever asked. Owner: the command. One thread. */
#ifndef ERN_CLI_BENCH_LOAD_H
#define ERN_CLI_BENCH_LOAD_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/status.h"

enum { BENCH_IN_FLIGHT_MAX = 1024 };

/* What became of one request. Seconds; begin_s since the run began, the others since begin_s. */
typedef struct bench_record {
    bool begun, good;
    double begin_s, ttft_s, e2el_s;
    double *itl_s; /* [n_itl] between one chunk of text and the next; owned */
    int32_t n_itl, cap_itl;
    int32_t n_in, n_out; /* tokens, by the server's usage */
    char error[120];
} bench_record;

typedef void bench_body_fn(void *ud, int64_t i, ern_buf *out);

typedef struct bench_load_options {
    const char *url; /* whole */
    const char *key; /* NULL: none */
    int64_t first;   /* number of the first request, for body */
    int32_t n;
    double rate, burstiness; /* rate infinite: all at once */
    uint64_t seed;
    int32_t in_flight_max; /* 1..BENCH_IN_FLIGHT_MAX */
    double time_limit_s;
    bench_body_fn *body;
    void *ud;
    volatile sig_atomic_t *stop;                         /* ends the run early; what is unfinished has failed */
    void (*progress)(void *ud, int32_t done, int32_t n); /* may be NULL; about once a second and at the end */
} bench_load_options;

typedef struct bench_run {
    bench_record *record; /* [n]; owned */
    int32_t n, peak;      /* peak: most requests in flight */
    double duration_s;    /* from the first request's start to the last one's end */
} bench_run;

/* Run all requests. Errors: ERN_ERR_MEMORY; ERN_ERR_NET when no request at all could connect. A request's own failure
 * is data in its record. bench_run_free is due also after a failure. */
ERN_MUST_CHECK ern_status bench_load(const bench_load_options *o, bench_run *out, ern_err *err);
void bench_run_free(bench_run *r);

#endif
