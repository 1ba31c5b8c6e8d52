/* Sampling on the device: the rule of model/sample.c, bit for bit. Its weights are integers, so any number of blocks
 * may add them up; what is f32 here is a single operation after the other, in the order of sample.c, never contracted.
 *
 * A row belongs to a cluster of blocks (8, or 4 where there are many rows); block r has the ids of slice r, so that
 * blocks stand in id order. The row is read twice: for its best logit, then to gather the few ids near the top in
 * shared memory, where top_k, top_p and the draw are found. A row so flat that the list does not hold the answer is
 * walked as a whole instead, with the same code: the answer is the same. */
#include "backend/cuda/cu_sample_row.cuh"

/* ---- the order: logit descending, id ascending ----------------------------------------------------------------- */

/* An item's place in the order as one number, smaller is earlier: a coarse distance from the top that spreads well over
 * the bins of the first round, then the logit's bits, then the id. */
static __device__ __forceinline__ uint64_t place_of(const row *r, float l, int32_t id) {
    float far = fminf(__fmul_rn(__fsub_rn(r->s.top, l), r->spread), (float)(BINS - 1));
    return (uint64_t)__float2uint_rz(far) << (32 + ID_BITS) | (uint64_t)~ordered(l) << ID_BITS | (uint32_t)id;
}

/* Everything up to and including `place` is kept. */
typedef struct cut {
    uint64_t place, mass, count;
    bool in_list;
} cut;

/* In which bin the run ends: all blocks add up the bins of all and find the same. */
static __device__ __forceinline__ void find_bin(team *t, const cut *c, uint64_t need_count, uint64_t need_mass) {
    enum { PER = BINS / THREADS };
    share *sh = t->sh;
    const int32_t lane = t->tid % 32, warp = t->tid / 32;
    uint32_t count[PER], counts = 0;
    uint64_t mass[PER], masses = 0;
    for (int k = 0; k < PER; k += 2) { /* two bins a read */
        const int32_t bin = t->tid * PER + k;
        uint64_t n0 = 0, n1 = 0, m0 = 0, m1 = 0;
#pragma unroll 4
        for (int r = 0; r < t->size; r++) {
            const uint64_t n = remote64(&sh->count[bin], r), low = remote64(&sh->lo[bin], r),
                           high = remote64(&sh->hi[bin], r);
            n0 += n & 0xffffffffu, n1 += n >> 32;
            m0 += (low & 0xffffffffu) + (high << 32);
            m1 += (low >> 32) + (high >> 32 << 32);
        }
        count[k] = (uint32_t)n0, count[k + 1] = (uint32_t)n1;
        mass[k] = m0, mass[k + 1] = m1;
        counts += count[k] + count[k + 1], masses += m0 + m1;
    }
    uint32_t up_count = counts;
    uint64_t up_mass = masses;
    for (int d = 1; d < 32; d <<= 1) {
        uint32_t a = __shfl_up_sync(ALL_LANES, up_count, d);
        uint64_t b = __shfl_up_sync(ALL_LANES, up_mass, d);
        if (lane >= d) up_count += a, up_mass += b;
    }
    if (lane == 31) sh->scan_count[warp] = up_count, sh->scan_mass[warp] = up_mass;
    __syncthreads();
    uint64_t at_count = c->count + up_count - counts, at_mass = c->mass + up_mass - masses;
    for (int w = 0; w < warp; w++) at_count += sh->scan_count[w], at_mass += sh->scan_mass[w];
    for (int k = 0; k < PER; k++) {
        bool before = at_count >= need_count || at_mass >= need_mass;
        bool after = at_count + count[k] >= need_count || at_mass + mass[k] >= need_mass;
        const int32_t bin = t->tid * PER + k;
        if ((!before && after) || (!after && bin == BINS - 1)) {
            sh->found.bin = after ? bin : -1;
            sh->found.count = at_count, sh->found.mass = at_mass;
            sh->found.bin_count = count[k], sh->found.bin_mass = mass[k];
        }
        at_count += count[k], at_mass += mass[k];
    }
    __syncthreads();
}

