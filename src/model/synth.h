/* Made checkpoints: the plan of one, and its weight files. Private to `model`; the door is ern_synth_write.
 *
 * A plan lists every tensor of the files in their order. A tensor is made of one part per PyTorch tensor that it holds
 * (three in a fused qkv_proj), and an element depends only on (seed, PyTorch name, PyTorch index), so that both layouts
 * of one seed hold the same weights. Source: docs/model.md 8. */
#ifndef ERN_MODEL_SYNTH_H
#define ERN_MODEL_SYNTH_H

#include "base/buf.h"
#include "model/model.h"

enum { SYNTH_NAME_BYTES = 96, SYNTH_PARTS_MAX = 3 };
#define SYNTH_SHARD_BYTES UINT64_C(5000000000) /* unless something else is asked for */

typedef struct synth_part {
    uint64_t key; /* of the seed and the PyTorch name */
    float scale, offset;
    int32_t n_out;
} synth_part;

typedef struct synth_tensor {
    char name[SYNTH_NAME_BYTES]; /* in the file */
    synth_part part[SYNTH_PARTS_MAX];
    int32_t n_part, n_in, n_out; /* n_out of all parts together */
    int32_t n_dim;               /* 1: [n_in]; 2: [n_out, n_in], or [n_in, n_out] when turned */
    bool f32, turned;
    int32_t file;  /* of its folder */
    uint64_t from; /* where its bytes begin in the file's data */
} synth_tensor;

/* One folder of weights. */
typedef struct synth_set {
    synth_tensor *tensor; /* [n_tensor], by file, then in file order */
    int32_t n_tensor, cap_tensor, n_file;
} synth_set;

typedef struct synth_plan {
    const char *shape;
    ern_config config;
    bool paddle, head_dim_said, moe_last_said;
    uint64_t seed;
    synth_set main, mtp; /* mtp is empty when its tensors are in main, or there are none */
    bool full;           /* ran out of memory while planning */
} synth_plan;

/* Bytes of one tensor. */
uint64_t synth_tensor_bytes(const synth_tensor *t);
/* Elements [first, first + n) of a tensor in the order of the file, as they lie in it. */
void synth_tensor_fill(const synth_tensor *t, uint64_t first, uint64_t n, void *out);

/* Elements [first, first + n) of the tensor of a PyTorch name, n_in inputs wide, in that order, as bf16 or f32. */
void synth_rows_fill(uint64_t seed, const char *name, int32_t n_in, bool f32, uint64_t first, uint64_t n, void *out);

/* Plan a checkpoint. Errors: ERN_ERR_USAGE for an unknown shape or a count out of range, ERN_ERR_MEMORY. */
ERN_MUST_CHECK ern_status synth_plan_make(synth_plan *out, const ern_synth_options *o, ern_err *err);
void synth_plan_free(synth_plan *p);
/* The text of config.json and generation_config.json. */
void synth_config_text(const synth_plan *p, ern_buf *out);
void synth_generation_text(ern_buf *out);

/* Write the weight files (and the index, when there is more than one) of a set into dir. `done_bytes` runs on over the
 * calls, for progress. Errors: ERN_ERR_FILE naming the file, ERN_ERR_CANCELLED, ERN_ERR_MEMORY. */
typedef struct synth_progress {
    ern_progress_fn *fn;
    void *ud;
    uint64_t done_bytes, all_bytes;
} synth_progress;
ERN_MUST_CHECK ern_status synth_set_write(const synth_set *s, const char *dir, bool paddle, synth_progress *progress,
                                          ern_err *err);

#endif
