/* clang-format off */
/* The private kernels of the cuda backend, as its host code calls them: one function a launch (or a few), all on a
 * given stream, none waits, none takes memory. Compiled by nvcc (*.cu), called from C.
 *
 * Rules that keep the bits of a row free of its neighbours (house.md 3):
 *   linear     inputs are added up in segments of CU_SEGMENT = 128: each from zero by a chain of eight m16n8k16 products
 *              in bf16 with f32 sums (weights are the A operand, 16 outputs; rows of x the B operand, 8 rows), then
 *              total = segment + total (fp8: total = fma(scale, segment, total)), first segment first. int8 and int4
 *              codes go in as exact bf16 and total * scale of the output comes last. Rows of 8 bits (CU_F8A8, CU_I8A8,
 *              CU_I4A8): a segment is a chain of four products of 32 inputs by wgmma from zero. fp8 by fp8:
 *              total = fma(scale of x * scale of the weight, segment, total); integers, whose segments are exact:
 *              total = fma(scale of x, (float)segment, total), and total * scale of the output comes last. Any number
 *              of rows, any kernel.
 *   attention  keys in tiles of CU_KEYS = 128 at absolute positions; each tile has a softmax of its own (its own
 *              maximum over the keys that the row sees, weights rounded to bf16, their sum by the same products with a
 *              column of ones), and tiles are joined one after the other, first tile first (cu_attn.cuh draws it).
 *   norm       one warp a row, lane l adds x[l*4..] + 128 k in order, then a fixed tree (cu_sum_squares in cu_device.cuh).
 *   experts    chosen by rank; shares and sums in rank order.
 *
 * Activations between kernels: residual stream f32 [T, D]; inputs of linears bf16, their rows CU_PAD(n) apart, where
 * what lies beyond n is zero: set once at open and never written (kernels write exactly n numbers of a row).
 * T rows, S sequences, W wanted rows; letters as in model.h. All pointers are device memory unless said otherwise.
 * Errors: what the launch reported, as cudaError_t; 0 is good. */
/* clang-format on */
#ifndef ERN_BACKEND_CUDA_CU_KERNELS_H
#define ERN_BACKEND_CUDA_CU_KERNELS_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

#include "backend/backend.h"

/* 1: this is compiled for every GPU from compute capability 8.0 on (cuda.cmake, portable/); 0: for 9.0 alone. */
#ifndef CU_PORTABLE
#define CU_PORTABLE 0
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
    CU_SEGMENT = 128,
    CU_KEYS = 128,
    CU_BAND = 16,     /* outputs of a band of packed weights */
    CU_SKINNY_MAX = 8 /* most rows of the kernels that stream weights past few rows */
};
#define CU_PAD(n) (((n) + CU_SEGMENT - 1) / CU_SEGMENT * CU_SEGMENT)
#define CU_BANDS(n) (((n) + CU_BAND - 1) / CU_BAND)

typedef uint16_t cu_bf16; /* bits */

