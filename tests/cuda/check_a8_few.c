/* Few rows of 8 bits. cu_route_few has the bits of cu_norm, cu_quant_x8 and cu_route, which other files
 * hold against scalar code. cu_a8_skinny_run is held against scalar code here: integers to the bit. */
#include "check.h"

#include "model/quant.h"

enum { NAME = 112 };

static void *take(size_t bytes) {
    void *p = calloc(bytes + 1, 1);
    if (!p) abort();
    return p;
}

/* ---- rows -------------------------------------------------------------------------------------------------------- */

/* Rows of the residual stream, a norm's weights, and room for what becomes of them. */
typedef struct rows {
    int32_t n_row, n;
    float *x;
    cu_bf16 *w;
    size_t xn_bytes, code_bytes, scale_bytes;
    cu_bf16 *xn;
    cu_x8 x8;
} rows;

static rows rows_new(int32_t n_row, int32_t n, bool wild) {
    rows r = {.n_row = n_row, .n = n};
    const size_t count = (size_t)n_row * (size_t)n;
    float *x = take(count * sizeof *x);
    cu_bf16 *w = take((size_t)n * sizeof *w);
    for (size_t i = 0; i < count; i++) {
        x[i] = check_random() * (float)(1 << (i / CU_SEGMENT) % 5);
        if (wild && i / (size_t)n == 1) x[i] *= 0x1p-120f;
        if (wild && i / (size_t)n == 2 && i % 700 == 9) x[i] = INFINITY;
    }
    for (int32_t i = 0; i < n; i++)
        w[i] = ern_bf16_from_f32((1.0f + 0.5f * check_random()) * (i / CU_SEGMENT % 3 == 2 && wild ? 0x1p-110f : 1.0f));
    const int32_t pad = CU_PAD(n), ld_scale = (n_row + 3) / 4 * 4 + 4;
    r.xn_bytes = (size_t)n_row * (size_t)pad * sizeof(cu_bf16);
    r.code_bytes = (size_t)n_row * (size_t)(pad + CU_SEGMENT);
    r.scale_bytes = (size_t)(pad / CU_SEGMENT * ld_scale) * sizeof(float);
    r.x = check_new(x, count * sizeof *x);
    r.w = check_new(w, (size_t)n * sizeof *w);
    r.xn = check_new(NULL, r.xn_bytes);
    r.x8 = (cu_x8){check_new(NULL, r.code_bytes), pad + CU_SEGMENT, check_new(NULL, r.scale_bytes), ld_scale};
    free(x);
    free(w);
    return r;
}
static void rows_free(rows *r) {
    check_free(r->x), check_free(r->w), check_free(r->xn), check_free(r->x8.code), check_free(r->x8.scale);
}
/* Poison again; of xn zeros, which cu_quant_x8 reads beyond n. */
static void rows_clear(rows *r) {
    CHECK_CUDA(cudaMemset(r->xn, 0, r->xn_bytes));
    CHECK_CUDA(cudaMemset(r->x8.code, 0xff, r->code_bytes));
    CHECK_CUDA(cudaMemset(r->x8.scale, 0xff, r->scale_bytes));
}
/* All three in one piece. */
static unsigned char *rows_get(const rows *r) {
    unsigned char *all = take(r->xn_bytes + r->code_bytes + r->scale_bytes);
    check_get(all, r->xn, r->xn_bytes);
    check_get(all + r->xn_bytes, r->x8.code, r->code_bytes);
    check_get(all + r->xn_bytes + r->code_bytes, r->x8.scale, r->scale_bytes);
    return all;
}
static const char *rows_differ(const rows *r, const unsigned char *got, const unsigned char *want) {
    const unsigned char *code = got + r->xn_bytes, *scale = code + r->code_bytes;
    return memcmp(got, want, r->xn_bytes) != 0                                      ? "xn differs"
           : memcmp(code, want + r->xn_bytes, r->code_bytes) != 0                   ? "codes differ"
           : memcmp(scale, want + r->xn_bytes + r->code_bytes, r->scale_bytes) != 0 ? "scales differ"
                                                                                    : NULL;
}
static void rows_apart(rows *r, cu_codes codes) {
    rows_clear(r);
    CHECK_CUDA(cu_norm(0, r->xn, r->x, NULL, r->w, r->n_row, r->n, 1e-5f));
    CHECK_CUDA(cu_quant_x8(0, &r->x8, codes, r->xn, CU_PAD(r->n), r->n_row, r->n));
}

