/* The cuda backend: the whole step on one GPU of compute capability 8.0 or more, weights packed into its memory, bf16
 * activations between f32 residual rows, KV in bf16, int8 or fp8.
 *
 * Linears multiply activations rounded to bf16 with what the weights' codes stand for. In a model with experts whose
 * layers' quantized weights are all fp8, or all int8 and int4, rows are quantized as well unless act_exact is set
 * (docs/model.md 9.2, from bf16 numbers), and products are of fp8 by fp8, or of integers; not the head's. KV pages are
 * laid out as cu_kernels.h draws them.
 *
 * It is compiled twice: for 9.0, whose own instructions most kernels are written with, and (CU_PORTABLE, portable/) for
 * all others, where rows are never quantized. Promises are the same; bits may be others.
 *
 * Hides everything but its table of operations. It is a shared object, loaded where a GPU is there; the step
 * (cu_step.c) queues the kernels of cu_kernels.h, or a graph of them. Includes nothing of the other backends. */
#ifndef ERN_BACKEND_CUDA_CUDA_H
#define ERN_BACKEND_CUDA_CUDA_H

#include "backend/backend.h"

extern const ern_backend_ops cuda_backend_ops;

/* NULL when a GPU is here that this backend can use; else one clause that says why not, without a full stop. Static
 * memory. The first call wakes the driver, which takes a moment. */
const char *cuda_missing(void);

#endif
