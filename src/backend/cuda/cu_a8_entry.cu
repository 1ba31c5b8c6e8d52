/* Gate and up, or down, of the experts of one row (CU_F8A8, CU_I8A8, CU_I4A8): cu_a8_mid_grouped's bits. These kernels
 * take turns with others on a multiprocessor, whose instructions are more than it can hold: each comes from far away in
 * every layer. So there is little code, and little of a multiprocessor is taken: blocks of down lie beside those of up
 * and ask for their codes while up runs.
 *
 * A block has a tile of 64 outputs of one expert; a warp of its warpgroup a band, whose totals stay in registers; one
 * warp more asks for codes. Up asks as soon as it is told which (cu_routes.told), for most of them when the row is on
 * its way: what is asked for later comes later. Down quantizes the row.
 *
 * Eight segments of the row are the columns of one product; of each only the segment's own column is taken.
 *
 *   shared: x [segment / 8][segment % 8][128], swizzled (cu_a8_device.cuh) | ring [slot][codes of a tile's segment] */
#include "backend/cuda/cu_a8_device.cuh"
#include "backend/cuda/cu_launch.cuh"

enum {
    WARPS = 4,
    THREADS = WARPS * 32 + 32,
    COLUMNS = 8, /* of a product */
    GROUP = 2,   /* segments whose products are under way at once */
    AHEAD = 4,   /* segments of up that are asked for before the row is */
    OWN = 4,     /* segments of down's row that a warp reads at once */
    SLOTS_MAX = 24,
    SEGMENTS_MAX = 96,
    LOOKS_MAX = 1 << 26
};
/* Bytes of a block's ring. Up's are together two or three times what the memory has on its way at once, and leave room
 * for blocks of down, whose codes of 4 bits find a place all. */
static constexpr int ring_bytes(cu_format f, bool down) { return (down ? 64 : f == CU_I4A8 ? 32 : 48) * 1024; }

typedef struct entry_args {
    cu_linear w; /* of any expert */
    const cu_linear *experts;
    const int32_t *tile_expert, *tile_place;
    int32_t *told;
    int32_t n_expert, n_used, n_tile, n_slot; /* n_tile: of an expert */
    bool routed;                              /* down: the routes are known when this kernel begins */
    cu_x8 x8;                                 /* up */
    const cu_bf16 *x;                         /* down */
    int64_t ldx;
    float *y;
    int64_t ldy;
    cu_bf16 *h;
    int64_t ldh;
} entry_args;

typedef struct entry_shared {
    uint64_t full[SLOTS_MAX], empty[SLOTS_MAX];
    uint64_t known, asked; /* scale and place are there; the row is on its way */
    const float *scale;    /* of the expert's bands */
    int32_t place;
    float by_row[SEGMENTS_MAX], by_band[SEGMENTS_MAX * A8_TILE_BANDS], totals[WARPS][CU_BAND];
} entry_shared;

/* The expert of a place, when it is chosen: what has not come after so many looks never comes. */
static __device__ __forceinline__ uint32_t told_expert(const int32_t *told) {
    uint32_t e = 0;
    for (int k = 0; e == 0; k++) {
        if (k > LOOKS_MAX) __trap();
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(e) : "l"(told) : "memory");
    }
    return e - 1;
}

/* One thread, a copy after the other: a lane each at once keeps the row and all that others wait for away for longer.
 */
