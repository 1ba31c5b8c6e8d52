/* Linear layers with bf16 weights, AVX-512: both layouts, any number of rows.
 *
 * OUT_IN (a row of W is one output): dot products. Each (row, output) pair owns one register; lane i sums the inputs
 * i, i+16, ... of a block of K_BLOCK_OUT_IN; then one tree over the lanes.
 *
 *        k ->                       x rows: 6          acc[6][4], each 16 lanes wide
 *   W  o [################]    .    [########]    ->   sum lanes -> y[r][o..o+3]
 *
 * IN_OUT (a row of W is one input): outer products. Lane i of a register is output o+i; inputs of a block of
 * K_BLOCK_IN_OUT follow one another in order.
 *
 *        o ->
 *   W  k [####]  k+1 [####] ...   x[r][k] broadcast    ->   acc[r] += x[r][k] * W[k][o..]
 *
 * In both, blocks of K are added to y in order, so the order of every sum depends on K alone; the number of rows only
 * chooses how many sums run side by side and how the loops are nested. */
#include "backend/cpu/table_avx512.h"
#include "backend/cpu/vec_avx512.h"

#include <string.h>

_Static_assert(CPU_PANEL_LINES == 4 && CPU_LINE == 32, "as the tiles and the lines' halves are written");

enum {
    K_BLOCK_OUT_IN = 1024, /* a tile of 6 rows of x is 24 KiB: it stays in the L1 cache */
    K_BLOCK_IN_OUT = 512,
    ROWS_OUT_IN = 6, /* 6 x 4 sums + 4 weights + 1 x: 29 of 32 registers */
    OUTS_OUT_IN = CPU_PANEL_LINES,
    F32_OUTS = 8,
    NEAR_INPUTS = 8192, /* of all rows: 32 KiB */
    AHEAD_OUT_IN =
        16 << 10,    /* bytes fetched ahead into L2, in the order of memory: weight rows are short for the hardware */
    ROWS_IN_OUT = 8, /* 8 x 3 sums + 3 weights + 1 x: 28 registers */
    L2_OUTS = 128,   /* outputs whose weights (256 KiB) stay in L2 while all rows pass */
    STREAMS = 8,     /* weight rows read side by side */
    STREAM_OUTS = 2048, /* 8 KiB of sums */
    AHEAD_IN_OUT = 8,   /* weight rows fetched ahead: they lie a page or more apart, where the hardware does not look */
};

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

/* y = s for the first block of a plain product, else y += scale * s, for the lanes of m. */
CPU_INLINE void put4(float *y, __m128 s, __mmask8 m, bool set, float scale) {
    __m128 was = _mm_maskz_loadu_ps(m, y);
    _mm_mask_storeu_ps(y, m, set ? s : _mm_fmadd_ps(_mm_set1_ps(scale), s, was));
}
CPU_INLINE void put16(float *y, __m512 s, __mmask16 m, bool set, float scale) {
    __m512 was = _mm512_maskz_loadu_ps(m, y);
    _mm512_mask_storeu_ps(y, m, set ? s : _mm512_fmadd_ps(_mm512_set1_ps(scale), s, was));
}

/* Inputs 0..15 or 16..31 of a panel's line. */
CPU_INLINE __m512 panel_half(const ern_bf16 *line, const int half, __m512i high) {
    const __m512i v = _mm512_loadu_si512(line);
    return _mm512_castsi512_ps(half ? _mm512_and_si512(v, high) : _mm512_slli_epi32(v, 16));
}

