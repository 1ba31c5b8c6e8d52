/* fp8 codes times rows in fp8 (CU_F8A8) where a matrix alone has too few tiles for the chip: 1..8 rows, quantized in
 * the kernel from bf16 or by a norm of the residual stream, and up to 16 that were quantized before. Matrices are small
 * and read once: what counts is that all of one is on its way before the kernel in front is done, and what little
 * happens after that.
 *
 * A tile is 64 outputs and all rows. A cluster of n_rank blocks has one, each block some of the segments, each of its
 * warpgroups every second of these; one warp more asks for the codes. Totals are to be added in the order of segments,
 * so every segment's sums go to the block that owns the square (32 outputs by 8 rows), which adds them up once all have
 * come. A pass is n_each segments of each block; most matrices take one.
 *
 *      segment k of rank r: (k / n_each * n_rank + r) * n_each + k % n_each
 *      square 2 i + p: rows 8 i .. 8 i + 7, bands 2 p and 2 p + 1; of rank (2 i + p) % n_rank
 *   shared: ring [slot][4 bands][2048] | x [own segment][ROWS][128], swizzled (cu_f8_device.cuh)
 *           | sums [segment of the pass][own square][8][SUM_ROW] f32 | by_row [segment][ROWS] f32
 *           | by_band [segment][4] */
#include "backend/cuda/cu_f8_device.cuh"
#include "backend/cuda/cu_launch.cuh"

enum {
    GROUPS = 2, /* warpgroups */
    WARPS = GROUPS * 4,
    THREADS = GROUPS * 128 + 32,
    SLOTS_MAX = 8,
    RANKS_MAX = 8,
    SUM_ROW = 36, /* a row of 32 sums and a gap: neither who writes nor who reads meets a bank twice */
    SUM_BYTES = 8 * SUM_ROW * 4,
    SHARED_MAX = 220 * 1024,
    SEGMENTS_MANY = 10,
    SQUARES = 2, /* most of a block: n_rank is at least ROWS / 8 */
    LOADS = 5    /* of a lane at once */
};

typedef struct split_args {
    cu_job j;
    int32_t n_rank, n_each, n_pass, n_slot;
    int32_t n_square; /* of a block, but for ranks that have none */
    bool wide;        /* x_f32 and norm_w can be read four numbers at once */
} split_args;

/* Places in shared memory, in bytes. */
typedef struct split_map {
    int32_t x, sums, by_row, by_band, end;
} split_map;
template <int ROWS> static __host__ __device__ __forceinline__ split_map map_of(const split_args *a) {
    split_map m;
    m.x = a->n_slot * F8_TILE_BYTES;
    m.sums = m.x + a->n_pass * a->n_each * ROWS * CU_SEGMENT;
    m.by_row = m.sums + a->n_rank * a->n_each * a->n_square * SUM_BYTES;
    m.by_band = m.by_row + a->j.w.n_seg * ROWS * 4;
    m.end = m.by_band + a->j.w.n_seg * F8_TILE_BANDS * 4;
    return m;
}
static __device__ __forceinline__ int32_t segment_of(const split_args *a, int32_t rank, int32_t k) {
    const int32_t pass = a->n_pass == 1 ? 0 : k / a->n_each; /* most matrices take one */
    return (pass * (a->n_rank - 1) + rank) * a->n_each + k;
}

/* ---- clusters ---------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void arrive_all(void) {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
static __device__ __forceinline__ void meet_all(void) { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
static __device__ __forceinline__ uint32_t at_rank(uint32_t at, uint32_t rank) {
    uint32_t out;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(at), "r"(rank));
    return out;
}
static __device__ __forceinline__ void send(uint32_t to, float v) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory");
}

/* Arrives at a barrier of any block: what this thread sent there before can be read behind hear. */
static __device__ __forceinline__ void tell(uint32_t bar) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}
static __device__ __forceinline__ void hear(uint32_t bar) {
    uint32_t done = 0;
    while (!done)
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0; "
                     "selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(bar)
                     : "memory");
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

