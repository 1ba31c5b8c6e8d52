/* Prefill attention for C = 128 by warpgroups, to be included by cu_attn_prefill.cu alone.
 *
 * wgmma is, number for number, a chain of the m16n8k16 products of cu_attn.cuh's law (check_attention.c holds it to the
 * decode kernel's bits), reads keys and values from shared memory once for 64 rows where mma.sync reads them for 16,
 * and runs while the same warps do other things.
 *
 * A block stays on its multiprocessor. Warpgroup 2 takes (sequence, 128 packed rows or 64, head) from the list, longest
 * walks first, and fills a ring: keys and values of a tile in turn. Warpgroups 0 and 1 have 64 rows each (of 64 in all
 * warpgroup 0 has all, and never waits for a turn):
 *   S = q K, both from shared memory, 64 x 128; weights stay in registers, as the A operand of
 *   O = P V, 64 x 128, V as it lies (dimensions along a row); BF16: eight columns of ones behind it give the sum of the
 *   weights (mma.sync waits for the other's products)
 * A warpgroup has a turn at the tensor cores: O of a tile, then S of the next, which it waits for when the turn is the
 * other's. Meanwhile it joins O, under S, and makes weights of S, under the other's products. Registers hold the
 * totals, S and O, or S and the weights, not all of them: S begins when O is there.
 *
 * Shared memory: 4 slots (keys, values, keys, values) of [2 halves of the dimensions][128 keys][128 bytes], BF16:
 * behind values a third such half, of ones; q [2 warpgroups][2 halves][64 rows][128 bytes]; codes on their way, [2][128
 * keys][128 bytes]. Piece i of 16 bytes of a row sits at i ^ (row & 7): the 128-byte swizzle of the descriptors, keys
 * and q read along a row, values across.
 *
 * After any change look at what ptxas says: "wgmma.mma_async instructions are serialized" (C7511, C7518, C7520) costs a
 * quarter of the speed, and small things bring it about, here as in what warpgroup 2 does (unrolled loops, addresses
 * kept over a loop). */
#ifndef ERN_BACKEND_CUDA_CU_ATTN_WIDE_CUH
#define ERN_BACKEND_CUDA_CU_ATTN_WIDE_CUH

#include <cuda.h>

#include "backend/cuda/cu_a8_device.cuh"
#include "backend/cuda/cu_attn.cuh"
#include "backend/cuda/cu_attn_rows.cuh"

enum { WIDE_C = 128, WIDE_THREADS = 384, WIDE_HALF = CU_KEYS * 128, WIDE_SIDE = 2 * WIDE_HALF, WIDE_SLOTS = 4 };
/* Where things are in shared memory, from a multiple of 1024 on. */
template <int CODES> struct wide_room {
    static constexpr int ones = CODES ? 0 : WIDE_HALF; /* behind values */
    static constexpr int pair = 2 * WIDE_SIDE + ones;
    static constexpr int q = WIDE_SLOTS / 2 * pair, code = q + ATTN_ROWS * WIDE_C * 2;
    static constexpr int bytes = code + (CODES ? 2 * CU_KEYS * WIDE_C : 0) + 1024;
    static __device__ __forceinline__ uint32_t slot(uint32_t n) { return n / 2 * pair + n % 2 * WIDE_SIDE; }
};

typedef struct wide_item {
    int32_t n_tile; /* 0: no more */
    int32_t first;  /* packed row of the sequence */
    int32_t n;      /* and the one behind the last */
    int32_t row0, pos0, head;
} wide_item;
typedef struct wide_shared {
    float scale[2][2][CU_KEYS]; /* codes: of keys and values of the tile whose keys are in slots 0 and 2 */
    uint64_t full[WIDE_SLOTS], empty[WIDE_SLOTS], q_free, codes[2];
    wide_item item[2]; /* of the first keys in slots 0 and 2 */
    int32_t handed;
} wide_shared;

