/* The disk tier of the prefix cache. See store.h. */
#include "engine/store.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/log.h"
#include "base/os.h"
#include "engine/store_folder.h"
#include "engine/store_index.h"

enum {
    OFF_US = 60 * 1000000, /* three errors within so long switch off for so long */
    OPEN_WAIT_US = 250000, /* for the names */
    LOCK_TRIES = 10,       /* another process holds a lock for an instant when it makes room */
    LOCK_WAIT_US = 10000,  /* between them */
    TOUCH_S = 600,         /* a file's time of use on disk may be so old: a read is not always a write */
    SHED_FILES = 8,        /* deleted when the device is full */
    PATH_SHOWN = 200,      /* characters of DIR in an error */
};

struct store {
    ern_arena arena;
    const store_sys *sys;
    int dir, lock; /* DIR; the lock of its folder of this fingerprint */
    uint64_t limit_bytes;
    int64_t (*now_us)(void);
    store_files files;     /* files.dir: the folder */
    store_foreign foreign; /* the reader's until ready, then the disk thread's */
    pthread_t reader;      /* of names */
    bool has_reader;
    atomic_bool stop;

    pthread_mutex_t mutex; /* for all below; never held over a system call */
    pthread_cond_t is_ready;
    store_index index;
    bool ready;           /* all names were read, and what is too much was deleted */
    int64_t failed_us[2]; /* times of the errors before, oldest first */
    int n_failed;
    int64_t off_until_us;
    uint64_t n_out, n_in, n_evicted, n_error;
};

static int64_t wall_ns(void) { return ern_wall_s() * 1000000000; }

/* ---- errors ------------------------------------------------------------------------------------------------------ */

static bool is_off(const store *s) { return s->now_us() < s->off_until_us; } /* mutex held */

/* A system call failed: count it, and be off for a while after the third of a minute. */
static void note_error(store *s, store_result r) {
    bool off = false;
    pthread_mutex_lock(&s->mutex);
    int64_t now = s->now_us();
    s->n_error++;
    if (s->n_failed == 2 && now - s->failed_us[0] <= OFF_US) {
        off = now >= s->off_until_us;
        s->off_until_us = now + OFF_US;
        s->n_failed = 0;
    } else {
        if (s->n_failed == 2) s->failed_us[0] = s->failed_us[1], s->n_failed = 1;
        s->failed_us[s->n_failed++] = now;
    }
    pthread_mutex_unlock(&s->mutex);
    const char *why = r == STORE_FULL ? "full" : r == STORE_SHORT ? "descriptors-or-memory" : "input-output";
    if (off) ern_log(ERN_LOG_WARN, "store.off", "folder=%s seconds=60 cause=%s", s->foreign.own, why);
}

/* ---- room -------------------------------------------------------------------------------------------------------- */

static bool evict_oldest(store *s) {
    pthread_mutex_lock(&s->mutex);
    uint32_t e = s->index.oldest;
    uint64_t key[2] = {s->index.entry[e].key[0], s->index.entry[e].key[1]};
    pthread_mutex_unlock(&s->mutex);
    if (!e) return false;
    store_result r = store_file_delete(&s->files, key);
    bool gone = r == STORE_DONE || r == STORE_GONE || r == STORE_BAD;
    pthread_mutex_lock(&s->mutex);
    e = store_index_find(&s->index, key); /* the reader makes room too, while a read may drop what it finds bad */
    if (e && gone)
        store_index_drop(&s->index, e), s->n_evicted++;
    else if (e)
        store_index_use(&s->index, e, wall_ns()); /* one that cannot be deleted must not stop all others */
    pthread_mutex_unlock(&s->mutex);
    if (!gone) note_error(s, r);
    return gone;
}

static void shed_foreign(store *s, uint64_t need_bytes) {
    store_result r = store_foreign_shed(&s->foreign, need_bytes);
    if (r != STORE_DONE) note_error(s, r);
}

