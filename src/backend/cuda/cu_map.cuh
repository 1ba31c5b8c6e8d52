/* Rows of bf16 in device memory as the copy engine wants them described. Host code. */
#ifndef ERN_BACKEND_CUDA_CU_MAP_CUH
#define ERN_BACKEND_CUDA_CU_MAP_CUH

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

/* n_row rows of n_col numbers, stride_bytes apart, from `at` on, in boxes of box_row rows by box_col columns, which
 * come to lie in the 128-byte swizzle; beyond the rows are zeros. */
static inline cudaError_t cu_map_rows(CUtensorMap *map, const void *at, uint64_t n_col, uint64_t n_row,
                                      uint64_t stride_bytes, uint32_t box_col, uint32_t box_row) {
    static void *encode;
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
        cudaError_t e =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
        if (e != cudaSuccess) return e;
        if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    }
    const cuuint64_t size[] = {n_col, n_row}, stride[] = {stride_bytes};
    const cuuint32_t box[] = {box_col, box_row}, step[] = {1, 1};
    const CUresult r = ((PFN_cuTensorMapEncodeTiled_v12000)encode)(
        map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)(uintptr_t)at, size, stride, box, step,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#endif
