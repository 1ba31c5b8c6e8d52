/* Attention of sequences with many rows: a block takes 128 packed rows of a sequence and KV head and walks the tiles of
 * keys that they see, first tile first; scores, weights and sums stay in registers, and the next tile is on its way
 * while one is worked on. Blocks take (sequence, rows, head) from a list with the longest walks first. Where blocks of
 * 64 rows find a multiprocessor each, as those of a small piece of a long prompt do, they have no more: twice as many
 * walk, and each the faster. No row meets another one, so its bits stay.
 *
 * C = 128, which the models have: wide_kernel of cu_attn_wide.cuh. Other sizes: prefill_kernel, eight warps of 16 rows.
 * There BF16 tiles are copied into two buffers in turn. Others are copied as codes and made bf16 once for all warps,
 * keys in the order of inputs that cu_attn.cuh has for codes, so that the products see what the other kernels' see. */
#include "backend/cuda/cu_attn_rows.cuh"
#include "backend/cuda/cu_attn_wide.cuh"
#include "backend/cuda/cu_map.cuh"

enum { THREADS = 256 };

template <int C, int CODES> struct prefill_shape {
    static constexpr int row_bytes = C * (CODES ? 1 : 2), chunks = row_bytes / 16; /* in the cache */
    static constexpr int wide = C / 8;                                             /* chunks of a bf16 row */
    static constexpr int units = C / 16;
    static constexpr int group = units < 4 ? units : 4; /* units of O at a time */
    static constexpr int side = CU_KEYS * C * 2;        /* bytes of bf16 keys or values */
    static constexpr int code_side = CU_KEYS * C;
    /* shared memory: BF16: two times keys, values. Codes: keys, values; codes of keys, values; scales of two tiles */
    static constexpr int code_at = 2 * side;
    static constexpr int scale_at = CODES ? code_at + 2 * code_side : 4 * side; /* [2][2][128] f32 */
    static constexpr int cell_at = scale_at + (CODES ? 4 * CU_KEYS * 4 : 0);    /* [2][128] attn_cell */
    static constexpr int next_at = cell_at + 2 * CU_KEYS * (int)sizeof(attn_cell);
    static constexpr int bytes = next_at + 16;
};

/* Start copying a tile. to_k, to_v: shared memory; scales (codes): [2][128]. */
template <int C, int CODES>
static __device__ __forceinline__ void load_tile(const attn_args *a, const attn_cell *cell, uint32_t to_k,
                                                 uint32_t to_v, float *scale) {
    typedef prefill_shape<C, CODES> sh;
#pragma unroll
    for (int i = 0; i < CU_KEYS * sh::chunks / THREADS; i++) {
        const int n = threadIdx.x + i * THREADS, row = n / sh::chunks, chunk = n % sh::chunks;
        const int64_t at = cell[row].key;
        const unsigned char *from = a->kv + (at < 0 ? 0 : at + chunk * 16);
        attn_copy16(to_k + attn_at<sh::chunks>(row, chunk), from, at >= 0);
        attn_copy16(to_v + attn_at<sh::chunks>(row, chunk), from + a->value, at >= 0);
    }
    /* C = 16 in codes: one chunk a row, 128 of them for 256 threads */
    if (CU_KEYS * sh::chunks < THREADS && threadIdx.x < CU_KEYS * sh::chunks) {
        const int row = threadIdx.x / sh::chunks, chunk = threadIdx.x % sh::chunks;
        const int64_t at = cell[row].key;
        const unsigned char *from = a->kv + (at < 0 ? 0 : at + chunk * 16);
        attn_copy16(to_k + attn_at<sh::chunks>(row, chunk), from, at >= 0);
        attn_copy16(to_v + attn_at<sh::chunks>(row, chunk), from + a->value, at >= 0);
    }
    if (CODES) {
        const int row = threadIdx.x & (CU_KEYS - 1), which = threadIdx.x / CU_KEYS;
        const int64_t at = cell[row].scale;
        attn_copy4(attn_smem(scale + which * CU_KEYS + row), a->kv + (which ? a->value : 0) + (at < 0 ? 0 : at),
                   at >= 0);
    }
    attn_copy_commit();
}

