/* Linears of many rows (prefill): every number of cu_skinny.cu, bit for bit, with tiles of 128 outputs and 128 rows
 * that make the tensor cores the limit. x comes a group (64 inputs) at a time, codes a segment (two groups), each
 * through a ring of its own in shared memory.
 * Per segment (two groups) the products start from zero and are added to the totals at its end, which is what makes the
 * sums the same for every kernel (cu_kernels.h). */
#include <type_traits>

#include "backend/cuda/cu_wide.cuh"

/* ---- products by warpgroups ----------------------------------------------------------------------------------------
 *
 * wgmma reads x from shared memory once for four bands where mma.sync reads it for two, and is not held to two thirds
 * of the tensor cores. Its product m64n64k16 is, number for number, the m16n8k16 of cu_mma: 16 exact products and the
 * sum so far are aligned and added at once; check_large.c holds it to that, bit for bit.
 *
 * Two blocks are a cluster: the same rows, neighbouring outputs. Each brings half of the rows of x, for both. A cluster
 * stays on its multiprocessors and takes every n-th pair of tiles. In a block warpgroups 0 and 1 multiply: all 128
 * rows, WG w bands w, w + 2, w + 4, w + 6 of the tile (of pairs: gate, up), warp i band 2 i + w as the A operand in
 * registers; each warp asks for its band's codes itself. Warp 8 asks for x. Both run ahead of the products and into the
 * next tile. Warps 9 to 11 take a tile's totals from shared memory to y or h, while the next tile is multiplied. */

enum { WIDE_SLOTS_MAX = 8 };
/* Two rings. Of x: a slot is a group, [128 rows][128 bytes], a piece of 16 bytes of a row at piece ^ (row & 7): the
 * 128-byte swizzle of copies and products. Of codes: a slot is a segment of the tile's bands, two groups each, as
 * packed: one copy a band brings both. */
static __host__ __device__ constexpr int x_slots(cu_format f) { return f == CU_BF16 ? 4 : f == CU_I4 ? 8 : 6; }
static __host__ __device__ constexpr int code_slots(cu_format f) { return f == CU_BF16 ? 3 : 4; }
static __host__ __device__ constexpr int code_bytes(cu_format f) { return LARGE_BANDS * 2 * large_group_bytes(f); }
static __host__ __device__ constexpr int rings_bytes(cu_format f) {
    return x_slots(f) * WIDE_X + code_slots(f) * code_bytes(f);
}
static __host__ __device__ constexpr int wide_bytes(cu_format f) {
    return rings_bytes(f) + WIDE_SUMS + 1024; /* the rings start at a multiple of 1024 */
}

/* Barriers, by their addresses. */
typedef struct wide_bars {
    uint32_t full, empty; /* [slots] x of a slot is there; the slot is free, for all blocks that write to it */
    uint32_t sums_full, sums_empty; /* totals of a tile */
    uint32_t codes;                 /* [8][WIDE_SLOTS_MAX] the codes of a warp are there */
} wide_bars;

