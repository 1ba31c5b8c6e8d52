/* The disk tier: what was written is found again, whatever is damaged, cut, planted or fails is a miss, and the tier
 * goes on. Blocks are small: 4 tokens and 64 bytes, so that every byte of a file can be tried. */
#include "made_model.h"
#include "store_faults.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>
#include <pthread.h>

#include "base/log.h"
#include "base/os.h"
#include "engine/store_folder.h"
#include "engine/store_index.h"

enum { N_TOKEN = 4, BLOCK_BYTES = 64, FILE_BYTES = STORE_FIXED_BYTES + 4 * N_TOKEN + BLOCK_BYTES, PATH_BYTES = 256 };
enum { MINUTE_US = 60 * 1000000 };

static const int errors[] = {EIO, ENOSPC, EACCES, EMFILE, EINTR, 0}; /* 0: short */
enum { N_ERROR = sizeof errors / sizeof *errors };
static bool is_harmless(int error) { return error == EINTR || error == 0; }

typedef struct world {
    char dir[64];
    int n_fd; /* open before */
    store_options options;
    store *s;
} world;

/* Block i: its tokens and payload follow from i. */
typedef struct block {
    store_block b;
    int32_t token[N_TOKEN];
    uint8_t payload[BLOCK_BYTES];
} block;

