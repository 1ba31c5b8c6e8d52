/* The attention half of a layer in one kernel against the same kernel by kernel: x and the cache bit for bit, launch
 * after launch. */
#include "check.h"

enum { ROWS_MAX = 4, D = 2560, C = 128, H = 20, LAYERS = 5 };

typedef struct layer {
    check_weights qkv, o;
    cu_bf16 *norm;
} layer;

/* Layers of random codes, two caches that hold the same, and the arrays of a step. */
typedef struct world {
    cu_attn_one c;
    layer layer[LAYERS];
    int32_t n_layer, G, P;
    cu_cache cache[2];
    size_t kv_bytes;
    float *x[2], *qkv, *inv_freq;
    cu_bf16 *xn, *att;
    check_decode step;
    void *scratch;
    int64_t scratch_bytes;
} world;

static void *must(size_t n) {
    void *p = malloc(n ? n : 1);
    if (!p) exit(2);
    return p;
}

static check_weights random_linear(cu_format f, int32_t n_out, int32_t n_in) {
    return check_weights_new((cu_linear){
        .format = f, .n_out = n_out, .n_in = n_in, .n_band = CU_BANDS(n_out), .n_seg = CU_PAD(n_in) / CU_SEGMENT});
}

static void *random_bf16(size_t n, float size) {
    cu_bf16 *h = must(n * sizeof *h);
    for (size_t i = 0; i < n; i++) {
        const uint64_t bits = i % 4 ? (uint64_t)h[i - 1] * 0x9e3779b97f4a7c15u + i : check_random64();
        h[i] = ern_bf16_from_f32((float)((int32_t)(bits >> 24 & 0xffff) - 0x8000) * 0x1p-15f * size);
    }
    void *d = check_new(h, n * sizeof *h);
    free(h);
    return d;
}

static world *world_new(cu_format f, int32_t n_layer, int32_t G, int32_t P, int32_t n_row_max, int32_t len_max,
                        int32_t n_page) {
    world *w = must(sizeof *w);
    *w = (world){.n_layer = n_layer, .G = G, .P = P};
    w->c = (cu_attn_one){.n_hidden = D,
                         .n_head = H,
                         .n_kv_head = G,
                         .n_head_dim = C,
                         .kv_dtype = ERN_KV_BF16,
                         .n_row_max = n_row_max,
                         .n_len_max = len_max};
    for (int32_t i = 0; i < n_layer; i++) {
        w->layer[i].qkv = random_linear(f, (H + 2 * G) * C, D);
        w->layer[i].o = random_linear(f, D, H * C);
        w->layer[i].norm = random_bf16(D, 1.5f);
    }
    const int64_t plane = (P + 15) / 16 * 16 * C * 2;
    w->kv_bytes = (size_t)(plane * n_layer * 2 * G * n_page);
    for (int i = 0; i < 2; i++)
        w->cache[i] = (cu_cache){.kv = i ? check_new(NULL, w->kv_bytes) : random_bf16(w->kv_bytes / 2, 2.0f),
                                 .page_bytes = plane * n_layer * 2 * G,
                                 .plane_bytes = plane,
                                 .n_page_cell = P,
                                 .n_kv_head = G,
                                 .n_head = H,
                                 .n_head_dim = C,
                                 .dtype = ERN_KV_BF16};
    CHECK_CUDA(cudaMemcpy(w->cache[1].kv, w->cache[0].kv, w->kv_bytes, cudaMemcpyDeviceToDevice));
    const size_t R = ROWS_MAX;
    for (int i = 0; i < 2; i++) w->x[i] = check_new(NULL, R * D * 4);
    w->qkv = check_new(NULL, R * (size_t)(H + 2 * G) * C * 4);
    w->xn = check_new(NULL, R * D * 2);
    w->att = check_new(NULL, R * H * C * 2);
    w->step = check_decode_new(&w->cache[0], ROWS_MAX, n_page, len_max);
    w->scratch_bytes = cu_attn_scratch_bytes(&w->cache[0], ROWS_MAX, ROWS_MAX, len_max, 64 << 20);
    w->scratch = check_new(NULL, (size_t)w->scratch_bytes);
    CHECK_CUDA(cudaMemset(w->scratch, 0, (size_t)w->scratch_bytes));
    float inv[C / 2];
    for (int32_t j = 0; j < C / 2; j++) inv[j] = 1.0f / (float)pow(500000.0, (double)((float)(2 * j) / (float)C));
    w->inv_freq = check_new(inv, sizeof inv);
    if (cu_attn_one_fits(&w->c)) {
        w->c.memory = check_new(NULL, (size_t)cu_attn_one_bytes(&w->c));
        CHECK_CUDA(cu_attn_one_open(0, &w->c));
    }
    return w;
}

