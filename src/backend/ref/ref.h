/* The door of `ref`, for backend.c alone: the executable specification of the forward pass.
 *
 * One thread, no SIMD, f32 activations, every sum in double and in the order of its index: slow, small, and the law
 * that the other backends are compared with, stage by stage. docs/model.md says in words what this says in C. */
#ifndef ERN_BACKEND_REF_H
#define ERN_BACKEND_REF_H

#include "backend/backend.h"

extern const ern_backend_ops ref_backend_ops;

#endif
