/* Which tensors a quantized checkpoint has, and where. See quant_list.h; names: docs/model.md 2 and 9.4. */
#include "model/quant_list.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/quant.h"
#include "model/synth.h"

/* ---- items --------------------------------------------------------------------------------------------------------
 */

uint64_t quant_item_bytes(const quant_item *t) {
    if (t->as != ERN_QUANT_NONE) return quant_tile_bytes(ern_quant_dtype(t->as), t->w.n_out, t->w.n_in);
    return (uint64_t)t->w.n_out * (uint64_t)t->w.n_in * (t->f32 ? sizeof(float) : sizeof(ern_bf16));
}

uint64_t quant_item_scale_bytes(const quant_item *t) {
    return t->as == ERN_QUANT_NONE ? 0 : quant_scale_bytes(ern_quant_dtype(t->as), t->w.n_out, t->w.n_in);
}

const char *quant_item_tail(const quant_item *t) {
    return t->as == ERN_QUANT_NONE ? "" : t->as == ERN_QUANT_FP8 ? "_scale_inv" : "_scale";
}

/* base + tail, from w (NULL: made), as bf16 or quantized. */
static quant_item *add(quant_list *l, const char *base, const char *tail, const ern_linear *w, int32_t n_out,
                       int32_t n_in, ern_quant as) {
    static quant_item nowhere;
    if (l->n == l->cap) {
        const int32_t cap = l->cap ? 2 * l->cap : 256;
        quant_item *more = l->full ? NULL : realloc(l->item, (size_t)cap * sizeof *more);
        l->full |= !more;
        if (!more) return &nowhere;
        l->item = more;
        l->cap = cap;
    }
    quant_item *t = &l->item[l->n++];
    *t = (quant_item){.as = as, .n_dim = 2, .w = {.dtype = ERN_DTYPE_BF16, .n_out = n_out, .n_in = n_in}};
    if (w) t->w = *w;
    ERN_ASSERT(t->w.n_out == n_out && t->w.n_in == n_in && t->w.order != ERN_ORDER_TILED);
    snprintf(t->name, sizeof t->name, "%s%s", base, tail);
    return t;
}

/* n numbers or [n_out, n] of them that lie as PyTorch has them. */
static quant_item *add_plain(quant_list *l, const char *base, const char *tail, const void *data, bool f32,
                             int32_t n_out, int32_t n) {
    quant_item *t = add(l, base, tail, NULL, n_out, n, ERN_QUANT_NONE);
    t->w.data = data;
    t->w.stride = n;
    t->w.dtype = f32 ? ERN_DTYPE_F32 : ERN_DTYPE_BF16;
    t->f32 = f32;
    return t;
}

static void add_vector(quant_list *l, const char *base, const char *tail, const ern_bf16 *data, int32_t n) {
    add_plain(l, base, tail, data, false, 1, n)->n_dim = 1;
}

static void add_ffn(quant_list *l, const char *base, const ern_ffn *f, int32_t width, int32_t d, ern_quant as) {
    add(l, base, ".gate_proj.weight", f ? &f->gate : NULL, width, d, as);
    add(l, base, ".up_proj.weight", f ? &f->up : NULL, width, d, as);
    add(l, base, ".down_proj.weight", f ? &f->down : NULL, d, width, as);
}

