/* Random requests, and the check of every event that comes back for them. */
#ifndef ERN_TESTS_SIM_TRAFFIC_H
#define ERN_TESTS_SIM_TRAFFIC_H

#include "sim/scripted.h"

/* A small generator of its own, so that a seed means the same run everywhere. */
typedef struct rng {
    uint64_t key, n;
} rng;
uint64_t rng_next(rng *g);
/* lo .. hi, both included. */
int32_t rng_in(rng *g, int32_t lo, int32_t hi);
/* True once in `of` draws. */
bool rng_one(rng *g, int32_t of);

/* Tokens that later prompts begin with: what earlier requests had. */
enum { TRAFFIC_STEMS = 6, TRAFFIC_STEM_MAX = 1000 };
typedef struct traffic_stems {
    int32_t n[TRAFFIC_STEMS];
    int32_t token[TRAFFIC_STEMS][TRAFFIC_STEM_MAX];
} traffic_stems;

/* One request in one allocation of its own, freed at its END: a late use is a use after free. */
typedef struct traffic {
    ern_request r; /* first */
    scripted_oracle oracle;
    int32_t n_event, n_token;
    bool cancelled; /* asked to */
    int64_t cancel_turn;
    bool may_expire; /* has a deadline */
    int32_t *output;
    int32_t memory[]; /* prompt, stop, ban, output */
} traffic;

typedef struct traffic_mix {
    int32_t n_vocab, max_len;
    int32_t max_tokens; /* most of one request */
    bool reports;       /* some ask for prompt logprobs */
    bool priorities;
    int64_t deadline_us;  /* some have one within so long from now; 0: none */
    traffic_stems *stems; /* most prompts begin with one; NULL: none does */
    int32_t n_salt;       /* requests have one of so many salts */
} traffic_mix;

/* Remember the tokens of a request that is over, in place of another's. */
void traffic_remember(rng *g, const traffic *t, traffic_stems *stems);
traffic *traffic_make(rng *g, const traffic_mix *m, int64_t now_us);
/* Check one event of t against its oracle and the contract; prints what is wrong and returns false. failed: the backend
 * did, so END may be ERROR. */
bool traffic_check(traffic *t, const ern_event *ev, bool failed);

#endif
