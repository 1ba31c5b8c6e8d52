/* The common rules: a row streams past the block that it has for itself, or where there are few rows past the blocks of
 * a cluster, once, or twice where the masses of all ids are wanted. What stays is a list of ids in shared memory: those
 * near the top, or, where a run ends far below that, those around the place where it ends, of which a sample of the row
 * tells about where it is. The end of the run, the draw and the token are found there, exactly; where the list turns
 * out not to hold them, or where a rule asks for more (logprobs, a mask), the row is left to the kernel that has rows
 * in the memory of a cluster. */
#ifndef ERN_BACKEND_CUDA_CU_SAMPLE_STREAM_CUH
#define ERN_BACKEND_CUDA_CU_SAMPLE_STREAM_CUH

#include "backend/cuda/cu_sample_row.cuh"

enum {
    HEAD = 4,                   /* fours of a thread in the sample of the row */
    FOURS = 4,                  /* fours of a thread under way */
    PART = FOURS * THREADS * 4, /* ids whose masses are added up together */
    PARTS = 32,                 /* a lane each */
    LIST_BEST = 4096,           /* most ids in the list of the best; beside the sample */
    LIST_NEAR = 6144,           /* in any list */
    GOAL = 256,                 /* so many ids are wanted in the list of the best where top_k asks for less */
    TOP_K_MAX = 1500,           /* largest top_k that is looked for in that list */
    BAND_HALF = 2100,           /* ids of a list around a place, on either side */
    BIAS_FEW = 1024,            /* most biases; each is compared with all */
    TABLE = SLICE_MAX / 4,      /* words that count ids while logits are changed */
    AHEAD = 128 * 1024,         /* bytes of the block's ids that are fetched to L2 before all else */
};

/* An id of the list: where it stands in the order, and its mass. While a pass adds to the list: logit and id. */
typedef struct item {
    uint64_t place, mass;
} item;

/* The block's memory beside `share`: where the other kernel has its slice. */
typedef union desk {
    uint32_t seen[TABLE];
    struct {
        item list[LIST_BEST];
        float4 sample[HEAD][THREADS];
    };
    item longer[LIST_NEAR];
} desk;
#define DESK ((desk *)SH->slice)
static_assert(PARTS * PART >= ERN_VOCAB_MAX, "sizes of this file");
static_assert(sizeof(desk) <= SLICE_MAX && offsetof(share, slice) % 16 == 0, "two blocks in a multiprocessor");

/* A row; this block has the ids lo .. hi - 1, whole fours: thread i four i, then four i + THREADS and so on. */
typedef struct stream {
    const float *l;
    int32_t V, lo, hi;
} stream;

/* The four at i; -inf beyond the block's ids. Nobody else will want it, so that it need not stay in L2. */
static __device__ __forceinline__ float4 fetch(const stream *w, int32_t i) {
    float4 v = make_float4(minus_inf(), minus_inf(), minus_inf(), minus_inf());
    if (i < w->hi) v = __ldcs((const float4 *)(w->l + i));
    return v;
}

/* Where this thread's four j of the sample is: each warp has its own place of the slice; hi: nowhere. */
static __device__ __forceinline__ int32_t sample_at(const stream *w, int32_t tid, int j) {
    const int32_t part = slice_of(w->hi - w->lo, WARPS), at = tid % 32 * 4 + j * 128;
    const int32_t i = w->lo + tid / 32 * part + at;
    return at < part && i < w->hi ? i : w->hi;
}

/* Adds the ids i .. i + 3 that `mine` has bits for. */
static __device__ __forceinline__ void list_four(uint32_t mine, int32_t i, float4 f) {
    uint32_t at = atomicAdd(&SH->n_list, (uint32_t)__popc(mine));
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const float l = k == 0 ? f.x : k == 1 ? f.y : k == 2 ? f.z : f.w;
        if (mine >> k & 1 && at < LIST_NEAR)
            DESK->longer[at++].place = (uint64_t)__float_as_uint(l) << 32 | (uint32_t)(i + k);
    }
}

/* ---- changing the logits --------------------------------------------------------------------------------------- */

/* Steps 4 to 6 for the ids lo .. hi - 1, in memory. Ids are counted in shared memory, in 16 bits each where that is
 * enough, as many at a time as it has room for; the highest bit says that the prompt had the id. Who finds a count
 * first takes it. */
