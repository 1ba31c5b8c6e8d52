/* The options of every sub-command: one table that parses, checks, reads YAML and the environment, and prints the help,
 * the man page, the completion and the reference page.
 *
 * Three states keep the promise that no flag is ignored silently: built (it works), ignored (accepted, changes nothing
 * here, one log line says why) and pending (known, refused in one sentence unless its value asks for nothing).
 * Precedence: command line, then the --config file, then the environment, then the default.
 * Owner: the sub-command owns its `options`; options_close frees them. One thread. */
#ifndef ERN_CLI_OPTIONS_H
#define ERN_CLI_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/arena.h"
#include "base/buf.h"
#include "base/status.h"

/* Which sub-commands know an option. */
enum {
    CMD_SERVE = 1,
    CMD_CHAT = 2,
    CMD_COMPLETE = 4,
    CMD_TOKENIZE = 8,
    CMD_MAKE_MODEL = 16,
    CMD_QUANTIZE = 32,
    CMD_BENCH_LIMITS = 64,
    CMD_BENCH_STEP = 128,
    CMD_BENCH_SERVE = 256,
    CMD_BENCH_KERNELS = 512,
    CMD_CLIENT = CMD_CHAT | CMD_COMPLETE,
    CMD_BENCH_CPU = CMD_BENCH_LIMITS | CMD_BENCH_STEP | CMD_BENCH_KERNELS,
    CMD_BENCH = CMD_BENCH_CPU | CMD_BENCH_SERVE,
};

typedef enum option_type {
    OPTION_FLAG, /* --x, --no-x, --x=true|false|1|0 */
    OPTION_INT,
    OPTION_REAL,
    OPTION_TEXT,
    OPTION_ENUM,
    OPTION_JSON,  /* an object */
    OPTION_PORTS, /* comma-separated port numbers */
} option_type;

typedef enum option_state { OPTION_BUILT, OPTION_IGNORED, OPTION_PENDING, OPTION_OUTSIDE } option_state;

typedef struct option {
    const char *name;     /* "max-model-len"; NULL: an environment variable only */
    const char *alias;    /* other spellings with their dashes, '|' between: "-tp|--tp"; NULL */
    const char *env;      /* environment variable; NULL */
    const char *fallback; /* default as text; NULL: none */
    const char *choices;  /* OPTION_ENUM: "auto|cpu|ref" */
    const char *group;    /* heading in the help */
    const char *help;     /* one sentence */
    const char *example;  /* as typed; NULL */
    const char *why;  /* ignored: the reason; pending: what is not built and what to do; outside: what it belongs to */
    const char *fine; /* pending: values that ask for nothing, '|' between; NULL: none */
    double min, max;  /* OPTION_INT, OPTION_REAL: range, both ends in */
    unsigned command; /* CMD_* */
    option_type type;
    option_state state;
    char tag;    /* FastDeploy's S, T or X as in its list; E: ernest's own */
    bool repeat; /* may be given more than once; all values are kept */
    bool many;   /* takes every following word that is no flag */
} option;

extern const option option_table[];
extern const int option_count;
extern const char *const option_groups[]; /* in order of help, NULL-ended */

typedef enum option_source { SOURCE_DEFAULT, SOURCE_ENV, SOURCE_FILE, SOURCE_LINE } option_source;

enum { OPTIONS_MAX = 320, OPTION_VALUES_MAX = 64, POSITIONAL_MAX = 64 };

typedef struct option_value {
    const char **text; /* [n] */
    int n;
    option_source source;
} option_value;

typedef struct options {
    unsigned command;
    option_value value[OPTIONS_MAX]; /* by index in option_table */
    const char *positional[POSITIONAL_MAX];
    int n_positional;
    const char *help;        /* --help was given: "" or its keyword; NULL */
    const char *config_path; /* --config */
    ern_arena arena;
} options;

/* Read argv (after the sub-command's name), envp and the --config file; every value is checked for type and range.
 * Stops at --help with o->help set. Errors: ERN_ERR_USAGE or ERN_ERR_FILE, one sentence naming the flag.
 * options_close is due also after a failure. */
ERN_MUST_CHECK ern_status options_read(options *o, unsigned cmd, int argc, char **argv, char **envp, ern_err *err);
/* Refuse what asks for a feature that is not built. Errors: ERN_ERR_UNSUPPORTED. */
ERN_MUST_CHECK ern_status options_check_built(const options *o, ern_err *err);
void options_close(options *o);

/* The value of an option by its name (or its variable's, for options without a flag). The name must be in the table.
 * The text is NULL when nothing was given and there is no default; numbers must have a default or be asked about with
 * options_given first. */
const char *options_text(const options *o, const char *name);
int64_t options_int(const options *o, const char *name);
double options_real(const options *o, const char *name);
bool options_flag(const options *o, const char *name);
bool options_given(const options *o, const char *name); /* from anywhere but the default */
const option_value *options_values(const options *o, const char *name);

/* One value, as the file or the line gives it. `where` names the source in errors. For options_yaml.c and tests. */
ERN_MUST_CHECK ern_status options_set(options *o, int index, const char *text, option_source source, const char *where,
                                      ern_err *err);
/* Index of a name without dashes ('_' counts as '-', "no-" is not looked at) for a sub-command, or -1. */
int option_find(const char *name, size_t len, unsigned cmd);
/* The known name nearest to a wrong one, or NULL when none is near. */
const char *option_nearest(const char *name, unsigned cmd);
/* "--name", or the variable's name. */
void option_title(const option *p, char *out, size_t size);

/* Read a YAML file of `flag: value` (options_yaml.c): maps and lists become JSON for JSON options; at most 1 MiB,
 * 8 levels, no aliases. */
ERN_MUST_CHECK ern_status options_read_yaml(options *o, const char *path, ern_err *err);

/* What is printed from the table (option_help.c). keyword: NULL or "": all; "listgroup": the headings; else options
 * whose group, name, variable or help holds it. envp: what a flag's variable is set to is said beside the default;
 * NULL: nothing of that. Returns how many options were shown. */
int option_help_print(ern_buf *out, unsigned cmd, const char *keyword, char **envp);
void option_man_print(ern_buf *out);
void option_completion_print(ern_buf *out);
void option_reference_print(ern_buf *out);
/* The options in force as YAML that --config reads back, secrets left out and defaults as comments, so that they stay
 * defaults; and as one JSON object. */
void options_print_yaml(const options *o, ern_buf *out);
void options_print_json(const options *o, ern_buf *out);

/* A sub-command. */
typedef struct command {
    const char *name, *alias;                       /* alias may be NULL */
    const char *usage;                              /* what follows the name */
    const char *help;                               /* one sentence */
    unsigned options;                               /* CMD_* of its options, 0: none */
    int (*run)(int argc, char **argv, char **envp); /* argv[0] is the sub-command's name; returns the exit code */
} command;
extern const command command_table[]; /* ends with a NULL name */
extern const command bench_table[];   /* the kinds of `bench`, named "bench KIND"; ends with a NULL name */

#endif