/* ---- packed weights (cu_pack.cu) ---------------------------------------------------------------------------------
 *
 * A band is 16 outputs; a group is 64 inputs. Groups of a band lie side by side along K, bands one after the other. In
 * a group every lane of a warp owns the codes it feeds to the A operand of four m16n8k16 products, s = 0..3; product s
 * takes inputs 16 s .. 16 s + 15 as they come, so that x is read as it lies: by ldmatrix, or by wgmma through a
 * descriptor. Lane 4 g + c (g 0..7, c 0..3) owns, of outputs g and g + 8, inputs i_j = 16 s + 2 c + {0, 1, 8, 9}. In
 * order, for each s:
 *   (g, i_0) (g, i_1) (g+8, i_0) (g+8, i_1) (g, i_2) (g, i_3) (g+8, i_2) (g+8, i_3)       = registers a0 a1 a2 a3
 * BF16:       2048 bytes a group: [s][lane][8] bf16
 * I8, F8E4M3: 1024 bytes: [s/2][lane][s%2][8 bytes]; each 8 bytes hold the eight codes in the order
 *             e0 e2 e1 e3 | e4 e6 e5 e7, so that bits 0..7 and 16..23 of a word are one pair, 8..15 and 24..31 the next
 *             I8: two's complement. F8: the e4m3 byte.
 * I4:         512 bytes: [lane][s][4 bytes]; nibble k of the word of product s (bit 4k) holds q + 8 of code
 *             e0 e2 e4 e6 e1 e3 e5 e7 for k = 0..7, so that (word >> 4k) & 0x000f000f is the pair (e_2k, e_2k+1).
 * Inputs beyond n_in (up to CU_PAD) and outputs beyond n_out are zero codes. A group starts at a multiple of 512 bytes.
 *
 * Weights that meet rows of 8 bits (A8) lie in blocks of 8 bands by one segment, so that a tile's codes of a segment
 * are one copy: [ceil(n_band / 8)][n_seg][8 bands][segment of a band]. What is stored for bands beyond n_band is open.
 * Products are m64nNk32. With weights as the A operand four bands that follow one another are 64 outputs; lane 4 g + c
 * owns, of product t (inputs 32 t .. 32 t + 31 of the segment), in registers a0 a1 a2 a3, outputs g, g + 8, g, g + 8 of
 * inputs 32 t + 4 c + {0, 1, 2, 3} (the first two) and 16 more (the last two), a byte each.
 * F8A8, I8A8: 2048 bytes a segment of a band: [16 outputs][128 inputs], the e4m3 byte, or two's complement. Piece p of
 *             16 inputs of output r sits at p ^ (r & 7), the 128-byte swizzle: eight bands at a multiple of 1024 bytes
 *             of shared memory are a B operand of 128 outputs; as the A operand ldmatrix reads them.
 * I4A8:       512 bytes a group: [lane][4 words]; word k holds register a_k of the group's first product in the high
 *             nibbles of its bytes and that of its second in the low ones, two's complement: word & 0xf0f0f0f0 and
 *             word << 4 & 0xf0f0f0f0 are the registers, times 16.
 *
 * scale: I8, I4 f32 [16 * n_band] per output; F8 f32 [n_band, n_seg] per band and segment (a band of 16 lies in one
 * block of 128 outputs); F8A8 the same in the order of its codes, [ceil(n_band / 8)][n_seg][8]; I8A8 f32 [16 * n_band]
 * per output; I4A8 that / 16; BF16 NULL. */
typedef enum cu_format { CU_BF16, CU_I8, CU_I4, CU_F8, CU_F8A8, CU_I8A8, CU_I4A8 } cu_format;
enum {
    CU_FORMATS = 7,
    CU_PLAIN_FORMATS = 4, /* the first: rows of x are bf16, and codes become it */
    CU_A8_BANDS = 8,      /* of a block of A8 weights */
    CU_A8_INPUTS = 12288  /* most inputs of an A8 linear */
};
/* What rows of 8 bits are made of. */
typedef enum cu_codes { CU_CODES_NONE, CU_CODES_F8, CU_CODES_I8 } cu_codes;
/* The rows that weights of this format meet; NONE: bf16. */
static inline cu_codes cu_codes_of(cu_format f) {
    return f == CU_F8A8 ? CU_CODES_F8 : f == CU_I8A8 || f == CU_I4A8 ? CU_CODES_I8 : CU_CODES_NONE;
}

typedef struct cu_linear {
    const void *pack;
    const float *scale;
    cu_format format;
    int32_t n_out, n_in; /* as the model has them; of pairs: n_out is that of gate alone */
    int32_t n_band;      /* bands stored: CU_BANDS(n_out), twice that for pairs */
    int32_t n_seg;       /* CU_PAD(n_in) / CU_SEGMENT */
    bool pairs;          /* bands alternate: gate, up, gate, up ... of the same outputs */
} cu_linear;

/* Bytes of a group. */
static inline int64_t cu_group_bytes(cu_format f) {
    return f == CU_BF16 ? 2048 : f == CU_I4 || f == CU_I4A8 ? 512 : 1024;
}
/* Bands there is room for: of A8 whole blocks. */
static inline int64_t cu_band_room(const cu_linear *w) {
    return cu_codes_of(w->format) == CU_CODES_NONE ? w->n_band
                                                   : (int64_t)(w->n_band + CU_A8_BANDS - 1) / CU_A8_BANDS * CU_A8_BANDS;
}
static inline int64_t cu_pack_bytes(const cu_linear *w) {
    return cu_band_room(w) * w->n_seg * 2 * cu_group_bytes(w->format);
}
static inline int64_t cu_scale_count(const cu_linear *w) {
    return w->format == CU_BF16                         ? 0
           : w->format == CU_F8 || w->format == CU_F8A8 ? cu_band_room(w) * w->n_seg
                                                        : cu_band_room(w) * CU_BAND;
}

