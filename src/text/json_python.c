/* JSON as Python's json.dumps(v, ensure_ascii=False) writes it: what a chat template's tojson puts into a prompt, so
 * that the tokens are FastDeploy's (api.md 2.2). An explicit stack instead of recursion. */
#include <jansson.h>
#include <string.h>

#include "base/jsonw.h"
#include "text/text.h"

enum { DEPTH_MAX = 512 }; /* ern_json_parse lets nothing deeper in */

/* A container half written. */
typedef struct frame {
    json_t *v;
    void *iter;   /* objects: the next entry */
    size_t index; /* arrays: the next element */
} frame;

/* A value that is no container, or the opening of one. */
static void write_value(const json_t *v, ern_buf *out) {
    switch (json_typeof(v)) {
    case JSON_OBJECT: ern_buf_text(out, "{"); break;
    case JSON_ARRAY: ern_buf_text(out, "["); break;
    case JSON_STRING: ern_json_quote(out, json_string_value(v), json_string_length(v)); break;
    case JSON_INTEGER: ern_buf_print(out, "%lld", (long long)json_integer_value(v)); break;
    case JSON_REAL: ern_json_print_real(out, json_real_value(v)); break;
    case JSON_TRUE: ern_buf_text(out, "true"); break;
    case JSON_FALSE: ern_buf_text(out, "false"); break;
    case JSON_NULL: ern_buf_text(out, "null"); break;
    }
}

/* The next value inside a container, its separator and key written; NULL: the container is closed. */
static json_t *next_value(frame *f, ern_buf *out) {
    json_t *v = NULL;
    if (json_is_object(f->v)) {
        if (f->iter) {
            const char *key = json_object_iter_key(f->iter);
            v = json_object_iter_value(f->iter);
            if (f->index++) ern_buf_text(out, ", ");
            ern_json_quote(out, key, strlen(key));
            ern_buf_text(out, ": ");
            f->iter = json_object_iter_next(f->v, f->iter);
        } else {
            ern_buf_text(out, "}");
        }
    } else {
        if (f->index < json_array_size(f->v)) {
            if (f->index) ern_buf_text(out, ", ");
            v = json_array_get(f->v, f->index++);
        } else {
            ern_buf_text(out, "]");
        }
    }
    return v;
}

void ern_json_dumps_python(const json_t *v, ern_buf *out) {
    frame stack[DEPTH_MAX + 1];
    int n = 0;
    /* jansson's iterators want a value that is not const, though they only read it. */
    json_t *at = (json_t *)(uintptr_t)v;
    for (;;) {
        write_value(at, out);
        if (json_is_object(at) || json_is_array(at)) {
            ERN_ASSERT(n <= DEPTH_MAX);
            stack[n++] = (frame){.v = at, .iter = json_is_object(at) ? json_object_iter(at) : NULL};
        }
        at = NULL;
        while (n && !(at = next_value(&stack[n - 1], out))) n--;
        if (!at) return;
    }
}
