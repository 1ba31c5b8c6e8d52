/* The attention half of a layer in one launch, for few rows, each the next token of a sequence of its own, and weights
 * that meet rows of 8 bits (CU_F8A8, CU_I8A8): the bits of cu_norm, cu_linear_run, cu_attend and cu_linear_run.
 *
 *   x -> norm, codes -> bands of q, k, v -> tiles of attention -> joins, codes -> bands of o -> x +=
 *
 * One block a multiprocessor, all there at once. A block has at most two bands of qkv and two of o. Eight warps
 * compute: a warpgroup a band, four segments at a time; a row's segments are different columns of one product, of which
 * each warp takes that of its own segment. The codes of qkv are asked for first of all and multiplied where they lie;
 * o's take their place. Four warps serve: two bring x and sum up its squares, two ask for keys and values of the
 * block's first tile and then for o's codes; all of them join tiles. x and all codes come by the copy engine: loads of
 * other blocks' words wait behind loads of weights, but not behind its copies.
 *
 * Between blocks the data is its own flag (cu_chain_words.cuh). There are two sets of places; a launch uses one and
 * fills the other for the next. Results of tiles have one reader, who fills their places again.
 *
 *   shared: weights of qkv, then of o [band][segment][2048]
 *           | x [four segments][segment][ROWS][128], swizzled (cu_a8_device.cuh)
 *           | tile (cu_attn_tile.cuh) | x [ROWS][D] f32, then tiles to join | sums [band][segment][ROWS][16] f32 */
#include "backend/cuda/cu_a8_device.cuh"
#include "backend/cuda/cu_attn_tile.cuh"
#include "backend/cuda/cu_chain_tile.cuh"
#include "backend/cuda/cu_chain_words.cuh"
#include "backend/cuda/cu_launch.cuh"

enum {
    WARPS = 8, /* that compute */
    GROUPS = 2,
    SERVANTS = 4,
    FIRST_ASKER = 2, /* of the servants */
    N_ASKER = SERVANTS - FIRST_ASKER,
    ASKERS = N_ASKER * 32,
    COMPUTERS = WARPS * 32,
    THREADS = (WARPS + SERVANTS) * 32,
    HIDDEN = 2560, /* D, and H C */
    SEGS = HIDDEN / CU_SEGMENT,
    QUADS = SEGS / 4,
    HEAD = 128,        /* C: a segment of o */
    UNIT_BYTES = 2048, /* of a segment of a band */
    BAND_BYTES = SEGS * UNIT_BYTES,
    O_EACH = SEGS / N_ASKER,               /* segments of a band of o, an asker's */
    OWN_SEGS = (SEGS + WARPS - 1) / WARPS, /* of a row, a warp's */
    ONCE = 40,                             /* tiles that a join reads at once */
    LOOKS = ONCE / 4,                      /* in so many vectors of a lane */
    JOIN_STEP = 8,
    JOIN_DIMS = HEAD / SERVANTS,
};
enum { BAR_ALL = 1, BAR_GROUP = 2 /* and 3 */, BAR_SERVE = 4, BAR_START, BAR_ASK };

typedef struct one_args {
    attn_args att;
    cu_linear qkv, o;
    const cu_bf16 *norm_w;
    float eps;
    float *x;                  /* [n_row, D] */
    unsigned long long *count; /* of blocks begun, in all launches */
    uint32_t *set[2];          /* places: qkv f32 [R, (H + 2G) C], codes of attention [R, H C / 4], scales f32 [R, H] */
    int32_t code_at, scale_at, n_set; /* words */
    float *piece;                     /* results of tiles: [R, H, n_tile_max, C] */
    float2 *piece_ml;                 /* [R, H, n_tile_max] M and L */
    int32_t n_row, n_tile_max;
} one_args;

/* Shared memory, in bytes. */
template <int ROWS> struct one_shape {
    typedef tile_shape<HEAD, 0, WARPS> tile;
    static constexpr int COLUMNS = 4 * ROWS; /* of a product: four segments of all rows */
    static constexpr int x_at = GROUPS * BAND_BYTES, tile_at = x_at + QUADS * COLUMNS * CU_SEGMENT;
    static constexpr int f32_at = tile_at + tile::end_at;
    static_assert(SERVANTS * ONCE * JOIN_DIMS <= ROWS * HIDDEN, "joins' tiles lie where x was");
    static constexpr int part_at = f32_at + ROWS * HIDDEN * 4;
    static constexpr int end_at = part_at + GROUPS * SEGS * ROWS * CU_BAND * 4;
};

template <int ID, int N> static __device__ __forceinline__ void one_sync(void) {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(N) : "memory");
}
static __device__ __forceinline__ void group_sync(int group) {
    asm volatile("bar.sync %0, 128;" ::"r"(BAR_GROUP + group) : "memory");
}

/* A block's bands of qkv and o; -1: none. Blocks with two of qkv are the first, those with two of o the last. */
static __host__ __device__ __forceinline__ int32_t qkv_band(const one_args *a, int32_t block, int32_t n_block,
                                                            int group) {
    const int32_t band = block + group * n_block;
    return band < a->qkv.n_band ? band : -1;
}
static __host__ __device__ __forceinline__ int32_t o_band(const one_args *a, int32_t block, int32_t n_block,
                                                          int group) {
    const int32_t band = group ? 2 * n_block - 1 - block : block;
    return band < a->o.n_band ? band : -1;
}
/* Attention's codes on their way: none is CHAIN_NONE. int8 has no -128, e4m3's 0xff is no number. */
template <cu_format F> static __device__ __forceinline__ uint32_t disguise(uint32_t code) {
    return F == CU_I8A8 ? code ^ 0x7f7f7f7fu : code;
}

/* ---- weights ----------------------------------------------------------------------------------------------------- */

