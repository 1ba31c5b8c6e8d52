/* The loops that limits.c times, each compiled for its own instructions and called only where the machine has them.
 * Private to the cpu backend.
 *
 * A loop goes `passes` times over data (whole KiB, aligned to 64), or keeps to registers when data is NULL, and returns
 * the operations it did. What it computes is thrown away, in a way that the compiler cannot see. Inputs:
 * limits_numbers, of codes where they are multiplied. */
#ifndef ERN_BACKEND_CPU_LIMITS_H
#define ERN_BACKEND_CPU_LIMITS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/counter.h"

/* Eight bytes of what loops multiply. A processor multiplies zeros and ones with less power, and so AMX on a Xeon up to
 * a sixth faster than what a model has (docs/speed.md). Codes: any. Floats: every half is a bf16 between 1/2 and 2 of
 * either sign, which makes every four bytes such an f32. */
static inline uint64_t limits_numbers(uint64_t i, bool codes) {
    const uint64_t any = ern_counter64(1, i);
    return codes ? any : (any & 0x80ff80ff80ff80ff) | 0x3f003f003f003f00;
}

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
