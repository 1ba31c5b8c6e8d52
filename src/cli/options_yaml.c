/* The --config file: YAML whose keys are flag names. Scalars become the flag's text; a list repeats the flag; for JSON
 * flags a map or list becomes JSON. Read event by event with libyaml, bounded in size and depth, aliases refused (a few
 * bytes of them can describe gigabytes). */
#include "cli/options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

#include "base/jsonw.h"
#include "base/os.h"

enum { FILE_LIMIT = 1 << 20, DEPTH_MAX = 8 };

typedef struct reader {
    options *o;
    yaml_parser_t parser;
    yaml_event_t event;
    const char *path;
    bool seen[OPTIONS_MAX];
} reader;

#define FAIL_AT(r, err, ...) fail_at((r), (err), __VA_ARGS__)
static ern_status fail_at(const reader *r, ern_err *err, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static ern_status fail_at(const reader *r, ern_err *err, const char *fmt, ...) {
    char text[320];
    va_list ap;
    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    return ERN_FAIL(err, ERN_ERR_USAGE, "--config %.100s line %zu: %s", r->path, r->event.start_mark.line + 1, text);
}

/* Step to the next event; what it held before is freed. */
static ern_status next(reader *r, ern_err *err) {
    yaml_event_delete(&r->event);
    if (!yaml_parser_parse(&r->parser, &r->event))
        return ERN_FAIL(err, ERN_ERR_USAGE, "--config %.100s line %zu: not YAML: %s", r->path,
                        r->parser.problem_mark.line + 1, r->parser.problem ? r->parser.problem : "unreadable");
    if (r->event.type == YAML_ALIAS_EVENT) return FAIL_AT(r, err, "aliases (*name) are not read; write the value out");
    return ERN_OK;
}

static const char *scalar_text(const reader *r) { return (const char *)r->event.data.scalar.value; }

/* YAML's ways to say nothing: no value at all, ~ and null. */
static bool is_null(const reader *r) {
    const char *text = scalar_text(r);
    return r->event.data.scalar.style == YAML_PLAIN_SCALAR_STYLE &&
           (!*text || strcmp(text, "~") == 0 || strcmp(text, "null") == 0);
}

/* A plain scalar that JSON would not quote: a number, true, false or null. */
static bool is_bare(const reader *r, ern_jsonw *w) {
    if (r->event.data.scalar.style != YAML_PLAIN_SCALAR_STYLE) return false;
    const char *text = scalar_text(r);
    if (strcmp(text, "true") == 0 || strcmp(text, "false") == 0) return ern_jsonw_bool(w, text[0] == 't'), true;
    if (is_null(r)) return ern_jsonw_null(w), true;
    if (text[strspn(text, "+-.0123456789eE")]) return false;
    char *end = NULL;
    long long i = strtoll(text, &end, 10);
    if (!*end) return ern_jsonw_int(w, i), true;
    double d = strtod(text, &end);
    if (!*end) return ern_jsonw_real(w, d), true;
    return false;
}

/* The node that begins with the current event, as JSON. A stack in place of recursion: bit d of `maps` says that depth
 * d is a map, bit d of `keyed` that its next scalar is a key. */
static ern_status node_to_json(reader *r, ern_buf *out, ern_err *err) {
    ern_jsonw w;
    ern_jsonw_init(&w, out);
    unsigned maps = 0, keyed = 0;
    int depth = 0;
    for (;;) {
        yaml_event_type_t t = r->event.type;
        unsigned bit = 1u << depth;
        bool is_key = depth > 0 && (maps & bit) && (keyed & bit);
        if (is_key && t != YAML_SCALAR_EVENT && t != YAML_MAPPING_END_EVENT)
            return FAIL_AT(r, err, "a key must be a word");
        if (t == YAML_SCALAR_EVENT && is_key) {
            ern_jsonw_key(&w, scalar_text(r));
            keyed &= ~bit;
        } else if (t == YAML_SCALAR_EVENT) {
            if (!is_bare(r, &w)) ern_jsonw_text_n(&w, scalar_text(r), r->event.data.scalar.length);
            keyed |= bit;
        } else if (t == YAML_MAPPING_START_EVENT || t == YAML_SEQUENCE_START_EVENT) {
            if (++depth > DEPTH_MAX) return FAIL_AT(r, err, "nested deeper than %d levels", DEPTH_MAX);
            bool map = t == YAML_MAPPING_START_EVENT;
            maps = map ? maps | 1u << depth : maps & ~(1u << depth);
            keyed |= 1u << depth;
            map ? ern_jsonw_object(&w) : ern_jsonw_array(&w);
        } else {
            t == YAML_MAPPING_END_EVENT ? ern_jsonw_object_end(&w) : ern_jsonw_array_end(&w);
            depth--;
            keyed |= 1u << depth;
        }
        if (depth == 0) return ERN_OK;
        ERN_TRY(next(r, err));
    }
}

/* A list of scalars for a flag that may be repeated. */
static ern_status read_list(reader *r, int index, const char *where, ern_err *err) {
    if (!option_table[index].repeat)
        return FAIL_AT(r, err, "--%s takes one value, not a list", option_table[index].name);
    for (;;) {
        ERN_TRY(next(r, err));
        if (r->event.type == YAML_SEQUENCE_END_EVENT) return ERN_OK;
        if (r->event.type != YAML_SCALAR_EVENT)
            return FAIL_AT(r, err, "--%s takes a list of plain values", option_table[index].name);
        ERN_TRY(options_set(r->o, index, scalar_text(r), SOURCE_FILE, where, err));
    }
}

/* The key is read; the next event begins its value. */
static ern_status read_entry(reader *r, int index, ern_err *err) {
    const option *p = &option_table[index];
    char where[256];
    (void)snprintf(where, sizeof where, "--%s (%.100s line %zu)", p->name, r->path, r->event.start_mark.line + 1);
    ERN_TRY(next(r, err));
    yaml_event_type_t t = r->event.type;
    if (t == YAML_SCALAR_EVENT) {
        if (is_null(r)) return FAIL_AT(r, err, "--%s has no value; give one or delete the line", p->name);
        return options_set(r->o, index, scalar_text(r), SOURCE_FILE, where, err);
    }
    if (t == YAML_SEQUENCE_START_EVENT && p->type != OPTION_JSON) return read_list(r, index, where, err);
    if (p->type != OPTION_JSON && strcmp(p->name, "quantization") != 0)
        return FAIL_AT(r, err, "--%s takes a plain value, not a map", p->name);
    ern_buf json;
    ern_buf_init(&json, FILE_LIMIT);
    ern_status s = node_to_json(r, &json, err);
    if (s == ERN_OK && json.full) s = FAIL_AT(r, err, "--%s is too long", p->name);
    if (s == ERN_OK) s = options_set(r->o, index, json.data, SOURCE_FILE, where, err);
    ern_buf_free(&json);
    return s;
}

static ern_status read_document(reader *r, ern_err *err) {
    ERN_TRY(next(r, err)); /* stream start */
    ERN_TRY(next(r, err));
    if (r->event.type == YAML_STREAM_END_EVENT) return ERN_OK;
    ERN_TRY(next(r, err));
    if (r->event.type != YAML_MAPPING_START_EVENT)
        return FAIL_AT(r, err, "the file must be a map of flags, for example 'port: 8000'");
    for (;;) {
        ERN_TRY(next(r, err));
        if (r->event.type == YAML_MAPPING_END_EVENT) break;
        if (r->event.type != YAML_SCALAR_EVENT) return FAIL_AT(r, err, "a key must be a flag's name");
        const char *key = scalar_text(r);
        while (*key == '-') key++;
        int index = option_find(key, strlen(key), r->o->command);
        if (index < 0) {
            const char *near = option_nearest(key, r->o->command);
            return FAIL_AT(r, err, "'%.60s' is no flag%s%s%s", key, near ? "; did you mean " : "", near ? near : "",
                           near ? "?" : "");
        }
        if (strcmp(option_table[index].name, "config") == 0)
            return FAIL_AT(r, err, "a config file cannot name another");
        if (r->seen[index]) return FAIL_AT(r, err, "'%s' is there twice; keep one", option_table[index].name);
        r->seen[index] = true;
        ERN_TRY(read_entry(r, index, err));
    }
    ERN_TRY(next(r, err)); /* document end */
    ERN_TRY(next(r, err));
    if (r->event.type != YAML_STREAM_END_EVENT) return FAIL_AT(r, err, "the file holds more than one YAML document");
    return ERN_OK;
}

ern_status options_read_yaml(options *o, const char *path, ern_err *err) {
    char *text = NULL;
    size_t len = 0;
    ern_err why;
    if (ern_file_read(&text, &len, path, FILE_LIMIT, &why) != ERN_OK)
        return ERN_FAIL(err, ERN_ERR_FILE, "--config: %s", why.text);
    reader r = {.o = o, .path = path};
    ern_status s = ERN_OK;
    if (!yaml_parser_initialize(&r.parser)) {
        s = ERN_FAIL(err, ERN_ERR_MEMORY, "--config %.100s: no memory to read it", path);
    } else {
        yaml_parser_set_input_string(&r.parser, (const unsigned char *)text, len);
        s = read_document(&r, err);
        yaml_event_delete(&r.event);
        yaml_parser_delete(&r.parser);
    }
    free(text);
    return s;
}
