/* Entries of the AVX-512 tables (avx512, vnni, amx) that live in other files than the tables. */
#ifndef ERN_BACKEND_CPU_TABLE_AVX512_H
#define ERN_BACKEND_CPU_TABLE_AVX512_H

#include "backend/cpu/cpu_kernels.h"

void cpu_linear_out_in_avx512(const cpu_linear_job *j);
void cpu_linear_in_out_avx512(const cpu_linear_job *j);
void cpu_silu_int8_avx512(int8_t *q, float *scale, int32_t *sum, const float *gate, const float *up);
void cpu_linear_f32_avx512(float *y, const float *x, const float *w, int32_t n_out, int32_t n_in);
void cpu_linear_f8_avx512(const cpu_linear_job *j);
void cpu_exact_i8_avx512(const cpu_linear_job *j);
void cpu_exact_i4_avx512(const cpu_linear_job *j);
void cpu_exact_f8_avx512(const cpu_linear_job *j);
void cpu_quant_int8_avx512(int8_t *q, float *scale, int32_t *sum, const float *x, int32_t n);
void cpu_quant_fp8_avx512(float *q, float *scale, const float *x, int32_t n);
void cpu_linear_i8_vnni(const cpu_linear_job *j);
void cpu_linear_i4_vnni(const cpu_linear_job *j);
void cpu_linear_i8_ahead(const cpu_linear_job *j); /* the same, few rows fetching ahead: faster on Xeons only */
void cpu_linear_i4_ahead(const cpu_linear_job *j);
void cpu_linear_i8_amx(const cpu_linear_job *j);
void cpu_linear_i4_amx(const cpu_linear_job *j);
void cpu_linear_bf16_amx(const cpu_linear_job *j); /* of either order, or panels */
void cpu_round_bf16_amx(ern_bf16 *q, const float *x, int32_t n);
void cpu_attn_rows_amx(const cpu_attn_job *j);
void cpu_attn_bf16_amx(float *part, const float *q, int32_t n_head, int32_t head_dim, float scale,
                       const cpu_kv_block *kv, int32_t n);
void cpu_attn_int8_amx(float *part, const float *q, int32_t n_head, int32_t head_dim, float scale,
                       const cpu_kv_block *kv, int32_t n);
void cpu_attn_bf16_avx512(float *part, const float *q, int32_t n_head, int32_t head_dim, float scale,
                          const cpu_kv_block *kv, int32_t n);
void cpu_attn_bf16_bf16(float *part, const float *q, int32_t n_head, int32_t head_dim, float scale,
                        const cpu_kv_block *kv, int32_t n);
void cpu_attn_int8_avx512(float *part, const float *q, int32_t n_head, int32_t head_dim, float scale,
                          const cpu_kv_block *kv, int32_t n);
void cpu_attn_join_avx512(float *acc, const float *part, int32_t n_head, int32_t head_dim);
void cpu_attn_divide_avx512(float *out, const float *acc, int32_t n_head, int32_t head_dim);

#endif
