#include "golden/golden.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cpu/cpu_kernels.h"
#include "base/jsonr.h"

/* ---- the file -----------------------------------------------------------------------------------------------------
 */

static _Noreturn void broken(const char *what) {
    fprintf(stderr, "golden vectors: %s\n", what);
    abort();
}

static json_t *get(const json_t *o, const char *key) {
    json_t *v = json_object_get(o, key);
    if (!v) broken(key);
    return v;
}
static json_t *item(const json_t *a, size_t i) {
    json_t *v = json_array_get(a, i);
    if (!v) broken("an array is too short");
    return v;
}
static double number(const json_t *a, size_t i) { return json_number_value(item(a, i)); }
static int32_t integer(const json_t *a, size_t i) { return (int32_t)json_integer_value(item(a, i)); }

golden golden_open(const char *path) {
    golden g = {0};
    ern_err err;
    if (ern_json_parse_file(&g.doc, path, 4 << 20, 16, &err) != ERN_OK) broken(err.text);
    g.shape = json_string_value(get(g.doc, "shape"));
    g.seed = (uint64_t)json_integer_value(get(g.doc, "seed"));
    g.n_row = (int32_t)json_array_size(get(g.doc, "token")) - 1;
    if (!g.shape || g.n_row < 1) broken("no shape or no tokens");
    return g;
}

void golden_close(golden *g) {
    json_decref(g->doc);
    g->doc = NULL;
}

bool golden_weights(const golden *g, char why[256]) {
    const json_t *all = get(g->doc, "sample");
    for (size_t i = 0; i < json_array_size(all); i++) {
        const json_t *s = item(all, i);
        const char *name = json_string_value(item(s, 0));
        uint64_t index = (uint64_t)json_integer_value(item(s, 1));
        float want = (float)number(s, 3), scale, offset;
        ern_synth_scale(name, integer(s, 2), &scale, &offset);
        bool is_f32 = strstr(name, "mlp.gate.weight") || strstr(name, "e_score_correction_bias");
        float have = is_f32 ? ern_synth_f32(g->seed, name, index, scale, offset)
                            : ern_bf16_to_f32(ern_synth_bf16(g->seed, name, index, scale, offset));
        if (memcmp(&have, &want, sizeof have) == 0) continue;
        snprintf(why, 256, "%s[%llu] is %.9g, the vectors have %.9g", name, (unsigned long long)index, (double)have,
                 (double)want);
        return false;
    }
    return json_array_size(all) > 0;
}

/* ---- bounds ----------------------------------------------------------------------------------------------------- */

/* Both sides compute the same f32 formula and differ in the order of sums. Write eps = 2^-23.
 *
 * One dot product of n terms, summed in any order, strays from the exact one by a random walk: adding term k rounds a
 * partial sum that is sqrt(k/n) of the result, so the error is at most eps/sqrt(12) * sqrt(n/2) = eps sqrt(n/24) of the
 * result's rms (made weights and normed inputs have no preferred sign). A block chains about four such products, a norm
 * and two roundings, each with n up to N = the widest input: step = eps * (1 + 2 sqrt(N/24)).
 *
 * Errors of the 2L blocks add in quadrature, as the blocks' outputs do; what a block hands on is multiplied by how much
 * the later layers amplify a relative error of x. GROWTH is a limit for that factor; golden_growth measures it from the
 * embedding to the last layer, and test_golden_tiny holds it under GROWTH. So x has the relative error
 * e = GROWTH * step, and a logit e times the deviation of the logits, for the head is one more product. SIGMAS covers
 * the largest of the up to 10^5 numbers compared (5, were the errors normal) and their correlations.
 *
 * With K and V in bf16 the two sides round numbers that differ by e, so some fall on different sides: in deep models,
 * enough of them that the roundings of later layers are as good as independent. Then each side's K and V carry their
 * own error of 2^-9/sqrt(3) relative at most: step = sqrt(2) * 2^-9 / sqrt(3).
 *
 * That is a bound for every number; the rms of all of them must besides stay under half of what rounding K and V moves
 * the logits at all (other_rms), or the backend does not round as the vectors do.
 *
 * A choice of expert can change where two scores nearly tie. In f32 it cannot be here: scores are probabilities below
 * 0.2, stray by e times that, under 1e-6 for e of 21b-a3b, and the vectors' route_gap is above 7e-6. With K and V in
 * bf16 the scores of a deep model stray by more than the least gap of 400 choices. What is swapped is the last chosen
 * expert and the first refused: x changes by sqrt(2) w r, w < 1/K the share of the last chosen and r < 1 an expert's
 * output, where x itself is beyond 2: by less than flip_of(K) of it. So for MoE in bf16 a row may leave the first
 * bound, but not the one that this is added to, and at most a quarter of the rows may; of a backend whose rounding
 * makes scores stray further by a factor, that factor times as many, for a gap is as likely to be small as to be
 * smaller. (Seen on 21b-a3b with cpu: row 4 chooses otherwise in layer 16, where ref's scores are 1.35e-5 apart; two
 * rows of 16 are beyond, ref in bf16 none. cuda: 7 of 8.) */
