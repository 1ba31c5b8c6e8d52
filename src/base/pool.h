/* A pool of worker threads that run one function together: the parallel region of a CPU step.
 *
 * The caller is worker 0; workers 1..n-1 wait between regions, spinning briefly and then sleeping on a futex, so that a
 * server thread on the same cores is not starved. ern_pool_barrier lets the workers of a region meet in its middle.
 * A worker whose processor another program takes away for milliseconds keeps all others waiting; where it does so in
 * two regions running it rests for a while, and regions have fewer workers.
 * Owner: whoever opened it; one caller thread runs regions. */
#ifndef ERN_BASE_POOL_H
#define ERN_BASE_POOL_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

typedef struct ern_pool ern_pool;
typedef void ern_pool_fn(void *ud, int worker, int n_worker);

/* n_worker threads in all (1..512), the caller counted. `pin` ties worker i to the i-th allowed processor when there
 * are as many workers as processors. With fewer the system places them better: it knows who else is running, and two
 * servers with half of the processors each would else share the first half. With more two would be tied to one. */
ERN_MUST_CHECK ern_status ern_pool_open(ern_pool **out, int n_worker, bool pin, ern_err *err);
void ern_pool_close(ern_pool *p); /* NULL is fine */
/* Called by the thread that will run the regions from now on: it is tied as worker 0, if the others are, and then
 * workers may rest. */
void ern_pool_enter(ern_pool *p);
int ern_pool_count(const ern_pool *p);
/* Run fn(ud, worker, n_worker) on n_worker workers at once, all of them or those that do not rest; returns when all
 * have returned. */
void ern_pool_run(ern_pool *p, ern_pool_fn *fn, void *ud);
/* Inside a region: wait until every worker has come here. */
void ern_pool_barrier(ern_pool *p);

/* The share of n items that belongs to a worker: [*from, *to), in multiples of `step` but for the tail. */
void ern_pool_share(int64_t n, int64_t step, int worker, int n_worker, int64_t *from, int64_t *to);

#endif