/* nr rows from r0, no outputs from o0, inputs k0..k1-1. */
CPU_INLINE void out_in_tile(const cpu_linear_job *j, int32_t r0, int32_t o0, int32_t k0, int32_t k1, const int nr,
                            const int no) {
    const ern_bf16 *w = (const ern_bf16 *)j->w->data + o0 * j->w->stride;
    const int64_t stride = j->w->stride;
    const uintptr_t ahead = (uintptr_t)w + AHEAD_OUT_IN;
    const float *x[ROWS_OUT_IN];
    __m512 acc[ROWS_OUT_IN][OUTS_OUT_IN];
    CPU_UNROLL for (int r = 0; r < nr; r++) {
        x[r] = cpu_job_x(j, r0 + r);
        CPU_UNROLL for (int o = 0; o < OUTS_OUT_IN; o++) acc[r][o] = _mm512_setzero_ps();
    }
    int32_t k = k0;
    for (; k + 16 <= k1; k += 16) {
        __m512 wv[OUTS_OUT_IN];
        CPU_UNROLL for (int o = 0; o < no; o++) {
            if (o < 2) _mm_prefetch((const char *)(ahead + 64 * (uintptr_t)o + (uintptr_t)k * 8), _MM_HINT_T1);
            wv[o] = cpu_load_bf16(w + o * stride + k);
        }
        CPU_UNROLL for (int r = 0; r < nr; r++) {
            __m512 xv = _mm512_loadu_ps(x[r] + k);
            CPU_UNROLL for (int o = 0; o < no; o++) acc[r][o] = _mm512_fmadd_ps(xv, wv[o], acc[r][o]);
        }
    }
    if (k < k1) {
        __mmask16 m = cpu_mask(k1 - k);
        __m512 wv[OUTS_OUT_IN];
        CPU_UNROLL for (int o = 0; o < no; o++) wv[o] = cpu_load_bf16_mask(w + o * stride + k, m);
        CPU_UNROLL for (int r = 0; r < nr; r++) {
            __m512 xv = _mm512_maskz_loadu_ps(m, x[r] + k);
            CPU_UNROLL for (int o = 0; o < no; o++) acc[r][o] = _mm512_fmadd_ps(xv, wv[o], acc[r][o]);
        }
    }
    CPU_UNROLL for (int r = 0; r < nr; r++) {
        __m128 s = cpu_sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
        put4(cpu_job_y(j, r0 + r) + o0, s, (__mmask8)((1u << no) - 1u), !j->add && k0 == 0,
             j->scale ? j->scale[r0 + r] : 1.0f);
    }
}

#define OUT_IN_CASE(n)                            \
    case n:                                       \
        if (four)                                 \
            out_in_tile(j, r0, o0, k0, k1, n, 4); \
        else                                      \
            out_in_tile(j, r0, o0, k0, k1, n, 1); \
        break

static void out_in_rows(const cpu_linear_job *j, int32_t r0, int32_t nr, int32_t o0, bool four, int32_t k0,
                        int32_t k1) {
    switch (nr) {
        OUT_IN_CASE(1);
        OUT_IN_CASE(2);
        OUT_IN_CASE(3);
        OUT_IN_CASE(4);
        OUT_IN_CASE(5);
        OUT_IN_CASE(6);
    default: break;
    }
}

/* Few rows that stay in the L1 cache walk each weight row, or panel, to its end, as memory likes it. More keep a block
 * of weights in L2. */
CPU_INLINE bool to_the_end(const cpu_linear_job *j) {
    return j->n_row <= ROWS_OUT_IN && (j->n_row * j->w->n_in <= NEAR_INPUTS || !cpu_is_panels(j->w));
}

/* The same sums over the panel of outputs o0.. (cpu_kernels.h draws it). One row reads one stream, which the hardware
 * fetches best when left alone. Several compute for longer than it looks ahead: the first of them to pass fetch what
 * follows; where blocks of K are walked one by one, that is the same block two panels on. */
