/* The kernels of the cpu backend: one table per processor level, every entry a pure leaf.
 *
 * The promise of each kernel (house.md 3): the result of one row depends on that row's own numbers and on the shapes,
 * never on how many rows share the call, which rows they are, or where a worker's share of outputs begins. So:
 *   - the order of a sum over K is a function of K alone; rows and outputs are tiled freely, K never is;
 *   - softmax runs over blocks of CPU_ATTN_BLOCK positions counted from position 0. CPU_ATTN_CHAIN blocks, counted from
 *     the first, are joined one by one to a chain; then the chains are;
 *   - a row alone and a row in a tile go through the same instructions.
 * Two levels need not agree with each other in the last bit.
 * Owner: static tables. Thread: any worker, distinct outputs. */
#ifndef ERN_BACKEND_CPU_CPU_KERNELS_H
#define ERN_BACKEND_CPU_CPU_KERNELS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/half.h"
#include "base/os.h"
#include "model/model.h"
#include "model/quant.h"

enum {
    CPU_ATTN_BLOCK = 256, /* positions of one softmax block */
    CPU_ATTN_CHAIN = 4,   /* blocks of a chain */
    CPU_HEAD_TILE = 8,    /* query heads that share one pass over the keys of their KV head */
    CPU_ATTN_ROWS = 64,   /* most rows of one attn_rows */
    CPU_HEAD_DIM_MAX = 256,
    CPU_LINE = 32,     /* bf16 numbers of a cache line */
    CPU_KV_SHELF = 8,  /* pages whose keys and values of one layer and head lie side by side */
    CPU_KV_GROUP = 16, /* cells of a page that are found and scored together: ERN_KV_GROUP of backend.h */
};

/* Rows of activations as weights meet them (quant.h has the law of the quantized ones), for a linear of n_in inputs:
 *   BF16   q bf16 [rows, cpu_act_stride], rounded to nearest, zeros beyond n_in to a multiple of 64
 *   INT8   q int8 [rows, cpu_act_stride], zeros beyond n_in; sum [rows, groups] of the q of a group: codes are stored
 *          as unsigned q + 128 or q + 8, and what that adds to a product of the group is 128 or 8 times its sum
 *   FP8    q float [rows, cpu_act_stride], the e4m3 numbers written out in f32; sum is not used
 * scale [rows, groups]. Aligned to 64. */
typedef enum cpu_act_kind { CPU_ACT_F32, CPU_ACT_BF16, CPU_ACT_INT8, CPU_ACT_FP8 } cpu_act_kind;
typedef struct cpu_act {
    void *q;
    float *scale;
    int32_t *sum;
} cpu_act;

/* One linear layer over some rows and some outputs:
 *   y[y_row[r]][o] = sum_i w[o][i] * x[x_row[r]][i]            add == false
 *   y[y_row[r]][o] += scale[r] * (that sum)                    add == true
 * for r in 0..n_row-1 and o in from..to-1. TILED weights: from is a multiple of 16, to is one or n_out; panels: of
 * their outputs. */
typedef struct cpu_linear_job {
    const ern_linear *w;
    const float *x;
    int64_t x_stride;     /* floats between rows of x */
    cpu_act act;          /* the rows of x, quantized; x is not read by kernels that take them so */
    const int32_t *x_row; /* [n_row], NULL: r itself. Rows of x or act */
    float *y;             /* column 0 is output 0 */
    int64_t y_stride;
    const int32_t *y_row; /* [n_row], NULL: r itself */
    const float *scale;   /* [n_row], NULL: 1; only with add */
    bool add;
    int32_t n_row, from, to;
} cpu_linear_job;

/* Keys and values of one KV head in one layer, as the pages hold them (backend.h draws a plane). The plane of page p
 * begins p * page_stride + p / CPU_KV_SHELF * shelf_gap bytes behind k or v. */
typedef struct cpu_kv_view {
    const unsigned char *k, *v;
    const int32_t *page;
    int64_t page_stride, shelf_gap; /* bytes */
    int32_t n_cell;                 /* P, whole groups */
    bool int8;                      /* codes and scales, else bf16 */
} cpu_kv_view;

/* 16 positions of a block, from a multiple of 16 on: a group of cells, as backend.h draws it. bf16: k [C/2, 16, 2], v
 * [8, C, 2]; codes: k [C, 16], v [16, C], scales [16], else NULL. Positions past the block's end may hold anything
 * there; they may be read, and change nothing. */
