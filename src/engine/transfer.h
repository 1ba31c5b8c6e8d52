/* Moving KV blocks between the pool, host memory and disk, beside the steps.
 *
 * The cache (cache.h) decides; a transfer only moves bytes, and says when it has. It is given as an interface so that
 * the simulator can move blocks slowly, out of order with the steps, and wrongly on purpose; transfer.c is the real
 * one: one thread for host memory, one for the disk, so that a slow disk never holds up a copy.
 *
 * What makes a move beside a running step safe, and is the cache's to keep: the device page of OUT and SAVE holds a
 * finished block that no step writes, and stays held until the job is done; the device page of IN and LOAD is not named
 * by any step that has not been collected when the job starts, and by no step at all until it is done.
 *
 * Thread: start, poll and on_disk are the engine thread's. Memory: taken at open. */
#ifndef ERN_ENGINE_TRANSFER_H
#define ERN_ENGINE_TRANSFER_H

#include "backend/backend.h"
#include "engine/store.h"

typedef enum transfer_kind {
    TRANSFER_OUT,  /* device page -> host page */
    TRANSFER_IN,   /* host page -> device page */
    TRANSFER_SAVE, /* device page -> disk */
    TRANSFER_LOAD, /* disk -> device page */
} transfer_kind;

typedef struct transfer_job {
    transfer_kind kind;
    int32_t device_page, host_page; /* host_page -1 for SAVE and LOAD */
    int32_t node;                   /* the cache's own, handed back */
    uint32_t node_gen;
    store_block block; /* SAVE and LOAD. token is copied by start; NULL when handed back */
    bool ok;           /* when handed back. IN cannot fail, and OUT only when the device has, which ends the engine */
} transfer_job;

typedef struct transfer_ops {
    /* Take a job; false: no room now, nothing was taken. */
    bool (*start)(void *ud, const transfer_job *job);
    /* Up to n jobs that are done, each once; those of one kind in the order of their start. */
    int32_t (*poll)(void *ud, transfer_job *done, int32_t n);
    /* True when the disk tier probably has this block. */
    bool (*on_disk)(void *ud, const uint64_t key[2]);
} transfer_ops;

enum { TRANSFER_JOBS_MAX = 64 }; /* most jobs inside at once, of each thread */

typedef struct transfer transfer;
typedef struct transfer_options {
    ern_backend *backend; /* kv_read and kv_write are called from the transfer's threads */
    uint64_t page_bytes;
    int32_t n_host_page; /* 0: no host tier */
    store *disk;         /* NULL: no disk tier. Borrowed */
    int32_t page_tokens;
    void (*wake)(void *ud); /* called after a job is done, from a transfer's thread */
    void *ud;
} transfer_options;

extern const transfer_ops transfer_real_ops; /* ud: a transfer */
ERN_MUST_CHECK ern_status transfer_open(transfer **out, const transfer_options *o, ern_err *err);
/* Let running jobs end, drop those that wait but SAVE, which get grace_us; then free. */
void transfer_close(transfer *t, int64_t grace_us);
/* Bytes that transfer_open will take: the host tier and buffers. */
uint64_t transfer_bytes(const transfer_options *o);

#endif
