/* Ids to text, at once and as a stream. See text.h.
 *
 * Both go through the same step, so that a stream's pieces join to the whole by construction. Invalid UTF-8 is replaced
 * as Python and the Unicode standard (3.9, "maximal subpart") do it: one U+FFFD for each longest run of bytes that
 * begins some character but is not one, or for a single byte that begins none. */
#include <string.h>

#include "base/utf8.h"
#include "text/tokenizer.h"

static const char replacement[] = "\xef\xbf\xbd";

/* Bytes at s (len >= 1, no whole character there) that one U+FFFD stands for. */
static size_t bad_len(const char *s, size_t len) {
    size_t n = 1;
    while (n < 3 && n < len && ern_utf8_is_prefix(s, n + 1)) n++;
    return n;
}

/* Move the whole characters of held + s to out, keep the beginning of one. */
static void feed_bytes(ern_decode *d, const char *s, size_t len, ern_buf *out) {
    size_t i = 0;
    /* Finish the held character first: at most 3 bytes are held, so 4 of the new ones settle it. */
    while (d->n_held && i < len) {
        char both[8];
        size_t n_old = (size_t)d->n_held, n_new = len - i < 4 ? len - i : 4;
        memcpy(both, d->held, n_old);
        memcpy(both + n_old, s + i, n_new);
        size_t n = ern_utf8_len(both, n_old + n_new);
        if (n) {
            ern_buf_add(out, both, n);
        } else if (ern_utf8_is_prefix(both, n_old + n_new)) {
            memcpy(d->held, both, n_old + n_new);
            d->n_held = (int)(n_old + n_new);
            return;
        } else {
            n = bad_len(both, n_old + n_new);
            ern_buf_text(out, replacement);
        }
        ERN_ASSERT(n >= n_old); /* held bytes begin one character: they are settled together */
        i += n - n_old;
        d->n_held = 0;
    }
    size_t from = i;
    while (i < len) {
        size_t n = ern_utf8_len(s + i, len - i);
        if (n) {
            i += n;
            continue;
        }
        ern_buf_add(out, s + from, i - from);
        if (ern_utf8_is_prefix(s + i, len - i)) {
            d->n_held = (int)(len - i);
            memcpy(d->held, s + i, len - i);
            return;
        }
        ern_buf_text(out, replacement);
        i += bad_len(s + i, len - i);
        from = i;
    }
    ern_buf_add(out, s + from, len - from);
}

void ern_decode_token(ern_decode *d, const ern_tokenizer *t, int32_t id, bool skip_special, ern_buf *out) {
    if (skip_special && ern_tokenizer_is_special(t, id)) return;
    size_t len;
    const char *s = ern_tokenizer_bytes(t, id, &len);
    feed_bytes(d, s, len, out);
}

void ern_decode_flush(ern_decode *d, ern_buf *out) {
    if (d->n_held) ern_buf_text(out, replacement);
    d->n_held = 0;
}

ern_status ern_tokenizer_decode(const ern_tokenizer *t, const int32_t *id, size_t n, bool skip_special, ern_buf *out,
                                ern_err *err) {
    ern_decode d = {0};
    for (size_t i = 0; i < n; i++)
        if (id[i] < 0 || id[i] >= t->table.n)
            return ERN_FAIL(err, ERN_ERR_INPUT, "token id %d is out of range; this tokenizer has ids 0 to %d", id[i],
                            t->table.n - 1);
    for (size_t i = 0; i < n; i++) ern_decode_token(&d, t, id[i], skip_special, out);
    ern_decode_flush(&d, out);
    return ERN_OK;
}
