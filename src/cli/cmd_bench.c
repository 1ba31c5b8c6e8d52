/* ernest bench: which of the benchmarks. Each has a file of its own. */
#include <stdio.h>
#include <string.h>

#include "cli/command.h"

/* Lines of a help are broken here: it is printed as it stands. */
const command bench_table[] = {
    {"bench limits", NULL, "[FLAGS]",
     "Measure what this machine can do at most: read bandwidth of 1..n threads over buffers of 64 MiB to\n"
     "4 GiB, and the rates of its arithmetic with operands in registers, L1 and L2",
     CMD_BENCH_LIMITS, cmd_bench_limits},
    {"bench step", NULL, "--model DIR [FLAGS]",
     "Run prefill and decode steps of a model without a server: tokens/s, the bytes and operations counted,\n"
     "and the fraction of the limit that binds. That is the time which the slower of reading the bytes and\n"
     "doing the operations would take at its limit, over the time it took. The limits of a round are the\n"
     "mean of what was measured before and after it, each the best of three; on the CPU a prompt is repeated\n"
     "until a round has two seconds, with such looks between, and between its steps once half a second has\n"
     "passed. The median of the rounds is told",
     CMD_BENCH_STEP, cmd_bench_step},
    {"bench serve", NULL, "[FLAGS]",
     "Load a running server over HTTP and tell latency and throughput in the columns of benchmark_serving:\n"
     "TTFT (request sent to first text), ITL (between two chunks), TPOT (per token after the first), E2EL\n"
     "(request sent to the end). It talks to this machine's port 8000 unless you name another server. Every\n"
     "run is bounded by --num-prompts, --max-concurrency and --time-limit",
     CMD_BENCH_SERVE, cmd_bench_serve},
    {"bench kernels", NULL, "[FLAGS]",
     "Time the cpu backend's kernels one by one: on the shapes of the published models, in GB/s and\n"
     "operations/s, with the share of the limit that binds",
     CMD_BENCH_KERNELS, cmd_bench_kernels},
    {0},
};

static int print_kinds(FILE *to) {
    (void)fputs("usage: ernest bench limits|step|serve|kernels [FLAGS]\n\n", to);
    for (const command *c = bench_table; c->name; c++) {
        const int n = (int)strcspn(c->help, ":");
        (void)fprintf(to, "  %-14s %.*s\n", c->name, n, c->help);
    }
    (void)fputs("\nernest bench KIND --help shows a kind's flags.\n", to);
    return to == stdout ? 0 : 2;
}

int cmd_bench(int argc, char **argv, char **envp) {
    if (argc < 2) return print_kinds(stderr);
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) return print_kinds(stdout);
    for (const command *c = bench_table; c->name; c++) {
        static char name[32];
        if (strcmp(strchr(c->name, ' ') + 1, argv[1]) != 0) continue;
        (void)snprintf(name, sizeof name, "%s", c->name);
        argv[1] = name;
        return c->run(argc - 1, argv + 1, envp);
    }
    (void)fprintf(stderr, "ernest: bench measures limits, step, serve or kernels, not '%.100s'\n", argv[1]);
    return 2;
}
