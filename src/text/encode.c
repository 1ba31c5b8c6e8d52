/* Text to ids: ERNIE's rules on top of SentencePiece. See text.h.
 *
 * A text is cut at special names (when asked), then at places that no merge can reach across (pair_set.h) into parts of
 * about a thousand bytes, which the library encodes one by one. It merges through a heap, so a part of n bytes without
 * any such place still takes O(n log n). */
#include "base/utf8.h"
#include "text/tokenizer.h"

enum { PART_BYTES = 1024 };

static void take_ids(void *ud, const int *id, size_t n) {
    ern_tokens *out = ud;
    for (size_t i = 0; i < n && !out->full; i++) ern_tokens_add(out, id[i]);
}

/* The library's share: len bytes, n_char characters. */
static ern_status encode_part(const ern_tokenizer *t, const char *text, size_t len, size_t n_char, ern_tokens *out,
                              ern_err *err) {
    if (len == 0) return ERN_OK;
    /* No work for a text that cannot fit whatever it is. */
    if (out->full || n_char / t->longest > out->limit - out->n)
        out->full = true;
    else if (!sp_shim_encode(t->sp, text, len, take_ids, out))
        return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory to encode a text of %zu bytes", len);
    if (out->full) return ERN_FAIL(err, ERN_ERR_LIMIT, "the text has more than %zu tokens", out->limit);
    return ERN_OK;
}

/* Text in which nothing is special. */
static ern_status encode_plain(const ern_tokenizer *t, const char *text, size_t len, ern_tokens *out, ern_err *err) {
    size_t from = 0, n_char = 0;
    uint32_t before = 0;
    for (size_t i = 0, n; i < len; i += n, n_char++) {
        n = ern_utf8_len(text + i, len - i);
        uint32_t c = pair_char(text + i, n);
        if (i - from >= PART_BYTES && !pair_set_has(&t->pairs, before, c)) {
            ERN_TRY(encode_part(t, text + from, i - from, n_char, out, err));
            from = i;
            n_char = 0;
        }
        before = c;
    }
    return encode_part(t, text + from, len - from, n_char, out, err);
}

ern_status ern_tokenizer_encode(const ern_tokenizer *t, const char *text, size_t len, bool parse_special,
                                ern_tokens *out, ern_err *err) {
    size_t from = 0, i = 0;
    if (!ern_utf8_valid(text, len)) return ERN_FAIL(err, ERN_ERR_INPUT, "the text is not valid UTF-8");
    while (parse_special && i < len) {
        int32_t id = token_table_match(&t->table, text + i, len - i);
        if (id < 0) {
            i++;
            continue;
        }
        ERN_TRY(encode_plain(t, text + from, i - from, out, err));
        if (!ern_tokens_add(out, id))
            return ERN_FAIL(err, ERN_ERR_LIMIT, "the text has more than %zu tokens", out->limit);
        i += t->table.token[id].n_name;
        from = i;
    }
    return encode_plain(t, text + from, len - from, out, err);
}
