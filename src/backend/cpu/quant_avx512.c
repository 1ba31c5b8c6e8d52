/* Quantized activations, and quantized linears whose sums are f32, AVX-512: F8E4M3 on fp8 activations, and each format
 * on f32 activations as they are.
 *
 * Lane = output. The inputs of a group (128) are summed in four chains, input i in chain i % 4, each ascending; the
 * chains join as (0 + 1) + (2 + 3), and groups follow in order: an order of K alone. */
#include "backend/cpu/table_avx512.h"
#include "backend/cpu/vec_avx512.h"

#include <math.h>
#include <string.h>

enum { ROWS = 5, CHAINS = 4 }; /* 5 x 4 sums + 4 weights: 24 registers, the rest unpack */

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

/* ---- activations ------------------------------------------------------------------------------------------------- */

/* The larger magnitudes, by bits: infinity and NaN win. */
CPU_INLINE __m512i larger(__m512i top, __m512 x) {
    return _mm512_max_epu32(top, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
}
CPU_INLINE float largest(__m512i top) {
    const uint32_t bits = _mm512_reduce_max_epu32(top);
    float a;
    memcpy(&a, &bits, sizeof a);
    return a;
}

/* The largest magnitude among n <= 128 numbers. */
CPU_INLINE float group_top(const float *x, int32_t n) {
    __m512i top = _mm512_setzero_si512();
    for (int32_t i = 0; i < n; i += 16) top = larger(top, _mm512_maskz_loadu_ps(cpu_mask(n - i), x + i));
    return largest(top);
}

/* The scale of a group whose largest magnitude is a. Returns its reciprocal, 0 where all codes are 0. */
CPU_INLINE float int8_scale(float *scale, float a) {
    float f = a > 0.0f ? 127.0f / a : 0.0f, s = a / 127.0f;
    if (!(a <= 0x1.fffffep127f)) f = 0.0f, s = NAN;
    if (s < 0x1p-100f) f = s = 0.0f;
    *scale = s;
    return f > 0.0f ? f : 0.0f;
}

/* Sixteen codes. */
CPU_INLINE __m512i put_codes(int8_t *q, __m512 x, __m512 f) {
    const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(x, f));
    _mm_storeu_si128((__m128i *)(void *)q, _mm512_cvtepi32_epi8(v));
    return v;
}

/* A whole group in registers. */
enum { GROUP_16 = ERN_ACT_GROUP / 16 };
CPU_INLINE void quant_whole(int8_t *q, float *scale, int32_t *sum, const __m512 *x) {
    __m512i top = _mm512_setzero_si512(), all = _mm512_setzero_si512();
    CPU_UNROLL for (int i = 0; i < GROUP_16; i++) top = larger(top, x[i]);
    const float f = int8_scale(scale, largest(top));
    const __m512 fv = _mm512_set1_ps(f);
    if (f > 0.0f) {
        CPU_UNROLL for (int i = 0; i < GROUP_16; i++) all = _mm512_add_epi32(all, put_codes(q + 16 * i, x[i], fv));
    } else {
        memset(q, 0, ERN_ACT_GROUP); /* no NaN may be converted */
    }
    *sum = _mm512_reduce_add_epi32(all);
}

/* The last m < 128 inputs, zeros beyond them to n. */
CPU_INLINE void quant_rest(int8_t *q, float *scale, int32_t *sum, const float *x, int32_t m, int32_t n) {
    const float f = int8_scale(scale, group_top(x, m));
    __m512i all = _mm512_setzero_si512();
    const __m512 fv = _mm512_set1_ps(f);
    if (!(f > 0.0f)) m = 0;
    for (int32_t i = 0; i < n; i += 16)
        all = _mm512_add_epi32(all, put_codes(q + i, _mm512_maskz_loadu_ps(cpu_mask(m - i), x + i), fv));
    *sum = _mm512_reduce_add_epi32(all);
}

void cpu_quant_int8_avx512(int8_t *q, float *scale, int32_t *sum, const float *x, int32_t n) {
    int32_t g = 0, at = 0;
    for (; at + ERN_ACT_GROUP <= n; g++, at += ERN_ACT_GROUP) {
        __m512 v[GROUP_16];
        CPU_UNROLL for (int i = 0; i < GROUP_16; i++) v[i] = _mm512_loadu_ps(x + at + 16 * i);
        quant_whole(q + at, scale + g, sum + g, v);
    }
    if (at < n) quant_rest(q + at, scale + g, sum + g, x + at, n - at, cpu_act_width(n) - at);
}

