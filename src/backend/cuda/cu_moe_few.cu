/* The feed-forward of a layer of experts for a row or a few, in one kernel: norm, router, choice, shared experts,
 * experts, their sum. Alone each of these is shorter than what lies between two kernels; here the weights stream all
 * the while.
 *
 * A block a multiprocessor, all at work at the same time. Its WORKERS walk through its share of four stages,
 *
 *      shared up | up | shared down | down
 *
 * each a run of jobs (a band of 16 outputs, or a pair of bands) of equal bytes for all blocks, as near as jobs allow.
 * A job is cut in chunks of a segment of a band or two; worker w has chunks w, w + WORKERS ... of the block's, through
 * all its jobs and stages, and asks for them `depth` ahead: a ring in shared memory, filled by the copy engine. What a
 * stage waits for is on its way while the stage before it streams:
 *
 *      shared up      needs the norm of x                      up      needs the choice as well
 *      shared down    needs all of shared up                   down    needs all of its expert's up
 *
 * SERVANTS do the rest. First they route: block e < E computes the logits of expert e (servant r of row r) and sends
 * them to all blocks, each of which then chooses for itself. Then servant 0 waits until all blocks have counted their
 * outputs of up and brings them to shared memory as the workers read them; the others add the partial sums of a job's
 * segments, in order, and write its outputs. When all blocks are done with down, each adds up its part of x.
 *
 * The sums are those of cu_norm, cu_route, cu_skinny_grouped and cu_combine, bit for bit.
 *
 * What a servant runs it runs once or a few times a launch, and its instructions come from far away each time: little
 * code is worth more than unrolled loops.
 *
 *   shared: ring [worker][depth][slot] | x [seg][4][4 rows] uint4, normed | h of the shared experts, the same
 *           | h of two tiles, the same | part [PARTS_AHEAD][segments of a job][row][16] f32
 *   Before there is any h, x in f32 [row][D] and a row of the router [D] lie in its place. */
#include "backend/cuda/cu_route.cuh"
#include "backend/cuda/cu_skinny_kernel.cuh"
#include "backend/cuda/cu_tensor.cuh"

enum {
    WORKERS = 16,
    SERVANTS = 4,
    WORKER_THREADS = 32 * WORKERS,
    SERVANT_THREADS = 32 * SERVANTS,
    THREADS = WORKER_THREADS + SERVANT_THREADS,
    ROWS_MAX = SERVANTS,
    ENTRIES_MAX = 32,  /* rows times experts of a row: tiles, too */
    EXPERTS_MAX = 64,  /* a lane has two */
    SEGMENTS_MAX = 32, /* of a linear: a lane has the scales of two */
    FINISHERS = SERVANTS - 1,
    PARTS_AHEAD = 2 * FINISHERS, /* jobs whose parts find room */
    DEPTH_MAX = 6,
    SHARED_LIMIT = 227 * 1024, /* of a block */
    DEVICES_MAX = 16,
    LOOKS_MAX = 1 << 26,
};
enum { SHARED_UP, UP, SHARED_DOWN, DOWN, STAGES };
/* Words in global memory, all zero between two launches: blocks that are done; finishers that are done with all downs;
 * jobs of shared up and of each tile's up that are done; logits, as mail_send has them. */
enum { COUNT_LEFT, COUNT_DONE, COUNT_UP, MAIL = 64, COUNTS = MAIL + ROWS_MAX * EXPERTS_MAX };
static_assert(COUNT_UP + 1 + ENTRIES_MAX <= MAIL && (int)COUNTS == (int)CU_FEW_COUNTS, "");

/* Segments of a chunk, bytes of a slot. */
static __host__ __device__ constexpr int few_chunk(cu_format f) { return f == CU_BF16 ? 1 : 2; }
static __host__ __device__ constexpr int few_unit(cu_format f) {
    return f == CU_BF16 ? 4096 : f == CU_I4 ? 1024 : 2048;
}
static __host__ __device__ constexpr int few_slot(cu_format shared, cu_format expert) {
    return few_unit(shared) * few_chunk(shared) > few_unit(expert) * few_chunk(expert)
               ? few_unit(shared) * few_chunk(shared)
               : few_unit(expert) * few_chunk(expert);
}

typedef struct few_linear {
    int32_t n_job, n_seg, n_chunk; /* of one matrix; chunks of a band */
    int32_t n_out;
} few_linear;

typedef struct few_args {
    cu_few_job j;
    few_linear stage[STAGES];
    int32_t depth, n_part, part_at; /* slots of a worker; segments of a job, at most; bytes before part */
} few_args;

/* A stage of one block: its jobs, counted through all matrices. */
typedef struct few_run {
    int32_t from, to, n_per; /* n_per: chunks of a job */
} few_run;

typedef struct few_shared {
    uint64_t full[WORKERS * DEPTH_MAX]; /* a slot of the ring has come */
    uint64_t summed[PARTS_AHEAD];       /* the parts of a job are read */
    uint64_t whole[PARTS_AHEAD];        /* ... are written */
    uint64_t routed;
    uint64_t h_here[3]; /* of the shared experts, of the first tile, of the second */
    few_run run[STAGES];
    int32_t n_tile;
    uint8_t chosen[ENTRIES_MAX], entry_place[ENTRIES_MAX], place_row[ENTRIES_MAX];
    float share[ENTRIES_MAX];
    int32_t tile_place[ENTRIES_MAX + 1];
    const unsigned char *pack[2][ENTRIES_MAX]; /* by tile: up, down */
    const float *scale[2][ENTRIES_MAX];
} few_shared;

