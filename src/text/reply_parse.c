/* A reply split as it streams into content, reasoning and tool calls. See text.h; docs/model.md 6.3.
 *
 *               </think>            </response>
 *   REASONING ------------> CONTENT -----------> AFTER (dropped)
 *                              ^                   ^
 *                              |    <tool_call>    |
 *                              +---------+---------+
 *                                        v   </tool_call>: back to where it came from
 *                                      CALL
 *
 * An automaton over bytes: what may begin a tag is held until the next bytes decide, so the parts do not depend on how
 * the reply was cut into feeds. A call is held whole, up to CALL_BYTES_MAX, because JSON that does not parse is
 * content. Newlines around tags belong to the tags. */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "base/jsonr.h"
#include "text/text.h"

enum { HOLD_MAX = 16, RUN_BYTES = 512, CALL_BYTES_MAX = 1 << 20, JSON_DEPTH = 64 };

typedef enum state { REASONING, CONTENT, CALL, AFTER } state;
typedef enum skip { SKIP_NONE, SKIP_ONE, SKIP_ALL } skip;

struct ern_reply {
    bool plain; /* nothing to find: all is content */
    bool split_reasoning, parse_tools;
    state at, before_call;
    skip newlines;    /* to drop before the next byte */
    bool in_response; /* <response> was seen */
    int n_call;
    char hold[HOLD_MAX]; /* bytes that may begin a tag */
    int n_hold;
    char run[RUN_BYTES + 4]; /* bytes decided and not told yet */
    int n_run;
    ern_buf call;
    ern_reply_fn *fn; /* during a feed */
    void *ud;
};

ern_status ern_reply_open(ern_reply **out, ern_chat_format f, bool split_reasoning, bool parse_tools, ern_err *err) {
    ern_reply *r = calloc(1, sizeof *r);
    *out = r;
    if (!r) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for a reply");
    r->plain = !ern_chat_format_reasons(f) || (!split_reasoning && !parse_tools);
    r->split_reasoning = split_reasoning;
    r->parse_tools = parse_tools;
    r->at = split_reasoning && !r->plain ? REASONING : CONTENT;
    ern_buf_init(&r->call, CALL_BYTES_MAX);
    return ERN_OK;
}

void ern_reply_close(ern_reply *r) {
    if (!r) return;
    ern_buf_free(&r->call);
    free(r);
}

void ern_reply_continue(ern_reply *r) {
    r->at = CONTENT;
    r->in_response = r->split_reasoning;
}

bool ern_reply_in_reasoning(const ern_reply *r) { return r->at == REASONING; }

/* ---- telling --------------------------------------------------------------------------------------------------- */

static void tell_run(ern_reply *r) {
    if (r->n_run)
        r->fn(r->ud, r->at == REASONING ? ERN_REPLY_REASONING : ERN_REPLY_CONTENT, 0, r->run, (size_t)r->n_run);
    r->n_run = 0;
}

/* One decided byte. Runs are told at a character's end, so that whole characters in give whole characters out. */
static void put(ern_reply *r, char c) {
    if (r->at == AFTER) return;
    bool inside = ((unsigned char)c & 0xc0) == 0x80;
    if ((r->n_run >= RUN_BYTES && !inside) || r->n_run == (int)sizeof r->run) tell_run(r);
    r->run[r->n_run++] = c;
}

static void put_text(ern_reply *r, const char *s, size_t len) {
    for (size_t i = 0; i < len; i++) put(r, s[i]);
}

/* ---- tool calls ------------------------------------------------------------------------------------------------ */

/* Tell a whole call; false when it is not an object with a name and, perhaps, an object of arguments. */
static bool tell_call(ern_reply *r) {
    json_t *v = NULL;
    if (ern_json_parse(&v, r->call.data, r->call.len, JSON_DEPTH, "tool call", NULL) != ERN_OK) return false;
    json_t *name = json_object_get(v, "name"), *args = json_object_get(v, "arguments");
    bool good = json_string_length(name) > 0 && (!args || json_is_object(args));
    ern_buf text;
    ern_buf_init(&text, (size_t)8 * CALL_BYTES_MAX);
    if (good) {
        if (args)
            ern_json_dumps_python(args, &text);
        else
            ern_buf_text(&text, "{}");
        good = !text.full;
    }
    if (good) {
        r->fn(r->ud, ERN_REPLY_CALL_NAME, r->n_call, json_string_value(name), json_string_length(name));
        r->fn(r->ud, ERN_REPLY_CALL_ARGS, r->n_call, text.data, text.len);
        r->n_call++;
    }
    ern_buf_free(&text);
    json_decref(v);
    return good;
}

