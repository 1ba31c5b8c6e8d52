/* Names of quantizations, from flags (--quantization, --lm-head-quantization; even first byte) and from a config.json's
 * quantization_config (odd): whatever is accepted is a plan that a checkpoint can say of itself and be read back from.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/jsonr.h"
#include "model/quant_plan.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const ern_quant_plan *p, ern_kv_codes kv_codes) {
    ERN_ASSERT(p->dense >= ERN_QUANT_NONE && p->dense <= ERN_QUANT_FP8);
    ERN_ASSERT(p->expert >= ERN_QUANT_NONE && p->expert <= ERN_QUANT_FP8);
    ERN_ASSERT(p->head == ERN_QUANT_NONE || p->head == ERN_QUANT_WINT8);
    char text[ERN_QUANT_TEXT_BYTES];
    ERN_ASSERT(strlen(ern_quant_text(text, p)) < ERN_QUANT_TEXT_BYTES - 1); /* none was cut */
    if (!ern_quant_any(p)) return;
    static const char config[] = "{\"a\": [1, {}]} \n";
    ern_buf b;
    json_t *root;
    quant_config again;
    ern_buf_init(&b, 4096);
    ERN_ASSERT(quant_config_add(&b, config, sizeof config - 1, p, kv_codes));
    ERN_ASSERT(ern_json_parse(&root, b.data, b.len, 8, "config.json", NULL) == ERN_OK);
    ERN_ASSERT(json_object_size(root) == 2);
    ERN_ASSERT(quant_config_read(&again, json_object_get(root, "quantization_config"), "config.json", NULL) == ERN_OK);
    const ern_quant_plan *q = &again.plan;
    ERN_ASSERT(again.weights && again.kv_codes == kv_codes);
    ERN_ASSERT(q->dense == p->dense && q->expert == p->expert && q->head == p->head);
    json_decref(root);
    ern_buf_free(&b);
}

/* text, or text NUL head. */
static void flags(const char *text, size_t len) {
    const size_t n = strlen(text);
    ern_quant_plan p;
    ern_err err = {0};
    ern_status s = ern_quant_parse(&p, text, n < len ? text + n + 1 : NULL, &err);
    if (s == ERN_OK)
        check(&p, (ern_kv_codes)(len % 3));
    else
        ERN_ASSERT(s == ERN_ERR_USAGE && err.code == s && strlen(err.text) > 16);
}

static void stored(const char *text, size_t len) {
    json_t *v;
    quant_config c;
    ern_err err = {0};
    if (ern_json_parse(&v, text, len, 8, "config.json", NULL) != ERN_OK) return;
    ern_status s = quant_config_read(&c, v, "config.json", &err);
    if (s == ERN_OK) {
        check(&c.plan, c.kv_codes);
        ERN_ASSERT(ern_quant_any(&c.plan) == c.weights);
    } else {
        ERN_ASSERT((s == ERN_ERR_FILE || s == ERN_ERR_UNSUPPORTED) && err.code == s && strlen(err.text) > 16);
    }
    json_decref(v);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 1) return 0;
    char *text = malloc(size); /* NUL-ended, and a heap block that ends there */
    if (!text) abort();
    memcpy(text, data + 1, size - 1);
    text[size - 1] = 0;
    (data[0] & 1 ? stored : flags)(text, size - 1);
    free(text);
    return 0;
}
