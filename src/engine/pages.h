/* The pool of KV pages: who holds which page of P cells.
 *
 * A page is free or held; a held page has a reference count (a prefix may be shared by many sequences) and a generation
 * that grows each time it becomes free. Whoever holds a page keeps a page_hold, and every use shows its generation, so
 * a page dropped twice or used after its drop is caught at the first touch in every build, not only in tests. Pages are
 * handed out lowest first: a half-used pool touches half its memory, and a run can be repeated.
 *
 * Owner: the scheduler. Thread: the engine thread. Memory: taken once, from the layout. */
#ifndef ERN_ENGINE_PAGES_H
#define ERN_ENGINE_PAGES_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/layout.h"

enum { PAGES_LEVEL_MAX = 6 }; /* 64^6 pages: more than any int32 */

typedef struct page_hold {
    int32_t page;
    uint32_t gen;
} page_hold;

/* Free pages as a tree of bit words: bit i of level 0 says that page i is free, bit i of level k+1 that word i of level
 * k is not empty. Taking the lowest free page and giving one back are n_level word operations. */
typedef struct pages {
    int32_t n_page, n_free;
    int32_t n_level;
    uint64_t *level[PAGES_LEVEL_MAX];
    int32_t *ref;  /* [n_page] holders; 0: free */
    uint32_t *gen; /* [n_page] */
    int32_t *walk; /* [n_page] scratch of pages_walk_* */
} pages;

/* Take the tables for n_page >= 1 pages from l; while counting, only add the bytes. */
void pages_open(pages *p, layout *l, int32_t n_page);
/* Hold the lowest free page; false when none is free. */
bool pages_take(pages *p, page_hold *out);
/* Hold it once more. Asserts that h is current. */
void pages_share(pages *p, page_hold h);
/* Give one hold back; the last one frees the page. Asserts that h is current. */
void pages_drop(pages *p, page_hold h);
/* True when h names a held page of this generation. */
bool pages_is_held(const pages *p, page_hold h);

/* The owner walk: begin, show every hold there is, end. False from any of them, with *why, when the pool is not exactly
 * free + held with the right counts. */
void pages_walk_begin(pages *p);
bool pages_walk_hold(pages *p, page_hold h, const char **why);
bool pages_walk_end(const pages *p, const char **why);

#endif
