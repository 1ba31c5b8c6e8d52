/* The start-up checks. See launch.h. */
#include "cli/launch.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/jsonr.h"
#include "base/os.h"
#include "cli/command.h"

enum {
    PAGE_CELLS = 64,
    STEP_TOKENS = 512,
    STEP_TOKENS_GPU = 8192,
    QUEUE_MAX = 4096,
    STOP_MAX = 16,
    STOP_BYTES = 1024,
    LONG_PROMPT_PART = 25, /* of the context: FastDeploy's 0.04 */
    ITL_TIMES_GPU = 3,
};
#define GIB 1073741824.0

static uint64_t to_bytes(double gib) { return (uint64_t)(gib * GIB); }

static bool is_name(const char *text, const char *name) { return strcmp(text, name) == 0; }

/* ---- capacity and scheduling ------------------------------------------------------------------------------------- */

static ern_status pick_backend(const launch *l, const options *o, const ern_backend_ops **out, ern_err *err) {
    if (!l->gpu_left) return command_backend(o, out, err);
    *out = ern_backend_find("cpu");
    return ERN_OK;
}

/* FastDeploy takes 8192 tokens per step; on a CPU such a step would last so long that running replies stall and a
 * cancel waits, so there the default is small. The results do not depend on it. */
static int64_t default_step(const launch *l, const options *o, int64_t len, int64_t seqs, bool chunks) {
    const ern_backend_ops *backend;
    bool gpu = pick_backend(l, o, &backend, NULL) == ERN_OK && is_name(backend->name, "cuda");
    int64_t most = len * seqs, step = !chunks ? len : gpu ? STEP_TOKENS_GPU : STEP_TOKENS;
    if (step < seqs) step = seqs;
    return step < most ? step : most;
}

static ern_status check_step(int64_t step, int64_t len, int64_t seqs, bool chunks, ern_err *err) {
    int64_t most = len * seqs, least = chunks ? PAGE_CELLS : len;
    if (least > most) least = most;
    if (step < seqs)
        return ERN_FAIL(
            err, ERN_ERR_USAGE,
            "--max-num-batched-tokens is %lld and must be at least --max-num-seqs (%lld); raise the one or lower "
            "the other",
            (long long)step, (long long)seqs);
    if (step > most)
        return ERN_FAIL(
            err, ERN_ERR_USAGE,
            "--max-num-batched-tokens is %lld and must be at most --max-model-len x --max-num-seqs (%lld x %lld "
            "= %lld); lower it",
            (long long)step, (long long)len, (long long)seqs, (long long)most);
    if (step < least)
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--max-num-batched-tokens is %lld and must be at least %lld (%s); raise it or leave it out",
                        (long long)step, (long long)least,
                        chunks ? "one KV page" : "--max-model-len, because chunked prefill is off");
    return ERN_OK;
}

/* FastDeploy's V1 scheduler ignores these three, and their defaults of 1 would let short prompts wait behind a long
 * one: they hold when they are given. */
static ern_status check_partial(launch *l, const options *o, bool chunks, ern_err *err) {
    ern_engine_options *e = &l->engine;
    int64_t len = e->max_model_len, threshold = options_int(o, "long-prefill-token-threshold");
    if (options_given(o, "max-num-partial-prefills"))
        e->max_partial = (int32_t)options_int(o, "max-num-partial-prefills");
    if (options_given(o, "max-long-partial-prefills"))
        e->max_long_partial = (int32_t)options_int(o, "max-long-partial-prefills");
    if (e->max_partial && e->max_long_partial > e->max_partial)
        return ERN_FAIL(
            err, ERN_ERR_USAGE,
            "--max-long-partial-prefills is %d and must be at most --max-num-partial-prefills (%d); lower it",
            e->max_long_partial, e->max_partial);
    if (e->max_partial > 1 && !chunks)
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--max-num-partial-prefills is %d, and above 1 it needs chunked prefill; give "
                        "--enable-chunked-prefill",
                        e->max_partial);
    if (threshold > len)
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--long-prefill-token-threshold is %lld and must be at most --max-model-len (%lld); lower it",
                        (long long)threshold, (long long)len);
    if (!e->max_long_partial) return ERN_OK;
    e->long_prompt_tokens = (int32_t)(threshold ? threshold : len / LONG_PROMPT_PART);
    if (e->long_prompt_tokens < 1) e->long_prompt_tokens = 1; /* 0 would mean that none is long */
    return ERN_OK;
}

