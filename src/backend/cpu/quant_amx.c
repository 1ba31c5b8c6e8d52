/* Quantized linears on int8 activations for many rows, AMX: an I8 tile is a tile of B as it lies.
 *
 *   C [16 rows, 16 outputs] += A [16 rows, 64 inputs: s8] . B [64 inputs, 16 outputs: u8]        tdpbsud
 *
 * 32 rows by 32 outputs at a time (vec_amx.h draws the block). After each group of 128 inputs (two tiles of B) the
 * sums, exact as everywhere, leave the tiles and are scaled into f32 with the instructions of quant_vnni.c: the bits
 * are the same, so rows that do not fill a tile go there. */
#include "backend/cpu/table_avx512.h"
#include "backend/cpu/vec_amx.h"

#include <string.h>

enum { ROWS = 16, BLOCK = 2 * ROWS };

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

/* An I4 tile as the I8 tile of the same codes. */
static void unpack(uint8_t *out, const uint8_t *tile) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int l = 0; l < 8; l++) {
        const __m512i v = _mm512_loadu_si512(tile + 64 * l);
        _mm512_storeu_si512(out + 128 * l, _mm512_and_si512(v, low));
        _mm512_storeu_si512(out + 128 * l + 64, _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
    }
}

/* What a block works with: where its A and B tiles of one group lie, and its sums. */
typedef struct block {
    _Alignas(64) int32_t c[2][2][2][ROWS][ERN_TILE_OUT]; /* group, odd or even; row tile, band */
    _Alignas(64) float acc[2][2][ROWS][ERN_TILE_OUT];
    _Alignas(64) uint8_t b[2][2][ERN_TILE_OUT * ERN_TILE_IN]; /* I4 unpacked: band, tile of the group */
    _Alignas(64) int8_t a[BLOCK][ERN_ACT_GROUP];              /* gathered rows */
} block;

/* Tile t of band `band` as I8. The first rows to pass fetch the same tile two bands on. */
CPU_INLINE const uint8_t *b_tile(block *k, const ern_linear *w, int32_t band, int32_t t, int b, const bool four,
                                 const bool first) {
    const uint8_t *p = cpu_band(w, band + b) + (size_t)t * cpu_tile_bytes(w->dtype);
    for (size_t i = 0; first && i < cpu_tile_bytes(w->dtype); i += 64)
        _mm_prefetch((const char *)((uintptr_t)p + 2 * cpu_band_bytes(w) + i), _MM_HINT_T1);
    if (!four) return p;
    unpack(k->b[b][t % 2], p);
    return k->b[b][t % 2];
}

/* Rows r..r+n-1 of the block: the sums of group g scaled and added. */
CPU_INLINE void scale_rows(block *k, const cpu_linear_job *j, int32_t r0, int32_t g, int32_t r, int32_t n, const int nb,
                           const bool four) {
    const int32_t n_group = cpu_groups(j->w->n_in);
    for (; n > 0; n--, r++) {
        const int64_t at = cpu_job_act(j, r0 + r) * n_group + g;
        const __m512i off = _mm512_set1_epi32((four ? -8 : -128) * j->act.sum[at]);
        const __m512 s = _mm512_set1_ps(j->act.scale[at]);
        CPU_UNROLL for (int b = 0; b < nb; b++) {
            float *acc = k->acc[r / ROWS][b][r % ROWS];
            const __m512i sum = _mm512_add_epi32(_mm512_load_si512(k->c[g % 2][r / ROWS][b][r % ROWS]), off);
            _mm512_store_ps(acc, _mm512_fmadd_ps(s, _mm512_cvtepi32_ps(sum), _mm512_load_ps(acc)));
        }
    }
}

/* c = the integer sums of group g. Those of the group before are scaled meanwhile, a share beside each product: the
 * tiles and the vectors work at one time. */
