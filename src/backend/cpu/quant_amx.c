/* Quantized linears on int8 activations for many rows, AMX: an I8 tile is a tile of B as it lies, but for the sign.
 *
 *   C [16 rows, 16 outputs] += A [16 rows, 64 inputs: s8] . B [64 inputs, 16 outputs: s8]        tdpbssd
 *
 * The weights of a group of 128 inputs and 32 outputs, four tiles, stay in tile registers while PASS tiles of rows go
 * by. The integer sums of 16 rows, exact as everywhere, are stored; while the tiles multiply the next 16 rows, the
 * vectors scale them and add them to the f32 sums with the instructions of quant_vnni.c: the bits are the same. A
 * quarter of that work follows each product: a processor whose core another thread shares does not look far enough
 * ahead to find the next product behind all of it. So does a quarter of the fetches that bring the next tiles into L1,
 * for which it does not look far enough ahead either.
 *
 *          B:  4 5     6 7
 *      A: 2 3  [ 0 ]   [ 1 ]
 *
 * A block is PASS tiles of rows by 32 outputs, group after group: what it works with stays in L1. Rows that do not lie
 * at one distance, and the last ones where they do not fill a tile, are copied side by side. */
#include "backend/cpu/table_avx512.h"
#include "backend/cpu/vec_amx.h"

enum {
    ROWS = 16,
    ROWS_LEAST = 16,     /* fewer go by vpdpbusd: signed weights would be made for little */
    PASS = 4,            /* tiles of rows */
    KEPT = 24,           /* groups whose signed weights are kept for the rows that follow */
    NEAR_BYTES = 1 << 20 /* of activations that stay in L2 while all outputs pass */
};

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

typedef int8_t tile_s8[ERN_TILE_OUT * ERN_TILE_IN];

_Static_assert(PASS == 4, "a group's four tiles of weights are fetched beside as many tiles of rows");

/* What a call works with. */
typedef struct room {
    _Alignas(64) float acc[PASS][2][ROWS][ERN_TILE_OUT]; /* sums of the groups before; band */
    _Alignas(64) int32_t c[2][2][ROWS][ERN_TILE_OUT]; /* integer sums: of this tile of rows or the one before; band */
    _Alignas(64) int8_t a[ROWS][ERN_ACT_GROUP];       /* rows side by side */
    float scale[2][ROWS];                             /* and their scales; turn as c */
    _Alignas(64) tile_s8 b[KEPT][2][2];               /* band, tile of the group */
} room;

/* Integer sums that wait in c[turn] for their scales. */
typedef struct waiting {
    float *acc; /* NULL: none */
    const float *scale;
    int64_t step;   /* between scales of rows */
    __mmask16 sums; /* whether there are sums of groups before */
    int turn;
} waiting;

/* Stores before it are seen by tile loads after it, of which the compiler does not know what they read. */
CPU_INLINE void stored(void) { __asm__ volatile("" : : : "memory"); }

/* ---- weights ----------------------------------------------------------------------------------------------------- */

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

/* Where the signed weights of group g are. once: only one block of rows reads them, so two places that stay in L1 are
 * enough. */
CPU_INLINE tile_s8 (*place(room *k, int32_t g, bool once))[2] { return k->b[once ? g % 2 : g % KEPT]; }

/* The weights of group g. */
CPU_INLINE void take_weights(room *k, const ern_linear *w, int32_t band, int32_t g, bool once, const int nb,
                             const bool four) {
    const size_t each = cpu_tile_bytes(w->dtype);
    for (int32_t t = 2 * g; t < least(2 * g + 2, cpu_tiles(w->n_in)); t++) {
        CPU_UNROLL for (int b = 0; b < nb; b++) {
            const uint8_t *from = cpu_band(w, band + b) + (size_t)t * each;
            unpack(place(k, g, once)[b][t % 2], from, four);
        }
    }
    stored();
}

/* The weights that come next, to be fetched into L2 evenly: where many lines are asked for at one time, what is wanted
 * now waits behind them. */
