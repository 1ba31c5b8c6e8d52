/* Prefill attention by warpgroups: shared memory, and the warpgroup that fills it. To be included by cu_attn_wide.cuh
 * alone, which says what the others do with it.
 *
 * Shared memory: 4 slots (keys, values, keys, values) of [2 halves of the dimensions][128 keys][128 bytes], BF16:
 * behind values a third such half, of ones; q [2 warpgroups][2 halves][64 rows][128 bytes]; codes on their way, [2][128
 * keys][128 bytes]; what warpgroups leave for one another. Piece i of 16 bytes of a row sits at i ^ (row & 7): the
 * 128-byte swizzle of the descriptors, keys and q read along a row, values across.
 *
 * The warpgroup takes (sequence, 128 packed rows or 64, head) from the list, longest walks first, and fills the slots
 * in the order in which they are left. What threads have copied themselves costs a fence; what the copy engine brings
 * alone has none. In BF16 the next tile's pages are looked up before a slot is waited for. */
#ifndef ERN_BACKEND_CUDA_CU_ATTN_FILL_CUH
#define ERN_BACKEND_CUDA_CU_ATTN_FILL_CUH

#include <cuda.h>

#include "backend/cuda/cu_a8_device.cuh"
#include "backend/cuda/cu_attn.cuh"
#include "backend/cuda/cu_attn_rows.cuh"

enum {
    WIDE_C = 128,
    WIDE_THREADS = 384,
    WIDE_HALF = CU_KEYS * 128,
    WIDE_SIDE = 2 * WIDE_HALF,
    WIDE_SLOTS = 4,
    WIDE_TRADE = 128 * 17 * 8 /* bytes: 16 pairs of a row of O and of m and l, a thread */
};
/* Where things are in shared memory, from a multiple of 1024 on. */
template <int CODES> struct wide_room {
    static constexpr int ones = CODES ? 0 : WIDE_HALF; /* behind values */
    static constexpr int pair = 2 * WIDE_SIDE + ones;
    static constexpr int q = WIDE_SLOTS / 2 * pair, code = q + ATTN_ROWS * WIDE_C * 2;
    static constexpr int trade = code + (CODES ? 2 * CU_KEYS * WIDE_C : 0), bytes = trade + WIDE_TRADE + 1024;
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
    uint64_t full[WIDE_SLOTS], empty[WIDE_SLOTS], codes[2];
    uint64_t begun, done;  /* item is there; q has been read for the last time, and item before that */
    uint64_t traded[2][4]; /* for warps of warpgroup 0, of 1: what the other's same warp has left for it is there */
    wide_item item;
    int32_t handed;
} wide_shared;

/* Pieces 2u and 2u + 1 of the ring are keys and values of tile u of the block's life. */
static __device__ __forceinline__ uint32_t wide_slot(uint32_t piece) { return piece % WIDE_SLOTS; }
static __device__ __forceinline__ uint32_t wide_parity(uint32_t piece) { return piece / WIDE_SLOTS & 1; }

/* ---- what is copied ------------------------------------------------------------------------------------------- */

/* What the warp wrote to shared memory is there for the tensor cores of whoever waits for `bar`. */
static __device__ __forceinline__ void wide_give(uint32_t bar, int thread) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (thread % 32 == 0) bar_arrive(bar);
}
/* 64 rows or less: warpgroups 0 and 1 take tiles of keys in turn, and each has all of the rows, warpgroup 1 in another
 * order (wide_turns). */
