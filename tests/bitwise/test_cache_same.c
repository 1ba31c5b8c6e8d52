/* Same request, same answer, wherever its KV has been (house.md 3, docs/kv.md). The reference of a request is itself
 * alone, its whole prompt in one step, without a prefix cache. Against it, token by token and bit by bit, every
 * combination of
 *
 *   found     off, cold, exact, partial, a prompt that ends one before, at and one after a block's edge, a second turn
 *             (blocks that decoding computed)
 *   chunk     1, 16, 17, 256, whole prompts
 *   went      nowhere; away, preempted and computed again; to host memory and back; to disk and back; to disk, and back
 *             into an engine that was opened anew
 *   batch     1, 2, 7, 32 at once, and whoever it takes beside them to push them out
 *   sampling  greedy, seeded
 *
 * A combination counts only when the END of its request, or the tiers' statistics, say that it was so: transfers run
 * beside the steps, so a wave is repeated with those that did not yet get what their name says.
 *
 *   test_cache_same [all]      all: on every model and backend what is otherwise tried on one
 *   test_cache_same cuda       the cuda backend, on a machine that has one */
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/counter.h"
#include "base/log.h"
#include "base/os.h"
#include "engine/engine.h"
#include "bitwise/gate.h"
#include "made_model.h"
#include "same_sampled.h"

enum found { OFF, COLD, EXACT, PARTIAL, BEFORE_EDGE, AT_EDGE, AFTER_EDGE, TURN, FOUNDS };
enum went { NOWHERE, RECOMPUTED, HOST, DISK, RESTARTED, WENTS };
enum { GREEDY, SEEDED, SAMPLINGS };
enum { CHUNKS = 5, BATCHES = 4 };
static const char *const found_name[] = {"off", "cold", "exact", "partial", "edge-1", "edge", "edge+1", "turn"};
static const char *const went_name[] = {"nowhere", "recomputed", "host", "disk", "restarted"};
static const char *const sampling_name[] = {"greedy", "seeded"};
static const int32_t chunk_of[CHUNKS] = {1, 16, 17, 256, 0}; /* 0: not chunked */
static const int32_t batch_of[BATCHES] = {1, 2, 7, 32};

enum {
    P = 16,
    OUT = 26,         /* crosses a block's edge, wherever the prompt ends */
    PUSH_PROMPT = 47, /* one that pushes others out: from its second token on it wants more pages */
    PUSH_OUT = 49,
    SUBJECTS = FOUNDS * SAMPLINGS,
    NEIGHBOURS = 18,
    PUSHERS = 28,
    KINDS = SUBJECTS + NEIGHBOURS + PUSHERS,
    FIRST_PUSHER = SUBJECTS + NEIGHBOURS,
    PROMPT_MAX = 480,
    EVENTS = PROMPT_MAX + PUSH_OUT,
    SEATS = 64,
    TRIES = 150, /* waves in vain; few combinations need more than three, the rarest some thirty */
};

static const uint64_t seed = 20261124;

/* Under a sanitizer, which looks for races and bad reads and not for bits, the sizes between are left out. */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
static const bool few = true;
#else
static const bool few = false;
#endif

/* What came back for one request. */
typedef struct record {
    int32_t n;
    ern_event end;
    ern_sampled sampled[EVENTS];
} record;

/* One of the requests there are: its prompt, what of it is found, and its reference. */
typedef struct kind {
    int32_t prompt[PROMPT_MAX];
    int32_t n_prompt, max_tokens, n_prompt_top;
    ern_sample sample;
    int32_t warm[PROMPT_MAX]; /* the prompt that runs before it */
    int32_t n_warm, n_warm_out;
    int32_t n_found; /* tokens that can be found after that */
    record alone;
} kind;

typedef struct world {
    const ern_backend_ops *ops;
    ern_model *model;
    ern_kv_dtype kv;
    int32_t n_thread;
    int32_t blocks; /* of the prompts */
    int32_t n_len;  /* max_model_len */
    uint64_t page_bytes;
    char name[64];
    char dir[64]; /* of the disk tier */
    uint32_t n_salt;
    uint64_t n_fill;
    kind kind[KINDS];
    uint32_t n_seen[FOUNDS][CHUNKS][WENTS][BATCHES][SAMPLINGS];
    int32_t n_wave, n_preempted, n_open, n_never;
    int64_t n_cached, n_host, n_disk;
} world;

