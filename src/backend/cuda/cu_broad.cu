/* Linears of some hundred rows, by products of a warpgroup: every number of cu_skinny.cu, bit for bit. A matrix of a
 * thousand outputs has few tiles for the chip then, and what counts is how much of a tile's codes and rows is on its
 * way at once.
 *
 * A tile is 64 outputs, a band a warp, and ROWS rows; a block stays on its multiprocessor and takes every n-th. One
 * thread fills a ring of segments, as deep as shared memory holds, with one copy each of codes and of x, and runs ahead
 * into the next tile; codes are asked for before the kernel in front is done. A warpgroup multiplies: its codes are the
 * A operand in registers (cu_large.cu says why the bits are those of cu_mma). Products of a segment start from zero,
 * and run while the sums of the one before are added to the totals and the codes of the next are read.
 *
 *   slot: codes [band][2 groups] as packed, then x [2 groups][ROWS][128 bytes], 128-byte swizzle */
#include <type_traits>

#include "backend/cuda/cu_large_kernel.cuh"
#include "backend/cuda/cu_launch.cuh"
#include "backend/cuda/cu_map.cuh"

enum { BANDS = 4, THREADS = BANDS * 32 + 32, SLOTS_MAX = 9, SHARED = 225 * 1024 };

typedef struct broad_args {
    large_args l;
    int32_t n_slot, n_tile;
} broad_args;

static __host__ __device__ constexpr int codes_bytes(cu_format f) { return BANDS * 2 * large_group_bytes(f); }
static __host__ __device__ constexpr int slot_bytes(cu_format f, int rows) {
    return codes_bytes(f) + rows * CU_SEGMENT * 2;
}

