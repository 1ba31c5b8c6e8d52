/* What is printed from the option table: help, man page, completion, reference page, the options in force. */
#include "cli/options.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/jsonw.h"

enum { HELP_WIDTH = 100, HELP_INDENT = 8 };

static const char *metavar(const option *p) {
    switch (p->type) {
    case OPTION_FLAG: return "";
    case OPTION_INT: return " N";
    case OPTION_REAL: return " X";
    case OPTION_ENUM: return "";
    case OPTION_JSON: return " JSON";
    case OPTION_PORTS: return " PORT[,PORT...]";
    case OPTION_TEXT: return " TEXT";
    }
    return "";
}

/* "--max-model-len N", "-tp, --tensor-parallel-size N", "FD_LOG_DIR=TEXT". */
static void print_spelling(ern_buf *out, const option *p) {
    if (p->alias) (void)ern_buf_print(out, "%s, ", p->alias);
    if (p->name) {
        (void)ern_buf_print(out, "--%s%s%s%s", p->name, p->type == OPTION_ENUM ? " " : metavar(p),
                            p->type == OPTION_ENUM ? p->choices : "", p->many ? " ..." : "");
    } else {
        (void)ern_buf_print(out, "%s=%s", p->env,
                            p->type == OPTION_ENUM   ? p->choices
                            : p->type == OPTION_FLAG ? "0|1"
                                                     : metavar(p) + 1);
    }
}

static bool is_secret(const option *p) { return p->name && strcmp(p->name, "api-key") == 0; }

/* The variable of a flag, and what it is set to here: that is then the default. */
static void print_variable(ern_buf *out, const option *p, char **envp) {
    size_t len = strlen(p->env);
    (void)ern_buf_print(out, " Variable: %s", p->env);
    for (char **e = envp; e && *e && !is_secret(p); e++)
        if (strncmp(*e, p->env, len) == 0 && (*e)[len] == '=' && (*e)[len + 1])
            (void)ern_buf_print(out, " (now %.100s)", *e + len + 1);
    (void)ern_buf_text(out, ".");
}

/* How a switch is thrown the other way, and how it is without being touched, where that is known. */
static const char *switched(const option *p) {
    return !p->fallback ? " Off: " : p->fallback[0] == '1' ? " Default: on (" : " Default: off (";
}

/* Everything about an option after its spelling, as one paragraph. */
static void print_facts(ern_buf *out, const option *p, char **envp) {
    (void)ern_buf_print(out, "%s.", p->help);
    if (p->type == OPTION_INT && p->max < 2147483647.0)
        (void)ern_buf_print(out, " From %.0f to %.0f.", p->min, p->max);
    else if (p->type == OPTION_REAL)
        (void)ern_buf_print(out, " From %g to %g.", p->min, p->max);
    if (p->type == OPTION_FLAG && p->name)
        (void)ern_buf_print(out, "%s--no-%s%s.", switched(p), p->name, p->fallback ? ")" : "");
    else if (p->fallback)
        (void)ern_buf_print(out, " Default: %s.", p->fallback);
    if (p->name && p->env) print_variable(out, p, envp);
    if (p->example) (void)ern_buf_print(out, " Example: %s", p->example);
    if (p->state == OPTION_IGNORED) (void)ern_buf_print(out, " Accepted, changes nothing: %s.", p->why);
    if (p->state != OPTION_PENDING) return;
    if (!p->fine || p->type == OPTION_FLAG) {
        (void)ern_buf_print(out, " Refused: %s.", p->why);
        return;
    }
    (void)ern_buf_text(out, " Accepted is only ");
    for (const char *c = p->fine; *c; c++) (void)ern_buf_add(out, *c == '|' ? "/" : c, 1);
    (void)ern_buf_print(out, ": %s.", p->why);
}

/* Text broken at blanks so that lines stay within HELP_WIDTH. */
static void print_wrapped(ern_buf *out, const char *text) {
    int column = 0;
    for (const char *at = text; *at;) {
        int n = (int)strcspn(at, " ");
        if (column && column + 1 + n > HELP_WIDTH) {
            (void)ern_buf_text(out, "\n");
            column = 0;
        }
        if (!column)
            (void)ern_buf_print(out, "%*s", column = HELP_INDENT, "");
        else
            (void)ern_buf_text(out, " "), column++;
        (void)ern_buf_add(out, at, (size_t)n);
        column += n;
        at += n;
        while (*at == ' ') at++;
    }
    (void)ern_buf_text(out, "\n");
}

