/* cu_mid_run and cu_large_run, plain and grouped, and cu_broad_run: against scalar double where a test can afford it,
 * and bit for bit against the kernels for few rows everywhere. Weights are drawn as packed bytes, read back by the
 * layout's definition. */
#include "check.h"

enum { FEW = 8 }; /* rows of a piece for the kernels for few rows */

/* The kernels that are checked here. */
typedef struct kernels {
    const char *name;
    cudaError_t (*run)(cudaStream_t, const cu_job *);
    cudaError_t (*grouped)(cudaStream_t, const cu_grouped_job *);
    int32_t n_row[10];             /* of plain checks, ascending; 0: no more */
    int32_t tile_first, tile_last; /* rows of a grouped tile: twice the one before each */
} kernels;
static const kernels mid = {"mid", cu_mid_run, cu_mid_grouped, {9, 16, 17, 32, 33, 64, 65, 100, 200}, 16, 64};
static const kernels broad = {"broad", cu_broad_run, NULL, {9, 65, 100, 128, 200, 256, 257, 380}, 0, 0};
static const kernels large = {"large", cu_large_run, cu_large_grouped, {65, 100, 128, 200, 257, 380}, 128, 128};

static const char *const format_name[CU_PLAIN_FORMATS] = {"bf16", "int8", "int4", "fp8"};

typedef struct shape {
    int32_t n_in, n_out;
    bool pairs;
} shape;

/* ---- weights ----------------------------------------------------------------------------------------------------- */

typedef struct weights {
    cu_linear w; /* pointers of the device */
    unsigned char *pack;
    float *scale;
    int64_t pack_bytes, n_scale;
} weights;

/* Eight bytes of codes: bf16 of 2^-7 .. 2 either sign; any int8, any int4; any e4m3 but NaN. */
static uint64_t random_codes(cu_format f) {
    uint64_t r = check_random64();
    if (f == CU_BF16) return (r & 0x83ff83ff83ff83ffull) | 0x3c003c003c003c00ull;
    if (f == CU_F8)
        for (int i = 0; i < 64; i += 8)
            if ((r >> i & 0x7f) == 0x7f) r ^= 1ull << (i + 2);
    return r;
}

static weights weights_new(cu_format f, shape s) {
    weights o = {0};
    o.w.format = f;
    o.w.n_out = s.n_out, o.w.n_in = s.n_in;
    o.w.n_band = CU_BANDS(s.n_out) * (s.pairs ? 2 : 1);
    o.w.n_seg = CU_PAD(s.n_in) / CU_SEGMENT;
    o.w.pairs = s.pairs;
    o.pack_bytes = cu_pack_bytes(&o.w);
    o.n_scale = cu_scale_count(&o.w);
    o.pack = malloc((size_t)o.pack_bytes);
    o.scale = malloc((size_t)(o.n_scale + 1) * sizeof(float));
    if (!o.pack || !o.scale) abort();
    for (int64_t i = 0; i < o.pack_bytes; i += 8) {
        const uint64_t r = random_codes(f);
        memcpy(o.pack + i, &r, 8);
    }
    const float unit = f == CU_I8 ? 0x1p-7f : f == CU_I4 ? 0x1p-3f : 0x1p-7f;
    for (int64_t i = 0; i < o.n_scale; i++) o.scale[i] = unit * (1.0f + 0.5f * check_random());
    o.w.pack = check_new(o.pack, (size_t)o.pack_bytes);
    if (o.n_scale) o.w.scale = check_new(o.scale, (size_t)o.n_scale * sizeof(float));
    return o;
}

static void weights_free(weights *o) {
    union {
        const void *in;
        void *out;
    } pack = {o->w.pack}, scale = {o->w.scale};
    check_free(pack.out);
    if (o->n_scale) check_free(scale.out);
    free(o->pack);
    free(o->scale);
}

