/* Gate and up of one row that is normed on the way, weights CU_F8A8 or CU_I8A8 in as many tiles as leave a block about
 * every multiprocessor: the shared experts of one sequence, which begin beside the router and have experts right behind
 * them. Such a launch finds nothing on its way, so what it asks for first decides: the row, and the codes only when
 * that is there. Behind megabytes of codes the row, and every word that kernels beside this one wait for, would come
 * when these have come. And little is taken of a multiprocessor, so that blocks of up lie beside.
 *
 * A block has a tile of 64 outputs; a warp of its warpgroup a band, whose totals stay in registers; one warp more asks.
 * All four norm the row, each for itself, and make every fourth segment of its codes.
 *
 *   shared: ring [slot][codes of a tile's segment] | x [segment][8][128], of which one row is there, swizzled
 *           (cu_a8_device.cuh) | row [D] f32 | norm_w [D] bf16 | by_row [segment] f32 | fp8: by_band [segment][4] */
#include "backend/cuda/cu_a8_device.cuh"
#include "backend/cuda/cu_launch.cuh"

enum {
    WARPS = 4,
    THREADS = WARPS * 32 + 32,
    SLOTS = 8,         /* of all blocks more than the memory has on its way at once */
    ROWS = 8,          /* of a product */
    INPUTS_MAX = 8192, /* that shared memory has room for */
    SHARED_MAX = 220 * 1024
};

typedef struct one_args {
    cu_job j;
    int32_t n_slot;
} one_args;

/* Places in shared memory, in bytes. */
typedef struct one_map {
    int32_t x, row, norm, by_row, by_band, end;
} one_map;
template <cu_format F> static __host__ __device__ __forceinline__ one_map map_of(const one_args *a) {
    one_map m;
    const int32_t n_seg = a->j.w.n_seg, D = a->j.w.n_in;
    m.x = a->n_slot * a8_tile_bytes(F);
    m.row = m.x + n_seg * ROWS * CU_SEGMENT;
    m.norm = m.row + D * 4;
    m.by_row = m.norm + D * 2;
    m.by_band = m.by_row + n_seg * 4;
    m.end = m.by_band + (F == CU_F8A8 ? n_seg * A8_TILE_BANDS * 4 : 0);
    return m;
}

template <cu_format F> __global__ void __launch_bounds__(THREADS) a8_one(const __grid_constant__ one_args a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(8) uint64_t bars[2 * SLOTS + 2];
    __shared__ float totals[WARPS][CU_BAND];
    const int BAND_BYTES = a8_band_bytes(F), TILE_BYTES = a8_tile_bytes(F);
    const cu_job *j = &a.j;
    const one_map m = map_of<F>(&a);
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), thread = threadIdx.x;
    const int32_t n_seg = j->w.n_seg, D = j->w.n_in, tile = (int32_t)blockIdx.x;
    const uint32_t memory_at = (uint32_t)__cvta_generic_to_shared(memory);
    const uint32_t full = (uint32_t)__cvta_generic_to_shared(bars), empty = full + SLOTS * 8;
    const uint32_t row_came = empty + SLOTS * 8, norm_came = row_came + 8;

    if (thread == 0) {
        for (int i = 0; i < a.n_slot; i++) {
            bar_init(full + i * 8, 1);
            bar_init(empty + i * 8, WARPS);
        }
        bar_init(row_came, 1);
        bar_init(norm_came, 1);
        bar_init_end();
    }
    __syncthreads();

    if (warp == WARPS) {
        if (lane > 0) return;
        const unsigned char *from =
            (const unsigned char *)j->w.pack + a8_at(tile * A8_TILE_BANDS, 0, n_seg) * BAND_BYTES;
        cu_wait_previous();
        bar_arrive_expect(row_came, D * 4);
        copy_bulk(memory_at + m.row, j->x_f32, D * 4, row_came);
        bar_arrive_expect(norm_came, D * 2);
        copy_bulk(memory_at + m.norm, j->norm_w, D * 2, norm_came);
        bar_wait(row_came, 0);
        cu_launch_next();
        int slot = 0;
        uint32_t parity = 1; /* the first time round nobody has to leave a slot */
        for (int32_t seg = 0; seg < n_seg; seg++) {
            bar_wait(empty + slot * 8, parity);
            bar_arrive_expect(full + slot * 8, TILE_BYTES);
            copy_bulk_once(memory_at + slot * TILE_BYTES, from + (int64_t)seg * (CU_A8_BANDS * BAND_BYTES), TILE_BYTES,
                           full + slot * 8);
            if (++slot == a.n_slot) slot = 0, parity ^= 1;
        }
        return;
    }

    const int32_t band = tile * A8_TILE_BANDS + warp;
    float *const by_row = (float *)(memory + m.by_row), *const by_band = (float *)(memory + m.by_band);
    float by_out = 1.0f; /* of an output of the warp's band, lanes 0..15 */
    if (F == CU_F8A8) {
        for (int32_t i = thread; i < n_seg * A8_TILE_BANDS; i += WARPS * 32)
            by_band[i] = __ldg(j->w.scale + a8_at(tile * A8_TILE_BANDS, i / A8_TILE_BANDS, n_seg) + i % A8_TILE_BANDS);
    } else if (band < j->w.n_band) {
        by_out = __ldg(j->w.scale + band * CU_BAND + lane % CU_BAND);
    }
    cu_wait_previous();

    const float *const row = (const float *)(memory + m.row);
    const cu_bf16 *const norm = (const cu_bf16 *)(memory + m.norm);
    float square = 0.0f;
    bar_wait(row_came, 0);
