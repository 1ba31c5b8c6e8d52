/* One file of the disk tier: its name, its bytes, and the system calls that make, read and delete it.
 *
 * Every system call of the tier is made through a store_sys, so that a test can let any one of them fail. A call that
 * was interrupted is made again, a transfer that came out short goes on.
 *
 *     0  magic "ERNKVBLK"     8  version u32      12  head_bytes u32   16  fingerprint [16]
 *    32  block_bytes u64     40  n_token u32      44  0 u32
 *    48  key u64 [2]         64  parent u64 [2]   80  salt [16]
 *    96  XXH3-128 of the payload, u64 low, high
 *   112  XXH3-128 of the bytes 0 .. 111 and the token ids, u64 low, high
 *   128  token ids i32 [n_token]; these are the head. Then the payload [block_bytes], and the file ends
 *
 * All little endian; the payload is as the backend lays it out, which the fingerprint speaks for.
 * Owner: store.c. Threads: reading and writing share buffers: one thread; store_file_delete and the names: any. */
#ifndef ERN_ENGINE_STORE_FILE_H
#define ERN_ENGINE_STORE_FILE_H

#include <dirent.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

#include "engine/layout.h"
#include "engine/store.h"

struct store_sys {
    int (*open_at)(int dir, const char *name, int flags, mode_t mode);
    int (*close)(int fd);
    ssize_t (*read)(int fd, void *to, size_t n);
    ssize_t (*write)(int fd, const void *from, size_t n);
    int (*stat)(int fd, struct stat *st);
    int (*stat_at)(int dir, const char *name, struct stat *st, int flags);
    int (*mkdir_at)(int dir, const char *name, mode_t mode);
    int (*rename_at)(int dir, const char *from, int to_dir, const char *to);
    int (*unlink_at)(int dir, const char *name, int flags);
    int (*touch)(int fd, const struct timespec when[2]);
    int (*lock)(int fd, int operation);
    DIR *(*dir_open)(int fd);
    struct dirent *(*dir_next)(DIR *d);
    int (*dir_close)(DIR *d);
};
extern const store_sys store_sys_libc;

typedef enum store_result {
    STORE_DONE,
    STORE_GONE,   /* there is no such file */
    STORE_BAD,    /* there is something, but not this block whole and undamaged */
    STORE_FULL,   /* the device or a quota is full */
    STORE_SHORT,  /* the process is out of descriptors or memory: the file may be good */
    STORE_FAILED, /* any other error of the system */
} store_result;

enum {
    STORE_HEX = 32,        /* digits of a fingerprint or a key */
    STORE_NAME_BYTES = 40, /* holds any name of ours, and its NUL */
    STORE_FIXED_BYTES = 128,
};

/* What all blocks of one folder have in common. */
typedef struct store_files {
    const store_sys *sys;
    int dir; /* DIR/<fingerprint> */
    int32_t n_token;
    uint64_t block_bytes, head_bytes, file_bytes;
    uint8_t fingerprint[16];
    uint8_t *want, *got; /* [head_bytes] */
} store_files;

/* Sizes and buffers (NULL while l counts); dir and sys are the caller's to set. */
void store_files_open(store_files *f, layout *l, const store_options *o);
/* Fill payload [block_bytes] if the file holds exactly this block; touch: and set its time of use to now. */
store_result store_file_read(store_files *f, const store_block *b, void *payload, bool touch);
/* Write the block beside, then put it under its name. On failure nothing of it stays, if it can be removed. */
store_result store_file_write(store_files *f, const store_block *b, const void *payload);
/* Remove the file, or link, under the key's name. */
store_result store_file_delete(const store_files *f, const uint64_t key[2]);

/* "<32 hex>" of 16 bytes, most significant first. out [STORE_HEX + 1]. */
void store_hex(char *out, const uint8_t bytes[16]);
bool store_is_hex(const char *text, size_t n); /* n digits, lower case, and no more */

typedef enum store_name { STORE_NAME_OTHER, STORE_NAME_BLOCK, STORE_NAME_LEFT } store_name;
/* A block's file and its key; what a write left behind; or none of ours. sub: the folder it lies in, two digits. */
store_name store_name_read(uint64_t key[2], const char *sub, const char *name);

/* Call fn for each name in dir/name but . and .., until it returns false. Links are not followed. Done, also when fn
 * has ended it; Gone or Bad where there is no such folder. */
typedef bool store_each_fn(void *ud, int dir, const char *name);
store_result store_each(const store_sys *sys, int dir, const char *name, store_each_fn *fn, void *ud);
/* The calls that others make too; -1 and errno as the C library has it, but for interruptions. */
int store_open_at(const store_sys *sys, int dir, const char *name, int flags, mode_t mode);
int store_make_dir(const store_sys *sys, int dir, const char *name); /* 0 also where it is there already */
/* Remove a name in dir; flags as of unlinkat. */
store_result store_remove(const store_sys *sys, int dir, const char *name, int flags);
/* What errno says. */
store_result store_errno_result(void);

#endif
