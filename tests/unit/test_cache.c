/* The rules of the KV cache, one by one (cache.h). Blocks are of 4 tokens; transfers are done when a test says so. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <cmocka.h>

#include "base/status.h"
#include "engine/cache.h"

enum { P = 4, PATHS = 8, PATH_PAGES = 16, LOADS_ALL = 1000 };

/* The other side of the transfers: what was started and is not done, and what the disk says it has. */
typedef struct mover {
    transfer_job job[TRANSFER_JOBS_MAX];
    int32_t n_job, n_done; /* the first n_done are done */
    bool ok, full;
    uint64_t on_disk[64];
    int32_t n_on_disk;
} mover;

static bool mover_start(void *ud, const transfer_job *job) {
    mover *m = ud;
    if (m->full || m->n_job == TRANSFER_JOBS_MAX) return false;
    m->job[m->n_job++] = *job;
    return true;
}

static int32_t mover_poll(void *ud, transfer_job *done, int32_t n) {
    mover *m = ud;
    int32_t k = 0;
    for (; k < n && m->n_done > 0; k++, m->n_done--) {
        done[k] = m->job[0];
        done[k].ok = m->ok || done[k].kind == TRANSFER_OUT || done[k].kind == TRANSFER_IN;
        if (done[k].kind == TRANSFER_SAVE && done[k].ok) m->on_disk[m->n_on_disk++] = done[k].block.key[0];
        memmove(m->job, m->job + 1, sizeof *m->job * (size_t)--m->n_job);
    }
    return k;
}

static bool mover_on_disk(void *ud, const uint64_t key[2]) {
    const mover *m = ud;
    for (int32_t i = 0; i < m->n_on_disk; i++)
        if (m->on_disk[i] == key[0]) return true;
    return false;
}

static const transfer_ops mover_ops = {mover_start, mover_poll, mover_on_disk};

typedef struct world {
    ern_arena arena;
    cache c;
    mover m;
    cache_path path[PATHS];
    page_hold page[PATHS][PATH_PAGES];
    int32_t node[PATHS][PATH_PAGES];
    uint8_t salt[2][16];
} world;

static void setup(world *w, int32_t n_page, int32_t n_host_page, bool disk) {
    memset(w, 0, sizeof *w);
    w->m.ok = true;
    w->salt[1][5] = 1;
    ern_arena_open(&w->arena, 0);
    layout l = {.arena = &w->arena};
    const cache_options o = {.n_page = n_page,
                             .page_tokens = P,
                             .prefix = true,
                             .n_host_page = n_host_page,
                             .disk = disk,
                             .move = n_host_page > 0 || disk ? &mover_ops : NULL,
                             .move_ud = &w->m};
    cache_open(&w->c, &l, &o);
    for (int32_t i = 0; i < PATHS; i++)
        w->path[i] = (cache_path){.page = w->page[i], .node = w->node[i], .salt = w->salt[0]};
}

static void walk(world *w) {
    const char *why = "";
    cache_walk_begin(&w->c);
    for (int32_t i = 0; i < PATHS; i++)
        if (!cache_walk_path(&w->c, &w->path[i], &why)) fail_msg("%s", why);
    if (!cache_walk_end(&w->c, &why)) fail_msg("%s", why);
}

static void teardown(world *w) {
    walk(w);
    ern_arena_close(&w->arena);
}

/* Block k of text t: 100 t + k, four times. */
static const int32_t *text(int32_t t) {
    static int32_t of[4][PATH_PAGES * P];
    static int32_t turn;
    int32_t *out = of[turn++ % 4];
    for (int32_t k = 0; k < PATH_PAGES * P; k++) out[k] = 100 * t + k / P;
    return out;
}

static int32_t attach(world *w, int32_t i, const int32_t *token, int32_t n_token, int32_t n_load) {
    cache_attach(&w->c, &w->path[i], token, n_token, n_load);
    walk(w);
    return w->path[i].n_node;
}

static void release(world *w, int32_t i) {
    cache_release(&w->c, &w->path[i]);
    walk(w);
}

