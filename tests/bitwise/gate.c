/* The gate. See gate.h. */
#include "bitwise/gate.h"

#include <unistd.h>

atomic_bool gate_shut;
atomic_int gate_pause_us;

static ern_backend_ops gated;
static const ern_backend_ops *behind;

static ern_status gated_open(ern_backend **out, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    ern_status status = behind->open(out, m, o, err);
    if (status == ERN_OK) (*out)->ops = &gated;
    return status;
}

static ern_status gated_wait(ern_backend *b, ern_result *out, ern_err *err) {
    while (atomic_load(&gate_shut)) usleep(20);
    int pause_us = atomic_load(&gate_pause_us);
    if (pause_us > 0) usleep((useconds_t)pause_us);
    return behind->wait(b, out, err);
}

const ern_backend_ops *gate(const ern_backend_ops *ops) {
    behind = ops;
    gated = *ops;
    gated.open = gated_open;
    gated.wait = gated_wait;
    return &gated;
}
