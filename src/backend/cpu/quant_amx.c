/* Quantized linears on int8 activations for many rows, AMX: an I8 tile is a tile of B as it lies, but for the sign.
 *
 *   C [16 rows, 16 outputs] += A [16 rows, 64 inputs: s8] . B [64 inputs, 16 outputs: s8]        tdpbssd
 *
 * The weights of a group of 128 inputs and 32 outputs, four tiles, stay in tile registers while PASS tiles of rows go
 * by. The integer sums of 16 rows, exact as everywhere, are stored; while the tiles multiply the next 16 rows, the
 * vectors scale them and add them to the f32 sums with the instructions of quant_vnni.c: the bits are the same, so rows
 * that do not fill a tile go there. A quarter of that work follows each product: a processor whose core another thread
 * shares does not look far enough ahead to find the next product behind all of it.
 *
 *          B:  4 5     6 7
 *      A: 2 3  [ 0 ]   [ 1 ]
 *
 * A block is PASS tiles of rows by 32 outputs, group after group: what it works with stays in L1. */
#include "backend/cpu/table_avx512.h"
#include "backend/cpu/vec_amx.h"

#include <string.h>

enum {
    ROWS = 16,
    PASS = 4,            /* tiles of rows */
    KEPT = 24,           /* groups whose signed weights are kept for the rows that follow */
    NEAR_BYTES = 1 << 20 /* of activations that stay in L2 while all outputs pass */
};

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

/* A tile of stored codes as signed ones: products of them want no correction by the sum of a row. */
CPU_INLINE void unpack(int8_t *out, const uint8_t *tile, const bool four) {
    const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), top = _mm512_set1_epi8(-128);
    for (int l = 0; l < 16; l += 2) {
        if (four) {
            const __m512i v = _mm512_loadu_si512(tile + 32 * l);
            _mm512_store_si512(out + 64 * l, _mm512_sub_epi8(_mm512_and_si512(v, low), eight));
            _mm512_store_si512(out + 64 * l + 64,
                               _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(v, 4), low), eight));
        } else {
            _mm512_store_si512(out + 64 * l, _mm512_xor_si512(_mm512_loadu_si512(tile + 64 * l), top));
            _mm512_store_si512(out + 64 * l + 64, _mm512_xor_si512(_mm512_loadu_si512(tile + 64 * l + 64), top));
        }
    }
}

typedef int8_t tile_s8[ERN_TILE_OUT * ERN_TILE_IN];
typedef float sums[2][ERN_TILE_OUT]; /* of a row: two bands */

/* What a call works with. */
typedef struct room {
    _Alignas(64) sums acc[PASS * ROWS];
    _Alignas(64) int32_t c[2][2][ROWS][ERN_TILE_OUT]; /* integer sums: of this tile of rows or the one before; band */
    _Alignas(64) int8_t a[ROWS][ERN_ACT_GROUP];       /* gathered rows */
    _Alignas(64) tile_s8 b[KEPT][2][2];               /* band, tile of the group */
} room;

/* Integer sums that wait in c[turn] for their scales. */
typedef struct waiting {
    sums *acc;
    const float *scale;
    const int32_t *x_row;
    int turn;
    int32_t r, o; /* after the last group: the row and output of y to which they go; else o is -1 */
} waiting;

/* Stores before it are seen by tile loads after it, of which the compiler does not know what they read. */
CPU_INLINE void stored(void) { __asm__ volatile("" : : : "memory"); }

/* The weights of group g. */
CPU_INLINE void take_weights(room *k, const ern_linear *w, int32_t band, int32_t g, const int nb, const bool four) {
    const size_t each = cpu_tile_bytes(w->dtype);
    for (int32_t t = 2 * g; t < least(2 * g + 2, cpu_tiles(w->n_in)); t++) {
        CPU_UNROLL for (int b = 0; b < nb; b++) {
            const uint8_t *from = cpu_band(w, band + b) + (size_t)t * each;
            unpack(k->b[g % KEPT][b][t % 2], from, four);
            for (size_t i = 0; i < each; i += 64) /* the same of the next block */
                _mm_prefetch((const char *)((uintptr_t)from + 2 * cpu_band_bytes(w) + i), _MM_HINT_T1);
        }
    }
    stored();
}

