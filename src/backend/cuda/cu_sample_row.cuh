/* One row of logits and the cluster of blocks that samples it: sums over the cluster, the numbers of model/sample.c
 * with its bits, and the two passes over a row (the best logit; the list of ids near the top, and the mass). Device
 * code of cu_sample.cu, which says how it all fits together. */
#ifndef ERN_BACKEND_CUDA_CU_SAMPLE_ROW_CUH
#define ERN_BACKEND_CUDA_CU_SAMPLE_ROW_CUH

#include <stddef.h>

#include "backend/cuda/cu_kernels.h"

enum {
    THREADS = 512,
    WARPS = THREADS / 32,
    BATCH = 4, /* loads in flight of a thread */
    BIN_BITS = 10,
    BINS = 1 << BIN_BITS, /* of a round of find_cut; also buckets of the draw */
    LIST = 2048,          /* ids near the top that a block can hold */
    SHORT = 1024,         /* candidates of the later rounds of find_cut, where the first walked the whole row */
    BUCKET_BITS = 6,      /* the draw: buckets of 64 ids; BINS of them cover a quarter of ERN_VOCAB_MAX */
    ID_BITS = 18,         /* ERN_VOCAB_MAX */
    PLACE_BITS = BIN_BITS + 32 + ID_BITS,
    OUT_WORDS = sizeof(ern_sampled) / 4,
    UNIFORM_BITS = 24,
    MASS_BITS = 44,
    ROWS_MANY = 66,  /* clusters of 4 that an H100 holds at once: a cluster takes row after row */
    ROWS_FEW = 33,   /* clusters of 8 */
    PIVOT_RANK = 24, /* of 32 threads' best logits */
};
#define GREEDY_BELOW 1e-5f
#define MIN_P_ON 0x1p-60f
#define COUNT_DONE 0x80000000u
#define ALL_LANES 0xffffffffu
#define KEY_BAD 0xff800000u  /* ordered bits of +inf: this or more is bad (NaN is taken as all ones) */
#define KEY_NONE 0x007fffffu /* of -inf: nothing was left */
static_assert(sizeof(ern_sampled) % 4 == 0 && (BINS << BUCKET_BITS) * 4 == ERN_VOCAB_MAX, "sizes of this file");
static_assert(1 << ID_BITS == ERN_VOCAB_MAX && BINS % (2 * THREADS) == 0 && ERN_TOP_MAX <= 31, "sizes of this file");

/* What a block shares, also with the other blocks of its cluster. */
typedef struct share {
    uint64_t warp[3][WARPS], slot[2][3];
    uint64_t scan_mass[WARPS], place[ERN_TOP_MAX], dense[1 << BUCKET_BITS];
    struct {
        uint64_t count, mass, bin_count, bin_mass; /* before the bin, of the bin */
        int32_t bin;
    } found;
    /* 64-bit masses in halves: 32-bit atomics are the fast ones */
    alignas(8) uint32_t lo[BINS], hi[BINS], count[BINS];
    uint32_t scan_count[WARPS], out[OUT_WORDS];
    float list_l[LIST], short_l[SHORT], best_l[ERN_TOP_MAX];
    int32_t list_id[LIST], short_id[SHORT];
    uint32_t n_list, n_short, n_best;
    int32_t token;
} share;

typedef struct team {
    share *sh;
    int32_t tid, rank, size; /* thread of the block, block of the cluster */
    int32_t V, lo, hi;       /* ids lo..hi-1 are this block's */
    int32_t turn;            /* which of the two slots is next */
    bool vec;                /* rows start at multiples of 16 bytes */
} team;

/* ---- cluster --------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ int32_t cluster_rank(void) {
    uint32_t r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return (int32_t)r;
}
static __device__ __forceinline__ int32_t cluster_size(void) {
    uint32_t n;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
    return (int32_t)n;
}
/* Every thread of every block; what was written before, in shared or global memory, is seen after. */
static __device__ __forceinline__ void cluster_sync(void) {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}
/* The number at `mine`, an address in shared memory, as block `rank` has it. */
static __device__ __forceinline__ uint64_t remote64(const void *mine, int32_t rank) {
    uint32_t at;
    uint64_t value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(at)
                 : "r"((uint32_t)__cvta_generic_to_shared(mine)), "r"(rank));
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(at) : "memory");
    return value;
}
static __device__ __forceinline__ uint32_t remote32(const void *mine, int32_t rank) {
    uint32_t at, value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(at)
                 : "r"((uint32_t)__cvta_generic_to_shared(mine)), "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
    return value;
}

/* ---- numbers --------------------------------------------------------------------------------------------------- */

/* Sums or maxima of N numbers over all threads of the cluster; all threads have them. A sum also tells, of its first
 * number, that of this block and that of the blocks before it. The two slots take turns: between writing one and
 * writing it again lies a barrier that nobody passes who still reads. */
