/* Attention of sequences with many rows, for GPUs without wgmma and copy engine: a block takes 128 packed rows of a
 * sequence and KV head, a warp 16 of them, and walks the tiles of keys that they see, first tile first. Scores, weights
 * and sums stay in registers. There are two places for keys and one for values, as the cache has them: a tile's values
 * and the next tile's keys are on their way while its keys are worked on. Blocks take (sequence, rows, head) from a
 * list with the longest walks first. The law is drawn in cu_attn.cuh. */
#include "backend/cuda/cu_attn_rows.cuh"

enum { THREADS = 256, SHARED_MOST = 99 * 1024 }; /* what the smallest of these GPUs has */

template <int C, int CODES> struct prefill_shape {
    static constexpr int row_bytes = C * (CODES ? 1 : 2), chunks = row_bytes / 16;
    static constexpr int units = C / 16;                /* of dimensions */
    static constexpr int group = units < 4 ? units : 4; /* units of O at a time */
    /* shared memory: keys of two tiles, values of one; scales of keys and values of two tiles, if they are codes; where
     * two tiles' keys are in the cache, and their scales */
    static constexpr int side = CU_KEYS * row_bytes, v_at = 2 * side, scale_at = 3 * side;
    static constexpr int cell_at = scale_at + (CODES ? 4 * CU_KEYS * 4 : 0);
    static constexpr int next_at = cell_at + (CODES ? 4 : 2) * CU_KEYS * (int)sizeof(int64_t);
    static constexpr int bytes = next_at + 16;
    static_assert(bytes <= SHARED_MOST, "shared memory");
};

/* cells [2][128]: bytes from a->kv to a key; of codes [2][128] more: to its scale. */
template <int C, int CODES> static __device__ __forceinline__ void put_cell(int64_t *cells, int at, attn_cell cell) {
    cells[at] = cell.key;
    if (CODES) cells[2 * CU_KEYS + at] = cell.scale;
}
/* Start copying the keys (from a->kv) or values (from there + a->value) of a tile; of codes the scales of both,
 * [2][128]. */
template <int C, int CODES>
static __device__ __forceinline__ void load_side(const unsigned char *from, const int64_t *cells, uint32_t to) {
    typedef prefill_shape<C, CODES> sh;
    for (int n = threadIdx.x; n < CU_KEYS * sh::chunks; n += THREADS) {
        const int row = n / sh::chunks, chunk = n % sh::chunks;
        const int64_t at = cells[row];
        attn_copy16(to + attn_at<sh::chunks>(row, chunk), from + (at < 0 ? 0 : at + chunk * 16), at >= 0);
    }
}
static __device__ __forceinline__ void load_scales(const attn_args *a, const int64_t *cells, float *scale) {
    const int row = threadIdx.x & (CU_KEYS - 1), which = threadIdx.x / CU_KEYS;
    const int64_t at = cells[2 * CU_KEYS + row];
    attn_copy4(attn_smem(scale + which * CU_KEYS + row), a->kv + (which ? a->value : 0) + (at < 0 ? 0 : at), at >= 0);
}

/* From a tile's scores to its values. */
typedef struct weights {
    uint32_t p[8][4];
    float f[2], b[2];
    bool seen[2];
} weights;