/* ---- the router ---------------------------------------------------------------------------------------------------
 */

/* The places of an expert are in any order: sort them. */
static unsigned char *lists_get(const check_lists *l, int32_t n_row) {
    unsigned char *all = take(l->bytes);
    check_get(all, l->memory, l->bytes);
    const int32_t n = n_row * l->r.n_used, E = l->r.n_expert;
    int32_t *word = (int32_t *)(void *)all, *place = word + 2 * n, *entry = word + 3 * n;
    int32_t *first = word + (l->r.first - (int32_t *)(void *)l->memory);
    for (int32_t e = 0; e < E; e++)
        for (int32_t i = first[e] < 0 ? n : first[e]; i < first[e + 1] && i < n; i++)
            for (int32_t k = i + 1; k < first[e + 1] && k < n; k++)
                if (place[k] < place[i]) {
                    const int32_t held = place[i];
                    place[i] = place[k], place[k] = held;
                }
    for (int32_t i = 0; i < n; i++) /* of an entry: whether the two agreed before is seen by its own place */
        if (entry[i] < 0 || entry[i] >= n) entry[i] = -2;
    return all;
}
/* Each entry's place holds the entry. */
static bool lists_agree(const check_lists *l, int32_t n) {
    int32_t *word = take(l->bytes);
    check_get(word, l->memory, l->bytes);
    bool good = true;
    for (int32_t i = 0; i < n; i++) {
        const int32_t p = word[3 * n + i];
        good &= p >= 0 && p < n && word[2 * n + p] == i;
        word[3 * n + i] = 0;
    }
    free(word);
    return good;
}

