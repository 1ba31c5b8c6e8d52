/* The attention kernels against the machine's FMA rate and read bandwidth, of one thread and the same minute.
 *
 *   bench_attn [context 8192] [heads of the group 8] [rounds 5]
 *
 * prefill: 64 rows at the end of the context, block by block, each row alone, joined one by one (the step joins by
 * chains, and AMX has rows at once); 4 C operations a head, row and position.
 * decode: one row, walking over so many caches in turn that none is left in the processor's caches; bytes as stored. */
#include <immintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "backend/cpu/cpu_kernels.h"
#include "base/os.h"

enum { C = 128, P = 64, ROWS = 64, COLD_BYTES = 256 << 20 };

#define TARGET __attribute__((target("avx512f")))

/* GFLOP/s of 16 independent chains of 512-bit FMAs. */
TARGET static double fma_rate(void) {
    __m512 a[16], x = _mm512_set1_ps(0.999f);
    for (int i = 0; i < 16; i++) a[i] = _mm512_set1_ps((float)i);
    const int64_t begin_us = ern_now_us(), n = 4000000;
    for (int64_t k = 0; k < n; k++) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) a[i] = _mm512_fmadd_ps(a[i], x, x);
        __asm__ volatile("" : "+v"(x));
    }
    const double s = (double)(ern_now_us() - begin_us) * 1e-6;
    __m512 sum = a[0];
    for (int i = 1; i < 16; i++) sum = _mm512_add_ps(sum, a[i]);
    volatile float keep = _mm512_reduce_add_ps(sum);
    (void)keep;
    return (double)n * 16 * 32 / s * 1e-9;
}

/* GB/s of reading. */
static double read_rate(const unsigned char *data, size_t bytes) {
    typedef uint64_t wide __attribute__((vector_size(64)));
    wide a = {0}, b = {0};
    const int64_t begin_us = ern_now_us();
    for (size_t i = 0; i + 128 <= bytes; i += 128) {
        a ^= *(const wide *)(const void *)(data + i);
        b ^= *(const wide *)(const void *)(data + i + 64);
    }
    a ^= b;
    volatile uint64_t keep = a[0] ^ a[7];
    (void)keep;
    return (double)bytes / ((double)(ern_now_us() - begin_us) * 1e-6) * 1e-9;
}

typedef struct cache {
    cpu_kv_view view;
    int64_t bytes; /* of K and V */
} cache;

/* n_cache caches side by side in `memory`. */
static cache cache_at(unsigned char *memory, const int32_t *page, int32_t n_page, bool int8, int64_t which) {
    const int64_t plane = cpu_kv_plane_bytes(P, C, int8), bytes = 2 * plane * n_page;
    unsigned char *at = memory + which * bytes;
    return (cache){{.k = at, .v = at + plane, .page = page, .page_stride = 2 * plane, .n_cell = P, .int8 = int8},
                   bytes};
}

static void attend(const cpu_kernels *k, float *acc, float *part, const float *q, int32_t n_head, const cpu_kv_view *kv,
                   int32_t row0, int32_t n_row) {
    static cpu_kv_block block[2];
    const int64_t each = cpu_part_floats(C);
    for (int32_t at = 0; at < row0 + n_row; at += CPU_ATTN_BLOCK) {
        const int32_t end = row0 + n_row, left = end - at < CPU_ATTN_BLOCK ? end - at : CPU_ATTN_BLOCK;
        cpu_kv_block *found = &block[at / CPU_ATTN_BLOCK % 2], *next = &block[(at / CPU_ATTN_BLOCK + 1) % 2];
        if (at == 0) cpu_kv_find(found, kv, C, at, left);
        if (at + left < end) {
            const int32_t more = end - at - left;
            cpu_kv_find(next, kv, C, at + left, more < CPU_ATTN_BLOCK ? more : CPU_ATTN_BLOCK);
            found->next = next;
            next->cold = false;
        }
        for (int32_t r = 0; r < n_row; r++) {
            const int32_t n = row0 + r + 1 - at < CPU_ATTN_BLOCK ? row0 + r + 1 - at : CPU_ATTN_BLOCK;
            if (n <= 0) continue;
            k->attn_block[kv->int8](at ? part : acc + r * each, q + (int64_t)r * n_head * C, n_head, C, 0.1f, found, n);
            if (at) k->attn_join(acc + r * each, part, n_head, C);
            found->next = NULL;
            found->cold = false;
        }
    }
}

int main(int argc, char **argv) {
    const int32_t context = argc > 1 ? atoi(argv[1]) : 8192, n_head = argc > 2 ? atoi(argv[2]) : 8;
    const int rounds = argc > 3 ? atoi(argv[3]) : 5;
    const int32_t n_page = context / P;
    const cpu_kernels *k = cpu_kernels_for(ern_cpu_level_here());
    unsigned char *memory = aligned_alloc(2 << 20, COLD_BYTES);
    int32_t *page = malloc((size_t)n_page * sizeof *page);
    float *q = malloc(sizeof *q * ROWS * (size_t)n_head * C);
    float *acc = malloc(sizeof *acc * (ROWS + 1) * (size_t)cpu_part_floats(C));
    if (!memory || !page || !q || !acc || context < ROWS || n_head < 1 || n_head > CPU_HEAD_TILE) return 2;
    (void)madvise(memory, COLD_BYTES, MADV_HUGEPAGE);
    memset(memory, 0, COLD_BYTES);
    for (int32_t i = 0; i < n_page; i++) page[i] = (i * 7 + 3) % n_page;
    for (int64_t i = 0; i < ROWS * (int64_t)n_head * C; i++) q[i] = (float)(i % 17) * 0.01f;
    for (int r = 0; r < rounds; r++) {
        const double peak = fma_rate(), band = read_rate(memory, COLD_BYTES);
        printf("%s, context %d, %d heads: FMA %.0f GFLOP/s, read %.1f GB/s\n", ern_cpu_level_name(k->level), context,
               n_head, peak, band);
        for (int int8 = 0; int8 < 2; int8++) {
            const cache warm = cache_at(memory, page, n_page, int8, 0);
            int64_t begin_us = ern_now_us();
            attend(k, acc, acc + ROWS * cpu_part_floats(C), q, n_head, &warm.view, context - ROWS, ROWS);
            double s = (double)(ern_now_us() - begin_us) * 1e-6;
            const double rate = 4.0 * C * n_head * ROWS * (context - ROWS / 2) / s * 1e-9;
            const int64_t n_cache = COLD_BYTES / warm.bytes;
            begin_us = ern_now_us();
            for (int64_t i = 0; i < n_cache; i++) {
                const cache cold = cache_at(memory, page, n_page, int8, i);
                attend(k, acc, acc + cpu_part_floats(C), q, n_head, &cold.view, context - 1, 1);
            }
            s = (double)(ern_now_us() - begin_us) * 1e-6;
            const double bytes = (double)(n_cache * warm.bytes) / s * 1e-9;
            const double ops = 4.0 * C * n_head * context * (double)n_cache / s * 1e-9;
            printf("  %s prefill %.0f GFLOP/s (%.0f%%)   decode %.1f GB/s (%.0f%%), %.0f GFLOP/s (%.0f%%)\n",
                   int8 ? "int8" : "bf16", rate, 100 * rate / peak, bytes, 100 * bytes / band, ops, 100 * ops / peak);
        }
    }
    return 0;
}
