/* Stored weights to packed ones (cu_kernels.h draws both ends): a warp makes one group of 16 outputs by 64 inputs, lane
 * 4 g + c what it will one day feed to the tensor core (of bytes of A8: what pack_place says). Elements are fetched one
 * by one, whatever the source: this runs once, while the bus brings the next tensor, and the cache makes whole lines of
 * it. pack_fetch, pack_lane and pack_place have no device code, so that a program on the CPU can hold them against the
 * drawing. */
#include "backend/cuda/cu_device.cuh"
#include "backend/cuda/cu_kernels.h"
#include "model/quant.h"

enum { GROUP_IN = 64, WARPS = 8 };

typedef struct pack_source {
    const void *raw;
    int64_t stride;
    int32_t n_out, n_in, n_tile; /* n_tile: tiles of 64 inputs in a band, of the quantized */
} pack_source;

/* Rows of 8 bits meet these. */
static __host__ __device__ constexpr bool pack_a8(cu_format f) { return f == CU_F8A8 || f == CU_I8A8 || f == CU_I4A8; }

/* Code of element (o, i) as the destination has it: bf16 bits, two's complement byte, q + 8 (I4A8: two's complement
 * nibble), e4m3 byte. */
template <cu_format F, bool OUT_IN>
static __host__ __device__ __forceinline__ uint32_t pack_fetch(const pack_source *s, int32_t o, int32_t i) {
    const uint32_t zero = F == CU_I4 ? 8 : 0;
    if (o >= s->n_out || i >= s->n_in) return zero;
    if (F == CU_BF16) {
        const uint16_t *x = (const uint16_t *)s->raw;
        return x[OUT_IN ? o * s->stride + i : i * s->stride + o];
    }
    const uint8_t *x = (const uint8_t *)s->raw;
    const int32_t a = o % ERN_TILE_OUT, b = i % ERN_TILE_IN;
    const int64_t tile = (int64_t)(o / ERN_TILE_OUT) * s->n_tile + i / ERN_TILE_IN;
    if (F == CU_F8 || F == CU_F8A8) return x[tile * 1024 + 16 * b + a];
    if (F == CU_I8 || F == CU_I8A8) return x[tile * 1024 + 64 * (b / 4) + 4 * a + b % 4] ^ 0x80u;
    const uint32_t two = x[tile * 512 + 64 * (b / 8) + 4 * a + b % 4];
    return (b % 8 < 4 ? two & 15 : two >> 4) ^ (F == CU_I4A8 ? 8 : 0);
}

/* The eight codes e0..e7 of one lane and product to words: 4 of them (bf16), 2 (bytes), 1 (nibbles). */
template <cu_format F> static __host__ __device__ __forceinline__ void pack_words(uint32_t *out, const uint32_t e[8]) {
    if (F == CU_BF16) {
        for (int k = 0; k < 4; k++) out[k] = e[2 * k] | e[2 * k + 1] << 16;
    } else if (F == CU_I4) {
        out[0] = e[0] | e[2] << 4 | e[4] << 8 | e[6] << 12 | e[1] << 16 | e[3] << 20 | e[5] << 24 | e[7] << 28;
    } else {
        out[0] = e[0] | e[2] << 8 | e[1] << 16 | e[3] << 24;
        out[1] = e[4] | e[6] << 8 | e[5] << 16 | e[7] << 24;
    }
}

/* All of a lane's words of the group at inputs i0.., outputs o0..; word k of the result goes to 16-byte vector
 * k / 4 * 32 + lane of the group: that is [s][lane] for bf16, [s/2][lane] for bytes, [lane] for nibbles. Of A8 word k
 * is that of product k / 4 and register k % 4; pack_place says where it goes. */
template <cu_format F, bool OUT_IN>
static __host__ __device__ __forceinline__ void pack_lane(uint32_t *word, const pack_source *src, int32_t o0,
                                                          int32_t i0, int lane) {
    const int words = F == CU_BF16 ? 4 : F == CU_I4 ? 1 : 2;
    const int32_t lo = o0 + lane / 4, hi = lo + 8;
    for (int k = 0; F == CU_I4A8 && k < 4; k++) word[k] = 0;
    for (int k = 0; pack_a8(F) && k < 8; k++) { /* product k / 4, register k % 4 */
        const int32_t o = k % 2 ? hi : lo, i = i0 + k / 4 * 32 + k % 4 / 2 * 16 + lane % 4 * 4;
        uint32_t reg = 0;
        for (int j = 0; j < 4; j++) reg |= pack_fetch<F, OUT_IN>(src, o, i + j) << (8 * j);
        if (F == CU_I4A8)
            word[k % 4] |= reg << (k < 4 ? 4 : 0);
        else
            word[k] = reg;
    }
    for (int s = 0; !pack_a8(F) && s < 4; s++) {
        uint32_t e[8];
        for (int j = 0; j < 4; j++) {
            const int32_t i = i0 + 16 * s + 2 * (lane % 4) + j / 2 * 8 + j % 2;
            const int k = j / 2 * 4 + j % 2;
            e[k] = pack_fetch<F, OUT_IN>(src, lo, i);
            e[k + 2] = pack_fetch<F, OUT_IN>(src, hi, i);
        }
        pack_words<F>(word + s * words, e);
    }
}

/* The byte of a band's segment where word k of a lane goes, in codes of bytes of A8. */
static __host__ __device__ __forceinline__ int pack_place(int32_t group, int k, int lane) {
    const int r = k % 2 * 8 + lane / 4, piece = group % 2 * 4 + k / 2;
    return r * CU_SEGMENT + (piece ^ (r & 7)) * 16 + lane % 4 * 4;
}

