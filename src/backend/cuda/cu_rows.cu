/* Kernels that take a row at a time: embedding, RMS norm (and its codes), some of the rows, the input of the
 * multi-token-prediction layer.
 *
 * A norm is one warp's work, whatever the launch: its sum is cu_sum_squares of cu_device.cuh, the same that the linears
 * with a norm in front call, so both give the same bits. Rows of up to 2560 numbers stay in registers between the sum
 * and the product; longer ones, and rows that 16-byte loads cannot take, are read twice.
 * Rows of x, of the weights and of the outputs start at multiples of 16 bytes where n_hidden is a multiple of 4 (8
 * bytes for bf16): what cudaMalloc gives. Nothing beyond n_hidden numbers of a bf16 row is written; codes
 * fill whole segments. */
#include "backend/cuda/cu_a8_device.cuh"
#include "backend/cuda/cu_launch.cuh"

enum { EMBED_THREADS = 128, NORM_WARPS = 4, FEW_ROWS = 256 };

/* A norm's weights do not depend on the step: they are on their way while the kernel before ends. */
static __device__ __forceinline__ void prefetch_weights(const cu_bf16 *w, int32_t n) {
    for (int32_t i = (threadIdx.x & 31) * 64; i < n; i += 2048) asm volatile("prefetch.global.L2 [%0];" ::"l"(w + i));
}

static __device__ __forceinline__ float load1(const float *x) { return *x; }
static __device__ __forceinline__ float load1(const cu_bf16 *x) { return cu_f32(*x); }
static __device__ __forceinline__ float4 load4(const float *x) { return *(const float4 *)x; }
static __device__ __forceinline__ float4 load4(const cu_bf16 *x) {
    const uint2 v = *(const uint2 *)x; /* four numbers, the first in the lowest bits */
    return make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u), __uint_as_float(v.y << 16),
                       __uint_as_float(v.y & 0xffff0000u));
}

/* ---- norm ---------------------------------------------------------------------------------------------------------
 */

/* w: bits of four weights, loaded beforehand: the compiler may not move a load of w over a store. */
static __device__ __forceinline__ uint2 normed4(float4 v, float scale, uint2 w) {
    return make_uint2(
        cu_round2(cu_normed(v.x, scale, (cu_bf16)(w.x & 0xffffu)), cu_normed(v.y, scale, (cu_bf16)(w.x >> 16))),
        cu_round2(cu_normed(v.z, scale, (cu_bf16)(w.y & 0xffffu)), cu_normed(v.w, scale, (cu_bf16)(w.y >> 16))));
}

/* The sum of a row that is f32, or widened from bf16: one order for both. */
static __device__ __forceinline__ float row_squares(const float *x, int32_t n) { return cu_sum_squares(x, n); }
static __device__ __forceinline__ float row_squares(const cu_bf16 *x, int32_t n) {
    float sum = 0.0f;
    for (int32_t i = (threadIdx.x & 31) * 4; i < n; i += 128)
        for (int32_t k = i; k < i + 4 && k < n; k++) sum = __fmaf_rn(cu_f32(x[k]), cu_f32(x[k]), sum);
    return cu_warp_sum(sum);
}

/* One row by one warp, which n numbers, a multiple of 4 and at most 128 HELD, make: to[k]: numbers 128 k + 4 lane ...
 * of bf16(norm of x). All loads are in flight at once. */
template <int HELD, typename T>
static __device__ __forceinline__ void norm_held(uint2 to[HELD], const T *x, const cu_bf16 *w, int32_t n, float eps) {
    const int32_t first = (threadIdx.x & 31) * 4;
    float4 v[HELD];
    uint2 bits[HELD];
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        v[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (first + k * 128 < n) v[k] = load4(x + first + k * 128);
    }
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        bits[k] = make_uint2(0u, 0u);
        if (first + k * 128 < n) bits[k] = *(const uint2 *)(w + first + k * 128);
    }
#pragma unroll
    for (int k = 0; k < HELD; k++) sum = cu_add_squares(v[k], sum);
    const float scale = cu_norm_scale(cu_warp_sum(sum), n, eps);
#pragma unroll
    for (int k = 0; k < HELD; k++) to[k] = normed4(v[k], scale, bits[k]);
}