/* find_cut of sample.c: the shortest run of the order with need_count items or need_mass, all if neither is reached.
 * Every round spreads the items that are still in question (equal to `prefix` above `bits`) over BINS bins of their
 * highest bits that differ. */
static __device__ __noinline__ cut find_cut(team *t, const row *r, bool in_list, uint64_t need_count,
                                            uint64_t need_mass) {
    share *sh = t->sh;
    const team u = *t;
    const row q = *r;
    view v = in_list ? view_list(t) : view_row(t, r);
    bool whole = !in_list;
    cut c = {0, 0, 0, in_list};
    uint64_t prefix = 0;
    int32_t bits = PLACE_BITS, shift = PLACE_BITS - BIN_BITS;
    if (need_count < 1) need_count = 1;
    if (need_mass < 1) need_mass = 1;
    for (;;) {
        cluster_sync(); /* nobody reads the bins any more */
        for (int b = t->tid; b < BINS; b += THREADS) sh->lo[b] = sh->hi[b] = sh->count[b] = 0;
        if (t->tid == 0) sh->n_short = 0;
        __syncthreads();
        FOR_ITEMS(&u, &v, base) {
            float l[BATCH];
            int32_t id[BATCH];
            items(&u, &v, base, l, id);
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                uint64_t place = place_of(&q, l[j], id[j]);
                if (id[j] < 0 || (place ^ prefix) >> bits) continue;
                uint32_t bin = (uint32_t)(place >> shift) & (BINS - 1);
                uint64_t mass = mass_of(l[j], &q.s);
                uint32_t high = (uint32_t)(mass >> 32), low = (uint32_t)mass;
                atomicAdd(&sh->count[bin], 1u);
                if (mass) {
                    uint32_t old = atomicAdd(&sh->lo[bin], low);
                    high += old + low < old;
                }
                if (high) atomicAdd(&sh->hi[bin], high);
            }
        }
        cluster_sync();
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
        if (n == 1 || (c.count + n == need_count && c.mass + mass < need_mass)) {
            c.count += n, c.mass += mass;
            c.place = prefix | ((1ull << bits) - 1);
            return c;
        }
        const bool move = whole && n <= SHORT;
        uint64_t ends[2] = {0, 0}; /* the last place, and the first, inverted */
        FOR_ITEMS(&u, &v, base) {
            float l[BATCH];
            int32_t id[BATCH];
            items(&u, &v, base, l, id);
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                uint64_t place = place_of(&q, l[j], id[j]);
                if (id[j] < 0 || (place ^ prefix) >> bits) continue;
                if (place > ends[0]) ends[0] = place;
                if (~place > ends[1]) ends[1] = ~place;
                if (move) {
                    uint32_t at = atomicAdd(&sh->n_short, 1u);
                    sh->short_l[at] = l[j];
                    sh->short_id[at] = id[j];
                }
            }
        }
        team_reduce<2, false>(t, ends, NULL, NULL);
        if (move) {
            v.l = sh->short_l, v.id = sh->short_id, v.n = (int32_t)sh->n_short;
            whole = false;
        }
        const int32_t highest = 63 - __clzll((long long)(ends[0] ^ ~ends[1])); /* n >= 2: they differ */
        shift = highest >= BIN_BITS ? highest - BIN_BITS + 1 : 0;
        bits = shift + BIN_BITS < bits ? shift + BIN_BITS : bits;
        prefix = ends[0] >> bits << bits;
    }
}

/* ---- the draw -------------------------------------------------------------------------------------------------- */

/* Whether a run of the order may be looked for in the list: it ends there. */
static __device__ __forceinline__ bool list_holds(const row *r, uint64_t need_count, uint64_t need_mass) {
    return r->list_good && (r->list_count >= need_count || (r->have_mass && r->list_mass >= need_mass));
}

