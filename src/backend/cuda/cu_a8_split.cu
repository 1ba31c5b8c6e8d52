/* Weights that meet rows of 8 bits (CU_F8A8, CU_I8A8, CU_I4A8) where a matrix alone has too few tiles for the
 * chip: 1..8 rows, quantized in the kernel from bf16 or by a norm of the residual stream, and up to 32 that were
 * quantized before. Matrices are small and read once: what counts is that all of one is on its way before the kernel in
 * front is done, and what little happens after that.
 *
 * A tile is 64 outputs and all rows. A cluster of n_rank blocks has one, each block n_each segments that follow one
 * another, each of its warpgroups every second of these; one warp more asks for the codes. Totals are to be added in
 * the order of segments, so every segment's sums go to the block that owns the square (32 outputs by 8 rows), which
 * adds them up once all have come. Of very many tiles a block takes whole ones, every n_cluster-th, and asks for the
 * codes of the next while it computes: rows are brought once, and the places of sums and of by_band take turns.
 *
 *      square 2 i + p: rows 8 i .. 8 i + 7, bands 2 p and 2 p + 1; of rank (2 i + p) % n_rank
 *   shared: ring [slot][codes of a tile's segment] | x [own segment][ROWS][128], swizzled (cu_a8_device.cuh)
 *           | sums [turn][segment][own square][row][SUM_ROW] f32 | by_row [segment][row] f32
 *           | fp8: by_band [turn][segment][4] */
#include "backend/cuda/cu_a8_device.cuh"
#include "backend/cuda/cu_cluster.cuh"
#include "backend/cuda/cu_launch.cuh"

enum {
    GROUPS = 2, /* warpgroups */
    WARPS = GROUPS * 4,
    THREADS = GROUPS * 128 + 32,
    SLOTS_MAX = 24,
    SLOTS_FEW = 4,      /* the least that a block that leaves room for another has */
    SEGMENTS_MANY = 12, /* a block does not ask for so many at once */
    SEGMENTS_32 = 20,   /* of 32 rows two blocks of four a tile share a multiprocessor up to so many */
    RANKS_MAX = 8,
    SUM_ROW = 36, /* a row of 32 sums and a gap: neither who writes nor who reads meets a bank twice */
    SHARED_MAX = 220 * 1024,
    /* Of a block, without the two kilobytes it holds besides: two share a multiprocessor; of blocks that stay no two
     * do, but one and one that is BESIDE it. */
    SHARED_TWO = 112 * 1024,
    SHARED_WALK = 128 * 1024,
    SHARED_BESIDE = 96 * 1024,
    SQUARES = 2, /* most of a block: n_rank is at least ROWS / 8 */
    LOADS = 6    /* of a lane at once */
};

typedef struct split_args {
    cu_job j;
    int32_t n_rank, n_each, n_slot;
    int32_t n_tile, n_cluster, n_turn;
    int32_t n_square; /* of a block, but for ranks that have none */
    int32_t n_high;   /* rows of a square: 8, or all where there are less */
    uint32_t per_row; /* 2^16 / n_row and a little: to divide by n_row */
    bool wide;        /* x_f32 and norm_w can be read four numbers at once */
} split_args;

/* Places in shared memory, in bytes. */
typedef struct split_map {
    int32_t x, sums, by_row, by_band, end;
} split_map;
template <cu_format F, int ROWS> static __host__ __device__ __forceinline__ split_map map_of(const split_args *a) {
    split_map m;
    m.x = a->n_slot * a8_tile_bytes(F);
    m.sums = m.x + a->n_each * ROWS * CU_SEGMENT;
    m.by_row = m.sums + a->n_turn * a->j.w.n_seg * a->n_square * a->n_high * SUM_ROW * 4;
    m.by_band = m.by_row + a->j.w.n_seg * a->j.n_row * 4;
    m.end = m.by_band + (F == CU_F8A8 ? a->n_turn * a->j.w.n_seg * A8_TILE_BANDS * 4 : 0);
    return m;
}

