/* Rows of 8 bits (CU_F8A8, CU_I8A8, CU_I4A8): cu_quant_x8 to the letter; every kernel against scalar code, fp8 in
 * double within a derived bound, integers bit for bit as cu_kernels.h has their sums; and bit for bit with rows alone.
 * Weights are drawn as packed bytes, read back by the layout's definition. */
#include "check.h"

#include "model/quant.h"

enum { NAME = 112 };

static const char *const format_name[CU_FORMATS] = {
    [CU_F8A8] = "fp8 by fp8", [CU_I8A8] = "int8 by int8", [CU_I4A8] = "int4 by int8"};

static void *take(size_t bytes) {
    void *p = calloc(bytes + 1, 1);
    if (!p) abort();
    return p;
}

/* ---- rows to codes ----------------------------------------------------------------------------------------------- */

/* Rows of bf16, zeros from n on up to the segment's end, NaN between. Row r has a size of its own, its segments too. */
static cu_bf16 *rows_new(int64_t n_row, int32_t n, int64_t ld) {
    cu_bf16 *x = take((size_t)(n_row * ld) * sizeof *x);
    for (int64_t r = 0; r < n_row; r++)
        for (int64_t i = 0; i < ld; i++) {
            const float v = check_random() * (float)(1 << (r + i / CU_SEGMENT) % 4);
            x[r * ld + i] = i < n ? ern_bf16_from_f32(v) : i < CU_PAD(n) ? 0 : 0xffff;
        }
    return x;
}

/* Rows of codes on the host, made of rows of bf16, and on the device: poison between rows and behind them. */
typedef struct rows8 {
    cu_x8 host, device;
    size_t code_bytes, scale_bytes;
} rows8;

static rows8 rows8_new(cu_codes codes, const cu_bf16 *x, int64_t ldx, int32_t n_row, int32_t n) {
    const int32_t pad = CU_PAD(n), n_seg = pad / CU_SEGMENT;
    rows8 r = {.host = {.ldx = pad + CU_SEGMENT, .ld_scale = (n_row + 3) / 4 * 4 + 4}};
    r.code_bytes = (size_t)(n_row * r.host.ldx);
    r.scale_bytes = (size_t)(n_seg * r.host.ld_scale) * sizeof(float);
    r.host.code = take(r.code_bytes);
    r.host.scale = take(r.scale_bytes);
    memset(r.host.code, 0xff, r.code_bytes);
    memset(r.host.scale, 0xff, r.scale_bytes);
    float *wide = take((size_t)pad * sizeof *wide), *scale = take((size_t)n_seg * sizeof *scale);
    for (int32_t t = 0; t < n_row; t++) {
        for (int32_t i = 0; i < pad; i++) wide[i] = ern_bf16_to_f32(x[t * ldx + i]);
        if (codes == CU_CODES_F8)
            quant_act_fp8(r.host.code + t * r.host.ldx, scale, wide, pad);
        else
            quant_act_int8((int8_t *)(r.host.code + t * r.host.ldx), scale, wide, pad);
        for (int32_t s = 0; s < n_seg; s++) r.host.scale[s * r.host.ld_scale + t] = scale[s];
    }
    free(wide);
    free(scale);
    r.device = r.host;
    r.device.code = check_new(r.host.code, r.code_bytes);
    r.device.scale = check_new(r.host.scale, r.scale_bytes);
    return r;
}

static void rows8_free(rows8 *r) {
    check_free(r->device.code);
    check_free(r->device.scale);
    free(r->host.code);
    free(r->host.scale);
}

