/* A file of the disk tier, of any bytes: it is read as the block that was asked for only if it is the very file that
 * the block would be written as. The file lies in memory, behind the tier's own system calls.
 *
 * The first byte chooses. Even: the rest is the file. Such a file may be a forgery with sums that fit, which no
 * checksum without a secret tells from a true one: then it must at least be what writing the payload that was read
 * makes. Odd: the rest is a list of damages done to a true file, too few to forge the two sums of 16 bytes: the block
 * is read if nothing changed, and only then. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "engine/store_file.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { N_TOKEN = 3, BLOCK_BYTES = 40, HEAD_BYTES = STORE_FIXED_BYTES + 4 * N_TOKEN };
enum { FILE_BYTES = HEAD_BYTES + BLOCK_BYTES, FILE_MAX = 4 * FILE_BYTES, DAMAGE_MAX = 31, FD_FOLDER = 1000, FD_FILE };

/* One file, and how it comes: reads give at most `most` bytes, and are interrupted now and then. */
static struct {
    uint8_t bytes[FILE_MAX];
    size_t n, at, most;
    unsigned n_call;
} file;

static int mem_open_at(int dir, const char *name, int flags, mode_t mode) {
    (void)dir, (void)mode;
    if (flags & O_DIRECTORY) return FD_FOLDER;
    if (flags & O_CREAT) file.n = 0;
    ERN_ASSERT(flags & O_NOFOLLOW && strlen(name) > STORE_HEX);
    file.at = 0;
    return FD_FILE;
}
static int mem_close(int fd) {
    (void)fd;
    return 0;
}
static ssize_t mem_read(int fd, void *to, size_t n) {
    ERN_ASSERT(fd == FD_FILE);
    if (file.n_call++ % 3 == 1) {
        errno = EINTR;
        return -1;
    }
    if (n > file.most) n = file.most;
    if (n > file.n - file.at) n = file.n - file.at;
    memcpy(to, file.bytes + file.at, n);
    file.at += n;
    return (ssize_t)n;
}
static ssize_t mem_write(int fd, const void *from, size_t n) {
    ERN_ASSERT(fd == FD_FILE && n <= FILE_MAX - file.n);
    if (n > file.most) n = file.most;
    memcpy(file.bytes + file.n, from, n);
    file.n += n;
    return (ssize_t)n;
}
static int mem_stat(int fd, struct stat *st) {
    ERN_ASSERT(fd == FD_FILE);
    *st = (struct stat){.st_mode = S_IFREG | 0600, .st_size = (off_t)file.n};
    return 0;
}
static int mem_rename_at(int dir, const char *from, int to_dir, const char *to) {
    (void)dir, (void)from, (void)to_dir, (void)to;
    return 0;
}
static const store_sys mem_sys = {
    .open_at = mem_open_at,
    .close = mem_close,
    .read = mem_read,
    .write = mem_write,
    .stat = mem_stat,
    .rename_at = mem_rename_at,
};

static const int32_t token[N_TOKEN] = {5, -1, 1 << 20};
static const store_block block = {
    .key = {0x0123456789abcdef, 42}, .parent = {7, 8}, .salt = "0123456789abcde", .token = token};
static store_files files;
static uint8_t payload[BLOCK_BYTES], true_file[FILE_BYTES];

/* The file that this payload is written as. */
static void make_file(uint8_t out[FILE_BYTES], const uint8_t from[BLOCK_BYTES]) {
    ERN_ASSERT(store_file_write(&files, &block, from) == STORE_DONE && file.n == FILE_BYTES);
    memcpy(out, file.bytes, FILE_BYTES);
}

static void start(void) {
    static ern_arena arena; /* lives as long as the process */
    layout l = {.arena = &arena};
    store_options o = {.block_bytes = BLOCK_BYTES, .n_token = N_TOKEN, .fingerprint = "fingerprint-of16"};
    ern_arena_open(&arena, 0);
    store_files_open(&files, &l, &o);
    ERN_ASSERT(!l.out && files.file_bytes == FILE_BYTES);
    files.sys = &mem_sys;
    for (int i = 0; i < BLOCK_BYTES; i++) payload[i] = (uint8_t)(i * 37 + 11);
    file.most = FILE_BYTES;
    make_file(true_file, payload);
}

static size_t take(const uint8_t **data, size_t *size) {
    if (*size == 0) return 0;
    --*size;
    return *(*data)++;
}

/* Damages of three bytes each: what, where, with what. At most DAMAGE_MAX bytes of the file become others. */
static void damage(const uint8_t *data, size_t size) {
    memcpy(file.bytes, true_file, FILE_BYTES);
    file.n = FILE_BYTES;
    for (size_t changed = 0; size > 0 && changed < DAMAGE_MAX;) {
        size_t what = take(&data, &size) % 6, at = take(&data, &size), with = take(&data, &size);
        at = file.n ? at % file.n : 0;
        if (what < 2 && file.n) {
            file.bytes[at] = (uint8_t)(what ? file.bytes[at] ^ 1u << with % 8 : with);
            changed++;
        } else if (what == 2) { /* cut */
            file.n = at;
        } else if (what == 3 && file.n + with <= FILE_MAX) { /* made longer */
            memset(file.bytes + file.n, (int)at, with);
            file.n += with;
            changed += with;
        } else if (what == 4 && file.n) { /* a sector that was never written */
            size_t n = with % 16 < file.n - at ? with % 16 : file.n - at;
            if (changed + n > DAMAGE_MAX) break;
            memset(file.bytes + at, 0, n);
            changed += n;
        } else if (what == 5 && file.n) { /* one that went elsewhere */
            size_t n = file.n - at < 8 ? file.n - at : 8, from = with % (file.n - n + 1);
            if (changed + n > DAMAGE_MAX) break;
            memmove(file.bytes + at, file.bytes + from, n);
            changed += n;
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!files.sys) start();
    size_t how = take(&data, &size);
    bool is_damage = how & 1;
    file.most = how >> 1 ? how >> 1 : FILE_MAX;
    file.n_call = 0;
    if (is_damage) {
        damage(data, size);
    } else {
        file.n = size < FILE_MAX ? size : FILE_MAX;
        memcpy(file.bytes, data, file.n);
    }
    uint8_t found[FILE_MAX], again[FILE_BYTES], out[BLOCK_BYTES];
    size_t n = file.n;
    memcpy(found, file.bytes, n);
    bool same = n == FILE_BYTES && memcmp(found, true_file, FILE_BYTES) == 0;
    store_result r = store_file_read(&files, &block, out, false);
    ERN_ASSERT(r == STORE_DONE || r == STORE_BAD);
    ERN_ASSERT(!same || r == STORE_DONE);
    if (r != STORE_DONE) return 0;
    ERN_ASSERT(same || !is_damage);
    ERN_ASSERT(n == FILE_BYTES && (!same || memcmp(out, payload, BLOCK_BYTES) == 0));
    make_file(again, out);
    ERN_ASSERT(memcmp(again, found, FILE_BYTES) == 0);
    return 0;
}
