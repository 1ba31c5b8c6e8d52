/* All layers of a dense model for a step of few rows, each a sequence's next token, as one kernel: one block a
 * multiprocessor, all of them there from the first layer to the last. The stages of a layer, as blocks go through them:
 *
 *   norm, qkv -> tiles of attention -> joins -> o, x -> norm, gate/up -> down, x
 *
 * A linear is cut into jobs, a band of 16 outputs or a pair of bands (gate, up); a table made at open says which jobs
 * are a block's. Packed weights of all its jobs of all layers come through a ring in shared memory, in the order of
 * use: they wait for no other block. The last warp asks for them, eight segments of a band at a time: an octet, of
 * which every warp takes one segment, a unit. Sums of segments meet in shared memory.
 *
 * What a stage takes from the first look at x on is the time of a step, and instructions are its price: nothing is
 * divided, searched or fetched there that can be known before. A warp looks at x, makes its units bf16 in registers
 * while the look is on its way, and looks again until all is there. A warp looks only at the segments that it
 * multiplies with.
 *
 * Between blocks the data is its own flag (cu_chain_words.cuh), in places of each layer. There are two sets of places;
 * a step uses one and fills the other for the next step. Results of tiles of keys have one reader each, who fills the
 * place again before the layer ends; the layer after the next writes there.
 *
 * Bits are those of cu_skinny_kernel.cuh, cu_attn_decode.cu and cu_device.cuh: the same units, tiles and orders. */
#ifndef ERN_BACKEND_CUDA_CU_CHAIN_KERNEL_CUH
#define ERN_BACKEND_CUDA_CU_CHAIN_KERNEL_CUH

#include "backend/cuda/cu_attn_tile.cuh"
#include "backend/cuda/cu_chain_tile.cuh"
#include "backend/cuda/cu_chain_words.cuh"
#include "backend/cuda/cu_skinny_unit.cuh"
#include "backend/cuda/cu_tensor.cuh"

enum {
    CHAIN_WARPS = 8,
    CHAIN_THREADS = CHAIN_WARPS * 32,
    CHAIN_JOBS = 4,      /* most of a linear in a block */
    CHAIN_SUMS = 16,     /* most bands times rows of a linear: a thread adds up one output */
    CHAIN_SLOTS = 32,    /* most of the ring */
    CHAIN_TURNS = 4,     /* of rounds: nobody is so many ahead of another */
    CHAIN_MOST = 4,      /* most units of a warp that wait for x at the same time */
    CHAIN_ROWS = 4,      /* most of a step */
    CHAIN_HEAD = 128,    /* C */
    CHAIN_ONCE = 8,      /* tiles that a join reads at once */
    CHAIN_SLICE = 32,    /* dimensions of a join's warp */
    CHAIN_HIDDEN = 1024, /* D: a segment a warp */
};
enum { CHAIN_QKV, CHAIN_O, CHAIN_UP, CHAIN_DOWN, CHAIN_LINEARS };

typedef struct chain_weights {
    const unsigned char *pack[CHAIN_LINEARS];
    const float *scale[CHAIN_LINEARS];
    const cu_bf16 *attn_norm, *ffn_norm;
} chain_weights;

/* A block's jobs, of every linear. */
typedef struct chain_jobs {
    int16_t n[CHAIN_LINEARS];
    int16_t job[CHAIN_LINEARS][CHAIN_JOBS];
    int16_t join; /* its place among the blocks that join */
} chain_jobs;

/* Words (4 bytes) from a layer's places to those of its results; R rows each. */
typedef struct chain_places {
    int32_t qkv, att, x, h, y; /* f32 [R, (H + 2G) C], bf16 [R, HC], f32 [R, D] after attention, bf16 [R, F], f32 */
    int32_t layer;             /* to the next layer's */
} chain_places;

typedef struct chain_args {
    attn_args att;                /* kv: of layer 0 */
    int64_t layer_bytes;          /* of the cache */
    const chain_weights *weights; /* [L] */
    const chain_jobs *jobs;       /* [blocks] */
    unsigned long long *count;    /* of blocks begun, in all steps */
    float *x;                     /* [n_row, D], in and out */
    uint32_t *set[2];
    chain_places at;
    float *piece[2];     /* results of tiles, of even layers and odd ones: [R, H, n_tile_max, C] */
    float2 *piece_ml[2]; /* [C / CHAIN_SLICE][R, H, n_tile_max]: M and L, for every reader */
    int32_t n_layer, n_row, n_row_max, n_tile_max, n_join; /* blocks that join */
    int32_t F;
    int32_t n_seg[CHAIN_LINEARS];
    float eps;
    int32_t n_fill, n_sum;       /* room for a block's fills, and for sums of a linear */
    int32_t n_slot, most, pitch; /* of the ring; octets of a round; bytes of a row of x in shared memory */
    int32_t f32_at, x_at, norm_at, sum_at, fill_at, part_at, part, scale_at, scale,
        ring_at; /* in shared memory; part, scale: floats of a turn */
} chain_args;

/* An octet is eight segments of a band that lie together, one for each warp. A slot of the ring holds SEGS of them, and
 * behind them the scales of the band's outputs (I8, I4) or of the segments (F8). */
template <cu_format F> struct chain_shape {
    static constexpr int UNIT = skinny_shape<F>::UNIT, SEGS = F == CU_BF16 ? 4 : 8, PER = CHAIN_WARPS / SEGS;
    static constexpr int CODES = UNIT * SEGS, TAIL = F == CU_BF16 ? 0 : F == CU_F8 ? SEGS * 4 : CU_BAND * 4;
    static constexpr int SLOT = CODES + TAIL;
};

/* ---- the block --------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void chain_sync(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"((int)CHAIN_THREADS) : "memory");
}
static __device__ __forceinline__ void chain_arrive(int id) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"((int)CHAIN_THREADS) : "memory");
}
enum { CHAIN_BAR = 1, CHAIN_BAR_SUMS = 2 }; /* and 3: by turn */

