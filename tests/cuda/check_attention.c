/* Rotation and store of keys and values, and attention, against scalar double; and that a row's bits are the same alone
 * and in a crowd, by either kernel, in any chunks, with scratch and without.
 *
 * Contents are pure functions of (sequence's content id, position, head, dimension), so that one sequence can be built
 * again in another batch with other pages. Everything that is not a cell of a sequence is 0xff: NaN in every type. */
#include "check.h"

#include <float.h>

enum { LAYERS = 2, LAYER = 1, SEQS_MAX = 140 };

typedef struct shape {
    int32_t C, H, G, P;
    ern_kv_dtype dtype;
} shape;

/* One step: its sequences, and the host's copies. */
typedef struct step {
    shape s;
    int32_t n_seq, n_row, n_page_max, n_page;
    int32_t content[SEQS_MAX], len[SEQS_MAX], rows[SEQS_MAX], row0[SEQS_MAX + 1];
    int32_t *pos, *cell, *page;
    int64_t plane_bytes, page_bytes;
    unsigned char *kv;
    cu_bf16 *q;
} step;

static void *must(size_t n) {
    void *p = malloc(n ? n : 1);
    if (!p) exit(2);
    return p;
}

static uint64_t hash(int32_t content, int32_t pos, int32_t what, int32_t i) {
    return ern_counter64(check_seed ^ ((uint64_t)(uint32_t)content << 32 | (uint32_t)what),
                         (uint64_t)pos * 256 + (uint64_t)i);
}
static float unit(uint64_t h) { return (float)((int32_t)(h >> 40) - (1 << 23)) * 0x1p-23f; }

/* Where a cell's numbers lie in the cache. */
static unsigned char *plane_of(const step *w, int32_t page, int32_t which, int32_t head) {
    return w->kv + page * w->page_bytes + ((LAYER * 2 + which) * w->s.G + head) * w->plane_bytes;
}
static int32_t plane_cells(const shape *s) { return (s->P + 15) / 16 * 16; }

/* Scores of deviation about 2 in base e, with a few keys that stand out. */
static void fill_cell(const step *w, int32_t seq, int32_t pos) {
    const shape *s = &w->s;
    const int32_t page = w->page[seq * w->n_page_max + pos / s->P], cell = pos % s->P;
    for (int32_t which = 0; which < 2; which++) {
        for (int32_t g = 0; g < s->G; g++) {
            unsigned char *plane = plane_of(w, page, which, g);
            const int32_t what = 1 + which * 64 + g;
            const float stand = hash(w->content[seq], pos, what, 255) % 61 ? 1.0f : 3.0f,
                        size = which ? 1.0f : 6.0f * stand;
            for (int32_t i = 0; i < s->C; i++) {
                const float x = unit(hash(w->content[seq], pos, what, i));
                const int64_t at = (int64_t)cell * s->C + i;
                if (s->dtype == ERN_KV_I8) {
                    plane[at] = (unsigned char)(signed char)nearbyintf(x * 127.0f);
                } else if (s->dtype == ERN_KV_F8) {
                    plane[at] = ern_e4m3_from_f32(x * 448.0f);
                } else {
                    const cu_bf16 h = ern_bf16_from_f32(x * size);
                    memcpy(plane + at * 2, &h, 2);
                }
            }
            if (ern_kv_has_codes(s->dtype)) {
                const float scale = size / (s->dtype == ERN_KV_I8 ? 127.0f : 448.0f) *
                                    (1.25f + unit(hash(w->content[seq], pos, what, 254)));
                memcpy(plane + (int64_t)plane_cells(s) * s->C + (int64_t)cell * 4, &scale, 4);
            }
        }
    }
}

static float kv_number(const step *w, int32_t seq, int32_t pos, int32_t which, int32_t g, int32_t i, float *scale) {
    const shape *s = &w->s;
    const int32_t cell = pos % s->P;
    const unsigned char *plane = plane_of(w, w->page[seq * w->n_page_max + pos / s->P], which, g);
    const int64_t at = (int64_t)cell * s->C + i;
    *scale = 1.0f;
    if (ern_kv_has_codes(s->dtype)) {
        memcpy(scale, plane + (int64_t)plane_cells(s) * s->C + (int64_t)cell * 4, 4);
        return s->dtype == ERN_KV_I8 ? (float)(signed char)plane[at] : ern_e4m3_to_f32(plane[at]);
    }
    cu_bf16 h;
    memcpy(&h, plane + at * 2, 2);
    return ern_bf16_to_f32(h);
}

static step *step_new(const shape *s, int32_t n_seq, const int32_t *content, const int32_t *len, const int32_t *rows) {
    step *w = must(sizeof *w);
    *w = (step){.s = *s, .n_seq = n_seq, .n_page_max = 1};
    for (int32_t i = 0; i < n_seq; i++) {
        w->content[i] = content[i], w->len[i] = len[i], w->rows[i] = rows[i];
        w->row0[i + 1] = w->row0[i] + rows[i];
        const int32_t pages = (len[i] + s->P - 1) / s->P;
        w->n_page += pages;
        if (pages > w->n_page_max) w->n_page_max = pages;
    }
    w->n_row = w->row0[n_seq];
    w->n_page += 3;
    w->plane_bytes = (int64_t)plane_cells(s) * (ern_kv_has_codes(s->dtype) ? s->C + 4 : s->C * 2);
    w->page_bytes = LAYERS * 2 * s->G * w->plane_bytes;
    w->kv = must((size_t)(w->page_bytes * w->n_page));
    memset(w->kv, 0xff, (size_t)(w->page_bytes * w->n_page));
    w->page = must((size_t)n_seq * (size_t)w->n_page_max * 4);
    memset(w->page, 0x7f, (size_t)n_seq * (size_t)w->n_page_max * 4);
    w->pos = must((size_t)w->n_row * 4);
    w->cell = must((size_t)w->n_row * 4);
    w->q = must((size_t)w->n_row * (size_t)(s->H * s->C) * 2);
    int32_t *order = must((size_t)w->n_page * 4), n = 0;
    for (int32_t i = 0; i < w->n_page; i++) order[i] = i;
    for (int32_t i = w->n_page - 1; i > 0; i--) {
        const int32_t j = (int32_t)(check_random64() % (uint64_t)(i + 1)), o = order[i];
        order[i] = order[j], order[j] = o;
    }
    for (int32_t i = 0; i < n_seq; i++) {
        for (int32_t k = 0; k * s->P < len[i]; k++) w->page[i * w->n_page_max + k] = order[n++];
        for (int32_t p = 0; p < len[i]; p++) fill_cell(w, i, p);
        for (int32_t r = 0; r < rows[i]; r++) {
            const int32_t t = w->row0[i] + r, pos = len[i] - rows[i] + r;
            w->pos[t] = pos;
            w->cell[t] = w->page[i * w->n_page_max + pos / s->P] * s->P + pos % s->P;
            for (int32_t h = 0; h < s->H; h++)
                for (int32_t k = 0; k < s->C; k++)
                    w->q[((int64_t)t * s->H + h) * s->C + k] =
                        ern_bf16_from_f32(unit(hash(content[i], pos, 1000 + h, k)));
        }
    }
    free(order);
    return w;
}

static void step_free(step *w) {
    free(w->pos), free(w->cell), free(w->page), free(w->kv), free(w->q);
    free(w);
}

static cu_cache cache_of(const step *w, unsigned char *kv) {
    return (cu_cache){.kv = kv,
                      .page_bytes = w->page_bytes,
                      .plane_bytes = w->plane_bytes,
                      .n_page_cell = w->s.P,
                      .n_kv_head = w->s.G,
                      .n_head = w->s.H,
                      .n_head_dim = w->s.C,
                      .dtype = w->s.dtype};
}

typedef struct device_step {
    cu_cache c;
    cu_seqs seqs;
    unsigned char *kv;
    int32_t *pos, *cell, *row0, *kv_len, *page;
    float *inv_freq;
} device_step;