static uint64_t mix(uint64_t x) {
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

static const block *made(int i) {
    static block of[4];
    static int turn;
    block *k = &of[turn++ % 4];
    uint64_t n = (uint64_t)i * 8;
    *k = (block){.b = {.key = {mix(n), mix(n + 1)}, .parent = {mix(n + 2), mix(n + 3)}, .token = k->token}};
    memset(k->b.salt, i & 0xff, sizeof k->b.salt);
    for (int t = 0; t < N_TOKEN; t++) k->token[t] = i * N_TOKEN + t - 2;
    for (int c = 0; c < BLOCK_BYTES; c++) k->payload[c] = (uint8_t)mix(n * BLOCK_BYTES + (uint64_t)c);
    return k;
}

static void path_of(char path[PATH_BYTES], const world *w, int i) {
    char finger[STORE_HEX + 1];
    const block *k = made(i);
    store_hex(finger, w->options.fingerprint);
    snprintf(path, PATH_BYTES, "%s/%s/%02x/%016llx%016llx.kv", w->dir, finger, (unsigned)(k->b.key[0] >> 56),
             (unsigned long long)k->b.key[0], (unsigned long long)k->b.key[1]);
}

/* path_of(i), of which the last part is another. */
static void path_beside(char path[PATH_BYTES], const world *w, int i, const char *name) {
    path_of(path, w, i);
    snprintf(strrchr(path, '/') + 1, 80, "%s", name);
}

static bool put(const world *w, int i) {
    const block *k = made(i);
    return store_write(w->s, &k->b, k->payload);
}
static bool has(const world *w, int i) { return store_has(w->s, made(i)->b.key); }

/* Read; a payload that is given out is the right one. */
static bool get(const world *w, int i) {
    const block *k = made(i);
    uint8_t out[BLOCK_BYTES];
    memset(out, 0xee, sizeof out);
    if (!store_read(w->s, &k->b, out)) return false;
    assert_memory_equal(out, k->payload, BLOCK_BYTES);
    return true;
}

static ern_tier_stats stats(const world *w) {
    ern_tier_stats t;
    store_stats(w->s, &t);
    return t;
}

static void open_again(world *w) {
    ern_err err = {0};
    store_close(w->s);
    w->s = NULL;
    ern_status r = store_open(&w->s, &w->options, &err);
    if (r != ERN_OK) print_message("%s\n", err.text);
    assert_int_equal(r, ERN_OK);
}

static void set_age(const world *w, int i, int64_t seconds) {
    char path[PATH_BYTES];
    struct timespec t[2] = {{.tv_sec = 0}, {.tv_sec = 1000000000 - seconds}};
    path_of(path, w, i);
    assert_int_equal(utimensat(AT_FDCWD, path, t, AT_SYMLINK_NOFOLLOW), 0);
}

static bool exists(const char *path) {
    struct stat st;
    return lstat(path, &st) == 0;
}

static void file_write(const char *path, const void *data, size_t n) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static size_t file_read(const char *path, uint8_t *data, size_t n) {
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    size_t got = fread(data, 1, n, f);
    fclose(f);
    return got;
}

static int count_fds(void) {
    DIR *d = opendir("/proc/self/fd");
    int n = 0;
    while (readdir(d)) n++;
    closedir(d);
    return n;
}

static int setup(void **state) {
    world *w = calloc(1, sizeof *w);
    made_dir(w->dir);
    w->n_fd = count_fds();
    w->options = (store_options){.dir = w->dir,
                                 .limit_bytes = 1000 * FILE_BYTES + 7,
                                 .block_bytes = BLOCK_BYTES,
                                 .n_token = N_TOKEN,
                                 .fingerprint = {0xab, 0xcd, 1, 2, 3},
                                 .now_us = fault_now,
                                 .wait_us = MINUTE_US, /* all names are read at return, however slow the machine */
                                 .sys = &fault_sys};
    fault.full = false;
    atomic_store(&fault.stat_us, 0);
    (void)fault_end();
    open_again(w);
    *state = w;
    return 0;
}

static int teardown(void **state) {
    world *w = *state;
    store_close(w->s);
    int left = count_fds() - w->n_fd;
    if (left) print_message("%d descriptors left open\n", left);
    made_dir_remove(w->dir);
    free(w);
    return left;
}

/* ---- found again ------------------------------------------------------------------------------------------------- */

static void test_round_trip(void **state) {
    world *w = *state;
    for (int i = 0; i < 20; i++) {
        assert_false(has(w, i) || get(w, i));
        assert_true(put(w, i) && has(w, i) && get(w, i));
    }
    for (int i = 0; i < 20; i++) assert_true(put(w, i) && get(w, i)); /* there already */
    ern_tier_stats t = stats(w);
    assert_true(t.n_block == 20 && t.n_block_max == 1000 && t.n_out == 20 && t.n_in == 40 && !t.off);
    assert_true(t.n_evicted == 0 && t.n_error == 0);
    char path[PATH_BYTES];
    uint8_t data[FILE_BYTES + 1];
    path_of(path, w, 7);
    assert_int_equal(file_read(path, data, sizeof data), FILE_BYTES);
    assert_memory_equal(data, "ERNKVBLK\1\0\0\0\220\0\0\0\253\315\1\2\3", 21);
    assert_memory_equal(data + FILE_BYTES - BLOCK_BYTES, made(7)->payload, BLOCK_BYTES);
    assert_true(store_memory_bytes(&w->options) > 1000 * sizeof(store_entry));
}

static void test_restart(void **state) {
    world *w = *state;
    for (int i = 0; i < 300; i++) assert_true(put(w, i));
    open_again(w);
    assert_int_equal(stats(w).n_block, 300);
    for (int i = 0; i < 300; i++) assert_true(has(w, i) && get(w, i));
    assert_true(put(w, 300) && get(w, 300));
    w->options.fingerprint[15] = 1; /* another model: nothing of it */
    open_again(w);
    for (int i = 0; i < 300; i++) assert_false(has(w, i) || get(w, i));
}

/* A read tells the disk when the block was used last, but not every read. */
static void test_touch(void **state) {
    world *w = *state;
    char path[PATH_BYTES];
    struct stat st;
    assert_true(put(w, 1) && put(w, 2));
    set_age(w, 1, 5);
    open_again(w);
    path_of(path, w, 1);
    assert_true(get(w, 1));
    assert_int_equal(stat(path, &st), 0);
    assert_true(st.st_mtime > 1000000000);
    set_age(w, 1, 5);
    assert_true(get(w, 1));
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mtime, 1000000000 - 5);
}

/* ---- damage ------------------------------------------------------------------------------------------------------ */

/* What is under block i's name is a miss, and is deleted; the block can be kept again. */
static void assert_bad(const world *w, int i) {
    char path[PATH_BYTES];
    path_of(path, w, i);
    uint64_t n = stats(w).n_error;
    assert_true(has(w, i));
    assert_false(get(w, i));
    assert_false(has(w, i));
    assert_false(exists(path));
    assert_int_equal(stats(w).n_error, n + 1);
    assert_true(put(w, i) && get(w, i));
}

