/* What `ernest serve` tells people and their scripts. See serve_report.h. */
#include "cli/serve_report.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/os.h"
#include "cli/console.h"

/* A folder and the folders above it. */
static ern_status make_folders(const char *path, ern_err *err) {
    char part[1024];
    size_t len = strlen(path);
    bool fits = len < sizeof part;
    for (size_t i = 1; fits && i <= len; i++) {
        if (path[i] != '/' && path[i]) continue;
        memcpy(part, path, i);
        part[i] = 0;
        if (mkdir(part, 0755) == 0 || errno == EEXIST || i < len) continue; /* the last one says what is wrong */
        return ERN_FAIL(err, ERN_ERR_FILE, "FD_LOG_DIR=%.200s: cannot make the folder: %s; name a writable one", path,
                        strerror(errno));
    }
    return fits ? ERN_OK : ERN_FAIL(err, ERN_ERR_FILE, "FD_LOG_DIR is longer than %zu bytes", sizeof part - 1);
}

ern_status report_open_log(const launch *l, ern_err *err) {
    char path[1280];
    if (!l->log_dir) return ern_log_open(l->log_level, NULL, err);
    ERN_TRY(make_folders(l->log_dir, err));
    ERN_TRY(ern_path_join(path, sizeof path, l->log_dir, "fastdeploy.log", err));
    return ern_log_open(l->log_level, path, err);
}

/* Variables of FastDeploy's that do not begin with FD_ and that the table does not have; a last '_' stands for all that
 * begin so. */
static bool is_fastdeploys(const char *text, size_t len) {
    static const char *const name[] = {"FD_",
                                       "FLAGS_",
                                       "SOT_",
                                       "TRACES_ENABLE",
                                       "TRACES_EXPORTER",
                                       "EXPORTER_OTLP_ENDPOINT",
                                       "EXPORTER_OTLP_HEADERS",
                                       "MAX_PREFILL_NUM",
                                       "PREFILL_CONTINUOUS_REQUEST_DECODE_RESOURCES",
                                       "PREFILL_NODE_ONE_STEP_STOP",
                                       "KVCACHE_RDMA_NICS",
                                       "SPECULATE_VERIFY_USE_TOPK",
                                       "SPECULATE_VERIFY_USE_TARGET_SAMPLING"};
    for (size_t i = 0; i < sizeof name / sizeof name[0]; i++) {
        size_t n = strlen(name[i]);
        if (strncmp(text, name[i], n) == 0 && (name[i][n - 1] == '_' || n == len)) return true;
    }
    return false;
}

static void say_ignored(const char *title, const char *why) {
    ern_log(ERN_LOG_WARN, "serve.ignored", "option=%s why=\"%s\"", title, why);
}

static void report_unknown(char **envp) {
    for (char **e = envp; e && *e; e++) {
        size_t len = strcspn(*e, "=");
        bool known = !is_fastdeploys(*e, len);
        for (int i = 0; !known && i < option_count; i++) {
            const char *name = option_table[i].env;
            known = name && strlen(name) == len && strncmp(*e, name, len) == 0;
        }
        char title[128];
        (void)snprintf(title, sizeof title, "%.*s", (int)(len < 120 ? len : 120), *e);
        if (!known) say_ignored(title, "ernest does not know this variable");
    }
}

/* Those that work, but not with what else was given. */
static void report_no_effect(const launch *l, const options *o) {
    bool ref = strcmp(l->backend_name, "ref") == 0, cache = l->engine.prefix_cache, gpu = launch_on_gpu(l);
    const char *graphs = options_text(o, "graph-optimization-config");
    bool no_key = graphs && !strstr(graphs, "\"use_cudagraph\"");
    static const char no_cache[] = "the prefix cache is off (--no-enable-prefix-caching)";
    static const char no_gpu[] = "it steers a GPU, and none computes here";
    static const char one_thread[] = "the reference computes on one thread, in plain C";
    static const char on_gpu[] = "it is about processors, and a GPU computes";
    const struct {
        const char *name;
        bool off;
        const char *why;
    } row[] = {
        {"FD_MAX_STOP_SEQS_NUM", !l->server.strict_fastdeploy, "it is a limit of --strict-fastdeploy"},
        {"FD_STOP_SEQS_MAX_LEN", !l->server.strict_fastdeploy, "it is a limit of --strict-fastdeploy"},
        {"threads", ref || gpu, ref ? one_thread : on_gpu},
        {"cpu-level", ref || gpu, ref ? one_thread : on_gpu},
        {"use-cudagraph", !gpu, no_gpu},
        {"graph-optimization-config", !gpu || no_key,
         gpu ? "of its keys, use_cudagraph alone means something here" : no_gpu},
        {"CUDA_VISIBLE_DEVICES", !gpu, no_gpu},
        {"kv-cache-ratio", !l->engine.reserve_all,
         "it is the V0 scheduler's (ENABLE_V1_KVCACHE_SCHEDULER=0); the default one hands pages out on demand"},
        {"long-prefill-token-threshold", !l->engine.max_long_partial,
         "it says which prompts --max-long-partial-prefills counts, and that is not given"},
        {"gpu-memory-utilization", options_given(o, "memory"), "--memory says how much to use"},
        {"swap-space", !cache && options_real(o, "swap-space") > 0, no_cache},
        {"enable-output-caching", !cache && options_flag(o, "enable-output-caching"), no_cache},
        {"share-prefix-cache-across-keys", !cache && l->server.share_cache, no_cache},
    };
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        char title[64];
        bool variable = row[i].name[0] < 'a';
        (void)snprintf(title, sizeof title, "%s%s", variable ? "" : "--", row[i].name);
        if (row[i].off && options_given(o, row[i].name)) say_ignored(title, row[i].why);
    }
}

