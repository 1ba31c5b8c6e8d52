/* Sampling on the device: the rule of model/sample.c, bit for bit. Its weights are integers, so any number of blocks
 * may add them up; what is f32 here is a single operation after the other, in the order of sample.c, never contracted.
 *
 * Where there are more than a few rows most are done by the kernel of cu_sample_stream.cuh, which looks at a row as it
 * streams past. What it leaves (logprobs, masks, runs that end where it did not look) is this file's.
 *
 * A row belongs to a cluster of blocks (8, or 4 where there are many rows); block r has the ids of slice r, so that
 * blocks stand in id order. The row is read once, into shared memory, and changed there: all else happens on the chip.
 * One pass finds the best logit, one adds up the masses and lists the few ids near the top, where top_k, top_p and the
 * draw are found. Where a row is so flat that the list does not hold the answer, a few of its logits tell about where
 * the answer is, and one more pass lists the ids around that place. If that fails too the row is walked as a whole,
 * with the same code: the answer is the same. */
#include "backend/cuda/cu_launch.cuh"
#include "backend/cuda/cu_sample_row.cuh"
#if !CU_PORTABLE
#include "backend/cuda/cu_sample_stream.cuh"
#endif

/* ---- the end of a run ------------------------------------------------------------------------------------------- */

/* find_cut of sample.c: the shortest run of the order with need_count items or need_mass, all if neither is reached.
 * Every round spreads the items that are still in question (equal to `prefix` above `bits`) over BINS bins of their
 * highest bits that differ. */
static __device__ __noinline__ cut find_cut(team *t, const row *r, bool in_list, uint64_t need_count,
                                            uint64_t need_mass) {
    share *sh = SH;
    const team u = *t;
    const row q = *r;
    view v = in_list ? view_list(t) : view_row(t);
    bool whole = !in_list;
    cut c = {0, in_list ? r->above_mass : 0, in_list ? r->above_count : 0, in_list};
    uint64_t prefix = 0;
    int32_t bits = PLACE_BITS, shift = PLACE_BITS - BIN_BITS;
    if (need_count < 1) need_count = 1;
    if (need_mass < 1) need_mass = 1;
    for (;;) {
        team_sync(t); /* nobody reads the bins any more */
        sh->lo[t->tid] = sh->hi[t->tid] = sh->count[t->tid] = 0;
        if (t->tid == 0) sh->n_short = sh->n_few = 0;
        __syncthreads();
        FOR_ITEMS(&u, &v, i, l, id) {
            (void)i;
            const uint64_t place = place_of(&q, l, id);
            if ((place ^ prefix) >> bits) continue;
            const uint32_t bin = (uint32_t)(place >> shift) & (BINS - 1);
            atomicAdd(&sh->count[bin], 1u);
            add_mass(&sh->lo[bin], &sh->hi[bin], mass_of(l, &q.s));
        }
        team_sync(t);
        find_bin(t, &c, need_count, need_mass);
        c.count = sh->found.count, c.mass = sh->found.mass;
        const uint64_t n = sh->found.bin_count, mass = sh->found.bin_mass;
        if (sh->found.bin < 0) {
            c.count += n, c.mass += mass;
            c.place = ~0ull;
            return c;
        }
        prefix = prefix >> (shift + BIN_BITS) << (shift + BIN_BITS) | (uint64_t)sh->found.bin << shift;
        bits = shift;
        if (c.count + n == need_count && c.mass + mass < need_mass) {
            c.count += n, c.mass += mass;
            c.place = prefix | ((1ull << bits) - 1);
            return c;
        }
        if (n <= FEW) {
            FOR_ITEMS(&u, &v, i, l, id) {
                (void)i;
                const uint64_t place = place_of(&q, l, id);
                if ((place ^ prefix) >> bits) continue;
                const uint64_t m = mass_of(l, &q.s);
#pragma unroll 1
                for (int r = 0; r < u.size; r++) {
                    const uint32_t at = remote_add(&sh->n_few, r, 1);
                    send64(&sh->few_place[at], r, place);
                    send64(&sh->few_mass[at], r, m);
                }
            }
            team_sync(t);
            end_among_few(u.tid, (int32_t)n, &c, need_count, need_mass);
            c.place = sh->found.place, c.count = sh->found.count, c.mass = sh->found.mass;
            return c;
        }
        const bool move = whole && n <= SHORT;
        uint64_t last = 0, inverted = 0; /* the last place; the first, inverted */
        FOR_ITEMS(&u, &v, i, l, id) {
            const uint64_t place = place_of(&q, l, id);
            if ((place ^ prefix) >> bits) continue;
            last = max64(last, place);
            inverted = max64(inverted, ~place);
            if (move) sh->shorts[atomicAdd(&sh->n_short, 1u)] = (slice_place)i;
        }
        const three ends = team_reduce<false>(t, warp_max(last), warp_max(inverted), 0);
        last = ends.v[0];
        if (move) {
            v.at = sh->shorts, v.n = (int32_t)sh->n_short;
            whole = false;
        }
        const int32_t highest = 63 - __clzll((long long)(last ^ ~ends.v[1])); /* n >= 2: they differ */
        shift = highest >= BIN_BITS ? highest - BIN_BITS + 1 : 0;
        bits = shift + BIN_BITS < bits ? shift + BIN_BITS : bits;
        prefix = last >> bits << bits;
    }
}