static void test_every_byte(void **state) {
    world *w = *state;
    char path[PATH_BYTES];
    uint8_t data[FILE_BYTES];
    path_of(path, w, 3);
    assert_true(put(w, 3));
    assert_int_equal(file_read(path, data, sizeof data), FILE_BYTES);
    for (int i = 0; i < FILE_BYTES * 2; i++) {
        uint8_t flip = (uint8_t)(i % 2 ? 0xff : 1u << i / 2 % 8);
        data[i / 2] ^= flip;
        file_write(path, data, sizeof data);
        assert_bad(w, 3);
        data[i / 2] ^= flip;
    }
    file_write(path, data, sizeof data);
    assert_true(get(w, 3));
    assert_false(stats(w).off); /* bad files are no errors of the system */
}

static void test_every_length(void **state) {
    world *w = *state;
    char path[PATH_BYTES];
    static uint8_t data[FILE_BYTES + 5000];
    path_of(path, w, 3);
    assert_true(put(w, 3));
    assert_int_equal(file_read(path, data, sizeof data), FILE_BYTES);
    for (size_t n = 0; n < FILE_BYTES; n++) {
        file_write(path, data, n);
        assert_bad(w, 3);
    }
    static const size_t more[] = {1, 2, 64, 4096};
    for (size_t k = 0; k < 4; k++) {
        file_write(path, data, FILE_BYTES + more[k]);
        assert_bad(w, 3);
    }
}

/* Another block under the same key: what a hash that collides, or a file that was moved, would look like. */
static void test_other_block(void **state) {
    world *w = *state;
    uint8_t out[BLOCK_BYTES];
    for (int what = 0; what < 3 + N_TOKEN; what++) {
        block k = *made(1);
        k.b.token = k.token;
        assert_true(put(w, 1));
        if (what < 2)
            k.b.parent[what] ^= 1;
        else if (what == 2)
            k.b.salt[15] ^= 0x80;
        else
            k.token[what - 3] ^= 1 << 20;
        assert_false(store_read(w->s, &k.b, out));
        assert_false(has(w, 1));
    }
    char one[PATH_BYTES], two[PATH_BYTES];
    path_of(one, w, 1), path_of(two, w, 2);
    assert_true(put(w, 1) && put(w, 2));
    assert_int_equal(rename(two, one), 0);
    assert_bad(w, 1);
    world other = *w; /* the same block of another model */
    other.s = NULL;
    other.options.fingerprint[0] ^= 1;
    open_again(&other);
    assert_true(put(&other, 1));
    path_of(two, &other, 1);
    assert_int_equal(rename(two, one), 0);
    assert_bad(w, 1);
    store_close(other.s);
}

static void test_vanished(void **state) {
    world *w = *state;
    char path[PATH_BYTES];
    assert_true(put(w, 1) && put(w, 2));
    path_of(path, w, 1);
    unlink(path);
    assert_false(get(w, 1) || has(w, 1));
    path_of(path, w, 2);
    unlink(path);
    *strrchr(path, '/') = 0;
    assert_int_equal(rmdir(path), 0);
    assert_false(get(w, 2) || has(w, 2));
    assert_true(put(w, 1) && put(w, 2) && get(w, 1) && get(w, 2));
    assert_int_equal(stats(w).n_error, 0);
}

/* Links, pipes and folders under our names: not followed, not waited for, and what they lead to stays as it is. */
static void test_planted(void **state) {
    world *w = *state;
    char path[PATH_BYTES], beside[PATH_BYTES], aside[PATH_BYTES];
    snprintf(aside, sizeof aside, "%s/aside", w->dir);
    path_of(path, w, 1);
    assert_true(put(w, 1));
    assert_int_equal(rename(path, aside), 0); /* a good file, but behind a link */
    assert_int_equal(symlink(aside, path), 0);
    assert_bad(w, 1);
    assert_true(exists(aside));
    unlink(path);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_bad(w, 1);
    unlink(path);
    assert_int_equal(mkdir(path, 0700), 0);
    assert_false(get(w, 1) || has(w, 1));
    assert_false(put(w, 1)); /* nothing can be put in its place */
    assert_int_equal(rmdir(path), 0);
    path_of(beside, w, 1);
    strcpy(strrchr(beside, '.'), ".tmp");
    assert_false(exists(beside));
    assert_int_equal(symlink("/dev/null", beside), 0);
    assert_true(put(w, 1) && get(w, 1) && !exists(beside));
    assert_int_equal(unlink(path), 0);
    assert_int_equal(symlink(aside, path), 0); /* not seen at a start, and still not followed */
    open_again(w);
    assert_false(has(w, 1) || get(w, 1));
    assert_true(exists(path) && exists(aside));
    assert_true(put(w, 1) && get(w, 1));
    *strrchr(path, '/') = 0; /* now the folder of its first digits is a link */
    strcpy(strrchr(aside, '/'), "/moved");
    assert_int_equal(rename(path, aside), 0);
    assert_int_equal(symlink(aside, path), 0);
    assert_false(get(w, 1) || has(w, 1) || put(w, 1));
    open_again(w);
    assert_false(get(w, 1) || has(w, 1) || put(w, 1));
}