/* Pack outputs of one stored linear: its band i goes to band first_band + i * band_step of dst. raw: device copy of
 * the stored bytes, laid out as `src` says (BF16 of either order with its stride from raw on; I8/I4/F8E4M3 tiles of
 * quant.h); raw_scale: device copy of its scales (src->scale's bytes) or NULL. src->data and src->scale are not read.
 * dst->pack and dst->scale are written (both were allocated by the caller, pack zeroed or not: all of it is written for
 * the bands that this call covers). */
cudaError_t cu_pack(cudaStream_t s, const cu_linear *dst, const ern_linear *src, const void *raw, const void *raw_scale,
                    int32_t first_band, int32_t band_step);

/* ---- linears (cu_skinny.cu, cu_tall.cu, cu_mid.cu, cu_broad.cu, cu_large.cu; cu_a8_*.cu) ------------------------- */

typedef enum cu_epilogue {
    CU_STORE,  /* y f32 [row, n_out], ldy numbers apart: = */
    CU_ADD,    /* the same: += (one addition a number) */
    CU_SWIGLU, /* of pairs: h bf16 [row, n_out], ldh (even) apart: = bf16(silu(gate) * up), in f32 with
                * silu(z) = z / (1 + expf(-z)) */
} cu_epilogue;

/* Rows of 8 bits, quantized as quant_act_fp8 or quant_act_int8 (docs/model.md 9.2) do with the bf16 numbers of the row:
 * code [n_row, CU_PAD(n_in)], ldx bytes apart (a multiple of 128), what lies beyond n_in zero; scale f32: that of
 * segment s of row r is scale[s * ld_scale + r], ld_scale a multiple of 4. */
typedef struct cu_x8 {
    uint8_t *code;
    int64_t ldx;
    float *scale;
    int64_t ld_scale;
} cu_x8;
/* out = x, quantized: rows of x bf16 [n_row, CU_PAD(n_in)], ldx apart. */
cudaError_t cu_quant_x8(cudaStream_t s, const cu_x8 *out, cu_codes codes, const cu_bf16 *x, int64_t ldx, int32_t n_row,
                        int32_t n_in);

/* One linear of n_row rows. x bf16 [n_row, CU_PAD(n_in)], ldx apart. Rows of y/h beyond n_row are not touched. */
typedef struct cu_job {
    cu_linear w;
    cu_epilogue epilogue;
    const cu_bf16 *x;
    int64_t ldx;
    int32_t n_row;
    float *y;
    int64_t ldy;
    cu_bf16 *h;
    int64_t ldh;
    /* x comes from the residual stream instead: norm of x_f32 [n_row, n_in] (D apart) with norm_w, as cu_norm has it.
     * Only where n_row <= 8; NULL: x is used. */
    const float *x_f32;
    const cu_bf16 *norm_w;
    float eps;
    cu_x8 x8;   /* A8 of more than CU_SKINNY_MAX rows: instead of x. Fewer rows: quantized from x or x_f32 inside */
    bool alone; /* comes after something else than a kernel of its stream: is not launched before that ends */
    /* STORE, y [n_row, n_out] without gaps: y is qkv, and cu_rope_store comes of it; y itself is left open. */
    const struct cu_rope *rope;
} cu_job;

/* Picks the kernel by n_row: the bits do not depend on the choice. */
cudaError_t cu_linear_run(cudaStream_t s, const cu_job *j);
/* The four behind it: rows 1..CU_SKINNY_MAX; the others any number of rows, broad no pairs. For tests and tuning. */
cudaError_t cu_skinny_run(cudaStream_t s, const cu_job *j);
cudaError_t cu_mid_run(cudaStream_t s, const cu_job *j);
cudaError_t cu_broad_run(cudaStream_t s, const cu_job *j);
cudaError_t cu_large_run(cudaStream_t s, const cu_job *j); /* rope: only where cu_rope_fits */

