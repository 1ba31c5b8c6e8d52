/* Conversations to prompts. See text.h; docs/model.md 6.
 *
 * A format is written once, as marks (special tokens) and text; the sink makes ids or text of it. Text between two
 * marks is encoded in one piece, the frame's words and the user's together, as the published tokenizers do; only marks
 * become special tokens, so what a user types never does. */
#include <jansson.h>
#include <string.h>

#include "base/jsonr.h"
#include "base/jsonw.h"
#include "text/text.h"

enum { RUN_BYTES_MAX = 256 << 20, JSON_DEPTH = 64 };

typedef struct sink {
    const ern_tokenizer *t; /* NULL: text is wanted */
    ern_tokens *ids;
    ern_buf *text; /* where text goes; with ids, the run since the last mark */
    ern_status status;
    ern_err *err;
} sink;

static void put_text(sink *k, const char *s, size_t len) { ern_buf_add(k->text, s, len); }
static void put(sink *k, const char *s) { ern_buf_text(k->text, s); }

/* Encode the run since the last mark. */
static void end_run(sink *k) {
    if (k->status != ERN_OK) return;
    if (k->text->full)
        k->status = ERN_FAIL(k->err, ERN_ERR_LIMIT, "the conversation's text is too long or memory is out");
    else if (k->text->len)
        k->status = ern_tokenizer_encode(k->t, k->text->data, k->text->len, false, k->ids, k->err);
    ern_buf_clear(k->text);
}

/* A special token by name; where the vocabulary has none, its text. */
static void mark(sink *k, const char *name) {
    int32_t id = k->t ? ern_tokenizer_id(k->t, name) : -1;
    if (id < 0) {
        put(k, name);
        return;
    }
    end_run(k);
    if (k->status == ERN_OK && !ern_tokens_add(k->ids, id))
        k->status = ERN_FAIL(k->err, ERN_ERR_LIMIT, "the conversation has more than %zu tokens", k->ids->limit);
}

/* ---- 0.3B, 21B-A3B --------------------------------------------------------------------------------------------- */

static ern_status check_ernie(const ern_chat *c, ern_err *err) {
    if (c->n_tool)
        return ERN_FAIL(err, ERN_ERR_INPUT,
                        "this model's chat format has no tools; send none, or use a Thinking model");
    for (int i = 0; i < c->n_message; i++)
        if (c->message[i].role == ERN_ROLE_TOOL || c->message[i].n_call)
            return ERN_FAIL(err, ERN_ERR_INPUT,
                            "message %d is a tool's result or calls one; this model's chat format has no tools", i);
    return ERN_OK;
}

static void render_ernie(sink *k, const ern_chat *c) {
    mark(k, "<|begin_of_sentence|>");
    for (int i = 0; i < c->n_message; i++) {
        const ern_chat_message *m = &c->message[i];
        bool open = c->continue_final && i + 1 == c->n_message;
        if (m->role == ERN_ROLE_USER) put(k, "User: ");
        if (m->role == ERN_ROLE_ASSISTANT) put(k, "Assistant: ");
        put_text(k, m->content, m->content_len);
        if (m->role != ERN_ROLE_ASSISTANT)
            put(k, "\n");
        else if (!open)
            mark(k, "<|end_of_sentence|>");
    }
    if (c->add_generation_prompt && !c->continue_final) put(k, "Assistant: ");
}

/* ---- 21B-A3B-Thinking ------------------------------------------------------------------------------------------ */

/* The block in front: the system messages' text, the switch for reasoning, the tools. It is always there. */
static void render_system(sink *k, const ern_chat *c) {
    bool any = false;
    mark(k, "<|im_start|>");
    put(k, "system\n");
    for (int i = 0; i < c->n_message; i++) {
        if (c->message[i].role != ERN_ROLE_SYSTEM) continue;
        if (!any) mark(k, "<system_setting>");
        put(k, "\n");
        put_text(k, c->message[i].content, c->message[i].content_len);
        any = true;
    }
    if (any) {
        put(k, "\n");
        mark(k, "</system_setting>");
        put(k, "\n\n");
    }
    mark(k, "<global_setting>");
    put(k, "\nthink_mode=True\n");
    mark(k, "</global_setting>");
    if (c->n_tool) {
        put(k, "\n\n");
        mark(k, "<tool_list>");
        put(k, "\n[");
        for (int i = 0; i < c->n_tool; i++) {
            if (i) put(k, ", ");
            put(k, c->tool[i]);
        }
        put(k, "]\n");
        mark(k, "</tool_list>");
    }
    mark(k, "<|im_end|>");
    put(k, "\n\n");
}

