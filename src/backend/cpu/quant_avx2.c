/* Quantized linears and int8 activations, AVX2. The sums have the order of the AVX-512 files; a band of 16 outputs is
 * two registers.
 *
 * The one instruction that multiplies bytes (pmaddubsw) adds two products in 16 bits and saturates: exact for the codes
 * of I4 (2 * 15 * 127), not for those of I8 (2 * 255 * 127). I8 lines are split into even and odd inputs, 16 bits each,
 * and go through pmaddwd, whose sums are 32 bits. */
#include "backend/cpu/table_avx2.h"
#include "backend/cpu/vec.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

enum { ROWS = 4, FLOAT_ROWS = 2, CHAINS = 4 };

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
CPU_INLINE __m256i load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

/* y = s, or y += scale * s, for outputs o..o+15 as far as there are. */
static void put(const cpu_linear_job *j, int32_t r, int32_t o, const __m256 s[2]) {
    float sum[ERN_TILE_OUT], *y = cpu_job_y(j, r) + o, scale = j->scale ? j->scale[r] : 1.0f;
    _mm256_storeu_ps(sum, s[0]);
    _mm256_storeu_ps(sum + 8, s[1]);
    for (int32_t i = 0; i < least(ERN_TILE_OUT, j->w->n_out - o); i++)
        y[i] = j->add ? _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(scale), _mm_set_ss(sum[i]), _mm_set_ss(y[i]))) : sum[i];
}

/* The scales of outputs o.. as f32; ones for F8, whose sums have theirs. */
static void out_scales(__m256 s[2], const ern_linear *w, int32_t o) {
    float f[ERN_TILE_OUT];
    for (int32_t i = 0; i < ERN_TILE_OUT; i++)
        f[i] = w->dtype == ERN_DTYPE_F8E4M3 ? 1.0f
               : o + i < w->n_out           ? ern_bf16_to_f32(((const ern_bf16 *)w->scale)[o + i])
                                            : 0.0f;
    s[0] = _mm256_loadu_ps(f);
    s[1] = _mm256_loadu_ps(f + 8);
}

/* ---- integer sums ------------------------------------------------------------------------------------------------ */

/* 16 inputs as 16-bit numbers, each four as (0, 2, 1, 3): the pairs that meet the even and the odd codes. */
CPU_INLINE void pairs(int16_t *out, const int8_t *x) {
    __m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)x));
    v = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(v, 0xd8), 0xd8);
    _mm256_storeu_si256((__m256i *)(void *)out, v);
}

CPU_INLINE __m256i set4(const void *p) {
    int32_t v;
    memcpy(&v, p, sizeof v);
    return _mm256_set1_epi32(v);
}

CPU_INLINE void i8_line(__m256i a[][2], const uint8_t *line, const int16_t (*xs)[ERN_ACT_GROUP], int32_t at,
                        const int nr) {
    const __m256i even = _mm256_set1_epi16(0xff);
    CPU_UNROLL for (int h = 0; h < 2; h++) {
        const __m256i v = load(line + 32 * h), e = _mm256_and_si256(v, even), o = _mm256_srli_epi16(v, 8);
        CPU_UNROLL for (int r = 0; r < nr; r++) {
            a[r][h] = _mm256_add_epi32(a[r][h], _mm256_madd_epi16(e, set4(xs[r] + at)));
            a[r][h] = _mm256_add_epi32(a[r][h], _mm256_madd_epi16(o, set4(xs[r] + at + 2)));
        }
    }
}

CPU_INLINE void i4_line(__m256i a[][2], const uint8_t *line, const int8_t *const *x, int32_t at, const int nr) {
    const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
    CPU_UNROLL for (int h = 0; h < 2; h++) {
        const __m256i v = load(line + 32 * h), lo = _mm256_and_si256(v, low),
                      hi = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
        CPU_UNROLL for (int r = 0; r < nr; r++) {
            a[r][h] = _mm256_add_epi32(a[r][h], _mm256_madd_epi16(_mm256_maddubs_epi16(lo, set4(x[r] + at)), one));
            a[r][h] = _mm256_add_epi32(a[r][h], _mm256_madd_epi16(_mm256_maddubs_epi16(hi, set4(x[r] + at + 4)), one));
        }
    }
}

