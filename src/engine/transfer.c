/* Two threads that move KV blocks. See transfer.h.
 *
 *   engine thread     start --> [queue] --> host lane: OUT, IN        --> [done] --> poll
 *                           --> [queue] --> disk lane: LOAD, SAVE     --> [done] -->
 *
 * Each lane takes its jobs in order; the disk's takes every LOAD before the next SAVE, since a request waits for it. */
#include "engine/transfer.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "base/os.h"

enum { JOBS = TRANSFER_JOBS_MAX, FIRST = 0, LATER = 1, CLASSES = 2 };

typedef struct fifo {
    int32_t slot[JOBS];
    int32_t first, n;
} fifo;

typedef struct lane {
    transfer *t;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t work;
    transfer_job job[JOBS]; /* by slot */
    fifo queue[CLASSES], done, free;
    int32_t *token; /* [JOBS, page_tokens] the disk's jobs' own */
    bool stop, has_thread;
} lane;

struct transfer {
    transfer_options o;
    unsigned char *host; /* [n_host_page, page_bytes] */
    size_t host_bytes;
    unsigned char *block; /* [page_bytes] the disk lane's */
    lane lane[2];         /* host, disk */
};

static void push(fifo *f, int32_t slot) { f->slot[(f->first + f->n++) % JOBS] = slot; }

static int32_t pop(fifo *f) {
    int32_t slot = f->slot[f->first];
    f->first = (f->first + 1) % JOBS;
    f->n--;
    return slot;
}

/* ---- a lane's thread ------------------------------------------------------------------------------------------- */

static void run(transfer *t, transfer_job *j) {
    const ern_backend_ops *ops = t->o.backend->ops;
    unsigned char *host = j->host_page >= 0 ? t->host + (size_t)j->host_page * t->o.page_bytes : NULL;
    j->ok = true;
    switch (j->kind) {
    case TRANSFER_OUT: j->ok = ops->kv_read(t->o.backend, &j->device_page, 1, host); break;
    case TRANSFER_IN: ops->kv_write(t->o.backend, &j->device_page, 1, host); break;
    case TRANSFER_SAVE:
        j->ok = ops->kv_read(t->o.backend, &j->device_page, 1, t->block) && store_write(t->o.disk, &j->block, t->block);
        break;
    case TRANSFER_LOAD:
        j->ok = store_read(t->o.disk, &j->block, t->block);
        if (j->ok) ops->kv_write(t->o.backend, &j->device_page, 1, t->block);
        break;
    }
    j->block.token = NULL;
}

