/* checkkern: every private kernel of the cpu backend, at every level this machine has, against a plain double twin.
 *
 * Inputs and shapes come from a printed seed (or argv[1]); every buffer ends at a page that may not be touched; outputs
 * are poisoned with NaN first; cells of the KV cache past the length hold NaN, which no multiplication by zero can
 * hide.
 *
 * Tolerances. u = 2^-24. A sum of products whose longest chain of roundings is c long differs from the exact one by at
 * most c*u/(1 - c*u) * sum|a||b|; c is argued at each check; the factor 1.01 covers 1/(1 - c*u) for every c here. */
#include <inttypes.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

#include "backend/backend.h"
#include "backend/cpu/cpu_kernels.h"
#include "base/counter.h"
#include "base/os.h"
#include "kv_drawing.h"

#define U 0x1p-24

static uint64_t seed, drawn;
static uint64_t draw(void) { return ern_counter64(seed, drawn++); }
static int32_t draw_int(int32_t from, int32_t to) { return from + (int32_t)(draw() % (uint64_t)(to - from + 1)); }
static float draw_f32(float width) { return ((float)(draw() >> 40) * 0x1p-23f - 1.0f) * width; }

/* ---- memory that ends at a guard page ---------------------------------------------------------------------------- */

enum { GUARDED_MAX = 64 };
static struct {
    void *at;
    size_t bytes;
} guarded[GUARDED_MAX];
static int n_guarded;

static void *guard(size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), body = (bytes + page - 1) / page * page;
    assert_true(n_guarded < GUARDED_MAX);
    unsigned char *p = mmap(NULL, body + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(p != MAP_FAILED);
    assert_int_equal(mprotect(p + body, page, PROT_NONE), 0);
    guarded[n_guarded].at = p;
    guarded[n_guarded++].bytes = body + page;
    return p + body - bytes;
}

static void guard_free(void) {
    while (n_guarded > 0) {
        n_guarded--;
        munmap(guarded[n_guarded].at, guarded[n_guarded].bytes);
    }
}

static float *floats(int64_t n, float width) {
    float *p = guard((size_t)n * sizeof *p);
    for (int64_t i = 0; i < n; i++) p[i] = draw_f32(width);
    return p;
}
static float *poison(int64_t n) {
    float *p = guard((size_t)n * sizeof *p);
    for (int64_t i = 0; i < n; i++) p[i] = NAN;
    return p;
}
static ern_bf16 *halves(int64_t n, float width) {
    ern_bf16 *p = guard((size_t)n * sizeof *p);
    for (int64_t i = 0; i < n; i++) p[i] = ern_bf16_from_f32(draw_f32(width));
    return p;
}

static void near_to(double got, double want, double bound, const char *what, int64_t i) {
    if (fabs(got - want) <= bound * 1.01 + fabs(want) * 0x1p-23) return; /* and an ulp of the output; NaN fails */
    fail_msg("%s[%" PRId64 "] = %.9g, expected %.9g within %.3g (seed %" PRIu64 ")", what, i, got, want, bound, seed);
}

/* Rows whose groups differ in size by thousands; a group of zeros now and then. */
static float *draw_rows(int32_t n_row, int32_t n_in) {
    float *x = floats((int64_t)n_row * n_in, 1.0f);
    for (int32_t r = 0; r < n_row; r++)
        for (int32_t g = 0; g < n_in; g += ERN_ACT_GROUP) {
            const float size = draw() % 8 ? ldexpf(1.0f, draw_int(-12, 12)) : 0.0f;
            for (int32_t i = g; i < n_in && i < g + ERN_ACT_GROUP; i++) x[(int64_t)r * n_in + i] *= size;
        }
    return x;
}

/* ---- linear layers ----------------------------------------------------------------------------------------------- */

typedef struct linear_case {
    ern_linear w;
    int32_t n_row;
    float *x;
} linear_case;

/* A window with a stride of its own; the buffer ends with the window's last element. */
static ern_linear draw_linear(ern_order order, int32_t n_out, int32_t n_in) {
    const int32_t run = order == ERN_ORDER_OUT_IN ? n_in : n_out, lines = order == ERN_ORDER_OUT_IN ? n_out : n_in;
    const int64_t stride = run + draw_int(0, 40);
    return (ern_linear){.data = halves((lines - 1) * stride + run, 1.0f),
                        .dtype = ERN_DTYPE_BF16,
                        .order = order,
                        .n_out = n_out,
                        .n_in = n_in,
                        .stride = stride};
}

/* OUT_IN: at most one block of K in 16 lanes (K/16 steps), 4 levels of the tree, a step per block of 512 or more, one
 * for the product, one for the scale. IN_OUT: a chain over a block of at most 512, and the same rest. Tiles: of 32
 * inputs two chains of 16 and their sum, one step for each 32, and the scale's two. */
static double linear_chain(const cpu_kernels *k, const ern_linear *w) {
    if (k->linear_rounds) return 16 + 1 + ceil(w->n_in / 32.0) + 2;
    const double blocks = ceil(w->n_in / 512.0) + 2;
    return (w->order == ERN_ORDER_OUT_IN ? ceil(w->n_in / 16.0) + 5 : (w->n_in < 512 ? w->n_in : 512) + 1) + blocks;
}

/* The rows as linear_bf16 takes them, on a guard page; none where it takes x. */
static cpu_act round_rows(const cpu_kernels *k, const float *x, int64_t x_stride, int32_t n_row, int32_t n_in) {
    const int64_t stride = cpu_act_stride(n_in);
    if (!k->linear_rounds) return (cpu_act){0};
    ern_bf16 *q = guard((size_t)(n_row * stride) * sizeof *q);
    memset(q, 0xff, (size_t)(n_row * stride) * sizeof *q); /* NaN */
    for (int32_t r = 0; r < n_row; r++) k->round_bf16(q + r * stride, x + r * x_stride, n_in);
    return (cpu_act){.q = q};
}

/* What is multiplied: x, or x rounded. */
static float input_at(const cpu_kernels *k, const float *x, int32_t i) {
    return k->linear_rounds ? ern_bf16_to_f32(ern_bf16_from_f32(x[i])) : x[i];
}

