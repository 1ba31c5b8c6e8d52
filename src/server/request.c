/* From a body to engine requests: everything that can be refused is refused here, before anything is queued. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/counter.h"
#include "base/jsonr.h"
#include "base/utf8.h"
#include "server/job.h"

enum { SHARED_CREDIT = ERN_EVENT_CREDIT * 3 / 8 };

static bool no_memory(job *j, const char *param) {
    return api_fail(&j->error, 413, "request_too_large", param,
                    "the request needs more memory than one request may use");
}

/* ---- identity -------------------------------------------------------------------------------------------------- */

static void uuid4(char out[37]) {
    uint8_t b[16];
    if (getrandom(b, sizeof b, 0) != (ssize_t)sizeof b) {
        /* Cannot happen after boot; ids must still differ. */
        static atomic_uint_fast64_t n;
        uint64_t x = ern_counter64((uint64_t)(uintptr_t)out, atomic_fetch_add(&n, 1));
        memcpy(b, &x, 8);
        memcpy(b + 8, &x, 8);
    }
    b[6] = (uint8_t)((b[6] & 0x0f) | 0x40);
    b[8] = (uint8_t)((b[8] & 0x3f) | 0x80);
    char *p = out;
    for (int i = 0; i < 16; i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10) *p++ = '-';
        p += snprintf(p, 3, "%02x", b[i]);
    }
}

static void make_id(job *j) {
    const char *prefix = j->kind == JOB_CHAT ? "chatcmpl-" : "cmpl-";
    char uuid[37];
    uuid4(uuid);
    const params *p = &j->p;
    if (p->request_id.s && p->request_id.n) {
        bool has = strncmp(p->request_id.s, prefix, strlen(prefix)) == 0;
        j->id_given = true;
        (void)snprintf(j->id, sizeof j->id, "%s%s", has ? "" : prefix, p->request_id.s);
    } else if (p->user.s && p->user.n) {
        (void)snprintf(j->id, sizeof j->id, "%s%s-%s", prefix, p->user.s, uuid);
    } else {
        (void)snprintf(j->id, sizeof j->id, "%s%s", prefix, uuid);
    }
}

static bool check_model(job *j) {
    const ern_server *s = j->server;
    j->model = server_model_name(s);
    const text_view *m = &j->p.model;
    if (!s->served_model_name || !m->s || strcmp(m->s, s->served_model_name) == 0 || strcmp(m->s, "default") == 0)
        return true;
    return api_fail(&j->error, 404, "model_not_support", "model",
                    "the model %.120s is not served here; ask for %.120s or default", m->s, s->served_model_name);
}

/* ---- prompts --------------------------------------------------------------------------------------------------- */

static bool too_long(job *j, long long n) {
    return api_fail(&j->error, 400, "context_length_exceeded", j->kind == JOB_CHAT ? "messages" : "prompt",
                    "the prompt has %lld tokens and the context is %d; shorten the prompt", n,
                    ern_engine_options_of(j->server->engine)->max_model_len);
}

/* max_tokens of the request by either name; negative: not given. */
static int64_t asked_tokens(const params *p) {
    return p->max_completion_tokens >= 0 ? p->max_completion_tokens : p->max_tokens;
}

/* Length rules of one prompt; a copy of its ids into the arena. */
static bool add_prompt(job *j, const int32_t *id, size_t n, const char *text, size_t text_len) {
    int32_t context = ern_engine_options_of(j->server->engine)->max_model_len;
    bool scored = j->echo && asked_tokens(&j->p) == 0; /* nothing is generated: it may fill the context */
    if (n == 0)
        return api_fail(&j->error, 400, "invalid_value", j->kind == JOB_CHAT ? "messages" : "prompt",
                        "the prompt is empty; it needs at least one token");
    if (n > (size_t)context - !scored) return too_long(j, (long long)n);
    int32_t *copy = ERN_ARENA_NEW(&j->arena, int32_t, n);
    char *kept = text ? ern_arena_text(&j->arena, text, text_len) : NULL;
    if (!copy || (text && !kept)) return no_memory(j, "prompt");
    memcpy(copy, id, n * sizeof *copy);
    j->prompt[j->n_prompt++] = (prompt){copy, (int32_t)n, kept, text_len};
    return true;
}

