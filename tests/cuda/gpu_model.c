/* The cuda backend behind its door, on a machine with a GPU: gpu_model [FILTER].
 *
 * 1. Stage by stage against ref, on tiny random models: dense, experts with MTP, both layouts, every format of weights,
 *    KV in bf16, int8 and fp8; prefill, chunks, decode and mixtures over scattered pages, in a cache that is poison
 * wherever nothing was written. After each step cuda gets ref's pages, so errors do not add up over steps.
 *
 *    Bounds. cuda rounds to bf16 what goes into a linear (two normed rows, attention's output, the product of gate and
 *    up), and q, k, v and the weights of positions: at most 8 roundings on a path through a layer. A number rounded so
 *    is off by 2^-8 of itself at most, by 2^-8 / sqrt 3 in the mean square; a linear of random weights passes relative
 *    errors on as they are, and the layers amplify what came in by at most 4 (golden_growth in tests/golden). So the
 *    error of a row after n layers, relative to its rms, is in the mean square at most
 *        RMS(n) = 4 * 2^-8 / sqrt 3 * sqrt(8 n + 8)
 *    and six times that for a single number. int8 KV: its codes are amax/127 apart, amax at most sqrt(C) rms, on both
 *    sides from inputs that are RMS(n) apart: sqrt(C)/127/sqrt 12 takes the place of 2^-8/sqrt 3 for k and v. fp8 KV:
 *    its codes have four bits, 2^-4/sqrt 3.
 *
 *    Where two experts' scores are nearer than the bound, the two may choose differently: that row, and the later rows
 *    of its sequence, are left out for the rest of the step; what is left must be two fifths of the rows at least.
 *
 * 2. The promise of house.md 3: a sequence gets the same tokens and logprobs, bit for bit, alone and in a crowd, its
 *    prompt whole or in chunks, its pages scattered, graphs on and off. */
#include <dirent.h>
#include <ftw.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/backend.h"
#include "base/counter.h"
#include "base/os.h"
#include "experts_chosen.h"
#include "kv_drawing.h"
#include "made_model.h"
#include "quant_model.h"
#include "records.h"
#include "same_sampled.h"
#include "step.h"

enum { P = 16, N_PAGE = 24 };

static int n_case, n_failed;
static const char *filter;