/* A warp's units of a band of qkv, every fourth segment, to shared memory; bars: of the band's quads. */
static __device__ __forceinline__ void ask_units(const cu_linear *w, int32_t band, uint32_t to, uint32_t bars, int warp,
                                                 int lane) {
    const int32_t seg = 4 * lane + warp;
    if (lane >= QUADS) return;
    bar_arrive_expect(bars + lane * 8, UNIT_BYTES);
    copy_bulk_once(to + seg * UNIT_BYTES, (const unsigned char *)w->pack + a8_at(band, seg, SEGS) * UNIT_BYTES,
                   UNIT_BYTES, bars + lane * 8);
}
/* An asker's share of a band of o, to shared memory. */
static __device__ __forceinline__ void ask_band(const one_args *a, int32_t band, uint32_t to, uint32_t bar, int servant,
                                                int lane) {
    const int32_t seg = (servant - FIRST_ASKER) * O_EACH + lane;
    if (lane == 0) bar_arrive_expect(bar, O_EACH * UNIT_BYTES);
    __syncwarp();
    if (lane < O_EACH)
        copy_bulk_once(to + seg * UNIT_BYTES, (const unsigned char *)a->o.pack + a8_at(band, seg, SEGS) * UNIT_BYTES,
                       UNIT_BYTES, bar);
}
/* A warp's units of a band, every fourth segment: the lane's bytes as it feeds them to the products. */
typedef struct band_codes {
    uint32_t a[QUADS][4][4];
} band_codes;
template <cu_format F>
static __device__ __forceinline__ void take_band(band_codes *c, const unsigned char *from, int warp, int lane) {
#pragma unroll
    for (int k = 0; k < QUADS; k++) a8_codes<F>(c->a[k], from + (4 * k + warp) * UNIT_BYTES, lane);
}

/* d = A B + (add ? d : 0), 32 inputs: 64 outputs and N rows, both in shared memory. */
#define ONE_PRODUCTS(types, signs, c)                                                                           \
    static_assert(N == 8 || N == 16, "rows of a product");                                                      \
    if constexpr (N == 8) A8_PRODUCT("8", types, signs, "%0, %1, %2, %3}, ", "%4, %5", "%6", A8_D4, c, "l"(a)); \
    if constexpr (N == 16)                                                                                      \
    A8_PRODUCT("16", types, signs, "%0, %1, %2, %3, %4, %5, %6, %7}, ", "%8, %9", "%10", A8_D8, c, "l"(a))
template <int N> static __device__ __forceinline__ void product(float *d, uint64_t a, uint64_t b, int add) {
    ONE_PRODUCTS("f32.e4m3.e4m3", ", 1, 1", "+f");
}
template <int N> static __device__ __forceinline__ void product(int32_t *d, uint64_t a, uint64_t b, int add) {
    ONE_PRODUCTS("s32.s8.s8", "", "+r");
}

/* The lane's sums of a warpgroup's band, of the warp's segments, to part [segment][ROWS][16]. */
template <cu_format F, int ROWS>
static __device__ __forceinline__ void put_sums(a8_sum<F> acc[QUADS][one_shape<ROWS>::COLUMNS / 2], float *part,
                                                int warp, int lane) {
    typedef one_shape<ROWS> sh;
    const int g = lane / 4, column = warp * ROWS, square = column / 8, row = 2 * (lane % 4) - column % 8;
    if (row < 0 || row >= ROWS) return; /* of another segment */
#pragma unroll
    for (int k = 0; k < QUADS; k++) {
        float *to = part + ((4 * k + warp) * ROWS + row) * CU_BAND + g;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float v = a8_number(sh::COLUMNS == 16 && square ? acc[k][sh::COLUMNS / 2 - 4 + e] : acc[k][e]);
            to[e % 2 * CU_BAND + e / 2 * 8] = v;
        }
    }
}
/* All segments of a warpgroup's band of qkv, a quad when it is there. x: of all quads. */
template <cu_format F, int ROWS>
static __device__ __forceinline__ void multiply_there(float *part, uint32_t codes, uint32_t bars, uint32_t x, int warp,
                                                      int lane) {
    typedef one_shape<ROWS> sh;
    a8_sum<F> acc[QUADS][sh::COLUMNS / 2];
#pragma unroll
    for (int k = 0; k < QUADS; k++) {
        const uint64_t a = wide_matrix(codes + k * (4 * UNIT_BYTES));
        const uint64_t b = wide_matrix(x + k * (sh::COLUMNS * CU_SEGMENT));
        chain_wait(bars + k * 8, 0);
        a8_hold<sh::COLUMNS / 2>(acc[k]);
        wide_fence();
#pragma unroll
        for (int t = 0; t < 4; t++) product<sh::COLUMNS>(acc[k], a + 2 * t, b + 2 * t, t > 0);
        wide_commit();
    }
    wide_wait<0>();
#pragma unroll
    for (int k = 0; k < QUADS; k++) a8_hold<sh::COLUMNS / 2>(acc[k]);
    put_sums<F, ROWS>(acc, part, warp, lane);
}
/* The same of o, with the codes in registers. */
template <cu_format F, int ROWS>
static __device__ __forceinline__ void multiply(band_codes *c, float *part, uint32_t x, int warp, int lane) {
    typedef one_shape<ROWS> sh;
    a8_sum<F> acc[QUADS][sh::COLUMNS / 2];
#pragma unroll
    for (int k = 0; k < QUADS; k++) a8_segment<sh::COLUMNS>(acc[k], c->a[k], x + k * (sh::COLUMNS * CU_SEGMENT));
    wide_wait<0>();
#pragma unroll
    for (int k = 0; k < QUADS; k++) {
        a8_hold<sh::COLUMNS / 2>(acc[k]);
        wide_hold_codes<4>(c->a[k]);
    }
    put_sums<F, ROWS>(acc, part, warp, lane);
}