template <cu_format F, bool DOWN>
static __device__ __forceinline__ void ask(const entry_args *a, entry_shared *s, uint32_t ring) {
    const int BAND_BYTES = a8_band_bytes(F), TILE_BYTES = a8_tile_bytes(F);
    const uint32_t full = (uint32_t)__cvta_generic_to_shared(s->full), empty = full + SLOTS_MAX * 8;
    const uint32_t known = empty + SLOTS_MAX * 8, asked = known + 8;
    const int32_t n_seg = a->w.n_seg, tile = (int32_t)blockIdx.x / a->n_tile,
                  band0 = ((int32_t)blockIdx.x - tile * a->n_tile) * A8_TILE_BANDS;
    uint32_t e, place = (uint32_t)tile;
    if (!DOWN && a->told) {
        e = told_expert(a->told + tile);
    } else {
        if (!(DOWN && a->routed)) cu_wait_previous();
        e = (uint32_t)cu_l2i(a->tile_expert + tile);
        place = (uint32_t)cu_l2i(a->tile_place + tile);
    }
    const cu_linear *const w = a->experts + min(e, (uint32_t)a->n_expert - 1);
    const unsigned char *from = (const unsigned char *)w->pack + a8_at(band0, 0, n_seg) * BAND_BYTES;
    s->scale = w->scale;
    s->place = (int32_t)place;
    bar_arrive(known);
    int slot = 0;
    uint32_t parity = 1; /* the first time round nobody has to leave a slot */
#pragma unroll 1
    for (int32_t seg = 0; seg < n_seg + n_seg % GROUP; seg++) { /* the last of an odd number twice */
        if (!DOWN && seg == AHEAD) bar_wait(asked, 0);
        bar_wait(empty + slot * 8, parity);
        bar_arrive_expect(full + slot * 8, TILE_BYTES);
        copy_bulk_once(ring + slot * TILE_BYTES, from, TILE_BYTES, full + slot * 8);
        if (seg + 1 < n_seg) from += CU_A8_BANDS * BAND_BYTES;
        if (++slot == a->n_slot) slot = 0, parity ^= 1;
    }
}

/* Where four codes of the row lie. */
static __device__ __forceinline__ int x_at(int32_t seg, int piece) {
    return seg / COLUMNS * (COLUMNS * CU_SEGMENT) + a8_piece_at(seg % COLUMNS, piece);
}

