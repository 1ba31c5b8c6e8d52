/* /tokenize and /detokenize, in vLLM's shape. */
#include <string.h>

#include "base/jsonr.h"
#include "base/jsonw.h"
#include "server/job.h"

static bool tokenize(job *j, ern_tokens *t) {
    params *p = &j->p;
    ern_server *s = j->server;
    if (p->messages) {
        if (json_array_size(p->messages) == 0)
            return api_fail(&j->error, 400, "invalid_value", "messages",
                            "messages is empty; send at least one message");
        return chat_prompt(s, p, &j->arena, t, &j->error);
    }
    if (!json_is_string(p->prompt))
        return api_fail(&j->error, 400, "missing_required_parameter", "prompt", "prompt must be a text");
    ern_err err = {0};
    if (ern_tokenizer_encode(s->tokenizer, json_string_value(p->prompt), json_string_length(p->prompt), true, t,
                             &err) == ERN_OK)
        return true;
    return api_fail(&j->error, 400, "invalid_value", "prompt", "%s", err.text);
}

static void write_tokens(job *j, const ern_tokens *t, ern_jsonw *w) {
    ern_jsonw_object(w);
    ern_jsonw_key(w, "count");
    ern_jsonw_int(w, (int64_t)t->n);
    ern_jsonw_key(w, "max_model_len");
    ern_jsonw_int(w, ern_engine_options_of(j->server->engine)->max_model_len);
    ern_jsonw_key(w, "tokens");
    ern_jsonw_array(w);
    for (size_t i = 0; i < t->n; i++) ern_jsonw_int(w, t->id[i]);
    ern_jsonw_array_end(w);
    ern_jsonw_key(w, "token_strs");
    if (j->p.return_token_strs) {
        ern_jsonw_array(w);
        for (size_t i = 0; i < t->n; i++) ern_jsonw_text(w, ern_tokenizer_name(j->server->tokenizer, t->id[i]));
        ern_jsonw_array_end(w);
    } else {
        ern_jsonw_null(w);
    }
    ern_jsonw_object_end(w);
}

static bool detokenize(job *j, ern_jsonw *w) {
    if (!fields_given(&j->p, "tokens", FIELD_DETOKENIZE))
        return api_fail(&j->error, 400, "missing_required_parameter", "tokens", "tokens is missing");
    ern_err err = {0};
    ern_buf text;
    ern_buf_init(&text, JOB_ANSWER_MAX_BYTES);
    bool ok =
        ern_tokenizer_decode(j->server->tokenizer, j->p.tokens.v, (size_t)j->p.tokens.n, false, &text, &err) == ERN_OK;
    if (ok) {
        ern_jsonw_object(w);
        ern_jsonw_key(w, "prompt");
        ern_jsonw_text_n(w, text.data ? text.data : "", text.len);
        ern_jsonw_object_end(w);
    } else {
        (void)api_fail(&j->error, 400, "invalid_value", "tokens", "%s", err.text);
    }
    ern_buf_free(&text);
    return ok;
}

void tokenize_answer(job *j) {
    unsigned where = j->kind == JOB_TOKENIZE ? FIELD_TOKENIZE : FIELD_DETOKENIZE;
    ern_server *s = j->server;
    json_t *body;
    ern_err err = {0};
    ern_jsonw w;
    ern_jsonw_init(&w, &j->chunk);
    ern_tokens t;
    ern_tokens_init(&t, (size_t)s->o.body_max_bytes + 1024);
    bool ok =
        ern_json_parse(&body, j->http->body, j->http->body_len, JOB_JSON_DEPTH, "the request body", &err) == ERN_OK;
    if (!ok) {
        (void)api_fail(&j->error, 400, "invalid_json", NULL, "%s", err.text);
    } else {
        ok = fields_read(&j->p, body, where, s->config->n_vocab, &j->arena, &j->error, server_unknown_field, s);
        if (ok && where == FIELD_TOKENIZE && (ok = tokenize(j, &t)))
            write_tokens(j, &t, &w);
        else if (ok)
            ok = detokenize(j, &w);
        json_decref(body);
    }
    job_settle(j);
    if (ok)
        http_reply(j->http, 200, "application/json", j->chunk.data, j->chunk.len);
    else
        routes_fail(j->http, &j->error);
    ern_tokens_free(&t);
}