static void check_linear(const cpu_kernels *k, ern_order order, int32_t n_row, int32_t n_out, int32_t n_in) {
    const ern_linear w = draw_linear(order, n_out, n_in);
    const int64_t xs = n_in + draw_int(0, 5), ys = n_out + draw_int(0, 5);
    const float *x = floats((n_row - 1) * xs + n_in, 1.0f);
    int32_t *x_row = guard((size_t)n_row * sizeof *x_row), *y_row = guard((size_t)n_row * sizeof *y_row);
    float *scale = floats(n_row, 2.0f);
    for (int32_t r = 0; r < n_row; r++) x_row[r] = draw_int(0, n_row - 1), y_row[r] = n_row - 1 - r;
    const cpu_act act = round_rows(k, x, xs, n_row, n_in);
    for (int mode = 0; mode < 3; mode++) { /* plain; gathered and scaled onto y; added to y */
        float *y = mode ? floats((n_row - 1) * ys + n_out, 1.0f) : poison((n_row - 1) * ys + n_out);
        float *was = guard(((size_t)(n_row - 1) * (size_t)ys + (size_t)n_out) * sizeof *was);
        memcpy(was, y, ((size_t)(n_row - 1) * (size_t)ys + (size_t)n_out) * sizeof *was);
        cpu_linear_job j = {.w = &w, .x = x, .x_stride = xs, .y = y, .y_stride = ys, .add = mode > 0, .n_row = n_row};
        j.act = act;
        if (mode == 1) j.x_row = x_row, j.y_row = y_row, j.scale = scale;
        const int32_t cut = draw_int(0, n_out); /* two workers' shares */
        j.from = 0, j.to = cut;
        k->linear_bf16[order](&j);
        j.from = cut, j.to = n_out;
        k->linear_bf16[order](&j);
        for (int32_t r = 0; r < n_row; r++) {
            const float *xr = x + (mode == 1 ? x_row[r] : r) * xs;
            for (int32_t o = 0; o < n_out; o++) {
                double sum = 0, size = 0, s = mode == 1 ? (double)scale[r] : 1.0;
                for (int32_t i = 0; i < n_in; i++) {
                    const double p = (double)ern_linear_at(&w, o, i) * (double)input_at(k, xr, i);
                    sum += p, size += fabs(p);
                }
                const int64_t at = (mode == 1 ? y_row[r] : r) * ys + o;
                const double before = mode ? (double)was[at] : 0.0;
                near_to((double)y[at], before + s * sum, linear_chain(k, &w) * U * (fabs(s) * size + fabs(before)),
                        "linear", at);
            }
        }
        for (int32_t r = 0; r + 1 < n_row; r++) /* the gaps between rows are not ours */
            for (int64_t o = n_out; o < ys; o++) assert_memory_equal(&y[r * ys + o], &was[r * ys + o], sizeof(float));
    }
    guard_free();
}

/* Row r of a batch of n_row has the bits it has alone, wherever the outputs are cut. */
static void check_linear_rows(const cpu_kernels *k, ern_order order, int32_t n_row, int32_t n_out, int32_t n_in) {
    const ern_linear w = draw_linear(order, n_out, n_in);
    const float *x = floats((int64_t)n_row * n_in, 1.0f);
    float *all = poison((int64_t)n_row * n_out), *one = poison(n_out);
    const cpu_act act = round_rows(k, x, n_in, n_row, n_in);
    cpu_linear_job j = {.w = &w, .x = x, .x_stride = n_in, .y = all, .y_stride = n_out, .n_row = n_row, .to = n_out};
    j.act = act;
    k->linear_bf16[order](&j);
    for (int32_t r = 0; r < n_row; r++) {
        cpu_linear_job a = {
            .w = &w, .x = x + (int64_t)r * n_in, .x_stride = n_in, .y = one, .y_stride = n_out, .n_row = 1};
        if (act.q) a.act.q = (ern_bf16 *)act.q + r * cpu_act_stride(n_in);
        const int32_t cut = draw_int(0, n_out);
        a.to = cut;
        k->linear_bf16[order](&a);
        a.from = cut, a.to = n_out;
        k->linear_bf16[order](&a);
        if (memcmp(one, all + (int64_t)r * n_out, (size_t)n_out * sizeof *one) != 0)
            fail_msg("row %d of %d differs from itself alone: %d x %d, order %d (seed %" PRIu64 ")", r, n_row, n_out,
                     n_in, order, seed);
    }
    guard_free();
}

/* Panels have the bits of the rows they were made from, whoever takes which of them. */
static void check_panels(const cpu_kernels *k, int32_t n_row, int32_t n_out, int32_t n_in) {
    const ern_linear w = draw_linear(ERN_ORDER_OUT_IN, n_out, n_in);
    const int32_t outs = k->panel_out, n_panel = cpu_panels(outs, n_out), half = draw_int(0, n_panel);
    const size_t bytes = (size_t)n_panel * (size_t)cpu_panel_numbers(outs, n_in) * sizeof(ern_bf16);
    const int64_t n = (int64_t)n_row * n_out;
    ern_linear p = w;
    ern_bf16 *panel = guard(bytes);
    memset(panel, 0xff, bytes); /* NaN */
    cpu_panels_fill(panel, outs, &w, half, n_panel);
    cpu_panels_fill(panel, outs, &w, 0, half);
    p.data = panel, p.stride = 0;
    const float *x = floats((int64_t)n_row * n_in, 1.0f);
    float *scale = floats(n_row, 2.0f);
    for (int add = 0; add < 2; add++) {
        float *want = add ? floats(n, 1.0f) : poison(n), *got = poison(n);
        if (add) memcpy(got, want, (size_t)n * sizeof *got);
        cpu_linear_job j = {.w = &w, .x = x, .x_stride = n_in, .y = want, .y_stride = n_out, .n_row = n_row};
        j.act = round_rows(k, x, n_in, n_row, n_in);
        j.to = n_out, j.add = add, j.scale = add ? scale : NULL;
        k->linear_bf16[ERN_ORDER_OUT_IN](&j);
        j.w = &p, j.y = got;
        for (int32_t cut = draw_int(0, n_panel) * outs, turn = 0; turn < 2; turn++) {
            j.from = turn ? cut : 0;
            j.to = turn || cut > n_out ? n_out : cut;
            if (j.from < j.to) k->linear_bf16[ERN_ORDER_OUT_IN](&j);
        }
        if (memcmp(want, got, (size_t)n * sizeof *got) != 0)
            fail_msg("panels differ from rows: %d rows, %d x %d (seed %" PRIu64 ")", n_row, n_out, n_in, seed);
    }
    guard_free();
}

static void test_panels(void **state) {
    const cpu_kernels *k = *state;
    if (k->panel_out == 0) return;
    for (int32_t n_row = 1; n_row <= 40; n_row++) check_panels(k, n_row, draw_int(1, 300), draw_int(1, 300));
    for (int32_t n_in = 1; n_in <= 70; n_in++) check_panels(k, draw_int(1, 8), draw_int(1, 20), n_in);
    check_panels(k, 13, 70, 2100);
    check_panels(k, 1, 37, 3072);
}

static void test_linear(void **state) {
    const cpu_kernels *k = *state;
    for (int order = 0; order < 2; order++) {
        for (int i = 0; i < 60; i++)
            check_linear(k, (ern_order)order, draw_int(1, 20), draw_int(1, 200), draw_int(1, 300));
        check_linear(k, (ern_order)order, 3, 37, 2561); /* over several blocks of K, with a tail */
        check_linear(k, (ern_order)order, 9, 129, 1024);
    }
}

/* On f32 activations they are those of another level, which its own checks judge. */
static void test_linear_exact(void **state) {
    const cpu_kernels *k = *state;
    for (int order = 0; order < 2; order++)
        assert_ptr_equal(
            (void *)(uintptr_t)k->exact_bf16[order],
            (void *)(uintptr_t)(k->linear_rounds ? cpu_kernels_avx512.linear_bf16[order] : k->linear_bf16[order]));
}