static int64_t to_us(double v, double unit_us) { return (int64_t)(v * unit_us + 0.5); }

/* Who runs when, and who is refused at the door. */
static ern_status check_rules(launch *l, const options *o, bool chunks, ern_err *err) {
    ern_engine_options *e = &l->engine;
    ERN_TRY(check_partial(l, o, chunks, err));
    e->reserve_all = !options_flag(o, "ENABLE_V1_KVCACHE_SCHEDULER");
    if (e->reserve_all) e->prompt_share = options_real(o, "kv-cache-ratio");
    e->itl_target_us = to_us(options_real(o, "itl-target-ms"), 1e3);
    if (options_given(o, "itl-max-times")) e->itl_times = options_real(o, "itl-max-times");
    if (e->itl_times > 0 && e->itl_times < 1)
        return ERN_FAIL(
            err, ERN_ERR_USAGE,
            "--itl-max-times is %s, and a step with a piece of a prompt takes longer than one without; give "
            "1.1 or more, or 0 for no bound",
            options_text(o, "itl-max-times"));
    if (e->itl_times > 0 && !chunks)
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--itl-max-times is %s, and it makes pieces of prompts smaller, which chunked prefill makes; "
                        "give --enable-chunked-prefill or leave the flag out",
                        options_text(o, "itl-max-times"));
    if (e->itl_target_us && !chunks)
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--itl-target-ms is %s, and it makes pieces of prompts smaller, which chunked prefill makes; "
                        "give --enable-chunked-prefill or leave the flag out",
                        options_text(o, "itl-target-ms"));
    int64_t queue = options_int(o, "scheduler-max-size");
    e->queue_max = queue > 0 ? (int32_t)queue : QUEUE_MAX;
    e->queue_prompt_max = options_int(o, "max-queue-prompt-tokens");
    e->queue_bytes = (uint64_t)options_int(o, "max-queue-mib") << 20;
    e->queue_wait_us = to_us(options_real(o, "max-queue-wait-s"), 1e6);
    return ERN_OK;
}

static ern_status check_capacity(launch *l, const options *o, ern_err *err) {
    int64_t len = options_int(o, "max-model-len"), seqs = options_int(o, "max-num-seqs");
    bool chunks = options_flag(o, "enable-chunked-prefill");
    bool own_step = options_given(o, "max-num-batched-tokens");
    int64_t step = own_step ? options_int(o, "max-num-batched-tokens") : default_step(l, o, len, seqs, chunks);
    ERN_TRY(check_step(step, len, seqs, chunks, err));
    int64_t pages = options_given(o, "num-gpu-blocks-override") ? options_int(o, "num-gpu-blocks-override") : 0;
    uint64_t memory = options_given(o, "memory") ? to_bytes(options_real(o, "memory")) : 0;
    if (!memory && options_given(o, "gpu-memory-utilization"))
        l->memory_share = options_real(o, "gpu-memory-utilization");
    l->engine = (ern_engine_options){
        .max_model_len = (int32_t)len,
        .max_num_seqs = (int32_t)seqs,
        .max_batched_tokens = (int32_t)step,
        .chunked_prefill = chunks,
        .memory_bytes = memory,
        .overlap = true,
        .backend_options = {.n_page = (int32_t)pages,
                            .n_page_cell = PAGE_CELLS,
                            .n_row_max = (int32_t)step,
                            .n_seq_max = (int32_t)seqs,
                            .n_want_max = (int32_t)step,
                            .n_len_max = (int32_t)len,
                            .kv_dtype = command_kv_dtype(o, ERN_KV_CODES_NONE),
                            .level = -1},
    };
    return check_rules(l, o, chunks, err);
}

/* ---- prefix cache ------------------------------------------------------------------------------------------------ */

