/* Streaming packed weights once past at most 8 rows: the kernel of cu_skinny.cu.
 *
 * A job is a band of 16 outputs, or a pair of bands (gate, up). A unit is one segment of a band: 4096, 2048 or 1024
 * bytes that lie together, products with all rows, one partial sum of 16 outputs by n_row rows. Warps share the
 * segments of a job; all blocks of a cluster (1, 2 or 4) work at the same job, so that matrices of few bands fill the
 * chip:
 *      unit v of a warp in a job: band v % B, segment (v / B) * n_cw + cw, where cw is the warp's number in the cluster
 * Partials go to shared memory of the cluster's first block (rank 0), which adds them in the order of segments after
 * each pass of a few units, so that neither many segments nor many rows need much room.
 *
 * Weights come through a ring in shared memory, DEPTH units a warp, by cp.async of 16 bytes a lane. A lane reads back
 * only what it copied itself, so the ring needs no barrier, and units ahead (of the next jobs too) stay in flight
 * across the barriers of the sums. It costs no registers, so blocks of the next kernel find room to do the same while
 * this one ends; the first units are asked for before cu_wait_previous. What comes after that is the whole time of a
 * small matrix, and there each instruction runs once: the fewer, the better (no division, no loop unrolled for cases
 * that are rare).
 *
 * x lies in shared memory as the lanes read it, each lane's own 32 bytes of a group: no barrier, no bank conflict.
 *
 *   shared: ring [warp][DEPTH][SLOT] | x [round][warp][4][xl] uint4 | part [turn][slots][n_row][16] f32
 *           | scale [turn][slots] f32 (fp8);   slots = units a pass * n_cw
 * Two turns if there is room: then the next pass writes elsewhere, and one barrier a pass is enough. */
#ifndef ERN_BACKEND_CUDA_CU_SKINNY_KERNEL_CUH
#define ERN_BACKEND_CUDA_CU_SKINNY_KERNEL_CUH

#include "backend/cuda/cu_cluster.cuh"
#include "backend/cuda/cu_launch.cuh"
#include "backend/cuda/cu_skinny_unit.cuh"

enum {
    SKINNY_WARPS_MIN = 4, /* so that a thread finishes at most one output of a band */
    SKINNY_WARPS_MAX = 8,
    SUM_ONCE = 8, /* partial sums read at once */
};

typedef struct skinny_args {
    const unsigned char *pack;
    const float *scale;
    int32_t n_out, n_in, n_seg;
    int32_t n_job;   /* bands, or pairs of them */
    int32_t pairs;   /* 1: two bands a job */
    int32_t n_rank;  /* blocks of a cluster */
    int32_t n_round; /* ceil(n_seg / n_cw) */
    int32_t n_pass;  /* units of a warp between two sums */
    int32_t n_turn;  /* places for partials: 1 or 2 */
    int32_t n_row;   /* rows, or most places of a tile */
    bool grouped, gather, norm_wide;
    cu_epilogue epilogue;
    const cu_bf16 *x;
    int64_t ldx;
    float *y;
    int64_t ldy;
    cu_bf16 *h;
    int64_t ldh;
    const float *x_f32;
    const cu_bf16 *norm_w;
    float eps;
    const cu_linear *experts;
    const int32_t *tile_expert, *tile_place, *n_tile, *first, *place_entry;
    int32_t n_used;
} skinny_args;

