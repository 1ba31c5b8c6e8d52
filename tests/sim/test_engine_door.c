/* The engine's door: what it refuses, what it plans, how requests end. Scripted backend, real threads. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/os.h"
#include "sim/scripted.h"

enum { VOCAB = 100 };
static const int32_t prompt[200] = {1, 2, 3, 4, 5};

static ern_model model;
static ern_engine_options good(void) {
    model = scripted_model(VOCAB, 4096);
    return (ern_engine_options){.backend = &scripted_ops,
                                .model = &model,
                                .max_model_len = 1024,
                                .max_num_seqs = 4,
                                .max_batched_tokens = 128,
                                .chunked_prefill = true,
                                .memory_bytes = 1 << 30,
                                .overlap = true};
}

static ern_request request(int32_t n_prompt, int32_t max_tokens) {
    return (ern_request){.prompt = prompt,
                         .n_prompt = n_prompt,
                         .max_tokens = max_tokens,
                         .n_prompt_top = -1,
                         .sample = {.temperature = 1, .top_p = 1, .repetition = 1, .forced = -1, .n_top = -1}};
}

static ern_engine *start(const ern_engine_options *o) {
    ern_engine *e;
    ern_err err;
    if (ern_engine_open(&e, o, &err) != ERN_OK) fail_msg("%s", err.text);
    return e;
}

static void submit(ern_engine *e, ern_request *r) {
    ern_err err;
    if (ern_engine_submit(e, r, &err) != ERN_OK) fail_msg("%s", err.text);
}

/* Wait until n requests run, or are parked. */
static void wait_running(ern_engine *e, int32_t n, bool parked) {
    ern_engine_stats st;
    for (int k = 0; k < 60000; k++) {
        ern_engine_stats_read(e, &st);
        if ((parked ? st.n_parked : st.n_running) == n) return;
        usleep(1000);
    }
    fail_msg("not %d %s after a minute", n, parked ? "parked" : "running");
}

/* Take what is in the outbox; returns the number of events. */
static int32_t take_all(ern_engine *e) {
    ern_event ev;
    int32_t n = 0;
    while (ern_engine_next(e, &ev, 0)) n++;
    return n;
}

/* Take events of one request until its END; returns the tokens seen. */
static int32_t take_until_end(ern_engine *e, const ern_request *r, ern_event *end) {
    scripted_oracle oracle;
    scripted_oracle_init(&oracle, r, VOCAB);
    int32_t n = 0;
    while (ern_engine_next(e, end, 60000000)) {
        assert_ptr_equal(end->request, r);
        if (end->kind == ERN_EVENT_END) return n;
        ern_event want;
        scripted_oracle_next(&oracle, &want);
        assert_true(scripted_same(end, &want));
        n += end->kind == ERN_EVENT_TOKEN;
    }
    fail_msg("no END within a minute");
    return n;
}

/* ---- the plan -------------------------------------------------------------------------------------------------- */

typedef struct bad_plan {
    const char *names; /* the error must contain this */
    ern_code code;
    int32_t seqs, len, rows, cells, n_page;
    bool chunked;
    uint64_t memory;
} bad_plan;

