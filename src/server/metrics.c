/* Prometheus text. See metrics.h. Buckets: FastDeploy's. */
#include "server/metrics.h"

#include <stdio.h>
#include <string.h>

#include "base/jsonw.h"

static const double ttft[] = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1};
static const double tpot[] = {.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1};
static const double latency[] = {.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
static const double tokens[] = {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000};
static const double http_s[] = {.01, .025, .05, .1, .25, .5, .75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60};

typedef struct hist_def {
    const char *name, *help;
    const double *le;
    int n;
} hist_def;

#define BUCKETS(a) (a), (int)(sizeof(a) / sizeof(a)[0])
static const hist_def def[HIST_COUNT] = {
    [HIST_TTFT] = {"fastdeploy:time_to_first_token_seconds", "Seconds from arrival to the first token", BUCKETS(ttft)},
    [HIST_TPOT] = {"fastdeploy:time_per_output_token_seconds", "Seconds between output tokens", BUCKETS(tpot)},
    [HIST_INFERENCE] = {"fastdeploy:request_inference_time_seconds", "Seconds in the running state", BUCKETS(latency)},
    [HIST_QUEUE] = {"fastdeploy:request_queue_time_seconds", "Seconds waiting to be scheduled", BUCKETS(latency)},
    [HIST_PREFILL] = {"fastdeploy:request_prefill_time_seconds", "Seconds from scheduling to the first token",
                      BUCKETS(latency)},
    [HIST_DECODE] = {"fastdeploy:request_decode_time_seconds", "Seconds from the first token to the last",
                     BUCKETS(latency)},
    [HIST_E2E] = {"fastdeploy:e2e_request_latency_seconds", "Seconds from arrival to the end", BUCKETS(latency)},
    [HIST_PROMPT_TOKENS] = {"fastdeploy:request_prompt_tokens", "Prompt tokens of a request", BUCKETS(tokens)},
    [HIST_OUTPUT_TOKENS] = {"fastdeploy:request_generation_tokens", "Generated tokens of a request", BUCKETS(tokens)},
    [HIST_MAX_TOKENS] = {"fastdeploy:request_params_max_tokens", "max_tokens of a request", BUCKETS(tokens)},
};
static const hist_def http_def = {"http_request_duration_seconds", "Seconds to answer an HTTP request",
                                  BUCKETS(http_s)};

void metrics_open(metrics *m) {
    *m = (metrics){0};
    pthread_mutex_init(&m->lock, NULL);
}

void metrics_close(metrics *m) { pthread_mutex_destroy(&m->lock); }

/* Buckets hold their own count only; they are summed when written. */
static void observe(metrics_hist *h, const hist_def *d, double v) {
    int i = 0;
    while (i < d->n && v > d->le[i]) i++;
    h->bucket[i]++;
    h->count++;
    h->sum += v;
}

void metrics_observe(metrics *m, metric_hist h, double v) {
    pthread_mutex_lock(&m->lock);
    observe(&m->hist[h], &def[h], v);
    if (h == HIST_TTFT) m->first_token_s = v;
    pthread_mutex_unlock(&m->lock);
}

void metrics_arrived(metrics *m, int32_t max_tokens) {
    pthread_mutex_lock(&m->lock);
    m->n_request++;
    observe(&m->hist[HIST_MAX_TOKENS], &def[HIST_MAX_TOKENS], max_tokens);
    pthread_mutex_unlock(&m->lock);
}

static double seconds(int64_t from_us, int64_t to_us) { return to_us > from_us ? (double)(to_us - from_us) / 1e6 : 0; }

void metrics_ended(metrics *m, const ern_event *end, bool ok) {
    pthread_mutex_lock(&m->lock);
    m->n_success += ok;
    m->n_aborted += !ok;
    m->n_prompt_token += (uint64_t)end->n_prompt;
    m->n_output_token += (uint64_t)end->n_output;
    if (end->started_us) {
        m->n_started++;
        m->n_started_token += (uint64_t)end->n_prompt;
        m->n_hit += end->n_cached > 0;
        m->n_cached_token += (uint64_t)end->n_cached;
        m->n_cached_host += (uint64_t)end->n_cached_host;
        m->n_cached_disk += (uint64_t)end->n_cached_disk;
    }
    m->n_preempted += (uint64_t)end->n_preempted;
    observe(&m->hist[HIST_PROMPT_TOKENS], &def[HIST_PROMPT_TOKENS], end->n_prompt);
    observe(&m->hist[HIST_OUTPUT_TOKENS], &def[HIST_OUTPUT_TOKENS], end->n_output);
    observe(&m->hist[HIST_E2E], &def[HIST_E2E], seconds(end->queued_us, end->end_us));
    if (end->started_us) {
        observe(&m->hist[HIST_QUEUE], &def[HIST_QUEUE], seconds(end->queued_us, end->started_us));
        m->infer_s = seconds(end->started_us, end->end_us);
        observe(&m->hist[HIST_INFERENCE], &def[HIST_INFERENCE], m->infer_s);
    }
    if (end->started_us && end->first_us) {
        observe(&m->hist[HIST_PREFILL], &def[HIST_PREFILL], seconds(end->started_us, end->first_us));
        observe(&m->hist[HIST_DECODE], &def[HIST_DECODE], seconds(end->first_us, end->end_us));
    }
    pthread_mutex_unlock(&m->lock);
}

void metrics_http_done(metrics *m, const char *method, const char *path, int status, double s) {
    pthread_mutex_lock(&m->lock);
    int i = 0;
    while (i < m->n_http && !(m->http[i].status == status && strcmp(m->http[i].path, path) == 0 &&
                              strncmp(m->http[i].method, method, sizeof m->http[i].method - 1) == 0))
        i++;
    if (i < METRICS_HTTP_MAX) {
        if (i == m->n_http) {
            m->n_http++;
            m->http[i] = (metrics_http){.path = path, .status = status};
            (void)snprintf(m->http[i].method, sizeof m->http[i].method, "%s", method);
        }
        m->http[i].count++;
    }
    i = 0;
    while (i < m->n_route && !(strcmp(m->route[i].path, path) == 0 &&
                               strncmp(m->route[i].method, method, sizeof m->route[i].method - 1) == 0))
        i++;
    if (i < METRICS_ROUTES_MAX) {
        if (i == m->n_route) {
            m->n_route++;
            m->route[i].path = path;
            (void)snprintf(m->route[i].method, sizeof m->route[i].method, "%s", method);
        }
        observe(&m->route[i].hist, &http_def, s);
    }
    pthread_mutex_unlock(&m->lock);
}

static double part(uint64_t n, uint64_t of) { return of ? (double)n / (double)of : 0; }

/* Locked. */
static metrics_hits hits(const metrics *m) {
    uint64_t all = m->n_started_token, pool = m->n_cached_token - m->n_cached_host - m->n_cached_disk;
    return (metrics_hits){.request = part(m->n_hit, m->n_started),
                          .token = part(m->n_cached_token, all),
                          .pool = part(pool, all),
                          .host = part(m->n_cached_host, all),
                          .disk = part(m->n_cached_disk, all)};
}

void metrics_hit_rates(metrics *m, metrics_hits *out) {
    pthread_mutex_lock(&m->lock);
    *out = hits(m);
    pthread_mutex_unlock(&m->lock);
}

/* ---- writing --------------------------------------------------------------------------------------------------- */

static void head(ern_buf *out, const char *name, const char *type, const char *help) {
    (void)ern_buf_print(out, "# HELP %s %s.\n# TYPE %s %s\n", name, help, name, type);
}

static void hist_head(ern_buf *out, const hist_def *d) { head(out, d->name, "histogram", d->help); }

/* labels: "" or "a=\"b\"," with the trailing comma. */
static void hist_rows(ern_buf *out, const hist_def *d, const metrics_hist *h, const char *labels) {
    uint64_t sum = 0;
    for (int i = 0; i <= d->n; i++) {
        sum += h->bucket[i];
        (void)ern_buf_print(out, "%s_bucket{%sle=\"", d->name, labels);
        if (i < d->n)
            ern_json_print_real(out, d->le[i]);
        else
            (void)ern_buf_text(out, "+Inf");
        (void)ern_buf_print(out, "\"} %llu\n", (unsigned long long)sum);
    }
    char plain[128] = "";
    if (labels[0]) (void)snprintf(plain, sizeof plain, "{%.*s}", (int)strlen(labels) - 1, labels);
    (void)ern_buf_print(out, "%s_sum%s %.9g\n%s_count%s %llu\n", d->name, plain, h->sum, d->name, plain,
                        (unsigned long long)h->count);
}

static void gauge(ern_buf *out, const char *name, const char *help, double v) {
    char full[128];
    (void)snprintf(full, sizeof full, "fastdeploy:%s", name);
    head(out, full, "gauge", help);
    (void)ern_buf_print(out, "%s %.9g\n", full, v);
}

static void counter(ern_buf *out, const char *name, const char *help, uint64_t v) {
    char full[128];
    (void)snprintf(full, sizeof full, "fastdeploy:%s_total", name);
    head(out, full, "counter", help);
    (void)ern_buf_print(out, "%s %llu\n", full, (unsigned long long)v);
}

/* One family with a row for each tier below the pool. */
typedef double tier_value(const ern_tier_stats *t);
static double tier_blocks(const ern_tier_stats *t) { return t->n_block; }
static double tier_room(const ern_tier_stats *t) { return t->n_block_max; }
static double tier_out(const ern_tier_stats *t) { return (double)t->n_out; }
static double tier_in(const ern_tier_stats *t) { return (double)t->n_in; }
static double tier_evicted(const ern_tier_stats *t) { return (double)t->n_evicted; }
static double tier_errors(const ern_tier_stats *t) { return (double)t->n_error; }
static double tier_off(const ern_tier_stats *t) { return t->off; }

static void write_tiers(ern_buf *out, const ern_engine_stats *st) {
    static const struct {
        const char *name, *type, *help;
        tier_value *value;
    } row[] = {
        {"fastdeploy:kv_tier_blocks", "gauge", "Blocks held below the pool", tier_blocks},
        {"fastdeploy:kv_tier_max_blocks", "gauge", "Most blocks held below the pool; 0: no such tier", tier_room},
        {"fastdeploy:kv_tier_moved_out_total", "counter", "Blocks moved down into the tier", tier_out},
        {"fastdeploy:kv_tier_moved_in_total", "counter", "Blocks moved up out of the tier", tier_in},
        {"fastdeploy:kv_tier_evicted_total", "counter", "Blocks given up for room", tier_evicted},
        {"fastdeploy:kv_tier_errors_total", "counter", "Reads and writes of blocks that failed", tier_errors},
        {"fastdeploy:kv_tier_off", "gauge", "1 while the tier is switched off after errors", tier_off},
    };
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        head(out, row[i].name, row[i].type, row[i].help);
        (void)ern_buf_print(out, "%s{tier=\"host\"} %.15g\n%s{tier=\"disk\"} %.15g\n", row[i].name,
                            row[i].value(&st->host), row[i].name, row[i].value(&st->disk));
    }
}