static void say(bool good, const char *name, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static void say(bool good, const char *name, const char *fmt, ...) {
    char text[400];
    va_list ap;
    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    n_case++;
    n_failed += !good;
    printf("%s  %-48s %s\n", good ? "ok  " : "FAIL", name, text);
}

/* ---- stages ------------------------------------------------------------------------------------------------------ */

typedef struct watch {
    const ern_model *m;
    const step *s;
    double each; /* mean square root of a rounding, relative */
    records ref;
    int32_t n_judged_row, n_row;
    int64_t n_nan;
    bool excused[STEP_ROWS];
    double worst, worst_rms;
    char where[160];
} watch;

static double bound_of(const watch *w, const char *stage, int32_t layer) {
    int32_t n = layer < 0 ? w->m->config.n_layer : layer;
    if (!strcmp(stage, "embed")) return 0x1p-24;
    if (strstr(stage, "mtp")) n = w->m->config.n_layer + 1;
    return 4 * w->each * sqrt(8.0 * n + 8);
}

static void excuse(watch *w, int32_t row) {
    int32_t q = 0;
    while (w->s->row0[q + 1] <= row) q++;
    for (; row < w->s->row0[q + 1]; row++) w->excused[row] = true;
}

static void judge(void *ud, const char *stage, int32_t layer, int32_t row, const float *data, int32_t n_row,
                  int32_t n_col) {
    watch *w = ud;
    const ern_config *c = &w->m->config;
    const record *r = records_find(&w->ref, stage, layer, row, n_row);
    if (!r || r->n_col != n_col) {
        w->worst = INFINITY;
        (void)snprintf(w->where, sizeof w->where, "ref shows no %s of layer %d row %d", stage, layer, row);
        return;
    }
    bool by_want = layer < 0 && (!strcmp(stage, "norm") || !strcmp(stage, "logits") || !strcmp(stage, "mtp_logits"));
    double bound = bound_of(w, stage, layer), all_error = 0, all_rms = 0;
    for (int32_t i = 0; i < n_row; i++) {
        int32_t at = by_want ? w->s->want[row + i] : row + i;
        const float *have = data + (size_t)i * (size_t)n_col;
        const float *want = r->data + (size_t)(row + i - r->row) * (size_t)n_col;
        if (w->excused[at]) continue;
        double rms = 0, error = 0, worst = 0;
        for (int32_t j = 0; j < n_col; j++) {
            double d = (double)have[j] - (double)want[j];
            w->n_nan += isnan(d) != 0;
            rms += (double)want[j] * (double)want[j];
            error += d * d;
            worst = fmax(worst, fabs(d));
        }
        rms = sqrt(rms / n_col);
        if (!strcmp(stage, "logits")) w->n_judged_row++;
        if (worst / (6 * bound * rms) > w->worst) {
            w->worst = worst / (6 * bound * rms);
            (void)snprintf(w->where, sizeof w->where, "%s of layer %d row %d", stage, layer, at);
        }
        all_error += error / n_col, all_rms += rms * rms;
        if (!strcmp(stage, "router")) {
            double gap, other_gap;
            const ern_layer *l = &w->m->layer[layer];
            if (experts_chosen(want, l, c, &gap) == experts_chosen(have, l, c, &other_gap)) continue;
            if (gap > 6 * bound * rms) {
                w->worst = INFINITY;
                (void)snprintf(w->where, sizeof w->where, "experts of layer %d row %d: gap %g", layer, at, gap);
            }
            excuse(w, at);
        }
    }
    if (all_rms > 0 && sqrt(all_error / all_rms) / bound > w->worst_rms) {
        w->worst_rms = sqrt(all_error / all_rms) / bound;
        if (w->worst_rms > 1) (void)snprintf(w->where, sizeof w->where, "rms of %s of layer %d", stage, layer);
    }
}

typedef struct pair {
    ern_backend *ref, *cuda;
    ern_backend_options o;
    size_t page_bytes;
    unsigned char *page_ref, *page_cuda;
    const ern_model *m;
} pair;

/* cuda's own order of a page, keys and values one after the other, from ref's (backend.h). */
static void turn_page(const pair *p, unsigned char *out, const unsigned char *in) {
    const bool codes = ern_kv_has_codes(p->o.kv_dtype);
    const size_t C = (size_t)p->m->config.n_head_dim, e = codes ? 1 : 2;
    const size_t plane = P * C * e + (codes ? P * sizeof(float) : 0);
    for (size_t at = 0, k = 0; at < p->page_bytes; at += plane, k++) {
        const int which = (int)(k / (size_t)p->m->config.n_kv_head % 2);
        memcpy(out + at, in + at, plane);
        for (size_t cell = 0; cell < P; cell++)
            for (size_t c = 0; c < C; c++)
                memcpy(out + at + (cell * C + c) * e, in + at + kv_drawn_at(which, cell, c, C, codes) * e, e);
    }
}

static bool opened(pair *p, const ern_model *m, ern_kv_dtype kv, bool act8) {
    *p = (pair){.m = m};
    p->o = (ern_backend_options){.n_page = N_PAGE,
                                 .n_page_cell = P,
                                 .n_row_max = STEP_ROWS,
                                 .n_seq_max = STEP_SEQS,
                                 .n_want_max = STEP_ROWS,
                                 .n_len_max = 160,
                                 .kv_dtype = kv,
                                 .level = -1,
                                 .act_exact = !act8,
                                 .mtp = m->has_mtp};
    ern_err err;
    ern_backend_plan plan, plan_cuda;
    const ern_backend_ops *ref = ern_backend_find("ref"), *cuda = ern_backend_find("cuda");
    made_check(ref->plan(&plan, m, &p->o, &err), &err, "planning ref");
    made_check(cuda->plan(&plan_cuda, m, &p->o, &err), &err, "planning cuda");
    made_check(ref->open(&p->ref, m, &p->o, &err), &err, "opening ref");
    made_check(cuda->open(&p->cuda, m, &p->o, &err), &err, "opening cuda");
    p->page_bytes = plan.page_bytes;
    if (plan.page_bytes != plan_cuda.page_bytes) return false;
    p->page_ref = malloc(p->page_bytes), p->page_cuda = malloc(p->page_bytes);
    memset(p->page_ref, 0xff, p->page_bytes); /* NaN, -1 */
    for (int32_t i = 0; i < N_PAGE; i++) {
        ref->kv_write(p->ref, &i, 1, p->page_ref);
        cuda->kv_write(p->cuda, &i, 1, p->page_ref);
    }
    return true;
}

static void pair_close(pair *p) {
    p->ref->ops->close(p->ref);
    p->cuda->ops->close(p->cuda);
    free(p->page_ref);
    free(p->page_cuda);
}

static void run_step(pair *p, step *s, watch *w) {
    int32_t V = p->m->config.n_vocab;
    if (!p->m->has_mtp) s->in.next = NULL;
    w->s = s;
    w->n_row += s->in.n_want;
    memset(w->excused, 0, sizeof w->excused);
    p->ref->ops->probe(p->ref, records_keep, &w->ref);
    step_run(p->ref, s, &p->o, V);
    p->cuda->ops->probe(p->cuda, judge, w);
    step_run(p->cuda, s, &p->o, V);
    for (int32_t i = 0; i < N_PAGE; i++) {
        p->ref->ops->kv_read(p->ref, &i, 1, p->page_ref);
        turn_page(p, p->page_cuda, p->page_ref);
        p->cuda->ops->kv_write(p->cuda, &i, 1, p->page_cuda);
    }
    records_clear(&w->ref);
}

static const int32_t dense_cut[][3][2] = {
    /* rows from..to-1 of each sequence in each step; nothing where they are equal */
    {{0, 50}, {0, 0}, {0, 5}},    {{50, 77}, {0, 20}, {5, 6}},     {{77, 78}, {20, 37}, {6, 7}},
    {{78, 79}, {37, 38}, {7, 8}}, {{79, 80}, {38, 39}, {0, 0}},    {{80, 81}, {0, 0}, {0, 0}},
    {{0, 0}, {39, 60}, {8, 17}},  {{81, 128}, {60, 62}, {17, 19}}, {{0, 0}, {62, 63}, {19, 35}},
};
static const int32_t moe_cut[][3][2] = {
    {{0, 6}, {0, 0}, {0, 5}},     {{6, 10}, {0, 3}, {5, 6}},     {{10, 11}, {3, 9}, {6, 7}},
    {{11, 12}, {9, 10}, {7, 8}},  {{12, 13}, {10, 11}, {0, 0}},  {{13, 14}, {0, 0}, {0, 0}},
    {{14, 15}, {11, 12}, {8, 9}}, {{15, 17}, {12, 20}, {9, 11}}, {{17, 60}, {20, 21}, {11, 30}},
};

static const char *const kv_name[] = {[ERN_KV_BF16] = "bf16", [ERN_KV_I8] = "int8", [ERN_KV_F8] = "fp8"};

/* act8: quantized weights multiply quantized rows, in ref too. A code of theirs may come out as its
 * neighbour: of fp8 that is off by 2^-4 and more, of int8 by a 127th of the largest of 128 numbers, which is at most
 * sqrt(128) times their mean square root. */
static void stages(const char *shape, bool paddle, const ern_quant_plan *plan, ern_kv_dtype kv, bool act8) {
    char name[96], quant_text[ERN_QUANT_TEXT_BYTES];
    (void)snprintf(name, sizeof name, "stages %s %s %s%s %s KV", shape, paddle ? "paddle" : "pt",
                   plan ? ern_quant_text(quant_text, plan) : "bf16", act8 ? ", rows too" : "", kv_name[kv]);
    if (filter && !strstr(name, filter)) return;
    made_model m = made_model_open(shape, paddle, 11);
    quant_model *quant = plan ? quant_model_make(m.model, *plan) : NULL;
    pair p;
    if (!opened(&p, m.model, kv, act8)) {
        say(false, name, "pages differ in size");
        return;
    }
    static watch w;
    static step s;
    int32_t text[3][129], page[3][STEP_PAGES] = {{0}};
    memset(&w, 0, sizeof w);
    w.m = m.model;
    const bool rows_fp8 = act8 && plan->dense == ERN_QUANT_FP8;
    const double i8 = sqrt(act8 ? 128 : m.model->config.n_head_dim) / 127 / sqrt(12);
    w.each = kv == ERN_KV_F8 || rows_fp8 ? 0x1p-4 / sqrt(3)
             : kv == ERN_KV_I8 || act8   ? fmax(i8, 0x1p-8 / sqrt(3))
                                         : 0x1p-8 / sqrt(3);
    for (int q = 0; q < 3; q++) {
        for (int i = 0; i < 129; i++) text[q][i] = (int32_t)(ern_counter64(5, (uint64_t)(q * 1000 + i)) % 1024);
        for (int i = 0; i < 8; i++) page[q][i] = (7 * (q * 8 + i) + 3) % N_PAGE;
    }
    const bool moe = m.model->config.n_expert > 0;
    for (size_t i = 0; i < sizeof dense_cut / sizeof *dense_cut; i++) {
        const int32_t(*cut)[2] = moe ? moe_cut[i] : dense_cut[i];
        step_clear(&s);
        for (int q = 0; q < 3; q++)
            if (cut[q][1] > cut[q][0])
                step_add(&s, text[q], cut[q][0], cut[q][1], page[q], P, (i + (size_t)q) % 2 == 0);
        run_step(&p, &s, &w);
    }
    bool good = w.worst <= 1 && w.worst_rms <= 1 && w.n_nan == 0 && w.n_judged_row * 5 >= w.n_row * 2;
    say(good, name, "worst %.3f, rms %.3f of the bound; %d of %d rows judged; %lld NaN; worst at %s", w.worst,
        w.worst_rms, w.n_judged_row, w.n_row, (long long)w.n_nan, w.where);
    pair_close(&p);
    quant_model_free(quant);
    made_model_close(&m);
}

/* ---- the same bits -------------------------------------------------------------------------------------------------
 */

enum {
    PROMPT = 300,
    REPLY = 12,
    LENGTH = PROMPT + REPLY,
    PAGES_EACH = (LENGTH + P - 1) / P,
    CROWD_MAX = 130,
    ROWS = 1024
};

typedef struct way {
    int32_t chunk, crowd;
    bool scatter, graphs, plain; /* plain: greedy without logprobs */
    bool no_mtp;                 /* though the model has it: then the last layer is of the wanted rows alone */
    bool amid;                   /* rows amid a prompt are wanted, too */
} way;

typedef struct rig {
    int32_t n_vocab;
    int32_t token[ROWS], next[ROWS], pos[ROWS], cell[ROWS], want[ROWS], row0[CROWD_MAX + 2], kv_len[CROWD_MAX + 1];
    int32_t page[(CROWD_MAX + 1) * PAGES_EACH];
    ern_sample sample[ROWS];
    int32_t text[LENGTH + 1];
} rig;

static void add_want(rig *g, ern_batch *in, int32_t index, int32_t row, const way *w) {
    g->sample[in->n_want] = (ern_sample){.temperature = w->plain || index % 2 ? 0 : 0.9f,
                                         .top_p = w->plain ? 1 : 0.95f,
                                         .top_k = w->plain ? 0 : 50,
                                         .repetition = 1,
                                         .seed = 77 + (uint64_t)index,
                                         .position = g->pos[row] + 1,
                                         .forced = -1,
                                         .n_top = w->plain ? -1 : 20};
    g->want[in->n_want++] = row;
}

static void add_seq(rig *g, ern_batch *in, int32_t index, int32_t pos, int32_t n, const way *w, bool target) {
    const int32_t s = in->n_seq++;
    int32_t *page = g->page + (size_t)s * PAGES_EACH, all = (CROWD_MAX + 1) * PAGES_EACH;
    for (int32_t i = 0; i < PAGES_EACH; i++) {
        int32_t plain = index * PAGES_EACH + i;
        page[i] = w->scatter ? (int32_t)((int64_t)plain * 7919 % all) : plain; /* a prime above all's factors */
    }
    for (int32_t i = 0; i < n; i++) {
        const int32_t r = in->n_row++, p = pos + i;
        g->pos[r] = p;
        g->cell[r] = page[p / P] * P + p % P;
        g->token[r] =
            target ? g->text[p] : (int32_t)(ern_counter64(9, (uint64_t)(index * 1000 + p)) % (uint64_t)g->n_vocab);
        g->next[r] = -1;
    }
    g->kv_len[s] = pos + n;
    g->row0[s + 1] = in->n_row;
    if (target && pos + n < PROMPT) return; /* nothing is wanted of it yet */
    if (w->amid && !target && n > 1) add_want(g, in, index, in->n_row - n, w);
    add_want(g, in, index, in->n_row - 1, w);
}

static void serve(const ern_model *m, ern_kv_dtype kv, const way *w, ern_sampled out[REPLY + 1]) {
    static rig g;
    ern_err err = {.text = ""};
    ern_backend *b;
    const bool mtp = m->has_mtp && !w->no_mtp;
    const ern_backend_options o = {.n_page = (CROWD_MAX + 1) * PAGES_EACH,
                                   .n_page_cell = P,
                                   .n_row_max = ROWS,
                                   .n_seq_max = CROWD_MAX + 1,
                                   .n_want_max = 2 * (CROWD_MAX + 1),
                                   .n_len_max = LENGTH,
                                   .kv_dtype = kv,
                                   .level = -1,
                                   .mtp = mtp,
                                   .no_graph = !w->graphs};
    const ern_backend_ops *cuda = ern_backend_find("cuda");
    made_check(cuda->open(&b, m, &o, &err), &err, "opening cuda");
    g.n_vocab = m->config.n_vocab;
    for (int32_t i = 0; i < PROMPT; i++) g.text[i] = (int32_t)(ern_counter64(3, (uint64_t)i) % (uint64_t)g.n_vocab);
    int32_t crowd_pos[CROWD_MAX + 1] = {0};
    for (int32_t pos = 0, k = 0; k <= REPLY;) {
        ern_batch in = {.n_page_max = PAGES_EACH,
                        .token = g.token,
                        .next = mtp ? g.next : NULL,
                        .pos = g.pos,
                        .cell = g.cell,
                        .row0 = g.row0,
                        .kv_len = g.kv_len,
                        .page = g.page,
                        .want = g.want,
                        .sample = g.sample};
        int32_t n = pos < PROMPT ? (PROMPT - pos < w->chunk ? PROMPT - pos : w->chunk) : 1;
        int32_t before = w->crowd / 3, at = 0;
        for (int32_t i = 1; i <= w->crowd; i++) {
            if (i == before + 1) {
                at = in.n_want;
                add_seq(&g, &in, 0, pos, n, w, true);
            }
            int32_t rows = crowd_pos[i] == 0 ? 2 + i % 4 : 1;
            add_seq(&g, &in, i, crowd_pos[i] % (LENGTH - 8), rows, w, false);
            crowd_pos[i] += rows;
        }
        if (w->crowd == 0) add_seq(&g, &in, 0, pos, n, w, true);
        const char *why = "";
        if (!ern_batch_valid(&in, &o, g.n_vocab, &why)) {
            fprintf(stderr, "gpu_model: %s\n", why);
            abort();
        }
        ern_result r;
        cuda->submit(b, &in);
        made_check(cuda->wait(b, &r, &err), &err, "a step");
        pos += n;
        if (pos < PROMPT) continue;
        out[k] = r.sampled[at];
        if (pos <= LENGTH) g.text[pos] = out[k].token;
        k++;
    }
    cuda->close(b);
}

static bool same(const ern_sampled *a, const ern_sampled *b) { return !a->bad && same_sampled(a, b); }

static void sameness(const char *what, const ern_model *m, ern_kv_dtype kv) {
    static const way ways[] = {{PROMPT, 0, .graphs = true},
                               {PROMPT, 0, .graphs = false},
                               {1, 0, .scatter = true, .graphs = true},
                               {17, 0, .scatter = true, .graphs = true},
                               {128, 5, .scatter = true, .graphs = true},
                               {PROMPT, 63, .scatter = true, .graphs = true},
                               {256, 130, .scatter = true, .graphs = true},
                               {64, 9, .graphs = false},
                               {PROMPT, 0, .graphs = true, .no_mtp = true},
                               {64, 9, .scatter = true, .graphs = true, .no_mtp = true},
                               {PROMPT, 63, .scatter = true, .graphs = true, .no_mtp = true},
                               {64, 9, .graphs = true, .no_mtp = true, .amid = true},
                               {PROMPT, 40, .scatter = true, .no_mtp = true, .amid = true}};
    ern_sampled want[REPLY + 1], have[REPLY + 1];
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        char name[112];
        if (ways[i].no_mtp && !ways[i].amid && !m->has_mtp) continue; /* it stands above */
        (void)snprintf(name, sizeof name, "bits %s %s KV: chunk %d crowd %d%s%s%s%s", what, kv_name[kv], ways[i].chunk,
                       ways[i].crowd, ways[i].scatter ? " scattered" : "", ways[i].graphs ? "" : " no graphs",
                       ways[i].no_mtp ? " no MTP" : "", ways[i].amid ? " wanted amid" : "");
        if (filter && !strstr(name, filter)) return;
        serve(m, kv, &ways[i], i ? have : want);
        if (i == 0) memcpy(have, want, sizeof have);
        int bad = -1;
        for (int k = 0; k <= REPLY && bad < 0; k++)
            if (!same(&want[k], &have[k])) bad = k;
        say(bad < 0, name, bad < 0 ? "13 tokens, 20 logprobs each" : "differs at token %d: %d, alone %d; %a, alone %a",
            bad, have[bad < 0 ? 0 : bad].token, want[bad < 0 ? 0 : bad].token, (double)have[bad < 0 ? 0 : bad].logprob,
            (double)want[bad < 0 ? 0 : bad].logprob);
    }
    way plain = {PROMPT, 0, .graphs = true, .plain = true};
    way crowd = {64, 63, .scatter = true, .graphs = true, .plain = true};
    serve(m, kv, &plain, want);
    serve(m, kv, &crowd, have);
    bool good = true;
    for (int k = 0; k <= REPLY; k++) good &= want[k].token == have[k].token && !want[k].bad;
    char name[96];
    (void)snprintf(name, sizeof name, "bits %s %s KV: greedy", what, kv_name[kv]);
    say(good, name, "13 tokens alone and among 63");
}

