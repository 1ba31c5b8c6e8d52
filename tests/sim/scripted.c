/* The scripted backend. See scripted.h. */
#include "sim/scripted.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/counter.h"
#include "same_sampled.h"

scripted_settings scripted;

enum { SLOTS = 3 }; /* two steps in flight while the result before them is still being read */

typedef struct slot {
    ern_batch batch; /* arrays owned, copied at submit */
    int32_t *token, *next, *pos, *cell, *row0, *kv_len, *page, *want;
    ern_sample *sample;
    ern_sampled *sampled;
    bool done;
} slot;

typedef struct scripted_backend {
    ern_backend base;
    ern_backend_options o;
    int32_t n_vocab;
    uint64_t *kv; /* [n_page * P] */
    slot slot[SLOTS];
    uint64_t n_submit, n_wait;
} scripted_backend;

static scripted_backend *of(ern_backend *b) { return (scripted_backend *)(void *)b; }

/* ---- the arithmetic, shared with the oracle -------------------------------------------------------------------- */

static uint64_t hash_cell(int32_t token, int32_t pos, uint64_t sum) {
    return ern_counter64(sum ^ ((uint64_t)(uint32_t)token << 32), (uint64_t)(uint32_t)pos);
}

static uint64_t hash_fold(uint64_t fold, int32_t token) { return (fold ^ (uint32_t)token) * 0x100000001b3ull; }

static bool is_banned(const ern_sample *s, int32_t id) {
    for (int32_t i = 0; i < s->n_ban; i++)
        if (s->ban[i] == id) return true;
    return false;
}

static float unit(uint64_t x) { return (float)(x >> 40) * 0x1p-24f; }

static void choose(uint64_t h, uint64_t fold, int32_t n_vocab, const ern_sample *s, ern_sampled *out) {
    memset(out, 0, sizeof *out);
    uint64_t x = ern_counter64(h, (uint64_t)(uint32_t)s->position);
    if (s->forced >= 0) {
        out->token = s->forced;
    } else {
        x = ern_counter64(x ^ s->seed, (uint64_t)(uint32_t)s->choice << 32 | (uint32_t)s->n_prompt);
        x ^= s->repetition != 1 ? fold : 0;
        for (x = ern_counter64(x, 1); is_banned(s, (int32_t)(x % (uint64_t)n_vocab));) x = ern_counter64(x, 2);
        out->token = (int32_t)(x % (uint64_t)n_vocab);
    }
    out->bad = scripted.nan_position > 0 && s->seed == scripted.nan_seed && s->position >= scripted.nan_position;
    if (s->n_top < 0) return;
    x = ern_counter64(x, (uint64_t)(uint32_t)out->token);
    out->logprob = -unit(x);
    out->rank = 1 + (int32_t)(x % 7);
    out->n_top = s->n_top;
    for (int32_t i = 0; i < s->n_top; i++) {
        out->top_id[i] = (int32_t)(ern_counter64(x, (uint64_t)i) % (uint64_t)n_vocab);
        out->top_logprob[i] = -unit(ern_counter64(x, (uint64_t)i + 100));
    }
}

/* ---- a step ---------------------------------------------------------------------------------------------------- */

/* Tokens so far as the sampling rule sees them: seen, then the sequence's own rows that seen lacks. */
static uint64_t fold_seen(const slot *k, int32_t s, const ern_sample *p, int32_t row) {
    uint64_t fold = 1;
    for (int32_t i = 0; i < p->n_seen; i++) fold = hash_fold(fold, p->seen[i]);
    for (int32_t t = k->row0[s]; t <= row; t++)
        if (k->pos[t] >= p->n_seen) fold = hash_fold(fold, k->token[t]);
    return fold;
}

