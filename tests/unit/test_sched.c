/* The scheduler's rules, one by one (sched.h; fastdeploy.md 4.3). Results of a step are played by `result`. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <cmocka.h>

#include "base/status.h"
#include "engine/core.h"

enum { N_SEQ = 64, ROOM = 1 << 20 };

typedef struct table {
    ern_arena arena;
    sched s;
    sched_item item[N_SEQ];
    sched_plan plan;
} table;

static void setup(table *t, sched_rules r, int32_t n_page) {
    memset(t, 0, sizeof *t);
    ern_arena_open(&t->arena, 0);
    layout l = {.arena = &t->arena};
    sched_open(&t->s, &l, &r, N_SEQ, &(cache_options){.n_page = n_page, .page_tokens = r.page_cells});
    t->plan.item = t->item;
}

static sched_rules rules(int32_t seqs, int32_t rows, int32_t P) {
    return (sched_rules){
        .max_seqs = seqs, .max_rows = rows, .max_wants = ROOM, .page_cells = P, .max_len = 1024, .chunked = true};
}

static void add(table *t, int32_t i, int32_t n_prompt, int32_t max_tokens) {
    t->s.seq[i] = (sched_seq){.id = 1 + (uint64_t)i,
                              .n_prompt = n_prompt,
                              .n_token = n_prompt,
                              .n_asked = n_prompt,
                              .n_len_max = n_prompt + max_tokens,
                              .credit = 256};
    sched_add(&t->s, i);
}

static void make(table *t) {
    const char *why = "";
    sched_make(&t->s, &(sched_budget){ROOM, ROOM}, &t->plan);
    if (!sched_check(&t->s, &why)) fail_msg("%s", why);
}

/* The step's tokens arrive. */
static void result(table *t) {
    for (int32_t k = 0; k < t->plan.n_item; k++) {
        sched_seq *q = &t->s.seq[t->item[k].seq];
        q->n_pending -= t->item[k].samples;
        q->n_token += t->item[k].samples;
    }
}

static void step(table *t) {
    make(t);
    result(t);
}

static void expect_item(const table *t, int32_t k, int32_t seq, int32_t pos, int32_t n_row, bool samples) {
    assert_true(k < t->plan.n_item);
    assert_int_equal(t->item[k].seq, seq);
    assert_int_equal(t->item[k].pos, pos);
    assert_int_equal(t->item[k].n_row, n_row);
    assert_int_equal(t->item[k].samples, samples);
}

/* Parked sequences that lost their pages keep their tokens in spare slots, and the others run on. */
static void test_the_parked_leave_room(void **state) {
    (void)state;
    enum { N_PARKED = 40 };
    table t;
    sched_rules r = rules(2, 16, 16);
    r.spare_slots = N_PARKED;
    setup(&t, r, 100);
    for (int32_t i = 0; i < N_PARKED; i++) {
        add(&t, i, 3, 50);
        for (int32_t k = 0; k < 3 && t.s.seq[i].where == SCHED_WAITING; k++) step(&t); /* the parked make place first */
        assert_int_equal(t.s.seq[i].where, SCHED_RUNNING);
        t.s.seq[i].parked = true;
    }
    add(&t, N_PARKED, 3, 50);
    step(&t);
    step(&t);
    assert_int_equal(t.s.seq[N_PARKED].where, SCHED_RUNNING);
    t.s.seq[0].parked = false; /* its reader caught up: it goes on from its own tokens */
    for (int32_t k = 0; k < 4; k++) step(&t);
    assert_int_equal(t.s.seq[0].where, SCHED_RUNNING);
    ern_arena_close(&t.arena);
}

