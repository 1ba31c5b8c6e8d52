/* config.json and generation_config.json. See config.h; the keys and their meaning: docs/model.md 1. */
#include "model/config.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/jsonr.h"
#include "model/quant_plan.h"
#include "model/sample.h"

enum { CONFIG_DEPTH_MAX = 16 };

/* One object being read. The first failure stays and reads after it do nothing, so that a list of keys reads as a list.
 */
typedef struct reader {
    const json_t *object;
    const char *what;
    const char *outer; /* "rope_scaling." inside that object, else "" */
    ern_err *err;
    ern_status status;
} reader;

#define REFUSE(r, code, ...) ((void)((r)->status == ERN_OK && ((r)->status = ERN_FAIL((r)->err, (code), __VA_ARGS__))))

/* The value of a key; NULL when it is absent, null, or the reading has failed already. */
static const json_t *get(const reader *r, const char *key) {
    if (r->status != ERN_OK) return NULL;
    const json_t *v = json_object_get(r->object, key);
    return json_is_null(v) ? NULL : v;
}

/* A value as it stands in the file, for a message. */
static const char *shown(const json_t *v, char out[64]) {
    char *text = json_dumps(v, JSON_ENCODE_ANY | JSON_COMPACT | JSON_ENSURE_ASCII);
    snprintf(out, 64, "%.60s%s", text ? text : "?", text && strlen(text) > 60 ? "..." : "");
    free(text);
    return out;
}

static void wrong(reader *r, const char *key, const json_t *v, const char *expected) {
    char found[64];
    REFUSE(r, ERN_ERR_FILE, "%s: %s%s must be %s, found %s", r->what, r->outer, key, expected, shown(v, found));
}

/* What is there and cannot be computed. */
static void cannot(reader *r, const char *key, const json_t *v, const char *only) {
    char found[64];
    REFUSE(r, ERN_ERR_UNSUPPORTED, "%s: %s%s is %s; only %s can be computed", r->what, r->outer, key, shown(v, found),
           only);
}

static void must_have(reader *r, const char *key) {
    if (r->status == ERN_OK && !get(r, key)) REFUSE(r, ERN_ERR_FILE, "%s: the key %s is missing", r->what, key);
}

/* A whole number in [min, max]; `absent` when the key is not there. */
static int32_t read_int(reader *r, const char *key, int32_t min, int32_t max, int32_t absent) {
    const json_t *v = get(r, key);
    if (!v) return absent;
    if (json_is_integer(v) && json_integer_value(v) >= min && json_integer_value(v) <= max)
        return (int32_t)json_integer_value(v);
    char expected[80];
    snprintf(expected, sizeof expected, "a whole number from %d to %d", min, max);
    wrong(r, key, v, expected);
    return absent;
}

static int32_t need_int(reader *r, const char *key, int32_t min, int32_t max) {
    must_have(r, key);
    return read_int(r, key, min, max, min);
}

static double read_real(reader *r, const char *key, double min, double max, double absent) {
    const json_t *v = get(r, key);
    if (!v) return absent;
    if (json_is_number(v) && json_number_value(v) >= min && json_number_value(v) <= max) return json_number_value(v);
    char expected[80];
    snprintf(expected, sizeof expected, "a number from %g to %g", min, max);
    wrong(r, key, v, expected);
    return absent;
}

static bool read_bool(reader *r, const char *key, bool absent) {
    const json_t *v = get(r, key);
    if (!v) return absent;
    if (!json_is_boolean(v)) wrong(r, key, v, "true or false");
    return json_is_true(v);
}

/* Keys of other models: present with the one value that means "as ERNIE-4.5 computes it", or absent. */
static void only_text(reader *r, const char *key, const char *value) {
    const json_t *v = get(r, key);
    char only[64];
    snprintf(only, sizeof only, "\"%s\"", value);
    if (v && (!json_is_string(v) || strcmp(json_string_value(v), value) != 0)) cannot(r, key, v, only);
}