template <cu_format F, bool DOWN>
__global__ void __launch_bounds__(THREADS, 5) a8_entry(const __grid_constant__ entry_args a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ entry_shared s;
    const int BAND_BYTES = a8_band_bytes(F), TILE_BYTES = a8_tile_bytes(F);
    const int thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    const int32_t n_seg = a.w.n_seg, x_bytes = (n_seg + COLUMNS - 1) / COLUMNS * (COLUMNS * CU_SEGMENT);
    const uint32_t memory_at = (uint32_t)__cvta_generic_to_shared(memory);
    const uint32_t full = (uint32_t)__cvta_generic_to_shared(s.full), empty = full + SLOTS_MAX * 8;
    const uint32_t known = empty + SLOTS_MAX * 8, asked = known + 8;

    if (DOWN) cu_launch_next();
    if (warp == WARPS) {
        if (lane == 0) {
#pragma unroll 1
            for (int i = 0; i < a.n_slot; i++) {
                bar_init(full + i * 8, 1);
                bar_init(empty + i * 8, WARPS);
            }
            bar_init(known, 1);
            bar_init(asked, 1);
            bar_init_end();
        }
#pragma unroll 1
        for (int32_t e = lane; e < a.n_expert; e += 32) /* where codes are, close at hand */
            asm volatile("prefetch.global.L1 [%0];" ::"l"(a.experts + e));
    }
    __syncthreads();
    if (warp == WARPS) {
        if (lane == 0) ask<F, DOWN>(&a, &s, memory_at + x_bytes);
        return;
    }

    const int32_t band = (int32_t)blockIdx.x % a.n_tile * A8_TILE_BANDS + warp;
    float by_out[2] = {}; /* of outputs g, g + 8 */
    bar_wait(known, 0);
    const float *const scale = s.scale;
    if (F == CU_F8A8) {
#pragma unroll 1
        for (int32_t i = thread; i < n_seg * A8_TILE_BANDS; i += WARPS * 32)
            s.by_band[i] = __ldg(scale + a8_at(band - warp, i / A8_TILE_BANDS, n_seg) + i % A8_TILE_BANDS);
    } else if (band < a.w.n_band) {
#pragma unroll
        for (int k = 0; k < 2; k++) by_out[k] = __ldg(scale + band * CU_BAND + lane / 4 + 8 * k);
    }
    cu_wait_previous();
    const int32_t place = s.place;
    if (DOWN) {
        if (a.told && blockIdx.x == 0 && thread < a.n_used) a.told[thread] = 0;
        const cu_bf16 *const x = a.x + place * a.ldx + lane * 4;
#pragma unroll 1
        for (int32_t seg0 = warp; seg0 < n_seg; seg0 += OWN * WARPS) {
            uint2 v[OWN];
#pragma unroll
            for (int k = 0; k < OWN; k++)
                if (seg0 + k * WARPS < n_seg) v[k] = __ldcg((const uint2 *)(x + (seg0 + k * WARPS) * CU_SEGMENT));
#pragma unroll
            for (int k = 0; k < OWN; k++) {
                const int32_t seg = seg0 + k * WARPS;
                if (seg >= n_seg) break;
                const float f[4] = {cu_f32((cu_bf16)(v[k].x & 0xffff)), cu_f32((cu_bf16)(v[k].x >> 16)),
                                    cu_f32((cu_bf16)(v[k].y & 0xffff)), cu_f32((cu_bf16)(v[k].y >> 16))};
                float of_codes;
                *(uint32_t *)(memory + x_at(seg, lane / 4) + lane % 4 * 4) = a8_quantize<a8_codes_of(F)>(&of_codes, f);
                if (lane == 0) s.by_row[seg] = of_codes;
            }
        }
    } else {
        if (thread == 0) cu_launch_next(); /* the routes are there: down need not wait for them */
        const float by = thread < n_seg ? cu_l2f(a.x8.scale + thread * a.x8.ld_scale) : 0.0f;
#pragma unroll 1
        for (int32_t i = thread; i < n_seg * 8; i += WARPS * 32 * 2) {
            const int32_t next = i + WARPS * 32;
            const bool two = next < n_seg * 8;
            const uint4 v = cu_l2(a.x8.code + i * 16), u = cu_l2(a.x8.code + (two ? next : i) * 16);
            if (i == 0) bar_arrive(asked);
            *(uint4 *)(memory + x_at(i / 8, i % 8)) = v;
            if (two) *(uint4 *)(memory + x_at(next / 8, next % 8)) = u;
        }
        if (thread < n_seg) s.by_row[thread] = by;
    }
    a8_show();
    cu_barrier(1, WARPS * 32);

    float total[2] = {0.0f, 0.0f}; /* of outputs g and g + 8, in all lanes 4 g + c */
    int slot = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int32_t seg = 0; seg < n_seg; seg += GROUP) {
        a8_sum<F> acc[GROUP][COLUMNS / 2] = {};
        uint32_t code[GROUP][4][4];
        const uint32_t x = memory_at + seg / COLUMNS * (COLUMNS * CU_SEGMENT);
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            bar_wait(full + (slot + k) * 8, parity);
            a8_codes<F>(code[k], memory + x_bytes + (slot + k) * TILE_BYTES + warp * BAND_BYTES, lane);
            a8_segment<COLUMNS>(acc[k], code[k], x);
        }
        wide_wait<0>();
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            if (seg + k >= n_seg) break;
            a8_hold<COLUMNS / 2>(acc[k]);
            wide_hold_codes<4>(code[k]);
            if (lane == 0) bar_arrive(empty + (slot + k) * 8);
            /* GROUP is 2, so the segment's column is an even one, or the odd one beside it, of lanes 4 g + c */
            const int from = (lane & ~3) | seg % COLUMNS / 2;
            const a8_sum<F> low = __shfl_sync(0xffffffffu, acc[k][k], from),
                            high = __shfl_sync(0xffffffffu, acc[k][2 + k], from);
            const float by = F == CU_F8A8 ? __fmul_rn(s.by_row[seg + k], s.by_band[(seg + k) * A8_TILE_BANDS + warp])
                                          : s.by_row[seg + k];
            total[0] = __fmaf_rn(by, a8_number(low), total[0]);
            total[1] = __fmaf_rn(by, a8_number(high), total[1]);
        }
        if ((slot += GROUP) == a.n_slot) slot = 0, parity ^= 1;
    }
    if (F != CU_F8A8)
