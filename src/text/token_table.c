/* The tokens of a tokenizer as a table. See token_table.h. */
#include "text/token_table.h"

#include <stdlib.h>
#include <string.h>

void token_table_init(token_table *t) {
    *t = (token_table){0};
    ern_arena_open(&t->arena, 0);
}

void token_table_free(token_table *t) {
    ern_arena_close(&t->arena);
    free(t->token);
    free(t->slot);
    free(t->node);
    *t = (token_table){0};
}

static uint32_t hash_name(const char *s, size_t len) {
    uint64_t h = 0xcbf29ce484222325ull;
    for (size_t i = 0; i < len; i++) h = (h ^ (unsigned char)s[i]) * 0x100000001b3ull;
    return (uint32_t)(h ^ h >> 32);
}

/* The slot of a name: its own, or the empty one where it would go. */
static uint32_t find_slot(const token_table *t, const char *name, size_t len) {
    uint32_t i = hash_name(name, len) & (t->n_slot - 1);
    for (;; i = (i + 1) & (t->n_slot - 1)) {
        if (t->slot[i] < 0) return i;
        const token *k = &t->token[t->slot[i]];
        if (k->n_name == len && memcmp(k->name, name, len) == 0) return i;
    }
}

int32_t token_table_find(const token_table *t, const char *name, size_t len) {
    return t->n_slot ? t->slot[find_slot(t, name, len)] : -1;
}

/* Room for ids up to and including id. */
static bool grow_tokens(token_table *t, int32_t id) {
    ERN_ASSERT(id >= 0 && id < TOKEN_IDS_MAX);
    if (id >= t->cap) {
        int32_t cap = t->cap ? t->cap : 1024;
        while (cap <= id) cap *= 2;
        token *grown = realloc(t->token, (size_t)cap * sizeof *grown);
        if (!grown) return false;
        memset(grown + t->cap, 0, (size_t)(cap - t->cap) * sizeof *grown);
        t->token = grown;
        t->cap = cap;
    }
    if (id >= t->n) t->n = id + 1;
    return true;
}

static bool grow_slots(token_table *t) {
    if (2 * (t->n_used + 1) <= t->n_slot) return true;
    uint32_t n_old = t->n_slot, n = n_old ? 2 * n_old : 2048;
    int32_t *old = t->slot, *slot = malloc(n * sizeof *slot);
    if (!slot) return false;
    memset(slot, 0xff, n * sizeof *slot);
    t->slot = slot;
    t->n_slot = n;
    for (uint32_t i = 0; i < n_old; i++)
        if (old[i] >= 0) slot[find_slot(t, t->token[old[i]].name, t->token[old[i]].n_name)] = old[i];
    free(old);
    return true;
}

bool token_table_add(token_table *t, int32_t id, const char *name, size_t n_name, const char *bytes, size_t n_bytes) {
    if (!grow_tokens(t, id) || !grow_slots(t)) return false;
    token *k = &t->token[id];
    uint32_t at = find_slot(t, name, n_name);
    ERN_ASSERT(!k->name && t->slot[at] < 0);
    k->name = ern_arena_text(&t->arena, name, n_name);
    k->bytes = ern_arena_text(&t->arena, bytes, n_bytes);
    k->n_name = (uint32_t)n_name;
    k->n_bytes = (uint32_t)n_bytes;
    if (!k->name || !k->bytes) return false;
    t->slot[at] = id;
    t->n_used++;
    return true;
}

/* ---- the trie of special names --------------------------------------------------------------------------------- */

static int32_t child_of(const token_table *t, int32_t node, char byte) {
    int32_t c = t->node[node].child;
    while (c && t->node[c].byte != byte) c = t->node[c].sibling;
    return c;
}

/* A new node, or -1 when out of memory. */
static int32_t new_node(token_table *t, char byte) {
    if (t->n_node == t->cap_node) {
        int32_t cap = t->cap_node ? 2 * t->cap_node : 256;
        name_node *grown = cap <= 1 << 28 ? realloc(t->node, (size_t)cap * sizeof *grown) : NULL;
        if (!grown) return -1;
        t->node = grown;
        t->cap_node = cap;
    }
    t->node[t->n_node] = (name_node){.id = -1, .byte = byte};
    return t->n_node++;
}

bool token_table_seal(token_table *t) {
    t->n_node = 0;
    if (new_node(t, 0) < 0) return false;
    for (int32_t id = 0; id < t->n; id++) {
        if (!t->token[id].name || !t->token[id].split) continue;
        int32_t at = 0;
        for (const char *s = t->token[id].name; *s; s++) {
            int32_t c = child_of(t, at, *s);
            if (!c) {
                c = new_node(t, *s);
                if (c < 0) return false;
                t->node[c].sibling = t->node[at].child;
                t->node[at].child = c;
            }
            at = c;
        }
        t->node[at].id = id;
    }
    return true;
}

int32_t token_table_match(const token_table *t, const char *text, size_t len) {
    int32_t at = 0, best = -1;
    for (size_t i = 0; i < len; i++) {
        at = child_of(t, at, text[i]);
        if (!at) break;
        if (t->node[at].id >= 0) best = t->node[at].id;
    }
    return best;
}
