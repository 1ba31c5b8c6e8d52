/* Figures of a run, for people and as JSON. See bench_report.h. */
#include "cli/bench_report.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/jsonw.h"

const char *const bench_metric_name[BENCH_METRICS] = {"ttft", "tpot", "itl", "e2el"};

/* ---- what is wished for ---------------------------------------------------------------------------------------- */

static int metric_of(const char *name, size_t len) {
    for (int m = 0; m < BENCH_METRICS; m++)
        if (strlen(bench_metric_name[m]) == len && memcmp(bench_metric_name[m], name, len) == 0) return m;
    return -1;
}

/* "ttft:500,tpot:50". */
static ern_status read_goodput(bench_wish *w, const char *text, ern_err *err) {
    for (const char *at = text; *at;) {
        const size_t n = strcspn(at, ":,");
        const int m = metric_of(at, n);
        char *end = NULL;
        const double ms = at[n] == ':' ? strtod(at + n + 1, &end) : 0;
        if (m < 0 || m == BENCH_ITL || !end || end == at + n + 1 || (*end && *end != ',') || !(ms > 0))
            return ERN_FAIL(
                err, ERN_ERR_USAGE,
                "--goodput wants milliseconds for ttft, tpot or e2el, such as ttft:500,tpot:50, not '%.60s'", text);
        w->goodput = true;
        w->most_ms[m] = ms;
        at = end + (*end == ',');
    }
    return ERN_OK;
}

ern_status bench_wish_read(bench_wish *w, const char *metrics, const char *percentiles, const char *const *goodput,
                           int n_goodput, ern_err *err) {
    *w = (bench_wish){.n_percentile = 0};
    for (const char *at = metrics; *at;) {
        const size_t n = strcspn(at, ",");
        const int m = metric_of(at, n);
        if (m < 0)
            return ERN_FAIL(err, ERN_ERR_USAGE, "--percentile-metrics wants ttft, tpot, itl, e2el, not '%.60s'",
                            metrics);
        w->metric[m] = true;
        at += n + (at[n] == ',');
    }
    for (int i = 0; i < n_goodput; i++) ERN_TRY(read_goodput(w, goodput[i], err));
    return bench_list("metric-percentiles", percentiles, 0, 100, w->percentile, BENCH_PERCENTILES_MAX, &w->n_percentile,
                      err);
}

/* ---- sums ------------------------------------------------------------------------------------------------------ */

static double tpot_ms(const bench_record *r) {
    return r->n_out > 1 ? (r->e2el_s - r->ttft_s) * 1e3 / (r->n_out - 1) : 0;
}

static bool good_enough(const bench_record *r, const bench_wish *w) {
    const double ms[BENCH_METRICS] = {r->ttft_s * 1e3, tpot_ms(r), 0, r->e2el_s * 1e3};
    for (int m = 0; m < BENCH_METRICS; m++)
        if (w->most_ms[m] > 0 && ms[m] > w->most_ms[m]) return false;
    return true;
}

/* The values of a metric over all good requests into out; returns how many. */
static size_t gather(const bench_run *run, bench_metric m, double *out) {
    size_t n = 0;
    for (int32_t i = 0; i < run->n; i++) {
        const bench_record *r = &run->record[i];
        if (!r->good) continue;
        if (m == BENCH_TTFT) out[n++] = r->ttft_s * 1e3;
        if (m == BENCH_TPOT && r->n_out > 1) out[n++] = tpot_ms(r);
        if (m == BENCH_E2EL) out[n++] = r->e2el_s * 1e3;
        for (int32_t k = 0; m == BENCH_ITL && k < r->n_itl; k++) out[n++] = r->itl_s[k] * 1e3;
    }
    return n;
}

static void count_all(bench_sum *s, const bench_run *run, const bench_wish *wish) {
    for (int32_t i = 0; i < run->n; i++) {
        const bench_record *r = &run->record[i];
        if (!r->good) {
            if (!s->first_error[0]) memcpy(s->first_error, r->error, sizeof s->first_error);
            continue;
        }
        s->completed++;
        s->n_good += good_enough(r, wish);
        s->total_in += r->n_in;
        s->total_out += r->n_out;
    }
    s->failed = run->n - s->completed;
    if (s->duration_s <= 0) return;
    s->requests_per_s = s->completed / s->duration_s;
    s->goodput_per_s = s->n_good / s->duration_s;
    s->out_per_s = s->total_out / s->duration_s;
    s->tokens_per_s = (s->total_in + s->total_out) / s->duration_s;
}

