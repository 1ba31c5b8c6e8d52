/* ernest serve: check, listen, load, serve, drain.
 *
 * The port listens before the weights are read and answers 503 with how far the load is. Signals are taken by one
 * thread with sigwait, so nothing happens in a handler: the first asks for a drain (or stops the load), the second ends
 * the drain, the third ends the process. The one handler is for a weight file that shrinks under its mapping. */
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "base/os.h"
#include "cli/command.h"
#include "cli/console.h"
#include "cli/fingerprint.h"
#include "cli/launch.h"
#include "cli/serve_report.h"

enum { STATS_EVERY_S = 10 };

typedef struct serving {
    const options *o;
    launch l;
    char **envp;
    console_bar bar;
    ern_buf config_info;
    ern_server *server;
    ern_model *model;
    ern_tokenizer *tokenizer;
    ern_engine *engine;
    ern_chat_format format;
    ern_config config; /* of check_config: what the tokenizer must fit */
    char url[128];
    sigset_t signals;
    pthread_t watcher;
    bool watching;
    atomic_int n_signal;
    pthread_mutex_t server_lock; /* draining, and the server while it is hurried */
    bool draining;
    sem_t signalled;
} serving;

/* ---- signals --------------------------------------------------------------------------------------------------- */

static void *watch_signals(void *ud) {
    serving *s = ud;
    for (;;) {
        int which = 0;
        if (sigwait(&s->signals, &which) != 0) continue;
        if (which == SIGUSR1) return NULL; /* stop_watching */
        int n = atomic_fetch_add(&s->n_signal, 1) + 1;
        ern_log(ERN_LOG_INFO, "serve.signal", "name=%s count=%d", which == SIGINT ? "SIGINT" : "SIGTERM", n);
        (void)pthread_mutex_lock(&s->server_lock);
        if (n == 1)
            (void)sem_post(&s->signalled);
        else if (n == 2 && s->draining)
            ern_server_hurry(s->server);
        else
            _exit(1);
        (void)pthread_mutex_unlock(&s->server_lock);
    }
}

/* A read beyond the end of a mapped file: someone cut a weight file while it was in use. Nothing can be computed any
 * more; say so and go, so that a supervisor starts us again (and the loader then names the file). */
static void on_cut_file(int signal_number) {
    static const char text[] = "ernest: a weight file was cut or its disk failed while it was being served; "
                               "restore the checkpoint and start again\n";
    static atomic_flag said = ATOMIC_FLAG_INIT;
    (void)signal_number;
    while (atomic_flag_test_and_set(&said)) (void)pause(); /* another thread met it first and ends the process */
    ssize_t n = write(STDERR_FILENO, text, sizeof text - 1);
    _exit(n < 0 ? 1 : 3);
}

static ern_status start_watching(serving *s, ern_err *err) {
    (void)sigemptyset(&s->signals);
    (void)sigaddset(&s->signals, SIGTERM);
    (void)sigaddset(&s->signals, SIGINT);
    (void)sigaddset(&s->signals, SIGUSR1);
    (void)pthread_sigmask(SIG_BLOCK, &s->signals, NULL); /* inherited by every thread started from here on */
    struct sigaction cut = {.sa_handler = on_cut_file};
    (void)sigaction(SIGBUS, &cut, NULL);
    (void)sem_init(&s->signalled, 0, 0);
    int e = pthread_create(&s->watcher, NULL, watch_signals, s);
    if (e) return ERN_FAIL(err, ERN_ERR_MEMORY, "no thread to wait for signals: %s", strerror(e));
    s->watching = true;
    return ERN_OK;
}

static void set_draining(serving *s, bool draining) {
    (void)pthread_mutex_lock(&s->server_lock);
    s->draining = draining;
    (void)pthread_mutex_unlock(&s->server_lock);
}

static void stop_watching(serving *s) {
    if (!s->watching) return;
    (void)pthread_kill(s->watcher, SIGUSR1);
    (void)pthread_join(s->watcher, NULL);
    (void)sem_destroy(&s->signalled);
}

/* ---- loading --------------------------------------------------------------------------------------------------- */