/* ---- experts (cu_moe.cu; grouped linears where the plain ones are) -------------------------------------------------
 *
 * An entry is a (row, rank) pair: n_row * K of them, entry e = row * K + rank. cu_route sorts them by expert: place p
 * holds entry place_entry[p]; expert i has places first[i] .. first[i+1]-1. */
typedef struct cu_routes {
    int32_t n_expert, n_used; /* E (at most 512), K (at most 16) */
    int32_t *chosen;          /* [T*K] expert of an entry, by rank */
    float *share;             /* [T*K] prob / max(sum of the chosen probs, norm_min) */
    int32_t *first;           /* [E+1] */
    int32_t *place_entry;     /* [T*K] */
    int32_t *entry_place;     /* [T*K] */
    /* Work lists: tiles of at most CU_TILE_ROWS[k] places of one expert, in any order. n_tile is one number in device
     * memory. Large enough for E + T*K / rows entries. */
    int32_t *tile_expert, *tile_place; /* [n_tile] expert and first place */
    int32_t *n_tile;                   /* [1] */
    int32_t tile_rows;                 /* places of a tile: 8, 16, 32, 64 or 128; chosen by cu_tile_rows(T, K, E) */
    float *logit;                      /* [T, E] router logits (kept for the probe) */
    int32_t *scratch;                  /* [E * 2 + 2], zeros at first; what has to be is left so */
    /* [K], zeros at first, or NULL. Where cu_route_few_tells, of one row: the expert of each place, + 1, as soon as it
     * is chosen (tile_place is the place then): up need not wait for all else of the router, and down leaves zeros.
     * NULL where up and down are not both A8. */
    int32_t *told;
} cu_routes;
/* Depends on the step's size only for speed. */
static inline int32_t cu_tile_rows(int32_t n_row, int32_t n_used, int32_t n_expert) {
    int64_t mean = ((int64_t)n_row * n_used + n_expert - 1) / n_expert;
    return mean <= 2 ? 8 : mean <= 10 ? 16 : mean <= 26 ? 32 : mean <= 96 ? 64 : 128;
}
static inline int64_t cu_tiles_max(int32_t n_row, int32_t n_used, int32_t n_expert) {
    int64_t n = (int64_t)n_row * n_used, rows = cu_tile_rows(n_row, n_used, n_expert);
    int64_t full = n / rows + n_expert;
    return full < n ? full : n;
}

/* logit = router * norm(x), f32 throughout (the normed row is not rounded to bf16): one dot product in a fixed tree;
 * softmax; the K best of prob + bias, ties to the lower id; shares; then the sort. x f32 [T, D]. router f32 [E, D],
 * bias f32 [E] or NULL. Fills all of r. Source: docs/model.md 3.6. */
typedef struct cu_route_job {
    const float *x;
    const cu_bf16 *norm_w;
    float eps, norm_min;
    const float *router, *bias;
    int32_t n_row, n_hidden;
    bool beside; /* a launch on another stream begins beside this one: what is behind this one leaves it its places */
} cu_route_job;
cudaError_t cu_route(cudaStream_t s, const cu_route_job *j, const cu_routes *r);

/* cu_norm, cu_quant_x8 and cu_route of at most CU_ROUTE_FEW_MAX rows, in one launch. codes CU_CODES_NONE: no codes, and
 * out may be NULL; so may xn. Rows that are too long for shared memory (22,000 and more) do not fit. */
enum { CU_ROUTE_FEW_MAX = 128 };
bool cu_route_few_fits(int32_t n_hidden, int32_t n_expert);
bool cu_route_few_tells(const cu_route_job *j, const cu_routes *r);
cudaError_t cu_route_few(cudaStream_t s, const cu_route_job *j, const cu_routes *r, const cu_x8 *out, cu_codes codes,
                         cu_bf16 *xn);

