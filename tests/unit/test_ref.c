/* ref itself: a row's bits do not depend on how rows are batched; ERN_PREV; pages read, written and copied, and
 * drawn as backend.h has it (cpu's too); the MTP layer's drafts under chunking; and what ern_batch_valid refuses. That
 * ref computes ERNIE-4.5 is shown by test_golden_tiny. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "backend/ref/ref.h"
#include "base/counter.h"
#include "kv_drawing.h"
#include "made_model.h"
#include "step.h"

enum { P = 16, N = 150, N_PAGE = 40, V = 1024 };

typedef struct bench {
    made_model m;
    ern_backend *b;
    ern_backend_options o;
} bench;

static bench bench_open(const char *shape, bool mtp, ern_kv_dtype kv) {
    bench x = {.m = made_model_open(shape, false, 3)};
    ern_err err;
    x.o = (ern_backend_options){.n_page = N_PAGE,
                                .n_page_cell = P,
                                .n_row_max = STEP_ROWS,
                                .n_seq_max = STEP_SEQS,
                                .n_want_max = STEP_ROWS,
                                .n_len_max = 256,
                                .kv_dtype = kv,
                                .level = -1,
                                .mtp = mtp};
    made_check(ref_backend_ops.open(&x.b, x.m.model, &x.o, &err), &err, "opening ref");
    return x;
}

static void bench_close(bench *x) {
    ref_backend_ops.close(x->b);
    made_model_close(&x->m);
}

static void make_text(int32_t *text, int n, uint64_t key) {
    for (int i = 0; i < n; i++) text[i] = (int32_t)(ern_counter64(key, (uint64_t)i) % V);
}

/* Logits of every position of one text, whoever else is in the step: the watched rows are those wanted. */
typedef struct gather {
    float logits[N][V], mtp[N][V];
    int32_t from, n; /* wanted row w is position from + w, for w < n */
} gather;

static void gather_fn(void *ud, const char *stage, int32_t layer, int32_t row, const float *data, int32_t n_row,
                      int32_t n_col) {
    gather *g = ud;
    (void)layer, (void)n_row;
    if (row >= g->n) return;
    if (!strcmp(stage, "logits")) memcpy(g->logits[g->from + row], data, (size_t)n_col * sizeof *data);
    if (!strcmp(stage, "mtp_logits")) memcpy(g->mtp[g->from + row], data, (size_t)n_col * sizeof *data);
}

/* Run the text in chunks; `crowd` puts up to two other sequences into every step. scatter shuffles its pages. */
static void run_text(bench *x, gather *g, const int32_t *text, int chunk, bool crowd, bool scatter, int32_t *draft) {
    static step s;
    int32_t page[STEP_PAGES] = {0}, other_page[STEP_PAGES] = {0}, other[200];
    make_text(other, 200, 99);
    for (int i = 0; i < 10; i++) page[i] = scatter ? (i * 7 + 5) % 20 : i;
    for (int i = 0; i < 10; i++) other_page[i] = 20 + i;
    x->b->ops->probe(x->b, gather_fn, g);
    for (int from = 0, k = 0; from < N; from += chunk, k++) {
        int to = from + chunk < N ? from + chunk : N;
        step_clear(&s);
        step_add(&s, text, from, to, page, P, true);
        if (crowd && k < 100) step_add(&s, other, k, k + 1, other_page, P, true);
        g->from = from, g->n = to - from;
        if (!x->o.mtp) s.in.next = NULL;
        ern_result r = step_run(x->b, &s, &x->o, V);
        if (draft) memcpy(draft + from, r.draft, (size_t)(to - from) * sizeof *draft);
    }
    x->b->ops->probe(x->b, NULL, NULL);
}

