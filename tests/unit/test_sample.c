/* The sampling rule against a brute-force model in double precision (sort everything, add everything), over random
 * settings; then distributions, ties, forbidden and broken logits, every logprobs mode, and the bits themselves.
 *
 * Where the model and the rule may differ by rounding, a case is not judged if it falls within MARGIN of a boundary of
 * the model (of top_p, of min_p or of the draw), and such cases must be rare. MARGIN: a weight e^z is off by at most
 * (|z| + 2) 2^-23 relative (two roundings of z, one and a half ulp of exp); weights with |z| > 16 are below 1e-7 of the
 * best; so the shares of mass are off by less than 18 * 2^-23 = 2.2e-6, and 4e-6 leaves both sides their part. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/counter.h"
#include "model/sample.h"

enum { V_MAX = 103424 };
#define MARGIN 4e-6

static uint64_t rng_key, rng_index;
static uint64_t rnd(void) { return ern_counter64(rng_key, rng_index++); }
static int32_t below(int32_t n) { return (int32_t)(rnd() % (uint64_t)n); }
static float unit(void) { return (float)(rnd() >> 40) * 0x1p-24f; }

static const ern_sample plain = {.temperature = 1, .top_p = 1, .repetition = 1, .forced = -1, .n_top = -1};
static float *row, *kept_row;
static void *scratch;

/* Sample a copy of kept_row, with the scratch full of rubbish. */
static ern_sampled run(int32_t V, const ern_sample *s, const int32_t *tail, int32_t n_tail) {
    ern_sampled out;
    memcpy(row, kept_row, (size_t)V * sizeof *row);
    memset(scratch, (int)(rnd() & 255), ern_sample_scratch_bytes(V));
    ern_sample_row(row, V, s, tail, n_tail, scratch, &out);
    return out;
}

/* ---- the model -------------------------------------------------------------------------------------------------- */

typedef struct item {
    float logit;
    int32_t id;
} item;
static int by_logit(const void *pa, const void *pb) {
    const item *a = pa, *b = pb;
    if (a->logit != b->logit) return a->logit > b->logit ? -1 : 1;
    return a->id < b->id ? -1 : a->id > b->id;
}

typedef struct verdict {
    int32_t token;
    bool close; /* near a boundary: not judged */
    double *p;  /* [V] probabilities after all filters */
} verdict;

/* Steps 8 to 11 of docs/model.md 7 on processed logits. p is room for V doubles. */
static verdict model_draw(const float *l, int32_t V, const ern_sample *s, double *p) {
    static item *order;
    verdict v = {.token = -1, .p = p};
    order = realloc(order, (size_t)V * sizeof *order);
    double mass = 0, cum = 0, kept = 0;
    for (int32_t i = 0; i < V; i++) order[i] = (item){l[i], i};
    qsort(order, (size_t)V, sizeof *order, by_logit);
    for (int32_t i = 0; i < V; i++) p[i] = exp(((double)l[i] - (double)order[0].logit) / (double)s->temperature);
    for (int32_t i = 0; i < V; i++) mass += p[i];
    int32_t n = V;
    for (int32_t i = 0; i < V; i++) {
        v.close |= fabs(p[i] - (double)s->min_p) < MARGIN * (double)s->min_p;
        if (p[order[i].id] < (double)s->min_p && i < n) n = i;
    }
    if (s->top_k > 0 && s->top_k < V) {
        if (s->top_k < n) n = s->top_k;
        mass = 0;
        for (int32_t i = 0; i < n; i++) mass += p[order[i].id];
    }
    for (int32_t i = 0; i < n && s->top_p < 1; i++) {
        cum += p[order[i].id];
        v.close |= fabs(cum / mass - (double)s->top_p) < MARGIN;
        if (cum / mass >= (double)s->top_p) n = i + 1;
    }
    for (int32_t i = n; i < V; i++) p[order[i].id] = 0;
    for (int32_t i = 0; i < V; i++) kept += p[i];
    double target = (double)ern_sample_uniform(s->seed, s->choice, s->position);
    cum = 0;
    for (int32_t i = 0; i < V; i++) {
        p[i] /= kept;
        cum += p[i];
        v.close |= p[i] > 0 && fabs(cum - target) < MARGIN;
        if (v.token < 0 && cum > target) v.token = i;
    }
    return v;
}

static void random_row(int32_t V, float spread) {
    int style = below(4);
    for (int32_t i = 0; i < V; i++) {
        float g = (unit() + unit() + unit() - 1.5f) * spread;
        if (style == 1) g = floorf(g); /* ties */
        if (style == 2 && below(3) == 0) g = -INFINITY;
        if (style == 3) g = below(8) == 0 ? g : 0.0f;
        kept_row[i] = g;
    }
    kept_row[below(V)] = 0.25f; /* at least one that may be sampled */
}

