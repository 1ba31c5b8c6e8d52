/* What a made checkpoint consists of: its shape, its tensors, its formula. See synth.h and docs/model.md 8. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/counter.h"
#include "model/synth.h"

/* ---- the formula ---------------------------------------------------------------------------------------------------
 */

/* u = (2h + 1 - 2^23) / 2^23 with 23 random bits h: an odd number over a power of two, exact in f32, never 0. */
static float made_value(uint64_t key, uint64_t index, float scale, float offset) {
    int32_t h = (int32_t)(ern_counter64(key, index) >> 41);
    float u = (float)(2 * h + 1 - (1 << 23)) * 0x1p-23f;
    float product = scale * u;
    return offset + product;
}

float ern_synth_f32(uint64_t seed, const char *name, uint64_t index, float scale, float offset) {
    return made_value(ern_counter_key(seed, name), index, scale, offset);
}

ern_bf16 ern_synth_bf16(uint64_t seed, const char *name, uint64_t index, float scale, float offset) {
    return ern_bf16_from_f32(ern_synth_f32(seed, name, index, scale, offset));
}

/* u has variance 1/3. A linear keeps the variance of its input; the tied head gives logits a deviation of 2.5. */
void ern_synth_scale(const char *name, int32_t n_in, float *scale, float *offset) {
    *offset = 0.0f;
    if (strstr(name, "norm")) {
        *offset = 1.0f;
        *scale = 0.25f;
    } else if (strstr(name, "e_score_correction_bias")) {
        *scale = 0.02f;
    } else if (strstr(name, "embed_tokens") || strstr(name, "lm_head")) {
        *scale = (float)sqrt(18.75 / n_in);
    } else {
        *scale = (float)sqrt(3.0 / n_in);
    }
}

/* A run of n elements of one part, `step` apart in the PyTorch order. */
static void fill_run(const synth_part *p, bool f32, uint64_t index, uint64_t step, uint64_t n, unsigned char *out) {
    for (uint64_t k = 0; k < n; k++, index += step) {
        float v = made_value(p->key, index, p->scale, p->offset);
        if (f32) {
            memcpy(out + k * sizeof v, &v, sizeof v);
        } else {
            ern_bf16 half = ern_bf16_from_f32(v);
            memcpy(out + k * sizeof half, &half, sizeof half);
        }
    }
}

void synth_tensor_fill(const synth_tensor *t, uint64_t first, uint64_t n, void *out) {
    unsigned char *to = out;
    const uint64_t each = t->f32 ? sizeof(float) : sizeof(ern_bf16), n_in = (uint64_t)t->n_in, all = (uint64_t)t->n_out;
    if (!t->turned) {
        fill_run(&t->part[0], t->f32, first, 1, n, to);
        return;
    }
    while (n) { /* row = input, columns = the parts' outputs side by side */
        uint64_t row = first / all, col = first % all, run;
        const synth_part *p = t->part;
        for (; col >= (uint64_t)p->n_out; p++) col -= (uint64_t)p->n_out;
        run = (uint64_t)p->n_out - col;
        if (run > n) run = n;
        fill_run(p, t->f32, col * n_in + row, n_in, run, to);
        first += run;
        n -= run;
        to += run * each;
    }
}

void synth_rows_fill(uint64_t seed, const char *name, int32_t n_in, bool f32, uint64_t first, uint64_t n, void *out) {
    synth_part p = {.key = ern_counter_key(seed, name)};
    ern_synth_scale(name, n_in, &p.scale, &p.offset);
    fill_run(&p, f32, first, 1, n, out);
}

uint64_t synth_tensor_bytes(const synth_tensor *t) {
    return (uint64_t)t->n_out * (uint64_t)t->n_in * (t->f32 ? sizeof(float) : sizeof(ern_bf16));
}

/* ---- shapes --------------------------------------------------------------------------------------------------------
 */