static bool text_prompt(job *j, const json_t *v) {
    const char *text = json_string_value(v);
    size_t len = json_string_length(v);
    size_t context = (size_t)ern_engine_options_of(j->server->engine)->max_model_len;
    if (len > context * PIECE_MAX_BYTES)
        return api_fail(&j->error, 400, "context_length_exceeded", "prompt",
                        "the prompt has %zu bytes, which cannot fit the context of %zu tokens; shorten it", len,
                        context);
    ern_tokens t;
    ern_tokens_init(&t, len + 16);
    ern_err err = {0};
    bool ok = ern_tokenizer_encode(j->server->tokenizer, text, len, true, &t, &err) == ERN_OK;
    if (!ok)
        ok = api_fail(&j->error, 400, "invalid_value", "prompt", "%s", err.text);
    else
        ok = add_prompt(j, t.id, t.n, text, len);
    ern_tokens_free(&t);
    return ok;
}

static bool ids_prompt(job *j, json_t *v, const char *param) {
    id_list ids;
    return fields_ids(&ids, v, param, INT32_MAX, j->server->config->n_vocab, &j->arena, &j->error) &&
           add_prompt(j, ids.v, (size_t)ids.n, NULL, 0);
}

/* A text, [text], [id] or [[id]]. */
static bool completion_prompts(job *j) {
    bool ids = j->p.prompt_token_ids != NULL;
    json_t *v = ids ? j->p.prompt_token_ids : j->p.prompt;
    const char *param = ids ? "prompt_token_ids" : "prompt";
    if (!v) return api_fail(&j->error, 400, "missing_required_parameter", "prompt", "prompt is missing");
    if (json_is_string(v)) return text_prompt(j, v);
    if (!json_is_array(v) || json_array_size(v) == 0)
        return api_fail(&j->error, 400, "invalid_value", param,
                        "%s must be a text, a list of texts, a list of token ids or a list of such lists, not empty",
                        param);
    if (json_is_number(json_array_get(v, 0))) return ids_prompt(j, v, param);
    if (json_array_size(v) > JOB_PROMPTS_MAX)
        return api_fail(&j->error, 400, "invalid_value", param, "%s must have at most %d prompts, not %zu", param,
                        JOB_PROMPTS_MAX, json_array_size(v));
    for (size_t i = 0; i < json_array_size(v); i++) {
        json_t *item = json_array_get(v, i);
        bool ok;
        if (json_is_string(item) && !ids)
            ok = text_prompt(j, item);
        else if (json_is_array(item))
            ok = ids_prompt(j, item, param);
        else
            ok = api_fail(&j->error, 400, "invalid_value", param, "%s: item %zu is neither a text nor a list of ids",
                          param, i);
        if (!ok) return false;
    }
    return true;
}

static bool chat_prompts(job *j) {
    const params *p = &j->p;
    if (p->prompt_token_ids) {
        if (!ids_prompt(j, p->prompt_token_ids, "prompt_token_ids")) return false;
    } else {
        if (!p->messages || json_array_size(p->messages) == 0)
            return api_fail(&j->error, 400, "missing_required_parameter", "messages",
                            "messages is missing or empty; send at least one message, or prompt_token_ids");
        ern_tokens t;
        ern_tokens_init(&t, (size_t)1 << 24);
        bool ok = chat_prompt(j->server, p, &j->arena, &t, &j->error) && add_prompt(j, t.id, t.n, NULL, 0);
        ern_tokens_free(&t);
        if (!ok) return false;
    }
    if (p->completion_token_ids.n == 0) return true;
    /* Ids to go on from: one more copy behind the prompt. */
    prompt *q = &j->prompt[0];
    int64_t n = (int64_t)q->n + p->completion_token_ids.n;
    if (n >= ern_engine_options_of(j->server->engine)->max_model_len) return too_long(j, n);
    int32_t *id = ERN_ARENA_NEW(&j->arena, int32_t, (size_t)n);
    if (!id) return no_memory(j, "completion_token_ids");
    memcpy(id, q->id, (size_t)q->n * sizeof *id);
    memcpy(id + q->n, p->completion_token_ids.v, (size_t)p->completion_token_ids.n * sizeof *id);
    q->id = id;
    q->n = (int32_t)n;
    return true;
}

/* ---- sampling -------------------------------------------------------------------------------------------------- */

