/* Any sequence of operations on the scheduler and its pool keeps their invariants. The input is a list of bytes: a
 * header of rules, then operations; steps are planned one ahead of their results, as the core does. */
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "engine/sched.h"

enum { N_SEQ = 40, LEN = 64, ITEMS = 16 };

typedef struct input {
    const uint8_t *data;
    size_t n;
} input;

static int32_t byte(input *in) {
    if (in->n == 0) return 0;
    in->n--;
    return *in->data++;
}

typedef struct world {
    sched s;
    sched_item item[2][ITEMS];
    sched_plan plan[2]; /* plan[0] is in flight while has_flight */
    bool has_flight;
    uint64_t id;
} world;

static void check(world *w) {
    const char *why = "";
    if (!sched_check(&w->s, &why)) ern_assert_fail(why, __FILE__, __LINE__);
}

static bool in_flight(const world *w, int32_t i) {
    for (int32_t k = 0; w->has_flight && k < w->plan[0].n_item; k++)
        if (w->plan[0].item[k].seq == i) return true;
    return false;
}

static void add(world *w, input *in) {
    for (int32_t i = 0; i < N_SEQ; i++) {
        if (w->s.seq[i].where != SCHED_OUT) continue;
        int32_t n_prompt = 1 + byte(in) % (LEN - 1), more = byte(in) % (LEN - n_prompt + 1);
        bool reports = byte(in) % 3 == 0 || more == 0;
        if (more == 0 && n_prompt == 1) more = 1; /* the core answers this one itself */
        w->s.seq[i] = (sched_seq){.id = ++w->id,
                                  .priority = byte(in) % 3 - 1,
                                  .n_prompt = n_prompt,
                                  .n_token = n_prompt,
                                  .n_asked = reports ? 1 : n_prompt,
                                  .n_len_max = n_prompt + more,
                                  .credit = 1 + byte(in)};
        sched_add(&w->s, i);
        return;
    }
}

static void leave(world *w, int32_t i) {
    sched_where where = w->s.seq[i].where;
    if (where != SCHED_RUNNING && where != SCHED_WAITING) return;
    sched_leave(&w->s, i);
    if (!in_flight(w, i)) sched_forget(&w->s, i);
}

/* The step in flight is done. */
static void result(world *w) {
    if (!w->has_flight) return;
    sched_plan done = w->plan[0];
    w->has_flight = false;
    for (int32_t k = 0; k < done.n_item; k++) {
        const sched_item *it = &done.item[k];
        sched_seq *q = &w->s.seq[it->seq];
        q->n_pending -= it->samples;
        if (q->where == SCHED_LEAVING) {
            sched_forget(&w->s, it->seq);
            continue;
        }
        q->n_token += it->samples;
        bool over = q->n_len_max == q->n_prompt ? it->report0 + it->n_report == q->n_prompt && it->n_report > 0
                                                : q->n_token == q->n_len_max;
        if (over) leave(w, it->seq);
    }
}

static void step(world *w, int32_t want_room) {
    sched_plan *p = &w->plan[1];
    const sched_budget budget = {want_room, INT32_MAX};
    sched_make(&w->s, &budget, p);
    int32_t n_row = 0, n_want = 0;
    for (int32_t k = 0; k < p->n_item; k++) {
        const sched_item *it = &p->item[k];
        const sched_seq *q = &w->s.seq[it->seq];
        ERN_ASSERT(it->n_row > 0 && q->where == SCHED_RUNNING && !q->parked && it->pos + it->n_row == q->n_computed);
        ERN_ASSERT(it->n_report >= 0 && it->n_report + it->samples <= it->n_row);
        n_row += it->n_row;
        n_want += it->n_report + it->samples;
    }
    ERN_ASSERT(n_row == p->n_row && n_want == p->n_want && n_row <= w->s.rules.max_rows && n_want <= want_room);
    ERN_ASSERT(p->n_item <= w->s.rules.max_seqs);
    result(w); /* of the step before */
    if (p->n_item == 0) return;
    memcpy(w->item[0], w->item[1], sizeof w->item[0]);
    w->plan[0] = *p;
    w->plan[0].item = w->item[0];
    w->has_flight = true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input in = {data, size};
    static world w;
    memset(&w, 0, sizeof w);
    w.plan[1].item = w.item[1];
    sched_rules r = {.max_seqs = 1 + byte(&in) % ITEMS, .page_cells = 1 << byte(&in) % 5, .max_len = LEN};
    r.chunked = byte(&in) % 4 != 0;
    r.max_rows = (r.chunked ? r.max_seqs : LEN) + byte(&in) % 80;
    r.max_wants = r.chunked ? r.max_seqs + byte(&in) % 40 : r.max_rows;
    r.chunk_tokens = byte(&in) % 20;
    ern_arena arena;
    ern_arena_open(&arena, 0);
    layout l = {.arena = &arena};
    const cache_options kv = {.n_page = LEN / r.page_cells + 2 + byte(&in) % 16, .page_tokens = r.page_cells};
    sched_open(&w.s, &l, &r, N_SEQ, &kv);
    while (in.n > 0) {
        int32_t op = byte(&in), i = op >= 250 ? byte(&in) % N_SEQ : 0;
        if (op < 120)
            step(&w, r.max_wants);
        else if (op < 140)
            step(&w, byte(&in) % (r.max_wants + 1));
        else if (op < 220)
            add(&w, &in);
        else if (op < 250)
            w.s.seq[op % N_SEQ].parked ^= w.s.seq[op % N_SEQ].slot >= 0 && w.s.seq[op % N_SEQ].where != SCHED_OUT;
        else
            leave(&w, i);
        check(&w);
    }
    /* Let all end: everything must come back. */
    for (int32_t k = 0; k < N_SEQ; k++) w.s.seq[k].parked = false, w.s.seq[k].credit = 1 << 20;
    for (int32_t k = 0; w.s.n_running + w.s.n_waiting > 0 || w.has_flight; k++) {
        ERN_ASSERT(k < 200000); /* no livelock */
        step(&w, r.max_rows);
    }
    check(&w);
    ERN_ASSERT(w.s.cache.pool.n_free == w.s.cache.pool.n_page && w.s.n_slot_free == w.s.n_slot);
    ern_arena_close(&arena);
    return 0;
}