void report_ignored(const launch *l, const options *o, char **envp) {
    report_unknown(envp);
    for (int i = 0; i < option_count; i++) {
        const option *p = &option_table[i];
        if (p->state != OPTION_IGNORED || !o->value[i].n) continue;
        char title[128];
        option_title(p, title, sizeof title);
        say_ignored(title, p->why);
    }
    report_no_effect(l, o);
}

void report_ignored_by_format(const options *o, ern_chat_format f) {
    static const char *const parser[] = {"reasoning-parser", "tool-call-parser"};
    for (int i = 0; i < 2 && !ern_chat_format_reasons(f); i++) {
        char title[32];
        (void)snprintf(title, sizeof title, "--%s", parser[i]);
        if (options_given(o, parser[i])) say_ignored(title, "this model's chat format has no reasoning and no tools");
    }
}

void report_unknown_keys(const char *keys) {
    for (const char *at = keys; *at;) {
        int n = (int)strcspn(at, " ");
        ern_log(ERN_LOG_WARN, "serve.config", "key=%.*s why=\"ernest does not know this key of config.json\"", n, at);
        at += n + (at[n] == ' ');
    }
}

void report_missing_mtp(const ern_model *m) {
    if (m->config.n_mtp > 0 && !m->has_mtp)
        ern_log(ERN_LOG_WARN, "serve.mtp",
                "why=\"config.json announces %d MTP layer (num_nextn_predict_layers) and the files hold none\"",
                m->config.n_mtp);
}

/* The options in force as a Python dict: JSON but for the spelling of true, false and null. */
static void print_python(const options *o, ern_buf *out) {
    static const struct {
        const char *json, *python;
    } word[] = {{"true", "True"}, {"false", "False"}, {"null", "None"}};
    ern_buf json;
    ern_buf_init(&json, 1 << 20);
    options_print_json(o, &json);
    bool quoted = false;
    for (size_t i = 0; i < json.len; i++) {
        const char *at = json.data + i;
        size_t k = 0;
        while (k < 3 && (quoted || strncmp(at, word[k].json, strlen(word[k].json)) != 0)) k++;
        if (k < 3) {
            (void)ern_buf_text(out, word[k].python);
            i += strlen(word[k].json) - 1;
            continue;
        }
        if (*at == '\\')
            (void)ern_buf_add(out, at++, 1), i++;
        else if (*at == '"')
            quoted = !quoted;
        (void)ern_buf_add(out, at, 1);
    }
    ern_buf_free(&json);
}

/* FastDeploy's front writes api_server.log; deployment scripts read the flags from its "args:" line. */
static void write_api_log(const launch *l, const options *o, const char *url) {
    char path[1280];
    ern_err err;
    if (!l->log_dir || ern_path_join(path, sizeof path, l->log_dir, "api_server.log", &err) != ERN_OK) return;
    FILE *f = fopen(path, "ae");
    if (!f) {
        ern_log(ERN_LOG_WARN, "serve.log", "why=\"cannot write %s: %s\"", path, strerror(errno));
        return;
    }
    ern_buf args;
    ern_buf_init(&args, 1 << 20);
    print_python(o, &args);
    char metrics[160];
    (void)snprintf(metrics, sizeof metrics, "%s", url);
    char *port = strrchr(metrics, ':');
    if (port && l->server.metrics_port > 0)
        (void)snprintf(port, sizeof metrics - (size_t)(port - metrics), ":%d", l->server.metrics_port);
    (void)fprintf(
        f,
        "args: %s\nLaunching metrics service at %s/metrics\nLaunching chat completion service at "
        "%s/v1/chat/completions\nLaunching completion service at %s/v1/completions\nApplication startup complete.\n",
        args.data ? args.data : "{}", metrics, url, url);
    (void)fclose(f);
    ern_buf_free(&args);
}