/* ---- barriers in shared memory ----------------------------------------------------------------------------------- */

/* Whether it has come: at once, and after a while of waiting if it has not. */
#define BAR_LOOK(name, how)                                                               \
    static __device__ __forceinline__ bool name(uint64_t *bar, uint32_t parity) {         \
        uint32_t done;                                                                    \
        asm volatile("{\n.reg .pred p;\n"                                                 \
                     "mbarrier." how ".parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n" \
                     "selp.u32 %0, 1, 0, p;\n}\n"                                         \
                     : "=r"(done)                                                         \
                     : "r"(skinny_shared(bar)), "r"(parity)                               \
                     : "memory");                                                         \
        return done != 0;                                                                 \
    }
BAR_LOOK(bar_passed, "test_wait")
BAR_LOOK(bar_passed_soon, "try_wait")
/* Waits end: what has not come after so many looks never comes, and an error is better than a launch without end. */
static __device__ __forceinline__ void few_wait(uint64_t *bar, uint32_t parity) {
    for (int k = 0; !bar_passed_soon(bar, parity); k++)
        if (k > LOOKS_MAX) __trap();
}

/* ---- counts in global memory ------------------------------------------------------------------------------------- */

/* By a warp: who sees the count sees what its lanes have written. */
static __device__ __forceinline__ void count_up(int32_t *count, int32_t n, int lane) {
    __syncwarp();
    if (lane == 0) asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(count), "r"(n) : "memory");
}
static __device__ __forceinline__ void count_wait(const int32_t *count, int32_t n) {
    int32_t now;
    int k = 0;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(count) : "memory");
        if (++k > LOOKS_MAX) __trap();
    } while (now < n);
}
/* A logit is its own message: its bits turned round, so that 0 is none (a NaN that no sum gives). */
static __device__ __forceinline__ void mail_send(int32_t *mail, float f) {
    const uint32_t bits = __float_as_uint(f);
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(mail), "r"(~(bits == 0xffffffffu ? 0x7fffffffu : bits))
                 : "memory");
}
static __device__ __forceinline__ float mail_wait(const int32_t *mail) {
    uint32_t now;
    int k = 0;
    do {
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(mail) : "memory");
        if (++k > LOOKS_MAX) __trap();
    } while (now == 0);
    return __uint_as_float(~now);
}

/* ---- shares ------------------------------------------------------------------------------------------------------ */

/* Block b's part of n jobs of all blocks. */
static __device__ __forceinline__ few_run run_even(int32_t b, int32_t n_block, int32_t n) {
    return {b * n / n_block, (b + 1) * n / n_block, 0};
}
/* The first job of block b among n_expert jobs of cost ce, where the blocks before it have their part of n_shared jobs
 * of cost cs: so that both together are even. */
static __device__ __forceinline__ int32_t run_start(int32_t b, int32_t n_block, int32_t n_shared, int32_t cs, int32_t n,
                                                    int32_t ce) {
    const int32_t all = n_shared * cs + n * ce;
    if ((n_shared + n_block - 1) / n_block * cs > all / n_block) return b * n / n_block; /* would not ascend */
    const int32_t cost = b * all / n_block - b * n_shared / n_block * cs;
    return min(max((cost + ce / 2) / ce, 0), n);
}
/* The runs of the experts' stages, a lane a bound. */
static __device__ __forceinline__ void runs_set(few_shared *s, const few_args *a, int lane) {
    if (lane >= 4) return;
    const int32_t k = lane < 2 ? UP : DOWN, n = (int32_t)gridDim.x, b = (int32_t)blockIdx.x + lane % 2;
    const few_linear *sh = &a->stage[k - 1], *ex = &a->stage[k];
    const int32_t all = s->n_tile * ex->n_job;
    const int32_t at = b == n ? all : b == 0 ? 0 : run_start(b, n, sh->n_job, sh->n_seg, all, ex->n_seg);
    *(lane % 2 ? &s->run[k].to : &s->run[k].from) = at;
}

/* A place among the block's chunks. job: in the stage's run; seq: jobs of the block before it. */
typedef struct few_walk {
    int32_t stage, job, chunk, seq;
} few_walk;
/* From a chunk beyond the end of its job to the right one; up to the beginning of UP if that is not known yet. */
static __device__ __forceinline__ void walk_settle(few_walk *w, const few_shared *s, bool known) {
    while (w->stage < STAGES) {
        const few_run run = s->run[w->stage];
        while (w->job < run.to && w->chunk >= run.n_per) {
            w->chunk -= run.n_per;
            w->job++;
            w->seq++;
        }
        if (w->job < run.to) return;
        w->stage++;
        if (w->stage == UP && !known) return;
        if (w->stage < STAGES) w->job = s->run[w->stage].from;
    }
}
/* What walk_settle has left open. */
static __device__ __forceinline__ void walk_known(few_walk *w, const few_shared *s) {
    if (w->stage != UP) return;
    w->job = s->run[UP].from;
    walk_settle(w, s, true);
}