static void test_decodes_come_before_chunks(void **state) {
    (void)state;
    table t;
    setup(&t, rules(8, 16, 16), 100);
    add(&t, 0, 40, 5);
    add(&t, 1, 3, 5);
    step(&t); /* all 16 rows go to the first prompt */
    assert_int_equal(t.plan.n_item, 1);
    expect_item(&t, 0, 0, 0, 16, false);
    step(&t);
    expect_item(&t, 0, 0, 16, 16, false);
    step(&t); /* 8 left, then the second prompt whole, both sampled */
    expect_item(&t, 0, 0, 32, 8, true);
    expect_item(&t, 1, 1, 0, 3, true);
    add(&t, 2, 100, 5);
    make(&t); /* two decodes, the rest of the budget is a chunk */
    assert_int_equal(t.plan.n_row, 16);
    expect_item(&t, 0, 0, 40, 1, true);
    expect_item(&t, 1, 1, 3, 1, true);
    expect_item(&t, 2, 2, 0, 14, false);
    assert_int_equal(t.plan.n_want, 2);
    ern_arena_close(&t.arena);
}

/* A partial prefill ahead of decodes in the order must not eat their rows, nor their wants. */
static void test_a_chunk_leaves_rows_for_later_decodes(void **state) {
    (void)state;
    table t;
    setup(&t, rules(8, 8, 16), 100);
    add(&t, 1, 2, 9);
    add(&t, 2, 2, 9);
    step(&t);
    t.s.seq[0].priority = 0;
    add(&t, 0, 50, 9); /* id 1: before the others */
    step(&t);
    expect_item(&t, 2, 0, 0, 6, false);
    step(&t);
    assert_int_equal(t.plan.n_item, 3);
    expect_item(&t, 0, 0, 6, 6, false);
    expect_item(&t, 1, 1, 3, 1, true);
    expect_item(&t, 2, 2, 3, 1, true);
    ern_arena_close(&t.arena);
}

static void test_pages_on_demand_two_at_once(void **state) {
    (void)state;
    table t;
    setup(&t, rules(4, 64, 64), 100);
    add(&t, 0, 50, 500);
    step(&t);
    assert_int_equal(t.s.seq[0].path.n_page, 1);
    step(&t); /* 51 tokens: 13 cells left */
    assert_int_equal(t.s.seq[0].path.n_page, 1);
    step(&t); /* 52: 12 left */
    assert_int_equal(t.s.seq[0].path.n_page, 3);
    ern_arena_close(&t.arena);
}

static void test_no_page_beyond_the_possible_length(void **state) {
    (void)state;
    table t;
    setup(&t, rules(4, 64, 64), 100);
    add(&t, 0, 60, 5); /* 64 rows at most: the 65th token is never computed */
    for (int k = 0; k < 5; k++) {
        make(&t);
        assert_int_equal(t.plan.n_item, 1);
        result(&t);
    }
    assert_int_equal(t.s.seq[0].n_token, 65);
    assert_int_equal(t.s.seq[0].path.n_page, 1);
    make(&t);
    assert_int_equal(t.plan.n_item, 0);
    ern_arena_close(&t.arena);
}

/* Overlap: planned again before its token is known, but never past its end. */
static void test_overlap_knows_the_length(void **state) {
    (void)state;
    table t;
    setup(&t, rules(4, 64, 16), 100);
    add(&t, 0, 4, 2);
    make(&t);
    sched_item first = t.item[0];
    assert_true(first.samples);
    make(&t);
    expect_item(&t, 0, 0, 4, 1, true);
    assert_int_equal(t.s.seq[0].n_pending, 2);
    make(&t);
    assert_int_equal(t.plan.n_item, 0);
    ern_arena_close(&t.arena);
}

static void test_the_last_is_preempted_and_comes_back_first(void **state) {
    (void)state;
    table t;
    setup(&t, rules(4, 64, 4), 8);
    for (int32_t i = 0; i < 3; i++) add(&t, i, 8, 12); /* two pages each, of eight */
    step(&t);
    assert_int_equal(t.plan.n_item, 3);
    step(&t); /* each at 8 rows: the first takes the two that are left, the second has the third preempted */
    assert_int_equal(t.plan.n_preempted, 1);
    assert_int_equal(t.s.seq[2].where, SCHED_WAITING);
    assert_int_equal(t.s.seq[2].n_computed, 0);
    assert_int_equal(t.s.seq[2].n_token, 9);
    add(&t, 3, 1, 1);
    assert_int_equal(t.s.waiting[0], 2);
    assert_int_equal(t.plan.n_item, 2);
    ern_arena_close(&t.arena);
}