/* Block: 8 warps, 8 groups of a band. Grid: x groups, y bands in turns. */
template <cu_format F, bool OUT_IN>
static __global__ void pack_kernel(unsigned char *pack, float *scale, pack_source src, const void *raw_scale,
                                   int32_t n_seg, int32_t first_band, int32_t band_step) {
    const int lane = threadIdx.x & 31, vectors = F == CU_BF16 ? 4 : F == CU_I4 || F == CU_I4A8 ? 1 : 2;
    const int32_t group = blockIdx.x * WARPS + threadIdx.x / 32, n_band = CU_BANDS(src.n_out);
    if (group >= 2 * n_seg) return;
    for (int32_t b = blockIdx.y; b < n_band; b += gridDim.y) {
        const int64_t band = first_band + (int64_t)b * band_step;
        uint32_t word[4 * vectors];
        pack_lane<F, OUT_IN>(word, &src, b * CU_BAND, group * GROUP_IN, lane);
        /* groups before this one, segments before its own */
        const int64_t seg_at = pack_a8(F) ? (band / CU_A8_BANDS * n_seg + group / 2) * CU_A8_BANDS + band % CU_A8_BANDS
                                          : band * n_seg + group / 2;
        if (F == CU_F8A8 || F == CU_I8A8) {
#pragma unroll
            for (int k = 0; k < 8; k++)
                *(uint32_t *)(pack + seg_at * (CU_BAND * CU_SEGMENT) + pack_place(group, k, lane)) = word[k];
        } else {
            uint4 *out = (uint4 *)(pack + (seg_at * 2 + group % 2) * (512 * vectors));
#pragma unroll
            for (int v = 0; v < vectors; v++)
                out[v * 32 + lane] = make_uint4(word[4 * v], word[4 * v + 1], word[4 * v + 2], word[4 * v + 3]);
        }
        if ((F == CU_F8 || F == CU_F8A8) && group % 2 == 0 && lane == 0)
            scale[seg_at] = ((const float *)raw_scale)[(int64_t)(b * CU_BAND / ERN_F8_BLOCK) * n_seg + group / 2];
        if (F != CU_BF16 && F != CU_F8 && F != CU_F8A8 && group == 0 && lane < CU_BAND) {
            const int32_t o = b * CU_BAND + lane;
            const float one = o < src.n_out ? cu_f32(((const cu_bf16 *)raw_scale)[o]) : 0.0f;
            scale[band * CU_BAND + lane] = F == CU_I4A8 ? one * 0.0625f : one;
        }
    }
}

template <cu_format F, bool OUT_IN>
static cudaError_t pack_launch(cudaStream_t s, const cu_linear *dst, const pack_source *src, const void *raw_scale,
                               int32_t first_band, int32_t band_step) {
    const int32_t n_band = CU_BANDS(src->n_out);
    const dim3 grid((2 * dst->n_seg + WARPS - 1) / WARPS, n_band < 65535 ? n_band : 65535);
    pack_kernel<F, OUT_IN><<<grid, WARPS * 32, 0, s>>>((unsigned char *)dst->pack, (float *)dst->scale, *src, raw_scale,
                                                       dst->n_seg, first_band, band_step);
    return cudaGetLastError();
}

cudaError_t cu_pack(cudaStream_t s, const cu_linear *dst, const ern_linear *src, const void *raw, const void *raw_scale,
                    int32_t first_band, int32_t band_step) {
    const pack_source from = {raw, src->stride, src->n_out, src->n_in, (src->n_in + ERN_TILE_IN - 1) / ERN_TILE_IN};
    if (src->n_out <= 0 || src->n_in <= 0 || CU_PAD(src->n_in) / CU_SEGMENT != dst->n_seg) return cudaErrorInvalidValue;
    if (dst->format != CU_BF16 && (!raw_scale || !dst->scale)) return cudaErrorInvalidValue;
    switch (dst->format) {
    case CU_BF16:
        if (src->dtype != ERN_DTYPE_BF16 || src->order == ERN_ORDER_TILED) return cudaErrorInvalidValue;
        if (src->order == ERN_ORDER_OUT_IN)
            return pack_launch<CU_BF16, true>(s, dst, &from, raw_scale, first_band, band_step);
        return pack_launch<CU_BF16, false>(s, dst, &from, raw_scale, first_band, band_step);
    case CU_I8:
        if (src->dtype != ERN_DTYPE_I8) return cudaErrorInvalidValue;
        return pack_launch<CU_I8, true>(s, dst, &from, raw_scale, first_band, band_step);
    case CU_I4:
        if (src->dtype != ERN_DTYPE_I4) return cudaErrorInvalidValue;
        return pack_launch<CU_I4, true>(s, dst, &from, raw_scale, first_band, band_step);
    case CU_F8:
        if (src->dtype != ERN_DTYPE_F8E4M3) return cudaErrorInvalidValue;
        return pack_launch<CU_F8, true>(s, dst, &from, raw_scale, first_band, band_step);
    case CU_F8A8:
        if (src->dtype != ERN_DTYPE_F8E4M3) return cudaErrorInvalidValue;
        return pack_launch<CU_F8A8, true>(s, dst, &from, raw_scale, first_band, band_step);
    case CU_I8A8:
        if (src->dtype != ERN_DTYPE_I8) return cudaErrorInvalidValue;
        return pack_launch<CU_I8A8, true>(s, dst, &from, raw_scale, first_band, band_step);
    case CU_I4A8:
        if (src->dtype != ERN_DTYPE_I4) return cudaErrorInvalidValue;
        return pack_launch<CU_I4A8, true>(s, dst, &from, raw_scale, first_band, band_step);
    }
    return cudaErrorInvalidValue;
}
