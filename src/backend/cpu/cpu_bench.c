/* The private kernels, timed one by one on the shapes of the two published models. See backend/bench.h.
 *
 * The list is linear_kind (one line per kind of linear layer) and row_kind (one line per other kernel). A call of a
 * linear layer is cut over the threads by outputs, as the step does it; the other kernels run on rows of each thread's
 * own. Weights and KV are windows of one large buffer that the calls walk through in turn, so that a call finds nothing
 * of its own in the cache, as in a step. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "backend/bench.h"
#include "backend/cpu/cpu_kernels.h"
#include "base/counter.h"
#include "base/pool.h"

enum {
    HUGE = 2 << 20,
    ROWS_MAX = 512,
    WIDTH_MAX = 12288,
    OUTS_MAX = 103424,
    FEW_ROWS = 16, /* rows that the head is run with */
    ROUNDS_MAX = 100,
    ENOUGH_US = 400000, /* a case that took this long has rounds enough */
    CALLS_US = 2000,    /* a round lasts at least so long */
    QUICK_US = 50,      /* a quick one: long enough for the clock to see it */
    PAGE_CELLS = 64,
    ATTN_C = 128,
    THREADS_MAX = 128, /* so many have rows of their own in x and y */
};

typedef struct bench bench;
typedef void part_fn(bench *b, int worker, int n_worker);

struct bench {
    const ern_kernel_options *o;
    ern_kernel_fn *fn;
    void *ud;
    ern_pool *pool;
    const cpu_kernels *k;
    unsigned char *data, *raw; /* weights, KV */
    uint64_t bytes, raw_bytes;
    float *x, *y;  /* [ROWS_MAX, WIDTH_MAX], and [FEW_ROWS, OUTS_MAX] if that is more */
    cpu_act act;   /* ROWS_MAX rows as any kind */
    int32_t *page; /* [pages of data] */
    void *scale;   /* ones, for tiles: more than any shape has */
    uint64_t turn; /* calls done */
    part_fn *part; /* the case in progress: a call's share */
    const struct linear_kind *linear;
    ern_linear w;
    int32_t n_row, n, n_head, n_call;
    bool kv_int8;
    float *attn; /* [threads, 2, cpu_part_floats] */
};

/* ---- linear layers ----------------------------------------------------------------------------------------------- */

typedef struct linear_kind {
    const char *name;
    ern_dtype dtype;
    ern_order order;
    void (*call)(const cpu_kernels *k, const cpu_linear_job *j);
    bool in_f32; /* computes in f32, whatever the weights are; but bf16 where activations are rounded to it */
    bool panels; /* bf16 copied into panels; the window is drawn as if none of them were padded */
} linear_kind;

static void bf16_out_in(const cpu_kernels *k, const cpu_linear_job *j) { k->linear_bf16[ERN_ORDER_OUT_IN](j); }
static void bf16_in_out(const cpu_kernels *k, const cpu_linear_job *j) { k->linear_bf16[ERN_ORDER_IN_OUT](j); }

static void int8_on_int8(const cpu_kernels *k, const cpu_linear_job *j) { k->linear_i8(j); }
static void int4_on_int8(const cpu_kernels *k, const cpu_linear_job *j) { k->linear_i4(j); }
static void fp8_on_fp8(const cpu_kernels *k, const cpu_linear_job *j) { k->linear_f8(j); }
static void int8_exact(const cpu_kernels *k, const cpu_linear_job *j) { k->exact_i8(j); }
static void int4_exact(const cpu_kernels *k, const cpu_linear_job *j) { k->exact_i4(j); }
static void fp8_exact(const cpu_kernels *k, const cpu_linear_job *j) { k->exact_f8(j); }

static const linear_kind linear_kinds[] = {
    {"linear bf16 pt", ERN_DTYPE_BF16, ERN_ORDER_OUT_IN, bf16_out_in, true, false},
    {"linear bf16 panels", ERN_DTYPE_BF16, ERN_ORDER_OUT_IN, bf16_out_in, true, true},
    {"linear bf16 paddle", ERN_DTYPE_BF16, ERN_ORDER_IN_OUT, bf16_in_out, true, false},
    {"linear int8", ERN_DTYPE_I8, ERN_ORDER_TILED, int8_on_int8, false, false},
    {"linear int4", ERN_DTYPE_I4, ERN_ORDER_TILED, int4_on_int8, false, false},
    {"linear fp8", ERN_DTYPE_F8E4M3, ERN_ORDER_TILED, fp8_on_fp8, true, false},
    {"linear int8 on f32", ERN_DTYPE_I8, ERN_ORDER_TILED, int8_exact, true, false},
    {"linear int4 on f32", ERN_DTYPE_I4, ERN_ORDER_TILED, int4_exact, true, false},
    {"linear fp8 on f32", ERN_DTYPE_F8E4M3, ERN_ORDER_TILED, fp8_exact, true, false},
};

