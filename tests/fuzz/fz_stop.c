/* Any stop strings and any text, in any cuts: what a naive search finds. */
#include "fuzz_text.h"
#include "naive_stop.h"

enum { STOPS = 16 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const char *stop[STOPS];
    size_t stop_len[STOPS], start = 0, end = 0;
    const unsigned flags = fuzz_byte(&data, &size), cut = 1 + fuzz_byte(&data, &size);
    const int n = (int)(flags & 15) + 1;
    const bool keep = flags >> 4 & 1;
    bool empty = false;
    for (int i = 0; i < n; i++) {
        stop[i] = fuzz_bytes(&data, &size, fuzz_byte(&data, &size) & 31, &stop_len[i]);
        empty = empty || stop_len[i] == 0;
    }
    ern_stop *s;
    ern_status status = ern_stop_open(&s, stop, stop_len, n, NULL);
    ERN_ASSERT(status == (empty ? ERN_ERR_INPUT : ERN_OK));
    if (empty) return 0;
    const char *text = (const char *)data;
    const int want = naive_stop(text, size, stop, stop_len, n, &start, &end);
    const size_t want_len = want < 0 ? size : keep ? end : start;
    ern_buf out;
    ern_buf_init(&out, size + 1);
    int got = -1;
    for (size_t at = 0; at < size; at += cut) {
        got = ern_stop_feed(s, text + at, cut < size - at ? cut : size - at, keep, &out);
        ERN_ASSERT(out.len <= want_len);
    }
    ern_stop_flush(s, &out);
    ERN_ASSERT(got == want && out.len == want_len && !out.full);
    ERN_ASSERT(want_len == 0 || memcmp(out.data, text, want_len) == 0);
    ern_buf_free(&out);
    ern_stop_close(s);
    return 0;
}
