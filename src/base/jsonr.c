/* Reading JSON. See jsonr.h. */
#include "base/jsonr.h"

#include <stdbool.h>
#include <stdlib.h>

#include "base/os.h"

/* Jansson recurses per level, so depth is counted in one flat pass first. */
static bool depth_ok(const char *text, size_t len, int max_depth) {
    int depth = 0;
    bool in_text = false;
    for (size_t i = 0; i < len; i++) {
        char c = text[i];
        if (in_text) {
            if (c == '\\') i++;
            if (c == '"') in_text = false;
            continue;
        }
        if (c == '"') in_text = true;
        if ((c == '{' || c == '[') && ++depth > max_depth) return false;
        if (c == '}' || c == ']') depth--;
    }
    return true;
}

ern_status ern_json_parse(json_t **out, const char *text, size_t len, int max_depth, const char *what, ern_err *err) {
    *out = NULL;
    if (!depth_ok(text, len, max_depth))
        return ERN_FAIL(err, ERN_ERR_INPUT, "%s: JSON is nested deeper than %d levels", what, max_depth);
    json_error_t e;
    *out = json_loadb(text, len, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL | JSON_DECODE_ANY, &e);
    if (!*out)
        return ERN_FAIL(err, ERN_ERR_INPUT, "%s: not valid JSON at line %d column %d: %s", what, e.line, e.column,
                        e.text);
    return ERN_OK;
}

ern_status ern_json_parse_file(json_t **out, const char *path, size_t limit_bytes, int max_depth, ern_err *err) {
    *out = NULL;
    char *text;
    size_t len;
    ERN_TRY(ern_file_read(&text, &len, path, limit_bytes, err));
    ern_status s = ern_json_parse(out, text, len, max_depth, path, err);
    free(text);
    if (s == ERN_ERR_INPUT && err) err->code = ERN_ERR_FILE;
    return s == ERN_ERR_INPUT ? ERN_ERR_FILE : s;
}