/* Delete until need more bytes are within the limit. */
static bool make_room(store *s, uint64_t need_bytes) {
    while (!atomic_load(&s->stop)) {
        pthread_mutex_lock(&s->mutex);
        uint64_t all = s->index.n * s->files.file_bytes + s->foreign.bytes + need_bytes;
        bool full = need_bytes > 0 && s->index.n == s->index.n_max;
        pthread_mutex_unlock(&s->mutex);
        if (all <= s->limit_bytes && !full) return true;
        if (all > s->limit_bytes && s->foreign.bytes > 0)
            shed_foreign(s, all - s->limit_bytes);
        else if (!evict_oldest(s))
            return false;
    }
    return false;
}

/* The device is full below our limit: others use it too. */
static void shed_some(store *s) {
    if (s->foreign.bytes > 0)
        shed_foreign(s, SHED_FILES * s->files.file_bytes);
    else
        for (int i = 0; i < SHED_FILES && evict_oldest(s);) i++;
}

/* ---- the names, in a thread of its own --------------------------------------------------------------------------- */

static bool seen(void *ud, int dir, const char *name, store_name kind, const uint64_t key[2], const struct stat *st) {
    store *s = ud;
    if (kind == STORE_NAME_LEFT || (uint64_t)st->st_size != s->files.file_bytes) {
        store_result r = store_remove(s->sys, dir, name, 0);
        if (r != STORE_DONE && r != STORE_GONE) note_error(s, r);
        return !atomic_load(&s->stop);
    }
    uint64_t over[2];
    pthread_mutex_lock(&s->mutex);
    bool is_over = store_index_seen(&s->index, key, store_used_ns(st), over);
    s->n_evicted += is_over;
    pthread_mutex_unlock(&s->mutex);
    if (is_over) {
        store_result r = store_file_delete(&s->files, over);
        if (r != STORE_DONE && r != STORE_GONE) note_error(s, r);
    }
    return !atomic_load(&s->stop);
}

static void *reader_main(void *ud) {
    store *s = ud;
    store_result r = store_walk(s->sys, s->files.dir, false, seen, s);
    if (r != STORE_DONE) note_error(s, r);
    r = atomic_load(&s->stop) ? STORE_DONE : store_foreign_look(&s->foreign);
    if (r != STORE_DONE) note_error(s, r);
    store_index_sort(&s->index); /* store_has must not wait for this */
    pthread_mutex_lock(&s->mutex);
    store_index_order(&s->index);
    pthread_mutex_unlock(&s->mutex);
    (void)make_room(s, 0);
    pthread_mutex_lock(&s->mutex);
    s->ready = true;
    pthread_cond_broadcast(&s->is_ready);
    pthread_mutex_unlock(&s->mutex);
    return NULL;
}

static void wait_ready(store *s, int64_t wait_us) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    int64_t ns = until.tv_nsec + wait_us * 1000;
    until.tv_sec += ns / 1000000000;
    until.tv_nsec = ns % 1000000000;
    pthread_mutex_lock(&s->mutex);
    while (!s->ready && pthread_cond_timedwait(&s->is_ready, &s->mutex, &until) == 0) continue;
    pthread_mutex_unlock(&s->mutex);
}

/* ---- open and close ---------------------------------------------------------------------------------------------- */

static void tables_open(store *s, layout *l, const store_options *o) {
    store_files_open(&s->files, l, o);
    uint64_t n = o->limit_bytes / s->files.file_bytes;
    if (n < 1) n = 1; /* only to count: open refuses it */
    store_index_open(&s->index, l, n < STORE_BLOCKS_MAX ? (uint32_t)n : STORE_BLOCKS_MAX);
}

uint64_t store_memory_bytes(const store_options *o) {
    store count = {0};
    layout l = {.bytes = sizeof count};
    tables_open(&count, &l, o);
    return l.bytes;
}

