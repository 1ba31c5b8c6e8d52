/* Counters and histograms of /metrics, under FastDeploy's names. One mutex: touched a few times per token at most.
 * Owner: the server. Any thread. */
#ifndef ERN_SERVER_METRICS_H
#define ERN_SERVER_METRICS_H

#include <pthread.h>
#include <stdint.h>

#include "base/buf.h"
#include "engine/engine.h"

typedef enum metric_hist {
    HIST_TTFT,
    HIST_TPOT,
    HIST_INFERENCE,
    HIST_QUEUE,
    HIST_PREFILL,
    HIST_DECODE,
    HIST_E2E,
    HIST_PROMPT_TOKENS,
    HIST_OUTPUT_TOKENS,
    HIST_MAX_TOKENS,
    HIST_COUNT
} metric_hist;

enum { METRICS_BUCKETS_MAX = 24, METRICS_HTTP_MAX = 256 };

typedef struct metrics_hist {
    uint64_t bucket[METRICS_BUCKETS_MAX], count;
    double sum;
} metrics_hist;

typedef struct metrics_http {
    char method[8];
    const char *path; /* static: a route */
    int status;
    uint64_t count;
} metrics_http;

enum { METRICS_ROUTES_MAX = 32 };

typedef struct metrics {
    pthread_mutex_t lock;
    metrics_hist hist[HIST_COUNT];
    metrics_http http[METRICS_HTTP_MAX];
    int n_http;
    struct {
        const char *path;
        char method[8];
        metrics_hist hist;
    } route[METRICS_ROUTES_MAX];
    int n_route;
    uint64_t n_request, n_success, n_prompt_token, n_output_token, n_aborted, n_preempted;
    uint64_t n_started, n_started_token; /* requests that ran, and their prompt tokens: what hits are measured by */
    uint64_t n_hit, n_cached_token, n_cached_host, n_cached_disk;
    double first_token_s, infer_s; /* last seen */
} metrics;

void metrics_open(metrics *m);
void metrics_close(metrics *m);
void metrics_observe(metrics *m, metric_hist h, double v);
/* A request was taken in, and ended (with its END event; ok: not an error and not cut off). */
void metrics_arrived(metrics *m, int32_t max_tokens);
void metrics_ended(metrics *m, const ern_event *end, bool ok);
void metrics_http_done(metrics *m, const char *method, const char *path, int status, double seconds);
/* Parts, 0 to 1: of requests that found something in the prefix cache, of prompt tokens that were found, in all and by
 * tier. Of all that ran since the start. */
typedef struct metrics_hits {
    double request, token, pool, host, disk;
} metrics_hits;
void metrics_hit_rates(metrics *m, metrics_hits *out);
/* Prometheus text. engine NULL: not loaded yet. n_front: requests taken in that the engine does not have yet. */
void metrics_write(metrics *m, ern_engine *engine, int n_front, ern_buf *out);

#endif
