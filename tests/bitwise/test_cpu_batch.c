/* The promise of house.md 3 at the backend's door: what a sequence gets does not depend on how it is served.
 *
 * One sequence is served plainly (alone, its prompt in one step, one thread, pages in order), then in every other way:
 * prompt cut at each size, 1 to 3 threads, scattered pages, other page sizes, among 63 neighbours whose caches hold
 * NaN, with two steps in flight, moved to other pages half way. Each time the residual of every position, the logits of
 * every sampled row, the tokens and the MTP drafts must have the bits of the plain run. Both shapes, both layouts, KV
 * in bf16 and int8, every level of this machine, and every format of quantized weights. Cells that the sequence has not
 * written hold NaN throughout. Some ways go without the probe and without MTP, as most servers do: there
 * queries are rotated by who attends and outputs leave as codes, which tiny-wide has two KV heads for. */
#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

#include "backend/cpu/cpu_state.h"
#include "base/counter.h"
#include "base/os.h"
#include "made_model.h"
#include "quant_model.h"
#include "same_sampled.h"

enum {
    PROMPT = 280, /* over a softmax block of 256: with more than one thread a late row is cut into pieces */
    REPLY = 8,
    LENGTH = PROMPT + REPLY,
    CROWD = 63,
    ROWS = 512,
    SEED = 20260707,
};

/* What a run left, all of it compared by the bit. */
typedef struct record {
    float *resid;  /* [LENGTH, D] after the last layer */
    float *logits; /* [REPLY + 1, V] */
    ern_sampled sampled[REPLY + 1];
    int32_t draft[REPLY + 1];
    ern_sampled *inside; /* [PROMPT] of rows of the prompt that were wanted beside its last one */
    bool has[PROMPT];    /* which of them */
} record;

/* How a sequence is served. */
typedef struct way {
    int32_t chunk; /* rows per prompt step */
    int32_t crowd; /* neighbours */
    bool scatter, overlap, move;
    bool unseen; /* without a probe: of the residual and the logits only what is sampled is compared */
    enum { LAST, SOME, EVERY } wants; /* rows of the prompt */
} way;

/* One step's place for the target, read by the probe on the computing thread. */
typedef struct place {
    int32_t row, pos, n, want; /* want < 0: not sampled */
    int32_t sampled;           /* index into record.logits */
} place;

typedef struct rig {
    const ern_model *m;
    ern_backend *b;
    int32_t P, pages_each, n_page;
    size_t page_bytes;
    record *rec;
    place place[LENGTH + 1];     /* of each step, in order of submits */
    int32_t n_submitted, n_seen; /* n_seen: steps whose first stage the probe saw; the computing thread's */
    int32_t table[LENGTH];       /* the target's pages */
    uint64_t drawn;
    int32_t token[ROWS], next[ROWS], pos[ROWS], cell[ROWS], want[ROWS], row0[CROWD + 2], kv_len[CROWD + 1];
    int32_t page[(CROWD + 1) * LENGTH];
    ern_sample sample[ROWS];
    int32_t target_want;      /* of the newest step */
    int32_t want_at[LENGTH];  /* the wanted row of its step that a position of the target is, -1: none */
    int32_t seen[LENGTH + 1]; /* the target's tokens as far as results have told */
} rig;

static uint64_t draw(rig *g) { return ern_counter64(SEED, g->drawn++); }
static int32_t prompt_token(const rig *g, int32_t pos) {
    return (int32_t)(ern_counter64(SEED ^ 1, (uint64_t)pos) % (uint64_t)g->m->config.n_vocab);
}

