/* Bodies of requests. See bench_prompts.h. */
#include "cli/bench_prompts.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/counter.h"
#include "base/jsonw.h"
#include "base/os.h"
#include "cli/bench_stats.h"

enum { FILE_MAX = 1 << 30, ROWS_MAX = 1 << 20, DEPTH = 32, FIRST_ID = 10 };

/* ---- files ----------------------------------------------------------------------------------------------------- */

/* Of a ShareGPT conversation the first turn is the prompt. NULL: it has none. */
static json_t *from_conversation(const json_t *item) {
    const json_t *turn = json_array_get(json_object_get(item, "conversations"), 0);
    json_t *text = json_object_get(turn, "value");
    return json_is_string(text) ? json_pack("{sO}", "prompt", text) : NULL;
}

/* A row as it is kept, or NULL: the object has neither prompt nor messages. */
static json_t *from_object(const json_t *item) {
    json_t *prompt = json_object_get(item, "prompt"), *messages = json_object_get(item, "messages");
    json_t *most = json_object_get(item, "max_tokens");
    if (!most) most = json_object_get(item, "output_tokens");
    json_t *row = json_is_array(messages)                           ? json_pack("{sO}", "messages", messages)
                  : json_is_string(prompt) || json_is_array(prompt) ? json_pack("{sO}", "prompt", prompt)
                                                                    : from_conversation(item);
    if (row && json_is_integer(most)) (void)json_object_set(row, "max_tokens", most);
    return row;
}

static json_t *line_row(const char *text, size_t len, const char *what, int64_t number, ern_err *err) {
    json_t *item = NULL, *row = NULL;
    if (text[0] != '{') return json_pack("{ss%}", "prompt", text, len);
    if (ern_json_parse(&item, text, len, DEPTH, what, err) != ERN_OK) return NULL;
    row = from_object(item);
    json_decref(item);
    if (!row)
        (void)ERN_FAIL(err, ERN_ERR_FILE, "%.200s line %lld has neither \"prompt\" nor \"messages\"", what,
                       (long long)number);
    return row;
}

static json_t *parse_array(const char *text, size_t len, const char *what, ern_err *err) {
    json_t *list = NULL, *rows = json_array();
    if (ern_json_parse(&list, text, len, DEPTH, what, err) != ERN_OK) return json_decref(rows), NULL;
    for (size_t i = 0; i < json_array_size(list); i++) {
        json_t *row = from_object(json_array_get(list, i)); /* a conversation without a turn is passed over */
        if (row) (void)json_array_append_new(rows, row);
    }
    json_decref(list);
    return rows;
}

json_t *bench_prompts_parse(const char *text, size_t len, const char *what, ern_err *err) {
    const size_t blank = strspn(text, " \t\r\n");
    json_t *rows = NULL;
    if (text[blank] == '[') {
        rows = parse_array(text, len, what, err);
    } else {
        rows = json_array();
        int64_t number = 0;
        for (const char *at = text; rows && at < text + len;) {
            size_t n = strcspn(at, "\n");
            const char *next = at + n + 1;
            number++;
            while (n && (at[n - 1] == '\r' || at[n - 1] == ' ')) n--;
            json_t *row = n ? line_row(at, n, what, number, err) : NULL;
            at = next;
            if (n == 0) continue;
            if (!row || json_array_size(rows) == ROWS_MAX) {
                if (row) (void)ERN_FAIL(err, ERN_ERR_FILE, "%.200s holds more than %d prompts", what, ROWS_MAX);
                json_decref(row);
                json_decref(rows);
                return NULL;
            }
            (void)json_array_append_new(rows, row);
        }
    }
    if (rows && json_array_size(rows) == 0) {
        (void)ERN_FAIL(err, ERN_ERR_FILE, "%.200s holds no prompt", what);
        json_decref(rows);
        return NULL;
    }
    return rows;
}

/* ---- open and close -------------------------------------------------------------------------------------------- */

ern_status bench_prompts_open(bench_prompts *p, const options *o, const char *model, ern_err *err) {
    const char *path = options_text(o, "dataset-path");
    const bool random = strcmp(options_text(o, "dataset-name"), "random") == 0;
    *p = (bench_prompts){.chat = strstr(options_text(o, "backend"), "chat") != NULL,
                         .model = model,
                         .seed = (uint64_t)options_int(o, "seed"),
                         .n_in = (int32_t)options_int(o, "random-input-len"),
                         .n_out = (int32_t)options_int(o, "random-output-len"),
                         .n_vocab = (int32_t)options_int(o, "random-vocab"),
                         .ratio = options_real(o, "random-range-ratio"),
                         .ignore_eos = options_flag(o, "ignore-eos"),
                         .temperature = options_real(o, "temperature"),
                         .top_p = options_given(o, "top-p") ? options_real(o, "top-p") : (double)NAN,
                         .top_k = options_given(o, "top-k") ? options_int(o, "top-k") : -1};
    if (random && path)
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--dataset-path is given and --dataset-name is random; give --dataset-name file");
    if (random) return ERN_OK;
    if (!path)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--dataset-name %s needs --dataset-path", options_text(o, "dataset-name"));
    char *text = NULL;
    size_t len = 0;
    ERN_TRY(ern_file_read(&text, &len, path, FILE_MAX, err));
    p->row = bench_prompts_parse(text, len, path, err);
    free(text);
    return p->row ? ERN_OK : err->code;
}

