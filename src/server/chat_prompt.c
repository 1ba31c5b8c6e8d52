/* Messages and tools of a chat body, checked, to the tokens of the model's chat format. */
#include <stdio.h>
#include <string.h>

#include "base/jsonr.h"
#include "server/job.h"

static bool no_memory(api_error *e) {
    return api_fail(e, 413, "request_too_large", "messages", "the messages need more memory than one request may use");
}

/* The text of a content: a text, null, or a list of text parts joined. */
static bool read_content(const json_t *v, int index, ern_chat_message *m, ern_arena *a, api_error *e) {
    m->content = "";
    if (!v || json_is_null(v)) return true;
    if (json_is_string(v)) {
        m->content = json_string_value(v);
        m->content_len = json_string_length(v);
        return true;
    }
    if (!json_is_array(v))
        return api_fail(e, 400, "invalid_value", "messages",
                        "messages[%d].content must be a text or a list of text parts", index);
    size_t all = 0, n = json_array_size(v);
    for (size_t i = 0; i < n; i++) {
        const json_t *part = json_array_get(v, i), *text = json_object_get(part, "text");
        const char *type = json_string_value(json_object_get(part, "type"));
        if (type && strcmp(type, "text") != 0)
            return api_fail(e, 400, "unsupported_value", "messages",
                            "messages[%d].content[%zu] is of type %.40s; this model reads text only", index, i, type);
        if (!json_is_string(text))
            return api_fail(e, 400, "invalid_value", "messages",
                            "messages[%d].content[%zu] must be {\"type\": \"text\", \"text\": ...}", index, i);
        all += json_string_length(text);
    }
    char *joined = ern_arena_take(a, all + 1, 1), *p = joined;
    if (!joined) return no_memory(e);
    for (size_t i = 0; i < n; i++) {
        const json_t *text = json_object_get(json_array_get(v, i), "text");
        memcpy(p, json_string_value(text), json_string_length(text));
        p += json_string_length(text);
    }
    m->content = joined;
    m->content_len = all;
    return true;
}

/* Arguments arrive as a text (OpenAI) or an object (some clients); the format prints them as Python would. */
static bool read_arguments(json_t *v, int index, const char **out, ern_arena *a, api_error *e) {
    json_t *parsed = NULL;
    if (json_is_string(v)) {
        ern_err err = {0};
        if (ern_json_parse(&parsed, json_string_value(v), json_string_length(v), JOB_JSON_DEPTH, "arguments", &err) !=
            ERN_OK)
            parsed = NULL;
    } else if (json_is_object(v)) {
        parsed = json_incref(v);
    }
    if (!json_is_object(parsed)) {
        json_decref(parsed);
        return api_fail(e, 400, "invalid_value", "messages",
                        "messages[%d].tool_calls: function.arguments must be a JSON object", index);
    }
    ern_buf b;
    ern_buf_init(&b, JOB_ARENA_MAX_BYTES);
    ern_json_dumps_python(parsed, &b);
    json_decref(parsed);
    *out = b.full ? NULL : ern_arena_text(a, b.data, b.len);
    ern_buf_free(&b);
    return *out ? true : no_memory(e);
}

static bool read_calls(json_t *v, int index, ern_chat_message *m, ern_arena *a, api_error *e) {
    if (!v || json_is_null(v)) return true;
    size_t n = json_array_size(v);
    if (!json_is_array(v) || n > JOB_CALLS_MAX)
        return api_fail(e, 400, "invalid_value", "messages",
                        "messages[%d].tool_calls must be a list of at most %d calls", index, JOB_CALLS_MAX);
    ern_tool_call *call = ERN_ARENA_NEW(a, ern_tool_call, n);
    if (!call) return no_memory(e);
    for (size_t i = 0; i < n; i++) {
        const json_t *f = json_object_get(json_array_get(v, i), "function");
        const char *name = json_string_value(json_object_get(f, "name"));
        if (!name)
            return api_fail(e, 400, "invalid_value", "messages", "messages[%d].tool_calls[%zu] needs function.name",
                            index, i);
        call[i].name = name;
        json_t *args = json_object_get(f, "arguments");
        if (args && !read_arguments(args, index, &call[i].arguments, a, e)) return false;
        if (!args) call[i].arguments = "{}";
    }
    m->call = call;
    m->n_call = (int)n;
    return true;
}

