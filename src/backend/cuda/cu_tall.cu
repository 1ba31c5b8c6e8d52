/* Linears of 1..8 rows and very many outputs, which is the head: a warp takes bands for itself, all segments of one
 * after the other, so that sums stay in registers and nobody waits for anybody. The sums are those of cu_skinny.cu,
 * whose ring, units and x this shares; there a block has a band and all its warps meet at its end, which costs as much
 * time as 5 MB of reading and is hidden by longer units only. The bands that are left when all warps have had the same
 * number go the other way, a block each: a warp alone asks for too little at once, and all others would be done. */
#include "backend/cuda/cu_skinny_kernel.cuh"

enum {
    WARPS = 8,
    BLOCKS = 3,     /* of a multiprocessor */
    BLOCKS_FEW = 2, /* the same where x is larger */
};

/* total = segment + total, segment by segment. */
template <cu_format F>
static __device__ __forceinline__ void tall_add(float total[4], const float acc[4], const unsigned char *slot) {
    const float by = F == CU_F8 ? *(const float *)(slot + skinny_shape<F>::UNIT) : 1.0f;
#pragma unroll
    for (int k = 0; k < 4; k++) total[k] = F == CU_F8 ? __fmaf_rn(by, acc[k], total[k]) : __fadd_rn(acc[k], total[k]);
}

/* The unit that a warp asks for next: segment `seg` of a band. step: to the next segment: 1 of bands of its own, WARPS
 * of shared ones. */
typedef struct tall_walk {
    int32_t band, seg, step;
} tall_walk;

/* Ask for it; a group of copies is closed each time, with or without any. n_alone: bands that warps have for
 * themselves. */
template <cu_format F>
static __device__ __forceinline__ void tall_ask(tall_walk *k, const skinny_args *a, int32_t n_alone, uint32_t slot,
                                                int warp, int lane) {
    if (k->band < a->n_job) {
        skinny_ask_unit<F, true>(a->pack + lane * 16, a->scale, k->band * a->n_seg + k->seg, slot, lane);
        k->seg += k->step;
        if (k->seg >= a->n_seg) {
            const bool alone = k->step == 1;
            k->band += (int32_t)gridDim.x * (alone ? WARPS : 1);
            k->seg = alone ? 0 : warp;
            if (alone && k->band >= n_alone) {
                k->band = warp < a->n_seg ? n_alone + (int32_t)blockIdx.x : a->n_job;
                k->seg = warp;
                k->step = WARPS;
            }
        }
    }
    skinny_commit();
}

/* shared: ring [warp][DEPTH][SLOT] | x [segment][4][xl] uint4 | of shared bands part [segment][n_row][16] f32
 *         | scale [segment] f32 (fp8)
 * Bands are dealt to blocks before warps, so that the last ones lie on many multiprocessors. */
