/* cu_a8_skinny_run, cu_a8_mid_run and cu_a8_mid_grouped, of all three formats. Weights are drawn as packed bytes and
 * read back by cu_kernels.h's drawing; rows are quantized by quant_act_fp8 and quant_act_int8. Each row alone is
 * compared with scalar double, within a derived bound; rows in company, the norm in front, experts and kernels one
 * after the other bit for bit with those. `a8 speed` prints times and checks nothing. */
#include "check.h"

#include "model/quant.h"

enum { ROWS = 131, FEW = 40, NAME = 128, GAP = 4, E = 8, K = 3, NOBODY = 5 };

static void *take(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!p) abort();
    return p;
}
static float between(float lo, float hi) { return lo + (hi - lo) * 0.5f * (check_random() + 1.0f); }

/* ---- weights and rows -------------------------------------------------------------------------------------------- */

static const char *const kind_name[] = {[CU_F8A8] = "f8", [CU_I8A8] = "i8", [CU_I4A8] = "i4"};

static void code_set(check_weights *s, int32_t band, int32_t r, int32_t i) {
    uint8_t *byte = s->pack + check_a8_place(&s->w, band, r, i);
    const uint64_t any = check_random64();
    if (s->w.format == CU_F8A8) /* few are large */
        *byte = ern_e4m3_from_f32(check_random() * (any % 16 ? 4.0f : 448.0f));
    else if (s->w.format == CU_I8A8) /* few are the least */
        *byte = any % 16 ? (uint8_t)(any >> 8) : 0x80;
    else
        *byte = (uint8_t)(*byte | (any & 15) << (i % 64 < 32 ? 4 : 0));
}

/* What lies beyond the last band is poison. */
static check_weights weights_new(cu_format f, int32_t n_out, int32_t n_in, bool pairs) {
    check_weights s = {.w = {.format = f, .n_out = n_out, .n_in = n_in, .pairs = pairs}};
    s.w.n_band = CU_BANDS(n_out) * (pairs ? 2 : 1);
    s.w.n_seg = CU_PAD(n_in) / CU_SEGMENT;
    const size_t bytes = (size_t)cu_pack_bytes(&s.w), n_scale = (size_t)cu_scale_count(&s.w);
    const size_t segment = 2 * (size_t)cu_group_bytes(f);
    s.pack = take(bytes);
    s.scale = take(n_scale * sizeof(float));
    memset(s.pack, 0xff, bytes);
    memset(s.scale, 0xff, n_scale * sizeof(float));
    for (int32_t b = 0; b < s.w.n_band; b++) {
        for (int32_t g = 0; g < s.w.n_seg; g++)
            memset(s.pack + (size_t)check_a8_segment(&s.w, b, g) * segment, 0, segment);
        for (int32_t r = 0; r < CU_BAND && (pairs ? b / 2 : b) * CU_BAND + r < n_out; r++)
            for (int32_t i = 0; i < n_in; i++) code_set(&s, b, r, i);
        if (f == CU_F8A8)
            for (int32_t g = 0; g < s.w.n_seg; g++) s.scale[check_a8_segment(&s.w, b, g)] = between(0x1p-9f, 0x1p-7f);
        else
            for (int32_t r = 0; r < CU_BAND; r++) s.scale[b * CU_BAND + r] = between(0x1p-13f, 0x1p-11f);
    }
    s.w.pack = s.d_pack = check_new(s.pack, bytes);
    s.w.scale = s.d_scale = check_new(s.scale, n_scale * sizeof(float));
    return s;
}

/* Rows as bf16 and as codes; poison beyond them. */
typedef struct rows {
    int32_t n, n_in;
    int64_t ld, ld_scale;
    uint8_t *code;
    float *scale;
    cu_bf16 *x; /* of the device */
    cu_x8 x8;
} rows;

static rows rows_new(cu_format format, int32_t n, int32_t n_in) {
    const int32_t padded = CU_PAD(n_in), n_seg = padded / CU_SEGMENT;
    rows r = {.n = n, .n_in = n_in, .ld = padded + CU_SEGMENT, .ld_scale = (n + 3) / 4 * 4};
    const size_t count = (size_t)(n * r.ld);
    cu_bf16 *x = take(count * sizeof *x);
    float *f = take((size_t)padded * sizeof *f), *of_row = take((size_t)n_seg * sizeof *of_row);
    r.code = take(count);
    r.scale = take((size_t)(n_seg * r.ld_scale) * sizeof(float));
    memset(x, 0xff, count * sizeof *x);
    memset(r.code, 0xff, count);
    memset(r.scale, 0xff, (size_t)(n_seg * r.ld_scale) * sizeof(float));
    for (int32_t t = 0; t < n; t++) {
        memset(r.code + t * r.ld, 0, (size_t)padded);
        for (int32_t i = 0; i < padded; i++) {
            x[t * r.ld + i] = i < n_in ? ern_bf16_from_f32(check_random() * (float)(1 << t % 4)) : 0;
            f[i] = ern_bf16_to_f32(x[t * r.ld + i]);
        }
        if (format == CU_F8A8)
            quant_act_fp8(r.code + t * r.ld, of_row, f, n_in);
        else
            quant_act_int8((int8_t *)r.code + t * r.ld, of_row, f, n_in);
        for (int32_t s = 0; s < n_seg; s++) r.scale[s * r.ld_scale + t] = of_row[s];
    }
    r.x = check_new(x, count * sizeof *x);
    r.x8 = (cu_x8){.code = check_new(r.code, count),
                   .ldx = r.ld,
                   .scale = check_new(r.scale, (size_t)(n_seg * r.ld_scale) * sizeof(float)),
                   .ld_scale = r.ld_scale};
    free(x);
    free(f);
    free(of_row);
    return r;
}
static void rows_free(rows *r) {
    free(r->code);
    free(r->scale);
    check_free(r->x);
    check_free(r->x8.code);
    check_free(r->x8.scale);
}