static void print_weights(const ern_model *m, const ern_engine_plan *p) {
    char all[32], owned[32], rest[32], copies[32], format[ERN_QUANT_TEXT_BYTES];
    (void)console_bytes(all, m->weight_bytes);
    (void)console_bytes(copies, p->backend.weight_bytes);
    (void)ern_quant_text(format, &m->quant);
    if (m->owned_bytes)
        (void)printf("weights   %s, %s: %s quantized while loading, %s mapped; %s of copies\n", all, format,
                     console_bytes(owned, m->owned_bytes), console_bytes(rest, p->mapped_weight_bytes), copies);
    else
        (void)printf("weights   %s mapped, %s; %s of copies\n", all, format, copies);
}

static void print_kv(const launch *l, const ern_engine_plan *p) {
    char kv[32], prompts[48] = "", room[48] = "";
    const int32_t taken = (int32_t)(p->kv_bytes / p->backend.page_bytes);
    if (taken > p->n_page) (void)snprintf(room, sizeof room, " with room for %d", taken);
    if (l->engine.reserve_all) (void)snprintf(prompts, sizeof prompts, "; %d for prompts", launch_prompt_pages(l, p));
    (void)printf("kv cache  %lld tokens: %d pages of 64, %s%s%s\n", (long long)p->kv_tokens, p->n_page,
                 console_bytes(kv, p->kv_bytes), room, prompts);
}

/* Nothing where there is no tier below the pool. */
static void print_tiers(const launch *l, const ern_engine_plan *p) {
    char host[32], disk[32];
    if (l->engine.swap_bytes)
        (void)printf("host tier %lld tokens: %d pages, %s\n",
                     (long long)p->n_host_page * l->engine.backend_options.n_page_cell, p->n_host_page,
                     console_bytes(host, p->host_bytes));
    if (l->engine.store_dir)
        (void)printf("disk tier %llu pages at most, %s in %s\n",
                     (unsigned long long)(l->engine.store_bytes / p->backend.page_bytes),
                     console_bytes(disk, l->engine.store_bytes), l->engine.store_dir);
}

static void print_at_once(const launch *l, const ern_engine_plan *p) {
    (void)printf("at once   %.1f requests of %d tokens fit; at most %d run together\n", p->full_concurrency,
                 l->engine.max_model_len, l->engine.max_num_seqs);
}

/* Of the memory that the plan is about. */
static void print_total(const ern_model *m, const ern_engine_plan *p) {
    char total[32], all[32], free_now[32];
    const ern_backend_plan *b = &p->backend;
    if (b->memory_all_bytes)
        (void)printf("total     %s of the GPU's memory, which is %s, %s of it free\n",
                     console_bytes(total, p->kv_bytes + b->weight_bytes + b->scratch_bytes),
                     console_bytes(all, b->memory_all_bytes), console_bytes(free_now, b->memory_free_bytes));
    else
        (void)printf("total     %s beside the mapped weights; this machine has %s, %s of it available\n",
                     console_bytes(total, p->total_bytes + m->owned_bytes),
                     console_bytes(all, ern_memory_total_bytes()),
                     console_bytes(free_now, ern_memory_available_bytes()));
}

void report_plan(const launch *l, const ern_model *m, const ern_engine_plan *p) {
    char scratch[32], tables[32];
    uint64_t rest = p->total_bytes - p->kv_bytes - p->host_bytes - p->backend.weight_bytes - p->backend.scratch_bytes;
    (void)printf("model     %s\n", l->model_dir);
    print_weights(m, p);
    print_kv(l, p);
    print_tiers(l, p);
    (void)printf("scratch   %s\n", console_bytes(scratch, p->backend.scratch_bytes));
    (void)printf("tables    %s of requests and replies on their way\n", console_bytes(tables, rest));
    print_total(m, p);
    print_at_once(l, p);
}

static void print_device(const launch *l, const ern_engine_plan *p) {
    char line[200];
    int threads = l->engine.backend_options.n_thread ? l->engine.backend_options.n_thread : ern_cpu_count();
    bool ref = strcmp(l->backend_name, "ref") == 0;
    if (ern_backend_device(l->backend_name, line, sizeof line))
        (void)printf("device    %s: %s backend, %s\n", line, l->backend_name, p->backend.kernels);
    else
        (void)printf("threads   %d, %s backend, %s\n", ref ? 1 : threads, l->backend_name, p->backend.kernels);
}

