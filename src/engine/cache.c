/* The KV cache. See cache.h. */
#include "engine/cache.h"

#include <string.h>

#include "base/status.h"

enum {
    OUT_MAX = 16,     /* copies to host memory at once */
    SAVE_MAX = 8,     /* writes to disk at once: each keeps its page from being taken */
    CLEAN_SHARE = 8,  /* with a host tier, an eighth of the pool is kept free or copied, */
    CLEAN_MOST = 256, /* but no more pages than this, */
    CLEAN_LEAST = 2,  /* no less than these, and at least what two steps take */
    POLL_AT_ONCE = 32,
};

void cache_open(cache *c, layout *l, const cache_options *o) {
    *c = (cache){.o = *o};
    c->host_stats.n_block_max = o->n_host_page;
    pages_open(&c->pool, l, o->n_page);
    if (!o->prefix) return;
    tree_open(&c->tree, l, o->n_page + o->n_host_page, o->page_tokens);
    c->walk = LAYOUT_NEW(l, int32_t, o->n_page + o->n_host_page);
    if (!o->move) return;
    c->host_free = LAYOUT_NEW(l, int32_t, o->n_host_page);
    for (int k = 0; k < 2; k++) c->load[k].load = LAYOUT_NEW(l, cache_load, o->n_page);
    c->n_job = LAYOUT_NEW(l, int32_t, o->n_page);
    c->save = o->disk ? LAYOUT_NEW(l, cache_save, o->n_page) : NULL;
    if (!l->arena || l->out) return;
    for (int32_t i = o->n_host_page - 1; i >= 0; i--) c->host_free[c->n_host_free++] = i;
}

static tree_node *node_of(cache *c, int32_t i) { return &c->tree.node[i]; }

/* ---- places ---------------------------------------------------------------------------------------------------- */

static bool is_unused(tree_place place) { return place == TREE_DIRTY || place == TREE_SAVING || place == TREE_CLEAN; }

int32_t cache_room(const cache *c) {
    const tree_list *list = c->tree.list;
    return c->pool.n_free + list[TREE_DIRTY].n + list[TREE_SAVING].n + list[TREE_CLEAN].n - c->n_stuck;
}

static void move(cache *c, int32_t i, tree_place place) {
    tree_node *n = node_of(c, i);
    c->n_stuck += n->n_pin > 0 ? is_unused(place) - is_unused(n->place) : 0;
    tree_move(&c->tree, i, place);
}

/* A job takes a hold of a page, and gives it back. */
static void hold_for_job(cache *c, page_hold hold) {
    pages_share(&c->pool, hold);
    c->n_job[hold.page]++;
}

static void drop_for_job(cache *c, int32_t page) {
    c->n_job[page]--;
    pages_drop(&c->pool, (page_hold){page, c->pool.gen[page]});
}

/* A transfer begins to read its page, or has read it (the node may have become another one since). */
static void pin(cache *c, int32_t i) {
    tree_node *n = node_of(c, i);
    hold_for_job(c, n->page);
    c->n_stuck += is_unused(n->place) && n->n_pin == 0;
    n->n_pin++;
}

static void unpin(cache *c, const transfer_job *j) {
    tree_node *n = node_of(c, j->node);
    if (n->gen == j->node_gen) {
        n->n_pin--;
        c->n_stuck -= is_unused(n->place) && n->n_pin == 0;
    }
    drop_for_job(c, j->device_page);
}

static void free_host(cache *c, tree_node *n) {
    if (n->host == TREE_NONE) return;
    c->host_free[c->n_host_free++] = n->host;
    n->host = TREE_NONE;
}

static void drop_page(cache *c, int32_t i) {
    page_hold hold = node_of(c, i)->page;
    if (hold.page == TREE_NONE) return;
    tree_set_page(&c->tree, i, NULL);
    pages_drop(&c->pool, hold);
}

