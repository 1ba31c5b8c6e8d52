/* The fingerprint of what KV blocks on disk depend on: the same for the same, another for anything that computes other
 * keys and values; and the memory share that needs an open model. */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "base/os.h"
#include "cli/fingerprint.h"
#include "cli/launch.h"
#include "made_model.h"

typedef struct print {
    uint8_t v[16];
} print;

static ern_engine_options options_of(const ern_model *m) {
    return (ern_engine_options){.backend = ern_backend_find("cpu"),
                                .model = m,
                                .max_model_len = 256,
                                .max_num_seqs = 2,
                                .max_batched_tokens = 64,
                                .backend_options = {.n_page_cell = 64,
                                                    .n_row_max = 64,
                                                    .n_seq_max = 2,
                                                    .n_want_max = 64,
                                                    .n_len_max = 256,
                                                    .n_thread = 1,
                                                    .level = -1}};
}

static print print_of(const ern_engine_options *o) {
    print p;
    ern_err err;
    made_check(fingerprint_make(p.v, o, "config.json", &err), &err, "fingerprint");
    return p;
}

static bool same(print a, print b) { return memcmp(a.v, b.v, sizeof a.v) == 0; }

/* Open the folder anew and print it. */
static print print_dir(const char *dir, const ern_quant_plan *quant) {
    ern_err err;
    ern_model *m;
    ern_model_options mo = {.dir = dir, .quant = quant};
    made_check(ern_model_open(&m, &mo, &err), &err, "open");
    ern_engine_options o = options_of(m);
    print p = print_of(&o);
    ern_model_close(m);
    return p;
}

/* Change one byte of a file at `at` (negative: from its end), and give it its old time again when asked. */
static void change_byte(const char *path, long at, bool keep_time) {
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    FILE *f = fopen(path, "r+b");
    assert_non_null(f);
    assert_int_equal(fseek(f, at, at < 0 ? SEEK_END : SEEK_SET), 0);
    int c = fgetc(f);
    assert_int_equal(fseek(f, at, at < 0 ? SEEK_END : SEEK_SET), 0);
    assert_true(fputc(c ^ 1, f) != EOF);
    assert_int_equal(fclose(f), 0);
    struct timespec keep[2] = {st.st_atim, st.st_mtim}, other[2] = {{.tv_sec = 1}, {.tv_sec = 1000}};
    assert_int_equal(utimensat(AT_FDCWD, path, keep_time ? keep : other, 0), 0);
}

static void formats_and_kernels_tell(void **state) {
    (void)state;
    made_model made = made_model_open("tiny-dense", false, 3);
    ern_engine_options o = options_of(made.model);
    print first = print_of(&o);
    assert_true(same(first, print_of(&o)));
    ern_engine_options other = o;
    other.backend_options.n_page = 99, other.backend_options.n_thread = 2, other.max_num_seqs = 1;
    assert_true(same(first, print_of(&other))); /* none of these changes what is computed */
    other = o, other.backend_options.kv_dtype = ERN_KV_I8;
    assert_false(same(first, print_of(&other)));
    other = o, other.backend_options.act_exact = true;
    assert_false(same(first, print_of(&other)));
    other = o, other.backend = ern_backend_find("ref");
    assert_false(same(first, print_of(&other)));
    if (ern_cpu_level_here() > ERN_CPU_PORTABLE) {
        other = o, other.backend_options.level = ERN_CPU_PORTABLE;
        assert_false(same(first, print_of(&other)));
    }
    ern_quant_plan quant;
    ern_err err;
    made_check(ern_quant_parse(&quant, "wint8", NULL, &err), &err, "quant");
    assert_false(same(first, print_dir(made.dir, &quant)));
    made_model_close(&made);
}

static void files_tell(void **state) {
    (void)state;
    made_model made = made_model_open("tiny-dense", false, 3);
    char weights[128], config[128], copy[512], moved[64];
    (void)snprintf(weights, sizeof weights, "%s/model.safetensors", made.dir);
    (void)snprintf(config, sizeof config, "%s/config.json", made.dir);
    print first = print_dir(made.dir, NULL);
    made_dir(moved); /* a checkpoint may move, or be copied with its times */
    (void)snprintf(copy, sizeof copy, "cp -p %s/* %s/", made.dir, moved);
    assert_int_equal(system(copy), 0);
    assert_true(same(first, print_dir(moved, NULL)));
    made_dir_remove(moved);
    change_byte(weights, -1, true); /* the last tensor's last byte */
    print changed = print_dir(made.dir, NULL);
    assert_false(same(first, changed));
    change_byte(weights, -1, true);
    assert_true(same(first, print_dir(made.dir, NULL)));
    struct timespec later[2] = {{.tv_sec = 5}, {.tv_sec = 5}};
    assert_int_equal(utimensat(AT_FDCWD, weights, later, 0), 0); /* written again: told by its time alone */
    print again = print_dir(made.dir, NULL);
    assert_false(same(first, again));
    FILE *f = fopen(config, "a");
    assert_non_null(f);
    assert_true(fputc('\n', f) == '\n');
    assert_int_equal(fclose(f), 0);
    assert_false(same(again, print_dir(made.dir, NULL)));
    made_model_close(&made);
}