/* ---- loads ------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ uint32_t skinny_shared(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}
static __device__ __forceinline__ void skinny_copy16(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
/* The same of weights that nobody else reads (cu_read_once). */
static __device__ __forceinline__ void skinny_copy16_once(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "l"(cu_read_once())
                 : "memory");
}
static __device__ __forceinline__ void skinny_copy4(uint32_t to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
static __device__ __forceinline__ void skinny_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> static __device__ __forceinline__ void skinny_wait(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

/* ---- clusters ---------------------------------------------------------------------------------------------------- */

/* The same place in the shared memory of rank 0. */
static __device__ __forceinline__ float *skinny_first_rank(float *p) {
    uint64_t out;
    asm volatile("mapa.u64 %0, %1, 0;" : "=l"(out) : "l"(p));
    return (float *)out;
}
static __device__ __forceinline__ void skinny_barrier(int32_t n_rank) {
    if (n_rank == 1) {
        __syncthreads();
    } else {
        cluster_arrive();
        cluster_meet();
    }
}

/* ---- units ------------------------------------------------------------------------------------------------------- */

/* What a warp needs to find its units, and how far it has asked for them. */
typedef struct skinny_walk {
    const unsigned char *pack; /* with the lane's 16 bytes added */
    const float *scale;
    int32_t n_seg, n_job, step, pairs, n_unit, cw, n_cw;
    int32_t job, v; /* next to ask for */
} skinny_walk;

/* Ask for unit `at` of the matrix. pack: with the lane's 16 bytes added. ONCE: nobody else reads it. */
template <cu_format F, bool ONCE>
static __device__ __forceinline__ void skinny_ask_unit(const unsigned char *pack, const float *scale, int32_t at,
                                                       uint32_t slot, int lane) {
    const unsigned char *from = pack + (int64_t)at * skinny_shape<F>::UNIT;
    const uint32_t to = slot + lane * 16;
#pragma unroll
    for (int i = 0; i < skinny_shape<F>::UNIT; i += 512)
        ONCE ? skinny_copy16_once(to + i, from + i) : skinny_copy16(to + i, from + i);
    if (F == CU_F8 && lane == 0) skinny_copy4(slot + skinny_shape<F>::UNIT, scale + at);
}
/* Ask for the next unit; a group of copies is closed each time, with or without any. Not ONCE: several blocks read an
 * expert of many rows, and ptxas 13 loses a policy that is chosen at run time (cu_read_once). */
template <cu_format F> static __device__ __forceinline__ void skinny_ask(skinny_walk *k, uint32_t slot, int lane) {
    if (k->job < k->n_job) {
        const int32_t seg = (k->v >> k->pairs) * k->n_cw + k->cw;
        if (seg < k->n_seg)
            skinny_ask_unit<F, false>(k->pack, k->scale, ((k->job << k->pairs) + (k->v & k->pairs)) * k->n_seg + seg,
                                      slot, lane);
        if (++k->v == k->n_unit) {
            k->v = 0;
            k->job += k->step;
        }
    }
    skinny_commit();
}

/* One segment of up to eight rows: a chain of eight products, from zero. x: of the segment, with the lane added; row:
 * the lane's is one of them. */
template <cu_format F>
static __device__ __forceinline__ void skinny_segment(float acc[4], const unsigned char *slot, const uint4 *x, int xl,
                                                      bool row) {
    acc[0] = acc[1] = acc[2] = acc[3] = 0.0f;
#pragma unroll
    for (int group = 0; group < 2; group++) {
        uint32_t a[4][4];
        uint4 b[2];
        skinny_codes<F>(a, slot, group);
#pragma unroll
        for (int k = 0; k < 2; k++) b[k] = row ? x[(group * 2 + k) * xl] : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            cu_mma(acc, a[2 * k], b[k].x, b[k].y);
            cu_mma(acc, a[2 * k + 1], b[k].z, b[k].w);
        }
    }
}

/* Two segments of up to eight rows side by side: what a chain of eight products waits for itself hides in the other. */
template <cu_format F>
static __device__ __forceinline__ void skinny_two(float acc[2][4], const unsigned char *const slot[2],
                                                  const uint4 *const x[2], int xl, bool row) {
#pragma unroll
    for (int k = 0; k < 2; k++) acc[k][0] = acc[k][1] = acc[k][2] = acc[k][3] = 0.0f;
#pragma unroll
    for (int half = 0; half < 4; half++) {
        uint32_t a[2][2][4];
        uint4 b[2];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            skinny_codes_half<F>(a[k], slot[k], half);
            b[k] = row ? x[k][half * xl] : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int k = 0; k < 2; k++) cu_mma(acc[k], a[k][0], b[k].x, b[k].y);
#pragma unroll
        for (int k = 0; k < 2; k++) cu_mma(acc[k], a[k][1], b[k].z, b[k].w);
    }
}

/* ---- x ----------------------------------------------------------------------------------------------------------- */

/* The warp's segments of x to shared memory. After cu_wait_previous all is latency, so: few instructions, all loads at
 * once, no division. Chunk lane % 16 (8 numbers) of rows lane / 16, lane / 16 + 2, ... */
