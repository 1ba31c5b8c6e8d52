/* ernest bench kernels: the cpu backend's kernels one by one, beside the limits of the same minutes. */
#include <stdio.h>
#include <string.h>

#include "backend/bench.h"
#include "base/os.h"
#include "cli/bench_book.h"
#include "cli/bench_stats.h"
#include "cli/command.h"

enum { WINDOW_MIB = 512, QUICK_MIB = 16, RATE_US = 20000, QUICK_US = 500 };

typedef struct kernels {
    bench_book *book;
    ern_limits *limits;
    int64_t min_us;
    uint64_t bytes;
    int threads;
    double read;            /* bytes/s: the best so far of what was measured every few lines */
    double rate[ERN_RATES]; /* operations/s with operands from L2; 0: not measured yet */
    int n_shown;
} kernels;

static double larger(double a, double b) { return a > b ? a : b; }

/* The limits are looked at again every few kernels: the better of all looks counts. */
static void look(kernels *k, const ern_kernel_run *run) {
    if (k->n_shown % 8 == 0) k->read = larger(k->read, ern_limits_read(k->limits, k->bytes, k->min_us));
    if (run->has_rate && !ern_rate_missing(run->rate) && (k->n_shown % 8 == 0 || k->rate[run->rate] == 0))
        k->rate[run->rate] =
            larger(k->rate[run->rate], ern_limits_compute(k->limits, run->rate, ERN_REACH_L2, k->min_us));
}

static void on_run(void *ud, const ern_kernel_run *run) {
    kernels *k = ud;
    look(k, run);
    k->n_shown++;
    const double reading_s = run->streams ? (double)run->bytes / k->read : 0;
    const double rate = run->has_rate ? k->rate[run->rate] : 0;
    const double computing_s = rate > 0 ? (double)run->operations / rate : 0;
    const bool by_read = reading_s >= computing_s, bound = reading_s > 0 || computing_s > 0;
    const char *limit = !bound ? "" : by_read ? "read" : ern_rate_name(run->rate);
    const double share = (by_read ? reading_s : computing_s) / run->median_s;
    char row[128], percent[16] = "";
    (void)snprintf(row, sizeof row, "%s, %s, %s, %d rows", run->kernel, run->level, run->shape, run->n_row);
    if (bound) (void)snprintf(percent, sizeof percent, "%.0f%%", 100 * share);
    (void)printf("%-20s %-9s %-16s %5d %11.2f us %8.1f GB/s %9.1f GOP/s  %5s %s\n", run->kernel, run->level, run->shape,
                 run->n_row, run->median_s * 1e6, (double)run->bytes / run->median_s * 1e-9,
                 (double)run->operations / run->median_s * 1e-9, percent, limit);
    (void)fflush(stdout);
    bench_book_add(k->book, &(bench_line){.row = row,
                                          .value = run->median_s * 1e6,
                                          .unit = "us",
                                          .threads = k->threads,
                                          .bytes = (double)run->bytes,
                                          .operations = (double)run->operations,
                                          .limit = bound ? limit : NULL,
                                          .limit_value = !bound    ? 0
                                                         : by_read ? k->read
                                                                   : rate,
                                          .fraction = bound ? share : 0});
}

static int level_of(const options *o) {
    const char *name = options_text(o, "cpu-level");
    for (int l = 0; l <= (int)ERN_CPU_AMX; l++)
        if (strcmp(name, ern_cpu_level_name((ern_cpu_level)l)) == 0) return l;
    return -1;
}

static ern_status measure(const options *o, bench_book *book, ern_err *err) {
    ERN_TRY(command_positional(o, 0, err));
    const bool quick = options_flag(o, "quick");
    const int level = level_of(o);
    if (level > (int)ern_cpu_level_here())
        return ERN_FAIL(err, ERN_ERR_USAGE, "--cpu-level %s is above what this processor has, %s",
                        options_text(o, "cpu-level"), ern_cpu_level_name(ern_cpu_level_here()));
    kernels k = {
        .book = book, .min_us = quick ? QUICK_US : RATE_US, .bytes = (uint64_t)(quick ? QUICK_MIB : WINDOW_MIB) << 20};
    ERN_TRY(ern_limits_open(&k.limits, (int)options_int(o, "threads"), k.bytes, true, err));
    k.threads = ern_limits_threads(k.limits);
    (void)printf(
        "%s, %d thread%s; weights and KV from %llu MiB of memory, the rest from the cache; the share is of the "
        "limit that binds, measured every few lines, from memory or from L2\n",
        ern_cpu_name(), k.threads, k.threads == 1 ? "" : "s", (unsigned long long)(k.bytes >> 20));
    const ern_status s = ern_bench_kernels(&(ern_kernel_options){.n_thread = k.threads,
                                                                 .level = level,
                                                                 .n_round = (int)options_int(o, "rounds"),
                                                                 .filter = options_text(o, "filter"),
                                                                 .bytes = k.bytes,
                                                                 .quick = quick},
                                           on_run, &k, err);
    ern_limits_close(k.limits);
    if (s == ERN_OK && k.n_shown == 0)
        return ERN_FAIL(err, ERN_ERR_USAGE, "no kernel of this level holds --filter '%.60s'",
                        options_text(o, "filter") ? options_text(o, "filter") : "");
    return s;
}

int cmd_bench_kernels(int argc, char **argv, char **envp) {
    return bench_book_command(CMD_BENCH_KERNELS, argc, argv, envp, measure);
}
