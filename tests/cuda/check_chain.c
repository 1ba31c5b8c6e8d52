/* All layers in one kernel against the same layers kernel by kernel: x and the cache bit for bit, step after step. */
#include "check.h"

enum { ROWS_MAX = 8, STEPS = 3, P = 16 };

typedef struct shape {
    const char *name;
    int32_t L, D, F, H, G;
} shape;

/* A model of random codes, and two caches that hold the same. */
typedef struct world {
    cu_chain c;
    cu_chain_layer *layer; /* [L] */
    void *owned[256];
    int32_t n_owned;
    cu_cache cache[2];
    size_t kv_bytes;
    float *x[2], *qkv, *inv_freq;
    cu_bf16 *att, *hid;
    check_decode step;
    void *scratch;
    int64_t scratch_bytes;
} world;

static void *must(size_t n) {
    void *p = malloc(n ? n : 1);
    if (!p) exit(2);
    return p;
}

static void *own(world *w, const void *host, size_t bytes) {
    if (w->n_owned == 256) exit(2);
    return w->owned[w->n_owned++] = check_new(host, bytes);
}

/* Sixteen at a draw; numbers are small and finite in every type. */
static cu_bf16 *random_bf16(size_t n, float size) {
    cu_bf16 *h = must(n * sizeof *h);
    for (size_t i = 0; i < n; i++) {
        const uint64_t bits = i % 4 ? (uint64_t)h[i - 1] * 0x9e3779b97f4a7c15u + i : check_random64();
        h[i] = ern_bf16_from_f32((float)((int32_t)(bits >> 24 & 0xffff) - 0x8000) * 0x1p-15f * size);
    }
    return h;
}

static cu_linear random_linear(world *w, int32_t n_out, int32_t n_in, bool pairs) {
    cu_linear d = {.format = w->c.format,
                   .n_out = n_out,
                   .n_in = n_in,
                   .n_band = CU_BANDS(n_out) * (pairs ? 2 : 1),
                   .n_seg = CU_PAD(n_in) / CU_SEGMENT,
                   .pairs = pairs};
    const size_t bytes = (size_t)cu_pack_bytes(&d), n_scale = (size_t)cu_scale_count(&d);
    const float size = 1.7f / sqrtf((float)n_in);
    unsigned char *pack = must(bytes);
    if (d.format == CU_BF16) {
        free(pack);
        pack = (unsigned char *)random_bf16(bytes / 2, size);
    } else {
        for (size_t i = 0; i < bytes; i += 8) {
            uint64_t bits = check_random64();
            if (d.format == CU_F8) bits &= 0xbfbfbfbfbfbfbfbfu; /* below 2, so no NaN */
            memcpy(pack + i, &bits, 8);
        }
    }
    float *scale = must(n_scale * sizeof *scale);
    for (size_t i = 0; i < n_scale; i++)
        scale[i] = size * (1.5f + check_random()) / (d.format == CU_I8 ? 100.0f : d.format == CU_I4 ? 6.0f : 1.0f);
    d.pack = own(w, pack, bytes);
    if (n_scale > 0) d.scale = own(w, scale, n_scale * sizeof *scale);
    free(pack), free(scale);
    return d;
}

static const cu_bf16 *random_norm(world *w) {
    cu_bf16 *h = random_bf16((size_t)w->c.n_hidden, 1.5f);
    const cu_bf16 *d = own(w, h, (size_t)w->c.n_hidden * 2);
    free(h);
    return d;
}

static void random_cache(world *w, int32_t n_page) {
    const bool i8 = w->c.kv_dtype == ERN_KV_I8;
    const int64_t plane = P * 128 * (i8 ? 1 : 2) + (i8 ? P * 4 : 0),
                  n_plane = (int64_t)w->c.n_layer * 2 * w->c.n_kv_head;
    w->kv_bytes = (size_t)(plane * n_plane * n_page);
    unsigned char *kv = (unsigned char *)random_bf16((w->kv_bytes + 1) / 2, 2.0f);
    for (int64_t p = 0; i8 && p < n_plane * n_page; p++) {
        float *scale = (float *)(void *)(kv + p * plane + P * 128);
        for (int i = 0; i < P; i++) scale[i] = (1.5f + check_random()) / 127.0f;
    }
    for (int i = 0; i < 2; i++)
        w->cache[i] = (cu_cache){.kv = own(w, kv, w->kv_bytes),
                                 .page_bytes = plane * n_plane,
                                 .plane_bytes = plane,
                                 .n_page_cell = P,
                                 .n_kv_head = w->c.n_kv_head,
                                 .n_head = w->c.n_head,
                                 .n_head_dim = 128,
                                 .dtype = w->c.kv_dtype};
    free(kv);
}