static const char *yes(bool on) { return on ? "True" : "False"; }

/* FastDeploy's label names where it has one; its values are Python's. */
static void write_cache_config(ern_buf *out, ern_engine *engine) {
    const ern_engine_options *o = ern_engine_options_of(engine);
    const ern_engine_plan *p = ern_engine_plan_of(engine);
    static const char *const dtype[] = {
        [ERN_KV_BF16] = "bfloat16", [ERN_KV_F32] = "float32", [ERN_KV_I8] = "int8", [ERN_KV_F8] = "fp8"};
    head(out, "fastdeploy:cache_config_info", "gauge", "The KV cache's options");
    (void)ern_buf_print(out,
                        "fastdeploy:cache_config_info{block_size=\"%d\",cache_dtype=\"%s\",num_gpu_blocks=\"%d\","
                        "num_cpu_blocks=\"%d\",enable_prefix_caching=\"%s\",enable_output_caching=\"%s\","
                        "swap_space=\"%.9g\",kvcache_storage_backend=\"%s\",kv_cache_ratio=\"%.9g\",",
                        o->backend_options.n_page_cell, dtype[o->backend_options.kv_dtype], p->n_page, p->n_host_page,
                        yes(o->prefix_cache), yes(o->cache_output), (double)o->swap_bytes / (1 << 30),
                        o->store_dir ? "file" : "None", o->reserve_all ? o->prompt_share : 1.0);
    (void)ern_buf_print(
        out, "kv_bytes=\"%llu\",kv_tokens=\"%lld\",max_model_len=\"%d\",max_num_batched_tokens=\"%d\"} 1\n",
        (unsigned long long)p->kv_bytes, (long long)p->kv_tokens, o->max_model_len, o->max_batched_tokens);
}