/* ---- rows -------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ float4 norm_load(const split_args *a, int32_t row, int32_t i) {
    const float *x = a->j.x_f32 + (int64_t)row * a->j.w.n_in;
    if (a->wide) return cu_load4(x, i, a->j.w.n_in);
    float v[4];
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = i + k < a->j.w.n_in ? x[i + k] : 0.0f;
    return make_float4(v[0], v[1], v[2], v[3]);
}
static __device__ __forceinline__ uint2 weight_load(const split_args *a, int32_t i) {
    const cu_bf16 *w = a->j.norm_w;
    const int32_t n = a->j.w.n_in;
    if (a->wide) return *(const uint2 *)(w + (i < n ? i : 0));
    uint32_t v[4];
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = i + k < n ? w[i + k] : 0;
    return make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
}

/* cu_sum_squares with more of a row on its way at once. wide: x is a multiple of 16 bytes, n of 4. */
static __device__ __forceinline__ float sum_squares(const float *x, int32_t n, bool wide) {
    enum { ONCE = 20 };
    const int lane = threadIdx.x & 31;
    if (!wide) return cu_sum_squares(x, n);
    const uint32_t zero = cu_hidden_zero(n);
    float sum = 0.0f;
    for (int32_t from = 0; from < n; from += ONCE * 128) {
        float4 v[ONCE];
#pragma unroll
        for (int k = 0; k < ONCE; k++) v[k] = cu_load4(x, from + k * 128 + lane * 4, n);
        sum = cu_after(sum, v, ONCE, zero);
#pragma unroll
        for (int k = 0; k < ONCE; k++) sum = cu_add_squares(v[k], sum);
    }
    return cu_warp_sum(sum);
}

/* Rows to be quantized: a warpgroup's items are its segments of all rows, rows of a segment first; its warps take
 * turns. Item i, first of the block's segments, then row. */
static __device__ __forceinline__ int32_t item_own(const split_args *a, int32_t i, int group) {
    return group + (int32_t)((uint32_t)i * a->per_row >> 16) * GROUPS;
}
static __device__ __forceinline__ int32_t item_row(const split_args *a, int32_t i) {
    return i - (int32_t)((uint32_t)i * a->per_row >> 16) * a->j.n_row;
}
/* The norm's weights for LOADS items of the warp. */
static __device__ __forceinline__ void weights_load(uint2 w[LOADS], const split_args *a, int32_t seg0, int32_t from,
                                                    int32_t n_item, int group, int lane) {
#pragma unroll
    for (int k = 0; k < LOADS; k++)
        if (from + 4 * k < n_item)
            w[k] = weight_load(a, (seg0 + item_own(a, from + 4 * k, group)) * CU_SEGMENT + lane * 4);
}

/* The warpgroup's segments of up to 8 rows to shared memory, normed and quantized. row_scale: 1 / sqrt(mean of squares)
 * of rows; heard: a barrier to wait for before it is read; w: weights_load of the warp's first items. LOADS items are
 * on their way at once, and one after the other moves to the front: written out for each, the code, which comes from
 * the L2 cache every time, takes longer than the work. */
template <cu_codes C>
static __device__ __forceinline__ void quantize_normed(uint2 w[LOADS], const split_args *a, unsigned char *memory,
                                                       const split_map *m, const float *row_scale, uint32_t heard,
                                                       int32_t seg0, int32_t n_item, int group, int warp, int lane) {
    const int32_t n_in = a->j.w.n_in;
    const uint32_t by_row = (uint32_t)__cvta_generic_to_shared(memory + m->by_row);
    for (int32_t from = warp; from < n_item; from += 4 * LOADS) {
        float4 v[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; k++) {
            const int32_t item = from + 4 * k, i = (seg0 + item_own(a, item, group)) * CU_SEGMENT + lane * 4;
            if (item >= n_item) break;
            v[k] = norm_load(a, item_row(a, item), i);
        }
        if (from > warp) weights_load(w, a, seg0, from, n_item, group, lane);
        hear(heard, 0);
#pragma unroll 1
        for (int32_t item = from; item < min(from + 4 * LOADS, n_item); item += 4) {
            const int32_t row = item_row(a, item), own = item_own(a, item, group), seg = seg0 + own;
            const uint32_t weight[4] = {w[0].x & 0xffff, w[0].x >> 16, w[0].y & 0xffff, w[0].y >> 16};
            float f[4] = {v[0].x, v[0].y, v[0].z, v[0].w}, scale;
#pragma unroll
            for (int e = 0; e < 4; e++)
                f[e] = seg * CU_SEGMENT + lane * 4 + e < n_in
                           ? cu_f32(cu_round(cu_normed(f[e], row_scale[row], (cu_bf16)weight[e])))
                           : 0.0f;
#pragma unroll
            for (int k = 0; k + 1 < LOADS; k++) v[k] = v[k + 1], w[k] = w[k + 1];
            const uint32_t code = a8_quantize<C>(&scale, f);
            *(uint32_t *)(memory + m->x + own * (8 * CU_SEGMENT) + a8_piece_at(row, lane / 4) + lane % 4 * 4) = code;
            if (lane < min(a->n_rank, 2)) send(at_rank(by_row + (seg * a->j.n_row + row) * 4, lane), scale);
        }
    }
}