typedef struct stream {
    uintptr_t at;
    int32_t each; /* lines beside a tile of rows */
} stream;

CPU_INLINE void fetch_weights(stream *s) {
    for (int32_t i = 0; i < s->each; i++, s->at += 64) _mm_prefetch((const char *)s->at, _MM_HINT_T1);
}

/* ---- sums -------------------------------------------------------------------------------------------------------- */

/* A quarter of the rows that wait: their f32 sums with this group. */
CPU_INLINE void scale_some(const room *k, const waiting *at, const int quarter, const int nb) {
    stored();
    const float *s = at->scale + quarter * (ROWS / 4) * at->step;
    float *acc = at->acc + quarter * (ROWS / 4) * ERN_TILE_OUT;
    CPU_UNROLL for (int r = 0; r < ROWS / 4; r++) {
        const __m512 scale = _mm512_set1_ps(s[r * at->step]);
        CPU_UNROLL for (int b = 0; b < nb; b++) {
            float *sum = acc + (b * ROWS + r) * ERN_TILE_OUT;
            const __m512 c = _mm512_cvtepi32_ps(_mm512_load_si512(k->c[at->turn][b][quarter * (ROWS / 4) + r]));
            _mm512_store_ps(sum, _mm512_fmadd_ps(scale, c, _mm512_maskz_load_ps(at->sums, sum)));
        }
    }
    stored();
}

/* The f32 sums of a tile of rows from r on, scaled, to outputs o.. of y. */
CPU_INLINE void put_rows(const cpu_linear_job *j, float (*acc)[ROWS][ERN_TILE_OUT], int32_t r, int32_t o,
                         const int nb) {
    const int32_t n = least(ROWS, j->n_row - r);
    __m512 last[2] = {0};
    __mmask16 m[2] = {0}, add[2];
    CPU_UNROLL for (int b = 0; b < nb; b++) {
        m[b] = cpu_mask(j->w->n_out - o - b * ERN_TILE_OUT);
        add[b] = j->add ? m[b] : 0;
        last[b] = cpu_load_bf16_mask((const ern_bf16 *)j->w->scale + o + b * ERN_TILE_OUT, m[b]);
    }
    for (int32_t i = 0; i < n; i++) {
        const __m512 share = _mm512_set1_ps(j->scale ? j->scale[r + i] : 1.0f);
        float *y = cpu_job_y(j, r + i) + o;
        CPU_UNROLL for (int b = 0; b < nb; b++, y += ERN_TILE_OUT) {
            const __m512 s = _mm512_mul_ps(_mm512_load_ps(acc[b][i]), last[b]);
            _mm512_mask_storeu_ps(y, m[b], _mm512_mask_fmadd_ps(s, add[b], share, _mm512_maskz_loadu_ps(add[b], y)));
        }
    }
}

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* What comes next, to be fetched into L1. */
typedef struct ahead {
    const int8_t *a; /* a tile of rows and the one beside it */
    int64_t step;
    const int8_t *b; /* a tile of weights */
} ahead;

/* A quarter of it. */
CPU_INLINE void fetch_some(const ahead *next, const int quarter) {
    const int8_t *a = next->a + quarter % 2 * (ROWS / 2) * next->step + quarter / 2 * ERN_TILE_IN;
    CPU_UNROLL for (int i = 0; i < ROWS / 2; i++) _mm_prefetch((const char *)(a + i * next->step), _MM_HINT_T0);
    const int8_t *b = next->b + quarter * (int)sizeof(tile_s8) / 4;
    CPU_UNROLL for (int i = 0; i < (int)sizeof(tile_s8) / 4; i += 64) _mm_prefetch((const char *)(b + i), _MM_HINT_T0);
}

CPU_INLINE void beside(const room *k, const waiting *at, const ahead *next, const int quarter, const bool waits,
                       const int nb) {
    if (waits) scale_some(k, at, quarter, nb);
    fetch_some(next, quarter);
}

/* A tile of rows times the group's weights to c[turn], and beside it what waits, if it does. both: the group has two
 * tiles of inputs. */
