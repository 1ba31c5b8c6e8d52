/* The tokens of a tokenizer as a table: names, the bytes they stand for, which are special; names to ids; and the
 * longest special name at a place of a text. Private to room text. Filled once while the tokenizer opens, read-only
 * after, then any thread. Owner: the tokenizer. */
#ifndef ERN_TEXT_TOKEN_TABLE_H
#define ERN_TEXT_TOKEN_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/arena.h"
#include "base/status.h"

enum { TOKEN_IDS_MAX = 1 << 21, TOKEN_NAME_MAX = 1024 };

typedef struct token {
    const char *name;  /* NUL-ended; NULL: the id means nothing */
    const char *bytes; /* what it adds to a text, n_bytes of it */
    uint32_t n_name, n_bytes;
    bool special; /* left out of a text when specials are skipped */
    bool split;   /* its name in a prompt is this token, and no other token ever spells it */
} token;

/* A trie of the split tokens' names, children as a list of siblings. Node 0 is the root. */
typedef struct name_node {
    int32_t child, sibling; /* node, 0: none */
    int32_t id;             /* token whose name ends here, or -1 */
    char byte;
} name_node;

typedef struct token_table {
    token *token; /* [n] by id */
    int32_t n, cap;
    int32_t *slot; /* [n_slot] hash of names to ids, -1 empty; linear probing, at most half full */
    uint32_t n_slot, n_used;
    name_node *node; /* [n_node] */
    int32_t n_node, cap_node;
    ern_arena arena; /* names and bytes */
} token_table;

void token_table_init(token_table *t);
void token_table_free(token_table *t);
/* Name an id (0..TOKEN_IDS_MAX-1) that has no name yet, with a name that no id has; both are the caller's to check
 * (token_table_find, t->token[id].name). Names and bytes are copied. False: out of memory. */
bool token_table_add(token_table *t, int32_t id, const char *name, size_t n_name, const char *bytes, size_t n_bytes);
/* Id of an exact name, or -1. */
int32_t token_table_find(const token_table *t, const char *name, size_t len);
/* Build the trie from the tokens marked split. False: out of memory. */
bool token_table_seal(token_table *t);
/* The split token with the longest name that text begins with, or -1. At most TOKEN_NAME_MAX steps. */
int32_t token_table_match(const token_table *t, const char *text, size_t len);

#endif