static void only_bool(reader *r, const char *key, bool value) {
    if (read_bool(r, key, value) != value) cannot(r, key, get(r, key), value ? "true" : "false");
}

static void only_one(reader *r, const char *key) {
    if (fabs(read_real(r, key, -1e9, 1e9, 1.0) - 1.0) > 0) cannot(r, key, get(r, key), "1");
}

/* Absent, null, false, 0 or empty: each of them says that there is none. */
static void only_none(reader *r, const char *key) {
    const json_t *v = get(r, key);
    bool none = !v || json_is_false(v) || (json_is_number(v) && !(fabs(json_number_value(v)) > 0)) ||
                (json_is_string(v) && json_string_length(v) == 0) || (json_is_array(v) && json_array_size(v) == 0) ||
                (json_is_object(v) && json_object_size(v) == 0);
    if (!none) cannot(r, key, v, "null");
}

/* Text that must be short printable ASCII; "" when absent. */
static void read_word(reader *r, const char *key, const json_t *v, char *out, size_t size) {
    out[0] = 0;
    if (!v) return;
    const char *text = json_string_value(v);
    bool good = text && json_string_length(v) < size && strlen(text) == json_string_length(v);
    for (const char *p = text; good && *p; p++) good = *p > 32 && *p < 127;
    if (!good) {
        wrong(r, key, v, "a short word");
        return;
    }
    memcpy(out, text, strlen(text) + 1);
}

static void read_kind(reader *r, ern_config *c) {
    const json_t *list = get(r, "architectures");
    if (list && (!json_is_array(list) || json_array_size(list) != 1))
        wrong(r, "architectures", list, "a list of one name");
    read_word(r, "architectures", json_array_get(list, 0), c->architecture, sizeof c->architecture);
    read_word(r, "model_type", get(r, "model_type"), c->model_type, sizeof c->model_type);
    if (r->status != ERN_OK) return;
    static const char *const dense[] = {"Ernie4_5_ForCausalLM", "Ernie4_5ForCausalLM", "ernie4_5"};
    static const char *const moe[] = {"Ernie4_5_MoeForCausalLM", "Ernie4_5MoeForCausalLM", "ernie4_5_moe"};
    int kind[2] = {0, 0}; /* of architecture, of model_type: 1 dense, 2 MoE */
    for (int i = 0; i < 2; i++) {
        if (strcmp(c->architecture, dense[i]) == 0) kind[0] = 1;
        if (strcmp(c->architecture, moe[i]) == 0) kind[0] = 2;
    }
    if (strcmp(c->model_type, dense[2]) == 0) kind[1] = 1;
    if (strcmp(c->model_type, moe[2]) == 0) kind[1] = 2;
    const char *unknown = c->architecture[0] && !kind[0] ? c->architecture
                          : c->model_type[0] && !kind[1] ? c->model_type
                                                         : NULL;
    if (unknown)
        REFUSE(r, ERN_ERR_UNSUPPORTED, "%s: this is a %s; ernest serves the ERNIE-4.5 text models: %s, %s", r->what,
               unknown, dense[0], moe[0]);
    if (!kind[0] && !kind[1])
        REFUSE(r, ERN_ERR_FILE, "%s: neither architectures nor model_type names the model", r->what);
    if (kind[0] && kind[1] && kind[0] != kind[1])
        REFUSE(r, ERN_ERR_FILE, "%s: architectures says %s but model_type says %s", r->what, c->architecture,
               c->model_type);
    bool is_moe = kind[0] == 2 || kind[1] == 2;
    c->n_expert = is_moe ? need_int(r, "moe_num_experts", 1, ERN_EXPERTS_MAX) : read_int(r, "moe_num_experts", 0, 0, 0);
}