/* A node without children is no more: at once, or, while paths hold it, with the last of them. */
static void discard(cache *c, int32_t i) {
    tree_node *n = node_of(c, i);
    free_host(c, n);
    move(c, i, TREE_HELD);
    tree_kill(&c->tree, i);
    drop_page(c, i);
    n->arriving = false;
    if (n->lock == 0) tree_forget(&c->tree, i);
}

/* It and all below it. */
static void discard_subtree(cache *c, int32_t top) {
    for (int32_t i = top;;) {
        while (node_of(c, i)->child != TREE_NONE) i = node_of(c, i)->child;
        int32_t parent = node_of(c, i)->parent;
        discard(c, i);
        if (i == top) return;
        i = parent;
    }
}

/* ---- room ------------------------------------------------------------------------------------------------------ */

/* Of what nobody uses, the coldest leaves the pool. Its page may still be read by a transfer, and is free after that.
 */
static void evict(cache *c) {
    const tree_list *list = c->tree.list;
    int32_t i = list[TREE_CLEAN].coldest;
    if (i == TREE_NONE) {
        i = list[TREE_DIRTY].coldest;
        if (i == TREE_NONE || node_of(c, i)->n_pool_child > 0) i = list[TREE_SAVING].coldest;
    }
    ERN_ASSERT(i != TREE_NONE && node_of(c, i)->n_pool_child == 0);
    if (node_of(c, i)->place == TREE_CLEAN) {
        move(c, i, TREE_HELD);
        drop_page(c, i);
        move(c, i, TREE_HOST);
        c->host_stats.n_out++;
    } else {
        discard_subtree(c, i); /* what is below it in host memory could not be found any more */
    }
    c->n_evicted++;
}

static page_hold take_page(cache *c) {
    page_hold hold;
    while (!pages_take(&c->pool, &hold)) evict(c);
    return hold;
}

void cache_take(cache *c, cache_path *p) {
    ERN_ASSERT(cache_room(c) > 0);
    p->page[p->n_page++] = take_page(c);
}

/* A page of host memory: a free one, or that of the coldest block there. */
static int32_t take_host(cache *c) {
    if (c->n_host_free == 0) {
        int32_t i = c->tree.list[TREE_HOST].coldest;
        if (i == TREE_NONE) return TREE_NONE;
        discard(c, i);
        c->host_stats.n_evicted++;
    }
    return c->host_free[--c->n_host_free];
}

/* ---- paths ----------------------------------------------------------------------------------------------------- */

static void lock(cache *c, int32_t i) {
    tree_node *n = node_of(c, i);
    if (n->lock++ > 0) return;
    move(c, i, TREE_HELD);
    if (n->page.page != TREE_NONE) free_host(c, n);
}

/* Nobody waits for node i any more: back to host memory. Its load, if it runs, keeps the page until it is done. What
 * came after it may have arrived from disk before it; without it that is worth nothing. */
static void turn_back(cache *c, int32_t i) {
    tree_node *n = node_of(c, i);
    for (int32_t k = n->child, next; k != TREE_NONE; k = next) {
        next = node_of(c, k)->younger;
        if (node_of(c, k)->page.page != TREE_NONE) discard_subtree(c, k);
    }
    n->arriving = false;
    drop_page(c, i);
    move(c, i, TREE_HOST);
}

static void unlock(cache *c, int32_t i) {
    tree_node *n = node_of(c, i);
    ERN_ASSERT(n->lock > 0);
    if (--n->lock > 0) return;
    if (n->dead) {
        tree_forget(&c->tree, i);
    } else if (!n->arriving) {
        move(c, i, TREE_DIRTY);
    } else if (n->host != TREE_NONE) {
        turn_back(c, i);
    } else {
        discard_subtree(c, i);
    }
}

static void append(cache *c, cache_path *p, int32_t i) {
    p->node[p->n_node++] = i;
    pages_share(&c->pool, node_of(c, i)->page);
    p->page[p->n_page++] = node_of(c, i)->page;
}