/* ---- the requests ---------------------------------------------------------------------------------------------- */

static void random_tokens(const world *w, uint64_t key, int32_t *out, int32_t n) {
    for (int32_t k = 0; k < n; k++)
        out[k] = (int32_t)(ern_counter64(seed + key, (uint64_t)k) % (uint64_t)w->model->config.n_vocab);
}

static void make_sample(kind *k, int32_t i, bool seeded) {
    k->sample = (ern_sample){.temperature = 0, .top_p = 1, .repetition = 1, .forced = -1, .n_top = ERN_TOP_MAX};
    k->sample.seed = 1000 + (uint64_t)i;
    if (seeded) k->sample.temperature = 0.9f, k->sample.top_p = 0.8f;
    if (seeded && i % 4 == 3) k->sample.repetition = 1.2f, k->sample.presence = 0.2f; /* looks at the whole prompt */
    k->max_tokens = OUT;
    k->n_prompt_top = -1;
}

static void make_subject(world *w, int32_t i) {
    kind *k = &w->kind[i];
    enum found f = (enum found)(i / SAMPLINGS);
    int32_t edge = w->blocks * P;
    make_sample(k, i, i % SAMPLINGS == SEEDED);
    k->n_prompt = f == BEFORE_EDGE ? edge - 1 : f == AT_EDGE ? edge : f == AFTER_EDGE ? edge + 1 : edge + 6;
    if (f == TURN) k->n_prompt = edge - 3; /* of the first turn */
    random_tokens(w, (uint64_t)i << 20, k->prompt, k->n_prompt);
    if (f == OFF || f == COLD) return;
    /* Shared until well inside a block, or until one before its end. */
    int32_t n_share = f != PARTIAL ? k->n_prompt : i % SAMPLINGS == GREEDY ? 2 * P + 5 : 3 * P - 1;
    memcpy(k->warm, k->prompt, (size_t)n_share * sizeof *k->warm);
    k->n_warm = n_share;
    k->n_warm_out = f == TURN ? OUT : 1;
    for (int32_t n = 0; f == PARTIAL && n < P; n++) { /* then another block */
        k->warm[k->n_warm++] = (k->prompt[n_share] + 1 + n) % w->model->config.n_vocab;
    }
    int32_t most = n_share < k->n_prompt - 1 ? n_share : k->n_prompt - 1; /* one row at least is computed */
    k->n_found = most / P * P;
}

static void make_neighbour(world *w, int32_t i) {
    kind *k = &w->kind[i];
    make_sample(k, i, i % 3 > 0);
    k->n_prompt = 1 + (int32_t)(ern_counter64(seed, (uint64_t)i) % (4 * P));
    random_tokens(w, (uint64_t)i << 20, k->prompt, k->n_prompt);
    if (i % 3 == 0) { /* begins as a subject does */
        const kind *s = &w->kind[(EXACT + i % 2) * SAMPLINGS];
        int32_t n = k->n_prompt < 40 ? k->n_prompt : 40;
        memcpy(k->prompt, s->prompt, (size_t)n * sizeof *k->prompt);
    }
    if (i % 6 == 1) k->n_prompt_top = 2;
    k->max_tokens = 3 + i % 15;
}

static void make_pusher(world *w, int32_t i) {
    kind *k = &w->kind[i];
    make_sample(k, i, i % 2 > 0);
    k->sample.n_top = 0;
    k->n_prompt = PUSH_PROMPT;
    random_tokens(w, (uint64_t)i << 20, k->prompt, k->n_prompt);
    k->max_tokens = PUSH_OUT;
}