#pragma unroll
        for (int k = 0; k < 2; k++) total[k] = __fmul_rn(total[k], by_out[k]);

    const int32_t half = lane % 4; /* lanes 4 g and 4 g + 1 write outputs g and g + 8 */
    const float mine = half ? total[1] : total[0];
    if (DOWN) {
        const int32_t out = band * CU_BAND + lane / 4 + half * 8;
        if (half < 2 && out < a.w.n_out) a.y[place * a.ldy + out] = mine;
        return;
    }
    if (half < 2) s.totals[warp][lane / 4 + half * 8] = mine;
    cu_barrier(2 + warp / 2, 64);
    const int32_t out = band / 2 * CU_BAND + lane;
    if (warp % 2 || lane >= CU_BAND || out >= a.w.n_out) return;
    a.h[place * a.ldh + out] = cu_round(cu_swiglu(s.totals[warp][lane], s.totals[warp + 1][lane]));
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

static_assert(SEGMENTS_MAX <= WARPS * 32, "a thread has a segment's scale");
static_assert(SEGMENTS_MAX * CU_SEGMENT >= CU_A8_INPUTS, "down of one row is always taken, which leaves zeros in told");
static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

template <cu_format F, bool DOWN> static cudaError_t run(cudaStream_t s, entry_args *a) {
    static uint64_t ready;
    const void *const kernel = (const void *)a8_entry<F, DOWN>;
    const int x_bytes = (a->w.n_seg + COLUMNS - 1) / COLUMNS * (COLUMNS * CU_SEGMENT);
    a->n_slot = least(least(ring_bytes(F, DOWN) / a8_tile_bytes(F) / GROUP * GROUP, SLOTS_MAX),
                      a->w.n_seg + a->w.n_seg % GROUP);
    const cudaError_t e = cu_shared_whole(&ready, kernel, ring_bytes(F, DOWN) + SEGMENTS_MAX * CU_SEGMENT);
    if (e != cudaSuccess) return e;
    void *args[] = {a};
    return cu_launch(s, kernel, dim3((unsigned)(a->n_used * a->n_tile)), THREADS,
                     (size_t)(x_bytes + a->n_slot * a8_tile_bytes(F)), true, 1, args);
}
template <bool DOWN> static cudaError_t run_any(cudaStream_t s, entry_args *a) {
    return a->w.format == CU_F8A8   ? run<CU_F8A8, DOWN>(s, a)
           : a->w.format == CU_I8A8 ? run<CU_I8A8, DOWN>(s, a)
                                    : run<CU_I4A8, DOWN>(s, a);
}

cudaError_t cu_a8_entry_run(cudaStream_t s, const cu_grouped_job *j, bool *took) {
    const bool down = !j->x8.code;
    *took = j->n_row == 1 && j->routes->tile_rows == 8 && j->shape.n_seg <= SEGMENTS_MAX &&
            (down ? j->x && !j->gather && j->epilogue == CU_STORE && !j->shape.pairs && (uintptr_t)j->x % 8 == 0 &&
                        j->ldx % 4 == 0
                  : j->gather && j->epilogue == CU_SWIGLU && j->shape.pairs && (uintptr_t)j->x8.code % 16 == 0);
    if (!*took) return cudaSuccess;
    entry_args a = {};
    a.w = j->shape;
    a.experts = j->experts;
    a.tile_expert = j->routes->tile_expert;
    a.tile_place = j->routes->tile_place;
    a.told = j->routes->told;
    a.n_expert = j->routes->n_expert;
    a.n_used = j->routes->n_used;
    a.n_tile = (j->shape.n_band + A8_TILE_BANDS - 1) / A8_TILE_BANDS;
    a.routed = j->behind_up; /* up waited for the routes before it let this one begin */
    a.x8 = j->x8;
    a.x = j->x;
    a.ldx = j->ldx;
    a.y = j->y;
    a.ldy = j->ldy;
    a.h = j->h;
    a.ldh = j->ldh;
    return down ? run_any<true>(s, &a) : run_any<false>(s, &a);
}
