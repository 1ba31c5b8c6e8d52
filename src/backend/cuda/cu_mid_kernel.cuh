/* Linears of 9 to some hundred rows: the kernel of cu_mid.cu. Weights are still most of what has to be read, but x is
 * no longer small and a matrix alone has too few tiles for the chip.
 *
 * A tile is n_pair pairs of bands times ROWS rows; a warp of it has a pair (32 outputs; of gate and up: both) and all
 * rows, of 64 half. One warp more, or two, fill a ring of segments in shared memory: codes by bulk copies, asked for
 * before the kernel in front is done; x by cp.async. Barriers in shared memory count what has come and who is done with
 * a slot, so that no warp waits for another that reads the same slot.
 *
 * SPLIT: a cluster of n_rank blocks shares a tile and each has some of the segments. Totals are to be added in the
 * order of segments, so every segment's sums go to the block that owns the square (16 outputs by 8 rows of the pair,
 * all warps' squares dealt out in turn), which adds them up once all have come. A pass is n_each segments of each
 * block; of more passes than one the sums have two places, and a pass is added up after the products of the next.
 *
 *      segment k of rank r: (k / n_each * n_rank + r) * n_each + k % n_each
 *   shared: ring [slot]: codes [band][2 groups], x [2 groups][ROWS][128 bytes]
 *           | sums [turn][segment of the pass][own square][2 bands][lane] float4
 * The eight 16-byte pieces of a row of x sit at piece ^ (row & 7): eight lanes that read the same piece of eight rows
 * then touch all banks. Rows that are not there are not read: what is computed of them goes nowhere. */
#ifndef ERN_BACKEND_CUDA_CU_MID_KERNEL_CUH
#define ERN_BACKEND_CUDA_CU_MID_KERNEL_CUH

#include "backend/cuda/cu_cluster.cuh"
#include "backend/cuda/cu_large_kernel.cuh"
#include "backend/cuda/cu_launch.cuh"

enum {
    MID_SLOTS_MAX = 8,
    MID_RANKS_MAX = 8,
};

typedef struct mid_args {
    large_args l;
    int32_t n_pair; /* pairs of bands of a tile */
    int32_t n_slot;
    int32_t n_rank, n_each, n_pass; /* blocks of a tile, segments of a block a pass; not SPLIT: 1, n_seg, 1 */
} mid_args;

/* Parts of the rows that warps share. */
static __host__ __device__ constexpr int mid_parts(int rows) { return rows == 64 ? 2 : 1; }
/* Warps that fill the ring; of 64 rows one would be the limit. */
static __host__ __device__ constexpr int mid_fillers(int rows) { return rows == 64 ? 2 : 1; }
/* Most warps that multiply: two blocks have 128 registers a thread, of 16 rows 96. */
static __host__ __device__ constexpr int mid_warps_max(int rows) { return rows == 16 ? 8 : 8 - mid_fillers(rows); }
static __host__ __device__ constexpr int mid_x_bytes(int rows) { return rows * CU_SEGMENT * 2; }

static __device__ __forceinline__ void mid_send(uint32_t to, const float v[4]) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]),
                 "f"(v[3])
                 : "memory");
}

/* What all warps of a block know. */
typedef struct mid_block {
    uint32_t ring, slot_bytes, full, empty; /* places in shared memory */
    int32_t rank;
    int32_t n_own; /* segments */
    large_tile t;
} mid_block;

static __device__ __forceinline__ int32_t mid_segment(const mid_args *a, int32_t rank, int32_t k) {
    return (k / a->n_each * a->n_rank + rank) * a->n_each + k % a->n_each;
}

/* ---- the warp that fills the ring ---------------------------------------------------------------------------------
 */

template <cu_format F>
static __device__ __forceinline__ void mid_ask_codes(const mid_args *a, const mid_block *b, int32_t k, int slot,
                                                     int lane) {
    constexpr int BYTES = 2 * large_group_bytes(F);
    const int32_t last = a->l.w.n_band - 1, band = b->t.band0 + lane < last ? b->t.band0 + lane : last;
    const uint32_t bar = b->full + slot * 8;
    if (lane == 0) bar_expect(bar, 2 * a->n_pair * BYTES);
    __syncwarp();
    if (lane < 2 * a->n_pair)
        copy_bulk(b->ring + slot * b->slot_bytes + lane * BYTES,
                  b->t.pack + ((int64_t)band * a->l.w.n_seg + mid_segment(a, b->rank, k)) * BYTES, BYTES, bar);
}

