/* ernest bench serve: load on a running server, told in the columns of benchmark_serving. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/os.h"
#include "cli/bench_book.h"
#include "cli/bench_prompts.h"
#include "cli/bench_report.h"
#include "cli/client.h"
#include "cli/command.h"

enum { URL_MAX = 768, MODEL_MAX = 512, SWEEP_MAX = 16, JSON_MAX = 1 << 30 };

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number) {
    (void)signal_number;
    interrupted = 1;
}

typedef struct serving_load {
    const options *o;
    bench_book book;
    bench_prompts prompts;
    bench_wish wish;
    char base[512], url[URL_MAX], model[MODEL_MAX];
    double rate, sweep[SWEEP_MAX];
    int n_sweep;
    int64_t n_asked; /* requests made so far: a run's prompts are never those of the run before */
    bool tty;
    ern_buf json;
    bench_point ttft[SWEEP_MAX], tpot[SWEEP_MAX];
} serving_load;

/* ---- where to ---------------------------------------------------------------------------------------------------- */

static ern_status find_url(serving_load *s, ern_err *err) {
    const char *base = options_text(s->o, "base-url"), *host = options_text(s->o, "host");
    const char *endpoint = options_text(s->o, "endpoint");
    const bool chat = strstr(options_text(s->o, "backend"), "chat") != NULL;
    int n = base ? snprintf(s->base, sizeof s->base, "%s", base)
                 : snprintf(s->base, sizeof s->base, strchr(host, ':') ? "http://[%s]:%d" : "http://%s:%d", host,
                            (int)options_int(s->o, "port"));
    if (n < 0 || (size_t)n >= sizeof s->base || strncmp(s->base, "http", 4) != 0)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--base-url %.100s is no address; give one such as http://127.0.0.1:8000",
                        s->base);
    while (n > 0 && s->base[n - 1] == '/') s->base[--n] = 0;
    if (n > 3 && strcmp(s->base + n - 3, "/v1") == 0) s->base[n - 3] = 0;
    if (!endpoint) endpoint = chat ? "/v1/chat/completions" : "/v1/completions";
    (void)snprintf(s->url, sizeof s->url, "%s%s%.200s", s->base, endpoint[0] == '/' ? "" : "/", endpoint);
    return ERN_OK;
}

static ern_status find_model(serving_load *s, ern_err *err) {
    const char *name = options_text(s->o, "model");
    client *c = NULL;
    if (name) return (void)snprintf(s->model, sizeof s->model, "%s", name), ERN_OK;
    ern_status status = client_open(&c, s->base, options_text(s->o, "api-key"), &interrupted, err);
    if (status == ERN_OK) status = client_first_model(c, s->model, sizeof s->model, err);
    client_close(c);
    return status;
}

static ern_status read_rate(serving_load *s, ern_err *err) {
    const char *text = options_text(s->o, "request-rate");
    char *end = NULL;
    s->rate = strtod(text, &end);
    if (end == text || *end || !(s->rate > 0))
        return ERN_FAIL(err, ERN_ERR_USAGE, "--request-rate wants requests per second above 0, or inf, not '%.60s'",
                        text);
    return ERN_OK;
}

static ern_status prepare(serving_load *s, ern_err *err) {
    const option_value *goodput = options_values(s->o, "goodput");
    const char *sweep = options_text(s->o, "sweep");
    ERN_TRY(command_positional(s->o, 0, err));
    ERN_TRY(bench_wish_read(&s->wish, options_text(s->o, "percentile-metrics"),
                            options_text(s->o, "metric-percentiles"), goodput->text, goodput->n, err));
    ERN_TRY(read_rate(s, err));
    if (sweep && options_given(s->o, "max-concurrency"))
        return ERN_FAIL(err, ERN_ERR_USAGE, "--sweep names the concurrencies of its runs; leave out --max-concurrency");
    if (sweep) ERN_TRY(bench_list("sweep", sweep, 1, BENCH_IN_FLIGHT_MAX, s->sweep, SWEEP_MAX, &s->n_sweep, err));
    ERN_TRY(find_url(s, err));
    ERN_TRY(find_model(s, err));
    return bench_prompts_open(&s->prompts, s->o, s->model, err);
}

/* ---- one run ----------------------------------------------------------------------------------------------------- */

static void make_body(void *ud, int64_t i, ern_buf *out) { bench_prompts_body(&((serving_load *)ud)->prompts, i, out); }

static void show(void *ud, int32_t done, int32_t n) {
    const serving_load *s = ud;
    if (s->tty) (void)fprintf(stderr, "\r%d of %d requests done\033[K%s", done, n, done == n ? "\n" : "");
}

