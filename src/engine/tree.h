/* The prefix tree: which full blocks of tokens are cached, and where.
 *
 * A node is one block of P tokens after the blocks of its ancestors, under one salt. It is found by a chained hash of
 * all that, and only after its parent, salt and tokens were compared: a collision costs a comparison, never a wrong
 * answer.
 *
 *   salt A   [system prompt 0] --- [system prompt 1] --- [question] --- [reply]
 *                                        `------------- [other question]
 *   salt B   [system prompt 0] ...       (the same tokens, another tenant: another node)
 *
 * A node is in one place, which is the list it is in; lists are in order of age, coldest first:
 *
 *   TREE_HELD   someone uses it (lock > 0), or it is arriving from below
 *   TREE_DIRTY  in the pool alone
 *   TREE_SAVING in the pool, being copied to host memory
 *   TREE_CLEAN  in the pool and in host memory: the pool's copy may go at once
 *   TREE_HOST   in host memory alone
 *
 * Whoever releases a path does it from its end to its beginning, so in every list a child is colder than its parent,
 * and the coldest node is a leaf: eviction is O(1) and never orphans what is still wanted.
 *
 * Knows nothing of pages, transfers or policy (cache.c). Owner: the cache. Thread: the engine thread. Memory: taken
 * once, from the layout. */
#ifndef ERN_ENGINE_TREE_H
#define ERN_ENGINE_TREE_H

#include "engine/pages.h"

enum { TREE_NONE = -1, TREE_SALT_BYTES = 16 };

typedef enum tree_place {
    TREE_FREE,
    TREE_HELD,
    TREE_DIRTY,
    TREE_SAVING,
    TREE_CLEAN,
    TREE_HOST,
    TREE_PLACES
} tree_place;
typedef enum tree_from { TREE_FROM_POOL, TREE_FROM_HOST, TREE_FROM_DISK, TREE_FROMS } tree_from;

typedef struct tree_key {
    uint64_t word[2];
} tree_key;

typedef struct tree_node {
    tree_key key;
    uint8_t salt[TREE_SALT_BYTES];
    int32_t parent;                /* TREE_NONE: the first block of a prompt */
    int32_t child, older, younger; /* first child; siblings */
    int32_t hash_next;             /* in its bucket */
    int32_t colder, warmer;        /* in its list */
    uint32_t gen;                  /* grows when the node is freed */
    int32_t lock;                  /* paths that hold it */
    int32_t n_pool_child;          /* children with a page in the pool */
    int32_t n_pin;                 /* transfers that read its page */
    page_hold page;                /* page.page TREE_NONE: not in the pool */
    int32_t host;                  /* host page or TREE_NONE */
    int32_t saving_to;             /* TREE_SAVING: the host page; an older copy may still be on its way to another */
    tree_place place;
    tree_from from; /* where it comes from while arriving */
    bool arriving;  /* its page is being filled: not to be read yet */
    bool to_disk;   /* it was queued to be written there */
    bool dead;      /* not found any more; freed with its last lock */
} tree_node;

typedef struct tree_list {
    int32_t coldest, warmest, n;
} tree_list;

typedef struct tree {
    int32_t n_node, n_used, block_tokens;
    tree_node *node; /* [n_node] */
    int32_t *token;  /* [n_node, block_tokens] */
    int32_t *bucket; /* [n_bucket], a power of two */
    uint32_t n_bucket;
    int32_t free;     /* chain of free nodes through hash_next */
    uint8_t *scratch; /* what is hashed */
    tree_list list[TREE_PLACES];
    uint64_t key_mask; /* tests: keep few bits of each key, so that blocks collide */
} tree;

void tree_open(tree *t, layout *l, int32_t n_node, int32_t block_tokens);
/* The key of a block after `parent` (NULL: none). token [block_tokens]. */
tree_key tree_key_of(tree *t, const tree_key *parent, const uint8_t *salt, const int32_t *token);
/* The node of this block, or TREE_NONE. key as tree_key_of gives it. */
int32_t tree_find(const tree *t, int32_t parent, const uint8_t *salt, const int32_t *token, tree_key key);
/* A new node, TREE_HELD, unlocked, with no page; TREE_NONE when all are used. The block must not be there yet. */
int32_t tree_add(tree *t, int32_t parent, const uint8_t *salt, const int32_t *token, tree_key key);
/* Take it out of the hash and away from its parent. Asserts that it is neither dead nor has children. */
void tree_kill(tree *t, int32_t i);
/* Forget a dead, unlocked node. */
void tree_forget(tree *t, int32_t i);
/* Move to the warm end of a list, or to TREE_HELD, which has no order. */
void tree_move(tree *t, int32_t i, tree_place place);
/* Give it a page in the pool, or take it away (page NULL), and keep its parent's count. */
void tree_set_page(tree *t, int32_t i, const page_hold *page);

static inline int32_t *tree_tokens(const tree *t, int32_t i) { return t->token + (int64_t)i * t->block_tokens; }

/* Walk everything but the counts that only the cache knows; false with *why when an invariant is broken. */
bool tree_check(const tree *t, const char **why);

#endif
