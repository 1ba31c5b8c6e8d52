/* The operating system and the machine. See os.h. */
#include "base/os.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

static int64_t clock_us(clockid_t id) {
    struct timespec t;
    clock_gettime(id, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static int64_t start_us;
static pthread_once_t start_once = PTHREAD_ONCE_INIT;
static void start_read(void) { start_us = clock_us(CLOCK_MONOTONIC); }

int64_t ern_now_us(void) {
    pthread_once(&start_once, start_read);
    return clock_us(CLOCK_MONOTONIC) - start_us;
}

int64_t ern_wall_s(void) { return clock_us(CLOCK_REALTIME) / 1000000; }

ern_status ern_map_open(ern_map *out, const char *path, ern_err *err) {
    *out = (ern_map){.fd = -1};
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not hang us before it is refused */
    if (fd < 0) return ERN_FAIL(err, ERN_ERR_FILE, "cannot open %s: %s", path, strerror(errno));
    struct stat st;
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        close(fd);
        return ERN_FAIL(err, ERN_ERR_FILE, "%s is not a plain file", path);
    }
    out->fd = fd;
    out->size_bytes = (size_t)st.st_size;
    if (st.st_size == 0) return ERN_OK;
    void *p = mmap(NULL, out->size_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED) {
        close(fd);
        *out = (ern_map){.fd = -1};
        return ERN_FAIL(err, ERN_ERR_FILE, "cannot map %s (%lld bytes): %s", path, (long long)st.st_size,
                        strerror(errno));
    }
    out->data = p;
    return ERN_OK;
}

void ern_map_close(ern_map *m) {
    if (m->data) munmap((void *)(uintptr_t)m->data, m->size_bytes);
    if (m->fd >= 0) close(m->fd);
    *m = (ern_map){.fd = -1};
}

ern_status ern_file_read(char **out, size_t *len, const char *path, size_t limit_bytes, ern_err *err) {
    *out = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return ERN_FAIL(err, ERN_ERR_FILE, "cannot open %s: %s", path, strerror(errno));
    struct stat st;
    FILE *f = fstat(fd, &st) == 0 && S_ISREG(st.st_mode) ? fdopen(fd, "rb") : NULL;
    if (!f) {
        close(fd);
        return ERN_FAIL(err, ERN_ERR_FILE, "%s is not a plain file", path);
    }
    size_t cap = 4096, n = 0;
    char *data = malloc(cap + 1);
    while (data) {
        size_t got = fread(data + n, 1, cap - n, f);
        n += got;
        if (n > limit_bytes || (got == 0 && ferror(f))) {
            bool big = n > limit_bytes;
            free(data);
            fclose(f);
            return big ? ERN_FAIL(err, ERN_ERR_FILE, "%s is larger than the %zu bytes allowed for such a file", path,
                                  limit_bytes)
                       : ERN_FAIL(err, ERN_ERR_FILE, "cannot read %s: %s", path, strerror(errno));
        }
        if (got == 0) break;
        if (n == cap) {
            char *more = realloc(data, (cap *= 2) + 1);
            if (!more) free(data);
            data = more;
        }
    }
    fclose(f);
    if (!data) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory to read %s", path);
    data[n] = 0;
    *out = data;
    if (len) *len = n;
    return ERN_OK;
}

bool ern_file_exists(const char *path) { return access(path, F_OK) == 0; }

ern_status ern_path_join(char *out, size_t size, const char *dir, const char *name, ern_err *err) {
    int n = snprintf(out, size, "%s/%s", dir, name);
    if (n < 0 || (size_t)n >= size) return ERN_FAIL(err, ERN_ERR_FILE, "the path %s/%s is too long", dir, name);
    return ERN_OK;
}

int ern_cpu_count(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}

/* A number after `key` in a /proc-style file, times unit; 0 when absent. */
static uint64_t proc_number(const char *path, const char *key, uint64_t unit) {
    FILE *f = fopen(path, "re");
    if (!f) return 0;
    char line[256];
    uint64_t value = 0;
    while (fgets(line, sizeof line, f)) {
        size_t k = strlen(key);
        if (strncmp(line, key, k) != 0) continue;
        value = strtoull(line + k, NULL, 10) * unit;
        break;
    }
    fclose(f);
    return value;
}

/* The same of a file in folder dir. */
static uint64_t dir_number(const char *dir, const char *name, const char *key) {
    char path[512];
    return ern_path_join(path, sizeof path, dir, name, NULL) == ERN_OK ? proc_number(path, key, 1) : 0;
}

static const char cgroup[] = "/sys/fs/cgroup"; /* our own where there is a cgroup namespace, as in containers */

uint64_t ern_cgroup_left_bytes(const char *dir) {
    uint64_t cap = dir_number(dir, "memory.max", ""); /* "max" reads as 0: no limit */
    if (cap == 0) return UINT64_MAX;
    uint64_t used = dir_number(dir, "memory.current", "");
    uint64_t cache = dir_number(dir, "memory.stat", "active_file ") + dir_number(dir, "memory.stat", "inactive_file ");
    used = used > cache ? used - cache : 0;
    return cap > used ? cap - used : 0;
}

uint64_t ern_memory_total_bytes(void) {
    uint64_t all = proc_number("/proc/meminfo", "MemTotal:", 1024), cap = dir_number(cgroup, "memory.max", "");
    return cap && cap < all ? cap : all;
}

uint64_t ern_memory_available_bytes(void) {
    uint64_t machine = proc_number("/proc/meminfo", "MemAvailable:", 1024), group = ern_cgroup_left_bytes(cgroup);
    return machine < group ? machine : group;
}

uint64_t ern_memory_resident_bytes(void) { return proc_number("/proc/self/status", "VmRSS:", 1024); }

#if defined(__x86_64__)
/* The operating system saves the AVX-512 (or AMX) registers only when XCR0 says so. */
static uint64_t xcr0(void) {
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (uint64_t)hi << 32 | lo;
}

/* The tile registers are 8 KB of state that Linux gives to a process that asks; before 5.16 it has no such request. */
static bool tiles_granted;
static pthread_once_t tiles_once = PTHREAD_ONCE_INIT;
static void tiles_ask(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA */
    tiles_granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

/* As far as processor and operating system have it; whether this process may is another question. */
static ern_cpu_level level_possible(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_FMA) || !(c & bit_F16C))
        return ERN_CPU_PORTABLE;
    uint64_t x = xcr0();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (x & 0x6) != 0x6 || !(b & bit_AVX2)) return ERN_CPU_PORTABLE;
    const unsigned need = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    if ((x & 0xe6) != 0xe6 || (b & need) != need) return ERN_CPU_AVX2;
    const unsigned amx = (1u << 22) | (1u << 24) | (1u << 25); /* AMX-BF16, AMX-TILE, AMX-INT8 */
    return (x & 0x60000) == 0x60000 && (d & amx) == amx ? ERN_CPU_AMX : ERN_CPU_AVX512;
}

