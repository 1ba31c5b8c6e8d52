/* Any ids: the streamed pieces are valid UTF-8 and join to the whole. Any text: encoded and decoded it is itself. */
#include "base/utf8.h"
#include "fuzz_text.h"

static void ids_to_text(const ern_tokenizer *t, const uint8_t *data, size_t size) {
    const bool skip = fuzz_byte(&data, &size) & 1;
    const size_t n = size / 2;
    int32_t *id = malloc((n + 1) * sizeof *id);
    ern_buf stream, whole;
    ern_decode d = {0};
    ern_buf_init(&stream, 1 << 24);
    ern_buf_init(&whole, 1 << 24);
    ERN_ASSERT(id != NULL);
    for (size_t i = 0; i < n; i++) {
        id[i] = (data[2 * i] << 8 | data[2 * i + 1]) % ern_tokenizer_n_token(t);
        const size_t from = stream.len;
        ern_decode_token(&d, t, id[i], skip, &stream);
        ERN_ASSERT(stream.len == from || ern_utf8_valid(stream.data + from, stream.len - from));
    }
    ern_decode_flush(&d, &stream);
    ERN_ASSERT(ern_tokenizer_decode(t, id, n, skip, &whole, NULL) == ERN_OK);
    ERN_ASSERT(stream.len == whole.len && (whole.len == 0 || memcmp(stream.data, whole.data, whole.len) == 0));
    ern_buf_free(&stream);
    ern_buf_free(&whole);
    free(id);
}

static void text_to_ids(const ern_tokenizer *t, const uint8_t *data, size_t size) {
    const bool parse = fuzz_byte(&data, &size) & 1;
    const char *text = (const char *)data;
    ern_tokens ids;
    ern_buf out;
    ern_tokens_init(&ids, 1 << 20);
    ern_buf_init(&out, 1 << 24);
    ern_status s = ern_tokenizer_encode(t, text, size, parse, &ids, NULL);
    ERN_ASSERT(s == (ern_utf8_valid(text, size) ? ERN_OK : ERN_ERR_INPUT));
    if (s == ERN_OK) {
        ERN_ASSERT(ern_tokenizer_decode(t, ids.id, ids.n, false, &out, NULL) == ERN_OK);
        ERN_ASSERT(fuzz_same_text(out.data, out.len, text, size));
        for (size_t i = 0; i < ids.n && !parse; i++) ERN_ASSERT(!ern_tokenizer_is_special(t, ids.id[i]));
    }
    ern_tokens_free(&ids);
    ern_buf_free(&out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const ern_tokenizer *t = fuzz_tokenizer();
    ids_to_text(t, data, size);
    text_to_ids(t, data, size);
    return 0;
}
