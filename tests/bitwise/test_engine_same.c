/* Same request, same answer (house.md 3): each of a few requests is answered alone, one row a step after another, and
 * then in a crowd of 63, chunked at every size, preempted, with and without overlap. Tokens, logprobs and the top 20
 * must be the same bits, on ref and on cpu (its best level and the portable one), dense and MoE; with the argument
 * `cuda` on that backend, whose graphs, streams and copies are then in play. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/counter.h"
#include "engine/engine.h"
#include "bitwise/gate.h"
#include "made_model.h"
#include "same_sampled.h"

enum { SUBJECTS = 6, CROWD = 63, LEN = 384, OUT = 20, PROMPT_MAX = 300, EVENTS = PROMPT_MAX + OUT };

static const uint64_t seed = 20260301;

/* What came back for one request. */
typedef struct record {
    int32_t n, n_preempted;
    int64_t started_us, end_us;
    ern_end end;
    ern_sampled sampled[EVENTS];
} record;

typedef struct kind_of_run {
    const char *name;
    int32_t chunk_tokens, max_rows, n_page, n_crowd;
    bool overlap, unchunked, alone;
    bool extra; /* one more size of what is tried anyway: where it costs little */
} kind_of_run;

/* The sizes between are left out on the scalar backends, which take most of the time, and under a sanitizer, which
 * looks for races and bad reads and not for bits (ref has one thread, and experts in tests/unit). */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
static const bool few = true;
#else
static const bool few = false;
#endif

typedef struct world {
    const ern_backend_ops *ops;
    ern_model *model;
    int32_t level;
    int32_t prompt[SUBJECTS + CROWD][PROMPT_MAX];
} world;

/* Lengths around a page's edge, sampling of every sort. */
static ern_request request(world *w, int32_t i) {
    static const int32_t n_prompt[SUBJECTS] = {5, 63, 64, 65, 150, 300};
    int32_t n = i < SUBJECTS ? n_prompt[i] : 1 + (int32_t)(ern_counter64(seed, (uint64_t)i) % 60);
    for (int32_t k = 0; k < n; k++)
        w->prompt[i][k] =
            (int32_t)(ern_counter64(seed + (uint64_t)i, (uint64_t)k) % (uint64_t)w->model->config.n_vocab);
    ern_request r = {.prompt = w->prompt[i], .n_prompt = n, .max_tokens = OUT, .n_prompt_top = -1};
    r.sample = (ern_sample){.temperature = 0, .top_p = 1, .repetition = 1, .forced = -1, .n_top = ERN_TOP_MAX};
    r.sample.seed = 1000 + (uint64_t)i;
    if (i % 3 > 0) r.sample.temperature = 0.9f, r.sample.top_p = 0.8f;
    if (i % 3 == 2) r.sample.top_k = 50, r.sample.min_p = 0.01f;
    if (i % 2 == 1) {
        r.sample.repetition = 1.2f;
        r.sample.frequency = 0.3f;
        r.sample.presence = 0.2f;
        r.sample.mode = ERN_LOGPROBS_PROCESSED;
    }
    if (i == 4) r.n_prompt_top = ERN_TOP_MAX;
    if (i >= SUBJECTS) r.max_tokens = 1 + i % OUT;
    return r;
}

static void take(record *out, const ern_event *ev) {
    if (ev->kind == ERN_EVENT_END) {
        out->end = ev->end;
        out->n_preempted = ev->n_preempted;
        out->started_us = ev->started_us;
        out->end_us = ev->end_us;
        return;
    }
    assert_true(out->n < EVENTS);
    out->sampled[out->n++] = ev->sampled;
}

