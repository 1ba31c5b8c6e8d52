/* All layers of a dense model for a step of few rows, each a sequence's next token, as one kernel: one block a
 * multiprocessor, all of them there from the first layer to the last. The stages of a layer, as blocks go through them:
 *
 *   norm, qkv -> tiles of attention -> joins -> o, x -> norm, gate/up -> down, x
 *
 * A linear is cut into jobs, a band of 16 outputs or a pair of bands (gate, up); a table made at open says which jobs
 * are a block's. One warp of the block does nothing but ask for the packed weights of all its jobs of all layers, in
 * the order of use, through a ring in shared memory: weights wait for no other block. Eight warps compute: they share
 * the segments of a job, and sums of segments meet in shared memory. A warp alone fetches the segments of x that it
 * multiplies with.
 *
 * Between blocks the data is its own flag. What a stage makes goes to a place of this layer's that was filled with
 * CHAIN_NONE, bits that no arithmetic here gives (f32: a NaN other than the one that instructions make; pairs of bf16:
 * the same); who needs it reads the very words until none is CHAIN_NONE. There are two sets of places; a step uses one
 * and fills the other for the next step. Results of tiles of keys have one reader each, who fills the place again when
 * he has read it; the layer after the next writes there.
 *
 * Bits are those of cu_skinny_kernel.cuh, cu_attn_decode.cu and cu_device.cuh: the same units, tiles and orders. */
#ifndef ERN_BACKEND_CUDA_CU_CHAIN_KERNEL_CUH
#define ERN_BACKEND_CUDA_CU_CHAIN_KERNEL_CUH

#include "backend/cuda/cu_attn_tile.cuh"
#include "backend/cuda/cu_chain_words.cuh"
#include "backend/cuda/cu_skinny_unit.cuh"
#include "backend/cuda/cu_tensor.cuh"

enum {
    CHAIN_WARPS = 8, /* that compute */
    CHAIN_THREADS = CHAIN_WARPS * 32,
    CHAIN_JOBS = 4,      /* most of a linear in a block */
    CHAIN_SUMS = 16,     /* most bands times rows of a linear: a thread adds up one output */
    CHAIN_SLOTS = 64,    /* most of the ring */
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
    int16_t join; /* its place among the blocks that join: first those that have nothing of o to do */
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
    int32_t n_layer, n_row, n_row_max, n_tile_max;
    int32_t F;
    int32_t n_seg[CHAIN_LINEARS];
    float eps;
    int32_t n_slot, pitch; /* of the ring; bytes of a row of x in shared memory */
    int32_t f32_at, x_at, norm_at, part_at, part, scale_at, scale,
        ring_at; /* in shared memory; part, scale: floats of a turn */
} chain_args;

/* Slots of the ring hold UNITS segments of a band that lie together, and behind them the scales of its outputs (I8,
 * I4) or segments (F8). */
template <cu_format F> struct chain_shape {
    static constexpr int UNIT = skinny_shape<F>::UNIT, UNITS = F == CU_BF16 ? 1 : F == CU_I8 ? 2 : 4;
    static constexpr int TAIL = F == CU_BF16 ? 0 : F == CU_F8 ? UNITS * 4 : CU_BAND * 4;
    static constexpr int SLOT = UNIT * UNITS + TAIL;
};

/* ---- the block --------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void chain_sync(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"((int)CHAIN_THREADS) : "memory");
}
static __device__ __forceinline__ void chain_arrive(int id) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"((int)CHAIN_THREADS) : "memory");
}
enum { CHAIN_BAR = 1, CHAIN_BAR_SUMS = 2 }; /* and 3: by turn */

/* What the computing warps know of their block. */
typedef struct chain_block {
    unsigned char *smem;
    const chain_jobs *jobs;
    float *row_scale;
    uint32_t full, empty; /* barriers of the ring */
    int32_t slot;         /* of the next job */
    uint32_t parity;
    int turn; /* linears so far, modulo 6: of two places for partial sums and three for scales */
    int warp, lane;
} chain_block;

