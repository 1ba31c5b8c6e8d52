/* The door of `backend`: one whole model step at a time.
 *
 * A backend turns an ern_batch (rows of tokens with positions and KV cells) into an ern_result (one sampled token per
 * wanted row). Prefill, decode, mixed chunks and draft verification are one shape; there is no mode flag. Hides:
 * kernels, devices, threads, weight packing, the KV cache's memory. Never sees a request, never sees text. Owner: the
 * engine thread opens, submits, waits and closes; everything is called from that one thread, but kv_read and kv_write
 * also from those that move pages. Backend workers are its own. `submit` copies the batch's arrays; pointers inside
 * ern_sample stay borrowed until the matching wait. */
#ifndef ERN_BACKEND_BACKEND_H
#define ERN_BACKEND_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "model/model.h"
#include "model/sample.h"

/* In ern_batch.token: the token that the previous submit sampled at its wanted row w. */
#define ERN_PREV(w) (-1 - (int32_t)(w))

/* One engine step, plain arrays: T rows, S sequences, W wanted rows. */
typedef struct ern_batch {
    int32_t n_row, n_seq, n_want, n_page_max;
    const int32_t *token;  /* [T] id, or ERN_PREV(w) */
    const int32_t *next;   /* [T] the token at pos + 1 where known, -1: sampled here or not needed. NULL without MTP */
    const int32_t *pos;    /* [T] position in its sequence */
    const int32_t *cell;   /* [T] KV cell to write: page * P + offset */
    const int32_t *row0;   /* [S+1] sequence s owns rows row0[s] .. row0[s+1]-1, positions consecutive */
    const int32_t *kv_len; /* [S] cells visible to the last of its rows after this step (its position + 1) */
    const int32_t *page;   /* [S, n_page_max] page table; page[s][i] holds positions i*P .. i*P+P-1 */
    const int32_t *want; /* [W] rows whose next token is sampled, ascending. Without MTP and a probe a backend may make
                            nothing but keys and values of the others in the last layer */
    const ern_sample *sample; /* [W] */
} ern_batch;

/* Valid until the next wait on the same backend. */
typedef struct ern_result {
    int32_t n_want;
    const ern_sampled *sampled; /* [W] */
    const int32_t *draft;       /* [W] the MTP layer's guess for the token after the sampled one; NULL without MTP */
    int64_t compute_us;         /* time the step took on the device */
} ern_result;

typedef struct ern_page_pair {
    int32_t from, to;
} ern_page_pair;

/* How ref and cpu store keys and values. A page is [L (+1 with MTP), 2 (K, V), G] planes, one after the other. P' is P
 * rounded up to whole groups of 16 cells; C the head size, even. Where cell p and dimension c lie in a plane:
 *
 *   BF16, F32   K [P'/16, C/2, 16, 2]   (p/16 * C + c/2 * 2) * 16 + p%16 * 2 + c%2
 *               V [P'/2, C, 2]          (p/2 * C + c) * 2 + p%2
 *   I8, F8      K [P'/16, C, 16]        (p/16 * C + c) * 16 + p%16
 *               V [P', C]               p * C + c
 *
 * Pairs of dimensions of 16 keys, and pairs of values, are what products of bf16 tiles and of bf16 pairs take. After
 * the codes of I8 and F8 come [P'] f32 scales, one a cell: the value is code * scale (docs/model.md 10). C at most 128.
 *
 * cuda has an order of its own. Cells that were never written, and those past P, may hold anything and are not looked
 * at. */
typedef enum ern_kv_dtype {
    ERN_KV_BF16,
    ERN_KV_F32,
    ERN_KV_I8,
    ERN_KV_F8
} ern_kv_dtype; /* F32: ref only; F8: not cpu */
enum { ERN_KV_GROUP = 16, ERN_KV_CODE_HEAD_MAX = 128 };
static inline bool ern_kv_has_codes(ern_kv_dtype t) { return t == ERN_KV_I8 || t == ERN_KV_F8; }

typedef struct ern_backend_options {
    int32_t n_page;      /* pages of KV */
    int32_t n_page_cell; /* P; cpu: a multiple of 16 */
    int32_t n_row_max;   /* most rows of a step */
    int32_t n_seq_max;   /* most sequences of a step */
    int32_t n_want_max;  /* most wanted rows of a step (up to n_row_max) */
    int32_t n_len_max;   /* longest sequence, tokens */
    ern_kv_dtype kv_dtype;
    int32_t n_thread; /* cpu: 0 means all allowed processors */
    int32_t level;    /* cpu: an ern_cpu_level to force, -1: the best this machine has */
    bool act_exact; /* linears take f32 activations as they are; else int8 (int weights), fp8 (fp8 ones), or bf16 where
                     * the level's kernels for bf16 weights round them */
    bool mtp;       /* run the MTP layer and fill ern_result.draft */
    ern_progress_fn *progress;
    void *ud;
    bool no_graph; /* cuda: launch every kernel of a decode step by itself; the same bits, slower */
} ern_backend_options;