/* The linears of all experts on their entries. experts: device array [E] of cu_linear of one shape and format,
 * described by `shape` (its pack and scale are not used). up    (pairs)  x row = place_entry[p] / K of x [T,
 * CU_PAD(D)]; h[p] = swiglu, bf16 [T*K, CU_PAD(F)] by place down           x row = p of h; y[p] f32 [T*K, D] by place
 * Grids cover cu_tiles_max(n_row, ...); blocks beyond *n_tile end at once. */
typedef struct cu_grouped_job {
    cu_linear shape;
    const cu_linear *experts;
    const cu_routes *routes;
    int32_t n_row; /* T */
    bool gather;   /* up: true */
    cu_epilogue epilogue;
    const cu_bf16 *x;
    int64_t ldx;
    cu_bf16 *by_place; /* with gather: room for x by place, [T*K, ldx] */
    bool spread;       /* by_place, or the codes of x8_by_place, hold it already; of tile_rows 128 only */
    /* A8, any number of rows: instead of x and by_place. Of down, rows by place, made from h by cu_quant_x8; where
     * tile_rows is 8 and x8.code is NULL they are quantized inside, from x by place. */
    cu_x8 x8, x8_by_place;
    bool behind_up; /* down: the launch in front is up's of the same format and routes, or cu_quant_x8 behind that */
    float *y;
    int64_t ldy;
    cu_bf16 *h;
    int64_t ldh;
} cu_grouped_job;
cudaError_t cu_grouped_run(cudaStream_t s, const cu_grouped_job *j);
cudaError_t cu_skinny_grouped(cudaStream_t s, const cu_grouped_job *j); /* tile_rows 8..64 */
cudaError_t cu_mid_grouped(cudaStream_t s, const cu_grouped_job *j);    /* tile_rows 16, 32, 64 */
cudaError_t cu_large_grouped(cudaStream_t s, const cu_grouped_job *j);  /* tile_rows 128 */

/* The same for A8, which cu_linear_run and cu_grouped_run turn to. */
cudaError_t cu_a8_skinny_run(cudaStream_t s, const cu_job *j);            /* rows 1..CU_SKINNY_MAX, x or x_f32 */
cudaError_t cu_a8_mid_run(cudaStream_t s, const cu_job *j);               /* x8, any number of rows */
cudaError_t cu_a8_large_run(cudaStream_t s, const cu_job *j);             /* the same; rope: only where cu_rope_fits */
cudaError_t cu_a8_mid_grouped(cudaStream_t s, const cu_grouped_job *j);   /* tile_rows 8..64 */
cudaError_t cu_a8_large_grouped(cudaStream_t s, const cu_grouped_job *j); /* tile_rows 128 */

/* What becomes of the norm of rows [n, D] of x, which is that of cu_norm: xn bf16 [n, CU_PAD(D)] (NULL: nothing), and
 * the codes of these numbers as cu_quant_x8 makes them. NULL only where cu_norm_holds(D). */
typedef struct cu_norm_job {
    const cu_bf16 *w;
    float eps;
    cu_bf16 *xn;
    cu_codes codes; /* NONE: no codes */
    cu_x8 x8;
    /* Where not NULL, the same rows by place [n*K, CU_PAD(D)], the row of entry e / K at routes->entry_place[e]: codes,
     * or bf16 where there are none. Only where cu_norm_spreads(D). */
    void *by_place;
    const cu_routes *routes;
} cu_norm_job;
static inline bool cu_norm_holds(int32_t n_hidden) { return n_hidden % 4 == 0 && n_hidden <= 2560; }
static inline bool cu_norm_spreads(int32_t n_hidden) { return n_hidden % CU_SEGMENT == 0 && n_hidden <= 2560; }

/* y = sum over ranks, in order, of share * expert_y[entry_place]; out = y (for the probe, may be NULL) ; x = x + (y +
 * shared), in f32. shared f32 [T, D] or NULL. norm: of the new x [n_row], not by place; NULL: none. */
cudaError_t cu_combine(cudaStream_t s, float *x, float *out, const float *expert_y, const float *shared,
                       const cu_routes *r, int32_t n_row, int32_t n_hidden, const cu_norm_job *norm);

/* All of a layer's experts for few rows at once: cu_norm, cu_route, the linears of the shared experts and of the chosen
 * ones, cu_combine; x = x + experts + shared, with the same bits. One launch, of as many blocks as multiprocessors,
 * which wait for one another: nothing else may hold a multiprocessor until they have all begun. */