static void world_free(world *w) {
    void *const all[] = {w->cache[0].kv, w->cache[1].kv, w->x[0],    w->x[1],     w->qkv,
                         w->xn,          w->att,         w->scratch, w->inv_freq, w->c.memory};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) check_free(all[i]);
    check_decode_free(&w->step);
    for (int32_t i = 0; i < w->n_layer; i++) {
        check_weights_free(&w->layer[i].qkv);
        check_weights_free(&w->layer[i].o);
        check_free(w->layer[i].norm);
    }
    free(w);
}

static void linear(const cu_linear *l, cu_epilogue e, int32_t n, float *y, const cu_bf16 *x) {
    const cu_job j = {
        .w = *l, .epilogue = e, .x = x, .ldx = CU_PAD(l->n_in), .n_row = n, .y = y, .ldy = l->n_out, .eps = 1e-5f};
    CHECK_CUDA(cu_linear_run(0, &j));
}

static void run_old(const world *w, int32_t i, const cu_seqs *q) {
    const layer *l = &w->layer[i];
    CHECK_CUDA(cu_norm(0, w->xn, w->x[0], NULL, l->norm, q->n_row, D, 1e-5f));
    linear(&l->qkv.w, CU_STORE, q->n_row, w->qkv, w->xn);
    CHECK_CUDA(cu_attend(0, w->att, NULL, w->qkv, &w->cache[0], i, q, w->scratch, w->scratch_bytes, true));
    linear(&l->o.w, CU_ADD, q->n_row, w->x[0], w->att);
}
static void run_one(const world *w, int32_t i, const cu_seqs *q) {
    const layer *l = &w->layer[i];
    const cu_attn_one_layer one = {.qkv = l->qkv.w, .o = l->o.w, .norm = l->norm, .eps = 1e-5f};
    CHECK_CUDA(cu_attn_one_run(0, &w->c, &one, w->x[1], &w->cache[1], i, q));
}

/* A step of n rows at these lengths, whose pages lie in any order. */
static cu_seqs plan(const world *w, int32_t n, const int32_t *len) {
    int32_t *order = must((size_t)w->step.n_page * 4);
    for (int32_t i = 0; i < w->step.n_page; i++) order[i] = i;
    for (int32_t i = w->step.n_page - 1; i > 1; i--) {
        const int32_t k = 1 + (int32_t)(check_random64() % (uint64_t)i), held = order[i];
        order[i] = order[k], order[k] = held;
    }
    const cu_seqs q = check_decode_plan(&w->step, &w->cache[0], w->inv_freq, n, len, order);
    free(order);
    return q;
}

/* Rows of length 1 are all the same: they write to one cell. */
static void put_x(const world *w, int32_t n, const int32_t *len) {
    float *x = must((size_t)n * D * 4);
    for (int32_t i = 0; i < n * D; i++) x[i] = check_random() * (float)(1 << i / CU_SEGMENT % 5);
    for (int32_t r = 0, one = -1; r < n; r++) {
        if (len[r] != 1) continue;
        if (one >= 0) memcpy(x + r * D, x + one * D, D * 4);
        one = r;
    }
    for (int i = 0; i < 2; i++) CHECK_CUDA(cudaMemcpy(w->x[i], x, (size_t)n * D * 4, cudaMemcpyHostToDevice));
    free(x);
}

/* Where the first of n bytes differs, or -1. */
static int64_t differ(const void *a, const void *b, size_t n) {
    unsigned char *x = must(n), *y = must(n);
    check_get(x, a, n), check_get(y, b, n);
    int64_t at = -1;
    const bool same = memcmp(x, y, n) == 0;
    for (size_t i = 0; !same && at < 0; i++)
        if (x[i] != y[i]) at = (int64_t)i;
    free(x), free(y);
    return at;
}

/* Launches of all layers, `times` over, each on the x of the one before. */
static void same(const char *name, const world *w, int32_t n, const int32_t *len, int32_t times) {
    char text[200] = "";
    const cu_seqs q = plan(w, n, len);
    put_x(w, n, len);
    for (int32_t i = 0; i < times * w->n_layer; i++) run_old(w, i % w->n_layer, &q);
    CHECK_CUDA(cudaDeviceSynchronize());
    for (int32_t i = 0; i < times * w->n_layer; i++) run_one(w, i % w->n_layer, &q);
    const int64_t x = differ(w->x[0], w->x[1], (size_t)n * D * 4);
    const int64_t kv = differ(w->cache[0].kv, w->cache[1].kv, w->kv_bytes);
    if (x >= 0 || kv >= 0)
        (void)snprintf(text, sizeof text, "x differs at row %d number %d, the cache at byte %lld",
                       x < 0 ? -1 : (int32_t)(x / 4 / D), x < 0 ? -1 : (int32_t)(x / 4 % D), (long long)kv);
    check_that(name, !*text, text);
}

