/* What the kernels of warpgroups on tiles of 128 outputs and 128 rows share: the cluster of two blocks that halve the
 * rows they bring, the warps that store a tile's totals while the next is multiplied, rows laid out by place. Included
 * by cu_large.cu and cu_a8_large.cu, which say what multiplies. */
#ifndef ERN_BACKEND_CUDA_CU_WIDE_CUH
#define ERN_BACKEND_CUDA_CU_WIDE_CUH

#include "backend/cuda/cu_cluster.cuh"
#include "backend/cuda/cu_large_kernel.cuh"
#include "backend/cuda/cu_launch.cuh"
#include "backend/cuda/cu_map.cuh"

enum {
    LARGE_BANDS = 8, /* of a tile */
    WIDE_ROWS = 128,
    WIDE_RANKS = 2,
    WIDE_THREADS = 384,
    WIDE_STORERS = 3,                /* warps */
    WIDE_SUMS = WIDE_ROWS * 128 * 4, /* bytes: [row][output] f32, see wide_sum_at */
    WIDE_X = WIDE_ROWS * 128         /* bytes of x in a slot */
};

/* ---- the cluster ------------------------------------------------------------------------------------------------- */

/* A slot is free, says this warp to all blocks that write to it. */
static __device__ __forceinline__ void wide_leave(uint32_t bar, int lane) {
    __syncwarp();
    if (lane < WIDE_RANKS)
        asm volatile("{.reg .b32 at; mapa.shared::cluster.u32 at, %0, %1;"
                     "mbarrier.arrive.shared::cluster.b64 _, [at];}" ::"r"(bar),
                     "r"(lane)
                     : "memory");
}

/* The block's tile of pair `index`; false: there is none. */
static __device__ __forceinline__ bool wide_find(const large_args *a, uint32_t index, uint32_t rank, large_tile *t) {
    if (!large_find(a, index, WIDE_ROWS, t)) return false;
    t->band0 += (int32_t)rank * LARGE_BANDS;
    return true;
}

/* The same without the tile. n_tile_row: row tiles that there are. */
static __device__ __forceinline__ bool wide_there(const large_args *a, uint32_t index, int32_t n_tile_row) {
    const uint32_t span = (uint32_t)a->n_tile_out * LARGE_SUPER, super = index / span, high = large_high(a, super);
    return (int32_t)(super * LARGE_SUPER + index % span % high) < n_tile_row;
}

/* Rows of x from `row` on, 64 inputs from `in` on, to the same place in all blocks. */
static __device__ __forceinline__ void wide_copy_x(const CUtensorMap *x, int32_t in, int32_t row, uint32_t to,
                                                   uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(x), "r"(in), "r"(row), "r"(bar), "h"((uint16_t)((1 << WIDE_RANKS) - 1))
                 : "memory");
}

/* ---- the warps that store -----------------------------------------------------------------------------------------
 */

/* Word of a tile's sums: outputs in eights, moved among four so that rows 0, 1, 2, 3 of eight meet all banks, and rows
 * 0, 2, 4, 6. Rows beyond the tile, which end a batch, are read as others and not stored. */
static __device__ __forceinline__ int wide_sum_at(int row, int out) {
    return row % WIDE_ROWS * 128 + (out ^ ((row << 3 & 24) ^ (row << 1 & 8)));
}

/* The totals of a warp's band, half [i] of the rows as eight cu_mma accs, to their places. */
static __device__ __forceinline__ void wide_keep(float *sums, const float total[2][32], int in_tile, int lane) {
    float *to[2]; /* of outputs g and g + 8, row 2c; the other way round of row 2c + 1 */
#pragma unroll
    for (int k = 0; k < 2; k++) to[k] = sums + wide_sum_at(2 * (lane & 3), in_tile * CU_BAND + k * 8 + lane / 4);
#pragma unroll
    for (int i = 0; i < 64; i++) to[(i / 2 ^ i) & 1][(i / 4 * 8 + (i & 1)) * 128] = total[i / 32][i % 32];
}