typedef struct cpu_kv_group {
    const unsigned char *k, *v;
    const float *k_scale, *v_scale;
} cpu_kv_group;

/* One softmax block, found in the pages: group i has positions 16 i.. of it. */
typedef struct cpu_kv_block {
    const struct cpu_kv_block *next; /* which will be wanted next, or NULL */
    bool cold;                       /* no block before it has fetched it */
    int32_t n_group;
    cpu_kv_group group[CPU_ATTN_BLOCK / CPU_KV_GROUP];
} cpu_kv_block;

/* What one softmax block leaves for up to CPU_HEAD_TILE heads, scores in units of log2:
 *   [CPU_HEAD_TILE] largest score; [CPU_HEAD_TILE] sum of 2^(score - largest); [CPU_HEAD_TILE, C] sum of that * value
 */
static inline int64_t cpu_part_floats(int32_t head_dim) { return CPU_HEAD_TILE * (2 + (int64_t)head_dim); }

/* One softmax block for n_row <= CPU_ATTN_ROWS rows of one sequence, positions ascending, gaps allowed: row i has the
 * queries q[i] [n_head, C], sees n[i] > 0 positions of the block, and leaves its result in part[i], joined with what is
 * there already where `join` says so. room: what the call works with, [cpu_attn_room]; `first`: the queries are not in
 * it yet from a call for the same rows. */
typedef struct cpu_attn_job {
    float *const *part;
    const float *const *q;
    const int32_t *n;
    int32_t n_row, n_head, head_dim;
    float scale;
    const cpu_kv_block *kv;
    void *room;
    bool first, join;
} cpu_attn_job;

/* One quantized linear: y = act * codes * scales. int8 activations: the sum over a group of 128 inputs is an exact
 * integer; groups are added in f32 in ascending order, then the output's scale. fp8: the group's sum is f32, inputs
 * ascending, and carries both scales. */
typedef void cpu_linear_fn(const cpu_linear_job *j);

typedef struct cpu_kernels {
    ern_cpu_level level;
    const char *name; /* for people */

    /* Linear layers with bf16 weights, by ern_order: on bf16 activations where `linear_rounds` says so, else on f32
     * ones (x); and on f32 ones always. Shapes: above; any n_out, n_in, stride >= the row; linear_bf16 reads OUT_IN
     * also in panels of panel_out outputs, 0: it does not. */
    cpu_linear_fn *linear_bf16[2], *exact_bf16[2];
    bool linear_rounds;
    int32_t panel_out;
    /* TILED weights on quantized activations: I8 and I4 on int8, F8E4M3 on fp8; and on f32 ones as they are (x). */
    cpu_linear_fn *linear_i8, *linear_i4, *linear_f8, *exact_i8, *exact_i4, *exact_f8;
    /* n inputs from a multiple of 128 on: rounded to nearest; the law of quant.h, by the bit. The row's q is filled
     * with zeros to a multiple of 64. Where: the pieces that begin with the first of these inputs. */
    void (*round_bf16)(ern_bf16 *q, const float *x, int32_t n); /* NULL without linear_rounds */
    void (*quant_int8)(int8_t *q, float *scale, int32_t *sum, const float *x, int32_t n);
    void (*quant_fp8)(float *q, float *scale, const float *x, int32_t n);
    /* y[n_out] = w x with f32 weights [n_out, n_in]: the router. */
    void (*linear_f32)(float *y, const float *x, const float *w, int32_t n_out, int32_t n_in);
    /* y[n] = x * w / sqrt(mean(x^2) + eps). y may be x. */
    void (*norm)(float *y, const float *x, const ern_bf16 *w, int32_t n, float eps);
    /* gate[n] = silu(gate) * up. */
    void (*silu_mul)(float *gate, const float *up, int32_t n);
    /* A whole group of silu(gate) * up as quant_int8 has it; NULL: by these two. */
    void (*silu_int8)(int8_t *q, float *scale, int32_t *sum, const float *gate, const float *up);
    /* Rotate the pairs (2i, 2i+1) of n_head heads x [n_head, C] in place; table [2, C/2]: cosines, sines. C is even.
     * Two products and a sum each, so all levels have the same bits. */
    void (*rope)(float *x, const float *table, int32_t n_head, int32_t head_dim);
    /* x[n] = exp(x - max(x)) / sum. n >= 1. */
    void (*softmax)(float *x, int32_t n);
    /* One row, n_head <= CPU_HEAD_TILE query heads of one KV head, the first n positions of a block, by dtype (bf16,
     * int8). scale: of the scores, log2(e) included. Shapes: part [cpu_part_floats(C)]; q [n_head, C], C even and <=
     * CPU_HEAD_DIM_MAX; n at most the positions that kv was found for. What positions n and later hold changes nothing.
     */
    void (*attn_block[2])(float *part, const float *q, int32_t n_head, int32_t head_dim, float scale,
                          const cpu_kv_block *kv, int32_t n);
    /* With bf16 KV the queries and the weights of positions are rounded to bf16, once each. */
    bool attn_rounds;
    /* With int8 KV a query is rounded to multiples of 1/16256 of its largest number, and a weight times its value's
     * scale to multiples of 1/65535 of the block's largest. */
    bool attn_fixed;
    /* attn_block of bf16 KV for several rows, with the bits that each has alone; NULL: none. */
    void (*attn_rows)(const cpu_attn_job *j);
    /* acc = acc joined with part (the block, or the chain, after it). */
    void (*attn_join)(float *acc, const float *part, int32_t n_head, int32_t head_dim);
    /* out [n_head, C] = what acc holds of values, each times 1 / its head's sum, which is rounded: all levels have the
     * same bits. */
    void (*attn_divide)(float *out, const float *acc, int32_t n_head, int32_t head_dim);
} cpu_kernels;