/* Eight bytes that nobody writes, asked for here and not later. */
static __device__ __forceinline__ uint2 chain_fetch2(const void *p) {
    uint2 v;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

/* The block's part of a linear: octets (in all, and of a band), sums (n_job, bands, rows times 16). */
typedef struct chain_stage {
    int32_t n, n_octet, n_sum;
} chain_stage;
/* A thread's sum: its place in the output (-1: it has none), its first segment's among the partial sums, the octet of
 * that. */
typedef struct chain_sum {
    int32_t at;
    uint16_t part, octet;
} chain_sum;

/* What warps know of their block. */
typedef struct chain_block {
    unsigned char *smem;
    const chain_jobs *jobs;
    const unsigned char *const *code; /* [n_fill]: what slots are filled with, in the order of use, and (not BF16) */
    const float *const *code_scale;   /* the scales behind it */
    const chain_stage *stage;         /* [CHAIN_LINEARS] */
    const chain_sum *sum;             /* [CHAIN_LINEARS][n_sum] */
    const cu_bf16 *const *norm_of;    /* [L][2] */
    float *row_scale;
    uint32_t full, parity;         /* barriers of the ring */
    int32_t slot;                  /* of the next octet that is taken */
    int32_t n_fill, ask, ask_slot; /* of the next slot that is asked for */
    uint32_t taken;                /* CHAIN_TURNS barriers, by turn: all warps have the octets of a round */
    uint32_t round;                /* so far */
    uint2 norm;                    /* the lane's four weights of the next norm */
    int turn;                      /* linears so far, modulo 6: of two places for partial sums and three for scales */
    int warp, lane;
} chain_block;
static __device__ __forceinline__ int32_t chain_rows(const chain_args *a, int rows) { return rows == 1 ? 1 : a->n_row; }

/* ---- weights ----------------------------------------------------------------------------------------------------- */

/* By one warp: weights for the next `count` slots, which nobody reads any more; a lane a slot. */
template <cu_format F>
static __device__ __forceinline__ void chain_ask(const chain_args *a, chain_block *b, int32_t count) {
    typedef chain_shape<F> sh;
    const int32_t at = b->ask + b->lane;
    int32_t slot = b->ask_slot + b->lane;
    if (slot >= a->n_slot) slot -= a->n_slot;
    if (b->lane < count && at < b->n_fill) {
        const uint32_t bar = b->full + slot * 8, to = attn_smem(b->smem + a->ring_at) + slot * sh::SLOT;
        bar_arrive_expect(bar, sh::SLOT);
        copy_bulk_once(to, b->code[at], sh::CODES, bar);
        if (sh::TAIL > 0) copy_bulk(to + sh::CODES, b->code_scale[at], sh::TAIL, bar);
    }
    b->ask += count;
    b->ask_slot += count;
    if (b->ask_slot >= a->n_slot) b->ask_slot -= a->n_slot;
}

/* All fills of the block, in the order of use; returns those of a layer. */
template <cu_format F>
static __device__ __forceinline__ int32_t chain_list(const chain_args *a, const chain_jobs *jobs, unsigned char *smem) {
    typedef chain_shape<F> sh;
    const unsigned char **code = (const unsigned char **)smem;
    const float **scale = (const float **)(code + a->n_fill);
    int32_t n = 0, nth = 0;
    for (int kind = 0; kind < CHAIN_LINEARS; kind++)
        n += jobs->n[kind] * (kind == CHAIN_UP ? 2 : 1) * (a->n_seg[kind] / sh::SEGS);
#pragma unroll 1
    for (int kind = 0; kind < CHAIN_LINEARS; kind++) {
        const int32_t bands = kind == CHAIN_UP ? 2 : 1, per = a->n_seg[kind] / sh::SEGS;
        const int32_t count = jobs->n[kind] * bands * per;
#pragma unroll 1
        for (int32_t i = threadIdx.x; i < a->n_layer * count; i += CHAIN_THREADS) {
            const int32_t layer = i / count, k = i - layer * count, nth_band = k / per,
                          seg = (k - nth_band * per) * sh::SEGS;
            const int32_t band = jobs->job[kind][nth_band / bands] * bands + nth_band % bands,
                          at = band * a->n_seg[kind] + seg;
            const chain_weights *w = &a->weights[layer];
            code[layer * n + nth + k] = w->pack[kind] + (int64_t)at * sh::UNIT;
            if (sh::TAIL > 0) scale[layer * n + nth + k] = w->scale[kind] + (F == CU_F8 ? at : band * CU_BAND);
        }
        nth += count;
    }
    return n;
}

/* Bits 0..7 and 16..23: two's complement q -> bf16 q / 64. With the sign turned round they are q + 128, and that as the
 * bits of a bf16 is (q + 128) 2^-133, through the subnormals and on. Two instructions for two codes where q itself
 * takes three; sums are a power of two too small, their bits the same but for sums below 2^-119. */
static __device__ __forceinline__ uint32_t chain_i8_pair(uint32_t w) {
    uint32_t bits, out;
    const uint32_t sign = 0x00800080u, mask = 0x00ff00ffu, up = 0x7f007f00u, less = 0xc000c000u; /* 2^127, -2 */
    asm("lop3.b32 %0, %1, %2, %3, 0x28;" : "=r"(bits) : "r"(w), "r"(sign), "r"(mask));           /* (w ^ sign) & mask */
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(bits), "r"(up), "r"(less));
    return out;
}
/* What sums of such codes are to be multiplied with. */
template <cu_format F> static __device__ __forceinline__ float chain_code_scale(float scale) {
    return F == CU_I8 ? __fmul_rn(scale, 64.0f) : scale;
}
template <cu_format F> static __device__ __forceinline__ void chain_unpack(uint32_t a[8][4], const uint4 *raw) {
#pragma unroll
    for (int t = 0; t < (F == CU_BF16 ? 8 : 4); t++) {
        const uint4 v = F == CU_I4 ? raw[t / 2] : raw[t];
        const uint32_t word[4] = {v.x, v.y, v.z, v.w};
        if (F == CU_BF16) {
#pragma unroll
            for (int k = 0; k < 4; k++) a[t][k] = word[k];
        } else if (F == CU_I4) {
            skinny_unpack_half<F>(a + 2 * t, t % 2 ? make_uint4(v.z, v.w, 0, 0) : v);
        } else if (F == CU_I8) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                a[2 * t + k / 2][k % 2 * 2] = chain_i8_pair(word[k]);
                a[2 * t + k / 2][k % 2 * 2 + 1] = chain_i8_pair(word[k] >> 8);
            }
        } else {
            skinny_unpack_half<F>(a + 2 * t, v);
        }
    }
}

/* The next `count` octets, of which the first is the linear's `first`: the warp's units as bf16, the A operand of their
 * products. The scale of the thread's output comes with octet by_octet (I8, I4); those of segments go to `scale` (F8).
 * Beyond `count`, zeros: nobody looks at them, but the compiler must know them as new ones. */
