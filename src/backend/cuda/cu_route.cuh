/* The router of one row, as all kernels that route compute it: the order of these sums is part of the promise of
 * cu_moe.cu. Device code only; included by *.cu. */
#ifndef ERN_BACKEND_CUDA_CU_ROUTE_CUH
#define ERN_BACKEND_CUDA_CU_ROUTE_CUH

#include "backend/cuda/cu_device.cuh"

enum { PARTS = 4, SLICES = 8 };

static __host__ __device__ __forceinline__ int32_t part_columns(int32_t n_hidden) {
    return (n_hidden + 32 * PARTS - 1) / (32 * PARTS) * 32;
}

static __device__ __forceinline__ float4 zero4(void) { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }
static __device__ __forceinline__ float4 times(float4 x, uint2 w) { /* w: four bf16, the first in the lowest bits */
    return make_float4(__fmul_rn(x.x, __uint_as_float(w.x << 16)), __fmul_rn(x.y, __uint_as_float(w.x & 0xffff0000u)),
                       __fmul_rn(x.z, __uint_as_float(w.y << 16)), __fmul_rn(x.w, __uint_as_float(w.y & 0xffff0000u)));
}
static __device__ __forceinline__ float add_products(float4 a, float4 b, float sum) {
    sum = __fmaf_rn(a.x, b.x, sum);
    sum = __fmaf_rn(a.y, b.y, sum);
    sum = __fmaf_rn(a.z, b.z, sum);
    return __fmaf_rn(a.w, b.w, sum);
}
/* The tree over slices, lanes 8 i .. 8 i + 7. */
static __device__ __forceinline__ float slices_sum(float v) {
    for (int d = SLICES / 2; d > 0; d >>= 1) v = __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, d));
    return v;
}
/* Lane 8 part + slice holds its share: the whole sum, in every lane. */
static __device__ __forceinline__ float parts_sum(float v) {
    v = slices_sum(v);
    float sum = 0.0f;
#pragma unroll
    for (int p = 0; p < PARTS; p++) sum = __fadd_rn(sum, __shfl_sync(0xffffffffu, v, p * SLICES));
    return sum;
}

/* The router's rows do not depend on the step, and their way from memory is longer than all the work here. */
static __device__ __forceinline__ void route_prefetch(const float *w, int32_t n, int lane) {
    for (int32_t i = lane * 32; i < n; i += 1024) asm volatile("prefetch.global.L2 [%0];" ::"l"(w + i));
}

/* A warp: the logits of one expert for ROWS rows, in every lane; BATCH loads of 16 bytes of each in flight. */
template <int ROWS, int BATCH>
static __device__ __forceinline__ void route_logits(float out[ROWS], const float *const x_row[ROWS], const float *w,
                                                    const cu_bf16 *norm_w, int32_t D, float eps) {
    const int lane = threadIdx.x & 31;
    const int32_t part = part_columns(D), first = lane / SLICES * part;
    const int32_t end = first + part < D ? first + part : D;
    const uint32_t zero = cu_hidden_zero(D);
    float sum[ROWS], square[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) sum[r] = square[r] = 0.0f;
    for (int32_t from = 0; from < part; from += 32 * BATCH) { /* all lanes take all steps */
        float4 a[BATCH], x[ROWS][BATCH];
        uint2 norm[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            const int32_t i = first + from + k * 32 + lane % SLICES * 4;
            norm[k] = *(const uint2 *)(norm_w + (i < end ? i : 0)); /* beyond the end x is zero */
            a[k] = cu_load4(w, i, end);
#pragma unroll
            for (int r = 0; r < ROWS; r++) x[r][k] = cu_load4(x_row[r], i, end);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            square[r] = cu_after(square[r], x[r], BATCH, zero);
            sum[r] = cu_after(sum[r], a, BATCH, zero);
        }
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                square[r] = cu_add_squares(x[r][k], square[r]);
                sum[r] = add_products(times(x[r][k], norm[k]), a[k], sum[r]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float scale = cu_norm_scale(parts_sum(square[r]), D, eps);
        out[r] = __fmul_rn(parts_sum(sum[r]), scale);
    }
}

/* Numbers in the order of floats, NaN somewhere, never 0. */
static __device__ __forceinline__ uint32_t rank_key(float f) {
    const uint32_t bits = __float_as_uint(f), key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return key > 0u ? key : 1u;
}

/* M rows by one warp, from their logits: softmax, the K best of prob + bias, shares. Lane l has experts l + 32 q,
 * q < Q. Lane r < K gets the expert of rank r, and its share. */
template <int M, int Q>
static __device__ __forceinline__ void choose_rows(int32_t mine[M], float share[M], const float logit[M][Q],
                                                   const float *bias, float norm_min, int32_t E, int32_t K) {
    const int lane = threadIdx.x & 31;
    float prob[M][Q], top[M], sum[M], mine_prob[M], chosen_sum[M];
    uint32_t key[M][Q];
#pragma unroll
    for (int m = 0; m < M; m++) {
        top[m] = -INFINITY;
        sum[m] = mine_prob[m] = chosen_sum[m] = 0.0f;
        mine[m] = 0;
#pragma unroll
        for (int q = 0; q < Q; q++) {
            prob[m][q] = lane + 32 * q < E ? logit[m][q] : -INFINITY;
            top[m] = fmaxf(top[m], prob[m][q]);
        }
    }
#pragma unroll
    for (int d = 16; d > 0; d >>= 1)
#pragma unroll
        for (int m = 0; m < M; m++) top[m] = fmaxf(top[m], __shfl_xor_sync(0xffffffffu, top[m], d));
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int q = 0; q < Q; q++) {
            prob[m][q] = lane + 32 * q < E ? expf(__fsub_rn(prob[m][q], top[m])) : 0.0f;
            sum[m] = __fadd_rn(sum[m], prob[m][q]);
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++) sum[m] = cu_warp_sum(sum[m]);
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int q = 0; q < Q; q++) {
            const int32_t e = lane + 32 * q;
            prob[m][q] = __fdiv_rn(prob[m][q], sum[m]);
            /* 0: not to be chosen */
            key[m][q] = e < E ? rank_key(bias ? __fadd_rn(prob[m][q], bias[e]) : prob[m][q]) : 0u;
        }
    }