/* One row by one warp: out [n] = bf16(norm of x [n]). HELD > 0: norm_held. HELD == 0: any n, read twice. */
template <int HELD, typename T>
static __device__ __forceinline__ void norm_row(cu_bf16 *out, const T *x, const cu_bf16 *w, int32_t n, float eps) {
    const int32_t first = (threadIdx.x & 31) * 4;
    if constexpr (HELD > 0) {
        uint2 to[HELD];
        norm_held<HELD>(to, x, w, n, eps);
#pragma unroll
        for (int k = 0; k < HELD; k++)
            if (first + k * 128 < n) *(uint2 *)(out + first + k * 128) = to[k];
        return;
    }
    const float scale = cu_norm_scale(row_squares(x, n), n, eps);
    if ((n & 3) == 0) {
        for (int32_t i = first; i < n; i += 512) {
            float4 v[4];
            uint2 bits[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (i + k * 128 >= n) continue;
                v[k] = load4(x + i + k * 128);
                bits[k] = *(const uint2 *)(w + i + k * 128);
            }
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (i + k * 128 < n) *(uint2 *)(out + i + k * 128) = normed4(v[k], scale, bits[k]);
        }
    } else {
        for (int32_t i = threadIdx.x & 31; i < n; i += 32) out[i] = cu_round(cu_normed(load1(x + i), scale, w[i]));
    }
}

/* The least HELD of those compiled that holds a row; 0: none. */
static int held(int32_t n) { return !cu_norm_holds(n) ? 0 : n <= 1024 ? 8 : 20; }

template <int HELD>
static __global__ void __launch_bounds__(32 * NORM_WARPS)
    norm_kernel(cu_bf16 *out, const float *x, const int32_t *rows, const cu_bf16 *w, int32_t n, int32_t n_hidden,
                float eps) {
    cu_launch_next();
    prefetch_weights(w, n_hidden);
    cu_wait_previous();
    const int32_t i = (int32_t)(blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5));
    if (i >= n) return;
    const int64_t row = rows ? rows[i] : i;
    norm_row<HELD>(out + (int64_t)i * CU_PAD(n_hidden), x + row * n_hidden, w, n_hidden, eps);
}

cudaError_t cu_norm(cudaStream_t s, cu_bf16 *out, const float *x, const int32_t *rows, const cu_bf16 *w, int32_t n,
                    int32_t n_hidden, float eps) {
    if (n <= 0) return cudaSuccess;
    /* few rows: each on a multiprocessor of its own */
    const int warps = n <= FEW_ROWS ? 1 : NORM_WARPS;
    const unsigned blocks = (unsigned)((n + warps - 1) / warps), threads = (unsigned)(32 * warps);
    const int h = held(n_hidden);
    return cu_launch_args(s,
                          h == 8    ? norm_kernel<8>
                          : h == 20 ? norm_kernel<20>
                                    : norm_kernel<0>,
                          blocks, threads, true, out, x, rows, w, n, n_hidden, eps);
}

/* Rows of a norm as j wants them, a warp a row: HELD as norm_row has it. */
template <int HELD, cu_codes C>
static __global__ void __launch_bounds__(32 * NORM_WARPS)
    norm_rows(const cu_norm_job j, const int32_t *entry_place, int32_t n_used, const float *x, int32_t n,
              int32_t n_hidden) {
    cu_launch_next();
    prefetch_weights(j.w, n_hidden);
    cu_wait_previous();
    const int32_t lane = (int32_t)(threadIdx.x & 31), first = lane * 4;
    const int32_t row = (int32_t)(blockIdx.x * NORM_WARPS + (threadIdx.x >> 5));
    if (row >= n) return;
    const int32_t place = j.by_place && lane < n_used ? entry_place[(int64_t)row * n_used + lane] : 0;
    uint2 to[HELD];
    norm_held<HELD>(to, x + (int64_t)row * n_hidden, j.w, n_hidden, j.eps);
    if (j.xn) {
        cu_bf16 *out = j.xn + (int64_t)row * CU_PAD(n_hidden) + first;
#pragma unroll
        for (int q = 0; q < HELD; q++)
            if (first + q * 128 < n_hidden) *(uint2 *)(out + q * 128) = to[q];
    }
    if constexpr (C == CU_CODES_NONE) {
        for (int32_t k = 0; k < n_used; k++) {
            cu_bf16 *out =
                (cu_bf16 *)j.by_place + (int64_t)__shfl_sync(0xffffffffu, place, k) * CU_PAD(n_hidden) + first;
#pragma unroll
            for (int q = 0; q < HELD; q++)
                if (first + q * 128 < n_hidden) *(uint2 *)(out + q * 128) = to[q];
        }
    } else {
        /* lane q finds the factor of segment q */
        uint32_t code[HELD], most = 0;
#pragma unroll
        for (int q = 0; q < HELD; q++) {
            const uint32_t lo = __vmaxu2(to[q].x & 0x7fff7fffu, to[q].y & 0x7fff7fffu); /* magnitudes in their order */
            const uint32_t top = __reduce_max_sync(0xffffffffu, max(lo & 0xffffu, lo >> 16));
            most = lane == q ? top << 16 : most;
        }
        float scale;
        const float factor = a8_factor<C>(&scale, most);
        const int32_t n_seg = CU_PAD(n_hidden) / CU_SEGMENT;
        if (lane < n_seg) j.x8.scale[lane * j.x8.ld_scale + row] = scale;
#pragma unroll
        for (int q = 0; q < HELD; q++) {
            const float f = __shfl_sync(0xffffffffu, factor, q);
            const float v[4] = {__uint_as_float(to[q].x << 16), __uint_as_float(to[q].x & 0xffff0000u),
                                __uint_as_float(to[q].y << 16), __uint_as_float(to[q].y & 0xffff0000u)};
            code[q] = f == 0.0f ? 0 : a8_code4<C>(v, f);
        }
        for (int32_t k = -1; k < n_used; k++) {
            const int32_t at = __shfl_sync(0xffffffffu, place, max(k, 0));
            uint8_t *out =
                (k < 0 ? j.x8.code + row * j.x8.ldx : (uint8_t *)j.by_place + (int64_t)at * CU_PAD(n_hidden)) + first;
#pragma unroll
            for (int q = 0; q < HELD; q++)
                if (q < n_seg) *(uint32_t *)(out + q * 128) = code[q];
        }
    }
}

