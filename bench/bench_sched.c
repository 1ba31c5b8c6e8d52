/* What the engine itself costs per step: plan, batch, results, events, on a backend that does nothing,
 * with more and more blocks in the prefix tree. Requests end and come; every page they take is evicted from another
 * block.
 *
 *   bench_sched [n_running [n_prompt [n_turn]]]      default: 256 1000 20000 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/core.h"
#include "engine/engine_plan.h"

static ern_sampled sampled[ERN_SEQS_MAX + ERN_EVENT_CREDIT];
static int32_t n_want[2];
static uint64_t n_submit, n_wait;

static void idle_submit(ern_backend *b, const ern_batch *in) {
    (void)b;
    n_want[n_submit++ % 2] = in->n_want;
}
static ern_status idle_wait(ern_backend *b, ern_result *out, ern_err *err) {
    (void)b, (void)err;
    *out = (ern_result){.n_want = n_want[n_wait++ % 2], .sampled = sampled};
    return ERN_OK;
}
static ern_status idle_plan(ern_backend_plan *out, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    (void)m, (void)o, (void)err;
    *out = (ern_backend_plan){.page_bytes = 1 << 10};
    return ERN_OK;
}
static const ern_backend_ops idle_ops = {.name = "idle", .plan = idle_plan, .submit = idle_submit, .wait = idle_wait};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
static int64_t now_us(void) { return now_ns() / 1000; }

static int by_value(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void fatal(const char *text) {
    fprintf(stderr, "bench_sched: %s\n", text);
    exit(1);
}

enum { P = 64, N_OUT = 256, FILL_BLOCKS = 1000 };

static uint64_t random_state = 1;
static int32_t random_token(void) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (int32_t)((random_state >> 33) % 100000);
}

/* Requests that keep coming: half of a prompt is one of a hundred beginnings, the rest is new. */
typedef struct load {
    core c;
    int32_t n_run, n_prompt;
    int32_t *prompt; /* [n_run, n_prompt] */
    ern_request *request;
    bool *over;
    uint64_t serial;
} load;

static void on_events(void *ud, const ern_event *ev, int32_t n) {
    load *l = ud;
    for (int32_t k = 0; k < n; k++) {
        atomic_fetch_add_explicit(&ev[k].request->n_taken, 1, memory_order_relaxed);
        if (ev[k].kind == ERN_EVENT_END) l->over[ev[k].request - l->request] = true;
    }
}

static void arrive(load *l, int32_t i) {
    int32_t *prompt = l->prompt + (int64_t)i * l->n_prompt;
    uint64_t mine = random_state;
    random_state = (uint64_t)(random_token() % 100);
    for (int32_t k = 0; k < l->n_prompt / 2; k++) prompt[k] = random_token();
    random_state = mine + 12345;
    for (int32_t k = l->n_prompt / 2; k < l->n_prompt; k++) prompt[k] = random_token();
    l->request[i] =
        (ern_request){.id = ++l->serial, .prompt = prompt, .n_prompt = l->n_prompt, .max_tokens = N_OUT + i};
    l->request[i].n_prompt_top = -1;
    l->request[i].sample = (ern_sample){.temperature = 1, .top_p = 1, .repetition = 1, .forced = -1, .n_top = -1};
    l->over[i] = false;
    core_add(&l->c, i, &l->request[i], 0);
}

/* Prompts that somebody had before: n_block blocks in the tree, in paths of FILL_BLOCKS. */
static void fill(cache *c, int32_t n_block) {
    page_hold *page = calloc(FILL_BLOCKS, sizeof *page);
    int32_t *node = calloc(FILL_BLOCKS, sizeof *node), *token = calloc(FILL_BLOCKS * P, sizeof *token);
    static const uint8_t salt[TREE_SALT_BYTES];
    if (!page || !node || !token) fatal("no memory");
    for (int32_t done = 0; done < n_block; done += FILL_BLOCKS) {
        cache_path p = {.page = page, .node = node, .salt = salt};
        int32_t n = n_block - done < FILL_BLOCKS ? n_block - done : FILL_BLOCKS;
        for (int32_t k = 0; k < n * P; k++) token[k] = random_token();
        for (int32_t k = 0; k < n; k++) cache_take(c, &p);
        cache_insert(c, &p, token, n * P, n);
        cache_release(c, &p);
    }
    free(page), free(node), free(token);
}

