/* The real engine core, scheduler and pool under a seeded storm, one thread, a made clock: arrivals in bursts, cancels,
 * deadlines, slow readers, tight pools, all chunk sizes, overlap on and off, NaN rows, a lost device. After every turn
 * the pool, the lists and the steps in flight are walked; every event is compared with a serial run of the hash; at the
 * end everything is back where it began.
 *
 * With the prefix cache, prompts are what earlier requests had, more or less; blocks move between the tiers
 * as late or as early as may be, loads fail, hashes collide.
 *
 *   test_sim [n_seed [first_seed]]      default: seeds from 1, a million requests; fewer in checked builds */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "engine/core.h"
#include "engine/engine_plan.h"
#include "sim/moves.h"

enum { INSIDE_MAX = 128 };

typedef struct sim {
    rng g;
    uint64_t seed;
    ern_model model;
    ern_engine_options options;
    traffic_mix mix;
    traffic_stems stems;
    ern_arena arena;
    core c;
    moves moves;
    traffic *inside[INSIDE_MAX]; /* by the core's index */
    int32_t n_inside, n_seq;
    int32_t event_room, n_unread, n_unread_end; /* the outbox */
    uint64_t last_id;
    bool slow_readers, failed, broken;
    int64_t n_turn, cached_from[TREE_FROMS]; /* prompt tokens */
    int64_t n_token, n_end, n_preempted;
} sim;

static volatile uint64_t running_seed;
static const ern_engine_options *running_options;
static int64_t sim_now;
static int64_t now_us(void) { return sim_now; }

/* How to see it again. */
static void say_seed(void) {
    const ern_engine_options *o = running_options;
    fprintf(stderr, "seed %llu is broken; run: test_sim 1 %llu\n", (unsigned long long)running_seed,
            (unsigned long long)running_seed);
    if (!o) return;
    fprintf(
        stderr,
        "  block %d, pages %d, host %llu, disk %d, prefix %d, output %d, len %d, seqs %d, rows %d, chunk %d, chunked "
        "%d, reserve_all %d, partial %d/%d/%d, itl %lld us %g times, overlap %d\n",
        o->backend_options.n_page_cell, o->backend_options.n_page, (unsigned long long)o->swap_bytes,
        o->store_dir != NULL, o->prefix_cache, o->cache_output, o->max_model_len, o->max_num_seqs,
        o->max_batched_tokens, o->chunk_tokens, o->chunked_prefill, o->reserve_all, o->max_partial, o->max_long_partial,
        o->long_prompt_tokens, (long long)o->itl_target_us, o->itl_times, o->overlap);
}

/* An assertion of the engine aborts. */
static void on_abort(int sig) {
    (void)sig;
    say_seed();
}

static void on_events(void *ud, const ern_event *event, int32_t n) {
    sim *s = ud;
    for (int32_t k = 0; k < n; k++) {
        const ern_event *ev = &event[k];
        traffic *t = (traffic *)(void *)ev->request;
        s->n_unread++;
        s->n_unread_end += ev->kind == ERN_EVENT_END;
        bool in_core_add = ev->kind == ERN_EVENT_PROMPT && t->r.echo_only && t->r.n_prompt == 1;
        s->n_unread_end += in_core_add; /* the one kind that needs no step has its place with the ENDs */
        if (s->n_unread - s->n_unread_end > s->event_room) s->broken = true;
        /* One event more than the credit: token 0 of a report comes with token 1's. */
        int32_t ahead = t->n_event + 1 - atomic_load(&t->r.n_taken);
        if (s->options.chunked_prefill && ev->kind != ERN_EVENT_END && ahead > ERN_EVENT_CREDIT + 1) s->broken = true;
        if (!traffic_check(t, ev, s->c.stats.failed)) s->broken = true;
        s->n_token += ev->kind == ERN_EVENT_TOKEN;
        if (ev->kind != ERN_EVENT_END) {
            if (!s->slow_readers) atomic_fetch_add(&t->r.n_taken, 1);
            continue;
        }
        int32_t i = (int32_t)(ev->id % INSIDE_MAX);
        if (s->inside[i] != t) s->broken = true; /* a second END */
        s->inside[i] = NULL;
        s->n_inside--;
        s->n_end++;
        s->n_preempted += ev->n_preempted;
        s->cached_from[TREE_FROM_POOL] += ev->n_cached - ev->n_cached_host - ev->n_cached_disk;
        s->cached_from[TREE_FROM_HOST] += ev->n_cached_host;
        s->cached_from[TREE_FROM_DISK] += ev->n_cached_disk;
        if (ev->n_cached % s->options.backend_options.n_page_cell) s->broken = true;
        if (s->mix.stems && rng_one(&s->g, 2)) traffic_remember(&s->g, t, &s->stems);
        free(t);
    }
}