ern_status bench_sum_make(bench_sum *out, const bench_run *run, const bench_wish *wish, ern_err *err) {
    size_t most = (size_t)run->n;
    for (int32_t i = 0; i < run->n; i++) most += (size_t)run->record[i].n_itl;
    double *value = calloc(most + 1, sizeof *value);
    *out = (bench_sum){.n = run->n, .peak = run->peak, .duration_s = run->duration_s};
    if (!value) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for %zu times", most);
    count_all(out, run, wish);
    for (int m = 0; m < BENCH_METRICS; m++) {
        const size_t n = gather(run, (bench_metric)m, value);
        out->ms[m] = bench_summarize(value, n);
        for (int i = 0; i < wish->n_percentile; i++)
            out->percentile_ms[m][i] = bench_percentile(value, n, wish->percentile[i]);
        out->p50_ms[m] = bench_percentile(value, n, 50);
        out->p99_ms[m] = bench_percentile(value, n, 99);
    }
    free(value);
    return ERN_OK;
}

/* ---- JSON ------------------------------------------------------------------------------------------------------ */

static void real(ern_jsonw *w, const char *key, double v) {
    ern_jsonw_key(w, key);
    ern_jsonw_real(w, v);
}
static void whole(ern_jsonw *w, const char *key, double v) {
    ern_jsonw_key(w, key);
    ern_jsonw_int(w, (int64_t)v);
}
static void text(ern_jsonw *w, const char *key, const char *v) {
    ern_jsonw_key(w, key);
    ern_jsonw_text(w, v);
}

/* "p90_ttft_ms", "p99.9_ttft_ms". */
static void put_percentile(ern_jsonw *w, double p, const char *metric, double v) {
    char key[64];
    (void)snprintf(key, sizeof key, "p%g_%s_ms", p, metric);
    real(w, key, v);
}

static void put_metric(ern_jsonw *w, const bench_sum *s, const bench_wish *wish, int m) {
    const char *name = bench_metric_name[m];
    char key[64];
    (void)snprintf(key, sizeof key, "mean_%s_ms", name);
    real(w, key, s->ms[m].mean);
    (void)snprintf(key, sizeof key, "median_%s_ms", name);
    real(w, key, s->ms[m].median);
    (void)snprintf(key, sizeof key, "std_%s_ms", name);
    real(w, key, s->ms[m].std);
    for (int i = 0; i < wish->n_percentile; i++) put_percentile(w, wish->percentile[i], name, s->percentile_ms[m][i]);
}

static void put_details(ern_jsonw *w, const bench_run *run) {
    ern_jsonw_key(w, "input_lens");
    ern_jsonw_array(w);
    for (int32_t i = 0; i < run->n; i++) ern_jsonw_int(w, run->record[i].n_in);
    ern_jsonw_array_end(w);
    ern_jsonw_key(w, "output_lens");
    ern_jsonw_array(w);
    for (int32_t i = 0; i < run->n; i++) ern_jsonw_int(w, run->record[i].n_out);
    ern_jsonw_array_end(w);
    ern_jsonw_key(w, "ttfts");
    ern_jsonw_array(w);
    for (int32_t i = 0; i < run->n; i++) ern_jsonw_real(w, run->record[i].ttft_s);
    ern_jsonw_array_end(w);
    ern_jsonw_key(w, "itls");
    ern_jsonw_array(w);
    for (int32_t i = 0; i < run->n; i++) {
        ern_jsonw_array(w);
        for (int32_t k = 0; k < run->record[i].n_itl; k++) ern_jsonw_real(w, run->record[i].itl_s[k]);
        ern_jsonw_array_end(w);
    }
    ern_jsonw_array_end(w);
    ern_jsonw_key(w, "errors");
    ern_jsonw_array(w);
    for (int32_t i = 0; i < run->n; i++) ern_jsonw_text(w, run->record[i].error);
    ern_jsonw_array_end(w);
}

