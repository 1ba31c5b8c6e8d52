/* AVX2 pieces that the *_avx2.c files of bf16 weights, rows and attention share. Included by nothing else.
 *
 * A sum over 16 lanes is a pair of registers here, lanes 0..7 and 8..15, and trees and series are those of
 * vec_avx512.h. */
#ifndef ERN_BACKEND_CPU_VEC_AVX2_H
#define ERN_BACKEND_CPU_VEC_AVX2_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "backend/cpu/cpu_kernels.h"
#include "backend/cpu/vec.h"
#include "base/half.h"

/* All ones in the first n lanes of 8; n may be below 0 or above 8. */
CPU_INLINE __m256i cpu_lanes8(int64_t n) {
    const int32_t k = n > 8 ? 8 : n < 0 ? 0 : (int32_t)n;
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(k), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
/* p[0..n) and zeros; nothing else is read or written. */
CPU_INLINE __m256 cpu_load8_cut(const float *p, int64_t n) { return _mm256_maskload_ps(p, cpu_lanes8(n)); }
CPU_INLINE void cpu_store8_cut(float *p, int64_t n, __m256 v) { _mm256_maskstore_ps(p, cpu_lanes8(n), v); }

/* bf16 is the upper half of an f32. */
CPU_INLINE __m256 cpu_widen8(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
CPU_INLINE __m256 cpu_bf16_8(const ern_bf16 *p) {
    return cpu_widen8(_mm_loadu_si128((const __m128i *)(const void *)p));
}
CPU_INLINE __m256 cpu_bf16_8_cut(const ern_bf16 *p, int64_t n) {
    ern_bf16 room[8] = {0};
    if (n > 0) memcpy(room, p, (size_t)(n < 8 ? n : 8) * sizeof *room);
    return cpu_bf16_8(room);
}

/* Sum the 16 lanes of each of four pairs with one tree: lanes i and i+8, then i and i+4, then i and i+2, then the last
 * two. Lane n of the result belongs to argument n. */
CPU_INLINE __m128 cpu_fold(const __m256 a[2]) {
    const __m256 y = _mm256_add_ps(a[0], a[1]);
    return _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
}
CPU_INLINE __m128 cpu_tree4(__m128 x0, __m128 x1, __m128 x2, __m128 x3) {
    const __m128 s01 = _mm_add_ps(_mm_unpacklo_ps(x0, x1), _mm_unpackhi_ps(x0, x1));
    const __m128 s23 = _mm_add_ps(_mm_unpacklo_ps(x2, x3), _mm_unpackhi_ps(x2, x3));
    return _mm_add_ps(_mm_movelh_ps(s01, s23), _mm_movehl_ps(s23, s01));
}
CPU_INLINE float cpu_sum1(const __m256 a[2]) {
    const __m128 z = _mm_setzero_ps();
    return _mm_cvtss_f32(cpu_tree4(cpu_fold(a), z, z, z));
}
/* The largest of 8 lanes. */
CPU_INLINE float cpu_max1(__m256 a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

/* p * 2^n, n an integer of -126..127 in f32. */
CPU_INLINE __m256 cpu_scale8(__m256 p, __m256 n) {
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

/* exp(x) and, for x <= 0, 2^x: see vec_avx512.h. NaN stays: it survives the series, and whatever its power is. */
CPU_INLINE __m256 cpu_exp8(__m256 x) {
    const __m256 low = _mm256_cmp_ps(x, _mm256_set1_ps(-87.3f), _CMP_LT_OQ);
    x = _mm256_min_ps(_mm256_set1_ps(88.0f), x); /* the second operand is the result when one is NaN */
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(0x1.715476p+0f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e4p-1f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.7f7d1cp-20f), r);
    __m256 p = _mm256_set1_ps(1.0f / 5040);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 720));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    return _mm256_andnot_ps(low, cpu_scale8(p, n));
}
CPU_INLINE __m256 cpu_exp2_8(__m256 x) {
    const __m256 is_normal = _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
    const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 r = _mm256_sub_ps(x, n);
    __m256 p = _mm256_set1_ps(0x1.ffcbfcp-17f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.430912p-13f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.5d87fep-10f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.3b2ab6p-7f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.c6b08ep-5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.ebfbep-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0x1.62e43p-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    return _mm256_and_ps(is_normal, cpu_scale8(p, n));
}

#endif