/* In words of two inputs, from the warp's x on: where word 0 of chunk p of row 0 lies; word w is 4 w further. */
static __device__ __forceinline__ int32_t skinny_chunk_at(int p, int xl) { return p / 4 * xl * 4 + p % 4; }
static __device__ __forceinline__ void skinny_x_load(uint4 *xs, const skinny_args *a, const int32_t *row, int32_t n_row,
                                                     int cw, int n_cw, int32_t x_round, int xl, int lane) {
    const int ONCE = 3;
    uint32_t *to = (uint32_t *)xs + skinny_chunk_at(lane % 16, xl);
    const cu_bf16 *x = a->x + cw * CU_SEGMENT + lane % 16 * 8;
    for (int32_t r = lane / 16; r < n_row; r += 2) {
        const cu_bf16 *from = x + row[r] * a->ldx;
        for (int32_t round = 0; round < a->n_round; round += ONCE) {
            uint4 v[ONCE];
#pragma unroll
            for (int k = 0; k < ONCE; k++)
                if ((round + k) * n_cw + cw < a->n_seg) v[k] = cu_l2(from + (round + k) * n_cw * CU_SEGMENT);
#pragma unroll
            for (int k = 0; k < ONCE; k++) {
                uint32_t *at = to + ((round + k) * x_round + r * 4) * 4;
                if ((round + k) * n_cw + cw < a->n_seg) at[0] = v[k].x, at[4] = v[k].y, at[8] = v[k].z, at[12] = v[k].w;
            }
        }
    }
    __syncwarp();
}

/* 1 / sqrt(mean of squares) of a row by one warp: cu_sum_squares with eight loads of 16 bytes in flight, the same
 * order, the same bits. Longer rows are touched first, so that all of a row comes in one go. n % 4 == 0. All warps of a
 * multiprocessor read the same rows, at about the same time: through L1. */
static __device__ __forceinline__ float4 skinny_l1(const float *p) {
    float4 v;
    asm volatile("ld.global.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
    return v;
}
static __device__ __forceinline__ float skinny_row_scale(const float *x, int32_t n, float eps, int lane) {
    float sum = 0.0f;
    for (int32_t i = 1024 + lane * 32; i < n; i += 1024) asm volatile("prefetch.global.L1 [%0];" ::"l"(x + i));
    for (int32_t i0 = lane * 4; i0 < n; i0 += 1024) {
        float4 v[8];
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] = skinny_l1(x + (i0 + k * 128 < n ? i0 + k * 128 : i0)); /* no branch */
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const float next = cu_add_squares(v[k], sum);
            sum = i0 + k * 128 < n ? next : sum;
        }
    }
    __syncwarp();
    return cu_norm_scale(cu_warp_sum(sum), n, eps);
}

/* Norm of x_f32, at most 8 rows, to the same places as skinny_x_load puts it. Of one row each warp finds the scale
 * itself, which takes no barrier; of more a warp a row. Then a warp norms its segments, a lane four numbers.
 * norm_wide: n_in is a multiple of 4 and all is aligned. xs: of the warp. */
static __device__ __forceinline__ void skinny_x_norm(uint4 *xs, float row_scale[8], const skinny_args *a,
                                                     const int32_t *row, int32_t n_row, int warp, int n_warp, int cw,
                                                     int n_cw, int32_t x_round, int xl, int lane) {
    const int32_t n = a->n_in;
    float scale = 0.0f;
    uint32_t *const to = (uint32_t *)xs + skinny_chunk_at(lane / 2, xl) + lane % 2 * 8;
    if (n_row > 1) {
        for (int32_t r = warp; r < n_row; r += n_warp) {
            scale = skinny_row_scale(a->x_f32 + (int64_t)row[r] * n, n, a->eps, lane);
            if (lane == 0) row_scale[r] = scale;
        }
        __syncthreads();
    }
    for (int32_t r = 0; r < n_row; r++) {
        const float *x = a->x_f32 + (int64_t)row[r] * n;
        int32_t i = cw * CU_SEGMENT + lane * 4;
#pragma unroll 1
        for (int32_t round = 0; round * n_cw + cw < a->n_seg; round++, i += n_cw * CU_SEGMENT) {
            const float4 v = skinny_l1(x + (i < n ? i : 0));
            const uint2 w = *(const uint2 *)(a->norm_w + (i < n ? i : 0));
            if (n_row > 1)
                scale = row_scale[r];
            else if (round == 0)
                scale = skinny_row_scale(x, n, a->eps, lane);
            uint2 out;
            out.x =
                cu_round2(cu_normed(v.x, scale, (cu_bf16)(w.x & 0xffff)), cu_normed(v.y, scale, (cu_bf16)(w.x >> 16)));
            out.y =
                cu_round2(cu_normed(v.z, scale, (cu_bf16)(w.y & 0xffff)), cu_normed(v.w, scale, (cu_bf16)(w.y >> 16)));
            if (i >= n) out = make_uint2(0, 0); /* beyond n */
            uint32_t *at = to + (round * x_round + r * 4) * 4;
            at[0] = out.x, at[4] = out.y;
        }
    }
    __syncwarp();
}

