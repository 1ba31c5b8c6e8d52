#include "model/sample.h"

#include <math.h>
#include <string.h>

#include "base/counter.h"
#include "base/status.h"

/* How it stays exact and order-free: a token's weight is an integer.
 *
 *   mass(i) = floor( exp((l_i - max l) / T) * 2^44 ),  so the best token has 2^44
 *
 * Integer sums have no order, so a histogram, a tree, one thread or a thousand give the same total, the same nucleus
 * and the same draw. exp is our own (sample_exp), built from single f32 operations, so its bits do not depend on a
 * libm. What the floor drops is below V * 2^-44 < 2^-26 of the distribution for the largest vocabulary. */
enum {
    MASS_BITS = 44,
    RADIX = 2048,
    UNIFORM_BITS = 24,
    STEP = 16,  /* loops over the vocabulary go by so many logits, of which most tell at once that they do not matter */
    FEW = 64,   /* so many best are found by insertion, more by radix selection */
    RUN = 1024, /* tokens whose masses the draw adds before it looks at one */
};
#define GREEDY_BELOW 1e-5f /* temperature or top_p under this means arg-max */
#define MIN_P_ON 0x1p-60f  /* a smaller min_p forbids only tokens whose mass is 0 already */
#define COUNT_DONE 0x80000000u
#define NEAR 7.0f /* temperatures below the best logit: the nucleus mostly ends there, and few tokens are as good */

/* Compiled for wider registers too, and chosen when the program starts: single operations without contraction, so the
 * bits are the same. A sanitizer's run-time is not up yet when the choice is made. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

typedef struct scratch {
    float *weight;       /* [V] exp((l - max) / T) */
    float *raw;          /* [V] logits before penalties */
    uint32_t *count;     /* [V] penalties: how often an id was generated; later the candidate ids of the radix rounds */
    int32_t *list;       /* [V] ids that may still be drawn, ascending */
    uint32_t *bin_count; /* [RADIX] */
    uint64_t *bin_mass;  /* [RADIX] */
} scratch;

/* A place in the order (logit descending, id ascending): everything up to and including it is kept. */
typedef struct cut {
    uint32_t key; /* ordered bits of the last kept logit */
    int32_t id;   /* last kept id among those of this very logit */
    uint64_t mass, count;
} cut;

size_t ern_sample_scratch_bytes(int32_t n_vocab) {
    ERN_ASSERT(n_vocab > 0 && n_vocab <= ERN_VOCAB_MAX);
    return RADIX * (sizeof(uint64_t) + sizeof(uint32_t)) +
           (size_t)n_vocab * (2 * sizeof(float) + sizeof(uint32_t) + sizeof(int32_t));
}

static scratch scratch_split(void *memory, int32_t n_vocab) {
    scratch s;
    s.bin_mass = memory;
    s.bin_count = (uint32_t *)(s.bin_mass + RADIX);
    s.count = s.bin_count + RADIX;
    s.weight = (float *)(s.count + n_vocab);
    s.raw = s.weight + n_vocab;
    s.list = (int32_t *)(void *)(s.raw + n_vocab);
    return s;
}

float ern_sample_uniform(uint64_t seed, int32_t choice, int32_t position) {
    uint64_t key = ern_counter64(seed, (uint64_t)(uint32_t)choice);
    return (float)(ern_counter64(key, (uint64_t)(uint32_t)position) >> (64 - UNIFORM_BITS)) * 0x1p-24f;
}

/* ---- own exp and log ------------------------------------------------------------------------------------------- */

/* e^x for x <= 0, in f32. x = n ln2 + r with |r| <= 0.3466: the Taylor polynomial of degree 7 of e^r is short by
 * r^8/8! < 6e-9 relative; rounding adds about one and a half ulp: within 2^-22 of e^x. x is cut at -40, where
 * the mass is 0 already (2^-44 = e^-30.5): no branch, no subnormals, and -inf needs no case of its own. */
static inline float sample_exp(float x) {
    x = x < -40.0f ? -40.0f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: rounds to the nearest integer */
    float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  /* ln2 in two parts; the first product is exact */
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union {
        int32_t bits;
        float value;
    } scale = {.bits = ((int32_t)n + 127) << 23}; /* n >= -58: a normal number */
    return p * scale.value;
}

/* ln x for a positive normal double: x = 2^e m, m in [sqrt(1/2), sqrt 2), ln m = 2 atanh(s), s = (m-1)/(m+1), |s| <
 * 0.172. The series to s^15 is short by 2 s^17 / 17 < 2e-14. */
