/* For tests of the disk tier: system calls of which one fails, on purpose and once, and a clock that is set by hand. */
#ifndef ERN_TESTS_STORE_FAULTS_H
#define ERN_TESTS_STORE_FAULTS_H

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "engine/store_file.h"

typedef struct fault_state {
    atomic_bool on;
    atomic_int n_call, at; /* calls so far; the one that fails */
    int error;             /* errno; 0: a transfer comes out short */
    bool full;             /* writes go to /dev/full */
    atomic_int stat_us;    /* every stat_at takes so long: a slow disk */
} fault_state;
static fault_state fault;

static atomic_llong fault_now_us;
static inline int64_t fault_now(void) { return atomic_load(&fault_now_us); }

static inline bool fault_here(void) { return atomic_load(&fault.on) && atomic_fetch_add(&fault.n_call, 1) == fault.at; }

/* True: this call fails, errno is set. */
static inline bool fault_fails(void) {
    if (!fault_here() || fault.error == 0) return false;
    errno = fault.error;
    return true;
}

static inline void fault_begin(int at, int error) {
    fault.error = error;
    atomic_store(&fault.at, at);
    atomic_store(&fault.n_call, 0);
    atomic_store(&fault.on, true);
}

/* True: there was a call number `at`. */
static inline bool fault_end(void) {
    atomic_store(&fault.on, false);
    return atomic_load(&fault.n_call) > atomic_load(&fault.at);
}

static inline int fault_open_at(int dir, const char *name, int flags, mode_t mode) {
    if (fault_fails()) return -1;
    if (fault.full && strstr(name, ".tmp")) return open("/dev/full", O_WRONLY | O_CLOEXEC);
    return openat(dir, name, flags, mode);
}
/* The descriptor is gone whatever close says. */
static inline int fault_close(int fd) {
    bool fails = fault_fails();
    int why = errno, r = close(fd);
    errno = why;
    return fails ? -1 : r;
}
static inline ssize_t fault_read(int fd, void *to, size_t n) {
    if (fault_here()) {
        errno = fault.error;
        if (errno) return -1;
        n = n > 1 ? n / 2 : n;
    }
    return read(fd, to, n);
}
static inline ssize_t fault_write(int fd, const void *from, size_t n) {
    if (fault_here()) {
        errno = fault.error;
        if (errno) return -1;
        n = n > 1 ? n / 2 : n;
    }
    return write(fd, from, n);
}
static inline int fault_stat(int fd, struct stat *st) { return fault_fails() ? -1 : fstat(fd, st); }
static inline int fault_stat_at(int dir, const char *name, struct stat *st, int flags) {
    if (fault.stat_us > 0) usleep((useconds_t)fault.stat_us);
    return fault_fails() ? -1 : fstatat(dir, name, st, flags);
}
static inline int fault_mkdir_at(int dir, const char *name, mode_t mode) {
    return fault_fails() ? -1 : mkdirat(dir, name, mode);
}
static inline int fault_rename_at(int dir, const char *from, int to_dir, const char *to) {
    return fault_fails() ? -1 : renameat(dir, from, to_dir, to);
}
static inline int fault_unlink_at(int dir, const char *name, int flags) {
    return fault_fails() ? -1 : unlinkat(dir, name, flags);
}
static inline int fault_touch(int fd, const struct timespec when[2]) { return fault_fails() ? -1 : futimens(fd, when); }
static inline int fault_lock(int fd, int operation) { return fault_fails() ? -1 : store_sys_libc.lock(fd, operation); }
static inline DIR *fault_dir_open(int fd) { return fault_fails() ? NULL : fdopendir(fd); }
static inline struct dirent *fault_dir_next(DIR *d) { return fault_fails() ? NULL : readdir(d); }
static inline int fault_dir_close(DIR *d) {
    bool fails = fault_fails();
    int why = errno, r = closedir(d);
    errno = why;
    return fails ? -1 : r;
}

static const store_sys fault_sys = {
    .open_at = fault_open_at,
    .close = fault_close,
    .read = fault_read,
    .write = fault_write,
    .stat = fault_stat,
    .stat_at = fault_stat_at,
    .mkdir_at = fault_mkdir_at,
    .rename_at = fault_rename_at,
    .unlink_at = fault_unlink_at,
    .touch = fault_touch,
    .lock = fault_lock,
    .dir_open = fault_dir_open,
    .dir_next = fault_dir_next,
    .dir_close = fault_dir_close,
};

#endif