/* ---- the warp that asks for weights ------------------------------------------------------------------------------ */

template <cu_format F>
static __device__ void chain_fill(const chain_args *a, const chain_jobs *jobs, unsigned char *smem, uint32_t full,
                                  uint32_t empty) {
    typedef chain_shape<F> sh;
    const uint32_t to = attn_smem(smem + a->ring_at), norm_to = attn_smem(smem + a->norm_at);
    int32_t slot = 0;
    uint32_t parity = 1; /* the first time round nobody has to leave a slot */
#pragma unroll 1
    for (int32_t layer = 0; layer < a->n_layer; layer++) {
#pragma unroll 1
        for (int kind = 0; kind < CHAIN_LINEARS; kind++) {
            const unsigned char *pack = a->weights[layer].pack[kind];
            const float *scale = a->weights[layer].scale[kind];
            const int32_t n_band = kind == CHAIN_UP ? 2 : 1, n_seg = a->n_seg[kind];
            if ((kind == CHAIN_QKV || kind == CHAIN_UP) && jobs->n[kind] > 0) {
                const int which = kind == CHAIN_UP;
                const cu_bf16 *norm = which ? a->weights[layer].ffn_norm : a->weights[layer].attn_norm;
                const uint32_t bar = full + (CHAIN_SLOTS + which) * 8;
                chain_wait(empty + (CHAIN_SLOTS + which) * 8, ~layer & 1);
                bar_expect(bar, CHAIN_HIDDEN * 2);
                bar_arrive(bar);
                copy_bulk(norm_to + which * CHAIN_HIDDEN * 2, norm, CHAIN_HIDDEN * 2, bar);
            }
#pragma unroll 1
            for (int j = 0; j < jobs->n[kind]; j++) {
                for (int32_t band = jobs->job[kind][j] * n_band, end = band + n_band; band < end; band++) {
#pragma unroll 1
                    for (int32_t seg = 0; seg < n_seg; seg += sh::UNITS) {
                        const uint32_t bar = full + slot * 8, at = to + slot * sh::SLOT;
                        chain_wait(empty + slot * 8, parity);
                        bar_expect(bar, sh::SLOT);
                        bar_arrive(bar);
                        copy_bulk(at, pack + ((int64_t)band * n_seg + seg) * sh::UNIT, sh::UNIT * sh::UNITS, bar);
                        if (F == CU_F8)
                            copy_bulk(at + sh::UNIT * sh::UNITS, scale + (int64_t)band * n_seg + seg, sh::TAIL, bar);
                        else if (F != CU_BF16)
                            copy_bulk(at + sh::UNIT * sh::UNITS, scale + (int64_t)band * CU_BAND, sh::TAIL, bar);
                        if (++slot == a->n_slot) slot = 0, parity ^= 1;
                    }
                }
            }
        }
    }
}

