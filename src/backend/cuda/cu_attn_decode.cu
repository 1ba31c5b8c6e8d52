/* Attention of sequences with few rows (all rows of a KV head's group fit 16): a block of four warps takes a piece (the
 * first tiles of a sequence and head, or one tile), and where a sequence has several pieces a second kernel joins them
 * in order. Bound by memory: while the block works on a tile's keys its values are on their way, and the next tile's
 * keys while it works on the values; several blocks share a multiprocessor.
 *
 * A tile, by warp w: scores of 16 rows and keys 32 w .. 32 w + 31; maxima meet in shared memory; weights go there as
 * bf16; then dimensions w * C/4 .. of O over all 128 keys in order. */
#include "backend/cuda/cu_attn.cuh"

enum { THREADS = 128 };

template <int C, bool I8> struct decode_shape {
    static constexpr int row_bytes = C * (I8 ? 1 : 2);
    static constexpr int chunks = row_bytes / 16; /* of a key or value */
    static constexpr int q_chunks = C / 8;
    static constexpr int units = C / 16; /* of dimensions */
    static constexpr int warp_units = units >= 4 ? units / 4 : 1;
    static constexpr int blocks = !I8 && C == 128 ? 3 : 4; /* on a multiprocessor */
    /* shared memory */
    static constexpr int k_at = 0, v_at = k_at + CU_KEYS * row_bytes, q_at = v_at + CU_KEYS * row_bytes;
    static constexpr int p_at = q_at + ATTN_FEW * C * 2;          /* weights for O, [16][128] bf16 */
    static constexpr int l_at = p_at + (I8 ? ATTN_FEW * 256 : 0); /* weights for l (bf16: the same) */
    static constexpr int cell_at = l_at + ATTN_FEW * 256;         /* [128] int64 key of the tile to load */
    static constexpr int top_at = cell_at + CU_KEYS * 8;          /* [4][16] maxima */
    static constexpr int scale_at = top_at + 4 * ATTN_FEW * 4;    /* I8: [128] keys', [2][128] values' */
    static constexpr int next_at = scale_at + (I8 ? 3 * CU_KEYS * 4 : 0);
    static constexpr int bytes = next_at + 16;
};

typedef struct piece {
    int32_t index, seq; /* seq < 0: none */
    int32_t head, tile, end;
    int32_t n_row, row0, pos0, len; /* packed rows; first row; its position; cells */
    bool whole;                     /* all of the sequence's tiles: goes to out */
} piece;

static __device__ __forceinline__ piece find_piece(const attn_args *a, const attn_split *s, int32_t index) {
    piece p = {};
    p.index = index;
    p.seq = -1;
    if (index >= s->n_item) return p;
    const int32_t G = a->n_kv_head, n_run = s->n_dec * G;
    int32_t k, rest = 0;
    if (index < n_run) {
        k = index / G;
        p.head = index - k * G;
    } else {
        /* the last k whose first single tile is not beyond */
        const int32_t *prefix = attn_prefix(a->work, a->n_seq);
        const int32_t j = index - n_run;
        int32_t low = 0, high = s->n_dec; /* prefix[low] <= j < prefix[high] */
        while (high - low > 1) {
            const int32_t middle = (low + high) / 2;
            if (prefix[middle] <= j)
                low = middle;
            else
                high = middle;
        }
        k = low;
        rest = (j - prefix[k]) / G;
        p.head = j - prefix[k] - rest * G;
        p.tile = s->run + rest;
    }
    p.seq = attn_dec_seq(a->work)[k];
    p.len = a->kv_len[p.seq];
    p.row0 = a->row0[p.seq];
    p.n_row = (a->row0[p.seq + 1] - p.row0) * a->group;
    p.pos0 = a->pos[p.row0];
    const int32_t n_tile = (p.len + CU_KEYS - 1) / CU_KEYS;
    p.end = index < n_run ? min(s->run, n_tile) : p.tile + 1;
    p.whole = index < n_run && p.end == n_tile;
    return p;
}

