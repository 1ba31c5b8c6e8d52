/* Which kernel computes a linear. Few rows: weights stream past the rows and memory is the limit (cu_skinny.cu); many:
 * tiles of both (cu_large.cu). Both add up in the same order, so the choice is free at any time. */
#include "backend/cuda/cu_kernels.h"

cudaError_t cu_linear_run(cudaStream_t s, const cu_job *j) {
    return j->n_row <= CU_SKINNY_MAX ? cu_skinny_run(s, j) : cu_large_run(s, j);
}

cudaError_t cu_grouped_run(cudaStream_t s, const cu_grouped_job *j) {
    return j->routes->tile_rows <= CU_SKINNY_MAX ? cu_skinny_grouped(s, j) : cu_large_grouped(s, j);
}
