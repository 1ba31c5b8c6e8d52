/* Sampling on the device against model/sample.c: every byte of ern_sampled must be equal, over random rows of many
 * kinds and random rules; so there is no bound to derive. Then the arg-max alone, and times. */
#include "check.h"

#include "model/sample.h"

enum {
    SEEN_FEW = 300,
    SEEN_MAX = 9000, /* more of them in a slice than a block lists */
    BIAS_MAX = 40,
    BAN_MAX = 24,
    OWN = 4, /* rows of a sequence in the step */
    V_CHECK = 103424,
    BAN_ALL = 4096, /* up to this vocabulary everything may be banned */
};

static int32_t below(int32_t n) { return (int32_t)(check_random64() % (uint64_t)n); }
static float unit(void) { return (float)(check_random64() >> 40) * 0x1p-24f; }
static bool one_in(int32_t n) { return below(n) == 0; }

/* ---- rows and rules -------------------------------------------------------------------------------------------- */

enum { SHARP, FLAT, TIES, HOLES, PEAK, EQUAL, HUGE_ONES, TINY_ONES, HAS_NAN, HAS_INF, NOTHING, KINDS };

static void random_row(float *l, int32_t V, int kind) {
    float spread = 4.0f + 16.0f * unit(), shift = one_in(2) ? 0.0f : 20.0f * check_random();
    if (kind == FLAT) spread = 0.05f + unit();
    if (kind == PEAK) spread = 6.0f;
    for (int32_t i = 0; i < V; i++) {
        uint64_t bits = check_random64(); /* one draw a logit: four 16-bit numbers, about normal */
        float g = 0.0f;
        for (int k = 0; k < 4; k++) g += (float)(int32_t)((bits >> 16 * k) & 0xffff) * 0x1p-16f;
        g = (g - 2.0f) * spread + shift;
        if (kind == TIES) g = floorf(g);
        if (kind == HOLES && bits % 3 == 0) g = -INFINITY;
        if (kind == EQUAL) g = shift;
        if (kind == HUGE_ONES) g *= 1e30f;
        if (kind == TINY_ONES) g *= 1e-39f;
        if (kind == NOTHING) g = -INFINITY;
        l[i] = g;
    }
    if (kind == PEAK)
        for (int i = 0; i < 40; i++) l[below(V)] = 12.0f + 6.0f * unit() + shift;
    if (kind == HOLES) l[below(V)] = shift;
    if (kind == HAS_NAN) l[below(V)] = one_in(2) ? NAN : -NAN;
    if (kind == HAS_INF) l[below(V)] = INFINITY;
    if (one_in(4)) l[below(V)] = -0.0f;
}

typedef struct lists {
    int32_t seen[SEEN_MAX], ban[BAN_ALL];
    ern_bias bias[BIAS_MAX];
    uint32_t mask[V_CHECK / 32 + 1];
    int32_t own[OWN];
    int32_t pos, row; /* row: of the sequence */
} lists;

