/* The law of quantized weights and activations (model/quant.h) against twins that work in double and one element at a
 * time. A double quotient or product of two f32 numbers, rounded to f32, is the f32 operation's own result, because a
 * double has more than twice the bits: so the twins are exact, and every comparison here is for equality. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/counter.h"
#include "model/quant.h"

/* ---- twins -------------------------------------------------------------------------------------------------------
 */

/* The value of an e4m3 code, from the definition: sign, exponent - 7, three bits of mantissa. */
static double e4m3_value(int code) {
    const int e = code >> 3 & 15, m = code & 7;
    if ((code & 0x7f) == 0x7f) return NAN;
    const double v = e ? ldexp(8 + m, e - 10) : ldexp(m, -9);
    return code & 0x80 ? -v : v;
}

/* The nearest code: of two equally near the even one. Looked for, not computed. */
static int e4m3_nearest(double x) {
    int best = 0;
    if (isnan(x)) return signbit(x) ? 0xff : 0x7f;
    for (int c = 1; c < 0x7f; c++) {
        const double d = fabs(e4m3_value(c) - fabs(x)), b = fabs(e4m3_value(best) - fabs(x));
        if (d < b || (!(d > b) && c % 2 == 0)) best = c;
    }
    return best | (signbit(x) ? 0x80 : 0);
}

static float bf16_nearest(double x) {
    int e;
    const double m = frexp(x, &e); /* [0.5, 1): eight bits of it */
    return (float)ldexp(rint(ldexp(m, 8)), e - 8);
}

static double half_away(double x) { return x < 0 ? -floor(-x + 0.5) : floor(x + 0.5); }

/* ---- linears to quantize -----------------------------------------------------------------------------------------
 */

enum { OUT_MAX = 300, IN_MAX = 330, PAD = 7 };

typedef struct made {
    ern_bf16 data[(OUT_MAX + PAD) * (IN_MAX + PAD)];
    ern_linear w, q; /* q: quantized */
    _Alignas(64) uint8_t tile[(OUT_MAX + 16) * (IN_MAX + 64)];
    _Alignas(64) uint8_t scale[OUT_MAX * 2 + 64];
} made;

static made m; /* one at a time */

/* Random weights in a window of a larger tensor. Some rows are zero, some hold ties, signs of zero and tiny numbers. */
static void make(ern_order order, int32_t n_out, int32_t n_in, uint64_t seed) {
    const bool turned = order == ERN_ORDER_IN_OUT;
    assert_true(n_out <= OUT_MAX && n_in <= IN_MAX);
    m.w = (ern_linear){.data = m.data + 3,
                       .dtype = ERN_DTYPE_BF16,
                       .order = order,
                       .n_out = n_out,
                       .n_in = n_in,
                       .stride = (turned ? n_out : n_in) + PAD};
    for (size_t i = 0; i < sizeof m.data / sizeof *m.data; i++) m.data[i] = 0x7fc0; /* NaN around the window */
    for (int32_t o = 0; o < n_out; o++) {
        for (int32_t i = 0; i < n_in; i++) {
            const uint64_t r = ern_counter64(seed, (uint64_t)o * 100003 + (uint64_t)i);
            float v = ((float)(r >> 40) * 0x1p-24f - 0.5f) * (o % 5 == 4 ? 1e-30f : 0.1f);
            if (o % 7 == 3) v = r & 1 ? 0.0f : -0.0f;
            if (o % 7 == 5) v = (float)((int)(r % 255) - 127) * 0.5f; /* with amax 63.5 or 127 * 0.5: ties */
            if (o % 7 == 5 && i == 0) v = 127;
            m.data[3 + (turned ? i * m.w.stride + o : o * m.w.stride + i)] = ern_bf16_from_f32(v);
        }
    }
}

static bool quantize(ern_dtype t, int32_t step) {
    memset(m.tile, 0x5a, sizeof m.tile);
    memset(m.scale, 0x5a, sizeof m.scale);
    assert_true(quant_tile_bytes(t, m.w.n_out, m.w.n_in) <= sizeof m.tile);
    assert_true(quant_scale_bytes(t, m.w.n_out, m.w.n_in) <= sizeof m.scale);
    m.q = (ern_linear){
        .data = m.tile, .dtype = t, .order = ERN_ORDER_TILED, .n_out = m.w.n_out, .n_in = m.w.n_in, .scale = m.scale};
    for (int32_t o = 0; o < m.w.n_out; o += step)
        if (!quant_weights(m.tile, m.scale, t, &m.w, o, o + step < m.w.n_out ? o + step : m.w.n_out)) return false;
    return true;
}

