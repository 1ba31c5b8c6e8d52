/* The ground: arenas, buffers, rings, the pool, JSON both ways, UTF-8, bf16, files. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/arena.h"
#include "base/buf.h"
#include "base/counter.h"
#include "base/half.h"
#include "base/jsonr.h"
#include "base/jsonw.h"
#include "base/os.h"
#include "base/pool.h"
#include "base/ring.h"
#include "base/status.h"
#include "base/utf8.h"

static void test_arena(void **state) {
    (void)state;
    ern_arena a;
    ern_arena_open(&a, 1 << 20);
    unsigned char *p = ern_arena_take(&a, 100, 64), *q = ern_arena_take(&a, 300000, 4096);
    assert_non_null(p);
    assert_non_null(q);
    assert_int_equal((uintptr_t)p % 64, 0);
    assert_int_equal((uintptr_t)q % 4096, 0);
    for (int i = 0; i < 300000; i++) assert_int_equal(q[i], 0);
    memset(p, 1, 100);
    memset(q, 2, 300000);
    assert_null(ern_arena_take(&a, 1 << 20, 1)); /* past the limit */
    assert_null(ern_arena_take_n(&a, SIZE_MAX / 2, 8));
    assert_string_equal(ern_arena_text(&a, "abc", 2), "ab");
    assert_int_equal(p[99], 1);
    ern_arena_close(&a);
    assert_int_equal(a.used_bytes, 0);
}

static void test_buf(void **state) {
    (void)state;
    ern_buf b;
    ern_buf_init(&b, 10);
    assert_true(ern_buf_text(&b, "12345"));
    assert_true(ern_buf_print(&b, "%d", 678));
    assert_false(ern_buf_text(&b, "abc"));
    assert_true(b.full);
    assert_string_equal(b.data, "12345678");
    assert_false(
        ern_buf_text(&b, "")); /* stays refused until cleared, so that a caller who looks once at the end sees it */
    ern_buf_clear(&b);
    assert_true(ern_buf_text(&b, "0123456789"));
    ern_buf_drop(&b, 4);
    assert_string_equal(b.data, "456789");
    ern_buf_free(&b);
}

enum { RING_ITEMS = 20000, RING_THREADS = 4 };
static ern_ring *shared_ring;

static void *push_many(void *arg) {
    int from = *(int *)arg;
    for (int i = 0; i < RING_ITEMS; i++) {
        int item = from + i;
        while (!ern_ring_push(shared_ring, &item)) usleep(10);
    }
    return NULL;
}

static void test_ring(void **state) {
    (void)state;
    ern_err err;
    assert_int_equal(ern_ring_open(&shared_ring, 64, sizeof(int), &err), ERN_OK);
    pthread_t thread[RING_THREADS];
    int from[RING_THREADS];
    for (int i = 0; i < RING_THREADS; i++) {
        from[i] = i * RING_ITEMS;
        pthread_create(&thread[i], NULL, push_many, &from[i]);
    }
    int last[RING_THREADS];
    for (int i = 0; i < RING_THREADS; i++) last[i] = i * RING_ITEMS - 1;
    for (int n = 0; n < RING_ITEMS * RING_THREADS; n++) {
        int item = -1;
        assert_true(ern_ring_pop(shared_ring, &item, 5000000));
        int who = item / RING_ITEMS;
        assert_int_equal(item, ++last[who]); /* each producer's items come in its order */
    }
    for (int i = 0; i < RING_THREADS; i++) pthread_join(thread[i], NULL);
    int item;
    assert_false(ern_ring_try_pop(shared_ring, &item));
    assert_false(ern_ring_pop(shared_ring, &item, 1000));
    for (int i = 0; i < 64; i++) assert_true(ern_ring_push(shared_ring, &i));
    assert_false(ern_ring_push(shared_ring, &item));
    assert_int_equal(ern_ring_count(shared_ring), 64);
    ern_ring_shut(shared_ring);
    assert_true(ern_ring_pop(shared_ring, &item, -1));
    assert_false(ern_ring_push(shared_ring, &item));
    ern_ring_close(shared_ring);
}