static void test_leftovers(void **state) {
    world *w = *state;
    static const struct {
        const char *name;
        bool stays;
    } file[] = {{"%s.tmp", false},  {"%s.kv~", true}, {"%s", true},        {"x%s.kv", true}, {"notes", true},
                {"%.31s.kv", true}, {"%s0.kv", true}, {"%.31sA.kv", true}, {"%s.kv", false}};
    char path[PATH_BYTES], name[80], hex[STORE_HEX + 1] = "";
    assert_true(put(w, 1) && put(w, 2));
    path_of(path, w, 1);
    memcpy(hex, strrchr(path, '/') + 1, STORE_HEX);
    hex[31] = hex[31] == '0' ? '1' : '0';
    for (int round = 0; round < 2; round++) {
        for (size_t k = 0; k < sizeof file / sizeof *file; k++) {
            snprintf(name, sizeof name, file[k].name, hex);
            path_beside(path, w, 1, name);
            if (round == 0)
                file_write(path, "short", 5);
            else
                assert_int_equal(exists(path), file[k].stays);
        }
        open_again(w);
    }
    path_beside(path, w, 1, "elsewhere.kv"); /* a good name in the folder of other digits is none of ours */
    *strrchr(path, '/') = 0;
    snprintf(strrchr(path, '/'), 60, "/%02x/%s.kv", (unsigned)(made(2)->b.key[0] >> 56), hex);
    file_write(path, "short", 5);
    open_again(w);
    assert_true(exists(path) && get(w, 1) && get(w, 2));
    assert_int_equal(stats(w).n_error, 0);
}

/* ---- errors of the system ---------------------------------------------------------------------------------------- */

/* Every call of a write that has to make room, in a folder where an old write was cut off. */
static void test_faults_write(void **state) {
    world *w = *state;
    w->options.limit_bytes = 3 * FILE_BYTES;
    open_again(w);
    int i = 0, n_call = 0;
    for (int e = 0; e < N_ERROR; e++) {
        bool there = true;
        for (int at = 0; there; at++, i++) {
            char path[PATH_BYTES];
            for (int k = 0; k < 3; k++) assert_true(put(w, 100000 + i * 3 + k));
            path_of(path, w, i);
            *strrchr(path, '/') = 0;
            (void)mkdir(path, 0700);
            path_of(path, w, i);
            strcpy(strrchr(path, '.'), ".tmp");
            file_write(path, "cut", at % 2 ? 3 : 0);
            fault_begin(at, errors[e]);
            bool kept = put(w, i);
            there = fault_end();
            atomic_fetch_add(&fault_now_us, 3LL * MINUTE_US);
            assert_int_equal(has(w, i), kept);
            assert_int_equal(get(w, i), kept);
            assert_true(kept || !is_harmless(errors[e]));
            assert_true(kept || there);
            assert_true(put(w, i) && get(w, i));
            assert_false(exists(path));
            assert_true(stats(w).n_block <= 3);
            n_call = at > n_call ? at : n_call;
        }
    }
    assert_true(n_call >= 10);
}

static void test_faults_read(void **state) {
    world *w = *state;
    int n_call = 0;
    for (int e = 0; e < N_ERROR; e++) {
        bool there = true;
        for (int at = 0; there; at++) {
            assert_true(put(w, 1));
            set_age(w, 1, 5); /* so that it is touched */
            open_again(w);
            fault_begin(at, errors[e]);
            bool found = get(w, 1);
            there = fault_end();
            assert_true(found || (there && !is_harmless(errors[e])));
            if (errors[e] == EMFILE) assert_true(has(w, 1)); /* not the file's fault */
            assert_int_equal(stats(w).n_error, !found);
            assert_true(put(w, 1) && get(w, 1));
            n_call = at > n_call ? at : n_call;
        }
    }
    assert_true(n_call >= 7);
}