/* Scores of 16 rows and 128 keys, unscaled. */
template <int C, int CODES>
static __device__ __forceinline__ void score_tile(float s[16][4], const rows<C> *w, uint32_t k) {
    typedef prefill_shape<C, CODES> sh;
    const int lane = threadIdx.x & 31, mi = lane >> 3, l7 = lane & 7;
#pragma unroll
    for (int j = 0; j < 16; j++)
        for (int e = 0; e < 4; e++) s[j][e] = 0.0f;
#pragma unroll
    for (int i = 0; i < sh::units; i++) {
        if (CODES) {
#pragma unroll
            for (int j = 0; j < 16; j += 4) {
                uint32_t b[4];
                attn_load4(b, k + attn_at<sh::chunks>(j * 8 + mi * 8 + l7, i));
#pragma unroll
                for (int n = 0; n < 4; n++)
                    cu_mma(s[j + n], w->q[i], attn_pair<CODES>(b[n]), attn_pair<CODES>(b[n] >> 8));
            }
        } else {
#pragma unroll
            for (int j = 0; j < 16; j += 2) {
                uint32_t b[4];
                attn_load4(b, k + attn_at<sh::chunks>(j * 8 + (mi >> 1) * 8 + l7, 2 * i + (mi & 1)));
                cu_mma(s[j], w->q[i], b[0], b[1]);
                cu_mma(s[j + 1], w->q[i], b[2], b[3]);
            }
        }
    }
}

/* Scores become weights; M and L go on. scale (codes): [2][128]. cut: some row may not see all of the tile. */
template <int C, int CODES>
static __device__ __forceinline__ void soften(weights *to, float s[16][4], rows<C> *w, const float *scale, int32_t key0,
                                              bool cut, float score_scale) {
    const int c = threadIdx.x & 3;
    float m[2] = {-INFINITY, -INFINITY}, base[2];
#pragma unroll
    for (int j = 0; j < 16; j++) {
        float2 of = make_float2(1.0f, 1.0f);
        if (CODES) of = *(const float2 *)(scale + j * 8 + 2 * c);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[j][e] = attn_score<CODES>(s[j][e], e & 1 ? of.y : of.x);
            if (cut && key0 + j * 8 + 2 * c + (e & 1) > w->pos[e >> 1]) s[j][e] = -INFINITY;
            m[e >> 1] = fmaxf(m[e >> 1], s[j][e]);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        m[i] = fmaxf(m[i], __shfl_xor_sync(0xffffffffu, m[i], 1));
        m[i] = __fmul_rn(fmaxf(m[i], __shfl_xor_sync(0xffffffffu, m[i], 2)), score_scale);
        to->seen[i] = key0 <= w->pos[i];
        base[i] = to->seen[i] ? m[i] : 0.0f;
    }
    float l[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int kk = 0; kk < 8; kk++) {
        uint32_t pl[4]; /* rows g, g+8 of the lower eight keys, then of the upper */
#pragma unroll
        for (int x = 0; x < 4; x++) {
            const int j = 2 * kk + (x >> 1), i = x & 1;
            const float p0 = attn_weight(s[j][2 * i], score_scale, base[i]);
            const float p1 = attn_weight(s[j][2 * i + 1], score_scale, base[i]);
            pl[x] = to->p[kk][x] = cu_round2(p0, p1);
            if (CODES) {
                const float2 of = *(const float2 *)(scale + CU_KEYS + j * 8 + 2 * c);
                to->p[kk][x] = cu_round2(attn_scaled(p0, of.x), attn_scaled(p1, of.y));
            }
        }
        cu_mma(l, pl, 0x3f803f80u, 0x3f803f80u);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (!to->seen[i]) continue;
        attn_factors(&w->M[i], m[i], &to->f[i], &to->b[i]);
        w->L[i] = attn_join(w->L[i], l[2 * i], to->f[i], to->b[i]);
    }
}

