/* The table of weights. See weights.h; names, shapes and orders: docs/model.md 2. */
#include "model/weights.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/quant.h"

enum { NAME_BYTES = ST_NAME_MAX + 1 };

/* Filling from one checkpoint folder. */
typedef struct filler {
    ern_model *m;
    const ern_config *c;
    checkpoint *from;
    ern_arena *arena;
    bool paddle;
    bool tiles;   /* the files hold tiles, where `as` says so */
    ern_quant as; /* how the linears that are asked for now are computed with */
    ern_err *err;
} filler;

static const char *prefix(const filler *f) { return f->paddle ? "ernie" : "model"; }

/* ---- one tensor ----------------------------------------------------------------------------------------------------
 */

static void shape_show(char *out, size_t size, int n_dim, const int64_t *dim) {
    size_t at = (size_t)snprintf(out, size, "[");
    for (int i = 0; i < n_dim && at < size; i++)
        at += (size_t)snprintf(out + at, size - at, "%s%lld", i ? ", " : "", (long long)dim[i]);
    if (at < size) snprintf(out + at, size - at, "]");
}

/* bf16 is written as U16 or I16 by tools whose numpy lacks the type. */
static bool is_bf16(st_dtype t) { return t == ST_BF16 || t == ST_U16 || t == ST_I16; }

static ern_status find(const filler *f, ckpt_tensor **out, const char *name, const char *expected) {
    *out = ckpt_find(f->from, name);
    if (*out) return ERN_OK;
    return ERN_FAIL(f->err, ERN_ERR_FILE, "%s: tensor %s: expected %s, found none", f->from->label, name, expected);
}

static ern_status mismatch(const filler *f, const ckpt_tensor *t, const char *expected) {
    char shape[120];
    shape_show(shape, sizeof shape, t->info->n_dim, t->info->dim);
    return ERN_FAIL(f->err, ERN_ERR_FILE, "%s: tensor %s: expected %s, found %s %s", t->file->path, t->info->name,
                    expected, st_dtype_name(t->info->dtype), shape);
}

static bool shape_is(const ckpt_tensor *t, int64_t rows, int64_t cols) {
    return t->info->n_dim == 2 && t->info->dim[0] == rows && t->info->dim[1] == cols;
}

static void use(const filler *f, ckpt_tensor *t) {
    if (!t->used) f->m->weight_bytes += t->info->bytes;
    t->used = true;
}

/* Point t->data at the tensor: into the mapping, or, where the file puts it at an odd address, to a copy. */
static ern_status place(const filler *f, ckpt_tensor *t) {
    use(f, t);
    if (t->data) return ERN_OK;
    if (t->info->from % (t->info->dtype == ST_F32 ? sizeof(float) : sizeof(ern_bf16)) == 0) {
        t->data = t->file->map.data + t->info->from;
        return ERN_OK;
    }
    void *copy = ern_arena_take(f->arena, t->info->bytes, 64);
    if (!copy)
        return ERN_FAIL(f->err, ERN_ERR_MEMORY, "%s: tensor %s: no memory to copy %llu bytes from an odd file offset",
                        t->file->path, t->info->name, (unsigned long long)t->info->bytes);
    t->data = copy;
    return st_file_copy(t->file, copy, t->info->from, t->info->bytes, f->err);
}

/* A bf16 matrix of exactly this shape. */
static ern_status matrix(const filler *f, const ern_bf16 **out, const char *name, int64_t rows, int64_t cols) {
    char expected[64];
    ckpt_tensor *t;
    snprintf(expected, sizeof expected, "BF16 [%lld, %lld]", (long long)rows, (long long)cols);
    ERN_TRY(find(f, &t, name, expected));
    if (!is_bf16(t->info->dtype) || !shape_is(t, rows, cols)) return mismatch(f, t, expected);
    ERN_TRY(place(f, t));
    *out = t->data;
    return ERN_OK;
}

static ern_status norm(const filler *f, const ern_bf16 **out, const char *name) {
    char expected[64];
    ckpt_tensor *t;
    snprintf(expected, sizeof expected, "BF16 [%d]", f->c->n_hidden);
    ERN_TRY(find(f, &t, name, expected));
    if (!is_bf16(t->info->dtype) || t->info->n_dim != 1 || t->info->dim[0] != f->c->n_hidden)
        return mismatch(f, t, expected);
    ERN_TRY(place(f, t));
    *out = t->data;
    return ERN_OK;
}