/* Weight of input i of output r (0..15) of a band, its scale in it: cu_kernels.h, word for word. */
static double weight_at(const weights *o, int32_t band, int32_t r, int32_t i) {
    static const int byte_of[4] = {0, 2, 1, 3}; /* where e0 e1 e2 e3 are in e0 e2 e1 e3 */
    const int k = i % 64, s = k / 16, c = k % 8 / 2, j = k % 16 / 8 * 2 + k % 2, g = r % 8, lane = 4 * g + c;
    const int e = j / 2 * 4 + r / 8 * 2 + j % 2;
    const unsigned char *group = o->pack + ((int64_t)band * o->w.n_seg * 2 + i / 64) * cu_group_bytes(o->w.format);
    cu_bf16 bits;
    switch (o->w.format) {
    case CU_BF16: memcpy(&bits, group + (s * 32 + lane) * 16 + e * 2, 2); return (double)ern_bf16_to_f32(bits);
    case CU_I4: {
        const int nibble = e % 2 * 4 + e / 2;
        const int q = group[lane * 16 + s * 4 + nibble / 2] >> (nibble % 2 * 4) & 15;
        return (double)(q - 8) * (double)o->scale[band * CU_BAND + r];
    }
    default: break;
    }
    const unsigned char code = group[s / 2 * 512 + lane * 16 + s % 2 * 8 + e / 4 * 4 + byte_of[e % 4]];
    if (o->w.format == CU_I8) return (double)(int8_t)code * (double)o->scale[band * CU_BAND + r];
    return (double)ern_e4m3_to_f32(code) * (double)o->scale[(int64_t)band * o->w.n_seg + i / CU_SEGMENT];
}

/* Sum over the inputs in double, and a bound of the error of the same in f32. Products of bf16 are exact. A product
 * m16n8k16 adds 16 of them and a sum, each cut at 2^-23 of the largest at worst: 17 * 2^-23 * S and one rounding more,
 * where S is the sum of what was added in absolute values; eight in a chain: 144. Then one addition a segment and the
 * factor: n_seg + 2. */
static double dot(const weights *o, const cu_bf16 *x, int32_t band, int32_t r, double *bound) {
    double sum = 0.0, all = 0.0;
    for (int32_t i = 0; i < o->w.n_in; i++) {
        const double p = weight_at(o, band, r, i) * (double)ern_bf16_to_f32(x[i]);
        sum += p;
        all += fabs(p);
    }
    *bound = (144.0 + o->w.n_seg + 2.0) * 0x1p-23 * all;
    return sum;
}

/* ---- plain ------------------------------------------------------------------------------------------------------- */

/* Rows of bf16 of 2^-7 .. 2, zeros from n on. */
static cu_bf16 *random_rows(int64_t n_row, int32_t n, int32_t ld) {
    cu_bf16 *x = calloc((size_t)(n_row * ld), sizeof *x);
    if (!x) abort();
    for (int64_t r = 0; r < n_row; r++)
        for (int32_t i = 0; i < n; i++) x[r * ld + i] = (cu_bf16)((check_random64() >> 32 & 0x83ffu) | 0x3c00u);
    return x;
}

/* One number of the result against double. before: what y held. */
static void compare_one(check_worst *to, const weights *o, const cu_bf16 *x, cu_epilogue ep, double got, double before,
                        int32_t row, int32_t out, int32_t n_row) {
    double e0, e1;
    const int32_t band = out / CU_BAND, r = out % CU_BAND;
    if (ep != CU_SWIGLU) {
        const double want = dot(o, x, band, r, &e0) + before;
        check_worst_add(to, fabs(got - want), e0 + 0x1p-23 * (fabs(want) + fabs(before)),
                        ep == CU_ADD ? "add" : "store", row, out, n_row);
        return;
    }
    const double gate = dot(o, x, band * 2, r, &e0), up = dot(o, x, band * 2 + 1, r, &e1);
    double bound;
    const double want = check_swiglu(gate, e0, up, e1, &bound);
    check_worst_add(to, fabs(got - want), bound, "swiglu", row, out, n_row);
}

static void run_few(const cu_job *all) {
    for (int32_t row = 0; row < all->n_row; row += FEW) {
        cu_job j = *all;
        j.n_row = all->n_row - row < FEW ? all->n_row - row : FEW;
        j.x += row * j.ldx;
        if (j.y) j.y += row * j.ldy;
        if (j.h) j.h += row * j.ldh;
        CHECK_CUDA(cu_skinny_run(NULL, &j));
    }
}

