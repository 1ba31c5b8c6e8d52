/* Any reply, in any cuts: the same parts as at once, and nothing but tags is ever lost from a plain one. */
#include "fuzz_text.h"

typedef struct parts {
    ern_buf text[4]; /* by ern_reply_kind; calls separated by a byte that JSON cannot hold */
    int n_call;
} parts;

static void take(void *ud, ern_reply_kind kind, int call, const char *text, size_t len) {
    parts *p = ud;
    if (kind == ERN_REPLY_CALL_NAME) ERN_ASSERT(call == p->n_call++);
    if (kind == ERN_REPLY_CALL_ARGS) ERN_ASSERT(call == p->n_call - 1 && len >= 2 && text[0] == '{');
    ern_buf_add(&p->text[kind], text, len);
    if (kind >= ERN_REPLY_CALL_NAME) ern_buf_add(&p->text[kind], "\x01", 1);
}

static void split(parts *p, unsigned flags, const char *text, size_t len, size_t cut) {
    ern_reply *r;
    *p = (parts){0};
    for (int i = 0; i < 4; i++) ern_buf_init(&p->text[i], 64 << 20);
    ERN_ASSERT(ern_reply_open(&r, flags & 1 ? ERN_CHAT_ERNIE : ERN_CHAT_THINKING, flags >> 1 & 1, flags >> 2 & 1,
                              NULL) == ERN_OK);
    for (size_t at = 0; at < len; at += cut) ern_reply_feed(r, text + at, cut < len - at ? cut : len - at, take, p);
    ern_reply_flush(r, take, p);
    ern_reply_close(r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const unsigned flags = fuzz_byte(&data, &size), cut = 1 + fuzz_byte(&data, &size);
    const char *text = (const char *)data;
    parts whole, part;
    split(&whole, flags, text, size, size + 1);
    split(&part, flags, text, size, cut);
    ERN_ASSERT(whole.n_call == part.n_call);
    for (int i = 0; i < 4; i++) {
        ern_buf *a = &whole.text[i], *b = &part.text[i];
        ERN_ASSERT(a->len == b->len && (a->len == 0 || memcmp(a->data, b->data, a->len) == 0));
        if (i == ERN_REPLY_CONTENT && (flags & 1)) /* the ernie format is content through and through */
            ERN_ASSERT(a->len == size && (size == 0 || memcmp(a->data, text, size) == 0));
        ern_buf_free(a);
        ern_buf_free(b);
    }
    return 0;
}
