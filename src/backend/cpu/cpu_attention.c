/* Rotation of queries and keys, the cells they are stored in, and attention over the pages: docs/model.md 3.3 and 3.4.
 */
#include "backend/cpu/cpu_state.h"

#include <math.h>
#include <string.h>

enum { QUERY_ROWS_AHEAD = 3 }; /* of the row that is rotated: 4 KB each, within what a core may have on the way */

/* Cosines and sines of one row. The angle is an f32 product of the position and inv_freq, as docs/model.md 3.3 has it.
 */
void cpu_rope_table(float *table, const float *inv_freq, int32_t pos, int32_t C) {
    for (int32_t j = 0; j < C / 2; j++) {
        double angle = (double)((float)pos * inv_freq[j]);
        table[j] = (float)cos(angle);
        table[C / 2 + j] = (float)sin(angle);
    }
}

/* ---- keys and values into their cells ---------------------------------------------------------------------------- */

void cpu_copy_pages(cpu_backend *b, const ern_page_pair *pair, int32_t n) {
    for (int32_t i = 0; i < n; i++)
        for (int32_t p = 0; p < cpu_kv_planes(b); p++)
            memmove(cpu_kv_plane(b, pair[i].to, p), cpu_kv_plane(b, pair[i].from, p), (size_t)b->plane_bytes);
}

/* The keys of layer l, KV head g; the values lie behind them. */
static unsigned char *kv_at(const cpu_backend *b, int32_t page, int32_t layer, int32_t g) {
    return cpu_kv_plane(b, page, layer * 2 * b->model->config.n_kv_head + g);
}

/* Numbers of the key, or of the value, at `cell` of its plane: x [C], rounded. */
static void store_bf16(const cpu_backend *b, unsigned char *plane, const float *x, int32_t cell, bool is_key) {
    const int32_t C = b->model->config.n_head_dim, lane = cell % CPU_KV_GROUP;
    ern_bf16 row[CPU_HEAD_DIM_MAX], *to = (ern_bf16 *)(void *)plane;
    if (b->kernels->round_bf16)
        b->kernels->round_bf16(row, x, C);
    else
        for (int32_t c = 0; c < C; c++) row[c] = ern_bf16_from_f32(x[c]);
    if (is_key) {
        to += (int64_t)(cell - lane) * C + lane * 2;
        for (int32_t c = 0; c < C; c += 2, to += 2 * CPU_KV_GROUP) memcpy(to, row + c, 2 * sizeof *row);
    } else {
        to += (int64_t)(cell - cell % 2) * C + cell % 2;
        for (int32_t c = 0; c < C; c++) to[2 * c] = row[c];
    }
}

/* The same in codes, with their scale. */
static void store_int8(const cpu_backend *b, unsigned char *plane, const float *x, int32_t cell, bool is_key) {
    const int32_t C = b->model->config.n_head_dim, lane = cell % CPU_KV_GROUP;
    int8_t code[ERN_KV_CODE_HEAD_MAX], *to = (int8_t *)plane;
    float *scale = (float *)(void *)(plane + (int64_t)b->o.n_page_cell * C);
    int32_t sum;
    b->kernels->quant_int8(code, scale + cell, &sum, x, C);
    if (is_key) {
        to += (int64_t)(cell - lane) * C + lane;
        for (int32_t c = 0; c < C; c++) to[c * CPU_KV_GROUP] = code[c];
    } else {
        memcpy(to + (int64_t)cell * C, code, (size_t)C);
    }
}

/* Whether whoever attends rotates the queries: of tiles that are not cut, each is one worker's alone. */
static bool rotates_late(const cpu_backend *b) { return b->n_split == 0 && !b->probe; }

void cpu_rotate(const cpu_run *c) {
    const cpu_backend *b = c->b;
    const int32_t C = b->model->config.n_head_dim, H = b->model->config.n_head;
    int32_t from, to;
    if (rotates_late(b)) return;
    cpu_share(c, c->rows.n, 1, &from, &to);
    for (int64_t t = from; t < to; t++) b->kernels->rope(b->q + t * H * C, b->rope + t * C, H, C);
}