static void test_nothing_is_admitted_after_a_preemption(void **state) {
    (void)state;
    table t;
    setup(&t, rules(8, 64, 4), 5);
    add(&t, 0, 4, 12);
    add(&t, 1, 15, 2); /* four pages: none left */
    step(&t);
    assert_int_equal(t.plan.n_item, 2);
    add(&t, 2, 1, 1); /* one page would do, and the preemption frees four */
    make(&t);
    assert_int_equal(t.plan.n_preempted, 1);
    assert_int_equal(t.plan.n_item, 1);
    result(&t);
    assert_int_equal(t.s.n_waiting, 2);
    ern_arena_close(&t.arena);
}

static void test_the_needy_last_is_preempted_itself(void **state) {
    (void)state;
    table t;
    setup(&t, rules(8, 64, 4), 6);
    add(&t, 0, 15, 1);
    t.s.seq[0].n_len_max = 18;
    add(&t, 1, 8, 8);
    step(&t);
    step(&t); /* 0 computes row 15 in its fourth page; 1 needs a third page and there is none */
    assert_int_equal(t.plan.n_item, 1);
    expect_item(&t, 0, 0, 15, 1, true);
    assert_int_equal(t.s.seq[1].where, SCHED_WAITING);
    assert_int_equal(t.s.seq[1].n_preempted, 1);
    ern_arena_close(&t.arena);
}

/* Head-room after a preemption: 16 pages per running one, 0.025 less per step, never more than they can come to need.
 */
static void test_reserve_decays(void **state) {
    (void)state;
    table t;
    setup(&t, rules(8, 64, 4), 100);
    add(&t, 0, 4, 900);
    step(&t);
    t.s.reserve_milli = 16000;
    step(&t);
    assert_int_equal(t.s.reserve_milli, 15975);
    int32_t hog = t.s.cache.pool.n_free - 16; /* leave 16 free */
    page_hold h[100];
    for (int32_t k = 0; k < hog; k++) assert_true(pages_take(&t.s.cache.pool, &h[k]));
    add(&t, 1, 4, 4);
    sched_make(&t.s, &(sched_budget){ROOM, ROOM}, &t.plan); /* needs 1 + ceil(15.975) */
    assert_int_equal(t.plan.n_item, 1);
    assert_int_equal(t.s.n_waiting, 1);
    result(&t);
    t.s.reserve_milli = 8000;
    sched_make(&t.s, &(sched_budget){ROOM, ROOM}, &t.plan);
    assert_int_equal(t.plan.n_item, 2);
    t.s.reserve_milli = 10;
    sched_make(&t.s, &(sched_budget){ROOM, ROOM}, &t.plan);
    assert_true(t.s.reserve_milli <= 0);
    ern_arena_close(&t.arena);
}

static void test_head_of_line_blocks(void **state) {
    (void)state;
    table t;
    setup(&t, rules(8, 64, 4), 10);
    add(&t, 0, 30, 5); /* eight pages */
    step(&t);
    add(&t, 1, 20, 5); /* five: does not fit */
    add(&t, 2, 2, 5);  /* would, but is behind */
    step(&t);
    assert_int_equal(t.plan.n_item, 1);
    assert_int_equal(t.s.n_waiting, 2);
    sched_leave(&t.s, 0);
    sched_forget(&t.s, 0);
    step(&t);
    assert_int_equal(t.plan.n_item, 2);
    ern_arena_close(&t.arena);
}