static void test_batch_shapes(void **state) {
    (void)state;
    static gather whole, part;
    static const int chunk[] = {1, 16, 17, 64, 149};
    int32_t text[N + 1], draft[N], draft_part[N];
    make_text(text, N + 1, 1);
    for (int kv = 0; kv < 2; kv++) {
        bench x = bench_open("tiny-moe", true, kv ? ERN_KV_F32 : ERN_KV_BF16);
        run_text(&x, &whole, text, N, false, false, draft);
        for (size_t i = 0; i < sizeof chunk / sizeof *chunk; i++) {
            for (int variant = 0; variant < 4; variant++) {
                if (variant && chunk[i] != 17) continue;
                memset(&part, 0, sizeof part);
                run_text(&x, &part, text, chunk[i], variant & 1, variant & 2, draft_part);
                assert_memory_equal(whole.logits, part.logits, sizeof whole.logits);
                assert_memory_equal(whole.mtp, part.mtp, sizeof whole.mtp);
                assert_memory_equal(draft, draft_part, sizeof draft);
            }
        }
        bench_close(&x);
    }
}

/* Drafts: the guess of row t must be the arg-max of its MTP logits, computed from the token at t + 1. When the token is
 * sampled here (next -1) the bits are those of the same token given. */
static void test_draft_of_sampled_token(void **state) {
    (void)state;
    static step s;
    static gather g;
    bench x = bench_open("tiny-moe", true, ERN_KV_BF16);
    int32_t text[32], page[STEP_PAGES] = {0, 1};
    make_text(text, 32, 8);
    x.b->ops->probe(x.b, gather_fn, &g);
    step_clear(&s);
    step_add(&s, text, 0, 20, page, P, false);
    s.next[19] = -1;
    g.from = 0, g.n = 1;
    ern_result r = step_run(x.b, &s, &x.o, V);
    int32_t token = r.sampled[0].token, guess = r.draft[0], best = 0;
    static float mtp[V];
    memcpy(mtp, g.mtp[0], sizeof mtp);
    for (int32_t i = 1; i < V; i++)
        if (mtp[i] > mtp[best]) best = i;
    assert_int_equal(guess, best);
    s.next[19] = token;
    r = step_run(x.b, &s, &x.o, V);
    assert_int_equal(r.draft[0], guess);
    assert_memory_equal(mtp, g.mtp[0], sizeof mtp);
    s.next[19] = token ? token - 1 : 1; /* and another token gives other logits */
    r = step_run(x.b, &s, &x.o, V);
    assert_memory_not_equal(mtp, g.mtp[0], sizeof mtp);
    bench_close(&x);
}

/* Two steps in flight, the second reading what the first samples; the first result outlives the second submit. */
static void test_prev(void **state) {
    (void)state;
    static step a, b;
    bench x = bench_open("tiny-dense", false, ERN_KV_BF16);
    int32_t text[3][12], page[3][STEP_PAGES] = {{0}, {1}, {2}}, want[3], given[3];
    ern_err err;
    ern_result r;
    step_clear(&a);
    for (int q = 0; q < 3; q++) {
        make_text(text[q], 12, (uint64_t)q + 40);
        step_add(&a, text[q], 0, 10, page[q], P, false);
    }
    a.in.next = NULL;
    r = step_run(x.b, &a, &x.o, V);
    for (int q = 0; q < 3; q++) given[q] = text[q][10] = r.sampled[q].token;
    step_clear(&b);
    for (int q = 0; q < 3; q++) step_add(&b, text[q], 10, 11, page[q], P, false);
    b.in.next = NULL;
    r = step_run(x.b, &b, &x.o, V);
    for (int q = 0; q < 3; q++) want[q] = r.sampled[q].token;

    for (int q = 0; q < 3; q++) b.token[q] = ERN_PREV(q);
    x.b->ops->submit(x.b, &a.in);
    x.b->ops->submit(x.b, &b.in);
    made_check(x.b->ops->wait(x.b, &r, &err), &err, "wait");
    for (int q = 0; q < 3; q++) assert_int_equal(r.sampled[q].token, given[q]);
    made_check(x.b->ops->wait(x.b, &r, &err), &err, "wait");
    for (int q = 0; q < 3; q++) assert_int_equal(r.sampled[q].token, want[q]);
    x.b->ops->submit(x.b, &a.in);
    x.b->ops->submit(x.b, &b.in);
    for (int q = 0; q < 3; q++) assert_int_equal(r.sampled[q].token, want[q]); /* still ours until the next wait */
    made_check(x.b->ops->wait(x.b, &r, &err), &err, "wait");
    made_check(x.b->ops->wait(x.b, &r, &err), &err, "wait");
    bench_close(&x);
}