/* Keys (which 0) or values (1) of a tile, from the cells in shared memory. */
template <int C, bool I8>
static __device__ __forceinline__ void load_rows(const attn_args *a, unsigned char *smem, int which) {
    typedef decode_shape<C, I8> sh;
    const int64_t *cell = (const int64_t *)(smem + sh::cell_at);
    const unsigned char *from = a->kv + (which ? a->value : 0);
    const uint32_t to = attn_smem(smem + (which ? sh::v_at : sh::k_at));
#pragma unroll
    for (int i = 0; i < sh::chunks; i++) {
        const int n = threadIdx.x + i * THREADS, row = n / sh::chunks, chunk = n % sh::chunks;
        const int64_t at = cell[row];
        attn_copy16(to + attn_at<sh::chunks>(row, chunk), from + (at < 0 ? 0 : at + chunk * 16), at >= 0);
    }
}

/* Rows of q of a piece; those it lacks are zero. */
template <int C, bool I8>
static __device__ __forceinline__ void load_q(const attn_args *a, unsigned char *smem, const piece *p) {
    typedef decode_shape<C, I8> sh;
    const uint32_t to = attn_smem(smem + sh::q_at);
    for (int n = threadIdx.x; n < ATTN_FEW * sh::q_chunks; n += THREADS) {
        const int r = n / sh::q_chunks, chunk = n % sh::q_chunks;
        const int32_t t = r / a->group, h = p->head * a->group + r - t * a->group;
        const bool real = r < p->n_row;
        const cu_bf16 *from = a->q + (real ? ((int64_t)(p->row0 + t) * a->n_head + h) * C + chunk * 8 : 0);
        attn_copy16(to + attn_at<sh::q_chunks>(r, chunk), from, real);
    }
}

/* Scores of 16 rows and this warp's 32 keys, unscaled. */
template <int C, bool I8>
static __device__ __forceinline__ void scores(float s[4][4], const unsigned char *smem, int warp, int lane) {
    typedef decode_shape<C, I8> sh;
    const uint32_t k = attn_smem(smem + sh::k_at), q = attn_smem(smem + sh::q_at);
    const int mi = lane >> 3, l7 = lane & 7, g = lane >> 2, c = lane & 3;
#pragma unroll
    for (int j = 0; j < 4; j++)
        for (int e = 0; e < 4; e++) s[j][e] = 0.0f;
#pragma unroll
    for (int i = 0; i < sh::units; i++) {
        uint32_t a[4], b[4];
        if (I8) {
            const unsigned char *base = smem + sh::q_at + (c & 1) * 8;
            const uint2 lo = *(const uint2 *)(base + attn_at<sh::q_chunks>(g, 2 * i + (c >> 1)));
            const uint2 hi = *(const uint2 *)(base + attn_at<sh::q_chunks>(g + 8, 2 * i + (c >> 1)));
            a[0] = __byte_perm(lo.x, lo.y, 0x5410), a[2] = __byte_perm(lo.x, lo.y, 0x7632);
            a[1] = __byte_perm(hi.x, hi.y, 0x5410), a[3] = __byte_perm(hi.x, hi.y, 0x7632);
            attn_load4(b, k + attn_at<sh::chunks>(warp * 32 + mi * 8 + l7, i));
#pragma unroll
            for (int j = 0; j < 4; j++) cu_mma(s[j], a, cu_i8_pair(b[j]), cu_i8_pair(b[j] >> 8));
        } else {
            attn_load4(a, q + attn_at<sh::q_chunks>((mi & 1) * 8 + l7, 2 * i + (mi >> 1)));
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                attn_load4(b, k + attn_at<sh::chunks>(warp * 32 + j * 8 + (mi >> 1) * 8 + l7, 2 * i + (mi & 1)));
                cu_mma(s[j], a, b[0], b[1]);
                cu_mma(s[j + 1], a, b[2], b[3]);
            }
        }
    }
}

/* O [unit][half][4] of this warp's dimensions, and l (rows g, g, g+8, g+8). I8: half 0 has the even dimensions of the
 * unit, half 1 the odd ones; else the lower and upper eight. */
