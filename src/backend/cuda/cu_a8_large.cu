/* Rows of 8 bits, many of them (prefill): tiles of 128 outputs and 128 rows. What is left to do beside the products is
 * total = fma(scale, segment, total), for every number and segment: of fp8 scale of row * scale of band, of integers
 * the row's.
 *
 * Shared memory binds. It moves 128 bytes a clock, and a tile's segment (128 x 128 x 128, 512 clocks of the tensor
 * cores) takes of it, in clocks:
 *                          weights as B, rows as A     weights as A in registers (I4A8), rows as B
 *   copied to it           16 KB + 16 KB         256    8 KB + 16 KB                 192
 *   read by products       2 x (16 KB + 8 KB)    384    2 x 16 KB                    256
 *   codes to registers                                  8 KB                          64
 *   scales to registers    10 words x 8 warps     80    32 words x 8 warps           256
 *   totals, of 20 segments                        50                                  50
 * A word that a warp reads takes a clock however few lanes differ: a thread that holds two rows needs two scales and
 * those of 8 bands, one that holds 32 rows of a band 32. That is why codes of 8 bits, which the tensor cores can read
 * from shared memory, are the B operand. Measured: 900 to 1,000 clocks of fp8, where copies alone take 550. */
#include <type_traits>

#include "backend/cuda/cu_a8_device.cuh"
#include "backend/cuda/cu_wide.cuh"

/* Two blocks are a cluster: the same rows, neighbouring outputs, each brings half of the rows for both. A slot of the
 * ring is a segment: codes of the tile's bands, then x [128 rows][128 bytes] in the 128-byte swizzle; its scales lie
 * elsewhere. Warpgroups 0 and 1 multiply: of codes of 8 bits, which lie in the swizzle as well, WG w rows 64 w .. 64 w
 * + 63 and all outputs; of codes of 4 bits all rows and bands w, w + 2, w + 4, w + 6 of the tile (of pairs: gate, up).
 * Warp 8 fills the ring, ahead of the products and into the next tile; warps 9 to 11 store. */
enum {
    SLOTS = 4,
    SCALES = WIDE_ROWS + LARGE_BANDS /* of a slot: of rows (I4A8: by scale_row); of bands */
};
/* Weights are the B operand. */
static __host__ __device__ constexpr bool by_rows(cu_format f) { return f != CU_I4A8; }
static __host__ __device__ constexpr int codes_bytes(cu_format f) { return LARGE_BANDS * a8_band_bytes(f); }
static __host__ __device__ constexpr int slot_bytes(cu_format f) { return codes_bytes(f) + WIDE_X; }
static __host__ __device__ constexpr int shared_bytes(cu_format f) {
    return SLOTS * slot_bytes(f) + WIDE_SUMS + 1024; /* the ring starts at a multiple of 1024 */
}

typedef struct wide_bars {
    uint32_t full, empty;           /* [SLOTS] what is in a slot is there; it is free, for both blocks */
    uint32_t sums_full, sums_empty; /* totals of a tile */
} wide_bars;

/* ---- the warp that fills ------------------------------------------------------------------------------------------
 *
 * Scales of rows lie so that a thread reads those of two squares, rows 2c, 2c + 1 of each, at once. */
static __device__ __forceinline__ int scale_row(int at) { return (at & ~15) + (at & 2) * 4 + (at & 12) / 2 + (at & 1); }

/* What lane `from` found. */
static __device__ __forceinline__ large_tile tile_of(const large_tile *found, int from) {
    large_tile t;
    t.pack = (const unsigned char *)__shfl_sync(0xffffffffu, (uint64_t)found->pack, from);
    t.scale = (const float *)__shfl_sync(0xffffffffu, (uint64_t)found->scale, from);
    t.band0 = __shfl_sync(0xffffffffu, found->band0, from);
    t.row = __shfl_sync(0xffffffffu, found->row, from);
    t.row_end = __shfl_sync(0xffffffffu, found->row_end, from);
    return t;
}