/* ---- the draw -------------------------------------------------------------------------------------------------- */

/* Whether a run of the order may be looked for in the list: it ends there. */
static __device__ __forceinline__ bool list_holds(const row *r, uint64_t need_count, uint64_t need_mass) {
    if (!r->list_good || (r->banded && (r->above_count >= need_count || r->above_mass >= need_mass))) return false;
    return r->above_count + r->list_count >= need_count || (r->weighed && r->above_mass + r->list_mass >= need_mass);
}

/* Makes a list of the ids around the end of a run that the list of the best does not hold. Every thread's first four
 * logits, those below that list, are the sample; the list is as long as its memory bears with some room. */
static __device__ __noinline__ void find_band(team *t, row *r, uint64_t need_count, uint64_t need_mass) {
    enum { MASS_SHIFT = 26 }; /* the sum of a sample's masses then has 32 bits */
    share *sh = SH;
    const uint64_t count = r->list_good ? r->list_count : 0, mass = r->list_good ? r->list_mass : 0;
    const float below = r->list_good ? r->pivot : plus_inf();
    team_sync(t); /* nobody reads the bins any more */
    sh->lo[t->tid] = sh->hi[t->tid] = sh->count[t->tid] = 0;
    __syncthreads();
    uint64_t v[2] = {0, 0};
    const int32_t first = t->from + t->tid % 32 * 4;
#pragma unroll 1
    for (int32_t i = first; i < first + 4 && i < t->to; i++) {
        const float l = sh->slice[i];
        if (!(l < below && l > minus_inf())) continue;
        const uint32_t bin = (uint32_t)(place_of(r, l, 0) >> (PLACE_BITS - BIN_BITS));
        const uint32_t m = (uint32_t)(mass_of(l, &r->s) >> MASS_SHIFT);
        atomicAdd(&sh->count[bin], 1u);
        atomicAdd(&sh->lo[bin], m);
        v[0]++, v[1] += m;
    }
    const three all = team_reduce<true>(t, warp_sum(v[0]), warp_sum(v[1]), 0);
    /* which share of what is below the list is part of the run */
    uint64_t at_count = ~0ull, at_mass = ~0ull;
    if (need_count < (uint64_t)t->V)
        at_count = (uint64_t)((float)all.v[0] * ((float)(need_count - count) / (float)((uint64_t)t->V - count)));
    if (need_mass < r->mass)
        at_mass = (uint64_t)((float)all.v[1] * ((float)(need_mass - mass) / (float)(r->mass - mass)));
    const cut none = {0, 0, 0, false};
    find_bin(t, &none, at_count > 1 ? at_count : 1, at_mass > 1 ? at_mass : 1);
    const float middle = (float)(sh->found.count + sh->found.bin_count / 2);
    const float half = 0.3f * (float)(t->size * LIST) * ((float)(t->size * THREADS * 4) / (float)t->V);
    r->above = below;
    if (middle >= half + 1.0f) {
        find_bin(t, &none, (uint64_t)(middle - half), ~0ull);
        const int32_t bin = sh->found.bin < 0 ? BINS - 1 : sh->found.bin;
        r->above = fminf(below, __fsub_rn(r->s.top, __fdiv_rn((float)bin, r->spread)));
    }
    find_bin(t, &none, (uint64_t)(middle + half) + 1, ~0ull);
    r->pivot = minus_inf();
    if (sh->found.bin >= 0) r->pivot = __fsub_rn(r->s.top, __fdiv_rn((float)(sh->found.bin + 1), r->spread));
    gather<true, true>(t, r, true);
}

/* find_cut where it is cheapest. */
static __device__ __forceinline__ cut find_run(team *t, row *r, uint64_t need_count, uint64_t need_mass) {
    bool in_list = list_holds(r, need_count, need_mass);
    if (!in_list && !r->banded && r->pivot > minus_inf()) {
        find_band(t, r, need_count, need_mass);
        in_list = list_holds(r, need_count, need_mass);
    }
    return find_cut(t, r, in_list, need_count, need_mass);
}

/* The first kept id, in id order, whose running mass exceeds target: first the block, then a run of its ids (those of a
 * warp, or a bucket where few are kept), then the id. */
