/* docs/api.md: what the paths do, in words, and the field table as the validator has it. */
#include "server/fields.h"

static const char intro[] =
    "# The API\n"
    "\n"
    "Printed by `ernest docs api`, the fields from the server's own validator; do not edit.\n"
    "\n"
    "## Paths\n"
    "\n"
    "| path | method | |\n"
    "|---|---|---|\n"
    "| `/v1/chat/completions` | POST | chat, streaming or whole |\n"
    "| `/v1/completions` | POST | completions, streaming or whole |\n"
    "| `/v1/models`, `/v1/models/{id}` | GET | the model and its `max_model_len` |\n"
    "| `/v1/load` | GET | running, waiting and parked requests, free and cached KV blocks |\n"
    "| `/tokenize`, `/detokenize` | POST | text or messages to ids, ids to text |\n"
    "| `/health`, `/ping` | GET | 200 when well; 503 while loading (with progress), draining, failed or stalled |\n"
    "| `/metrics` | GET | Prometheus text under FastDeploy's names |\n"
    "| `/version`, `/load`, `/config-info` | GET | version; the list of API paths; the options in force |\n"
    "| `/debug/kv` | GET | the state of the KV cache; 404 without `--enable-debug-endpoints` |\n"
    "\n"
    "With `--api-key`, the `/v1` paths, `/tokenize`, `/detokenize` and `/debug/kv` need `Authorization: Bearer KEY`. A "
    "server bound "
    "to\n"
    "the local machine answers to `localhost`, `127.0.0.1`, `[::1]` and its bound address only. `X-Request-Id` comes "
    "back on\n"
    "every answer, made up when it was not sent. `X-Request-Deadline-Ms` drops a request that still waits after so "
    "many\n"
    "milliseconds (504), and refuses at once one that would have to wait longer (429).\n"
    "\n"
    "## Errors\n"
    "\n"
    "Every failure, on every status, is `{\"error\":{\"message\",\"type\",\"param\",\"code\"}}`: 400 for what a "
    "request says, 401\n"
    "without a key, 403 for a foreign host, 404 for a path or model, 405, 413 for a body over the limit, 415 for a "
    "body "
    "with a\n"
    "Content-Encoding, 429 when `--max-concurrency` or the queue is full, 503 while loading or draining, 504 for a "
    "deadline,\n"
    "500 for our own faults. A 429 and a 503 have `Retry-After` and `retry-after-ms`: for a full server the time that "
    "the prompts\n"
    "waiting now will take, from 1 to 60 seconds, spread by a fifth so that a crowd does not come back at once. The "
    "queue is full\n"
    "by `--scheduler-max-size` requests, `--max-queue-prompt-tokens`, `--max-queue-mib`, or when a request would wait "
    "longer than\n"
    "`--max-queue-wait-s`. What never becomes a request has no object: 431 "
    "for more\n"
    "than 32 KiB of headers, 400 for what is not HTTP. After a stream has begun the same object is an event, and "
    "`[DONE]`\n"
    "follows.\n"
    "\n"
    "## Streams\n"
    "\n"
    "1. Status, headers and one role chunk per choice (`content` empty) leave at admission, before the prompt is "
    "computed.\n"
    "2. Deltas hold whole characters. Chat text deltas always have `content`; reasoning comes as `reasoning_content` "
    "and, the\n"
    "   same text, as `reasoning`. `finish_reason` and `logprobs` are never absent.\n"
    "3. A tool call opens with `index`, `id`, `type`, `function.name` and empty `arguments`; more `arguments` follow.\n"
    "4. One finish chunk per choice; `tool_calls` whenever calls were sent and the reply ended by itself.\n"
    "5. A usage chunk with empty `choices` only when `stream_options` asks; then `data: [DONE]`, always, once, last.\n"
    "6. `: ping` comments when nothing was written for `--sse-ping-interval` seconds.\n"
    "7. A client that leaves frees its place at once. One that reads slowly is parked; one whose full connection takes "
    "no byte\n"
    "   for 30 seconds is closed (`end=client_stalled` in the log).\n"
    "\n"
    "## Cached prompts\n"
    "\n"
    "Full pages of 64 tokens of prompts and replies are kept, and a later request that begins the same does not "
    "compute them again\n"
    "(`--no-enable-prefix-caching` switches it off). The answer is the same with and without; only the first token "
    "comes sooner.\n"
    "\n"
    "- `usage.prompt_tokens_details.cached_tokens` says how many tokens of the prompt were found, in memory or on "
    "disk. With `n`\n"
    "  choices the prompt counts once, as in `prompt_tokens`: what the first choice to run found, not what the others "
    "found of it.\n"
    "  It is known when a choice has ended, so `continuous_usage_stats` shows 0 before.\n"
    "- Whoever can find a page can tell by the time to the first token that somebody asked the same before. With API "
    "keys, requests\n"
    "  find only pages of the same key, unless the server was started with `--share-prefix-cache-across-keys`; without "
    "keys all\n"
    "  share. `cache_salt` divides further: only requests with the same salt (and key) find one another's pages. Both "
    "hold across\n"
    "  restarts and on disk, where only a hash of them is kept.\n"
    "\n"
    "`GET /debug/kv` answers one object: `prefix_caching`, `output_caching`, `page_tokens`; `pool` with `pages` in "
    "all, "
    "`free`\n"
    "(hold nothing), `cached` (hold blocks that nobody uses now), `held` (in use); `tree` with `blocks_cached` "
    "(entered "
    "since the\n"
    "start) and `blocks_evicted`; `tiers` with `host` and `disk`, each null or `blocks`, `max_blocks`, `moved_out` "
    "(down into it),\n"
    "`moved_in` (up out of it), `evicted`, `errors`, `cached_tokens`, `off` (switched off for a minute after errors); "
    "`requests`\n"
    "with `running`, `waiting`, `loading` (wait for blocks from a tier), `parked`; `hits` with `cached_tokens` and, as "
    "parts from 0\n"
    "to 1 since the start, `request_rate`, `token_rate` and the latter by tier; `prefill_ns_per_token`.\n"
    "\n"
    "## Where this differs from FastDeploy\n"
    "\n"
    "`--strict-fastdeploy` gives the right column.\n"
    "\n"
    "| | ernest | strict |\n"
    "|---|---|---|\n"
    "| `stop` | found in the text, removed | matched as token ids, at most 5 of 8 tokens, kept in the text |\n"
    "| `max_tokens` beyond the context | 400 | cut to what is left |\n"
    "| `bad_words` of more than one token | 400 | skipped |\n"
    "| limit reached by an end token | `stop` | `length` |\n"
    "| `cached_tokens` of `n` choices | a prompt counts once | the sum over the choices |\n"
    "| thinking off for a format that always reasons | 400 | no effect |\n"
    "| role and finish deltas | OpenAI's keys | with `reasoning_content`, `tool_calls`, `content` |\n"
    "\n"
    "Always different: errors are objects with 4xx rather than 500 or `{\"detail\"}`; `temperature` 0 is the exact "
    "arg-max;\n"
    "`top_k` and `seed` are always honoured; completions send one usage event, not one per choice;\n"
    "`max_streaming_response_tokens` joins tokens in one delta; `logprobs: true` alone gives the chosen token's "
    "logprobs.\n"
    "\n"
    "## Request fields\n"
    "\n"
    "`null` counts as absent. Unknown fields are accepted and logged once per name. A value of another type or outside "
    "its\n"
    "range, a key given twice, a lone surrogate, or JSON nested deeper than 64 levels is a 400. Fields marked \"not "
    "built\n"
    "yet\" are answered with a 400 that says so, never ignored.\n";

