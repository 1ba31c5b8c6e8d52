/* The rule of stop strings by itself, slow and plain: what test_stop and fz_stop hold ern_stop against. */
#ifndef ERN_TESTS_NAIVE_STOP_H
#define ERN_TESTS_NAIVE_STOP_H

#include <stddef.h>
#include <string.h>

/* The rule by itself: the string whose last byte comes first, of those the longest, of those the first given. Returns
 * its index or -1; *start and *end of it in the text. */
static inline int naive_stop(const char *text, size_t len, const char *const *stop, const size_t *stop_len, int n,
                             size_t *start, size_t *end) {
    for (*end = 1; *end <= len; ++*end) {
        int best = -1;
        for (int i = 0; i < n; i++) {
            if (stop_len[i] > *end || memcmp(text + *end - stop_len[i], stop[i], stop_len[i]) != 0) continue;
            if (best < 0 || stop_len[i] > stop_len[best]) best = i;
        }
        if (best < 0) continue;
        *start = *end - stop_len[best];
        return best;
    }
    return -1;
}

#endif
