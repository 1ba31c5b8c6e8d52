/* ernest bench limits: the machine's read bandwidth and the rates of its arithmetic. */
#include <stdio.h>
#include <string.h>

#include "backend/bench.h"
#include "base/os.h"
#include "cli/bench_book.h"
#include "cli/bench_stats.h"
#include "cli/command.h"
#include "cli/console.h"

enum { SIZES_MAX = 8, ROUNDS_MAX = 100, READ_US = 20000, RATE_US = 50000, QUICK_US = 500, PLAIN_MIB = 256 };

typedef struct sizes {
    uint64_t bytes[SIZES_MAX];
    int n;
} sizes;

/* 64 MiB, then four times as much, up to --max-mib and to a quarter of the free memory. */
static sizes pick_sizes(const options *o) {
    const uint64_t top = (uint64_t)options_int(o, "max-mib") << 20, room = ern_memory_available_bytes() / 4;
    const uint64_t most = options_flag(o, "quick") ? (uint64_t)64 << 20 : top < room ? top : room;
    sizes s = {.n = 0};
    for (uint64_t b = (uint64_t)64 << 20; b <= most && s.n < SIZES_MAX; b *= 4) s.bytes[s.n++] = b;
    if (s.n == 0) s.bytes[s.n++] = (most >> 20) << 20;
    return s;
}

static void show(bench_book *book, const char *row, int threads, double *value, int n, const char *unit) {
    const bench_summary s = bench_summarize(value, (size_t)n);
    char best[96], median[96];
    (void)snprintf(best, sizeof best, "%s, best of %d", row, n);
    (void)snprintf(median, sizeof median, "%s, median", row);
    bench_book_add(book, &(bench_line){.row = best, .value = s.most, .unit = unit, .threads = threads});
    bench_book_add(book, &(bench_line){.row = median, .value = s.median, .unit = unit, .threads = threads});
    const double scale = unit[0] == 'G' ? 1 : 1e-3;
    (void)printf("  %-34s %2d thread%s %9.*f %s  (median %.*f)\n", row, threads, threads == 1 ? " " : "s",
                 scale < 1 ? 3 : 1, s.most * scale, scale < 1 ? "TOP/s" : unit, scale < 1 ? 3 : 1, s.median * scale);
    (void)fflush(stdout);
}

/* Rounds go over all sizes in turn, so that a busy minute spoils no size alone. */
static ern_status read_sizes(const options *o, bench_book *book, int threads, const sizes *s, bool huge, ern_err *err) {
    const int rounds = (int)options_int(o, "rounds");
    static double rate[SIZES_MAX][ROUNDS_MAX];
    ern_limits *l = NULL;
    ERN_TRY(ern_limits_open(&l, threads, s->bytes[s->n - 1], huge, err));
    for (int r = 0; r < rounds; r++)
        for (int i = 0; i < s->n; i++)
            rate[i][r] = ern_limits_read(l, s->bytes[i], options_flag(o, "quick") ? QUICK_US : READ_US) * 1e-9;
    for (int i = 0; i < s->n; i++) {
        char row[64], size[32];
        (void)snprintf(row, sizeof row, "read %s%s", console_bytes(size, s->bytes[i]), huge ? "" : ", plain pages");
        show(book, row, threads, rate[i], rounds, "GB/s");
    }
    ern_limits_close(l);
    return ERN_OK;
}

static ern_status rates(const options *o, bench_book *book, int threads, ern_err *err) {
    const int rounds = (int)options_int(o, "rounds");
    static double rate[ERN_REACHES][ROUNDS_MAX];
    ern_limits *l = NULL;
    ERN_TRY(ern_limits_open(&l, threads, 0, true, err));
    for (int k = 0; k < ERN_RATES; k++) {
        if (ern_rate_missing((ern_rate)k)) continue;
        for (int r = 0; r < rounds; r++)
            for (int i = 0; i < ERN_REACHES; i++)
                rate[i][r] =
                    ern_limits_compute(l, (ern_rate)k, (ern_reach)i, options_flag(o, "quick") ? QUICK_US : RATE_US) *
                    1e-9;
        for (int i = 0; i < ERN_REACHES; i++) {
            char row[64];
            (void)snprintf(row, sizeof row, "%s from %s", ern_rate_name((ern_rate)k), ern_reach_name((ern_reach)i));
            show(book, row, threads, rate[i], rounds, "GOP/s");
        }
    }
    ern_limits_close(l);
    return ERN_OK;
}

static ern_status measure(const options *o, bench_book *book, ern_err *err) {
    ERN_TRY(command_positional(o, 0, err));
    const int n = options_int(o, "threads") ? (int)options_int(o, "threads") : ern_cpu_count();
    const sizes s = pick_sizes(o);
    sizes plain = {.bytes = {(uint64_t)PLAIN_MIB << 20}, .n = 1};
    if (plain.bytes[0] > s.bytes[s.n - 1]) plain.bytes[0] = s.bytes[s.n - 1];
    (void)printf("%s, %d processor%s, level %s; best of %lld rounds\n", ern_cpu_name(), ern_cpu_count(),
                 ern_cpu_count() == 1 ? "" : "s", ern_cpu_level_name(ern_cpu_level_here()),
                 (long long)options_int(o, "rounds"));
    (void)printf("reading, huge pages where the system gives them:\n");
    for (int t = 1; t <= n; t = t < n && t * 2 > n ? n : t * 2) ERN_TRY(read_sizes(o, book, t, &s, true, err));
    ERN_TRY(read_sizes(o, book, n, &plain, false, err));
    (void)printf("arithmetic (a fused multiply-add counts two operations):\n");
    for (int t = 1; t <= n; t = t < n && t * 2 > n ? n : t * 2) ERN_TRY(rates(o, book, t, err));
    for (int k = 0; k < ERN_RATES; k++)
        if (ern_rate_missing((ern_rate)k))
            (void)printf("  %-34s not measured: %s\n", ern_rate_name((ern_rate)k), ern_rate_missing((ern_rate)k));
    return ERN_OK;
}

int cmd_bench_limits(int argc, char **argv, char **envp) {
    return bench_book_command(CMD_BENCH_LIMITS, argc, argv, envp, measure);
}