template <int N, bool SUM>
static __device__ __forceinline__ void team_reduce(team *t, uint64_t *v, uint64_t *mine, uint64_t *before) {
    share *sh = t->sh;
    for (int k = 0; k < N; k++) {
        uint64_t x = v[k];
        for (int d = 16; d > 0; d >>= 1) {
            uint64_t y = __shfl_xor_sync(ALL_LANES, x, d);
            x = SUM ? x + y : x > y ? x : y;
        }
        if (t->tid % 32 == 0) sh->warp[k][t->tid / 32] = x;
    }
    __syncthreads();
    uint64_t *slot = sh->slot[t->turn];
    t->turn ^= 1;
    if (t->tid < N) {
        uint64_t x = sh->warp[t->tid][0];
        for (int w = 1; w < WARPS; w++) {
            uint64_t y = sh->warp[t->tid][w];
            x = SUM ? x + y : x > y ? x : y;
        }
        slot[t->tid] = x;
    }
    cluster_sync();
    for (int k = 0; k < N; k++) {
        uint64_t x = 0;
#pragma unroll 4
        for (int r = 0; r < t->size; r++) {
            uint64_t y = remote64(&slot[k], r);
            if (SUM && k == 0 && mine) {
                if (r == t->rank) *before = x, *mine = y;
            }
            x = SUM ? x + y : x > y ? x : y;
        }
        v[k] = x;
    }
}
static __device__ __forceinline__ uint64_t team_sum(team *t, uint64_t x) {
    team_reduce<1, true>(t, &x, NULL, NULL);
    return x;
}

static __device__ __forceinline__ uint32_t ordered(float f) {
    uint32_t u = __float_as_uint(__fadd_rn(f, 0.0f));
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}
static __device__ __forceinline__ float minus_inf(void) { return __uint_as_float(0xff800000u); }
static __device__ __forceinline__ float plus_inf(void) { return __uint_as_float(0x7f800000u); }
static __device__ __forceinline__ float forbidden(float l) { return l < plus_inf() ? minus_inf() : l; }

/* sample_log of sample.c. */
static __device__ double sample_log(double x) {
    uint64_t bits = (uint64_t)__double_as_longlong(x);
    int e = (int)(bits >> 52) - 1023;
    double m = __longlong_as_double((long long)((bits & 0xfffffffffffffull) | 0x3ff0000000000000ull));
    if (m > 1.4142135623730951) {
        m = __dmul_rn(m, 0.5);
        e++;
    }
    double s = __ddiv_rn(__dsub_rn(m, 1.0), __dadd_rn(m, 1.0)), s2 = __dmul_rn(s, s), sum = 0.0;
    for (int k = 15; k >= 1; k -= 2) sum = __dadd_rn(__dmul_rn(sum, s2), __ddiv_rn(1.0, (double)k));
    return __dadd_rn(__dmul_rn(__dmul_rn(2.0, s), sum), __dmul_rn((double)e, 0.6931471805599453));
}

/* What turns a logit into its mass. */
typedef struct scale {
    float top, T, inverse, least; /* inverse = 1 / T, rounded */
    bool quick;                   /* T is neither tiny nor huge: the quotient may be had by two Newton steps */
} scale;

static __device__ __forceinline__ scale scale_make(float top, float T) {
    scale s = {top, T, __fdiv_rn(1.0f, T), __fmul_rn(-48.0f, T), T >= 1e-5f && T <= 1e5f};
    return s;
}

/* floor(exp((l - top) / T) * 2^44), with the bits of sample.c. The quotient: two Newton steps from x * (1 / T) give the
 * rounded one (Markstein) as long as nothing on the way is subnormal; a smaller |x / T| has weight 1 whatever its last
 * bits are, and what is below -48 counts as -48, which is cut at -40 like all below. sample.c's n * 0.693359375 is
 * exact, so that fma is the same there; p * 2^n adds n to the exponent; the product with 2^44 is a shift. */
template <bool QUICK> static __device__ __forceinline__ uint64_t mass_by(float l, const scale *s) {
    float x = __fsub_rn(l, s->top), z;
    if (QUICK) {
        x = fmaxf(x, s->least);
        z = __fmul_rn(x, s->inverse);
        z = __fmaf_rn(__fmaf_rn(-s->T, z, x), s->inverse, z);
        z = __fmaf_rn(__fmaf_rn(-s->T, z, x), s->inverse, z);
    } else {
        z = __fdiv_rn(x, s->T);
    }
    z = z < -40.0f ? -40.0f : z;
    float t = __fadd_rn(__fmul_rn(z, 1.44269504f), 12582912.0f), n = __fsub_rn(t, 12582912.0f);
    float r = __fsub_rn(__fmaf_rn(-n, 0.693359375f, z), __fmul_rn(n, -2.12194440e-4f));
    float p = 1.98412698e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.38888889e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.33333333e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.16666667e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.66666667e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f);
    uint32_t bits = __float_as_uint(p) + (__float_as_uint(t) << 23);
    uint64_t mass = (uint64_t)((bits & 0x7fffffu) | 0x800000u) << (MASS_BITS - 23);
    return mass >> (127 - (bits >> 23)); /* the weight is 2^-58 .. 1 */
}
static __device__ __forceinline__ uint64_t mass_of(float l, const scale *s) {
    return s->quick ? mass_by<true>(l, s) : mass_by<false>(l, s);
}