static __device__ __forceinline__ bool wide_in_turn(const wide_item *it) { return it->n - it->first <= 64; }
/* Row r of a block's rows, piece i of its 16: from q of the shared memory on. */
static __device__ __forceinline__ uint32_t wide_q_at(uint32_t r, uint32_t i) {
    return r / 64 * (64 * 256) + i / 8 * (64 * 128) + r % 64 * 128 + (((i ^ r) & 7) << 4);
}
static __device__ __forceinline__ const cu_bf16 *wide_q_row(const attn_args *a, const wide_item *it, int32_t in_block) {
    if (wide_in_turn(it) && in_block >= 64) in_block ^= 64 + 8; /* of each 16, the second eight first */
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

/* A tile's keys, or with by = a->value its values, BF16. runs: by runs of cells, of which lanes that are `first` have
 * one each at place, in cells; else place is that of the thread's key, in 64 bytes, or -1. more: threads have copied
 * other things that are to be there as well. */
static __device__ __forceinline__ void wide_bring(const attn_args *a, const CUtensorMap *cells, int64_t by, bool runs,
                                                  bool first, bool more, int32_t place, uint32_t to, uint32_t bar,
                                                  int in_tile, int thread) {
    if (runs) {
        if (thread == 0) bar_expect(bar, WIDE_SIDE);
        __syncwarp();
        if (first)
            wide_copy_run(cells, place + (int32_t)(by / (2 * WIDE_C)), thread & 1,
                          to + (thread & 1) * WIDE_HALF + in_tile * 128, bar);
    } else {
        wide_copy(a->kv + by, place, to, thread);
    }
    if (!runs || more) {
        attn_copy_commit();
        attn_copy_wait<0>();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
    if (thread % 32 == 0) bar_arrive(bar);
}
/* Where a tile's keys are, for wide_bring. */
static __device__ __forceinline__ int32_t wide_find(const attn_args *a, int32_t seq, int32_t head, int32_t len,
                                                    int32_t key0, bool runs, bool first, int in_tile, int thread) {
    if (!runs) {
        const int32_t page = attn_page_of<false>(a, seq, key0 + thread, len);
        return wide_place(attn_cell_of<WIDE_C, false, false>(a, page, head, key0 + thread).key);
    }
    if (!first) return 0;
    const int32_t page = a->page[(int64_t)seq * a->n_page_max + (key0 + in_tile) / a->n_page_cell];
    return page * (int32_t)(a->page_bytes / (2 * WIDE_C)) + head * (int32_t)(a->plane_bytes / (2 * WIDE_C)) +
           (key0 + in_tile) % a->n_page_cell;
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
                                                   uint32_t done, uint32_t parity, int thread) {
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
    bar_wait(done, parity);
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

/* ---- in which order --------------------------------------------------------------------------------------------- */

template <int CODES>
static __device__ __forceinline__ void wide_fill(const attn_args *a, const CUtensorMap *cells, int32_t run,
                                                 wide_shared *sh, unsigned char *smem, int thread) {
    const uint32_t ring = attn_smem(smem), full = attn_smem(sh->full), empty = attn_smem(sh->empty);
    const uint32_t codes = attn_smem(sh->codes);
    const int32_t *list = attn_wide(a->work, a->n_seq);
    const int32_t n_item = a->work[ATTN_N_WIDE] * a->n_kv_head;
    uint32_t piece = 0, parity_done = 1;
    int32_t item = blockIdx.x;
    while (item < n_item) {
        int32_t taken = 0;
        if (thread == 0) taken = atomicAdd(a->work + ATTN_WIDE_TAKEN, 1);
        const rows_item of = rows_item_of(a, list, item);
        const wide_item it = {of.n_tile, of.first, of.n, of.row0, of.pos0, of.head};
        const int32_t seq = of.seq, len = of.len;

        if (CODES)
            wide_turn_q<CODES>(a, &it, smem, attn_smem(&sh->done), parity_done, thread);
        else
            bar_wait(attn_smem(&sh->done), parity_done);
        parity_done ^= 1;
        if (thread == 0) {
            sh->item = it;
            bar_arrive(attn_smem(&sh->begun));
        }
        const int64_t plane = it.head * a->plane_bytes;
        if (CODES) wide_copy_codes(a, plane, seq, 0, len, run, ring + wide_room<CODES>::code, codes, thread);
        /* Values follow their keys or, where warpgroups take tiles in turn, the keys of the tile after the next, which
         * their products run beside. */
        const int32_t lag = wide_in_turn(&it) ? 2 : 0;
        const int32_t in_tile = thread / 2 * run; /* a lane a run and half */
        const bool first = thread < 32 && in_tile < CU_KEYS;
        bool runs = run > 0 && CU_KEYS <= len, runs1 = false, runs2 = false;
        int32_t place = CODES ? 0 : wide_find(a, seq, it.head, len, 0, runs, first, in_tile, thread), place1 = 0,
                place2 = 0;
        for (int32_t tile = 0; tile < it.n_tile + lag; tile++) {
            const int32_t of_value = tile - lag; /* the tile whose values are due */
            const uint32_t slot = wide_slot(piece), parity = wide_parity(piece) ^ 1;
            const uint32_t v_slot = wide_slot(piece + 1 - 2 * (uint32_t)lag),
                           v_parity = wide_parity(piece + 1 - 2 * (uint32_t)lag) ^ 1;
            if (CODES) {
                /* the values' codes are asked for before the keys are made, the next keys' before the values are */
                if (of_value >= 0)
                    wide_copy_codes(a, plane + a->value, seq, of_value * CU_KEYS, len, run,
                                    ring + wide_room<CODES>::code + CU_KEYS * WIDE_C, codes + 8, thread);
                if (tile < it.n_tile) {
                    const int32_t key = tile * CU_KEYS + thread, page = attn_page_of<false>(a, seq, key, len);
                    bar_wait(empty + slot * 8, parity);
                    const int64_t at = attn_cell_of<WIDE_C, true, false>(a, page, it.head, key).scale;
                    const uint32_t scale = attn_smem(&sh->scale[slot / 2][0][thread]);
                    attn_copy4(scale, a->kv + (at < 0 ? 0 : at), at >= 0);
                    attn_copy4(scale + CU_KEYS * 4, a->kv + a->value + (at < 0 ? 0 : at), at >= 0);
                    attn_copy_commit();
                    bar_wait(codes, piece >> 1 & 1);
                    wide_widen<CODES, false>(smem + wide_room<CODES>::code, smem + wide_room<CODES>::slot(slot),
                                             thread);
                    attn_copy_wait<0>();
                    wide_give(full + slot * 8, thread);
                    if (tile + 1 < it.n_tile)
                        wide_copy_codes(a, plane, seq, (tile + 1) * CU_KEYS, len, run, ring + wide_room<CODES>::code,
                                        codes, thread);
                }
                if (of_value >= 0) {
                    bar_wait(empty + v_slot * 8, v_parity);
                    bar_wait(codes + 8, ((piece >> 1) - (uint32_t)lag) & 1);
                    wide_widen<CODES, true>(smem + wide_room<CODES>::code + CU_KEYS * WIDE_C,
                                            smem + wide_room<CODES>::slot(v_slot), thread);
                    wide_give(full + v_slot * 8, thread);
                }
            } else {
                const int32_t v_place = lag ? place2 : place;
                const bool v_runs = lag ? runs2 : runs;
                if (tile < it.n_tile) {
                    bar_wait(empty + slot * 8, parity);
                    if (tile == 0) {
#pragma unroll 1
                        for (int i = 0; i < 16; i++) {
                            const int r = i * 8 + thread / 16, part = thread % 16;
                            const cu_bf16 *q = wide_q_row(a, &it, r);
                            attn_copy16(ring + wide_room<CODES>::q + wide_q_at(r, part), q ? q + part * 8 : a->q,
                                        q != NULL);
                        }
                    }
                    wide_bring(a, cells, 0, runs, first, tile == 0, place, ring + wide_room<CODES>::slot(slot),
                               full + slot * 8, in_tile, thread);
                }
                if (of_value >= 0) {
                    bar_wait(empty + v_slot * 8, v_parity);
                    wide_bring(a, cells, a->value, v_runs, first, false, v_place, ring + wide_room<CODES>::slot(v_slot),
                               full + v_slot * 8, in_tile, thread);
                }
                place2 = place1, runs2 = runs1, place1 = place, runs1 = runs;
                runs = run > 0 && (tile + 2) * CU_KEYS <= len;
                if (tile + 1 < it.n_tile)
                    place = wide_find(a, seq, it.head, len, (tile + 1) * CU_KEYS, runs, first, in_tile, thread);
            }
            piece += 2;
        }
        piece -= 2 * (uint32_t)lag;
        if (thread == 0) sh->handed = taken + (int32_t)gridDim.x;
        wide_meet();
        item = sh->handed;
        wide_meet();
    }
    if (thread == 0) attn_wide_done(a->work);
    bar_wait(attn_smem(&sh->done), parity_done);
    if (thread == 0) {
        sh->item.n_tile = 0;
        bar_arrive(attn_smem(&sh->begun));
    }
}

#endif
