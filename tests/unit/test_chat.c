/* Conversations to prompts, byte by byte as docs/model.md 6 gives them; ids equal the text's; what a user types stays
 * text; picking a format; JSON as Python prints it. The published id goldens run with ERNEST_TEST_TOKENIZER. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "base/jsonr.h"
#include "text_fixture.h"

static text_fixture tiny;

static int open_tiny(void **state) {
    (void)state;
    text_fixture_open(&tiny, TEXT_TINY);
    return 0;
}

static int close_tiny(void **state) {
    (void)state;
    text_fixture_close(&tiny);
    return 0;
}

/* A message from C strings. */
static ern_chat_message say(ern_role role, const char *content) {
    return (ern_chat_message){.role = role, .content = content, .content_len = strlen(content)};
}

/* The conversation must read `want`, and its ids must be those of that text with its specials parsed. */
static void expect(ern_chat_format f, const ern_chat *chat, const char *want) {
    ern_err err = {0};
    ern_buf text;
    ern_tokens ids;
    ern_buf_init(&text, 1 << 16);
    ern_tokens_init(&ids, 1 << 16);
    if (ern_chat_render_text(f, chat, &text, &err) != ERN_OK) fail_msg("%s", err.text);
    assert_string_equal(text.data, want);
    if (ern_chat_render(tiny.t, f, chat, &ids, &err) != ERN_OK) fail_msg("%s", err.text);
    ern_tokens same = text_fixture_encode(tiny.t, want, strlen(want), true);
    assert_int_equal(ids.n, same.n);
    assert_memory_equal(ids.id, same.id, ids.n * sizeof ids.id[0]);
    ern_tokens_free(&same);
    ern_tokens_free(&ids);
    ern_buf_free(&text);
}

static void ernie(void **state) {
    (void)state;
    const ern_chat_message m[] = {say(ERN_ROLE_SYSTEM, "S"), say(ERN_ROLE_USER, "U1"), say(ERN_ROLE_ASSISTANT, "A1"),
                                  say(ERN_ROLE_USER, "U2")};
    ern_chat c = {.message = m, .n_message = 4, .add_generation_prompt = true};
    expect(ERN_CHAT_ERNIE, &c,
           "<|begin_of_sentence|>S\nUser: U1\nAssistant: A1<|end_of_sentence|>User: U2\nAssistant: ");
    c.add_generation_prompt = false;
    expect(ERN_CHAT_ERNIE, &c, "<|begin_of_sentence|>S\nUser: U1\nAssistant: A1<|end_of_sentence|>User: U2\n");
    c.n_message = 3;
    c.continue_final = c.add_generation_prompt = true;
    expect(ERN_CHAT_ERNIE, &c, "<|begin_of_sentence|>S\nUser: U1\nAssistant: A1");
    c = (ern_chat){.add_generation_prompt = true};
    expect(ERN_CHAT_ERNIE, &c, "<|begin_of_sentence|>Assistant: ");
}

#define GLOBAL "<global_setting>\nthink_mode=True\n</global_setting>"
#define OPEN "<|im_start|>assistant\n<think>\n"

static void thinking(void **state) {
    (void)state;
    ern_chat_message m[] = {say(ERN_ROLE_USER, "Hi"), say(ERN_ROLE_ASSISTANT, "Hello"), say(ERN_ROLE_USER, "More")};
    ern_chat c = {.message = m, .n_message = 1, .add_generation_prompt = true};
    expect(ERN_CHAT_THINKING, &c,
           "<|im_start|>system\n" GLOBAL "<|im_end|>\n\n<|im_start|>user\nHi<|im_end|>\n\n" OPEN);
    c.add_generation_prompt = false; /* this format opens the reply all the same */
    c.n_message = 3;
    expect(ERN_CHAT_THINKING, &c,
           "<|im_start|>system\n" GLOBAL "<|im_end|>\n\n<|im_start|>user\nHi<|im_end|>\n\n"
           "<|im_start|>assistant\n<response>\nHello\n</response>\n<|im_end|>\n\n"
           "<|im_start|>user\nMore<|im_end|>\n\n" OPEN);
    c.n_message = 2;
    c.continue_final = true;
    expect(ERN_CHAT_THINKING, &c,
           "<|im_start|>system\n" GLOBAL "<|im_end|>\n\n<|im_start|>user\nHi<|im_end|>\n\n"
           "<|im_start|>assistant\n<response>\nHello");
    m[1] = say(ERN_ROLE_SYSTEM, "Be brief."); /* wherever it stands, it goes to the front */
    c.continue_final = false;
    expect(ERN_CHAT_THINKING, &c,
           "<|im_start|>system\n<system_setting>\nBe brief.\n</system_setting>\n\n" GLOBAL "<|im_end|>\n\n"
           "<|im_start|>user\nHi<|im_end|>\n\n" OPEN);
    m[0] = say(ERN_ROLE_SYSTEM, "One.");
    expect(ERN_CHAT_THINKING, &c,
           "<|im_start|>system\n<system_setting>\nOne.\nBe brief.\n</system_setting>\n\n" GLOBAL "<|im_end|>\n\n" OPEN);
}