#define GROWTH 4.0
#define SIGMAS 6.0
#define LOGIT_DEVIATION 2.5 /* docs/model.md 8 */

/* Numbers of a path through a layer that the backend rounds to bf16 beyond K and V, and the vectors do not: queries and
 * weights of positions where cpu's attention does (attn_rounds of cpu_kernels.h); with those both normed rows,
 * attention's output and the product of gate and up on cuda, whose linears take bf16, and on cpu where its do
 * (linear_rounds; the goldens' weights are bf16). Each errs by as much as one of K
 * and V of one side, so step grows by sqrt((2 + n) / 2). And the rms is a, that of this rounding, where the other run's
 * distance is hypot(a, k), k that of K and V: a = k sqrt(n / 2). What is held is 4/3 of that. (A backend that did not
 * round K and V at all would stand at k and at none.) With n = 6 the two distances are too near to tell anything: there
 * the rms must be within what one sigma of the bound is, and a changed choice in as many rows as may have one. */
static int roundings(const ern_backend_ops *ops, ern_kv_dtype kv) {
    if (strcmp(ops->name, "cuda") == 0) return 6;
    if (strcmp(ops->name, "cpu") != 0) return 0;
    const cpu_kernels *k = cpu_kernels_for(ern_cpu_level_here());
    return (kv == ERN_KV_BF16 && k->attn_rounds ? 2 : 0) + (k->linear_rounds ? 4 : 0);
}

static double flip_of(int32_t n_expert_used) { return 1.4142 / n_expert_used / 2; }

static double relative_error(const ern_config *c, bool rounded_kv) {
    int32_t widest = 2 * c->n_hidden > c->n_ffn ? 2 * c->n_hidden : c->n_ffn;
    double step = 0x1p-23 * (1 + 2 * sqrt(widest / 24.0));
    if (rounded_kv) step = sqrt(2.0 / 3.0) * 0x1p-9;
    return GROWTH * step;
}

/* ---- one run -------------------------------------------------------------------------------------------- */

typedef struct seen {
    const ern_config *c;
    int32_t n_row;
    float *resid;  /* [L, T, D] */
    float *logits; /* [T, V] */
    float *mtp;    /* [T, V], or NULL */
} seen;

static void watch(void *ud, const char *stage, int32_t layer, int32_t row, const float *data, int32_t n_row,
                  int32_t n_col) {
    seen *s = ud;
    float *to = NULL;
    if (strcmp(stage, "resid") == 0 && layer < s->c->n_layer)
        to = s->resid + ((size_t)layer * (size_t)s->n_row + (size_t)row) * (size_t)n_col;
    if (strcmp(stage, "logits") == 0) to = s->logits + (size_t)row * (size_t)n_col;
    if (strcmp(stage, "mtp_logits") == 0 && s->mtp) to = s->mtp + (size_t)row * (size_t)n_col;
    if (to) memcpy(to, data, (size_t)n_row * (size_t)n_col * sizeof *to);
}