static void choose_options(sim *s) {
    rng *g = &s->g;
    ern_engine_options *o = &s->options;
    bool is_long = rng_one(g, 10);
    int32_t P = 1 << (is_long ? rng_in(g, 4, 6) : rng_in(g, 0, 4)),
            len = is_long ? rng_in(g, 500, 900) : rng_in(g, 16, 24 * P < 96 ? 24 * P : 96);
    int32_t seqs = rng_one(g, 4) ? rng_in(g, 13, 40) : rng_in(g, 1, 12);
    *o = (ern_engine_options){.backend = &scripted_ops, .model = &s->model, .memory_bytes = 1 << 30};
    o->max_model_len = len;
    o->max_num_seqs = seqs;
    o->chunked_prefill = !rng_one(g, 4);
    int32_t least = seqs > P ? seqs : P;
    if (!o->chunked_prefill && least < len) least = len;
    o->max_batched_tokens = rng_one(g, 3) ? least : least + rng_in(g, 0, 3 * len);
    if (o->max_batched_tokens > len * seqs) o->max_batched_tokens = len * seqs;
    if (o->max_batched_tokens < least) o->max_num_seqs = least / len + 1, o->max_batched_tokens = least;
    o->chunk_tokens = rng_one(g, 2) ? rng_in(g, 1, 20) : 0;
    o->overlap = !rng_one(g, 4);
    o->queue_max = rng_in(g, 1, INSIDE_MAX - 2 * 41);
    o->backend_options.n_page_cell = P;
    int32_t n_min = len / P + 2;
    o->backend_options.n_page =
        rng_one(g, 3) ? n_min + rng_in(g, 1, 4) * (len / P + 1) : n_min + rng_in(g, 0, n_min / 2);
    s->mix = (traffic_mix){.n_vocab = s->model.config.n_vocab,
                           .max_len = len,
                           .max_tokens = is_long ? len : rng_in(g, 1, len),
                           .reports = rng_one(g, 2),
                           .priorities = rng_one(g, 4),
                           .deadline_us = rng_one(g, 3) ? 4000 : 0};
    s->slow_readers = rng_one(g, is_long ? 2 : 4);
    scripted = (scripted_settings){.eager = rng_one(g, 2)};
    if (rng_one(g, 10)) scripted.nan_position = rng_in(g, 2, len / 2), scripted.nan_seed = rng_next(g) % 1000;
    if (rng_one(g, 15)) scripted.fail_at = rng_in(g, 1, 60);
}

/* The prefix cache and its tiers: none, or any of them, with hashes of four bits here and there. */
static void choose_cache(sim *s) {
    rng *g = &s->g;
    ern_engine_options *o = &s->options;
    o->prefix_cache = !rng_one(g, 5);
    if (!o->prefix_cache) return;
    o->cache_output = !rng_one(g, 4);
    uint64_t page_bytes = sizeof(uint64_t) * (uint64_t)o->backend_options.n_page_cell;
    if (rng_one(g, 2)) o->swap_bytes = page_bytes * (uint64_t)rng_in(g, 1, o->backend_options.n_page);
    if (rng_one(g, 2)) o->store_dir = "scripted";
    s->mix.stems = &s->stems;
    s->mix.n_salt = rng_in(g, 1, 3);
}

