/* The scheduler. See sched.h for the rules. */
#include "engine/sched.h"

#include <string.h>

#include "base/status.h"

enum {
    DECODE_PAGES = 2,      /* FD_ENC_DEC_BLOCK_NUM: pages a decode takes at once */
    RESERVE_MILLI = 16000, /* head-room right after a preemption: 16 pages per running sequence */
    RESERVE_DECAY = 25,    /* less 0.025 page per step */
    SLOT_SPARE = 8,        /* least slots beyond the seats: a leaving sequence keeps its own for one more step */
};

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

static int32_t most(int32_t a, int32_t b) { return a > b ? a : b; }

static int32_t pages_for(const sched *s, int32_t n_cell) {
    return (int32_t)(((int64_t)n_cell + s->rules.page_cells - 1) / s->rules.page_cells);
}

void sched_open(sched *s, layout *l, const sched_rules *rules, int32_t n_seq, const cache_options *kv) {
    *s = (sched){.rules = *rules, .n_seq = n_seq, .n_slot = rules->max_seqs + most(SLOT_SPARE, rules->spare_slots)};
    s->table_pages = pages_for(s, rules->max_len);
    cache_open(&s->cache, l, kv);
    s->seq = LAYOUT_NEW(l, sched_seq, n_seq);
    s->running = LAYOUT_NEW(l, int32_t, rules->max_seqs);
    s->waiting = LAYOUT_NEW(l, int32_t, n_seq);
    s->slot_free = LAYOUT_NEW(l, int32_t, s->n_slot);
    s->table = LAYOUT_NEW(l, page_hold, (int64_t)s->n_slot * s->table_pages);
    s->table_node = LAYOUT_NEW(l, int32_t, (int64_t)s->n_slot * s->table_pages);
    if (!l->arena || l->out) return;
    for (int32_t i = 0; i < s->n_slot; i++) s->slot_free[s->n_slot_free++] = s->n_slot - 1 - i;
}

/* ---- ordered lists --------------------------------------------------------------------------------------------- */

static bool before(const sched_seq *a, const sched_seq *b) {
    return a->priority != b->priority ? a->priority < b->priority : a->id < b->id;
}