static void *room(size_t n, size_t each) {
    void *p = calloc(n, each);
    if (!p) broken("out of memory");
    return p;
}

/* All rows at once, pages of 16 cells handed out backwards. */
static ern_status run_all(const golden *g, ern_backend *b, seen *s, int32_t n_page, ern_err *err) {
    size_t T = (size_t)g->n_row;
    const json_t *id = get(g->doc, "token");
    int32_t *token = room(6 * T + (size_t)n_page, sizeof *token), *next = token + T, *pos = next + T, *cell = pos + T;
    int32_t *want = cell + T, *page = want + T, row0[2] = {0, g->n_row}, kv_len = g->n_row;
    ern_sample *sample = room(T, sizeof *sample);
    for (int32_t i = 0; i < n_page; i++) page[i] = n_page - 1 - i;
    for (int32_t t = 0; t < g->n_row; t++) {
        token[t] = integer(id, (size_t)t);
        next[t] = integer(id, (size_t)t + 1);
        pos[t] = want[t] = t;
        cell[t] = page[t / 16] * 16 + t % 16;
        sample[t] = (ern_sample){.top_p = 1, .repetition = 1, .forced = -1, .n_top = -1, .position = t + 1};
    }
    ern_batch in = {.n_row = g->n_row,
                    .n_seq = 1,
                    .n_want = g->n_row,
                    .n_page_max = n_page,
                    .token = token,
                    .next = s->mtp ? next : NULL,
                    .pos = pos,
                    .cell = cell,
                    .row0 = row0,
                    .kv_len = &kv_len,
                    .page = page,
                    .want = want,
                    .sample = sample};
    ern_result result;
    b->ops->probe(b, watch, s);
    b->ops->submit(b, &in);
    ern_status status = b->ops->wait(b, &result, err);
    b->ops->probe(b, NULL, NULL);
    free(token);
    free(sample);
    return status;
}

/* ---- comparing ------------------------------------------------------------------------------------------ */

static void fail(golden_report *r, const char *what, int32_t row, int32_t id, double have, double want, double bound) {
    if (r->ok)
        snprintf(r->why, sizeof r->why, "%s, row %d, %d: %.9g, golden %.9g, bound %.3g", what, row, id, have, want,
                 bound);
    r->ok = false;
}

/* What numbers of one kind are held against. */
typedef struct judge {
    golden_report *r;
    const char *what;
    double *worst;
    double bound, bound_flipped; /* equal where no choice of expert can change */
    bool *flipped;               /* [T] set for a row beyond `bound` */
} judge;

/* NaN fails: the comparisons are written so. */
static void compare(const judge *j, int32_t row, int32_t id, double have, double want) {
    double error = fabs(have - want);
    if (!(error <= *j->worst)) *j->worst = error;
    if (!(error <= j->bound)) j->flipped[row] = true;
    if (!(error <= j->bound_flipped)) fail(j->r, j->what, row, id, have, want, j->bound_flipped);
    j->r->n_compared++;
}

/* The logits of one head: `top`, `logit`, `at` are the keys of a run. */
static void compare_logits(const judge *j, const golden *g, const json_t *run, const char *const key[3],
                           const float *have, int32_t V) {
    const json_t *column = get(g->doc, "column");
    for (int32_t t = 0; t < g->n_row; t++) {
        const float *row = have + (size_t)t * (size_t)V;
        const json_t *ids = item(get(run, key[0]), (size_t)t), *values = item(get(run, key[1]), (size_t)t);
        const json_t *others = item(get(run, key[2]), (size_t)t);
        size_t n_top = json_array_size(ids);
        for (size_t i = 0; i < n_top; i++)
            compare(j, t, integer(ids, i), (double)row[integer(ids, i)], number(values, i));
        for (size_t i = 0; i < json_array_size(column); i++)
            compare(j, t, integer(column, i), (double)row[integer(column, i)], number(others, i));
        /* nothing outside the golden list is better than its last by more than both errors */
        double least = number(values, n_top - 1) + j->bound_flipped;
        for (int32_t id = 0; id < V; id++) {
            if (!((double)row[id] > least)) continue;
            bool listed = false;
            for (size_t i = 0; i < n_top; i++) listed |= integer(ids, i) == id;
            if (!listed) fail(j->r, "a logit not in golden's best", t, id, (double)row[id], least, 0);
        }
    }
}

