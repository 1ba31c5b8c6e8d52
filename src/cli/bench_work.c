/* Timing steps beside limits. See bench_work.h. */
#include "cli/bench_work.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/counter.h"
#include "base/os.h"
#include "cli/bench_stats.h"

enum {
    ENOUGH_US = 8000000,
    CELLS = 64,
    STEPS_MAX = 64,
    STEPS_LEAST = 8,
    ROUNDS_MAX = 100,
    ROUND_US = 400000,
    PROMPTS_US = 2000000, /* of a round of prompts */
    QUICK_PROMPTS_US = 5000,
    LIMIT_US = 15000,
    TRIES = 3, /* of a look */
    QUICK_US = 500,
    LOOK_EVERY_US = 500000 /* of a long round */
};
#define READ_LEAST ((uint64_t)64 << 20)
#define READ_MOST ((uint64_t)4 << 30)

struct bench_steps {
    bench_steps_options o;
    ern_backend *backend;
    ern_limits *limits;
    int32_t n_page_max; /* pages of a sequence */
    int32_t *token, *pos, *cell, *want, *row0, *kv_len, *page;
    double kv_bytes; /* of one position */
    int32_t *seen;   /* [longest] tokens that penalties look at */
    ern_sample *sample;
    /* the probed pass */
    double experts;
    bool leaves; /* without the last layer, of which the timed steps' wanted rows alone choose */
    bool touched[ERN_LAYERS_MAX][ERN_EXPERTS_MAX];
};

/* ---- steps ----------------------------------------------------------------------------------------------------- */

static ern_sample rule(const bench_steps *b, int32_t seq, int32_t pos0, int32_t n_each) {
    ern_sample one = {.top_p = 1, .repetition = 1, .forced = -1, .n_top = -1, .position = pos0 + n_each};
    if (!b->o.sampled) return one;
    one.temperature = 0.8f;
    one.top_k = 50;
    one.top_p = 0.9f;
    one.repetition = 1.1f;
    one.frequency = one.presence = 0.1f;
    one.seed = (uint64_t)seq;
    one.seen = b->seen;
    one.n_seen = pos0;
    one.n_prompt = pos0 / 2;
    return one;
}

/* Sequences first..first+n_seq-1, n_each rows of each from position pos0; the last row of each is sampled where
 * `wanted`; prev: feed back the step before. Each sequence has tokens of its own, so that experts are chosen as by
 * strangers. */
static void submit_from(bench_steps *b, int32_t first, int32_t n_seq, int32_t pos0, int32_t n_each, bool wanted,
                        bool prev) {
    const int32_t V = b->o.model->config.n_vocab;
    for (int32_t s = 0; s < n_seq; s++) {
        b->row0[s] = s * n_each;
        b->kv_len[s] = pos0 + n_each;
        b->want[s] = (s + 1) * n_each - 1;
        b->sample[s] = rule(b, s, pos0, n_each);
        for (int32_t i = 0; i < n_each; i++) {
            const int32_t r = s * n_each + i, p = pos0 + i;
            b->token[r] =
                prev ? ERN_PREV(s) : (int32_t)(ern_counter64((uint64_t)(first + s), (uint64_t)p) % (uint64_t)V);
            b->pos[r] = p;
            b->cell[r] = b->page[(first + s) * b->n_page_max + p / CELLS] * CELLS + p % CELLS;
        }
    }
    b->row0[n_seq] = n_seq * n_each;
    const ern_batch batch = {.n_row = n_seq * n_each,
                             .n_seq = n_seq,
                             .n_want = wanted ? n_seq : 0,
                             .n_page_max = b->n_page_max,
                             .token = b->token,
                             .pos = b->pos,
                             .cell = b->cell,
                             .row0 = b->row0,
                             .kv_len = b->kv_len,
                             .page = b->page + first * b->n_page_max,
                             .want = b->want,
                             .sample = b->sample};
    b->backend->ops->submit(b->backend, &batch);
}

static void submit(bench_steps *b, int32_t n_seq, int32_t pos0, int32_t n_each, bool wanted, bool prev) {
    submit_from(b, 0, n_seq, pos0, n_each, wanted, prev);
}

static ern_status wait_one(bench_steps *b, ern_err *err) {
    ern_result out;
    return b->backend->ops->wait(b->backend, &out, err);
}

