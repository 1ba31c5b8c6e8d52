/* A growing array of token ids with a hard limit. See text.h. */
#include <stdlib.h>

#include "text/text.h"

void ern_tokens_init(ern_tokens *t, size_t limit) { *t = (ern_tokens){.limit = limit}; }

bool ern_tokens_add(ern_tokens *t, int32_t id) {
    if (t->full || t->n >= t->limit) {
        t->full = true;
        return false;
    }
    if (t->n == t->cap) {
        size_t cap = t->cap ? t->cap * 2 : 64;
        if (cap > t->limit) cap = t->limit;
        int32_t *grown = cap <= SIZE_MAX / sizeof *grown ? realloc(t->id, cap * sizeof *grown) : NULL;
        if (!grown) {
            t->full = true;
            return false;
        }
        t->id = grown;
        t->cap = cap;
    }
    t->id[t->n++] = id;
    return true;
}

void ern_tokens_free(ern_tokens *t) {
    free(t->id);
    *t = (ern_tokens){.limit = t->limit};
}