/* Opening, with blocks, something left behind and too much of another model: it opens or says why, and what a fault hid
 * is there the next time. */
static void test_faults_open(void **state) {
    world *w = *state, other = *w;
    char path[PATH_BYTES], left[STORE_NAME_BYTES];
    int n_call = 0;
    other.s = NULL;
    other.options.fingerprint[0] ^= 1;
    w->options.limit_bytes = 4 * FILE_BYTES;
    for (int e = 0; e < N_ERROR; e++) {
        bool there = true;
        for (int at = 0; there; at++) {
            open_again(&other);
            for (int i = 0; i < 2; i++) assert_true(put(&other, i));
            store_close(other.s);
            other.s = NULL;
            open_again(w);
            for (int i = 0; i < 3; i++) assert_true(put(w, i));
            store_close(w->s);
            snprintf(left, sizeof left, "%02xffffffffffffffffffffffffffffff.tmp", (unsigned)(made(2)->b.key[0] >> 56));
            path_beside(path, w, 2, left);
            file_write(path, "cut", 3);
            ern_err err = {0};
            fault_begin(at, errors[e]);
            ern_status r = store_open(&w->s, &w->options, &err);
            there = fault_end();
            assert_true(r == ERN_OK || (there && !is_harmless(errors[e]) && strstr(err.text, "--kvcache-storage-dir")));
            for (int i = 0; r == ERN_OK && i < 3; i++) assert_int_equal(has(w, i), get(w, i));
            if (r != ERN_OK) assert_null(w->s);
            open_again(w);
            for (int i = 0; i < 3; i++) assert_true(get(w, i));
            assert_false(exists(path));
            n_call = at > n_call ? at : n_call;
        }
    }
    assert_true(n_call >= 30);
}

static bool put_failing(const world *w, int i) {
    fault_begin(0, EIO);
    bool kept = put(w, i);
    (void)fault_end();
    return kept;
}

static void test_off_and_back(void **state) {
    world *w = *state;
    assert_true(put(w, 1));
    atomic_fetch_add(&fault_now_us, MINUTE_US);
    for (int i = 0; i < 6; i++) { /* two in a minute, for long, are borne */
        assert_false(put_failing(w, 9));
        assert_false(stats(w).off);
        atomic_fetch_add(&fault_now_us, MINUTE_US / 2 + 1);
    }
    atomic_fetch_add(&fault_now_us, MINUTE_US);
    for (int i = 0; i < 3; i++) {
        assert_true(has(w, 1) && put(w, 1) && get(w, 1));
        assert_false(put_failing(w, 9));
        atomic_fetch_add(&fault_now_us, MINUTE_US / 2 - 1);
    }
    for (int i = 0; i < 2; i++) {
        assert_true(stats(w).off);
        fault_begin(-1, EIO);
        assert_false(has(w, 1) || get(w, 1) || put(w, 2) || put(w, 1));
        (void)fault_end();
        assert_int_equal(fault.n_call, 0); /* the disk is left alone */
        if (i == 0) atomic_fetch_add(&fault_now_us, MINUTE_US / 2);
    }
    atomic_fetch_add(&fault_now_us, 1);
    assert_false(stats(w).off);
    assert_true(has(w, 1) && get(w, 1) && put(w, 2) && get(w, 2));
    assert_int_equal(stats(w).n_error, 9);
}

/* A full device: the oldest blocks are given up, once; then it is an error. */
static void test_full_device(void **state) {
    world *w = *state;
    for (int i = 0; i < 30; i++) assert_true(put(w, i));
    bool there = true, shed = false;
    for (int at = 0; there; at++) {
        fault_begin(at, ENOSPC);
        assert_true(put(w, 100 + at));
        there = fault_end();
        assert_true(get(w, 100 + at));
        shed = shed || stats(w).n_evicted > 0;
        for (int i = 0; i < 30; i++) assert_true(put(w, i));
    }
    assert_true(shed && stats(w).n_error == 0);
    fault.full = true;
    uint64_t n = stats(w).n_evicted;
    for (int i = 0; i < 3; i++) {
        assert_false(stats(w).off);
        assert_false(put(w, 200 + i) || has(w, 200 + i) || get(w, 200 + i));
    }
    assert_true(stats(w).off && stats(w).n_error == 3);
    assert_int_equal(stats(w).n_evicted, n + 24);
    fault.full = false;
    atomic_fetch_add(&fault_now_us, MINUTE_US);
    assert_true(put(w, 200) && get(w, 200));
}