static void check_quant(cu_codes codes, int32_t n_row, int32_t n) {
    char name[NAME], what[NAME] = "";
    snprintf(name, sizeof name, "%s rows %d x %d", codes == CU_CODES_F8 ? "fp8" : "int8", n_row, n);
    if (!check_begin(name)) return;
    const int64_t ldx = CU_PAD(n) + 64;
    cu_bf16 *x = rows_new(n_row, n, ldx);
    for (int32_t i = 0; i < n; i++) { /* the sizes there are: subnormal, zero, large; then what is not finite */
        static const float size[] = {0x1p-130f, 0.0f, 0x1p127f, 0x1p-33f};
        x[i] = ern_bf16_from_f32(check_random() * size[i / CU_SEGMENT % 4]);
        if (n_row > 1) x[ldx + i] = (cu_bf16)(check_random64() >> 20);
    }
    if (n_row > 2) x[2 * ldx + n - 1] = 0x7f80, x[2 * ldx] = 0xffc1;
    rows8 want = rows8_new(codes, x, ldx, n_row, n);
    cu_x8 got = want.host, to = want.device;
    CHECK_CUDA(cudaMemset(to.code, 0xff, want.code_bytes));
    CHECK_CUDA(cudaMemset(to.scale, 0xff, want.scale_bytes));
    cu_bf16 *dx = check_new(x, (size_t)(n_row * ldx) * sizeof *x);
    CHECK_CUDA(cu_quant_x8(NULL, &to, codes, dx, ldx, n_row, n));
    got.code = take(want.code_bytes);
    got.scale = take(want.scale_bytes);
    check_get(got.code, to.code, want.code_bytes);
    check_get(got.scale, to.scale, want.scale_bytes);
    for (size_t i = 0; i < want.code_bytes && !*what; i++)
        if (got.code[i] != want.host.code[i])
            snprintf(what, sizeof what, "row %lld, code %lld: %02x, not %02x", (long long)i / want.host.ldx,
                     (long long)i % want.host.ldx, got.code[i], want.host.code[i]);
    for (size_t i = 0; i < want.scale_bytes / sizeof(float) && !*what; i++)
        if (memcmp(&got.scale[i], &want.host.scale[i], sizeof(float)) != 0 &&
            !(isnan(got.scale[i]) && isnan(want.host.scale[i])))
            snprintf(what, sizeof what, "scale %zu: %g, not %g", i, (double)got.scale[i], (double)want.host.scale[i]);
    check_that(name, !*what, what);
    free(got.code);
    free(got.scale);
    free(x);
    check_free(dx);
    rows8_free(&want);
}

/* ---- weights ----------------------------------------------------------------------------------------------------- */

typedef struct shape {
    cu_format format;
    int32_t n_in, n_out;
    bool pairs;
} shape;

static cu_linear linear_of(shape s) {
    return (cu_linear){.format = s.format,
                       .n_out = s.n_out,
                       .n_in = s.n_in,
                       .n_band = CU_BANDS(s.n_out) * (s.pairs ? 2 : 1),
                       .n_seg = CU_PAD(s.n_in) / CU_SEGMENT,
                       .pairs = s.pairs};
}

/* Of integers: the sum over the inputs, bit for bit. */
static double sum_of_integers(const check_weights *o, const cu_x8 *x, int32_t row, int32_t band, int32_t r) {
    float total = 0.0f;
    for (int32_t s = 0; s < o->w.n_seg; s++) {
        double segment = 0.0; /* exact */
        for (int32_t in = s * CU_SEGMENT; in < (s + 1) * CU_SEGMENT; in++)
            segment += check_a8_code(&o->w, o->pack, band, r, in) * (double)(int8_t)x->code[row * x->ldx + in];
        total = fmaf(x->scale[s * x->ld_scale + row], (float)segment, total);
    }
    return (double)(total * o->scale[band * CU_BAND + r]);
}

/* Sum over the inputs, and a bound of what the kernels may be off: none of integers. fp8: a product of two codes is
 * exact. A product of 32 inputs aligns them and the sum so far to the largest exponent among them (an e4m3 product has
 * less than twice the 1 that its exponents say, so that this is at most the largest magnitude) and cuts each 13 bits
 * below it, then the new sum once more: 34 * 2^-13 of the largest magnitude that goes in. Four of these make a segment.
 * Then factors, their product and an fma round, n_seg + 2 times at most. */
