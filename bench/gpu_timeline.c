/* What the GPU did, step by step, while a program of ernest ran: a library that the CUDA driver loads into it,
 *
 *   CUDA_INJECTION64_PATH=BUILD/libgpu_timeline.so ernest bench step --backend cuda ...
 *
 * and that prints at its end, to stderr, of the last steps of one size that were alike (a step begins with
 * embed_kernel, whose grid tells its rows):
 *
 *   timeline: 63 steps of 1 rows, 478.2 us each, 12.3 us from the last kernel of one to the first of the next, idle ..
 *   timeline:    18.0 x     4.31 us   4.52 us  skinny_kernel grid 128 block 256
 *                runs of a step, their time, and what each added
 *
 * idle: no kernel ran, between steps and inside. A kernel that begins before the one before it ends is worth what it
 * ends later: the last number. Times between events and copies are not seen. Tracing itself adds to each kernel. */
#include <cupti.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_MAX_BYTES = 72, BUFFER_BYTES = 8 << 20, STEPS_LOOKED_AT = 64, KINDS_MAX = 128 };

typedef struct seen {
    char name[NAME_MAX_BYTES];
    uint32_t grid, block;
    uint64_t begin_ns, end_ns;
} seen;

typedef struct kind {
    const seen *first;
    int64_t n, ns, added_ns;
} kind;

static seen *all;
static size_t n_all, n_room;

static void buffer_give(uint8_t **buffer, size_t *size, size_t *n_record_max) {
    *buffer = aligned_alloc(8, BUFFER_BYTES);
    *size = *buffer ? BUFFER_BYTES : 0;
    *n_record_max = 0;
}

/* "void ns::attend<128, false>(args)" is attend. */
static void short_name(char out[NAME_MAX_BYTES], const char *name) {
    char mangled[NAME_MAX_BYTES];
    const char *at = name ? name : "?";
    int n = 0, skip = 0;
    if (strncmp(at, "_Z", 2) == 0) { /* the first source name of a mangled one: digits and that many letters */
        at += 2 + strcspn(at + 2, "0123456789");
        while (sscanf(at, "%d%n", &n, &skip) == 1 && n > 0 && (strncmp(at + skip, "_GLOBAL__N_", 11) == 0))
            at += skip + n;
        (void)snprintf(mangled, sizeof mangled, "%.*s", n, at + skip);
        if (strncmp(mangled, "_INTERNAL", 9) == 0) { /* of a static function: its own follows */
            at += skip + n;
            if (sscanf(at, "%d%n", &n, &skip) == 1) (void)snprintf(mangled, sizeof mangled, "%.*s", n, at + skip);
        }
        at = mangled;
    }
    (void)snprintf(out, NAME_MAX_BYTES, "%s", at);
}

static void keep(const CUpti_ActivityKernel9 *k) {
    if (n_all == n_room) {
        seen *more = realloc(all, (n_room + (1 << 16)) * sizeof *all);
        if (!more) return;
        all = more;
        n_room += 1 << 16;
    }
    seen *s = &all[n_all++];
    short_name(s->name, k->name);
    s->grid = (uint32_t)(k->gridX * k->gridY);
    s->block = (uint32_t)k->blockX;
    s->begin_ns = k->start;
    s->end_ns = k->end;
}

static void buffer_done(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t n_valid) {
    (void)context, (void)stream, (void)size;
    CUpti_Activity *r = NULL;
    while (cuptiActivityGetNextRecord(buffer, n_valid, &r) == CUPTI_SUCCESS)
        if (r->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) keep((const CUpti_ActivityKernel9 *)(const void *)r);
    free(buffer);
}