/* Where input i of row r < 8 lies in the x of this block, in numbers; < 0: in another block of the cluster. */
typedef struct skinny_place {
    int32_t n_cw, n_warp, rank, x_warp, x_round, xl;
} skinny_place;
static __device__ __forceinline__ int32_t skinny_x_at(const skinny_place *p, int32_t r, int32_t i) {
    const int32_t seg = i / CU_SEGMENT, cw = seg % p->n_cw, chunk = i % CU_SEGMENT / 8;
    if (cw / p->n_warp != p->rank) return -1;
    const int32_t word = (seg / p->n_cw * p->x_round + cw % p->n_warp * p->x_warp + r * 4) * 4;
    return (word + skinny_chunk_at(chunk, p->xl) + i % 8 / 2 * 4) * 2 + i % 2;
}

/* The same for any n_in and alignment, number by number. */
static __device__ __noinline__ void skinny_x_norm_narrow(uint4 *xs, float row_scale[8], const skinny_args *a,
                                                         skinny_place p, const int32_t *row, int32_t n_row) {
    const int thread = threadIdx.x;
    const int32_t n = a->n_in, padded = a->n_seg * CU_SEGMENT;
    for (int32_t r = thread / 32; r < n_row; r += p.n_warp) {
        const float sum = cu_sum_squares(a->x_f32 + (int64_t)row[r] * n, n);
        if (thread % 32 == 0) row_scale[r] = cu_norm_scale(sum, n, a->eps);
    }
    __syncthreads();
#pragma unroll 1
    for (int32_t id = thread; id < n_row * padded; id += blockDim.x) {
        const int32_t r = id / padded, i = id % padded, at = skinny_x_at(&p, r, i);
        const float x =
            i < n ? cu_normed(cu_l2f(a->x_f32 + (int64_t)row[r] * n + i), row_scale[r], a->norm_w[i]) : 0.0f;
        if (at >= 0) ((cu_bf16 *)xs)[at] = cu_round(x);
    }
    __syncthreads();
}

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