template <int HELD>
static cudaError_t run_held(cudaStream_t s, const cu_norm_job *j, const float *x, int32_t n, int32_t n_hidden) {
    const cu_routes *r = j->by_place ? j->routes : NULL;
    if (r && (r->n_used > 32 || !cu_norm_spreads(n_hidden))) return cudaErrorInvalidValue;
    return cu_launch_args(s,
                          j->codes == CU_CODES_F8   ? norm_rows<HELD, CU_CODES_F8>
                          : j->codes == CU_CODES_I8 ? norm_rows<HELD, CU_CODES_I8>
                                                    : norm_rows<HELD, CU_CODES_NONE>,
                          (unsigned)((n + NORM_WARPS - 1) / NORM_WARPS), 32 * NORM_WARPS, true, *j,
                          r ? r->entry_place : NULL, r ? r->n_used : 0, x, n, n_hidden);
}

cudaError_t cu_norm_run(cudaStream_t s, const cu_norm_job *j, const float *x, int32_t n, int32_t n_hidden) {
    const int h = held(n_hidden);
    if (n <= 0) return cudaSuccess;
    if (h > 0 && (j->codes != CU_CODES_NONE || j->by_place))
        return h == 8 ? run_held<8>(s, j, x, n, n_hidden) : run_held<20>(s, j, x, n, n_hidden);
    if (!j->xn || j->by_place) return cudaErrorInvalidValue;
    const cudaError_t e = cu_norm(s, j->xn, x, NULL, j->w, n, n_hidden, j->eps);
    if (e != cudaSuccess || j->codes == CU_CODES_NONE) return e;
    return cu_quant_x8(s, &j->x8, j->codes, j->xn, CU_PAD(n_hidden), n, n_hidden);
}

/* ---- embedding ----------------------------------------------------------------------------------------------------
 */

/* A block a row: it alone reads and mends the row's token. */
static __global__ void __launch_bounds__(EMBED_THREADS)
    embed_kernel(float *x, int32_t *token, const int32_t *prev, const cu_bf16 *embed, int32_t n_hidden) {
    cu_launch_next();
    cu_wait_previous();
    const int32_t given = token[blockIdx.x];
    const int32_t id = given < 0 ? prev[-1 - given] : given;
    __syncthreads(); /* all have read */
    if (given < 0 && threadIdx.x == 0) token[blockIdx.x] = id;
    const cu_bf16 *from = embed + (int64_t)id * n_hidden;
    float *to = x + (int64_t)blockIdx.x * n_hidden;
    if ((n_hidden & 3) == 0) {
        const int32_t step = 4 * EMBED_THREADS;
        for (int32_t i = (int32_t)threadIdx.x * 4; i < n_hidden; i += 5 * step) {
            float4 v[5]; /* all loads before the first store: one wait for a row of 2560 */
#pragma unroll
            for (int k = 0; k < 5; k++)
                if (i + k * step < n_hidden) v[k] = load4(from + i + k * step);
#pragma unroll
            for (int k = 0; k < 5; k++)
                if (i + k * step < n_hidden) *(float4 *)(to + i + k * step) = v[k];
        }
    } else {
        for (int32_t i = (int32_t)threadIdx.x; i < n_hidden; i += EMBED_THREADS) to[i] = cu_f32(from[i]);
    }
}