static void watch(void *ud, const char *stage, int32_t layer, int32_t row, const float *data, int32_t n_row,
                  int32_t n_col) {
    rig *g = ud;
    if (strcmp(stage, "embed") == 0) g->n_seen++;
    const place *p = &g->place[g->n_seen - 1];
    if (strcmp(stage, "resid") == 0 && layer == g->m->config.n_layer - 1) {
        assert_true(p->row + p->n <= n_row);
        memcpy(g->rec->resid + (size_t)p->pos * (size_t)n_col, data + (size_t)p->row * (size_t)n_col,
               (size_t)p->n * (size_t)n_col * sizeof *data);
    }
    if (strcmp(stage, "logits") == 0 && row == p->want)
        memcpy(g->rec->logits + (size_t)p->sampled * (size_t)n_col, data, (size_t)n_col * sizeof *data);
}

static void add_want(rig *g, ern_batch *in, int32_t row, uint64_t seed) {
    const int32_t n = g->pos[row] + 1, n_seen = n < PROMPT ? n : PROMPT;
    g->sample[in->n_want] = (ern_sample){.temperature = 0.9f,
                                         .top_p = 0.95f,
                                         .top_k = 50,
                                         .repetition = 1.2f,
                                         .seed = seed,
                                         .position = n,
                                         .seen = g->seen,
                                         .n_seen = n_seen,
                                         .n_prompt = n_seen,
                                         .forced = -1,
                                         .n_top = 5};
    g->want[in->n_want++] = row;
}

/* One sequence's rows and pages, appended to the step. */
static void add_seq(rig *g, ern_batch *in, const int32_t *page, int32_t pos, int32_t n, bool want, uint64_t seed) {
    const int32_t s = in->n_seq++;
    for (int32_t i = 0; i < n; i++) {
        const int32_t r = in->n_row++, p = pos + i;
        g->pos[r] = p;
        g->cell[r] = page[p / g->P] * g->P + p % g->P;
        g->token[r] = prompt_token(g, p + (int32_t)seed);
        g->next[r] = prompt_token(g, p + 1 + (int32_t)seed);
    }
    if (want) {
        g->next[in->n_row - 1] = -1;
        add_want(g, in, in->n_row - 1, seed);
    }
    g->kv_len[s] = pos + n;
    g->row0[s + 1] = in->n_row;
    memcpy(g->page + s * g->pages_each, page, (size_t)g->pages_each * sizeof *page);
}

/* A neighbour: 1 to 3 rows somewhere in two pages of its own. */
static void add_neighbour(rig *g, ern_batch *in, int32_t who) {
    int32_t page[LENGTH] = {0};
    page[0] = g->n_page - 1 - 2 * who;
    page[1] = page[0] - 1;
    const int32_t n = 1 + (int32_t)(draw(g) % 3), most = 2 * g->P - n < LENGTH - n ? 2 * g->P - n : LENGTH - n;
    add_seq(g, in, page, (int32_t)(draw(g) % (uint64_t)(most + 1)), n, draw(g) % 4 != 0, draw(g) % 1000);
}

/* Submit rows pos..pos+n-1 of the target, token >= 0 or ERN_PREV for a reply's single row. */
static void serve(rig *g, const way *w, int32_t pos, int32_t n, bool want, int32_t token) {
    ern_batch in = {.n_page_max = g->pages_each,
                    .token = g->token,
                    .next = g->next,
                    .pos = g->pos,
                    .cell = g->cell,
                    .row0 = g->row0,
                    .kv_len = g->kv_len,
                    .page = g->page,
                    .want = g->want,
                    .sample = g->sample};
    const int32_t before = w->crowd ? (int32_t)(draw(g) % (uint64_t)(w->crowd + 1)) : 0;
    for (int32_t i = 0; i < before; i++) add_neighbour(g, &in, i);
    place *p = &g->place[g->n_submitted++];
    *p = (place){in.n_row, pos, n, -1, pos + n - PROMPT};
    add_seq(g, &in, g->table, pos, n, false, 0);
    for (int32_t i = 0; i < n; i++) {
        const bool last = i == n - 1 && want, inside = i < n - 1 || !want;
        const bool is_wanted = last || (inside && (w->wants == EVERY || (w->wants == SOME && draw(g) % 3 == 0)));
        g->want_at[pos + i] = is_wanted && !last ? in.n_want : -1;
        if (last) p->want = in.n_want, g->next[p->row + i] = -1;
        if (is_wanted) add_want(g, &in, p->row + i, 0);
    }
    g->target_want = p->want;
    if (pos >= PROMPT) {
        g->token[p->row] = token;
        g->sample[p->want].n_seen = token < 0 ? pos : pos + 1; /* what is still in flight the backend adds itself */
    }
    for (int32_t i = before; i < w->crowd; i++) add_neighbour(g, &in, i);
    ern_backend_options o = {.n_page = g->n_page,
                             .n_page_cell = g->P,
                             .n_row_max = ROWS,
                             .n_seq_max = CROWD + 1,
                             .n_want_max = ROWS,
                             .n_len_max = LENGTH,
                             .mtp = g->m->has_mtp};
    const char *why = "";
    if (!ern_batch_valid(&in, &o, g->m->config.n_vocab, &why)) fail_msg("the test's own batch is wrong: %s", why);
    g->b->ops->submit(g->b, &in);
}

