/* The door of `text`: bytes to tokens and back, chat formats, streaming decode, stop strings, reply parsing.
 *
 * Hides: SentencePiece, ERNIE's rules on top of it, the chat formats, Aho-Corasick. No tensor, no request, no socket.
 * Owner: the server opens one ern_tokenizer for the process; the per-stream objects belong to one stream each.
 * Thread: an open ern_tokenizer is read-only and may be used from any thread; per-stream objects are not shared. */
#ifndef ERN_TEXT_TEXT_H
#define ERN_TEXT_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/status.h"

/* ---- tokens ---------------------------------------------------------------------------------------------------- */

/* A growing array of token ids with a hard limit. Owner: the struct's owner, ern_tokens_free. */
typedef struct ern_tokens {
    int32_t *id; /* [n] */
    size_t n, cap;
    size_t limit; /* most ids it will hold; an append past it sets `full` and is dropped */
    bool full;
} ern_tokens;

void ern_tokens_init(ern_tokens *t, size_t limit);
bool ern_tokens_add(ern_tokens *t, int32_t id);
void ern_tokens_free(ern_tokens *t);

/* ---- tokenizer ------------------------------------------------------------------------------------------------- */

typedef struct ern_tokenizer ern_tokenizer;

/* Open the tokenizer of a model folder (tokenizer.model, spm.model or ernie_token_100k.model; then added_tokens.json,
 * special_tokens_map.json and tokenizer_config.json where present). `path` may also be a SentencePiece file itself.
 * The SentencePiece protobuf is checked by our own bounded reader before the library sees it.
 * Errors: ERN_ERR_FILE naming the file and what is wrong. Source: docs/model.md 5. */
ERN_MUST_CHECK ern_status ern_tokenizer_open(ern_tokenizer **out, const char *path, ern_err *err);
void ern_tokenizer_close(ern_tokenizer *t); /* NULL is fine */

/* Ids that mean something: SentencePiece pieces and added tokens. Ids from here to the embedding's rows are unused. */
int32_t ern_tokenizer_n_token(const ern_tokenizer *t);
/* Id of a piece or added token by its exact name ("<|im_end|>", "<0x0A>", "▁a"), or -1. */
int32_t ern_tokenizer_id(const ern_tokenizer *t, const char *name);
/* The piece's name as the tokenizer spells it ("▁is", "<0x0A>"); "" for ids that mean nothing. Static for t's life. */
const char *ern_tokenizer_name(const ern_tokenizer *t, int32_t id);
/* Control or added token: decodes to its literal name, or to nothing when specials are skipped. The tags that replies
 * are made of (<think>, <response>, <tool_call> and their ends) are never special: ern_reply reads them in the text. */
bool ern_tokenizer_is_special(const ern_tokenizer *t, int32_t id);
/* The bytes one id adds to the text: "▁" is a space, a byte piece is one byte (perhaps half a character), a special its
 * name, an unused id nothing. *len may be 0. Static for t's life. */
const char *ern_tokenizer_bytes(const ern_tokenizer *t, int32_t id, size_t *len);
int32_t ern_tokenizer_bos(const ern_tokenizer *t); /* <s>, -1 if none */
int32_t ern_tokenizer_eos(const ern_tokenizer *t); /* </s>, -1 if none */

/* Append the ids of UTF-8 text. With parse_special the names of special and added tokens in the text become those
 * tokens (completion prompts, as FastDeploy does); without it they are ordinary text whatever they spell (chat).
 * Nothing is prepended or appended. O(n log n). Errors: ERN_ERR_INPUT for invalid UTF-8, ERN_ERR_LIMIT when out->limit
 * is passed. */
ERN_MUST_CHECK ern_status ern_tokenizer_encode(const ern_tokenizer *t, const char *text, size_t len, bool parse_special,
                                               ern_tokens *out, ern_err *err);
/* Append the text of n ids; invalid UTF-8 becomes U+FFFD. Ids out of range: ERN_ERR_INPUT naming the id and the range.
 */
ERN_MUST_CHECK ern_status ern_tokenizer_decode(const ern_tokenizer *t, const int32_t *id, size_t n, bool skip_special,
                                               ern_buf *out, ern_err *err);

/* ---- streaming decode ------------------------------------------------------------------------------------------ */

/* Bytes of a character that is not whole yet. Plain data; zero it to start. */
typedef struct ern_decode {
    char held[4];
    int n_held;
} ern_decode;

/* Append to out the text that one more id completes: whole characters only. The concatenation over a reply, with the
 * flush, equals ern_tokenizer_decode of all its ids byte for byte. */
void ern_decode_token(ern_decode *d, const ern_tokenizer *t, int32_t id, bool skip_special, ern_buf *out);
/* The end: U+FFFD for what never became a character. */
void ern_decode_flush(ern_decode *d, ern_buf *out);

/* ---- stop strings ---------------------------------------------------------------------------------------------- */

/* Finds the first occurrence of any stop string in a stream of text, holding back what might begin one. First is the
 * one whose last byte comes first; of those that end there, the longest; of equals, the first given: a rule that does
 * not depend on how the text is cut. Aho-Corasick: O(1) per byte. At most 16 strings of 1..1024 bytes (the API's
 * validator refuses more). */
typedef struct ern_stop ern_stop;

ERN_MUST_CHECK ern_status ern_stop_open(ern_stop **out, const char *const *text, const size_t *len, int n,
                                        ern_err *err);
