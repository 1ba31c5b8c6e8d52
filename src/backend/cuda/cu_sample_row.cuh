/* One row of logits and the cluster of blocks that samples it: the row in the blocks' shared memory, sums over the
 * cluster, the numbers of model/sample.c with its bits, and the two passes over a row (the best logit; the list of ids
 * near the top, and the mass). Device code of cu_sample.cu, which says how it all fits together. */
#ifndef ERN_BACKEND_CUDA_CU_SAMPLE_ROW_CUH
#define ERN_BACKEND_CUDA_CU_SAMPLE_ROW_CUH

#include <float.h>
#include <stddef.h>

#include "backend/cuda/cu_kernels.h"

enum {
    SENDERS = 3,  /* numbers of a sum over the team, each sent by a warp of its own */
    TEAM_MAX = 8, /* blocks of a row */
    THREADS = 512,
    WARPS = THREADS / 32,
    BATCH = 4, /* loads in flight of a thread of the arg-max alone */
    BIN_BITS = 9,
    BINS = 1 << BIN_BITS, /* of a round of find_cut, one a thread; also buckets of the draw */
    LIST = 1408,          /* ids that a block can list */
    SHORT = 256,          /* candidates of the later rounds of find_cut, where the first walked the whole row */
    FEW = 64,             /* so many candidates are compared with each other */
    BUCKET_BITS = CU_PORTABLE ? 9 : 6, /* the draw: buckets of so many ids; BINS cover a slice */
    ID_BITS = 18,                      /* ERN_VOCAB_MAX */
    PLACE_BITS = BIN_BITS + 32 + ID_BITS,
    OUT_WORDS = sizeof(ern_sampled) / 4,
    RULE_WORDS = sizeof(cu_rule) / 4,
    UNIFORM_BITS = 24,
    MASS_BITS = 44,
    ROWS_MANY = 66,         /* clusters of 4 that an H100 holds at once: a cluster takes row after row */
    ROWS_FEW = 33,          /* clusters of 8 */
    SLICE_MAX = 101 * 1024, /* bytes of a slice of which two blocks fit in a multiprocessor */
};
#define GREEDY_BELOW 1e-5f
#define MIN_P_ON 0x1p-60f
#define COUNT_DONE 0x80000000u
#define ALL_LANES 0xffffffffu
#define KEY_BAD 0xff800000u  /* ordered bits of +inf: this or more is bad (NaN is taken as all ones) */
#define KEY_NONE 0x007fffffu /* of -inf: nothing was left */
/* Of CU_PORTABLE a team is one block, and its slice, the whole row, is in global memory. */
#if CU_PORTABLE
typedef uint32_t slice_place;
#else
typedef uint16_t slice_place;
#endif
static_assert(sizeof(ern_sampled) % 4 == 0 && (BINS << BUCKET_BITS) * (CU_PORTABLE ? 1 : 8) == ERN_VOCAB_MAX,
              "sizes of this file");
static_assert(1 << ID_BITS == ERN_VOCAB_MAX && BINS == THREADS && ERN_TOP_MAX <= 31, "sizes of this file");

/* ---- what is asked ---------------------------------------------------------------------------------------------- */

/* How a row stands between the two kernels. EDITED: its logits in memory are changed already (steps 3 to 6). */
enum { ROW_DONE, ROW_NEW, ROW_EDITED };

typedef struct sample_args {
    ern_sampled *out;
    int32_t *ids;
    float *logits;
    int32_t n_want, V;
    const cu_rule *rules;
    const int32_t *aux, *token;
    uint32_t *scratch; /* three numbers an id, for every cluster */
    uint32_t *state;   /* [n_want] ROW_DONE .. ROW_EDITED; NULL: all rows are new */
    float *slice;      /* CU_PORTABLE: [clusters][slice_of(V, 1)] */
} sample_args;

/* Steps 3 to 6 touch few ids. A block edits those of its slice. */
typedef struct edits {
    const ern_sample *s;
    const int32_t *bias, *ban, *seen, *tail;
    int32_t n_bias, n_ban, n_seen, n; /* n: tokens seen, the tail too; 0: no penalties */
    uint32_t *entry, *more;           /* [V]; [2V] */
} edits;