void cpu_silu_int8_avx512(int8_t *q, float *scale, int32_t *sum, const float *gate, const float *up) {
    __m512 v[GROUP_16];
    CPU_UNROLL for (int i = 0; i < GROUP_16; i++) v[i] =
        cpu_silu16(_mm512_loadu_ps(gate + 16 * i), _mm512_loadu_ps(up + 16 * i));
    quant_whole(q, scale, sum, v);
}

/* v to the nearest e4m3 number, |v| <= 448 and a bit: ern_e4m3_from_f32 and back. */
CPU_INLINE __m512 round_e4m3(__m512 v) {
    const __m512i sign = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32((int32_t)0x80000000u));
    const __m512i u = _mm512_andnot_si512(_mm512_set1_epi32((int32_t)0x80000000u), _mm512_castps_si512(v));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 20), _mm512_set1_epi32(1));
    __m512i near = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7ffff)), odd);
    near = _mm512_and_si512(near, _mm512_set1_epi32((int32_t)0xfff00000u));
    const __m512 big = _mm512_set1_ps(0x1p14f);
    const __m512 small = _mm512_sub_ps(_mm512_add_ps(_mm512_castsi512_ps(u), big), big); /* multiples of 2^-9 */
    __m512 y =
        _mm512_mask_mov_ps(_mm512_castsi512_ps(near), _mm512_cmplt_epu32_mask(u, _mm512_set1_epi32(0x3c800000)), small);
    y = _mm512_min_ps(y, _mm512_set1_ps(448.0f));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(y), sign));
}

void cpu_quant_fp8_avx512(float *q, float *scale, const float *x, int32_t n) {
    const int32_t padded = cpu_act_width(n);
    for (int32_t g = 0, at = 0; at < n; g++, at += ERN_ACT_GROUP) {
        const int32_t m = least(ERN_ACT_GROUP, n - at);
        float a = group_top(x + at, m), f;
        if (!(a <= 0x1.fffffep127f)) {
            f = 0.0f, scale[g] = NAN;
        } else {
            if (a < 1e-10f) a = 1e-10f;
            f = 448.0f / a, scale[g] = a / 448.0f;
        }
        const __m512 fv = _mm512_set1_ps(f);
        for (int32_t i = 0; i < least(ERN_ACT_GROUP, padded - at); i += 16) {
            const __mmask16 live = f > 0.0f ? cpu_mask(m - i) : 0;
            _mm512_storeu_ps(q + at + i, round_e4m3(_mm512_mul_ps(_mm512_maskz_loadu_ps(live, x + at + i), fv)));
        }
    }
}

/* ---- linears ----------------------------------------------------------------------------------------------------- */

/* Four inputs of 16 outputs from an F8 line: sign, 4 bits of exponent, 3 of mantissa into an f16's places, which makes
 * the number 2^-8 of what it was; the code NaN (which no file may hold) would read as 480. */
CPU_INLINE void f8_line(__m512 *w, const uint8_t *line) {
    CPU_UNROLL for (int i = 0; i < 4; i += 2) {
        __m512i h = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)(line + 16 * i)));
        h = _mm512_and_si512(_mm512_slli_epi16(h, 7), _mm512_set1_epi16((int16_t)0xbfff));
        w[i] = _mm512_cvtph_ps(_mm512_castsi512_si256(h));
        w[i + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1));
    }
}

/* The same from an integer line, whose codes lie in byte i of each output's four, from bit `shift` on. */
CPU_INLINE void int_line(__m512 *w, const uint8_t *line, const int shift, const int mask, const float zero) {
    const __m512i v = _mm512_loadu_si512(line);
    CPU_UNROLL for (int i = 0; i < 4; i++) {
        const __m512i c = _mm512_and_si512(_mm512_srli_epi32(v, (unsigned)(8 * i + shift)), _mm512_set1_epi32(mask));
        w[i] = _mm512_sub_ps(_mm512_cvtepi32_ps(c), _mm512_set1_ps(zero));
    }
}

/* The inputs of group g of a row; its ragged end goes through `room` [128], to be followed by zeros. */
CPU_INLINE const float *group_x(const float *x, int32_t n_in, int32_t g, float *room) {
    const int32_t left = n_in - g * ERN_ACT_GROUP;
    if (left >= ERN_ACT_GROUP) return x + g * ERN_ACT_GROUP;
    memset(room, 0, ERN_ACT_GROUP * sizeof *room);
    memcpy(room, x + g * ERN_ACT_GROUP, (size_t)left * sizeof *room);
    return room;
}