/* Results: y or h, with what lies between the rows. */
typedef struct results {
    size_t each, bytes;
    int64_t ld;
    unsigned char *before, *at;
    void *device;
} results;

static results results_new(cu_epilogue e, int32_t n_row, int32_t n_out) {
    results r = {.each = e == CU_SWIGLU ? sizeof(cu_bf16) : sizeof(float), .ld = n_out + GAP + n_out % 2};
    r.bytes = (size_t)(n_row * r.ld) * r.each;
    r.before = take(r.bytes);
    r.at = take(r.bytes);
    memset(r.before, 0xff, r.bytes);
    float *y = (float *)(void *)r.before;
    for (int32_t i = 0; e == CU_ADD && i < n_row * r.ld; i++) y[i] = check_random();
    r.device = check_new(r.before, r.bytes);
    return r;
}
static void results_reset(results *r) {
    CHECK_CUDA(cudaMemcpy(r->device, r->before, r->bytes, cudaMemcpyHostToDevice));
}
static void results_free(results *r) {
    check_free(r->device);
    free(r->before);
    free(r->at);
}
static double number(const results *r, const unsigned char *at, int32_t row, int32_t o) {
    const unsigned char *p = at + (size_t)(row * r->ld + o) * r->each;
    float f;
    cu_bf16 h;
    if (r->each == sizeof f) return memcpy(&f, p, sizeof f), (double)f;
    return memcpy(&h, p, sizeof h), (double)ern_bf16_to_f32(h);
}

/* Rows `row` .. row + n_row - 1 of both. */
static cu_job job_of(const check_weights *s, cu_epilogue e, const rows *x, int32_t row, int32_t n_row, const results *r,
                     int32_t to) {
    unsigned char *p = (unsigned char *)r->device + (size_t)(to * r->ld) * r->each;
    cu_job j = {.w = s->w, .epilogue = e, .x = x->x + row * x->ld, .ldx = x->ld, .n_row = n_row};
    j.x8 = x->x8;
    j.x8.code += row * x->ld;
    j.x8.scale += row;
    j.y = e == CU_SWIGLU ? NULL : (float *)(void *)p;
    j.h = e == CU_SWIGLU ? (cu_bf16 *)(void *)p : NULL;
    j.ldy = j.ldh = r->ld;
    return j;
}
static void say_where(char what[NAME], const results *r, const unsigned char *want) {
    for (size_t i = 0; i < r->bytes && !*what; i++)
        if (want[i] != r->at[i])
            snprintf(what, NAME, "row %zu, number %zu", i / r->each / (size_t)r->ld, i / r->each % (size_t)r->ld);
}

/* ---- against double ---------------------------------------------------------------------------------------------- */

/* One dot product and its bound. Of integers there is one number that it can be. fp8: in double. A step of the chain
 * has 32 products of codes and the sum so far: all are aligned to the largest and cut below 2^-13 of its power of two
 * (measured: 2^16 - 2^16 + 2^3 is 8, with 2^2 it is 0), 33 cuts, and the same again for the sum's own. Then f32: the
 * product of the scales rounds by 2^-24 of itself, each fma by 2^-24 of the total. */
static double dot(const check_weights *s, const rows *x, int32_t row, int32_t band, int32_t r, double *bound) {
    double total = 0.0, off = 0.0;
    if (s->w.format != CU_F8A8) {
        float exact = 0.0f;
        for (int32_t g = 0; g < s->w.n_seg; g++) {
            double sum = 0.0;
            for (int32_t i = g * CU_SEGMENT; i < (g + 1) * CU_SEGMENT; i++)
                sum += check_a8_code(&s->w, s->pack, band, r, i) * (double)(int8_t)x->code[row * x->ld + i];
            exact = fmaf(x->scale[g * x->ld_scale + row], (float)sum, exact);
        }
        *bound = 0.0;
        return (double)(exact * s->scale[band * CU_BAND + r]);
    }
    for (int32_t g = 0; g < s->w.n_seg; g++) {
        double sum = 0.0, cut = 0.0;
        for (int32_t step = 0; step < 4; step++) {
            double largest = fabs(sum) + cut;
            for (int32_t i = g * 128 + step * 32; i < g * 128 + step * 32 + 32; i++) {
                const double p =
                    check_a8_code(&s->w, s->pack, band, r, i) * (double)ern_e4m3_to_f32(x->code[row * x->ld + i]);
                sum += p;
                largest = fmax(largest, fabs(p));
            }
            cut += 34.0 * 0x1p-13 * fmax(largest, fabs(sum));
        }
        const double by = (double)s->scale[check_a8_segment(&s->w, band, g)] * (double)x->scale[g * x->ld_scale + row];
        total += by * sum;
        off += by * cut + 0x1p-24 * (by * (fabs(sum) + cut) + fabs(total) + off);
    }
    *bound = off;
    return total;
}

