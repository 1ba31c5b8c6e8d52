/* Linears of 1..8 rows, plain and of experts: how the work of cu_skinny_kernel.cuh is cut. By shape and number of rows
 * for speed alone; the sums are the same however it is cut. */
#include "backend/cuda/cu_skinny_kernel.cuh"

enum {
    DEVICES_MAX = 16,
    SHARED_MAX = 231 * 1000, /* of a block, what the kernel holds besides left out */
    SHARED_ALL = 228 * 1024, /* of a multiprocessor, a block's own kilobyte included */
    PART_BYTES = 16 * 1024,  /* of partial sums, if it need not be more */
    JOBS_EACH = 4,           /* most jobs of a block of experts' linears */
};

typedef struct skinny_plan {
    int32_t n_warp;
    size_t bytes;
} skinny_plan;

static int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
static int32_t most(int32_t a, int32_t b) { return a > b ? a : b; }

typedef struct format_sizes {
    int32_t slot, depth;
} format_sizes;
static const format_sizes format_size[CU_PLAIN_FORMATS] = {
    {skinny_shape<CU_BF16>::SLOT, skinny_shape<CU_BF16>::DEPTH},
    {skinny_shape<CU_I8>::SLOT, skinny_shape<CU_I8>::DEPTH},
    {skinny_shape<CU_I4>::SLOT, skinny_shape<CU_I4>::DEPTH},
    {skinny_shape<CU_F8>::SLOT, skinny_shape<CU_F8>::DEPTH},
};

static const void *const kernels[CU_PLAIN_FORMATS] = {
    (const void *)skinny_kernel<CU_BF16>,
    (const void *)skinny_kernel<CU_I8>,
    (const void *)skinny_kernel<CU_I4>,
    (const void *)skinny_kernel<CU_F8>,
};

/* What the chip and the compiler say, asked for once a device, before the first launch on it. */
typedef struct skinny_device {
    bool ready;
    int32_t n_sm;
    int32_t n_register[CU_PLAIN_FORMATS];
} skinny_device;

static cudaError_t device_ready(const skinny_device **out) {
    static skinny_device devices[DEVICES_MAX];
    int id;
    cudaError_t e = cudaGetDevice(&id);
    if (e != cudaSuccess) return e;
    if (id >= DEVICES_MAX) return cudaErrorInvalidDevice;
    skinny_device *d = &devices[id];
    *out = d;
    if (d->ready) return cudaSuccess;
    e = cudaDeviceGetAttribute(&d->n_sm, cudaDevAttrMultiProcessorCount, id);
    for (int f = 0; f < CU_PLAIN_FORMATS && e == cudaSuccess; f++) {
        cudaFuncAttributes attr;
        e = cudaFuncGetAttributes(&attr, kernels[f]);
        d->n_register[f] = attr.numRegs;
        if (e == cudaSuccess)
            e = cudaFuncSetAttribute(kernels[f], cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_MAX);
    }
    d->ready = e == cudaSuccess;
    return e;
}

/* Fill in how many blocks share a job, its rounds and passes. False: x does not fit into shared memory. */
static bool plan_for(skinny_args *a, skinny_plan *p, cu_format f, int32_t n_rank) {
    const int32_t each = ceil_div(a->n_seg, n_rank);
    p->n_warp = most(ceil_div(each, ceil_div(each, SKINNY_WARPS_MAX)), SKINNY_WARPS_MIN);
    const int32_t n_cw = p->n_warp * n_rank;
    a->n_rank = n_rank;
    a->n_round = ceil_div(a->n_seg, n_cw);
    const int32_t n_unit = a->n_round << a->pairs;
    const size_t ring = (size_t)p->n_warp * format_size[f].depth * format_size[f].slot;
    const size_t x = (size_t)a->n_round * p->n_warp * a->n_row * 256;
    const size_t part = (size_t)n_cw * (a->n_row * CU_BAND + (f == CU_F8)) * sizeof(float); /* one unit a warp */
    a->n_pass = least(most((int32_t)(PART_BYTES / (2 * part)), 1), n_unit);
    a->n_turn = 2;
    p->bytes = ring + x + 2 * (size_t)a->n_pass * part;
    if (p->bytes <= SHARED_MAX) return true;
    a->n_pass = a->n_turn = 1;
    p->bytes = ring + x + part;
    return p->bytes <= SHARED_MAX;
}

/* The fewest blocks a job that give every multiprocessor something and have room for x; n_tile: jobs are as many times
 * there. False: no number has room. */
