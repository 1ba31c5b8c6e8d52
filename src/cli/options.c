/* Reading options from the command line, the environment and, through options_yaml.c, a file. See options.h. */
#include "cli/options.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/jsonr.h"

enum { ARENA_LIMIT = 8 << 20, NAME_MAX_LEN = 128, JSON_DEPTH = 16 };

/* ---- the table ------------------------------------------------------------------------------------------------- */

static char fold(char c) { return c == '_' ? '-' : c; }

/* Names are compared with '_' read as '-'. */
static bool same_name(const char *a, const char *b, size_t len) {
    for (size_t i = 0; i < len; i++)
        if (!b[i] || fold(a[i]) != fold(b[i])) return false;
    return b[len] == 0;
}

/* True when `text` is one of the words of `list`, '|' between. */
static bool in_list(const char *list, const char *text, size_t len) {
    for (const char *at = list; at && *at;) {
        size_t n = strcspn(at, "|");
        if (n == len && strncasecmp(at, text, n) == 0) return true;
        at += n + (at[n] == '|');
    }
    return false;
}

int option_find(const char *name, size_t len, unsigned cmd) {
    for (int i = 0; i < option_count; i++)
        if ((option_table[i].command & cmd) && option_table[i].name && same_name(name, option_table[i].name, len))
            return i;
    return -1;
}

static int find_alias(const char *arg, size_t len, unsigned cmd) {
    for (int i = 0; i < option_count; i++)
        if ((option_table[i].command & cmd) && in_list(option_table[i].alias, arg, len)) return i;
    return -1;
}

void option_title(const option *p, char *out, size_t size) {
    (void)snprintf(out, size, "%s%s", p->name ? "--" : "", p->name ? p->name : p->env);
}

/* Edits that turn a into b, both at most NAME_MAX_LEN - 1 long. */
static int edit_distance(const char *a, const char *b) {
    int row[NAME_MAX_LEN];
    int n = (int)strlen(b);
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int corner = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int keep = corner + (fold(a[i - 1]) != b[j - 1]);
            corner = row[j];
            int other = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
            row[j] = keep < other ? keep : other;
        }
    }
    return row[n];
}

const char *option_nearest(const char *name, unsigned cmd) {
    size_t len = strlen(name);
    if (len >= NAME_MAX_LEN) return NULL;
    const char *best = NULL;
    int best_distance = len / 3 > 2 ? (int)(len / 3) : 2;
    for (int i = 0; i < option_count; i++) {
        const option *p = &option_table[i];
        if (!(p->command & cmd) || !p->name || p->state == OPTION_OUTSIDE) continue;
        int d = edit_distance(name, p->name);
        if (d < best_distance || (!best && d == best_distance)) {
            best = p->name;
            best_distance = d;
        }
    }
    return best;
}

/* ---- checking one value ---------------------------------------------------------------------------------------- */

static bool read_flag(const char *text, bool *out) {
    if (in_list("1|true|yes|on", text, strlen(text))) return *out = true, true;
    if (in_list("0|false|no|off", text, strlen(text))) return *out = false, true;
    return false;
}

static bool read_int(const char *text, int64_t *out) {
    char *end = NULL;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    *out = v;
    return errno == 0 && end != text && *end == 0 && !isspace((unsigned char)text[0]);
}

static bool read_real(const char *text, double *out) {
    char *end = NULL;
    *out = strtod(text, &end);
    return end != text && *end == 0 && isfinite(*out) && !isspace((unsigned char)text[0]);
}

static bool is_ports(const char *text) {
    const char *at = text;
    for (;;) {
        char *end = NULL;
        if (!isdigit((unsigned char)*at)) return false;
        long v = strtol(at, &end, 10);
        if (v < 1 || v > 65535) return false;
        if (!*end) return true;
        if (*end != ',') return false;
        at = end + 1;
    }
}

