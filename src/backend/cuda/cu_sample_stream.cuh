/* Sampling where there are many rows: a block has a row for itself and lets it stream past, once, or twice where the
 * masses of all ids are wanted. What stays is a list of ids in shared memory: those near the top, or, where a run ends
 * far below that, those around the place where it ends, of which a sample of the row tells about where it is. The end
 * of the run, the draw and the token are found there, exactly; where the list turns out not to hold them, or where a
 * rule asks for more (logprobs, a mask), the row is left to the kernel that has rows in the memory of a cluster. */
#ifndef ERN_BACKEND_CUDA_CU_SAMPLE_STREAM_CUH
#define ERN_BACKEND_CUDA_CU_SAMPLE_STREAM_CUH

#include "backend/cuda/cu_sample_row.cuh"

enum {
    HEAD = 4,              /* a thread's first fours are the sample of the row */
    LIST_BEST = 4096,      /* most ids in the list of the best; beside the sample */
    LIST_NEAR = 6144,      /* in any list */
    GOAL = 512,            /* so many ids are wanted in the list of the best where top_k asks for less */
    TOP_K_MAX = 1500,      /* largest top_k that is looked for in that list */
    BAND_HALF = 2100,      /* ids of a list around a place, on either side */
    BIAS_FEW = 1024,       /* most biases; each is compared with all */
    TABLE = SLICE_MAX / 4, /* words that count ids while logits are changed */
    AHEAD = 8192,          /* bytes of each warp's ids that are fetched to L2 meanwhile */
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
static_assert(sizeof(desk) <= SLICE_MAX && offsetof(share, slice) % 16 == 0, "two blocks in a multiprocessor");

/* A row; this warp has the ids from .. to - 1, whole fours. */
typedef struct stream {
    const float *l;
    int32_t V, chunk, from, to;
} stream;

/* N fours of this lane, the first at i, the next 128 ids further; -inf beyond the warp's ids. */
template <int N> static __device__ __forceinline__ void fetch(const stream *w, int32_t i, float4 v[N]) {
#pragma unroll
    for (int j = 0; j < N; j++) {
        v[j] = make_float4(minus_inf(), minus_inf(), minus_inf(), minus_inf());
        if (i + j * 128 < w->to) v[j] = __ldcg((const float4 *)(w->l + i + j * 128));
    }
}

static __device__ __forceinline__ float max_of(float4 f) { return max_nan(max_nan(f.x, f.y), max_nan(f.z, f.w)); }

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

/* Steps 4 to 6, in memory. Ids are counted in shared memory, in 16 bits each where that is enough, as many at a time
 * as it has room for; the highest bit says that the prompt had the id. Who finds a count first takes it. */
static __device__ __noinline__ void edit_row(int32_t tid, const edits *e, float *l, int32_t V) {
    enum { AT_ONCE = 4 };
    const ern_sample *s = e->s;
    uint32_t *seen = DESK->seen;
#pragma unroll 1
    for (int32_t i = tid; i < e->n_bias; i += THREADS) {
        const int32_t id = e->bias[2 * i];
        bool first = true;
        for (int32_t k = 0; k < i; k++) first &= e->bias[2 * k] != id;
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
        for (int32_t from = 0; from < V; from += room) {
            const uint32_t n = (uint32_t)(V - from < room ? V - from : room);
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
    for (int32_t i = tid; i < e->n_ban; i += THREADS) __stcg(l + e->ban[i], forbidden(__ldcg(l + e->ban[i])));
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
    __syncthreads();
    const cut none = {0, 0, 0, false};
    find_bin(t, &none, (uint64_t)want + 1, ~0ull);
    return sh->found.bin < 0 ? minus_inf() : __fsub_rn(high, __fdiv_rn((float)(sh->found.bin + 1), spread));
}

/* goal: of the list. The list is there afterwards; *low: about the least logit. */
static __device__ __forceinline__ survey first_pass(team *t, const stream *w, int32_t goal) {
    enum { STEP = HEAD * 128 };
    const int32_t first = w->from + t->tid % 32 * 4;
    const bool whole = w->V <= LIST_BEST;
    float4 v[HEAD], next[HEAD];
    fetch<HEAD>(w, first, v);
    float most = minus_inf(), low = plus_inf();
#pragma unroll
    for (int j = 0; j < HEAD; j++) {
        DESK->sample[j][t->tid] = v[j];
        most = fmaxf(most, fmaxf(fmaxf(v[j].x, v[j].y), fmaxf(v[j].z, v[j].w)));
        low = fminf(low, v[j].x);
    }
    fetch<HEAD>(w, first + STEP, next);
    if (t->tid == 0) SH->n_list = 0;
    const float share = 1.0f - __expf(-(float)(HEAD * 4 * goal) / (float)w->V); /* of threads that have one above */
    const float pivot = pick_pivot(t, most, whole ? (float)w->V : (float)THREADS * share);
    const float least = fmaxf(pivot, -FLT_MAX);
    float best = minus_inf();
#pragma unroll 1
    for (int32_t i = first; i - t->tid % 32 * 4 < w->to; i += STEP) {
        float now[HEAD];
#pragma unroll
        for (int j = 0; j < HEAD; j++) {
            now[j] = max_of(v[j]);
            best = max_nan(best, now[j]);
        }
#pragma unroll
        for (int j = 0; j < HEAD; j++) {
            if (!(now[j] >= least)) continue;
            const uint32_t mine =
                (v[j].x >= least) | (v[j].y >= least) << 1 | (v[j].z >= least) << 2 | (v[j].w >= least) << 3;
            list_four(mine, i + j * 128, v[j]);
        }
#pragma unroll
        for (int j = 0; j < HEAD; j++) v[j] = next[j];
        fetch<HEAD>(w, i + 2 * STEP, next);
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

/* From the last id to the first: what the first pass read last may still be in L2. */
template <int HOW, bool BAND>
static __device__ __forceinline__ void add_row(const stream *w, const row *r, sums *all, sums *above) {
    enum { N = 2, STEP = N * 128 };
    const row q = *r;
    const float least = fmaxf(q.pivot, -FLT_MAX);
    const int32_t lane = (int32_t)threadIdx.x % 32;
    float4 v[N], next[N];
    int32_t base = w->from + (w->to - w->from - 1) / STEP * STEP;
    if (base >= w->from) fetch<N>(w, base + lane * 4, v);
#pragma unroll 1
    for (; base >= w->from; base -= STEP) {
        if (base > w->from) fetch<N>(w, base - STEP + lane * 4, next);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float f[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
            uint32_t mine = 0;
#pragma unroll
            for (int k = 0; k < 4; k++) { /* -inf: no mass */
                const halves h = halves_of(weight_by<HOW>(f[k], &q.s));
                all->mass.a += h.a, all->mass.b += h.b;
                if (!BAND) continue;
                if (f[k] >= q.above)
                    above->mass.a += h.a, above->mass.b += h.b, above->count++;
                else if (f[k] >= least)
                    mine |= 1u << k;
            }
            if (BAND && mine) list_four(mine, base + lane * 4 + j * 128, v[j]);
        }
#pragma unroll
        for (int j = 0; j < N; j++) v[j] = next[j];
    }
}

/* The mass of the row, and of each warp's ids. BAND: the list is made anew, of the ids from pivot up to below above;
 * a warp's mass is that of its ids which are above. */
template <bool BAND> static __device__ __noinline__ void second_pass(team *t, const stream *w, row *r) {
    share *sh = SH;
    if (BAND) {
        __syncthreads();
        if (t->tid == 0) sh->n_list = 0;
        __syncthreads();
    }
    sums all = {}, above = {};
    if (r->s.T == 1.0f)
        add_row<ONE, BAND>(w, r, &all, &above);
    else if (r->s.quick)
        add_row<QUICK, BAND>(w, r, &all, &above);
    else
        add_row<SLOW, BAND>(w, r, &all, &above);
    const uint64_t mass = warp_sum(mass_from(all.mass)), mass_above = BAND ? warp_sum(mass_from(above.mass)) : 0;
    if (t->tid % 32 == 0) sh->chunk[t->tid / 32] = BAND ? mass_above : mass;
    const three v = team_reduce<true>(t, mass, mass_above, BAND ? __reduce_add_sync(ALL_LANES, above.count) : 0);
    r->mass = v.v[0];
    r->above_mass = v.v[1], r->above_count = v.v[2];
}

/* ---- the list -------------------------------------------------------------------------------------------------- */

/* Logits and ids become places and masses; the bins of find_end begin at `from`. The sum of the masses. */
static __device__ __noinline__ uint64_t weigh_list(team *t, row *r, int32_t n, float from, float low) {
    const float range = fminf(__fmul_rn(32.0f, r->s.T), __fsub_rn(from, fmaxf(r->pivot, low)));
    r->origin = from;
    r->spread = fminf(__fdiv_rn((float)BINS, range > 0.0f ? range : 1.0f), 1e30f);
    const row q = *r;
    uint64_t sum = 0;
#pragma unroll 1
    for (int32_t i = t->tid; i < n; i += THREADS) {
        item *at = DESK->longer + i;
        const float l = __uint_as_float((uint32_t)(at->place >> 32));
        const uint64_t mass = mass_of(l, &q.s);
        at->place = place_of(&q, l, (int32_t)(uint32_t)at->place);
        at->mass = mass;
        sum += mass;
    }
    return team_sum(t, sum);
}

/* find_cut of sample.c over the n items of the list; c: what stands before them. */
static __device__ __noinline__ cut find_end(team *t, int32_t n, cut c, uint64_t need_count, uint64_t need_mass) {
    share *sh = SH;
    const int32_t tid = t->tid;
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
        find_bin(t, &c, need_count, need_mass);
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

/* Where the run with the share top_p of the row's mass ends below the list of the best (n ids, list_mass): the ends of
 * a list around that place, as the sample has it. false: it ends in the list. A guess. */
static __device__ __noinline__ bool guess_band(team *t, const stream *w, row *r, float top_p, int32_t n,
                                               uint64_t list_mass, float low) {
    enum { MASS_SHIFT = 26 }; /* the sum of a sample's masses then has 32 bits */
    share *sh = SH;
    const float range = fminf(__fmul_rn(32.0f, r->s.T), __fsub_rn(r->pivot, low));
    const float spread = __fdiv_rn((float)BINS, range > 0.0f ? range : 1.0f), pivot = r->pivot;
    if (!(pivot > minus_inf())) return false;
    sh->lo[t->tid] = sh->hi[t->tid] = sh->count[t->tid] = 0;
    __syncthreads();
    uint64_t count = 0, sum = 0;
#pragma unroll 1
    for (int j = 0; j < 4 * HEAD; j++) {
        if (w->from + t->tid % 32 * 4 + j / 4 * 128 >= w->to) break;
        const float l = ((const float *)&DESK->sample[j / 4][t->tid])[j % 4];
        if (l >= pivot) continue;
        count++;
        if (!(l > minus_inf())) continue;
        const uint32_t bin = __float2uint_rz(fminf(__fmul_rn(__fsub_rn(pivot, l), spread), (float)(BINS - 1)));
        const uint32_t m = (uint32_t)(mass_of(l, &r->s) >> MASS_SHIFT);
        atomicAdd(&sh->count[bin], 1u);
        atomicAdd(&sh->lo[bin], m);
        sum += m;
    }
    const three all = team_reduce<true>(t, warp_sum(count), warp_sum(sum), 0);
    const float one = (float)(w->V - n) / (float)all.v[0]; /* ids that one of the sample stands for */
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
#pragma unroll 1
    for (int32_t i = t->tid; i < n; i += THREADS) {
        item *at = DESK->longer + i;
        const int32_t id = (int32_t)(at->place & (ERN_VOCAB_MAX - 1));
        if (at->place > c->place) at->mass = 0;
        at->place = (uint64_t)(id / each) << (PLACE_BITS - BIN_BITS) | (uint32_t)id;
    }
    const cut none = {0, 0, 0, true};
    return (int32_t)(find_end(t, n, none, ~0ull, target + 1).place & (ERN_VOCAB_MAX - 1));
}

/* They are not; the warps' masses lack those of the list. First the warp, then the id among its own. */
static __device__ __noinline__ int32_t walk_row(team *t, const stream *w, const row *r, int32_t n, const cut *c,
                                                uint64_t target) {
    share *sh = SH;
    const row q = *r;
    const cut kept = *c;
    const int32_t lane = t->tid % 32;
#pragma unroll 1
    for (int32_t i = t->tid; i < n; i += THREADS) {
        const item at = DESK->longer[i];
        if (at.place <= kept.place)
            atomicAdd((unsigned long long *)&sh->chunk[(int32_t)(at.place & (ERN_VOCAB_MAX - 1)) / w->chunk],
                      (unsigned long long)at.mass);
    }
    __syncthreads();
    uint64_t up = lane < WARPS ? sh->chunk[lane] : 0;
    const uint64_t own = up;
#pragma unroll 1
    for (int d = 1; d < 32; d <<= 1) {
        const uint64_t o = __shfl_up_sync(ALL_LANES, up, d);
        if (lane >= d) up += o;
    }
    const int32_t warp = __ffs((int)__ballot_sync(ALL_LANES, target < up)) - 1;
    const uint64_t rest = target - __shfl_sync(ALL_LANES, up - own, warp);
    const int32_t from = warp * w->chunk, to = from + w->chunk < w->V ? from + w->chunk : w->V;
    const int32_t each = slice_of(w->chunk, THREADS), first = from + t->tid * each;
    const int32_t end = first + each < to ? first + each : to;
    uint64_t m = 0;
#pragma unroll 4
    for (int32_t i = first; i < end; i += 4) {
        const float4 f = __ldcg((const float4 *)(w->l + i));
        m += kept_mass(&q, &kept, f.x, i) + kept_mass(&q, &kept, f.y, i + 1);
        m += kept_mass(&q, &kept, f.z, i + 2) + kept_mass(&q, &kept, f.w, i + 3);
    }
    const uint64_t at = mass_before(t->tid, m);
    if (rest >= at && rest - at < m) {
        uint64_t left = rest - at;
        int32_t id = first;
        for (uint64_t one; left >= (one = kept_mass(&q, &kept, __ldcg(w->l + id), id)); id++) left -= one;
        sh->token = id;
    }
    __syncthreads();
    return sh->token;
}

static __device__ __forceinline__ uint64_t target_of(const ern_sample *s, uint64_t mass) {
    const uint64_t key = counter64(s->seed, (uint64_t)(uint32_t)s->choice);
    const uint64_t u = counter64(key, (uint64_t)(uint32_t)s->position) >> (64 - UNIFORM_BITS);
    return u * mass >> UNIFORM_BITS | __umul64hi(u, mass) << (64 - UNIFORM_BITS);
}

/* Steps 8 to 11 of docs/model.md 7; false: the list does not hold the answer. */
static __device__ __forceinline__ bool stream_draw(team *t, const stream *w, const ern_sample *s, const survey *best,
                                                   int32_t *token) {
    const bool k_on = s->top_k > 0 && s->top_k < w->V, p_on = s->top_p < 1.0f, min_on = s->min_p >= MIN_P_ON;
    const cut none = {0, 0, 0, true};
    row r = row_make(best, s->temperature);
    int32_t n = (int32_t)SH->n_list;
    const uint64_t list_mass = weigh_list(t, &r, n, r.s.top, best->low);
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
            limit = team_sum(t, count);
        }
        if (k_on && (uint64_t)s->top_k < limit) limit = (uint64_t)s->top_k;
        if (limit > (uint64_t)n) return false;
        if (k_on || !p_on) {
            c = find_end(t, n, none, limit, ~0ull);
            const uint64_t need = p_on ? share_of(c.mass, s->top_p) : c.mass;
            if (need < c.mass) c = find_end(t, n, none, c.count, need);
        } else {
            second_pass<false>(t, w, &r);
            c = find_end(t, n, none, limit, share_of(r.mass, s->top_p));
        }
    } else if (p_on) {
        const bool band = guess_band(t, w, &r, s->top_p, n, list_mass, best->low);
        uint64_t mass = list_mass;
        if (band) {
            second_pass<true>(t, w, &r);
            n = (int32_t)SH->n_list;
            if (n > LIST_NEAR) return false;
            mass = weigh_list(t, &r, n, fminf(r.above, r.s.top), best->low);
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
    share *sh = SH;
    const int32_t at = (int32_t)blockIdx.x, tid = (int32_t)threadIdx.x, V = a->V, chunk = slice_of(V, WARPS);
    const cu_rule *rule = a->rules + at;
    const ern_sample *s = &rule->s;
    float *l = a->logits + (int64_t)at * V;
    const int32_t from = tid / 32 * chunk;
    const stream w = {l, V, chunk, from, from + chunk < V ? from + chunk : V};
    team t = {};
    t.tid = tid, t.size = 1, t.V = V;
    team_begin(&t);

    const bool draws = s->forced < 0 && s->temperature >= GREEDY_BELOW && s->top_p >= GREEDY_BELOW && s->top_k != 1;
    const edits e = edits_make(a, rule, NULL);
    uint32_t state = ROW_NEW;
    survey best = {};
    int32_t token = 0;
    if (rule->mask < 0 && s->n_top < 0 && e.n_bias <= BIAS_FEW && !(draws && s->top_k > TOP_K_MAX && s->top_k < V)) {
        if (e.n_bias > 0 || e.n_ban > 0 || e.n > 0) {
            const int32_t ahead = w.to - from < AHEAD / 4 ? w.to - from : AHEAD / 4;
            if (tid % 32 == 0 && ahead > 0)
                asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(l + from), "r"(ahead * 4) : "memory");
            edit_row(tid, &e, l, V);
        }
        state = ROW_EDITED;
        best = first_pass(&t, &w, draws && 2 * s->top_k + 128 > GOAL ? 2 * s->top_k + 128 : GOAL);
        const int32_t n = (int32_t)sh->n_list;
        if (is_bad(&best)) {
            state = ROW_DONE;
        } else if (n <= LIST_BEST && n > 0) {
            if (s->forced >= 0) {
                token = s->forced;
                state = ROW_DONE;
            } else if (draws) {
                if (stream_draw(&t, &w, s, &best, &token)) state = ROW_DONE;
            } else {
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
    if (tid == 0) {
        a->state[at] = state;
        if (state == ROW_DONE) a->ids[at] = token;
    }
    if (state == ROW_DONE && tid < OUT_WORDS) { /* token, bad, zeros */
        const uint32_t bad = is_bad(&best);
        ((uint32_t *)(a->out + at))[tid] = tid == 0 ? (uint32_t)token : tid == 1 ? bad : 0u;
    }
}

#endif