/* Submit requests first .. first+n-1 at once and take what comes. */
static void play(ern_engine *e, world *w, int32_t first, int32_t n, record *rec) {
    static ern_request r[SUBJECTS + CROWD];
    ern_err err;
    atomic_store(&gate_shut, true);
    for (int32_t i = first; i < first + n; i++) {
        r[i] = request(w, i);
        memset(&rec[i], 0, sizeof rec[i]);
        if (ern_engine_submit(e, &r[i], &err) != ERN_OK) fail_msg("%s", err.text);
    }
    atomic_store(&gate_shut, false);
    for (int32_t n_end = 0; n_end < n;) {
        ern_event ev;
        if (!ern_engine_next(e, &ev, 60000000)) fail_msg("no event within a minute");
        take(&rec[ev.request - r], &ev);
        atomic_fetch_add(&ev.request->n_taken, ev.kind != ERN_EVENT_END);
        if (ev.kind != ERN_EVENT_END) ern_engine_poke(e);
        n_end += ev.kind == ERN_EVENT_END;
    }
}

static void run(world *w, const kind_of_run *k, record *rec) {
    ern_engine_options o = {.backend = gate(w->ops),
                            .model = w->model,
                            .backend_options = {.n_page = k->n_page, .level = w->level, .n_thread = 2},
                            .max_model_len = LEN,
                            .max_num_seqs = 64,
                            .max_batched_tokens = k->max_rows,
                            .chunked_prefill = !k->unchunked,
                            .chunk_tokens = k->chunk_tokens,
                            .memory_bytes = 2ull << 30,
                            .overlap = k->overlap};
    ern_engine *e;
    ern_err err;
    if (ern_engine_open(&e, &o, &err) != ERN_OK) fail_msg("%s: %s", k->name, err.text);
    if (k->alone)
        for (int32_t i = 0; i < SUBJECTS; i++) play(e, w, i, 1, rec);
    else
        play(e, w, 0, SUBJECTS + k->n_crowd, rec);
    ern_engine_close(e);
}

static void compare(const char *what, const record *want, const record *got) {
    for (int32_t i = 0; i < SUBJECTS; i++) {
        assert_int_equal(got[i].end, ERN_END_LENGTH);
        if (want[i].n != got[i].n) fail_msg("%s: request %d gave %d events, alone %d", what, i, got[i].n, want[i].n);
        for (int32_t k = 0; k < want[i].n; k++)
            if (!same_sampled(&want[i].sampled[k], &got[i].sampled[k]))
                fail_msg(
                    "%s: request %d differs from itself alone at event %d: token %d, alone %d; logprob %a, alone %a",
                    what, i, k, got[i].sampled[k].token, want[i].sampled[k].token, (double)got[i].sampled[k].logprob,
                    (double)want[i].sampled[k].logprob);
    }
}

/* Most requests that were inside at one moment. */
static int32_t most_at_once(const record *rec, int32_t n) {
    int32_t most = 0;
    for (int32_t i = 0; i < n; i++) {
        int32_t inside = 0;
        for (int32_t k = 0; k < n; k++)
            inside += rec[k].started_us <= rec[i].started_us && rec[i].started_us < rec[k].end_us;
        if (inside > most) most = inside;
    }
    return most;
}

static const kind_of_run runs[] = {
    {.name = "alone, overlap", .max_rows = 512, .overlap = true, .alone = true},
    {.name = "together", .max_rows = 512},
    {.name = "together, overlap", .max_rows = 512, .overlap = true, .extra = true},
    {.name = "chunks of 1", .max_rows = 512, .chunk_tokens = 1, .overlap = true},
    {.name = "chunks of 16", .max_rows = 512, .chunk_tokens = 16, .overlap = true, .extra = true},
    {.name = "chunks of 17", .max_rows = 512, .chunk_tokens = 17, .overlap = true},
    {.name = "chunks of 64", .max_rows = 512, .chunk_tokens = 64, .extra = true},
    {.name = "chunks of 256", .max_rows = 512, .chunk_tokens = 256, .overlap = true, .extra = true},
    {.name = "whole prompts", .max_rows = 512, .unchunked = true, .overlap = true},
    {.name = "in a crowd of 63", .max_rows = 512, .n_crowd = CROWD - SUBJECTS + 1, .overlap = true},
    {.name = "in a crowd, small budget", .max_rows = 70, .n_crowd = CROWD, .overlap = true, .extra = true},
    {.name = "preempted", .max_rows = 512, .n_page = 9, .n_crowd = CROWD, .overlap = true},
    {.name = "preempted, chunked, no overlap", .max_rows = 70, .n_page = 9, .n_crowd = CROWD},
};

