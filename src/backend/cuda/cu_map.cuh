/* Rows of bf16, and packed weights, in device memory as the copy engine wants them described. Host code. */
#ifndef ERN_BACKEND_CUDA_CU_MAP_CUH
#define ERN_BACKEND_CUDA_CU_MAP_CUH

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

/* Up to three dimensions, the nearest first; stride in bytes, from the second on. What lies beyond is zeros. */
static inline cudaError_t cu_map_any(CUtensorMap *map, CUtensorMapDataType type, CUtensorMapSwizzle swizzle,
                                     uint32_t rank, const void *at, const cuuint64_t *size, const cuuint64_t *stride,
                                     const cuuint32_t *box) {
    static void *encode;
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
        cudaError_t e =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
        if (e != cudaSuccess) return e;
        if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    }
    const cuuint32_t step[] = {1, 1, 1};
    const CUresult r = ((PFN_cuTensorMapEncodeTiled_v12000)encode)(
        map, type, rank, (void *)(uintptr_t)at, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}
/* n_row rows of n_col numbers, stride_bytes apart, from `at` on, in boxes of box_row rows by box_col columns, which
 * come to lie in the 128-byte swizzle; beyond the rows are zeros. */
static inline cudaError_t cu_map_rows(CUtensorMap *map, const void *at, uint64_t n_col, uint64_t n_row,
                                      uint64_t stride_bytes, uint32_t box_col, uint32_t box_row) {
    const cuuint64_t size[] = {n_col, n_row}, stride[] = {stride_bytes};
    const cuuint32_t box[] = {box_col, box_row};
    return cu_map_any(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_SWIZZLE_128B, 2, at, size, stride, box);
}
/* The same rows in pieces of 64 columns: a box is 128 columns of box_row rows, [2 pieces][row][64]. */
static inline cudaError_t cu_map_pieces(CUtensorMap *map, const void *at, uint64_t n_piece, uint64_t n_row,
                                        uint64_t stride_bytes, uint32_t box_row) {
    const cuuint64_t size[] = {64, n_row, n_piece}, stride[] = {stride_bytes, 128};
    const cuuint32_t box[] = {64, box_row, 2};
    return cu_map_any(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_SWIZZLE_128B, 3, at, size, stride, box);
}
/* Packed weights: a box is two groups of box_band bands, as they lie. */
static inline cudaError_t cu_map_bands(CUtensorMap *map, const void *at, uint64_t group_bytes, uint64_t n_group,
                                       uint64_t n_band, uint32_t box_band) {
    const cuuint64_t size[] = {group_bytes / 8, n_group, n_band}, stride[] = {group_bytes, group_bytes * n_group};
    const cuuint32_t box[] = {(cuuint32_t)(group_bytes / 8), 2, box_band};
    return cu_map_any(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT64, CU_TENSOR_MAP_SWIZZLE_NONE, 3, at, size, stride, box);
}

#endif