static double dot(const check_weights *o, const cu_x8 *x, int32_t row, int32_t band, int32_t r, double *bound) {
    *bound = 0.0;
    if (o->w.format != CU_F8A8) return sum_of_integers(o, x, row, band, r);
    double sum = 0.0, all = 0.0, cut = 0.0;
    for (int32_t s = 0; s < o->w.n_seg; s++) {
        const double by = (double)x->scale[s * x->ld_scale + row] * (double)o->scale[check_a8_segment(&o->w, band, s)];
        double segment = 0.0, magnitude = 0.0, off = 0.0;
        for (int32_t k = 0; k < CU_SEGMENT; k += 32) {
            double largest = fabs(segment) + off;
            for (int32_t i = k; i < k + 32; i++) {
                const int32_t in = s * CU_SEGMENT + i;
                const double p =
                    check_a8_code(&o->w, o->pack, band, r, in) * (double)ern_e4m3_to_f32(x->code[row * x->ldx + in]);
                segment += p;
                magnitude += fabs(p);
                largest = fmax(largest, fabs(p));
            }
            off += 34.0 * 0x1p-13 * largest;
        }
        sum += by * segment;
        all += fabs(by) * magnitude;
        cut += fabs(by) * off;
    }
    *bound = cut + (o->w.n_seg + 2) * 0x1p-24 * (all + cut);
    return sum;
}

/* ---- kernels against double, and rows alone -----------------------------------------------------------------------
 */

typedef struct kernels {
    const char *name;
    cudaError_t (*run)(cudaStream_t, const cu_job *);
    cudaError_t (*grouped)(cudaStream_t, const cu_grouped_job *);
    int32_t n_row[10];             /* of plain checks, ascending; 0: no more */
    int32_t tile_first, tile_last; /* rows of a grouped tile: twice the one before each */
} kernels;
static const kernels large = {"large", cu_a8_large_run, cu_a8_large_grouped, {1, 65, 128, 200, 257}, 128, 128};

/* One number of the result against double. before: what y held. */
static void compare_one(check_worst *to, const check_weights *o, const cu_x8 *x, cu_epilogue ep, double got,
                        double before, int32_t row, int32_t out, int32_t n_row) {
    double e0, e1;
    const int32_t band = out / CU_BAND, r = out % CU_BAND;
    if (ep != CU_SWIGLU) {
        double want = dot(o, x, row, band, r, &e0) + before;
        if (o->w.format == CU_F8A8)
            e0 += 0x1p-23 * (fabs(want) + fabs(before));
        else
            want = (double)(float)want; /* the sum of two floats is rounded once, as theirs is */
        check_worst_add(to, fabs(got - want), e0, ep == CU_ADD ? "add" : "store", row, out, n_row);
        return;
    }
    const double gate = dot(o, x, row, band * 2, r, &e0), up = dot(o, x, row, band * 2 + 1, r, &e1);
    double bound;
    const double want = check_swiglu(gate, e0, up, e1, &bound);
    check_worst_add(to, fabs(got - want), bound, "swiglu", row, out, n_row);
}

/* Each row by a launch of its own; briefly: 48 of them, which lie otherwise in the tiles than among all. */
static void run_alone(const kernels *k, const cu_job *all) {
    const int32_t piece = check_briefly ? 48 : 1;
    for (int32_t row = 0; row < all->n_row; row += piece) {
        cu_job j = *all;
        j.n_row = all->n_row - row < piece ? all->n_row - row : piece;
        j.x8.code += row * j.x8.ldx;
        j.x8.scale += row;
        if (j.y) j.y += row * j.ldy;
        if (j.h) j.h += row * j.ldh;
        CHECK_CUDA(k->run(NULL, &j));
    }
}