/* Wait for the oldest step; its sampled row, if any, into the record. */
static int32_t collect(rig *g, int32_t step) {
    ern_result out;
    ern_err err;
    made_check(g->b->ops->wait(g->b, &out, &err), &err, "wait");
    const place *p = &g->place[step];
    for (int32_t i = p->pos; i < p->pos + p->n; i++)
        if (g->want_at[i] >= 0) g->rec->inside[i] = out.sampled[g->want_at[i]], g->rec->has[i] = true;
    if (p->want < 0) return -1;
    assert_false(out.sampled[p->want].bad);
    g->rec->sampled[p->sampled] = out.sampled[p->want];
    g->seen[p->pos + p->n] = out.sampled[p->want].token;
    g->rec->draft[p->sampled] = out.draft ? out.draft[p->want] : -1;
    return out.sampled[p->want].token;
}

/* A page that is NaN as bf16 as well as where int8 scales lie, in whatever order they come. */
static unsigned char *bad_page(const rig *g) {
    unsigned char *bad = malloc(g->page_bytes);
    memset(bad, 0xff, g->page_bytes);
    return bad;
}

/* NaN into every page. */
static void poison(rig *g) {
    unsigned char *bad = bad_page(g);
    for (int32_t i = 0; i < g->n_page; i++) g->b->ops->kv_write(g->b, &i, 1, bad);
    free(bad);
}

/* The first pages of the pool in order, or any of the lower half shuffled; neighbours own the upper end. */
static void lay_pages(rig *g, bool scatter) {
    const int32_t lower = 2 * g->pages_each;
    int32_t order[2 * LENGTH];
    for (int32_t i = 0; i < lower; i++) order[i] = i;
    for (int32_t i = lower - 1; scatter && i > 0; i--) {
        const int32_t j = (int32_t)(draw(g) % (uint64_t)(i + 1)), kept = order[i];
        order[i] = order[j], order[j] = kept;
    }
    memcpy(g->table, order, (size_t)g->pages_each * sizeof *order);
}

/* To other pages: half by a copy inside, half through host memory, or all by copies while a step is in flight; the old
 * ones become NaN, by a copy of the page that nobody uses. */
static void move_pages(rig *g, bool in_flight) {
    unsigned char *host = malloc(g->page_bytes);
    const int32_t bad = 2 * g->pages_each;
    bool used[4 * LENGTH] = {false};
    for (int32_t i = 0; i < g->pages_each; i++) used[g->table[i]] = true;
    for (int32_t i = 0, to = 0; i < g->pages_each; i++) {
        while (used[to]) to++;
        const ern_page_pair pair = {g->table[i], to};
        if (in_flight || i >= g->pages_each / 2) {
            g->b->ops->kv_copy(g->b, &pair, 1);
        } else {
            g->b->ops->kv_read(g->b, &pair.from, 1, host);
            g->b->ops->kv_write(g->b, &pair.to, 1, host);
        }
        g->b->ops->kv_copy(g->b, &(ern_page_pair){bad, pair.from}, 1);
        g->table[i] = to++;
    }
    free(host);
}

