/* Rows in 8 bits, for weights that meet such rows: every segment of 128 numbers of a row with a scale of its own, as
 * quant_act_fp8 or quant_act_int8 has it. */
#include "backend/cuda/cu_a8_device.cuh"
#include "backend/cuda/cu_launch.cuh"

enum {
    WARPS = 8,
    FEW_ROWS = 256 /* so many and less are shared out among more warps */
};

/* Numbers of two words: lo in bits 0..15. */
static __device__ __forceinline__ void widen(float v[4], uint32_t a, uint32_t b) {
    v[0] = __uint_as_float(a << 16), v[1] = __uint_as_float(a & 0xffff0000u);
    v[2] = __uint_as_float(b << 16), v[3] = __uint_as_float(b & 0xffff0000u);
}
static __device__ __forceinline__ uint32_t largest(uint32_t top, const float v[4]) {
#pragma unroll
    for (int k = 0; k < 4; k++) top = max(top, __float_as_uint(v[k]) & 0x7fffffffu);
    return top;
}

/* n_share warps a row, each with every n_share-th run of 2 HELD segments: so many of its pieces of 256 numbers are in
 * flight, eight numbers a lane, a half warp a segment. */
template <cu_codes C, int HELD>
static __global__ void __launch_bounds__(WARPS * 32)
    quant_rows(cu_x8 out, const cu_bf16 *x, int64_t ldx, int32_t n_row, int32_t n_seg, int32_t n_share) {
    const int32_t index = (int32_t)((blockIdx.x * blockDim.x + threadIdx.x) / 32), lane = threadIdx.x % 32;
    const int32_t row = n_share == 1 ? index : index / n_share, share = index - row * n_share;
    cu_launch_next();
    cu_wait_previous();
    if (row >= n_row) return;
    x += row * ldx;
    uint8_t *code = out.code + row * out.ldx;
    for (int32_t from = share * 2 * HELD; from < n_seg; from += n_share * 2 * HELD) {
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
            float lo[4], hi[4];
            widen(lo, w[k].x, w[k].y);
            widen(hi, w[k].z, w[k].w);
            uint32_t top = largest(largest(0, lo), hi);
#pragma unroll
            for (int d = 8; d > 0; d >>= 1) top = max(top, __shfl_xor_sync(0xffffffffu, top, d));
            const float f = a8_factor<C>(&scale[k], top);
            const uint2 to = f == 0.0f ? make_uint2(0, 0) : make_uint2(a8_code4<C>(lo, f), a8_code4<C>(hi, f));
            if (seg < n_seg) *(uint2 *)(code + (from + 2 * k) * CU_SEGMENT + lane * 8) = to;
        }
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            const int32_t seg = from + 2 * k + lane / 16;
            if (lane % 16 == 0 && seg < n_seg) out.scale[seg * out.ld_scale + row] = scale[k];
        }
    }
}

cudaError_t cu_quant_x8(cudaStream_t s, const cu_x8 *out, cu_codes codes, const cu_bf16 *x, int64_t ldx, int32_t n_row,
                        int32_t n_in) {
    if (codes == CU_CODES_NONE || ldx % 8 != 0 || (uintptr_t)x % 16 != 0 || out->ldx % 16 != 0 ||
        (uintptr_t)out->code % 16 != 0 || n_in < 1)
        return cudaErrorInvalidValue;
    if (n_row < 1) return cudaSuccess;
    const int32_t n_seg = CU_PAD(n_in) / CU_SEGMENT, n_share = n_row <= FEW_ROWS ? (n_seg + 1) / 2 : 1;
    const int32_t warps = n_share == 1 ? WARPS : WARPS / 4; /* few: as many multiprocessors as there are */
    const bool f8 = codes == CU_CODES_F8;
    return cu_launch_args(s,
                          n_share == 1 ? f8 ? quant_rows<CU_CODES_F8, 6> : quant_rows<CU_CODES_I8, 6>
                          : f8 ? quant_rows<CU_CODES_F8, 1>
                                       : quant_rows<CU_CODES_I8, 1>,
                          dim3((unsigned)((n_row * n_share + warps - 1) / warps)), (unsigned)warps * 32, true, *out, x,
                          ldx, n_row, n_seg, n_share);
}