/* The total of one output and row, first segment first. by_band: fp8's. */
template <cu_format F, int ROWS>
static __device__ __forceinline__ float total_of(const float *part, const float *by_row, const float *by_band,
                                                 float by_out) {
    float v[SEGS], s[SEGS], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < SEGS; i++) {
        v[i] = part[i * ROWS * CU_BAND];
        s[i] = by_row[i * ROWS];
        if (F == CU_F8A8) s[i] = __fmul_rn(s[i], by_band[i]);
    }
#pragma unroll
    for (int i = 0; i < SEGS; i++) sum = __fmaf_rn(s[i], v[i], sum);
    return F == CU_F8A8 ? sum : __fmul_rn(sum, by_out);
}

/* Where four codes of a row's segment lie. */
template <int ROWS> static __device__ __forceinline__ int code_place(int32_t row, int32_t seg, int lane) {
    return seg / 4 * (4 * ROWS * CU_SEGMENT) + a8_piece_at(seg % 4 * ROWS + row, lane / 4) + lane % 4 * 4;
}

/* ---- the norm ---------------------------------------------------------------------------------------------------- */

/* 1 / sqrt(mean of squares) of a row in shared memory by a warp: cu_sum_squares' order. */
static __device__ __forceinline__ float row_scale_of(const float *x, float eps, int lane) {
    float4 v[SEGS];
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < SEGS; k++) v[k] = *(const float4 *)(x + k * CU_SEGMENT + lane * 4);
#pragma unroll
    for (int k = 0; k < SEGS; k++) sum = cu_add_squares(v[k], sum);
    return cu_norm_scale(cu_warp_sum(sum), HIDDEN, eps);
}

/* The warp's segments of a row of x to codes. */
template <cu_format F, int ROWS>
static __device__ __forceinline__ void norm_row(const float *x, const uint2 w[OWN_SEGS], float scale, unsigned char *to,
                                                float *by_row, int32_t row, int warp, int lane) {
#pragma unroll
    for (int k = 0; k < OWN_SEGS; k++) {
        const int seg = warp + k * WARPS;
        const float4 in = *(const float4 *)(x + min(seg, SEGS - 1) * CU_SEGMENT + lane * 4);
        const float f[4] = {in.x, in.y, in.z, in.w};
        const uint32_t weight[4] = {w[k].x & 0xffff, w[k].x >> 16, w[k].y & 0xffff, w[k].y >> 16};
        float v[4], of_codes;
        if (seg >= SEGS) break;
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = cu_f32(cu_round(cu_normed(f[e], scale, (cu_bf16)weight[e])));
        *(uint32_t *)(to + code_place<ROWS>(row, seg, lane)) = a8_quantize<a8_codes_of(F)>(&of_codes, v);
        if (lane == 0) by_row[seg * ROWS + row] = of_codes;
    }
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

/* The cells of a tile's keys. */
static __device__ __forceinline__ void tile_put_cells(const attn_args *a, unsigned char *smem, const chain_tile *t,
                                                      int32_t page) {
    if (threadIdx.x >= CU_KEYS) return;
    const attn_cell cell = attn_cell_of<HEAD, 0, true>(a, page, t->head, t->tile * CU_KEYS + (int32_t)threadIdx.x);
    tile_put_cell<HEAD, 0, WARPS>(smem, (int32_t)threadIdx.x, cell.key);
}
static __device__ __forceinline__ void tile_ask(const attn_args *a, unsigned char *smem, int which,
                                                const chain_tile *t) {
    const int32_t own = t->pos - t->tile * CU_KEYS;
    tile_load<HEAD, 0, WARPS>(a, a->kv, smem, which, own + 1, own);
    attn_copy_commit();
}

/* The same of the block's first tile, by the two warps that ask; keys and values arrive at bars 0 and 1. */
static __device__ __forceinline__ void ask_first(const attn_args *a, unsigned char *smem, const chain_tile *t,
                                                 int64_t *cells, uint32_t bars, int asker) {
    typedef tile_shape<HEAD, 0, WARPS> sh;
    const int32_t own = t->pos - t->tile * CU_KEYS;
#pragma unroll
    for (int i = 0; i < CU_KEYS / ASKERS; i++) {
        const int32_t at = t->tile * CU_KEYS + i * ASKERS + asker;
        const attn_cell cell =
            attn_cell_of<HEAD, 0, true>(a, attn_page_of<true>(a, t->row, at, t->pos + 1), t->head, at);
        cells[i * ASKERS + asker] = max(cell.key, (int64_t)0);
    }
    one_sync<BAR_ASK, ASKERS>();
#pragma unroll 1
    for (int which = 0; which < 2; which++) {
        const uint32_t chunk = asker % sh::chunks;
        const uint32_t to = attn_smem(smem + (which ? sh::v_at : sh::k_at));
        const unsigned char *from = a->kv + (which ? a->value : 0) + chunk * 16;
#pragma unroll 8
        for (int i = 0; i < CU_KEYS * sh::chunks / ASKERS; i++) {
            const int32_t row = i * (ASKERS / sh::chunks) + asker / sh::chunks;
            const bool real = row <= own;
            attn_copy16_if(!real || row < own, to + attn_at<sh::chunks>(row, chunk), from + cells[row], real);
        }
        copies_arrive(bars + which * 8);
    }
}

/* The group's rows of q (where they are not there yet), a warp a row, and with the row's own tile its key and value:
 * warp 0 and 1. */
static __device__ __forceinline__ void make_rows(const attn_args *a, unsigned char *smem, const uint32_t *qkv,
                                                 const chain_tile *t, bool q, int warp, int lane) {
    typedef tile_shape<HEAD, 0, WARPS> sh;
    const bool own = t->tile == t->pos / CU_KEYS && warp < 2, makes_q = q && warp < a->group;
    const uint32_t *row = qkv + (int64_t)t->row * (a->n_head + 2 * a->n_kv_head) * HEAD + lane * 4;
    if (!own && !makes_q) return;
    const float4 turn = *(const float4 *)(a->turn + (int64_t)t->row * (HEAD / 2) + lane * 2);
    const int32_t cell = a->cell[t->row], nth = cell / a->n_page_cell, in_page = cell - nth * a->n_page_cell;
    const uint32_t *own_at = row + (a->n_head + warp * a->n_kv_head + t->head) * HEAD;
    const uint32_t *q_at = row + (t->head * a->group + warp) * HEAD;
    uint4 v[2];
    const void *const from[2] = {own ? own_at : q_at, makes_q ? q_at : own_at};
    chain_await<2>(v, from, 2);
    float x[4];
    if (own) {
        const int32_t in_tile = t->pos % CU_KEYS;
        if (warp == 0)
            chain_turn(x, v[0], turn);
        else
            x[0] = __uint_as_float(v[0].x), x[1] = __uint_as_float(v[0].y), x[2] = __uint_as_float(v[0].z),
            x[3] = __uint_as_float(v[0].w);
        attn_put_bf16<4>(smem + (warp ? sh::v_at : sh::k_at) + attn_at<sh::chunks>(in_tile, lane / 2) + lane % 2 * 8,
                         x);
        if (cell >= 0)
            attn_put_bf16<4>(a->kv + nth * a->page_bytes + t->head * a->plane_bytes + warp * a->value +
                                 (int64_t)in_page * sh::row_bytes + lane * 8,
                             x);
    }
#pragma unroll 1
    for (int32_t r = warp; makes_q && r < a->group; r += WARPS) {
        if (r > warp) {
            const void *const next[1] = {row + (t->head * a->group + r) * HEAD};
            chain_await<1>(v + 1, next, 1);
        }
        chain_turn(x, v[1], turn);
        *(uint2 *)(smem + sh::q_at + attn_at<sh::q_chunks>(r, lane / 2) + lane % 2 * 8) =
            make_uint2(cu_round2(x[0], x[1]), cu_round2(x[2], x[3]));
    }
}

/* O of a tile, and its M and L. */
static __device__ __forceinline__ int64_t piece_at(const one_args *a, int32_t row, int32_t head, int32_t tile) {
    return ((int64_t)row * a->att.n_head + head) * a->n_tile_max + tile;
}
static __device__ __forceinline__ void put_tile(const one_args *a, const chain_tile *t, const float o[2][4],
                                                const float m[2], const float l[4], int warp, int lane) {
    const int g = lane / 4, c = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int32_t r = g + 8 * i;
        if (r >= a->att.group) continue;
        const int64_t at = piece_at(a, t->row, t->head * a->att.group + r, t->tile);
        float *piece = a->piece + at * HEAD + warp * 16 + 2 * c;
        chain_write2(piece, o[0][2 * i], o[0][2 * i + 1]);
        chain_write2(piece + 8, o[1][2 * i], o[1][2 * i + 1]);
        if (warp == 0 && c == 0) chain_write2(a->piece_ml + at, m[i], l[2 * i]);
    }
}