CPU_INLINE void float_tile(const cpu_linear_job *j, int32_t r0, int32_t band, const int nr, const ern_dtype t,
                           const bool exact) {
    const ern_linear *w = j->w;
    const int32_t n_tile = cpu_tiles(w->n_in), n_group = cpu_groups(w->n_in), o = band * ERN_TILE_OUT;
    const uint8_t *p = cpu_band(w, band);
    const bool f8 = t == ERN_DTYPE_F8E4M3, four = t == ERN_DTYPE_I4;
    float room[ROWS][ERN_ACT_GROUP];
    __m512 acc[ROWS];
    CPU_UNROLL for (int r = 0; r < nr; r++) acc[r] = _mm512_setzero_ps();
    for (int32_t g = 0; g < n_group; g++) {
        const float *x[ROWS];
        __m512 part[ROWS][CHAINS];
        CPU_UNROLL for (int r = 0; r < nr; r++) {
            x[r] = exact
                       ? group_x(cpu_job_x(j, r0 + r), w->n_in, g, room[r])
                       : (const float *)j->act.q + cpu_job_act(j, r0 + r) * cpu_act_stride(w->n_in) + g * ERN_ACT_GROUP;
            CPU_UNROLL for (int i = 0; i < CHAINS; i++) part[r][i] = _mm512_setzero_ps();
        }
        const int32_t n_line = least(2, n_tile - 2 * g) * (ERN_TILE_IN / 4);
        for (int32_t l = 0; l < n_line; l += 2) {
            CPU_UNROLL for (int u = 0; u < 2; u++) {
                __m512 code[CHAINS];
                if (f8)
                    f8_line(code, p + 64 * u);
                else if (four)
                    int_line(code, p, 4 * u, 15, 8.0f);
                else
                    int_line(code, p + 64 * u, 0, 255, 128.0f);
                CPU_UNROLL for (int r = 0; r < nr; r++) CPU_UNROLL for (int i = 0; i < CHAINS; i++) part[r][i] =
                    _mm512_fmadd_ps(_mm512_set1_ps(x[r][4 * (l + u) + i]), code[i], part[r][i]);
            }
            p += four ? 64 : 128;
        }
        const float ws = f8 ? 256.0f * ((const float *)w->scale)[(int64_t)(o / ERN_F8_BLOCK) * n_group + g] : 1.0f;
        CPU_UNROLL for (int r = 0; r < nr; r++) {
            const float s = exact ? ws : ws * j->act.scale[cpu_job_act(j, r0 + r) * n_group + g];
            const __m512 sum =
                _mm512_add_ps(_mm512_add_ps(part[r][0], part[r][1]), _mm512_add_ps(part[r][2], part[r][3]));
            acc[r] = _mm512_fmadd_ps(_mm512_set1_ps(s), sum, acc[r]);
        }
    }
    const __mmask16 m = cpu_mask(w->n_out - o);
    const __m512 scale = f8 ? _mm512_set1_ps(1.0f) : cpu_load_bf16_mask((const ern_bf16 *)w->scale + (f8 ? 0 : o), m);
    CPU_UNROLL for (int r = 0; r < nr; r++) cpu_put_band(j, r0 + r, o, m, _mm512_mul_ps(acc[r], scale));
}

CPU_INLINE void linear_float(const cpu_linear_job *j, const ern_dtype t, const bool exact) {
    const int32_t end = (j->to + ERN_TILE_OUT - 1) / ERN_TILE_OUT;
    for (int32_t band = j->from / ERN_TILE_OUT; band < end; band++) {
        for (int32_t r = 0; r < j->n_row; r += ROWS) {
            switch (least(ROWS, j->n_row - r)) {
            case 1: float_tile(j, r, band, 1, t, exact); break;
            case 2: float_tile(j, r, band, 2, t, exact); break;
            case 3: float_tile(j, r, band, 3, t, exact); break;
            case 4: float_tile(j, r, band, 4, t, exact); break;
            default: float_tile(j, r, band, ROWS, t, exact); break;
            }
        }
    }
}

void cpu_linear_f8_avx512(const cpu_linear_job *j) { linear_float(j, ERN_DTYPE_F8E4M3, false); }
void cpu_exact_i8_avx512(const cpu_linear_job *j) { linear_float(j, ERN_DTYPE_I8, true); }
void cpu_exact_i4_avx512(const cpu_linear_job *j) { linear_float(j, ERN_DTYPE_I4, true); }
void cpu_exact_f8_avx512(const cpu_linear_job *j) { linear_float(j, ERN_DTYPE_F8E4M3, true); }