/* The choices for a message: "a, b or c". */
static void print_choices(const char *choices, char *out, size_t size) {
    ern_buf b;
    ern_buf_init(&b, size - 1);
    for (const char *at = choices; *at;) {
        size_t n = strcspn(at, "|");
        bool last = at[n] == 0 || !strchr(at + n + 1, '|');
        (void)ern_buf_add(&b, at, n);
        at += n + (at[n] == '|');
        if (*at) (void)ern_buf_text(&b, last ? " or " : ", ");
    }
    (void)snprintf(out, size, "%s", b.data ? b.data : "");
    ern_buf_free(&b);
}

static ern_status check_json(const option *p, const char *text, const char *where, ern_err *err) {
    json_t *v = NULL;
    ern_err why;
    if (ern_json_parse(&v, text, strlen(text), JSON_DEPTH, where, &why) != ERN_OK)
        return ERN_FAIL(err, ERN_ERR_USAGE, "%s wants a JSON object in one argument, quoted for the shell: %s", where,
                        why.text);
    bool object = json_is_object(v);
    json_decref(v);
    if (!object)
        return ERN_FAIL(err, ERN_ERR_USAGE, "%s wants a JSON object such as '{\"key\": 1}', and '%s' is none", where,
                        text);
    (void)p;
    return ERN_OK;
}

/* Type, range and choice. `where` is how the source spelled the option. */
static ern_status check_value(const option *p, const char *text, const char *where, ern_err *err) {
    char words[256];
    int64_t i = 0;
    double r = 0;
    bool b = false;
    switch (p->type) {
    case OPTION_FLAG:
        if (!read_flag(text, &b))
            return ERN_FAIL(err, ERN_ERR_USAGE, "%s is a switch: give true or false, not '%s'", where, text);
        return ERN_OK;
    case OPTION_INT:
        if (!read_int(text, &i))
            return ERN_FAIL(err, ERN_ERR_USAGE, "%s wants a whole number from %.0f to %.0f, not '%s'", where, p->min,
                            p->max, text);
        if ((double)i < p->min || (double)i > p->max)
            return ERN_FAIL(err, ERN_ERR_USAGE, "%s is %s and must be from %.0f to %.0f", where, text, p->min, p->max);
        return ERN_OK;
    case OPTION_REAL:
        if (!read_real(text, &r))
            return ERN_FAIL(err, ERN_ERR_USAGE, "%s wants a number from %g to %g, not '%s'", where, p->min, p->max,
                            text);
        if (r < p->min || r > p->max)
            return ERN_FAIL(err, ERN_ERR_USAGE, "%s is %s and must be from %g to %g", where, text, p->min, p->max);
        return ERN_OK;
    case OPTION_ENUM:
        if (in_list(p->choices, text, strlen(text)) && !strchr(text, '|') && *text) return ERN_OK;
        print_choices(p->choices, words, sizeof words);
        return ERN_FAIL(err, ERN_ERR_USAGE, "%s is '%s' and must be %s", where, text, words);
    case OPTION_PORTS:
        if (!is_ports(text))
            return ERN_FAIL(err, ERN_ERR_USAGE, "%s wants port numbers from 1 to 65535, comma between, not '%s'", where,
                            text);
        return ERN_OK;
    case OPTION_JSON: return check_json(p, text, where, err);
    case OPTION_TEXT:
        if (!*text) return ERN_FAIL(err, ERN_ERR_USAGE, "%s is empty: give it a value or leave it out", where);
        return ERN_OK;
    }
    return ERN_OK;
}

