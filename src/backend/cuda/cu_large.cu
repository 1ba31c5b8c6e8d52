/* Linears of many rows (prefill): every number of cu_skinny.cu, bit for bit, with tiles of 128 outputs and 128 rows
 * that make the tensor cores the limit. Codes and x come a segment (128 inputs) at a time through a ring in shared
 * memory. Per segment the products start from zero and are added to the totals at its end, which is what makes the sums
 * the same for every kernel (cu_kernels.h). */
#include "backend/cuda/cu_large_kernel.cuh"

/* A slot of the ring: codes of the tile's bands, 2 groups each, as packed; then x [2 groups][128 rows][128 bytes]. */
enum { LARGE_BANDS = 8 };
static __host__ __device__ constexpr int codes_bytes(cu_format f) { return LARGE_BANDS * 2 * large_group_bytes(f); }
static __host__ __device__ constexpr int slot_bytes(cu_format f, int rows) {
    return codes_bytes(f) + rows * CU_SEGMENT * 2;
}

/* ---- products by warpgroups ----------------------------------------------------------------------------------------
 *
 * wgmma reads x from shared memory once for four bands where mma.sync reads it for two, and is not held to two thirds
 * of the tensor cores. Its product m64n128k16 is, number for number, the m16n8k16 of cu_mma: 16 exact products and the
 * sum so far are aligned and added at once; check_large.c holds it to that, bit for bit.
 *
 * A block stays on its multiprocessor and takes every gridDim.x-th tile. Warpgroups 0 and 1 multiply: all 128 rows, WG
 * w bands w, w + 2, w + 4, w + 6 of the tile (of pairs: gate, up), warp i band 2 i + w as the A operand in registers.
 * Warpgroup 2 fills the ring, ahead of them and into the next tile: codes by bulk copies, x through registers. A piece
 * of 16 bytes sits at piece ^ (row & 7): the 128-byte swizzle of the descriptor. */

enum {
    WIDE_ROWS = 128,
    WIDE_THREADS = 384,
    WIDE_SWAP = 32 * 256 * 4, /* gate and up change hands: [2][32][128] f32 */
};
static __host__ __device__ constexpr int wide_slots(cu_format f) { return f == CU_BF16 ? 3 : 4; }
static __host__ __device__ constexpr int wide_bytes(cu_format f) {
    return wide_slots(f) * slot_bytes(f, WIDE_ROWS) + WIDE_SWAP + 1024; /* the ring starts at a multiple of 1024 */
}