static __device__ __noinline__ int32_t walk_to(team *t, const row *r, const cut *c, uint64_t target) {
    share *sh = SH;
    const team u = *t;
    const row q = *r;
    const cut kept = *c;
    const bool in_list = kept.in_list;
    const view v = view_list(t);
    uint64_t mine = r->block_mass, before = r->mass_before;
    const bool banded = r->banded, by_chunk = !in_list || banded;
    if (kept.place != ~0ull || banded || !r->have_mass) {
        uint64_t sum = 0;
        if (in_list) {
            FOR_ITEMS(&u, &v, i, l, id) {
                (void)i;
                sum += kept_mass(&q, &kept, l, id);
            }
            if (banded && u.tid < WARPS) sum += sh->chunk[u.tid];
        } else {
#pragma unroll 1
            FOR_FOURS(&u, i) {
#pragma unroll 1
                for (int k = i; k < i + 4; k++) sum += kept_mass(&q, &kept, sh->slice[k], u.lo + k);
            }
            sum = warp_sum(sum);
            if (u.tid % 32 == 0) sh->chunk[u.tid / 32] = sum;
        }
        const three all = team_reduce<true>(t, in_list ? warp_sum(sum) : sum, 0, 0);
        mine = all.mine, before = all.before;
    } else {
        team_sync(t); /* nobody reads the bins any more */
    }
    const bool owns = target >= before && target - before < mine;
    if (owns) {
        uint64_t rest = target - before, m, at;
        if (in_list) {
            sh->lo[u.tid] = sh->hi[u.tid] = 0;
            __syncthreads();
            FOR_ITEMS(&u, &v, i, l, id) {
                const int32_t bin = banded ? i / u.chunk : i >> BUCKET_BITS;
                add_mass(&sh->lo[bin], &sh->hi[bin], kept_mass(&q, &kept, l, id));
            }
            __syncthreads();
            m = sh->lo[u.tid] | (uint64_t)sh->hi[u.tid] << 32;
        } else {
            m = 0;
        }
        if (by_chunk && u.tid < WARPS) m += sh->chunk[u.tid];
        at = mass_before(u.tid, m);
        if (rest >= at && rest - at < m) sh->found.bin = u.tid, sh->found.mass = at;
        __syncthreads();
        rest -= sh->found.mass;
        const int32_t n = by_chunk ? u.chunk : 1 << BUCKET_BITS, from = sh->found.bin * n;
        const int32_t each = CU_PORTABLE ? (n + THREADS - 1) / THREADS : 4; /* of a thread */
        const int32_t end = from + n < u.hi - u.lo ? from + n : u.hi - u.lo, first = from + each * u.tid;
        m = 0;
#pragma unroll 1
        for (int k = 0; k < each; k++) {
            const int32_t i = first + k;
            if (i < end) m += kept_mass(&q, &kept, sh->slice[i], u.lo + i);
        }
        at = mass_before(u.tid, m);
        if (rest >= at && rest - at < m) {
            int32_t id = u.lo + first;
            rest -= at;
            for (uint64_t one; rest >= (one = kept_mass(&q, &kept, sh->slice[id - u.lo], id)); id++) rest -= one;
            sh->token = id;
        }
        __syncthreads();
    }
    return (int32_t)team_max(t, owns ? (uint32_t)sh->token : 0);
}

/* Steps 8 to 11 of docs/model.md 7. r has its list, and its mass unless top_k is on. */
static __device__ __forceinline__ int32_t draw(team *t, row *r, const ern_sample *s) {
    uint64_t mass = r->mass, V = (uint64_t)t->V;
    cut c = {~0ull, mass, V, false};
    const bool k_on = s->top_k > 0 && s->top_k < t->V;
    if (s->min_p >= MIN_P_ON || k_on) {
        uint64_t limit = V;
        if (s->min_p >= MIN_P_ON) {
            float least = (float)sample_log((double)s->min_p);
            bool in_list = r->list_good && __fdiv_rn(__fsub_rn(r->pivot, r->s.top), r->s.T) < least;
            view v = in_list ? view_list(t) : view_row(t);
            uint64_t n = 0;
            FOR_ITEMS(t, &v, i, l, id) {
                (void)i, (void)id;
                n += __fdiv_rn(__fsub_rn(l, r->s.top), r->s.T) >= least;
            }
            limit = team_sum(t, n);
        }
        if (k_on && (uint64_t)s->top_k < limit) limit = (uint64_t)s->top_k;
        c = find_run(t, r, limit, ~0ull);
        if (k_on) mass = c.mass;
    }
    if (s->top_p < 1.0f) {
        uint64_t need = share_of(mass, s->top_p);
        /* a run that ends before one in the list of the best ends there too */
        if (need < c.mass && c.in_list && !r->banded)
            c = find_cut(t, r, true, c.count, need);
        else if (need < c.mass)
            c = find_run(t, r, c.count, need);
    }
    return walk_to(t, r, &c, target_of(s, c.mass));
}

/* ---- changing the logits --------------------------------------------------------------------------------------- */

static __device__ __forceinline__ bool mine(const team *t, int32_t id) { return id >= t->lo && id < t->hi; }

/* Before the row comes, its place in shared memory has room for a number an id: how often each was seen. What is left
 * of that is a list of ids, each once (where it grows too long, in global memory), and how often they were seen in the
 * reply. bias: an id may be listed twice; its first entry adds for all of them, in list order. */