static void same_made(const char *shape, int32_t n_layer, const ern_quant_plan *plan, ern_kv_dtype kv) {
    char what[160], text[ERN_QUANT_TEXT_BYTES];
    (void)snprintf(what, sizeof what, "%s %s", shape, plan ? ern_quant_text(text, plan) : "bf16");
    made_model m = made_model_open_layers(shape, false, 11, n_layer);
    quant_model *quant = plan ? quant_model_make(m.model, *plan) : NULL;
    sameness(what, m.model, kv);
    quant_model_free(quant);
    made_model_close(&m);
}

/* ---- a thousand requests -------------------------------------------------------------------------------------------
 *
 * Each by itself, its prompt in one step; then all of them with 256 running at a time, prompts in pieces of random size
 * beside decoding ones. Every token and logprob must be the same. */

enum {
    REQUESTS = 1024,
    TOGETHER = 256,
    ANSWER = 8,
    LONGEST = 200,
    CELLS = 64,
    PAGES_REQUEST = (LONGEST + ANSWER) / CELLS + 1,
    STEP_MOST = 2048
};

typedef struct seat {
    int32_t request, pos; /* request < 0: free */
} seat;

typedef struct crowd {
    ern_batch in;
    int32_t token[STEP_MOST], next[STEP_MOST], pos[STEP_MOST], cell[STEP_MOST], want[TOGETHER], row0[TOGETHER + 1];
    int32_t kv_len[TOGETHER], page[TOGETHER * PAGES_REQUEST], from[TOGETHER]; /* from: the seat of a wanted row */
    ern_sample sample[TOGETHER];
} crowd;