/* fill: which of the mid_fillers(ROWS) warps. The first asks for the codes. */
template <cu_format F, int ROWS>
static __device__ __forceinline__ void mid_fill(const mid_args *a, const mid_block *b, const uint32_t *row_of, int fill,
                                                int lane) {
    constexpr int EACH = ROWS / 2 / mid_fillers(ROWS); /* rows of a lane: every second */
    const int32_t ahead = b->n_own < a->n_slot ? b->n_own : a->n_slot, piece = lane & 15;
    const int row0 = fill * (2 * EACH) + lane / 16;
    const int32_t n_row = b->t.row_end - b->t.row - row0;
    const uint32_t x0 = b->ring + a->n_pair * 4 * large_group_bytes(F) + piece / 8 * (ROWS * 128) + row0 * 128;
    uint32_t from[EACH], swap[4]; /* where the rows begin in x; the places of the piece, which repeat every 8 rows */
    if (fill == 0)
        for (int32_t k = 0; k < ahead; k++) mid_ask_codes<F>(a, b, k, k, lane);
#pragma unroll
    for (int i = 0; i < EACH; i++) from[i] = row_of[row0 + 2 * i] + piece;
#pragma unroll
    for (int i = 0; i < 4; i++) swap[i] = ((piece ^ (row0 + 2 * i)) & 7) << 4;
    cu_wait_previous();
    int slot = 0;
    uint32_t parity = 1; /* the first time round nobody has to leave a slot */
    for (int32_t k = 0; k < b->n_own; k++) {
        if (k >= ahead) {
            bar_wait(b->empty + slot * 8, parity);
            if (fill == 0) mid_ask_codes<F>(a, b, k, slot, lane);
        }
        const uint32_t x = x0 + slot * b->slot_bytes;
        const uint4 *segment = (const uint4 *)a->l.x + (int64_t)mid_segment(a, b->rank, k) * (CU_SEGMENT / 8);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (2 * i < n_row)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(x + i * 256 + swap[i % 4]),
                             "l"(segment + from[i])
                             : "memory");
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(b->full + slot * 8) : "memory");
        if (++slot == a->n_slot) slot = 0, parity ^= 1;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* ---- the warps that multiply --------------------------------------------------------------------------------------
 */

/* Four squares of 8 rows by 8 inputs as B operands. at: of the lane's row (lane % 8) of square lane / 8. */
static __device__ __forceinline__ uint4 mid_b(uint32_t at) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}

/* One segment of a pair of bands, from zero. codes: of the warp's pair; x: of its rows, with lane % 8 added. */
template <cu_format F, int ROWS, int TILES>
static __device__ __forceinline__ void mid_products(float acc[2][TILES][4], const unsigned char *codes, uint32_t x,
                                                    int lane) {
    constexpr int GROUP = large_group_bytes(F);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < TILES; i++) acc[m][i][0] = acc[m][i][1] = acc[m][i][2] = acc[m][i][3] = 0.0f;
#pragma unroll
    for (int step = 0; step < 4; step++) {
        const int q = step / 2, h = step % 2; /* group, half of it */
        uint4 b[TILES];
        uint32_t code[2][2][4];
#pragma unroll
        for (int m = 0; m < 2; m++) large_codes<F>(code[m], codes + (m * 2 + q) * GROUP, h, lane);
#pragma unroll
        for (int i = 0; i < TILES; i++)
            b[i] = mid_b(x + q * (ROWS * 128) + i * 1024 + (((4 * h + lane / 8) ^ (lane % 8)) << 4));
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int i = 0; i < TILES; i++) cu_mma(acc[m][i], code[m][k], k ? b[i].z : b[i].x, k ? b[i].w : b[i].y);
    }
}

/* Bits of sums that all codes and rows of a segment are in. */
template <int TILES> static __device__ __forceinline__ uint32_t mid_read(const float acc[2][TILES][4]) {
    uint32_t read = 0;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < TILES; i++) read |= __float_as_uint(acc[m][i][0]);
    return read;
}

template <int N>
static __device__ __forceinline__ void mid_scale(float total[N][4], const large_tile *t, int32_t band, int32_t n_band,
                                                 int lane) {
    if (band >= n_band) return;
    const float s0 = t->scale[band * CU_BAND + lane / 4], s8 = t->scale[band * CU_BAND + lane / 4 + 8];
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) total[i][k] = __fmul_rn(total[i][k], k < 2 ? s0 : s8);
}