static bool holds(const char *text, const char *word) {
    if (!text) return false;
    size_t n = strlen(word);
    for (; *text; text++) {
        size_t i = 0;
        while (
            i < n && text[i] &&
            (tolower((unsigned char)text[i]) == tolower((unsigned char)word[i]) || (text[i] == '-' && word[i] == '_')))
            i++;
        if (i == n) return true;
    }
    return false;
}

static bool wanted(const option *p, unsigned cmd, const char *group, const char *keyword) {
    if (p->state == OPTION_OUTSIDE || !(p->command & cmd) || strcmp(p->group, group) != 0) return false;
    return !keyword || !*keyword || holds(p->group, keyword) || holds(p->name, keyword) || holds(p->env, keyword) ||
           holds(p->help, keyword);
}

int option_help_print(ern_buf *out, unsigned cmd, const char *keyword, char **envp) {
    int shown = 0;
    bool only_groups = keyword && strcmp(keyword, "listgroup") == 0;
    if (keyword && (strcmp(keyword, "all") == 0 || strcmp(keyword, "page") == 0)) keyword = NULL;
    ern_buf facts;
    ern_buf_init(&facts, 4096);
    for (const char *const *g = option_groups; *g; g++) {
        int in_group = 0;
        for (int i = 0; i < option_count; i++) {
            const option *p = &option_table[i];
            if (!wanted(p, cmd, *g, only_groups ? NULL : keyword)) continue;
            if (in_group++ == 0 && !only_groups) (void)ern_buf_print(out, "\n%s\n", *g);
            shown++;
            if (only_groups) continue;
            (void)ern_buf_text(out, "  ");
            print_spelling(out, p);
            (void)ern_buf_text(out, "\n");
            ern_buf_clear(&facts);
            print_facts(&facts, p, envp);
            print_wrapped(out, facts.data);
        }
        if (only_groups && in_group) (void)ern_buf_print(out, "%-20s %d options\n", *g, in_group);
    }
    ern_buf_free(&facts);
    return shown;
}

/* ---- man page -------------------------------------------------------------------------------------------------- */

/* troff wants backslashes and minus signs escaped, and no line to begin with a dot or an apostrophe. */
static void print_troff(ern_buf *out, const char *text) {
    bool begin = true;
    for (; *text; text++) {
        if (begin && (*text == '.' || *text == '\'')) (void)ern_buf_text(out, "\\&");
        begin = *text == '\n';
        if (*text == '\\')
            (void)ern_buf_text(out, "\\e");
        else if (*text == '-')
            (void)ern_buf_text(out, "\\-");
        else
            (void)ern_buf_add(out, text, 1);
    }
}

void option_man_print(ern_buf *out) {
    ern_buf words;
    ern_buf_init(&words, 4096);
    (void)ern_buf_text(out, ".TH ERNEST 1 \"\" \"ernest " ERN_VERSION "\" \"User Commands\"\n"
                            ".SH NAME\nernest \\- serve ERNIE\\-4.5 language models\n"
                            ".SH SYNOPSIS\n.B ernest\nCOMMAND [FLAGS]\n.SH COMMANDS\n");
    for (const command *c = command_table; c->name; c++) {
        ern_buf_clear(&words);
        (void)ern_buf_print(&words, "%s %s", c->name, c->usage);
        (void)ern_buf_text(out, ".TP\n.B ");
        print_troff(out, words.data);
        (void)ern_buf_text(out, "\n");
        print_troff(out, c->help);
        (void)ern_buf_text(out, ".\n");
    }
    for (const char *const *g = option_groups; *g; g++) {
        (void)ern_buf_print(out, ".SH FLAGS: %s\n", *g);
        for (int i = 0; i < option_count; i++) {
            if (!wanted(&option_table[i], ~0u, *g, NULL)) continue;
            ern_buf_clear(&words);
            print_spelling(&words, &option_table[i]);
            (void)ern_buf_text(out, ".TP\n.B ");
            print_troff(out, words.data);
            ern_buf_clear(&words);
            print_facts(&words, &option_table[i], NULL);
            (void)ern_buf_text(out, "\n");
            print_troff(out, words.data);
            (void)ern_buf_text(out, "\n");
        }
    }
    (void)ern_buf_text(
        out, ".SH EXIT STATUS\n0: good. 1: failed while running. 2: wrong usage or file. 3: memory or device.\n"
             ".SH SIGNALS\nSIGTERM and SIGINT let running requests finish; a second one stops at once.\n");
    ern_buf_free(&words);
}