static int32_t prompt_length(int32_t r) { return 1 + (int32_t)(ern_counter64(21, (uint64_t)r) % LONGEST); }

static void crowd_add(crowd *c, const ern_model *m, int32_t index, const seat *s, int32_t n,
                      const ern_sampled *answer) {
    const int32_t q = c->in.n_seq++, len = prompt_length(s->request);
    for (int32_t i = 0; i < PAGES_REQUEST; i++) c->page[q * PAGES_REQUEST + i] = index * PAGES_REQUEST + i;
    for (int32_t i = 0; i < n; i++) {
        const int32_t r = c->in.n_row++, p = s->pos + i;
        c->pos[r] = p;
        c->cell[r] = c->page[q * PAGES_REQUEST + p / CELLS] * CELLS + p % CELLS;
        c->token[r] =
            p < len ? (int32_t)(ern_counter64(22, (uint64_t)(s->request * 1000 + p)) % (uint64_t)m->config.n_vocab)
                    : answer[p - len].token;
        c->next[r] = -1;
    }
    c->kv_len[q] = s->pos + n;
    c->row0[q + 1] = c->in.n_row;
    if (s->pos + n < len) return;
    c->from[c->in.n_want] = index;
    c->sample[c->in.n_want] = (ern_sample){.temperature = s->request % 2 ? 0.8f : 0,
                                           .top_p = 0.9f,
                                           .repetition = 1,
                                           .seed = (uint64_t)s->request,
                                           .position = s->pos + n,
                                           .forced = -1,
                                           .n_top = 5};
    c->want[c->in.n_want++] = c->in.n_row - 1;
}