#pragma unroll 5
    for (int32_t i = lane * 4; i < D; i += CU_SEGMENT) square = cu_add_squares(*(const float4 *)(row + i), square);
    const float scale = cu_norm_scale(cu_warp_sum(square), D, j->eps);
    bar_wait(norm_came, 0);
#pragma unroll 2
    for (int32_t seg = warp; seg < n_seg; seg += WARPS) {
        const int32_t i = seg * CU_SEGMENT + lane * 4;
        const float4 f = *(const float4 *)(row + i);
        const uint2 w = *(const uint2 *)(norm + i);
        const float v[4] = {cu_f32(cu_round(cu_normed(f.x, scale, (cu_bf16)w.x))),
                            cu_f32(cu_round(cu_normed(f.y, scale, (cu_bf16)(w.x >> 16)))),
                            cu_f32(cu_round(cu_normed(f.z, scale, (cu_bf16)w.y))),
                            cu_f32(cu_round(cu_normed(f.w, scale, (cu_bf16)(w.y >> 16))))};
        float of_codes;
        const uint32_t code = a8_quantize<a8_codes_of(F)>(&of_codes, v);
        *(uint32_t *)(memory + m.x + seg * (ROWS * CU_SEGMENT) + a8_piece_at(0, lane / 4) + lane % 4 * 4) = code;
        if (lane == 0) by_row[seg] = of_codes;
    }
    a8_show();
    cu_barrier(1, WARPS * 32);

    /* The row's sums are in lanes 4 g: outputs g and g + 8. */
    float total[2] = {0.0f, 0.0f};
    int slot = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int32_t seg = 0; seg < n_seg; seg++) {
        a8_sum<F> acc[ROWS / 2] = {};
        uint32_t code[4][4];
        const float s = F == CU_F8A8 ? __fmul_rn(by_row[seg], by_band[seg * A8_TILE_BANDS + warp]) : by_row[seg];
        bar_wait(full + slot * 8, parity);
        a8_codes<F>(code, memory + slot * TILE_BYTES + warp * BAND_BYTES, lane);
        a8_segment<ROWS>(acc, code, memory_at + m.x + seg * (ROWS * CU_SEGMENT));
        wide_wait<0>();
        a8_hold<ROWS / 2>(acc);
        wide_hold_codes<4>(code);
        if (lane == 0) bar_arrive(empty + slot * 8);
        total[0] = __fmaf_rn(s, a8_number(acc[0]), total[0]);
        total[1] = __fmaf_rn(s, a8_number(acc[2]), total[1]);
        if (++slot == a.n_slot) slot = 0, parity ^= 1;
    }

    if (lane % 4 == 0) totals[warp][lane / 4] = total[0], totals[warp][lane / 4 + 8] = total[1];
    __syncwarp();
    float mine = 0.0f;
    if (lane < CU_BAND) mine = __fmul_rn(totals[warp][lane], by_out);
    if (warp % 2 && lane < CU_BAND) totals[warp][lane] = mine;
    cu_barrier(2 + warp / 2, 64);
    if (warp % 2 || lane >= CU_BAND) return;
    const int32_t out = band / 2 * CU_BAND + lane;
    if (out < j->w.n_out) j->h[out] = cu_round(cu_swiglu(mine, totals[warp + 1][lane]));
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
static bool aligned(const void *p) { return ((uintptr_t)p & 15) == 0; }

template <cu_format F> static cudaError_t run(cudaStream_t s, const cu_job *j) {
    static uint64_t ready;
    const void *const kernel = (const void *)a8_one<F>;
    const cudaError_t e = cu_shared_whole(&ready, kernel, SHARED_MAX);
    if (e != cudaSuccess) return e;
    one_args a = {*j, least(SLOTS, j->w.n_seg)};
    void *args[] = {&a};
    const int32_t n_tile = (j->w.n_band + A8_TILE_BANDS - 1) / A8_TILE_BANDS;
    return cu_launch(s, kernel, dim3((unsigned)n_tile), THREADS, (size_t)map_of<F>(&a).end, !j->alone, 1, args);
}

cudaError_t cu_a8_one_run(cudaStream_t s, const cu_job *j, bool *took) {
    const int32_t D = j->w.n_in, n_tile = (j->w.n_band + A8_TILE_BANDS - 1) / A8_TILE_BANDS;
    int32_t n_core;
    const cudaError_t e = cu_core_count(&n_core);
    *took = e == cudaSuccess && j->n_row == 1 && j->alone && j->x_f32 && j->w.pairs && j->epilogue == CU_SWIGLU &&
            n_tile <= n_core && n_tile * 2 > n_core && D % CU_SEGMENT == 0 && D <= INPUTS_MAX && aligned(j->x_f32) &&
            aligned(j->norm_w) && j->w.format != CU_I4A8;
    if (!*took) return e;
    return j->w.format == CU_F8A8 ? run<CU_F8A8>(s, j) : run<CU_I8A8>(s, j);
}
