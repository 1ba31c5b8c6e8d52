/* What the kernels for more than a few rows share: the arguments of a launch, which tile a block has, the A operand,
 * and what becomes of the sums; copies to shared memory that a barrier there counts. Device code only.
 *
 * A tile is some bands of outputs times some rows. Rows are those of x (plain) or places of one expert. */
#ifndef ERN_BACKEND_CUDA_CU_LARGE_KERNEL_CUH
#define ERN_BACKEND_CUDA_CU_LARGE_KERNEL_CUH

#include "backend/cuda/cu_device.cuh"
#include "backend/cuda/cu_rope.cuh"
#include "backend/cuda/cu_tensor.cuh"

enum {
    LARGE_SUPER = 16, /* row tiles that are walked together past all outputs, so that L2 holds both sides */
};

typedef struct large_args {
    cu_linear w;              /* plain: the linear; grouped: its shape */
    const cu_linear *experts; /* NULL: plain */
    const int32_t *tile_expert, *tile_place, *n_tile, *first;
    const int32_t *place_entry; /* NULL: row p of x belongs to place p */
    int32_t n_used;
    int32_t n_row;
    int32_t tile_bands; /* bands of a tile */
    int32_t n_tile_out, n_tile_row;
    cu_epilogue epilogue;
    const cu_bf16 *x;
    int64_t ldx;
    float *y;
    int64_t ldy;
    cu_bf16 *h;
    int64_t ldh;
    rope_args rope; /* q_out NULL: y */
} large_args;

typedef struct large_tile {
    const unsigned char *pack;
    const float *scale;
    int32_t band0;        /* first band */
    int32_t row, row_end; /* rows (places) row .. row_end-1 */
} large_tile;

static __host__ __device__ constexpr int large_group_bytes(cu_format f) {
    return f == CU_BF16 ? 2048 : f == CU_I4 ? 512 : 1024;
}

/* ---- tiles ---------------------------------------------------------------------------------------------------------
 */

/* Row tiles of group `super`, walked together: LARGE_SUPER, fewer in the last group. */
static __device__ __forceinline__ uint32_t large_high(const large_args *a, uint32_t super) {
    const uint32_t left = (uint32_t)a->n_tile_row - super * LARGE_SUPER;
    return left < LARGE_SUPER ? left : LARGE_SUPER;
}
/* Tile `index`; false: there is none. Tiles run through the row tiles of a group first, then to the next outputs; then
 * through the next group. */
static __device__ __forceinline__ bool large_find(const large_args *a, uint32_t index, int rows, large_tile *t) {
    const uint32_t span = (uint32_t)a->n_tile_out * LARGE_SUPER, super = index / span, at = index % span;
    const uint32_t high = large_high(a, super);
    const int32_t tile_row = (int32_t)(super * LARGE_SUPER + at % high);
    t->band0 = (int32_t)(at / high) * a->tile_bands;
    if (a->experts) {
        if (tile_row >= cu_l2i(a->n_tile)) return false;
        const int32_t e = cu_l2i(a->tile_expert + tile_row), end = cu_l2i(a->first + e + 1);
        t->row = cu_l2i(a->tile_place + tile_row);
        t->row_end = t->row + rows < end ? t->row + rows : end;
        t->pack = (const unsigned char *)a->experts[e].pack;
        t->scale = a->experts[e].scale;
    } else {
        t->row = tile_row * rows;
        t->row_end = t->row + rows < a->n_row ? t->row + rows : a->n_row;
        t->pack = (const unsigned char *)a->w.pack;
        t->scale = a->w.scale;
    }
    return true;
}

/* Row of x that row i of the tile multiplies; -1: none, zeros instead. */
static __device__ __forceinline__ int32_t large_row(const large_args *a, const large_tile *t, int i) {
    const int32_t p = t->row + i;
    if (p >= t->row_end) return -1;
    return a->place_entry ? cu_l2i(a->place_entry + p) / a->n_used : p;
}

