/* What the attention kernels share: what they are given, the lists of a step, tiles of keys and values in shared
 * memory, and the law by which tiles of keys are joined.
 *
 * Packed rows: the rows of a sequence that read one KV head, row r = (token r / group, head r % group of the group);
 * group = H/G. Lane 4 g + c of a warp owns rows g and g + 8 of a tile of 16.
 *
 * The law (both kernels, bit for bit), for a row and the keys of a tile of CU_KEYS:
 *   S = q k by products over C, first first; s = S * scale (I8: S * scale of the key, then * scale); base 2
 *   m = the largest s that the row sees; p = 2^(s - m), 0 where it sees nothing
 *   l = the sum of bf16(p) and O = sum of bf16(p) v, by products over the keys, first first (I8: O of bf16(p * scale of
 *   the value), 0 where p is 0)
 *   M' = max(M, m), a = 2^(M - M'), b = 2^(m - M'): L = L a + l b, Acc = Acc a + O b, from M = -inf, L = Acc = 0
 * A tile in which the row sees no key is passed over. I8 takes the 16 inputs of a product over C in the order that
 * codes come out of a word: places 2c, 2c+1, 2c+8, 2c+9 hold inputs 4c, 4c+2, 4c+1, 4c+3. */
#ifndef ERN_BACKEND_CUDA_CU_ATTN_CUH
#define ERN_BACKEND_CUDA_CU_ATTN_CUH

#include "backend/cuda/cu_device.cuh"

enum {
    ATTN_FEW = 16,   /* most packed rows of a sequence that is cut along its keys */
    ATTN_ROWS = 128, /* packed rows of a block that walks the keys */
    ATTN_ALL = 1 << 30
};

/* seqs->work: a head, then arrays; S and T are the step's. */
enum {
    ATTN_N_DEC, /* sequences with few rows ("short") */
    ATTN_RUN,   /* first tiles of a short sequence that one block joins by itself; the others are pieces of their own */
    ATTN_N_ITEM,  /* pieces: n_dec * G runs, then single tiles */
    ATTN_ROW_MAX, /* most packed rows of a short sequence */
    ATTN_N_WIDE,  /* (sequence, tile of ATTN_ROWS rows) of the others */
    ATTN_TAKEN,   /* pieces handed out beyond the first two of each block; 0 between launches */
    ATTN_WIDE_TAKEN,
    ATTN_HEAD = 16
};

typedef struct attn_args {
    const cu_bf16 *q;
    cu_bf16 *out;
    int64_t ldo;
    const unsigned char *kv; /* + keys of the layer, head 0 */
    int64_t page_bytes, plane_bytes;
    int64_t value;    /* from a key's plane to the value's */
    int32_t scale_at; /* from a plane to its scales */
    int32_t n_page_cell, n_kv_head, n_head, group;
    int32_t n_row, n_seq, n_page_max;
    const int32_t *pos, *row0, *kv_len, *page, *row_seq;
    int32_t *work;
    float *scratch;
    int64_t n_scratch; /* floats */
    float scale;       /* log2(e) / sqrt(C) */
} attn_args;

/* ---- lists ------------------------------------------------------------------------------------------------------ */

static __host__ __device__ __forceinline__ int64_t attn_wide_max(int32_t n_row, int32_t n_seq) {
    return n_row / (ATTN_ROWS / 16) + n_seq; /* group is at most 16 */
}
static __device__ __forceinline__ int32_t *attn_dec_seq(int32_t *work) { return work + ATTN_HEAD; } /* [S] */
static __device__ __forceinline__ int32_t *attn_dec_index(int32_t *work, int32_t n_seq) {
    return work + ATTN_HEAD + n_seq; /* [S] place in dec_seq or -1 */
}
static __device__ __forceinline__ int32_t *attn_prefix(int32_t *work, int32_t n_seq) {
    return work + ATTN_HEAD + 2 * (int64_t)n_seq; /* [S+1] single tiles times G of the short sequences before */
}
static __device__ __forceinline__ int32_t *attn_wide(int32_t *work, int32_t n_seq) {
    return work + ATTN_HEAD + 3 * (int64_t)n_seq + 1; /* [][2] sequence, tile of rows; most keys first */
}

/* How this launch cuts: as planned, or, where the pieces do not fit scratch, not at all. */
typedef struct attn_split {
    int32_t n_dec, run, n_item, row_max;
} attn_split;