static void tools(void **state) {
    (void)state;
    const char *const tool[] = {"{\"type\": \"function\", \"function\": {\"name\": \"f\"}}", "{\"b\": 0.1}"};
    const ern_tool_call call[] = {{"get\"x\"", "{\"city\":\"\xe5\x8c\x97\xe4\xba\xac\",\"n\":[1,0.1]}"}, {"g", ""}};
    ern_chat_message m[] = {say(ERN_ROLE_USER, "Hi"), say(ERN_ROLE_ASSISTANT, ""), say(ERN_ROLE_TOOL, "42")};
    m[1].call = call;
    m[1].n_call = 2;
    ern_chat c = {.message = m, .n_message = 3, .tool = tool, .n_tool = 2};
    static const char calls[] = "\n<tool_call>\n{\"name\": \"get\\\"x\\\"\", \"arguments\": {\"city\": "
                                "\"\xe5\x8c\x97\xe4\xba\xac\", \"n\": [1, 0.1]}}\n</tool_call>\n"
                                "\n<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>\n<|im_end|>\n\n";
    static const char head[] = "<|im_start|>system\n" GLOBAL "\n\n<tool_list>\n[{\"type\": \"function\", "
                               "\"function\": {\"name\": \"f\"}}, {\"b\": 0.1}]\n</tool_list><|im_end|>\n\n"
                               "<|im_start|>user\nHi<|im_end|>\n\n<|im_start|>assistant\n";
    static const char tail[] = "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n\n" OPEN;
    char want[2048];
    strcat(strcat(strcpy(want, head), calls), tail);
    expect(ERN_CHAT_THINKING, &c, want);
    m[1].content = "Look.";
    m[1].content_len = 5;
    strcat(strcat(strcat(strcpy(want, head), "<response>\nLook.\n</response>\n"), calls), tail);
    expect(ERN_CHAT_THINKING, &c, want);
}

/* Whatever a user types, no special token comes of it; the frame's own marks are all there is. */
static void typed_specials(void **state) {
    (void)state;
    static const char typed[] = "<|im_end|></s><|begin_of_sentence|><think></think><tool_call>\n<|LOC_0|><mask:1>\n";
    const ern_chat_message m = say(ERN_ROLE_USER, typed), empty = say(ERN_ROLE_USER, "");
    for (ern_chat_format f = ERN_CHAT_ERNIE; f <= ERN_CHAT_THINKING; f++) {
        int n_mark[2] = {0};
        for (int i = 0; i < 2; i++) {
            ern_tokens ids;
            ern_tokens_init(&ids, 4096);
            const ern_chat c = {.message = i ? &m : &empty, .n_message = 1, .add_generation_prompt = true};
            assert_int_equal(ern_chat_render(tiny.t, f, &c, &ids, NULL), ERN_OK);
            for (size_t k = 0; k < ids.n; k++) {
                const char *name = ern_tokenizer_name(tiny.t, ids.id[k]);
                n_mark[i] += strlen(name) > 2 && name[0] == '<' && ids.id[k] >= 269 && name[strlen(name) - 1] == '>';
            }
            ern_tokens_free(&ids);
        }
        assert_true(n_mark[0] > 0);
        assert_int_equal(n_mark[1], n_mark[0]);
    }
}

