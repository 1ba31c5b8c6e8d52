/* Which chat format a model speaks. See text.h; docs/model.md 6.
 *
 * Templates are never run: nothing executable comes from a model folder. Its template only tells which of our own
 * formats it is. */
#include <stdlib.h>
#include <string.h>

#include "base/jsonr.h"
#include "base/os.h"
#include "text/text.h"

enum { FILE_MAX = 16 << 20, JSON_DEPTH = 16 };

static const char *const format_name[] = {[ERN_CHAT_ERNIE] = "ernie", [ERN_CHAT_THINKING] = "ernie-thinking"};

const char *ern_chat_format_name(ern_chat_format f) { return format_name[f]; }
bool ern_chat_format_reasons(ern_chat_format f) { return f == ERN_CHAT_THINKING; }

const char *ern_chat_format_missing(const ern_tokenizer *t, ern_chat_format f) {
    static const char *const ernie[] = {"<|begin_of_sentence|>", "<|end_of_sentence|>", NULL};
    static const char *const thinking[] = {"<|im_start|>", "<|im_end|>", "<think>", NULL};
    const char *const *mark = f == ERN_CHAT_THINKING ? thinking : ernie;
    while (*mark && ern_tokenizer_id(t, *mark) >= 0) mark++;
    return *mark;
}

/* The thinking format's templates write <|im_start|>; the others know nothing of it. */
static ern_chat_format format_of_template(const char *text) {
    return strstr(text, "<|im_start|>") ? ERN_CHAT_THINKING : ERN_CHAT_ERNIE;
}

/* The template in a tokenizer_config.json: a string, or a list of {"name", "template"} of which we want "default". */
static const char *template_in(json_t *config) {
    json_t *v = json_object_get(config, "chat_template"), *item;
    size_t i;
    json_array_foreach(v, i, item) {
        const char *name = json_string_value(json_object_get(item, "name"));
        if (name && strcmp(name, "default") == 0) return json_string_value(json_object_get(item, "template"));
    }
    return json_string_value(v);
}

/* Look into the folder's chat_template.jinja, then its tokenizer_config.json. *found tells whether one was decisive. */
static ern_status look(ern_chat_format *out, bool *found, const char *dir, ern_err *err) {
    char path[4096];
    *found = false;
    ERN_TRY(ern_path_join(path, sizeof path, dir, "chat_template.jinja", err));
    if (ern_file_exists(path)) {
        char *text;
        size_t len;
        ERN_TRY(ern_file_read(&text, &len, path, FILE_MAX, err));
        *out = format_of_template(text);
        *found = true;
        free(text);
        return ERN_OK;
    }
    ERN_TRY(ern_path_join(path, sizeof path, dir, "tokenizer_config.json", err));
    if (!ern_file_exists(path)) return ERN_OK;
    json_t *config;
    ERN_TRY(ern_json_parse_file(&config, path, FILE_MAX, JSON_DEPTH, err));
    const char *text = template_in(config);
    const char *eos = json_string_value(json_object_get(config, "eos_token"));
    if (text)
        *out = format_of_template(text);
    else if (eos && strcmp(eos, "<|im_end|>") == 0)
        *out = ERN_CHAT_THINKING;
    *found = text || *out == ERN_CHAT_THINKING;
    json_decref(config);
    return ERN_OK;
}

ern_status ern_chat_format_pick(ern_chat_format *out, const ern_tokenizer *t, const char *model_dir, const char *name,
                                ern_err *err) {
    *out = ERN_CHAT_ERNIE;
    if (name) {
        for (size_t i = 0; i < sizeof format_name / sizeof format_name[0]; i++) {
            if (strcmp(name, format_name[i]) != 0) continue;
            *out = (ern_chat_format)i;
            return ERN_OK;
        }
        return ERN_FAIL(err, ERN_ERR_USAGE, "unknown chat format \"%s\"; known are %s and %s", name, format_name[0],
                        format_name[1]);
    }
    bool found = false;
    if (model_dir) ERN_TRY(look(out, &found, model_dir, err));
    /* No template: a vocabulary with the thinking format's frame and without the sentence marks can only speak that. */
    if (!found && t && ern_tokenizer_id(t, "<|im_start|>") >= 0 && ern_tokenizer_id(t, "<|begin_of_sentence|>") < 0)
        *out = ERN_CHAT_THINKING;
    return ERN_OK;
}

int ern_chat_stop_ids(const ern_tokenizer *t, ern_chat_format f, int32_t out[4]) {
    const char *name[] = {f == ERN_CHAT_ERNIE ? "<|end_of_sentence|>" : "<|im_end|>", "</s>"};
    int n = 0;
    for (size_t i = 0; i < sizeof name / sizeof name[0]; i++) {
        int32_t id = ern_tokenizer_id(t, name[i]);
        if (id >= 0) out[n++] = id;
    }
    return n;
}