static void test_seats(void **state) {
    (void)state;
    table t;
    setup(&t, rules(2, 64, 4), 100);
    for (int32_t i = 0; i < 3; i++) add(&t, i, 2, 5);
    step(&t);
    assert_int_equal(t.s.n_running, 2);
    assert_int_equal(t.s.waiting[0], 2);
    ern_arena_close(&t.arena);
}

static void test_unchunked_prompt_goes_whole(void **state) {
    (void)state;
    table t;
    sched_rules r = rules(8, 32, 4);
    r.chunked = false;
    r.chunk_tokens = 3;
    setup(&t, r, 100);
    add(&t, 0, 20, 5);
    add(&t, 1, 20, 5);
    step(&t);
    assert_int_equal(t.plan.n_item, 1);
    expect_item(&t, 0, 0, 0, 20, true);
    step(&t);
    assert_int_equal(t.plan.n_item, 2);
    expect_item(&t, 1, 1, 0, 20, true);
    ern_arena_close(&t.arena);
}

static void test_priority_orders_queue_and_victims(void **state) {
    (void)state;
    table t;
    setup(&t, rules(1, 64, 4), 100);
    add(&t, 0, 4, 5);
    add(&t, 1, 4, 5);
    t.s.seq[2].where = SCHED_OUT;
    add(&t, 3, 4, 5);
    assert_int_equal(t.s.waiting[0], 0);
    t.s.seq[2] =
        (sched_seq){.id = 99, .priority = -1, .n_prompt = 4, .n_token = 4, .n_asked = 4, .n_len_max = 9, .credit = 256};
    sched_add(&t.s, 2);
    assert_int_equal(t.s.waiting[0], 2);
    step(&t);
    expect_item(&t, 0, 2, 0, 4, true);
    ern_arena_close(&t.arena);
}

/* A parked sequence does not run, gives up its pages before others do, and makes place for one that waits. */
static void test_parked_yields(void **state) {
    (void)state;
    table t;
    setup(&t, rules(2, 64, 4), 20);
    add(&t, 0, 4, 20);
    add(&t, 1, 4, 20);
    add(&t, 2, 4, 20);
    step(&t);
    t.s.seq[0].parked = true;
    step(&t); /* no seat for 2: 0 yields; 2 enters next time */
    assert_int_equal(t.plan.n_item, 1);
    assert_int_equal(t.s.seq[0].where, SCHED_WAITING);
    assert_int_equal(t.s.reserve_milli, 0);
    step(&t);
    assert_int_equal(t.plan.n_item, 2);
    expect_item(&t, 1, 2, 0, 4, true);
    step(&t); /* 0 is first in the queue, parked: passed over */
    assert_int_equal(t.s.seq[0].where, SCHED_WAITING);
    ern_arena_close(&t.arena);
}

/* A parked victim before the needy one in the order: the needy one keeps its place, and takes the pages. */
static void test_parked_victim_comes_before_the_needy(void **state) {
    (void)state;
    table t;
    setup(&t, rules(4, 64, 4), 6);
    add(&t, 0, 12, 8); /* three pages */
    add(&t, 1, 4, 8);  /* one */
    add(&t, 2, 8, 8);  /* two: none left */
    step(&t);
    t.s.seq[0].parked = true;
    step(&t);
    assert_int_equal(t.plan.n_preempted, 1);
    assert_int_equal(t.s.seq[0].where, SCHED_WAITING);
    assert_int_equal(t.plan.n_item, 2);
    expect_item(&t, 0, 1, 4, 1, true);
    expect_item(&t, 1, 2, 8, 1, true);
    ern_arena_close(&t.arena);
}

