/* What the promise of house.md 3 costs: the orders of sums that the step has, which depend on the weight's shape alone,
 * against the best that a choice by the size of the batch could have.
 *
 *   bench_invariance [rounds 9]
 *
 * Every linear of the 0.3b shape and its attention, for 1, 4 and 16 rows, two threads, in three ways:
 *   outputs    as the step does it: a worker has some outputs and the whole of K
 *   split K    a worker has half of K for all outputs, and the halves are added: fewer rows to walk, a second barrier
 *   8 chains   bf16, one row: two sums for each output of a panel, added at its end, which hide the latency of FMA
 * Integer sums have no order within a group, so tiles of int8 are chosen by the number of rows already. Attention:
 *   blocks     as the step does it: 256 positions each, each result kept and joined in the order of positions
 *   heads      a worker has a KV head and one running softmax over all of its blocks, nothing is kept
 *   halves     a worker has half of the positions of each head, whatever the blocks; two results are joined
 * The ways take turns; each is told by its best round. The last lines add them up as a step has them. */
#include <immintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "backend/cpu/cpu_kernels.h"
#include "base/os.h"
#include "base/pool.h"

enum {
    MEMORY = 512 << 20,
    ROWS_MAX = 16,
    IN_MAX = 3072,
    OUT_MAX = 103424,
    WORKERS = 2,
    WAYS = 3,
    TRIES = 20,
    C = 128,
    P = 64,
    HEADS = 8,
    KV_HEADS = 2,
    LEN_MAX = 8192
};

#define NONE_US 1e9

typedef struct shape {
    const char *name;
    int32_t n_out, n_in, n_step; /* times a step */
} shape;
static const shape shapes[] = {{"q", 2048, 1024, 18},        {"k, v", 256, 1024, 36},  {"o", 1024, 2048, 18},
                               {"gate, up", 3072, 1024, 36}, {"down", 1024, 3072, 18}, {"head", 103424, 1024, 1}};
enum { SHAPES = sizeof shapes / sizeof *shapes };
static const int32_t rows[] = {1, 4, 16};
static const int32_t lengths[] = {128, 512, 8192};

static const cpu_kernels *kernels;
static ern_pool *pool;
static unsigned char *memory;
static size_t turn; /* bytes walked: a call finds none of its weights in the cache */
static float *x, *y[WORKERS];
static ern_bf16 *scale;
static cpu_act act;
static volatile float sink;
static bool alone; /* in this round a worker rested, as its processor was wanted elsewhere: it does not count */

static double since_us(int64_t begin_us, int n) {
    const double us = alone ? NONE_US : (double)(ern_now_us() - begin_us) / n;
    if (alone) usleep(100000); /* until it is to work again */
    alone = false;
    return us;
}

static unsigned char *next_bytes(size_t bytes) {
    bytes = (bytes + 4095) / 4096 * 4096;
    if (turn + bytes > MEMORY) turn = 0;
    turn += bytes;
    return memory + turn - bytes;
}

/* ---- linear layers ----------------------------------------------------------------------------------------------- */

typedef struct call {
    ern_linear w[WORKERS]; /* the whole, or the halves of K */
    int32_t n_row;
    int way;
} call;

static void job_run(const ern_linear *w, int32_t n_row, float *to, const float *in, int32_t from, int32_t end) {
    const cpu_linear_job j = {.w = w,
                              .x = in,
                              .x_stride = IN_MAX,
                              .act = act,
                              .y = to,
                              .y_stride = w->n_out,
                              .n_row = n_row,
                              .from = from,
                              .to = end};
    if (from < end) cpu_linear_of(kernels, w, false)(&j);
}

