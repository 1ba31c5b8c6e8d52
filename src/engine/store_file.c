/* One file of the disk tier. See store_file.h. */
#include "engine/store_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include <xxhash.h>

enum { FORMAT_VERSION = 1, AT_PAYLOAD_SUM = 96, AT_HEAD_SUM = 112 };
static const char magic[8] = {'E', 'R', 'N', 'K', 'V', 'B', 'L', 'K'};

/* ---- system calls ------------------------------------------------------------------------------------------------ */

static int libc_open_at(int dir, const char *name, int flags, mode_t mode) { return openat(dir, name, flags, mode); }

const store_sys store_sys_libc = {
    .open_at = libc_open_at,
    .close = close,
    .read = read,
    .write = write,
    .stat = fstat,
    .stat_at = fstatat,
    .mkdir_at = mkdirat,
    .rename_at = renameat,
    .unlink_at = unlinkat,
    .touch = futimens,
    .lock = flock,
    .dir_open = fdopendir,
    .dir_next = readdir,
    .dir_close = closedir,
};

#define AGAIN(r, call) \
    do {               \
        (r) = (call);  \
    } while ((r) < 0 && errno == EINTR)

store_result store_errno_result(void) {
    switch (errno) {
    case ENOENT:
    case ESTALE: return STORE_GONE;
    case ELOOP:
    case ENOTDIR: return STORE_BAD; /* a link, or a file where a folder should be */
    case ENOSPC:
    case EDQUOT: return STORE_FULL;
    case EMFILE:
    case ENFILE:
    case ENOMEM: return STORE_SHORT;
    default: return STORE_FAILED;
    }
}

int store_open_at(const store_sys *sys, int dir, const char *name, int flags, mode_t mode) {
    int fd;
    AGAIN(fd, sys->open_at(dir, name, flags | O_CLOEXEC, mode));
    return fd;
}

int store_make_dir(const store_sys *sys, int dir, const char *name) {
    int r;
    AGAIN(r, sys->mkdir_at(dir, name, 0700)); /* ours alone: what people wrote can be read out of these files */
    return r < 0 && errno != EEXIST ? -1 : 0;
}

store_result store_remove(const store_sys *sys, int dir, const char *name, int flags) {
    int r;
    AGAIN(r, sys->unlink_at(dir, name, flags));
    return r == 0 ? STORE_DONE : store_errno_result();
}

/* An end that comes before n bytes, though the file's size was right, is the device's fault. */
static store_result read_all(const store_sys *sys, int fd, void *to, uint64_t n) {
    for (uint8_t *p = to; n > 0;) {
        ssize_t got;
        AGAIN(got, sys->read(fd, p, n));
        if (got <= 0) return got < 0 ? store_errno_result() : STORE_FAILED;
        p += got;
        n -= (uint64_t)got;
    }
    return STORE_DONE;
}

static store_result write_all(const store_sys *sys, int fd, const void *from, uint64_t n) {
    for (const uint8_t *p = from; n > 0;) {
        ssize_t put;
        AGAIN(put, sys->write(fd, p, n));
        if (put <= 0) return put < 0 ? store_errno_result() : STORE_FAILED;
        p += put;
        n -= (uint64_t)put;
    }
    return STORE_DONE;
}

/* ---- names ------------------------------------------------------------------------------------------------------- */

void store_hex(char *out, const uint8_t bytes[16]) {
    for (int i = 0; i < 16; i++) snprintf(out + 2 * i, 3, "%02x", bytes[i]);
}

bool store_is_hex(const char *text, size_t n) { return strspn(text, "0123456789abcdef") == n && text[n] == 0; }

/* "<key><end>" */
static void name_make(char out[STORE_NAME_BYTES], const uint64_t key[2], const char *end) {
    snprintf(out, STORE_NAME_BYTES, "%016llx%016llx%s", (unsigned long long)key[0], (unsigned long long)key[1], end);
}

