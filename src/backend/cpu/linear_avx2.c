/* Linear layers with bf16 weights, AVX2: both layouts, any number of rows. The sums are those of linear_avx512.c, which
 * draws them: OUT_IN in 16 lanes over blocks of K_BLOCK_OUT_IN inputs, a pair of registers here; IN_OUT a chain for
 * each output over blocks of K_BLOCK_IN_OUT. With half as many registers of half the size the tiles are 3 rows by 2
 * outputs, or by 32. */
#include "backend/cpu/table_avx2.h"
#include "backend/cpu/vec_avx2.h"

_Static_assert(CPU_PANEL_LINES == 4 && CPU_LINE == 32, "as the tiles and the lines' halves are written");

enum {
    K_BLOCK_OUT_IN = 1024,
    K_BLOCK_IN_OUT = 512,
    ROWS = 3,           /* 3 x 2 pairs of sums + 2 weights + 1 x: 15 of 16 registers; or 3 x 4 sums + 3 x + 1 weight */
    OUTS = 2,           /* of a tile of several rows; one row has 4 */
    AHEAD = 16 << 10,   /* bytes fetched ahead into L2 */
    L2_OUTS = 128,      /* outputs whose weights (256 KiB) stay in L2 while all rows pass */
    STREAMS = 8,        /* weight rows read side by side for one row of x */
    STREAM_OUTS = 2048, /* 8 KiB of sums */
    AHEAD_ROWS = 8,     /* weight rows fetched ahead: they lie a page or more apart, where the hardware does not look */
    SPAN = 32,          /* outputs of an IN_OUT tile: a cache line of each weight row */
};

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
CPU_INLINE void fetch(uintptr_t p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }

/* y = s for the first block of a plain product, else y += scale * s, for the first n outputs. */
CPU_INLINE void put4(float *y, __m128 s, int64_t n, bool set, float scale) {
    const __m128i m = _mm256_castsi256_si128(cpu_lanes8(n));
    if (!set) s = _mm_fmadd_ps(_mm_set1_ps(scale), s, _mm_maskload_ps(y, m));
    _mm_maskstore_ps(y, m, s);
}
CPU_INLINE void put8(float *y, __m256 s, int64_t n, bool set, float scale) {
    if (!set) s = _mm256_fmadd_ps(_mm256_set1_ps(scale), s, cpu_load8_cut(y, n));
    cpu_store8_cut(y, n, s);
}

/* ---- OUT_IN ------------------------------------------------------------------------------------------------------ */

/* 8 lanes of a panel's line: their lower halves, inputs 0..15 of the line, or the upper ones. The mask stays in memory:
 * a register for it would cost one of the sums. */
CPU_INLINE __m256 panel_part(const ern_bf16 *line, const int upper) {
    static const _Alignas(32) uint32_t high[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                  0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
    __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)line);
    if (!upper) return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
    __asm__("vpand %1, %0, %0" : "+x"(v) : "m"(high));
    return _mm256_castsi256_ps(v);
}

/* nr rows from r0, no outputs from o0, inputs k0..k1-1, of rows or of a panel, whose lines have inputs i and i+16 in
 * one 32-bit lane. */
