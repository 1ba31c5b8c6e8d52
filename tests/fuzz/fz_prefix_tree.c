/* Any sequence of operations on the KV cache keeps its invariants, and what it finds is what was put in: beside it runs
 * a model that knows every block that was ever kept, as a tree of letters, and what each page, host page and file
 * holds. The input is a list of bytes: a header of sizes, then operations. */
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "engine/cache.h"

enum { P = 2, LETTERS = 3, DEPTH = 5, SALTS = 2, NODES = 364, PATHS = 6, PAGES = 24, HOSTS = 8, FILES = 64 };

typedef struct input {
    const uint8_t *data;
    size_t n;
} input;

static int32_t byte(input *in) {
    if (in->n == 0) return 0;
    in->n--;
    return *in->data++;
}

/* Block number `of` in the tree of letters: node 0 is the empty beginning, letter c of node i is 3 i + 1 + c. */
typedef struct seq {
    bool used, loading;
    int32_t salt, token[DEPTH * P], block[DEPTH]; /* its blocks, with the salt: salt * NODES + node */
} seq;

typedef struct file {
    uint64_t key[2];
    int32_t block;
} file;

typedef struct world {
    cache c;
    cache_path path[PATHS];
    page_hold page[PATHS][DEPTH];
    int32_t node[PATHS][DEPTH];
    seq seq[PATHS];
    uint8_t salt[SALTS][TREE_SALT_BYTES];
    bool kept[SALTS * NODES];            /* was put in, and not taken back */
    int32_t holds[PAGES], host[HOSTS];   /* the block whose keys and values are there; -1: none */
    transfer_job job[TRANSFER_JOBS_MAX]; /* started; the bytes move when they end, or at once */
    file file[FILES];
    int32_t n_job, n_file, n_flight, jobs_max;
    bool eager, ready[TRANSFER_JOBS_MAX], ok[TRANSFER_JOBS_MAX];
} world;

/* ---- the other side of the transfers --------------------------------------------------------------------------- */

static file *file_of(world *w, const uint64_t key[2]) {
    for (int32_t i = 0; i < w->n_file; i++)
        if (memcmp(w->file[i].key, key, sizeof w->file[i].key) == 0) return &w->file[i];
    return NULL;
}

static bool run(world *w, const transfer_job *j, bool ok) {
    const file *f = j->kind >= TRANSFER_SAVE ? file_of(w, j->block.key) : NULL;
    switch (j->kind) {
    case TRANSFER_OUT: w->host[j->host_page] = w->holds[j->device_page]; return true;
    case TRANSFER_IN: w->holds[j->device_page] = w->host[j->host_page]; return true;
    case TRANSFER_SAVE:
        if (f || !ok || w->n_file == FILES) return false;
        w->file[w->n_file] = (file){.block = w->holds[j->device_page]};
        memcpy(w->file[w->n_file++].key, j->block.key, sizeof j->block.key);
        return true;
    default: w->holds[j->device_page] = f && ok ? f->block : -1; return f && ok;
    }
}

static bool start(void *ud, const transfer_job *job) {
    world *w = ud;
    if (w->n_job >= w->jobs_max) return false;
    w->ready[w->n_job] = false;
    w->job[w->n_job] = *job;
    w->ok[w->n_job] = true;
    if (w->eager) w->ok[w->n_job] = run(w, job, true);
    w->n_job++;
    return true;
}

/* Of each lane the jobs end in order; job k may, when none before it of its lane has not. */
static void end_job(world *w, int32_t k, bool ok) {
    bool disk = w->job[k].kind >= TRANSFER_SAVE;
    for (int32_t i = 0; i < k; i++)
        if ((w->job[i].kind >= TRANSFER_SAVE) == disk && !w->ready[i]) return;
    if (w->ready[k]) return;
    w->ready[k] = true;
    if (!w->eager) w->ok[k] = run(w, &w->job[k], ok);
}

