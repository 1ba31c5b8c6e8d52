/* Quantized weights and activations, to the letter. See quant.h; the formulas: docs/model.md 9. */
#include "model/quant.h"

#include <float.h>
#include <math.h>
#include <string.h>

static int32_t tiles(int32_t n, int32_t each) { return (n + each - 1) / each; }
static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

static uint64_t tile_bytes(ern_dtype t) {
    return t == ERN_DTYPE_I4 ? ERN_TILE_OUT * ERN_TILE_IN / 2 : ERN_TILE_OUT * ERN_TILE_IN;
}

uint64_t quant_tile_bytes(ern_dtype t, int32_t n_out, int32_t n_in) {
    return (uint64_t)tiles(n_out, ERN_TILE_OUT) * (uint64_t)tiles(n_in, ERN_TILE_IN) * tile_bytes(t);
}

uint64_t quant_scale_bytes(ern_dtype t, int32_t n_out, int32_t n_in) {
    if (t != ERN_DTYPE_F8E4M3) return (uint64_t)n_out * sizeof(ern_bf16);
    return (uint64_t)tiles(n_out, ERN_F8_BLOCK) * (uint64_t)tiles(n_in, ERN_F8_BLOCK) * sizeof(float);
}

uint64_t ern_linear_bytes(const ern_linear *w) {
    if (!w->data) return 0;
    if (w->order == ERN_ORDER_TILED)
        return quant_tile_bytes(w->dtype, w->n_out, w->n_in) + quant_scale_bytes(w->dtype, w->n_out, w->n_in);
    return (uint64_t)w->n_out * (uint64_t)w->n_in * (w->dtype == ERN_DTYPE_F32 ? sizeof(float) : sizeof(ern_bf16));
}

/* Where element (o, i) lies: the byte from the start of all tiles. */
static size_t byte_of(ern_dtype t, int32_t n_in, int32_t o, int32_t i) {
    const int32_t a = o % ERN_TILE_OUT, b = i % ERN_TILE_IN;
    const size_t tile = (size_t)(o / ERN_TILE_OUT) * (size_t)tiles(n_in, ERN_TILE_IN) + (size_t)(i / ERN_TILE_IN);
    const int32_t at = t == ERN_DTYPE_F8E4M3 ? 16 * b + a
                       : t == ERN_DTYPE_I8   ? 64 * (b / 4) + 4 * a + b % 4
                                             : 64 * (b / 8) + 4 * a + b % 4;
    return tile * tile_bytes(t) + (size_t)at;
}

/* The largest magnitude so far and |x|. By their bits, so that infinity and NaN win and are not lost. */
static float wider(float amax, float x) {
    uint32_t a, b;
    memcpy(&a, &amax, sizeof a);
    memcpy(&b, &x, sizeof b);
    b &= 0x7fffffffu;
    a = a > b ? a : b;
    memcpy(&amax, &a, sizeof amax);
    return amax;
}

/* ---- weights ----------------------------------------------------------------------------------------------------- */

/* The largest magnitude of outputs o0..o0+n_o-1 over inputs i0..i1-1, one by one. By their bits, as whole numbers: so
 * infinity and NaN win and are not lost. Reads along the order of the memory. */
static void band_amax(ern_bf16 amax[ERN_TILE_OUT], const ern_linear *w, int32_t o0, int32_t n_o, int32_t i0,
                      int32_t i1) {
    const ern_bf16 *data = w->data;
    int16_t top[ERN_TILE_OUT] = {0}; /* signed, because that is what the baseline's vector maximum takes */
    if (w->order == ERN_ORDER_OUT_IN) {
        for (int32_t a = 0; a < n_o; a++) {
            const ern_bf16 *row = data + (o0 + a) * w->stride;
            int16_t most = 0;
            for (int32_t i = i0; i < i1; i++) {
                const int16_t mag = (int16_t)(row[i] & 0x7fff);
                most = mag > most ? mag : most;
            }
            top[a] = most;
        }
    } else if (n_o == ERN_TILE_OUT) {
        for (int32_t i = i0; i < i1; i++) {
            const ern_bf16 *row = data + i * w->stride + o0;
            for (int32_t a = 0; a < ERN_TILE_OUT; a++) {
                const int16_t mag = (int16_t)(row[a] & 0x7fff);
                top[a] = mag > top[a] ? mag : top[a];
            }
        }
    } else {
        for (int32_t i = i0; i < i1; i++) {
            for (int32_t a = 0; a < n_o; a++) {
                const int16_t mag = (int16_t)(data[i * w->stride + o0 + a] & 0x7fff);
                top[a] = mag > top[a] ? mag : top[a];
            }
        }
    }
    for (int32_t a = 0; a < ERN_TILE_OUT; a++) amax[a] = (ern_bf16)top[a];
}

