/* A pool of pinned worker threads. See pool.h. */
#include "base/pool.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/os.h"

/* Looks before a waiter sleeps: tens of microseconds of pause instructions, longer than a barrier's usual wait, shorter
 * than a tick. With fewer processors than workers whom we wait for needs ours: then there is no spinning at all. */
enum { SPINS = 1000 };

/* Resting. A region is struck where one worker, which lost its processor in it, kept another waiting for so long and
 * for a third of the region: slices are milliseconds, what a step does on one worker alone is less. Two of two that
 * lose half a processor and a third of the time to waiting are as fast as one. */
enum {
    LATE_US = 500,
    REST_LEAST_US = 50000, /* doubled each time that the worker is late again in its trial */
    REST_MOST_US = 1600000,
    TRIAL_US = 50000,
    ACTIVE_BITS = 10, /* of `go` */
};

typedef struct pool_worker {
    int cpu;                 /* processor it is tied to */
    bool was_lost;           /* its processor, in this region */
    _Atomic int64_t late_us; /* for so long it was waited for in this region */
    char apart[64];
} pool_worker;

struct ern_pool {
    int n_worker, spins;
    int n_active; /* workers of the region: 0..n_active-1; the others rest */
    bool pin, stop;
    bool entered; /* by the thread that runs the regions */
    bool struck;  /* the region before */
    int64_t rest_us, rest_end_us, trial_end_us;
    pool_worker *worker; /* [n_worker] */
    pthread_t *thread;   /* [n_worker - 1] */
    ern_pool_fn *fn;
    void *ud;
    _Alignas(64) atomic_uint go;      /* regions started, and how many workers the last one has: one word, so that who
                                         rests cannot mistake a region for another */
    _Alignas(64) atomic_uint arrived; /* workers inside the current barrier */
    _Alignas(64) atomic_uint phase;   /* counts barriers passed */
    _Alignas(64) atomic_uint asleep;  /* threads inside futex_wait, or about to be, for `phase` */
    atomic_uint resting;              /* the same for `go` */
    atomic_int last;                  /* who came last to the barrier before */
};

static _Thread_local int self; /* worker of the region that this thread is in */
static _Thread_local int tied_to = -1;

typedef struct worker_start {
    ern_pool *pool;
    int worker;
} worker_start;