/* Who may run beside whom. */
static void choose_rules(sim *s) {
    rng *g = &s->g;
    ern_engine_options *o = &s->options;
    o->reserve_all = rng_one(g, 6);
    o->prompt_share = rng_one(g, 2) ? 0.75 : 1;
    if (o->chunked_prefill && rng_one(g, 3)) {
        o->max_partial = rng_in(g, 1, 4);
        o->max_long_partial = rng_in(g, 1, o->max_partial);
        o->long_prompt_tokens = rng_in(g, 1, o->max_model_len / 2);
    }
    if (rng_one(g, 4)) o->itl_target_us = rng_in(g, 10, 2000);
    if (rng_one(g, 4)) o->itl_times = rng_in(g, 1, 5);
}

static void sim_open(sim *s, uint64_t seed) {
    memset(s, 0, sizeof *s);
    s->seed = seed;
    s->g.key = seed;
    s->model = scripted_model(rng_in(&s->g, 16, 200), 0);
    choose_options(s);
    choose_cache(s);
    choose_rules(s);
    ern_engine_options full;
    ern_engine_plan plan;
    ern_err err;
    if (engine_options_fill(&full, &s->options, &err) != ERN_OK ||
        ern_engine_plan_make(&plan, &s->options, &err) != ERN_OK)
        fail_msg("seed %llu: %s", (unsigned long long)seed, err.text);
    full.backend_options.n_page = plan.n_page;
    s->options = full;
    core_options co = engine_core_options(&s->options, plan.n_page, plan.n_host_page);
    if (co.move) co.move = &moves_ops;
    assert_true(co.n_seq <= INSIDE_MAX);
    s->n_seq = co.n_seq;
    s->event_room = engine_event_room(&s->options);
    if (s->options.chunked_prefill && rng_one(&s->g, 3)) s->event_room = rng_in(&s->g, 2, 60);
    if (rng_one(&s->g, 2)) co.n_spare_slot = 0; /* so that slots run out */
    co.emit = on_events;
    co.ud = s;
    co.now_us = now_us;
    ern_arena_open(&s->arena, 0);
    assert_int_equal(core_open(&s->c, &co, &s->arena, &err), ERN_OK);
    ern_backend *backend;
    assert_int_equal(scripted_ops.open(&backend, &s->model, &s->options.backend_options, &err), ERN_OK);
    moves_open(&s->moves, seed, backend, s->options.backend_options.n_page_cell, plan.n_host_page);
    core_connect(&s->c, backend, &s->moves);
    /* 16 keys in all: blocks of the tree are compared, so nothing may change. On disk the chain of 128 bits is what is
     * compared of a block's ancestors. */
    if (s->options.prefix_cache && !s->options.store_dir && rng_one(&s->g, 2)) s->c.sched.cache.tree.key_mask = 3;
}

static void sim_close(sim *s) {
    scripted_ops.close(s->c.backend);
    moves_close(&s->moves);
    ern_arena_close(&s->arena);
    scripted = (scripted_settings){0};
}

static void arrive(sim *s) {
    int32_t i = 0;
    if (s->c.sched.n_waiting >= s->options.queue_max) return;
    while (i < s->n_seq && s->inside[i]) i++;
    if (i == s->n_seq) return;
    traffic *t = traffic_make(&s->g, &s->mix, sim_now);
    s->last_id += INSIDE_MAX;
    t->r.id = s->last_id - s->last_id % INSIDE_MAX + (uint64_t)i;
    s->inside[i] = t;
    s->n_inside++;
    core_add(&s->c, i, &t->r, sim_now);
}

/* Readers take some of what they were given. */
static void read_some(sim *s, bool all) {
    if (all || rng_one(&s->g, 3)) s->n_unread = s->n_unread_end = 0;
    if (!s->slow_readers) return;
    for (int32_t i = 0; i < s->n_seq; i++) {
        traffic *t = s->inside[i];
        if (!t || (!all && !rng_one(&s->g, 40))) continue;
        int32_t behind = t->n_event - atomic_load(&t->r.n_taken);
        atomic_fetch_add(&t->r.n_taken, all ? behind : rng_in(&s->g, 0, behind));
    }
}