/* Path i computes n_token and keeps their whole blocks. */
static void compute(world *w, int32_t i, const int32_t *token, int32_t n_token) {
    while (w->path[i].n_page * P < n_token) cache_take(&w->c, &w->path[i]);
    cache_insert(&w->c, &w->path[i], token, n_token, INT32_MAX);
    cache_vouch(&w->c, &w->path[i]);
    walk(w);
}

/* Compute and let go: cached, in use by nobody. */
static void leave_behind(world *w, int32_t t, int32_t n_token) {
    compute(w, 7, text(t), n_token);
    release(w, 7);
}

static void turn(world *w) {
    cache_turn(&w->c);
    walk(w);
}

/* All transfers are done, and so is what follows from that. */
static void settle(world *w) {
    for (int k = 0; k < 20; k++) {
        turn(w);
        w->m.n_done = w->m.n_job;
    }
    turn(w);
}

static tree_list in(const world *w, tree_place place) { return w->c.tree.list[place]; }

/* ---- what is found --------------------------------------------------------------------------------------------- */

static void test_whole_blocks_of_the_same_beginning(void **state) {
    (void)state;
    world w;
    setup(&w, 20, 0, false);
    leave_behind(&w, 1, 11); /* two blocks and three tokens */
    assert_int_equal(w.c.tree.n_used, 2);
    assert_int_equal(cache_room(&w.c), 20);
    assert_int_equal(attach(&w, 0, text(1), 3, 0), 0);
    assert_int_equal(attach(&w, 0, text(1), 4, 0), 1);
    release(&w, 0);
    assert_int_equal(attach(&w, 0, text(1), 7, 0), 1);
    release(&w, 0);
    assert_int_equal(attach(&w, 0, text(1), 40, 0), 2);
    assert_int_equal(w.path[0].n_from[TREE_FROM_POOL], 2);
    assert_int_equal(cache_room(&w.c), 18);
    release(&w, 0);
    int32_t other[8];
    memcpy(other, text(1), sizeof other);
    other[7]++; /* the second block's last token */
    assert_int_equal(attach(&w, 0, other, 8, 0), 1);
    release(&w, 0);
    assert_int_equal(attach(&w, 0, text(1) + P, 4, 0), 0); /* the second block is no beginning */
    teardown(&w);
}

static void test_salts_share_nothing(void **state) {
    (void)state;
    world w;
    setup(&w, 20, 0, false);
    leave_behind(&w, 1, 8);
    w.path[0].salt = w.salt[1];
    assert_int_equal(attach(&w, 0, text(1), 8, 0), 0);
    compute(&w, 0, text(1), 8);
    assert_int_equal(w.c.tree.n_used, 4);
    release(&w, 0);
    assert_int_equal(attach(&w, 1, text(1), 8, 0), 2);
    assert_int_not_equal(w.page[1][0].page, w.page[0][0].page);
    teardown(&w);
}

/* Every key is the same, so every block is in one bucket and looks alike. */
static void test_collisions_are_compared(void **state) {
    (void)state;
    world w;
    setup(&w, 40, 0, false);
    w.c.tree.key_mask = 0;
    for (int32_t t = 0; t < 8; t++) leave_behind(&w, t, 8);
    for (int32_t t = 0; t < 8; t++) {
        assert_int_equal(attach(&w, 0, text(t), 8, 0), 2);
        assert_int_equal(memcmp(tree_tokens(&w.c.tree, w.node[0][1]), text(t) + P, P * sizeof(int32_t)), 0);
        release(&w, 0);
    }
    assert_int_equal(attach(&w, 0, text(9), 8, 0), 0);
    teardown(&w);
}

static void test_off_finds_nothing(void **state) {
    (void)state;
    world w;
    setup(&w, 20, 0, false);
    w.c.o.prefix = false;
    compute(&w, 0, text(1), 8);
    release(&w, 0);
    assert_int_equal(w.c.pool.n_free, 20);
    assert_int_equal(attach(&w, 0, text(1), 8, 0), 0);
    teardown(&w);
}

