/* Which kernel computes a linear. Few rows: weights stream past the rows and memory is the limit (cu_skinny.cu); some
 * hundred: still so, in tiles that blocks share (cu_mid.cu), or in tiles of a warpgroup (cu_broad.cu); many: the tensor
 * cores are the limit (cu_large.cu). All add up in the same order, so the choice is free at any time. */
#include "backend/cuda/cu_kernels.h"

enum {
    TILE_ROWS = 128, /* of cu_large.cu */
    TILE_BANDS = 8,
    CORES = 132, /* of the chip on which the choice was measured */
};

/* Tiles of 128 rows and 128 outputs pay where they leave little of the chip without work: three quarters at work are
 * enough, of codes that are turned into bf16 less than a half, since small tiles do so more often. */
static bool large_pays(const cu_job *j) {
    const int64_t n_row = (j->n_row + TILE_ROWS - 1) / TILE_ROWS, n_out = (j->w.n_band + TILE_BANDS - 1) / TILE_BANDS;
    const int64_t room = (n_row * n_out + CORES - 1) / CORES * CORES * (TILE_ROWS * TILE_BANDS);
    return (int64_t)j->n_row * j->w.n_band * 100 > room * (j->w.format == CU_BF16 ? 75 : 45);
}

/* Tiles of a warpgroup pay from 65 rows on where the chip holds all of them at once, of short matrices twice as many;
 * of very long ones a cluster is to share the tile. */
static bool broad_pays(const cu_job *j) {
    enum { ROWS = 64, ROWS_MOST = 512, BANDS = 4, SHORT = 8, LONG = 24 /* segments */ };
    const int64_t n_tile = (int64_t)((j->n_row + ROWS - 1) / ROWS) * ((j->w.n_band + BANDS - 1) / BANDS);
    return !j->w.pairs && j->n_row > ROWS && j->n_row <= ROWS_MOST && j->w.n_seg <= LONG &&
           n_tile <= (j->w.n_seg <= SHORT ? 2 : 1) * CORES;
}

static cudaError_t run(cudaStream_t s, const cu_job *j) {
    const bool a8 = cu_codes_of(j->w.format) != CU_CODES_NONE;
    if (j->n_row <= CU_SKINNY_MAX) return a8 ? cu_a8_skinny_run(s, j) : cu_skinny_run(s, j);
    if (large_pays(j)) return a8 ? cu_a8_large_run(s, j) : cu_large_run(s, j);
    return a8 ? cu_a8_mid_run(s, j) : broad_pays(j) ? cu_broad_run(s, j) : cu_mid_run(s, j);
}

/* The large kernels rotate and store heads of y themselves. */
cudaError_t cu_linear_run(cudaStream_t s, const cu_job *j) {
    if (!j->rope || (j->n_row > CU_SKINNY_MAX && large_pays(j) && cu_rope_fits(j->rope))) return run(s, j);
    cu_job one = *j;
    one.rope = NULL;
    const cudaError_t e = run(s, &one);
    return e == cudaSuccess ? cu_rope_store(s, j->y, false, j->rope) : e;
}

cudaError_t cu_grouped_run(cudaStream_t s, const cu_grouped_job *j) {
    const int32_t rows = j->routes->tile_rows;
    if (cu_codes_of(j->shape.format) != CU_CODES_NONE)
        return rows < TILE_ROWS ? cu_a8_mid_grouped(s, j) : cu_a8_large_grouped(s, j);
    return rows <= CU_SKINNY_MAX ? cu_skinny_grouped(s, j)
           : rows < TILE_ROWS    ? cu_mid_grouped(s, j)
                                 : cu_large_grouped(s, j);
}