static void *lane_main(void *ud) {
    lane *l = ud;
    pthread_mutex_lock(&l->lock);
    for (;;) {
        while (!l->stop && l->queue[FIRST].n + l->queue[LATER].n == 0) pthread_cond_wait(&l->work, &l->lock);
        if (l->queue[FIRST].n + l->queue[LATER].n == 0) break;
        int32_t slot = pop(&l->queue[l->queue[FIRST].n > 0 ? FIRST : LATER]);
        pthread_mutex_unlock(&l->lock);
        run(l->t, &l->job[slot]);
        pthread_mutex_lock(&l->lock);
        push(&l->done, slot);
        if (l->stop) continue; /* nobody listens any more */
        pthread_mutex_unlock(&l->lock);
        l->t->o.wake(l->t->o.ud);
        pthread_mutex_lock(&l->lock);
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}

/* ---- the engine's thread --------------------------------------------------------------------------------------- */

static bool real_start(void *ud, const transfer_job *job) {
    transfer *t = ud;
    bool disk = job->kind == TRANSFER_SAVE || job->kind == TRANSFER_LOAD;
    lane *l = &t->lane[disk];
    pthread_mutex_lock(&l->lock);
    bool room = l->free.n > 0;
    if (room) {
        int32_t slot = pop(&l->free);
        l->job[slot] = *job;
        if (disk) {
            int32_t *token = l->token + (size_t)slot * (size_t)t->o.page_tokens;
            memcpy(token, job->block.token, sizeof *token * (size_t)t->o.page_tokens);
            l->job[slot].block.token = token;
        }
        push(&l->queue[job->kind == TRANSFER_SAVE ? LATER : FIRST], slot);
        pthread_cond_signal(&l->work);
    }
    pthread_mutex_unlock(&l->lock);
    return room;
}

static int32_t real_poll(void *ud, transfer_job *done, int32_t n) {
    transfer *t = ud;
    int32_t n_done = 0;
    for (int k = 0; k < 2; k++) {
        lane *l = &t->lane[k];
        pthread_mutex_lock(&l->lock);
        while (n_done < n && l->done.n > 0) {
            int32_t slot = pop(&l->done);
            done[n_done++] = l->job[slot];
            push(&l->free, slot);
        }
        pthread_mutex_unlock(&l->lock);
    }
    return n_done;
}

static bool real_on_disk(void *ud, const uint64_t key[2]) {
    const transfer *t = ud;
    return t->o.disk && store_has(t->o.disk, key);
}

const transfer_ops transfer_real_ops = {.start = real_start, .poll = real_poll, .on_disk = real_on_disk};

/* ---- open and close -------------------------------------------------------------------------------------------- */

uint64_t transfer_bytes(const transfer_options *o) {
    uint64_t tokens = (uint64_t)JOBS * (uint64_t)o->page_tokens * sizeof(int32_t);
    return (uint64_t)o->n_host_page * o->page_bytes + (o->disk ? o->page_bytes + tokens : 0) + sizeof(transfer);
}

static ern_status take_memory(transfer *t, ern_err *err) {
    const transfer_options *o = &t->o;
    t->host_bytes = (size_t)o->n_host_page * o->page_bytes;
    if (t->host_bytes > 0) {
        void *host = mmap(NULL, t->host_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (host == MAP_FAILED)
            return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for %zu MiB of evicted KV blocks; lower --swap-space",
                            t->host_bytes >> 20);
        (void)madvise(host, t->host_bytes, MADV_HUGEPAGE);
        t->host = host;
    }
    if (!o->disk) return ERN_OK;
    t->block = malloc(o->page_bytes);
    t->lane[1].token = calloc((size_t)JOBS * (size_t)o->page_tokens, sizeof(int32_t));
    if (!t->block || !t->lane[1].token)
        return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the disk tier's buffers (%llu KiB)",
                        (unsigned long long)(o->page_bytes >> 10));
    return ERN_OK;
}

ern_status transfer_open(transfer **out, const transfer_options *o, ern_err *err) {
    *out = NULL;
    transfer *t = calloc(1, sizeof *t);
    if (!t) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the KV tiers");
    t->o = *o;
    for (int k = 0; k < 2; k++) {
        lane *l = &t->lane[k];
        l->t = t;
        pthread_mutex_init(&l->lock, NULL);
        pthread_cond_init(&l->work, NULL);
        for (int32_t slot = 0; slot < JOBS; slot++) push(&l->free, slot);
    }
    ern_status status = take_memory(t, err);
    for (int k = 0; k < 2 && status == ERN_OK; k++) {
        if (k == 0 ? o->n_host_page == 0 : o->disk == NULL) continue;
        t->lane[k].has_thread = pthread_create(&t->lane[k].thread, NULL, lane_main, &t->lane[k]) == 0;
        if (!t->lane[k].has_thread)
            status = ERN_FAIL(err, ERN_ERR_MEMORY,
                              "cannot start a thread of the KV tiers; raise the limit on threads (ulimit -u)");
    }
    if (status != ERN_OK) {
        transfer_close(t, 0);
        return status;
    }
    *out = t;
    return ERN_OK;
}

/* Drop what waits; what is worth keeping goes on until the time is up. */
static void drain(lane *l, int64_t until_us) {
    pthread_mutex_lock(&l->lock);
    l->stop = true;
    l->queue[FIRST].n = 0;
    pthread_cond_signal(&l->work);
    while (l->queue[LATER].n > 0) {
        pthread_mutex_unlock(&l->lock);
        const struct timespec nap = {.tv_nsec = 2 * 1000 * 1000};
        nanosleep(&nap, NULL);
        pthread_mutex_lock(&l->lock);
        if (ern_now_us() >= until_us) l->queue[LATER].n = 0;
    }
    pthread_mutex_unlock(&l->lock);
    pthread_join(l->thread, NULL);
}

void transfer_close(transfer *t, int64_t grace_us) {
    if (!t) return;
    int64_t until_us = ern_now_us() + grace_us;
    for (int k = 0; k < 2; k++) {
        if (t->lane[k].has_thread) drain(&t->lane[k], until_us);
        pthread_mutex_destroy(&t->lane[k].lock);
        pthread_cond_destroy(&t->lane[k].work);
    }
    if (t->host) munmap(t->host, t->host_bytes);
    free(t->lane[1].token);
    free(t->block);
    free(t);
}
