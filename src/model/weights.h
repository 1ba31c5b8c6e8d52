/* From named tensors to the model's table of weights: private to `model`.
 *
 * Hides both layouts' names and orders. Each tensor is asked for by name with the one shape that the config allows;
 * what is asked for twice, never, or with another shape is an error that names it. Source: docs/model.md 2. */
#ifndef ERN_MODEL_WEIGHTS_H
#define ERN_MODEL_WEIGHTS_H

#include "model/checkpoint.h"
#include "model/config.h"

/* A linear to be quantized while loading, in the order of the table. */
typedef struct quant_job {
    ern_linear *to;    /* still the window that it will be made from */
    ckpt_tensor *from; /* which holds it, perhaps with its neighbours */
    ern_quant as;
    bool stays; /* the tensor is read later too: a tied head's embedding */
} quant_job;

struct ern_model_files {
    ern_arena arena;
    checkpoint main, mtp; /* mtp: a folder of its own; n_file 0 when there is none */
    quant_job *job;       /* malloc'd */
    int32_t n_job, cap_job;
    void *block; /* mmapped: what was quantized while loading */
    size_t block_bytes;
};

/* Quantize what the jobs say, all processors at once, into one block on huge pages, and let the bf16 pages go; with
 * plan_only only place it. m->weight_bytes and m->owned_bytes are brought up to date.
 * Errors: ERN_ERR_MEMORY naming the bytes, ERN_ERR_FILE naming a tensor that holds NaN or infinity, ERN_ERR_CANCELLED.
 */
ERN_MUST_CHECK ern_status quant_load(ern_model *m, const ern_model_options *o, ern_err *err);
void quant_load_free(struct ern_model_files *f);

/* Fill embed, layer, norm, head, mtp, has_mtp, is_paddle, weight_bytes of *m from m->files, using m->config (whose
 * has_bias is set here, from the tensors) and m->quant; hints->quantized says whether the files hold it, or whether the
 * jobs of m->files are to be listed. */
ERN_MUST_CHECK ern_status weights_fill(ern_model *m, const config_hints *hints, ern_err *err);

#endif