/* At most n_block blocks are kept: those of the prompt, when replies are not. */
static void test_insert_stops_where_it_is_told(void **state) {
    (void)state;
    world w;
    setup(&w, 20, 0, false);
    for (int k = 0; k < 3; k++) cache_take(&w.c, &w.path[0]);
    cache_insert(&w.c, &w.path[0], text(1), 12, 2);
    assert_int_equal(w.path[0].n_node, 2);
    release(&w, 0);
    assert_int_equal(w.c.pool.n_free, 18);
    assert_int_equal(attach(&w, 1, text(1), 12, 0), 2);
    teardown(&w);
}

/* Two compute the same at once: the second one changes over to the first one's pages and gives its own back. */
static void test_the_same_block_twice_is_one(void **state) {
    (void)state;
    world w;
    setup(&w, 20, 0, false);
    for (int k = 0; k < 2; k++) cache_take(&w.c, &w.path[1]);
    compute(&w, 0, text(1), 8);
    assert_int_equal(w.c.pool.n_free, 16);
    compute(&w, 1, text(1), 8);
    assert_int_equal(w.c.pool.n_free, 18);
    assert_int_equal(w.page[1][1].page, w.page[0][1].page);
    assert_int_equal(w.c.tree.node[w.node[0][1]].lock, 2);
    assert_int_equal(w.c.n_cached, 2);
    teardown(&w);
}

/* What is on disk outlives a path that turns out bad: so it goes there only when a row after it was sound. */
static void test_nothing_unsound_goes_to_disk(void **state) {
    (void)state;
    world w;
    setup(&w, 8, 0, true);
    for (int k = 0; k < 3; k++) cache_take(&w.c, &w.path[0]);
    cache_insert(&w.c, &w.path[0], text(1), 8, INT32_MAX);
    turn(&w);
    assert_int_equal(w.m.n_job, 0);
    assert_int_equal(attach(&w, 1, text(1), 8, LOADS_ALL), 2); /* others may use them meanwhile */
    cache_disown(&w.c, &w.path[0]);
    turn(&w);
    assert_int_equal(w.m.n_job, 0);
    cache_vouch(&w.c, &w.path[1]); /* too late */
    turn(&w);
    assert_int_equal(w.m.n_job, 0);
    release(&w, 0);
    release(&w, 1);
    for (int k = 0; k < 3; k++) cache_take(&w.c, &w.path[0]);
    cache_insert(&w.c, &w.path[0], text(2), 8, INT32_MAX);
    cache_vouch(&w.c, &w.path[0]);
    cache_vouch(&w.c, &w.path[0]); /* once is enough */
    turn(&w);
    assert_int_equal(w.m.n_job, 2);
    release(&w, 0);
    teardown(&w);
}

static void test_disowned_is_not_found(void **state) {
    (void)state;
    world w;
    setup(&w, 20, 0, false);
    leave_behind(&w, 1, 8);
    assert_int_equal(attach(&w, 0, text(1), 8, 0), 2);
    compute(&w, 0, text(1), 16);
    assert_int_equal(attach(&w, 1, text(1), 16, 0), 4);
    cache_disown(&w.c, &w.path[0]); /* its own two are bad; what it found is not its own */
    walk(&w);
    assert_int_equal(attach(&w, 2, text(1), 16, 0), 2);
    compute(&w, 0, text(1), 20); /* nothing is kept after a block that is gone */
    assert_int_equal(w.path[0].n_node, 4);
    cache_disown(&w.c, &w.path[2]); /* computed nothing */
    release(&w, 0);
    assert_int_equal(w.path[1].n_page, 4); /* who has them keeps them until it leaves */
    release(&w, 1);
    release(&w, 2);
    assert_int_equal(w.c.tree.n_used, 2);
    assert_int_equal(cache_room(&w.c), 20);
    teardown(&w);
}

/* ---- room ------------------------------------------------------------------------------------------------------ */

