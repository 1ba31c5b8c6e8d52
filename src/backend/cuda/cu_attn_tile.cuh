/* A tile of keys and values in the shared memory of a block of WARPS warps (4 or 8), and what is computed of it. By
 * warp w: scores of 16 rows and its 128 / WARPS keys; maxima meet in shared memory; weights go there as bf16; then
 * its C / WARPS dimensions of O over all 128 keys in order. Device code only; the law is drawn in cu_attn.cuh. */
#ifndef ERN_BACKEND_CUDA_CU_ATTN_TILE_CUH
#define ERN_BACKEND_CUDA_CU_ATTN_TILE_CUH

#include "backend/cuda/cu_attn.cuh"

static __device__ __forceinline__ void attn_load2(uint32_t r[2], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
}

template <int C, int CODES, int WARPS> struct tile_shape {
    static constexpr int row_bytes = C * (CODES ? 1 : 2);
    static constexpr int chunks = row_bytes / 16; /* of a key or value */
    static constexpr int threads = WARPS * 32;
    static constexpr int q_chunks = C / 8;
    static constexpr int units = C / 16; /* of dimensions */
    static constexpr int warp_units = units >= WARPS ? units / WARPS : 1;
    static constexpr int warp_keys = CU_KEYS / WARPS;
    static constexpr int copies = CU_KEYS * chunks / threads; /* of 16 bytes, a thread's of keys */
    /* shared memory */
    static constexpr int k_at = 0, v_at = k_at + CU_KEYS * row_bytes, q_at = v_at + CU_KEYS * row_bytes;
    static constexpr int p_at = q_at + ATTN_FEW * C * 2;             /* weights for O, [16][128] bf16 */
    static constexpr int l_at = p_at + (CODES ? ATTN_FEW * 256 : 0); /* weights for l (bf16: the same) */
    static constexpr int cell_at = l_at + ATTN_FEW * 256; /* [128] keys of the tile to load: int64 bytes, or */
    static constexpr bool in_rows = WARPS == 4 && !CODES && C == 128;    /* uint32 rows, where memory is short */
    static constexpr int top_at = cell_at + CU_KEYS * (in_rows ? 4 : 8); /* [WARPS][16] maxima */
    static constexpr int scale_at = top_at + WARPS * ATTN_FEW * 4;       /* codes: [128] keys', [2][128] values' */
    static constexpr int end_at = scale_at + (CODES ? 3 * CU_KEYS * 4 : 0);
};

/* A cell to load from: its place in shared memory written and read. */
template <int C, int CODES, int WARPS>
static __device__ __forceinline__ void tile_put_cell(unsigned char *smem, int32_t row, int64_t key) {
    typedef tile_shape<C, CODES, WARPS> sh;
    if (sh::in_rows)
        ((uint32_t *)(smem + sh::cell_at))[row] = (uint32_t)(max(key, (int64_t)0) / sh::row_bytes);
    else
        ((int64_t *)(smem + sh::cell_at))[row] = max(key, (int64_t)0);
}
template <int C, int CODES, int WARPS>
static __device__ __forceinline__ int64_t tile_cell(const unsigned char *smem, int32_t row) {
    typedef tile_shape<C, CODES, WARPS> sh;
    return sh::in_rows ? ((const uint32_t *)(smem + sh::cell_at))[row] * (int64_t)sh::row_bytes
                       : ((const int64_t *)(smem + sh::cell_at))[row];
}

/* Keys (which 0) or values (1) of a tile, from the cells in shared memory; zeros beyond the first `count`. Those from
 * `own` on are not loaded: this step makes them. SHORT: in little code. */