static void same(float found, double expected, const char *what, int32_t o, int32_t i) {
    const float e = (float)expected;
    if (memcmp(&found, &e, sizeof e) != 0 && !(found == 0 && e == 0))
        fail_msg("%s of (%d, %d) of %s [%d, %d], order %d: expected %a, found %a", what, o, i,
                 ern_dtype_name(m.q.dtype), m.w.n_out, m.w.n_in, (int)m.w.order, (double)e, (double)found);
}

static void check_int(ern_dtype t) {
    const double top = t == ERN_DTYPE_I8 ? 127 : 7;
    for (int32_t o = 0; o < m.w.n_out; o++) {
        double amax = 0;
        for (int32_t i = 0; i < m.w.n_in; i++) amax = fmax(amax, fabs((double)ern_linear_at(&m.w, o, i)));
        const double scale = amax > 0 ? (double)bf16_nearest((double)(float)(amax / top)) : 0;
        same(quant_scale_at(&m.q, o, 0), scale, "scale", o, 0);
        for (int32_t i = 0; i < m.w.n_in; i++) {
            const float ratio = amax > 0 ? (float)((double)ern_linear_at(&m.w, o, i) / amax) : 0;
            double q = half_away((double)(float)((double)ratio * top));
            q = q > top ? top : q < -top ? -top : q;
            same(quant_code_at(&m.q, o, i), q, "code", o, i);
            same(ern_linear_at(&m.q, o, i), (double)(float)(q * scale), "value", o, i);
        }
    }
}

static void check_fp8(void) {
    for (int32_t o = 0; o < m.w.n_out; o++) {
        for (int32_t i = 0; i < m.w.n_in; i++) {
            double a = 0;
            for (int32_t p = o / 128 * 128; p < m.w.n_out && p < o / 128 * 128 + 128; p++)
                for (int32_t j = i / 128 * 128; j < m.w.n_in && j < i / 128 * 128 + 128; j++)
                    a = fmax(a, fabs((double)ern_linear_at(&m.w, p, j)));
            const float f = a > 0 ? (float)(448 / a) : 1;
            const double q = e4m3_value(e4m3_nearest((double)(float)((double)ern_linear_at(&m.w, o, i) * (double)f)));
            same(quant_scale_at(&m.q, o, i / 128), 1 / (double)f, "scale", o, i);
            same(quant_code_at(&m.q, o, i), q, "code", o, i);
            same(ern_linear_at(&m.q, o, i), q * (double)quant_scale_at(&m.q, o, i / 128), "value", o, i);
        }
    }
}

/* Every byte of the tiles, told by the drawing in quant.h rather than by byte_of. */
static void check_places(ern_dtype t) {
    const int32_t across = (m.w.n_in + 63) / 64, bands = (m.w.n_out + 15) / 16, each = t == ERN_DTYPE_I4 ? 512 : 1024;
    assert_int_equal(quant_tile_bytes(t, m.w.n_out, m.w.n_in), (uint64_t)bands * (uint64_t)across * (uint64_t)each);
    for (int32_t at = 0; at < bands * across * each; at++) {
        const int32_t tile = at / each, in = at % each, o0 = tile / across * 16, i0 = tile % across * 64;
        for (int half = 0; half < (t == ERN_DTYPE_I4 ? 2 : 1); half++) {
            int32_t o, i, code = m.tile[at];
            if (t == ERN_DTYPE_F8E4M3) {
                o = in % 16, i = in / 16;
            } else {
                o = in % 64 / 4, i = in / 64 * (t == ERN_DTYPE_I8 ? 4 : 8) + in % 4 + 4 * half;
            }
            if (t == ERN_DTYPE_I4) code = half ? code >> 4 : code & 15;
            const bool inside = o0 + o < m.w.n_out && i0 + i < m.w.n_in;
            const double stands = t == ERN_DTYPE_F8E4M3 ? e4m3_value(code) : code - (t == ERN_DTYPE_I8 ? 128 : 8);
            same((float)stands, inside ? (double)quant_code_at(&m.q, o0 + o, i0 + i) : 0.0, "byte", o0 + o, i0 + i);
        }
    }
    for (size_t at = (size_t)(bands * across * each); at < sizeof m.tile; at++) assert_int_equal(m.tile[at], 0x5a);
}