/* The warpgroup's segments of up to 8 rows to shared memory, quantized. Of one row or two its four warps share the
 * segments, of more the rows as well. row_scale: 1 / sqrt(mean of squares) of rows, of a norm. heard: a barrier to wait
 * for before it is read, 0: none. */
static __device__ __forceinline__ void quantize_rows(const split_args *a, unsigned char *memory, const split_map *m,
                                                     const float *row_scale, uint32_t heard, int32_t rank,
                                                     int32_t n_own, int group, int warp, int lane) {
    const int32_t n_row = a->j.n_row, n_in = a->j.w.n_in, shift = n_row == 1 ? 0 : n_row == 2 ? 1 : 2;
    const int32_t row0 = warp & ((1 << shift) - 1), step = GROUPS << (2 - shift);
    const int32_t own0 = group + (warp >> shift) * GROUPS;
    const bool norm = a->j.x_f32 != NULL;
    const uint32_t by_row = (uint32_t)__cvta_generic_to_shared(memory + m->by_row);
    for (int32_t row = row0; row < n_row; row += 4)
        for (int32_t own = own0; own < n_own; own += LOADS * step) {
            float4 v[LOADS];
            uint2 w[LOADS];
#pragma unroll
            for (int k = 0; k < LOADS; k++) {
                if (own + k * step >= n_own) break;
                const int32_t i = segment_of(a, rank, own + k * step) * CU_SEGMENT + lane * 4;
                if (norm) {
                    v[k] = norm_load(a, row, i);
                    w[k] = weight_load(a, i);
                } else {
                    const uint2 x = __ldcg((const uint2 *)(a->j.x + row * a->j.ldx + i));
                    v[k] = make_float4(cu_f32((cu_bf16)(x.x & 0xffff)), cu_f32((cu_bf16)(x.x >> 16)),
                                       cu_f32((cu_bf16)(x.y & 0xffff)), cu_f32((cu_bf16)(x.y >> 16)));
                }
            }
            if (heard) hear(heard);
#pragma unroll
            for (int k = 0; k < LOADS; k++) {
                if (own + k * step >= n_own) break;
                const int32_t seg = segment_of(a, rank, own + k * step);
                float f[4] = {v[k].x, v[k].y, v[k].z, v[k].w}, scale;
                if (norm) {
                    const uint32_t weight[4] = {w[k].x & 0xffff, w[k].x >> 16, w[k].y & 0xffff, w[k].y >> 16};
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        f[e] = seg * CU_SEGMENT + lane * 4 + e < n_in
                                   ? cu_f32(cu_round(cu_normed(f[e], row_scale[row], (cu_bf16)weight[e])))
                                   : 0.0f;
                }
                const uint32_t code = f8_quantize(&scale, f);
                *(uint32_t *)(memory + m->x + (own + k * step) * (8 * CU_SEGMENT) + f8_piece_at(row, lane / 4) +
                              lane % 4 * 4) = code;
                if (lane < min(a->n_rank, 2)) send(at_rank(by_row + (seg * 8 + row) * 4, lane), scale);
            }
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
                                                                               f8_piece_at(row, piece)),
                             "l"(a->j.x8.code + row * a->j.x8.ldx + segment_of(a, rank, own) * CU_SEGMENT + piece * 16)
                             : "memory");
}

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void barrier_of(int id, int n_thread) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_thread) : "memory");
}