/* The penalties see the tokens that are still in flight: prompt rows of this very step, and ERN_PREV. */
static void test_tail(void **state) {
    (void)state;
    static step s;
    bench x = bench_open("tiny-dense", false, ERN_KV_BF16);
    int32_t text[12], page[STEP_PAGES] = {0};
    make_text(text, 12, 4);
    for (int n_seen = 0; n_seen <= 10; n_seen++) {
        step_clear(&s);
        step_add(&s, text, 0, 10, page, P, false);
        s.in.next = NULL;
        ern_sample *p = &s.sample[0];
        p->seen = text, p->n_seen = n_seen, p->n_prompt = 4;
        p->repetition = 1.5f, p->presence = 0.5f, p->frequency = 0.25f;
        p->temperature = 1, p->seed = 9, p->n_top = 20, p->mode = ERN_LOGPROBS_PROCESSED;
        ern_result r = step_run(x.b, &s, &x.o, V);
        static ern_sampled first;
        if (n_seen == 0) first = r.sampled[0];
        assert_memory_equal(&first, r.sampled, sizeof first);
    }
    bench_close(&x);
}

static void test_pages(void **state) {
    (void)state;
    static gather before, after;
    static step s;
    for (int kv = ERN_KV_BF16; kv <= ERN_KV_F8; kv++) {
        static const int cell_bytes[] = {2, 4, 1, 1}; /* of a number; a cell of codes has a scale as well */
        bench x = bench_open("tiny-moe", true, (ern_kv_dtype)kv);
        ern_err err;
        ern_backend_plan plan;
        made_check(ref_backend_ops.plan(&plan, x.m.model, &x.o, &err), &err, "plan");
        const ern_config *c = &x.m.model->config;
        assert_int_equal(plan.page_bytes,
                         (c->n_layer + 1) * 2 * c->n_kv_head * P *
                             (c->n_head_dim * cell_bytes[kv] + (ern_kv_has_codes((ern_kv_dtype)kv) ? 4 : 0)));
        int32_t text[40], page[STEP_PAGES] = {3, 9}, moved[STEP_PAGES] = {11, 30};
        make_text(text, 40, 77);
        step_clear(&s);
        step_add(&s, text, 0, 20, page, P, false);
        (void)step_run(x.b, &s, &x.o, V);
        unsigned char *host = malloc(2 * plan.page_bytes), *again = malloc(2 * plan.page_bytes);
        x.b->ops->kv_read(x.b, page, 2, host);

        x.b->ops->probe(x.b, gather_fn, &before);
        before.from = 0, before.n = 1;
        step_clear(&s);
        step_add(&s, text, 20, 21, page, P, false);
        (void)step_run(x.b, &s, &x.o, V);

        /* pages written elsewhere, then copied once more inside: the same bytes, the same bits */
        int32_t far_away[2] = {38, 39};
        x.b->ops->kv_write(x.b, far_away, 2, host);
        x.b->ops->kv_copy(x.b, (const ern_page_pair[]){{38, 11}, {39, 30}}, 2);
        x.b->ops->kv_read(x.b, moved, 2, again);
        assert_memory_equal(host, again, 2 * plan.page_bytes);
        x.b->ops->probe(x.b, gather_fn, &after);
        after.from = 0, after.n = 1;
        step_clear(&s);
        step_add(&s, text, 20, 21, moved, P, false);
        (void)step_run(x.b, &s, &x.o, V);
        assert_memory_equal(before.logits[0], after.logits[0], sizeof before.logits[0]);
        assert_memory_equal(before.mtp[0], after.mtp[0], sizeof before.mtp[0]);
        free(host);
        free(again);
        bench_close(&x);
    }
}