typedef struct shape {
    const char *name;
    int32_t n_out, n_in;
    bool quick; /* also in a quick run */
} shape;

static const shape linear_shapes[] = {
    {"0.3b q", 2048, 1024, true},           {"0.3b kv", 256, 1024, false},          {"0.3b gate", 3072, 1024, false},
    {"0.3b down", 1024, 3072, false},       {"0.3b head", OUTS_MAX, 1024, false},   {"21b q", 2560, 2560, false},
    {"21b expert gate", 1536, 2560, false}, {"21b expert down", 2560, 1536, false}, {"21b head", OUTS_MAX, 2560, false},
};
static const int32_t linear_rows[] = {1, 4, 16, 512};

/* The n-th window of the buffer that holds `bytes`. */
static const void *window(const bench *b, uint64_t bytes, uint64_t n) {
    const uint64_t each = (bytes + 63) / 64 * 64, fit = b->bytes / each;
    ERN_ASSERT(fit > 0);
    return b->data + n % fit * each;
}

static void linear_part(bench *b, int worker, int n_worker) {
    int64_t from, to;
    ern_pool_share(b->w.n_out, 32, worker, n_worker, &from, &to);
    for (int32_t i = 0; i < b->n_call; i++) {
        ern_linear w = b->w;
        w.data = window(b, ern_linear_bytes(&b->w), b->turn + (uint64_t)i);
        const cpu_linear_job j = {.w = &w,
                                  .x = b->x,
                                  .x_stride = w.n_in,
                                  .act = b->act,
                                  .y = b->y,
                                  .y_stride = w.n_out,
                                  .n_row = b->n_row,
                                  .from = (int32_t)from,
                                  .to = (int32_t)to};
        if (from < to) b->linear->call(b->k, &j);
        ern_pool_barrier(b->pool);
    }
}

/* ---- rows -------------------------------------------------------------------------------------------------------- */

/* This thread's own rows of x. */
static float *row_of(bench *b, int worker, int32_t i) { return b->x + ((int64_t)worker * 16 + i % 8) * b->n; }

static void router_part(bench *b, int worker, int n_worker) {
    (void)n_worker;
    float *y = b->y + (int64_t)worker * 1024;
    for (int32_t i = 0; i < b->n_call; i++)
        b->k->linear_f32(y, row_of(b, worker, i), (const float *)(const void *)b->data, 64, b->n);
}
static void norm_part(bench *b, int worker, int n_worker) {
    (void)n_worker;
    for (int32_t i = 0; i < b->n_call; i++)
        b->k->norm(b->y + (int64_t)worker * b->n, row_of(b, worker, i), (const ern_bf16 *)(const void *)b->data, b->n,
                   1e-5f);
}
static void silu_part(bench *b, int worker, int n_worker) {
    (void)n_worker;
    float *gate = b->y + (int64_t)worker * b->n;
    for (int32_t i = 0; i < b->n_call; i++) {
        memcpy(gate, row_of(b, worker, i), (size_t)b->n * sizeof *gate); /* what it multiplies must not run away */
        b->k->silu_mul(gate, row_of(b, worker, i + 1), b->n);
    }
}
static void softmax_part(bench *b, int worker, int n_worker) {
    (void)n_worker;
    float *x = b->y + (int64_t)worker * b->n;
    for (int32_t i = 0; i < b->n_call; i++) b->k->softmax(x, b->n);
}
static float *part_of(bench *b, int worker, int i) { return b->attn + (2 * worker + i) * cpu_part_floats(ATTN_C); }