template <int ROWS> __global__ void __launch_bounds__(THREADS, 2) f8_split(const __grid_constant__ split_args a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(8) uint64_t bars[2 * SLOTS_MAX + 1];
    __shared__ float row_scale[8];
    const cu_job *j = &a.j;
    const split_map m = map_of<ROWS>(&a);
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), thread = threadIdx.x;
    const int32_t rank = (int32_t)cu_cluster_rank(), n_seg = j->w.n_seg, n_row = j->n_row;
    const int32_t band0 = (int32_t)(blockIdx.x / a.n_rank) * F8_TILE_BANDS, last_band = j->w.n_band - 1;
    const int32_t last0 = ((a.n_pass - 1) * a.n_rank + rank) * a.n_each; /* first segment of the last pass */
    const int32_t n_last = max(min(n_seg - last0, a.n_each), 0), n_own = (a.n_pass - 1) * a.n_each + n_last;
    const uint32_t memory_at = (uint32_t)__cvta_generic_to_shared(memory);
    const uint32_t full = (uint32_t)__cvta_generic_to_shared(bars), empty = full + SLOTS_MAX * 8;
    const uint32_t normed = empty + SLOTS_MAX * 8; /* row_scale is there */

    cu_launch_next();
    if (thread == 0) {
        for (int i = 0; i < a.n_slot; i++) {
            bar_init(full + i * 8, 1);
            bar_init(empty + i * 8, 4); /* the warps of one warpgroup */
        }
        bar_init(normed, n_row);
        bar_init_end();
    }
    __syncthreads();
    arrive_all(); /* the others may write to our memory from here on */

    if (warp == WARPS) { /* asks for codes, a band a lane */
        const unsigned char *pack = (const unsigned char *)j->w.pack;
        for (int32_t k = 0; k < n_own; k++) {
            const int slot = k % a.n_slot;
            if (k >= a.n_slot) bar_wait(empty + slot * 8, (k / a.n_slot - 1) & 1);
            if (lane == 0) bar_arrive_expect(full + slot * 8, F8_TILE_BYTES);
            __syncwarp();
            if (lane < F8_TILE_BANDS)
                copy_bulk(memory_at + slot * F8_TILE_BYTES + lane * F8_BAND_BYTES,
                          pack +
                              ((int64_t)min(band0 + lane, last_band) * n_seg + segment_of(&a, rank, k)) * F8_BAND_BYTES,
                          F8_BAND_BYTES, full + slot * 8);
        }
        meet_all();
        for (int32_t pass = 0; pass < a.n_pass; pass++)
            for (int way = 0; way < (pass + 1 < a.n_pass ? 2 : 1); way++) {
                arrive_all();
                meet_all();
            }
        return;
    }

    const int group = warp / 4;
    float *const by_band = (float *)(memory + m.by_band);
    if (j->x_f32) /* not a step's, as the weights */
        for (int32_t i = thread * 64; i < j->w.n_in; i += WARPS * 32 * 64)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(j->norm_w + i));
    for (int32_t i = thread; i < n_seg * F8_TILE_BANDS; i += WARPS * 32) {
        const int32_t band = min(band0 + i % F8_TILE_BANDS, last_band);
        by_band[i] = __ldg(j->w.scale + (int64_t)band * n_seg + i / F8_TILE_BANDS);
    }
    meet_all();
    cu_wait_previous();

    /* A thread finishes of each square of this block output `out` of row `row`: of pairs gate and up. */
    const int32_t across = j->w.pairs ? 16 : 32, row_in = thread / across, out_in = thread % across;
    float old[SQUARES] = {}, total[SQUARES][2] = {};
    int32_t out[SQUARES], row[SQUARES];
