/* Ten thousand requests through the public door, threads and all, on the scripted backend: two threads submit as fast
 * as the queue takes them, one cancels and reads statistics, one takes events and compares every token with a serial
 * run. Fast readers, slow readers (parking), a reader who stops for a while (a full outbox), tight pages, overlap; then
 * with a prefix cache, host memory below it, and a disk, whose threads move blocks beside the steps.
 *
 *   test_soak [n_request [seed]] */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/os.h"
#include "made_model.h"
#include "sim/traffic.h"

enum { SUBMITTERS = 2, RECENT = 64 };

typedef struct soak {
    ern_engine *e;
    uint64_t seed;
    traffic_mix mix;
    int32_t n_each;
    pthread_mutex_t lock;
    uint64_t recent[RECENT]; /* ids that may be cancelled; 0: none */
    traffic *owner[RECENT];  /* whose cancelled flag is set, valid while recent is not 0 */
    atomic_int n_refused, n_broken;
    atomic_bool over;
    int64_t n_token, cached_from[3]; /* prompt tokens from the pool, host memory, disk */
    traffic_stems stems;             /* under lock: the consumer remembers, the submitters begin with them */
} soak;

typedef struct submitter {
    soak *s;
    int32_t number;
} submitter;

static void *submit_main(void *ud) {
    submitter *me = ud;
    soak *s = me->s;
    rng g = {.key = s->seed + 1000 + (uint64_t)me->number};
    for (int32_t k = 0; k < s->n_each; k++) {
        pthread_mutex_lock(&s->lock);
        traffic *t = traffic_make(&g, &s->mix, ern_now_us());
        pthread_mutex_unlock(&s->lock);
        ern_err err;
        /* The flag is read by the consumer, under the lock too, so no request may be seen before it is listed. */
        int32_t at = rng_in(&g, 0, RECENT - 1);
        for (;;) {
            pthread_mutex_lock(&s->lock);
            ern_status status = ern_engine_submit(s->e, &t->r, &err);
            if (status == ERN_OK) {
                s->recent[at] = t->r.id;
                s->owner[at] = t;
            }
            pthread_mutex_unlock(&s->lock);
            if (status == ERN_OK) break;
            if (status != ERN_ERR_LIMIT) {
                fprintf(stderr, "refused: %s\n", err.text);
                atomic_fetch_add(&s->n_broken, 1);
                return NULL;
            }
            atomic_fetch_add(&s->n_refused, 1);
            usleep(200);
        }
    }
    return NULL;
}

static void *cancel_main(void *ud) {
    soak *s = ud;
    rng g = {.key = s->seed + 7};
    while (!atomic_load(&s->over)) {
        ern_engine_stats st;
        ern_engine_stats_read(s->e, &st);
        if (st.n_page_free > st.n_page || st.n_running > ERN_SEQS_MAX || st.failed) atomic_fetch_add(&s->n_broken, 1);
        int32_t at = rng_in(&g, 0, RECENT - 1);
        pthread_mutex_lock(&s->lock);
        uint64_t id = s->recent[at];
        if (id) s->owner[at]->cancelled = true;
        s->recent[at] = 0;
        pthread_mutex_unlock(&s->lock);
        ern_engine_cancel(s->e, id);
        if (rng_one(&g, 3)) ern_engine_cancel(s->e, rng_next(&g)); /* nobody's */
        usleep((useconds_t)rng_in(&g, 100, 3000));
    }
    return NULL;
}