CPU_INLINE void panel_tile(const cpu_linear_job *j, int32_t r0, int32_t o0, int32_t k0, int32_t k1, const int nr,
                           const bool fetch) {
    const ern_bf16 *w = (const ern_bf16 *)j->w->data +
                        o0 / CPU_PANEL_LINES * cpu_panel_numbers(CPU_PANEL_LINES, j->w->n_in) +
                        (int64_t)k0 * CPU_PANEL_LINES;
    const uintptr_t ahead =
        to_the_end(j) ? AHEAD_OUT_IN : 2 * (uintptr_t)cpu_panel_numbers(CPU_PANEL_LINES, j->w->n_in) * sizeof(ern_bf16);
    const __m512i high = _mm512_set1_epi32((int32_t)0xffff0000u);
    const float *x[ROWS_OUT_IN];
    __m512 acc[ROWS_OUT_IN][CPU_PANEL_LINES];
    CPU_UNROLL for (int r = 0; r < nr; r++) {
        x[r] = cpu_job_x(j, r0 + r);
        CPU_UNROLL for (int o = 0; o < CPU_PANEL_LINES; o++) acc[r][o] = _mm512_setzero_ps();
    }
    int32_t k = k0;
    for (; k + CPU_LINE <= k1; k += CPU_LINE, w += CPU_LINE * CPU_PANEL_LINES) {
        CPU_UNROLL for (int half = 0; half < 2; half++) {
            __m512 wv[CPU_PANEL_LINES];
            if (nr > 4) __asm__("" : "+r"(w)); /* read the lines twice: kept, they would cost registers of the sums */
            CPU_UNROLL for (int o = 0; o < CPU_PANEL_LINES; o++) {
                wv[o] = panel_half(w + o * CPU_LINE, half, high);
                if (fetch && o < 2)
                    _mm_prefetch((const char *)((uintptr_t)w + ahead + 64 * (uintptr_t)(2 * half + o)), _MM_HINT_T1);
            }
            CPU_UNROLL for (int r = 0; r < nr; r++) {
                __m512 xv = _mm512_loadu_ps(x[r] + k + 16 * half);
                CPU_UNROLL for (int o = 0; o < CPU_PANEL_LINES; o++) acc[r][o] = _mm512_fmadd_ps(xv, wv[o], acc[r][o]);
            }
        }
    }
    CPU_UNROLL for (int half = 0; half < 2; half++) {
        if (k + 16 * half >= k1) break;
        const __mmask16 m = cpu_mask(k1 - k - 16 * half);
        __m512 wv[CPU_PANEL_LINES];
        CPU_UNROLL for (int o = 0; o < CPU_PANEL_LINES; o++) wv[o] = panel_half(w + o * CPU_LINE, half, high);
        CPU_UNROLL for (int r = 0; r < nr; r++) {
            __m512 xv = _mm512_maskz_loadu_ps(m, x[r] + k + 16 * half);
            CPU_UNROLL for (int o = 0; o < CPU_PANEL_LINES; o++) acc[r][o] = _mm512_fmadd_ps(xv, wv[o], acc[r][o]);
        }
    }
    const __mmask8 outs = (__mmask8)cpu_mask(least(j->w->n_out - o0, CPU_PANEL_LINES));
    CPU_UNROLL for (int r = 0; r < nr; r++) {
        __m128 s = cpu_sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
        put4(cpu_job_y(j, r0 + r) + o0, s, outs, !j->add && k0 == 0, j->scale ? j->scale[r0 + r] : 1.0f);
    }
}

#define PANEL_CASE(n)                                \
    case n:                                          \
        if (n > 1 && r0 == 0)                        \
            panel_tile(j, r0, o0, k0, k1, n, true);  \
        else                                         \
            panel_tile(j, r0, o0, k0, k1, n, false); \
        break

static void panel_rows(const cpu_linear_job *j, int32_t r0, int32_t nr, int32_t o0, int32_t k0, int32_t k1) {
    switch (nr) {
        PANEL_CASE(1);
        PANEL_CASE(2);
        PANEL_CASE(3);
        PANEL_CASE(4);
        PANEL_CASE(5);
        PANEL_CASE(6);
    default: break;
    }
}

/* One row over panels. Nothing but the loop over lines, which a panel's last additions hardly stop: memory is asked for
 * the next panel meanwhile. */
