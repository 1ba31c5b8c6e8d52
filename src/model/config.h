/* Reading config.json and generation_config.json: private to `model`.
 *
 * Hides the key names, the fallbacks for absent keys and every range check. What a checkpoint says that ernest cannot
 * compute (biases, scaled RoPE, other activations) is refused here, by name, before a tensor is looked at. */
#ifndef ERN_MODEL_CONFIG_H
#define ERN_MODEL_CONFIG_H

#include "model/model.h"

/* What config.json says about things that the tensors decide: only compared with them. */
typedef struct config_hints {
    int aux_free;      /* moe_use_aux_free: 1, 0, or -1 when the key is absent */
    bool torch_dtype;  /* the key torch_dtype is there: only the PyTorch layout has it */
    char unknown[512]; /* keys that ernest does not know, a blank between; "" when there are none */
    bool quantized;    /* the files hold tiles, by this plan */
    ern_quant_plan quant;
    ern_kv_codes kv_codes; /* what the KV cache is to be */
} config_hints;

/* Check the text of a config.json and fill *out and *hints (both cleared first). `what` names the file in errors.
 * Errors: ERN_ERR_FILE, ERN_ERR_UNSUPPORTED. Source: docs/model.md 1. */
ERN_MUST_CHECK ern_status config_parse(ern_config *out, config_hints *hints, const char *text, size_t len,
                                       const char *what, ern_err *err);
/* Refuse the text of an MTP folder's config.json when it describes another model than *c. It is no config of a model by
 * itself: only what it shares with the main one is looked at, and only where it is there. */
ERN_MUST_CHECK ern_status config_compare(const ern_config *c, const char *text, size_t len, const char *what,
                                         ern_err *err);
/* Check the text of a generation_config.json and merge it into *c, which config_parse filled. */
ERN_MUST_CHECK ern_status config_parse_generation(ern_config *c, const char *text, size_t len, const char *what,
                                                  ern_err *err);

#endif