typedef struct region {
    ern_pool *pool;
    atomic_int step[3];
    int late; /* >= 0: the worker that comes last to the first barrier, the next to the second ... */
    int seen_wrong;
    int busy_us; /* that each worker computes in each step */
} region;

static void region_run(void *ud, int worker, int n_worker) {
    region *r = ud;
    for (int s = 0; s < 3; s++) {
        if (r->late >= 0 && worker == (r->late + s) % n_worker) usleep(300); /* so long that the others sleep */
        const int64_t begin_us = ern_now_us();
        while (r->busy_us && ern_now_us() - begin_us < r->busy_us) continue;
        atomic_fetch_add(&r->step[s], 1);
        ern_pool_barrier(r->pool);
        if (worker == 0 && atomic_load(&r->step[s]) != n_worker) r->seen_wrong++;
        ern_pool_barrier(r->pool);
    }
}

/* Processors that each worker may run on. */
static void count_allowed(void *ud, int worker, int n_worker) {
    (void)n_worker;
    ((int *)ud)[worker] = ern_cpu_count();
}

static void *pinned_caller(void *ud) {
    (void)ud;
    int all = ern_cpu_count();
    for (int n = all - 1; n <= all + 1; n++) {
        ern_err err;
        ern_pool *p;
        if (n < 1) continue;
        int *allowed = calloc((size_t)n, sizeof *allowed);
        assert_non_null(allowed);
        assert_int_equal(ern_pool_open(&p, n, true, &err), ERN_OK);
        ern_pool_run(p, count_allowed, allowed);
        for (int w = 1; w < n; w++) assert_int_equal(allowed[w], n == all ? 1 : all);
        ern_pool_close(p);
        free(allowed);
    }
    ern_err err;
    ern_pool *p;
    assert_int_equal(ern_pool_open(&p, all, true, &err), ERN_OK);
    ern_pool_enter(p);
    assert_int_equal(ern_cpu_count(), 1);
    ern_pool_close(p);
    return NULL;
}

/* Only a pool that has every processor ties its workers; the caller is tied when it says that it is worker 0. */
static void test_pool_pins(void **state) {
    (void)state;
    pthread_t t;
    assert_int_equal(pthread_create(&t, NULL, pinned_caller, NULL), 0);
    pthread_join(t, NULL);
}

/* Workers may rest, and come back, while a program takes the last processor: each region has the workers that it says
 * it has, and they meet. */
static void *disturbed_caller(void *ud) {
    (void)ud;
    cpu_set_t all;
    int last = -1, fewest = 512;
    assert_int_equal(sched_getaffinity(0, sizeof all, &all), 0);
    for (int c = 0; c < CPU_SETSIZE; c++)
        if (CPU_ISSET((size_t)c, &all)) last = c;
    const pid_t child = fork();
    if (child == 0) {
        CPU_ZERO(&all);
        CPU_SET((size_t)last, &all);
        (void)sched_setaffinity(0, sizeof all, &all);
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        alarm(20);
        for (volatile unsigned k = 0;; k++) {
        }
    }
    assert_true(child > 0);
    ern_err err;
    region r = {.late = -1};
    assert_int_equal(ern_pool_open(&r.pool, ern_cpu_count(), true, &err), ERN_OK);
    ern_pool_enter(r.pool);
    for (const int64_t end_us = ern_now_us() + 600000; ern_now_us() < end_us;) {
        for (int s = 0; s < 3; s++) atomic_store(&r.step[s], 0);
        r.busy_us = 2000;
        ern_pool_run(r.pool, region_run, &r);
        const int n = atomic_load(&r.step[0]);
        fewest = n < fewest ? n : fewest;
    }
    ern_pool_close(r.pool);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    assert_int_equal(r.seen_wrong, 0);
    assert_true(fewest >= 1);
    print_message("a busy processor: regions of %d workers and more\n", fewest);
    return NULL;
}

