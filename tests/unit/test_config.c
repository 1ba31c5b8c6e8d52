/* config.json and generation_config.json: the published files, the fallbacks, and a refusal for every wrong value. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/jsonr.h"
#include "model/config.h"

/* The published files, written down from docs/model.md 1, not by our own writer. */
static const char dense_pt[] =
    "{\"architectures\":[\"Ernie4_5_ForCausalLM\"],\"auto_map\":{\"AutoConfig\":\"configuration_ernie4_5.Ernie4_5_"
    "Config\"},"
    "\"bos_token_id\":1,\"eos_token_id\":2,\"head_dim\":128,\"hidden_act\":\"silu\",\"hidden_size\":1024,"
    "\"intermediate_size\":3072,\"max_position_embeddings\":131072,\"model_type\":\"ernie4_5\",\"num_attention_heads\":"
    "16,"
    "\"num_hidden_layers\":18,\"num_key_value_heads\":2,\"pad_token_id\":0,\"rms_norm_eps\":1e-05,\"rope_theta\":"
    "500000,"
    "\"tie_word_embeddings\":true,\"torch_dtype\":\"bfloat16\",\"use_bias\":false,\"use_cache\":false,\"vocab_size\":"
    "103424}";
static const char moe_paddle[] =
    "{\"architectures\":[\"Ernie4_5_MoeForCausalLM\"],\"bos_token_id\":1,\"eos_token_id\":2,\"hidden_act\":\"silu\","
    "\"hidden_size\":2560,\"intermediate_size\":12288,\"max_position_embeddings\":131072,\"model_type\":\"ernie4_5_"
    "moe\","
    "\"num_attention_heads\":20,\"num_key_value_heads\":4,\"num_hidden_layers\":28,\"pad_token_id\":0,"
    "\"rms_norm_eps\":1e-05,\"use_cache\":false,\"vocab_size\":103424,\"rope_theta\":500000.0,\"use_rmsnorm\":true,"
    "\"use_bias\":false,\"moe_num_experts\":64,\"moe_num_shared_experts\":2,\"moe_layer_start_index\":1,"
    "\"moe_intermediate_size\":1536,\"moe_capacity\":[64,64,64],\"moe_gate\":\"topk\",\"moe_k\":6,\"moe_layer_"
    "interval\":1,"
    "\"moe_use_aux_free\":true,\"num_nextn_predict_layers\":1,\"multi_token_pred_lambda\":0.3,"
    "\"tie_word_embeddings\":true,\"dtype\":\"bfloat16\",\"fuse_rope\":true,\"global_aux_loss\":false,"
    "\"moe_aux_loss_lambda\":1e-5,\"max_sequence_length\":4096,\"paddlenlp_version\":null}";

static ern_status parse(const char *text, ern_config *c, config_hints *h, ern_err *err) {
    memset(err, 0, sizeof *err);
    return config_parse(c, h, text, strlen(text), "config.json", err);
}

static void published(void **state) {
    (void)state;
    ern_config c;
    config_hints h;
    ern_err err;
    assert_int_equal(parse(dense_pt, &c, &h, &err), ERN_OK);
    assert_string_equal(c.architecture, "Ernie4_5_ForCausalLM");
    assert_string_equal(c.model_type, "ernie4_5");
    const int32_t expected[] = {103424, 1024, 18, 16, 2, 128, 3072, 0, 0, 131072, 1, 0, 1, 2};
    const int32_t found[] = {c.n_vocab,  c.n_hidden, c.n_layer,    c.n_head, c.n_kv_head, c.n_head_dim, c.n_ffn,
                             c.n_expert, c.n_mtp,    c.n_position, c.bos,    c.pad,       c.n_eos,      c.eos[0]};
    assert_memory_equal(found, expected, sizeof expected);
    assert_true(c.tied_head && h.torch_dtype && h.aux_free == -1);
    assert_true(fabs(c.rope_theta - 500000) < 1e-9 && fabsf(c.rms_eps - 1e-5f) < 1e-12f);
    assert_true(isnan(c.temperature) && isnan(c.top_p) && isnan(c.presence) && c.top_k == -1);
    for (int i = 0; i < 18; i++) assert_false(ern_config_is_moe(&c, i));
    assert_int_equal(parse(moe_paddle, &c, &h, &err), ERN_OK);
    assert_int_equal(c.n_head_dim, 128); /* 2560 / 20 */
    assert_int_equal(c.n_expert, 64);
    assert_int_equal(c.n_expert_used, 6);
    assert_int_equal(c.n_expert_ffn, 1536);
    assert_int_equal(c.n_shared_expert, 2);
    assert_int_equal(c.moe_first, 1);
    assert_int_equal(c.moe_last, 27);
    assert_int_equal(c.n_mtp, 1);
    assert_true(c.has_bias && h.aux_free == 1 && !h.torch_dtype);
    assert_true(c.moe_norm_min > 0.9e-12f && c.moe_norm_min < 1.1e-12f);
    for (int i = 0; i < 28; i++) assert_int_equal(ern_config_is_moe(&c, i), i > 0);
}