static ern_sample random_rule(lists *m, int32_t V) {
    ern_sample s = {.temperature = 1, .top_p = 1, .repetition = 1, .forced = -1, .n_top = -1};
    switch (below(8)) {
    case 0: s.temperature = 0; break;
    case 1: s.temperature = 1; break;
    case 2: s.temperature = one_in(2) ? 3e-5f : 9e-6f; break;
    case 3: s.temperature = one_in(2) ? 2e5f : 50.0f; break;
    default: s.temperature = 0.05f + 2.0f * unit(); break;
    }
    if (one_in(2)) s.top_p = one_in(3) ? 0.95f : one_in(10) ? 1e-6f : one_in(4) ? 0.9999f : unit();
    if (one_in(3)) s.min_p = one_in(8) ? 1.0f : one_in(8) ? 1e-30f : 0.5f * unit() * unit() * unit();
    if (one_in(2)) s.top_k = one_in(10) ? 1 : one_in(2) ? 2 + below(60) : 2 + below(V + 3);
    s.seed = check_random64();
    s.choice = below(5);
    s.position = below(100000);
    m->row = below(OWN);
    s.n_seen = one_in(4) ? 0 : below(1 + (one_in(4) ? SEEN_MAX : SEEN_FEW));
    m->pos = s.n_seen - 2 + below(OWN + 4);
    if (m->pos < m->row) m->pos = m->row;
    const int32_t some = one_in(2) ? V : 1 + below(40 < V ? 40 : V); /* few ids: many occur again */
    for (int i = 0; i < SEEN_MAX; i++) m->seen[i] = below(some);
    for (int i = 0; i < OWN; i++) m->own[i] = below(some);
    s.seen = m->seen;
    s.n_prompt = below(s.n_seen + 5);
    if (one_in(3)) {
        if (!one_in(3)) s.repetition = 0.6f + unit();
        if (!one_in(3)) s.frequency = 2.0f * check_random();
        if (!one_in(3)) s.presence = 2.0f * check_random();
    }
    if (one_in(4)) {
        s.bias = m->bias;
        s.n_bias = 1 + below(BIAS_MAX);
        for (int i = 0; i < s.n_bias; i++) {
            m->bias[i].id = below(some);
            m->bias[i].add = one_in(8) ? 100.0f : one_in(8) ? -100.0f : 5.0f * check_random();
        }
    }
    if (one_in(4)) {
        s.ban = m->ban;
        s.n_ban = 1 + below(BAN_MAX);
        for (int i = 0; i < s.n_ban; i++) m->ban[i] = below(some);
        if (one_in(12) && V <= BAN_ALL) {
            s.n_ban = V;
            for (int32_t i = 0; i < V; i++) m->ban[i] = i;
        }
    }
    if (one_in(4)) {
        const int kind = below(5); /* about all, half, few, one id, rarely none */
        for (int i = 0; i < (V + 31) / 32; i++) {
            uint32_t w = (uint32_t)check_random64();
            if (kind == 0) w |= (uint32_t)check_random64() | (uint32_t)check_random64();
            if (kind == 2) w = one_in(40) ? 1u << (w & 31) : 0;
            if (kind > 2) w = 0;
            m->mask[i] = w;
        }
        const int32_t id = below(V);
        if (kind == 3 || !one_in(3)) m->mask[id / 32] |= 1u << (id % 32);
        s.mask = m->mask;
    }
    if (one_in(5)) s.forced = below(V);
    if (!one_in(3)) s.n_top = one_in(4) ? 0 : below(ERN_TOP_MAX + 1);
    s.mode = (ern_logprobs_mode)below(4);
    s.logprob_scaled = one_in(2);
    s.logprob_normalized = one_in(2);
    return s;
}

/* ---- the rule -------------------------------------------------------------------------------------------------- */

static void print_rule(const ern_sample *s, int32_t V, int32_t w, int kind) {
    printf(
        "      V %d row %d kind %d: T %g top_p %g min_p %g top_k %d rep %g freq %g pres %g seen %d prompt %d bias %d "
        "ban %d mask %d forced %d n_top %d mode %d scaled %d normalized %d\n",
        V, w, kind, (double)s->temperature, (double)s->top_p, (double)s->min_p, s->top_k, (double)s->repetition,
        (double)s->frequency, (double)s->presence, s->n_seen, s->n_prompt, s->n_bias, s->n_ban, s->mask != NULL,
        s->forced, s->n_top, (int)s->mode, s->logprob_scaled, s->logprob_normalized);
}

/* What rules are made: any; without what asks for more than a token; plain arg-max, on both paths. */
enum { ANY_RULE, TOKENS, GREEDY };

