/* The JSON files beside a SentencePiece file. See token_files.h. */
#include "text/token_files.h"

#include <stdlib.h>
#include <string.h>

#include "base/jsonr.h"
#include "base/os.h"
#include "text/token_table.h"

enum { FILE_MAX = 16 << 20, JSON_DEPTH = 16 };

typedef struct facts {
    token_fact_fn *fn;
    void *ud;
    const char *what; /* path of the file being read */
} facts;

/* A token's text: a string, or an object with the string "content". NULL: neither. */
static json_t *content_of(json_t *v) {
    if (json_is_object(v)) v = json_object_get(v, "content");
    return json_is_string(v) ? v : NULL;
}

static ern_status tell(const facts *f, json_int_t id, json_t *text, bool special, ern_err *err) {
    size_t len = json_string_length(text);
    const char *name = json_string_value(text);
    if (len == 0 || len > TOKEN_NAME_MAX || memchr(name, 0, len))
        return ERN_FAIL(err, ERN_ERR_FILE, "%s: a token's text is %zu bytes long; expected 1 to %d without NUL",
                        f->what, len, TOKEN_NAME_MAX);
    if (id < -1 || id >= TOKEN_IDS_MAX)
        return ERN_FAIL(err, ERN_ERR_FILE, "%s: token \"%s\" has the id %lld; expected 0 to %d", f->what, name,
                        (long long)id, TOKEN_IDS_MAX - 1);
    const token_fact fact = {.what = f->what, .name = name, .len = len, .id = (int32_t)id, .special = special};
    return f->fn(f->ud, &fact, err);
}

/* added_tokens.json: {"name": id}. */
static ern_status read_added(const facts *f, json_t *root, ern_err *err) {
    const char *name;
    json_t *v;
    json_object_foreach(root, name, v) {
        if (!json_is_integer(v) || json_integer_value(v) < 0)
            return ERN_FAIL(err, ERN_ERR_FILE, "%s: the id of \"%s\" is not a number from 0 on", f->what, name);
        json_t *text = json_string(name);
        if (!text) return ERN_FAIL(err, ERN_ERR_MEMORY, "%s: no memory", f->what);
        ern_status s = tell(f, json_integer_value(v), text, true, err);
        json_decref(text);
        ERN_TRY(s);
    }
    return ERN_OK;
}

/* added_tokens_decoder: {"id": {"content": name, "special": bool, ...}}. */
static ern_status read_decoder(const facts *f, json_t *map, ern_err *err) {
    const char *key;
    json_t *v;
    json_object_foreach(map, key, v) {
        char *end;
        long long id = strtoll(key, &end, 10);
        if (*key < '0' || *key > '9' || *end || !content_of(v))
            return ERN_FAIL(err, ERN_ERR_FILE, "%s: entry \"%s\" of added_tokens_decoder is not an id with its content",
                            f->what, key);
        ERN_TRY(tell(f, id, content_of(v), !json_is_false(json_object_get(v, "special")), err));
    }
    return ERN_OK;
}

/* "<role>_token": text or {"content": text}; additional_special_tokens: a list of those. Other keys are skipped. */
static ern_status read_roles(const facts *f, json_t *root, ern_err *err) {
    const char *key;
    json_t *v, *item;
    size_t i;
    json_object_foreach(root, key, v) {
        size_t n = strlen(key);
        if (strcmp(key, "additional_special_tokens") == 0) {
            json_array_foreach(v, i, item) {
                if (content_of(item)) ERN_TRY(tell(f, -1, content_of(item), true, err));
            }
        } else if (n > 6 && strcmp(key + n - 6, "_token") == 0 && content_of(v)) {
            ERN_TRY(tell(f, -1, content_of(v), true, err));
        }
    }
    return ERN_OK;
}

static ern_status read_config(const facts *f, json_t *root, ern_err *err) {
    json_t *decoder = json_object_get(root, "added_tokens_decoder");
    if (decoder) ERN_TRY(read_decoder(f, decoder, err));
    return read_roles(f, root, err);
}

ern_status token_files_read(const char *dir, token_fact_fn *fn, void *ud, ern_err *err) {
    static const struct {
        const char *name;
        ern_status (*read)(const facts *f, json_t *root, ern_err *err);
    } file[] = {{"added_tokens.json", read_added},
                {"tokenizer_config.json", read_config},
                {"special_tokens_map.json", read_roles}};
    for (size_t i = 0; i < sizeof file / sizeof file[0]; i++) {
        char path[4096];
        json_t *root;
        ERN_TRY(ern_path_join(path, sizeof path, dir, file[i].name, err));
        if (!ern_file_exists(path)) continue;
        ERN_TRY(ern_json_parse_file(&root, path, FILE_MAX, JSON_DEPTH, err));
        const facts f = {.fn = fn, .ud = ud, .what = path};
        ern_status s = json_is_object(root) ? file[i].read(&f, root, err)
                                            : ERN_FAIL(err, ERN_ERR_FILE, "%s: is not a JSON object", path);
        json_decref(root);
        ERN_TRY(s);
    }
    return ERN_OK;
}