static ern_sample random_setting(int32_t V) {
    ern_sample s = plain;
    s.temperature = 0.05f + 2.0f * unit();
    if (below(2)) s.top_p = 0.01f + 0.98f * unit();
    if (below(3) == 0) s.min_p = unit() * 0.5f;
    if (below(2)) s.top_k = 2 + below(V + 3);
    s.seed = rnd();
    s.choice = below(5);
    s.position = below(100000);
    return s;
}

static void matches_model(int32_t V, int n_case) {
    double *p = malloc((size_t)V * sizeof *p);
    int close = 0;
    for (int c = 0; c < n_case; c++) {
        random_row(V, 4.0f + 12.0f * unit());
        ern_sample s = random_setting(V);
        ern_sampled got = run(V, &s, NULL, 0);
        verdict want = model_draw(kept_row, V, &s, p);
        assert_false(got.bad);
        close += want.close;
        if (!want.close) assert_int_equal(got.token, want.token);
        assert_true(got.token >= 0 && got.token < V && kept_row[got.token] > -INFINITY);
    }
    assert_true(close <= n_case / 50 + 2);
    free(p);
}

static void test_small_vocabularies(void **state) {
    (void)state;
    for (int32_t V = 1; V <= 80; V++) matches_model(V, 60);
}
static void test_wide_rows(void **state) {
    (void)state;
    /* a wide flat row has a boundary of top_p every 1e-5 of mass, so many cases are close; the tie styles too: judge by
     * the set instead, with a peaked row */
    for (int c = 0; c < 12; c++) {
        static double p[V_MAX];
        for (int32_t i = 0; i < V_MAX; i++) kept_row[i] = (unit() + unit() + unit() - 1.5f) * 6.0f;
        for (int i = 0; i < 40; i++) kept_row[below(V_MAX)] = 12.0f + 6.0f * unit();
        ern_sample s = random_setting(V_MAX);
        s.temperature = 0.3f + 0.7f * unit();
        s.top_p = c & 1 ? 1.0f : 0.3f + 0.6f * unit();
        s.top_k = c & 2 ? 30 : 0;
        ern_sampled got = run(V_MAX, &s, NULL, 0);
        verdict want = model_draw(kept_row, V_MAX, &s, p);
        if (!want.close) assert_int_equal(got.token, want.token);
        assert_true(p[got.token] > 0 || want.close);
    }
}

/* ---- distributions ------------------------------------------------------------------------------------------------
 */

/* Chi-square of n draws against the model's probabilities. The seeds are fixed, so this passes always or never; the
 * limit is the 0.9999 quantile by Wilson and Hilferty, df (1 - 2/(9 df) + 3.72 sqrt(2/(9 df)))^3. */
static void chi_square(int32_t V, ern_sample s, int axis) {
    enum { N = 30000 };
    double p[64], sum = 0;
    int count[64] = {0}, df = -1;
    for (int i = 0; i < N; i++) {
        if (axis == 0) s.position = i;
        if (axis == 1) s.seed = (uint64_t)i;
        if (axis == 2) s.choice = i;
        count[run(V, &s, NULL, 0).token]++;
    }
    (void)model_draw(kept_row, V, &s, p);
    for (int32_t i = 0; i < V; i++) {
        if (p[i] == 0) {
            assert_int_equal(count[i], 0);
            continue;
        }
        double e = p[i] * N;
        if (e < 5) continue;
        sum += (count[i] - e) * (count[i] - e) / e;
        df++;
    }
    double a = 2.0 / (9.0 * df), b = 1 - a + 3.72 * sqrt(a);
    assert_true(df >= 1 && sum < df * b * b * b);
}

/* Where one way of finding the same tokens gives over to another: top_k by insertion or by radix, a nucleus within or
 * beyond the few temperatures that are looked at first, a draw that passes whole runs of tokens. */
static void test_seams(void **state) {
    (void)state;
    const int32_t V = 5000;
    double *p = malloc((size_t)V * sizeof *p);
    int close = 0, n = 0;
    for (int c = 0; c < 240; c++, n++) {
        random_row(V, c % 2 ? 2.0f : 30.0f);
        ern_sample s = plain;
        s.temperature = 0.3f + unit();
        s.seed = rnd();
        if (c % 3 == 0) s.top_k = 61 + below(8);
        if (c % 3 == 1) s.top_p = 0.5f + 0.49f * unit();
        if (c % 12 == 1) s.min_p = 0.3f * unit();
        ern_sampled got = run(V, &s, NULL, 0);
        verdict want = model_draw(kept_row, V, &s, p);
        close += want.close;
        if (!want.close) assert_int_equal(got.token, want.token);
    }
    assert_true(close <= n / 10);
    free(p);
}