/* ---- x ----------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ int32_t chain_segments(const chain_block *b, int32_t n_seg) {
    return (n_seg - b->warp + CHAIN_WARPS - 1) / CHAIN_WARPS;
}

/* The warp's segments of x, bf16 [n_row, n_seg * 128]. */
static __device__ __forceinline__ void chain_x(const chain_args *a, const chain_block *b, const uint32_t *x,
                                               int32_t n_seg) {
    constexpr int ONCE = 3;                                                /* vectors of a lane in flight */
    const int32_t own = chain_segments(b, n_seg), n = a->n_row * own * 16; /* chunks of 16 bytes */
    unsigned char *to = b->smem + a->x_at + b->warp * (CU_SEGMENT * 2);
#pragma unroll 1
    for (int32_t i0 = 0; i0 < n; i0 += 32 * ONCE) {
        uint4 v[ONCE];
        const void *from[ONCE];
        unsigned char *at[ONCE];
        int count = 0;
#pragma unroll
        for (int k = 0; k < ONCE; k++) {
            const int32_t i = i0 + k * 32 + b->lane, chunk = i % 16, r = i / 16 / own, seg = i / 16 - r * own;
            if (i >= n) continue;
            count = k + 1;
            from[k] = x + (r * n_seg + b->warp + seg * CHAIN_WARPS) * (CU_SEGMENT / 2) + chunk * 4;
            at[k] = to + r * a->pitch + seg * (CHAIN_WARPS * CU_SEGMENT * 2) + chunk * 16;
        }
        chain_await<ONCE>(v, from, count);
#pragma unroll
        for (int k = 0; k < ONCE; k++)
            if (k < count) *(uint4 *)at[k] = v[k];
    }
    __syncwarp();
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

/* The warp's segment of the norm of x [n_row, D]; which: the layer's first norm, or second. */
static __device__ __forceinline__ void chain_norm(const chain_args *a, const chain_block *b, const float *x, int which,
                                                  int32_t layer) {
    constexpr int ONCE = 4; /* rows in flight */
    const int32_t bar = (CHAIN_SLOTS + which) * 8, n_row = a->n_row, i = b->warp * CU_SEGMENT + b->lane * 4;
    float *f32 = (float *)(b->smem + a->f32_at);
    chain_wait(b->full + bar, layer & 1);
    const uint2 w = *(const uint2 *)(b->smem + a->norm_at + (which * CHAIN_HIDDEN + i) * 2);
    __syncwarp();
    if (b->lane == 0) bar_arrive(b->empty + bar);
#pragma unroll 1
    for (int32_t r0 = 0; r0 < n_row; r0 += ONCE) {
        uint4 v[ONCE];
        const void *from[ONCE];
#pragma unroll
        for (int k = 0; k < ONCE; k++) from[k] = x + (r0 + k) * CHAIN_HIDDEN + i;
        chain_await<ONCE>(v, from, n_row - r0);
#pragma unroll
        for (int k = 0; k < ONCE; k++)
            if (r0 + k < n_row) *(uint4 *)(f32 + (r0 + k) * CHAIN_HIDDEN + i) = v[k];
    }
    chain_sync(CHAIN_BAR);
    const int32_t row = n_row == 1 ? 0 : b->warp; /* of one row every warp finds the scale itself */
    float scale = 0.0f;
    if (row < n_row) scale = chain_row_scale(f32 + row * CHAIN_HIDDEN, a->eps, b->lane);
    if (n_row > 1) {
        if (row < n_row && b->lane == 0) b->row_scale[row] = scale;
        chain_sync(CHAIN_BAR);
    }
#pragma unroll 1
    for (int32_t r = 0; r < n_row; r++) {
        if (n_row > 1) scale = b->row_scale[r];
        const float4 v = *(const float4 *)(f32 + r * CHAIN_HIDDEN + i);
        uint2 out;
        out.x = cu_round2(cu_normed(v.x, scale, (cu_bf16)(w.x & 0xffff)), cu_normed(v.y, scale, (cu_bf16)(w.x >> 16)));
        out.y = cu_round2(cu_normed(v.z, scale, (cu_bf16)(w.y & 0xffff)), cu_normed(v.w, scale, (cu_bf16)(w.y >> 16)));
        *(uint2 *)(b->smem + a->x_at + r * a->pitch + i * 2) = out;
    }
    __syncwarp();
}

/* ---- linears ----------------------------------------------------------------------------------------------------- */

/* Units of a warp whose codes wait in registers for x, as they are packed; their slots are free again. More of int8 and
 * fp8 would not leave registers enough, and what is spilled costs more than a second round. */
template <cu_format F> struct chain_units {
    static constexpr int MOST = F == CU_I4 ? 4 : 2, VECTORS = chain_shape<F>::UNIT / 512; /* units; a lane's of one */
    uint4 code[MOST][VECTORS];
    int32_t seg[MOST], at[MOST]; /* of x; among the block's partial sums */
};

/* The next units of the warp, at most n, `band` and `nth` on. The scales that came with them go to `scale`. */
template <cu_format F>
static __device__ __forceinline__ void chain_take(chain_units<F> *u, const chain_args *a, const chain_block *b,
                                                  int32_t n_seg, int32_t own, int32_t n, int32_t *band, int32_t *nth,
                                                  float *scale) {
    typedef chain_shape<F> sh;
    const unsigned char *ring = b->smem + a->ring_at;
    const int32_t per_band = n_seg / sh::UNITS;
#pragma unroll
    for (int k = 0; k < chain_units<F>::MOST; k++) {
        const int32_t seg = b->warp + *nth * CHAIN_WARPS;
        int32_t slot = b->slot + *band * per_band + seg / sh::UNITS;
        uint32_t parity = b->parity;
#pragma unroll 1
        while (slot >= a->n_slot) slot -= a->n_slot, parity ^= 1;
        u->seg[k] = seg;
        u->at[k] = *band * n_seg + seg;
        const unsigned char *from = ring + slot * sh::SLOT, *tail = from + sh::UNITS * sh::UNIT;
        if (k < n) chain_wait(b->full + slot * 8, parity);
#pragma unroll
        for (int i = 0; i < chain_units<F>::VECTORS; i++)
            u->code[k][i] = *(const uint4 *)(from + seg % sh::UNITS * sh::UNIT + i * 512 + b->lane * 16);
        if (k >= n) continue;
        if (F == CU_F8 && b->lane == 0) scale[u->at[k]] = ((const float *)tail)[seg % sh::UNITS];
        if ((F == CU_I8 || F == CU_I4) && seg == 0 && b->lane < CU_BAND)
            scale[*band * CU_BAND + b->lane] = ((const float *)tail)[b->lane];
        __syncwarp();
        if (b->lane == 0) bar_arrive(b->empty + slot * 8);
        if (++*nth == own) *nth = 0, ++*band;
    }
}

/* Half of a group of a unit: the A operand of two products. */
template <cu_format F>
static __device__ __forceinline__ void chain_codes(uint32_t a[2][4], const uint4 *code, int half) {
    if (F == CU_BF16) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const uint4 v = code[half * 2 + k];
            a[k][0] = v.x, a[k][1] = v.y, a[k][2] = v.z, a[k][3] = v.w;
        }
    } else if (F == CU_I4) {
        const uint4 v = code[half / 2];
        skinny_unpack_half<F>(a, half % 2 ? make_uint4(v.z, v.w, 0, 0) : v);
    } else if (F == CU_I8) {
        const uint32_t word[4] = {code[half].x, code[half].y, code[half].z, code[half].w};
#pragma unroll
        for (int k = 0; k < 8; k++) a[k / 4][k % 4] = cu_i8_pair_fast(word[k / 2] >> (8 * (k % 2)));
    } else {
        skinny_unpack_half<F>(a, code[half]);
    }
}