static void test_reports_are_wanted_once_and_within_credit(void **state) {
    (void)state;
    table t;
    setup(&t, rules(2, 64, 4), 40);
    add(&t, 0, 20, 3);
    t.s.seq[0].n_asked = 1;
    t.s.seq[0].credit = 7;
    make(&t);
    expect_item(&t, 0, 0, 0, 7, false);
    assert_int_equal(t.item[0].report0, 1);
    assert_int_equal(t.item[0].n_report, 7);
    t.s.seq[0].credit = 256;
    make(&t);
    expect_item(&t, 0, 0, 7, 13, true);
    assert_int_equal(t.item[0].report0, 8);
    assert_int_equal(t.item[0].n_report, 12); /* tokens 8..19 */
    assert_int_equal(t.plan.n_want, 13);
    ern_arena_close(&t.arena);
}

static void test_no_room_no_wants(void **state) {
    (void)state;
    table t;
    setup(&t, rules(4, 64, 4), 40);
    add(&t, 0, 6, 3);
    sched_make(&t.s, &(sched_budget){0, ROOM}, &t.plan); /* the row that samples must wait, the rest need not */
    expect_item(&t, 0, 0, 0, 5, false);
    sched_make(&t.s, &(sched_budget){0, ROOM}, &t.plan);
    assert_int_equal(t.plan.n_item, 0);
    sched_make(&t.s, &(sched_budget){1, ROOM}, &t.plan);
    expect_item(&t, 0, 0, 5, 1, true);
    ern_arena_close(&t.arena);
}

/* ---- beside transfers ------------------------------------------------------------------------------------------ */

/* Copies to host memory that are done when the test says so. */
static transfer_job copies[64];
static int32_t n_copy, n_copied;

static bool copy_start(void *ud, const transfer_job *job) {
    (void)ud;
    copies[n_copy++] = *job;
    return true;
}

static int32_t copy_poll(void *ud, transfer_job *done, int32_t n) {
    (void)ud, (void)n;
    if (n_copied == 0) return 0;
    *done = copies[0];
    memmove(copies, copies + 1, sizeof *copies * (size_t)--n_copy);
    n_copied--;
    return 1;
}

static bool copy_on_disk(void *ud, const uint64_t key[2]) { return (void)ud, (void)key, false; }

static const transfer_ops copy_ops = {.start = copy_start, .poll = copy_poll, .on_disk = copy_on_disk};

/* Alone, and every page that is not its own is still being copied out: to give up its pages would bring it back to the
 * same place (seed 1110904 of the simulator). Nobody is admitted to what comes free meanwhile. */
static void test_the_last_waits_for_transfers(void **state) {
    (void)state;
    static const uint8_t salt[TREE_SALT_BYTES];
    static int32_t token[64];
    table t;
    memset(&t, 0, sizeof t);
    ern_arena_open(&t.arena, 0);
    layout l = {.arena = &t.arena};
    sched_rules r = rules(4, 16, 1);
    r.max_len = 8;
    const cache_options kv = {
        .n_page = 10, .page_tokens = 1, .step_tokens = 16, .prefix = true, .n_host_page = 10, .move = &copy_ops};
    n_copy = n_copied = 0;
    sched_open(&t.s, &l, &r, N_SEQ, &kv);
    t.plan.item = t.item;
    for (int32_t k = 0; k < 64; k++) token[k] = k;
    /* Five blocks of somebody who has left: all are being copied out. */
    add(&t, 0, 5, 1);
    t.s.seq[0].token = token, t.s.seq[0].n_keep = 5, t.s.seq[0].path.salt = salt;
    step(&t);
    sched_done(&t.s, 0, 5, true);
    sched_leave(&t.s, 0);
    sched_forget(&t.s, 0);
    add(&t, 1, 5, 3); /* needs 7 pages in the end */
    t.s.seq[1].token = token + 20, t.s.seq[1].path.salt = salt;
    step(&t);
    cache_turn(&t.s.cache);
    assert_int_equal(n_copy, 5);
    assert_int_equal(cache_room(&t.s.cache), 0);
    add(&t, 2, 1, 1);
    t.s.seq[2].token = token + 40, t.s.seq[2].path.salt = salt;
    for (int k = 0; k < 3; k++) {
        make(&t);
        assert_int_equal(t.plan.n_item, 0);
        assert_true(t.plan.waits);
        assert_int_equal(t.plan.n_preempted, 0);
        assert_int_equal(t.s.seq[1].n_computed, 5);
    }
    n_copied = 5;
    assert_true(cache_turn(&t.s.cache));
    step(&t);
    assert_false(t.plan.waits);
    expect_item(&t, 0, 1, 5, 1, true);
    ern_arena_close(&t.arena);
}