/* O of the tile, joined to what was before. */
template <int C, int CODES>
static __device__ __forceinline__ void weigh_tile(rows<C> *w, const weights *by, uint32_t v) {
    typedef prefill_shape<C, CODES> sh;
    const int lane = threadIdx.x & 31, mi = lane >> 3, l7 = lane & 7;
#pragma unroll
    for (int first = 0; first < sh::units; first += sh::group) {
        float o[sh::group][2][4];
#pragma unroll
        for (int u = 0; u < sh::group; u++)
            for (int e = 0; e < 8; e++) o[u][e >> 2][e & 3] = 0.0f;
#pragma unroll
        for (int kk = 0; kk < 8; kk += 2) { /* 32 keys: two products */
#pragma unroll
            for (int u = 0; u < sh::group; u++) {
                uint32_t x[4];
                if (CODES) {
                    attn_load4_t(x, v + attn_at<sh::chunks>(kk * 16 + mi * 8 + l7, first + u));
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                        cu_mma(o[u][0], by->p[kk + k], attn_pair<CODES>(x[2 * k]), attn_pair<CODES>(x[2 * k + 1]));
                        cu_mma(o[u][1], by->p[kk + k], attn_pair<CODES>(x[2 * k] >> 8),
                               attn_pair<CODES>(x[2 * k + 1] >> 8));
                    }
                } else {
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                        attn_load4_t(
                            x, v + attn_at<sh::chunks>((kk + k) * 16 + (mi & 1) * 8 + l7, 2 * (first + u) + (mi >> 1)));
                        cu_mma(o[u][0], by->p[kk + k], x[0], x[1]);
                        cu_mma(o[u][1], by->p[kk + k], x[2], x[3]);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (!by->seen[i]) continue;
#pragma unroll
            for (int u = 0; u < sh::group; u++)
                for (int e = 0; e < 4; e++) {
                    float *acc = &w->acc[first + u][e >> 1][2 * i + (e & 1)];
                    *acc = attn_join(*acc, o[u][e >> 1][2 * i + (e & 1)], by->f[i], by->b[i]);
                }
        }
    }
}

template <int C, int CODES> static __global__ void __launch_bounds__(THREADS, 1) prefill_kernel(const attn_args a) {
    typedef prefill_shape<C, CODES> sh;
    extern __shared__ __align__(128) unsigned char smem[];
    int64_t *cells = (int64_t *)(smem + sh::cell_at);
    float *scales = (float *)(smem + sh::scale_at);
    int32_t *handed = (int32_t *)(smem + sh::next_at);
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, c = lane & 3;
    const uint32_t keys = attn_smem(smem), values = keys + sh::v_at;
    const int32_t *list = attn_wide(a.work, a.n_seq);
    const int32_t n_item = a.work[ATTN_N_WIDE] * a.n_kv_head;
    for (int32_t item = blockIdx.x; item < n_item;) {
        int32_t taken = 0;
        if (tid == 0) taken = atomicAdd(a.work + ATTN_WIDE_TAKEN, 1);
        const rows_item it = rows_item_of(&a, list, item);
        rows<C> w;
        const int32_t mine = it.first + warp * 16;
        w.low = mine + 15 < it.n ? it.pos0 + mine / a.group : -1;
        w.top = mine < it.n ? it.pos0 + (min(mine + 16, it.n) - 1) / a.group : -1;
        const cu_bf16 *q[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int32_t r = mine + g + 8 * i, t = r / a.group;
            w.pos[i] = r < it.n ? it.pos0 + t : -1;
            q[i] = rows_q<C>(&a, &it, r);
        }
        rows_begin<C, CODES>(&w, q);

        /* the cells of tiles 0 and 1, then the keys of tile 0 */
        put_cell<C, CODES>(
            cells, tid, attn_cell_of<C, CODES, false>(&a, attn_page_of<false>(&a, it.seq, tid, it.len), it.head, tid));
        __syncthreads();
        load_side<C, CODES>(a.kv, cells, keys);
        if (CODES) load_scales(&a, cells, scales);
        attn_copy_commit();
        for (int32_t tile = 0; tile < it.n_tile; tile++) {
            const int turn = tile & 1;
            const int64_t *next = cells + (turn ^ 1) * CU_KEYS;
            const int32_t key0 = tile * CU_KEYS;
            const bool works = key0 <= w.top, cut = key0 + CU_KEYS - 1 > w.low;
            float s[16][4];
            weights by;
            attn_copy_wait<0>();
            __syncthreads(); /* keys are there; nobody reads the keys and values of the tile before any more */
            load_side<C, CODES>(a.kv + a.value, cells + turn * CU_KEYS, values);
            attn_copy_commit();
            if (tile + 1 < it.n_tile) {
                load_side<C, CODES>(a.kv, next, keys + (turn ^ 1) * sh::side);
                if (CODES) load_scales(&a, next, scales + (turn ^ 1) * 2 * CU_KEYS);
            }
            attn_copy_commit(); /* an empty group counts as well */
            attn_cell later = {-1, -1};
            if (tid < CU_KEYS && tile + 2 < it.n_tile) {
                const int32_t at = key0 + 2 * CU_KEYS + tid;
                later = attn_cell_of<C, CODES, false>(&a, attn_page_of<false>(&a, it.seq, at, it.len), it.head, at);
            }
            if (works) {
                score_tile<C, CODES>(s, &w, keys + turn * sh::side);
                soften<C, CODES>(&by, s, &w, scales + turn * 2 * CU_KEYS, key0, cut, a.scale);
            }
            attn_copy_wait<1>();
            __syncthreads(); /* values are there; all copies from this tile's cells are under way */
            if (tid < CU_KEYS) put_cell<C, CODES>(cells, turn * CU_KEYS + tid, later);
            if (works) weigh_tile<C, CODES>(&w, &by, values);
        }
        attn_copy_wait<0>();

#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int32_t r = mine + g + 8 * i, t = r / a.group, h = it.head * a.group + r - t * a.group;
            if (r >= it.n) continue;
            cu_bf16 *out = a.out + (int64_t)(it.row0 + t) * a.ldo + (int64_t)h * C;
#pragma unroll
            for (int u = 0; u < sh::units; u++) {
                const float *lower = w.acc[u][0] + 2 * i, *upper = w.acc[u][1] + 2 * i;
                const float x[4] = {lower[0], CODES ? upper[0] : lower[1], CODES ? lower[1] : upper[0], upper[1]};
                const int first = u * 16 + (CODES ? 4 * c : 2 * c), second = first + (CODES ? 2 : 8);
                *(uint32_t *)(out + first) = cu_round2(__fdiv_rn(x[0], w.L[i]), __fdiv_rn(x[1], w.L[i]));
                *(uint32_t *)(out + second) = cu_round2(__fdiv_rn(x[2], w.L[i]), __fdiv_rn(x[3], w.L[i]));
            }
        }
        if (tid == 0) *handed = taken + (int32_t)gridDim.x;
        __syncthreads(); /* also: nobody reads the last tile any more */
        item = *handed;
    }
    if (tid == 0) attn_wide_done(a.work);
}

/* ---- launches ---------------------------------------------------------------------------------------------------- */

template <int C, int CODES> static cudaError_t run_codes(cudaStream_t s, const attn_args *a) {
    typedef prefill_shape<C, CODES> sh;
    static uint64_t ready;
    const cudaError_t e = cu_shared_bytes(&ready, (const void *)prefill_kernel<C, CODES>, sh::bytes);
    if (e != cudaSuccess) return e;
    prefill_kernel<C, CODES><<<attn_wide_blocks(a, attn_sm_count()), THREADS, sh::bytes, s>>>(*a);
    return cudaGetLastError();
}

template <int C> static cudaError_t run(cudaStream_t s, const attn_args *a, int codes) {
    return codes == ATTN_I8   ? run_codes<C, ATTN_I8>(s, a)
           : codes == ATTN_F8 ? run_codes<C, ATTN_F8>(s, a)
                              : run_codes<C, 0>(s, a);
}

cudaError_t attn_prefill(cudaStream_t s, const attn_args *a, int32_t C, int codes) {
    switch (C) {
    case 16: return run<16>(s, a, codes);
    case 64: return run<64>(s, a, codes);
    case 128: return run<128>(s, a, codes);
    default: return cudaErrorInvalidValue;
    }
}