static bool on_progress(void *ud, const char *what, uint64_t done_bytes, uint64_t all_bytes) {
    serving *s = ud;
    console_bar_show(&s->bar, what, done_bytes, all_bytes);
    if (s->server) ern_server_loading(s->server, what, done_bytes, all_bytes);
    return atomic_load(&s->n_signal) == 0;
}

static ern_status open_model(serving *s, bool config_only, bool touch, ern_err *err) {
    ern_model_options mo = {.dir = s->l.model_dir,
                            .config_name = options_text(s->o, "model-config-name"),
                            .config_only = config_only,
                            .quant = ern_quant_any(&s->l.quant) ? &s->l.quant : NULL,
                            .plan_only = !touch,
                            .touch = touch,
                            .progress = on_progress,
                            .ud = s};
    ERN_TRY(ern_model_open(&s->model, &mo, err));
    s->l.engine.model = s->model;
    return ERN_OK;
}

/* config.json alone, for the checks that must not wait for weights. */
static ern_status check_config(serving *s, ern_err *err) {
    ERN_TRY(open_model(s, true, false, err));
    ern_status status = launch_check_config(&s->l, &s->model->config, err);
    s->config = s->model->config;
    if (status == ERN_OK) report_unknown_keys(s->model->unknown_keys);
    ern_model_close(s->model);
    s->model = NULL;
    return status;
}

/* Every connection is a descriptor, two while it is answered, and once they run out new clients wait unheard, those of
 * /health too. The usual soft limit of 1024 is below what --max-concurrency's default needs, so ours is the hard one.
 */
static void raise_open_files(const serving *s) {
    struct rlimit lim;
    if (getrlimit(RLIMIT_NOFILE, &lim) != 0) return;
    struct rlimit wish = {.rlim_cur = lim.rlim_max == RLIM_INFINITY ? 1 << 20 : lim.rlim_max, .rlim_max = lim.rlim_max};
    if (wish.rlim_cur > lim.rlim_cur && setrlimit(RLIMIT_NOFILE, &wish) == 0) lim = wish;
    rlim_t need = 2 * (rlim_t)s->l.server.max_concurrency + 128;
    if (lim.rlim_cur >= need) return;
    ern_log(ERN_LOG_WARN, "serve.open_files",
            "limit=%llu need=%llu why=\"--max-concurrency %d needs more open files than this process may have, and "
            "clients beyond them wait; raise the hard limit (ulimit -Hn %llu) or lower --max-concurrency\"",
            (unsigned long long)lim.rlim_cur, (unsigned long long)need, s->l.server.max_concurrency,
            (unsigned long long)need);
}

/* The tokenizer, the chat format it speaks, and whether they and the model belong together. */
static ern_status open_text(serving *s, ern_err *err) {
    ERN_TRY(ern_tokenizer_open(&s->tokenizer, s->l.tokenizer_path, err));
    ERN_TRY(ern_chat_format_pick(&s->format, s->tokenizer, s->l.model_dir, s->l.chat_format, err));
    ERN_TRY(launch_check_text(&s->l, &s->config, s->tokenizer, s->format, err));
    report_ignored_by_format(s->o, s->format);
    return ERN_OK;
}

/* Listen. Whatever is wrong with the address is wrong usage to the one who started us: exit code 2. */
static ern_status listen_at_once(serving *s, ern_err *err) {
    ern_buf_init(&s->config_info, 1 << 20);
    options_print_json(s->o, &s->config_info);
    s->l.server.config_info_json = s->config_info.data;
    ern_status status = ern_server_open(&s->server, &s->l.server, err);
    if (status != ERN_OK) {
        err->code = ERN_ERR_USAGE;
        return ERN_ERR_USAGE;
    }
    bool v6 = strchr(s->l.host, ':') != NULL, any = strcmp(s->l.host, "0.0.0.0") == 0 || strcmp(s->l.host, "::") == 0;
    (void)snprintf(s->url, sizeof s->url, "http://%s%s%s:%d", v6 && !any ? "[" : "", any ? "127.0.0.1" : s->l.host,
                   v6 && !any ? "]" : "", ern_server_port(s->server));
    ern_log(ERN_LOG_INFO, "serve.listen", "url=%s pid=%d", s->url, (int)getpid());
    return ERN_OK;
}

