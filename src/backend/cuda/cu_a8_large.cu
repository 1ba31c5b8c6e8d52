/* Rows of 8 bits, many of them (prefill): tiles of 128 outputs and 128 rows that make the tensor cores the limit, as
 * cu_large.cu has them. Codes of 8 bits are the A operand as they were packed, rows lie in shared memory as they were
 * quantized. What is left to do beside the products is total = fma(scale, segment, total), for every number and
 * segment: of fp8 scale of row * scale of band, of integers the row's. */
#include <type_traits>

#include "backend/cuda/cu_a8_device.cuh"
#include "backend/cuda/cu_wide.cuh"

/* Two blocks are a cluster: the same rows, neighbouring outputs, each brings half of the rows for both. A slot of the
 * ring is a segment: codes of the tile's bands, then x [128 rows][128 bytes] in the 128-byte swizzle; its scales lie
 * elsewhere. Warpgroups 0 and 1 multiply all rows, WG w bands w, w + 2, w + 4, w + 6 of the tile (of pairs: gate, up).
 * Warp 8 fills the ring, ahead of the products and into the next tile; warps 9 to 11 store. */
enum {
    SLOTS = 4,
    SCALES = WIDE_ROWS + LARGE_BANDS /* of a slot: of rows, by scale_row; of bands */
};
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
            const int32_t p = min(t.row + scale_row(lane + 32 * k), t.row_end - 1);
            row_scale[k] = x8->scale + (a->place_entry ? large_l2i(a->place_entry + p) / a->n_used : p);
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
 * A segment is two batches of products, rows 0..63 and 64..127. While one half's sums go to the totals, the other's
 * products are under way, and the other warpgroup's. */

template <cu_format F>
static __device__ __forceinline__ void multiply(const large_args *a, uint32_t n_tile, uint32_t ring_at,
                                                const unsigned char *ring, const float *scales, float *sums,
                                                const wide_bars *bars, int group, int thread) {
    constexpr int HALF = WIDE_X / 2, SLOT = slot_bytes(F);
    const int warp = thread / 32, lane = thread % 32, in_tile = warp * 2 + group;
    const uint32_t x = ring_at + codes_bytes(F);
    const int32_t n_seg = a->w.n_seg, n_tile_row = a->experts ? large_l2i(a->n_tile) : a->n_tile_row;
    int slot = 0; /* the next to be read */
    uint32_t parity = 0, sums_parity = 1;
    for (uint32_t index = blockIdx.x / WIDE_RANKS; index < n_tile; index += gridDim.x / WIDE_RANKS) {
        if (!wide_there(a, index, n_tile_row)) continue;
        a8_sum<F> acc[2][32];
        float total[2][32] = {};
        uint32_t code[2][4][4];
        int at[2]; /* slots of the segments whose codes these are */
        const auto read = [&](int k) {
            at[k] = slot;
            bar_wait(bars->full + slot * 8, parity);
            a8_codes<F>(code[k], ring + slot * SLOT + in_tile * a8_band_bytes(F), lane);
            if (++slot == SLOTS) slot = 0, parity ^= 1;
        };
        const auto start = [&](int half, int k) { a8_segment<64>(acc[half], code[k], x + at[k] * SLOT + half * HALF); };
        const auto factors = [&](float p[16], int half, int k) {
            const float *from = scales + at[k] * SCALES, by = F == CU_F8A8 ? from[WIDE_ROWS + in_tile] : 1.0f;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float4 v = *(const float4 *)(from + half * 64 + i * 16 + lane % 4 * 4);
                const float of[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int n = 0; n < 4; n++) p[4 * i + n] = F == CU_F8A8 ? __fmul_rn(of[n], by) : of[n];
            }
        };
        const auto add = [&](int half, const float p[16]) {
            a8_hold<32>(acc[half]);
#pragma unroll
            for (int i = 0; i < 32; i++)
                total[half][i] = __fmaf_rn(p[i / 4 * 2 + (i & 1)], a8_number(acc[half][i]), total[half][i]);
            a8_hold<32>(acc[half]);
        };
        /* Segment k's products are under way. */
        const auto segment = [&](auto which, auto is_last) {
            constexpr int k = decltype(which)::value, next = k ^ 1;
            constexpr bool last = decltype(is_last)::value;
            float p[16];
            factors(p, 0, k);
            if constexpr (!last) read(next);
            wide_wait<1>();
            add(0, p);
            if constexpr (last) {
                factors(p, 1, k);
                wide_wait<0>();
            } else {
                start(0, next);
                factors(p, 1, k);
                wide_wait<1>();
            }
            wide_hold_codes<4>(code[k]);
            wide_leave(bars->empty + at[k] * 8, lane);
            add(1, p);
            if constexpr (!last) start(1, next);
        };
        const std::integral_constant<int, 0> even;
        const std::integral_constant<int, 1> odd;
        read(0);
        start(0, 0);
        start(1, 0);
        for (int32_t seg = 0; seg + 2 < n_seg; seg += 2) {
            segment(even, std::false_type());
            segment(odd, std::false_type());
        }
        if (n_seg % 2 == 0) {
            segment(even, std::false_type());
            segment(odd, std::true_type());
        } else {
            segment(even, std::true_type());
        }
        bar_wait(bars->sums_empty, sums_parity);
        sums_parity ^= 1;
        wide_keep(sums, total, in_tile, lane);
        bar_arrive(bars->sums_full);
    }
}

template <cu_format F>
static __global__ void __launch_bounds__(WIDE_THREADS, 1)
    a8_large(const __grid_constant__ large_args a, const __grid_constant__ cu_x8 x8,
             const __grid_constant__ CUtensorMap x) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(8) uint64_t bar_words[2 * SLOTS + 2];
    __shared__ __align__(16) float scales[SLOTS * SCALES];
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    const uint32_t n_tile = (uint32_t)a.n_tile_out * (uint32_t)a.n_tile_row;
    const uint32_t memory_at = (uint32_t)__cvta_generic_to_shared(memory), skip = -memory_at & 1023;
    const uint32_t ring_at = memory_at + skip, bars_at = (uint32_t)__cvta_generic_to_shared(bar_words);
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
        asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
        const int warp = thread / 32, lane = thread % 32;
        if (warp > 0)
            wide_store<F != CU_F8A8>(&a, n_tile, sums, bars.sums_full, bars.sums_empty, warp - 1, lane);
        else
            fill<F>(&a, &x8, &x, n_tile, ring_at, (uint32_t)__cvta_generic_to_shared(scales), &bars, lane);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
        multiply<F>(&a, n_tile, ring_at, ring, scales, sums, &bars, group, thread);
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