static void run(rig *g, const way *w, record *rec) {
    g->rec = rec;
    g->n_submitted = g->n_seen = 0;
    for (int32_t i = 0; i < PROMPT; i++) g->seen[i] = prompt_token(g, i);
    poison(g);
    lay_pages(g, w->scatter);
    if (!w->unseen) g->b->ops->probe(g->b, watch, g);
    int32_t token = -1, step = 0;
    for (int32_t at = 0; at < PROMPT; at += w->chunk) {
        const int32_t n = PROMPT - at < w->chunk ? PROMPT - at : w->chunk;
        serve(g, w, at, n, at + n == PROMPT, -1);
        if (!w->overlap || at + n < PROMPT) token = collect(g, step++);
        if (w->move && at <= PROMPT / 2 && at + n > PROMPT / 2 && at + n < PROMPT) move_pages(g, false);
    }
    for (int32_t i = 0; i < REPLY; i++) {
        serve(g, w, PROMPT + i, 1, true, w->overlap ? ERN_PREV(g->target_want) : token);
        token = collect(g, step++);
        if (w->move && i == REPLY / 2) move_pages(g, w->overlap);
    }
    if (w->overlap) (void)collect(g, step++);
    g->b->ops->probe(g->b, NULL, NULL);
}

static record record_open(const ern_model *m) {
    record r = {.resid = calloc((size_t)LENGTH * (size_t)m->config.n_hidden, sizeof(float)),
                .logits = calloc((size_t)(REPLY + 1) * (size_t)m->config.n_vocab, sizeof(float)),
                .inside = calloc(PROMPT, sizeof(ern_sampled))};
    assert_non_null(r.resid);
    assert_non_null(r.inside);
    assert_non_null(r.logits);
    return r;
}
static void record_close(record *r) {
    free(r->resid);
    free(r->logits);
    free(r->inside);
}

/* What computes. */
typedef struct setup {
    const ern_model *m;
    int32_t level;
    bool act_exact, kv_int8;
} setup;

static void rig_open(rig *g, const setup *s, int32_t n_thread, int32_t P, bool mtp) {
    ern_err err;
    const ern_model *m = s->m;
    memset(g, 0, sizeof *g);
    g->m = m;
    g->P = P;
    g->pages_each = (LENGTH + P - 1) / P;
    g->n_page = 2 * g->pages_each + 1 + 2 * CROWD;
    ern_backend_options o = {.n_page = g->n_page,
                             .n_page_cell = P,
                             .n_row_max = ROWS,
                             .n_seq_max = CROWD + 1,
                             .n_want_max = ROWS,
                             .n_len_max = LENGTH,
                             .kv_dtype = s->kv_int8 ? ERN_KV_I8 : ERN_KV_BF16,
                             .n_thread = n_thread,
                             .level = s->level,
                             .act_exact = s->act_exact,
                             .mtp = mtp};
    ern_backend_plan plan;
    made_check(cpu_backend_ops.plan(&plan, m, &o, &err), &err, "plan");
    made_check(cpu_backend_ops.open(&g->b, m, &o, &err), &err, "open");
    g->page_bytes = plan.page_bytes;
    const size_t step = (size_t)plan.page_step, taken = ((size_t)g->n_page + step - 1) / step * step;
    assert_int_equal(((const cpu_backend *)(const void *)g->b)->kv_bytes, taken * g->page_bytes); /* as planned */
}