static __device__ __forceinline__ uint64_t kept_mass(const row *r, const cut *c, float l, int32_t id) {
    return place_of(r, l, id) <= c->place ? mass_of(l, &r->s) : 0;
}

/* The first kept id, in id order, whose running mass exceeds target: first the block, then a bucket of 64 ids of it,
 * then the id. */
static __device__ __noinline__ int32_t walk_to(team *t, const row *r, const cut *c, uint64_t target) {
    share *sh = t->sh;
    const team u = *t;
    const row q = *r;
    const cut kept = *c;
    view v = c->in_list ? view_list(t) : view_row(t, r);
    uint64_t mine = r->block_mass, before = r->mass_before;
    const int32_t lane = u.tid % 32, warp = u.tid / 32;
    if (c->place != ~0ull || !r->have_mass) {
        uint64_t sum = 0;
        FOR_ITEMS(&u, &v, base) {
            float l[BATCH];
            int32_t id[BATCH];
            items(&u, &v, base, l, id);
#pragma unroll
            for (int j = 0; j < BATCH; j++)
                if (id[j] >= 0) sum += kept_mass(&q, &kept, l[j], id[j]);
        }
        team_reduce<1, true>(t, &sum, &mine, &before);
    } else {
        cluster_sync(); /* nobody reads the bins any more */
    }
    const bool owns = target >= before && target - before < mine;
    if (owns) {
        uint64_t rest = target - before;
        for (int b = u.tid; b < BINS; b += THREADS) sh->lo[b] = sh->hi[b] = 0;
        for (int b = u.tid; b < 1 << BUCKET_BITS; b += THREADS) sh->dense[b] = 0;
        __syncthreads();
        if (v.id) {
            for (int32_t i = u.tid; i < v.n; i += THREADS) {
                uint64_t m = kept_mass(&q, &kept, v.l[i], v.id[i]);
                int32_t b = (v.id[i] - u.lo) >> BUCKET_BITS;
                uint32_t low = (uint32_t)m, high = (uint32_t)(m >> 32);
                if (!m) continue;
                uint32_t old = atomicAdd(&sh->lo[b], low);
                high += old + low < old;
                if (high) atomicAdd(&sh->hi[b], high);
            }
        } else {
            const int32_t n_bucket = (v.n + (1 << BUCKET_BITS) - 1) >> BUCKET_BITS;
            for (int32_t b = warp; b < n_bucket; b += 2 * WARPS) { /* two at a time: four loads in flight */
                float l[4];
                int32_t at[4];
                uint64_t m[2] = {0, 0};
                for (int k = 0; k < 4; k++) {
                    at[k] = ((b + (k / 2) * WARPS) << BUCKET_BITS) + k % 2 * 32 + lane;
                    l[k] = at[k] < v.n ? __ldcg(v.l + at[k]) : minus_inf();
                }
                for (int k = 0; k < 4; k++)
                    if (at[k] < v.n) m[k / 2] += kept_mass(&q, &kept, l[k], u.lo + at[k]);
                for (int h = 0; h < 2; h++) {
                    for (int d = 16; d > 0; d >>= 1) m[h] += __shfl_xor_sync(ALL_LANES, m[h], d);
                    int32_t bucket = b + h * WARPS;
                    if (lane == 0 && bucket < n_bucket)
                        sh->lo[bucket] = (uint32_t)m[h], sh->hi[bucket] = (uint32_t)(m[h] >> 32);
                }
            }
        }
        __syncthreads();
        { /* scan of the buckets */
            enum { PER = BINS / THREADS };
            uint64_t m[PER], sum = 0;
            for (int k = 0; k < PER; k++) {
                m[k] = sh->lo[u.tid * PER + k] | (uint64_t)sh->hi[u.tid * PER + k] << 32;
                sum += m[k];
            }
            uint64_t up = sum;
            for (int d = 1; d < 32; d <<= 1) {
                uint64_t b = __shfl_up_sync(ALL_LANES, up, d);
                if (lane >= d) up += b;
            }
            if (lane == 31) sh->scan_mass[warp] = up;
            __syncthreads();
            uint64_t at = up - sum;
            for (int w = 0; w < warp; w++) at += sh->scan_mass[w];
            for (int k = 0; k < PER; k++) {
                if (rest >= at && rest - at < m[k]) sh->found.bin = u.tid * PER + k, sh->found.mass = at;
                at += m[k];
            }
            __syncthreads();
        }
        const int32_t first = u.lo + (sh->found.bin << BUCKET_BITS);
        rest -= sh->found.mass;
        if (v.id) {
            for (int32_t i = u.tid; i < v.n; i += THREADS)
                if ((v.id[i] - u.lo) >> BUCKET_BITS == sh->found.bin)
                    sh->dense[v.id[i] - first] = kept_mass(&q, &kept, v.l[i], v.id[i]);
        } else if (u.tid < 1 << BUCKET_BITS && first + u.tid < u.hi) {
            sh->dense[u.tid] = kept_mass(&q, &kept, __ldcg(q.l + first + u.tid), first + u.tid);
        }
        __syncthreads();
        if (warp == 0) {
            uint64_t a = sh->dense[2 * lane], b = sh->dense[2 * lane + 1], up = a + b;
            for (int d = 1; d < 32; d <<= 1) {
                uint64_t o = __shfl_up_sync(ALL_LANES, up, d);
                if (lane >= d) up += o;
            }
            uint64_t at = up - a - b;
            if (rest >= at && rest - at < a + b) sh->token = first + 2 * lane + (rest - at >= a);
        }
        __syncthreads();
    }
    uint64_t token = owns ? (uint64_t)sh->token : 0;
    team_reduce<1, false>(t, &token, NULL, NULL);
    return (int32_t)token;
}

