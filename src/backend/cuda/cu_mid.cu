/* Linears of 9 to some hundred rows, plain and of experts: how the work of cu_mid_kernel.cuh is cut. By shape and
 * number of rows for speed alone; the sums are the same however it is cut. */
#include "backend/cuda/cu_mid_kernel.cuh"

enum {
    SHARED_ONE = 225 * 1024, /* of a block alone on its multiprocessor, what the kernel holds besides left out */
    SHARED_TWO = 112 * 1024, /* of one of two */
    HEIGHTS = 3,             /* tiles of 16, 32 and 64 rows */
};

static const void *const kernels[CU_PLAIN_FORMATS][HEIGHTS][2] = {
    {{(const void *)mid_kernel<CU_BF16, 16, false>, (const void *)mid_kernel<CU_BF16, 16, true>},
     {(const void *)mid_kernel<CU_BF16, 32, false>, (const void *)mid_kernel<CU_BF16, 32, true>},
     {(const void *)mid_kernel<CU_BF16, 64, false>, (const void *)mid_kernel<CU_BF16, 64, true>}},
    {{(const void *)mid_kernel<CU_I8, 16, false>, (const void *)mid_kernel<CU_I8, 16, true>},
     {(const void *)mid_kernel<CU_I8, 32, false>, (const void *)mid_kernel<CU_I8, 32, true>},
     {(const void *)mid_kernel<CU_I8, 64, false>, (const void *)mid_kernel<CU_I8, 64, true>}},
    {{(const void *)mid_kernel<CU_I4, 16, false>, (const void *)mid_kernel<CU_I4, 16, true>},
     {(const void *)mid_kernel<CU_I4, 32, false>, (const void *)mid_kernel<CU_I4, 32, true>},
     {(const void *)mid_kernel<CU_I4, 64, false>, (const void *)mid_kernel<CU_I4, 64, true>}},
    {{(const void *)mid_kernel<CU_F8, 16, false>, (const void *)mid_kernel<CU_F8, 16, true>},
     {(const void *)mid_kernel<CU_F8, 32, false>, (const void *)mid_kernel<CU_F8, 32, true>},
     {(const void *)mid_kernel<CU_F8, 64, false>, (const void *)mid_kernel<CU_F8, 64, true>}},
};

static int32_t ceil_div(int64_t a, int64_t b) { return (int32_t)((a + b - 1) / b); }
static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

typedef struct mid_plan {
    int32_t n_pair, n_rank, n_slot, n_each, n_pass;
    int64_t bytes; /* of shared memory */
} mid_plan;

/* The ring and the sums of n_pair pairs of bands and n_rank blocks to a tile of so many rows; false: no room. */
static bool plan_for(mid_plan *p, const cu_linear *w, int rows, int64_t shared) {
    const int64_t slot = p->n_pair * 4 * cu_group_bytes(w->format) + mid_x_bytes(rows);
    const int64_t sums = p->n_rank == 1 ? 0 : p->n_pair * rows * 128; /* of a segment: CU_BAND * 2 f32 a row */
    const int32_t n_own = ceil_div(w->n_seg, p->n_rank), few = least(n_own, 2);
    p->n_each = p->n_rank == 1 ? w->n_seg : n_own;
    p->n_pass = 1;
    if (few * slot + n_own * sums > shared) {
        if (p->n_rank == 1) return false;
        p->n_each = (int32_t)((shared - few * slot) / (2 * sums));
        if (p->n_each < 1) return false;
        p->n_pass = ceil_div(w->n_seg, p->n_each * p->n_rank);
    }
    const int64_t all = (p->n_pass > 1 ? 2 : 1) * p->n_each * sums * (p->n_rank > 1);
    p->n_slot = least(least(n_own, MID_SLOTS_MAX), (int32_t)((shared - all) / slot));
    p->bytes = p->n_slot * slot + all;
    return true;
}

/* What a plan takes, in cycles of a multiprocessor and without what all plans need, to compare plans: fitted to the
 * times of all of them for the matrices of both models at 16 .. 256 rows on an H200. Clusters do not fit everywhere. */
static int64_t cost_of(const mid_plan *p, const cu_linear *w, int rows, int32_t n_tile_row, int32_t n_core) {
    const int32_t n_pair = ceil_div(w->n_band, 2), n_own = ceil_div(w->n_seg, p->n_rank);
    const int64_t n_block = (int64_t)ceil_div(n_pair, p->n_pair) * n_tile_row * p->n_rank;
    const int32_t n_room = p->n_rank == 8 ? n_core * 28 / 33 : p->n_rank == 4 ? n_core * 10 / 11 : n_core;
    const int64_t load = (p->n_pair * 4 * cu_group_bytes(w->format) + mid_x_bytes(rows)) / 20;
    const int64_t multiply = (int64_t)p->n_pair * 32 * rows * CU_SEGMENT / 500;
    const int64_t send = p->n_rank > 1 ? p->n_pair * rows * 128 / 24 : 0;
    const int64_t segment = (load > multiply ? load : multiply) + send + (n_block <= n_core ? 200 : 100);
    return ceil_div(n_block, n_room) * n_own * segment +
           (p->n_rank > 1 ? 2000 + 200 * p->n_rank + 2000 * (p->n_pass - 1) : 0);
}