/* Ugly shapes, both orders, whole and in pieces. */
static void weights_follow_the_law(void **state) {
    (void)state;
    static const int32_t shape[][2] = {{1, 1}, {16, 64}, {17, 65}, {40, 200}, {129, 130}, {256, 128}, {300, 330}};
    static uint8_t whole[sizeof m.tile];
    for (size_t s = 0; s < sizeof shape / sizeof *shape; s++) {
        for (int k = 0; k < 6; k++) {
            const ern_dtype t = (ern_dtype)(ERN_DTYPE_I8 + k / 2);
            make(k % 2 ? ERN_ORDER_IN_OUT : ERN_ORDER_OUT_IN, shape[s][0], shape[s][1], s);
            assert_true(quantize(t, OUT_MAX + 16));
            if (t != ERN_DTYPE_F8E4M3)
                check_int(t);
            else if (s < 5) /* the twin is slow, and the small shapes have tails already */
                check_fp8();
            check_places(t);
            memcpy(whole, m.tile, sizeof whole);
            assert_true(quantize(t, 128));
            assert_memory_equal(whole, m.tile, sizeof whole);
        }
    }
}

/* Vectors worked out by hand. */
static void known_vectors(void **state) {
    (void)state;
    static const float row[] = {127, 63.5f, -0.5f, 0.5f, 1.5f, -126.5f, 0.25f, 0};
    static const float by8[] = {127, 64, -1, 1, 2, -127, 0, 0}, by4[] = {7, 4, 0, 0, 0, -7, 0, 0};
    memset(&m, 0, sizeof m);
    m.w = (ern_linear){.data = m.data, .dtype = ERN_DTYPE_BF16, .order = ERN_ORDER_OUT_IN, .n_out = 1, .n_in = 8};
    m.w.stride = 8;
    for (int i = 0; i < 8; i++) m.data[i] = ern_bf16_from_f32(row[i]);
    assert_true(quantize(ERN_DTYPE_I8, 16));
    for (int i = 0; i < 8; i++) same(quant_code_at(&m.q, 0, i), (double)by8[i], "code", 0, i);
    same(quant_scale_at(&m.q, 0, 0), 1, "scale", 0, 0);
    assert_true(quantize(ERN_DTYPE_I4, 16)); /* 63.5 is 3.5 of 7ths of 127: away from zero */
    for (int i = 0; i < 8; i++) same(quant_code_at(&m.q, 0, i), (double)by4[i], "code", 0, i);
    same(quant_scale_at(&m.q, 0, 0), 18.125, "scale", 0, 0); /* 18.142857 in eight bits */
    assert_true(quantize(ERN_DTYPE_F8E4M3, 16));
    same(quant_code_at(&m.q, 0, 0), 448, "code", 0, 0);
    same(quant_code_at(&m.q, 0, 1), 224, "code", 0, 1);
}

static void not_finite_is_refused(void **state) {
    (void)state;
    static const float bad[] = {INFINITY, -INFINITY, NAN, -NAN};
    for (int k = 0; k < 24; k++) {
        make(k % 2 ? ERN_ORDER_IN_OUT : ERN_ORDER_OUT_IN, 40, 70, 9);
        const ern_dtype t = (ern_dtype)(ERN_DTYPE_I8 + k / 2 % 3);
        assert_true(quantize(t, 128));
        m.data[3 + (k % 2 ? 69 * m.w.stride + 39 : 39 * m.w.stride + 69)] = ern_bf16_from_f32(bad[k / 6]);
        assert_false(quantize(t, 128));
    }
}

