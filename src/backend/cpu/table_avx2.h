/* Entries of the AVX2 table that quant_avx2.c holds; the AVX-512 table without VNNI borrows the integer ones. */
#ifndef ERN_BACKEND_CPU_TABLE_AVX2_H
#define ERN_BACKEND_CPU_TABLE_AVX2_H

#include "backend/cpu/cpu_kernels.h"

void cpu_linear_i8_avx2(const cpu_linear_job *j);
void cpu_linear_i4_avx2(const cpu_linear_job *j);
void cpu_linear_f8_avx2(const cpu_linear_job *j);
void cpu_exact_i8_avx2(const cpu_linear_job *j);
void cpu_exact_i4_avx2(const cpu_linear_job *j);
void cpu_exact_f8_avx2(const cpu_linear_job *j);
void cpu_quant_int8_avx2(int8_t *q, float *scale, int32_t *sum, const float *x, int32_t n);

#endif