/* A tensor of tiles: told by its bytes, and never copied, so it must lie where kernels can read it. */
static ern_status tiles_find(const filler *f, const void **out, const char *name, ern_dtype as, int32_t n_out,
                             int32_t n_in) {
    char expected[80];
    ckpt_tensor *t;
    const int64_t bands = (n_out + ERN_TILE_OUT - 1) / ERN_TILE_OUT, across = (n_in + ERN_TILE_IN - 1) / ERN_TILE_IN;
    const int64_t each = (int64_t)quant_tile_bytes(as, ERN_TILE_OUT, ERN_TILE_IN);
    snprintf(expected, sizeof expected, "U8 [%lld, %lld, %lld] of %s tiles", (long long)bands, (long long)across,
             (long long)each, ern_dtype_name(as));
    ERN_TRY(find(f, &t, name, expected));
    const int64_t *dim = t->info->dim;
    if (t->info->dtype != ST_U8 || t->info->n_dim != 3 || dim[0] != bands || dim[1] != across || dim[2] != each)
        return mismatch(f, t, expected);
    if (t->info->from % 64 != 0)
        return ERN_FAIL(f->err, ERN_ERR_FILE,
                        "%s: tensor %s: expected its data at a multiple of 64 bytes, found them at %llu; write the "
                        "checkpoint again with ernest quantize",
                        t->file->path, t->info->name, (unsigned long long)t->info->from);
    ERN_TRY(place(f, t));
    *out = t->data;
    return ERN_OK;
}

/* A linear stored as tiles, X.weight, and scales: X.weight_scale, or X.weight_scale_inv for fp8. */
static ern_status tiled(const filler *f, ern_linear *out, const char *name, int32_t n_out, int32_t n_in) {
    char scale[NAME_BYTES], expected[64];
    ckpt_tensor *t;
    const ern_dtype as = ern_quant_dtype(f->as);
    *out = (ern_linear){.dtype = as, .order = ERN_ORDER_TILED, .n_out = n_out, .n_in = n_in};
    ERN_TRY(tiles_find(f, &out->data, name, as, n_out, n_in));
    const bool f8 = as == ERN_DTYPE_F8E4M3;
    const int32_t rows = f8 ? (n_out + ERN_F8_BLOCK - 1) / ERN_F8_BLOCK : n_out;
    const int32_t cols = (n_in + ERN_F8_BLOCK - 1) / ERN_F8_BLOCK;
    snprintf(scale, sizeof scale, "%s%s", name, f8 ? "_scale_inv" : "_scale");
    if (f8)
        snprintf(expected, sizeof expected, "F32 [%d, %d]", rows, cols);
    else
        snprintf(expected, sizeof expected, "BF16 [%d]", rows);
    ERN_TRY(find(f, &t, scale, expected));
    if (f8 ? t->info->dtype != ST_F32 || !shape_is(t, rows, cols)
           : !is_bf16(t->info->dtype) || t->info->n_dim != 1 || t->info->dim[0] != rows)
        return mismatch(f, t, expected);
    ERN_TRY(place(f, t));
    out->scale = t->data;
    return ERN_OK;
}

/* Remember a bf16 linear that is to be quantized once everything has been found. */
static ern_status job_add(const filler *f, ern_linear *to, const char *name, bool stays) {
    struct ern_model_files *files = f->m->files;
    if (f->as == ERN_QUANT_NONE || f->tiles) return ERN_OK;
    if (files->n_job == files->cap_job) {
        int32_t cap = files->cap_job ? 2 * files->cap_job : 256;
        quant_job *more = realloc(files->job, (size_t)cap * sizeof *more);
        if (!more) return ERN_FAIL(f->err, ERN_ERR_MEMORY, "no memory to list what is to be quantized");
        files->job = more;
        files->cap_job = cap;
    }
    files->job[files->n_job++] = (quant_job){to, ckpt_find(f->from, name), f->as, stays};
    return ERN_OK;
}