void cpu_store_rows(const cpu_run *c, int32_t layer) {
    const cpu_backend *b = c->b;
    const ern_config *m = &b->model->config;
    const int32_t C = m->n_head_dim, G = m->n_kv_head, P = b->o.n_page_cell;
    void (*store)(const cpu_backend *, unsigned char *, const float *, int32_t, bool) =
        b->o.kv_dtype == ERN_KV_BF16 ? store_bf16 : store_int8;
    int32_t from, to;
    cpu_share(c, c->s->n_row, 1, &from, &to);
    for (int64_t t = from; t < to; t++) {
        b->kernels->rope(b->k + t * G * C, b->rope + t * C, G, C);
        const int32_t page = c->s->cell[t] / P, cell = c->s->cell[t] % P;
        for (int32_t g = 0; g < G; g++) {
            unsigned char *k = kv_at(b, page, layer, g), *v = k + b->plane_bytes;
            store(b, k, b->k + (t * G + g) * C, cell, true);
            store(b, v, b->v + (t * G + g) * C, cell, false);
        }
    }
}

/* ---- who attends to what ----------------------------------------------------------------------------------------- */

enum {
    TILES_EACH = 4, /* tiles per worker below which the heavy ones are cut */
    BRIEF = 4,      /* such a task or less is a small part of all */
    PIECES = 8,     /* that an average tile would be cut into then: the last ones end at nearly one time */
    LOOSE_EACH = 8, /* blocks per worker at the end of a tile that is cut into less than chains, for the same */
    ROWS_FEW = 8,   /* rows of a tile where each attends by itself, or workers want more tiles */
    ROWS_SOME = 32, /* of more there are EVEN_EACH per worker, so that the last ones end at nearly one time */
    EVEN_EACH = 16,
    SPLIT_ROWS = 8, /* longest rows whose pieces fit at one time; further ones stay whole */
};

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
static int32_t blocks_to(int32_t pos) { return pos / CPU_ATTN_BLOCK + 1; }
/* The first block of the chain of block i. */
static int32_t chain_of(int32_t i) { return i / CPU_ATTN_CHAIN * CPU_ATTN_CHAIN; }

int32_t cpu_head_tiles(const ern_config *m) {
    return m->n_kv_head * ((m->n_head / m->n_kv_head + CPU_HEAD_TILE - 1) / CPU_HEAD_TILE);
}

int32_t cpu_attend_slots(const cpu_backend *b) {
    return b->n_worker > 1 ? least(b->o.n_row_max, SPLIT_ROWS) * blocks_to(b->o.n_len_max) : 0;
}

static bool by_rows(const cpu_backend *b) { return b->kernels->attn_rows && b->o.kv_dtype == ERN_KV_BF16; }

int32_t cpu_attend_rows(const cpu_backend *b) { return by_rows(b) ? CPU_ATTN_ROWS : ROWS_FEW; }

/* Rows of a sequence that share one walk over its keys and values. */
static int32_t tile_rows(const cpu_backend *b, int32_t n_row) {
    int32_t rows = cpu_attend_rows(b);
    const int32_t heads = cpu_head_tiles(&b->model->config);
    while (rows > ROWS_FEW && n_row / rows * heads < b->n_worker * (rows > ROWS_SOME ? EVEN_EACH : TILES_EACH))
        rows /= 2;
    return rows;
}

/* Of n_block blocks of a tile the first ones, whose pieces are whole chains: all but some loose ones at the end. */
static int32_t chained_blocks(const cpu_backend *b, int32_t n_block) {
    const int32_t loose = LOOSE_EACH * b->n_worker / cpu_head_tiles(&b->model->config);
    return n_block > loose ? chain_of(n_block - loose) : 0;
}