/* What a backend will take before it opens, bytes. */
typedef struct ern_backend_plan {
    uint64_t weight_bytes;  /* copies it makes of the weights; mapped weights are not counted */
    uint64_t page_bytes;    /* one KV page over all layers, as kv_read and kv_write move it */
    int32_t page_step;      /* pages are taken so many at a time, the last ones whether used or not; 0: one by one */
    uint64_t scratch_bytes; /* activations, logits, tables */
    const char *kernels;    /* what computes, for people: "scalar", "avx512", ...; static string */
    /* of the device that the above is taken from; 0: the machine's own memory */
    uint64_t memory_free_bytes, memory_all_bytes;
} ern_backend_plan;

/* Tests see each stage. `stage` is one of: embed, attn_norm, q, k, v, attn, attn_out, ffn_norm, router, experts, resid,
 * norm, logits, mtp_in, mtp_resid, mtp_logits. layer is -1 where none applies. data is [n_row, n_col] f32, borrowed for
 * the call. "resid" of every layer and "logits" are mandatory. norm, logits and mtp_logits come one wanted row a call,
 * row = its index in `want`; the others come with row = the first of n_row rows of the batch. Shapes: docs/model.md 6.
 * Called on the thread that computes. With a probe all rows pass all layers. */
typedef void ern_probe_fn(void *ud, const char *stage, int32_t layer, int32_t row, const float *data, int32_t n_row,
                          int32_t n_col);

typedef struct ern_backend ern_backend; /* every implementation's struct begins with `const ern_backend_ops *ops` */

typedef struct ern_backend_ops {
    const char *name;
    /* Say the memory without taking it. */
    ern_status (*plan)(ern_backend_plan *out, const ern_model *m, const ern_backend_options *o, ern_err *err);
    ern_status (*open)(ern_backend **out, const ern_model *m, const ern_backend_options *o, ern_err *err);
    void (*close)(ern_backend *b);
    /* Queue a step; copies `in`; returns at once. At most two may be in flight. */
    void (*submit)(ern_backend *b, const ern_batch *in);
    /* The oldest submit's result, in order; blocks. */
    ern_status (*wait)(ern_backend *b, ern_result *out, ern_err *err);
    /* Copy whole pages inside the cache; ordered after every earlier submit and before every later one. */
    void (*kv_copy)(ern_backend *b, const ern_page_pair *pair, int32_t n);
    /* Pages to host memory and back: n * page_bytes, each as the backend stores it. Beside the engine's thread, two
     * more may call these at any time, also while steps are in flight; they block. The caller sees to it that no step
     * in flight writes a page that is read or names one that is written, and that no other copy does. False: the device
     * has failed, as the next wait will tell; host holds no pages. */
    bool (*kv_read)(ern_backend *b, const int32_t *page, int32_t n, void *host);
    void (*kv_write)(ern_backend *b, const int32_t *page, int32_t n, const void *host);
    /* fn NULL: off. */
    void (*probe)(ern_backend *b, ern_probe_fn *fn, void *ud);
} ern_backend_ops;

struct ern_backend {
    const ern_backend_ops *ops;
};

/* The backend of a name, or NULL. "ref" and "cpu" are in the program. "cuda" is a plugin, ernest_cuda.so beside the
 * program or in ../lib/ernest from there, or ernest_cuda_sm80.so if the GPU is none of compute capability 9.0: loaded
 * by the first call where a driver is, and kept. */
const ern_backend_ops *ern_backend_find(const char *name);
/* NULL: that backend can run here; else one clause that says why not. Without a driver it costs a look for two files.
 * The text stays. Any thread. */
const char *ern_backend_missing(const char *name);
/* What a backend that is not missing computes on, a line for people: name, memory, driver. False: the processors. */
bool ern_backend_device(const char *name, char *out, size_t size);
/* The file that a backend's code is in, for who must know its bytes; NULL: the program itself. The text stays. */
const char *ern_backend_file(const char *name);

/* Check a batch against the rules above; the engine's test builds and the fuzz targets call it. False: *why says what.
 */
bool ern_batch_valid(const ern_batch *in, const ern_backend_options *o, int32_t n_vocab, const char **why);

#endif
