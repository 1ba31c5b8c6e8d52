/* Writing JSON. See jsonw.h. */
#include "base/jsonw.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "base/utf8.h"

void ern_jsonw_init(ern_jsonw *w, ern_buf *out) { *w = (ern_jsonw){.out = out}; }

/* The comma, if one is due, before a value or a key. */
static void lead(ern_jsonw *w) {
    if (w->after_key) {
        w->after_key = false;
        return;
    }
    if (w->has_item >> w->depth & 1) ern_buf_add(w->out, ",", 1);
    w->has_item |= 1ull << w->depth;
}

static void open_with(ern_jsonw *w, const char *c) {
    lead(w);
    ern_buf_add(w->out, c, 1);
    ERN_ASSERT(w->depth < 63);
    w->depth++;
    w->has_item &= ~(1ull << w->depth);
}

static void close_with(ern_jsonw *w, const char *c) {
    ERN_ASSERT(w->depth > 0 && !w->after_key);
    w->depth--;
    ern_buf_add(w->out, c, 1);
}

void ern_jsonw_object(ern_jsonw *w) { open_with(w, "{"); }
void ern_jsonw_object_end(ern_jsonw *w) { close_with(w, "}"); }
void ern_jsonw_array(ern_jsonw *w) { open_with(w, "["); }
void ern_jsonw_array_end(ern_jsonw *w) { close_with(w, "]"); }

void ern_jsonw_key(ern_jsonw *w, const char *key) {
    lead(w);
    ern_json_quote(w->out, key, strlen(key));
    ern_buf_add(w->out, ":", 1);
    w->after_key = true;
}

void ern_jsonw_text(ern_jsonw *w, const char *text) {
    if (!text)
        ern_jsonw_null(w);
    else
        ern_jsonw_text_n(w, text, strlen(text));
}

void ern_jsonw_text_n(ern_jsonw *w, const char *text, size_t len) {
    lead(w);
    ern_json_quote(w->out, text, len);
}

void ern_jsonw_int(ern_jsonw *w, int64_t v) {
    lead(w);
    ern_buf_print(w->out, "%lld", (long long)v);
}

void ern_jsonw_real(ern_jsonw *w, double v) {
    if (!isfinite(v)) {
        ern_jsonw_null(w);
        return;
    }
    lead(w);
    ern_json_print_real(w->out, v);
}

void ern_jsonw_bool(ern_jsonw *w, bool v) {
    lead(w);
    ern_buf_text(w->out, v ? "true" : "false");
}

void ern_jsonw_null(ern_jsonw *w) {
    lead(w);
    ern_buf_text(w->out, "null");
}

void ern_jsonw_raw(ern_jsonw *w, const char *json, size_t len) {
    lead(w);
    ern_buf_add(w->out, json, len);
}

void ern_json_quote(ern_buf *out, const char *text, size_t len) {
    static const char hex[] = "0123456789abcdef";
    ern_buf_add(out, "\"", 1);
    size_t from = 0, i = 0;
    while (i < len) {
        unsigned char c = (unsigned char)text[i];
        if (c >= 0x20 && c != '"' && c != '\\' && c < 0x80) {
            i++;
            continue;
        }
        size_t n = c < 0x80 ? 0 : ern_utf8_len(text + i, len - i);
        if (n) {
            i += n;
            continue;
        }
        ern_buf_add(out, text + from, i - from);
        char esc[6] = {'\\', 'u', '0', '0', hex[c >> 4 & 15], hex[c & 15]};
        switch (c) {
        case '"': ern_buf_add(out, "\\\"", 2); break;
        case '\\': ern_buf_add(out, "\\\\", 2); break;
        case '\n': ern_buf_add(out, "\\n", 2); break;
        case '\r': ern_buf_add(out, "\\r", 2); break;
        case '\t': ern_buf_add(out, "\\t", 2); break;
        case '\b': ern_buf_add(out, "\\b", 2); break;
        case '\f': ern_buf_add(out, "\\f", 2); break;
        default:
            if (c < 0x20)
                ern_buf_add(out, esc, 6);
            else
                ern_buf_add(out, "\xef\xbf\xbd", 3);
        }
        from = ++i;
    }
    ern_buf_add(out, text + from, len - from);
    ern_buf_add(out, "\"", 1);
}

void ern_json_print_real(ern_buf *out, double v) {
    char digits[40];
    int precision = 1;
    for (; precision <= 17; precision++) {
        snprintf(digits, sizeof digits, "%.*e", precision - 1, v);
        if (strtod(digits, NULL) == v) break;
    }
    /* Python: exponent form below 1e-4 and from 1e16 on, plain otherwise, always with a point or an exponent. */
    char *e = strchr(digits, 'e');
    ERN_ASSERT(e != NULL);
    int exp10 = atoi(e + 1);
    if (v != 0 && (exp10 < -4 || exp10 >= 16)) {
        ern_buf_add(out, digits, (size_t)(e - digits));
        ern_buf_print(out, "e%c%02d", exp10 < 0 ? '-' : '+', abs(exp10));
        return;
    }
    int after = precision - 1 - exp10;
    ern_buf_print(out, "%.*f", after > 0 ? after : 1, v);
}
