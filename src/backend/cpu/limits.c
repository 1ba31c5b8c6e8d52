/* Measuring the machine: one round of reading or of arithmetic on all threads at once. See backend/bench.h.
 *
 * Threads are pinned as the backend's are (base/pool.h), so that both meet the same processors. The memory loop is
 * plain reading in the order of memory; on the machines we know it is as fast as any other order of loads. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "backend/bench.h"
#include "backend/cpu/limits.h"
#include "base/os.h"
#include "base/pool.h"

enum { HUGE = 2 << 20, THREADS_MAX = 512, L1_BYTES = 16 << 10, L2_BYTES = 512 << 10 };

struct ern_limits {
    ern_pool *pool;
    unsigned char *data, *raw;
    uint64_t bytes, raw_bytes;
    bool codes; /* what is there to be multiplied: codes, else floats */
    /* the region in progress */
    limits_loop *loop;
    uint64_t region_bytes;
    int64_t passes;
    ern_reach reach;
    uint64_t done[THREADS_MAX]; /* operations, or what keeps the loads alive */
};

static const char *const rate_name[ERN_RATES] = {"fma f32", "vnni int8", "amx bf16", "amx int8"};
static const char *const reach_name[ERN_REACHES] = {"registers", "L1", "L2"};

const char *ern_rate_name(ern_rate rate) { return rate_name[rate]; }
const char *ern_reach_name(ern_reach reach) { return reach_name[reach]; }

const char *ern_rate_missing(ern_rate rate) {
    const ern_cpu_level level = ern_cpu_level_here();
    switch (rate) {
    case ERN_RATE_FMA_F32: return level >= ERN_CPU_AVX2 ? NULL : "this processor has no AVX2 and FMA";
    case ERN_RATE_VNNI_INT8:
        return level >= ERN_CPU_AVX512 && __builtin_cpu_supports("avx512vnni") ? NULL
                                                                               : "this processor has no AVX-512 VNNI";
    case ERN_RATE_AMX_BF16:
    case ERN_RATE_AMX_INT8:
        if (level == ERN_CPU_AMX) return NULL;
        return ern_cpu_amx_refused() ? "the system does not let this process use AMX tiles"
                                     : "this processor has no AMX, or its kernel does not save the tiles";
    }
    return "unknown";
}

bool ern_rate_for(ern_dtype dtype, int level, ern_rate *out) {
    const bool ints = dtype == ERN_DTYPE_I8 || dtype == ERN_DTYPE_I4;
    if (level < 0) level = (int)ern_cpu_level_here();
    if (level >= ERN_CPU_AMX && !ern_rate_missing(ERN_RATE_AMX_INT8))
        return *out = ints ? ERN_RATE_AMX_INT8 : ERN_RATE_AMX_BF16, true;
    if (level >= ERN_CPU_AVX512 && ints && !ern_rate_missing(ERN_RATE_VNNI_INT8))
        return *out = ERN_RATE_VNNI_INT8, true;
    return *out = ERN_RATE_FMA_F32, level >= ERN_CPU_AVX2 && !ern_rate_missing(ERN_RATE_FMA_F32);
}

static limits_loop *loop_of(ern_rate rate) {
    switch (rate) {
    case ERN_RATE_FMA_F32: return ern_cpu_level_here() >= ERN_CPU_AVX512 ? limits_fma_avx512 : limits_fma_avx2;
    case ERN_RATE_VNNI_INT8: return limits_vnni_int8;
    case ERN_RATE_AMX_BF16: return limits_amx_bf16;
    case ERN_RATE_AMX_INT8: return limits_amx_int8;
    }
    return NULL;
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

static void fill(ern_limits *l, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i += 8) {
        const uint64_t v = limits_numbers((uint64_t)i, l->codes);
        memcpy(l->data + i, &v, sizeof v);
    }
}

/* Each thread writes its own part: the pages lie where that thread's later reads are nearest. */
static void fill_part(void *ud, int worker, int n_worker) {
    ern_limits *l = ud;
    int64_t from, to;
    ern_pool_share((int64_t)l->bytes, 4096, worker, n_worker, &from, &to);
    fill(l, from, to);
}

/* What a thread multiplies, anew. */
static void refill_part(void *ud, int worker, int n_worker) {
    (void)n_worker;
    fill(ud, (int64_t)worker * L2_BYTES, ((int64_t)worker + 1) * L2_BYTES);
}