template <int C, bool I8>
static __device__ __forceinline__ void weigh(float o[][2][4], float l[4], const unsigned char *smem, int warp,
                                             int lane) {
    typedef decode_shape<C, I8> sh;
    const uint32_t v = attn_smem(smem + sh::v_at), p = attn_smem(smem + sh::p_at), q = attn_smem(smem + sh::l_at);
    const int mi = lane >> 3, l7 = lane & 7;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        l[e] = 0.0f;
        for (int u = 0; u < sh::warp_units; u++) o[u][0][e] = o[u][1][e] = 0.0f;
    }
#pragma unroll
    for (int pair = 0; pair < CU_KEYS / 32; pair++) { /* 32 keys: two products */
        uint32_t b[sh::warp_units][8];                /* per product: half 0, half 1 */
#pragma unroll
        for (int u = 0; u < sh::warp_units; u++) {
            const int unit = warp * sh::warp_units + u;
            if (I8) {
                uint32_t w[4];
                attn_load4_t(w, v + attn_at<sh::chunks>(pair * 32 + mi * 8 + l7, unit));
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    b[u][half * 4 + 0] = cu_i8_pair(w[half * 2]), b[u][half * 4 + 1] = cu_i8_pair(w[half * 2 + 1]);
                    b[u][half * 4 + 2] = cu_i8_pair(w[half * 2] >> 8);
                    b[u][half * 4 + 3] = cu_i8_pair(w[half * 2 + 1] >> 8);
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
            if (I8) {
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

/* A piece is done: to out, or to its slot. */
template <int C, bool I8>
static __device__ __forceinline__ void finish(const attn_args *a, const attn_split *split, const piece *p,
                                              const float acc[][2][4], const float M[2], const float L[2], int warp,
                                              int lane) {
    typedef decode_shape<C, I8> sh;
    const int g = lane >> 2, c = lane & 3;
    float *slot = p->whole ? NULL : attn_slot(a, split, p->index, C);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = g + 8 * i;
        if (r >= p->n_row) continue;
        if (slot && warp == 0 && c == 0) *(float2 *)(slot + 2 * r) = make_float2(M[i], L[i]);
        const int32_t t = r / a->group, h = p->head * a->group + r - t * a->group;
        cu_bf16 *out = a->out + (int64_t)(p->row0 + t) * a->ldo + (int64_t)h * C;
        float *part = slot ? slot + 2 * split->row_max + (int64_t)r * C : NULL;
#pragma unroll
        for (int u = 0; u < sh::warp_units; u++) {
            const int unit = warp * sh::warp_units + u;
            if (unit >= sh::units) continue;
            /* two pairs of dimensions that lie together */
            float x[4] = {acc[u][0][2 * i], acc[u][I8 ? 1 : 0][2 * i + (I8 ? 0 : 1)],
                          acc[u][I8 ? 0 : 1][2 * i + (I8 ? 1 : 0)], acc[u][1][2 * i + 1]};
            const int first = unit * 16 + (I8 ? 4 * c : 2 * c), second = first + (I8 ? 2 : 8);
            if (slot) {
                *(float2 *)(part + first) = make_float2(x[0], x[1]);
                *(float2 *)(part + second) = make_float2(x[2], x[3]);
            } else {
                *(uint32_t *)(out + first) = cu_round2(__fdiv_rn(x[0], L[i]), __fdiv_rn(x[1], L[i]));
                *(uint32_t *)(out + second) = cu_round2(__fdiv_rn(x[2], L[i]), __fdiv_rn(x[3], L[i]));
            }
        }
    }
}

template <int C, bool I8>
static __global__ void __launch_bounds__(THREADS, (decode_shape<C, I8>::blocks)) decode_kernel(const attn_args a) {
    typedef decode_shape<C, I8> sh;
    extern __shared__ __align__(128) unsigned char smem[];
    int64_t *cells = (int64_t *)(smem + sh::cell_at);
    float *top = (float *)(smem + sh::top_at), *key_scale = (float *)(smem + sh::scale_at);
    int32_t *handed = (int32_t *)(smem + sh::next_at);
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, c = lane & 3;

    attn_wait_launch();
    const attn_split split = attn_split_of(&a, C);
    piece cur = find_piece(&a, &split, blockIdx.x);
    if (cur.seq < 0) return;
    /* The first two pieces of a block are its own; more are handed out as blocks come for them. */
    int32_t next_index = blockIdx.x + gridDim.x;
    const bool hand_out = split.n_item > 2 * (int32_t)gridDim.x;

    int32_t tile = cur.tile;
    int turn = 0;
    const int32_t at0 = tile * CU_KEYS + tid;
    attn_cell cell = attn_cell_of<C, I8>(&a, attn_page_of(&a, cur.seq, at0, cur.len), cur.head, at0);
    cells[tid] = cell.key;
    __syncthreads();
    load_q<C, I8>(&a, smem, &cur);
    load_rows<C, I8>(&a, smem, 0);
    if (I8) {
        const int64_t at = cell.scale < 0 ? 0 : cell.scale;
        attn_copy4(attn_smem(key_scale + tid), a.kv + at, cell.scale >= 0);
        attn_copy4(attn_smem(key_scale + CU_KEYS + tid), a.kv + a.value + at, cell.scale >= 0);
    }
    attn_copy_commit();
    load_rows<C, I8>(&a, smem, 1);
    attn_copy_commit();

    float M[2] = {-INFINITY, -INFINITY}, L[2] = {0.0f, 0.0f}, acc[sh::warp_units][2][4];
#pragma unroll
    for (int u = 0; u < sh::warp_units; u++)
        for (int e = 0; e < 8; e++) acc[u][e >> 2][e & 3] = 0.0f;

    for (;;) {
        const bool last = tile + 1 >= cur.end;
        piece next = cur;
        int32_t next_tile = tile + 1, taken = 0;
        if (last) {
            if (tid == 0 && hand_out) taken = atomicAdd(a.work + ATTN_TAKEN, 1);
            next = find_piece(&a, &split, next_index);
            next_tile = next.tile;
        }
        const bool more = next.seq >= 0;
        /* asked for early, used after the scores */
        const int32_t next_at = next_tile * CU_KEYS + tid;
        const int32_t page = attn_page_of(&a, more ? next.seq : 0, next_at, more ? next.len : 0);

        int32_t pos[2]; /* of the lane's rows; -1: no such row */
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int r = g + 8 * i;
            pos[i] = r < cur.n_row ? cur.pos0 + r / a.group : -1;
        }
        const int32_t key0 = tile * CU_KEYS;

        attn_copy_wait<1>();
        __syncthreads(); /* keys and q are there; nobody reads `cells` any more */
        float s[4][4];
        scores<C, I8>(s, smem, warp, lane);
        float m[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int in_tile = warp * 32 + j * 8 + 2 * c;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float scale = I8 ? key_scale[in_tile + (e & 1)] : 1.0f;
                s[j][e] = attn_score<I8>(s[j][e], scale, a.scale);
                if (key0 + in_tile + (e & 1) > pos[e >> 1]) s[j][e] = -INFINITY;
                m[e >> 1] = fmaxf(m[e >> 1], s[j][e]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            m[i] = fmaxf(m[i], __shfl_xor_sync(0xffffffffu, m[i], 1));
            m[i] = fmaxf(m[i], __shfl_xor_sync(0xffffffffu, m[i], 2));
            if (c == 0) top[warp * ATTN_FEW + g + 8 * i] = m[i];
        }
        cell = attn_cell_of<C, I8>(&a, page, next.head, next_at);
        cells[tid] = cell.key;
        __syncthreads(); /* maxima are there; keys and q may be overwritten */
        if (more) {
            if (last) load_q<C, I8>(&a, smem, &next);
            load_rows<C, I8>(&a, smem, 0);
            if (I8) {
                const int64_t at = cell.scale < 0 ? 0 : cell.scale;
                attn_copy4(attn_smem(key_scale + tid), a.kv + at, cell.scale >= 0);
                attn_copy4(attn_smem(key_scale + (2 - turn) * CU_KEYS + tid), a.kv + a.value + at, cell.scale >= 0);
            }
        }
        attn_copy_commit();

        bool seen[2];
        float base[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            m[i] = top[g + 8 * i];
            for (int w = 1; w < 4; w++) m[i] = fmaxf(m[i], top[w * ATTN_FEW + g + 8 * i]);
            seen[i] = key0 <= pos[i];
            base[i] = seen[i] ? m[i] : 0.0f; /* no -inf - -inf */
        }
        const float *value_scale = key_scale + (1 + turn) * CU_KEYS;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int chunk = warp * 4 + j;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float p0 = attn_ex2(__fsub_rn(s[j][2 * i], base[i]));
                const float p1 = attn_ex2(__fsub_rn(s[j][2 * i + 1], base[i]));
                const uint32_t at = attn_at<16>(g + 8 * i, chunk) + c * 4;
                *(uint32_t *)(smem + sh::l_at + at) = cu_round2(p0, p1);
                if (I8) {
                    const float *scale = value_scale + chunk * 8 + 2 * c;
                    *(uint32_t *)(smem + sh::p_at + at) =
                        cu_round2(attn_scaled(p0, scale[0]), attn_scaled(p1, scale[1]));
                }
            }
        }
        if (tid == 0 && last) *handed = taken + 2 * (int32_t)gridDim.x;
        attn_copy_wait<1>();
        __syncthreads(); /* values and weights are there */
        float o[sh::warp_units][2][4], l[4];
        if (warp * sh::warp_units < sh::units) {
            weigh<C, I8>(o, l, smem, warp, lane);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (!seen[i]) continue;
                float f, b;
                attn_factors(&M[i], m[i], &f, &b);
                L[i] = attn_join(L[i], l[2 * i], f, b);
#pragma unroll
                for (int u = 0; u < sh::warp_units; u++)
                    for (int e = 0; e < 4; e++)
                        acc[u][e >> 1][2 * i + (e & 1)] =
                            attn_join(acc[u][e >> 1][2 * i + (e & 1)], o[u][e >> 1][2 * i + (e & 1)], f, b);
            }
        }
        if (last) {
            if (warp * sh::warp_units < sh::units) finish<C, I8>(&a, &split, &cur, acc, M, L, warp, lane);
            next_index = hand_out ? *handed : split.n_item;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                M[i] = -INFINITY, L[i] = 0.0f;
                for (int u = 0; u < sh::warp_units; u++)
                    for (int e = 0; e < 4; e++) acc[u][e >> 1][2 * i + (e & 1)] = 0.0f;
            }
        }
        if (!more) break;
        __syncthreads(); /* values and weights may be overwritten */
        load_rows<C, I8>(&a, smem, 1);
        attn_copy_commit();
        cur = next;
        tile = next_tile;
        turn ^= 1;
    }
    attn_copy_wait<0>();
}