/* Row r and band b of what waits: its f32 sum with this group. */
CPU_INLINE __m512 with_group(const room *k, const waiting *at, int r, int b, __m512 scale) {
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(k->c[at->turn][b][r]));
    return _mm512_fmadd_ps(scale, sum, _mm512_load_ps(at->acc[r][b]));
}

/* A quarter of the rows that wait, on to their next group or to y. */
CPU_INLINE void scale_rows(const room *k, const cpu_linear_job *j, const waiting *at, const int quarter, const int nb,
                           const bool routed) {
    if (!at->acc) return;
    const int from = quarter * ROWS / 4, to = from + ROWS / 4;
    const int64_t n_group = cpu_groups(j->w->n_in);
    __m512 last[2] = {0};
    __mmask16 m[2] = {0};
    stored();
    if (at->o < 0) {
        CPU_UNROLL for (int r = from; r < to; r++) {
            const __m512 scale = _mm512_set1_ps(at->scale[(routed ? at->x_row[r] : r) * n_group]);
            CPU_UNROLL for (int b = 0; b < nb; b++) _mm512_store_ps(at->acc[r][b], with_group(k, at, r, b, scale));
        }
    } else {
        CPU_UNROLL for (int b = 0; b < nb; b++) {
            m[b] = cpu_mask(j->w->n_out - at->o - b * ERN_TILE_OUT);
            last[b] = cpu_load_bf16_mask((const ern_bf16 *)j->w->scale + at->o + b * ERN_TILE_OUT, m[b]);
        }
        for (int r = from; r < to; r++) {
            const __m512 scale = _mm512_set1_ps(at->scale[(routed ? at->x_row[r] : r) * n_group]);
            CPU_UNROLL for (int b = 0; b < nb; b++) cpu_put_band(
                j, at->r + r, at->o + b * ERN_TILE_OUT, m[b], _mm512_mul_ps(with_group(k, at, r, b, scale), last[b]));
        }
    }
    stored();
}

/* 16 rows from r on, inputs of group g, where a tile's rows lie at one distance. */
CPU_INLINE const int8_t *take_rows(room *k, const cpu_linear_job *j, int32_t r, int32_t g, int64_t *step,
                                   const bool routed) {
    const int64_t stride = cpu_act_stride(j->w->n_in);
    const int8_t *q = (const int8_t *)j->act.q + g * ERN_ACT_GROUP;
    *step = routed ? ERN_ACT_GROUP : stride;
    if (!routed) return q + r * stride;
    const bool both = g * ERN_ACT_GROUP + ERN_TILE_IN < cpu_act_width(j->w->n_in);
    CPU_UNROLL for (int i = 0; i < ROWS; i++) { /* by whole lines: a tile load waits for smaller stores */
        const int8_t *from = q + j->x_row[r + i] * stride;
        _mm512_store_si512(k->a[i], _mm512_loadu_si512(from));
        if (both) _mm512_store_si512(k->a[i] + ERN_TILE_IN, _mm512_loadu_si512(from + ERN_TILE_IN));
    }
    stored();
    return k->a[0];
}

/* Where the sums of 16 rows are soon to go. */
CPU_INLINE void fetch_outputs(const cpu_linear_job *j, int32_t r, int32_t o, const int nb) {
    for (int i = 0; i < ROWS; i++) {
        const float *y = cpu_job_y(j, r + i) + o;
        _mm_prefetch((const char *)y, _MM_HINT_T1);
        if (nb > 1) _mm_prefetch((const char *)(y + ERN_TILE_OUT), _MM_HINT_T1);
    }
}

/* Rows r0..r0+16*n-1, nb bands from `band` on. fill: the weights are to be taken, or there are more than can be kept.
 */
