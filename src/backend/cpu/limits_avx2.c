/* The limit of f32 FMA with AVX2. See limits.h. */
#include <immintrin.h>

#include "backend/cpu/limits.h"
#include "backend/cpu/vec.h"

#define KEEP(v) __asm__ volatile("" : "+x"(v))

enum { ROWS = 4, LINES = 2, HALVES = 8 }; /* a line is two registers; 8 sums cover two units of latency 4 */

uint64_t limits_fma_avx2(const void *data, size_t bytes, int64_t passes) {
    const float *at = data;
    __m256 sum[ROWS * LINES], x[ROWS];
    CPU_UNROLL for (int i = 0; i < ROWS * LINES; i++) sum[i] = _mm256_setzero_ps();
    CPU_UNROLL for (int r = 0; r < ROWS; r++) {
        x[r] = _mm256_set1_ps(0.5f);
        KEEP(x[r]);
    }
    const int64_t n = data ? (int64_t)(bytes / (LINES * 32)) : LIMITS_IDLE_LOOPS;
    for (int64_t p = 0; p < passes; p++) {
        for (int64_t i = 0; i < n; i++) {
            CPU_UNROLL for (int l = 0; l < LINES; l++) {
                const __m256 w = data ? _mm256_load_ps(at + (i * LINES + l) * HALVES) : x[l];
                CPU_UNROLL for (int r = 0; r < ROWS; r++) sum[l * ROWS + r] =
                    _mm256_fmadd_ps(x[r], w, sum[l * ROWS + r]);
            }
        }
    }
    CPU_UNROLL for (int i = 0; i < ROWS * LINES; i++) KEEP(sum[i]);
    return (uint64_t)(passes * n) * ROWS * LINES * HALVES * 2;
}