/* Codes to bf16. A word of codes d0..d3 gives pairs (d0, d2) and (d1, d3): keys keep them, eight places apart; values
 * are put back in order. */
template <int C, int CODES> static __device__ __forceinline__ void widen(unsigned char *smem) {
    typedef prefill_shape<C, CODES> sh;
    for (int n = threadIdx.x; n < 2 * CU_KEYS * sh::chunks; n += THREADS) {
        const int which = n / (CU_KEYS * sh::chunks), rest = n % (CU_KEYS * sh::chunks);
        const int row = rest / sh::chunks, chunk = rest % sh::chunks;
        const uint4 w = *(const uint4 *)(smem + sh::code_at + which * sh::code_side + attn_at<sh::chunks>(row, chunk));
        const uint32_t in[4] = {w.x, w.y, w.z, w.w};
        uint32_t even[4], odd[4], lo[4], hi[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            even[i] = CODES == ATTN_F8 ? cu_f8_pair(in[i]) : cu_i8_pair(in[i]);
            odd[i] = CODES == ATTN_F8 ? cu_f8_pair(in[i] >> 8) : cu_i8_pair(in[i] >> 8);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (which == 0) {
                lo[i] = even[i];
                hi[i] = odd[i];
            } else {
                uint32_t *to = i < 2 ? lo : hi;
                to[(i & 1) * 2] = __byte_perm(even[i], odd[i], 0x5410);
                to[(i & 1) * 2 + 1] = __byte_perm(even[i], odd[i], 0x7632);
            }
        }
        unsigned char *to = smem + which * sh::side;
        *(uint4 *)(to + attn_at<sh::wide>(row, 2 * chunk)) = make_uint4(lo[0], lo[1], lo[2], lo[3]);
        *(uint4 *)(to + attn_at<sh::wide>(row, 2 * chunk + 1)) = make_uint4(hi[0], hi[1], hi[2], hi[3]);
    }
}

/* One tile of 128 keys for the warp's rows. k, v: bf16 in shared memory. CUT: some row does not see all of it. */
template <int C, int CODES, bool CUT>
static __device__ __forceinline__ void walk_tile(rows<C> *w, uint32_t k, uint32_t v, const float *key_scale,
                                                 int32_t key0, float score_scale) {
    typedef prefill_shape<C, CODES> sh;
    const int lane = threadIdx.x & 31, mi = lane >> 3, l7 = lane & 7, c = lane & 3;
    float s[16][4];
#pragma unroll
    for (int j = 0; j < 16; j++)
        for (int e = 0; e < 4; e++) s[j][e] = 0.0f;
    /* chunk x of row 16 j + r is at (16 j + r) * wide * 16 + (x ^ swirl(r)) * 16 for any j */
    const uint32_t k_row = (mi >> 1) * 8 + l7, swirl = attn_swirl<sh::wide>(l7);
    const uint32_t k_at = k + k_row * sh::wide * 16;
#pragma unroll
    for (int i = 0; i < sh::units; i++) {
        const uint32_t at = k_at + (((2 * i) | (mi & 1)) ^ swirl) * 16;
#pragma unroll
        for (int j = 0; j < 16; j += 2) {
            uint32_t b[4];
            attn_load4(b, at + j * 8 * sh::wide * 16);
            cu_mma(s[j], w->q[i], b[0], b[1]);
            cu_mma(s[j + 1], w->q[i], b[2], b[3]);
        }
    }

    float m[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int j = 0; j < 16; j++) {
        float2 scale = make_float2(1.0f, 1.0f);
        if (CODES) scale = *(const float2 *)(key_scale + j * 8 + 2 * c);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[j][e] = attn_score<CODES>(s[j][e], e & 1 ? scale.y : scale.x);
            if (CUT && key0 + j * 8 + 2 * c + (e & 1) > w->pos[e >> 1]) s[j][e] = -INFINITY;
            m[e >> 1] = fmaxf(m[e >> 1], s[j][e]);
        }
    }
    bool seen[2];
    float base[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        m[i] = fmaxf(m[i], __shfl_xor_sync(0xffffffffu, m[i], 1));
        m[i] = __fmul_rn(fmaxf(m[i], __shfl_xor_sync(0xffffffffu, m[i], 2)), score_scale);
        seen[i] = !CUT || key0 <= w->pos[i];
        base[i] = seen[i] ? m[i] : 0.0f;
    }

    uint32_t p[8][4];
    float l[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int kk = 0; kk < 8; kk++) {
        uint32_t pl[4]; /* rows g, g+8 of the lower eight keys, then of the upper */
#pragma unroll
        for (int x = 0; x < 4; x++) {
            const int j = 2 * kk + (x >> 1), i = x & 1;
            const float p0 = attn_weight(s[j][2 * i], score_scale, base[i]);
            const float p1 = attn_weight(s[j][2 * i + 1], score_scale, base[i]);
            pl[x] = cu_round2(p0, p1);
            if (CODES) {
                const float2 scale = *(const float2 *)(key_scale + CU_KEYS + j * 8 + 2 * c);
                p[kk][x] = cu_round2(attn_scaled(p0, scale.x), attn_scaled(p1, scale.y));
            } else {
                p[kk][x] = pl[x];
            }
        }
        cu_mma(l, pl, 0x3f803f80u, 0x3f803f80u);
    }

    float f[2], b[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (!seen[i]) continue;
        attn_factors(&w->M[i], m[i], &f[i], &b[i]);
        w->L[i] = attn_join(w->L[i], l[2 * i], f[i], b[i]);
    }
    const uint32_t v_at = v + ((mi & 1) * 8 + l7) * sh::wide * 16;
