/* The book of results: lines of CSV with what a figure needs to be worth keeping: date, commit, machine, command, and
 * the limit it stands beside. Owner: the command. One thread. */
#ifndef ERN_CLI_BENCH_BOOK_H
#define ERN_CLI_BENCH_BOOK_H

#include <stdio.h>

#include "base/buf.h"
#include "cli/options.h"

typedef struct bench_book {
    FILE *file; /* NULL: nothing is kept */
    ern_buf command;
    const char *commit, *path;
} bench_book;

/* One result. Numbers that are 0 and names that are NULL are left empty. */
typedef struct bench_line {
    const char *row; /* what was measured, words */
    double value;
    const char *unit;
    int threads;
    double bytes, operations; /* of one step or call */
    const char *limit;        /* the limit that binds */
    double limit_value;       /* in bytes/s or operations/s, measured in the same rounds */
    double fraction;          /* of that limit */
} bench_line;

/* Open the file of --save-csv, if given, and write the heading into a new one. argv is the command's, argv[0] "bench
 * KIND". Errors: ERN_ERR_FILE. */
ERN_MUST_CHECK ern_status bench_book_open(bench_book *b, const options *o, int argc, char **argv, ern_err *err);
void bench_book_add(bench_book *b, const bench_line *line);
/* Errors: ERN_ERR_FILE when something could not be written. */
ERN_MUST_CHECK ern_status bench_book_close(bench_book *b, ern_err *err);

/* The whole of an `ernest bench KIND` that measures and writes lines: its options and book are opened, and closed
 * whatever measure says. Returns the exit code. */
int bench_book_command(unsigned options_of, int argc, char **argv, char **envp,
                       ern_status (*measure)(const options *o, bench_book *b, ern_err *err));

/* Today as YYYY-MM-DD, UTC. */
const char *bench_today(char out[16]);
/* The commit of --commit, or the one the program was configured at. */
const char *bench_commit(const options *o);

#endif
