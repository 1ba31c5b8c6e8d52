/* What blocks of KV on disk belong to: the program, the weights, the number formats. A block that another fingerprint
 * wrote is never read, because the same tokens would have other keys and values there.
 * Owner: `ernest serve`. One thread. */
#ifndef ERN_CLI_FINGERPRINT_H
#define ERN_CLI_FINGERPRINT_H

#include <stdint.h>

#include "engine/engine.h"

/* XXH3-128 over the bytes of this program and of the backend's plugin, the backend and its kernels, the KV cache's
 * format, the formats in force of weights and activations, config.json, and the weight files as ern_model_fingerprint
 * sees them. o->model is open with its weights. Reads a few KiB of every tensor, never whole files. Errors:
 * ERN_ERR_FILE naming what could not be read. */
ERN_MUST_CHECK ern_status fingerprint_make(uint8_t out[16], const ern_engine_options *o, const char *config_name,
                                           ern_err *err);

#endif