/* A chat that must be refused with ERN_ERR_INPUT. */
static void refused(ern_chat_format f, const ern_chat *c, const char *says) {
    ern_tokens ids;
    ern_err err = {0};
    ern_tokens_init(&ids, 4096);
    assert_int_equal(ern_chat_render(tiny.t, f, c, &ids, &err), ERN_ERR_INPUT);
    if (!strstr(err.text, says)) fail_msg("\"%s\" does not say \"%s\"", err.text, says);
    ern_tokens_free(&ids);
}

static void refusals(void **state) {
    (void)state;
    const char *const tool[] = {"{}"};
    ern_chat_message m = say(ERN_ROLE_TOOL, "x");
    refused(ERN_CHAT_ERNIE, &(ern_chat){.tool = tool, .n_tool = 1}, "no tools");
    refused(ERN_CHAT_ERNIE, &(ern_chat){.message = &m, .n_message = 1}, "message 0");
    m = say(ERN_ROLE_USER, "x");
    refused(ERN_CHAT_ERNIE, &(ern_chat){.message = &m, .n_message = 1, .continue_final = true}, "continued");
    refused(ERN_CHAT_THINKING, &(ern_chat){.continue_final = true}, "continued");
    m = say(ERN_ROLE_USER, "\xff");
    refused(ERN_CHAT_ERNIE, &(ern_chat){.message = &m, .n_message = 1}, "UTF-8");
    static const char *const bad[] = {"[1]", "{", "{} {}", "null", "\"{}\""};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        const ern_tool_call call = {"f", bad[i]};
        m = say(ERN_ROLE_ASSISTANT, "");
        m.call = &call;
        m.n_call = 1;
        refused(ERN_CHAT_THINKING, &(ern_chat){.message = &m, .n_message = 1}, "JSON object");
    }
    ern_tokens ids;
    ern_tokens_init(&ids, 10);
    m = say(ERN_ROLE_USER, "1 2 3 4 5 6 7 8 9");
    assert_int_equal(ern_chat_render(tiny.t, ERN_CHAT_ERNIE, &(ern_chat){.message = &m, .n_message = 1}, &ids, NULL),
                     ERN_ERR_LIMIT);
    ern_tokens_free(&ids);
}

static void picking(void **state) {
    (void)state;
    static const struct {
        const char *file, *text;
        ern_chat_format want;
    } list[] = {
        {"tokenizer_config.json", "{\"chat_template\": \"{{ '<|im_start|>' }}\"}", ERN_CHAT_THINKING},
        {"tokenizer_config.json", "{\"chat_template\": \"User: \"}", ERN_CHAT_ERNIE},
        {"tokenizer_config.json",
         "{\"chat_template\": [{\"name\": \"rag\", \"template\": \"\"}, {\"name\": \"default\", "
         "\"template\": \"<|im_start|>\"}]}",
         ERN_CHAT_THINKING},
        {"tokenizer_config.json", "{\"eos_token\": \"<|im_end|>\"}", ERN_CHAT_THINKING},
        {"tokenizer_config.json", "{}", ERN_CHAT_ERNIE},
        {"chat_template.jinja", "{{ '<|im_start|>' }}", ERN_CHAT_THINKING},
    };
    text_fixture f;
    ern_chat_format got;
    ern_err err;
    text_fixture_open(&f, TEXT_TINY);
    assert_int_equal(ern_chat_format_pick(&got, f.t, f.dir, NULL, &err), ERN_OK);
    assert_int_equal(got, ERN_CHAT_ERNIE); /* what the made tokenizer's own template says */
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
        text_fixture_write(&f, list[i].file, list[i].text, strlen(list[i].text));
        assert_int_equal(ern_chat_format_pick(&got, f.t, f.dir, NULL, &err), ERN_OK);
        assert_int_equal(got, list[i].want);
    }
    assert_int_equal(ern_chat_format_pick(&got, f.t, f.dir, "ernie", &err), ERN_OK); /* a name wins */
    assert_int_equal(got, ERN_CHAT_ERNIE);
    assert_int_equal(ern_chat_format_pick(&got, f.t, f.dir, "chatml", &err), ERN_ERR_USAGE);
    assert_non_null(strstr(err.text, "ernie-thinking"));
    int32_t stop[4];
    assert_int_equal(ern_chat_stop_ids(f.t, ERN_CHAT_THINKING, stop), 2);
    assert_int_equal(stop[0], ern_tokenizer_id(f.t, "<|im_end|>"));
    assert_int_equal(stop[1], 2);
    assert_int_equal(ern_chat_stop_ids(f.t, ERN_CHAT_ERNIE, stop), 2);
    assert_int_equal(stop[0], ern_tokenizer_id(f.t, "<|end_of_sentence|>"));
    text_fixture_close(&f);
}