static void add_layer(quant_list *l, const ern_config *c, const char *base, const ern_layer *from, bool is_moe,
                      ern_quant dense, ern_quant routed) {
    const int32_t d = c->n_hidden, q = c->n_head * c->n_head_dim, kv = c->n_kv_head * c->n_head_dim;
    char sub[QUANT_NAME_BYTES];
    add_vector(l, base, ".input_layernorm.weight", from ? from->attn_norm : NULL, d);
    add(l, base, ".self_attn.q_proj.weight", from ? &from->q : NULL, q, d, dense);
    add(l, base, ".self_attn.k_proj.weight", from ? &from->k : NULL, kv, d, dense);
    add(l, base, ".self_attn.v_proj.weight", from ? &from->v : NULL, kv, d, dense);
    add(l, base, ".self_attn.o_proj.weight", from ? &from->o : NULL, d, q, dense);
    add_vector(l, base, ".post_attention_layernorm.weight", from ? from->ffn_norm : NULL, d);
    snprintf(sub, sizeof sub, "%s.mlp", base);
    if (!is_moe) {
        add_ffn(l, sub, from ? &from->ffn : NULL, c->n_ffn, d, dense);
        return;
    }
    add_plain(l, sub, ".gate.weight", from ? from->router : NULL, true, c->n_expert, d);
    if (c->has_bias)
        add_plain(l, sub, ".moe_statics.e_score_correction_bias", from ? from->router_bias : NULL, true, 1,
                  c->n_expert);
    for (int32_t e = 0; e < c->n_expert; e++) {
        snprintf(sub, sizeof sub, "%s.mlp.experts.%d", base, e);
        add_ffn(l, sub, from ? &from->expert[e] : NULL, c->n_expert_ffn, d, routed);
    }
    snprintf(sub, sizeof sub, "%s.mlp.shared_experts", base);
    if (c->n_shared_expert)
        add_ffn(l, sub, from ? &from->shared : NULL, c->n_shared_expert * c->n_expert_ffn, d, dense);
}

static void add_all(quant_list *l, const quant_source *from, const ern_quant_plan *plan) {
    const ern_config *c = from->config;
    const ern_model *m = from->model;
    const int32_t d = c->n_hidden;
    char base[QUANT_NAME_BYTES];
    add_plain(l, "model.embed_tokens.weight", "", m ? m->embed : NULL, false, c->n_vocab, d);
    for (int32_t i = 0; i < c->n_layer; i++) {
        snprintf(base, sizeof base, "model.layers.%d", i);
        add_layer(l, c, base, m ? &m->layer[i] : NULL, ern_config_is_moe(c, i), plan->dense, plan->expert);
    }
    add_vector(l, "model.norm.weight", "", m ? m->norm : NULL, d);
    if (!c->tied_head || plan->head) add(l, "lm_head.weight", "", m ? &m->head : NULL, c->n_vocab, d, plan->head);
    if (!from->has_mtp) return;
    add_vector(l, "model.mtp_emb_norm.0.weight", "", m ? m->mtp.emb_norm : NULL, d);
    add_vector(l, "model.mtp_hidden_norm.0.weight", "", m ? m->mtp.hidden_norm : NULL, d);
    add(l, "model.mtp_linear_proj.0.weight", "", m ? &m->mtp.proj : NULL, d, 2 * d, ERN_QUANT_NONE);
    add_layer(l, c, "model.mtp_block.0", m ? &m->mtp.layer : NULL, false, ERN_QUANT_NONE, ERN_QUANT_NONE);
}

/* ---- files --------------------------------------------------------------------------------------------------------
 */

/* A tensor of a file: an item's weights or its scales. */
typedef struct piece {
    quant_item *item;
    bool is_scale;
    uint64_t bytes;
    int rank; /* 0: any size that keeps the next one aligned to 64; then 4 bytes, then 2 */
    int32_t place;
} piece;

static int by_place(const void *a, const void *b) {
    const piece *x = a, *y = b;
    if (x->item->file != y->item->file) return x->item->file < y->item->file ? -1 : 1;
    if (x->rank != y->rank) return x->rank - y->rank;
    return (x->place > y->place) - (x->place < y->place);
}

static piece piece_of(quant_item *t, bool is_scale, int32_t place) {
    piece p = {t, is_scale, is_scale ? quant_item_scale_bytes(t) : quant_item_bytes(t), 0, place};
    const bool four = is_scale ? t->as == ERN_QUANT_FP8 : t->f32;
    if (p.bytes % 64 != 0) p.rank = four ? 1 : 2;
    return p;
}

/* All pieces by file and place; *n of them. NULL: no memory. */
static piece *pieces_make(const quant_list *l, size_t *n) {
    piece *p = malloc(2 * (size_t)l->n * sizeof *p + 1);
    *n = 0;
    for (int32_t i = 0; p && i < l->n; i++) {
        p[(*n)++] = piece_of(&l->item[i], false, 2 * i);
        if (l->item[i].as != ERN_QUANT_NONE) p[(*n)++] = piece_of(&l->item[i], true, 2 * i + 1);
    }
    if (p) qsort(p, *n, sizeof *p, by_place);
    return p;
}

