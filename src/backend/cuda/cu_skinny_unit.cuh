/* A unit of packed weights, one segment of a band, by one warp: its codes as the tensor core takes them, and where its
 * sums meet those of other segments. What the kernels for few rows share; device code only. */
#ifndef ERN_BACKEND_CUDA_CU_SKINNY_UNIT_CUH
#define ERN_BACKEND_CUDA_CU_SKINNY_UNIT_CUH

#include "backend/cuda/cu_device.cuh"

template <cu_format F> struct skinny_shape {
    static const int UNIT = F == CU_BF16 ? 4096 : F == CU_I4 ? 1024 : 2048; /* bytes of a segment of a band */
    static const int SLOT = UNIT + (F == CU_F8 ? 16 : 0);                   /* fp8: the segment's scale behind it */
    static const int DEPTH = F == CU_BF16 ? 2 : F == CU_I4 ? 6 : 4;
};

/* Where (row r, output o) lies in a partial: the halves of every second pair of rows change places, so that a warp's
 * writes meet a bank twice at most and its reads once. */
static __device__ __forceinline__ int32_t skinny_part_at(int32_t r, int32_t o) {
    return r * CU_BAND + (o ^ ((r & 2) << 2));
}

/* The A operand of the four products of a group from the lane's bytes. slot: with the lane's 16 bytes added. */
template <cu_format F>
static __device__ __forceinline__ void skinny_codes(uint32_t a[4][4], const unsigned char *slot, int group) {
    if (F == CU_BF16) {
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const uint4 v = *(const uint4 *)(slot + (group * 4 + s) * 512);
            a[s][0] = v.x, a[s][1] = v.y, a[s][2] = v.z, a[s][3] = v.w;
        }
    } else if (F == CU_I4) {
        const uint4 v = *(const uint4 *)(slot + group * 512);
        const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
            for (int k = 0; k < 4; k++) a[s][k] = cu_i4_pair(word[s] >> (4 * k));
    } else {
#pragma unroll
        for (int t = 0; t < 2; t++) {
            const uint4 v = *(const uint4 *)(slot + (group * 2 + t) * 512);
            const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const uint32_t w = word[k / 2] >> (8 * (k % 2));
                a[2 * t + k / 4][k % 4] = F == CU_I8 ? cu_i8_pair(w) : cu_f8_pair(w);
            }
        }
    }
}

/* Half of a group, of codes smaller than bf16, from the lane's bytes of it (I4: 8 of them): the A operand of two
 * products. */
template <cu_format F> static __device__ __forceinline__ void skinny_unpack_half(uint32_t a[2][4], uint4 v) {
    if (F == CU_I4) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            a[0][k] = cu_i4_pair(v.x >> (4 * k));
            a[1][k] = cu_i4_pair(v.y >> (4 * k));
        }
    } else {
        const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const uint32_t w = word[k / 2] >> (8 * (k % 2));
            a[k / 4][k % 4] = F == CU_I8 ? cu_i8_pair(w) : cu_f8_pair(w);
        }
    }
}
/* The same from its slot. half: group * 2 + h, of products 2 h and 2 h + 1. */
template <cu_format F>
static __device__ __forceinline__ void skinny_codes_half(uint32_t a[2][4], const unsigned char *slot, int half) {
    if (F == CU_I4) {
        const uint2 v = *(const uint2 *)(slot + half / 2 * 512 + half % 2 * 8);
        skinny_unpack_half<F>(a, make_uint4(v.x, v.y, 0, 0));
    } else {
        skinny_unpack_half<F>(a, *(const uint4 *)(slot + half * 512));
    }
}

/* A unit's results to its place among the partial sums. */
static __device__ __forceinline__ void skinny_put(float *p, const float acc[4], int32_t n_row, int g, int c) {
    const int32_t r = 2 * c;
    if (r < n_row) {
        p[skinny_part_at(r, g)] = acc[0];
        p[skinny_part_at(r, g + 8)] = acc[2];
    }
    if (r + 1 < n_row) {
        p[skinny_part_at(r + 1, g)] = acc[1];
        p[skinny_part_at(r + 1, g + 8)] = acc[3];
    }
}

#endif
