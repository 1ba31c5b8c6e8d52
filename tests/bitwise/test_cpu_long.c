/* A long sequence, whose attention all workers share: the pieces that it is cut into change no bit, and what they make
 * is ref's.
 *
 * One sequence of six softmax blocks is served by one worker, alone, in chunks of 512; then with 2, 3 and 7 workers,
 * in other chunks (601: two passes of the feed-forward), alone and beside a second one of other length, rows of drafts
 * (4 in a step) included. The logits of every step's last row must have the bits of the first run. KV in bf16 and int8,
 * every level of this machine; cells that were not written hold NaN. Then once more with nobody looking, when queries
 * are rotated by who attends and, where they can, outputs leave as codes: what is sampled must be the same.
 *
 * Pieces of several blocks need more of them: four rows end a sequence of 64 blocks whose cells were filled from
 * outside, one by one with one worker, then as drafts with more, alone and beside eight rows of another sequence. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>

#include "backend/cpu/cpu_state.h"
#include "base/counter.h"
#include "made_model.h"
#include "quant_model.h"
#include "same_sampled.h"
#include "step.h"

enum { P = 64, PROMPT = 1400, REPLY = 6, LENGTH = PROMPT + REPLY, PAGES = (LENGTH + P - 1) / P, OTHER = 500 };

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
static const bool few = true;
#else
static const bool few = false;
#endif

typedef struct seen {
    int32_t pos;   /* of the row whose logits are wanted */
    int32_t row;   /* its index in want */
    float *logits; /* [REPLY + 1, V]; NULL: no probe */
    ern_sampled sampled[REPLY + 1];
} seen;

static void watch(void *ud, const char *stage, int32_t layer, int32_t row, const float *data, int32_t n_row,
                  int32_t n_col) {
    (void)layer, (void)n_row;
    const seen *s = ud;
    if (strcmp(stage, "logits") == 0 && row == s->row && s->pos >= PROMPT - 1)
        memcpy(s->logits + (size_t)(s->pos - PROMPT + 1) * (size_t)n_col, data, (size_t)n_col * sizeof *data);
}

static ern_backend *opened(const ern_backend_ops *ops, const ern_model *m, const ern_backend_options *o,
                           size_t *page_bytes) {
    ern_err err;
    ern_backend *b;
    ern_backend_plan plan;
    made_check(ops->plan(&plan, m, o, &err), &err, "plan");
    made_check(ops->open(&b, m, o, &err), &err, "open");
    *page_bytes = plan.page_bytes;
    return b;
}

/* Serve the sequence; n_split tells how many rows' attention was cut in all. */
static void serve(const ern_model *m, int32_t level, int32_t n_thread, bool int8, int32_t chunk, bool beside, seen *w,
                  int32_t *n_split) {
    static step s;
    static int32_t text[2][LENGTH + 1], page[2][STEP_PAGES];
    const ern_backend_options o = {.n_page = 2 * PAGES,
                                   .n_page_cell = P,
                                   .n_row_max = STEP_ROWS,
                                   .n_seq_max = 2,
                                   .n_want_max = STEP_ROWS,
                                   .n_len_max = LENGTH,
                                   .kv_dtype = int8 ? ERN_KV_I8 : ERN_KV_BF16,
                                   .n_thread = n_thread,
                                   .level = level,
                                   .mtp = m->has_mtp};
    size_t page_bytes;
    ern_backend *b = opened(&cpu_backend_ops, m, &o, &page_bytes);
    unsigned char *bad = malloc(page_bytes);
    memset(bad, 0xff, page_bytes);
    for (int32_t i = 0; i < o.n_page; i++) cpu_backend_ops.kv_write(b, &i, 1, bad);
    free(bad);
    for (int q = 0; q < 2; q++) {
        for (int i = 0; i <= LENGTH; i++)
            text[q][i] = (int32_t)(ern_counter64(3, (uint64_t)(q * 10000 + i)) % (uint64_t)m->config.n_vocab);
        for (int i = 0; i < PAGES; i++) page[q][i] = 2 * i + q;
    }
    if (w->logits) cpu_backend_ops.probe(b, watch, w);
    for (int32_t at = 0, other = 0; at < LENGTH;) {
        int32_t n = at >= PROMPT ? 1 : PROMPT - at < chunk ? PROMPT - at : chunk;
        if (at >= PROMPT && n_thread == 3) n = LENGTH - at < 4 ? LENGTH - at : 4; /* as drafts are verified */
        step_clear(&s);
        if (beside && other < OTHER) {
            const int32_t more = OTHER - other < 100 ? OTHER - other : 100;
            step_add(&s, text[1], other, other + more, page[1], P, false);
            other += more;
        }
        step_add(&s, text[0], at, at + n, page[0], P, at >= PROMPT);
        if (!m->has_mtp) s.in.next = NULL;
        w->row = s.in.n_want - 1;
        w->pos = at + n - 1;
        const ern_result r = step_run(b, &s, &o, m->config.n_vocab);
        if (w->pos >= PROMPT - 1) w->sampled[w->pos - PROMPT + 1] = r.sampled[w->row];
        *n_split += ((const cpu_backend *)(const void *)b)->n_split;
        at += n;
    }
    cpu_backend_ops.close(b);
}