/* Blocks too small for a factor in f32 count as empty; rows as small as that are still told apart by int8. */
static void smallest_numbers(void **state) {
    (void)state;
    memset(&m, 0, sizeof m);
    m.w = (ern_linear){.data = m.data, .dtype = ERN_DTYPE_BF16, .order = ERN_ORDER_OUT_IN, .n_out = 1, .n_in = 2};
    m.w.stride = 2;
    m.data[0] = 1, m.data[1] = 0x8001; /* the smallest bf16 numbers */
    assert_true(quantize(ERN_DTYPE_F8E4M3, 16));
    same(quant_at(&m.q, 0, 0), 0, "value", 0, 0);
    same(quant_scale_at(&m.q, 0, 0), 1, "scale", 0, 0);
    assert_true(quantize(ERN_DTYPE_I8, 16));
    same(quant_code_at(&m.q, 0, 0), 127, "code", 0, 0);
    same(quant_code_at(&m.q, 0, 1), -127, "code", 0, 1);
}

/* ---- e4m3 --------------------------------------------------------------------------------------------------------
 */

static void e4m3_all_codes(void **state) {
    (void)state;
    for (int c = 0; c < 256; c++) {
        const float v = ern_e4m3_to_f32((uint8_t)c);
        if ((c & 0x7f) == 0x7f) {
            assert_true(isnan(v));
            continue;
        }
        assert_true((double)v == e4m3_value(c) && !signbit(v) == !(c & 0x80));
        assert_int_equal(ern_e4m3_from_f32(v), c);
    }
    assert_int_equal(ern_e4m3_from_f32(NAN) & 0x7f, 0x7f);
}

/* Between two neighbours the middle goes to the even one, and the f32 numbers on either side of it to the nearer. */
static void e4m3_midpoints(void **state) {
    (void)state;
    for (int c = 0; c < 0x7e; c++) {
        const float middle = (float)((e4m3_value(c) + e4m3_value(c + 1)) / 2);
        for (int sign = 0; sign < 256; sign += 128) {
            const float s = sign ? -1.0f : 1.0f;
            assert_int_equal(ern_e4m3_from_f32(s * middle), sign | (c % 2 ? c + 1 : c));
            assert_int_equal(ern_e4m3_from_f32(s * nextafterf(middle, 0)), sign | c);
            assert_int_equal(ern_e4m3_from_f32(s * nextafterf(middle, 1e9f)), sign | (c + 1));
        }
    }
    static const float large[] = {448, 449, 464, 480, 1e9f, INFINITY};
    for (size_t i = 0; i < sizeof large / sizeof *large; i++) {
        assert_int_equal(ern_e4m3_from_f32(large[i]), 0x7e);
        assert_int_equal(ern_e4m3_from_f32(-large[i]), 0xfe);
    }
    for (uint32_t i = 0; i < 200000; i++) { /* a sample of all f32 numbers */
        const uint32_t bits = i * 21473u;
        float x;
        memcpy(&x, &bits, sizeof x);
        if (!isnan(x)) assert_int_equal(ern_e4m3_from_f32(x), e4m3_nearest((double)x));
    }
}

/* ---- activations -------------------------------------------------------------------------------------------------
 */

static void check_act(const float *x, int32_t n) {
    int8_t q8[IN_MAX];
    uint8_t qf[IN_MAX];
    float s8[4], sf[4];
    quant_act_int8(q8, s8, x, n);
    quant_act_fp8(qf, sf, x, n);
    for (int32_t i = 0; i < n; i++) {
        const int32_t g = i / 128;
        double amax = 0;
        bool finite = true;
        for (int32_t j = g * 128; j < n && j < g * 128 + 128; j++)
            amax = fmax(amax, fabs((double)x[j])), finite = finite && isfinite(x[j]);
        if (!finite) {
            assert_true(isnan(s8[g]) && isnan(sf[g]) && q8[i] == 0 && qf[i] == 0);
            continue;
        }
        const float scale = (float)(amax / 127), at_least = (float)fmax(amax, (double)1e-10f);
        const bool none = (double)scale < 0x1p-100;
        assert_true(s8[g] == (none ? 0 : scale));
        const double q = none ? 0 : rint((double)(float)((double)x[i] * (double)(float)(127 / amax)));
        assert_true((double)q8[i] == q && fabs(q) <= 127);
        assert_true(sf[g] == (float)((double)at_least / 448));
        assert_int_equal(qf[i], e4m3_nearest((double)(float)((double)x[i] * (double)(float)(448 / (double)at_least))));
    }
}