template <cu_format F, int N>
static __device__ __forceinline__ void chain_take(uint32_t code[N][8][4], const chain_args *a, chain_block *b,
                                                  int32_t first, int32_t count, int32_t by_octet, float *by,
                                                  float *scale) {
    typedef chain_shape<F> sh;
    constexpr int VECTORS = sh::UNIT / 512; /* a lane's of a unit */
#pragma unroll
    for (int k = 0; k < N; k++) {
        if (k >= count) {
#pragma unroll
            for (int i = 0; i < 32; i++) code[k][i / 4][i % 4] = 0;
            continue;
        }
        const int32_t slot = b->slot + b->warp / sh::SEGS;
        const unsigned char *from = b->smem + a->ring_at + slot * sh::SLOT;
        chain_wait(b->full + slot * 8, b->parity);
        b->slot += sh::PER;
        if (b->slot == a->n_slot) b->slot = 0, b->parity ^= 1;
        uint4 raw[VECTORS];
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            raw[i] = *(const uint4 *)(from + b->warp % sh::SEGS * sh::UNIT + i * 512 + b->lane * 16);
        if ((F == CU_I8 || F == CU_I4) && first + k == by_octet)
            *by = chain_code_scale<F>(((const float *)(from + sh::CODES))[b->lane % CU_BAND]);
        if (F == CU_F8 && b->lane == 0)
            scale[(first + k) * CHAIN_WARPS + b->warp] = ((const float *)(from + sh::CODES))[b->warp];
        chain_unpack<F>(code[k], raw);
    }
#pragma unroll
    for (int k = 0; k < N; k++) wide_hold_codes<8>(code[k]); /* before x is looked at */
    const uint32_t taken = b->taken + b->round % CHAIN_TURNS * 8;
    __syncwarp();
    if (b->lane == 0) {
        uint32_t read = F == CU_I8 || F == CU_I4 ? __float_as_uint(*by) : 0; /* of every load of the slots */
#pragma unroll
        for (int k = 0; k < N; k++) {
            uint32_t unit = 0;
#pragma unroll
            for (int i = 0; i < 8; i += 8 / VECTORS) unit |= code[k][i][0];
            read += unit; /* a sum, so that units need not wait for one another */
        }
        bar_leave(taken, read, cu_hidden_zero(a->n_layer));
    }
    if (b->warp == CHAIN_WARPS - 1) {
        chain_wait(taken, b->round / CHAIN_TURNS % 2);
        chain_ask<F>(a, b, count * sh::PER);
    }
    b->round++;
}

/* ---- x ----------------------------------------------------------------------------------------------------------- */

/* One look at the warp's part of x: with a norm to be made its segment, f32 [n_row, D] (a lane four numbers of every
 * row: the first vector); else bf16 [n_row, n_octet * 1024], two octets (a lane 16 bytes of each, the second two octets
 * behind the first: half the warp looks at odd ones). */
template <int ROWS> struct chain_look { uint4 v[ROWS][2]; };
template <int ROWS>
static __device__ __forceinline__ void chain_see(chain_look<ROWS> *l, const uint32_t *x, int32_t n_row, int32_t ldx,
                                                 bool first, bool second) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= n_row) break;
        if (first) l->v[r][0] = cu_look4(x + r * ldx);
        if (second) l->v[r][1] = cu_look4(x + r * ldx + 2 * CHAIN_WARPS * CU_SEGMENT / 2);
    }
}
template <int ROWS>
static __device__ __forceinline__ bool chain_seen(const chain_look<ROWS> *l, int32_t n_row, bool first, bool second) {
    bool none = false;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= n_row) break;
        if (first) none |= chain_none(l->v[r][0]);
        if (second) none |= chain_none(l->v[r][1]);
    }
    return !__any_sync(0xffffffffu, none);
}

/* 1 / sqrt(mean of squares) of a row in shared memory: cu_sum_squares' order. */
static __device__ __forceinline__ float chain_row_scale(const float *x, float eps, int lane) {
    float sum = 0.0f;
    float4 v[CHAIN_WARPS];
#pragma unroll
    for (int k = 0; k < CHAIN_WARPS; k++) v[k] = *(const float4 *)(x + k * CU_SEGMENT + lane * 4);
#pragma unroll
    for (int k = 0; k < CHAIN_WARPS; k++) sum = cu_add_squares(v[k], sum);
    return __frsqrt_rn(__fadd_rn(__fmul_rn(cu_warp_sum(sum), 1.0f / CHAIN_HIDDEN), eps)); /* 2^-10: exact */
}

/* The warp's segment of the norm of x [n_row, D], which has been seen. */
template <int ROWS>
static __device__ __forceinline__ void chain_norm(const chain_args *a, const chain_block *b,
                                                  const chain_look<ROWS> *l) {
    const int32_t n_row = chain_rows(a, ROWS), i = b->warp * CU_SEGMENT + b->lane * 4;
    float *f32 = (float *)(b->smem + a->f32_at);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (r < n_row) *(uint4 *)(f32 + r * CHAIN_HIDDEN + i) = l->v[r][0];
    chain_sync(CHAIN_BAR);
    if (b->warp < n_row) {
        const float scale = chain_row_scale(f32 + b->warp * CHAIN_HIDDEN, a->eps, b->lane);
        if (b->lane == 0) b->row_scale[b->warp] = scale;
    }
    chain_sync(CHAIN_BAR);
    const uint2 w = b->norm;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= n_row) break;
        const float scale = b->row_scale[r];
        const uint4 v = l->v[r][0];
        uint2 out;
        out.x = cu_round2(cu_normed(__uint_as_float(v.x), scale, (cu_bf16)(w.x & 0xffff)),
                          cu_normed(__uint_as_float(v.y), scale, (cu_bf16)(w.x >> 16)));
        out.y = cu_round2(cu_normed(__uint_as_float(v.z), scale, (cu_bf16)(w.y & 0xffff)),
                          cu_normed(__uint_as_float(v.w), scale, (cu_bf16)(w.y >> 16)));
        *(uint2 *)(b->smem + a->x_at + r * a->pitch + i * 2) = out;
    }
    __syncwarp();
}

/* ---- linears ----------------------------------------------------------------------------------------------------- */

/* Chains of products of N units side by side, from zero. x: of the lane, for ldmatrix; oct: of the first unit, which
 * the others follow, round n_octet. Sums go to part. */
template <int ROWS, int N>
static __device__ __forceinline__ void chain_products(const chain_block *b, const uint32_t code[][8][4], int32_t count,
                                                      uint32_t x, int32_t oct, int32_t n_octet, float *part,
                                                      int32_t n_row) {
    constexpr bool AHEAD = ROWS == 1 || N == 2; /* x is read half a group ahead, where registers allow */
    float acc[N][4];
    uint32_t from[N], in[2][N][4];
#pragma unroll
    for (int k = 0; k < N; k++) {
        acc[k][0] = acc[k][1] = acc[k][2] = acc[k][3] = 0.0f;
        from[k] = x + oct * (CHAIN_WARPS * CU_SEGMENT * 2);
        if (++oct == n_octet) oct = 0;
        if (AHEAD) attn_load4(in[0][k], from[k]);
    }
#pragma unroll
    for (int half = 0; half < 4; half++) {
#pragma unroll
        for (int k = 0; k < N; k++)
            if (half + AHEAD < 4) attn_load4(in[(half + AHEAD) % 2][k], from[k] + (half + AHEAD) * 64);
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
            for (int k = 0; k < N; k++)
                cu_mma(acc[k], code[k][half * 2 + s], in[half % 2][k][2 * s], in[half % 2][k][2 * s + 1]);
    }
#pragma unroll
    for (int k = 0; k < N; k++)
        if (k < count)
            skinny_put(part + (k * CHAIN_WARPS + b->warp) * n_row * CU_BAND, acc[k], n_row, b->lane / 4, b->lane % 4);
}