/* One shape at several numbers of rows, every epilogue: against double, and with rows alone. */
static void check_plain(const kernels *k, shape s) {
    enum { MAX = 257 };
    char name[2][NAME];
    for (int i = 0; i < 2; i++)
        snprintf(name[i], sizeof name[i], "%s %s%s %d -> %d%s", k->name, i ? "bits " : "", format_name[s.format],
                 s.n_in, s.n_out, s.pairs ? " pairs" : "");
    if (!check_begin(name[0]) && !check_begin(name[1])) return;

    check_weights o = check_weights_new(linear_of(s));
    const int32_t ldx = CU_PAD(s.n_in), ld = s.pairs ? CU_PAD(s.n_out) : s.n_out + 3;
    const size_t size = s.pairs ? sizeof(cu_bf16) : sizeof(float), bytes = (size_t)MAX * (size_t)ld * size;
    cu_bf16 *x = rows_new(MAX, s.n_in, ldx);
    rows8 x8 = rows8_new(cu_codes_of(s.format), x, ldx, MAX, s.n_in);
    unsigned char *before = take(bytes), *got = take(bytes), *want = take(bytes);
    void *dy = check_new(NULL, bytes);
    const bool small = (int64_t)s.n_in * s.n_out <= 20000;
    check_worst w = {0};
    bool same = true, kept = true;
    for (int n = 0; k->n_row[n]; n++)
        for (int ep = s.pairs ? CU_SWIGLU : CU_STORE; ep <= (s.pairs ? CU_SWIGLU : CU_ADD); ep++) {
            const int32_t n_row = k->n_row[n];
            memset(before, 0xff, bytes);
            if (ep == CU_ADD) {
                float *b = (float *)(void *)before;
                for (int32_t r = 0; r < n_row; r++)
                    for (int32_t i = 0; i < s.n_out; i++) b[r * ld + i] = check_random();
            }
            cu_job j = {.w = o.w, .epilogue = (cu_epilogue)ep, .x8 = x8.device, .n_row = n_row};
            if (s.pairs)
                j.h = dy, j.ldh = ld;
            else
                j.y = dy, j.ldy = ld;
            for (int alone = 0; alone < 2; alone++) {
                CHECK_CUDA(cudaMemcpy(dy, before, bytes, cudaMemcpyHostToDevice));
                if (alone)
                    run_alone(k, &j);
                else
                    CHECK_CUDA(k->run(NULL, &j));
                check_get(alone ? want : got, dy, bytes);
            }
            same &= memcmp(got, want, bytes) == 0;
            for (int32_t r = 0; r < MAX; r++) { /* nothing written beside the outputs */
                const size_t from = (size_t)r * (size_t)ld * size, skip = r < n_row ? (size_t)s.n_out * size : 0;
                kept &= memcmp(got + from + skip, before + from + skip, (size_t)ld * size - skip) == 0;
            }
            const int32_t n_look = small ? n_row * s.n_out : 24;
            for (int32_t i = 0; i < n_look; i++) {
                if (small && n && i % 7) continue;
                const int32_t at = small ? i : (int32_t)(check_random64() % (uint64_t)((int64_t)n_row * s.n_out));
                const int32_t r = i == n_look - 1 ? n_row - 1 : at / s.n_out;
                const int32_t out = i == n_look - 1 ? s.n_out - 1 : at % s.n_out;
                cu_bf16 h;
                float y, b = 0.0f;
                if (s.pairs) {
                    memcpy(&h, got + (size_t)(r * ld + out) * size, size);
                    y = ern_bf16_to_f32(h);
                } else {
                    memcpy(&y, got + (size_t)(r * ld + out) * size, size);
                    if (ep == CU_ADD) memcpy(&b, before + (size_t)(r * ld + out) * size, size);
                }
                compare_one(&w, &o, &x8.host, (cu_epilogue)ep, (double)y, (double)b, r, out, n_row);
            }
        }
    check_end(name[0], w.share, w.what);
    check_that(name[1], same && kept, kept ? "differs from rows alone" : "wrote beside the outputs");
    check_free(dy);
    rows8_free(&x8);
    check_weights_free(&o);
    free(x);
    free(before);
    free(got);
    free(want);
}