CPU_INLINE void multiply(room *k, int turn, const int8_t *a, int64_t step, bool both, const waiting *at,
                         const ahead *next, const bool waits, const int nb) {
    _tile_zero(0);
    if (nb > 1) _tile_zero(1);
    _tile_loadd(2, a, step);
    if (both) _tile_loadd(3, a + ERN_TILE_IN, step);
    _tile_dpbssd(0, 2, 4);
    beside(k, at, next, 0, waits, nb);
    if (nb > 1) _tile_dpbssd(1, 2, 6);
    beside(k, at, next, 1, waits, nb);
    if (both) _tile_dpbssd(0, 3, 5);
    beside(k, at, next, 2, waits, nb);
    if (nb > 1 && both) _tile_dpbssd(1, 3, 7);
    beside(k, at, next, 3, waits, nb);
    _tile_zero(2); /* an empty tile leaves a register free to load the next one ahead */
    _tile_zero(3);
    _tile_stored(0, k->c[turn][0], 64);
    if (nb > 1) _tile_stored(1, k->c[turn][1], 64);
}

/* 16 rows from r on, as far as there are that many, side by side: inputs of group g and their scales. */
CPU_INLINE void gather(room *k, const cpu_linear_job *j, int32_t r, int32_t g, int turn) {
    const int64_t stride = cpu_act_stride(j->w->n_in);
    const bool both = g * ERN_ACT_GROUP + ERN_TILE_IN < cpu_act_width(j->w->n_in);
    for (int i = 0; i < ROWS; i++) { /* by whole lines: a tile load waits for smaller stores */
        const int64_t row = cpu_job_act(j, least(r + i, j->n_row - 1));
        const int8_t *from = (const int8_t *)j->act.q + row * stride + g * ERN_ACT_GROUP;
        _mm512_store_si512(k->a[i], _mm512_loadu_si512(from));
        if (both) _mm512_store_si512(k->a[i] + ERN_TILE_IN, _mm512_loadu_si512(from + ERN_TILE_IN));
        k->scale[turn][i] = j->act.scale[row * cpu_groups(j->w->n_in) + g];
    }
    stored();
}

/* Where the sums of rows r..r+n-1 will go. */
CPU_INLINE void fetch_outputs(const cpu_linear_job *j, int32_t r, int32_t n, int32_t o, const int nb) {
    for (int32_t to = least(r + n, j->n_row); r < to; r++) {
        const float *y = cpu_job_y(j, r) + o;
        CPU_UNROLL for (int b = 0; b < nb; b++) _mm_prefetch((const char *)(y + b * ERN_TILE_OUT), _MM_HINT_T1);
    }
}

/* Whether a tile of rows from r on is to be copied side by side. */
CPU_INLINE bool is_apart(const cpu_linear_job *j, int32_t r) { return j->x_row || r + ROWS > j->n_row; }