static bool read_role(const json_t *o, int index, ern_role *out, api_error *e) {
    static const struct {
        const char *name;
        ern_role role;
    } known[] = {{"system", ERN_ROLE_SYSTEM},
                 {"developer", ERN_ROLE_SYSTEM},
                 {"user", ERN_ROLE_USER},
                 {"assistant", ERN_ROLE_ASSISTANT},
                 {"tool", ERN_ROLE_TOOL}};
    const char *role = json_string_value(json_object_get(o, "role"));
    for (size_t i = 0; role && i < sizeof known / sizeof known[0]; i++) {
        if (strcmp(role, known[i].name) == 0) {
            *out = known[i].role;
            return true;
        }
    }
    return api_fail(e, 400, "invalid_value", "messages",
                    "messages[%d].role must be system, developer, user, assistant or tool, not %.40s", index,
                    role ? role : "absent");
}

/* System messages, wherever they stand, become one at the front, joined by a newline. */
static bool merge_system(ern_chat_message *m, int *n, ern_arena *a, api_error *e) {
    size_t all = 0;
    int n_system = 0, kept = 0;
    for (int i = 0; i < *n; i++) {
        if (m[i].role != ERN_ROLE_SYSTEM) continue;
        n_system++;
        all += m[i].content_len + 1;
    }
    if (n_system == 0 || (n_system == 1 && m[0].role == ERN_ROLE_SYSTEM)) return true;
    char *text = ern_arena_take(a, all + 1, 1), *p = text;
    ern_chat_message *rest = ERN_ARENA_NEW(a, ern_chat_message, (size_t)*n);
    if (!text || !rest) return no_memory(e);
    for (int i = 0; i < *n; i++) {
        if (m[i].role != ERN_ROLE_SYSTEM) {
            rest[kept++] = m[i];
            continue;
        }
        if (p != text) *p++ = '\n';
        if (m[i].content_len) memcpy(p, m[i].content, m[i].content_len);
        p += m[i].content_len;
    }
    m[0] = (ern_chat_message){.role = ERN_ROLE_SYSTEM, .content = text, .content_len = (size_t)(p - text)};
    memcpy(m + 1, rest, (size_t)kept * sizeof *m);
    *n = kept + 1;
    return true;
}

static bool read_tools(const params *p, ern_chat *chat, ern_arena *a, api_error *e) {
    json_t *which = p->tool_choice;
    const char *word = json_string_value(which);
    if (json_is_object(which) || (word && strcmp(word, "required") == 0))
        return api_fail(
            e, 400, "unsupported_value", "tool_choice",
            "tool_choice required or a named function needs guided decoding, which is not built yet; use auto");
    if (which && !(word && (strcmp(word, "none") == 0 || strcmp(word, "auto") == 0)))
        return api_fail(e, 400, "invalid_value", "tool_choice", "tool_choice must be none or auto");
    size_t n = json_array_size(p->tools);
    const char **list = ERN_ARENA_NEW(a, const char *, n);
    if (!list) return no_memory(e);
    for (size_t i = 0; i < n; i++) {
        json_t *tool = json_array_get(p->tools, i);
        const char *type = json_string_value(json_object_get(tool, "type"));
        const char *name = json_string_value(json_object_get(json_object_get(tool, "function"), "name"));
        if (!type || strcmp(type, "function") != 0 || !name || !name[0])
            return api_fail(e, 400, "invalid_value", "tools",
                            "tools[%zu] must be {\"type\": \"function\", \"function\": {\"name\": ...}}", i);
        ern_buf b;
        ern_buf_init(&b, JOB_ARENA_MAX_BYTES);
        ern_json_dumps_python(tool, &b);
        list[i] = b.full ? NULL : ern_arena_text(a, b.data, b.len);
        ern_buf_free(&b);
        if (!list[i]) return no_memory(e);
    }
    if (word && strcmp(word, "none") == 0) n = 0;
    chat->tool = list;
    chat->n_tool = (int)n;
    return true;
}

