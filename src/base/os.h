/* The operating system and the machine, as far as we ask: time, mapped files, processors, memory.
 * Any thread. */
#ifndef ERN_BASE_OS_H
#define ERN_BASE_OS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* Monotonic microseconds since the process first asked. Everything inside is measured with this clock. */
int64_t ern_now_us(void);
/* Wall-clock seconds since 1970: only for the `created` fields that clients see. */
int64_t ern_wall_s(void);

/* A file mapped read-only and private. */
typedef struct ern_map {
    const unsigned char *data;
    size_t size_bytes;
    int fd; /* kept open: the size is checked again before a load is called done */
} ern_map;
/* Map a whole plain file (size 0 gives data NULL). Errors name the path. */
ERN_MUST_CHECK ern_status ern_map_open(ern_map *out, const char *path, ern_err *err);
void ern_map_close(ern_map *m);
/* Read a small text file whole, NUL-ended, at most limit_bytes; free() it. */
ERN_MUST_CHECK ern_status ern_file_read(char **out, size_t *len, const char *path, size_t limit_bytes, ern_err *err);
bool ern_file_exists(const char *path);
/* dir + "/" + name into out (size bytes); fails when it does not fit. */
ERN_MUST_CHECK ern_status ern_path_join(char *out, size_t size, const char *dir, const char *name, ern_err *err);

/* Processors this process may run on, and bytes of memory it may use (the smaller of the machine's and the cgroup's).
 */
int ern_cpu_count(void);
uint64_t ern_memory_total_bytes(void);
uint64_t ern_memory_available_bytes(void);
/* Bytes that the cgroup (v2) at folder dir still lets its processes take; UINT64_MAX: it has no limit. Cached file
 * pages count as free, as in MemAvailable: else the weights that were just read would be counted once as used and once
 * more as what must stay in memory. */
uint64_t ern_cgroup_left_bytes(const char *dir);
/* Resident set of this process, bytes. */
uint64_t ern_memory_resident_bytes(void);

/* What this processor can do; `level` names are those of --cpu-level. */
typedef enum ern_cpu_level { ERN_CPU_PORTABLE, ERN_CPU_AVX2, ERN_CPU_AVX512, ERN_CPU_AMX } ern_cpu_level;
ern_cpu_level ern_cpu_level_here(void);
/* Why it is not AMX though the processor has that: one sentence; else NULL. */
const char *ern_cpu_amx_refused(void);
const char *ern_cpu_level_name(ern_cpu_level level);
/* The processor's brand string, or "unknown". Static memory. */
const char *ern_cpu_name(void);

#endif