/* Steps 8 to 11 of docs/model.md 7. r has its list, and its mass unless top_k is on. */
static __device__ __forceinline__ int32_t draw(team *t, const row *r, const ern_sample *s) {
    uint64_t mass = r->mass, V = (uint64_t)t->V;
    cut c = {~0ull, mass, V, false};
    const bool k_on = s->top_k > 0 && s->top_k < t->V;
    if (s->min_p >= MIN_P_ON || k_on) {
        uint64_t limit = V;
        if (s->min_p >= MIN_P_ON) {
            float least = (float)sample_log((double)s->min_p);
            bool in_list = r->list_good && __fdiv_rn(__fsub_rn(r->pivot, r->s.top), r->s.T) < least;
            view v = in_list ? view_list(t) : view_row(t, r);
            uint64_t n = 0;
            FOR_ITEMS(t, &v, base) {
                float l[BATCH];
                int32_t id[BATCH];
                items(t, &v, base, l, id);
#pragma unroll
                for (int j = 0; j < BATCH; j++)
                    n += id[j] >= 0 && __fdiv_rn(__fsub_rn(l[j], r->s.top), r->s.T) >= least;
            }
            limit = team_sum(t, n);
        }
        if (k_on && (uint64_t)s->top_k < limit) limit = (uint64_t)s->top_k;
        c = find_cut(t, r, list_holds(r, limit, ~0ull), limit, ~0ull);
        if (k_on) mass = c.mass;
    }
    if (s->top_p < 1.0f) {
        uint64_t need = share_of(mass, s->top_p);
        /* a run that ends before one in the list ends there too */
        if (need < c.mass) c = find_cut(t, r, c.in_list || list_holds(r, c.count, need), c.count, need);
    }
    uint64_t key = counter64(s->seed, (uint64_t)(uint32_t)s->choice);
    uint64_t u = counter64(key, (uint64_t)(uint32_t)s->position) >> (64 - UNIFORM_BITS);
    uint64_t target = u * c.mass >> UNIFORM_BITS | __umul64hi(u, c.mass) << (64 - UNIFORM_BITS);
    return walk_to(t, r, &c, target);
}