/* ---- bash completion ------------------------------------------------------------------------------------------- */

static void print_choices_case(ern_buf *out) {
    for (int i = 0; i < option_count; i++) {
        const option *p = &option_table[i];
        if (p->type != OPTION_ENUM || !p->name) continue;
        (void)ern_buf_print(out, "        --%s) COMPREPLY=($(compgen -W '", p->name);
        for (const char *at = p->choices; *at; at++) (void)ern_buf_add(out, *at == '|' ? " " : at, 1);
        (void)ern_buf_text(out, "' -- \"$cur\")); return ;;\n");
    }
}

void option_completion_print(ern_buf *out) {
    (void)ern_buf_text(out, "# bash completion of ernest, made by: ernest docs completion\n"
                            "_ernest() {\n"
                            "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} flags=\n"
                            "    if [ \"$COMP_CWORD\" -eq 1 ]; then\n        COMPREPLY=($(compgen -W '");
    for (const command *c = command_table; c->name; c++)
        (void)ern_buf_print(out, "%s%s", c == command_table ? "" : " ", c->name);
    (void)ern_buf_text(out,
                       "' -- \"$cur\")); return\n    fi\n    case $prev in\n        bench) COMPREPLY=($(compgen -W '");
    for (const command *c = bench_table; c->name; c++)
        (void)ern_buf_print(out, "%s%s", c == bench_table ? "" : " ", strchr(c->name, ' ') + 1);
    (void)ern_buf_text(out, "' -- \"$cur\")); return ;;\n");
    print_choices_case(out);
    (void)ern_buf_text(out,
                       "    esac\n    case ${COMP_WORDS[1]} in\n"
                       "        docs) COMPREPLY=($(compgen -W 'api flags man completion' -- \"$cur\")); return ;;\n"
                       "        help) COMPREPLY=($(compgen -W '");
    for (const command *c = command_table; c->name; c++) (void)ern_buf_print(out, "%s ", c->name);
    (void)ern_buf_text(out, "' -- \"$cur\")); return ;;\n");
    for (const command *c = command_table; c->name; c++) {
        if (!c->options) continue;
        (void)ern_buf_print(out, "        %s%s%s) flags='", c->name, c->alias ? "|" : "", c->alias ? c->alias : "");
        for (int i = 0; i < option_count; i++) {
            const option *p = &option_table[i];
            if (p->name && p->state != OPTION_OUTSIDE && (p->command & c->options))
                (void)ern_buf_print(out, "--%s ", p->name);
        }
        (void)ern_buf_text(out, "--help' ;;\n");
    }
    (void)ern_buf_text(out, "    esac\n"
                            "    case $cur in\n        -*) COMPREPLY=($(compgen -W \"$flags\" -- \"$cur\")) ;;\n"
                            "        *) COMPREPLY=($(compgen -f -- \"$cur\")) ;;\n    esac\n}\n"
                            "complete -o filenames -F _ernest ernest\n");
}

/* ---- reference page -------------------------------------------------------------------------------------------- */

static void print_cell(ern_buf *out, const char *text) {
    for (; *text; text++) {
        if (*text == '|') (void)ern_buf_text(out, "\\");
        (void)ern_buf_add(out, text, 1);
    }
}

/* "some values: default, default_v1" */
static void print_state(ern_buf *out, const option *p) {
    static const char *const state[] = {"built", "accepted, changes nothing", "refused until built", ""};
    if (p->state != OPTION_PENDING || !p->fine) {
        (void)ern_buf_text(out, state[p->state]);
        return;
    }
    if (p->type == OPTION_FLAG) {
        (void)ern_buf_text(out, p->fine[0] == '1' ? "some values: on" : "some values: off");
        return;
    }
    (void)ern_buf_text(out, "some values: ");
    for (const char *c = p->fine; *c; c++) (void)ern_buf_add(out, *c == '|' ? ", " : c, *c == '|' ? 2 : 1);
}

