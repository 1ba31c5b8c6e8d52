/* What the attention kernels share: what they are given, the lists of a step, tiles of keys and values in shared
 * memory, and the law by which tiles of keys are joined.
 *
 * Packed rows: the rows of a sequence that read one KV head, row r = (token r / group, head r % group of the group);
 * group = H/G. Lane 4 g + c of a warp owns rows g and g + 8 of a tile of 16.
 *
 * The law (both kernels, bit for bit), for a row and the keys of a tile of CU_KEYS:
 *   s = q k by products over C, first first (codes: times the scale of the key); m = the largest s that the row sees,
 *   times scale; p = 2^(s * scale - m), rounded once, 0 where it sees nothing
 *   l = the sum of bf16(p) and O = sum of bf16(p) v, by products over the keys, first first (codes: O of bf16(p * scale
 *   of the value), 0 where p is 0)
 *   M' = max(M, m), a = 2^(M - M'), b = 2^(m - M'): L = L a + l b, Acc = Acc a + O b, from M = -inf, L = Acc = 0
 * A tile in which the row sees no key is passed over. Codes, of int8 or e4m3, go in as exact bf16; with them the 16
 * inputs of a product over C are taken in the order that codes come out of a word: places 2c, 2c+1, 2c+8, 2c+9 hold
 * inputs 4c, 4c+2, 4c+1, 4c+3. */
#ifndef ERN_BACKEND_CUDA_CU_ATTN_CUH
#define ERN_BACKEND_CUDA_CU_ATTN_CUH

#include <float.h>

#include "backend/cuda/cu_device.cuh"
#include "backend/cuda/cu_launch.cuh"

enum {
    ATTN_FEW = 16,          /* most packed rows of a sequence that is cut along its keys */
    ATTN_ROWS = 128,        /* packed rows of a block that walks the keys */
    ATTN_ROWS_LESS = 64,    /* the same where all such blocks find a multiprocessor each: a piece of a prompt */
    ATTN_BLOCKS_MOST = 640, /* of the kernel for short sequences */
};

/* Template parameter CODES, and what is passed on for it: keys and values as codes, and which; 0: as bf16. */
enum { ATTN_I8 = 1, ATTN_F8 = 2 };
static inline int attn_codes_of(ern_kv_dtype t) { return t == ERN_KV_I8 ? ATTN_I8 : t == ERN_KV_F8 ? ATTN_F8 : 0; }

/* seqs->work: a head, then arrays; S and T are the step's. */
enum {
    ATTN_N_DEC,      /* sequences with few rows ("short") */
    ATTN_N_TILE,     /* tiles of keys of all short sequences and heads */
    ATTN_ROW_MAX,    /* most packed rows of a short sequence */
    ATTN_N_BLOCK,    /* most blocks for them: all of the launch, or what finds room beside the others' */
    ATTN_N_WIDE = 4, /* (sequence, tile of rows) of the others */
    ATTN_WIDE_TAKEN, /* of these, beyond one a block; blocks that are done: zeros before and after every launch */
    ATTN_WIDE_DONE,
    ATTN_WIDE_ROWS, /* packed rows of a tile: ATTN_ROWS or ATTN_ROWS_LESS */
    ATTN_HEAD = 16
};

typedef struct attn_args {
    const cu_bf16 *q;
    cu_bf16 *out;
    int64_t ldo;
    unsigned char *kv; /* + keys of the layer, head 0 */
    int64_t page_bytes, plane_bytes;
    int64_t value;    /* from a key's plane to the value's */
    int32_t scale_at; /* from a plane to its scales */
    int32_t n_page_cell, n_kv_head, n_head, group;
    int32_t n_row, n_seq, n_page_max;
    const int32_t *pos, *row0, *kv_len, *page;
    int32_t *work;
    float *scratch;    /* zeros between launches */
    int64_t n_scratch; /* floats */
    float scale;       /* log2(e) / sqrt(C) */
    /* Decode's alone, and last: ptxas serialises the prefill kernel's wgmma (C7511) when what it reads lies elsewhere
     */
    const float *qkv;             /* instead of q: neither rotated nor stored yet */
    uint32_t per_group, per_page; /* 2^8 / group and 2^31 / P, rounded up */
    const float2 *turn;
    const int32_t *cell;
    /* Of cu_attend_codes: instead of out */
    cu_x8 out8;
    cu_codes out_codes;
    bool behind; /* decode's: attn_prefill is right in front */
} attn_args;