CPU_INLINE void out_in_tile(const cpu_linear_job *j, int32_t r0, int32_t o0, int32_t k0, int32_t k1, const int nr,
                            const int no, const bool panel, const bool ahead) {
    const int64_t stride = panel ? CPU_LINE : j->w->stride;
    const ern_bf16 *w = j->w->data;
    w += panel ? o0 / CPU_PANEL_LINES * cpu_panel_numbers(CPU_PANEL_LINES, j->w->n_in) +
                     o0 % CPU_PANEL_LINES * CPU_LINE + (int64_t)k0 * CPU_PANEL_LINES
               : o0 * stride + k0;
    /* many rows walk blocks of K one by one: then the same block two panels on */
    const uintptr_t far =
        panel && j->n_row > ROWS ? 2 * (uintptr_t)cpu_panel_numbers(CPU_PANEL_LINES, j->w->n_in) * sizeof *w : AHEAD;
    const float *x[ROWS];
    __m256 acc[ROWS][CPU_PANEL_LINES][2];
    CPU_UNROLL for (int r = 0; r < nr; r++) {
        x[r] = cpu_job_x(j, r0 + r);
        CPU_UNROLL for (int o = 0; o < no; o++) acc[r][o][0] = acc[r][o][1] = _mm256_setzero_ps();
    }
    int32_t k = k0;
    for (; k + CPU_LINE <= k1; k += CPU_LINE, w += panel ? CPU_LINE * CPU_PANEL_LINES : CPU_LINE) {
        CPU_UNROLL for (int q = 0; q < 4; q++) { /* inputs 8q..8q+7 */
            __m256 wv[CPU_PANEL_LINES];
            CPU_UNROLL for (int o = 0; o < no; o++) {
                if (ahead && q < 2) fetch((uintptr_t)w + far + 64 * (uintptr_t)(2 * o + q));
                if (!panel) {
                    wv[o] = cpu_bf16_8(w + o * stride + 8 * q);
                    continue;
                }
                wv[o] = panel_part(w + o * stride + 16 * (q % 2), q / 2);
            }
            CPU_UNROLL for (int r = 0; r < nr; r++) {
                __m256 xv = _mm256_loadu_ps(x[r] + k + 8 * q);
                __asm__("" : "+x"(xv)); /* load it once, not for each output */
                CPU_UNROLL for (int o = 0; o < no; o++) acc[r][o][q % 2] = _mm256_fmadd_ps(xv, wv[o], acc[r][o][q % 2]);
            }
        }
    }
    if (k < k1) { /* a cut line; what is missing of it counts as zeros */
        CPU_UNROLL for (int q = 0; q < 4; q++) {
            const int64_t left = k1 - k - 8 * q;
            if (left <= 0) break;
            CPU_UNROLL for (int o = 0; o < no; o++) {
                const ern_bf16 *line = w + o * stride;
                ern_bf16 half[8] = {0};
                for (int i = 0; panel && i < 8; i++) half[i] = line[2 * (8 * (q % 2) + i) + q / 2];
                const __m256 wv = panel ? cpu_bf16_8(half) : cpu_bf16_8_cut(line + 8 * q, left);
                CPU_UNROLL for (int r = 0; r < nr; r++) acc[r][o][q % 2] =
                    _mm256_fmadd_ps(cpu_load8_cut(x[r] + k + 8 * q, left), wv, acc[r][o][q % 2]);
            }
        }
    }
    const __m128 z = _mm_setzero_ps();
    CPU_UNROLL for (int r = 0; r < nr; r++) {
        const __m128 s = cpu_tree4(cpu_fold(acc[r][0]), no > 1 ? cpu_fold(acc[r][1]) : z,
                                   no > 2 ? cpu_fold(acc[r][2]) : z, no > 2 ? cpu_fold(acc[r][3]) : z);
        put4(cpu_job_y(j, r0 + r) + o0, s, least(no, j->w->n_out - o0), !j->add && k0 == 0,
             j->scale ? j->scale[r0 + r] : 1.0f);
    }
}

/* Outputs o..oe-1 of a panel or of rows. The hardware follows the one stream of a panel by itself for one row; several
 * compute for longer than it looks ahead: the first to pass fetch what follows. */
static void out_in_rows(const cpu_linear_job *j, int32_t r, int32_t nr, int32_t o, int32_t oe, int32_t k0, int32_t k1) {
    const bool panel = cpu_is_panels(j->w), first = r == 0;
    for (; panel && nr == 1 && o < oe; o += CPU_PANEL_LINES)
        out_in_tile(j, r, o, k0, k1, 1, CPU_PANEL_LINES, true, false);
    for (; panel && o < oe; o += OUTS) {
        if (nr == 2 && first) out_in_tile(j, r, o, k0, k1, 2, OUTS, true, true);
        if (nr == 2 && !first) out_in_tile(j, r, o, k0, k1, 2, OUTS, true, false);
        if (nr == 3 && first) out_in_tile(j, r, o, k0, k1, ROWS, OUTS, true, true);
        if (nr == 3 && !first) out_in_tile(j, r, o, k0, k1, ROWS, OUTS, true, false);
    }
    for (; nr == 1 && o + CPU_PANEL_LINES <= oe; o += CPU_PANEL_LINES)
        out_in_tile(j, r, o, k0, k1, 1, CPU_PANEL_LINES, false, true);
    for (; o + OUTS <= oe; o += OUTS) {
        if (nr == 1) out_in_tile(j, r, o, k0, k1, 1, OUTS, false, true);
        if (nr == 2) out_in_tile(j, r, o, k0, k1, 2, OUTS, false, true);
        if (nr == 3) out_in_tile(j, r, o, k0, k1, ROWS, OUTS, false, true);
    }
    for (; o < oe; o++) {
        if (nr == 1) out_in_tile(j, r, o, k0, k1, 1, 1, false, false);
        if (nr == 2) out_in_tile(j, r, o, k0, k1, 2, 1, false, false);
        if (nr == 3) out_in_tile(j, r, o, k0, k1, ROWS, 1, false, false);
    }
}