/* ---- changing the logits --------------------------------------------------------------------------------------- */

typedef struct sample_args {
    ern_sampled *out;
    int32_t *ids;
    float *logits;
    int32_t n_want, V;
    const cu_rule *rules;
    const int32_t *aux, *token;
    unsigned char *scratch; /* a row's copy and count, for every cluster */
} sample_args;

/* One id as step 2 (the mask) leaves it; once more changes nothing. */
static __device__ __forceinline__ float masked(const float *l, const uint32_t *mask, int32_t id) {
    float v = __ldcg(l + id);
    return mask && !(mask[id / 32] >> (id % 32) & 1) ? forbidden(v) : v;
}

/* Steps 3 to 6 touch few ids, so they come before the row is looked at; each masks its ids first. count: [V]. */
static __device__ __noinline__ void edit(team *t, const sample_args *a, const cu_rule *rule, float *l,
                                         const uint32_t *mask, uint32_t *count) {
    const ern_sample *s = &rule->s;
    const int32_t step = t->size * THREADS, me = t->rank * THREADS + t->tid;
    if (s->n_bias > 0) {
        /* an id may be listed twice: its first entry adds for all of them, in list order */
        const int32_t *bias = a->aux + rule->bias, n = s->n_bias;
        for (int32_t i = me; i < n; i += step) __stcg(count + bias[2 * i], COUNT_DONE - 1);
        cluster_sync();
        for (int32_t i = me; i < n; i += step) atomicMin(count + bias[2 * i], (uint32_t)i);
        cluster_sync();
        for (int32_t i = me; i < n; i += step)
            if ((__ldcg(count + bias[2 * i]) & ~COUNT_DONE) != (uint32_t)i)
                atomicOr(count + bias[2 * i], COUNT_DONE); /* not alone */
        cluster_sync();
        for (int32_t i = me; i < n; i += step) {
            const int32_t id = bias[2 * i];
            const uint32_t first = __ldcg(count + id);
            if ((first & ~COUNT_DONE) != (uint32_t)i) continue;
            float v = __fadd_rn(masked(l, mask, id), __int_as_float(bias[2 * i + 1]));
            for (int32_t k = i + 1; first & COUNT_DONE && k < n; k++)
                if (bias[2 * k] == id) v = __fadd_rn(v, __int_as_float(bias[2 * k + 1]));
            __stcg(l + id, v);
        }
        cluster_sync();
    }
    if (s->repetition != 1.0f || s->frequency != 0.0f || s->presence != 0.0f) {
        const int32_t n_own = rule->row + 1 - rule->row0;
        int32_t n_tail = rule->pos + 1 - s->n_seen;
        n_tail = n_tail < 0 ? 0 : n_tail > n_own ? n_own : n_tail;
        const int32_t *seen = a->aux + rule->seen, *tail = a->token + rule->row + 1 - n_tail;
        const int32_t n_seen = s->n_seen, n = n_seen + n_tail;
        for (int32_t i = me; i < n; i += step) __stcg(count + (i < n_seen ? seen[i] : tail[i - n_seen]), 0u);
        cluster_sync();
        for (int32_t i = me; i < n; i += step)
            if (i >= s->n_prompt) atomicAdd(count + (i < n_seen ? seen[i] : tail[i - n_seen]), 1u);
        cluster_sync();
        for (int32_t i = me; i < n; i += step) {
            const int32_t id = i < n_seen ? seen[i] : tail[i - n_seen];
            const uint32_t c = atomicOr(count + id, COUNT_DONE);
            if (c & COUNT_DONE) continue;
            float v = masked(l, mask, id);
            v = v < 0.0f ? __fmul_rn(v, s->repetition) : __fdiv_rn(v, s->repetition);
            if (c) v = __fsub_rn(__fsub_rn(v, __fmul_rn(__uint2float_rn(c), s->frequency)), s->presence);
            __stcg(l + id, v);
        }
        cluster_sync();
    }
    if (s->n_ban > 0) {
        for (int32_t i = me; i < s->n_ban; i += step) {
            const int32_t id = a->aux[rule->ban + i];
            __stcg(l + id, forbidden(__ldcg(l + id)));
        }
        cluster_sync();
    }
}