static void write_engine(ern_buf *out, ern_engine *engine, int n_front) {
    ern_engine_stats st;
    ern_engine_stats_read(engine, &st);
    const ern_engine_options *o = ern_engine_options_of(engine);
    gauge(out, "num_requests_running", "Requests being computed", st.n_running);
    gauge(out, "num_requests_waiting", "Requests waiting to be scheduled", st.n_waiting);
    gauge(out, "num_requests_enqueued", "Requests being read and tokenized, not yet waiting", n_front);
    gauge(out, "num_requests_preempted", "Requests that ran, gave up their KV blocks and wait", st.n_preempted_waiting);
    gauge(out, "num_requests_parked", "Requests waiting for a slow reader", st.n_parked);
    gauge(out, "num_requests_loading", "Requests waiting for KV blocks from host memory or disk", st.n_loading);
    gauge(out, "batch_size", "Requests in the running batch", st.n_running);
    gauge(out, "max_batch_size", "Most requests in a batch", o->max_num_seqs);
    gauge(out, "available_batch_size", "Free places in the batch", o->max_num_seqs - st.n_running);
    gauge(out, "max_gpu_block_num", "KV pages in all", st.n_page);
    gauge(out, "max_cpu_block_num", "KV pages of the host tier", ern_engine_plan_of(engine)->n_host_page);
    gauge(out, "free_gpu_block_num", "KV pages that hold nothing", st.n_page_free);
    int32_t available = st.n_page_free + st.n_page_cached;
    gauge(out, "available_gpu_block_num", "KV pages that can be handed out: free, or cached and not in use", available);
    double share = st.n_page ? (double)available / st.n_page : 0;
    gauge(out, "available_gpu_resource", "Available part of the KV pages", share);
    gauge(out, "gpu_cache_usage_perc", "Part of the KV pages that requests use, 0 to 1", st.n_page ? 1 - share : 0);
    counter(out, "request_preempted", "Requests preempted and computed again", st.n_preempted);
    counter(out, "engine_step", "Engine steps", st.n_step);
    counter(out, "prefix_cache_block", "Blocks that entered the prefix cache", st.n_block_cached);
    counter(out, "prefix_cache_evicted_block", "Blocks that the prefix cache gave up", st.n_block_evicted);
    write_tiers(out, &st);
    write_cache_config(out, engine);
}