/* Chains of products of two units side by side, from zero. x: of the lane, for ldmatrix. */
template <cu_format F>
static __device__ __forceinline__ void chain_multiply(float acc[2][4], const chain_units<F> *u, int first, uint32_t x) {
#pragma unroll
    for (int k = 0; k < 2; k++) acc[k][0] = acc[k][1] = acc[k][2] = acc[k][3] = 0.0f;
#pragma unroll
    for (int half = 0; half < 4; half++) {
        uint32_t in[2][4], code[2][2][4];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            attn_load4(in[k], x + u->seg[first + k] * (CU_SEGMENT * 2) + half * 64);
            chain_codes<F>(code[k], u->code[first + k], half);
        }
#pragma unroll
        for (int k = 0; k < 2; k++) cu_mma(acc[k], code[k][0], in[k][0], in[k][1]);
#pragma unroll
        for (int k = 0; k < 2; k++) cu_mma(acc[k], code[k][1], in[k][2], in[k][3]);
    }
}

/* Segments of one output and row, first segment first. n is a multiple of 8. */
template <cu_format F>
static __device__ __forceinline__ float chain_total(const float *part, int32_t stride, const float *scale, int32_t n) {
    float sum = 0.0f;
#pragma unroll 1
    for (int32_t i0 = 0; i0 < n; i0 += 8) {
        float v[8], by[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            v[i] = part[(i0 + i) * stride];
            if (F == CU_F8) by[i] = scale[i0 + i];
        }
#pragma unroll
        for (int i = 0; i < 8; i++) sum = F == CU_F8 ? __fmaf_rn(by[i], v[i], sum) : __fadd_rn(v[i], sum);
    }
    return sum;
}