static void plan(mid_plan *best, const cu_linear *w, int rows, int32_t n_tile_row, int32_t n_core) {
    const int32_t n_pair = ceil_div(w->n_band, 2), most = mid_warps_max(rows) / mid_parts(rows);
    int64_t best_cost = INT64_MAX;
    for (int32_t m = 1; m <= most && m <= n_pair; m++)
        for (int32_t n_rank = 1; n_rank <= MID_RANKS_MAX && n_rank <= w->n_seg; n_rank *= 2) {
            if (n_rank > 1 && m * (rows / 8) % n_rank != 0) continue;
            const int64_t n_block = (int64_t)ceil_div(n_pair, m) * n_tile_row * n_rank;
            mid_plan p = {m, n_rank, 0, 0, 0, 0};
            if (!plan_for(&p, w, rows, n_block <= n_core ? SHARED_ONE : SHARED_TWO)) continue;
            const int64_t cost = cost_of(&p, w, rows, n_tile_row, n_core);
            if (cost < best_cost) best_cost = cost, *best = p;
        }
}

static cudaError_t launch(cudaStream_t s, mid_args *a, const mid_plan *p, int rows, bool early) {
    static uint64_t ready[CU_PLAIN_FORMATS][HEIGHTS][2];
    const int height = rows == 16 ? 0 : rows == 32 ? 1 : 2, split = p->n_rank > 1;
    if (cu_codes_of(a->l.w.format) != CU_CODES_NONE || !large_sound(&a->l)) return cudaErrorInvalidValue;
    const void *kernel = kernels[a->l.w.format][height][split];
    a->n_pair = p->n_pair;
    a->n_slot = p->n_slot;
    a->n_rank = p->n_rank;
    a->n_each = p->n_each;
    a->n_pass = p->n_pass;
    a->l.tile_bands = 2 * p->n_pair;
    a->l.n_tile_out = ceil_div(a->l.w.n_band, a->l.tile_bands);
    const int64_t n_block = (int64_t)a->l.n_tile_out * a->l.n_tile_row * p->n_rank;
    if (n_block > INT32_MAX) return cudaErrorInvalidValue;
    if (n_block == 0) return cudaSuccess;
    const cudaError_t e = cu_shared_bytes(&ready[a->l.w.format][height][split], kernel, SHARED_ONE);
    if (e != cudaSuccess) return e;
    void *args[] = {a};
    return cu_launch(s, kernel, dim3((unsigned)n_block),
                     (unsigned)(p->n_pair * mid_parts(rows) + mid_fillers(rows)) * 32, (size_t)p->bytes, early,
                     (unsigned)p->n_rank, args);
}

cudaError_t cu_mid_run(cudaStream_t s, const cu_job *j) {
    const int rows = j->n_row <= 16 ? 16 : j->n_row <= 32 ? 32 : 64;
    int32_t n_core;
    cudaError_t e = cu_core_count(&n_core);
    if (e != cudaSuccess) return e;
    if (j->x_f32) return cudaErrorInvalidValue;
    mid_args a = {};
    mid_plan p;
    a.l = large_plain(j);
    a.l.n_tile_row = ceil_div(j->n_row, rows);
    plan(&p, &j->w, rows, a.l.n_tile_row, n_core);
    return launch(s, &a, &p, rows, !j->alone);
}

/* Tiles are many: a block each, two on a multiprocessor, as many outputs as leave a ring of two slots. */
cudaError_t cu_mid_grouped(cudaStream_t s, const cu_grouped_job *j) {
    const int rows = j->routes->tile_rows;
    int32_t n_core;
    cudaError_t e = cu_core_count(&n_core);
    if (e != cudaSuccess) return e;
    if (rows != 16 && rows != 32 && rows != 64) return cudaErrorInvalidValue;
    mid_args a = {};
    a.l = large_experts(j);
    mid_plan p = {least(mid_warps_max(rows) / mid_parts(rows), ceil_div(j->shape.n_band, 2)), 1, 0, 0, 0, 0};
    while (!plan_for(&p, &j->shape, rows, SHARED_TWO)) p.n_pair--;
    return launch(s, &a, &p, rows, true);
}
