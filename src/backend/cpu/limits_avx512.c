/* Limits with AVX-512: f32 FMA, and reading memory. See limits.h. */
#include "backend/cpu/limits.h"
#include "backend/cpu/vec_avx512.h"

enum { ROWS = 8, LINES = 2 }; /* 16 sums: enough for two FMA units of latency 4 */

/* Keep what would be thrown away. */
#define KEEP(v) __asm__ volatile("" : "+v"(v))

uint64_t limits_fma_avx512(const void *data, size_t bytes, int64_t passes) {
    const float *at = data;
    __m512 sum[ROWS * LINES], x[ROWS];
    CPU_UNROLL for (int i = 0; i < ROWS * LINES; i++) sum[i] = _mm512_setzero_ps();
    CPU_UNROLL for (int r = 0; r < ROWS; r++) {
        x[r] = _mm512_set1_ps(0.5f);
        KEEP(x[r]);
    }
    const int64_t n = data ? (int64_t)(bytes / (LINES * 64)) : LIMITS_IDLE_LOOPS;
    for (int64_t p = 0; p < passes; p++) {
        for (int64_t i = 0; i < n; i++) {
            __m512 w[LINES];
            CPU_UNROLL for (int l = 0; l < LINES; l++) {
                w[l] = data ? _mm512_load_ps(at + (i * LINES + l) * 16) : x[l];
                CPU_UNROLL for (int r = 0; r < ROWS; r++) sum[l * ROWS + r] =
                    _mm512_fmadd_ps(x[r], w[l], sum[l * ROWS + r]);
            }
        }
    }
    CPU_UNROLL for (int i = 0; i < ROWS * LINES; i++) KEEP(sum[i]);
    return (uint64_t)(passes * n) * ROWS * LINES * 16 * 2;
}

/* Four lines a step in the order of memory, fetched ahead into L1 by the hardware's own prefetcher. */
uint64_t limits_read_avx512(const void *data, size_t bytes) {
    const __m512i *at = data;
    __m512i sum[4];
    CPU_UNROLL for (int i = 0; i < 4; i++) sum[i] = _mm512_setzero_si512();
    for (size_t i = 0; i < bytes / 64; i += 4) {
        CPU_UNROLL for (int l = 0; l < 4; l++) sum[l] = _mm512_xor_si512(sum[l], _mm512_load_si512(at + i + (size_t)l));
    }
    sum[0] = _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
    return (uint64_t)_mm512_reduce_or_epi64(sum[0]); /* a sum of signed numbers could overflow */
}
