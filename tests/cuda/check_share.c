/* What checks of several kernels share: the worst of errors, who goes to which expert, steps that decode, weights that
 * meet rows of 8 bits and what their bytes say by cu_kernels.h's drawing. */
#include "check.h"

static void *take(size_t bytes) {
    void *p = calloc(bytes + 1, 1);
    if (!p) abort();
    return p;
}

void check_worst_add(check_worst *w, double error, double bound, const char *what, int32_t row, int32_t out,
                     int32_t n_row) {
    double share = 1e300; /* what is no number, or is held against none */
    if (bound >= 0.0 && error <= 1e300) share = error > 0.0 ? error / bound : 0.0;
    if (share <= w->share) return;
    w->share = share;
    snprintf(w->what, sizeof w->what, "%s, row %d of %d, output %d", what, row, n_row, out);
}

void check_routes_new(cu_routes *r, int32_t n_row, int32_t tile_rows, int32_t *first, int32_t *place_entry) {
    enum { E = CHECK_EXPERTS, K = CHECK_USED };
    const int32_t n = n_row * K;
    const size_t bytes = (size_t)(n + E) * sizeof(int32_t);
    int32_t *chosen = take(bytes), *entry_place = take(bytes), *tile_expert = take(bytes), *tile_place = take(bytes);
    int32_t place = 0, n_tile = 0;
    for (int32_t e = 0; e < n; e++)
        chosen[e] = e % K == 1 ? 3 : e % K == 0 ? (check_random() < 0.9f ? 0 : 2) : (check_random() < 0.5f ? 4 : 2);
    for (int32_t i = 0; i < E; i++) {
        first[i] = place;
        for (int32_t e = 0; e < n; e++)
            if (chosen[e] == i) entry_place[e] = place, place_entry[place++] = e;
    }
    first[E] = place;
    for (int32_t i = E - 1; i >= 0; i--)
        for (int32_t p = first[i]; p < first[i + 1]; p += tile_rows) {
            tile_expert[n_tile] = i;
            tile_place[n_tile++] = p;
        }
    *r = (cu_routes){.n_expert = E, .n_used = K, .tile_rows = tile_rows};
    r->first = check_new(first, (E + 1) * sizeof *first);
    r->place_entry = check_new(place_entry, (size_t)n * sizeof *place_entry);
    r->entry_place = check_new(entry_place, (size_t)n * sizeof *entry_place);
    r->tile_expert = check_new(tile_expert, (size_t)n_tile * sizeof *tile_expert);
    r->tile_place = check_new(tile_place, (size_t)n_tile * sizeof *tile_place);
    r->n_tile = check_new(&n_tile, sizeof n_tile);
    free(chosen);
    free(entry_place);
    free(tile_expert);
    free(tile_place);
}

void check_routes_free(cu_routes *r) {
    int32_t *const lists[] = {r->first, r->place_entry, r->entry_place, r->tile_expert, r->tile_place, r->n_tile};
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) check_free(lists[i]);
}

check_lists check_lists_new(int32_t n_row, int32_t n_expert, int32_t n_used) {
    check_lists l = {.r = {.n_expert = n_expert, .n_used = n_used, .tile_rows = cu_tile_rows(n_row, n_used, n_expert)}};
    const size_t n = (size_t)(n_row * n_used), tiles = (size_t)cu_tiles_max(n_row, n_used, n_expert);
    const size_t e = (size_t)n_expert, words = 4 * n + 2 * tiles + (e + 1) + 1 + (size_t)n_row * e;
    l.bytes = words * 4;
    l.memory = check_new(NULL, l.bytes);
    int32_t *at = (int32_t *)(void *)l.memory;
    l.r.chosen = at, at += n;
    l.r.share = (float *)(void *)at, at += n;
    l.r.place_entry = at, at += n;
    l.r.entry_place = at, at += n;
    l.r.tile_expert = at, at += tiles;
    l.r.tile_place = at, at += tiles;
    l.r.first = at, at += e + 1;
    l.r.n_tile = at, at += 1;
    l.r.logit = (float *)(void *)at;
    l.r.scratch = check_new(NULL, (2 * e + 2) * 4);
    CHECK_CUDA(cudaMemset(l.r.scratch, 0, (2 * e + 2) * 4));
    return l;
}
void check_lists_free(check_lists *l) { check_free(l->memory), check_free(l->r.scratch); }

uint64_t check_a8_random(cu_format f) {
    uint64_t r = check_random64();
    for (int i = 0; i < 64 && f == CU_F8A8; i += 8)
        if ((r >> i & 0x7f) == 0x7f) r ^= 1ull << (i + 2);
    return r;
}