static void activations_follow_the_law(void **state) {
    (void)state;
    static const int32_t length[] = {1, 127, 128, 129, 256, 330};
    float x[IN_MAX];
    for (size_t k = 0; k < sizeof length / sizeof *length; k++) {
        for (int kind = 0; kind < 8; kind++) {
            for (int32_t i = 0; i < length[k]; i++) {
                const double u = (double)(ern_counter64(k, (uint64_t)(i + 1000 * kind)) >> 40) * 0x1p-23 - 1;
                x[i] = (float)(u * (kind == 1 ? 1e-30 : kind == 2 ? 1e-40 : kind == 3 ? 1e38 : 3));
                if (kind == 4) x[i] = (float)((int)(u * 254)) * 0.5f; /* ties */
                if (kind == 5) x[i] = 0;
            }
            if (kind == 4) x[0] = 127;
            if (kind == 6) x[length[k] / 2] = NAN;
            if (kind == 7) x[length[k] - 1] = -INFINITY;
            check_act(x, length[k]);
        }
    }
}

/* ---- names -------------------------------------------------------------------------------------------------------
 */

static void flags_are_read(void **state) {
    (void)state;
    static const struct {
        const char *text, *head, *means; /* means NULL: refused */
    } row[] = {
        {NULL, NULL, "bf16"},
        {"none", NULL, "bf16"},
        {"wint8", NULL, "wint8, head wint8"},
        {"weight_only_int8", NULL, "wint8, head wint8"},
        {"wint8", "none", "wint8, head bf16"},
        {NULL, "wint8", "bf16, head wint8"},
        {"wint4", NULL, "wint4 (dense wint8, experts wint4), head wint8"},
        {"block_wise_fp8", "none", "block_wise_fp8, head bf16"},
        {"{\"quantization\":\"wint4\"}", NULL, "wint4 (dense wint8, experts wint4), head wint8"},
        {"{\"quantization\":\"mix_quant\",\"dense_quant_type\":\"wint4\"}", NULL,
         "mix_quant (dense wint4, experts wint4), head wint8"},
        {" {\"quantization\": \"mix_quant\", \"dense_quant_type\": \"none\", \"moe_quant_type\": \"wint4\"}", NULL,
         "mix_quant (dense bf16, experts wint4), head wint8"},
        {"{\"quantization\":\"mix_quant\",\"dense_quant_type\":\"wint8\",\"moe_quant_type\":\"wint8\"}", NULL,
         "wint8, head wint8"},
        {"", NULL, NULL},
        {"WINT8", NULL, NULL},
        {"mix_quant", NULL, NULL},
        {"w4a8", NULL, NULL},
        {"{", NULL, NULL},
        {"{\"quantization\":\"mix_quant\"}", NULL, NULL},
        {"{\"dense_quant_type\":\"wint8\"}", NULL, NULL},
        {"{\"quantization\":\"wint8\",\"moe_quant_type\":\"wint4\"}", NULL, NULL},
        {"{\"quantization\":\"mix_quant\",\"dense_quant_type\":\"wint2\"}", NULL, NULL},
        {"{\"quantization\":\"mix_quant\",\"dense_quant_type\":8}", NULL, NULL},
        {"{\"quantization\":\"mix_quant\",\"dense_quant_type\":\"wint8\",\"kv_cache_quant_type\":\"x\"}", NULL, NULL},
        {"wint8", "wint4", NULL},
        {"wint8", "", NULL},
    };
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        ern_quant_plan p;
        ern_err err = {.text = ""};
        char text[ERN_QUANT_TEXT_BYTES];
        const ern_status s = ern_quant_parse(&p, row[i].text, row[i].head, &err);
        if (!row[i].means && (s != ERN_ERR_USAGE || err.code != s || !strstr(err.text, "quantization") ||
                              strchr(err.text, '\n') || strlen(err.text) > 300))
            fail_msg("row %zu: status %d, %s", i, s, err.text);
        if (row[i].means && (s != ERN_OK || strcmp(ern_quant_text(text, &p), row[i].means) != 0))
            fail_msg("row %zu: expected %s, found %s %s", i, row[i].means, s ? "" : text, err.text);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(weights_follow_the_law),
        cmocka_unit_test(known_vectors),
        cmocka_unit_test(not_finite_is_refused),
        cmocka_unit_test(smallest_numbers),
        cmocka_unit_test(e4m3_all_codes),
        cmocka_unit_test(e4m3_midpoints),
        cmocka_unit_test(activations_follow_the_law),
        cmocka_unit_test(flags_are_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