/* The second turn needs the reply to the first, which is its kind's own reference until then. */
static void make_turn(world *w, int32_t i) {
    kind *k = &w->kind[i];
    assert_int_equal(k->alone.n, OUT);
    for (int32_t n = 0; n < OUT; n++) k->prompt[k->n_prompt++] = k->alone.sampled[n].token;
    k->n_found = (k->n_prompt - 1) / P * P; /* the last token of the reply was never computed */
    random_tokens(w, (uint64_t)i << 20 | 1 << 10, k->prompt + k->n_prompt, 3);
    k->n_prompt += 3;
    assert_true(k->n_prompt <= PROMPT_MAX && k->n_prompt + OUT <= w->n_len);
}

/* ---- the engine ------------------------------------------------------------------------------------------------ */

/* One engine, and what of the axes is fixed in it. */
typedef struct scene {
    world *w;
    ern_engine *e;
    int32_t chunk, batch; /* indices */
    enum went went;
    bool cache;
    int32_t n_page;
    char name[160];
} scene;

static void scene_open(scene *s, int32_t chunk_tokens, bool overlap) {
    world *w = s->w;
    ern_engine_options o = {
        .backend = gate(w->ops),
        .model = w->model,
        .backend_options = {.n_page = s->n_page, .n_page_cell = P, .level = -1, .n_thread = w->n_thread},
        .max_model_len = w->n_len,
        .max_num_seqs = SEATS,
        .max_batched_tokens = (batch_of[s->batch] > 7 ? 32 : 8) * w->n_len, /* all of a wave in one step */
        .chunked_prefill = chunk_tokens > 0,
        .chunk_tokens = chunk_tokens,
        .memory_bytes = 2ull << 30,
        .queue_max = 4 * SEATS,
        .overlap = overlap,
        .prefix_cache = s->cache,
        .cache_output = true,
    };
    o.backend_options.kv_dtype = w->kv;
    if (s->went == HOST) o.swap_bytes = 4 * w->page_bytes * (uint64_t)s->n_page;
    if (s->went == DISK || s->went == RESTARTED) o.store_dir = w->dir, o.store_bytes = 1ull << 30;
    ern_err err;
    if (ern_engine_open(&s->e, &o, &err) != ERN_OK) fail_msg("%s: %s", s->name, err.text);
    w->page_bytes = ern_engine_plan_of(s->e)->backend.page_bytes;
    w->n_open++;
}

static void scene_close(scene *s) {
    ern_engine_close(s->e);
    s->e = NULL;
}

/* Who takes part in a wave. */
typedef struct wave {
    ern_request r[SEATS];
    int32_t kind[SEATS]; /* -1: nobody compares */
    int32_t n;
    record *rec; /* [SEATS] */
} wave;

static wave wave_new(void) {
    wave v = {.rec = calloc(SEATS, sizeof(record))};
    if (!v.rec) abort();
    return v;
}

static void set_salt(ern_request *r, uint32_t salt) { memcpy(r->salt + 2, &salt, sizeof salt); }

static void join(wave *v, const world *w, int32_t i, int32_t priority, uint32_t salt) {
    assert_true(v->n < SEATS);
    const kind *k = &w->kind[i];
    ern_request *r = &v->r[v->n];
    *r = (ern_request){.prompt = k->prompt,
                       .n_prompt = k->n_prompt,
                       .max_tokens = k->max_tokens,
                       .sample = k->sample,
                       .n_prompt_top = k->n_prompt_top,
                       .priority = priority};
    set_salt(r, salt);
    v->kind[v->n++] = i;
}

static void play(scene *s, wave *v) {
    ern_err err;
    atomic_store(&gate_shut, true);
    for (int32_t i = 0; i < v->n; i++) {
        v->rec[i].n = 0;
        if (ern_engine_submit(s->e, &v->r[i], &err) != ERN_OK) fail_msg("%s: %s", s->name, err.text);
    }
    atomic_store(&gate_shut, false);
    for (int32_t n_end = 0; n_end < v->n;) {
        ern_event ev;
        if (!ern_engine_next(s->e, &ev, 60000000)) fail_msg("%s: no event within a minute", s->name);
        record *rec = &v->rec[ev.request - v->r];
        if (ev.kind == ERN_EVENT_END) {
            rec->end = ev;
            n_end++;
            continue;
        }
        assert_true(rec->n < EVENTS);
        rec->sampled[rec->n++] = ev.sampled;
        atomic_fetch_add(&ev.request->n_taken, 1);
    }
}

