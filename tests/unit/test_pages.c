/* The page pool: lowest first, references, generations, and that the walk sees each kind of damage. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

#include "base/counter.h"
#include "engine/pages.h"

static pages open_pool(ern_arena *a, int32_t n) {
    pages p;
    layout count = {0}, l = {.arena = a};
    pages_open(&p, &count, n);
    ern_arena_open(a, 0);
    pages_open(&p, &l, n);
    assert_false(l.out);
    assert_int_equal(count.bytes, l.bytes);
    return p;
}

static void test_lowest_first(void **state) {
    (void)state;
    static const int32_t sizes[] = {1, 2, 63, 64, 65, 4095, 4096, 4097, 300000};
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        ern_arena a;
        pages p = open_pool(&a, sizes[k]);
        page_hold h, low, high;
        for (int32_t i = 0; i < sizes[k]; i++) {
            assert_true(pages_take(&p, &h));
            assert_int_equal(h.page, i);
        }
        assert_false(pages_take(&p, &h));
        low = (page_hold){sizes[k] / 3, 0};
        high = (page_hold){sizes[k] - 1, 0};
        pages_drop(&p, high);
        if (low.page != high.page) pages_drop(&p, low);
        assert_true(pages_take(&p, &h));
        assert_int_equal(h.page, low.page);
        assert_int_equal(h.gen, 1); /* a new life */
        assert_false(pages_is_held(&p, low));
        ern_arena_close(&a);
    }
}

static void test_shared_page_is_freed_once(void **state) {
    (void)state;
    ern_arena a;
    pages p = open_pool(&a, 3);
    const char *why = "";
    page_hold h;
    assert_true(pages_take(&p, &h));
    pages_share(&p, h);
    pages_walk_begin(&p);
    assert_true(pages_walk_hold(&p, h, &why));
    assert_false(pages_walk_end(&p, &why)); /* one of two holders shown */
    pages_walk_begin(&p);
    assert_true(pages_walk_hold(&p, h, &why) && pages_walk_hold(&p, h, &why) && pages_walk_end(&p, &why));
    pages_drop(&p, h);
    assert_true(pages_is_held(&p, h));
    assert_int_equal(p.n_free, 2);
    pages_drop(&p, h);
    assert_false(pages_is_held(&p, h));
    assert_int_equal(p.n_free, 3);
    pages_walk_begin(&p);
    assert_false(pages_walk_hold(&p, h, &why));
    ern_arena_close(&a);
}

/* Each table of the pool, damaged: the walk says so. */
static void test_walk_sees_damage(void **state) {
    (void)state;
    for (int kind = 0; kind < 6; kind++) {
        ern_arena a;
        pages p = open_pool(&a, 100);
        const char *why = "";
        page_hold h;
        for (int i = 0; i < 70; i++) assert_true(pages_take(&p, &h));
        pages_walk_begin(&p);
        if (kind == 0) p.ref[5]++;
        if (kind == 1) p.level[0][1] ^= 1ull << 3;
        if (kind == 2) p.n_free++;
        if (kind == 3) p.level[1][0] ^= 1;
        if (kind == 4) p.gen[69]++;
        bool ok = true;
        for (int32_t i = 0; i < 70; i++) ok = ok && pages_walk_hold(&p, (page_hold){i, 0}, &why);
        ok = ok && pages_walk_end(&p, &why);
        assert_int_equal(ok, kind == 5);
        assert_int_equal(strlen(why) > 0, kind != 5);
        ern_arena_close(&a);
    }
}

/* Random takes, shares and drops against a plain array. */
static void test_against_model(void **state) {
    (void)state;
    enum { N = 200 };
    uint64_t seed = 20260717;
    printf("seed %llu\n", (unsigned long long)seed);
    ern_arena a;
    pages p = open_pool(&a, N);
    page_hold hold[4 * N];
    int32_t n_hold = 0, ref[N] = {0};
    const char *why = "";
    for (uint64_t k = 0; k < 100000; k++) {
        uint64_t x = ern_counter64(seed, k);
        bool grow = (x >> 40) % 100 < ((k / 5000) % 2 ? 30 : 70);
        if (grow && n_hold < 4 * N && (x & 1) && n_hold > 0) {
            page_hold h = hold[(x >> 8) % (uint64_t)n_hold];
            pages_share(&p, h);
            ref[h.page]++;
            hold[n_hold++] = h;
        } else if (grow && n_hold < 4 * N) {
            int32_t lowest = 0;
            while (lowest < N && ref[lowest]) lowest++;
            bool ok = pages_take(&p, &hold[n_hold]);
            assert_int_equal(ok, lowest < N);
            if (!ok) continue;
            assert_int_equal(hold[n_hold].page, lowest);
            ref[lowest] = 1;
            n_hold++;
        } else if (n_hold > 0) {
            int32_t at = (int32_t)((x >> 8) % (uint64_t)n_hold);
            pages_drop(&p, hold[at]);
            ref[hold[at].page]--;
            hold[at] = hold[--n_hold];
        }
        if (k % 97) continue;
        pages_walk_begin(&p);
        for (int32_t i = 0; i < n_hold; i++) assert_true(pages_walk_hold(&p, hold[i], &why));
        assert_true(pages_walk_end(&p, &why));
    }
    ern_arena_close(&a);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lowest_first),
        cmocka_unit_test(test_shared_page_is_freed_once),
        cmocka_unit_test(test_walk_sees_damage),
        cmocka_unit_test(test_against_model),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