/* ---- logprobs -------------------------------------------------------------------------------------------------- */

/* Logprob, rank and top list of r into the first block's sh->out, by all. plain: logits, not logprobs. */
static __device__ __noinline__ void fill_logprobs(team *t, const row *r, const ern_sample *s, int32_t token,
                                                  bool plain) {
    share *sh = t->sh;
    ern_sampled *out = (ern_sampled *)sh->out;
    const float chosen = __ldcg(r->l + token);
    const uint64_t chosen_place = place_of(r, chosen, token);
    uint64_t better = 0;
    { /* rank: how many stand before it */
        const bool in_list = r->list_good && chosen >= r->pivot && chosen > minus_inf();
        view v = in_list ? view_list(t) : view_row(t, r);
        FOR_ITEMS(t, &v, base) {
            float l[BATCH];
            int32_t id[BATCH];
            items(t, &v, base, l, id);
#pragma unroll
            for (int j = 0; j < BATCH; j++) better += id[j] >= 0 && place_of(r, l[j], id[j]) < chosen_place;
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
        view v = in_list ? view_list(t) : view_row(t, r);
        FOR_ITEMS(t, &v, base) {
            float l[BATCH];
            int32_t id[BATCH];
            items(t, &v, base, l, id);
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const uint64_t place = place_of(r, l[j], id[j]);
                if (id[j] < 0 || !(l[j] > minus_inf()) || place > best.place) continue;
                const uint32_t at = atomicAdd(&sh->n_best, 1u);
                if (at >= ERN_TOP_MAX) continue; /* cannot be: the run has n_top items */
                sh->place[at] = place;
                sh->best_l[at] = l[j];
            }
        }
    }
    cluster_sync();
    if (t->rank == 0 && t->tid < 32) { /* lane i: entry i of all blocks' one after the other; lane n_top: the token */
        uint64_t place = ~0ull;
        float l = chosen;
        uint32_t n = 0;
        for (int b = 0; b < t->size; b++) {
            const uint32_t have = remote32(&sh->n_best, b);
            if ((uint32_t)t->tid >= n && (uint32_t)t->tid < n + have) {
                place = remote64(&sh->place[t->tid - n], b);
                l = __uint_as_float(remote32(&sh->best_l[t->tid - n], b));
            }
            n += have;
        }
        int32_t at = 0;
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

static __device__ __forceinline__ void team_make(team *t, share *sh, int32_t V) {
    t->sh = sh;
    t->tid = (int32_t)threadIdx.x;
    t->rank = cluster_rank();
    t->size = cluster_size();
    t->V = V;
    const int32_t slice = ((V + t->size - 1) / t->size + 3) / 4 * 4;
    t->lo = t->rank * slice < V ? t->rank * slice : V;
    t->hi = V - t->lo < slice ? V : t->lo + slice;
    t->turn = 0;
    t->vec = V % 4 == 0;
}

/* The whole rule; false: the row is bad. */
static __device__ __forceinline__ bool sample_row(team *t, const sample_args *a, const cu_rule *rule, float *l,
                                                  float *copy, int32_t *token) {
    const ern_sample *s = &rule->s;
    const uint32_t *mask = rule->mask >= 0 ? (const uint32_t *)a->aux + rule->mask : NULL;
    const bool raw = s->n_top >= 0 && (s->mode == ERN_LOGPROBS_RAW || s->mode == ERN_LOGPROBS_RAW_LOGITS);
    const bool plain = s->mode == ERN_LOGPROBS_RAW_LOGITS || s->mode == ERN_LOGPROBS_PROCESSED_LOGITS;
    const bool greedy = !(s->temperature >= GREEDY_BELOW) || s->top_p < GREEDY_BELOW || s->top_k == 1;
    const bool edits =
        s->n_bias > 0 || s->n_ban > 0 || s->repetition != 1.0f || s->frequency != 0.0f || s->presence != 0.0f;
    if (edits) {
        if (raw) {
            for (int32_t i = t->lo + t->tid; i < t->hi; i += THREADS) __stcg(copy + i, masked(l, mask, i));
            cluster_sync();
        }
        edit(t, a, rule, l, mask, (uint32_t *)(copy + t->V));
    }
    survey best = mask ? survey_row<true>(t, l, mask) : survey_row<false>(t, l, NULL);
    if (is_bad(&best)) return false;
    const bool draws = s->forced < 0 && !greedy;
    *token = s->forced >= 0 ? s->forced : best.id;
    if (!draws && s->n_top < 0) return true;

    const float T = greedy ? 1.0f : s->temperature;
    float logprob_T = raw && (plain || !s->logprob_scaled) ? 1.0f : T;
    const bool other_row = raw && edits;
    const bool again = other_row || logprob_T != T || plain; /* logprobs need more than the draw's pass */
    row r = row_make(l, &best, T);
    if (draws) {
        const bool k_on = s->top_k > 0 && s->top_k < t->V;
        if (!k_on || (s->n_top >= 0 && !again))
            gather<true>(t, &r);
        else
            gather<false>(t, &r);
        *token = draw(t, &r, s);
    }
    if (s->n_top < 0) return true;
    if (other_row) {
        survey other = survey_row<false>(t, copy, NULL); /* what spoils this row spoils the other: it is good */
        r = row_make(copy, &other, logprob_T);
    } else if (logprob_T != T) {
        r = row_make(l, &best, logprob_T);
    }
    if (plain && !r.listed)
        gather<false>(t, &r);
    else if (!plain && !(r.listed && r.have_mass))
        gather<true>(t, &r);
    fill_logprobs(t, &r, s, *token, plain);
    return true;
}

static __device__ __forceinline__ void sample_rows(share *sh, const sample_args *a) {
    team t;
    team_make(&t, sh, a->V);
    const int32_t cluster = (int32_t)blockIdx.x / t.size, n_cluster = (int32_t)gridDim.x / t.size;
    float *copy = (float *)(a->scratch + (int64_t)cluster * 8 * ((a->V + 3) / 4 * 4));
    for (int32_t w = cluster; w < a->n_want; w += n_cluster) {
        float *l = a->logits + (int64_t)w * a->V;
        int32_t token = 0;
        cluster_sync(); /* copy and count are free, sh->out is written out */
        for (int i = t.tid; i < OUT_WORDS; i += THREADS) sh->out[i] = 0;
        __syncthreads();
        const bool good = sample_row(&t, a, a->rules + w, l, copy, &token);
        __syncthreads();
        if (t.rank == 0 && t.tid == 0) {
            ern_sampled *out = (ern_sampled *)sh->out;
            out->token = token;
            out->bad = !good;
            a->ids[w] = token;
        }
        __syncthreads();
        if (t.rank == 0)
            for (int i = t.tid; i < OUT_WORDS; i += THREADS) ((uint32_t *)(a->out + w))[i] = sh->out[i];
    }
    cluster_sync(); /* nobody leaves while its memory is read */
}

/* Arg-max alone: one pass. out NULL: the ids only. */
static __device__ __forceinline__ void greedy_row(share *sh, ern_sampled *out, int32_t *ids, const float *logits,
                                                  int32_t V) {
    team t;
    team_make(&t, sh, V);
    const int32_t w = (int32_t)blockIdx.x / t.size;
    const survey best = survey_row<false>(&t, (float *)logits + (int64_t)w * V, NULL);
    const int32_t id = is_bad(&best) ? 0 : best.id;
    if (t.rank == 0) {
        if (t.tid == 0) ids[w] = id;
        for (int i = t.tid; out && i < OUT_WORDS; i += THREADS) /* token, bad, zeros */
            ((uint32_t *)(out + w))[i] = i == 0 ? (uint32_t)id : i == 1 ? (uint32_t)is_bad(&best) : 0u;
    }
    cluster_sync();
}

/* ---- host ------------------------------------------------------------------------------------------------------ */

static __global__ void __launch_bounds__(THREADS, 2) sample_kernel(const __grid_constant__ sample_args a) {
    __shared__ share sh;
    sample_rows(&sh, &a);
}

/* Only what survey_row needs lies in shared memory: small, so that it is cheap to have many blocks. */
static __global__ void __launch_bounds__(THREADS, 2)
    greedy_kernel(ern_sampled *out, int32_t *ids, const float *logits, int32_t V) {
    __shared__ uint64_t sums[offsetof(share, scan_mass) / 8];
    greedy_row((share *)sums, out, ids, logits, V);
}

static cudaLaunchConfig_t clusters(cudaStream_t s, cudaLaunchAttribute *attr, int32_t n_cluster, int32_t size) {
    cudaLaunchConfig_t c = {};
    c.gridDim = dim3((unsigned)(n_cluster * size));
    c.blockDim = dim3(THREADS);
    c.stream = s;
    attr->id = cudaLaunchAttributeClusterDimension;
    attr->val.clusterDim.x = (unsigned)size;
    attr->val.clusterDim.y = attr->val.clusterDim.z = 1;
    c.attrs = attr;
    c.numAttrs = 1;
    return c;
}

static cudaError_t run_greedy(cudaStream_t s, ern_sampled *out, int32_t *ids, const float *logits, int32_t n,
                              int32_t V) {
    if (n < 1) return cudaSuccess;
    cudaLaunchAttribute attr;
    cudaLaunchConfig_t c = clusters(s, &attr, n, n <= ROWS_FEW ? 8 : n <= ROWS_MANY ? 4 : 2);
    cudaError_t e = cudaLaunchKernelEx(&c, greedy_kernel, out, ids, logits, V);
    return e ? e : cudaGetLastError();
}

static int32_t n_clusters(int32_t n_want) { return n_want < ROWS_MANY ? n_want : ROWS_MANY; }

extern "C" int64_t cu_sample_scratch_bytes(int32_t n_want, int32_t n_vocab) {
    return (int64_t)n_clusters(n_want) * 8 * (((int64_t)n_vocab + 3) / 4 * 4);
}

extern "C" cudaError_t cu_sample(cudaStream_t s, ern_sampled *out, int32_t *ids, float *logits, int32_t n_want,
                                 int32_t n_vocab, const cu_rule *rules, const int32_t *aux, const int32_t *token,
                                 bool all_greedy, void *scratch) {
    if (all_greedy) return run_greedy(s, out, ids, logits, n_want, n_vocab);
    if (n_want < 1) return cudaSuccess;
    sample_args a = {out, ids, logits, n_want, n_vocab, rules, aux, token, (unsigned char *)scratch};
    cudaLaunchAttribute attr;
    cudaLaunchConfig_t c = clusters(s, &attr, n_clusters(n_want), n_want <= ROWS_FEW ? 8 : 4);
    cudaError_t e = cudaLaunchKernelEx(&c, sample_kernel, a);
    return e ? e : cudaGetLastError();
}

extern "C" cudaError_t cu_argmax(cudaStream_t s, int32_t *ids, const float *logits, int32_t n_row, int32_t n_vocab,
                                 void *scratch) {
    (void)scratch;
    return run_greedy(s, NULL, ids, logits, n_row, n_vocab);
}