/* The same of rows in bf16, without a norm: a quarter of a warp has an item, a lane a piece of it. */
template <cu_codes C>
static __device__ __forceinline__ void quantize_rows(const split_args *a, unsigned char *memory, const split_map *m,
                                                     int32_t seg0, int32_t n_item, int group, int warp, int lane) {
    const uint32_t by_row = (uint32_t)__cvta_generic_to_shared(memory + m->by_row);
    const int piece = lane % 8;
    const auto ask = [&](uint4 x[2], int32_t item) {
        const uint4 *from = (const uint4 *)(a->j.x + item_row(a, item) * a->j.ldx +
                                            (seg0 + item_own(a, item, group)) * CU_SEGMENT + piece * 16);
        x[0] = x[1] = make_uint4(0, 0, 0, 0);
        if (item < n_item) x[0] = __ldcg(from), x[1] = __ldcg(from + 1);
    };
    uint4 x[2], next[2];
    int32_t item = warp * 4 + lane / 8;
    ask(x, item);
#pragma unroll 1
    for (int32_t from = warp * 4; from < n_item; from += 16, item += 16) {
        ask(next, item + 16);
        const uint32_t two[8] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
        uint32_t most = 0; /* magnitudes, in pairs, in their order */
#pragma unroll
        for (int k = 0; k < 8; k++) most = __vmaxu2(most, two[k] & 0x7fff7fffu);
#pragma unroll
        for (int d = 4; d > 0; d >>= 1) most = __vmaxu2(most, __shfl_xor_sync(0xffffffffu, most, d));
        float scale;
        const float f = a8_factor<C>(&scale, max(most << 16, most & 0xffff0000u));
        uint32_t code[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float v[4] = {__uint_as_float(two[2 * k] << 16), __uint_as_float(two[2 * k] & 0xffff0000u),
                                __uint_as_float(two[2 * k + 1] << 16), __uint_as_float(two[2 * k + 1] & 0xffff0000u)};
            code[k] = f == 0.0f ? 0 : a8_code4<C>(v, f);
        }
        if (item < n_item) {
            const int32_t row = item_row(a, item), own = item_own(a, item, group);
            *(uint4 *)(memory + m->x + own * (8 * CU_SEGMENT) + a8_piece_at(row, piece)) =
                make_uint4(code[0], code[1], code[2], code[3]);
            if (piece < min(a->n_rank, 2)) send(at_rank(by_row + ((seg0 + own) * a->j.n_row + row) * 4, piece), scale);
        }
        x[0] = next[0], x[1] = next[1];
    }
}

/* The warpgroup's segments of rows that are codes already. */
template <int ROWS>
static __device__ __forceinline__ void bring_rows(const split_args *a, uint32_t x, int32_t rank, int32_t n_own,
                                                  int group, int thread) {
    const int piece = thread % 8, row0 = thread / 8; /* rows row0, row0 + 16 */
    for (int32_t own = group; own < n_own; own += GROUPS)
#pragma unroll
        for (int row = row0; row < ROWS; row += 16)
            if (row < a->j.n_row)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(x + own * (ROWS * CU_SEGMENT) +
                                                                               a8_piece_at(row, piece)),
                             "l"(a->j.x8.code + row * a->j.x8.ldx + (rank * a->n_each + own) * CU_SEGMENT + piece * 16)
                             : "memory");
}

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