static void same(const rig *g, const record *want, const record *got, const way *w, const char *what) {
    const int32_t chunk = w->chunk;
    for (size_t i = 0; i <= REPLY; i++)
        if (!same_sampled(&want->sampled[i], &got->sampled[i]))
            fail_msg("%s, chunk %d: reply token %zu is %d (logprob %a), expected %d (%a)", what, chunk, i,
                     got->sampled[i].token, (double)got->sampled[i].logprob, want->sampled[i].token,
                     (double)want->sampled[i].logprob);
    int32_t n_inside = 0;
    for (size_t i = 0; i < PROMPT; i++) {
        if (!want->has[i] || !got->has[i]) continue;
        n_inside++;
        if (!same_sampled(&want->inside[i], &got->inside[i]))
            fail_msg("%s, chunk %d: what is sampled at position %zu of the prompt differs", what, chunk, i);
    }
    assert_true(n_inside > 0 || w->wants != SOME);
    if (w->unseen) return;
    const size_t D = (size_t)g->m->config.n_hidden, V = (size_t)g->m->config.n_vocab;
    for (size_t i = 0; i < LENGTH; i++)
        if (memcmp(want->resid + i * D, got->resid + i * D, D * sizeof(float)) != 0)
            fail_msg("%s, chunk %d: the residual of position %zu differs", what, chunk, i);
    for (size_t i = 0; i <= REPLY; i++) {
        if (memcmp(want->logits + i * V, got->logits + i * V, V * sizeof(float)) != 0)
            fail_msg("%s, chunk %d: the logits of reply token %zu differ", what, chunk, i);
        if (want->draft[i] != got->draft[i])
            fail_msg("%s, chunk %d: draft %zu is %d, expected %d", what, chunk, i, got->draft[i], want->draft[i]);
    }
}

static void try_way(rig *g, const record *want, way w, const char *what) {
    record got = record_open(g->m);
    run(g, &w, &got);
    same(g, want, &got, &w, what);
    record_close(&got);
}

/* How much is tried. The prompt is cut at each size from first up to `each`, then at every jump-th; in a crowd at sizes
 * from `crowd` on. brief: with 3 threads only, and in one crowd instead of each size of batch. */
typedef struct effort {
    int32_t first, each, jump, crowd;
    bool brief;
} effort;

/* Less at the lower levels, which share the step, and under a sanitizer, which looks for races and bad reads and not
 * for bits: there every kind of way once or twice, at the best level, for some of the formats. */
static const effort brief = {100, 100, 139, 137, true};
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define best_level brief
#define int8_level brief
#define quant_level brief
#define wide_level brief
static const bool few = true;
#else
static const effort best_level = {1, 40, 13, 5, false}, int8_level = {1, 4, 47, 47, false};
static const effort quant_level = {1, 14, 97, 47, false}, wide_level = {90, 90, 97, 137, false};
static const bool few = false;
#endif

/* Rows of which none is wanted leave nothing for the last layer's attention. */
static void check_leaves(rig *g) {
    record r = record_open(g->m);
    g->rec = &r;
    g->n_submitted = 0;
    lay_pages(g, false);
    serve(g, &(way){.chunk = 50, .unseen = true}, 0, 50, false, -1);
    (void)collect(g, 0);
    assert_int_equal(((const cpu_backend *)(const void *)g->b)->n_tile, 0);
    record_close(&r);
}