static void test_linear_rows(void **state) {
    const cpu_kernels *k = *state;
    for (int order = 0; order < 2; order++) {
        for (int32_t n_row = 1; n_row <= 64; n_row++)
            check_linear_rows(k, (ern_order)order, n_row, draw_int(1, 300), draw_int(1, 200));
        check_linear_rows(k, (ern_order)order, 512, 150, 70);
        check_linear_rows(k, (ern_order)order, 13, 70, 2100);
    }
}

/* One output as the processor's manual defines it (linear_amx.c), by the bit. Nothing here comes near a denormal. */
static float tile_sum(const ern_linear *w, int32_t o, const float *x) {
    float sum = 0.0f;
    for (int32_t k = 0; k < w->n_in; k += 32) {
        float half[2] = {0.0f, 0.0f};
        for (int32_t i = k; i < k + 32 && i < w->n_in; i++)
            half[i % 2] = fmaf(ern_bf16_to_f32(ern_bf16_from_f32(x[i])), ern_linear_at(w, o, i), half[i % 2]);
        sum += half[0] + half[1];
    }
    return sum;
}

static void test_tile_law(void **state) {
    const cpu_kernels *k = *state;
    if (!k->linear_rounds) return;
    for (int round = 0; round < 40; round++) {
        const int32_t n_row = draw_int(1, 50), n_out = draw_int(1, 70), n_in = draw_int(1, round % 8 ? 200 : 1200);
        const ern_linear w = draw_linear((ern_order)(round % 2), n_out, n_in);
        const float *x = draw_rows(n_row, n_in);
        float *y = poison((int64_t)n_row * n_out);
        k->linear_bf16[w.order](&(cpu_linear_job){.w = &w,
                                                  .act = round_rows(k, x, n_in, n_row, n_in),
                                                  .y = y,
                                                  .y_stride = n_out,
                                                  .n_row = n_row,
                                                  .to = n_out});
        for (int32_t i = 0; i < n_row * n_out; i++) {
            const float want = tile_sum(&w, i % n_out, x + (int64_t)(i / n_out) * n_in);
            if (!(y[i] == want))
                fail_msg("tiles: %a, by their law %a (row %d of %d, %d x %d, seed %" PRIu64 ")", (double)y[i],
                         (double)want, i / n_out, n_row, n_out, n_in, seed);
        }
        guard_free();
    }
}

static void test_linear_f32(void **state) {
    const cpu_kernels *k = *state;
    for (int round = 0; round < 60; round++) {
        const int32_t n_out = draw_int(1, 70), n_in = draw_int(1, 700), cut = draw_int(0, n_out);
        const float *x = floats(n_in, 1.0f), *w = floats((int64_t)n_out * n_in, 1.0f);
        float *y = poison(n_out), *z = poison(n_out);
        k->linear_f32(y, x, w, n_out, n_in);
        for (int32_t o = 0; o < n_out; o++) {
            double sum = 0, size = 0;
            for (int32_t i = 0; i < n_in; i++) {
                const double p = (double)w[o * n_in + i] * (double)x[i];
                sum += p, size += fabs(p);
            }
            near_to((double)y[o], sum, (ceil(n_in / 16.0) + 6) * U * size, "linear_f32", o); /* 16 lanes, a tree */
        }
        if (cut > 0) k->linear_f32(z, x, w, cut, n_in);
        if (cut < n_out) k->linear_f32(z + cut, x, w + (int64_t)cut * n_in, n_out - cut, n_in);
        assert_memory_equal(y, z, (size_t)n_out * sizeof *y);
        guard_free();
    }
}

/* ---- quantized linear layers ------------------------------------------------------------------------------------- */

static const ern_dtype formats[] = {ERN_DTYPE_I8, ERN_DTYPE_I4, ERN_DTYPE_F8E4M3};

static ern_linear draw_tiles(ern_dtype t, int32_t n_out, int32_t n_in) {
    const ern_linear from = draw_linear(ERN_ORDER_OUT_IN, n_out, n_in);
    void *tile = guard(quant_tile_bytes(t, n_out, n_in)), *scale = guard(quant_scale_bytes(t, n_out, n_in));
    assert_true(quant_weights(tile, scale, t, &from, 0, n_out));
    return (ern_linear){
        .data = tile, .dtype = t, .order = ERN_ORDER_TILED, .n_out = n_out, .n_in = n_in, .scale = scale};
}

static cpu_act act_room(int32_t n_row, int32_t n_in, bool fp8) {
    const size_t n = (size_t)n_row * (size_t)cpu_act_stride(n_in), g = (size_t)n_row * (size_t)cpu_groups(n_in);
    cpu_act a = {.q = guard(n * (fp8 ? sizeof(float) : 1)),
                 .scale = guard(g * sizeof *a.scale),
                 .sum = guard(g * sizeof *a.sum)};
    memset(a.q, 0xff, n * (fp8 ? sizeof(float) : 1));
    return a;
}

static void quantize(const cpu_kernels *k, cpu_act a, const float *x, int32_t n_row, int32_t n_in, bool fp8) {
    for (int64_t r = 0; r < n_row; r++) {
        const int64_t q = r * cpu_act_stride(n_in), g = r * cpu_groups(n_in);
        if (fp8)
            k->quant_fp8((float *)a.q + q, a.scale + g, x + r * n_in, n_in);
        else
            k->quant_int8((int8_t *)a.q + q, a.scale + g, a.sum + g, x + r * n_in, n_in);
    }
}

/* What a kernel multiplies: activation i of a row without and with its scale. */
static double act_at(const cpu_act *a, const float *x, int64_t row, int32_t n_in, int32_t i, bool fp8, bool exact) {
    if (exact) return (double)x[row * n_in + i];
    const int64_t at = row * cpu_act_stride(n_in) + i;
    const double q = fp8 ? (double)((const float *)a->q)[at] : (double)((const int8_t *)a->q)[at];
    return q * (double)a->scale[row * cpu_groups(n_in) + i / ERN_ACT_GROUP];
}

/* int8 activations: the sums of groups are exact; a multiply-add per group (two roundings where there is none), the
 * output's scale, and onto y: a product and a sum. Else a group is a chain of at most 128 multiply-adds (one rounding
 * more where there are none), a tree of two levels, the product of two scales, and the rest as before. */
static double quant_chain(int32_t n_in, bool ints) {
    const int32_t group = n_in < ERN_ACT_GROUP ? n_in : ERN_ACT_GROUP;
    return (ints ? 0 : group + 1 + 2 + 1) + 2 * cpu_groups(n_in) + 1 + 2;
}