/* `base` with one key set to a JSON value, or without it (value NULL). */
static char *edit(const char *base, const char *key, const char *value) {
    json_t *root = json_loads(base, 0, NULL), *v = value ? json_loads(value, JSON_DECODE_ANY, NULL) : NULL;
    assert_non_null(root);
    if (value) {
        assert_non_null(v);
        json_object_set_new(root, key, v);
    } else {
        json_object_del(root, key);
    }
    char *text = json_dumps(root, 0);
    json_decref(root);
    assert_non_null(text);
    return text;
}

typedef struct bad_case {
    bool moe;
    const char *key, *value; /* value NULL: the key taken away */
    ern_code code;
    const char *says;
} bad_case;

static const bad_case bad_table[] = {
    {0, "architectures", "[\"LlamaForCausalLM\"]", ERN_ERR_UNSUPPORTED, "LlamaForCausalLM"},
    {0, "architectures", "[\"Ernie4_5_VLMoeForConditionalGeneration\"]", ERN_ERR_UNSUPPORTED, "VLMoe"},
    {0, "architectures", "[\"Ernie4_5_MoeForCausalLM\"]", ERN_ERR_FILE, "model_type says ernie4_5"},
    {0, "architectures", "\"Ernie4_5_ForCausalLM\"", ERN_ERR_FILE, "a list of one name"},
    {0, "architectures", "[]", ERN_ERR_FILE, "a list of one name"},
    {0, "architectures", "[\"a\",\"b\"]", ERN_ERR_FILE, "a list of one name"},
    {0, "architectures", "[1]", ERN_ERR_FILE, "a short word"},
    {0, "architectures", "[\"two words\"]", ERN_ERR_FILE, "a short word"},
    {0, "architectures", "[\"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\"]", ERN_ERR_FILE,
     "short word"},
    {0, "model_type", "\"qwen3\"", ERN_ERR_UNSUPPORTED, "qwen3"},
    {0, "model_type", "7", ERN_ERR_FILE, "model_type must be a short word, found 7"},
    {0, "vocab_size", NULL, ERN_ERR_FILE, "the key vocab_size is missing"},
    {0, "vocab_size", "null", ERN_ERR_FILE, "the key vocab_size is missing"},
    {0, "vocab_size", "0", ERN_ERR_FILE, "vocab_size must be a whole number from 1 to 262144, found 0"},
    {0, "vocab_size", "262145", ERN_ERR_FILE, "found 262145"},
    {0, "vocab_size", "4294967297", ERN_ERR_FILE, "found 4294967297"},
    {0, "vocab_size", "\"103424\"", ERN_ERR_FILE, "found \"103424\""},
    {0, "vocab_size", "103424.0", ERN_ERR_FILE, "found 103424.0"},
    {0, "vocab_size", "true", ERN_ERR_FILE, "found true"},
    {0, "hidden_size", NULL, ERN_ERR_FILE, "hidden_size is missing"},
    {0, "hidden_size", "-1024", ERN_ERR_FILE, "hidden_size must be"},
    {0, "hidden_size", "65537", ERN_ERR_FILE, "hidden_size must be"},
    {0, "num_hidden_layers", NULL, ERN_ERR_FILE, "num_hidden_layers is missing"},
    {0, "num_hidden_layers", "129", ERN_ERR_FILE, "from 1 to 128"},
    {0, "num_attention_heads", NULL, ERN_ERR_FILE, "num_attention_heads is missing"},
    {0, "num_attention_heads", "0", ERN_ERR_FILE, "num_attention_heads must be"},
    {0, "num_attention_heads", "15", ERN_ERR_FILE, "15, not a multiple of num_key_value_heads 2"},
    {0, "num_key_value_heads", "3", ERN_ERR_FILE, "16, not a multiple of num_key_value_heads 3"},
    {0, "num_key_value_heads", "32", ERN_ERR_FILE, "not a multiple"},
    {0, "num_key_value_heads", "0", ERN_ERR_FILE, "num_key_value_heads must be"},
    {0, "intermediate_size", NULL, ERN_ERR_FILE, "intermediate_size is missing"},
    {0, "intermediate_size", "[3072]", ERN_ERR_FILE, "found [3072]"},
    {0, "head_dim", "127", ERN_ERR_FILE, "must be even"},
    {0, "head_dim", "0", ERN_ERR_FILE, "head_dim must be"},
    {1, "hidden_size", "2561", ERN_ERR_FILE, "hidden_size 2561 is not a multiple of num_attention_heads 20"},
    {1, "hidden_size", "20", ERN_ERR_FILE, "head size 1 is odd"},
    {0, "max_position_embeddings", "0", ERN_ERR_FILE, "max_position_embeddings must be"},
    {0, "rms_norm_eps", "0", ERN_ERR_FILE, "rms_norm_eps must be"},
    {0, "rms_norm_eps", "1", ERN_ERR_FILE, "rms_norm_eps must be"},
    {0, "rms_norm_eps", "\"1e-5\"", ERN_ERR_FILE, "rms_norm_eps must be"},
    {0, "rope_theta", "0", ERN_ERR_FILE, "rope_theta must be"},
    {0, "rope_scaling", "{\"type\":\"yarn\",\"factor\":4}", ERN_ERR_UNSUPPORTED,
     "rope_scaling.type is \"yarn\"; only \"default\""},
    {0, "rope_scaling", "{\"rope_type\":\"linear\"}", ERN_ERR_UNSUPPORTED,
     "rope_scaling.rope_type is \"linear\"; only \"default\""},
    {0, "rope_scaling", "4", ERN_ERR_FILE, "rope_scaling must be an object"},
    {0, "rope_parameters", "{\"rope_type\":\"dynamic\"}", ERN_ERR_UNSUPPORTED, "rope_parameters.rope_type is"},
    {0, "rope_scaling", "{\"factor\":4.0}", ERN_ERR_UNSUPPORTED, "rope_scaling.factor is 4.0; only 1"},
    {0, "rope_parameters", "{\"rope_theta\":0}", ERN_ERR_FILE, "rope_parameters.rope_theta must be"},
    {0, "use_qk_norm", "true", ERN_ERR_UNSUPPORTED, "use_qk_norm is true; only null"},
    {0, "attention_bias", "true", ERN_ERR_UNSUPPORTED, "attention_bias is true"},
    {0, "mlp_bias", "1", ERN_ERR_UNSUPPORTED, "mlp_bias is 1"},
    {0, "final_logit_softcapping", "30.0", ERN_ERR_UNSUPPORTED, "final_logit_softcapping is 30.0"},
    {0, "attn_logit_softcapping", "50", ERN_ERR_UNSUPPORTED, "attn_logit_softcapping is 50"},
    {1, "routed_scaling_factor", "2.5", ERN_ERR_UNSUPPORTED, "routed_scaling_factor is 2.5; only 1"},
    {1, "scoring_func", "\"sigmoid\"", ERN_ERR_UNSUPPORTED, "scoring_func is \"sigmoid\""},
    {1, "norm_topk_prob", "false", ERN_ERR_UNSUPPORTED, "norm_topk_prob is false"},
    {0, "compression_ratio", "2.0", ERN_ERR_UNSUPPORTED, "compression_ratio is 2.0; only 1 can"},
    {0, "partial_rotary_factor", "0.5", ERN_ERR_UNSUPPORTED, "partial_rotary_factor is 0.5; only 1"},
    {0, "tie_word_embeddings", "1", ERN_ERR_FILE, "tie_word_embeddings must be true or false, found 1"},
    {0, "hidden_act", "\"gelu\"", ERN_ERR_UNSUPPORTED, "hidden_act is \"gelu\"; only \"silu\""},
    {0, "use_bias", "true", ERN_ERR_UNSUPPORTED, "use_bias is true; only false"},
    {0, "use_rmsnorm", "false", ERN_ERR_UNSUPPORTED, "use_rmsnorm is false; only true"},
    {0, "sliding_window", "4096", ERN_ERR_UNSUPPORTED, "sliding_window"},
    {0, "quantization_config", "{\"quantization\":\"wint4\"}", ERN_ERR_UNSUPPORTED, "quantization_config"},
    {0, "quantization_config", "{\"quantization\":\"kvcache\",\"is_quantized\":true,\"kv_cache_quant_type\":\"int8\"}",
     ERN_ERR_UNSUPPORTED, "another maker"},
    {0, "quantization_config", "{\"quantization\":\"kvcache\",\"kv_cache_quant_type\":\"int4_zp\"}",
     ERN_ERR_UNSUPPORTED, "kv_cache_quant_type is int4_zp"},
    {0, "quantization_config", "{\"quantization\":\"kvcache\",\"kv_cache_quant_type\":8}", ERN_ERR_UNSUPPORTED,
     "kv_cache_quant_type is no text"},
    {0, "torch_dtype", "\"float16\"", ERN_ERR_UNSUPPORTED, "torch_dtype is \"float16\"; only \"bfloat16\""},
    {1, "dtype", "\"float32\"", ERN_ERR_UNSUPPORTED, "dtype is \"float32\"; only"},
    {0, "moe_num_experts", "64", ERN_ERR_FILE, "moe_num_experts must be a whole number from 0 to 0"},
    {1, "moe_num_experts", NULL, ERN_ERR_FILE, "moe_num_experts is missing"},
    {1, "moe_num_experts", "[64,64]", ERN_ERR_FILE, "found [64,64]"},
    {1, "moe_num_experts", "513", ERN_ERR_FILE, "from 1 to 512"},
    {1, "moe_k", NULL, ERN_ERR_FILE, "moe_k is missing"},
    {1, "moe_k", "65", ERN_ERR_FILE, "moe_k must be a whole number from 1 to 64, found 65"},
    {1, "moe_k", "0", ERN_ERR_FILE, "moe_k must be"},
    {1, "moe_intermediate_size", NULL, ERN_ERR_FILE, "moe_intermediate_size is missing"},
    {1, "moe_intermediate_size", "[1536,512]", ERN_ERR_FILE, "found [1536,512]"},
    {1, "moe_num_shared_experts", "65", ERN_ERR_FILE, "moe_num_shared_experts must be"},
    {1, "moe_num_shared_experts", "-1", ERN_ERR_FILE, "moe_num_shared_experts must be"},
    {1, "moe_layer_start_index", NULL, ERN_ERR_FILE, "moe_layer_start_index is missing"},
    {1, "moe_layer_start_index", "-1", ERN_ERR_FILE, "moe_layer_start_index must be"},
    {1, "moe_layer_start_index", "29", ERN_ERR_FILE, "from 0 to 28"},
    {1, "moe_layer_end_index", "28", ERN_ERR_FILE, "from -1 to 27, found 28"},
    {1, "moe_layer_interval", "0", ERN_ERR_FILE, "moe_layer_interval must be"},
    {1, "moe_gate", "\"top2\"", ERN_ERR_UNSUPPORTED, "moe_gate is \"top2\"; only \"topk\""},
    {1, "moe_gate_act", "\"sigmoid\"", ERN_ERR_UNSUPPORTED, "moe_gate_act is \"sigmoid\"; only \"softmax\""},
    {1, "moe_norm_gate_logits", "false", ERN_ERR_UNSUPPORTED, "moe_norm_gate_logits"},
    {1, "moe_norm_min", "-1", ERN_ERR_FILE, "moe_norm_min must be"},
    {1, "moe_use_aux_free", "\"yes\"", ERN_ERR_FILE, "moe_use_aux_free must be true or false"},
    {1, "num_nextn_predict_layers", "2", ERN_ERR_FILE, "num_nextn_predict_layers must be a whole number from 0 to 1"},
    {0, "bos_token_id", "103424", ERN_ERR_FILE, "bos_token_id must be a whole number from 0 to 103423"},
    {0, "pad_token_id", "-2", ERN_ERR_FILE, "pad_token_id must be"},
    {0, "eos_token_id", "103424", ERN_ERR_FILE, "eos_token_id must be ids below vocab_size, found 103424"},
    {0, "eos_token_id", "[2,\"</s>\"]", ERN_ERR_FILE, "eos_token_id"},
    {0, "eos_token_id", "[2,-1]", ERN_ERR_FILE, "eos_token_id"},
    {0, "eos_token_id", "[1,2,3,4,5,6,7,8,9]", ERN_ERR_FILE, "more than 8"},
};

