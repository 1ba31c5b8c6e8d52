/* What a step must read and compute, counted from the model's tensors: the floor that `ernest bench step` divides by.
 * Plain arithmetic; any thread. */
#ifndef ERN_CLI_BENCH_COUNT_H
#define ERN_CLI_BENCH_COUNT_H

#include "model/model.h"

/* One step, or the mean of several. */
typedef struct bench_work {
    double n_row, n_want; /* T, W */
    double experts;       /* distinct routed experts that the rows chose, summed over the layers */
    double kv_read;       /* positions whose keys and values are read, summed over the sequences: each once a step */
    double kv_write;      /* positions written: rows */
    double kv_bytes;      /* of one position over all layers */
    double pairs;         /* (row, visible position), summed over the rows */
    bool leaves;          /* rows that are not wanted leave behind the last layer's keys and values */
    double want_pairs;    /* pairs of wanted rows; read where the others leave */
} bench_work;

/* Bytes: every dense linear once, the head if a row is wanted, the routers, each touched expert once, KV. Where rows
 * leave and none is wanted: of the last layer's linears those of keys and values alone, and its KV is not read.
 * Activations stay in the cache and are not counted; neither are the norms and the rows of the embedding. */
double bench_bytes(const ern_model *m, const bench_work *w);
/* Operations, two for each multiply-add: linears for each row, the head for each wanted row, K experts a row, and
 * attention's two products over the pairs; of the last layer without what rows that leave are spared. */
double bench_operations(const ern_model *m, const bench_work *w);
#define BENCH_SHARE_MOST 1.25 /* of a limit: more is noise, the rounds' or the limit's, and no reading */
/* The share of a read limit (bytes/s) at which `bytes` more are read in more_s seconds more. INFINITY, above every
 * share: they added no time, or so little that the share would be above BENCH_SHARE_MOST, or no limit is known. */
double bench_share_added(double bytes, double more_s, double read);
/* The dtype of most of the weights that a row passes, which names the arithmetic that can be used. */
ern_dtype bench_dtype(const ern_model *m);
/* "bf16", "int8", ... of the classes, such as "int8, experts int4, head int8". */
const char *bench_format(const ern_model *m, char out[96]);
/* Mark the experts of one layer that T rows choose; returns how many are new. logits [T, E] f32: the router's, before
 * softmax; touched [E]. Source: docs/model.md 3.6 (by probability plus bias, ties to the lower id). */
int32_t bench_touch_experts(const ern_model *m, int32_t layer, const float *logits, int32_t n_row, bool *touched);

#endif
