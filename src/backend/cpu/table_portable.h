/* Entries of the portable table that other files hold; the AVX2 table borrows from here what it lacks. */
#ifndef ERN_BACKEND_CPU_TABLE_PORTABLE_H
#define ERN_BACKEND_CPU_TABLE_PORTABLE_H

#include "backend/cpu/cpu_kernels.h"

void cpu_linear_i8_portable(const cpu_linear_job *j);
void cpu_linear_i4_portable(const cpu_linear_job *j);
void cpu_linear_f8_portable(const cpu_linear_job *j);
void cpu_linear_exact_portable(const cpu_linear_job *j); /* any format: the job's weights say which */
void cpu_quant_int8_portable(int8_t *q, float *scale, int32_t *sum, const float *x, int32_t n);
void cpu_quant_fp8_portable(float *q, float *scale, const float *x, int32_t n);

#endif