static void check_quant(const cpu_kernels *k, ern_dtype t, bool exact, int32_t n_row, int32_t n_out, int32_t n_in) {
    const ern_linear w = draw_tiles(t, n_out, n_in);
    const bool fp8 = t == ERN_DTYPE_F8E4M3;
    const int64_t ys = n_out + draw_int(0, 5);
    const size_t y_bytes = ((size_t)(n_row - 1) * (size_t)ys + (size_t)n_out) * sizeof(float);
    const float *x = draw_rows(n_row, n_in);
    const cpu_act act = act_room(n_row, n_in, fp8);
    int32_t *x_row = guard((size_t)n_row * sizeof *x_row), *y_row = guard((size_t)n_row * sizeof *y_row);
    float *scale = floats(n_row, 2.0f);
    quantize(k, act, x, n_row, n_in, fp8);
    for (int32_t r = 0; r < n_row; r++) x_row[r] = draw_int(0, n_row - 1), y_row[r] = n_row - 1 - r;
    for (int mode = 0; mode < 3; mode++) { /* plain; gathered and scaled onto y; added to y */
        float *y = mode ? floats((n_row - 1) * ys + n_out, 1.0f) : poison((n_row - 1) * ys + n_out);
        float *was = guard(y_bytes);
        memcpy(was, y, y_bytes);
        cpu_linear_job j = {.w = &w, .x = x, .x_stride = n_in, .act = act, .y = y, .y_stride = ys, .add = mode > 0};
        j.n_row = n_row;
        if (mode == 1) j.x_row = x_row, j.y_row = y_row, j.scale = scale;
        if (exact) j.act = (cpu_act){0};
        j.to = draw_int(0, n_out) / ERN_TILE_OUT * ERN_TILE_OUT; /* two workers' pieces */
        if (j.to > 0) cpu_linear_of(k, &w, exact)(&j);
        j.from = j.to, j.to = n_out;
        if (j.from < j.to) cpu_linear_of(k, &w, exact)(&j);
        for (int32_t r = 0; r < n_row; r++) {
            const int64_t xr = mode == 1 ? x_row[r] : r, at0 = (mode == 1 ? y_row[r] : r) * ys;
            const double s = mode == 1 ? (double)scale[r] : 1.0;
            for (int32_t o = 0; o < n_out; o++) {
                double sum = 0, size = 0, before = mode ? (double)was[at0 + o] : 0.0;
                for (int32_t i = 0; i < n_in; i++) {
                    double p = (double)quant_code_at(&w, o, i) * act_at(&act, x, xr, n_in, i, fp8, exact);
                    p *= fp8 ? (double)((const float *)w.scale)[o / 128 * cpu_groups(n_in) + i / 128]
                             : (double)ern_bf16_to_f32(((const ern_bf16 *)w.scale)[o]);
                    sum += p, size += fabs(p);
                }
                near_to((double)y[at0 + o], before + s * sum,
                        quant_chain(n_in, !fp8 && !exact) * U * (fabs(s) * size + fabs(before)), "quantized linear",
                        at0 + o);
            }
        }
        for (int32_t r = 0; r + 1 < n_row; r++) /* the gaps between rows are not ours */
            for (int64_t o = n_out; o < ys; o++) assert_memory_equal(&y[r * ys + o], &was[r * ys + o], sizeof(float));
    }
    guard_free();
}

static void test_quant(void **state) {
    const cpu_kernels *k = *state;
    for (size_t f = 0; f < sizeof formats / sizeof *formats; f++) {
        for (int exact = 0; exact < 2; exact++) {
            for (int i = 0; i < 60; i++)
                check_quant(k, formats[f], exact, draw_int(1, 40), draw_int(1, 200), draw_int(4, 300));
            for (int32_t n_row = 1; n_row <= 7; n_row++)
                check_quant(k, formats[f], exact, n_row, draw_int(1, 200), draw_int(4, 300));
            check_quant(k, formats[f], exact, 33, 64, 1024);
            check_quant(k, formats[f], exact, 3, 40, 3073);
            check_quant(k, formats[f], exact, 100, 100, 700);
            check_quant(k, formats[f], exact, 16, 112, 384); /* one tile of rows, an odd number of groups */
            check_quant(k, formats[f], exact, 150, 144, 400);
        }
    }
}

/* Row r of a batch has the bits it has alone, wherever the outputs are cut; and integer sums followed by fused
 * multiply-adds are the same at every level that has these. */
static void check_quant_rows(const cpu_kernels *k, ern_dtype t, bool exact, int32_t n_row, int32_t n_out,
                             int32_t n_in) {
    const ern_linear w = draw_tiles(t, n_out, n_in);
    const bool fp8 = t == ERN_DTYPE_F8E4M3;
    const float *x = draw_rows(n_row, n_in);
    const cpu_act act = act_room(n_row, n_in, fp8), alone = act_room(1, n_in, fp8);
    float *all = poison((int64_t)n_row * n_out), *one = poison(n_out), *other = poison((int64_t)n_row * n_out);
    quantize(k, act, x, n_row, n_in, fp8);
    cpu_linear_job j = {
        .w = &w, .x = x, .x_stride = n_in, .act = act, .y = all, .y_stride = n_out, .n_row = n_row, .to = n_out};
    cpu_linear_of(k, &w, exact)(&j);
    for (int32_t r = 0; r < n_row; r++) {
        quantize(k, alone, x + (int64_t)r * n_in, 1, n_in, fp8);
        cpu_linear_job a = j;
        a.x += (int64_t)r * n_in, a.act = alone, a.y = one, a.n_row = 1;
        a.to = draw_int(0, n_out) / ERN_TILE_OUT * ERN_TILE_OUT;
        if (a.to > 0) cpu_linear_of(k, &w, exact)(&a);
        a.from = a.to, a.to = n_out;
        if (a.from < a.to) cpu_linear_of(k, &w, exact)(&a);
        if (memcmp(one, all + (int64_t)r * n_out, (size_t)n_out * sizeof *one) != 0)
            fail_msg("row %d of %d differs from itself alone: %s %d x %d (seed %" PRIu64 ")", r, n_row,
                     ern_dtype_name(t), n_out, n_in, seed);
    }
    if (k->level > ERN_CPU_AVX2 && !fp8 && !exact) {
        j.y = other;
        cpu_linear_of(&cpu_kernels_avx2, &w, false)(&j);
        assert_memory_equal(other, all, (size_t)n_row * (size_t)n_out * sizeof *all);
    }
    guard_free();
}

static void test_quant_rows(void **state) {
    const cpu_kernels *k = *state;
    for (size_t f = 0; f < sizeof formats / sizeof *formats; f++) {
        for (int exact = 0; exact < 2; exact++) {
            for (int32_t n_row = 1; n_row <= 40; n_row++)
                check_quant_rows(k, formats[f], exact, n_row, draw_int(1, 200), draw_int(4, 300));
            check_quant_rows(k, formats[f], exact, 130, 150, 70);
            check_quant_rows(k, formats[f], exact, 13, 70, 2100);
            check_quant_rows(k, formats[f], exact, 150, 70, 1300); /* weights of tiles that are kept, for many rows */
            if (!exact) check_quant_rows(k, formats[f], exact, 70, 70, 3200);  /* ... that are too many to be kept */
            if (!exact) check_quant_rows(k, formats[f], exact, 340, 20, 3200); /* rows in several parts */
        }
    }
}