/* Give node i, locked and without a page, one, and have it filled. */
static void begin_load(cache *c, int32_t i, tree_from from) {
    tree_node *n = node_of(c, i);
    page_hold hold = take_page(c);
    tree_set_page(&c->tree, i, &hold);
    n->arriving = true;
    n->from = from;
    hold_for_job(c, hold);
    cache_loads *q = &c->load[from == TREE_FROM_DISK];
    ERN_ASSERT(q->n < c->o.n_page); /* each holds a page */
    q->load[(q->first + q->n++) % c->o.n_page] = (cache_load){i, n->gen, hold, c->n_submitted};
}

/* The node of the block after `parent`, or TREE_NONE; its key in any case. */
static int32_t look_up(cache *c, int32_t parent, const uint8_t *salt, const int32_t *token, tree_key *key) {
    *key = tree_key_of(&c->tree, parent == TREE_NONE ? NULL : &node_of(c, parent)->key, salt, token);
    return tree_find(&c->tree, parent, salt, token, *key);
}

/* The node of the next block, locked, if it is in the pool or can be loaded. */
static int32_t find(cache *c, int32_t parent, const uint8_t *salt, const int32_t *token, bool may_load) {
    tree_key key;
    int32_t i = look_up(c, parent, salt, token, &key);
    if (i != TREE_NONE && node_of(c, i)->page.page != TREE_NONE) {
        lock(c, i);
        return i;
    }
    if (!may_load || cache_room(c) == 0) return TREE_NONE;
    if (i != TREE_NONE) {
        lock(c, i);
        begin_load(c, i, TREE_FROM_HOST);
        return i;
    }
    if (!c->o.disk || !c->o.move->on_disk(c->o.move_ud, key.word)) return TREE_NONE;
    i = tree_add(&c->tree, parent, salt, token, key);
    if (i == TREE_NONE) return TREE_NONE;
    node_of(c, i)->lock = 1;
    begin_load(c, i, TREE_FROM_DISK);
    return i;
}

void cache_attach(cache *c, cache_path *p, const int32_t *token, int32_t n_token, int32_t n_load) {
    ERN_ASSERT(p->n_page == 0 && p->n_node == 0);
    int32_t P = c->o.page_tokens, n_loaded = 0;
    memset(p->n_from, 0, sizeof p->n_from);
    for (int32_t k = 0; c->o.prefix && k < n_token / P; k++) {
        int32_t n_before = c->load[0].n + c->load[1].n;
        int32_t i = find(c, k ? p->node[k - 1] : TREE_NONE, p->salt, token + (int64_t)k * P, n_loaded < n_load);
        if (i == TREE_NONE) break;
        n_loaded += c->load[0].n + c->load[1].n - n_before;
        append(c, p, i);
        p->n_from[node_of(c, i)->arriving ? node_of(c, i)->from : TREE_FROM_POOL]++;
    }
    p->n_here = p->n_vouched = 0;
    p->n_found = p->n_node;
}

/* The path ends before node k: what came after did not arrive. Nothing was computed yet. */
static void cut(cache *c, cache_path *p, int32_t k) {
    ERN_ASSERT(p->n_page == p->n_node);
    while (p->n_node > k) {
        pages_drop(&c->pool, p->page[--p->n_page]);
        unlock(c, p->node[--p->n_node]);
        int from = p->n_from[TREE_FROM_DISK] > 0   ? TREE_FROM_DISK /* the lowest tiers come last in a path */
                   : p->n_from[TREE_FROM_HOST] > 0 ? TREE_FROM_HOST
                                                   : TREE_FROM_POOL;
        p->n_from[from]--;
    }
    p->n_found = k;
}

bool cache_is_loading(cache *c, cache_path *p) {
    while (p->n_here < p->n_node) {
        const tree_node *n = node_of(c, p->node[p->n_here]);
        if (n->arriving) return true;
        if (n->dead)
            cut(c, p, p->n_here);
        else
            p->n_here++;
    }
    return false;
}

void cache_count_found(cache *c, const cache_path *p) {
    for (int k = 0; k < TREE_FROMS; k++) c->n_token_from[k] += (uint64_t)p->n_from[k] * (uint64_t)c->o.page_tokens;
}