static void test_plan_refuses(void **state) {
    (void)state;
    static const bad_plan bad[] = {
        {"--max-num-seqs is 0", ERN_ERR_USAGE, 0, 1024, 128, 64, 0, true, 1 << 30},
        {"--max-num-seqs is 257", ERN_ERR_USAGE, 257, 1024, 512, 64, 0, true, 1 << 30},
        {"--max-model-len is 15", ERN_ERR_USAGE, 4, 15, 60, 8, 0, true, 1 << 30},
        {"max_position_embeddings", ERN_ERR_USAGE, 4, 4097, 128, 64, 0, true, 1 << 30},
        {"--max-num-seqs 200", ERN_ERR_USAGE, 200, 1024, 199, 64, 0, true, 1 << 30},
        {"--max-num-batched-tokens is 65", ERN_ERR_USAGE, 4, 16, 65, 8, 0, true, 1 << 30},
        {"--block-size 64", ERN_ERR_USAGE, 4, 1024, 63, 64, 0, true, 1 << 30},
        {"--block-size is -1", ERN_ERR_USAGE, 4, 1024, 63, -1, 0, true, 1 << 30},
        {"--enable-chunked-prefill", ERN_ERR_USAGE, 4, 1024, 1023, 64, 0, false, 1 << 30},
        {"--num-gpu-blocks-override is -1", ERN_ERR_USAGE, 4, 1024, 128, 64, -1, true, 1 << 30},
        {"--max-model-len 960 would fit", ERN_ERR_MEMORY, 4, 1024, 128, 64, 17, true, 1 << 30},
        {"--num-gpu-blocks-override", ERN_ERR_MEMORY, 4, 1024, 128, 64, 1000000, true, 1 << 28},
        {"give that or less", ERN_ERR_MEMORY, 4, 1024, 128, 64, 1000000, true, 1 << 28},
        {"fit in memory", ERN_ERR_MEMORY, 4, 1024, 128, 64, 0, true, 1 << 20},
        {"raise --memory", ERN_ERR_MEMORY, 4, 1024, 128, 64, 0, true, 1 << 16},
        {"raise --memory", ERN_ERR_MEMORY, 4, 1024, 128, 64, 40, true, 1 << 16},
        {"raise --num-gpu-blocks-override", ERN_ERR_MEMORY, 4, 1024, 128, 64, 2, true, 1 << 28},
    };
    for (size_t k = 0; k < sizeof bad / sizeof *bad; k++) {
        ern_engine_options o = good();
        o.max_num_seqs = bad[k].seqs;
        o.max_model_len = bad[k].len;
        o.max_batched_tokens = bad[k].rows;
        o.backend_options.n_page_cell = bad[k].cells;
        o.backend_options.n_page = bad[k].n_page;
        o.chunked_prefill = bad[k].chunked;
        o.memory_bytes = bad[k].memory;
        ern_engine_plan p;
        ern_err err = {0};
        assert_int_equal(ern_engine_plan_make(&p, &o, &err), bad[k].code);
        if (!strstr(err.text, bad[k].names)) fail_msg("case %zu says: %s", k, err.text);
        ern_engine *e;
        assert_int_equal(ern_engine_open(&e, &o, &err), bad[k].code);
        assert_null(e);
    }
}

/* The value that a refusal names must be taken, and one more token per block must not. */
static void test_plan_names_a_length_that_fits(void **state) {
    (void)state;
    ern_engine_options o = good();
    ern_engine_plan p;
    ern_err err;
    assert_int_equal(ern_engine_plan_make(&p, &o, &err), ERN_OK);
    assert_int_equal(p.n_page, 4 * 16 + 2); /* no more than four requests can hold */
    assert_int_equal(p.kv_tokens, p.n_page * 64);
    assert_int_equal(p.kv_bytes, (uint64_t)p.n_page * p.backend.page_bytes);
    o.memory_bytes = p.total_bytes - p.kv_bytes + 10 * p.backend.page_bytes; /* ten blocks */
    assert_int_equal(ern_engine_plan_make(&p, &o, &err), ERN_ERR_MEMORY);
    const char *at = strstr(err.text, "--max-model-len 512 would fit");
    if (!at) fail_msg("%s", err.text);
    o.max_model_len = 512;
    assert_int_equal(ern_engine_plan_make(&p, &o, &err), ERN_OK);
    assert_true(p.total_bytes <= o.memory_bytes);
    o.memory_bytes = 0; /* from the machine */
    assert_int_equal(ern_engine_plan_make(&p, &o, &err), ERN_OK);
}

static ern_status plan_by_eights(ern_backend_plan *out, const ern_model *m, const ern_backend_options *o,
                                 ern_err *err) {
    const ern_status status = scripted_ops.plan(out, m, o, err);
    out->page_step = 8;
    return status;
}