static double since(int64_t begin_us) { return (double)(ern_now_us() - begin_us) * 1e-6; }

/* n steps of one token each from `context` on. One more is submitted than is timed, so that two are always in flight.
 */
static ern_status decode_steps(bench_steps *b, int32_t batch, int32_t context, int32_t n, double *seconds,
                               ern_err *err) {
    submit(b, batch, context, 1, true, false);
    ERN_TRY(wait_one(b, err)); /* threads are awake, tokens are sampled */
    const int64_t begin_us = ern_now_us();
    submit(b, batch, context + 1, 1, true, true);
    for (int32_t i = 0; i < n; i++) {
        if (i + 1 < n) submit(b, batch, context + 2 + i, 1, true, true);
        ERN_TRY(wait_one(b, err));
    }
    *seconds = since(begin_us) / n;
    return ERN_OK;
}

/* ---- counting -------------------------------------------------------------------------------------------------- */

static void on_stage(void *ud, const char *stage, int32_t layer, int32_t row, const float *data, int32_t n_row,
                     int32_t n_col) {
    bench_steps *b = ud;
    (void)n_col;
    if (strcmp(stage, "router") != 0 || layer < 0 || layer >= b->o.model->config.n_layer - b->leaves) return;
    if (row == 0) memset(b->touched[layer], 0, sizeof b->touched[layer]);
    b->experts += bench_touch_experts(b->o.model, layer, data, n_row, b->touched[layer]);
}

/* The same steps are run once with the probe on, untimed, to see which experts the rows choose: the tokens depend on
 * nothing else, so the timed steps choose the same; of the last layer, which rows leave only where nobody looks,
 * bench_prefill counts by itself. */
static void probe(bench_steps *b, bool on, bool leaves) {
    b->experts = 0;
    b->leaves = leaves;
    b->backend->ops->probe(b->backend, on && b->o.model->config.n_expert > 0 ? on_stage : NULL, b);
}

/* ---- rounds ---------------------------------------------------------------------------------------------------- */

/* The limits stand for the work between two looks, and weigh as its time does. */
typedef struct round {
    double seconds, fraction; /* of a step, or of a prompt */
    double read, compute;     /* limits: the mean so far */
    double looked_s;          /* of work that this mean is of */
    double last_read, last_compute;
} round;

/* Worst first. Without limits all fractions are 0, and the time decides. */
static int by_fraction(const void *a, const void *b) {
    const round *x = a, *y = b;
    if (x->fraction != y->fraction) return x->fraction > y->fraction ? 1 : -1;
    return (x->seconds < y->seconds) - (x->seconds > y->seconds);
}

static double larger(double a, double b) { return a > b ? a : b; }

/* Look at both limits, after worked_s of work since the last look, or 0 before it. What a round is held against is what
 * the machine gave while it ran: some limits change by a factor within a second (docs/speed.md). Each look is the best
 * of several short ones: a neighbour that takes a core for a moment lowers what one of them sees. */
static void look(bench_steps *b, const bench_result *of, round *at, double worked_s) {
    if (!b->limits) return;
    const int64_t min_us = b->o.quick ? QUICK_US : LIMIT_US;
    const double bytes = larger(of->bytes, (double)READ_LEAST); /* cut at the buffer's end: half more than a token's */
    double read = 0, compute = 0;
    for (int i = 0; i < TRIES; i++) {
        read = larger(read, ern_limits_read(b->limits, (uint64_t)bytes, min_us));
        if (of->has_rate) compute = larger(compute, ern_limits_compute(b->limits, of->rate, ERN_REACH_L2, min_us));
    }
    if (worked_s > 0) {
        const double share = worked_s / (at->looked_s += worked_s);
        at->read += ((at->last_read + read) / 2 - at->read) * share;
        at->compute += ((at->last_compute + compute) / 2 - at->compute) * share;
    }
    at->last_read = read, at->last_compute = compute;
}

/* One prompt. Two steps in flight, as the engine keeps them; where limits are looked at (at not NULL) one, a look
 * behind the prompt, and between steps, once half a second has passed. The clock rests meanwhile: what that takes of a
 * step's time is microseconds. seconds: what the prompt took is added. */