static double pick(double asked, double model, double otherwise) {
    if (!isnan(asked)) return asked;
    return isnan(model) ? otherwise : model;
}

static bool read_bias(job *j, json_t *o, const char *param, ern_sample *s) {
    if (!json_is_object(o) || json_object_size(o) > 1024)
        return api_fail(&j->error, 400, "invalid_value", param, "%s must be an object of at most 1024 token ids",
                        param);
    ern_bias *list = ERN_ARENA_NEW(&j->arena, ern_bias, json_object_size(o));
    if (!list) return no_memory(j, param);
    int n = 0;
    const char *key;
    json_t *v;
    json_object_foreach(o, key, v) {
        char *end, canonical[24];
        long long id = strtoll(key, &end, 10);
        (void)snprintf(canonical, sizeof canonical, "%lld", id);
        if (*end || strcmp(canonical, key) != 0 || id < 0 || id >= j->server->config->n_vocab)
            return api_fail(&j->error, 400, "invalid_value", param, "%s: the key %.40s is not a token id from 0 to %d",
                            param, key, j->server->config->n_vocab - 1);
        double add = json_is_number(v) ? json_number_value(v) : (double)NAN;
        if (!(add >= -100 && add <= 100))
            return api_fail(&j->error, 400, "invalid_value", param, "%s: the value of %lld must be from -100 to 100",
                            param, id);
        list[n++] = (ern_bias){(int32_t)id, (float)add};
    }
    s->bias = list;
    s->n_bias = n;
    return true;
}

/* A word is banned as one token, as it stands and after a blank. */
static bool ban_word(job *j, const text_view *word, int32_t *out, int *n) {
    int found = 0;
    for (int blank = 0; blank < 2; blank++) {
        char text[260];
        int len = snprintf(text, sizeof text, "%s%.*s", blank ? " " : "", (int)word->n, word->s);
        ern_tokens t;
        ern_tokens_init(&t, 512);
        ern_err err = {0};
        ern_status st = ern_tokenizer_encode(j->server->tokenizer, text, (size_t)len, false, &t, &err);
        if (st == ERN_OK && t.n == 1) {
            out[(*n)++] = t.id[0];
            found++;
        }
        ern_tokens_free(&t);
    }
    if (found || j->server->o.strict_fastdeploy) return true;
    return api_fail(&j->error, 400, "invalid_value", "bad_words",
                    "bad_words: %.100s is more than one token and cannot be banned; ban its ids with "
                    "bad_words_token_ids or leave it out",
                    word->s);
}

static bool read_bans(job *j, ern_sample *s) {
    const params *p = &j->p;
    int most = 2 * p->bad_words.n + p->bad_words_token_ids.n, n = 0;
    if (most == 0) return true;
    int32_t *id = ERN_ARENA_NEW(&j->arena, int32_t, (size_t)most);
    if (!id) return no_memory(j, "bad_words");
    for (int i = 0; i < p->bad_words.n; i++) {
        if (!ban_word(j, &p->bad_words.v[i], id, &n)) return false;
    }
    for (int i = 0; i < p->bad_words_token_ids.n; i++) id[n++] = p->bad_words_token_ids.v[i];
    s->ban = id;
    s->n_ban = n;
    return true;
}

static bool read_mask(job *j, ern_sample *s) {
    const id_list *ids = &j->p.allowed_token_ids;
    if (!fields_given(&j->p, "allowed_token_ids", FIELD_BOTH)) return true;
    if (ids->n == 0)
        return api_fail(&j->error, 400, "invalid_value", "allowed_token_ids", "allowed_token_ids must not be empty");
    size_t words = ((size_t)j->server->config->n_vocab + 31) / 32;
    uint32_t *mask = ERN_ARENA_NEW(&j->arena, uint32_t, words);
    if (!mask) return no_memory(j, "allowed_token_ids");
    for (int i = 0; i < ids->n; i++) mask[ids->v[i] / 32] |= 1u << (ids->v[i] % 32);
    s->mask = mask;
    return true;
}