#pragma unroll
    for (int first = 0; first < sh::units; first += sh::group) {
        float o[sh::group][2][4];
#pragma unroll
        for (int u = 0; u < sh::group; u++)
            for (int e = 0; e < 8; e++) o[u][e >> 2][e & 3] = 0.0f;
#pragma unroll
        for (int kk = 0; kk < 8; kk++) {
#pragma unroll
            for (int u = 0; u < sh::group; u++) {
                uint32_t x[4];
                attn_load4_t(x, v_at + kk * 16 * sh::wide * 16 + (((2 * (first + u)) | (mi >> 1)) ^ swirl) * 16);
                cu_mma(o[u][0], p[kk], x[0], x[1]);
                cu_mma(o[u][1], p[kk], x[2], x[3]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (!seen[i]) continue;
#pragma unroll
            for (int u = 0; u < sh::group; u++)
                for (int e = 0; e < 4; e++) {
                    float *acc = &w->acc[first + u][e >> 1][2 * i + (e & 1)];
                    *acc = attn_join(*acc, o[u][e >> 1][2 * i + (e & 1)], f[i], b[i]);
                }
        }
    }
}

template <int C, int CODES> static __global__ void __launch_bounds__(THREADS, 1) prefill_kernel(const attn_args a) {
    typedef prefill_shape<C, CODES> sh;
    extern __shared__ __align__(128) unsigned char smem[];
    attn_cell *cells = (attn_cell *)(smem + sh::cell_at);
    float *scales = (float *)(smem + sh::scale_at);
    int32_t *handed = (int32_t *)(smem + sh::next_at);
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, c = lane & 3;
    const uint32_t base = attn_smem(smem);

    attn_wait_launch();
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

        /* The cells of tiles 0 and 1, then tile 0. */
        cells[tid] = attn_cell_of<C, CODES, false>(&a, attn_page_of<false>(&a, it.seq, tid, it.len), it.head, tid);
        __syncthreads();
        load_tile<C, CODES>(&a, cells, base + (CODES ? sh::code_at : 0),
                            base + (CODES ? sh::code_at + sh::code_side : sh::side), scales);
        for (int32_t tile = 0; tile < it.n_tile; tile++) {
            const int turn = tile & 1;
            attn_cell later = {-1, -1};
            if (tid < CU_KEYS && tile + 2 < it.n_tile) {
                const int32_t at = (tile + 2) * CU_KEYS + tid;
                later = attn_cell_of<C, CODES, false>(&a, attn_page_of<false>(&a, it.seq, at, it.len), it.head, at);
            }
            attn_copy_wait<0>();
            __syncthreads(); /* the tile is there; nobody works on the one before, so its place is free */
            if (CODES) {
                widen<C, CODES>(smem);
                __syncthreads();
            }
            if (tile + 1 < it.n_tile) {
                const uint32_t to = base + (CODES ? sh::code_at : (turn ^ 1) * 2 * sh::side);
                load_tile<C, CODES>(&a, cells + (turn ^ 1) * CU_KEYS, to, to + (CODES ? sh::code_side : sh::side),
                                    scales + (turn ^ 1) * 2 * CU_KEYS);
            }
            const int32_t key0 = tile * CU_KEYS;
            const uint32_t k = base + (CODES ? 0 : turn * 2 * sh::side);
            if (key0 + CU_KEYS - 1 <= w.low)
                walk_tile<C, CODES, false>(&w, k, k + sh::side, scales + turn * 2 * CU_KEYS, key0, a.scale);
            else if (key0 <= w.top)
                walk_tile<C, CODES, true>(&w, k, k + sh::side, scales + turn * 2 * CU_KEYS, key0, a.scale);
            /* all copies of this tile's cells are under way since before the barrier */
            if (tid < CU_KEYS) cells[turn * CU_KEYS + tid] = later;
        }

#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int32_t r = mine + g + 8 * i, t = r / a.group, h = it.head * a.group + r - t * a.group;
            if (r >= it.n) continue;
            cu_bf16 *out = a.out + (int64_t)(it.row0 + t) * a.ldo + (int64_t)h * C + 2 * c;
#pragma unroll
            for (int u = 0; u < sh::units; u++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    *(uint32_t *)(out + u * 16 + half * 8) = cu_round2(__fdiv_rn(w.acc[u][half][2 * i], w.L[i]),
                                                                       __fdiv_rn(w.acc[u][half][2 * i + 1], w.L[i]));
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
    cudaError_t e = cu_shared_bytes(&ready, (const void *)prefill_kernel<C, CODES>, sh::bytes);
    if (e != cudaSuccess) return e;
    prefill_kernel<C, CODES><<<attn_wide_blocks(a, attn_sm_count()), THREADS, sh::bytes, s>>>(*a);
    return cudaGetLastError();
}

template <int C> static cudaError_t run(cudaStream_t s, const attn_args *a, int codes) {
    return codes == ATTN_I8   ? run_codes<C, ATTN_I8>(s, a)
           : codes == ATTN_F8 ? run_codes<C, ATTN_F8>(s, a)
                              : run_codes<C, 0>(s, a);
}

template <int CODES> static cudaError_t run_wide(cudaStream_t s, const attn_args *a) {
    static uint64_t ready;
    constexpr int bytes = wide_room<CODES>::bytes;
    cudaError_t e = cu_shared_bytes(&ready, (const void *)wide_kernel<CODES>, bytes);
    CUtensorMap map = {};
    int32_t run = 64; /* cells of a page that a tile takes together */
    while (a->n_page_cell % run) run /= 2;
    if (!CODES && run < 8) run = 0;        /* a turn of the swizzle */
    if (e == cudaSuccess && !CODES && run) /* the cache as rows of a cell's numbers from a->kv on, half of each a box */
        e = cu_map_rows(&map, a->kv, WIDE_C, INT32_MAX, WIDE_C * 2, WIDE_C / 2, (uint32_t)run);
    if (e != cudaSuccess) return e;
    wide_kernel<CODES><<<attn_wide_blocks(a, attn_sm_count()), WIDE_THREADS, bytes, s>>>(*a, map, run);
    return cudaGetLastError();
}

cudaError_t attn_prefill(cudaStream_t s, const attn_args *a, int32_t C, int codes) {
    switch (C) {
    case 16: return run<16>(s, a, codes);
    case 64: return run<64>(s, a, codes);
    case 128:
        return codes == ATTN_I8   ? run_wide<ATTN_I8>(s, a)
               : codes == ATTN_F8 ? run_wide<ATTN_F8>(s, a)
                                  : run_wide<0>(s, a);
    default: return cudaErrorInvalidValue;
    }
}