static int by_begin(const void *a, const void *b) {
    const seen *x = a, *y = b;
    return x->begin_ns < y->begin_ns ? -1 : x->begin_ns > y->begin_ns;
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static int is_first(const seen *s) { return strncmp(s->name, "embed_kernel", 12) == 0; }

/* Attention's lists of the next step are made beside this one. */
static int is_ahead(const seen *s) { return strncmp(s->name, "plan_kernel", 11) == 0; }

static kind kinds[KINDS_MAX];
static int n_kind;

static void count(const seen *s, uint64_t before_ns) {
    int i = 0;
    while (i < n_kind && (strcmp(kinds[i].first->name, s->name) != 0 || kinds[i].first->grid != s->grid)) i++;
    if (i == KINDS_MAX) return;
    if (i == n_kind) kinds[n_kind++].first = s;
    kinds[i].n++;
    kinds[i].ns += (int64_t)(s->end_ns - s->begin_ns);
    if (!is_ahead(s) && s->end_ns > before_ns) kinds[i].added_ns += (int64_t)(s->end_ns - before_ns);
}

/* The steps that begin at first[0..n-1], up to the one that begins at first[n]. */
static void tell(const size_t *first, int n) {
    double step_us[STEPS_LOOKED_AT], between_us[STEPS_LOOKED_AT], idle_us[STEPS_LOOKED_AT];
    uint64_t busy_ns = 0; /* until then, without what runs ahead */
    for (size_t i = 0; i < first[0]; i++)
        if (!is_ahead(&all[i]) && all[i].end_ns > busy_ns) busy_ns = all[i].end_ns;
    for (int k = 0; k < n; k++) {
        const uint64_t begin_ns = all[first[k]].begin_ns;
        between_us[k] = begin_ns > busy_ns ? (double)(begin_ns - busy_ns) * 1e-3 : 0;
        step_us[k] = (double)(all[first[k + 1]].begin_ns - begin_ns) * 1e-3;
        idle_us[k] = between_us[k];
        for (size_t i = first[k]; i < first[k + 1]; i++) {
            const seen *s = &all[i];
            if (s->begin_ns > busy_ns && i > first[k]) idle_us[k] += (double)(s->begin_ns - busy_ns) * 1e-3;
            count(s, busy_ns);
            if (!is_ahead(s) && s->end_ns > busy_ns) busy_ns = s->end_ns;
        }
    }
    qsort(step_us, (size_t)n, sizeof *step_us, by_value);
    qsort(between_us, (size_t)n, sizeof *between_us, by_value);
    qsort(idle_us, (size_t)n, sizeof *idle_us, by_value);
    fprintf(stderr,
            "timeline: %d steps of %u rows, %.1f us each, %.2f us from the last kernel of one to the first of the "
            "next, idle %.2f us\n",
            n, all[first[0]].grid, step_us[n / 2], between_us[n / 2], idle_us[n / 2]);
    for (int i = 0; i < n_kind; i++)
        fprintf(stderr, "timeline: %7.1f x %9.2f us %9.2f us  %s grid %u block %u\n", (double)kinds[i].n / n,
                (double)kinds[i].ns * 1e-3 / (double)kinds[i].n, (double)kinds[i].added_ns * 1e-3 / (double)kinds[i].n,
                kinds[i].first->name, kinds[i].first->grid, kinds[i].first->block);
}

static void report(void) {
    size_t first[STEPS_LOOKED_AT + 1];
    int n = 0;
    (void)cuptiActivityFlushAll(1);
    qsort(all, n_all, sizeof *all, by_begin);
    for (size_t i = n_all; i-- > 0 && n <= STEPS_LOOKED_AT;) {
        if (!is_first(&all[i])) continue;
        if (n > 0 && all[i].grid != all[first[STEPS_LOOKED_AT - n + 1]].grid) break;
        first[STEPS_LOOKED_AT - n++] = i;
    }
    if (n > 2)
        tell(first + STEPS_LOOKED_AT + 1 - n, n - 1);
    else
        fprintf(stderr, "timeline: %zu kernels and no two steps of one size\n", n_all);
}

/* The driver calls this when it starts. */
int InitializeInjection(void);
int InitializeInjection(void) {
    if (cuptiActivityRegisterCallbacks(buffer_give, buffer_done) != CUPTI_SUCCESS ||
        cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) != CUPTI_SUCCESS) {
        fprintf(stderr, "timeline: this GPU or process cannot be traced\n");
        return 1;
    }
    (void)atexit(report);
    return 1;
}