static ern_status prefill_steps(bench_steps *b, int32_t n, const bench_result *limits_of, round *at, double *seconds,
                                ern_err *err) {
    const bool looks = at && b->limits;
    int64_t begin_us = ern_now_us();
    int32_t in_flight = 0;
    for (int32_t from = 0; from < n; from += b->o.n_row_max) {
        const int32_t rows = n - from < b->o.n_row_max ? n - from : b->o.n_row_max;
        submit(b, 1, from, rows, from + rows == n, false);
        if (++in_flight < (looks ? 1 : 2)) continue;
        ERN_TRY(wait_one(b, err));
        in_flight--;
        const double worked_s = since(begin_us);
        if (!looks || (from + rows < n && worked_s < LOOK_EVERY_US * 1e-6)) continue;
        *seconds += worked_s;
        look(b, limits_of, at, worked_s);
        begin_us = ern_now_us();
    }
    while (in_flight-- > 0) ERN_TRY(wait_one(b, err));
    if (!looks) *seconds += since(begin_us);
    return ERN_OK;
}

/* The prompt again and again: a short one ends before a limit that changes within a second has been seen as it is in
 * the mean. */
static ern_status prefill_round(bench_steps *b, int32_t n, const bench_result *limits_of, round *at, ern_err *err) {
    const double least_s = !b->limits ? 0 : (b->o.quick ? QUICK_PROMPTS_US : PROMPTS_US) * 1e-6;
    double all_s = 0;
    int32_t prompts = 0;
    look(b, limits_of, at, 0);
    do {
        ERN_TRY(prefill_steps(b, n, limits_of, at, &all_s, err));
        prompts++;
    } while (all_s < least_s);
    at->seconds = all_s / prompts;
    return ERN_OK;
}

/* Fill in what follows from the counts and the rounds. */
static void conclude(bench_result *out, round *r, int n, double tokens) {
    for (int i = 0; i < n; i++) {
        const double reading_s = r[i].read > 0 ? out->bytes / r[i].read : 0;
        const double computing_s = r[i].compute > 0 ? out->operations / r[i].compute : 0;
        r[i].fraction = larger(reading_s, computing_s) / r[i].seconds;
        out->best_tokens_per_s = larger(out->best_tokens_per_s, tokens / r[i].seconds);
    }
    qsort(r, (size_t)n, sizeof *r, by_fraction);
    const round *m = &r[(n - 1) / 2];
    out->seconds = m->seconds;
    out->tokens_per_s = tokens / m->seconds;
    out->read = m->read;
    out->compute = m->compute;
    out->by_read = m->compute <= 0 || out->bytes / m->read >= out->operations / m->compute;
    out->fraction = m->fraction;
    out->least_fraction = r[0].fraction;
    out->best_fraction = r[n - 1].fraction;
}

static void count(bench_steps *b, const bench_work *w, bench_result *out) {
    const ern_model *m = b->o.model;
    bench_work no_kv = *w;
    no_kv.kv_read = no_kv.kv_write = 0;
    out->experts = w->experts;
    out->bytes = bench_bytes(m, w);
    out->kv_bytes = out->bytes - bench_bytes(m, &no_kv);
    out->operations = bench_operations(m, w);
}

/* Steps that fill ROUND_US, at least STEPS_LEAST. */
static int32_t steps_of(const bench_steps *b, double seconds) {
    if (b->o.quick) return STEPS_LEAST;
    const double n = ROUND_US * 1e-6 / seconds;
    return n < STEPS_LEAST ? STEPS_LEAST : n > STEPS_MAX ? STEPS_MAX : (int32_t)n;
}

/* Warm, and what a step counts; n: steps of a round. */
static ern_status decode_begin(bench_steps *b, int32_t batch, int32_t context, bench_result *out, int32_t *n,
                               ern_err *err) {
    *out = (bench_result){.batch = batch, .context = context};
    out->has_rate = ern_rate_for(bench_dtype(b->o.model), b->o.level, &out->rate);
    double seconds;
    ERN_TRY(decode_steps(b, batch, context, STEPS_LEAST, &seconds, err));
    *n = steps_of(b, seconds);
    probe(b, true, false);
    if (b->o.model->config.n_expert > 0) ERN_TRY(decode_steps(b, batch, context, *n, &seconds, err));
    const double experts = b->experts / (*n + 1); /* the step before the clock starts is seen as well */
    probe(b, false, false);
    const double visible = context + 2 + (*n - 1) / 2.0; /* in the mean step, its own position counted */
    count(b,
          &(bench_work){.n_row = batch,
                        .n_want = batch,
                        .experts = experts,
                        .kv_read = batch * visible,
                        .kv_write = batch,
                        .kv_bytes = b->kv_bytes,
                        .pairs = batch * visible},
          out);
    return ERN_OK;
}