static ern_status load(serving_load *s, int32_t n, int32_t in_flight, double rate, bool shown, bench_run *run,
                       ern_err *err) {
    const ern_status status = bench_load(&(bench_load_options){.url = s->url,
                                                               .key = options_text(s->o, "api-key"),
                                                               .first = s->n_asked,
                                                               .n = n,
                                                               .rate = rate,
                                                               .burstiness = options_real(s->o, "burstiness"),
                                                               .seed = (uint64_t)options_int(s->o, "seed"),
                                                               .in_flight_max = in_flight,
                                                               .time_limit_s = (double)options_int(s->o, "time-limit"),
                                                               .body = make_body,
                                                               .ud = s,
                                                               .stop = &interrupted,
                                                               .progress = shown ? show : NULL},
                                         run, err);
    s->n_asked += n;
    return status;
}

/* Requests that are not counted; one that fails ends the benchmark before it wastes an hour. */
static ern_status warm_up(serving_load *s, ern_err *err) {
    const int32_t n = (int32_t)options_int(s->o, "num-warmups");
    bench_run run;
    if (n == 0) return ERN_OK;
    ern_status status = load(s, n, 1, (double)INFINITY, false, &run, err);
    for (int32_t i = 0; status == ERN_OK && i < run.n; i++)
        if (!run.record[i].good)
            status = ERN_FAIL(err, ERN_ERR_NET, "a warm-up request to %.200s failed: %s", s->url, run.record[i].error);
    bench_run_free(&run);
    return status;
}

static void stamp(char out[32]) {
    const time_t now = (time_t)ern_wall_s();
    struct tm t;
    (void)gmtime_r(&now, &t);
    (void)strftime(out, 32, "%Y%m%d-%H%M%S", &t);
}

static void keep(serving_load *s, const bench_sum *sum, const bench_run *run, int32_t concurrency) {
    bench_about about = {.backend = options_text(s->o, "backend"),
                         .model = s->model,
                         .url = s->base,
                         .commit = bench_commit(s->o),
                         .rate = s->rate,
                         .burstiness = options_real(s->o, "burstiness"),
                         .max_concurrency = concurrency};
    char row[160];
    stamp(about.date);
    if (s->json.len) (void)ern_buf_text(&s->json, ",\n");
    bench_json(&s->json, &about, sum, &s->wish, options_flag(s->o, "save-detailed") ? run : NULL);
    (void)snprintf(row, sizeof row, "serve %s, %d requests, %d at once", s->prompts.row ? "file" : "random", sum->n,
                   sum->peak);
    const struct {
        const char *what, *unit;
        double value;
    } line[] = {{"output", "tokens/s", sum->out_per_s},
                {"requests", "requests/s", sum->requests_per_s},
                {"TTFT median", "ms", sum->p50_ms[BENCH_TTFT]},
                {"TTFT p99", "ms", sum->p99_ms[BENCH_TTFT]},
                {"TPOT median", "ms", sum->p50_ms[BENCH_TPOT]},
                {"TPOT p99", "ms", sum->p99_ms[BENCH_TPOT]},
                {"failed", "requests", sum->failed}};
    for (size_t i = 0; i < sizeof line / sizeof *line; i++) {
        char name[256];
        if (line[i].value == 0 && i == sizeof line / sizeof *line - 1) continue; /* none failed */
        (void)snprintf(name, sizeof name, "%s, %s", row, line[i].what);
        bench_book_add(&s->book, &(bench_line){.row = name, .value = line[i].value, .unit = line[i].unit});
    }
}

/* concurrency 0: as many as fit. */
static ern_status one_run(serving_load *s, int32_t concurrency, bench_sum *sum, ern_err *err) {
    bench_run run;
    ern_status status = load(s, (int32_t)options_int(s->o, "num-prompts"),
                             concurrency ? concurrency : BENCH_IN_FLIGHT_MAX, s->rate, true, &run, err);
    if (status == ERN_OK) status = bench_sum_make(sum, &run, &s->wish, err);
    if (status == ERN_OK) {
        ern_buf text;
        ern_buf_init(&text, 1 << 16);
        if (concurrency) (void)ern_buf_print(&text, "at most %d in flight\n", concurrency);
        bench_text(&text, sum, &s->wish);
        (void)command_print(&text);
        keep(s, sum, &run, concurrency);
    }
    bench_run_free(&run);
    return status;
}

/* ---- files ------------------------------------------------------------------------------------------------------- */

static ern_status write_file(const char *path, const ern_buf *b, ern_err *err) {
    FILE *f = fopen(path, "we");
    bool good = f && !b->full && fwrite(b->data, 1, b->len, f) == b->len;
    if (f) good = fclose(f) == 0 && good;
    return good ? ERN_OK : ERN_FAIL(err, ERN_ERR_FILE, "cannot write %.300s: %s", path, strerror(errno));
}