/* A folder that is there must be one that can be written to; one that is not there is made when it is opened. */
static ern_status check_folder(const char *dir, ern_err *err) {
    struct stat st;
    const char *why = NULL;
    if (stat(dir, &st) != 0) {
        if (errno != ENOENT) why = strerror(errno);
    } else if (!S_ISDIR(st.st_mode)) {
        why = "it is no folder";
    } else if (access(dir, R_OK | W_OK | X_OK) != 0) {
        why = strerror(errno);
    }
    return why ? ERN_FAIL(err, ERN_ERR_USAGE, "--kvcache-storage-dir %.200s: %s; name a folder that can be written to",
                          dir, why)
               : ERN_OK;
}

static ern_status check_store(launch *l, const options *o, ern_err *err) {
    const option_value *dir = options_values(o, "kvcache-storage-dir");
    bool gb = options_given(o, "kvcache-storage-gb");
    if (strcasecmp(options_text(o, "kvcache-storage-backend"), "file") != 0) {
        /* The folder's variable is FastDeploy's, and may be set where it is not used. */
        bool asked = dir->n && dir->source != SOURCE_ENV;
        if (asked || gb)
            return ERN_FAIL(err, ERN_ERR_USAGE,
                            "%s belongs to --kvcache-storage-backend file; give that too, or leave the flag out",
                            asked ? "--kvcache-storage-dir" : "--kvcache-storage-gb");
        return ERN_OK;
    }
    if (!l->engine.prefix_cache)
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--kvcache-storage-backend file keeps the pages of the prefix cache, which "
                        "--no-enable-prefix-caching switches off; leave one of them out");
    if (!dir->n || !gb)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--kvcache-storage-backend file needs %s; give %s",
                        dir->n ? "a limit" : "a folder", dir->n ? "--kvcache-storage-gb" : "--kvcache-storage-dir");
    l->engine.store_dir = options_text(o, "kvcache-storage-dir");
    l->engine.store_bytes = to_bytes(options_real(o, "kvcache-storage-gb"));
    return check_folder(l->engine.store_dir, err);
}

static ern_status check_cache(launch *l, const options *o, ern_err *err) {
    uint64_t swap = to_bytes(options_real(o, "swap-space"));
    if (swap > ern_memory_total_bytes())
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--swap-space is %s GiB and this machine has %.1f GiB; lower it or leave it out",
                        options_text(o, "swap-space"), (double)ern_memory_total_bytes() / GIB);
    bool on = options_flag(o, "enable-prefix-caching");
    l->engine.prefix_cache = on;
    l->engine.cache_output = on && options_flag(o, "enable-output-caching");
    l->engine.swap_bytes = on ? swap : 0;
    return check_store(l, o, err);
}

int32_t launch_prompt_pages(const launch *l, const ern_engine_plan *p) {
    return l->engine.reserve_all ? (int32_t)(p->n_page * l->engine.prompt_share) : p->n_page;
}

void launch_take_model(launch *l, const options *o, const ern_model *m) {
    l->engine.backend_options.kv_dtype = command_kv_dtype(o, m->kv_codes);
}

/* FastDeploy's rule: a share of all of the device's memory, less what is in use there when we come. */
static ern_status fit_gpu(launch *l, const ern_backend_plan *p, ern_err *err) {
    const double all = (double)p->memory_all_bytes, used = all - (double)p->memory_free_bytes;
    if (l->memory_share <= 0) {
        if (l->engine.memory_bytes <= p->memory_free_bytes) return ERN_OK;
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--memory is %.2f GiB and the GPU has %.1f GiB, %.1f GiB of it free; lower it or leave it out",
                        (double)l->engine.memory_bytes / GIB, all / GIB, (all - used) / GIB);
    }
    const double share = all * l->memory_share, weights = (double)(p->weight_bytes + p->scratch_bytes);
    if (share <= used + weights)
        return ERN_FAIL(
            err, ERN_ERR_MEMORY,
            "--gpu-memory-utilization %g of the GPU's %.1f GiB is no more than the %.1f GiB in use there and "
            "%.1f GiB of weights and scratch; raise it, or run a smaller model",
            l->memory_share, all / GIB, used / GIB, weights / GIB);
    l->engine.memory_bytes = (uint64_t)(share - used);
    return ERN_OK;
}