static bool read_sampling(job *j, ern_sample *s) {
    const params *p = &j->p;
    const ern_config *c = j->server->config;
    double temperature = pick(p->temperature, (double)c->temperature, 1);
    double top_p = pick(p->top_p, (double)c->top_p, 0.7);
    int64_t top_k = fields_given(p, "top_k", FIELD_BOTH) ? p->top_k : c->top_k;
    bool greedy = temperature < 1e-5 || top_p < 1e-5;
    *s = (ern_sample){
        .temperature = greedy ? 0 : (float)temperature,
        .top_p = greedy ? 1 : (float)top_p,
        .min_p = (float)p->min_p,
        .top_k = top_k <= 0           ? 0
                 : top_k > c->n_vocab ? c->n_vocab
                                      : (int32_t)top_k,
        .repetition = (float)pick(p->repetition_penalty, (double)c->repetition, 1),
        .frequency = (float)pick(p->frequency_penalty, (double)c->frequency, 0),
        .presence = (float)pick(p->presence_penalty, (double)c->presence, 0),
        .forced = -1,
        .n_top = j->n_lp,
        .mode = j->server->o.logprobs_mode,
        .logprob_scaled = p->temp_scaled_logprobs,
        .logprob_normalized = p->top_p_normalized_logprobs,
    };
    s->seed = fields_given(p, "seed", FIELD_BOTH)
                  ? (uint64_t)p->seed
                  : ern_counter64((uint64_t)j->server->o.seed, atomic_fetch_add(&j->server->n_seed, 1));
    if (p->logit_bias && !read_bias(j, p->logit_bias, "logit_bias", s)) return false;
    if (p->logits_processors_args) {
        const char *key;
        json_t *v;
        json_object_foreach(p->logits_processors_args, key, v) {
            if (strcmp(key, "logit_bias") != 0)
                return api_fail(&j->error, 400, "unsupported_value", "logits_processors_args",
                                "logits_processors_args: %.60s is not built; only logit_bias is", key);
            if (!p->logit_bias && !read_bias(j, v, "logits_processors_args", s)) return false;
        }
    }
    return read_bans(j, s) && read_mask(j, s);
}

/* ---- logprobs, stops, lengths ---------------------------------------------------------------------------------- */

static bool read_logprobs(job *j, int64_t *prompt_top) {
    const params *p = &j->p;
    const ern_server *s = j->server;
    if (j->kind == JOB_CHAT && !p->logprobs && fields_given(p, "top_logprobs", FIELD_CHAT) && p->top_logprobs > 0)
        return api_fail(&j->error, 400, "invalid_value", "top_logprobs", "top_logprobs needs logprobs: true");
    int64_t top =
        j->kind == JOB_CHAT ? (p->logprobs ? (p->top_logprobs > 0 ? p->top_logprobs : 0) : -1) : p->logprobs_n;
    *prompt_top = p->prompt_logprobs;
    if (j->echo && top > *prompt_top) *prompt_top = top;
    int64_t most = top > *prompt_top ? top : *prompt_top;
    const char *param = p->prompt_logprobs >= most && most >= 0 && top < most ? "prompt_logprobs"
                        : j->kind == JOB_CHAT                                 ? "top_logprobs"
                                                                              : "logprobs";
    if (most >= 0 && !s->o.enable_logprob)
        return api_fail(&j->error, 400, "unsupported_value", "logprobs",
                        "logprobs are switched off on this server (--enable-logprob)");
    if (most > s->o.max_logprobs)
        return api_fail(&j->error, 400, "invalid_value", param, "%s is %lld and this server gives at most %d", param,
                        (long long)most, s->o.max_logprobs);
    j->n_lp = (int)top;
    return true;
}

static int add_id(int32_t *list, int n, int32_t id) {
    for (int i = 0; i < n; i++) {
        if (list[i] == id) return n;
    }
    if (id >= 0 && n < ERN_STOP_MAX) list[n++] = id;
    return n;
}

static bool read_stop_ids(job *j, const int32_t **out, int32_t *n_out) {
    const ern_server *s = j->server;
    int32_t *list = ERN_ARENA_NEW(&j->arena, int32_t, ERN_STOP_MAX);
    if (!list) return no_memory(j, "stop_token_ids");
    int n = 0;
    if (!j->p.ignore_eos) {
        for (int i = 0; i < s->config->n_eos; i++) n = add_id(list, n, s->config->eos[i]);
        n = add_id(list, n, ern_tokenizer_eos(s->tokenizer));
        int32_t turn[4];
        int n_turn = j->kind == JOB_CHAT ? ern_chat_stop_ids(s->tokenizer, s->format, turn) : 0;
        for (int i = 0; i < n_turn; i++) n = add_id(list, n, turn[i]);
    }
    for (int i = 0; i < j->p.stop_token_ids.n; i++) n = add_id(list, n, j->p.stop_token_ids.v[i]);
    *out = list;
    *n_out = n;
    return true;
}

