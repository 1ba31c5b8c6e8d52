/* The safetensors files of one folder and every tensor in them by name: private to `model`.
 *
 * One file `model.safetensors`, or shards named by `model.safetensors.index.json`; the index is believed only as far as
 * the files agree. Owner: ern_model; memory comes from its arena. */
#ifndef ERN_MODEL_CHECKPOINT_H
#define ERN_MODEL_CHECKPOINT_H

#include "model/safetensors.h"

enum { CKPT_FILES_MAX = 4096 };
#define CKPT_INDEX "model.safetensors.index.json"
#define CKPT_SINGLE "model.safetensors"

typedef struct ckpt_tensor {
    const st_tensor *info;
    const st_file *file;
    const void *data; /* set when first used: into the mapping, or a copy where the file's alignment is odd */
    bool used;        /* named by the model's table, or known and not needed */
    bool released;    /* quantized from while loading: not read again */
} ckpt_tensor;

typedef struct checkpoint {
    const char *label; /* the index or the single file; for messages */
    st_file *file;
    int32_t n_file;
    ckpt_tensor *tensor; /* sorted by name */
    int32_t n_tensor;
} checkpoint;

/* True when the folder holds an index or a single file. */
bool ckpt_exists(const char *dir);
/* Open every file of the folder. Errors: ERN_ERR_FILE; nothing stays open. */
ERN_MUST_CHECK ern_status ckpt_open(checkpoint *out, ern_arena *arena, const char *dir, ern_err *err);
void ckpt_close(checkpoint *c);
/* The tensor of that name, or NULL. */
ckpt_tensor *ckpt_find(const checkpoint *c, const char *name);

/* The names and files of an index, checked: private to ckpt_open and its tests. file_of[i] is an index into file. */
typedef struct ckpt_index {
    const char **file;
    const char **name; /* sorted */
    int32_t *file_of;
    int32_t n_file, n_name;
    double total_bytes; /* metadata.total_size; 0 when absent */
} ckpt_index;
ERN_MUST_CHECK ern_status ckpt_index_parse(ckpt_index *out, ern_arena *arena, const char *text, size_t len,
                                           const char *what, ern_err *err);

#endif
