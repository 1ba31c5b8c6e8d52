/* The KV cache: every page of the pool, who holds it, which blocks can be found again, and what lies below.
 *
 *   pool (pages)     pages held by sequences, by the prefix tree, by transfers; the rest is free
 *   host memory      blocks that left the pool, copied out before they had to go
 *   disk             blocks written behind, found again after a restart
 *
 * The tree holds each full block that was computed; a sequence holds its own path besides. When a sequence is over or
 * is preempted, its blocks stay in the tree until their pages are needed: then the coldest goes. Room is therefore what
 * is free and what nobody uses; taking a page cannot fail while there is room. With a host tier, the coldest blocks are
 * copied out while a few pages are still free, so that eviction never waits. A block is in the pool or in host memory,
 * not in both for longer than that takes; on disk it stays.
 *
 * A path found in host memory or on disk gets pages at once and arrives later: until then its sequence loads. A load
 * that fails ends the path there: the rest is computed. A page that a load fills may still be named by steps in flight,
 * of its last holder; the load starts when these have been collected.
 *
 * Owner: the scheduler. Thread: the engine thread. Memory: taken once, from the layout; the bytes of the host tier are
 * the transfer's. */
#ifndef ERN_ENGINE_CACHE_H
#define ERN_ENGINE_CACHE_H

#include "engine/transfer.h"
#include "engine/tree.h"

typedef struct cache_options {
    int32_t n_page, page_tokens;
    int32_t step_tokens;      /* most tokens of a step */
    bool prefix;              /* keep and find blocks at all */
    int32_t n_host_page;      /* 0: no host tier */
    bool disk;                /* there is a disk tier */
    const transfer_ops *move; /* NULL without host and disk */
    void *move_ud;
} cache_options;

/* The pages of one sequence, in order. The first n_node are nodes of the tree, shared; the others its own. */
typedef struct cache_path {
    page_hold *page;     /* [n_page] its slot's table; borrowed */
    int32_t *node;       /* [n_node] likewise */
    const uint8_t *salt; /* borrowed */
    int32_t n_page, n_node;
    int32_t n_here;             /* nodes that have arrived */
    int32_t n_found;            /* nodes that were found, not computed by this sequence */
    int32_t n_vouched;          /* nodes that a sound wanted row has come after: they may go to disk */
    int32_t n_from[TREE_FROMS]; /* of the found, where they were */
} cache_path;

typedef struct cache_load { /* a load that waits to start; it holds its page */
    int32_t node;
    uint32_t gen;
    page_hold page;
    uint64_t step; /* not before so many steps were collected */
} cache_load;

typedef struct cache_loads { /* a ring */
    cache_load *load;        /* [n_page] */
    int32_t first, n;
} cache_loads;

typedef struct cache_save { /* a block to write to disk, if it is still there then */
    int32_t node;
    uint32_t gen;
} cache_save;

typedef struct cache {
    cache_options o;
    pages pool;
    tree tree;
    int32_t n_stuck;                 /* unused blocks whose page a transfer reads */
    int32_t *host_free, n_host_free; /* [n_host_page] a stack */
    cache_loads load[2];             /* from host memory, from disk: a slow disk holds up none but its own */
    cache_save *save;                /* [n_page] a ring */
    int32_t first_save, n_save;
    int32_t n_out, n_saving, n_arriving; /* jobs inside */
    int32_t *n_job;                      /* [n_page] jobs that hold the page */
    uint64_t n_submitted, n_collected;   /* steps */
    ern_tier_stats host_stats;
    uint64_t n_token_from[TREE_FROMS], n_cached, n_evicted;
    int32_t *walk; /* [n_node] scratch of the walk */
} cache;

void cache_open(cache *c, layout *l, const cache_options *o);
/* Pages that can be taken. */
int32_t cache_room(const cache *c);
/* Append a page of its own to a path, evicting when none is free. Asserts that there is room. */
void cache_take(cache *c, cache_path *p);
/* Fill an empty path with the blocks of token [n_token] that are cached, the whole blocks only; at most n_load of them
 * from below the pool, each taking a page. */
void cache_attach(cache *c, cache_path *p, const int32_t *token, int32_t n_token, int32_t n_load);
/* True while blocks of the path have not arrived. Cuts it where one did not. */
bool cache_is_loading(cache *c, cache_path *p);
/* Count what a path that begins to run was spared, for the statistics. */
void cache_count_found(cache *c, const cache_path *p);
/* The first n_token of token are computed: put whole blocks into the tree, at most n_block in all. Where a block is
 * there already, the path changes over to its page. */
void cache_insert(cache *c, cache_path *p, const int32_t *token, int32_t n_token, int32_t n_block);
/* A row after the blocks of this path was wanted and its logits were numbers: write them to disk, behind the steps. Not
 * before: what is on disk outlives cache_disown. */
void cache_vouch(cache *c, cache_path *p);
/* What this path computed is not to be found again (its logits were not numbers). */
void cache_disown(cache *c, cache_path *p);
/* Give everything back. */
void cache_release(cache *c, cache_path *p);
/* A step was submitted; the oldest one was collected. */
void cache_step_submitted(cache *c);
void cache_step_collected(cache *c);
/* Take what transfers have done and start new ones. True when something was done. */
bool cache_turn(cache *c);
/* True while a load waits to start or is on its way. */
bool cache_is_busy(const cache *c);
/* True while pages are held by transfers alone, or may be: they come free without anybody's doing. */
bool cache_is_moving(const cache *c);
/* True while blocks wait to be written to disk, or are being written. */
bool cache_is_saving(const cache *c);
/* Fill the parts of *out that are the cache's. Of the disk tier that is what was found there; the store tells the rest.
 */
void cache_stats(const cache *c, ern_engine_stats *out);

/* The owner walk: begin, show every path, end. False with *why when an invariant is broken. */
void cache_walk_begin(cache *c);
bool cache_walk_path(cache *c, const cache_path *p, const char **why);
bool cache_walk_end(cache *c, const char **why);

#endif