CPU_INLINE void int_tile(const cpu_linear_job *j, int32_t r0, int32_t band, const int nr, const bool four) {
    const ern_linear *w = j->w;
    const int32_t n_tile = cpu_tiles(w->n_in), n_group = cpu_groups(w->n_in), o = band * ERN_TILE_OUT;
    const uint8_t *p = cpu_band(w, band);
    int16_t xs[ROWS][ERN_ACT_GROUP];
    const int8_t *x[ROWS];
    __m256 acc[ROWS][2], scale[2];
    CPU_UNROLL for (int r = 0; r < nr; r++) {
        x[r] = (const int8_t *)j->act.q + cpu_job_act(j, r0 + r) * cpu_act_stride(w->n_in);
        acc[r][0] = acc[r][1] = _mm256_setzero_ps();
    }
    for (int32_t g = 0; g < n_group; g++) {
        const int32_t n = least(2, n_tile - 2 * g) * ERN_TILE_IN;
        __m256i a[ROWS][2];
        CPU_UNROLL for (int r = 0; r < nr; r++) {
            const int32_t sum = j->act.sum[cpu_job_act(j, r0 + r) * n_group + g];
            a[r][0] = a[r][1] = _mm256_set1_epi32((four ? -8 : -128) * sum);
            for (int32_t i = 0; !four && i < n; i += 16) pairs(xs[r] + i, x[r] + i);
        }
        for (int32_t i = 0; i < n; i += four ? 8 : 4, p += 64) {
            if (four)
                i4_line(a, p, x, i, nr);
            else
                i8_line(a, p, xs, i, nr);
        }
        CPU_UNROLL for (int r = 0; r < nr; r++) {
            const __m256 s = _mm256_set1_ps(j->act.scale[cpu_job_act(j, r0 + r) * n_group + g]);
            CPU_UNROLL for (int h = 0; h < 2; h++) acc[r][h] =
                _mm256_fmadd_ps(s, _mm256_cvtepi32_ps(a[r][h]), acc[r][h]);
            x[r] += ERN_ACT_GROUP;
        }
    }
    out_scales(scale, w, o);
    CPU_UNROLL for (int r = 0; r < nr; r++) {
        acc[r][0] = _mm256_mul_ps(acc[r][0], scale[0]);
        acc[r][1] = _mm256_mul_ps(acc[r][1], scale[1]);
        put(j, r0 + r, o, acc[r]);
    }
}

CPU_INLINE void linear_int(const cpu_linear_job *j, const bool four) {
    const int32_t end = (j->to + ERN_TILE_OUT - 1) / ERN_TILE_OUT;
    for (int32_t band = j->from / ERN_TILE_OUT; band < end; band++) {
        for (int32_t r = 0; r < j->n_row; r += ROWS) {
            switch (least(ROWS, j->n_row - r)) {
            case 1: int_tile(j, r, band, 1, four); break;
            case 2: int_tile(j, r, band, 2, four); break;
            case 3: int_tile(j, r, band, 3, four); break;
            default: int_tile(j, r, band, ROWS, four); break;
            }
        }
    }
}

void cpu_linear_i8_avx2(const cpu_linear_job *j) { linear_int(j, false); }
void cpu_linear_i4_avx2(const cpu_linear_job *j) { linear_int(j, true); }

/* ---- sums in f32 ------------------------------------------------------------------------------------------------- */

/* Codes of 4 inputs and outputs 8h..8h+7 of a line, as in quant_avx512.c. half: an I4 line's lower or upper inputs. */
CPU_INLINE void codes(__m256 *c, const uint8_t *line, const int h, const ern_dtype t, const int half) {
    CPU_UNROLL for (int i = 0; i < CHAINS; i++) {
        if (t == ERN_DTYPE_F8E4M3) {
            __m128i v = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)(const void *)(line + 16 * i + 8 * h)));
            v = _mm_and_si128(_mm_slli_epi16(v, 7), _mm_set1_epi16((int16_t)0xbfff));
            c[i] = _mm256_cvtph_ps(v);
        } else {
            const bool four = t == ERN_DTYPE_I4;
            const __m256i v = _mm256_and_si256(_mm256_srli_epi32(load(line + 32 * h), 8 * i + (four ? 4 * half : 0)),
                                               _mm256_set1_epi32(four ? 15 : 255));
            c[i] = _mm256_sub_ps(_mm256_cvtepi32_ps(v), _mm256_set1_ps(four ? 8.0f : 128.0f));
        }
    }
}

CPU_INLINE const float *group_x(const float *x, int32_t n_in, int32_t g, float *room) {
    const int32_t left = n_in - g * ERN_ACT_GROUP;
    if (left >= ERN_ACT_GROUP) return x + g * ERN_ACT_GROUP;
    memset(room, 0, ERN_ACT_GROUP * sizeof *room);
    memcpy(room, x + g * ERN_ACT_GROUP, (size_t)left * sizeof *room);
    return room;
}

