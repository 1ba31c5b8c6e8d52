/* The names of quantizations: of flags, of config.json, for people. See model.h and quant_plan.h. */
#include "model/quant_plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/jsonr.h"

enum { N_QUANT = ERN_QUANT_FP8 + 1, DEPTH_MAX = 4 };

static const char *const name_of[N_QUANT] = {"none", "wint8", "wint4", "block_wise_fp8"};

#define MIX_EXAMPLE "{\"quantization\":\"mix_quant\",\"dense_quant_type\":\"wint4\",\"moe_quant_type\":\"wint4\"}"
#define VALUES \
    "there are none, wint8, wint4 (dense wint8, experts wint4), block_wise_fp8, and JSON such as " MIX_EXAMPLE

const char *ern_quant_name(ern_quant q) { return name_of[q]; }

ern_dtype ern_quant_dtype(ern_quant q) {
    ERN_ASSERT(q != ERN_QUANT_NONE);
    return q == ERN_QUANT_WINT8 ? ERN_DTYPE_I8 : q == ERN_QUANT_WINT4 ? ERN_DTYPE_I4 : ERN_DTYPE_F8E4M3;
}

bool ern_quant_any(const ern_quant_plan *p) { return p->dense || p->expert || p->head; }

/* One of the four names, or FastDeploy's older name for wint8. */
static bool quant_find(ern_quant *out, const char *name) {
    static const char *const old[] = {"weight_only_int8", "weight_only int8"};
    for (size_t i = 0; i < sizeof old / sizeof *old; i++)
        if (strcmp(name, old[i]) == 0) name = name_of[ERN_QUANT_WINT8];
    for (int i = 0; i < N_QUANT; i++)
        if (strcmp(name, name_of[i]) == 0) return *out = (ern_quant)i, true;
    return false;
}

/* ---- flags --------------------------------------------------------------------------------------------------------
 */

static ern_status unknown(const char *text, ern_err *err) {
    static const char *const of_others[] = {"wfp8afp8", "tensor_wise_fp8", "w8a8",  "w4a8",  "w4afp8",
                                            "wint2",    "kvcache",         "mxfp4", "nvfp4", "compressed_tensors"};
    for (size_t i = 0; i < sizeof of_others / sizeof *of_others; i++)
        if (strcmp(text, of_others[i]) == 0)
            return ERN_FAIL(err, ERN_ERR_USAGE, "--quantization %s is a format that ernest does not offer; " VALUES,
                            text);
    return ERN_FAIL(err, ERN_ERR_USAGE, "--quantization %.60s is unknown; " VALUES, text);
}

/* One word: what it means for both classes. FastDeploy turns wint4 for these models into dense wint8, experts wint4. */
static bool word_find(ern_quant_plan *out, const char *word) {
    if (!quant_find(&out->dense, word)) return false;
    out->expert = out->dense;
    if (out->dense == ERN_QUANT_WINT4) out->dense = ERN_QUANT_WINT8;
    return true;
}

static ern_status class_read(ern_quant *out, const char *key, const json_t *v, ern_err *err) {
    const char *word = json_string_value(v);
    if (word && quant_find(out, word)) return ERN_OK;
    return ERN_FAIL(err, ERN_ERR_USAGE, "--quantization: %s is %.40s; it must be none, wint8, wint4 or block_wise_fp8",
                    key, word ? word : "no text");
}

static ern_status object_read(ern_quant_plan *out, const json_t *o, ern_err *err) {
    const char *word = json_string_value(json_object_get(o, "quantization")), *key;
    const json_t *dense = json_object_get(o, "dense_quant_type"), *expert = json_object_get(o, "moe_quant_type");
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)o, key, v) {
        if (strcmp(key, "quantization") != 0 && strcmp(key, "dense_quant_type") != 0 &&
            strcmp(key, "moe_quant_type") != 0)
            return ERN_FAIL(err, ERN_ERR_USAGE,
                            "--quantization: the key %.60s is unknown; there are quantization, dense_quant_type and "
                            "moe_quant_type",
                            key);
    }
    if (!word)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--quantization: the key quantization is missing; give " MIX_EXAMPLE);
    if (strcmp(word, "mix_quant") != 0) {
        if (!word_find(out, word)) return unknown(word, err);
        if (!dense && !expert) return ERN_OK;
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--quantization: %s says both classes at once; give \"quantization\":\"mix_quant\" to choose "
                        "dense_quant_type and moe_quant_type",
                        word);
    }
    if (!dense)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--quantization: mix_quant needs dense_quant_type; give " MIX_EXAMPLE);
    ERN_TRY(class_read(&out->dense, "dense_quant_type", dense, err));
    out->expert = out->dense;
    return expert ? class_read(&out->expert, "moe_quant_type", expert, err) : ERN_OK;
}