/* d = A B + (add ? d : 0): 64 outputs, 128 rows, 16 inputs. d: as eight times two cu_mma accs side by side. */
static __device__ __forceinline__ void wide_product(float d[64], const uint32_t a[4], uint64_t b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" CU_D64_NAMES
                 "{%64, %65, %66, %67}, %68, p, 1, 1, 0;}\n"
                 : CU_D64(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
/* Keeps the compiler from moving what reads or writes these registers past this point. */
static __device__ __forceinline__ void wide_hold(float d[64]) {
#pragma unroll
    for (int i = 0; i < 64; i++) asm volatile("" : "+f"(d[i])::"memory");
}
static __device__ __forceinline__ void wide_hold_codes(uint32_t a[4][4]) {
#pragma unroll
    for (int i = 0; i < 16; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

/* The warpgroups issue the products of a segment in turns, 0 first: while one adds to its totals and reads its next
 * codes, the other keeps the tensor cores busy. Left alone they would do both at the same time. */
static __device__ __forceinline__ void wide_my_turn(int group) {
    asm volatile("bar.sync %0, 256;" ::"r"(2 + group) : "memory");
}
static __device__ __forceinline__ void wide_your_turn(int group) {
    asm volatile("bar.arrive %0, 256;" ::"r"(3 - group) : "memory");
}

template <cu_format F>
static __device__ __forceinline__ void wide_codes(uint32_t a[4][4], const unsigned char *group, int lane) {
    large_codes<F>(a, group, 0, lane);
    large_codes<F>(a + 2, group, 1, lane);
}
/* The four products of a group. x: its 128 rows in shared memory; a row of B is 128 bytes, eight rows 1024. */
static __device__ __forceinline__ void wide_group(float d[64], const uint32_t a[4][4], uint32_t x, bool first) {
    const uint64_t b = (uint64_t)((x & 0x3ffffu) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
#pragma unroll
    for (int s = 0; s < 4; s++) wide_product(d, a[s], b + 2 * s, !(first && s == 0));
}

/* Fill the ring for all tiles of the block. thread: 0..127. */
template <cu_format F>
static __device__ __forceinline__ void wide_fill(const large_args *a, uint32_t n_tile, uint32_t ring, uint32_t full,
                                                 uint32_t empty, int thread) {
    constexpr int N = wide_slots(F), SLOT = slot_bytes(F, WIDE_ROWS), BAND_BYTES = 2 * large_group_bytes(F);
    const int row0 = thread / 8, piece = thread % 8;
    const int32_t n_seg = a->w.n_seg;
    const uint32_t at = codes_bytes(F) + row0 * 128 + ((piece ^ (row0 & 7)) << 4); /* of a piece in a slot */
    int slot = 0;
    uint32_t parity = 1; /* the first time round nobody has to leave a slot */
    for (uint32_t index = blockIdx.x; index < n_tile; index += gridDim.x) {
        large_tile t;
        if (!large_find(a, index, WIDE_ROWS, &t)) continue;
        int32_t row[8]; /* of x, for rows row0 + 16 i of the tile; < 0: zeros */
        uint4 v[2][8];
        const cu_bf16 *x = a->x + piece * 8; /* of the segment to ask for */
#pragma unroll
        for (int i = 0; i < 8; i++) row[i] = large_row(a, &t, row0 + 16 * i);
#pragma unroll
        for (int k = 0; k < 16; k++) {
            v[k / 8][k % 8] = make_uint4(0, 0, 0, 0);
            large_l2(&v[k / 8][k % 8], x + row[k % 8] * a->ldx + k / 8 * 64, row[k % 8] >= 0);
        }
        for (int32_t seg = 0; seg < n_seg; seg++) {
            const uint32_t to = ring + slot * SLOT, bar = full + slot * 8;
            x += CU_SEGMENT;
            bar_wait(empty + slot * 8, parity);
            if (thread == 0) {
                bar_expect(bar, codes_bytes(F));
                for (int b = 0; b < LARGE_BANDS; b++) {
                    const int32_t last = a->w.n_band - 1, band = t.band0 + b < last ? t.band0 + b : last;
                    copy_bulk(to + b * BAND_BYTES, t.pack + ((int64_t)band * n_seg + seg) * BAND_BYTES, BAND_BYTES,
                              bar);
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const uint4 p = v[half][i];
                    asm volatile(
                        "st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + at + half * (WIDE_ROWS * 128) + i * 2048),
                        "r"(p.x), "r"(p.y), "r"(p.z), "r"(p.w)
                        : "memory");
                }
                if (seg + 1 < n_seg)
#pragma unroll
                    for (int i = 0; i < 8; i++) large_l2(&v[half][i], x + row[i] * a->ldx + half * 64, row[i] >= 0);
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            bar_arrive(bar);
            if (++slot == N) slot = 0, parity ^= 1;
        }
    }
}

template <cu_format F>
__global__ void __launch_bounds__(WIDE_THREADS, 1) large_wide(const __grid_constant__ large_args a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(8) uint64_t bars[2 * 4];
    constexpr int N = wide_slots(F), SLOT = slot_bytes(F, WIDE_ROWS), GROUP = large_group_bytes(F);
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    const uint32_t n_tile = (uint32_t)a.n_tile_out * (uint32_t)a.n_tile_row;
    const uint32_t memory_at = (uint32_t)__cvta_generic_to_shared(memory), skip = -memory_at & 1023;
    const uint32_t ring_at = memory_at + skip, full = (uint32_t)__cvta_generic_to_shared(bars), empty = full + 4 * 8;
    unsigned char *ring = memory + skip;

    if (threadIdx.x == 0) {
        for (int i = 0; i < N; i++) {
            bar_init(full + i * 8, 128); /* the threads of warpgroup 2; and the bytes that come by themselves */
            bar_init(empty + i * 8, 8);  /* the warps of the others */
        }
        bar_init_end();
    }
    __syncthreads();
    asm volatile("griddepcontrol.wait;" ::: "memory");

    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
        wide_fill<F>(&a, n_tile, ring_at, full, empty, thread);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
        const int warp = thread / 32, lane = thread % 32, in_tile = warp * 2 + group;
        float *swap = (float *)(ring + N * SLOT);
        const int32_t n_seg = a.w.n_seg;
        int slot = 0;
        uint32_t parity = 0;
        if (group == 1) wide_your_turn(group);
        for (uint32_t index = blockIdx.x; index < n_tile; index += gridDim.x) {
            large_tile t;
            if (!large_find(&a, index, WIDE_ROWS, &t)) continue;
            const int32_t band = t.band0 + in_tile, band_read = band < a.w.n_band ? band : a.w.n_band - 1;
            float acc[64] = {}, total[64] = {};
            uint32_t code[2][4][4];
            bar_wait(full + slot * 8, parity);
            wide_codes<F>(code[0], ring + slot * SLOT + in_tile * 2 * GROUP, lane);
            for (int32_t seg = 0; seg < n_seg; seg++) {
                const uint32_t x = ring_at + slot * SLOT + codes_bytes(F), left = empty + slot * 8;
                float scale = 0.0f;
                if (F == CU_F8) scale = __ldg(t.scale + (int64_t)band_read * n_seg + seg);
                wide_hold(acc);
                wide_my_turn(group);
                wide_fence();
                wide_group(acc, code[0], x, true);
                wide_commit();
                wide_codes<F>(code[1], ring + slot * SLOT + (in_tile * 2 + 1) * GROUP, lane);
                wide_fence();
                wide_group(acc, code[1], x + WIDE_ROWS * 128, false);
                wide_commit();
                wide_your_turn(group);
                wide_wait<1>();
                wide_hold_codes(code[0]);
                if (++slot == N) slot = 0, parity ^= 1;
                if (seg + 1 < n_seg) {
                    bar_wait(full + slot * 8, parity);
                    wide_codes<F>(code[0], ring + slot * SLOT + in_tile * 2 * GROUP, lane);
                }
                wide_wait<0>();
                wide_hold(acc);
                wide_hold_codes(code[1]);
                __syncwarp();
                if (lane == 0) bar_arrive(left);
#pragma unroll
                for (int i = 0; i < 64; i++)
                    total[i] = F == CU_F8 ? __fmaf_rn(scale, acc[i], total[i]) : __fadd_rn(total[i], acc[i]);
            }
            if (F == CU_I8 || F == CU_I4) {
                const float s0 = t.scale[band_read * CU_BAND + lane / 4],
                            s8 = t.scale[band_read * CU_BAND + lane / 4 + 8];
#pragma unroll
                for (int i = 0; i < 64; i++) total[i] = __fmul_rn(total[i], i & 2 ? s8 : s0);
            }
            if (a.epilogue != CU_SWIGLU) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float old[16];
                    large_old<4>(old, &a, &t, band, t.row + i * 32, lane);
                    large_put<4>(&a, &t, total + i * 16, old, band, t.row + i * 32, lane);
                }
                continue;
            }
            /* The same thread of both groups has gate and up of the same outputs: group 0 ends rows 0..63. */
            float *mine = swap + group * 32 * 128 + thread, *other = swap + (1 - group) * 32 * 128 + thread, got[32];
#pragma unroll
            for (int i = 0; i < 32; i++) mine[i * 128] = group ? total[i] : total[32 + i];
            asm volatile("bar.sync 1, 256;" ::: "memory");
#pragma unroll
            for (int i = 0; i < 32; i++) got[i] = other[i * 128];
            asm volatile("bar.sync 1, 256;" ::: "memory"); /* before the next tile's sums come */
            if (group == 0) {
#pragma unroll
                for (int i = 0; i < 8; i++)
                    large_put_swiglu(&a, &t, total + i * 4, got + i * 4, band / 2, t.row + i * 8, lane);
            } else {
#pragma unroll
                for (int i = 0; i < 8; i++)
                    large_put_swiglu(&a, &t, got + i * 4, total + 32 + i * 4, band / 2, t.row + 64 + i * 8, lane);
            }
        }
        if (group == 0) wide_my_turn(group); /* the last one that the other gave */
    }
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

/* Let a kernel have so much shared memory, once a device: bit d of *ready says that device d knows. */
static cudaError_t shared_bytes(uint64_t *ready, const void *kernel, int bytes) {
    int device;
    cudaError_t e = cudaGetDevice(&device);
    if (e != cudaSuccess || *ready >> device & 1) return e;
    e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e == cudaSuccess) *ready |= 1ull << device;
    return e;
}

template <cu_format F> static cudaError_t launch_wide(cudaStream_t s, const large_args *a, int n_core) {
    static uint64_t ready;
    constexpr int BYTES = wide_bytes(F);
    cudaError_t e = shared_bytes(&ready, (const void *)large_wide<F>, BYTES);
    if (e != cudaSuccess) return e;
    const int64_t n_tile = (int64_t)a->n_tile_out * a->n_tile_row;
    if (n_tile > INT32_MAX) return cudaErrorInvalidValue;
    if (n_tile > 0) large_wide<F><<<(unsigned)(n_tile < n_core ? n_tile : n_core), WIDE_THREADS, BYTES, s>>>(*a);
    return cudaGetLastError();
}

static cudaError_t n_core_get(int *n) {
    static int n_core; /* multiprocessors */
    cudaError_t e = cudaSuccess;
    if (!n_core) {
        int device;
        e = cudaGetDevice(&device);
        if (e == cudaSuccess) e = cudaDeviceGetAttribute(&n_core, cudaDevAttrMultiProcessorCount, device);
    }
    *n = n_core;
    return e;
}

static cudaError_t launch_any(cudaStream_t s, large_args *a) {
    int n_core;
    cudaError_t e = n_core_get(&n_core);
    if (e != cudaSuccess) return e;
    if (!large_sound(a)) return cudaErrorInvalidValue;
    a->tile_bands = LARGE_BANDS;
    a->n_tile_out = (a->w.n_band + LARGE_BANDS - 1) / LARGE_BANDS;
    switch (a->w.format) {
    case CU_BF16: return launch_wide<CU_BF16>(s, a, n_core);
    case CU_I8: return launch_wide<CU_I8>(s, a, n_core);
    case CU_I4: return launch_wide<CU_I4>(s, a, n_core);
    case CU_F8: return launch_wide<CU_F8>(s, a, n_core);
    }
    return cudaErrorInvalidValue;
}

cudaError_t cu_large_run(cudaStream_t s, const cu_job *j) {
    if (j->x_f32) return cudaErrorInvalidValue;
    large_args a = large_plain(j);
    a.n_tile_row = (a.n_row + WIDE_ROWS - 1) / WIDE_ROWS;
    return launch_any(s, &a);
}

cudaError_t cu_large_grouped(cudaStream_t s, const cu_grouped_job *j) {
    if (j->routes->tile_rows != WIDE_ROWS) return cudaErrorInvalidValue;
    large_args a = large_experts(j);
    return launch_any(s, &a);
}