/* Segments of one output and row, first segment first. n is a multiple of 8. */
template <cu_format F>
static __device__ __forceinline__ float chain_total(const float *part, int32_t stride, const float *scale, int32_t n) {
    float sum = 0.0f, v[2][8], by[2][8];
#pragma unroll
    for (int i = 0; i < 8; i++) v[0][i] = part[i * stride], by[0][i] = F == CU_F8 ? scale[i] : 1.0f;
#pragma unroll 1
    for (int32_t i0 = 8;; i0 += 8) {
        const int32_t from = i0 < n ? i0 : 0; /* eight are asked for while eight are added */
#pragma unroll
        for (int i = 0; i < 8; i++) v[1][i] = part[(from + i) * stride], by[1][i] = F == CU_F8 ? scale[from + i] : 1.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) sum = F == CU_F8 ? __fmaf_rn(by[0][i], v[0][i], sum) : __fadd_rn(v[0][i], sum);
        if (i0 >= n) return sum;
#pragma unroll
        for (int i = 0; i < 8; i++) v[0][i] = v[1][i], by[0][i] = by[1][i];
    }
}

/* x [n_row, n_in], f32 with a norm to be made (qkv, gate/up) or bf16, times the block's jobs of a linear. out: [n_row,
 * n_out] f32, or bf16 (gate/up); old: what is added to it, or NULL. */