/* One group: sum[r] of outputs 8h..8h+7. */
CPU_INLINE void group_sums(__m256 *sum, const float *const *x, const uint8_t *p, int32_t n, const int nr, const int h,
                           const ern_dtype t) {
    __m256 part[FLOAT_ROWS][CHAINS], c[CHAINS];
    CPU_UNROLL for (int r = 0; r < nr; r++) CPU_UNROLL for (int i = 0; i < CHAINS; i++) part[r][i] =
        _mm256_setzero_ps();
    for (int32_t k = 0; k < n; k += 4) {
        codes(c, p, h, t, k / 4 % 2);
        if (t != ERN_DTYPE_I4 || k / 4 % 2) p += 64;
        CPU_UNROLL for (int r = 0; r < nr; r++) CPU_UNROLL for (int i = 0; i < CHAINS; i++) part[r][i] =
            _mm256_fmadd_ps(_mm256_set1_ps(x[r][k + i]), c[i], part[r][i]);
    }
    CPU_UNROLL for (int r = 0; r < nr; r++) sum[r] =
        _mm256_add_ps(_mm256_add_ps(part[r][0], part[r][1]), _mm256_add_ps(part[r][2], part[r][3]));
}

CPU_INLINE void float_tile(const cpu_linear_job *j, int32_t r0, int32_t band, const int nr, const ern_dtype t,
                           const bool exact) {
    const ern_linear *w = j->w;
    const int32_t n_tile = cpu_tiles(w->n_in), n_group = cpu_groups(w->n_in), o = band * ERN_TILE_OUT;
    float room[FLOAT_ROWS][ERN_ACT_GROUP];
    __m256 acc[FLOAT_ROWS][2], scale[2], sum[FLOAT_ROWS];
    CPU_UNROLL for (int r = 0; r < nr; r++) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
    for (int32_t g = 0; g < n_group; g++) {
        const uint8_t *p = cpu_band(w, band) + (size_t)(2 * g) * cpu_tile_bytes(t);
        const float *x[FLOAT_ROWS],
            ws = t == ERN_DTYPE_F8E4M3 ? 256.0f * ((const float *)w->scale)[(int64_t)(o / ERN_F8_BLOCK) * n_group + g]
                                       : 1.0f;
        CPU_UNROLL for (int r = 0; r < nr; r++) x[r] =
            exact ? group_x(cpu_job_x(j, r0 + r), w->n_in, g, room[r])
                  : (const float *)j->act.q + cpu_job_act(j, r0 + r) * cpu_act_stride(w->n_in) + g * ERN_ACT_GROUP;
        CPU_UNROLL for (int h = 0; h < 2; h++) {
            group_sums(sum, x, p, least(2, n_tile - 2 * g) * ERN_TILE_IN, nr, h, t);
            CPU_UNROLL for (int r = 0; r < nr; r++) {
                const float s = exact ? ws : ws * j->act.scale[cpu_job_act(j, r0 + r) * n_group + g];
                acc[r][h] = _mm256_fmadd_ps(_mm256_set1_ps(s), sum[r], acc[r][h]);
            }
        }
    }
    out_scales(scale, w, o);
    CPU_UNROLL for (int r = 0; r < nr; r++) {
        acc[r][0] = _mm256_mul_ps(acc[r][0], scale[0]);
        acc[r][1] = _mm256_mul_ps(acc[r][1], scale[1]);
        put(j, r0 + r, o, acc[r]);
    }
}

CPU_INLINE void linear_float(const cpu_linear_job *j, const ern_dtype t, const bool exact) {
    const int32_t end = (j->to + ERN_TILE_OUT - 1) / ERN_TILE_OUT;
    for (int32_t band = j->from / ERN_TILE_OUT; band < end; band++) {
        int32_t r = 0;
        for (; r + FLOAT_ROWS <= j->n_row; r += FLOAT_ROWS) float_tile(j, r, band, FLOAT_ROWS, t, exact);
        if (r < j->n_row) float_tile(j, r, band, 1, t, exact);
    }
}

void cpu_linear_f8_avx2(const cpu_linear_job *j) { linear_float(j, ERN_DTYPE_F8E4M3, false); }
void cpu_exact_i8_avx2(const cpu_linear_job *j) { linear_float(j, ERN_DTYPE_I8, true); }
void cpu_exact_i4_avx2(const cpu_linear_job *j) { linear_float(j, ERN_DTYPE_I4, true); }
void cpu_exact_f8_avx2(const cpu_linear_job *j) { linear_float(j, ERN_DTYPE_F8E4M3, true); }

/* ---- activations ------------------------------------------------------------------------------------------------- */

