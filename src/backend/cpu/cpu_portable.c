/* The kernels in plain C for any processor, and their table. Written to be read: the AVX2 and AVX-512 files do the same
 * with registers. Sums run in LANES lanes so that the compiler's baseline vectors can follow; the order is fixed by n
 * alone. The build forbids contraction, so a * b + c rounds twice here, on every machine. */
#include "backend/cpu/table_portable.h"

#include <math.h>
#include <string.h>

enum {
    LANES = 16,
    ROWS = 4,       /* rows that share one pass over the weights */
    OUT_SPAN = 256, /* outputs that are summed together in the IN_OUT layout */
    K_BLOCK = 512,
};

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

/* exp(x) as in vec_avx512.h, one at a time. */
static float exp1(float x) {
    if (x != x) return x;
    if (x < -87.3f) return 0.0f;
    if (x > 88.0f) x = 88.0f;
    float n = floorf(x * 0x1.715476p+0f + 0.5f);
    float r = x - n * 0x1.62e4p-1f;
    r = r - n * 0x1.7f7d1cp-20f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23; /* 2^n, normal: -126 <= n <= 127 */
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

static inline float sum_lanes(const float *a) {
    float s[LANES / 2];
    for (int i = 0; i < 8; i++) s[i] = a[i] + a[i + 8];
    for (int i = 0; i < 4; i++) s[i] += s[i + 4];
    return (s[0] + s[2]) + (s[1] + s[3]);
}

static inline float dot_bf16(const float *x, const ern_bf16 *w, int32_t n) {
    float acc[LANES] = {0};
    int32_t k = 0;
    for (; k + LANES <= n; k += LANES)
        for (int i = 0; i < LANES; i++) acc[i] += x[k + i] * ern_bf16_to_f32(w[k + i]);
    for (int i = 0; k + i < n; i++) acc[i] += x[k + i] * ern_bf16_to_f32(w[k + i]);
    return sum_lanes(acc);
}

static inline float dot_f32(const float *x, const float *w, int32_t n) {
    float acc[LANES] = {0};
    int32_t k = 0;
    for (; k + LANES <= n; k += LANES)
        for (int i = 0; i < LANES; i++) acc[i] += x[k + i] * w[k + i];
    for (int i = 0; k + i < n; i++) acc[i] += x[k + i] * w[k + i];
    return sum_lanes(acc);
}

static void linear_out_in(const cpu_linear_job *j) {
    for (int32_t o = j->from; o < j->to; o++) {
        const ern_bf16 *w = (const ern_bf16 *)j->w->data + o * j->w->stride;
        for (int32_t r = 0; r < j->n_row; r++) {
            float s = dot_bf16(cpu_job_x(j, r), w, j->w->n_in), *y = cpu_job_y(j, r) + o;
            *y = j->add ? *y + (j->scale ? j->scale[r] : 1.0f) * s : s;
        }
    }
}

/* Rows r0.. over inputs k0..k1-1 and a span of outputs. */
static void in_out_span(const cpu_linear_job *j, int32_t r0, int32_t nr, int32_t o0, int32_t no, int32_t k0,
                        int32_t k1) {
    float acc[ROWS][OUT_SPAN], wide[OUT_SPAN];
    memset(acc, 0, sizeof acc);
    for (int32_t k = k0; k < k1; k++) {
        const ern_bf16 *w = (const ern_bf16 *)j->w->data + k * j->w->stride + o0;
        for (int32_t o = 0; o < no; o++) wide[o] = ern_bf16_to_f32(w[o]);
        for (int32_t r = 0; r < nr; r++) {
            const float x = cpu_job_x(j, r0 + r)[k];
            for (int32_t o = 0; o < no; o++) acc[r][o] += x * wide[o];
        }
    }
    for (int32_t r = 0; r < nr; r++) {
        float *y = cpu_job_y(j, r0 + r) + o0, scale = j->scale ? j->scale[r0 + r] : 1.0f;
        const bool set = !j->add && k0 == 0;
        for (int32_t o = 0; o < no; o++) y[o] = set ? acc[r][o] : y[o] + scale * acc[r][o];
    }
}

static void linear_in_out(const cpu_linear_job *j) {
    const int32_t n_in = j->w->n_in;
    for (int32_t o = j->from; o < j->to; o += OUT_SPAN)
        for (int32_t k = 0; k < n_in; k += K_BLOCK)
            for (int32_t r = 0; r < j->n_row; r += ROWS)
                in_out_span(j, r, least(ROWS, j->n_row - r), o, least(OUT_SPAN, j->to - o), k,
                            least(k + K_BLOCK, n_in));
}

static void linear_f32(float *y, const float *x, const float *w, int32_t n_out, int32_t n_in) {
    for (int32_t o = 0; o < n_out; o++) y[o] = dot_f32(x, w + (int64_t)o * n_in, n_in);
}

static void norm(float *y, const float *x, const ern_bf16 *w, int32_t n, float eps) {
    const float r = 1.0f / sqrtf(dot_f32(x, x, n) / (float)n + eps);
    for (int32_t i = 0; i < n; i++) y[i] = x[i] * r * ern_bf16_to_f32(w[i]);
}

static void silu_mul(float *gate, const float *up, int32_t n) {
    for (int32_t i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + exp1(-gate[i])) * up[i];
}

static void rope(float *x, const float *table, int32_t n_head, int32_t C) {
    const float *cosine = table, *sine = table + C / 2;
    for (int32_t h = 0; h < n_head; h++, x += C) {
        for (int32_t i = 0; i < C / 2; i++) {
            const float even = x[2 * i], odd = x[2 * i + 1];
            x[2 * i] = even * cosine[i] - odd * sine[i];
            x[2 * i + 1] = odd * cosine[i] + even * sine[i];
        }
    }
}

static void softmax(float *x, int32_t n) {
    float max = x[0], sum = 0.0f;
    for (int32_t i = 1; i < n; i++) max = x[i] > max ? x[i] : max;
    for (int32_t i = 0; i < n; i++) sum += x[i] = exp1(x[i] - max);
    for (int32_t i = 0; i < n; i++) x[i] /= sum;
}

/* 2^x for x <= 0, as in vec_avx512.h. */
static float exp2_1(float x) {
    if (x < -126.0f) return 0.0f;
    if (x != x) return x;
    const float n = floorf(x + 0.5f), r = x - n;
    float p = 0x1.ffcbfcp-17f;
    p = p * r + 0x1.430912p-13f;
    p = p * r + 0x1.5d87fep-10f;
    p = p * r + 0x1.3b2ab6p-7f;
    p = p * r + 0x1.c6b08ep-5f;
    p = p * r + 0x1.ebfbep-3f;
    p = p * r + 0x1.62e43p-1f;
    p = p * r + 1.0f;
    const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* Dimension c of the key, or of the value, at position t of a group. */
static inline float key_at(const cpu_kv_group *g, int32_t t, int32_t c, bool int8) {
    if (int8) return (float)((const int8_t *)g->k)[c * CPU_KV_GROUP + t];
    return ern_bf16_to_f32(((const ern_bf16 *)(const void *)g->k)[(c / 2 * CPU_KV_GROUP + t) * 2 + c % 2]);
}
static inline float value_at(const cpu_kv_group *g, int32_t t, int32_t c, int32_t dim, bool int8) {
    if (int8) return (float)((const int8_t *)g->v)[t * dim + c];
    return ern_bf16_to_f32(((const ern_bf16 *)(const void *)g->v)[(t / 2 * dim + c) * 2 + t % 2]);
}

/* score [n] = q K, lanes are positions. */
static inline void score_group(float *score, const float *q, int32_t dim, float scale, const cpu_kv_group *g, int32_t n,
                               bool int8) {
    float acc[CPU_KV_GROUP] = {0};
    for (int32_t c = 0; c < dim; c++)
        for (int32_t t = 0; t < n; t++) acc[t] += q[c] * key_at(g, t, c, int8);
    for (int32_t t = 0; t < n; t++) score[t] = acc[t] * (int8 ? scale * g->k_scale[t] : scale);
}

/* out += sum over the group's first n positions of p V; p already holds the values' scales. */
static inline void weigh_group(float *out, const float *p, int32_t dim, const cpu_kv_group *g, int32_t n, bool int8) {
    for (int32_t t = 0; t < n; t++)
        for (int32_t c = 0; c < dim; c++) out[c] += p[t] * value_at(g, t, c, dim, int8);
}

static inline void attn_head(float *max, float *sum, float *out, const float *q, int32_t dim, float scale,
                             const cpu_kv_block *kv, int32_t n, bool int8) {
    float p[CPU_ATTN_BLOCK];
    for (int32_t t = 0; t < n; t += CPU_KV_GROUP)
        score_group(p + t, q, dim, scale, &kv->group[t / CPU_KV_GROUP], least(CPU_KV_GROUP, n - t), int8);
    *max = -INFINITY, *sum = 0.0f;
    for (int32_t t = 0; t < n; t++) *max = p[t] > *max ? p[t] : *max;
    for (int32_t t = 0; t < n; t++) *sum += p[t] = exp2_1(p[t] - *max);
    memset(out, 0, sizeof *out * (size_t)dim);
    for (int32_t t = 0; t < n; t += CPU_KV_GROUP) {
        const cpu_kv_group *g = &kv->group[t / CPU_KV_GROUP];
        const int32_t live = least(CPU_KV_GROUP, n - t);
        for (int32_t i = 0; int8 && i < live; i++) p[t + i] *= g->v_scale[i];
        weigh_group(out, p + t, dim, g, live, int8);
    }
}

static void attn_bf16(float *part, const float *q, int32_t n_head, int32_t dim, float scale, const cpu_kv_block *kv,
                      int32_t n) {
    for (int32_t h = 0; h < n_head; h++)
        attn_head(&part[h], &part[CPU_HEAD_TILE + h], part + 2 * CPU_HEAD_TILE + h * dim, q + h * dim, dim, scale, kv,
                  n, false);
}

static void attn_int8(float *part, const float *q, int32_t n_head, int32_t dim, float scale, const cpu_kv_block *kv,
                      int32_t n) {
    for (int32_t h = 0; h < n_head; h++)
        attn_head(&part[h], &part[CPU_HEAD_TILE + h], part + 2 * CPU_HEAD_TILE + h * dim, q + h * dim, dim, scale, kv,
                  n, true);
}

static void attn_join(float *acc, const float *part, int32_t n_head, int32_t head_dim) {
    for (int32_t h = 0; h < n_head; h++) {
        const float top = acc[h] > part[h] ? acc[h] : part[h];
        const float ea = exp2_1(acc[h] - top), ep = exp2_1(part[h] - top);
        float *to = acc + 2 * CPU_HEAD_TILE + h * head_dim, *sum = &acc[CPU_HEAD_TILE + h];
        const float *from = part + 2 * CPU_HEAD_TILE + h * head_dim;
        acc[h] = top;
        *sum = *sum * ea + part[CPU_HEAD_TILE + h] * ep;
        for (int32_t c = 0; c < head_dim; c++) to[c] = to[c] * ea + from[c] * ep;
    }
}

static void attn_divide(float *out, const float *acc, int32_t n_head, int32_t head_dim) {
    const float *from = acc + 2 * CPU_HEAD_TILE;
    for (int32_t h = 0; h < n_head; h++, from += head_dim, out += head_dim) {
        const float by = 1.0f / acc[CPU_HEAD_TILE + h];
        for (int32_t c = 0; c < head_dim; c++) out[c] = from[c] * by;
    }
}

const cpu_kernels cpu_kernels_portable = {
    .level = ERN_CPU_PORTABLE,
    .name = "portable",
    .linear_bf16 = {[ERN_ORDER_OUT_IN] = linear_out_in, [ERN_ORDER_IN_OUT] = linear_in_out},
    .exact_bf16 = {[ERN_ORDER_OUT_IN] = linear_out_in, [ERN_ORDER_IN_OUT] = linear_in_out},
    .linear_i8 = cpu_linear_i8_portable,
    .linear_i4 = cpu_linear_i4_portable,
    .linear_f8 = cpu_linear_f8_portable,
    .exact_i8 = cpu_linear_exact_portable,
    .exact_i4 = cpu_linear_exact_portable,
    .exact_f8 = cpu_linear_exact_portable,
    .quant_int8 = cpu_quant_int8_portable,
    .quant_fp8 = cpu_quant_fp8_portable,
    .linear_f32 = linear_f32,
    .norm = norm,
    .silu_mul = silu_mul,
    .rope = rope,
    .softmax = softmax,
    .attn_block = {attn_bf16, attn_int8},
    .attn_join = attn_join,
    .attn_divide = attn_divide,
};