/* Four numbers at y, of which `left` are there. whole: all four are, at a multiple of 16 bytes. */
static __device__ __forceinline__ float4 wide_old(const float *y, int32_t left, bool whole) {
    if (whole) return *(const float4 *)y;
    float v[4];
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = k < left ? y[k] : 0.0f;
    return make_float4(v[0], v[1], v[2], v[3]);
}
static __device__ __forceinline__ void wide_new(float *y, float4 v, int32_t left, bool whole) {
    if (whole) {
        *(float4 *)y = v;
        return;
    }
    const float f[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < left) y[k] = f[k];
}
/* What y holds where the tile will be added, to L2: while the tile is being multiplied. */
static __device__ __forceinline__ void wide_put_early(const large_args *a, const large_tile *t, int first, int lane) {
    const int32_t n = (t->row_end - t->row) * 4, out0 = t->band0 * CU_BAND;
    for (int i = first * 32 + lane; i < n; i += WIDE_STORERS * 32) {
        const int32_t out = out0 + i % 4 * 32;
        if (out < a->w.n_out)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(a->y + (int64_t)(t->row + i / 4) * a->ldy + out));
    }
}
/* y = or += rows first, first + WIDE_STORERS, ... of the tile; four outputs a lane. SCALED: times the output's scale
 * first. Several rows at once and without a branch where all of them are there: what y holds comes from far, and
 * products hold up reads of shared memory. */
template <bool SCALED>
static __device__ __forceinline__ void wide_put(const large_args *a, const large_tile *t, const float *sums, int first,
                                                int lane) {
    enum { BATCH = 6 };
    const int32_t out = t->band0 * CU_BAND + lane * 4, left = a->w.n_out - out, n = t->row_end - t->row;
    const bool add = a->epilogue == CU_ADD, whole = left >= 4 && ((uintptr_t)a->y | a->ldy * 4) % 16 == 0;
    if (left <= 0) return;
    const int64_t step = WIDE_STORERS * a->ldy;
    float *y = a->y + (int64_t)(t->row + first) * a->ldy + out;
    float4 scale = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
    if (SCALED) scale = wide_old(t->scale + out, left, false);
    const auto sum_of = [&](int row) {
        float4 v = *(const float4 *)(sums + wide_sum_at(row, lane * 4));
        if (SCALED)
            v = make_float4(__fmul_rn(v.x, scale.x), __fmul_rn(v.y, scale.y), __fmul_rn(v.z, scale.z),
                            __fmul_rn(v.w, scale.w));
        return v;
    };
    const auto plus = [](float4 p, float4 q) {
        return make_float4(__fadd_rn(p.x, q.x), __fadd_rn(p.y, q.y), __fadd_rn(p.z, q.z), __fadd_rn(p.w, q.w));
    };
    int row = first;
    for (; whole && row + (BATCH - 1) * WIDE_STORERS < n; row += BATCH * WIDE_STORERS, y += BATCH * step) {
        float4 old[BATCH], v[BATCH];
        if (add) {
#pragma unroll
            for (int i = 0; i < BATCH; i++) old[i] = *(const float4 *)(y + i * step);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) v[i] = sum_of(row + i * WIDE_STORERS);
        if (add) {
#pragma unroll
            for (int i = 0; i < BATCH; i++) v[i] = plus(old[i], v[i]);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) *(float4 *)(y + i * step) = v[i];
    }
    for (; row < n; row += WIDE_STORERS, y += step) {
        float4 v = sum_of(row);
        if (add) v = plus(wide_old(y, left, whole), v);
        wide_new(y, v, left, whole);
    }
}
/* h = silu(gate) * up; two outputs a lane. */
template <bool SCALED>
static __device__ __forceinline__ void wide_put_swiglu(const large_args *a, const large_tile *t, const float *sums,
                                                       int first, int lane) {
    enum { BATCH = 4 };
    const int gate_at = lane / 8 * 32 + lane % 8 * 2;
    const int32_t out = t->band0 / 2 * CU_BAND + lane * 2, n = t->row_end - t->row;
    if (out >= a->w.n_out) return;
    const bool two = out + 1 < a->w.n_out;
    cu_bf16 *to = a->h + (int64_t)t->row * a->ldh + out;
    float scale[4]; /* of both gates, of both ups */
#pragma unroll
    for (int k = 0; k < 4; k++)
        scale[k] = SCALED ? __ldg(t->scale + t->band0 * CU_BAND + gate_at + k / 2 * CU_BAND + k % 2) : 1.0f;
    for (int from = first; from < n; from += BATCH * WIDE_STORERS) {
        float gate[2 * BATCH], up[2 * BATCH], h[2 * BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int at = wide_sum_at(min(from + i * WIDE_STORERS, n - 1), gate_at);
            const float2 g = *(const float2 *)(sums + at), u = *(const float2 *)(sums + (at ^ CU_BAND));
            gate[2 * i] = g.x, gate[2 * i + 1] = g.y, up[2 * i] = u.x, up[2 * i + 1] = u.y;
#pragma unroll
            for (int k = 0; k < 2; k++)
                if (SCALED)
                    gate[2 * i + k] = __fmul_rn(gate[2 * i + k], scale[k]),
                                 up[2 * i + k] = __fmul_rn(up[2 * i + k], scale[2 + k]);
        }
        large_swiglu<2 * BATCH>(h, gate, up);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int row = from + i * WIDE_STORERS;
            const uint32_t v = cu_round2(h[2 * i], h[2 * i + 1]);
            if (row >= n) break;
            if (two)
                *(uint32_t *)(to + row * a->ldh) = v;
            else
                to[row * a->ldh] = (cu_bf16)v;
        }
    }
}