static void refused(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof bad_table / sizeof *bad_table; i++) {
        const bad_case *b = &bad_table[i];
        ern_config c;
        config_hints h;
        ern_err err;
        char *text = edit(b->moe ? moe_paddle : dense_pt, b->key, b->value);
        ern_status s = parse(text, &c, &h, &err);
        if (s != (ern_status)b->code || err.code != b->code || !strstr(err.text, b->says) ||
            strncmp(err.text, "config.json: ", 13) != 0)
            fail_msg("%s = %s: status %d, text %s, expected %s", b->key, b->value ? b->value : "(absent)", s, err.text,
                     b->says);
        free(text);
    }
}

typedef struct good_case {
    bool moe;
    const char *key, *value;
    size_t offset; /* of the int32_t in ern_config that must then be `expected` */
    int32_t expected;
} good_case;
#define AT(field) offsetof(ern_config, field)

static const good_case good_table[] = {
    {0, "architectures", "[\"Ernie4_5ForCausalLM\"]", AT(n_layer), 18},
    {1, "architectures", "[\"Ernie4_5MoeForCausalLM\"]", AT(n_layer), 28},
    {1, "architectures", NULL, AT(n_expert), 64},
    {0, "model_type", NULL, AT(n_expert), 0},
    {1, "model_type", NULL, AT(n_expert), 64},
    {0, "num_key_value_heads", NULL, AT(n_kv_head), 16},
    {0, "head_dim", NULL, AT(n_head_dim), 64},
    {0, "max_position_embeddings", NULL, AT(n_position), 512},
    {1, "moe_layer_end_index", "-1", AT(moe_last), 27},
    {1, "moe_layer_end_index", "9", AT(moe_last), 9},
    {1, "moe_layer_interval", NULL, AT(moe_interval), 1},
    {1, "moe_num_shared_experts", NULL, AT(n_shared_expert), 0},
    {1, "num_nextn_predict_layers", NULL, AT(n_mtp), 0},
    {1, "moe_k", "64", AT(n_expert_used), 64},
    {0, "pad_token_id", "null", AT(pad), -1},
    {0, "bos_token_id", NULL, AT(bos), -1},
    {0, "eos_token_id", NULL, AT(n_eos), 0},
    {0, "eos_token_id", "[2,2,7]", AT(n_eos), 2},
    {0, "rope_scaling", "null", AT(n_layer), 18},
    {0, "rope_scaling", "{\"rope_type\":\"default\"}", AT(n_layer), 18},
    {0, "compression_ratio", "1.0", AT(n_layer), 18},
    {0, "quantization_config", "{}", AT(n_layer), 18},
    {0, "sliding_window", "false", AT(n_layer), 18},
    {0, "use_qk_norm", "false", AT(n_layer), 18},
    {0, "attn_logit_softcapping", "0.0", AT(n_layer), 18},
    {1, "routed_scaling_factor", "1.0", AT(n_layer), 28},
    {0, "some_future_key", "{\"a\":[1,2,{\"b\":null}]}", AT(n_layer), 18},
    {0, "dtype", "\"bfloat16\"", AT(n_layer), 18},
};

