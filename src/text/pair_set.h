/* Which two characters ever stand beside each other inside a piece. Between any other two no merge can reach across, so
 * a text may be cut there and its parts encoded alone: long texts go through the library in short parts, which keeps
 * memory bounded and is several times faster (its heap then fits the cache). Private to room text. Filled while the
 * tokenizer opens, read-only after. */
#ifndef ERN_TEXT_PAIR_SET_H
#define ERN_TEXT_PAIR_SET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct pair_set {
    uint64_t *key; /* [n_slot] first character << 32 | second, 0 empty; linear probing, at most half full */
    size_t n_slot, n_used;
} pair_set;

/* A character's bytes packed into a number, never 0 but for NUL; a space counts as U+2581, as in the pieces. */
uint32_t pair_char(const char *s, size_t len);
/* Add every neighbouring pair of a piece's text. False: out of memory. */
bool pair_set_add(pair_set *p, const char *piece, size_t len);
bool pair_set_has(const pair_set *p, uint32_t first, uint32_t second);
void pair_set_free(pair_set *p);

#endif
