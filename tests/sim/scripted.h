/* A backend whose arithmetic is a hash, to catch a wrong position, page, order or token at once.
 *
 * The cell of position p holds  h(p) = mix(token, p, sum over j < p of h(j) * (2j + 1)),  where every h(j) is read from
 * the cache through the batch's page table, as attention would. The token sampled after position p is a hash of h(p),
 * the sampling struct and, with a repetition penalty, all tokens seen. So one wrong cell, and every later token
 * differs. It honours the door: two submits in flight, run in order, ERN_PREV, wanted and forced rows, page moves. Runs
 * a step inside wait (or inside submit, when eager), so that whatever the batch borrows is used as late (or as early)
 * as it may be. No malloc after open. One backend at a time: its settings are global. */
#ifndef ERN_TESTS_SIM_SCRIPTED_H
#define ERN_TESTS_SIM_SCRIPTED_H

#include <stdatomic.h>

#include "engine/engine.h"

typedef struct scripted_settings {
    bool eager;           /* compute in submit */
    int64_t fail_at;      /* this wait (1-based) and all later ones fail; 0: none */
    uint64_t nan_seed;    /* rows that sample with this seed ... */
    int32_t nan_position; /* ... at this position or later are bad; 0: none */
    atomic_int hold_from; /* this wait (1-based) and all later ones are held until it is 0 again; 0: none */
} scripted_settings;
extern scripted_settings scripted;

extern const ern_backend_ops scripted_ops;

/* The least model that the engine and this backend look at. */
ern_model scripted_model(int32_t n_vocab, int32_t n_position);

/* The same arithmetic without pages, batches or steps: the events that a request must cause, one after the other. */
typedef struct scripted_oracle {
    const ern_request *r;
    int32_t n_vocab;
    int32_t n_fed; /* tokens hashed so far */
    uint64_t h, sum, fold;
    int32_t n_report; /* PROMPT events said */
    int32_t n_output, last;
    bool is_over;
    ern_end end;
} scripted_oracle;
void scripted_oracle_init(scripted_oracle *o, const ern_request *r, int32_t n_vocab);
/* The next event: kind, end, index, is_stop, sampled. After END it may not be called again. */
void scripted_oracle_next(scripted_oracle *o, ern_event *out);
/* True when two events say the same (of sampled: the entries that are filled). */
bool scripted_same(const ern_event *a, const ern_event *b);

#endif