/* NORM: x is normed here. It takes a third more registers, which kernels beside others do not have. */
template <cu_format F, int ROWS, bool NORM>
__global__ void __launch_bounds__(THREADS, 2) a8_split(const __grid_constant__ split_args a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(8) uint64_t bars[2 * SLOTS_MAX + 1];
    __shared__ float row_scale[8];
    const int BAND_BYTES = a8_band_bytes(F), TILE_BYTES = a8_tile_bytes(F);
    const cu_job *j = &a.j;
    const split_map m = map_of<F, ROWS>(&a);
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), thread = threadIdx.x;
    const int32_t rank = (int32_t)cu_cluster_rank(), n_seg = j->w.n_seg, n_row = j->n_row;
    const int32_t first = (int32_t)(blockIdx.x / a.n_rank), seg0 = rank * a.n_each;
    const int32_t n_own = max(min(n_seg - seg0, a.n_each), 0);
    const uint32_t memory_at = (uint32_t)__cvta_generic_to_shared(memory);
    const uint32_t full = (uint32_t)__cvta_generic_to_shared(bars), empty = full + SLOTS_MAX * 8;
    const uint32_t normed = empty + SLOTS_MAX * 8; /* row_scale is there */

    cu_launch_next();
    if (thread == 0) {
        for (int i = 0; i < a.n_slot; i++) {
            bar_init(full + i * 8, 1);
            bar_init(empty + i * 8, 4); /* the warps of one warpgroup */
        }
        if (NORM) bar_init(normed, n_row);
        bar_init_end();
    }
    __syncthreads();
    cluster_arrive(); /* the others may write to our memory from here on */

    if (warp == WARPS) { /* asks for codes; before it waits for a slot it meets the others, who wait for that first */
        int32_t asked = 0;
        for (int32_t tile = first; tile < a.n_tile; tile += a.n_cluster) {
            const unsigned char *from =
                (const unsigned char *)j->w.pack + a8_at(tile * A8_TILE_BANDS, seg0, n_seg) * BAND_BYTES;
            for (int32_t k = 0; k < n_own; k++, asked++) {
                const int slot = asked % a.n_slot;
                if (asked == a.n_slot) cluster_meet();
                if (asked >= a.n_slot) bar_wait(empty + slot * 8, (asked / a.n_slot - 1) & 1);
                if (lane == 0) {
                    bar_arrive_expect(full + slot * 8, TILE_BYTES);
                    copy_bulk_once(memory_at + slot * TILE_BYTES, from + (int64_t)k * (CU_A8_BANDS * BAND_BYTES),
                                   TILE_BYTES, full + slot * 8);
                }
                __syncwarp();
            }
        }
        if (asked <= a.n_slot) cluster_meet();
        if (a.n_rank > 1) {
            cluster_arrive();
            cluster_meet();
        }
        return;
    }

    const int group = warp / 4;
    float *const by_band0 = (float *)(memory + m.by_band);
    const int32_t n_item = (n_own - group + GROUPS - 1) / GROUPS * n_row; /* to be quantized */
    uint2 norm_w[LOADS];
    if (NORM) weights_load(norm_w, &a, seg0, warp % 4, n_item, group, lane);
    for (int32_t i = thread; F == CU_F8A8 && i < n_seg * A8_TILE_BANDS; i += WARPS * 32)
        by_band0[i] = __ldg(j->w.scale + a8_at(first * A8_TILE_BANDS, i / A8_TILE_BANDS, n_seg) + i % A8_TILE_BANDS);
    cluster_meet();
    cu_wait_previous();

    if (ROWS > 8) {
        bring_rows<ROWS>(&a, memory_at + m.x, rank, n_own, group, thread % 128);
        const uint32_t by_row_at = memory_at + m.by_row;
        for (int32_t i = thread; i < n_seg * ROWS; i += WARPS * 32)
            if (i % ROWS < n_row)
                copy4(by_row_at + (i / ROWS * n_row + i % ROWS) * 4,
                      j->x8.scale + i / ROWS * j->x8.ld_scale + i % ROWS);
        asm volatile("cp.async.wait_all;" ::: "memory");
    } else if constexpr (NORM) {
        /* The cluster's blocks share the rows; where there are less, each block takes all. The last warps have the
         * least to quantize. */
        const int32_t n = j->w.n_in, n_share = n_row < a.n_rank ? 1 : a.n_rank;
        for (int32_t r = (WARPS - 1 - warp) * n_share + (n_share == 1 ? 0 : rank); r < n_row; r += WARPS * n_share) {
            const float *x = j->x_f32 + (int64_t)r * n;
            const float scale = cu_norm_scale(sum_squares(x, n, a.wide), n, j->eps);
            if (lane < n_share) {
                const int32_t to = n_share == 1 ? rank : lane;
                send(at_rank((uint32_t)__cvta_generic_to_shared(row_scale + r), to), scale);
                tell(at_rank(normed, to));
            }
        }
        quantize_normed<a8_codes_of(F)>(norm_w, &a, memory, &m, row_scale, normed, seg0, n_item, group, warp % 4, lane);
    } else {
        quantize_rows<a8_codes_of(F)>(&a, memory, &m, seg0, n_item, group, warp % 4, lane);
    }
    a8_show();
    cu_barrier(group + 1, 128);

    const int32_t log_across = j->w.pairs ? 4 : 5, out_in = thread & ((1 << log_across) - 1);
    const int32_t square_bytes = a.n_high * SUM_ROW * 4, each = a.n_square * square_bytes;
    const int32_t left = n_row - 2 * (lane & 3); /* rows from the lane's first on */
    /* Where the warp's sums of rows 8 i .. 8 i + 7 go: of outputs g and g + 8 of its band, row 2 c. */
    uint32_t to[ROWS / 8];