static void test_the_coldest_leaf_goes_first(void **state) {
    (void)state;
    world w;
    setup(&w, 6, 0, false);
    leave_behind(&w, 1, 12);
    leave_behind(&w, 2, 12);
    assert_int_equal(w.c.pool.n_free, 0);
    assert_int_equal(cache_room(&w.c), 6);
    cache_take(&w.c, &w.path[0]); /* text 1 is older: its last block goes */
    walk(&w);
    assert_int_equal(attach(&w, 1, text(1), 12, 0), 2);
    release(&w, 1); /* and is now the warmer */
    for (int k = 0; k < 3; k++) cache_take(&w.c, &w.path[0]);
    walk(&w);
    assert_int_equal(attach(&w, 1, text(2), 12, 0), 0);
    assert_int_equal(attach(&w, 1, text(1), 12, 0), 2);
    assert_int_equal(cache_room(&w.c), 0); /* what is used does not go */
    assert_int_equal(w.c.n_evicted, 4);
    teardown(&w);
}

static void test_what_one_uses_stays(void **state) {
    (void)state;
    world w;
    setup(&w, 4, 0, false);
    leave_behind(&w, 1, 16);
    assert_int_equal(attach(&w, 0, text(1), 8, 0), 2);
    assert_int_equal(cache_room(&w.c), 2);
    cache_take(&w.c, &w.path[1]);
    cache_take(&w.c, &w.path[1]);
    walk(&w);
    assert_int_equal(cache_room(&w.c), 0);
    assert_int_equal(attach(&w, 2, text(1), 16, 0), 2);
    teardown(&w);
}

/* ---- host memory ----------------------------------------------------------------------------------------------- */

static void test_a_few_pages_are_copied_out_early(void **state) {
    (void)state;
    world w;
    setup(&w, 8, 8, false);
    leave_behind(&w, 1, 24);
    turn(&w);
    assert_int_equal(w.m.n_job, 0); /* two are free: enough */
    leave_behind(&w, 2, 8);
    turn(&w);
    assert_int_equal(w.m.n_job, 2);
    assert_int_equal(w.m.job[0].kind, TRANSFER_OUT);
    assert_int_equal(in(&w, TREE_SAVING).n, 2);
    assert_int_equal(cache_room(&w.c), 6); /* pages that are being read cannot be had */
    settle(&w);
    assert_int_equal(in(&w, TREE_CLEAN).n, 2);
    assert_int_equal(cache_room(&w.c), 8);
    cache_take(&w.c, &w.path[0]);
    walk(&w);
    assert_int_equal(in(&w, TREE_HOST).n, 1);
    assert_int_equal(w.c.host_stats.n_out, 1);
    teardown(&w);
}

/* Its last three blocks in host memory, the first one in the pool. */
static void with_blocks_below(world *w) {
    setup(w, 8, 8, false);
    leave_behind(w, 1, 16);
    for (int k = 0; k < 7; k++) {
        cache_take(&w->c, &w->path[6]);
        settle(w);
    }
    assert_int_equal(in(w, TREE_HOST).n, 3);
    release(w, 6);
}

static void test_back_from_host_memory(void **state) {
    (void)state;
    world w;
    with_blocks_below(&w);
    assert_int_equal(attach(&w, 0, text(1), 16, 0), 1); /* may load nothing */
    release(&w, 0);
    assert_int_equal(attach(&w, 0, text(1), 16, 2), 3); /* two */
    assert_int_equal(w.path[0].n_from[TREE_FROM_POOL], 1);
    assert_int_equal(w.path[0].n_from[TREE_FROM_HOST], 2);
    assert_true(cache_is_loading(&w.c, &w.path[0]) && cache_is_busy(&w.c));
    assert_int_equal(attach(&w, 1, text(1), 12, 0), 3); /* waits for the same loads */
    assert_true(cache_is_loading(&w.c, &w.path[1]));
    settle(&w);
    assert_false(cache_is_loading(&w.c, &w.path[0]) || cache_is_loading(&w.c, &w.path[1]) || cache_is_busy(&w.c));
    assert_int_equal(w.path[0].n_here, 3);
    assert_int_equal(w.c.n_host_free, 7); /* in the pool, so not here any more */
    assert_int_equal(w.c.host_stats.n_in, 2);
    teardown(&w);
}