static const char *format_name(cu_format f) { return f == CU_F8A8 ? "fp8" : "int8"; }

static void check_format(cu_format f, int32_t G, int32_t P) {
    static const int32_t lens[][ROWS_MAX] = {
        {1},      {127},       {128},          {129},           {1022},
        {4097},   {4225},      {5120},         {5121},          {9000},
        {300, 1}, {4096, 129}, {1024, 129, 2}, {70, 1, 1, 700}, {126, 4500, 128, 129},
    };
    static const int32_t n_row[] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4, 4};
    char name[120];
    (void)snprintf(name, sizeof name, "attention half %s %d kv heads", format_name(f), G);
    if (!check_begin(name)) return;
    world *w = world_new(f, 2, G, P, ROWS_MAX, 9216, 16384 / P);
    if (!cu_attn_one_fits(&w->c)) {
        check_that(name, false, "does not fit");
    } else {
        for (size_t i = 0; i < sizeof n_row / sizeof *n_row; i++) {
            (void)snprintf(name, sizeof name, "attention half %s %d kv heads, pages of %d, rows %d length %d",
                           format_name(f), G, P, n_row[i], lens[i][0]);
            same(name, w, n_row[i], lens[i], i % 3 ? 1 : check_briefly ? 3 : 40);
        }
        for (int i = 0; i < (check_briefly ? 2 : 12); i++) {
            int32_t len[ROWS_MAX];
            const int32_t n = 1 + (int32_t)(check_random64() % ROWS_MAX);
            for (int32_t r = 0; r < n; r++) len[r] = 2 + (int32_t)(check_random64() % (r ? 1500 : 9000));
            (void)snprintf(name, sizeof name, "attention half %s %d kv heads, pages of %d, drawn: rows %d length %d",
                           format_name(f), G, P, n, len[0]);
            same(name, w, n, len, 1 + i % 3);
        }
    }
    world_free(w);
}

/* Microseconds of a layer, the old way and this. */
static void speed(cu_format f, int32_t n, int32_t length) {
    enum { TIMES = 20 };
    char name[120];
    (void)snprintf(name, sizeof name, "attention half speed %s rows %d length %d", format_name(f), n, length);
    if (!check_begin(name)) return;
    world *w = world_new(f, LAYERS, 4, 64, ROWS_MAX, length, n * (length / 64 + 1) + 2);
    const int32_t len[ROWS_MAX] = {length, length, length, length};
    const cu_seqs q = plan(w, n, len);
    cudaEvent_t event[2];
    float us[2];
    for (int i = 0; i < 2; i++) CHECK_CUDA(cudaEventCreate(&event[i]));
    for (int way = 0; way < 2; way++) {
        put_x(w, n, len);
        for (int turn = 0; turn < 2; turn++) {
            CHECK_CUDA(cudaEventRecord(event[0], 0));
            for (int i = 0; i < TIMES * LAYERS; i++) {
                if (way == 0)
                    run_old(w, i % LAYERS, &q);
                else
                    run_one(w, i % LAYERS, &q);
            }
            CHECK_CUDA(cudaEventRecord(event[1], 0));
            CHECK_CUDA(cudaEventSynchronize(event[1]));
        }
        CHECK_CUDA(cudaEventElapsedTime(&us[way], event[0], event[1]));
        us[way] *= 1000.0f / (TIMES * LAYERS);
    }
    printf("%s: a layer %.2f us kernel by kernel, %.2f us in one\n", name, (double)us[0], (double)us[1]);
    for (int i = 0; i < 2; i++) CHECK_CUDA(cudaEventDestroy(event[i]));
    world_free(w);
}

void check_attn_one(void) {
    check_format(CU_I8A8, 4, 64);
    check_format(CU_F8A8, 4, 64);
    check_format(CU_I8A8, 2, 16);
    check_format(CU_F8A8, 2, 48);
    speed(CU_I8A8, 1, 4097);
    speed(CU_F8A8, 1, 4097);
    speed(CU_I8A8, 2, 4096);
    speed(CU_I8A8, 4, 4096);
    speed(CU_I8A8, 1, 512);
    speed(CU_I8A8, 1, 16384);
}