typedef struct cu_few_job {
    cu_route_job route;
    int32_t n_expert, n_used;
    float *x;                                   /* = route.x */
    cu_linear shared_up, shared_down;           /* n_out 0: none */
    cu_linear up, down;                         /* of any expert */
    const cu_linear *experts_up, *experts_down; /* device arrays [E] */
    cu_bf16 *shared_hid, *expert_hid;           /* [T, CU_PAD(F')], [T*K, CU_PAD(F)] */
    float *shared_y, *expert_y;                 /* [T, D], [T*K, D] */
    int32_t *count;                             /* [CU_FEW_COUNTS], zero at first; the kernel leaves zeros */
} cu_few_job;
enum { CU_FEW_COUNTS = 320 };
/* Whether shapes, rows and this device allow it. */
bool cu_moe_few_fits(const cu_few_job *j);
cudaError_t cu_moe_few(cudaStream_t s, const cu_few_job *j);

/* ---- rows (cu_rows.cu) ---------------------------------------------------------------------------------------------
 */

/* token[t] < 0 becomes prev[-1 - token[t]] in place (ERN_PREV); x[t] = embedding row, f32 [T, D]. */
cudaError_t cu_embed(cudaStream_t s, float *x, int32_t *token, const int32_t *prev, const cu_bf16 *embed, int32_t n_row,
                     int32_t n_hidden);
/* out [n] = rows rows[i] of x, each of row_bytes, a multiple of 4. */
cudaError_t cu_take_rows(cudaStream_t s, void *out, const void *x, const int32_t *rows, int32_t n, int32_t row_bytes);
/* out bf16 [n, CU_PAD(D)] = bf16(norm of x row). rows NULL: row i of x; else rows[i] (wanted rows). */
cudaError_t cu_norm(cudaStream_t s, cu_bf16 *out, const float *x, const int32_t *rows, const cu_bf16 *w, int32_t n,
                    int32_t n_hidden, float eps);
/* The norm of the first n rows of x, to wherever j wants it. */
cudaError_t cu_norm_run(cudaStream_t s, const cu_norm_job *j, const float *x, int32_t n, int32_t n_hidden);
/* MTP: z bf16 [T, CU_PAD(2D)] = norm(embed[next]) beside norm(x). next[t] known (>= 0), or the token sampled at the
 * wanted row that is t (want [W] ascending, sampled [W] ids), or 0. next_out [T] receives it. */
cudaError_t cu_mtp_in(cudaStream_t s, cu_bf16 *z, int32_t *next_out, const float *x, const int32_t *next,
                      const int32_t *want, const int32_t *sampled, int32_t n_want, const cu_bf16 *embed,
                      const cu_bf16 *emb_norm, const cu_bf16 *hidden_norm, int32_t n_row, int32_t n_hidden, float eps);

/* ---- attention (cu_attn.cu) ----------------------------------------------------------------------------------------
 *
 * The cache: a page is [L', 2 (K, V), G] planes of [P', C] elements, then for I8 and F8 [P'] f32 scales; P' is P
 * rounded up to
 * 16. This layout is the cuda backend's own; kv_read and kv_write move it as it is. */
typedef struct cu_cache {
    unsigned char *kv;
    int64_t page_bytes, plane_bytes;
    int32_t n_page_cell; /* P */
    int32_t n_kv_head, n_head, n_head_dim;
    ern_kv_dtype dtype; /* BF16, I8 or F8 */
} cu_cache;

/* The arrays of the step that attention needs, in device memory. */
typedef struct cu_seqs {
    int32_t n_row, n_seq, n_page_max;
    const int32_t *pos, *cell, *row0, *kv_len, *page;
    int32_t *work; /* [cu_attn_work_count] lists, filled by cu_attn_plan once a step, read in every layer */
} cu_seqs;

/* After cu_attn_plan: q and k of qkv f32 [T, (H + 2G) C] (q heads, k heads, v heads) are rotated (pairs 2i, 2i+1; f32
 * arithmetic), q is written to q_out bf16 [T, H*C] scaled by nothing, k and v to their cells. I8, F8: per row and head
 * as quant_act_int8 or quant_act_fp8 with one group of C (docs/model.md 10). write_back: the rotated q and k go back to
 * qkv as well. */