static __device__ __noinline__ void edit_row(int32_t tid, const edits *all_of, float *l, int32_t lo, int32_t hi) {
    enum { AT_ONCE = 4 };
    const edits q = *all_of, *e = &q; /* in registers */
    const ern_sample *s = e->s;
    uint32_t *seen = DESK->seen;
#pragma unroll 1
    for (int32_t i = tid; i < e->n_bias; i += THREADS) {
        const int32_t id = e->bias[2 * i];
        bool first = id >= lo && id < hi;
        for (int32_t k = 0; first && k < i; k++) first = e->bias[2 * k] != id;
        if (!first) continue;
        float v = __ldcg(l + id);
        for (int32_t k = i; k < e->n_bias; k++)
            if (e->bias[2 * k] == id) v = __fadd_rn(v, __int_as_float(e->bias[2 * k + 1]));
        __stcg(l + id, v);
    }
    if (e->n > 0) {
        const bool wide = e->n - s->n_prompt >= 1 << 15;
        const int32_t room = wide ? TABLE : 2 * TABLE, width = wide ? 32 : 16;
        const uint32_t prompt = 1u << (width - 1), all = prompt | (prompt - 1);
        for (int32_t i = tid * 4; i < TABLE; i += THREADS * 4) *(uint4 *)(seen + i) = make_uint4(0, 0, 0, 0);
#pragma unroll 1
        for (int32_t from = lo; from < hi; from += room) {
            const uint32_t n = (uint32_t)(hi - from < room ? hi - from : room);
            __syncthreads();
#pragma unroll 1
            for (int turn = 0; turn < 2; turn++) { /* count, then change */
#pragma unroll 1
                for (int32_t base = tid; base < e->n; base += AT_ONCE * THREADS) {
                    uint32_t id[AT_ONCE], found[AT_ONCE];
                    float v[AT_ONCE];
#pragma unroll
                    for (int j = 0; j < AT_ONCE; j++) {
                        const int32_t i = base + j * THREADS;
                        id[j] = i < e->n ? (uint32_t)(seen_at(e, i) - from) : ~0u;
                    }
#pragma unroll
                    for (int j = 0; j < AT_ONCE; j++) {
                        found[j] = 0;
                        if (from == lo && turn == 0 && id[j] < (uint32_t)(hi - lo))
                            asm volatile("prefetch.global.L2 [%0];" ::"l"(l + lo + id[j]) : "memory");
                        if (id[j] >= n) continue;
                        uint32_t *word = seen + (wide ? id[j] : id[j] / 2);
                        const int shift = wide ? 0 : (int)(id[j] % 2) * 16;
                        if (turn == 1)
                            found[j] = atomicAnd(word, ~(all << shift)) >> shift & all;
                        else if (base + j * THREADS < s->n_prompt)
                            atomicOr(word, prompt << shift);
                        else
                            atomicAdd(word, 1u << shift);
                        if (found[j]) v[j] = __ldcg(l + from + id[j]);
                    }
#pragma unroll
                    for (int j = 0; j < AT_ONCE; j++) {
                        if (!found[j]) continue;
                        const uint32_t c = found[j] & ~prompt;
                        float x = v[j] < 0.0f ? __fmul_rn(v[j], s->repetition) : __fdiv_rn(v[j], s->repetition);
                        if (c) x = __fsub_rn(__fsub_rn(x, __fmul_rn(__uint2float_rn(c), s->frequency)), s->presence);
                        __stcg(l + from + id[j], x);
                    }
                }
                __syncthreads();
            }
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int32_t i = tid; i < e->n_ban; i += THREADS)
        if (e->ban[i] >= lo && e->ban[i] < hi) __stcg(l + e->ban[i], forbidden(__ldcg(l + e->ban[i])));
    __syncthreads();
}

/* ---- first pass: the best logit and the ids near it ------------------------------------------------------------ */

/* A logit that about `want` threads' samples exceed; most: this thread's largest. A guess. */
static __device__ __noinline__ float pick_pivot(team *t, float most, float want) {
    share *sh = SH;
    const uint32_t key = ordered(most), other = key > KEY_NONE ? ~key : 0;
    sh->lo[t->tid] = sh->hi[t->tid] = sh->count[t->tid] = 0;
    const three ends = team_reduce<false>(t, __reduce_max_sync(ALL_LANES, key), __reduce_max_sync(ALL_LANES, other), 0);
    const float high = from_ordered((uint32_t)ends.v[0]), low = from_ordered(~(uint32_t)ends.v[1]);
    const float spread = __fdiv_rn((float)BINS, __fsub_rn(high, low));
    const float far = fminf(__fmul_rn(__fsub_rn(high, most), spread), (float)(BINS - 1));
    if (key > KEY_NONE) atomicAdd(&sh->count[__float2uint_rz(far)], 1u);
    team_sync(t);
    const cut none = {0, 0, 0, false};
    find_bin(t, &none, (uint64_t)want + 1, ~0ull);
    return sh->found.bin < 0 ? minus_inf() : __fsub_rn(high, __fdiv_rn((float)(sh->found.bin + 1), spread));
}

/* goal: of the list; 0: none is wanted. The list is there afterwards. */
static __device__ __noinline__ survey first_pass(team *t, const stream *whole, int32_t goal) {
    const stream w = *whole;
    const int32_t first = w.lo + t->tid * 4;
    float most = minus_inf(), low = plus_inf();
    float4 v[FOURS];
#pragma unroll
    for (int j = 0; j < HEAD; j++) v[j] = fetch(&w, sample_at(&w, t->tid, j));
#pragma unroll
    for (int j = 0; j < HEAD; j++) {
        DESK->sample[j][t->tid] = v[j];
        most = fmaxf(most, fmaxf(fmaxf(v[j].x, v[j].y), fmaxf(v[j].z, v[j].w)));
        low = fminf(low, v[j].x);
    }
#pragma unroll
    for (int j = 0; j < FOURS; j++) v[j] = fetch(&w, first + j * THREADS * 4);
    if (t->tid == 0) SH->n_list = 0;
    float pivot = plus_inf();
    if (goal > 0) { /* share: of threads that have one above */
        const float share = 1.0f - __expf(-(float)(HEAD * 4 * goal) / (float)w.V);
        pivot = pick_pivot(t, most, w.V <= LIST_BEST ? (float)w.V : (float)(THREADS * t->size) * share);
    }
    const float least = fmaxf(pivot, -FLT_MAX);
    float best = minus_inf();
#pragma unroll 1
    for (int32_t i = first; i < w.hi; i += PART) {
#pragma unroll
        for (int j = 0; j < FOURS; j++) {
            const float4 f = v[j];
            v[j] = fetch(&w, i + PART + j * THREADS * 4); /* always FOURS of them under way */
            const float most_of = max_nan(max_nan(f.x, f.y), max_nan(f.z, f.w));
            best = max_nan(best, most_of);
            if (most_of >= least)
                list_four((f.x >= least) | (f.y >= least) << 1 | (f.z >= least) << 2 | (f.w >= least) << 3,
                          i + j * THREADS * 4, f);
        }
    }
    const three ends = team_reduce<false>(t, __reduce_max_sync(ALL_LANES, ordered(best)),
                                          __reduce_max_sync(ALL_LANES, ~ordered(low)), 0);
    survey s;
    s.key = (uint32_t)ends.v[0];
    s.top = from_ordered(s.key);
    s.low = from_ordered(~(uint32_t)ends.v[1]);
    s.pivot = pivot;
    return s;
}

/* ---- second pass: masses --------------------------------------------------------------------------------------- */

/* From the last id to the first: what the first pass read last may still be in L2. All lanes stay to the end. BAND: the
 * thread's mass and its ids that are above. */
template <int HOW, bool BAND> static __device__ __forceinline__ sums add_row(const stream *w, const row *r) {
    const stream u = *w;
    const row q = *r;
    const float least = fmaxf(q.pivot, -FLT_MAX);
    float4 v[FOURS];
    sums all = {};
    int32_t part = (u.hi - u.lo - 1) / PART;
    const int32_t mine_at = u.lo + (int32_t)threadIdx.x * 4;
#pragma unroll
    for (int j = 0; j < FOURS; j++) v[j] = fetch(&u, mine_at + part * PART + j * THREADS * 4);
#pragma unroll 1
    for (; part >= 0; part--) {
        const int32_t i = mine_at + part * PART;
        halves kept = {};
#pragma unroll
        for (int j = 0; j < FOURS; j++) {
            const float4 four = v[j];
            const float f[4] = {four.x, four.y, four.z, four.w};
            if (part > 0) v[j] = fetch(&u, i - PART + j * THREADS * 4);
            uint32_t mine = 0;
#pragma unroll
            for (int k = 0; k < 4; k++) { /* -inf: no mass */
                const halves h = halves_of(weight_by<HOW>(f[k], &q.s));
                if (!BAND) {
                    kept.a += h.a, kept.b += h.b;
                    continue;
                }
                all.mass.a += h.a, all.mass.b += h.b;
                if (f[k] >= q.above)
                    kept.a += h.a, kept.b += h.b, all.count++;
                else if (f[k] >= least)
                    mine |= 1u << k;
            }
            if (BAND && mine) list_four(mine, i + j * THREADS * 4, four);
        }
        /* sums of 16 * 32 numbers up to 2^22: 32 bits hold them */
        const halves warp = {__reduce_add_sync(ALL_LANES, kept.a), __reduce_add_sync(ALL_LANES, kept.b)};
        if (threadIdx.x % 32 == 0) add_mass(&SH->part_lo[part], &SH->part_hi[part], mass_from(warp));
    }
    return all;
}

/* The mass of the row, and of each part of it. BAND: the list is made anew, of the ids from pivot up to below above; a
 * part's mass is that of its ids which are above. */
template <bool BAND> static __device__ __noinline__ void second_pass(team *t, const stream *w, row *r) {
    share *sh = SH;
    __syncthreads();
    if (t->tid < PARTS) sh->part_lo[t->tid] = sh->part_hi[t->tid] = 0;
    if (BAND && t->tid == 0) sh->n_list = 0;
    __syncthreads();
    sums all;
    if (r->s.T == 1.0f)
        all = add_row<ONE, BAND>(w, r);
    else if (r->s.quick)
        all = add_row<QUICK, BAND>(w, r);
    else
        all = add_row<SLOW, BAND>(w, r);
    __syncthreads();
    uint64_t parts = 0;
    if (t->tid < PARTS) parts = warp_sum(sh->part_lo[t->tid] + ((uint64_t)sh->part_hi[t->tid] << 32));
    const three v = team_reduce<true>(t, BAND ? warp_sum(mass_from(all.mass)) : parts, BAND ? parts : 0,
                                      BAND ? __reduce_add_sync(ALL_LANES, all.count) : 0);
    r->mass = v.v[0];
    r->above_mass = v.v[1], r->above_count = v.v[2];
}

/* ---- the list -------------------------------------------------------------------------------------------------- */

/* Every block takes what the others have in their lists. Ids in all, no more than `most` if the list is to be good. */
static __device__ __noinline__ int32_t join_lists(team *t, int32_t most) {
    int32_t all = 0, at = (int32_t)SH->n_list;
    if (t->size == 1) return at;
    for (int r = 0; r < t->size; r++) all += (int32_t)remote32(&SH->n_list, r);
#pragma unroll 1
    for (int r = 0; r < t->size && all <= most; r++) {
        if (r == t->rank) continue;
        const int32_t n = (int32_t)remote32(&SH->n_list, r);
        for (int32_t i = t->tid; i < n; i += THREADS) DESK->longer[at + i].place = remote64(&DESK->longer[i].place, r);
        at += n;
    }
    team_sync(t);
    return all;
}

/* Logits and ids become places and masses; the bins of find_end begin at `from`. The sum of the masses. */
static __device__ __noinline__ uint64_t weigh_list(int32_t tid, row *r, int32_t n, float from, float low) {
    const float range = fminf(__fmul_rn(32.0f, r->s.T), __fsub_rn(from, fmaxf(r->pivot, low)));
    r->origin = from;
    r->spread = fminf(__fdiv_rn((float)BINS, range > 0.0f ? range : 1.0f), 1e30f);
    const row q = *r;
    uint64_t sum = 0;
#pragma unroll 1
    for (int32_t i = tid; i < n; i += THREADS) {
        item *at = DESK->longer + i;
        const float l = __uint_as_float((uint32_t)(at->place >> 32));
        const uint64_t mass = mass_of(l, &q.s);
        at->place = place_of(&q, l, (int32_t)(uint32_t)at->place);
        at->mass = mass;
        sum += mass;
    }
    return block_sum(tid, sum);
}

/* find_cut of sample.c over the n items of the list, by every block for itself; c: what stands before them. */
static __device__ __noinline__ cut find_end(const team *t, int32_t n, cut c, uint64_t need_count, uint64_t need_mass) {
    share *sh = SH;
    const int32_t tid = t->tid;
    team alone = {};
    alone.tid = tid, alone.rank = t->rank, alone.size = 1;
    uint64_t prefix = 0;
    int32_t bits = PLACE_BITS;
    if (need_count < 1) need_count = 1;
    if (need_mass < 1) need_mass = 1;
    for (;;) {
        const int32_t shift = bits > BIN_BITS ? bits - BIN_BITS : 0;
        sh->lo[tid] = sh->hi[tid] = sh->count[tid] = 0;
        if (tid == 0) sh->n_few = 0;
        __syncthreads();
#pragma unroll 1
        for (int32_t i = tid; i < n; i += THREADS) {
            const item at = DESK->longer[i];
            if ((at.place ^ prefix) >> bits) continue;
            const uint32_t bin = (uint32_t)(at.place >> shift) & (BINS - 1);
            atomicAdd(&sh->count[bin], 1u);
            add_mass(&sh->lo[bin], &sh->hi[bin], at.mass);
        }
        __syncthreads();
        find_bin(&alone, &c, need_count, need_mass);
        c.count = sh->found.count, c.mass = sh->found.mass;
        const uint64_t in_bin = sh->found.bin_count, mass = sh->found.bin_mass;
        if (sh->found.bin < 0) {
            c.count += in_bin, c.mass += mass;
            c.place = ~0ull;
            return c;
        }
        prefix |= (uint64_t)sh->found.bin << shift;
        bits = shift;
        if (in_bin <= FEW || bits == 0) {
#pragma unroll 1
            for (int32_t i = tid; i < n; i += THREADS) {
                const item at = DESK->longer[i];
                if ((at.place ^ prefix) >> bits) continue;
                const uint32_t k = atomicAdd(&sh->n_few, 1u) % FEW;
                sh->few_place[k] = at.place;
                sh->few_mass[k] = at.mass;
            }
            __syncthreads();
            end_among_few(tid, (int32_t)in_bin, &c, need_count, need_mass);
            c.place = sh->found.place, c.count = sh->found.count, c.mass = sh->found.mass;
            return c;
        }
    }
}

/* The kept items, no more than FEW, by place or by id. */
static __device__ __noinline__ void take_few(int32_t tid, int32_t n, const cut *c, bool by_id) {
    share *sh = SH;
    const uint64_t last = c->place;
    if (tid == 0) sh->n_few = 0;
    __syncthreads();
#pragma unroll 1
    for (int32_t i = tid; i < n; i += THREADS) {
        const item at = DESK->longer[i];
        if (at.place > last) continue;
        const uint32_t k = atomicAdd(&sh->n_few, 1u) % FEW;
        sh->few_place[k] = by_id ? at.place & (ERN_VOCAB_MAX - 1) : at.place;
        sh->few_mass[k] = at.mass;
    }
    __syncthreads();
}

/* Where the run with the share top_p of the row's mass ends below the list of the best (n ids, list_mass): the ends of
 * a list around that place, as the sample has it. false: it ends in the list. A guess. */
static __device__ __noinline__ bool guess_band(team *t, const stream *w, row *r, float top_p, int32_t n,
                                               uint64_t list_mass, float low) {
    enum { MASS_SHIFT = 26 }; /* the sum of a sample's masses then has 32 bits */
    share *sh = SH;
    const stream u = *w;
    const scale by = r->s;
    const float range = fminf(__fmul_rn(32.0f, r->s.T), __fsub_rn(r->pivot, low));
    const float spread = __fdiv_rn((float)BINS, range > 0.0f ? range : 1.0f), pivot = r->pivot;
    if (!(pivot > minus_inf())) return false;
    sh->lo[t->tid] = sh->hi[t->tid] = sh->count[t->tid] = 0;
    __syncthreads();
    uint64_t count = 0, sum = 0;
#pragma unroll 1
    for (int j = 0; j < 4 * HEAD; j++) {
        if (sample_at(&u, t->tid, j / 4) >= u.hi) break;
        const float l = ((const float *)&DESK->sample[j / 4][t->tid])[j % 4];
        if (l >= pivot) continue;
        count++;
        if (!(l > minus_inf())) continue;
        const uint32_t bin = __float2uint_rz(fminf(__fmul_rn(__fsub_rn(pivot, l), spread), (float)(BINS - 1)));
        const uint32_t m = (uint32_t)(mass_of(l, &by) >> MASS_SHIFT);
        atomicAdd(&sh->count[bin], 1u);
        atomicAdd(&sh->lo[bin], m);
        sum += m;
    }
    const three all = team_reduce<true>(t, warp_sum(count), warp_sum(sum), 0);
    const float one = (float)(u.V - n) / (float)all.v[0]; /* ids that one of the sample stands for */
    const float best = (float)(list_mass >> MASS_SHIFT), rest = one * (float)all.v[1];
    if (best >= top_p * (best + 1.3f * rest)) return false;
    const float need = (top_p * (best + rest) - best) / one, half = (float)BAND_HALF / one;
    const cut none = {0, 0, 0, false};
    find_bin(t, &none, ~0ull, need > 1.0f ? (uint64_t)need : 1);
    const float middle = (float)sh->found.count + 0.5f * (float)sh->found.bin_count;
    r->above = plus_inf();
    if (middle > half + 1.0f) {
        find_bin(t, &none, (uint64_t)(middle - half), ~0ull);
        r->above = __fsub_rn(pivot, __fdiv_rn((float)(sh->found.bin < 0 ? BINS - 1 : sh->found.bin), spread));
    }
    find_bin(t, &none, (uint64_t)(middle + half) + 1, ~0ull);
    r->pivot = minus_inf();
    if (sh->found.bin >= 0) r->pivot = __fsub_rn(pivot, __fdiv_rn((float)(sh->found.bin + 1), spread));
    return true;
}

/* ---- the draw -------------------------------------------------------------------------------------------------- */

/* The first kept id, in id order, whose running mass exceeds target. All kept ids are in the list: */
static __device__ __noinline__ int32_t walk_list(team *t, int32_t V, int32_t n, const cut *c, uint64_t target) {
    const int32_t each = (V + BINS - 1) / BINS;
    const cut none = {0, 0, 0, true};
    if (c->count <= FEW) {
        take_few(t->tid, n, c, true);
        end_among_few(t->tid, (int32_t)c->count, &none, ~0ull, target + 1);
        return (int32_t)SH->found.place;
    }
#pragma unroll 1
    for (int32_t i = t->tid; i < n; i += THREADS) {
        item *at = DESK->longer + i;
        const int32_t id = (int32_t)(at->place & (ERN_VOCAB_MAX - 1));
        if (at->place > c->place) at->mass = 0;
        at->place = (uint64_t)(id / each) << (PLACE_BITS - BIN_BITS) | (uint32_t)id;
    }
    return (int32_t)(find_end(t, n, none, ~0ull, target + 1).place & (ERN_VOCAB_MAX - 1));
}

/* They are not; the masses of the parts lack those of the list. First the part, then 16 ids of it, then the id. */
static __device__ __noinline__ int32_t walk_row(team *t, const stream *w, const row *r, int32_t n, const cut *c,
                                                uint64_t target) {
    enum { EACH = PART / THREADS };
    share *sh = SH;
    const row q = *r;
    const cut kept = *c;
    const stream u = *w;
    const int32_t lane = t->tid % 32;
#pragma unroll 1
    for (int32_t i = t->tid; i < n; i += THREADS) {
        const item at = DESK->longer[i];
        const int32_t id = (int32_t)(at.place & (ERN_VOCAB_MAX - 1));
        if (at.place <= kept.place && id >= u.lo && id < u.hi)
            add_mass(&sh->part_lo[(id - u.lo) / PART], &sh->part_hi[(id - u.lo) / PART], at.mass);
    }
    team_sync(t);
    uint64_t rest = target;
    int32_t owner = 0, part = 0;
    for (;; owner++) {
        const uint64_t own =
            remote32(&sh->part_lo[lane], owner) + ((uint64_t)remote32(&sh->part_hi[lane], owner) << 32);
        const uint64_t up = sum_up_to(own);
        const uint32_t past = __ballot_sync(ALL_LANES, rest < up);
        if (past) {
            part = __ffs((int)past) - 1;
            rest -= __shfl_sync(ALL_LANES, up - own, part);
            break;
        }
        if (owner == t->size - 1) break; /* cannot be: the masses add up to more than target */
        rest -= __shfl_sync(ALL_LANES, up, 31);
    }
    if (t->rank == owner) {
        const int32_t first = u.lo + part * PART + t->tid * EACH;
        uint64_t m = 0;
#pragma unroll 1
        for (int32_t i = first; i < first + EACH && i < u.hi; i += 4) {
            const float4 f = __ldcg((const float4 *)(u.l + i));
            m += kept_mass(&q, &kept, f.x, i) + kept_mass(&q, &kept, f.y, i + 1);
            m += kept_mass(&q, &kept, f.z, i + 2) + kept_mass(&q, &kept, f.w, i + 3);
        }
        const uint64_t at = mass_before(t->tid, m);
        if (rest >= at && rest - at < m) sh->found.bin = first, sh->found.mass = at;
        __syncthreads();
        if (t->tid < 32) {
            const int32_t id = sh->found.bin + lane;
            const uint64_t own = lane < EACH && id < u.hi ? kept_mass(&q, &kept, __ldcg(u.l + id), id) : 0;
            const uint64_t up = sum_up_to(own);
            const uint32_t past = __ballot_sync(ALL_LANES, rest - sh->found.mass < up);
            if (lane == 0) sh->token = sh->found.bin + __ffs((int)past) - 1;
        }
    }
    team_sync(t);
    return (int32_t)remote32(&sh->token, owner);
}

/* Steps 8 to 11 of docs/model.md 7; false: the list does not hold the answer. */
static __device__ __forceinline__ bool stream_draw(team *t, const stream *w, const ern_sample *s, const survey *best,
                                                   int32_t n, int32_t *token) {
    const bool k_on = s->top_k > 0 && s->top_k < w->V, p_on = s->top_p < 1.0f, min_on = s->min_p >= MIN_P_ON;
    const cut none = {0, 0, 0, true};
    share *sh = SH;
    row r = row_make(best, s->temperature);
    const uint64_t list_mass = weigh_list(t->tid, &r, n, r.s.top, best->low);
    cut c = none;
    if (k_on || min_on) { /* only what is in the list may be drawn */
        uint64_t limit = (uint64_t)w->V;
        if (min_on) {
            const float least = (float)sample_log((double)s->min_p);
            if (!(__fdiv_rn(__fsub_rn(r.pivot, r.s.top), r.s.T) < least)) return false;
            uint64_t count = 0;
#pragma unroll 1
            for (int32_t i = t->tid; i < n; i += THREADS) {
                const float l = from_ordered(~(uint32_t)(DESK->longer[i].place >> ID_BITS));
                count += __fdiv_rn(__fsub_rn(l, r.s.top), r.s.T) >= least;
            }
            limit = block_sum(t->tid, count);
        }
        if (k_on && (uint64_t)s->top_k < limit) limit = (uint64_t)s->top_k;
        if (limit > (uint64_t)n) return false;
        if (k_on || !p_on) {
            c = find_end(t, n, none, limit, ~0ull);
            const uint64_t need = p_on ? share_of(c.mass, s->top_p) : c.mass;
            if (need < c.mass && c.count <= FEW) {
                take_few(t->tid, n, &c, false);
                end_among_few(t->tid, (int32_t)c.count, &none, ~0ull, need);
                c.place = sh->found.place, c.count = sh->found.count, c.mass = sh->found.mass;
            } else if (need < c.mass) {
                c = find_end(t, n, none, c.count, need);
            }
        } else {
            second_pass<false>(t, w, &r);
            c = find_end(t, n, none, limit, share_of(r.mass, s->top_p));
        }
    } else if (p_on) {
        const bool band = guess_band(t, w, &r, s->top_p, n, list_mass, best->low);
        uint64_t mass = list_mass;
        if (band) {
            second_pass<true>(t, w, &r);
            n = join_lists(t, LIST_NEAR);
            if (n > LIST_NEAR) return false;
            mass = weigh_list(t->tid, &r, n, fminf(r.above, r.s.top), best->low);
        } else {
            second_pass<false>(t, w, &r);
        }
        const uint64_t need = share_of(r.mass, s->top_p);
        if (need >= r.mass || r.above_mass >= need || r.above_mass + mass < need) return false;
        c.count = r.above_count, c.mass = r.above_mass;
        c = find_end(t, n, c, ~0ull, need);
    } else {
        second_pass<false>(t, w, &r);
        c.place = ~0ull, c.mass = r.mass;
    }
    const uint64_t target = target_of(s, c.mass);
    if (!(k_on || min_on || p_on))
        *token = walk_row(t, w, &r, 0, &c, target);
    else if (r.above_count > 0)
        *token = walk_row(t, w, &r, n, &c, target);
    else
        *token = walk_list(t, w->V, n, &c, target);
    return true;
}

/* ---- one row --------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void stream_row(const sample_args *a) {
    team t = {};
    t.tid = (int32_t)threadIdx.x, t.rank = cluster_rank(), t.size = cluster_size(), t.V = a->V;
    const int32_t at = (int32_t)blockIdx.x / t.size, tid = t.tid, V = a->V, slice = slice_of(V, t.size);
    float *l = a->logits + (int64_t)at * V;
    stream w = {l, V, t.rank * slice < V ? t.rank * slice : V, V};
    w.hi = V - w.lo < slice ? V : w.lo + slice;
    const int32_t ahead = w.hi - w.lo < AHEAD / 4 ? w.hi - w.lo : AHEAD / 4;
    if (tid == 0 && ahead > 0)
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(l + w.lo), "r"(ahead * 4) : "memory");
    if (tid < RULE_WORDS) SH->rule[tid] = ((const uint32_t *)(a->rules + at))[tid];
    team_begin(&t);
    const cu_rule *rule = (const cu_rule *)SH->rule;
    const ern_sample *s = &rule->s;

    const bool draws = s->forced < 0 && s->temperature >= GREEDY_BELOW && s->top_p >= GREEDY_BELOW && s->top_k != 1;
    const edits e = edits_make(a, rule, NULL);
    uint32_t state = ROW_NEW;
    survey best = {};
    int32_t token = 0;
    if (rule->mask < 0 && s->n_top < 0 && e.n_bias <= BIAS_FEW && !(draws && s->top_k > TOP_K_MAX && s->top_k < V)) {
        if (e.n_bias > 0 || e.n_ban > 0 || e.n > 0) edit_row(tid, &e, l, w.lo, w.hi);
        state = ROW_EDITED;
        const bool k_on = draws && s->top_k > 0 && s->top_k < V;
        const bool all = draws && !k_on && !(s->top_p < 1.0f) && !(s->min_p >= MIN_P_ON);
        best = first_pass(&t, &w, s->forced >= 0 || all ? 0 : k_on ? GOAL + 2 * s->top_k : GOAL);
        const int32_t n = join_lists(&t, LIST_BEST);
        if (is_bad(&best)) {
            state = ROW_DONE;
        } else if (n <= LIST_BEST) {
            if (s->forced >= 0) {
                token = s->forced;
                state = ROW_DONE;
            } else if (draws) {
                if (stream_draw(&t, &w, s, &best, n, &token)) state = ROW_DONE;
            } else if (n > 0) {
                uint32_t id = ~0u;
#pragma unroll 1
                for (int32_t i = tid; i < n; i += THREADS) {
                    const uint64_t one = DESK->longer[i].place;
                    if (__uint_as_float((uint32_t)(one >> 32)) == best.top && (uint32_t)one < id) id = (uint32_t)one;
                }
                token = (int32_t)~team_max(&t, ~id);
                state = ROW_DONE;
            }
        }
    }
    if (t.rank == 0 && tid == 0) {
        a->state[at] = state;
        if (state == ROW_DONE) a->ids[at] = token;
    }
    if (t.rank == 0 && state == ROW_DONE && tid < OUT_WORDS) { /* token, bad, zeros */
        const uint32_t bad = is_bad(&best);
        ((uint32_t *)(a->out + at))[tid] = tid == 0 ? (uint32_t)token : tid == 1 ? bad : 0u;
    }
    if (t.size > 1) team_sync(&t); /* nobody leaves while its memory is read */
}

#endif