/* One launch of n rows of V; twice, as a replayed graph would. kind < 0: any. */
static void check_rows_of(int32_t V, int32_t n, int kind, int asked) {
    const bool greedy = asked == GREEDY;
    char name[96];
    snprintf(name, sizeof name, "sample V %d rows %d%s%s", V, n,
             greedy            ? " greedy"
             : asked == TOKENS ? " tokens"
                               : "",
             kind == FLAT ? " flat" : "");
    if (!check_begin(name)) return;
    const size_t row_bytes = (size_t)V * sizeof(float);
    float *logits = malloc((size_t)n * row_bytes), *one = malloc(row_bytes);
    lists *m = malloc((size_t)n * sizeof *m);
    ern_sample *s = malloc((size_t)n * sizeof *s);
    cu_rule *rules = malloc((size_t)n * sizeof *rules);
    ern_sampled *want = malloc((size_t)n * sizeof *want), *have = malloc((size_t)n * sizeof *have);
    int32_t *token = malloc((size_t)n * OWN * sizeof *token), *ids = malloc((size_t)n * sizeof *ids);
    int *kinds = malloc((size_t)n * sizeof *kinds);
    void *scratch = malloc(ern_sample_scratch_bytes(V));
    int64_t words = 7, at = 7; /* not from word 0 on */
    for (int32_t w = 0; w < n; w++) {
        kinds[w] = kind >= 0 ? kind : below(4) ? below(HAS_NAN) : below(KINDS);
        random_row(logits + (size_t)w * (size_t)V, V, kinds[w]);
        s[w] = random_rule(&m[w], V);
        if (asked == TOKENS) s[w].mask = NULL, s[w].n_top = -1;
        if (greedy) s[w] = (ern_sample){.top_p = 1, .repetition = 1, .forced = -1, .n_top = -1};
        words += cu_sample_aux_words(&s[w], V);
        memcpy(token + w * OWN, m[w].own, sizeof m[w].own);
    }
    int32_t *aux = malloc((size_t)words * sizeof *aux);
    for (int32_t w = 0; w < n; w++)
        at = cu_sample_prepare(&rules[w], &s[w], w * OWN + m[w].row, w * OWN, m[w].pos, V, aux, at);
    check_that("sample: words of aux", at == words, "differ from what was promised");

    float *d_logits = check_new(NULL, (size_t)n * row_bytes);
    cu_rule *d_rules = check_new(rules, (size_t)n * sizeof *rules);
    int32_t *d_aux = check_new(aux, (size_t)words * sizeof *aux);
    int32_t *d_token = check_new(token, (size_t)n * OWN * sizeof *token);
    void *d_scratch = check_new(NULL, (size_t)cu_sample_scratch_bytes(n, V));
    ern_sampled *d_out = check_new(NULL, (size_t)n * sizeof *d_out);
    int32_t *d_ids = check_new(NULL, (size_t)n * sizeof *d_ids);

    for (int32_t w = 0; w < n; w++) {
        const int32_t n_own = m[w].row + 1;
        int32_t n_tail = m[w].pos + 1 - s[w].n_seen;
        n_tail = n_tail < 0 ? 0 : n_tail > n_own ? n_own : n_tail;
        memcpy(one, logits + (size_t)w * (size_t)V, row_bytes);
        ern_sample_row(one, V, &s[w], m[w].own + n_own - n_tail, n_tail, scratch, &want[w]);
    }
    for (int turn = 0; turn < (greedy ? 3 : 2); turn++) { /* greedy: the third on the general path */
        int32_t n_wrong = 0, first = -1;
        CHECK_CUDA(cudaMemcpy(d_logits, logits, (size_t)n * row_bytes, cudaMemcpyHostToDevice));
        CHECK_CUDA(cudaMemset(d_out, 0xff, (size_t)n * sizeof *d_out));
        CHECK_CUDA(cudaMemset(d_ids, 0xff, (size_t)n * sizeof *d_ids));
        CHECK_CUDA(
            cu_sample(NULL, d_out, d_ids, d_logits, n, V, d_rules, d_aux, d_token, greedy && turn < 2, d_scratch));
        check_get(have, d_out, (size_t)n * sizeof *have);
        check_get(ids, d_ids, (size_t)n * sizeof *ids);
        for (int32_t w = 0; w < n; w++) {
            const bool same = !memcmp(&want[w], &have[w], sizeof want[w]) && ids[w] == want[w].token;
            if (!same && n_wrong++ < 3) {
                first = first < 0 ? w : first;
                print_rule(&s[w], V, w, kinds[w]);
                printf("      want token %d bad %d logprob %a rank %d n_top %d; have %d %d %a %d %d, ids %d\n",
                       want[w].token, want[w].bad, (double)want[w].logprob, want[w].rank, want[w].n_top, have[w].token,
                       have[w].bad, (double)have[w].logprob, have[w].rank, have[w].n_top, ids[w]);
                for (int i = 0; i < ERN_TOP_MAX; i++)
                    if (want[w].top_id[i] != have[w].top_id[i] ||
                        memcmp(&want[w].top_logprob[i], &have[w].top_logprob[i], sizeof(float)))
                        printf("      top %d: want %d %a have %d %a\n", i, want[w].top_id[i],
                               (double)want[w].top_logprob[i], have[w].top_id[i], (double)have[w].top_logprob[i]);
            }
        }
        char text[64];
        snprintf(text, sizeof text, "%d rows differ, the first is %d", n_wrong, first);
        check_that(name, n_wrong == 0, text);
    }
    if (greedy) { /* arg-max alone */
        CHECK_CUDA(cudaMemset(d_ids, 0xff, (size_t)n * sizeof *d_ids));
        CHECK_CUDA(cu_argmax(NULL, d_ids, d_logits, n, V, d_scratch));
        check_get(ids, d_ids, (size_t)n * sizeof *ids);
        bool good = true;
        for (int32_t w = 0; w < n; w++) good &= ids[w] == want[w].token;
        check_that("sample: arg-max", good, "differs");
    }
    check_free(d_logits);
    check_free(d_rules);
    check_free(d_aux);
    check_free(d_token);
    check_free(d_scratch);
    check_free(d_out);
    check_free(d_ids);
    free(logits);
    free(one);
    free(m);
    free(s);
    free(rules);
    free(want);
    free(have);
    free(token);
    free(ids);
    free(kinds);
    free(scratch);
    free(aux);
}

