/* Writing JSON: our own writer, straight into a buffer, because every streamed token passes here.
 * Output is compact UTF-8; strings are escaped by RFC 8259; reals print shortest round-trip as Python's json does.
 * Owner: the writer borrows its buffer. One thread at a time. */
#ifndef ERN_BASE_JSONW_H
#define ERN_BASE_JSONW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"

typedef struct ern_jsonw {
    ern_buf *out;
    uint64_t has_item; /* bit d: the container at depth d has an item already, so a comma comes first */
    int depth;         /* 0..63 */
    bool after_key;
} ern_jsonw;

void ern_jsonw_init(ern_jsonw *w, ern_buf *out);
void ern_jsonw_object(ern_jsonw *w);     /* { */
void ern_jsonw_object_end(ern_jsonw *w); /* } */
void ern_jsonw_array(ern_jsonw *w);      /* [ */
void ern_jsonw_array_end(ern_jsonw *w);  /* ] */
void ern_jsonw_key(ern_jsonw *w, const char *key);
void ern_jsonw_text(ern_jsonw *w, const char *text); /* NULL writes null */
void ern_jsonw_text_n(ern_jsonw *w, const char *text, size_t len);
void ern_jsonw_int(ern_jsonw *w, int64_t v);
void ern_jsonw_real(ern_jsonw *w, double v); /* NaN and infinities write null */
void ern_jsonw_bool(ern_jsonw *w, bool v);
void ern_jsonw_null(ern_jsonw *w);
/* Already-formed JSON. */
void ern_jsonw_raw(ern_jsonw *w, const char *json, size_t len);

/* The escaped string with its quotes, appended to a buffer: for use outside a writer. Invalid UTF-8 becomes U+FFFD. */
void ern_json_quote(ern_buf *out, const char *text, size_t len);
/* The shortest text that reads back as v, in Python's spelling ("0.1", "1e-05", "1.0"); v must be finite. */
void ern_json_print_real(ern_buf *out, double v);

#endif