static void frequencies(float *inv, int32_t C) {
    for (int32_t j = 0; j < C / 2; j++) inv[j] = 1.0f / (float)pow(500000.0, (double)((float)(2 * j) / (float)C));
}

/* The step on the device, planned. */
static device_step device_new(const step *w) {
    device_step d = {0};
    d.kv = check_new(w->kv, (size_t)(w->page_bytes * w->n_page));
    d.pos = check_new(w->pos, (size_t)w->n_row * 4);
    d.cell = check_new(w->cell, (size_t)w->n_row * 4);
    d.row0 = check_new(w->row0, (size_t)(w->n_seq + 1) * 4);
    d.kv_len = check_new(w->len, (size_t)w->n_seq * 4);
    d.page = check_new(w->page, (size_t)w->n_seq * (size_t)w->n_page_max * 4);
    d.c = cache_of(w, d.kv);
    d.seqs = (cu_seqs){.n_row = w->n_row,
                       .n_seq = w->n_seq,
                       .n_page_max = w->n_page_max,
                       .pos = d.pos,
                       .cell = d.cell,
                       .row0 = d.row0,
                       .kv_len = d.kv_len,
                       .page = d.page};
    d.seqs.work = check_new(NULL, (size_t)cu_attn_work_count(&d.c, w->n_row, w->n_seq) * 4);
    float inv[64];
    frequencies(inv, w->s.C);
    d.inv_freq = check_new(inv, (size_t)w->s.C / 2 * 4);
    CHECK_CUDA(cu_attn_plan(0, &d.c, &d.seqs, d.inv_freq));
    return d;
}

static void device_free(device_step *d) {
    check_free(d->kv), check_free(d->pos), check_free(d->cell), check_free(d->row0), check_free(d->kv_len);
    check_free(d->page), check_free(d->inv_freq), check_free(d->seqs.work);
}

static void *zeros_new(size_t bytes) {
    void *p = check_new(NULL, bytes);
    CHECK_CUDA(cudaMemset(p, 0, bytes));
    return p;
}
static bool still_zeros(const void *device, size_t bytes) {
    unsigned char *host = must(bytes), any = 0;
    check_get(host, device, bytes);
    for (size_t i = 0; i < bytes; i++) any |= host[i];
    free(host);
    return any == 0;
}

/* Attention of a step, twice over one plan; out [T, CU_PAD(H*C)]. scratch_limit 0: none. */
static cu_bf16 *attend(const char *name, const step *w, bool decode, int64_t scratch_limit) {
    device_step d = device_new(w);
    const size_t ldo = (size_t)CU_PAD(w->s.H * w->s.C), bytes = (size_t)w->n_row * ldo * 2;
    int32_t longest = 0;
    for (int32_t i = 0; i < w->n_seq; i++) longest = w->len[i] > longest ? w->len[i] : longest;
    const int64_t scratch_bytes = cu_attn_scratch_bytes(&d.c, w->n_row, w->n_seq, longest, scratch_limit);
    void *scratch = zeros_new((size_t)scratch_bytes + 8);
    cu_bf16 *q = check_new(w->q, (size_t)w->n_row * (size_t)(w->s.H * w->s.C) * 2);
    cu_bf16 *out = check_new(NULL, bytes), *host = must(bytes), *again = must(bytes);
    CHECK_CUDA(cu_attend(0, out, q, NULL, &d.c, LAYER, &d.seqs, scratch, scratch_bytes, decode));
    check_get(again, out, bytes);
    CHECK_CUDA(cudaMemset(out, 0xff, bytes));
    CHECK_CUDA(cu_attend(0, out, q, NULL, &d.c, LAYER, &d.seqs, scratch, scratch_bytes, decode));
    check_get(host, out, bytes);
    bool pad = true;
    for (int32_t t = 0; t < w->n_row; t++)
        for (size_t i = (size_t)(w->s.H * w->s.C); i < ldo; i++) pad = pad && host[(size_t)t * ldo + i] == 0xffff;
    if (!pad) check_that(name, false, "wrote beyond H*C");
    if (memcmp(host, again, bytes) != 0) check_that(name, false, "a second launch gave other bits");
    free(again);
    if (!still_zeros(scratch, (size_t)scratch_bytes)) check_that(name, false, "scratch is not as it was");
    check_free(out), check_free(q), check_free(scratch);
    device_free(&d);
    return host;
}

/* One row and head against double; the largest error as a share of its bound.
 *
 * A product of the tensor core adds 16 exact products and the sum so far, each cut to no less than 23 bits below the
 * largest: 17 * 2^-23 of the sum of magnitudes. Score j, base 2, A = sum |q k|: C/16 such products and two roundings
 * (of the scale; codes: of the key's), ds = scale * A * (C/16 * 17 + 2) * 2^-23. Its weight is then off by a factor
 * within 1 + d_j, d_j = 2^-8 (rounding to bf16: 8 bits) + ln 2 * ds + 2^-22 (ex2) + 2^-24 * |s - m| ln 2 (the
 * difference), and each join of a tile, of nt, puts one more ex2 of a rounded difference on a weight: nt * (2^-22 +
 * 2^-24 * R), R the spread of scores. m itself is the same for all weights of a tile and cancels. BF16: the weights
 * that are summed are those that weigh, so O' - O = sum p_j d_j (v_j - O) / sum of weights. Codes: those that weigh are
 * rounded after the value's scale, so |O' - O| <= sum p_j d_j (|v_j| + |O|). The sums: 8 products and nt joins (two
 * roundings each) of sum p |v|, the same of l for |O|. Last, one division and bf16: 2^-8 + 2^-24 of the result. A
 * weight below 2^-126 of the largest is lost, which is nothing. */
static double row_error(const step *w, const cu_bf16 *out, int32_t seq, int32_t r, int32_t head) {
    const shape *s = &w->s;
    const int32_t t = w->row0[seq] + r, n = w->pos[t] + 1, g = head / (s->H / s->G), nt = (n + CU_KEYS - 1) / CU_KEYS;
    const size_t C = (size_t)s->C;
    const cu_bf16 *q = w->q + ((size_t)t * (size_t)s->H + (size_t)head) * C;
    const double scale = 1.4426950408889634 / sqrt((double)C), ln2 = 0.6931471805599453;
    double *score = must((size_t)n * 8), *off = must((size_t)n * 8), *v = must((size_t)n * C * 8);
    double top = -INFINITY, low = INFINITY, sum = 0.0, worst = 0.0;
    for (int32_t j = 0; j < n; j++) {
        double dot = 0.0, size = 0.0;
        float ks, vs;
        for (size_t i = 0; i < C; i++) {
            const double x =
                (double)kv_number(w, seq, j, 0, g, (int32_t)i, &ks) * (double)ks * (double)ern_bf16_to_f32(q[i]);
            dot += x;
            size += fabs(x);
            v[(size_t)j * C + i] = (double)kv_number(w, seq, j, 1, g, (int32_t)i, &vs) * (double)vs;
        }
        score[j] = dot * scale;
        off[j] = ln2 * size * scale * ((double)C / 16.0 * 17.0 + 2.0) * 0x1p-23;
        if (score[j] > top) top = score[j];
        if (score[j] < low) low = score[j];
    }
    const double spread = top - low;
    for (int32_t j = 0; j < n; j++) {
        off[j] += 0x1p-8 + 0x1p-22 + 0x1p-24 * spread + nt * (0x1p-22 + 0x1p-24 * spread);
        score[j] = exp2(score[j] - top);
        sum += score[j];
    }
    const size_t ldo = (size_t)CU_PAD(s->H * s->C);
    for (size_t i = 0; i < C; i++) {
        double exact = 0.0, size = 0.0, bound = 0.0;
        for (int32_t j = 0; j < n; j++) {
            exact += score[j] / sum * v[(size_t)j * C + i];
            size += score[j] / sum * fabs(v[(size_t)j * C + i]);
        }
        for (int32_t j = 0; j < n; j++) {
            const double x = v[(size_t)j * C + i];
            bound += score[j] / sum * off[j] * (ern_kv_has_codes(s->dtype) ? fabs(x) + fabs(exact) : fabs(x - exact));
        }
        bound = bound * 1.01 + (8.0 * 17.0 + 2.0 * nt + 1.0) * 0x1p-23 * (size + fabs(exact));
        bound += (0x1p-8 + 0x1p-23) * (fabs(exact) + bound) + 0x1p-120;
        const double got = (double)ern_bf16_to_f32(out[(size_t)t * ldo + (size_t)head * C + i]);
        const double error = fabs(got - exact) / bound;
        if (!(error <= worst)) worst = error; /* NaN stays */
        if (isnan(error)) break;
    }
    free(score), free(off), free(v);
    return worst;
}