/* What a backend takes beside the last pages is charged, said and refused as they are. */
static void test_plan_rounds(void **state) {
    (void)state;
    ern_backend_ops eights = scripted_ops;
    ern_engine_options o = good();
    ern_engine_plan p;
    ern_err err;
    eights.plan = plan_by_eights;
    o.backend = &eights;
    assert_int_equal(ern_engine_plan_make(&p, &o, &err), ERN_OK);
    assert_int_equal(p.n_page, 66);
    assert_int_equal(p.kv_bytes, 72 * p.backend.page_bytes);
    const uint64_t fixed = p.total_bytes - p.kv_bytes, page = p.backend.page_bytes;
    o.memory_bytes = fixed + 72 * page;
    assert_int_equal(ern_engine_plan_make(&p, &o, &err), ERN_OK);
    assert_int_equal(p.n_page, 66);
    assert_int_equal(p.total_bytes, o.memory_bytes);
    o.memory_bytes--; /* 66 pages would fit, but not the 72 that are taken for them */
    assert_int_equal(ern_engine_plan_make(&p, &o, &err), ERN_OK);
    assert_int_equal(p.n_page, 64);
    assert_true(p.total_bytes <= o.memory_bytes);
    o.backend_options.n_page = 65;
    assert_int_equal(ern_engine_plan_make(&p, &o, &err), ERN_ERR_MEMORY);
    if (!strstr(err.text, "only 64 blocks fit")) fail_msg("%s", err.text);
    o.memory_bytes++;
    assert_int_equal(ern_engine_plan_make(&p, &o, &err), ERN_OK);
    assert_int_equal(p.kv_bytes, 72 * page);
}

/* ---- submit ---------------------------------------------------------------------------------------------------- */

static void refused(ern_engine *e, ern_request r, const char *names) {
    ern_err err = {0};
    assert_int_equal(ern_engine_submit(e, &r, &err), ERN_ERR_INPUT);
    if (!strstr(err.text, names)) fail_msg("expected '%s' in: %s", names, err.text);
}

static void test_submit_checks_again(void **state) {
    (void)state;
    ern_engine_options o = good();
    o.max_model_len = 100;
    ern_engine *e = start(&o);
    static const int32_t outside[] = {1, VOCAB}, negative[] = {-1};
    static const ern_bias bias[] = {{3, 1.0f}, {VOCAB, 1.0f}};
    ern_request r;
    refused(e, request(0, 1), "empty");
    refused(e, request(100, 1), "more than the 99");
    refused(e, request(50, 51), "1 to 50");
    refused(e, request(50, 0), "max_tokens");
    r = request(2, 5), r.min_tokens = 6, refused(e, r, "min_tokens");
    r = request(2, 5), r.prompt = outside, refused(e, r, "prompt token");
    r = request(1, 5), r.prompt = negative, refused(e, r, "prompt token");
    r = request(2, 5), r.stop = outside, r.n_stop = 2, refused(e, r, "stop_token_ids");
    r = request(2, 5), r.n_stop = ERN_STOP_MAX + 1, refused(e, r, "stop_token_ids");
    r = request(2, 5), r.n_prompt_top = 21, refused(e, r, "prompt_logprobs");
    r = request(2, 5), r.sample.temperature = -1, refused(e, r, "temperature");
    r = request(2, 5), r.sample.top_p = 0, refused(e, r, "top_p");
    r = request(2, 5), r.sample.min_p = 1.5f, refused(e, r, "min_p");
    r = request(2, 5), r.sample.repetition = 0, refused(e, r, "repetition");
    r = request(2, 5), r.sample.frequency = 1.0f / 0.0f, refused(e, r, "frequency");
    r = request(2, 5), r.sample.presence = 0.0f / 0.0f, refused(e, r, "presence");
    r = request(2, 5), r.sample.n_top = 21, refused(e, r, "top_logprobs");
    r = request(2, 5), r.sample.n_ban = ERN_BAN_MAX + 1, refused(e, r, "bad_words");
    r = request(2, 5), r.sample.bias = bias, r.sample.n_bias = 2, refused(e, r, "logit_bias");
    r = request(50, 50);
    submit(e, &r);
    ern_event end;
    assert_int_equal(take_until_end(e, &r, &end), 50);
    assert_int_equal(end.end, ERN_END_LENGTH);
    ern_engine_close(e);
}

