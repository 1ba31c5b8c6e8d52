/* cu_pack, cu_linear_run and cu_grouped_run up to 64 rows. Packed bytes are compared with a host packer written from
 * cu_kernels.h's drawing; rows computed one by one with scalar double, within a derived bound; rows in company, the
 * norm in front and experts bit for bit with those. */
#include "check.h"

#include "model/quant.h"

enum { ROWS = 64, NAME = 128, GAP = 3 };

static const char *const format_name[CU_FORMATS] = {"bf16",       "int8",         "int4",        "fp8",
                                                    "fp8 by fp8", "int8 by int8", "int4 by int8"};
static const ern_dtype format_dtype[CU_FORMATS] = {ERN_DTYPE_BF16,   ERN_DTYPE_I8, ERN_DTYPE_I4, ERN_DTYPE_F8E4M3,
                                                   ERN_DTYPE_F8E4M3, ERN_DTYPE_I8, ERN_DTYPE_I4};

static void *take(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!p) abort();
    return p;
}

/* ---- stored linears ---------------------------------------------------------------------------------------------- */

/* A stored linear on the host and what a copy of its bytes needs. */
typedef struct stored {
    ern_linear of;
    cu_format format;
    void *data, *scale;
    size_t data_bytes, scale_bytes;
} stored;

/* bf16 of either order with gaps of NaN between lines, or quantized from that. */
static stored stored_new(cu_format f, ern_order order, int32_t n_out, int32_t n_in) {
    stored s = {.format = f};
    const int32_t lines = order == ERN_ORDER_OUT_IN ? n_out : n_in, each = order == ERN_ORDER_OUT_IN ? n_in : n_out;
    const int64_t stride = each + GAP;
    s.data_bytes = (size_t)(lines * stride) * sizeof(ern_bf16);
    ern_bf16 *w = s.data = take(s.data_bytes);
    for (int32_t l = 0; l < lines; l++)
        for (int64_t k = 0; k < stride; k++)
            w[l * stride + k] = k < each ? ern_bf16_from_f32(check_random() * 0.25f) : 0xffff;
    s.of = (ern_linear){
        .data = w, .dtype = ERN_DTYPE_BF16, .order = order, .n_out = n_out, .n_in = n_in, .stride = stride};
    if (f == CU_BF16) return s;
    const ern_dtype t = format_dtype[f];
    s.data_bytes = (size_t)quant_tile_bytes(t, n_out, n_in);
    s.scale_bytes = (size_t)quant_scale_bytes(t, n_out, n_in);
    s.data = take(s.data_bytes);
    s.scale = take(s.scale_bytes);
    if (!quant_weights(s.data, s.scale, t, &s.of, 0, n_out)) abort();
    free(w);
    s.of = (ern_linear){
        .data = s.data, .dtype = t, .order = ERN_ORDER_TILED, .n_out = n_out, .n_in = n_in, .scale = s.scale};
    return s;
}

static void stored_free(stored *s) {
    free(s->data);
    free(s->scale);
}

/* Weight and scale as exact numbers: the products that the kernel adds are of these codes. */
static double stored_at(const stored *s, int32_t o, int32_t i) {
    if (s->format != CU_BF16) return (double)quant_code_at(&s->of, o, i) * quant_scale_at(&s->of, o, i / ERN_F8_BLOCK);
    const ern_bf16 *w = s->data;
    const int64_t at = s->of.order == ERN_ORDER_OUT_IN ? o * s->of.stride + i : i * s->of.stride + o;
    return ern_bf16_to_f32(w[at]);
}

/* The code as cu_kernels.h has it in this format, zero beyond the edges. */
static uint32_t stored_code(const stored *s, int32_t o, int32_t i) {
    const bool in = o < s->of.n_out && i < s->of.n_in;
    if (s->format == CU_BF16) return in ? ern_bf16_from_f32((float)stored_at(s, o, i)) : 0;
    const float code = in ? quant_code_at(&s->of, o, i) : 0.0f;
    if (s->format == CU_F8 || s->format == CU_F8A8) return in ? ern_e4m3_from_f32(code) : 0;
    if (s->format == CU_I8 || s->format == CU_I8A8) return (uint32_t)(int32_t)code & 0xff;
    return s->format == CU_I4A8 ? (uint32_t)(int32_t)code & 0xf : (uint32_t)((int32_t)code + 8);
}

/* Packed on the device: one stored linear, or two of the same outputs band by band. */
typedef struct packed {
    cu_linear w;
    void *pack, *scale; /* the same pointers */
} packed;

static packed packed_new(const stored *a, const stored *b) {
    packed p = {.w = {.format = a->format,
                      .n_out = a->of.n_out,
                      .n_in = a->of.n_in,
                      .n_band = CU_BANDS(a->of.n_out) * (b ? 2 : 1),
                      .n_seg = CU_PAD(a->of.n_in) / CU_SEGMENT,
                      .pairs = b != NULL}};
    p.w.pack = p.pack = check_new(NULL, (size_t)cu_pack_bytes(&p.w));
    const int64_t n_scale = cu_scale_count(&p.w);
    if (n_scale) p.w.scale = p.scale = check_new(NULL, (size_t)n_scale * sizeof(float));
    for (int k = 0; k < (b ? 2 : 1); k++) {
        const stored *s = k ? b : a;
        void *raw, *scale; /* only read: no guards, which take their time */
        CHECK_CUDA(cudaMalloc(&raw, s->data_bytes));
        CHECK_CUDA(cudaMalloc(&scale, s->scale_bytes + 1));
        CHECK_CUDA(cudaMemcpy(raw, s->data, s->data_bytes, cudaMemcpyHostToDevice));
        if (s->scale) CHECK_CUDA(cudaMemcpy(scale, s->scale, s->scale_bytes, cudaMemcpyHostToDevice));
        CHECK_CUDA(cu_pack(0, &p.w, &s->of, raw, scale, k, b ? 2 : 1));
        CHECK_CUDA(cudaDeviceSynchronize());
        CHECK_CUDA(cudaFree(raw));
        CHECK_CUDA(cudaFree(scale));
    }
    return p;
}