static world *world_new(const shape *s, cu_format f, ern_kv_dtype kv, int32_t row_max, int32_t len_max,
                        int32_t n_page) {
    world *w = must(sizeof *w);
    *w = (world){.c = {.n_layer = s->L,
                       .n_hidden = s->D,
                       .n_ffn = s->F,
                       .n_head = s->H,
                       .n_kv_head = s->G,
                       .n_head_dim = 128,
                       .format = f,
                       .kv_dtype = kv,
                       .eps = 1e-5f,
                       .n_row_max = row_max,
                       .n_len_max = len_max}};
    w->layer = must((size_t)s->L * sizeof *w->layer);
    for (int32_t i = 0; i < s->L; i++)
        w->layer[i] = (cu_chain_layer){.qkv = random_linear(w, (s->H + 2 * s->G) * 128, s->D, false),
                                       .o = random_linear(w, s->D, s->H * 128, false),
                                       .up = random_linear(w, s->F, s->D, true),
                                       .down = random_linear(w, s->D, s->F, false),
                                       .attn_norm = random_norm(w),
                                       .ffn_norm = random_norm(w)};
    random_cache(w, n_page);
    const size_t R = ROWS_MAX, D = (size_t)s->D;
    w->x[0] = own(w, NULL, R * D * 4), w->x[1] = own(w, NULL, R * D * 4);
    w->qkv = own(w, NULL, R * (size_t)(s->H + 2 * s->G) * 128 * 4);
    w->att = own(w, NULL, R * (size_t)s->H * 128 * 2);
    w->hid = own(w, NULL, R * (size_t)s->F * 2);
    w->step = check_decode_new(&w->cache[0], ROWS_MAX, n_page, len_max);
    w->scratch_bytes = cu_attn_scratch_bytes(&w->cache[0], ROWS_MAX, ROWS_MAX, len_max, 64 << 20);
    w->scratch = own(w, NULL, (size_t)w->scratch_bytes);
    CHECK_CUDA(cudaMemset(w->scratch, 0, (size_t)w->scratch_bytes)); /* as cu_attend wants it before its first step */
    float inv[64];
    for (int32_t j = 0; j < 64; j++) inv[j] = 1.0f / (float)pow(500000.0, (double)((float)(2 * j) / 128.0f));
    w->inv_freq = own(w, inv, sizeof inv);
    w->c.memory = own(w, NULL, (size_t)cu_chain_bytes(&w->c));
    if (cu_chain_fits(&w->c)) CHECK_CUDA(cu_chain_open(0, &w->c, w->layer));
    return w;
}

static void world_free(world *w) {
    for (int32_t i = 0; i < w->n_owned; i++) check_free(w->owned[i]);
    check_decode_free(&w->step);
    free(w->layer);
    free(w);
}

static void linear(const world *w, const cu_linear *l, cu_epilogue e, int32_t n, void *y, const cu_bf16 *x,
                   const float *x_f32, const cu_bf16 *norm) {
    const cu_job j = {.w = *l,
                      .epilogue = e,
                      .x = x,
                      .ldx = CU_PAD(l->n_in),
                      .n_row = n,
                      .y = y,
                      .ldy = l->n_out,
                      .h = y,
                      .ldh = CU_PAD(l->n_out),
                      .x_f32 = x_f32,
                      .norm_w = norm,
                      .eps = w->c.eps};
    CHECK_CUDA(cu_linear_run(0, &j));
}