void cpu_linear_out_in_avx2(const cpu_linear_job *j) {
    const int32_t n_in = j->w->n_in;
    /* Few rows: walk each weight row to its end, as memory likes it. Many: keep a block of weights in L2. */
    const int32_t outs = j->n_row <= ROWS ? CPU_PANEL_LINES : L2_OUTS;
    for (int32_t ob = j->from; ob < j->to; ob += outs) {
        const int32_t oe = least(ob + outs, j->to);
        for (int32_t k0 = 0; k0 < n_in; k0 += K_BLOCK_OUT_IN)
            for (int32_t r = 0; r < j->n_row; r += ROWS)
                out_in_rows(j, r, least(ROWS, j->n_row - r), ob, oe, k0, least(k0 + K_BLOCK_OUT_IN, n_in));
    }
}

/* ---- IN_OUT ------------------------------------------------------------------------------------------------------ */

/* nr rows from r0, SPAN outputs from o0, or the first n < SPAN of them; inputs k0..k1-1. */
CPU_INLINE void in_out_tile(const cpu_linear_job *j, int32_t r0, int32_t o0, int32_t n, int32_t k0, int32_t k1,
                            const int nr, const bool cut) {
    enum { VECS = SPAN / 8 };
    const int64_t stride = j->w->stride;
    const ern_bf16 *w = (const ern_bf16 *)j->w->data + k0 * stride + o0;
    const uintptr_t ahead = (uintptr_t)(AHEAD_ROWS * stride) * sizeof *w;
    const float *x[ROWS];
    __m256 acc[ROWS][VECS];
    CPU_UNROLL for (int r = 0; r < nr; r++) {
        x[r] = cpu_job_x(j, r0 + r);
        CPU_UNROLL for (int v = 0; v < VECS; v++) acc[r][v] = _mm256_setzero_ps();
    }
    for (int32_t k = k0; k < k1; k++, w += stride) {
        __m256 xv[ROWS];
        _mm_prefetch((const char *)((uintptr_t)w + ahead), _MM_HINT_T0);
        CPU_UNROLL for (int r = 0; r < nr; r++) xv[r] = _mm256_broadcast_ss(x[r] + k);
        CPU_UNROLL for (int v = 0; v < VECS; v++) {
            const __m256 wv = cut ? cpu_bf16_8_cut(w + v * 8, n - v * 8) : cpu_bf16_8(w + v * 8);
            CPU_UNROLL for (int r = 0; r < nr; r++) acc[r][v] = _mm256_fmadd_ps(xv[r], wv, acc[r][v]);
        }
    }
    CPU_UNROLL for (int r = 0; r < nr; r++) CPU_UNROLL for (int v = 0; v < VECS; v++) if (!cut || n > v * 8)
        put8(cpu_job_y(j, r0 + r) + o0 + v * 8, acc[r][v], n - v * 8, !j->add && k0 == 0,
             j->scale ? j->scale[r0 + r] : 1.0f);
}

#define IN_OUT_CASE(nr)                                     \
    case nr:                                                \
        if (n == SPAN)                                      \
            in_out_tile(j, r0, o, SPAN, k0, k1, nr, false); \
        else                                                \
            in_out_tile(j, r0, o, n, k0, k1, nr, true);     \
        break

