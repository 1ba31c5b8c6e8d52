/* What a backend that is not in the program shows to the loader: one symbol, ern_cuda_plugin, of one type.
 *
 * A plugin has a copy of base and model of its own and shares the door's structs with the program, so both must be of
 * one build: the first member says which, by version and by the sizes of every struct that crosses, and a plugin that
 * says another is not called. Opened by plugin.c and by backend/cuda/cu_plugin.c alone. Owner: plugin.c keeps what it
 * loaded until the process ends. */
#ifndef ERN_BACKEND_PLUGIN_H
#define ERN_BACKEND_PLUGIN_H

#include "backend/backend.h"

enum { ERN_PLUGIN_SIZES = 16 };

/* Never change this struct: a plugin of any age must be able to say that it is of another build. */
typedef struct ern_plugin_stamp {
    char version[32];
    uint32_t size[ERN_PLUGIN_SIZES];
} ern_plugin_stamp;

#define ERN_PLUGIN_STAMP_HERE             \
    {                                     \
        .version = ERN_VERSION, .size = { \
            sizeof(ern_plugin),           \
            sizeof(ern_backend_ops),      \
            sizeof(ern_batch),            \
            sizeof(ern_result),           \
            sizeof(ern_backend_options),  \
            sizeof(ern_backend_plan),     \
            sizeof(ern_sample),           \
            sizeof(ern_sampled),          \
            sizeof(ern_model),            \
            sizeof(ern_config),           \
            sizeof(ern_layer),            \
            sizeof(ern_linear),           \
            sizeof(ern_mtp),              \
            sizeof(ern_quant_plan),       \
            sizeof(ern_page_pair),        \
            sizeof(ern_err)               \
        }                                 \
    }

typedef struct ern_plugin {
    ern_plugin_stamp stamp;
    const ern_backend_ops *ops;
    const char *(*missing)(void); /* as ern_backend_missing */
    /* As ern_backend_device, where nothing is missing. */
    void (*device)(char *out, size_t size);
} ern_plugin;

/* Load a file and look at its stamp; *out stays as it is on failure. NULL: good; else one clause that says why not,
 * which stays until the next call. One thread. */
const char *plugin_open(const ern_plugin **out, const char *path);
/* The cuda plugin's, loaded once; NULL: plugin_cuda_missing says why. Any thread. */
const ern_plugin *plugin_cuda(void);
const char *plugin_cuda_missing(void);
const char *plugin_cuda_file(void); /* NULL: not loaded */

#endif