ern_status options_set(options *o, int index, const char *text, option_source source, const char *where, ern_err *err) {
    const option *p = &option_table[index];
    if (p->state == OPTION_OUTSIDE)
        return ERN_FAIL(err, ERN_ERR_USAGE, "%s is for %s, which ernest does not do; leave the flag out", where,
                        p->why);
    ERN_TRY(check_value(p, text, where, err));
    option_value *v = &o->value[index];
    if (source < v->source) return ERN_OK;
    if (source > v->source || !p->repeat) v->n = 0;
    v->source = source;
    if (v->n == OPTION_VALUES_MAX)
        return ERN_FAIL(err, ERN_ERR_USAGE, "%s is given more than %d times", where, OPTION_VALUES_MAX);
    bool flag = false;
    if (p->type == OPTION_FLAG && read_flag(text, &flag)) text = flag ? "1" : "0";
    if (!v->text) v->text = ERN_ARENA_NEW(&o->arena, const char *, OPTION_VALUES_MAX);
    const char *copy = v->text ? ern_arena_text(&o->arena, text, strlen(text)) : NULL;
    if (!copy) return ERN_FAIL(err, ERN_ERR_USAGE, "the options are longer than %d bytes in all", ARENA_LIMIT);
    v->text[v->n++] = copy;
    return ERN_OK;
}

/* ---- the command line ------------------------------------------------------------------------------------------ */

typedef struct line {
    options *o;
    int argc, at;
    char **argv;
} line;

static bool looks_like_value(const char *arg) {
    double r;
    return arg[0] != '-' || arg[1] == 0 || read_real(arg, &r);
}

static ern_status unknown_flag(const line *l, const char *arg, size_t len, ern_err *err) {
    char name[NAME_MAX_LEN] = "";
    const char *bare = arg + (arg[0] == '-') + (arg[1] == '-');
    (void)snprintf(name, sizeof name, "%.*s", (int)(len - (size_t)(bare - arg)), bare);
    const char *near = option_nearest(name, l->o->command);
    if (!near && strncmp(name, "no-", 3) == 0) near = option_nearest(name + 3, l->o->command);
    if (near)
        return ERN_FAIL(err, ERN_ERR_USAGE, "%.*s is no flag here; did you mean --%s?", (int)(len < 100 ? len : 100),
                        arg, near);
    return ERN_FAIL(err, ERN_ERR_USAGE, "%.*s is no flag here; --help lists them", (int)(len < 100 ? len : 100), arg);
}

/* argv[at] is a flag, perhaps with =value. */
static ern_status read_flag_word(line *l, ern_err *err) {
    const char *arg = l->argv[l->at++];
    size_t len = strcspn(arg, "=");
    const char *value = arg[len] == '=' ? arg + len + 1 : NULL;
    bool two = arg[1] == '-', negated = false;
    int index = find_alias(arg, len, l->o->command);
    if (index < 0 && two) index = option_find(arg + 2, len - 2, l->o->command);
    if (index < 0 && two && len > 5 && strncmp(arg + 2, "no", 2) == 0 && fold(arg[4]) == '-') {
        index = option_find(arg + 5, len - 5, l->o->command);
        negated = true;
    }
    if (index < 0) return unknown_flag(l, arg, len, err);
    const option *p = &option_table[index];
    char where[NAME_MAX_LEN];
    (void)snprintf(where, sizeof where, "%.*s", (int)len, arg);
    if (negated && p->state != OPTION_OUTSIDE) {
        if (p->type != OPTION_FLAG)
            return ERN_FAIL(err, ERN_ERR_USAGE, "%s: --%s is no switch and cannot be negated; leave it out", where,
                            p->name);
        if (value) return ERN_FAIL(err, ERN_ERR_USAGE, "%s takes no value; leave out '=%s'", where, value);
        if (l->at < l->argc && in_list("true|false", l->argv[l->at], strlen(l->argv[l->at])))
            return ERN_FAIL(err, ERN_ERR_USAGE, "%s takes no value; leave out '%s'", where, l->argv[l->at]);
        return options_set(l->o, index, "0", SOURCE_LINE, where, err);
    }
    /* argparse's users write "--flag true" too; no model is called that. */
    bool word = !value && p->type == OPTION_FLAG && l->at < l->argc &&
                in_list("true|false", l->argv[l->at], strlen(l->argv[l->at]));
    if (word) value = l->argv[l->at++];
    if (p->type == OPTION_FLAG || p->state == OPTION_OUTSIDE)
        return options_set(l->o, index, value ? value : "1", SOURCE_LINE, where, err);
    if (value) return options_set(l->o, index, value, SOURCE_LINE, where, err);
    if (l->at >= l->argc ||
        (!looks_like_value(l->argv[l->at]) && strcmp(l->argv[l->at], "--") != 0 && l->argv[l->at][1]))
        return ERN_FAIL(err, ERN_ERR_USAGE, "%s needs a value%s%s", where, p->example ? ", for example " : "",
                        p->example ? p->example : "");
    do {
        ERN_TRY(options_set(l->o, index, l->argv[l->at++], SOURCE_LINE, where, err));
    } while (p->many && l->at < l->argc && looks_like_value(l->argv[l->at]));
    return ERN_OK;
}