/* Keys and values of a layer, as the probe shows them. */
enum { DRAWN = 20, DRAWN_LAYER = 1, DRAWN_MOST = DRAWN * 512 };
typedef struct drawn {
    float x[2][DRAWN_MOST];
} drawn;

static void drawn_fn(void *ud, const char *stage, int32_t layer, int32_t row, const float *data, int32_t n_row,
                     int32_t n_col) {
    drawn *d = ud;
    if (layer != DRAWN_LAYER || (strcmp(stage, "k") != 0 && strcmp(stage, "v") != 0)) return;
    assert_true((row + n_row) * n_col <= DRAWN_MOST);
    memcpy(d->x[*stage == 'v'] + row * n_col, data, (size_t)(n_row * n_col) * sizeof *data);
}

/* Pages hold what backend.h draws, of ref and of cpu. */
static void check_drawing(const char *name, ern_kv_dtype kv) {
    static drawn d;
    static step s;
    ern_backend *b;
    ern_err err;
    ern_backend_plan plan;
    bench x = bench_open("tiny-moe", false, kv);
    const ern_config *m = &x.m.model->config;
    const ern_backend_ops *ops = ern_backend_find(name);
    const bool codes = ern_kv_has_codes(kv);
    const size_t G = (size_t)m->n_kv_head, C = (size_t)m->n_head_dim, each = codes ? 1 : kv == ERN_KV_F32 ? 4 : 2;
    const size_t plane = P * C * each + (codes ? P * sizeof(float) : 0);
    int32_t text[DRAWN + 1], page[STEP_PAGES] = {3, 9};
    made_check(ops->plan(&plan, x.m.model, &x.o, &err), &err, "plan");
    made_check(ops->open(&b, x.m.model, &x.o, &err), &err, "open");
    assert_int_equal(plan.page_bytes, plane * 2 * G * (size_t)m->n_layer);
    make_text(text, DRAWN + 1, 78);
    step_clear(&s);
    step_add(&s, text, 0, DRAWN, page, P, false);
    s.in.next = NULL;
    ops->probe(b, drawn_fn, &d);
    (void)step_run(b, &s, &x.o, V);
    unsigned char *host = malloc(2 * plan.page_bytes);
    ops->kv_read(b, page, 2, host);
    for (size_t t = 0; t < DRAWN; t++)
        for (size_t w = 0; w < 2; w++)
            for (size_t g = 0; g < G; g++) {
                const size_t p = t % P;
                const unsigned char *at = host + t / P * plan.page_bytes + ((DRAWN_LAYER * 2 + w) * G + g) * plane;
                float scale = 1;
                if (codes) memcpy(&scale, at + P * C + p * sizeof scale, sizeof scale);
                for (size_t c = 0; c < C; c++) {
                    const float value = d.x[w][(t * G + g) * C + c];
                    const size_t e = kv_drawn_at((int)w, p, c, C, codes);
                    const ern_bf16 half = ern_bf16_from_f32(value);
                    if (kv == ERN_KV_BF16) assert_memory_equal(at + 2 * e, &half, 2);
                    if (kv == ERN_KV_F32) assert_memory_equal(at + 4 * e, &value, 4);
                    if (codes) {
                        const float stored = (float)((const int8_t *)at)[e] * scale;
                        assert_true(stored - value <= 0.501f * scale && value - stored <= 0.501f * scale);
                    }
                }
            }
    free(host);
    ops->close(b);
    bench_close(&x);
}

static void test_drawing(void **state) {
    (void)state;
    check_drawing("ref", ERN_KV_BF16);
    check_drawing("ref", ERN_KV_F32);
    check_drawing("ref", ERN_KV_I8);
    check_drawing("cpu", ERN_KV_BF16);
    check_drawing("cpu", ERN_KV_I8);
}

