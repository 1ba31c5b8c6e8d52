/* Where backend.h draws a number of a plane of ref's and cpu's pages: of the key (which 0) or the value (1) of cell p,
 * dimension c of C. codes: of I8 and F8, else of BF16 and F32. Written from the drawing, not from their code. */
#ifndef ERN_TESTS_KV_DRAWING_H
#define ERN_TESTS_KV_DRAWING_H

#include <stdbool.h>
#include <stddef.h>

static inline size_t kv_drawn_at(int which, size_t p, size_t c, size_t C, bool codes) {
    if (codes) return which == 0 ? (p / 16 * C + c) * 16 + p % 16 : p * C + c;
    return which == 0 ? (p / 16 * C + c / 2 * 2) * 16 + p % 16 * 2 + c % 2 : (p / 2 * C + c) * 2 + p % 2;
}

#endif
