/* What one open cpu backend holds, and where its memory lies.
 *
 * All memory is taken at open: the KV cache (pages as the door draws them, so moving a page is a memcpy) and one
 * scratch block that cpu_layout cuts up. plan() runs the same cutter over no memory, so it cannot lie. Owner: cpu.c.
 * Threads: the engine thread fills slots and reads results; the driver (worker 0 of the pool) computes; `lock` guards
 * the three counters, nothing else is shared at one time. */
#ifndef ERN_BACKEND_CPU_CPU_STATE_H
#define ERN_BACKEND_CPU_CPU_STATE_H

#include <pthread.h>
#include <stdatomic.h>

#include "backend/cpu/cpu.h"
#include "backend/cpu/cpu_kernels.h"
#include "base/pool.h"

enum {
    CPU_SLOTS = 3,        /* two in flight, and the one whose result the engine still reads */
    CPU_FFN_ROWS = 512,   /* rows of one pass through a feed-forward: bounds its scratch; each reads all weights */
    CPU_LOGIT_ROWS = 32,  /* wanted rows whose logits exist at one time */
    CPU_PAIRS_MAX = 1024, /* page copies queued before a step */
};

/* One submitted step: a copy of the ern_batch, and its results. */
typedef struct cpu_slot {
    int32_t n_row, n_seq, n_want, n_pair;
    bool has_next;
    int32_t *token, *next, *pos, *cell; /* [n_row_max] */
    int32_t *row0, *kv_len;             /* [n_seq_max + 1], [n_seq_max] */
    int32_t *page;                      /* [n_seq_max, n_page_max] */
    int32_t *want;                      /* [n_want_max] */
    ern_sample *sample;                 /* [n_want_max] */
    ern_page_pair *pair;                /* [CPU_PAIRS_MAX] copies to make before the step */
    ern_sampled *sampled;               /* [n_want_max] out */
    int32_t *draft;                     /* [n_want_max] out */
    int64_t compute_us;
} cpu_slot;

/* The rows of a step at hand, sequence by sequence: all of them, or the wanted ones, which alone go on behind the last
 * layer's keys and values. x, q and rope hold them at the front. */
typedef struct cpu_rows {
    int32_t n;
    const int32_t *pos, *row0; /* [n], [n_seq + 1] */
} cpu_rows;

/* Rows row..row+n-1 of these, all of one sequence, that attend together to the softmax blocks block..block+n_block-1.
 */
typedef struct cpu_tile {
    int32_t row, n, seq, block, n_block;
    int32_t slot; /* >= 0: one piece of many. Row r's results wait in part slot + r * stride + k, those of the chain
                     that begins with block k, and where chains are cut, of block k */
    int32_t stride;
    int32_t n_chained; /* the blocks before this one are in pieces of one chain each */
    bool brief; /* a piece, or a small part of all: who has it takes its next task early, to fetch its first block */
} cpu_tile;

/* The model's linears as this backend reads them: those of the model, or copies in huge pages, where they take at most
 * a quarter of the free memory: of tiles that a file backs, and of bf16 rows as panels. cpu_weights.c. */
typedef struct cpu_weights {
    ern_layer *layer; /* [L] the model's, but for what moved */
    ern_ffn *expert;  /* [L, E] */
    ern_linear head;
    size_t bytes; /* of the copies; 0: none */
    int32_t panel_out;
    struct cpu_file_ranges *files;
} cpu_weights;

/* What is left of a worker's share of a phase's pieces: how many have been taken from its front (low half), and from
 * its back. */
typedef struct cpu_left {
    _Atomic uint64_t taken;
    char apart[120];
} cpu_left;