typedef struct cu_rope {
    cu_bf16 *q_out;
    const cu_cache *cache;
    const cu_seqs *seqs;
    int32_t layer;
} cu_rope;
cudaError_t cu_rope_store(cudaStream_t s, float *qkv, bool write_back, const cu_rope *r);
/* Whether the large linears can do it: a tile of outputs is a head. */
static inline bool cu_rope_fits(const cu_rope *r) {
    return r->cache->n_head_dim == 128 && r->cache->dtype == ERN_KV_BF16;
}

/* Numbers of `work` for steps of at most these sizes. */
int64_t cu_attn_work_count(const cu_cache *c, int32_t n_row_max, int32_t n_seq_max);
/* Bytes of partial results for steps of at most n_row_max rows, n_seq_max sequences, n_len_max tokens. Sequences with
 * few rows are cut along their keys and joined; where scratch does not suffice for a step's pieces they are not cut (a
 * sequence walked by one block gives the same bits): at most limit_bytes. They are zeros before the first launch, and
 * every launch leaves them so. */
int64_t cu_attn_scratch_bytes(const cu_cache *c, int32_t n_row_max, int32_t n_seq_max, int32_t n_len_max,
                              int64_t limit_bytes);
/* Once a step: the lists, and the angles pos * inv_freq[i] (in f32). No kernel of the step may begin before it is done,
 * however early it is launched: cu_attend reads lists, angles and the step's arrays at once. */
cudaError_t cu_attn_plan(cudaStream_t s, const cu_cache *c, const cu_seqs *seqs, const float *inv_freq);
/* out bf16 [T, CU_PAD(H*C)] = softmax(q K / sqrt C) V. decode: every sequence has at most 16 / (H/G) rows (a promise of
 * the host that spares the launch for the others); seqs->n_row then bounds the grid, lengths are read on the device.
 * q NULL, with decode only: q, k and v come from qkv [T, (H + 2G) C], and k and v are stored as well: what
 * cu_rope_store does, without its kernel. No sequence may see a cell that another one writes in this step. */
cudaError_t cu_attend(cudaStream_t s, cu_bf16 *out, const cu_bf16 *q, const float *qkv, const cu_cache *c,
                      int32_t layer, const cu_seqs *seqs, void *scratch, int64_t scratch_bytes, bool decode);

/* cu_attend where every sequence has more than 16 / (H/G) rows, with its out quantized. */
cudaError_t cu_attend_codes(cudaStream_t s, const cu_x8 *out, cu_codes codes, const cu_bf16 *q, const cu_cache *c,
                            int32_t layer, const cu_seqs *seqs);
static inline bool cu_attend_codes_fits(const cu_cache *c) { return c->n_head_dim == CU_SEGMENT; }

/* ---- all layers at once (cu_chain.cu) ------------------------------------------------------------------------------
 *
 * A step of few rows of a dense model, each row the next token of a sequence of its own, from x to x behind the last
 * layer in one launch: the bits of cu_linear_run and cu_attend, in less time, since no stage of it is a launch. */
typedef struct cu_chain {
    int32_t n_layer, n_hidden, n_ffn, n_head, n_kv_head, n_head_dim;
    cu_format format; /* of all linears of all layers */
    ern_kv_dtype kv_dtype;
    float eps;
    int32_t n_row_max, n_len_max; /* most rows of a step, longest sequence */
    unsigned char *memory;        /* device [cu_chain_bytes] */
} cu_chain;
typedef struct cu_chain_layer {
    cu_linear qkv, o, up, down;
    const cu_bf16 *attn_norm, *ffn_norm;
} cu_chain_layer;

/* Whether a model of this shape can go this way (memory is not looked at). */
bool cu_chain_fits(const cu_chain *c);
int64_t cu_chain_bytes(const cu_chain *c);
/* Fill c->memory, once. Waits for the stream. */
cudaError_t cu_chain_open(cudaStream_t s, const cu_chain *c, const cu_chain_layer *layers);
/* After cu_attn_plan and what made x f32 [n_row, D]; keys and values go to their cells. Every sequence has one row, the
 * last it sees. Steps of one cu_chain come one after the other; none may fail half way. */