static __device__ __noinline__ void edit_begin(const team *t, const edits *e) {
    share *sh = SH;
    uint32_t *count = (uint32_t *)sh->slice;
    if (t->tid == 0) sh->n_edit = 0;
    if (e->n > 0) {
        FOR_FOURS(t, i) * (uint4 *)(count + i) = make_uint4(0, 0, 0, 0);
    }
#pragma unroll 1
    for (int32_t i = t->tid; i < e->n_bias; i += THREADS)
        if (mine(t, e->bias[2 * i])) __stcg(e->entry + e->bias[2 * i], COUNT_DONE - 1);
    __syncthreads();
#pragma unroll 1
    for (int32_t base = t->tid; base < e->n; base += BATCH * THREADS) {
        int32_t id[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            const int32_t i = base + j * THREADS;
            id[j] = i < e->n ? seen_at(e, i) : -1;
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            if (!mine(t, id[j])) continue;
            const int32_t place = id[j] - t->lo;
            const bool reply = base + j * THREADS >= e->s->n_prompt;
            if (reply ? atomicAdd(count + place, 1u) : atomicOr(count + place, COUNT_DONE)) continue;
            const uint32_t at = atomicAdd(&sh->n_edit, 1u); /* the first to see it */
            if (at < LIST)
                sh->list[at] = (slice_place)place;
            else
                __stcg(e->more + 2 * (t->lo + at), (uint32_t)place);
        }
    }
#pragma unroll 1
    for (int32_t i = t->tid; i < e->n_bias; i += THREADS)
        if (mine(t, e->bias[2 * i])) atomicMin(e->entry + e->bias[2 * i], (uint32_t)i);
    __syncthreads();
#pragma unroll 1
    for (int32_t i = t->tid; i < e->n_bias; i += THREADS)
        if (mine(t, e->bias[2 * i]) && (__ldcg(e->entry + e->bias[2 * i]) & ~COUNT_DONE) != (uint32_t)i)
            atomicOr(e->entry + e->bias[2 * i], COUNT_DONE); /* not alone */
#pragma unroll 1
    for (uint32_t i = t->tid; i < sh->n_edit; i += THREADS) {
        if (i < LIST)
            sh->times[i] = count[sh->list[i]] & ~COUNT_DONE;
        else
            __stcg(e->more + 2 * (t->lo + i) + 1, count[__ldcg(e->more + 2 * (t->lo + i))] & ~COUNT_DONE);
    }
    __syncthreads();
}

/* The slice is there, for this thread. */
static __device__ __noinline__ void edit_end(const team *t, const edits *e) {
    share *sh = SH;
    float *slice = sh->slice;
    const ern_sample *s = e->s;
    __syncthreads();
#pragma unroll 1
    for (int32_t i = t->tid; i < e->n_bias; i += THREADS) {
        const int32_t id = e->bias[2 * i];
        if (!mine(t, id)) continue;
        const uint32_t first = __ldcg(e->entry + id);
        if ((first & ~COUNT_DONE) != (uint32_t)i) continue;
        float v = __fadd_rn(slice[id - t->lo], __int_as_float(e->bias[2 * i + 1]));
#pragma unroll 1
        for (int32_t k = i + 1; first & COUNT_DONE && k < e->n_bias; k++)
            if (e->bias[2 * k] == id) v = __fadd_rn(v, __int_as_float(e->bias[2 * k + 1]));
        slice[id - t->lo] = v;
    }
    if (e->n_bias > 0) __syncthreads();
#pragma unroll 1
    for (uint32_t i = t->tid; i < sh->n_edit; i += THREADS) {
        const uint32_t at = i < LIST ? sh->list[i] : __ldcg(e->more + 2 * (t->lo + i));
        const uint32_t c = i < LIST ? sh->times[i] : __ldcg(e->more + 2 * (t->lo + i) + 1);
        float v = slice[at];
        v = v < 0.0f ? __fmul_rn(v, s->repetition) : __fdiv_rn(v, s->repetition);
        if (c) v = __fsub_rn(__fsub_rn(v, __fmul_rn(__uint2float_rn(c), s->frequency)), s->presence);
        slice[at] = v;
    }
    __syncthreads();
#pragma unroll 1
    for (int32_t i = t->tid; i < e->n_ban; i += THREADS)
        if (mine(t, e->ban[i])) slice[e->ban[i] - t->lo] = forbidden(slice[e->ban[i] - t->lo]);
    if (e->n_ban > 0) __syncthreads();
}

/* ---- logprobs -------------------------------------------------------------------------------------------------- */

