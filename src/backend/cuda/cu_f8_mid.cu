/* fp8 codes times rows in fp8 (CU_F8A8), 8 to some hundred rows, plain and of experts. The tensor cores take the codes
 * as they come, so reading them is all there is to do: weights should never stop coming.
 *
 * A tile is 64 outputs for each of WGS warpgroups times ROWS rows; a warp of a warpgroup has a band. Blocks stay on
 * their multiprocessors and take every n-th tile. Two or three warps more fill a ring of segments in shared memory, in
 * a tile as in the next: one with codes, by bulk copies, before the kernel in front is done where that does not say
 * which; one with rows, by cp.async. Barriers in shared memory count what has come and who is done with a slot.
 *
 *   slot: codes [WGS][4 bands][2048] | rows [ROWS][128], swizzled (cu_f8_device.cuh);   beside: scales of the slot's
 *   rows and bands
 * Rows that are not there are not read: what is computed of them goes nowhere. */
#include "backend/cuda/cu_f8_device.cuh"
#include "backend/cuda/cu_large_kernel.cuh"
#include "backend/cuda/cu_launch.cuh"

enum {
    SLOTS_MAX = 12,
    BEHIND = 2, /* slots whose rows are still on their way when the next are asked for; far more is slower,
                 * since slots are then shown late */
    SHARED_CORE = 227 * 1024, /* of a multiprocessor, without the kilobyte of its own that every block has */
};

typedef struct f8_args {
    large_args l;
    cu_x8 x;
} f8_args;

static __host__ __device__ constexpr int slot_bytes(int rows, int wgs) { return wgs * F8_TILE_BYTES + rows * 128; }
/* What a slot's rows and bands are multiplied with. */
static __host__ __device__ constexpr int slot_scales(int rows, int wgs) { return rows + wgs * F8_TILE_BANDS; }
/* Warps that bring rows; of 64 one would be the limit. */
static __host__ __device__ constexpr int row_fillers(int rows) { return rows == 64 ? 2 : 1; }
static __host__ __device__ constexpr int threads_of(int rows, int wgs) {
    return wgs * 128 + 32 + row_fillers(rows) * 32;
}
static __host__ __device__ constexpr int blocks_each(int rows, int wgs) {
    return rows == 64 || wgs == 2 ? 1 : rows == 32 ? 2 : 3;
}
/* Totals of a tile's bands 1 and 3 of each warpgroup. */
static __host__ __device__ constexpr int ups_bytes(int rows, int wgs) { return wgs * 2 * CU_BAND * rows * 4; }
/* As many as there is room for beside these, the scales and barriers. */
static __host__ __device__ constexpr int slots_of(int rows, int wgs) {
    const int room = SHARED_CORE / blocks_each(rows, wgs) - ups_bytes(rows, wgs) - 2048;
    const int n = room / (slot_bytes(rows, wgs) + slot_scales(rows, wgs) * 4);
    return n < SLOTS_MAX ? n : SLOTS_MAX;
}

/* ---- tiles ---------------------------------------------------------------------------------------------------------
 */

/* How many there are. Of experts that is for an earlier kernel to say. */
static __device__ __forceinline__ uint32_t tile_count(const large_args *a) {
    return (uint32_t)(a->experts ? large_l2i(a->n_tile) : a->n_tile_row) * (uint32_t)a->n_tile_out;
}
/* Those that read the same weights (plain), or the same rows (experts), follow one another. */
static __device__ __forceinline__ void tile_find(const large_args *a, uint32_t index, int rows, large_tile *t) {
    const uint32_t across = (uint32_t)(a->experts ? a->n_tile_out : a->n_tile_row);
    const int32_t major = (int32_t)(index / across), minor = (int32_t)(index % across);
    if (a->experts) {
        const int32_t e = large_l2i(a->tile_expert + major), end = large_l2i(a->first + e + 1);
        t->row = large_l2i(a->tile_place + major);
        t->row_end = min(t->row + rows, end);
        t->band0 = minor * a->tile_bands;
        t->pack = (const unsigned char *)a->experts[e].pack;
        t->scale = a->experts[e].scale;
    } else {
        t->row = minor * rows;
        t->row_end = min(t->row + rows, a->n_row);
        t->band0 = major * a->tile_bands;
        t->pack = (const unsigned char *)a->w.pack;
        t->scale = a->w.scale;
    }
}

/* ---- the warps that fill the ring ---------------------------------------------------------------------------------
 */

