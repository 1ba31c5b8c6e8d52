/* Which blocks are on disk, and which was used longest ago: a hash table and an order of age over one array.
 *
 * Two lives. While the folder's names are read (store_index_seen) they come in no order, so they lie in a heap by age,
 * which gives the oldest when there are too many. When all are read the heap is sorted (store_index_sort) and becomes a
 * list (store_index_order); from then on a use moves an entry to its end.
 * Entry 0 stands for none. Owner: store.c. Thread: whoever holds the store's lock; store_index_sort needs no lock, as
 * it touches nothing that the calls allowed before order (find, drop) touch. Memory: taken once, from the layout. */
#ifndef ERN_ENGINE_STORE_INDEX_H
#define ERN_ENGINE_STORE_INDEX_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/layout.h"

typedef struct store_entry {
    uint64_t key[2];
    int64_t used_ns;     /* wall clock */
    uint32_t chain;      /* next of the same bucket */
    uint32_t prev, next; /* by age: older, younger. next alone links free entries */
    bool gone;           /* dropped before there was an order to take it out of */
} store_entry;

typedef struct store_index {
    store_entry *entry; /* [n_max + 1] */
    uint32_t *bucket;   /* [n_bucket] first entry */
    uint32_t *heap;     /* [n_max] entries, oldest first; sorted: youngest first */
    uint32_t n_max, n_bucket, n, n_heap;
    uint32_t free, n_fresh; /* entries given back; entries ever used */
    uint32_t oldest, youngest;
    bool ordered;
} store_index;

enum { STORE_BLOCKS_MAX = 1 << 22 }; /* 200 MB of index */

/* 1 <= n_max <= STORE_BLOCKS_MAX. */
void store_index_open(store_index *x, layout *l, uint32_t n_max);
/* The entry of a key; 0: none. */
uint32_t store_index_find(const store_index *x, const uint64_t key[2]);
void store_index_drop(store_index *x, uint32_t e);

/* Before order: a file of this age. True when one is too many: *over is the older of it and the oldest so far. */
bool store_index_seen(store_index *x, const uint64_t key[2], int64_t used_ns, uint64_t over[2]);
void store_index_sort(store_index *x);
void store_index_order(store_index *x);

/* After order. Add the youngest; there must be room, and no such key. */
void store_index_add(store_index *x, const uint64_t key[2], int64_t used_ns);
/* Make it the youngest. */
void store_index_use(store_index *x, uint32_t e, int64_t used_ns);

#endif