void bench_prompts_close(bench_prompts *p) {
    json_decref(p->row);
    p->row = NULL;
}

/* ---- bodies ---------------------------------------------------------------------------------------------------- */

static void raw_json(ern_jsonw *w, const json_t *v) {
    char *text = json_dumps(v, JSON_COMPACT | JSON_ENCODE_ANY);
    ERN_ASSERT(text);
    ern_jsonw_raw(w, text, strlen(text));
    free(text);
}

static void one_message(ern_jsonw *w, const char *text, size_t len) {
    ern_jsonw_array(w);
    ern_jsonw_object(w);
    ern_jsonw_key(w, "role");
    ern_jsonw_text(w, "user");
    ern_jsonw_key(w, "content");
    ern_jsonw_text_n(w, text, len);
    ern_jsonw_object_end(w);
    ern_jsonw_array_end(w);
}

/* Ids for completions, words for chats: of ids the server counts exactly as many tokens. */
static void random_prompt(const bench_prompts *p, int64_t i, ern_jsonw *w) {
    static const char *const word[] = {"time",  "water", "city",  "light", "house", "paper", "river", "stone",
                                       "green", "seven", "under", "after", "music", "north", "table", "world"};
    const int32_t n = bench_length(p->seed, (uint64_t)(2 * i), p->n_in, p->ratio);
    const uint64_t key = ern_counter64(p->seed ^ 0x70726f6d7074u, (uint64_t)i);
    if (!p->chat) {
        ern_jsonw_array(w);
        for (int32_t k = 0; k < n; k++)
            ern_jsonw_int(w, FIRST_ID + (int64_t)(ern_counter64(key, (uint64_t)k) % (uint64_t)(p->n_vocab - FIRST_ID)));
        ern_jsonw_array_end(w);
        return;
    }
    ern_buf text;
    ern_buf_init(&text, BENCH_BODY_MAX);
    for (int32_t k = 0; k < n; k++)
        (void)ern_buf_print(&text, "%s%s", k ? " " : "", word[ern_counter64(key, (uint64_t)k) % 16]);
    one_message(w, text.data, text.len);
    ern_buf_free(&text);
}

static void row_prompt(const bench_prompts *p, const json_t *row, ern_jsonw *w) {
    const json_t *messages = json_object_get(row, "messages"), *prompt = json_object_get(row, "prompt");
    if (!p->chat && messages) /* a completion of what was said last */
        prompt = json_object_get(json_array_get(messages, json_array_size(messages) - 1), "content");
    if (p->chat && messages)
        raw_json(w, messages);
    else if (p->chat && json_is_string(prompt))
        one_message(w, json_string_value(prompt), json_string_length(prompt));
    else if (prompt)
        raw_json(w, prompt);
    else
        ern_jsonw_text(w, "");
}

void bench_prompts_body(const bench_prompts *p, int64_t i, ern_buf *out) {
    const json_t *row = p->row ? json_array_get(p->row, (size_t)i % json_array_size(p->row)) : NULL;
    const json_t *most = json_object_get(row, "max_tokens");
    ern_jsonw w;
    ern_jsonw_init(&w, out);
    ern_jsonw_object(&w);
    ern_jsonw_key(&w, "model");
    ern_jsonw_text(&w, p->model);
    ern_jsonw_key(&w, p->chat ? "messages" : "prompt");
    if (row)
        row_prompt(p, row, &w);
    else
        random_prompt(p, i, &w);
    ern_jsonw_key(&w, "max_tokens");
    ern_jsonw_int(&w, most  ? json_integer_value(most)
                      : row ? p->n_out
                            : bench_length(p->seed, (uint64_t)(2 * i + 1), p->n_out, p->ratio));
    ern_jsonw_key(&w, "temperature");
    ern_jsonw_real(&w, p->temperature);
    if (!isnan(p->top_p)) {
        ern_jsonw_key(&w, "top_p");
        ern_jsonw_real(&w, p->top_p);
    }
    if (p->top_k >= 0) {
        ern_jsonw_key(&w, "top_k");
        ern_jsonw_int(&w, p->top_k);
    }
    if (p->ignore_eos) {
        ern_jsonw_key(&w, "ignore_eos");
        ern_jsonw_bool(&w, true);
    }
    ern_jsonw_key(&w, "stream");
    ern_jsonw_bool(&w, true);
    ern_jsonw_key(&w, "stream_options");
    ern_jsonw_raw(&w, "{\"include_usage\":true}", 22);
    ern_jsonw_object_end(&w);
}