static void test_distributions(void **state) {
    (void)state;
    for (int32_t i = 0; i < 24; i++) kept_row[i] = 0.2f * (float)(i % 13) - (float)(i == 7) * 2.0f;
    for (int axis = 0; axis < 3; axis++) {
        ern_sample s = plain;
        s.seed = 33;
        s.position = 17;
        chi_square(24, s, axis);
        s.temperature = 0.6f;
        chi_square(24, s, axis);
        s.top_p = 0.8f;
        chi_square(24, s, axis);
        s.top_k = 9;
        chi_square(24, s, axis);
        s.min_p = 0.3f;
        chi_square(24, s, axis);
    }
}

static void test_uniform(void **state) {
    (void)state;
    int bin[256] = {0};
    double sum = 0;
    for (int i = 0; i < 256 * 400; i++) {
        float u = ern_sample_uniform(7, i % 3, i);
        assert_true(u >= 0 && u < 1);
        bin[(int)(u * 256)]++;
    }
    for (int i = 0; i < 256; i++) sum += (bin[i] - 400.0) * (bin[i] - 400.0) / 400.0;
    assert_true(sum < 346); /* 0.9999 quantile at 255 degrees of freedom */
    assert_true(ern_sample_uniform(1, 0, 5) != ern_sample_uniform(2, 0, 5));
    assert_true(ern_sample_uniform(1, 0, 5) != ern_sample_uniform(1, 1, 5));
}

/* ---- greedy, ties, broken rows --------------------------------------------------------------------------------------
 */

static void test_greedy(void **state) {
    (void)state;
    for (int c = 0; c < 400; c++) {
        int32_t V = 1 + below(300), best = 0;
        random_row(V, 3.0f);
        for (int32_t i = 1; i < V; i++)
            if (kept_row[i] > kept_row[best]) best = i;
        ern_sample s = random_setting(V);
        switch (below(4)) {
        case 0: s.temperature = 0; break;
        case 1: s.temperature = 9e-6f; break;
        case 2: s.top_p = 0; break;
        default: s.top_k = 1; break;
        }
        assert_int_equal(run(V, &s, NULL, 0).token, best);
    }
}

static void test_broken_rows(void **state) {
    (void)state;
    for (int c = 0; c < 300; c++) {
        int32_t V = 1 + below(200), at = below(V), others[200];
        uint32_t mask[7] = {0};
        random_row(V, 3.0f);
        kept_row[at] = c & 1 ? NAN : INFINITY;
        if (c % 7 == 0) kept_row[at] = -NAN;
        ern_sample s = random_setting(V);
        if (c & 2) s.temperature = 0;
        if (c & 4) s.n_top = 3;
        if (c & 8) s.forced = below(V);
        if (c & 16) s.ban = &at, s.n_ban = 1; /* a ban does not hide it */
        if (c & 32) s.mask = mask;            /* nor does a mask */
        ern_sampled got = run(V, &s, NULL, 0);
        assert_true(got.bad);
        assert_int_equal(got.token, 0);
        kept_row[at] = 1.0f;
        s.ban = NULL, s.n_ban = 0, s.mask = NULL, s.forced = -1;
        assert_false(run(V, &s, NULL, 0).bad);
        for (int32_t i = 0; i < V; i++) others[i] = i;
        s.ban = others, s.n_ban = V; /* nothing left */
        assert_true(run(V, &s, NULL, 0).bad);
    }
}

static void test_forbidden_never_drawn(void **state) {
    (void)state;
    for (int c = 0; c < 3000; c++) {
        int32_t V = 2 + below(70), ban[70], n_ban = 0, seen = below(V);
        uint32_t mask[3];
        random_row(V, 1.0f);
        int32_t only = below(V);
        kept_row[only] = 0.0f;
        for (int i = 0; i < 3; i++) mask[i] = (uint32_t)rnd() | (uint32_t)rnd();
        mask[only / 32] |= 1u << (only % 32);
        for (int32_t i = 0; i < V; i++)
            if (i != only && below(2)) ban[n_ban++] = i;
        ern_bias bias = {n_ban ? ban[0] : only, 50.0f}; /* what is banned stays banned */
        ern_sample s = random_setting(V);
        if (c & 1) s.temperature = 0;
        s.mask = mask, s.ban = ban, s.n_ban = n_ban, s.bias = &bias, s.n_bias = 1;
        s.repetition = 1.3f, s.seen = &seen, s.n_seen = 1;
        int32_t t = run(V, &s, NULL, 0).token;
        assert_true(mask[t / 32] >> (t % 32) & 1);
        for (int32_t i = 0; i < n_ban; i++) assert_int_not_equal(t, ban[i]);
    }
}