static void read_geometry(reader *r, ern_config *c) {
    c->n_vocab = need_int(r, "vocab_size", 1, ERN_VOCAB_MAX);
    c->n_hidden = need_int(r, "hidden_size", 1, 1 << 16);
    c->n_layer = need_int(r, "num_hidden_layers", 1, ERN_LAYERS_MAX);
    c->n_head = need_int(r, "num_attention_heads", 1, 1024);
    c->n_kv_head = read_int(r, "num_key_value_heads", 1, 1024, c->n_head);
    c->n_ffn = need_int(r, "intermediate_size", 1, 1 << 20);
    if (r->status != ERN_OK) return;
    if (c->n_head % c->n_kv_head != 0)
        REFUSE(r, ERN_ERR_FILE, "%s: num_attention_heads is %d, not a multiple of num_key_value_heads %d", r->what,
               c->n_head, c->n_kv_head);
    bool divides = c->n_hidden % c->n_head == 0;
    if (!get(r, "head_dim") && !divides)
        REFUSE(r, ERN_ERR_FILE,
               "%s: head_dim is missing and hidden_size %d is not a multiple of num_attention_heads %d", r->what,
               c->n_hidden, c->n_head);
    c->n_head_dim = read_int(r, "head_dim", 2, 1024, c->n_hidden / c->n_head);
    if (r->status == ERN_OK && (c->n_head_dim < 2 || c->n_head_dim % 2 != 0))
        REFUSE(r, ERN_ERR_FILE, "%s: the head size %d is odd; RoPE turns pairs, so head_dim must be even", r->what,
               c->n_head_dim);
    c->n_position = read_int(r, "max_position_embeddings", 1, 1 << 24, 512);
    c->tied_head = read_bool(r, "tie_word_embeddings", false);
    c->n_mtp = read_int(r, "num_nextn_predict_layers", 0, 1, 0);
}

static void read_moe(reader *r, ern_config *c, config_hints *h) {
    h->aux_free = get(r, "moe_use_aux_free") ? read_bool(r, "moe_use_aux_free", false) : -1;
    if (c->n_expert == 0) return;
    c->n_expert_used = need_int(r, "moe_k", 1, c->n_expert);
    c->n_expert_ffn = need_int(r, "moe_intermediate_size", 1, 1 << 20);
    c->n_shared_expert = read_int(r, "moe_num_shared_experts", 0, 64, 0);
    c->moe_first = need_int(r, "moe_layer_start_index", 0, c->n_layer);
    c->moe_last = read_int(r, "moe_layer_end_index", -1, c->n_layer - 1, -1);
    if (c->moe_last < 0) c->moe_last = c->n_layer - 1;
    c->moe_interval = read_int(r, "moe_layer_interval", 1, ERN_LAYERS_MAX, 1);
    c->moe_norm_min = (float)read_real(r, "moe_norm_min", 0, 1, 1e-12);
    only_text(r, "moe_gate", "topk");
    only_text(r, "moe_gate_act", "softmax");
    only_bool(r, "moe_norm_gate_logits", true);
    if (r->status == ERN_OK && (int64_t)c->n_shared_expert * c->n_expert_ffn > 1 << 22)
        REFUSE(r, ERN_ERR_FILE, "%s: %d shared experts of width %d are wider than 4194304 together", r->what,
               c->n_shared_expert, c->n_expert_ffn);
}

/* ---- keys that are not read -----------------------------------------------------------------------------------------
 *
 * A key that would change the result must not pass in silence. Those that other models of the same code have are
 * refused unless they say "none"; those that cannot matter here are listed; the rest is handed to the caller by name.
 */

static const char *const none_key[] = {"attention_bias",
                                       "attention_multiplier",
                                       "attn_logit_softcapping",
                                       "clip_qkv",
                                       "final_logit_softcapping",
                                       "mlp_bias",
                                       "qk_layernorm",
                                       "qk_norm",
                                       "qkv_bias",
                                       "query_pre_attn_scalar",
                                       "rope_3d",
                                       "router_logit_softcapping",
                                       "use_attention_sinks",
                                       "use_mla",
                                       "use_qk_norm",
                                       "use_sliding_window",
                                       NULL};