check_decode check_decode_new(const cu_cache *c, int32_t n_row_max, int32_t n_page, int32_t len_max) {
    const size_t R = (size_t)n_row_max;
    check_decode d = {
        .n_row_max = n_row_max, .n_page = n_page, .n_page_max = (len_max + c->n_page_cell - 1) / c->n_page_cell};
    d.pos = check_new(NULL, R * 4), d.cell = check_new(NULL, R * 4), d.row0 = check_new(NULL, (R + 1) * 4);
    d.kv_len = check_new(NULL, R * 4), d.page = check_new(NULL, R * (size_t)d.n_page_max * 4);
    d.work = check_new(NULL, (size_t)cu_attn_work_count(c, n_row_max, n_row_max) * 4);
    return d;
}

void check_decode_free(check_decode *d) {
    check_free(d->pos), check_free(d->cell), check_free(d->row0);
    check_free(d->kv_len), check_free(d->page), check_free(d->work);
}

cu_seqs check_decode_plan(const check_decode *d, const cu_cache *c, const float *inv_freq, int32_t n,
                          const int32_t *len, const int32_t *order) {
    const int32_t P = c->n_page_cell, N = d->n_page_max;
    const size_t R = (size_t)d->n_row_max, page_bytes = R * (size_t)N * 4;
    int32_t *page = take(page_bytes), *pos = take(R * 4), *cell = take(R * 4), *row0 = take((R + 1) * 4), next = 1;
    memset(page, 0x7f, page_bytes);
    for (int32_t r = 0; r < n; r++) {
        for (int32_t k = 0; k * P<len[r]; k++, next += len[r]> 1) {
            if (next >= d->n_page && len[r] > 1) exit(2);
            page[r * N + k] = len[r] == 1 ? 0 : order ? order[next] : next;
        }
        pos[r] = len[r] - 1;
        cell[r] = page[r * N + pos[r] / P] * P + pos[r] % P;
        row0[r] = r, row0[r + 1] = r + 1;
    }
    CHECK_CUDA(cudaMemcpy(d->pos, pos, (size_t)n * 4, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMemcpy(d->cell, cell, (size_t)n * 4, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMemcpy(d->kv_len, len, (size_t)n * 4, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMemcpy(d->row0, row0, (size_t)(n + 1) * 4, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMemcpy(d->page, page, page_bytes, cudaMemcpyHostToDevice));
    free(page), free(pos), free(cell), free(row0);
    const cu_seqs q = {.n_row = n,
                       .n_seq = n,
                       .n_page_max = N,
                       .pos = d->pos,
                       .cell = d->cell,
                       .row0 = d->row0,
                       .kv_len = d->kv_len,
                       .page = d->page,
                       .work = d->work};
    CHECK_CUDA(cu_attn_plan(0, c, &q, inv_freq));
    return q;
}

int64_t check_a8_segment(const cu_linear *w, int32_t band, int32_t seg) {
    return ((int64_t)(band / CU_A8_BANDS) * w->n_seg + seg) * CU_A8_BANDS + band % CU_A8_BANDS;
}

int64_t check_a8_place(const cu_linear *w, int32_t band, int32_t r, int32_t i) {
    const int64_t segment = check_a8_segment(w, band, i / CU_SEGMENT);
    const int32_t in = i % CU_SEGMENT, k = i % 32, lane = 4 * (r % 8) + k % 16 / 4;
    if (w->format != CU_I4A8) return segment * 2048 + r * 128 + ((in / 16) ^ (r % 8)) * 16 + in % 16;
    return (segment * 2 + in / 64) * 512 + lane * 16 + k / 16 * 8 + r / 8 * 4 + k % 4;
}

double check_a8_code(const cu_linear *w, const unsigned char *pack, int32_t band, int32_t r, int32_t i) {
    const uint8_t byte = pack[check_a8_place(w, band, r, i)];
    if (w->format == CU_F8A8) return (double)ern_e4m3_to_f32(byte);
    if (w->format == CU_I8A8) return (double)(int8_t)byte;
    return (double)(int8_t)(i % 64 < 32 ? byte & 0xf0 : byte << 4);
}

check_weights check_weights_new(cu_linear w) {
    check_weights o = {.w = w};
    const int64_t bytes = cu_pack_bytes(&w), n_scale = cu_scale_count(&w);
    o.pack = take((size_t)bytes);
    o.scale = take((size_t)n_scale * sizeof(float));
    for (int64_t i = 0; i < bytes; i += 8) {
        const uint64_t r = check_a8_random(w.format);
        memcpy(o.pack + i, &r, 8);
    }
    for (int64_t i = 0; i < n_scale; i++) o.scale[i] = 0x1p-10f * (1.0f + 0.5f * check_random());
    o.w.pack = o.d_pack = check_new(o.pack, (size_t)bytes);
    o.w.scale = o.d_scale = check_new(o.scale, (size_t)n_scale * sizeof(float));
    return o;
}

void check_weights_free(check_weights *o) {
    check_free(o->d_pack);
    check_free(o->d_scale);
    free(o->pack);
    free(o->scale);
}
