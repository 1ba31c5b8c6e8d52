/* The prefix tree. See tree.h. */
#include "engine/tree.h"

#include <string.h>
#include <xxhash.h>

#include "base/status.h"

enum { KEY_BYTES = sizeof(tree_key) };

void tree_open(tree *t, layout *l, int32_t n_node, int32_t block_tokens) {
    *t = (tree){.n_node = n_node, .block_tokens = block_tokens, .n_bucket = 16, .free = TREE_NONE, .key_mask = ~0ull};
    while (t->n_bucket < (uint32_t)n_node) t->n_bucket *= 2;
    t->node = LAYOUT_NEW(l, tree_node, n_node);
    t->token = LAYOUT_NEW(l, int32_t, (int64_t)n_node * block_tokens);
    t->bucket = LAYOUT_NEW(l, int32_t, t->n_bucket);
    t->scratch = LAYOUT_NEW(l, uint8_t, KEY_BYTES + TREE_SALT_BYTES + (int64_t)sizeof(int32_t) * block_tokens);
    for (int k = 0; k < TREE_PLACES; k++) t->list[k] = (tree_list){TREE_NONE, TREE_NONE, 0};
    if (!l->arena || l->out) return;
    for (uint32_t k = 0; k < t->n_bucket; k++) t->bucket[k] = TREE_NONE;
    for (int32_t i = n_node - 1; i >= 0; i--) {
        t->node[i].hash_next = t->free;
        t->free = i;
    }
}

/* ---- keys ------------------------------------------------------------------------------------------------------ */

tree_key tree_key_of(tree *t, const tree_key *parent, const uint8_t *salt, const int32_t *token) {
    const size_t n = sizeof(int32_t) * (size_t)t->block_tokens;
    const tree_key none = {{0, 0}};
    memcpy(t->scratch, parent ? parent : &none, KEY_BYTES);
    memcpy(t->scratch + KEY_BYTES, salt, TREE_SALT_BYTES);
    memcpy(t->scratch + KEY_BYTES + TREE_SALT_BYTES, token, n);
    XXH128_hash_t h = XXH3_128bits(t->scratch, KEY_BYTES + TREE_SALT_BYTES + n);
    return (tree_key){{h.low64 & t->key_mask, h.high64 & t->key_mask}};
}

static int32_t *bucket_of(const tree *t, tree_key key) { return &t->bucket[key.word[0] & (t->n_bucket - 1)]; }

int32_t tree_find(const tree *t, int32_t parent, const uint8_t *salt, const int32_t *token, tree_key key) {
    for (int32_t i = *bucket_of(t, key); i != TREE_NONE; i = t->node[i].hash_next) {
        const tree_node *n = &t->node[i];
        if (n->key.word[0] == key.word[0] && n->key.word[1] == key.word[1] && n->parent == parent &&
            memcmp(n->salt, salt, TREE_SALT_BYTES) == 0 &&
            memcmp(tree_tokens(t, i), token, sizeof *token * (size_t)t->block_tokens) == 0)
            return i;
    }
    return TREE_NONE;
}

static void unhash(tree *t, int32_t i) {
    int32_t *at = bucket_of(t, t->node[i].key);
    while (*at != i) {
        ERN_ASSERT(*at != TREE_NONE);
        at = &t->node[*at].hash_next;
    }
    *at = t->node[i].hash_next;
}

/* ---- family ---------------------------------------------------------------------------------------------------- */

int32_t tree_add(tree *t, int32_t parent, const uint8_t *salt, const int32_t *token, tree_key key) {
    int32_t i = t->free;
    if (i == TREE_NONE) return TREE_NONE;
    tree_node *n = &t->node[i];
    t->free = n->hash_next;
    t->n_used++;
    uint32_t gen = n->gen;
    *n = (tree_node){.key = key,
                     .parent = parent,
                     .child = TREE_NONE,
                     .older = TREE_NONE,
                     .younger = TREE_NONE,
                     .colder = TREE_NONE,
                     .warmer = TREE_NONE,
                     .gen = gen,
                     .page = {.page = TREE_NONE},
                     .host = TREE_NONE,
                     .place = TREE_HELD};
    memcpy(n->salt, salt, TREE_SALT_BYTES);
    memcpy(tree_tokens(t, i), token, sizeof *token * (size_t)t->block_tokens);
    int32_t *bucket = bucket_of(t, key);
    n->hash_next = *bucket;
    *bucket = i;
    t->list[TREE_HELD].n++;
    if (parent == TREE_NONE) return i;
    tree_node *p = &t->node[parent];
    ERN_ASSERT(p->place != TREE_FREE && !p->dead);
    n->younger = p->child;
    if (p->child != TREE_NONE) t->node[p->child].older = i;
    p->child = i;
    return i;
}