#pragma unroll 1
    for (int32_t rank = 0; rank < K; rank++) {
#pragma unroll
        for (int m = 0; m < M; m++) {
            uint32_t best = 0u, best_id = 0xffffffffu;
#pragma unroll
            for (int q = 0; q < Q; q++) best = key[m][q] > best ? key[m][q] : best;
            best = __reduce_max_sync(0xffffffffu, best);
            if constexpr (Q <= 2) { /* one after the other takes most of the time: a vote is quick */
#pragma unroll
                for (int q = Q - 1; q >= 0; q--) {
                    const uint32_t has = __ballot_sync(0xffffffffu, key[m][q] == best);
                    best_id = has ? (uint32_t)(32 * q + __ffs((int)has) - 1) : best_id;
                }
            } else {
#pragma unroll
                for (int q = Q - 1; q >= 0; q--)
                    if (key[m][q] == best) best_id = (uint32_t)(lane + 32 * q);
                best_id = __reduce_min_sync(0xffffffffu, best_id);
            }
#pragma unroll
            for (int q = 0; q < Q; q++) key[m][q] = best_id == (uint32_t)(lane + 32 * q) ? 0u : key[m][q];
            if (lane == rank) mine[m] = (int32_t)best_id;
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int q = 0; q < Q; q++) {
            const float p = __shfl_sync(0xffffffffu, prob[m][q], mine[m] % 32);
            mine_prob[m] = mine[m] / 32 == q ? p : mine_prob[m];
        }
#pragma unroll 1
    for (int32_t rank = 0; rank < K; rank++)
#pragma unroll
        for (int m = 0; m < M; m++)
            chosen_sum[m] = __fadd_rn(chosen_sum[m], __shfl_sync(0xffffffffu, mine_prob[m], rank));
#pragma unroll
    for (int m = 0; m < M; m++) share[m] = __fdiv_rn(mine_prob[m], chosen_sum[m] < norm_min ? norm_min : chosen_sum[m]);
}
template <int Q>
static __device__ __forceinline__ int32_t choose_row(float *share, const float logit[Q], const float *bias,
                                                     float norm_min, int32_t E, int32_t K) {
    int32_t mine;
    choose_rows<1, Q>(&mine, share, (const float(*)[Q])logit, bias, norm_min, E, K);
    return mine;
}

/* cu_route_few of one row (cu_route_one.cu): *took says whether this was one for it. */
cudaError_t cu_route_one_run(cudaStream_t s, const cu_route_job *j, const cu_routes *r, const cu_x8 *out,
                             cu_codes codes, cu_bf16 *xn, bool *took);

#endif