static ern_status read_line(options *o, int argc, char **argv, ern_err *err) {
    line l = {.o = o, .argc = argc, .argv = argv};
    bool only_words = false;
    while (l.at < argc) {
        const char *arg = argv[l.at];
        if (!only_words && strcmp(arg, "--") == 0) {
            only_words = true;
            l.at++;
        } else if (only_words || arg[0] != '-' || arg[1] == 0) {
            if (o->n_positional == POSITIONAL_MAX)
                return ERN_FAIL(err, ERN_ERR_USAGE, "more than %d arguments without a flag", POSITIONAL_MAX);
            o->positional[o->n_positional++] = arg;
            l.at++;
        } else if (strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0 || strncmp(arg, "--help=", 7) == 0) {
            o->help = arg[0] && arg[1] == '-' && arg[6] == '=' ? arg + 7 : "";
            return ERN_OK;
        } else {
            ERN_TRY(read_flag_word(&l, err));
        }
    }
    return ERN_OK;
}

/* ---- the environment ------------------------------------------------------------------------------------------- */

static const char *env_find(char **envp, const char *name) {
    size_t len = strlen(name);
    for (char **e = envp; e && *e; e++)
        if (strncmp(*e, name, len) == 0 && (*e)[len] == '=') return (*e)[len + 1] ? *e + len + 1 : NULL;
    return NULL;
}

static ern_status read_env(options *o, char **envp, ern_err *err) {
    for (int i = 0; i < option_count; i++) {
        const option *p = &option_table[i];
        const char *text = p->env && (p->command & o->command) ? env_find(envp, p->env) : NULL;
        if (!text) continue;
        if (!p->repeat) {
            ERN_TRY(options_set(o, i, text, SOURCE_ENV, p->env, err));
            continue;
        }
        if (!text[strspn(text, ", ")])
            return ERN_FAIL(err, ERN_ERR_USAGE, "%s='%.60s' holds no value; give it one or unset it", p->env, text);
        for (const char *at = text; *at;) {
            size_t n = strcspn(at, ",");
            char word[512];
            if (n >= sizeof word)
                return ERN_FAIL(err, ERN_ERR_USAGE, "%s holds a value longer than %zu bytes", p->env, sizeof word - 1);
            memcpy(word, at, n);
            word[n] = 0;
            if (n) ERN_TRY(options_set(o, i, word, SOURCE_ENV, p->env, err));
            at += n + (at[n] == ',');
        }
    }
    return ERN_OK;
}

/* `ernest serve MODEL`: the word that stands alone is --model, so that everything that looks at the option sees it. */
static ern_status take_model(options *o, ern_err *err) {
    if (!(o->command & (CMD_SERVE | CMD_CLIENT | CMD_QUANTIZE | CMD_BENCH_STEP)) || o->n_positional == 0) return ERN_OK;
    if (o->command == CMD_QUANTIZE && options_given(o, "model")) return ERN_OK; /* the word is where to write */
    for (int i = 0; i < o->n_positional; i++)
        if (in_list("true|false", o->positional[i], strlen(o->positional[i])))
            return ERN_FAIL(err, ERN_ERR_USAGE,
                            "'%s' stands alone; only a switch takes true or false, right after it or after '='",
                            o->positional[i]);
    const char *word = o->positional[0], *name = options_given(o, "model") ? options_text(o, "model") : word;
    if (strcmp(name, word) != 0)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--model %.100s and '%.100s' are two models; name one", name, word);
    return options_set(o, option_find("model", 5, o->command), word, SOURCE_LINE, "the model", err);
}

