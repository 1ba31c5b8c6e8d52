/* For comparisons of a backend with ref: which experts a row's router logits choose. */
#ifndef ERN_TESTS_EXPERTS_CHOSEN_H
#define ERN_TESTS_EXPERTS_CHOSEN_H

#include <math.h>
#include <stdint.h>

#include "model/model.h"

/* The K best of prob + bias, as a set of bits, in double. gap: between the last chosen and the best of the others. At
 * most 64 experts. */
static inline uint64_t experts_chosen(const float *logit, const ern_layer *l, const ern_config *c, double *gap) {
    double score[64], top = -INFINITY, sum = 0, last = 0;
    uint64_t set = 0;
    for (int32_t e = 0; e < c->n_expert; e++) top = fmax(top, (double)logit[e]);
    for (int32_t e = 0; e < c->n_expert; e++) sum += exp((double)logit[e] - top);
    for (int32_t e = 0; e < c->n_expert; e++)
        score[e] = exp((double)logit[e] - top) / sum + (double)(l->router_bias ? l->router_bias[e] : 0);
    for (int32_t k = 0; k <= c->n_expert_used; k++) {
        int32_t best = -1;
        for (int32_t e = 0; e < c->n_expert; e++)
            if (!(set >> e & 1) && (best < 0 || score[e] > score[best])) best = e;
        *gap = last - score[best];
        last = score[best];
        if (k < c->n_expert_used) set |= 1ull << best;
    }
    return set;
}

#endif