/* One format and shape at several numbers of rows, every epilogue: the kernel and the one for few rows. */
static void check_plain(const kernels *k, cu_format f, shape s) {
    enum { MAX = 380 };
    char name[2][80];
    for (int i = 0; i < 2; i++)
        snprintf(name[i], sizeof name[i], "%s %s%s %d -> %d%s", k->name, i ? "bits " : "", format_name[f], s.n_in,
                 s.n_out, s.pairs ? " pairs" : "");
    if (!check_begin(name[0]) && !check_begin(name[1])) return;

    weights o = weights_new(f, s);
    const int32_t ldx = CU_PAD(s.n_in), ld = s.pairs ? CU_PAD(s.n_out) : s.n_out + 3;
    const size_t size = s.pairs ? sizeof(cu_bf16) : sizeof(float), bytes = (size_t)MAX * (size_t)ld * size;
    cu_bf16 *x = random_rows(MAX, s.n_in, ldx);
    unsigned char *before = malloc(bytes), *got = malloc(bytes), *want = malloc(bytes);
    if (!before || !got || !want) abort();
    void *dx = check_new(x, (size_t)MAX * (size_t)ldx * sizeof *x), *dy = check_new(NULL, bytes);
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
            cu_job j = {.w = o.w, .epilogue = (cu_epilogue)ep, .x = dx, .ldx = ldx, .n_row = n_row};
            if (s.pairs)
                j.h = dy, j.ldh = ld;
            else
                j.y = dy, j.ldy = ld;
            for (int few = 0; few < 2; few++) {
                CHECK_CUDA(cudaMemcpy(dy, before, bytes, cudaMemcpyHostToDevice));
                if (few)
                    run_few(&j);
                else
                    CHECK_CUDA(k->run(NULL, &j));
                check_get(few ? want : got, dy, bytes);
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
                compare_one(&w, &o, x + (int64_t)r * ldx, (cu_epilogue)ep, (double)y, (double)b, r, out, n_row);
            }
        }
    check_end(name[0], w.share, w.what);
    check_that(name[1], same && kept, kept ? "differs from the kernel for few rows" : "wrote beside the outputs");
    check_free(dx);
    check_free(dy);
    weights_free(&o);
    free(x);
    free(before);
    free(got);
    free(want);
}

/* ---- grouped ----------------------------------------------------------------------------------------------------- */

enum { E = CHECK_EXPERTS, K = CHECK_USED };