static void packed_free(packed *p) {
    check_free(p->pack);
    check_free(p->scale);
}

/* ---- pack -------------------------------------------------------------------------------------------------------- */

/* Put a code of output r (0..15) and input i where the drawing says, in two groups that were zeroed. */
static void draw(unsigned char *segment, cu_format f, int32_t r, int32_t i, uint32_t code) {
    static const int order[8][2] = {{0, 0}, {0, 1}, {8, 0}, {8, 1}, {0, 2}, {0, 3}, {8, 2}, {8, 3}}; /* (output, j) */
    static const int byte_order[8] = {0, 2, 1, 3, 4, 6, 5, 7}, nibble_order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    unsigned char *group = segment + i % CU_SEGMENT / 64 * cu_group_bytes(f);
    const int32_t k = i % 64, piece = i % CU_SEGMENT / 16;
    const int32_t g = r % 8, s = k / 16, c = k % 8 / 2, j = k % 16 / 8 * 2 + k % 2, lane = 4 * g + c;
    int e = 0;
    if (f == CU_I4A8) { /* registers a0, a1: the first 16 inputs of outputs g, g + 8; a2, a3: the last */
        const int reg = k % 32 / 16 * 2 + r / 8, vector = 4 * g + k % 16 / 4;
        group[vector * 16 + reg * 4 + k % 4] |= (unsigned char)(code << (k < 32 ? 4 : 0));
        return;
    }
    if (cu_codes_of(f)) {
        segment[r * CU_SEGMENT + (piece ^ g) * 16 + i % 16] = (unsigned char)code;
        return;
    }
    while (order[e][0] != r / 8 * 8 || order[e][1] != j) e++;
    if (f == CU_BF16) {
        const uint16_t bits = (uint16_t)code;
        memcpy(group + ((s * 32 + lane) * 8 + e) * 2, &bits, 2);
    } else if (f == CU_I4) {
        int n = 0;
        while (nibble_order[n] != e) n++;
        group[(lane * 4 + s) * 4 + n / 2] |= (unsigned char)(code << (4 * (n % 2)));
    } else {
        int n = 0;
        while (byte_order[n] != e) n++;
        group[((s / 2 * 32 + lane) * 2 + s % 2) * 8 + n] = (unsigned char)code;
    }
}

/* Segments of bands, or scales of them, before this one. */
static int64_t segment_at(const cu_linear *w, bool blocks, int32_t band, int32_t seg) {
    if (!blocks) return (int64_t)band * w->n_seg + seg;
    return ((int64_t)(band / CU_A8_BANDS) * w->n_seg + seg) * CU_A8_BANDS + band % CU_A8_BANDS;
}

static void check_pack(cu_format f, ern_order order, int32_t n_out, int32_t n_in, bool pairs) {
    char name[NAME], what[NAME] = "";
    snprintf(name, sizeof name, "pack %s%s %d x %d%s", format_name[f],
             f != CU_BF16                ? ""
             : order == ERN_ORDER_OUT_IN ? " out-in"
                                         : " in-out",
             n_out, n_in, pairs ? " pairs" : "");
    if (!check_begin(name)) return;
    stored s[2] = {stored_new(f, order, n_out, n_in), stored_new(f, order, n_out, n_in)};
    packed p = packed_new(&s[0], pairs ? &s[1] : NULL);
    const size_t bytes = (size_t)cu_pack_bytes(&p.w), n_scale = (size_t)cu_scale_count(&p.w);
    const size_t each = (size_t)cu_group_bytes(f);
    unsigned char *want = take(bytes), *got = take(bytes);
    float *scale = take((n_scale + 1) * sizeof *scale);
    check_get(got, p.pack, bytes);
    if (n_scale) check_get(scale, p.scale, n_scale * sizeof *scale);
    memset(want, 0, bytes);
    const bool blocks = cu_codes_of(f) != CU_CODES_NONE;
    const int32_t step = pairs ? 2 : 1;
    for (int32_t b = 0; b < p.w.n_band; b++) {
        const stored *of = &s[b % step];
        for (int32_t r = 0; r < CU_BAND; r++) {
            const int32_t o = b / step * CU_BAND + r;
            for (int32_t i = 0; i < p.w.n_seg * CU_SEGMENT; i++)
                draw(want + (size_t)segment_at(&p.w, blocks, b, i / CU_SEGMENT) * 2 * each, f, r, i,
                     stored_code(of, o, i));
            const float by = o < n_out && f != CU_BF16 ? quant_scale_at(&of->of, o, 0) : 0.0f;
            if ((f == CU_I8 || f == CU_I4 || f == CU_I8A8 || f == CU_I4A8) &&
                scale[b * CU_BAND + r] != (f == CU_I4A8 ? by / 16.0f : by))
                snprintf(what, sizeof what, "scale of band %d, output %d", b, r);
        }
        for (int32_t g = 0; (f == CU_F8 || f == CU_F8A8) && g < p.w.n_seg; g++)
            if (scale[segment_at(&p.w, blocks, b, g)] != quant_scale_at(&of->of, b / step * CU_BAND, g))
                snprintf(what, sizeof what, "scale of band %d, segment %d", b, g);
    }
    for (int32_t b = p.w.n_band; b < cu_band_room(&p.w); b++) /* open */
        for (int32_t g = 0; g < p.w.n_seg; g++) {
            const size_t at = (size_t)segment_at(&p.w, blocks, b, g) * 2 * each;
            memcpy(want + at, got + at, 2 * each);
        }
    for (size_t k = 0; k < bytes && !*what; k++)
        if (want[k] != got[k])
            snprintf(what, sizeof what, "group %zu, byte %zu: %02x, not %02x", k / each, k % each, got[k], want[k]);
    check_that(name, !*what, what);
    free(want);
    free(got);
    free(scale);
    packed_free(&p);
    stored_free(&s[0]);
    stored_free(&s[1]);
}