static double expected(const check_weights *s, cu_epilogue e, const rows *x, int32_t row, int32_t o, double before,
                       double *bound) {
    double b0, b1;
    const int32_t band = o / CU_BAND, r = o % CU_BAND;
    if (e != CU_SWIGLU) { /* one addition more */
        const double z = dot(s, x, row, band, r, &b0);
        *bound = b0 + 0x1p-24 * (fabs(z) + fabs(before) + b0) + 0x1p-149;
        return z + before;
    }
    const double z = dot(s, x, row, 2 * band, r, &b0), up = dot(s, x, row, 2 * band + 1, r, &b1);
    return check_swiglu(z, b0, up, b1, bound);
}

static const char *const epilogue_name[] = {"store", "add", "swiglu"};

/* Results of so many rows, each multiplied alone; the caller frees them. */
static unsigned char *each_alone(const check_weights *s, cu_epilogue e, const rows *x, int32_t n_row,
                                 const results *r) {
    for (int32_t row = 0; row < n_row; row++) {
        const cu_job j = job_of(s, e, x, row, 1, r, row);
        CHECK_CUDA(cu_a8_skinny_run(0, &j));
    }
    unsigned char *alone = take(r->bytes);
    check_get(alone, r->device, r->bytes);
    return alone;
}

static void check_plain(cu_format f, cu_epilogue e, int32_t n_out, int32_t n_in, int32_t n_most) {
    static const int32_t n_rows[] = {1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 40, 64, 65, 131};
    char name[NAME], what[NAME] = "";
    snprintf(name, sizeof name, "a8 %s skinny %s %d x %d", kind_name[f], epilogue_name[e], n_out, n_in);
    if (!check_begin(name)) return;
    check_weights s = weights_new(f, n_out, n_in, e == CU_SWIGLU);
    rows x = rows_new(f, n_most, n_in);
    results r = results_new(e, n_most, n_out);
    unsigned char *alone = each_alone(&s, e, &x, n_most, &r);
    double worst = 0.0;
    for (int32_t row = 0; row < n_most; row++)
        for (int32_t k = 0; k < 8; k++) {
            const int32_t o = k < 2 ? k * (n_out - 1) : (int32_t)(check_random64() % (uint64_t)n_out);
            double bound;
            const double before = e == CU_ADD ? number(&r, r.before, row, o) : 0.0;
            const double want = expected(&s, e, &x, row, o, before, &bound);
            const double got = number(&r, alone, row, o), share = fabs(got - want) / bound;
            if (share <= worst || worst != worst) continue; /* the first NaN stays */
            worst = share;
            snprintf(what, sizeof what, "row %d, output %d: %g, not %g", row, o, got, want);
        }
    check_end(name, worst, what);

    snprintf(name, sizeof name, "a8 %s %s %d x %d, rows in company", kind_name[f], epilogue_name[e], n_out, n_in);
    *what = 0;
    for (size_t k = 0; k < sizeof n_rows / sizeof *n_rows && n_rows[k] <= n_most; k++)
        for (int way = n_rows[k] <= CU_SKINNY_MAX ? 0 : 1; way < 2; way++) { /* skinny, mid */
            const cu_job j = job_of(&s, e, &x, 0, n_rows[k], &r, 0);
            results_reset(&r);
            CHECK_CUDA(way ? cu_a8_mid_run(0, &j) : cu_a8_skinny_run(0, &j));
            check_get(r.at, r.device, r.bytes);
            const size_t line = (size_t)r.ld * r.each;
            for (int32_t row = 0; row < n_most; row++)
                if (memcmp(r.at + (size_t)row * line, (row < j.n_row ? alone : r.before) + (size_t)row * line, line))
                    snprintf(what, sizeof what, "%s: row %d of %d is another one", way ? "mid" : "skinny", row,
                             j.n_row);
        }
    check_that(name, !*what, what);
    free(alone);
    results_free(&r);
    rows_free(&x);
    check_weights_free(&s);
}

/* ---- codes that come late --------------------------------------------------------------------------------------- */

/* Rows in company have the bits of rows alone when every second segment's codes lie in the second cache and the others
 * have to come from memory: of those asked for, many come before the ones asked for earlier. */
static void check_late(cu_format f, cu_epilogue e, int32_t n_out, int32_t n_in) {
    enum { MOST = CU_SKINNY_MAX };
    static const size_t flush = (size_t)256 << 20;
    char name[NAME], what[NAME] = "";
    snprintf(name, sizeof name, "a8 %s %s %d x %d, codes late", kind_name[f], epilogue_name[e], n_out, n_in);
    if (!check_begin(name)) return;
    check_weights s = weights_new(f, n_out, n_in, e == CU_SWIGLU);
    rows x = rows_new(f, MOST, n_in);
    results r = results_new(e, MOST, n_out);
    const size_t line = (size_t)r.ld * r.each, segment = CU_A8_BANDS * 2 * (size_t)cu_group_bytes(f);
    const size_t n_pair = (size_t)cu_pack_bytes(&s.w) / (2 * segment);
    unsigned char *scratch;
    CHECK_CUDA(cudaMalloc((void **)&scratch, flush));
    unsigned char *alone = each_alone(&s, e, &x, MOST, &r);
    for (int32_t n_row = 1; n_row <= MOST; n_row++)
        for (size_t late = 0; late < 4; late++) {
            const cu_job j = job_of(&s, e, &x, 0, n_row, &r, 0);
            const unsigned char *early = (const unsigned char *)s.d_pack + (late & 1 ? 0 : segment);
            results_reset(&r);
            CHECK_CUDA(cudaMemset(scratch, 0, flush));
            CHECK_CUDA(cudaMemcpy2D(scratch, segment, early, 2 * segment, segment, n_pair, cudaMemcpyDeviceToDevice));
            CHECK_CUDA(cu_a8_skinny_run(0, &j));
            check_get(r.at, r.device, r.bytes);
            for (int32_t row = 0; row < MOST && !*what; row++)
                if (memcmp(r.at + (size_t)row * line, (row < n_row ? alone : r.before) + (size_t)row * line, line) != 0)
                    snprintf(what, sizeof what, "row %d of %d is another one", row, n_row);
        }
    check_that(name, !*what, what);
    CHECK_CUDA(cudaFree(scratch));
    free(alone);
    results_free(&r);
    rows_free(&x);
    check_weights_free(&s);
}

