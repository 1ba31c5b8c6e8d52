/* The field table and its reader. See fields.h. */
#include "server/fields.h"

#include <math.h>
#include <string.h>

#include "base/status.h"

#define AT(member) offsetof(params, member)
/* Compact rows; the last two strings are default and description. */
#define BOOL(name, where, member, deflt, about) \
    { name, where, FIELD_BOOL, AT(member), 0, 0, false, 0, 0, deflt, about }
#define INT(name, where, member, lo, hi, deflt, about) \
    { name, where, FIELD_INT, AT(member), lo, hi, false, 0, 0, deflt, about }
#define REAL(name, where, member, lo, hi, deflt, about) \
    { name, where, FIELD_REAL, AT(member), lo, hi, false, 0, 0, deflt, about }
#define TEXT(name, where, member, bytes, about) \
    { name, where, FIELD_TEXT, AT(member), 0, 0, false, 0, bytes, "", about }
#define TEXTS(name, where, member, count, bytes, about) \
    { name, where, FIELD_TEXTS, AT(member), 0, 0, false, count, bytes, "[]", about }
#define IDS(name, where, member, count, about) \
    { name, where, FIELD_IDS, AT(member), 0, 0, false, count, 0, "[]", about }
#define JSON(name, where, type, member, count, about) \
    { name, where, type, AT(member), 0, 0, false, count, 0, "", about }
#define KNOWN(name, where, type, about) \
    { name, where, type, 0, 0, 0, false, 0, 0, "", about }

enum { C = FIELD_CHAT, P = FIELD_COMPLETION, CP = FIELD_BOTH, T = FIELD_TOKENIZE, D = FIELD_DETOKENIZE };