/* d = A B + (add ? d : 0): 64 outputs, N rows, 16 inputs. d: as N / 8 cu_mma accs. */
template <int N> static __device__ __forceinline__ void product(float *d, const uint32_t a[4], uint64_t b, int add) {
    if constexpr (N == 64)
        asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" CU_D32_NAMES
                     "{%32, %33, %34, %35}, %36, p, 1, 1, 0;}\n"
                     : CU_D32(d)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    else
        asm volatile("{.reg .pred p; setp.ne.b32 p, %21, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
                     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                     "{%16, %17, %18, %19}, %20, p, 1, 1, 0;}\n"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                       "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
                       "+f"(d[15])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

/* Tiles run down the rows first. */
template <int ROWS> static __device__ __forceinline__ large_tile tile_of(const large_args *a, int32_t index) {
    const int32_t out = index / a->n_tile_row;
    large_tile t = {};
    t.band0 = out * BANDS;
    t.row = (index - out * a->n_tile_row) * ROWS;
    t.row_end = min(t.row + ROWS, a->n_row);
    t.scale = a->w.scale;
    return t;
}

/* ---- the thread that fills the ring -------------------------------------------------------------------------------
 */

static __device__ __forceinline__ void copy_box(const CUtensorMap *map, int32_t at0, int32_t at1, int32_t at2,
                                                uint32_t to, uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
                 "l"(map), "r"(at0), "r"(at1), "r"(at2), "r"(bar)
                 : "memory");
}

template <cu_format F, int ROWS>
static __device__ __forceinline__ void fill(const broad_args *a, const CUtensorMap *codes, const CUtensorMap *x,
                                            uint32_t ring, uint32_t full, uint32_t empty) {
    constexpr int SLOT = slot_bytes(F, ROWS);
    int32_t index = (int32_t)blockIdx.x;
    large_tile t = tile_of<ROWS>(&a->l, index);
    const auto ask_codes = [&](int32_t seg, int slot) {
        bar_arrive_expect(full + slot * 8, SLOT);
        copy_box(codes, 0, seg * 2, t.band0, ring + slot * SLOT, full + slot * 8);
    };
    const auto ask_x = [&](int32_t seg, int slot) {
        copy_box(x, 0, t.row, seg * 2, ring + slot * SLOT + codes_bytes(F), full + slot * 8);
    };
    for (int32_t k = 0; k < a->n_slot; k++) ask_codes(k, k); /* there are as many segments at least */
    cu_wait_previous();
    for (int32_t k = 0; k < a->n_slot; k++) ask_x(k, k);
    int slot = 0;
    uint32_t parity = 0;
    for (int32_t k = a->n_slot;; k++) {
        if (k == a->l.w.n_seg) {
            index += (int32_t)gridDim.x, k = 0;
            if (index >= a->n_tile) return;
            t = tile_of<ROWS>(&a->l, index);
        }
        bar_wait(empty + slot * 8, parity);
        ask_codes(k, slot);
        ask_x(k, slot);
        if (++slot == a->n_slot) slot = 0, parity ^= 1;
    }
}

/* ---- the warps that multiply ---------------------------------------------------------------------------------------
 */

template <cu_format F, int ROWS>
__global__ void __launch_bounds__(THREADS, 1)
    broad_kernel(const __grid_constant__ broad_args a, const __grid_constant__ CUtensorMap codes_map,
                 const __grid_constant__ CUtensorMap x_map) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(8) uint64_t bars[2 * SLOTS_MAX];
    constexpr int SLOT = slot_bytes(F, ROWS), GROUP = large_group_bytes(F), SUMS = ROWS / 2;
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    const int32_t n_seg = a.l.w.n_seg, last_band = a.l.w.n_band - 1;
    const uint32_t ring = (uint32_t)__cvta_generic_to_shared(memory), full = (uint32_t)__cvta_generic_to_shared(bars),
                   empty = full + SLOTS_MAX * 8;

    cu_launch_next();
    if (threadIdx.x == 0) {
        for (int i = 0; i < a.n_slot; i++) bar_init(full + i * 8, 1), bar_init(empty + i * 8, BANDS);
        bar_init_end();
    }
    __syncthreads();
    if (warp == BANDS) {
        if (lane == 0) fill<F, ROWS>(&a, &codes_map, &x_map, ring, full, empty);
        return;
    }
    cu_wait_previous();

    float acc[2][SUMS] = {}, total[SUMS];
    uint32_t code[2][8][4]; /* of two segments, as acc */
    int at[2], slot = 0;    /* their slots; the next */
    uint32_t parity = 0;
    const auto take = [&](auto p_) {
        constexpr int p = decltype(p_)::value;
        const unsigned char *from = memory + slot * SLOT + warp * 2 * GROUP;
        bar_wait(full + slot * 8, parity);
#pragma unroll
        for (int k = 0; k < 4; k++) large_codes<F>(code[p] + k * 2, from + k / 2 * GROUP, k % 2, lane);
        at[p] = slot;
        if (++slot == a.n_slot) slot = 0, parity ^= 1;
    };
    const auto multiply = [&](auto p_) {
        constexpr int p = decltype(p_)::value;
        const uint64_t x = wide_matrix(ring + at[p] * SLOT + codes_bytes(F));
        wide_fence();
#pragma unroll
        for (int s = 0; s < 8; s++)
            product<ROWS>(acc[p], code[p][s], x + s / 4 * (ROWS * 128 / 16) + 2 * (s % 4), s > 0);
        wide_commit();
    };
    const float *scale_at = NULL; /* F8: of the band's next segment */
    /* The end of a segment, and the next one's begin. */
    const auto step = [&](auto p_, auto more_) {
        constexpr int p = decltype(p_)::value;
        constexpr bool more = decltype(more_)::value;
        const float scale = F == CU_F8 ? __ldg(scale_at++) : 0.0f;
        if constexpr (more) {
            take(std::integral_constant<int, 1 - p>());
            multiply(std::integral_constant<int, 1 - p>());
            wide_wait<1>();
        } else {
            wide_wait<0>();
        }
        wide_hold_codes<8>(code[p]);
        __syncwarp();
        if (lane == 0) bar_arrive(empty + at[p] * 8);
        wide_hold<SUMS>(acc[p]);
#pragma unroll
        for (int i = 0; i < SUMS; i++)
            total[i] = F == CU_F8 ? __fmaf_rn(scale, acc[p][i], total[i]) : __fadd_rn(total[i], acc[p][i]);
        wide_hold<SUMS>(acc[p]);
    };
    const std::integral_constant<int, 0> even;
    const std::integral_constant<int, 1> odd;
    for (int32_t index = (int32_t)blockIdx.x; index < a.n_tile; index += (int32_t)gridDim.x) {
        const large_tile t = tile_of<ROWS>(&a.l, index);
        const int32_t band = t.band0 + warp, band_read = min(band, last_band);
        float old[SUMS];
        if (F == CU_F8) scale_at = t.scale + (int64_t)band_read * n_seg;
        large_old<ROWS / 8>(old, &a.l, &t, band, t.row, lane);
#pragma unroll
        for (int i = 0; i < SUMS; i++) total[i] = 0.0f;
        take(even);
        wide_hold<SUMS>(acc[0]);
        wide_hold<SUMS>(acc[1]);
        multiply(even);
        int32_t left = n_seg;
        for (; left > 2; left -= 2) {
            step(even, std::true_type());
            step(odd, std::true_type());
        }
        if (left == 2) {
            step(even, std::true_type());
            step(odd, std::false_type());
        } else {
            step(even, std::false_type());
        }
        if (F == CU_I8 || F == CU_I4) {
            const float *of = t.scale + band_read * CU_BAND + lane / 4;
            const float s0 = of[0], s8 = of[8];
#pragma unroll
            for (int i = 0; i < SUMS; i++) total[i] = __fmul_rn(total[i], i & 2 ? s8 : s0);
        }
        large_put<ROWS / 8>(&a.l, &t, total, old, band, t.row, lane);
    }
}

