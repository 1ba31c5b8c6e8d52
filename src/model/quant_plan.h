/* What a quantized checkpoint says about itself in config.json: private to `model`.
 *
 *   "quantization_config": {"quant_method": "ernest", "format": 1, "quantization": "wint8", "is_quantized": true,
 *                           "dense_quant_type": "wint8", "moe_quant_type": "wint8", "lm_head_quant_type": "wint8"}
 *
 * Source: docs/model.md 9.4. */
#ifndef ERN_MODEL_QUANT_PLAN_H
#define ERN_MODEL_QUANT_PLAN_H

#include <jansson.h>

#include "base/buf.h"
#include "model/model.h"

enum { QUANT_FORMAT = 1 };

/* Read the value of quantization_config. `what` names the file. Errors: ERN_ERR_UNSUPPORTED for another maker's or a
 * later format, ERN_ERR_FILE for a broken one. */
ERN_MUST_CHECK ern_status quant_config_read(ern_quant_plan *out, const json_t *v, const char *what, ern_err *err);
/* A config.json with our quantization_config added as its last key: text, cut before its last brace, and the rest.
 * False: text does not end in a brace. */
bool quant_config_add(ern_buf *out, const char *text, size_t len, const ern_quant_plan *p);

#endif
