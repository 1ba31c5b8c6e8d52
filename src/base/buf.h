/* A growing byte buffer with a hard limit: text on its way out, a request body on its way in.
 *
 * Appending never fails loudly in the middle: once an append would pass the limit (or malloc fails) `full` is set,
 * nothing more is written, and the caller looks once at the end.
 * Owner: the struct's owner frees with ern_buf_free. One thread at a time. */
#ifndef ERN_BASE_BUF_H
#define ERN_BASE_BUF_H

#include <stdbool.h>
#include <stddef.h>

typedef struct ern_buf {
    char *data; /* len bytes, then a NUL that is not counted; NULL while nothing was written */
    size_t len, cap, limit;
    bool full; /* an append was refused; what was written before stays */
} ern_buf;

/* Start empty with a limit in bytes. */
void ern_buf_init(ern_buf *b, size_t limit);
/* Append len bytes; false when refused (then b->full is set). */
bool ern_buf_add(ern_buf *b, const void *data, size_t len);
/* Append a C string. */
bool ern_buf_text(ern_buf *b, const char *text);
/* Append printf-style. */
bool ern_buf_print(ern_buf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Drop the first n bytes (n <= len). */
void ern_buf_drop(ern_buf *b, size_t n);
/* Forget the content, keep the memory, clear `full`. */
void ern_buf_clear(ern_buf *b);
void ern_buf_free(ern_buf *b);

#endif
