/* What the two attentions on AMX tiles, of bf16 and of int8 KV, share. Included by nothing else. */
#ifndef ERN_BACKEND_CPU_ATTN_AMX_H
#define ERN_BACKEND_CPU_ATTN_AMX_H

#include "backend/cpu/table_avx512.h"
#include "backend/cpu/vec_amx.h"

static inline int32_t tiles_of(int32_t n, int32_t each) { return (n + each - 1) / each; }

/* Whether a run does not begin with a group of positions: pages of an odd size. */
static inline bool is_ragged(const cpu_kv_block *kv, int32_t n) {
    for (const cpu_kv_run *r = kv->run, *end = r + kv->n_run; r < end && r->t0 < n; r++)
        if (r->cut || r->t0 % 16 != 0) return true;
    return false;
}

#endif