static const field table[] = {
    JSON("messages", C | T, FIELD_ARRAY, messages, 4096,
         "The conversation. Roles system, developer (taken as system), user, assistant, tool. `content` is a text or a "
         "list of text parts, which are joined; other parts are refused. System messages are joined and moved to the "
         "front. May be empty when `prompt_token_ids` is given."),
    JSON("prompt", P | T, FIELD_ANY, prompt, 0,
         "A text, a list of texts, a list of token ids, or a list of such lists (at most 128 prompts). Special tokens "
         "by name in a text are those tokens. Nothing is put in front."),
    JSON("prompt_token_ids", CP, FIELD_ARRAY, prompt_token_ids, 2097152,
         "Token ids instead of text; for completions also a list of lists."),
    TEXT("model", CP | T | D, model, 1024,
         "Any name is served when the server was started without `--served-model-name`; otherwise that name or "
         "`default`, else 404."),
    INT("max_tokens", C, max_tokens, 1, FIELD_TOKENS_MAX, "",
        "Most tokens of the reply. Together with the prompt it must fit the context, else 400 (clamped under "
        "`--strict-fastdeploy`). Absent: what is left of the context."),
    INT("max_tokens", P, max_tokens, 0, FIELD_TOKENS_MAX, "",
        "As for chat; 0 only with `echo`, to score the prompt. Absent: what is left of the context."),
    INT("max_completion_tokens", C, max_completion_tokens, 1, FIELD_TOKENS_MAX, "", "Wins over `max_tokens`."),
    INT("n", CP, n, 1, 128, "1", "Choices per prompt. Choice k uses the same seed and its own number k."),
    INT("best_of", P, best_of, 1, 128, "n", "Accepted when equal to `n`; anything else is 400."),
    BOOL("echo", P, echo, "false", "Put the prompt's text in front; with `logprobs`, its logprobs too."),
    JSON("suffix", P, FIELD_OBJECT, suffix, 64,
         "FastDeploy's meaning: an object whose keys are merged into the request. A text (fill-in) is refused."),
    BOOL("stream", CP, stream, "false", "Answer as server-sent events."),
    JSON("stream_options", CP, FIELD_OBJECT, stream_options, 16, "Only with `stream: true`."),
    BOOL("include_usage", FIELD_STREAM_OPTIONS, include_usage, "true when the object is present",
         "One more event with empty `choices` and `usage`, before `[DONE]`."),
    BOOL("continuous_usage_stats", FIELD_STREAM_OPTIONS, continuous_usage_stats, "false", "`usage` in every event."),
    REAL("temperature", CP, temperature, 0, 2, "generation_config.json, else 1",
         "0 (or below 1e-5) is the exact arg-max, ties to the lowest id."),
    REAL("top_p", CP, top_p, 0, 1, "generation_config.json, else 0.7", "1 is off; 0 (or below 1e-5) is the arg-max."),
    INT("top_k", CP, top_k, -1, FIELD_TOKENS_MAX, "generation_config.json, else off",
        "0 and -1 are off. Always honoured."),
    REAL("min_p", CP, min_p, 0, 1, "0", "Drops tokens less likely than min_p times the best."),
    REAL("frequency_penalty", CP, frequency_penalty, -2, 2, "generation_config.json, else 0", ""),
    REAL("presence_penalty", CP, presence_penalty, -2, 2, "generation_config.json, else 0", ""),
    {"repetition_penalty", CP, FIELD_REAL, AT(repetition_penalty), 0, 10, true, 0, 0, "generation_config.json, else 1",
     "Over prompt and reply."},
    INT("seed", CP, seed, -0x1p63, 0x1p63, "drawn from the server's seed",
        "Any 64-bit integer. Same request, same seed: same tokens."),
    TEXTS("stop", CP, stop, 16, 1024,
          "Texts that end the reply. Found in the text however it was tokenised, and removed. Under "
          "`--strict-fastdeploy`: at most 5 of at most 8 tokens, matched as token ids, and kept in the text."),
    IDS("stop_token_ids", CP, stop_token_ids, 48, "Token ids that end the reply."),
    BOOL("include_stop_str_in_output", CP, include_stop_str_in_output, "false",
         "Keep the stop text, or the text of the stop token."),
    INT("min_tokens", CP, min_tokens, 0, FIELD_TOKENS_MAX, "0",
        "Stop ids are not sampled before; at most `max_tokens`."),
    TEXTS("bad_words", CP, bad_words, 256, 256,
          "Texts never sampled, with and without a blank in front; each must be one token in one of the two forms."),
    IDS("bad_words_token_ids", CP, bad_words_token_ids, 448, "Token ids never sampled."),
    JSON("logit_bias", CP, FIELD_OBJECT, logit_bias, 1024,
         "Token id (as a text) to a number in [-100, 100] added to its logit."),
    JSON("logits_processors_args", CP, FIELD_OBJECT, logits_processors_args, 16,
         "FastDeploy's spelling; the key `logit_bias` in it is taken, others are refused."),
    IDS("allowed_token_ids", CP, allowed_token_ids, 2097152, "Nothing but these ids is sampled."),
    BOOL("ignore_eos", CP, ignore_eos, "false", "The model's own end tokens do not end the reply."),
    BOOL("skip_special_tokens", CP, skip_special_tokens, "true", "Special tokens leave no text."),
    BOOL("logprobs", C, logprobs, "false", "Logprobs of the reply's tokens."),
    INT("top_logprobs", C, top_logprobs, -1, 20, "0",
        "The most likely tokens beside the sampled one; needs `logprobs: true`; at most the server's "
        "`--max-logprobs`."),
    INT("logprobs", P, logprobs_n, -1, 20, "", "Logprobs of the reply's tokens and so many of the most likely ones."),
    INT("prompt_logprobs", CP, prompt_logprobs, -1, 20, "",
        "Logprobs of the prompt's tokens, so many per position; prompt tokens times (this + 1) must not pass 400000."),
    BOOL("include_logprobs_decode_token", CP, include_logprobs_decode_token, "true",
         "false: logprobs name tokens as `token_id:N`."),
    BOOL("include_draft_logprobs", CP, include_draft_logprobs, "false",
         "Logprobs of draft tokens; always null, as nothing is drafted."),
    BOOL("temp_scaled_logprobs", CP, temp_scaled_logprobs, "false", "Logprobs after division by the temperature."),
    BOOL("top_p_normalized_logprobs", CP, top_p_normalized_logprobs, "false", "Logprobs renormalised in the nucleus."),
    JSON("response_format", CP, FIELD_OBJECT, response_format, 16,
         "`{\"type\":\"text\"}`. The guided types are known and not built yet: 400."),
    KNOWN("guided_json", CP, FIELD_NOT_BUILT, "guided decoding"),
    KNOWN("guided_regex", CP, FIELD_NOT_BUILT, "guided decoding"),
    KNOWN("guided_choice", CP, FIELD_NOT_BUILT, "guided decoding"),
    KNOWN("guided_grammar", CP, FIELD_NOT_BUILT, "guided decoding"),
    KNOWN("structural_tag", CP, FIELD_NOT_BUILT, "guided decoding"),
    KNOWN("structured_outputs", CP, FIELD_NOT_BUILT, "guided decoding"),
    JSON("tools", C, FIELD_ARRAY, tools, 128, "Function tools; for chat formats that know tools, else 400."),
    JSON("tool_choice", C, FIELD_ANY, tool_choice, 0,
         "`none` or `auto`. `required` and a named function need guided decoding: 400."),
    BOOL("parallel_tool_calls", C, parallel_tool_calls, "true",
         "false: calls after the first one are dropped from the answer."),
    KNOWN("functions", C, FIELD_NOT_BUILT, "the old form of tools; send `tools`"),
    KNOWN("function_call", C, FIELD_NOT_BUILT, "the old form of tool_choice; send `tool_choice`"),
    KNOWN("chat_template", C, FIELD_NOT_BUILT, "a template in a request; formats are built in"),
    JSON("chat_template_kwargs", C | T, FIELD_OBJECT, chat_template_kwargs, 16,
         "`enable_thinking` and `options.thinking_mode`; other keys are refused."),
    BOOL("enable_thinking", C, enable_thinking, "as the model", "The same as in `chat_template_kwargs`."),
    BOOL("disable_chat_template", C, disable_chat_template, "false",
         "The prompt is the first message's content, verbatim."),
    INT("reasoning_max_tokens", C, reasoning_max_tokens, 0, FIELD_TOKENS_MAX, "",
        "Not built yet for formats that reason (400); the others have no reasoning to bound."),
    INT("response_max_tokens", C, response_max_tokens, 1, FIELD_TOKENS_MAX, "", "Most tokens after the reasoning."),
    TEXT("reasoning_effort", C, reasoning_effort, 16,
         "`none` asks for no reasoning; low, medium, high change nothing."),
    BOOL("return_token_ids", CP, return_token_ids, "false", "Fill the token id and raw text fields of the answer."),
    IDS("completion_token_ids", C, completion_token_ids, 2097152, "Ids put after the prompt, to go on from."),
    INT("max_streaming_response_tokens", CP, max_streaming_response_tokens, 1, 256, "1",
        "Tokens gathered in one event."),
    TEXT("user", CP, user, 256, "Part of the answer's id."),
    TEXT("request_id", CP, request_id, 256, "The answer's id; refused while another request with it is alive."),
    JSON("metadata", C, FIELD_OBJECT, metadata, 64,
         "FastDeploy's meaning: its keys are fields, unless the body names them itself. `raw_request` is refused."),
    KNOWN("metadata", P, FIELD_IGNORED, "Has no effect, as in FastDeploy."),
    INT("priority", CP, priority, -2147483648.0, 2147483647.0, "0", "Lower runs first."),
    INT("sse_ping_interval", CP, sse_ping_interval, 0, 3600, "--sse-ping-interval",
        "Seconds of silence before a comment on the stream; 0: none."),
    BOOL("add_generation_prompt", C | T, add_generation_prompt, "true", "Open the assistant's turn."),
    BOOL("continue_final_message", C | T, continue_final_message, "false",
         "The last message is the assistant's and goes on."),
    TEXT("cache_salt", CP, cache_salt, 256,
         "Cached prompts are found only by requests with the same text here (and, unless "
         "`--share-prefix-cache-across-keys` is on, the same API key). Empty is absent."),
    KNOWN("disaggregate_info", CP, FIELD_NOT_BUILT, "disaggregated prefill and decode"),
    KNOWN("collect_metrics", CP, FIELD_IGNORED, "Per-request timings are in /metrics; answers carry none."),
    KNOWN("trace_context", CP, FIELD_IGNORED, "No tracing."),
    KNOWN("add_special_tokens", CP | T, FIELD_IGNORED, "ERNIE's tokenizer adds none."),
    KNOWN("spaces_between_special_tokens", CP, FIELD_IGNORED, "The tokenizer puts none."),
    BOOL("return_token_strs", T, return_token_strs, "false", "The pieces' names too."),
    IDS("tokens", D, tokens, 2097152, "The ids to decode. Required."),
};