template <int C, int CODES, int WARPS, bool SHORT = false>
static __device__ __forceinline__ void tile_load(const attn_args *a, const unsigned char *kv, unsigned char *smem,
                                                 int which, int32_t count, int32_t own) {
    typedef tile_shape<C, CODES, WARPS> sh;
    const uint32_t to = attn_smem(smem + (which ? sh::v_at : sh::k_at)), chunk = threadIdx.x % sh::chunks;
    const unsigned char *from = kv + (which ? a->value : 0) + chunk * 16;
    if (!SHORT && min(count, own) >= CU_KEYS) { /* nearly always, and no predicates then */
#pragma unroll
        for (int i = 0; i < sh::copies; i++) {
            const uint32_t row = (threadIdx.x + i * sh::threads) / sh::chunks;
            attn_copy16_all(to + attn_at<sh::chunks>(row, chunk),
                            from + tile_cell<C, CODES, WARPS>(smem, (int32_t)row));
        }
        return;
    }
#pragma unroll 1
    for (int i = 0; i < sh::copies; i++) {
        const uint32_t row = (threadIdx.x + i * sh::threads) / sh::chunks;
        const bool real = (int32_t)row < count;
        attn_copy16_if(!real || (int32_t)row < own, to + attn_at<sh::chunks>(row, chunk),
                       from + tile_cell<C, CODES, WARPS>(smem, (int32_t)row), real);
    }
}
/* Codes: the scales of a tile's keys and values, by the first CU_KEYS threads. */
static __device__ __forceinline__ void tile_load_scales(const attn_args *a, const unsigned char *kv, float *key,
                                                        float *value, attn_cell cell, int32_t own) {
    const bool real = cell.scale >= 0;
    if (real && (int32_t)threadIdx.x >= own) return;
    const unsigned char *from = kv + (real ? cell.scale : 0);
    attn_copy4(attn_smem(key + threadIdx.x), from, real);
    attn_copy4(attn_smem(value + threadIdx.x), from + a->value, real);
}

/* Scores of 16 rows and this warp's keys, unscaled; [8 keys][4]. SHORT: in little code. */
template <int C, int CODES, int WARPS, bool SHORT = false>
static __device__ __forceinline__ void tile_scores(float s[][4], const unsigned char *smem, int warp, int lane) {
    typedef tile_shape<C, CODES, WARPS> sh;
    const uint32_t k = attn_smem(smem + sh::k_at), q = attn_smem(smem + sh::q_at);
    const int mi = lane >> 3, l7 = lane & 7;
    constexpr int J = sh::warp_keys / 8;
#pragma unroll
    for (int j = 0; j < J; j++)
        for (int e = 0; e < 4; e++) s[j][e] = 0.0f;
#pragma unroll(SHORT ? 2 : sh::units)
    for (int i = 0; i < sh::units; i++) {
        uint32_t a[4];
        attn_load4(a, q + attn_at<sh::q_chunks>((mi & 1) * 8 + l7, 2 * i + (mi >> 1)));
        if (CODES && J == 4) {
            uint32_t b[4];
            attn_load4(b, k + attn_at<sh::chunks>(warp * 32 + mi * 8 + l7, i));
#pragma unroll
            for (int j = 0; j < J; j++) cu_mma(s[j], a, attn_pair<CODES>(b[j]), attn_pair<CODES>(b[j] >> 8));
        } else if (CODES) {
            uint32_t b[2];
            attn_load2(b, k + attn_at<sh::chunks>(warp * 16 + (mi & 1) * 8 + l7, i));
#pragma unroll
            for (int j = 0; j < J; j++) cu_mma(s[j], a, attn_pair<CODES>(b[j]), attn_pair<CODES>(b[j] >> 8));
        } else {
#pragma unroll
            for (int j = 0; j < J; j += 2) {
                uint32_t b[4];
                attn_load4(
                    b, k + attn_at<sh::chunks>(warp * sh::warp_keys + j * 8 + (mi >> 1) * 8 + l7, 2 * i + (mi & 1)));
                cu_mma(s[j], a, b[0], b[1]);
                cu_mma(s[j + 1], a, b[2], b[3]);
            }
        }
    }
}