/* Rows of every sequence against double: all heads of some where short, a few where long. */
static void check_step(const char *name, const step *w, const cu_bf16 *out, int32_t rows_each) {
    double worst = 0.0;
    char what[96] = "";
    for (int32_t i = 0; i < w->n_seq; i++) {
        for (int32_t k = 0; k < rows_each && k < w->rows[i]; k++) {
            const int32_t r = k == 0 ? w->rows[i] - 1 : k == 1 ? 0 : (int32_t)(check_random64() % (uint64_t)w->rows[i]);
            const int32_t from = (int32_t)(check_random64() % (uint64_t)w->s.H), heads = w->len[i] <= 20 ? w->s.H : 2;
            for (int32_t h = 0; h < heads; h++) {
                const double e = row_error(w, out, i, r, (from + h) % w->s.H);
                if (e <= worst) continue;
                worst = e;
                snprintf(what, sizeof what, "sequence %d (%d tokens, %d rows), row %d, head %d", i, w->len[i],
                         w->rows[i], r, (from + h) % w->s.H);
            }
        }
    }
    check_end(name, worst, what);
}

/* Rows of b that a holds too (the same content and position) have the same bits. */
static bool same_bits(const step *a, const cu_bf16 *x, const step *b, const cu_bf16 *y, int32_t *compared) {
    const size_t ldo = (size_t)CU_PAD(a->s.H * a->s.C), n = (size_t)(a->s.H * a->s.C) * 2;
    bool same = true;
    for (int32_t i = 0; i < b->n_seq; i++)
        for (int32_t r = 0; r < b->rows[i]; r++)
            for (int32_t k = 0; k < a->n_seq; k++) {
                const int32_t pos = b->pos[b->row0[i] + r], first = a->len[k] - a->rows[k];
                if (a->content[k] != b->content[i] || pos < first || pos >= a->len[k]) continue;
                same = same &&
                       memcmp(x + (size_t)(a->row0[k] + pos - first) * ldo, y + (size_t)(b->row0[i] + r) * ldo, n) == 0;
                ++*compared;
            }
    return same;
}

static const char *kv_name(ern_kv_dtype t) { return t == ERN_KV_I8 ? "int8" : t == ERN_KV_F8 ? "fp8" : "bf16"; }

static const char *case_name(const char *what, const shape *s) {
    static char names[4][128];
    static int turn;
    char *name = names[turn++ % 4];
    snprintf(name, sizeof names[0], "attention %s C%d H%d/%d P%d %s", what, s->C, s->H, s->G, s->P, kv_name(s->dtype));
    return name;
}

enum { BIG = 64 << 20 };

static void decode_case(const shape *s) {
    const char *name = case_name("decode", s);
    if (!check_begin(name)) return;
    const int32_t len[] = {1, 2, 15, 16, 17, 127, 128, 129, 200, 1000, 5000}, n = (int32_t)(sizeof len / sizeof *len);
    int32_t content[SEQS_MAX], one[SEQS_MAX];
    for (int32_t i = 0; i < n; i++) content[i] = i, one[i] = 1;
    step *w = step_new(s, n, content, len, one);
    cu_bf16 *out = attend(name, w, true, BIG), *walked = attend(name, w, true, 0), *mixed = attend(name, w, false, BIG);
    const size_t bytes = (size_t)w->n_row * (size_t)CU_PAD(s->H * s->C) * 2;
    check_step(name, w, out, 1);
    check_that(case_name("decode without scratch: bits", s), memcmp(out, walked, bytes) == 0, "differ");
    check_that(case_name("decode without the promise: bits", s), memcmp(out, mixed, bytes) == 0, "differ");
    step *alone = step_new(s, 1, content + 10, len + 10, one);
    cu_bf16 *by_itself = attend(name, alone, true, BIG);
    int32_t compared = 0;
    check_that(case_name("decode alone and in a crowd: bits", s),
               same_bits(w, out, alone, by_itself, &compared) && compared == 1, "differ");
    free(out), free(walked), free(mixed), free(by_itself);
    step_free(w), step_free(alone);
}

/* Several rows a sequence, as for draft verification, around the edges of tiles. */
static void verify_case(const shape *s) {
    const char *name = case_name("few rows", s);
    if (!check_begin(name)) return;
    const int32_t most = 16 / (s->H / s->G), len[] = {most, 128, 129, 130, 257, 700}, n = 6;
    const int32_t content[] = {20, 21, 22, 23, 24, 25},
                  rows[] = {most, most, most, most > 1 ? most - 1 : 1, most, most};
    step *w = step_new(s, n, content, len, rows);
    cu_bf16 *out = attend(name, w, true, BIG);
    check_step(name, w, out, most);
    /* the same rows one a sequence, and more rows than the kernel for few takes */
    int32_t c1[SEQS_MAX], l1[SEQS_MAX], r1[SEQS_MAX], n1 = 0;
    for (int32_t i = 0; i < n; i++)
        for (int32_t r = 0; r < rows[i] && n1 < 64; r++, n1++)
            c1[n1] = content[i], l1[n1] = len[i] - rows[i] + 1 + r, r1[n1] = 1;
    step *ones = step_new(s, n1, c1, l1, r1);
    cu_bf16 *y = attend(name, ones, true, BIG);
    int32_t compared = 0;
    bool same = same_bits(w, out, ones, y, &compared);
    const int32_t all[] = {len[0], 128, 129, 130, 257, 700}, many[] = {len[0], 40, 129, 30, 200, 17};
    step *wide = step_new(s, n, content, all, many);
    cu_bf16 *z = attend(name, wide, false, BIG);
    same = same && same_bits(wide, z, w, out, &compared);
    check_that(case_name("few rows, one by one, many: bits", s), same && compared >= n1, "differ");
    free(out), free(y), free(z);
    step_free(w), step_free(ones), step_free(wide);
}

/* So many tiles that blocks walk runs of them, take single ones after that, and come back for more. */
static void crowd_case(const shape *s) {
    const char *name = case_name("crowd", s);
    if (!check_begin(name)) return;
    enum { CROWD = 60 };
    int32_t content[CROWD], len[CROWD], one[CROWD];
    for (int32_t i = 0; i < CROWD; i++) content[i] = 60 + i, len[i] = 770 - 3 * i, one[i] = 1;
    step *w = step_new(s, CROWD, content, len, one), *alone = step_new(s, 1, content, len, one);
    cu_bf16 *out = attend(name, w, true, BIG), *walked = attend(name, w, true, 0), *x = attend(name, alone, true, BIG);
    check_step(name, w, out, 1);
    int32_t compared = 0;
    const size_t bytes = (size_t)w->n_row * (size_t)CU_PAD(s->H * s->C) * 2;
    check_that(case_name("crowd without scratch: bits", s), memcmp(out, walked, bytes) == 0, "differ");
    check_that(case_name("crowd and alone: bits", s), same_bits(w, out, alone, x, &compared) && compared == 1,
               "differ");
    free(out), free(walked), free(x);
    step_free(w), step_free(alone);
}