static void golden_ids(void **state) {
    (void)state;
    const char *path = getenv("ERNEST_TEST_TOKENIZER");
    if (!path) {
        print_message("no real tokenizer: set ERNEST_TEST_TOKENIZER to a tokenizer.model to run the published ids\n");
        skip();
    }
    const ern_chat_message m[] = {say(ERN_ROLE_SYSTEM, "You are a helpful chatbot."), say(ERN_ROLE_USER, "Hello!"),
                                  say(ERN_ROLE_ASSISTANT, "Nice to meet you.")};
    static const int32_t want[] = {100273, 2520,  524, 274,   20472, 18819, 7074, 93937, 23,  2969,  93963,
                                   30802,  94018, 23,  92267, 93963, 47434, 318,  7472,  536, 93937, 100272};
    ern_tokenizer *t;
    ern_tokens ids;
    assert_int_equal(ern_tokenizer_open(&t, path, NULL), ERN_OK);
    ern_tokens_init(&ids, 100);
    assert_int_equal(ern_chat_render(t, ERN_CHAT_ERNIE, &(ern_chat){.message = m, .n_message = 3}, &ids, NULL), ERN_OK);
    assert_int_equal(ids.n, sizeof want / sizeof want[0]);
    assert_memory_equal(ids.id, want, sizeof want);
    ern_tokens_free(&ids);
    ern_tokens_init(&ids, 100);
    assert_int_equal(ern_chat_render(t, ERN_CHAT_ERNIE, &(ern_chat){.add_generation_prompt = true}, &ids, NULL),
                     ERN_OK);
    assert_int_equal(ids.n, 4);
    assert_memory_equal(ids.id + 1, ((int32_t[]){92267, 93963, 93919}), 12);
    ern_tokens_free(&ids);
    ern_tokenizer_close(t);
}

/* Values from Python 3.11: json.dumps(json.loads(in), ensure_ascii=False). */
static void python_json(void **state) {
    (void)state;
    static const char *const pair[][2] = {
        {"{}", "{}"},
        {"[]", "[]"},
        {"[[],{}]", "[[], {}]"},
        {"{\"b\":1,\"a\":[true,false,null]}", "{\"b\": 1, \"a\": [true, false, null]}"},
        {"[0.1,1.0,1e16,1e-5,123456789.125,-0.0,1e22]", "[0.1, 1.0, 1e+16, 1e-05, 123456789.125, -0.0, 1e+22]"},
        {"[922337203685477580,-1]", "[922337203685477580, -1]"},
        {"[\"\xe4\xbd\xa0\\u00e9\\n\\\"\\\\/\\u001f\x7f\"]", "[\"\xe4\xbd\xa0\xc3\xa9\\n\\\"\\\\/\\u001f\x7f\"]"},
        {"{\"x\":{\"y\":{\"z\":[1,[2,[3]]]},\"w\":\"\"}}", "{\"x\": {\"y\": {\"z\": [1, [2, [3]]]}, \"w\": \"\"}}"},
    };
    for (size_t i = 0; i < sizeof pair / sizeof pair[0]; i++) {
        json_t *v;
        ern_buf out;
        ern_buf_init(&out, 4096);
        assert_int_equal(ern_json_parse(&v, pair[i][0], strlen(pair[i][0]), 64, "test", NULL), ERN_OK);
        ern_json_dumps_python(v, &out);
        assert_string_equal(out.data, pair[i][1]);
        json_decref(v);
        ern_buf_free(&out);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(ernie),      cmocka_unit_test(thinking),
                                       cmocka_unit_test(tools),      cmocka_unit_test(typed_specials),
                                       cmocka_unit_test(refusals),   cmocka_unit_test(picking),
                                       cmocka_unit_test(golden_ids), cmocka_unit_test(python_json)};
    return cmocka_run_group_tests(tests, open_tiny, close_tiny);
}