/* Each way to break a good batch is refused with a reason of its own. */
static void test_batch_valid(void **state) {
    (void)state;
    static step s;
    const ern_backend_options o = {
        .n_page = 8, .n_page_cell = 4, .n_row_max = 20, .n_seq_max = 3, .n_want_max = 20, .n_len_max = 24, .mtp = true};
    static const int32_t text[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
    static const int32_t page[2][STEP_PAGES] = {{5, 2, 7}, {0, 1}};
    for (int broken = -1; broken < 27; broken++) {
        const char *why = NULL;
        step_clear(&s);
        step_add(&s, text, 3, 10, page[0], 4, false);
        step_add(&s, text, 0, 5, page[1], 4, true);
        ern_sample *p = &s.sample[2];
        switch (broken) {
        case -1: break;
        case 0: s.in.n_row = 0; break;
        case 1: s.in.n_row = 21; break;
        case 2: s.in.n_seq = 4; break;
        case 3: s.in.n_want = 21; break;
        case 4: s.in.page = NULL; break;
        case 5: s.in.next = NULL; break;
        case 6: s.row0[1] = 0; break;
        case 7: s.row0[2] = 11; break;
        case 8: s.token[3] = 16; break;
        case 9: s.token[3] = ERN_PREV(20); break;
        case 10: s.next[3] = -2; break;
        case 11: s.pos[4]++; break;
        case 12: s.kv_len[0]++; break;
        case 13: s.page[1] = 8; break;
        case 14: s.cell[2]++; break;
        case 15: s.page[STEP_PAGES] = 2, s.cell[7] = 8, s.cell[8] = 9, s.cell[9] = 10, s.cell[10] = 11; break;
        case 16: s.want[2] = s.want[1]; break;
        case 17: s.want[5] = 12; break;
        case 18: p->temperature = -1; break;
        case 19: p->top_p = 1.5f; break;
        case 20: p->repetition = 0; break;
        case 21: p->position++; break;
        case 22: p->n_seen = 1; break;
        case 23: p->forced = 16; break;
        case 24: p->n_top = 21; break;
        case 25: s.in.n_page_max = 1; break;
        default: s.pos[0] = -1; break;
        }
        bool valid = ern_batch_valid(&s.in, &o, 16, &why);
        if (broken < 0 ? !valid : valid) fail_msg("case %d: %s", broken, why ? why : "accepted");
        if (broken >= 0) assert_non_null(why);
    }
    step_clear(&s);
    step_add(&s, text, 4, 6, page[0], 4, false);
    s.sample[0].presence = 1; /* what was said before the rows must be in seen */
    const char *why = NULL;
    assert_false(ern_batch_valid(&s.in, &o, 16, &why));
    s.sample[0].seen = text, s.sample[0].n_seen = 4;
    assert_true(ern_batch_valid(&s.in, &o, 16, &why));
}

static void test_backends(void **state) {
    (void)state;
    assert_ptr_equal(ern_backend_find("ref"), &ref_backend_ops);
    assert_non_null(ern_backend_find("cpu"));
    assert_null(ern_backend_find("cup"));
    made_model m = made_model_open("tiny-dense", false, 1);
    ern_backend *b;
    ern_err err;
    ern_backend_options o = {
        .n_page = 1 << 20, .n_page_cell = 1 << 10, .n_row_max = 1, .n_seq_max = 1, .n_want_max = 1, .n_len_max = 16};
    assert_int_equal(ref_backend_ops.open(&b, m.model, &o, &err), ERN_ERR_MEMORY); /* 2^30 cells: 192 GiB */
    assert_null(b);
    o.n_page = 1, o.mtp = true;
    assert_int_equal(ref_backend_ops.open(&b, m.model, &o, &err), ERN_ERR_USAGE);
    assert_non_null(strstr(err.text, "no MTP layer"));
    made_model_close(&m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_batch_shapes), cmocka_unit_test(test_draft_of_sampled_token),
        cmocka_unit_test(test_prev),         cmocka_unit_test(test_tail),
        cmocka_unit_test(test_pages),        cmocka_unit_test(test_batch_valid),
        cmocka_unit_test(test_backends),     cmocka_unit_test(test_drawing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