static void print_summary(const launch *l, const ern_model *m, const ern_engine_plan *p, ern_chat_format f,
                          const char *url) {
    const ern_config *c = &m->config;
    char experts[64] = "dense";
    if (c->n_expert) (void)snprintf(experts, sizeof experts, "%d experts, %d used", c->n_expert, c->n_expert_used);
    (void)printf("model     %s: %d layers, %s, %s layout\n", l->model_name, c->n_layer, experts,
                 m->is_paddle ? "Paddle" : "PyTorch");
    (void)printf("format    %s\n", ern_chat_format_name(f));
    print_weights(m, p);
    print_kv(l, p);
    print_tiers(l, p);
    print_at_once(l, p);
    print_device(l, p);
    (void)printf("address   %s/v1%s\n", url,
                 launch_is_public(l) ? "" : " (this machine only; --host 0.0.0.0 opens it)");
    (void)printf("try       curl %s/v1/chat/completions -H 'Content-Type: application/json' -d "
                 "'{\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'\n",
                 url);
    (void)fflush(stdout);
}

void report_state(char **envp, const char *state) {
    const char *path = NULL;
    for (char **e = envp; e && *e; e++)
        if (strncmp(*e, "NOTIFY_SOCKET=", 14) == 0) path = *e + 14;
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    size_t len = path ? strlen(path) : 0;
    if (len == 0 || len >= sizeof to.sun_path || (path[0] != '/' && path[0] != '@')) return;
    memcpy(to.sun_path, path, len);
    if (path[0] == '@') to.sun_path[0] = 0;
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return;
    socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len);
    if (sendto(fd, state, strlen(state), MSG_NOSIGNAL, (struct sockaddr *)&to, size) < 0)
        ern_log(ERN_LOG_WARN, "serve.notify", "why=\"%s\"", strerror(errno));
    (void)close(fd);
}

void report_ready(const launch *l, const options *o, const ern_model *m, const ern_engine_plan *p, ern_chat_format f,
                  const char *url, char **envp) {
    print_summary(l, m, p, f, url);
    write_api_log(l, o, url);
    ern_log(ERN_LOG_INFO, "serve.backend", "name=%s kernels=\"%s\"", l->backend_name, p->backend.kernels);
    if (strcmp(l->backend_name, "cpu") == 0 && ern_cpu_amx_refused())
        ern_log(ERN_LOG_WARN, "serve.amx", "why=\"%s\"", ern_cpu_amx_refused());
    ern_log(ERN_LOG_INFO, "serve.pages", "Reset block num, the total_block_num:%d, prefill_kvcache_block_num:%d",
            p->n_page, launch_prompt_pages(l, p));
    if (launch_is_public(l) && l->server.n_api_key == 0)
        ern_log(ERN_LOG_WARN, "serve.open",
                "why=\"%s is open to the network and asks for no key; set --api-key or FD_API_KEY\"", l->host);
    ern_log(ERN_LOG_INFO, "serve.ready", "url=%s msg=\"Application startup complete\"", url);
    report_state(envp, "READY=1");
    if (l->ready_fd < 0) return;
    char line[160];
    int n = snprintf(line, sizeof line, "%s\n", url);
    if (write(l->ready_fd, line, (size_t)n) != n)
        ern_log(ERN_LOG_WARN, "serve.ready_fd", "why=\"%s\"", strerror(errno));
    (void)close(l->ready_fd);
}

void report_stats(report_numbers *r, ern_engine *e) {
    ern_engine_stats now;
    ern_engine_stats_read(e, &now);
    int64_t at_us = ern_now_us();
    double seconds = (double)(at_us - r->at_us) / 1e6;
    bool moved = now.n_prompt_token != r->then.n_prompt_token || now.n_output_token != r->then.n_output_token;
    if (moved && seconds > 0)
        ern_log(ERN_LOG_INFO, "serve.stats",
                "running=%d waiting=%d prompt_tok_s=%.1f output_tok_s=%.1f kv_use=%.3f preempted=%llu cached_tok=%llu",
                now.n_running, now.n_waiting, (double)(now.n_prompt_token - r->then.n_prompt_token) / seconds,
                (double)(now.n_output_token - r->then.n_output_token) / seconds,
                now.n_page ? 1 - (double)(now.n_page_free + now.n_page_cached) / (double)now.n_page : 0.0,
                (unsigned long long)(now.n_preempted - r->then.n_preempted),
                (unsigned long long)(now.n_cached_token - r->then.n_cached_token));
    *r = (report_numbers){.at_us = at_us, .then = now};
}