/* One row, outputs from..end-1: even and odd lines of a panel have sums of their own. */
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) static void
chains_run(const ern_linear *w, float *to, const float *in, int32_t from, int32_t end) {
    const __m512i high = _mm512_set1_epi32((int32_t)0xffff0000u);
    for (int32_t o = from; o < end; o += CPU_PANEL_LINES) {
        const ern_bf16 *p =
            (const ern_bf16 *)w->data + o / CPU_PANEL_LINES * cpu_panel_numbers(CPU_PANEL_LINES, w->n_in);
        __m512 acc[2][CPU_PANEL_LINES];
        for (int i = 0; i < 2 * CPU_PANEL_LINES; i++)
            acc[i / CPU_PANEL_LINES][i % CPU_PANEL_LINES] = _mm512_setzero_ps();
        for (int32_t k = 0; k < w->n_in; k += CPU_LINE)
#pragma GCC unroll 4
            for (int i = 0; i < CPU_PANEL_LINES; i++, p += CPU_LINE) {
                const __m512i v = _mm512_loadu_si512(p);
                acc[0][i] =
                    _mm512_fmadd_ps(_mm512_loadu_ps(in + k), _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), acc[0][i]);
                acc[1][i] = _mm512_fmadd_ps(_mm512_loadu_ps(in + k + 16),
                                            _mm512_castsi512_ps(_mm512_and_si512(v, high)), acc[1][i]);
            }
        for (int i = 0; i < CPU_PANEL_LINES; i++) to[o + i] = _mm512_reduce_add_ps(_mm512_add_ps(acc[0][i], acc[1][i]));
    }
}

static void call_part(void *ud, int worker, int n_worker) {
    const call *c = ud;
    int64_t from, to;
    if (n_worker < WORKERS) {
        alone = true;
        return;
    }
    ern_pool_share(c->w[0].n_out, 32, worker, n_worker, &from, &to);
    switch (c->way) {
    case 0: job_run(&c->w[0], c->n_row, y[0], x, (int32_t)from, (int32_t)to); break;
    case 1:
        job_run(&c->w[worker], c->n_row, y[worker], x + worker * c->w[0].n_in, 0, c->w[0].n_out);
        ern_pool_barrier(pool);
        for (int64_t r = 0; r < c->n_row; r++)
            for (int64_t o = from; o < to; o++) y[0][r * c->w[0].n_out + o] += y[1][r * c->w[0].n_out + o];
        break;
    default: chains_run(&c->w[0], y[0], x, (int32_t)from, (int32_t)to);
    }
    ern_pool_barrier(pool);
}