/* want NULL: fill have; else compare with it. Returns the number of events that differ. */
static int64_t serve_all(const ern_model *m, int32_t n_seat, bool pieces, ern_sampled (*have)[ANSWER],
                         ern_sampled (*want)[ANSWER]) {
    static crowd c;
    static seat seats[TOGETHER];
    ern_err err = {.text = ""};
    ern_backend *b;
    const ern_backend_options o = {.n_page = TOGETHER * PAGES_REQUEST,
                                   .n_page_cell = CELLS,
                                   .n_row_max = STEP_MOST,
                                   .n_seq_max = n_seat,
                                   .n_want_max = n_seat,
                                   .n_len_max = LONGEST + ANSWER,
                                   .kv_dtype = ERN_KV_BF16,
                                   .level = -1,
                                   .mtp = m->has_mtp};
    const ern_backend_ops *cuda = ern_backend_find("cuda");
    int32_t n_begun = 0, n_done = 0;
    int64_t n_bad = 0;
    uint64_t drawn = 0;
    made_check(cuda->open(&b, m, &o, &err), &err, "opening cuda");
    for (int32_t i = 0; i < n_seat; i++) seats[i].request = -1;
    while (n_done < REQUESTS) {
        c.in = (ern_batch){.n_page_max = PAGES_REQUEST,
                           .token = c.token,
                           .next = m->has_mtp ? c.next : NULL,
                           .pos = c.pos,
                           .cell = c.cell,
                           .row0 = c.row0,
                           .kv_len = c.kv_len,
                           .page = c.page,
                           .want = c.want,
                           .sample = c.sample};
        int32_t rows[TOGETHER] = {0};
        for (int32_t i = 0; i < n_seat; i++) {
            if (seats[i].request < 0 && n_begun < REQUESTS) seats[i] = (seat){n_begun++, 0};
            if (seats[i].request < 0) continue;
            int32_t left = prompt_length(seats[i].request) - seats[i].pos, room = STEP_MOST - c.in.n_row - (n_seat - i);
            int32_t most = pieces ? 1 + (int32_t)(ern_counter64(23, drawn++) % 64) : LONGEST;
            rows[i] = left < 1 ? 1 : left < most ? left : most;
            if (rows[i] > room) rows[i] = room > 1 ? room : 1;
            crowd_add(&c, m, i, &seats[i], rows[i], have[seats[i].request]);
        }
        ern_result r;
        cuda->submit(b, &c.in);
        made_check(cuda->wait(b, &r, &err), &err, "a step");
        for (int32_t w = 0; w < c.in.n_want; w++) {
            const seat *s = &seats[c.from[w]];
            int32_t k = s->pos + rows[c.from[w]] - prompt_length(s->request);
            have[s->request][k] = r.sampled[w];
            n_bad += r.sampled[w].bad || (want && !same(&want[s->request][k], &r.sampled[w]));
        }
        for (int32_t i = 0; i < n_seat; i++) {
            if (seats[i].request < 0) continue;
            seats[i].pos += rows[i];
            if (seats[i].pos < prompt_length(seats[i].request) + ANSWER - 1) continue;
            seats[i].request = -1;
            n_done++;
        }
    }
    cuda->close(b);
    return n_bad;
}