bool launch_on_gpu(const launch *l) { return is_name(l->engine.backend->name, "cuda"); }

ern_status launch_fit_memory(launch *l, const ern_model *m, ern_err *err) {
    if (l->memory_share <= 0 && !launch_on_gpu(l)) return ERN_OK;
    ern_backend_options b = l->engine.backend_options;
    ern_backend_plan p;
    if (b.n_page == 0) b.n_page = 1; /* the pages are what is asked about */
    if (launch_on_gpu(l)) {
        ERN_TRY(l->engine.backend->plan(&p, m, &b, err));
        return fit_gpu(l, &p, err);
    }
    double share = (double)ern_memory_total_bytes() * l->memory_share;
    if (share >= (double)ern_memory_available_bytes() * 0.9) return ERN_OK; /* the engine takes no more by itself */
    ERN_TRY(l->engine.backend->plan(&p, m, &b, err));
    /* The engine is told what it may take beside the weights that stay in memory. */
    uint64_t weights = m->weight_bytes > p.weight_bytes ? m->weight_bytes - p.weight_bytes : 0;
    uint64_t least = weights + p.weight_bytes;
    if (share <= (double)least)
        return ERN_FAIL(err, ERN_ERR_MEMORY,
                        "--gpu-memory-utilization %g of this machine's %.1f GiB is less than the %.1f GiB of weights; "
                        "raise it or leave it out",
                        l->memory_share, (double)ern_memory_total_bytes() / GIB, (double)least / GIB);
    l->engine.memory_bytes = (uint64_t)share - weights;
    return ERN_OK;
}

ern_status launch_plan(const launch *l, ern_engine_plan *out, ern_err *err) {
    ern_status status = ern_engine_plan_make(out, &l->engine, err);
    if (status == ERN_OK) return launch_check_plan(l, out, err);
    size_t n = strlen(err->text);
    if (status == ERN_ERR_MEMORY && l->engine.swap_bytes && !launch_on_gpu(l))
        (void)snprintf(err->text + n, sizeof err->text - n, ", or lower --swap-space, which takes %.2f GiB of it",
                       (double)l->engine.swap_bytes / GIB);
    else if (status == ERN_ERR_MEMORY && l->engine.memory_bytes && l->memory_share > 0)
        (void)snprintf(err->text + n, sizeof err->text - n, ", or raise --gpu-memory-utilization (%g)",
                       l->memory_share);
    return status;
}

ern_status launch_check_plan(const launch *l, const ern_engine_plan *p, ern_err *err) {
    const ern_engine_options *e = &l->engine;
    int32_t prompts = launch_prompt_pages(l, p), need = e->max_model_len / PAGE_CELLS + 2;
    if (e->reserve_all && prompts < need)
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--kv-cache-ratio %g of %d KV pages leaves %d for prompts, and one of --max-model-len %d takes "
                        "%d; raise --kv-cache-ratio or the memory, or lower --max-model-len",
                        e->prompt_share, p->n_page, prompts, e->max_model_len, need);
    if (e->store_dir && e->store_bytes < p->backend.page_bytes)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--kvcache-storage-gb is %g and one KV page takes %.3f GiB; raise it",
                        (double)e->store_bytes / GIB, (double)p->backend.page_bytes / GIB);
    return ERN_OK;
}

/* ---- devices ----------------------------------------------------------------------------------------------------- */

/* CUDA graphs are on unless a flag or the config's key says no. */
static ern_status check_graphs(launch *l, const options *o, ern_err *err) {
    const char *text = options_text(o, "graph-optimization-config");
    l->engine.backend_options.no_graph = !options_flag(o, "use-cudagraph");
    if (!text) return ERN_OK;
    json_t *config;
    ERN_TRY(ern_json_parse(&config, text, strlen(text), 16, "--graph-optimization-config", err));
    const json_t *use = json_object_get(config, "use_cudagraph");
    const bool good = !use || json_is_boolean(use);
    if (json_is_false(use)) l->engine.backend_options.no_graph = true;
    json_decref(config);
    return good ? ERN_OK
                : ERN_FAIL(err, ERN_ERR_USAGE,
                           "use_cudagraph in --graph-optimization-config must be true or false, in %.100s", text);
}