/* A linear [n_out, n_in] that is columns first .. first + n_out of `all` outputs stored in one tensor. Only the Paddle
 * layout has all > n_out. */
static ern_status window(const filler *f, ern_linear *out, const char *name, int32_t n_out, int32_t n_in, int32_t first,
                         int32_t all) {
    const ern_bf16 *data;
    if (f->as != ERN_QUANT_NONE && f->tiles) return tiled(f, out, name, n_out, n_in);
    ERN_TRY(f->paddle ? matrix(f, &data, name, n_in, all) : matrix(f, &data, name, all, n_in));
    *out = (ern_linear){.data = f->paddle ? data + first : data + (int64_t)first * n_in,
                        .dtype = ERN_DTYPE_BF16,
                        .order = f->paddle ? ERN_ORDER_IN_OUT : ERN_ORDER_OUT_IN,
                        .n_out = n_out,
                        .n_in = n_in,
                        .stride = f->paddle ? all : n_in};
    return job_add(f, out, name, false);
}

/* A linear whose file orientation is told by its shape, and by the layout only where the shape is square. */
static ern_status turned(const filler *f, ern_linear *out, const char *name, int32_t n_out, int32_t n_in) {
    const ckpt_tensor *t = ckpt_find(f->from, name);
    filler as = *f;
    if (t && n_out != n_in) as.paddle = shape_is(t, n_in, n_out);
    return window(&as, out, name, n_out, n_in, 0, n_out);
}

/* ---- the parts of a layer ------------------------------------------------------------------------------------------
 */

#define NAME(buf, base, tail) snprintf((buf), NAME_BYTES, "%s.%s", (base), (tail))

static ern_status fill_ffn(const filler *f, ern_ffn *out, const char *base, int32_t width) {
    char name[NAME_BYTES];
    int32_t d = f->c->n_hidden;
    if (f->paddle) { /* columns: first half gate, second half up, in spite of the name */
        NAME(name, base, "up_gate_proj.weight");
        ERN_TRY(window(f, &out->gate, name, width, d, 0, 2 * width));
        ERN_TRY(window(f, &out->up, name, width, d, width, 2 * width));
    } else {
        NAME(name, base, "gate_proj.weight");
        ERN_TRY(window(f, &out->gate, name, width, d, 0, width));
        NAME(name, base, "up_proj.weight");
        ERN_TRY(window(f, &out->up, name, width, d, 0, width));
    }
    NAME(name, base, "down_proj.weight");
    return window(f, &out->down, name, d, width, 0, d);
}