static void futex_wait(atomic_uint *at, unsigned seen) {
    (void)syscall(SYS_futex, at, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

/* Count up and wake who sleeps on it. A sleeper is counted before it looks for the last time, and both sides are
 * sequentially consistent: either it sees the new count, or it is seen here. */
static void advance(atomic_uint *at, unsigned to, atomic_uint *asleep) {
    atomic_store(at, to);
    if (atomic_load(asleep)) (void)syscall(SYS_futex, at, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}
static void go(ern_pool *p, int n_active) {
    const unsigned count = (atomic_load_explicit(&p->go, memory_order_relaxed) >> ACTIVE_BITS) + 1;
    advance(&p->go, count << ACTIVE_BITS | (unsigned)n_active, &p->resting);
}

static void pause_hint(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Wait until *at differs from seen. Returns for how long, 0 where that was short. */
static int64_t wait_change(const ern_pool *p, atomic_uint *at, unsigned seen, atomic_uint *asleep) {
    for (int i = 0; i < p->spins; i++) {
        if (atomic_load_explicit(at, memory_order_acquire) != seen) return 0;
        pause_hint();
    }
    const int64_t begin_us = ern_now_us();
    atomic_fetch_add(asleep, 1);
    while (atomic_load(at) == seen) futex_wait(at, seen);
    atomic_fetch_sub(asleep, 1);
    return ern_now_us() - begin_us;
}

/* ---- processors -------------------------------------------------------------------------------------------------- */

/* Worker i belongs to the i-th allowed processor, at first. False: there are not as many. */
static bool place_workers(ern_pool *p) {
    cpu_set_t all;
    int n = 0;
    if (sched_getaffinity(0, sizeof all, &all) != 0) return false;
    for (size_t c = 0; c < CPU_SETSIZE && n < p->n_worker; c++)
        if (CPU_ISSET(c, &all)) p->worker[n++].cpu = (int)c;
    return n == p->n_worker;
}

static void tie(const ern_pool *p) {
    const int cpu = p->worker[self].cpu;
    cpu_set_t one;
    if (tied_to == cpu) return;
    CPU_ZERO(&one);
    CPU_SET((size_t)cpu, &one);
    (void)pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    tied_to = cpu;
}

void ern_pool_enter(ern_pool *p) {
    p->entered = true;
    self = 0;
    if (p->pin) tie(p);
}

/* How often this thread was made to leave its processor. */
static long times_lost(void) {
    struct rusage r;
    return getrusage(RUSAGE_THREAD, &r) == 0 ? r.ru_nivcsw : 0;
}

static bool may_rest(const ern_pool *p) { return p->pin && p->entered; }

/* Before a region: whose rest is over comes back, on trial. */
static void wake_one(ern_pool *p) {
    const int64_t now_us = ern_now_us();
    if (p->n_active == p->n_worker || now_us < p->rest_end_us) return;
    p->n_active++;
    p->trial_end_us = now_us + TRIAL_US;
    p->rest_end_us = now_us + p->rest_us;
}

/* After one of took_us: who was late to the second region running, or on trial, gives up its processor; the thread goes
 * to the last place, where it rests. */
static void rest_one(ern_pool *p, int64_t took_us) {
    const int64_t now_us = ern_now_us();
    int late = -1;
    int64_t most_us = took_us / 3 > LATE_US ? took_us / 3 : LATE_US;
    for (int i = 0; i < p->n_worker; i++) {
        const int64_t us = atomic_exchange_explicit(&p->worker[i].late_us, 0, memory_order_relaxed);
        if (i < p->n_active && p->worker[i].was_lost && us > most_us) most_us = us, late = i;
    }
    /* Nobody waits for one that is alone: what was told came late, from the region before. It must not rest. */
    if (p->n_active == 1) late = -1;
    const bool again = p->struck, trial = now_us < p->trial_end_us;
    p->struck = late >= 0;
    if (late < 0 || (!again && !trial)) return;
    const int last = --p->n_active, kept = p->worker[late].cpu;
    ERN_ASSERT(last >= 1);
    p->worker[late].cpu = p->worker[last].cpu;
    p->worker[last].cpu = kept;
    p->rest_us = !trial ? REST_LEAST_US : p->rest_us * 2 < REST_MOST_US ? p->rest_us * 2 : REST_MOST_US;
    p->rest_end_us = now_us + p->rest_us;
    p->struck = false;
}

/* This worker's part of a region. */
static void take_part(ern_pool *p, int n_active) {
    const bool watch = may_rest(p);
    pool_worker *w = &p->worker[self];
    if (watch) tie(p);
    const long lost = watch ? times_lost() : 0;
    p->fn(p->ud, self, n_active);
    if (watch) w->was_lost = times_lost() != lost;
    ern_pool_barrier(p);
}

/* ---- workers ----------------------------------------------------------------------------------------------------- */

static void *worker_main(void *arg) {
    worker_start start = *(worker_start *)arg;
    free(arg);
    ern_pool *p = start.pool;
    self = start.worker;
    if (p->pin) tie(p);
    unsigned seen = 0;
    for (;;) {
        (void)wait_change(p, &p->go, seen, &p->resting);
        seen = atomic_load(&p->go); /* no region that wants this worker can have passed */
        if (p->stop) return NULL;
        const int n_active = (int)(seen & ((1u << ACTIVE_BITS) - 1));
        if (self < n_active) take_part(p, n_active);
    }
}

ern_status ern_pool_open(ern_pool **out, int n_worker, bool pin, ern_err *err) {
    ERN_ASSERT(n_worker >= 1 && n_worker <= 512);
    ern_pool *p = aligned_alloc(64, (sizeof *p + 63) / 64 * 64);
    if (!p) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for a pool of %d threads", n_worker);
    memset(p, 0, sizeof *p);
    int n_cpu = ern_cpu_count();
    p->spins = n_worker <= n_cpu ? SPINS : 0;
    p->thread = calloc((size_t)n_worker, sizeof *p->thread);
    p->worker = calloc((size_t)n_worker, sizeof *p->worker);
    p->n_worker = p->n_active = n_worker;
    p->pin = pin && n_worker == n_cpu && p->worker && place_workers(p);
    int made = 1;
    for (; p->thread && p->worker && made < n_worker; made++) {
        worker_start *start = malloc(sizeof *start);
        if (!start) break;
        *start = (worker_start){p, made};
        if (pthread_create(&p->thread[made - 1], NULL, worker_main, start) != 0) {
            free(start);
            break;
        }
    }
    if (!p->thread || !p->worker || made < n_worker) {
        p->n_worker = made;
        ern_pool_close(p);
        return ERN_FAIL(err, ERN_ERR_MEMORY, "could start only %d of %d threads; lower --threads", made, n_worker);
    }
    *out = p;
    return ERN_OK;
}

void ern_pool_close(ern_pool *p) {
    if (!p) return;
    p->stop = true;
    go(p, 0);
    for (int i = 0; p->thread && i + 1 < p->n_worker; i++) pthread_join(p->thread[i], NULL);
    free(p->thread);
    free(p->worker);
    free(p);
}

int ern_pool_count(const ern_pool *p) { return p->n_worker; }

void ern_pool_run(ern_pool *p, ern_pool_fn *fn, void *ud) {
    if (p->n_worker == 1) {
        fn(ud, 0, 1);
        return;
    }
    const bool watch = may_rest(p);
    if (watch) wake_one(p);
    p->fn = fn;
    p->ud = ud;
    const int64_t begin_us = ern_now_us();
    self = 0;
    if (p->n_active > 1) go(p, p->n_active);
    take_part(p, p->n_active);
    if (watch) rest_one(p, ern_now_us() - begin_us);
}

void ern_pool_barrier(ern_pool *p) {
    const unsigned n = (unsigned)p->n_active; /* read before the last one comes: then it may change */
    if (n == 1) return;
    const unsigned phase = atomic_load_explicit(&p->phase, memory_order_acquire);
    const unsigned before = atomic_fetch_add_explicit(&p->arrived, 1, memory_order_acq_rel);
    if (before + 1 == n) {
        atomic_store_explicit(&p->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&p->last, self, memory_order_relaxed);
        advance(&p->phase, phase + 1, &p->asleep);
        return;
    }
    const int64_t waited_us = wait_change(p, &p->phase, phase, &p->asleep);
    if (before > 0 || waited_us < LATE_US) return; /* the first to come tells */
    const int last = atomic_load_explicit(&p->last, memory_order_relaxed);
    atomic_fetch_add_explicit(&p->worker[last].late_us, waited_us, memory_order_relaxed);
}

void ern_pool_share(int64_t n, int64_t step, int worker, int n_worker, int64_t *from, int64_t *to) {
    int64_t units = (n + step - 1) / step;
    *from = units * worker / n_worker * step;
    *to = units * (worker + 1) / n_worker * step;
    if (*from > n) *from = n;
    if (*to > n) *to = n;
}