#pragma unroll
    for (int i = 0; i < ROWS / 8; i++) {
        const int32_t square = 2 * i + warp % 4 / 2;
        to[i] = at_rank(memory_at + m.sums + square / a.n_rank * square_bytes +
                            (2 * (lane & 3) * SUM_ROW + warp % 2 * CU_BAND + lane / 4) * 4,
                        square % a.n_rank);
    }
    /* Segments of tiles before, of which the warpgroups took every second as well: slots stay theirs. Where this tile's
     * sums and by_band are. */
    int32_t used = 0, turn = 0;
    for (int32_t tile = first;;) {
        const int32_t band0 = tile * A8_TILE_BANDS;
        float *const by_band = by_band0 + turn * n_seg * A8_TILE_BANDS;
        for (int32_t i = thread; F == CU_F8A8 && used > 0 && i < n_seg * A8_TILE_BANDS; i += WARPS * 32)
            copy4((uint32_t)__cvta_generic_to_shared(by_band + i),
                  j->w.scale + a8_at(band0, i / A8_TILE_BANDS, n_seg) + i % A8_TILE_BANDS);
        /* A thread finishes SQUARES times output `out` of row `row`: of pairs gate and up. from: where the first of its
         * sums lies. */
        float old[SQUARES] = {}, total[SQUARES][2] = {}, by_out[SQUARES][2];
        int32_t out[SQUARES], row[SQUARES], half[SQUARES], from[SQUARES];
#pragma unroll
        for (int q = 0; q < SQUARES; q++) {
            const int32_t line = (thread + q * WARPS * 32) >> log_across, own = line >= a.n_high,
                          row_in = line - own * a.n_high;
            const int32_t square = rank + own * a.n_rank, band = band0 + square % 2 * 2;
            half[q] = square % 2 * 2;
            row[q] = square / 2 * 8 + row_in;
            out[q] = (j->w.pairs ? band / 2 : band) * CU_BAND + out_in;
            from[q] = own * square_bytes / 4 + row_in * SUM_ROW + out_in;
            if (own >= a.n_square || square >= ROWS / 4 || row_in >= a.n_high || row[q] >= n_row ||
                out[q] >= j->w.n_out)
                out[q] = -1;
            by_out[q][0] = by_out[q][1] = 1.0f;
            if (out[q] < 0) continue;
            if (j->epilogue == CU_ADD) old[q] = __ldcg(j->y + row[q] * j->ldy + out[q]);
            if (F == CU_F8A8) continue;
            by_out[q][0] = __ldg(j->w.scale + band * CU_BAND + out_in);
            if (j->w.pairs) by_out[q][1] = __ldg(j->w.scale + (band + 1) * CU_BAND + out_in);
        }
        for (int32_t k = (used + group) % GROUPS; k < n_own; k += GROUPS) {
            const int slot = (used + k) % a.n_slot;
            a8_sum<F> acc[ROWS / 2] = {};
            uint32_t code[4][4];
            bar_wait(full + slot * 8, ((used + k) / a.n_slot) & 1);
            a8_codes<F>(code, memory + slot * TILE_BYTES + warp % 4 * BAND_BYTES, lane);
            a8_segment<ROWS>(acc, code, memory_at + m.x + k * (ROWS * CU_SEGMENT));
            wide_wait<0>();
            a8_hold<ROWS / 2>(acc);
            wide_hold_codes<4>(code);
            if (lane == 0) bar_arrive(empty + slot * 8);
            const int32_t at = (turn * n_seg + seg0 + k) * each;
#pragma unroll
            for (int i = 0; i < ROWS / 8; i++) {
                if (left > 8 * i) {
                    send(to[i] + at, a8_number(acc[4 * i]));
                    send(to[i] + at + 32, a8_number(acc[4 * i + 2]));
                }
                if (left > 8 * i + 1) {
                    send(to[i] + at + SUM_ROW * 4, a8_number(acc[4 * i + 1]));
                    send(to[i] + at + (SUM_ROW + 8) * 4, a8_number(acc[4 * i + 3]));
                }
            }
        }
        if (a.n_rank > 1) {
            cluster_arrive();
            cluster_meet();
        } else { /* behind it nobody reads what the next tile but one writes to, and all rows are there */
            asm volatile("cp.async.wait_all;" ::: "memory");
            cu_barrier(GROUPS + 1, WARPS * 32);
        }
#pragma unroll
        for (int q = 0; q < SQUARES; q++) {
            if (out[q] < 0) continue;
            const float *sum = (const float *)(memory + m.sums + turn * n_seg * each) + from[q];
            const float *by_row = (const float *)(memory + m.by_row) + row[q];
            const float *band = by_band + half[q] + (j->w.pairs ? 0 : out_in / CU_BAND);
#pragma unroll 8
            for (int32_t i = 0; i < n_seg; i++, sum += each / 4, band += A8_TILE_BANDS) {
                const float s = by_row[i * n_row];
                total[q][0] = __fmaf_rn(F == CU_F8A8 ? __fmul_rn(s, band[0]) : s, sum[0], total[q][0]);
                if (j->w.pairs)
                    total[q][1] = __fmaf_rn(F == CU_F8A8 ? __fmul_rn(s, band[1]) : s, sum[CU_BAND], total[q][1]);
            }
            if (F != CU_F8A8) {
                total[q][0] = __fmul_rn(total[q][0], by_out[q][0]);
                total[q][1] = __fmul_rn(total[q][1], by_out[q][1]);
            }
            if (j->epilogue == CU_SWIGLU)
                j->h[row[q] * j->ldh + out[q]] = cu_round(cu_swiglu(total[q][0], total[q][1]));
            else
                j->y[row[q] * j->ldy + out[q]] = j->epilogue == CU_ADD ? __fadd_rn(old[q], total[q][0]) : total[q][0];
        }
        tile += a.n_cluster;
        if (tile >= a.n_tile) break;
        used += n_own;
        turn ^= 1;
    }
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