store_name store_name_read(uint64_t key[2], const char *sub, const char *name) {
    char hex[STORE_HEX + 1] = "";
    if (strlen(name) < STORE_HEX || strncmp(name, sub, 2) != 0) return STORE_NAME_OTHER;
    memcpy(hex, name, STORE_HEX);
    if (!store_is_hex(hex, STORE_HEX)) return STORE_NAME_OTHER;
    for (int i = 0; i < 2; i++) {
        key[i] = 0;
        for (int k = 0; k < 16; k++) {
            char c = hex[16 * i + k];
            key[i] = key[i] << 4 | (uint64_t)(c <= '9' ? c - '0' : c - 'a' + 10);
        }
    }
    const char *end = name + STORE_HEX;
    return strcmp(end, ".kv") == 0 ? STORE_NAME_BLOCK : strcmp(end, ".tmp") == 0 ? STORE_NAME_LEFT : STORE_NAME_OTHER;
}

store_result store_each(const store_sys *sys, int dir, const char *name, store_each_fn *fn, void *ud) {
    int fd = store_open_at(sys, dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0);
    if (fd < 0) return store_errno_result();
    DIR *d;
    do d = sys->dir_open(fd);
    while (!d && errno == EINTR);
    if (!d) {
        store_result r = store_errno_result();
        sys->close(fd);
        return r;
    }
    for (;;) {
        errno = 0;
        struct dirent *e = sys->dir_next(d);
        if (!e && errno == EINTR) continue;
        if (!e || (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0 && !fn(ud, fd, e->d_name))) {
            store_result r = e || errno == 0 ? STORE_DONE : store_errno_result();
            sys->dir_close(d);
            return r;
        }
    }
}

/* The folder of a key's file: two digits, so that no folder holds too many names. */
static int sub_open(const store_files *f, const uint64_t key[2], bool make) {
    const int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW;
    char sub[3];
    snprintf(sub, sizeof sub, "%02x", (unsigned)(key[0] >> 56));
    int fd = store_open_at(f->sys, f->dir, sub, flags, 0);
    if (fd >= 0 || errno != ENOENT || !make || store_make_dir(f->sys, f->dir, sub) < 0) return fd;
    return store_open_at(f->sys, f->dir, sub, flags, 0);
}

/* ---- bytes ------------------------------------------------------------------------------------------------------- */

static uint8_t *put32(uint8_t *p, uint32_t x) {
    for (int i = 0; i < 4; i++) p[i] = (uint8_t)(x >> (8 * i));
    return p + 4;
}
static uint8_t *put64(uint8_t *p, uint64_t x) { return put32(put32(p, (uint32_t)x), (uint32_t)(x >> 32)); }
static uint64_t get64(const uint8_t *p) {
    uint64_t x = 0;
    for (int i = 0; i < 8; i++) x |= (uint64_t)p[i] << (8 * i);
    return x;
}

void store_files_open(store_files *f, layout *l, const store_options *o) {
    f->n_token = o->n_token;
    f->block_bytes = o->block_bytes;
    f->head_bytes = STORE_FIXED_BYTES + 4 * (uint64_t)o->n_token;
    f->file_bytes = f->head_bytes + o->block_bytes;
    memcpy(f->fingerprint, o->fingerprint, sizeof f->fingerprint);
    f->want = LAYOUT_NEW(l, uint8_t, (int64_t)f->head_bytes);
    f->got = LAYOUT_NEW(l, uint8_t, (int64_t)f->head_bytes);
}

/* The head that block b with a payload of this checksum has, into f->want. */
static void head_make(store_files *f, const store_block *b, XXH128_hash_t payload_sum) {
    uint8_t *p = f->want;
    memcpy(p, magic, sizeof magic);
    p = put32(put32(p + sizeof magic, FORMAT_VERSION), (uint32_t)f->head_bytes);
    memcpy(p, f->fingerprint, 16);
    p = put32(put32(put64(p + 16, f->block_bytes), (uint32_t)f->n_token), 0);
    p = put64(put64(p, b->key[0]), b->key[1]);
    p = put64(put64(p, b->parent[0]), b->parent[1]);
    memcpy(p, b->salt, 16);
    p = put64(put64(p + 16, payload_sum.low64), payload_sum.high64);
    p = put64(put64(p, 0), 0); /* the head's own checksum is taken with zeros in its place */
    for (int32_t i = 0; i < f->n_token; i++) p = put32(p, (uint32_t)b->token[i]);
    ERN_ASSERT(p == f->want + f->head_bytes);
    XXH128_hash_t sum = XXH3_128bits(f->want, f->head_bytes);
    put64(put64(f->want + AT_HEAD_SUM, sum.low64), sum.high64);
}