/* The block's tiles first..end-1 of the line; keys and values of the first were asked for. */
static __device__ __forceinline__ void attend(const one_args *args, unsigned char *smem, const uint32_t *qkv,
                                              const int32_t *pos, int32_t first, int32_t end, uint32_t bars, int warp,
                                              int lane) {
    typedef tile_shape<HEAD, 0, WARPS> sh;
    constexpr int J = sh::warp_keys / 8;
    const attn_args *a = &args->att;
    const int g = lane / 4, c = lane % 4;
    float *top = (float *)(smem + sh::top_at);
    int32_t have = -1; /* whose q is there */
    chain_tile t = chain_tile_of(a, pos, first);
#pragma unroll 1
    for (int32_t x = first; x < end; x++) {
        const bool more = x + 1 < end;
        const int32_t whose = t.row * a->n_kv_head + t.head;
        const chain_tile next = chain_tile_of(a, pos, more ? x + 1 : x);
        const int32_t page = more ? chain_page(a, &next) : -1; /* asked for early */
        make_rows(a, smem, qkv, &t, have != whose, warp, lane);
        have = whose;
        if (x == first)
            chain_wait(bars, 0);
        else
            attn_copy_wait<1>();
        one_sync<BAR_ALL, COMPUTERS>(); /* keys and q are there; nobody reads the cells any more */
        float s[J][4], m[2] = {-INFINITY, -INFINITY};
        tile_scores<HEAD, 0, WARPS>(s, smem, warp, lane);
#pragma unroll
        for (int j = 0; j < J; j++) {
            const int in_tile = warp * sh::warp_keys + j * 8 + 2 * c;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                if (t.tile * CU_KEYS + in_tile + (e & 1) > t.pos) s[j][e] = -INFINITY;
                m[e >> 1] = fmaxf(m[e >> 1], s[j][e]);
            }
        }
        tile_put_top(m, top, warp, g, c);
        if (more) tile_put_cells(a, smem, &next, page);
        one_sync<BAR_ALL, COMPUTERS>(); /* maxima are there; keys and q may be overwritten */
        if (more)
            tile_ask(a, smem, 0, &next);
        else
            attn_copy_commit();
        tile_top<WARPS>(m, top, g, a->scale);
#pragma unroll
        for (int j = 0; j < J; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float p0 = attn_weight(s[j][2 * i], a->scale, m[i]);
                const float p1 = attn_weight(s[j][2 * i + 1], a->scale, m[i]);
                *(uint32_t *)(smem + sh::l_at + attn_at<16>(g + 8 * i, warp * J + j) + c * 4) = cu_round2(p0, p1);
            }
        }
        if (x == first)
            chain_wait(bars + 8, 0);
        else
            attn_copy_wait<1>();
        one_sync<BAR_ALL, COMPUTERS>(); /* values and weights are there */
        float o[sh::warp_units][2][4], l[4];
        tile_weigh<HEAD, 0, WARPS>(o, l, smem, warp, lane);
        put_tile(args, &t, o[0], m, l, warp, lane);
        if (!more) break;
        one_sync<BAR_ALL, COMPUTERS>(); /* values and weights may be overwritten */
        tile_ask(a, smem, 1, &next);
        t = next;
    }
}