static const char *const one_key[] = {"embedding_multiplier", "logit_scale",           "logits_scaling",
                                      "residual_multiplier",  "routed_scaling_factor", NULL};

/* Read above and below, or without meaning for one who computes: training, fused kernels, caches, bookkeeping of
 * transformers and PaddleNLP. Source: docs/model.md 1 and the converter from Paddle to PyTorch, which deletes most. */
static const char *const known_key[] = {
    "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "intermediate_size", "head_dim", "max_position_embeddings", "tie_word_embeddings",
    "num_nextn_predict_layers", "moe_use_aux_free", "moe_num_experts", "moe_k", "moe_intermediate_size",
    "moe_num_shared_experts", "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "moe_norm_min",
    "moe_gate", "moe_gate_act", "moe_norm_gate_logits", "rope_scaling", "rope_parameters", "rope_theta", "hidden_act",
    "use_bias", "use_rmsnorm", "compression_ratio", "partial_rotary_factor", "quantization_config", "sliding_window",
    "torch_dtype", "dtype", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id", "scoring_func",
    "norm_topk_prob",
    /* training and kernels */
    "add_tail_layers", "attention_dropout", "attention_dropout_prob", "attention_probs_dropout_prob", "fuse_attn_ffn",
    "fuse_attn_qkv", "fuse_gate_detach_matmul", "fuse_linear", "fuse_ln", "fuse_rms_norm", "fuse_rope",
    "fuse_softmax_mask", "fuse_swiglu", "global_aux_loss", "hidden_dropout", "hidden_dropout_prob", "initializer_range",
    "moe_aux_loss_lambda", "moe_capacity", "moe_dropout_prob", "moe_group_orthogonal_loss", "moe_logging",
    "moe_orthogonal_loss_lambda", "moe_z_loss_lambda", "multi_token_pred_lambda", "output_router_logits",
    "pretraining_tp", "recompute", "router_aux_loss_coef", "sequence_parallel", "tensor_parallel_degree",
    "tensor_parallel_output", "use_fast_ln", "use_flash_attention", "use_flash_attn", "use_recompute",
    /* bookkeeping */
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "attn_implementation", "auto_map",
    "chunk_size_feed_forward", "finetuning_task", "id2label", "is_decoder", "is_encoder_decoder", "label2id",
    "max_sequence_length", "model_name", "output_attentions", "output_hidden_states", "paddleformers_version",
    "paddlenlp_version", "problem_type", "return_dict", "return_dict_in_generate", "seqlen", "task_specific_params",
    "tokenizer_class", "torchscript", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache", NULL};
static const char *const rope_known[] = {"rope_type", "type", "partial_rotary_factor", "factor", "rope_theta", NULL};

static bool among(const char *key, const char *const *list) {
    while (*list && strcmp(key, *list) != 0) list++;
    return *list != NULL;
}

/* Add the keys of an object that no list has to h->unknown: plain words, a blank between, "..." when there are more. */
static void note_unknown(const json_t *object, const char *outer, const char *const *known, config_hints *h) {
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)object, key, v) {
        if (json_is_null(v) || among(key, known)) continue;
        if (!*outer && (among(key, none_key) || among(key, one_key))) continue;
        char word[80];
        size_t n = 0, len = strlen(h->unknown);
        for (const char *p = key; *p && n < 48; p++) word[n++] = (char)(*p > 32 && *p < 127 ? *p : '?');
        word[n] = 0;
        bool fits = len + strlen(outer) + n + 8 < sizeof h->unknown;
        if (len >= 3 && strcmp(h->unknown + len - 3, "...") == 0) return;
        snprintf(h->unknown + len, sizeof h->unknown - len, "%s%s%s", len ? " " : "", fits ? outer : "...",
                 fits ? word : "");
    }
}