/* ---- penalties and logprobs
 * ------------------------------------------------------------------------------------------ */

static void test_penalties(void **state) {
    (void)state;
    for (int c = 0; c < 500; c++) {
        enum { N = 40 };
        int32_t V = 3 + below(20), all[N], n_seen = below(N + 1), n_prompt = below(N + 5);
        float want[32];
        for (int i = 0; i < N; i++) all[i] = below(V);
        random_row(V, 5.0f);
        ern_bias bias = {below(V), unit() * 4 - 2};
        ern_sample s = plain;
        s.repetition = 0.5f + unit(), s.frequency = unit() * 2 - 1, s.presence = unit() * 2 - 1;
        s.seen = all, s.n_seen = n_seen, s.n_prompt = n_prompt, s.bias = &bias, s.n_bias = 1;
        for (int32_t i = 0; i < V; i++) {
            int generated = 0, any = 0;
            for (int j = 0; j < N; j++) any += all[j] == i, generated += all[j] == i && j >= n_prompt;
            want[i] = kept_row[i] + (i == bias.id ? bias.add : 0.0f);
            if (any) want[i] = want[i] < 0 ? want[i] * s.repetition : want[i] / s.repetition;
            if (generated) want[i] = want[i] - (float)generated * s.frequency - s.presence;
        }
        /* forced: the processed logit of one id, the same bits as the model above */
        s.forced = below(V), s.n_top = 0, s.mode = ERN_LOGPROBS_PROCESSED_LOGITS;
        ern_sampled got = run(V, &s, all + n_seen, N - n_seen);
        assert_memory_equal(&got.logprob, &want[s.forced], sizeof(float));
    }
}

/* One value of the mode, in double, from the rows before and after penalties. */
static double model_logprob(const float *raw, const float *done, int32_t V, const ern_sample *s, int32_t id,
                            double *z_out) {
    bool is_raw = s->mode == ERN_LOGPROBS_RAW || s->mode == ERN_LOGPROBS_RAW_LOGITS;
    bool is_logit = s->mode == ERN_LOGPROBS_RAW_LOGITS || s->mode == ERN_LOGPROBS_PROCESSED_LOGITS;
    const float *l = is_raw ? raw : done;
    double t = s->temperature < 1e-5f || s->top_k == 1 || s->top_p < 1e-5f ? 1.0 : (double)s->temperature;
    if (is_raw && (is_logit || !s->logprob_scaled)) t = 1.0;
    *z_out = 0;
    if (is_logit) return (double)l[id] / t;
    double top = -INFINITY, sum = 0;
    for (int32_t i = 0; i < V; i++) top = fmax(top, (double)l[i]);
    for (int32_t i = 0; i < V; i++) {
        bool in = true;
        if (s->logprob_normalized && s->top_p < 1) { /* inside when the mass strictly before it is short of top_p */
            double before = 0, all = 0;
            for (int32_t j = 0; j < V; j++) {
                double w = exp(((double)l[j] - top) / t);
                all += w;
                if (l[j] > l[i] || (l[j] == l[i] && j < i)) before += w;
            }
            in = before < (double)s->top_p * all;
        }
        if (in) sum += exp(((double)l[i] - top) / t);
        if (!in && i == id) return -INFINITY;
    }
    *z_out = ((double)l[id] - top) / t;
    return *z_out - log(sum);
}