template <cu_format F>
static __device__ __forceinline__ void fill(const large_args *a, const cu_x8 *x8, const CUtensorMap *x, uint32_t n_tile,
                                            uint32_t ring, uint32_t scales, const wide_bars *bars, int lane) {
    constexpr int OWN = WIDE_ROWS / WIDE_RANKS, EACH = WIDE_ROWS / 32, CODES = codes_bytes(F);
    constexpr int BAND_SCALES = F == CU_F8A8 ? LARGE_BANDS * (int)sizeof(float) : 0;
    const uint32_t rank = cu_cluster_rank(), own0 = rank * OWN;
    const int32_t n_seg = a->w.n_seg, last_band = a->w.n_band - 1;
    const uint32_t first = blockIdx.x / WIDE_RANKS, step = gridDim.x / WIDE_RANKS;
    int slot = 0;
    uint32_t parity = 1;   /* the first time round nobody has to leave a slot */
    large_tile found = {}; /* by this lane, of the next 32 tiles */
    bool there = false;
    for (uint32_t at = 0, index = first; index < n_tile; at++, index += step) {
        if (at % 32 == 0) {
            there = false;
            if (n_tile - index > lane * step) there = wide_find(a, index + lane * step, rank, &found);
        }
        if (!__shfl_sync(0xffffffffu, there, at % 32)) continue;
        const large_tile t = tile_of(&found, at % 32);
        const float *row_scale[EACH];
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const int at_row = by_rows(F) ? lane + 32 * k : scale_row(lane + 32 * k);
            const int32_t p = min(t.row + at_row, t.row_end - 1);
            row_scale[k] = x8->scale + (a->place_entry ? cu_l2i(a->place_entry + p) / a->n_used : p);
        }
        const int64_t band_at = a8_at(min(t.band0, last_band / LARGE_BANDS * LARGE_BANDS), 0, n_seg);
        const unsigned char *codes = t.pack + band_at * a8_band_bytes(F);
        const float *band_scale = t.scale + band_at;
        for (int32_t seg = 0; seg < n_seg; seg++) {
            const uint32_t bar = bars->full + slot * 8, to = ring + slot * slot_bytes(F);
            const uint32_t to_scale = scales + slot * SCALES * 4;
            bar_wait(bars->empty + slot * 8, parity);
            if (lane == 0) {
                bar_arrive_expect(bar, slot_bytes(F) + BAND_SCALES);
                wide_copy_x(x, seg * (CU_SEGMENT / 2), t.row + (int32_t)own0, to + CODES + own0 * 128, bar);
                copy_bulk(to, codes + (int64_t)seg * CODES, CODES, bar);
                if (BAND_SCALES) copy_bulk(to_scale + WIDE_ROWS * 4, band_scale + seg * LARGE_BANDS, BAND_SCALES, bar);
            }
            __syncwarp();
#pragma unroll
            for (int k = 0; k < EACH; k++) copy4(to_scale + (lane + 32 * k) * 4, row_scale[k] + seg * x8->ld_scale);
            copies_arrive(bar);
            if (++slot == SLOTS) slot = 0, parity ^= 1;
        }
    }
}

/* ---- the warps that multiply --------------------------------------------------------------------------------------
 *
 * d = A B + (add ? d : 0), 32 inputs; from shared memory: 64 rows by 128 outputs, with A in registers: 64 outputs by
 * 128 rows. */
static __device__ __forceinline__ void product(float *d, uint64_t x, uint64_t w, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" CU_D64_NAMES "%64, %65, p, 1, 1;}\n"
                 : CU_D64(d)
                 : "l"(x), "l"(w), "r"(add));
}
static __device__ __forceinline__ void product(int32_t *d, uint64_t x, uint64_t w, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" CU_D64_NAMES "%64, %65, p;}\n"
                 : A8_D64("+r", d)
                 : "l"(x), "l"(w), "r"(add));
}
static __device__ __forceinline__ void product(int32_t *d, const uint32_t w[4], uint64_t x, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" CU_D64_NAMES "{%64, %65, %66, %67}, %68, p;}\n"
                 : A8_D64("+r", d)
                 : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(x), "r"(add));
}