/* One option follows from another: what is in force is then read, printed and told in one place. */
static ern_status resolve(options *o, ern_err *err) {
    if (o->command != CMD_SERVE || !options_flag(o, "FD_DISABLE_CHUNKED_PREFILL")) return ERN_OK;
    return options_set(o, option_find("enable-chunked-prefill", 22, o->command), "0", SOURCE_ENV,
                       "FD_DISABLE_CHUNKED_PREFILL", err); /* a flag of the line or the file stands */
}

ern_status options_read(options *o, unsigned cmd, int argc, char **argv, char **envp, ern_err *err) {
    memset(o, 0, sizeof *o);
    o->command = cmd;
    ern_arena_open(&o->arena, ARENA_LIMIT);
    ERN_TRY(read_line(o, argc, argv, err));
    if (o->help) return ERN_OK;
    ERN_TRY(take_model(o, err));
    ERN_TRY(read_env(o, envp, err));
    if (option_find("config", 6, cmd) >= 0) o->config_path = options_text(o, "config");
    if (o->config_path) ERN_TRY(options_read_yaml(o, o->config_path, err));
    return resolve(o, err);
}

void options_close(options *o) { ern_arena_close(&o->arena); }

/* ---- asking ---------------------------------------------------------------------------------------------------- */

/* Index of a name or, for options without one, of its variable. */
static int index_of(const options *o, const char *name) {
    int i = option_find(name, strlen(name), o->command);
    for (int k = 0; i < 0 && k < option_count; k++)
        if (option_table[k].env && (option_table[k].command & o->command) && strcmp(option_table[k].env, name) == 0)
            i = k;
    ERN_ASSERT(i >= 0);
    return i;
}

const option_value *options_values(const options *o, const char *name) { return &o->value[index_of(o, name)]; }

bool options_given(const options *o, const char *name) { return o->value[index_of(o, name)].n > 0; }

const char *options_text(const options *o, const char *name) {
    int i = index_of(o, name);
    const option_value *v = &o->value[i];
    return v->n ? v->text[v->n - 1] : option_table[i].fallback;
}

int64_t options_int(const options *o, const char *name) {
    const char *text = options_text(o, name);
    int64_t v = 0;
    ERN_ASSERT(text && read_int(text, &v));
    return v;
}

double options_real(const options *o, const char *name) {
    const char *text = options_text(o, name);
    double v = 0;
    ERN_ASSERT(text && read_real(text, &v));
    return v;
}

bool options_flag(const options *o, const char *name) {
    const char *text = options_text(o, name);
    bool v = false;
    return text && read_flag(text, &v) && v;
}

/* A pending option's value that asks for nothing. Numbers compare as numbers, so 1 and 1.0 are the same. */
static bool is_fine(const option *p, const char *text) {
    if (in_list(p->fine, text, strlen(text))) return true;
    double have, fine;
    return (p->type == OPTION_INT || p->type == OPTION_REAL) && p->fine && !strchr(p->fine, '|') &&
           read_real(text, &have) && read_real(p->fine, &fine) && have == fine;
}

ern_status options_check_built(const options *o, ern_err *err) {
    for (int i = 0; i < option_count; i++) {
        const option *p = &option_table[i];
        const option_value *v = &o->value[i];
        for (int k = 0; p->state == OPTION_PENDING && k < v->n; k++) {
            if (is_fine(p, v->text[k])) continue;
            char title[NAME_MAX_LEN];
            option_title(p, title, sizeof title);
            bool flag = p->type == OPTION_FLAG;
            return ERN_FAIL(err, ERN_ERR_UNSUPPORTED, "%s%s%.80s: %s", title,
                            flag      ? ""
                            : p->name ? " "
                                      : "=",
                            flag ? "" : v->text[k], p->why);
        }
    }
    return ERN_OK;
}