/* Sequences of all sizes: those that blocks finish, hand over to the next block and share among many, in one line. */
enum { UNEVEN = 50 };
static void uneven(const shape *s, int32_t content[UNEVEN], int32_t len[UNEVEN], int32_t rows[UNEVEN]) {
    const int32_t most = 16 / (s->H / s->G);
    for (int32_t i = 0; i < UNEVEN; i++) {
        content[i] = 100 + i;
        rows[i] = 1 + i % most;
        len[i] = i % 19 == 7 ? 3000 + i : rows[i] + i * i * 37 % 1000;
    }
}
static void uneven_case(const shape *s) {
    const char *name = case_name("uneven", s);
    if (!check_begin(name)) return;
    int32_t content[UNEVEN], len[UNEVEN], rows[UNEVEN];
    uneven(s, content, len, rows);
    step *w = step_new(s, UNEVEN, content, len, rows), *some = step_new(s, 9, content + 20, len + 20, rows + 20);
    cu_bf16 *out = attend(name, w, true, BIG), *walked = attend(name, w, true, 0), *x = attend(name, some, true, BIG);
    check_step(name, w, out, 1);
    int32_t compared = 0;
    const size_t bytes = (size_t)w->n_row * (size_t)CU_PAD(s->H * s->C) * 2;
    check_that(case_name("uneven without scratch: bits", s), memcmp(out, walked, bytes) == 0, "differ");
    check_that(case_name("uneven and fewer: bits", s), same_bits(w, out, some, x, &compared) && compared == some->n_row,
               "differ");
    free(out), free(walked), free(x);
    step_free(w), step_free(some);
}

/* A sequence so long that every block has several of its tiles and more blocks than there are rows to join, beside one
 * that a block finishes and one that two share. */
static void long_case(const shape *s) {
    const char *name = case_name("long", s);
    if (!check_begin(name)) return;
    const int32_t content[] = {70, 71, 72}, len[] = {300, 60000, 257}, one[] = {1, 1, 1};
    step *w = step_new(s, 3, content, len, one), *alone = step_new(s, 1, content + 1, len + 1, one);
    cu_bf16 *out = attend(name, w, true, BIG), *walked = attend(name, w, true, 0), *x = attend(name, alone, true, BIG);
    check_step(name, w, out, 1);
    int32_t compared = 0;
    const size_t bytes = (size_t)w->n_row * (size_t)CU_PAD(s->H * s->C) * 2;
    check_that(case_name("long without scratch: bits", s), memcmp(out, walked, bytes) == 0, "differ");
    check_that(case_name("long and alone: bits", s), same_bits(w, out, alone, x, &compared) && compared == 1, "differ");
    free(out), free(walked), free(x);
    step_free(w), step_free(alone);
}

static void prefill_case(const shape *s) {
    const char *name = case_name("prefill", s);
    if (!check_begin(name)) return;
    const int32_t content[] = {30, 31, 32, 33, 34, 35, 36}, len[] = {300, 130, 1000, 257, 40, 5000, 18},
                  rows[] = {300, 3, 100, 129, 40, 33, 1};
    step *w = step_new(s, 7, content, len, rows);
    cu_bf16 *out = attend(name, w, false, BIG);
    check_step(name, w, out, 4);
    /* content 30 in chunks in another crowd, and many of its rows and of 32's as decode steps */
    const int32_t cc[] = {40, 30, 41, 30, 30, 30}, cl[] = {90, 100, 500, 177, 300, 179},
                  cr[] = {90, 100, 1, 77, 121, 2};
    step *chunk = step_new(s, 6, cc, cl, cr);
    cu_bf16 *x = attend(name, chunk, false, BIG);
    int32_t compared = 0;
    bool same = same_bits(w, out, chunk, x, &compared);
    check_that(case_name("prefill in chunks: bits", s), same && compared == 300, "differ");
    const int32_t at[] = {1, 2, 7, 64, 127, 128, 129, 130, 200, 256, 257, 299, 300};
    int32_t c1[SEQS_MAX], l1[SEQS_MAX], r1[SEQS_MAX], n1 = 0;
    for (; n1 < 13; n1++) c1[n1] = 30, l1[n1] = at[n1], r1[n1] = 1;
    for (int32_t k = 0; k < 3; k++, n1++) c1[n1] = 32, l1[n1] = 901 + k * 49, r1[n1] = 1;
    c1[n1] = 35, l1[n1] = 4970, r1[n1++] = 1;
    step *ones = step_new(s, n1, c1, l1, r1);
    cu_bf16 *y = attend(name, ones, true, BIG);
    compared = 0;
    same = same_bits(w, out, ones, y, &compared);
    check_that(case_name("prefill and decode: bits", s), same && compared == n1, "differ");
    free(out), free(x), free(y);
    step_free(w), step_free(chunk), step_free(ones);
}

/* A prompt among many short ones, so that blocks take one after the other: planned and launched again and again, the
 * same bits each time, and those of the prompt alone. */
static void many_case(const shape *s) {
    const char *name = case_name("prefill among many", s);
    if (!check_begin(name)) return;
    enum { MANY = 131, TIMES = 10, WHICH = 43 };
    int32_t content[MANY], len[MANY];
    for (int32_t i = 0; i < MANY; i++) content[i] = i, len[i] = i == WHICH ? 256 : 2 + i % 4;
    step *w = step_new(s, MANY, content, len, len), *alone = step_new(s, 1, content + WHICH, len + WHICH, len + WHICH);
    cu_bf16 *first = attend(name, w, false, BIG), *by_itself = attend(name, alone, false, BIG);
    check_step(name, w, first, 2);
    int32_t compared = 0;
    bool same = same_bits(w, first, alone, by_itself, &compared);
    for (int i = 0; i < TIMES; i++) {
        cu_bf16 *again = attend(name, w, false, BIG);
        same = same && memcmp(first, again, (size_t)w->n_row * (size_t)CU_PAD(s->H * s->C) * 2) == 0;
        free(again);
    }
    check_that(case_name("prefill among many, again and alone: bits", s), same && compared == 256, "differ");
    free(first), free(by_itself);
    step_free(w), step_free(alone);
}

/* Blocks that take tiles of many rows and of few one after the other, of all numbers of tiles of keys: in this order,
 * in another one, again and again, and ten of the sequences by themselves. */
static void mixture_case(const shape *s) {
    const char *name = case_name("a mixture", s);
    if (!check_begin(name)) return;
    enum { MIXED = 130, SOME = 10, TIMES = 5 };
    static const int32_t packed[] = {20, 64, 65, 128, 200, 60, 17, 129}, tiles[] = {1, 2, 3, 4, 5, 7, 1, 2, 6};
    int32_t content[2][MIXED], len[2][MIXED], rows[2][MIXED];
    for (int32_t i = 0; i < MIXED; i++) {
        const int32_t most = packed[i % 8] / (s->H / s->G) + 1, n = tiles[i % 9] * CU_KEYS - i % 5 * 31;
        const int32_t at[] = {i, i * 47 % MIXED}; /* 47 and 130 have no divisor in common */
        for (int k = 0; k < 2; k++) content[k][at[k]] = i, len[k][at[k]] = n, rows[k][at[k]] = most < n ? most : n;
    }
    step *w = step_new(s, MIXED, content[0], len[0], rows[0]), *other = step_new(s, MIXED, content[1], len[1], rows[1]);
    cu_bf16 *x = attend(name, w, false, BIG), *y = attend(name, other, false, BIG);
    check_step(name, w, x, 1);
    int32_t compared = 0, want = 0;
    bool same = same_bits(w, x, other, y, &compared);
    for (int i = 0; i < TIMES; i++) {
        cu_bf16 *again = attend(name, w, false, BIG);
        same = same && memcmp(x, again, (size_t)w->n_row * (size_t)CU_PAD(s->H * s->C) * 2) == 0;
        free(again);
    }
    check_that(case_name("a mixture in another order: bits", s), same && compared == w->n_row, "differ");
    compared = 0, same = true;
    for (int32_t i = 0; i < SOME; i++) {
        const int32_t k = i * 13;
        step *alone = step_new(s, 1, content[0] + k, len[0] + k, rows[0] + k);
        cu_bf16 *z = attend(name, alone, false, BIG);
        same = same && same_bits(w, x, alone, z, &compared);
        want += alone->n_row;
        free(z);
        step_free(alone);
    }
    check_that(case_name("a mixture and alone: bits", s), same && compared == want, "differ");
    free(x), free(y);
    step_free(w), step_free(other);
}