static __device__ __forceinline__ edits edits_make(const sample_args *a, const cu_rule *rule, uint32_t *scratch) {
    const ern_sample *s = &rule->s;
    edits e = {};
    e.s = s;
    e.entry = scratch, e.more = scratch + a->V;
    e.n_bias = s->n_bias > 0 ? s->n_bias : 0, e.n_ban = s->n_ban > 0 ? s->n_ban : 0;
    e.bias = a->aux + rule->bias, e.ban = a->aux + rule->ban;
    if (s->repetition != 1.0f || s->frequency != 0.0f || s->presence != 0.0f) {
        const int32_t n_own = rule->row + 1 - rule->row0;
        int32_t n_tail = rule->pos + 1 - s->n_seen;
        n_tail = n_tail < 0 ? 0 : n_tail > n_own ? n_own : n_tail;
        e.seen = a->aux + rule->seen, e.tail = a->token + rule->row + 1 - n_tail;
        e.n_seen = s->n_seen, e.n = s->n_seen + n_tail;
    }
    return e;
}
static __device__ __forceinline__ int32_t seen_at(const edits *e, int32_t i) {
    return i < e->n_seen ? e->seen[i] : e->tail[i - e->n_seen];
}

/* ---- one row's memory ------------------------------------------------------------------------------------------ */

/* What a block shares, also with the other blocks of its cluster. */
typedef struct share {
    uint64_t barrier, warp[SENDERS][WARPS], slot[2][SENDERS][TEAM_MAX];
    uint64_t chunk[WARPS]; /* mass of the ids of each warp: of all of them, or of those at or above the band */
    uint64_t scan_mass[WARPS], place[ERN_TOP_MAX];
    struct {
        uint64_t count, mass, bin_count, bin_mass; /* before the bin, of the bin */
        uint64_t place;
        int32_t bin;
    } found;
    /* 64-bit masses in halves: 32-bit atomics are the fast ones */
    union {
        struct {
            uint32_t lo[BINS], hi[BINS], count[BINS];
        };
        uint32_t times[LIST]; /* how often edited ids were seen; `list` has their places */
    };
    uint32_t scan_count[WARPS], out[OUT_WORDS];
    float best_l[ERN_TOP_MAX];
    uint64_t few_place[FEW], few_mass[FEW];
    uint32_t n_list, n_short, n_best, n_edit, n_few;
    int32_t token;
    union {
        struct {
            slice_place list[LIST], shorts[SHORT];
        };
        struct { /* of a row that streams past: the masses of its parts, and its rule */
            uint32_t part_lo[32], part_hi[32];
            alignas(8) uint32_t rule[RULE_WORDS];
        };
    };
    /* this block's logits, as the rule changes them; -inf up to a whole four */
#if CU_PORTABLE
    float *slice;
#else
    alignas(16) float slice[];
#endif
} share;
static_assert(CU_PORTABLE || sizeof(share) + SLICE_MAX + 1024 <= 228 * 1024 / 2, "two blocks in a multiprocessor");
static_assert(LIST <= 3 * BINS, "times lies over the bins");

/* By name, so that the compiler knows what memory it is. */
extern __shared__ __align__(16) unsigned char sample_memory[];
#define SH ((share *)sample_memory)

typedef struct team {
    int32_t tid, rank, size; /* thread of the block, block of the cluster */
    int32_t V, lo, hi;       /* ids lo..hi-1 are this block's */
    int32_t slice;           /* ids of a block; the last ones have fewer */
    int32_t from, to;        /* places of the slice that are this warp's, whole fours */
    int32_t chunk;           /* places of a warp; the last ones have fewer */
    int32_t turn;            /* of the next barrier, and of its slot: 0 and 1 by turns */
    bool vec;                /* rows start at multiples of 16 bytes */
} team;