static void check_setup(const setup *s, const effort *much) {
    rig *g = malloc(sizeof *g);
    record plain = record_open(s->m);
    rig_open(g, s, 1, 16, s->m->has_mtp);
    run(g, &(way){.chunk = PROMPT}, &plain);
    for (int32_t chunk = much->first; chunk < PROMPT; chunk += chunk < much->each ? 1 : much->jump)
        try_way(g, &plain, (way){.chunk = chunk}, "chunked");
    try_way(g, &plain, (way){.chunk = 64, .scatter = true}, "scattered");
    g->b->ops->close(g->b);
    static const int32_t cells[] = {16, 64, 48}, batch[] = {2, 3, 7, 16, 33};
    for (int32_t n_thread = much->brief ? 3 : 2; n_thread <= 3; n_thread++) {
        rig_open(g, s, n_thread, cells[n_thread - 1], s->m->has_mtp);
        try_way(g, &plain, (way){.chunk = PROMPT}, "threads");
        assert_int_equal(((const cpu_backend *)(const void *)g->b)->n_split, 1); /* the last row over two blocks */
        try_way(g, &plain, (way){.chunk = 50, .overlap = true}, "two in flight");
        try_way(g, &plain, (way){.chunk = 40, .scatter = true, .move = true}, "moved");
        for (int32_t chunk = much->crowd; chunk < PROMPT; chunk = chunk * 5 + 2)
            try_way(g, &plain, (way){.chunk = chunk, .crowd = CROWD, .scatter = true}, "in a crowd");
        try_way(g, &plain, (way){.chunk = 100, .crowd = CROWD, .overlap = true}, "in a crowd, two in flight");
        for (size_t i = 0; !much->brief && i < sizeof batch / sizeof *batch; i++)
            try_way(g, &plain, (way){.chunk = 200, .crowd = batch[i] - 1, .scatter = true}, "in a batch");
        g->b->ops->close(g->b);
    }
    /* Where nobody looks and nothing is drafted, only wanted rows go on behind the last layer's keys and values. */
    record every = record_open(s->m);
    for (int32_t n_thread = much->brief ? 3 : 1; n_thread <= 3; n_thread++) {
        rig_open(g, s, n_thread, cells[n_thread - 1], false);
        check_leaves(g);
        if (!every.has[0]) run(g, &(way){.chunk = PROMPT, .unseen = true, .wants = EVERY}, &every);
        for (int32_t chunk = 140; chunk <= PROMPT; chunk += 140)
            try_way(g, &every, (way){.chunk = chunk, .unseen = true, .wants = SOME}, "unseen, some rows wanted");
        try_way(g, &every, (way){.chunk = 100, .crowd = CROWD, .unseen = true, .wants = SOME}, "the same in a crowd");
        try_way(g, &plain, (way){.chunk = PROMPT, .unseen = true}, "unseen");
        try_way(g, &plain, (way){.chunk = 50, .overlap = true, .unseen = true}, "unseen, two in flight");
        try_way(g, &plain, (way){.chunk = 100, .crowd = CROWD, .overlap = true, .unseen = true}, "unseen, in a crowd");
        g->b->ops->close(g->b);
    }
    record_close(&every);
    record_close(&plain);
    free(g);
}

static void check_model(const char *shape, bool paddle) {
    made_model made = made_model_open(shape, paddle, SEED);
    const int32_t here = (int32_t)ern_cpu_level_here();
    for (int32_t level = few ? here : ERN_CPU_PORTABLE; level <= here; level++) {
        if (level != ERN_CPU_PORTABLE && level < ERN_CPU_AVX512) continue;
        check_setup(&(setup){made.model, level, false, false}, level == ERN_CPU_PORTABLE ? &brief : &best_level);
        if (!few || paddle)
            check_setup(&(setup){made.model, level, false, true}, level == ERN_CPU_PORTABLE ? &brief : &int8_level);
    }
    made_model_close(&made);
}

/* The same for a quantized model: much at the best level, little at those below and with exact activations. */
static void check_format(const char *shape, ern_quant dense, ern_quant expert, ern_quant head) {
    made_model made = made_model_open(shape, false, SEED);
    quant_model *q = quant_model_make(made.model, (ern_quant_plan){dense, expert, head});
    const int32_t here = (int32_t)ern_cpu_level_here();
    for (int32_t level = few ? here : ERN_CPU_PORTABLE; level <= here; level++)
        check_setup(&(setup){made.model, level, false, false}, level < here ? &brief : &quant_level);
    if (!few) check_setup(&(setup){made.model, here, true, false}, &brief);
    quant_model_free(q);
    made_model_close(&made);
}