void ern_stop_close(ern_stop *s);
/* Feed text; append to out what is certainly before any stop string. Returns the index of the string found (the text
 * from its start on is dropped, or kept through its end when keep is set; later feeds return the same) or -1. */
int ern_stop_feed(ern_stop *s, const char *text, size_t len, bool keep, ern_buf *out);
/* The reply ended: append what was held back. */
void ern_stop_flush(ern_stop *s, ern_buf *out);

/* ---- chat ------------------------------------------------------------------------------------------------------ */

typedef enum ern_role { ERN_ROLE_SYSTEM, ERN_ROLE_USER, ERN_ROLE_ASSISTANT, ERN_ROLE_TOOL } ern_role;

typedef struct ern_tool_call {
    const char *name;      /* NUL-ended UTF-8 */
    const char *arguments; /* a JSON object as text */
} ern_tool_call;

/* One message; content may hold NUL bytes, hence the length. All borrowed. */
typedef struct ern_chat_message {
    ern_role role;
    const char *content; /* "" when there is none */
    size_t content_len;
    const ern_tool_call *call; /* [n_call] */
    int n_call;
} ern_chat_message;

typedef struct ern_chat {
    const ern_chat_message *message; /* [n_message] in order */
    int n_message;
    const char *const *tool; /* [n_tool] each tool as Python's json.dumps(ensure_ascii=False) would print it */
    int n_tool;
    bool add_generation_prompt;
    bool continue_final; /* the last message is an assistant's, left open for the model to go on */
} ern_chat;

/* The formats of docs/model.md 6. */
typedef enum ern_chat_format {
    ERN_CHAT_ERNIE,    /* 0.3B, 21B-A3B: "User: ...\nAssistant: ..." between sentence marks */
    ERN_CHAT_THINKING, /* 21B-A3B-Thinking: im_start/im_end, think, tools */
} ern_chat_format;

/* The format a model folder's tokenizer asks for (by its chat_template text or its special tokens), or by name
 * ("ernie", "ernie-thinking"); name NULL: look. Errors: ERN_ERR_USAGE listing the names. */
ERN_MUST_CHECK ern_status ern_chat_format_pick(ern_chat_format *out, const ern_tokenizer *t, const char *model_dir,
                                               const char *name, ern_err *err);
const char *ern_chat_format_name(ern_chat_format f);
/* The first mark of the format that the tokenizer does not have as one id, or NULL. Without it a prompt would be
 * written as text that the model never saw, and a reply would not end. Static text. */
const char *ern_chat_format_missing(const ern_tokenizer *t, ern_chat_format f);
/* True when the format's replies begin with reasoning (the prompt ends inside <think>). */
bool ern_chat_format_reasons(ern_chat_format f);

/* Append a conversation's ids. Special tokens come only from the format; a user who types one gets text.
 * Errors: ERN_ERR_INPUT for what the format cannot say (tools in ERN_CHAT_ERNIE), ERN_ERR_LIMIT. */
ERN_MUST_CHECK ern_status ern_chat_render(const ern_tokenizer *t, ern_chat_format f, const ern_chat *chat,
                                          ern_tokens *out, ern_err *err);
/* The same conversation as text, for `ernest tokenize` and the render endpoint. */
ERN_MUST_CHECK ern_status ern_chat_render_text(ern_chat_format f, const ern_chat *chat, ern_buf *out, ern_err *err);
/* Ids that end a turn in this format, beside the model's own eos: up to 4, returns how many. */
int ern_chat_stop_ids(const ern_tokenizer *t, ern_chat_format f, int32_t out[4]);

/* ---- reply ----------------------------------------------------------------------------------------------------- */

/* Splits a reply as it streams into content, reasoning and tool calls. The ernie format is content through and
 * through; the thinking format follows docs/model.md 6.3. Feeding byte by byte or at once gives the same joined parts.
 */
typedef struct ern_reply ern_reply;

typedef enum ern_reply_kind {
    ERN_REPLY_CONTENT,
    ERN_REPLY_REASONING,
    ERN_REPLY_CALL_NAME, /* a new tool call; text is its name */
    ERN_REPLY_CALL_ARGS, /* more of the current call's arguments */
} ern_reply_kind;

/* text is borrowed for the call. `call` counts tool calls from 0; a call is told when its closing tag is there and its
 * JSON holds, the name and then all arguments, as Python prints them: what does not parse is content. */
typedef void ern_reply_fn(void *ud, ern_reply_kind kind, int call, const char *text, size_t len);

ERN_MUST_CHECK ern_status ern_reply_open(ern_reply **out, ern_chat_format f, bool split_reasoning, bool parse_tools,
                                         ern_err *err);
void ern_reply_close(ern_reply *r);
/* Before the first feed: the prompt ended inside an answer (ern_chat.continue_final), so the reply begins as content.
 */
void ern_reply_continue(ern_reply *r);
void ern_reply_feed(ern_reply *r, const char *text, size_t len, ern_reply_fn *fn, void *ud);
void ern_reply_flush(ern_reply *r, ern_reply_fn *fn, void *ud);
/* True while the stream is still inside the reasoning part (its tokens count as reasoning_tokens). */
bool ern_reply_in_reasoning(const ern_reply *r);

/* Write a value as Python's json.dumps(ensure_ascii=False): ", " and ": ", reals shortest round-trip. */
struct json_t;
void ern_json_dumps_python(const struct json_t *v, ern_buf *out);

#endif