static void panel_one(const cpu_linear_job *j) {
    const int32_t n_in = j->w->n_in;
    const ern_bf16 *w =
        (const ern_bf16 *)j->w->data + j->from / CPU_PANEL_LINES * cpu_panel_numbers(CPU_PANEL_LINES, n_in);
    const float *x = cpu_job_x(j, 0);
    const __m512i high = _mm512_set1_epi32((int32_t)0xffff0000u);
    const __m128 scale = _mm_set1_ps(j->scale ? j->scale[0] : 1.0f);
    for (int32_t o = j->from; o < j->to; o += CPU_PANEL_LINES) {
        const __mmask8 outs = (__mmask8)cpu_mask(least(j->w->n_out - o, CPU_PANEL_LINES));
        float *y = cpu_job_y(j, 0) + o;
        __m128 sum = j->add ? _mm_maskz_loadu_ps(outs, y) : _mm_setzero_ps();
        for (int32_t k0 = 0; k0 < n_in; k0 += K_BLOCK_OUT_IN) {
            const int32_t k1 = least(k0 + K_BLOCK_OUT_IN, n_in);
            __m512 acc[CPU_PANEL_LINES];
            CPU_UNROLL for (int i = 0; i < CPU_PANEL_LINES; i++) acc[i] = _mm512_setzero_ps();
            int32_t k = k0;
            for (; k + CPU_LINE <= k1; k += CPU_LINE, w += CPU_LINE * CPU_PANEL_LINES)
                CPU_UNROLL for (int half = 0; half < 2; half++) {
                    const __m512 xv = _mm512_loadu_ps(x + k + 16 * half);
                    CPU_UNROLL for (int i = 0; i < CPU_PANEL_LINES; i++) acc[i] =
                        _mm512_fmadd_ps(xv, panel_half(w + i * CPU_LINE, half, high), acc[i]);
                }
            for (int half = 0; k + 16 * half < k1; half++) {
                const __m512 xv = _mm512_maskz_loadu_ps(cpu_mask(k1 - k - 16 * half), x + k + 16 * half);
                CPU_UNROLL for (int i = 0; i < CPU_PANEL_LINES; i++) acc[i] =
                    _mm512_fmadd_ps(xv, panel_half(w + i * CPU_LINE, half, high), acc[i]);
            }
            w += k < k1 ? CPU_LINE * CPU_PANEL_LINES : 0;
            const __m128 s = cpu_sum4(acc[0], acc[1], acc[2], acc[3]);
            sum = !j->add && k0 == 0 ? s : _mm_fmadd_ps(scale, s, sum);
        }
        _mm_mask_storeu_ps(y, outs, sum);
    }
}

void cpu_linear_out_in_avx512(const cpu_linear_job *j) {
    const int32_t n_in = j->w->n_in;
    const bool panels = cpu_is_panels(j->w);
    if (panels && j->n_row == 1) {
        panel_one(j);
        return;
    }
    const int32_t outs = to_the_end(j) ? OUTS_OUT_IN : L2_OUTS;
    for (int32_t ob = j->from; ob < j->to; ob += outs) {
        int32_t oe = least(ob + outs, j->to);
        for (int32_t k0 = 0; k0 < n_in; k0 += K_BLOCK_OUT_IN) {
            int32_t k1 = least(k0 + K_BLOCK_OUT_IN, n_in);
            for (int32_t r = 0; r < j->n_row; r += ROWS_OUT_IN) {
                int32_t nr = least(ROWS_OUT_IN, j->n_row - r), o = ob;
                for (; panels && o < oe; o += OUTS_OUT_IN) panel_rows(j, r, nr, o, k0, k1);
                for (; o + OUTS_OUT_IN <= oe; o += OUTS_OUT_IN) out_in_rows(j, r, nr, o, true, k0, k1);
                for (; o < oe; o++) out_in_rows(j, r, nr, o, false, k0, k1);
            }
        }
    }
}