typedef struct shape {
    const char *name;
    int32_t n_vocab, n_hidden, n_layer, n_head, n_kv_head, n_head_dim, n_ffn;
    int32_t n_expert, n_expert_used, n_expert_ffn, n_shared_expert, n_mtp;
    int32_t dense_tail;  /* dense layers after the last MoE layer: only where the config says moe_layer_end_index */
    bool said_in_paddle; /* head_dim and moe_layer_end_index stand in the Paddle config too */
} shape;

/* The tiny ones: GQA groups of 8 and 5, Q != D, widths with ugly tails. tiny-wide, which only tests ask for: a head
 * group of 128 outputs, as the published models have whole ones, and two of them. The others: the published geometry.
 */
static const shape shape_table[] = {
    {"tiny-dense", 1024, 64, 3, 8, 1, 16, 168, 0, 0, 0, 0, 0, 0, true},
    {"tiny-moe", 1024, 80, 4, 10, 2, 16, 200, 8, 3, 44, 2, 1, 1, true},
    {"tiny-wide", 1024, 64, 2, 16, 2, 16, 168, 0, 0, 0, 0, 0, 0, true},
    {"0.3b", 103424, 1024, 18, 16, 2, 128, 3072, 0, 0, 0, 0, 0, 0, true},
    {"21b-a3b", 103424, 2560, 28, 20, 4, 128, 12288, 64, 6, 1536, 2, 1, 0, false},
};

static ern_status config_make(synth_plan *p, const ern_synth_options *o, ern_err *err) {
    const shape *s = NULL;
    for (size_t i = 0; i < sizeof shape_table / sizeof *shape_table; i++)
        if (o->shape && strcmp(o->shape, shape_table[i].name) == 0) s = &shape_table[i];
    if (!s)
        return ERN_FAIL(err, ERN_ERR_USAGE, "unknown shape %.60s; the shapes are tiny-dense, tiny-moe, 0.3b, 21b-a3b",
                        o->shape ? o->shape : "(none)");
    if (o->n_layer < 0 || o->n_layer > ERN_LAYERS_MAX)
        return ERN_FAIL(err, ERN_ERR_USAGE, "the number of layers must be 1 to %d, found %d", ERN_LAYERS_MAX,
                        o->n_layer);
    ern_config *c = &p->config;
    *c = (ern_config){.n_vocab = s->n_vocab,
                      .n_hidden = s->n_hidden,
                      .n_layer = o->n_layer ? o->n_layer : s->n_layer,
                      .n_head = s->n_head,
                      .n_kv_head = s->n_kv_head,
                      .n_head_dim = s->n_head_dim,
                      .n_ffn = s->n_ffn,
                      .n_expert = s->n_expert,
                      .n_expert_used = s->n_expert_used,
                      .n_expert_ffn = s->n_expert_ffn,
                      .n_shared_expert = s->n_shared_expert,
                      .n_mtp = s->n_mtp,
                      .moe_first = 1,
                      .moe_interval = 1,
                      .has_bias = s->n_expert > 0,
                      .tied_head = true};
    c->moe_last = c->n_layer - 1 - s->dense_tail;
    if (c->moe_last < c->moe_first) c->moe_last = c->n_layer - 1;
    p->shape = s->name;
    p->paddle = o->paddle;
    p->seed = o->seed;
    p->head_dim_said = p->moe_last_said = s->said_in_paddle || !o->paddle;
    return ERN_OK;
}

/* ---- tensors -------------------------------------------------------------------------------------------------------
 */

typedef enum kind { KIND_LINEAR, KIND_ROUTER, KIND_TABLE, KIND_VECTOR, KIND_BIAS } kind;

static synth_tensor *tensor_new(synth_plan *p, synth_set *s, kind k, int32_t n_in) {
    if (s->n_tensor == s->cap_tensor) {
        int32_t cap = s->cap_tensor ? s->cap_tensor * 2 : 64;
        synth_tensor *more = realloc(s->tensor, (size_t)cap * sizeof *more);
        if (!more) {
            p->full = true;
            return NULL;
        }
        s->tensor = more;
        s->cap_tensor = cap;
    }
    synth_tensor *t = &s->tensor[s->n_tensor++];
    *t = (synth_tensor){.n_in = n_in,
                        .n_dim = k == KIND_VECTOR ? 1 : 2,
                        .f32 = k == KIND_ROUTER || k == KIND_BIAS,
                        .turned = p->paddle && (k == KIND_LINEAR || k == KIND_ROUTER)};
    return t;
}