static void check_route(int32_t n_expert, int32_t n_used, int32_t n_hidden, bool with_bias, cu_codes codes) {
    static const int32_t n_rows[] = {1, 2, 5, 8, 9, 31, 32, 50, 127, 128};
    char name[NAME];
    snprintf(name, sizeof name, "route few %d of %d, %d%s, %s", n_used, n_expert, n_hidden, with_bias ? ", bias" : "",
             codes == CU_CODES_F8   ? "fp8"
             : codes == CU_CODES_I8 ? "int8"
                                    : "bf16");
    if (!check_begin(name)) return;
    const size_t count = (size_t)n_expert * (size_t)n_hidden;
    float *router = take(count * sizeof *router), *bias = take((size_t)n_expert * sizeof *bias);
    for (size_t i = 0; i < count; i++) router[i] = check_random() * 3.0f / sqrtf((float)n_hidden);
    for (int32_t i = 0; i < n_expert; i++) bias[i] = check_random() * 0.01f;
    if (!with_bias) memcpy(router + 5 * n_hidden, router + 3 * n_hidden, (size_t)n_hidden * sizeof *router); /* ties */
    float *drouter = check_new(router, count * sizeof *router);
    float *dbias = check_new(bias, (size_t)n_expert * sizeof *bias);
    const char *fault = NULL;
    for (size_t k = 0; k < sizeof n_rows / sizeof *n_rows && !fault; k += check_briefly ? 3 : 1) {
        const int32_t n_row = n_rows[k], n = n_row * n_used;
        rows r = rows_new(n_row, n_hidden, false);
        check_lists l = check_lists_new(n_row, n_expert, n_used);
        const cu_route_job j = {.x = r.x,
                                .norm_w = r.w,
                                .eps = 1e-5f,
                                .norm_min = 1e-12f,
                                .router = drouter,
                                .bias = with_bias ? dbias : NULL,
                                .n_row = n_row,
                                .n_hidden = n_hidden,
                                .beside = n_row == 1 && with_bias};
        rows_apart(&r, codes == CU_CODES_NONE ? CU_CODES_I8 : codes);
        CHECK_CUDA(cu_route(0, &j, &l.r));
        unsigned char *want_rows = rows_get(&r), *want = lists_get(&l, n_row);
        for (int again = 0; again < (check_briefly ? 2 : 3) && !fault; again++) { /* the count of rows is as it was */
            rows_clear(&r);
            CHECK_CUDA(cudaMemset(l.memory, 0xff, l.bytes));
            CHECK_CUDA(cu_route_few(0, &j, &l.r, codes == CU_CODES_NONE ? NULL : &r.x8, codes, r.xn));
            unsigned char *got_rows = rows_get(&r), *got = lists_get(&l, n_row);
            if (codes == CU_CODES_NONE)
                memcpy(got_rows + r.xn_bytes, want_rows + r.xn_bytes, r.code_bytes + r.scale_bytes);
            fault = rows_differ(&r, got_rows, want_rows);
            /* places within an expert were sorted, entries' places not: those are looked at apart */
            int32_t *a = (int32_t *)(void *)got, *b = (int32_t *)(void *)want;
            memset(a + 3 * n, 0, (size_t)n * 4);
            memset(b + 3 * n, 0, (size_t)n * 4);
            const int32_t logit_at = (int32_t)(l.bytes / 4) - n_row * n_expert;
            const int32_t tiles = (int32_t)cu_tiles_max(n_row, n_used, n_expert), n_tile = b[logit_at - 1];
            for (int32_t t = n_tile; t < tiles; t++) /* what lies behind the tiles is open */
                a[4 * n + t] = a[4 * n + tiles + t] = b[4 * n + t] = b[4 * n + tiles + t] = 0;
            if (!fault && memcmp(a, b, (size_t)n * 4) != 0) fault = "choices differ";
            if (!fault && memcmp(a + n, b + n, (size_t)n * 4) != 0) fault = "shares differ";
            if (!fault && memcmp(a + logit_at, b + logit_at, (size_t)(n_row * n_expert) * 4) != 0)
                fault = "logits differ";
            if (!fault && memcmp(a + 2 * n, b + 2 * n, (size_t)n * 4) != 0) fault = "places differ";
            if (!fault && memcmp(a + 4 * n, b + 4 * n, (size_t)(2 * tiles) * 4) != 0) fault = "tiles differ";
            if (!fault && memcmp(a, b, l.bytes) != 0) fault = "first or the number of tiles differs";
            if (!fault && !lists_agree(&l, n)) fault = "an entry's place is not the entry's";
            free(got_rows), free(got);
        }
        free(want_rows), free(want);
        check_lists_free(&l);
        rows_free(&r);
    }
    check_that(name, !fault, fault);
    check_free(drouter), check_free(dbias);
    free(router), free(bias);
}

/* ---- linears ------------------------------------------------------------------------------------------------------
 */

static check_weights weights_new(cu_format f, int32_t n_out, int32_t n_in, bool pairs) {
    return check_weights_new((cu_linear){.format = f,
                                         .n_out = n_out,
                                         .n_in = n_in,
                                         .n_band = CU_BANDS(n_out) * (pairs ? 2 : 1),
                                         .n_seg = CU_PAD(n_in) / CU_SEGMENT,
                                         .pairs = pairs});
}

/* Rows of bf16, and what quant_act makes of them: codes as numbers [row][CU_PAD(n)], scales [row][segment]. */
typedef struct inputs {
    cu_bf16 *x;
    float *code, *scale;
} inputs;