/* ---- room -------------------------------------------------------------------------------------------------------- */

static void test_limit(void **state) {
    world *w = *state;
    w->options.limit_bytes = 6 * FILE_BYTES - 1;
    open_again(w);
    for (int i = 0; i < 5; i++) assert_true(put(w, i));
    assert_true(get(w, 0)); /* used: 1 is the oldest now */
    char lost[PATH_BYTES];
    path_of(lost, w, 2);
    unlink(lost); /* by someone else, before it is given up */
    for (int i = 5; i < 8; i++) assert_true(put(w, i));
    for (int i = 0; i < 8; i++) {
        char path[PATH_BYTES];
        path_of(path, w, i);
        bool stays = i == 0 || i >= 4;
        assert_int_equal(has(w, i), stays);
        assert_int_equal(exists(path), stays);
    }
    assert_int_equal(stats(w).n_evicted, 3);
    for (int i = 4; i < 8; i++) set_age(w, i, i == 5 ? 500 : i);
    open_again(w);
    assert_true(put(w, 20) && !has(w, 5) && has(w, 7));
    assert_true(put(w, 21) && !has(w, 7) && has(w, 6));
}

/* More files than a lowered limit allows: the ones used last stay, whatever the order of names. */
static void test_lowered_limit(void **state) {
    world *w = *state;
    for (int i = 0; i < 100; i++) assert_true(put(w, i));
    for (int i = 0; i < 100; i++) set_age(w, i, (i * 37) % 100);
    w->options.limit_bytes = 7 * FILE_BYTES;
    open_again(w);
    int n_file = 0;
    for (int i = 0; i < 100; i++) {
        char path[PATH_BYTES];
        path_of(path, w, i);
        n_file += exists(path);
        assert_int_equal(has(w, i), (i * 37) % 100 < 7);
        assert_int_equal(get(w, i), (i * 37) % 100 < 7);
    }
    assert_int_equal(n_file, 7);
    assert_int_equal(stats(w).n_evicted, 93);
}

static int count_files(world *w) {
    int n = 0;
    for (int i = 0; i < 10; i++) {
        char path[PATH_BYTES];
        path_of(path, w, i);
        n += exists(path);
    }
    return n;
}

/* Other models' blocks go first, the longest unused model's before; those of a running process are its own. */
static void test_other_models(void **state) {
    world *w = *state, a = *w, b = *w, c = *w;
    world *all[] = {&a, &b, &c};
    char notes[PATH_BYTES];
    for (int m = 0; m < 3; m++) {
        all[m]->s = NULL;
        all[m]->options.fingerprint[0] = (uint8_t)m;
        open_again(all[m]);
        for (int i = 0; i < 4; i++) {
            assert_true(put(all[m], i));
            set_age(all[m], i, m == 1 ? 1000 : 10);
        }
        if (m < 2) store_close(all[m]->s);
    }
    path_beside(notes, &b, 0, "notes");
    file_write(notes, "x", 1);
    w->options.limit_bytes = 8 * FILE_BYTES;
    open_again(w);
    assert_int_equal(count_files(&b), 4);
    for (int i = 0; i < 2; i++) assert_true(put(w, i));
    assert_int_equal(count_files(&b), 2); /* the older, as far as need be */
    assert_int_equal(count_files(&a), 4);
    for (int i = 2; i < 8; i++) assert_true(put(w, i));
    assert_int_equal(count_files(w), 8);
    assert_int_equal(count_files(&a) + count_files(&b), 0);
    assert_int_equal(count_files(&c), 4);
    assert_true(exists(notes) && stats(w).n_evicted == 0);
    assert_true(put(w, 8) && stats(w).n_evicted == 1);
    assert_true(get(&c, 0) && put(&c, 4));
    store_close(c.s);
    w->options.limit_bytes = 2 * FILE_BYTES; /* too much from the start: the others' first, then ours */
    open_again(w);
    assert_int_equal(count_files(&c), 0);
    assert_int_equal(stats(w).n_block, 2);
    assert_int_equal(stats(w).n_error, 0);
}