static double call_us(const shape *s, bool bf16, int32_t n_row, int way) {
    const int32_t n_in = way == 1 ? s->n_in / 2 : s->n_in, parts = way == 1 ? 2 : 1;
    const size_t bytes = (size_t)s->n_out * (size_t)n_in * (bf16 ? 2 : 1);
    const int n_call = s->n_out > 10000 ? 2 : 20;
    call c = {.n_row = n_row, .way = way};
    const int64_t begin_us = ern_now_us();
    for (int i = 0; i < n_call; i++) {
        for (int k = 0; k < parts; k++)
            c.w[k] = (ern_linear){.data = next_bytes(bytes),
                                  .dtype = bf16 ? ERN_DTYPE_BF16 : ERN_DTYPE_I8,
                                  .order = bf16 ? ERN_ORDER_OUT_IN : ERN_ORDER_TILED,
                                  .n_out = s->n_out,
                                  .n_in = n_in,
                                  .scale = scale};
        ern_pool_run(pool, call_part, &c);
    }
    return since_us(begin_us, n_call);
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

typedef struct attn {
    cpu_kv_view kv[KV_HEADS];
    int32_t n;
    int way;
} attn;
static int32_t page[LEN_MAX / P];
static float *part; /* [KV_HEADS, blocks, cpu_part_floats]; the first of a head is its result */

static float *part_at(int head, int32_t block) {
    return part + ((int64_t)head * (LEN_MAX / CPU_ATTN_BLOCK + 1) + block) * cpu_part_floats(C);
}

/* Positions from..end-1 of a head, with one running result in `acc`, or, without `room`, a result for each block. */
static void walk(const attn *a, int head, int32_t from, int32_t end, float *acc, float *room) {
    cpu_kv_block block[2], *now = &block[0], *next = &block[1];
    for (int32_t at = from; at < end; at += CPU_ATTN_BLOCK) {
        const int32_t n = end - at < CPU_ATTN_BLOCK ? end - at : CPU_ATTN_BLOCK, after = at + n;
        if (at == from) cpu_kv_find(now, &a->kv[head], C, at, n);
        now->next = NULL;
        if (after < end) {
            cpu_kv_find(next, &a->kv[head], C, after, end - after < CPU_ATTN_BLOCK ? end - after : CPU_ATTN_BLOCK);
            now->next = next;
            next->cold = false;
        }
        float *to = at == from ? acc : room ? room : acc + (at - from) / CPU_ATTN_BLOCK * cpu_part_floats(C);
        kernels->attn_block[0](to, x, HEADS, C, 0.1f, now, n);
        if (to == room) kernels->attn_join(acc, room, HEADS, C);
        cpu_kv_block *was = now;
        now = next, next = was;
    }
}

static void attn_part(void *ud, int worker, int n_worker) {
    const attn *a = ud;
    _Alignas(64) float room[CPU_HEAD_TILE * (2 + C)];
    const int32_t n_block = (a->n + CPU_ATTN_BLOCK - 1) / CPU_ATTN_BLOCK;
    if (n_worker < WORKERS) {
        alone = true;
        return;
    }
    if (a->way == 0) {    /* each block's result is kept */
        int64_t from, to; /* blocks of each head */
        ern_pool_share(n_block, 1, worker, n_worker, &from, &to);
        for (int head = 0; n_block > 1 && head < KV_HEADS; head++) {
            const int32_t end = (int32_t)to * CPU_ATTN_BLOCK;
            walk(a, head, (int32_t)from * CPU_ATTN_BLOCK, end < a->n ? end : a->n, part_at(head, (int32_t)from), NULL);
        }
        if (n_block == 1) walk(a, worker, 0, a->n, part_at(worker, 0), NULL); /* a head each */
        if (n_block > 1) ern_pool_barrier(pool);
        for (int32_t b = 1; worker < KV_HEADS && b < n_block; b++)
            kernels->attn_join(part_at(worker, 0), part_at(worker, b), HEADS, C);
    } else if (a->way == 1) {
        for (int head = worker; head < KV_HEADS; head += n_worker) walk(a, head, 0, a->n, part_at(head, 0), room);
    } else {
        const int32_t half = (a->n / 2 + 15) / 16 * 16, from = worker ? half : 0, end = worker ? a->n : half;
        for (int head = 0; head < KV_HEADS; head++) walk(a, head, from, end, part_at(head, worker), room);
        ern_pool_barrier(pool);
        if (worker < KV_HEADS) kernels->attn_join(part_at(worker, 0), part_at(worker, 1), HEADS, C);
    }
    ern_pool_barrier(pool);
}

/* n_row sequences of n positions, one after another, as if each were alone: the step shares them out more freely. */
static double attn_us(int32_t n, int32_t n_row, int way) {
    const int64_t plane = cpu_kv_plane_bytes(P, C, false);
    const int n_call = n > 1000 ? 4 : 20;
    attn a = {.n = n, .way = way};
    const int64_t begin_us = ern_now_us();
    for (int i = 0; i < n_call; i++)
        for (int32_t r = 0; r < n_row; r++) {
            for (int h = 0; h < KV_HEADS; h++) {
                unsigned char *at = next_bytes((size_t)(2 * plane * (n / P)));
                a.kv[h] = (cpu_kv_view){.k = at, .v = at + plane, .page = page, .page_stride = 2 * plane, .n_cell = P};
            }
            ern_pool_run(pool, attn_part, &a);
        }
    return since_us(begin_us, n_call);
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

/* Prints a line; adds what the first way and the best one take in a step. */
static void line(const char *what, int32_t n, int32_t n_row, const double *best, int n_way, int32_t n_step, double *own,
                 double *least) {
    double low = best[0];
    for (int w = 1; w < n_way; w++) low = best[w] < low ? best[w] : low;
    printf("  %-9s %5d  %2d rows  %9.1f us", what, n, n_row, best[0]);
    for (int w = 1; w < n_way; w++) printf("  %9.1f (%+.1f%%)", best[w], 100 * (best[w] / best[0] - 1));
    printf("\n");
    *own += n_step * best[0];
    *least += n_step * low;
}

static void total(const char *what, int32_t n_row, double own, double least) {
    printf("%s, %d rows: %.0f us a step, by the best way %.0f: the fixed order costs %.1f%%\n\n", what, n_row, own,
           least, 100 * (own / least - 1));
}

int main(int argc, char **argv) {
    const int rounds = argc > 1 ? atoi(argv[1]) : 9;
    ern_err err;
    kernels = cpu_kernels_for(ern_cpu_level_here());
    if (ern_pool_open(&pool, WORKERS, true, &err) != ERN_OK) return 2;
    ern_pool_enter(pool);
    memory = aligned_alloc(2 << 20, MEMORY);
    x = aligned_alloc(64, sizeof *x * ROWS_MAX * IN_MAX);
    for (int w = 0; w < WORKERS; w++) y[w] = aligned_alloc(64, sizeof **y * ROWS_MAX * OUT_MAX);
    scale = malloc(sizeof *scale * OUT_MAX);
    act =
        (cpu_act){aligned_alloc(64, (size_t)(2 * ROWS_MAX * cpu_act_stride(IN_MAX))),
                  aligned_alloc(64, sizeof(float) * ROWS_MAX * 64), aligned_alloc(64, sizeof(int32_t) * ROWS_MAX * 64)};
    part = aligned_alloc(64, sizeof *part * KV_HEADS * (LEN_MAX / CPU_ATTN_BLOCK + 1) * (size_t)cpu_part_floats(C));
    if (!memory || !x || !y[0] || !y[1] || !scale || !act.q || !act.scale || !act.sum || !part) return 2;
    (void)madvise(memory, MEMORY, MADV_HUGEPAGE);
    memset(memory, 0x3c, MEMORY);
    memset(act.q, 1, ROWS_MAX * IN_MAX);
    for (int i = 0; i < ROWS_MAX * 64; i++) act.scale[i] = 0.01f, act.sum[i] = 128;
    for (int i = 0; i < ROWS_MAX * IN_MAX; i++) x[i] = (float)(i % 17) * 0.01f;
    for (int i = 0; i < OUT_MAX; i++) scale[i] = ern_bf16_from_f32(0.01f);
    for (int i = 0; i < LEN_MAX / P; i++) page[i] = (i * 7 + 3) % (LEN_MAX / P);
    printf("%s, %s, %d threads, best of %d rounds\n", ern_cpu_name(), kernels->name, WORKERS, rounds);
    for (int bf16 = 0; bf16 < 2; bf16++)
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
            const int n_way = bf16 && rows[r] == 1 && kernels->level >= ERN_CPU_AVX512 ? 3 : 2;
            double own = 0, least = 0;
            printf("%s                        outputs      split K%s\n", bf16 ? "bf16" : "int8",
                   n_way > 2 ? "            8 chains" : "");
            for (int s = 0; s < SHAPES; s++) {
                double best[WAYS] = {NONE_US, NONE_US, NONE_US};
                for (int k = 0; k < rounds; k++)
                    for (int w = 0; w < n_way; w++) {
                        double us = call_us(&shapes[s], bf16, rows[r], w);
                        for (int again = 0; us >= NONE_US && again < TRIES; again++)
                            us = call_us(&shapes[s], bf16, rows[r], w);
                        best[w] = us < best[w] ? us : best[w];
                    }
                line(shapes[s].name, shapes[s].n_in, rows[r], best, n_way, shapes[s].n_step, &own, &least);
            }
            total(bf16 ? "bf16 linears" : "int8 linears", rows[r], own, least);
        }
    printf("attention, bf16 KV             blocks        heads             halves\n");
    for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
            double best[WAYS] = {NONE_US, NONE_US, NONE_US}, own = 0, least = 0;
            for (int i = 0; i < LEN_MAX / P; i++) page[i] = (i * 7 + 3) % (lengths[l] / P);
            for (int k = 0; k < rounds; k++)
                for (int w = 0; w < WAYS; w++) {
                    double us = attn_us(lengths[l], rows[r], w);
                    for (int again = 0; us >= NONE_US && again < TRIES; again++) us = attn_us(lengths[l], rows[r], w);
                    best[w] = us < best[w] ? us : best[w];
                }
            line("context", lengths[l], rows[r], best, WAYS, 18, &own, &least);
        }
    sink = y[0][0] + part[0];
    ern_pool_close(pool);
    return 0;
}