/* One block of positions for the heads of one KV head; each thread walks through its own part of the buffer. */
static void attn_part(bench *b, int worker, int n_worker) {
    const bool int8 = b->kv_int8;
    const int64_t plane = cpu_kv_plane_bytes(PAGE_CELLS, ATTN_C, int8);
    const int32_t pages = (int32_t)((int64_t)b->bytes / (2 * plane)) / n_worker;
    const cpu_kv_view kv = {.k = b->data,
                            .v = b->data + plane,
                            .page = b->page + (int64_t)worker * pages,
                            .page_stride = 2 * plane,
                            .n_cell = PAGE_CELLS,
                            .int8 = int8};
    const int32_t blocks = pages * PAGE_CELLS / CPU_ATTN_BLOCK;
    cpu_kv_block block;
    for (int32_t i = 0; i < b->n_call; i++) {
        const int32_t at = (int32_t)((b->turn + (uint64_t)i) % (uint64_t)blocks) * CPU_ATTN_BLOCK;
        cpu_kv_find(&block, &kv, ATTN_C, at, CPU_ATTN_BLOCK);
        b->k->attn_block[int8](part_of(b, worker, 0), b->x, b->n_head, ATTN_C, 0.088f, &block, CPU_ATTN_BLOCK);
    }
}
static void join_part(bench *b, int worker, int n_worker) {
    (void)n_worker;
    for (int32_t i = 0; i < b->n_call; i++)
        b->k->attn_join(part_of(b, worker, 0), part_of(b, worker, 1), b->n_head, ATTN_C);
}

/* bytes and operations: of one row (a block of attention), from its width n or its heads. */
typedef struct row_kind {
    const char *name, *shape;
    part_fn *part;
    int32_t n, n_head;
    uint64_t bytes, operations;
    bool streams, quick, int8;
} row_kind;

enum {
    ATTN_BYTES = 2 * CPU_ATTN_BLOCK * ATTN_C * 2,
    ATTN_BYTES_INT8 = 2 * CPU_ATTN_BLOCK * (ATTN_C + 4),
    ATTN_OPS = 4 * CPU_ATTN_BLOCK * ATTN_C,
    JOIN = ATTN_C * 4,
};
static const row_kind row_kinds[] = {
    {"linear f32", "21b router", router_part, 2560, 0, 4 * 64 * 2560, 2 * 64 * 2560, false, false, false},
    {"norm", "0.3b", norm_part, 1024, 0, 10 * 1024, 4 * 1024, false, true, false},
    {"norm", "21b", norm_part, 2560, 0, 10 * 2560, 4 * 2560, false, false, false},
    {"silu_mul", "0.3b", silu_part, 3072, 0, 12 * 3072, 0, false, true, false},
    {"silu_mul", "21b expert", silu_part, 1536, 0, 12 * 1536, 0, false, false, false},
    {"softmax", "21b router", softmax_part, 64, 0, 8 * 64, 0, false, true, false},
    {"attn bf16", "8 heads of 128", attn_part, ATTN_C, 8, ATTN_BYTES, 8 * ATTN_OPS, true, true, false},
    {"attn bf16", "5 heads of 128", attn_part, ATTN_C, 5, ATTN_BYTES, 5 * ATTN_OPS, true, false, false},
    {"attn int8", "8 heads of 128", attn_part, ATTN_C, 8, ATTN_BYTES_INT8, 8 * ATTN_OPS, true, true, true},
    {"attn int8", "5 heads of 128", attn_part, ATTN_C, 5, ATTN_BYTES_INT8, 5 * ATTN_OPS, true, false, true},
    {"attn join", "8 heads of 128", join_part, ATTN_C, 8, 3 * 8 * JOIN, 3 * 8 * ATTN_C, false, true, false},
};

/* ---- timing ------------------------------------------------------------------------------------------------------ */

static void region(void *ud, int worker, int n_worker) {
    bench *b = ud;
    b->part(b, worker, n_worker);
}

