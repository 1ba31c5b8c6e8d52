/* The limits of AMX: products of tiles of int8 and of bf16. See limits.h.
 *
 * Four products a step, in a block of 2 x 2 tiles, so that each of the four sums has the time of three others to
 * finish; two tiles of A and two of B are read for them:
 *
 *            B6    B7
 *      A4  [ T0 ][ T1 ]
 *      A5  [ T2 ][ T3 ] */
#include <immintrin.h>
#include <string.h>

#include "backend/cpu/limits.h"

enum { TILE = 1024, STEP = 4 * TILE };

/* Palette 1: 8 tiles of 16 rows of 64 bytes. */
typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;
_Static_assert(sizeof(tile_config) == 64, "as the processor reads it");

static void tiles_begin(bool codes) {
    _Alignas(64) uint64_t numbers[TILE / sizeof(uint64_t)];
    _Alignas(64) tile_config c;
    for (uint64_t i = 0; i < TILE / sizeof *numbers; i++) numbers[i] = limits_numbers(i, codes);
    memset(&c, 0, sizeof c);
    c.palette = 1;
    for (int i = 0; i < 8; i++) c.row_bytes[i] = 64, c.rows[i] = 16;
    __asm__ volatile("" : : "r"(&c) : "memory"); /* the intrinsic tells the compiler of 8 of the 64 bytes only */
    _tile_loadconfig(&c);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    __asm__ volatile("" : : "r"(numbers) : "memory"); /* the intrinsic does not say that it reads them */
    _tile_loadd(4, numbers, 64);
    _tile_loadd(5, numbers, 64);
    _tile_loadd(6, numbers, 64);
    _tile_loadd(7, numbers, 64);
}

#define LOAD_STEP(at)                        \
    do {                                     \
        _tile_loadd(4, (at), 64);            \
        _tile_loadd(5, (at) + TILE, 64);     \
        _tile_loadd(6, (at) + 2 * TILE, 64); \
        _tile_loadd(7, (at) + 3 * TILE, 64); \
    } while (0)

/* The body of both loops; only the product differs, and its operands must be constants. */
#define RATE_LOOP(product, operations_of_product, codes)                      \
    do {                                                                      \
        const unsigned char *from = data;                                     \
        const int64_t n = data ? (int64_t)(bytes / STEP) : LIMITS_IDLE_LOOPS; \
        tiles_begin(codes);                                                   \
        for (int64_t p = 0; p < passes; p++) {                                \
            for (int64_t i = 0; i < n; i++) {                                 \
                if (data) LOAD_STEP(from + i * STEP);                         \
                product(0, 4, 6);                                             \
                product(1, 4, 7);                                             \
                product(2, 5, 6);                                             \
                product(3, 5, 7);                                             \
            }                                                                 \
        }                                                                     \
        _tile_release();                                                      \
        return (uint64_t)(passes * n) * 4 * (operations_of_product);          \
    } while (0)

uint64_t limits_amx_int8(const void *data, size_t bytes, int64_t passes) {
    RATE_LOOP(_tile_dpbssd, (uint64_t)16 * 16 * 64 * 2, true);
}

uint64_t limits_amx_bf16(const void *data, size_t bytes, int64_t passes) {
    RATE_LOOP(_tile_dpbf16ps, (uint64_t)16 * 16 * 32 * 2, false);
}