/* A vector of which words were missing; without a branch. */
static __device__ __forceinline__ void look_if(uint4 *v, const void *p, uint32_t missing) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %4, 0; @p ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%5];}"
                 : "+r"(v->x), "+r"(v->y), "+r"(v->z), "+r"(v->w)
                 : "r"(missing), "l"(p)
                 : "memory");
}
static __device__ __forceinline__ void look2_if(uint2 *v, const void *p, uint32_t missing) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%3];}"
                 : "+r"(v->x), "+r"(v->y)
                 : "r"(missing), "l"(p)
                 : "memory");
}

/* Join the tiles of a row's head, a servant JOIN_DIMS dimensions, a lane a dimension; then its codes, for o. A look is
 * at four tiles a vector; what came is joined while the next look is on its way, out of shared memory: o [ONCE]
 * [JOIN_DIMS] and ml [ONCE], the servant's. So the code is small, and nearly all of it ran before the last words come:
 * what runs first after them is far away. room: f32 [128] */
template <cu_format F>
static __device__ __forceinline__ void join(const one_args *a, const int32_t *pos, uint32_t *set, float *o, float2 *ml,
                                            float *room, int32_t row, int32_t head, int servant, int lane) {
    const int32_t n_tile = chain_tiles(pos[row]), nth = lane / 8;
    const int64_t at = piece_at(a, row, head, 0);
    const float *piece = a->piece + (at + nth) * HEAD + servant * JOIN_DIMS + lane % 8 * 4;
    const float2 *piece_ml = a->piece_ml + at + lane;
    float M = -INFINITY, L = 0.0f, acc = 0.0f;
    int32_t before = 0, count = 0, joined = 0; /* tiles of earlier rounds, of this one, those of it that are joined */
    uint32_t missing = 0;                      /* of a lane's vectors of O, then of M and L */
    uint4 v[LOOKS] = {};
    uint2 v_ml[2] = {};
#pragma unroll 1
    for (int looks = 0;; chain_again(&looks)) {
#pragma unroll
        for (int i = 0; i < LOOKS; i++) {
            if (!chain_none(v[i])) missing &= ~(1u << i);
            *(uint4 *)(o + (4 * i + nth) * JOIN_DIMS + lane % 8 * 4) = v[i];
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (max(v_ml[i].x, v_ml[i].y) != CHAIN_NONE) missing &= ~(1u << (LOOKS + i));
            if (32 * i + lane < ONCE) *(uint2 *)(ml + 32 * i + lane) = v_ml[i];
        }
        int32_t first = count; /* that is not there */
        if (missing >> LOOKS) first = missing >> LOOKS & 1 ? lane : 32 + lane;
        if (missing << (32 - LOOKS)) first = min(first, 4 * (__ffs((int)missing) - 1) + nth);
        first = __reduce_min_sync(0xffffffffu, first);
        const bool all = first == count;
        const int32_t there = all ? count : first / JOIN_STEP * JOIN_STEP;
        if (all) { /* the next round's */
            before += count;
            count = min(n_tile - before, (int32_t)ONCE);
            missing = (1u << ((count - nth + 3) >> 2)) - 1;
            if (lane < count) missing |= 1u << LOOKS;
            if (32 + lane < count) missing |= 2u << LOOKS;
        }
#pragma unroll
        for (int i = 0; i < LOOKS; i++) look_if(&v[i], piece + (before + 4 * i) * HEAD, missing & 1u << i);
#pragma unroll
        for (int i = 0; i < 2; i++) look2_if(&v_ml[i], piece_ml + before + 32 * i, missing & 1u << (LOOKS + i));
        __syncwarp();
#pragma unroll 1
        for (; joined < there; joined += JOIN_STEP) {
#pragma unroll
            for (int j = 0; j < JOIN_STEP; j++) {
                const bool real = joined + j < there;
                const float2 of_tile = ml[joined + j];
                float f, b;
                attn_factors(&M, real ? of_tile.x : -INFINITY, &f, &b);
                const float next_L = attn_join(L, of_tile.y, f, b);
                const float next_acc = attn_join(acc, o[(joined + j) * JOIN_DIMS + lane], f, b);
                if (real) L = next_L, acc = next_acc;
            }
        }
        __syncwarp();
        if (all) joined = 0;
        if (count == 0) break;
    }
    room[servant * JOIN_DIMS + lane] = cu_f32(cu_round(__fdiv_rn(acc, L)));
    one_sync<BAR_SERVE, SERVANTS * 32>(); /* the segment is there; M and L were read */
    if (servant == 0) {
        const float4 y = *(const float4 *)(room + lane * 4);
        const float x[4] = {y.x, y.y, y.z, y.w};
        float scale;
        const uint32_t code = a8_quantize<a8_codes_of(F)>(&scale, x);
        chain_write(set + a->code_at + ((int64_t)row * a->att.n_head + head) * 32 + lane, disguise<F>(code));
        if (lane == 0) chain_write(set + a->scale_at + row * a->att.n_head + head, __float_as_uint(scale));
    }
    float *own = a->piece + at * HEAD + servant * JOIN_DIMS + lane;
#pragma unroll 1
    for (int32_t j = 0; j < n_tile; j++) chain_write(own + j * HEAD, CHAIN_NONE);
    if (servant == 1)
#pragma unroll 1
        for (int32_t j = lane; j < n_tile; j += 32)
            chain_write2(a->piece_ml + at + j, __uint_as_float(CHAIN_NONE), __uint_as_float(CHAIN_NONE));
}