void cache_insert(cache *c, cache_path *p, const int32_t *token, int32_t n_token, int32_t n_block) {
    int32_t P = c->o.page_tokens;
    for (int32_t k = p->n_node; c->o.prefix && k < n_block && (k + 1) * P <= n_token; k++) {
        int32_t parent = k ? p->node[k - 1] : TREE_NONE;
        if (parent != TREE_NONE && node_of(c, parent)->dead) return;
        const int32_t *block = token + (int64_t)k * P;
        tree_key key;
        int32_t i = look_up(c, parent, p->salt, block, &key);
        if (i != TREE_NONE && node_of(c, i)->arriving) return; /* the next call sees how that ended */
        if (i != TREE_NONE && node_of(c, i)->page.page != TREE_NONE) {
            lock(c, i);
            pages_drop(&c->pool, p->page[k]);
            p->page[k] = node_of(c, i)->page;
            pages_share(&c->pool, p->page[k]);
        } else {
            if (i == TREE_NONE) i = tree_add(&c->tree, parent, p->salt, block, key);
            if (i == TREE_NONE) return;
            lock(c, i);
            tree_node *n = node_of(c, i);
            free_host(c, n);
            n->from = TREE_FROM_POOL;
            pages_share(&c->pool, p->page[k]);
            tree_set_page(&c->tree, i, &p->page[k]);
            c->n_cached++;
        }
        p->node[p->n_node++] = i;
        p->n_here = p->n_node;
    }
}

void cache_vouch(cache *c, cache_path *p) {
    for (; c->save && p->n_vouched < p->n_node; p->n_vouched++) {
        tree_node *n = node_of(c, p->node[p->n_vouched]);
        if (n->to_disk || n->dead || c->n_save == c->o.n_page) continue; /* a full queue: the next path asks again */
        n->to_disk = true;
        c->save[(c->first_save + c->n_save++) % c->o.n_page] = (cache_save){p->node[p->n_vouched], n->gen};
    }
}

void cache_disown(cache *c, cache_path *p) {
    if (p->n_found >= p->n_node) return;
    int32_t i = p->node[p->n_found];
    if (!node_of(c, i)->dead) discard_subtree(c, i);
}

void cache_release(cache *c, cache_path *p) {
    while (p->n_page > p->n_node) pages_drop(&c->pool, p->page[--p->n_page]);
    while (p->n_page > 0) {
        pages_drop(&c->pool, p->page[--p->n_page]);
        unlock(c, p->node[--p->n_node]);
    }
    p->n_here = p->n_found = p->n_vouched = 0;
}

/* ---- transfers ------------------------------------------------------------------------------------------------- */

void cache_step_submitted(cache *c) { c->n_submitted++; }

void cache_step_collected(cache *c) { c->n_collected++; }

static store_block block_of(cache *c, int32_t i) {
    const tree_node *n = node_of(c, i);
    store_block b = {.token = tree_tokens(&c->tree, i)};
    memcpy(b.key, n->key.word, sizeof b.key);
    if (n->parent != TREE_NONE) memcpy(b.parent, node_of(c, n->parent)->key.word, sizeof b.parent);
    memcpy(b.salt, n->salt, sizeof b.salt);
    return b;
}

static void arrived(cache *c, const transfer_job *j) {
    tree_node *n = node_of(c, j->node);
    c->n_arriving--;
    if (n->gen == j->node_gen && n->arriving && n->page.page == j->device_page) {
        if (j->ok) {
            n->arriving = false;
            free_host(c, n);
            c->host_stats.n_in += j->kind == TRANSFER_IN;
        } else {
            discard_subtree(c, j->node);
        }
    }
    drop_for_job(c, j->device_page);
}

