/* Random requests. See traffic.h. */
#include "sim/traffic.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/counter.h"

uint64_t rng_next(rng *g) { return ern_counter64(g->key, g->n++); }

int32_t rng_in(rng *g, int32_t lo, int32_t hi) { return lo + (int32_t)(rng_next(g) % ((uint64_t)(hi - lo) + 1)); }

bool rng_one(rng *g, int32_t of) { return rng_next(g) % (uint64_t)of == 0; }

static void sampling(rng *g, ern_sample *s) {
    *s = (ern_sample){.temperature = 1, .top_p = 1, .repetition = 1, .forced = -1, .n_top = -1};
    s->seed = rng_next(g) % 1000;
    s->choice = rng_in(g, 0, 3);
    if (rng_one(g, 3)) s->repetition = 1.25f;
    if (rng_one(g, 3)) s->n_top = rng_in(g, 0, ERN_TOP_MAX);
}

traffic *traffic_make(rng *g, const traffic_mix *m, int64_t now_us) {
    bool reports = m->reports && rng_one(g, 4), echo = reports && rng_one(g, 3);
    int32_t n_prompt = rng_in(g, 1, rng_one(g, 3) ? m->max_len - 1 : 1 + m->max_len / 4), stem = 0, n_stem = 0;
    if (m->stems && !rng_one(g, 4)) { /* a turn more of an earlier conversation, or another end to its beginning */
        stem = rng_in(g, 0, TRAFFIC_STEMS - 1);
        n_stem = rng_one(g, 3) ? rng_in(g, 0, m->stems->n[stem]) : m->stems->n[stem];
        if (n_stem > m->max_len - 1) n_stem = m->max_len - 1;
        n_prompt = rng_in(g, n_stem > 0 ? n_stem : 1, n_stem + 8 < m->max_len - 1 ? n_stem + 8 : m->max_len - 1);
    }
    int32_t most = m->max_len - n_prompt < m->max_tokens ? m->max_len - n_prompt : m->max_tokens;
    int32_t n_stop = rng_one(g, 2) ? rng_in(g, 1, 3) : 0, n_ban = rng_one(g, 3) ? rng_in(g, 1, 4) : 0;
    traffic *t = calloc(1, sizeof *t + (size_t)(n_prompt + n_stop + n_ban + most) * sizeof(int32_t));
    if (!t) abort();
    int32_t *prompt = t->memory, *stop = prompt + n_prompt, *ban = stop + n_stop;
    for (int32_t i = 0; i < n_prompt + n_stop + n_ban; i++) prompt[i] = rng_in(g, 0, m->n_vocab - 1);
    t->output = ban + n_ban;
    if (n_stem > 0) memcpy(prompt, m->stems->token[stem], (size_t)n_stem * sizeof *prompt);
    t->r = (ern_request){
        .prompt = prompt,
        .n_prompt = n_prompt,
        .max_tokens = rng_in(g, 1, most),
        .stop = stop,
        .n_stop = n_stop,
        .n_prompt_top = reports ? rng_in(g, 0, 3) : -1,
        .echo_only = echo,
        .priority = m->priorities ? rng_in(g, -1, 1) : 0,
    };
    if (m->n_salt > 0) t->r.salt[3] = (uint8_t)rng_in(g, 0, m->n_salt - 1);
    sampling(g, &t->r.sample);
    t->r.sample.ban = ban;
    t->r.sample.n_ban = n_ban;
    if (n_stop > 0 && rng_one(g, 2)) t->r.min_tokens = rng_in(g, 0, t->r.max_tokens);
    if (m->deadline_us > 0 && rng_one(g, 8)) {
        t->may_expire = true;
        t->r.deadline_us = now_us + 1 + (int64_t)(rng_next(g) % (uint64_t)m->deadline_us);
    }
    scripted_oracle_init(&t->oracle, &t->r, m->n_vocab);
    return t;
}

void traffic_remember(rng *g, const traffic *t, traffic_stems *stems) {
    int32_t k = rng_in(g, 0, TRAFFIC_STEMS - 1), n = 0;
    for (int32_t i = 0; i < t->r.n_prompt && n < TRAFFIC_STEM_MAX; i++) stems->token[k][n++] = t->r.prompt[i];
    for (int32_t i = 0; i < t->n_token && n < TRAFFIC_STEM_MAX; i++) stems->token[k][n++] = t->output[i];
    stems->n[k] = n;
}

static bool wrong(const traffic *t, const ern_event *ev, const char *what) {
    fprintf(stderr, "request %llu (prompt %d, max %d, top %d): %s; event %d is kind %d end %d index %d token %d\n",
            (unsigned long long)t->r.id, t->r.n_prompt, t->r.max_tokens, t->r.n_prompt_top, what, t->n_event,
            (int)ev->kind, (int)ev->end, ev->index, ev->sampled.token);
    return false;
}

bool traffic_check(traffic *t, const ern_event *ev, bool failed) {
    if (ev->request != &t->r || ev->id != t->r.id) return wrong(t, ev, "the event is another request's");
    if (ev->kind == ERN_EVENT_END) {
        if (ev->n_prompt != t->r.n_prompt || ev->n_output != t->n_token) return wrong(t, ev, "END counts wrong");
        if (ev->n_cached < 0 || ev->n_cached >= t->r.n_prompt || ev->n_cached_host + ev->n_cached_disk > ev->n_cached)
            return wrong(t, ev, "END counts wrong what was cached");
        if ((ev->first_us == 0) != (t->n_token == 0)) return wrong(t, ev, "END has a wrong time of the first token");
        if (ev->started_us == 0 && t->n_event > 0 && !t->r.echo_only) return wrong(t, ev, "it never started, it says");
        if (ev->end == ERN_END_CANCELLED && t->cancelled) return true;
        if (ev->end == ERN_END_DEADLINE && t->may_expire && t->n_event == 0) return true;
        if (ev->end == ERN_END_ERROR && failed) return true;
    }
    ern_event want;
    scripted_oracle_next(&t->oracle, &want);
    if (!scripted_same(ev, &want)) return wrong(t, ev, "not what a serial run gives");
    t->n_event++;
    if (ev->kind == ERN_EVENT_TOKEN) t->output[t->n_token++] = ev->sampled.token;
    return true;
}
