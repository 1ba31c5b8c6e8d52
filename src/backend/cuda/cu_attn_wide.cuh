/* Prefill attention for C = 128 by warpgroups, to be included by cu_attn_prefill.cu alone.
 *
 * wgmma is, number for number, a chain of the m16n8k16 products of cu_attn.cuh's law (check_attention.c holds it to the
 * decode kernel's bits), reads keys and values from shared memory once for 64 rows where mma.sync reads them for 16,
 * and runs while the same warps do other things.
 *
 * A block stays on its multiprocessor. Warpgroup 2 fills shared memory (cu_attn_fill.cuh). Warpgroups 0 and 1 make
 *   S = q K, both from shared memory, 64 x 128; weights stay in registers, as the A operand of
 *   O = P V, 64 x 128, V as it lies (dimensions along a row); BF16: eight columns of ones behind it give the sum of the
 *   weights (mma.sync waits for the other's products)
 * in one of two ways, by how many rows the block has:
 *
 * More than 64 (wide_each): each has 64 of them and all tiles of keys. It has a turn at the tensor cores: O of a tile,
 * then S of the next, which it waits for when the turn is the other's. Meanwhile it joins O, under S, and makes weights
 * of S, under the other's products. Registers hold the totals, S and O, or S and the weights, not all of them: S begins
 * when O is there.
 *
 * 64 or less (wide_turns): both have all of them and every other tile of keys. A piece of a prompt has fewer rows than
 * the chip has room for, and its time is that of one block's walk. Each keeps the totals of half of the rows, which
 * leaves room for S of its next tile to be made beside O, and gets O of the other's tiles for them by way of shared
 * memory.
 *
 * After any change look at what ptxas says: "wgmma.mma_async instructions are serialized" (C7511, C7513, C7518, C7520)
 * costs a quarter of the speed, and small things bring it about, here as in what warpgroup 2 does (unrolled loops,
 * addresses kept over a loop, a branch around products that all lanes take alike). */
#ifndef ERN_BACKEND_CUDA_CU_ATTN_WIDE_CUH
#define ERN_BACKEND_CUDA_CU_ATTN_WIDE_CUH