static __device__ __forceinline__ attn_split attn_split_of(const attn_args *a, int C) {
    attn_split s = {a->work[ATTN_N_DEC], a->work[ATTN_RUN], a->work[ATTN_N_ITEM], a->work[ATTN_ROW_MAX]};
    if ((int64_t)s.n_item * s.row_max * (C + 2) > a->n_scratch) {
        s.run = ATTN_ALL;
        s.n_item = s.n_dec * a->n_kv_head;
    }
    return s;
}
/* A piece's results: [row_max][2] M and L, [row_max][C] Acc. */
static __device__ __forceinline__ float *attn_slot(const attn_args *a, const attn_split *s, int32_t item, int C) {
    return a->scratch + (int64_t)item * s->row_max * (C + 2);
}

/* ---- small things ------------------------------------------------------------------------------------------------ */

/* Every kernel's first act: wait for what the kernels before wrote, then let the next one be launched early. */
static __device__ __forceinline__ void attn_wait_launch(void) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

static __device__ __forceinline__ float attn_ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
template <bool I8> static __device__ __forceinline__ float attn_score(float dot, float key_scale, float scale) {
    return __fmul_rn(I8 ? __fmul_rn(dot, key_scale) : dot, scale);
}
/* The value's scale on a weight; a weight of nothing stays nothing whatever the scale. */
static __device__ __forceinline__ float attn_scaled(float p, float value_scale) {
    return p > 0.0f ? __fmul_rn(p, value_scale) : 0.0f;
}
/* M becomes M'. */
static __device__ __forceinline__ void attn_factors(float *M, float m, float *a, float *b) {
    const float top = fmaxf(*M, m);
    *a = attn_ex2(__fsub_rn(*M, top));
    *b = attn_ex2(__fsub_rn(m, top));
    *M = top;
}
static __device__ __forceinline__ float attn_join(float acc, float o, float a, float b) {
    return __fmaf_rn(o, b, __fmul_rn(acc, a));
}

static __device__ __forceinline__ uint32_t attn_smem(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* 16 or 4 bytes to shared memory; zeros where `real` is false. */
static __device__ __forceinline__ void attn_copy16(uint32_t to, const void *from, bool real) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0)
                 : "memory");
}
static __device__ __forceinline__ void attn_copy4(uint32_t to, const void *from, bool real) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(real ? 4 : 0) : "memory");
}
static __device__ __forceinline__ void attn_copy_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> static __device__ __forceinline__ void attn_copy_wait(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

/* Four 8 x 8 matrices of 16-bit numbers; lane 8 i + j gives the address of row j of matrix i. r[i]: row g, columns 2c
 * and 2c+1 of matrix i; with T rows 2c and 2c+1 of column g. */
static __device__ __forceinline__ void attn_load4(uint32_t r[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
static __device__ __forceinline__ void attn_load4_t(uint32_t r[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

/* Rows of `chunks` (1, 2, 4, 8 or 16) chunks of 16 bytes lie one after the other; chunk k of row r is stored at k ^
 * attn_swirl(r), so that the same chunk of eight rows that follow one another hits all banks once. */
template <int chunks> static __device__ __forceinline__ uint32_t attn_swirl(uint32_t row) {
    return chunks >= 8 ? row & 7 : chunks == 4 ? (row >> 1) & 3 : chunks == 2 ? (row >> 2) & 1 : 0;
}
template <int chunks> static __device__ __forceinline__ uint32_t attn_at(uint32_t row, uint32_t chunk) {
    return (row * chunks + (chunk ^ attn_swirl<chunks>(row))) * 16;
}

/* Bytes from a->kv to the key of a position and to its scale; -1: the position is not below len. */
typedef struct attn_cell {
    int64_t key, scale;
} attn_cell;
/* Page of a position, or -1. */
static __device__ __forceinline__ int32_t attn_page_of(const attn_args *a, int32_t seq, int32_t at, int32_t len) {
    return at < len ? a->page[(int64_t)seq * a->n_page_max + at / a->n_page_cell] : -1;
}
template <int C, bool I8>
static __device__ __forceinline__ attn_cell attn_cell_of(const attn_args *a, int32_t page, int32_t head, int32_t at) {
    attn_cell out = {-1, -1};
    if (page < 0) return out;
    const int32_t cell = at % a->n_page_cell;
    const int64_t plane = page * a->page_bytes + head * a->plane_bytes;
    out.key = plane + (int64_t)cell * (C * (I8 ? 1 : 2));
    out.scale = plane + a->scale_at + (int64_t)cell * 4;
    return out;
}

/* ---- launches (cu_attn_decode.cu, cu_attn_prefill.cu) -------------------------------------------------------------
 */

/* Multiprocessors of the current device. */
int32_t attn_sm_count(void);
/* Blocks of the grid for short sequences. */
int32_t attn_decode_blocks(int32_t C, bool i8);
cudaError_t attn_decode(cudaStream_t s, const attn_args *a, int32_t C, bool i8);
cudaError_t attn_prefill(cudaStream_t s, const attn_args *a, int32_t C, bool i8);

#endif
