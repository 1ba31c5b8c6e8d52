/* The disk tier of the prefix cache: full KV blocks, one file each, found again after a restart.
 *
 *   DIR/<fingerprint, 32 hex>/<first 2 hex of the key>/<key, 32 hex>.kv
 *   file = header (magic, version, fingerprint, bytes and tokens of a block, key, parent's key, salt, checksums)
 *          + token ids [n_token] i32 + payload [block_bytes]; store_file.h draws it
 *
 * A file appears whole or not at all: it is written under another name and renamed. Reading believes nothing: every
 * field of the header, the token ids and the checksum of the payload are compared, and whatever differs, is missing or
 * fails is a miss; the file is then deleted. Over the limit, the files used longest ago go first. Three errors of the
 * system (not: a bad file) within a minute switch the tier off for a minute: nothing is found, nothing written. A
 * request never fails because of it.
 *
 * Hides: files, their order of age, the index in memory. Owner: transfer.c. Threads: store_has and store_stats from
 * any thread; store_read and store_write from one (the disk's). Memory: taken at open; none later but what the C
 * library takes for an open folder. */
#ifndef ERN_ENGINE_STORE_H
#define ERN_ENGINE_STORE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "engine/engine.h"

typedef struct store store;
typedef struct store_sys store_sys; /* store_file.h */

typedef struct store_options {
    const char *dir;      /* made if it is not there, but not what it lies in */
    uint64_t limit_bytes; /* of all blocks below dir. Those of fingerprints that no process uses now are deleted first
                             when room is short; those that another process uses are its own, under its own limit */
    uint64_t block_bytes; /* payload of one block */
    int32_t n_token;      /* tokens of one block */
    uint8_t fingerprint[16]; /* of model, layout and program */
    int64_t (*now_us)(void); /* monotonic */
    int64_t wait_us;         /* how long open waits for the names at most; 0: a quarter of a second */
    const store_sys *sys;    /* tests: the system calls to make; NULL: the C library's */
} store_options;

/* What a block is. Two blocks are the same when all of it is. */
typedef struct store_block {
    uint64_t key[2], parent[2]; /* XXH3-128, chained; parent 0, 0: the first block of a prompt */
    uint8_t salt[16];
    const int32_t *token; /* [n_token] */
} store_block;

/* Open the folder and read its names in a thread of its own, for which this waits a moment: then a folder of some
 * thousand files is known at return. Of a larger one, what was not seen yet is a miss, and nothing is written until all
 * was.
 * Errors: ERN_ERR_FILE or ERN_ERR_USAGE naming the folder and --kvcache-storage-dir or --kvcache-storage-gb: not a
 * folder, not writable, a limit below one block, held by another process (a lock file); ERN_ERR_MEMORY. */
ERN_MUST_CHECK ern_status store_open(store **out, const store_options *o, ern_err *err);
void store_close(store *s); /* NULL is fine */
/* True when a file of this key is thought to be there. Takes no system call. */
bool store_has(store *s, const uint64_t key[2]);
/* Fill payload [block_bytes] and return true only if the file holds exactly this block, undamaged. False: payload may
 * hold anything. */
bool store_read(store *s, const store_block *b, void *payload);
/* Keep the block unless it is there already. False: it could not be kept, which costs nothing but a later miss. */
bool store_write(store *s, const store_block *b, const void *payload);
/* n_block, n_block_max, n_out (written), n_in (read), n_evicted, n_error (errors of the system, and bad files), off. */
void store_stats(store *s, ern_tier_stats *out);
/* Bytes of memory that store_open will take. */
uint64_t store_memory_bytes(const store_options *o);

#endif