/* Take every event until all requests ended. */
static void consume(soak *s, int32_t n_all, rng *g) {
    int32_t n_end = 0;
    int64_t told_us = ern_now_us();
    while (n_end < n_all && atomic_load(&s->n_broken) == 0) {
        ern_event ev;
        if (!ern_engine_next(s->e, &ev, 100000)) {
            if (ern_now_us() - told_us > 60000000)
                fail_msg("seed %llu: silent for a minute", (unsigned long long)s->seed);
            continue;
        }
        told_us = ern_now_us();
        traffic *t = (traffic *)(void *)ev.request;
        pthread_mutex_lock(&s->lock);
        bool ok = traffic_check(t, &ev, false);
        if (ev.kind == ERN_EVENT_END)
            for (int32_t i = 0; i < RECENT; i++)
                if (s->recent[i] == ev.id) s->recent[i] = 0;
        if (ev.kind == ERN_EVENT_END && s->mix.stems && rng_one(g, 2)) traffic_remember(g, t, &s->stems);
        pthread_mutex_unlock(&s->lock);
        if (!ok) atomic_fetch_add(&s->n_broken, 1);
        s->n_token += ev.kind == ERN_EVENT_TOKEN;
        if (ev.kind == ERN_EVENT_END) {
            s->cached_from[0] += ev.n_cached - ev.n_cached_host - ev.n_cached_disk;
            s->cached_from[1] += ev.n_cached_host;
            s->cached_from[2] += ev.n_cached_disk;
            free(t);
            n_end++;
        } else if (t->r.sample.seed % 3 || t->n_event % 200 == 0) { /* a third reads in gulps of 200 */
            atomic_store(&t->r.n_taken, t->n_event);
            if (t->r.sample.seed % 3 == 0) ern_engine_poke(s->e);
        }
        if (rng_one(g, 200000)) usleep(30000); /* the outbox fills */
    }
}

static int32_t n_request = 10000;
static uint64_t first_seed = 1;
static int64_t found[3]; /* prompt tokens from the pool, host memory, disk, of all runs */

/* The tiers of a run. */
typedef struct tiers {
    bool prefix;
    int32_t n_host_page;
    const char *dir; /* NULL: no disk */
} tiers;