/* A piece of a prompt, which fewer rows a block walk, and the same beside a whole one, where blocks have more. */
static void piece_case(const shape *s) {
    const char *name = case_name("a piece of a prompt", s);
    if (!check_begin(name)) return;
    const int32_t content[] = {70, 71}, len[] = {3000, 1300}, rows[] = {157, 1300};
    step *alone = step_new(s, 1, content, len, rows), *both = step_new(s, 2, content, len, rows);
    cu_bf16 *x = attend(name, alone, false, BIG), *y = attend(name, both, false, BIG);
    check_step(name, alone, x, 4);
    int32_t compared = 0;
    const bool same = same_bits(both, y, alone, x, &compared);
    check_that(case_name("a piece alone and beside a prompt: bits", s), same && compared == 157, "differ");
    free(x), free(y);
    step_free(alone), step_free(both);
}

/* A piece of a prompt and replies, which find room on multiprocessors that the piece leaves free, or do not. */
static void beside_case(const shape *s) {
    const char *name = case_name("replies beside a piece", s);
    if (!check_begin(name)) return;
    enum { REPLIES = 16, ROWS = 157 };
    int32_t content[REPLIES + 1], len[REPLIES + 1], rows[REPLIES + 1];
    for (int32_t i = 0; i < REPLIES; i++) content[i] = 80 + i, len[i] = 150 + 53 * i, rows[i] = 1;
    content[REPLIES] = 70, len[REPLIES] = 3000, rows[REPLIES] = ROWS;
    step *piece = step_new(s, 1, content + REPLIES, len + REPLIES, rows + REPLIES);
    step *replies = step_new(s, REPLIES, content, len, rows), *all = step_new(s, REPLIES + 1, content, len, rows);
    cu_bf16 *x = attend(name, piece, false, BIG), *y = attend(name, replies, true, BIG);
    cu_bf16 *z = attend(name, all, false, BIG), *walked = attend(name, all, false, 0);
    check_step(name, all, z, 4);
    int32_t compared = 0;
    const bool same = same_bits(all, z, piece, x, &compared) && same_bits(all, z, replies, y, &compared);
    check_that(case_name("replies beside a piece, and alone: bits", s), same && compared == ROWS + REPLIES, "differ");
    check_that(case_name("replies beside a piece, without scratch: bits", s),
               memcmp(z, walked, (size_t)all->n_row * (size_t)CU_PAD(s->H * s->C) * 2) == 0, "differ");
    free(x), free(y), free(z), free(walked);
    step_free(piece), step_free(replies), step_free(all);
}

/* What comes out as codes: those of what comes out as bf16. long: the last prompt is long enough for blocks of 128
 * rows, so that both kinds are seen. */
static void codes_case(const shape *s, cu_codes codes, bool is_long) {
    const char *name = case_name(codes == CU_CODES_F8 ? is_long ? "long prefill to fp8" : "prefill to fp8"
                                 : is_long            ? "long prefill to int8"
                                                      : "prefill to int8",
                                 s);
    if (CU_PORTABLE || !check_begin(name)) return;
    const int32_t last = is_long ? 1300 : 331;
    const int32_t content[] = {30, 31, 32}, len[] = {70, 200, last}, rows[] = {33, 17, last};
    step *w = step_new(s, 3, content, len, rows);
    device_step d = device_new(w);
    const int32_t n = s->H * s->C;
    const int64_t ld = (w->n_row + 3) / 4 * 4, ldx = n + CU_SEGMENT;
    const size_t code_bytes = (size_t)w->n_row * (size_t)ldx,
                 scale_bytes = (size_t)(n / CU_SEGMENT * ld) * sizeof(float);
    cu_bf16 *q = check_new(w->q, (size_t)w->n_row * (size_t)n * 2);
    cu_bf16 *out = check_new(NULL, (size_t)w->n_row * (size_t)n * 2);
    const int64_t scratch_bytes = cu_attn_scratch_bytes(&d.c, w->n_row, w->n_seq, 3000, BIG);
    void *scratch = zeros_new((size_t)scratch_bytes);
    CHECK_CUDA(cu_attend(0, out, q, NULL, &d.c, LAYER, &d.seqs, scratch, scratch_bytes, false));
    unsigned char *code[2];
    float *scale[2];
    for (int k = 0; k < 2; k++) {
        const cu_x8 to = {check_new(NULL, code_bytes), ldx, check_new(NULL, scale_bytes), ld};
        CHECK_CUDA(k == 0 ? cu_quant_x8(0, &to, codes, out, n, w->n_row, n)
                          : cu_attend_codes(0, &to, codes, q, &d.c, LAYER, &d.seqs));
        check_get(code[k] = must(code_bytes), to.code, code_bytes);
        check_get(scale[k] = must(scale_bytes), to.scale, scale_bytes);
        check_free(to.code), check_free(to.scale);
    }
    check_that(name, memcmp(code[0], code[1], code_bytes) == 0 && memcmp(scale[0], scale[1], scale_bytes) == 0,
               "other codes than those of bf16");
    for (int k = 0; k < 2; k++) free(code[k]), free(scale[k]);
    check_free(q), check_free(out), check_free(scratch);
    device_free(&d);
    step_free(w);
}

/* ---- rotation and store ------------------------------------------------------------------------------------------ */

/* A large linear that rotates and stores what comes out: the bits of the two kernels. */
static void rope_linear_case(const shape *s, cu_format f) {
    enum { IN = 256 };
    char name[96];
    snprintf(name, sizeof name, "linear of format %d, then rope and store: C %d H %d G %d P %d", f, s->C, s->H, s->G,
             s->P);
    if ((CU_PORTABLE && f != CU_BF16) || !check_begin(name)) return;
    const int32_t content[] = {50, 51, 52, 53}, len[] = {1, 70, 200, 331}, rows[] = {1, 33, 5, 231};
    step *w = step_new(s, 4, content, len, rows);
    w->cell[5] = -1; /* a row that only fills a graph */
    memset(w->kv, 0xff, (size_t)(w->page_bytes * w->n_page));
    const int32_t T = w->n_row, n_out = (s->H + 2 * s->G) * s->C;
    const size_t q_bytes = (size_t)T * (size_t)(s->H * s->C) * 2, kv_bytes = (size_t)(w->page_bytes * w->n_page);
    check_weights o =
        check_weights_new((cu_linear){.format = f, .n_out = n_out, .n_in = IN, .n_band = CU_BANDS(n_out), .n_seg = 2});
    cu_bf16 *x = must((size_t)T * IN * sizeof *x), *pack = (cu_bf16 *)(void *)o.pack;
    for (int32_t i = 0; i < T * IN; i++) x[i] = ern_bf16_from_f32(check_random());
    if (f == CU_BF16) { /* numbers, not any bits */
        for (int32_t i = 0; i < n_out * IN; i++) pack[i] = ern_bf16_from_f32(check_random());
        CHECK_CUDA(cudaMemcpy(o.d_pack, pack, (size_t)n_out * IN * sizeof *pack, cudaMemcpyHostToDevice));
    }
    cu_bf16 *dx = check_new(x, (size_t)T * IN * sizeof *x);
    const int64_t ld = (T + 3) / 4 * 4;
    const cu_x8 x8 = {check_new(NULL, (size_t)T * IN), IN, check_new(NULL, 2 * (size_t)ld * sizeof(float)), ld};
    if (f != CU_BF16) CHECK_CUDA(cu_quant_x8(0, &x8, cu_codes_of(f), dx, IN, T, IN));
    unsigned char *q[3], *kv[3];
    for (int k = 0; k < 3; k++) { /* one by one; at once; as the step asks */
        device_step d = device_new(w);
        float *y = check_new(NULL, (size_t)T * (size_t)n_out * sizeof *y);
        cu_bf16 *q_out = check_new(NULL, q_bytes);
        const cu_rope rope = {q_out, &d.c, &d.seqs, LAYER};
        const cu_job j = {.w = o.w,
                          .epilogue = CU_STORE,
                          .x = dx,
                          .ldx = IN,
                          .n_row = T,
                          .y = y,
                          .ldy = n_out,
                          .x8 = x8,
                          .rope = k == 0 || (k == 1 && (CU_PORTABLE || !cu_rope_fits(&rope))) ? NULL : &rope};
        CHECK_CUDA(k == 2 ? cu_linear_run(0, &j) : f == CU_BF16 ? cu_large_run(0, &j) : cu_a8_large_run(0, &j));
        if (!j.rope) CHECK_CUDA(cu_rope_store(0, y, false, &rope));
        check_get(q[k] = must(q_bytes), q_out, q_bytes);
        check_get(kv[k] = must(kv_bytes), d.kv, kv_bytes);
        check_free(y), check_free(q_out);
        device_free(&d);
    }
    bool same = true;
    for (int k = 1; k < 3; k++) same &= memcmp(q[0], q[k], q_bytes) == 0 && memcmp(kv[0], kv[k], kv_bytes) == 0;
    check_that(name, same, "other bits than one by one");
    for (int k = 0; k < 3; k++) free(q[k]), free(kv[k]);
    check_free(dx), check_free(x8.code), check_free(x8.scale);
    check_weights_free(&o);
    free(x);
    step_free(w);
}