static void fallbacks(void **state) {
    (void)state;
    ern_config c;
    config_hints h;
    ern_err err;
    for (size_t i = 0; i < sizeof good_table / sizeof *good_table; i++) {
        const good_case *g = &good_table[i];
        int32_t found;
        char *text = edit(g->moe ? moe_paddle : dense_pt, g->key, g->value);
        if (parse(text, &c, &h, &err) != ERN_OK)
            fail_msg("%s = %s: %s", g->key, g->value ? g->value : "(absent)", err.text);
        memcpy(&found, (const char *)&c + g->offset, sizeof found);
        if (found != g->expected) fail_msg("%s: expected %d, found %d", g->key, g->expected, found);
        free(text);
    }
    char *text = edit(dense_pt, "rope_theta", NULL), *inner;
    assert_int_equal(parse(text, &c, &h, &err), ERN_OK);
    assert_true(fabs(c.rope_theta - 10000) < 1e-9);
    inner = edit(text, "rope_parameters", "{\"rope_type\":\"default\",\"rope_theta\":500000.0}");
    assert_int_equal(parse(inner, &c, &h, &err), ERN_OK);
    assert_true(fabs(c.rope_theta - 500000) < 1e-9);
    free(text);
    free(inner);
    text = edit(dense_pt, "tie_word_embeddings", NULL);
    assert_int_equal(parse(text, &c, &h, &err), ERN_OK);
    assert_false(c.tied_head);
    free(text);
    text = edit(dense_pt, "rms_norm_eps", NULL);
    assert_int_equal(parse(text, &c, &h, &err), ERN_OK);
    assert_true(fabsf(c.rms_eps - 1e-5f) < 1e-12f);
    free(text);
    text = edit(moe_paddle, "moe_use_aux_free", NULL);
    assert_int_equal(parse(text, &c, &h, &err), ERN_OK);
    assert_int_equal(h.aux_free, -1);
    free(text);
}