CPU_INLINE void group_sums(block *k, const cpu_linear_job *j, int32_t r0, int32_t band, int32_t g, const int nr,
                           const int nb, const bool four, const bool first) {
    enum { SHARE = BLOCK / 8 };
    const ern_linear *w = j->w;
    const int64_t stride = cpu_act_stride(w->n_in);
    const int32_t n_tile = least(2, cpu_tiles(w->n_in) - 2 * g), last = g > 0 ? nr * ROWS : 0;
    const int8_t *a = (const int8_t *)j->act.q + r0 * stride + g * ERN_ACT_GROUP;
    int64_t step = stride;
    if (j->x_row) { /* a tile's rows lie at one distance */
        for (int32_t r = 0; r < nr * ROWS; r++)
            memcpy(k->a[r], (const int8_t *)j->act.q + cpu_job_act(j, r0 + r) * stride + g * ERN_ACT_GROUP,
                   (size_t)(n_tile * ERN_TILE_IN));
        a = k->a[0], step = ERN_ACT_GROUP;
    }
    int32_t done = 0;
    _tile_zero(0);
    if (nb > 1) _tile_zero(1);
    if (nr > 1) _tile_zero(2);
    if (nr > 1 && nb > 1) _tile_zero(3);
    for (int32_t t = 0; t < n_tile; t++) {
        _tile_loadd(4, a + t * ERN_TILE_IN, step);
        _tile_loadd(6, b_tile(k, w, band, 2 * g + t, 0, four, first), 64);
        _tile_dpbsud(0, 4, 6);
        if (done < last) scale_rows(k, j, r0, g - 1, done, SHARE, nb, four), done += SHARE;
        if (nb > 1) {
            _tile_loadd(7, b_tile(k, w, band, 2 * g + t, 1, four, first), 64);
            _tile_dpbsud(1, 4, 7);
            if (done < last) scale_rows(k, j, r0, g - 1, done, SHARE, nb, four), done += SHARE;
        }
        if (nr > 1) {
            _tile_loadd(5, a + ROWS * step + t * ERN_TILE_IN, step);
            _tile_dpbsud(2, 5, 6);
            if (done < last) scale_rows(k, j, r0, g - 1, done, SHARE, nb, four), done += SHARE;
        }
        if (nr > 1 && nb > 1) {
            _tile_dpbsud(3, 5, 7);
            if (done < last) scale_rows(k, j, r0, g - 1, done, SHARE, nb, four), done += SHARE;
        }
    }
    if (done < last) scale_rows(k, j, r0, g - 1, done, last - done, nb, four);
    _tile_stored(0, k->c[g % 2][0][0], 64);
    if (nb > 1) _tile_stored(1, k->c[g % 2][0][1], 64);
    if (nr > 1) _tile_stored(2, k->c[g % 2][1][0], 64);
    if (nr > 1 && nb > 1) _tile_stored(3, k->c[g % 2][1][1], 64);
}

CPU_INLINE void amx_block(const cpu_linear_job *j, int32_t r0, int32_t band, const int nr, const int nb,
                          const bool four, const bool first) {
    const ern_linear *w = j->w;
    const int32_t n_group = cpu_groups(w->n_in);
    block k;
    memset(k.acc, 0, sizeof k.acc);
    for (int32_t g = 0; g < n_group; g++) group_sums(&k, j, r0, band, g, nr, nb, four, first);
    scale_rows(&k, j, r0, n_group - 1, 0, nr * ROWS, nb, four);
    for (int b = 0; b < nb; b++) {
        const int32_t o = (band + b) * ERN_TILE_OUT;
        const __mmask16 m = cpu_mask(w->n_out - o);
        const __m512 scale = cpu_load_bf16_mask((const ern_bf16 *)w->scale + o, m);
        for (int32_t r = 0; r < nr * ROWS; r++)
            cpu_put_band(j, r0 + r, o, m, _mm512_mul_ps(_mm512_load_ps(k.acc[r / ROWS][b][r % ROWS]), scale));
    }
}

/* Rows r0..r0+n-1 of a job as a job. */
static cpu_linear_job rows_of(const cpu_linear_job *j, int32_t r0, int32_t n) {
    cpu_linear_job part = *j;
    part.n_row = n;
    if (j->x_row) {
        part.x_row += r0;
    } else {
        part.act.q = (int8_t *)j->act.q + r0 * cpu_act_stride(j->w->n_in);
        part.act.scale += (int64_t)r0 * cpu_groups(j->w->n_in);
        part.act.sum += (int64_t)r0 * cpu_groups(j->w->n_in);
    }
    if (j->y_row)
        part.y_row += r0;
    else
        part.y += r0 * j->y_stride;
    if (j->scale) part.scale += r0;
    return part;
}

/* Bands that stay in L2 while all rows pass are two: 2 * 16 * n_in bytes. */
CPU_INLINE void linear_amx(const cpu_linear_job *j, const bool four) {
    const int32_t end = (j->to + ERN_TILE_OUT - 1) / ERN_TILE_OUT, n = j->n_row / ROWS * ROWS;
    cpu_tiles_begin(ROWS, ROWS);
    for (int32_t band = j->from / ERN_TILE_OUT; band < end; band += 2) {
        const bool two = band + 1 < end;
        int32_t r = 0;
        for (; r + BLOCK <= n; r += BLOCK) {
            if (two)
                amx_block(j, r, band, 2, 2, four, r == 0);
            else
                amx_block(j, r, band, 2, 1, four, r == 0);
        }
        if (r < n && two) amx_block(j, r, band, 1, 2, four, r == 0);
        if (r < n && !two) amx_block(j, r, band, 1, 1, four, r == 0);
    }
    _tile_release();
}

static void either(const cpu_linear_job *j, bool four) {
    const int32_t n = j->n_row / ROWS * ROWS;
    if (n > 0) {
        const cpu_linear_job many = rows_of(j, 0, n);
        if (four)
            linear_amx(&many, true);
        else
            linear_amx(&many, false);
    }
    if (n == j->n_row) return;
    const cpu_linear_job rest = rows_of(j, n, j->n_row - n);
    if (four)
        cpu_linear_i4_vnni(&rest);
    else
        cpu_linear_i8_vnni(&rest);
}

void cpu_linear_i8_amx(const cpu_linear_job *j) { either(j, false); }
void cpu_linear_i4_amx(const cpu_linear_job *j) { either(j, true); }
