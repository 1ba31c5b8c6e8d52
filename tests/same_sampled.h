/* Whether two tokens were sampled the same, by the bit. */
#ifndef ERN_TESTS_SAME_SAMPLED_H
#define ERN_TESTS_SAME_SAMPLED_H

#include <string.h>

#include "model/sample.h"

static inline bool same_sampled(const ern_sampled *a, const ern_sampled *b) {
    const size_t n = (size_t)a->n_top;
    return a->token == b->token && a->bad == b->bad && a->rank == b->rank && a->n_top == b->n_top &&
           memcmp(&a->logprob, &b->logprob, sizeof a->logprob) == 0 &&
           memcmp(a->top_id, b->top_id, n * sizeof *a->top_id) == 0 &&
           memcmp(a->top_logprob, b->top_logprob, n * sizeof *a->top_logprob) == 0;
}

#endif