/* Scales, read in their place among products and barriers: behind products they would wait for these. */
static __device__ __forceinline__ void read_scales(float p[4], uint32_t at) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(p[0]), "=f"(p[1]), "=f"(p[2]), "=f"(p[3])
                 : "r"(at)
                 : "memory");
}
static __device__ __forceinline__ float read_scale(uint32_t at) {
    float p;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(p) : "r"(at) : "memory");
    return p;
}

/* A warpgroup's four products of a segment are under way while it makes factors of the scales it has read; then it
 * waits for them, adds, and reads what the next segment needs. Meanwhile the other warpgroup's products run. Totals of
 * a tile leave while the first products of the next run. */
template <cu_format F>
static __device__ __forceinline__ void multiply(const large_args *a, uint32_t n_tile, uint32_t ring_at,
                                                const unsigned char *ring, uint32_t scales_at, float *sums,
                                                const wide_bars *bars, int group, int thread) {
    constexpr int SLOT = slot_bytes(F), N_READ = by_rows(F) ? F == CU_F8A8 ? 10 : 2 : 32;
    const int warp = thread / 32, lane = thread % 32;
    const int in_tile = warp * 2 + group;              /* the warp's band of the tile */
    const int row = group * 64 + warp * 16 + lane / 4; /* the thread's rows: this and 8 more */
    const uint32_t step = gridDim.x / WIDE_RANKS, n_seg = (uint32_t)a->w.n_seg;
    const int32_t n_tile_row = a->experts ? cu_l2i(a->n_tile) : a->n_tile_row;
    a8_sum<F> acc[64];
    float total[2][32] = {};
    float scale[N_READ]; /* by_rows: of both rows, then of the bands; else of all rows in order of squares */
    float factor[16];    /* F8A8: of rows and bands */
    uint32_t code[4][4]; /* I4A8 */
    int slot = 0;
    uint32_t parity = 0, sums_parity = 1;

    const auto start = [&]() {
        const uint32_t at = ring_at + slot * SLOT, x_at = codes_bytes(F) + (by_rows(F) ? group * (WIDE_X / 2) : 0);
        const uint64_t w = wide_matrix(at), x = wide_matrix(at + x_at);
        a8_hold<64>(acc);
        wide_fence();
#pragma unroll
        for (int t = 0; t < 4; t++) {
            if constexpr (by_rows(F))
                product(acc, x + 2 * t, w + 2 * t, t > 0);
            else
                product(acc, code[t], x + 2 * t, t > 0);
        }
        wide_commit();
    };
    const auto read_codes = [&]() {
        if constexpr (!by_rows(F)) {
            a8_codes<F>(code, ring + slot * SLOT + in_tile * a8_band_bytes(F), lane);
            wide_hold_codes<4>(code);
        }
    };
    /* Part i of 8 of the slot's scales; by_rows: all with the last. */
    const auto read_part = [&](int i) {
        const uint32_t at = scales_at + slot * (SCALES * 4);
        if constexpr (!by_rows(F)) {
            read_scales(scale + 4 * i, at + lane % 4 * 16 + i * 64);
        } else if (i == 7) {
#pragma unroll
            for (int k = 0; k < 2; k++) {
                scale[k] = read_scale(at + (row + 8 * k) * 4);
                if constexpr (F == CU_F8A8) read_scales(scale + 2 + 4 * k, at + WIDE_ROWS * 4 + k * 16);
            }
        }
    };
    const auto make_factors = [&]() {
        if constexpr (F == CU_F8A8) {
#pragma unroll
            for (int i = 0; i < 16; i++) factor[i] = __fmul_rn(scale[i / 8], scale[2 + i % 8]);
            wide_hold<16>(factor); /* here, not where they are used */
        } else {
            wide_hold<N_READ>(scale); /* they are there before the wait for products */
        }
    };
    const auto factor_of = [&](int i) {
        if constexpr (F == CU_F8A8)
            return factor[i / 2 % 2 * 8 + i / 8];
        else
            return scale[by_rows(F) ? i / 2 % 2 : i / 4 * 2 + i % 2];
    };
    float *to[4]; /* by_rows: of outputs 8 k + 2 c, 2 c + 1 */
#pragma unroll
    for (int k = 0; k < 4; k++) to[k] = sums + wide_sum_at(row, 8 * k + lane % 4 * 2);
    const auto keep = [&]() {
        bar_wait(bars->sums_empty, sums_parity);
        sums_parity ^= 1;
        if constexpr (by_rows(F)) {
#pragma unroll
            for (int i = 0; i < 32; i++)
                *(float2 *)(to[i / 2 % 4] + i / 8 * 32 + i % 2 * (8 * 128)) =
                    make_float2(total[i / 16][i % 16 * 2], total[i / 16][i % 16 * 2 + 1]);
        } else {
            wide_keep(sums, total, in_tile, lane);
        }
        bar_arrive(bars->sums_full);
    };

    uint32_t next = blockIdx.x / WIDE_RANKS, left = 0; /* the tile that comes, segments of this one */
    const auto seek = [&]() {
        while (next < n_tile && !wide_there(a, next, n_tile_row)) next += step;
    };
    seek();
    if (next >= n_tile) return;
    bar_wait(bars->full, 0);
    read_codes();
#pragma unroll
    for (int i = 0; i < 8; i++) read_part(i);
    for (bool began = false, more = true; more; began = true) {
        start();
        if (left == 0) {
            if (began) keep();
#pragma unroll
            for (int i = 0; i < 64; i++) total[i / 32][i % 32] = 0.0f;
            left = n_seg;
            next += step;
            seek();
        }
        make_factors();
        left--;
        more = left > 0 || next < n_tile;
        const uint32_t done = bars->empty + slot * 8;
        if (++slot == SLOTS) slot = 0, parity ^= 1;
        if (more) bar_wait(bars->full + slot * 8, parity);
        wide_wait<0>();
        if (!by_rows(F)) wide_hold_codes<4>(code);
        a8_hold<64>(acc);
        read_codes();
        wide_leave(done, lane);
#pragma unroll
        for (int i = 0; i < 8; i++) {
#pragma unroll
            for (int k = 8 * i; k < 8 * i + 8; k++)
                total[k / 32][k % 32] = __fmaf_rn(factor_of(k), (float)acc[k], total[k / 32][k % 32]);
            read_part(i);
        }
        a8_hold<64>(acc);
    }
    keep();
}