/* nr rows from r0, nv vectors of outputs from o0 (the last one cut to m), inputs k0..k1-1. */
CPU_INLINE void in_out_tile(const cpu_linear_job *j, int32_t r0, int32_t o0, int32_t k0, int32_t k1, const int nr,
                            const int nv, const bool cut, __mmask16 m) {
    const int64_t stride = j->w->stride;
    const ern_bf16 *w = (const ern_bf16 *)j->w->data + k0 * stride + o0;
    const uintptr_t ahead = (uintptr_t)(AHEAD_IN_OUT * stride) * sizeof *w;
    const float *x[ROWS_IN_OUT];
    __m512 acc[ROWS_IN_OUT][8];
    CPU_UNROLL for (int r = 0; r < nr; r++) {
        x[r] = cpu_job_x(j, r0 + r);
        CPU_UNROLL for (int v = 0; v < nv; v++) acc[r][v] = _mm512_setzero_ps();
    }
    for (int32_t k = k0; k < k1; k++, w += stride) {
        __m512 wv[8];
        CPU_UNROLL for (int v = 0; v < nv; v++) {
            if (v % 2 == 0) _mm_prefetch((const char *)((uintptr_t)(w + v * 16) + ahead), _MM_HINT_T0);
            wv[v] = cut ? cpu_load_bf16_mask(w + v * 16, m) : cpu_load_bf16(w + v * 16);
        }
        CPU_UNROLL for (int r = 0; r < nr; r++) {
            __m512 xv = _mm512_set1_ps(x[r][k]);
            CPU_UNROLL for (int v = 0; v < nv; v++) acc[r][v] = _mm512_fmadd_ps(xv, wv[v], acc[r][v]);
        }
    }
    CPU_UNROLL for (int r = 0; r < nr; r++) {
        float *y = cpu_job_y(j, r0 + r) + o0, scale = j->scale ? j->scale[r0 + r] : 1.0f;
        CPU_UNROLL for (int v = 0; v < nv; v++)
            put16(y + v * 16, acc[r][v], cut ? m : (__mmask16)0xffff, !j->add && k0 == 0, scale);
    }
}

/* A tile of nr rows is 128, 64 or 48 outputs wide: as many sums as registers hold. What is left goes by 48, then by 16.
 */
static int32_t in_out_width(int32_t nr) { return nr == 1 ? 128 : nr <= 4 ? 64 : 48; }

#define IN_OUT_CASE(n, nv)                                               \
    case n:                                                              \
        if (width == nv * 16)                                            \
            in_out_tile(j, r0, o0, k0, k1, n, nv, false, 0);             \
        else if (width == 48)                                            \
            in_out_tile(j, r0, o0, k0, k1, n, 3, false, 0);              \
        else                                                             \
            in_out_tile(j, r0, o0, k0, k1, n, 1, true, cpu_mask(width)); \
        break

static void in_out_rows(const cpu_linear_job *j, int32_t r0, int32_t nr, int32_t o0, int32_t width, int32_t k0,
                        int32_t k1) {
    switch (nr) {
        IN_OUT_CASE(1, 8);
        IN_OUT_CASE(2, 4);
        IN_OUT_CASE(3, 4);
        IN_OUT_CASE(4, 4);
        IN_OUT_CASE(5, 3);
        IN_OUT_CASE(6, 3);
        IN_OUT_CASE(7, 3);
        IN_OUT_CASE(8, 3);
    default: break;
    }
}

static void in_out_span(const cpu_linear_job *j, int32_t r, int32_t nr, int32_t o, int32_t oe, int32_t k0, int32_t k1) {
    for (int32_t width; o < oe; o += width) {
        int32_t left = oe - o;
        width = left >= in_out_width(nr) ? in_out_width(nr) : left >= 48 ? 48 : least(left, 16);
        in_out_rows(j, r, nr, o, width, k0, k1);
    }
}