static void test_pool_rests(void **state) {
    (void)state;
    pthread_t t;
    assert_int_equal(pthread_create(&t, NULL, disturbed_caller, NULL), 0);
    pthread_join(t, NULL);
}

static void test_pool(void **state) {
    (void)state;
    for (int n = 1; n <= 5; n += 2) {
        ern_err err;
        region r = {0};
        assert_int_equal(ern_pool_open(&r.pool, n, n == 3, &err), ERN_OK);
        assert_int_equal(ern_pool_count(r.pool), n);
        for (int i = 0; i < 250; i++) {
            for (int s = 0; s < 3; s++) atomic_store(&r.step[s], 0);
            r.late = i < 200 ? -1 : i;
            ern_pool_run(r.pool, region_run, &r);
        }
        assert_int_equal(r.seen_wrong, 0);
        ern_pool_close(r.pool);
    }
    for (int64_t total = 0; total < 200; total += 7)
        for (int n = 1; n < 9; n++) {
            int64_t at = 0, from, to;
            for (int w = 0; w < n; w++) {
                ern_pool_share(total, 16, w, n, &from, &to);
                assert_int_equal(from, at);
                assert_true(to >= from && (to == total || to % 16 == 0));
                at = to;
            }
            assert_int_equal(at, total);
        }
}

static const char *written(double v) {
    static ern_buf b = {.limit = 64};
    ern_buf_clear(&b);
    ern_json_print_real(&b, v);
    return b.data;
}

static void test_jsonw(void **state) {
    (void)state;
    /* The right column is what Python's json.dumps prints. */
    assert_string_equal(written(0.1), "0.1");
    assert_string_equal(written(1), "1.0");
    assert_string_equal(written(-0.0), "-0.0");
    assert_string_equal(written(0.30000000000000004), "0.30000000000000004");
    assert_string_equal(written(1e-5), "1e-05");
    assert_string_equal(written(0.0001), "0.0001");
    assert_string_equal(written(123456789012345680.0), "1.2345678901234568e+17");
    assert_string_equal(written(1e16), "1e+16");
    assert_string_equal(written(9999999999999998.0), "9999999999999998.0");
    assert_string_equal(written(5e-324), "5e-324");
    assert_string_equal(written(1e100), "1e+100");

    ern_buf b;
    ern_buf_init(&b, 4096);
    ern_jsonw w;
    ern_jsonw_init(&w, &b);
    ern_jsonw_object(&w);
    ern_jsonw_key(&w, "a\"b");
    ern_jsonw_array(&w);
    ern_jsonw_int(&w, -3);
    ern_jsonw_real(&w, NAN);
    ern_jsonw_bool(&w, true);
    ern_jsonw_object(&w);
    ern_jsonw_object_end(&w);
    ern_jsonw_array_end(&w);
    ern_jsonw_key(&w, "t");
    ern_jsonw_text_n(&w, "\xe4\xbd\xa0\n\x01\xff\0z", 8);
    ern_jsonw_key(&w, "n");
    ern_jsonw_text(&w, NULL);
    ern_jsonw_object_end(&w);
    assert_string_equal(
        b.data, "{\"a\\\"b\":[-3,null,true,{}],\"t\":\"\xe4\xbd\xa0\\n\\u0001\xef\xbf\xbd\\u0000z\",\"n\":null}");
    ern_buf_free(&b);
}