static void write_http(const metrics *m, ern_buf *out) {
    if (m->n_http == 0) return;
    head(out, "http_requests_total", "counter", "HTTP requests answered");
    for (int i = 0; i < m->n_http; i++)
        (void)ern_buf_print(out, "http_requests_total{method=\"%s\",path=\"%s\",status_code=\"%d\"} %llu\n",
                            m->http[i].method, m->http[i].path, m->http[i].status,
                            (unsigned long long)m->http[i].count);
    hist_head(out, &http_def);
    for (int i = 0; i < m->n_route; i++) {
        char labels[112];
        (void)snprintf(labels, sizeof labels, "method=\"%s\",path=\"%s\",", m->route[i].method, m->route[i].path);
        hist_rows(out, &http_def, &m->route[i].hist, labels);
    }
}

static void write_hits(const metrics *m, ern_buf *out) {
    metrics_hits h = hits(m);
    uint64_t below = m->n_cached_host + m->n_cached_disk;
    counter(out, "prefix_cache_token_num", "Prompt tokens found in the prefix cache", m->n_cached_token);
    counter(out, "prefix_gpu_cache_token_num", "Prompt tokens found in the pool", m->n_cached_token - below);
    counter(out, "prefix_cpu_cache_token_num", "Prompt tokens found in host memory", m->n_cached_host);
    counter(out, "prefix_ssd_cache_token_num", "Prompt tokens found on disk", m->n_cached_disk);
    gauge(out, "hit_req_rate", "Part of requests with a cached prefix", h.request);
    gauge(out, "hit_token_rate", "Part of prompt tokens found in the prefix cache", h.token);
    gauge(out, "gpu_hit_token_rate", "Part of prompt tokens found in the pool", h.pool);
    gauge(out, "cpu_hit_token_rate", "Part of prompt tokens found in host memory", h.host);
    gauge(out, "ssd_hit_token_rate", "Part of prompt tokens found on disk", h.disk);
}

void metrics_write(metrics *m, ern_engine *engine, int n_front, ern_buf *out) {
    if (engine) write_engine(out, engine, n_front);
    pthread_mutex_lock(&m->lock);
    counter(out, "requests_number", "Requests taken in", m->n_request);
    counter(out, "request_success", "Requests ended well", m->n_success);
    counter(out, "request_aborted", "Requests cut off or failed", m->n_aborted);
    counter(out, "prompt_tokens", "Prompt tokens of ended requests", m->n_prompt_token);
    counter(out, "generation_tokens", "Generated tokens of ended requests", m->n_output_token);
    write_hits(m, out);
    gauge(out, "first_token_latency", "Seconds to the first token, last request", m->first_token_s);
    gauge(out, "infer_latency", "Seconds in the running state, last request", m->infer_s);
    for (int i = 0; i < HIST_COUNT; i++) {
        hist_head(out, &def[i]);
        hist_rows(out, &def[i], &m->hist[i], "");
    }
    write_http(m, out);
    pthread_mutex_unlock(&m->lock);
}