template <cu_format F>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    tall_kernel(const __grid_constant__ skinny_args a, const int32_t n_alone) {
    typedef skinny_shape<F> shape;
    constexpr int SIDE = F == CU_BF16 ? 1 : 2; /* units at once, as in skinny_kernel */
    extern __shared__ uint4 tall_memory[];
    __shared__ int32_t row[CU_SKINNY_MAX];
    __shared__ float row_scale[CU_SKINNY_MAX];
    const int thread = threadIdx.x, lane = thread & 31, warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    const int g = lane / 4, c = lane % 4;
    const int32_t n_row = a.n_row, first = warp * gridDim.x + blockIdx.x, step = gridDim.x * WARPS;
    unsigned char *const ring = (unsigned char *)tall_memory + warp * (shape::DEPTH * shape::SLOT);
    const uint32_t ring_at = skinny_shared(ring);
    const int xl = 4 * n_row, x_warp = 4 * xl;
    uint4 *const xs = (uint4 *)((unsigned char *)tall_memory + WARPS * (shape::DEPTH * shape::SLOT));

    cu_launch_next();
    tall_walk walk = {first, 0, 1};
#pragma unroll
    for (int d = 0; d < shape::DEPTH; d++) tall_ask<F>(&walk, &a, n_alone, ring_at + d * shape::SLOT, warp, lane);
    if (thread < n_row) row[thread] = thread;
    __syncthreads();
    cu_wait_previous();
    if (!a.x_f32)
        skinny_x_load(xs + warp * x_warp, &a, row, n_row, warp, WARPS, WARPS * x_warp, xl, lane);
    else if (a.norm_wide)
        skinny_x_norm(xs + warp * x_warp, row_scale, &a, row, n_row, warp, WARPS, warp, WARPS, WARPS * x_warp, xl,
                      lane);
    else
        skinny_x_norm_narrow(xs, row_scale, &a, {WARPS, WARPS, 0, x_warp, WARPS * x_warp, xl}, row, n_row);
    __syncthreads();

    const uint4 *const x = xs + lane;
    int depth = 0;
    for (int32_t band = first; band < n_alone; band += step) {
        float total[4] = {0.0f, 0.0f, 0.0f, 0.0f}, by[2] = {1.0f, 1.0f};
        if (F == CU_I8 || F == CU_I4) {
            by[0] = a.scale[band * CU_BAND + g];
            by[1] = a.scale[band * CU_BAND + g + 8];
        }
        for (int32_t seg = 0; seg < a.n_seg;) {
            int done = 1;
            if (SIDE == 2 && seg + 1 < a.n_seg) {
                const int next = depth + 1 == shape::DEPTH ? 0 : depth + 1;
                const unsigned char *const unit[2] = {ring + depth * shape::SLOT, ring + next * shape::SLOT};
                const unsigned char *const slot[2] = {unit[0] + lane * 16, unit[1] + lane * 16};
                const uint4 *const at[2] = {x + seg * x_warp, x + (seg + 1) * x_warp};
                float acc[2][4];
                done = 2;
                skinny_wait<shape::DEPTH - 2>();
                __syncwarp();
                skinny_two<F>(acc, slot, at, xl, g < n_row);
                tall_add<F>(total, acc[0], unit[0]);
                tall_add<F>(total, acc[1], unit[1]);
            } else {
                const unsigned char *const unit = ring + depth * shape::SLOT;
                float acc[4];
                skinny_wait<shape::DEPTH - 1>();
                __syncwarp();
                skinny_segment<F>(acc, unit + lane * 16, x + seg * x_warp, xl, g < n_row);
                tall_add<F>(total, acc, unit);
            }
            if (F == CU_F8) __syncwarp(); /* the scale was copied by one lane, and is about to be again */
            for (int k = 0; k < done; k++) {
                tall_ask<F>(&walk, &a, n_alone, ring_at + depth * shape::SLOT, warp, lane);
                depth = depth + 1 == shape::DEPTH ? 0 : depth + 1;
            }
            seg += done;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) { /* outputs g, g, g + 8, g + 8 of rows 2c, 2c + 1, 2c, 2c + 1 */
            const int32_t r = 2 * c + k % 2, out = band * CU_BAND + g + k / 2 * 8;
            if (r < n_row && out < a.n_out)
                a.y[r * a.ldy + out] = F == CU_I8 || F == CU_I4 ? __fmul_rn(total[k], by[k / 2]) : total[k];
        }
    }

    const int r = thread / CU_BAND, o = thread % CU_BAND, part_size = n_row * CU_BAND;
    float *const part = (float *)(xs + a.n_seg * x_warp), *const part_scale = part + a.n_seg * part_size;
    for (int32_t band = n_alone + blockIdx.x; band < a.n_job; band += gridDim.x) {
        const int32_t out = band * CU_BAND + o;
        float by = 1.0f, total = 0.0f;
        if ((F == CU_I8 || F == CU_I4) && r < n_row) by = a.scale[out];
        for (int32_t seg = warp; seg < a.n_seg; seg += WARPS) {
            const unsigned char *const unit = ring + depth * shape::SLOT;
            float acc[4];
            skinny_wait<shape::DEPTH - 1>();
            __syncwarp();
            skinny_segment<F>(acc, unit + lane * 16, x + seg * x_warp, xl, g < n_row);
            skinny_put(part + seg * part_size, acc, n_row, g, c);
            if (F == CU_F8 && lane == 0) part_scale[seg] = *(const float *)(unit + shape::UNIT);
            tall_ask<F>(&walk, &a, n_alone, ring_at + depth * shape::SLOT, warp, lane);
            depth = depth + 1 == shape::DEPTH ? 0 : depth + 1;
        }
        __syncthreads();
        if (r < n_row) {
            const float *p = part + skinny_part_at(r, o);
#pragma unroll 4
            for (int32_t seg = 0; seg < a.n_seg; seg++, p += part_size)
                total = F == CU_F8 ? __fmaf_rn(part_scale[seg], *p, total) : __fadd_rn(*p, total);
            if (out < a.n_out) a.y[r * a.ldy + out] = F == CU_I8 || F == CU_I4 ? __fmul_rn(total, by) : total;
        }
        __syncthreads(); /* before the next band's are put there */
    }
}