static void cancel_one(sim *s) {
    int32_t i = rng_in(&s->g, 0, s->n_seq - 1);
    traffic *t = s->inside[i];
    if (!t) return;
    if (rng_one(&s->g, 4)) {
        core_cancel(&s->c, i, t->r.id + INSIDE_MAX); /* another life of this index: must be ignored */
        return;
    }
    if (!t->cancelled) t->cancel_turn = s->n_turn;
    t->cancelled = true;
    core_cancel(&s->c, i, t->r.id);
}

static bool turn(sim *s) {
    int32_t room = s->event_room - s->n_unread;
    sim_now += rng_one(&s->g, 2000) ? 3600 * 1000000ll : rng_in(&s->g, 0, 50); /* the machine slept for an hour */
    moves_tick(&s->moves);
    CORE_SEAL(true);
    bool moved = core_turn(&s->c, room > 0 ? room : 0);
    CORE_SEAL(false);
#if !defined(ERN_CHECKS)
    core_check(&s->c);
#endif
    s->n_turn++;
    for (int32_t i = 0; i < s->n_seq; i++) /* cancelled: gone once the step that was in flight and one more are done */
        if (s->inside[i] && s->inside[i]->cancelled && s->n_turn > s->inside[i]->cancel_turn + 2) s->broken = true;
    if (s->broken)
        fail_msg("seed %llu is broken; run: test_sim 1 %llu", (unsigned long long)s->seed, (unsigned long long)s->seed);
    return moved;
}

/* Everything back to the beginning. */
static void check_empty(sim *s) {
    assert_int_equal(s->n_inside, 0);
    assert_false(core_is_busy(&s->c));
    assert_int_equal(cache_room(&s->c.sched.cache), s->c.sched.cache.pool.n_page);
    assert_false(cache_is_busy(&s->c.sched.cache) || cache_is_saving(&s->c.sched.cache));
    assert_int_equal(s->c.sched.n_slot_free, s->c.sched.n_slot);
    assert_int_equal(s->c.sched.n_resumable, 0);
    assert_int_equal(s->c.n_flight_want, 0);
    assert_int_equal(s->c.stats.n_finished, s->n_end);
}

/* Turns until nothing moves between the tiers any more. */
static void settle(sim *s) {
    for (int64_t k = 0; turn(s) || moves_is_busy(&s->moves); k++)
        if (k > 100000) fail_msg("seed %llu: transfers do not end", (unsigned long long)s->seed);
}

typedef struct tally {
    int64_t n_token, n_end, n_preempted, cached_from[TREE_FROMS], n_failed;
} tally;

static void run_seed(uint64_t seed, tally *sum) {
    static sim s;
    running_seed = seed;
    running_options = &s.options;
    sim_open(&s, seed);
    int32_t n_turn = rng_in(&s.g, 50, 300), burst = rng_in(&s.g, 1, 12), hush = rng_in(&s.g, 1, 30);
    int32_t cancels = rng_one(&s.g, 2) ? rng_in(&s.g, 2, 20) : 0;
    for (int32_t k = 0; k < n_turn; k++) {
        if (rng_one(&s.g, hush))
            for (int32_t b = rng_in(&s.g, 1, burst); b > 0; b--) arrive(&s);
        if (cancels && rng_one(&s.g, cancels)) cancel_one(&s);
        read_some(&s, false);
        turn(&s);
    }
    bool stopped = rng_one(&s.g, 6);
    for (int32_t i = 0; stopped && i < s.n_seq; i++)
        if (s.inside[i] && !s.inside[i]->cancelled) s.inside[i]->cancelled = true, s.inside[i]->cancel_turn = s.n_turn;
    if (stopped) core_cancel_all(&s.c);
    /* Work left, turns allowed: each turn moves at least one row of the oldest, and a preemption costs it nothing. */
    int64_t patience = 1000 + 64ll * s.n_inside * s.options.max_model_len;
    while (core_is_busy(&s.c)) {
        read_some(&s, true);
        if (!turn(&s) && core_is_busy(&s.c) && !moves_is_busy(&s.moves)) {
            sim_now += 5000; /* deadlines */
            if (!turn(&s) && core_is_busy(&s.c)) fail_msg("seed %llu is stuck", (unsigned long long)seed);
        }
        if (--patience < 0) fail_msg("seed %llu does not end", (unsigned long long)seed);
    }
    settle(&s);
    check_empty(&s);
    sum->n_token += s.n_token;
    sum->n_end += s.n_end;
    sum->n_preempted += s.n_preempted;
    for (int k = 0; k < TREE_FROMS; k++) sum->cached_from[k] += s.cached_from[k];
    sum->n_failed += s.moves.n_failed;
    sim_close(&s);
}