/* ---- o's rows ---------------------------------------------------------------------------------------------------- */

/* Codes of all rows and segments, and their scales, when they are there. */
template <cu_format F, int ROWS>
static __device__ __forceinline__ void bring_codes(const one_args *a, const uint32_t *set, unsigned char *to,
                                                   float *by_row, int warp, int lane) {
    const int32_t n = a->n_row * SEGS * 8; /* pieces of 16 bytes */
    if (warp == WARPS - 1) {
#pragma unroll 1
        for (int32_t i = lane; i < a->n_row * SEGS; i += 32) {
            uint32_t v = CHAIN_NONE;
            for (int looks = 0; (v = chain_read(set + a->scale_at + i)) == CHAIN_NONE;) chain_again(&looks);
            by_row[i % SEGS * ROWS + i / SEGS] = __uint_as_float(v);
        }
        __syncwarp();
    }
#pragma unroll 1
    for (int32_t i0 = warp * 32; i0 < n; i0 += COMPUTERS) {
        const int32_t i = i0 + lane, piece = i % 8, seg = i / 8 % SEGS, row = i / 8 / SEGS;
        uint4 v[1];
        const void *const from[1] = {set + a->code_at + i * 4};
        chain_await<1>(v, from, i < n);
        if (i < n)
            *(uint4 *)(to + seg / 4 * (4 * ROWS * CU_SEGMENT) + a8_piece_at(seg % 4 * ROWS + row, piece)) =
                make_uint4(disguise<F>(v[0].x), disguise<F>(v[0].y), disguise<F>(v[0].z), disguise<F>(v[0].w));
    }
}

/* The block's stretch of the line of tiles. */
static __device__ __forceinline__ void stretch_of(const one_args *a, const int32_t *pos, int32_t *first, int32_t *end) {
    const int32_t block = blockIdx.x, n_block = gridDim.x;
    int32_t n_tile = 0;
#pragma unroll 1
    for (int32_t r = 0; r < a->n_row; r++) n_tile += chain_tiles(pos[r]) * a->att.n_kv_head;
    const int32_t each = n_tile / n_block, rest = n_tile - each * n_block;
    *first = block * each + min(block, rest);
    *end = *first + each + (block < rest);
}

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

/* What a block's threads share beside the large pieces. */
typedef struct one_shared {
    float4 room[HEAD / 4];
    float2 ml[SERVANTS][ONCE];                 /* of tiles that are joined */
    uint64_t qkv[GROUPS][QUADS], done[GROUPS]; /* a band of qkv in shared memory; nobody reads it, nor x, any more */
    uint64_t rows, o[GROUPS];                  /* x and a band of o in shared memory */
    uint64_t ready, kv[2]; /* row_scale, set, pos and by_band are there; keys and values of the first tile */
    float row_scale[4], by_row[SEGS * 4], by_band[2][GROUPS][SEGS];
    int64_t cells[CU_KEYS]; /* of the first tile */
    int32_t pos[4], set;
} one_shared;

template <cu_format F, int ROWS>
static __device__ __forceinline__ void serve(const one_args *a, one_shared *s, unsigned char *memory, int servant,
                                             int lane) {
    typedef one_shape<ROWS> sh;
    float *const f32 = (float *)(memory + sh::f32_at);
    const uint32_t ready = attn_smem(&s->ready);
    const int32_t block = blockIdx.x, n_block = gridDim.x, asker = (servant - FIRST_ASKER) * 32 + lane;
    if (servant == 0 && F == CU_F8A8) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int32_t band = i < 2 ? qkv_band(a, block, n_block, i) : o_band(a, block, n_block, i - 2);
            if (band >= 0 && lane < SEGS)
                s->by_band[i / 2][i % 2][lane] = __ldg((i < 2 ? a->qkv.scale : a->o.scale) + a8_at(band, lane, SEGS));
        }
    } else if (servant == 1) {
        if (lane < a->n_row) s->pos[lane] = a->att.pos[lane];
        if (lane == 0) {
            /* All blocks of the launch before had counted when they let others begin. */
            s->set = (int32_t)(atomicAdd(a->count, 1ull) / (uint32_t)n_block & 1);
            cu_launch_next();
        }
    } else if (servant >= FIRST_ASKER) {
        int32_t first, end;
        stretch_of(a, a->att.pos, &first, &end);
        if (first < end) {
            const chain_tile t = chain_tile_of(&a->att, a->att.pos, first);
            ask_first(&a->att, memory + sh::tile_at, &t, s->cells, attn_smem(s->kv), asker);
        }
    }
    cu_wait_previous();
    __syncwarp();
    if (servant < FIRST_ASKER) {
        const uint32_t rows = attn_smem(&s->rows);
        if (servant == 0 && lane == 0) {
            bar_arrive_expect(rows, a->n_row * HIDDEN * 4);
            copy_bulk(attn_smem(f32), a->x, a->n_row * HIDDEN * 4, rows);
        }
        chain_wait(rows, 0);
#pragma unroll 1
        for (int32_t r = servant; r < a->n_row; r += FIRST_ASKER) {
            const float scale = row_scale_of(f32 + r * HIDDEN, a->eps, lane);
            if (lane == 0) s->row_scale[r] = scale;
        }
        if (lane == 0) bar_arrive(ready);
    }
    if (servant >= FIRST_ASKER) {
#pragma unroll
        for (int g = GROUPS - 1; g >= 0; g--) { /* blocks with a second band of o have none of qkv in its place */
            const int32_t band = o_band(a, block, n_block, g);
            if (band < 0) continue;
            if (qkv_band(a, block, n_block, g) >= 0) chain_wait(attn_smem(s->done + g), 0);
            ask_band(a, band, attn_smem(memory) + g * BAND_BYTES, attn_smem(s->o + g), servant, lane);
        }
    }
    chain_wait(ready, 0);
    uint32_t *const other = a->set[s->set ^ 1];