static void test_logprobs(void **state) {
    (void)state;
    for (int c = 0; c < 2000; c++) {
        int32_t V = 2 + below(40), ban = below(V - 1), seen[6];
        float done[64];
        random_row(V, 8.0f);
        kept_row[V - 1] = 0.125f;
        for (int i = 0; i < 6; i++) seen[i] = below(V);
        ern_sample s = random_setting(V);
        if (below(5) == 0) s.temperature = 0;
        s.mode = (ern_logprobs_mode)below(4);
        s.logprob_scaled = below(2), s.logprob_normalized = below(2);
        s.n_top = below(ERN_TOP_MAX + 1);
        s.presence = 0.7f, s.seen = seen, s.n_seen = 6, s.ban = &ban, s.n_ban = 1;
        if (below(4) == 0) s.forced = below(V);
        memcpy(done, kept_row, (size_t)V * sizeof *done);
        for (int32_t i = 0; i < V; i++)
            for (int j = 0; j < 6; j++)
                if (seen[j] == i) {
                    done[i] = done[i] - 1.0f * 0.0f - 0.7f;
                    break;
                }
        done[ban] = -INFINITY;
        ern_sampled got = run(V, &s, NULL, 0);
        const float *l = s.mode == ERN_LOGPROBS_RAW || s.mode == ERN_LOGPROBS_RAW_LOGITS ? kept_row : done;
        int32_t rank = 1;
        for (int32_t i = 0; i < V; i++) rank += l[i] > l[got.token] || (l[i] == l[got.token] && i < got.token);
        assert_int_equal(got.rank, rank);
        for (int i = -1; i < got.n_top; i++) {
            double z, want = model_logprob(kept_row, done, V, &s, i < 0 ? got.token : got.top_id[i], &z);
            float have = i < 0 ? got.logprob : got.top_logprob[i];
            /* z: two roundings; the sum: MARGIN as at the top; the answer: half an ulp */
            double bound = fabs(z) * 0x1p-23 + MARGIN + fabs(want) * 0x1p-23;
            if (isinf(want))
                assert_true(have == -INFINITY);
            else
                assert_true(fabs((double)have - want) <= bound);
            if (i > 0)
                assert_true(l[got.top_id[i]] < l[got.top_id[i - 1]] ||
                            (l[got.top_id[i]] == l[got.top_id[i - 1]] && got.top_id[i] > got.top_id[i - 1]));
            if (i >= 0) { /* nothing better was left out */
                int32_t better = 0;
                for (int32_t j = 0; j < V; j++)
                    better += l[j] > l[got.top_id[i]] || (l[j] == l[got.top_id[i]] && j < got.top_id[i]);
                assert_int_equal(better, i);
            }
        }
        if (!s.logprob_normalized) { /* every finite logit up to n_top is listed */
            int32_t finite = 0;
            for (int32_t i = 0; i < V; i++) finite += l[i] > -INFINITY;
            assert_int_equal(got.n_top, s.n_top < finite ? s.n_top : finite);
        }
    }
}

/* The very bits, for any compiler and any -O: a hash over tokens and logprobs of rows made of integers only. */
static void test_bits(void **state) {
    (void)state;
    uint64_t hash = 0;
    for (int c = 0; c < 60; c++) {
        int32_t V = c < 50 ? 64 + c : V_MAX;
        for (int32_t i = 0; i < V; i++)
            kept_row[i] = (float)(int32_t)(ern_counter64((uint64_t)c, (uint64_t)i) >> 44) * 0x1p-16f;
        ern_sample s = plain;
        s.temperature = 0.25f * (float)(1 + c % 6);
        s.top_p = c % 3 ? 0.9f : 1.0f;
        s.top_k = c % 4 ? 0 : 20;
        s.min_p = c % 5 ? 0.0f : 0.05f;
        s.seed = (uint64_t)c, s.position = c;
        s.n_top = c % 21;
        s.mode = c & 1 ? ERN_LOGPROBS_RAW : ERN_LOGPROBS_PROCESSED;
        ern_sampled got = run(V, &s, NULL, 0);
        hash = ern_counter64(hash, (uint64_t)got.token);
        uint32_t bits;
        memcpy(&bits, &got.logprob, sizeof bits);
        hash = ern_counter64(hash, bits);
        for (int i = 0; i < got.n_top; i++) {
            memcpy(&bits, &got.top_logprob[i], sizeof bits);
            hash = ern_counter64(hash, bits ^ ((uint64_t)got.top_id[i] << 32));
        }
    }
    assert_int_equal(hash, 0x949b0d9e9bdf45ddull);
}

int main(void) {
    rng_key = 20250701;
    print_message("seed %llu\n", (unsigned long long)rng_key);
    row = malloc(V_MAX * sizeof *row);
    kept_row = malloc(V_MAX * sizeof *kept_row);
    scratch = malloc(ern_sample_scratch_bytes(V_MAX));
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_small_vocabularies),
        cmocka_unit_test(test_wide_rows),
        cmocka_unit_test(test_seams),
        cmocka_unit_test(test_distributions),
        cmocka_unit_test(test_uniform),
        cmocka_unit_test(test_greedy),
        cmocka_unit_test(test_broken_rows),
        cmocka_unit_test(test_forbidden_never_drawn),
        cmocka_unit_test(test_penalties),
        cmocka_unit_test(test_logprobs),
        cmocka_unit_test(test_bits),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    free(row);
    free(kept_row);
    free(scratch);
    return failed;
}