/* Logprob, rank and top list of r into the first block's sh->out, by all. plain: logits, not logprobs. */
static __device__ __noinline__ void fill_logprobs(team *t, const row *r, const ern_sample *s, int32_t token,
                                                  bool plain) {
    share *sh = SH;
    ern_sampled *out = (ern_sampled *)sh->out;
    const int32_t owner = token / t->slice; /* its slice has been still since the masses were added up */
    const float chosen = __uint_as_float(remote32(&sh->slice[token - owner * t->slice], owner));
    const uint64_t chosen_place = place_of(r, chosen, token);
    uint64_t better = 0;
    { /* rank: how many stand before it */
        const bool in_list = r->list_good && chosen >= r->pivot && chosen > minus_inf();
        view v = in_list ? view_list(t) : view_row(t);
        FOR_ITEMS(t, &v, i, l, id) {
            (void)i;
            better += l > chosen || (l == chosen && id < token);
        }
        better = team_sum(t, better);
    }
    cut c = {~0ull, r->mass, (uint64_t)t->V, false};
    if (!plain && s->logprob_normalized && s->top_p < 1.0f) {
        uint64_t need = share_of(r->mass, s->top_p);
        c = find_cut(t, r, list_holds(r, (uint64_t)t->V, need), (uint64_t)t->V, need);
    }
    if (t->tid == 0) sh->n_best = 0;
    __syncthreads();
    if (s->n_top > 0) {
        const uint64_t n = (uint64_t)s->n_top;
        const bool in_list = r->list_good && (r->list_count >= n || !(r->pivot > minus_inf()));
        cut best = find_cut(t, r, in_list, n, ~0ull);
        view v = in_list ? view_list(t) : view_row(t);
        FOR_ITEMS(t, &v, i, l, id) {
            (void)i;
            const uint64_t place = place_of(r, l, id);
            if (!(l > minus_inf()) || place > best.place) continue;
            const uint32_t at = atomicAdd(&sh->n_best, 1u);
            if (at >= ERN_TOP_MAX) continue; /* cannot be: the run has n_top items */
            sh->place[at] = place;
            sh->best_l[at] = l;
        }
    }
    team_sync(t);
    if (t->rank == 0 && t->tid < 32) { /* lane i: entry i of all blocks' one after the other; lane n_top: the token */
        uint64_t place = ~0ull;
        float l = chosen;
        uint32_t n = 0;
#pragma unroll 1
        for (int b = 0; b < t->size; b++) {
            const uint32_t have = remote32(&sh->n_best, b);
            if ((uint32_t)t->tid >= n && (uint32_t)t->tid < n + have) {
                place = remote64(&sh->place[t->tid - n], b);
                l = __uint_as_float(remote32(&sh->best_l[t->tid - n], b));
            }
            n += have;
        }
        int32_t at = 0;
#pragma unroll 1
        for (int k = 0; k < 32; k++) at += __shfl_sync(ALL_LANES, place, k) < place;
        float value;
        if (plain) {
            value = __fdiv_rn(l, r->s.T);
        } else {
            double log_sum = __dsub_rn(sample_log(__ull2double_rn(c.mass)), MASS_BITS * 0.6931471805599453);
            value = (float)__dsub_rn((double)__fdiv_rn(__fsub_rn(l, r->s.top), r->s.T), log_sum);
            if (((uint32_t)t->tid < n ? place : chosen_place) > c.place) value = minus_inf();
        }
        if ((uint32_t)t->tid < n) {
            out->top_id[at] = (int32_t)(place & ((1u << ID_BITS) - 1));
            out->top_logprob[at] = value;
        } else if ((uint32_t)t->tid == n) {
            out->logprob = value;
            out->rank = 1 + (int32_t)better;
        }
        /* what is outside the nucleus stands at the end */
        const uint32_t in = __ballot_sync(ALL_LANES, (uint32_t)t->tid < n && (plain || value > minus_inf()));
        if (t->tid == 0) out->n_top = __popc(in);
    }
    __syncthreads();
}