#include "backend/cuda/cu_attn_fill.cuh"

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* The same in all lanes, and the compiler is to know it. */
static __device__ __forceinline__ uint32_t wide_uniform(uint32_t x) { return __shfl_sync(0xffffffffu, x, 0); }
/* d = A B + (add ? d : 0): 64 rows, 128 keys, 16 dimensions, both in shared memory along their rows. */
static __device__ __forceinline__ void wide_score(float *d, uint64_t a, uint64_t b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" CU_D64_NAMES "%64, %65, p, 1, 1, 0, 0;}\n"
                 : CU_D64(d)
                 : "l"(a), "l"(b), "r"(add));
}
/* The same of 128 dimensions and 16 keys: a from registers; a key's dimensions lie along a row. */
static __device__ __forceinline__ void wide_weigh(float *d, const uint32_t a[4], uint64_t b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" CU_D64_NAMES
                 "{%64, %65, %66, %67}, %68, p, 1, 1, 1;}\n"
                 : CU_D64(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
/* With eight columns more, behind the dimensions. */
static __device__ __forceinline__ void wide_weigh_sum(float *d, const uint32_t a[4], uint64_t b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %73, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n136k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
                 "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "
                 "%31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "
                 "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67}, "
                 "{%68, %69, %70, %71}, %72, p, 1, 1, 1;}\n"
                 : CU_D64(d), "+f"((d)[64]), "+f"((d)[65]), "+f"((d)[66]), "+f"((d)[67])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
/* What these registers hold is not wanted any more: they are free until they are written. Products that begin from zero
 * seem to read them. */
template <int N> static __device__ __forceinline__ void wide_forget(float *d) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "=f"(d[i]));
}
static __device__ __forceinline__ void wide_scores(float *s, uint32_t q, uint32_t k) {
    const uint64_t a = wide_matrix(q), b = wide_matrix(k);
    wide_forget<64>(s);
#pragma unroll
    for (int i = 0; i < 8; i++)
        wide_score(s, a + (i / 4) * (64 * 128 / 16) + (i % 4) * 2, b + (i / 4) * (WIDE_HALF / 16) + (i % 4) * 2, i > 0);
    wide_commit();
}
/* SUM: the ones lie behind the values; the sums of the weights are o[64] and, of row g + 8, o[66]. */
template <bool SUM> static __device__ __forceinline__ void wide_values(float *o, const uint32_t p[8][4], uint32_t v) {
    const uint64_t b = wide_matrix(v) + ((uint64_t)(WIDE_HALF / 16 - 1) << 16); /* halves of the dimensions apart */
    wide_forget<SUM ? 68 : 64>(o);
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (SUM)
            wide_weigh_sum(o, p[i], b + i * (16 * 128 / 16), i > 0);
        else
            wide_weigh(o, p[i], b + i * (16 * 128 / 16), i > 0);
    wide_commit();
}

/* The same, there and then. */
template <int CODES> static __device__ __forceinline__ void wide_weighed(float *o, uint32_t p[8][4], uint32_t v) {
    wide_hold_codes<8>(p);
    wide_fence();
    wide_values<!CODES>(o, p, v);
    wide_wait<0>();
    wide_hold<CODES ? 64 : 68>(o);
    wide_hold_codes<8>(p);
}

/* Turns at the tensor cores, warpgroup 0 first. */
static __device__ __forceinline__ void wide_my_turn(int group) {
    asm volatile("bar.sync %0, 256;" ::"r"(2 + group) : "memory");
}
static __device__ __forceinline__ void wide_your_turn(int group) {
    asm volatile("bar.arrive %0, 256;" ::"r"(3 - group) : "memory");
}

/* ---- from scores to output -------------------------------------------------------------------------------------- */

/* A row's totals so far. */
typedef struct wide_row {
    float M, L;
    float f, b;  /* factors of the totals and of O of the tile that is to be joined */
    int32_t pos; /* -1: no such row */
} wide_row;

/* m: the greatest score of the tile from key0 on. A row that sees nothing of it gets factors 1 and -0, which leave any
 * total as it is, for its O is 0. */
static __device__ __forceinline__ void wide_factors(wide_row *w, float m, int32_t key0) {
    w->f = 1.0f, w->b = -0.0f;
    if (key0 <= w->pos) attn_factors(&w->M, m, &w->f, &w->b);
}
static __device__ __forceinline__ void wide_join_sum(wide_row *w, float l) { w->L = attn_join(w->L, l, w->f, w->b); }
/* Scores of a tile become weights, not rounded yet. pos: of rows g and g + 8 of a warp; m: their greatest scores. cut:
 * some row of the warpgroup does not see all of the tile. */
template <int CODES>
static __device__ __forceinline__ void wide_soften(float *s, float m[2], const int32_t pos[2], const float *key_scale,
                                                   int32_t key0, bool cut, float scale) {
    const int c = threadIdx.x & 3;
    if (CODES)
#pragma unroll
        for (int j = 0; j < 16; j++) {
            const float2 of = *(const float2 *)(key_scale + j * 8 + 2 * c);
#pragma unroll
            for (int e = 0; e < 4; e++) s[4 * j + e] = __fmul_rn(s[4 * j + e], e & 1 ? of.y : of.x);
        }
    if (cut)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int32_t last = pos[i] - key0 - 2 * c; /* of the thread's keys that the row sees, less 2 c */
#pragma unroll
            for (int j = 0; j < 16; j++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (j * 8 + e > last) s[4 * j + 2 * i + e] = -INFINITY;
        }
    float base[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float x[4]; /* four chains */
#pragma unroll
        for (int k = 0; k < 4; k++) x[k] = fmaxf(s[4 * k + 2 * i], s[4 * k + 2 * i + 1]);
#pragma unroll
        for (int j = 4; j < 16; j++) x[j & 3] = fmaxf(x[j & 3], fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
        float top = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        m[i] = __fmul_rn(top, scale);
        base[i] = key0 <= pos[i] ? m[i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 64; i++) s[i] = attn_weight(s[i], scale, base[i >> 1 & 1]);
}
/* Weights as products want them; l, with codes: their sums, of rows g and g + 8, in 0 and 2. */
template <int CODES>
static __device__ __forceinline__ void wide_pack(uint32_t p[8][4], float l[4], const float *s,
                                                 const float *value_scale) {
    const int c = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < 4; i++) l[i] = 0.0f;
#pragma unroll
    for (int kk = 0; kk < 8; kk++) {
        uint32_t pl[4]; /* rows g, g+8 of the lower eight keys, then of the upper */
#pragma unroll
        for (int x = 0; x < 4; x++) {
            const int j = 2 * kk + (x >> 1), i = x & 1;
            const float p0 = s[4 * j + 2 * i], p1 = s[4 * j + 2 * i + 1];
            pl[x] = cu_round2(p0, p1);
            if (CODES) {
                const float2 of = *(const float2 *)(value_scale + j * 8 + 2 * c);
                p[kk][x] = cu_round2(attn_scaled(p0, of.x), attn_scaled(p1, of.y));
            } else {
                p[kk][x] = pl[x];
            }
        }
        if (CODES) cu_mma(l, pl, 0x3f803f80u, 0x3f803f80u);
    }
}

/* A row's head is a segment: codes of its 128 numbers, which four lanes have, pairs 8 j + 2 c a lane. Those of four j
 * change places until a lane has eight in a row. there: the row is. All lanes call. */
template <cu_codes K>
static __device__ __forceinline__ void wide_put_codes(const attn_args *a, const uint32_t two[16], int32_t row,
                                                      int32_t head, bool there) {
    const int c = threadIdx.x & 3;
    uint32_t top = 0, word[8];
#pragma unroll
    for (int j = 0; j < 16; j++) top = max(top, max(two[j] << 16 & 0x7fffffffu, two[j] & 0x7fff0000u));
    top = max(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = max(top, __shfl_xor_sync(0xffffffffu, top, 2));
    float scale;
    const float f = a8_factor<K>(&scale, top);
#pragma unroll
    for (int n = 0; n < 8; n++) { /* j = 2 n + c % 2, dimensions 8 j + 4 (c / 2) .. */
        const float v[4] = {__uint_as_float(two[2 * n] << 16), __uint_as_float(two[2 * n] & 0xffff0000u),
                            __uint_as_float(two[2 * n + 1] << 16), __uint_as_float(two[2 * n + 1] & 0xffff0000u)};
        const uint32_t both = f == 0.0f ? 0 : a8_code4<K>(v, f);
        const uint32_t got = __shfl_xor_sync(0xffffffffu, both, 1);
        word[n] = c & 1 ? __byte_perm(got, both, 0x7632) : __byte_perm(both, got, 0x5410);
    }
    uint8_t *to = a->out8.code + row * a->out8.ldx + head * WIDE_C + c * 8;
#pragma unroll
    for (int n = 0; n < 4; n++) { /* j = 4 n + c */
        const uint32_t got = __shfl_xor_sync(0xffffffffu, c & 2 ? word[2 * n] : word[2 * n + 1], 2);
        const uint2 v = c & 2 ? make_uint2(got, word[2 * n + 1]) : make_uint2(word[2 * n], got);
        if (there) *(uint2 *)(to + n * 32) = v;
    }
    if (there && c == 0) a->out8.scale[head * a->out8.ld_scale + row] = scale;
}

/* One row's output: its dimensions 8 j + 2 c and the next, j = 0 .. 15. acc: of dimension 8 j + 2 c at acc[STEP * j],
 * the next behind it. All lanes call. */
template <int STEP>
static __device__ __forceinline__ void wide_store(const attn_args *a, const wide_item *it, const wide_row *w, int32_t r,
                                                  const float *acc) {
    const int32_t t = r / a->group, row = it->row0 + t, head = it->head * a->group + r - t * a->group;
    const bool there = w->pos >= 0;
    uint32_t two[16];
#pragma unroll
    for (int j = 0; j < 16; j++) two[j] = cu_round2(__fdiv_rn(acc[STEP * j], w->L), __fdiv_rn(acc[STEP * j + 1], w->L));
    if (a->out_codes == CU_CODES_F8)
        wide_put_codes<CU_CODES_F8>(a, two, row, head, there);
    else if (a->out_codes == CU_CODES_I8)
        wide_put_codes<CU_CODES_I8>(a, two, row, head, there);
    else if (there)
#pragma unroll
        for (int j = 0; j < 16; j++)
            *(uint32_t *)(a->out + row * a->ldo + head * WIDE_C + j * 8 + 2 * (threadIdx.x & 3)) = two[j];
}

/* acc [N] times f0 and f1, two numbers each in turn. Most tiles raise no row's greatest score, and nothing is
 * multiplied by 1. With what follows it, acc b + acc f, this is attn_join. */
template <int N> static __device__ __forceinline__ void wide_scale(float *acc, float f0, float f1) {
    if (!__any_sync(0xffffffffu, f0 != 1.0f || f1 != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < N; i++) acc[i] = __fmul_rn(acc[i], i & 2 ? f1 : f0);
}
template <int CODES> static __device__ __forceinline__ void wide_join(float *acc, const float *o, wide_row w[2]) {
    wide_scale<64>(acc, w[0].f, w[1].f);
#pragma unroll
    for (int i = 0; i < 64; i++) acc[i] = __fmaf_rn(o[i], w[i >> 1 & 1].b, acc[i]);
    if (!CODES)
#pragma unroll
        for (int i = 0; i < 2; i++) wide_join_sum(&w[i], o[64 + 2 * i]);
}

/* ---- 64 rows each ------------------------------------------------------------------------------------------------ */

/* Returns the piece behind the last. */
template <int CODES>
static __device__ __forceinline__ uint32_t wide_each(const attn_args *a, wide_shared *sh, uint32_t ring, int group,
                                                     int thread, const wide_item it, uint32_t piece) {
    const int warp = thread / 32, lane = thread % 32, g = lane >> 2;
    const uint32_t full = attn_smem(sh->full), empty = attn_smem(sh->empty), done = attn_smem(&sh->done);
    const uint32_t q = ring + wide_room<CODES>::q + group * (64 * 256);
    const int32_t mine = it.first + group * 64;
    const int32_t low = mine + 63 < it.n ? it.pos0 + mine / a->group : -1; /* least position; -1: a row is missing */
    uint32_t slot = wide_slot(piece);
    wide_row w[2];
    int32_t pos[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int32_t r = mine + warp * 16 + g + 8 * i, t = r / a->group;
        pos[i] = w[i].pos = r < it.n ? it.pos0 + t : -1;
        w[i].M = -INFINITY;
        w[i].L = 0.0f;
    }
    float acc[64] = {}, s[64], o[CODES ? 64 : 68], m[2], l[4];
    uint32_t p[8][4];
    bar_wait(full + slot * 8, wide_parity(piece));
    wide_my_turn(group);
    wide_fence();
    wide_scores(s, q, wide_uniform(ring + wide_room<CODES>::slot(slot)));
    wide_your_turn(group);
#pragma unroll 1
    for (int32_t tile = 0;; tile++) {
        const uint32_t keys = wide_uniform(ring + wide_room<CODES>::slot(slot ^ 2)),
                       values = wide_uniform(ring + wide_room<CODES>::slot(slot) + WIDE_SIDE);
        const bool last = tile + 1 == it.n_tile;
        wide_wait<0>();
        wide_hold<64>(s);
        __syncwarp();
        if (!CODES && lane == 0) bar_arrive(empty + slot * 8);
        if (last) bar_arrive(done);
        wide_soften<CODES>(s, m, pos, sh->scale[slot / 2][0], tile * CU_KEYS, tile * CU_KEYS + CU_KEYS - 1 > low,
                           a->scale);
        wide_pack<CODES>(p, l, s, sh->scale[slot / 2][1]);
        if (CODES) {
            __syncwarp();
            if (lane == 0) bar_arrive(empty + slot * 8);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            wide_factors(&w[i], m[i], tile * CU_KEYS);
            if (CODES) wide_join_sum(&w[i], l[2 * i]);
        }
        bar_wait(full + slot * 8 + 8, wide_parity(piece));
        piece += 2;
        if (!last) bar_wait(full + (slot ^ 2) * 8, wide_parity(piece));
        wide_my_turn(group);
        wide_weighed<CODES>(o, p, values);
        __syncwarp();
        if (lane == 0) bar_arrive(empty + slot * 8 + 8);
        if (last) {
            wide_your_turn(group);
            wide_join<CODES>(acc, o, w);
            break;
        }
        wide_fence();
        wide_scores(s, q, keys);
        wide_your_turn(group);
        wide_join<CODES>(acc, o, w);
        wide_hold<64>(acc);
        slot ^= 2;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) wide_store<4>(a, &it, &w[i], mine + warp * 16 + g + 8 * i, acc + 2 * i);
    return piece;
}

/* ---- tiles in turn ----------------------------------------------------------------------------------------------- */

/* A slot is left by the one warpgroup that has it: for two. */
static __device__ __forceinline__ void wide_left(uint32_t empty) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], 2;" ::"r"(empty) : "memory");
}

/* Row g + 8 of a tile, for the thread of the other warpgroup that has its totals. o: of the row, pairs in every other
 * place. at: the place of these two threads, which leave things there for one another in turn. */
static __device__ __forceinline__ void wide_leave(unsigned char *at, uint32_t give, const float *o, float m, float l) {
#pragma unroll
    for (int k = 0; k < 16; k++) *(float2 *)(at + k * 1024) = make_float2(o[4 * k], o[4 * k + 1]);
    *(float2 *)(at + 16 * 1024) = make_float2(m, l);
    bar_arrive(give); /* each for its own: racecheck follows that */
}
/* Join a row of the tile from key0 on: dimensions 8 j + 2 c and the next at o[STEP * j]. */
template <int STEP>
static __device__ __forceinline__ void wide_join_row(float *acc, wide_row *w, const float *o, float m, float l,
                                                     int32_t key0) {
    wide_factors(w, m, key0);
    wide_join_sum(w, l);
    wide_scale<32>(acc, w->f, w->f);
#pragma unroll
    for (int i = 0; i < 32; i++) acc[i] = __fmaf_rn(o[i / 2 * STEP + i % 2], w->b, acc[i]);
}
/* The same of what the other warpgroup left. */
static __device__ __forceinline__ void wide_take(float *acc, wide_row *w, const unsigned char *at, int32_t key0) {
    float o[32];
    const float2 of = *(const float2 *)(at + 16 * 1024); /* m, l */
#pragma unroll
    for (int k = 0; k < 16; k++) {
        const float2 two = *(const float2 *)(at + k * 1024);
        o[2 * k] = two.x, o[2 * k + 1] = two.y;
    }
    wide_join_row<2>(acc, w, o, of.x, of.y, key0);
}

/* All rows, every other tile of keys, warpgroup 0 the first. Row g of a thread's two is its own, whose totals, w and
 * acc, it keeps; row g + 8 is the other warpgroup's row g, for q of warpgroup 1 has the two halves of each 16 rows the
 * other way round: what a thread makes for it goes to the thread of the same number there. Both join all tiles in
 * order: the other's last, then their own. Products of scores of the next tile and of the values of this one run
 * together.
 *
 * get, give: barriers for what is left for this warp, and for what it leaves; n_got: how often it has waited for get.
 * When an item is done, each has joined the other's tiles, so all that was brought for it has come. */
template <int CODES>
static __device__ __forceinline__ uint32_t wide_turns(const attn_args *a, wide_shared *sh, uint32_t ring,
                                                      unsigned char *trade, int group, int thread, const wide_item it,
                                                      uint32_t piece, uint32_t *n_got) {
    const int warp = thread / 32, lane = thread % 32, g = lane >> 2;
    const uint32_t full = attn_smem(sh->full), empty = attn_smem(sh->empty), done = attn_smem(&sh->done);
    const uint32_t q = ring + wide_room<CODES>::q + group * (64 * 256);
    const uint32_t get = attn_smem(&sh->traded[group][warp]), give = attn_smem(&sh->traded[group ^ 1][warp]);
    const uint32_t behind = piece + 2 * (uint32_t)it.n_tile;
    const int32_t low = it.first + 63 < it.n ? it.pos0 + it.first / a->group : -1;
    const int32_t r = it.first + warp * 16 + g + 8 * group;
    int32_t pos[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int32_t of = it.first + warp * 16 + g + 8 * (group ^ i);
        pos[i] = of < it.n ? it.pos0 + of / a->group : -1;
    }
    wide_row w = {-INFINITY, 0.0f, 1.0f, -0.0f, pos[0]};
    float acc[32] = {};
    piece += 2 * (uint32_t)group;
    if (group < it.n_tile) {
        const uint32_t slot = wide_slot(piece), keys = wide_uniform(ring + wide_room<CODES>::slot(slot)),
                       values = wide_uniform(keys + WIDE_SIDE);
        float s[64], o[CODES ? 64 : 68], m[2], l[4];
        uint32_t p[8][4];
        bar_wait(full + slot * 8, wide_parity(piece));
        wide_fence();
        wide_scores(s, q, keys);
        wide_wait<0>();
        wide_hold<64>(s);
        __syncwarp();
        if (!CODES && lane == 0) wide_left(empty + slot * 8);
        if (group + 2 >= it.n_tile) bar_arrive(done);
        wide_soften<CODES>(s, m, pos, sh->scale[slot / 2][0], group * CU_KEYS, group * CU_KEYS + CU_KEYS - 1 > low,
                           a->scale);
        wide_pack<CODES>(p, l, s, sh->scale[slot / 2][1]);
        if (CODES) {
            __syncwarp();
            if (lane == 0) wide_left(empty + slot * 8);
        }
#pragma unroll 1
        for (int32_t tile = group;; tile += 2) {
            const int32_t key2 = (tile + 2) * CU_KEYS;
            float m2[2];
            bar_wait(full + slot * 8 + 8, wide_parity(piece));
            piece += 4;
            if (tile + 2 >= it.n_tile) {
                wide_weighed<CODES>(o, p, values);
                __syncwarp();
                if (lane == 0) wide_left(empty + slot * 8 + 8);
                if (tile > 0) {
                    bar_wait(get, (*n_got)++ & 1);
                    wide_take(acc, &w, trade, (tile - 1) * CU_KEYS);
                }
                wide_leave(trade, give, o + 2, m[1], CODES ? l[2] : o[CODES ? 0 : 66]);
                wide_join_row<4>(acc, &w, o, m[0], CODES ? l[0] : o[CODES ? 0 : 64], tile * CU_KEYS);
                break;
            }
            bar_wait(full + slot * 8, wide_parity(piece));
            wide_hold_codes<8>(p);
            wide_fence();
            wide_scores(s, q, keys);
            wide_values<!CODES>(o, p, values);
            wide_wait<1>();
            wide_hold<64>(s);
            __syncwarp();
            if (!CODES && lane == 0) wide_left(empty + slot * 8);
            if (tile + 4 >= it.n_tile) bar_arrive(done);
            wide_soften<CODES>(s, m2, pos, sh->scale[slot / 2][0], key2, key2 + CU_KEYS - 1 > low, a->scale);
            if (tile > 0) bar_wait(get, (*n_got)++ & 1);
            wide_wait<0>();
            wide_hold<CODES ? 64 : 68>(o);
            wide_hold_codes<8>(p);
            __syncwarp();
            if (lane == 0) wide_left(empty + slot * 8 + 8);
            if (tile > 0) wide_take(acc, &w, trade, (tile - 1) * CU_KEYS);
            wide_leave(trade, give, o + 2, m[1], CODES ? l[2] : o[CODES ? 0 : 66]);
            wide_join_row<4>(acc, &w, o, m[0], CODES ? l[0] : o[CODES ? 0 : 64], tile * CU_KEYS);
            wide_hold<32>(acc);
            m[0] = m2[0], m[1] = m2[1];
            wide_pack<CODES>(p, l, s, sh->scale[slot / 2][1]);
            if (CODES) {
                __syncwarp();
                if (lane == 0) wide_left(empty + slot * 8);
            }
        }
    } else { /* one tile, which is the other's */
        bar_arrive(done);
    }
    const bool odd = it.n_tile % 2; /* the last tile is warpgroup 0's */
    if (group == odd) {
        bar_wait(get, (*n_got)++ & 1);
        wide_take(acc, &w, trade, (it.n_tile - 1) * CU_KEYS);
    }
    if (odd) { /* and it is the first to leave something of the next item: the place has to be free */
        if (group == 1) bar_arrive(give);
        if (group == 0) bar_wait(get, (*n_got)++ & 1);
    }
    wide_store<2>(a, &it, &w, r, acc);
    return behind;
}

template <int CODES>
static __device__ __forceinline__ void wide_walk(const attn_args *a, wide_shared *sh, unsigned char *smem, int group,
                                                 int thread) {
    const uint32_t ring = attn_smem(smem);
    uint32_t piece = 0, n_got = 0, parity = 0;
    if (group == 1) wide_your_turn(group);
    for (;; parity ^= 1) {
        bar_wait(attn_smem(&sh->begun), parity);
        const wide_item it = sh->item;
        if (!it.n_tile) break;
        if (wide_in_turn(&it))
            piece = wide_turns<CODES>(a, sh, ring, smem + wide_room<CODES>::trade + thread * 8, group, thread, it,
                                      piece, &n_got);
        else
            piece = wide_each<CODES>(a, sh, ring, group, thread, it, piece);
    }
    if (group == 0) wide_my_turn(group); /* the last one that the other gave */
}

template <int CODES>
static __global__ void __launch_bounds__(WIDE_THREADS, 1)
    wide_kernel(const __grid_constant__ attn_args a, const __grid_constant__ CUtensorMap cells, int32_t run) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(16) wide_shared sh;
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
    unsigned char *smem = memory + (-attn_smem(memory) & 1023);
    if (threadIdx.x == 0) {
        for (int i = 0; i < WIDE_SLOTS; i++) {
            bar_init(attn_smem(&sh.full[i]), 4);  /* warps of warpgroup 2 */
            bar_init(attn_smem(&sh.empty[i]), 8); /* warps of the others, or twice those of one */
        }
        bar_init(attn_smem(&sh.begun), 1), bar_init(attn_smem(&sh.done), 256);
        for (int i = 0; i < 2; i++) bar_init(attn_smem(&sh.codes[i]), 1);
        for (int i = 0; i < 8; i++) bar_init(attn_smem(&sh.traded[i / 4][i % 4]), 32);
        bar_init_end();
    }
    for (int i = threadIdx.x; i < 2 * wide_room<CODES>::ones / 4; i += WIDE_THREADS) {
        const int at = i * 4; /* in either of both */
        *(uint32_t *)(smem + wide_room<CODES>::slot(at / WIDE_HALF * 2 + 1) + WIDE_SIDE + at % WIDE_HALF) = 0x3f803f80u;
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    attn_wait_launch();
    if (group == 2) {
        if (CODES)
            asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        else
            asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        wide_fill<CODES>(&a, &cells, run, &sh, smem, thread);
    } else {
        if (CODES)
            asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        else
            asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        wide_walk<CODES>(&a, &sh, smem, group, thread);
    }
}

#endif
