/* How the blocks of decode attention go along the line of tiles. A stretch has parts, one a sequence and head ("unit"):
 *   whole   a part that holds all of the unit's tiles: its result goes to the output.
 *   handed  a unit hardly longer than a stretch is cut once. Its first part is the first that its block does, and what
 *           comes of it is left in scratch; its later part is the last that the next block does, going on from there.
 *   shared  a longer unit: the part with its first tiles joins them and leaves that in scratch, and later tiles leave
 *           their own results there, each by itself, before anything else is waited for. The blocks whose stretch ends
 *           in the unit or with it then join all of it in order, each its share of rows and dimensions.
 * The words left in scratch themselves tell that they are there: nobody counts.
 *
 *   line   | unit 0 | 1      | unit 2                 |      whole: 0. handed: 1, by block 0 to block 1.
 *   blocks |0           |1           |2           |3         shared: 2, joined by blocks 1, 2 and 3.
 *
 * Every unit is done tile by tile in order or joined so: the same bits however it is cut. Device code only. */
#ifndef ERN_BACKEND_CUDA_CU_ATTN_WALK_CUH
#define ERN_BACKEND_CUDA_CU_ATTN_WALK_CUH

#include "backend/cuda/cu_attn.cuh"

/* A slot: M and L of a row, once for each reader, then Acc: [row_max][slices][2], [row_max][C]. A reader takes a slice
 * of a row: 32 dimensions, or C if that is less. Floats are stored as ~bits: 0 is a word that is not there, since no
 * sum is a NaN of all ones. */
static __host__ __device__ constexpr int32_t slices_of(int32_t C) { return C > 32 ? C / 32 : 1; }
static __host__ __device__ __forceinline__ int32_t slot_acc(int32_t row_max, int32_t C) {
    return (row_max * 2 * slices_of(C) + 3) / 4 * 4; /* read by 16 bytes */
}
static __host__ __device__ __forceinline__ int32_t slot_words(int32_t row_max, int32_t C) {
    return slot_acc(row_max, C) + row_max * C;
}

/* The line, and what is left in scratch: a slot for the result of each tile, then one for the first tiles of each unit
 * as the block that has them joined them. */
typedef struct stretch {
    attn_line line;
    int32_t row_max, slot; /* words of a slot */
    int32_t n_unit;
    bool cut;           /* false: slots do not fit scratch, and block b takes units b, b + blocks and so on */
    bool beside;        /* there is room for all blocks of the line beside attn_prefill's, which is in front */
    int32_t from, stop; /* of this block */
    int32_t begin_end;  /* where the unit of its first tile ends */
    const attn_start *start;
} stretch;

static __device__ __forceinline__ stretch stretch_of(const attn_args *a, int C) {
    const int4 head = __ldcg((const int4 *)a->work); /* ATTN_N_DEC, ATTN_N_TILE, ATTN_ROW_MAX, ATTN_N_BLOCK */
    stretch s;
    s.n_unit = head.x * a->n_kv_head;
    s.line = attn_line_of(head.y, s.n_unit, head.w);
    s.row_max = head.z;
    s.slot = slot_words(s.row_max, C);
    s.cut = ((int64_t)head.y + s.n_unit) * s.slot <= a->n_scratch;
    s.beside = a->behind && s.cut && head.w < (int32_t)gridDim.x;
    s.from = attn_line_start(&s.line, blockIdx.x), s.stop = attn_line_start(&s.line, blockIdx.x + 1);
    s.start = attn_starts(a->turn, a->n_row, C) + blockIdx.x;
    return s;
}
/* A sequence and head. */
typedef struct unit {
    int32_t k, head; /* place among the short sequences */
    int32_t seq, len, row0, n_row, pos0;
    int32_t n_tile, x0; /* tiles; place of the first in the line */
} unit;

