/* The limit of int8 products with AVX-512 VNNI (vpdpbusd). See limits.h. */
#include "backend/cpu/limits.h"
#include "backend/cpu/vec_avx512.h"

enum { ROWS = 8, LINES = 2 };

#define KEEP(v) __asm__ volatile("" : "+v"(v))

uint64_t limits_vnni_int8(const void *data, size_t bytes, int64_t passes) {
    const __m512i *at = data;
    __m512i sum[ROWS * LINES], x[ROWS];
    CPU_UNROLL for (int i = 0; i < ROWS * LINES; i++) sum[i] = _mm512_setzero_si512();
    CPU_UNROLL for (int r = 0; r < ROWS; r++) {
        x[r] = _mm512_set1_epi8(3);
        KEEP(x[r]);
    }
    const int64_t n = data ? (int64_t)(bytes / (LINES * 64)) : LIMITS_IDLE_LOOPS;
    for (int64_t p = 0; p < passes; p++) {
        for (int64_t i = 0; i < n; i++) {
            CPU_UNROLL for (int l = 0; l < LINES; l++) {
                const __m512i w = data ? _mm512_load_si512(at + i * LINES + l) : x[l];
                CPU_UNROLL for (int r = 0; r < ROWS; r++) sum[l * ROWS + r] =
                    _mm512_dpbusd_epi32(sum[l * ROWS + r], w, x[r]);
            }
        }
    }
    CPU_UNROLL for (int i = 0; i < ROWS * LINES; i++) KEEP(sum[i]);
    return (uint64_t)(passes * n) * ROWS * LINES * 64 * 2;
}