/* ---- experts ------------------------------------------------------------------------------------------------------
 */

enum { E = CHECK_EXPERTS, K = CHECK_USED };

/* All experts at once against the plain kernel, expert by expert. */
static void check_grouped(const kernels *k, shape s, int32_t n_row) {
    const cu_epilogue ep = s.pairs ? CU_SWIGLU : CU_STORE;
    const int32_t n = n_row * K, ldx = CU_PAD(s.n_in), ld = s.pairs ? CU_PAD(s.n_out) : s.n_out;
    const size_t size = s.pairs ? sizeof(cu_bf16) : sizeof(float), bytes = (size_t)n * (size_t)ld * size;
    char name[NAME];
    snprintf(name, sizeof name, "%s grouped %s %d -> %d%s", k->name, format_name[s.format], s.n_in, s.n_out,
             s.pairs ? " pairs" : "");
    if (!check_begin(name)) return;
    check_weights o[E];
    cu_linear experts[E];
    for (int i = 0; i < E; i++) o[i] = check_weights_new(linear_of(s)), experts[i] = o[i].w;
    cu_linear *dexperts = check_new(experts, sizeof experts), described = experts[0];
    described.pack = NULL, described.scale = NULL;
    const int32_t n_x = s.pairs ? n_row : n; /* up gathers rows, down has one a place */
    cu_bf16 *x = rows_new(n_x, s.n_in, ldx), *by_place = take((size_t)n * (size_t)ldx * sizeof *x);
    rows8 x8 = rows8_new(cu_codes_of(s.format), x, ldx, n_x, s.n_in);
    int32_t first[E + 1], *place_entry = take((size_t)n * sizeof *place_entry);
    unsigned char *got = take(bytes), *want = take(bytes);
    void *dy = check_new(NULL, bytes), *room = check_new(NULL, (size_t)n * (size_t)x8.device.ldx);
    bool same = true;
    for (int32_t rows = k->tile_first; rows <= k->tile_last; rows *= 2) {
        cu_routes r;
        check_routes_new(&r, n_row, rows, first, place_entry);
        cu_grouped_job j = {.shape = described,
                            .experts = dexperts,
                            .routes = &r,
                            .n_row = n_row,
                            .gather = s.pairs,
                            .epilogue = ep,
                            .x8 = x8.device,
                            .x8_by_place = {.code = room, .ldx = x8.device.ldx}};
        if (s.pairs)
            j.h = dy, j.ldh = ld;
        else
            j.y = dy, j.ldy = ld;
        CHECK_CUDA(cudaMemset(dy, 0xff, bytes));
        CHECK_CUDA(k->grouped(NULL, &j));
        check_get(got, dy, bytes);

        for (int32_t p = 0; p < n; p++)
            memcpy(by_place + (int64_t)p * ldx, x + (int64_t)(s.pairs ? place_entry[p] / K : p) * ldx,
                   (size_t)ldx * sizeof *x);
        CHECK_CUDA(cudaMemset(dy, 0xff, bytes));
        for (int i = 0; i < E; i++) {
            const int32_t n_own = first[i + 1] - first[i];
            if (n_own == 0) continue;
            rows8 own = rows8_new(cu_codes_of(s.format), by_place + (int64_t)first[i] * ldx, ldx, n_own, s.n_in);
            cu_job one = {.w = experts[i], .epilogue = ep, .x8 = own.device, .n_row = n_own};
            if (s.pairs)
                one.h = (cu_bf16 *)dy + (int64_t)first[i] * ld, one.ldh = ld;
            else
                one.y = (float *)dy + (int64_t)first[i] * ld, one.ldy = ld;
            CHECK_CUDA(k->run(NULL, &one));
            rows8_free(&own);
        }
        check_get(want, dy, bytes);
        same &= memcmp(got, want, bytes) == 0;
        check_routes_free(&r);
    }
    check_that(name, same, "differs from the plain kernel, expert by expert");
    check_free(room);
    check_free(dy);
    check_free(dexperts);
    rows8_free(&x8);
    for (int i = 0; i < E; i++) check_weights_free(&o[i]);
    free(x);
    free(by_place);
    free(place_entry);
    free(got);
    free(want);
}