/* ---- comparing ------------------------------------------------------------------------------------------------- */

static void compare(const scene *s, const wave *v, int32_t at) {
    int32_t i = v->kind[at];
    const kind *k = &s->w->kind[i];
    const record *want = &k->alone, *got = &v->rec[at];
    char what[300];
    snprintf(what, sizeof what, "%s: request %d (%s %s), cached %d (host %d, disk %d), preempted %d", s->name, i,
             i < SUBJECTS ? found_name[i / SAMPLINGS] : "neighbour", sampling_name[k->sample.temperature > 0],
             got->end.n_cached, got->end.n_cached_host, got->end.n_cached_disk, got->end.n_preempted);
    if (got->end.end != ERN_END_LENGTH) fail_msg("%s: ended %d", what, (int)got->end.end);
    if (want->n != got->n) fail_msg("%s: %d events, alone %d", what, got->n, want->n);
    for (int32_t n = 0; n < want->n; n++)
        if (!same_sampled(&want->sampled[n], &got->sampled[n]))
            fail_msg("%s: event %d differs: token %d, alone %d; logprob %a, alone %a", what, n, got->sampled[n].token,
                     want->sampled[n].token, (double)got->sampled[n].logprob, (double)want->sampled[n].logprob);
}

/* Most requests that were inside at one moment. */
static int32_t most_at_once(const wave *v) {
    int32_t most = 0;
    for (int32_t i = 0; i < v->n; i++) {
        int32_t inside = 0;
        for (int32_t k = 0; k < v->n; k++)
            inside +=
                v->rec[k].end.started_us <= v->rec[i].end.started_us && v->rec[i].end.started_us < v->rec[k].end.end_us;
        if (inside > most) most = inside;
    }
    return most;
}

/* Did to this subject happen what the scene is for? n_in: blocks that came back from the scene's tier in this wave. */
static bool happened(const scene *s, enum found f, const kind *k, const ern_event *end, uint64_t n_in) {
    bool hit = end->n_cached > 0;
    if (f == OFF || f == COLD)
        assert_int_equal(end->n_cached, 0);
    else if (end->n_cached > k->n_found)
        fail_msg("%s: %s found %d tokens, and there are %d", s->name, found_name[f], end->n_cached, k->n_found);
    bool none_below = end->n_cached_host == 0 && end->n_cached_disk == 0;
    switch (s->went) {
    case NOWHERE:
        if (f != OFF && f != COLD) assert_int_equal(end->n_cached, k->n_found);
        assert_true(none_below && end->n_preempted == 0);
        return true;
    case RECOMPUTED: assert_true(none_below); return end->n_preempted > 0 && (hit || f == OFF || f == COLD);
    /* What is cold first comes back after it was preempted. */
    case HOST: return f == COLD ? end->n_preempted > 0 && n_in > 0 : end->n_cached_host > 0;
    case DISK: return f == COLD ? end->n_preempted > 0 && n_in > 0 : end->n_cached_disk > 0;
    default: return f == COLD || end->n_cached_disk == k->n_found;
    }
}

/* ---- scenes ---------------------------------------------------------------------------------------------------- */

static ern_engine_stats stats_of(const scene *s) {
    ern_engine_stats st;
    ern_engine_stats_read(s->e, &st);
    return st;
}

static uint64_t n_in(const scene *s) {
    ern_engine_stats st = stats_of(s);
    return st.host.n_in + st.disk.n_in;
}

static uint32_t *seen(const scene *s, int32_t subject) {
    return &s->w->n_seen[subject / SAMPLINGS][s->chunk][s->went][s->batch][subject % SAMPLINGS];
}

/* The subjects that have not been seen. */
static int32_t subjects_left(const scene *s, int32_t *subject) {
    int32_t n = 0, from = s->cache ? COLD * SAMPLINGS : OFF, to = s->cache ? SUBJECTS : SAMPLINGS;
    for (int32_t i = from; i < to; i++)
        if (*seen(s, i) == 0) subject[n++] = i;
    return n;
}