static inputs inputs_new(int32_t n_row, int32_t n, cu_codes codes) {
    const int32_t pad = CU_PAD(n), n_seg = pad / CU_SEGMENT;
    const size_t count = (size_t)n_row * (size_t)pad;
    cu_bf16 *x = take(count * sizeof *x);
    inputs in = {NULL, take(count * sizeof(float)), take((size_t)(n_row * n_seg) * sizeof(float))};
    uint8_t *bits = take((size_t)pad);
    for (int32_t t = 0; t < n_row; t++) {
        float *row = in.code + t * pad;
        for (int32_t i = 0; i < n; i++) {
            x[t * pad + i] = ern_bf16_from_f32(check_random() * (float)(1 << (t + i / CU_SEGMENT) % 4));
            row[i] = ern_bf16_to_f32(x[t * pad + i]);
        }
        if (codes == CU_CODES_F8)
            quant_act_fp8(bits, in.scale + t * n_seg, row, pad);
        else
            quant_act_int8((int8_t *)bits, in.scale + t * n_seg, row, pad);
        for (int32_t i = 0; i < pad; i++)
            row[i] = codes == CU_CODES_F8 ? ern_e4m3_to_f32(bits[i]) : (float)(int8_t)bits[i];
    }
    in.x = check_new(x, count * sizeof *x);
    free(x), free(bits);
    return in;
}
static void inputs_free(inputs *in) { check_free(in->x), free(in->code), free(in->scale); }

/* Output r of a band as the contract has it, in f32; of fp8 with the segments in double. bound: what fp8 products may
 * be off (check_a8.c tells why): 34 * 2^-13 of the largest magnitude that goes into a product, four a segment. */
static float output_of(const check_weights *o, const inputs *in, int32_t row, int32_t band, int32_t r, double *bound) {
    const int32_t pad = o->w.n_seg * CU_SEGMENT, n_seg = o->w.n_seg;
    const bool fp8 = o->w.format == CU_F8A8;
    float total = 0.0f;
    *bound = 0.0;
    for (int32_t s = 0; s < n_seg; s++) {
        double sum = 0.0, off = 0.0, by = (double)in->scale[row * n_seg + s];
        if (fp8) by *= (double)o->scale[((int64_t)(band / CU_A8_BANDS) * n_seg + s) * CU_A8_BANDS + band % CU_A8_BANDS];
        for (int32_t k = 0; k < CU_SEGMENT; k += 32) {
            double largest = fabs(sum) + off;
            for (int32_t i = s * CU_SEGMENT + k; i < s * CU_SEGMENT + k + 32; i++) {
                const double p = check_a8_code(&o->w, o->pack, band, r, i) * (double)in->code[row * pad + i];
                sum += p;
                largest = fmax(largest, fabs(p));
            }
            off += 34.0 * 0x1p-13 * largest;
        }
        total = fmaf((float)by, (float)sum, total);
        *bound += by * off + 0x1p-22 * (by * (fabs(sum) + off) + fabs((double)total));
    }
    if (fp8) return total;
    *bound = 0.0;
    return total * o->scale[band * CU_BAND + r];
}

static const char *const format_name[CU_FORMATS] = {"bf16",       "int8",         "int4",        "fp8",
                                                    "fp8 by fp8", "int8 by int8", "int4 by int8"};