template <cu_format F, int ROWS>
static __device__ __forceinline__ void chain_linear(const chain_args *a, chain_block *b, int kind, const uint32_t *in,
                                                    uint32_t *out, const float *old_x) {
    const bool norm = kind == CHAIN_QKV || kind == CHAIN_UP;
    const int32_t n_row = chain_rows(a, ROWS), unit = n_row * CU_BAND, lane = b->lane;
    constexpr int N = ROWS == 1 ? CHAIN_MOST : 2; /* units of a warp at a time */
    const chain_stage st = b->stage[kind];
    if (st.n == 0) return;
    const bool sums = b->warp * 32 < st.n_sum;
    const chain_sum sum = b->sum[kind * a->n_sum + (sums ? b->warp * 32 + lane : 0)];
    float *part = (float *)(b->smem + a->part_at) + b->turn % 2 * a->part;
    float *scale = (float *)(b->smem + a->scale_at) + b->turn % 3 * a->scale;

    /* All that is not x comes before it does, but for a first look. */
    chain_look<ROWS> look;
    const int32_t ldx = norm ? CHAIN_HIDDEN : st.n_octet * (CHAIN_WARPS * CU_SEGMENT / 2);
    int32_t oct = norm ? 0 : lane / 16; /* that the lane looks at, and the second from there on */
    const uint32_t *from = in + (norm ? b->warp * CU_SEGMENT + lane * 4
                                      : (oct * CHAIN_WARPS + b->warp) * (CU_SEGMENT / 2) + lane % 16 * 4);
    bool one = oct < st.n_octet, two = !norm && oct + 2 < st.n_octet;
    if (ROWS == 1) chain_see<ROWS>(&look, from, n_row, ldx, one, two); /* others have no registers for it yet */
    uint32_t old = 0;                                                  /* looked at when it is needed */
    if (old_x && sums && sum.at >= 0) old = chain_read(old_x + sum.at);
    float by = 1.0f;
    int32_t count = 0, oct_of = 0; /* of the round's first unit */
#pragma unroll 1
    for (int32_t first = 0;;) {
        uint32_t code[N][8][4];
        count = min(st.n - first, min(a->most, N));
        chain_take<F, N>(code, a, b, first, count, sum.octet, &by, scale);
#pragma unroll 1
        for (int32_t begun = 0; first == 0 && begun < st.n_octet; begun += 4) {
            if (begun > 0) {
                oct += 4;
                from += 4 * (CHAIN_WARPS * CU_SEGMENT / 2);
                one = oct < st.n_octet, two = oct + 2 < st.n_octet;
            }
            if (ROWS > 1 || begun > 0) chain_see<ROWS>(&look, from, n_row, ldx, one, two);
            for (int looks = 0; !chain_seen<ROWS>(&look, n_row, one, two); chain_again(&looks))
                chain_see<ROWS>(&look, from, n_row, ldx, one, two);
            if (norm) {
                chain_norm<ROWS>(a, b, &look);
            } else {
                unsigned char *to =
                    b->smem + a->x_at + (oct * CHAIN_WARPS + b->warp) * (CU_SEGMENT * 2) + lane % 16 * 16;
#pragma unroll
                for (int k = 0; k < ROWS; k++) {
                    if (k >= n_row) break;
                    if (one) *(uint4 *)(to + k * a->pitch) = look.v[k][0];
                    if (two) *(uint4 *)(to + k * a->pitch + 2 * CHAIN_WARPS * CU_SEGMENT * 2) = look.v[k][1];
                }
                __syncwarp();
            }
        }
        const uint32_t x = attn_smem(b->smem + a->x_at) + (lane % 8 < n_row ? lane % 8 * a->pitch : 0) + lane / 8 * 16 +
                           b->warp * (CU_SEGMENT * 2);
        float *to = part + first * CHAIN_WARPS * unit;
        if (N > 2 && count > 2)
            chain_products<ROWS, N>(b, code, count, x, oct_of, st.n_octet, to, n_row);
        else
            chain_products<ROWS, 2>(b, code, count, x, oct_of, st.n_octet, to, n_row);
        first += count;
        if (first >= st.n) break;
        chain_sync(CHAIN_BAR); /* so that nobody is far ahead of another: see `taken` */
        for (oct_of += count; oct_of >= st.n_octet;) oct_of -= st.n_octet;
    }

    const int id = CHAIN_BAR_SUMS + b->turn % 2;
    b->turn = b->turn == 5 ? 0 : b->turn + 1;
    if (!sums) { /* done: those who add up need not be waited for */
        chain_arrive(id);
        return;
    }
    chain_sync(id);
    float total = chain_total<F>(part + sum.part, unit, scale + sum.octet * CHAIN_WARPS, st.n_octet * CHAIN_WARPS);
    if (F == CU_I8 || F == CU_I4) total = __fmul_rn(total, by);
    if (kind == CHAIN_UP) { /* whole warps: gate in lanes 0 .. 15 */
        const float h = cu_swiglu(total, __shfl_down_sync(0xffffffffu, total, 16));
        const float next = __shfl_down_sync(0xffffffffu, h, 1);
        if (lane < CU_BAND && lane % 2 == 0) chain_write(out + sum.at / 2, cu_round2(h, next));
    } else if (sum.at >= 0) {
        if (old_x) {
            for (int i = 0; old == CHAIN_NONE; old = chain_read(old_x + sum.at)) chain_again(&i);
            total = __fadd_rn(__uint_as_float(old), total);
        }
        chain_write(out + sum.at, __float_as_uint(total));
    }
}
/* What the kernel knows of its linears before it begins. */
template <int ROWS>
static __device__ __forceinline__ void chain_plan(const chain_args *a, const chain_jobs *jobs, chain_stage *stage,
                                                  chain_sum *sums) {
    const int32_t n_row = chain_rows(a, ROWS), t = threadIdx.x, o = t % CU_BAND, Q = a->att.n_head * CHAIN_HEAD;
#pragma unroll 1
    for (int kind = 0; kind < CHAIN_LINEARS; kind++) {
        const int32_t bands = kind == CHAIN_UP ? 2 : 1, n_octet = a->n_seg[kind] / CHAIN_WARPS, n_job = jobs->n[kind];
        const int32_t row_job = t / CU_BAND / bands, job = row_job / n_row, r = row_job - job * n_row;
        const int32_t octet = (job * bands + t / CU_BAND % bands) * n_octet;
        const int32_t n_out = kind == CHAIN_QKV  ? Q + 2 * a->att.n_kv_head * CHAIN_HEAD
                              : kind == CHAIN_UP ? a->F
                                                 : CHAIN_HIDDEN;
        chain_sum s = {-1, 0, 0};
        if (job < n_job)
            s = {r * n_out + jobs->job[kind][job] * CU_BAND + o,
                 (uint16_t)(octet * CHAIN_WARPS * n_row * CU_BAND + skinny_part_at(r, o)), (uint16_t)octet};
        if (t < a->n_sum) sums[kind * a->n_sum + t] = s;
        if (t == 0) stage[kind] = {n_job * bands * n_octet, n_octet, n_job * bands * n_row * CU_BAND};
    }
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

/* Where this step's key or value of the row goes, the lane's four dimensions and the scale: in shared memory and in its
 * cell (NULL: none). */
typedef struct chain_own {
    unsigned char *near, *far;
    float *near_scale, *far_scale;
} chain_own;
template <bool I8>
static __device__ __forceinline__ chain_own chain_own_of(const attn_args *a, unsigned char *kv, unsigned char *smem,
                                                         const chain_tile *t, int32_t cell, int which, float *scales,
                                                         int lane) {
    typedef tile_shape<CHAIN_HEAD, I8, CHAIN_WARPS> sh;
    const int32_t in_tile = t->pos % CU_KEYS, byte = lane * 4 * (I8 ? 1 : 2);
    const int32_t nth = cell / a->n_page_cell, in_page = cell - nth * a->n_page_cell;
    unsigned char *plane = kv + nth * a->page_bytes + t->head * a->plane_bytes + which * a->value;
    chain_own own;
    own.near = smem + (which ? sh::v_at : sh::k_at) + attn_at<sh::chunks>(in_tile, byte / 16) + byte % 16;
    own.far = cell < 0 ? NULL : plane + (int64_t)in_page * sh::row_bytes + byte;
    own.near_scale = scales + in_tile;
    own.far_scale = (float *)(plane + a->scale_at) + in_page;
    return own;
}
template <bool I8>
static __device__ __forceinline__ void chain_put_own(const chain_own *to, const float x[4], int lane) {
    if (I8) {
        float scale;
        const uint32_t word = attn_codes<4>(x, &scale);
        attn_put_codes<4>(to->near, word);
        if (to->far) attn_put_codes<4>(to->far, word);
        if (lane == 0) *to->near_scale = scale;
        if (lane == 0 && to->far) *to->far_scale = scale;
    } else {
        attn_put_bf16<4>(to->near, x);
        if (to->far) attn_put_bf16<4>(to->far, x);
    }
}

/* The group's rows of q (where they are not there yet), a warp a row, and with the row's own tile its key and value:
 * warp 0 and 1. value_scale: I8, of the tile. */
template <bool I8>
static __device__ __forceinline__ void chain_make(const chain_args *a, const chain_block *b, unsigned char *kv,
                                                  const uint32_t *qkv, const chain_tile *t, bool q, float *key_scale,
                                                  float *value_scale) {
    typedef tile_shape<CHAIN_HEAD, I8, CHAIN_WARPS> sh;
    const attn_args *at = &a->att;
    const int lane = b->lane, warp = b->warp;
    const bool own = t->tile == t->pos / CU_KEYS && warp < 2;
    const uint32_t *row = qkv + (int64_t)t->row * (at->n_head + 2 * at->n_kv_head) * CHAIN_HEAD + lane * 4;
    const int32_t cell = at->cell[t->row];
    const float4 turn = *(const float4 *)(at->turn + (int64_t)t->row * (CHAIN_HEAD / 2) + lane * 2);
    const uint32_t *own_at = row + (at->n_head + warp * at->n_kv_head + t->head) * CHAIN_HEAD;
    const uint32_t *q_at = row + (t->head * at->group + warp) * CHAIN_HEAD;
    const bool makes_q = q && warp < at->group;
    if (!own && !makes_q) return;
    chain_own to_own = {};
    if (own) to_own = chain_own_of<I8>(at, kv, b->smem, t, cell, warp, warp ? value_scale : key_scale, lane);
    uint4 v[2];
    const void *const from[2] = {own ? own_at : q_at, makes_q ? q_at : own_at};
    chain_await<2>(v, from, 2);
    float x[4];
    if (own) {
        if (warp == 0)
            chain_turn(x, v[0], turn);
        else
            x[0] = __uint_as_float(v[0].x), x[1] = __uint_as_float(v[0].y), x[2] = __uint_as_float(v[0].z),
            x[3] = __uint_as_float(v[0].w);
        chain_put_own<I8>(&to_own, x, lane);
    }
#pragma unroll 1
    for (int32_t r = warp; makes_q && r < at->group; r += CHAIN_WARPS) {
        if (r > warp) {
            const void *const next[1] = {row + (t->head * at->group + r) * CHAIN_HEAD};
            chain_await<1>(v + 1, next, 1);
        }
        chain_turn(x, v[1], turn);
        const uint32_t lo = cu_round2(x[0], x[1]), hi = cu_round2(x[2], x[3]), chunk = lane / 2;
        unsigned char *to = b->smem + sh::q_at;
        if (I8) { /* places of cu_attn.cuh */
            const int half = (chunk & 1 ? 8 : 0) + (lane & 1) * 4;
            *(uint32_t *)(to + attn_at<sh::q_chunks>(r, chunk & ~1u) + half) = __byte_perm(lo, hi, 0x5410);
            *(uint32_t *)(to + attn_at<sh::q_chunks>(r, chunk | 1u) + half) = __byte_perm(lo, hi, 0x7632);
        } else {
            *(uint2 *)(to + attn_at<sh::q_chunks>(r, chunk) + (lane & 1) * 8) = make_uint2(lo, hi);
        }
    }
}

/* The block's tiles: first..end-1 of the line; turn: which of two places the value scales of the next tile have. */
typedef struct chain_line {
    const int32_t *pos; /* of the rows, in shared memory */
    int32_t first, end;
    int turn;
    chain_tile tile; /* the first, and the thread's page of it: the same in all layers */
    int32_t page;
} chain_line;

template <bool I8>
static __device__ __forceinline__ attn_cell chain_cell(const attn_args *a, const chain_tile *t, int32_t page) {
    return attn_cell_of<CHAIN_HEAD, I8, true>(a, page, t->head, t->tile * CU_KEYS + (int32_t)threadIdx.x);
}
template <bool I8>
static __device__ __forceinline__ void chain_load(const chain_args *a, const chain_block *b, int32_t layer, int which,
                                                  const chain_tile *t) {
    const int32_t own = t->pos - t->tile * CU_KEYS;
    tile_load<CHAIN_HEAD, I8, CHAIN_WARPS, true>(&a->att, a->att.kv + layer * a->layer_bytes, b->smem, which, own + 1,
                                                 own);
}
template <bool I8>
static __device__ __forceinline__ void chain_load_scales(const chain_args *a, const chain_block *b, int32_t layer,
                                                         const chain_tile *t, attn_cell cell, int turn) {
    typedef tile_shape<CHAIN_HEAD, I8, CHAIN_WARPS> sh;
    float *scale = (float *)(b->smem + sh::scale_at);
    if (I8 && threadIdx.x < CU_KEYS)
        tile_load_scales(&a->att, a->att.kv + layer * a->layer_bytes, scale, scale + (1 + turn) * CU_KEYS, cell,
                         t->pos - t->tile * CU_KEYS);
}

/* Keys and values of earlier steps of the block's first tile are asked for. */
template <bool I8>
static __device__ __forceinline__ void chain_attend_first(const chain_args *a, const chain_block *b,
                                                          const chain_line *k) {
    typedef tile_shape<CHAIN_HEAD, I8, CHAIN_WARPS> sh;
    const chain_tile t = k->tile;
    const attn_cell cell = chain_cell<I8>(&a->att, &t, k->page);
    if (threadIdx.x < CU_KEYS) ((int64_t *)(b->smem + sh::cell_at))[threadIdx.x] = max(cell.key, (int64_t)0);
    for (int i = b->warp * 32 + b->lane; i < (ATTN_FEW - a->att.group) * (CHAIN_HEAD / 8); i += CHAIN_THREADS)
        ((uint4 *)(b->smem + sh::q_at))[a->att.group * (CHAIN_HEAD / 8) + i] = make_uint4(0, 0, 0, 0); /* no rows */
    chain_sync(CHAIN_BAR);
    chain_load_scales<I8>(a, b, 0, &t, cell, k->turn);
#pragma unroll 1
    for (int which = 0; which < 2; which++) {
        chain_load<I8>(a, b, 0, which, &t);
        attn_copy_commit();
    }
}

/* O of a tile, and its M and L. */
static __device__ __forceinline__ int64_t chain_piece_at(const chain_args *a, int32_t row, int32_t head, int32_t tile) {
    return ((int64_t)row * a->att.n_head + head) * a->n_tile_max + tile;
}
template <bool I8>
static __device__ __forceinline__ void chain_put_tile(const chain_args *a, const chain_block *b, int32_t layer,
                                                      const chain_tile *t, const float o[2][4], const float m[2],
                                                      const float l[4]) {
    const int g = b->lane / 4, c = b->lane % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int32_t r = g + 8 * i;
        if (r >= a->att.group) continue;
        const int64_t at = chain_piece_at(a, t->row, t->head * a->att.group + r, t->tile);
        float *piece = a->piece[layer & 1] + at * CHAIN_HEAD + b->warp * 16;
        const float x[4] = {o[0][2 * i], o[I8 ? 1 : 0][2 * i + (I8 ? 0 : 1)], o[I8 ? 0 : 1][2 * i + (I8 ? 1 : 0)],
                            o[1][2 * i + 1]};
        const int first = I8 ? 4 * c : 2 * c, second = first + (I8 ? 2 : 8);
        chain_write2(piece + first, x[0], x[1]);
        chain_write2(piece + second, x[2], x[3]);
        if (b->warp < CHAIN_HEAD / CHAIN_SLICE && c == 0)
            chain_write2(a->piece_ml[layer & 1] + (int64_t)b->warp * a->n_row_max * a->att.n_head * a->n_tile_max + at,
                         m[i], l[2 * i]);
    }
}