static void test_jsonr(void **state) {
    (void)state;
    ern_err err;
    json_t *v;
    assert_int_equal(ern_json_parse(&v, "{\"a\":[1,2]}", 11, 2, "body", &err), ERN_OK);
    json_decref(v);
    assert_int_equal(ern_json_parse(&v, "{\"a\":[[1]]}", 11, 2, "body", &err), ERN_ERR_INPUT);
    assert_non_null(strstr(err.text, "deeper than 2"));
    assert_int_equal(ern_json_parse(&v, "{\"a\":1,\"a\":2}", 13, 8, "body", &err), ERN_ERR_INPUT);
    assert_int_equal(ern_json_parse(&v, "{\"a\":\"[[[[\\\"[[\"}", 16, 1, "body", &err),
                     ERN_OK); /* brackets in strings */
    json_decref(v);
    assert_int_equal(ern_json_parse(&v, "[1,", 3, 8, "body", &err), ERN_ERR_INPUT);
    assert_int_equal(ern_json_parse(&v, "", 0, 8, "body", &err), ERN_ERR_INPUT);
    size_t n = 200000;
    char *deep = malloc(n);
    memset(deep, '[', n);
    assert_int_equal(ern_json_parse(&v, deep, n, 64, "body", &err), ERN_ERR_INPUT);
    free(deep);
}

static void test_utf8(void **state) {
    (void)state;
    assert_true(ern_utf8_valid("a\xc3\xa9\xe4\xbd\xa0\xf0\x9f\x98\x88", 10));
    const char *bad[] = {"\xc0\x80", "\xed\xa0\x80",     "\xf4\x90\x80\x80", "\x80",
                         "\xe4\xbd", "\xf8\x88\x80\x80", "\xe0\x9f\xbf"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) assert_false(ern_utf8_valid(bad[i], strlen(bad[i])));
    assert_true(ern_utf8_is_prefix("\xf0\x9f\x98", 3));
    assert_false(ern_utf8_is_prefix("\xf0\x8f", 2));
    assert_false(ern_utf8_is_prefix("a", 1));
    /* Every scalar value encodes to its own length and every surrogate is refused. */
    for (unsigned c = 0x80; c < 0x110000; c += 61) {
        char s[4];
        size_t k = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
        if (k == 2) s[0] = (char)(0xc0 | c >> 6), s[1] = (char)(0x80 | (c & 63));
        if (k == 3) s[0] = (char)(0xe0 | c >> 12), s[1] = (char)(0x80 | (c >> 6 & 63)), s[2] = (char)(0x80 | (c & 63));
        if (k == 4)
            s[0] = (char)(0xf0 | c >> 18), s[1] = (char)(0x80 | (c >> 12 & 63)), s[2] = (char)(0x80 | (c >> 6 & 63)),
            s[3] = (char)(0x80 | (c & 63));
        bool surrogate = c >= 0xd800 && c < 0xe000;
        assert_int_equal(ern_utf8_len(s, k), surrogate ? 0 : k);
    }
}

static void test_half(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float f = ern_bf16_to_f32((ern_bf16)h);
        if (!isnan(f)) assert_int_equal(ern_bf16_from_f32(f), h);
    }
    assert_int_equal(ern_bf16_from_f32(1.00390625f), 0x3f80); /* half way between 1 and the next: to even */
    assert_int_equal(ern_bf16_from_f32(1.01171875f), 0x3f82);
    assert_true(isnan(ern_bf16_to_f32(ern_bf16_from_f32(NAN))));
    assert_int_equal(ern_bf16_from_f32(3.4e38f), 0x7f80); /* rounds up to infinity */
}

static void test_counter(void **state) {
    (void)state;
    /* SplitMix64 with seed 0: the first outputs, as published with the algorithm. */
    assert_true(ern_counter64(0, 0) == 0xe220a8397b1dcdafull);
    assert_true(ern_counter64(0, 1) == 0x6e789e6aa1b965f4ull);
    assert_true(ern_counter_key(1, "a") != ern_counter_key(2, "a"));
    assert_true(ern_counter_key(1, "a") != ern_counter_key(1, "b"));
}

