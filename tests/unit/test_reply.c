/* Replies split into content, reasoning and calls: by hand, and the same at every cut of every reply. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "text_fixture.h"

/* The joined parts as one line: r(...) c(...) name[args]. Calls are told in order, so they may stand apart. */
typedef struct parts {
    ern_buf reasoning, content, calls;
    int n_call;
} parts;

static void take(void *ud, ern_reply_kind kind, int call, const char *text, size_t len) {
    parts *p = ud;
    switch (kind) {
    case ERN_REPLY_CONTENT: ern_buf_add(&p->content, text, len); break;
    case ERN_REPLY_REASONING: ern_buf_add(&p->reasoning, text, len); break;
    case ERN_REPLY_CALL_NAME:
        assert_int_equal(call, p->n_call++);
        ern_buf_print(&p->calls, "%.*s", (int)len, text);
        break;
    case ERN_REPLY_CALL_ARGS:
        assert_int_equal(call, p->n_call - 1);
        ern_buf_print(&p->calls, "%.*s;", (int)len, text);
        break;
    }
}

typedef struct setting {
    ern_chat_format format;
    bool reasoning, tools;
} setting;

/* Feed text in pieces that end at `cut` and at the end, or byte by byte when cut is SIZE_MAX; out is the joined line.
 */
static void split(setting s, const char *text, size_t len, size_t cut, ern_buf *out) {
    parts p = {0};
    ern_reply *r;
    ern_buf_init(&p.reasoning, 4 << 20);
    ern_buf_init(&p.content, 4 << 20);
    ern_buf_init(&p.calls, 4 << 20);
    assert_int_equal(ern_reply_open(&r, s.format, s.reasoning, s.tools, NULL), ERN_OK);
    for (size_t at = 0; at < len;) {
        size_t to = cut == SIZE_MAX ? at + 1 : at < cut ? cut : len;
        ern_reply_feed(r, text + at, to - at, take, &p);
        at = to;
    }
    ern_reply_flush(r, take, &p);
    ern_buf_clear(out);
    ern_buf_text(out, "");
    ern_buf_print(out, "r(%s)c(%s)%s", p.reasoning.data ? p.reasoning.data : "", p.content.data ? p.content.data : "",
                  p.calls.data ? p.calls.data : "");
    ern_buf_free(&p.reasoning);
    ern_buf_free(&p.content);
    ern_buf_free(&p.calls);
    ern_reply_close(r);
}

/* One way to split a reply, the same wherever it is cut. */
static void same_at_every_cut(setting s, const char *text, size_t len, const char *want) {
    ern_buf whole, part;
    ern_buf_init(&whole, 8 << 20);
    ern_buf_init(&part, 8 << 20);
    split(s, text, len, len, &whole);
    if (want) assert_string_equal(whole.data, want);
    split(s, text, len, SIZE_MAX, &part);
    assert_string_equal(part.data, whole.data);
    for (size_t cut = 1; cut < len; cut++) {
        split(s, text, len, cut, &part);
        assert_string_equal(part.data, whole.data);
    }
    ern_buf_free(&whole);
    ern_buf_free(&part);
}

#define BOTH \
    { ERN_CHAT_THINKING, true, true }
#define REASON \
    { ERN_CHAT_THINKING, true, false }
#define TOOLS \
    { ERN_CHAT_THINKING, false, true }
#define CALL_F "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\":1}}\n</tool_call>"

static void by_hand(void **state) {
    (void)state;
    static const struct {
        setting s;
        const char *text, *want;
    } list[] = {
        {BOTH, "", "r()c()"},
        {BOTH, "why\n</think>\n\n\n<response>\nanswer\n</response>\n", "r(why)c(answer)"},
        {BOTH, "why\n\n</think>answer", "r(why\n)c(answer)"},
        {BOTH, "why</think>\nanswer\n", "r(why)c(answer\n)"},
        {BOTH, "no end\n</thin", "r(no end\n</thin)c()"},
        {BOTH, "\n</think>", "r()c()"},
        {BOTH, "a<response>b</think>c", "r(a<response>b)c(c)"},
        {BOTH, "</think>\n\n<response>\n\nx\n\n</response>dropped", "r()c(\nx\n)"},
        {BOTH, "</think>a</response>b", "r()c(a</response>b)"}, /* never opened: text */
        {BOTH, "</think><response>a<response>b</response>", "r()c(a<response>b)"},
        {BOTH, "</think>a <respons", "r()c(a <respons)"},
        {BOTH, "</think>" CALL_F, "r()c()f{\"a\": 1};"},
        {BOTH, "go\n</think>\n\n\n" CALL_F "\n\n" CALL_F "\n", "r(go)c()f{\"a\": 1};f{\"a\": 1};"},
        {BOTH, "</think>Sure." CALL_F "done", "r()c(Sure.done)f{\"a\": 1};"},
        {BOTH, "</think><response>\nSure.\n</response>\n\n" CALL_F "x", "r()c(Sure.)f{\"a\": 1};"},
        {BOTH, CALL_F "</think>", "r(" CALL_F ")c()"}, /* thought of, not called */
        {BOTH, "</think><tool_call>{\"name\":\"g\"}</tool_call>", "r()c()g{};"},
        {BOTH, "</think><tool_call>{\"name\":\"g\",}</tool_call>!", "r()c(<tool_call>{\"name\":\"g\",}</tool_call>!)"},
        {BOTH, "</think><tool_call>{\"name\":7}</tool_call>", "r()c(<tool_call>{\"name\":7}</tool_call>)"},
        {BOTH, "</think><tool_call>{\"name\":\"\"}</tool_call>", "r()c(<tool_call>{\"name\":\"\"}</tool_call>)"},
        {BOTH, "</think><tool_call>{\"name\":\"g\",\"arguments\":\"{}\"}</tool_call>",
         "r()c(<tool_call>{\"name\":\"g\",\"arguments\":\"{}\"}</tool_call>)"},
        {BOTH, "</think><tool_call>[]</tool_call>", "r()c(<tool_call>[]</tool_call>)"},
        {BOTH, "</think><tool_call></tool_call>", "r()c(<tool_call></tool_call>)"},
        {BOTH, "</think><tool_call>{\"name\":\"g\"}", "r()c(<tool_call>{\"name\":\"g\"})"}, /* cut short */
        {REASON, "why\n</think>\n" CALL_F, "r(why)c(" CALL_F ")"},
        {TOOLS, "why\n</think>\n<response>" CALL_F, "r()c(why\n</think>\n<response>)f{\"a\": 1};"},
        {{ERN_CHAT_THINKING, false, false}, "why\n</think>" CALL_F, "r()c(why\n</think>" CALL_F ")"},
        {{ERN_CHAT_ERNIE, true, true}, "why\n</think>" CALL_F, "r()c(why\n</think>" CALL_F ")"},
        {BOTH, "<<</</t</th\n\n<</think><<r<response></re</response", "r(<<</</t</th\n\n<)c(<<r</re</response)"},
    };
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++)
        same_at_every_cut(list[i].s, list[i].text, strlen(list[i].text), list[i].want);
}