/* ---- the A operand: codes of one half of a group (products 2 h, 2 h + 1) ------------------------------------------
 */

template <cu_format F>
static __device__ __forceinline__ void large_codes(uint32_t a[2][4], const unsigned char *group, int h, int lane) {
    if (F == CU_BF16) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const uint4 v = *(const uint4 *)(group + (2 * h + k) * 512 + lane * 16);
            a[k][0] = v.x, a[k][1] = v.y, a[k][2] = v.z, a[k][3] = v.w;
        }
    } else if (F == CU_I4) {
        const uint4 v = *(const uint4 *)(group + lane * 16); /* of both halves: the compiler reads it once */
        const uint32_t word[2] = {h ? v.z : v.x, h ? v.w : v.y};
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) a[k][i] = cu_i4_pair(word[k] >> (4 * i));
    } else {
        const uint4 v = *(const uint4 *)(group + h * 512 + lane * 16);
        const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t w = word[i / 2] >> (i % 2 * 8);
            a[i / 4][i % 4] = F == CU_I8 ? cu_i8_pair_fast(w) : cu_f8_pair(w);
        }
    }
}

/* ---- what becomes of the sums -------------------------------------------------------------------------------------
 *
 * A thread has t[0..3] of an m16n8 square: outputs g, g, g + 8, g + 8 of rows 2c, 2c + 1, 2c, 2c + 1. */

/* What y holds where N squares of band `band`, one below the other from row `row` on, will be added: read as a whole,
 * one wait, not one a number. Only where the epilogue adds. */
template <int N>
static __device__ __forceinline__ void large_old(float old[N * 4], const large_args *a, const large_tile *tile,
                                                 int32_t band, int32_t row, int lane) {
    const int32_t out = band * CU_BAND + lane / 4, row0 = row + 2 * (lane & 3), left = tile->row_end - row0;
    const float *y = a->y + row0 * a->ldy + out;
    const bool there[2] = {out < a->w.n_out, out + 8 < a->w.n_out};
    if (a->epilogue != CU_ADD) return;
#pragma unroll
    for (int i = 0; i < N * 4; i++)
        if (i / 4 * 8 + (i & 1) < left && there[i / 2 & 1]) old[i] = y[(i / 4 * 8 + (i & 1)) * a->ldy + (i & 2) * 4];
}
/* y = or += these squares. */
template <int N>
static __device__ __forceinline__ void large_put(const large_args *a, const large_tile *tile, const float t[N * 4],
                                                 const float old[N * 4], int32_t band, int32_t row, int lane) {
    const int32_t out = band * CU_BAND + lane / 4, row0 = row + 2 * (lane & 3), left = tile->row_end - row0;
    float *y = a->y + row0 * a->ldy + out;
    const bool there[2] = {out < a->w.n_out, out + 8 < a->w.n_out}, add = a->epilogue == CU_ADD;
#pragma unroll
    for (int i = 0; i < N * 4; i++)
        if (i / 4 * 8 + (i & 1) < left && there[i / 2 & 1])
            y[(i / 4 * 8 + (i & 1)) * a->ldy + (i & 2) * 4] = add ? __fadd_rn(old[i], t[i]) : t[i];
}

/* cu_swiglu of N numbers side by side: its division has a branch, behind which the next number waits for this one. The
 * steps are those the division takes where no number on the way is subnormal or beyond f32; others are divided one by
 * one. */
template <int N>
static __device__ __forceinline__ void large_swiglu(float h[N], const float gate[N], const float up[N]) {
    bool plain = true;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float n = gate[i], d = __fadd_rn(1.0f, expf(-n));
        float r;
        plain = plain && n > -80.0f && n < 0x1p100f && fabsf(n) > 0x1p-64f;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
        r = __fmaf_rn(r, __fmaf_rn(-d, r, 1.0f), r);
        const float q = __fmul_rn(n, r);
        h[i] = __fmul_rn(__fmaf_rn(r, __fmaf_rn(-d, q, n), q), up[i]);
    }
    if (plain) return;