/* Where seq[i] is, or belongs, in an ordered list. */
static int32_t place(const sched *s, const int32_t *list, int32_t n, int32_t i) {
    int32_t lo = 0, hi = n;
    while (lo < hi) {
        int32_t mid = lo + (hi - lo) / 2;
        if (before(&s->seq[list[mid]], &s->seq[i]))
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static void insert(const sched *s, int32_t *list, int32_t *n, int32_t i) {
    int32_t at = place(s, list, *n, i);
    memmove(list + at + 1, list + at, (size_t)(*n - at) * sizeof *list);
    list[at] = i;
    ++*n;
}

static void erase(int32_t *list, int32_t *n, int32_t at) {
    --*n;
    memmove(list + at, list + at + 1, (size_t)(*n - at) * sizeof *list);
}

static void to_waiting(sched *s, int32_t i) {
    ERN_ASSERT(s->n_waiting < s->n_seq);
    s->seq[i].where = SCHED_WAITING;
    s->n_resumable += s->seq[i].slot >= 0;
    insert(s, s->waiting, &s->n_waiting, i);
}

static void from_waiting(sched *s, int32_t at) {
    s->n_resumable -= s->seq[s->waiting[at]].slot >= 0;
    erase(s->waiting, &s->n_waiting, at);
}

void sched_add(sched *s, int32_t i) {
    sched_seq *q = &s->seq[i];
    ERN_ASSERT(q->where == SCHED_OUT && q->path.n_page == 0 && q->n_computed == 0 && q->n_len_max <= s->rules.max_len);
    q->slot = -1;
    q->blocked = INT32_MIN;
    to_waiting(s, i);
}

static void give_slot(sched *s, sched_seq *q) {
    if (q->slot >= 0) return;
    q->slot = s->slot_free[--s->n_slot_free];
    q->path.page = s->table + (int64_t)q->slot * s->table_pages;
    q->path.node = s->table_node + (int64_t)q->slot * s->table_pages;
}

static void take_slot(sched *s, sched_seq *q) {
    if (q->slot >= 0) s->slot_free[s->n_slot_free++] = q->slot;
    q->slot = -1;
}

void sched_leave(sched *s, int32_t i) {
    sched_seq *q = &s->seq[i];
    if (q->where == SCHED_RUNNING) {
        erase(s->running, &s->n_running, place(s, s->running, s->n_running, i));
    } else {
        ERN_ASSERT(q->where == SCHED_WAITING);
        from_waiting(s, place(s, s->waiting, s->n_waiting, i));
    }
    cache_release(&s->cache, &q->path);
    q->loading = false;
    q->where = SCHED_LEAVING;
}

void sched_forget(sched *s, int32_t i) {
    sched_seq *q = &s->seq[i];
    ERN_ASSERT(q->where == SCHED_LEAVING && q->path.n_page == 0);
    take_slot(s, q);
    q->where = SCHED_OUT;
}

void sched_done(sched *s, int32_t i, int32_t n_done, bool sound) {
    sched_seq *q = &s->seq[i];
    if (q->where != SCHED_RUNNING) return;
    cache_insert(&s->cache, &q->path, q->token, n_done, q->n_keep / s->rules.page_cells);
    if (sound) cache_vouch(&s->cache, &q->path);
}

/* ---- rows ------------------------------------------------------------------------------------------------------ */

/* Rows that it lacks: all tokens but, once it is as long as it may get, the last. */
static int32_t rows_left(const sched_seq *q) {
    return least(q->n_token + q->n_pending, q->n_len_max - 1) - q->n_computed;
}

static bool is_ready(const sched_seq *q) { return !q->parked && !q->loading && rows_left(q) > 0; }

/* What n_row rows from n_computed on would be wanted for. */
static sched_item item_of(const sched_seq *q, int32_t n_row) {
    sched_item it = {.pos = q->n_computed, .n_row = n_row, .report0 = most(q->n_computed + 1, q->n_asked)};
    it.n_report = most(0, least(q->n_computed + n_row, q->n_prompt - 1) - it.report0 + 1);
    it.samples = q->n_computed + n_row == q->n_token + q->n_pending;
    return it;
}

/* The rows it can have in this step within row and want budgets; n_row 0: none. */
static sched_item rows_within(const sched *s, const sched_seq *q, int32_t row_left, int32_t want_left) {
    int32_t left = rows_left(q), n = least(left, row_left);
    if (s->rules.chunked) {
        if (s->rules.chunk_tokens > 0) n = least(n, s->rules.chunk_tokens);
        if (s->rules.max_partial > 1) n = least(n, most(s->rules.max_rows / s->rules.max_partial, 1));
        want_left = least(want_left, q->credit);
    }
    sched_item it = item_of(q, n);
    if (it.n_report + it.samples > want_left && it.samples) it = item_of(q, --n); /* leave the sampled row for later */
    if (it.n_report > want_left) it = item_of(q, n = it.report0 + want_left - 1 - q->n_computed);
    if (n <= 0 || (!s->rules.chunked && n < left)) return (sched_item){0};
    return it;
}

static void plan_add(sched *s, int32_t i, sched_item it, sched_plan *out) {
    sched_seq *q = &s->seq[i];
    it.seq = i;
    out->item[out->n_item++] = it;
    out->n_row += it.n_row;
    out->n_want += it.n_report + it.samples;
    q->n_computed += it.n_row;
    q->n_asked = most(q->n_asked, it.report0 + it.n_report);
    q->n_pending += it.samples;
}

/* ---- pages ----------------------------------------------------------------------------------------------------- */

static void take_pages(sched *s, sched_seq *q, int32_t n) {
    ERN_ASSERT(q->path.n_page + n <= s->table_pages);
    for (; n > 0; n--) cache_take(&s->cache, &q->path);
}

/* Pages it can come to need. */
static int32_t pages_most(const sched *s, const sched_seq *q) { return pages_for(s, q->n_len_max - 1); }

/* Running sequence number `at` gives up its pages and goes back to the queue. */
static void preempt(sched *s, int32_t at, sched_plan *out) {
    int32_t i = s->running[at];
    sched_seq *q = &s->seq[i];
    erase(s->running, &s->n_running, at);
    cache_release(&s->cache, &q->path);
    q->n_computed = 0;
    q->loading = false;
    q->blocked = INT32_MIN;
    q->n_preempted++;
    to_waiting(s, i);
    out->n_preempted++;
}

/* The last parked of the running, or -1. */
static int32_t last_parked(const sched *s) {
    for (int32_t at = s->n_running - 1; at >= 0; at--)
        if (s->seq[s->running[at]].parked) return at;
    return -1;
}

/* Give running sequence *at the pages for n_row more rows, preempting for them. False: it was the last and was
 * preempted itself, or waits for pages that transfers still read: to begin again could let them take the same pages
 * again. *at follows the sequence when one before it leaves. */
static bool grow(sched *s, int32_t *at, int32_t n_row, bool decode, sched_plan *out) {
    sched_seq *q = &s->seq[s->running[*at]];
    int32_t need = most(0, pages_for(s, q->n_computed + n_row) - q->path.n_page);
    int32_t few = s->rules.page_cells * 3 / 16; /* 12 cells of a page of 64 */
    if (decode && q->path.n_page * s->rules.page_cells - (q->n_token + q->n_pending) <= few) {
        int32_t more = least(DECODE_PAGES, pages_most(s, q) - q->path.n_page);
        if (more > need && more <= s->cache.pool.n_free) need = more; /* ahead of time: not at the price of a block */
    }
    while (need > cache_room(&s->cache)) {
        int32_t victim = last_parked(s);
        if (victim < 0) victim = s->n_running - 1;
        out->waits = victim == *at && cache_is_moving(&s->cache);
        if (out->waits) return false;
        preempt(s, victim, out);
        s->reserve_milli = RESERVE_MILLI;
        if (victim == *at) return false;
        if (victim < *at) --*at;
    }
    take_pages(s, q, need);
    return true;
}

/* ---- the plan -------------------------------------------------------------------------------------------------- */

typedef struct budget {
    int32_t row, want; /* left */
    int32_t prompt;    /* rows left for prompts */
} budget;

static void spend(sched_item it, bool decode, budget *left) {
    left->row -= it.n_row;
    left->want -= it.n_report + it.samples;
    if (!decode) left->prompt -= it.n_row;
}

/* Whose blocks have arrived, or will not: the rest is to be computed. */
static void settle_loads(sched *s) {
    for (int32_t at = 0; at < s->n_running; at++) {
        sched_seq *q = &s->seq[s->running[at]];
        if (!q->loading || cache_is_loading(&s->cache, &q->path)) continue;
        q->loading = false;
        q->n_computed = q->path.n_node * s->rules.page_cells;
    }
}

static void plan_running(sched *s, budget *left, sched_plan *out) {
    int32_t aside = 0; /* decodes first: a row and a want are set aside for each that is still to come */
    for (int32_t at = 0; at < s->n_running; at++) {
        const sched_seq *q = &s->seq[s->running[at]];
        aside += is_ready(q) && rows_left(q) == 1;
    }
    if (aside == 0 || !s->rules.chunked) left->prompt = INT32_MAX; /* nobody waits for the end of this step */
    for (int32_t at = 0; at < s->n_running; at++) {
        int32_t i = s->running[at];
        const sched_seq *q = &s->seq[i];
        if (!is_ready(q)) continue;
        bool decode = rows_left(q) == 1;
        aside -= decode;
        sched_item it = decode ? rows_within(s, q, 1, left->want)
                               : rows_within(s, q, least(left->row - aside, left->prompt), most(0, left->want - aside));
        if (it.n_row == 0) continue;
        if (!grow(s, &at, it.n_row, decode, out)) break; /* it was the last */
        spend(it, decode, left);
        plan_add(s, i, it, out);
    }
}

/* Pages to leave alone when admitting: what the running may need soon, never more than they can ever need. */
static int32_t reserve(const sched *s) {
    int64_t n = 0;
    if (s->reserve_milli > 0)
        for (int32_t at = 0; at < s->n_running; at++) {
            const sched_seq *q = &s->seq[s->running[at]];
            n +=
                least(s->reserve_milli, (int32_t)least(pages_most(s, q) - q->path.n_page, RESERVE_MILLI / 1000) * 1000);
        }
    return (int32_t)((n + 999) / 1000);
}

/* The next that may be admitted at or after place `at` of the queue, or -1. Passed over, without blocking those behind:
 * the parked, and while no slot is free those that never ran (parked sequences that were preempted hold the slots: the
 * server cuts their readers off, or they catch up). */
static int32_t next_waiting(const sched *s, int32_t at) {
    for (; at < s->n_waiting; at++) {
        const sched_seq *q = &s->seq[s->waiting[at]];
        if (q->slot < 0 && s->n_slot_free == 0) {
            if (s->n_resumable == 0) return -1;
            continue;
        }
        if (!q->parked) return at;
    }
    return -1;
}

/* With reserve_all: would it fit for all its life beside the running, and its prompt beside theirs? */
static bool fits_for_good(const sched *s, const sched_seq *q) {
    int64_t owed = pages_most(s, q) - q->path.n_page, prompts = pages_for(s, q->n_prompt);
    for (int32_t at = 0; at < s->n_running; at++) {
        const sched_seq *r = &s->seq[s->running[at]];
        owed += pages_most(s, r) - r->path.n_page;
        prompts += pages_for(s, r->n_prompt);
    }
    return owed <= cache_room(&s->cache) && (s->n_running == 0 || prompts <= s->rules.prompt_pages);
}

/* Would it be one prompt in parts too many? */
static bool is_one_too_many(const sched *s, const sched_seq *q, int32_t n_row, bool *is_long) {
    int32_t n_partial = 0, n_long = 0, lacks = rows_left(q), bound = s->rules.long_tokens;
    for (int32_t at = 0; at < s->n_running; at++) {
        int32_t left = rows_left(&s->seq[s->running[at]]);
        n_partial += left > 1;
        n_long += left > 1 && bound > 0 && left > bound;
    }
    *is_long = bound > 0 && lacks > bound && s->rules.max_long > 0 && n_long >= s->rules.max_long;
    return *is_long || (n_row < lacks && s->rules.max_partial > 0 && n_partial >= s->rules.max_partial);
}

typedef enum verdict { ADMITTED, PASSED_OVER, STOP, NO_ROOM } verdict;

/* Admit waiting sequence number `at` if it fits: with rows of this step, or to load. */
static verdict admit(sched *s, int32_t at, budget *left, sched_plan *out) {
    int32_t i = s->waiting[at], held_back = reserve(s);
    sched_seq *q = &s->seq[i];
    ERN_ASSERT(q->n_pending == 0 && q->n_computed == 0); /* preempted earlier than the step before this one */
    if (s->n_running == s->rules.max_seqs) return NO_ROOM;
    if (least(left->row, left->prompt) <= 0) return STOP;
    int32_t spare = cache_room(&s->cache) - held_back;
    if (s->n_running > 0 && spare <= q->blocked) return NO_ROOM; /* nothing has changed */
    bool had_slot = q->slot >= 0;
    give_slot(s, q);
    int32_t known = least(q->n_token, q->n_asked < q->n_prompt ? q->n_asked : q->n_token) - 1; /* one row at least */
    cache_attach(&s->cache, &q->path, q->token, known, most(0, spare));
    q->loading = cache_is_loading(&s->cache, &q->path);
    q->n_computed = q->path.n_node * s->rules.page_cells;
    sched_item it = {0};
    verdict v = ADMITTED;
    int32_t need = 0;
    if (s->rules.reserve_all && !fits_for_good(s, q)) {
        v = NO_ROOM;
    } else if (!q->loading) {
        bool is_long = false;
        it = rows_within(s, q, least(left->row, left->prompt), left->want);
        need = pages_for(s, q->n_computed + it.n_row) - q->path.n_page;
        if (it.n_row == 0)
            v = STOP;
        else if (need + held_back > cache_room(&s->cache))
            v = NO_ROOM;
        else if (is_one_too_many(s, q, it.n_row, &is_long))
            v = is_long ? PASSED_OVER : STOP;
    }
    if (v != ADMITTED) {
        cache_release(&s->cache, &q->path);
        q->n_computed = 0;
        q->loading = false;
        if (!had_slot) take_slot(s, q);
        q->blocked = v == NO_ROOM ? spare : INT32_MIN;
        return v;
    }
    if (!had_slot) s->n_resumable++; /* as from_waiting will count it */
    from_waiting(s, at);
    q->where = SCHED_RUNNING;
    insert(s, s->running, &s->n_running, i);
    if (q->loading) {
        q->n_computed = 0; /* until all is there */
        return ADMITTED;
    }
    take_pages(s, q, need);
    spend(it, false, left);
    plan_add(s, i, it, out);
    return ADMITTED;
}

static void plan_waiting(sched *s, budget *left, sched_plan *out) {
    for (int32_t at = 0; (at = next_waiting(s, at)) >= 0;) {
        verdict v = admit(s, at, left, out);
        if (v == ADMITTED) continue;
        if (v == PASSED_OVER) {
            at++;
            continue;
        }
        /* No seat or no memory: a sequence that only waits for its reader makes place; we enter in the next step. */
        int32_t idle = v == NO_ROOM ? last_parked(s) : -1;
        if (idle >= 0) preempt(s, idle, out);
        return;
    }
}

void sched_make(sched *s, const sched_budget *b, sched_plan *out) {
    *out = (sched_plan){.item = out->item};
    budget left = {s->rules.max_rows, most(0, least(s->rules.max_wants, b->n_want)), b->n_prompt_row};
    settle_loads(s);
    plan_running(s, &left, out);
    if (out->n_preempted == 0 && !out->waits) plan_waiting(s, &left, out);
    if (out->n_item > 0 && s->reserve_milli > 0) s->reserve_milli -= RESERVE_DECAY;
}

/* ---- the walk -------------------------------------------------------------------------------------------------- */

static bool check_seq(sched *s, const sched_seq *q, const char **why) {
    if (q->where == SCHED_OUT) return true;
    if (q->where != SCHED_RUNNING && q->path.n_page != 0)
        return *why = "a sequence that does not run holds pages", false;
    if (q->where == SCHED_RUNNING && q->slot < 0) return *why = "a sequence runs without a slot", false;
    if (q->where != SCHED_RUNNING && q->where != SCHED_LEAVING && q->n_computed != 0)
        return *why = "a waiting sequence has computed rows", false;
    if (q->n_token + q->n_pending > q->n_len_max) return *why = "a sequence is longer than it may be", false;
    if (q->where == SCHED_RUNNING && q->n_computed > q->path.n_page * s->rules.page_cells)
        return *why = "a sequence has computed rows beyond its pages", false;
    if (q->path.n_page > pages_most(s, q)) return *why = "a sequence holds more pages than it can ever use", false;
    if (q->loading && (q->where != SCHED_RUNNING || q->n_computed != 0))
        return *why = "a sequence runs before its blocks are there", false;
    return cache_walk_path(&s->cache, &q->path, why);
}

static bool check_list(const sched *s, const int32_t *list, int32_t n, sched_where where, const char **why) {
    for (int32_t at = 0; at < n; at++) {
        if (s->seq[list[at]].where != where) return *why = "a list holds a sequence that is elsewhere", false;
        if (at > 0 && !before(&s->seq[list[at - 1]], &s->seq[list[at]])) return *why = "a list is out of order", false;
    }
    return true;
}

bool sched_check(sched *s, const char **why) {
    int32_t n_where[4] = {0}, n_slot = 0, n_resumable = 0;
    cache_walk_begin(&s->cache);
    for (int32_t i = 0; i < s->n_seq; i++) {
        const sched_seq *q = &s->seq[i];
        if (!check_seq(s, q, why)) return false;
        n_where[q->where]++;
        if (q->where == SCHED_OUT) continue;
        n_slot += q->slot >= 0;
        n_resumable += q->where == SCHED_WAITING && q->slot >= 0;
    }
    if (!cache_walk_end(&s->cache, why)) return false;
    if (n_where[SCHED_RUNNING] != s->n_running || n_where[SCHED_WAITING] != s->n_waiting)
        return *why = "a sequence is in no list, or in two", false;
    if (n_slot + s->n_slot_free != s->n_slot) return *why = "slots are lost or held twice", false;
    if (n_resumable != s->n_resumable) return *why = "the count of resumable sequences is wrong", false;
    return check_list(s, s->running, s->n_running, SCHED_RUNNING, why) &&
           check_list(s, s->waiting, s->n_waiting, SCHED_WAITING, why);
}