static void check(const ern_model *m, int32_t level, bool int8) {
    const size_t V = (size_t)m->config.n_vocab;
    float *want = calloc((REPLY + 1) * V, sizeof *want), *have = calloc((REPLY + 1) * V, sizeof *have);
    seen plain = {.logits = want}, other = {.logits = have};
    int32_t n_split = 0;
    serve(m, level, 1, int8, 512, false, &plain, &n_split);
    assert_int_equal(n_split, 0); /* nothing to share */
    static const int32_t threads[] = {2, 3, 7}, chunk[] = {601, 401, 509};
    for (int i = 0; i < 6; i += level == ERN_CPU_PORTABLE || few ? 3 : 1) { /* the slow ones: alone and beside */
        n_split = 0;
        memcpy(have, want, (REPLY + 1) * V * sizeof *have); /* rows that a step of drafts does not show */
        serve(m, level, threads[i / 2], int8, chunk[(i + 1) % 3] - (i % 2 ? 100 : 0), i % 2, &other, &n_split);
        assert_true(n_split > 0);
        assert_memory_equal(have, want, (REPLY + 1) * V * sizeof *have);
    }
    for (int32_t n_thread = 1; n_thread <= 2; n_thread++) { /* no row is cut, then some are */
        seen unseen = {.logits = NULL};
        serve(m, level, n_thread, int8, 509, true, &unseen, &n_split);
        for (int i = 0; i <= REPLY; i++) assert_true(same_sampled(&plain.sampled[i], &unseen.sampled[i]));
    }
    free(want);
    free(have);
}

/* ---- pieces of several blocks ------------------------------------------------------------------------------------ */

enum { WIDE = 256, LONG = WIDE * STEP_PAGES, LAST = 4, MORE = 8 };

typedef struct lasts {
    int32_t want0; /* of the first row that is watched */
    float *logits; /* [LAST, V] */
} lasts;

static void watch_lasts(void *ud, const char *stage, int32_t layer, int32_t row, const float *data, int32_t n_row,
                        int32_t n_col) {
    (void)layer, (void)n_row;
    const lasts *w = ud;
    if (strcmp(stage, "logits") == 0 && row >= w->want0)
        memcpy(w->logits + (size_t)(row - w->want0) * (size_t)n_col, data, (size_t)n_col * sizeof *data);
}

/* Numbers of about 1 with both signs as bf16, as codes and as scales, other ones in each page. */
static void fill(ern_backend *b, int32_t n_page, size_t page_bytes) {
    uint64_t *page = malloc(page_bytes);
    for (int32_t p = 0; p < n_page; p++) {
        for (size_t i = 0; i < page_bytes / sizeof *page; i++)
            page[i] = (ern_counter64((uint64_t)p, i) & 0x807f807f807f807fu) | 0x3f003f003f003f00u;
        b->ops->kv_write(b, &p, 1, page);
    }
    free(page);
}

