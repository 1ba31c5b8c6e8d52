/* For the checks that run on a GPU machine (make gpu-test): no test library is there, so this is one. A check draws its
 * inputs from the printed seed, poisons what is to be written, and compares with scalar double. Each file check_*.c
 * exports one function, gpu_check.c calls them all and prints a line a case. */
#ifndef ERN_TESTS_CUDA_CHECK_H
#define ERN_TESTS_CUDA_CHECK_H

#include <cuda_runtime_api.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/cu_kernels.h"
#include "base/counter.h"
#include "base/half.h"

extern uint64_t check_seed;
extern int check_n_case, check_n_failed;
extern const char *check_filter; /* only cases whose name holds this; NULL: all */
extern bool check_briefly;       /* a tool takes up to a second for a launch: what is done often, now a few times */

/* True when the case is to run; prints its name when it fails. One case = one call of check_end. */
bool check_begin(const char *name);
/* worst: the largest error as a share of its derived bound (<= 1 is good; NaN is not). what: where it was. */
void check_end(const char *name, double worst, const char *what);
/* What must be true; text is printed when it is not. */
void check_that(const char *name, bool good, const char *text);

#define CHECK_CUDA(call)                                                                         \
    do {                                                                                         \
        cudaError_t check_error = (call);                                                        \
        if (check_error != cudaSuccess) {                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(check_error)); \
            exit(2);                                                                             \
        }                                                                                        \
    } while (0)

/* Device memory with a copy of host (NULL: every byte 0xff, a NaN in f32 and bf16) and a megabyte of 0xff around it;
 * check_free looks whether that is still so and counts a failure if not. */
void *check_new(const void *host, size_t bytes);
void check_free(void *device);
/* Copy back; waits for the device. */
void check_get(void *host, const void *device, size_t bytes);
/* silu(gate) * up of doubles that are off by at most e_gate and e_up, and how far the kernels' bf16 may be from it. */
double check_swiglu(double gate, double e_gate, double up, double e_up, double *bound);
/* Uniform in [-1, 1); every call another. */
float check_random(void);
uint64_t check_random64(void);

/* ---- what checks of several kernels share (check_share.c) ---- */

enum { CHECK_EXPERTS = 5, CHECK_USED = 3 };
/* Routes of n_row rows to these experts: expert 1 has no entry, expert 3 one of every row, the others what is left;
 * tiles in backward order. first [CHECK_EXPERTS + 1] and place_entry [n_row * CHECK_USED] are filled on the host as
 * well. */
void check_routes_new(cu_routes *r, int32_t n_row, int32_t tile_rows, int32_t *first, int32_t *place_entry);
void check_routes_free(cu_routes *r);
/* All of cu_routes for the router to fill: memory, poisoned, holds chosen, share, place_entry, entry_place, tiles,
 * first, n_tile and logit one after the other; scratch lies apart, zeros. */
typedef struct check_lists {
    cu_routes r;
    unsigned char *memory;
    size_t bytes;
} check_lists;
check_lists check_lists_new(int32_t n_row, int32_t n_expert, int32_t n_used);
void check_lists_free(check_lists *l);

/* Where and how much the worst of compared numbers is off, for check_end. Begins as zeros. */
typedef struct check_worst {
    double share;
    char what[96];
} check_worst;
void check_worst_add(check_worst *w, double error, double bound, const char *what, int32_t row, int32_t out,
                     int32_t n_row);

/* The device's arrays of a step that decodes: up to n_row_max rows, each a sequence of its own. */
typedef struct check_decode {
    int32_t n_row_max, n_page, n_page_max; /* pages there are, and of the longest sequence */
    int32_t *pos, *cell, *row0, *kv_len, *page, *work;
} check_decode;
check_decode check_decode_new(const cu_cache *c, int32_t n_row_max, int32_t n_page, int32_t len_max);
void check_decode_free(check_decode *d);
/* Plan a step of n rows at these lengths, this step's token included. Pages are taken in this order from order[1] on
 * (NULL: 1, 2, ...), except that rows of length 1 share page 0, as padding rows do. */
cu_seqs check_decode_plan(const check_decode *d, const cu_cache *c, const float *inv_freq, int32_t n,
                          const int32_t *len, const int32_t *order);

/* Weights that meet rows of 8 bits, drawn as packed bytes. w: its pointers are of the device. */
typedef struct check_weights {
    cu_linear w;
    unsigned char *pack;
    float *scale;
    void *d_pack, *d_scale;
} check_weights;
check_weights check_weights_new(cu_linear w);
void check_weights_free(check_weights *o);
/* Any codes, of e4m3 any but NaN, 64 bits of them. */
uint64_t check_a8_random(cu_format f);
/* By cu_kernels.h, word for word: segments of bands, or scales of them, before this one; the byte that holds the code
 * of input i of output r (0..15) of a band; that code as it goes into the products (int4: times 16). */
int64_t check_a8_segment(const cu_linear *w, int32_t band, int32_t seg);
int64_t check_a8_place(const cu_linear *w, int32_t band, int32_t r, int32_t i);
double check_a8_code(const cu_linear *w, const unsigned char *pack, int32_t band, int32_t r, int32_t i);

void check_linears(void);   /* pack, skinny, grouped skinny (check_linear.c) */
void check_a8_mid(void);    /* rows of 8 bits: skinny, mid, grouped mid (check_a8_mid.c) */
void check_large(void);     /* large, grouped large; the same bits as skinny (check_large.c) */
void check_a8(void);        /* rows to codes; rows of 8 bits: large, grouped large (check_a8.c) */
void check_a8_few(void);    /* few rows of 8 bits: router, linears (check_a8_few.c) */
void check_half(void);      /* the feed-forward half of layers of experts, few rows of 8 bits (check_a8_half.c) */
void check_attention(void); /* check_attention.c */
void check_sampling(void);  /* check_sampling.c */
void check_layers(void);    /* all layers in one kernel (check_chain.c) */
void check_attn_one(void);  /* the attention half of a layer in one kernel (check_attn_one.c) */
void check_rows(void);      /* embed, norm, mtp_in, route, combine (check_rows.c) */

#endif
