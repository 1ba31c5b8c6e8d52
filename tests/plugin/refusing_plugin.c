/* A plugin that takes no model, for ernest with a driver that is none (refusing_driver.c): what --backend auto does
 * when a GPU is there and its backend cannot compute the model. WORDS: what it says. */
#include "backend/plugin.h"

static ern_status refuse(ern_backend_plan *out, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    (void)out, (void)m, (void)o;
    *err = (ern_err){.code = ERN_ERR_UNSUPPORTED, .file = __FILE__, .line = __LINE__, .text = WORDS};
    return err->code;
}

static const char *missing(void) { return NULL; }

static void device(char *out, size_t size) {
    if (size > 0) *out = 0;
}

static const ern_backend_ops ops = {.name = "cuda", .plan = refuse};

extern const ern_plugin ern_cuda_plugin;
const ern_plugin ern_cuda_plugin = {.stamp = ERN_PLUGIN_STAMP_HERE, .ops = &ops, .missing = missing, .device = device};
