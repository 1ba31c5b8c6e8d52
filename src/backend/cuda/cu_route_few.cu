/* Norm, router, choice and sort of few rows, and the normed rows in 8 bits, in one launch: the bits of cu_norm,
 * cu_quant_x8 and cu_route. Each of these alone is shorter than what lies between two kernels.
 *
 * A cluster of RANKS blocks has n_each rows, each block every eighth expert and every seventh segment of the rows. The
 * router's rows are in registers before the kernel in front is done. LOGIT_WARPS take a logit each, of one row after
 * the other, and send it to the rank that has the number of the row in the cluster. There one of the servants, warps
 * behind those, chooses when all have come; the servants of the other ranks quantize. The block that chooses last
 * sorts the entries.
 *
 *   shared: x [n_each][D] f32 | x times norm_w [n_each][D] f32 | norm_w [D] bf16 | bias [E] f32 */
#include "backend/cuda/cu_a8_device.cuh"
#include "backend/cuda/cu_cluster.cuh"
#include "backend/cuda/cu_launch.cuh"
#include "backend/cuda/cu_route.cuh"

enum {
    RANKS = 8,
    LOGIT_WARPS = 8,
    SERVANTS_MAX = 4,
    STEPS = 20, /* runs of 32 columns of a part that are in registers at once */
    EXPERTS_MAX = 512,
    USED_MAX = 16,
    ENTRIES = CU_ROUTE_FEW_MAX * USED_MAX / (32 * (LOGIT_WARPS + 1)) + 1, /* of a thread that sorts */
    SHARED_MAX = 216 * 1024
};

typedef struct route_args {
    cu_route_job j;
    cu_routes r;
    cu_x8 out;
    cu_codes codes;
    cu_bf16 *xn;
    int32_t n_each;
} route_args;

/* Of a rank that chooses. */
typedef struct route_shared {
    uint64_t came;                                  /* all logits */
    bool last;                                      /* this block sorts */
    float sum[EXPERTS_MAX];                         /* logits but for the scale */
    int32_t count[EXPERTS_MAX], start[EXPERTS_MAX]; /* entries of an expert, and its first place */
} route_shared;

/* 8 or 16 bytes from global to shared memory. */
template <int BYTES> static __device__ __forceinline__ void copy_piece(void *to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from),
                 "n"(BYTES)
                 : "memory");
}

/* ---- logits -------------------------------------------------------------------------------------------------------
 */

/* The lane's numbers of a router's row, or as many as registers hold: columns from + k 32 of its part and slice. */
static __device__ __forceinline__ void load_router(float4 a[STEPS], const float *w, int32_t from, int32_t end) {
    w += from;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        a[k] = zero4();
        if (from + k * 32 < end) a[k] = *(const float4 *)(w + k * 32);
    }
}

/* More of a lane's share of a logit but for the row's scale, from what load_router has loaded, as route_logits adds it.
 * xw: x times norm_w. */
static __device__ __forceinline__ float add_columns(float sum, const float4 a[STEPS], const float *xw, int32_t from,
                                                    int32_t end) {
    xw += from;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        if (from + k * 32 < end) sum = add_products(*(const float4 *)(xw + k * 32), a[k], sum);
        if (k % 4 == 3) asm volatile("" ::: "memory"); /* no more of xw in registers than this */
    }
    return sum;
}

/* The row's scale, as route_logits has it. */
static __device__ __forceinline__ float scale_of(const float *x, int32_t D, float eps, int lane) {
    const int32_t part = part_columns(D), first = lane / SLICES * part, end = min(first + part, D);
    float square = 0.0f;
#pragma unroll 5
    for (int32_t i = first; i < first + part; i += 32)
        square = cu_add_squares(cu_load4(x, i + lane % SLICES * 4, end), square);
    return cu_norm_scale(parts_sum(square), D, eps);
}

/* ---- rows to codes ----------------------------------------------------------------------------------------------- */

/* The row's scale, as cu_norm has it. */
static __device__ __forceinline__ float norm_scale_of(const float *x, int32_t D, float eps, int lane) {
    float square = 0.0f;
#pragma unroll 5
    for (int32_t i = lane * 4; i < D; i += CU_SEGMENT) square = cu_add_squares(*(const float4 *)(x + i), square);
    return cu_norm_scale(cu_warp_sum(square), D, eps);
}