/* At least 3 blocks a multiprocessor: the limit of registers. */
template <cu_format F>
__global__ void __launch_bounds__(SKINNY_WARPS_MAX * 32, 3) skinny_kernel(const __grid_constant__ skinny_args a) {
    typedef skinny_shape<F> shape;
    /* units that a warp works on at once, if there are so many; bf16's ring is not deep enough */
    constexpr int SIDE = F == CU_BF16 ? 1 : 2;
    extern __shared__ uint4 skinny_memory[];
    __shared__ int32_t row[CU_SKINNY_MAX];
    __shared__ float row_scale[CU_SKINNY_MAX];
    const int thread = threadIdx.x, n_thread = blockDim.x, lane = thread & 31, n_warp = n_thread / 32;
    const int warp = __shfl_sync(0xffffffffu, thread / 32, 0), g = lane / 4, c = lane % 4;
    const int32_t rank = a.n_rank > 1 ? (int32_t)cu_cluster_rank() : 0;
    const int32_t first_job = blockIdx.x / a.n_rank, step = gridDim.x / a.n_rank;
    const int32_t pairs = a.pairs, n_unit = a.n_round << pairs;
    const unsigned char *pack = a.pack;
    const float *scale = a.scale;
    int32_t n_row = a.n_row, place = 0;

    cu_launch_next();
    if (!a.grouped) {
        if (a.x_f32) /* not a step's either */
            for (int32_t i = thread * 64; i < a.n_in; i += n_thread * 64)
                asm volatile("prefetch.global.L2 [%0];" ::"l"(a.norm_w + i));
        if (thread < n_row) row[thread] = thread;
        __syncthreads();
    } else { /* which weights it will be is for an earlier kernel to say */
        cu_wait_previous();
        const int32_t n_tile = cu_l2i(a.n_tile), expert = cu_l2i(a.tile_expert + blockIdx.y);
        place = cu_l2i(a.tile_place + blockIdx.y);
        if ((int32_t)blockIdx.y >= n_tile) return;
        n_row = min(n_row, cu_l2i(a.first + expert + 1) - place);
        pack = (const unsigned char *)a.experts[expert].pack;
        scale = a.experts[expert].scale;
    }
    unsigned char *const ring = (unsigned char *)skinny_memory + warp * (shape::DEPTH * shape::SLOT);
    const uint32_t ring_at = skinny_shared(ring);
    const int32_t cw = rank * n_warp + warp, n_cw = a.n_rank * n_warp;
    skinny_walk walk = {pack + lane * 16, scale, a.n_seg, a.n_job, step, pairs, n_unit, cw, n_cw, first_job, 0};
#pragma unroll
    for (int d = 0; d < shape::DEPTH; d++) skinny_ask<F>(&walk, ring_at + d * shape::SLOT, lane);
    if (a.n_rank > 1) cluster_arrive(); /* the others may write to our memory from here on */

    if (a.grouped) {
        if (thread < n_row) row[thread] = a.gather ? cu_l2i(a.place_entry + place + thread) / a.n_used : place + thread;
        __syncthreads();
    }
    const int xl = 4 * n_row;
    uint4 *xs = (uint4 *)((unsigned char *)skinny_memory + n_warp * (shape::DEPTH * shape::SLOT));
    const int32_t x_warp = 4 * xl, x_round = n_warp * x_warp;
    float *part = (float *)(xs + a.n_round * x_round);
    if (a.n_rank > 1) cluster_meet();
    if (!a.grouped) cu_wait_previous();
    if (a.x_f32) {
        if (a.norm_wide)
            skinny_x_norm(xs + warp * x_warp, row_scale, &a, row, n_row, warp, n_warp, cw, n_cw, x_round, xl, lane);
        else
            skinny_x_norm_narrow(xs, row_scale, &a, {n_cw, n_warp, rank, x_warp, x_round, xl}, row, n_row);
    } else {
        skinny_x_load(xs + warp * x_warp, &a, row, n_row, cw, n_cw, x_round, xl, lane);
    }
    xs += warp * x_warp + lane;

    const int32_t slots = a.n_pass * n_cw, slot_size = n_row * CU_BAND;
    float *const part_scale = part + a.n_turn * slots * slot_size;
    float *to = part, *to_scale = part_scale;
    if (a.n_rank > 1) {
        to = skinny_first_rank(part);
        to_scale = skinny_first_rank(part_scale);
    }
    int depth = 0, turn = 0;
    for (int32_t job = first_job; job < a.n_job; job += step) {
        /* This thread finishes output o of row r: what that needs comes while we compute. */
        const int32_t o = thread % CU_BAND, r = thread / CU_BAND, out = job * CU_BAND + o;
        float total[2] = {0.0f, 0.0f}, old = 0.0f, by[2] = {1.0f, 1.0f};
        if (rank == 0) {
            if (F == CU_I8 || F == CU_I4) {
                by[0] = scale[(job << pairs) * CU_BAND + o];
                if (pairs) by[1] = scale[((job << 1) + 1) * CU_BAND + o];
            }
        }
        if (rank == 0 && a.epilogue == CU_ADD && r < n_row && out < a.n_out)
            old = cu_l2f(a.y + (place + r) * a.ldy + out);
        for (int32_t v0 = 0; v0 < n_unit; v0 += a.n_pass) {
            const int32_t v1 = min(v0 + a.n_pass, n_unit);
            for (int32_t v = v0; v < v1;) {
                int done = 1;
                if constexpr (SIDE == 2) {
                    if (v + 1 < v1) {
                        done = 2;
                        skinny_wait<shape::DEPTH - 2>();
                        __syncwarp();
                        float acc[2][4];
                        const unsigned char *slot[2];
                        const uint4 *xk[2];
                        bool in[2];
#pragma unroll
                        for (int k = 0; k < 2; k++) {
                            const int32_t round = (v + k) >> pairs, d = depth + k;
                            in[k] = round * n_cw + cw < a.n_seg;
                            slot[k] = ring + (d < shape::DEPTH ? d : d - shape::DEPTH) * shape::SLOT + lane * 16;
                            xk[k] = xs + (in[k] ? round * x_round : 0);
                        }
                        skinny_two<F>(acc, slot, xk, xl, g < n_row);
#pragma unroll
                        for (int k = 0; k < 2; k++) {
                            if (!in[k]) continue;
                            const int32_t at = (turn * a.n_pass + v + k - v0) * n_cw + cw;
                            skinny_put(to + at * slot_size, acc[k], n_row, g, c);
                            if (F == CU_F8 && lane == 0) to_scale[at] = *(const float *)(slot[k] + shape::UNIT);
                        }
                    }
                }
                if (done == 1) {
                    const int32_t round = v >> pairs, seg = round * n_cw + cw;
                    skinny_wait<shape::DEPTH - 1>();
                    __syncwarp();
                    if (seg < a.n_seg) {
                        float acc[4];
                        const unsigned char *slot = ring + depth * shape::SLOT;
                        skinny_segment<F>(acc, slot + lane * 16, xs + round * x_round, xl, g < n_row);
                        const int32_t at = (turn * a.n_pass + v - v0) * n_cw + cw;
                        skinny_put(to + at * slot_size, acc, n_row, g, c);
                        if (F == CU_F8 && lane == 0) to_scale[at] = *(const float *)(slot + shape::UNIT);
                    }
                }
                for (int k = 0; k < done; k++) {
                    skinny_ask<F>(&walk, ring_at + depth * shape::SLOT, lane);
                    depth = depth + 1 == shape::DEPTH ? 0 : depth + 1;
                }
                v += done;
            }
            skinny_barrier(a.n_rank);
            if (rank == 0 && r < n_row) {
                for (int32_t v = v0; v < v1; v++) {
                    const int32_t n = min(n_cw, a.n_seg - (v >> pairs) * n_cw);
                    const int32_t at = (turn * a.n_pass + v - v0) * n_cw;
                    const float *p = part + at * slot_size + skinny_part_at(r, o);
                    float sum = v & pairs ? total[1] : total[0];
                    for (int32_t i0 = 0; i0 < n; i0 += SUM_ONCE) { /* all loads of a run before its first sum */
                        float segment[SUM_ONCE], by_segment[SUM_ONCE];
#pragma unroll
                        for (int i = 0; i < SUM_ONCE; i++) {
                            const int32_t from = min(i0 + i, n - 1);
                            segment[i] = p[from * slot_size];
                            if (F == CU_F8) by_segment[i] = part_scale[at + from];
                        }
#pragma unroll
                        for (int i = 0; i < SUM_ONCE; i++) {
                            const float next =
                                F == CU_F8 ? __fmaf_rn(by_segment[i], segment[i], sum) : __fadd_rn(segment[i], sum);
                            sum = i0 + i < n ? next : sum;
                        }
                    }
                    if (v & pairs)
                        total[1] = sum;
                    else
                        total[0] = sum;
                }
            }
            if (a.n_turn == 2)
                turn ^= 1; /* a place is written again after the next pass's barrier, which comes after these sums */
            else
                skinny_barrier(a.n_rank);
        }
        if (rank != 0 || r >= n_row || out >= a.n_out) continue;
        float z = total[0], up = total[1];
        if (F == CU_I8 || F == CU_I4) {
            z = __fmul_rn(z, by[0]);
            up = __fmul_rn(up, by[1]);
        }
        if (a.epilogue == CU_SWIGLU)
            a.h[(place + r) * a.ldh + out] = cu_round(cu_swiglu(z, up));
        else
            a.y[(place + r) * a.ldy + out] = a.epilogue == CU_ADD ? __fadd_rn(old, z) : z;
    }
}