/* ---- lists ------------------------------------------------------------------------------------------------------ */

static __host__ __device__ __forceinline__ int64_t attn_wide_max(int32_t n_row, int32_t n_seq) {
    return n_row / (ATTN_ROWS_LESS / 16) + n_seq; /* group is at most 16 */
}
/* The tiles of all short sequences and heads in a line, cut into stretches, one a block: the first `more` blocks have
 * each + 1 tiles, the others each. Hardly fewer sequences and heads than blocks: a block each, which are not cut if
 * they are of one length. */
typedef struct attn_line {
    int32_t n_tile, n_block, each, more;
} attn_line;
static __device__ __forceinline__ attn_line attn_line_of(int32_t n_tile, int32_t n_unit, int32_t n_block_most) {
    attn_line l;
    l.n_tile = n_tile;
    l.n_block = min(n_unit >= n_block_most - n_block_most / 16 ? min(n_unit, n_block_most) : n_block_most, n_tile);
    l.each = n_tile / max(l.n_block, 1);
    l.more = n_tile - l.each * l.n_block;
    return l;
}
static __device__ __forceinline__ int32_t attn_line_start(const attn_line *l, int32_t block) {
    return block * l->each + min(block, l->more);
}
/* In whose stretch tile x is. */
static __device__ __forceinline__ int32_t attn_line_block(const attn_line *l, int32_t x) {
    const int32_t longer = l->more * (l->each + 1);
    return x < longer ? x / (l->each + 1) : l->more + (x - longer) / l->each;
}
/* A sequence and head of n_tile tiles from x0 on that is cut is cut once, and whoever has its later part has time
 * enough: its first part is done first in its stretch, its later part last, from where the first left it. */
static __device__ __forceinline__ bool attn_line_hands(const attn_line *l, int32_t x0, int32_t n_tile) {
    if (n_tile <= l->each) return true;
    return n_tile <= l->each + l->each / 8 + 1 && x0 + n_tile < attn_line_start(l, attn_line_block(l, x0) + 2);
}
/* A short sequence, and where it begins in the line; with a head of it ("unit"). */
typedef struct attn_short {
    int32_t seq, len, row0, n_row; /* packed rows */
    int32_t pos0;                  /* of its first row */
    int32_t x0;                    /* place in the line of the first tile of the head */
    int32_t k, head;               /* place among the short sequences; a sequence: head 0 */
} attn_short;
/* The unit that a block has tiles of first, the pages of the first of them, as many as find room; the units of the
 * first and the last tile of its stretch. */
enum { ATTN_START_PAGES = 4 };
typedef struct attn_start {
    attn_short at;
    int32_t page[ATTN_START_PAGES];
    attn_short begin, last;
} attn_start;
static __host__ __device__ __forceinline__ attn_short *attn_shorts(int32_t *work) {
    return (attn_short *)(work + ATTN_HEAD); /* [S] */
}
static __host__ __device__ __forceinline__ int32_t *attn_wide(int32_t *work, int32_t n_seq) {
    return work + ATTN_HEAD + 8 * (int64_t)n_seq; /* [][2] sequence, tile of rows; most keys first */
}
/* [T, C/2] cosine and sine of a row's angles. */
static __host__ __device__ __forceinline__ float2 *attn_turns(int32_t *work, int32_t n_row, int32_t n_seq) {
    return (float2 *)(attn_wide(work, n_seq) + (2 * attn_wide_max(n_row, n_seq) + 3) / 4 * 4);
}
static __host__ __device__ __forceinline__ attn_start *attn_starts(const float2 *turns, int32_t n_row, int32_t C) {
    return (attn_start *)(turns + ((int64_t)n_row * (C / 2) + 1) / 2 * 2); /* [ATTN_BLOCKS_MOST] */
}

/* ---- small things ------------------------------------------------------------------------------------------------ */

/* The last act of a block that takes from the list, by one thread. */
static __device__ __forceinline__ void attn_wide_done(int32_t *work) {
    if (atomicAdd(work + ATTN_WIDE_DONE, 1) == (int32_t)gridDim.x - 1) work[ATTN_WIDE_TAKEN] = work[ATTN_WIDE_DONE] = 0;
}