/* Every seventh segment of a row from the nth on, by a warp. scale: cu_norm's. */
template <cu_codes C>
static __device__ __forceinline__ void quantize_row(const route_args *a, const float *x, const cu_bf16 *norm,
                                                    float scale, int32_t row, int32_t nth, int lane) {
    const int32_t D = a->j.n_hidden, n_seg = CU_PAD(D) / CU_SEGMENT;
    for (int32_t seg = nth; seg < n_seg; seg += RANKS - 1) {
        const int32_t i = seg * CU_SEGMENT + lane * 4;
        float v[4] = {}, of_codes;
        if (i < D) {
            const float4 f = *(const float4 *)(x + i);
            const uint2 w = *(const uint2 *)(norm + i);
            uint2 bits;
            bits.x = cu_round2(cu_normed(f.x, scale, (cu_bf16)w.x), cu_normed(f.y, scale, (cu_bf16)(w.x >> 16)));
            bits.y = cu_round2(cu_normed(f.z, scale, (cu_bf16)w.y), cu_normed(f.w, scale, (cu_bf16)(w.y >> 16)));
            if (a->xn) *(uint2 *)(a->xn + (int64_t)row * CU_PAD(D) + i) = bits;
            v[0] = __uint_as_float(bits.x << 16), v[1] = __uint_as_float(bits.x & 0xffff0000u);
            v[2] = __uint_as_float(bits.y << 16), v[3] = __uint_as_float(bits.y & 0xffff0000u);
        }
        if (C == CU_CODES_NONE) continue;
        *(uint32_t *)(a->out.code + row * a->out.ldx + i) = a8_quantize<C>(&of_codes, v);
        if (lane == 0) a->out.scale[seg * a->out.ld_scale + row] = of_codes;
    }
}

/* ---- choice and sort --------------------------------------------------------------------------------------------- */

/* A warp: the places of the only row's entries, lane k < n_used has the expert of entry k. Each expert has one entry.
 */
static __device__ __forceinline__ void list_one(const cu_routes *r, int32_t mine, int lane) {
    const int32_t E = r->n_expert, K = r->n_used;
    int32_t before = 0, place = 0; /* chosen experts before these 32, before the lane's own */
    for (int32_t base = 0; base < E; base += 32) {
        const bool here = lane < K && mine / 32 == base / 32;
        const uint32_t chosen = __reduce_or_sync(0xffffffffu, here ? 1u << mine % 32 : 0u);
        if (here) place = before + __popc(chosen & ((1u << mine % 32) - 1));
        if (base + lane < E) r->first[base + lane] = before + __popc(chosen & ((1u << lane) - 1));
        before += __popc(chosen);
    }
    if (lane < K) {
        r->place_entry[place] = lane;
        r->entry_place[lane] = r->tile_place[place] = place;
        r->tile_expert[place] = mine;
    }
    if (lane == 0) r->first[E] = *r->n_tile = K;
}

/* A warp: the row's lists from its logits; whether it is the last of all rows, which sorts. An only row needs no sort.
 */
template <int Q>
static __device__ __forceinline__ bool choose(const route_shared *s, const route_args *a, float scale,
                                              const float *bias, int32_t row, int lane) {
    const cu_routes *r = &a->r;
    const int32_t E = r->n_expert, K = r->n_used, n_row = a->j.n_row;
    float logit[Q], share;
#pragma unroll
    for (int q = 0; q < Q; q++) logit[q] = __fmul_rn(s->sum[lane + 32 * q], scale);
    const int32_t mine = choose_row<Q>(&share, logit, a->j.bias ? bias : NULL, a->j.norm_min, E, K);
    if (n_row == 1) {
        if (a->j.beside) cu_launch_next();
        list_one(r, mine, lane);
    }
    if (lane < K) {
        r->chosen[row * K + lane] = mine;
        r->share[row * K + lane] = share;
    }
#pragma unroll
    for (int q = 0; q < Q; q++)
        if (lane + 32 * q < E) r->logit[row * E + lane + 32 * q] = logit[q];
    bool last = false;
    __syncwarp();
    if (n_row > 1 && lane == 0) { /* who sees the count sees what the warp has written */
        int32_t *const done = r->scratch + 2 * E + 1, before;
        asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(done) : "memory");
        last = before == n_row - 1;
        if (last) *done = 0;
    }
    return __shfl_sync(0xffffffffu, last, 0);
}

/* A warp: from the experts' counts to where their entries begin, and to tiles. A lane an expert; entries in the low
 * half of a word, tiles in the high one. */
