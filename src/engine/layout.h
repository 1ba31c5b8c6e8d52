/* Plan, allocate, seal: every table of the engine is taken through a layout, once to count the bytes (arena NULL) and
 * once to take them, so that the plan shown by --dry-run and the memory in use are the same lines of code. */
#ifndef ERN_ENGINE_LAYOUT_H
#define ERN_ENGINE_LAYOUT_H

#include <stdbool.h>
#include <stdint.h>

#include "base/arena.h"

typedef struct layout {
    ern_arena *arena; /* NULL: only count */
    uint64_t bytes;   /* asked for so far */
    bool out;         /* the machine had no more; everything taken after that is NULL */
} layout;

/* An array of n zeroed items; NULL while counting or when out. */
static inline void *layout_take(layout *l, int64_t n, size_t each_bytes) {
    l->bytes += (uint64_t)n * each_bytes + 64; /* 64: the arena's alignment */
    if (!l->arena || l->out) return NULL;
    void *p = ern_arena_take_n(l->arena, (size_t)n, each_bytes);
    if (!p) l->out = true;
    return p;
}

#define LAYOUT_NEW(l, T, n) ((T *)layout_take((l), (n), sizeof(T)))

#endif