static void run_row(scripted_backend *b, const slot *k, int32_t s, int32_t t) {
    const int32_t *page = k->page + (size_t)s * (size_t)k->batch.n_page_max;
    int32_t P = b->o.n_page_cell, pos = k->pos[t];
    ERN_ASSERT(k->cell[t] == page[pos / P] * P + pos % P && page[pos / P] >= 0 && page[pos / P] < b->o.n_page);
    uint64_t sum = 0;
    for (int32_t j = 0; j < pos; j += P) {
        const uint64_t *cell = b->kv + (size_t)page[j / P] * (size_t)P;
        for (int32_t i = 0; i < P && j + i < pos; i++) sum += cell[i] * (2 * (uint64_t)(uint32_t)(j + i) + 1);
    }
    b->kv[k->cell[t]] = hash_cell(k->token[t], pos, sum);
}

static void run(scripted_backend *b, slot *k, const slot *prev) {
    int32_t w = 0;
    for (int32_t s = 0; s < k->batch.n_seq; s++)
        for (int32_t t = k->row0[s]; t < k->row0[s + 1]; t++) {
            if (k->token[t] < 0) {
                int32_t from = -1 - k->token[t];
                ERN_ASSERT(prev && prev->done && from < prev->batch.n_want);
                k->token[t] = prev->sampled[from].token;
            }
            ERN_ASSERT(k->token[t] >= 0 && k->token[t] < b->n_vocab);
            run_row(b, k, s, t);
            if (w == k->batch.n_want || k->want[w] != t) continue;
            const ern_sample *p = &k->sample[w];
            ERN_ASSERT(p->position == k->pos[t] + 1);
            uint64_t fold = p->repetition != 1 && p->forced < 0 ? fold_seen(k, s, p, t) : 0;
            choose(b->kv[k->cell[t]], fold, b->n_vocab, p, &k->sampled[w++]);
        }
    ERN_ASSERT(w == k->batch.n_want);
    k->done = true;
}

static void run_number(scripted_backend *b, uint64_t n) {
    run(b, &b->slot[n % SLOTS], n > 0 ? &b->slot[(n - 1) % SLOTS] : NULL);
}

/* ---- the door -------------------------------------------------------------------------------------------------- */

static ern_status scripted_plan(ern_backend_plan *out, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    (void)m, (void)err;
    *out = (ern_backend_plan){
        .page_bytes = (uint64_t)o->n_page_cell * sizeof(uint64_t), .scratch_bytes = 1 << 20, .kernels = "scripted"};
    return ERN_OK;
}

static void *take(size_t n, size_t each_bytes) {
    void *p = calloc(n ? n : 1, each_bytes);
    if (!p) abort();
    return p;
}

static ern_status scripted_open(ern_backend **out, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    (void)err;
    scripted_backend *b = take(1, sizeof *b);
    *b = (scripted_backend){.base.ops = &scripted_ops, .o = *o, .n_vocab = m->config.n_vocab};
    size_t T = (size_t)o->n_row_max, S = (size_t)o->n_seq_max, W = (size_t)o->n_want_max;
    size_t n_page = ((size_t)o->n_len_max + (size_t)o->n_page_cell - 1) / (size_t)o->n_page_cell;
    size_t n_cell = (size_t)o->n_page * (size_t)o->n_page_cell;
    b->kv = take(n_cell, sizeof *b->kv);
    memset(b->kv, 0xa5, n_cell * sizeof *b->kv);
    for (int i = 0; i < SLOTS; i++) {
        slot *k = &b->slot[i];
        k->token = take(T, sizeof(int32_t));
        k->pos = take(T, sizeof(int32_t));
        k->cell = take(T, sizeof(int32_t));
        k->row0 = take(S + 1, sizeof(int32_t));
        k->kv_len = take(S, sizeof(int32_t));
        k->page = take(S * n_page, sizeof(int32_t));
        k->want = take(W, sizeof(int32_t));
        k->sample = take(W, sizeof(ern_sample));
        k->sampled = take(W, sizeof(ern_sampled));
    }
    *out = &b->base;
    return ERN_OK;
}

static void scripted_close(ern_backend *base) {
    scripted_backend *b = of(base);
    for (int i = 0; i < SLOTS; i++) {
        slot *k = &b->slot[i];
        free(k->token), free(k->pos), free(k->cell), free(k->row0), free(k->kv_len);
        free(k->page), free(k->want), free(k->sample), free(k->sampled);
    }
    free(b->kv);
    free(b);
}