static ern_status save_json(serving_load *s, ern_err *err) {
    const char *dir = options_text(s->o, "result-dir"), *name = options_text(s->o, "result-filename");
    char made[256], when[32], path[1024];
    if (!options_flag(s->o, "save-result") && !options_flag(s->o, "save-detailed") && !name) return ERN_OK;
    stamp(when);
    const char *base = strrchr(s->model, '/');
    char at_once[32] = "";
    if (options_given(s->o, "max-concurrency"))
        (void)snprintf(at_once, sizeof at_once, "-concurrency%lld", (long long)options_int(s->o, "max-concurrency"));
    (void)snprintf(made, sizeof made, "%.20s-%.20sqps%s-%.80s-%s.json", options_text(s->o, "backend"),
                   options_text(s->o, "request-rate"), at_once, base ? base + 1 : s->model, when);
    ERN_TRY(ern_path_join(path, sizeof path, dir ? dir : ".", name ? name : made, err));
    ern_buf b;
    ern_buf_init(&b, JSON_MAX);
    (void)ern_buf_print(&b, "%s%s%s\n", s->n_sweep ? "[" : "", s->json.data, s->n_sweep ? "]" : "");
    const ern_status status = s->json.full
                                  ? ERN_FAIL(err, ERN_ERR_LIMIT, "the result is longer than %d bytes", JSON_MAX)
                                  : write_file(path, &b, err);
    ern_buf_free(&b);
    if (status == ERN_OK) (void)printf("result: %s\n", path);
    return status;
}

static ern_status save_plot(serving_load *s, int n, ern_err *err) {
    const char *path = options_text(s->o, "plot");
    char title[300];
    ern_buf b;
    if (!path) return ERN_OK;
    (void)snprintf(title, sizeof title, "%.100s on %.60s: %s of %d + %d tokens", s->model, ern_cpu_name(),
                   s->prompts.row ? "file" : "random", s->prompts.n_in, s->prompts.n_out);
    ern_buf_init(&b, 1 << 20);
    bench_svg(&b, title, s->ttft, s->tpot, n);
    const ern_status status = write_file(path, &b, err);
    ern_buf_free(&b);
    if (status == ERN_OK) (void)printf("plot: %s\n", path);
    return status;
}

/* ---- all --------------------------------------------------------------------------------------------------------- */

static ern_status run_all(serving_load *s, ern_err *err) {
    const int n = s->n_sweep ? s->n_sweep : 1;
    const int32_t given = options_given(s->o, "max-concurrency") ? (int32_t)options_int(s->o, "max-concurrency") : 0;
    int32_t completed = 0;
    (void)printf("%s, model %s, %lld requests%s, rate %s\n", s->url, s->model,
                 (long long)options_int(s->o, "num-prompts"), s->n_sweep ? " a run" : "",
                 options_text(s->o, "request-rate"));
    ERN_TRY(warm_up(s, err));
    for (int i = 0; i < n && !interrupted; i++) {
        bench_sum sum;
        ERN_TRY(one_run(s, s->n_sweep ? (int32_t)s->sweep[i] : given, &sum, err));
        completed += sum.completed;
        const int32_t label = s->n_sweep ? (int32_t)s->sweep[i] : sum.peak;
        s->ttft[i] = (bench_point){sum.out_per_s, sum.p50_ms[BENCH_TTFT], sum.p99_ms[BENCH_TTFT], label};
        s->tpot[i] = (bench_point){sum.out_per_s, sum.p50_ms[BENCH_TPOT], sum.p99_ms[BENCH_TPOT], label};
    }
    if (s->json.len) ERN_TRY(save_json(s, err));
    if (s->json.len && !interrupted) ERN_TRY(save_plot(s, n, err));
    if (completed == 0) return ERN_FAIL(err, ERN_ERR_NET, "no request was completed");
    return ERN_OK;
}

int cmd_bench_serve(int argc, char **argv, char **envp) {
    options o;
    int exit_code;
    if (!command_begin(&o, CMD_BENCH_SERVE, argc, argv, envp, &exit_code)) return exit_code;
    struct sigaction on = {.sa_handler = on_interrupt, .sa_flags = (int)SA_RESETHAND};
    (void)sigaction(SIGINT, &on, NULL);
    ern_err err, at_close;
    serving_load s = {.o = &o, .tty = isatty(STDERR_FILENO) == 1};
    ern_buf_init(&s.json, JSON_MAX);
    ern_status status = bench_book_open(&s.book, &o, argc, argv, &err);
    if (status == ERN_OK) status = prepare(&s, &err);
    if (status == ERN_OK) status = run_all(&s, &err);
    exit_code = status == ERN_OK ? 0 : command_fail(&err);
    bench_prompts_close(&s.prompts);
    ern_buf_free(&s.json);
    if (bench_book_close(&s.book, &at_close) != ERN_OK && status == ERN_OK) exit_code = command_fail(&at_close);
    options_close(&o);
    return exit_code;
}