/* ---- admission beside a cache ---------------------------------------------------------------------------------- */

/* With reserve_all nothing is admitted that could come to lack a page, and so nothing is ever preempted. */
static void test_reserve_all_never_preempts(void **state) {
    (void)state;
    table t;
    sched_rules r = rules(8, 64, 4);
    r.reserve_all = true;
    r.prompt_pages = 10;
    setup(&t, r, 10);
    for (int32_t i = 0; i < 6; i++) add(&t, i, 4, 13); /* one page now, four in the end */
    step(&t);
    assert_int_equal(t.s.n_running, 2); /* the other two pages would do for now */
    assert_int_equal(t.s.cache.pool.n_free, 8);
    for (int32_t k = 0, n_out = 0; n_out < 6; k++) {
        assert_true(k < 200);
        step(&t);
        assert_int_equal(t.plan.n_preempted, 0);
        for (int32_t i = 0; i < 6; i++) {
            if (t.s.seq[i].where != SCHED_RUNNING || t.s.seq[i].n_token < t.s.seq[i].n_len_max) continue;
            sched_leave(&t.s, i);
            sched_forget(&t.s, i);
            n_out++;
        }
    }
    ern_arena_close(&t.arena);
}

/* Prompts take their part of the pool and no more; one that is alone may have it all. */
static void test_prompts_take_their_share(void **state) {
    (void)state;
    table t;
    sched_rules r = rules(8, 64, 4);
    r.reserve_all = true;
    r.prompt_pages = 4;
    setup(&t, r, 20);
    add(&t, 0, 24, 1); /* six pages */
    step(&t);
    assert_int_equal(t.s.n_running, 1);
    sched_leave(&t.s, 0);
    sched_forget(&t.s, 0);
    for (int32_t i = 1; i < 4; i++) add(&t, i, 8, 1); /* two each */
    step(&t);
    assert_int_equal(t.s.n_running, 2);
    ern_arena_close(&t.arena);
}

static void test_prompts_in_parts_are_bounded(void **state) {
    (void)state;
    table t;
    sched_rules r = rules(8, 60, 4);
    r.max_partial = 2;
    setup(&t, r, 100);
    for (int32_t i = 0; i < 3; i++) add(&t, i, 100, 5);
    add(&t, 3, 10, 5);
    step(&t); /* half of the rows each; the third stops those behind it, for it is first */
    assert_int_equal(t.plan.n_item, 2);
    expect_item(&t, 0, 0, 0, 30, false);
    expect_item(&t, 1, 1, 0, 30, false);
    for (int k = 0; k < 3; k++) step(&t);
    assert_int_equal(t.s.seq[2].where, SCHED_RUNNING); /* their last parts left it room */
    ern_arena_close(&t.arena);
}

static void test_the_short_pass_the_long(void **state) {
    (void)state;
    table t;
    sched_rules r = rules(8, 64, 4);
    r.chunk_tokens = 16;
    r.max_partial = 4;
    r.max_long = 1;
    r.long_tokens = 40;
    setup(&t, r, 200);
    add(&t, 0, 100, 5);
    add(&t, 1, 100, 5);
    add(&t, 2, 10, 5);
    step(&t);
    assert_int_equal(t.plan.n_item, 2);
    expect_item(&t, 1, 2, 0, 10, true);
    assert_int_equal(t.s.seq[1].where, SCHED_WAITING);
    assert_int_equal(t.s.seq[1].path.n_page, 0);
    assert_int_equal(t.s.seq[1].slot, -1);
    for (int k = 0; k < 2; k++) step(&t);
    assert_int_equal(t.s.seq[1].where, SCHED_WAITING);
    step(&t); /* 64 of 100 done: 36 are not long any more */
    assert_int_equal(t.s.seq[1].where, SCHED_RUNNING);
    ern_arena_close(&t.arena);
}