/* ---- servants ---------------------------------------------------------------------------------------------------- */

/* Where the weights of an expert lie. */
typedef struct few_expert {
    const unsigned char *pack[2]; /* up, down */
    const float *scale[2];
} few_expert;
static __device__ __forceinline__ few_expert expert_at(const cu_few_job *j, int32_t e) {
    if (e >= j->n_expert) return {};
    const cu_linear *up = &j->experts_up[e], *down = &j->experts_down[e];
    return {{(const unsigned char *)up->pack, (const unsigned char *)down->pack}, {up->scale, down->scale}};
}

/* Servant 0, from chosen: tiles, places, where the weights lie. own: experts 2 lane and 2 lane + 1. */
static __device__ __forceinline__ void list_experts(few_shared *s, const few_args *a, const few_expert own[2],
                                                    int lane) {
    const int32_t K = a->j.n_used, n = a->j.route.n_row * K;
    int32_t count[2] = {0, 0};
#pragma unroll 1
    for (int32_t i = 0; i < n; i++) {
        count[0] += s->chosen[i] == 2 * lane;
        count[1] += s->chosen[i] == 2 * lane + 1;
    }
    int32_t place = count[0] + count[1], tile = (count[0] > 0) + (count[1] > 0);
    const int32_t own_place = place, own_tile = tile;
#pragma unroll 1
    for (int d = 1; d < 32; d <<= 1) {
        const int32_t p = __shfl_up_sync(0xffffffffu, place, d), t = __shfl_up_sync(0xffffffffu, tile, d);
        if (lane >= d) place += p, tile += t;
    }
    if (lane == 31) {
        s->n_tile = tile;
        s->tile_place[tile] = place;
    }
    place -= own_place;
    tile -= own_tile;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const int32_t e = 2 * lane + k;
        if (count[k] == 0) continue;
#pragma unroll
        for (int d = 0; d < 2; d++) {
            s->pack[d][tile] = own[k].pack[d];
            s->scale[d][tile] = own[k].scale[d];
        }
        s->tile_place[tile++] = place;
#pragma unroll 1
        for (int32_t i = 0; i < n; i++) {
            if (s->chosen[i] != e) continue;
            s->place_row[place] = (uint8_t)(i / K);
            s->entry_place[i] = (uint8_t)place++;
        }
    }
    __syncwarp();
    runs_set(s, a, lane);
    __syncwarp();
}

/* Logits, choice, lists. x: f32 rows in shared memory; w: the router's row of this block's expert there. */
static __device__ __forceinline__ void few_route(few_shared *s, const few_args *a, const float *x, const float *w,
                                                 const few_expert own[2], int servant, int lane) {
    const cu_route_job *j = &a->j.route;
    const int32_t E = a->j.n_expert, K = a->j.n_used, D = j->n_hidden, expert = (int32_t)blockIdx.x;
    int32_t *const mail = a->j.count + MAIL + servant * EXPERTS_MAX;
    if (servant < j->n_row && expert < E) {
        const float *row = x + servant * D;
        float logit;
        route_logits<1, 5>(&logit, &row, w, j->norm_w, D, j->eps);
        if (lane == 0) mail_send(mail + expert, logit);
    }
    if (servant < j->n_row) {
        float logit[2], share;
#pragma unroll
        for (int q = 0; q < 2; q++) logit[q] = lane + 32 * q < E ? mail_wait(mail + lane + 32 * q) : 0.0f;
        __syncwarp();
        const int32_t e = choose_row<2>(&share, logit, j->bias, j->norm_min, E, K);
        if (lane < K) {
            s->chosen[servant * K + lane] = (uint8_t)e;
            s->share[servant * K + lane] = share;
        }
    }
    cu_barrier(2, SERVANT_THREADS); /* nobody needs x or w any more */
    if (servant == 0) {
        list_experts(s, a, own, lane);
        if (lane == 0) bar_arrive(skinny_shared(&s->routed));
    }
    few_wait(&s->routed, 0);
}

/* n_row rows of n_seg segments, ldh apart, to shared memory as workers read them. */
static __device__ __forceinline__ void load_rows(uint4 *to, const cu_bf16 *h, int64_t ldh, int32_t n_seg, int32_t n_row,
                                                 int32_t xl, int lane) {
    const int32_t n = n_seg * (CU_SEGMENT / 8);
    uint32_t *const words = (uint32_t *)to;
#pragma unroll 1
    for (int32_t r = 0; r < n_row; r++) {
#pragma unroll 1
        for (int32_t p0 = lane; p0 < n; p0 += 256) {
            uint4 v[8];
#pragma unroll
            for (int k = 0; k < 8; k++)
                if (p0 + 32 * k < n) v[k] = cu_l2(h + r * ldh + (p0 + 32 * k) * 8);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const int32_t p = p0 + 32 * k;
                if (p >= n) continue;
                uint32_t *at = words + p / 16 * 16 * xl + skinny_chunk_at(p % 16, xl) + r * 16;
                at[0] = v[k].x, at[4] = v[k].y, at[8] = v[k].z, at[12] = v[k].w;
            }
        }
    }
    __syncwarp();
}

