/* Quantized linears in plain C: what the other levels do with registers, to be read first. One band of 16 outputs and
 * one row at a time; lane = output. */
#include "backend/cpu/table_portable.h"

#include <string.h>

enum { LANES = ERN_TILE_OUT };

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

/* sum[o] of one row over the lines of tiles t0..t1-1: unsigned codes times int8, exact. */
static void int_lines(int32_t *sum, const uint8_t *tile, const int8_t *x, int32_t n_tile, bool four) {
    for (int32_t l = 0; l < n_tile * ERN_TILE_IN / 4; l++, x += 4) {
        const uint8_t *line = tile + 64 * (four ? l / 2 : l);
        const int shift = four && l % 2 ? 4 : 0, mask = four ? 15 : 255;
        for (int o = 0; o < LANES; o++)
            for (int i = 0; i < 4; i++) sum[o] += (line[4 * o + i] >> shift & mask) * x[i];
    }
}

/* y = s, or y += scale * s, for the outputs of a band that there are. */
static void put(const cpu_linear_job *j, int32_t r, int32_t o0, const float *s) {
    float *y = cpu_job_y(j, r) + o0, scale = j->scale ? j->scale[r] : 1.0f;
    const int32_t n = least(LANES, j->w->n_out - o0);
    for (int32_t o = 0; o < n; o++) y[o] = j->add ? y[o] + scale * s[o] : s[o];
}

static void int_band(const cpu_linear_job *j, int32_t o0, bool four) {
    const ern_linear *w = j->w;
    const int32_t n_tile = cpu_tiles(w->n_in), n_group = cpu_groups(w->n_in), zero = four ? 8 : 128;
    const uint8_t *band = cpu_band(w, o0 / LANES);
    for (int32_t r = 0; r < j->n_row; r++) {
        const int64_t row = cpu_job_act(j, r);
        const int8_t *x = (const int8_t *)j->act.q + row * cpu_act_stride(w->n_in);
        float acc[LANES] = {0};
        for (int32_t g = 0; g < n_group; g++) {
            int32_t sum[LANES] = {0};
            int_lines(sum, band + (size_t)(2 * g) * cpu_tile_bytes(w->dtype), x + g * ERN_ACT_GROUP,
                      least(2, n_tile - 2 * g), four);
            const float s = j->act.scale[row * n_group + g];
            const int32_t off = zero * j->act.sum[row * n_group + g];
            for (int o = 0; o < LANES; o++) acc[o] += s * (float)(sum[o] - off);
        }
        for (int o = 0; o < least(LANES, w->n_out - o0); o++)
            acc[o] *= ern_bf16_to_f32(((const ern_bf16 *)w->scale)[o0 + o]);
        put(j, r, o0, acc);
    }
}

/* The codes of input i of a band, as numbers. */
static void codes(float *out, const uint8_t *band, ern_dtype t, int32_t i) {
    const uint8_t *tile = band + (size_t)(i / ERN_TILE_IN) * cpu_tile_bytes(t);
    i %= ERN_TILE_IN;
    for (int32_t o = 0; o < LANES; o++) {
        if (t == ERN_DTYPE_F8E4M3)
            out[o] = ern_e4m3_to_f32(tile[16 * i + o]);
        else if (t == ERN_DTYPE_I8)
            out[o] = (float)(tile[64 * (i / 4) + 4 * o + i % 4] - 128);
        else
            out[o] = (float)((tile[64 * (i / 8) + 4 * o + i % 4] >> (i % 8 < 4 ? 0 : 4) & 15) - 8);
    }
}

/* Sums in f32, inputs in order inside a group: fp8 on fp8, and every format on f32 activations. */
static void float_band(const cpu_linear_job *j, int32_t o0, bool exact) {
    const ern_linear *w = j->w;
    const int32_t n_group = cpu_groups(w->n_in);
    const uint8_t *band = cpu_band(w, o0 / LANES);
    const bool f8 = w->dtype == ERN_DTYPE_F8E4M3;
    for (int32_t r = 0; r < j->n_row; r++) {
        const int64_t row = cpu_job_act(j, r);
        const float *x = exact ? cpu_job_x(j, r) : (const float *)j->act.q + row * cpu_act_stride(w->n_in);
        float acc[LANES] = {0};
        for (int32_t g = 0; g < n_group; g++) {
            float sum[LANES] = {0}, code[LANES], s = 1.0f;
            for (int32_t i = g * ERN_ACT_GROUP; i < least((g + 1) * ERN_ACT_GROUP, w->n_in); i++) {
                codes(code, band, w->dtype, i);
                for (int o = 0; o < LANES; o++) sum[o] += x[i] * code[o];
            }
            if (f8) s = ((const float *)w->scale)[(int64_t)(o0 / ERN_F8_BLOCK) * n_group + g];
            if (!exact) s *= j->act.scale[row * n_group + g];
            for (int o = 0; o < LANES; o++) acc[o] += s * sum[o];
        }
        for (int o = 0; !f8 && o < least(LANES, w->n_out - o0); o++)
            acc[o] *= ern_bf16_to_f32(((const ern_bf16 *)w->scale)[o0 + o]);
        put(j, r, o0, acc);
    }
}

void cpu_linear_i8_portable(const cpu_linear_job *j) {
    for (int32_t o = j->from; o < j->to; o += LANES) int_band(j, o, false);
}
void cpu_linear_i4_portable(const cpu_linear_job *j) {
    for (int32_t o = j->from; o < j->to; o += LANES) int_band(j, o, true);
}
void cpu_linear_f8_portable(const cpu_linear_job *j) {
    for (int32_t o = j->from; o < j->to; o += LANES) float_band(j, o, false);
}
void cpu_linear_exact_portable(const cpu_linear_job *j) {
    for (int32_t o = j->from; o < j->to; o += LANES) float_band(j, o, true);
}

void cpu_quant_int8_portable(int8_t *q, float *scale, int32_t *sum, const float *x, int32_t n) {
    quant_act_int8(q, scale, x, n);
    memset(q + n, 0, (size_t)(cpu_act_width(n) - n));
    for (int32_t g = 0; g < cpu_groups(n); g++) {
        sum[g] = 0;
        for (int32_t i = g * ERN_ACT_GROUP; i < least((g + 1) * ERN_ACT_GROUP, n); i++) sum[g] += q[i];
    }
}

void cpu_quant_fp8_portable(float *q, float *scale, const float *x, int32_t n) {
    uint8_t code[ERN_ACT_GROUP];
    for (int32_t at = 0; at < n; at += ERN_ACT_GROUP) {
        const int32_t m = least(ERN_ACT_GROUP, n - at);
        quant_act_fp8(code, scale + at / ERN_ACT_GROUP, x + at, m);
        for (int32_t i = 0; i < m; i++) q[at + i] = ern_e4m3_to_f32(code[i]);
    }
    for (int64_t i = n; i < cpu_act_width(n); i++) q[i] = 0.0f;
}