/* Every tensor's place and shape, and whether the KV cache fits: known in milliseconds, so not after reading gigabytes.
 */
static ern_status plan(serving *s, ern_engine_plan *out, ern_err *err) {
    launch_take_model(&s->l, s->o, s->model);
    ern_status status = launch_fit_memory(&s->l, s->model, err);
    if (status == ERN_ERR_UNSUPPORTED && s->l.backend_auto && launch_on_gpu(&s->l)) {
        ern_log(ERN_LOG_WARN, "serve.backend", "asked=auto found=cpu why=\"%s\"", err->text);
        ERN_TRY(launch_leave_gpu(&s->l, s->o, s->model, err));
        status = launch_fit_memory(&s->l, s->model, err);
    }
    ERN_TRY(status);
    ERN_TRY(launch_plan(&s->l, out, err));
    report_missing_mtp(s->model);
    return ERN_OK;
}

static ern_status check_plan(serving *s, ern_err *err) {
    ern_engine_plan p;
    ERN_TRY(open_model(s, false, false, err));
    ern_status status = plan(s, &p, err);
    ern_model_close(s->model);
    s->model = NULL;
    return status;
}

/* A quantized checkpoint is served as it is, whatever the flags say (so does FastDeploy). */
static void say_own_quantization(const serving *s) {
    char asked[ERN_QUANT_TEXT_BYTES], found[ERN_QUANT_TEXT_BYTES];
    if (!s->l.quant_asked || memcmp(&s->l.quant, &s->model->quant, sizeof s->l.quant) == 0) return;
    ern_log(ERN_LOG_WARN, "serve.quantization",
            "asked=\"%s\" found=\"%s\" why=\"the checkpoint is quantized, and its quantization_config wins\"",
            ern_quant_text(asked, &s->l.quant), ern_quant_text(found, &s->model->quant));
}

/* What the blocks on disk belong to. */
static ern_status mark_store(serving *s, ern_err *err) {
    int64_t from_us = ern_now_us();
    uint8_t *f = s->l.engine.fingerprint;
    ERN_TRY(fingerprint_make(f, &s->l.engine, s->l.config_name, err));
    char hex[33];
    for (int i = 0; i < 16; i++) (void)snprintf(hex + 2 * (size_t)i, 3, "%02x", f[i]);
    ern_log(ERN_LOG_INFO, "serve.store", "dir=%s fingerprint=%s us=%lld", s->l.engine.store_dir, hex,
            (long long)(ern_now_us() - from_us));
    return ERN_OK;
}

static ern_status load(serving *s, ern_err *err) {
    ERN_TRY(open_text(s, err));
    ERN_TRY(check_plan(s, err));
    ERN_TRY(open_model(s, false, true, err));
    say_own_quantization(s);
    if (s->l.engine.store_dir) ERN_TRY(mark_store(s, err));
    s->l.engine.backend_options.progress = on_progress;
    s->l.engine.backend_options.ud = s;
    ERN_TRY(ern_engine_open(&s->engine, &s->l.engine, err));
    return ern_server_attach(s->server, s->engine, s->tokenizer, s->format, &s->model->config, err);
}

/* ---- running --------------------------------------------------------------------------------------------------- */

/* Until a signal comes or the backend fails. */
static ern_status run(serving *s, ern_err *err) {
    report_numbers numbers = {.at_us = ern_now_us()};
    struct timespec until;
    (void)clock_gettime(CLOCK_MONOTONIC, &until); /* the wall clock may be set while we run */
    for (int seconds = 1;; seconds++) {
        until.tv_sec++;
        if (sem_clockwait(&s->signalled, CLOCK_MONOTONIC, &until) == 0) return ERN_OK;
        if (errno == EINTR) continue;
        ern_engine_stats stats;
        ern_engine_stats_read(s->engine, &stats);
        if (stats.failed) return ERN_FAIL(err, ERN_ERR_DEVICE, "the backend failed: %s", ern_engine_error(s->engine));
        if (seconds % STATS_EVERY_S == 0) report_stats(&numbers, s->engine);
    }
}