/* ---- the norm in front ------------------------------------------------------------------------------------------- */

static void check_norm_front(cu_format format, cu_epilogue e, int32_t n_out, int32_t n_in, int shift) {
    static const int32_t n_rows[] = {1, 2, 5, 8};
    char name[NAME], what[NAME] = "";
    snprintf(name, sizeof name, "a8 %s skinny %s, norm in front, %d x %d%s", kind_name[format], epilogue_name[e], n_out,
             n_in, shift ? ", odd address" : "");
    if (!check_begin(name)) return;
    check_weights s = weights_new(format, n_out, n_in, e == CU_SWIGLU);
    rows x = rows_new(format, 8, n_in); /* to be normed into */
    results r = results_new(e, 8, n_out);
    const int32_t n = 8 * n_in;
    float *f = take((size_t)(n + 1) * sizeof *f);
    cu_bf16 *w = take((size_t)(n_in + 1) * sizeof *w);
    for (int32_t i = 0; i <= n; i++) f[i] = check_random() * (float)(1 << i / n_in % 3);
    for (int32_t i = 0; i <= n_in; i++) w[i] = ern_bf16_from_f32(1.0f + 0.5f * check_random());
    float *df = check_new(f, (size_t)(n + 1) * sizeof *f), *even_f = check_new(f + shift, (size_t)n * sizeof *f);
    cu_bf16 *dw = check_new(w, (size_t)(n_in + 1) * sizeof *w);
    cu_bf16 *even_w = check_new(w + shift, (size_t)n_in * sizeof *w);
    unsigned char *want = take(r.bytes);
    for (size_t k = 0; k < sizeof n_rows / sizeof *n_rows; k++) {
        cu_job j = job_of(&s, e, &x, 0, n_rows[k], &r, 0);
        results_reset(&r);
        for (int32_t t = 0; t < j.n_row; t++) /* a row each time: they lie further apart than cu_norm puts them */
            CHECK_CUDA(cu_norm(0, x.x + t * x.ld, even_f + t * n_in, NULL, even_w, 1, n_in, 1e-5f));
        CHECK_CUDA(cu_a8_skinny_run(0, &j));
        check_get(want, r.device, r.bytes);
        results_reset(&r);
        j.x = NULL;
        j.x_f32 = df + shift;
        j.norm_w = dw + shift;
        j.eps = 1e-5f;
        j.alone = j.n_row == 1; /* gate and up of the shared experts */
        CHECK_CUDA(cu_a8_skinny_run(0, &j));
        check_get(r.at, r.device, r.bytes);
        say_where(what, &r, want);
    }
    check_that(name, !*what, what);
    free(want);
    free(f);
    free(w);
    check_free(df);
    check_free(dw);
    check_free(even_f);
    check_free(even_w);
    results_free(&r);
    rows_free(&x);
    check_weights_free(&s);
}

/* ---- experts ----------------------------------------------------------------------------------------------------- */

/* The lists as cu_route would leave them, but made here. */
typedef struct lists {
    int32_t first[E + 1], place_entry[ROWS * K], expert[ROWS * K], tile_expert[ROWS * K], tile_place[ROWS * K];
    int32_t n_tile, told[K];
} lists;

static void lists_fill(lists *l, int32_t n_row, int32_t tile_rows) {
    static int32_t chosen[ROWS * K];
    for (int32_t i = 0; i < n_row * K; i++) {
        bool again;
        do {
            chosen[i] = (int32_t)(check_random64() % E);
            again = chosen[i] == NOBODY;
            for (int32_t k = i / K * K; k < i; k++) again |= chosen[k] == chosen[i];
        } while (again);
    }
    int32_t p = 0;
    l->n_tile = 0;
    for (int32_t e = 0; e < E; e++) {
        l->first[e] = p;
        for (int32_t i = 0; i < n_row * K; i++) {
            if (chosen[i] != e) continue;
            l->expert[p] = e;
            l->place_entry[p++] = i;
        }
        for (int32_t i = l->first[e]; i < p; i += tile_rows) {
            l->tile_expert[l->n_tile] = e;
            l->tile_place[l->n_tile++] = i;
        }
    }
    l->first[E] = p;
    for (int32_t k = 0; k < K; k++) l->told[k] = l->expert[k] + 1; /* of one row */
}