static void check_linear(cu_format f, cu_epilogue e, int32_t n_out, int32_t n_in) {
    enum { MAX = CU_SKINNY_MAX };
    static const int32_t n_rows[] = {1, 2, 3, 8};
    char name[NAME], what[NAME] = "";
    const bool pairs = e == CU_SWIGLU;
    snprintf(name, sizeof name, "few %s %s %d x %d", format_name[f],
             pairs         ? "swiglu"
             : e == CU_ADD ? "add"
                           : "store",
             n_out, n_in);
    if (!check_begin(name)) return;
    check_weights o = weights_new(f, n_out, n_in, pairs);
    inputs in = inputs_new(MAX, n_in, cu_codes_of(f));
    const int32_t ld = n_out + 4 + n_out % 2;
    const size_t size = pairs ? sizeof(cu_bf16) : sizeof(float), bytes = (size_t)(MAX * ld) * size;
    unsigned char *before = take(bytes), *got = take(bytes);
    void *dy = check_new(NULL, bytes);
    double worst = 0.0;
    for (size_t k = 0; k < sizeof n_rows / sizeof *n_rows; k++) {
        memset(before, 0xff, bytes);
        if (e == CU_ADD)
            for (int32_t i = 0; i < MAX * ld; i++) {
                const float b = check_random();
                memcpy(before + (size_t)i * size, &b, size);
            }
        CHECK_CUDA(cudaMemcpy(dy, before, bytes, cudaMemcpyHostToDevice));
        const cu_job j = {.w = o.w,
                          .epilogue = e,
                          .x = in.x,
                          .ldx = CU_PAD(n_in),
                          .n_row = n_rows[k],
                          .y = pairs ? NULL : dy,
                          .ldy = ld,
                          .h = pairs ? dy : NULL,
                          .ldh = ld};
        CHECK_CUDA(cu_a8_skinny_run(0, &j));
        check_get(got, dy, bytes);
        const int32_t n_look = n_out < 300 ? n_out : 40;
        for (int32_t row = 0; row < MAX; row++) {
            const size_t from = (size_t)(row * ld) * size, skip = row < n_rows[k] ? (size_t)n_out * size : 0;
            if (memcmp(got + from + skip, before + from + skip, (size_t)ld * size - skip) != 0)
                snprintf(what, sizeof what, "%d rows: wrote beside row %d", n_rows[k], row), worst = 2.0;
            for (int32_t i = 0; i < n_look && row < n_rows[k]; i++) {
                const int32_t at = n_look == n_out ? i
                                   : i == 0        ? n_out - 1
                                                   : (int32_t)(check_random64() % (uint64_t)n_out);
                const int32_t band = at / CU_BAND, r = at % CU_BAND;
                double bound, more, want, y;
                if (pairs) {
                    const double gate = (double)output_of(&o, &in, row, 2 * band, r, &bound);
                    const double up = (double)output_of(&o, &in, row, 2 * band + 1, r, &more);
                    cu_bf16 h;
                    memcpy(&h, got + from + (size_t)at * size, size);
                    y = (double)ern_bf16_to_f32(h);
                    want = check_swiglu(gate, bound, up, more, &bound);
                } else {
                    float v = output_of(&o, &in, row, band, r, &bound), b, g;
                    memcpy(&b, before + from + (size_t)at * size, size);
                    memcpy(&g, got + from + (size_t)at * size, size);
                    if (e == CU_ADD) v += b;
                    if (f == CU_F8A8 && e == CU_ADD) bound += 0x1p-23 * (fabs((double)v) + fabs((double)b));
                    y = (double)g, want = (double)v;
                }
                const double error = fabs(y - want), share = error == 0.0 ? 0.0 : bound > 0.0 ? error / bound : 1e300;
                if (share <= worst) continue;
                worst = share;
                snprintf(what, sizeof what, "%d rows, row %d, output %d: %g, not %g", n_rows[k], row, at, y, want);
            }
        }
    }
    check_end(name, worst, what);
    check_free(dy);
    inputs_free(&in);
    check_weights_free(&o);
    free(before), free(got);
}

/* ---- how long it takes --------------------------------------------------------------------------------------------
 */