/* ---- one row --------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void team_make(team *t, int32_t V, int32_t rank, int32_t size) {
    t->tid = (int32_t)threadIdx.x;
    t->rank = rank;
    t->size = size;
    t->V = V;
    t->slice = slice_of(V, size);
    t->lo = t->rank * t->slice < V ? t->rank * t->slice : V;
    t->hi = V - t->lo < t->slice ? V : t->lo + t->slice;
    t->chunk = slice_of(t->slice, WARPS);
    const int32_t fours = (t->hi - t->lo + 3) / 4 * 4;
    t->from = t->tid / 32 * t->chunk;
    t->to = t->from + t->chunk < fours ? t->from + t->chunk : fours;
    t->turn = 0;
    t->vec = V % 4 == 0;
}

/* The whole rule; false: the row is bad. changed: steps 3 to 6 are done. */
static __device__ __forceinline__ bool sample_row(team *t, const sample_args *a, const cu_rule *rule, const float *l,
                                                  bool changed, uint32_t *scratch, int32_t *token) {
    const ern_sample *s = &rule->s;
    const uint32_t *mask = rule->mask >= 0 ? (const uint32_t *)a->aux + rule->mask : NULL;
    const bool raw = s->n_top >= 0 && (s->mode == ERN_LOGPROBS_RAW || s->mode == ERN_LOGPROBS_RAW_LOGITS);
    const bool plain = s->mode == ERN_LOGPROBS_RAW_LOGITS || s->mode == ERN_LOGPROBS_PROCESSED_LOGITS;
    const bool greedy = !(s->temperature >= GREEDY_BELOW) || s->top_p < GREEDY_BELOW || s->top_k == 1;
    const edits e = edits_make(a, rule, scratch);
    const bool edited = !changed && (e.n_bias > 0 || e.n_ban > 0 || s->repetition != 1.0f || s->frequency != 0.0f ||
                                     s->presence != 0.0f);
    if (edited) edit_begin(t, &e);
    load_begin(t, l);
    load_end(t, mask);
    if (edited) edit_end(t, &e);
    survey best = survey_row(t);
    if (is_bad(&best)) return false;
    if (best.top == 0.0f || (greedy && s->forced < 0)) {
        *token = first_of(t, best.top);
        if (best.top == 0.0f) { /* its sign is lost in the key, and shows in the logprob's */
            const int32_t owner = *token / t->slice;
            best.top = __uint_as_float(remote32(&SH->slice[*token - owner * t->slice], owner));
        }
    }
    const bool draws = s->forced < 0 && !greedy;
    if (s->forced >= 0) *token = s->forced;
    if (!draws && s->n_top < 0) return true;

    const float T = greedy ? 1.0f : s->temperature;
    float logprob_T = raw && (plain || !s->logprob_scaled) ? 1.0f : T;
    const bool other_row = raw && edited;
    const bool again = other_row || logprob_T != T || plain; /* logprobs need more than the draw's pass */
    row r = row_make(&best, T);
    if (draws) {
        const bool k_on = s->top_k > 0 && s->top_k < t->V, told = s->n_top >= 0 && !again;
        if (!k_on || told)
            gather<true, false>(t, &r, told || k_on || s->top_p < 1.0f || s->min_p >= MIN_P_ON);
        else
            gather<false, false>(t, &r, true);
        *token = draw(t, &r, s);
        if (r.banded) r = row_make(&best, T); /* that list does not have the best */
    }
    if (s->n_top < 0) return true;
    if (other_row) {
        team_sync(t); /* nobody looks at the slice any more */
        load_begin(t, l);
        load_end(t, mask);
        best = survey_row(t); /* what spoils this row spoils the other: it is good */
        if (best.top == 0.0f) {
            const int32_t id = first_of(t, best.top), owner = id / t->slice;
            best.top = __uint_as_float(remote32(&SH->slice[id - owner * t->slice], owner));
        }
        r = row_make(&best, logprob_T);
    } else if (logprob_T != T) {
        r = row_make(&best, logprob_T);
    }
    if (plain && !r.listed)
        gather<false, false>(t, &r, true);
    else if (!plain && !(r.listed && r.have_mass))
        gather<true, false>(t, &r, true);
    fill_logprobs(t, &r, s, *token, plain);
    return true;
}

static __device__ __forceinline__ void sample_rows(const sample_args *a) {
    share *sh = SH;
    team t;
    team_make(&t, a->V, cluster_rank(), cluster_size());
    const int32_t cluster = (int32_t)blockIdx.x / t.size, n_cluster = (int32_t)gridDim.x / t.size;
    bool any = !a->state;
    for (int32_t w = cluster + t.tid % 32 * n_cluster; !any && w < a->n_want; w += 32 * n_cluster)
        any = __ldcg(a->state + w) != ROW_DONE;
    if (!__any_sync(ALL_LANES, any)) return; /* all warps of all blocks see the same */
#if CU_PORTABLE
    if (t.tid == 0) sh->slice = a->slice + (int64_t)cluster * t.slice;
#endif
    team_begin(&t);
    uint32_t *scratch = a->scratch + (int64_t)cluster * 3 * a->V;
    for (int32_t base = cluster; base < a->n_want; base += 32 * n_cluster) { /* lane k: row k of this cluster's */
        const int32_t lane_row = base + t.tid % 32 * n_cluster;
        uint32_t state = lane_row < a->n_want ? (uint32_t)ROW_NEW : (uint32_t)ROW_DONE;
        if (a->state && state == ROW_NEW) state = __ldcg(a->state + lane_row);
        const uint32_t changed = __ballot_sync(ALL_LANES, state == ROW_EDITED);
        for (uint32_t left = __ballot_sync(ALL_LANES, state != ROW_DONE); left; left &= left - 1) {
            const int32_t k = __ffs((int)left) - 1, w = base + k * n_cluster;
            const float *l = a->logits + (int64_t)w * a->V;
            int32_t token = 0;
            team_sync(&t); /* nobody looks at the slice any more, sh->out is written out */
            if (t.tid < OUT_WORDS) sh->out[t.tid] = 0;
            __syncthreads();
            const bool good = sample_row(&t, a, a->rules + w, l, changed >> k & 1, scratch, &token);
            __syncthreads();
            if (t.rank == 0 && t.tid == 0) {
                ern_sampled *out = (ern_sampled *)sh->out;
                out->token = token;
                out->bad = !good;
                a->ids[w] = token;
            }
            __syncthreads();
            if (t.rank == 0 && t.tid < OUT_WORDS) ((uint32_t *)(a->out + w))[t.tid] = sh->out[t.tid];
        }
    }
    team_sync(&t); /* nobody leaves while its memory is read */
}

/* ---- arg-max alone --------------------------------------------------------------------------------------------- */

enum { GREEDY_BLOCKS = 16 /* most of a row */ };

/* BATCH fours, the first at i; what is past the end is taken from the end: a maximum does not mind, and all loads are
 * under way before the first is waited for. */