static void run_old(const world *w, const cu_seqs *q) {
    float *x = w->x[0];
    for (int32_t i = 0; i < w->c.n_layer; i++) {
        const cu_chain_layer *l = &w->layer[i];
        linear(w, &l->qkv, CU_STORE, q->n_row, w->qkv, NULL, x, l->attn_norm);
        CHECK_CUDA(cu_attend(0, w->att, NULL, w->qkv, &w->cache[0], i, q, w->scratch, w->scratch_bytes, true));
        linear(w, &l->o, CU_ADD, q->n_row, x, w->att, NULL, NULL);
        linear(w, &l->up, CU_SWIGLU, q->n_row, w->hid, NULL, x, l->ffn_norm);
        linear(w, &l->down, CU_ADD, q->n_row, x, w->hid, NULL, NULL);
    }
}

/* Rows of length 1 are all the same: they write to one cell. */
static void put_x(const world *w, int32_t n, const int32_t *len) {
    const size_t D = (size_t)w->c.n_hidden, count = (size_t)n * D;
    float *x = must(count * 4);
    for (size_t i = 0; i < count; i++) x[i] = check_random();
    for (size_t r = 0, one = 0; r < (size_t)n; r++) {
        if (len[r] != 1) continue;
        if (one > 0) memcpy(x + r * D, x + (one - 1) * D, D * 4);
        one = r + 1;
    }
    for (int i = 0; i < 2; i++) CHECK_CUDA(cudaMemcpy(w->x[i], x, count * 4, cudaMemcpyHostToDevice));
    free(x);
}

/* Where the first of n bytes differs, or -1. */
static int64_t differ(const void *a, const void *b, size_t n) {
    unsigned char *x = must(n), *y = must(n);
    check_get(x, a, n), check_get(y, b, n);
    int64_t at = -1;
    for (size_t i = 0; i < n && at < 0; i++)
        if (x[i] != y[i]) at = (int64_t)i;
    free(x), free(y);
    return at;
}

/* STEPS steps of rows whose lengths grow; the number of rows changes between them. */
static void steps(const char *name, const world *w, int32_t n_row, const int32_t *first) {
    char text[200] = "";
    for (int32_t s = 0; s < STEPS && !*text; s++) {
        int32_t len[ROWS_MAX];
        const int32_t n = s == 1 ? 1 : n_row;
        for (int32_t r = 0; r < n; r++) len[r] = first[r] == 1 ? 1 : first[r] + s;
        const cu_seqs q = check_decode_plan(&w->step, &w->cache[0], w->inv_freq, n, len, NULL);
        put_x(w, n, len);
        run_old(w, &q);
        CHECK_CUDA(cu_chain_run(0, &w->c, w->x[1], &w->cache[1], &q));
        const int64_t x = differ(w->x[0], w->x[1], (size_t)n * (size_t)w->c.n_hidden * 4);
        const int64_t kv = differ(w->cache[0].kv, w->cache[1].kv, w->kv_bytes);
        if (x >= 0 || kv >= 0)
            (void)snprintf(text, sizeof text, "step %d: x differs at row %d number %d, the cache at byte %lld", s,
                           x < 0 ? -1 : (int32_t)(x / 4 / w->c.n_hidden), x < 0 ? -1 : (int32_t)(x / 4 % w->c.n_hidden),
                           (long long)kv);
    }
    check_that(name, !*text, text);
}

static const char *const format_name[CU_PLAIN_FORMATS] = {"bf16", "int8", "int4", "fp8"};

static void check_shape(const shape *s, cu_format f, ern_kv_dtype kv, int32_t row_max, bool all) {
    static const int32_t lens[][ROWS_MAX] = {
        {1}, {127}, {128}, {129}, {1022}, {9000}, {300, 1}, {1024, 129, 2}, {70, 1, 1, 700}, {126, 127, 128, 129},
    };
    static const int32_t n_row[] = {1, 1, 1, 1, 1, 1, 2, 3, 4, 4};
    char name[120];
    (void)snprintf(name, sizeof name, "chain %s %s kv %s", s->name, format_name[f], kv == ERN_KV_I8 ? "int8" : "bf16");
    if (!check_begin(name)) return;
    world *w = world_new(s, f, kv, row_max, 9216, 600);
    if (!cu_chain_fits(&w->c)) {
        check_that(name, false, "does not fit");
    } else {
        for (size_t i = 0; i < sizeof n_row / sizeof *n_row; i++) {
            if (n_row[i] > row_max || (!all && i % 3)) continue;
            (void)snprintf(name, sizeof name, "chain %s %s kv %s rows %d length %d", s->name, format_name[f],
                           kv == ERN_KV_I8 ? "int8" : "bf16", n_row[i], lens[i][0]);
            steps(name, w, n_row[i], lens[i]);
        }
    }
    world_free(w);
}

