/* Linears of 1..8 rows and very many outputs, which is the head: a warp takes bands for itself, all segments of one
 * after the other, so that sums stay in registers and nobody waits for anybody. The sums are those of cu_skinny.cu,
 * whose ring, units and x this shares; there a block has a band and all its warps meet at its end, which costs as much
 * time as 5 MB of reading and is hidden by longer units only. */
#include "backend/cuda/cu_skinny_kernel.cuh"

enum {
    WARPS = 8,
    BLOCKS = 3,                                    /* of a multiprocessor */
    SHARED_MAX = 228 * 1024 / BLOCKS - 1024 - 512, /* of a block */
};

/* total = segment + total, segment by segment. */
template <cu_format F>
static __device__ __forceinline__ void tall_add(float total[4], const float acc[4], const unsigned char *slot) {
    const float by = F == CU_F8 ? *(const float *)(slot + skinny_shape<F>::UNIT) : 1.0f;
#pragma unroll
    for (int k = 0; k < 4; k++) total[k] = F == CU_F8 ? __fmaf_rn(by, acc[k], total[k]) : __fadd_rn(acc[k], total[k]);
}

/* shared: ring [warp][DEPTH][SLOT] | x [segment][4][xl] uint4. Bands are dealt to blocks before warps, so that the last
 * ones lie on many multiprocessors. */
template <cu_format F>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS) tall_kernel(const __grid_constant__ skinny_args a) {
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
    skinny_walk walk = {a.pack + lane * 16, a.scale, a.n_seg, a.n_job, step, 0, a.n_seg, 0, 1, first, 0};
#pragma unroll
    for (int d = 0; d < shape::DEPTH; d++) skinny_ask<F>(&walk, ring_at + d * shape::SLOT, lane);
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
    for (int32_t band = first; band < a.n_job; band += step) {
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
                skinny_ask<F>(&walk, ring_at + depth * shape::SLOT, lane);
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

static size_t shared_bytes(const cu_job *j) {
    const size_t ring[CU_PLAIN_FORMATS] = {ring_bytes<CU_BF16>(), ring_bytes<CU_I8>(), ring_bytes<CU_I4>(),
                                           ring_bytes<CU_F8>()};
    const int32_t n_round = (j->w.n_seg + WARPS - 1) / WARPS; /* the last one's places may be empty */
    return ring[j->w.format] + (size_t)n_round * WARPS * (size_t)j->n_row * 256;
}

cudaError_t cu_tall_run(cudaStream_t s, const cu_job *j, bool *took) {
    static uint64_t ready[CU_PLAIN_FORMATS];
    int32_t n_core;
    const size_t bytes = shared_bytes(j);
    cudaError_t e = cu_core_count(&n_core);
    *took = false;
    if (e != cudaSuccess) return e;
    if (j->n_row < 1 || j->n_row > CU_SKINNY_MAX || j->epilogue != CU_STORE || j->w.pairs || bytes > SHARED_MAX ||
        j->w.n_band < n_core * BLOCKS * WARPS)
        return cudaSuccess;
    *took = true;
    e = cu_shared_bytes(&ready[j->w.format], kernels[j->w.format], SHARED_MAX);
    if (e != cudaSuccess) return e;
    skinny_args a = skinny_plain(j);
    a.n_round = (a.n_seg + WARPS - 1) / WARPS;
    void *args[] = {&a};
    return cu_launch(s, kernels[j->w.format], dim3((unsigned)(n_core * BLOCKS)), WARPS * 32, bytes, !j->alone, 1, args);
}