/* us of each of n parts of what s captures, which ends here. */
static double us_each(cudaStream_t s, int n) {
    enum { ROUNDS = 5 };
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t a, b;
    float ms = 0.0f, best = 1e9f;
    CHECK_CUDA(cudaStreamEndCapture(s, &graph));
    CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    CHECK_CUDA(cudaEventCreate(&a));
    CHECK_CUDA(cudaEventCreate(&b));
    for (int i = 0; i < ROUNDS; i++) {
        CHECK_CUDA(cudaEventRecord(a, s));
        CHECK_CUDA(cudaGraphLaunch(exec, s));
        CHECK_CUDA(cudaEventRecord(b, s));
        CHECK_CUDA(cudaEventSynchronize(b));
        CHECK_CUDA(cudaEventElapsedTime(&ms, a, b));
        if (ms < best) best = ms;
    }
    CHECK_CUDA(cudaEventDestroy(a));
    CHECK_CUDA(cudaEventDestroy(b));
    CHECK_CUDA(cudaGraphExecDestroy(exec));
    CHECK_CUDA(cudaGraphDestroy(graph));
    return (double)best * 1e3 / n;
}
/* A linear for times: all bytes are `fill`, the scale is the caller's. */
static cu_linear filled_new(cu_format format, int32_t n_out, int32_t n_in, bool pairs, int fill) {
    cu_linear w = {.format = format,
                   .n_out = n_out,
                   .n_in = n_in,
                   .n_band = CU_BANDS(n_out) * (pairs ? 2 : 1),
                   .n_seg = CU_PAD(n_in) / CU_SEGMENT,
                   .pairs = pairs};
    void *pack;
    CHECK_CUDA(cudaMalloc(&pack, (size_t)cu_pack_bytes(&w)));
    CHECK_CUDA(cudaMemset(pack, fill, (size_t)cu_pack_bytes(&w)));
    w.pack = pack;
    return w;
}
static void filled_free(const cu_linear *w) { CHECK_CUDA(cudaFree((void *)(uintptr_t)w->pack)); }

static void show_times(void) {
    enum { D = 2560, E = 64, K = 6, LAYERS = 28 };
    static const int32_t n_rows[] = {1, 2, 4, 8, 16, 32, 64, 128};
    if (!check_begin("times of routes")) return;
    cudaStream_t s;
    CHECK_CUDA(cudaStreamCreate(&s));
    float *router = take((size_t)LAYERS * E * D * sizeof *router);
    for (size_t i = 0; i < (size_t)E * D; i++) router[i] = check_random() * 0.06f;
    for (int l = 1; l < LAYERS; l++) memcpy(router + (size_t)l * E * D, router, (size_t)E * D * sizeof *router);
    float *drouter = check_new(router, (size_t)LAYERS * E * D * sizeof *router);
    for (size_t k = 0; k < sizeof n_rows / sizeof *n_rows; k++) {
        rows r = rows_new(n_rows[k], D, false);
        check_lists l = check_lists_new(n_rows[k], E, K);
        for (int way = 0; way < 2; way++) {
            CHECK_CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
            for (int i = 0; i < LAYERS; i++) {
                const cu_route_job j = {.x = r.x,
                                        .norm_w = r.w,
                                        .eps = 1e-5f,
                                        .norm_min = 1e-12f,
                                        .router = drouter + (size_t)i * E * D,
                                        .n_row = n_rows[k],
                                        .n_hidden = D};
                if (way) {
                    CHECK_CUDA(cu_route_few(s, &j, &l.r, &r.x8, CU_CODES_I8, r.xn));
                } else {
                    CHECK_CUDA(cu_norm(s, r.xn, r.x, NULL, r.w, n_rows[k], D, 1e-5f));
                    CHECK_CUDA(cu_quant_x8(s, &r.x8, CU_CODES_I8, r.xn, D, n_rows[k], D));
                    CHECK_CUDA(cu_route(s, &j, &l.r));
                }
            }
            printf("      %s of %d rows: %.2f us\n", way ? "route few" : "norm, codes, route", n_rows[k],
                   us_each(s, LAYERS));
        }
        check_lists_free(&l);
        rows_free(&r);
    }
    CHECK_CUDA(cudaStreamDestroy(s));
    check_free(drouter);
    free(router);
}