static void test_files(void **state) {
    (void)state;
    char dir[] = "/tmp/ernest-base-XXXXXX", path[256];
    assert_non_null(mkdtemp(dir));
    ern_err err;
    assert_int_equal(ern_path_join(path, sizeof path, dir, "f", &err), ERN_OK);
    ern_map m;
    assert_int_equal(ern_map_open(&m, path, &err), ERN_ERR_FILE);
    assert_non_null(strstr(err.text, path));
    FILE *f = fopen(path, "wb");
    fputs("hello", f);
    fclose(f);
    assert_int_equal(ern_map_open(&m, path, &err), ERN_OK);
    assert_int_equal(m.size_bytes, 5);
    assert_memory_equal(m.data, "hello", 5);
    ern_map_close(&m);
    char *text;
    size_t len;
    assert_int_equal(ern_file_read(&text, &len, path, 5, &err), ERN_OK);
    assert_string_equal(text, "hello");
    free(text);
    assert_int_equal(ern_file_read(&text, &len, path, 4, &err), ERN_ERR_FILE);
    assert_int_equal(ern_map_open(&m, dir, &err), ERN_ERR_FILE); /* a folder is not a plain file */
    unlink(path);
    assert_int_equal(mkfifo(path, 0600), 0); /* nobody writes to it: opening it must not wait */
    assert_int_equal(ern_map_open(&m, path, &err), ERN_ERR_FILE);
    assert_int_equal(ern_file_read(&text, &len, path, 5, &err), ERN_ERR_FILE);
    unlink(path);
    rmdir(dir);
    assert_true(ern_memory_total_bytes() >= ern_memory_resident_bytes());
    assert_true(ern_cpu_count() >= 1);
    int64_t t = ern_now_us();
    assert_true(ern_now_us() >= t && t >= 0);
}

static void put_file(const char *dir, const char *name, const char *text) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

/* A limit, what is used, and the file pages in it that can be dropped. */
static void test_cgroup(void **state) {
    (void)state;
    static const char *const name[] = {"memory.max", "memory.current", "memory.stat"};
    char dir[] = "/tmp/ernest-base-XXXXXX", path[128];
    assert_non_null(mkdtemp(dir));
    assert_true(ern_cgroup_left_bytes(dir) == UINT64_MAX); /* no cgroup v2 */
    put_file(dir, "memory.current", "900000\n");
    put_file(dir, "memory.stat",
             "anon 200000\nfile 700000\ninactive_anon 0\nactive_file 100000\ninactive_file 550000\n");
    put_file(dir, "memory.max", "max\n");
    assert_true(ern_cgroup_left_bytes(dir) == UINT64_MAX);
    put_file(dir, "memory.max", "1000000\n");
    assert_int_equal(ern_cgroup_left_bytes(dir), 1000000 - (900000 - 650000));
    put_file(dir, "memory.max", "200000\n");
    assert_int_equal(ern_cgroup_left_bytes(dir), 0);
    for (size_t i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, name[i]);
        unlink(path);
    }
    assert_int_equal(rmdir(dir), 0);
}

static void test_exit_codes(void **state) {
    (void)state;
    ern_err err;
    assert_int_equal(ERN_FAIL(&err, ERN_ERR_FILE, "%s is bad", "x"), ERN_ERR_FILE);
    assert_string_equal(err.text, "x is bad");
    assert_int_equal(ern_exit_code(ERN_OK), 0);
    assert_int_equal(ern_exit_code(ERN_ERR_USAGE), 2);
    assert_int_equal(ern_exit_code(ERN_ERR_MEMORY), 3);
    assert_int_equal(ern_exit_code(ERN_ERR_NET), 1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_arena),      cmocka_unit_test(test_buf),       cmocka_unit_test(test_ring),
        cmocka_unit_test(test_pool),       cmocka_unit_test(test_pool_pins), cmocka_unit_test(test_pool_rests),
        cmocka_unit_test(test_jsonw),      cmocka_unit_test(test_jsonr),     cmocka_unit_test(test_utf8),
        cmocka_unit_test(test_half),       cmocka_unit_test(test_counter),   cmocka_unit_test(test_files),
        cmocka_unit_test(test_exit_codes), cmocka_unit_test(test_cgroup),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