/* ---- speed (information, no case) ---------------------------------------------------------------------------------
 */

enum { FILLED = 256 << 20 };

/* 256 MB of random codes, to stay: a few MB drawn, repeated on the device. */
static char *filled(void) {
    enum { PIECE = 4 << 20 };
    static uint64_t piece[PIECE / 8];
    static char *all;
    if (all) return all;
    CHECK_CUDA(cudaMalloc((void **)&all, FILLED));
    for (size_t i = 0; i < PIECE / 8; i++) piece[i] = check_a8_random(CU_F8A8);
    for (size_t at = 0; at < FILLED; at += PIECE)
        CHECK_CUDA(cudaMemcpy(all + at, piece, PIECE, cudaMemcpyHostToDevice));
    return all;
}

/* n numbers of one size on the device. */
static float *scales_new(int64_t n) {
    float *host = take((size_t)n * sizeof *host), *at;
    for (int64_t i = 0; i < n; i++) host[i] = 0x1p-10f * (1.0f + 0.5f * check_random());
    CHECK_CUDA(cudaMalloc((void **)&at, (size_t)n * sizeof *at));
    CHECK_CUDA(cudaMemcpy(at, host, (size_t)n * sizeof *at, cudaMemcpyHostToDevice));
    free(host);
    return at;
}

/* A stream whose launches become a graph, and the time of one. */
enum { LAUNCHES = 24, ROUNDS = 3 };
static cudaStream_t clock_new(void) {
    cudaStream_t stream;
    CHECK_CUDA(cudaStreamCreate(&stream));
    CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    return stream;
}
static double clock_read(cudaStream_t stream) { /* seconds a launch */
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t from, to;
    float ms = 0.0f;
    CHECK_CUDA(cudaEventCreate(&from));
    CHECK_CUDA(cudaEventCreate(&to));
    CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
    CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    CHECK_CUDA(cudaGraphLaunch(exec, stream));
    CHECK_CUDA(cudaEventRecord(from, stream));
    for (int i = 0; i < ROUNDS; i++) CHECK_CUDA(cudaGraphLaunch(exec, stream));
    CHECK_CUDA(cudaEventRecord(to, stream));
    CHECK_CUDA(cudaEventSynchronize(to));
    CHECK_CUDA(cudaEventElapsedTime(&ms, from, to));
    CHECK_CUDA(cudaGraphExecDestroy(exec));
    CHECK_CUDA(cudaGraphDestroy(graph));
    CHECK_CUDA(cudaStreamDestroy(stream));
    CHECK_CUDA(cudaEventDestroy(from));
    CHECK_CUDA(cudaEventDestroy(to));
    return (double)ms / (LAUNCHES * ROUNDS) * 1e-3;
}

static void say_speed(const char *name, shape s, int64_t n_row, double each) {
    const double flops = 2.0 * (double)n_row * s.n_in * (s.n_out * (s.pairs ? 2.0 : 1.0));
    printf("info  %-56s %8.2f us, %5.0f TFLOP/s\n", name, each * 1e6, flops / each * 1e-12);
}

/* What a step would see: launches in a graph, each with weights of its own until those fill 256 MB, so that none come
 * from L2. */