static ern_status check_devices(launch *l, const options *o, ern_err *err) {
    const char *level = options_text(o, "cpu-level");
    ERN_TRY(pick_backend(l, o, &l->engine.backend, err));
    l->backend_auto = is_name(options_text(o, "backend"), "auto");
    l->backend_name = l->engine.backend->name;
    if (launch_on_gpu(l) && l->engine.chunked_prefill && !options_given(o, "itl-max-times"))
        l->engine.itl_times = ITL_TIMES_GPU;
    if (launch_on_gpu(l) && !l->engine.memory_bytes) l->memory_share = options_real(o, "gpu-memory-utilization");
    if (!launch_on_gpu(l) && l->engine.memory_bytes > ern_memory_total_bytes())
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--memory is %s GiB and this machine has %.1f GiB; lower it or leave it out",
                        options_text(o, "memory"), (double)ern_memory_total_bytes() / GIB);
    ERN_TRY(check_graphs(l, o, err));
    int64_t threads = options_int(o, "threads");
    if (threads > ern_cpu_count())
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--threads is %lld and this process may use %d processors; lower it or leave it out",
                        (long long)threads, ern_cpu_count());
    l->engine.backend_options.n_thread = (int32_t)threads;
    if (is_name(level, "auto")) return ERN_OK;
    for (int i = ERN_CPU_PORTABLE; i <= ERN_CPU_AMX; i++)
        if (strcasecmp(level, ern_cpu_level_name((ern_cpu_level)i)) == 0) l->engine.backend_options.level = i;
    if (l->engine.backend_options.level > (int32_t)ern_cpu_level_here())
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--cpu-level %s is above what this processor has (%s)%s%s; give that or leave it out", level,
                        ern_cpu_level_name(ern_cpu_level_here()), ern_cpu_amx_refused() ? ": " : "",
                        ern_cpu_amx_refused() ? ern_cpu_amx_refused() : "");
    return ERN_OK;
}

/* ---- http -------------------------------------------------------------------------------------------------------- */

/* True when a socket can be bound there, whatever the port. */
static bool is_ours(const struct addrinfo *at) {
    int fd = socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool ours = fd >= 0 && bind(fd, at->ai_addr, at->ai_addrlen) == 0;
    if (fd >= 0) (void)close(fd);
    return ours;
}

/* The address, or the first one of a name: kept in numbers, because what is safe to open is decided by them. What looks
 * like numbers and is no address is not asked the network about. */
static ern_status check_host(launch *l, const options *o, ern_err *err) {
    const char *host = options_text(o, "host"), *why = NULL;
    bool numbers = host[strspn(host, "0123456789.")] == 0 || strchr(host, ':');
    struct addrinfo hint = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | (numbers ? AI_NUMERICHOST : 0)};
    struct addrinfo *found = NULL;
    int rc = getaddrinfo(strcasecmp(host, "localhost") == 0 ? "127.0.0.1" : host, NULL, &hint, &found);
    if (rc == 0) {
        rc = getnameinfo(found->ai_addr, found->ai_addrlen, l->host, sizeof l->host, NULL, 0, NI_NUMERICHOST);
        if (rc == 0 && !is_ours(found)) why = "it is not an address of this machine";
        freeaddrinfo(found);
    }
    if (rc != 0) why = gai_strerror(rc);
    if (why)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--host %.60s: %s; give an address or name of this machine, or 127.0.0.1",
                        host, why);
    return ERN_OK;
}

bool launch_is_public(const launch *l) { return strncmp(l->host, "127.", 4) != 0 && strcmp(l->host, "::1") != 0; }

/* A header's value: printable and without blanks. */
static ern_status check_keys(const option_value *keys, ern_err *err) {
    for (int i = 0; i < keys->n; i++)
        for (const char *c = keys->text[i]; *c; c++)
            if (*c <= ' ' || *c > '~')
                return ERN_FAIL(
                    err, ERN_ERR_USAGE,
                    "--api-key number %d holds a blank or a character outside ASCII, which no header can carry", i + 1);
    return ERN_OK;
}