/* What was held as a call is content after all, the tag in front of it too. */
static void call_is_text(ern_reply *r) {
    r->at = CONTENT;
    put_text(r, "<tool_call>", 11);
    put_text(r, r->call.data ? r->call.data : "", r->call.len);
    tell_run(r);
    r->at = r->before_call;
    ern_buf_clear(&r->call);
}

static void call_byte(ern_reply *r, char c) {
    static const char end[] = "</tool_call>";
    const size_t n_end = sizeof end - 1;
    if (!ern_buf_add(&r->call, &c, 1)) {
        call_is_text(r);
        put(r, c);
        return;
    }
    if (c != '>' || r->call.len < n_end || memcmp(r->call.data + r->call.len - n_end, end, n_end) != 0) return;
    r->call.len -= n_end;
    bool good = tell_call(r);
    r->call.len += n_end;
    if (good) {
        r->at = r->before_call;
        r->newlines = SKIP_ALL;
        ern_buf_clear(&r->call);
    } else {
        call_is_text(r);
    }
}

/* ---- tags ------------------------------------------------------------------------------------------------------ */

typedef enum fit { FIT_NO, FIT_PART, FIT_WHOLE } fit;

/* How the held bytes stand to a tag. */
static fit fit_of(const ern_reply *r, const char *tag) {
    size_t n = (size_t)r->n_hold, n_tag = strlen(tag);
    if (n > n_tag || memcmp(r->hold, tag, n) != 0) return FIT_NO;
    return n == n_tag ? FIT_WHOLE : FIT_PART;
}

static void enter(ern_reply *r, state to, skip newlines) {
    tell_run(r);
    r->n_hold = 0;
    if (to == CALL) r->before_call = r->at;
    r->at = to;
    r->newlines = newlines;
}

/* Look for the tags that mean something here; act on a whole one. */
static fit match_tags(ern_reply *r) {
    static const struct {
        state at;
        const char *tag;
        state to;
        skip newlines;
        bool needs_split, needs_tools;
        int needs_response; /* 0: not seen yet, 1: seen, -1: either */
    } rule[] = {{REASONING, "\n</think>", CONTENT, SKIP_ALL, true, false, -1},
                {REASONING, "</think>", CONTENT, SKIP_ALL, true, false, -1},
                {CONTENT, "<response>", CONTENT, SKIP_ONE, true, false, 0},
                {CONTENT, "\n</response>", AFTER, SKIP_NONE, true, false, 1},
                {CONTENT, "</response>", AFTER, SKIP_NONE, true, false, 1},
                {CONTENT, "<tool_call>", CALL, SKIP_NONE, false, true, -1},
                {AFTER, "<tool_call>", CALL, SKIP_NONE, false, true, -1}};
    fit best = FIT_NO;
    for (size_t i = 0; i < sizeof rule / sizeof rule[0]; i++) {
        if (rule[i].at != r->at || (rule[i].needs_split && !r->split_reasoning)) continue;
        if (rule[i].needs_tools && !r->parse_tools) continue;
        if (rule[i].needs_response >= 0 && rule[i].needs_response != r->in_response) continue;
        fit f = fit_of(r, rule[i].tag);
        if (f == FIT_WHOLE) {
            if (rule[i].needs_response == 0) r->in_response = true;
            enter(r, rule[i].to, rule[i].newlines);
            return FIT_WHOLE;
        }
        if (f == FIT_PART) best = FIT_PART;
    }
    return best;
}

static void text_byte(ern_reply *r, char c) {
    if (r->newlines != SKIP_NONE) {
        if (r->newlines == SKIP_ONE || c != '\n') r->newlines = SKIP_NONE;
        if (c == '\n') return;
    }
    r->hold[r->n_hold++] = c;
    while (r->n_hold && match_tags(r) == FIT_NO) {
        put(r, r->hold[0]);
        memmove(r->hold, r->hold + 1, (size_t)--r->n_hold);
    }
}

void ern_reply_feed(ern_reply *r, const char *text, size_t len, ern_reply_fn *fn, void *ud) {
    if (r->plain) {
        if (len) fn(ud, ERN_REPLY_CONTENT, 0, text, len);
        return;
    }
    r->fn = fn;
    r->ud = ud;
    for (size_t i = 0; i < len; i++) {
        if (r->at == CALL)
            call_byte(r, text[i]);
        else
            text_byte(r, text[i]);
    }
    tell_run(r);
}

void ern_reply_flush(ern_reply *r, ern_reply_fn *fn, void *ud) {
    r->fn = fn;
    r->ud = ud;
    if (r->at == CALL) call_is_text(r);
    put_text(r, r->hold, (size_t)r->n_hold);
    r->n_hold = 0;
    tell_run(r);
}