static void speed(const kernels *k, shape s, int32_t n_row) {
    char name[NAME];
    snprintf(name, sizeof name, "%s speed %s %d x %d -> %d%s", k->name, format_name[s.format], n_row, s.n_in, s.n_out,
             s.pairs ? " pairs" : "");
    if (!check_begin(name)) return;
    cu_job j = {.w = linear_of(s), .epilogue = s.pairs ? CU_SWIGLU : CU_ADD, .n_row = n_row};
    const int64_t bytes = cu_pack_bytes(&j.w), ld = (n_row + 3) / 4 * 4;
    const int32_t n_copy = (int32_t)(FILLED / bytes < LAUNCHES ? FILLED / bytes : LAUNCHES);
    const size_t out_bytes = (size_t)n_row * (size_t)CU_PAD(s.n_out) * sizeof(float);
    void *out = NULL;
    CHECK_CUDA(cudaMalloc(&out, out_bytes));
    CHECK_CUDA(cudaMemset(out, 0, out_bytes));
    const char *pack = filled();
    j.x8 = (cu_x8){(uint8_t *)filled(), CU_PAD(s.n_in), scales_new(j.w.n_seg * ld), ld};
    float *scale = scales_new(cu_scale_count(&j.w));
    j.w.scale = scale;
    if (s.pairs)
        j.h = out, j.ldh = CU_PAD(s.n_out);
    else
        j.y = out, j.ldy = s.n_out;
    cudaStream_t stream = clock_new();
    for (int i = 0; i < LAUNCHES; i++) {
        j.w.pack = pack + i % n_copy * bytes;
        CHECK_CUDA(k->run(stream, &j));
    }
    say_speed(name, s, n_row, clock_read(stream));
    CHECK_CUDA(cudaFree(scale));
    CHECK_CUDA(cudaFree(j.x8.scale));
    CHECK_CUDA(cudaFree(out));
}

/* Experts of a step of n_row rows, all alike in entries but for one. */
static void speed_grouped(const kernels *k, shape s, int32_t n_row) {
    enum { EXPERTS = 64, USED = 6, TILE = 128 };
    char name[NAME];
    snprintf(name, sizeof name, "%s speed grouped %s %d x %d -> %d%s", k->name, format_name[s.format], n_row, s.n_in,
             s.n_out, s.pairs ? " pairs" : "");
    if (!check_begin(name)) return;
    const int32_t n = n_row * USED;
    cu_linear one = linear_of(s), experts[EXPERTS];
    const int64_t bytes = cu_pack_bytes(&one), ld = (n + 3) / 4 * 4;
    float *scale = scales_new(cu_scale_count(&one));
    const char *pack = filled();
    for (int i = 0; i < EXPERTS; i++) {
        experts[i] = one;
        experts[i].scale = scale;
        experts[i].pack = pack + i % (FILLED / bytes) * bytes;
    }
    int32_t first[EXPERTS + 1], n_tile = 0;
    int32_t *lists = take((size_t)(4 * n + 4 * EXPERTS) * sizeof *lists), *tile_expert = lists + 2 * n;
    int32_t *tile_place = tile_expert + n + EXPERTS;
    for (int i = 0; i <= EXPERTS; i++) first[i] = (int32_t)((int64_t)n * i / EXPERTS);
    for (int32_t p = 0; p < n; p++) { /* place p: an entry of any row */
        const int32_t e = (int32_t)((int64_t)p * 5167 % n);
        lists[p] = e, lists[n + e] = p;
    }
    for (int32_t i = 0; i < EXPERTS; i++)
        for (int32_t p = first[i]; p < first[i + 1]; p += TILE) tile_expert[n_tile] = i, tile_place[n_tile++] = p;
    cu_routes r = {.n_expert = EXPERTS, .n_used = USED, .tile_rows = TILE};
    r.first = check_new(first, sizeof first);
    r.place_entry = check_new(lists, (size_t)n * sizeof *lists);
    r.entry_place = check_new(lists + n, (size_t)n * sizeof *lists);
    r.tile_expert = check_new(tile_expert, (size_t)n_tile * sizeof *lists);
    r.tile_place = check_new(tile_place, (size_t)n_tile * sizeof *lists);
    r.n_tile = check_new(&n_tile, sizeof n_tile);
    cu_linear *dexperts = check_new(experts, sizeof experts);
    cu_grouped_job j = {.shape = one,
                        .experts = dexperts,
                        .routes = &r,
                        .n_row = n_row,
                        .gather = s.pairs,
                        .epilogue = s.pairs ? CU_SWIGLU : CU_STORE};
    void *out = NULL, *room = NULL;
    CHECK_CUDA(cudaMalloc(&out, (size_t)n * (size_t)CU_PAD(s.n_out) * sizeof(float)));
    CHECK_CUDA(cudaMalloc(&room, (size_t)n * (size_t)CU_PAD(s.n_in)));
    j.x8 = (cu_x8){(uint8_t *)filled(), CU_PAD(s.n_in), scales_new(one.n_seg * ld), ld};
    j.x8_by_place = (cu_x8){.code = room, .ldx = CU_PAD(s.n_in)};
    if (s.pairs)
        j.h = out, j.ldh = CU_PAD(s.n_out);
    else
        j.y = out, j.ldy = s.n_out;
    cudaStream_t stream = clock_new();
    for (int i = 0; i < LAUNCHES; i++) CHECK_CUDA(k->grouped(stream, &j));
    say_speed(name, s, n, clock_read(stream));
    CHECK_CUDA(cudaFree(room));
    CHECK_CUDA(cudaFree(out));
    CHECK_CUDA(cudaFree(scale));
    CHECK_CUDA(cudaFree(j.x8.scale));
    check_free(dexperts);
    check_routes_free(&r);
    free(lists);
}