#define COPY(name, n) memcpy(k->name, in->name, (size_t)(n) * sizeof *k->name)

static void scripted_submit(ern_backend *base, const ern_batch *in) {
    scripted_backend *b = of(base);
    ERN_ASSERT(b->n_submit - b->n_wait < 2);
    ERN_ASSERT(in->n_row >= 1 && in->n_row <= b->o.n_row_max && in->n_want <= b->o.n_want_max);
    ERN_ASSERT(in->n_seq >= 1 && in->n_seq <= b->o.n_seq_max && in->row0[in->n_seq] == in->n_row);
    slot *k = &b->slot[b->n_submit % SLOTS];
    k->batch = *in;
    k->done = false;
    COPY(token, in->n_row);
    COPY(pos, in->n_row);
    COPY(cell, in->n_row);
    COPY(row0, in->n_seq + 1);
    COPY(kv_len, in->n_seq);
    COPY(page, (size_t)in->n_seq * (size_t)in->n_page_max);
    COPY(want, in->n_want);
    COPY(sample, in->n_want);
    b->n_submit++;
    if (scripted.eager) run_number(b, b->n_submit - 1);
}

/* Everything submitted so far, done: what orders page moves. */
static void drain(scripted_backend *b) {
    for (uint64_t n = b->n_wait; n < b->n_submit; n++)
        if (!b->slot[n % SLOTS].done) run_number(b, n);
}

static ern_status scripted_wait(ern_backend *base, ern_result *out, ern_err *err) {
    scripted_backend *b = of(base);
    ERN_ASSERT(b->n_wait < b->n_submit);
    for (int at; (at = atomic_load(&scripted.hold_from)) > 0 && b->n_wait + 1 >= (uint64_t)at;) usleep(100);
    slot *k = &b->slot[b->n_wait % SLOTS];
    if (!k->done) run_number(b, b->n_wait);
    b->n_wait++;
    if (scripted.fail_at > 0 && b->n_wait >= (uint64_t)scripted.fail_at)
        return ERN_FAIL(err, ERN_ERR_DEVICE, "the scripted device is lost");
    *out = (ern_result){.n_want = k->batch.n_want, .sampled = k->sampled, .compute_us = 100 + 10 * k->batch.n_row};
    return ERN_OK;
}

static void scripted_kv_copy(ern_backend *base, const ern_page_pair *pair, int32_t n) {
    scripted_backend *b = of(base);
    size_t P = (size_t)b->o.n_page_cell;
    drain(b);
    for (int32_t i = 0; i < n; i++)
        memmove(b->kv + (size_t)pair[i].to * P, b->kv + (size_t)pair[i].from * P, P * sizeof *b->kv);
}

/* As things are at this moment, steps in flight or not: if they matter, the engine is wrong, and the tokens will be. */
static bool scripted_kv_read(ern_backend *base, const int32_t *page, int32_t n, void *host) {
    scripted_backend *b = of(base);
    size_t P = (size_t)b->o.n_page_cell;
    for (int32_t i = 0; i < n; i++)
        memcpy((uint64_t *)host + (size_t)i * P, b->kv + (size_t)page[i] * P, P * sizeof *b->kv);
    return true;
}

static void scripted_kv_write(ern_backend *base, const int32_t *page, int32_t n, const void *host) {
    scripted_backend *b = of(base);
    size_t P = (size_t)b->o.n_page_cell;
    for (int32_t i = 0; i < n; i++)
        memcpy(b->kv + (size_t)page[i] * P, (const uint64_t *)host + (size_t)i * P, P * sizeof *b->kv);
}

static void scripted_probe(ern_backend *base, ern_probe_fn *fn, void *ud) { (void)base, (void)fn, (void)ud; }

const ern_backend_ops scripted_ops = {
    .name = "scripted",
    .plan = scripted_plan,
    .open = scripted_open,
    .close = scripted_close,
    .submit = scripted_submit,
    .wait = scripted_wait,
    .kv_copy = scripted_kv_copy,
    .kv_read = scripted_kv_read,
    .kv_write = scripted_kv_write,
    .probe = scripted_probe,
};

