/* config.json and generation_config.json: whatever is accepted is a geometry that can be computed with. The input is
 * one text, or two cut by a NUL. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "model/config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const ern_config *c) {
    ERN_ASSERT(c->n_vocab > 0 && c->n_hidden > 0 && c->n_layer > 0 && c->n_layer <= ERN_LAYERS_MAX && c->n_ffn > 0);
    ERN_ASSERT(c->n_head > 0 && c->n_kv_head > 0 && c->n_head % c->n_kv_head == 0);
    ERN_ASSERT(c->n_head_dim >= 2 && c->n_head_dim % 2 == 0 && c->n_position > 0);
    ERN_ASSERT(c->n_expert >= 0 && c->n_expert <= ERN_EXPERTS_MAX && c->n_mtp >= 0 && c->n_mtp <= 1);
    ERN_ASSERT(c->rms_eps > 0 && c->rope_theta >= 1 && isfinite(c->rope_theta));
    if (c->n_expert) {
        ERN_ASSERT(c->n_expert_used >= 1 && c->n_expert_used <= c->n_expert && c->n_expert_ffn > 0);
        ERN_ASSERT(c->moe_interval >= 1 && c->moe_first >= 0 && c->moe_last >= 0 && c->moe_last < c->n_layer);
    }
    for (int32_t i = 0; i < c->n_layer; i++) ERN_ASSERT(!ern_config_is_moe(c, i) || c->n_expert);
    ERN_ASSERT(c->n_eos >= 0 && c->n_eos <= ERN_EOS_MAX);
    for (int32_t i = 0; i < c->n_eos; i++) ERN_ASSERT(c->eos[i] >= 0 && c->eos[i] < c->n_vocab);
    ERN_ASSERT(c->bos < c->n_vocab && c->pad < c->n_vocab && c->bos >= -1 && c->pad >= -1);
    ERN_ASSERT(isnan(c->temperature) || c->temperature >= 0);
    ERN_ASSERT(isnan(c->top_p) || (c->top_p >= 0 && c->top_p <= 1));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const char *text = (const char *)data, *cut = size ? memchr(data, 0, size) : NULL;
    size_t len = cut ? (size_t)(cut - text) : size;
    ern_config c;
    config_hints hints;
    ern_err err = {0};
    ern_status s = config_parse(&c, &hints, text, len, "config.json", &err);
    if (s == ERN_OK && cut) s = config_parse_generation(&c, cut + 1, size - len - 1, "generation_config.json", &err);
    if (s == ERN_OK)
        check(&c);
    else
        ERN_ASSERT((s == ERN_ERR_FILE || s == ERN_ERR_UNSUPPORTED) && strlen(err.text) > 12);
    return 0;
}
