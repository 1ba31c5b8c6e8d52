/* What kernels on fp8 codes times fp8 rows (CU_F8A8) share: the product of 64 outputs, N rows and 32 inputs by a
 * warpgroup, the chain of four that is a segment, and how a segment of a row becomes codes. */
#ifndef ERN_BACKEND_CUDA_CU_F8_DEVICE_CUH
#define ERN_BACKEND_CUDA_CU_F8_DEVICE_CUH

#include "backend/cuda/cu_device.cuh"
#include "backend/cuda/cu_tensor.cuh"

enum {
    F8_BAND_BYTES = 16 * CU_SEGMENT, /* of a segment of a band */
    F8_TILE_BANDS = 4,               /* bands of a product: one a warp */
    F8_TILE_BYTES = F8_TILE_BANDS * F8_BAND_BYTES
};

/* d = A B + (add ? d : 0): 64 outputs, N rows, 32 inputs. a: of the warp's band. b: describes the rows. d: N / 8
 * squares of four as cu_mma has them: outputs g, g, g + 8, g + 8 of rows 2c, 2c + 1, 2c, 2c + 1. */
template <int N>
static __device__ __forceinline__ void f8_product(float d[N / 2], const uint32_t a[4], uint64_t b, int add) {
    static_assert(N == 8 || N == 16 || N == 32 || N == 64, "rows of a product");
    if constexpr (N == 8)
        asm volatile("{.reg .pred p; setp.ne.b32 p, %9, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, p, "
                     "1, 1;}\n"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    if constexpr (N == 16)
        asm volatile("{.reg .pred p; setp.ne.b32 p, %13, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7}, "
                     "{%8, %9, %10, %11}, %12, p, 1, 1;}\n"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    if constexpr (N == 32)
        asm volatile("{.reg .pred p; setp.ne.b32 p, %21, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
                     "%10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, p, 1, 1;}\n"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                       "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
                       "+f"(d[15])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    if constexpr (N == 64)
        asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" CU_D32_NAMES
                     "{%32, %33, %34, %35}, %36, p, 1, 1;}\n"
                     : CU_D32(d)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
/* The A operand of a segment's four products. band: its bytes of the warp's band. */
static __device__ __forceinline__ void f8_codes(uint32_t a[4][4], const unsigned char *band, int lane) {
#pragma unroll
    for (int t = 0; t < 4; t++) {
        const uint4 v = *(const uint4 *)(band + t * 512 + lane * 16);
        a[t][0] = v.x, a[t][1] = v.y, a[t][2] = v.z, a[t][3] = v.w;
    }
}

/* A segment of N rows in shared memory: 128 bytes a row, eight rows at a multiple of 1024. The eight pieces of 16 bytes
 * of a row sit at piece ^ (row & 7). */
static __device__ __forceinline__ int f8_piece_at(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }
/* A segment, from zero. x: its rows. The sums are there after wide_wait and f8_hold. */
template <int N> static __device__ __forceinline__ void f8_segment(float d[N / 2], const uint32_t a[4][4], uint32_t x) {
    const uint64_t b = (uint64_t)((x & 0x3ffffu) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
    wide_hold<N / 2>(d);
    wide_fence();
#pragma unroll
    for (int t = 0; t < 4; t++) f8_product<N>(d, a[t], b + 2 * t, t > 0);
    wide_commit();
}
/* What this thread wrote to shared memory, or saw written, is there for products and copies by the engine. */
static __device__ __forceinline__ void f8_show(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* Four codes, first in bits 0..7: nearest, ties to even, the largest where it is beyond. */
static __device__ __forceinline__ uint32_t f8_code4(float a, float b, float c, float d) {
    uint32_t out;
    asm("{.reg .b16 lo, hi;\n"
        "cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\n"
        "mov.b32 %0, {lo, hi};}\n"
        : "=r"(out)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return out;
}
/* Of a segment of a row whose largest magnitude has these bits: its scale, and what its numbers are multiplied with
 * before they become codes; 0: they are not finite, and all codes are 0. As quant_act_fp8 does. */
static __device__ __forceinline__ float f8_factor(float *scale, uint32_t top) {
    const float a = fmaxf(__uint_as_float(top), 1e-10f);
    const bool good = top < 0x7f800000u;
    *scale = good ? __fdiv_rn(a, 448.0f) : __uint_as_float(0x7fc00000u);
    return good ? __fdiv_rn(448.0f, a) : 0.0f;
}
/* A segment of a row by a warp, lane l inputs 4 l .. 4 l + 3 of it: the lane's codes; every lane has the scale. */
static __device__ __forceinline__ uint32_t f8_quantize(float *scale, const float v[4]) {
    uint32_t top = 0;
#pragma unroll
    for (int k = 0; k < 4; k++) top = max(top, __float_as_uint(v[k]) & 0x7fffffffu);
    const float f = f8_factor(scale, __reduce_max_sync(0xffffffffu, top));
    if (f == 0.0f) return 0;
    return f8_code4(__fmul_rn(v[0], f), __fmul_rn(v[1], f), __fmul_rn(v[2], f), __fmul_rn(v[3], f));
}

/* cu_f8_mid_run of up to 16 rows and a matrix of few tiles (cu_f8_split.cu): *took says whether this was one for it. */
cudaError_t cu_f8_split_run(cudaStream_t s, const cu_job *j, bool *took);

#endif
