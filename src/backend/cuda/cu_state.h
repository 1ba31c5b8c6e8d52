/* What one open cuda backend holds, and where its memory lies.
 *
 * All memory is taken at open: one block of the device each for weights, KV and scratch, one pinned block of the host.
 * cu_load.c and cu_layout cut them up; plan() runs the same cutters over no memory, so it cannot lie.
 *
 *   engine thread   submit(n)   submit(n+1)     wait -> n   submit(n+2)
 *   feed            | in, plan n | in, plan n+1 |           | in, plan n+2 |
 *   stream                       | kernels n               | kernels n+1            | ...
 *
 * A step's arrays come in from its slot's pinned block and attention's lists are made of them on a stream of their own,
 * while the step before still runs; its kernels wait for that, and the last of them writes the results into pinned
 * memory itself. So nothing lies between the kernels of two steps. Each slot has device arrays of its own: they are
 * free again when the host has waited for the slot's step, which it does before it submits the next but one. What steps
 * share (residual stream, scratch, KV, the tokens sampled last) is ordered by the one stream of kernels.
 * Owner: cuda.c. Threads: the engine's; kv_read and kv_write have lanes of their own, and may note an error. */
#ifndef ERN_BACKEND_CUDA_CU_STATE_H
#define ERN_BACKEND_CUDA_CU_STATE_H

#include <pthread.h>
#include <stdatomic.h>

#include "backend/cuda/cu_kernels.h"
#include "backend/cuda/cuda.h"

enum {
    CU_SLOTS = 2,           /* steps in flight */
    CU_LANES = 2,           /* threads that move pages beside the engine's */
    CU_FFN_ROWS = 8192,     /* rows of one pass through a feed-forward, whose scratch they bound; with half as many,
                             * experts take a tenth longer: the last tile of each is half empty */
    CU_LOGIT_ROWS = 256,    /* wanted rows whose logits exist at one time */
    CU_NORM_ROWS = 8,       /* most rows that a linear norms itself (cu_job.x_f32) */
    CU_NORM_NUMBERS = 2048, /* and most numbers: a kernel of its own costs less than every block's norm of more */
    CU_SIDE_ROWS = 32,      /* most rows of which the shared experts run beside the others */
    CU_ATTEND_ROWS = 16,    /* query rows (rows times heads of a group) of a sequence that count as decode */
    CU_GRAPH_MOST = 256,    /* largest batch that has a graph */
    CU_GRAPHS_MAX = 64,     /* sizes of batches that have them */
    CU_CHAIN_ROWS = 4,      /* most rows of a step that runs all layers in one kernel */
    CU_ATTN_ONE_ROWS = 4,   /* most rows of a step that runs the attention half of a layer in one kernel */
    CU_EXPERTS_MAX = 512,   /* as cu_route can */
    CU_USED_MAX = 16,
};

/* ---- weights ----------------------------------------------------------------------------------------------------- */

typedef struct cu_ffn {
    cu_linear up; /* pairs of gate and up */
    cu_linear down;
} cu_ffn;

/* All pointers, those inside cu_linear too, are device memory. */
typedef struct cu_layer {
    const cu_bf16 *attn_norm, *ffn_norm; /* [D] */
    cu_linear qkv;                       /* outputs of q, k and v one after the other */
    cu_linear o;
    bool is_moe, has_shared;
    cu_ffn ffn;                               /* of a dense layer, or the shared experts */
    cu_ffn shape;                             /* of any expert */
    const cu_linear *expert_up, *expert_down; /* [E] */
    const float *router, *router_bias;        /* [E, D], [E] or NULL */
} cu_layer;

typedef struct cu_weights {
    cu_layer *layer;        /* [L] */
    cu_linear *expert_host; /* [L, 2 (up, down), E]: what the device's arrays are copied from */
    const cu_bf16 *embed, *norm;
    cu_linear head;
    const cu_bf16 *emb_norm, *hidden_norm; /* of MTP, where it runs */
    cu_linear proj;
    cu_layer mtp;
} cu_weights;

/* ---- steps ------------------------------------------------------------------------------------------------------- */

/* The arrays of one step of T rows, S sequences, W wanted rows, one after the other: in the slot's pinned block and, at
 * the same distances, on the device. Cut for the step's own size, so that little is copied; a graph's size is fixed and
 * with it every address. */