static int32_t poll(void *ud, transfer_job *done, int32_t n) {
    world *w = ud;
    int32_t n_done = 0, n_left = 0;
    for (int32_t k = 0; k < w->n_job; k++) {
        if (w->ready[k] && n_done < n) {
            done[n_done] = w->job[k];
            done[n_done].block.token = NULL;
            done[n_done++].ok = w->ok[k];
            continue;
        }
        w->job[n_left] = w->job[k];
        w->ready[n_left] = w->ready[k];
        w->ok[n_left++] = w->ok[k];
    }
    w->n_job = n_left;
    return n_done;
}

static bool on_disk(void *ud, const uint64_t key[2]) { return file_of(ud, key) != NULL; }

static const transfer_ops ops = {start, poll, on_disk};

/* ---- operations ------------------------------------------------------------------------------------------------ */

static void check(world *w) {
    const char *why = "";
    cache_walk_begin(&w->c);
    bool ok = true;
    for (int32_t i = 0; ok && i < PATHS; i++) ok = cache_walk_path(&w->c, &w->path[i], &why);
    if (!ok || !cache_walk_end(&w->c, &why)) ern_assert_fail(why, __FILE__, __LINE__);
}

/* Every block that is there is the one that it should be. */
static void check_content(const world *w, int32_t i) {
    for (int32_t k = 0; k < w->path[i].n_node; k++) ERN_ASSERT(w->holds[w->path[i].page[k].page] == w->seq[i].block[k]);
}

static void attach(world *w, int32_t i, input *in) {
    seq *s = &w->seq[i];
    cache_path *p = &w->path[i];
    if (s->used) return;
    s->used = true;
    s->salt = byte(in) % SALTS;
    p->salt = w->salt[s->salt];
    for (int32_t k = 0, at = 0; k < DEPTH; k++) {
        int32_t letter = byte(in) % LETTERS;
        at = LETTERS * at + 1 + letter;
        s->token[k * P] = letter;
        s->token[k * P + 1] = 7;
        s->block[k] = s->salt * NODES + at;
    }
    int32_t n_token = byte(in) % (DEPTH * P + 1), n_load = byte(in) % 8, was_room = cache_room(&w->c);
    cache_attach(&w->c, p, s->token, n_token, n_load < was_room ? n_load : was_room);
    ERN_ASSERT(p->n_node <= n_token / P && p->n_node == p->n_page && p->n_found == p->n_node);
    ERN_ASSERT(p->n_from[TREE_FROM_POOL] + p->n_from[TREE_FROM_HOST] + p->n_from[TREE_FROM_DISK] == p->n_node);
    for (int32_t k = 0; k < p->n_node; k++) ERN_ASSERT(w->c.o.disk || w->kept[s->block[k]]); /* nothing made up */
    s->loading = cache_is_loading(&w->c, p);
    if (!s->loading) check_content(w, i);
}

static void settle(world *w, int32_t i) {
    if (!w->seq[i].loading || cache_is_loading(&w->c, &w->path[i])) return;
    w->seq[i].loading = false;
    check_content(w, i);
}

/* Compute up to n_block blocks and keep n_keep of them. */
static void compute(world *w, int32_t i, int32_t n_block, int32_t n_keep) {
    seq *s = &w->seq[i];
    cache_path *p = &w->path[i];
    if (!s->used || s->loading) return;
    while (p->n_page < n_block && cache_room(&w->c) > 0) {
        cache_take(&w->c, p);
        w->holds[p->page[p->n_page - 1].page] = s->block[p->n_page - 1];
    }
    int32_t was = p->n_node;
    cache_insert(&w->c, p, s->token, p->n_page * P, n_keep);
    cache_vouch(&w->c, p);
    ERN_ASSERT(p->n_node >= was && p->n_node <= p->n_page && (p->n_node == was || p->n_node <= n_keep));
    for (int32_t k = was; k < p->n_node; k++) w->kept[s->block[k]] = true;
    check_content(w, i);
}