/* Root mean square distance of the fixed ids' logits from a run's. */
static double rms_distance(const golden *g, const json_t *run, const float *have, int32_t V) {
    const json_t *column = get(g->doc, "column");
    size_t n = json_array_size(column);
    double sum = 0;
    for (int32_t t = 0; t < g->n_row; t++) {
        for (size_t i = 0; i < n; i++) {
            double e = (double)have[(size_t)t * (size_t)V + (size_t)integer(column, i)] -
                       number(item(get(run, "at"), (size_t)t), i);
            sum += e * e;
        }
    }
    return sqrt(sum / ((double)n * g->n_row));
}

static void compare_resid(const judge *j, const json_t *run, const seen *s) {
    size_t D = (size_t)s->c->n_hidden;
    const json_t *all = get(run, "resid"), *rms = get(run, "rms");
    for (size_t i = 0; i < json_array_size(all); i++) {
        const json_t *one = item(all, i), *col = item(one, 2), *value = item(one, 3);
        int32_t layer = integer(one, 0), row = integer(one, 1);
        const float *x = s->resid + ((size_t)layer * (size_t)s->n_row + (size_t)row) * D;
        double unit = number(rms, (size_t)layer);
        for (size_t k = 0; k < json_array_size(col); k++)
            compare(j, row, integer(col, k), (double)x[integer(col, k)] / unit, number(value, k) / unit);
    }
}

/* All numbers of a run, then what only all of them together tell. */
static void compare_run(golden_report *r, const golden *g, const seen *s, bool rounded_kv, int n_rounding) {
    static const char *const main_key[3] = {"top", "logit", "at"}, *const mtp_key[3] = {"mtp_top", "mtp_logit",
                                                                                        "mtp_at"};
    const json_t *run = get(get(g->doc, "run"), rounded_kv ? "bf16" : "f32");
    const json_t *other = get(get(g->doc, "run"), rounded_kv ? "f32" : "bf16");
    int32_t V = s->c->n_vocab;
    double e = relative_error(s->c, rounded_kv) * sqrt(1 + n_rounding / 2.0),
           flip = rounded_kv && s->c->n_expert > 0 ? flip_of(s->c->n_expert_used) : 0.0;
    bool *flipped = room((size_t)g->n_row, sizeof *flipped);
    judge resid = {r, "resid", &r->resid_error, SIGMAS * e, SIGMAS * (e + flip), flipped};
    judge logits = {
        r, "logits", &r->logit_error, LOGIT_DEVIATION * resid.bound, LOGIT_DEVIATION * resid.bound_flipped, flipped};
    judge mtp = logits;
    mtp.what = "mtp logits";
    mtp.worst = &r->mtp_error;
    r->resid_bound = resid.bound;
    r->logit_bound = logits.bound;
    compare_logits(&logits, g, run, main_key, s->logits, V);
    compare_resid(&resid, run, s);
    if (s->mtp) compare_logits(&mtp, g, run, mtp_key, s->mtp, V);
    r->logit_rms = rms_distance(g, run, s->logits, V);
    r->other_rms = rms_distance(g, other, s->logits, V);
    for (int32_t t = 0; t < g->n_row; t++) r->n_flipped_row += flipped[t];
    const double rows = g->n_row / 4.0 * sqrt((2 + n_rounding) / 2.0);
    if (!(r->n_flipped_row <= rows)) fail(r, "rows beyond the bound", -1, 0, r->n_flipped_row, 0, rows);
    const double a = 4.0 / 3.0 * sqrt(n_rounding / 2.0);
    const double most = n_rounding > 2   ? LOGIT_DEVIATION * hypot(e, flip * sqrt(rows / g->n_row))
                        : n_rounding > 0 ? r->other_rms * a / hypot(a, 1)
                                         : r->other_rms / 2;
    if (!(r->logit_rms < most)) fail(r, "rms over all rows", -1, 0, r->logit_rms, 0, most);
    free(flipped);
}