#if defined(ERN_CHECKS)
static uint64_t n_seed = 2000;
#else
static uint64_t n_seed = 24000;
#endif
static uint64_t first_seed = 1;

static void test_storm(void **state) {
    (void)state;
    tally sum = {0};
    for (uint64_t seed = first_seed; seed < first_seed + n_seed; seed++) run_seed(seed, &sum);
    printf(
        "seeds %llu..%llu: %lld requests, %lld tokens, %lld preemptions; prompt tokens from the pool %lld, from host "
        "memory %lld, from disk %lld; %lld loads failed\n",
        (unsigned long long)first_seed, (unsigned long long)(first_seed + n_seed - 1), (long long)sum.n_end,
        (long long)sum.n_token, (long long)sum.n_preempted, (long long)sum.cached_from[TREE_FROM_POOL],
        (long long)sum.cached_from[TREE_FROM_HOST], (long long)sum.cached_from[TREE_FROM_DISK],
        (long long)sum.n_failed);
    assert_true(sum.n_token > 0);
    if (n_seed < 50) return; /* the storm is one: */
    assert_true(sum.n_preempted > 100 && sum.n_failed > 10);
    for (int k = 0; k < TREE_FROMS; k++) assert_true(sum.cached_from[k] > 1000);
}

/* A server that had nothing to do for an hour is well when work comes; a step without an end is a stall, a long one
 * that is like those before it is none. */
static void test_stalls(void **state) {
    (void)state;
    const int64_t minute = 60 * 1000000ll;
    static sim s;
    uint64_t seed = 1;
    for (sim_open(&s, seed); !s.options.overlap || s.slow_readers; sim_open(&s, ++seed)) {
        sim_close(&s);
    }
    scripted = (scripted_settings){0};
    sim_now = 60 * minute;
    assert_false(ern_engine_is_stalled(&s.c.stats, sim_now));
    while (s.c.n_flight == 0) {
        arrive(&s);
        core_turn(&s.c, s.event_room);
    }
    assert_int_equal(s.c.stats.step_since_us, sim_now);
    assert_false(ern_engine_is_stalled(&s.c.stats, sim_now + 2 * minute));
    assert_true(ern_engine_is_stalled(&s.c.stats, sim_now + 2 * minute + 1));
    sim_now += minute; /* the step ends after a minute: so ten are nothing strange */
    core_turn(&s.c, s.event_room);
    assert_int_equal(s.c.stats.step_most_us, minute);
    assert_false(ern_engine_is_stalled(&s.c.stats, sim_now + 10 * minute));
    for (int32_t i = 0; i < s.n_seq; i++)
        if (s.inside[i]) s.inside[i]->cancelled = true;
    core_cancel_all(&s.c);
    while (core_is_busy(&s.c)) core_turn(&s.c, s.event_room);
    assert_false(s.broken);
    assert_int_equal(s.c.stats.step_since_us, 0);
    assert_false(ern_engine_is_stalled(&s.c.stats, sim_now + 100 * minute));
    sim_close(&s);
}

int main(int argc, char **argv) {
    signal(SIGABRT, on_abort);
    if (argc > 1) n_seed = strtoull(argv[1], NULL, 10);
    if (argc > 2) first_seed = strtoull(argv[2], NULL, 10);
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_stalls), cmocka_unit_test(test_storm)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