/* Join the pieces of a row and head; a lane a dimension. Warps: rows, then heads, then runs of 32 dimensions. */
template <int C> static __global__ void __launch_bounds__(THREADS) join_kernel(const attn_args a) {
    constexpr int parts = C > 32 ? C / 32 : 1;
    attn_wait_launch();
    if (blockIdx.x == 0 && threadIdx.x == 0) a.work[ATTN_TAKEN] = a.work[ATTN_WIDE_TAKEN] = 0;
    const int lane = threadIdx.x & 31;
    const uint32_t n = blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5), row_head = n / parts;
    const int32_t t = (int32_t)(row_head / (uint32_t)a.n_head), h = (int32_t)(row_head % (uint32_t)a.n_head);
    if (t >= a.n_row) return;
    const int32_t seq = a.row_seq[t];
    if (seq < 0) return;
    const int32_t k = attn_dec_index(a.work, a.n_seq)[seq];
    const attn_split split = attn_split_of(&a, C);
    if (k < 0 || (a.kv_len[seq] + CU_KEYS - 1) / CU_KEYS <= split.run) return;

    const int32_t row0 = a.row0[seq], G = a.n_kv_head, head = h / a.group, r = (t - row0) * a.group + h % a.group;
    /* piece 0 is the run, piece i > 0 tile run + i - 1; as many as the row sees */
    const int32_t n_tile = (a.pos[row0] + t - row0) / CU_KEYS + 1;
    const int32_t n_piece = n_tile > split.run ? n_tile - split.run + 1 : 1;
    const int32_t run_item = k * G + head;
    const int32_t tile_item = split.n_dec * G + attn_prefix(a.work, a.n_seq)[k] + head; /* + G a tile */
    const int64_t stride = (int64_t)split.row_max * (C + 2);
    const int dim = (int)(n % parts) * 32 + lane;
    const float *acc_at = a.scratch + 2 * split.row_max + (int64_t)r * C + (dim < C ? dim : 0);
    float M = -INFINITY, L = 0.0f, acc = 0.0f;