static __device__ __forceinline__ void load_batch(const float *l, int32_t i, int32_t end, bool vec, float4 v[BATCH]) {
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
        const int32_t at = i + j * THREADS * 4;
        if (vec) {
            v[j] = __ldcg((const float4 *)(l + (at < end ? at : end - 4)));
        } else {
            v[j].x = __ldcg(l + (at < end ? at : end - 1));
            v[j].y = __ldcg(l + (at + 1 < end ? at + 1 : end - 1));
            v[j].z = __ldcg(l + (at + 2 < end ? at + 2 : end - 1));
            v[j].w = __ldcg(l + (at + 3 < end ? at + 3 : end - 1));
        }
    }
}

/* One pass, a batch on its way while the one before is looked at. What is kept of a batch is its maximum; in which
 * batch a thread's best was first is enough to find its id again. A single batch is still there. */
static __device__ __forceinline__ uint64_t best_of(const float *l, int32_t lo, int32_t hi, bool vec) {
    enum { STEP = BATCH * THREADS * 4 };
    if (lo >= hi) return 0;
    const int32_t first = lo + (int32_t)threadIdx.x * 4;
    float best = minus_inf();
    int32_t at = first;
    float4 v[BATCH], w[BATCH];
    load_batch(l, first, hi, vec, v);
    for (int32_t base = lo; base < hi; base += STEP) {
        const int32_t i = base - lo + first;
        const bool more = base + STEP < hi;
        if (more) load_batch(l, i + STEP, hi, vec, w);
        float most = v[0].x;
#pragma unroll
        for (int j = 0; j < BATCH; j++) most = max_nan(max_nan(most, max_nan(v[j].x, v[j].y)), max_nan(v[j].z, v[j].w));
        if (!(most <= best)) at = i; /* once NaN, always */
        best = max_nan(best, most);
        if (!more) break;
#pragma unroll
        for (int j = 0; j < BATCH; j++) v[j] = w[j];
    }
    const uint32_t key = ordered(best);
    uint32_t most = __reduce_max_sync(ALL_LANES, key), id = 0;
    if (key == most && key < KEY_BAD && key > KEY_NONE) { /* few threads: those of the warp's best */
        if (hi - lo > STEP) load_batch(l, at, hi, vec, v);
#pragma unroll
        for (int j = BATCH - 1; j >= 0; j--) {
            const int32_t i = at + j * THREADS * 4;
            if (v[j].w == best && i + 3 < hi) id = ~(uint32_t)(i + 3);
            if (v[j].z == best && i + 2 < hi) id = ~(uint32_t)(i + 2);
            if (v[j].y == best && i + 1 < hi) id = ~(uint32_t)(i + 1);
            if (v[j].x == best && i < hi) id = ~(uint32_t)i;
        }
    }
    return (uint64_t)most << 32 | __reduce_max_sync(ALL_LANES, id);
}

static __device__ __forceinline__ void greedy_row(ern_sampled *out, int32_t *ids, const float *logits, int32_t V) {
    __shared__ uint64_t warp[WARPS], blocks[GREEDY_BLOCKS];
    const int32_t size = cluster_size(), rank = cluster_rank(), w = (int32_t)blockIdx.x / size;
    const int32_t slice = slice_of(V, size), lo = rank * slice, tid = (int32_t)threadIdx.x;
    const uint64_t mine = best_of(logits + (int64_t)w * V, lo, lo + slice < V ? lo + slice : V, V % 4 == 0);
    if (tid % 32 == 0) warp[tid / 32] = mine;
    __syncthreads();
    uint64_t best = warp[tid % WARPS];
    for (int d = WARPS / 2; d > 0; d >>= 1) {
        const uint64_t o = __shfl_xor_sync(ALL_LANES, best, d);
        best = o > best ? o : best;
    }
    if (size > 1) {
        if (tid == 0) send64(&blocks[rank], 0, best);
        cluster_sync();
        if (rank == 0) {
            best = blocks[tid % 32 < size ? tid % 32 : 0];
            for (int d = 16; d > 0; d >>= 1) {
                const uint64_t o = __shfl_xor_sync(ALL_LANES, best, d);
                best = o > best ? o : best;
            }
        }
    }
    if (rank == 0) {
        const uint32_t key = (uint32_t)(best >> 32);
        const bool bad = key >= KEY_BAD || key <= KEY_NONE;
        const int32_t id = bad ? 0 : (int32_t) ~(uint32_t)best;
        if (tid == 0) ids[w] = id;
        if (out && tid < OUT_WORDS) /* token, bad, zeros */
            ((uint32_t *)(out + w))[tid] = tid == 0 ? (uint32_t)id : tid == 1 ? (uint32_t)bad : 0u;
    }
}

/* ---- host ------------------------------------------------------------------------------------------------------ */

static __global__ void __launch_bounds__(THREADS, 2) sample_kernel(const __grid_constant__ sample_args a) {
    cu_launch_next();
    cu_wait_previous();
    sample_rows(&a);
}

