/* The loops that limits.c times, each compiled for its own instructions and called only where the machine has them.
 * Private to the cpu backend.
 *
 * A loop goes `passes` times over data (whole KiB, aligned to 64), or keeps to registers when data is NULL, and returns
 * the operations it did. What it computes is thrown away, in a way that the compiler cannot see. Inputs may be any
 * bytes that are no NaN and no denormals as f32. */
#ifndef ERN_BACKEND_CPU_LIMITS_H
#define ERN_BACKEND_CPU_LIMITS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint64_t limits_loop(const void *data, size_t bytes, int64_t passes);

uint64_t limits_fma_avx2(const void *data, size_t bytes, int64_t passes);
uint64_t limits_fma_avx512(const void *data, size_t bytes, int64_t passes);
uint64_t limits_vnni_int8(const void *data, size_t bytes, int64_t passes);
uint64_t limits_amx_bf16(const void *data, size_t bytes, int64_t passes);
uint64_t limits_amx_int8(const void *data, size_t bytes, int64_t passes);

/* Read every line once; the result depends on all of them. bytes: a multiple of 256. */
uint64_t limits_read_avx512(const void *data, size_t bytes);

enum { LIMITS_IDLE_LOOPS = 512 }; /* products of each register in one pass without data */

#endif
