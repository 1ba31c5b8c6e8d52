/* Scripted transfers: KV blocks move late, in lumps, or at once; the disk forgets, fails and refuses. Everything is
 * drawn from one generator, on one thread, so that a seed means the same run everywhere. Bytes move either when a job
 * starts or when it is done, as late and as early as the engine allows. */
#ifndef ERN_TESTS_SIM_MOVES_H
#define ERN_TESTS_SIM_MOVES_H

#include "engine/transfer.h"
#include "sim/traffic.h"

enum { MOVES_DISK_MAX = 64, MOVES_BLOCK_MAX = 64 };

typedef struct moves_lane {
    transfer_job job[TRANSFER_JOBS_MAX]; /* a ring: the first n_done are done, the others wait for due */
    int64_t due[TRANSFER_JOBS_MAX];
    int32_t token[TRANSFER_JOBS_MAX][MOVES_BLOCK_MAX];
    int32_t first, n_done, n;
} moves_lane;

typedef struct moves_file {
    store_block block;
    int32_t token[MOVES_BLOCK_MAX];
    uint64_t payload[MOVES_BLOCK_MAX];
} moves_file;

typedef struct moves {
    rng g;
    ern_backend *backend;
    int32_t page_tokens, n_host_page;
    uint64_t *host; /* [n_host_page, page_tokens] */
    moves_lane lane[2];
    moves_file file[MOVES_DISK_MAX];
    int32_t n_file, next_file;
    int64_t now;
    int32_t slow;     /* a job takes up to so many ticks */
    int32_t lane_max; /* jobs at once */
    int32_t fails;    /* one load of so many fails; 0: none */
    bool eager;       /* bytes move when a job starts */
    int64_t n_in, n_out, n_load, n_save, n_failed;
} moves;

extern const transfer_ops moves_ops;

/* A page of the scripted backend is page_tokens u64. */
void moves_open(moves *m, uint64_t seed, ern_backend *backend, int32_t page_tokens, int32_t n_host_page);
void moves_close(moves *m);
/* Time passes; what is due gets done. */
void moves_tick(moves *m);
bool moves_is_busy(const moves *m);

#endif
