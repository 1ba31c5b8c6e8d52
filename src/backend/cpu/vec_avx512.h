/* AVX-512 pieces that the *_avx512.c files share. Included by nothing else. */
#ifndef ERN_BACKEND_CPU_VEC_AVX512_H
#define ERN_BACKEND_CPU_VEC_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#include "backend/cpu/cpu_kernels.h"
#include "backend/cpu/vec.h"
#include "base/half.h"

/* The first n lanes of 16; n >= 16: all. */
CPU_INLINE __mmask16 cpu_mask(int64_t n) {
    uint32_t lanes = n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1u;
    return (__mmask16)lanes;
}

/* bf16 is the upper half of an f32. */
CPU_INLINE __m512 cpu_widen(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
CPU_INLINE __m512 cpu_load_bf16(const ern_bf16 *p) {
    return cpu_widen(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
CPU_INLINE __m512 cpu_load_bf16_mask(const ern_bf16 *p, __mmask16 m) {
    return cpu_widen(_mm256_maskz_loadu_epi16(m, p));
}

/* One row's outputs o.. of a quantized linear: y = s, or y += scale * s. */
CPU_INLINE void cpu_put_band(const cpu_linear_job *j, int32_t r, int32_t o, __mmask16 m, __m512 s) {
    float *y = cpu_job_y(j, r) + o;
    if (j->add) s = _mm512_fmadd_ps(_mm512_set1_ps(j->scale ? j->scale[r] : 1.0f), s, _mm512_maskz_loadu_ps(m, y));
    _mm512_mask_storeu_ps(y, m, s);
}

/* Sum the 16 lanes of each of four vectors with one tree: lanes i and i+8, then i and i+4, then i and i+2, then the
 * last two. Lane n of the result belongs to argument n; the tree is the same for each. */
CPU_INLINE __m128 cpu_fold(__m512 a) {
    __m256 y = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    return _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
}
CPU_INLINE __m128 cpu_sum4(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m128 x0 = cpu_fold(a), x1 = cpu_fold(b), x2 = cpu_fold(c), x3 = cpu_fold(d);
    __m128 s01 = _mm_add_ps(_mm_unpacklo_ps(x0, x1), _mm_unpackhi_ps(x0, x1));
    __m128 s23 = _mm_add_ps(_mm_unpacklo_ps(x2, x3), _mm_unpackhi_ps(x2, x3));
    return _mm_add_ps(_mm_movelh_ps(s01, s23), _mm_movehl_ps(s23, s01));
}
CPU_INLINE float cpu_sum1(__m512 a) {
    __m512 z = _mm512_setzero_ps();
    return _mm_cvtss_f32(cpu_sum4(a, z, z, z));
}

/* exp(x): x = n ln 2 + r with |r| <= ln 2 / 2, then the Taylor series to r^7 (next term below 6e-9 of the result), then
 * the exponent n. Below -87.3 the result is 0 (it would be subnormal), above 88 it stays at exp(88). NaN stays. */
CPU_INLINE __m512 cpu_exp16(__m512 x) {
    __mmask16 low = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3f), _CMP_LT_OQ);
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), x); /* the second operand is the result when one is NaN */
    x = _mm512_max_ps(_mm512_set1_ps(-88.0f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), low, _mm512_setzero_ps());
}

/* silu(gate) * up. */
CPU_INLINE __m512 cpu_silu16(__m512 gate, __m512 up) {
    const __m512 one = _mm512_set1_ps(1.0f);
    /* a step of Newton's behind 14 bits of the reciprocal: within 1.1 u, in half the time of a division */
    const __m512 d = _mm512_add_ps(one, cpu_exp16(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
    const __m512 r = _mm512_rcp14_ps(d);
    const __m512 s = _mm512_mul_ps(gate, _mm512_fmadd_ps(r, _mm512_fnmadd_ps(d, r, one), r));
    return _mm512_mul_ps(s, up);
}

/* 2^x for x <= 0: x = n + r with |r| <= 1/2, then the Taylor series of e^(r ln 2) to the 7th power (next term below
 * 6e-9 of the result), then the exponent n. Below -126 the result is 0 (it would be subnormal). NaN stays. */
CPU_INLINE __m512 cpu_exp2_16(__m512 x) {
    const __mmask16 is_normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(0x1.ffcbfcp-17f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.430912p-13f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.5d87fep-10f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.3b2ab6p-7f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.c6b08ep-5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.ebfbep-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.62e43p-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(is_normal, p, n);
}

/* 2^x for x <= 0 within 2^-17.9 of itself, 1 at 0: x = n + r with |r| <= 1/2, the polynomial of the fourth degree whose
 * largest error is the least, then n. It is rounded to 8 bits next: to nearest, what lies half way up. At -inf r is
 * NaN, of which scaling by 2^-inf makes 0. */
CPU_INLINE __m512 cpu_weight16(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(0x1.3cfd6cp-7f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.ca071cp-5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.ebf906p-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.62e114p-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    const __m512i e = _mm512_castps_si512(_mm512_scalef_ps(p, n));
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_add_epi32(e, _mm512_set1_epi32(0x8000)), _mm512_set1_epi32((int32_t)0xffff0000u)));
}

/* The upper halves of a's lanes, then of b's. Of two vectors' numbers a permutation would choose in three steps, of
 * one's it does in one. */
CPU_INLINE __m512i cpu_uppers(__m512 a, __m512 b) {
    const __m512i odd =
        _mm512_set_epi32(31 << 16 | 29, 27 << 16 | 25, 23 << 16 | 21, 19 << 16 | 17, 15 << 16 | 13, 11 << 16 | 9,
                         7 << 16 | 5, 3 << 16 | 1, 31 << 16 | 29, 27 << 16 | 25, 23 << 16 | 21, 19 << 16 | 17,
                         15 << 16 | 13, 11 << 16 | 9, 7 << 16 | 5, 3 << 16 | 1);
    return _mm512_mask_permutexvar_epi16(_mm512_permutexvar_epi16(odd, _mm512_castps_si512(a)), 0xffff0000, odd,
                                         _mm512_castps_si512(b));
}

#endif