ern_status ern_limits_open(ern_limits **out, int n_thread, uint64_t bytes, bool huge, ern_err *err) {
    *out = NULL;
    if (n_thread == 0) n_thread = ern_cpu_count();
    const uint64_t least = (uint64_t)n_thread * L2_BYTES, free_bytes = ern_memory_available_bytes();
    bytes = (bytes > least ? bytes : least) / 4096 * 4096;
    if (bytes > free_bytes / 2)
        return ERN_FAIL(
            err, ERN_ERR_MEMORY,
            "measuring the limits wants a buffer of %llu MiB, and only %llu MiB are free; give smaller sizes",
            (unsigned long long)(bytes >> 20), (unsigned long long)(free_bytes >> 20));
    ern_limits *l = calloc(1, sizeof *l);
    if (!l) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory to measure the limits");
    l->bytes = bytes;
    l->raw_bytes = bytes + HUGE;
    void *raw = mmap(NULL, l->raw_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) {
        free(l);
        return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for a buffer of %llu MiB", (unsigned long long)(bytes >> 20));
    }
    l->raw = raw;
    l->data = (unsigned char *)(((uintptr_t)raw + HUGE - 1) / HUGE * HUGE);
    (void)madvise(l->data, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    const ern_status s = ern_pool_open(&l->pool, n_thread, true, err);
    if (s != ERN_OK) {
        ern_limits_close(l);
        return s;
    }
    ern_pool_run(l->pool, fill_part, l);
    *out = l;
    return ERN_OK;
}

void ern_limits_close(ern_limits *l) {
    if (!l) return;
    ern_pool_close(l->pool);
    munmap(l->raw, l->raw_bytes);
    free(l);
}

int ern_limits_threads(const ern_limits *l) { return ern_pool_count(l->pool); }

/* ---- rounds ------------------------------------------------------------------------------------------------------ */

typedef uint64_t wide __attribute__((vector_size(64)));

static uint64_t read_portable(const void *data, size_t bytes) {
    const wide *at = data;
    wide a = {0}, b = {0};
    for (size_t i = 0; i + 1 < bytes / sizeof *at; i += 2) a ^= at[i], b ^= at[i + 1];
    a ^= b;
    return a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
}

static void read_part(void *ud, int worker, int n_worker) {
    ern_limits *l = ud;
    int64_t from, to;
    ern_pool_share((int64_t)l->region_bytes, 4096, worker, n_worker, &from, &to);
    for (int64_t p = 0; p < l->passes; p++)
        l->done[worker] ^= ern_cpu_level_here() >= ERN_CPU_AVX512
                               ? limits_read_avx512(l->data + from, (size_t)(to - from))
                               : read_portable(l->data + from, (size_t)(to - from));
}

static void compute_part(void *ud, int worker, int n_worker) {
    ern_limits *l = ud;
    (void)n_worker;
    const void *data = l->reach == ERN_REACH_REGISTERS ? NULL : l->data + (size_t)worker * L2_BYTES;
    l->done[worker] = l->loop(data, l->reach == ERN_REACH_L1 ? L1_BYTES : L2_BYTES, l->passes);
}

/* Run a region with twice as many passes each time until it takes min_us; seconds of the last one. */
static double run_for(ern_limits *l, ern_pool_fn *part, int64_t min_us) {
    for (l->passes = 1;; l->passes *= 2) {
        const int64_t begin_us = ern_now_us();
        ern_pool_run(l->pool, part, l);
        const int64_t took_us = ern_now_us() - begin_us;
        if (took_us >= min_us && took_us > 0) return (double)took_us * 1e-6;
    }
}

double ern_limits_read(ern_limits *l, uint64_t bytes, int64_t min_us) {
    l->region_bytes = (bytes < l->bytes ? bytes : l->bytes) / 4096 * 4096;
    ERN_ASSERT(l->region_bytes > 0);
    const double seconds = run_for(l, read_part, min_us);
    return (double)l->region_bytes * (double)l->passes / seconds;
}

double ern_limits_compute(ern_limits *l, ern_rate rate, ern_reach reach, int64_t min_us) {
    ERN_ASSERT(ern_rate_missing(rate) == NULL);
    const bool codes = rate == ERN_RATE_VNNI_INT8 || rate == ERN_RATE_AMX_INT8;
    if (codes != l->codes) {
        l->codes = codes;
        ern_pool_run(l->pool, refill_part, l);
    }
    l->loop = loop_of(rate);
    l->reach = reach;
    const double seconds = run_for(l, compute_part, min_us);
    uint64_t all = 0;
    for (int i = 0; i < ern_pool_count(l->pool); i++) all += l->done[i];
    return (double)all / seconds;
}
