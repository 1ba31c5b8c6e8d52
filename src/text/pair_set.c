/* Which two characters ever stand beside each other inside a piece. See pair_set.h. */
#include "text/pair_set.h"

#include <stdlib.h>

#include "base/status.h"
#include "base/utf8.h"

uint32_t pair_char(const char *s, size_t len) {
    if (*s == ' ') return 0xe29681;
    uint32_t c = 0;
    for (size_t i = 0; i < len; i++) c = c << 8 | (unsigned char)s[i];
    return c;
}

static size_t slot_of(const pair_set *p, uint64_t key) {
    uint64_t h = key * 0x9e3779b97f4a7c15ull;
    size_t i = (size_t)(h >> 32) & (p->n_slot - 1);
    while (p->key[i] && p->key[i] != key) i = (i + 1) & (p->n_slot - 1);
    return i;
}

static bool grow(pair_set *p) {
    if (2 * (p->n_used + 1) <= p->n_slot) return true;
    pair_set bigger = {.n_slot = p->n_slot ? 2 * p->n_slot : 4096, .n_used = p->n_used};
    bigger.key = calloc(bigger.n_slot, sizeof *bigger.key);
    if (!bigger.key) return false;
    for (size_t i = 0; i < p->n_slot; i++)
        if (p->key[i]) bigger.key[slot_of(&bigger, p->key[i])] = p->key[i];
    free(p->key);
    *p = bigger;
    return true;
}

bool pair_set_add(pair_set *p, const char *piece, size_t len) {
    uint32_t before = 0;
    for (size_t i = 0, n; i < len; i += n) {
        n = ern_utf8_len(piece + i, len - i);
        ERN_ASSERT(n > 0); /* the reader of the file checked it */
        uint32_t c = pair_char(piece + i, n);
        if (before) {
            if (!grow(p)) return false;
            uint64_t key = (uint64_t)before << 32 | c;
            size_t at = slot_of(p, key);
            p->n_used += p->key[at] == 0;
            p->key[at] = key;
        }
        before = c;
    }
    return true;
}

bool pair_set_has(const pair_set *p, uint32_t first, uint32_t second) {
    return p->n_slot && p->key[slot_of(p, (uint64_t)first << 32 | second)] != 0;
}

void pair_set_free(pair_set *p) {
    free(p->key);
    *p = (pair_set){0};
}