static const void *const kernels[CU_PLAIN_FORMATS] = {
    (const void *)tall_kernel<CU_BF16>,
    (const void *)tall_kernel<CU_I8>,
    (const void *)tall_kernel<CU_I4>,
    (const void *)tall_kernel<CU_F8>,
};
template <cu_format F> static constexpr size_t ring_bytes(void) {
    return (size_t)WARPS * skinny_shape<F>::DEPTH * skinny_shape<F>::SLOT;
}

/* Of a block, where n share a multiprocessor. */
static size_t shared_most(int n) { return (size_t)(228 * 1024 / n - 1024 - 512); }

cudaError_t cu_tall_run(cudaStream_t s, const cu_job *j, bool *took) {
    static uint64_t ready[CU_PLAIN_FORMATS];
    static const size_t ring[CU_PLAIN_FORMATS] = {ring_bytes<CU_BF16>(), ring_bytes<CU_I8>(), ring_bytes<CU_I4>(),
                                                  ring_bytes<CU_F8>()};
    int32_t n_core;
    cudaError_t e = cu_core_count(&n_core);
    *took = false;
    if (e != cudaSuccess) return e;
    if (j->n_row < 1 || j->n_row > CU_SKINNY_MAX || j->epilogue != CU_STORE || j->w.pairs ||
        j->w.n_band < n_core * BLOCKS * WARPS)
        return cudaSuccess;
    const size_t x = (size_t)j->w.n_seg * (size_t)j->n_row * 256;
    const size_t part = (size_t)j->w.n_seg * (size_t)(j->n_row * CU_BAND + (j->w.format == CU_F8)) * sizeof(float);
    size_t bytes = ring[j->w.format] + x + part;
    const int n_block = bytes <= shared_most(BLOCKS) ? BLOCKS : BLOCKS_FEW;
    const bool shares = bytes <= shared_most(n_block); /* not 8 rows of 2560 numbers */
    if (!shares) bytes -= part;
    if (bytes > shared_most(n_block)) return cudaSuccess;
    *took = true;
    e = cu_shared_bytes(&ready[j->w.format], kernels[j->w.format], (int)shared_most(BLOCKS_FEW));
    if (e != cudaSuccess) return e;
    skinny_args a = skinny_plain(j);
    a.n_round = (a.n_seg + WARPS - 1) / WARPS;
    int32_t n_alone = shares ? a.n_job / (n_core * n_block * WARPS) * (n_core * n_block * WARPS) : a.n_job;
    void *args[] = {&a, &n_alone};
    return cu_launch(s, kernels[j->w.format], dim3((unsigned)(n_core * n_block)), WARPS * 32, bytes, !j->alone, 1,
                     args);
}