static __device__ __forceinline__ unit unit_of(const attn_short *from) {
    const int4 lo = __ldcg((const int4 *)from), hi = __ldcg((const int4 *)from + 1);
    unit u;
    u.seq = lo.x, u.len = lo.y, u.row0 = lo.z, u.n_row = lo.w, u.pos0 = hi.x;
    u.n_tile = (u.len + CU_KEYS - 1) / CU_KEYS;
    u.x0 = hi.y, u.k = hi.z, u.head = hi.w;
    return u;
}
static __device__ __forceinline__ int32_t unit_index(const attn_args *a, const unit *u) {
    return u->k * a->n_kv_head + u->head;
}
static __device__ __forceinline__ unit unit_after(const attn_args *a, const unit *u) {
    if (u->head + 1 == a->n_kv_head) return unit_of(attn_shorts(a->work) + u->k + 1);
    unit next = *u;
    next.head++;
    next.x0 += u->n_tile;
    return next;
}

/* Unit n of all, in the line's order. */
static __device__ __forceinline__ unit unit_nth(const attn_args *a, int32_t n) {
    const int32_t k = n / a->n_kv_head;
    unit u = unit_of(attn_shorts(a->work) + k);
    u.head = n - k * a->n_kv_head;
    u.x0 += u.head * u.n_tile;
    return u;
}
/* Where a group is. `fresh`: no tile before this one goes into its results, or (`taken`) those of the block before. */
typedef struct walk {
    unit u;
    int32_t tile, end;
    int32_t between; /* where units end that are neither handed nor taken */
    bool alone;      /* each tile by itself */
    bool fresh, taken;
    bool hands, takes; /* the unit that is handed on is being done; the one that is taken is to come */
} walk;

/* The first tile of the block. */
static __device__ __forceinline__ walk walk_of(const attn_args *a, stretch *s) {
    const unit begin = unit_of(&s->start->begin);
    walk w;
    w.u = unit_of(&s->start->at);
    if (!s->cut) w.u = unit_nth(a, blockIdx.x);
    s->begin_end = begin.x0 + begin.n_tile;
    w.hands =
        s->cut && w.u.x0 > s->from && w.u.x0 + w.u.n_tile > s->stop && attn_line_hands(&s->line, w.u.x0, w.u.n_tile);
    w.takes = s->cut && s->from > begin.x0 && attn_line_hands(&s->line, begin.x0, begin.n_tile);
    w.between = w.hands ? w.u.x0 : s->stop;
    w.tile = s->cut ? max(s->from - w.u.x0, 0) : 0;
    w.end = s->cut ? min(w.u.n_tile, s->stop - w.u.x0) : w.u.n_tile;
    w.alone = w.tile > 0;
    w.fresh = true, w.taken = false;
    return w;
}
/* The next; false: there is none. */
static __device__ __forceinline__ bool walk_on(const attn_args *a, const stretch *s, walk *w) {
    w->tile++;
    w->fresh = w->alone || w->tile == w->end;
    if (w->tile < w->end) return true;
    if (!s->cut) {
        const int32_t n = unit_index(a, &w->u) + (int32_t)gridDim.x;
        if (n >= s->n_unit) return false;
        w->u = unit_nth(a, n);
        w->tile = 0, w->end = w->u.n_tile;
        return true;
    }
    const int32_t x = !w->hands ? w->u.x0 + w->u.n_tile : w->takes ? s->begin_end : s->from;
    const bool between = x < w->between;
    if (!between && !w->takes) return false;
    if (!between || w->hands) w->u = unit_of(&s->start->begin);
    if (between && (!w->hands || w->takes)) w->u = unit_after(a, &w->u);
    w->hands = false;
    w->taken = !between;
    if (!between) w->takes = false, w->between = 0;
    w->tile = (between ? x : s->from) - w->u.x0;
    w->alone = between && w->tile > 0;
    w->end = min(w->u.n_tile, s->stop - w->u.x0);
    return true;
}

#endif