enum { N_FIELD = sizeof table / sizeof table[0] };
_Static_assert(N_FIELD <= sizeof((params *)0)->given, "params.given has a byte per field");

const field *field_table(int *n) {
    *n = N_FIELD;
    return table;
}

const field *field_find(const char *name, unsigned where) {
    for (int i = 0; i < N_FIELD; i++) {
        if ((table[i].where & where) && strcmp(table[i].name, name) == 0) return &table[i];
    }
    return NULL;
}

bool fields_given(const params *p, const char *name, unsigned where) {
    const field *f = field_find(name, where);
    ERN_ASSERT(f != NULL);
    return p->given[f - table] != 0;
}

/* ---- one value ------------------------------------------------------------------------------------------------- */

static const char *kind_of(const json_t *v) {
    switch (json_typeof(v)) {
    case JSON_OBJECT: return "an object";
    case JSON_ARRAY: return "a list";
    case JSON_STRING: return "a text";
    case JSON_INTEGER: return "an integer";
    case JSON_REAL: return "a number";
    case JSON_TRUE:
    case JSON_FALSE: return "a boolean";
    case JSON_NULL: break;
    }
    return "null";
}

static bool wrong_type(const char *name, const char *want, const json_t *v, api_error *e) {
    return api_fail(e, 400, "invalid_value", name, "%s must be %s, not %s", name, want, kind_of(v));
}