ern_cpu_level ern_cpu_level_here(void) {
    const ern_cpu_level level = level_possible();
    if (level < ERN_CPU_AMX) return level;
    pthread_once(&tiles_once, tiles_ask);
    return tiles_granted ? level : ERN_CPU_AVX512;
}

const char *ern_cpu_amx_refused(void) {
    if (level_possible() < ERN_CPU_AMX || ern_cpu_level_here() == ERN_CPU_AMX) return NULL;
    return "the system does not let this process use the AMX tiles that the processor has (arch_prctl refuses), so the "
           "cpu backend computes at level avx512";
}

static char cpu_brand[49];
static pthread_once_t brand_once = PTHREAD_ONCE_INIT;
static void brand_read(void) {
    unsigned r[12];
    for (unsigned i = 0; i < 3; i++)
        if (!__get_cpuid(0x80000002u + i, &r[i * 4], &r[i * 4 + 1], &r[i * 4 + 2], &r[i * 4 + 3])) return;
    memcpy(cpu_brand, r, 48);
}

const char *ern_cpu_name(void) {
    pthread_once(&brand_once, brand_read);
    return cpu_brand[0] ? cpu_brand : "unknown";
}
#else
ern_cpu_level ern_cpu_level_here(void) { return ERN_CPU_PORTABLE; }
const char *ern_cpu_amx_refused(void) { return NULL; }
const char *ern_cpu_name(void) { return "unknown"; }
#endif

const char *ern_cpu_level_name(ern_cpu_level level) {
    static const char *const name[] = {"portable", "avx2", "avx512", "amx"};
    return name[level];
}