/* Servant 0: h of the shared experts and of the block's tiles, when they are there. */
static __device__ void few_bring(few_shared *s, const few_args *a, uint4 *shared_h, uint4 *tile_h, int lane) {
    const int32_t T = a->j.route.n_row, xl = 4 * T;
    const few_linear *sd = &a->stage[SHARED_DOWN], *d = &a->stage[DOWN];
    int32_t *const count = a->j.count;
    if (s->run[SHARED_DOWN].from < s->run[SHARED_DOWN].to) {
        count_wait(count + COUNT_UP, a->stage[SHARED_UP].n_job);
        load_rows(shared_h, a->j.shared_hid, sd->n_seg * CU_SEGMENT, sd->n_seg, T, xl, lane);
        if (lane == 0) bar_arrive(skinny_shared(&s->h_here[0]));
    }
    const few_run run = s->run[DOWN];
    if (run.from >= run.to) return;
    const int32_t first = run.from / d->n_job, last = (run.to - 1) / d->n_job;
#pragma unroll 1
    for (int32_t t = first; t <= last; t++) {
        const int32_t place = s->tile_place[t];
        count_wait(count + COUNT_UP + 1 + t, a->stage[UP].n_job);
        load_rows(tile_h + (t - first) * d->n_seg * 4 * xl, a->j.expert_hid + (int64_t)place * d->n_seg * CU_SEGMENT,
                  d->n_seg * CU_SEGMENT, d->n_seg, s->tile_place[t + 1] - place, xl, lane);
        if (lane == 0) bar_arrive(skinny_shared(&s->h_here[1 + t - first]));
    }
}

/* x += experts + shared, this block's part of all numbers, when all blocks are done. */
static __device__ __forceinline__ void few_combine(const few_shared *s, const few_args *a, int lane) {
    const int32_t T = a->j.route.n_row, K = a->j.n_used, D = a->j.route.n_hidden;
    const few_run part = run_even((int32_t)blockIdx.x, (int32_t)gridDim.x, T * D);
    count_wait(a->j.count + COUNT_DONE, (int32_t)gridDim.x * FINISHERS);
#pragma unroll 1
    for (int32_t i = part.from + lane; i < part.to; i += 32) {
        const int32_t r = i / D, out = i - r * D;
        const float old = cu_l2f(a->j.x + i);
        float y = 0.0f, v[8];
        const float sh = a->stage[SHARED_DOWN].n_job > 0 ? cu_l2f(a->j.shared_y + i) : 0.0f;
#pragma unroll
        for (int k = 0; k < 8; k++)
            v[k] = k < K ? cu_l2f(a->j.expert_y + (int64_t)s->entry_place[r * K + k] * D + out) : 0.0f;
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (k < K) y = __fmaf_rn(s->share[r * K + k], v[k], y);
        a->j.x[i] = __fadd_rn(old, __fadd_rn(y, sh));
    }
}

/* A job's partial sums to outputs, by a warp: a half warp has a half of a pair, or every second row. */
template <cu_format F>
static __device__ __forceinline__ void few_outputs(few_shared *s, const few_args *a, const float *part, int stage,
                                                   int32_t job, int32_t seq, int lane) {
    const int32_t T = a->j.route.n_row, o = lane % CU_BAND, half = lane / CU_BAND;
    const few_linear *l = &a->stage[stage];
    const bool pairs = stage == SHARED_UP || stage == UP, shared = stage == SHARED_UP || stage == SHARED_DOWN;
    const int32_t tile = shared ? 0 : job / l->n_job, band_job = job - tile * l->n_job, slot = seq % PARTS_AHEAD;
    const int32_t place = shared ? 0 : s->tile_place[tile], n_row = shared ? T : s->tile_place[tile + 1] - place;
    const int32_t out = band_job * CU_BAND + o, band = pairs ? 2 * band_job + half : band_job, n_seg = l->n_seg;
    const float *scale =
        shared ? (pairs ? a->j.shared_up.scale : a->j.shared_down.scale) : s->scale[pairs ? 0 : 1][tile];
    const float *from = part + (slot * a->n_part + (pairs ? half * n_seg : 0)) * T * CU_BAND;
    float by = 1.0f, by_segment[2] = {0.0f, 0.0f};
    if (F == CU_I8 || F == CU_I4) by = scale[band * CU_BAND + o];
    if (F == CU_F8) { /* a half warp has 16 of its band each time */
        by_segment[0] = o < n_seg ? scale[band * n_seg + o] : 0.0f;
        by_segment[1] = o + 16 < n_seg ? scale[band * n_seg + o + 16] : 0.0f;
    }
    few_wait(&s->whole[slot], seq / PARTS_AHEAD & 1);
#pragma unroll 1
    for (int32_t r0 = 0; r0 < n_row; r0 += pairs ? 1 : 2) {
        const int32_t r = pairs ? r0 : r0 + half;
        const float *p = from + skinny_part_at(min(r, n_row - 1), o);
        float sum = 0.0f;
#pragma unroll 1
        for (int32_t i0 = 0; i0 < n_seg; i0 += 4) { /* four loads before the first sum */
            float segment[4];
#pragma unroll
            for (int i = 0; i < 4; i++) segment[i] = p[min(i0 + i, n_seg - 1) * T * CU_BAND];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float next = __fadd_rn(segment[i], sum);
                if (F == CU_F8) {
                    const float held = i0 + i < 16 ? by_segment[0] : by_segment[1];
                    next = __fmaf_rn(__shfl_sync(0xffffffffu, held, half * 16 + (i0 + i) % 16), segment[i], sum);
                }
                sum = i0 + i < n_seg ? next : sum;
            }
        }
        if (F == CU_I8 || F == CU_I4) sum = __fmul_rn(sum, by);
        if (pairs) {
            const float up = __shfl_down_sync(0xffffffffu, sum, CU_BAND);
            cu_bf16 *h = shared ? a->j.shared_hid : a->j.expert_hid;
            if (half == 0 && out < l->n_out)
                h[(int64_t)(place + r) * CU_PAD(l->n_out) + out] = cu_round(cu_swiglu(sum, up));
        } else if (r < n_row && out < l->n_out) {
            float *y = shared ? a->j.shared_y : a->j.expert_y;
            y[(int64_t)(place + r) * l->n_out + out] = sum;
        }
    }
    __syncwarp();
    if (lane == 0) bar_arrive(skinny_shared(&s->summed[slot]));
}