cudaError_t cu_chain_run(cudaStream_t s, const cu_chain *c, float *x, const cu_cache *cache, const cu_seqs *seqs);

/* ---- the attention half of a layer at once (cu_attn_one.cu) --------------------------------------------------------
 *
 * Of few rows, each the next token of a sequence of its own, and weights that meet rows of 8 bits: x = x + o(attention(
 * qkv(norm(x)))) in one launch, keys and values to their cells; the bits of cu_norm, cu_linear_run and cu_attend. One
 * block a multiprocessor, which wait for one another: nothing else may hold a multiprocessor until all have begun. */
typedef struct cu_attn_one {
    int32_t n_hidden, n_head, n_kv_head, n_head_dim;
    ern_kv_dtype kv_dtype;
    int32_t n_row_max, n_len_max; /* most rows of a launch, longest sequence */
    unsigned char *memory;        /* device [cu_attn_one_bytes] */
} cu_attn_one;
typedef struct cu_attn_one_layer {
    cu_linear qkv, o;
    const cu_bf16 *norm;
    float eps;
} cu_attn_one_layer;

/* Whether a model of this shape can go this way (memory is not looked at), and whether a linear of it can. */
bool cu_attn_one_fits(const cu_attn_one *c);
bool cu_attn_one_takes(const cu_linear *w);
int64_t cu_attn_one_bytes(const cu_attn_one *c);
/* Fill c->memory, once. */
cudaError_t cu_attn_one_open(cudaStream_t s, const cu_attn_one *c);
/* After cu_attn_plan. x f32 [n_row, D]. Every sequence has one row, the last it sees. Both linears are of one format.
 * Launches of one cu_attn_one come one after the other; none may fail half way. */
cudaError_t cu_attn_one_run(cudaStream_t s, const cu_attn_one *c, const cu_attn_one_layer *l, float *x,
                            const cu_cache *cache, int32_t layer, const cu_seqs *seqs);

/* ---- sampling (cu_sample.cu) ---------------------------------------------------------------------------------------
 *
 * The rule is model/sample.c's, and so are the bits: given the same logits, ern_sampled is equal. */

/* ern_sample without host pointers: offsets are in 32-bit words into `aux`. */
typedef struct cu_rule {
    ern_sample s;                  /* its pointers are not used */
    int32_t seen, bias, ban, mask; /* offsets into aux; < 0: none. bias: pairs (id, bits of add) */
    int32_t row, row0, pos;        /* wanted row, first row of its sequence, position of the row */
} cu_rule;

/* Words of aux that a rule needs. */
int64_t cu_sample_aux_words(const ern_sample *s, int32_t n_vocab);
/* Fill a rule and its words (host memory), from aux word `at` on; returns the next free word. */
int64_t cu_sample_prepare(cu_rule *out, const ern_sample *s, int32_t row, int32_t row0, int32_t pos, int32_t n_vocab,
                          int32_t *aux, int64_t at);
/* Scratch for n_want rows at once. */
int64_t cu_sample_scratch_bytes(int32_t n_want, int32_t n_vocab);
/* Sample n_want rows of logits f32 [n_want, V]. token: the step's tokens, resolved, by row (the tail of a
 * sequence that `seen` lacks). out: ern_sampled [n_want]; ids: [n_want] the tokens alone (ERN_PREV of the next step).
 * all_greedy: host's promise that every rule is plain arg-max: no penalties, bias, bans, masks, forced ids or logprobs;
 * that path costs one read of the logits. Otherwise penalties, biases and bans change the logits in place. */
cudaError_t cu_sample(cudaStream_t s, ern_sampled *out, int32_t *ids, float *logits, int32_t n_want, int32_t n_vocab,
                      const cu_rule *rules, const int32_t *aux, const int32_t *token, bool all_greedy, void *scratch);
/* ids[i] = arg-max of logits row i, ties to the lowest id (MTP drafts). */
cudaError_t cu_argmax(cudaStream_t s, int32_t *ids, const float *logits, int32_t n_row, int32_t n_vocab, void *scratch);

#ifdef __cplusplus
}
#endif
#endif