static bool plan(skinny_args *a, skinny_plan *p, cu_format f, int32_t n_tile, int32_t n_sm) {
    const int64_t enough = (int64_t)n_sm * 9 / 10;
    int32_t fits = 0;
    for (int32_t n_rank = 1; n_rank <= 4; n_rank *= 2) {
        if (n_rank > 1 && a->n_seg < n_rank * 4) break;
        const bool x = plan_for(a, p, f, n_rank), full = (int64_t)a->n_job * n_tile * n_rank >= enough;
        if (x && full) return true;
        if (x) fits = n_rank;
    }
    return fits && plan_for(a, p, f, fits);
}

/* Blocks that run at the same time. */
static int32_t slots_of(const skinny_device *d, const skinny_plan *p, cu_format f) {
    const int32_t by_register = 65536 / ((d->n_register[f] + 7) / 8 * 8 * p->n_warp * 32);
    const int32_t by_shared = SHARED_ALL / (int32_t)(p->bytes + 1024 + 512);
    return d->n_sm * most(least(least(by_register, by_shared), 2048 / (p->n_warp * 32)), 1);
}

/* How many jobs of a tile are worked at together, by a block or cluster each; the others follow in turns. All with the
 * same number of turns, nearly, unless that leaves multiprocessors without a block. Of experts not too many turns,
 * since tiles may be fewer than n_tile. */
static int32_t jobs_at_once(const skinny_args *a, int32_t n_tile, int32_t slots, int32_t n_sm) {
    int32_t turns = (int32_t)(((int64_t)a->n_job * n_tile * a->n_rank + slots - 1) / slots);
    if (a->grouped) turns = least(turns, JOBS_EACH);
    const int32_t even = ceil_div(a->n_job, turns);
    return a->grouped || even * a->n_rank >= n_sm ? even : least(a->n_job, most(slots / a->n_rank, 1));
}

static cudaError_t launch(cudaStream_t s, skinny_args *a, const cu_linear *w, int32_t n_tile, bool early) {
    const skinny_device *d;
    cudaError_t e = device_ready(&d);
    if (e != cudaSuccess) return e;
    const cu_format f = w->format;
    skinny_plan p;
    skinny_shape_of(a, w);
    if (!plan(a, &p, f, n_tile, d->n_sm)) return cudaErrorInvalidValue; /* n_in beyond 40,000 */
    const int32_t slots = slots_of(d, &p, f);
    const dim3 grid((unsigned)(jobs_at_once(a, n_tile, slots, d->n_sm) * a->n_rank), (unsigned)n_tile);
    void *args[] = {a};
    return cu_launch(s, kernels[f], grid, (unsigned)p.n_warp * 32, p.bytes, early, (unsigned)a->n_rank, args);
}

cudaError_t cu_skinny_run(cudaStream_t s, const cu_job *j) {
    if (j->n_row <= 0) return cudaSuccess;
    bool tall;
    if (cu_codes_of(j->w.format) != CU_CODES_NONE) return cudaErrorInvalidValue; /* cu_a8_split.cu */
    if (j->n_row > CU_SKINNY_MAX || j->w.pairs != (j->epilogue == CU_SWIGLU)) return cudaErrorInvalidValue;
    const cudaError_t e = cu_tall_run(s, j, &tall);
    if (tall || e != cudaSuccess) return e;
    skinny_args a = skinny_plain(j);
    return launch(s, &a, &j->w, 1, !j->alone);
}

cudaError_t cu_skinny_grouped(cudaStream_t s, const cu_grouped_job *j) {
    const cu_routes *r = j->routes;
    if (j->n_row <= 0) return cudaSuccess;
    if (cu_codes_of(j->shape.format) != CU_CODES_NONE) return cudaErrorInvalidValue;
    if (r->tile_rows > CU_SKINNY_MAX || j->shape.pairs != (j->epilogue == CU_SWIGLU)) return cudaErrorInvalidValue;
    skinny_args a = {};
    a.n_row = least(r->tile_rows, j->n_row); /* a row chooses an expert once */
    a.grouped = true;
    a.gather = j->gather;
    a.epilogue = j->epilogue;
    a.x = j->x;
    a.ldx = j->ldx;
    a.y = j->y;
    a.ldy = j->ldy;
    a.h = j->h;
    a.ldh = j->ldh;
    a.experts = j->experts;
    a.tile_expert = r->tile_expert;
    a.tile_place = r->tile_place;
    a.n_tile = r->n_tile;
    a.first = r->first;
    a.place_entry = r->place_entry;
    a.n_used = r->n_used;
    return launch(s, &a, &j->shape, (int32_t)cu_tiles_max(j->n_row, r->n_used, r->n_expert), true);
}