/* The first act of a kernel that has nothing to do early. Of attn_prefill, this order is also what attn_decode behind
 * it relies on: all that was before is there when the next kernel begins. */
static __device__ __forceinline__ void attn_wait_launch(void) {
    cu_wait_previous();
    cu_launch_next();
}

/* A pair by its angle (cosine, sine). */
static __device__ __forceinline__ float2 attn_turn(float even, float odd, float2 turn) {
    return make_float2(__fsub_rn(__fmul_rn(even, turn.x), __fmul_rn(odd, turn.y)),
                       __fadd_rn(__fmul_rn(odd, turn.x), __fmul_rn(even, turn.y)));
}
static __device__ __forceinline__ float2 attn_angle(int32_t pos, float inv_freq) {
    float s, c;
    sincosf(__fmul_rn((float)pos, inv_freq), &s, &c);
    return make_float2(c, s);
}
/* The nearest code. */
template <int CODES> static __device__ __forceinline__ uint32_t attn_code(float x) {
    return CODES == ATTN_F8 ? cu_e4m3(x) : (uint32_t)__float2int_rn(x) & 0xffu;
}
/* Codes in bits 0..7 and 16..23 as bf16. */
template <int CODES> static __device__ __forceinline__ uint32_t attn_pair(uint32_t w) {
    return CODES == ATTN_F8 ? cu_f8_pair(w) : cu_i8_pair_fast(w);
}
/* Codes and scale of a vector of which each lane of a warp has `per` numbers: quant_act_int8 or quant_act_fp8 with one
 * group. */
template <int per, int CODES = ATTN_I8>
static __device__ __forceinline__ uint32_t attn_codes(const float x[per], float *scale_out) {
    float amax = 0.0f;
    bool good = true;
#pragma unroll
    for (int i = 0; i < per; i++) {
        good = good && fabsf(x[i]) <= FLT_MAX;
        amax = fmaxf(amax, fabsf(x[i]));
    }
    good = __all_sync(0xffffffffu, good);
    for (int d = 16; d > 0; d >>= 1) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
    if (CODES == ATTN_F8) amax = fmaxf(amax, 1e-10f);
    constexpr float most = CODES == ATTN_F8 ? 448.0f : 127.0f;
    float scale = __fdiv_rn(amax, most), f = amax > 0.0f ? __fdiv_rn(most, amax) : 0.0f;
    if (scale < 0x1p-100f) f = scale = 0.0f;
    if (!good) {
        f = 0.0f;
        scale = __int_as_float(0x7fc00000);
    }
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < per; i++)
        if (f > 0.0f) word |= attn_code<CODES>(__fmul_rn(x[i], f)) << (8 * i);
    *scale_out = scale;
    return word;
}
/* `per` (2 or 4) numbers of a lane. */
template <int per> static __device__ __forceinline__ void attn_read(float x[per], const float *from) {
    if (per == 4) {
        const float4 d = *(const float4 *)from;
        x[0] = d.x, x[1] = d.y, x[per - 2] = d.z, x[per - 1] = d.w;
    } else {
        const float2 d = *(const float2 *)from;
        x[0] = d.x, x[1] = d.y;
    }
}
template <int per> static __device__ __forceinline__ void attn_put_bf16(unsigned char *to, const float x[per]) {
    if (per == 4)
        *(uint2 *)to = make_uint2(cu_round2(x[0], x[1]), cu_round2(x[per - 2], x[per - 1]));
    else
        *(uint32_t *)to = cu_round2(x[0], x[1]);
}
template <int per> static __device__ __forceinline__ void attn_put_codes(unsigned char *to, uint32_t word) {
    if (per == 4)
        *(uint32_t *)to = word;
    else
        *(uint16_t *)to = (uint16_t)word;
}