/* Up (pairs, gathered) or down of all experts, of which rows may be quantized inside: every place has the bits of its
 * row alone. */
static void check_experts(cu_format f, bool up, int32_t n_out, int32_t n_in, int32_t n_row, int32_t tile_rows,
                          bool inside) {
    char name[NAME], what[NAME] = "";
    snprintf(name, sizeof name, "a8 %s experts %s %d x %d, %d rows, tiles of %d%s", kind_name[f], up ? "up" : "down",
             n_out, n_in, n_row, tile_rows, inside ? ", from bf16" : "");
    if (!check_begin(name)) return;
    const cu_epilogue e = up ? CU_SWIGLU : CU_STORE;
    const int32_t n_place = n_row * K;
    check_weights s[E];
    cu_linear w[E];
    for (int32_t i = 0; i < E; i++) s[i] = weights_new(f, n_out, n_in, up), w[i] = s[i].w;
    static lists l;
    lists_fill(&l, n_row, tile_rows);
    rows x = rows_new(f, up ? n_row : n_place, n_in);
    results r = results_new(e, n_place, n_out);
    unsigned char *want = take(r.bytes);
    for (int32_t i = 0; i < n_place; i++) {
        const cu_job j = job_of(&s[l.expert[i]], e, &x, up ? l.place_entry[i] / K : i, 1, &r, i);
        CHECK_CUDA(cu_a8_skinny_run(0, &j));
    }
    check_get(want, r.device, r.bytes);
    results_reset(&r);
    cu_linear *dw = check_new(w, sizeof w);
    lists *dl = check_new(&l, sizeof l);
    const cu_routes routes = {.n_expert = E,
                              .n_used = K,
                              .first = dl->first,
                              .place_entry = dl->place_entry,
                              .tile_expert = dl->tile_expert,
                              .tile_place = dl->tile_place,
                              .n_tile = &dl->n_tile,
                              .tile_rows = tile_rows,
                              .told = dl->told};
    cu_grouped_job g = {.shape = w[0],
                        .experts = dw,
                        .routes = &routes,
                        .n_row = n_row,
                        .gather = up,
                        .epilogue = e,
                        .x8 = x.x8,
                        .ldy = r.ld,
                        .ldh = r.ld};
    if (inside) {
        g.x8.code = NULL;
        g.x = x.x;
        g.ldx = x.ld;
    }
    g.shape.pack = NULL;
    g.shape.scale = NULL;
    if (up)
        g.h = r.device;
    else
        g.y = r.device;
    CHECK_CUDA(cu_a8_mid_grouped(0, &g));
    check_get(r.at, r.device, r.bytes);
    say_where(what, &r, want);
    if (inside && n_row == 1) {
        check_get(l.told, dl->told, sizeof l.told);
        for (int32_t k = 0; k < K && !*what; k++)
            if (l.told[k] != 0) snprintf(what, sizeof what, "down leaves %d told", l.told[k]);
    }
    check_that(name, !*what, what);
    free(want);
    check_free(dw);
    check_free(dl);
    results_free(&r);
    rows_free(&x);
    for (int32_t i = 0; i < E; i++) check_weights_free(&s[i]);
}

/* ---- one after the other ----------------------------------------------------------------------------------------- */

/* Feed-forwards upon one residual stream, each kernel reading what the one before wrote, as they come: a kernel that
 * begins early must not see, or change, too much. The same bits with a wait after each, and from a graph. */