typedef struct cu_input {
    int32_t *token, *next, *pos, *cell; /* [T] */
    int32_t *row0, *kv_len;             /* [S+1], [S] */
    int32_t *want;                      /* [W] */
    int32_t *end0, *end_pos;            /* [S+1], [W] row0 and pos of the wanted rows alone */
    int32_t *page;                      /* [S, n_page_max] */
    cu_rule *rule;                      /* [W] */
    int32_t *aux;                       /* what the rules point to */
    size_t page_at, rule_at, aux_at;    /* bytes before page, rule, aux */
} cu_input;

/* One submitted step. */
typedef struct cu_slot {
    unsigned char *block; /* pinned: a cu_input */
    unsigned char *input; /* device: the same */
    int32_t *attn_work;   /* [cu_attn_work_count] device */
    int32_t *end_work;    /* the same, of the wanted rows alone */
    ern_sampled *sampled; /* [n_want_max] pinned, out */
    int32_t *draft;       /* the same; NULL without MTP */
    int32_t n_want;
    int64_t submit_us;
    cudaEvent_t fed; /* input, attn_work and end_work are there */
    cudaEvent_t end;
} cu_slot;

/* The decode step of n sequences with one row each, all wanted, as graphs. */
typedef struct cu_graph {
    int32_t n;
    cudaGraphExec_t exec[CU_SLOTS][2]; /* [.][1]: every rule is plain arg-max */
} cu_graph;

/* A way for one thread to move pages. */
typedef struct cu_lane {
    pthread_mutex_t lock;
    cudaStream_t stream;
    unsigned char *bounce; /* [lane_bytes] pinned */
} cu_lane;

/* Room for rows of 8 bits (cu_x8) of any linear that takes them. */
typedef struct cu_rows8 {
    uint8_t *code;
    float *scale;
} cu_rows8;

typedef struct cu_backend {
    const ern_backend_ops *ops;
    const ern_model *model;
    ern_backend_options o;
    int32_t n_page_max;  /* pages of the longest sequence */
    int32_t n_kv_layer;  /* L, +1 with MTP */
    int32_t n_ffn_row;   /* rows of a pass through a feed-forward */
    int32_t n_logit_row; /* rows of a pass through the head */
    cu_codes codes;      /* rows that the layers' quantized linears multiply; NONE: bf16 (cu_state_init says when) */
    int32_t n_aux;       /* words of aux that a slot has room for: those of any one row, and many */
    cu_cache cache;      /* its pages are one more than o.n_page: padding rows write to the last */
    cu_weights weights;
    unsigned char *weight_block, *scratch, *pinned;
    size_t weight_bytes, kv_bytes, scratch_bytes, pinned_bytes, attn_bytes, lane_bytes;

    /* device scratch; R = n_ffn_row, I = n_logit_row. Rows of bf16 are CU_PAD numbers apart, their pads zero */
    float *x;                               /* [T, D] residual stream */
    cu_bf16 *xn;                            /* [T, CU_PAD(D)] its norm; of wanted rows before the head */
    float *qkv;                             /* [T, (H + 2G) C]; y of the experts where a probe looks [R, D]; x of the
                                             * wanted rows alone [W, D], and their q behind it */
    cu_bf16 *q, *att;                       /* [T, H*C], [T, CU_PAD(H*C)] */
    float *inv_freq;                        /* [C/2] 1 / theta^(2j/C), rounded as docs/model.md 3.3 has it */
    void *attn;                             /* [attn_bytes] */
    cu_bf16 *hid, *shared_hid, *expert_hid; /* [R, CU_PAD(F)], [R, ..], [R*K, ..] */
    float *expert_y, *shared_y;             /* [R*K, CU_PAD(D)] (used as rows of D; before: x by place), [R, D] */
    cu_rows8 row8, hid8;  /* where codes: xn or att (or mtp_in) as codes; hid, shared_hid or expert_hid */
    cu_rows8 shared8;     /* shared_hid as codes where the shared experts run beside the others */
    cu_routes routes;     /* for R rows */
    cu_chain chain;       /* all layers of a step of few rows; n_row_max 0: not of this model */
    cu_attn_one attn_one; /* the attention half of a layer of few rows; n_row_max 0: not of this model */
    int32_t *few_count;   /* cu_few_job's, zero between steps */
    float *logits;        /* [I, V] */
    void *sampler;        /* cu_sample's */
    int32_t *ids;         /* [W] sampled last: ERN_PREV of the next step */
    cu_bf16 *mtp_in;      /* [T, CU_PAD(2D)] */
    int32_t *mtp_next;    /* [T] */

    /* what the last wait returned, pinned */
    ern_sampled *sampled; /* [W] */
    int32_t *draft;       /* [W]; NULL without MTP */

    cudaStream_t stream;
    cudaStream_t feed; /* arrays in and attention's lists, of the step after the one that runs */
    cudaStream_t side; /* shared experts of few rows, beside others and router: from fork to join */
    cudaEvent_t fork, join;
    cudaEvent_t copied; /* after the last kv_copy */
    cu_slot slot[CU_SLOTS];
    cu_graph graph[CU_GRAPHS_MAX];
    int32_t n_graph;
    uint64_t n_submitted, n_waited;
    int64_t waited_us;   /* when the last wait returned */
    int32_t n_prev_want; /* wanted rows of the last submit */
    cu_lane lane[CU_LANES];

    ern_probe_fn *probe;
    void *probe_ud;
    float *show; /* host: a stage of all rows in f32, and its bf16; taken when a probe is first set */

    atomic_int error;                  /* the first cudaError_t; nothing is queued any more */
    _Atomic(const char *) error_where; /* the call that told */
} cu_backend;