static void thousand(const char *shape, int32_t n_layer) {
    static ern_sampled alone[REQUESTS][ANSWER], together[REQUESTS][ANSWER];
    char name[96];
    (void)snprintf(name, sizeof name, "bits %s: %d requests among %d", shape, REQUESTS, TOGETHER);
    if (filter && !strstr(name, filter)) return;
    made_model m = made_model_open_layers(shape, false, 11, n_layer);
    int64_t n_nan = serve_all(m.model, 1, false, alone, NULL),
            n_bad = serve_all(m.model, TOGETHER, true, together, alone);
    say(n_nan == 0 && n_bad == 0, name, "%lld of %d tokens differ from those alone; %lld bad", (long long)n_bad,
        REQUESTS * ANSWER, (long long)n_nan);
    made_model_close(&m);
}

/* ---- memory --------------------------------------------------------------------------------------------------------
 *
 * What the plan says covers what is taken, by a pool that has room for the largest weight as it is stored, whose place
 * it is while weights are packed: else a pool as large as the plan lets it be would not find the rest. */

static void memory(const char *shape, int32_t n_layer, bool graphs) {
    char name[96];
    (void)snprintf(name, sizeof name, "memory %s%s", shape, graphs ? "" : " no graphs");
    if (filter && !strstr(name, filter)) return;
    made_model m = made_model_open_layers(shape, false, 11, n_layer);
    const ern_backend_options o = {.n_page = 2048,
                                   .n_page_cell = 64,
                                   .n_row_max = 2048,
                                   .n_seq_max = 256,
                                   .n_want_max = 256,
                                   .n_len_max = 2048,
                                   .kv_dtype = ERN_KV_BF16,
                                   .level = -1,
                                   .mtp = m.model->has_mtp,
                                   .no_graph = !graphs};
    const ern_backend_ops *cuda = ern_backend_find("cuda");
    ern_err err = {.text = ""};
    ern_backend *b;
    ern_backend_plan before, after;
    made_check(cuda->plan(&before, m.model, &o, &err), &err, "planning");
    made_check(cuda->open(&b, m.model, &o, &err), &err, "opening cuda");
    made_check(cuda->plan(&after, m.model, &o, &err), &err, "planning");
    const double mib = 1 << 20, taken = (double)before.memory_free_bytes - (double)after.memory_free_bytes;
    const double planned =
        (double)before.weight_bytes + (double)before.scratch_bytes + (double)before.page_bytes * o.n_page;
    say(taken <= planned, name, "%.1f MiB taken, %.1f planned", taken / mib, planned / mib);
    cuda->close(b);
    made_model_close(&m);
}