#pragma unroll 1
    for (int32_t from = 0; from < n_piece; from += 32) {
        const int32_t count = min(32, n_piece - from), mine = from + lane;
        /* Factors of 32 pieces at once: a largest value has no order. */
        float2 ml = make_float2(-INFINITY, 0.0f);
        if (lane < count)
            ml =
                *(const float2 *)(a.scratch + (mine ? tile_item + (int64_t)(mine - 1) * G : run_item) * stride + 2 * r);
        float up_to = fmaxf(M, ml.x);
        for (int d = 1; d < 32; d <<= 1) {
            const float other = __shfl_up_sync(0xffffffffu, up_to, d);
            if (lane >= d) up_to = fmaxf(up_to, other);
        }
        float before = __shfl_up_sync(0xffffffffu, up_to, 1);
        if (lane == 0) before = M;
        float f, b;
        attn_factors(&before, ml.x, &f, &b);
        M = __shfl_sync(0xffffffffu, before, count - 1);
#pragma unroll 1
        for (int32_t i = 0; i < count; i += 16) {
            float x[16];
#pragma unroll
            for (int j = 0; j < 16; j++) {
                const int32_t at = from + i + j;
                x[j] = i + j < count ? acc_at[(at ? tile_item + (int64_t)(at - 1) * G : run_item) * stride] : 0.0f;
            }
#pragma unroll
            for (int j = 0; j < 16; j++) {
                const float fj = __shfl_sync(0xffffffffu, f, i + j), bj = __shfl_sync(0xffffffffu, b, i + j);
                const float lj = __shfl_sync(0xffffffffu, ml.y, i + j);
                if (i + j >= count) continue;
                L = attn_join(L, lj, fj, bj);
                acc = attn_join(acc, x[j], fj, bj);
            }
        }
    }
    if (dim < C) a.out[(int64_t)t * a.ldo + (int64_t)h * C + dim] = cu_round(__fdiv_rn(acc, L));
}