/* A chain of one linear on copies of its weights that the second cache does not hold. */
static void show_linear_times(void) {
    enum { COPIES = 24 };
    static const struct {
        int32_t n_out, n_in;
        bool pairs;
    } shapes[] = {{3584, 2560, false}, {2560, 2560, false},  {3072, 2560, true},   {2560, 3072, false},
                  {12288, 2560, true}, {2560, 12288, false}, {103424, 2560, false}};
    static const cu_format formats[] = {CU_F8A8, CU_I8A8, CU_I4A8, CU_I8};
    static const int32_t n_rows[] = {1, 2, 8};
    if (!check_begin("times of few rows")) return;
    cudaStream_t s;
    CHECK_CUDA(cudaStreamCreate(&s));
    for (size_t f = 0; f < sizeof formats / sizeof *formats; f++)
        for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
            const int32_t n_out = shapes[k].n_out, n_in = shapes[k].n_in;
            const int n_copy = n_out > 100000 ? 2 : COPIES;
            cu_linear w[COPIES];
            void *scale;
            for (int i = 0; i < n_copy; i++) w[i] = filled_new(formats[f], n_out, n_in, shapes[k].pairs, 0x31 + i);
            const size_t n_scale = (size_t)cu_scale_count(&w[0]) * sizeof(float);
            CHECK_CUDA(cudaMalloc(&scale, n_scale));
            CHECK_CUDA(cudaMemset(scale, 0, n_scale));
            for (int i = 0; i < n_copy; i++) w[i].scale = scale;
            inputs in = inputs_new(CU_SKINNY_MAX, n_in, CU_CODES_I8);
            rows r = rows_new(CU_SKINNY_MAX, n_in, false);
            void *y = check_new(NULL, (size_t)n_out * CU_SKINNY_MAX * sizeof(float));
            for (size_t q = 0; q < sizeof n_rows / sizeof *n_rows; q++)
                for (int norm = 0; norm < 2; norm++) {
                    CHECK_CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
                    for (int i = 0; i < n_copy; i++) {
                        const cu_job j = {.w = w[i],
                                          .epilogue = shapes[k].pairs ? CU_SWIGLU : CU_STORE,
                                          .x = norm ? NULL : in.x,
                                          .ldx = CU_PAD(n_in),
                                          .x_f32 = norm ? r.x : NULL,
                                          .norm_w = r.w,
                                          .eps = 1e-5f,
                                          .n_row = n_rows[q],
                                          .y = y,
                                          .ldy = n_out,
                                          .h = y,
                                          .ldh = n_out};
                        CHECK_CUDA(formats[f] == CU_I8 ? cu_skinny_run(s, &j) : cu_a8_skinny_run(s, &j));
                    }
                    const double us = us_each(s, n_copy);
                    printf("      %s %d x %d, %d rows%s: %.2f us, %.2f TB/s\n", format_name[formats[f]], n_out, n_in,
                           n_rows[q], norm ? ", norm" : "", us, (double)cu_pack_bytes(&w[0]) / us * 1e-6);
                }
            inputs_free(&in);
            rows_free(&r);
            check_free(y);
            for (int i = 0; i < n_copy; i++) filled_free(&w[i]);
            CHECK_CUDA(cudaFree(scale));
        }
    CHECK_CUDA(cudaStreamDestroy(s));
}

/* A dense layer's feed-forward again and again, on copies of its weights: with a norm's kernel in front, and without.
 */