static __device__ __forceinline__ void list_tiles(route_shared *s, const cu_routes *r, int lane) {
    uint32_t before = 0;
    for (int32_t base = 0; base < r->n_expert; base += 32) {
        const int32_t e = base + lane, n = e < r->n_expert ? s->count[e] : 0;
        const uint32_t own = (uint32_t)n | (uint32_t)((n + r->tile_rows - 1) / r->tile_rows) << 16;
        uint32_t sum = own;
#pragma unroll
        for (int d = 1; d < 32; d <<= 1) {
            const uint32_t more = __shfl_up_sync(0xffffffffu, sum, d);
            if (lane >= d) sum += more;
        }
        const uint32_t at = before + sum - own;
        if (e < r->n_expert) {
            s->start[e] = r->first[e] = (int32_t)(at & 0xffff);
            for (int32_t i = 0; i < (int32_t)(own >> 16); i++) {
                r->tile_expert[(at >> 16) + i] = e;
                r->tile_place[(at >> 16) + i] = (int32_t)(at & 0xffff) + i * r->tile_rows;
            }
        }
        before += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (lane == 0) {
        r->first[r->n_expert] = (int32_t)(before & 0xffff);
        *r->n_tile = (int32_t)(before >> 16);
    }
}

/* The block that chose last; counts are zeros. */
static __device__ __forceinline__ void sort_entries(route_shared *s, const cu_routes *r, int32_t n_entry) {
    int32_t expert[ENTRIES], nth[ENTRIES];
#pragma unroll
    for (int k = 0; k < ENTRIES; k++) {
        const int32_t i = (int32_t)(threadIdx.x + k * blockDim.x);
        if (i >= n_entry) break;
        expert[k] = __ldcg(r->chosen + i);
        nth[k] = atomicAdd(&s->count[expert[k]], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) list_tiles(s, r, threadIdx.x);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < ENTRIES; k++) {
        const int32_t i = (int32_t)(threadIdx.x + k * blockDim.x);
        if (i >= n_entry) break;
        const int32_t place = s->start[expert[k]] + nth[k];
        r->place_entry[place] = i;
        r->entry_place[i] = place;
    }
}

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

/* Q: experts of a lane that chooses. MANY: more rows than one a cluster; else there is room beside a block of few rows
 * by a matrix. */
template <int Q, bool MANY>
static __global__ void __maxnreg__(MANY ? 160 : 104) route_few(const __grid_constant__ route_args a) {
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ route_shared s;
    const cu_route_job *j = &a.j;
    const int thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    const int32_t rank = (int32_t)cu_cluster_rank(), row0 = (int32_t)blockIdx.x / RANKS * a.n_each;
    const int32_t n_row = MANY ? min(j->n_row - row0, a.n_each) : 1,
                  n_thread = MANY ? (int32_t)blockDim.x : 32 * (LOGIT_WARPS + 1);
    const int32_t D = j->n_hidden, E = a.r.n_expert, part = part_columns(D);
    float *const x = (float *)memory, *const xw = x + a.n_each * D, *const bias = xw + a.n_each * D + D / 2;
    cu_bf16 *const norm = (cu_bf16 *)(xw + a.n_each * D);
    const uint32_t came = (uint32_t)__cvta_generic_to_shared(&s.came);

    if (MANY || !j->beside) cu_launch_next();
    if (rank < n_row) {
        for (int32_t e = thread; e < E; e += n_thread) s.count[e] = 0;
        if (thread == 0) {
            bar_init(came, 1);
            bar_init_end();
        }
    }
    cluster_arrive();
    const int32_t expert0 = rank + RANKS * warp;
    const int32_t first = lane / SLICES * part + lane % SLICES * 4, end = min(lane / SLICES * part + part, D);
    float4 w[STEPS];
    if (warp < LOGIT_WARPS && expert0 < E) load_router(w, j->router + (int64_t)expert0 * D, first, end);
    for (int32_t i = thread * 4; i < D; i += n_thread * 4) copy_piece<8>(norm + i, j->norm_w + i);
    if (rank < n_row && j->bias)
        for (int32_t e = thread; e < E; e += n_thread) copy_piece<4>(bias + e, j->bias + e);
    cluster_meet(); /* the ranks can be sent to */
    if (rank < n_row && thread == 0) bar_arrive_expect(came, E * 4);
    cu_wait_previous();

    const float *from = j->x + (int64_t)row0 * D;
    for (int32_t r = 0; r < n_row; r++)
        for (int32_t i = thread * 4; i < D; i += n_thread * 4) copy_piece<16>(x + r * D + i, from + r * D + i);
    asm volatile("cp.async.wait_all;" ::: "memory");
    for (int32_t r = 0; r < n_row; r++)
        for (int32_t i = thread * 4; i < D; i += n_thread * 4) /* what this thread copied */
            *(float4 *)(xw + r * D + i) = times(*(const float4 *)(x + r * D + i), *(const uint2 *)(norm + i));
    __syncthreads();
    if (warp < LOGIT_WARPS) {
        const uint32_t to = (uint32_t)__cvta_generic_to_shared(s.sum);
        for (int32_t e = expert0; e < E; e += RANKS * LOGIT_WARPS) {
            if (e != expert0) load_router(w, j->router + (int64_t)e * D, first, end);
            for (int32_t r = 0; r < n_row; r++) {
                float sum = 0.0f;
                if (MANY && r > 0 && part > 32 * STEPS) load_router(w, j->router + (int64_t)e * D, first, end);
                for (int32_t at = 0; at < part; at += 32 * STEPS) {
                    if (at > 0) load_router(w, j->router + (int64_t)e * D, first + at, end);
                    sum = add_columns(sum, w, xw + r * D, first + at, end);
                }
                sum = parts_sum(sum);
                if (lane == 0) send_counted(at_rank(to + e * 4, r), sum, at_rank(came, r));
            }
        }
    } else {
        const int32_t n_servant = n_thread / 32 - LOGIT_WARPS, servant = warp - LOGIT_WARPS;
        for (int32_t r = servant; r < n_row; r += n_servant) {
            if (r == rank) continue; /* which chooses */
            if (a.codes == CU_CODES_NONE && !a.xn) break;
            const int32_t nth = rank < r ? rank : rank - 1;
            const float scale = norm_scale_of(x + r * D, D, j->eps, lane);
            if (a.codes == CU_CODES_F8)
                quantize_row<CU_CODES_F8>(&a, x + r * D, norm, scale, row0 + r, nth, lane);
            else if (a.codes == CU_CODES_I8)
                quantize_row<CU_CODES_I8>(&a, x + r * D, norm, scale, row0 + r, nth, lane);
            else
                quantize_row<CU_CODES_NONE>(&a, x + r * D, norm, scale, row0 + r, nth, lane);
        }
        if (rank < n_row && rank % n_servant == servant) {
            const float scale = scale_of(x + rank * D, D, j->eps, lane);
            hear(came, 0);
            const bool last = choose<Q>(&s, &a, scale, bias, row0 + rank, lane);
            if (lane == 0) s.last = last;
        }
    }
    if (rank >= n_row || j->n_row == 1) return;
    __syncthreads();
    if (s.last) sort_entries(&s, &a.r, j->n_row * a.r.n_used);
}

/* Of a block with so many rows. */
static int64_t block_bytes(int32_t n_each, int32_t n_hidden, int32_t n_expert) {
    return (int64_t)n_each * n_hidden * 8 + n_hidden * 2 + n_expert * 4;
}
bool cu_route_few_fits(int32_t n_hidden, int32_t n_expert) { return block_bytes(1, n_hidden, n_expert) <= SHARED_MAX; }

cudaError_t cu_route_few(cudaStream_t s, const cu_route_job *j, const cu_routes *r, const cu_x8 *out, cu_codes codes,
                         cu_bf16 *xn) {
    static uint64_t ready[4];
    const int32_t T = j->n_row, E = r->n_expert, K = r->n_used, D = j->n_hidden;
    if (T <= 0 || T > CU_ROUTE_FEW_MAX || E <= 0 || E > EXPERTS_MAX || K <= 0 || K > USED_MAX || K > E || D <= 0 ||
        D % 4 != 0)
        return cudaErrorInvalidValue;
    bool took = false;
    cudaError_t e = cu_route_one_run(s, j, r, out, codes, xn, &took);
    if (took || e != cudaSuccess) return e;
    /* So many rows a cluster that all clusters run at once; no more, since its rows come one after the other. */
    int32_t n_each = T <= 8 ? 1 : T <= 24 ? 2 : T <= 48 ? 4 : RANKS;
    while (n_each > 1 && block_bytes(n_each, D, E) > SHARED_MAX) n_each /= 2;
    if (!cu_route_few_fits(D, E)) return cudaErrorInvalidValue;
    const void *const kernels[4] = {(const void *)route_few<2, false>, (const void *)route_few<2, true>,
                                    (const void *)route_few<EXPERTS_MAX / 32, false>,
                                    (const void *)route_few<EXPERTS_MAX / 32, true>};
    const int which = (n_each > 1) + (E > 64) * 2;
    e = cu_shared_bytes(&ready[which], kernels[which], SHARED_MAX);
    if (e != cudaSuccess) return e;
    route_args a = {*j, *r, {}, codes, xn, n_each};
    if (codes != CU_CODES_NONE) a.out = *out;
    void *args[] = {&a};
    const int32_t n_warp = LOGIT_WARPS + (n_each < SERVANTS_MAX ? n_each : SERVANTS_MAX);
    return cu_launch(s, kernels[which], dim3((unsigned)((T + n_each - 1) / n_each * RANKS)), (unsigned)n_warp * 32,
                     (size_t)block_bytes(n_each, D, E), true, RANKS, args);
}