static void check_chain(cu_format f, int32_t n_hidden, int32_t n_ffn, int32_t n_row) {
    enum { LAYERS = 12, WAYS = 3 };
    char name[NAME], what[NAME] = "";
    snprintf(name, sizeof name, "a8 %s a chain of %d x %d, %d rows", kind_name[f], n_hidden, n_ffn, n_row);
    if (!check_begin(name)) return;
    check_weights p = weights_new(f, n_ffn, n_hidden, true), q = weights_new(f, n_hidden, n_ffn, false);
    const int64_t ldx = CU_PAD(n_hidden), ldh = CU_PAD(n_ffn), ld_scale = (n_row + 3) / 4 * 4;
    const size_t n = (size_t)(n_row * n_hidden), x_bytes = (size_t)(n_row * ldx) * 2,
                 h_bytes = (size_t)(n_row * ldh) * 2;
    float *start = take(n * sizeof *start), *got[WAYS];
    cu_bf16 *w = take((size_t)n_hidden * sizeof *w);
    for (size_t i = 0; i < n; i++) start[i] = check_random();
    for (int32_t i = 0; i < n_hidden; i++) w[i] = ern_bf16_from_f32(1.0f + 0.5f * check_random());
    float *x = check_new(start, n * sizeof *start);
    cu_bf16 *dw = check_new(w, (size_t)n_hidden * sizeof *w), *xn = check_new(NULL, x_bytes),
            *h = check_new(NULL, h_bytes);
    const cu_x8 x8 = {check_new(NULL, x_bytes / 2), ldx, check_new(NULL, (size_t)(ldx / 32 * ld_scale)), ld_scale};
    const cu_x8 h8 = {check_new(NULL, h_bytes / 2), ldh, check_new(NULL, (size_t)(ldh / 32 * ld_scale)), ld_scale};
    CHECK_CUDA(cudaMemset(xn, 0, x_bytes));
    CHECK_CUDA(cudaMemset(h, 0, h_bytes));
    cudaStream_t s;
    CHECK_CUDA(cudaStreamCreate(&s));
    const bool few = n_row <= CU_SKINNY_MAX;
    cu_job up = {.w = p.w, .epilogue = CU_SWIGLU, .n_row = n_row, .h = h, .ldh = ldh, .x8 = x8};
    if (few) up.x_f32 = x, up.norm_w = dw, up.eps = 1e-5f;
    const cu_job add = {
        .w = q.w, .epilogue = CU_ADD, .n_row = n_row, .x = h, .ldx = ldh, .x8 = h8, .y = x, .ldy = n_hidden};
    for (int way = 0; way < WAYS; way++) { /* 0 waits after each, 1 does not, 2 is a graph */
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK_CUDA(cudaMemcpy(x, start, n * sizeof *start, cudaMemcpyHostToDevice));
        CHECK_CUDA(cudaDeviceSynchronize());
        if (way == 2) CHECK_CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
        for (int k = 0; k < LAYERS; k++)
            for (int step = 0; step < 5; step++) {
                if (step == 0 && !few) CHECK_CUDA(cu_norm(s, xn, x, NULL, dw, n_row, n_hidden, 1e-5f));
                if (step == 1 && !few) CHECK_CUDA(cu_quant_x8(s, &x8, cu_codes_of(f), xn, ldx, n_row, n_hidden));
                if (step == 2) CHECK_CUDA(few ? cu_a8_skinny_run(s, &up) : cu_a8_mid_run(s, &up));
                if (step == 3 && !few) CHECK_CUDA(cu_quant_x8(s, &h8, cu_codes_of(f), h, ldh, n_row, n_ffn));
                if (step == 4) CHECK_CUDA(few ? cu_a8_skinny_run(s, &add) : cu_a8_mid_run(s, &add));
                if (way == 0) CHECK_CUDA(cudaDeviceSynchronize());
            }
        if (way == 2) {
            CHECK_CUDA(cudaStreamEndCapture(s, &graph));
            CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
            CHECK_CUDA(cudaGraphLaunch(exec, s));
            CHECK_CUDA(cudaStreamSynchronize(s));
            CHECK_CUDA(cudaGraphExecDestroy(exec));
            CHECK_CUDA(cudaGraphDestroy(graph));
        }
        got[way] = take(n * sizeof **got);
        check_get(got[way], x, n * sizeof **got);
        for (size_t i = 0; i < n && !*what; i++)
            if (memcmp(&got[way][i], &got[0][i], sizeof **got) != 0 || !isfinite(got[0][i]))
                snprintf(what, sizeof what, "%s: number %zu", way == 2 ? "graph" : "stream", i);
    }
    check_that(name, !*what, what);
    CHECK_CUDA(cudaStreamDestroy(s));
    for (int way = 0; way < WAYS; way++) free(got[way]);
    free(start);
    free(w);
    check_free(x), check_free(dw), check_free(xn), check_free(h);
    check_free(x8.code), check_free(x8.scale), check_free(h8.code), check_free(h8.scale);
    check_weights_free(&p);
    check_weights_free(&q);
}

/* ---- speed --------------------------------------------------------------------------------------------------------
 */

/* The experts of a step of n_row rows, drawn evenly, of a model of 64 with 2560 hidden and 1536 inner: up and down in
 * turn, as a step has them, LAYERS of them, each with weights of its own. Microseconds of a layer, and the share of
 * 4.5 TB/s that reading the codes is. */