static void run(uint64_t seed, int32_t n_all, int32_t n_page, int32_t max_len, bool chunked, tiers with) {
    static soak s;
    s = (soak){.seed = seed, .n_each = n_all / SUBMITTERS};
    ern_model m = scripted_model(500, 0);
    ern_engine_options o = {.backend = &scripted_ops,
                            .model = &m,
                            .backend_options = {.n_page = n_page, .n_page_cell = 16},
                            .max_model_len = max_len,
                            .max_num_seqs = 32,
                            .max_batched_tokens = chunked ? 256 : max_len,
                            .chunked_prefill = chunked,
                            .memory_bytes = 1 << 30,
                            .queue_max =
                                with.prefix ? 40 : 200, /* few that were made before the ends they begin with */
                            .overlap = true,
                            .prefix_cache = with.prefix,
                            .cache_output = with.prefix,
                            .swap_bytes = (uint64_t)with.n_host_page * 16 * sizeof(uint64_t),
                            .store_dir = with.dir,
                            .store_bytes = 1 << 17};
    s.mix = (traffic_mix){.n_vocab = 500,
                          .max_len = max_len,
                          .max_tokens = max_len,
                          .reports = true,
                          .priorities = true,
                          .deadline_us = 2000000,
                          .stems = with.prefix ? &s.stems : NULL,
                          .n_salt = with.prefix ? 2 : 0};
    rng first = {.key = seed + 99};
    for (int32_t k = 0; k < TRAFFIC_STEMS; k++)
        for (s.stems.n[k] = 0; s.stems.n[k] < max_len / 2;) s.stems.token[k][s.stems.n[k]++] = rng_in(&first, 0, 499);
    pthread_mutex_init(&s.lock, NULL);
    ern_err err;
    if (ern_engine_open(&s.e, &o, &err) != ERN_OK) fail_msg("%s", err.text);
    rng g = {.key = seed};
    pthread_t thread[SUBMITTERS], cancel;
    submitter who[SUBMITTERS];
    for (int32_t i = 0; i < SUBMITTERS; i++) {
        who[i] = (submitter){&s, i};
        assert_int_equal(pthread_create(&thread[i], NULL, submit_main, &who[i]), 0);
    }
    assert_int_equal(pthread_create(&cancel, NULL, cancel_main, &s), 0);
    int64_t start_us = ern_now_us();
    consume(&s, s.n_each * SUBMITTERS, &g);
    int64_t took_us = ern_now_us() - start_us;
    atomic_store(&s.over, true);
    for (int32_t i = 0; i < SUBMITTERS; i++) pthread_join(thread[i], NULL);
    pthread_join(cancel, NULL);
    assert_int_equal(atomic_load(&s.n_broken), 0);
    ern_engine_stop(s.e);
    ern_engine_stats st;
    ern_engine_stats_read(s.e, &st);
    printf("seed %llu: %d requests, %lld tokens, %llu steps, %llu preemptions, %d refusals, %.0f k tokens/s\n",
           (unsigned long long)seed, n_all, (long long)s.n_token, (unsigned long long)st.n_step,
           (unsigned long long)st.n_preempted, atomic_load(&s.n_refused), (double)s.n_token * 1e3 / (double)took_us);
    if (with.prefix)
        printf(
            "  prompt tokens found: %lld in the pool, %lld in host memory, %lld on disk; blocks out and in: host %llu "
            "%llu, disk %llu %llu; %llu errors\n",
            (long long)s.cached_from[0], (long long)s.cached_from[1], (long long)s.cached_from[2],
            (unsigned long long)st.host.n_out, (unsigned long long)st.host.n_in, (unsigned long long)st.disk.n_out,
            (unsigned long long)st.disk.n_in, (unsigned long long)st.disk.n_error);
    for (int k = 0; k < 3; k++) found[k] += s.cached_from[k];
    assert_int_equal(st.disk.n_error, 0);
    assert_int_equal(st.n_loading, 0);
    if (with.n_host_page > 0 || with.dir) /* a transfer may still have been at a page */
        assert_true(st.n_page_free + st.n_page_cached <= st.n_page);
    else
        assert_int_equal(st.n_page_free + st.n_page_cached, st.n_page);
    assert_int_equal(st.n_running + st.n_waiting, 0);
    assert_int_equal(st.n_finished, n_all / SUBMITTERS * SUBMITTERS);
    assert_false(st.busy);
    ern_event ev;
    assert_false(ern_engine_next(s.e, &ev, 0)); /* nothing after the last END */
    ern_engine_close(s.e);
    pthread_mutex_destroy(&s.lock);
}

static void test_soak(void **state) {
    (void)state;
    const tiers none = {.prefix = false};
    run(first_seed, n_request * 5 / 8, 300, 200, true, none);
    run(first_seed + 1, n_request / 8, 20, 200, false, none);  /* tight: preemptions all the time */
    run(first_seed + 2, n_request / 8, 400, 1000, true, none); /* long: parking */
    run(first_seed + 3, n_request / 8, 64, 64, true, none);
}

static void test_soak_tiers(void **state) {
    (void)state;
    char dir[64];
    made_dir(dir);
    run(first_seed + 4, n_request / 4, 300, 200, true, (tiers){.prefix = true});
    run(first_seed + 5, n_request / 4, 30, 200, true, (tiers){.prefix = true, .n_host_page = 100});
    run(first_seed + 6, n_request / 4, 30, 200, true, (tiers){.prefix = true, .dir = dir});
    /* Again over what the run before left there, and with all three; the disk is too small for it. */
    run(first_seed + 7, n_request / 4, 24, 200, false, (tiers){.prefix = true, .n_host_page = 20, .dir = dir});
    run(first_seed + 8, n_request / 8, 400, 1000, true, (tiers){.prefix = true, .n_host_page = 300, .dir = dir});
    made_dir_remove(dir);
    for (int k = 0; k < 3; k++) assert_true(found[k] > 1000); /* or nothing was moved */
}

int main(int argc, char **argv) {
    if (argc > 1) n_request = (int32_t)strtol(argv[1], NULL, 10);
    if (argc > 2) first_seed = strtoull(argv[2], NULL, 10);
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_soak), cmocka_unit_test(test_soak_tiers)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