/* ---- times ----------------------------------------------------------------------------------------------------- */

/* Rows of a normal distribution; peaks: and 40 ids far above, as a trained model's rows have. */
static void time_rule(const char *name, int32_t n, const ern_sample *s, float spread, bool peaks, bool greedy) {
    enum { V = V_CHECK, TURNS = 20 };
    if (!check_begin(name)) return;
    const size_t row_bytes = (size_t)V * sizeof(float);
    float *logits = malloc((size_t)n * row_bytes);
    const int64_t words = cu_sample_aux_words(s, V) + 1;
    int32_t *aux = calloc((size_t)words, sizeof *aux), token = 5;
    cu_rule *rules = malloc((size_t)n * sizeof *rules);
    for (int32_t i = 0; i < V; i++) {
        uint64_t bits = check_random64();
        float g = 0.0f;
        for (int k = 0; k < 4; k++) g += (float)(int32_t)((bits >> 16 * k) & 0xffff) * 0x1p-16f;
        logits[i] = (g - 2.0f) * 1.73f * spread; /* standard deviation: spread */
    }
    for (int i = 0; peaks && i < 40; i++) logits[below(V)] = 3.5f * spread + 6.0f * unit();
    for (int32_t w = 0; w < n; w++) {
        memmove(logits + (size_t)w * V, logits, row_bytes);
        ern_sample mine = *s;
        mine.seed = (uint64_t)w;
        (void)cu_sample_prepare(&rules[w], &mine, 0, 0, s->n_seen, V, aux, 0);
    }
    float *d_logits = check_new(logits, (size_t)n * row_bytes);
    cu_rule *d_rules = check_new(rules, (size_t)n * sizeof *rules);
    int32_t *d_aux = check_new(aux, (size_t)words * sizeof *aux), *d_token = check_new(&token, sizeof token);
    void *d_scratch = check_new(NULL, (size_t)cu_sample_scratch_bytes(n, V));
    ern_sampled *d_out = check_new(NULL, (size_t)n * sizeof *d_out);
    int32_t *d_ids = check_new(NULL, (size_t)n * sizeof *d_ids);
    cudaEvent_t from, to;
    CHECK_CUDA(cudaEventCreate(&from));
    CHECK_CUDA(cudaEventCreate(&to));
    for (int i = -3; i < TURNS; i++) {
        if (i == 0) CHECK_CUDA(cudaEventRecord(from, NULL));
        CHECK_CUDA(cu_sample(NULL, d_out, d_ids, d_logits, n, V, d_rules, d_aux, d_token, greedy, d_scratch));
    }
    CHECK_CUDA(cudaEventRecord(to, NULL));
    CHECK_CUDA(cudaEventSynchronize(to));
    float ms = 0.0f;
    CHECK_CUDA(cudaEventElapsedTime(&ms, from, to));
    printf("      %-58s %8.1f us\n", name, (double)ms * 1000.0 / TURNS);
    CHECK_CUDA(cudaEventDestroy(from));
    CHECK_CUDA(cudaEventDestroy(to));
    check_free(d_logits);
    check_free(d_rules);
    check_free(d_aux);
    check_free(d_token);
    check_free(d_scratch);
    check_free(d_out);
    check_free(d_ids);
    free(logits);
    free(aux);
    free(rules);
}