#pragma unroll
    for (int q = 0; q < SQUARES; q++) {
        const int32_t square = rank + q * a.n_rank, pair = square % 2;
        row[q] = square / 2 * 8 + row_in;
        out[q] = j->w.pairs ? (band0 / 2 + pair) * CU_BAND + out_in : (band0 + 2 * pair) * CU_BAND + out_in;
        if (q >= a.n_square || square >= ROWS / 4 || row_in >= 8 || row[q] >= n_row || out[q] >= j->w.n_out)
            out[q] = -1;
        if (j->epilogue == CU_ADD && out[q] >= 0) old[q] = __ldcg(j->y + row[q] * j->ldy + out[q]);
    }
    if (ROWS > 8) {
        bring_rows<ROWS>(&a, memory_at + m.x, rank, n_own, group, thread % 128);
        const uint32_t by_row_at = memory_at + m.by_row;
        for (int32_t i = thread; i < n_seg * ROWS; i += WARPS * 32)
            if (i % ROWS < n_row)
                asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(by_row_at + i * 4),
                             "l"(j->x8.scale + i / ROWS * j->x8.ld_scale + i % ROWS)
                             : "memory");
        asm volatile("cp.async.wait_all;" ::: "memory");
    } else if (j->x_f32) {
        const int32_t n = j->w.n_in;
        /* The cluster's blocks share the rows. */
        for (int32_t r = warp * a.n_rank + rank; r < n_row; r += WARPS * a.n_rank) {
            const float *x = j->x_f32 + (int64_t)r * n;
            const float scale = cu_norm_scale(sum_squares(x, n, a.wide), n, j->eps);
            if (lane < a.n_rank) {
                send(at_rank((uint32_t)__cvta_generic_to_shared(row_scale + r), lane), scale);
                tell(at_rank(normed, lane));
            }
        }
        quantize_rows(&a, memory, &m, row_scale, normed, rank, n_own, group, warp % 4, lane);
    } else {
        quantize_rows(&a, memory, &m, NULL, 0, rank, n_own, group, warp % 4, lane);
    }
    f8_show();
    barrier_of(group + 1, 128);

    /* Where the warp's sums of rows 8 i .. 8 i + 7 go: of outputs g and g + 8 of its band, row 2 c. */
    uint32_t to[ROWS / 8];
#pragma unroll
    for (int i = 0; i < ROWS / 8; i++) {
        const int32_t square = 2 * i + warp % 4 / 2;
        to[i] = at_rank(memory_at + m.sums + square / a.n_rank * SUM_BYTES +
                            (2 * (lane & 3) * SUM_ROW + warp % 2 * CU_BAND + lane / 4) * 4,
                        square % a.n_rank);
    }
    const int32_t each = a.n_square * SUM_BYTES;
    for (int32_t pass = 0; pass < a.n_pass; pass++) {
        const int32_t k0 = pass * a.n_each, k1 = k0 + (pass + 1 < a.n_pass ? a.n_each : n_last);
        for (int32_t k = k0 + ((k0 ^ group) & 1); k < k1; k += GROUPS) {
            const int slot = k % a.n_slot;
            float acc[ROWS / 2] = {};
            uint32_t code[4][4];
            bar_wait(full + slot * 8, (k / a.n_slot) & 1);
            f8_codes(code, memory + slot * F8_TILE_BYTES + warp % 4 * F8_BAND_BYTES, lane);
            f8_segment<ROWS>(acc, code, memory_at + m.x + k * (ROWS * CU_SEGMENT));
            wide_wait<0>();
            wide_hold<ROWS / 2>(acc);
            if (lane == 0) bar_arrive(empty + slot * 8);
            const int32_t at = (rank * a.n_each + k - k0) * each;
#pragma unroll
            for (int i = 0; i < ROWS / 8; i++) {
                send(to[i] + at, acc[4 * i]);
                send(to[i] + at + SUM_ROW * 4, acc[4 * i + 1]);
                send(to[i] + at + 32, acc[4 * i + 2]);
                send(to[i] + at + (SUM_ROW + 8) * 4, acc[4 * i + 3]);
            }
        }
        arrive_all();
        meet_all();
        const int32_t seg0 = pass * a.n_rank * a.n_each, n = min(n_seg - seg0, a.n_rank * a.n_each);
#pragma unroll
        for (int q = 0; q < SQUARES; q++) {
            if (out[q] < 0) continue;
            const float *from = (const float *)(memory + m.sums + q * SUM_BYTES) + row_in * SUM_ROW + out_in;
            const float *by_row = (const float *)(memory + m.by_row) + seg0 * ROWS + row[q];
            const float *band =
                by_band + seg0 * F8_TILE_BANDS + (rank + q * a.n_rank) % 2 * 2 + (j->w.pairs ? 0 : out_in / CU_BAND);
#pragma unroll 4
            for (int32_t i = 0; i < n; i++, from += each / 4, band += F8_TILE_BANDS) {
                const float s = by_row[i * ROWS];
                total[q][0] = __fmaf_rn(__fmul_rn(s, band[0]), from[0], total[q][0]);
                if (j->w.pairs) total[q][1] = __fmaf_rn(__fmul_rn(s, band[1]), from[CU_BAND], total[q][1]);
            }
        }
        if (pass + 1 < a.n_pass) {
            arrive_all();
            meet_all();
        }
    }