static void all_runs(const char *backend, int32_t level, const char *shape, bool paddle) {
    made_model m = made_model_open(shape, paddle, 11);
    world *w = calloc(1, sizeof *w);
    record *alone = calloc(SUBJECTS, sizeof *alone), *got = calloc(SUBJECTS + CROWD, sizeof *got);
    if (!w || !alone || !got) abort();
    w->ops = ern_backend_find(backend);
    w->model = m.model;
    w->level = level;
    run(w, &(kind_of_run){.name = "alone", .max_rows = 512, .alone = true}, alone);
    for (int32_t i = 0; i < SUBJECTS; i++) assert_int_equal(alone[i].n, OUT + (i == 4 ? 150 : 0));
    int32_t n_preempted = 0;
    for (size_t k = 0; k < sizeof runs / sizeof *runs; k++) {
        if (runs[k].extra && (few || level != -1 || w->ops == ern_backend_find("ref"))) continue;
        char what[160];
        snprintf(what, sizeof what, "%s level %d, %s, %s", backend, level, shape, runs[k].name);
        run(w, &runs[k], got);
        compare(what, alone, got);
        /* Or it was no crowd. Short answers end while the last prompts still wait for rows, so not all of 63. */
        int32_t most = most_at_once(got, SUBJECTS + runs[k].n_crowd);
        bool roomy = runs[k].max_rows == 512 && !runs[k].n_page && !runs[k].alone;
        if (roomy && most < (runs[k].n_crowd ? CROWD / 2 : SUBJECTS)) fail_msg("%s: only %d at once", what, most);
        for (int32_t i = 0; i < SUBJECTS + runs[k].n_crowd && runs[k].n_page > 0; i++)
            n_preempted += got[i].n_preempted;
    }
    printf("%s level %d, %s: %d preemptions\n", backend, level, shape, n_preempted);
    assert_true(n_preempted >= 1); /* or the pool was not tight */
    free(w), free(alone), free(got);
    made_model_close(&m);
}

static void test_ref(void **state) {
    (void)state;
    all_runs("ref", -1, "tiny-dense", false);
    if (!few) all_runs("ref", -1, "tiny-moe", true);
}

static void test_cpu(void **state) {
    (void)state;
    all_runs("cpu", -1, "tiny-dense", false);
    all_runs("cpu", -1, "tiny-moe", true);
    all_runs("cpu", -1, "tiny-moe", false);
}

static void test_cpu_portable(void **state) {
    (void)state;
    if (!few) all_runs("cpu", 0, "tiny-dense", true);
    all_runs("cpu", 0, "tiny-moe", false);
}

/* Called by hand and by make gpu-test: no other machine has it. */
static void test_cuda(void **state) {
    (void)state;
    all_runs("cuda", -1, "tiny-dense", false);
    all_runs("cuda", -1, "tiny-moe", true);
    all_runs("cuda", -1, "tiny-moe", false);
}

int main(int argc, char **argv) {
    if (few) printf("built with a sanitizer: left out: the sizes between, ref with experts, portable without\n");
    printf("seed %llu\n", (unsigned long long)seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ref),
        cmocka_unit_test(test_cpu),
        cmocka_unit_test(test_cpu_portable),
    };
    const struct CMUnitTest on_cuda[] = {cmocka_unit_test(test_cuda)};
    const bool cuda = argc > 1 && strcmp(argv[1], "cuda") == 0;
    return cuda ? cmocka_run_group_tests(on_cuda, NULL, NULL) : cmocka_run_group_tests(tests, NULL, NULL);
}