typedef struct cpu_backend {
    const ern_backend_ops *ops;
    const ern_model *model;
    ern_backend_options o;
    const cpu_kernels *kernels;
    ern_pool *pool;
    int32_t n_worker;
    int32_t n_page_max;  /* pages of the longest sequence */
    int32_t n_kv_layer;  /* L, +1 with MTP */
    int64_t plane_bytes; /* keys, or values, of one KV head in one page */
    int64_t page_bytes;  /* all planes of a page */
    unsigned char *kv;
    void *scratch, *tiles;
    size_t kv_bytes, scratch_bytes;
    cpu_weights weights; /* the step reads layers and head here; tiles holds the copies */

    /* scratch of the running step; T = n_row_max, R = min(T, CPU_FFN_ROWS), I = min(W, CPU_LOGIT_ROWS) */
    float *x, *xn;        /* [T, D] residual stream; its norm */
    float *q, *k, *v;     /* [T, H*C], [T, G*C]: q becomes the attention's output in place */
    float *inv_freq;      /* [C/2] 1 / theta^(2j/C), rounded as docs/model.md 3.3 has it; filled at open */
    float *rope;          /* [T, 2, C/2] cosines, sines */
    float *gate, *up;     /* [R, F] or [R*K, F of an expert] */
    float *near;          /* [n_worker, 2, R, ERN_ACT_GROUP] gate and up of a piece of many rows */
    float *prob;          /* [R, E] router */
    int32_t *chosen;      /* [R, K] expert ids, ascending */
    float *share;         /* [R, K] their weights */
    int32_t *entry_row;   /* [R*K] rows sorted by expert */
    float *entry_share;   /* [R*K] */
    int32_t *entry_first; /* [E+1] */
    int32_t *active;      /* [E] experts that have rows, ascending */
    int32_t n_active;
    float *mtp_in;                 /* [T, 2D] */
    int32_t *mtp_next;             /* [T] */
    float *head_in;                /* [I, D] */
    float *logits;                 /* [I, V] */
    int32_t *want_seq;             /* [W] */
    int32_t *want_pos, *want_row0; /* [W], [n_seq_max + 1] the cpu_rows of the wanted rows */
    cpu_tile *tile;                /* [T + n_slot] tasks of the attention, each for every KV head */
    cpu_tile *split;               /* [T] the tiles that were cut into pieces, whole */
    int32_t n_tile, n_split;
    float *own_part;        /* [n_worker, 2 * cpu_attend_rows + 1, part_floats] */
    unsigned char *room;    /* [n_worker, cpu_attn_room], where there is attn_rows */
    float *part;            /* [n_slot, cpu_head_tiles, part_floats] results of the pieces, to be joined */
    int32_t n_slot;         /* (row, block) pairs that `part` has room for */
    int64_t part_floats;    /* of one row, block and head tile */
    unsigned char *sampler; /* [n_worker, sampler_bytes] */
    size_t sampler_bytes;
    atomic_int next_task;
    cpu_act act;       /* [T] rows of xn, of q, of mtp_in or of head_in, as the next linear takes them */
    cpu_act own;       /* [n_worker * R] where `gathers`: the rows of act that chose an expert */
    cpu_act mid;       /* [R] or [R*K] rows of gate, as down takes them */
    bool gathers;      /* there are experts that take rows as int8 */
    size_t act_each;   /* bytes of a number of act.q and mid.q: 0 where no linear wants them, 1 for int8, 2 for bf16, 4
                          for fp8 */
    cpu_left *left[2]; /* [n_worker]; phases take turns */

    cpu_slot slot[CPU_SLOTS]; /* step n uses slot n % CPU_SLOTS */
    ern_page_pair *pair;      /* [CPU_PAIRS_MAX] asked for since the last submit; engine thread */
    int32_t n_pair;

    ern_probe_fn *probe;
    void *probe_ud;

    pthread_t driver;
    pthread_t populator; /* finds memory for the KV cache */
    bool has_driver, has_populator;
    pthread_mutex_t lock;
    bool closing; /* from here on under the lock */
    pthread_cond_t work, done, used_more;
    size_t kv_used; /* bytes up to the last page that a step had */
    uint64_t n_submitted, n_computed, n_waited;
} cpu_backend;

enum { CPU_KV_AHEAD = 256 << 20 }; /* bytes of the KV cache beyond those in use that get their memory between steps */

/* Fill the derived numbers and check that this backend can run the model so. Errors: the first thing that does not fit.
 */
ERN_MUST_CHECK ern_status cpu_state_init(cpu_backend *b, const ern_model *m, const ern_backend_options *o,
                                         ern_err *err);
/* Cut `base` into the scratch arrays; base NULL: only count. Returns bytes. */
size_t cpu_layout(cpu_backend *b, unsigned char *base);

/* Look at the model and count; panel_out: outputs of the panels that bf16 rows may become, 0: none. false: no memory.
 */
bool cpu_weights_open(cpu_weights *k, const ern_model *model, int32_t panel_out);
/* Copy into `to` [k->bytes], by all workers of the pool; only if bytes > 0. */
void cpu_weights_fill(cpu_weights *k, const ern_model *model, unsigned char *to, ern_pool *pool);
void cpu_weights_close(cpu_weights *k);

/* Where plane `at` of a page lies: [layer, keys or values, KV head], as ern_kv_dtype draws a page. Here it is
 *
 *   [shelf, layer, KV head, page of the shelf, keys or values]
 *
 * so that what a query reads is one stream of memory, as far as its pages follow one another: there fetches keep pace
 * with the arithmetic (docs/speed.md). Shelves are short: a few pages in use are not a few cells of all the cache's
 * memory. */
