/* Any conversation: its ids decode to its text, and hold exactly the special tokens of the frame, whatever is typed. */
#include "fuzz_text.h"

enum { MESSAGES = 8 };

static int special_name(const char *s) {
    const size_t n = strlen(s);
    return n > 2 && s[0] == '<' && s[n - 1] == '>' && memcmp(s, "<0x", 3) != 0;
}

/* Render into ids; how many of them are special by name, or -1 when refused. */
static int count_marks(const ern_tokenizer *t, ern_chat_format f, const ern_chat *c, ern_tokens *ids) {
    ern_err err = {0};
    ern_status s = ern_chat_render(t, f, c, ids, &err);
    ERN_ASSERT(s == ERN_OK || (s == ERN_ERR_INPUT && err.text[0]));
    int n = 0;
    for (size_t i = 0; i < ids->n; i++) n += special_name(ern_tokenizer_name(t, ids->id[i]));
    return s == ERN_OK ? n : -1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const ern_tokenizer *t = fuzz_tokenizer();
    ern_chat_message m[MESSAGES], bland[MESSAGES];
    ern_tool_call call[MESSAGES];
    char args[MESSAGES][64];
    const char *const tool[] = {"{\"name\": \"f\"}", "{}"};
    const unsigned flags = fuzz_byte(&data, &size);
    const ern_chat_format f = flags & 1 ? ERN_CHAT_THINKING : ERN_CHAT_ERNIE;
    ern_chat c = {.message = m,
                  .tool = tool,
                  .n_tool = flags >> 1 & 1,
                  .add_generation_prompt = flags >> 2 & 1,
                  .continue_final = flags >> 3 & 1};
    c.n_message = (int)(flags >> 4) % (MESSAGES + 1);
    for (int i = 0; i < c.n_message; i++) {
        const unsigned kind = fuzz_byte(&data, &size);
        size_t n_args;
        m[i] = (ern_chat_message){.role = (ern_role)(kind & 3)};
        m[i].content = fuzz_bytes(&data, &size, fuzz_byte(&data, &size), &m[i].content_len);
        if (kind & 4) {
            const char *s = fuzz_bytes(&data, &size, kind >> 3, &n_args);
            memcpy(args[i], s, n_args);
            args[i][n_args] = 0;
            call[i] = (ern_tool_call){"f", args[i]};
            m[i].call = &call[i];
            m[i].n_call = 1;
        }
        bland[i] = m[i];
        bland[i].content = "xxxx";
        bland[i].content_len = m[i].content_len ? 4 : 0;
    }
    ern_tokens ids, plain;
    ern_buf text, back;
    ern_tokens_init(&ids, 1 << 16);
    ern_tokens_init(&plain, 1 << 16);
    ern_buf_init(&text, 1 << 20);
    ern_buf_init(&back, 1 << 20);
    const int n_mark = count_marks(t, f, &c, &ids);
    if (n_mark >= 0) {
        ERN_ASSERT(ern_chat_render_text(f, &c, &text, NULL) == ERN_OK);
        ERN_ASSERT(ern_tokenizer_decode(t, ids.id, ids.n, false, &back, NULL) == ERN_OK);
        ERN_ASSERT(fuzz_same_text(back.data, back.len, text.data, text.len));
        c.message = bland;
        ERN_ASSERT(count_marks(t, f, &c, &plain) == n_mark);
    }
    ern_tokens_free(&ids);
    ern_tokens_free(&plain);
    ern_buf_free(&text);
    ern_buf_free(&back);
    return 0;
}