CPU_INLINE void block(room *k, const cpu_linear_job *j, int32_t r0, int32_t n, int32_t band, bool fill, const int nb,
                      const bool four, const bool routed) {
    const ern_linear *w = j->w;
    const int32_t n_group = cpu_groups(w->n_in), n_tile = cpu_tiles(w->n_in);
    waiting last = {.acc = NULL};
    memset(k->acc, 0, (size_t)n * ROWS * sizeof k->acc[0]);
    if (fill) take_weights(k, w, band, 0, nb, four);
    for (int32_t g = 0; g < n_group; g++) {
        const bool both = 2 * g + 1 < n_tile; /* tiles of the group */
        tile_s8(*b)[2] = k->b[g % KEPT];
        _tile_loadd(4, b[0][0], 64);
        if (both) _tile_loadd(5, b[0][1], 64);
        if (nb > 1) _tile_loadd(6, b[1][0], 64);
        if (nb > 1 && both) _tile_loadd(7, b[1][1], 64);
        for (int32_t t = 0; t < n; t++) {
            const int32_t r = r0 + t * ROWS;
            int64_t step;
            const int8_t *a = take_rows(k, j, r, g, &step, routed);
            _tile_zero(0);
            if (nb > 1) _tile_zero(1);
            _tile_loadd(2, a, step);
            if (both) _tile_loadd(3, a + ERN_TILE_IN, step);
            _tile_dpbssd(0, 2, 4);
            scale_rows(k, j, &last, 0, nb, routed);
            if (nb > 1) _tile_dpbssd(1, 2, 6);
            scale_rows(k, j, &last, 1, nb, routed);
            if (both) _tile_dpbssd(0, 3, 5);
            scale_rows(k, j, &last, 2, nb, routed);
            if (nb > 1 && both) _tile_dpbssd(1, 3, 7);
            scale_rows(k, j, &last, 3, nb, routed);
            _tile_zero(2); /* an empty tile leaves a register free to load the next one ahead */
            _tile_zero(3);
            last = (waiting){.acc = k->acc + t * ROWS,
                             .scale = j->act.scale + (routed ? 0 : (int64_t)r * n_group) + g,
                             .x_row = routed ? j->x_row + r : NULL,
                             .turn = !last.turn,
                             .r = r,
                             .o = g == n_group - 1 ? band * ERN_TILE_OUT : -1};
            _tile_stored(0, k->c[last.turn][0], 64);
            if (nb > 1) _tile_stored(1, k->c[last.turn][1], 64);
            if (g == (n_group > 1 ? n_group - 2 : 0)) fetch_outputs(j, r, band * ERN_TILE_OUT, nb);
            if (t == 0 && fill && g + 1 < n_group) take_weights(k, w, band, g + 1, nb, four);
        }
    }
    CPU_UNROLL for (int quarter = 0; quarter < 4; quarter++) scale_rows(k, j, &last, quarter, nb, routed);
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

/* n tiles of rows from r0 on. */
CPU_INLINE void outputs(room *k, const cpu_linear_job *j, int32_t r0, int32_t n, const bool four, const bool routed) {
    const int32_t end = (j->to + ERN_TILE_OUT - 1) / ERN_TILE_OUT;
    for (int32_t band = j->from / ERN_TILE_OUT, step; band < end; band += step) {
        step = least(2, end - band);
        for (int32_t t = 0; t < n; t += PASS) {
            const bool fill = t == 0 || cpu_groups(j->w->n_in) > KEPT;
            const int32_t r = r0 + t * ROWS, m = least(PASS, n - t);
            if (step == 2)
                block(k, j, r, m, band, fill, 2, four, routed);
            else
                block(k, j, r, m, band, fill, 1, four, routed);
        }
    }
}

CPU_INLINE void linear_amx(const cpu_linear_job *j, const bool four, const bool routed) {
    const int64_t bytes = j->n_row * cpu_act_stride(j->w->n_in);
    const int32_t n = j->n_row / ROWS, parts = (int32_t)((bytes + NEAR_BYTES - 1) / NEAR_BYTES);
    const int32_t each = (n + parts * PASS - 1) / (parts * PASS) * PASS;
    room k;
    cpu_tiles_begin(ROWS, ROWS);
    for (int32_t t = 0; t < n; t += each) outputs(&k, j, t * ROWS, least(each, n - t), four, routed);
    _tile_release();
}

static void either(const cpu_linear_job *j, const bool four) {
    const int32_t n = j->n_row / ROWS * ROWS;
    if (n > 0) {
        const cpu_linear_job many = rows_of(j, 0, n);
        if (four && j->x_row)
            linear_amx(&many, true, true);
        else if (four)
            linear_amx(&many, true, false);
        else if (j->x_row)
            linear_amx(&many, false, true);
        else
            linear_amx(&many, false, false);
    }
    if (n == j->n_row) return;
    const cpu_linear_job rest = rows_of(j, n, j->n_row - n);
    if (four)
        cpu_linear_i4_ahead(&rest);
    else
        cpu_linear_i8_ahead(&rest);
}

void cpu_linear_i8_amx(const cpu_linear_job *j) { either(j, false); }
void cpu_linear_i4_amx(const cpu_linear_job *j) { either(j, true); }