static void times(void) {
    static int32_t seen[1000];
    const ern_sample plain = {.temperature = 1, .top_p = 1, .repetition = 1, .forced = -1, .n_top = -1};
    for (int i = 0; i < 1000; i++) seen[i] = below(V_CHECK);
    ern_sample s = {.top_p = 1, .repetition = 1, .forced = -1, .n_top = -1};
    time_rule("sample time: greedy, 1 row", 1, &s, 3, false, true);
    time_rule("sample time: greedy, 64 rows", 64, &s, 3, false, true);
    time_rule("sample time: greedy, 256 rows", 256, &s, 3, false, true);
    time_rule("sample time: greedy by the whole rule, 256 rows", 256, &s, 3, false, false);
    s = plain;
    time_rule("sample time: plain draw, 1 row", 1, &s, 3, false, false);
    time_rule("sample time: plain draw, 256 rows", 256, &s, 3, false, false);
    s.temperature = 0.8f;
    time_rule("sample time: plain draw, T 0.8, 256 rows", 256, &s, 3, false, false);
    s.temperature = 1.0f;
    s.top_p = 0.9f;
    time_rule("sample time: top_p, peaked row, 1 row", 1, &s, 3, true, false);
    time_rule("sample time: top_p, peaked rows, 256 rows", 256, &s, 3, true, false);
    time_rule("sample time: top_p, 1 row", 1, &s, 3, false, false);
    time_rule("sample time: top_p, 256 rows", 256, &s, 3, false, false);
    time_rule("sample time: top_p, flat row, 1 row", 1, &s, 1, false, false);
    time_rule("sample time: top_p, flat rows, 256 rows", 256, &s, 1, false, false);
    time_rule("sample time: top_p, very flat rows, 256 rows", 256, &s, 0.1f, false, false);
    s.top_k = 50;
    time_rule("sample time: top_k, top_p, 1 row", 1, &s, 3, false, false);
    time_rule("sample time: top_k, top_p, 256 rows", 256, &s, 3, false, false);
    s.repetition = 1.01f, s.presence = 0.01f, s.seen = seen, s.n_seen = 1000, s.n_prompt = 500;
    time_rule("sample time: top_k, top_p, penalties on 1000, 1 row", 1, &s, 3, false, false);
    time_rule("sample time: top_k, top_p, penalties on 1000, 256 rows", 256, &s, 3, false, false);
    s.top_k = 0;
    time_rule("sample time: top_p, penalties on 1000, peaked, 256 rows", 256, &s, 3, true, false);
    time_rule("sample time: top_p, penalties on 1000, 1 row", 1, &s, 3, false, false);
    time_rule("sample time: top_p, penalties on 1000, 256 rows", 256, &s, 3, false, false);
    static const int32_t rows[] = {4, 16, 32, 64, 128};
    for (int i = 0; i < (int)(sizeof rows / sizeof *rows); i++) {
        char name[96];
        s.top_k = 0;
        snprintf(name, sizeof name, "sample time: top_p, penalties on 1000, %d rows", rows[i]);
        time_rule(name, rows[i], &s, 3, false, false);
        s.top_k = 50;
        snprintf(name, sizeof name, "sample time: top_k, top_p, penalties on 1000, %d rows", rows[i]);
        time_rule(name, rows[i], &s, 3, false, false);
    }
    s.top_k = 0;
    s.n_top = 5;
    time_rule("sample time: top_p, penalties on 1000, 5 raw logprobs, 256 rows", 256, &s, 3, false, false);
}

void check_sampling(void) {
    static const int32_t rows[3] = {1, 3, 256}, small[3] = {1000, 1024, 999};
    for (int i = 0; i < 3; i++) {
        for (int k = 0; k < 3; k++) check_rows_of(small[k], rows[i], -1, GREEDY);
        check_rows_of(4096, rows[i], -1, GREEDY);
        check_rows_of(V_CHECK, rows[i] < 40 ? rows[i] : 40, -1, GREEDY);
    }
    for (int k = 0; k < 3; k++)
        for (int turn = 0; turn < 3; turn++)
            check_rows_of(small[k], turn == 0 ? 33 : turn == 1 ? 66 : 256, -1, ANY_RULE);
    for (int32_t V = 1; V < 50; V += 6) check_rows_of(V, 30, -1, ANY_RULE);
    check_rows_of(4096, 200, -1, ANY_RULE);
    check_rows_of(30001, 60, -1, ANY_RULE);
    for (int turn = 0; turn < 3; turn++) check_rows_of(V_CHECK, turn == 0 ? 1 : turn == 1 ? 33 : 70, -1, ANY_RULE);
    check_rows_of(V_CHECK, 40, FLAT, ANY_RULE);
    /* rows that stream past */
    check_rows_of(1000, 256, -1, TOKENS);
    check_rows_of(4096, 256, -1, TOKENS);
    check_rows_of(30000, 100, -1, TOKENS);
    check_rows_of(V_CHECK, 100, -1, TOKENS);
    check_rows_of(V_CHECK, 64, FLAT, TOKENS);
    times();
}