/* Servants 1..3: every third job of the block, then the sum. A count costs a way to memory and back: one a tile. */
template <cu_format FS, cu_format FE>
static __device__ __forceinline__ void few_finish(few_shared *s, const few_args *a, const float *part, int finisher,
                                                  int lane) {
    int32_t seq = 0;
#pragma unroll 1
    for (int stage = 0; stage < STAGES; stage++) {
        const few_run run = s->run[stage];
        int32_t tile = 0, n = 0; /* done of this tile, not counted yet */
#pragma unroll 1
        for (int32_t job = run.from; job < run.to; job++, seq++) {
            if (seq % FINISHERS != finisher) continue;
            if (stage == UP && job / a->stage[UP].n_job != tile) {
                if (n > 0) count_up(a->j.count + COUNT_UP + 1 + tile, n, lane);
                tile = job / a->stage[UP].n_job;
                n = 0;
            }
            if (FS == FE || stage == UP || stage == DOWN)
                few_outputs<FE>(s, a, part, stage, job, seq, lane);
            else
                few_outputs<FS>(s, a, part, stage, job, seq, lane);
            n++;
        }
        if (n > 0 && stage == SHARED_UP) count_up(a->j.count + COUNT_UP, n, lane);
        if (n > 0 && stage == UP) count_up(a->j.count + COUNT_UP + 1 + tile, n, lane);
    }
    count_up(a->j.count + COUNT_DONE, 1, lane);
    if (finisher == 0) few_combine(s, a, lane);
}

/* ---- workers ----------------------------------------------------------------------------------------------------- */

/* The norm of x, f32 rows in shared memory, as workers read it: a worker its segments. */
static __device__ __forceinline__ void few_norm(uint4 *xs, const float *x, const cu_route_job *j, int worker,
                                                int lane) {
    const int32_t D = j->n_hidden, xl = 4 * j->n_row;
#pragma unroll 1
    for (int32_t r = 0; r < j->n_row; r++) {
        const float scale = cu_norm_scale(cu_sum_squares(x + r * D, D), D, j->eps);
        for (int32_t i = worker * CU_SEGMENT + lane * 4; i < D; i += WORKERS * CU_SEGMENT) {
            const float4 v = *(const float4 *)(x + r * D + i);
            const uint2 w = *(const uint2 *)(j->norm_w + i);
            uint32_t *at =
                (uint32_t *)xs + i / CU_SEGMENT * 16 * xl + skinny_chunk_at(lane / 2, xl) + lane % 2 * 8 + r * 16;
            at[0] =
                cu_round2(cu_normed(v.x, scale, (cu_bf16)(w.x & 0xffff)), cu_normed(v.y, scale, (cu_bf16)(w.x >> 16)));
            at[4] =
                cu_round2(cu_normed(v.z, scale, (cu_bf16)(w.y & 0xffff)), cu_normed(v.w, scale, (cu_bf16)(w.y >> 16)));
        }
    }
}

/* Ask for a chunk. */
template <cu_format FS, cu_format FE>
static __device__ __forceinline__ void few_ask(few_shared *s, const few_args *a, const few_walk *w, unsigned char *slot,
                                               uint64_t *full, int lane) {
    const few_linear *l = &a->stage[w->stage];
    const bool pairs = w->stage == SHARED_UP || w->stage == UP,
               shared = w->stage == SHARED_UP || w->stage == SHARED_DOWN;
    const int32_t tile = shared ? 0 : w->job / l->n_job, job = w->job - tile * l->n_job;
    const int32_t chunk = shared ? few_chunk(FS) : few_chunk(FE), unit = shared ? few_unit(FS) : few_unit(FE);
    const int32_t second = w->chunk >= l->n_chunk, seg = (w->chunk - (second ? l->n_chunk : 0)) * chunk;
    const unsigned char *pack = shared ? (const unsigned char *)(pairs ? a->j.shared_up.pack : a->j.shared_down.pack)
                                       : s->pack[pairs ? 0 : 1][tile];
    const unsigned char *from = pack + (int64_t)(((job << pairs) + second) * l->n_seg + seg) * unit;
    const int32_t bytes = min(chunk, l->n_seg - seg) * unit;
    const uint32_t bar = skinny_shared(full);
    if (lane == 0) {
        bar_arrive_expect(bar, bytes);
        copy_bulk_once(skinny_shared(slot), from, bytes, bar);
    }
}