#pragma unroll
    for (int q = 0; q < SQUARES; q++) {
        if (out[q] < 0) continue;
        if (j->epilogue == CU_SWIGLU)
            j->h[row[q] * j->ldh + out[q]] = cu_round(cu_swiglu(total[q][0], total[q][1]));
        else
            j->y[row[q] * j->ldy + out[q]] = j->epilogue == CU_ADD ? __fadd_rn(old[q], total[q][0]) : total[q][0];
    }
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

static int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
static bool aligned(const void *p) { return ((uintptr_t)p & 15) == 0; }

/* n_rank blocks a tile; false: no room. */
template <int ROWS> static bool plan(split_args *a, int32_t n_rank) {
    a->n_rank = n_rank;
    a->n_square = ceil_div(ROWS / 4, n_rank);
    a->n_each = ceil_div(a->j.w.n_seg, n_rank);
    a->n_pass = 1;
    a->n_slot = least(a->n_each, SLOTS_MAX);
    return map_of<ROWS>(a).end <= SHARED_MAX;
}

/* As many blocks a tile as give every multiprocessor something, and no block very many segments. A block alone hangs
 * when its ring comes round (docs/speed.md, fp8 by fp8): it has no more segments than slots. */
template <int ROWS> static cudaError_t run(cudaStream_t s, const cu_job *j) {
    static uint64_t ready;
    split_args a = {};
    int32_t n_core, n_rank = ROWS / 8;
    cudaError_t e = cu_core_count(&n_core);
    if (e == cudaSuccess) e = cu_shared_bytes(&ready, (const void *)f8_split<ROWS>, SHARED_MAX);
    if (e != cudaSuccess) return e;
    a.j = *j;
    a.wide = j->w.n_in % 4 == 0 && aligned(j->x_f32) && aligned(j->norm_w);
    const int32_t n_tile = ceil_div(j->w.n_band, F8_TILE_BANDS);
    while (n_rank < RANKS_MAX && n_rank * 4 <= j->w.n_seg &&
           (n_tile * n_rank * 5 < n_core * 6 || n_rank * SEGMENTS_MANY < j->w.n_seg ||
            (n_rank == 1 && j->w.n_seg > SLOTS_MAX)))
        n_rank *= 2;
    while (!plan<ROWS>(&a, n_rank)) /* more blocks have more room for x */
        if ((n_rank *= 2) > RANKS_MAX) return cudaErrorInvalidValue;
    void *args[] = {&a};
    return cu_launch(s, (const void *)f8_split<ROWS>, dim3((unsigned)(n_tile * n_rank)), THREADS,
                     (size_t)map_of<ROWS>(&a).end, !j->alone, (unsigned)n_rank, args);
}

cudaError_t cu_f8_skinny_run(cudaStream_t s, const cu_job *j) {
    if (j->n_row <= 0) return cudaSuccess;
    if (j->n_row > CU_SKINNY_MAX || j->w.pairs != (j->epilogue == CU_SWIGLU) || j->w.format != CU_F8A8 ||
        j->w.n_in > CU_F8A8_INPUTS || (!j->x_f32 && (!aligned(j->x) || j->ldx % 8 != 0)))
        return cudaErrorInvalidValue;
    return run<8>(s, j);
}

cudaError_t cu_f8_split_run(cudaStream_t s, const cu_job *j, bool *took) {
    const int32_t n_tile = ceil_div(j->w.n_band, F8_TILE_BANDS);
    int32_t n_core;
    const cudaError_t e = cu_core_count(&n_core);
    *took = e == cudaSuccess && j->w.n_in <= CU_F8A8_INPUTS && j->n_row > 0 && j->n_row <= 16 && n_tile * 2 <= n_core &&
            j->w.n_seg >= 8;
    return *took ? run<16>(s, j) : e;
}