/* A full queue refuses, by count and by prompt tokens; what was taken all ends. */
static void test_queue_is_bounded(void **state) {
    (void)state;
    atomic_store(&scripted.hold_from, 1); /* the first stays where it is, however long we take */
    ern_engine_options o = good();
    o.max_num_seqs = 1;
    o.max_batched_tokens = 64;
    o.queue_max = 3;
    ern_engine *e = start(&o);
    ern_request r[8];
    ern_err err;
    int32_t n = 0;
    for (; n < 8; n++) {
        r[n] = request(5, 3);
        ern_status s = ern_engine_submit(e, &r[n], &err);
        if (s == ERN_ERR_LIMIT) break;
        assert_int_equal(s, ERN_OK);
        if (n == 0) wait_running(e, 1, false); /* it left the queue */
    }
    assert_int_equal(n, 4);
    atomic_store(&scripted.hold_from, 0);
    for (int32_t k = 0, n_end = 0; n_end < n; k++) {
        ern_event ev;
        assert_true(ern_engine_next(e, &ev, 60000000));
        n_end += ev.kind == ERN_EVENT_END;
    }
    ern_engine_close(e);
    atomic_store(&scripted.hold_from, 1);
    o.queue_prompt_max = 12;
    o.queue_max = 100;
    e = start(&o);
    r[0] = request(100, 3); /* alone in the queue: taken, however long */
    submit(e, &r[0]);
    wait_running(e, 1, false);
    r[1] = request(8, 3), r[2] = request(4, 3), r[3] = request(1, 3);
    submit(e, &r[1]);
    submit(e, &r[2]);
    assert_int_equal(ern_engine_submit(e, &r[3], &err), ERN_ERR_LIMIT);
    atomic_store(&scripted.hold_from, 0);
    ern_engine_close(e);
}

/* ---- ends ------------------------------------------------------------------------------------------------------ */

static void test_cancel(void **state) {
    (void)state;
    atomic_store(&scripted.hold_from, 3);
    ern_engine_options o = good();
    ern_engine *e = start(&o);
    ern_request r = request(5, 200);
    submit(e, &r);
    ern_event ev;
    assert_true(ern_engine_next(e, &ev, 60000000));
    assert_int_equal(ev.kind, ERN_EVENT_TOKEN);
    ern_engine_cancel(e, r.id);
    ern_engine_cancel(e, r.id);
    ern_engine_cancel(e, 0);
    ern_engine_cancel(e, r.id + 1);
    atomic_store(&scripted.hold_from, 0);
    int32_t n = 0;
    while (ern_engine_next(e, &ev, 60000000) && ev.kind != ERN_EVENT_END) n++;
    assert_int_equal(ev.kind, ERN_EVENT_END);
    assert_int_equal(ev.end, ERN_END_CANCELLED);
    assert_int_equal(ev.n_output, n + 1);
    ern_engine_cancel(e, r.id); /* over: ignored */
    r = request(3, 2);
    submit(e, &r);
    assert_int_equal(take_until_end(e, &r, &ev), 2);
    ern_engine_close(e);
}

static void test_stop_and_length_and_echo(void **state) {
    (void)state;
    ern_engine_options o = good();
    ern_engine *e = start(&o);
    ern_event ev;
    ern_request r = request(5, 40);
    scripted_oracle oracle;
    ern_event want;
    scripted_oracle_init(&oracle, &r, VOCAB);
    for (int k = 0; k < 7; k++) scripted_oracle_next(&oracle, &want);
    const int32_t seventh = want.sampled.token;
    r.stop = &seventh;
    r.n_stop = 1;
    submit(e, &r);
    int32_t n = take_until_end(e, &r, &ev);
    assert_true(n <= 7);
    assert_int_equal(ev.end, ERN_END_STOP);
    assert_true(ev.queued_us <= ev.started_us && ev.started_us <= ev.first_us && ev.first_us <= ev.end_us);
    r.min_tokens = 20; /* banned until then */
    submit(e, &r);
    assert_true(take_until_end(e, &r, &ev) > 20 || ev.end == ERN_END_LENGTH);
    r = request(150, 1), r.n_prompt_top = 5, r.echo_only = true, r.max_tokens = 0;
    submit(e, &r);
    assert_int_equal(take_until_end(e, &r, &ev), 0);
    assert_int_equal(ev.end, ERN_END_LENGTH);
    assert_int_equal(ev.n_output, 0);
    r = request(1, 1), r.n_prompt_top = 0, r.echo_only = true;
    submit(e, &r);
    assert_int_equal(take_until_end(e, &r, &ev), 0);
    r = request(1, 3), r.n_prompt_top = 0;
    submit(e, &r);
    assert_int_equal(take_until_end(e, &r, &ev), 3);
    ern_engine_close(e);
}