static void show_dense_times(void) {
    enum { D = 2560, F = 12288, COPIES = 8 };
    static const cu_format formats[] = {CU_F8A8, CU_I8A8};
    static const int32_t n_rows[] = {1, 2, 4, 8};
    if (!check_begin("times of dense layers")) return;
    cudaStream_t s;
    CHECK_CUDA(cudaStreamCreate(&s));
    rows r = rows_new(CU_SKINNY_MAX, D, false);
    cu_bf16 *h = check_new(NULL, (size_t)CU_SKINNY_MAX * F * sizeof *h);
    CHECK_CUDA(cudaMemset(r.xn, 0, r.xn_bytes));
    CHECK_CUDA(cudaMemset(h, 0, (size_t)CU_SKINNY_MAX * F * sizeof *h));
    for (size_t f = 0; f < sizeof formats / sizeof *formats; f++) {
        cu_linear w[COPIES][2];
        void *scale;
        size_t n_scale = 0;
        for (int i = 0; i < COPIES; i++)
            for (int k = 0; k < 2; k++) {
                w[i][k] = filled_new(formats[f], k ? D : F, k ? F : D, !k, 0x31 + i);
                const size_t n = (size_t)cu_scale_count(&w[i][k]);
                if (n > n_scale) n_scale = n;
            }
        CHECK_CUDA(cudaMalloc(&scale, n_scale * sizeof(float)));
        CHECK_CUDA(cudaMemset(scale, 0, n_scale * sizeof(float)));
        for (size_t q = 0; q < sizeof n_rows / sizeof *n_rows; q++)
            for (int inside = 0; inside < 2; inside++) {
                CHECK_CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
                for (int i = 0; i < COPIES; i++) {
                    w[i][0].scale = w[i][1].scale = scale;
                    cu_job up = {
                        .w = w[i][0], .epilogue = CU_SWIGLU, .x = r.xn, .ldx = D, .n_row = n_rows[q], .h = h, .ldh = F};
                    if (inside) up.x_f32 = r.x, up.norm_w = r.w, up.eps = 1e-5f;
                    const cu_job down = {
                        .w = w[i][1], .epilogue = CU_ADD, .x = h, .ldx = F, .n_row = n_rows[q], .y = r.x, .ldy = D};
                    if (!inside) CHECK_CUDA(cu_norm(s, r.xn, r.x, NULL, r.w, n_rows[q], D, 1e-5f));
                    CHECK_CUDA(cu_a8_skinny_run(s, &up));
                    CHECK_CUDA(cu_a8_skinny_run(s, &down));
                }
                const double us = us_each(s, COPIES);
                printf("      dense layer, %s, %d rows, norm %s: %.2f us, %.2f TB/s\n", format_name[formats[f]],
                       n_rows[q], inside ? "inside" : "apart", us,
                       (double)(cu_pack_bytes(&w[0][0]) + cu_pack_bytes(&w[0][1])) / us * 1e-6);
            }
        for (int i = 0; i < COPIES; i++)
            for (int k = 0; k < 2; k++) filled_free(&w[i][k]);
        CHECK_CUDA(cudaFree(scale));
    }
    rows_free(&r);
    check_free(h);
    CHECK_CUDA(cudaStreamDestroy(s));
}

void check_a8_few(void) {
    /* outputs, inputs: ugly ones; clusters of 2, 4 and 8; a block alone, and one that stays for several tiles */
    static const int32_t shapes[][2] = {{44, 80},      {130, 300},   {200, 176},   {16, 128},
                                        {512, 2560},   {96, 1536},   {70, 12288},  {10240, 1280},
                                        {10240, 1100}, {3000, 2000}, {20608, 2560}};
    for (int f = CU_F8A8; f <= CU_I4A8; f++)
        for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++)
            for (int e = CU_STORE; e <= CU_SWIGLU; e++)
                check_linear((cu_format)f, (cu_epilogue)e,
                             e == CU_SWIGLU && shapes[k][0] > 3000 ? shapes[k][0] / 2 : shapes[k][0], shapes[k][1]);
    for (int codes = CU_CODES_NONE; codes <= CU_CODES_I8; codes++) {
        check_route(64, 6, 2560, true, (cu_codes)codes);
        check_route(64, 6, 2560, false, (cu_codes)codes);
        check_route(43, 7, 1024, true, (cu_codes)codes);
        check_route(8, 3, 80, true, (cu_codes)codes);
        check_route(16, 4, 256, false, (cu_codes)codes);
        check_route(160, 16, 100, true, (cu_codes)codes);
        check_route(500, 9, 3000, false, (cu_codes)codes);
    }
    show_times();
    show_linear_times();
    show_dense_times();
}
