/* A growing byte buffer with a hard limit. See buf.h. */
#include "base/buf.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"

void ern_buf_init(ern_buf *b, size_t limit) { *b = (ern_buf){.limit = limit}; }

/* Room for n more bytes and the NUL. */
static bool reserve(ern_buf *b, size_t n) {
    if (b->full) return false;
    if (n > b->limit || b->len > b->limit - n) {
        b->full = true;
        return false;
    }
    if (b->len + n + 1 <= b->cap) return true;
    size_t cap = b->cap ? b->cap : 256;
    while (cap < b->len + n + 1) cap *= 2;
    char *data = realloc(b->data, cap);
    if (!data) {
        b->full = true;
        return false;
    }
    b->data = data;
    b->cap = cap;
    return true;
}

bool ern_buf_add(ern_buf *b, const void *data, size_t len) {
    if (!reserve(b, len)) return false;
    if (len) memcpy(b->data + b->len, data, len);
    b->len += len;
    b->data[b->len] = 0;
    return true;
}

bool ern_buf_text(ern_buf *b, const char *text) { return ern_buf_add(b, text, strlen(text)); }

bool ern_buf_print(ern_buf *b, const char *fmt, ...) {
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    bool ok = n >= 0 && reserve(b, (size_t)n);
    if (ok) {
        (void)vsnprintf(b->data + b->len, (size_t)n + 1, fmt, again);
        b->len += (size_t)n;
    }
    va_end(again);
    return ok;
}

void ern_buf_drop(ern_buf *b, size_t n) {
    ERN_ASSERT(n <= b->len);
    if (n == 0) return;
    memmove(b->data, b->data + n, b->len - n);
    b->len -= n;
    b->data[b->len] = 0;
}

void ern_buf_clear(ern_buf *b) {
    b->len = 0;
    b->full = false;
    if (b->data) b->data[0] = 0;
}

void ern_buf_free(ern_buf *b) {
    free(b->data);
    *b = (ern_buf){.limit = b->limit};
}