/* ---- cluster --------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ int32_t cluster_rank(void) {
    uint32_t r = 0;
#if !CU_PORTABLE
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
#endif
    return (int32_t)r;
}
static __device__ __forceinline__ int32_t cluster_size(void) {
    uint32_t n = 1;
#if !CU_PORTABLE
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
#endif
    return (int32_t)n;
}
#if CU_PORTABLE /* rank is 0 */
static __device__ __forceinline__ uint32_t remote_add(uint32_t *mine, int32_t, uint32_t n) {
    return atomicAdd(mine, n);
}
static __device__ __forceinline__ void cluster_sync(void) { __syncthreads(); }
static __device__ __forceinline__ uint64_t remote64(const void *mine, int32_t) { return *(const uint64_t *)mine; }
static __device__ __forceinline__ uint32_t remote32(const void *mine, int32_t) { return *(const uint32_t *)mine; }
static __device__ __forceinline__ void send64(void *mine, int32_t, uint64_t value) { *(uint64_t *)mine = value; }
#else
/* atomicAdd(mine, n) of block `rank`. */
static __device__ __forceinline__ uint32_t remote_add(uint32_t *mine, int32_t rank, uint32_t n) {
    uint32_t at, old;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(at)
                 : "r"((uint32_t)__cvta_generic_to_shared(mine)), "r"(rank));
    asm volatile("atom.shared::cluster.add.u32 %0, [%1], %2;" : "=r"(old) : "r"(at), "r"(n) : "memory");
    return old;
}
/* All threads of all blocks, by the barrier of the chip: for the beginning, the end and kernels that do it once. */
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

/* value to where `mine` lies in block `rank`. */
static __device__ __forceinline__ void send64(void *mine, int32_t rank, uint64_t value) {
    uint32_t at;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(at)
                 : "r"((uint32_t)__cvta_generic_to_shared(mine)), "r"(rank));
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(at), "l"(value) : "memory");
}
#endif
/* Nobody else is in the team. */
static __device__ __forceinline__ bool is_alone(const team *t) { return CU_PORTABLE || t->size == 1; }

/* Every thread of every block; what was written before, in shared memory, is seen after. A barrier of our own, because
 * a reduction's numbers travel with it, and because waiting must not throw away the first-level cache: that is what
 * acquiring all memory at cluster scope does, of the chip's barrier too, and then every thread's local memory comes
 * from L2. Only shared memory is exchanged, so the fence after the wait acquires that alone. */
static __device__ __forceinline__ void team_begin(const team *t) {
    if (is_alone(t)) {
        __syncthreads();
        return;
    }
    if (t->tid == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"((uint32_t)__cvta_generic_to_shared(&SH->barrier)),
                     "r"(t->size * SENDERS)
                     : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
}
/* When all of the block are done: lane r of the first SENDERS warps tells block r. */
static __device__ __forceinline__ void team_tell(const team *t) {
    if (t->tid >= SENDERS * 32 || t->tid % 32 >= t->size) return;
    uint32_t at;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(at)
                 : "r"((uint32_t)__cvta_generic_to_shared(&SH->barrier)), "r"(t->tid % 32));
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(at) : "memory");
}
static __device__ __forceinline__ void team_wait(team *t) {
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(&SH->barrier), parity = (uint32_t)t->turn;
    uint32_t done;
    do {
        asm volatile("{\n\t.reg .pred p;\n\t"
                     "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [%1], %2;\n\t"
                     "selp.u32 %0, 1, 0, p;\n\t}"
                     : "=r"(done)
                     : "r"(at), "r"(parity)
                     : "memory");
    } while (!done);
    asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
    t->turn ^= 1;
}
static __device__ __forceinline__ void team_sync(team *t) {
    __syncthreads();
    if (is_alone(t)) return;
    team_tell(t);
    team_wait(t);
}

/* ---- numbers --------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
#pragma unroll 1
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(ALL_LANES, x, d);
    return x;
}
/* Of this lane and those before it. */
static __device__ __forceinline__ uint64_t sum_up_to(uint64_t x) {
#pragma unroll 1
    for (int d = 1; d < 32; d <<= 1) {
        const uint64_t o = __shfl_up_sync(ALL_LANES, x, d);
        if ((int32_t)threadIdx.x % 32 >= d) x += o;
    }
    return x;
}
static __device__ __forceinline__ uint64_t block_sum(int32_t tid, uint64_t x) {
    x = warp_sum(x);
    __syncthreads();
    if (tid % 32 == 0) SH->scan_mass[tid / 32] = x;
    __syncthreads();
    return warp_sum(tid % 32 < WARPS ? SH->scan_mass[tid % 32] : 0);
}
static __device__ __forceinline__ uint64_t max64(uint64_t x, uint64_t y) { return x > y ? x : y; }