static void drain(serving *s) {
    ern_log(ERN_LOG_INFO, "serve.drain", "seconds=%d again=\"a second signal stops at once\"", s->l.server.drain_s);
    report_state(s->envp, "STOPPING=1");
    set_draining(s, true);
    if (atomic_load(&s->n_signal) > 1) ern_server_hurry(s->server);
    ern_server_drain(s->server);
}

static void close_all(serving *s) {
    console_bar_close(&s->bar);
    set_draining(s, false); /* from here on a further signal ends the process: closing waits for the step that runs */
    ern_server_close(s->server);
    if (s->engine) ern_engine_close(s->engine);
    ern_tokenizer_close(s->tokenizer);
    ern_model_close(s->model);
    ern_buf_free(&s->config_info);
    stop_watching(s);
}

static ern_status serve(serving *s, ern_err *err) {
    ERN_TRY(report_open_log(&s->l, err)); /* before any thread */
    ERN_TRY(start_watching(s, err));
    report_ignored(&s->l, s->o, s->envp);
    raise_open_files(s);
    ERN_TRY(check_config(s, err));
    ERN_TRY(listen_at_once(s, err));
    ern_status status = load(s, err);
    console_bar_close(&s->bar);
    if (status == ERN_ERR_CANCELLED && atomic_load(&s->n_signal)) {
        ern_log(ERN_LOG_INFO, "serve.end", "why=\"stopped while loading\"");
        return ERN_OK;
    }
    ERN_TRY(status);
    report_ready(&s->l, s->o, s->model, ern_engine_plan_of(s->engine), s->format, s->url, s->envp);
    status = run(s, err);
    drain(s);
    ern_log(ERN_LOG_INFO, "serve.end", "dropped_log_lines=%llu", (unsigned long long)ern_log_dropped());
    return status;
}

/* --print-config, --check-config, --dry-run: say something and end. The two checks are the start itself, up to the port
 * and the weights' bytes: what passes here does not fail there for a reason that could be known. */
static ern_status show(serving *s, ern_err *err) {
    if (options_flag(s->o, "print-config")) {
        ern_buf b;
        ern_buf_init(&b, 1 << 20);
        options_print_yaml(s->o, &b);
        (void)fwrite(b.data, 1, b.len, stdout);
        ern_buf_free(&b);
        return ERN_OK;
    }
    ERN_TRY(report_open_log(&s->l, err));
    report_ignored(&s->l, s->o, s->envp);
    ERN_TRY(check_config(s, err));
    ERN_TRY(open_text(s, err));
    ern_engine_plan p;
    ERN_TRY(open_model(s, false, false, err));
    ERN_TRY(plan(s, &p, err));
    if (options_flag(s->o, "check-config"))
        (void)printf("the flags and the config of %s are good; whether the port is free was not tried\n",
                     s->l.model_dir);
    else
        report_plan(&s->l, s->model, &p);
    return ERN_OK;
}

static ern_status show_only(serving *s, ern_err *err) {
    ERN_TRY(show(s, err));
    if (fflush(stdout) == 0 && !ferror(stdout)) return ERN_OK;
    return ERN_FAIL(err, ERN_ERR_FILE, "cannot write to standard output: %s", strerror(errno));
}

int cmd_serve(int argc, char **argv, char **envp) {
    options o;
    int exit_code;
    if (!command_begin(&o, CMD_SERVE, argc, argv, envp, &exit_code)) return exit_code;
    static serving s = {.server_lock = PTHREAD_MUTEX_INITIALIZER}; /* outlives every thread that may look at it */
    s.o = &o;
    s.envp = envp;
    console_bar_open(&s.bar);
    bool only = options_flag(&o, "print-config") || options_flag(&o, "check-config") || options_flag(&o, "dry-run");
    ern_err err;
    ern_status status = launch_check(&s.l, &o, &err);
    if (status == ERN_OK) status = only ? show_only(&s, &err) : serve(&s, &err);
    close_all(&s);
    exit_code = status == ERN_OK ? 0 : command_fail(&err);
    ern_log_close();
    options_close(&o);
    return exit_code;
}