static ern_status fill_attention(const filler *f, ern_layer *l, const char *base) {
    char name[NAME_BYTES];
    int32_t d = f->c->n_hidden, q = f->c->n_head * f->c->n_head_dim, kv = f->c->n_kv_head * f->c->n_head_dim;
    ern_linear *part[] = {&l->q, &l->k, &l->v};
    const int32_t width[] = {q, kv, kv}, first[] = {0, q, q + kv};
    static const char *const tail[] = {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"};
    for (int i = 0; i < 3; i++) {
        NAME(name, base, f->paddle ? "self_attn.qkv_proj.weight" : tail[i]);
        ERN_TRY(f->paddle ? window(f, part[i], name, width[i], d, first[i], q + 2 * kv)
                          : window(f, part[i], name, width[i], d, 0, width[i]));
    }
    NAME(name, base, "self_attn.o_proj.weight");
    ERN_TRY(window(f, &l->o, name, d, q, 0, d));
    NAME(name, base, "input_layernorm.weight");
    ERN_TRY(norm(f, &l->attn_norm, name));
    NAME(name, base, "post_attention_layernorm.weight");
    return norm(f, &l->ffn_norm, name);
}

/* rows * cols numbers, BF16 or F32, as an f32 copy [rows, cols]; turned when the file holds [cols, rows]. */
static ern_status fill_f32(const filler *f, const float **out, ckpt_tensor *t, int32_t rows, int32_t cols, bool turn) {
    size_t n = (size_t)rows * (size_t)cols, each = st_dtype_bytes(t->info->dtype);
    unsigned char *raw = malloc(t->info->bytes);
    float *to = ERN_ARENA_NEW(f->arena, float, n);
    ern_status s = raw && to ? st_file_copy(t->file, raw, t->info->from, t->info->bytes, f->err)
                             : ERN_FAIL(f->err, ERN_ERR_MEMORY, "%s: tensor %s: no memory to convert it", t->file->path,
                                        t->info->name);
    for (size_t i = 0; s == ERN_OK && i < n; i++) {
        size_t at = turn ? i % (size_t)cols * (size_t)rows + i / (size_t)cols : i;
        ern_bf16 half;
        if (each == sizeof half) {
            memcpy(&half, raw + at * each, each);
            to[i] = ern_bf16_to_f32(half);
        } else {
            memcpy(&to[i], raw + at * each, each);
        }
    }
    free(raw);
    use(f, t);
    *out = to;
    return s;
}

/* Router [E, D] and correction bias [E]. The config may leave the bias unsaid; then the tensors say it. */
static ern_status fill_router(const filler *f, ern_layer *l, const char *base) {
    char name[NAME_BYTES], expected[96];
    ckpt_tensor *t;
    int32_t e = f->c->n_expert, d = f->c->n_hidden;
    NAME(name, base, "mlp.gate.weight");
    snprintf(expected, sizeof expected, "F32 or BF16 [%d, %d]", f->paddle ? d : e, f->paddle ? e : d);
    ERN_TRY(find(f, &t, name, expected));
    bool number = is_bf16(t->info->dtype) || t->info->dtype == ST_F32;
    bool turn = e == d ? f->paddle : shape_is(t, d, e);
    if (!number || !(shape_is(t, e, d) || shape_is(t, d, e))) return mismatch(f, t, expected);
    ERN_TRY(fill_f32(f, &l->router, t, e, d, turn));
    if (!f->c->has_bias) return ERN_OK;
    NAME(name, base, "mlp.moe_statics.e_score_correction_bias");
    snprintf(expected, sizeof expected, "F32 or BF16 [1, %d]", e);
    ERN_TRY(find(f, &t, name, expected));
    bool flat = t->info->n_dim == 1 && t->info->dim[0] == e;
    number = is_bf16(t->info->dtype) || t->info->dtype == ST_F32;
    if (!number || !(flat || shape_is(t, 1, e))) return mismatch(f, t, expected);
    return fill_f32(f, &l->router_bias, t, 1, e, false);
}

/* f->as is what the dense linears are, `experts` what the routed ones are. */
static ern_status fill_layer(const filler *f, ern_layer *l, const char *base, bool is_moe, ern_quant experts) {
    char name[NAME_BYTES];
    filler routed = *f;
    routed.as = experts;
    l->is_moe = is_moe;
    ERN_TRY(fill_attention(f, l, base));
    if (!is_moe) {
        NAME(name, base, "mlp");
        return fill_ffn(f, &l->ffn, name, f->c->n_ffn);
    }
    ERN_TRY(fill_router(f, l, base));
    ern_ffn *expert = ERN_ARENA_NEW(f->arena, ern_ffn, (size_t)f->c->n_expert);
    if (!expert) return ERN_FAIL(f->err, ERN_ERR_MEMORY, "no memory for the table of %d experts", f->c->n_expert);
    l->expert = expert;
    for (int32_t e = 0; e < f->c->n_expert; e++) {
        snprintf(name, sizeof name, "%s.mlp.experts.%d", base, e);
        ERN_TRY(fill_ffn(&routed, &expert[e], name, f->c->n_expert_ffn));
    }
    if (f->c->n_shared_expert == 0) return ERN_OK;
    NAME(name, base, "mlp.shared_experts");
    return fill_ffn(f, &l->shared, name, f->c->n_shared_expert * f->c->n_expert_ffn);
}

/* ---- the whole -----------------------------------------------------------------------------------------------------
 */

static bool starts(const char *name, const char *with) { return strncmp(name, with, strlen(with)) == 0; }

static bool ends(const char *name, const char *with) {
    size_t n = strlen(name), k = strlen(with);
    return n >= k && strcmp(name + n - k, with) == 0;
}

static ern_status fill_head(const filler *all) {
    filler to_head = *all, *f = &to_head;
    ern_model *m = f->m;
    char embed[NAME_BYTES];
    NAME(embed, prefix(f), "embed_tokens.weight");
    f->as = m->quant.head;
    int32_t v = f->c->n_vocab, d = f->c->n_hidden;
    ckpt_tensor *t = ckpt_find(f->from, "lm_head.weight");
    if (!f->c->tied_head) {
        if (!t)
            return ERN_FAIL(f->err, ERN_ERR_FILE,
                            "%s: tensor lm_head.weight: expected BF16 [%d, %d] because config.json does not say "
                            "tie_word_embeddings true, found none",
                            f->from->label, f->paddle ? d : v, f->paddle ? v : d);
        return turned(f, &m->head, "lm_head.weight", v, d);
    }
    if (f->as != ERN_QUANT_NONE && f->tiles) return tiled(f, &m->head, "lm_head.weight", v, d);
    m->head = (ern_linear){
        .data = m->embed, .dtype = ERN_DTYPE_BF16, .order = ERN_ORDER_OUT_IN, .n_out = v, .n_in = d, .stride = d};
    ERN_TRY(job_add(f, &m->head, embed, true));
    if (!t) return ERN_OK;
    if (!shape_is(t, v, d) && !shape_is(t, d, v)) {
        char expected[64];
        snprintf(expected, sizeof expected, "BF16 [%d, %d] (tied, not used)", v, d);
        return mismatch(f, t, expected);
    }
    t->used = true; /* known, and equal to the embedding: the embedding is read instead */
    return ERN_OK;
}

static ern_status fill_main(const filler *f) {
    ern_model *m = f->m;
    char base[NAME_BYTES], name[NAME_BYTES];
    NAME(name, prefix(f), "embed_tokens.weight");
    ERN_TRY(matrix(f, &m->embed, name, f->c->n_vocab, f->c->n_hidden));
    NAME(name, prefix(f), "norm.weight");
    ERN_TRY(norm(f, &m->norm, name));
    ERN_TRY(fill_head(f));
    ern_layer *layer = ERN_ARENA_NEW(f->arena, ern_layer, (size_t)f->c->n_layer);
    if (!layer) return ERN_FAIL(f->err, ERN_ERR_MEMORY, "no memory for the table of %d layers", f->c->n_layer);
    m->layer = layer;
    filler dense = *f;
    dense.as = m->quant.dense;
    for (int32_t i = 0; i < f->c->n_layer; i++) {
        snprintf(base, sizeof base, "%s.layers.%d", prefix(f), i);
        ERN_TRY(fill_layer(&dense, &layer[i], base, ern_config_is_moe(f->c, i), m->quant.expert));
    }
    return ERN_OK;
}

static ern_status fill_mtp(const filler *f) {
    ern_mtp *mtp = &f->m->mtp;
    char name[NAME_BYTES];
    NAME(name, prefix(f), "mtp_emb_norm.0.weight");
    ERN_TRY(norm(f, &mtp->emb_norm, name));
    NAME(name, prefix(f), "mtp_hidden_norm.0.weight");
    ERN_TRY(norm(f, &mtp->hidden_norm, name));
    NAME(name, prefix(f), "mtp_linear_proj.0.weight");
    ERN_TRY(turned(f, &mtp->proj, name, f->c->n_hidden, 2 * f->c->n_hidden));
    NAME(name, prefix(f), "mtp_block.0");
    ERN_TRY(fill_layer(f, &mtp->layer, name, false, ERN_QUANT_NONE));
    f->m->has_mtp = true;
    return ERN_OK;
}

/* Which layout a folder holds, by its tensors' names. */
static ern_status layout_find(const checkpoint *c, bool *paddle, ern_err *err) {
    const ckpt_tensor *of[2] = {NULL, NULL};
    for (int32_t i = 0; i < c->n_tensor; i++) {
        if (starts(c->tensor[i].info->name, "model.")) of[0] = &c->tensor[i];
        if (starts(c->tensor[i].info->name, "ernie.")) of[1] = &c->tensor[i];
    }
    if (of[0] && of[1])
        return ERN_FAIL(err, ERN_ERR_FILE, "%s: expected names of one layout, found both %s (PyTorch) and %s (Paddle)",
                        c->label, of[0]->info->name, of[1]->info->name);
    if (!of[0] && !of[1])
        return ERN_FAIL(err, ERN_ERR_FILE,
                        "%s: expected tensors named model.* (PyTorch) or ernie.* (Paddle), found none in %d tensors",
                        c->label, c->n_tensor);
    *paddle = of[1] != NULL;
    return ERN_OK;
}

/* Names that belong to what these models share files with: known, and not needed. */
static void mark_known(checkpoint *c, bool all_mtp, bool shared_with_main, bool kv_scales) {
    for (int32_t i = 0; i < c->n_tensor; i++) {
        const char *n = c->tensor[i].info->name;
        bool vision = ends(n, ".weight_1") || strstr(n, "resampler_model") != NULL;
        bool mtp = all_mtp && (starts(n, "model.mtp_") || starts(n, "ernie.mtp_"));
        bool twin = shared_with_main && (ends(n, ".embed_tokens.weight") || strcmp(n, "model.norm.weight") == 0 ||
                                         strcmp(n, "ernie.norm.weight") == 0 || strcmp(n, "lm_head.weight") == 0);
        bool scale =
            kv_scales && (ends(n, ".cachek_matmul.activation_scale") || /* config.json asks for a KV cache of codes */
                          ends(n, ".cachev_matmul.activation_scale"));
        if (vision || mtp || twin || scale) c->tensor[i].used = true;
    }
}

static ern_status refuse_extra(const filler *f) {
    for (int32_t i = 0; i < f->from->n_tensor; i++) {
        const ckpt_tensor *t = &f->from->tensor[i];
        char expected[120];
        snprintf(expected, sizeof expected, "no such tensor by config.json (%d layers, %d experts)", f->c->n_layer,
                 f->c->n_expert);
        if (!t->used) return mismatch(f, t, expected);
    }
    return ERN_OK;
}

static bool has_prefix(const checkpoint *c, const char *with) {
    for (int32_t i = 0; i < c->n_tensor; i++)
        if (starts(c->tensor[i].info->name, with)) return true;
    return false;
}

/* moe_use_aux_free says whether the correction bias exists; absent, the tensors say. */
static void bias_find(const filler *f, const config_hints *hints) {
    bool there = false;
    for (int32_t i = 0; i < f->from->n_tensor && !there; i++)
        there = ends(f->from->tensor[i].info->name, "e_score_correction_bias");
    f->m->config.has_bias = f->c->n_expert > 0 && (hints->aux_free < 0 ? there : hints->aux_free == 1);
}

ern_status weights_fill(ern_model *m, const config_hints *hints, ern_err *err) {
    filler f = {.m = m,
                .c = &m->config,
                .from = &m->files->main,
                .arena = &m->files->arena,
                .tiles = hints->quantized,
                .err = err};
    ERN_TRY(layout_find(f.from, &f.paddle, err));
    m->is_paddle = f.paddle;
    if (f.paddle && hints->torch_dtype)
        return ERN_FAIL(
            err, ERN_ERR_FILE,
            "%s: config.json says torch_dtype, a key of the PyTorch layout, but the tensors have Paddle names "
            "(ernie.*); rename the key to dtype if they are Paddle's",
            f.from->label);
    if (f.paddle && hints->quantized)
        return ERN_FAIL(err, ERN_ERR_FILE,
                        "%s: config.json says that the weights are quantized by ernest, which uses the PyTorch names, "
                        "but the tensors have Paddle names (ernie.*)",
                        f.from->label);
    bool own_mtp = m->files->mtp.n_file > 0;
    bias_find(&f, hints);
    mark_known(f.from, own_mtp, false, hints->kv_codes);
    ERN_TRY(fill_main(&f));
    if (!own_mtp && has_prefix(f.from, f.paddle ? "ernie.mtp_" : "model.mtp_")) ERN_TRY(fill_mtp(&f));
    ERN_TRY(refuse_extra(&f));
    if (!own_mtp) return ERN_OK;
    f.from = &m->files->mtp;
    ERN_TRY(layout_find(f.from, &f.paddle, err));
    mark_known(f.from, false, true, hints->kv_codes);
    ERN_TRY(fill_mtp(&f));
    return refuse_extra(&f);
}