static void part_add(const synth_plan *p, synth_tensor *t, const char *pt_name, int32_t n_out) {
    synth_part *part = &t->part[t->n_part++];
    part->key = ern_counter_key(p->seed, pt_name);
    part->n_out = n_out;
    ern_synth_scale(pt_name, t->n_in, &part->scale, &part->offset);
    t->n_out += n_out;
}

/* One to three linears that the Paddle layout stores as one tensor `fused`. Names are without prefix and suffix. */
static void add_linears(synth_plan *p, synth_set *s, const char *path, const char *fused, int n,
                        const char *const name[], const int32_t n_out[], int32_t n_in) {
    synth_tensor *t = NULL;
    for (int i = 0; i < n; i++) {
        char pt_name[SYNTH_NAME_BYTES];
        snprintf(pt_name, sizeof pt_name, "model.%s.%s.weight", path, name[i]);
        if (i == 0 || !p->paddle) {
            t = tensor_new(p, s, KIND_LINEAR, n_in);
            if (!t) return;
            if (p->paddle)
                snprintf(t->name, sizeof t->name, "ernie.%s.%s.weight", path, fused);
            else
                snprintf(t->name, sizeof t->name, "%s", pt_name);
        }
        part_add(p, t, pt_name, n_out[i]);
    }
}

/* A tensor with the same name, but for the prefix, in both layouts. */
static void add_one(synth_plan *p, synth_set *s, kind k, const char *path, const char *tail, int32_t n_out,
                    int32_t n_in) {
    char pt_name[SYNTH_NAME_BYTES];
    synth_tensor *t = tensor_new(p, s, k, n_in);
    if (!t) return;
    snprintf(pt_name, sizeof pt_name, "model.%s%s", path, tail);
    snprintf(t->name, sizeof t->name, "%s.%s%s", p->paddle ? "ernie" : "model", path, tail);
    part_add(p, t, pt_name, n_out);
}

static void add_ffn(synth_plan *p, synth_set *s, const char *path, int32_t width) {
    static const char *const in[] = {"gate_proj", "up_proj"}, *const out[] = {"down_proj"};
    add_linears(p, s, path, "up_gate_proj", 2, in, (const int32_t[]){width, width}, p->config.n_hidden);
    add_linears(p, s, path, "down_proj", 1, out, (const int32_t[]){p->config.n_hidden}, width);
}

static void add_layer(synth_plan *p, synth_set *s, const char *path, bool is_moe) {
    static const char *const qkv[] = {"q_proj", "k_proj", "v_proj"}, *const o[] = {"o_proj"};
    const ern_config *c = &p->config;
    const int32_t q = c->n_head * c->n_head_dim, kv = c->n_kv_head * c->n_head_dim;
    char sub[SYNTH_NAME_BYTES];
    add_one(p, s, KIND_VECTOR, path, ".input_layernorm.weight", 1, c->n_hidden);
    snprintf(sub, sizeof sub, "%s.self_attn", path);
    add_linears(p, s, sub, "qkv_proj", 3, qkv, (const int32_t[]){q, kv, kv}, c->n_hidden);
    add_linears(p, s, sub, "o_proj", 1, o, &c->n_hidden, q);
    add_one(p, s, KIND_VECTOR, path, ".post_attention_layernorm.weight", 1, c->n_hidden);
    snprintf(sub, sizeof sub, "%s.mlp", path);
    if (!is_moe) {
        add_ffn(p, s, sub, c->n_ffn);
        return;
    }
    add_one(p, s, KIND_ROUTER, path, ".mlp.gate.weight", c->n_expert, c->n_hidden);
    add_one(p, s, KIND_BIAS, path, ".mlp.moe_statics.e_score_correction_bias", 1, c->n_expert);
    for (int32_t e = 0; e < c->n_expert; e++) {
        snprintf(sub, sizeof sub, "%s.mlp.experts.%d", path, e);
        add_ffn(p, s, sub, c->n_expert_ffn);
    }
    snprintf(sub, sizeof sub, "%s.mlp.shared_experts", path);
    if (c->n_shared_expert) add_ffn(p, s, sub, c->n_shared_expert * c->n_expert_ffn);
}