/* q and scale have the bits of the law (the numbers of an fp8 code, where the kernel writes them out). */
static void check_act(const cpu_kernels *k, const float *x, int32_t n) {
    const cpu_act a = act_room(1, n, false), b = act_room(1, n, true);
    int8_t *q = guard((size_t)n);
    uint8_t *code = guard((size_t)n);
    float *scale = guard((size_t)cpu_groups(n) * sizeof *scale);
    quantize(k, a, x, 1, n, false);
    quant_act_int8(q, scale, x, n);
    assert_memory_equal(a.q, q, (size_t)n);
    assert_memory_equal(a.scale, scale, (size_t)cpu_groups(n) * sizeof *scale);
    for (int64_t i = n; i < cpu_act_width(n); i++) assert_int_equal(((const int8_t *)a.q)[i], 0);
    for (int32_t g = 0; g < cpu_groups(n); g++) {
        int32_t sum = 0;
        for (int32_t i = g * ERN_ACT_GROUP; i < n && i < (g + 1) * ERN_ACT_GROUP; i++) sum += q[i];
        assert_int_equal(a.sum[g], sum);
    }
    quantize(k, b, x, 1, n, true);
    quant_act_fp8(code, scale, x, n);
    assert_memory_equal(b.scale, scale, (size_t)cpu_groups(n) * sizeof *scale);
    for (int64_t i = 0; i < cpu_act_width(n); i++) {
        const float want = i < n ? ern_e4m3_to_f32(code[i]) : 0.0f;
        if (!(((const float *)b.q)[i] == want))
            fail_msg("fp8 activation %d of %d: %g, expected %g (seed %" PRIu64 ")", (int)i, n,
                     (double)((const float *)b.q)[i], (double)want, seed);
    }
    guard_free();
}

static void test_act(void **state) {
    const cpu_kernels *k = *state;
    static const float odd[] = {0.0f, -0.0f, 0x1p-149f, 0x1p-126f, 1e-38f, 0x1.fffffep127f, INFINITY, NAN, 0x1p-95f};
    for (int round = 0; round < 600; round++) {
        const int32_t n = draw_int(1, 400);
        float *x = draw_rows(1, n);
        for (int32_t i = 0; round % 3 == 1 && i < n; i++) x[i] = (float)draw_int(-254, 254) * 0.5f; /* ties */
        for (int32_t i = 0; round % 3 == 2 && i < n; i++) { /* any bits, one group of the row in four */
            const uint32_t bits = (uint32_t)draw();
            if (draw() % 600 == 0) x[i] = odd[draw() % (sizeof odd / sizeof *odd)];
            if (round % 4 == 0) memcpy(&x[i], &bits, sizeof bits);
        }
        check_act(k, x, n);
    }
}

/* What is not finite stays visible: every output of the row is NaN, and of no other row. */
static void test_act_bad(void **state) {
    const cpu_kernels *k = *state;
    for (int f = 0; f < 6; f++) {
        const ern_linear w = draw_tiles(formats[f / 2], 50, 200);
        const bool fp8 = w.dtype == ERN_DTYPE_F8E4M3;
        float *x = floats(3 * 200, 1.0f), *y = poison(3 * 50);
        const cpu_act act = act_room(3, 200, fp8);
        x[200 + draw_int(0, 199)] = f % 2 ? INFINITY : NAN;
        quantize(k, act, x, 3, 200, fp8);
        cpu_linear_of(k, &w,
                      false)(&(cpu_linear_job){.w = &w, .act = act, .y = y, .y_stride = 50, .n_row = 3, .to = 50});
        for (int o = 0; o < 150; o++) assert_int_equal(isnan(y[o]), o >= 50 && o < 100);
        guard_free();
    }
}

/* ---- rows -------------------------------------------------------------------------------------------------------- */

