/* Entries of the AVX2 table that live in other files than the table; the AVX-512 table without VNNI borrows the integer
 * ones. */
#ifndef ERN_BACKEND_CPU_TABLE_AVX2_H
#define ERN_BACKEND_CPU_TABLE_AVX2_H

#include "backend/cpu/cpu_kernels.h"

void cpu_linear_out_in_avx2(const cpu_linear_job *j);
void cpu_linear_in_out_avx2(const cpu_linear_job *j);
void cpu_linear_f32_avx2(float *y, const float *x, const float *w, int32_t n_out, int32_t n_in);
void cpu_linear_i8_avx2(const cpu_linear_job *j);
void cpu_linear_i4_avx2(const cpu_linear_job *j);
void cpu_linear_f8_avx2(const cpu_linear_job *j);
void cpu_exact_i8_avx2(const cpu_linear_job *j);
void cpu_exact_i4_avx2(const cpu_linear_job *j);
void cpu_exact_f8_avx2(const cpu_linear_job *j);
void cpu_quant_int8_avx2(int8_t *q, float *scale, int32_t *sum, const float *x, int32_t n);
void cpu_quant_fp8_avx2(float *q, float *scale, const float *x, int32_t n);
void cpu_attn_bf16_avx2(float *part, const float *q, int32_t n_head, int32_t head_dim, float scale,
                        const cpu_kv_block *kv, int32_t n);
void cpu_attn_int8_avx2(float *part, const float *q, int32_t n_head, int32_t head_dim, float scale,
                        const cpu_kv_block *kv, int32_t n);
void cpu_attn_join_avx2(float *acc, const float *part, int32_t n_head, int32_t head_dim);
void cpu_attn_divide_avx2(float *out, const float *acc, int32_t n_head, int32_t head_dim);

#endif