/* ---- opening ----------------------------------------------------------------------------------------------------- */

static void refuse(const store_options *o, ern_code code, const char *flag, const char *says) {
    ern_err err = {0};
    store *s;
    assert_int_equal(store_open(&s, o, &err), code);
    assert_null(s);
    if (!strstr(err.text, flag) || !strstr(err.text, says) || !strstr(err.text, o->dir)) fail_msg("%s", err.text);
}

static void test_refused(void **state) {
    world *w = *state;
    static const char dir_flag[] = "--kvcache-storage-dir";
    store_options o = w->options;
    refuse(&o, ERN_ERR_USAGE, dir_flag, "another process");
    o.limit_bytes = FILE_BYTES - 1;
    refuse(&o, ERN_ERR_USAGE, "--kvcache-storage-gb", "208 bytes");
    o = w->options;
    char path[PATH_BYTES], deep[PATH_BYTES + 8];
    snprintf(path, sizeof path, "%s/file", w->dir);
    file_write(path, "", 0);
    o.dir = path;
    refuse(&o, ERN_ERR_FILE, dir_flag, "Not a directory");
    snprintf(deep, sizeof deep, "%s/no", path);
    o.dir = deep;
    refuse(&o, ERN_ERR_FILE, dir_flag, "Not a directory");
    unlink(path);
    refuse(&o, ERN_ERR_FILE, dir_flag, "No such file");
    store_close(w->s); /* then it is free */
    w->s = NULL;
    open_again(w);
}

/* A folder whose names take longer to read than open waits. */
static void test_slow_folder(void **state) {
    world *w = *state;
    enum { N = 300, SLOW_US = 20000 };
    char path[PATH_BYTES];
    for (int i = 0; i < N; i++) assert_true(put(w, i));
    atomic_store(&fault.stat_us, SLOW_US);
    w->options.wait_us = 1;
    int64_t before = ern_now_us();
    open_again(w); /* and closed again at once: within a stat or two */
    store_close(w->s);
    w->s = NULL;
    assert_true(ern_now_us() - before < N * SLOW_US / 2);
    open_again(w);
    int bad = -1, good = -1;
    for (int i = 0; good < 0; i = (i + 1) % N)
        if (i != bad && has(w, i)) *(bad < 0 ? &bad : &good) = i;
    bool early = !put(w, N);
    path_of(path, w, bad);
    file_write(path, "bad", 3);
    assert_true(get(w, good));
    assert_false(get(w, bad) || has(w, bad));
    atomic_store(&fault.stat_us, 0);
    for (int k = 0; k < 10000 && !put(w, N); k++) usleep(1000);
    assert_true(early);
    for (int i = 0; i <= N; i++) assert_int_equal(has(w, i) && get(w, i), i != bad);
    assert_int_equal(stats(w).n_block, N);
}

/* ---- threads ----------------------------------------------------------------------------------------------------- */

typedef struct asking {
    const world *w;
    atomic_bool stop;
    uint64_t n;
} asking;

static void *ask(void *ud) {
    asking *a = ud;
    for (int i = 0; !atomic_load(&a->stop); i = (i + 1) % 200) {
        ern_tier_stats t;
        uint64_t n = (uint64_t)i * 8, key[2] = {mix(n), mix(n + 1)};
        a->n += store_has(a->w->s, key);
        store_stats(a->w->s, &t);
        a->n += (uint64_t)t.n_block;
    }
    return NULL;
}

static void test_threads(void **state) {
    world *w = *state;
    w->options.limit_bytes = 50 * FILE_BYTES;
    open_again(w);
    asking a = {.w = w};
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, ask, &a), 0);
    for (uint64_t k = 0; k < 1000; k++) {
        int i = (int)(mix(k) % 200);
        assert_true(get(w, i) == has(w, i) && put(w, i));
    }
    atomic_store(&a.stop, true);
    pthread_join(thread, NULL);
    assert_true(a.n > 0 && stats(w).n_block == 50 && stats(w).n_error == 0);
}

/* ---- the index --------------------------------------------------------------------------------------------------- */

