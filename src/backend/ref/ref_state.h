/* What ref.c (the door's verbs, memory, KV pages) and ref_forward.c (the mathematics) share. One owner, one thread. */
#ifndef ERN_BACKEND_REF_STATE_H
#define ERN_BACKEND_REF_STATE_H

#include "backend/backend.h"
#include "base/arena.h"

/* Two steps may be in flight while the caller still reads the result before them. */
enum { REF_SLOTS = 3 };

typedef struct ref_slot {
    int32_t n_want;
    ern_sampled *sampled; /* [n_want_max] */
    int32_t *draft;       /* [n_want_max], or NULL without MTP */
    int64_t compute_us;
} ref_slot;

typedef struct ref {
    ern_backend base; /* first: the door sees only this */
    const ern_model *m;
    ern_backend_options o;
    ern_arena arena;
    uint64_t scratch_bytes;       /* of everything below but the cache */
    bool plan_only, is_exhausted; /* count only; the arena said no once */

    ern_probe_fn *probe;
    void *probe_ud;

    ref_slot slot[REF_SLOTS];
    uint64_t n_submit, n_wait;

    unsigned char *kv; /* [n_page] pages as ern_kv_dtype draws them */
    size_t page_bytes, plane_bytes;
    int32_t n_kv_layer;

    /* one step's rows; f32 unless said */
    int32_t *token;         /* [T] with every ERN_PREV resolved */
    float *x;               /* [T, D] the residual stream */
    float *h;               /* [T, D], or [T, 2D] for the MTP projection: what a linear layer reads */
    float *y;               /* [T, D] what a block gives back */
    float *q, *k, *v, *att; /* [T, Q], [T, G*C] twice, [T, Q] */
    float *gate, *up;       /* [T, widest F] */
    float *router;          /* [T, E] logits */
    float *routed;          /* [D] one row's output of one expert */
    int32_t *chosen;        /* [K] */
    float *prob;            /* [E] */
    float *rope;            /* [T, C] cos and sin of pair j at 2j and 2j+1 */
    float *logits;          /* [V] */
    double *weight_row;     /* [widest n_in] one output's weights, widened */
    float *act_code;        /* [T, widest n_in] quantized inputs of a linear: what the codes stand for, unscaled */
    uint8_t *act_row;       /* [widest n_in] one row's codes: int8 or e4m3 */
    float *act_scale;       /* [T, ceil(widest n_in / 128)] */
    double *score;          /* [n_len_max] */
    double *kv_row;         /* [2, C] a key or value, widened; an output's sums */
    void *sample_scratch;
} ref;

/* Cells of a page, up to whole groups. */
static inline size_t ref_plane_cells(const ref *b) {
    return ((size_t)b->o.n_page_cell + ERN_KV_GROUP - 1) / ERN_KV_GROUP * ERN_KV_GROUP;
}

/* Compute one whole step into `out`; prev is the slot of the submit before it, for ERN_PREV. */
void ref_forward(ref *b, const ern_batch *in, const ref_slot *prev, ref_slot *out);

#endif