extern const cpu_kernels cpu_kernels_portable, cpu_kernels_avx2;
extern const cpu_kernels cpu_kernels_avx512; /* without VNNI: integer sums as AVX2 has them */
extern const cpu_kernels cpu_kernels_vnni, cpu_kernels_amx;
extern const cpu_kernels cpu_kernels_bf16; /* VNNI, and bf16 KV by vdpbf16ps */

/* The best table that a machine of this level can run. */
const cpu_kernels *cpu_kernels_for(ern_cpu_level level);
/* All tables that this machine can run. Returns how many; at most CPU_TABLES. */
enum { CPU_TABLES = 6 };
int cpu_kernels_here(const cpu_kernels *out[CPU_TABLES]);

/* What a linear is computed by; NULL: this table cannot. */
static inline cpu_linear_fn *cpu_linear_of(const cpu_kernels *k, const ern_linear *w, bool act_exact) {
    switch (w->dtype) {
    case ERN_DTYPE_BF16: return act_exact ? k->exact_bf16[w->order] : k->linear_bf16[w->order];
    case ERN_DTYPE_I8: return act_exact ? k->exact_i8 : k->linear_i8;
    case ERN_DTYPE_I4: return act_exact ? k->exact_i4 : k->linear_i4;
    case ERN_DTYPE_F8E4M3: return act_exact ? k->exact_f8 : k->linear_f8;
    case ERN_DTYPE_F32: break;
    }
    return NULL;
}
static inline cpu_act_kind cpu_act_of(const cpu_kernels *k, const ern_linear *w, bool act_exact) {
    if (act_exact) return CPU_ACT_F32;
    if (w->order != ERN_ORDER_TILED) return k->linear_rounds ? CPU_ACT_BF16 : CPU_ACT_F32;
    return w->dtype == ERN_DTYPE_F8E4M3 ? CPU_ACT_FP8 : CPU_ACT_INT8;
}

/* ---- tiles ------------------------------------------------------------------------------------------------------- */

static inline int32_t cpu_tiles(int32_t n_in) { return (n_in + ERN_TILE_IN - 1) / ERN_TILE_IN; }
static inline int32_t cpu_groups(int32_t n_in) { return (n_in + ERN_ACT_GROUP - 1) / ERN_ACT_GROUP; }
/* Numbers of a row of cpu_act.q, zeros beyond n_in. */
static inline int32_t cpu_act_width(int32_t n_in) { return cpu_tiles(n_in) * ERN_TILE_IN; }
/* Numbers between rows of cpu_act.q: a cache line or more beyond a row, or the rows of a tile would meet in few sets of
 * the cache. */
static inline int64_t cpu_act_stride(int32_t n_in) { return cpu_act_width(n_in) + ERN_TILE_IN; }
static inline size_t cpu_tile_bytes(ern_dtype t) {
    return t == ERN_DTYPE_I4 ? ERN_TILE_OUT * ERN_TILE_IN / 2 : ERN_TILE_OUT * ERN_TILE_IN;
}
/* The tiles of 16 outputs. */
static inline size_t cpu_band_bytes(const ern_linear *w) {
    return (size_t)cpu_tiles(w->n_in) * cpu_tile_bytes(w->dtype);
}
static inline const uint8_t *cpu_band(const ern_linear *w, int32_t band) {
    return (const uint8_t *)w->data + (size_t)band * cpu_band_bytes(w);
}