/* The next of them, at most as many as the batch takes. */
static int32_t next_subjects(const scene *s, int32_t *subject) {
    int32_t n = subjects_left(s, subject);
    return n < batch_of[s->batch] ? n : batch_of[s->batch];
}

/* Until the disk tier has all that it is to get: nothing more was written for a moment. */
static void wait_saved(const scene *s) {
    uint64_t n_out = 0;
    for (int32_t same = 0, k = 0; same < 4 && k < 2000; k++) {
        uint64_t n = stats_of(s).disk.n_out;
        same = n == n_out && n > 0 ? same + 1 : 0;
        n_out = n;
        usleep(500);
    }
}

static int32_t n_pusher(const scene *s) {
    if (s->went == NOWHERE || s->went == RESTARTED) return 0;
    return 2 * batch_of[s->batch] < PUSHERS ? 2 * batch_of[s->batch] : PUSHERS;
}

/* Who is in a wave with these subjects: first who pushes them out, then neighbours up to the batch. */
static void gather(const scene *s, wave *v, const int32_t *subject, int32_t n, uint32_t salt) {
    for (int32_t k = 0; k < n_pusher(s); k++) join(v, s->w, FIRST_PUSHER + k, -1, salt);
    for (int32_t k = 0; k < batch_of[s->batch] - n; k++) join(v, s->w, SUBJECTS + k % NEIGHBOURS, 0, salt);
    for (int32_t k = 0; k < n; k++) join(v, s->w, subject[k], 1, salt);
}

/* Pages for the prompts of a wave and for nothing that comes after them; a few more or less with each wave, after a
 * wave in vain by turns far from what the prompts take and right above it: between the two of the far ones there may be
 * the only few that let a request begin with the others and be the one that leaves. */
static int32_t tight_pages(const scene *s, const int32_t *subject, int32_t n, int32_t n_vain) {
    wave v = wave_new();
    int32_t n_page = 0, n_min = s->w->n_len / P + 2;
    gather(s, &v, subject, n, 0);
    for (int32_t k = 0; k < v.n; k++) n_page += (v.r[k].n_prompt + P - 1) / P;
    free(v.rec);
    int32_t far = batch_of[s->batch] / 2 + 1;
    uint64_t r = ern_counter64(seed, (uint64_t)s->w->n_wave);
    n_page += n_vain % 2 == 0 ? ((int32_t)(r % 8) - 3) * far : (int32_t)(r % (uint64_t)(far + 5));
    return n_page > n_min ? n_page : n_min;
}

/* Run what the subjects of a wave are to find. False: nothing. */
static bool warm(scene *s, const int32_t *subject, int32_t n, uint32_t salt) {
    wave v = wave_new();
    bool any = false;
    /* Those that push begin with what they have, or in chunks of one they would come too late. */
    for (int32_t k = 0; s->went == RECOMPUTED && k < n_pusher(s); k++) {
        join(&v, s->w, FIRST_PUSHER + k, 0, salt);
        v.r[k].max_tokens = 1;
    }
    for (int32_t k = 0; k < n; k++) {
        const kind *q = &s->w->kind[subject[k]];
        if (q->n_warm == 0) continue;
        any = true;
        join(&v, s->w, subject[k], 0, salt);
        ern_request *r = &v.r[v.n - 1];
        r->prompt = q->warm;
        r->n_prompt = q->n_warm;
        r->max_tokens = q->n_warm_out;
    }
    if (v.n > 0) play(s, &v);
    if (v.n > 0 && s->went == DISK) wait_saved(s);
    free(v.rec);
    return any;
}

/* Others take every page, one after the other: a block at a time where copies must keep up with them. */
static void fill(scene *s) {
    wave v = wave_new();
    int32_t prompt[4 * P], n = s->went == HOST ? P : 4 * P;
    for (int32_t k = 0; k < s->n_page; k += n / P) {
        random_tokens(s->w, (uint64_t)1 << 40 | s->w->n_fill++ << 10, prompt, n);
        v.n = 0;
        join(&v, s->w, FIRST_PUSHER, 0, 0);
        v.r[0].prompt = prompt;
        v.r[0].n_prompt = n;
        v.r[0].max_tokens = 1;
        play(s, &v);
    }
    free(v.rec);
}

