/* What a run of `ernest bench serve` comes to: the figures of benchmark_serving, for people, as JSON, and drawn.
 * Owner: the caller of each struct; no state. One thread. */
#ifndef ERN_CLI_BENCH_REPORT_H
#define ERN_CLI_BENCH_REPORT_H

#include "base/buf.h"
#include "cli/bench_load.h"
#include "cli/bench_stats.h"

/* ttft: request sent to first text. tpot: (e2el - ttft) / (tokens - 1), for replies of two tokens and more. itl:
 * between two chunks of text, over all requests. e2el: request sent to the end. All in ms. */
typedef enum bench_metric { BENCH_TTFT, BENCH_TPOT, BENCH_ITL, BENCH_E2EL } bench_metric;
enum { BENCH_METRICS = 4, BENCH_PERCENTILES_MAX = 8 };
extern const char *const bench_metric_name[BENCH_METRICS]; /* "ttft", ... */

/* What is told of a run, and which requests are good enough. */
typedef struct bench_wish {
    bool metric[BENCH_METRICS];
    double percentile[BENCH_PERCENTILES_MAX];
    int n_percentile;
    bool goodput;
    double most_ms[BENCH_METRICS]; /* 0: no bound; itl has none */
} bench_wish;

typedef struct bench_sum {
    int32_t n, completed, failed, n_good, peak;
    double duration_s, total_in, total_out;
    double requests_per_s, goodput_per_s, out_per_s, tokens_per_s;
    bench_summary ms[BENCH_METRICS];
    double percentile_ms[BENCH_METRICS][BENCH_PERCENTILES_MAX]; /* as the wish lists them */
    double p50_ms[BENCH_METRICS], p99_ms[BENCH_METRICS];        /* for tables and plots */
    char first_error[120];                                      /* "" when none failed */
} bench_sum;

/* Errors: ERN_ERR_MEMORY. */
ERN_MUST_CHECK ern_status bench_sum_make(bench_sum *out, const bench_run *run, const bench_wish *wish, ern_err *err);

/* "ttft,tpot" / "90,99" / {"ttft:500,tpot:50", ...} into the wish. Errors: ERN_ERR_USAGE naming the flag. */
ERN_MUST_CHECK ern_status bench_wish_read(bench_wish *w, const char *metrics, const char *percentiles,
                                          const char *const *goodput, int n_goodput, ern_err *err);

/* What the run was, for the JSON. */
typedef struct bench_about {
    char date[32]; /* YYYYMMDD-HHMMSS */
    const char *backend, *model, *url, *commit;
    double rate, burstiness;
    int32_t max_concurrency; /* 0: not given */
} bench_about;

/* One JSON object with the field names of benchmark_serving; run NULL: without the lists of each request. */
void bench_json(ern_buf *out, const bench_about *about, const bench_sum *sum, const bench_wish *wish,
                const bench_run *run);
/* The report for people. */
void bench_text(ern_buf *out, const bench_sum *sum, const bench_wish *wish);

/* One run of a sweep in a plot. */
typedef struct bench_point {
    double x;        /* output tokens per second */
    double y50, y99; /* ms */
    int32_t label;   /* concurrency */
} bench_point;
/* Latency against throughput as an SVG of two panels, TTFT and TPOT: median and 99th percentile over points in the
 * order of the sweep. Plain shapes and text; no script, no font file. */
void bench_svg(ern_buf *out, const char *title, const bench_point *ttft, const bench_point *tpot, int n);

#endif