/* More layers: what goes wrong between stages shows after many. */
static void check_deep(const shape *s, cu_format f) {
    static const int32_t lens[][ROWS_MAX] = {{1023}, {1000, 700}, {1020, 1021, 1022, 1023}};
    static const int32_t n_row[] = {1, 2, 4};
    char name[120];
    (void)snprintf(name, sizeof name, "chain %s %s", s->name, format_name[f]);
    if (!check_begin(name)) return;
    world *w = world_new(s, f, ERN_KV_BF16, 4, 1088, 280);
    for (size_t i = 0; i < sizeof n_row / sizeof *n_row; i++) {
        (void)snprintf(name, sizeof name, "chain %s %s rows %d length %d", s->name, format_name[f], n_row[i],
                       lens[i][0]);
        steps(name, w, n_row[i], lens[i]);
    }
    world_free(w);
}

/* Microseconds of a step, the old way and this. */
static void speed(const shape *s, cu_format f, int32_t n, int32_t length) {
    enum { TIMES = 20 };
    char name[120];
    (void)snprintf(name, sizeof name, "chain speed %s %s rows %d length %d", s->name, format_name[f], n, length);
    if (!check_begin(name)) return;
    world *w = world_new(s, f, ERN_KV_BF16, 4, length, n * (length / P + 1) + 2);
    const int32_t len[ROWS_MAX] = {length, length, length, length};
    const cu_seqs q = check_decode_plan(&w->step, &w->cache[0], w->inv_freq, n, len, NULL);
    cudaEvent_t event[2];
    float us[2];
    for (int i = 0; i < 2; i++) CHECK_CUDA(cudaEventCreate(&event[i]));
    for (int way = 0; way < 2; way++) {
        put_x(w, n, len);
        for (int turn = 0; turn < 2; turn++) {
            CHECK_CUDA(cudaEventRecord(event[0], 0));
            for (int i = 0; i < (turn ? TIMES : 2); i++) {
                if (way == 0)
                    run_old(w, &q);
                else
                    CHECK_CUDA(cu_chain_run(0, &w->c, w->x[1], &w->cache[1], &q));
            }
            CHECK_CUDA(cudaEventRecord(event[1], 0));
            CHECK_CUDA(cudaEventSynchronize(event[1]));
        }
        CHECK_CUDA(cudaEventElapsedTime(&us[way], event[0], event[1]));
        us[way] *= 1000.0f / TIMES;
    }
    printf("%s: %.1f us kernel by kernel, %.1f us in one; a layer %.2f us\n", name, (double)us[0], (double)us[1],
           (double)us[1] / s->L);
    for (int i = 0; i < 2; i++) CHECK_CUDA(cudaEventDestroy(event[i]));
    world_free(w);
}

void check_layers(void) {
    static const shape small = {"small", 3, 1024, 1024, 8, 1}, real = {"0.3b", 2, 1024, 3072, 16, 2},
                       odd = {"odd", 2, 1024, 2048, 16, 4}, deep = {"deep", 8, 1024, 3072, 16, 2},
                       whole = {"0.3b", 18, 1024, 3072, 16, 2};
    for (int f = 0; f < CU_PLAIN_FORMATS; f++) {
        check_shape(&real, (cu_format)f, ERN_KV_BF16, 4, true);
        check_shape(&real, (cu_format)f, ERN_KV_I8, 4, f == CU_BF16);
        check_shape(&small, (cu_format)f, ERN_KV_BF16, 4, false);
        check_shape(&odd, (cu_format)f, ERN_KV_I8, 3, false);
        if (f == CU_BF16 || f == CU_I8) check_deep(&deep, (cu_format)f);
    }
    for (int f = 0; f < CU_PLAIN_FORMATS; f++) {
        speed(&whole, (cu_format)f, 1, 1024);
        speed(&whole, (cu_format)f, 4, 1024);
    }
    speed(&real, CU_I8, 1, 16384);
}