/* rope_theta is a key of its own, or (written by later transformers) inside rope_parameters. */
static void read_rope(reader *r, ern_config *c, config_hints *h) {
    double theta = 10000.0;
    static const char *const key[] = {"rope_scaling", "rope_parameters"};
    for (int i = 0; i < 2; i++) {
        const json_t *v = get(r, key[i]);
        if (!v) continue;
        if (!json_is_object(v)) {
            wrong(r, key[i], v, "an object");
            return;
        }
        char outer[32];
        snprintf(outer, sizeof outer, "%s.", key[i]);
        reader in = {v, r->what, outer, r->err, r->status};
        only_text(&in, "rope_type", "default");
        only_text(&in, "type", "default");
        only_one(&in, "partial_rotary_factor");
        only_one(&in, "factor");
        theta = read_real(&in, "rope_theta", 1.0, 1e12, theta);
        r->status = in.status;
        note_unknown(v, outer, rope_known, h);
    }
    c->rope_theta = read_real(r, "rope_theta", 1.0, 1e12, theta);
}

/* Everything that other models of the family have and these do not: a value that would change the result is refused. */
static void read_unsupported(reader *r) {
    only_text(r, "hidden_act", "silu");
    only_bool(r, "use_bias", false);
    only_bool(r, "use_rmsnorm", true);
    only_one(r, "compression_ratio");
    only_one(r, "partial_rotary_factor");
    only_text(r, "scoring_func", "softmax");
    only_bool(r, "norm_topk_prob", true);
    for (int i = 0; none_key[i]; i++) only_none(r, none_key[i]);
    for (int i = 0; one_key[i]; i++) only_one(r, one_key[i]);
    const json_t *w = get(r, "sliding_window");
    if (w && !json_is_false(w))
        REFUSE(r, ERN_ERR_UNSUPPORTED, "%s: sliding_window is set; only full attention can be computed", r->what);
    static const char *const dtype[] = {"torch_dtype", "dtype"};
    for (int i = 0; i < 2; i++) only_text(r, dtype[i], "bfloat16");
}

/* Ours, of the KV cache alone, or absent (an empty object says nothing). */
static void read_quant(reader *r, config_hints *h) {
    const json_t *q = get(r, "quantization_config");
    if (!q || (json_is_object(q) && json_object_size(q) == 0)) return;
    quant_config found;
    r->status = quant_config_read(&found, q, r->what, r->err);
    if (r->status != ERN_OK) return;
    h->quantized = found.weights;
    h->quant = found.plan;
    h->kv_codes = found.kv_codes;
}

/* Token ids: a number, or for eos a list; merged without doubles. */
static void read_eos(reader *r, ern_config *c) {
    const json_t *v = get(r, "eos_token_id");
    if (!v) return;
    size_t n = json_is_array(v) ? json_array_size(v) : 1;
    for (size_t i = 0; i < n; i++) {
        const json_t *e = json_is_array(v) ? json_array_get(v, i) : v;
        if (!json_is_integer(e) || json_integer_value(e) < 0 || json_integer_value(e) >= c->n_vocab) {
            wrong(r, "eos_token_id", v, "ids below vocab_size");
            return;
        }
        int32_t id = (int32_t)json_integer_value(e), k = 0;
        while (k < c->n_eos && c->eos[k] != id) k++;
        if (k < c->n_eos) continue;
        if (c->n_eos == ERN_EOS_MAX) {
            REFUSE(r, ERN_ERR_FILE, "%s: more than %d different eos_token_id", r->what, ERN_EOS_MAX);
            return;
        }
        c->eos[c->n_eos++] = id;
    }
}

static ern_status object_parse(json_t **out, const char *text, size_t len, const char *what, ern_err *err) {
    ern_status s = ern_json_parse(out, text, len, CONFIG_DEPTH_MAX, what, err);
    if (s == ERN_ERR_INPUT && err) err->code = ERN_ERR_FILE;
    if (s != ERN_OK) return s == ERN_ERR_INPUT ? ERN_ERR_FILE : s;
    if (json_is_object(*out)) return ERN_OK;
    json_decref(*out);
    *out = NULL;
    return ERN_FAIL(err, ERN_ERR_FILE, "%s: expected a JSON object", what);
}

