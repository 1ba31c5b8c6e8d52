/* Lines of CSV. See bench_book.h. */
#include "cli/bench_book.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "base/os.h"
#include "cli/command.h"

#ifndef ERN_COMMIT
#define ERN_COMMIT "unknown"
#endif

static const char heading[] =
    "date,commit,machine,cores,threads,command,row,value,unit,bytes,operations,limit,limit_value,fraction\n";

const char *bench_today(char out[16]) {
    const time_t now = (time_t)ern_wall_s();
    struct tm day;
    (void)gmtime_r(&now, &day);
    (void)strftime(out, 16, "%Y-%m-%d", &day);
    return out;
}

const char *bench_commit(const options *o) {
    const char *given = options_text(o, "commit");
    return given ? given : ERN_COMMIT;
}

ern_status bench_book_open(bench_book *b, const options *o, int argc, char **argv, ern_err *err) {
    *b = (bench_book){.commit = bench_commit(o), .path = options_text(o, "save-csv")};
    ern_buf_init(&b->command, 4096);
    (void)ern_buf_text(&b->command, "ernest");
    for (int i = 0; i < argc; i++) { /* a key is nobody's to keep */
        const bool secret = strncmp(argv[i], "--api", 5) == 0;
        (void)ern_buf_print(&b->command, " %s", secret ? "--api-key=..." : argv[i]);
        i += secret && !strchr(argv[i], '=');
    }
    if (!b->path) return ERN_OK;
    char first[sizeof heading] = "";
    b->file = fopen(b->path, "a+e");
    if (!b->file) return ERN_FAIL(err, ERN_ERR_FILE, "--save-csv: cannot open %.200s: %s", b->path, strerror(errno));
    rewind(b->file);
    if (!fgets(first, sizeof first, b->file)) {
        (void)fputs(heading, b->file);
    } else if (strcmp(first, heading) != 0) {
        (void)fclose(b->file);
        b->file = NULL;
        return ERN_FAIL(err, ERN_ERR_FILE,
                        "--save-csv: %.200s does not begin with this program's heading; name a new file", b->path);
    }
    (void)fseek(b->file, 0, SEEK_END);
    return ERN_OK;
}

static void field(FILE *f, const char *text, char after) {
    const bool quote = text && strpbrk(text, ",\"\n") != NULL;
    if (quote) (void)fputc('"', f);
    for (const char *c = text ? text : ""; *c; c++) {
        if (*c == '"') (void)fputc('"', f);
        (void)fputc(*c == '\n' ? ' ' : *c, f);
    }
    if (quote) (void)fputc('"', f);
    (void)fputc(after, f);
}

static void number(FILE *f, const char *format, double v, char after) {
    char text[40] = "";
    if (v != 0) (void)snprintf(text, sizeof text, format, v);
    field(f, text, after);
}

void bench_book_add(bench_book *b, const bench_line *line) {
    char day[16];
    if (!b->file) return;
    field(b->file, bench_today(day), ',');
    field(b->file, b->commit, ',');
    field(b->file, ern_cpu_name(), ',');
    number(b->file, "%.0f", ern_cpu_count(), ',');
    number(b->file, "%.0f", line->threads, ',');
    field(b->file, b->command.data, ',');
    field(b->file, line->row, ',');
    (void)fprintf(b->file, "%.6g,", line->value);
    field(b->file, line->unit, ',');
    number(b->file, "%.0f", line->bytes, ',');
    number(b->file, "%.0f", line->operations, ',');
    field(b->file, line->limit, ',');
    number(b->file, "%.4g", line->limit_value, ',');
    number(b->file, "%.4f", line->fraction, '\n');
}

ern_status bench_book_close(bench_book *b, ern_err *err) {
    ern_buf_free(&b->command);
    if (!b->file) return ERN_OK;
    bool good = !ferror(b->file);
    good = fclose(b->file) == 0 && good;
    b->file = NULL;
    return good ? ERN_OK : ERN_FAIL(err, ERN_ERR_FILE, "--save-csv: cannot write %.200s", b->path);
}

int bench_book_command(unsigned options_of, int argc, char **argv, char **envp,
                       ern_status (*measure)(const options *o, bench_book *b, ern_err *err)) {
    options o;
    int exit_code;
    if (!command_begin(&o, options_of, argc, argv, envp, &exit_code)) return exit_code;
    bench_book book = {0};
    ern_err err, at_close;
    ern_status s = bench_book_open(&book, &o, argc, argv, &err);
    if (s == ERN_OK) s = measure(&o, &book, &err);
    exit_code = s == ERN_OK ? 0 : command_fail(&err);
    if (bench_book_close(&book, &at_close) != ERN_OK && s == ERN_OK) exit_code = command_fail(&at_close);
    options_close(&o);
    return exit_code;
}