static void add_all(synth_plan *p) {
    const ern_config *c = &p->config;
    synth_set *mtp = p->paddle ? &p->mtp : &p->main;
    char path[SYNTH_NAME_BYTES];
    add_one(p, &p->main, KIND_TABLE, "embed_tokens.weight", "", c->n_vocab, c->n_hidden);
    for (int32_t i = 0; i < c->n_layer; i++) {
        snprintf(path, sizeof path, "layers.%d", i);
        add_layer(p, &p->main, path, ern_config_is_moe(c, i));
    }
    add_one(p, &p->main, KIND_VECTOR, "norm.weight", "", 1, c->n_hidden);
    if (c->n_mtp == 0) return;
    add_one(p, mtp, KIND_VECTOR, "mtp_emb_norm.0.weight", "", 1, c->n_hidden);
    add_one(p, mtp, KIND_VECTOR, "mtp_hidden_norm.0.weight", "", 1, c->n_hidden);
    add_one(p, mtp, KIND_LINEAR, "mtp_linear_proj.0.weight", "", c->n_hidden, 2 * c->n_hidden);
    add_layer(p, mtp, "mtp_block.0", false);
}

/* ---- files ---------------------------------------------------------------------------------------------------------
 */

static int by_place(const void *a, const void *b) {
    const synth_tensor *x = a, *y = b;
    if (x->file != y->file) return x->file < y->file ? -1 : 1;
    if (x->f32 != y->f32) return x->f32 ? -1 : 1;
    return (x->from > y->from) - (x->from < y->from);
}

/* Cut a set into files of at most limit bytes, header counted (a larger tensor has a file of its own), f32 first in
 * each so that everything is aligned. */
static void set_cut(synth_set *s, uint64_t limit) {
    uint64_t bytes = 0;
    for (int32_t i = 0; i < s->n_tensor; i++) {
        synth_tensor *t = &s->tensor[i];
        uint64_t more = synth_tensor_bytes(t) + SYNTH_NAME_BYTES + 100; /* with its header entry */
        if (i == 0 || bytes + more > limit) {
            bytes = 256;
            s->n_file++;
        }
        bytes += more;
        t->file = s->n_file - 1;
        t->from = (uint64_t)i; /* the planned order, until the offsets are known */
    }
    if (s->n_tensor) qsort(s->tensor, (size_t)s->n_tensor, sizeof *s->tensor, by_place);
    for (int32_t i = 0; i < s->n_tensor; i++) {
        const synth_tensor *before = &s->tensor[i - (i > 0)];
        bool first = i == 0 || before->file != s->tensor[i].file;
        s->tensor[i].from = first ? 0 : before->from + synth_tensor_bytes(before);
    }
}

ern_status synth_plan_make(synth_plan *out, const ern_synth_options *o, ern_err *err) {
    *out = (synth_plan){0};
    ERN_TRY(config_make(out, o, err));
    add_all(out);
    if (out->full) {
        synth_plan_free(out);
        return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory to plan a checkpoint of %d layers", out->config.n_layer);
    }
    set_cut(&out->main, o->shard_bytes ? o->shard_bytes : SYNTH_SHARD_BYTES);
    set_cut(&out->mtp, o->shard_bytes ? o->shard_bytes : SYNTH_SHARD_BYTES);
    return ERN_OK;
}