/* Keys that nobody knows are told by name; those of the published files are all known. */
static void unknown_keys(void **state) {
    (void)state;
    ern_config c;
    config_hints h;
    ern_err err;
    assert_int_equal(parse(dense_pt, &c, &h, &err), ERN_OK);
    assert_string_equal(h.unknown, "");
    assert_int_equal(parse(moe_paddle, &c, &h, &err), ERN_OK);
    assert_string_equal(h.unknown, "");
    char *one = edit(dense_pt, "some_future_key", "{\"a\":1}"), *two, *many;
    two = edit(one, "rope_scaling", "{\"mrope section\":[1]}");
    assert_int_equal(parse(two, &c, &h, &err), ERN_OK);
    assert_non_null(strstr(h.unknown, "some_future_key"));
    assert_non_null(strstr(h.unknown, "rope_scaling.mrope?section"));
    free(one);
    one = two;
    for (int i = 0; i < 40; i++) {
        char key[32];
        snprintf(key, sizeof key, "some_other_key_%d", i);
        many = edit(one, key, "1");
        free(one);
        one = many;
    }
    assert_int_equal(parse(one, &c, &h, &err), ERN_OK);
    assert_true(strlen(h.unknown) < sizeof h.unknown);
    assert_string_equal(h.unknown + strlen(h.unknown) - 4, " ...");
    free(one);
}