/* Open DIR and its folder of this fingerprint, making them. */
static ern_status folders_open(store *s, const store_options *o, ern_err *err) {
    const int flags = O_RDONLY | O_DIRECTORY;
    if (store_make_dir(s->sys, AT_FDCWD, o->dir) < 0)
        return ERN_FAIL(err, ERN_ERR_FILE, "--kvcache-storage-dir: cannot make the folder %.*s: %s; name another",
                        PATH_SHOWN, o->dir, strerror(errno));
    s->dir = store_open_at(s->sys, AT_FDCWD, o->dir, flags, 0);
    if (s->dir < 0)
        return ERN_FAIL(err, ERN_ERR_FILE, "--kvcache-storage-dir: cannot open the folder %.*s: %s; name another",
                        PATH_SHOWN, o->dir, strerror(errno));
    store_hex(s->foreign.own, o->fingerprint);
    if (store_make_dir(s->sys, s->dir, s->foreign.own) == 0)
        s->files.dir = store_open_at(s->sys, s->dir, s->foreign.own, flags | O_NOFOLLOW, 0);
    if (s->files.dir < 0)
        return ERN_FAIL(err, ERN_ERR_FILE,
                        "--kvcache-storage-dir: cannot make or open %s in %.*s: %s; name a folder that can be written",
                        s->foreign.own, PATH_SHOWN, o->dir, strerror(errno));
    return ERN_OK;
}

static ern_status lock_take(store *s, const store_options *o, ern_err *err) {
    for (int i = 0; i < LOCK_TRIES; i++) {
        s->lock = store_lock(s->sys, s->files.dir, true);
        if (s->lock >= 0) return ERN_OK;
        if (errno != EWOULDBLOCK)
            return ERN_FAIL(
                err, ERN_ERR_FILE,
                "--kvcache-storage-dir: cannot lock the file lock in %.*s/%s: %s; name a folder that can be "
                "written, of a file system with locks",
                PATH_SHOWN, o->dir, s->foreign.own, strerror(errno));
        nanosleep(&(struct timespec){.tv_nsec = LOCK_WAIT_US * 1000L}, NULL);
    }
    return ERN_FAIL(err, ERN_ERR_USAGE,
                    "--kvcache-storage-dir: another process uses the folder %.*s for this model; give each its own",
                    PATH_SHOWN, o->dir);
}

static ern_status parts_open(store *s, const store_options *o, ern_err *err) {
    layout l = {.arena = &s->arena};
    tables_open(s, &l, o);
    if (o->limit_bytes < s->files.file_bytes)
        return ERN_FAIL(
            err, ERN_ERR_USAGE, "--kvcache-storage-gb: %llu bytes hold no block of %llu bytes in %.*s; give more room",
            (unsigned long long)o->limit_bytes, (unsigned long long)s->files.file_bytes, PATH_SHOWN, o->dir);
    if (l.out)
        return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for an index of %llu MiB; lower --kvcache-storage-gb",
                        (unsigned long long)(l.bytes >> 20));
    ERN_TRY(folders_open(s, o, err));
    ERN_TRY(lock_take(s, o, err));
    s->foreign.sys = s->files.sys = s->sys;
    s->foreign.dir = s->dir;
    s->foreign.stop = &s->stop;
    s->has_reader = pthread_create(&s->reader, NULL, reader_main, s) == 0;
    if (!s->has_reader)
        return ERN_FAIL(err, ERN_ERR_MEMORY, "cannot start the thread that reads %.*s", PATH_SHOWN, o->dir);
    return ERN_OK;
}

ern_status store_open(store **out, const store_options *o, ern_err *err) {
    ERN_ASSERT(o->dir && o->now_us && o->block_bytes > 0 && o->n_token > 0);
    *out = NULL;
    store *s = calloc(1, sizeof *s);
    if (!s) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory to open %.*s", PATH_SHOWN, o->dir);
    ern_arena_open(&s->arena, 0);
    s->sys = o->sys ? o->sys : &store_sys_libc;
    s->dir = s->files.dir = s->lock = -1;
    s->limit_bytes = o->limit_bytes;
    s->now_us = o->now_us;
    s->off_until_us = INT64_MIN;
    pthread_mutex_init(&s->mutex, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&s->is_ready, &attr);
    pthread_condattr_destroy(&attr);
    ern_status status = parts_open(s, o, err);
    if (status != ERN_OK) {
        store_close(s);
        return status;
    }
    wait_ready(s, o->wait_us > 0 ? o->wait_us : OPEN_WAIT_US);
    *out = s;
    return ERN_OK;
}