/* x [n_row, n_in], bf16 or f32 with a norm to be made, times the block's jobs of a linear. out: [n_row, n_out] f32, or
 * bf16 (gate/up); old: what is added to it, or NULL. One piece of code for all linears: four times as much of it would
 * not stay in the instruction cache. */
template <cu_format F>
static __device__ __forceinline__ void chain_linear(const chain_args *a, chain_block *b, int kind, const void *in,
                                                    int32_t layer, uint32_t *out, int32_t n_out, const float *old_x) {
    const int32_t bands = kind == CHAIN_UP ? 2 : 1, n_seg = a->n_seg[kind], n_row = a->n_row;
    const int32_t n_job = b->jobs->n[kind], own = chain_segments(b, n_seg), unit = n_row * CU_BAND;
    const int32_t n = n_job * bands * own;
    const int lane = b->lane;
    if (n_job == 0) return;
    float *part = (float *)(b->smem + a->part_at) + b->turn % 2 * a->part;
    float *scale = (float *)(b->smem + a->scale_at) + b->turn % 3 * a->scale;
    const uint32_t x = attn_smem(b->smem + a->x_at) + (lane % 8 < n_row ? lane % 8 * a->pitch : 0) + lane / 8 * 16;

    /* All that is not x comes before it does. */
    chain_units<F> units;
    constexpr int MOST = chain_units<F>::MOST;
    int32_t band = 0, nth = 0; /* of the next unit: band of all the block's, and segment of the warp's */
    chain_take<F>(&units, a, b, n_seg, own, n, &band, &nth, scale);
    /* This thread's sum: of gate (lanes 0 .. 15) or up, of an output otherwise. */
    const int32_t t = b->warp * 32 + lane, n_sum = n_job * bands * unit, o = t % CU_BAND;
    const int32_t row_job = t / CU_BAND / bands, sum_job = row_job / n_row, r = row_job - sum_job * n_row;
    const bool sums = t < n_sum;
    const int32_t at = sums ? r * n_out + b->jobs->job[kind][sum_job] * CU_BAND + o : 0;
    uint32_t old = 0; /* looked at when it is needed */
    if (old_x && sums) {
        old = chain_read(old_x + at);
    }
    if (kind == CHAIN_QKV || kind == CHAIN_UP)
        chain_norm(a, b, (const float *)in, kind == CHAIN_UP, layer);
    else
        chain_x(a, b, (const uint32_t *)in, n_seg);
#pragma unroll 1
    for (int32_t v = 0;;) {
#pragma unroll
        for (int first = 0; first < MOST; first += 2) {
            if (first > 0 && v + first >= n) break;
            float acc[2][4];
            chain_multiply<F>(acc, &units, first, x);
#pragma unroll
            for (int k = 0; k < 2; k++)
                if (v + first + k < n) skinny_put(part + units.at[first + k] * unit, acc[k], n_row, lane / 4, lane % 4);
        }
        v += MOST;
        if (v >= n) break;
        chain_take<F>(&units, a, b, n_seg, own, n - v, &band, &nth, scale);
    }
    b->slot += n_job * bands * (n_seg / chain_shape<F>::UNITS);
#pragma unroll 1
    while (b->slot >= a->n_slot) b->slot -= a->n_slot, b->parity ^= 1;

    const int id = CHAIN_BAR_SUMS + b->turn % 2;
    b->turn = b->turn == 5 ? 0 : b->turn + 1;
    if (b->warp * 32 >= n_sum) { /* done: those who add up need not be waited for */
        chain_arrive(id);
        return;
    }
    chain_sync(id);
    if (!sums) return;
    const int32_t sum_band = sum_job * bands + t / CU_BAND % bands, first = sum_band * n_seg;
    float total = chain_total<F>(part + first * unit + skinny_part_at(r, o), unit, scale + first, n_seg);
    if (F == CU_I8 || F == CU_I4) total = __fmul_rn(total, scale[sum_band * CU_BAND + o]);
    if (kind == CHAIN_UP) { /* whole warps */
        const float h = cu_swiglu(total, __shfl_down_sync(0xffffffffu, total, 16));
        const float next = __shfl_down_sync(0xffffffffu, h, 1);
        if (lane < CU_BAND && o % 2 == 0) chain_write(out + at / 2, cu_round2(h, next));
    } else {
        if (old_x) {
            for (int i = 0; old == CHAIN_NONE; old = chain_read(old_x + at)) chain_again(&i);
            total = __fadd_rn(__uint_as_float(old), total);
        }
        chain_write(out + at, __float_as_uint(total));
    }
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

/* A block's stretch of the line of all rows' heads' tiles, and a place in it. */
typedef struct chain_tile {
    int32_t row, head, tile, pos;
} chain_tile;

static __device__ __forceinline__ int32_t chain_tiles(int32_t pos) { return pos / CU_KEYS + 1; }
static __device__ __forceinline__ chain_tile chain_tile_of(const attn_args *a, const int32_t *pos, int32_t x) {
    chain_tile t = {};
    int32_t n = chain_tiles(pos[0]);
#pragma unroll 1
    while (x >= n * a->n_kv_head) {
        x -= n * a->n_kv_head;
        n = chain_tiles(pos[++t.row]);
    }
    t.head = x / n;
    t.tile = x - t.head * n;
    t.pos = pos[t.row];
    return t;
}

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

static __device__ __forceinline__ void chain_turn(float x[4], uint4 v, float4 turn) {
    const float2 lo = attn_turn(__uint_as_float(v.x), __uint_as_float(v.y), make_float2(turn.x, turn.y));
    const float2 hi = attn_turn(__uint_as_float(v.z), __uint_as_float(v.w), make_float2(turn.z, turn.w));
    x[0] = lo.x, x[1] = lo.y, x[2] = hi.x, x[3] = hi.y;
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
} chain_line;

template <bool I8>
static __device__ __forceinline__ attn_cell chain_cell(const attn_args *a, const chain_tile *t, int32_t page) {
    return attn_cell_of<CHAIN_HEAD, I8, true>(a, page, t->head, t->tile * CU_KEYS + (int32_t)threadIdx.x);
}
static __device__ __forceinline__ int32_t chain_page(const attn_args *a, const chain_tile *t) {
    const int32_t at = t->tile * CU_KEYS + (int32_t)threadIdx.x;
    return threadIdx.x < CU_KEYS ? attn_page_of<true>(a, t->row, at, t->pos + 1) : -1;
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
    const chain_tile t = chain_tile_of(&a->att, k->pos, k->first);
    const attn_cell cell = chain_cell<I8>(&a->att, &t, chain_page(&a->att, &t));
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
    chain_tile t = chain_tile_of(&a->att, k->pos, k->first);
#pragma unroll 1
    for (int32_t x = k->first; x < k->end; x++) {
        const bool last = x + 1 == k->end, more = !last || layer + 1 < a->n_layer;
        const int32_t next_layer = layer + last, whose = t.row * a->att.n_kv_head + t.head;
        const chain_tile next = chain_tile_of(&a->att, k->pos, last ? k->first : x + 1);
        const int32_t page = chain_page(&a->att, &next); /* asked for early */
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
                s[j][e] = attn_score<I8>(s[j][e], scale, a->att.scale);
                if (t.tile * CU_KEYS + in_tile + (e & 1) > t.pos) s[j][e] = -INFINITY;
                m[e >> 1] = fmaxf(m[e >> 1], s[j][e]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            m[i] = fmaxf(m[i], __shfl_xor_sync(0xffffffffu, m[i], 1));
            m[i] = fmaxf(m[i], __shfl_xor_sync(0xffffffffu, m[i], 2));
            if (c == 0) top[warp * ATTN_FEW + g + 8 * i] = m[i];
        }
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
#pragma unroll
        for (int i = 0; i < 2; i++) {
            m[i] = top[g + 8 * i];
#pragma unroll
            for (int w = 1; w < CHAIN_WARPS; w++) m[i] = fmaxf(m[i], top[w * ATTN_FEW + g + 8 * i]);
        }
#pragma unroll
        for (int j = 0; j < J; j++) {
            const int chunk = warp * J + j;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float p0 = attn_ex2(__fsub_rn(s[j][2 * i], m[i]));
                const float p1 = attn_ex2(__fsub_rn(s[j][2 * i + 1], m[i]));
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
        if (last) {
            cell = chain_cell<I8>(&a->att, &next, page);
            if (threadIdx.x < CU_KEYS) cells[threadIdx.x] = max(cell.key, (int64_t)0);
        }
        chain_sync(CHAIN_BAR); /* values and weights may be overwritten */
        if (last && more) chain_load_scales<I8>(a, b, next_layer, &next, cell, k->turn ^ 1);
#pragma unroll 1
        for (int which = last ? 0 : 1; which < 2; which++) {
            if (more) chain_load<I8>(a, b, next_layer, which, &next);
            attn_copy_commit();
        }
        k->turn ^= 1;
        t = next;
    }
}

/* Join the tiles of a row's heads, a warp 32 dimensions, a lane a dimension; whose places are filled again. */
static __device__ __forceinline__ void chain_join(const chain_args *a, const chain_block *b, const int32_t *pos,
                                                  int32_t layer, uint32_t *out) {
    constexpr int SLICES = CHAIN_HEAD / CHAIN_SLICE;
    const int lane = b->lane;
    const int32_t H = a->att.n_head, n = a->n_row * H * SLICES, step = gridDim.x * CHAIN_WARPS;
    /* from the last warp on: the first ones have more to do */
#pragma unroll 1
    for (int32_t task = b->jobs->join + gridDim.x * (CHAIN_WARPS - 1 - b->warp); task < n; task += step) {
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
#pragma unroll
            for (int j = 0; j < CHAIN_ONCE; j++) {
                if (j >= count) break;
                float f, by;
                attn_factors(&M, __uint_as_float(ml[j].x), &f, &by);
                L = attn_join(L, __uint_as_float(ml[j].y), f, by);
                acc = attn_join(acc, __uint_as_float(o[j]), f, by);
            }
        }
        const float y = __fdiv_rn(acc, L), next = __shfl_down_sync(0xffffffffu, y, 1);
        if (lane % 2 == 0) {
            chain_write(to, cu_round2(y, next));
        }
#pragma unroll 1
        for (int32_t j = 0; j < n_tile; j++) {
            chain_write(piece + j * CHAIN_HEAD, CHAIN_NONE);
            if (lane == 0) chain_write2(piece_ml + j, __uint_as_float(CHAIN_NONE), __uint_as_float(CHAIN_NONE));
        }
        __threadfence(); /* the places are filled before anything that this block makes from here on is seen */
    }
}

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

template <cu_format F, bool I8>
__global__ void __launch_bounds__(CHAIN_THREADS + 32, 1) chain_kernel(const __grid_constant__ chain_args a) {
    extern __shared__ __align__(128) unsigned char chain_memory[];
    __shared__ __align__(8) uint64_t bars[2 * (CHAIN_SLOTS + 2)]; /* of the ring's slots and of two norms */
    __shared__ float row_scale[8];
    __shared__ int32_t pos[8], set;
    __shared__ chain_jobs jobs;
    const int thread = threadIdx.x;
    chain_block b = {};
    b.smem = chain_memory;
    b.jobs = &jobs;
    b.row_scale = row_scale;
    b.full = attn_smem(bars);
    b.empty = b.full + (CHAIN_SLOTS + 2) * 8;
    b.lane = thread % 32;
    b.warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    if (thread == 0) {
        for (int i = 0; i < a.n_slot; i++) {
            bar_init(b.full + i * 8, 1);
            bar_init(b.empty + i * 8, chain_shape<F>::UNITS);
        }
        for (int i = CHAIN_SLOTS; i < CHAIN_SLOTS + 2; i++) {
            bar_init(b.full + i * 8, 1);
            bar_init(b.empty + i * 8, CHAIN_WARPS);
        }
        bar_init_end();
        jobs = a.jobs[blockIdx.x];
    }
    __syncthreads();
    if (b.warp == CHAIN_WARPS) {
        if (b.lane == 0) chain_fill<F>(&a, &jobs, chain_memory, b.full, b.empty);
        return;
    }

    /* Before the wait: all blocks of the step before had counted when they let others begin. */
    if (thread == 0) set = (int32_t)(atomicAdd(a.count, 1ull) / gridDim.x & 1);
    cu_wait_previous();
    if (thread < a.n_row) pos[thread] = a.att.pos[thread];
    chain_sync(CHAIN_BAR);
    chain_line line = {pos, 0, 0, 0};
    {
        int32_t n_tile = 0;
#pragma unroll 1
        for (int32_t r = 0; r < a.n_row; r++) n_tile += chain_tiles(pos[r]) * a.att.n_kv_head;
        const int32_t each = n_tile / (int32_t)gridDim.x, rest = n_tile - each * (int32_t)gridDim.x, i = blockIdx.x;
        line.first = i * each + min(i, rest);
        line.end = line.first + each + (i < rest);
    }
    if (line.first < line.end) chain_attend_first<I8>(&a, &b, &line);
    uint32_t *const to = a.set[set], *const other = a.set[set ^ 1];
#pragma unroll 1
    for (int32_t i = (blockIdx.x * CHAIN_THREADS + thread) * 4; i < a.n_layer * a.at.layer;
         i += gridDim.x * CHAIN_THREADS * 4)
        *(uint4 *)(other + i) = make_uint4(CHAIN_NONE, CHAIN_NONE, CHAIN_NONE, CHAIN_NONE);

    const int32_t Q = a.att.n_head * CHAIN_HEAD, n_qkv = Q + 2 * a.att.n_kv_head * CHAIN_HEAD;
    const float *x = a.x;
#pragma unroll 1
    for (int32_t layer = 0; layer < a.n_layer; layer++) {
        uint32_t *const at = to + layer * a.at.layer;
        if (layer + 1 == a.n_layer) cu_launch_next(); /* all blocks are there */
        const float *const mid = (const float *)(at + a.at.x);
        float *const y = layer + 1 < a.n_layer ? (float *)(at + a.at.y) : a.x;
#pragma unroll 1
        for (int kind = 0; kind < CHAIN_LINEARS; kind++) {
            const void *in = kind == CHAIN_QKV ? (const void *)x
                                               : at + (kind == CHAIN_O    ? a.at.att
                                                       : kind == CHAIN_UP ? a.at.x
                                                                          : a.at.h);
            uint32_t *out = kind == CHAIN_DOWN ? (uint32_t *)y
                                               : at + (kind == CHAIN_QKV ? a.at.qkv
                                                       : kind == CHAIN_O ? a.at.x
                                                                         : a.at.h);
            const float *old = kind == CHAIN_O ? x : kind == CHAIN_DOWN ? mid : NULL;
            if (kind == CHAIN_O) {
                if (line.first < line.end) chain_attend<I8>(&a, &b, &line, layer, at + a.at.qkv);
                chain_join(&a, &b, pos, layer, at + a.at.att);
            }
            chain_linear<F>(&a, &b, kind, in, layer, out,
                            kind == CHAIN_QKV  ? n_qkv
                            : kind == CHAIN_UP ? a.F
                                               : CHAIN_HIDDEN,
                            old);
        }
        x = y;
    }
    attn_copy_wait<0>();
}

#endif
