/* What kernels of several files share: bits of bf16, the tensor core's product, codes to bf16, the sum of a row. Device
 * code only; included by *.cu. The order of every sum here is part of the promise of cu_kernels.h. */
#ifndef ERN_BACKEND_CUDA_CU_DEVICE_CUH
#define ERN_BACKEND_CUDA_CU_DEVICE_CUH

#include <cuda_bf16.h>
#include <stdint.h>

#include "backend/cuda/cu_kernels.h"

static __device__ __forceinline__ float cu_f32(cu_bf16 bits) { return __uint_as_float((uint32_t)bits << 16); }
/* Nearest, ties to even; NaN stays NaN. */
static __device__ __forceinline__ cu_bf16 cu_round(float f) { return __bfloat16_as_ushort(__float2bfloat16_rn(f)); }
/* Two at once: lo in bits 0..15. */
static __device__ __forceinline__ uint32_t cu_round2(float lo, float hi) {
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
    return out;
}

/* acc[4] += A[16, 16] B[16, 8]; bf16 in, f32 sums. a: 4 registers, b: 2. acc: rows g, g, g+8, g+8; columns 2c, 2c+1,
 * 2c, 2c+1 of lane 4g + c. */
static __device__ __forceinline__ void cu_mma(float acc[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* How copies and loads use the L2 cache. What one block alone reads and reads once (weights of few rows, keys and
 * values: all together many times the cache) leaves it before anything else; so code, tables, x and results on their
 * way to other blocks stay. That word is what createpolicy makes (compared on an H200), written out: ptxas 13 may drop
 * a createpolicy in front of cp.async, which then reads a register that nobody wrote. The other one is for the copy
 * engine and does what no word does; createpolicy's evict_normal, 0x16f0..., makes many rows 4% slower. */
static __device__ __forceinline__ uint64_t cu_read_once(void) { return 0x12f0000000000000ull; }
static __device__ __forceinline__ uint64_t cu_read_often(void) { return 0x1000000000000000ull; }

/* ---- codes to bf16 pairs: exact (cu_kernels.h draws the words) ----------------------------------------------------
 */

static __device__ __forceinline__ uint32_t cu_sub2(uint32_t a, uint32_t b) { /* a - b, exact for our operands */
    uint32_t out;
    const uint32_t one = 0x3f803f80u;
    /* b * -1 + a */
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(b), "r"(one ^ 0x80008000u), "r"(a));
    return out;
}

/* (w & mask) | bits: one instruction, of which the compiler makes two. */
static __device__ __forceinline__ uint32_t cu_and_or(uint32_t w, uint32_t mask, uint32_t bits) {
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(w), "r"(mask), "r"(bits));
    return out;
}
/* Bits 0..7 and 16..23 of w: two's complement q -> bf16 q. 0x4300 is 128 with seven free mantissa bits: 128 + (q & 127)
 * less 128, or less 256 where the sign bit, which is the lowest bit of the exponent there, is set. */
static __device__ __forceinline__ uint32_t cu_i8_pair(uint32_t w) {
    return cu_sub2((w & 0x007f007fu) | 0x43004300u, (w & 0x00800080u) | 0x43004300u);
}
/* The same in fewer instructions and more registers, which prefill attention does not have. */
static __device__ __forceinline__ uint32_t cu_i8_pair_fast(uint32_t w) {
    return cu_sub2(cu_and_or(w, 0x007f007fu, 0x43004300u), cu_and_or(w, 0x00800080u, 0x43004300u));
}
/* Bits 0..3 and 16..19: q + 8 -> bf16 q. */
static __device__ __forceinline__ uint32_t cu_i4_pair(uint32_t w) {
    return cu_sub2(cu_and_or(w, 0x000f000fu, 0x43004300u), 0x43084308u);
}
/* Bits 0..7 and 16..23: e4m3 -> bf16. Its four exponent and three mantissa bits go under bf16's, whose bias is 120
 * more: times 2^120, which makes a subnormal right as well. */
static __device__ __forceinline__ uint32_t cu_f8_pair(uint32_t w) {
    uint32_t out;
    const uint32_t bits = cu_and_or(w << 8, 0x80008000u, (w << 4) & 0x07f007f0u), up = 0x7b807b80u, zero = 0x80008000u;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(bits), "r"(up), "r"(zero));
    return out;
}

/* silu(gate) * up, each step rounded. */
static __device__ __forceinline__ float cu_swiglu(float gate, float up) {
    return __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, expf(-gate))), up);
}

/* ---- words that other blocks write meanwhile: each is whole, whenever it is read ------------------------------------
 */

