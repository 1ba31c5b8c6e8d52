/* A bounded queue between threads. See ring.h. */
#include "base/ring.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct ern_ring {
    pthread_mutex_t lock;
    pthread_cond_t filled;
    size_t cap, item_bytes, head, count; /* items head .. head+count-1 (mod cap) are inside */
    bool shut;
    unsigned char *slots; /* [cap, item_bytes] */
};

ern_status ern_ring_open(ern_ring **out, size_t cap, size_t item_bytes, ern_err *err) {
    ERN_ASSERT(cap > 0 && item_bytes > 0);
    ern_ring *r = calloc(1, sizeof *r);
    unsigned char *slots = calloc(cap, item_bytes);
    if (!r || !slots) {
        free(r);
        free(slots);
        return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for a queue of %zu items of %zu bytes", cap, item_bytes);
    }
    r->cap = cap;
    r->item_bytes = item_bytes;
    r->slots = slots;
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&r->filled, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&r->lock, NULL);
    *out = r;
    return ERN_OK;
}

void ern_ring_close(ern_ring *r) {
    if (!r) return;
    pthread_cond_destroy(&r->filled);
    pthread_mutex_destroy(&r->lock);
    free(r->slots);
    free(r);
}

bool ern_ring_push_n(ern_ring *r, const void *items, size_t n) {
    pthread_mutex_lock(&r->lock);
    bool ok = !r->shut && n <= r->cap - r->count;
    for (size_t i = 0; ok && i < n; i++) {
        size_t at = (r->head + r->count) % r->cap;
        memcpy(r->slots + at * r->item_bytes, (const unsigned char *)items + i * r->item_bytes, r->item_bytes);
        r->count++;
    }
    if (ok && n == 1) pthread_cond_signal(&r->filled);
    if (ok && n > 1) pthread_cond_broadcast(&r->filled);
    pthread_mutex_unlock(&r->lock);
    return ok;
}

bool ern_ring_push(ern_ring *r, const void *item) { return ern_ring_push_n(r, item, 1); }

static bool take(ern_ring *r, void *item) {
    if (r->count == 0) return false;
    memcpy(item, r->slots + r->head * r->item_bytes, r->item_bytes);
    r->head = (r->head + 1) % r->cap;
    r->count--;
    return true;
}

bool ern_ring_try_pop(ern_ring *r, void *item) {
    pthread_mutex_lock(&r->lock);
    bool ok = take(r, item);
    pthread_mutex_unlock(&r->lock);
    return ok;
}

bool ern_ring_pop(ern_ring *r, void *item, int64_t timeout_us) {
    struct timespec end = {0};
    if (timeout_us >= 0) {
        clock_gettime(CLOCK_MONOTONIC, &end);
        end.tv_sec += timeout_us / 1000000;
        end.tv_nsec += (timeout_us % 1000000) * 1000;
        if (end.tv_nsec >= 1000000000) end.tv_sec++, end.tv_nsec -= 1000000000;
    }
    pthread_mutex_lock(&r->lock);
    int rc = 0;
    while (r->count == 0 && !r->shut && rc != ETIMEDOUT)
        rc = timeout_us < 0 ? pthread_cond_wait(&r->filled, &r->lock)
                            : pthread_cond_timedwait(&r->filled, &r->lock, &end);
    bool ok = take(r, item);
    pthread_mutex_unlock(&r->lock);
    return ok;
}

void ern_ring_shut(ern_ring *r) {
    pthread_mutex_lock(&r->lock);
    r->shut = true;
    pthread_cond_broadcast(&r->filled);
    pthread_mutex_unlock(&r->lock);
}

size_t ern_ring_count(ern_ring *r) {
    pthread_mutex_lock(&r->lock);
    size_t n = r->count;
    pthread_mutex_unlock(&r->lock);
    return n;
}