/* Replies wait for the end of a step, so prompts get n_prompt_row of it; where nobody waits, all. */
static void test_prompt_rows_only_while_replies_run(void **state) {
    (void)state;
    table t;
    setup(&t, rules(8, 64, 4), 200);
    const sched_budget few = {ROOM, 8};
    add(&t, 0, 100, 5);
    sched_make(&t.s, &few, &t.plan);
    result(&t);
    expect_item(&t, 0, 0, 0, 64, false); /* nobody waits */
    sched_make(&t.s, &few, &t.plan);
    result(&t);
    expect_item(&t, 0, 0, 64, 36, true);
    add(&t, 1, 100, 5);
    for (int k = 0; k < 3; k++) {
        sched_make(&t.s, &few, &t.plan);
        result(&t);
        assert_int_equal(t.plan.n_item, 2);
        expect_item(&t, 0, 0, 100 + k, 1, true);
        expect_item(&t, 1, 1, 8 * k, 8, false);
    }
    ern_arena_close(&t.arena);
}

/* A disk that has everything, and is as slow as the test wants. */
typedef struct slow_disk {
    transfer_job job[TRANSFER_JOBS_MAX];
    int32_t n_job;
    bool done, ok;
} slow_disk;

static bool slow_start(void *ud, const transfer_job *job) {
    slow_disk *d = ud;
    d->job[d->n_job++] = *job;
    return true;
}

static int32_t slow_poll(void *ud, transfer_job *done, int32_t n) {
    slow_disk *d = ud;
    if (!d->done || d->n_job > n) return 0;
    n = d->n_job;
    for (int32_t k = 0; k < n; k++) {
        done[k] = d->job[k];
        done[k].ok = d->ok;
    }
    d->n_job = 0;
    return n;
}

static bool slow_has(void *ud, const uint64_t key[2]) { return (void)ud, (void)key, true; }

/* Who loads has a seat and pages and no rows, and nobody behind waits for it. */
static void loading(bool ok) {
    static const transfer_ops ops = {slow_start, slow_poll, slow_has};
    static const uint8_t salt[TREE_SALT_BYTES];
    static int32_t token[64];
    table t;
    slow_disk d = {.ok = ok};
    memset(&t, 0, sizeof t);
    ern_arena_open(&t.arena, 0);
    layout l = {.arena = &t.arena};
    sched_rules r = rules(2, 64, 4);
    const cache_options kv = {
        .n_page = 20, .page_tokens = 4, .prefix = true, .disk = true, .move = &ops, .move_ud = &d};
    sched_open(&t.s, &l, &r, N_SEQ, &kv);
    t.plan.item = t.item;
    for (int32_t i = 0; i < 3; i++) {
        add(&t, i, i ? 3 : 14, 5); /* 13 tokens may be found: three blocks; of 3, none */
        t.s.seq[i].token = token;
        t.s.seq[i].path.salt = salt;
    }
    step(&t);
    assert_int_equal(t.s.n_running, 2); /* both seats are taken */
    assert_int_equal(t.plan.n_item, 1);
    expect_item(&t, 0, 1, 0, 3, true);
    assert_true(t.s.seq[0].loading);
    assert_int_equal(t.s.seq[0].path.n_page, 3);
    for (int k = 0; k < 3; k++) {
        cache_turn(&t.s.cache);
        step(&t);
        assert_int_equal(t.plan.n_item, 1);
        assert_int_equal(t.s.seq[0].n_computed, 0);
    }
    assert_int_equal(d.n_job, 3);
    d.done = true;
    cache_turn(&t.s.cache);
    step(&t);
    assert_false(t.s.seq[0].loading);
    expect_item(&t, 0, 0, ok ? 12 : 0, ok ? 2 : 14, true); /* what did not arrive is computed */
    assert_int_equal(t.s.seq[2].where, SCHED_WAITING);
    ern_arena_close(&t.arena);
}