/* The pieces that were seen: how many; their blocks behind whole chains, a bit each; tiles cut into nothing but chains,
 * and those whose last one is short. */
typedef struct pieces {
    int n, loose, chains, short_chains;
} pieces;

/* The last rows of the sequence, `each` in a step, alone or beside so many of another one; a single one ends two blocks
 * before. p NULL: of ref as well, with linears that take f32. */
static void serve_lasts(const ern_backend_ops *ops, const ern_model *m, int32_t level, int32_t n_thread, bool int8,
                        int32_t each, int32_t beside, float *logits, pieces *p) {
    static step s;
    static int32_t text[LONG + 1], page[2][STEP_PAGES];
    const ern_backend_options o = {.n_page = 2 * STEP_PAGES,
                                   .n_page_cell = WIDE,
                                   .n_row_max = LAST + MORE,
                                   .n_seq_max = 2,
                                   .n_want_max = LAST + MORE,
                                   .n_len_max = LONG,
                                   .act_exact = !p,
                                   .kv_dtype = int8 ? ERN_KV_I8 : ERN_KV_BF16,
                                   .n_thread = n_thread,
                                   .level = level,
                                   .mtp = m->has_mtp};
    size_t page_bytes;
    ern_backend *b = opened(ops, m, &o, &page_bytes);
    fill(b, o.n_page, page_bytes);
    for (int i = 0; i <= LONG; i++) text[i] = (int32_t)(ern_counter64(4, (uint64_t)i) % (uint64_t)m->config.n_vocab);
    for (int i = 0; i < STEP_PAGES; i++) page[0][i] = 2 * i, page[1][i] = 2 * i + 1;
    lasts w = {.logits = logits};
    ops->probe(b, watch_lasts, &w);
    for (int32_t at = LONG - LAST; at < LONG; at += each, w.logits += (size_t)each * (size_t)m->config.n_vocab) {
        step_clear(&s);
        const int32_t end = beside == 1 ? LONG - 2 * WIDE : LONG;
        if (beside) step_add(&s, text, end - beside, end, page[1], WIDE, false);
        w.want0 = s.in.n_want;
        step_add(&s, text, at, at + each, page[0], WIDE, true);
        if (!m->has_mtp) s.in.next = NULL;
        (void)step_run(b, &s, &o, m->config.n_vocab);
        const cpu_backend *c = (const cpu_backend *)(const void *)b;
        for (const cpu_tile *t = p ? c->tile : NULL; p && t < c->tile + c->n_tile; t++) {
            if (t->slot < 0) continue;
            p->n++;
            if (t->block >= t->n_chained) p->loose |= t->n_chained > 0 ? 1 << t->n_block : 0;
            if (t->n_chained == t->stride) p->chains++, p->short_chains += t->n_block < CPU_ATTN_CHAIN;
        }
    }
    ops->close(b);
}

static void check_lasts(const ern_model *m, int32_t level, bool int8) {
    const size_t bytes = LAST * (size_t)m->config.n_vocab * sizeof(float);
    float *want = calloc(1, bytes), *have = calloc(1, bytes);
    pieces cuts = {0};
    serve_lasts(&cpu_backend_ops, m, level, 1, int8, 1, 0, want, &cuts);
    assert_int_equal(cuts.n, 0); /* nothing to share */
    static const int32_t threads[] = {2, 3, 7, 2}, each[] = {1, 4, 1, 2};
    for (int i = 0; i < 9; i += few ? 4 : 1) { /* the last: two rows, whose tiles are cut into chains alone */
        const int32_t beside = i == 8 ? 1 : i % 2 ? MORE : 0;
        memset(have, 0xff, bytes);
        serve_lasts(&cpu_backend_ops, m, level, threads[i / 2 % 4], int8, each[i / 2 % 4], beside, have, &cuts);
        assert_memory_equal(have, want, bytes);
    }
    assert_int_equal(cuts.loose, 2 + 4); /* one and two blocks behind chains */
    assert_true(cuts.chains > 0 && cuts.short_chains > 0);
    free(want);
    free(have);
}

