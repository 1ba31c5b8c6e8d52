/* Quantized linears on int8 activations, AVX-512 with VNNI: I8 and I4 weights, any number of rows.
 *
 * A line of a tile is 16 outputs by 4 inputs; vpdpbusd multiplies it with the row's 4 inputs, broadcast, and adds each
 * output's 4 products to that output's lane:
 *
 *   line    [o0: 4 codes][o1: 4 codes] ... [o15]      u8
 *   x       [ 4 inputs  ][ the same  ] ... [   ]      s8      ->  a[o] += 4 products
 *
 * The sums of a group (128 inputs: 32 lines) are exact, so it does not matter in what order, by how many registers or
 * beside which other rows and bands they are taken. Only what follows has an order, and it is K's: groups ascending,
 * one multiply-add each. The codes' offset is there before the first line: a starts at -128 (or -8) * sum(x). */
#include "backend/cpu/table_avx512.h"
#include "backend/cpu/vec_avx512.h"

#include <string.h>

enum {
    ROWS = 12, /* 12 x 2 sums + 2 lines + 1 x: 27 of 32 registers */
    BANDS = 2, /* bands side by side where there are rows enough to use each x twice */
    SUMS = 4,  /* most sums of one row: bands times registers that share a sum */
    ROWS_ALONE =
        4, /* up to so many rows one band at a time is read: one stream, best fetched by AMD's hardware alone */
};

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

CPU_INLINE __m512i four_inputs(const int8_t *x) {
    int32_t v;
    memcpy(&v, x, sizeof v);
    return _mm512_set1_epi32(v);
}

/* nr rows from r0, nb bands. fetch: these rows are the first to read these bands, and fetch the bands that come next
 * into L2. */
CPU_INLINE void int_tile(const cpu_linear_job *j, int32_t r0, int32_t band, const int nr, const int nb, const bool four,
                         bool fetch) {
    const ern_linear *w = j->w;
    const int32_t n_tile = cpu_tiles(w->n_in), n_group = cpu_groups(w->n_in);
    const int ns = nr * nb == 1 ? 4 : nr * nb <= 3 ? 2 : 1; /* registers that share one sum, against its latency */
    const size_t band_bytes = cpu_band_bytes(w);
    const uint8_t *p = cpu_band(w, band);
    uintptr_t next = (uintptr_t)p + (size_t)nb * band_bytes;
    const __m512i low = _mm512_set1_epi8(15);
    const int8_t *x[ROWS];
    int64_t at[ROWS];
    __m512 acc[ROWS][BANDS];
    CPU_UNROLL for (int r = 0; r < nr; r++) {
        const int64_t row = cpu_job_act(j, r0 + r);
        x[r] = (const int8_t *)j->act.q + row * cpu_act_stride(w->n_in);
        at[r] = row * n_group;
        CPU_UNROLL for (int b = 0; b < nb; b++) acc[r][b] = _mm512_setzero_ps();
    }
    for (int32_t g = 0; g < n_group; g++) {
        __m512i a[ROWS][SUMS];
        CPU_UNROLL for (int r = 0; r < nr; r++) {
            const __m512i off = _mm512_set1_epi32((four ? -8 : -128) * j->act.sum[at[r] + g]);
            CPU_UNROLL for (int b = 0; b < nb * ns; b++) a[r][b] = b < nb ? off : _mm512_setzero_si512();
        }
        const int32_t n_line = least(2, n_tile - 2 * g) * (ERN_TILE_IN / 4);
        for (int32_t l = 0; l < n_line; l += 4) {
            CPU_UNROLL for (int u = 0; u < 4; u++) {
                __m512i line[BANDS];
                CPU_UNROLL for (int b = 0; b < nb; b++) {
                    const uint8_t *q = p + (size_t)b * band_bytes;
                    if (four) {
                        line[b] = _mm512_loadu_si512(q + u / 2 * 64);
                        line[b] = _mm512_and_si512(u % 2 ? _mm512_srli_epi16(line[b], 4) : line[b], low);
                    } else {
                        line[b] = _mm512_loadu_si512(q + u * 64);
                    }
                    if (fetch && (!four || u % 2 == 0))
                        _mm_prefetch((const char *)(next + (uintptr_t)((four ? u / 2 : u) * nb + b) * 64), _MM_HINT_T1);
                }
                CPU_UNROLL for (int r = 0; r < nr; r++) {
                    const __m512i v = four_inputs(x[r] + 4 * u);
                    CPU_UNROLL for (int b = 0; b < nb; b++) {
                        const int s = b + nb * (u % ns);
                        a[r][s] = _mm512_dpbusd_epi32(a[r][s], line[b], v);
                    }
                }
            }
            p += four ? 128 : 256;
            next += (uintptr_t)(four ? 128 : 256) * (uintptr_t)nb;
            CPU_UNROLL for (int r = 0; r < nr; r++) x[r] += 16;
        }
        CPU_UNROLL for (int r = 0; r < nr; r++) {
            const __m512 s = _mm512_set1_ps(j->act.scale[at[r] + g]);
            CPU_UNROLL for (int b = 0; b < nb; b++) {
                CPU_UNROLL for (int k = 1; k < ns; k++) a[r][b] = _mm512_add_epi32(a[r][b], a[r][b + nb * k]);
                acc[r][b] = _mm512_fmadd_ps(s, _mm512_cvtepi32_ps(a[r][b]), acc[r][b]);
            }
        }
    }
    CPU_UNROLL for (int b = 0; b < nb; b++) {
        const int32_t o = (band + b) * ERN_TILE_OUT;
        const __mmask16 m = cpu_mask(w->n_out - o);
        const __m512 scale = cpu_load_bf16_mask((const ern_bf16 *)w->scale + o, m);
        CPU_UNROLL for (int r = 0; r < nr; r++) cpu_put_band(j, r0 + r, o, m, _mm512_mul_ps(acc[r][b], scale));
    }
}