static int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
static bool aligned(const void *p) { return ((uintptr_t)p & 15) == 0; }

/* n_rank blocks a tile, of n_cluster tiles at once; a block's memory is `room`, or all there is where that leaves no
 * ring. false: nor does that. Of a ring that comes round a slot is always the same warpgroup's: phases of a barrier are
 * told apart by parity, and one that did not wait for the codes before could take the end of those before them for the
 * end of its own. */
template <cu_format F, int ROWS> static bool plan(split_args *a, int32_t n_rank, int32_t n_cluster, int32_t room) {
    a->n_rank = n_rank;
    a->n_cluster = n_cluster;
    a->n_turn = n_cluster < a->n_tile ? 2 : 1;
    a->n_square = ceil_div(ROWS / 4, n_rank);
    a->n_high = least(a->j.n_row, 8);
    a->n_each = ceil_div(a->j.w.n_seg, n_rank);
    a->n_slot = 0;
    const int32_t rest = map_of<F, ROWS>(a).end, n_ask = a->n_each * ceil_div(a->n_tile, n_cluster);
    const int32_t enough = least(n_ask, SLOTS_FEW), n = (room - rest) / a8_tile_bytes(F);
    a->n_slot = least(least(n_ask, SLOTS_MAX), n >= enough ? n : (SHARED_MAX - rest) / a8_tile_bytes(F));
    if (a->n_slot < n_ask) a->n_slot -= a->n_slot % GROUPS;
    return a->n_slot >= enough;
}