template <bool I8>
static __device__ __forceinline__ void chain_attend(const chain_args *a, const chain_block *b, chain_line *k,
                                                    int32_t layer, const uint32_t *qkv) {
    typedef tile_shape<CHAIN_HEAD, I8, CHAIN_WARPS> sh;
    constexpr int J = sh::warp_keys / 8;
    const int warp = b->warp, lane = b->lane, g = lane / 4, c = lane % 4;
    unsigned char *smem = b->smem, *kv = a->att.kv + layer * a->layer_bytes;
    float *key_scale = (float *)(smem + sh::scale_at), *top = (float *)(smem + sh::top_at);
    int64_t *cells = (int64_t *)(smem + sh::cell_at);
    int32_t have = -1; /* whose q is there */
    chain_tile t = k->tile;
#pragma unroll 1
    for (int32_t x = k->first; x < k->end; x++) {
        const bool last = x + 1 == k->end;
        const int32_t whose = t.row * a->att.n_kv_head + t.head;
        const chain_tile next = last ? k->tile : chain_tile_of(&a->att, k->pos, x + 1);
        const int32_t page = last ? k->page : chain_page(&a->att, &next); /* asked for early */
        float *value_scale = key_scale + (1 + k->turn) * CU_KEYS;
        chain_make<I8>(a, b, kv, qkv, &t, have != whose, key_scale, value_scale);
        have = whose;
        attn_copy_wait<1>();
        chain_sync(CHAIN_BAR); /* keys and q are there; nobody reads `cells` any more */
        float s[J][4], m[2] = {-INFINITY, -INFINITY};
        tile_scores<CHAIN_HEAD, I8, CHAIN_WARPS>(s, smem, warp, lane);
#pragma unroll
        for (int j = 0; j < J; j++) {
            const int in_tile = warp * sh::warp_keys + j * 8 + 2 * c;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float scale = I8 ? key_scale[in_tile + (e & 1)] : 1.0f;
                s[j][e] = attn_score<I8>(s[j][e], scale);
                if (t.tile * CU_KEYS + in_tile + (e & 1) > t.pos) s[j][e] = -INFINITY;
                m[e >> 1] = fmaxf(m[e >> 1], s[j][e]);
            }
        }
        tile_put_top(m, top, warp, g, c);
        /* The next layer waits until these results are on their way. */
        attn_cell cell;
        if (!last) {
            cell = chain_cell<I8>(&a->att, &next, page);
            if (threadIdx.x < CU_KEYS) cells[threadIdx.x] = max(cell.key, (int64_t)0);
        }
        chain_sync(CHAIN_BAR); /* maxima are there; keys and q may be overwritten */
        if (!last) {
            chain_load_scales<I8>(a, b, layer, &next, cell, k->turn ^ 1);
            chain_load<I8>(a, b, layer, 0, &next);
        }
        attn_copy_commit();
        tile_top<CHAIN_WARPS>(m, top, g, a->att.scale);
#pragma unroll
        for (int j = 0; j < J; j++) {
            const int chunk = warp * J + j;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float p0 = attn_weight(s[j][2 * i], a->att.scale, m[i]);
                const float p1 = attn_weight(s[j][2 * i + 1], a->att.scale, m[i]);
                const uint32_t at = attn_at<16>(g + 8 * i, chunk) + c * 4;
                *(uint32_t *)(smem + sh::l_at + at) = cu_round2(p0, p1);
                if (I8) {
                    const float *scale = value_scale + chunk * 8 + 2 * c;
                    *(uint32_t *)(smem + sh::p_at + at) =
                        cu_round2(attn_scaled(p0, scale[0]), attn_scaled(p1, scale[1]));
                }
            }
        }
        attn_copy_wait<1>();
        chain_sync(CHAIN_BAR); /* values and weights are there */
        float o[sh::warp_units][2][4], l[4];
        tile_weigh<CHAIN_HEAD, I8, CHAIN_WARPS>(o, l, smem, warp, lane);
        chain_put_tile<I8>(a, b, layer, &t, o[0], m, l);
        k->turn ^= 1;
        if (last) break;       /* chain_attend_next goes on */
        chain_sync(CHAIN_BAR); /* values and weights may be overwritten */
        chain_load<I8>(a, b, layer, 1, &next);
        attn_copy_commit();
        t = next;
    }
}
/* The next layer's first tile is asked for: when results of this one's are on their way, and joined. */
template <bool I8>
static __device__ __forceinline__ void chain_attend_next(const chain_args *a, const chain_block *b, const chain_line *k,
                                                         int32_t layer) {
    typedef tile_shape<CHAIN_HEAD, I8, CHAIN_WARPS> sh;
    const attn_cell cell = chain_cell<I8>(&a->att, &k->tile, k->page);
    if (threadIdx.x < CU_KEYS) ((int64_t *)(b->smem + sh::cell_at))[threadIdx.x] = max(cell.key, (int64_t)0);
    chain_sync(CHAIN_BAR); /* values, weights and cells of the last tile may be overwritten */
    chain_load_scales<I8>(a, b, layer, &k->tile, cell, k->turn);
#pragma unroll 1
    for (int which = 0; which < 2; which++) {
        chain_load<I8>(a, b, layer, which, &k->tile);
        attn_copy_commit();
    }
}