static ern_status check_origins(const option_value *origins, ern_err *err) {
    for (int i = 0; i < origins->n; i++) {
        const char *at = origins->text[i];
        if (is_name(at, "*")) continue;
        size_t scheme = strncmp(at, "http://", 7) == 0 ? 7 : strncmp(at, "https://", 8) == 0 ? 8 : 0;
        if (!scheme || !at[scheme] || strpbrk(at + scheme, "/ ,"))
            return ERN_FAIL(
                err, ERN_ERR_USAGE,
                "--cors-origin %.100s is no origin; give '*' or scheme and host, such as https://app.example", at);
    }
    return ERN_OK;
}

static ern_logprobs_mode logprobs_mode(const char *name) {
    bool logits = strstr(name, "logits") != NULL;
    if (strncmp(name, "processed", 9) == 0) return logits ? ERN_LOGPROBS_PROCESSED_LOGITS : ERN_LOGPROBS_PROCESSED;
    return logits ? ERN_LOGPROBS_RAW_LOGITS : ERN_LOGPROBS_RAW;
}

static ern_status check_http(launch *l, const options *o, ern_err *err) {
    const option_value *keys = options_values(o, "api-key"), *origins = options_values(o, "cors-origin");
    ERN_TRY(check_host(l, o, err));
    ERN_TRY(check_keys(keys, err));
    ERN_TRY(check_origins(origins, err));
    int port = (int)options_int(o, "port");
    int metrics_port = options_given(o, "metrics-port") ? (int)options_int(o, "metrics-port") : -1;
    bool strict = options_flag(o, "strict-fastdeploy");
    if (metrics_port == port) metrics_port = -1; /* FastDeploy: the same number means the shared port */
    l->server = (ern_server_options){
        .host = l->host,
        .port = port,
        .metrics_port = metrics_port,
        .api_key = (const char *const *)keys->text,
        .n_api_key = keys->n,
        .cors_origin = (const char *const *)origins->text,
        .n_cors_origin = origins->n,
        .served_model_name = options_text(o, "served-model-name"),
        .model_path = l->model_name,
        .max_concurrency = (int)options_int(o, "max-concurrency"),
        .max_logprobs = (int)options_int(o, "max-logprobs"),
        .logprobs_mode = logprobs_mode(options_text(o, "logprobs-mode")),
        .enable_logprob = options_given(o, "enable-logprob") ? options_flag(o, "enable-logprob") : !strict,
        .strict_fastdeploy = strict,
        .share_cache = options_flag(o, "share-prefix-cache-across-keys"),
        .debug_endpoints = options_flag(o, "enable-debug-endpoints"),
        .split_reasoning = !strict || options_given(o, "reasoning-parser"),
        .parse_tools = !strict || options_given(o, "tool-call-parser"),
        .sse_ping_s = (int)options_int(o, "sse-ping-interval"),
        .drain_s = (int)options_int(o, "timeout-graceful-shutdown"),
        .seed = options_int(o, "seed"),
        .body_max_bytes = (uint64_t)options_int(o, "max-body-mib") << 20,
        .max_stop = strict ? (int)options_int(o, "FD_MAX_STOP_SEQS_NUM") : STOP_MAX,
        .max_stop_bytes = STOP_BYTES,
        .max_stop_tokens = (int)options_int(o, "FD_STOP_SEQS_MAX_LEN"),
    };
    return ERN_OK;
}

/* ---- the rest ---------------------------------------------------------------------------------------------------- */

static ern_status check_quantization(launch *l, const options *o, ern_err *err) {
    l->quant_asked = options_given(o, "quantization") || options_given(o, "lm-head-quantization");
    l->engine.backend_options.act_exact = is_name(options_text(o, "activation-quantization"), "none");
    return ern_quant_parse(&l->quant, options_text(o, "quantization"), options_text(o, "lm-head-quantization"), err);
}