/* Subjects, neighbours up to the batch, and before them who pushes them out; compare and count. */
static void run_wave(scene *s, const int32_t *subject, int32_t n, uint32_t salt) {
    world *w = s->w;
    wave v = wave_new();
    gather(s, &v, subject, n, salt);
    uint64_t was_in = n_in(s);
    play(s, &v);
    uint64_t came_in = n_in(s) - was_in;
    w->n_wave++;
    for (int32_t k = 0; k < v.n; k++) {
        compare(s, &v, k);
        const ern_event *end = &v.rec[k].end;
        w->n_preempted += end->n_preempted;
        w->n_cached += end->n_cached;
        w->n_host += end->n_cached_host;
        w->n_disk += end->n_cached_disk;
        int32_t i = v.kind[k];
        if (i >= SUBJECTS || !happened(s, (enum found)(i / SAMPLINGS), &w->kind[i], end, came_in)) continue;
        ++*seen(s, i);
    }
    if (s->went == NOWHERE) assert_int_equal(most_at_once(&v), batch_of[s->batch]);
    free(v.rec);
}

static scene scene_of(world *w, int32_t chunk, enum went went, int32_t batch, bool cache) {
    scene s = {.w = w, .chunk = chunk, .batch = batch, .went = went, .cache = cache};
    snprintf(s.name, sizeof s.name, "%s, chunk %d, %s, batch %d%s", w->name, chunk_of[chunk], went_name[went],
             batch_of[batch], cache ? "" : ", cache off");
    s.n_page = SEATS * (w->n_len / P); /* roomy */
    return s;
}

static void check_all_seen(const scene *s) {
    int32_t subject[SUBJECTS], n = subjects_left(s, subject);
    s->w->n_never += n;
    for (int32_t k = 0; k < n; k++)
        printf("%s: never so in %d waves one after the other, or in twice as many: %s %s\n", s->name, TRIES,
               found_name[subject[k] / SAMPLINGS], sampling_name[subject[k] % SAMPLINGS]);
}

static void run_scene(world *w, int32_t chunk, enum went went, int32_t batch, bool cache) {
    scene s = scene_of(w, chunk, went, batch, cache);
    int32_t subject[SUBJECTS], n, n_left = subjects_left(&s, subject);
    int32_t n_vain = 0; /* waves since the last that showed one */
    for (int32_t t = 0; t < 2 * TRIES && n_vain < TRIES && (n = next_subjects(&s, subject)) > 0; t++) {
        uint32_t salt = ++w->n_salt;
        if (went != NOWHERE) /* for copies that fall behind */
            atomic_store(&gate_pause_us, n_vain < 4 ? 0 : n_vain < 16 ? 1000 : 3000);
        /* A new one each time: after a preemption an engine keeps head-room for hundreds of steps. */
        if (went != NOWHERE) s.n_page = tight_pages(&s, subject, n, n_vain);
        if (!s.e) scene_open(&s, chunk_of[chunk], ern_counter64(seed + 1, (uint64_t)w->n_wave) % 4 != 1);
        bool to_find = cache && warm(&s, subject, n, salt);
        if (to_find && (went == HOST || went == DISK)) fill(&s);
        run_wave(&s, subject, n, salt);
        if (went != NOWHERE) scene_close(&s);
        int32_t was_left = n_left;
        n_left = subjects_left(&s, subject);
        n_vain = n_left < was_left ? 0 : n_vain + 1;
    }
    atomic_store(&gate_pause_us, 0);
    scene_close(&s);
    check_all_seen(&s);
}

/* One engine computes whole prompts and stops; the next one, which computes chunks, finds the blocks on disk: all that
 * the first one had the time to write, so those that miss some are tried again. */