/* The rows against ref, 16 chains of blocks. Attention makes some 6% of these logits. Queries and weights rounded to
 * bf16 move 2^-9 * sqrt(2) of that, 1.7e-4 of all, int8 less; a chain that is lost or joined twice is a sixteenth of
 * the positions, a quarter of the mean's noise: 1.5e-2. */
static void check_far(const ern_model *m, int32_t level, bool int8) {
    const size_t V = (size_t)m->config.n_vocab;
    float *want = calloc(LAST * V, sizeof *want), *have = calloc(LAST * V, sizeof *have);
    serve_lasts(ern_backend_find("ref"), m, -1, 1, int8, LAST, 0, want, NULL);
    serve_lasts(&cpu_backend_ops, m, level, 1, int8, LAST, 0, have, NULL);
    double off = 0, all = 0;
    for (size_t i = 0; i < LAST * V; i++) {
        off += pow((double)have[i] - (double)want[i], 2);
        all += pow((double)want[i], 2);
    }
    if (!(off < all * 1e-6)) fail_msg("level %d, int8 %d: rms %g of the logits", level, int8, sqrt(off / all));
    free(want);
    free(have);
}

/* ---- every level ------------------------------------------------------------------------------------------------- */

static void every_level(const char *shape, void (*f)(const ern_model *, int32_t, bool)) {
    made_model made = made_model_open(shape, false, 29);
    for (int32_t level = ERN_CPU_PORTABLE; level <= (int32_t)ern_cpu_level_here(); level++)
        for (int int8 = 0; int8 < 2 && (level == ERN_CPU_PORTABLE || level >= ERN_CPU_AVX512); int8++)
            f(made.model, level, int8);
    made_model_close(&made);
}
static void test_dense(void **state) { (void)state, every_level("tiny-dense", check); }
static void test_moe(void **state) { (void)state, every_level("tiny-moe", check); }
/* Outputs that leave as codes. */
static void test_wide(void **state) {
    (void)state;
    made_model made = made_model_open("tiny-wide", false, 29);
    quant_model *q = quant_model_make(made.model, (ern_quant_plan){ERN_QUANT_WINT8, ERN_QUANT_NONE, ERN_QUANT_NONE});
    for (int int8 = 0; int8 < 2; int8++) check(made.model, (int32_t)ern_cpu_level_here(), int8);
    quant_model_free(q);
    made_model_close(&made);
}
static void test_pieces(void **state) { (void)state, every_level("tiny-moe", check_lasts); }
static void test_far(void **state) { (void)state, every_level("tiny-dense", check_far); }

static void test_pages_refused(void **state) {
    (void)state;
    made_model made = made_model_open("tiny-dense", false, 29);
    static const int32_t cells[] = {7, 24, 4};
    for (int i = 0; i < 3; i++) {
        ern_err err;
        ern_backend_plan plan;
        const ern_backend_options o = {.n_page = 8,
                                       .n_page_cell = cells[i],
                                       .n_row_max = 8,
                                       .n_seq_max = 1,
                                       .n_want_max = 1,
                                       .n_len_max = 64,
                                       .level = -1};
        assert_int_equal(cpu_backend_ops.plan(&plan, made.model, &o, &err), ERN_ERR_USAGE);
        assert_non_null(strstr(err.text, "--block-size"));
    }
    made_model_close(&made);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_dense), cmocka_unit_test(test_moe),
                                       cmocka_unit_test(test_wide),  cmocka_unit_test(test_pieces),
                                       cmocka_unit_test(test_far),   cmocka_unit_test(test_pages_refused)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
