/* Kernels over one row, AVX-512, and the table of this level. */
#include "backend/cpu/table_avx2.h"
#include "backend/cpu/table_avx512.h"
#include "backend/cpu/vec_avx512.h"

#include <math.h>

static void norm(float *y, const float *x, const ern_bf16 *w, int32_t n, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int32_t i = 0; i < n; i += 16) {
        __m512 v = _mm512_maskz_loadu_ps(cpu_mask(n - i), x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    const __m512 r = _mm512_set1_ps(1.0f / sqrtf(cpu_sum1(sum) / (float)n + eps));
    for (int32_t i = 0; i < n; i += 16) {
        __mmask16 m = cpu_mask(n - i);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + i), r);
        _mm512_mask_storeu_ps(y + i, m, _mm512_mul_ps(v, cpu_load_bf16_mask(w + i, m)));
    }
}

static void silu_mul(float *gate, const float *up, int32_t n) {
    for (int32_t i = 0; i < n; i += 16) {
        const __mmask16 m = cpu_mask(n - i);
        const __m512 s = cpu_silu16(_mm512_maskz_loadu_ps(m, gate + i), _mm512_maskz_loadu_ps(m, up + i));
        _mm512_mask_storeu_ps(gate + i, m, s);
    }
}

static void rope(float *x, const float *table, int32_t n_head, int32_t C) {
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512 even = _mm512_castsi512_ps(_mm512_set1_epi64(0x80000000));
    for (int32_t i = 0; i < C; i += 16) {
        const __mmask16 m = cpu_mask(C - i), half = cpu_mask((C - i) / 2) & 0xff;
        const __m512 c = _mm512_permutexvar_ps(twice, _mm512_maskz_loadu_ps(half, table + i / 2));
        const __m512 s = _mm512_permutexvar_ps(twice, _mm512_maskz_loadu_ps(half, table + C / 2 + i / 2));
        const __m512 turn = _mm512_xor_ps(s, even);
        for (int32_t h = 0; h < n_head; h++) {
            float *at = x + (int64_t)h * C + i;
            const __m512 v = _mm512_maskz_loadu_ps(m, at), other = _mm512_permute_ps(v, 0xb1);
            _mm512_mask_storeu_ps(at, m, _mm512_add_ps(_mm512_mul_ps(v, c), _mm512_mul_ps(other, turn)));
        }
    }
}

static void softmax(float *x, int32_t n) {
    const __m512 none = _mm512_set1_ps(-INFINITY);
    __m512 top = none, sum = _mm512_setzero_ps();
    for (int32_t i = 0; i < n; i += 16) top = _mm512_max_ps(top, _mm512_mask_loadu_ps(none, cpu_mask(n - i), x + i));
    const __m512 max = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int32_t i = 0; i < n; i += 16) {
        __mmask16 m = cpu_mask(n - i);
        __m512 e = cpu_exp16(_mm512_sub_ps(_mm512_mask_loadu_ps(none, m, x + i), max));
        _mm512_mask_storeu_ps(x + i, m, e);
        sum = _mm512_add_ps(sum, e);
    }
    const __m512 all = _mm512_set1_ps(cpu_sum1(sum));
    for (int32_t i = 0; i < n; i += 16) {
        __mmask16 m = cpu_mask(n - i);
        _mm512_mask_storeu_ps(x + i, m, _mm512_div_ps(_mm512_maskz_loadu_ps(m, x + i), all));
    }
}

/* What the four tables have in common. */
#define ROWS_AND_FLOATS                                                                                           \
    .exact_bf16 = {[ERN_ORDER_OUT_IN] = cpu_linear_out_in_avx512, [ERN_ORDER_IN_OUT] = cpu_linear_in_out_avx512}, \
    .linear_f8 = cpu_linear_f8_avx512, .exact_i8 = cpu_exact_i8_avx512, .exact_i4 = cpu_exact_i4_avx512,          \
    .exact_f8 = cpu_exact_f8_avx512, .quant_int8 = cpu_quant_int8_avx512, .quant_fp8 = cpu_quant_fp8_avx512,      \
    .linear_f32 = cpu_linear_f32_avx512, .norm = norm, .silu_mul = silu_mul, .silu_int8 = cpu_silu_int8_avx512,   \
    .rope = rope, .softmax = softmax, .attn_join = cpu_attn_join_avx512, .attn_divide = cpu_attn_divide_avx512
#define LINEAR_F32                                                                                                 \
    .linear_bf16 = {[ERN_ORDER_OUT_IN] = cpu_linear_out_in_avx512, [ERN_ORDER_IN_OUT] = cpu_linear_in_out_avx512}, \
    .panel_out = CPU_PANEL_LINES
#define ATTN_F32 .attn_block = {cpu_attn_bf16_avx512, cpu_attn_int8_avx512}

const cpu_kernels cpu_kernels_avx512 = {.level = ERN_CPU_AVX512,
                                        .name = "avx512",
                                        .linear_i8 = cpu_linear_i8_avx2,
                                        .linear_i4 = cpu_linear_i4_avx2,
                                        LINEAR_F32,
                                        ATTN_F32,
                                        ROWS_AND_FLOATS};
const cpu_kernels cpu_kernels_vnni = {.level = ERN_CPU_AVX512,
                                      .name = "avx512 vnni",
                                      .linear_i8 = cpu_linear_i8_vnni,
                                      .linear_i4 = cpu_linear_i4_vnni,
                                      LINEAR_F32,
                                      ATTN_F32,
                                      ROWS_AND_FLOATS};
const cpu_kernels cpu_kernels_bf16 = {.level = ERN_CPU_AVX512,
                                      .name = "avx512 vnni bf16",
                                      .linear_i8 = cpu_linear_i8_vnni,
                                      .linear_i4 = cpu_linear_i4_vnni,
                                      .attn_block = {cpu_attn_bf16_bf16, cpu_attn_int8_avx512},
                                      .attn_rounds = true,
                                      LINEAR_F32,
                                      ROWS_AND_FLOATS};
const cpu_kernels cpu_kernels_amx = {.level = ERN_CPU_AMX,
                                     .name = "amx",
                                     .linear_bf16 = {cpu_linear_bf16_amx, cpu_linear_bf16_amx},
                                     .linear_rounds = true,
                                     .panel_out = CPU_PANEL_TILES,
                                     .round_bf16 = cpu_round_bf16_amx,
                                     .linear_i8 = cpu_linear_i8_amx,
                                     .linear_i4 = cpu_linear_i4_amx,
                                     .attn_block = {cpu_attn_bf16_amx, cpu_attn_int8_amx},
                                     .attn_rounds = true,
                                     .attn_fixed = true,
                                     .attn_rows = cpu_attn_rows_amx,
                                     ROWS_AND_FLOATS};