/* The config of an MTP folder: whatever it has in common with the main one must agree. */
static void mtp_config(void **state) {
    (void)state;
    ern_config c;
    config_hints h;
    ern_err err;
    assert_int_equal(parse(moe_paddle, &c, &h, &err), ERN_OK);
    static const struct {
        const char *text, *says; /* NULL: good */
    } file[] = {
        {"{}", NULL},
        {"{\"architectures\":[\"Ernie4_5_MTPForCausalLM\"],\"num_hidden_layers\":1,\"hidden_size\":2560}", NULL},
        {"{\"hidden_size\":1024}", "mtp/config.json: hidden_size is 1024 and the model's own config says 2560"},
        {"{\"rms_norm_eps\":1e-6}", "rms_norm_eps"},
        {"{\"rope_theta\":10000}", "rope_theta"},
        {"{\"vocab_size\":\"x\"}", "vocab_size"},
        {"[]", "JSON object"}};
    for (size_t i = 0; i < sizeof file / sizeof *file; i++) {
        memset(&err, 0, sizeof err);
        ern_status s = config_compare(&c, file[i].text, strlen(file[i].text), "mtp/config.json", &err);
        if (file[i].says ? s != ERN_ERR_FILE || !strstr(err.text, file[i].says) : s != ERN_OK)
            fail_msg("%s: %d %s", file[i].text, s, err.text);
    }
    char *same = strdup(moe_paddle);
    assert_int_equal(config_compare(&c, same, strlen(same), "mtp/config.json", &err), ERN_OK);
    free(same);
}

