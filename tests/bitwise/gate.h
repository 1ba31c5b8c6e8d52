/* A backend with a gate before each result, so that all of a crowd is there before any of it has got a token. One at a
 * time: what it stands before is global. */
#ifndef ERN_TESTS_BITWISE_GATE_H
#define ERN_TESTS_BITWISE_GATE_H

#include <stdatomic.h>

#include "backend/backend.h"

extern atomic_bool gate_shut;
extern atomic_int gate_pause_us; /* before each result: time for what runs beside the steps */
/* ops behind the gate; static, until the next call. */
const ern_backend_ops *gate(const ern_backend_ops *ops);

#endif