/* FastDeploy's stop sequences: token ids, few and short. */
static bool read_strict_stops(job *j) {
    const ern_server *s = j->server;
    int most = s->o.max_stop < STRICT_STOP_MAX ? s->o.max_stop : STRICT_STOP_MAX;
    if (j->p.stop.n > most)
        return api_fail(&j->error, 400, "invalid_value", "stop",
                        "%d stop strings exceeds the limit max_stop_seqs_num(%d)", j->p.stop.n, most);
    for (int i = 0; i < j->p.stop.n; i++) {
        ern_tokens t;
        ern_tokens_init(&t, 2048);
        ern_err err = {0};
        const text_view *v = &j->p.stop.v[i];
        ern_status st = ern_tokenizer_encode(s->tokenizer, v->s, v->n, false, &t, &err);
        size_t limit =
            s->o.max_stop_tokens < STRICT_STOP_TOKENS_MAX ? (size_t)s->o.max_stop_tokens : STRICT_STOP_TOKENS_MAX;
        bool ok = st == ERN_OK && t.n > 0 && t.n <= limit;
        int32_t *id = ok ? ERN_ARENA_NEW(&j->arena, int32_t, t.n) : NULL;
        if (id) {
            memcpy(id, t.id, t.n * sizeof *id);
            j->strict_seq[j->n_strict] = id;
            j->n_strict_seq[j->n_strict++] = (int)t.n;
        }
        size_t n = t.n;
        ern_tokens_free(&t);
        if (!ok && st == ERN_OK)
            return api_fail(&j->error, 400, "invalid_value", "stop",
                            "a stop string of %zu tokens exceeds the limit stop_seqs_max_len(%zu)", n, limit);
        if (!id) return api_fail(&j->error, 400, "invalid_value", "stop", "%s", err.text);
    }
    return true;
}

static bool check_stops(job *j) {
    const ern_server *s = j->server;
    if (s->o.strict_fastdeploy) return read_strict_stops(j);
    if (j->p.stop.n > s->o.max_stop)
        return api_fail(&j->error, 400, "invalid_value", "stop", "stop has %d texts and this server takes at most %d",
                        j->p.stop.n, s->o.max_stop);
    for (int i = 0; i < j->p.stop.n; i++) {
        if (j->p.stop.v[i].n > (size_t)s->o.max_stop_bytes)
            return api_fail(&j->error, 400, "invalid_value", "stop",
                            "a stop text has %zu bytes and this server takes at most %d", j->p.stop.v[i].n,
                            s->o.max_stop_bytes);
    }
    return true;
}

/* How many tokens a prompt may get. */
static bool read_max_tokens(job *j, const prompt *q, int32_t *out, bool *echo_only) {
    const params *p = &j->p;
    bool strict = j->server->o.strict_fastdeploy;
    int64_t context = ern_engine_options_of(j->server->engine)->max_model_len, room = context - q->n;
    bool completion = p->max_completion_tokens >= 0;
    int64_t asked = asked_tokens(p);
    const char *param = completion ? "max_completion_tokens" : "max_tokens";
    *echo_only = asked == 0;
    if (asked == 0 && !j->echo)
        return api_fail(&j->error, 400, "invalid_value", "max_tokens",
                        "max_tokens must be at least 1; 0 is only for echo");
    if (asked > room && !strict)
        return api_fail(&j->error, 400, "context_length_exceeded", param,
                        "the prompt has %d tokens and %s is %lld, together more than the context of %lld; ask for at "
                        "most %lld",
                        q->n, param, (long long)asked, (long long)context, (long long)room);
    int64_t n = asked < 0 || asked > room ? room : asked;
    if (p->response_max_tokens > 0 && !ern_chat_format_reasons(j->server->format) && p->response_max_tokens < n)
        n = p->response_max_tokens;
    if (p->min_tokens > n)
        return api_fail(&j->error, 400, "invalid_value", "min_tokens",
                        "min_tokens is %lld and at most %lld tokens can be generated", (long long)p->min_tokens,
                        (long long)n);
    *out = *echo_only ? 1 : (int32_t)n; /* nothing is generated then, and the engine does not look */
    return true;
}