ern_status config_parse(ern_config *out, config_hints *hints, const char *text, size_t len, const char *what,
                        ern_err *err) {
    json_t *root;
    ern_config *c = out;
    memset(c, 0, sizeof *c);
    memset(hints, 0, sizeof *hints);
    ERN_TRY(object_parse(&root, text, len, what, err));
    reader r = {root, what, "", err, ERN_OK};
    read_kind(&r, c);
    read_geometry(&r, c);
    read_moe(&r, c, hints);
    read_rope(&r, c, hints);
    read_unsupported(&r);
    read_quant(&r, hints);
    note_unknown(root, "", known_key, hints);
    hints->torch_dtype = get(&r, "torch_dtype") != NULL;
    c->has_bias = hints->aux_free == 1;
    c->rms_eps = (float)read_real(&r, "rms_norm_eps", 1e-12, 0.1, 1e-5);
    c->bos = read_int(&r, "bos_token_id", 0, c->n_vocab - 1, -1);
    c->pad = read_int(&r, "pad_token_id", -1, c->n_vocab - 1, -1);
    read_eos(&r, c);
    c->temperature = c->top_p = c->repetition = c->frequency = c->presence = NAN;
    c->top_k = -1;
    json_decref(root);
    return r.status;
}

ern_status config_parse_generation(ern_config *c, const char *text, size_t len, const char *what, ern_err *err) {
    json_t *root;
    ERN_TRY(object_parse(&root, text, len, what, err));
    reader r = {root, what, "", err, ERN_OK};
    (void)read_bool(&r, "do_sample", true);
    c->temperature = (float)read_real(&r, "temperature", 0, 100, NAN);
    c->top_p = (float)read_real(&r, "top_p", 0, 1, NAN);
    c->top_k = read_int(&r, "top_k", -1, 1 << 20, -1);
    c->repetition = (float)read_real(&r, "repetition_penalty", 1e-3, 1e3, NAN);
    c->frequency = (float)read_real(&r, "frequency_penalty", -2, 2, NAN);
    c->presence = (float)read_real(&r, "presence_penalty", -2, 2, NAN);
    c->bos = read_int(&r, "bos_token_id", 0, c->n_vocab - 1, c->bos);
    c->pad = read_int(&r, "pad_token_id", -1, c->n_vocab - 1, c->pad);
    read_eos(&r, c);
    json_decref(root);
    return r.status;
}

ern_status config_compare(const ern_config *c, const char *text, size_t len, const char *what, ern_err *err) {
    const struct {
        const char *key;
        double ours;
    } same[] = {{"vocab_size", c->n_vocab},           {"hidden_size", c->n_hidden},
                {"num_attention_heads", c->n_head},   {"num_key_value_heads", c->n_kv_head},
                {"head_dim", c->n_head_dim},          {"intermediate_size", c->n_ffn},
                {"rms_norm_eps", (double)c->rms_eps}, {"rope_theta", c->rope_theta}};
    json_t *root;
    ERN_TRY(object_parse(&root, text, len, what, err));
    reader r = {root, what, "", err, ERN_OK};
    for (size_t i = 0; i < sizeof same / sizeof same[0]; i++) {
        double theirs = read_real(&r, same[i].key, 0, 1e12, same[i].ours);
        if (fabs(theirs - same[i].ours) > 1e-6 * same[i].ours) /* eps is kept as f32 */
            REFUSE(
                &r, ERN_ERR_FILE,
                "%s: %s is %.10g and the model's own config says %.10g; give the MTP weights that belong to the model",
                what, same[i].key, theirs, same[i].ours);
    }
    json_decref(root);
    return r.status;
}

bool ern_config_is_moe(const ern_config *c, int32_t layer) {
    return c->n_expert > 0 && layer >= c->moe_first && layer <= c->moe_last && (layer + 1) % c->moe_interval == 0;
}