ern_status bench_decode(bench_steps *b, int32_t batch, int32_t context, bench_result *out, ern_err *err) {
    int32_t n;
    ERN_TRY(decode_begin(b, batch, context, out, &n, err));
    round r[ROUNDS_MAX] = {{0}};
    const int64_t begin_us = ern_now_us();
    int rounds = 0;
    do {
        look(b, out, &r[rounds], 0);
        ERN_TRY(decode_steps(b, batch, context, n, &r[rounds].seconds, err));
        look(b, out, &r[rounds], r[rounds].seconds);
    } while (++rounds < b->o.n_round && ern_now_us() - begin_us < ENOUGH_US);
    conclude(out, r, rounds, batch);
    return ERN_OK;
}

/* A round of a row, and of the row that it is held against, a moment before. */
typedef struct pair {
    round row, base;
    double share;
} pair;
static int by_share(const void *a, const void *b) {
    const double x = ((const pair *)a)->share, y = ((const pair *)b)->share;
    return (x > y) - (x < y);
}

ern_status bench_decode_against(bench_steps *b, int32_t context, int32_t base_context, int n_busy, bench_result *out,
                                double *share, ern_err *err) {
    int32_t n, n_base;
    bench_result base;
    ERN_TRY(decode_begin(b, 1, base_context, &base, &n_base, err));
    ERN_TRY(decode_begin(b, 1, context, out, &n, err));
    pair r[ROUNDS_MAX];
    memset(r, 0, sizeof r);
    const int64_t begin_us = ern_now_us();
    int rounds = 0;
    do {
        pair *p = &r[rounds];
        bench_spinners busy;
        look(b, out, &p->row, 0);
        ERN_TRY(decode_steps(b, 1, base_context, n_base, &p->base.seconds, err));
        ERN_TRY(bench_spin(&busy, n_busy, err));
        const ern_status status = decode_steps(b, 1, context, n, &p->row.seconds, err);
        bench_spin_end(&busy);
        if (status != ERN_OK) return status;
        look(b, out, &p->row, p->row.seconds);
        const double more_s = p->row.seconds - p->base.seconds, more_bytes = out->kv_bytes - base.kv_bytes;
        p->share = n_busy ? p->base.seconds / p->row.seconds : bench_share_added(more_bytes, more_s, p->row.read);
    } while (++rounds < b->o.n_round && ern_now_us() - begin_us < ENOUGH_US);
    qsort(r, (size_t)rounds, sizeof *r, by_share);
    *share = r[(rounds - 1) / 2].share;
    round row[ROUNDS_MAX];
    for (int i = 0; i < rounds; i++) row[i] = r[i].row;
    conclude(out, row, rounds, 1);
    return ERN_OK;
}

ern_status bench_prefill(bench_steps *b, int32_t n, bench_result *out, ern_err *err) {
    const ern_model *m = b->o.model;
    *out = (bench_result){.prefill = true, .batch = 1, .context = n};
    const bool leaves = strcmp(b->backend->ops->name, "ref") != 0; /* the plain one computes all rows */
    out->has_rate = ern_rate_for(bench_dtype(b->o.model), b->o.level, &out->rate);
    double warm_s = 0;
    const bool all = m->config.n_expert > 0; /* else a step is enough to be warm */
    probe(b, true, leaves);
    ERN_TRY(prefill_steps(b, all || n < b->o.n_row_max ? n : b->o.n_row_max, NULL, NULL, &warm_s, err));
    /* the wanted row chooses as many as a row does */
    const bool spared = leaves && m->layer[m->config.n_layer - 1].is_moe;
    const double experts = b->experts + (spared ? m->config.n_expert_used : 0);
    probe(b, false, false);
    for (int32_t at = 0; at < n; at += b->o.n_row_max) { /* each step reads the weights and its visible KV */
        const double rows = n - at < b->o.n_row_max ? n - at : b->o.n_row_max;
        bench_result step = {0};
        count(b,
              &(bench_work){.n_row = rows,
                            .n_want = at + rows == n,
                            .kv_read = at + rows,
                            .kv_write = rows,
                            .kv_bytes = b->kv_bytes,
                            .pairs = rows * at + rows * (rows + 1) / 2,
                            .leaves = leaves,
                            .want_pairs = at + rows == n ? n : 0},
              &step);
        out->bytes += step.bytes;
        out->kv_bytes += step.kv_bytes;
        out->operations += step.operations;
    }
    bench_work only_experts = {.experts = experts}, nothing = {0};
    out->experts = experts;
    out->bytes += bench_bytes(m, &only_experts) - bench_bytes(m, &nothing);
    round r[ROUNDS_MAX] = {{0}};
    const int64_t begin_us = ern_now_us();
    int rounds = 0;
    do {
        ERN_TRY(prefill_round(b, n, out, &r[rounds], err));
    } while (++rounds < b->o.n_round && ern_now_us() - begin_us < ENOUGH_US);
    conclude(out, r, rounds, n);
    return ERN_OK;
}

