/* Rows in e4m3 for fp8 by fp8: every segment of 128 numbers of a row with a scale of its own, as quant_act_fp8 has it.
 */
#include "backend/cuda/cu_f8_device.cuh"
#include "backend/cuda/cu_launch.cuh"

enum {
    WARPS = 8,
    HELD = 4 /* pieces of 256 numbers of a row in flight: eight numbers a lane, a half warp a segment */
};

/* Numbers of a word: lo in bits 0..15. */
static __device__ __forceinline__ void widen(float v[8], uint4 w) {
    const uint32_t word[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
        v[2 * k] = __uint_as_float(word[k] << 16);
        v[2 * k + 1] = __uint_as_float(word[k] & 0xffff0000u);
    }
}

/* A warp a row. */
static __global__ void __launch_bounds__(WARPS * 32)
    quant_rows(cu_x8 out, const cu_bf16 *x, int64_t ldx, int32_t n_row, int32_t n_seg) {
    const int32_t row = (int32_t)(blockIdx.x * WARPS + threadIdx.x / 32), lane = threadIdx.x % 32;
    cu_launch_next();
    cu_wait_previous();
    if (row >= n_row) return;
    x += row * ldx;
    uint8_t *code = out.code + row * out.ldx;
    for (int32_t from = 0; from < n_seg; from += 2 * HELD) {
        uint4 w[HELD];
        float scale[HELD];
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            const int32_t seg = from + 2 * k + lane / 16;
            w[k] = make_uint4(0, 0, 0, 0);
            if (seg < n_seg) w[k] = *(const uint4 *)(x + (from + 2 * k) * CU_SEGMENT + lane * 8);
        }
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            const int32_t seg = from + 2 * k + lane / 16;
            float v[8];
            widen(v, w[k]);
            uint32_t top = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) top = max(top, __float_as_uint(v[i]) & 0x7fffffffu);
#pragma unroll
            for (int d = 8; d > 0; d >>= 1) top = max(top, __shfl_xor_sync(0xffffffffu, top, d));
            const float f = f8_factor(&scale[k], top);
            uint2 to;
            to.x = f8_code4(__fmul_rn(v[0], f), __fmul_rn(v[1], f), __fmul_rn(v[2], f), __fmul_rn(v[3], f));
            to.y = f8_code4(__fmul_rn(v[4], f), __fmul_rn(v[5], f), __fmul_rn(v[6], f), __fmul_rn(v[7], f));
            if (f == 0.0f) to = make_uint2(0, 0);
            if (seg < n_seg) *(uint2 *)(code + (from + 2 * k) * CU_SEGMENT + lane * 8) = to;
        }
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            const int32_t seg = from + 2 * k + lane / 16;
            if (lane % 16 == 0 && seg < n_seg) out.scale[seg * out.ld_scale + row] = scale[k];
        }
    }
}

cudaError_t cu_quant_x8(cudaStream_t s, const cu_x8 *out, const cu_bf16 *x, int64_t ldx, int32_t n_row, int32_t n_in) {
    if (ldx % 8 != 0 || (uintptr_t)x % 16 != 0 || out->ldx % 16 != 0 || (uintptr_t)out->code % 16 != 0 || n_in < 1)
        return cudaErrorInvalidValue;
    if (n_row < 1) return cudaSuccess;
    return cu_launch_args(s, quant_rows, dim3((unsigned)((n_row + WARPS - 1) / WARPS)), WARPS * 32, true, *out, x, ldx,
                          n_row, (int32_t)(CU_PAD(n_in) / CU_SEGMENT));
}