/* docs/model.md 10, on the numbers that the device rotated. */
static void put_codes(ern_kv_dtype t, unsigned char *to, unsigned char *scale_to, const float *x, int32_t n) {
    float amax = t == ERN_KV_I8 ? 0.0f : 1e-10f;
    for (int32_t i = 0; i < n; i++) amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
    if (t == ERN_KV_F8) {
        const float scale = amax / 448.0f, f = 448.0f / amax;
        for (int32_t i = 0; i < n; i++) to[i] = ern_e4m3_from_f32(x[i] * f);
        memcpy(scale_to, &scale, 4);
        return;
    }
    float scale = amax / 127.0f, f = amax > 0.0f ? 127.0f / amax : 0.0f;
    if (scale < 0x1p-100f) f = scale = 0.0f;
    for (int32_t i = 0; i < n; i++) to[i] = f > 0.0f ? (unsigned char)(signed char)nearbyintf(x[i] * f) : 0;
    memcpy(scale_to, &scale, 4);
}

/* Rotated f32 within its bound of double: the angle is the same f32; sin and cos within 2 ulp, at most 2^-23 each;
 * two products and a sum: 2^-24 of each and of the result. So (|even| + |odd|) * 2^-22. Everything else follows from
 * those numbers exactly: q, k and v in bf16 or codes, and not a byte of the cache besides. */
static void rope_case(const shape *s) {
    const char *name = case_name("rope and store", s);
    if (!check_begin(name)) return;
    const int32_t content[] = {50, 51, 52, 53}, len[] = {1, 70, 200, 131}, rows[] = {1, 33, 5, 131};
    step *w = step_new(s, 4, content, len, rows);
    memset(w->kv, 0xff, (size_t)(w->page_bytes * w->n_page));
    const int32_t far[] = {131071, 100003, 65536, 32767}; /* angles that need an exact reduction */
    for (int32_t i = 0; i < 4 && i < rows[3]; i++) w->pos[w->row0[3] + i] = far[i];
    device_step d = device_new(w);
    const int32_t n = s->H + 2 * s->G;
    const size_t C = (size_t)s->C, count = (size_t)w->n_row * (size_t)n * C,
                 q_count = (size_t)w->n_row * (size_t)s->H * C;
    float *in = must(count * 4), *turned = must(count * 4), inv[64];
    cu_bf16 *q = must(q_count * 2);
    for (size_t i = 0; i < count; i++) in[i] = check_random() * (i / C % 7 == 3 ? 1e-3f : 5.0f);
    /* a vector of zeros and one with a single number */
    memset(in + (size_t)s->H * C, 0, 2 * C * 4);
    in[(size_t)(n - 1) * C] = 1.5f;
    frequencies(inv, s->C);
    float *qkv = check_new(in, count * 4);
    cu_bf16 *q_out = check_new(NULL, q_count * 2);
    CHECK_CUDA(cu_rope_store(0, qkv, true, &(cu_rope){q_out, &d.c, &d.seqs, LAYER}));
    check_get(turned, qkv, count * 4);
    check_get(q, q_out, q_count * 2);
    unsigned char *got = must((size_t)(w->page_bytes * w->n_page));
    check_get(got, d.kv, (size_t)(w->page_bytes * w->n_page));
    double worst = 0.0;
    bool q_good = true, v_good = true;
    for (int32_t t = 0; t < w->n_row; t++) {
        for (int32_t h = 0; h < n; h++) {
            const float *x = in + ((size_t)t * (size_t)n + (size_t)h) * C, *y = turned + (x - in);
            for (size_t j = 0; j < C / 2 && h < s->H + s->G; j++) {
                const double angle = (double)((float)w->pos[t] * inv[j]), c = cos(angle), sn = sin(angle);
                const double even = (double)x[2 * j], odd = (double)x[2 * j + 1];
                const double bound = (fabs(even) + fabs(odd)) * 0x1p-22 + 0x1p-140;
                double e = fabs((double)y[2 * j] - (even * c - odd * sn)) / bound;
                if (!(e <= worst)) worst = e;
                e = fabs((double)y[2 * j + 1] - (odd * c + even * sn)) / bound;
                if (!(e <= worst)) worst = e;
            }
            if (h < s->H) {
                for (size_t i = 0; i < C; i++)
                    q_good = q_good && q[((size_t)t * (size_t)s->H + (size_t)h) * C + i] == ern_bf16_from_f32(y[i]);
                continue;
            }
            const int32_t which = h >= s->H + s->G, g = h - s->H - which * s->G;
            if (which) v_good = v_good && memcmp(x, y, C * 4) == 0;
            unsigned char *plane = plane_of(w, w->cell[t] / s->P, which, g);
            const size_t cell = (size_t)(w->cell[t] % s->P);
            if (ern_kv_has_codes(s->dtype)) {
                put_codes(s->dtype, plane + cell * C, plane + (size_t)plane_cells(s) * C + cell * 4, y, s->C);
            } else {
                for (size_t i = 0; i < C; i++) {
                    const cu_bf16 b = ern_bf16_from_f32(y[i]);
                    memcpy(plane + (cell * C + i) * 2, &b, 2);
                }
            }
        }
    }
    check_end(name, worst, "an angle");
    check_that(case_name("rope: q, v as they were", s), q_good && v_good, "differ");
    check_that(case_name("store: every byte of the cache", s),
               memcmp(got, w->kv, (size_t)(w->page_bytes * w->n_page)) == 0, "differs");
    free(got), free(in), free(turned), free(q);
    check_free(qkv), check_free(q_out);
    device_free(&d);
    step_free(w);
}