static void forget(world *w, int32_t salt, int32_t node) {
    if (node >= NODES) return;
    w->kept[salt * NODES + node] = false;
    for (int32_t c = 0; c < LETTERS; c++) forget(w, salt, LETTERS * node + 1 + c);
}

static void disown(world *w, int32_t i) {
    const cache_path *p = &w->path[i];
    if (!w->seq[i].used || w->seq[i].loading) return;
    if (p->n_found < p->n_node && !w->c.tree.node[p->node[p->n_found]].dead)
        forget(w, w->seq[i].salt, w->seq[i].block[p->n_found] % NODES);
    cache_disown(&w->c, &w->path[i]);
}

static void release(world *w, int32_t i) {
    cache_release(&w->c, &w->path[i]);
    w->seq[i].used = w->seq[i].loading = false;
}

static void turn(world *w) {
    cache_turn(&w->c);
    for (int32_t i = 0; i < PATHS; i++) settle(w, i);
}

static void step(world *w, input *in) {
    int32_t op = byte(in), i = op % PATHS, n = op / PATHS % (DEPTH + 1);
    if (op < 60) {
        attach(w, i, in);
    } else if (op < 120) {
        compute(w, i, n, byte(in) % (DEPTH + 1));
    } else if (op < 160) {
        release(w, i);
    } else if (op < 166) {
        disown(w, i);
    } else if (op < 200) {
        for (int32_t k = 0; n > 2 && k < w->n_job; k++) end_job(w, k, true); /* often: host memory is deep down */
        turn(w);
    } else if (op < 230) {
        if (w->n_job > 0) end_job(w, n % w->n_job, byte(in) % 8 != 0);
    } else if (op < 243) {
        if (w->n_flight < 2) w->n_flight++, cache_step_submitted(&w->c);
    } else if (w->n_flight > 0) {
        w->n_flight--, cache_step_collected(&w->c);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input in = {data, size};
    static world w;
    memset(&w, 0, sizeof w);
    memset(w.holds, 0xff, sizeof w.holds);
    memset(w.host, 0xff, sizeof w.host);
    w.salt[1][3] = 1;
    int32_t what = byte(&in);
    cache_options o = {.n_page = DEPTH + byte(&in) % (what & 64 ? PAGES - DEPTH : 4), .page_tokens = P, .prefix = true};
    o.n_host_page = what & 1 ? 1 + byte(&in) % HOSTS : 0;
    o.disk = what & 2;
    if (o.n_host_page > 0 || o.disk) o.move = &ops, o.move_ud = &w;
    w.eager = what & 4;
    w.jobs_max = what & 8 ? 2 : TRANSFER_JOBS_MAX;
    ern_arena arena;
    ern_arena_open(&arena, 0);
    layout l = {.arena = &arena};
    cache_open(&w.c, &l, &o);
    if ((what & 48) == 48 && !o.disk) w.c.tree.key_mask = 1; /* the disk's blocks are told apart by their keys */
    for (int32_t i = 0; i < PATHS; i++)
        w.path[i] = (cache_path){.page = w.page[i], .node = w.node[i], .salt = w.salt[0]};
    while (in.n > 0) {
        step(&w, &in);
        check(&w);
    }
    /* All leave, all moves end: everything is room. */
    for (int32_t i = 0; i < PATHS; i++) release(&w, i);
    while (w.n_flight > 0) w.n_flight--, cache_step_collected(&w.c);
    for (int32_t k = 0; cache_turn(&w.c) || w.n_job > 0; k++) {
        ERN_ASSERT(k < 10000);
        for (int32_t j = 0; j < w.n_job; j++) end_job(&w, j, true);
    }
    check(&w);
    ERN_ASSERT(cache_room(&w.c) == o.n_page && !cache_is_busy(&w.c) && !cache_is_saving(&w.c));
    ern_arena_close(&arena);
    return 0;
}
