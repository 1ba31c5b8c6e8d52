/* The folders of the disk tier: whose they are, what lies in them, and room made in those of other fingerprints.
 *
 * A model that changed, or a new version of the program, has another fingerprint and never reads the old one's blocks;
 * they still take room below DIR. A folder that a running process holds is that process's, whose limit is its own: it
 * is neither counted nor touched. Only files named as we name them are ever deleted.
 * Owner: store.c. Thread: the store's reader of names, after it the disk's. */
#ifndef ERN_ENGINE_STORE_FOLDER_H
#define ERN_ENGINE_STORE_FOLDER_H

#include <stdatomic.h>

#include "engine/store_file.h"

/* The descriptor that holds the folder's lock for this process until it is closed; -1 and errno, EWOULDBLOCK: another
 * process has it. make: the lock file if it is not there. */
int store_lock(const store_sys *sys, int dir, bool make);

/* Call fn for each plain file of ours below dir, a folder of one fingerprint, until it returns false. prune: remove the
 * folders that are empty after it. The first error, if any; reading goes on after it where it can. */
typedef bool store_walk_fn(void *ud, int dir, const char *name, store_name kind, const uint64_t key[2],
                           const struct stat *st);
store_result store_walk(const store_sys *sys, int dir, bool prune, store_walk_fn *fn, void *ud);

/* When a file was last used. */
static inline int64_t store_used_ns(const struct stat *st) {
    return (int64_t)st->st_mtim.tv_sec * 1000000000 + st->st_mtim.tv_nsec;
}

enum { STORE_FOLDERS_MAX = 64 }; /* fingerprints that are counted and cleared; more wait for a later start */

typedef struct store_folder {
    char name[STORE_HEX + 1];
    uint64_t bytes;
    int64_t used_ns; /* of its file used last */
} store_folder;

typedef struct store_foreign {
    const store_sys *sys;
    int dir; /* DIR */
    char own[STORE_HEX + 1];
    const atomic_bool *stop;
    store_folder folder[STORE_FOLDERS_MAX];
    int32_t n;
    uint64_t bytes; /* of all of them */
} store_foreign;

/* Find and count them. */
store_result store_foreign_look(store_foreign *f);
/* Delete files of the folder that was left longest ago until need bytes are free; bytes falls in any case. */
store_result store_foreign_shed(store_foreign *f, uint64_t need);

#endif