static __device__ __forceinline__ float attn_ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
template <int CODES> static __device__ __forceinline__ float attn_score(float dot, float key_scale) {
    return CODES ? __fmul_rn(dot, key_scale) : dot;
}
/* base: m, or 0 where the row sees nothing, since there is no -inf - -inf. */
static __device__ __forceinline__ float attn_weight(float s, float scale, float base) {
    return attn_ex2(__fmaf_rn(s, scale, -base));
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

/* 16 or 4 bytes to shared memory; zeros where `real` is false. _all: keys and values of decode, each read once: they
 * leave the L2 cache first, so that results on their way to who joins them stay. */
static __device__ __forceinline__ void attn_copy16(uint32_t to, const void *from, bool real) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0)
                 : "memory");
}
static __device__ __forceinline__ void attn_copy4(uint32_t to, const void *from, bool real) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(real ? 4 : 0) : "memory");
}
static __device__ __forceinline__ void attn_copy16_all(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "l"(cu_read_once())
                 : "memory");
}
/* 16 bytes or zeros, or nothing at all; without a branch. */
static __device__ __forceinline__ void attn_copy16_if(bool wanted, uint32_t to, const void *from, bool real) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n"
                 "@p cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n}" ::"r"(to),
                 "l"(from), "r"(real ? 16 : 0), "r"((int)wanted)
                 : "memory");
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

/* Blocks of a kernel that takes from the list: no more than there can be tiles. */
static inline int32_t attn_wide_blocks(const attn_args *a, int32_t n_core) {
    const int64_t most = ((int64_t)a->n_row * a->group / ATTN_ROWS_LESS + a->n_seq) * a->n_kv_head;
    return most < n_core ? (int32_t)most : n_core;
}

/* Cells of a plane, P rounded up. */
static inline int32_t attn_plane_cells(const cu_cache *c) { return (c->n_page_cell + 15) / 16 * 16; }
/* Bytes from a->kv to the key of a position and to its scale; -1: the position is not below len. */
typedef struct attn_cell {
    int64_t key, scale;
} attn_cell;
/* Packed row r (below 16) over the group: exact, since r * (per_group * group - 2^8) < 2^8. */
static __device__ __forceinline__ int32_t attn_token(const attn_args *a, int32_t r) {
    return (int32_t)((uint32_t)r * a->per_group >> 8);
}
/* A position over P. QUICK: by multiplication, exact since at * P < 2^31 (cu_attend sees to it); with it in the prefill
 * kernel ptxas serialises the wgmma (C7511), which costs more than it saves there. */
template <bool QUICK> static __device__ __forceinline__ int32_t attn_nth_page(const attn_args *a, int32_t at) {
    return QUICK ? (int32_t)__umulhi((uint32_t)at * 2, a->per_page) : at / a->n_page_cell;
}
/* Page of a position, or -1. */
template <bool QUICK>
static __device__ __forceinline__ int32_t attn_page_of(const attn_args *a, int32_t seq, int32_t at, int32_t len) {
    return at < len ? a->page[(int64_t)seq * a->n_page_max + attn_nth_page<QUICK>(a, at)] : -1;
}
template <int C, int CODES, bool QUICK>
static __device__ __forceinline__ attn_cell attn_cell_of(const attn_args *a, int32_t page, int32_t head, int32_t at) {
    attn_cell out = {-1, -1};
    if (page < 0) return out;
    const int32_t cell = at - attn_nth_page<QUICK>(a, at) * a->n_page_cell;
    const int64_t plane = page * a->page_bytes + head * a->plane_bytes;
    out.key = plane + (int64_t)cell * (C * (CODES ? 1 : 2));
    out.scale = plane + a->scale_at + (int64_t)cell * 4;
    return out;
}

/* ---- launches (cu_attn_decode.cu, cu_attn_prefill.cu) -------------------------------------------------------------
 */

/* What all of them are given: all but q, out and scratch. False: P is too large for 32 bits. */
bool attn_args_of(attn_args *out, const cu_cache *c, int32_t layer, const cu_seqs *seqs);
/* Multiprocessors of the current device. */
int32_t attn_sm_count(void);
/* Floats of partial results of short sequences: tiles of all of them and their heads, sequences and heads, packed rows.
 */
int64_t attn_decode_floats(int64_t n_tile, int64_t n_unit, int32_t n_row, int32_t C);
/* Blocks of the launch for so many sequences times heads. */
int32_t attn_decode_blocks(int32_t C, int codes, int64_t n_unit);
cudaError_t attn_decode(cudaStream_t s, const attn_args *a, int32_t C, int codes);
/* Where both have rows it goes in front of attn_decode, which may run beside it. */
cudaError_t attn_prefill(cudaStream_t s, const attn_args *a, int32_t C, int codes);

#endif