/* Rows of head h of qkv: cu_rope_store of them. Four dimensions a lane; nothing branches, so that rows do not wait for
 * one another. TURNED: q or k; STORED: k or v. */
template <bool SCALED, bool TURNED, bool STORED>
static __device__ __forceinline__ void wide_put_head(const large_args *a, const large_tile *t, const float *sums,
                                                     int32_t h, int first, int lane) {
    enum { BATCH = 4, C = LARGE_BANDS * CU_BAND };
    const rope_args *rope = &a->rope;
    const int32_t n = t->row_end - t->row, H = rope->n_head;
    const float2 *turns = rope->turn + t->row * (int64_t)(C / 2) + lane * 2;
    unsigned char *out = STORED ? rope_plane(rope, rope->kv, h - H) + lane * 8
                                : (unsigned char *)(rope->q_out + ((int64_t)t->row * H + h) * C) + lane * 8;
    float scale[4];
#pragma unroll
    for (int k = 0; k < 4; k++) scale[k] = SCALED ? __ldg(t->scale + t->band0 * CU_BAND + lane * 4 + k) : 1.0f;
    for (int from = first; from < n; from += BATCH * WIDE_STORERS) {
        float4 turn[BATCH]; /* of both pairs */
        int32_t cell[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int at = min(from + i * WIDE_STORERS, n - 1);
            if (TURNED) turn[i] = *(const float4 *)(turns + at * (C / 2));
            if (STORED) cell[i] = rope->cell[t->row + at];
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int row = from + i * WIDE_STORERS, at = min(row, n - 1);
            float x[4];
            *(float4 *)x = *(const float4 *)(sums + wide_sum_at(at, lane * 4));
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (SCALED) x[k] = __fmul_rn(x[k], scale[k]);
            if (TURNED) {
                const float2 lo = attn_turn(x[0], x[1], make_float2(turn[i].x, turn[i].y));
                const float2 hi = attn_turn(x[2], x[3], make_float2(turn[i].z, turn[i].w));
                x[0] = lo.x, x[1] = lo.y, x[2] = hi.x, x[3] = hi.y;
            }
            const bool there = row < n && (!STORED || cell[i] >= 0);
            unsigned char *to = out + at * (H * C * 2);
            if (STORED) {
                const int32_t nth = cell[i] / rope->n_page_cell;
                to = out + nth * rope->page_bytes + (cell[i] - nth * rope->n_page_cell) * (C * 2);
            }
            if (there) attn_put_bf16<4>(to, x);
        }
    }
}
template <bool SCALED>
static __device__ __forceinline__ void wide_put_rope(const large_args *a, const large_tile *t, const float *sums,
                                                     int first, int lane) {
    const int32_t h = t->band0 / LARGE_BANDS, H = a->rope.n_head, G = a->rope.n_kv_head;
    if (h < H)
        wide_put_head<SCALED, true, false>(a, t, sums, h, first, lane);
    else if (h < H + G)
        wide_put_head<SCALED, true, true>(a, t, sums, h, first, lane);
    else if (h < H + 2 * G)
        wide_put_head<SCALED, false, true>(a, t, sums, h, first, lane);
}

