/* What kernels on weights that meet rows of 8 bits share (CU_F8A8, CU_I8A8, CU_I4A8): the product of 64 outputs, N rows
 * and 32 inputs by a warpgroup, the chain of four that is a segment, and how a segment of a row becomes codes. */
#ifndef ERN_BACKEND_CUDA_CU_A8_DEVICE_CUH
#define ERN_BACKEND_CUDA_CU_A8_DEVICE_CUH

#include <type_traits>

#include "backend/cuda/cu_device.cuh"
#include "backend/cuda/cu_tensor.cuh"

/* Segments of bands before this one, in the order of A8 weights. */
static __host__ __device__ __forceinline__ int64_t a8_at(int32_t band, int32_t seg, int32_t n_seg) {
    return ((int64_t)(band / CU_A8_BANDS) * n_seg + seg) * CU_A8_BANDS + band % CU_A8_BANDS;
}

enum { A8_TILE_BANDS = 4 /* of a product: one a warp */ };
/* Bytes of a segment of a band. */
static __host__ __device__ constexpr int a8_band_bytes(cu_format f) { return f == CU_I4A8 ? 1024 : 2048; }
static __host__ __device__ constexpr int a8_tile_bytes(cu_format f) { return A8_TILE_BANDS * a8_band_bytes(f); }
static __host__ __device__ constexpr cu_codes a8_codes_of(cu_format f) {
    return f == CU_F8A8 ? CU_CODES_F8 : CU_CODES_I8;
}

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* What a segment sums up to: of integers exact, and of magnitudes below 2^21. */
template <cu_format F> using a8_sum = std::conditional_t<F == CU_F8A8, float, int32_t>;
static __device__ __forceinline__ float a8_number(float sum) { return sum; }
static __device__ __forceinline__ float a8_number(int32_t sum) { /* 3 * 2^22 + sum is a float */
    return __fsub_rn(__int_as_float(sum + 0x4b400000), 12582912.0f);
}

#define A8_D4(c, d) c((d)[0]), c((d)[1]), c((d)[2]), c((d)[3])
#define A8_D8(c, d) A8_D4(c, d), A8_D4(c, (d) + 4)
#define A8_D16(c, d) A8_D8(c, d), A8_D8(c, (d) + 8)
#define A8_D32(c, d) A8_D16(c, d), A8_D16(c, (d) + 16)
#define A8_D64(c, d) A8_D32(c, d), A8_D32(c, (d) + 32)
/* ...: operand A. */
#define A8_PRODUCT(n, types, signs, names, from, on, list, c, ...)                                     \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " on ", 0;\n"                                          \
                 "wgmma.mma_async.sync.aligned.m64n" n "k32." types " {" names from ", p" signs ";}\n" \
                 : list(c, d)                                                                          \
                 : __VA_ARGS__, "l"(b), "r"(add))
#define A8_LANE "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define A8_PRODUCTS(types, signs, c)                                                                                 \
    static_assert(N == 8 || N == 16 || N == 32 || N == 64, "rows of a product");                                     \
    if constexpr (N == 8)                                                                                            \
        A8_PRODUCT("8", types, signs, "%0, %1, %2, %3}, ", "{%4, %5, %6, %7}, %8", "%9", A8_D4, c, A8_LANE);         \
    if constexpr (N == 16)                                                                                           \
        A8_PRODUCT("16", types, signs, "%0, %1, %2, %3, %4, %5, %6, %7}, ", "{%8, %9, %10, %11}, %12", "%13", A8_D8, \
                   c, A8_LANE);                                                                                      \
    if constexpr (N == 32)                                                                                           \
        A8_PRODUCT("32", types, signs, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, ",    \
                   "{%16, %17, %18, %19}, %20", "%21", A8_D16, c, A8_LANE);                                          \
    if constexpr (N == 64)                                                                                           \
    A8_PRODUCT("64", types, signs, CU_D32_NAMES, "{%32, %33, %34, %35}, %36", "%37", A8_D32, c, A8_LANE)

/* d = A B + (add ? d : 0): 64 outputs, N rows, 32 inputs. a: of the warp's band. b: describes the rows. d: N / 8
 * squares of four as cu_mma has them: outputs g, g, g + 8, g + 8 of rows 2c, 2c + 1, 2c, 2c + 1. */
template <int N> static __device__ __forceinline__ void a8_product(float *d, const uint32_t a[4], uint64_t b, int add) {
    A8_PRODUCTS("f32.e4m3.e4m3", ", 1, 1", "+f");
}
template <int N>
static __device__ __forceinline__ void a8_product(int32_t *d, const uint32_t a[4], uint64_t b, int add) {
    A8_PRODUCTS("s32.s8.s8", "", "+r");
}

/* Nothing that reads or writes these sums moves past here. */
template <int N> static __device__ __forceinline__ void a8_hold(float *d) { wide_hold<N>(d); }
template <int N> static __device__ __forceinline__ void a8_hold(int32_t *d) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(d[i])::"memory");
}