ern_model scripted_model(int32_t n_vocab, int32_t n_position) {
    ern_model m;
    memset(&m, 0, sizeof m);
    m.config.n_vocab = n_vocab;
    m.config.n_position = n_position;
    return m;
}

/* ---- the oracle ------------------------------------------------------------------------------------------------ */

void scripted_oracle_init(scripted_oracle *o, const ern_request *r, int32_t n_vocab) {
    *o = (scripted_oracle){.r = r, .n_vocab = n_vocab, .fold = 1};
}

static void feed(scripted_oracle *o, int32_t token) {
    o->h = hash_cell(token, o->n_fed, o->sum);
    o->sum += o->h * (2 * (uint64_t)(uint32_t)o->n_fed + 1);
    o->fold = hash_fold(o->fold, token);
    o->n_fed++;
}

static void end_with(scripted_oracle *o, ern_end end) {
    o->is_over = true;
    o->end = end;
}

static void next_report(scripted_oracle *o, ern_event *out) {
    const ern_request *r = o->r;
    int32_t index = o->n_report++;
    *out = (ern_event){.kind = ERN_EVENT_PROMPT, .index = index};
    out->sampled.token = r->prompt[index];
    if (index > 0) {
        feed(o, r->prompt[index - 1]);
        ern_sample s = r->sample;
        s.position = index;
        s.forced = r->prompt[index];
        s.n_top = r->n_prompt_top;
        choose(o->h, 0, o->n_vocab, &s, &out->sampled);
        if (out->sampled.bad) {
            end_with(o, ERN_END_NUMERICAL);
            return;
        }
    }
    if (r->echo_only && o->n_report == r->n_prompt) end_with(o, ERN_END_LENGTH);
}

static void next_token(scripted_oracle *o, ern_event *out) {
    const ern_request *r = o->r;
    int32_t ban[ERN_BAN_MAX + ERN_STOP_MAX];
    while (o->n_fed < r->n_prompt) feed(o, r->prompt[o->n_fed]);
    if (o->n_output > 0) feed(o, o->last);
    ern_sample s = r->sample;
    s.position = o->n_fed;
    s.n_prompt = r->n_prompt;
    s.forced = -1;
    if (o->n_output < r->min_tokens && r->n_stop > 0) {
        memcpy(ban, r->sample.ban ? r->sample.ban : r->stop, (size_t)r->sample.n_ban * sizeof *ban);
        memcpy(ban + r->sample.n_ban, r->stop, (size_t)r->n_stop * sizeof *ban);
        s.ban = ban;
        s.n_ban = r->sample.n_ban + r->n_stop;
    }
    *out = (ern_event){.kind = ERN_EVENT_TOKEN, .index = o->n_output++};
    choose(o->h, o->fold, o->n_vocab, &s, &out->sampled);
    o->last = out->sampled.token;
    for (int32_t i = 0; i < r->n_stop; i++) out->is_stop |= r->stop[i] == o->last;
    if (out->sampled.bad)
        end_with(o, ERN_END_NUMERICAL);
    else if (out->is_stop)
        end_with(o, ERN_END_STOP);
    else if (o->n_output == r->max_tokens)
        end_with(o, ERN_END_LENGTH);
}

void scripted_oracle_next(scripted_oracle *o, ern_event *out) {
    const ern_request *r = o->r;
    if (r->echo_only && r->n_prompt_top < 0) end_with(o, ERN_END_LENGTH);
    if (!o->is_over) {
        if (r->n_prompt_top >= 0 && o->n_report < r->n_prompt)
            next_report(o, out);
        else
            next_token(o, out);
        if (!o->is_over || o->end != ERN_END_NUMERICAL) return; /* a bad row says nothing but the END */
    }
    *out = (ern_event){.kind = ERN_EVENT_END, .end = o->end};
}

bool scripted_same(const ern_event *a, const ern_event *b) {
    if (a->kind != b->kind) return false;
    if (a->kind == ERN_EVENT_END) return a->end == b->end;
    return a->index == b->index && a->is_stop == b->is_stop && same_sampled(&a->sampled, &b->sampled);
}