/* A load waits until the steps are collected that its page's last holder was in. */
static void test_a_load_waits_for_steps_in_flight(void **state) {
    (void)state;
    world w;
    with_blocks_below(&w);
    cache_step_submitted(&w.c);
    assert_int_equal(attach(&w, 0, text(1), 16, LOADS_ALL), 4);
    turn(&w);
    assert_int_equal(w.m.n_job, 0);
    cache_step_submitted(&w.c); /* later ones do not matter */
    cache_step_collected(&w.c);
    turn(&w);
    assert_int_equal(w.m.n_job, 3);
    settle(&w);
    assert_false(cache_is_loading(&w.c, &w.path[0]));
    teardown(&w);
}

static void test_nobody_waits_any_more(void **state) {
    (void)state;
    world w;
    with_blocks_below(&w);
    assert_int_equal(attach(&w, 0, text(1), 16, LOADS_ALL), 4);
    release(&w, 0); /* before they start: back to where they were */
    assert_int_equal(in(&w, TREE_HOST).n, 3);
    settle(&w);
    assert_int_equal(w.c.host_stats.n_in, 0);
    assert_int_equal(attach(&w, 0, text(1), 16, LOADS_ALL), 4);
    turn(&w);
    assert_int_equal(w.m.n_job, 3);
    release(&w, 0); /* while they run: their pages are kept until they are done */
    assert_int_equal(cache_room(&w.c), 5);
    settle(&w);
    assert_int_equal(cache_room(&w.c), 8);
    assert_int_equal(attach(&w, 0, text(1), 16, LOADS_ALL), 4);
    settle(&w);
    assert_false(cache_is_loading(&w.c, &w.path[0]));
    teardown(&w);
}

static void test_the_coldest_leaves_host_memory(void **state) {
    (void)state;
    world w;
    setup(&w, 4, 2, false);
    for (int32_t t = 1; t < 6; t++) {
        leave_behind(&w, t, 4);
        settle(&w);
    }
    assert_true(in(&w, TREE_HOST).n + in(&w, TREE_CLEAN).n <= 2);
    assert_int_equal(attach(&w, 0, text(1), 4, LOADS_ALL), 0);
    teardown(&w);
}

/* A block that is computed again while it is in host memory leaves it. */
static void test_computed_again(void **state) {
    (void)state;
    world w;
    with_blocks_below(&w);
    assert_int_equal(attach(&w, 0, text(1), 16, 0), 1);
    compute(&w, 0, text(1), 16);
    assert_int_equal(w.path[0].n_node, 4);
    assert_int_equal(in(&w, TREE_HOST).n, 0);
    assert_int_equal(w.c.n_host_free, 8);
    teardown(&w);
}

/* ---- disk ------------------------------------------------------------------------------------------------------ */

/* All of text 1 on disk, nothing in the pool. */
static void with_blocks_on_disk(world *w) {
    setup(w, 8, 0, true);
    leave_behind(w, 1, 16);
    settle(w);
    assert_int_equal(w->m.n_on_disk, 4);
    for (int k = 0; k < 8; k++) cache_take(&w->c, &w->path[6]);
    release(w, 6);
    assert_int_equal(w->c.tree.n_used, 0);
}

static void test_written_behind_and_read_back(void **state) {
    (void)state;
    world w;
    with_blocks_on_disk(&w);
    assert_int_equal(attach(&w, 0, text(1), 16, LOADS_ALL), 4);
    assert_int_equal(w.path[0].n_from[TREE_FROM_DISK], 4);
    turn(&w);
    assert_int_equal(w.m.job[0].kind, TRANSFER_LOAD);
    assert_int_equal(w.m.job[0].block.parent[0], 0);
    assert_int_equal(w.m.job[1].block.parent[0], w.m.job[0].block.key[0]);
    settle(&w);
    assert_false(cache_is_loading(&w.c, &w.path[0]));
    assert_int_equal(w.m.n_on_disk, 4); /* not written again */
    teardown(&w);
}