/* ---- panels ------------------------------------------------------------------------------------------------------ */

/* bf16 weights copied into the order in which few rows read them, so that a panel, and the panels after it, are one
 * stream; zeros beyond the last output or input. Marked by stride 0. The order of sums is that of OUT_IN rows, so the
 * bits are the same.
 *
 * CPU_PANEL_LINES: the lines of 4 outputs take turns along the inputs. In a line inputs i and i+16 are neighbours, the
 * halves of a 32-bit lane: a shift makes 16 inputs f32, a mask the other 16.
 *
 *   o0 [inputs 0..31] o1 [0..31] o2 [0..31] o3 [0..31]  o0 [32..63] o1 ...
 *
 * CPU_PANEL_TILES: two tiles of 16 outputs take turns along the inputs, each as the second factor of a product of
 * tiles: 16 lines, line p inputs 2p and 2p+1 of each output.
 *
 *   inputs 0 1 of o0, of o1 .. o15   2 3 of o0 ..   ..   30 31 of .. o15   0 1 of o16 ..   ..   32 33 of o0 .. */
enum { CPU_PANEL_LINES = 4, CPU_PANEL_TILES = 32 };
static inline bool cpu_is_panels(const ern_linear *w) { return w->dtype == ERN_DTYPE_BF16 && w->stride == 0; }
/* Numbers of one panel of `outs` outputs. */
static inline int64_t cpu_panel_numbers(int32_t outs, int32_t n_in) {
    return ((int64_t)n_in + CPU_LINE - 1) / CPU_LINE * CPU_LINE * outs;
}
static inline int32_t cpu_panels(int32_t outs, int32_t n_out) { return (n_out + outs - 1) / outs; }
/* Copy panels from..to-1 of w, in rows, to where panel 0 begins at `panel`. */
void cpu_panels_fill(ern_bf16 *panel, int32_t outs, const ern_linear *w, int32_t from, int32_t to);

/* Bytes of cpu_attn_job.room. */
size_t cpu_attn_room(void);

/* Bytes of one plane: the keys or values of one head in one page of n_cell cells, which are whole groups. */
static inline int64_t cpu_kv_plane_bytes(int32_t n_cell, int32_t head_dim, bool int8) {
    return n_cell * (int8 ? head_dim + (int64_t)sizeof(float) : 2 * (int64_t)head_dim);
}
/* Groups of n positions. */
static inline int32_t cpu_kv_groups(int32_t n) { return (n + CPU_KV_GROUP - 1) / CPU_KV_GROUP; }
/* Find positions pos0..pos0+n-1; pos0 a multiple of 16, n <= CPU_ATTN_BLOCK. */
static inline void cpu_kv_find(cpu_kv_block *out, const cpu_kv_view *kv, int32_t head_dim, int32_t pos0, int32_t n) {
    const int64_t each = kv->int8 ? 1 : 2, scales = (int64_t)kv->n_cell * head_dim;
    out->next = NULL;
    out->cold = true;
    out->n_group = cpu_kv_groups(n);
    for (int32_t i = 0; i < out->n_group; i++) {
        const int32_t pos = pos0 + i * CPU_KV_GROUP, page = kv->page[pos / kv->n_cell], cell = pos % kv->n_cell;
        const int64_t plane = page * kv->page_stride + page / CPU_KV_SHELF * kv->shelf_gap;
        const unsigned char *k = kv->k + plane, *v = kv->v + plane;
        out->group[i] = (cpu_kv_group){
            .k = k + cell * (int64_t)head_dim * each,
            .v = v + cell * (int64_t)head_dim * each,
            .k_scale = kv->int8 ? (const float *)(const void *)(k + scales) + cell : NULL,
            .v_scale = kv->int8 ? (const float *)(const void *)(v + scales) + cell : NULL,
        };
    }
}
static inline const float *cpu_job_x(const cpu_linear_job *j, int32_t r) {
    return j->x + (j->x_row ? j->x_row[r] : r) * j->x_stride;
}
/* Where row r of the job lies in act. */
static inline int64_t cpu_job_act(const cpu_linear_job *j, int32_t r) { return j->x_row ? j->x_row[r] : r; }
static inline float *cpu_job_y(const cpu_linear_job *j, int32_t r) {
    return j->y + (j->y_row ? j->y_row[r] : r) * j->y_stride;
}

#endif