void check_a8(void) {
    /* Ugly ones, then those of 21b. */
    static const shape shapes[] = {{0, 80, 44, true},     {0, 64, 168, true},     {0, 200, 80, false},
                                   {0, 130, 17, false},   {0, 1024, 5640, false}, {0, 2560, 3584, false},
                                   {0, 2560, 1536, true}, {0, 12288, 2560, false}};
    static const shape grouped[] = {
        {0, 80, 44, true}, {0, 44, 80, false}, {0, 2560, 1536, true}, {0, 1536, 2560, false}};
    static const shape prefill[] = {{0, 2560, 3584, false}, {0, 2560, 2560, false}, {0, 2560, 3072, true},
                                    {0, 3072, 2560, false}, {0, 2560, 12288, true}, {0, 12288, 2560, false}};
    static const int32_t widths[] = {80, 128, 300, 1536, 2560, 3072};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++)
        for (int codes = CU_CODES_F8; codes <= CU_CODES_I8; codes++) {
            check_quant((cu_codes)codes, 1, widths[i]);
            check_quant((cu_codes)codes, 133, widths[i]);
            check_quant((cu_codes)codes, 261, widths[i]);
        }
    for (int f = CU_PLAIN_FORMATS; f < CU_FORMATS; f++) {
        shape s;
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
            s = shapes[i], s.format = (cu_format)f, check_plain(&large, s);
        for (size_t i = 0; i < sizeof grouped / sizeof *grouped; i++)
            s = grouped[i], s.format = (cu_format)f, check_grouped(&large, s, s.n_in < 100 ? 300 : 150);
        for (size_t i = 0; i < sizeof prefill / sizeof *prefill; i++)
            s = prefill[i], s.format = (cu_format)f, speed(&large, s, 8192);
        speed_grouped(&large, (shape){(cu_format)f, 2560, 1536, true}, 8192);
        speed_grouped(&large, (shape){(cu_format)f, 1536, 2560, false}, 8192);
    }
}