static double once_s(bench *b) {
    const int64_t begin_us = ern_now_us();
    ern_pool_run(b->pool, region, b);
    const double took_s = (double)(ern_now_us() - begin_us) * 1e-6;
    b->turn += (uint64_t)b->n_call;
    return took_s;
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Rounds of as many calls as fill CALLS_US; the case is described by *run but for its times. */
static void time_case(bench *b, ern_kernel_run *run) {
    double took[ROUNDS_MAX];
    const double least_s = (b->o->quick ? QUICK_US : CALLS_US) * 1e-6;
    int n = 0;
    const int64_t begin_us = ern_now_us();
    b->n_call = 1;
    do {
        const double s = once_s(b);
        took[n++] = s / b->n_call;
        if (s >= least_s) continue;
        n = 0; /* too short for the clock; one look may have been long by a disturbance, so every look is asked */
        b->n_call *= 2;
    } while (n < b->o->n_round && (n == 0 || ern_now_us() - begin_us < ENOUGH_US));
    qsort(took, (size_t)n, sizeof *took, by_value);
    run->level = b->k->name;
    run->best_s = took[0];
    run->median_s = took[n / 2];
    b->fn(b->ud, run);
}

static bool asked(const bench *b, const char *name, const char *shape_name, bool quick) {
    if (b->o->quick && !quick) return false;
    return !b->o->filter || strstr(name, b->o->filter) || strstr(shape_name, b->o->filter);
}

/* What bounds arithmetic in f32 at this level. */
static bool rate_f32(const bench *b, ern_rate *out) {
    const int level = (int)b->k->level;
    return ern_rate_for(ERN_DTYPE_F32, level < ERN_CPU_AMX ? level : ERN_CPU_AVX512, out);
}

static void time_linear(bench *b, const linear_kind *kind, const shape *s) {
    if (kind->panels && b->k->panel_out == 0) return;
    b->linear = kind;
    b->part = linear_part;
    b->w = (ern_linear){.data = b->data,
                        .dtype = kind->dtype,
                        .order = kind->order,
                        .n_out = s->n_out,
                        .n_in = s->n_in,
                        .stride = kind->panels                      ? 0
                                  : kind->order == ERN_ORDER_OUT_IN ? s->n_in
                                  : kind->order == ERN_ORDER_IN_OUT ? s->n_out
                                                                    : 0,
                        .scale = kind->order == ERN_ORDER_TILED ? b->scale : NULL};
    const uint64_t weights = ern_linear_bytes(&b->w);
    if (weights > b->bytes) return;
    for (size_t i = 0; i < sizeof linear_rows / sizeof *linear_rows; i++) {
        const int32_t rows = linear_rows[i];
        if (rows > FEW_ROWS && (s->n_out == OUTS_MAX || b->o->quick)) continue;
        b->n_row = rows;
        ern_kernel_run run = {.kernel = kind->name,
                              .shape = s->name,
                              .n_row = rows,
                              .bytes = weights + (uint64_t)rows * (uint64_t)(s->n_in + s->n_out) * sizeof(float),
                              .operations = 2 * (uint64_t)rows * (uint64_t)s->n_out * (uint64_t)s->n_in,
                              .streams = true};
        const bool in_f32 = kind->in_f32 && !(kind->dtype == ERN_DTYPE_BF16 && b->k->linear_rounds);
        run.has_rate = in_f32 ? rate_f32(b, &run.rate) : ern_rate_for(kind->dtype, (int)b->k->level, &run.rate);
        time_case(b, &run);
    }
}

static void time_rows(bench *b, const row_kind *kind) {
    const int n = ern_pool_count(b->pool);
    b->part = kind->part;
    b->n = kind->n;
    b->n_head = kind->n_head;
    b->kv_int8 = kind->int8;
    for (int32_t i = 0; i < n * 16 * kind->n; i++) b->y[i] = 0.25f;
    ern_kernel_run run = {.kernel = kind->name,
                          .shape = kind->shape,
                          .n_row = n,
                          .bytes = (uint64_t)n * kind->bytes,
                          .operations = (uint64_t)n * kind->operations,
                          .streams = kind->streams};
    run.has_rate = kind->operations && rate_f32(b, &run.rate);
    time_case(b, &run);
}

/* ---- all --------------------------------------------------------------------------------------------------------- */

/* Small weights: bf16 of about 2^-7 with both signs, finite also as bytes and nibbles. */
static void fill_part(void *ud, int worker, int n_worker) {
    bench *b = ud;
    int64_t from, to;
    ern_pool_share((int64_t)b->bytes, 4096, worker, n_worker, &from, &to);
    for (int64_t i = from; i < to; i += 8) {
        const uint64_t bits = (ern_counter64(1, (uint64_t)i) & 0x807f807f807f807full) | 0x3c003c003c003c00ull;
        memcpy(b->data + i, &bits, sizeof bits);
    }
}

static ern_status take_all(bench *b, ern_err *err) {
    const uint64_t free_bytes = ern_memory_available_bytes(), x_bytes = (uint64_t)ROWS_MAX * WIDTH_MAX * sizeof(float);
    const uint64_t scale_bytes = (uint64_t)OUTS_MAX * sizeof(float);
    b->bytes = (b->o->bytes > (16u << 20) ? b->o->bytes : (16u << 20)) / HUGE * HUGE;
    b->raw_bytes = b->bytes + HUGE;
    if (b->bytes + 2 * x_bytes > free_bytes / 2)
        return ERN_FAIL(err, ERN_ERR_MEMORY, "timing the kernels wants %llu MiB and only %llu MiB are free",
                        (unsigned long long)((b->bytes + 2 * x_bytes) >> 20), (unsigned long long)(free_bytes >> 20));
    void *raw = mmap(NULL, b->raw_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    b->raw = raw == MAP_FAILED ? NULL : raw;
    b->x = calloc(1, x_bytes);
    b->y = calloc(1, x_bytes);
    b->scale = malloc(scale_bytes);
    b->page = calloc(b->bytes / (2 * PAGE_CELLS * ATTN_C), sizeof *b->page);
    b->attn = calloc(2 * THREADS_MAX * (size_t)cpu_part_floats(ATTN_C), sizeof *b->attn);
    b->act = (cpu_act){.q = aligned_alloc(64, x_bytes),
                       .scale = b->scale,
                       .sum = calloc((size_t)ROWS_MAX * WIDTH_MAX / ERN_ACT_GROUP, sizeof(int32_t))};
    if (!b->raw || !b->x || !b->y || !b->scale || !b->page || !b->attn || !b->act.q || !b->act.sum)
        return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory to time the kernels");
    b->data = (unsigned char *)(((uintptr_t)b->raw + HUGE - 1) / HUGE * HUGE);
    (void)madvise(b->data, b->bytes, MADV_HUGEPAGE);
    const int n = b->o->n_thread ? b->o->n_thread : ern_cpu_count();
    ERN_TRY(ern_pool_open(&b->pool, n < THREADS_MAX ? n : THREADS_MAX, true, err));
    ern_pool_run(b->pool, fill_part, b);
    for (int64_t i = 0; i < (int64_t)ROWS_MAX * WIDTH_MAX; i++)
        b->x[i] = (float)(int)(ern_counter64(2, (uint64_t)i) >> 56) * 0x1p-7f - 1.0f;
    for (size_t i = 0; i < scale_bytes / 4; i++) ((uint32_t *)b->scale)[i] = 0x3c003c00u; /* 2^-7, as f32 or as bf16 */
    for (size_t i = 0; i < b->bytes / (2 * PAGE_CELLS * ATTN_C); i++) b->page[i] = (int32_t)i;
    for (int64_t i = 0; i < 2 * THREADS_MAX * cpu_part_floats(ATTN_C); i++) b->attn[i] = 1.0f; /* sums among them */
    memcpy(b->act.q, b->x, x_bytes);
    return ERN_OK;
}

ern_status ern_bench_kernels(const ern_kernel_options *o, ern_kernel_fn *fn, void *ud, ern_err *err) {
    ERN_ASSERT(o->n_round >= 1 && o->n_round <= ROUNDS_MAX);
    bench b = {.o = o, .fn = fn, .ud = ud};
    const ern_status s = take_all(&b, err);
    const cpu_kernels *table[CPU_TABLES];
    const int n_table = cpu_kernels_here(table);
    for (int t = 0; s == ERN_OK && t < n_table; t++) {
        b.k = table[t];
        if (o->level >= 0 && (int)b.k->level != o->level) continue;
        for (size_t i = 0; i < sizeof linear_kinds / sizeof *linear_kinds; i++)
            for (size_t k = 0; k < sizeof linear_shapes / sizeof *linear_shapes; k++)
                if (asked(&b, linear_kinds[i].name, linear_shapes[k].name, linear_shapes[k].quick))
                    time_linear(&b, &linear_kinds[i], &linear_shapes[k]);
        for (size_t i = 0; i < sizeof row_kinds / sizeof *row_kinds; i++)
            if (asked(&b, row_kinds[i].name, row_kinds[i].shape, row_kinds[i].quick)) time_rows(&b, &row_kinds[i]);
    }
    ern_pool_close(b.pool);
    if (b.raw) munmap(b.raw, b.raw_bytes);
    free(b.x);
    free(b.y);
    free(b.scale);
    free(b.page);
    free(b.attn);
    free(b.act.q);
    free(b.act.sum);
    return s;
}