void tree_kill(tree *t, int32_t i) {
    tree_node *n = &t->node[i];
    ERN_ASSERT(n->place != TREE_FREE && !n->dead && n->child == TREE_NONE);
    unhash(t, i);
    n->dead = true;
    if (n->older != TREE_NONE) t->node[n->older].younger = n->younger;
    if (n->younger != TREE_NONE) t->node[n->younger].older = n->older;
    if (n->parent != TREE_NONE) {
        tree_node *p = &t->node[n->parent];
        if (p->child == i) p->child = n->younger;
        if (n->page.page != TREE_NONE) p->n_pool_child--;
    }
    n->parent = n->older = n->younger = TREE_NONE;
}

void tree_forget(tree *t, int32_t i) {
    tree_node *n = &t->node[i];
    ERN_ASSERT(n->dead && n->lock == 0 && n->page.page == TREE_NONE && n->host == TREE_NONE);
    tree_move(t, i, TREE_HELD);
    t->list[TREE_HELD].n--;
    n->place = TREE_FREE;
    n->gen++;
    n->hash_next = t->free;
    t->free = i;
    t->n_used--;
}

void tree_set_page(tree *t, int32_t i, const page_hold *page) {
    tree_node *n = &t->node[i];
    ERN_ASSERT((n->page.page == TREE_NONE) == (page != NULL));
    n->page = page ? *page : (page_hold){.page = TREE_NONE};
    if (n->parent != TREE_NONE) t->node[n->parent].n_pool_child += page ? 1 : -1;
}

/* ---- lists ----------------------------------------------------------------------------------------------------- */

void tree_move(tree *t, int32_t i, tree_place place) {
    tree_node *n = &t->node[i];
    tree_list *from = &t->list[n->place], *to = &t->list[place];
    ERN_ASSERT(n->place != TREE_FREE && place != TREE_FREE);
    if (n->place != TREE_HELD) {
        if (n->colder != TREE_NONE)
            t->node[n->colder].warmer = n->warmer;
        else
            from->coldest = n->warmer;
        if (n->warmer != TREE_NONE)
            t->node[n->warmer].colder = n->colder;
        else
            from->warmest = n->colder;
    }
    from->n--;
    n->colder = n->warmer = TREE_NONE;
    n->place = place;
    to->n++;
    if (place == TREE_HELD) return;
    n->colder = to->warmest;
    if (to->warmest != TREE_NONE)
        t->node[to->warmest].warmer = i;
    else
        to->coldest = i;
    to->warmest = i;
}

/* ---- the walk -------------------------------------------------------------------------------------------------- */

static bool check_family(const tree *t, int32_t i, const char **why) {
    const tree_node *n = &t->node[i];
    if (n->parent != TREE_NONE && (t->node[n->parent].place == TREE_FREE || t->node[n->parent].dead))
        return *why = "a node's parent is gone", false;
    int32_t n_pool = 0;
    for (int32_t k = n->child, last = TREE_NONE; k != TREE_NONE; last = k, k = t->node[k].younger) {
        if (t->node[k].parent != i || t->node[k].older != last) return *why = "a node's children are mixed up", false;
        n_pool += t->node[k].page.page != TREE_NONE;
    }
    if (n_pool != n->n_pool_child) return *why = "a node's count of children in the pool is wrong", false;
    if (n_pool > 0 && n->page.page == TREE_NONE)
        return *why = "a block is in the pool and the one before it is not", false;
    if (!n->dead && tree_find(t, n->parent, n->salt, tree_tokens(t, i), n->key) != i)
        return *why = "a node is not found by its block", false;
    return true;
}

static bool check_place(const tree_node *n, const char **why) {
    bool pool = n->page.page != TREE_NONE, host = n->host != TREE_NONE;
    bool ok = n->place == TREE_HELD     ? n->lock > 0
              : n->place == TREE_DIRTY  ? pool && !host
              : n->place == TREE_SAVING ? pool && !host
              : n->place == TREE_CLEAN  ? pool && host
                                        : !pool && host;
    if (!ok) return *why = "a node is in the wrong list", false;
    if (n->place != TREE_HELD && (n->lock != 0 || n->arriving || n->dead))
        return *why = "a node that is in use can be evicted", false;
    if (!n->dead && n->place == TREE_HELD && !pool) return *why = "a node in use has no page", false;
    return true;
}

bool tree_check(const tree *t, const char **why) {
    int32_t n_place[TREE_PLACES] = {0}, n_used = 0;
    for (int32_t i = 0; i < t->n_node; i++) {
        const tree_node *n = &t->node[i];
        n_place[n->place]++;
        if (n->place == TREE_FREE) continue;
        n_used++;
        if (!check_family(t, i, why) || !check_place(n, why)) return false;
    }
    if (n_used != t->n_used) return *why = "the count of nodes is wrong", false;
    for (int k = TREE_HELD; k < TREE_PLACES; k++) {
        if (n_place[k] != t->list[k].n) return *why = "the length of a list is wrong", false;
        int32_t n = 0;
        for (int32_t i = t->list[k].coldest; k != TREE_HELD && i != TREE_NONE; i = t->node[i].warmer, n++)
            if (t->node[i].place != (tree_place)k || n >= t->list[k].n) return *why = "a list holds a stranger", false;
        if (k != TREE_HELD && n != t->list[k].n) return *why = "a list is broken", false;
    }
    return true;
}