/* One tile's worth of weights, x[a][b] = element (o0 + a, i0 + b), zero beyond the edges. */
static void tile_load(float x[restrict ERN_TILE_OUT][ERN_TILE_IN], const ern_linear *w, int32_t o0, int32_t n_o,
                      int32_t i0, int32_t n_i) {
    const ern_bf16 *data = w->data;
    if (n_o < ERN_TILE_OUT || n_i < ERN_TILE_IN) memset(x, 0, ERN_TILE_OUT * sizeof x[0]);
    if (w->order == ERN_ORDER_OUT_IN) {
        for (int32_t a = 0; a < n_o; a++) {
            const ern_bf16 *row = data + (o0 + a) * w->stride + i0;
            for (int32_t b = 0; b < n_i; b++) x[a][b] = ern_bf16_to_f32(row[b]);
        }
    } else {
        for (int32_t b = 0; b < n_i; b++) {
            const ern_bf16 *row = data + (i0 + b) * w->stride + o0;
            for (int32_t a = 0; a < n_o; a++) x[a][b] = ern_bf16_to_f32(row[a]);
        }
    }
}

/* round half away (clip(x / amax * top)), on magnitudes: the fraction v - trunc(v) is exact. Plus `zero`, the code of
 * nought. amax 0 divides nothing but noughts. */
static void int_codes(uint8_t c[restrict ERN_TILE_OUT][ERN_TILE_IN], float x[restrict ERN_TILE_OUT][ERN_TILE_IN],
                      const float amax[ERN_TILE_OUT], float top, int32_t zero) {
    for (int32_t a = 0; a < ERN_TILE_OUT; a++) {
        const float by = amax[a] > 0.0f ? amax[a] : 1.0f;
        for (int32_t b = 0; b < ERN_TILE_IN; b++) {
            float v = fabsf(x[a][b]) / by * top;
            v = v < top ? v : top;
            int32_t q = (int32_t)v;
            q += v - (float)q >= 0.5f;
            c[a][b] = (uint8_t)(zero + (x[a][b] < 0.0f ? -q : q));
        }
    }
}

/* Codes of a tile to their places: quant.h's drawing, four inputs of one output at a time. */
static void int_tile(uint8_t *tile, ern_dtype t, uint8_t c[restrict ERN_TILE_OUT][ERN_TILE_IN]) {
    const int32_t wide = t == ERN_DTYPE_I8 ? 4 : 8;
    for (int32_t a = 0; a < ERN_TILE_OUT; a++) {
        for (int32_t b = 0; b < ERN_TILE_IN; b += wide) {
            uint32_t four, high;
            memcpy(&four, &c[a][b], sizeof four);
            if (t == ERN_DTYPE_I4) {
                memcpy(&high, &c[a][b + 4], sizeof high);
                four |= high << 4; /* codes are below 16, so none reaches its neighbour */
            }
            memcpy(tile + 64 * (b / wide) + 4 * a, &four, sizeof four);
        }
    }
}

static bool quant_int(uint8_t *tile, ern_bf16 *scale, ern_dtype t, const ern_linear *w, int32_t from, int32_t to) {
    const float top = t == ERN_DTYPE_I8 ? 127.0f : 7.0f;
    const size_t each = tile_bytes(t), n_tile = (size_t)tiles(w->n_in, ERN_TILE_IN);
    for (int32_t o = from; o < to; o += ERN_TILE_OUT) {
        const int32_t n_o = least(ERN_TILE_OUT, to - o);
        ern_bf16 most[ERN_TILE_OUT];
        float amax[ERN_TILE_OUT], x[ERN_TILE_OUT][ERN_TILE_IN];
        uint8_t code[ERN_TILE_OUT][ERN_TILE_IN];
        band_amax(most, w, o, n_o, 0, w->n_in);
        for (int32_t a = 0; a < ERN_TILE_OUT; a++) {
            amax[a] = ern_bf16_to_f32(most[a]);
            if (!(amax[a] <= FLT_MAX)) return false;
            if (a < n_o) scale[o + a] = ern_bf16_from_f32(amax[a] / top);
        }
        uint8_t *out = tile + (size_t)(o / ERN_TILE_OUT) * n_tile * each;
        for (int32_t i = 0; i < w->n_in; i += ERN_TILE_IN, out += each) {
            tile_load(x, w, o, n_o, i, least(ERN_TILE_IN, w->n_in - i));
            int_codes(code, x, amax, top, t == ERN_DTYPE_I8 ? 128 : 8);
            int_tile(out, t, code);
        }
    }
    return true;
}