/* From the last warp but one on: the last one asks for weights, the first ones add up. */
static __device__ __forceinline__ int32_t chain_join_first(const chain_args *a, const chain_block *b) {
    return b->jobs->join + a->n_join * ((2 * CHAIN_WARPS - 2 - b->warp) % CHAIN_WARPS);
}
/* Join the tiles of a row's heads, a warp 32 dimensions, a lane a dimension. */
static __device__ __forceinline__ void chain_join(const chain_args *a, const chain_block *b, const int32_t *pos,
                                                  int32_t layer, uint32_t *out) {
    constexpr int SLICES = CHAIN_HEAD / CHAIN_SLICE;
    const int lane = b->lane;
    const int32_t H = a->att.n_head, n = a->n_row * H * SLICES, step = a->n_join * CHAIN_WARPS;
    if (b->jobs->join >= a->n_join) return;
#pragma unroll 1
    for (int32_t task = chain_join_first(a, b); task < n; task += step) {
        const int32_t slice = task % SLICES, row = task / SLICES / H, head = task / SLICES - row * H;
        const int32_t n_tile = chain_tiles(pos[row]);
        const int64_t at = chain_piece_at(a, row, head, 0);
        float *piece = a->piece[layer & 1] + at * CHAIN_HEAD + slice * CHAIN_SLICE + lane;
        float2 *piece_ml = a->piece_ml[layer & 1] + (int64_t)slice * a->n_row_max * H * a->n_tile_max + at;
        uint32_t *to = out + (((int64_t)row * H + head) * CHAIN_HEAD + slice * CHAIN_SLICE + lane) / 2;
        float M = -INFINITY, L = 0.0f, acc = 0.0f;
#pragma unroll 1
        for (int32_t from = 0; from < n_tile; from += CHAIN_ONCE) {
            /* Factors of so many tiles at once: a largest value has no order. */
            const int32_t count = min((int32_t)CHAIN_ONCE, n_tile - from);
            uint32_t o[CHAIN_ONCE];
            uint2 ml[CHAIN_ONCE];
            int looks = 0;
            for (;;) {
                uint32_t most = 0;
#pragma unroll
                for (int j = 0; j < CHAIN_ONCE; j++) {
                    o[j] = 0, ml[j] = make_uint2(__float_as_uint(-INFINITY), 0);
                    if (j < count)
                        ml[j] = cu_look2(piece_ml + from + j), o[j] = chain_read(piece + (from + j) * CHAIN_HEAD);
                }
#pragma unroll
                for (int j = 0; j < CHAIN_ONCE; j++) most = max(most, max(o[j], max(ml[j].x, ml[j].y)));
                if (!__any_sync(0xffffffffu, most == CHAIN_NONE)) break;
                chain_again(&looks);
            }
            float f[CHAIN_ONCE], by[CHAIN_ONCE];
#pragma unroll
            for (int j = 0; j < CHAIN_ONCE; j++) attn_factors(&M, __uint_as_float(ml[j].x), &f[j], &by[j]);
#pragma unroll
            for (int j = 0; j < CHAIN_ONCE; j++) { /* no branch between them: their factors come at the same time */
                const float next_L = attn_join(L, __uint_as_float(ml[j].y), f[j], by[j]);
                const float next = attn_join(acc, __uint_as_float(o[j]), f[j], by[j]);
                if (j < count) L = next_L, acc = next;
            }
        }
        const float y = __fdiv_rn(acc, L), next = __shfl_down_sync(0xffffffffu, y, 1);
        if (lane % 2 == 0) {
            chain_write(to, cu_round2(y, next));
        }
    }
}
/* The places that chain_join read are filled again, by who read them. Before anything that this block makes from here
 * on is seen; not at once, since others wait for what comes behind the join. */