static ern_status weights_parse(ern_quant_plan *out, const char *text, ern_err *err) {
    json_t *root;
    if (text[strspn(text, " \t\r\n")] != '{') return word_find(out, text) ? ERN_OK : unknown(text, err);
    ern_status s = ern_json_parse(&root, text, strlen(text), DEPTH_MAX, "--quantization", err);
    if (s != ERN_OK) {
        if (err) err->code = ERN_ERR_USAGE;
        return ERN_ERR_USAGE;
    }
    s = object_read(out, root, err);
    json_decref(root);
    return s;
}

ern_status ern_quant_parse(ern_quant_plan *out, const char *text, const char *head, ern_err *err) {
    *out = (ern_quant_plan){ERN_QUANT_NONE, ERN_QUANT_NONE, ERN_QUANT_NONE};
    if (text) ERN_TRY(weights_parse(out, text, err));
    if (!head) {
        out->head = ern_quant_any(out) ? ERN_QUANT_WINT8 : ERN_QUANT_NONE;
        return ERN_OK;
    }
    if (quant_find(&out->head, head) && (out->head == ERN_QUANT_NONE || out->head == ERN_QUANT_WINT8)) return ERN_OK;
    return ERN_FAIL(err, ERN_ERR_USAGE, "--lm-head-quantization %.60s is unknown; there are none and wint8", head);
}

/* ---- for people and for config.json --------------------------------------------------------------------------------
 */

static const char *plan_name(const ern_quant_plan *p) {
    if (p->dense == ERN_QUANT_WINT8 && p->expert == ERN_QUANT_WINT4) return name_of[ERN_QUANT_WINT4];
    return p->dense == p->expert && p->dense != ERN_QUANT_WINT4 ? name_of[p->dense] : "mix_quant";
}

static const char *stored(ern_quant q) { return q ? name_of[q] : "bf16"; }

const char *ern_quant_text(char out[ERN_QUANT_TEXT_BYTES], const ern_quant_plan *p) {
    if (!ern_quant_any(p))
        snprintf(out, ERN_QUANT_TEXT_BYTES, "bf16");
    else if (p->dense == p->expert && p->dense != ERN_QUANT_WINT4)
        snprintf(out, ERN_QUANT_TEXT_BYTES, "%s, head %s", stored(p->dense), stored(p->head));
    else
        snprintf(out, ERN_QUANT_TEXT_BYTES, "%s (dense %s, experts %s), head %s", plan_name(p), stored(p->dense),
                 stored(p->expert), stored(p->head));
    return out;
}

/* The object without its quantization_config, printed; NULL: it has none. */
static char *without_key(const char *text, size_t len) {
    json_t *root = json_loadb(text, len, 0, NULL);
    char *out = NULL;
    if (json_object_del(root, "quantization_config") == 0) out = json_dumps(root, JSON_INDENT(2));
    json_decref(root);
    return out;
}

bool quant_config_add(ern_buf *out, const char *text, size_t len, const ern_quant_plan *p, ern_kv_codes kv_codes) {
    char *less = without_key(text, len);
    if (less) {
        bool done = quant_config_add(out, less, strlen(less), p, kv_codes);
        free(less);
        return done;
    }
    while (len && strchr(" \t\r\n", text[len - 1])) len--;
    if (!len || text[--len] != '}') return false;
    while (len && strchr(" \t\r\n", text[len - 1])) len--;
    (void)ern_buf_add(out, text, len);
    return ern_buf_print(
        out,
        ",\n  \"quantization_config\": {\n    \"quant_method\": \"ernest\",\n    \"format\": %d,\n"
        "    \"quantization\": \"%s\",\n    \"is_quantized\": true,\n    \"dense_quant_type\": \"%s\",\n"
        "    \"moe_quant_type\": \"%s\",\n    \"lm_head_quant_type\": \"%s\"%s\n  }\n}\n",
        QUANT_FORMAT, plan_name(p), name_of[p->dense], name_of[p->expert], name_of[p->head],
        kv_codes == ERN_KV_CODES_INT8  ? ",\n    \"kv_cache_quant_type\": \"int8\""
        : kv_codes == ERN_KV_CODES_FP8 ? ",\n    \"kv_cache_quant_type\": \"block_wise_fp8\""
                                       : "");
}