/* A model whose outputs of the attention may leave as codes, KV head by KV head: it has to be one of several. */
static void test_wide(void **state) {
    (void)state;
    const int32_t here = (int32_t)ern_cpu_level_here();
    for (int quantized = few; quantized < 2; quantized++) {
        made_model made = made_model_open("tiny-wide", false, SEED);
        const ern_config *c = &made.model->config;
        assert_true(c->n_kv_head > 1 && c->n_head / c->n_kv_head * c->n_head_dim % ERN_ACT_GROUP == 0);
        quant_model *q =
            quantized ? quant_model_make(made.model, (ern_quant_plan){ERN_QUANT_WINT8, ERN_QUANT_NONE, ERN_QUANT_NONE})
                      : NULL;
        for (int kv_int8 = 0; kv_int8 < 2; kv_int8++) {
            check_setup(&(setup){made.model, here, false, kv_int8}, &wide_level);
            if (!few && quantized) check_setup(&(setup){made.model, ERN_CPU_PORTABLE, false, kv_int8}, &brief);
        }
        if (q) quant_model_free(q);
        made_model_close(&made);
    }
}

static uint64_t copied_bytes(const ern_model *m) {
    const ern_backend_options o = {.n_page = 1,
                                   .n_page_cell = 16,
                                   .n_row_max = 1,
                                   .n_seq_max = 1,
                                   .n_want_max = 1,
                                   .n_len_max = 16,
                                   .n_thread = 1,
                                   .level = -1};
    ern_backend_plan plan;
    ern_err err;
    made_check(cpu_backend_ops.plan(&plan, m, &o, &err), &err, "plan");
    return plan.weight_bytes;
}

/* Tiles that a file backs are copied at open, which the plan says, and compute the same. */
static void test_copied(void **state) {
    (void)state;
    for (int moe = 0; moe < 2; moe++) {
        made_model made = made_model_open(moe ? "tiny-moe" : "tiny-dense", false, SEED);
        quant_model *q =
            quant_model_make(made.model, (ern_quant_plan){ERN_QUANT_WINT8, ERN_QUANT_WINT4, ERN_QUANT_WINT8});
        rig *g = malloc(sizeof *g);
        const setup s = {made.model, -1, false, false};
        record plain = record_open(made.model);
        assert_int_equal(copied_bytes(made.model), 0);
        rig_open(g, &s, 1, 16, s.m->has_mtp);
        run(g, &(way){.chunk = PROMPT}, &plain);
        g->b->ops->close(g->b);
        quant_model_to_file(q);
        assert_true(copied_bytes(made.model) > 0);
        rig_open(g, &s, 2, 16, s.m->has_mtp);
        try_way(g, &plain, (way){.chunk = 50}, "copied");
        g->b->ops->close(g->b);
        record_close(&plain);
        free(g);
        quant_model_free(q);
        made_model_close(&made);
    }
}

/* Bytes of b's KV cache that have memory. */
static size_t populated(const cpu_backend *b) {
    const size_t each = (size_t)sysconf(_SC_PAGESIZE), n = (b->kv_bytes + each - 1) / each;
    unsigned char *in = malloc(n);
    size_t there = 0;
    assert_non_null(in);
    assert_int_equal(mincore(b->kv, b->kv_bytes, in), 0);
    for (size_t i = 0; i < n; i++) there += in[i] & 1 ? each : 0;
    free(in);
    return there;
}

static void wait_populated(const cpu_backend *b, size_t bytes) {
    for (int i = 0; populated(b) < bytes; i++) {
        assert_true(i < 6000);
        usleep(10000);
    }
}

/* Linux 5.14 and later, and memory to spare. */
static bool can_populate(void) {
    const size_t each = (size_t)sysconf(_SC_PAGESIZE);
    void *page = aligned_alloc(each, each);
    assert_non_null(page);
    const bool can = madvise(page, each, MADV_POPULATE_WRITE) == 0;
    free(page);
    return can && ern_memory_available_bytes() >= 4 * (uint64_t)CPU_KV_AHEAD;
}