static void copied_out(cache *c, const transfer_job *j) {
    c->n_out--;
    unpin(c, j);
    tree_node *n = node_of(c, j->node);
    if (n->gen == j->node_gen && n->place == TREE_SAVING && n->saving_to == j->host_page) {
        n->host = j->host_page;
        move(c, j->node, TREE_CLEAN);
    } else { /* used again, or gone */
        c->host_free[c->n_host_free++] = j->host_page;
    }
}

static bool poll(cache *c) {
    transfer_job done[POLL_AT_ONCE];
    bool any = false;
    for (int32_t n; (n = c->o.move->poll(c->o.move_ud, done, POLL_AT_ONCE)) > 0; any = true)
        for (int32_t k = 0; k < n; k++) {
            const transfer_job *j = &done[k];
            if (j->kind == TRANSFER_OUT) {
                copied_out(c, j);
            } else if (j->kind == TRANSFER_SAVE) {
                c->n_saving--;
                unpin(c, j);
            } else {
                arrived(c, j);
            }
        }
    return any;
}

static bool start_loads(cache *c, cache_loads *q) {
    bool any = false;
    for (; q->n > 0; q->n--, q->first = (q->first + 1) % c->o.n_page, any = true) {
        const cache_load *l = &q->load[q->first];
        const tree_node *n = node_of(c, l->node);
        if (n->gen != l->gen || !n->arriving || n->page.page != l->page.page) {
            drop_for_job(c, l->page.page); /* nobody waits for it any more */
            continue;
        }
        if (c->n_collected < l->step) break;
        transfer_job j = {.kind = n->from == TREE_FROM_HOST ? TRANSFER_IN : TRANSFER_LOAD,
                          .device_page = l->page.page,
                          .host_page = n->host,
                          .node = l->node,
                          .node_gen = l->gen,
                          .block = block_of(c, l->node)};
        if (!c->o.move->start(c->o.move_ud, &j)) break;
        c->n_arriving++;
    }
    return any;
}

/* Keep a few pages free or copied, so that eviction need not wait. */
static bool start_outs(cache *c) {
    const tree_list *list = c->tree.list;
    int32_t want = c->o.n_page / CLEAN_SHARE, steps = 2 * (c->o.step_tokens / c->o.page_tokens + 1);
    want = want < CLEAN_LEAST ? CLEAN_LEAST : want > CLEAN_MOST ? CLEAN_MOST : want;
    if (want < steps) want = steps; /* what two steps may take */
    if (want > c->o.n_page / 2) want = c->o.n_page / 2;
    bool any = false;
    while (c->n_out < OUT_MAX && list[TREE_DIRTY].n > 0 &&
           c->pool.n_free + list[TREE_CLEAN].n + list[TREE_SAVING].n < want) {
        int32_t host = take_host(c), i = list[TREE_DIRTY].coldest;
        if (host == TREE_NONE) return any;
        tree_node *n = node_of(c, i);
        transfer_job j = {
            .kind = TRANSFER_OUT, .device_page = n->page.page, .host_page = host, .node = i, .node_gen = n->gen};
        if (!c->o.move->start(c->o.move_ud, &j)) {
            c->host_free[c->n_host_free++] = host;
            return any;
        }
        pin(c, i);
        move(c, i, TREE_SAVING);
        n->saving_to = host;
        c->n_out++;
        any = true;
    }
    return any;
}

static bool start_saves(cache *c) {
    bool any = false;
    for (; c->n_save > 0; c->n_save--, c->first_save = (c->first_save + 1) % c->o.n_page, any = true) {
        const cache_save *s = &c->save[c->first_save];
        const tree_node *n = node_of(c, s->node);
        if (n->gen != s->gen || n->dead || n->arriving || n->page.page == TREE_NONE) continue;
        transfer_job j = {.kind = TRANSFER_SAVE,
                          .device_page = n->page.page,
                          .host_page = TREE_NONE,
                          .node = s->node,
                          .node_gen = s->gen,
                          .block = block_of(c, s->node)};
        if (c->o.move->on_disk(c->o.move_ud, j.block.key)) continue;
        if (c->n_saving == SAVE_MAX || !c->o.move->start(c->o.move_ud, &j)) break;
        pin(c, s->node);
        c->n_saving++;
    }
    return any;
}