static void check_grouped(const kernels *k, cu_format f, shape s, int32_t n_row) {
    const cu_epilogue ep = s.pairs ? CU_SWIGLU : CU_STORE;
    const int32_t n = n_row * K, ldx = CU_PAD(s.n_in), ld = s.pairs ? CU_PAD(s.n_out) : s.n_out;
    const size_t size = s.pairs ? sizeof(cu_bf16) : sizeof(float), bytes = (size_t)n * (size_t)ld * size;
    char name[80];
    snprintf(name, sizeof name, "%s grouped %s %d -> %d%s", k->name, format_name[f], s.n_in, s.n_out,
             s.pairs ? " pairs" : "");
    if (!check_begin(name)) return;

    weights o[E];
    cu_linear experts[E];
    for (int i = 0; i < E; i++) o[i] = weights_new(f, s), experts[i] = o[i].w;
    cu_linear *dexperts = check_new(experts, sizeof experts), described = experts[0];
    described.pack = NULL, described.scale = NULL;
    const int32_t n_x = s.pairs ? n_row : n; /* up gathers rows, down has one a place */
    cu_bf16 *x = random_rows(n_x, s.n_in, ldx), *by_place = malloc((size_t)n * (size_t)ldx * sizeof *x);
    int32_t first[E + 1], *place_entry = malloc((size_t)n * sizeof *place_entry);
    unsigned char *got = malloc(bytes), *want = malloc(bytes);
    if (!by_place || !place_entry || !got || !want) abort();
    void *dx = check_new(x, (size_t)n_x * (size_t)ldx * sizeof *x), *dy = check_new(NULL, bytes),
         *room = check_new(NULL, (size_t)n * (size_t)ldx * sizeof *x);
    bool same = true;
    for (int32_t rows = k->tile_first; rows <= k->tile_last; rows *= 2) {
        cu_routes r;
        check_routes_new(&r, n_row, rows, first, place_entry);
        cu_grouped_job j = {.shape = described, .experts = dexperts, .routes = &r, .n_row = n_row, .gather = s.pairs};
        j.epilogue = ep;
        j.x = dx, j.ldx = ldx;
        j.by_place = room;
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
        cu_bf16 *dplace = check_new(by_place, (size_t)n * (size_t)ldx * sizeof *x);
        CHECK_CUDA(cudaMemset(dy, 0xff, bytes));
        for (int i = 0; i < E; i++) {
            cu_job one = {.w = experts[i], .epilogue = ep, .x = dplace + (int64_t)first[i] * ldx, .ldx = ldx};
            one.n_row = first[i + 1] - first[i];
            if (s.pairs)
                one.h = (cu_bf16 *)dy + (int64_t)first[i] * ld, one.ldh = ld;
            else
                one.y = (float *)dy + (int64_t)first[i] * ld, one.ldy = ld;
            if (one.n_row) CHECK_CUDA(k->run(NULL, &one));
        }
        check_get(want, dy, bytes);
        same &= memcmp(got, want, bytes) == 0;
        check_free(dplace);
        check_routes_free(&r);
    }
    check_that(name, same, "differs from the plain kernel, expert by expert");
    check_free(dx);
    check_free(room);
    check_free(dy);
    check_free(dexperts);
    for (int i = 0; i < E; i++) weights_free(&o[i]);
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
static char *filled(cu_format f) {
    enum { PIECE = 4 << 20 };
    static uint64_t piece[PIECE / 8];
    static char *all[CU_PLAIN_FORMATS];
    if (all[f]) return all[f];
    CHECK_CUDA(cudaMalloc((void **)&all[f], FILLED));
    for (size_t i = 0; i < PIECE / 8; i++) piece[i] = random_codes(f);
    for (size_t at = 0; at < FILLED; at += PIECE)
        CHECK_CUDA(cudaMemcpy(all[f] + at, piece, PIECE, cudaMemcpyHostToDevice));
    return all[f];
}

/* What a step would see: launches in a graph, each with weights of its own until those fill 256 MB, so that none come
 * from L2. */
static void speed(const kernels *k, cu_format f, shape s, int32_t n_row) {
    enum { LAUNCHES = 24, ROUNDS = 3 };
    char name[80];
    snprintf(name, sizeof name, "%s speed %s %d x %d -> %d%s", k->name, format_name[f], n_row, s.n_in, s.n_out,
             s.pairs ? " pairs" : "");
    if (!check_begin(name)) return;
    cu_job j = {.epilogue = s.pairs ? CU_SWIGLU : CU_ADD, .n_row = n_row, .ldx = CU_PAD(s.n_in)};
    j.w = (cu_linear){.format = f, .n_out = s.n_out, .n_in = s.n_in, .pairs = s.pairs};
    j.w.n_band = CU_BANDS(s.n_out) * (s.pairs ? 2 : 1);
    j.w.n_seg = CU_PAD(s.n_in) / CU_SEGMENT;
    const int64_t n_scale = cu_scale_count(&j.w), bytes = cu_pack_bytes(&j.w);
    int64_t n_copy = FILLED / bytes;
    n_copy = n_copy > LAUNCHES ? LAUNCHES : n_copy;
    const char *pack = filled(f), *x = filled(CU_BF16);
    float *scale = malloc((size_t)(n_scale + 1) * sizeof *scale);
    void *dscale = NULL, *out = NULL;
    if (!scale) abort();
    for (int64_t i = 0; i < n_scale; i++) scale[i] = 0x1p-10f * (1.0f + 0.5f * check_random());
    CHECK_CUDA(cudaMalloc(&dscale, (size_t)(n_scale + 1) * sizeof *scale));
    CHECK_CUDA(cudaMemcpy(dscale, scale, (size_t)n_scale * sizeof *scale, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMalloc(&out, (size_t)n_row * (size_t)CU_PAD(s.n_out) * sizeof(float)));
    CHECK_CUDA(cudaMemset(out, 0, (size_t)n_row * (size_t)CU_PAD(s.n_out) * sizeof(float)));
    j.w.scale = dscale, j.x = (const cu_bf16 *)(const void *)x;
    if (s.pairs)
        j.h = out, j.ldh = CU_PAD(s.n_out);
    else
        j.y = out, j.ldy = s.n_out;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t from, to;
    float ms = 0.0f;
    CHECK_CUDA(cudaStreamCreate(&stream));
    CHECK_CUDA(cudaEventCreate(&from));
    CHECK_CUDA(cudaEventCreate(&to));
    CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < LAUNCHES; i++) {
        j.w.pack = pack + i % n_copy * bytes;
        CHECK_CUDA(k->run(stream, &j));
    }
    CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
    CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    CHECK_CUDA(cudaGraphLaunch(exec, stream));
    CHECK_CUDA(cudaEventRecord(from, stream));
    for (int i = 0; i < ROUNDS; i++) CHECK_CUDA(cudaGraphLaunch(exec, stream));
    CHECK_CUDA(cudaEventRecord(to, stream));
    CHECK_CUDA(cudaEventSynchronize(to));
    CHECK_CUDA(cudaEventElapsedTime(&ms, from, to));
    const double each = (double)ms / (LAUNCHES * ROUNDS) * 1e-3;
    const double flops = 2.0 * n_row * s.n_in * (s.n_out * (s.pairs ? 2.0 : 1.0));
    printf("info  %-56s %8.2f us, %5.0f TFLOP/s, %5.0f GB/s of weights\n", name, each * 1e6, flops / each * 1e-12,
           (double)bytes / each * 1e-9);
    CHECK_CUDA(cudaGraphExecDestroy(exec));
    CHECK_CUDA(cudaGraphDestroy(graph));
    CHECK_CUDA(cudaStreamDestroy(stream));
    CHECK_CUDA(cudaEventDestroy(from));
    CHECK_CUDA(cudaEventDestroy(to));
    CHECK_CUDA(cudaFree(dscale));
    CHECK_CUDA(cudaFree(out));
    free(scale);
}

void check_large(void) {
    /* Ugly ones; two with more tiles than the chip takes at once; those of the tiny models; then 0.3b and 21b. The last
     * is one of many segments: more than one pass. */
    static const shape shapes[] = {{80, 44, true},      {64, 168, true},     {200, 80, false},   {130, 17, false},
                                   {300, 8440, false},  {200, 4220, true},   {1024, 3072, true}, {1024, 5640, false},
                                   {3072, 1024, false}, {2560, 3584, false}, {2560, 1536, true}, {12288, 2560, false}};
    const int n_shape = sizeof shapes / sizeof *shapes;
    for (int f = 0; f < CU_PLAIN_FORMATS; f++) {
        for (int kind = 0; kind < 2; kind++) {
            const kernels *k = kind ? &large : &mid;
            for (int i = 0; i < n_shape - kind; i++) check_plain(k, (cu_format)f, shapes[i]);
            check_grouped(k, (cu_format)f, (shape){80, 44, true}, 300);
            check_grouped(k, (cu_format)f, (shape){44, 80, false}, 300);
            check_grouped(k, (cu_format)f, (shape){2560, 1536, true}, 150);
            check_grouped(k, (cu_format)f, (shape){1536, 2560, false}, 150);
        }
        if (!CU_PORTABLE) check_plain(&broad, (cu_format)f, (shape){100, 70, false}); /* one segment */
        for (int i = 0; i < n_shape; i++)
            if (!CU_PORTABLE && !shapes[i].pairs) check_plain(&broad, (cu_format)f, shapes[i]);
    }
    if (!CU_PORTABLE && check_begin("broad refuses pairs")) {
        cu_job j = {.w = {.pairs = true}, .n_row = 65};
        check_that("broad refuses pairs", cu_broad_run(NULL, &j) == cudaErrorInvalidValue, "it did not");
    }
    if (check_begin("large refuses a norm")) {
        cu_job j = {.x_f32 = (const float *)&check_seed, .n_row = 65};
        check_that("large refuses a norm", cu_large_run(NULL, &j) == cudaErrorInvalidValue, "it did not");
        check_that("mid refuses a norm", cu_mid_run(NULL, &j) == cudaErrorInvalidValue, "it did not");
    }
    static const shape decode[] = {{1024, 2560, false}, {2048, 1024, false}, {1024, 3072, true},  {3072, 1024, false},
                                   {2560, 3584, false}, {2560, 2560, false}, {2560, 12288, true}, {12288, 2560, false},
                                   {2560, 3072, true},  {3072, 2560, false}};
    for (int i = 0; i < 10; i++)
        for (int32_t n_row = 16; n_row <= 512; n_row *= 2) {
            for (int f = 0; f < CU_PLAIN_FORMATS; f++) speed(&mid, (cu_format)f, decode[i], n_row);
            if (!CU_PORTABLE && n_row >= 128 && !decode[i].pairs)
                for (int f = 0; f < CU_PLAIN_FORMATS; f++) speed(&broad, (cu_format)f, decode[i], n_row);
            if (n_row >= 128)
                for (int f = 0; f < CU_PLAIN_FORMATS; f++) speed(&large, (cu_format)f, decode[i], n_row);
        }
    static const shape prefill[] = {{1024, 2560, false}, {2048, 1024, false}, {1024, 3072, true},
                                    {3072, 1024, false}, {2560, 3584, false}, {2560, 2560, false},
                                    {2560, 12288, true}, {12288, 2560, false}};
    for (int i = 0; i < 8; i++)
        for (int f = 0; f < CU_PLAIN_FORMATS; f++) speed(&large, (cu_format)f, prefill[i], 8192);
    for (int f = 0; f < CU_PLAIN_FORMATS; f++) {
        speed(&mid, (cu_format)f, (shape){1024, 103424, false}, 256);
        speed(&large, (cu_format)f, (shape){1024, 103424, false}, 256);
    }
    speed(&large, CU_BF16, (shape){2560, 3584, false}, 1024);
}
