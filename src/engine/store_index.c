/* Which blocks are on disk, and which was used longest ago. See store_index.h. */
#include "engine/store_index.h"

#include "base/status.h"

void store_index_open(store_index *x, layout *l, uint32_t n_max) {
    ERN_ASSERT(n_max >= 1 && n_max <= STORE_BLOCKS_MAX);
    *x = (store_index){.n_max = n_max, .n_bucket = 16};
    while (x->n_bucket < n_max) x->n_bucket *= 2;
    x->entry = LAYOUT_NEW(l, store_entry, (int64_t)n_max + 1);
    x->bucket = LAYOUT_NEW(l, uint32_t, x->n_bucket);
    x->heap = LAYOUT_NEW(l, uint32_t, n_max);
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

/* Keys are hashes already. */
static uint32_t *bucket_of(const store_index *x, const uint64_t key[2]) {
    return &x->bucket[(key[0] ^ key[1]) & (x->n_bucket - 1)];
}

uint32_t store_index_find(const store_index *x, const uint64_t key[2]) {
    uint32_t e = *bucket_of(x, key);
    while (e && (x->entry[e].key[0] != key[0] || x->entry[e].key[1] != key[1])) e = x->entry[e].chain;
    return e;
}

static void table_add(store_index *x, uint32_t e) {
    uint32_t *at = bucket_of(x, x->entry[e].key);
    x->entry[e].chain = *at;
    *at = e;
    x->n++;
}

static void table_drop(store_index *x, uint32_t e) {
    uint32_t *at = bucket_of(x, x->entry[e].key);
    while (*at && *at != e) at = &x->entry[*at].chain;
    ERN_ASSERT(*at == e && x->n > 0);
    *at = x->entry[e].chain;
    x->n--;
}

static uint32_t entry_take(store_index *x, const uint64_t key[2], int64_t used_ns) {
    uint32_t e = x->free;
    if (e)
        x->free = x->entry[e].next;
    else
        e = ++x->n_fresh;
    ERN_ASSERT(e <= x->n_max);
    x->entry[e] = (store_entry){.key = {key[0], key[1]}, .used_ns = used_ns};
    return e;
}

static void entry_give(store_index *x, uint32_t e) {
    x->entry[e].next = x->free;
    x->free = e;
}

/* ---- names in no order: a heap ----------------------------------------------------------------------------------- */

static int64_t age_at(const store_index *x, uint32_t i) { return x->entry[x->heap[i]].used_ns; }

static void heap_up(store_index *x, uint32_t i) {
    for (uint32_t e = x->heap[i]; i > 0; i = (i - 1) / 2) {
        if (age_at(x, (i - 1) / 2) <= x->entry[e].used_ns) break;
        x->heap[i] = x->heap[(i - 1) / 2];
        x->heap[(i - 1) / 2] = e;
    }
}

/* Put e at the root and let it sink among the first n. */
static void heap_down(store_index *x, uint32_t e, uint32_t n) {
    uint32_t i = 0;
    for (uint32_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && age_at(x, child + 1) < age_at(x, child)) child++;
        if (age_at(x, child) >= x->entry[e].used_ns) break;
        x->heap[i] = x->heap[child];
    }
    x->heap[i] = e;
}

bool store_index_seen(store_index *x, const uint64_t key[2], int64_t used_ns, uint64_t over[2]) {
    ERN_ASSERT(!x->ordered);
    if (store_index_find(x, key)) return false; /* a folder that changes may show a name twice */
    bool full = x->n_heap == x->n_max, evicts = false;
    if (full) {
        uint32_t old = x->heap[0];
        if (!x->entry[old].gone && x->entry[old].used_ns >= used_ns) {
            over[0] = key[0], over[1] = key[1];
            return true;
        }
        evicts = !x->entry[old].gone;
        over[0] = x->entry[old].key[0], over[1] = x->entry[old].key[1];
        if (evicts) table_drop(x, old);
        entry_give(x, old);
    }
    uint32_t e = entry_take(x, key, used_ns);
    table_add(x, e);
    if (full) {
        heap_down(x, e, x->n_heap);
    } else {
        x->heap[x->n_heap] = e;
        heap_up(x, x->n_heap++);
    }
    return evicts;
}

/* The oldest goes to the end of what is still a heap, so the youngest comes to stand first. */
void store_index_sort(store_index *x) {
    for (uint32_t n = x->n_heap; n > 1; n--) {
        uint32_t old = x->heap[0], last = x->heap[n - 1];
        heap_down(x, last, n - 1);
        x->heap[n - 1] = old;
    }
}

/* ---- the order of age: a list ------------------------------------------------------------------------------------ */

static void list_append(store_index *x, uint32_t e) {
    x->entry[e].prev = x->youngest;
    x->entry[e].next = 0;
    if (x->youngest)
        x->entry[x->youngest].next = e;
    else
        x->oldest = e;
    x->youngest = e;
}

static void list_remove(store_index *x, uint32_t e) {
    uint32_t prev = x->entry[e].prev, next = x->entry[e].next;
    ERN_ASSERT((prev ? x->entry[prev].next : x->oldest) == e && (next ? x->entry[next].prev : x->youngest) == e);
    if (prev)
        x->entry[prev].next = next;
    else
        x->oldest = next;
    if (next)
        x->entry[next].prev = prev;
    else
        x->youngest = prev;
}

void store_index_order(store_index *x) {
    ERN_ASSERT(!x->ordered);
    x->ordered = true;
    while (x->n_heap > 0) {
        uint32_t e = x->heap[--x->n_heap];
        if (x->entry[e].gone)
            entry_give(x, e);
        else
            list_append(x, e);
    }
}

void store_index_drop(store_index *x, uint32_t e) {
    table_drop(x, e);
    if (x->ordered) {
        list_remove(x, e);
        entry_give(x, e);
    } else {
        x->entry[e].gone = true; /* the heap still names it */
    }
}

void store_index_add(store_index *x, const uint64_t key[2], int64_t used_ns) {
    ERN_ASSERT(x->ordered && store_index_find(x, key) == 0);
    uint32_t e = entry_take(x, key, used_ns);
    table_add(x, e);
    list_append(x, e);
}

void store_index_use(store_index *x, uint32_t e, int64_t used_ns) {
    ERN_ASSERT(x->ordered);
    x->entry[e].used_ns = used_ns;
    list_remove(x, e);
    list_append(x, e);
}