static __device__ __forceinline__ uint2 cu_look2(const void *p) {
    uint2 v;
    asm volatile("ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
    return v;
}
static __device__ __forceinline__ uint4 cu_look4(const void *p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

/* ---- what earlier kernels of the step wrote: from the L2 cache ------------------------------------------------------
 * Volatile, so that it stays behind the wait for them; no clobber, so that many can be asked for at once. */

static __device__ __forceinline__ uint4 cu_l2(const void *p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
static __device__ __forceinline__ float cu_l2f(const float *p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p));
    return v;
}
static __device__ __forceinline__ int32_t cu_l2i(const int32_t *p) {
    int32_t v;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

/* ---- a barrier of some of a block's warps ------------------------------------------------------------------------ */

static __device__ __forceinline__ void cu_barrier(int id, int n_thread) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_thread) : "memory");
}

/* ---- a row's sum ------------------------------------------------------------------------------------------------- */

/* x[i .. i + 3], or zeros where i >= end (x[0 .. 3] is read then: no branch). */
static __device__ __forceinline__ float4 cu_load4(const float *x, int32_t i, int32_t end) {
    const bool in = i < end;
    const float4 v = *(const float4 *)(x + (in ? i : 0));
    return in ? v : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}
/* 0, which the compiler cannot tell from n >= 0. */
static __device__ __forceinline__ uint32_t cu_hidden_zero(int32_t n) {
    uint32_t zero;
    asm volatile("shr.s32 %0, %1, 31;" : "=r"(zero) : "r"(n));
    return zero;
}
/* sum as it is, but known only when all of v [count] is: the compiler puts loads beside their uses, which waits for
 * them one after the other; what is added to this sum comes after the last. */
static __device__ __forceinline__ float cu_after(float sum, const float4 *v, int count, uint32_t hidden_zero) {
    uint32_t bits = 0;
#pragma unroll
    for (int k = 0; k < count; k++) bits |= __float_as_uint(v[k].x);
    return __uint_as_float(__float_as_uint(sum) ^ (bits & hidden_zero));
}
/* Four more squares of a lane's share. Zeros change nothing, so lanes may run past the end of a row with them. */
static __device__ __forceinline__ float cu_add_squares(float4 v, float sum) {
    sum = __fmaf_rn(v.x, v.x, sum);
    sum = __fmaf_rn(v.y, v.y, sum);
    sum = __fmaf_rn(v.z, v.z, sum);
    return __fmaf_rn(v.w, v.w, sum);
}
/* The sum over a warp: halves 16, 8, 4, 2, 1; every lane returns it. */
static __device__ __forceinline__ float cu_warp_sum(float sum) {
    for (int d = 16; d > 0; d >>= 1) sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, d));
    return sum;
}
/* Sum of squares of x [n], by one warp; every lane returns it. Lane l adds elements 4 l .. 4 l + 3 of each run of 128,
 * in order, with fma; then halves 16, 8, 4, 2, 1. n is any number. Where rows allow it, eight loads of 16 bytes are in
 * flight at once: one wait for a row of up to 1024. */
static __device__ __forceinline__ float cu_sum_squares(const float *x, int32_t n) {
    const int lane = threadIdx.x & 31;
    float sum = 0.0f;
    if ((n & 3) == 0 && ((uintptr_t)x & 15) == 0) {
        const uint32_t zero = cu_hidden_zero(n);
        for (int32_t from = 0; from < n; from += 1024) {
            float4 v[8];
#pragma unroll
            for (int k = 0; k < 8; k++) v[k] = cu_load4(x, from + k * 128 + lane * 4, n);
            sum = cu_after(sum, v, 8, zero);
#pragma unroll
            for (int k = 0; k < 8; k++) sum = cu_add_squares(v[k], sum);
        }
    } else {
        for (int32_t i = lane * 4; i < n; i += 128)
            for (int32_t k = i; k < i + 4 && k < n; k++) sum = __fmaf_rn(x[k], x[k], sum);
    }
    return cu_warp_sum(sum);
}
/* 1 / sqrt(mean + eps), once a row. */
static __device__ __forceinline__ float cu_norm_scale(float sum_squares, int32_t n, float eps) {
    return __frsqrt_rn(__fadd_rn(__fdiv_rn(sum_squares, (float)n), eps));
}
/* One element of a normed row, f32. */
static __device__ __forceinline__ float cu_normed(float x, float scale, cu_bf16 w) {
    return __fmul_rn(__fmul_rn(x, scale), cu_f32(w));
}

/* The nearest e4m3 code, the largest where x is beyond it. */
static __device__ __forceinline__ uint32_t cu_e4m3(float x) {
#if CU_PORTABLE
    /* three bits of mantissa, or, below 2^-6, multiples of 2^-9; the exponent's bias is 120 less */
    const uint32_t bits = __float_as_uint(x) & 0x7fffffffu;
    const uint32_t normal = ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - (120 << 3);
    const uint32_t code = bits < 0x3c800000u ? (uint32_t)__float2int_rn(__uint_as_float(bits) * 512.0f) : normal;
    return (__float_as_uint(x) >> 31) << 7 | min(code, 0x7eu);
#else
    uint16_t two;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(0.0f), "f"(x));
    return two;
#endif
}

#endif