/* The products of a chunk of one segment or two. slot, x: with the lane added. two: there is a second. */
template <cu_format F>
static __device__ __forceinline__ void few_products(float *to, const unsigned char *slot, const uint4 *x, int32_t T,
                                                    int32_t n_row, bool two, int g, int c) {
    const int32_t xl = 4 * T;
    if constexpr (F == CU_BF16) {
        float acc[4];
        skinny_segment<F>(acc, slot, x, xl, g < n_row);
        skinny_put(to, acc, n_row, g, c);
    } else {
        float acc[2][4];
        const unsigned char *slots[2] = {slot, slot + (two ? few_unit(F) : 0)};
        const uint4 *xk[2] = {x, x + (two ? 4 * xl : 0)};
        skinny_two<F>(acc, slots, xk, xl, g < n_row);
        skinny_put(to, acc[0], n_row, g, c);
        if (two) skinny_put(to + T * CU_BAND, acc[1], n_row, g, c);
    }
}

template <cu_format FS, cu_format FE>
static __device__ __forceinline__ void few_work(few_shared *s, const few_args *a, unsigned char *ring, few_walk ask,
                                                int32_t asked, const uint4 *xs, const uint4 *shared_h,
                                                const uint4 *tile_h, float *part, int worker, int lane) {
    const int SLOT = few_slot(FS, FE);
    const int32_t T = a->j.route.n_row, xl = 4 * T, g = lane / 4, c = lane % 4;
    uint64_t *const full = s->full + worker * DEPTH_MAX;
    few_walk w = {SHARED_UP, s->run[SHARED_UP].from, worker, 0};
    bool known = false;
    walk_settle(&w, s, false);
    int32_t used = 0, used_slot = 0, used_parity = 0, ask_slot = asked % a->depth, entered = -1;
    for (;;) {
        if (!known && __all_sync(0xffffffffu, bar_passed(&s->routed, 0))) {
            known = true;
            walk_known(&w, s);
            walk_known(&ask, s);
        }
        while (asked - used < a->depth && ask.stage < STAGES && (known || ask.stage == SHARED_UP)) {
            few_ask<FS, FE>(s, a, &ask, ring + ask_slot * SLOT, full + ask_slot, lane);
            ask_slot = ask_slot + 1 == a->depth ? 0 : ask_slot + 1;
            asked++;
            ask.chunk += WORKERS;
            walk_settle(&ask, s, known);
        }
        while (entered < w.seq) { /* this worker is done with the jobs before */
            if (entered >= 0 && lane == 0) bar_arrive(skinny_shared(&s->whole[entered % PARTS_AHEAD]));
            entered++;
            if (entered >= PARTS_AHEAD && (w.stage < STAGES || entered < w.seq))
                few_wait(&s->summed[entered % PARTS_AHEAD], (entered / PARTS_AHEAD - 1) & 1);
        }
        if (w.stage == STAGES) break;
        if (w.stage == UP && !known) { /* nothing else to do */
            few_wait(&s->routed, 0);
            continue;
        }
        const few_linear *l = &a->stage[w.stage];
        const bool pairs = w.stage == SHARED_UP || w.stage == UP,
                   shared = w.stage == SHARED_UP || w.stage == SHARED_DOWN;
        const int32_t second = w.chunk >= l->n_chunk,
                      seg = (w.chunk - (second ? l->n_chunk : 0)) * (shared ? few_chunk(FS) : few_chunk(FE));
        int32_t n_row = T, column = g;
        const uint4 *x = xs;
        if (w.stage == SHARED_DOWN) {
            few_wait(&s->h_here[0], 0);
            x = shared_h;
        } else if (w.stage != SHARED_UP) {
            const int32_t tile = w.job / l->n_job, place = s->tile_place[tile];
            n_row = s->tile_place[tile + 1] - place;
            if (pairs) {
                column = g < n_row ? s->place_row[place + g] : 0;
            } else {
                const int32_t nth = tile - s->run[DOWN].from / l->n_job;
                few_wait(&s->h_here[1 + nth], 0);
                x = tile_h + nth * l->n_seg * 4 * xl;
            }
        }
        x += seg * 4 * xl + 4 * column + c;
        float *to = part + ((entered % PARTS_AHEAD) * a->n_part + second * l->n_seg + seg) * T * CU_BAND;
        const unsigned char *slot = ring + used_slot * SLOT + lane * 16;
        few_wait(full + used_slot, used_parity);
        if (FS == FE || !shared)
            few_products<FE>(to, slot, x, T, n_row, seg + 1 < l->n_seg, g, c);
        else
            few_products<FS>(to, slot, x, T, n_row, seg + 1 < l->n_seg, g, c);
        __syncwarp(); /* the slot is read, the parts are written */
        used++;
        if (++used_slot == a->depth) {
            used_slot = 0;
            used_parity ^= 1;
        }
        w.chunk += WORKERS;
        walk_settle(&w, s, known);
    }
}

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