ern_status bench_job(bench_steps *b, int32_t n_seq, int32_t n_in, int32_t n_out, double *seconds, ern_err *err) {
    ERN_ASSERT(n_in <= b->o.n_row_max && n_seq <= b->o.n_seq_max && n_in + n_out <= b->o.n_context_max);
    const int64_t begin_us = ern_now_us();
    for (int32_t s = 0; s < n_seq; s++) {
        submit_from(b, s, 1, 0, n_in, true, false);
        if (s > 0) ERN_TRY(wait_one(b, err));
    }
    for (int32_t i = 0; i + 1 < n_out; i++) {
        submit(b, n_seq, n_in + i, 1, true, i > 0);
        ERN_TRY(wait_one(b, err));
    }
    ERN_TRY(wait_one(b, err));
    *seconds = since(begin_us);
    return ERN_OK;
}

/* ---- open and close -------------------------------------------------------------------------------------------- */

/* Keys and values of about 1 with both signs, as bf16, as f32 and as codes, in every page: what is in the cache costs
 * nothing to compute, but a page that was never written would be one shared page of zeros. */
static ern_status fill_pages(bench_steps *b, int32_t n_page, uint64_t page_bytes, ern_err *err) {
    ern_bf16 *host = malloc(page_bytes);
    if (!host) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for a page of KV");
    for (uint64_t i = 0; i < page_bytes / sizeof *host; i++)
        host[i] = (ern_bf16)((ern_counter64(3, i) & 0x807fu) | 0x3f00u);
    for (int32_t p = 0; p < n_page; p++) b->backend->ops->kv_write(b->backend, &p, 1, host);
    free(host);
    return ERN_OK;
}

static int32_t pages_of(int32_t n_len) { return (n_len + CELLS - 1) / CELLS; }