/* ---- plain linears against double -------------------------------------------------------------------------------- */

/* One dot product in double and its bound. Products of two bf16 numbers (codes are such) are exact in f32. A product
 * m16n8k16 adds sixteen of them to its sum, in an order of the chip's own: all 17 are aligned to the largest and cut,
 * each by less than 2^-23 of the largest, and the sum is cut once more: 18 * 2^-23 * A at most, A the sum of the
 * magnitudes. Eight of these make a segment: 144 * 2^-23 * A of the segment. Each joining of a segment, and the scale
 * at the end, rounds once: 2^-24 of at most A of the whole, n_seg + 1 times. */
static double dot(const stored *s, const cu_bf16 *x, int32_t o, double *bound) {
    double sum = 0.0, all = 0.0;
    for (int32_t i = 0; i < s->of.n_in; i++) {
        const double p = stored_at(s, o, i) * (double)ern_bf16_to_f32(x[i]);
        sum += p;
        all += fabs(p);
    }
    const int32_t n_seg = CU_PAD(s->of.n_in) / CU_SEGMENT;
    *bound = (144.0 + 0.5 * (n_seg + 2)) * 0x1p-23 * all;
    return sum;
}

/* What a number of the result should be, and how far it may be off. before: of ADD. */
static double expected(const stored *s, cu_epilogue e, const cu_bf16 *x, int32_t o, double before, double *bound) {
    double b0, b1;
    const double z = dot(&s[0], x, o, &b0);
    if (e != CU_SWIGLU) { /* one addition more */
        *bound = b0 + 0x1p-24 * (fabs(z) + fabs(before) + b0);
        return z + before;
    }
    const double up = dot(&s[1], x, o, &b1);
    return check_swiglu(z, b0, up, b1, bound);
}

/* Rows of bf16, padded with zeros, and NaN between. Row r has a size of its own. */
static cu_bf16 *rows_new(int32_t n_row, int32_t n, int64_t ld) {
    cu_bf16 *x = take((size_t)(n_row * ld) * sizeof *x);
    for (int32_t r = 0; r < n_row; r++)
        for (int32_t i = 0; i < ld; i++) {
            const float v = check_random() * (float)(1 << r % 4);
            x[r * ld + i] = i < n ? ern_bf16_from_f32(v) : i < CU_PAD(n) ? 0 : 0xffff;
        }
    return x;
}

/* Results of a job on the host: y, or h, with what lies between the rows. */
typedef struct results {
    size_t each, bytes; /* of a number; of all */
    int64_t ld;
    unsigned char *before, *at;
    void *device;
} results;