/* Tiles of rows are the tasks. Where they are too few or too unequal to keep all workers busy, the heavy ones are cut
 * along positions. A piece is one chain, or what there is of the last one, and keeps its result; or it is less than a
 * chain and keeps that of each block. They are joined afterwards in the order in which a whole tile joins its own: cut
 * or not, the bits are the same. Others' results come slowly from their caches, so chains are left whole where that
 * leaves enough to share. */
void cpu_attend_plan(cpu_backend *b, const cpu_rows *s, int32_t n_seq) {
    int64_t all = 0;
    for (int32_t t = 0; t < s->n; t++) all += blocks_to(s->pos[t]);
    const int64_t heads = cpu_head_tiles(&b->model->config);
    const int64_t most = all * heads / ((int64_t)b->n_worker * TILES_EACH) + 1; /* (row, block) pairs of a task */
    const int32_t rows = tile_rows(b, s->n);
    int32_t slot = 0;
    b->n_tile = b->n_split = 0;
    for (int32_t q = 0; q < n_seq; q++) {
        for (int32_t r = s->row0[q]; r < s->row0[q + 1]; r += rows) {
            const int32_t n = least(s->row0[q + 1] - r, rows), n_block = blocks_to(s->pos[r + n - 1]);
            const cpu_tile whole = {.row = r,
                                    .n = n,
                                    .seq = q,
                                    .n_block = n_block,
                                    .slot = -1,
                                    .stride = n_block,
                                    .brief = (int64_t)n * n_block * BRIEF <= most};
            if ((int64_t)n * n_block <= most || n_block == 1 || n * n_block > b->n_slot - slot) {
                b->tile[b->n_tile++] = whole;
                continue;
            }
            const int64_t fair = most / (PIECES * n);
            const int32_t loose = fair >= CPU_ATTN_CHAIN ? CPU_ATTN_CHAIN : fair >= 2 ? 2 : 1;
            cpu_tile piece = whole;
            piece.brief = true;
            piece.slot = slot;
            piece.n_chained = loose == CPU_ATTN_CHAIN ? n_block : chained_blocks(b, n_block);
            b->split[b->n_split++] = piece;
            for (int32_t end = n_block; end > 0; end = piece.block) { /* taken from the last one on */
                const int32_t each = end > piece.n_chained ? loose : CPU_ATTN_CHAIN;
                piece.block = (end - 1) / each * each;
                piece.n_block = end - piece.block;
                b->tile[b->n_tile++] = piece;
            }
            slot += n * n_block;
        }
    }
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

/* What the pieces of one head tile share. */
typedef struct heads {
    int32_t layer, g, h0, n; /* KV head; query heads h0 .. h0+n-1 */
    int32_t index;           /* of cpu_head_tiles */
} heads;

static heads heads_at(const ern_config *m, int32_t layer, int32_t index) {
    const int32_t group = m->n_head / m->n_kv_head, each = (group + CPU_HEAD_TILE - 1) / CPU_HEAD_TILE;
    const int32_t g = index / each, first = index % each * CPU_HEAD_TILE;
    return (heads){layer, g, g * group + first, least(group - first, CPU_HEAD_TILE), index};
}

static float *slot_part(const cpu_backend *b, int32_t slot, const heads *h) {
    return b->part + ((int64_t)slot * cpu_head_tiles(&b->model->config) + h->index) * b->part_floats;
}

static float *row_heads(const cpu_backend *b, int32_t row, const heads *h) {
    return b->q + ((int64_t)row * b->model->config.n_head + h->h0) * b->model->config.n_head_dim;
}

/* The queries of one row, which mostly another worker wrote: rows are too far apart for the processor to see what comes
 * next. */
static void fetch_heads(const cpu_backend *b, int32_t row, const heads *h) {
    const float *q = row_heads(b, row, h);
    for (int32_t i = 0; i < h->n * b->model->config.n_head_dim; i += CPU_LINE / 2) __builtin_prefetch(q + i, 1, 2);
}

/* The outputs of one row: as o takes them, or, o being NULL, over its queries. */
static void finish_row(const cpu_backend *b, const ern_linear *o, int32_t row, const heads *h, const float *acc) {
    const int32_t C = b->model->config.n_head_dim;
    float own[CPU_HEAD_TILE * CPU_HEAD_DIM_MAX], *out = o ? own : row_heads(b, row, h);
    b->kernels->attn_divide(out, acc, h->n, C);
    if (o) cpu_act_put(b, b->act, o, row, h->h0 * C, own, h->n * C);
}

/* What a worker keeps of the rows of a whole tile: their results, those of the chains at hand, that of a block. */
typedef struct own {
    float *rows, *chains, *block;
} own;

static own own_of(const cpu_run *c) {
    const int64_t all = cpu_attend_rows(c->b) * c->b->part_floats;
    float *rows = c->b->own_part + c->worker * (2 * all + c->b->part_floats);
    return (own){rows, rows + all, rows + 2 * all};
}

/* Where the result of block i goes for row r of a tile: to `part`, joined with what is there or not. */
typedef struct place {
    float *part;
    bool join;
} place;

static place place_of(const cpu_backend *b, const cpu_tile *tile, const heads *h, const own *o, int32_t r, int32_t i) {
    const int32_t first = chain_of(i), slot = tile->slot + r * tile->stride;
    if (tile->slot < 0) return (place){(first > 0 ? o->chains : o->rows) + r * b->part_floats, i > first};
    if (i < tile->n_chained) return (place){slot_part(b, slot + first, h), i > first};
    return (place){slot_part(b, slot + i, h), false};
}

/* What attend_tile does for a block: the rows of the tile that see it, at once. j has the first block's rows, or those
 * of the block before. */
static void attend_rows(const cpu_run *c, const cpu_tile *tile, const heads *h, int32_t i, cpu_attn_job *j,
                        const own *mine) {
    const cpu_backend *b = c->b;
    const int32_t *pos = c->rows.pos + tile->row, at = i * CPU_ATTN_BLOCK;
    const float *q[CPU_ATTN_ROWS];
    float *part[CPU_ATTN_ROWS];
    int32_t n[CPU_ATTN_ROWS], first = 0;
    while (pos[first] < at) first++;
    j->first = tile->n - first != j->n_row;
    j->n_row = tile->n - first;
    for (int32_t r = first; r < tile->n; r++) {
        n[r - first] = least(pos[r] + 1 - at, CPU_ATTN_BLOCK);
        q[r - first] = row_heads(b, tile->row + r, h);
        const place to = place_of(b, tile, h, mine, r, i);
        part[r - first] = to.part, j->join = to.join;
    }
    j->part = part, j->q = q, j->n = n;
    b->kernels->attn_rows(j);
}

/* The same where each row attends by itself. */
static void attend_each(const cpu_run *c, const cpu_tile *tile, const heads *h, int32_t i, float scale,
                        cpu_kv_block *kv, const own *mine) {
    const cpu_backend *b = c->b;
    const int32_t C = b->model->config.n_head_dim;
    for (int32_t r = 0; r < tile->n; r++) {
        const int32_t n = least(c->rows.pos[tile->row + r] + 1 - i * CPU_ATTN_BLOCK, CPU_ATTN_BLOCK);
        if (n <= 0) continue;
        const place to = place_of(b, tile, h, mine, r, i);
        float *part = to.join ? mine->block : to.part;
        b->kernels->attn_block[b->o.kv_dtype == ERN_KV_I8](part, row_heads(b, tile->row + r, h), h->n, C, scale, kv, n);
        if (to.join) b->kernels->attn_join(to.part, part, h->n, C);
        kv->next = NULL; /* by the first row, for all */
        kv->cold = false;
    }
}

/* The chain of block i of a whole tile ends: the rows that saw any of it are joined with what was before it. */
static void end_chain(const cpu_run *c, const cpu_tile *tile, const heads *h, int32_t i, const own *mine) {
    const cpu_backend *b = c->b;
    for (int32_t r = 0; chain_of(i) > 0 && r < tile->n; r++)
        if (c->rows.pos[tile->row + r] >= chain_of(i) * CPU_ATTN_BLOCK)
            b->kernels->attn_join(mine->rows + r * b->part_floats, mine->chains + r * b->part_floats, h->n,
                                  b->model->config.n_head_dim);
}

/* One tile or piece for one head tile; tile NULL: none. */
typedef struct task {
    const cpu_tile *tile;
    heads h;
} task;

/* The next task that nobody has taken; the last rows see most and go first. */
static task take_task(const cpu_run *c, int32_t layer) {
    cpu_backend *b = c->b;
    const int32_t n_heads = cpu_head_tiles(&b->model->config);
    const int32_t i = b->n_tile * n_heads - 1 - atomic_fetch_add_explicit(&b->next_task, 1, memory_order_relaxed);
    if (i < 0) return (task){.tile = NULL};
    return (task){&b->tile[i / n_heads], heads_at(&b->model->config, layer, i % n_heads)};
}

/* The block at hand of a worker, and the one after it, which is fetched early. */
typedef struct walk {
    cpu_kv_block found[2];
    int now;
} walk;

/* Block i as far as the last row of the task sees it. */
static void find_block(const cpu_run *c, const task *t, int32_t i, cpu_kv_block *out) {
    const cpu_backend *b = c->b;
    const ern_config *m = &b->model->config;
    const int32_t at = i * CPU_ATTN_BLOCK, last = c->rows.pos[t->tile->row + t->tile->n - 1];
    const unsigned char *k = kv_at(b, 0, t->h.layer, t->h.g);
    const cpu_kv_view kv = {.k = k,
                            .v = k + b->plane_bytes,
                            .page = c->s->page + (int64_t)t->tile->seq * b->n_page_max,
                            .page_stride = 2 * b->plane_bytes,
                            .shelf_gap = CPU_KV_SHELF * (b->page_bytes - 2 * b->plane_bytes),
                            .n_cell = b->o.n_page_cell,
                            .int8 = b->o.kv_dtype == ERN_KV_I8};
    cpu_kv_find(out, &kv, m->n_head_dim, at, least(last + 1 - at, CPU_ATTN_BLOCK));
}

/* A row at position p sees the blocks 0..p / CPU_ATTN_BLOCK, the last one cut after p; which rows share the tile
 * changes nothing for it. The walk stands at the task's first block, and then at that of `after`. */
static void attend_tile(const cpu_run *c, walk *w, const task *t, const task *after, const ern_linear *o) {
    const cpu_backend *b = c->b;
    const cpu_tile *tile = t->tile;
    const heads *h = &t->h;
    const int32_t C = b->model->config.n_head_dim;
    const float scale = (float)(0x1.71547652b82fep+0 / sqrt((double)C)); /* log2(e) / sqrt(C) */
    const own mine = own_of(c);
    cpu_attn_job job = {.n_head = h->n, .head_dim = C, .scale = scale};
    if (by_rows(b)) job.room = b->room + (size_t)c->worker * cpu_attn_room();
    for (int32_t r = 0; rotates_late(b) && r < tile->n; r++) {
        if (r + QUERY_ROWS_AHEAD < tile->n) fetch_heads(b, tile->row + r + QUERY_ROWS_AHEAD, h);
        b->kernels->rope(row_heads(b, tile->row + r, h), b->rope + (int64_t)(tile->row + r) * C, h->n, C);
    }
    for (int32_t i = tile->block, end = i + tile->n_block; i < end; i++, w->now ^= 1) {
        cpu_kv_block *now = &w->found[w->now], *next = &w->found[w->now ^ 1];
        if (i + 1 < end)
            find_block(c, t, i + 1, next);
        else if (after->tile)
            find_block(c, after, after->tile->block, next);
        else
            next = NULL;
        now->next = next;
        if (next) next->cold = false; /* before its turn comes */
        job.kv = now;
        if (by_rows(b))
            attend_rows(c, tile, h, i, &job, &mine);
        else
            attend_each(c, tile, h, i, scale, now, &mine);
        if (tile->slot < 0 && (i + 1 == end || chain_of(i + 1) > i)) end_chain(c, tile, h, i, &mine);
    }
    for (int32_t r = 0; tile->slot < 0 && r < tile->n; r++)
        finish_row(b, o, tile->row + r, h, mine.rows + r * b->part_floats);
}

/* acc = acc joined with part, while what is joined next comes: other workers wrote most of it. */
static void join_part(const cpu_backend *b, const heads *h, float *acc, const float *part, const float *next) {
    for (int64_t at = 0; at < b->part_floats; at += CPU_LINE / 2) __builtin_prefetch(next + at, 0, 2);
    b->kernels->attn_join(acc, part, h->n, b->model->config.n_head_dim);
}

/* The pieces' results, chain by chain, over the first of them. */
static void join_row(const cpu_run *c, const cpu_tile *split, int32_t r, const heads *h, const ern_linear *o) {
    const cpu_backend *b = c->b;
    const int32_t slot = split->slot + r * split->stride, n_block = blocks_to(c->rows.pos[split->row + r]);
    float *acc = slot_part(b, slot, h);
    for (int32_t i = 0, next; i < n_block; i = next) {
        float *chain = slot_part(b, slot + i, h);
        next = least(i + CPU_ATTN_CHAIN, n_block);
        const float *after = slot_part(b, slot + (next < n_block ? next : i), h);
        for (int32_t k = i + 1; k < next && i >= split->n_chained; k++)
            join_part(b, h, chain, slot_part(b, slot + k, h), k + 1 < next ? slot_part(b, slot + k + 1, h) : after);
        if (i > 0) join_part(b, h, acc, chain, after);
    }
    finish_row(b, o, split->row + r, h, acc);
}

/* Whether the outputs of every head tile are whole groups of o's inputs. */
static bool puts_act(const cpu_backend *b, const ern_linear *o) {
    const ern_config *m = &b->model->config;
    const int32_t group = m->n_head / m->n_kv_head, C = m->n_head_dim;
    return cpu_act_for(b, o) != CPU_ACT_F32 && group * C % ERN_ACT_GROUP == 0 &&
           least(group, CPU_HEAD_TILE) * C % ERN_ACT_GROUP == 0;
}

/* Tasks are taken by whoever is free. Who has a brief one takes its next one early and so knows what it will want. */
bool cpu_attend(const cpu_run *c, int32_t layer, const ern_linear *o) {
    const cpu_backend *b = c->b;
    const int32_t n_heads = cpu_head_tiles(&b->model->config);
    const ern_linear *next = !b->probe && puts_act(b, o) ? o : NULL;
    const task none = {.tile = NULL};
    walk w = {.now = 0};
    bool found = false;
    for (task now = take_task(c, layer), after; now.tile; now = found ? after : take_task(c, layer)) {
        if (!found) find_block(c, &now, now.tile->block, &w.found[w.now]);
        after = now.tile->brief ? take_task(c, layer) : none;
        attend_tile(c, &w, &now, &after, next);
        found = after.tile != NULL;
    }
    if (b->n_split == 0) return next != NULL;
    cpu_meet(c);
    for (int32_t i = 0, turn = 0; i < b->n_split; i++)
        for (int32_t r = 0; r < b->split[i].n; r++)
            for (int32_t k = 0; k < n_heads; k++, turn++) {
                if (turn % c->n_worker != c->worker) continue;
                const heads h = heads_at(&b->model->config, layer, k);
                join_row(c, &b->split[i], r, &h, next);
            }
    return next != NULL;
}