/* d = A B + (add ? d : 0): 64 outputs, 64 rows, 16 inputs. d: as eight cu_mma accs. */
static __device__ __forceinline__ void wide_product(float d[32], const uint32_t a[4], uint64_t b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" CU_D32_NAMES
                 "{%32, %33, %34, %35}, %36, p, 1, 1, 0;}\n"
                 : CU_D32(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

template <cu_format F>
static __device__ __forceinline__ void wide_codes(uint32_t a[4][4], const unsigned char *group, int lane) {
    large_codes<F>(a, group, 0, lane);
    large_codes<F>(a + 2, group, 1, lane);
}
/* The four products of a group. x: its 64 rows in shared memory. */
static __device__ __forceinline__ void wide_group(float d[32], const uint32_t a[4][4], uint32_t x, bool first) {
    const uint64_t b = wide_matrix(x);
#pragma unroll
    for (int s = 0; s < 4; s++) wide_product(d, a[s], b + 2 * s, !(first && s == 0));
    wide_commit();
}

/* ---- the thread that brings x -------------------------------------------------------------------------------------
 */

template <cu_format F>
static __device__ __forceinline__ void wide_fill(const large_args *a, const CUtensorMap *x, uint32_t n_tile,
                                                 uint32_t ring, const wide_bars *bars) {
    constexpr int N = x_slots(F), OWN = WIDE_ROWS / WIDE_RANKS;
    const uint32_t rank = cu_cluster_rank(), own0 = rank * OWN, to = ring + own0 * 128;
    const int32_t n_group = a->w.n_seg * 2;
    int slot = 0;
    uint32_t parity = 1; /* the first time round nobody has to leave a slot */
    for (uint32_t index = blockIdx.x / WIDE_RANKS; index < n_tile; index += gridDim.x / WIDE_RANKS) {
        large_tile t;
        if (!wide_find(a, index, rank, &t)) continue;
        for (int32_t g = 0; g < n_group; g++) {
            const uint32_t bar = bars->full + slot * 8;
            bar_wait(bars->empty + slot * 8, parity);
            bar_arrive_expect(bar, WIDE_X);
            wide_copy_x(x, g * 64, t.row + own0, to + slot * WIDE_X, bar);
            if (++slot == N) slot = 0, parity ^= 1;
        }
    }
}

/* ---- the warps that multiply --------------------------------------------------------------------------------------
 */

/* A warpgroup's products come in four batches a segment: rows 0..63 and 64..127 of its first group, then of its second.
 * The next batches are always under way while one half's sums are added to the totals and codes are read, so that the
 * tensor cores do not wait. */
template <cu_format F>
static __device__ __forceinline__ void wide_multiply(const large_args *a, uint32_t n_tile, uint32_t ring_at,
                                                     const unsigned char *ring, float *sums, const wide_bars *bars,
                                                     int group, int thread) {
    constexpr int N = x_slots(F), CODE_N = code_slots(F), CODE_SLOT = code_bytes(F), GROUP = large_group_bytes(F);
    const int warp = thread / 32, lane = thread % 32, in_tile = warp * 2 + group;
    const uint32_t rank = cu_cluster_rank(), x = ring_at;
    const int own_codes = N * WIDE_X + in_tile * 2 * GROUP; /* of the warp, in the first slot */
    const unsigned char *codes = ring + own_codes;
    const int32_t n_seg = a->w.n_seg;
    int slot = 0, code_slot = 0; /* the next to be read */
    uint32_t parity = 0, code_parity = 0, sums_parity = 1;
    /* The warp's codes: what to ask for next, and where to. */
    const uint32_t came = bars->codes + in_tile * (WIDE_SLOTS_MAX * 8);
    uint32_t ask_index = blockIdx.x / WIDE_RANKS;
    const unsigned char *ask_from = NULL;
    int32_t ask_left = 0; /* segments of the tile */
    int ask_slot = 0;
    const auto ask = [&]() {
        for (; ask_left == 0; ask_index += gridDim.x / WIDE_RANKS) {
            large_tile t;
            if (ask_index >= n_tile) return;
            if (!wide_find(a, ask_index, rank, &t)) continue;
            ask_left = n_seg;
            ask_from = t.pack + (int64_t)min(t.band0 + in_tile, a->w.n_band - 1) * n_seg * (2 * GROUP);
        }
        __syncwarp(); /* all lanes have read what is there */
        if (lane == 0) {
            bar_arrive_expect(came + ask_slot * 8, 2 * GROUP);
            copy_bulk(ring_at + own_codes + ask_slot * CODE_SLOT, ask_from, 2 * GROUP, came + ask_slot * 8);
        }
        ask_from += 2 * GROUP;
        ask_left--;
        if (++ask_slot == CODE_N) ask_slot = 0;
    };
    if (a->experts) cu_wait_previous(); /* which tiles there are is for an earlier kernel to say */
    for (int i = 0; i < CODE_N; i++) ask();
    for (uint32_t index = blockIdx.x / WIDE_RANKS; index < n_tile; index += gridDim.x / WIDE_RANKS) {
        large_tile t;
        if (!wide_find(a, index, rank, &t)) continue;
        const int32_t band = t.band0 + in_tile, band_read = band < a->w.n_band ? band : a->w.n_band - 1;
        float acc[2][32] = {}, total[2][32] = {};
        uint32_t code[2][4][4];
        int at[2]; /* slots of the segment's groups */
        const auto read = [&](int g) {
            at[g] = slot;
            if (g == 0) bar_wait(came + code_slot * 8, code_parity);
            bar_wait(bars->full + slot * 8, parity);
            wide_codes<F>(code[g], codes + code_slot * CODE_SLOT + g * GROUP, lane);
            if (g == 1 && ++code_slot == CODE_N) code_slot = 0, code_parity ^= 1;
            if (++slot == N) slot = 0, parity ^= 1;
        };
        const auto multiply = [&](int half, int g) {
            wide_fence();
            wide_group(acc[half], code[g], x + at[g] * WIDE_X + half * (WIDE_X / 2), g == 0);
        };
        const auto add = [&](int half, float scale) {
            wide_hold<32>(acc[half]);
#pragma unroll
            for (int i = 0; i < 32; i++)
                total[half][i] = F == CU_F8 ? __fmaf_rn(scale, acc[half][i], total[half][i])
                                            : __fadd_rn(total[half][i], acc[half][i]);
            wide_hold<32>(acc[half]);
        };
        const auto leave = [&](int g) {
            wide_hold_codes<4>(code[g]);
            wide_leave(bars->empty + at[g] * 8, lane);
        };
        const auto segment = [&](int32_t seg, auto is_last) {
            constexpr bool last = decltype(is_last)::value;
            float scale = 0.0f;
            if (F == CU_F8) scale = __ldg(t.scale + (int64_t)band_read * n_seg + seg);
            read(1);
            multiply(0, 1);
            multiply(1, 1);
            ask(); /* into the place of this segment, whose codes are in registers */
            wide_wait<2>();
            leave(0);
            if constexpr (!last) read(0);
            wide_wait<1>();
            add(0, scale);
            if constexpr (last) {
                wide_wait<0>();
            } else {
                multiply(0, 0);
                wide_wait<1>();
            }
            leave(1);
            add(1, scale);
            if constexpr (!last) multiply(1, 0);
        };
        read(0);
        wide_hold<32>(acc[0]);
        wide_hold<32>(acc[1]);
        multiply(0, 0);
        multiply(1, 0);
        for (int32_t seg = 0; seg + 1 < n_seg; seg++) segment(seg, std::false_type());
        segment(n_seg - 1, std::true_type());
        if (F == CU_I8 || F == CU_I4) {
            const float s0 = t.scale[band_read * CU_BAND + lane / 4], s8 = t.scale[band_read * CU_BAND + lane / 4 + 8];
#pragma unroll
            for (int i = 0; i < 64; i++) total[i / 32][i % 32] = __fmul_rn(total[i / 32][i % 32], i & 2 ? s8 : s0);
        }
        bar_wait(bars->sums_empty, sums_parity);
        sums_parity ^= 1;
        wide_keep(sums, total, in_tile, lane);
        bar_arrive(bars->sums_full);
    }
}

template <cu_format F>
__global__ void __launch_bounds__(WIDE_THREADS, 1)
    large_wide(const __grid_constant__ large_args a, const __grid_constant__ CUtensorMap x) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(8) uint64_t bar_words[10 * WIDE_SLOTS_MAX + 2];
    constexpr int N = x_slots(F);
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    const uint32_t n_tile = (uint32_t)a.n_tile_out * (uint32_t)a.n_tile_row;
    const uint32_t memory_at = (uint32_t)__cvta_generic_to_shared(memory), skip = -memory_at & 1023;
    const uint32_t ring_at = memory_at + skip, bars_at = (uint32_t)__cvta_generic_to_shared(bar_words);
    const wide_bars bars = {bars_at, bars_at + WIDE_SLOTS_MAX * 8, bars_at + 2 * WIDE_SLOTS_MAX * 8,
                            bars_at + (2 * WIDE_SLOTS_MAX + 1) * 8, bars_at + (2 * WIDE_SLOTS_MAX + 2) * 8};
    unsigned char *ring = memory + skip;
    float *sums = (float *)(ring + rings_bytes(F));

    cu_launch_next();
    if (threadIdx.x == 0) {
        for (int i = 0; i < N; i++) {
            bar_init(bars.full + i * 8, 1);               /* who asks; and the bytes */
            bar_init(bars.empty + i * 8, 8 * WIDE_RANKS); /* the warps that multiply, of all blocks */
        }
        for (int i = 0; i < 8 * WIDE_SLOTS_MAX; i++) bar_init(bars.codes + i * 8, 1);
        bar_init(bars.sums_full, 256);
        bar_init(bars.sums_empty, WIDE_STORERS);
        bar_init_end();
    }
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");

    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
        const int warp = thread / 32, lane = thread % 32;
        cu_wait_previous();
        if (warp > 0)
            wide_store<false>(&a, n_tile, sums, bars.sums_full, bars.sums_empty, warp - 1, lane);
        else if (lane == 0)
            wide_fill<F>(&a, &x, n_tile, ring_at, &bars);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
        wide_multiply<F>(&a, n_tile, ring_at, ring, sums, &bars, group, thread);
    }
    /* The other block writes to this one's memory and barriers to its own end. */
    cluster_arrive();
    cluster_meet();
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

template <cu_format F>
static cudaError_t launch_wide(cudaStream_t s, large_args *a, int64_t n_x, bool early, int n_core) {
    static uint64_t ready;
    constexpr int BYTES = wide_bytes(F);
    cudaError_t e = cu_shared_bytes(&ready, (const void *)large_wide<F>, BYTES);
    const int64_t n_tile = (int64_t)a->n_tile_out * a->n_tile_row, n_cluster = n_core / WIDE_RANKS;
    CUtensorMap x;
    if (e != cudaSuccess || n_tile == 0) return e;
    if (n_tile > INT32_MAX) return cudaErrorInvalidValue;
    e = cu_map_rows(&x, a->x, (uint64_t)a->w.n_seg * CU_SEGMENT, (uint64_t)n_x, (uint64_t)a->ldx * sizeof(cu_bf16), 64,
                    WIDE_ROWS / WIDE_RANKS);
    if (e != cudaSuccess) return e;
    void *args[] = {a, &x};
    return cu_launch(s, (const void *)large_wide<F>,
                     dim3((unsigned)(n_tile < n_cluster ? n_tile : n_cluster) * WIDE_RANKS), WIDE_THREADS, BYTES, early,
                     WIDE_RANKS, args);
}

/* n_x: rows of x. */
static cudaError_t launch_any(cudaStream_t s, large_args *a, int64_t n_x, bool early) {
    int32_t n_core;
    cudaError_t e = cu_core_count(&n_core);
    if (e != cudaSuccess) return e;
    if (!large_sound(a)) return cudaErrorInvalidValue;
    a->tile_bands = LARGE_BANDS * WIDE_RANKS;
    a->n_tile_out = (a->w.n_band + a->tile_bands - 1) / a->tile_bands;
    switch (a->w.format) {
    case CU_BF16: return launch_wide<CU_BF16>(s, a, n_x, early, n_core);
    case CU_I8: return launch_wide<CU_I8>(s, a, n_x, early, n_core);
    case CU_I4: return launch_wide<CU_I4>(s, a, n_x, early, n_core);
    case CU_F8: return launch_wide<CU_F8>(s, a, n_x, early, n_core);
    default: break; /* rows of 8 bits: cu_a8_large.cu */
    }
    return cudaErrorInvalidValue;
}

cudaError_t cu_large_run(cudaStream_t s, const cu_job *j) {
    if (j->x_f32) return cudaErrorInvalidValue;
    large_args a = large_plain(j);
    a.n_tile_row = (a.n_row + WIDE_ROWS - 1) / WIDE_ROWS;
    return launch_any(s, &a, a.n_row, !j->alone);
}

cudaError_t cu_large_grouped(cudaStream_t s, const cu_grouped_job *j) {
    const cu_routes *r = j->routes;
    if (r->tile_rows != WIDE_ROWS) return cudaErrorInvalidValue;
    large_args a = large_experts(j);
    if (j->gather) {
        if (!large_sound(&a) || !j->by_place) return cudaErrorInvalidValue;
        const cudaError_t e =
            j->spread ? cudaSuccess : wide_spread(s, j->by_place, j->x, j->ldx * (int64_t)sizeof(cu_bf16), r, j->n_row);
        if (e != cudaSuccess) return e;
        a.x = j->by_place;
        a.place_entry = NULL;
    }
    return launch_any(s, &a, (int64_t)j->n_row * r->n_used, true);
}