/* ---- host ----------------------------------------------------------------------------------------------------------
 */

static int32_t ceil_div(int64_t a, int64_t b) { return (int32_t)((a + b - 1) / b); }
static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

template <cu_format F, int ROWS> static cudaError_t launch(cudaStream_t s, const cu_job *j, int32_t n_core) {
    static uint64_t ready;
    const void *kernel = (const void *)broad_kernel<F, ROWS>;
    broad_args a = {};
    CUtensorMap codes, x;
    a.l = large_plain(j);
    a.l.n_tile_row = ceil_div(j->n_row, ROWS);
    a.n_tile = ceil_div(j->w.n_band, BANDS) * a.l.n_tile_row;
    a.n_slot = least(least(SHARED / slot_bytes(F, ROWS), SLOTS_MAX), j->w.n_seg);
    const uint64_t n_group = (uint64_t)j->w.n_seg * 2;
    cudaError_t e = cu_map_bands(&codes, j->w.pack, large_group_bytes(F), n_group, (uint64_t)j->w.n_band, BANDS);
    if (e == cudaSuccess) e = cu_map_pieces(&x, j->x, n_group, (uint64_t)j->n_row, (uint64_t)j->ldx * 2, ROWS);
    if (e == cudaSuccess) e = cu_shared_bytes(&ready, kernel, SHARED);
    if (e != cudaSuccess) return e;
    void *args[] = {&a, &codes, &x};
    return cu_launch(s, kernel, dim3((unsigned)least(a.n_tile, n_core)), THREADS,
                     (size_t)(a.n_slot * slot_bytes(F, ROWS)), !j->alone, 1, args);
}

template <cu_format F> static cudaError_t run(cudaStream_t s, const cu_job *j) {
    enum { LONG = 17 }; /* segments */
    int32_t n_core;
    const cudaError_t e = cu_core_count(&n_core);
    if (e != cudaSuccess) return e;
    /* Low tiles where the chip holds all of them at once; where K is long, where they take three quarters of it: the
     * rest is for the kernels behind, which begin early. */
    const int32_t across = ceil_div(j->w.n_band, BANDS), low = across * ceil_div(j->n_row, 32);
    const bool few = low <= (j->w.n_seg < LONG ? n_core : n_core * 3 / 4);
    return few ? launch<F, 32>(s, j, n_core) : launch<F, 64>(s, j, n_core);
}

cudaError_t cu_broad_run(cudaStream_t s, const cu_job *j) {
    const large_args a = large_plain(j);
    if (j->x_f32 || j->w.pairs || !large_sound(&a)) return cudaErrorInvalidValue;
    if (j->n_row == 0) return cudaSuccess;
    switch (j->w.format) {
    case CU_BF16: return run<CU_BF16>(s, j);
    case CU_I8: return run<CU_I8>(s, j);
    case CU_I4: return run<CU_I4>(s, j);
    case CU_F8: return run<CU_F8>(s, j);
    default: return cudaErrorInvalidValue; /* rows of 8 bits: cu_a8_mid.cu */
    }
}