/* Thinking cannot be switched on or off in these formats; asking for what is there anyway is fine. */
static bool check_thinking(const ern_server *s, const params *p, api_error *e) {
    bool want = p->enable_thinking;
    const char *param = "enable_thinking";
    if (p->reasoning_effort.s && strcmp(p->reasoning_effort.s, "none") == 0) {
        want = false;
        param = "reasoning_effort";
    }
    const char *key;
    json_t *v;
    json_object_foreach(p->chat_template_kwargs, key, v) {
        const char *mode = NULL;
        if (strcmp(key, "enable_thinking") == 0 && json_is_boolean(v))
            want = json_is_true(v);
        else if (strcmp(key, "thinking_mode") == 0)
            mode = json_string_value(v);
        else if (strcmp(key, "options") == 0 && json_is_object(v) && json_object_size(v) <= 1)
            mode = json_object_size(v) ? json_string_value(json_object_get(v, "thinking_mode")) : "default";
        else
            return api_fail(e, 400, "unsupported_value", "chat_template_kwargs",
                            "chat_template_kwargs: %.60s is not known here, or not of its type; enable_thinking "
                            "(true or false) and options.thinking_mode are",
                            key);
        if (strcmp(key, "enable_thinking") != 0) {
            if (!mode)
                return api_fail(e, 400, "invalid_value", "chat_template_kwargs",
                                "chat_template_kwargs: thinking_mode must be a text");
            if (strcmp(mode, "close") == 0 || strcmp(mode, "false") == 0) want = false;
        }
        param = "chat_template_kwargs";
    }
    if (!want && ern_chat_format_reasons(s->format) && !s->o.strict_fastdeploy)
        return api_fail(e, 400, "unsupported_value", param,
                        "this model's chat format always reasons; thinking cannot be switched off");
    return true;
}

static bool read_messages(const ern_server *s, const params *p, ern_chat *chat, ern_arena *a, api_error *e) {
    int n = (int)json_array_size(p->messages);
    ern_chat_message *m = ERN_ARENA_NEW(a, ern_chat_message, (size_t)n + 1);
    if (!m) return no_memory(e);
    for (int i = 0; i < n; i++) {
        json_t *o = json_array_get(p->messages, (size_t)i);
        if (!json_is_object(o))
            return api_fail(e, 400, "invalid_value", "messages", "messages[%d] must be an object with role and content",
                            i);
        if (!read_role(o, i, &m[i].role, e) || !read_content(json_object_get(o, "content"), i, &m[i], a, e) ||
            !read_calls(json_object_get(o, "tool_calls"), i, &m[i], a, e))
            return false;
        if (m[i].role != ERN_ROLE_ASSISTANT &&
            (!json_object_get(o, "content") || json_is_null(json_object_get(o, "content"))))
            return api_fail(e, 400, "invalid_value", "messages", "messages[%d] needs content", i);
    }
    size_t all = 0, context = (size_t)ern_engine_options_of(s->engine)->max_model_len;
    for (int i = 0; i < n; i++) all += m[i].content_len;
    if (all > context * PIECE_MAX_BYTES) /* refused before any time is spent on it */
        return api_fail(e, 400, "context_length_exceeded", "messages",
                        "the messages have %zu bytes, which cannot fit the context of %zu tokens; shorten them", all,
                        context);
    if (!merge_system(m, &n, a, e)) return false;
    chat->message = m;
    chat->n_message = n;
    return true;
}

bool chat_prompt(ern_server *s, const params *p, ern_arena *a, ern_tokens *out, api_error *e) {
    ern_chat chat = {.add_generation_prompt = p->add_generation_prompt && !p->continue_final_message,
                     .continue_final = p->continue_final_message};
    if (!check_thinking(s, p, e) || !read_messages(s, p, &chat, a, e)) return false;
    if (p->tools && !read_tools(p, &chat, a, e)) return false;
    ern_err err = {0};
    if (p->disable_chat_template) {
        const ern_chat_message *m = &chat.message[0];
        if (ern_tokenizer_encode(s->tokenizer, m->content, m->content_len, true, out, &err) == ERN_OK) return true;
        return api_fail(e, 400, "invalid_value", "messages", "%s", err.text);
    }
    if (chat.continue_final && chat.message[chat.n_message - 1].role != ERN_ROLE_ASSISTANT)
        return api_fail(e, 400, "invalid_value", "continue_final_message",
                        "continue_final_message needs a last message of the assistant");
    if (ern_chat_render(s->tokenizer, s->format, &chat, out, &err) == ERN_OK) return true;
    return api_fail(e, 400, "invalid_value", chat.n_tool ? "tools" : "messages", "%s", err.text);
}