static void run_restarted(world *w, int32_t chunk, int32_t batch) {
    enum { WAVES = SUBJECTS };
    scene s = scene_of(w, chunk, RESTARTED, batch, true);
    int32_t subject[WAVES][SUBJECTS], n[WAVES], left[SUBJECTS], n_left;
    /* An engine waits only a moment for the names of what is there: not for those of all scenes before. */
    made_dir_remove(w->dir);
    made_dir(w->dir);
    for (int32_t t = 0; t < TRIES && (n_left = subjects_left(&s, left)) > 0; t++) {
        int32_t n_wave = 0;
        uint32_t first_salt = w->n_salt + 1;
        scene_open(&s, 0, true);
        for (int32_t i = 0; i < n_left; n_wave++) {
            for (n[n_wave] = 0; i < n_left && n[n_wave] < batch_of[batch]; i++) subject[n_wave][n[n_wave]++] = left[i];
            warm(&s, subject[n_wave], n[n_wave], ++w->n_salt);
        }
        scene_close(&s);
        scene_open(&s, chunk_of[chunk], true);
        for (int32_t k = 0; k < n_wave; k++) run_wave(&s, subject[k], n[k], first_salt + (uint32_t)k);
        scene_close(&s);
    }
    check_all_seen(&s);
}

/* ---- worlds ---------------------------------------------------------------------------------------------------- */

static void compute_alone(world *w) {
    scene s = {.w = w, .went = NOWHERE, .n_page = w->n_len / P + 2, .name = "alone"};
    scene_open(&s, 0, false);
    for (int32_t round = 0; round < 2; round++)
        for (int32_t i = 0; i < KINDS; i++) {
            bool turn = i / SAMPLINGS == TURN;
            if (round == 1 && !turn) continue;
            if (round == 1) make_turn(w, i);
            wave v = wave_new();
            join(&v, w, i, 0, 0);
            play(&s, &v);
            w->kind[i].alone = v.rec[0];
            free(v.rec);
        }
    scene_close(&s);
}

/* What one call of run_world covers. */
typedef struct plan {
    const char *backend;
    ern_kv_dtype kv;
    int32_t n_thread, blocks;
    const char *chunks, *batches; /* a character each: 'x' where it is tried, 'l' where the long test does */
    int32_t n_never;              /* combinations that may not come about: a GPU can be too fast for the disk */
} plan;

static int32_t n_combination;
static bool all; /* the long test */

static bool is_tried(char c) { return c == 'x' || (c == 'l' && all); }

static world *world_new(const plan *p, ern_model *model) {
    world *w = calloc(1, sizeof *w);
    if (!w) abort();
    w->ops = ern_backend_find(p->backend);
    w->model = model;
    w->kv = p->kv;
    w->n_thread = p->n_thread;
    w->blocks = p->blocks;
    w->n_len = (p->blocks + 4) * P;
    made_dir(w->dir);
    for (int32_t i = 0; i < KINDS; i++) {
        if (i < SUBJECTS)
            make_subject(w, i);
        else if (i < FIRST_PUSHER)
            make_neighbour(w, i);
        else
            make_pusher(w, i);
    }
    return w;
}

static void run_world(ern_model *model, plan p) {
    static const char *const kv_name[] = {"bf16", "f32", "int8"};
    if (few) p.chunks = ".x..x", p.batches = "x.x.";
    int64_t start_us = ern_now_us(), took_us[WENTS] = {0};
    world *w = world_new(&p, model);
    snprintf(w->name, sizeof w->name, "%s %s%s, KV %s", p.backend, p.blocks > 4 ? "long " : "",
             model->config.n_expert > 0 ? "experts" : "dense", kv_name[p.kv]);
    compute_alone(w);
    for (int32_t c = 0; c < CHUNKS; c++)
        for (int32_t b = 0; b < BATCHES && is_tried(p.chunks[c]); b++)
            for (int32_t went = 0; went < WENTS && is_tried(p.batches[b]); went++) {
                int64_t from_us = ern_now_us();
                if (went <= RECOMPUTED) run_scene(w, c, (enum went)went, b, false);
                if (went == RESTARTED)
                    run_restarted(w, c, b);
                else
                    run_scene(w, c, (enum went)went, b, true);
                took_us[went] += ern_now_us() - from_us;
            }
    int32_t n = 0;
    const uint32_t *seen_of = &w->n_seen[0][0][0][0][0];
    for (size_t k = 0; k < sizeof w->n_seen / sizeof *seen_of; k++) n += seen_of[k] > 0;
    printf("%s: %d combinations in %.1f s (", w->name, n, (double)(ern_now_us() - start_us) * 1e-6);
    for (int32_t k = 0; k < WENTS; k++) printf("%s%s %.1f", k ? ", " : "", went_name[k], (double)took_us[k] * 1e-6);
    printf(
        "): %d waves, %d engines, %d preemptions; tokens found %lld, of them from host memory %lld, from disk %lld\n",
        w->n_wave, w->n_open, w->n_preempted, (long long)w->n_cached, (long long)w->n_host, (long long)w->n_disk);
    n_combination += n;
    assert_true(w->n_never <= p.n_never);
    made_dir_remove(w->dir);
    free(w);
}