/* Rotation, store and attention by one kernel, against the two: the same bits, and the same cache. */
static void fused(const char *name, const shape *s, int32_t n, const int32_t *content, const int32_t *len,
                  const int32_t *rows) {
    step *w = step_new(s, n, content, len, rows);
    const size_t C = (size_t)s->C, count = (size_t)w->n_row * (size_t)(s->H + 2 * s->G) * C,
                 out_bytes = (size_t)w->n_row * (size_t)CU_PAD(s->H * s->C) * 2,
                 kv_bytes = (size_t)(w->page_bytes * w->n_page);
    for (int32_t t = 0; t < w->n_row; t++) { /* what is not stored is seen */
        for (int32_t i = 0; i < 2 * s->G; i++) {
            unsigned char *plane = plane_of(w, w->cell[t] / s->P, i / s->G, i % s->G);
            const size_t each = ern_kv_has_codes(s->dtype) ? C : 2 * C, cell = (size_t)(w->cell[t] % s->P);
            memset(plane + cell * each, 0xff, each);
            if (ern_kv_has_codes(s->dtype)) memset(plane + (size_t)plane_cells(s) * C + cell * 4, 0xff, 4);
        }
    }
    float *in = must(count * 4);
    for (size_t i = 0; i < count; i++) in[i] = check_random() * (i / C % 7 == 3 ? 1e-3f : 2.0f);
    float *qkv = check_new(in, count * 4);
    cu_bf16 *q = check_new(NULL, (size_t)w->n_row * (size_t)s->H * C * 2), *out[2];
    unsigned char *kv[2];
    for (int k = 0; k < 2; k++) {
        device_step d = device_new(w);
        const int64_t scratch_bytes = cu_attn_scratch_bytes(&d.c, w->n_row, w->n_seq, 3000, BIG);
        void *scratch = zeros_new((size_t)scratch_bytes);
        cu_bf16 *y = check_new(NULL, out_bytes);
        if (k == 0) CHECK_CUDA(cu_rope_store(0, qkv, false, &(cu_rope){q, &d.c, &d.seqs, LAYER}));
        CHECK_CUDA(cu_attend(0, y, k == 0 ? q : NULL, qkv, &d.c, LAYER, &d.seqs, scratch, scratch_bytes, true));
        check_get(out[k] = must(out_bytes), y, out_bytes);
        check_get(kv[k] = must(kv_bytes), d.kv, kv_bytes);
        check_free(scratch), check_free(y);
        device_free(&d);
    }
    check_that(name, memcmp(out[0], out[1], out_bytes) == 0, "results differ");
    check_that(name, memcmp(kv[0], kv[1], kv_bytes) == 0, "the cache differs");
    for (int k = 0; k < 2; k++) free(out[k]), free(kv[k]);
    check_free(q), check_free(qkv);
    free(in);
    step_free(w);
}

static void fused_case(const shape *s) {
    const char *name = case_name("rope, store and decode at once", s);
    if (!check_begin(name)) return;
    const int32_t most = 16 / (s->H / s->G), len[] = {most, 128, 129, 130, 257, 1000, 3000, 1};
    const int32_t content[] = {20, 21, 22, 23, 24, 25, 26, 27}, rows[] = {most, 1, most, most, 1, most, 1, 1};
    fused(name, s, 8, content, len, rows);
}
static void fused_uneven_case(const shape *s) {
    const char *name = case_name("rope, store and decode of uneven", s);
    if (!check_begin(name)) return;
    int32_t content[UNEVEN], len[UNEVEN], rows[UNEVEN];
    uneven(s, content, len, rows);
    fused(name, s, UNEVEN, content, len, rows);
}

/* ---- speed, as information --------------------------------------------------------------------------------------- */

/* n_seq sequences of len tokens with `rows` rows each, C 128, P 64; prints what one layer takes. */
static void speed_case(const char *what, int32_t H, int32_t G, ern_kv_dtype dtype, int32_t n_seq, int32_t len,
                       int32_t rows) {
    enum { P = 64, C = 128, BLOCK = 8 << 20, TIMES = 20 };
    char name[96];
    snprintf(name, sizeof name, "attention speed %s", what);
    if (!check_begin(name)) return;
    const int32_t pages = (len + P - 1) / P, T = n_seq * rows, n_page = pages * n_seq;
    cu_cache c = {.n_page_cell = P, .n_kv_head = G, .n_head = H, .n_head_dim = C, .dtype = dtype};
    c.plane_bytes = P * (ern_kv_has_codes(dtype) ? C + 4 : C * 2);
    c.page_bytes = 2 * G * c.plane_bytes;
    const size_t kv_bytes = (size_t)c.page_bytes * (size_t)n_page;
    size_t left = 0, all = 0;
    CHECK_CUDA(cudaMemGetInfo(&left, &all));
    if (kv_bytes + ((size_t)1 << 30) > left) return;
    /* Random bits whose exponents are sane in bf16 (0x3f.., 0xbf..), f32 scales and codes alike; a block of them over
     * and over. */
    uint32_t *block = must(BLOCK);
    for (size_t i = 0; i < BLOCK / 4; i++) block[i] = ((uint32_t)check_random64() & 0x807f807fu) | 0x3f003f00u;
    CHECK_CUDA(cudaMalloc((void **)&c.kv, kv_bytes));
    for (size_t at = 0; at < kv_bytes; at += BLOCK)
        CHECK_CUDA(cudaMemcpy(c.kv + at, block, kv_bytes - at < BLOCK ? kv_bytes - at : BLOCK, cudaMemcpyHostToDevice));
    int32_t *ints = must(((size_t)T * 2 + (size_t)n_seq * 2 + 1 + (size_t)n_page) * 4);
    int32_t *pos = ints, *cell = pos + T, *row0 = cell + T, *kv_len = row0 + n_seq + 1, *page = kv_len + n_seq;
    for (int32_t i = 0; i < n_page; i++)
        page[i] = (int32_t)((int64_t)i * 7919 % n_page); /* 7919 divides no n_page here */
    for (int32_t s = 0; s <= n_seq; s++) {
        row0[s] = s * rows;
        if (s == n_seq) break;
        kv_len[s] = len;
        for (int32_t r = 0; r < rows; r++) pos[s * rows + r] = len - rows + r, cell[s * rows + r] = 0;
    }
    cu_seqs seqs = {.n_row = T, .n_seq = n_seq, .n_page_max = pages};
    int32_t *d_pos = check_new(pos, (size_t)T * 4), *d_row0 = check_new(row0, (size_t)(n_seq + 1) * 4);
    int32_t *d_len = check_new(kv_len, (size_t)n_seq * 4), *d_page = check_new(page, (size_t)n_page * 4);
    seqs.pos = d_pos, seqs.row0 = d_row0, seqs.kv_len = d_len, seqs.page = d_page;
    seqs.work = check_new(NULL, (size_t)cu_attn_work_count(&c, T, n_seq) * 4);
    int32_t *d_cell = check_new(cell, (size_t)T * 4);
    seqs.cell = d_cell;
    float inv[C / 2];
    frequencies(inv, C);
    float *d_inv = check_new(inv, sizeof inv);
    const int64_t scratch_bytes = cu_attn_scratch_bytes(&c, T, n_seq, len, 256 << 20);
    void *scratch = zeros_new((size_t)scratch_bytes);
    const bool decode = rows * (H / G) <= 16; /* by one kernel then, from qkv */
    cu_bf16 *q, *out;
    const size_t out_bytes = (size_t)T * (size_t)(H * C) * 2,
                 q_bytes = decode ? (size_t)T * (size_t)((H + 2 * G) * C) * 4 : out_bytes;
    CHECK_CUDA(cudaMalloc((void **)&q, q_bytes));
    for (size_t at = 0; at < q_bytes; at += BLOCK)
        CHECK_CUDA(
            cudaMemcpy((char *)q + at, block, q_bytes - at < BLOCK ? q_bytes - at : BLOCK, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMalloc((void **)&out, out_bytes));
    cudaEvent_t from, to;
    CHECK_CUDA(cudaEventCreate(&from));
    CHECK_CUDA(cudaEventCreate(&to));
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec[2]; /* plans; layers */
    CHECK_CUDA(cudaStreamCreate(&stream));
    for (int k = 0; k < 3; k++) { /* once without a graph */
        if (k > 0) CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < TIMES && k != 2; i++) CHECK_CUDA(cu_attn_plan(stream, &c, &seqs, d_inv));
        if (k == 0) CHECK_CUDA(cudaStreamSynchronize(stream));
        for (int i = 0; i < TIMES && k != 1; i++)
            CHECK_CUDA(cu_attend(stream, out, decode ? NULL : q, (const float *)q, &c, 0, &seqs, scratch, scratch_bytes,
                                 decode));
        if (k == 0) CHECK_CUDA(cudaStreamSynchronize(stream));
        if (k == 0) continue;
        CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
        CHECK_CUDA(cudaGraphInstantiate(&exec[k - 1], graph, 0));
        CHECK_CUDA(cudaGraphDestroy(graph));
    }
    float best[2] = {INFINITY, INFINITY};
    for (int i = 0; i < 6; i++) {
        float ms;
        CHECK_CUDA(cudaEventRecord(from, stream));
        CHECK_CUDA(cudaGraphLaunch(exec[i % 2], stream));
        CHECK_CUDA(cudaEventRecord(to, stream));
        CHECK_CUDA(cudaEventSynchronize(to));
        CHECK_CUDA(cudaEventElapsedTime(&ms, from, to));
        best[i % 2] = ms / TIMES < best[i % 2] ? ms / TIMES : best[i % 2];
    }
    double keys = 0.0; /* that rows see */
    for (int32_t r = 0; r < rows; r++) keys += (double)(len - rows + r + 1) * n_seq;
    printf("      attention %-34s %9.2f us  %6.0f GB/s of KV  %6.1f TFLOP/s  (plan %.1f us)\n", what,
           (double)best[1] * 1e3, (double)n_seq * len * (double)c.page_bytes / P / ((double)best[1] * 1e6),
           keys * H * C * 4.0 / ((double)best[1] * 1e9), (double)best[0] * 1e3);
    for (int k = 0; k < 2; k++) CHECK_CUDA(cudaGraphExecDestroy(exec[k]));
    CHECK_CUDA(cudaStreamDestroy(stream));
    CHECK_CUDA(cudaEventDestroy(from));
    CHECK_CUDA(cudaEventDestroy(to));
    CHECK_CUDA(cudaFree(c.kv));
    CHECK_CUDA(cudaFree(q));
    CHECK_CUDA(cudaFree(out));
    check_free(d_pos), check_free(d_row0), check_free(d_len), check_free(d_page);
    check_free(d_cell), check_free(d_inv), check_free(seqs.work), check_free(scratch);
    free(block), free(ints);
}