static ern_status check_model(launch *l, const options *o, ern_err *err) {
    const char *tokenizer = options_text(o, "tokenizer");
    ERN_TRY(command_positional(o, 1, err));
    ERN_TRY(command_model_dir(o, l->model_dir, sizeof l->model_dir, err));
    l->model_name = options_text(o, "model");
    if (tokenizer && strlen(tokenizer) >= sizeof l->tokenizer_path)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--tokenizer is longer than %zu bytes", sizeof l->tokenizer_path - 1);
    (void)snprintf(l->tokenizer_path, sizeof l->tokenizer_path, "%s", tokenizer ? tokenizer : l->model_dir);
    const char *format = options_text(o, "chat-format");
    l->chat_format = is_name(format, "auto") ? NULL : format;
    const char *config = options_text(o, "model-config-name");
    if (strchr(config, '/'))
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--model-config-name %.100s must be a file's name in the model's folder, not a path", config);
    l->config_name = config;
    return ERN_OK;
}

static ern_log_level log_level(const options *o) {
    const char *name = options_text(o, "log-level");
    if (options_flag(o, "FD_DEBUG") || strcasecmp(name, "debug") == 0) return ERN_LOG_DEBUG;
    if (strncasecmp(name, "warn", 4) == 0) return ERN_LOG_WARN;
    if (strcasecmp(name, "error") == 0 || strcasecmp(name, "critical") == 0) return ERN_LOG_ERROR;
    return strcasecmp(name, "off") == 0 ? ERN_LOG_OFF : ERN_LOG_INFO;
}

/* All of l->engine. */
static ern_status check_engine(launch *l, const options *o, ern_err *err) {
    ERN_TRY(check_capacity(l, o, err));
    ERN_TRY(check_cache(l, o, err));
    ERN_TRY(check_devices(l, o, err));
    return check_quantization(l, o, err);
}

ern_status launch_leave_gpu(launch *l, const options *o, const ern_model *m, ern_err *err) {
    ERN_ASSERT(l->backend_auto && launch_on_gpu(l));
    l->gpu_left = true;
    l->memory_share = 0;
    ERN_TRY(check_engine(l, o, err));
    l->engine.model = m;
    launch_take_model(l, o, m);
    return ERN_OK;
}

ern_status launch_check(launch *l, const options *o, ern_err *err) {
    *l = (launch){.ready_fd = -1};
    ERN_TRY(check_engine(l, o, err));
    ERN_TRY(check_model(l, o, err));
    ERN_TRY(check_http(l, o, err));
    l->log_level = log_level(o);
    l->log_dir = options_text(o, "FD_LOG_DIR");
    if (options_given(o, "ready-fd")) l->ready_fd = (int)options_int(o, "ready-fd");
    if (l->ready_fd >= 0 && fcntl(l->ready_fd, F_GETFD) < 0)
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--ready-fd %d is not an open file descriptor; open it or leave the flag out", l->ready_fd);
    return ERN_OK;
}

ern_status launch_check_config(const launch *l, const ern_config *c, ern_err *err) {
    if (l->engine.max_model_len > c->n_position)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--max-model-len is %d and the model knows %d positions; lower it",
                        l->engine.max_model_len, c->n_position);
    return ERN_OK;
}

ern_status launch_check_text(const launch *l, const ern_config *c, const ern_tokenizer *t, ern_chat_format f,
                             ern_err *err) {
    if (ern_tokenizer_n_token(t) > c->n_vocab)
        return ERN_FAIL(err, ERN_ERR_FILE,
                        "the tokenizer %.200s has %d ids and vocab_size in %.200s/%.60s is %d, so they do not belong "
                        "together; give the model's own tokenizer",
                        l->tokenizer_path, ern_tokenizer_n_token(t), l->model_dir, l->config_name, c->n_vocab);
    const char *missing = ern_chat_format_missing(t, f);
    if (missing)
        return ERN_FAIL(err, ERN_ERR_FILE,
                        "the tokenizer %.200s has no token %s, which the chat format %s is written with; give another "
                        "--chat-format, or the model's own tokenizer with --tokenizer",
                        l->tokenizer_path, missing, ern_chat_format_name(f));
    return ERN_OK;
}