/* 5 and 5.0 are integers; 5.5 and 1e300 are not. */
static bool as_int(const json_t *v, int64_t *out) {
    if (json_is_integer(v)) {
        *out = json_integer_value(v);
        return true;
    }
    if (!json_is_real(v)) return false;
    double d = json_real_value(v);
    if (!(fabs(d) <= 0x1p53) || d != floor(d)) return false;
    *out = (int64_t)d;
    return true;
}

static bool read_int(const field *f, const json_t *v, int64_t *out, api_error *e) {
    int64_t i;
    if (!as_int(v, &i)) return wrong_type(f->name, "an integer", v, e);
    bool whole = f->min <= -0x1p63 && f->max >= 0x1p63;
    if (!whole && ((double)i < f->min || (double)i > f->max))
        return api_fail(e, 400, "invalid_value", f->name, "%s must be from %.0f to %.0f, not %lld", f->name, f->min,
                        f->max, (long long)i);
    *out = i;
    return true;
}

static bool read_real(const field *f, const json_t *v, double *out, api_error *e) {
    if (!json_is_number(v)) return wrong_type(f->name, "a number", v, e);
    double d = json_number_value(v);
    if (!isfinite(d) || d < f->min || d > f->max || (f->above_min && d <= f->min))
        return api_fail(e, 400, "invalid_value", f->name, "%s must be %s %g and at most %g, not %g", f->name,
                        f->above_min ? "above" : "at least", f->min, f->max, d);
    *out = d;
    return true;
}

