/* Attention of sequences with many rows by warps of 16 rows, eight in a block: what a block has to do, and what a warp
 * keeps of its rows and begins with. What a block has to do is the same for warpgroups (cu_attn_wide.cuh). Device code
 * only. */
#ifndef ERN_BACKEND_CUDA_CU_ATTN_ROWS_CUH
#define ERN_BACKEND_CUDA_CU_ATTN_ROWS_CUH

#include "backend/cuda/cu_attn.cuh"

/* A tile of packed rows of a sequence and KV head. */
typedef struct rows_item {
    int32_t head, seq, len, row0, pos0; /* pos0: of the sequence's first row */
    int32_t first, n;                   /* packed rows of the sequence: the first of these, and behind the last */
    int32_t n_tile;                     /* of keys that they see */
} rows_item;
/* item = nth * n_kv_head + head, nth: place in the list of (sequence, which tile of its rows). */
static __device__ __forceinline__ rows_item rows_item_of(const attn_args *a, const int32_t *list, int32_t item) {
    rows_item it;
    const int32_t nth = item / a->n_kv_head, rows = a->work[ATTN_WIDE_ROWS];
    it.head = item - nth * a->n_kv_head;
    it.seq = list[2 * nth], it.first = list[2 * nth + 1] * rows;
    it.row0 = a->row0[it.seq], it.len = a->kv_len[it.seq], it.pos0 = a->pos[it.row0];
    it.n = min((a->row0[it.seq + 1] - it.row0) * a->group, it.first + rows);
    it.n_tile = (it.pos0 + (it.n - 1) / a->group) / CU_KEYS + 1;
    return it;
}

/* What a warp keeps of its 16 rows: rows g and g + 8 of a lane. acc [unit][half][4]: the lower and upper eight
 * dimensions of the unit; where values are multiplied as codes, half 0 has the even ones, half 1 the odd ones. */
template <int C> struct rows {
    uint32_t q[C / 16][4];
    float acc[C / 16][2][4];
    float M[2], L[2];
    int32_t pos[2];   /* -1: no such row */
    int32_t low, top; /* least and largest position of the warp's rows; low -1: a row is missing, top -1: all are */
};
/* q of packed row r of the sequence; NULL: no such row. */
template <int C>
static __device__ __forceinline__ const cu_bf16 *rows_q(const attn_args *a, const rows_item *it, int32_t r) {
    const int32_t t = r / a->group, h = it->head * a->group + r - t * a->group;
    return r < it->n ? a->q + ((int64_t)(it->row0 + t) * a->n_head + h) * C : NULL;
}
/* q of rows g and g + 8, and no sums so far. */
template <int C, int CODES> static __device__ __forceinline__ void rows_begin(rows<C> *w, const cu_bf16 *const q[2]) {
    const int c = threadIdx.x & 3;
    for (int i = 0; i < 2; i++) w->M[i] = -INFINITY, w->L[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < C / 16; i++) {
#pragma unroll
        for (int e = 0; e < 8; e++) w->acc[i][e >> 2][e & 3] = 0.0f;
#pragma unroll
        for (int x = 0; x < 2; x++) {
            w->q[i][x] = w->q[i][2 + x] = 0;
            if (!q[x]) continue;
            if (CODES) { /* in the order of inputs that cu_attn.cuh has for codes */
                const uint2 d = *(const uint2 *)(q[x] + i * 16 + 4 * c);
                w->q[i][x] = __byte_perm(d.x, d.y, 0x5410);
                w->q[i][2 + x] = __byte_perm(d.x, d.y, 0x7632);
            } else {
                w->q[i][x] = *(const uint32_t *)(q[x] + i * 16 + 2 * c);
                w->q[i][2 + x] = *(const uint32_t *)(q[x] + i * 16 + 8 + 2 * c);
            }
        }
    }
}

#endif