static void random_replies(void **state) {
    (void)state;
    static const char *const piece[] = {
        "</think>",         "\n",   "<response>", "</response>", "<tool_call>", "</tool_call>",
        "{\"name\":\"f\"}", "<",    "/",          ">",           "think",       "</",
        "\xe4\xbd\xa0",     "text", CALL_F,       "\n\n",        "<tool",       "_call>"};
    text_random r = text_random_start("random_replies", 7);
    ern_buf text;
    ern_buf_init(&text, 1 << 16);
    for (int i = 0; i < 1500; i++) {
        ern_buf_clear(&text);
        for (uint32_t n = 1 + text_random_below(&r, 14); n; n--)
            ern_buf_text(&text, piece[text_random_below(&r, sizeof piece / sizeof piece[0])]);
        setting s = {ERN_CHAT_THINKING, text_random_below(&r, 4) != 0, text_random_below(&r, 4) != 0};
        same_at_every_cut(s, text.data, text.len, NULL);
    }
    ern_buf_free(&text);
}

/* Whole characters in, whole characters out, and nothing that is decided waits for the next feed. */
static void told_at_once(void *ud, ern_reply_kind kind, int call, const char *text, size_t len) {
    (void)kind;
    (void)call;
    assert_true(len == 0 || ((unsigned char)text[0] & 0xc0) != 0x80);
    *(size_t *)ud += len;
}

static void whole_characters(void **state) {
    (void)state;
    ern_reply *r;
    assert_int_equal(ern_reply_open(&r, ERN_CHAT_THINKING, true, true, NULL), ERN_OK);
    static char text[3000];
    size_t told = 0;
    for (size_t i = 0; i + 3 <= sizeof text; i += 3) memcpy(text + i, "\xe4\xbd\xa0", 3);
    for (size_t n = 1; n < 5; n++) { /* an odd byte in front moves every border */
        told = 0;
        ern_reply_feed(r, "xyz", n % 3, told_at_once, &told);
        ern_reply_feed(r, text, sizeof text, told_at_once, &told);
        assert_int_equal(told, n % 3 + sizeof text);
    }
    assert_true(ern_reply_in_reasoning(r));
    told = 0;
    ern_reply_feed(r, "ab\n</thi", 8, told_at_once, &told);
    assert_int_equal(told, 2);
    ern_reply_feed(r, "nk>", 3, told_at_once, &told);
    assert_int_equal(told, 2);
    assert_false(ern_reply_in_reasoning(r));
    ern_reply_close(r);
}

/* A prompt that ended inside <response>: content from the first byte, closed by the tag. */
static void continued(void **state) {
    (void)state;
    parts p = {0};
    ern_reply *r;
    ern_buf_init(&p.content, 100);
    assert_int_equal(ern_reply_open(&r, ERN_CHAT_THINKING, true, true, NULL), ERN_OK);
    ern_reply_continue(r);
    assert_false(ern_reply_in_reasoning(r));
    ern_reply_feed(r, " and more\n</response>\n", 22, take, &p);
    ern_reply_flush(r, take, &p);
    assert_string_equal(p.content.data, " and more");
    ern_buf_free(&p.content);
    ern_reply_close(r);
}

/* A call longer than a megabyte is content, all of it. */
static void giant_call(void **state) {
    (void)state;
    const setting s = BOTH;
    size_t len = (3u << 20) / 2;
    char *text = malloc(len);
    assert_non_null(text);
    memset(text, 'x', len);
    memcpy(text, "</think><tool_call>", 19);
    memcpy(text + len - 12, "</tool_call>", 12);
    ern_buf out;
    ern_buf_init(&out, 8 << 20);
    split(s, text, len, len / 3, &out);
    assert_int_equal(out.len, len - 8 + strlen("r()c()"));
    assert_memory_equal(out.data, "r()c(<tool_call>xxx", 19);
    ern_buf_free(&out);
    free(text);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(by_hand), cmocka_unit_test(random_replies),
                                       cmocka_unit_test(whole_characters), cmocka_unit_test(continued),
                                       cmocka_unit_test(giant_call)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