/* ern_counter64 of base/counter.h. */
static __device__ __forceinline__ uint64_t counter64(uint64_t key, uint64_t index) {
    uint64_t z = key + (index + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* top_p of a mass, rounded up. */
static __device__ __forceinline__ uint64_t share_of(uint64_t mass, float top_p) {
    double need = __dmul_rn((double)top_p, __ull2double_rn(mass));
    uint64_t whole = __double2ull_rz(need);
    whole += __ull2double_rn(whole) < need;
    return whole < 1 ? 1 : whole > mass ? mass : whole;
}

/* ---- reading a slice ------------------------------------------------------------------------------------------- */

/* BATCH times four logits, the first at i; -inf past the slice. From L2: other blocks may have changed them. Whole
 * fours are loaded without a branch, so that all loads are under way before the first is waited for. */
static __device__ __forceinline__ void load_batch(const team *t, const float *l, int32_t i, float v[BATCH][4]) {
    if (t->vec) { /* slices are whole fours, the last of them is there to be read in place of what is past the end */
        float4 f[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            const int32_t at = i + j * THREADS * 4;
            f[j] = __ldcg((const float4 *)(l + (at < t->hi ? at : t->hi - 4)));
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            const bool in = i + j * THREADS * 4 < t->hi;
            v[j][0] = in ? f[j].x : minus_inf();
            v[j][1] = in ? f[j].y : minus_inf();
            v[j][2] = in ? f[j].z : minus_inf();
            v[j][3] = in ? f[j].w : minus_inf();
        }
    } else {
#pragma unroll
        for (int k = 0; k < BATCH * 4; k++) {
            const int32_t at = i + k / 4 * THREADS * 4 + k % 4;
            v[k / 4][k % 4] = at < t->hi ? __ldcg(l + at) : minus_inf();
        }
    }
}
#define FOR_BATCHES(t, i) for (int32_t i = (t)->lo + (t)->tid * 4; i - (t)->tid * 4 < (t)->hi; i += BATCH * THREADS * 4)

/* Bits 0..3: which of ids i .. i+3 the mask allows. i is a multiple of 4. */
static __device__ __forceinline__ uint32_t allowed4(const uint32_t *mask, int32_t i, int32_t hi) {
    return i < hi ? mask[i / 32] >> (i % 32) & 15u : 15u;
}

/* What a pass over the row found. */
typedef struct survey {
    uint32_t key; /* ordered bits of the best logit; KEY_BAD and above, KEY_NONE and below: the row is bad */
    int32_t id;   /* the best, ties to the lowest */
    float top;
    float pivot; /* about a thread's share of logits are not below it; -inf: the row is small enough for the list */
} survey;

/* First pass: the best logit. MASK: forbid on the way. */
template <bool MASK> static __device__ __noinline__ survey survey_row(team *t, float *l, const uint32_t *mask) {
    const team u = *t; /* in registers: stores could change *t, for all that the compiler knows */
    float best = minus_inf();
    int32_t id = -1;
    bool bad = false;
    FOR_BATCHES(&u, base) {
        float v[BATCH][4];
        load_batch(&u, l, base, v);
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            int32_t i = base + j * THREADS * 4;
            uint32_t on = MASK ? allowed4(mask, i, u.hi) : 15u;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (MASK && !(on >> k & 1) && i + k < u.hi) {
                    v[j][k] = forbidden(v[j][k]);
                    l[i + k] = v[j][k];
                }
                bad |= !(v[j][k] < plus_inf());
                if (v[j][k] > best) best = v[j][k], id = i + k;
            }
        }
    }
    /* the PIVOT_RANK-th largest of each warp's bests, then the largest of these: most rows have a list of one or two
     * thousand ids then. It is only a guess: no result depends on it. */
    int32_t larger = 0;
    for (int j = 0; j < 32; j++) {
        float o = __shfl_sync(ALL_LANES, best, j);
        larger += o > best || (o == best && j < t->tid % 32);
    }
    uint64_t v[2] = {bad ? ~0ull : (uint64_t)ordered(best) << 32 | (uint32_t)~id,
                     larger == PIVOT_RANK ? (uint64_t)ordered(best) : 0};
    team_reduce<2, false>(t, v, NULL, NULL);
    survey s;
    s.key = (uint32_t)(v[0] >> 32);
    s.id = (int32_t) ~(uint32_t)v[0];
    uint32_t pivot = (uint32_t)v[1];
    s.pivot =
        t->V <= t->size * LIST ? minus_inf() : __uint_as_float(pivot & 0x80000000u ? pivot ^ 0x80000000u : ~pivot);
    s.top = __uint_as_float(s.key & 0x80000000u ? s.key ^ 0x80000000u : ~s.key);
    if (s.top == 0.0f) s.top = __ldcg(l + s.id); /* its sign is lost in the key, and shows in the logprob's */
    return s;
}
static __device__ __forceinline__ bool is_bad(const survey *s) { return s->key >= KEY_BAD || s->key <= KEY_NONE; }