/* The largest magnitude of a group, by bits. */
CPU_INLINE float group_top(const float *x) {
    const __m256i mag = _mm256_set1_epi32(0x7fffffff);
    __m256i top = _mm256_setzero_si256();
    for (int i = 0; i < ERN_ACT_GROUP; i += 8) top = _mm256_max_epu32(top, _mm256_and_si256(load(x + i), mag));
    uint32_t lane[8], most = 0;
    _mm256_storeu_si256((__m256i *)(void *)lane, top);
    for (int i = 0; i < 8; i++) most = lane[i] > most ? lane[i] : most;
    float a;
    memcpy(&a, &most, sizeof a);
    return a;
}

/* 32 numbers times f to the nearest integers, as bytes; all[8] += them. */
CPU_INLINE void codes32(int8_t *q, __m256i *all, const float *x, __m256 f) {
    __m256i v[4];
    CPU_UNROLL for (int i = 0; i < 4; i++) {
        v[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), f));
        *all = _mm256_add_epi32(*all, v[i]);
    }
    /* both packings work on halves of 128 bits, so fours of bytes lie as 0, 2, 4, 6, 1, 3, 5, 7 */
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    _mm256_storeu_si256((__m256i *)(void *)q,
                        _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}

void cpu_quant_int8_avx2(int8_t *q, float *scale, int32_t *sum, const float *x, int32_t n) {
    const int32_t padded = cpu_act_width(n);
    for (int32_t g = 0; g * ERN_ACT_GROUP < n; g++) {
        float room[ERN_ACT_GROUP];
        const float *xg = group_x(x, n, g, room), a = group_top(xg);
        const int32_t to = least(ERN_ACT_GROUP, padded - g * ERN_ACT_GROUP);
        float f = a > 0.0f ? 127.0f / a : 0.0f, s = a / 127.0f;
        if (!(a <= 0x1.fffffep127f)) f = 0.0f, s = NAN;
        if (s < 0x1p-100f) f = s = 0.0f;
        scale[g] = s;
        __m256i all = _mm256_setzero_si256();
        if (f > 0.0f)
            for (int32_t i = 0; i < to; i += 32) codes32(q + g * ERN_ACT_GROUP + i, &all, xg + i, _mm256_set1_ps(f));
        else
            memset(q + g * ERN_ACT_GROUP, 0, (size_t)to); /* no NaN may be converted */
        int32_t lane[8];
        _mm256_storeu_si256((__m256i *)(void *)lane, all);
        sum[g] = lane[0] + lane[1] + lane[2] + lane[3] + lane[4] + lane[5] + lane[6] + lane[7];
    }
}

/* v to the nearest e4m3 number, |v| <= 448 and a bit: ern_e4m3_from_f32 and back. */
CPU_INLINE __m256 round_e4m3(__m256 v) {
    const __m256i minus = _mm256_set1_epi32((int32_t)0x80000000u), bits = _mm256_castps_si256(v);
    const __m256i sign = _mm256_and_si256(bits, minus), u = _mm256_andnot_si256(minus, bits);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 20), _mm256_set1_epi32(1));
    __m256i near = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7ffff)), odd);
    near = _mm256_and_si256(near, _mm256_set1_epi32((int32_t)0xfff00000u));
    const __m256 big = _mm256_set1_ps(0x1p14f);
    const __m256 small = _mm256_sub_ps(_mm256_add_ps(_mm256_castsi256_ps(u), big), big); /* multiples of 2^-9 */
    const __m256 is_small = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(0x3c800000), u));
    const __m256 y = _mm256_blendv_ps(_mm256_castsi256_ps(near), small, is_small);
    return _mm256_or_ps(_mm256_min_ps(y, _mm256_set1_ps(448.0f)), _mm256_castsi256_ps(sign));
}

void cpu_quant_fp8_avx2(float *q, float *scale, const float *x, int32_t n) {
    const int32_t padded = cpu_act_width(n);
    for (int32_t g = 0; g * ERN_ACT_GROUP < n; g++) {
        float room[ERN_ACT_GROUP], *to = q + g * ERN_ACT_GROUP;
        const float *xg = group_x(x, n, g, room), a = group_top(xg), top = a < 1e-10f ? 1e-10f : a;
        const bool finite = a <= 0x1.fffffep127f;
        const float f = finite ? 448.0f / top : 0.0f;
        const int32_t m = least(ERN_ACT_GROUP, padded - g * ERN_ACT_GROUP);
        scale[g] = finite ? top / 448.0f : NAN;
        for (int32_t i = 0; i < m; i += 8)
            _mm256_storeu_ps(to + i, f > 0.0f ? round_e4m3(_mm256_mul_ps(_mm256_loadu_ps(xg + i), _mm256_set1_ps(f)))
                                              : _mm256_setzero_ps());
    }
}