/* ---- barriers and products --------------------------------------------------------------------------------------- */

/* What this thread wrote to shared memory is there for the tensor cores of whoever waits for `bar`. */
static __device__ __forceinline__ void wide_give(uint32_t bar) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    bar_arrive(bar);
}

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

/* Turns at the tensor cores, warpgroup 0 first. */
static __device__ __forceinline__ void wide_my_turn(int group) {
    asm volatile("bar.sync %0, 256;" ::"r"(2 + group) : "memory");
}
static __device__ __forceinline__ void wide_your_turn(int group) {
    asm volatile("bar.arrive %0, 256;" ::"r"(3 - group) : "memory");
}

/* Pieces 2u and 2u + 1 of the ring are keys and values of tile u of the block's life. */
static __device__ __forceinline__ uint32_t wide_slot(uint32_t piece) { return piece % WIDE_SLOTS; }
static __device__ __forceinline__ uint32_t wide_parity(uint32_t piece) { return piece / WIDE_SLOTS & 1; }

/* ---- the warpgroup that fills ------------------------------------------------------------------------------------ */

/* Row r of a block's rows, piece i of its 16: from q of the shared memory on. */
static __device__ __forceinline__ uint32_t wide_q_at(uint32_t r, uint32_t i) {
    return r / 64 * (64 * 256) + i / 8 * (64 * 128) + r % 64 * 128 + (((i ^ r) & 7) << 4);
}
static __device__ __forceinline__ const cu_bf16 *wide_q_row(const attn_args *a, const wide_item *it, int32_t in_block) {
    const int32_t r = it->first + in_block, t = r / a->group;
    if (r >= it->n) return NULL;
    return a->q + ((int64_t)(it->row0 + t) * a->n_head + it->head * a->group + r - t * a->group) * WIDE_C;
}

/* In 64 bytes, of which planes and rows of either kind are multiples. */
static __device__ __forceinline__ int32_t wide_place(int64_t at) { return at < 0 ? -1 : (int32_t)(at / 64); }
/* BF16, by the copy engine, which swizzles: cells that follow one another in the cache (the map says how many), half of
 * their dimensions. row: of the first, in cells from a->kv. */
static __device__ __forceinline__ void wide_copy_run(const CUtensorMap *cells, int32_t row, int half, uint32_t to,
                                                     uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
                 "[%4];" ::"r"(to),
                 "l"(cells), "r"(half * 64), "r"(row), "r"(bar)
                 : "memory");
}
/* BF16, any cells, zeros where there is none: copies of 16 bytes, two rows a warp at a time. A warp brings its own 32
 * keys: at is the place of the lane's key, in 64 bytes, or -1. */
static __device__ __forceinline__ void wide_copy(const unsigned char *kv, int32_t at, uint32_t to, int thread) {
    const int warp = thread / 32, odd = thread / 16 % 2, piece = thread % 16;
    const uint32_t mine = to + piece / 8 * WIDE_HALF + (warp * 32 + odd) * 128 + (((piece ^ odd) & 7) << 4);
    kv += piece * 16;
#pragma unroll 1
    for (int i = 0; i < 16; i++) {
        const int32_t from = __shfl_sync(0xffffffffu, at, 2 * i + odd);
        attn_copy16((mine ^ ((2 * i & 6) << 4)) + i * 256, kv + (from < 0 ? 0 : (int64_t)from * 64), from >= 0);
    }
}

/* Warpgroup 2 alone. */
static __device__ __forceinline__ void wide_meet(void) { asm volatile("bar.sync 1, 128;" ::: "memory"); }
/* The codes of a tile's keys or values by the copy engine, as they lie; plane: of page 0. What is beyond len stays
 * as it was: codes are numbers whatever they are, and their weights are 0. */