static void test_deadline_in_the_queue(void **state) {
    (void)state;
    atomic_store(&scripted.hold_from, 1);
    ern_engine_options o = good();
    o.max_num_seqs = 1;
    o.max_batched_tokens = 64;
    ern_engine *e = start(&o);
    ern_request busy = request(5, 60), late = request(5, 5);
    submit(e, &busy);
    wait_running(e, 1, false);
    late.deadline_us = ern_now_us() + 30000;
    submit(e, &late);
    while (ern_now_us() < late.deadline_us) usleep(1000);
    atomic_store(&scripted.hold_from, 0);
    ern_event ev;
    do assert_true(ern_engine_next(e, &ev, 60000000));
    while (ev.request != &late);
    assert_int_equal(ev.end, ERN_END_DEADLINE);
    assert_int_equal(ev.started_us, 0);
    assert_true(ev.end_us >= late.deadline_us);
    ern_engine_close(e);
}

/* A reader who takes nothing: the request stops at the credit, others run on, and a poke wakes it. */
static void test_parking(void **state) {
    (void)state;
    ern_engine_options o = good();
    ern_engine *e = start(&o);
    ern_request slow = request(5, 600), quick = request(5, 20);
    submit(e, &slow);
    wait_running(e, 1, true);
    assert_int_equal(take_all(e), ERN_EVENT_CREDIT);
    submit(e, &quick);
    ern_event ev;
    assert_int_equal(take_until_end(e, &quick, &ev), 20);
    atomic_store(&slow.n_taken, ERN_EVENT_CREDIT);
    ern_engine_poke(e);
    for (int32_t k = 0; k < ERN_EVENT_CREDIT; k++) assert_true(ern_engine_next(e, &ev, 60000000));
    wait_running(e, 1, true);
    assert_int_equal(take_all(e), 0);
    atomic_store(&slow.n_taken, 2 * ERN_EVENT_CREDIT);
    ern_engine_poke(e);
    int32_t n = 2 * ERN_EVENT_CREDIT;
    while (ern_engine_next(e, &ev, 60000000) && ev.kind != ERN_EVENT_END) n++;
    assert_int_equal(n, 600);
    ern_engine_close(e);
}

/* Many more silent readers than seats: all are set aside, one after the other, and whoever reads is served. */
static void test_silent_readers_cost_nobody(void **state) {
    (void)state;
    enum { N_SILENT = 40 };
    ern_engine_options o = good();
    o.max_num_seqs = 2;
    ern_engine *e = start(&o);
    ern_request silent[N_SILENT], quick = request(5, 20);
    for (int i = 0; i < N_SILENT; i++) {
        silent[i] = request(5, 600);
        submit(e, &silent[i]);
        ern_event ev; /* what it may be ahead of its reader; the outbox is read, n_taken stays */
        for (int32_t k = 0; k < ERN_EVENT_CREDIT; k++) {
            if (!ern_engine_next(e, &ev, 60000000)) fail_msg("reader %d gets no turn", i);
            assert_ptr_equal(ev.request, &silent[i]);
        }
    }
    submit(e, &quick);
    ern_event ev;
    assert_int_equal(take_until_end(e, &quick, &ev), 20);
    ern_engine_close(e);
}