/* The KV cache comes to have memory somewhat beyond what steps have used, and no more. */
static void test_populated(void **state) {
    (void)state;
    if (!can_populate()) skip();
    made_model made = made_model_open("tiny-dense", false, SEED);
    rig *g = malloc(sizeof *g);
    rig_open(g, &(setup){made.model, -1, false, false}, 2, 1 << 15, made.model->has_mtp);
    const cpu_backend *b = (const cpu_backend *)(const void *)g->b;
    assert_true(b->kv_bytes > 3 * (size_t)CPU_KV_AHEAD);
    wait_populated(b, CPU_KV_AHEAD);
    usleep(100000);
    assert_int_equal(populated(b), CPU_KV_AHEAD);
    record one = record_open(made.model);
    run(g, &(way){.chunk = PROMPT}, &one); /* in page 0, or a shelf of them */
    wait_populated(b, CPU_KV_SHELF * (size_t)b->page_bytes + CPU_KV_AHEAD);
    record_close(&one);
    g->b->ops->close(g->b);
    free(g);
    made_model_close(&made);
}

static void test_dense_pt(void **state) { (void)state, check_model("tiny-dense", false); }
static void test_dense_paddle(void **state) { (void)state, check_model("tiny-dense", true); }
static void test_moe_pt(void **state) { (void)state, check_model("tiny-moe", false); }
static void test_moe_paddle(void **state) { (void)state, check_model("tiny-moe", true); }
static void test_dense_wint8(void **state) {
    (void)state, check_format("tiny-dense", ERN_QUANT_WINT8, ERN_QUANT_NONE, ERN_QUANT_WINT8);
}
static void test_dense_wint4(void **state) {
    (void)state, check_format("tiny-dense", ERN_QUANT_WINT4, ERN_QUANT_NONE, ERN_QUANT_NONE);
}
static void test_dense_fp8(void **state) {
    (void)state, check_format("tiny-dense", ERN_QUANT_FP8, ERN_QUANT_NONE, ERN_QUANT_WINT8);
}
static void test_moe_wint8(void **state) {
    (void)state, check_format("tiny-moe", ERN_QUANT_WINT8, ERN_QUANT_WINT8, ERN_QUANT_NONE);
}
static void test_moe_wint4(void **state) {
    (void)state, check_format("tiny-moe", ERN_QUANT_WINT8, ERN_QUANT_WINT4, ERN_QUANT_WINT8);
}
static void test_moe_fp8(void **state) {
    (void)state, check_format("tiny-moe", ERN_QUANT_FP8, ERN_QUANT_FP8, ERN_QUANT_NONE);
}
/* Routed and shared experts that take their inputs in different ways. */
static void test_moe_mixed(void **state) {
    (void)state, check_format("tiny-moe", ERN_QUANT_WINT4, ERN_QUANT_FP8, ERN_QUANT_WINT8);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dense_pt),   cmocka_unit_test(test_dense_paddle), cmocka_unit_test(test_moe_pt),
        cmocka_unit_test(test_moe_paddle), cmocka_unit_test(test_dense_wint8),  cmocka_unit_test(test_moe_mixed),
        cmocka_unit_test(test_wide),       cmocka_unit_test(test_copied),       cmocka_unit_test(test_dense_wint4),
        cmocka_unit_test(test_dense_fp8),  cmocka_unit_test(test_moe_wint8),    cmocka_unit_test(test_moe_wint4),
        cmocka_unit_test(test_moe_fp8),    cmocka_unit_test(test_populated),
    };
    if (few) {
        printf("built with a sanitizer: each kind of way at few chunk sizes, with 3 threads, in two of the formats\n");
        return _cmocka_run_group_tests("tests", tests, 8, NULL, NULL);
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