static __device__ __forceinline__ void wide_copy_codes(const attn_args *a, int64_t plane, int32_t seq, int32_t key0,
                                                       int32_t len, int32_t run, uint32_t to, uint32_t bar,
                                                       int thread) {
    wide_meet(); /* all threads are done with what was there */
    if (thread >= 32) return;
    const int32_t n = min(len - key0, CU_KEYS);
    if (thread == 0) bar_expect(bar, n * WIDE_C);
    __syncwarp();
    for (int32_t from = thread * run; from < n; from += 32 * run) {
        const int32_t at = key0 + from, page = a->page[(int64_t)seq * a->n_page_max + at / a->n_page_cell];
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         to + from * WIDE_C),
                     "l"(a->kv + plane + page * a->page_bytes + at % a->n_page_cell * WIDE_C),
                     "r"(min(run, n - from) * WIDE_C), "r"(bar)
                     : "memory");
    }
    __syncwarp();
    if (thread == 0) bar_arrive(bar);
}
/* Codes to bf16. A word of codes d0..d3 gives pairs (d0, d2) and (d1, d3): keys keep them, eight places apart; values
 * are put back in order. */
template <int CODES, bool VALUES>
static __device__ __forceinline__ void wide_widen(const unsigned char *codes, unsigned char *to, int thread) {
    /* Eight lanes a row; those of the second half store their two pieces the other way round, so that all banks are
     * touched once. */
    const int piece = thread & 7, row = thread / 8, swirl = row & 7, swap = piece >> 2;
    codes += thread * 16;
    to += swap * WIDE_HALF + row * 128;
    const int first = (((2 * piece + swap) ^ swirl) & 7) << 4, second = (((2 * piece + 1 - swap) ^ swirl) & 7) << 4;
#pragma unroll(CODES == ATTN_F8 ? 2 : 1)
    for (int i = 0; i < 8; i++) {
        const uint4 w = *(const uint4 *)(codes + i * 2048);
        const uint32_t in[4] = {w.x, w.y, w.z, w.w};
        uint32_t out[8];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint32_t even = CODES == ATTN_F8 ? cu_f8_pair(in[k]) : cu_i8_pair(in[k]);
            const uint32_t odd = CODES == ATTN_F8 ? cu_f8_pair(in[k] >> 8) : cu_i8_pair(in[k] >> 8);
            out[VALUES ? 2 * k : k] = VALUES ? __byte_perm(even, odd, 0x5410) : even;
            out[VALUES ? 2 * k + 1 : k + 4] = VALUES ? __byte_perm(even, odd, 0x7632) : odd;
        }
        const uint4 lo = make_uint4(out[0], out[1], out[2], out[3]), hi = make_uint4(out[4], out[5], out[6], out[7]);
        *(uint4 *)(to + i * 2048 + first) = swap ? hi : lo;
        *(uint4 *)(to + i * 2048 + second) = swap ? lo : hi;
    }
}
/* q in the order of inputs that codes have, by way of the place for codes. */
template <int CODES>
static __device__ __forceinline__ void wide_turn_q(const attn_args *a, const wide_item *it, unsigned char *smem,
                                                   uint32_t q_free, uint32_t parity, int thread) {
    unsigned char *mine = smem + wide_room<CODES>::code + thread * 16;
    wide_meet(); /* all threads are done with what was there */
    const int row = thread / 8, unit = thread % 8;
#pragma unroll 1
    for (int i = 0; i < 8; i++) {
        const cu_bf16 *q = wide_q_row(a, it, i * 16 + row);
        const cu_bf16 *from = q ? q + unit * 16 : a->q;
        attn_copy16(attn_smem(mine + i * 4096), from, q != NULL);
        attn_copy16(attn_smem(mine + i * 4096 + 2048), from + 8, q != NULL);
    }
    attn_copy_commit();
    attn_copy_wait<0>();
    bar_wait(q_free, parity);
#pragma unroll 1
    for (int i = 0; i < 8; i++) {
        const uint4 lo = *(const uint4 *)(mine + i * 4096), hi = *(const uint4 *)(mine + i * 4096 + 2048);
        const uint32_t r = i * 16 + row;
        *(uint4 *)(smem + wide_room<CODES>::q + wide_q_at(r, 2 * unit)) =
            make_uint4(__byte_perm(lo.x, lo.y, 0x5410), __byte_perm(lo.z, lo.w, 0x5410),
                       __byte_perm(hi.x, hi.y, 0x5410), __byte_perm(hi.z, hi.w, 0x5410));
        *(uint4 *)(smem + wide_room<CODES>::q + wide_q_at(r, 2 * unit + 1)) =
            make_uint4(__byte_perm(lo.x, lo.y, 0x7632), __byte_perm(lo.z, lo.w, 0x7632),
                       __byte_perm(hi.x, hi.y, 0x7632), __byte_perm(hi.z, hi.w, 0x7632));
    }
    /* the copy engine is to write next where q was */
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int CODES>
static __device__ __forceinline__ void wide_fill(const attn_args *a, const CUtensorMap *cells, int32_t run,
                                                 wide_shared *sh, unsigned char *smem, int thread) {
    const uint32_t ring = attn_smem(smem), full = attn_smem(sh->full), empty = attn_smem(sh->empty);
    const uint32_t codes = attn_smem(sh->codes);
    const int32_t *list = attn_wide(a->work, a->n_seq);
    const int32_t n_item = a->work[ATTN_N_WIDE] * a->n_kv_head;
    uint32_t piece = 0, q_parity = 1;
    int32_t item = blockIdx.x;
    while (item < n_item) {
        int32_t taken = 0;
        if (thread == 0) taken = atomicAdd(a->work + ATTN_WIDE_TAKEN, 1);
        const rows_item of = rows_item_of(a, list, item);
        const wide_item it = {of.n_tile, of.first, of.n, of.row0, of.pos0, of.head};
        const int32_t seq = of.seq, len = of.len;

        if (CODES) wide_turn_q<CODES>(a, &it, smem, attn_smem(&sh->q_free), q_parity, thread);
        const int64_t plane = it.head * a->plane_bytes;
        if (CODES) wide_copy_codes(a, plane, seq, 0, len, run, ring + wide_room<CODES>::code, codes, thread);
        for (int32_t tile = 0; tile < it.n_tile; tile++) {
            const uint32_t slot = wide_slot(piece), parity = wide_parity(piece) ^ 1;
            const uint32_t to = ring + wide_room<CODES>::slot(slot);
            if (CODES) {
                /* the values' codes are asked for before the keys are made, the next keys' before the values are */
                wide_copy_codes(a, plane + a->value, seq, tile * CU_KEYS, len, run,
                                ring + wide_room<CODES>::code + CU_KEYS * WIDE_C, codes + 8, thread);
                const int32_t key = tile * CU_KEYS + thread, page = attn_page_of<false>(a, seq, key, len);
                bar_wait(empty + slot * 8, parity);
                if (tile == 0 && thread == 0) sh->item[slot / 2] = it;
                const int64_t at = attn_cell_of<WIDE_C, true, false>(a, page, it.head, key).scale;
                const uint32_t scale = attn_smem(&sh->scale[slot / 2][0][thread]);
                attn_copy4(scale, a->kv + (at < 0 ? 0 : at), at >= 0);
                attn_copy4(scale + CU_KEYS * 4, a->kv + a->value + (at < 0 ? 0 : at), at >= 0);
                attn_copy_commit();
                bar_wait(codes, piece >> 1 & 1);
                wide_widen<CODES, false>(smem + wide_room<CODES>::code, smem + wide_room<CODES>::slot(slot), thread);
                attn_copy_wait<0>();
                wide_give(full + slot * 8);
                if (tile + 1 < it.n_tile)
                    wide_copy_codes(a, plane, seq, (tile + 1) * CU_KEYS, len, run, ring + wide_room<CODES>::code, codes,
                                    thread);
                bar_wait(empty + slot * 8 + 8, parity);
                bar_wait(codes + 8, piece >> 1 & 1);
                wide_widen<CODES, true>(smem + wide_room<CODES>::code + CU_KEYS * WIDE_C,
                                        smem + wide_room<CODES>::slot(slot + 1), thread);
                wide_give(full + slot * 8 + 8);
            } else {
                const int32_t key0 = tile * CU_KEYS;
                const bool runs = run > 0 && key0 + CU_KEYS <= len;
                int32_t at = -1;
                if (!runs) {
                    const int32_t page = attn_page_of<false>(a, seq, key0 + thread, len);
                    at = wide_place(attn_cell_of<WIDE_C, false, false>(a, page, it.head, key0 + thread).key);
                }
                const int32_t in_tile = thread / 2 * run; /* a lane a run and half */
                const bool mine = runs && thread < 32 && in_tile < CU_KEYS;
                int32_t row = 0;
                if (mine) {
                    const int32_t page = a->page[(int64_t)seq * a->n_page_max + (key0 + in_tile) / a->n_page_cell];
                    row = page * (int32_t)(a->page_bytes / (2 * WIDE_C)) +
                          it.head * (int32_t)(a->plane_bytes / (2 * WIDE_C)) + (key0 + in_tile) % a->n_page_cell;
                }
                bar_wait(empty + slot * 8, parity);
                if (runs && thread == 0) bar_expect(full + slot * 8, WIDE_SIDE);
                __syncwarp();
                if (mine)
                    wide_copy_run(cells, row, thread & 1, to + (thread & 1) * WIDE_HALF + in_tile * 128,
                                  full + slot * 8);
                if (!runs) wide_copy(a->kv, at, to, thread);
                if (tile == 0) {
                    if (thread == 0) sh->item[slot / 2] = it;
                    bar_wait(attn_smem(&sh->q_free), q_parity);
#pragma unroll 1
                    for (int i = 0; i < 16; i++) {
                        const int r = i * 8 + thread / 16, part = thread % 16;
                        const cu_bf16 *q = wide_q_row(a, &it, r);
                        attn_copy16(ring + wide_room<CODES>::q + wide_q_at(r, part), q ? q + part * 8 : a->q,
                                    q != NULL);
                    }
                }
                attn_copy_commit();
                attn_copy_wait<0>();
                wide_give(full + slot * 8);
                bar_wait(empty + slot * 8 + 8, parity);
                if (runs && thread == 0) bar_expect(full + slot * 8 + 8, WIDE_SIDE);
                __syncwarp();
                if (mine)
                    wide_copy_run(cells, row + (int32_t)(a->value / (2 * WIDE_C)), thread & 1,
                                  to + WIDE_SIDE + (thread & 1) * WIDE_HALF + in_tile * 128, full + slot * 8 + 8);
                if (!runs) wide_copy(a->kv + a->value, at, to + WIDE_SIDE, thread);
                attn_copy_commit();
                attn_copy_wait<0>();
                wide_give(full + slot * 8 + 8);
            }
            piece += 2;
        }
        q_parity ^= 1;
        if (thread == 0) sh->handed = taken + (int32_t)gridDim.x;
        wide_meet();
        item = sh->handed;
        wide_meet();
    }
    if (thread == 0) attn_wide_done(a->work);
    const uint32_t slot = wide_slot(piece);
    bar_wait(empty + slot * 8, wide_parity(piece) ^ 1);
    if (thread == 0) sh->item[slot / 2].n_tile = 0;
    bar_arrive(full + slot * 8);
}

/* ---- the warpgroups that multiply -------------------------------------------------------------------------------- */

/* Of rows g and g + 8 of a warp. */
typedef struct wide_rows {
    float M[2], L[2];
    float f[2], b[2]; /* factors that wait for O of the last tile */
    int32_t pos[2];   /* -1: no such row */
} wide_rows;

static __device__ __forceinline__ void wide_join_sum(wide_rows *w, const float *l) {
#pragma unroll
    for (int i = 0; i < 2; i++) w->L[i] = attn_join(w->L[i], l[2 * i], w->f[i], w->b[i]);
}
/* Scores of a tile become weights. cut: some row of the warpgroup does not see all of it. A row that sees nothing gets
 * factors 1 and -0, which leave any total as it is, for its O is 0. */
template <int CODES>
static __device__ __forceinline__ void wide_soften(float *s, uint32_t p[8][4], wide_rows *w, const float *key_scale,
                                                   const float *value_scale, int32_t key0, bool cut, float scale) {
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
            const int32_t last = w->pos[i] - key0 - 2 * c; /* of the thread's keys that the row sees, less 2 c */
#pragma unroll
            for (int j = 0; j < 16; j++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (j * 8 + e > last) s[4 * j + 2 * i + e] = -INFINITY;
        }
    float m[2], base[2];
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
        m[i] = __fmul_rn(top, scale);              /* of the products, since rounding keeps the order */
        base[i] = key0 <= w->pos[i] ? m[i] : 0.0f; /* no -inf - -inf */
    }
    float l[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int kk = 0; kk < 8; kk++) {
        uint32_t pl[4]; /* rows g, g+8 of the lower eight keys, then of the upper */
#pragma unroll
        for (int x = 0; x < 4; x++) {
            const int j = 2 * kk + (x >> 1), i = x & 1;
            const float p0 = attn_ex2(__fsub_rn(__fmul_rn(s[4 * j + 2 * i], scale), base[i]));
            const float p1 = attn_ex2(__fsub_rn(__fmul_rn(s[4 * j + 2 * i + 1], scale), base[i]));
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
#pragma unroll
    for (int i = 0; i < 2; i++) {
        w->f[i] = 1.0f, w->b[i] = -0.0f;
        if (key0 <= w->pos[i]) attn_factors(&w->M[i], m[i], &w->f[i], &w->b[i]);
    }
    if (CODES) wide_join_sum(w, l);
}
static __device__ __forceinline__ void wide_join(float *acc, const float *o, const wide_rows *w) {
#pragma unroll
    for (int i = 0; i < 64; i++) acc[i] = attn_join(acc[i], o[i], w->f[i >> 1 & 1], w->b[i >> 1 & 1]);
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

/* A warpgroup without rows lets the tiles pass and gives its turns away. Returns the piece behind the last. */
static __device__ __forceinline__ uint32_t wide_pass(wide_shared *sh, int32_t n_tile, uint32_t piece, int group,
                                                     int lane) {
    const uint32_t full = attn_smem(sh->full), empty = attn_smem(sh->empty);
    wide_my_turn(group);
    wide_your_turn(group);
#pragma unroll 1
    for (int32_t tile = 0; tile < n_tile; tile++, piece += 2) {
        const uint32_t slot = wide_slot(piece);
        bar_wait(full + slot * 8, wide_parity(piece));
        bar_wait(full + slot * 8 + 8, wide_parity(piece));
        __syncwarp();
        if (lane == 0) bar_arrive(empty + slot * 8);
        if (lane == 0) bar_arrive(empty + slot * 8 + 8);
        if (lane == 0 && tile + 1 == n_tile) bar_arrive(attn_smem(&sh->q_free));
        wide_my_turn(group);
        wide_your_turn(group);
    }
    return piece;
}

template <int CODES>
static __device__ __forceinline__ void wide_walk(const attn_args *a, wide_shared *sh, uint32_t ring, int group,
                                                 int thread) {
    const int warp = thread / 32, lane = thread % 32, g = lane >> 2, c = lane & 3;
    const uint32_t full = attn_smem(sh->full), empty = attn_smem(sh->empty), q_free = attn_smem(&sh->q_free);
    const uint32_t q = ring + wide_room<CODES>::q + group * (64 * 256);
    uint32_t piece = 0;
    if (group == 1) wide_your_turn(group);
    for (;;) {
        uint32_t slot = wide_slot(piece);
        bar_wait(full + slot * 8, wide_parity(piece));
        const wide_item it = sh->item[slot / 2];
        if (!it.n_tile) break;
        const int32_t mine = it.first + group * 64;
        if (mine >= it.n) {
            piece = wide_pass(sh, it.n_tile, piece, group, lane);
            continue;
        }
        const int32_t low =
            mine + 63 < it.n ? it.pos0 + mine / a->group : -1; /* least position; -1: a row is missing */
        wide_rows w;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int32_t r = mine + warp * 16 + g + 8 * i, t = r / a->group;
            w.pos[i] = r < it.n ? it.pos0 + t : -1;
            w.M[i] = -INFINITY;
            w.L[i] = 0.0f;
        }
        float acc[64] = {}, s[64], o[CODES ? 64 : 68];
        uint32_t p[8][4];
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
            if (lane == 0 && last) bar_arrive(q_free);
            wide_soften<CODES>(s, p, &w, sh->scale[slot / 2][0], sh->scale[slot / 2][1], tile * CU_KEYS,
                               tile * CU_KEYS + CU_KEYS - 1 > low, a->scale);
            if (CODES) {
                __syncwarp();
                if (lane == 0) bar_arrive(empty + slot * 8);
            }
            bar_wait(full + slot * 8 + 8, wide_parity(piece));
            piece += 2;
            if (!last) bar_wait(full + (slot ^ 2) * 8, wide_parity(piece));
            wide_my_turn(group);
            wide_hold_codes<8>(p);
            wide_fence();
            wide_values<!CODES>(o, p, values);
            wide_wait<0>();
            wide_hold<CODES ? 64 : 68>(o);
            wide_hold_codes<8>(p);
            __syncwarp();
            if (lane == 0) bar_arrive(empty + slot * 8 + 8);
            if (last) {
                wide_your_turn(group);
                wide_join(acc, o, &w);
                if (!CODES) wide_join_sum(&w, o + 64);
                break;
            }
            wide_fence();
            wide_scores(s, q, keys);
            wide_your_turn(group);
            wide_join(acc, o, &w);
            if (!CODES) wide_join_sum(&w, o + 64);
            wide_hold<64>(acc);
            slot ^= 2;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int32_t r = mine + warp * 16 + g + 8 * i, t = r / a->group, row = it.row0 + t;
            const int32_t head = it.head * a->group + r - t * a->group;
            uint32_t two[16]; /* dimensions 8 j + 2 c and the next */
#pragma unroll
            for (int j = 0; j < 16; j++)
                two[j] = cu_round2(__fdiv_rn(acc[4 * j + 2 * i], w.L[i]), __fdiv_rn(acc[4 * j + 2 * i + 1], w.L[i]));
            if (a->out_codes == CU_CODES_F8)
                wide_put_codes<CU_CODES_F8>(a, two, row, head, w.pos[i] >= 0);
            else if (a->out_codes == CU_CODES_I8)
                wide_put_codes<CU_CODES_I8>(a, two, row, head, w.pos[i] >= 0);
            else if (w.pos[i] >= 0)
#pragma unroll
                for (int j = 0; j < 16; j++)
                    *(uint32_t *)(a->out + row * a->ldo + head * WIDE_C + j * 8 + 2 * c) = two[j];
        }
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
            bar_init(attn_smem(&sh.full[i]), 128); /* threads of warpgroup 2 */
            bar_init(attn_smem(&sh.empty[i]), 8);  /* warps of the others */
        }
        bar_init(attn_smem(&sh.q_free), 8);
        for (int i = 0; i < 2; i++) bar_init(attn_smem(&sh.codes[i]), 1);
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
        wide_walk<CODES>(&a, &sh, attn_smem(smem), group, thread);
    }
}

#endif
