/* Logprobs in JSON, one token at a time, so that nothing but text is kept.
 *
 * Chat:        lp[0] holds {"token","logprob","bytes","top_logprobs"} items.
 * Completions: lp[0..3] hold the items of tokens, token_logprobs, top_logprobs, text_offset.
 * `bytes` are the token's true bytes; a `token` that is not whole characters shows U+FFFD (chat) or bytes:\xNN
 * (completions, whose tokens are keys and must stay apart). */
#include <stdio.h>
#include <string.h>

#include "base/jsonw.h"
#include "base/utf8.h"
#include "server/job.h"

/* OpenAI's floor: JSON has no minus infinity. */
static double finite(float lp) { return lp < -9999.0f || lp != lp ? -9999.0 : (double)lp; }

static void comma(ern_buf *b) {
    if (b->len) (void)ern_buf_add(b, ",", 1);
}

static void write_token(const choice *c, int32_t id, bool as_bytes, ern_buf *out) {
    if (!c->job->p.include_logprobs_decode_token) {
        (void)ern_buf_print(out, "\"token_id:%d\"", id);
        return;
    }
    size_t n;
    const char *s = ern_tokenizer_bytes(c->job->server->tokenizer, id, &n);
    if (!as_bytes || ern_utf8_valid(s, n)) {
        ern_json_quote(out, s, n);
        return;
    }
    (void)ern_buf_text(out, "\"bytes:");
    for (size_t i = 0; i < n; i++) (void)ern_buf_print(out, "\\\\x%02x", (unsigned char)s[i]);
    (void)ern_buf_text(out, "\"");
}

static void write_entry(const choice *c, int32_t id, float lp, ern_buf *out) {
    (void)ern_buf_text(out, "{\"token\":");
    write_token(c, id, false, out);
    (void)ern_buf_text(out, ",\"logprob\":");
    ern_json_print_real(out, finite(lp));
    (void)ern_buf_text(out, ",\"bytes\":[");
    size_t n;
    const char *s = ern_tokenizer_bytes(c->job->server->tokenizer, id, &n);
    for (size_t i = 0; i < n; i++) (void)ern_buf_print(out, "%s%u", i ? "," : "", (unsigned)(unsigned char)s[i]);
    (void)ern_buf_text(out, "]");
}

static void add_chat(choice *c, const ern_sampled *s) {
    ern_buf *out = &c->lp[0];
    comma(out);
    write_entry(c, s->token, s->logprob, out);
    (void)ern_buf_text(out, ",\"top_logprobs\":[");
    for (int i = 0; i < s->n_top && i < c->job->n_lp; i++) {
        if (i) (void)ern_buf_add(out, ",", 1);
        write_entry(c, s->top_id[i], s->top_logprob[i], out);
        (void)ern_buf_add(out, "}", 1);
    }
    (void)ern_buf_text(out, "]}");
}

static bool same_text(const choice *c, int32_t a, int32_t b) {
    size_t na, nb;
    const char *sa = ern_tokenizer_bytes(c->job->server->tokenizer, a, &na);
    const char *sb = ern_tokenizer_bytes(c->job->server->tokenizer, b, &nb);
    return na == nb && memcmp(sa, sb, na) == 0;
}

/* {"text": logprob}: the top ones, then the sampled one if it is not among them. Two ids may spell the same text (a
 * byte piece and a letter); a key is written once, for the likelier. */
static void add_tops(choice *c, const ern_sampled *s) {
    ern_buf *out = &c->lp[2];
    (void)ern_buf_add(out, "{", 1);
    int n = s->n_top < c->job->n_lp ? s->n_top : c->job->n_lp, written = 0;
    bool ids = !c->job->p.include_logprobs_decode_token;
    for (int i = 0; i <= n; i++) {
        int32_t id = i < n ? s->top_id[i] : s->token;
        bool seen = false;
        for (int k = 0; k < i && !seen; k++) seen = id == s->top_id[k] || (!ids && same_text(c, id, s->top_id[k]));
        if (seen) continue;
        if (written++) (void)ern_buf_add(out, ",", 1);
        write_token(c, id, true, out);
        (void)ern_buf_add(out, ":", 1);
        ern_json_print_real(out, finite(i < n ? s->top_logprob[i] : s->logprob));
    }
    (void)ern_buf_add(out, "}", 1);
}

static int64_t characters(const char *s, size_t n) {
    int64_t count = 0;
    for (size_t i = 0; i < n; i++) count += ((unsigned char)s[i] & 0xc0) != 0x80;
    return count;
}

/* known false: the first token of a prompt, which nothing predicts. */
void logprobs_add(choice *c, const ern_sampled *s, bool known) {
    if (c->job->kind == JOB_CHAT) {
        add_chat(c, s);
        return;
    }
    for (int i = 0; i < 4; i++) comma(&c->lp[i]);
    write_token(c, s->token, true, &c->lp[0]);
    if (known) {
        ern_json_print_real(&c->lp[1], finite(s->logprob));
        add_tops(c, s);
    } else {
        (void)ern_buf_text(&c->lp[1], "null");
        (void)ern_buf_text(&c->lp[2], "null");
    }
    (void)ern_buf_print(&c->lp[3], "%lld", (long long)c->n_char);
    size_t n;
    const char *text = ern_tokenizer_bytes(c->job->server->tokenizer, s->token, &n);
    c->n_char += characters(text, n);
}

/* One position of prompt_logprobs: {"id": {"logprob", "rank", "decoded_token"}, ...}, the prompt's own token first. */
static void add_prompt_entry(choice *c, int32_t id, float lp, int rank, bool first) {
    ern_buf *out = &c->prompt_lp;
    (void)ern_buf_print(out, "%s\"%d\":{\"logprob\":", first ? "" : ",", id);
    ern_json_print_real(out, finite(lp));
    (void)ern_buf_print(out, ",\"rank\":%d,\"decoded_token\":", rank);
    write_token(c, id, false, out);
    (void)ern_buf_add(out, "}", 1);
}

void prompt_logprobs_add(choice *c, int32_t index, const ern_sampled *s) {
    const job *j = c->job;
    const prompt *q = &j->prompt[c->prompt];
    /* Position 0 has nothing before it, whether or not the engine reports it. */
    while (c->n_prompt_lp < q->n && c->n_prompt_lp <= index) {
        int32_t at = c->n_prompt_lp++;
        bool known = at == index && at > 0;
        ern_sampled one = *s;
        one.token = q->id[at];
        if (j->echo && j->n_lp >= 0) logprobs_add(c, &one, known);
        if (j->p.prompt_logprobs < 0) continue;
        comma(&c->prompt_lp);
        if (!known) {
            (void)ern_buf_text(&c->prompt_lp, "null");
            continue;
        }
        (void)ern_buf_add(&c->prompt_lp, "{", 1);
        add_prompt_entry(c, one.token, s->logprob, s->rank, true);
        for (int i = 0; i < s->n_top && i < j->p.prompt_logprobs; i++) {
            if (s->top_id[i] != one.token) add_prompt_entry(c, s->top_id[i], s->top_logprob[i], i + 1, false);
        }
        (void)ern_buf_add(&c->prompt_lp, "}", 1);
    }
}