/* SCALED: the scales of outputs are still to be multiplied with. */
template <bool SCALED>
static __device__ __forceinline__ void wide_store(const large_args *a, uint32_t n_tile, const float *sums,
                                                  uint32_t full, uint32_t empty, int storer, int lane) {
    const uint32_t rank = cu_cluster_rank();
    uint32_t parity = 0;
    for (uint32_t index = blockIdx.x / WIDE_RANKS; index < n_tile; index += gridDim.x / WIDE_RANKS) {
        large_tile t;
        if (!wide_find(a, index, rank, &t)) continue;
        if (a->epilogue == CU_ADD) wide_put_early(a, &t, storer, lane);
        bar_wait(full, parity);
        parity ^= 1;
        if (a->epilogue == CU_SWIGLU)
            wide_put_swiglu<SCALED>(a, &t, sums, storer, lane);
        else if (a->rope.q_out)
            wide_put_rope<SCALED>(a, &t, sums, storer, lane);
        else
            wide_put<SCALED>(a, &t, sums, storer, lane);
        __syncwarp();
        if (lane == 0) bar_arrive(empty);
    }
}

/* ---- rows by place ------------------------------------------------------------------------------------------------
 *
 * The copy engine takes rows that lie together: x of experts that gather is laid out by place beforehand. A warp a row,
 * which is read once and written to the places of its entries. n_piece: pieces of 16 bytes of a row. */

enum { SPREAD_WARPS = 8, SPREAD_PIECES = 10 /* of a lane at a time */ };

static __global__ void __launch_bounds__(SPREAD_WARPS * 32)
    spread_rows(uint4 *to, const uint4 *x, const int32_t *entry_place, int32_t n_row, int32_t n_used, int32_t n_piece) {
    const int32_t row = (int32_t)(blockIdx.x * SPREAD_WARPS + threadIdx.x / 32), lane = threadIdx.x % 32;
    cu_launch_next();
    cu_wait_previous();
    if (row >= n_row) return;
    x += (int64_t)row * n_piece;
    const int32_t place = lane < n_used ? entry_place[row * n_used + lane] : 0;
    for (int32_t first = 0; first < n_piece; first += SPREAD_PIECES * 32) {
        const int32_t from = first + lane;
        uint4 v[SPREAD_PIECES];
#pragma unroll
        for (int i = 0; i < SPREAD_PIECES; i++)
            if (from + i * 32 < n_piece) v[i] = x[from + i * 32];
        for (int32_t k = 0; k < n_used; k++) {
            uint4 *out = to + (int64_t)__shfl_sync(0xffffffffu, place, k) * n_piece + from;
#pragma unroll
            for (int i = 0; i < SPREAD_PIECES; i++)
                if (from + i * 32 < n_piece) out[i * 32] = v[i];
        }
    }
}

static inline cudaError_t wide_spread(cudaStream_t s, void *to, const void *x, int64_t row_bytes, const cu_routes *r,
                                      int32_t n_row) {
    return cu_launch_args(s, spread_rows, dim3((unsigned)((n_row + SPREAD_WARPS - 1) / SPREAD_WARPS)),
                          SPREAD_WARPS * 32, true, (uint4 *)to, (const uint4 *)x, r->entry_place, n_row, r->n_used,
                          (int32_t)(row_bytes / 16));
}

#endif
