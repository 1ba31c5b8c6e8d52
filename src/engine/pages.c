/* The pool of KV pages. See pages.h. */
#include "engine/pages.h"

#include <string.h>

#include "base/status.h"

static int32_t words(int32_t n_bit) { return (int32_t)(((int64_t)n_bit + 63) / 64); }

void pages_open(pages *p, layout *l, int32_t n_page) {
    ERN_ASSERT(n_page >= 1);
    *p = (pages){.n_page = n_page, .n_free = n_page};
    for (int32_t n = words(n_page);; n = words(n)) {
        ERN_ASSERT(p->n_level < PAGES_LEVEL_MAX);
        p->level[p->n_level++] = LAYOUT_NEW(l, uint64_t, n);
        if (n == 1) break;
    }
    p->ref = LAYOUT_NEW(l, int32_t, n_page);
    p->gen = LAYOUT_NEW(l, uint32_t, n_page);
    p->walk = LAYOUT_NEW(l, int32_t, n_page);
    if (!l->arena || l->out) return;
    int32_t n_bit = n_page;
    for (int32_t k = 0; k < p->n_level; k++) {
        for (int32_t i = 0; i < n_bit; i++) p->level[k][i / 64] |= 1ull << (i % 64);
        n_bit = words(n_bit);
    }
}

bool pages_take(pages *p, page_hold *out) {
    if (p->n_free == 0) return false;
    int32_t at = 0;
    for (int32_t k = p->n_level - 1; k >= 0; k--) at = at * 64 + __builtin_ctzll(p->level[k][at]);
    ERN_ASSERT(at < p->n_page && p->ref[at] == 0);
    int32_t bit = at;
    for (int32_t k = 0; k < p->n_level; k++, bit /= 64) {
        p->level[k][bit / 64] &= ~(1ull << (bit % 64));
        if (p->level[k][bit / 64]) break; /* the word still has a free page: the levels above stay as they are */
    }
    p->ref[at] = 1;
    p->n_free--;
    *out = (page_hold){at, p->gen[at]};
    return true;
}

bool pages_is_held(const pages *p, page_hold h) {
    return h.page >= 0 && h.page < p->n_page && p->ref[h.page] > 0 && p->gen[h.page] == h.gen;
}

void pages_share(pages *p, page_hold h) {
    ERN_ASSERT(pages_is_held(p, h) && p->ref[h.page] < INT32_MAX);
    p->ref[h.page]++;
}

void pages_drop(pages *p, page_hold h) {
    ERN_ASSERT(pages_is_held(p, h));
    if (--p->ref[h.page] > 0) return;
    p->gen[h.page]++;
    p->n_free++;
    int32_t bit = h.page;
    for (int32_t k = 0; k < p->n_level; k++, bit /= 64) p->level[k][bit / 64] |= 1ull << (bit % 64);
}

void pages_walk_begin(pages *p) { memset(p->walk, 0, (size_t)p->n_page * sizeof *p->walk); }

bool pages_walk_hold(pages *p, page_hold h, const char **why) {
    if (h.page < 0 || h.page >= p->n_page) return *why = "a hold names a page outside the pool", false;
    if (p->ref[h.page] == 0) return *why = "a hold names a free page", false;
    if (p->gen[h.page] != h.gen) return *why = "a hold names an earlier life of its page", false;
    p->walk[h.page]++;
    return true;
}

bool pages_walk_end(const pages *p, const char **why) {
    int32_t n_free = 0;
    for (int32_t i = 0; i < p->n_page; i++) {
        bool is_free = p->level[0][i / 64] >> (i % 64) & 1;
        n_free += is_free;
        if (p->ref[i] != p->walk[i]) return *why = "a page's reference count is not the number of its holders", false;
        if (is_free != (p->ref[i] == 0)) return *why = "a page is both free and held, or neither", false;
    }
    if (n_free != p->n_free) return *why = "the count of free pages is wrong", false;
    for (int32_t k = 1, n = words(p->n_page); k < p->n_level; k++, n = words(n))
        for (int32_t i = 0; i < n; i++)
            if ((p->level[k][i / 64] >> (i % 64) & 1) != (p->level[k - 1][i] != 0))
                return *why = "the tree of free pages disagrees with itself", false;
    return true;
}