bool cache_turn(cache *c) {
    if (!c->o.move) return false;
    bool any = poll(c);
    for (int k = 0; k < 2; k++) any |= start_loads(c, &c->load[k]);
    if (c->o.n_host_page > 0) any |= start_outs(c);
    if (c->o.disk) any |= start_saves(c);
    return any;
}

bool cache_is_busy(const cache *c) { return c->load[0].n + c->load[1].n + c->n_arriving > 0; }

bool cache_is_moving(const cache *c) { return cache_is_busy(c) || c->n_out + c->n_saving > 0; }

bool cache_is_saving(const cache *c) { return c->n_save + c->n_saving > 0; }

void cache_stats(const cache *c, ern_engine_stats *out) {
    out->n_page = c->o.n_page;
    out->n_page_free = c->pool.n_free;
    out->n_page_cached = cache_room(c) - c->pool.n_free;
    out->n_block_cached = c->n_cached;
    out->n_block_evicted = c->n_evicted;
    out->host = c->host_stats;
    out->host.n_block = c->tree.list[TREE_HOST].n;
    out->host.n_cached_token = c->n_token_from[TREE_FROM_HOST];
    out->disk.n_cached_token = c->n_token_from[TREE_FROM_DISK];
    out->n_cached_token = 0;
    for (int k = 0; k < TREE_FROMS; k++) out->n_cached_token += c->n_token_from[k];
}

/* ---- the walk -------------------------------------------------------------------------------------------------- */

void cache_walk_begin(cache *c) {
    pages_walk_begin(&c->pool);
    if (c->o.prefix) memset(c->walk, 0, (size_t)c->tree.n_node * sizeof *c->walk);
}

bool cache_walk_path(cache *c, const cache_path *p, const char **why) {
    if (p->n_node > p->n_page || p->n_here > p->n_node || p->n_found > p->n_node)
        return *why = "a path is at odds with itself", false;
    for (int32_t k = 0; k < p->n_page; k++)
        if (!pages_walk_hold(&c->pool, p->page[k], why)) return false;
    for (int32_t k = 0; k < p->n_node; k++) {
        const tree_node *n = node_of(c, p->node[k]);
        c->walk[p->node[k]]++;
        if (n->place != TREE_HELD) return *why = "a path goes through a node that is not held", false;
        if (n->dead) continue;
        if (n->page.page != p->page[k].page) return *why = "a path and its node disagree about the page", false;
        if (n->parent != (k ? p->node[k - 1] : TREE_NONE)) return *why = "a path is not one", false;
    }
    return true;
}

static bool walk_tree(cache *c, const char **why) {
    int32_t n_host = 0, n_stuck = 0;
    for (int32_t i = 0; i < c->tree.n_node; i++) {
        const tree_node *n = node_of(c, i);
        if (n->place == TREE_FREE) continue;
        if (n->lock != c->walk[i]) return *why = "a node's locks are not the paths that hold it", false;
        if (n->page.page != TREE_NONE && !pages_walk_hold(&c->pool, n->page, why)) return false;
        n_host += n->host != TREE_NONE;
        n_stuck += is_unused(n->place) && n->n_pin > 0;
    }
    if (n_stuck != c->n_stuck) return *why = "the count of unused blocks that are being read is wrong", false;
    if (c->o.move && n_host + c->n_host_free + c->n_out != c->o.n_host_page)
        return *why = "pages of host memory are lost or held twice", false;
    return tree_check(&c->tree, why);
}

bool cache_walk_end(cache *c, const char **why) {
    if (c->o.prefix && !walk_tree(c, why)) return false;
    for (int32_t p = 0; c->n_job && p < c->o.n_page; p++)
        for (int32_t k = 0; k < c->n_job[p]; k++)
            if (!pages_walk_hold(&c->pool, (page_hold){p, c->pool.gen[p]}, why)) return false;
    return pages_walk_end(&c->pool, why);
}
