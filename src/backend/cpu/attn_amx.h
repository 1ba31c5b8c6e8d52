/* What the two attentions on AMX tiles, of bf16 and of int8 KV, share. Included by nothing else. */
#ifndef ERN_BACKEND_CPU_ATTN_AMX_H
#define ERN_BACKEND_CPU_ATTN_AMX_H

#include "backend/cpu/table_avx512.h"
#include "backend/cpu/vec_amx.h"

static inline int32_t tiles_of(int32_t n, int32_t each) { return (n + each - 1) / each; }

#endif
