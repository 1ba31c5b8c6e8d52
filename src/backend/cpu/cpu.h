/* The cpu backend: the whole step on pinned threads, bf16 weights read where the file is mapped, f32 activations, bf16
 * KV.
 *
 * Hides everything but its table of operations. A table of kernels (cpu_kernels.h) is chosen once at open for what the
 * processor can do; the step (cpu_step.c) is the same for every level. Includes nothing of the other backends. */
#ifndef ERN_BACKEND_CPU_CPU_H
#define ERN_BACKEND_CPU_CPU_H

#include "backend/backend.h"

extern const ern_backend_ops cpu_backend_ops;

#endif