/* One run of all rows on a fresh backend; the caller frees with seen_free, whatever the status. */
static ern_status collect(seen *s, const golden *g, const ern_backend_ops *ops, const ern_model *m, ern_kv_dtype kv,
                          ern_err *err) {
    const ern_config *c = &m->config;
    size_t T = (size_t)g->n_row, V = (size_t)c->n_vocab;
    int32_t n_page = (g->n_row + 15) / 16;
    ern_backend_options o = {.n_page = n_page,
                             .n_page_cell = 16,
                             .n_row_max = g->n_row,
                             .n_seq_max = 1,
                             .n_want_max = g->n_row,
                             .n_len_max = g->n_row,
                             .kv_dtype = kv,
                             .level = -1,
                             .mtp = m->has_mtp};
    *s = (seen){.c = c, .n_row = g->n_row};
    s->resid = room((size_t)c->n_layer * T * (size_t)c->n_hidden, sizeof *s->resid);
    s->logits = room(T * V, sizeof *s->logits);
    s->mtp = m->has_mtp ? room(T * V, sizeof *s->mtp) : NULL;
    ern_backend *b = NULL;
    ern_status status = ops->open(&b, m, &o, err);
    if (status != ERN_OK) return status;
    status = run_all(g, b, s, n_page, err);
    ops->close(b);
    return status;
}

static void seen_free(seen *s) {
    free(s->resid);
    free(s->logits);
    free(s->mtp);
}

golden_report golden_compare(const golden *g, const ern_backend_ops *ops, const ern_model *m, ern_kv_dtype kv) {
    golden_report r = {.ok = true};
    seen s;
    ern_err err;
    if (collect(&s, g, ops, m, kv, &err) == ERN_OK) {
        compare_run(&r, g, &s, kv == ERN_KV_BF16, roundings(ops, kv));
    } else {
        r.ok = false;
        snprintf(r.why, sizeof r.why, "%.200s", err.text);
    }
    seen_free(&s);
    return r;
}

double golden_growth(const golden *g, const ern_backend_ops *ops, const ern_model *m) {
    size_t D = (size_t)m->config.n_hidden, n_embed = (size_t)m->config.n_vocab * D, n = (size_t)g->n_row * D;
    size_t last = ((size_t)m->config.n_layer - 1) * n;
    ern_bf16 *embed = room(n_embed, sizeof *embed);
    double in[2] = {0}, out[2] = {0};
    for (size_t i = 0; i < n_embed;
         i++) { /* one unit of bf16 up or down, one element in 256: few choices of expert change */
        embed[i] = (ern_bf16)(m->embed[i] ^ (((i * 2654435761u) >> 16 & 255) == 0));
        double x = (double)ern_bf16_to_f32(m->embed[i]), dx = (double)ern_bf16_to_f32(embed[i]) - x;
        in[0] += dx * dx;
        in[1] += x * x;
    }
    ern_model other = *m;
    other.embed = embed;
    seen a, b;
    ern_err err;
    if (collect(&a, g, ops, m, ERN_KV_F32, &err) != ERN_OK) broken(err.text);
    if (collect(&b, g, ops, &other, ERN_KV_F32, &err) != ERN_OK) broken(err.text);
    for (size_t i = last; i < last + n; i++) {
        double x = (double)a.resid[i], dx = (double)b.resid[i] - x;
        out[0] += dx * dx;
        out[1] += x * x;
    }
    seen_free(&a);
    seen_free(&b);
    free(embed);
    return sqrt(out[0] / out[1]) / sqrt(in[0] / in[1]);
}