template <cu_format FS, cu_format FE>
static __global__ void __launch_bounds__(THREADS, 1) moe_few(const __grid_constant__ few_args a) {
    extern __shared__ __align__(128) uint4 few_memory[];
    __shared__ few_shared s;
    const int thread = threadIdx.x, lane = thread & 31;
    const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    const cu_route_job *j = &a.j.route;
    const int32_t T = j->n_row, D = j->n_hidden, xl = 4 * T, n_block = (int32_t)gridDim.x;
    unsigned char *const ring = (unsigned char *)few_memory + (warp % WORKERS) * a.depth * few_slot(FS, FE);
    uint4 *const xs = few_memory + WORKERS * a.depth * few_slot(FS, FE) / 16;
    uint4 *const shared_h = xs + a.stage[UP].n_seg * 4 * xl, *const tile_h =
                                                                 shared_h + a.stage[SHARED_DOWN].n_seg * 4 * xl;
    float *const raw = (float *)shared_h, *const router = raw + T * D;
    float *const part = (float *)((unsigned char *)few_memory + a.part_at);

    cu_launch_next();
    for (int k = thread; k < WORKERS * DEPTH_MAX; k += THREADS) bar_init(skinny_shared(&s.full[k]), 1);
    if (thread < PARTS_AHEAD) {
        bar_init(skinny_shared(&s.whole[thread]), WORKERS);
        bar_init(skinny_shared(&s.summed[thread]), 1);
    }
    if (thread < 3) bar_init(skinny_shared(&s.h_here[thread]), 1);
    if (thread == PARTS_AHEAD) bar_init(skinny_shared(&s.routed), 1);
    bar_init_end();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (thread == 32)
        for (int k = 0; k < STAGES; k += 2) s.run[k] = run_even((int32_t)blockIdx.x, n_block, a.stage[k].n_job);
    __syncwarp();
    if (thread >= 32 && thread < 32 + STAGES) {
        const int k = thread - 32;
        s.run[k].n_per = a.stage[k].n_chunk << (k == SHARED_UP || k == UP);
    }
    __syncthreads();
    few_walk ask = {SHARED_UP, s.run[SHARED_UP].from, warp, 0};
    few_expert own[2] = {};
    int32_t asked = 0;
    if (warp < WORKERS) {
        walk_settle(&ask, &s, false);
        while (asked < a.depth && ask.stage == SHARED_UP) {
            few_ask<FS, FE>(&s, &a, &ask, ring + asked * few_slot(FS, FE), s.full + warp * DEPTH_MAX + asked, lane);
            asked++;
            ask.chunk += WORKERS;
            walk_settle(&ask, &s, false);
        }
    } else {
        const int t = thread - WORKER_THREADS;
        const int32_t expert = (int32_t)blockIdx.x;
        if (expert < a.j.n_expert)
#pragma unroll 1
            for (int32_t i = t * 4; i < D; i += SERVANT_THREADS * 4)
                skinny_copy16(skinny_shared(router + i), j->router + (int64_t)expert * D + i);
        if (t < 32)
            for (int k = 0; k < 2; k++) own[k] = expert_at(&a.j, 2 * lane + k);
    }
    for (int32_t i = thread * 4; i < D; i += THREADS * 4) { /* norm_w to L1 */
        uint2 w;
        asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(w.x), "=r"(w.y) : "l"(j->norm_w + i));
    }
    cu_wait_previous();
#pragma unroll 1
    for (int32_t i = thread * 4; i < T * D; i += THREADS * 4) skinny_copy16(skinny_shared(raw + i), j->x + i);
    skinny_commit();
    skinny_wait<0>();
    __syncthreads();
    if (warp < WORKERS) {
        few_norm(xs, raw, j, warp, lane);
        asm volatile("bar.arrive 3, %0;" ::"r"((int)THREADS) : "memory"); /* x is no longer needed */
        cu_barrier(1, WORKER_THREADS);
        few_work<FS, FE>(&s, &a, ring, ask, asked, xs, shared_h, tile_h, part, warp, lane);
    } else {
        const int servant = warp - WORKERS;
        few_route(&s, &a, raw, router, own, servant, lane);
        cu_barrier(3, THREADS);
        if (servant == 0)
            few_bring(&s, &a, shared_h, tile_h, lane);
        else
            few_finish<FS, FE>(&s, &a, part, servant - 1, lane);
    }
    __syncthreads();
    if (warp > 0) return;
    int32_t left = 0;
    if (lane == 0) left = atomicAdd(a.j.count + COUNT_LEFT, 1);
    if (__shfl_sync(0xffffffffu, left, 0) == n_block - 1)
        for (int k = lane; k < COUNTS; k += 32) a.j.count[k] = 0;
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

typedef struct few_kernel {
    cu_format shared, expert;
    const void *fn;
} few_kernel;
static const few_kernel kernels[] = {
    {CU_BF16, CU_BF16, (const void *)moe_few<CU_BF16, CU_BF16>}, {CU_I8, CU_I8, (const void *)moe_few<CU_I8, CU_I8>},
    {CU_I4, CU_I4, (const void *)moe_few<CU_I4, CU_I4>},         {CU_F8, CU_F8, (const void *)moe_few<CU_F8, CU_F8>},
    {CU_I8, CU_I4, (const void *)moe_few<CU_I8, CU_I4>},
};
enum { KERNELS = sizeof kernels / sizeof *kernels };