static void speed_experts(cu_format f, int32_t n_row) {
    enum { EXPERTS = 64, USED = 6, HIDDEN = 2560, INNER = 1536, LAYERS = 6, ROUNDS = 20 };
    static int32_t chosen[512 * USED], list[4 * 512 * USED + EXPERTS + 1];
    const int32_t n_place = n_row * USED, tile_rows = cu_tile_rows(n_row, USED, EXPERTS);
    const bool inside = tile_rows == 8;
    cu_linear w[2][LAYERS][EXPERTS];
    for (int k = 0; k < 2; k++) {
        cu_linear one = {.format = f, .n_out = k ? HIDDEN : INNER, .n_in = k ? INNER : HIDDEN, .pairs = !k};
        one.n_band = CU_BANDS(one.n_out) * (k ? 1 : 2);
        one.n_seg = one.n_in / CU_SEGMENT;
        const int64_t bytes = cu_pack_bytes(&one);
        unsigned char *all;
        float *scale, *one_scale = take((size_t)cu_scale_count(&one) * sizeof(float));
        CHECK_CUDA(cudaMalloc((void **)&all, (size_t)(bytes * EXPERTS * LAYERS)));
        CHECK_CUDA(cudaMalloc((void **)&scale, (size_t)cu_scale_count(&one) * sizeof(float)));
        unsigned char *some = take(1 << 22);
        for (int32_t i = 0; i < 1 << 22; i += 8) {
            const uint64_t any = check_random64() & 0x3f3f3f3f3f3f3f3full;
            memcpy(some + i, &any, 8);
        }
        for (int64_t at = 0; at < bytes * EXPERTS * LAYERS; at += 1 << 22) {
            const int64_t left = bytes * EXPERTS * LAYERS - at;
            CHECK_CUDA(cudaMemcpy(all + at, at ? all : some, (size_t)(left < 1 << 22 ? left : 1 << 22),
                                  at ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice));
        }
        for (int64_t i = 0; i < cu_scale_count(&one); i++) one_scale[i] = 0x1p-12f;
        CHECK_CUDA(cudaMemcpy(scale, one_scale, (size_t)cu_scale_count(&one) * sizeof(float), cudaMemcpyHostToDevice));
        free(one_scale);
        free(some);
        for (int l = 0; l < LAYERS; l++)
            for (int e = 0; e < EXPERTS; e++) {
                w[k][l][e] = one;
                w[k][l][e].pack = all + (l * EXPERTS + e) * bytes;
                w[k][l][e].scale = scale;
            }
    }
    cu_linear *dw[2] = {check_new(w[0], sizeof w[0]), check_new(w[1], sizeof w[1])};
    for (int32_t i = 0; i < n_place; i++) {
        bool again;
        do {
            chosen[i] = (int32_t)(check_random64() % EXPERTS);
            again = false;
            for (int32_t k = i / USED * USED; k < i; k++) again |= chosen[k] == chosen[i];
        } while (again);
    }
    int32_t *first = list, *place_entry = first + EXPERTS + 1, *tile_expert = place_entry + n_place,
            *tile_place = tile_expert + n_place, *n_tile = tile_place + n_place, p = 0, n_expert = 0;
    *n_tile = 0;
    for (int32_t e = 0; e < EXPERTS; e++) {
        first[e] = p;
        for (int32_t i = 0; i < n_place; i++)
            if (chosen[i] == e) place_entry[p++] = i;
        for (int32_t i = first[e]; i < p; i += tile_rows) tile_expert[*n_tile] = e, tile_place[(*n_tile)++] = i;
        n_expert += p > first[e];
    }
    first[EXPERTS] = p;
    int32_t *d = check_new(list, sizeof list);
    const cu_routes routes = {.n_expert = EXPERTS,
                              .n_used = USED,
                              .first = d,
                              .place_entry = d + (place_entry - list),
                              .tile_expert = d + (tile_expert - list),
                              .tile_place = d + (tile_place - list),
                              .n_tile = d + (n_tile - list),
                              .tile_rows = tile_rows};
    const int64_t ld_scale = (n_place + 3) / 4 * 4;
    const size_t h_count = (size_t)n_place * INNER;
    const cu_x8 x8 = {check_new(NULL, (size_t)n_row * HIDDEN), HIDDEN, check_new(NULL, (size_t)ld_scale * HIDDEN / 32),
                      ld_scale};
    const cu_x8 h8 = {check_new(NULL, h_count), INNER, check_new(NULL, (size_t)ld_scale * INNER / 32), ld_scale};
    cu_bf16 *h = check_new(NULL, h_count * sizeof *h);
    float *y = check_new(NULL, (size_t)n_place * HIDDEN * sizeof *y);
    CHECK_CUDA(cudaMemset(x8.code, 0x11, (size_t)n_row * HIDDEN));
    CHECK_CUDA(cudaMemset(h8.code, 0x11, h_count));
    CHECK_CUDA(cudaMemset(h, 0x3c, h_count * sizeof *h));
    cudaStream_t s;
    cudaEvent_t from, to;
    CHECK_CUDA(cudaStreamCreate(&s));
    CHECK_CUDA(cudaEventCreate(&from));
    CHECK_CUDA(cudaEventCreate(&to));
    float us[3]; /* up, down, both */
    for (int way = 0; way < 3; way++) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK_CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
        for (int l = 0; l < LAYERS; l++)
            for (int k = 0; k < 2; k++) {
                if (way != 2 && way != k) continue;
                cu_grouped_job g = {.shape = w[k][0][0],
                                    .experts = dw[k] + l * EXPERTS,
                                    .routes = &routes,
                                    .n_row = n_row,
                                    .gather = !k,
                                    .epilogue = k ? CU_STORE : CU_SWIGLU,
                                    .x8 = k ? h8 : x8,
                                    .y = k ? y : NULL,
                                    .ldy = HIDDEN,
                                    .h = k ? NULL : h,
                                    .ldh = INNER};
                if (k && inside) g.x8.code = NULL, g.x = h, g.ldx = INNER;
                CHECK_CUDA(cu_a8_mid_grouped(s, &g));
            }
        CHECK_CUDA(cudaStreamEndCapture(s, &graph));
        CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
        us[way] = 1e30f;
        for (int round = 0; round < ROUNDS; round++) {
            float ms;
            CHECK_CUDA(cudaEventRecord(from, s));
            CHECK_CUDA(cudaGraphLaunch(exec, s));
            CHECK_CUDA(cudaEventRecord(to, s));
            CHECK_CUDA(cudaEventSynchronize(to));
            CHECK_CUDA(cudaEventElapsedTime(&ms, from, to));
            us[way] = fminf(us[way], ms * 1e3f / LAYERS);
        }
        CHECK_CUDA(cudaGraphExecDestroy(exec));
        CHECK_CUDA(cudaGraphDestroy(graph));
    }
    const double floor[2] = {(double)cu_pack_bytes(&w[0][0][0]) * n_expert / 4.5e6,
                             (double)cu_pack_bytes(&w[1][0][0]) * n_expert / 4.5e6};
    printf("%s experts of %3d rows (%2d, tiles of %2d): up %6.1f us (%2.0f%%), down %6.1f (%2.0f%%), a layer %6.1f "
           "(%2.0f%%)\n",
           kind_name[f], n_row, n_expert, tile_rows, (double)us[0], 100.0 * floor[0] / (double)us[0], (double)us[1],
           100.0 * floor[1] / (double)us[1], (double)us[2], 100.0 * (floor[0] + floor[1]) / (double)us[2]);
    fflush(stdout);
    CHECK_CUDA(cudaStreamDestroy(s));
    CHECK_CUDA(cudaEventDestroy(from));
    CHECK_CUDA(cudaEventDestroy(to));
    for (int k = 0; k < 2; k++) {
        CHECK_CUDA(cudaFree((void *)(uintptr_t)w[k][0][0].pack));
        CHECK_CUDA(cudaFree((void *)(uintptr_t)w[k][0][0].scale));
        check_free(dw[k]);
    }
    check_free(d), check_free(x8.code), check_free(x8.scale), check_free(h8.code), check_free(h8.scale);
    check_free(h), check_free(y);
}