static void run_made(const char *shape, bool paddle, int32_t n_layer, plan p) {
    made_model m = made_model_open_layers(shape, paddle, 11, n_layer);
    run_world(m.model, p);
    made_model_close(&m);
}

/* KV of every dtype, dense and with experts. */
static void test_cpu_bf16(void **state) {
    (void)state;
    run_made("tiny-dense", false, 0, (plan){"cpu", ERN_KV_BF16, 1, 4, "xxxxx", "xxxx", 0});
}

static void test_cpu_int8_experts(void **state) {
    (void)state;
    run_made("tiny-moe", true, 0, (plan){"cpu", ERN_KV_I8, 1, 4, "llxlx", "xxxx", 0});
}

static void test_ref(void **state) {
    (void)state;
    run_made("tiny-dense", true, 1, (plan){"ref", ERN_KV_F32, 1, 4, "l.x.l", "l.x.", 0});
}

/* Prompts longer than a chunk of 256 and than a run of keys that attention adds up at once. Not in chunks of one: such
 * a prompt takes so many steps that those who push have long ended when it is there to be pushed. */
static void test_cpu_long(void **state) {
    (void)state;
    run_made("tiny-dense", false, 0, (plan){"cpu", ERN_KV_BF16, 2, 17, "..lxx", "l.x.", 0});
}

/* Weights that were trained: logits as sharp as in earnest. */
static void test_demo(void **state) {
    (void)state;
    ern_model *m;
    ern_err err;
    ern_model_options o = {.dir = "models/demo-moe"};
    if (ern_model_open(&m, &o, &err) != ERN_OK) fail_msg("%s", err.text);
    run_world(m, (plan){"cpu", ERN_KV_BF16, 2, 4, "llllx", "llx.", 0});
    ern_model_close(m);
}

/* Called by hand and by make gpu-test: no other machine has it. */
static void test_cuda(void **state) {
    (void)state;
    run_made("tiny-dense", false, 0, (plan){"cuda", ERN_KV_BF16, 1, 4, "x.x.x", "xx.x", 30});
    run_made("tiny-moe", true, 0, (plan){"cuda", ERN_KV_I8, 1, 4, "..x.x", "x..x", 15});
    run_made("tiny-dense", false, 0, (plan){"cuda", ERN_KV_BF16, 1, 17, "..xx.", "x.x.", 15});
}

int main(int argc, char **argv) {
    all = argc > 1 && strcmp(argv[1], "all") == 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    ern_err err;
    if (ern_log_open(ERN_LOG_WARN, NULL, &err) != ERN_OK) abort();
    if (few) printf("built with a sanitizer: left out: the sizes between\n");
    printf("seed %llu\n", (unsigned long long)seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cpu_bf16), cmocka_unit_test(test_cpu_int8_experts),
        cmocka_unit_test(test_ref),      cmocka_unit_test(test_cpu_long),
        cmocka_unit_test(test_demo),
    };
    const struct CMUnitTest on_cuda[] = {cmocka_unit_test(test_cuda)};
    bool cuda = argc > 1 && strcmp(argv[1], "cuda") == 0;
    int failed = cuda ? cmocka_run_group_tests(on_cuda, NULL, NULL) : cmocka_run_group_tests(tests, NULL, NULL);
    printf("%d combinations\n", n_combination);
    return failed;
}