static results results_new(cu_epilogue e, int32_t n_row, int32_t n_out) {
    results r = {.each = e == CU_SWIGLU ? sizeof(cu_bf16) : sizeof(float), .ld = n_out + GAP};
    if (e == CU_SWIGLU) r.ld += r.ld % 2; /* ldh is even */
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

static double results_number(const results *r, const unsigned char *at, int32_t row, int32_t o) {
    const unsigned char *p = at + (size_t)(row * r->ld + o) * r->each;
    float f;
    cu_bf16 h;
    if (r->each == sizeof f) {
        memcpy(&f, p, sizeof f);
        return (double)f;
    }
    memcpy(&h, p, sizeof h);
    return (double)ern_bf16_to_f32(h);
}

static void job_results(cu_job *j, const results *r, int32_t row) {
    unsigned char *p = (unsigned char *)r->device + (size_t)(row * r->ld) * r->each;
    j->y = j->epilogue == CU_SWIGLU ? NULL : (float *)(void *)p;
    j->h = j->epilogue == CU_SWIGLU ? (cu_bf16 *)(void *)p : NULL;
    j->ldy = j->ldh = r->ld;
}

static void check_plain(cu_format f, cu_epilogue e, int32_t n_out, int32_t n_in) {
    static const int32_t n_rows[] = {1, 2, 3, 7, 8, 9, 16, 17, 32, 33, 40, 64};
    static const char *const epilogue_name[] = {"store", "add", "swiglu"};
    char name[NAME], what[NAME] = "";
    snprintf(name, sizeof name, "skinny %s %s %d x %d", format_name[f], epilogue_name[e], n_out, n_in);
    if (!check_begin(name)) return;
    stored s[2] = {stored_new(f, ERN_ORDER_OUT_IN, n_out, n_in)};
    if (e == CU_SWIGLU) s[1] = stored_new(f, ERN_ORDER_OUT_IN, n_out, n_in);
    packed p = packed_new(&s[0], e == CU_SWIGLU ? &s[1] : NULL);
    const int64_t ldx = CU_PAD(n_in) + CU_SEGMENT;
    cu_bf16 *x = rows_new(ROWS, n_in, ldx), *dx = check_new(x, (size_t)(ROWS * ldx) * sizeof *x);
    results r = results_new(e, ROWS, n_out);
    cu_job j = {.w = p.w, .epilogue = e, .ldx = ldx, .n_row = 1};

    for (int32_t row = 0; row < ROWS; row++) { /* each alone */
        j.x = dx + row * ldx;
        job_results(&j, &r, row);
        CHECK_CUDA(cu_linear_run(0, &j));
    }
    unsigned char *alone = take(r.bytes);
    check_get(alone, r.device, r.bytes);
    double worst = 0.0;
    const bool all = (int64_t)n_out * n_in < 40000;
    for (int32_t row = 0; row < ROWS; row++) {
        for (int32_t k = 0; k < (all ? n_out : n_in > 4000 ? 4 : 16); k++) {
            const int32_t o = all ? k : k < 2 ? k * (n_out - 1) : (int32_t)(check_random64() % (uint64_t)n_out);
            double bound;
            const double before = e == CU_ADD ? results_number(&r, r.before, row, o) : 0.0;
            const double want = expected(s, e, x + row * ldx, o, before, &bound);
            const double got = results_number(&r, alone, row, o), share = fabs(got - want) / bound;
            if (share <= worst || worst != worst) continue; /* the first NaN stays */
            worst = share;
            snprintf(what, sizeof what, "row %d, output %d: %g, not %g", row, o, got, want);
        }
    }
    check_end(name, worst, what);

    snprintf(name, sizeof name, "skinny %s %s %d x %d, rows in company", format_name[f], epilogue_name[e], n_out, n_in);
    *what = 0;
    j.x = dx;
    job_results(&j, &r, 0);
    for (size_t k = 0; k < sizeof n_rows / sizeof *n_rows; k++) {
        j.n_row = n_rows[k];
        results_reset(&r);
        CHECK_CUDA(cu_linear_run(0, &j));
        check_get(r.at, r.device, r.bytes);
        const size_t line = (size_t)r.ld * r.each;
        for (int32_t row = 0; row < ROWS; row++) /* what lies between rows is poison in all of them */
            if (memcmp(r.at + (size_t)row * line, (row < j.n_row ? alone : r.before) + (size_t)row * line, line) != 0)
                snprintf(what, sizeof what, "row %d of %d is another one", row, j.n_row);
    }
    check_that(name, !*what, what);
    free(alone);
    free(x);
    check_free(dx);
    results_free(&r);
    packed_free(&p);
    stored_free(&s[0]);
    stored_free(&s[1]);
}

/* ---- the norm in front ------------------------------------------------------------------------------------------- */

static void check_norm_front(cu_format f, cu_epilogue e, int32_t n_out, int32_t n_in, bool odd_address) {
    char name[NAME], what[NAME] = "";
    snprintf(name, sizeof name, "skinny %s, norm in front, %d x %d%s", format_name[f], n_out, n_in,
             odd_address ? ", odd address" : "");
    if (!check_begin(name)) return;
    stored s[2] = {stored_new(f, ERN_ORDER_OUT_IN, n_out, n_in), stored_new(f, ERN_ORDER_OUT_IN, n_out, n_in)};
    packed p = packed_new(&s[0], e == CU_SWIGLU ? &s[1] : NULL);
    const int32_t shift = odd_address ? 1 : 0, n = 8 * n_in;
    const int64_t ldx = CU_PAD(n_in);
    float *x = take((size_t)(n + 1) * sizeof *x);
    cu_bf16 *w = take((size_t)(n_in + 1) * sizeof *w), *zero = take((size_t)(8 * ldx) * sizeof *zero);
    for (int32_t i = 0; i <= n; i++) x[i] = check_random() * (float)(1 << i / n_in % 3);
    for (int32_t i = 0; i <= n_in; i++) w[i] = ern_bf16_from_f32(1.0f + 0.5f * check_random());
    memset(zero, 0, (size_t)(8 * ldx) * sizeof *zero);
    float *dx = check_new(x, (size_t)(n + 1) * sizeof *x);
    cu_bf16 *dw = check_new(w, (size_t)(n_in + 1) * sizeof *w);
    float *even_x = check_new(x + shift, (size_t)n * sizeof *x); /* cu_norm wants its rows at multiples of 16 bytes */
    cu_bf16 *even_w = check_new(w + shift, (size_t)n_in * sizeof *w);
    cu_bf16 *normed = check_new(zero, (size_t)(8 * ldx) * sizeof *zero);
    results r = results_new(e, 8, n_out);
    unsigned char *want = take(r.bytes);
    static const int32_t n_rows[] = {1, 2, 5, 8};
    for (size_t k = 0; k < sizeof n_rows / sizeof *n_rows; k++) {
        cu_job j = {.w = p.w, .epilogue = e, .x = normed, .ldx = ldx, .n_row = n_rows[k]};
        job_results(&j, &r, 0);
        results_reset(&r);
        CHECK_CUDA(cu_norm(0, normed, even_x, NULL, even_w, j.n_row, n_in, 1e-5f));
        CHECK_CUDA(cu_skinny_run(0, &j));
        check_get(want, r.device, r.bytes);
        results_reset(&r);
        j.x = NULL;
        j.x_f32 = dx + shift;
        j.norm_w = dw + shift;
        j.eps = 1e-5f;
        CHECK_CUDA(cu_skinny_run(0, &j));
        check_get(r.at, r.device, r.bytes);
        for (size_t i = 0; i < r.bytes && !*what; i++)
            if (want[i] != r.at[i])
                snprintf(what, sizeof what, "%d rows: row %zu, number %zu", j.n_row, i / r.each / (size_t)r.ld,
                         i / r.each % (size_t)r.ld);
    }
    check_that(name, !*what, what);
    free(want);
    free(x);
    free(w);
    free(zero);
    check_free(dx);
    check_free(dw);
    check_free(even_x);
    check_free(even_w);
    check_free(normed);
    results_free(&r);
    packed_free(&p);
    stored_free(&s[0]);
    stored_free(&s[1]);
}

/* ---- experts ----------------------------------------------------------------------------------------------------- */

/* NOBODY: an expert that no row chooses. Experts i and i + PACKS have the same weights. */
enum { E = 8, PACKS = 4, K = 3, T_MAX = 200, NOBODY = 5 };

/* The lists as cu_route would leave them, but made here. */
typedef struct lists {
    int32_t first[E + 1], place_entry[T_MAX * K], expert[T_MAX * K], tile_expert[T_MAX * K], tile_place[T_MAX * K];
    int32_t n_tile, tile_rows;
} lists;

static void lists_fill(lists *l, int32_t n_row) {
    static int32_t chosen[T_MAX * K];
    for (int32_t t = 0; t < n_row; t++)
        for (int32_t k = 0; k < K; k++) {
            bool again;
            do {
                chosen[t * K + k] = (int32_t)(check_random64() % E);
                again = chosen[t * K + k] == NOBODY;
                for (int32_t i = 0; i < k; i++) again |= chosen[t * K + i] == chosen[t * K + k];
            } while (again);
        }
    int32_t p = 0;
    l->tile_rows = cu_tile_rows(n_row, K, E);
    l->n_tile = 0;
    for (int32_t e = 0; e < E; e++) {
        l->first[e] = p;
        for (int32_t i = 0; i < n_row * K; i++) {
            if (chosen[i] != e) continue;
            l->expert[p] = e;
            l->place_entry[p++] = i;
        }
        for (int32_t i = l->first[e]; i < p; i += l->tile_rows) {
            l->tile_expert[l->n_tile] = e;
            l->tile_place[l->n_tile++] = i;
        }
    }
    l->first[E] = p;
}

/* Up (pairs, gathered) or down of all experts on n_row rows: every place has the bits of a plain linear. */
static void check_experts(cu_format f, bool up, int32_t n_out, int32_t n_in, int32_t n_row) {
    char name[NAME], what[NAME] = "";
    snprintf(name, sizeof name, "experts %s %s %d x %d, %d rows", format_name[f], up ? "up" : "down", n_out, n_in,
             n_row);
    if (!check_begin(name)) return;
    const cu_epilogue e = up ? CU_SWIGLU : CU_STORE;
    const int32_t n_place = n_row * K, n_x = up ? n_row : n_place;
    stored s[2] = {stored_new(f, ERN_ORDER_OUT_IN, n_out, n_in), stored_new(f, ERN_ORDER_OUT_IN, n_out, n_in)};
    packed p[PACKS];
    cu_linear w[E];
    for (int32_t i = 0; i < PACKS; i++) {
        if (i) stored_free(&s[i % 2]);
        if (i) s[i % 2] = stored_new(f, ERN_ORDER_OUT_IN, n_out, n_in);
        p[i] = packed_new(&s[i % 2], up ? &s[1 - i % 2] : NULL);
        w[i] = w[i + PACKS] = p[i].w;
    }
    static lists l;
    lists_fill(&l, n_row);
    const int64_t ldx = CU_PAD(n_in);
    cu_bf16 *x = rows_new(n_x, n_in, ldx), *dx = check_new(x, (size_t)(n_x * ldx) * sizeof *x);
    results r = results_new(e, n_place, n_out);
    unsigned char *want = take(r.bytes);
    for (int32_t i = 0; i < n_place; i++) {
        cu_job j = {.w = w[l.expert[i]], .epilogue = e, .ldx = ldx, .n_row = 1};
        j.x = dx + (up ? l.place_entry[i] / K : i) * ldx;
        job_results(&j, &r, i);
        CHECK_CUDA(cu_linear_run(0, &j));
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
                              .tile_rows = l.tile_rows};
    cu_grouped_job g = {.shape = w[0],
                        .experts = dw,
                        .routes = &routes,
                        .n_row = n_row,
                        .gather = up,
                        .epilogue = e,
                        .x = dx,
                        .ldx = ldx,
                        .ldy = r.ld,
                        .ldh = r.ld};
    g.shape.pack = NULL;
    g.shape.scale = NULL;
    if (up)
        g.h = r.device;
    else
        g.y = r.device;
    CHECK_CUDA(cu_grouped_run(0, &g));
    check_get(r.at, r.device, r.bytes);
    for (size_t i = 0; i < r.bytes && !*what; i++)
        if (want[i] != r.at[i]) {
            const int32_t place = (int32_t)(i / r.each / (size_t)r.ld);
            snprintf(what, sizeof what, "place %d (expert %d), number %zu", place, l.expert[place],
                     i / r.each % (size_t)r.ld);
        }
    check_that(name, !*what, what);
    free(want);
    free(x);
    check_free(dx);
    check_free(dw);
    check_free(dl);
    results_free(&r);
    for (int32_t i = 0; i < PACKS; i++) packed_free(&p[i]);
    stored_free(&s[0]);
    stored_free(&s[1]);
}

/* ---- one after the other ----------------------------------------------------------------------------------------- */

/* Feed-forwards upon one residual stream, each kernel reading what the one before wrote, as they come: a kernel that
 * begins early must not see, or change, too much. The same bits with a wait after each, and from a graph. */
static void check_chain(cu_format f, int32_t n_hidden, int32_t n_ffn, int32_t n_row) {
    enum { LAYERS = 12, WAYS = 3 };
    char name[NAME], what[NAME] = "";
    snprintf(name, sizeof name, "skinny %s, a chain of %d x %d, %d rows", format_name[f], n_hidden, n_ffn, n_row);
    if (!check_begin(name)) return;
    stored gate = stored_new(f, ERN_ORDER_OUT_IN, n_ffn, n_hidden);
    stored down = stored_new(f, ERN_ORDER_OUT_IN, n_hidden, n_ffn);
    packed p = packed_new(&gate, &gate), q = packed_new(&down, NULL);
    const int64_t ldh = CU_PAD(n_ffn);
    const size_t n = (size_t)(n_row * n_hidden), h_bytes = (size_t)(n_row * ldh) * sizeof(cu_bf16);
    float *start = take(n * sizeof *start), *got[WAYS];
    cu_bf16 *w = take((size_t)n_hidden * sizeof *w);
    for (size_t i = 0; i < n; i++) start[i] = check_random();
    for (int32_t i = 0; i < n_hidden; i++) w[i] = ern_bf16_from_f32(1.0f + 0.5f * check_random());
    float *x = check_new(start, n * sizeof *start);
    cu_bf16 *dw = check_new(w, (size_t)n_hidden * sizeof *w), *h = check_new(NULL, h_bytes);
    CHECK_CUDA(cudaMemset(h, 0, h_bytes));
    cudaStream_t s;
    CHECK_CUDA(cudaStreamCreate(&s));
    const cu_job up = {
        .w = p.w, .epilogue = CU_SWIGLU, .n_row = n_row, .h = h, .ldh = ldh, .x_f32 = x, .norm_w = dw, .eps = 1e-5f};
    const cu_job add = {.w = q.w, .epilogue = CU_ADD, .n_row = n_row, .x = h, .ldx = ldh, .y = x, .ldy = n_hidden};
    for (int way = 0; way < WAYS; way++) { /* 0 waits after each, 1 does not, 2 is a graph */
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK_CUDA(cudaMemcpy(x, start, n * sizeof *start, cudaMemcpyHostToDevice));
        CHECK_CUDA(cudaDeviceSynchronize());
        if (way == 2) CHECK_CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
        for (int k = 0; k < LAYERS; k++) {
            CHECK_CUDA(cu_linear_run(s, &up));
            if (way == 0) CHECK_CUDA(cudaDeviceSynchronize());
            CHECK_CUDA(cu_linear_run(s, &add));
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
    check_free(x);
    check_free(dw);
    check_free(h);
    packed_free(&p);
    packed_free(&q);
    stored_free(&gate);
    stored_free(&down);
}

/* ---- a layer of experts in one kernel ------------------------------------------------------------------------------
 */

enum { FEW_E = 64, FEW_K = 6, FEW_PACKS = 5, FEW_LAYERS = 6 };

/* What both ways of computing a layer need. */
typedef struct few {
    cu_few_job j;
    cu_routes r;
    cu_bf16 *xn;
} few;

static void few_apart(const few *f, int32_t n_row) {
    const cu_few_job *j = &f->j;
    const int32_t D = j->route.n_hidden;
    CHECK_CUDA(cu_norm(0, f->xn, j->x, NULL, j->route.norm_w, n_row, D, j->route.eps));
    if (j->shared_up.n_out > 0) {
        const cu_job up = {.w = j->shared_up,
                           .epilogue = CU_SWIGLU,
                           .x = f->xn,
                           .ldx = CU_PAD(D),
                           .n_row = n_row,
                           .h = j->shared_hid,
                           .ldh = CU_PAD(j->shared_up.n_out)};
        CHECK_CUDA(cu_linear_run(0, &up));
        const cu_job down = {.w = j->shared_down,
                             .epilogue = CU_STORE,
                             .x = j->shared_hid,
                             .ldx = up.ldh,
                             .n_row = n_row,
                             .y = j->shared_y,
                             .ldy = D};
        CHECK_CUDA(cu_linear_run(0, &down));
    }
    CHECK_CUDA(cu_route(0, &j->route, &f->r));
    const cu_grouped_job up = {.shape = j->up,
                               .experts = j->experts_up,
                               .routes = &f->r,
                               .n_row = n_row,
                               .gather = true,
                               .epilogue = CU_SWIGLU,
                               .x = f->xn,
                               .ldx = CU_PAD(D),
                               .h = j->expert_hid,
                               .ldh = CU_PAD(j->up.n_out)};
    CHECK_CUDA(cu_grouped_run(0, &up));
    const cu_grouped_job down = {.shape = j->down,
                                 .experts = j->experts_down,
                                 .routes = &f->r,
                                 .n_row = n_row,
                                 .epilogue = CU_STORE,
                                 .x = j->expert_hid,
                                 .ldx = up.ldh,
                                 .y = j->expert_y,
                                 .ldy = D};
    CHECK_CUDA(cu_grouped_run(0, &down));
    CHECK_CUDA(
        cu_combine(0, j->x, NULL, j->expert_y, j->shared_up.n_out > 0 ? j->shared_y : NULL, &f->r, n_row, D, NULL));
}

static void *few_zeros(size_t bytes) {
    void *p = check_new(NULL, bytes);
    CHECK_CUDA(cudaMemset(p, 0, bytes));
    return p;
}

/* Layers upon one residual stream, in one kernel each, as they come and as a graph: the bits of the kernels apart. */
static void check_few(cu_format shared, cu_format f, int32_t D, int32_t F, int32_t F_shared, int32_t n_row) {
    char name[NAME], what[NAME] = "";
    snprintf(name, sizeof name, "few %s %d x %d, shared %s %d, %d rows", format_name[f], D, F, format_name[shared],
             F_shared, n_row);
    if (CU_PORTABLE || !check_begin(name)) return;
    packed up[FEW_PACKS], down[FEW_PACKS], shared_up = {0}, shared_down = {0};
    for (int i = 0; i <= FEW_PACKS; i++) {
        const int32_t n = i < FEW_PACKS ? F : F_shared;
        const cu_format format = i < FEW_PACKS ? f : shared;
        if (n == 0) continue;
        stored s[3] = {stored_new(format, ERN_ORDER_OUT_IN, n, D), stored_new(format, ERN_ORDER_OUT_IN, n, D),
                       stored_new(format, ERN_ORDER_OUT_IN, D, n)};
        *(i < FEW_PACKS ? &up[i] : &shared_up) = packed_new(&s[0], &s[1]);
        *(i < FEW_PACKS ? &down[i] : &shared_down) = packed_new(&s[2], NULL);
        for (int k = 0; k < 3; k++) stored_free(&s[k]);
    }
    cu_linear linears[2][FEW_E];
    for (int e = 0; e < FEW_E; e++) linears[0][e] = up[e % FEW_PACKS].w, linears[1][e] = down[e % FEW_PACKS].w;
    const size_t n = (size_t)(n_row * D), entries = (size_t)(n_row * FEW_K);
    float *x = take(n * sizeof *x), *router = take((size_t)(FEW_E * D) * sizeof *router), bias[FEW_E], *got[3];
    cu_bf16 *w = take((size_t)D * sizeof *w);
    for (size_t i = 0; i < n; i++) x[i] = check_random();
    for (int32_t i = 0; i < FEW_E * D; i++) router[i] = check_random() * 3.0f / sqrtf((float)D);
    for (int32_t i = 0; i < FEW_E; i++) bias[i] = check_random() * 0.01f;
    for (int32_t i = 0; i < D; i++) w[i] = ern_bf16_from_f32(1.0f + 0.5f * check_random());
    few a = {.xn = few_zeros((size_t)(n_row * CU_PAD(D)) * sizeof(cu_bf16))};
    a.r = (cu_routes){.n_expert = FEW_E,
                      .n_used = FEW_K,
                      .chosen = check_new(NULL, entries * 4),
                      .share = check_new(NULL, entries * 4),
                      .first = check_new(NULL, (FEW_E + 1) * 4),
                      .place_entry = check_new(NULL, entries * 4),
                      .entry_place = check_new(NULL, entries * 4),
                      .tile_expert = check_new(NULL, entries * 4),
                      .tile_place = check_new(NULL, entries * 4),
                      .n_tile = check_new(NULL, 4),
                      .tile_rows = cu_tile_rows(n_row, FEW_K, FEW_E),
                      .logit = check_new(NULL, (size_t)(n_row * FEW_E) * 4),
                      .scratch = check_new(NULL, (FEW_E * 2 + 2) * 4)};
    a.j = (cu_few_job){.n_expert = FEW_E,
                       .n_used = FEW_K,
                       .x = check_new(x, n * sizeof *x),
                       .shared_up = shared_up.w,
                       .shared_down = shared_down.w,
                       .up = up[0].w,
                       .down = down[0].w,
                       .experts_up = check_new(linears[0], sizeof linears[0]),
                       .experts_down = check_new(linears[1], sizeof linears[1]),
                       .shared_hid = few_zeros((size_t)(n_row * CU_PAD(F_shared)) * 2 + 2),
                       .expert_hid = few_zeros(entries * (size_t)CU_PAD(F) * 2),
                       .shared_y = check_new(NULL, n * sizeof(float)),
                       .expert_y = check_new(NULL, entries * (size_t)D * sizeof(float)),
                       .count = few_zeros((size_t)CU_FEW_COUNTS * sizeof(int32_t))};
    a.j.route = (cu_route_job){.x = a.j.x,
                               .norm_w = check_new(w, (size_t)D * sizeof *w),
                               .eps = 1e-5f,
                               .norm_min = 1e-12f,
                               .router = check_new(router, (size_t)(FEW_E * D) * sizeof *router),
                               .bias = check_new(bias, sizeof bias),
                               .n_row = n_row,
                               .n_hidden = D};
    if (!cu_moe_few_fits(&a.j)) snprintf(what, sizeof what, "does not fit");
    cudaStream_t s;
    CHECK_CUDA(cudaStreamCreate(&s));
    for (int way = 0; way < 3 && !*what; way++) { /* 0: apart; 1 waits for nothing, 2 is a graph */
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK_CUDA(cudaMemcpy(a.j.x, x, n * sizeof *x, cudaMemcpyHostToDevice));
        CHECK_CUDA(cudaDeviceSynchronize());
        if (way == 2) CHECK_CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
        for (int k = 0; k < FEW_LAYERS; k++) {
            if (way > 0)
                CHECK_CUDA(cu_moe_few(s, &a.j));
            else
                few_apart(&a, n_row);
        }
        if (way == 2) {
            CHECK_CUDA(cudaStreamEndCapture(s, &graph));
            CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
            CHECK_CUDA(cudaGraphLaunch(exec, s));
            CHECK_CUDA(cudaStreamSynchronize(s));
            CHECK_CUDA(cudaGraphExecDestroy(exec));
            CHECK_CUDA(cudaGraphDestroy(graph));
        }
        CHECK_CUDA(cudaDeviceSynchronize());
        got[way] = take(n * sizeof **got);
        check_get(got[way], a.j.x, n * sizeof **got);
        for (size_t i = 0; i < n && !*what; i++)
            if (memcmp(&got[way][i], &got[0][i], sizeof **got) != 0 || !isfinite(got[0][i]))
                snprintf(what, sizeof what, "%s: number %zu: %g, not %g", way == 2 ? "graph" : "stream", i,
                         (double)got[way][i], (double)got[0][i]);
        if (*what)
            for (int k = way; k >= 0; k--) free(got[k]);
    }
    if (!*what)
        for (int k = 0; k < 3; k++) free(got[k]);
    check_that(name, !*what, what);
    CHECK_CUDA(cudaStreamDestroy(s));
    int32_t *ids[] = {a.r.chosen,     a.r.first,  a.r.place_entry, a.r.entry_place, a.r.tile_expert,
                      a.r.tile_place, a.r.n_tile, a.r.scratch,     a.j.count};
    for (size_t k = 0; k < sizeof ids / sizeof *ids; k++) check_free(ids[k]);
    check_free(a.r.share), check_free(a.r.logit), check_free(a.xn), check_free(a.j.x);
    check_free((void *)(uintptr_t)a.j.experts_up), check_free((void *)(uintptr_t)a.j.experts_down);
    check_free(a.j.shared_hid), check_free(a.j.expert_hid), check_free(a.j.shared_y), check_free(a.j.expert_y);
    check_free((void *)(uintptr_t)a.j.route.norm_w), check_free((void *)(uintptr_t)a.j.route.router);
    check_free((void *)(uintptr_t)a.j.route.bias);
    for (int i = 0; i < FEW_PACKS; i++) packed_free(&up[i]), packed_free(&down[i]);
    packed_free(&shared_up), packed_free(&shared_down);
    free(x), free(router), free(w);
}

void check_linears(void) {
    static const int32_t ugly[][2] = {{44, 80}, {168, 64}, {200, 176}, {16, 128}, {130, 300}};
    for (int f = 0; f < CU_FORMATS; f++) {
        for (size_t k = 0; k < sizeof ugly / sizeof *ugly; k++) {
            check_pack((cu_format)f, ERN_ORDER_OUT_IN, ugly[k][0], ugly[k][1], k % 2 == 1);
            if (f == CU_BF16) check_pack(CU_BF16, ERN_ORDER_IN_OUT, ugly[k][0], ugly[k][1], k % 2 == 0);
        }
    }
    /* Segments and bands of all kinds: one or three of few bands; a cluster of two with a rest, of four with several
     * rounds and x too large for shared memory at 64 rows; enough bands for blocks of their own, in one round and in
     * three. */
    static const int32_t plain[][2] = {{44, 80}, {200, 300}, {72, 1100}, {40, 12200}, {2000, 1024}, {1928, 2500}};
    for (int f = 0; f < CU_PLAIN_FORMATS; f++) {
        for (size_t k = 0; k < sizeof plain / sizeof *plain; k++) {
            if (k != 5) check_plain((cu_format)f, k % 2 ? CU_ADD : CU_STORE, plain[k][0], plain[k][1]);
            if (k != 4) check_plain((cu_format)f, CU_SWIGLU, plain[k][0], plain[k][1]);
        }
        check_plain((cu_format)f, CU_STORE, 60001, 170); /* so many bands that warps take them alone (cu_tall.cu) */
        check_plain((cu_format)f, CU_STORE, 52000, 1024);
        if (f == CU_I8) check_plain((cu_format)f, CU_STORE, 51000, 2560); /* fewer blocks of more rows */
        check_norm_front((cu_format)f, CU_STORE, 55000, 300, false);
        check_norm_front((cu_format)f, CU_STORE, 2000, 1024, false);
        check_norm_front((cu_format)f, CU_SWIGLU, 72, 2560, false);
    }
    check_norm_front(CU_BF16, CU_SWIGLU, 200, 80, false);
    check_norm_front(CU_BF16, CU_STORE, 200, 64, false);
    check_norm_front(CU_I8, CU_STORE, 168, 172, false); /* not a multiple of 8 */
    check_norm_front(CU_BF16, CU_STORE, 168, 1100, true);
    for (int f = 0; f < CU_PLAIN_FORMATS; f++) check_chain((cu_format)f, 1024, 3072, f % 2 ? 8 : 1);
    static const int32_t n_row[] = {1, 7, 40, 70, 180}; /* tiles of 8, 8, 16, 32, 64 */
    for (int f = 0; f < CU_PLAIN_FORMATS; f++) {
        for (size_t k = 0; k < sizeof n_row / sizeof *n_row; k++) {
            check_experts((cu_format)f, true, 44, 80, n_row[k]);
            check_experts((cu_format)f, false, 80, 44, n_row[k]);
        }
        check_experts((cu_format)f, true, 96, 2560, 1);
        check_experts((cu_format)f, true, 96, 2560, 180);
        check_experts((cu_format)f, false, 320, 1536, 1);
        check_few((cu_format)f, (cu_format)f, 2560, 192, 384, 1);
        check_few((cu_format)f, (cu_format)f, 384, 320, 0, 1);
        check_few((cu_format)f, (cu_format)f, 2560, 192, 384, 2);
        check_few((cu_format)f, (cu_format)f, 384, 320, 640, 3);
    }
    check_few(CU_I8, CU_I4, 2560, 192, 384, 1);
    check_few(CU_I8, CU_I4, 384, 300, 500, 3);
}