/* ---- choices --------------------------------------------------------------------------------------------------- */

static bool open_text(job *j, choice *c) {
    const ern_server *s = j->server;
    ern_err err = {0};
    if (j->p.stop.n && !s->o.strict_fastdeploy) {
        const char *text[32];
        size_t len[32];
        for (int i = 0; i < j->p.stop.n; i++) {
            text[i] = j->p.stop.v[i].s;
            len[i] = j->p.stop.v[i].n;
        }
        if (ern_stop_open(&c->stop, text, len, j->p.stop.n, &err) != ERN_OK)
            return api_fail(&j->error, 400, "invalid_value", "stop", "%s", err.text);
    }
    bool tools = j->p.tools && s->o.parse_tools &&
                 !(json_is_string(j->p.tool_choice) && strcmp(json_string_value(j->p.tool_choice), "none") == 0);
    if (j->kind == JOB_CHAT && ern_reply_open(&c->reply, s->format, s->o.split_reasoning && !j->p.disable_chat_template,
                                              tools, &err) != ERN_OK)
        return api_fail(&j->error, 500, "internal_error", NULL, "%s", err.text);
    if (tools && !(c->call = ERN_ARENA_NEW(&j->arena, tool_call_out, JOB_CALLS_MAX))) return no_memory(j, "tools");
    ern_tokens_init(&c->ids, (size_t)c->request.max_tokens + 1);
    ern_buf *all[] = {&c->content, &c->reasoning, &c->prompt_lp, &c->lp[0], &c->lp[1], &c->lp[2], &c->lp[3]};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) ern_buf_init(all[i], JOB_ANSWER_MAX_BYTES);
    return true;
}

static bool build_choices(job *j, int64_t prompt_top) {
    const params *p = &j->p;
    ern_sample sample;
    const int32_t *stop = NULL;
    int32_t n_stop = 0;
    if (!read_sampling(j, &sample) || !check_stops(j) || !read_stop_ids(j, &stop, &n_stop)) return false;
    int total = j->n_prompt * (int)p->n;
    if (total > JOB_CHOICES_MAX)
        return api_fail(&j->error, 400, "invalid_value", "n", "n times the prompts is %d; it must be at most %d", total,
                        JOB_CHOICES_MAX);
    j->choice = ERN_ARENA_NEW(&j->arena, choice, (size_t)total);
    if (!j->choice) return no_memory(j, "n");
    int64_t prompt_entries = 0;
    uint8_t salt[16];
    auth_salt(salt, j->has_caller ? j->caller : NULL, p->cache_salt.s, p->cache_salt.n);
    for (int i = 0; i < total; i++) {
        choice *c = &j->choice[i];
        prompt *q = &j->prompt[i / (int)p->n];
        *c = (choice){.job = j, .index = i, .prompt = i / (int)p->n};
        ern_request *r = &c->request;
        r->ud = c;
        r->prompt = q->id;
        r->n_prompt = q->n;
        r->min_tokens = (int32_t)p->min_tokens;
        r->sample = sample;
        r->sample.choice = i % (int)p->n;
        r->stop = stop;
        r->n_stop = n_stop;
        r->n_prompt_top = (int32_t)prompt_top;
        r->priority = (int32_t)p->priority;
        r->deadline_us = j->deadline_us;
        memcpy(r->salt, salt, sizeof salt);
        if (!read_max_tokens(j, q, &r->max_tokens, &r->echo_only)) return false;
        if (r->echo_only && r->n_prompt_top < 0) r->n_prompt_top = 0;
        c->credit_base = total > 1 ? -SHARED_CREDIT : 0;
        atomic_init(&r->n_taken, c->credit_base);
        prompt_entries += (int64_t)q->n * (prompt_top + 1);
        if (prompt_entries > JOB_PROMPT_LOGPROBS_MAX)
            return api_fail(&j->error, 400, "invalid_value", "prompt_logprobs",
                            "logprobs of this prompt are more than %d numbers; ask for fewer, or a shorter prompt",
                            JOB_PROMPT_LOGPROBS_MAX);
        /* Published one by one: a choice that is half made is never seen, and every one made is freed. */
        bool ok = open_text(j, c);
        atomic_store(&j->n_choice, i + 1);
        if (!ok) return false;
    }
    return true;
}