static void test_norm(void **state) {
    const cpu_kernels *k = *state;
    for (int round = 0; round < 100; round++) {
        const int32_t n = draw_int(1, 700);
        const float *x = floats(n, round % 3 ? 1.0f : 1e-3f), eps = 1e-5f;
        const ern_bf16 *w = halves(n, 2.0f);
        float *y = poison(n), *in_place = guard((size_t)n * sizeof *in_place);
        memcpy(in_place, x, (size_t)n * sizeof *x);
        k->norm(y, x, w, n, eps);
        k->norm(in_place, in_place, w, n, eps);
        assert_memory_equal(y, in_place, (size_t)n * sizeof *y);
        double sum = 0;
        for (int32_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
        const double r = 1.0 / sqrt(sum / n + (double)eps);
        /* the sum of squares: n/16 steps and a tree, halved by the root; division, root, reciprocal, two products */
        const double c = (ceil(n / 16.0) + 7) / 2 + 5;
        for (int32_t i = 0; i < n; i++) {
            const double want = (double)x[i] * r * (double)ern_bf16_to_f32(w[i]);
            near_to((double)y[i], want, c * U * fabs(want), "norm", i);
        }
        guard_free();
    }
}

static void test_silu_mul(void **state) {
    const cpu_kernels *k = *state;
    for (int round = 0; round < 100; round++) {
        const int32_t n = draw_int(1, 300);
        float *gate = floats(n, round % 4 ? 10.0f : 200.0f), *was = guard((size_t)n * sizeof *was);
        const float *up = floats(n, 3.0f);
        memcpy(was, gate, (size_t)n * sizeof *was);
        k->silu_mul(gate, up, n);
        for (int32_t i = 0; i < n; i++) {
            const double z = (double)was[i], want = z / (1.0 + exp(-z)) * (double)up[i];
            /* exp within 4u (Horner's last steps weigh 1, 0.35, 0.12 ...; the split of ln 2 is exact to u/8), then a
             * sum, a quotient or a reciprocal within 1.1 u and a product, a product. Where exp(-z) is held at exp(88)
             * the true value is below 1e-35. */
            near_to((double)gate[i], want, 8.1 * U * fabs(want) + 1e-34, "silu_mul", i);
        }
        guard_free();
    }
}

static void test_silu_int8(void **state) {
    const cpu_kernels *k = *state;
    for (int round = 0; k->silu_int8 && round < 100; round++) {
        const int32_t n = ERN_ACT_GROUP;
        float *gate = floats(n, round % 4 ? 10.0f : 200.0f), scale[2];
        const float *up = floats(n, round % 5 ? 3.0f : 0.0f);
        int8_t *q = guard((size_t)n), *want = guard((size_t)n);
        int32_t sum[2];
        if (round % 10 == 3) gate[draw_int(0, n - 1)] = NAN;
        k->silu_int8(q, &scale[0], &sum[0], gate, up);
        k->silu_mul(gate, up, n);
        k->quant_int8(want, &scale[1], &sum[1], gate, n);
        assert_memory_equal(q, want, (size_t)n);
        assert_memory_equal(&scale[0], &scale[1], sizeof scale[0]);
        assert_int_equal(sum[0], sum[1]);
        guard_free();
    }
}

static void test_rope(void **state) {
    const cpu_kernels *k = *state;
    for (int round = 0; round < 100; round++) {
        const int32_t C = 2 * draw_int(1, CPU_HEAD_DIM_MAX / 2), H = draw_int(1, 5), n = H * C;
        float *x = floats(n, 10.0f), *was = guard((size_t)n * sizeof *was);
        const float *table = floats(C, 1.0f);
        memcpy(was, x, (size_t)n * sizeof *was);
        k->rope(x, table, H, C);
        for (int32_t i = 0; i < n; i += 2) {
            const float c = table[i % C / 2], s = table[C / 2 + i % C / 2];
            const float even = was[i] * c - was[i + 1] * s, odd = was[i + 1] * c + was[i] * s;
            assert_memory_equal(&x[i], &even, sizeof even);
            assert_memory_equal(&x[i + 1], &odd, sizeof odd);
        }
        guard_free();
    }
}

static void test_softmax(void **state) {
    const cpu_kernels *k = *state;
    for (int round = 0; round < 100; round++) {
        const int32_t n = draw_int(1, 130);
        float *x = floats(n, round % 4 ? 8.0f : 60.0f), *was = guard((size_t)n * sizeof *was);
        memcpy(was, x, (size_t)n * sizeof *was);
        k->softmax(x, n);
        double top = -INFINITY, sum = 0;
        for (int32_t i = 0; i < n; i++) top = fmax(top, (double)was[i]);
        for (int32_t i = 0; i < n; i++) sum += exp((double)was[i] - top);
        for (int32_t i = 0; i < n; i++) {
            const double d = top - (double)was[i], want = exp(-d) / sum;
            /* the difference is rounded once, d*u in the exponent, here and weighed in the sum (there d e^-d < 1); exp
             * 4u twice; a sum of n; a quotient. Below exp(-87.3) the result is 0. */
            near_to((double)x[i], want, (d + 1 + 8 + n + 1) * U * want + 1e-37, "softmax", i);
        }
        guard_free();
    }
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

/* Keys and values in dense rows [n, C]: bf16 numbers, or codes and a scale a row. */
typedef struct dense {
    bool int8;
    int32_t n, C;
    ern_bf16 *half[2]; /* K, V */
    int8_t *code[2];
    float *scale[2];
} dense;

static dense draw_dense(int32_t n, int32_t C, bool int8) {
    dense d = {.int8 = int8, .n = n, .C = C};
    for (int w = 0; w < 2; w++) {
        if (!int8) {
            d.half[w] = halves((int64_t)n * C, 1.0f);
            continue;
        }
        d.code[w] = guard((size_t)n * (size_t)C);
        for (int64_t i = 0; i < (int64_t)n * C; i++) d.code[w][i] = (int8_t)draw_int(-127, 127);
        d.scale[w] = floats(n, 1.0f / 127);
        for (int32_t t = 0; t < n; t++) d.scale[w][t] = t % 9 == 4 ? 0.0f : fabsf(d.scale[w][t]);
    }
    return d;
}

static double dense_at(const dense *d, int which, int32_t t, int32_t c) {
    const int64_t i = (int64_t)t * d->C + c;
    if (d->int8) return (double)d->code[which][i] * (double)d->scale[which][t];
    return (double)ern_bf16_to_f32(d->half[which][i]);
}

/* The same spread over shuffled pages of P cells. Every other cell is NaN: bf16 NaNs, or codes of -128 with scales of
 * NaN and 1e38. One page has one plane of K and one of V. */
static cpu_kv_view draw_cache(const dense *d, int32_t P) {
    const int32_t used = (d->n + P - 1) / P, pages = used + 3, C = d->C;
    const int64_t plane = cpu_kv_plane_bytes(P, C, d->int8), stride = plane + 64 * draw_int(0, 3);
    const int64_t scales = (int64_t)P * C;
    const size_t bytes = (size_t)((pages - 1) * stride + plane);
    unsigned char *at[2] = {guard(bytes), guard(bytes)};
    int32_t *page = guard((size_t)used * sizeof *page), *order = malloc((size_t)pages * sizeof *order);
    for (int32_t i = 0; i < pages; i++) order[i] = i;
    for (int32_t i = pages - 1; i > 0; i--) {
        const int32_t other = draw_int(0, i), kept = order[i];
        order[i] = order[other], order[other] = kept;
    }
    memcpy(page, order, (size_t)used * sizeof *page);
    free(order);
    for (int w = 0; w < 2; w++) {
        for (size_t i = 0; i + 1 < bytes; i += 2) memcpy(at[w] + i, d->int8 ? "\x80\x80" : "\xc0\x7f", 2);
        for (int64_t p = 0; d->int8 && p < pages; p++)
            for (int64_t i = 0; i < P; i++) {
                const float bad = i % 2 ? NAN : 1e38f;
                memcpy(at[w] + p * stride + scales + 4 * i, &bad, sizeof bad);
            }
        for (int32_t t = 0; t < d->n; t++) {
            unsigned char *to = at[w] + page[t / P] * stride;
            const int32_t cell = t % P;
            for (int32_t c = 0; c < C; c++) {
                const size_t e = kv_drawn_at(w, (size_t)cell, (size_t)c, (size_t)C, d->int8);
                const int64_t from = (int64_t)t * C + c;
                if (d->int8)
                    memcpy(to + e, &d->code[w][from], 1);
                else
                    memcpy(to + 2 * e, &d->half[w][from], 2);
            }
            if (d->int8) memcpy(to + scales + 4 * cell, &d->scale[w][t], sizeof(float));
        }
    }
    return (cpu_kv_view){.k = at[0], .v = at[1], .page = page, .page_stride = stride, .n_cell = P, .int8 = d->int8};
}

/* All blocks of the first n positions, joined chain by chain, as the step does it; `found` positions are looked up, as
 * for a later row. */
static void attend(const cpu_kernels *k, float *acc, const float *q, int32_t n_head, int32_t C, float scale,
                   const cpu_kv_view *kv, int32_t n, int32_t found) {
    const size_t bytes = (size_t)cpu_part_floats(C) * sizeof(float);
    const int32_t chained = CPU_ATTN_CHAIN * CPU_ATTN_BLOCK;
    float *part = malloc(bytes), *own = malloc(bytes);
    static cpu_kv_block block;
    memset(acc, 0xff, bytes);
    memset(part, 0xff, bytes);
    memset(own, 0xff, bytes);
    for (int32_t from = 0; from < n; from += chained) {
        float *chain = from ? own : acc;
        for (int32_t at = from; at < n && at < from + chained; at += CPU_ATTN_BLOCK) {
            const int32_t left = found - at < CPU_ATTN_BLOCK ? found - at : CPU_ATTN_BLOCK;
            cpu_kv_find(&block, kv, C, at, left);
            k->attn_block[kv->int8](at > from ? part : chain, q, n_head, C, scale, &block,
                                    n - at < left ? n - at : left);
            if (at > from) k->attn_join(chain, part, n_head, C);
        }
        if (from) k->attn_join(acc, chain, n_head, C);
    }
    free(part);
    free(own);
}

static void same_part(const float *a, const float *b, int32_t n_head, int32_t C) {
    assert_memory_equal(a, b, (size_t)n_head * sizeof *a);
    assert_memory_equal(a + CPU_HEAD_TILE, b + CPU_HEAD_TILE, (size_t)n_head * sizeof *a);
    assert_memory_equal(a + 2 * CPU_HEAD_TILE, b + 2 * CPU_HEAD_TILE, (size_t)(n_head * C) * sizeof *a);
}

static void check_attn(const cpu_kernels *k, int32_t n, int32_t n_head, int32_t C, bool int8) {
    const float scale = (float)(0x1.71547652b82fep+0 / sqrt((double)C)), *q = floats((int64_t)n_head * C, 3.0f);
    const dense d = draw_dense(n, C, int8);
    const bool rounds = k->attn_rounds && !int8, fixed = k->attn_fixed && int8;
    const cpu_kv_view view = draw_cache(&d, 64);
    float *acc = guard((size_t)cpu_part_floats(C) * sizeof *acc), *other = guard((size_t)cpu_part_floats(C) * 4);
    attend(k, acc, q, n_head, C, scale, &view, n, n);
    double *score = malloc((size_t)n * sizeof *score);
    for (int32_t h = 0; h < n_head; h++) {
        double top = -INFINITY, sum = 0, slip = 0, most = 0;
        for (int32_t i = 0; i < C; i++) most = fmax(most, fabs((double)q[h * C + i]));
        for (int32_t t = 0; t < n; t++) {
            double dot = 0, size = 0, keys = 0;
            for (int32_t i = 0; i < C; i++) {
                const double key = dense_at(&d, 0, t, i), p = (double)q[h * C + i] * key;
                dot += p, size += fabs(p), keys += fabs(key);
            }
            score[t] = dot / sqrt((double)C);
            top = fmax(top, score[t]);
            /* a chain over C; log2(e)/sqrt(C) is rounded, times the key's scale, times the sum; a query to bf16 */
            slip = fmax(slip, ((C + 3) * U + (rounds ? 0x1p-9 : 0)) * size / sqrt((double)C));
            /* with integers no chain, but a query to half a unit, and 5 roundings more: the unit, the sum, products */
            if (fixed) slip = fmax(slip, (0.501 / 16256 * most * keys + 8 * U * size) / sqrt((double)C));
        }
        for (int32_t t = 0; t < n; t++) sum += score[t] = exp(score[t] - top);
        /* A score off by slip scales its weight by 1 +- slip, in numerator and denominator; the differences to the
         * maxima (below 64 here) are rounded once per block and join; 2^x 4u each; a chain of one block (256) and two
         * steps and one weight per join, and the value's scale; the same for the sum; a quotient. Weights rounded to
         * bf16 are so in both, and 2^x is within 2^-17.9 before that. */
        /* with integers a weight times its value's scale is rounded to half a unit, which is of the block's largest */
        double unit[64] = {0};
        assert_true(n <= 64 * CPU_ATTN_BLOCK);
        for (int32_t t = 0; fixed && t < n; t++) {
            double *u = &unit[t / CPU_ATTN_BLOCK];
            *u = fmax(*u, (1 + expm1(2 * slip)) * score[t] * (double)d.scale[1][t] / 65535);
        }
        const double joins = ceil(n / (double)CPU_ATTN_BLOCK) + ceil(n / (double)(CPU_ATTN_CHAIN * CPU_ATTN_BLOCK));
        const double rel = expm1(2 * slip) + (rounds ? 2 * (0x1p-9 + 0x1.1p-18) : 0) +
                           2 * U * (64 + 4 + (n < 256 ? n : 256) + 1 + joins * (64 + 4 + 3)) + 2 * U;
        for (int32_t i = 0; i < C; i++) {
            double dot = 0, size = 0, off = 0;
            for (int32_t t = 0; t < n; t++) {
                const double p = score[t] * dense_at(&d, 1, t, i);
                dot += p, size += fabs(p);
                if (fixed) off += 0.501 * unit[t / CPU_ATTN_BLOCK] * abs(d.code[1][(int64_t)t * C + i]);
            }
            near_to((double)acc[2 * CPU_HEAD_TILE + h * C + i] / (double)acc[CPU_HEAD_TILE + h], dot / sum,
                    (rel * size + off) / sum, "attn", h * C + i);
        }
    }
    free(score);
    float *out = poison((int64_t)n_head * C);
    k->attn_divide(out, acc, n_head, C);
    for (int32_t i = 0; i < n_head * C; i++) {
        const float by = 1.0f / acc[CPU_HEAD_TILE + i / C], want = acc[2 * CPU_HEAD_TILE + i] * by;
        assert_memory_equal(&out[i], &want, sizeof want);
    }
    for (int P = 16; P <= 304; P += P / 32 * 16 + 16) { /* other pages, other places: the same bits */
        const cpu_kv_view v = draw_cache(&d, P);
        attend(k, other, q, n_head, C, scale, &v, n, n);
        same_part(other, acc, n_head, C);
    }
    /* an earlier row of the same tile sees less of a block that was looked up for the last row; what it does not see
     * may be NaN */
    const int32_t m = draw_int(1, n);
    attend(k, acc, q, n_head, C, scale, &view, m, m);
    dense cut = d;
    cut.n = m;
    const cpu_kv_view v = draw_cache(&cut, 16);
    attend(k, other, q, n_head, C, scale, &v, m, m);
    same_part(other, acc, n_head, C);
    attend(k, other, q, n_head, C, scale, &view, m, n);
    same_part(other, acc, n_head, C);
    guard_free();
}

/* Rows at once have the bits that each has alone: from position pos0 on, one behind the other or with gaps of up to
 * `gap`. bad: a value that the earlier rows do not see is not a number. */
static void check_attn_rows(const cpu_kernels *k, int32_t pos0, int32_t n_row, int32_t n_head, int32_t C, int32_t gap,
                            bool bad) {
    int32_t pos[CPU_ATTN_ROWS] = {pos0};
    for (int32_t r = 1; r < n_row; r++) pos[r] = pos[r - 1] + 1 + draw_int(0, gap);
    const int32_t n = pos[n_row - 1] + 1, P = 16 * draw_int(1, 5);
    const float scale = (float)(0x1.71547652b82fep+0 / sqrt((double)C));
    const dense d = draw_dense(n, C, false);
    if (bad) d.half[1][(int64_t)(n - 1) * C + draw_int(0, C - 1)] = draw() % 2 ? 0x7f80 : 0xffc1;
    const cpu_kv_view view = draw_cache(&d, P);
    const size_t part_bytes = (size_t)cpu_part_floats(C) * sizeof(float);
    const float *q[CPU_ATTN_ROWS];
    float *part[CPU_ATTN_ROWS], *chain[CPU_ATTN_ROWS], *want = guard(part_bytes);
    const int32_t chained = CPU_ATTN_CHAIN * CPU_ATTN_BLOCK;
    int32_t seen[CPU_ATTN_ROWS];
    static cpu_kv_block block;
    cpu_attn_job j = {.n_head = n_head, .head_dim = C, .scale = scale, .room = aligned_alloc(64, cpu_attn_room())};
    const float *all = floats((int64_t)n_row * n_head * C, 3.0f);
    memset(j.room, 0xff, cpu_attn_room());
    for (int32_t r = 0; r < n_row; r++) {
        part[r] = malloc(part_bytes), chain[r] = malloc(part_bytes);
        memset(part[r], 0xff, part_bytes), memset(chain[r], 0xff, part_bytes);
    }
    for (int32_t at = 0, last = -1; at < n; at += CPU_ATTN_BLOCK) {
        int32_t first = 0;
        while (pos[first] < at) first++;
        for (int32_t r = first; r < n_row; r++) {
            const int32_t left = pos[r] + 1 - at;
            seen[r - first] = left < CPU_ATTN_BLOCK ? left : CPU_ATTN_BLOCK,
                     q[r - first] = all + (int64_t)r * n_head * C;
        }
        cpu_kv_find(&block, &view, C, at, seen[n_row - 1 - first]);
        j.part = (at < chained ? part : chain) + first, j.q = q, j.n = seen, j.n_row = n_row - first, j.kv = &block;
        j.first = first != last, j.join = at % chained > 0;
        k->attn_rows(&j);
        last = first;
        const int32_t from = at / chained * chained, next = at + CPU_ATTN_BLOCK;
        for (int32_t r = 0; from > 0 && (next >= n || next % chained == 0) && r < n_row; r++)
            if (pos[r] >= from) k->attn_join(part[r], chain[r], n_head, C);
    }
    for (int32_t r = 0; r < n_row; r++) {
        attend(k, want, all + (int64_t)r * n_head * C, n_head, C, scale, &view, pos[r] + 1, pos[r] + 1);
        same_part(part[r], want, n_head, C);
        for (int32_t i = 0; bad && r + 1 < n_row && i < n_head * C; i++)
            assert_true(isfinite(part[r][2 * CPU_HEAD_TILE + i]));
        free(part[r]);
        free(chain[r]);
    }
    free(j.room);
    guard_free();
}

/* A score of -inf is a weight of 0, as one far below the others is. */
static void test_attn_infinite(void **state) {
    const cpu_kernels *k = *state;
    for (int i = 0; i < 20; i++) {
        const int32_t n = draw_int(2, 300), n_head = draw_int(1, CPU_HEAD_TILE), C = i % 2 ? 128 : 2 * draw_int(1, 64);
        const size_t bytes = (size_t)cpu_part_floats(C) * sizeof(float);
        const float scale = (float)(0x1.71547652b82fep+0 / sqrt((double)C));
        float *q = floats((int64_t)n_head * C, 3.0f), *acc = guard(bytes), *other = guard(bytes);
        for (int32_t h = 0; h < n_head; h++) q[h * C] = 0.5f;
        const dense d = draw_dense(n, C, false);
        ern_bf16 *key = &d.half[0][(int64_t)draw_int(0, n - 1) * C];
        *key = 0xff7f; /* the least number */
        const cpu_kv_view least = draw_cache(&d, 64);
        *key = 0xff80;
        const cpu_kv_view none = draw_cache(&d, 64);
        attend(k, acc, q, n_head, C, scale, &least, n, n);
        attend(k, other, q, n_head, C, scale, &none, n, n);
        same_part(other, acc, n_head, C);
        for (int32_t c = 0; c < n_head * C; c++) assert_true(isfinite(other[2 * CPU_HEAD_TILE + c]));
        guard_free();
    }
}

static void test_attn_rows(void **state) {
    const cpu_kernels *k = *state;
    if (!k->attn_rows) return;
    for (int i = 0; i < 60; i++)
        check_attn_rows(k, draw_int(0, 300), draw_int(1, CPU_ATTN_ROWS), draw_int(1, CPU_HEAD_TILE),
                        i % 2 ? 128 : 2 * draw_int(1, CPU_HEAD_DIM_MAX / 2), i % 3 == 1 ? draw_int(1, 40) : 0,
                        i % 5 == 0);
    check_attn_rows(k, 240, CPU_ATTN_ROWS, 8, 128, 0, false);
    check_attn_rows(k, 500, CPU_ATTN_ROWS - 1, 5, 128, 0, true);
    check_attn_rows(k, 0, CPU_ATTN_ROWS, 8, 256, 0, false);
    check_attn_rows(k, 3, CPU_ATTN_ROWS, 8, 128, 60, false);
}

static void test_attn(void **state) {
    const cpu_kernels *k = *state;
    for (int int8 = 0; int8 < 2; int8++) {
        for (int32_t n_head = 1; n_head <= CPU_HEAD_TILE; n_head++) {
            check_attn(k, draw_int(1, 300), n_head, 128, int8);
            check_attn(k, draw_int(1, 70), n_head, 2 * draw_int(1, CPU_HEAD_DIM_MAX / 2), int8);
        }
        check_attn(k, 1, 8, 128, int8);
        check_attn(k, 256, 5, 128, int8);
        check_attn(k, 257, 5, 64, int8);
        check_attn(k, 2100, 5, 128, int8);
    }
}

/* A level that the machine lacks is never handed out; the table for a level never asks more than it. */
static void test_table(void **state) {
    (void)state;
    for (int level = ERN_CPU_PORTABLE; level <= ERN_CPU_AMX; level++)
        assert_true(cpu_kernels_for((ern_cpu_level)level)->level <= (ern_cpu_level)level);
}

int main(int argc, char **argv) {
    seed = argc > 1 ? strtoull(argv[1], NULL, 10) : (uint64_t)getpid() * 1000003u + (uint64_t)ern_wall_s();
    const cpu_kernels *table[CPU_TABLES];
    int n = cpu_kernels_here(table), failed = 0;
#if defined(AMX_EMULATED)
    const bool can = ern_cpu_level_here() >= ERN_CPU_AVX512 && cpu_kernels_for(ERN_CPU_AMX) == &cpu_kernels_amx;
    if (!can) printf("no AVX-512 VNNI here: AMX is not emulated, its kernels did not run\n");
    table[0] = &cpu_kernels_amx;
    n = can;
#endif
    for (int i = 0; i < n; i++) {
        void *k = (void *)(uintptr_t)table[i];
        printf("level %s, seed %" PRIu64 "\n", table[i]->name, seed);
        const struct CMUnitTest tests[] = {
            cmocka_unit_test_prestate(test_linear, k),       cmocka_unit_test_prestate(test_linear_rows, k),
            cmocka_unit_test_prestate(test_panels, k),       cmocka_unit_test_prestate(test_tile_law, k),
            cmocka_unit_test_prestate(test_linear_exact, k), cmocka_unit_test_prestate(test_quant, k),
            cmocka_unit_test_prestate(test_quant_rows, k),   cmocka_unit_test_prestate(test_act, k),
            cmocka_unit_test_prestate(test_act_bad, k),      cmocka_unit_test_prestate(test_linear_f32, k),
            cmocka_unit_test_prestate(test_norm, k),         cmocka_unit_test_prestate(test_silu_mul, k),
            cmocka_unit_test_prestate(test_silu_int8, k),    cmocka_unit_test_prestate(test_rope, k),
            cmocka_unit_test_prestate(test_softmax, k),      cmocka_unit_test_prestate(test_attn, k),
            cmocka_unit_test_prestate(test_attn_rows, k),    cmocka_unit_test_prestate(test_attn_infinite, k),
            cmocka_unit_test_prestate(test_table, k),
        };
        failed += cmocka_run_group_tests(tests, NULL, NULL);
    }
    if (n > 0 && table[n - 1] != &cpu_kernels_amx) printf("level amx: not on this machine; its kernels did not run\n");
    return failed;
}