template <cu_format F>
static __global__ void __launch_bounds__(WIDE_THREADS, 1)
    a8_large(const __grid_constant__ large_args a, const __grid_constant__ cu_x8 x8,
             const __grid_constant__ CUtensorMap x) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(8) uint64_t bar_words[2 * SLOTS + 2];
    __shared__ __align__(16) float scales[SLOTS * SCALES];
    /* from lane 0, which tells the compiler that a warp has one */
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
    const uint32_t n_tile = (uint32_t)a.n_tile_out * (uint32_t)a.n_tile_row;
    const uint32_t memory_at = (uint32_t)__cvta_generic_to_shared(memory), skip = -memory_at & 1023;
    const uint32_t ring_at = memory_at + skip;
    uint32_t bars_at = (uint32_t)__cvta_generic_to_shared(bar_words);
    uint32_t scales_at = (uint32_t)__cvta_generic_to_shared(scales);
    /* The compiler would find these anew in every round, which takes as long as a read. */
    asm volatile("" : "+r"(bars_at), "+r"(scales_at));
    const wide_bars bars = {bars_at, bars_at + SLOTS * 8, bars_at + 2 * SLOTS * 8, bars_at + (2 * SLOTS + 1) * 8};
    unsigned char *ring = memory + skip;
    float *sums = (float *)(ring + SLOTS * slot_bytes(F));

    cu_launch_next();
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; i++) {
            bar_init(bars.full + i * 8, 1 + 32);          /* who asks, and the bytes; scales by cp.async */
            bar_init(bars.empty + i * 8, 8 * WIDE_RANKS); /* the warps that multiply, of both blocks */
        }
        bar_init(bars.sums_full, 256);
        bar_init(bars.sums_empty, WIDE_STORERS);
        bar_init_end();
    }
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
    cu_wait_previous();
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
        const int warp = thread / 32, lane = thread % 32;
        if (warp > 0)
            wide_store<F != CU_F8A8>(&a, n_tile, sums, bars.sums_full, bars.sums_empty, warp - 1, lane);
        else
            fill<F>(&a, &x8, &x, n_tile, ring_at, scales_at, &bars, lane);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
        multiply<F>(&a, n_tile, ring_at, ring, scales_at, sums, &bars, group, thread);
    }
    /* The other block writes to this one's memory and barriers to its own end. */
    cluster_arrive();
    cluster_meet();
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