/* Places in shared memory. */
typedef struct f8_ring {
    uint32_t slots, scales, full, empty;
} f8_ring;

/* Codes and what they are multiplied with, a band a lane. Of a plain linear they depend on no kernel. */
template <int ROWS, int WGS>
static __device__ __forceinline__ void fill_codes(const large_args *a, const f8_ring *ring, int lane) {
    constexpr int N = slots_of(ROWS, WGS), BANDS = WGS * F8_TILE_BANDS, SCALES = slot_scales(ROWS, WGS) * 4;
    if (a->experts) cu_wait_previous();
    const uint32_t n_tile = tile_count(a);
    int slot = 0;
    uint32_t parity = 1; /* the first time round nobody has to leave a slot */
    for (uint32_t index = blockIdx.x; index < n_tile; index += gridDim.x) {
        large_tile t;
        tile_find(a, index, ROWS, &t);
        const int64_t first = (int64_t)min(t.band0 + lane, a->w.n_band - 1) * a->w.n_seg;
        const unsigned char *from = t.pack + first * F8_BAND_BYTES;
        const float *scale = t.scale + first;
        for (int32_t seg = 0; seg < a->w.n_seg; seg++, from += F8_BAND_BYTES, scale++) {
            const uint32_t full = ring->full + slot * 8;
            bar_wait(ring->empty + slot * 8, parity);
            if (lane == 0) bar_expect(full, BANDS * F8_BAND_BYTES);
            __syncwarp();
            if (lane < BANDS) {
                copy_bulk(ring->slots + slot * slot_bytes(ROWS, WGS) + lane * F8_BAND_BYTES, from, F8_BAND_BYTES, full);
                copy4(ring->scales + slot * SCALES + (ROWS + lane) * 4, scale);
            }
            copies_arrive(full);
            if (++slot == N) slot = 0, parity ^= 1;
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* Rows and their scales: of this warp's rows a lane has a piece of every fourth. They are written as threads write and
 * read by the tensor cores, so a slot is not full before this warp has seen them come and shows them. */
template <int ROWS, int WGS>
static __device__ __forceinline__ void fill_rows(const f8_args *args, const f8_ring *ring, int filler, int lane) {
    constexpr int N = slots_of(ROWS, WGS), OWN = ROWS / row_fillers(ROWS), EACH = OWN / 4;
    const large_args *a = &args->l;
    const int piece = lane % 8, row0 = filler * OWN + lane / 8;
    cu_wait_previous();
    const uint32_t n_tile = tile_count(a);
    uint32_t swap[2]; /* places of the lane's piece, which repeat every 8 rows */
#pragma unroll
    for (int i = 0; i < 2; i++) swap[i] = WGS * F8_TILE_BYTES + f8_piece_at(row0 + 4 * i, piece);
    int slot = 0, shown = 0;
    int32_t n_asked = 0;
    uint32_t parity = 1;
    const auto show = [&]() {
        f8_show();
        __syncwarp();
        if (lane == 0) bar_arrive(ring->full + shown * 8);
        if (++shown == N) shown = 0;
    };
    for (uint32_t index = blockIdx.x; index < n_tile; index += gridDim.x) {
        large_tile t;
        tile_find(a, index, ROWS, &t);
        const int32_t n_row = t.row_end - t.row, scale_row = filler * OWN + lane;
        const bool scales = lane < OWN && scale_row < n_row;
        const uint8_t *from[EACH]; /* row row0 + 4 i */
#pragma unroll
        for (int i = 0; i < EACH; i++)
            from[i] = args->x.code + max(large_row(a, &t, row0 + 4 * i), 0) * args->x.ldx + piece * 16;
        const float *scale = args->x.scale + max(large_row(a, &t, scale_row), 0);
        for (int32_t seg = 0; seg < a->w.n_seg; seg++, scale += args->x.ld_scale) {
            const uint32_t to = ring->slots + slot * slot_bytes(ROWS, WGS);
            bar_wait(ring->empty + slot * 8, parity);
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (row0 + 4 * i < n_row)
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i / 2 * 1024 + swap[i % 2]),
                                 "l"(from[i] + seg * CU_SEGMENT)
                                 : "memory");
            if (scales) copy4(ring->scales + (slot * slot_scales(ROWS, WGS) + scale_row) * 4, scale);
            asm volatile("cp.async.commit_group;" ::: "memory");
            if (++slot == N) slot = 0, parity ^= 1;
            if (++n_asked > BEHIND) {
                asm volatile("cp.async.wait_group %0;" ::"n"((int)BEHIND) : "memory");
                show();
            }
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    for (int32_t left = min(n_asked, (int32_t)BEHIND); left > 0; left--) show();
}

/* ---- the warps that multiply --------------------------------------------------------------------------------------
 */

static __device__ __forceinline__ void group_barrier(int group) {
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

template <int ROWS, int WGS>
__global__ void __launch_bounds__(threads_of(ROWS, WGS), blocks_each(ROWS, WGS))
    f8_mid(const __grid_constant__ f8_args args) {
    extern __shared__ __align__(1024) unsigned char memory[];
    constexpr int N = slots_of(ROWS, WGS), SLOT = slot_bytes(ROWS, WGS), SCALES = slot_scales(ROWS, WGS);
    constexpr int TILES = ROWS / 8;
    __shared__ __align__(8) uint64_t bars[2 * N];
    __shared__ __align__(16) float scales[N * SCALES];
    __shared__ float4 ups[ups_bytes(ROWS, WGS) / 16];
    const large_args *a = &args.l;
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    const uint32_t bars_at = (uint32_t)__cvta_generic_to_shared(bars);
    const f8_ring ring = {(uint32_t)__cvta_generic_to_shared(memory), (uint32_t)__cvta_generic_to_shared(scales),
                          bars_at, bars_at + N * 8};
    const int32_t n_seg = a->w.n_seg;

    cu_launch_next();
    if (threadIdx.x == 0) {
        for (int i = 0; i < N; i++) {
            bar_init(ring.full + i * 8,
                     32 + row_fillers(ROWS)); /* lanes and warps; and the bytes that come by themselves */
            bar_init(ring.empty + i * 8, WGS * 4);
        }
        bar_init_end();
    }
    __syncthreads();
    if (warp == WGS * 4) {
        fill_codes<ROWS, WGS>(a, &ring, lane);
        return;
    }
    if (warp > WGS * 4) {
        fill_rows<ROWS, WGS>(&args, &ring, warp - WGS * 4 - 1, lane);
        return;
    }
    cu_wait_previous();

    const int group = warp / 4;
    const uint32_t n_tile = tile_count(a);
    int slot = 0, done = 0; /* the next to be multiplied, to be added */
    uint32_t parity = 0;
    for (uint32_t index = blockIdx.x; index < n_tile; index += gridDim.x) {
        large_tile t;
        tile_find(a, index, ROWS, &t);
        /* The products of a segment are under way while the sums of the one before are added. */
        float acc[2][ROWS / 2], total[ROWS / 2];
        uint32_t code[2][4][4];
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++) acc[0][i] = acc[1][i] = total[i] = 0.0f;
        const auto multiply = [&](int k) {
            bar_wait(ring.full + slot * 8, parity);
            f8_codes(code[k], memory + slot * SLOT + warp * F8_BAND_BYTES, lane);
            f8_segment<ROWS>(acc[k], code[k], ring.slots + slot * SLOT + WGS * F8_TILE_BYTES);
            if (++slot == N) slot = 0, parity ^= 1;
        };
        const auto add = [&](int k) {
            const float *by = scales + done * SCALES, by_band = by[ROWS + warp];
            float2 by_row[TILES];
#pragma unroll
            for (int i = 0; i < TILES; i++) by_row[i] = *(const float2 *)(by + i * 8 + 2 * (lane & 3));
            wide_hold<ROWS / 2>(acc[k]);
            wide_hold_codes<4>(code[k]);
#pragma unroll
            for (int i = 0; i < ROWS / 2; i++)
                total[i] =
                    __fmaf_rn(__fmul_rn(i & 1 ? by_row[i / 4].y : by_row[i / 4].x, by_band), acc[k][i], total[i]);
            wide_hold<ROWS / 2>(acc[k]);
            __syncwarp();
            if (lane == 0) bar_arrive(ring.empty + done * 8);
            if (++done == N) done = 0;
        };
        multiply(0);
        int32_t left = n_seg - 1;
        for (; left >= 2; left -= 2) {
            multiply(1);
            wide_wait<1>();
            add(0);
            multiply(0);
            wide_wait<1>();
            add(1);
        }
        if (left) {
            multiply(1);
            wide_wait<1>();
            add(0);
            wide_wait<0>();
            add(1);
        } else {
            wide_wait<0>();
            add(0);
        }
        const int32_t band = t.band0 + warp;
        if (a->epilogue == CU_SWIGLU) {
            float4 *const up = ups + (warp / 2) * TILES * 32 + lane;
            if (warp % 2)
#pragma unroll
                for (int i = 0; i < TILES; i++)
                    up[i * 32] = make_float4(total[4 * i], total[4 * i + 1], total[4 * i + 2], total[4 * i + 3]);
            group_barrier(group);
            if (warp % 2 == 0)
#pragma unroll
                for (int i = 0; i < TILES; i++) {
                    const float4 v = up[i * 32];
                    const float u[4] = {v.x, v.y, v.z, v.w};
                    large_put_swiglu(a, &t, total + 4 * i, u, band / 2, t.row + i * 8, lane);
                }
            group_barrier(group);
        } else {
            float old[ROWS / 2];
            large_old<TILES>(old, a, &t, band, t.row, lane);
            large_put<TILES>(a, &t, total, old, band, t.row, lane);
        }
    }
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

static int32_t ceil_div(int64_t a, int64_t b) { return (int32_t)((a + b - 1) / b); }
static int32_t least(int64_t a, int64_t b) { return (int32_t)(a < b ? a : b); }

static bool args_sound(const f8_args *a) {
    return large_sound(&a->l) && a->l.w.format == CU_F8A8 && (uintptr_t)a->x.code % 16 == 0 && a->x.ldx % 16 == 0;
}

template <int ROWS, int WGS> static cudaError_t launch(cudaStream_t s, f8_args *args, bool early) {
    static uint64_t ready;
    const void *kernel = (const void *)f8_mid<ROWS, WGS>;
    constexpr int BYTES = slots_of(ROWS, WGS) * slot_bytes(ROWS, WGS);
    large_args *a = &args->l;
    int32_t n_core;
    cudaError_t e = cu_core_count(&n_core);
    if (e == cudaSuccess) e = cu_shared_bytes(&ready, kernel, BYTES);
    if (e != cudaSuccess) return e;
    if (!args_sound(args)) return cudaErrorInvalidValue;
    a->tile_bands = WGS * F8_TILE_BANDS;
    a->n_tile_out = ceil_div(a->w.n_band, a->tile_bands);
    const int64_t n_tile = (int64_t)a->n_tile_out * a->n_tile_row;
    if (n_tile > INT32_MAX) return cudaErrorInvalidValue;
    if (n_tile == 0) return cudaSuccess;
    void *params[] = {args};
    return cu_launch(s, kernel, dim3((unsigned)least(n_tile, (int64_t)n_core * blocks_each(ROWS, WGS))),
                     threads_of(ROWS, WGS), BYTES, early, 1, params);
}

/* As many rows a tile as leave most of the chip something to do. */
cudaError_t cu_f8_mid_run(cudaStream_t s, const cu_job *j) {
    f8_args args = {};
    int32_t n_core;
    bool took = false;
    cudaError_t e = cu_core_count(&n_core);
    args.l = large_plain(j);
    args.l.x = NULL;
    args.x = j->x8;
    if (e == cudaSuccess && !args_sound(&args)) e = cudaErrorInvalidValue;
    if (e == cudaSuccess) e = cu_f8_split_run(s, j, &took);
    if (took || e != cudaSuccess) return e;
    const int32_t n_out = ceil_div(j->w.n_band, F8_TILE_BANDS);
    int rows = 16;
    while (rows < 64 && rows < j->n_row && (int64_t)n_out * ceil_div(j->n_row, 2 * rows) * 10 >= n_core * 7) rows *= 2;
    args.l.n_tile_row = ceil_div(j->n_row, rows);
    switch (rows) {
    case 16: return launch<16, 1>(s, &args, !j->alone);
    case 32: return launch<32, 1>(s, &args, !j->alone);
    }
    return launch<64, 1>(s, &args, !j->alone);
}

cudaError_t cu_f8_mid_grouped(cudaStream_t s, const cu_grouped_job *j) {
    f8_args args = {};
    args.l = large_experts(j);
    args.l.x = NULL;
    args.x = j->x8;
    switch (j->routes->tile_rows) {
    case 8: return launch<8, 1>(s, &args, true);
    case 16: return launch<16, 1>(s, &args, true);
    case 32: return launch<32, 2>(s, &args, true);
    case 64: return launch<64, 2>(s, &args, true);
    }
    return cudaErrorInvalidValue;
}