static void not_json(void **state) {
    (void)state;
    static const char *const text[] = {"",
                                       "{",
                                       "[]",
                                       "null",
                                       "\"x\"",
                                       "{\"a\":1,\"a\":2}",
                                       "{\"a\":1e999}",
                                       "{} {}",
                                       "\xff\xfe{}",
                                       "{\"a\":[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]}",
                                       "{\"a\":NaN}"};
    for (size_t i = 0; i < sizeof text / sizeof *text; i++) {
        ern_config c;
        config_hints h;
        ern_err err;
        assert_int_equal(parse(text[i], &c, &h, &err), ERN_ERR_FILE);
        assert_int_equal(err.code, ERN_ERR_FILE);
        assert_non_null(strstr(err.text, "config.json"));
        assert_null(strchr(err.text, '\n'));
    }
}

static ern_status generation(ern_config *c, const char *text, ern_err *err) {
    config_hints h;
    assert_int_equal(parse(dense_pt, c, &h, err), ERN_OK);
    return config_parse_generation(c, text, strlen(text), "generation_config.json", err);
}

static void generation_file(void **state) {
    (void)state;
    ern_config c;
    ern_err err;
    assert_int_equal(
        generation(&c,
                   "{\"do_sample\":true,\"temperature\":0.8,\"top_p\":0.75,\"top_k\":50,\"repetition_penalty\":1.1,"
                   "\"frequency_penalty\":-0.5,\"presence_penalty\":0.5,\"bos_token_id\":1,"
                   "\"eos_token_id\":[2,100272],\"pad_token_id\":0,\"transformers_version\":\"4\"}",
                   &err),
        ERN_OK);
    assert_true(fabsf(c.temperature - 0.8f) < 1e-7f && fabsf(c.top_p - 0.75f) < 1e-7f && c.top_k == 50);
    assert_true(fabsf(c.repetition - 1.1f) < 1e-6f && fabsf(c.frequency + 0.5f) < 1e-7f &&
                fabsf(c.presence - 0.5f) < 1e-7f);
    assert_int_equal(c.n_eos, 2);
    assert_int_equal(c.eos[0], 2);
    assert_int_equal(c.eos[1], 100272);
    assert_int_equal(generation(&c, "{}", &err), ERN_OK);
    assert_true(isnan(c.temperature) && isnan(c.repetition) && c.top_k == -1 && c.n_eos == 1);
    static const struct {
        const char *text, *says;
    } bad[] = {
        {"[]", "JSON object"},
        {"{\"temperature\":-0.1}", "temperature must be a number from 0 to 100, found -0.1"},
        {"{\"temperature\":\"hot\"}", "temperature"},
        {"{\"top_p\":1.5}", "top_p"},
        {"{\"top_k\":1.5}", "top_k"},
        {"{\"top_k\":-2}", "top_k"},
        {"{\"repetition_penalty\":0}", "repetition_penalty"},
        {"{\"frequency_penalty\":3}", "frequency_penalty"},
        {"{\"presence_penalty\":-2.5}", "presence_penalty"},
        {"{\"do_sample\":1}", "do_sample"},
        {"{\"eos_token_id\":[103424]}", "eos_token_id"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(generation(&c, bad[i].text, &err), ERN_ERR_FILE);
        if (!strstr(err.text, bad[i].says) || !strstr(err.text, "generation_config.json"))
            fail_msg("%s: %s", bad[i].text, err.text);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(published),       cmocka_unit_test(refused),    cmocka_unit_test(fallbacks),
        cmocka_unit_test(unknown_keys),    cmocka_unit_test(mtp_config), cmocka_unit_test(not_json),
        cmocka_unit_test(generation_file),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
