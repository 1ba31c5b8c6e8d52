/* Embedding, norms, the router with its sort, and the sum of experts against scalar double; a row alone against the
 * same row in a crowd, bit by bit.
 *
 * Bounds: u = 2^-24 is half an ulp of f32, 2^-8 of bf16. A sum by lanes of n numbers is a chain of fma's a lane and a
 * tree, so an addend is rounded at most once a step of its chain and its tree: (steps) u of the sum of absolute values.
 * Terms of u^2 are covered by a factor of 1.01. */
#include "check.h"

static const double U = 0x1p-24;

enum { CROWD = 8192 };

static void *host_new(size_t bytes) {
    void *p = malloc(bytes > 0 ? bytes : 1);
    if (!p) {
        fprintf(stderr, "check_rows: no memory\n");
        exit(2);
    }
    return p;
}

static float *random_f32(size_t n, float size) {
    float *x = host_new(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = check_random() * size;
    return x;
}

/* middle + [-size, size) */
static cu_bf16 *random_bf16(size_t n, float middle, float size) {
    cu_bf16 *x = host_new(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = ern_bf16_from_f32(middle + check_random() * size);
    return x;
}

static int32_t random_below(int32_t n) { return (int32_t)(check_random64() % (uint64_t)n); }

/* A copy of device memory; the caller frees it. */
static void *copy_of(const void *device, size_t bytes) {
    void *p = host_new(bytes);
    check_get(p, device, bytes);
    return p;
}

/* Microseconds between two events, of 20 launches. */
static double us_between(cudaEvent_t a, cudaEvent_t b) {
    float ms = 0.0f;
    CHECK_CUDA(cudaEventSynchronize(b));
    CHECK_CUDA(cudaEventElapsedTime(&ms, a, b));
    return (double)ms * 1e3 / 20.0;
}

/* The larger of worst and error / bound; once NaN, always NaN. */
static double worse(double worst, double error, double bound) {
    const double share = bound > 0.0 ? error / bound : error == 0.0 ? 0.0 : INFINITY;
    return share <= worst || isnan(worst) ? worst : share;
}

/* ---- norm ---------------------------------------------------------------------------------------------------------
 */

/* The squares: a lane's chain of 4 ceil(n / 128) and 5 of the tree; half of that after the root, with half of the
 * division's and the addition's; then the root and two products: (m + 5 + 2) / 2 + 3; bf16 is rounded once more. */
static double norm_worst(const cu_bf16 *out, const float *x, const cu_bf16 *w, int32_t D, float eps) {
    double sum = 0.0, worst = 0.0, f32 = (4.0 * ((D + 127) / 128) + 7.0) / 2.0 + 3.0;
    for (int32_t i = 0; i < D; i++) sum += (double)x[i] * (double)x[i];
    double r = 1.0 / sqrt(sum / D + (double)eps);
    for (int32_t i = 0; i < D; i++) {
        double want = (double)x[i] * r * (double)ern_bf16_to_f32(w[i]);
        double bound = 1.01 * fabs(want) * (0x1p-8 + f32 * U) + 0x1p-133;
        worst = worse(worst, fabs((double)ern_bf16_to_f32(out[i]) - want), bound);
    }
    return worst;
}

static bool pad_untouched(const cu_bf16 *row, int32_t n) {
    bool good = true;
    for (int32_t i = n; i < CU_PAD(n); i++) good &= row[i] == 0xffffu;
    return good;
}

static void check_norm(int32_t T, int32_t D) {
    char name[96];
    snprintf(name, sizeof name, "norm T %d D %d", T, D);
    if (!check_begin(name)) return;
    const size_t n = (size_t)T * (size_t)D, pad = (size_t)CU_PAD(D);
    const float eps = 1e-5f;
    float *x = random_f32(n, 1.0f);
    for (size_t t = 0; t < (size_t)T; t++) /* rows of all sizes */
        for (size_t i = 0; i < (size_t)D; i++) x[t * (size_t)D + i] *= ldexpf(1.0f, (int)(t % 13) * 2 - 12);
    cu_bf16 *w = random_bf16((size_t)D, 1.0f, 0.9f);
    enum { WANTED = 5 };
    int32_t rows[WANTED];
    for (int i = 0; i < WANTED; i++) rows[i] = random_below(T);
    float *dx = check_new(x, n * sizeof *x);
    cu_bf16 *dw = check_new(w, (size_t)D * sizeof *w);
    int32_t *drows = check_new(rows, sizeof rows);
    cu_bf16 *dout = check_new(NULL, (size_t)T * pad * sizeof *dout);
    cu_bf16 *dwant = check_new(NULL, WANTED * pad * sizeof *dout), *done = check_new(NULL, pad * sizeof *dout);
    const int32_t alone = random_below(T);
    CHECK_CUDA(cu_norm(0, dout, dx, NULL, dw, T, D, eps));
    CHECK_CUDA(cu_norm(0, dwant, dx, drows, dw, WANTED, D, eps));
    CHECK_CUDA(cu_norm(0, done, dx + (size_t)alone * (size_t)D, NULL, dw, 1, D, eps));
    cu_bf16 *out = copy_of(dout, (size_t)T * pad * sizeof *out), *want = copy_of(dwant, WANTED * pad * sizeof *out);
    cu_bf16 *one = copy_of(done, pad * sizeof *out);
    double worst = 0.0;
    bool clean = true, same = memcmp(one, out + (size_t)alone * pad, pad * sizeof *out) == 0;
    for (int32_t t = 0; t < T; t++) {
        clean &= pad_untouched(out + (size_t)t * pad, D);
        if (n > 1000000 && t % (T / 16) != 3) continue;
        worst = worse(worst, norm_worst(out + (size_t)t * pad, x + (size_t)t * (size_t)D, w, D, eps), 1.0);
    }
    for (size_t i = 0; i < WANTED; i++)
        same &= memcmp(want + i * pad, out + (size_t)rows[i] * pad, pad * sizeof *out) == 0;
    check_end(name, worst, "an element");
    snprintf(name, sizeof name, "norm T %d D %d: alone, wanted, pad", T, D);
    check_that(name, clean && same, clean ? "bits differ" : "the pad was written");
    check_free(dx), check_free(dw), check_free(drows), check_free(dout), check_free(dwant), check_free(done);
    free(x), free(w), free(out), free(want), free(one);
}

/* ---- embedding and the MTP layer's input --------------------------------------------------------------------------
 */

static void check_embed(int32_t T, int32_t D) {
    enum { V = 300, PREV = 7 };
    char name[96];
    snprintf(name, sizeof name, "embed T %d D %d", T, D);
    if (!check_begin(name)) return;
    const size_t d = (size_t)D, n = (size_t)T * d;
    cu_bf16 *embed = random_bf16(V * d, 0.0f, 1.0f);
    int32_t prev[PREV], *token = host_new((size_t)T * sizeof *token);
    for (int i = 0; i < PREV; i++) prev[i] = random_below(V);
    for (int32_t t = 0; t < T; t++) token[t] = t % 3 == 1 ? -1 - random_below(PREV) : random_below(V);
    cu_bf16 *dembed = check_new(embed, V * d * sizeof *embed);
    int32_t *dprev = check_new(prev, sizeof prev), *dtoken = check_new(token, (size_t)T * sizeof *token);
    float *dx = check_new(NULL, n * sizeof *dx);
    CHECK_CUDA(cu_embed(0, dx, dtoken, dprev, dembed, T, D));
    float *x = copy_of(dx, n * sizeof *x);
    int32_t *after = copy_of(dtoken, (size_t)T * sizeof *after);
    bool good = true;
    for (int32_t t = 0; t < T; t++) {
        int32_t id = token[t] < 0 ? prev[-1 - token[t]] : token[t];
        good &= after[t] == id;
        for (size_t i = 0; i < d; i++) {
            float want = ern_bf16_to_f32(embed[(size_t)id * d + i]);
            good &= memcmp(&want, &x[(size_t)t * d + i], sizeof want) == 0;
        }
    }
    check_that(name, good, "a number or a token differs");
    check_free(dembed), check_free(dprev), check_free(dtoken), check_free(dx);
    free(embed), free(token), free(x), free(after);
}

static void check_take_rows(int32_t T, int32_t D) {
    char name[64];
    snprintf(name, sizeof name, "take rows of %d x %d", T, D);
    if (!check_begin(name)) return;
    const size_t d = (size_t)D, n = ((size_t)T + 2) / 3;
    float *x = random_f32((size_t)T * d, 2.0f);
    int32_t *rows = host_new(n * sizeof *rows);
    for (size_t i = 0; i < n; i++) rows[i] = (int32_t)(3 * i) + (3 * (int32_t)i + 2 < T ? random_below(3) : 0);
    float *dx = check_new(x, (size_t)T * d * sizeof *x), *dout = check_new(NULL, n * d * sizeof *x);
    int32_t *drows = check_new(rows, n * sizeof *rows);
    CHECK_CUDA(cu_take_rows(0, dout, dx, drows, 0, D * 4)); /* none */
    CHECK_CUDA(cu_take_rows(0, dout, dx, drows, (int32_t)n, D * 4));
    float *out = copy_of(dout, n * d * sizeof *out);
    bool same = true;
    for (size_t i = 0; i < n; i++) same &= memcmp(out + i * d, x + (size_t)rows[i] * d, d * sizeof *x) == 0;
    check_that(name, same, "bits differ");
    check_free(dx), check_free(dout), check_free(drows);
    free(x), free(rows), free(out);
}

/* Both halves must be what cu_norm (checked above) gives for rows in f32. */
static void check_mtp_in(int32_t T, int32_t D) {
    enum { V = 300 };
    char name[96];
    snprintf(name, sizeof name, "mtp_in T %d D %d", T, D);
    if (!check_begin(name)) return;
    const size_t d = (size_t)D, n = (size_t)T * d, pad = (size_t)CU_PAD(D), pad2 = (size_t)CU_PAD(2 * D);
    const float eps = 1e-5f;
    cu_bf16 *embed = random_bf16(V * d, 0.0f, 1.0f), *we = random_bf16(d, 1.0f, 0.9f), *wh = random_bf16(d, 1.0f, 0.9f);
    float *x = random_f32(n, 3.0f), *e = host_new(n * sizeof *e);
    const size_t ids = (size_t)T * sizeof(int32_t);
    int32_t *next = host_new(ids), *want = host_new(ids), *sampled = host_new(ids), *id = host_new(ids), W = 0;
    for (int32_t t = 0; t < T; t++) {
        bool wanted = t % 5 == 2 || t == T - 1, known = t % 3 == 0;
        id[t] = next[t] = known ? random_below(V) : -1;
        if (!known) id[t] = 0;
        if (wanted) {
            want[W] = t;
            sampled[W] = random_below(V);
            if (!known) id[t] = sampled[W];
            W++;
        }
        for (size_t i = 0; i < d; i++) e[(size_t)t * d + i] = ern_bf16_to_f32(embed[(size_t)id[t] * d + i]);
    }
    cu_bf16 *dembed = check_new(embed, V * d * sizeof *embed), *dwe = check_new(we, d * sizeof *we);
    cu_bf16 *dwh = check_new(wh, d * sizeof *wh);
    float *dx = check_new(x, n * sizeof *x), *de = check_new(e, n * sizeof *e);
    int32_t *dnext = check_new(next, ids), *dwant = check_new(want, ids), *dsampled = check_new(sampled, ids);
    int32_t *dout = check_new(NULL, ids);
    cu_bf16 *dz = check_new(NULL, (size_t)T * pad2 * sizeof *dz);
    cu_bf16 *dne = check_new(NULL, (size_t)T * pad * sizeof *dz), *dnx = check_new(NULL, (size_t)T * pad * sizeof *dz);
    CHECK_CUDA(cu_mtp_in(0, dz, dout, dx, dnext, dwant, dsampled, W, dembed, dwe, dwh, T, D, eps));
    CHECK_CUDA(cu_norm(0, dne, de, NULL, dwe, T, D, eps));
    CHECK_CUDA(cu_norm(0, dnx, dx, NULL, dwh, T, D, eps));
    cu_bf16 *z = copy_of(dz, (size_t)T * pad2 * sizeof *z), *ne = copy_of(dne, (size_t)T * pad * sizeof *z);
    cu_bf16 *nx = copy_of(dnx, (size_t)T * pad * sizeof *z);
    int32_t *out = copy_of(dout, ids);
    bool good = memcmp(out, id, ids) == 0, same = true, clean = true;
    for (size_t t = 0; t < (size_t)T; t++) {
        same &= memcmp(z + t * pad2, ne + t * pad, d * sizeof *z) == 0;
        same &= memcmp(z + t * pad2 + d, nx + t * pad, d * sizeof *z) == 0;
        clean &= pad_untouched(z + t * pad2, 2 * D);
    }
    check_that(name, good && same && clean, !good ? "a next token differs" : !same ? "bits differ" : "pad written");
    check_free(dembed), check_free(dwe), check_free(dwh), check_free(dx), check_free(de), check_free(dnext);
    check_free(dwant), check_free(dsampled), check_free(dout), check_free(dz), check_free(dne), check_free(dnx);
    free(embed), free(we), free(wh), free(x), free(e), free(next), free(want), free(sampled), free(id);
    free(z), free(ne), free(nx), free(out);
}

/* ---- the router ---------------------------------------------------------------------------------------------------
 */

typedef struct model {
    const char *name;
    int32_t E, K, D;
    bool bias;
    float norm_min;
} model;

/* Device memory of cu_routes for T rows. */
static cu_routes routes_new(int32_t T, int32_t E, int32_t K) {
    const size_t n = (size_t)T * (size_t)K * sizeof(int32_t);
    const size_t tiles = (size_t)cu_tiles_max(T, K, E) * sizeof(int32_t);
    int32_t *zero = calloc((size_t)E * 2 + 2, sizeof *zero);
    if (!zero) exit(2);
    int32_t *scratch = check_new(zero, ((size_t)E * 2 + 2) * sizeof *zero);
    free(zero);
    return (cu_routes){.n_expert = E,
                       .n_used = K,
                       .chosen = check_new(NULL, n),
                       .share = check_new(NULL, n),
                       .first = check_new(NULL, ((size_t)E + 1) * sizeof(int32_t)),
                       .place_entry = check_new(NULL, n),
                       .entry_place = check_new(NULL, n),
                       .tile_expert = check_new(NULL, tiles),
                       .tile_place = check_new(NULL, tiles),
                       .n_tile = check_new(NULL, sizeof(int32_t)),
                       .tile_rows = cu_tile_rows(T, K, E),
                       .logit = check_new(NULL, (size_t)T * (size_t)E * sizeof(float)),
                       .scratch = scratch};
}

static void routes_free(cu_routes *r) {
    check_free(r->chosen), check_free(r->share), check_free(r->first), check_free(r->place_entry);
    check_free(r->entry_place), check_free(r->tile_expert), check_free(r->tile_place), check_free(r->n_tile);
    check_free(r->logit), check_free(r->scratch);
}

/* Every entry once, among its expert's places; tiles hold every place once and stay within an expert. NULL: good. */
static const char *sort_fault(const cu_routes *r, int32_t T, const int32_t *chosen) {
    const int32_t E = r->n_expert, n = T * r->n_used;
    const size_t bytes = (size_t)n * sizeof(int32_t);
    const char *fault = NULL;
    int32_t *first = copy_of(r->first, ((size_t)E + 1) * sizeof(int32_t)), n_tile;
    int32_t *entry = copy_of(r->place_entry, bytes), *place = copy_of(r->entry_place, bytes);
    char *seen = host_new((size_t)n);
    memset(seen, 0, (size_t)n);
    check_get(&n_tile, r->n_tile, sizeof n_tile);
    if (first[0] != 0 || first[E] != n) fault = "first does not span all places";
    for (int32_t e = 0; e < E && !fault; e++)
        if (first[e] > first[e + 1]) fault = "first descends";
    for (int32_t e = 0; e < E && !fault; e++) {
        for (int32_t p = first[e]; p < first[e + 1] && !fault; p++) {
            if (entry[p] < 0 || entry[p] >= n)
                fault = "place_entry is out of range";
            else if (chosen[entry[p]] != e)
                fault = "an entry is among another expert's";
            else if (place[entry[p]] != p)
                fault = "entry_place is not the inverse";
        }
    }
    if (!fault && (n_tile < 0 || n_tile > cu_tiles_max(T, r->n_used, E))) fault = "n_tile is out of range";
    if (!fault) {
        int32_t *tile_e = copy_of(r->tile_expert, (size_t)n_tile * sizeof(int32_t));
        int32_t *tile_p = copy_of(r->tile_place, (size_t)n_tile * sizeof(int32_t)), covered = 0;
        for (int32_t i = 0; i < n_tile && !fault; i++) {
            const int32_t e = tile_e[i];
            if (e < 0 || e >= E || tile_p[i] < first[e] || tile_p[i] >= first[e + 1]) {
                fault = "a tile is outside of its expert";
                continue;
            }
            const int32_t end = tile_p[i] + r->tile_rows < first[e + 1] ? tile_p[i] + r->tile_rows : first[e + 1];
            for (int32_t p = tile_p[i]; p < end; p++) {
                if (seen[p]) fault = "two tiles hold one place";
                seen[p] = 1;
                covered++;
            }
        }
        if (!fault && covered != n) fault = "a place is in no tile";
        free(tile_e), free(tile_p);
    }
    free(first), free(entry), free(place), free(seen);
    return fault;
}

typedef struct route_sums {
    double logit, share;      /* worst, of their bounds */
    int64_t n_entry, n_other; /* entries looked at; chosen otherwise than in double */
    bool far;                 /* one of them by more than the bounds allow */
} route_sums;

/* One row in double. Logit: lane chains of m = 4 ceil(D / 128), trees and parts 3 + 4, one rounding of x * w, the last
 * product; the scale as in norm_worst with a tree of 7: (m + 9) / 2 + 1. All of it times sum |router x w| scale.
 * Probability, relative: errors b of the logits twice; subtraction u * range twice; expf 2 ulp = 4 u twice; the sum of
 * exps E / 32 + 5; the division. Score: one rounding. Share: the relative error twice, K additions, the division. */
static void route_row(route_sums *s, const model *m, const float *x, const cu_bf16 *w, const float *router,
                      const float *bias, float eps, const float *logit, const int32_t *chosen, const float *share) {
    const int32_t E = m->E, K = m->K, D = m->D;
    double l[512], score[512], prob[512], squares = 0.0, most = 0.0, top = -INFINITY, low = INFINITY, sum = 0.0;
    bool taken[512] = {false};
    const double chain = 4.0 * ((D + 127) / 128);
    for (int32_t i = 0; i < D; i++) squares += (double)x[i] * (double)x[i];
    const double scale = 1.0 / sqrt(squares / D + (double)eps);
    for (int32_t e = 0; e < E; e++) {
        double dot = 0.0, size = 0.0;
        for (int32_t i = 0; i < D; i++) {
            double p = (double)x[i] * (double)ern_bf16_to_f32(w[i]) * (double)router[(size_t)e * (size_t)D + (size_t)i];
            dot += p;
            size += fabs(p);
        }
        l[e] = dot * scale;
        const double bound = 1.01 * U * size * scale * (chain + 9.0 + (chain + 9.0) / 2.0 + 1.0);
        if (bound > most) most = bound;
        s->logit = worse(s->logit, fabs((double)logit[e] - l[e]), bound);
        top = l[e] > top ? l[e] : top;
        low = l[e] < low ? l[e] : low;
    }
    for (int32_t e = 0; e < E; e++) sum += exp(l[e] - top);
    const double relative = 1.01 * (2.0 * most + U * (2.0 * (top - low) + 8.0 + E / 32 + 1 + 5.0 + 1.0));
    double chosen_sum = 0.0;
    for (int32_t e = 0; e < E; e++) {
        prob[e] = exp(l[e] - top) / sum;
        score[e] = prob[e] + (bias ? (double)bias[e] : 0.0);
    }
    for (int32_t r = 0; r < K; r++) {
        int32_t best = -1;
        for (int32_t e = 0; e < E; e++)
            if (!taken[e] && (best < 0 || score[e] > score[best])) best = e;
        taken[best] = true;
        s->n_entry++;
        const int32_t c = chosen[r];
        if (c < 0 || c >= E) {
            s->far = true;
            return;
        }
        for (int32_t q = 0; q < r; q++) s->far |= chosen[q] == c;
        chosen_sum += prob[c];
        if (c == best) continue;
        s->n_other++;
        const double near = relative * (prob[c] + prob[best]) + U * (fabs(score[c]) + fabs(score[best]));
        /* exact ties of double are ties on the device as well: the lower id must win */
        if (!(fabs(score[c] - score[best]) <= near) || score[c] == score[best]) s->far = true;
    }
    if (chosen_sum < (double)m->norm_min) chosen_sum = (double)m->norm_min;
    for (int32_t r = 0; r < K; r++) {
        const double want = prob[chosen[r]] / chosen_sum;
        s->share = worse(s->share, fabs((double)share[r] - want), want * (2.0 * relative + 1.01 * (K + 1.0) * U));
    }
}

static void check_router(const model *m) {
    char name[96];
    snprintf(name, sizeof name, "route %s", m->name);
    if (!check_begin(name)) return;
    static const int32_t count[] = {CROWD, 1, 3, 64, 129, 200, 1000, 2100, 6161, -777, -8000}; /* -t: row t alone */
    const int32_t E = m->E, K = m->K, D = m->D;
    const size_t d = (size_t)D, e_row = (size_t)E, k_row = (size_t)K;
    const float eps = 1e-5f;
    float *x = random_f32(CROWD * d, 2.0f), *router = random_f32(e_row * d, 3.0f / sqrtf((float)D));
    float *bias = random_f32(e_row, 0.01f);
    cu_bf16 *w = random_bf16(d, 1.0f, 0.5f);
    if (!m->bias) memcpy(router + 5 * d, router + 3 * d, d * sizeof *router); /* ties */
    float *dx = check_new(x, CROWD * d * sizeof *x), *drouter = check_new(router, e_row * d * sizeof *router);
    float *dbias = check_new(bias, e_row * sizeof *bias);
    cu_bf16 *dw = check_new(w, d * sizeof *w);
    float *logit = NULL, *share = NULL; /* of the crowd */
    int32_t *chosen = NULL;
    route_sums sums = {0};
    for (size_t c = 0; c < sizeof count / sizeof *count; c++) {
        const int32_t T = count[c] < 0 ? 1 : count[c], row0 = count[c] < 0 ? -count[c] : 0;
        const size_t t = (size_t)T, from = (size_t)row0;
        cu_routes r = routes_new(T, E, K);
        cu_route_job job = {.x = dx + from * d,
                            .norm_w = dw,
                            .eps = eps,
                            .norm_min = m->norm_min,
                            .router = drouter,
                            .bias = m->bias ? dbias : NULL,
                            .n_row = T,
                            .n_hidden = D};
        CHECK_CUDA(cu_route(0, &job, &r));
        float *l = copy_of(r.logit, t * e_row * sizeof *l), *sh = copy_of(r.share, t * k_row * sizeof *sh);
        int32_t *ch = copy_of(r.chosen, t * k_row * sizeof *ch);
        const char *fault = sort_fault(&r, T, ch);
        snprintf(name, sizeof name, "route %s T %d from %d", m->name, T, row0);
        if (c == 0) {
            logit = l, share = sh, chosen = ch;
            const int32_t step = D > 1000 ? CROWD / 24 : CROWD / 512;
            for (size_t i = 0; i < CROWD; i += (size_t)step)
                route_row(&sums, m, x + i * d, w, router, m->bias ? bias : NULL, eps, l + i * e_row, ch + i * k_row,
                          sh + i * k_row);
        } else {
            if (!fault && memcmp(l, logit + from * e_row, t * e_row * sizeof *l) != 0) fault = "bits of logits differ";
            if (!fault && memcmp(ch, chosen + from * k_row, t * k_row * sizeof *ch) != 0) fault = "choices differ";
            if (!fault && memcmp(sh, share + from * k_row, t * k_row * sizeof *sh) != 0)
                fault = "bits of shares differ";
            free(l), free(sh), free(ch);
        }
        check_that(name, !fault, fault);
        routes_free(&r);
    }
    snprintf(name, sizeof name, "route %s: logits", m->name);
    check_end(name, sums.logit, "a logit");
    snprintf(name, sizeof name, "route %s: shares", m->name);
    check_end(name, sums.share, "a share");
    snprintf(name, sizeof name, "route %s: choice (%d of %d otherwise)", m->name, (int)sums.n_other, (int)sums.n_entry);
    check_that(name, !sums.far && sums.n_other <= 2 + sums.n_entry / 500, "not the best ones");
    check_free(dx), check_free(drouter), check_free(dbias), check_free(dw);
    free(x), free(router), free(bias), free(w), free(logit), free(share), free(chosen);
}

/* ---- the sum of experts -------------------------------------------------------------------------------------------
 */

static int32_t *random_order(int32_t n) {
    int32_t *p = host_new((size_t)n * sizeof *p);
    for (int32_t i = 0; i < n; i++) p[i] = i;
    for (int32_t i = n - 1; i > 0; i--) {
        const int32_t k = random_below(i + 1), held = p[i];
        p[i] = p[k];
        p[k] = held;
    }
    return p;
}

/* y: K roundings of sum |share v|; then y + shared, and x + that. */
static void check_combine(int32_t T, int32_t K, int32_t D, bool with_shared, bool with_out) {
    char name[96];
    snprintf(name, sizeof name, "combine T %d K %d D %d%s%s", T, K, D, with_shared ? " shared" : "",
             with_out ? " out" : "");
    if (!check_begin(name)) return;
    const size_t d = (size_t)D, n = (size_t)T * d, entries = (size_t)T * (size_t)K;
    float *x = random_f32(n, 1.0f), *y = random_f32(entries * d, 1.0f), *shared = random_f32(n, 1.0f);
    float *share = random_f32(entries, 1.0f);
    int32_t *place = random_order(T * K);
    float *dx = check_new(x, n * sizeof *x), *dy = check_new(y, entries * d * sizeof *y);
    float *dshared = check_new(shared, n * sizeof *x), *dout = check_new(NULL, n * sizeof *x);
    cu_routes r = {.n_used = K,
                   .share = check_new(share, entries * sizeof *share),
                   .entry_place = check_new(place, entries * sizeof *place)};
    CHECK_CUDA(cu_combine(0, dx, with_out ? dout : NULL, dy, with_shared ? dshared : NULL, &r, T, D, NULL));
    float *got = copy_of(dx, n * sizeof *x), *out = copy_of(dout, n * sizeof *x);
    double worst = 0.0;
    for (size_t t = 0; t < (size_t)T; t++) {
        for (size_t i = 0; i < d; i++) {
            double sum = 0.0, size = 0.0;
            for (size_t k = 0; k < (size_t)K; k++) {
                const size_t entry = t * (size_t)K + k;
                const double p = (double)share[entry] * (double)y[(size_t)place[entry] * d + i];
                sum += p;
                size += fabs(p);
            }
            const double more = with_shared ? (double)shared[t * d + i] : 0.0;
            const double want = (double)x[t * d + i] + sum + more;
            const double bound = 1.01 * U * ((K + 2) * (size + fabs(more)) + fabs(want)) + 0x1p-140;
            worst = worse(worst, fabs((double)got[t * d + i] - want), bound);
            if (with_out) worst = worse(worst, fabs((double)out[t * d + i] - sum), 1.01 * U * K * size + 0x1p-140);
        }
    }
    check_end(name, worst, "an element");
    check_free(dx), check_free(dy), check_free(dshared), check_free(dout), check_free(r.share);
    check_free(r.entry_place);
    free(x), free(y), free(shared), free(share), free(place), free(got), free(out);
}

/* Room for n rows of D numbers as codes. */
typedef struct rows8 {
    cu_x8 x;
    size_t code_bytes, scale_bytes;
} rows8;
static rows8 rows8_new(int32_t n, int32_t D) {
    const int64_t ld = (n + 3) / 4 * 4;
    rows8 r = {.code_bytes = (size_t)n * (size_t)CU_PAD(D),
               .scale_bytes = (size_t)(CU_PAD(D) / CU_SEGMENT) * (size_t)ld * sizeof(float)};
    r.x = (cu_x8){check_new(NULL, r.code_bytes), CU_PAD(D), check_new(NULL, r.scale_bytes), ld};
    return r;
}
static void rows8_free(rows8 *r) { check_free(r->x.code), check_free(r->x.scale); }
static bool rows8_same(const rows8 *a, const rows8 *b) {
    void *code[2] = {copy_of(a->x.code, a->code_bytes), copy_of(b->x.code, a->code_bytes)};
    void *scale[2] = {copy_of(a->x.scale, a->scale_bytes), copy_of(b->x.scale, a->scale_bytes)};
    const bool same = memcmp(code[0], code[1], a->code_bytes) == 0 && memcmp(scale[0], scale[1], a->scale_bytes) == 0;
    for (int i = 0; i < 2; i++) free(code[i]), free(scale[i]);
    return same;
}

static const char *const codes_name[] = {"bf16", "f8", "i8"};

/* With the norm of what comes out: the bits of the two kernels, or three. */
static void check_combine_norm(int32_t T, int32_t K, int32_t D, bool with_shared, cu_codes codes) {
    char name[96];
    snprintf(name, sizeof name, "combine and norm T %d K %d D %d%s %s", T, K, D, with_shared ? " shared" : "",
             codes_name[codes]);
    if (!check_begin(name)) return;
    const size_t d = (size_t)D, n = (size_t)T * d, entries = (size_t)T * (size_t)K, pad = (size_t)T * (size_t)CU_PAD(D);
    float *x = random_f32(n, 1.0f), *y = random_f32(entries * d, 1.0f), *share = random_f32(entries, 1.0f);
    x[n / 2] = INFINITY, memset(x + n / 3, 0, sizeof *x);
    cu_bf16 *w = random_bf16(d, 1.0f, 0.5f), *zero = host_new(pad * sizeof *zero);
    memset(zero, 0, pad * sizeof *zero);
    int32_t *place = random_order(T * K);
    float *dx[2] = {check_new(x, n * sizeof *x), check_new(x, n * sizeof *x)};
    float *dy = check_new(y, entries * d * sizeof *y), *dshared = with_shared ? check_new(x, n * sizeof *x) : NULL;
    cu_bf16 *dw = check_new(w, d * sizeof *w), *dxn[2];
    for (int i = 0; i < 2; i++) dxn[i] = check_new(zero, pad * sizeof *dxn[i]);
    rows8 to[2] = {rows8_new(T, D), rows8_new(T, D)};
    cu_routes r = {.n_used = K,
                   .share = check_new(share, entries * sizeof *share),
                   .entry_place = check_new(place, entries * sizeof *place)};
    const bool xn = codes == CU_CODES_NONE || !cu_norm_holds(D) || T % 2 == 0;
    const cu_norm_job after = {.w = dw, .eps = 1e-5f, .xn = xn ? dxn[0] : NULL, .codes = codes, .x8 = to[0].x};
    CHECK_CUDA(cu_combine(0, dx[0], NULL, dy, dshared, &r, T, D, &after));
    CHECK_CUDA(cu_combine(0, dx[1], NULL, dy, dshared, &r, T, D, NULL));
    CHECK_CUDA(cu_norm(0, dxn[1], dx[1], NULL, dw, T, D, 1e-5f));
    if (codes != CU_CODES_NONE) CHECK_CUDA(cu_quant_x8(0, &to[1].x, codes, dxn[1], CU_PAD(D), T, D));
    float *got[2] = {copy_of(dx[0], n * sizeof *x), copy_of(dx[1], n * sizeof *x)};
    cu_bf16 *bits[2] = {copy_of(dxn[0], pad * sizeof *w), copy_of(dxn[1], pad * sizeof *w)};
    const cu_bf16 *want = xn ? bits[1] : zero;
    check_that(name,
               memcmp(got[0], got[1], n * sizeof *x) == 0 && memcmp(bits[0], want, pad * sizeof *w) == 0 &&
                   rows8_same(&to[0], &to[1]),
               "other bits than one by one");
    check_free(dy), check_free(dshared), check_free(dw), check_free(r.share), check_free(r.entry_place);
    for (int i = 0; i < 2; i++) check_free(dx[i]), check_free(dxn[i]), free(got[i]), free(bits[i]), rows8_free(&to[i]);
    free(x), free(y), free(share), free(w), free(zero), free(place);
}

/* A norm by row and by place, as bf16 and as codes. */
static void check_norm_run(int32_t T, int32_t K, int32_t D, cu_codes codes, bool with_xn) {
    char name[96];
    snprintf(name, sizeof name, "norm run T %d K %d D %d %s%s", T, K, D, codes_name[codes], with_xn ? " and bf16" : "");
    if (!check_begin(name)) return;
    const size_t d = (size_t)D, n = (size_t)T * d, k_row = (size_t)K, pad = (size_t)CU_PAD(D);
    const size_t each = codes == CU_CODES_NONE ? pad * sizeof(cu_bf16) : pad;
    float *x = random_f32(n, 1.0f);
    x[n / 2] = NAN;
    for (size_t i = 0; i < (d < 128 ? d : 128); i++) x[n / 4 / d * d + i] = 0.0f;
    cu_bf16 *w = random_bf16(d, 1.0f, 0.5f), *zero = host_new((size_t)T * pad * sizeof *zero);
    memset(zero, 0, (size_t)T * pad * sizeof *zero);
    int32_t *place = random_order(T * K);
    float *dx = check_new(x, n * sizeof *x);
    cu_bf16 *dw = check_new(w, d * sizeof *w), *dxn[2];
    for (int i = 0; i < 2; i++) dxn[i] = check_new(zero, (size_t)T * pad * sizeof *w);
    const bool spread = K > 0 && cu_norm_spreads(D);
    void *dplace = spread ? check_new(NULL, (size_t)T * k_row * each) : NULL;
    rows8 to[2] = {rows8_new(T, D), rows8_new(T, D)};
    cu_routes r = {.n_used = K, .entry_place = check_new(place, (size_t)T * k_row * sizeof *place)};
    const cu_norm_job j = {.w = dw,
                           .eps = 1e-5f,
                           .xn = with_xn ? dxn[1] : NULL,
                           .codes = codes,
                           .x8 = to[1].x,
                           .by_place = dplace,
                           .routes = &r};
    CHECK_CUDA(cu_norm(0, dxn[0], dx, NULL, dw, T, D, 1e-5f));
    if (codes != CU_CODES_NONE) CHECK_CUDA(cu_quant_x8(0, &to[0].x, codes, dxn[0], CU_PAD(D), T, D));
    CHECK_CUDA(cu_norm_run(0, &j, dx, T, D));
    cu_bf16 *want = copy_of(dxn[0], (size_t)T * pad * sizeof *w), *got = copy_of(dxn[1], (size_t)T * pad * sizeof *w);
    bool same = memcmp(with_xn ? want : zero, got, (size_t)T * pad * sizeof *w) == 0 && rows8_same(&to[0], &to[1]);
    if (spread) {
        char *by_place = copy_of(dplace, (size_t)T * k_row * each);
        char *row = codes == CU_CODES_NONE ? (char *)want : copy_of(to[0].x.code, to[0].code_bytes);
        for (size_t e = 0; e < (size_t)T * k_row; e++)
            same &= memcmp(by_place + (size_t)place[e] * each, row + e / k_row * each, each) == 0;
        free(by_place);
        if (row != (char *)want) free(row);
    }
    check_that(name, same, "other bits than the norm and its codes one by one");
    check_free(dx), check_free(dw), check_free(dplace), check_free(dxn[0]), check_free(dxn[1]);
    check_free(r.entry_place), rows8_free(&to[0]), rows8_free(&to[1]);
    free(x), free(w), free(zero), free(place), free(want), free(got);
}

/* ---- how long it takes --------------------------------------------------------------------------------------------
 */

static void show_times(void) {
    enum { D = 2560, E = 64, K = 6 };
    if (!check_begin("times of rows")) return;
    cudaEvent_t a, b;
    CHECK_CUDA(cudaEventCreate(&a));
    CHECK_CUDA(cudaEventCreate(&b));
    const size_t n = (size_t)CROWD * D;
    float *x = random_f32(n, 1.0f), *router = random_f32((size_t)E * D, 0.06f), *share = random_f32(CROWD * K, 1.0f);
    cu_bf16 *w = random_bf16(D, 1.0f, 0.5f);
    int32_t *place = random_order(CROWD * K);
    float *dx = check_new(x, n * sizeof *x), *drouter = check_new(router, (size_t)E * D * sizeof *router);
    cu_bf16 *dw = check_new(w, D * sizeof *w), *dout = check_new(NULL, n * sizeof *dout);
    static const int32_t norm_rows[] = {1, 256, CROWD}, route_rows[] = {1, 8, 64, 256, 1024, 2048, CROWD};
    for (size_t c = 0; c < sizeof norm_rows / sizeof *norm_rows; c++) {
        for (int i = -3; i < 20; i++) {
            if (i == 0) CHECK_CUDA(cudaEventRecord(a, 0));
            CHECK_CUDA(cu_norm(0, dout, dx, NULL, dw, norm_rows[c], D, 1e-5f));
        }
        CHECK_CUDA(cudaEventRecord(b, 0));
        printf("      norm T %d D %d: %.2f us\n", norm_rows[c], D, us_between(a, b));
    }
    for (size_t c = 0; c < sizeof route_rows / sizeof *route_rows; c++) {
        cu_routes r = routes_new(route_rows[c], E, K);
        cu_route_job job = {.x = dx,
                            .norm_w = dw,
                            .eps = 1e-5f,
                            .norm_min = 1e-12f,
                            .router = drouter,
                            .n_row = route_rows[c],
                            .n_hidden = D};
        for (int i = -3; i < 20; i++) {
            if (i == 0) CHECK_CUDA(cudaEventRecord(a, 0));
            CHECK_CUDA(cu_route(0, &job, &r));
        }
        CHECK_CUDA(cudaEventRecord(b, 0));
        printf("      route T %d E %d K %d D %d: %.2f us\n", route_rows[c], E, K, D, us_between(a, b));
        routes_free(&r);
    }
    /* outputs of experts: the same random rows over and over */
    float *dy = check_new(NULL, n * K * sizeof *dy), *dshared = check_new(x, n * sizeof *x);
    for (size_t k = 0; k < K; k++) CHECK_CUDA(cudaMemcpy(dy + k * n, dx, n * sizeof *dy, cudaMemcpyDeviceToDevice));
    cu_routes r = {.n_used = K,
                   .share = check_new(share, (size_t)CROWD * K * sizeof *share),
                   .entry_place = check_new(place, (size_t)CROWD * K * sizeof *place)};
    static const int32_t combine_rows[] = {1, 64, CROWD};
    for (size_t c = 0; c < sizeof combine_rows / sizeof *combine_rows; c++) {
        for (int i = -3; i < 20; i++) {
            if (i == 0) CHECK_CUDA(cudaEventRecord(a, 0));
            CHECK_CUDA(cu_combine(0, dx, NULL, dy, dshared, &r, combine_rows[c], D, NULL));
        }
        CHECK_CUDA(cudaEventRecord(b, 0));
        double us = us_between(a, b);
        printf("      combine T %d K %d D %d: %.2f us, %.2f TB/s\n", combine_rows[c], K, D, us,
               (double)combine_rows[c] * D * 4.0 * (K + 3) / us * 1e-6);
    }
    rows8 codes = rows8_new(CROWD, D);
    for (int c = CU_CODES_NONE; c <= CU_CODES_I8; c++) {
        cu_norm_job j = {.w = dw,
                         .eps = 1e-5f,
                         .xn = c == CU_CODES_NONE ? dout : NULL,
                         .codes = (cu_codes)c,
                         .x8 = codes.x,
                         .routes = &r};
        for (int i = -3; i < 20; i++) {
            if (i == 0) CHECK_CUDA(cudaEventRecord(a, 0));
            CHECK_CUDA(cu_combine(0, dx, NULL, dy, dshared, &r, CROWD, D, &j));
        }
        CHECK_CUDA(cudaEventRecord(b, 0));
        printf("      combine and norm T %d K %d D %d %s: %.2f us\n", CROWD, K, D, codes_name[c], us_between(a, b));
        j.by_place = dy;
        for (int i = -3; i < 20; i++) {
            if (i == 0) CHECK_CUDA(cudaEventRecord(a, 0));
            CHECK_CUDA(cu_norm_run(0, &j, dx, CROWD, D));
        }
        CHECK_CUDA(cudaEventRecord(b, 0));
        printf("      norm by row and place T %d K %d D %d %s: %.2f us\n", CROWD, K, D, codes_name[c],
               us_between(a, b));
    }
    rows8_free(&codes);
    check_free(dx), check_free(drouter), check_free(dw), check_free(dout), check_free(dy), check_free(dshared);
    check_free(r.share), check_free(r.entry_place);
    CHECK_CUDA(cudaEventDestroy(a));
    CHECK_CUDA(cudaEventDestroy(b));
    free(x), free(router), free(share), free(w), free(place);
}

void check_rows(void) {
    static const model models[] = {
        {"21b-a3b", 64, 6, 2560, true, 1e-12f},      {"21b-a3b without bias", 64, 6, 2560, false, 1e-12f},
        {"tiny-moe", 8, 3, 80, true, 1e-12f},        {"tiny-moe, large norm_min", 8, 3, 80, false, 0.75f},
        {"demo-moe", 16, 4, 256, true, 1e-12f},      {"many experts", 160, 16, 100, true, 1e-12f},
        {"ragged parts", 70, 5, 1668, true, 1e-12f}, {"one step a part", 64, 1, 132, true, 1e-12f},
    };
    static const int32_t widths[] = {64, 80, 70, 3, 256, 1000, 1024, 1028, 2560, 2561, 4096};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) check_norm(i % 2 ? 300 : 1000, widths[i]);
    check_embed(1, 2560);
    check_embed(301, 80);
    check_embed(50, 70);
    check_embed(130, 3000);
    check_take_rows(1, 2560);
    check_take_rows(301, 80);
    check_take_rows(50, 70);
    check_take_rows(1000, 3000);
    check_mtp_in(1, 64);
    check_mtp_in(70, 80);
    check_mtp_in(41, 70);
    check_mtp_in(33, 1024);
    check_mtp_in(33, 2560);
    check_mtp_in(20, 2564);
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) check_router(&models[i]);
    for (int c = CU_CODES_NONE; c <= CU_CODES_I8; c++) {
        const cu_codes codes = (cu_codes)c;
        check_norm_run(2050, 6, 2560, codes, true);
        check_norm_run(37, 4, 128, codes, true);
        check_norm_run(131, 16, 1152, codes, c == CU_CODES_NONE);
        check_norm_run(301, 6, 2560, codes, c == CU_CODES_NONE);
        check_norm_run(301, 0, 1284, codes, c == CU_CODES_NONE);
        check_norm_run(50, 0, 80, codes, true);
        check_norm_run(50, 0, 2564, codes, true);
        check_norm_run(50, 0, 70, codes, true);
        check_combine_norm(2049, 6, 2560, true, codes);
        check_combine_norm(2050, 4, 1284, false, codes);
        check_combine_norm(2049, 3, 80, true, codes);
        check_combine_norm(37, 6, 2560, true, codes);
        check_combine_norm(37, 2, 2564, true, codes);
    }
    check_combine(1, 6, 2560, true, false);
    check_combine(37, 6, 2560, true, true);
    check_combine(100, 3, 80, true, true);
    check_combine(100, 4, 256, false, true);
    check_combine(21, 16, 70, false, false);
    check_combine(21, 5, 1030, true, true);
    show_times();
}