#pragma unroll
    for (int i = 0; i < N; i++) h[i] = cu_swiglu(gate[i], up[i]);
}

/* The square of pair `pair` of bands, whose first row is `row`. Lanes of neighbouring outputs trade rows, so that each
 * stores two outputs of one row as a word. All lanes call. */
static __device__ __forceinline__ void large_put_swiglu(const large_args *a, const large_tile *tile,
                                                        const float gate[4], const float up[4], int32_t pair,
                                                        int32_t row, int lane) {
    float x[4];
    large_swiglu<4>(x, gate, up);
    /* of rows 2c, 2c + 1: output g low, g + 8 high */
    const uint32_t v[2] = {cu_round2(x[0], x[2]), cu_round2(x[1], x[3])};
    const bool odd = lane & 4;
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? v[0] : v[1], 4), mine = odd ? v[1] : v[0];
    const uint32_t low = odd ? got : mine, high = odd ? mine : got; /* of the even and the odd output */
    const int32_t r = row + 2 * (lane & 3) + odd, out = pair * CU_BAND + (lane / 4 & 6);
    if (r >= tile->row_end) return;
    cu_bf16 *h = a->h + r * a->ldh + out;
#pragma unroll
    for (int i = 0; i < 2; i++, h += 8) {
        const uint32_t two = __byte_perm(low, high, i ? 0x7632 : 0x5410);
        if (out + 8 * i + 1 < a->w.n_out)
            *(uint32_t *)h = two;
        else if (out + 8 * i < a->w.n_out)
            *h = (cu_bf16)two;
    }
}

/* What the copies and stores rely on: whole 16-byte pieces of x, whole words of h, pairs where pairs are wanted. */
static inline bool large_sound(const large_args *a) {
    if (a->ldx % 8 != 0 || (uintptr_t)a->x % 16 != 0 || a->w.n_band < 1 || a->w.n_seg < 1) return false;
    if (a->epilogue != CU_SWIGLU) return a->y != NULL && !a->w.pairs;
    return a->h != NULL && a->w.pairs && a->w.n_band % 2 == 0 && a->ldh % 2 == 0 && (uintptr_t)a->h % 4 == 0;
}

/* ---- the arguments of a launch, but for the tiles' size ------------------------------------------------------------
 */

static inline large_args large_plain(const cu_job *j) {
    large_args a = {};
    a.w = j->w;
    a.n_row = j->n_row;
    a.epilogue = j->epilogue;
    a.x = j->x, a.ldx = j->ldx;
    a.y = j->y, a.ldy = j->ldy;
    a.h = j->h, a.ldh = j->ldh;
    if (j->rope) a.rope = rope_args_of(j->rope);
    return a;
}
static inline large_args large_experts(const cu_grouped_job *j) {
    const cu_routes *r = j->routes;
    large_args a = {};
    a.w = j->shape;
    a.experts = j->experts;
    a.tile_expert = r->tile_expert, a.tile_place = r->tile_place, a.n_tile = r->n_tile, a.first = r->first;
    a.place_entry = j->gather ? r->place_entry : NULL;
    a.n_used = r->n_used;
    a.n_row = j->n_row;
    a.epilogue = j->epilogue;
    a.x = j->x, a.ldx = j->ldx;
    a.y = j->y, a.ldy = j->ldy;
    a.h = j->h, a.ldh = j->ldh;
    /* As many tiles as these rows can fill at this tile size, whatever cu_tile_rows says of it. */
    const int64_t n = (int64_t)j->n_row * r->n_used, full = n / r->tile_rows + r->n_expert;
    a.n_tile_row = (int32_t)(full < n ? full : n);
    return a;
}

#endif