static void test_who_loads_holds_a_seat_and_does_not_run(void **state) {
    (void)state;
    loading(true);
    loading(false);
}

/* Steps of replies alone take 500 us, a prompt row 4 us more. */
static void test_prompt_rows_by_pace(void **state) {
    (void)state;
    ern_engine_options e = {0};
    core c = {.o.engine = &e, .pace = {.base_us = 500, .prompt_us = 4}};
    assert_int_equal(core_prompt_rows(&c), INT32_MAX);
    e.itl_times = 3;
    assert_int_equal(core_prompt_rows(&c), 128); /* 250, in whole tiles */
    c.sched.n_running = 40;
    c.sched.n_waiting = 200; /* seats must be filled: 16 for each, and whole tiles */
    assert_int_equal(core_prompt_rows(&c), 31 * 128 - 40);
    c.sched.n_waiting = 0;
    c.sched.n_running = 5;
    assert_int_equal(core_prompt_rows(&c), 128 - 5);
    e.itl_times = 1.4; /* less than a tile */
    assert_int_equal(core_prompt_rows(&c), 80);
    e.itl_times = 3;
    c.sched.n_running = 0;
    e.itl_target_us = 1000; /* 0.9 of it */
    assert_int_equal(core_prompt_rows(&c), 100);
    e.itl_target_us = 100;
    assert_int_equal(core_prompt_rows(&c), 16); /* prompts get on */
    e.itl_target_us = 0;
    c.pace.prompt_us = 0;
    assert_int_equal(core_prompt_rows(&c), 64);
    c.pace.n_mixed = 32; /* time to see again what replies alone take */
    assert_int_equal(core_prompt_rows(&c), 0);
    c.pace = (core_pace){.prompt_us = 4};
    assert_int_equal(core_prompt_rows(&c), 0);
    e.itl_times = 0;
    e.itl_target_us = 1000;
    assert_int_equal(core_prompt_rows(&c), 225);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_last_waits_for_transfers),
        cmocka_unit_test(test_the_parked_leave_room),
        cmocka_unit_test(test_decodes_come_before_chunks),
        cmocka_unit_test(test_a_chunk_leaves_rows_for_later_decodes),
        cmocka_unit_test(test_pages_on_demand_two_at_once),
        cmocka_unit_test(test_no_page_beyond_the_possible_length),
        cmocka_unit_test(test_overlap_knows_the_length),
        cmocka_unit_test(test_the_last_is_preempted_and_comes_back_first),
        cmocka_unit_test(test_nothing_is_admitted_after_a_preemption),
        cmocka_unit_test(test_the_needy_last_is_preempted_itself),
        cmocka_unit_test(test_reserve_decays),
        cmocka_unit_test(test_head_of_line_blocks),
        cmocka_unit_test(test_seats),
        cmocka_unit_test(test_unchunked_prompt_goes_whole),
        cmocka_unit_test(test_priority_orders_queue_and_victims),
        cmocka_unit_test(test_parked_yields),
        cmocka_unit_test(test_parked_victim_comes_before_the_needy),
        cmocka_unit_test(test_reports_are_wanted_once_and_within_credit),
        cmocka_unit_test(test_no_room_no_wants),
        cmocka_unit_test(test_reserve_all_never_preempts),
        cmocka_unit_test(test_prompts_take_their_share),
        cmocka_unit_test(test_prompts_in_parts_are_bounded),
        cmocka_unit_test(test_the_short_pass_the_long),
        cmocka_unit_test(test_prompt_rows_only_while_replies_run),
        cmocka_unit_test(test_who_loads_holds_a_seat_and_does_not_run),
        cmocka_unit_test(test_prompt_rows_by_pace),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