/* One comparison holds the head of the file against the only one that this block can have: of all its fields only the
 * payload's checksum is not known beforehand, and that is held against the payload. */
static store_result block_read(store_files *f, const store_block *b, int fd, void *payload) {
    struct stat st;
    int r;
    AGAIN(r, f->sys->stat(fd, &st));
    if (r < 0) return store_errno_result();
    if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size != f->file_bytes) return STORE_BAD;
    store_result s = read_all(f->sys, fd, f->got, f->head_bytes);
    if (s != STORE_DONE) return s;
    XXH128_hash_t sum = {.low64 = get64(f->got + AT_PAYLOAD_SUM), .high64 = get64(f->got + AT_PAYLOAD_SUM + 8)};
    head_make(f, b, sum);
    if (memcmp(f->got, f->want, f->head_bytes) != 0) return STORE_BAD;
    s = read_all(f->sys, fd, payload, f->block_bytes);
    if (s != STORE_DONE) return s;
    return XXH128_isEqual(XXH3_128bits(payload, f->block_bytes), sum) ? STORE_DONE : STORE_BAD;
}

/* ---- one file ---------------------------------------------------------------------------------------------------- */

store_result store_file_read(store_files *f, const store_block *b, void *payload, bool touch) {
    char name[STORE_NAME_BYTES];
    name_make(name, b->key, ".kv");
    int dir = sub_open(f, b->key, false);
    if (dir < 0) return store_errno_result();
    /* O_NONBLOCK: a pipe under this name must not hold us up before it is refused. */
    int fd = store_open_at(f->sys, dir, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK, 0);
    store_result r = fd < 0 ? store_errno_result() : STORE_DONE;
    (void)f->sys->close(dir);
    if (fd < 0) return r;
    r = block_read(f, b, fd, payload);
    if (r == STORE_DONE && touch) (void)f->sys->touch(fd, NULL); /* only an order of age hangs on it */
    (void)f->sys->close(fd);
    return r;
}

/* The open file of a new, empty name. One that a write left behind, or anything planted there, is removed first. */
static int beside_open(const store_files *f, int dir, const char *name) {
    const int flags = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW;
    int fd = store_open_at(f->sys, dir, name, flags, 0600);
    if (fd >= 0 || errno != EEXIST || store_remove(f->sys, dir, name, 0) != STORE_DONE) return fd;
    return store_open_at(f->sys, dir, name, flags, 0600);
}

/* No fsync: what a crash of the machine leaves behind under the name (zeros, half a file) has the wrong checksum, and
 * is a miss like any other damage. */
static store_result beside_write(const store_files *f, int dir, const char *name, const void *payload) {
    int fd = beside_open(f, dir, name);
    if (fd < 0) return store_errno_result();
    store_result r = write_all(f->sys, fd, f->want, f->head_bytes);
    if (r == STORE_DONE) r = write_all(f->sys, fd, payload, f->block_bytes);
    int closed = f->sys->close(fd); /* never again: the descriptor is gone even where it was interrupted */
    return r == STORE_DONE && closed < 0 && errno != EINTR ? store_errno_result() : r;
}

store_result store_file_write(store_files *f, const store_block *b, const void *payload) {
    char name[STORE_NAME_BYTES], beside[STORE_NAME_BYTES];
    name_make(name, b->key, ".kv");
    name_make(beside, b->key, ".tmp");
    int dir = sub_open(f, b->key, true), moved;
    if (dir < 0) return store_errno_result();
    head_make(f, b, XXH3_128bits(payload, f->block_bytes));
    store_result r = beside_write(f, dir, beside, payload);
    if (r == STORE_DONE) {
        AGAIN(moved, f->sys->rename_at(dir, beside, dir, name));
        if (moved < 0) r = store_errno_result();
    }
    if (r != STORE_DONE) (void)store_remove(f->sys, dir, beside, 0); /* else it is removed at the next open */
    (void)f->sys->close(dir);
    return r;
}

store_result store_file_delete(const store_files *f, const uint64_t key[2]) {
    char name[STORE_NAME_BYTES];
    name_make(name, key, ".kv");
    int dir = sub_open(f, key, false);
    if (dir < 0) return store_errno_result();
    store_result r = store_remove(f->sys, dir, name, 0);
    (void)f->sys->close(dir);
    return r;
}