template <cu_format F, int ROWS, bool SPLIT>
__global__ void __launch_bounds__((mid_warps_max(ROWS) + mid_fillers(ROWS)) * 32, 2)
    mid_kernel(const __grid_constant__ mid_args a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(8) uint64_t bars[2 * MID_SLOTS_MAX + 4];
    __shared__ uint32_t row_of[ROWS]; /* of x, in pieces of 16 bytes */
    constexpr int GROUP = large_group_bytes(F), PARTS = mid_parts(ROWS), TILES = ROWS / 8 / PARTS;
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    const int n_warp = a.n_pair * PARTS;
    const int32_t n_seg = a.l.w.n_seg, last_band = a.l.w.n_band - 1;
    const uint32_t zero = cu_hidden_zero(n_seg);
    mid_block b;

    cu_launch_next();
    b.ring = (uint32_t)__cvta_generic_to_shared(memory);
    b.slot_bytes = a.n_pair * 4 * GROUP + mid_x_bytes(ROWS);
    b.full = (uint32_t)__cvta_generic_to_shared(bars);
    b.empty = b.full + MID_SLOTS_MAX * 8;
    b.rank = SPLIT ? (int32_t)cu_cluster_rank() : 0;
    const uint32_t came = b.empty + MID_SLOTS_MAX * 8, read = came + 2 * 8; /* sums, by turn */
    if (threadIdx.x == 0) {
        for (int i = 0; i < a.n_slot; i++) {
            bar_init(b.full + i * 8,
                     32 * mid_fillers(ROWS)); /* the lanes that copy x; and the bytes that come by themselves */
            bar_init(b.empty + i * 8, n_warp);
        }
        for (int i = 0; SPLIT && i < 4; i++) bar_init(came + i * 8, n_warp * a.n_rank);
        bar_init_end();
    }
    if (!SPLIT && a.l.experts) cu_wait_previous(); /* which tile it will be is for an earlier kernel to say */
    if (!large_find(&a.l, blockIdx.x / a.n_rank, ROWS, &b.t)) return;
    for (int r = threadIdx.x; r < ROWS; r += blockDim.x) {
        const int32_t row = large_row(&a.l, &b.t, r);
        row_of[r] = row < 0 ? 0 : (uint32_t)row * (uint32_t)(a.l.ldx / 8);
    }
    const int32_t last0 = ((a.n_pass - 1) * a.n_rank + b.rank) * a.n_each; /* first segment of the last pass */
    const int32_t n_last = max(min(n_seg - last0, a.n_each), 0);
    b.n_own = (a.n_pass - 1) * a.n_each + n_last;
    __syncthreads();
    /* The others may write to our memory from here on. */
    if (SPLIT) cluster_arrive();
    if (warp >= n_warp) {
        mid_fill<F, ROWS>(&a, &b, row_of, warp - n_warp, lane);
        if (SPLIT) cluster_meet();
        return;
    }
    cu_wait_previous();

    const int pair = warp / PARTS, part = warp % PARTS;
    const unsigned char *codes = memory + pair * 4 * GROUP;
    const uint32_t x = b.ring + a.n_pair * 4 * GROUP + (part * (ROWS / PARTS) + lane % 8) * 128;
    float acc[2][TILES][4];
    int slot = 0;
    uint32_t parity = 0;
    if (!SPLIT) {
        float total[2][TILES][4] = {};
        const int32_t band = b.t.band0 + pair * 2;
        for (int32_t seg = 0; seg < n_seg; seg++) {
            float scale[2] = {};
            if (F == CU_F8)
#pragma unroll
                for (int m = 0; m < 2; m++)
                    scale[m] = __ldg(b.t.scale + (int64_t)min(band + m, last_band) * n_seg + seg);
            bar_wait(b.full + slot * 8, parity);
            mid_products<F, ROWS, TILES>(acc, codes + slot * b.slot_bytes, x + slot * b.slot_bytes, lane);
            __syncwarp();
            if (lane == 0) bar_leave(b.empty + slot * 8, mid_read<TILES>(acc), zero);
            if (++slot == a.n_slot) slot = 0, parity ^= 1;
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int i = 0; i < TILES; i++)
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        total[m][i][k] = F == CU_F8 ? __fmaf_rn(scale[m], acc[m][i][k], total[m][i][k])
                                                    : __fadd_rn(total[m][i][k], acc[m][i][k]);
        }
        if (F == CU_I8 || F == CU_I4)
#pragma unroll
            for (int m = 0; m < 2; m++) mid_scale<TILES>(total[m], &b.t, band + m, a.l.w.n_band, lane);
        const int32_t row = b.t.row + part * (ROWS / PARTS);
        if (a.l.epilogue == CU_SWIGLU) {
#pragma unroll
            for (int i = 0; i < TILES; i++)
                large_put_swiglu(&a.l, &b.t, total[0][i], total[1][i], band / 2, row + i * 8, lane);
        } else {
            float old[2][TILES * 4];
#pragma unroll
            for (int m = 0; m < 2; m++) large_old<TILES>(old[m], &a.l, &b.t, band + m, row, lane);
#pragma unroll
            for (int m = 0; m < 2; m++) large_put<TILES>(&a.l, &b.t, &total[m][0][0], old[m], band + m, row, lane);
        }
    } else {
        constexpr int OWN = TILES / 2;                      /* most squares of a warp that it adds up: of two ranks */
        const int32_t n_square = n_warp * TILES / a.n_rank; /* of this block */
        const uint32_t sums = a.n_slot * b.slot_bytes + lane * 16;
        uint32_t to[TILES];
        cluster_meet();
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const int32_t square = warp * TILES + i;
            to[i] = at_rank(b.ring + sums + square / a.n_rank * 1024, square % a.n_rank);
        }
        float total[OWN][2][4] = {}, old[OWN][2][4];
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int32_t own = warp + i * n_warp, square = own * a.n_rank + b.rank;
            if (own >= n_square) continue;