/* A model of seven times as many tensors takes a few milliseconds; the limit has room for a busy machine. */
static void is_quick(void **state) {
    (void)state;
    made_model made = made_model_open("tiny-moe", true, 3);
    ern_engine_options o = options_of(made.model);
    int64_t best = INT64_MAX;
    for (int i = 0; i < 5; i++) {
        int64_t from = ern_now_us();
        (void)print_of(&o);
        int64_t us = ern_now_us() - from;
        if (us < best) best = us;
    }
    (void)printf("        fingerprint of tiny-moe: %lld us\n", (long long)best);
    made_model_close(&made);
}

static void memory_share(void **state) {
    (void)state;
    made_model made = made_model_open("tiny-dense", false, 3);
    ern_err err = {0};
    launch l = {.engine = options_of(made.model)};
    made_check(launch_fit_memory(&l, made.model, &err), &err, "fit");
    assert_int_equal(l.engine.memory_bytes, 0); /* not asked for */
    l.memory_share = 1;                         /* never more than the engine would take by itself */
    made_check(launch_fit_memory(&l, made.model, &err), &err, "fit");
    assert_int_equal(l.engine.memory_bytes, 0);
    l.memory_share = 0.01;
    double hundredth = (double)ern_memory_total_bytes() * 0.01;
    made_check(launch_fit_memory(&l, made.model, &err), &err, "fit");
    assert_true(l.engine.memory_bytes > 0 && (double)l.engine.memory_bytes <= hundredth);
    assert_true((double)l.engine.memory_bytes >= hundredth - (double)made.model->weight_bytes - 1);
    l.memory_share = 1e-9;
    assert_int_equal(launch_fit_memory(&l, made.model, &err), ERN_ERR_MEMORY);
    assert_non_null(strstr(err.text, "--gpu-memory-utilization"));
    made_model_close(&made);
}

/* A backend that computes on a device of 80 GiB, 10 of them in use, with 4 of weights and 1 of scratch. */
static uint64_t gib(double n) { return (uint64_t)(n * 1073741824.0); }
static ern_status device_plan(ern_backend_plan *out, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    (void)m, (void)o, (void)err;
    *out = (ern_backend_plan){.weight_bytes = gib(4),
                              .page_bytes = 1 << 20,
                              .scratch_bytes = gib(1),
                              .kernels = "none",
                              .memory_free_bytes = gib(70),
                              .memory_all_bytes = gib(80)};
    return ERN_OK;
}

static ern_engine_plan plan_of(const launch *l) {
    ern_engine_plan p;
    ern_err err = {0};
    made_check(launch_plan(l, &p, &err), &err, "plan");
    return p;
}

/* FastDeploy's rule (4.1): a share of all of the device's memory, less what is used there, is weights, scratch, pages.
 */
static void device_memory(void **state) {
    (void)state;
    made_model made = made_model_open("tiny-dense", false, 3);
    static const ern_backend_ops ops = {.name = "cuda", .plan = device_plan};
    ern_err err = {0};
    launch l = {.engine = options_of(made.model), .memory_share = 0.5};
    l.engine.backend = &ops;
    l.engine.backend_options.n_page = 0;
    l.engine.max_num_seqs = l.engine.max_batched_tokens = 256; /* more than fits, so that memory decides */
    l.engine.max_model_len = 4096;
    l.engine.chunked_prefill = l.engine.prefix_cache = true;
    made_check(launch_fit_memory(&l, made.model, &err), &err, "fit");
    assert_int_equal(l.engine.memory_bytes, gib(30));
    assert_int_equal(plan_of(&l).n_page, 25 << 10);
    l.memory_share = 0.2; /* 16 GiB, 10 in use: 1 is left for pages, and none of it is the machine's */
    made_check(launch_fit_memory(&l, made.model, &err), &err, "fit");
    assert_int_equal(plan_of(&l).n_page, 1024);
    l.engine.swap_bytes = 1 << 20;
    assert_int_equal(plan_of(&l).n_page, 1024); /* host memory is another matter */
    l.engine.swap_bytes = 0;
    l.memory_share = 0.18;
    assert_int_equal(launch_fit_memory(&l, made.model, &err), ERN_ERR_MEMORY);
    assert_non_null(strstr(err.text, "--gpu-memory-utilization 0.18 of the GPU's 80.0 GiB"));
    l.memory_share = 0; /* --memory */
    l.engine.memory_bytes = gib(71);
    assert_int_equal(launch_fit_memory(&l, made.model, &err), ERN_ERR_USAGE);
    assert_non_null(strstr(err.text, "--memory is 71.00 GiB and the GPU has 80.0 GiB, 70.0 GiB of it free"));
    l.engine.memory_bytes = gib(7);
    made_check(launch_fit_memory(&l, made.model, &err), &err, "fit");
    assert_int_equal(plan_of(&l).n_page, 2048);
    made_model_close(&made);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(formats_and_kernels_tell),
        cmocka_unit_test(files_tell),
        cmocka_unit_test(is_quick),
        cmocka_unit_test(memory_share),
        cmocka_unit_test(device_memory),
    };
    return cmocka_run_group_tests_name("fingerprint", tests, NULL, NULL);
}