static void test_numerical_hits_one(void **state) {
    (void)state;
    scripted.nan_seed = 77;
    scripted.nan_position = 12;
    ern_engine_options o = good();
    ern_engine *e = start(&o);
    ern_request bad = request(5, 50), fine = request(5, 50);
    bad.sample.seed = 77;
    submit(e, &bad);
    submit(e, &fine);
    int32_t n_bad = 0, n_fine = 0;
    ern_event ev, want;
    scripted_oracle oracle;
    scripted_oracle_init(&oracle, &fine, VOCAB);
    for (int n_end = 0; n_end < 2;) {
        assert_true(ern_engine_next(e, &ev, 60000000));
        if (ev.request == &fine) {
            scripted_oracle_next(&oracle, &want);
            assert_true(scripted_same(&ev, &want));
        }
        if (ev.kind == ERN_EVENT_TOKEN) ev.request == &bad ? n_bad++ : n_fine++;
        if (ev.kind != ERN_EVENT_END) continue;
        assert_int_equal(ev.end, ev.request == &bad ? ERN_END_NUMERICAL : ERN_END_LENGTH);
        n_end++;
    }
    assert_int_equal(n_bad, 7); /* positions 5..11 */
    assert_int_equal(n_fine, 50);
    ern_engine_close(e);
    scripted = (scripted_settings){0};
}

static void test_lost_device_ends_everything(void **state) {
    (void)state;
    scripted.fail_at = 30;
    atomic_store(&scripted.hold_from, 1); /* all six are in before it fails */
    ern_engine_options o = good();
    ern_engine *e = start(&o);
    ern_request r[6];
    for (int k = 0; k < 6; k++) {
        r[k] = request(5, 100);
        submit(e, &r[k]);
    }
    atomic_store(&scripted.hold_from, 0);
    ern_event ev;
    for (int n_end = 0; n_end < 6;) {
        assert_true(ern_engine_next(e, &ev, 60000000));
        if (ev.kind != ERN_EVENT_END) continue;
        assert_int_equal(ev.end, ERN_END_ERROR);
        assert_non_null(strstr(ern_engine_error(e), "scripted device is lost"));
        n_end++;
    }
    ern_engine_stats st;
    for (int k = 0; k < 1000; k++) {
        ern_engine_stats_read(e, &st);
        if (st.failed) break;
        usleep(1000);
    }
    assert_true(st.failed);
    assert_non_null(strstr(ern_engine_error(e), "scripted device is lost"));
    ern_err err;
    ern_request late = request(5, 5);
    assert_int_equal(ern_engine_submit(e, &late, &err), ERN_ERR_DEVICE);
    ern_engine_close(e);
    scripted = (scripted_settings){0};
}

static void test_close_with_work_inside(void **state) {
    (void)state;
    ern_engine_options o = good();
    ern_engine *e = start(&o);
    ern_request r[10];
    for (int k = 0; k < 10; k++) {
        r[k] = request(5, 1000);
        submit(e, &r[k]);
    }
    ern_engine_stop(e);
    int n_end = 0;
    ern_event ev;
    while (ern_engine_next(e, &ev, 0)) {
        if (ev.kind != ERN_EVENT_END) continue;
        assert_int_equal(ev.end, ERN_END_CANCELLED);
        n_end++;
    }
    assert_int_equal(n_end, 10);
    ern_err err;
    assert_int_equal(ern_engine_submit(e, &r[0], &err), ERN_ERR_CANCELLED);
    assert_false(ern_engine_next(e, &ev, -1)); /* closed and drained: at once */
    ern_engine_close(e);
    ern_engine_close(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_plan_refuses),
        cmocka_unit_test(test_plan_names_a_length_that_fits),
        cmocka_unit_test(test_plan_rounds),
        cmocka_unit_test(test_submit_checks_again),
        cmocka_unit_test(test_queue_is_bounded),
        cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_stop_and_length_and_echo),
        cmocka_unit_test(test_deadline_in_the_queue),
        cmocka_unit_test(test_parking),
        cmocka_unit_test(test_silent_readers_cost_nobody),
        cmocka_unit_test(test_numerical_hits_one),
        cmocka_unit_test(test_lost_device_ends_everything),
        cmocka_unit_test(test_close_with_work_inside),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