#if !CU_PORTABLE
static __global__ void __launch_bounds__(THREADS, 2) stream_kernel(const __grid_constant__ sample_args a) {
    cu_launch_next();
    cu_wait_previous();
    stream_row(&a);
}
#endif

static __global__ void __launch_bounds__(THREADS, 2)
    greedy_kernel(ern_sampled *out, int32_t *ids, const float *logits, int32_t V) {
    cu_launch_next();
    if (cluster_size() > 1) cluster_sync(); /* the first block is there: the others write to it */
    cu_wait_previous();
    greedy_row(out, ids, logits, V);
}

/* A row's blocks: as many as may help where there are few rows, one where the rows fill the chip. */
static unsigned greedy_blocks(int32_t n) {
    return CU_PORTABLE ? 1 : n <= 8 ? GREEDY_BLOCKS : n <= 33 ? 8 : n <= 66 ? 4 : n <= 132 ? 2 : 1;
}

static cudaError_t run_greedy(cudaStream_t s, ern_sampled *out, int32_t *ids, const float *logits, int32_t n,
                              int32_t V) {
    if (n < 1) return cudaSuccess;
#if !CU_PORTABLE
    static const cudaError_t set =
        cudaFuncSetAttribute(greedy_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (set) return set;
#endif
    void *args[] = {&out, &ids, &logits, &V};
    const unsigned size = greedy_blocks(n);
    return cu_launch(s, (const void *)greedy_kernel, dim3((unsigned)n * size), THREADS, 0, true, size, args);
}

static int32_t n_clusters(int32_t n_want) { return n_want < ROWS_MANY ? n_want : ROWS_MANY; }
/* Numbers of the slices that are in global memory. */
static int64_t n_sliced(int32_t n_want, int32_t n_vocab) {
    return CU_PORTABLE ? (int64_t)n_clusters(n_want) * slice_of(n_vocab, 1) : 0;
}

extern "C" int64_t cu_sample_scratch_bytes(int32_t n_want, int32_t n_vocab) {
    return (n_sliced(n_want, n_vocab) + (int64_t)n_clusters(n_want) * 3 * n_vocab + n_want) * (int64_t)sizeof(uint32_t);
}

#if CU_PORTABLE
static cudaError_t run_all(cudaStream_t s, sample_args *a) {
    a->slice = (float *)a->scratch;
    a->scratch += n_sliced(a->n_want, a->V);
    sample_kernel<<<(unsigned)n_clusters(a->n_want), THREADS, sizeof(share), s>>>(*a);
    return cudaGetLastError();
}
#else
/* A row's blocks in the kernel that lets rows stream past; 0: fewer rows are faster in the memory of a cluster. */
static unsigned stream_blocks(int32_t n) { return n <= 16 ? 0 : n <= 33 ? 4 : n <= 66 ? 2 : 1; }

static cudaError_t run_all(cudaStream_t s, sample_args *a) {
    const int32_t most = (int32_t)sizeof(share) + ERN_VOCAB_MAX / 8 * (int32_t)sizeof(float);
    static const cudaError_t set =
        cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    static const cudaError_t set_stream =
        cudaFuncSetAttribute(stream_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (set || set_stream) return set ? set : set_stream;
    const int32_t n_want = a->n_want, n_vocab = a->V;
    void *args[] = {a};
    const unsigned blocks = stream_blocks(n_want);
    if (blocks > 0 && n_vocab % 4 == 0) {
        a->state = a->scratch + (int64_t)n_clusters(n_want) * 3 * n_vocab;
        const cudaError_t e = cu_launch(s, (const void *)stream_kernel, dim3((unsigned)n_want * blocks), THREADS,
                                        sizeof(share) + SLICE_MAX, true, blocks, args);
        if (e != cudaSuccess) return e;
    }
    const bool few = n_want <= ROWS_FEW || slice_of(n_vocab, 4) * (int32_t)sizeof(float) > SLICE_MAX;
    const int32_t size = few ? 8 : 4;
    const size_t bytes = sizeof(share) + (size_t)slice_of(n_vocab, size) * sizeof(float);
    return cu_launch(s, (const void *)sample_kernel, dim3((unsigned)(n_clusters(n_want) * size)), THREADS, bytes, true,
                     (unsigned)size, args);
}
#endif

extern "C" cudaError_t cu_sample(cudaStream_t s, ern_sampled *out, int32_t *ids, float *logits, int32_t n_want,
                                 int32_t n_vocab, const cu_rule *rules, const int32_t *aux, const int32_t *token,
                                 bool all_greedy, void *scratch) {
    if (all_greedy) return run_greedy(s, out, ids, logits, n_want, n_vocab);
    if (n_want < 1) return cudaSuccess;
    sample_args a = {out, ids, logits, n_want, n_vocab, rules, aux, token, (uint32_t *)scratch, NULL, NULL};
    return run_all(s, &a);
}

extern "C" cudaError_t cu_argmax(cudaStream_t s, int32_t *ids, const float *logits, int32_t n_row, int32_t n_vocab,
                                 void *scratch) {
    (void)scratch;
    return run_greedy(s, NULL, ids, logits, n_row, n_vocab);
}