/* NULL: none for these formats. */
static const few_kernel *kernel_of(const cu_few_job *j) {
    for (int k = 0; k < KERNELS; k++)
        if (kernels[k].expert == j->up.format && (j->shared_up.n_out == 0 || kernels[k].shared == j->shared_up.format))
            return &kernels[k];
    return NULL;
}

/* Of a block, beside few_shared; what is declared __shared__ takes multiples of 128 bytes. */
static const int SHARED_DYNAMIC = SHARED_LIMIT - ((int)sizeof(few_shared) + 127) / 128 * 128;

/* Blocks of a launch, 0: it cannot be done. Asked for once a device, before the first launch on it. */
static int32_t few_blocks(void) {
    static int32_t blocks[DEVICES_MAX]; /* one more, 0: not asked yet */
    int id, n = 0;
    if (cudaGetDevice(&id) != cudaSuccess || id >= DEVICES_MAX) return 0;
    if (blocks[id]) return blocks[id] - 1;
    cudaError_t e = cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, id);
    for (int k = 0; k < KERNELS && e == cudaSuccess; k++)
        e = cudaFuncSetAttribute(kernels[k].fn, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_DYNAMIC);
    if (e != cudaSuccess) n = 0;
    blocks[id] = n + 1;
    return n;
}

static few_linear few_linear_of(const cu_linear *w, int32_t chunk) {
    if (!w->pack && !w->n_out) return (few_linear){};
    return (few_linear){w->n_band >> w->pairs, w->n_seg, (w->n_seg + chunk - 1) / chunk, w->n_out};
}

/* Fill in the sizes; returns bytes of shared memory, 0: does not fit. */
static size_t few_plan(few_args *a, const few_kernel *k) {
    const cu_few_job *j = &a->j;
    const int32_t T = j->route.n_row, D = j->route.n_hidden;
    a->stage[SHARED_UP] = few_linear_of(&j->shared_up, few_chunk(k->shared));
    a->stage[UP] = few_linear_of(&j->up, few_chunk(k->expert));
    a->stage[SHARED_DOWN] = few_linear_of(&j->shared_down, few_chunk(k->shared));
    a->stage[DOWN] = few_linear_of(&j->down, few_chunk(k->expert));
    const int32_t sd = a->stage[SHARED_DOWN].n_seg, d = a->stage[DOWN].n_seg, up = a->stage[UP].n_seg;
    a->n_part = 2 * up > sd ? 2 * up : sd;
    if (d > a->n_part) a->n_part = d;
    const size_t x = (size_t)up * 256 * (size_t)T, h = (size_t)(sd + 2 * d) * 256 * (size_t)T;
    const size_t before = (size_t)(T + 1) * (size_t)D * sizeof(float);
    const size_t part = (size_t)(PARTS_AHEAD * a->n_part * T * CU_BAND) * sizeof(float);
    const size_t rest = x + (h > before ? h : before) + part, limit = (size_t)SHARED_DYNAMIC;
    const size_t slots = (size_t)WORKERS * (size_t)few_slot(k->shared, k->expert);
    if (rest + 2 * slots > limit) return 0;
    const size_t depth = (limit - rest) / slots;
    a->depth = depth > DEPTH_MAX ? DEPTH_MAX : (int32_t)depth;
    const size_t bytes = rest + (size_t)a->depth * slots;
    a->part_at = (int32_t)(bytes - part);
    return bytes;
}

bool cu_moe_few_fits(const cu_few_job *j) {
    few_args a = {};
    a.j = *j;
    const int32_t T = j->route.n_row, D = j->route.n_hidden, n_block = few_blocks();
    const bool shared = j->shared_up.n_out > 0;
    if (T > ROWS_MAX || T * j->n_used > ENTRIES_MAX || j->n_used > 8 || j->n_expert > EXPERTS_MAX) return false;
    if (j->n_expert > n_block || 4 * ENTRIES_MAX > n_block) return false;
    const few_kernel *k = kernel_of(j);
    if (!k || j->down.format != j->up.format || j->shared_down.format != j->shared_up.format) return false;
    if (D % CU_SEGMENT != 0 || j->down.n_out != D) return false;
    if (j->up.n_seg > SEGMENTS_MAX || j->down.n_seg > SEGMENTS_MAX) return false;
    if (shared && (j->shared_down.n_seg > SEGMENTS_MAX || j->shared_down.n_seg > 4 * j->down.n_seg)) return false;
    return few_plan(&a, k) > 0;
}

cudaError_t cu_moe_few(cudaStream_t s, const cu_few_job *j) {
    few_args a = {};
    a.j = *j;
    if (j->route.n_row <= 0) return cudaSuccess;
    if (!cu_moe_few_fits(j)) return cudaErrorInvalidValue;
    const few_kernel *k = kernel_of(j);
    const size_t bytes = few_plan(&a, k);
    void *args[] = {&a};
    return cu_launch(s, k->fn, dim3((unsigned)few_blocks()), THREADS, bytes, true, 1, args);
}
