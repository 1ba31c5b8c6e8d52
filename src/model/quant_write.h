/* Writing a quantized checkpoint into a folder that is being made: private to `model`.
 *
 * One list of tensors, from the config alone, and two places where their bf16 rows come from: an open model, or the
 * formula of made weights. So `make-model --quantization` and `quantize` of the same weights write the same bytes.
 * Memory is bounded by a group of tensors' pages and a few rows per worker. Format: docs/model.md 9.4. */
#ifndef ERN_MODEL_QUANT_WRITE_H
#define ERN_MODEL_QUANT_WRITE_H

#include "model/making.h"
#include "model/weights.h"

typedef struct quant_source {
    const ern_config *config;
    bool has_mtp;
    const ern_model *model; /* bf16; or NULL: the made weights of */
    uint64_t seed;
} quant_source;

typedef struct quant_writing {
    const ern_quant_plan *plan;
    ern_kv_codes kv_codes; /* what the config asks of the KV cache, and goes on asking */
    uint64_t shard_bytes;  /* 0: 5 GB */
    ern_progress_fn *progress;
    void *ud;
} quant_writing;

/* Write weight files, their index when there is more than one, and config.json: `config` is the text of a bf16
 * checkpoint's, which gets our quantization_config. Errors: ERN_ERR_FILE naming the file or the tensor,
 * ERN_ERR_CANCELLED, ERN_ERR_MEMORY. */
ERN_MUST_CHECK ern_status quant_write(const quant_source *from, const quant_writing *w, const making *at,
                                      const ern_buf *config, ern_err *err);

#endif