/* The largest of the warp's scores of rows g and g + 8, of which a lane has m: to top [WARPS][16]. */
static __device__ __forceinline__ void tile_put_top(float m[2], float *top, int warp, int g, int c) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        m[i] = fmaxf(m[i], __shfl_xor_sync(0xffffffffu, m[i], 1));
        m[i] = fmaxf(m[i], __shfl_xor_sync(0xffffffffu, m[i], 2));
        if (c == 0) top[warp * ATTN_FEW + g + 8 * i] = m[i];
    }
}
/* The largest of all warps' scores. */
template <int WARPS> static __device__ __forceinline__ void tile_top(float m[2], const float *top, int g, float scale) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        m[i] = top[g + 8 * i];
#pragma unroll
        for (int w = 1; w < WARPS; w++) m[i] = fmaxf(m[i], top[w * ATTN_FEW + g + 8 * i]);
        m[i] = __fmul_rn(m[i], scale);
    }
}

/* O [unit][half][4] of this warp's dimensions, and l (rows g, g, g+8, g+8). Codes: half 0 has the even dimensions of
 * the unit, half 1 the odd ones; else the lower and upper eight. */
template <int C, int CODES, int WARPS, bool SHORT = false>
static __device__ __forceinline__ void tile_weigh(float o[][2][4], float l[4], const unsigned char *smem, int warp,
                                                  int lane) {
    typedef tile_shape<C, CODES, WARPS> sh;
    const uint32_t v = attn_smem(smem + sh::v_at), p = attn_smem(smem + sh::p_at), q = attn_smem(smem + sh::l_at);
    const int mi = lane >> 3, l7 = lane & 7;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        l[e] = 0.0f;
        for (int u = 0; u < sh::warp_units; u++) o[u][0][e] = o[u][1][e] = 0.0f;
    }
#pragma unroll(SHORT ? 1 : CU_KEYS / 32)
    for (int pair = 0; pair < CU_KEYS / 32; pair++) { /* 32 keys: two products */
        uint32_t b[sh::warp_units][8];                /* per product: half 0, half 1 */
#pragma unroll
        for (int u = 0; u < sh::warp_units; u++) {
            const int unit = warp * sh::warp_units + u;
            if (CODES) {
                uint32_t w[4];
                attn_load4_t(w, v + attn_at<sh::chunks>(pair * 32 + mi * 8 + l7, unit));
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    b[u][half * 4 + 0] = attn_pair<CODES>(w[half * 2]),
                                    b[u][half * 4 + 1] = attn_pair<CODES>(w[half * 2 + 1]);
                    b[u][half * 4 + 2] = attn_pair<CODES>(w[half * 2] >> 8);
                    b[u][half * 4 + 3] = attn_pair<CODES>(w[half * 2 + 1] >> 8);
                }
            } else {
#pragma unroll
                for (int half = 0; half < 2; half++)
                    attn_load4_t(b[u] + half * 4, v + attn_at<sh::chunks>(pair * 32 + half * 16 + (mi & 1) * 8 + l7,
                                                                          2 * unit + (mi >> 1)));
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int kk = pair * 2 + half;
            uint32_t a[4], al[4];
            attn_load4(a, p + attn_at<16>((mi & 1) * 8 + l7, 2 * kk + (mi >> 1)));
            if (CODES) {
                attn_load4(al, q + attn_at<16>((mi & 1) * 8 + l7, 2 * kk + (mi >> 1)));
                cu_mma(l, al, 0x3f803f80u, 0x3f803f80u);
            } else {
                cu_mma(l, a, 0x3f803f80u, 0x3f803f80u);
            }
#pragma unroll
            for (int u = 0; u < sh::warp_units; u++) {
                cu_mma(o[u][0], a, b[u][half * 4 + 0], b[u][half * 4 + 1]);
                cu_mma(o[u][1], a, b[u][half * 4 + 2], b[u][half * 4 + 3]);
            }
        }
    }
}

#endif