/* ---- the arguments of a launch, but for how it is cut -------------------------------------------------------------
 */

static inline void skinny_shape_of(skinny_args *a, const cu_linear *w) {
    a->n_out = w->n_out;
    a->n_in = w->n_in;
    a->n_seg = w->n_seg;
    a->pairs = w->pairs;
    a->n_job = w->n_band >> a->pairs;
}
static inline bool skinny_aligned(const void *p) { return ((uintptr_t)p & 15) == 0; }
static inline skinny_args skinny_plain(const cu_job *j) {
    skinny_args a = {};
    skinny_shape_of(&a, &j->w);
    a.pack = (const unsigned char *)j->w.pack;
    a.scale = j->w.scale;
    a.n_row = j->n_row;
    a.epilogue = j->epilogue;
    a.x = j->x;
    a.ldx = j->ldx;
    a.y = j->y;
    a.ldy = j->ldy;
    a.h = j->h;
    a.ldh = j->ldh;
    a.x_f32 = j->x_f32;
    a.norm_w = j->norm_w;
    a.eps = j->eps;
    a.norm_wide = j->w.n_in % 4 == 0 && skinny_aligned(j->x_f32) && skinny_aligned(j->norm_w);
    return a;
}

/* Of very many outputs (cu_tall.cu): *took says whether this was one for it. */
cudaError_t cu_tall_run(cudaStream_t s, const cu_job *j, bool *took);

#endif