cudaError_t cu_embed(cudaStream_t s, float *x, int32_t *token, const int32_t *prev, const cu_bf16 *embed, int32_t n_row,
                     int32_t n_hidden) {
    if (n_row <= 0) return cudaSuccess;
    /* not early: it ends the step before for all that come after it, and some of those read before they wait */
    embed_kernel<<<(unsigned)n_row, EMBED_THREADS, 0, s>>>(x, token, prev, embed, n_hidden);
    return cudaGetLastError();
}

/* ---- some of the rows --------------------------------------------------------------------------------------------
 */

/* A block a row of so many words. */
static __global__ void __launch_bounds__(EMBED_THREADS)
    take_kernel(uint32_t *out, const uint32_t *x, const int32_t *rows, int32_t n_word) {
    cu_launch_next();
    cu_wait_previous();
    const uint32_t *from = x + (int64_t)rows[blockIdx.x] * n_word;
    uint32_t *to = out + (int64_t)blockIdx.x * n_word;
    if ((n_word & 3) == 0) {
        for (int32_t i = (int32_t)threadIdx.x * 4; i < n_word; i += 4 * EMBED_THREADS)
            *(uint4 *)(to + i) = *(const uint4 *)(from + i);
    } else {
        for (int32_t i = (int32_t)threadIdx.x; i < n_word; i += EMBED_THREADS) to[i] = from[i];
    }
}

cudaError_t cu_take_rows(cudaStream_t s, void *out, const void *x, const int32_t *rows, int32_t n, int32_t row_bytes) {
    if (row_bytes % 4 != 0) return cudaErrorInvalidValue;
    if (n <= 0) return cudaSuccess;
    return cu_launch_args(s, take_kernel, (unsigned)n, EMBED_THREADS, true, (uint32_t *)out, (const uint32_t *)x, rows,
                          row_bytes / 4);
}

/* ---- the input of the multi-token-prediction layer -----------------------------------------------------------------
 */

/* The token after row t: known, sampled at the wanted row t, or 0 (nobody needs that row). */
static __device__ int32_t next_token(int32_t known, int32_t t, const int32_t *want, const int32_t *sampled,
                                     int32_t n_want) {
    if (known >= 0) return known;
    int32_t low = 0, high = n_want; /* the first wanted row that is t or later */
    while (low < high) {
        const int32_t mid = (low + high) / 2;
        if (want[mid] < t)
            low = mid + 1;
        else
            high = mid;
    }
    return low < n_want && want[low] == t ? sampled[low] : 0;
}

/* Two warps a row: z = [norm of the next token's embedding | norm of x]. */
template <int HELD>
static __global__ void __launch_bounds__(64)
    mtp_kernel(cu_bf16 *z, int32_t *next_out, const float *x, const int32_t *next, const int32_t *want,
               const int32_t *sampled, int32_t n_want, const cu_bf16 *embed, const cu_bf16 *emb_norm,
               const cu_bf16 *hidden_norm, int32_t n_hidden, float eps) {
    cu_launch_next();
    prefetch_weights(threadIdx.x < 32 ? emb_norm : hidden_norm, n_hidden);
    cu_wait_previous();
    const int32_t t = (int32_t)blockIdx.x;
    cu_bf16 *out = z + (int64_t)t * CU_PAD(2 * n_hidden);
    if (threadIdx.x < 32) {
        const int32_t id = next_token(next[t], t, want, sampled, n_want);
        __syncwarp(); /* next_out may be next itself */
        if (threadIdx.x == 0) next_out[t] = id;
        norm_row<HELD>(out, embed + (int64_t)id * n_hidden, emb_norm, n_hidden, eps);
    } else {
        norm_row<HELD>(out + n_hidden, x + (int64_t)t * n_hidden, hidden_norm, n_hidden, eps);
    }
}

cudaError_t cu_mtp_in(cudaStream_t s, cu_bf16 *z, int32_t *next_out, const float *x, const int32_t *next,
                      const int32_t *want, const int32_t *sampled, int32_t n_want, const cu_bf16 *embed,
                      const cu_bf16 *emb_norm, const cu_bf16 *hidden_norm, int32_t n_row, int32_t n_hidden, float eps) {
    if (n_row <= 0) return cudaSuccess;
    const unsigned blocks = (unsigned)n_row;
    const int h = held(n_hidden);
    return cu_launch_args(s,
                          h == 8    ? mtp_kernel<8>
                          : h == 20 ? mtp_kernel<20>
                                    : mtp_kernel<0>,
                          blocks, 64, true, z, next_out, x, next, want, sampled, n_want, embed, emb_norm, hidden_norm,
                          n_hidden, eps);
}