static double sample_log(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    int e = (int)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffffull) | 0x3ff0000000000000ull;
    double m;
    memcpy(&m, &bits, sizeof m);
    if (m > 1.4142135623730951) {
        m *= 0.5;
        e++;
    }
    double s = (m - 1.0) / (m + 1.0), s2 = s * s, sum = 0.0;
    for (int k = 15; k >= 1; k -= 2) sum = sum * s2 + 1.0 / k;
    return 2.0 * s * sum + e * 0.6931471805599453;
}

static inline uint64_t mass_of(float weight) { return (uint64_t)(int64_t)(weight * 0x1p44f); }

/* Bits that order as the floats do: larger float, larger number. -0 counts as +0. */
static inline uint32_t ordered(float f) {
    uint32_t u;
    f += 0.0f;
    memcpy(&u, &f, sizeof u);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

/* ---- changing the logits ---------------------------------------------------------------------------------------- */

/* A logit that may not be sampled becomes -inf; NaN and +inf stay, so that the check still finds them. */
static inline void forbid(float *logit) {
    if (*logit < INFINITY) *logit = -INFINITY;
}

static void apply_mask(float *logits, int32_t n_vocab, const uint32_t *mask) {
    for (int32_t i = 0; i < n_vocab; i += 32) {
        uint32_t off = ~mask[i / 32];
        if (n_vocab - i < 32) off &= (1u << (n_vocab - i)) - 1u;
        for (; off; off &= off - 1) forbid(&logits[i + __builtin_ctz(off)]);
    }
}

/* Repetition over prompt and reply, frequency and presence over the reply. Three walks over the tokens, none over the
 * vocabulary: clear the counts of the ids that occur, count, apply once per id. */
static void apply_penalties(float *logits, int32_t n_vocab, const ern_sample *s, const int32_t *tail, int32_t n_tail,
                            uint32_t *count) {
    int64_t n = (int64_t)s->n_seen + n_tail;
    for (int64_t i = 0; i < n; i++) {
        int32_t id = i < s->n_seen ? s->seen[i] : tail[i - s->n_seen];
        ERN_ASSERT(id >= 0 && id < n_vocab);
        count[id] = 0;
    }
    for (int64_t i = s->n_prompt; i < n; i++) count[i < s->n_seen ? s->seen[i] : tail[i - s->n_seen]]++;
    for (int64_t i = 0; i < n; i++) {
        int32_t id = i < s->n_seen ? s->seen[i] : tail[i - s->n_seen];
        if (count[id] & COUNT_DONE) continue;
        float l = logits[id];
        l = l < 0.0f ? l * s->repetition : l / s->repetition;
        if (count[id]) l = (l - (float)count[id] * s->frequency) - s->presence;
        logits[id] = l;
        count[id] |= COUNT_DONE;
    }
}

static void apply_bias(float *logits, int32_t n_vocab, const ern_sample *s) {
    for (int32_t i = 0; i < s->n_bias; i++) {
        ERN_ASSERT(s->bias[i].id >= 0 && s->bias[i].id < n_vocab);
        logits[s->bias[i].id] += s->bias[i].add;
    }
}

static void apply_bans(float *logits, int32_t n_vocab, const ern_sample *s) {
    for (int32_t i = 0; i < s->n_ban; i++) {
        ERN_ASSERT(s->ban[i] >= 0 && s->ban[i] < n_vocab);
        forbid(&logits[s->ban[i]]);
    }
}

/* Whether any of STEP logits is above `than` or NaN. */
static inline bool any_above(const float *logits, float than) {
    int32_t above = 0;
    for (int i = 0; i < STEP; i++) above |= !(logits[i] <= than);
    return above;
}

/* The best id, ties to the lowest; -1 when a logit is NaN or +inf, or when nothing is left. */
WIDE static int32_t arg_max(const float *logits, int32_t n_vocab) {
    float best = -INFINITY;
    int32_t id = -1;
    for (int32_t i = 0; i < n_vocab;) {
        if (n_vocab - i >= STEP && !any_above(logits + i, best)) {
            i += STEP;
            continue;
        }
        for (const int32_t end = n_vocab - i < STEP ? n_vocab : i + STEP; i < end; i++) {
            if (logits[i] <= best) continue;
            if (isnan(logits[i])) return -1;
            best = logits[i];
            id = i;
        }
    }
    return best < INFINITY ? id : -1;
}

/* The n best ids of the row, best first, ties to the lower id; -inf is never listed. */
WIDE static int32_t top_ids(const float *logits, int32_t n_vocab, int32_t n, int32_t *out) {
    int32_t have = 0;
    for (int32_t i = 0; i < n_vocab && n > 0;) {
        float worst = have == n ? logits[out[n - 1]] : -INFINITY;
        if (n_vocab - i >= STEP && !any_above(logits + i, worst)) {
            i += STEP;
            continue;
        }
        for (const int32_t end = n_vocab - i < STEP ? n_vocab : i + STEP; i < end; i++) {
            worst = have == n ? logits[out[n - 1]] : -INFINITY;
            if (!(logits[i] > worst)) continue;
            int32_t at = have < n ? have++ : n - 1;
            for (; at > 0 && logits[out[at - 1]] < logits[i]; at--) out[at] = out[at - 1];
            out[at] = i;
        }
    }
    return have;
}

/* ---- distribution ----------------------------------------------------------------------------------------------- */

WIDE static uint64_t mass_sum(const float *weight, int32_t n) {
    uint64_t sum = 0;
    for (int32_t i = 0; i < n; i++) sum += mass_of(weight[i]);
    return sum;
}

/* weight[i] = exp((l_i - top) / T); the sum of the masses. Subtracting first keeps any T from overflowing. The inner
 * loop of a fixed length is there for the compiler, which makes vector code of it at -O2 already. */
WIDE static uint64_t weigh(const float *restrict logits, int32_t n_vocab, float top, float temperature,
                           float *restrict weight) {
    int32_t i = 0;
    for (; i + STEP <= n_vocab; i += STEP)
        for (int j = 0; j < STEP; j++) weight[i + j] = sample_exp((logits[i + j] - top) / temperature);
    for (; i < n_vocab; i++) weight[i] = sample_exp((logits[i] - top) / temperature);
    return mass_sum(weight, n_vocab);
}

/* Of the tokens in `from` (n ids ascending; NULL: 0..n-1) the shortest run of the order (logit descending, id
 * ascending) that holds at least `need_count` of them or at least `need_mass`, whichever comes first; all when neither
 * is reached. weight NULL: masses are not asked for.
 * Radix selection on the ordered bits, 11 + 11 + 10 of them: each round keeps the candidates of the one bin in which
 * the run ends, so the later rounds see few. The last round's candidates have equal logits and stand in id order. */
static cut find_cut(const float *logits, const int32_t *from, int32_t n, const float *weight, uint64_t need_count,
                    uint64_t need_mass, scratch *s) {
    static const int shifts[3] = {21, 10, 0}, bits[3] = {11, 11, 10};
    cut c = {.key = 0, .id = INT32_MAX};
    int32_t *id = (int32_t *)s->count;
    for (int round = 0; round < 3; round++) {
        uint32_t n_bin = 1u << bits[round];
        memset(s->bin_count, 0, n_bin * sizeof *s->bin_count);
        memset(s->bin_mass, 0, n_bin * sizeof *s->bin_mass);
        for (int32_t i = 0; i < n; i++) {
            int32_t t = from ? from[i] : i;
            uint32_t bin = (ordered(logits[t]) >> shifts[round]) & (n_bin - 1);
            s->bin_count[bin]++;
            if (weight) s->bin_mass[bin] += mass_of(weight[t]);
        }
        uint32_t bin = n_bin - 1;
        while (c.count + s->bin_count[bin] < need_count && c.mass + s->bin_mass[bin] < need_mass) {
            c.count += s->bin_count[bin];
            c.mass += s->bin_mass[bin];
            if (bin-- == 0) return (cut){.key = 0, .id = INT32_MAX, .mass = c.mass, .count = c.count};
        }
        int32_t kept = 0;
        for (int32_t i = 0; i < n; i++) {
            int32_t t = from ? from[i] : i;
            if (((ordered(logits[t]) >> shifts[round]) & (n_bin - 1)) == bin) id[kept++] = t;
        }
        n = kept;
        from = id;
        c.key |= bin << shifts[round];
    }
    for (int32_t i = 0; i < n && c.count < need_count && c.mass < need_mass; i++) {
        c.id = id[i];
        c.count++;
        if (weight) c.mass += mass_of(weight[id[i]]);
    }
    return c;
}

static inline bool inside(const cut *c, float logit, int32_t id) {
    uint32_t key = ordered(logit);
    return key > c->key || (key == c->key && id <= c->id);
}

/* top_p of a mass, rounded up so that reaching it means reaching it. */
static uint64_t share_of(uint64_t mass, float top_p) {
    double need = (double)top_p * (double)mass;
    uint64_t whole = (uint64_t)need;
    whole += (double)whole < need;
    return whole < 1 ? 1 : whole > mass ? mass : whole;
}

/* How many tokens min_p leaves: those with (l - top) / T >= ln min_p. They are the first of the order. */
static uint64_t count_min_p(const float *logits, int32_t n_vocab, float top, const ern_sample *s) {
    float least = (float)sample_log((double)s->min_p);
    uint64_t n = 0;
    for (int32_t i = 0; i < n_vocab; i++) n += (logits[i] - top) / s->temperature >= least;
    return n;
}

/* The n best tokens, ids ascending, into list; their weights. Returns how many: those of -inf, whose mass is 0, may be
 * missing. */
static int32_t list_best(const float *logits, int32_t n_vocab, int32_t n, float top, float temperature, scratch *s) {
    int32_t have = 0, *list = s->list;
    if (n <= FEW) {
        int32_t best[FEW];
        have = top_ids(logits, n_vocab, n, best);
        for (int32_t i = 0; i < have; i++) {
            int32_t at = i;
            for (; at > 0 && list[at - 1] > best[i]; at--) list[at] = list[at - 1];
            list[at] = best[i];
        }
    } else {
        const cut c = find_cut(logits, NULL, n_vocab, NULL, (uint64_t)n, UINT64_MAX, s);
        for (int32_t i = 0; i < n_vocab; i++)
            if (inside(&c, logits[i], i)) list[have++] = i;
    }
    for (int32_t i = 0; i < have; i++) s->weight[list[i]] = sample_exp((logits[list[i]] - top) / temperature);
    return have;
}

/* The tokens whose logits are at least `bound`, ids ascending, into list: a run of the order. */
WIDE static int32_t list_from(const float *logits, int32_t n_vocab, float bound, int32_t *list) {
    const float below = nextafterf(bound, -INFINITY);
    int32_t have = 0;
    for (int32_t i = 0; i < n_vocab;) {
        if (n_vocab - i >= STEP && !any_above(logits + i, below)) {
            i += STEP;
            continue;
        }
        for (const int32_t end = n_vocab - i < STEP ? n_vocab : i + STEP; i < end; i++)
            if (logits[i] >= bound) list[have++] = i;
    }
    return have;
}

static uint64_t list_mass(const int32_t *list, int32_t n, const float *weight) {
    uint64_t sum = 0;
    for (int32_t i = 0; i < n; i++) sum += mass_of(weight[list[i]]);
    return sum;
}

/* docs/model.md 7, steps 8 to 11: min_p, top_k, top_p, draw. Exponentials of the whole vocabulary are taken only where
 * its sum is asked for. */
static int32_t draw(const float *logits, int32_t n_vocab, float top, const ern_sample *s, scratch *sc) {
    const bool k_on = s->top_k > 0 && s->top_k < n_vocab, min_on = s->min_p >= MIN_P_ON, p_on = s->top_p < 1.0f;
    const int32_t *list = NULL; /* of n ids ascending, NULL: all; none outside it is kept */
    int32_t n = n_vocab;
    uint64_t mass = 0; /* that top_p is a share of */
    cut c = {.key = 0, .id = INT32_MAX};
    if (k_on || min_on) {
        uint64_t limit = (uint64_t)n_vocab;
        if (min_on) limit = count_min_p(logits, n_vocab, top, s);
        if (k_on && (uint64_t)s->top_k < limit) limit = (uint64_t)s->top_k;
        if (p_on && !k_on) mass = weigh(logits, n_vocab, top, s->temperature, sc->weight);
        n = list_best(logits, n_vocab, (int32_t)limit, top, s->temperature, sc);
        list = sc->list;
        c.mass = list_mass(list, n, sc->weight);
        if (k_on) mass = c.mass; /* top_k renormalises, min_p does not */
    } else {
        c.mass = mass = weigh(logits, n_vocab, top, s->temperature, sc->weight);
    }
    if (p_on) {
        uint64_t need = share_of(mass, s->top_p);
        if (!list) { /* most often the best few hold it */
            n = list_from(logits, n_vocab, top - NEAR * s->temperature, sc->list);
            list = list_mass(sc->list, n, sc->weight) >= need ? sc->list : NULL;
            if (!list) n = n_vocab;
        }
        if (need < c.mass) c = find_cut(logits, list, n, sc->weight, UINT64_MAX, need, sc);
    }
    float u = ern_sample_uniform(s->seed, s->choice, s->position);
    uint64_t target = (uint64_t)(((unsigned __int128)(uint64_t)(u * 0x1p24f) * c.mass) >> UNIFORM_BITS);
    int32_t i = 0;
    if (!p_on && !list) { /* all are inside */
        for (uint64_t m; i + RUN <= n && target >= (m = mass_sum(sc->weight + i, RUN)); i += RUN) target -= m;
    }
    for (; i < n; i++) {
        const int32_t id = list ? list[i] : i;
        if (!inside(&c, logits[id], id)) continue;
        uint64_t m = mass_of(sc->weight[id]);
        if (target < m) return id;
        target -= m;
    }
    ern_assert_fail("the masses of the kept tokens add up to c.mass", __FILE__, __LINE__);
}

/* ---- logprobs --------------------------------------------------------------------------------------------------- */

WIDE static int32_t rank_of(const float *logits, int32_t n_vocab, int32_t id) {
    int32_t rank = 1;
    for (int32_t i = 0; i < id; i++) rank += logits[i] >= logits[id];
    for (int32_t i = id + 1; i < n_vocab; i++) rank += logits[i] > logits[id];
    return rank;
}

/* Fill logprob, rank and the top list from `logits` (the raw copy or the processed row). */
static void fill_logprobs(const float *logits, int32_t n_vocab, const ern_sample *s, float temperature, scratch *sc,
                          ern_sampled *out) {
    bool raw = s->mode == ERN_LOGPROBS_RAW || s->mode == ERN_LOGPROBS_RAW_LOGITS;
    bool plain = s->mode == ERN_LOGPROBS_RAW_LOGITS || s->mode == ERN_LOGPROBS_PROCESSED_LOGITS;
    if (raw && (plain || !s->logprob_scaled)) temperature = 1.0f;
    out->n_top = top_ids(logits, n_vocab, s->n_top, out->top_id);
    out->rank = rank_of(logits, n_vocab, out->token);
    if (plain) {
        out->logprob = logits[out->token] / temperature;
        for (int32_t i = 0; i < out->n_top; i++) out->top_logprob[i] = logits[out->top_id[i]] / temperature;
        return;
    }
    int32_t best = arg_max(logits, n_vocab);
    ERN_ASSERT(best >= 0); /* what spoils a raw row spoils the processed one too, and that was looked at */
    float top = logits[best];
    uint64_t mass = weigh(logits, n_vocab, top, temperature, sc->weight);
    cut c = {.key = 0, .id = INT32_MAX, .mass = mass};
    if (s->logprob_normalized && s->top_p < 1.0f)
        c = find_cut(logits, NULL, n_vocab, sc->weight, UINT64_MAX, share_of(mass, s->top_p), sc);
    double log_sum = sample_log((double)c.mass) - MASS_BITS * 0.6931471805599453;
    for (int32_t i = -1; i < out->n_top; i++) {
        int32_t id = i < 0 ? out->token : out->top_id[i];
        double lp = (double)((logits[id] - top) / temperature) - log_sum;
        float value = inside(&c, logits[id], id) ? (float)lp : -INFINITY;
        if (i < 0)
            out->logprob = value;
        else
            out->top_logprob[i] = value;
    }
    while (out->n_top > 0 && out->top_logprob[out->n_top - 1] == -INFINITY) out->n_top--;
}

/* ---- one row ---------------------------------------------------------------------------------------------------- */

void ern_sample_row(float *logits, int32_t n_vocab, const ern_sample *s, const int32_t *tail, int32_t n_tail,
                    void *memory, ern_sampled *out) {
    ERN_ASSERT(n_vocab > 0 && n_vocab <= ERN_VOCAB_MAX && s->n_top <= ERN_TOP_MAX && s->forced < n_vocab);
    scratch sc = scratch_split(memory, n_vocab);
    memset(out, 0, sizeof *out);
    bool raw = s->n_top >= 0 && (s->mode == ERN_LOGPROBS_RAW || s->mode == ERN_LOGPROBS_RAW_LOGITS);
    bool greedy = !(s->temperature >= GREEDY_BELOW) || s->top_p < GREEDY_BELOW || s->top_k == 1;

    if (s->mask) apply_mask(logits, n_vocab, s->mask);
    if (raw) memcpy(sc.raw, logits, (size_t)n_vocab * sizeof *logits);
    if (s->n_bias > 0) apply_bias(logits, n_vocab, s);
    if (s->repetition != 1.0f || s->frequency != 0.0f || s->presence != 0.0f)
        apply_penalties(logits, n_vocab, s, tail, n_tail, sc.count);
    if (s->n_ban > 0) apply_bans(logits, n_vocab, s);

    int32_t best = arg_max(logits, n_vocab);
    if (best < 0) {
        out->bad = true;
        return;
    }
    if (s->forced >= 0)
        out->token = s->forced;
    else
        out->token = greedy ? best : draw(logits, n_vocab, logits[best], s, &sc);
    if (s->n_top >= 0) fill_logprobs(raw ? sc.raw : logits, n_vocab, s, greedy ? 1.0f : s->temperature, &sc, out);
}