#pragma unroll 1
    for (int32_t i = block * (SERVANTS * 32) + servant * 32 + lane; i < a->n_set; i += n_block * (SERVANTS * 32))
        other[i] = CHAIN_NONE;
    const int32_t task = n_block - 1 - block;
    if (task < a->n_row * a->att.n_head) {
        chain_wait(attn_smem(s->done), 0); /* tiles go where x was */
        join<F>(a, s->pos, a->set[s->set], f32 + servant * (ONCE * JOIN_DIMS), s->ml[servant], (float *)s->room,
                task / a->att.n_head, task % a->att.n_head, servant, lane);
    }
}

template <cu_format F, int ROWS>
__global__ void __launch_bounds__(THREADS, 1) attn_one(const __grid_constant__ one_args a) {
    typedef one_shape<ROWS> sh;
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ one_shared s;
    const int thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    const int32_t block = blockIdx.x, n_block = gridDim.x;
    const uint32_t memory_at = attn_smem(memory);
    unsigned char *const tile = memory + sh::tile_at;
    if (warp >= WARPS) {
        if (warp == WARPS && lane == 0) {
            for (int g = 0; g < GROUPS; g++) bar_init(attn_smem(s.done + g), WARPS / GROUPS);
            bar_init(attn_smem(&s.rows), 1);
            bar_init(attn_smem(s.o), N_ASKER);
            bar_init(attn_smem(s.o + 1), N_ASKER);
            bar_init(attn_smem(&s.ready), FIRST_ASKER);
            bar_init(attn_smem(s.kv), ASKERS);
            bar_init(attn_smem(s.kv + 1), ASKERS);
            bar_init_end();
        }
        one_sync<BAR_SERVE, SERVANTS * 32>();
        asm volatile("bar.arrive %0, %1;" ::"n"((int)BAR_START), "n"((int)THREADS) : "memory");
        serve<F, ROWS>(&a, &s, memory, warp - WARPS, lane);
        return;
    }

    const int group = warp / 4;
    const int32_t bands[2] = {qkv_band(&a, block, n_block, group), o_band(&a, block, n_block, group)};
    const uint32_t codes_at = memory_at + group * BAND_BYTES, here = attn_smem(s.qkv[group]);
    if (warp == 0 && lane < GROUPS * QUADS) {
        bar_init(attn_smem(s.qkv[0]) + lane * 8, WARPS / GROUPS);
        bar_init_end();
    }
    one_sync<BAR_ALL, COMPUTERS>();
    if (bands[0] >= 0) ask_units(&a.qkv, bands[0], codes_at, here, warp % 4, lane);
    /* What a thread adds up: an output of a row. */
    const int32_t mine = thread % 128, row = mine / CU_BAND, out_in = mine % CU_BAND;
    const bool adds = row < a.n_row;
    const int32_t out[2] = {bands[0] * CU_BAND + out_in, bands[1] * CU_BAND + out_in};
    float by_out[2] = {1.0f, 1.0f}, old = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (F != CU_F8A8 && adds && bands[i] >= 0) by_out[i] = __ldg((i ? a.o.scale : a.qkv.scale) + out[i]);
    uint2 norm_w[OWN_SEGS];
#pragma unroll
    for (int k = 0; k < OWN_SEGS; k++)
        norm_w[k] = __ldg((const uint2 *)(a.norm_w + min(warp + k * WARPS, SEGS - 1) * CU_SEGMENT + lane * 4));
    typedef tile_shape<HEAD, 0, WARPS> ts;
    for (int i = thread; i < (ATTN_FEW - a.att.group) * (HEAD / 8); i += COMPUTERS)
        ((uint4 *)(tile + ts::q_at))[a.att.group * (HEAD / 8) + i] = make_uint4(0, 0, 0, 0); /* no rows */
    one_sync<BAR_START, THREADS>();                                                          /* barriers are there */
    cu_wait_previous();

    float *const part = (float *)(memory + sh::part_at) + group * (SEGS * ROWS * CU_BAND);
    const float *const part_mine = part + row * CU_BAND + out_in;
    const uint32_t x_at = memory_at + sh::x_at;
    const float *const f32 = (const float *)(memory + sh::f32_at);
    if (adds && bands[1] >= 0) old = __ldcg(a.x + row * HIDDEN + out[1]);
    {
        chain_wait(attn_smem(&s.rows), 0);
        chain_wait(attn_smem(&s.ready), 0);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (r < a.n_row)
                norm_row<F, ROWS>(f32 + r * HIDDEN, norm_w, s.row_scale[r], memory + sh::x_at, s.by_row, r, warp, lane);
        a8_show();
        one_sync<BAR_ALL, COMPUTERS>();
        if (bands[0] >= 0) multiply_there<F, ROWS>(part, codes_at, here, x_at, warp % 4, lane);
        __syncwarp();
        if (lane == 0) bar_arrive(attn_smem(s.done + group));
    }
    uint32_t *const set = a.set[s.set];
    if (bands[0] >= 0) {
        group_sync(group);
        if (adds)
            chain_write(set + row * a.qkv.n_out + out[0],
                        __float_as_uint(total_of<F, ROWS>(part_mine, s.by_row + row, s.by_band[0][group], by_out[0])));
    }
    int32_t first, end;
    stretch_of(&a, s.pos, &first, &end);
    if (first < end) attend(&a, tile, set, s.pos, first, end, attn_smem(s.kv), warp, lane);

    {
        attn_copy_wait<0>();
        if (bands[1] >= 0) chain_wait(attn_smem(s.o + group), 0);
        band_codes codes;
        if (bands[1] >= 0) take_band<F>(&codes, memory + group * BAND_BYTES, warp % 4, lane);
        one_sync<BAR_ALL, COMPUTERS>(); /* nobody reads the rows of qkv, their scales and sums any more */
        bring_codes<F, ROWS>(&a, set, memory + sh::x_at, s.by_row, warp, lane);
        a8_show();
        one_sync<BAR_ALL, COMPUTERS>();
        if (bands[1] < 0) return;
        multiply<F, ROWS>(&codes, part, x_at, warp % 4, lane);
    }
    group_sync(group);
    if (adds)
        a.x[row * HIDDEN + out[1]] =
            __fadd_rn(old, total_of<F, ROWS>(part_mine, s.by_row + row, s.by_band[1][group], by_out[1]));
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

enum { CUT = 512, ROWS_MAX = 4 };

static int64_t cut(int64_t n) { return (n + CUT - 1) / CUT * CUT; }

/* count | two sets of places | pieces | their M and L */
typedef struct one_memory {
    int64_t set[2], piece, piece_ml, bytes; /* bytes before */
    int32_t code_at, scale_at, n_set, n_tile_max;
} one_memory;
static one_memory memory_of(const cu_attn_one *c) {
    const int32_t R = c->n_row_max, Q = c->n_head * c->n_head_dim, KV = c->n_kv_head * c->n_head_dim;
    one_memory m = {};
    m.code_at = R * (Q + 2 * KV);
    m.scale_at = m.code_at + R * Q / 4;
    m.n_set = m.scale_at + R * c->n_head;
    m.n_tile_max = (c->n_len_max + CU_KEYS - 1) / CU_KEYS;
    const int64_t set = cut(m.n_set * 4), n_piece = (int64_t)R * c->n_head * m.n_tile_max;
    m.set[0] = CUT, m.set[1] = m.set[0] + set;
    m.piece = m.set[1] + set;
    m.piece_ml = m.piece + cut(n_piece * c->n_head_dim * 4);
    m.bytes = m.piece_ml + cut(n_piece * 8);
    return m;
}

bool cu_attn_one_fits(const cu_attn_one *c) {
    const int32_t n = attn_sm_count(), Q = c->n_head * c->n_head_dim;
    const int32_t n_qkv = (Q + 2 * c->n_kv_head * c->n_head_dim) / CU_BAND, n_o = c->n_hidden / CU_BAND;
    return c->n_hidden == HIDDEN && c->n_head_dim == HEAD && Q == HIDDEN && c->n_head % c->n_kv_head == 0 &&
           c->n_head / c->n_kv_head <= ATTN_FEW && c->kv_dtype == ERN_KV_BF16 && c->n_row_max >= 1 &&
           c->n_row_max <= ROWS_MAX && c->n_row_max * c->n_head <= n && n_qkv <= GROUPS * n && n_o <= GROUPS * n;
}

int64_t cu_attn_one_bytes(const cu_attn_one *c) { return memory_of(c).bytes; }

cudaError_t cu_attn_one_open(cudaStream_t s, const cu_attn_one *c) {
    const one_memory m = memory_of(c);
    const cudaError_t e = cudaMemsetAsync(c->memory, 0, CUT, s);
    return e != cudaSuccess ? e : cudaMemsetAsync(c->memory + CUT, 0xff, (size_t)(m.bytes - CUT), s);
}

template <cu_format F, int ROWS> static cudaError_t run(cudaStream_t s, one_args *a) {
    static uint64_t ready;
    const void *fn = (const void *)attn_one<F, ROWS>;
    const cudaError_t e = cu_shared_bytes(&ready, fn, one_shape<ROWS>::end_at);
    void *args[] = {a};
    return e != cudaSuccess ? e
                            : cu_launch(s, fn, dim3((unsigned)attn_sm_count()), THREADS,
                                        (size_t)one_shape<ROWS>::end_at, true, 1, args);
}
template <cu_format F> static cudaError_t run_rows(cudaStream_t s, one_args *a) {
    return a->n_row <= 2 ? run<F, 2>(s, a) : run<F, 4>(s, a);
}

bool cu_attn_one_takes(const cu_linear *w) {
    return (w->format == CU_F8A8 || w->format == CU_I8A8) && w->n_in == HIDDEN && w->n_out % CU_BAND == 0;
}

cudaError_t cu_attn_one_run(cudaStream_t s, const cu_attn_one *c, const cu_attn_one_layer *l, float *x,
                            const cu_cache *cache, int32_t layer, const cu_seqs *seqs) {
    const one_memory m = memory_of(c);
    one_args a = {};
    if (seqs->n_row > c->n_row_max || seqs->n_row != seqs->n_seq || !cu_attn_one_takes(&l->qkv) ||
        !cu_attn_one_takes(&l->o) || l->qkv.format != l->o.format || !attn_args_of(&a.att, cache, layer, seqs))
        return cudaErrorInvalidValue;
    a.qkv = l->qkv;
    a.o = l->o;
    a.norm_w = l->norm;
    a.eps = l->eps;
    a.x = x;
    a.count = (unsigned long long *)c->memory;
    for (int i = 0; i < 2; i++) a.set[i] = (uint32_t *)(c->memory + m.set[i]);
    a.code_at = m.code_at;
    a.scale_at = m.scale_at;
    a.n_set = m.n_set;
    a.piece = (float *)(c->memory + m.piece);
    a.piece_ml = (float2 *)(c->memory + m.piece_ml);
    a.n_row = seqs->n_row;
    a.n_tile_max = m.n_tile_max;
    return l->qkv.format == CU_F8A8 ? run_rows<CU_F8A8>(s, &a) : run_rows<CU_I8A8>(s, &a);
}
