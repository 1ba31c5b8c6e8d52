/* The host side of sampling: rules whose lists lie in one array of words, so that a step's rules go to the device in
 * one copy. Only what the rule will look at is copied: `seen` may be as long as the context. */
#include <string.h>

#include "backend/cuda/cu_kernels.h"

static bool penalises(const ern_sample *s) {
    return s->repetition != 1.0f || s->frequency != 0.0f || s->presence != 0.0f;
}

static int64_t mask_words(int32_t n_vocab) { return ((int64_t)n_vocab + 31) / 32; }

int64_t cu_sample_aux_words(const ern_sample *s, int32_t n_vocab) {
    int64_t n = 0;
    if (penalises(s)) n += s->n_seen;
    if (s->n_bias > 0) n += 2 * (int64_t)s->n_bias;
    if (s->n_ban > 0) n += s->n_ban;
    if (s->mask) n += mask_words(n_vocab);
    return n;
}

/* n words to aux[at..]; where they went. */
static int32_t put(int32_t *aux, int64_t *at, const void *words, int64_t n) {
    int64_t first = *at;
    ERN_ASSERT(n >= 0 && first >= 0 && first + n <= INT32_MAX);
    if (n > 0) memcpy(aux + first, words, (size_t)n * sizeof *aux);
    *at = first + n;
    return (int32_t)first;
}

int64_t cu_sample_prepare(cu_rule *out, const ern_sample *s, int32_t row, int32_t row0, int32_t pos, int32_t n_vocab,
                          int32_t *aux, int64_t at) {
    _Static_assert(sizeof(ern_bias) == 2 * sizeof(int32_t), "pairs of words");
    memset(out, 0, sizeof *out); /* padding too: the rules of a step are compared and copied as bytes */
    out->s = *s;
    out->s.seen = NULL;
    out->s.bias = NULL;
    out->s.ban = NULL;
    out->s.mask = NULL;
    out->seen = penalises(s) ? put(aux, &at, s->seen, s->n_seen) : -1;
    out->bias = s->n_bias > 0 ? put(aux, &at, s->bias, 2 * (int64_t)s->n_bias) : -1;
    out->ban = s->n_ban > 0 ? put(aux, &at, s->ban, s->n_ban) : -1;
    out->mask = s->mask ? put(aux, &at, s->mask, mask_words(n_vocab)) : -1;
    out->row = row;
    out->row0 = row0;
    out->pos = pos;
    return at;
}
