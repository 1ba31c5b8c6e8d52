/* Kernels over one row, AVX2, and the table of this level. */
#include "backend/cpu/table_avx2.h"
#include "backend/cpu/vec_avx2.h"

#include <math.h>

static void norm(float *y, const float *x, const ern_bf16 *w, int32_t n, float eps) {
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int32_t i = 0; i < n; i += 8) {
        const __m256 v = cpu_load8_cut(x + i, n - i);
        sum[i / 8 % 2] = _mm256_fmadd_ps(v, v, sum[i / 8 % 2]);
    }
    const __m256 r = _mm256_set1_ps(1.0f / sqrtf(cpu_sum1(sum) / (float)n + eps));
    for (int32_t i = 0; i < n; i += 8) {
        const __m256 v = _mm256_mul_ps(cpu_load8_cut(x + i, n - i), r);
        cpu_store8_cut(y + i, n - i, _mm256_mul_ps(v, n - i >= 8 ? cpu_bf16_8(w + i) : cpu_bf16_8_cut(w + i, n - i)));
    }
}

static void silu_mul(float *gate, const float *up, int32_t n) {
    const __m256 one = _mm256_set1_ps(1.0f);
    for (int32_t i = 0; i < n; i += 8) {
        const __m256 g = cpu_load8_cut(gate + i, n - i), u = cpu_load8_cut(up + i, n - i);
        const __m256 s = _mm256_div_ps(g, _mm256_add_ps(one, cpu_exp8(_mm256_sub_ps(_mm256_setzero_ps(), g))));
        cpu_store8_cut(gate + i, n - i, _mm256_mul_ps(s, u));
    }
}

static void rope(float *x, const float *table, int32_t n_head, int32_t C) {
    const __m256i twice = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
    const __m256 even = _mm256_castsi256_ps(_mm256_set1_epi64x(0x80000000));
    for (int32_t i = 0; i < C; i += 8) {
        const __m256 c = _mm256_permutevar8x32_ps(cpu_load8_cut(table + i / 2, (C - i) / 2), twice);
        const __m256 s = _mm256_permutevar8x32_ps(cpu_load8_cut(table + C / 2 + i / 2, (C - i) / 2), twice);
        const __m256 turn = _mm256_xor_ps(s, even);
        for (int32_t h = 0; h < n_head; h++) {
            float *at = x + (int64_t)h * C + i;
            const __m256 v = cpu_load8_cut(at, C - i), other = _mm256_permute_ps(v, 0xb1);
            cpu_store8_cut(at, C - i, _mm256_add_ps(_mm256_mul_ps(v, c), _mm256_mul_ps(other, turn)));
        }
    }
}

static void softmax(float *x, int32_t n) {
    const __m256 none = _mm256_set1_ps(-INFINITY);
    __m256 top = none, sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int32_t i = 0; i < n; i += 8)
        top = _mm256_max_ps(
            top, _mm256_blendv_ps(none, cpu_load8_cut(x + i, n - i), _mm256_castsi256_ps(cpu_lanes8(n - i))));
    const __m256 max = _mm256_set1_ps(cpu_max1(top));
    for (int32_t i = 0; i < n; i += 8) {
        __m256 e = cpu_exp8(_mm256_sub_ps(cpu_load8_cut(x + i, n - i), max));
        e = _mm256_and_ps(e, _mm256_castsi256_ps(cpu_lanes8(n - i)));
        cpu_store8_cut(x + i, n - i, e);
        sum[i / 8 % 2] = _mm256_add_ps(sum[i / 8 % 2], e);
    }
    const __m256 all = _mm256_set1_ps(cpu_sum1(sum));
    for (int32_t i = 0; i < n; i += 8) cpu_store8_cut(x + i, n - i, _mm256_div_ps(cpu_load8_cut(x + i, n - i), all));
}

const cpu_kernels cpu_kernels_avx2 = {
    .level = ERN_CPU_AVX2,
    .name = "avx2",
    .linear_bf16 = {[ERN_ORDER_OUT_IN] = cpu_linear_out_in_avx2, [ERN_ORDER_IN_OUT] = cpu_linear_in_out_avx2},
    .exact_bf16 = {[ERN_ORDER_OUT_IN] = cpu_linear_out_in_avx2, [ERN_ORDER_IN_OUT] = cpu_linear_in_out_avx2},
    .panel_out = CPU_PANEL_LINES,
    .linear_i8 = cpu_linear_i8_avx2,
    .linear_i4 = cpu_linear_i4_avx2,
    .linear_f8 = cpu_linear_f8_avx2,
    .exact_i8 = cpu_exact_i8_avx2,
    .exact_i4 = cpu_exact_i4_avx2,
    .exact_f8 = cpu_exact_f8_avx2,
    .quant_int8 = cpu_quant_int8_avx2,
    .quant_fp8 = cpu_quant_fp8_avx2,
    .linear_f32 = cpu_linear_f32_avx2,
    .norm = norm,
    .silu_mul = silu_mul,
    .rope = rope,
    .softmax = softmax,
    .attn_block = {cpu_attn_bf16_avx2, cpu_attn_int8_avx2},
    .attn_join = cpu_attn_join_avx2,
    .attn_divide = cpu_attn_divide_avx2,
};