static void write_type(ern_buf *out, const field *f) {
    static const char *const name[] = {"boolean",     "integer", "number", "text", "text or list of texts",
                                       "list of ids", "object",  "list",   "any",  "not built yet",
                                       "accepted"};
    (void)ern_buf_text(out, name[f->type]);
    if (f->type == FIELD_INT && f->min <= -0x1p63)
        (void)ern_buf_text(out, ", 64 bits");
    else if (f->type == FIELD_INT && f->max >= FIELD_TOKENS_MAX)
        (void)ern_buf_print(out, ", from %.0f", f->min);
    else if (f->type == FIELD_INT)
        (void)ern_buf_print(out, ", %.0f to %.0f", f->min, f->max);
    if (f->type == FIELD_REAL)
        (void)ern_buf_print(out, ", %s %g to %g", f->above_min ? "above" : "from", f->min, f->max);
    if (f->max_count) (void)ern_buf_print(out, ", at most %d", f->max_count);
    if (f->max_bytes) (void)ern_buf_print(out, ", %d bytes%s", f->max_bytes, f->type == FIELD_TEXTS ? " each" : "");
}

void fields_write_docs(ern_buf *out) {
    static const struct {
        unsigned where;
        const char *title;
    } part[] = {{FIELD_CHAT, "POST /v1/chat/completions"},
                {FIELD_COMPLETION, "POST /v1/completions"},
                {FIELD_STREAM_OPTIONS, "stream_options"},
                {FIELD_TOKENIZE, "POST /tokenize"},
                {FIELD_DETOKENIZE, "POST /detokenize"}};
    int n;
    const field *table = field_table(&n);
    (void)ern_buf_text(out, intro);
    for (size_t k = 0; k < sizeof part / sizeof part[0]; k++) {
        (void)ern_buf_print(out, "\n### %s\n\n| field | value | default | |\n|---|---|---|---|\n", part[k].title);
        for (int i = 0; i < n; i++) {
            const field *f = &table[i];
            if (!(f->where & part[k].where)) continue;
            (void)ern_buf_print(out, "| `%s` | ", f->name);
            write_type(out, f);
            (void)ern_buf_print(out, " | %s | %s |\n", f->deflt, f->about);
        }
    }
}