/* One block of 128 x 128 at (o0, i0), outputs below o1. */
static bool fp8_block(uint8_t *tile, float *scale, const ern_linear *w, int32_t o0, int32_t o1, int32_t i0) {
    const int32_t i1 = least(i0 + ERN_F8_BLOCK, w->n_in);
    ern_bf16 most[ERN_TILE_OUT], amax = 0;
    for (int32_t o = o0; o < o1; o += ERN_TILE_OUT) {
        band_amax(most, w, o, least(ERN_TILE_OUT, o1 - o), i0, i1);
        for (int32_t a = 0; a < ERN_TILE_OUT; a++) amax = most[a] > amax ? most[a] : amax;
    }
    const float a = ern_bf16_to_f32(amax);
    if (!(a <= FLT_MAX)) return false;
    float f = 448.0f / a, x[ERN_TILE_OUT][ERN_TILE_IN];
    if (!(f <= FLT_MAX)) f = 1.0f; /* nothing there, or nothing that fp8 with an f32 scale could show */
    *scale = 1.0f / f;
    for (int32_t o = o0; o < o1; o += ERN_TILE_OUT) {
        for (int32_t i = i0; i < i1; i += ERN_TILE_IN) {
            uint8_t *out = tile + byte_of(ERN_DTYPE_F8E4M3, w->n_in, o, i);
            tile_load(x, w, o, least(ERN_TILE_OUT, o1 - o), i, least(ERN_TILE_IN, i1 - i));
            for (int32_t b = 0; b < ERN_TILE_IN; b++)
                for (int32_t k = 0; k < ERN_TILE_OUT; k++) out[16 * b + k] = ern_e4m3_from_f32(x[k][b] * f);
        }
    }
    return true;
}

static bool quant_fp8(uint8_t *tile, float *scale, const ern_linear *w, int32_t from, int32_t to) {
    const int32_t n_block = tiles(w->n_in, ERN_F8_BLOCK);
    for (int32_t o = from; o < to; o += ERN_F8_BLOCK)
        for (int32_t i = 0; i < w->n_in; i += ERN_F8_BLOCK)
            if (!fp8_block(tile, scale + (int64_t)(o / ERN_F8_BLOCK) * n_block + i / ERN_F8_BLOCK, w, o,
                           least(o + ERN_F8_BLOCK, to), i))
                return false;
    return true;
}

bool quant_weights(void *tile, void *scale, ern_dtype t, const ern_linear *w, int32_t from, int32_t to) {
    ERN_ASSERT(w->order != ERN_ORDER_TILED && w->dtype == ERN_DTYPE_BF16);
    ERN_ASSERT(from % ERN_TILE_OUT == 0 && (to % ERN_TILE_OUT == 0 || to == w->n_out) && to <= w->n_out);
    ERN_ASSERT(t != ERN_DTYPE_F8E4M3 || from % ERN_F8_BLOCK == 0);
    return t == ERN_DTYPE_F8E4M3 ? quant_fp8(tile, scale, w, from, to) : quant_int(tile, scale, t, w, from, to);
}

float quant_code_at(const ern_linear *w, int32_t o, int32_t i) {
    const uint8_t c = ((const uint8_t *)w->data)[byte_of(w->dtype, w->n_in, o, i)];
    if (w->dtype == ERN_DTYPE_F8E4M3) return ern_e4m3_to_f32(c);
    if (w->dtype == ERN_DTYPE_I8) return (float)(c - 128);
    return (float)((i % 8 < 4 ? c & 15 : c >> 4) - 8);
}

float quant_scale_at(const ern_linear *w, int32_t o, int32_t g) {
    if (w->dtype != ERN_DTYPE_F8E4M3) return ern_bf16_to_f32(((const ern_bf16 *)w->scale)[o]);
    return ((const float *)w->scale)[(int64_t)(o / ERN_F8_BLOCK) * tiles(w->n_in, ERN_F8_BLOCK) + g];
}

float quant_at(const ern_linear *w, int32_t o, int32_t i) {
    return quant_code_at(w, o, i) * quant_scale_at(w, o, i / ERN_F8_BLOCK);
}

/* ---- activations ------------------------------------------------------------------------------------------------- */

/* The scale of a group, and *f to multiply with. */
static float group_scale(float *f, const float *x, int32_t n, float top, float floor) {
    float a = 0.0f;
    for (int32_t i = 0; i < n; i++) a = wider(a, x[i]);
    if (!(a <= FLT_MAX)) return *f = 0.0f, NAN;
    if (a < floor) a = floor;
    *f = a > 0.0f ? top / a : 0.0f;
    return a / top;
}

void quant_act_int8(int8_t *q, float *scale, const float *x, int32_t n) {
    for (int32_t g = 0; g * ERN_ACT_GROUP < n; g++) {
        const int32_t from = g * ERN_ACT_GROUP, to = least(from + ERN_ACT_GROUP, n);
        float f;
        scale[g] = group_scale(&f, x + from, to - from, 127.0f, 0.0f);
        if (scale[g] < 0x1p-100f) f = scale[g] = 0.0f;
        for (int32_t i = from; i < to; i++) q[i] = f > 0.0f ? (int8_t)nearbyintf(x[i] * f) : 0;
    }
}

void quant_act_fp8(uint8_t *q, float *scale, const float *x, int32_t n) {
    for (int32_t g = 0; g * ERN_ACT_GROUP < n; g++) {
        const int32_t from = g * ERN_ACT_GROUP, to = least(from + ERN_ACT_GROUP, n);
        float f;
        scale[g] = group_scale(&f, x + from, to - from, 448.0f, 1e-10f);
        for (int32_t i = from; i < to; i++) q[i] = f > 0.0f ? ern_e4m3_from_f32(x[i] * f) : 0;
    }
}