void bench_json(ern_buf *out, const bench_about *a, const bench_sum *s, const bench_wish *wish, const bench_run *run) {
    ern_jsonw w;
    ern_jsonw_init(&w, out);
    ern_jsonw_object(&w);
    text(&w, "date", a->date);
    text(&w, "endpoint_type", a->backend);
    text(&w, "backend", a->backend);
    text(&w, "model_id", a->model);
    text(&w, "tokenizer_id", a->model);
    text(&w, "base_url", a->url);
    text(&w, "commit", a->commit);
    whole(&w, "num_prompts", s->n);
    ern_jsonw_key(&w, "request_rate");
    if (isinf(a->rate))
        ern_jsonw_text(&w, "inf");
    else
        ern_jsonw_real(&w, a->rate);
    real(&w, "burstiness", a->burstiness);
    ern_jsonw_key(&w, "max_concurrency");
    if (a->max_concurrency > 0)
        ern_jsonw_int(&w, a->max_concurrency);
    else
        ern_jsonw_null(&w);
    real(&w, "duration", s->duration_s);
    whole(&w, "completed", s->completed);
    whole(&w, "failed", s->failed);
    whole(&w, "total_input_tokens", s->total_in);
    whole(&w, "total_output_tokens", s->total_out);
    real(&w, "request_throughput", s->requests_per_s);
    ern_jsonw_key(&w, "request_goodput");
    if (wish->goodput)
        ern_jsonw_real(&w, s->goodput_per_s);
    else
        ern_jsonw_null(&w);
    real(&w, "output_throughput", s->out_per_s);
    real(&w, "total_token_throughput", s->tokens_per_s);
    whole(&w, "max_concurrent_requests", s->peak);
    for (int m = 0; m < BENCH_METRICS; m++)
        if (wish->metric[m]) put_metric(&w, s, wish, m);
    if (run) put_details(&w, run);
    ern_jsonw_object_end(&w);
}

/* ---- text ------------------------------------------------------------------------------------------------------ */

static void line(ern_buf *out, const char *what, int digits, double v) {
    (void)ern_buf_print(out, "  %-34s %12.*f\n", what, digits, v);
}

void bench_text(ern_buf *out, const bench_sum *s, const bench_wish *wish) {
    static const char *const title[BENCH_METRICS] = {"TTFT, ms", "TPOT, ms", "ITL, ms", "E2EL, ms"};
    line(out, "completed", 0, s->completed);
    line(out, "failed", 0, s->failed);
    if (s->failed) (void)ern_buf_print(out, "    the first failure: %s\n", s->first_error);
    line(out, "duration, s", 2, s->duration_s);
    line(out, "most in flight", 0, s->peak);
    line(out, "input tokens", 0, s->total_in);
    line(out, "output tokens", 0, s->total_out);
    line(out, "requests/s", 2, s->requests_per_s);
    if (wish->goodput) line(out, "good requests/s", 2, s->goodput_per_s);
    line(out, "output tokens/s", 2, s->out_per_s);
    line(out, "tokens/s, input and output", 2, s->tokens_per_s);
    (void)ern_buf_print(out, "  %-10s %10s %10s %10s", "", "mean", "median", "std");
    for (int i = 0; i < wish->n_percentile; i++) {
        char head[16];
        (void)snprintf(head, sizeof head, "p%g", wish->percentile[i]);
        (void)ern_buf_print(out, " %10s", head);
    }
    (void)ern_buf_text(out, "\n");
    for (int m = 0; m < BENCH_METRICS; m++) {
        if (!wish->metric[m]) continue;
        (void)ern_buf_print(out, "  %-10s %10.2f %10.2f %10.2f", title[m], s->ms[m].mean, s->ms[m].median,
                            s->ms[m].std);
        for (int i = 0; i < wish->n_percentile; i++) (void)ern_buf_print(out, " %10.2f", s->percentile_ms[m][i]);
        (void)ern_buf_text(out, "\n");
    }
}