/* ---- launches ---------------------------------------------------------------------------------------------------- */

template <int C, bool I8> static cudaError_t run(cudaStream_t s, const attn_args *a) {
    typedef decode_shape<C, I8> sh;
    static bool ready[64];
    int device = 0;
    cudaError_t e = cudaGetDevice(&device);
    if (e != cudaSuccess) return e;
    if (!ready[device & 63]) {
        e = cudaFuncSetAttribute(decode_kernel<C, I8>, cudaFuncAttributeMaxDynamicSharedMemorySize, sh::bytes);
        if (e != cudaSuccess) return e;
        /* room for all blocks that registers allow */
        e = cudaFuncSetAttribute(decode_kernel<C, I8>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
        if (e != cudaSuccess) return e;
        ready[device & 63] = true;
    }
    decode_kernel<C, I8><<<attn_decode_blocks(C, I8), THREADS, sh::bytes, s>>>(*a);
    const int64_t warps = (int64_t)a->n_row * a->n_head * (C > 32 ? C / 32 : 1);
    join_kernel<C><<<(uint32_t)((warps + 3) / 4), THREADS, 0, s>>>(*a);
    return cudaGetLastError();
}

int32_t attn_decode_blocks(int32_t C, bool i8) { return attn_sm_count() * (!i8 && C == 128 ? 3 : 4); }

cudaError_t attn_decode(cudaStream_t s, const attn_args *a, int32_t C, bool i8) {
    switch (C) {
    case 16: return i8 ? run<16, true>(s, a) : run<16, false>(s, a);
    case 64: return i8 ? run<64, true>(s, a) : run<64, false>(s, a);
    case 128: return i8 ? run<128, true>(s, a) : run<128, false>(s, a);
    default: return cudaErrorInvalidValue;
    }
}
