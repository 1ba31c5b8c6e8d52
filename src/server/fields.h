/* The one validator of everything a request body may say (docs/api.md is printed from the same table).
 *
 * Every field is one row: name, endpoints, type, range, counts, bytes, default, what it does. No other code looks at
 * the raw JSON of a scalar field; the few compound ones (messages, prompt, tools, logit_bias, ...) are checked for
 * shape and size here and read by request.c. Boundary tests iterate the rows. Owner: texts and JSON values in `params`
 * are borrowed from the parsed body; lists live in the request's arena. */
#ifndef ERN_SERVER_FIELDS_H
#define ERN_SERVER_FIELDS_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/arena.h"
#include "base/buf.h"
#include "base/status.h"
#include "server/api_error.h"

#define FIELD_TOKENS_MAX 2147483647.0 /* a count of tokens: bounded by the context, elsewhere */

/* Where a field may appear. */
enum {
    FIELD_CHAT = 1,
    FIELD_COMPLETION = 2,
    FIELD_TOKENIZE = 4,
    FIELD_DETOKENIZE = 8,
    FIELD_STREAM_OPTIONS = 16, /* inside stream_options */
    FIELD_BOTH = FIELD_CHAT | FIELD_COMPLETION,
};

typedef enum field_type {
    FIELD_BOOL,
    FIELD_INT,    /* an integral number; 5.0 is 5 */
    FIELD_REAL,   /* a finite number */
    FIELD_TEXT,   /* at most max_bytes */
    FIELD_TEXTS,  /* one text or a list of at most max_count */
    FIELD_IDS,    /* token ids in [0, vocabulary) */
    FIELD_OBJECT, /* at most max_count keys */
    FIELD_ARRAY,  /* at most max_count items */
    FIELD_ANY,
    FIELD_NOT_BUILT, /* known; anything but null is a 400 that says so */
    FIELD_IGNORED,   /* known; has no effect here, by design (the text says why) */
} field_type;

typedef struct text_view {
    const char *s; /* NULL: absent */
    size_t n;
} text_view;
typedef struct text_list {
    const text_view *v; /* [n] */
    int n;
} text_list;
typedef struct id_list {
    const int32_t *v; /* [n] */
    int n;
} id_list;

/* What a body said. Absent numbers hold their default; `given` tells apart where that matters. */
typedef struct params {
    json_t *messages, *prompt, *prompt_token_ids, *suffix, *metadata, *stream_options, *logit_bias,
        *logits_processors_args, *response_format, *tools, *tool_choice, *chat_template_kwargs;
    text_view model, request_id, user, reasoning_effort, cache_salt;
    text_list stop, bad_words;
    id_list stop_token_ids, bad_words_token_ids, allowed_token_ids, completion_token_ids, tokens;
    int64_t max_tokens, max_completion_tokens; /* -1: absent */
    int64_t n, best_of, top_k, seed, min_tokens, top_logprobs, logprobs_n, prompt_logprobs, reasoning_max_tokens,
        response_max_tokens, max_streaming_response_tokens, priority, sse_ping_interval;
    double temperature, top_p, min_p, frequency_penalty, presence_penalty, repetition_penalty; /* NaN: absent */
    bool stream, echo, include_usage, continuous_usage_stats, logprobs, include_stop_str_in_output,
        include_logprobs_decode_token, include_draft_logprobs, temp_scaled_logprobs, top_p_normalized_logprobs,
        disable_chat_template, return_token_ids, ignore_eos, skip_special_tokens, enable_thinking,
        add_generation_prompt, continue_final_message, return_token_strs, parallel_tool_calls;
    uint8_t given[128]; /* by field_index */
} params;

typedef struct field {
    const char *name;
    unsigned where;
    field_type type;
    size_t offset;     /* into params */
    double min, max;   /* FIELD_INT, FIELD_REAL, inclusive; INT rows at +-2^63 mean the whole int64 */
    bool above_min;    /* min itself is refused */
    int32_t max_count; /* lists, objects, arrays */
    int32_t max_bytes; /* one text */
    const char *deflt; /* as documentation prints it; "" : absent */
    const char *about;
} field;

/* The table. */
const field *field_table(int *n);
/* Row of a name at an endpoint, or NULL. */
const field *field_find(const char *name, unsigned where);

typedef void field_unknown_fn(void *ud, const char *name);

/* Read a body. Merges `metadata` (chat) and an object `suffix` (completions) as FastDeploy does: their keys count as
 * fields unless the body names them itself. Unknown names go to `unknown`.
 * Errors: e->param names the field; 400. n_vocab bounds token ids. */
ERN_MUST_CHECK bool fields_read(params *p, json_t *body, unsigned where, int32_t n_vocab, ern_arena *a, api_error *e,
                                field_unknown_fn *unknown, void *ud);
bool fields_given(const params *p, const char *name, unsigned where);
/* A JSON array of token ids into the arena. `param` names it in errors. */
ERN_MUST_CHECK bool fields_ids(id_list *out, json_t *v, const char *param, int32_t max_count, int32_t n_vocab,
                               ern_arena *a, api_error *e);

/* api_docs.c: docs/api.md, Markdown. */
void fields_write_docs(ern_buf *out);

#endif