/* n tiles of rows from r0 on, nb bands from `band` on. fill: the weights are to be taken. */
CPU_INLINE void block(room *k, stream *next, const cpu_linear_job *j, int32_t r0, int32_t n, int32_t band, bool fill,
                      bool once, const int nb, const bool four) {
    const ern_linear *w = j->w;
    const int32_t n_group = cpu_groups(w->n_in), n_tile = cpu_tiles(w->n_in), o = band * ERN_TILE_OUT;
    const int64_t stride = cpu_act_stride(w->n_in);
    waiting last = {.acc = NULL};
    if (fill) take_weights(k, w, band, 0, once, nb, four);
    for (int32_t g = 0; g < n_group; g++) {
        const bool both = 2 * g + 1 < n_tile;
        const int32_t first = g * ROWS / n_group,
                      rows = (g + 1) * ROWS / n_group - first; /* of a tile, to be fetched */
        tile_s8(*b)[2] = place(k, g, once), (*b_next)[2] = place(k, g + 1, once);
        _tile_loadd(4, b[0][0], 64);
        if (both) _tile_loadd(5, b[0][1], 64);
        if (nb > 1) _tile_loadd(6, b[1][0], 64);
        if (nb > 1 && both) _tile_loadd(7, b[1][1], 64);
        for (int32_t t = 0; t < n; t++) {
            const int32_t r = r0 + t * ROWS, r_next = t + 1 < n ? r + ROWS : r0, g_next = g + (t + 1 == n);
            const int turn = !last.turn;
            const bool apart = is_apart(j, r);
            if (apart) gather(k, j, r, g, turn);
            const int8_t *act = (const int8_t *)j->act.q, *a = apart ? k->a[0] : act + r * stride + g * ERN_ACT_GROUP;
            const int64_t step = apart ? ERN_ACT_GROUP : stride;
            const bool rests = is_apart(j, r_next) || g_next == n_group;
            const ahead soon = {.a = rests ? a : act + r_next * stride + g_next * ERN_ACT_GROUP,
                                .step = rests ? step : stride,
                                .b = b_next[t / 2 % 2][t % 2]};
            if (last.acc)
                multiply(k, turn, a, step, both, &last, &soon, true, nb);
            else
                multiply(k, turn, a, step, both, &last, &soon, false, nb);
            fetch_weights(next);
            last = (waiting){.acc = k->acc[t][0][0],
                             .scale = apart ? k->scale[turn] : j->act.scale + r * (int64_t)n_group + g,
                             .step = apart ? 1 : n_group,
                             .sums = g ? 0xffff : 0,
                             .turn = turn};
            fetch_outputs(j, r + first, rows, o, nb);
            if (t == 0 && fill && g + 1 < n_group) take_weights(k, w, band, g + 1, once, nb, four);
        }
    }
    CPU_UNROLL for (int quarter = 0; quarter < 4; quarter++) scale_some(k, &last, quarter, nb);
    for (int32_t t = 0; t < n; t++) put_rows(j, k->acc[t], r0 + t * ROWS, o, nb);
}

/* n tiles of rows from r0 on, nb bands from `band` on. */
CPU_INLINE void bands(room *k, const cpu_linear_job *j, int32_t r0, int32_t n, int32_t band, const int nb,
                      const bool four) {
    const int32_t n_group = cpu_groups(j->w->n_in);
    const bool once = n <= PASS, keep = n_group <= KEPT;
    const size_t bytes = (size_t)nb * cpu_band_bytes(j->w), steps = (size_t)n * (size_t)n_group;
    stream next = {(uintptr_t)cpu_band(j->w, band + nb), (int32_t)((bytes / 64 + steps - 1) / steps)};
    for (int32_t t = 0; t < n; t += PASS)
        block(k, &next, j, r0 + t * ROWS, least(PASS, n - t), band, t == 0 || !keep, once, nb, four);
}

CPU_INLINE void linear_amx(const cpu_linear_job *j, const bool four) {
    const int64_t bytes = j->n_row * cpu_act_stride(j->w->n_in);
    const int32_t n = (j->n_row + ROWS - 1) / ROWS, parts = (int32_t)((bytes + NEAR_BYTES - 1) / NEAR_BYTES);
    const int32_t each = (n + parts * PASS - 1) / (parts * PASS) * PASS;
    const int32_t end = (j->to + ERN_TILE_OUT - 1) / ERN_TILE_OUT;
    room k;
    cpu_tiles_begin(ROWS, ROWS);
    for (int32_t t = 0; t < n; t += each) {
        int32_t band = j->from / ERN_TILE_OUT;
        for (; band + 2 <= end; band += 2) bands(&k, j, t * ROWS, least(each, n - t), band, 2, four);
        if (band < end) bands(&k, j, t * ROWS, least(each, n - t), band, 1, four);
    }
    _tile_release();
}

void cpu_linear_i8_amx(const cpu_linear_job *j) {
    if (j->n_row < ROWS_LEAST)
        cpu_linear_i8_ahead(j);
    else
        linear_amx(j, false);
}

void cpu_linear_i4_amx(const cpu_linear_job *j) {
    if (j->n_row < ROWS_LEAST)
        cpu_linear_i4_ahead(j);
    else
        linear_amx(j, true);
}