/* Text of a prompt that came as ids, where the answer shows it. */
static bool prompt_texts(job *j) {
    if (!j->echo && !j->p.return_token_ids) return true;
    for (int i = 0; i < j->n_prompt; i++) {
        prompt *q = &j->prompt[i];
        if (q->text) continue;
        ern_buf b;
        ern_buf_init(&b, JOB_ANSWER_MAX_BYTES);
        ern_err err = {0};
        bool ok = ern_tokenizer_decode(j->server->tokenizer, q->id, (size_t)q->n, false, &b, &err) == ERN_OK;
        char *text = ok ? ern_arena_text(&j->arena, b.data ? b.data : "", b.len) : NULL;
        q->text = text;
        q->text_len = b.len;
        ern_buf_free(&b);
        if (!text) return no_memory(j, "prompt");
    }
    return true;
}

static bool check_format(job *j) {
    json_t *f = j->p.response_format;
    if (!f) return true;
    const char *type = json_string_value(json_object_get(f, "type"));
    if (type && strcmp(type, "text") == 0) return true;
    static const char *const guided[] = {"json_object", "json_schema", "structural_tag"};
    for (size_t i = 0; type && i < 3; i++) {
        if (strcmp(type, guided[i]) == 0)
            return api_fail(&j->error, 400, "unsupported_value", "response_format",
                            "response_format of type %s is not built yet (guided decoding); leave it out", type);
    }
    return api_fail(&j->error, 400, "invalid_value", "response_format",
                    "response_format needs a type: text (json_object and json_schema are not built yet)");
}

static bool check_combinations(job *j) {
    const params *p = &j->p;
    if (j->kind == JOB_COMPLETION && p->best_of >= 0 && p->best_of != p->n)
        return api_fail(&j->error, 400, "unsupported_value", "best_of", "best_of must equal n (%lld), not %lld",
                        (long long)p->n, (long long)p->best_of);
    if (j->kind == JOB_COMPLETION) return true;
    bool reasons = ern_chat_format_reasons(j->server->format);
    if (reasons && p->reasoning_max_tokens >= 0)
        return api_fail(&j->error, 400, "unsupported_value", "reasoning_max_tokens",
                        "reasoning_max_tokens is not built yet for this chat format; bound the reply with "
                        "max_completion_tokens");
    return true;
}

static bool build(job *j, json_t *body) {
    unsigned where = j->kind == JOB_CHAT ? FIELD_CHAT : FIELD_COMPLETION;
    ern_server *s = j->server;
    if (!fields_read(&j->p, body, where, s->config->n_vocab, &j->arena, &j->error, server_unknown_field, s))
        return false;
    make_id(j);
    j->echo = j->p.echo;
    j->streaming = j->p.stream;
    j->include_usage = j->p.include_usage;
    j->strict_stop = s->o.strict_fastdeploy;
    j->decode_special = (j->kind == JOB_CHAT && s->format == ERN_CHAT_THINKING) || !j->p.skip_special_tokens;
    j->prompt = ERN_ARENA_NEW(&j->arena, prompt, JOB_PROMPTS_MAX);
    if (!j->prompt) return no_memory(j, "prompt");
    int64_t prompt_top = -1;
    if (!(check_model(j) && check_format(j) && check_combinations(j) && read_logprobs(j, &prompt_top) &&
          (j->kind == JOB_CHAT ? chat_prompts(j) : completion_prompts(j)) && build_choices(j, prompt_top) &&
          prompt_texts(j)))
        return false;
    write_head(j);
    return true;
}

bool request_build(job *j) {
    json_t *body;
    ern_err err = {0};
    if (ern_json_parse(&body, j->http->body, j->http->body_len, JOB_JSON_DEPTH, "the request body", &err) != ERN_OK)
        return api_fail(&j->error, 400, "invalid_json", NULL, "%s", err.text);
    bool ok = build(j, body);
    /* Texts in params are borrowed from the body; all that is needed later was copied. */
    json_decref(body);
    return ok;
}