/* One call: its arguments, which came as text, are spelled again as the model's training data spelled them. */
static void render_call(sink *k, const ern_tool_call *call) {
    json_t *args = NULL;
    const char *text = *call->arguments ? call->arguments : "{}";
    if (ern_json_parse(&args, text, strlen(text), JSON_DEPTH, "arguments", NULL) != ERN_OK || !json_is_object(args)) {
        k->status =
            ERN_FAIL(k->err, ERN_ERR_INPUT, "the arguments of a call of \"%.100s\" are not a JSON object", call->name);
        json_decref(args);
        return;
    }
    put(k, "\n");
    mark(k, "<tool_call>");
    put(k, "\n{\"name\": ");
    ern_json_quote(k->text, call->name, strlen(call->name));
    put(k, ", \"arguments\": ");
    ern_json_dumps_python(args, k->text);
    put(k, "}\n");
    mark(k, "</tool_call>");
    put(k, "\n");
    json_decref(args);
}

static void render_reply(sink *k, const ern_chat_message *m, bool open) {
    mark(k, "<|im_start|>");
    put(k, "assistant\n");
    if (m->content_len || !m->n_call) {
        mark(k, "<response>");
        put(k, "\n");
        put_text(k, m->content, m->content_len);
        if (open) return;
        put(k, "\n");
        mark(k, "</response>");
        put(k, "\n");
    }
    for (int i = 0; i < m->n_call && k->status == ERN_OK; i++) render_call(k, &m->call[i]);
    mark(k, "<|im_end|>");
    put(k, "\n\n");
}

static void render_thinking(sink *k, const ern_chat *c) {
    render_system(k, c);
    for (int i = 0; i < c->n_message && k->status == ERN_OK; i++) {
        const ern_chat_message *m = &c->message[i];
        if (m->role == ERN_ROLE_SYSTEM) continue;
        if (m->role == ERN_ROLE_ASSISTANT) {
            render_reply(k, m, c->continue_final && i + 1 == c->n_message);
            continue;
        }
        mark(k, "<|im_start|>");
        put(k, "user\n");
        if (m->role == ERN_ROLE_TOOL) {
            mark(k, "<tool_response>");
            put(k, "\n");
        }
        put_text(k, m->content, m->content_len);
        if (m->role == ERN_ROLE_TOOL) {
            put(k, "\n");
            mark(k, "</tool_response>");
        }
        mark(k, "<|im_end|>");
        put(k, "\n\n");
    }
    if (c->continue_final) return;
    mark(k, "<|im_start|>"); /* this format opens the reply whether or not it is asked to */
    put(k, "assistant\n");
    mark(k, "<think>");
    put(k, "\n");
}

/* ---- both ------------------------------------------------------------------------------------------------------ */

static ern_status render(sink *k, ern_chat_format f, const ern_chat *c) {
    if (c->continue_final) {
        const ern_chat_message *last = c->n_message ? &c->message[c->n_message - 1] : NULL;
        if (!last || last->role != ERN_ROLE_ASSISTANT || last->n_call)
            return ERN_FAIL(k->err, ERN_ERR_INPUT,
                            "the last message is to be continued, but it is not an assistant's text");
    }
    if (f == ERN_CHAT_ERNIE) {
        ERN_TRY(check_ernie(c, k->err));
        render_ernie(k, c);
    } else {
        render_thinking(k, c);
    }
    return k->status;
}

ern_status ern_chat_render(const ern_tokenizer *t, ern_chat_format f, const ern_chat *chat, ern_tokens *out,
                           ern_err *err) {
    ern_buf run;
    ern_buf_init(&run, RUN_BYTES_MAX);
    sink k = {.t = t, .ids = out, .text = &run, .err = err};
    ern_status s = render(&k, f, chat);
    if (s == ERN_OK) {
        end_run(&k);
        s = k.status;
    }
    ern_buf_free(&run);
    return s;
}

ern_status ern_chat_render_text(ern_chat_format f, const ern_chat *chat, ern_buf *out, ern_err *err) {
    sink k = {.text = out, .err = err};
    ERN_TRY(render(&k, f, chat));
    if (out->full) return ERN_FAIL(err, ERN_ERR_LIMIT, "the conversation's text is longer than %zu bytes", out->limit);
    return ERN_OK;
}