/* Cuts 512-byte aligned pieces off base, or only counts where base is NULL. */
typedef struct cu_cut {
    unsigned char *base;
    size_t used;
} cu_cut;
void *cu_cut_take(cu_cut *c, size_t n, size_t each_bytes);

/* Fill the derived numbers and check that this backend can run the model so. Errors: the first thing that does not
 * fit. */
ERN_MUST_CHECK ern_status cu_state_init(cu_backend *b, const ern_model *m, const ern_backend_options *o, ern_err *err);
/* Cut the device's scratch and the host's pinned block (b->scratch, b->pinned; NULL: only count their bytes). */
void cu_layout(cu_backend *b);
/* How this linear of b->model is packed. */
cu_format cu_format_of(const cu_backend *b, const ern_linear *w);
/* The arrays of a step of this size from base on. */
cu_input cu_input_at(const cu_backend *b, unsigned char *base, int32_t n_row, int32_t n_seq, int32_t n_want);

/* What was noted, or a cudaError_t of open, as one sentence: what we did, what CUDA says, what mends it. */
ern_status cu_fail(cudaError_t e, const char *where, ern_err *err);
/* Keep the first error of all threads. */
void cu_note(cu_backend *b, cudaError_t e, const char *where);
/* Do a call unless one has failed before. */
#define CU_DO(b, call)                                                                                           \
    do {                                                                                                         \
        if (atomic_load_explicit(&(b)->error, memory_order_acquire) == cudaSuccess) cu_note((b), (call), #call); \
    } while (0)
/* The same while opening: fail at once. */
#define CU_TRY(call, err)                                                    \
    do {                                                                     \
        const cudaError_t cu_error_ = (call);                                \
        if (cu_error_ != cudaSuccess) return cu_fail(cu_error_, #call, err); \
    } while (0)

/* ---- cu_load.c --------------------------------------------------------------------------------------------------- */

/* Take the host's tables of b->weights. Errors: ERN_ERR_MEMORY. */
ERN_MUST_CHECK ern_status cu_weights_open(cu_backend *b, ern_err *err);
void cu_weights_close(cu_backend *b);
/* Bytes of all weights as they will lie on the device. raw_bytes: what the largest needs beside, as stored, while they
 * are loaded; all_bytes: what is read. */
size_t cu_weights_count(cu_backend *b, size_t *raw_bytes, uint64_t *all_bytes);
/* Read, send and pack all weights into b->weight_block and fill b->weights. raw: device memory of raw_bytes. Done when
 * it returns.
 * Errors: ERN_ERR_CANCELLED, ERN_ERR_MEMORY, the device's. */
ERN_MUST_CHECK ern_status cu_weights_fill(cu_backend *b, unsigned char *raw, size_t raw_bytes, uint64_t all_bytes,
                                          ern_err *err);

/* ---- cu_step.c --------------------------------------------------------------------------------------------------- */

/* Queue a step: arrays in, kernels, results out into the slot. Errors are noted in b. */
void cu_step(cu_backend *b, cu_slot *s, const ern_batch *in);
/* Sizes of batches that get graphs. */
int32_t cu_graph_sizes(const cu_backend *b);
/* Run every kernel once, so that no step has to wait for code, and capture the graphs. */
ERN_MUST_CHECK ern_status cu_step_warm(cu_backend *b, ern_err *err);

#endif