static inline unsigned char *cpu_kv_plane(const cpu_backend *b, int32_t page, int32_t at) {
    const int32_t G = b->model->config.n_kv_head, layer = at / (2 * G), value = at / G % 2, g = at % G;
    const int64_t stack = ((int64_t)page / CPU_KV_SHELF * b->n_kv_layer + layer) * G + g;
    return b->kv + ((stack * CPU_KV_SHELF + page % CPU_KV_SHELF) * 2 + value) * b->plane_bytes;
}
/* Planes of a page. */
static inline int32_t cpu_kv_planes(const cpu_backend *b) { return (int32_t)(b->page_bytes / b->plane_bytes); }
/* Copy pages inside the cache, in order. */
void cpu_copy_pages(cpu_backend *b, const ern_page_pair *pair, int32_t n);

/* Most rows of one pass through a feed-forward. */
static inline int32_t cpu_ffn_rows(const cpu_backend *b) {
    return b->o.n_row_max < CPU_FFN_ROWS ? b->o.n_row_max : CPU_FFN_ROWS;
}

/* A worker's view of the running step. */
typedef struct cpu_run {
    cpu_backend *b;
    cpu_slot *s;
    cpu_rows rows;
    int worker, n_worker;
    uint32_t phase; /* phases begun; the same for every worker */
} cpu_run;

/* The whole step of a slot: prepares, runs one parallel region, leaves results in the slot. prev: the step before, NULL
 * for the first. Driver thread. */
void cpu_step(cpu_backend *b, cpu_slot *s, const cpu_slot *prev);

/* Inside the region, by every worker. */
void cpu_meet(const cpu_run *c);
void cpu_share(const cpu_run *c, int64_t n, int64_t step, int32_t *from, int32_t *to);
/* Hand a stage to the probe, if there is one. All have met before; nobody goes on before the probe has looked. */
void cpu_show(const cpu_run *c, const char *stage, int32_t layer, int32_t row, const float *data, int32_t n_row,
              int32_t n_col);

/* cpu_linear.c. A phase is work that is taken piece by piece: all begin it, all meet before the next one begins. */
void cpu_phase(cpu_run *c);
/* The next pieces from..to-1 of the phase's n; false: none left. */
bool cpu_claim(const cpu_run *c, int32_t n, int32_t *from, int32_t *to);
/* Whether a linear's outputs are given in fixed shares instead. */
static inline bool cpu_is_fixed(const ern_linear *w) { return w->order == ERN_ORDER_IN_OUT; }

/* How w takes its inputs. */
cpu_act_kind cpu_act_for(const cpu_backend *b, const ern_linear *w);
/* The rows of a from `row` on, as a job for w wants them. */
cpu_act cpu_act_at(const cpu_backend *b, cpu_act a, const ern_linear *w, int64_t row);
/* Inputs from..from+n-1 of a row of a, if w takes them quantized; from is a multiple of 128, n one or the rest. */
void cpu_act_put(const cpu_backend *b, cpu_act a, const ern_linear *w, int64_t row, int32_t from, const float *x,
                 int32_t n);
/* Rows row0..row0+n-1 of x [.., w->n_in] into b->act, if w takes them quantized; then all meet. */
void cpu_act_rows(const cpu_run *c, const ern_linear *w, const float *x, int64_t row0, int32_t n);

/* Outputs from..to-1 of a linear. */
void cpu_linear_part(const cpu_backend *b, const cpu_linear_job *j, int32_t from, int32_t to);
/* Outputs of a smallest piece. */
int32_t cpu_unit(int32_t n_row);
/* One phase: n linears of the same rows. */
void cpu_linears(cpu_run *c, const cpu_linear_job *job, int n);
/* cpu_attention.c. Cosines and sines of one row into table [2, C/2]. */
void cpu_rope_table(float *table, const float *inv_freq, int32_t pos, int32_t C);
/* Rotate the queries of this worker's rows, unless cpu_attend will. */
void cpu_rotate(const cpu_run *c);
/* Write k, rotated, and v of all rows of the step to their cells, by workers' shares; before any row leaves. */
void cpu_store_rows(const cpu_run *c, int32_t layer);
/* Head tiles of all KV heads. */
int32_t cpu_head_tiles(const ern_config *m);
/* Rows of a tile, at most. */
int32_t cpu_attend_rows(const cpu_backend *b);
/* (row, block) pairs whose results may wait to be joined. */
int32_t cpu_attend_slots(const cpu_backend *b);
/* Cut rows of n_seq sequences into tiles and pieces. */
void cpu_attend_plan(cpu_backend *b, const cpu_rows *rows, int32_t n_seq);
/* softmax(q K) V for the rows at hand, into act as o takes it (true), or over q. All have met, with next_task 0; they
 * meet after. */
bool cpu_attend(const cpu_run *c, int32_t layer, const ern_linear *o);
/* x += feed-forward(xn) for the rows at hand; all workers have met before and meet at the end. */
void cpu_ffn(cpu_run *c, const ern_layer *w, int32_t layer);

#endif