/* The first that does not arrive ends the path; what it found before is kept, and is all that it found. */
static void test_a_failed_load_cuts_the_path(void **state) {
    (void)state;
    world w;
    with_blocks_on_disk(&w);
    assert_int_equal(attach(&w, 0, text(1), 16, LOADS_ALL), 4);
    turn(&w);
    w.m.n_done = 2;
    turn(&w);
    assert_true(cache_is_loading(&w.c, &w.path[0]));
    w.m.ok = false;
    w.m.n_done = 1;
    turn(&w);
    assert_false(cache_is_loading(&w.c, &w.path[0]));
    assert_int_equal(w.path[0].n_node, 2);
    assert_int_equal(w.path[0].n_page, 2);
    assert_int_equal(w.path[0].n_found, 2);
    assert_int_equal(w.path[0].n_from[TREE_FROM_DISK], 2);
    settle(&w);
    assert_int_equal(cache_room(&w.c), 6);
    compute(&w, 0, text(1), 16); /* and it computes the rest */
    assert_int_equal(w.path[0].n_node, 4);
    teardown(&w);
}

/* No more is written at once than may keep pages from being taken; a page that is being read counts as no room. */
static void test_writing_pins_few_pages(void **state) {
    (void)state;
    world w;
    setup(&w, 14, 0, true);
    leave_behind(&w, 1, 48);
    turn(&w);
    assert_int_equal(w.m.n_job, 8);
    assert_true(cache_is_saving(&w.c));
    assert_int_equal(cache_room(&w.c), 14 - 8);
    for (int k = 0; k < 6; k++) cache_take(&w.c, &w.path[0]);
    walk(&w);
    assert_int_equal(cache_room(&w.c), 0);
    w.m.n_done = 1;
    turn(&w);
    assert_int_equal(cache_room(&w.c) + w.m.n_job, 8);
    settle(&w);
    assert_false(cache_is_saving(&w.c));
    assert_int_equal(cache_room(&w.c), 8);
    teardown(&w);
}

static void test_a_transfer_that_takes_nothing_now(void **state) {
    (void)state;
    world w;
    setup(&w, 8, 4, true);
    w.m.full = true;
    leave_behind(&w, 1, 32);
    for (int k = 0; k < 3; k++) turn(&w);
    assert_int_equal(in(&w, TREE_DIRTY).n, 8);
    assert_int_equal(w.c.n_host_free, 4);
    w.m.full = false;
    settle(&w);
    assert_int_equal(w.m.n_on_disk, 8);
    assert_int_equal(in(&w, TREE_CLEAN).n, 2);
    teardown(&w);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_whole_blocks_of_the_same_beginning),
        cmocka_unit_test(test_salts_share_nothing),
        cmocka_unit_test(test_collisions_are_compared),
        cmocka_unit_test(test_off_finds_nothing),
        cmocka_unit_test(test_insert_stops_where_it_is_told),
        cmocka_unit_test(test_the_same_block_twice_is_one),
        cmocka_unit_test(test_nothing_unsound_goes_to_disk),
        cmocka_unit_test(test_disowned_is_not_found),
        cmocka_unit_test(test_the_coldest_leaf_goes_first),
        cmocka_unit_test(test_what_one_uses_stays),
        cmocka_unit_test(test_a_few_pages_are_copied_out_early),
        cmocka_unit_test(test_back_from_host_memory),
        cmocka_unit_test(test_a_load_waits_for_steps_in_flight),
        cmocka_unit_test(test_nobody_waits_any_more),
        cmocka_unit_test(test_the_coldest_leaves_host_memory),
        cmocka_unit_test(test_computed_again),
        cmocka_unit_test(test_written_behind_and_read_back),
        cmocka_unit_test(test_a_failed_load_cuts_the_path),
        cmocka_unit_test(test_writing_pins_few_pages),
        cmocka_unit_test(test_a_transfer_that_takes_nothing_now),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