enum { KEYS = 60, ROOM = 24 };

/* Against a list of ages that is searched from end to end. */
typedef struct naive {
    int64_t used[KEYS]; /* 0: not there */
    bool seen[KEYS];
    int n;
} naive;

static int naive_oldest(const naive *v) {
    int old = -1;
    for (int i = 0; i < KEYS; i++)
        if (v->used[i] && (old < 0 || v->used[i] < v->used[old])) old = i;
    return old;
}

static void index_key(uint64_t key[2], int i) { key[0] = mix((uint64_t)i) & 7, key[1] = (uint64_t)i * 8; }

static void index_check(const store_index *x, const naive *v) {
    uint64_t key[2];
    assert_int_equal(x->n, v->n);
    for (int i = 0; i < KEYS; i++) {
        index_key(key, i);
        assert_int_equal(store_index_find(x, key) != 0, v->used[i] != 0);
    }
    if (!x->ordered) return;
    int n = 0;
    int64_t last = 0;
    for (uint32_t e = x->oldest; e; e = x->entry[e].next, n++) {
        assert_true(x->entry[e].used_ns > last);
        last = x->entry[e].used_ns;
    }
    assert_int_equal(n, v->n);
}

static void index_drop(store_index *x, naive *v, int i) {
    uint64_t key[2];
    index_key(key, i);
    store_index_drop(x, store_index_find(x, key));
    v->used[i] = 0;
    v->n--;
}

static void test_index(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 200; seed++) {
        ern_arena a;
        layout l = {.arena = &a};
        store_index x;
        naive v = {0};
        uint64_t key[2], over[2], r = seed * 1000003;
        ern_arena_open(&a, 0);
        store_index_open(&x, &l, ROOM);
        for (int i = 0; i < KEYS; i++) { /* in the order of names, of any age */
            int64_t used = (int64_t)(1 + mix(r++) % 1000) * 100 + i;
            index_key(key, i);
            int drop = (int)(mix(r++) % KEYS), old;
            if (mix(r++) % 4 == 0 && v.used[drop]) index_drop(&x, &v, drop);
            bool was_full = v.n == ROOM, is_over = store_index_seen(&x, key, used, over);
            v.used[i] = used, v.n++;
            if (is_over) { /* the oldest, or this one; a place that a dropped one holds may be given late */
                for (old = 0; index_key(key, old), key[0] != over[0] || key[1] != over[1];) old++;
                assert_int_equal(old, naive_oldest(&v));
                v.used[old] = 0, v.n--;
            } else {
                assert_false(was_full);
            }
            index_check(&x, &v);
        }
        store_index_sort(&x);
        store_index_order(&x);
        index_check(&x, &v);
        for (int64_t t = 200000; t < 200300; t++) {
            int i = (int)(mix(r++) % KEYS);
            index_key(key, i);
            uint32_t e = store_index_find(&x, key);
            if (e && t % 3) {
                store_index_use(&x, e, t);
                v.used[i] = t;
            } else if (e) {
                index_drop(&x, &v, i);
            } else {
                if (v.n == ROOM) {
                    int old = naive_oldest(&v);
                    index_key(over, old);
                    assert_int_equal(store_index_find(&x, over), x.oldest);
                    index_drop(&x, &v, old);
                }
                store_index_add(&x, key, t);
                v.used[i] = t, v.n++;
            }
            index_check(&x, &v);
        }
        ern_arena_close(&a);
    }
}

#define WORLD(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void) {
    const struct CMUnitTest tests[] = {
        WORLD(test_round_trip),       WORLD(test_restart),      WORLD(test_touch),       WORLD(test_every_byte),
        WORLD(test_every_length),     WORLD(test_other_block),  WORLD(test_vanished),    WORLD(test_planted),
        WORLD(test_leftovers),        WORLD(test_faults_write), WORLD(test_faults_read), WORLD(test_faults_open),
        WORLD(test_off_and_back),     WORLD(test_full_device),  WORLD(test_limit),       WORLD(test_lowered_limit),
        WORLD(test_other_models),     WORLD(test_refused),      WORLD(test_slow_folder), WORLD(test_threads),
        cmocka_unit_test(test_index),
    };
    if (ern_log_open(ERN_LOG_OFF, NULL, NULL) != ERN_OK) return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