/* Cut into files of at most limit bytes, header counted; an item never spans two, and a larger one has its own. */
static bool list_cut(quant_list *l, uint64_t limit) {
    uint64_t bytes = 0;
    size_t n;
    for (int32_t i = 0; i < l->n; i++) {
        quant_item *t = &l->item[i];
        const uint64_t more = quant_item_bytes(t) + quant_item_scale_bytes(t) + 2 * (QUANT_NAME_BYTES + 100);
        if (i == 0 || bytes + more > limit) {
            bytes = 256;
            l->n_file++;
        }
        bytes += more;
        t->file = l->n_file - 1;
    }
    piece *p = pieces_make(l, &n);
    uint64_t at = 0;
    for (size_t i = 0; p && i < n; i++) {
        if (i > 0 && p[i].item->file != p[i - 1].item->file) at = 0;
        *(p[i].is_scale ? &p[i].item->scale_from : &p[i].item->from) = at;
        at += p[i].bytes;
    }
    free(p);
    return p != NULL;
}

static void entry_print(ern_buf *b, const piece *p) {
    const quant_item *t = p->item;
    const int32_t n_out = t->w.n_out, n_in = t->w.n_in;
    const bool tiles = t->as != ERN_QUANT_NONE && !p->is_scale;
    const bool four = p->is_scale ? t->as == ERN_QUANT_FP8 : t->f32;
    const uint64_t from = p->is_scale ? t->scale_from : t->from;
    ern_buf_print(b, ",\"%s%s\":{\"dtype\":\"%s\",\"shape\":[", t->name, p->is_scale ? quant_item_tail(t) : "",
                  tiles  ? "U8"
                  : four ? "F32"
                         : "BF16");
    if (tiles)
        ern_buf_print(b, "%d,%d,%d", (n_out + ERN_TILE_OUT - 1) / ERN_TILE_OUT, (n_in + ERN_TILE_IN - 1) / ERN_TILE_IN,
                      (int)quant_tile_bytes(ern_quant_dtype(t->as), ERN_TILE_OUT, ERN_TILE_IN));
    else if (p->is_scale && four)
        ern_buf_print(b, "%d,%d", (n_out + ERN_F8_BLOCK - 1) / ERN_F8_BLOCK, (n_in + ERN_F8_BLOCK - 1) / ERN_F8_BLOCK);
    else if (p->is_scale || t->n_dim == 1)
        ern_buf_print(b, "%d", p->is_scale ? n_out : n_in);
    else
        ern_buf_print(b, "%d,%d", n_out, n_in);
    ern_buf_print(b, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)from,
                  (unsigned long long)(from + p->bytes));
}

void quant_list_header(const quant_list *l, int32_t file, ern_buf *b) {
    size_t n;
    piece *p = pieces_make(l, &n);
    b->full |= !p;
    ern_buf_add(b, "\0\0\0\0\0\0\0\0", 8);
    ern_buf_text(b, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (size_t i = 0; p && i < n; i++)
        if (p[i].item->file == file) entry_print(b, &p[i]);
    ern_buf_text(b, "}");
    while (b->len % 64 != 0 && !b->full) ern_buf_text(b, " ");
    for (uint64_t k = 0, len = b->len - 8; k < 8 && !b->full; k++) b->data[k] = (char)(len >> (8 * k) & 0xff);
    free(p);
}

ern_status quant_list_make(quant_list *out, const quant_source *from, const quant_writing *w, ern_err *err) {
    *out = (quant_list){0};
    add_all(out, from, w->plan);
    if (out->full || !list_cut(out, w->shard_bytes ? w->shard_bytes : SYNTH_SHARD_BYTES))
        return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory to plan a checkpoint of %d layers", from->config->n_layer);
    for (int32_t i = 0; i < out->n; i++) {
        const bool tied = from->config->tied_head && strcmp(out->item[i].name, "lm_head.weight") == 0;
        out->item[i].made = tied ? "model.embed_tokens.weight" : out->item[i].name;
    }
    return ERN_OK;
}

void quant_list_free(quant_list *l) {
    free(l->item);
    *l = (quant_list){0};
}