/* A row of which the best logit is known, with the list of ids near the top in shared memory. */
typedef struct row {
    const float *l;
    scale s;
    float spread; /* bins of the first round a unit of logit */
    float pivot;
    bool listed, list_good, have_mass;
    uint64_t mass, block_mass, mass_before; /* of all ids, of this block's, of those of the blocks before */
    uint64_t list_count, list_mass;         /* over all blocks; list_mass if have_mass */
} row;

/* Items to walk: this block's part of the row, or a list. */
typedef struct view {
    const float *l;
    const int32_t *id; /* NULL: the row */
    int32_t n;
} view;

static __device__ __forceinline__ view view_row(const team *t, const row *r) {
    view v = {r->l + t->lo, NULL, t->hi - t->lo};
    return v;
}
static __device__ __forceinline__ view view_list(const team *t) {
    view v = {t->sh->list_l, t->sh->list_id, (int32_t)t->sh->n_list};
    return v;
}
#define FOR_ITEMS(t, v, base) for (int32_t base = (t)->tid; base < (v)->n; base += BATCH * THREADS)
/* Items base, base + THREADS ...; id -1 past the end. */
static __device__ __forceinline__ void items(const team *t, const view *v, int32_t base, float *l, int32_t *id) {
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
        int32_t i = base + j * THREADS;
        id[j] = -1;
        l[j] = minus_inf();
        if (i >= v->n) continue;
        if (v->id) {
            id[j] = v->id[i];
            l[j] = v->l[i];
        } else {
            id[j] = t->lo + i;
            l[j] = __ldcg(v->l + i);
        }
    }
}

static __device__ __forceinline__ row row_make(const float *l, const survey *s, float T) {
    row r = {};
    r.l = l;
    r.s = scale_make(s->top, T);
    r.spread = __fdiv_rn(32.0f, T); /* e^-32 has no mass left */
    r.pivot = s->pivot;
    return r;
}

/* Second pass: the list, and the mass of the row where it is wanted. */
template <bool MASS> static __device__ __noinline__ void gather(team *t, row *r) {
    share *sh = t->sh;
    __syncthreads();
    if (t->tid == 0) sh->n_list = 0;
    __syncthreads();
    const team u = *t;
    const row q = *r;
    uint64_t mass = 0;
    FOR_BATCHES(&u, base) {
        float v[BATCH][4];
        load_batch(&u, q.l, base, v);
        if (MASS && q.s.quick) {
#pragma unroll
            for (int k = 0; k < BATCH * 4; k++) mass += mass_by<true>(v[k / 4][k % 4], &q.s); /* -inf: no mass */
        } else if (MASS) {
            for (int j = 0; j < BATCH; j++)
                for (int k = 0; k < 4; k++) mass += mass_by<false>(v[j][k], &q.s);
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            float most = fmaxf(fmaxf(v[j][0], v[j][1]), fmaxf(v[j][2], v[j][3]));
            if (!(most >= q.pivot)) continue;
            for (int k = 0; k < 4; k++) {
                if (!(v[j][k] >= q.pivot && v[j][k] > minus_inf())) continue;
                uint32_t at = atomicAdd(&sh->n_list, 1u);
                if (at >= LIST) continue;
                sh->list_l[at] = v[j][k];
                sh->list_id[at] = base + j * THREADS * 4 + k;
            }
        }
    }
    __syncthreads();
    const bool over = sh->n_list > LIST;
    uint64_t list_mass = 0;
    for (uint32_t i = t->tid; MASS && !over && i < sh->n_list; i += THREADS) list_mass += mass_of(sh->list_l[i], &q.s);
    uint64_t v[3] = {mass, list_mass, t->tid ? 0 : over ? 1ull << 32 : (uint64_t)sh->n_list};
    team_reduce<3, true>(t, v, &r->block_mass, &r->mass_before);
    r->listed = true;
    r->have_mass = MASS;
    r->mass = v[0];
    r->list_mass = v[1];
    r->list_count = v[2];
    r->list_good = v[2] < 1ull << 32;
}

#endif