static ern_status stored_read(ern_quant *out, const json_t *v, const char *key, const char *what, ern_err *err) {
    const char *word = json_string_value(json_object_get(v, key));
    if (word && quant_find(out, word)) return ERN_OK;
    return ERN_FAIL(err, ERN_ERR_FILE,
                    "%s: quantization_config: expected %s none, wint8, wint4 or block_wise_fp8, found %.40s", what, key,
                    word ? word : "none of them");
}

/* kv_cache_quant_type: our codes have a scale of their own for every token and head, so a checkpoint's fixed scales are
 * not needed. */
static ern_status kv_read(ern_kv_codes *out, const json_t *v, const char *what, ern_err *err) {
    const json_t *type = json_object_get(v, "kv_cache_quant_type");
    const char *word = json_string_value(type);
    static const struct {
        const char *word;
        ern_kv_codes codes;
    } known[] = {{"none", ERN_KV_CODES_NONE},
                 {"int8", ERN_KV_CODES_INT8},
                 {"cachekv_int8", ERN_KV_CODES_INT8},
                 {"block_wise_fp8", ERN_KV_CODES_FP8},
                 {"float8_e4m3fn", ERN_KV_CODES_FP8}};
    *out = ERN_KV_CODES_NONE;
    if (!type || json_is_null(type)) return ERN_OK;
    for (size_t i = 0; word && i < sizeof known / sizeof *known; i++) {
        if (strcmp(word, known[i].word) != 0) continue;
        *out = known[i].codes;
        return ERN_OK;
    }
    return ERN_FAIL(err, ERN_ERR_UNSUPPORTED,
                    "%s: kv_cache_quant_type is %.40s; ernest keeps keys and values in bf16, int8 or fp8: take the key "
                    "out, or write int8 or block_wise_fp8",
                    what, word ? word : "no text");
}

/* Paddle's, beside bf16 weights: only the KV cache is spoken of. */
static bool is_kv_only(const json_t *v) {
    const char *name = json_string_value(json_object_get(v, "quantization"));
    return name && strcmp(name, "kvcache") == 0 && !json_object_get(v, "quant_method") &&
           !json_is_true(json_object_get(v, "is_quantized")) && !json_is_true(json_object_get(v, "is_moe_quantized"));
}

ern_status quant_config_read(quant_config *out, const json_t *v, const char *what, ern_err *err) {
    ern_quant_plan *p = &out->plan;
    *out = (quant_config){.weights = !is_kv_only(v)};
    ERN_TRY(kv_read(&out->kv_codes, v, what, err));
    if (!out->weights) return ERN_OK;
    const char *maker = json_string_value(json_object_get(v, "quant_method"));
    if (!maker || strcmp(maker, "ernest") != 0)
        return ERN_FAIL(err, ERN_ERR_UNSUPPORTED,
                        "%s: quantization_config is of another maker (quant_method %.40s), whose weights ernest does "
                        "not read; give the bf16 checkpoint, with --quantization or after ernest quantize",
                        what, maker ? maker : "absent");
    const json_t *format = json_object_get(v, "format");
    if (!json_is_integer(format) || json_integer_value(format) != QUANT_FORMAT)
        return ERN_FAIL(err, ERN_ERR_UNSUPPORTED,
                        "%s: quantization_config: this ernest reads format %d only; quantize the bf16 checkpoint again",
                        what, QUANT_FORMAT);
    ERN_TRY(stored_read(&p->dense, v, "dense_quant_type", what, err));
    ERN_TRY(stored_read(&p->expert, v, "moe_quant_type", what, err));
    ERN_TRY(stored_read(&p->head, v, "lm_head_quant_type", what, err));
    const char *name = json_string_value(json_object_get(v, "quantization"));
    if (!name || strcmp(name, plan_name(p)) != 0)
        return ERN_FAIL(err, ERN_ERR_FILE,
                        "%s: quantization_config: expected quantization %s by the types beside it, found %.40s", what,
                        plan_name(p), name ? name : "no text");
    if (ern_quant_any(p) && (p->head == ERN_QUANT_NONE || p->head == ERN_QUANT_WINT8)) return ERN_OK;
    return ERN_FAIL(err, ERN_ERR_FILE,
                    "%s: quantization_config: expected a quantized class and a head that is none or wint8, found "
                    "dense %s, experts %s, head %s",
                    what, name_of[p->dense], name_of[p->expert], name_of[p->head]);
}