int main(int argc, char **argv) {
    static const ern_quant how[] = {ERN_QUANT_WINT8, ERN_QUANT_WINT4, ERN_QUANT_FP8};
    filter = argc > 1 && *argv[1] ? argv[1] : NULL;
    setvbuf(stdout, NULL, _IOLBF, 0);
    const char *missing = ern_backend_missing("cuda");
    if (missing) {
        fprintf(stderr, "gpu_model: %s\n", missing);
        return 2;
    }
    static const char *const tiny[] = {"tiny-dense", "tiny-moe"};
    for (int k = 0; k < 2; k++) {
        for (int int8 = 0; int8 < 2; int8++)
            for (int paddle = 0; paddle < 2; paddle++)
                stages(tiny[k], paddle, NULL, int8 ? ERN_KV_I8 : ERN_KV_BF16, false);
        for (size_t i = 0; i < 3; i++)
            stages(tiny[k], false, &(ern_quant_plan){how[i], how[(i + 1) % 3], ERN_QUANT_WINT8}, ERN_KV_BF16, false);
    }
    stages("tiny-dense", false, NULL, ERN_KV_F8, false);
    const ern_quant_plan fp8 = {ERN_QUANT_FP8, ERN_QUANT_FP8, ERN_QUANT_WINT8};
    const ern_quant_plan wint4 = {ERN_QUANT_WINT8, ERN_QUANT_WINT4, ERN_QUANT_WINT8};
    const ern_quant_plan int4 = {ERN_QUANT_WINT4, ERN_QUANT_WINT8, ERN_QUANT_WINT8};
    const ern_quant_plan *const rows8[] = {&fp8, &wint4, &int4};
    for (size_t i = 0; i < 3; i++) stages("tiny-moe", i == 1, rows8[i], ERN_KV_BF16, true);
    for (int k = 0; k < 2; k++) same_made(tiny[k], 0, NULL, k ? ERN_KV_I8 : ERN_KV_BF16);
    for (size_t i = 0; i < 3; i++) same_made("tiny-moe", 0, rows8[i], ERN_KV_BF16);
    if (!filter || strstr("0.3b", filter)) {
        static const ern_kv_dtype kv[] = {ERN_KV_BF16, ERN_KV_I8, ERN_KV_F8};
        same_made("0.3b", 2, NULL, ERN_KV_BF16);
        for (size_t i = 0; i < 3; i++) same_made("0.3b", 2, &(ern_quant_plan){how[i], how[i], ERN_QUANT_WINT8}, kv[i]);
    }
    memory("0.3b", 4, true);
    memory("0.3b", 2, false);
    memory("tiny-moe", 0, true);
    thousand("0.3b", 2);
    thousand("tiny-moe", 0);
    printf("gpu_model: %d cases, %d failed\n", n_case, n_failed);
    return n_failed > 0;
}