#pragma unroll
            for (int m = 0; m < 2; m++)
                large_old<1>(old[i][m], &a.l, &b.t, b.t.band0 + square / (ROWS / 8) * 2 + m,
                             b.t.row + square % (ROWS / 8) * 8, lane);
        }
        for (int32_t pass = 0; pass <= a.n_pass; pass++) {
            if (pass < a.n_pass) {
                if (pass >= 2) hear(read + (pass & 1) * 8, ((pass >> 1) & 1) ^ 1);
                const int32_t n = pass < a.n_pass - 1 ? a.n_each : n_last;
                uint32_t at = ((pass & 1) * a.n_rank + b.rank) * a.n_each * n_square * 1024;
                for (int32_t k = 0; k < n; k++, at += n_square * 1024) {
                    bar_wait(b.full + slot * 8, parity);
                    mid_products<F, ROWS, TILES>(acc, codes + slot * b.slot_bytes, x + slot * b.slot_bytes, lane);
                    __syncwarp();
                    if (lane == 0) bar_leave(b.empty + slot * 8, mid_read<TILES>(acc), zero);
                    if (++slot == a.n_slot) slot = 0, parity ^= 1;
#pragma unroll
                    for (int i = 0; i < TILES; i++) {
                        mid_send(to[i] + at, acc[0][i]);
                        mid_send(to[i] + at + 512, acc[1][i]);
                    }
                }
                __syncwarp();
                if (lane < a.n_rank) tell(at_rank(came + (pass & 1) * 8, lane));
            }
            if (pass == 0) continue;
            const int32_t done = pass - 1, seg0 = done * a.n_rank * a.n_each,
                          n = min(n_seg - seg0, a.n_rank * a.n_each);
            hear(came + (done & 1) * 8, (done >> 1) & 1);
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const int32_t own = warp + i * n_warp, square = own * a.n_rank + b.rank;
                if (own >= n_square) continue;
                const int32_t band = b.t.band0 + square / (ROWS / 8) * 2;
                const float *scale[2] = {b.t.scale + (int64_t)min(band, last_band) * n_seg + seg0,
                                         b.t.scale + (int64_t)min(band + 1, last_band) * n_seg + seg0};
                const unsigned char *from = memory + sums + ((done & 1) * a.n_rank * a.n_each * n_square + own) * 1024;
#pragma unroll 4
                for (int32_t j = 0; j < n; j++, from += n_square * 1024) {
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        const float4 v = *(const float4 *)(from + m * 512);
                        const float part[4] = {v.x, v.y, v.z, v.w}, s = F == CU_F8 ? __ldg(scale[m] + j) : 0.0f;
#pragma unroll
                        for (int k = 0; k < 4; k++)
                            total[i][m][k] =
                                F == CU_F8 ? __fmaf_rn(s, part[k], total[i][m][k]) : __fadd_rn(total[i][m][k], part[k]);
                    }
                }
            }
            if (done + 2 < a.n_pass) {
                __syncwarp();
                if (lane < a.n_rank) tell(at_rank(read + (done & 1) * 8, lane));
            }
        }
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int32_t own = warp + i * n_warp, square = own * a.n_rank + b.rank;
            if (own >= n_square) continue;
            const int32_t band = b.t.band0 + square / (ROWS / 8) * 2, row = b.t.row + square % (ROWS / 8) * 8;
            if (F == CU_I8 || F == CU_I4)
#pragma unroll
                for (int m = 0; m < 2; m++) mid_scale<1>(&total[i][m], &b.t, band + m, a.l.w.n_band, lane);
            if (a.l.epilogue == CU_SWIGLU) {
                if (band <= last_band) large_put_swiglu(&a.l, &b.t, total[i][0], total[i][1], band / 2, row, lane);
            } else {
#pragma unroll
                for (int m = 0; m < 2; m++) large_put<1>(&a.l, &b.t, total[i][m], old[i][m], band + m, row, lane);
            }
        }
    }
}

#endif