static bool read_text(const field *f, const json_t *v, text_view *out, api_error *e) {
    if (!json_is_string(v)) return wrong_type(f->name, "a text", v, e);
    *out = (text_view){json_string_value(v), json_string_length(v)};
    if (out->n > (size_t)f->max_bytes)
        return api_fail(e, 400, "invalid_value", f->name, "%s must be at most %d bytes, not %zu", f->name, f->max_bytes,
                        out->n);
    return true;
}

static bool read_texts(const field *f, json_t *v, text_list *out, ern_arena *a, api_error *e) {
    bool one = json_is_string(v);
    if (!one && !json_is_array(v)) return wrong_type(f->name, "a text or a list of texts", v, e);
    size_t n = one ? 1 : json_array_size(v);
    if (n > (size_t)f->max_count)
        return api_fail(e, 400, "invalid_value", f->name, "%s must have at most %d texts, not %zu", f->name,
                        f->max_count, n);
    text_view *list = ERN_ARENA_NEW(a, text_view, n);
    if (!list) return api_fail(e, 413, "request_too_large", f->name, "%s does not fit this request's memory", f->name);
    for (size_t i = 0; i < n; i++) {
        const json_t *item = one ? v : json_array_get(v, i);
        if (!json_is_string(item)) return wrong_type(f->name, "a text or a list of texts", item, e);
        if (json_string_length(item) == 0)
            return api_fail(e, 400, "invalid_value", f->name, "%s must not hold an empty text", f->name);
        if (!read_text(f, item, &list[i], e)) return false;
    }
    *out = (text_list){list, (int)n};
    return true;
}

bool fields_ids(id_list *out, json_t *v, const char *param, int32_t max_count, int32_t n_vocab, ern_arena *a,
                api_error *e) {
    if (!json_is_array(v)) return wrong_type(param, "a list of token ids", v, e);
    size_t n = json_array_size(v);
    if (n > (size_t)max_count)
        return api_fail(e, 400, "invalid_value", param, "%s must have at most %d ids, not %zu", param, max_count, n);
    int32_t *id = ERN_ARENA_NEW(a, int32_t, n);
    if (!id) return api_fail(e, 413, "request_too_large", param, "%s does not fit this request's memory", param);
    for (size_t i = 0; i < n; i++) {
        const json_t *item = json_array_get(v, i);
        int64_t x;
        if (!as_int(item, &x)) return wrong_type(param, "a list of token ids", item, e);
        if (x < 0 || x >= n_vocab)
            return api_fail(e, 400, "invalid_value", param, "%s: id %lld is outside the vocabulary of %d", param,
                            (long long)x, n_vocab);
        id[i] = (int32_t)x;
    }
    *out = (id_list){id, (int)n};
    return true;
}

static bool read_json(const field *f, json_t *v, json_t **out, api_error *e) {
    if (f->type == FIELD_OBJECT && !json_is_object(v)) return wrong_type(f->name, "an object", v, e);
    if (f->type == FIELD_ARRAY && !json_is_array(v)) return wrong_type(f->name, "a list", v, e);
    size_t n = json_is_object(v) ? json_object_size(v) : json_array_size(v);
    if (f->type != FIELD_ANY && n > (size_t)f->max_count)
        return api_fail(e, 400, "invalid_value", f->name, "%s must have at most %d entries, not %zu", f->name,
                        f->max_count, n);
    *out = v;
    return true;
}