void option_reference_print(ern_buf *out) {
    ern_buf words;
    ern_buf_init(&words, 4096);
    (void)ern_buf_text(out,
                       "# Flags and variables\n\nMade by `ernest docs flags` from the option table; do not edit.\n");
    for (const char *const *g = option_groups; *g; g++) {
        (void)ern_buf_print(out, "\n## %s\n\n| flag or variable | state | meaning |\n|---|---|---|\n", *g);
        for (int i = 0; i < option_count; i++) {
            const option *p = &option_table[i];
            if (!wanted(p, ~0u, *g, NULL)) continue;
            (void)ern_buf_text(out, "| `");
            ern_buf_clear(&words);
            print_spelling(&words, p);
            print_cell(out, words.data);
            (void)ern_buf_text(out, "` | ");
            print_state(out, p);
            (void)ern_buf_text(out, " | ");
            ern_buf_clear(&words);
            print_facts(&words, p, NULL);
            print_cell(out, words.data);
            (void)ern_buf_text(out, " |\n");
        }
    }
    ern_buf_free(&words);
}

/* ---- the options in force -------------------------------------------------------------------------------------- */

static void print_value(ern_jsonw *w, const option *p, const char *text) {
    if (p->type == OPTION_FLAG)
        ern_jsonw_bool(w, text[0] == '1');
    else if (p->type == OPTION_INT)
        ern_jsonw_int(w, strtoll(text, NULL, 10));
    else if (p->type == OPTION_REAL)
        ern_jsonw_real(w, strtod(text, NULL));
    else if (p->type == OPTION_JSON)
        ern_jsonw_raw(w, text, strlen(text));
    else
        ern_jsonw_text(w, text);
}

static void print_values(const options *o, int i, ern_jsonw *w) {
    const option *p = &option_table[i];
    const option_value *v = &o->value[i];
    if (is_secret(p)) {
        ern_jsonw_int(w, v->n);
    } else if (p->repeat) {
        ern_jsonw_array(w);
        for (int k = 0; k < v->n; k++) print_value(w, p, v->text[k]);
        ern_jsonw_array_end(w);
    } else {
        print_value(w, p, v->n ? v->text[v->n - 1] : p->fallback);
    }
}

/* In force: known here, and given or with a default. */
static bool in_force(const options *o, int i) {
    const option *p = &option_table[i];
    return (p->command & o->command) && p->state != OPTION_OUTSIDE && (o->value[i].n || p->fallback);
}

void options_print_yaml(const options *o, ern_buf *out) {
    static const char *const source[] = {"default", "environment", "file", "command line"};
    for (int i = 0; i < option_count; i++) {
        const option *p = &option_table[i];
        if (!in_force(o, i)) continue;
        bool comment = !p->name || o->value[i].source == SOURCE_DEFAULT || is_secret(p) ||
                       strcmp(p->name, "config") == 0 || strcmp(p->name, "print-config") == 0;
        ern_jsonw w;
        ern_jsonw_init(&w, out);
        (void)ern_buf_print(out, "%s%s: ", comment ? "# " : "", p->name ? p->name : p->env);
        print_values(o, i, &w);
        (void)ern_buf_print(out, "  # %s\n", source[o->value[i].source]);
    }
}

void options_print_json(const options *o, ern_buf *out) {
    ern_jsonw w;
    ern_jsonw_init(&w, out);
    ern_jsonw_object(&w);
    for (int i = 0; i < option_count; i++) {
        const option *p = &option_table[i];
        if (!in_force(o, i)) continue;
        char key[128];
        (void)snprintf(key, sizeof key, "%s", p->name ? p->name : p->env);
        for (char *c = key; p->name && *c; c++)
            if (*c == '-') *c = '_';
        ern_jsonw_key(&w, key);
        print_values(o, i, &w);
    }
    ern_jsonw_object_end(&w);
}