static __device__ __forceinline__ uint64_t warp_max(uint64_t x) {
#pragma unroll 1
    for (int d = 16; d > 0; d >>= 1) x = max64(x, __shfl_xor_sync(ALL_LANES, x, d));
    return x;
}

typedef struct three {
    uint64_t v[SENDERS];
    uint64_t mine, before; /* of a sum, of v[0]: this block's, that of the blocks before */
} three;

/* Sums or maxima of three numbers over the warps of the cluster (lane 0 has a warp's); all threads have them. Every
 * block sends its part to all. The two slots take turns: between writing one and writing it again lies a barrier that
 * nobody passes who still reads. */
template <bool SUM> static __device__ __noinline__ three team_reduce(team *t, uint64_t a, uint64_t b, uint64_t c) {
    share *sh = SH;
    const int32_t lane = t->tid % 32, warp = t->tid / 32;
    static_assert(sizeof(sh->warp) == sizeof(sh->slot), "a block alone takes them by turns");
    uint64_t(*part)[WARPS] = is_alone(t) && t->turn ? (uint64_t(*)[WARPS])sh->slot : sh->warp;
    if (lane == 0) part[0][warp] = a, part[1][warp] = b, part[2][warp] = c;
    __syncthreads();
    three out = {{0, 0, 0}, 0, 0};
    if (is_alone(t)) { /* no fence over a cluster, which takes microseconds while memory is busy */
        for (int k = 0; k < SENDERS; k++) {
            uint64_t x = part[k][lane % WARPS];
            for (int d = WARPS / 2; d > 0; d >>= 1) {
                const uint64_t y = __shfl_xor_sync(ALL_LANES, x, d);
                x = SUM ? x + y : max64(x, y);
            }
            out.v[k] = x;
        }
        out.mine = out.v[0];
        t->turn ^= 1;
        return out;
    }
    uint64_t(*slot)[TEAM_MAX] = sh->slot[t->turn];
    if (warp < SENDERS) {
        uint64_t x = sh->warp[warp][lane % WARPS];
        for (int d = WARPS / 2; d > 0; d >>= 1) {
            const uint64_t y = __shfl_xor_sync(ALL_LANES, x, d);
            x = SUM ? x + y : max64(x, y);
        }
        if (lane < t->size) send64(&slot[warp][t->rank], lane, x);
        team_tell(t);
    }
    team_wait(t);
#pragma unroll 1
    for (int r = 0; r < t->size; r++) {
        const uint64_t x = slot[0][r], y = slot[1][r], z = slot[2][r];
        if (SUM && r == t->rank) out.before = out.v[0], out.mine = x;
        out.v[0] = SUM ? out.v[0] + x : max64(out.v[0], x);
        out.v[1] = SUM ? out.v[1] + y : max64(out.v[1], y);
        out.v[2] = SUM ? out.v[2] + z : max64(out.v[2], z);
    }
    return out;
}
/* Of every thread's number. */
static __device__ __forceinline__ uint64_t team_sum(team *t, uint64_t x) {
    return team_reduce<true>(t, warp_sum(x), 0, 0).v[0];
}
static __device__ __forceinline__ uint32_t team_max(team *t, uint32_t x) {
    return (uint32_t)team_reduce<false>(t, __reduce_max_sync(ALL_LANES, x), 0, 0).v[0];
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

/* exp((l - top) / T) with the bits of sample.c, but for what is below 2^-44 and counts as nothing. The quotient: two
 * Newton steps from x * (1 / T) give the rounded one (Markstein) as long as nothing on the way is subnormal; a smaller
 * |x / T| has weight 1 whatever its last bits are. sample.c's n * 0.693359375 is exact, so that fma is the same there;
 * p * 2^n adds n to the exponent. */
enum { SLOW, QUICK, ONE }; /* any T; neither tiny nor huge; 1: no division */
template <int HOW> static __device__ __forceinline__ float weight_by(float l, const scale *s) {
    float x = __fsub_rn(l, s->top), z;
    if (HOW == ONE) {
        z = fmaxf(x, -48.0f);
    } else if (HOW == QUICK) {
        x = fmaxf(x, s->least);
        z = __fmul_rn(x, s->inverse);
        z = __fmaf_rn(__fmaf_rn(-s->T, z, x), s->inverse, z);
        z = __fmaf_rn(__fmaf_rn(-s->T, z, x), s->inverse, z);
    } else {
        z = fmaxf(__fdiv_rn(x, s->T), -48.0f);
    }
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
    return __uint_as_float(__float_as_uint(p) + (__float_as_uint(t) << 23)); /* 2^-70 .. 1 */
}
/* A mass, floor(weight * 2^44), is a = floor(weight * 2^22) times 2^22 plus the rest b; both are had by adding a power
 * of two whose last bit is the unit, rounding down, and their sums over a thread's ids fit in 32 bits. */
typedef struct halves {
    uint32_t a, b;
} halves;
static __device__ __forceinline__ halves halves_of(float weight) {
    const float t = __fadd_rz(weight, 2.0f), rest = __fsub_rn(weight, __fsub_rn(t, 2.0f));
    const float u = __fadd_rz(rest, 0x1p-21f);
    return {__float_as_uint(t) - 0x40000000u, __float_as_uint(u) - 0x35000000u};
}
static __device__ __forceinline__ uint64_t mass_from(halves h) { return ((uint64_t)h.a << 22) + h.b; }
static __device__ __forceinline__ uint64_t mass_of(float l, const scale *s) {
    return mass_from(halves_of(s->quick ? weight_by<QUICK>(l, s) : weight_by<SLOW>(l, s)));
}

/* ern_counter64 of base/counter.h. */
static __device__ __forceinline__ uint64_t counter64(uint64_t key, uint64_t index) {
    uint64_t z = key + (index + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static __device__ __forceinline__ uint64_t target_of(const ern_sample *s, uint64_t mass) {
    const uint64_t key = counter64(s->seed, (uint64_t)(uint32_t)s->choice);
    const uint64_t u = counter64(key, (uint64_t)(uint32_t)s->position) >> (64 - UNIFORM_BITS);
    return u * mass >> UNIFORM_BITS | __umul64hi(u, mass) << (64 - UNIFORM_BITS);
}

/* top_p of a mass, rounded up. */
static __device__ __forceinline__ uint64_t share_of(uint64_t mass, float top_p) {
    double need = __dmul_rn((double)top_p, __ull2double_rn(mass));
    uint64_t whole = __double2ull_rz(need);
    whole += __ull2double_rn(whole) < need;
    return whole < 1 ? 1 : whole > mass ? mass : whole;
}

/* Ids of a part, whole fours, where V are cut in `size` parts. */
static __host__ __device__ __forceinline__ int32_t slice_of(int32_t V, int32_t size) {
    return ((V + size - 1) / size + 3) / 4 * 4;
}

/* ---- the slice ------------------------------------------------------------------------------------------------- */

/* This warp's places, four a lane. */
#define FOR_FOURS(t, i) for (int32_t i = (t)->from + (t)->tid % 32 * 4; i < (t)->to; i += 128)

/* The block's part of row l on its way to shared memory; each thread copies what it will look at. */
static __device__ __forceinline__ void load_begin(const team *t, const float *l) {
    float *slice = SH->slice;
    l += t->lo;
    if (t->vec) {
        FOR_FOURS(t, i) {
#if CU_PORTABLE
            *(float4 *)(slice + i) = __ldcg((const float4 *)(l + i));
#else
            asm volatile(
                "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(slice + i)),
                "l"(l + i)
                : "memory");
#endif
        }
    } else {
#pragma unroll 1
        FOR_FOURS(t, i) {
            for (int k = i; k < i + 4; k++) slice[k] = t->lo + k < t->hi ? __ldcg(l + k) : minus_inf();
        }
    }
}
/* It is there, for this thread, and what the mask (NULL: none) forbids is forbidden. */
static __device__ __forceinline__ void load_end(const team *t, const uint32_t *mask) {
    float *slice = SH->slice;
    asm volatile("cp.async.wait_all;" ::: "memory");
    if (!mask) return;
#pragma unroll 1
    FOR_FOURS(t, i) {
        const int32_t id = t->lo + i; /* a multiple of 4, and there is such an id */
        const uint32_t on = mask[id / 32] >> (id % 32) & 15u;
        for (int k = 0; k < 4; k++)
            if (!(on >> k & 1)) slice[i + k] = forbidden(slice[i + k]);
    }
}

static __device__ __forceinline__ float max_nan(float a, float b) { /* NaN if one is */
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}
static __device__ __forceinline__ float from_ordered(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

/* What a pass over the row found. */
typedef struct survey {
    uint32_t key; /* ordered bits of the best logit; KEY_BAD and above, KEY_NONE and below: the row is bad */
    float top;
    float pivot; /* about a thread's share of logits are not below it; -inf: the row is small enough for the list */
    float low;   /* about the least logit */
} survey;

/* The lowest id whose logit is `top`. */
static __device__ __noinline__ int32_t first_of(team *t, float top) {
    uint32_t id = ~0u;
#pragma unroll 1
    FOR_FOURS(t, i) {
        for (int k = 3; k >= 0; k--)
            if (SH->slice[i + k] == top && (uint32_t)(t->lo + i + k) < id) id = (uint32_t)(t->lo + i + k);
    }
    return (int32_t)~team_max(t, ~id);
}

/* First pass: the best logit. */
static __device__ __noinline__ survey survey_row(team *t) {
    const team u = *t; /* in registers: stores could change *t, for all that the compiler knows */
    float best = minus_inf(), low = plus_inf();
    FOR_FOURS(&u, i) {
        const float4 v = *(const float4 *)(SH->slice + i);
        best = max_nan(max_nan(best, max_nan(v.x, v.y)), max_nan(v.z, v.w));
        low = fminf(low, v.x);
    }
    /* The least of eight threads' bests, then the largest of these: most rows have a list of one or two thousand ids
     * then. It is only a guess: no result depends on it. */
    float least = best;
    for (int d = 1; d < 8; d <<= 1) least = fminf(least, __shfl_xor_sync(ALL_LANES, least, d));
    const three v =
        team_reduce<false>(t, __reduce_max_sync(ALL_LANES, ordered(best)), __reduce_max_sync(ALL_LANES, ordered(least)),
                           __reduce_max_sync(ALL_LANES, ~ordered(low)));
    survey s;
    s.key = (uint32_t)v.v[0];
    s.top = from_ordered(s.key);
    s.pivot = t->V <= t->size * LIST ? minus_inf() : from_ordered((uint32_t)v.v[1]);
    s.low = from_ordered(~(uint32_t)v.v[2]);
    return s;
}
static __device__ __forceinline__ bool is_bad(const survey *s) { return s->key >= KEY_BAD || s->key <= KEY_NONE; }

/* A row of which the best logit is known, with a list of ids: those from `pivot` up to below `above`. */
typedef struct row {
    scale s;
    float origin, spread; /* the first round of find_cut: where its bins begin, bins a unit of logit */
    float pivot, above;
    bool listed, list_good, have_mass, weighed;
    bool banded;                            /* the list does not begin with the best: what is above is only added up */
    uint64_t mass, block_mass, mass_before; /* if have_mass: of all ids, of this block's, of those of blocks before */
    uint64_t list_count, list_mass;         /* over all blocks; list_mass if weighed */
    uint64_t above_count, above_mass;
} row;

/* Items to walk: places of the slice. */
typedef struct view {
    const slice_place *at; /* NULL: all */
    int32_t n, lo;
} view;

static __device__ __forceinline__ view view_row(const team *t) { return {NULL, t->hi - t->lo, t->lo}; }
static __device__ __forceinline__ view view_list(const team *t) { return {SH->list, (int32_t)SH->n_list, t->lo}; }
/* Every item: its place, logit and id. */
#define FOR_ITEMS(t, v, i, l, id)                                                                      \
    _Pragma("unroll 1") for (int32_t item_ = (t)->tid; item_ < (v)->n;                                 \
                             item_ += THREADS) if (const int32_t i = (v)->at ? (v)->at[item_] : item_; \
                                                   true) if (const float l = SH->slice[i];             \
                                                             true) if (const int32_t id = (v)->lo + i; true)

static __device__ __forceinline__ row row_make(const survey *s, float T) {
    row r = {};
    r.s = scale_make(s->top, T);
    r.origin = s->top;
    /* e^-32 has no mass left */
    const float wide = __fmul_rn(32.0f, T), range = fminf(wide, __fsub_rn(s->top, s->low));
    r.spread = fminf(__fdiv_rn((float)BINS, range > 0.0f ? range : wide), 1e30f);
    r.pivot = s->pivot;
    r.above = plus_inf();
    return r;
}

/* What a thread's ids of a slice add up to. */
typedef struct sums {
    halves mass;
    uint32_t count;
} sums;
enum { NO_MASS = -1 };

/* Adds the places i .. i + 3 whose logit is at or above the pivot (and below what is above) to the list. */
static __device__ __forceinline__ void list_add(const row *r, bool band, int32_t i, const float v[4]) {
    const float pivot = fmaxf(r->pivot, -FLT_MAX), above = r->above;
    uint32_t mine = 0;
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (v[k] >= pivot && !(band && v[k] >= above)) mine |= 1u << k;
    if (!mine) return;
    uint32_t at = atomicAdd(&SH->n_list, (uint32_t)__popc(mine));
#pragma unroll 1
    for (; mine; mine &= mine - 1, at++)
        if (at < LIST) SH->list[at] = (slice_place)(i + __ffs((int)mine) - 1);
}

/* The list, and the mass of all the thread's ids; banded: of those that are above, and how many. */
template <int HOW, bool BAND>
static __device__ __forceinline__ sums gather_slice(const team *t, const row *r, bool list) {
    sums sum = {};
#pragma unroll 2
    FOR_FOURS(t, i) {
        const float4 f = *(const float4 *)(SH->slice + i);
        const float v[4] = {f.x, f.y, f.z, f.w};
#pragma unroll
        for (int k = 0; k < 4; k++) { /* -inf: no mass */
            if (HOW == NO_MASS) break;
            const halves h = halves_of(weight_by<HOW>(v[k], &r->s));
            if (!BAND || v[k] >= r->above) sum.mass.a += h.a, sum.mass.b += h.b, sum.count++;
        }
        if (list) list_add(r, BAND, i, v);
    }
    return sum;
}

/* Second pass: the list and the mass of the row, where they are wanted. BAND: another such pass, for a list whose ends
 * were guessed. */
template <bool MASS, bool BAND> static __device__ __noinline__ void gather(team *t, row *r, bool list) {
    enum { OVER = 60, ABOVE = 24 }; /* three numbers in one */
    share *sh = SH;
    __syncthreads();
    if (t->tid == 0) sh->n_list = 0;
    __syncthreads();
    const team u = *t;
    const row q = *r;
    sums h;
    if (!MASS)
        h = gather_slice<NO_MASS, BAND>(&u, &q, list);
    else if (q.s.T == 1.0f)
        h = gather_slice<ONE, BAND>(&u, &q, list);
    else
        h = q.s.quick ? gather_slice<QUICK, BAND>(&u, &q, list) : gather_slice<SLOW, BAND>(&u, &q, list);
    __syncthreads();
    const bool over = sh->n_list > LIST;
    uint64_t list_mass = 0;
#pragma unroll 1
    for (uint32_t i = t->tid; MASS && !over && i < sh->n_list; i += THREADS)
        list_mass += mass_of(sh->slice[sh->list[i]], &q.s);
    const uint64_t mass = warp_sum(mass_from(h.mass));
    if (t->tid % 32 == 0) sh->chunk[t->tid / 32] = mass;
    uint64_t counts = t->tid ? 0 : over ? 1ull << OVER : (uint64_t)sh->n_list;
    if (BAND) counts += (uint64_t)__reduce_add_sync(ALL_LANES, h.count) << ABOVE;
    const three v = team_reduce<true>(t, mass, MASS ? warp_sum(list_mass) : 0, counts);
    r->listed = list;
    r->weighed = MASS;
    r->list_mass = v.v[1];
    r->list_count = v.v[2] & ((1u << ABOVE) - 1);
    r->list_good = list && v.v[2] < 1ull << OVER;
    r->banded = BAND;
    if (BAND) {
        r->above_mass = v.v[0];
        r->above_count = v.v[2] >> ABOVE;
    } else {
        r->have_mass = MASS;
        r->mass = v.v[0];
        r->block_mass = v.mine, r->mass_before = v.before;
    }
}

/* ---- the order: logit descending, id ascending ----------------------------------------------------------------- */

/* An item's place in the order as one number, smaller is earlier: a coarse distance from the top that spreads well over
 * the bins of the first round, then the logit's bits, then the id. */
static __device__ __forceinline__ uint64_t place_of(const row *r, float l, int32_t id) {
    float far = fminf(__fmul_rn(__fsub_rn(r->origin, l), r->spread), (float)(BINS - 1));
    return (uint64_t)__float2uint_rz(far) << (32 + ID_BITS) | (uint64_t)~ordered(l) << ID_BITS | (uint32_t)id;
}

/* Everything up to and including `place` is kept. */
typedef struct cut {
    uint64_t place, mass, count;
    bool in_list;
} cut;

static __device__ __forceinline__ uint64_t kept_mass(const row *r, const cut *c, float l, int32_t id) {
    return place_of(r, l, id) <= c->place ? mass_of(l, &r->s) : 0;
}

/* The sum of m over the threads before this one, of the block. */
static __device__ __noinline__ uint64_t mass_before(int32_t tid, uint64_t m) {
    share *sh = SH;
    const int32_t lane = tid % 32, warp = tid / 32;
    const uint64_t up = sum_up_to(m);
    if (lane == 31) sh->scan_mass[warp] = up;
    __syncthreads();
    return up - m + warp_sum(lane < warp ? sh->scan_mass[lane] : 0);
}

/* In which bin the run ends: all blocks of the team add up the bins of all and find the same. */
static __device__ __noinline__ void find_bin(team *t, const cut *c, uint64_t need_count, uint64_t need_mass) {
    share *sh = SH;
    const int32_t bin = t->tid, lane = bin % 32, warp = bin / 32;
    uint32_t count = 0;
    uint64_t mass = 0;
#pragma unroll 4
    for (int r = 0; t->size > 1 && r < t->size; r++) {
        count += remote32(&sh->count[bin], r);
        mass += remote32(&sh->lo[bin], r) + ((uint64_t)remote32(&sh->hi[bin], r) << 32);
    }
    if (t->size == 1) count = sh->count[bin], mass = sh->lo[bin] + ((uint64_t)sh->hi[bin] << 32);
    uint32_t up = count;
#pragma unroll 1
    for (int d = 1; d < 32; d <<= 1) {
        const uint32_t o = __shfl_up_sync(ALL_LANES, up, d);
        if (lane >= d) up += o;
    }
    if (lane == 31) sh->scan_count[warp] = up;
    const uint64_t at_mass = c->mass + mass_before(bin, mass);
    const uint32_t others = __reduce_add_sync(ALL_LANES, lane < warp ? sh->scan_count[lane] : 0);
    const uint64_t at_count = c->count + others + up - count;
    const bool before = at_count >= need_count || at_mass >= need_mass;
    const bool after = at_count + count >= need_count || at_mass + mass >= need_mass;
    if ((!before && after) || (!after && bin == BINS - 1)) {
        sh->found.bin = after ? bin : -1;
        sh->found.count = at_count, sh->found.mass = at_mass;
        sh->found.bin_count = count, sh->found.bin_mass = mass;
    }
    __syncthreads();
}

static __device__ __forceinline__ void add_mass(uint32_t *lo, uint32_t *hi, uint64_t mass) {
    uint32_t high = (uint32_t)(mass >> 32), low = (uint32_t)mass;
    if (mass) {
        uint32_t old = atomicAdd(lo, low);
        high += old + low < old;
    }
    if (high) atomicAdd(hi, high);
}

/* The run ends at one of the n candidates; every block has them all. */
static __device__ __forceinline__ void end_among_few(int32_t tid, int32_t n, const cut *c, uint64_t need_count,
                                                     uint64_t need_mass) {
    share *sh = SH;
    if (tid < n) {
        const uint64_t place = sh->few_place[tid];
        uint64_t count = c->count, mass = c->mass;
#pragma unroll 4
        for (int32_t i = 0; i < n; i++)
            if (sh->few_place[i] <= place) count++, mass += sh->few_mass[i];
        const bool before = count - 1 >= need_count || mass - sh->few_mass[tid] >= need_mass;
        if (!before && (count >= need_count || mass >= need_mass))
            sh->found.place = place, sh->found.count = count, sh->found.mass = mass;
    }
    __syncthreads();
}

#endif