/* The A operand of a segment's four products. band: the warp's bytes of it, in shared memory. I4A8: times 16. */
template <cu_format F>
static __device__ __forceinline__ void a8_codes(uint32_t a[4][4], const unsigned char *band, int lane) {
    if constexpr (F == CU_I4A8) {
#pragma unroll
        for (int t = 0; t < 2; t++) {
            const uint4 v = *(const uint4 *)(band + t * 512 + lane * 16);
            const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int k = 0; k < 4; k++)
                a[2 * t][k] = word[k] & 0xf0f0f0f0u, a[2 * t + 1][k] = word[k] << 4 & 0xf0f0f0f0u;
        }
    } else { /* lanes 8 k .. 8 k + 7 say where register k's eight outputs lie */
        const uint32_t output = (uint32_t)__cvta_generic_to_shared(band) + lane % 16 * CU_SEGMENT;
#pragma unroll
        for (int t = 0; t < 4; t++)
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(a[t][0]), "=r"(a[t][1]), "=r"(a[t][2]), "=r"(a[t][3])
                         : "r"(output + (((2 * t + lane / 16) ^ (lane & 7)) << 4))
                         : "memory");
    }
}

/* A segment of N rows in shared memory: 128 bytes a row, eight rows at a multiple of 1024. The eight pieces of 16 bytes
 * of a row sit at piece ^ (row & 7). */
static __device__ __forceinline__ int a8_piece_at(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }
/* A segment, from zero. x: its rows. The sums are there after wide_wait and a8_hold. */
template <int N, typename SUM>
static __device__ __forceinline__ void a8_segment(SUM *d, const uint32_t a[4][4], uint32_t x) {
    const uint64_t b = wide_matrix(x);
    a8_hold<N / 2>(d);
    wide_fence();
#pragma unroll
    for (int t = 0; t < 4; t++) a8_product<N>(d, a[t], b + 2 * t, t > 0);
    wide_commit();
}
/* What this thread wrote to shared memory, or saw written, is there for products and copies by the engine. */
static __device__ __forceinline__ void a8_show(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* ---- rows to codes, as quant_act_fp8 and quant_act_int8 do --------------------------------------------------------
 */

/* Four codes of numbers times f8's or int8's factor, first in bits 0..7: nearest, ties to even. */
template <cu_codes C> static __device__ __forceinline__ uint32_t a8_code4(const float v[4], float factor) {
    uint32_t out;
    float p[4];
#pragma unroll
    for (int k = 0; k < 4; k++) p[k] = __fmul_rn(v[k], factor);
    if constexpr (C == CU_CODES_F8) { /* the largest where it is beyond */
#if CU_PORTABLE
        out = cu_e4m3(p[0]) | cu_e4m3(p[1]) << 8 | cu_e4m3(p[2]) << 16 | cu_e4m3(p[3]) << 24;
#else
        asm("{.reg .b16 lo, hi;\n"
            "cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\n"
            "cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\n"
            "mov.b32 %0, {lo, hi};}\n"
            : "=r"(out)
            : "f"(p[0]), "f"(p[1]), "f"(p[2]), "f"(p[3]));
#endif
    } else {
        uint32_t bits[4]; /* of 3 * 2^22 + the nearest integer */
#pragma unroll
        for (int k = 0; k < 4; k++) bits[k] = __float_as_uint(__fadd_rn(p[k], 12582912.0f));
        out = __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
    }
    return out;
}
/* Of a segment of a row whose largest magnitude has these bits: its scale, and what its numbers are multiplied with
 * before they become codes; 0: all codes are 0. */
template <cu_codes C> static __device__ __forceinline__ float a8_factor(float *scale, uint32_t top) {
    const float most = C == CU_CODES_F8 ? 448.0f : 127.0f;
    const float a = C == CU_CODES_F8 ? fmaxf(__uint_as_float(top), 1e-10f) : __uint_as_float(top);
    if (top >= 0x7f800000u) { /* not finite */
        *scale = __uint_as_float(0x7fc00000u);
        return 0.0f;
    }
    *scale = __fdiv_rn(a, most);
    if (C == CU_CODES_I8 && *scale < 0x1p-100f) return *scale = 0.0f;
    return __fdiv_rn(most, a);
}
/* A segment of a row by a warp, lane l inputs 4 l .. 4 l + 3 of it: the lane's codes; every lane has the scale. */
template <cu_codes C> static __device__ __forceinline__ uint32_t a8_quantize(float *scale, const float v[4]) {
    uint32_t top = 0;
#pragma unroll
    for (int k = 0; k < 4; k++) top = max(top, __float_as_uint(v[k]) & 0x7fffffffu);
    const float f = a8_factor<C>(scale, __reduce_max_sync(0xffffffffu, top));
    return f == 0.0f ? 0 : a8_code4<C>(v, f);
}

/* cu_a8_skinny_run of one row behind a norm, gate and up, `alone` (cu_a8_one.cu): *took says whether this was one for
 * it. */
cudaError_t cu_a8_one_run(cudaStream_t s, const cu_job *j, bool *took);
/* cu_a8_mid_grouped of one row (cu_a8_entry.cu): the same. */
cudaError_t cu_a8_entry_run(cudaStream_t s, const cu_grouped_job *j, bool *took);
/* cu_a8_mid_run of up to 32 rows and a matrix of few tiles (cu_a8_split.cu): *took says whether this was one for it. */
cudaError_t cu_a8_split_run(cudaStream_t s, const cu_job *j, bool *took);

#endif