void check_a8_mid(void) {
    /* outputs, inputs: ugly ones; one pass and several; many tiles and few */
    static const int32_t shapes[][2] = {{44, 80},   {168, 64},   {200, 176}, {16, 128},
                                        {130, 300}, {512, 2560}, {96, 1536}};
    static const cu_format kinds[] = {CU_F8A8, CU_I8A8, CU_I4A8};
    for (int kind = 0; kind < 3; kind++) {
        const cu_format f = kinds[kind];
        for (int e = CU_STORE; e <= CU_SWIGLU; e++) {
            for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++)
                check_plain(f, (cu_epilogue)e, shapes[k][0], shapes[k][1], ROWS);
            check_plain(f, (cu_epilogue)e, 64, 12288, FEW);
            check_plain(f, (cu_epilogue)e, e == CU_SWIGLU ? 3072 : 6200, 256, FEW);
            check_plain(f, (cu_epilogue)e, e == CU_SWIGLU ? 5120 : 10240, 1300, 9);
            /* blocks that stay: an odd number of segments, of several tiles more than slots; a tile less for some */
            check_plain(f, (cu_epilogue)e, e == CU_SWIGLU ? 8500 : 17000, 640, FEW);
            check_plain(f, (cu_epilogue)e, e == CU_SWIGLU ? 13000 : 26000, 100, 9);
        }
        check_plain(f, CU_ADD, 2560, 12288, 16); /* three blocks a tile, whose rings come round */
        check_plain(f, CU_ADD, 7168, 4096, 9);   /* one */
        check_plain(f, CU_STORE, 3584, 8192, 9); /* two */
        check_norm_front(f, CU_STORE, 200, 176, 0);
        check_norm_front(f, CU_SWIGLU, 130, 300, 0);
        check_norm_front(f, CU_STORE, 96, 2560, 0);
        check_norm_front(f, CU_STORE, 96, 2560, 1);
        check_norm_front(f, CU_SWIGLU, 44, 81, 1);
        check_norm_front(f, CU_STORE, 17000, 300, 1);
        check_norm_front(f, CU_SWIGLU, 3072, 2560, 0);
        check_norm_front(f, CU_SWIGLU, 3072, 2560, 1);
        check_norm_front(f, CU_SWIGLU, 2150, 640, 0);
        check_norm_front(f, CU_SWIGLU, 4200, 128, 0);
        if (f != CU_I4A8) check_norm_front(f, CU_SWIGLU, 2144, 8192, 0);
        if (f != CU_I4A8) check_norm_front(f, CU_SWIGLU, 12288, 2560, 0);
        if (f != CU_I4A8) check_late(f, CU_STORE, 17000, 2560);
        if (f != CU_I4A8) check_late(f, CU_ADD, 2560, 12288);
        for (int32_t tile = 8; tile <= 64; tile *= 2)
            for (int way = 0; way < (tile == 8 ? 3 : 2); way++) {
                check_experts(f, way == 1, 44, 80, 9, tile, way == 2);
                check_experts(f, way == 1, 130, 300, 40, tile, way == 2);
                check_experts(f, way == 1, 256, 512, ROWS, tile, way == 2);
                check_experts(f, way == 1, 96, 1536, ROWS, tile, way == 2);
            }
        for (int way = 1; way < 3; way++) { /* one row */
            check_experts(f, way == 1, 44, 80, 1, 8, way == 2);
            check_experts(f, way == 1, 130, 256, 1, 8, way == 2);
            check_experts(f, way == 1, 96, 1536, 1, 8, way == 2);
            check_experts(f, way == 1, 200, 2560, 1, 8, way == 2);
            check_experts(f, way == 1, 71, 12288, 1, 8, way == 2);
        }
        check_chain(f, 512, 384, 1);
        check_chain(f, 512, 384, 8);
        check_chain(f, 2560, 1536, 3);
        check_chain(f, 512, 384, 20);
        check_chain(f, 2560, 1536, 64);
        if (f != CU_I4A8) { /* of 21b-a3b */
            check_chain(f, 2560, 12288, 1);
            check_chain(f, 2560, 12288, 5);
        }
    }
    static const int32_t n_rows[] = {1, 8, 32, 128, 256};
    if (check_filter && !strcmp(check_filter, "a8 speed"))
        for (int kind = 0; kind < 3; kind++)
            for (size_t k = 0; k < sizeof n_rows / sizeof *n_rows; k++) speed_experts(kinds[kind], n_rows[k]);
}