/* acc[0..n) += sum over nk inputs of x[i] * (row i of w), inputs in order. */
CPU_INLINE void stream_rows(float *acc, int32_t n, const float *x, const ern_bf16 *w, int64_t stride, const int nk) {
    const uintptr_t ahead = (uintptr_t)(2 * nk * stride) * sizeof *w; /* the group after the next, same columns */
    for (int32_t o = 0; o < n; o += 16) {
        const __mmask16 m = cpu_mask(n - o);
        __m512 a = _mm512_loadu_ps(acc + o);
        CPU_UNROLL for (int i = 0; i < nk; i++) {
            if (nk > 1 && o % 32 == 0)
                _mm_prefetch((const char *)((uintptr_t)(w + i * stride + o) + ahead), _MM_HINT_T1);
            __m512 wv = m == 0xffff ? cpu_load_bf16(w + i * stride + o) : cpu_load_bf16_mask(w + i * stride + o, m);
            a = _mm512_fmadd_ps(_mm512_set1_ps(x[i]), wv, a);
        }
        _mm512_storeu_ps(acc + o, a);
    }
}

/* One row: the sums of a long span of outputs stay in L1 while weight rows stream by, STREAMS at a time, each read
 * along its length: a register tile would touch a new page for every 256 bytes. The same sums in the same order as the
 * tiles. */
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
            for (int32_t i = 0; i < n; i += 16)
                put16(y + o + i, _mm512_load_ps(acc + i), cpu_mask(n - i), !j->add && k0 == 0, scale);
        }
    }
}

void cpu_linear_in_out_avx512(const cpu_linear_job *j) {
    if (j->n_row == 1) {
        in_out_one(j);
        return;
    }
    const int32_t n_in = j->w->n_in;
    for (int32_t k0 = 0; k0 < n_in; k0 += K_BLOCK_IN_OUT) {
        int32_t k1 = least(k0 + K_BLOCK_IN_OUT, n_in);
        /* The columns of one tile (48 KiB of weights) stay in L2 while all rows pass. */
        int32_t width = in_out_width(least(j->n_row, ROWS_IN_OUT));
        for (int32_t o = j->from; o < j->to; o += width)
            for (int32_t r = 0; r < j->n_row; r += ROWS_IN_OUT)
                in_out_span(j, r, least(ROWS_IN_OUT, j->n_row - r), o, least(o + width, j->to), k0, k1);
    }
}

/* no outputs from o on, side by side: a sum alone waits for itself. */
CPU_INLINE void f32_outputs(float *y, const float *x, const float *w, int32_t n_in, const int no) {
    const __mmask16 m = cpu_mask(n_in % 16);
    __m512 acc[F32_OUTS];
    int32_t k = 0;
    CPU_UNROLL for (int i = 0; i < F32_OUTS; i++) acc[i] = _mm512_setzero_ps();
    for (; k + 16 <= n_in; k += 16) {
        const __m512 v = _mm512_loadu_ps(x + k);
        CPU_UNROLL for (int i = 0; i < no; i++) acc[i] =
            _mm512_fmadd_ps(v, _mm512_loadu_ps(w + (int64_t)i * n_in + k), acc[i]);
    }
    const __m512 v = _mm512_maskz_loadu_ps(m, x + k);
    CPU_UNROLL for (int i = 0; i < no; i++) acc[i] =
        _mm512_fmadd_ps(v, _mm512_maskz_loadu_ps(m, w + (int64_t)i * n_in + k), acc[i]);
    CPU_UNROLL for (int i = 0; i < no; i += 4)
        _mm_mask_storeu_ps(y + i, cpu_mask(no - i) & 15, cpu_sum4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]));
}

void cpu_linear_f32_avx512(float *y, const float *x, const float *w, int32_t n_out, int32_t n_in) {
    int32_t o = 0;
    for (; o + F32_OUTS <= n_out; o += F32_OUTS) f32_outputs(y + o, x, w + (int64_t)o * n_in, n_in, F32_OUTS);
    for (; o < n_out; o++) f32_outputs(y + o, x, w + (int64_t)o * n_in, n_in, 1);
}