static void in_out_span(const cpu_linear_job *j, int32_t r0, int32_t o, int32_t n, int32_t k0, int32_t k1) {
    switch (least(ROWS, j->n_row - r0)) {
        IN_OUT_CASE(1);
        IN_OUT_CASE(2);
        IN_OUT_CASE(3);
    default: break;
    }
}

/* acc[0..n) += sum over nk inputs of x[i] * (row i of w), inputs in order. */
CPU_INLINE void stream_rows(float *acc, int32_t n, const float *x, const ern_bf16 *w, int64_t stride, const int nk) {
    const uintptr_t ahead = (uintptr_t)(2 * nk * stride) * sizeof *w; /* the group after the next, same columns */
    for (int32_t o = 0; o < n; o += 8) {
        __m256 a = _mm256_loadu_ps(acc + o);
        CPU_UNROLL for (int i = 0; i < nk; i++) {
            const ern_bf16 *at = w + i * stride + o;
            if (nk > 1 && o % 32 == 0) fetch((uintptr_t)at + ahead);
            a = _mm256_fmadd_ps(_mm256_broadcast_ss(x + i), n - o >= 8 ? cpu_bf16_8(at) : cpu_bf16_8_cut(at, n - o), a);
        }
        _mm256_storeu_ps(acc + o, a);
    }
}

/* One row: the sums of a long span of outputs stay in L1 while weight rows stream by, each read along its length. The
 * same sums in the same order as the tiles. */
static void in_out_one(const cpu_linear_job *j) {
    _Alignas(64) float acc[STREAM_OUTS];
    const int32_t n_in = j->w->n_in;
    const float *x = cpu_job_x(j, 0), scale = j->scale ? j->scale[0] : 1.0f;
    const int64_t stride = j->w->stride;
    float *y = cpu_job_y(j, 0);
    for (int32_t o = j->from; o < j->to; o += STREAM_OUTS) {
        const int32_t n = least(STREAM_OUTS, j->to - o);
        const ern_bf16 *w = (const ern_bf16 *)j->w->data + o;
        for (int32_t k0 = 0; k0 < n_in; k0 += K_BLOCK_IN_OUT) {
            const int32_t k1 = least(k0 + K_BLOCK_IN_OUT, n_in);
            int32_t k = k0;
            memset(acc, 0, sizeof acc);
            for (; k + STREAMS <= k1; k += STREAMS) stream_rows(acc, n, x + k, w + k * stride, stride, STREAMS);
            for (; k < k1; k++) stream_rows(acc, n, x + k, w + k * stride, stride, 1);
            for (int32_t i = 0; i < n; i += 8)
                put8(y + o + i, _mm256_load_ps(acc + i), n - i, !j->add && k0 == 0, scale);
        }
    }
}

void cpu_linear_in_out_avx2(const cpu_linear_job *j) {
    if (j->n_row == 1) {
        in_out_one(j);
        return;
    }
    const int32_t n_in = j->w->n_in;
    for (int32_t k0 = 0; k0 < n_in; k0 += K_BLOCK_IN_OUT)
        for (int32_t o = j->from; o < j->to; o += SPAN) /* 32 KiB of weights, while all rows pass */
            for (int32_t r = 0; r < j->n_row; r += ROWS)
                in_out_span(j, r, o, least(SPAN, j->to - o), k0, least(k0 + K_BLOCK_IN_OUT, n_in));
}

/* ---- the router -------------------------------------------------------------------------------------------------- */

void cpu_linear_f32_avx2(float *y, const float *x, const float *w, int32_t n_out, int32_t n_in) {
    for (int32_t o = 0; o < n_out; o++) {
        const float *row = w + (int64_t)o * n_in;
        __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        int32_t k = 0;
        for (; k + 16 <= n_in; k += 16)
            CPU_UNROLL for (int i = 0; i < 2; i++) acc[i] =
                _mm256_fmadd_ps(_mm256_loadu_ps(x + k + 8 * i), _mm256_loadu_ps(row + k + 8 * i), acc[i]);
        for (int i = 0; k < n_in; k += 8, i++)
            acc[i] = _mm256_fmadd_ps(cpu_load8_cut(x + k, n_in - k), cpu_load8_cut(row + k, n_in - k), acc[i]);
        y[o] = cpu_sum1(acc);
    }
}
