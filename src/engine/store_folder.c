/* The folders of the disk tier. See store_folder.h. */
#include "engine/store_folder.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>

int store_lock(const store_sys *sys, int dir, bool make) {
    int fd = store_open_at(sys, dir, "lock", O_RDWR | O_NOFOLLOW | (make ? O_CREAT : 0), 0600), r;
    if (fd < 0) return -1;
    do r = sys->lock(fd, LOCK_EX | LOCK_NB);
    while (r < 0 && errno == EINTR);
    if (r == 0) return fd;
    int why = errno;
    (void)sys->close(fd);
    errno = why;
    return -1;
}

/* ---- all files of one fingerprint -------------------------------------------------------------------------------- */

typedef struct walking {
    const store_sys *sys;
    store_walk_fn *fn;
    void *ud;
    bool prune, ended;
    char sub[3];
    store_result first; /* error */
} walking;

/* What is gone or is none of ours is no error. */
static void walk_note(walking *w, store_result r) {
    if (w->first == STORE_DONE && r != STORE_GONE && r != STORE_BAD) w->first = r;
}

static bool walk_file(void *ud, int dir, const char *name) {
    walking *w = ud;
    uint64_t key[2];
    struct stat st;
    store_name kind = store_name_read(key, w->sub, name);
    if (kind == STORE_NAME_OTHER) return true;
    int r;
    do r = w->sys->stat_at(dir, name, &st, AT_SYMLINK_NOFOLLOW);
    while (r < 0 && errno == EINTR);
    if (r < 0) {
        walk_note(w, store_errno_result());
        return true;
    }
    if (!S_ISREG(st.st_mode)) return true;
    w->ended = !w->fn(w->ud, dir, name, kind, key, &st);
    return !w->ended;
}

static bool walk_sub(void *ud, int dir, const char *name) {
    walking *w = ud;
    if (!store_is_hex(name, 2)) return true;
    memcpy(w->sub, name, sizeof w->sub);
    walk_note(w, store_each(w->sys, dir, name, walk_file, w));
    if (w->prune) (void)store_remove(w->sys, dir, w->sub, AT_REMOVEDIR);
    return !w->ended;
}

store_result store_walk(const store_sys *sys, int dir, bool prune, store_walk_fn *fn, void *ud) {
    walking w = {.sys = sys, .fn = fn, .ud = ud, .prune = prune, .first = STORE_DONE};
    walk_note(&w, store_each(sys, dir, ".", walk_sub, &w));
    return w.first;
}

/* ---- other fingerprints ------------------------------------------------------------------------------------------ */

typedef struct looking {
    store_foreign *f;
    store_folder *folder;
    store_result first;
} looking;

static bool look_file(void *ud, int dir, const char *name, store_name kind, const uint64_t key[2],
                      const struct stat *st) {
    (void)dir, (void)name, (void)kind, (void)key;
    looking *l = ud;
    l->folder->bytes += (uint64_t)st->st_size;
    if (store_used_ns(st) > l->folder->used_ns) l->folder->used_ns = store_used_ns(st);
    return !atomic_load(l->f->stop);
}

/* The folder of another fingerprint, -1: it is none, or someone's. The lock is only asked for here, not kept: counting
 * may take long, and who starts meanwhile should not be refused. */
static int foreign_open(const store_foreign *f, const char *name, int *lock) {
    int fd = store_open_at(f->sys, f->dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0);
    if (fd < 0) return -1;
    *lock = store_lock(f->sys, fd, false);
    if (*lock >= 0 || errno == ENOENT) return fd; /* no lock file: nobody ever held it */
    (void)f->sys->close(fd);
    return -1;
}

static bool look_folder(void *ud, int dir, const char *name) {
    (void)dir;
    looking *l = ud;
    store_foreign *f = l->f;
    if (!store_is_hex(name, STORE_HEX) || strcmp(name, f->own) == 0) return true;
    if (f->n == STORE_FOLDERS_MAX) return false;
    int lock, fd = foreign_open(f, name, &lock);
    if (fd < 0) return true;
    if (lock >= 0) (void)f->sys->close(lock);
    l->folder = &f->folder[f->n];
    *l->folder = (store_folder){0};
    memcpy(l->folder->name, name, sizeof l->folder->name);
    store_result r = store_walk(f->sys, fd, false, look_file, l);
    if (l->first == STORE_DONE) l->first = r;
    (void)f->sys->close(fd);
    f->bytes += l->folder->bytes;
    if (l->folder->bytes > 0) f->n++;
    return !atomic_load(f->stop);
}

store_result store_foreign_look(store_foreign *f) {
    looking l = {.f = f, .first = STORE_DONE};
    store_result r = store_each(f->sys, f->dir, ".", look_folder, &l);
    return r != STORE_DONE ? r : l.first;
}

typedef struct shedding {
    const store_foreign *f;
    uint64_t need, freed;
    store_result first;
} shedding;

static bool shed_file(void *ud, int dir, const char *name, store_name kind, const uint64_t key[2],
                      const struct stat *st) {
    (void)kind, (void)key;
    shedding *g = ud;
    store_result r = store_remove(g->f->sys, dir, name, 0);
    if (r == STORE_DONE)
        g->freed += (uint64_t)st->st_size;
    else if (r != STORE_GONE && g->first == STORE_DONE)
        g->first = r;
    return g->freed < g->need && !atomic_load(g->f->stop);
}

store_result store_foreign_shed(store_foreign *f, uint64_t need) {
    ERN_ASSERT(f->n > 0 && f->bytes > 0 && need > 0);
    store_folder *old = &f->folder[0];
    for (int32_t i = 1; i < f->n; i++)
        if (f->folder[i].used_ns < old->used_ns) old = &f->folder[i];
    shedding g = {.f = f, .need = need, .first = STORE_DONE};
    int lock = -1, fd = foreign_open(f, old->name, &lock);
    if (fd >= 0) {
        store_result r = store_walk(f->sys, fd, true, shed_file, &g);
        if (g.first == STORE_DONE) g.first = r;
        if (lock >= 0) (void)f->sys->close(lock);
        (void)f->sys->close(fd);
    }
    /* Walked to its end, or someone's by now: what is still there cannot be had, and counts no more. */
    uint64_t less = g.freed >= need && g.freed < old->bytes ? g.freed : old->bytes;
    f->bytes -= less;
    old->bytes -= less;
    if (old->bytes == 0) *old = f->folder[--f->n];
    return g.first;
}