void check_attention(void) {
    static const shape shapes[] = {
        {.C = 128, .H = 20, .G = 4, .P = 64}, {.C = 128, .H = 16, .G = 2, .P = 48}, {.C = 16, .H = 8, .G = 1, .P = 16},
        {.C = 16, .H = 10, .G = 2, .P = 48},  {.C = 64, .H = 6, .G = 2, .P = 64},   {.C = 64, .H = 4, .G = 2, .P = 7},
        {.C = 16, .H = 16, .G = 1, .P = 64},  {.C = 64, .H = 2, .G = 2, .P = 3},
    };
    static const ern_kv_dtype kinds[] = {ERN_KV_BF16, ERN_KV_I8, ERN_KV_F8};
    for (int i = 0; i < 24; i++) {
        shape s = shapes[i / 3];
        s.dtype = kinds[i % 3];
        rope_case(&s);
        decode_case(&s);
        verify_case(&s);
        fused_case(&s);
        prefill_case(&s);
        for (int k = CU_CODES_F8; k <= CU_CODES_I8 && s.C == CU_SEGMENT; k++) codes_case(&s, (cu_codes)k, false);
    }
    static const shape heads[] = {{.C = 128, .H = 5, .G = 1, .P = 64, .dtype = ERN_KV_BF16},
                                  {.C = 128, .H = 16, .G = 2, .P = 16, .dtype = ERN_KV_BF16},
                                  {.C = 128, .H = 5, .G = 1, .P = 64, .dtype = ERN_KV_I8},
                                  {.C = 64, .H = 4, .G = 2, .P = 64, .dtype = ERN_KV_BF16}};
    static const cu_format formats[] = {CU_BF16, CU_F8A8, CU_I8A8};
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++)
        for (size_t k = 0; k < sizeof formats / sizeof *formats; k++) rope_linear_case(&heads[i], formats[k]);
    const shape many = {.C = 16, .H = 64, .G = 16, .P = 64, .dtype = ERN_KV_I8},
                wide = {.C = 128, .H = 20, .G = 4, .P = 64};
    crowd_case(&many);
    crowd_case(&wide);
    const shape codes = {.C = 128, .H = 16, .G = 2, .P = 64, .dtype = ERN_KV_I8};
    long_case(&wide);
    long_case(&codes);
    const shape sizes[] = {{.C = 128, .H = 20, .G = 4, .P = 64},
                           {.C = 16, .H = 64, .G = 16, .P = 64},
                           {.C = 64, .H = 32, .G = 16, .P = 48},
                           {.C = 128, .H = 16, .G = 8, .P = 64}};
    for (int i = 0; i < 12; i++) {
        shape s = sizes[i / 3];
        s.dtype = kinds[i % 3];
        uneven_case(&s);
        fused_uneven_case(&s);
    }
    for (int i = 0; i < 3; i++) many_case(&(shape){.C = 128, .H = 16, .G = 2, .P = 16, .dtype = kinds[i]});
    for (int i = 0; i < 6; i++)
        mixture_case(&(shape){.C = 128, .H = i < 3 ? 20 : 32, .G = 4, .P = i < 3 ? 64 : 20, .dtype = kinds[i % 3]});
    /* Pages that a copy takes whole, in part, and that none takes. */
    const shape pieces[] = {
        {.C = 128, .H = 20, .G = 4, .P = 64}, {.C = 128, .H = 16, .G = 2, .P = 48}, {.C = 128, .H = 16, .G = 2, .P = 8},
        {.C = 128, .H = 16, .G = 2, .P = 20}, {.C = 64, .H = 32, .G = 16, .P = 48},
    };
    for (int i = 0; i < 15; i++) {
        shape s = pieces[i / 3];
        s.dtype = kinds[i % 3];
        piece_case(&s);
        beside_case(&s);
        for (int k = CU_CODES_F8; k <= CU_CODES_I8 && s.C == CU_SEGMENT; k++) codes_case(&s, (cu_codes)k, true);
    }
    static const struct {
        const char *what;
        int32_t H, G, n_seq, len;
    } speed[] = {
        {"decode 1 x 1024, 16/2", 16, 2, 1, 1024},     {"decode 1 x 4096, 20/4", 20, 4, 1, 4096},
        {"decode 1 x 32768, 20/4", 20, 4, 1, 32768},   {"decode 64 x 1024, 16/2", 16, 2, 64, 1024},
        {"decode 256 x 1024, 16/2", 16, 2, 256, 1024}, {"decode 8 x 4096, 20/4", 20, 4, 8, 4096},
        {"decode 32 x 4096, 20/4", 20, 4, 32, 4096},   {"decode 64 x 4096, 20/4", 20, 4, 64, 4096},
        {"decode 128 x 4096, 20/4", 20, 4, 128, 4096}, {"decode 256 x 4096, 20/4", 20, 4, 256, 4096},
    };
    for (size_t i = 0; i < sizeof speed / sizeof *speed; i++) {
        for (int k = 0; k < 3; k++) {
            char what[64];
            snprintf(what, sizeof what, "%s, %s", speed[i].what, kv_name(kinds[k]));
            speed_case(what, speed[i].H, speed[i].G, kinds[k], speed[i].n_seq, speed[i].len, 1);
        }
    }
    speed_case("240 of 8192, 16/2, bf16", 16, 2, ERN_KV_BF16, 1, 8192, 240);
    speed_case("368 of 8192, 16/2, bf16", 16, 2, ERN_KV_BF16, 1, 8192, 368);
    speed_case("368 of 8192, 16/2, fp8", 16, 2, ERN_KV_F8, 1, 8192, 368);
    speed_case("496 of 8192, 16/2, bf16", 16, 2, ERN_KV_BF16, 1, 8192, 496);
    speed_case("1008 of 8192, 16/2, bf16", 16, 2, ERN_KV_BF16, 1, 8192, 1008);
    speed_case("prefill 8192, 20/4, bf16", 20, 4, ERN_KV_BF16, 1, 8192, 8192);
    speed_case("prefill 8192, 20/4, int8", 20, 4, ERN_KV_I8, 1, 8192, 8192);
    speed_case("prefill 8192, 20/4, fp8", 20, 4, ERN_KV_F8, 1, 8192, 8192);
}