static void run(int32_t n_run, int32_t n_prompt, int32_t n_turn, int32_t n_cached) {
    ern_model model;
    memset(&model, 0, sizeof model);
    model.config.n_vocab = 100000;
    ern_engine_options o = {.backend = &idle_ops,
                            .model = &model,
                            .max_model_len = n_prompt + N_OUT + n_run + P,
                            .max_num_seqs = n_run,
                            .max_batched_tokens = 8192,
                            .chunked_prefill = true,
                            .prefix_cache = n_cached > 0,
                            .cache_output = true,
                            .memory_bytes = 64ull << 30,
                            .overlap = true};
    /* As many pages as are held and cached: every new page is another's eviction. */
    o.backend_options.n_page = n_cached + n_run * (o.max_model_len / P + 1);
    ern_engine_options full;
    ern_err err;
    ern_arena arena;
    ern_arena_open(&arena, 0);
    if (engine_options_fill(&full, &o, &err) != ERN_OK) fatal(err.text);
    static load l;
    l = (load){.n_run = n_run, .n_prompt = n_prompt};
    core_options co = engine_core_options(&full, o.backend_options.n_page, 0);
    co.emit = on_events;
    co.ud = &l;
    co.now_us = now_us;
    if (core_open(&l.c, &co, &arena, &err) != ERN_OK) fatal(err.text);
    ern_backend backend = {&idle_ops};
    core_connect(&l.c, &backend, NULL);
    l.prompt = calloc((size_t)n_run * (size_t)n_prompt, sizeof *l.prompt);
    l.request = calloc((size_t)n_run, sizeof *l.request);
    l.over = calloc((size_t)n_run, sizeof *l.over);
    int64_t *took = calloc((size_t)n_turn, sizeof *took);
    if (!l.prompt || !l.request || !l.over || !took) fatal("no memory");
    n_submit = n_wait = 0;
    if (n_cached > 0) fill(&l.c.sched.cache, o.backend_options.n_page);
    for (int32_t i = 0; i < n_run; i++) arrive(&l, i);
    int32_t room = engine_event_room(&full);
    for (int32_t k = -2 * N_OUT; k < n_turn; k++) {
        int64_t t = now_ns();
        core_turn(&l.c, room);
        if (k >= 0) took[k] = now_ns() - t;
        for (int32_t i = 0; i < n_run; i++)
            if (l.over[i]) arrive(&l, i);
    }
    qsort(took, (size_t)n_turn, sizeof *took, by_value);
    printf("%4d running  %8d blocks cached  %8llu evicted  median %6.1f us  p99 %6.1f us  most %7.1f us per step\n",
           n_run, l.c.stats.n_page_cached, (unsigned long long)l.c.stats.n_block_evicted,
           (double)took[n_turn / 2] / 1e3, (double)took[n_turn * 99 / 100] / 1e3, (double)took[n_turn - 1] / 1e3);
    free(l.prompt), free(l.request), free(l.over), free(took);
    ern_arena_close(&arena);
}

int main(int argc, char **argv) {
    int32_t n_run = argc > 1 ? atoi(argv[1]) : 256, n_prompt = argc > 2 ? atoi(argv[2]) : 1000;
    int32_t n_turn = argc > 3 ? atoi(argv[3]) : 20000;
    if (n_run < 1 || n_run > ERN_SEQS_MAX || n_prompt < 2 || n_turn < 1) fatal("bad arguments");
    static const int32_t n_cached[] = {0, 1000, 10000, 100000, 1000000};
    for (size_t k = 0; k < sizeof n_cached / sizeof *n_cached; k++) run(n_run, n_prompt, n_turn, n_cached[k]);
    return 0;
}