/* What the copies rely on. */
static bool a8_sound(const large_args *a, const cu_x8 *x) {
    return x->code && x->scale && x->ldx % CU_SEGMENT == 0 && (uintptr_t)x->code % 16 == 0 && large_sound(a);
}

/* n_x: rows of codes. */
template <cu_format F>
static cudaError_t launch_as(cudaStream_t s, large_args *a, const cu_x8 *codes, const cu_x8 *scales, int64_t n_x,
                             bool early) {
    static uint64_t ready;
    int32_t n_core;
    cudaError_t e = cu_core_count(&n_core);
    if (e == cudaSuccess) e = cu_shared_bytes(&ready, (const void *)a8_large<F>, shared_bytes(F));
    if (e != cudaSuccess) return e;
    a->tile_bands = LARGE_BANDS * WIDE_RANKS;
    a->n_tile_out = (a->w.n_band + a->tile_bands - 1) / a->tile_bands;
    const int64_t n_tile = (int64_t)a->n_tile_out * a->n_tile_row, n_cluster = n_core / WIDE_RANKS;
    if (n_tile == 0) return cudaSuccess;
    if (n_tile > INT32_MAX) return cudaErrorInvalidValue;
    CUtensorMap x; /* two codes are one number of 16 bits to the copy engine */
    e = cu_map_rows(&x, codes->code, (uint64_t)a->w.n_seg * (CU_SEGMENT / 2), (uint64_t)n_x, (uint64_t)codes->ldx,
                    CU_SEGMENT / 2, WIDE_ROWS / WIDE_RANKS);
    if (e != cudaSuccess) return e;
    void *args[] = {a, (void *)scales, &x};
    return cu_launch(s, (const void *)a8_large<F>,
                     dim3((unsigned)(n_tile < n_cluster ? n_tile : n_cluster) * WIDE_RANKS), WIDE_THREADS,
                     shared_bytes(F), early, WIDE_RANKS, args);
}
static cudaError_t launch(cudaStream_t s, large_args *a, const cu_x8 *codes, const cu_x8 *scales, int64_t n_x,
                          bool early) {
    if (a->w.format == CU_F8A8) return launch_as<CU_F8A8>(s, a, codes, scales, n_x, early);
    if (a->w.format == CU_I8A8) return launch_as<CU_I8A8>(s, a, codes, scales, n_x, early);
    if (a->w.format == CU_I4A8) return launch_as<CU_I4A8>(s, a, codes, scales, n_x, early);
    return cudaErrorInvalidValue;
}

cudaError_t cu_a8_large_run(cudaStream_t s, const cu_job *j) {
    large_args a = large_plain(j);
    if (!a8_sound(&a, &j->x8)) return cudaErrorInvalidValue;
    a.n_tile_row = (a.n_row + WIDE_ROWS - 1) / WIDE_ROWS;
    return launch(s, &a, &j->x8, &j->x8, a.n_row, !j->alone);
}

cudaError_t cu_a8_large_grouped(cudaStream_t s, const cu_grouped_job *j) {
    const cu_routes *r = j->routes;
    large_args a = large_experts(j);
    if (r->tile_rows != WIDE_ROWS || !a8_sound(&a, &j->x8)) return cudaErrorInvalidValue;
    const cu_x8 *codes = &j->x8;
    if (j->gather) { /* scales are read where they are */
        codes = &j->x8_by_place;
        if (!codes->code || codes->ldx != j->x8.ldx) return cudaErrorInvalidValue;
        if (!j->spread) {
            const cudaError_t e = wide_spread(s, codes->code, j->x8.code, codes->ldx, r, j->n_row);
            if (e != cudaSuccess) return e;
        }
    }
    return launch(s, &a, codes, &j->x8, (int64_t)j->n_row * r->n_used, true);
}
