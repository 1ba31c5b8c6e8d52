/* A bounded queue of fixed-size items between threads: the only way the server's threads and the engine meet.
 *
 * Many producers, many consumers, one mutex: the crossing happens a few times per engine step, so a lock-free queue
 * would buy nothing a user could see. A full ring refuses (the caller answers 429); nothing ever grows.
 * Owner: whoever opened it. Any thread. */
#ifndef ERN_BASE_RING_H
#define ERN_BASE_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct ern_ring ern_ring;

/* A ring of `cap` items of item_bytes each, copied in and out. */
ERN_MUST_CHECK ern_status ern_ring_open(ern_ring **out, size_t cap, size_t item_bytes, ern_err *err);
void ern_ring_close(ern_ring *r); /* NULL is fine; nobody may be waiting */
/* Copy one item in; false when full or shut. */
bool ern_ring_push(ern_ring *r, const void *item);
/* Copy n items in, in order and all at once; false (and none copied) when they do not all fit or it is shut. */
bool ern_ring_push_n(ern_ring *r, const void *items, size_t n);
/* Copy one item out if there is one. */
bool ern_ring_try_pop(ern_ring *r, void *item);
/* Wait for an item up to timeout_us (negative: for ever); false on time-out or when shut and empty. */
bool ern_ring_pop(ern_ring *r, void *item, int64_t timeout_us);
/* Wake every waiter and refuse further pushes; what is inside can still be popped. */
void ern_ring_shut(ern_ring *r);
size_t ern_ring_count(ern_ring *r);

#endif