static __device__ __forceinline__ void chain_join_end(const chain_args *a, const chain_block *b, const int32_t *pos,
                                                      int32_t layer) {
    constexpr int SLICES = CHAIN_HEAD / CHAIN_SLICE;
    const int32_t H = a->att.n_head, n = a->n_row * H * SLICES, step = a->n_join * CHAIN_WARPS;
    if (b->jobs->join >= a->n_join) return;
#pragma unroll 1
    for (int32_t task = chain_join_first(a, b); task < n; task += step) {
        const int32_t slice = task % SLICES, row = task / SLICES / H, head = task / SLICES - row * H;
        const int64_t at = chain_piece_at(a, row, head, 0);
        float *piece = a->piece[layer & 1] + at * CHAIN_HEAD + slice * CHAIN_SLICE + b->lane;
        float2 *piece_ml = a->piece_ml[layer & 1] + (int64_t)slice * a->n_row_max * H * a->n_tile_max + at;
        const int32_t n_tile = chain_tiles(pos[row]);
#pragma unroll 1
        for (int32_t j = 0; j < n_tile; j++) {
            chain_write(piece + j * CHAIN_HEAD, CHAIN_NONE);
            if (b->lane == 0) chain_write2(piece_ml + j, __uint_as_float(CHAIN_NONE), __uint_as_float(CHAIN_NONE));
        }
        __threadfence();
    }
}

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

template <cu_format F, bool I8, int ROWS>
__global__ void __launch_bounds__(CHAIN_THREADS, 1) chain_kernel(const __grid_constant__ chain_args a) {
    extern __shared__ __align__(128) unsigned char chain_memory[];
    __shared__ __align__(8) uint64_t bars[CHAIN_SLOTS + CHAIN_TURNS];
    __shared__ float row_scale[CHAIN_ROWS];
    __shared__ int32_t pos[CHAIN_ROWS], set;
    __shared__ chain_jobs jobs;
    __shared__ chain_stage stage[CHAIN_LINEARS];
    const int thread = threadIdx.x;
    chain_block b = {};
    b.smem = chain_memory;
    b.jobs = &jobs;
    b.stage = stage;
    b.sum = (const chain_sum *)(chain_memory + a.sum_at);
    b.norm_of = (const cu_bf16 *const *)(chain_memory + a.norm_at);
    b.code = (const unsigned char *const *)(chain_memory + a.fill_at);
    b.code_scale = (const float *const *)(b.code + a.n_fill);
    b.row_scale = row_scale;
    b.full = attn_smem(bars);
    b.taken = b.full + CHAIN_SLOTS * 8;
    b.lane = thread % 32;
    b.warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    if (thread == 0) {
        for (int i = 0; i < a.n_slot; i++) bar_init(b.full + i * 8, 1);
        for (int i = 0; i < CHAIN_TURNS; i++) bar_init(b.taken + i * 8, CHAIN_WARPS);
        bar_init_end();
        jobs = a.jobs[blockIdx.x];
    }
    __syncthreads();
    b.n_fill = a.n_layer * chain_list<F>(&a, &jobs, chain_memory + a.fill_at);
    chain_plan<ROWS>(&a, &jobs, stage, (chain_sum *)(chain_memory + a.sum_at));
    for (int32_t i = thread; i < 2 * a.n_layer; i += CHAIN_THREADS)
        ((const cu_bf16 **)(chain_memory + a.norm_at))[i] =
            i % 2 ? a.weights[i / 2].ffn_norm : a.weights[i / 2].attn_norm;
    __syncthreads();
    if (b.warp == CHAIN_WARPS - 1) chain_ask<F>(&a, &b, a.n_slot);

    /* Before the wait: all blocks of the step before had counted when they let others begin. */
    if (thread == 0) set = (int32_t)(atomicAdd(a.count, 1ull) / gridDim.x & 1);
    cu_wait_previous();
    if (thread < a.n_row) pos[thread] = a.att.pos[thread];
    chain_sync(CHAIN_BAR);
    chain_line line = {};
    line.pos = pos;
    {
        int32_t n_tile = 0;
#pragma unroll 1
        for (int32_t r = 0; r < a.n_row; r++) n_tile += chain_tiles(pos[r]) * a.att.n_kv_head;
        const int32_t each = n_tile / (int32_t)gridDim.x, rest = n_tile - each * (int32_t)gridDim.x, i = blockIdx.x;
        line.first = i * each + min(i, rest);
        line.end = line.first + each + (i < rest);
    }
    if (line.first < line.end) {
        line.tile = chain_tile_of(&a.att, pos, line.first);
        line.page = chain_page(&a.att, &line.tile);
        chain_attend_first<I8>(&a, &b, &line);
    }
    uint32_t *const to = a.set[set], *const other = a.set[set ^ 1];
#pragma unroll 1
    for (int32_t i = (blockIdx.x * CHAIN_THREADS + thread) * 4; i < a.n_layer * a.at.layer;
         i += gridDim.x * CHAIN_THREADS * 4)
        *(uint4 *)(other + i) = make_uint4(CHAIN_NONE, CHAIN_NONE, CHAIN_NONE, CHAIN_NONE);

    const int32_t lane_at = b.warp * CU_SEGMENT + b.lane * 4; /* of D */
    const float *x = a.x;
    b.norm = chain_fetch2(b.norm_of[0] + lane_at);
#pragma unroll 1
    for (int32_t layer = 0; layer < a.n_layer; layer++) {
        uint32_t *const at = to + layer * a.at.layer;
        const float *const mid = (const float *)(at + a.at.x);
        float *const y = layer + 1 < a.n_layer ? (float *)(at + a.at.y) : a.x;
        if (layer + 1 == a.n_layer) cu_launch_next(); /* all blocks are there */
#pragma unroll 1
        for (int kind = 0; kind < CHAIN_LINEARS; kind++) {
            const float *const in = kind == CHAIN_QKV ? x
                                                      : (float *)(at + (kind == CHAIN_O    ? a.at.att
                                                                        : kind == CHAIN_UP ? a.at.x
                                                                                           : a.at.h));
            uint32_t *out = kind == CHAIN_DOWN ? (uint32_t *)y
                                               : at + (kind == CHAIN_QKV ? a.at.qkv
                                                       : kind == CHAIN_O ? a.at.x
                                                                         : a.at.h);
            const float *old = kind == CHAIN_O ? x : kind == CHAIN_DOWN ? mid : NULL;
            if (kind == CHAIN_O) {
                b.norm = chain_fetch2(b.norm_of[layer * 2 + 1] + lane_at);
                if (line.first < line.end) chain_attend<I8>(&a, &b, &line, layer, at + a.at.qkv);
                chain_join(&a, &b, pos, layer, at + a.at.att);
                if (line.first < line.end && layer + 1 < a.n_layer) chain_attend_next<I8>(&a, &b, &line, layer + 1);
            }
            if (kind == CHAIN_DOWN) chain_join_end(&a, &b, pos, layer);
            if (kind == CHAIN_DOWN && layer + 1 < a.n_layer) b.norm = chain_fetch2(b.norm_of[layer * 2 + 2] + lane_at);
            chain_linear<F, ROWS>(&a, &b, kind, (const uint32_t *)in, out, old);
        }
        x = y;
    }
    attn_copy_wait<0>();
}

#endif
