/* What a quantized checkpoint says about itself in config.json: private to `model`.
 *
 *   "quantization_config": {"quant_method": "ernest", "format": 1, "quantization": "wint8", "is_quantized": true,
 *                           "dense_quant_type": "wint8", "moe_quant_type": "wint8", "lm_head_quant_type": "wint8"}
 *
 * and, ours or Paddle's beside bf16 weights ("quantization": "kvcache"), "kv_cache_quant_type": "int8" or
 * "block_wise_fp8".
 *
 * Source: docs/model.md 9.4. */
#ifndef ERN_MODEL_QUANT_PLAN_H
#define ERN_MODEL_QUANT_PLAN_H

#include <jansson.h>

#include "base/buf.h"
#include "model/model.h"

enum { QUANT_FORMAT = 1 };

/* What a quantization_config says. */
typedef struct quant_config {
    bool weights; /* the files hold tiles, by this plan */
    ern_quant_plan plan;
    ern_kv_codes kv_codes;
} quant_config;

/* Read the value of quantization_config. `what` names the file. Errors: ERN_ERR_UNSUPPORTED for another maker's or a
 * later format, ERN_ERR_FILE for a broken one. */
ERN_MUST_CHECK ern_status quant_config_read(quant_config *out, const json_t *v, const char *what, ern_err *err);
/* A config.json with our quantization_config added as its last key: text, cut before its last brace, and the rest;
 * where it has that key already, text is printed anew without it. False: text is no JSON object. */
bool quant_config_add(ern_buf *out, const char *text, size_t len, const ern_quant_plan *p, ern_kv_codes kv_codes);

#endif