void store_close(store *s) {
    if (!s) return;
    atomic_store(&s->stop, true);
    if (s->has_reader) pthread_join(s->reader, NULL);
    if (s->lock >= 0) (void)s->sys->close(s->lock);
    if (s->files.dir >= 0) (void)s->sys->close(s->files.dir);
    if (s->dir >= 0) (void)s->sys->close(s->dir);
    pthread_cond_destroy(&s->is_ready);
    pthread_mutex_destroy(&s->mutex);
    ern_arena_close(&s->arena);
    free(s);
}

/* ---- blocks ------------------------------------------------------------------------------------------------------ */

bool store_has(store *s, const uint64_t key[2]) {
    pthread_mutex_lock(&s->mutex);
    bool has = store_index_find(&s->index, key) != 0 && !is_off(s);
    pthread_mutex_unlock(&s->mutex);
    return has;
}

bool store_read(store *s, const store_block *b, void *payload) {
    pthread_mutex_lock(&s->mutex);
    uint32_t e = is_off(s) ? 0 : store_index_find(&s->index, b->key);
    bool touch = e && wall_ns() - s->index.entry[e].used_ns > TOUCH_S * INT64_C(1000000000);
    pthread_mutex_unlock(&s->mutex);
    if (!e) return false;
    store_result r = store_file_read(&s->files, b, payload, touch);
    pthread_mutex_lock(&s->mutex);
    e = store_index_find(&s->index, b->key); /* the reader of names may have given its place away */
    s->n_in += r == STORE_DONE;
    s->n_error += r == STORE_BAD;
    if (e && r == STORE_DONE && s->index.ordered) {
        store_index_use(&s->index, e, touch ? wall_ns() : s->index.entry[e].used_ns);
    } else if (e && r != STORE_DONE && r != STORE_SHORT) {
        store_index_drop(&s->index, e);
    }
    pthread_mutex_unlock(&s->mutex);
    if (r == STORE_DONE) return true;
    if (r == STORE_BAD || r == STORE_FAILED) (void)store_file_delete(&s->files, b->key);
    if (r != STORE_BAD && r != STORE_GONE) note_error(s, r);
    return false;
}

bool store_write(store *s, const store_block *b, const void *payload) {
    pthread_mutex_lock(&s->mutex);
    bool may = s->ready && !is_off(s), has = store_index_find(&s->index, b->key) != 0;
    pthread_mutex_unlock(&s->mutex);
    if (!may) return false;
    if (has) return true;
    if (!make_room(s, s->files.file_bytes)) return false;
    store_result r = store_file_write(&s->files, b, payload);
    if (r == STORE_FULL) {
        shed_some(s);
        r = store_file_write(&s->files, b, payload);
    }
    if (r != STORE_DONE) {
        note_error(s, r);
        return false;
    }
    pthread_mutex_lock(&s->mutex);
    store_index_add(&s->index, b->key, wall_ns());
    s->n_out++;
    pthread_mutex_unlock(&s->mutex);
    return true;
}

void store_stats(store *s, ern_tier_stats *out) {
    pthread_mutex_lock(&s->mutex);
    *out = (ern_tier_stats){
        .n_block = (int32_t)s->index.n,
        .n_block_max = (int32_t)s->index.n_max,
        .n_out = s->n_out,
        .n_in = s->n_in,
        .n_evicted = s->n_evicted,
        .n_error = s->n_error,
        .off = is_off(s),
    };
    pthread_mutex_unlock(&s->mutex);
}