/* As many blocks a tile as give every multiprocessor something. Where a block has more segments than it can ask for at
 * once, codes should keep coming, and a second wave of blocks would begin with none on their way: no more blocks than
 * multiprocessors, if that is most of them, and several of very many tiles a block. Gate and up go the second way, down
 * of the same layer the first: of one or two rows its blocks find room beside those, and ask for what they can before
 * they wait. */
template <cu_format F, int ROWS, bool NORM> static cudaError_t run(cudaStream_t s, const cu_job *j) {
    static uint64_t ready;
    split_args a = {};
    int32_t n_core, n_rank = ROWS / 8, room = SHARED_TWO;
    cudaError_t e = cu_core_count(&n_core);
    if (e == cudaSuccess) e = cu_shared_whole(&ready, (const void *)a8_split<F, ROWS, NORM>, SHARED_MAX);
    if (e != cudaSuccess) return e;
    a.j = *j;
    a.per_row = 65536u / (uint32_t)j->n_row + 1;
    a.wide = j->w.n_in % 4 == 0 && aligned(j->x_f32) && aligned(j->norm_w);
    const int32_t n_tile = a.n_tile = ceil_div(j->w.n_band, A8_TILE_BANDS);
    const int32_t n_walk = ceil_div(n_tile, ceil_div(n_tile, n_core)), once = n_core / n_tile;
    if (n_rank > 1 || n_tile < 2 * n_core || !plan<F, ROWS>(&a, 1, n_walk, SHARED_WALK)) {
        while (n_rank < RANKS_MAX && n_rank * 4 <= j->w.n_seg && n_tile * n_rank * 5 < n_core * 6) n_rank *= 2;
        if (n_rank * SEGMENTS_MANY < j->w.n_seg && once >= ROWS / 8 && once * n_tile * 4 >= n_core * 3)
            n_rank = once, room = SHARED_BESIDE;
        while (!plan<F, ROWS>(&a, n_rank, n_tile, room)) /* more blocks have more room for x */
            if ((n_rank *= 2) > RANKS_MAX) return cudaErrorInvalidValue;
    }
    void *args[] = {&a};
    return cu_launch(s, (const void *)a8_split<F, ROWS, NORM>, dim3((unsigned)(a.n_cluster * a.n_rank)), THREADS,
                     (size_t)map_of<F, ROWS>(&a).end, !j->alone, (unsigned)a.n_rank, args);
}
template <int ROWS, bool NORM> static cudaError_t run_any(cudaStream_t s, const cu_job *j) {
    return j->w.format == CU_F8A8   ? run<CU_F8A8, ROWS, NORM>(s, j)
           : j->w.format == CU_I8A8 ? run<CU_I8A8, ROWS, NORM>(s, j)
           : j->w.format == CU_I4A8 ? run<CU_I4A8, ROWS, NORM>(s, j)
                                    : cudaErrorInvalidValue;
}

cudaError_t cu_a8_skinny_run(cudaStream_t s, const cu_job *j) {
    if (j->n_row <= 0) return cudaSuccess;
    if (j->n_row > CU_SKINNY_MAX || j->w.pairs != (j->epilogue == CU_SWIGLU) || j->w.n_in > CU_A8_INPUTS ||
        (!j->x_f32 && (!aligned(j->x) || j->ldx % 8 != 0)))
        return cudaErrorInvalidValue;
    bool took = false;
    const cudaError_t e = cu_a8_one_run(s, j, &took);
    if (took || e != cudaSuccess) return e;
    return j->x_f32 ? run_any<8, true>(s, j) : run_any<8, false>(s, j);
}

cudaError_t cu_a8_split_run(cudaStream_t s, const cu_job *j, bool *took) {
    const int32_t n_tile = ceil_div(j->w.n_band, A8_TILE_BANDS);
    int32_t n_core;
    const cudaError_t e = cu_core_count(&n_core);
    *took = e == cudaSuccess && j->w.n_in <= CU_A8_INPUTS && j->n_row > 0 &&
            j->n_row <= (j->w.n_seg <= SEGMENTS_32 ? 32 : 16) && n_tile * 2 <= n_core && j->w.n_seg >= 8;
    if (!*took) return e;
    return j->n_row <= 16 ? run_any<16, false>(s, j) : run_any<32, false>(s, j);
}