#define ALONE(n)                                     \
    case n:                                          \
        if (fetch)                                   \
            int_tile(j, r, band, n, 1, four, true);  \
        else                                         \
            int_tile(j, r, band, n, 1, four, false); \
        break
#define SIDE_BY_SIDE(n) \
    case n: int_tile(j, r, band, n, BANDS, four, fetch); break

CPU_INLINE void one_band(const cpu_linear_job *j, int32_t r, int32_t nr, int32_t band, const bool four, bool fetch) {
    switch (nr) {
        ALONE(1);
        ALONE(2);
        ALONE(3);
        ALONE(4);
    default: ERN_ASSERT(false);
    }
}

CPU_INLINE void two_bands(const cpu_linear_job *j, int32_t r, int32_t nr, int32_t band, const bool four, bool fetch) {
    switch (nr) {
        SIDE_BY_SIDE(5);
        SIDE_BY_SIDE(6);
        SIDE_BY_SIDE(7);
        SIDE_BY_SIDE(8);
        SIDE_BY_SIDE(9);
        SIDE_BY_SIDE(10);
        SIDE_BY_SIDE(11);
        SIDE_BY_SIDE(12);
    default: ERN_ASSERT(false);
    }
}

/* The next rows of `left`, in tiles of nearly one size: 16 rows are 8 and 8, not 12 and 4. So side by side, where there
 * are more than ROWS_ALONE, a tile has 5 at least. */
static int32_t rows_of_tile(int32_t left, int32_t most) {
    const int32_t n_tile = (left + most - 1) / most;
    return (left + n_tile - 1) / n_tile;
}

/* ahead: one band alone is fetched too. */
CPU_INLINE void linear_int(const cpu_linear_job *j, const bool four, bool ahead) {
    const int32_t end = (j->to + ERN_TILE_OUT - 1) / ERN_TILE_OUT;
    for (int32_t band = j->from / ERN_TILE_OUT, nb; band < end; band += nb) {
        nb = j->n_row > ROWS_ALONE && end - band >= BANDS ? BANDS : 1;
        for (int32_t r = 0, nr; r < j->n_row; r += nr) {
            nr = rows_of_tile(j->n_row - r, nb == 1 ? ROWS_ALONE : ROWS);
            if (nb == 1)
                one_band(j, r, nr, band, four, ahead && r == 0);
            else
                two_bands(j, r, nr, band, four, r == 0);
        }
    }
}

void cpu_linear_i8_vnni(const cpu_linear_job *j) { linear_int(j, false, false); }
void cpu_linear_i4_vnni(const cpu_linear_job *j) { linear_int(j, true, false); }
void cpu_linear_i8_ahead(const cpu_linear_job *j) { linear_int(j, false, true); }
void cpu_linear_i4_ahead(const cpu_linear_job *j) { linear_int(j, true, true); }