static ern_status open_all(bench_steps *b, ern_err *err) {
    const ern_backend_ops *ops = b->o.backend;
    const int32_t rows = b->o.n_row_max > b->o.n_seq_max ? b->o.n_row_max : b->o.n_seq_max, S = b->o.n_seq_max;
    const int32_t longest = b->o.n_context_max > b->o.n_prompt_max ? b->o.n_context_max : b->o.n_prompt_max;
    const int32_t n_len = longest + STEPS_MAX + 2, n_each = pages_of(b->o.n_context_max + STEPS_MAX + 2);
    b->n_page_max = pages_of(n_len);
    const int32_t n_page = n_each * S > b->n_page_max ? n_each * S : b->n_page_max;
    const ern_backend_options o = {.n_page = n_page,
                                   .n_page_cell = CELLS,
                                   .n_row_max = rows,
                                   .n_seq_max = S,
                                   .n_want_max = S,
                                   .n_len_max = n_len,
                                   .kv_dtype = b->o.kv_dtype,
                                   .act_exact = b->o.act_exact,
                                   .n_thread = b->o.n_thread,
                                   .level = b->o.level};
    ern_backend_plan plan;
    ERN_TRY(ops->plan(&plan, b->o.model, &o, err));
    b->kv_bytes = (double)plan.page_bytes / CELLS;
    ERN_TRY(ops->open(&b->backend, b->o.model, &o, err));
    int32_t *ints = calloc((size_t)(3 * rows + 3 * S + 1 + S * b->n_page_max + n_len), sizeof *ints);
    b->token = ints;
    b->sample = calloc((size_t)S, sizeof *b->sample);
    if (!ints || !b->sample) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for a batch");
    b->pos = b->token + rows;
    b->cell = b->pos + rows;
    b->want = b->cell + rows;
    b->kv_len = b->want + S;
    b->row0 = b->kv_len + S;
    b->page = b->row0 + S + 1;
    b->seen = b->page + S * b->n_page_max;
    for (int32_t i = 0; i < n_len; i++)
        b->seen[i] = (int32_t)(ern_counter64(5, (uint64_t)i) % (uint64_t)b->o.model->config.n_vocab);
    for (int32_t q = 0; q < S; q++) /* a prompt longer than a context lies in the pages of several sequences */
        for (int32_t i = 0; i < b->n_page_max; i++) b->page[q * b->n_page_max + i] = (q * n_each + i) % n_page;
    ERN_TRY(fill_pages(b, n_page, plan.page_bytes, err));
    if (strcmp(ops->name, "cpu") != 0) return ERN_OK; /* whose limits the loops of bench.h are */
    bench_work one = {.n_row = 1, .n_want = 1, .experts = 0};
    for (int32_t i = 0; i < b->o.model->config.n_layer; i++)
        if (b->o.model->layer[i].is_moe) one.experts += b->o.model->config.n_expert_used;
    double bytes = bench_bytes(b->o.model, &one) * 1.5;
    const double most = larger((double)(ern_memory_available_bytes() / 4), (double)READ_LEAST);
    if (bytes > most) bytes = most;
    if (bytes > (double)READ_MOST) bytes = (double)READ_MOST;
    return ern_limits_open(&b->limits, b->o.n_thread, (uint64_t)larger(bytes, (double)READ_LEAST), true, err);
}

ern_status bench_steps_open(bench_steps **out, const bench_steps_options *o, ern_err *err) {
    ERN_ASSERT(o->n_round >= 1 && o->n_round <= ROUNDS_MAX);
    bench_steps *b = calloc(1, sizeof *b);
    *out = NULL;
    if (!b) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the benchmark");
    b->o = *o;
    const ern_status s = open_all(b, err);
    if (s == ERN_OK)
        *out = b;
    else
        bench_steps_close(b);
    return s;
}

void bench_steps_close(bench_steps *b) {
    if (!b) return;
    if (b->backend) b->backend->ops->close(b->backend);
    ern_limits_close(b->limits);
    free(b->token);
    free(b->sample);
    free(b);
}

int bench_steps_threads(const bench_steps *b) { return b->limits ? ern_limits_threads(b->limits) : 0; }

/* ---- busy neighbours ------------------------------------------------------------------------------------------- */

/* The nth allowed processor from the last one down. */
static void tie_to_last(int nth) {
    cpu_set_t all, one;
    if (sched_getaffinity(0, sizeof all, &all) != 0) return;
    for (int c = CPU_SETSIZE - 1; c >= 0; c--) {
        if (!CPU_ISSET((size_t)c, &all) || nth-- > 0) continue;
        CPU_ZERO(&one);
        CPU_SET((size_t)c, &one);
        (void)sched_setaffinity(0, sizeof one, &one);
        return;
    }
}

ern_status bench_spin(bench_spinners *s, int n, ern_err *err) {
    *s = (bench_spinners){.n = 0};
    const int parent = (int)getpid(), n_cpu = ern_cpu_count();
    if (n > n_cpu || n > (int)(sizeof s->pid / sizeof *s->pid))
        return ERN_FAIL(err, ERN_ERR_USAGE, "--busy is %d, and there are %d processors here", n, n_cpu);
    for (int i = 0; i < n; i++) {
        const int pid = (int)fork();
        if (pid == 0) {
            (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() != parent) _exit(0);
            tie_to_last(i);
            for (volatile unsigned k = 0;; k++) {
            }
        }
        if (pid < 0) {
            bench_spin_end(s);
            return ERN_FAIL(err, ERN_ERR_MEMORY, "no process to keep a processor busy: %s", strerror(errno));
        }
        s->pid[s->n++] = pid;
    }
    return ERN_OK;
}

void bench_spin_end(bench_spinners *s) {
    for (int i = 0; i < s->n; i++) {
        (void)kill(s->pid[i], SIGKILL);
        while (waitpid(s->pid[i], NULL, 0) < 0 && errno == EINTR) {
        }
    }
    s->n = 0;
}
