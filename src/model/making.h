/* A checkpoint's folder, made aside: private to `model`.
 *
 * Everything is made in a hidden folder inside the target and moved into place at the end, config.json last, so that a
 * folder with a config.json is whole. A failure or a cancel leaves the target as it was. Owner: the caller's stack;
 * making_end is due after every making_begin that went well. */
#ifndef ERN_MODEL_MAKING_H
#define ERN_MODEL_MAKING_H

#include <stdbool.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/status.h"

enum { MAKING_PATH_BYTES = 1200, MAKING_FILE_NAME_BYTES = 48 };

/* The places of one run; each is dir or dir plus a short tail. */
typedef struct making {
    char dir[MAKING_PATH_BYTES], mtp[MAKING_PATH_BYTES];
    char stage[MAKING_PATH_BYTES], stage_mtp[MAKING_PATH_BYTES]; /* what is to be dir and dir/mtp */
    bool dir_is_new;
} making;

/* Errors: ERN_ERR_USAGE when dir holds a model and force is false, ERN_ERR_FILE. */
ERN_MUST_CHECK ern_status making_begin(making *at, const char *dir, bool force, ern_err *err);
/* Make stage_mtp, for a checkpoint with a folder mtp/. */
ERN_MUST_CHECK ern_status making_mtp(const making *at, ern_err *err);
/* Fail when the disk has fewer bytes free. */
ERN_MUST_CHECK ern_status making_space(const making *at, uint64_t need, ern_err *err);
/* s ERN_OK: take away an old checkpoint's weights and move what was staged into place. Else remove it. Returns s, or
 * why moving failed. */
ERN_MUST_CHECK ern_status making_end(making *at, ern_status s, ern_err *err);

/* Write a text as a new file. Errors: ERN_ERR_FILE, ERN_ERR_MEMORY when the text is `full`. */
ERN_MUST_CHECK ern_status making_text(const char *dir, const char *name, const ern_buf *text, ern_err *err);

/* model.safetensors, or model-00001-of-00002.safetensors: the name of file 0..n_file-1. */
void making_file_name(char out[MAKING_FILE_NAME_BYTES], int32_t file, int32_t n_file);
/* model.safetensors.index.json. entry is sorted in place: names are unique, and a tail does not change their order. */
typedef struct making_entry {
    const char *name, *tail; /* name + tail is the tensor's */
    int32_t file;
} making_entry;
ERN_MUST_CHECK ern_status making_index(const char *dir, making_entry *entry, size_t n, int32_t n_file, uint64_t total,
                                       ern_err *err);

/* A file of weights or their index, by its name. */
bool making_is_weights(const char *name);
/* Call fn on each plain file (or link) of a folder; a folder that is not there has none. Stops at the first failure. */
typedef ern_status making_file_fn(void *ud, const char *dir, const char *name, ern_err *err);
ERN_MUST_CHECK ern_status making_each_file(const char *dir, making_file_fn *fn, void *ud, ern_err *err);

#endif
