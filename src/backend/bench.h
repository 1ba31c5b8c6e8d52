/* The second door of `backend`: what this machine can do at most, and how near single kernels come to it. For
 * `ernest bench`, and for nothing on the way of a request.
 *
 * A rate drifts by 2x within minutes on a shared machine, so a fraction is worth something only when the work and its
 * limit were measured in the same rounds: everything here measures one round at a time and leaves the choice of rounds
 * to the caller. Hides: the instructions, the threads, the buffers. Owner and thread: one caller. */
#ifndef ERN_BACKEND_BENCH_H
#define ERN_BACKEND_BENCH_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "model/model.h"

/* ---- limits ---------------------------------------------------------------------------------------------------- */

/* Kinds of arithmetic. An operation is a multiplication or an addition: a fused pair counts two. */
typedef enum ern_rate { ERN_RATE_FMA_F32, ERN_RATE_VNNI_INT8, ERN_RATE_AMX_BF16, ERN_RATE_AMX_INT8 } ern_rate;
enum { ERN_RATES = 4 };

/* Where the operands come from. Vector kinds read each weight line once for 8 rows held in registers; AMX reads one
 * tile for each product of two tiles, as a block of 2 x 2 tiles must. */
typedef enum ern_reach { ERN_REACH_REGISTERS, ERN_REACH_L1, ERN_REACH_L2 } ern_reach;
enum { ERN_REACHES = 3 };

const char *ern_rate_name(ern_rate rate);    /* "fma f32", "vnni int8", "amx bf16", "amx int8" */
const char *ern_reach_name(ern_reach reach); /* "registers", "L1", "L2" */
/* NULL: this machine has it; else one clause that says why not. */
const char *ern_rate_missing(ern_rate rate);
/* The fastest arithmetic that a linear layer of this dtype can use on this machine at a level (an ern_cpu_level, -1:
 * its best). False: none of these kinds. */
bool ern_rate_for(ern_dtype dtype, int level, ern_rate *out);

typedef struct ern_limits ern_limits;
/* n_thread pinned threads (0: all allowed processors) and a buffer of at least `bytes` written once, in huge pages
 * where asked and given. Errors: ERN_ERR_MEMORY when less than twice that much is free. */
ERN_MUST_CHECK ern_status ern_limits_open(ern_limits **out, int n_thread, uint64_t bytes, bool huge, ern_err *err);
void ern_limits_close(ern_limits *l); /* NULL is fine */
int ern_limits_threads(const ern_limits *l);
/* Bytes per second of all threads over the first `bytes` (up to the buffer's), each thread its own part, as many passes
 * as take about min_us. */
double ern_limits_read(ern_limits *l, uint64_t bytes, int64_t min_us);
/* Operations per second of all threads for about min_us; the rate must not be missing. */
double ern_limits_compute(ern_limits *l, ern_rate rate, ern_reach reach, int64_t min_us);

/* ---- kernels --------------------------------------------------------------------------------------------------- */

/* One kernel on one shape. bytes and operations: of one call on all threads, counted from the shape. Strings are
 * borrowed for the call. */
typedef struct ern_kernel_run {
    const char *kernel, *level, *shape;
    int32_t n_row;
    uint64_t bytes, operations;
    bool streams;            /* most of the bytes come from memory; false: they stay in the cache */
    ern_rate rate;           /* the arithmetic it could use on this machine at its level; see has_rate */
    bool has_rate;           /* false: none of the kinds above runs at this level */
    double best_s, median_s; /* seconds of a call */
} ern_kernel_run;
typedef void ern_kernel_fn(void *ud, const ern_kernel_run *run);

typedef struct ern_kernel_options {
    int n_thread;       /* 0: all allowed processors */
    int level;          /* an ern_cpu_level; -1: every level the machine has a table for */
    int n_round;        /* 1..100 */
    const char *filter; /* only kernels whose name or shape holds this; NULL: all */
    uint64_t bytes;     /* weights that calls walk through in turn, so that none finds its own in the cache */
    bool quick;         /* shapes that take milliseconds: for tests */
} ern_kernel_options;

/* Run the cpu backend's private kernels, one after another, and hand over each result. Errors: ERN_ERR_MEMORY. */
ERN_MUST_CHECK ern_status ern_bench_kernels(const ern_kernel_options *o, ern_kernel_fn *fn, void *ud, ern_err *err);

#endif