void synth_plan_free(synth_plan *p) {
    free(p->main.tensor);
    free(p->mtp.tensor);
    p->main = p->mtp = (synth_set){0};
}

/* ---- config.json ---------------------------------------------------------------------------------------------------
 */

static void key_int(ern_buf *b, const char *key, int64_t v) {
    ern_buf_print(b, "  \"%s\": %lld,\n", key, (long long)v);
}

static void key_raw(ern_buf *b, const char *key, const char *v) { ern_buf_print(b, "  \"%s\": %s,\n", key, v); }

/* The keys of the published files, in their order; the last one is put without a comma by the caller's end. */
void synth_config_text(const synth_plan *p, ern_buf *b) {
    const ern_config *c = &p->config;
    bool moe = c->n_expert > 0;
    const char *dense_name = p->paddle ? "Ernie4_5_ForCausalLM" : "Ernie4_5ForCausalLM";
    ern_buf_print(b, "{\n  \"architectures\": [\n    \"%s\"\n  ],\n", moe ? "Ernie4_5_MoeForCausalLM" : dense_name);
    key_int(b, "bos_token_id", 1);
    if (p->paddle) key_raw(b, "dtype", "\"bfloat16\"");
    key_int(b, "eos_token_id", 2);
    if (p->head_dim_said) key_int(b, "head_dim", c->n_head_dim);
    key_raw(b, "hidden_act", "\"silu\"");
    key_int(b, "hidden_size", c->n_hidden);
    key_int(b, "intermediate_size", c->n_ffn);
    key_int(b, "max_position_embeddings", 131072);
    key_raw(b, "model_type", moe ? "\"ernie4_5_moe\"" : "\"ernie4_5\"");
    if (moe) {
        ern_buf_print(b, "  \"moe_capacity\": [\n    %d,\n    %d,\n    %d\n  ],\n", c->n_expert, c->n_expert,
                      c->n_expert);
        key_raw(b, "moe_gate", "\"topk\"");
        key_int(b, "moe_intermediate_size", c->n_expert_ffn);
        key_int(b, "moe_k", c->n_expert_used);
        if (p->moe_last_said) key_int(b, "moe_layer_end_index", c->moe_last);
        key_int(b, "moe_layer_interval", c->moe_interval);
        key_int(b, "moe_layer_start_index", c->moe_first);
        key_int(b, "moe_num_experts", c->n_expert);
        key_int(b, "moe_num_shared_experts", c->n_shared_expert);
        key_raw(b, "moe_use_aux_free", "true");
        if (p->paddle) key_raw(b, "multi_token_pred_lambda", "0.3");
    }
    key_int(b, "num_attention_heads", c->n_head);
    key_int(b, "num_hidden_layers", c->n_layer);
    key_int(b, "num_key_value_heads", c->n_kv_head);
    if (p->paddle && c->n_mtp) key_int(b, "num_nextn_predict_layers", c->n_mtp);
    key_int(b, "pad_token_id", 0);
    key_raw(b, "rms_norm_eps", "1e-05");
    key_raw(b, "rope_theta", "500000.0");
    key_raw(b, "tie_word_embeddings", "true");
    if (!p->paddle) key_raw(b, "torch_dtype", "\"bfloat16\"");
    key_raw(b, "use_bias", "false");
    key_raw(b, "use_cache", "false");
    if (moe) key_raw(b, "use_rmsnorm", "true");
    ern_buf_print(b, "  \"vocab_size\": %d\n}\n", c->n_vocab);
}

void synth_generation_text(ern_buf *b) {
    ern_buf_text(b, "{\n  \"do_sample\": true,\n");
    key_raw(b, "top_p", "0.8");
    key_raw(b, "temperature", "0.8");
    key_int(b, "bos_token_id", 1);
    key_int(b, "eos_token_id", 2);
    key_int(b, "pad_token_id", 0);
    key_raw(b, "repetition_penalty", "1.0");
    key_raw(b, "frequency_penalty", "0.0");
    ern_buf_text(b, "  \"presence_penalty\": 0.0\n}\n");
}