static bool read_field(params *p, const field *f, json_t *v, int32_t n_vocab, ern_arena *a, api_error *e) {
    void *at = (char *)p + f->offset;
    p->given[f - table] = 1;
    switch (f->type) {
    case FIELD_BOOL:
        if (!json_is_boolean(v)) return wrong_type(f->name, "true or false", v, e);
        *(bool *)at = json_is_true(v);
        return true;
    case FIELD_INT: return read_int(f, v, at, e);
    case FIELD_REAL: return read_real(f, v, at, e);
    case FIELD_TEXT: return read_text(f, v, at, e);
    case FIELD_TEXTS: return read_texts(f, v, at, a, e);
    case FIELD_IDS: return fields_ids(at, v, f->name, f->max_count, n_vocab, a, e);
    case FIELD_OBJECT:
    case FIELD_ARRAY:
    case FIELD_ANY: return read_json(f, v, at, e);
    case FIELD_NOT_BUILT:
        return api_fail(e, 400, "unsupported_value", f->name, "%s is not built yet (%s); leave it out", f->name,
                        f->about);
    case FIELD_IGNORED: return true;
    }
    return true;
}

/* ---- a body ---------------------------------------------------------------------------------------------------- */

static void defaults(params *p) {
    *p = (params){.max_tokens = -1,
                  .max_completion_tokens = -1,
                  .n = 1,
                  .best_of = -1,
                  .top_k = -1,
                  .top_logprobs = -1,
                  .logprobs_n = -1,
                  .prompt_logprobs = -1,
                  .reasoning_max_tokens = -1,
                  .response_max_tokens = -1,
                  .max_streaming_response_tokens = 1,
                  .sse_ping_interval = -1,
                  .temperature = (double)NAN,
                  .top_p = (double)NAN,
                  .min_p = 0,
                  .frequency_penalty = (double)NAN,
                  .presence_penalty = (double)NAN,
                  .repetition_penalty = (double)NAN,
                  .include_logprobs_decode_token = true,
                  .skip_special_tokens = true,
                  .enable_thinking = true,
                  .add_generation_prompt = true,
                  .parallel_tool_calls = true};
}

/* Fields of one object. With `over`, keys that `over` names itself are skipped: explicit fields win. */
static bool read_object(params *p, json_t *o, json_t *over, unsigned where, int32_t n_vocab, ern_arena *a, api_error *e,
                        field_unknown_fn *unknown, void *ud) {
    const char *key;
    json_t *v;
    json_object_foreach(o, key, v) {
        const json_t *mine = over ? json_object_get(over, key) : NULL;
        if (json_is_null(v) || (mine && !json_is_null(mine))) continue;
        const field *f = field_find(key, where);
        if (over && (strcmp(key, "metadata") == 0 || strcmp(key, "suffix") == 0)) f = NULL;
        if (!f) {
            if (unknown) unknown(ud, key);
            continue;
        }
        if (!read_field(p, f, v, n_vocab, a, e)) return false;
    }
    return true;
}

bool fields_read(params *p, json_t *body, unsigned where, int32_t n_vocab, ern_arena *a, api_error *e,
                 field_unknown_fn *unknown, void *ud) {
    defaults(p);
    e->status = 0;
    if (!json_is_object(body))
        return api_fail(e, 400, "invalid_value", NULL, "the request body must be a JSON object, not %s", kind_of(body));
    if (!read_object(p, body, NULL, where, n_vocab, a, e, unknown, ud)) return false;
    json_t *more = where == FIELD_CHAT ? p->metadata : where == FIELD_COMPLETION ? p->suffix : NULL;
    if (more) {
        if (where == FIELD_CHAT && json_object_get(more, "raw_request"))
            return api_fail(e, 400, "invalid_value", "metadata", "metadata must not hold raw_request");
        if (!read_object(p, more, body, where, n_vocab, a, e, unknown, ud)) return false;
    }
    if (p->stream_options) {
        if (!p->stream) return api_fail(e, 400, "invalid_value", "stream_options", "stream_options needs stream: true");
        p->include_usage = true;
        if (!read_object(p, p->stream_options, NULL, FIELD_STREAM_OPTIONS, n_vocab, a, e, unknown, ud)) return false;
    }
    return true;
}
