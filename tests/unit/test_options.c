/* The option table and its readers: every row is whole and documented; values come from line, file and environment in
 * the right order; what is wrong is refused in one sentence that names it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/launch.h"
#include "cli/options.h"
#include "server/server.h"

enum { WORDS_MAX = 32 };

/* Split a line at blanks ('~' stands for a blank inside a word) and read it as `ernest serve`'s arguments. */
static ern_status read_words(options *o, unsigned cmd, const char *line, char **envp, ern_err *err) {
    static char text[2048];
    char *word[WORDS_MAX];
    int n = 0;
    (void)snprintf(text, sizeof text, "%s", line);
    for (char *at = strtok(text, " "); at; at = strtok(NULL, " ")) {
        for (char *c = at; *c; c++)
            if (*c == '~') *c = ' ';
        assert_true(n < WORDS_MAX);
        word[n++] = at;
    }
    return options_read(o, cmd, n, word, envp, err);
}

static void expect_good(options *o, const char *line, char **envp) {
    ern_err err = {0};
    if (read_words(o, CMD_SERVE, line, envp, &err) != ERN_OK) fail_msg("'%s': %s", line, err.text);
}

/* The line is refused, and the sentence holds every one of the words ('|' between). */
static void expect_bad(const char *line, char **envp, const char *words) {
    options o;
    ern_err err = {0};
    ern_status s = read_words(&o, CMD_SERVE, line, envp, &err);
    if (s == ERN_OK) s = options_check_built(&o, &err);
    options_close(&o);
    if (s == ERN_OK) fail_msg("'%s' was accepted", line);
    assert_true(s == ERN_ERR_USAGE || s == ERN_ERR_UNSUPPORTED || s == ERN_ERR_FILE);
    for (const char *at = words; *at;) {
        size_t n = strcspn(at, "|");
        char word[128];
        (void)snprintf(word, sizeof word, "%.*s", (int)n, at);
        if (!strstr(err.text, word)) fail_msg("'%s': '%s' does not say '%s'", line, err.text, word);
        at += n + (at[n] == '|');
    }
}

/* ---- the table -------------------------------------------------------------------------------------------------- */

static void test_rows_are_whole(void **state) {
    (void)state;
    for (int i = 0; i < option_count; i++) {
        const option *p = &option_table[i];
        char title[128];
        option_title(p, title, sizeof title);
        if (!p->name && !p->env) fail_msg("row %d has neither name nor variable", i);
        if (!p->command) fail_msg("%s belongs to no command", title);
        if (!strchr("STXE", p->tag)) fail_msg("%s has tag '%c'", title, p->tag);
        if (p->state != OPTION_BUILT && !p->why) fail_msg("%s gives no reason", title);
        if (p->state == OPTION_OUTSIDE) continue;
        if (!p->help || !p->help[0] || p->help[strlen(p->help) - 1] == '.')
            fail_msg("%s: help must be words without a stop", title);
        bool grouped = false;
        for (const char *const *g = option_groups; *g; g++) grouped = grouped || strcmp(*g, p->group) == 0;
        if (!grouped) fail_msg("%s is in the unknown group '%s'", title, p->group);
        if ((p->type == OPTION_INT || p->type == OPTION_REAL) && !(p->min < p->max)) fail_msg("%s has no range", title);
        if (p->type == OPTION_ENUM && !p->choices) fail_msg("%s has no choices", title);
        if (p->many && !p->repeat) fail_msg("%s takes many words and keeps one", title);
    }
}

static void test_names_are_unique(void **state) {
    (void)state;
    for (int i = 0; i < option_count; i++) {
        for (int k = i + 1; k < option_count; k++) {
            const option *a = &option_table[i], *b = &option_table[k];
            if (!(a->command & b->command)) continue;
            if (a->name && b->name && strcmp(a->name, b->name) == 0) fail_msg("--%s is there twice", a->name);
            if (a->env && b->env && strcmp(a->env, b->env) == 0) fail_msg("%s is there twice", a->env);
            if (a->alias && b->alias && strcmp(a->alias, b->alias) == 0) fail_msg("%s is there twice", a->alias);
        }
    }
}

/* A default that its own row would refuse, as text or as a feature, is a mistake in the table. */
static void test_defaults_and_fine_values_pass(void **state) {
    (void)state;
    for (int i = 0; i < option_count; i++) {
        const option *p = &option_table[i];
        if (p->state == OPTION_OUTSIDE) continue;
        for (int which = 0; which < 2; which++) {
            const char *list = which ? p->fine : p->fallback;
            while (list && *list) {
                char text[128];
                size_t n = which ? strcspn(list, "|") : strlen(list);
                (void)snprintf(text, sizeof text, "%.*s", (int)n, list);
                options o;
                ern_err err = {0};
                assert_int_equal(options_read(&o, p->command, 0, NULL, NULL, &err), ERN_OK);
                if (options_set(&o, i, text, SOURCE_LINE, "here", &err) != ERN_OK)
                    fail_msg("row %d '%s': %s", i, text, err.text);
                if (options_check_built(&o, &err) != ERN_OK) fail_msg("row %d '%s': %s", i, text, err.text);
                options_close(&o);
                list += n + (list[n] == '|');
            }
        }
    }
}

/* Every flag of FastDeploy's list for this server that is named in a seed or matters to a text server. */
static void test_fastdeploy_flags_are_known(void **state) {
    (void)state;
    static const char *const known[] = {"port",
                                        "host",
                                        "workers",
                                        "metrics-port",
                                        "max-waiting-time",
                                        "max-concurrency",
                                        "timeout",
                                        "timeout-graceful-shutdown",
                                        "api-key",
                                        "model",
                                        "served-model-name",
                                        "revision",
                                        "model-config-name",
                                        "tokenizer",
                                        "max-model-len",
                                        "block-size",
                                        "use-warmup",
                                        "reasoning-parser",
                                        "tool-call-parser",
                                        "chat-template",
                                        "speculative-config",
                                        "quantization",
                                        "graph-optimization-config",
                                        "use-cudagraph",
                                        "guided-decoding-backend",
                                        "guided-decoding-disable-any-whitespace",
                                        "enable-logprob",
                                        "max-logprobs",
                                        "logprobs-mode",
                                        "seed",
                                        "enable-early-stop",
                                        "early-stop-config",
                                        "lm_head-fp32",
                                        "logits-processors",
                                        "load-choices",
                                        "tensor-parallel-size",
                                        "max-num-seqs",
                                        "max-num-batched-tokens",
                                        "gpu-memory-utilization",
                                        "num-gpu-blocks-override",
                                        "data-parallel-size",
                                        "disable-custom-all-reduce",
                                        "enable-overlap-schedule",
                                        "kv-cache-ratio",
                                        "kvcache-storage-backend",
                                        "write-policy",
                                        "swap-space",
                                        "enable-prefix-caching",
                                        "enable-output-caching",
                                        "prealloc-dec-block-slot-num-threshold",
                                        "static-decode-blocks",
                                        "cache-queue-port",
                                        "engine-worker-queue-port",
                                        "enable-chunked-prefill",
                                        "max-num-partial-prefills",
                                        "max-long-partial-prefills",
                                        "long-prefill-token-threshold",
                                        "splitwise-role",
                                        "innode-prefill-ports",
                                        "cache-transfer-protocol",
                                        "pd-comm-port",
                                        "router",
                                        "scheduler-name",
                                        "scheduler-max-size",
                                        "scheduler-ttl",
                                        "config"};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        int at = option_find(known[i], strlen(known[i]), CMD_SERVE);
        if (at < 0 || option_table[at].state == OPTION_OUTSIDE) fail_msg("--%s is not known", known[i]);
    }
    static const char *const variable[] = {
        "ENABLE_V1_KVCACHE_SCHEDULER", "FD_SAMPLING_CLASS", "FD_DISABLE_CHUNKED_PREFILL",
        "FD_ATTENTION_BACKEND",        "FD_LOG_DIR",        "INFERENCE_MSG_QUEUE_ID",
        "CUDA_VISIBLE_DEVICES",        "FD_API_KEY"};
    for (size_t i = 0; i < sizeof variable / sizeof variable[0]; i++) {
        bool there = false;
        for (int k = 0; k < option_count; k++)
            there = there || (option_table[k].env && strcmp(option_table[k].env, variable[i]) == 0);
        if (!there) fail_msg("%s is not known", variable[i]);
    }
}

/* ---- the line --------------------------------------------------------------------------------------------------- */

static void test_line(void **state) {
    (void)state;
    options o;
    expect_good(&o,
                "models/x --port=9000 --max_model_len 4096 --api-key a --api-key b -tp 1 --lm-head-fp32 "
                "--no_enable_prefix_caching "
                "--enable-chunked-prefill=false --memory 1.5 --cors-origin https://a https://b --seed 7",
                NULL);
    assert_int_equal(o.n_positional, 1);
    assert_string_equal(o.positional[0], "models/x");
    assert_int_equal(options_int(&o, "port"), 9000);
    assert_int_equal(options_int(&o, "max-model-len"), 4096);
    assert_int_equal(options_values(&o, "api-key")->n, 2);
    assert_string_equal(options_values(&o, "api-key")->text[1], "b");
    assert_int_equal(options_int(&o, "tensor-parallel-size"), 1);
    assert_true(options_flag(&o, "lm_head-fp32"));
    assert_true(options_given(&o, "enable-prefix-caching"));
    assert_false(options_flag(&o, "enable-prefix-caching"));
    assert_false(options_flag(&o, "enable-chunked-prefill"));
    assert_true(options_real(&o, "memory") == 1.5);
    assert_int_equal(options_values(&o, "cors-origin")->n, 2);
    assert_int_equal(options_int(&o, "max-num-seqs"), 8); /* a default */
    options_close(&o);
    expect_good(&o, "--port 1 --port 2 -- --port", NULL); /* the last one wins; '--' ends the flags */
    assert_int_equal(options_int(&o, "port"), 2);
    assert_string_equal(o.positional[0], "--port");
    options_close(&o);
    expect_good(&o, "--max-waiting-time -1", NULL); /* a negative number is a value */
    options_close(&o);
    expect_good(&o, "--dry-run false --use-cudagraph TRUE /tmp", NULL); /* as argparse's users write it */
    assert_false(options_flag(&o, "dry-run"));
    assert_true(options_flag(&o, "use-cudagraph"));
    assert_string_equal(options_text(&o, "model"), "/tmp"); /* the word alone is the option */
    assert_int_equal(options_values(&o, "model")->source, SOURCE_LINE);
    options_close(&o);
    expect_good(&o, "--help=kv --nonsense", NULL);
    assert_string_equal(o.help, "kv");
    options_close(&o);
}

static void test_line_refused(void **state) {
    (void)state;
    expect_bad("--prot 80", NULL, "--prot|--port");
    expect_bad("--max-model-length 80", NULL, "--max-model-len");
    expect_bad("--no-chunked-prefill", NULL, "--no-chunked-prefill");
    expect_bad("--xyzzyplugh 80", NULL, "--xyzzyplugh|--help");
    expect_bad("-z", NULL, "-z");
    expect_bad("--port", NULL, "--port|needs a value");
    expect_bad("--port --host 1.2.3.4", NULL, "--port|needs a value");
    expect_bad("--port eighty", NULL, "--port|eighty|65535");
    expect_bad("--port 80x", NULL, "--port|80x");
    expect_bad("--port=", NULL, "--port");
    expect_bad("--port 65536", NULL, "--port|65536|65535");
    expect_bad("--port 99999999999999999999", NULL, "--port");
    expect_bad("--port ~80", NULL, "--port");
    expect_bad("--memory nan", NULL, "--memory|nan");
    expect_bad("--memory inf", NULL, "--memory");
    expect_bad("--no-port", NULL, "--no-port|no switch");
    expect_bad("--no-dry-run false", NULL, "--no-dry-run|leave out 'false'");
    expect_bad("--port 1 true", NULL, "'true'|switch");
    expect_bad("--no-dry-run=1", NULL, "--no-dry-run");
    expect_bad("--dry-run=maybe", NULL, "--dry-run|maybe");
    expect_bad("--backend gpu", NULL, "--backend|gpu|auto, cpu, ref or cuda");
    expect_bad("--backend cpu|ref", NULL, "--backend");
    expect_bad("--graph-optimization-config {", NULL, "--graph-optimization-config|JSON");
    expect_bad("--graph-optimization-config [1]", NULL, "--graph-optimization-config|JSON object");
    expect_bad("--cache-queue-port 80,,81", NULL, "--cache-queue-port");
    expect_bad("--cache-queue-port 80,70000", NULL, "--cache-queue-port|65535");
    expect_bad("--served-model-name=", NULL, "--served-model-name|empty");
    expect_bad("--ips 1.2.3.4", NULL, "--ips|several hosts");
}

/* Known, not built: refused with the reason; values that ask for nothing pass (test_defaults_and_fine_values_pass). */
static void test_pending(void **state) {
    (void)state;
    for (int i = 0; i < option_count; i++) {
        const option *p = &option_table[i];
        if (p->state != OPTION_PENDING) continue;
        const char *ask = p->type == OPTION_FLAG    ? "1"
                          : p->type == OPTION_JSON  ? "{}"
                          : p->type == OPTION_PORTS ? "7013"
                                                    : "3";
        char first[64] = "";
        if (p->type == OPTION_ENUM) {
            (void)snprintf(first, sizeof first, "%.*s", (int)strcspn(p->choices, "|"), p->choices);
            ask = strrchr(p->choices, '|') + 1;
            if (strcmp(ask, p->fine) == 0) ask = first;
        }
        options o;
        ern_err err = {0};
        assert_int_equal(options_read(&o, p->command, 0, NULL, NULL, &err), ERN_OK);
        assert_int_equal(options_set(&o, i, ask, SOURCE_LINE, "here", &err), ERN_OK);
        if (options_check_built(&o, &err) != ERN_ERR_UNSUPPORTED) fail_msg("row %d accepts '%s'", i, ask);
        char title[128];
        option_title(p, title, sizeof title);
        assert_non_null(strstr(err.text, title));
        assert_non_null(strstr(err.text, p->why));
        options_close(&o);
    }
    expect_bad("--kvcache-storage-backend mooncake", NULL,
               "--kvcache-storage-backend mooncake|not built|--kvcache-storage-dir");
    expect_bad("--kvcache-storage-backend attention_store", NULL, "--kvcache-storage-backend attention_store");
    expect_bad("--write-policy write_back", NULL, "--write-policy write_back|as they are filled");
}

/* ---- the environment --------------------------------------------------------------------------------------------- */

static void test_environment(void **state) {
    (void)state;
    char *env[] = {
        "FD_API_KEY=k1,k2", "FD_LOG_LEVEL=WARNING", "FD_DISABLE_CHUNKED_PREFILL=1", "FD_LOG_DIR=", "OTHER=x", NULL};
    options o;
    expect_good(&o, "", env);
    assert_int_equal(options_values(&o, "api-key")->n, 2);
    assert_string_equal(options_text(&o, "log-level"), "WARNING");
    assert_true(options_flag(&o, "FD_DISABLE_CHUNKED_PREFILL"));
    assert_null(options_text(&o, "FD_LOG_DIR")); /* empty is unset */
    options_close(&o);
    expect_good(&o, "--api-key only", env); /* the line wins, whole */
    assert_int_equal(options_values(&o, "api-key")->n, 1);
    assert_string_equal(options_text(&o, "api-key"), "only");
    options_close(&o);
    char *bad[] = {"FD_SAMPLING_CLASS=beam", NULL}, *v2[] = {"ENABLE_V1_KVCACHE_SCHEDULER=2", NULL};
    char *commas[] = {"FD_API_KEY=, ,", NULL};
    expect_bad("", commas, "FD_API_KEY|no value");
    expect_bad("", bad, "FD_SAMPLING_CLASS|beam|rejection");
    expect_bad("", v2, "ENABLE_V1_KVCACHE_SCHEDULER|'2'");
}

/* ---- the file ---------------------------------------------------------------------------------------------------- */

static char file_path[64];

static void write_file(const char *text, size_t len) {
    (void)snprintf(file_path, sizeof file_path, "/tmp/ernest-options-XXXXXX");
    int fd = mkstemp(file_path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, len), (ssize_t)len);
    (void)close(fd);
}

static void test_yaml(void **state) {
    (void)state;
    const char *text =
        "# a comment\nport: 9001\nmax_num_seqs: 16\nmax-model-len: 1024\napi-key: [a, 'b c']\nuse-cudagraph: true\n"
        "graph-optimization-config: {use_cudagraph: true, cudagraph_capture_sizes: [1, 2, 4], note: 'x', r: 0.5, "
        "word: abc, none: null}\nserved-model-name: \"007\"\n";
    write_file(text, strlen(text));
    char line[256], *env[] = {"FD_API_KEY=e", NULL};
    (void)snprintf(line, sizeof line, "--config %s --port 9002", file_path);
    options o;
    expect_good(&o, line, env);
    assert_int_equal(options_int(&o, "port"), 9002); /* the line wins over the file */
    assert_int_equal(options_int(&o, "max-num-seqs"), 16);
    assert_int_equal(options_int(&o, "max-model-len"), 1024);
    assert_int_equal(options_values(&o, "api-key")->n, 2); /* the file wins over the environment */
    assert_string_equal(options_values(&o, "api-key")->text[1], "b c");
    assert_true(options_flag(&o, "use-cudagraph"));
    assert_string_equal(options_text(&o, "served-model-name"), "007");
    assert_string_equal(
        options_text(&o, "graph-optimization-config"),
        "{\"use_cudagraph\":true,\"cudagraph_capture_sizes\":[1,2,4],\"note\":\"x\",\"r\":0.5,\"word\":\"abc\","
        "\"none\":null}");
    options_close(&o);
    (void)unlink(file_path);
}

static void test_yaml_refused(void **state) {
    (void)state;
    static const struct {
        const char *text, *words;
    } bad[] = {
        {"prot: 80\n", "line 1|prot|port"},
        {"port: eighty\n", "--port|line 1|eighty"},
        {"port: 80\nport: 81\n", "line 2|twice"},
        {"port: 80\nmax_model_len: 99\nmax-model-len: 99\n", "line 3|twice"},
        {"port:\n", "--port|no value"},
        {"seed: 1\nport: null\n", "--port|line 2|no value"},
        {"served-model-name: ~\n", "--served-model-name|no value"},
        {"- port\n", "map of flags"},
        {"port\n", "map of flags"},
        {"port: [1, 2]\n", "--port|list"},
        {"port: {a: 1}\n", "--port|map"},
        {"api-key: [[a]]\n", "--api-key|plain"},
        {"a: &x 1\nport: *x\n", "no flag"},
        {"seed: &x 1\nport: *x\n", "line 2|alias"},
        {"port: 80\n---\nport: 81\n", "more than one"},
        {"port: \"unterminated\n", "not YAML"},
        {"port: 1\n\tx: 2\n", "not YAML"},
        {"[a]: 1\n", "key"},
        {"config: other.yaml\n", "another"},
        {"graph-optimization-config: [1]\n", "--graph-optimization-config|JSON object"},
        {"graph-optimization-config: {a: [[[[[[[[[1]]]]]]]]]}\n", "deeper"},
        {"graph-optimization-config: {[1]: 2}\n", "key"},
        {"ips: a\n", "several hosts"},
    };
    char line[256];
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        write_file(bad[i].text, strlen(bad[i].text));
        (void)snprintf(line, sizeof line, "--config %s", file_path);
        expect_bad(line, NULL, bad[i].words);
        (void)unlink(file_path);
    }
    expect_bad("--config /nonexistent/x.yaml", NULL, "--config|/nonexistent/x.yaml");
    size_t big = (1 << 20) + 1;
    char *text = malloc(big);
    assert_non_null(text);
    memset(text, '#', big);
    write_file(text, big);
    free(text);
    (void)snprintf(line, sizeof line, "--config %s", file_path);
    expect_bad(line, NULL, "--config|larger");
    (void)unlink(file_path);
}

/* ---- what is printed -----------------------------------------------------------------------------------------------
 */

static void test_help(void **state) {
    (void)state;
    ern_buf all, man, completion, page, some;
    ern_buf_init(&all, 1 << 20), ern_buf_init(&man, 1 << 20), ern_buf_init(&completion, 1 << 20);
    ern_buf_init(&page, 1 << 20), ern_buf_init(&some, 1 << 20);
    int shown = option_help_print(&all, ~0u, NULL, NULL), expected = 0;
    option_man_print(&man);
    option_completion_print(&completion);
    option_reference_print(&page);
    for (int i = 0; i < option_count; i++) {
        const option *p = &option_table[i];
        if (p->state == OPTION_OUTSIDE) continue;
        expected++;
        char title[128];
        option_title(p, title, sizeof title);
        if (!strstr(all.data, title)) fail_msg("%s is not in the help", title);
        if (!strstr(page.data, title)) fail_msg("%s is not on the page", title);
        if (p->name && !strstr(completion.data, title)) fail_msg("%s is not completed", title);
    }
    assert_int_equal(shown, expected);
    assert_false(man.full || all.full || page.full || completion.full);
    assert_non_null(strstr(man.data, ".SH NAME"));
    assert_non_null(strstr(man.data, "max\\-model\\-len"));
    for (const char *line = all.data; *line;) { /* nobody's terminal is narrower than what we promise */
        size_t n = strcspn(line, "\n");
        bool facts = n > 0 && strncmp(line, "        ", 8) == 0;
        if (facts && n > 100 && strchr(line + 8, ' ') < line + n)
            fail_msg("help line of %zu columns: %.*s", n, (int)n, line);
        line += n + (line[n] == '\n');
    }
    int kv = option_help_print(&some, CMD_SERVE, "kv", NULL);
    assert_true(kv > 3 && kv < 40);
    assert_null(strstr(some.data, "--served-model-name"));
    ern_buf_clear(&some);
    assert_true(option_help_print(&some, CMD_SERVE, "listgroup", NULL) > 0);
    assert_non_null(strstr(some.data, "KV cache"));
    assert_int_equal(option_help_print(&some, CMD_SERVE, "xyzzy", NULL), 0);
    ern_buf_free(&all), ern_buf_free(&man), ern_buf_free(&completion), ern_buf_free(&page), ern_buf_free(&some);
}

/* --print-config is a file that --config reads to the same options, without the keys. */
static void test_print_config(void **state) {
    (void)state;
    options o, again;
    ern_buf yaml, json, back;
    ern_buf_init(&yaml, 1 << 20), ern_buf_init(&json, 1 << 20), ern_buf_init(&back, 1 << 20);
    expect_good(&o,
                "--api-key secret1 --port 1234 --memory 2.5 --served-model-name a~b --cors-origin https://x https://y "
                "--no-enable-chunked-prefill --graph-optimization-config {\"a\":1}",
                NULL);
    options_print_yaml(&o, &yaml);
    options_print_json(&o, &json);
    assert_null(strstr(yaml.data, "secret1"));
    assert_null(strstr(json.data, "secret1"));
    assert_non_null(strstr(json.data, "\"max_model_len\":2048"));
    write_file(yaml.data, yaml.len);
    char line[128];
    (void)snprintf(line, sizeof line, "--config %s", file_path);
    expect_good(&again, line, NULL);
    options_print_json(&again, &back);
    assert_int_equal(options_int(&again, "port"), 1234);
    assert_true(options_given(&again, "port"));
    assert_false(options_given(&again, "max-model-len")); /* a default stays one */
    assert_false(options_flag(&again, "enable-chunked-prefill"));
    assert_int_equal(options_values(&again, "cors-origin")->n, 2);
    (void)unlink(file_path);
    options_close(&o), options_close(&again);
    ern_buf_free(&yaml), ern_buf_free(&json), ern_buf_free(&back);
}

/* What the variable switches off is off wherever it is looked at, unless a flag of the line says otherwise. */
static void test_resolved(void **state) {
    (void)state;
    char *off[] = {"FD_DISABLE_CHUNKED_PREFILL=1", NULL};
    static const char *const line[] = {"", "--enable-chunked-prefill"}, *const says[] = {"false", "true"};
    for (int i = 0; i < 2; i++) {
        options o;
        ern_buf yaml, json;
        char words[64];
        ern_buf_init(&yaml, 1 << 20), ern_buf_init(&json, 1 << 20);
        expect_good(&o, line[i], off);
        options_print_yaml(&o, &yaml);
        options_print_json(&o, &json);
        (void)snprintf(words, sizeof words, "\nenable-chunked-prefill: %s", says[i]);
        assert_non_null(strstr(yaml.data, words));
        (void)snprintf(words, sizeof words, "\"enable_chunked_prefill\":%s", says[i]);
        assert_non_null(strstr(json.data, words));
        options_close(&o);
        ern_buf_free(&yaml), ern_buf_free(&json);
    }
}

/* The page says of each option what is true of it: what of it works, and a default only where there is one. */
static void test_reference_page(void **state) {
    (void)state;
    ern_buf page, help;
    ern_buf_init(&page, 1 << 20), ern_buf_init(&help, 1 << 20);
    option_reference_print(&page);
    assert_non_null(strstr(page.data, "| some values: default, default_v1 |"));
    assert_non_null(strstr(page.data, "| `--enable-prefix-caching` | built |"));
    assert_non_null(strstr(page.data, "| `--router TEXT` | refused until built |"));
    assert_non_null(strstr(page.data, "attention_store` | some values: none, file |"));
    const char *row = strstr(page.data, "| `--enable-logprob`");
    assert_non_null(row);
    assert_true(!strstr(row, "Default: off") || strstr(row, "Default: off") > strchr(row, '\n'));
    char *env[] = {"ERNEST_HOST=0.0.0.0", "FD_API_KEY=secret", NULL};
    assert_true(option_help_print(&help, CMD_SERVE, NULL, env) > 50);
    assert_non_null(strstr(help.data, "ERNEST_HOST (now 0.0.0.0)"));
    assert_null(strstr(help.data, "secret"));
    ern_buf_free(&page), ern_buf_free(&help);
}

/* ---- the launch checks ---------------------------------------------------------------------------------------------
 */

static void launch_line(launch *l, const char *line, char **envp, const char *words) {
    options o;
    ern_err err = {0};
    expect_good(&o, line, envp);
    ern_status s = launch_check(l, &o, &err);
    if (!words && s != ERN_OK) fail_msg("'%s': %s", line, err.text);
    if (words && (s == ERN_OK || !strstr(err.text, words)))
        fail_msg("'%s': '%s' does not say '%s'", line, err.text, words);
    options_close(&o);
}

static void test_launch(void **state) {
    (void)state;
    launch l;
    launch_line(&l, "--model /tmp", NULL, NULL);
    assert_int_equal(l.engine.max_batched_tokens, 512);
    assert_true(l.engine.chunked_prefill);
    assert_string_equal(l.host, "127.0.0.1");
    assert_false(launch_is_public(&l));
    launch_line(&l, "/tmp --max-model-len 16 --max-num-seqs 1", NULL, NULL);
    assert_int_equal(l.engine.max_batched_tokens, 16); /* never above what could be asked for */
    launch_line(&l, "/tmp --no-enable-chunked-prefill --max-model-len 4096", NULL, NULL);
    assert_int_equal(l.engine.max_batched_tokens, 4096);
    char *off[] = {"FD_DISABLE_CHUNKED_PREFILL=1", NULL};
    launch_line(&l, "/tmp", off, NULL);
    assert_false(l.engine.chunked_prefill);
    launch_line(&l, "/tmp --enable-chunked-prefill", off, NULL); /* the flag wins over the variable */
    assert_true(l.engine.chunked_prefill);
    launch_line(&l, "/tmp --host 0.0.0.0", NULL, NULL);
    assert_true(launch_is_public(&l));
    launch_line(&l, "/tmp --strict-fastdeploy", NULL, NULL);
    assert_false(l.server.enable_logprob);
    assert_int_equal(l.server.max_stop, 5);
    launch_line(&l, "/tmp --max-num-seqs 100 --max-num-batched-tokens 99", NULL, "--max-num-batched-tokens is 99");
    launch_line(&l, "/tmp --max-num-batched-tokens 63", NULL, "KV page");
    launch_line(&l, "/tmp --max-model-len 16 --max-num-seqs 2 --max-num-batched-tokens 33", NULL, "16 x 2 = 32");
    launch_line(&l, "/tmp --no-enable-chunked-prefill --max-num-batched-tokens 512", NULL, "chunked prefill is off");
    launch_line(&l, "/tmp --max-num-partial-prefills 1 --max-long-partial-prefills 2", NULL,
                "--max-long-partial-prefills");
    launch_line(&l, "/tmp --max-num-partial-prefills 2 --no-enable-chunked-prefill", NULL,
                "--max-num-partial-prefills");
    launch_line(&l, "/tmp --long-prefill-token-threshold 2049", NULL, "--long-prefill-token-threshold");
    launch_line(&l, "/tmp --memory 65536", NULL, "--memory");
    launch_line(&l, "/tmp --threads 512", NULL, "--threads");
    launch_line(&l, "/tmp --host no..such.host", NULL, "--host");
    launch_line(&l, "/tmp --cors-origin app.example", NULL, "--cors-origin");
    launch_line(&l, "/tmp --cors-origin https://app.example/path", NULL, "--cors-origin");
    launch_line(&l, "/tmp --api-key a~b", NULL, "--api-key");
    launch_line(&l, "/tmp --ready-fd 999", NULL, "--ready-fd");
    launch_line(&l, "/tmp /var", NULL, "'/var'");
    expect_bad("/tmp --model /var", NULL, "two models");
    launch_line(&l, "/tmp --host localhost", NULL, NULL);
    assert_string_equal(l.host, "127.0.0.1");
    launch_line(&l, "--port 80", NULL, "--model");
    launch_line(&l, "--model baidu/ERNIE-4.5-0.3B-Paddle", NULL, "FD_MODEL_CACHE");
    char *cache[] = {"FD_MODEL_CACHE=/", NULL};
    launch_line(&l, "--model tmp", cache, NULL);
    assert_string_equal(l.model_dir, "//tmp");
}

/* Numbers of the wrong kind or out of range never reach the launch. */
static void test_cache_numbers(void **state) {
    (void)state;
    expect_bad("--swap-space -1", NULL, "--swap-space|-1");
    expect_bad("--swap-space lots", NULL, "--swap-space|lots");
    expect_bad("--swap-space nan", NULL, "--swap-space|nan");
    expect_bad("--kv-cache-ratio 0", NULL, "--kv-cache-ratio|0.01");
    expect_bad("--kv-cache-ratio 1.5", NULL, "--kv-cache-ratio|1.5");
    expect_bad("--kvcache-storage-backend disk", NULL, "--kvcache-storage-backend|'disk'|file");
    expect_bad("--kvcache-storage-gb 0", NULL, "--kvcache-storage-gb|0.001");
    expect_bad("--kvcache-storage-dir=", NULL, "--kvcache-storage-dir|empty");
    expect_bad("--write-policy sometimes", NULL, "--write-policy|'sometimes'|write_through");
    expect_bad("--enable-prefix-caching=maybe", NULL, "--enable-prefix-caching|maybe");
    expect_bad("--max-num-partial-prefills 0", NULL, "--max-num-partial-prefills");
    expect_bad("--max-long-partial-prefills 257", NULL, "--max-long-partial-prefills|256");
    expect_bad("--long-prefill-token-threshold -1", NULL, "--long-prefill-token-threshold");
    expect_bad("--itl-target-ms -0.5", NULL, "--itl-target-ms|60000");
    expect_bad("--max-queue-wait-s 86401", NULL, "--max-queue-wait-s|86400");
    expect_bad("--max-queue-prompt-tokens -1", NULL, "--max-queue-prompt-tokens");
    expect_bad("--max-queue-mib 1.5", NULL, "--max-queue-mib|1.5");
    expect_bad("--gpu-memory-utilization 0", NULL, "--gpu-memory-utilization|0.01");
}

/* The prefix cache and its tiers: what the flags mean to the engine, and which of them need one another. */
static void test_launch_cache(void **state) {
    (void)state;
    launch l;
    launch_line(&l, "/tmp", NULL, NULL);
    assert_true(l.engine.prefix_cache && l.engine.cache_output);
    assert_false(l.engine.reserve_all);
    assert_null(l.engine.store_dir);
    assert_int_equal(l.engine.swap_bytes, 0);
    launch_line(&l, "/tmp --swap-space 0.5 --no-enable-output-caching", NULL, NULL);
    assert_int_equal(l.engine.swap_bytes, 1 << 29);
    assert_true(l.engine.prefix_cache && !l.engine.cache_output);
    launch_line(&l, "/tmp --swap-space 0.5 --no-enable-prefix-caching", NULL, NULL); /* a log line says it is no use */
    assert_false(l.engine.prefix_cache || l.engine.cache_output);
    assert_int_equal(l.engine.swap_bytes, 0);
    launch_line(&l, "/tmp --swap-space 65536", NULL, "--swap-space is 65536 GiB and this machine has");

    static const char file[] = "/tmp --kvcache-storage-backend file ";
    char line[256], *env[] = {"FILE_BACKEND_STORAGE_DIR=/tmp", NULL};
    (void)snprintf(line, sizeof line, "%s--kvcache-storage-dir /tmp --kvcache-storage-gb 2", file);
    launch_line(&l, line, NULL, NULL);
    assert_int_equal(l.engine.store_bytes, (uint64_t)2 << 30);
    assert_non_null(l.engine.store_dir);
    (void)snprintf(line, sizeof line, "%s--kvcache-storage-gb 2", file);
    launch_line(&l, line, NULL, "give --kvcache-storage-dir");
    launch_line(&l, line, env, NULL);
    (void)snprintf(line, sizeof line, "%s--kvcache-storage-dir /tmp", file);
    launch_line(&l, line, NULL, "give --kvcache-storage-gb");
    (void)snprintf(line, sizeof line, "%s--kvcache-storage-dir /dev/null --kvcache-storage-gb 2", file);
    launch_line(&l, line, NULL, "--kvcache-storage-dir /dev/null: it is no folder");
    (void)snprintf(line, sizeof line, "%s--kvcache-storage-dir /dev/null/x --kvcache-storage-gb 2", file);
    launch_line(&l, line, NULL, "--kvcache-storage-dir /dev/null/x");
    (void)snprintf(line, sizeof line, "%s--kvcache-storage-dir /tmp/not-yet --kvcache-storage-gb 2", file);
    launch_line(&l, line, NULL, NULL); /* made when it is opened */
    (void)snprintf(line, sizeof line, "%s--kvcache-storage-dir /tmp --kvcache-storage-gb 2 --no-enable-prefix-caching",
                   file);
    launch_line(&l, line, NULL, "--no-enable-prefix-caching");
    launch_line(&l, "/tmp --kvcache-storage-dir /tmp", NULL, "--kvcache-storage-backend file");
    launch_line(&l, "/tmp --kvcache-storage-gb 2", NULL, "--kvcache-storage-gb belongs");
    launch_line(&l, "/tmp --kvcache-storage-backend none", env, NULL); /* the variable asks for nothing by itself */
    assert_null(l.engine.store_dir);
    assert_false(l.server.share_cache || l.server.debug_endpoints);
    launch_line(&l, "/tmp --share-prefix-cache-across-keys --enable-debug-endpoints", NULL, NULL);
    assert_true(l.server.share_cache && l.server.debug_endpoints);
}

static void test_launch_rules(void **state) {
    (void)state;
    launch l;
    launch_line(&l, "/tmp", NULL, NULL);
    assert_int_equal(l.engine.max_partial, 0); /* FastDeploy's defaults of 1 are not taken over */
    assert_int_equal(l.engine.max_long_partial, 0);
    assert_int_equal(l.engine.queue_max, 4096);
    assert_int_equal(l.engine.queue_prompt_max, 0);
    assert_int_equal(l.engine.queue_bytes, 256 << 20);
    assert_int_equal(l.engine.queue_wait_us + l.engine.itl_target_us, 0);
    assert_true(l.engine.itl_times == 0); /* no GPU */
    assert_true(l.memory_share == 0 && l.engine.prompt_share == 0);
    launch_line(&l, "/tmp --max-num-partial-prefills 3 --max-long-partial-prefills 2 --max-model-len 4096", NULL, NULL);
    assert_int_equal(l.engine.max_partial, 3);
    assert_int_equal(l.engine.max_long_partial, 2);
    assert_int_equal(l.engine.long_prompt_tokens, 163); /* int(0.04 x 4096) */
    launch_line(&l, "/tmp --max-long-partial-prefills 1 --long-prefill-token-threshold 1000", NULL, NULL);
    assert_int_equal(l.engine.max_partial, 0);
    assert_int_equal(l.engine.long_prompt_tokens, 1000);
    launch_line(&l, "/tmp --max-long-partial-prefills 1 --max-model-len 16 --max-num-seqs 1", NULL, NULL);
    assert_int_equal(l.engine.long_prompt_tokens, 1);
    launch_line(&l, "/tmp --itl-target-ms 12.5 --max-queue-wait-s 1.5 --max-queue-prompt-tokens 9 --max-queue-mib 0",
                NULL, NULL);
    assert_int_equal(l.engine.itl_target_us, 12500);
    assert_int_equal(l.engine.queue_wait_us, 1500000);
    assert_int_equal(l.engine.queue_prompt_max, 9);
    assert_int_equal(l.engine.queue_bytes, 0);
    launch_line(&l, "/tmp --itl-target-ms 10 --no-enable-chunked-prefill", NULL, "--itl-target-ms is 10");
    launch_line(&l, "/tmp --itl-max-times 2.5", NULL, NULL);
    assert_true(l.engine.itl_times == 2.5);
    launch_line(&l, "/tmp --itl-max-times 2.5 --no-enable-chunked-prefill", NULL, "--itl-max-times is 2.5");
    launch_line(&l, "/tmp --itl-max-times 0.5", NULL, "--itl-max-times is 0.5");
    char *v0[] = {"ENABLE_V1_KVCACHE_SCHEDULER=0", NULL}, *v1[] = {"ENABLE_V1_KVCACHE_SCHEDULER=1", NULL};
    launch_line(&l, "/tmp --kv-cache-ratio 0.9", v1, NULL);
    assert_false(l.engine.reserve_all);
    ern_engine_plan p = {.n_page = 77, .backend.page_bytes = 1 << 20};
    assert_int_equal(launch_prompt_pages(&l, &p), 77);
    launch_line(&l, "/tmp", v0, NULL);
    assert_true(l.engine.reserve_all && l.engine.prompt_share == 0.75);
    assert_int_equal(launch_prompt_pages(&l, &p), 57); /* int(77 x 0.75) */
    ern_err err = {0};
    assert_int_equal(launch_check_plan(&l, &p, &err), ERN_OK);
    p.n_page = 44; /* 33 for prompts, and one of 2048 tokens takes 34 */
    assert_int_equal(launch_check_plan(&l, &p, &err), ERN_ERR_USAGE);
    assert_non_null(strstr(err.text, "--kv-cache-ratio 0.75 of 44 KV pages leaves 33"));
    l.engine.reserve_all = false;
    l.engine.store_dir = "/tmp";
    l.engine.store_bytes = (1 << 20) - 1;
    assert_int_equal(launch_check_plan(&l, &p, &err), ERN_ERR_USAGE);
    assert_non_null(strstr(err.text, "--kvcache-storage-gb"));
    launch_line(&l, "/tmp --gpu-memory-utilization 0.5", NULL, NULL);
    assert_true(l.memory_share == 0.5);
    launch_line(&l, "/tmp --gpu-memory-utilization 0.5 --memory 0.1", NULL, NULL);
    assert_true(l.memory_share == 0 && l.engine.memory_bytes > 0);
}

/* Either the GPU computes, or the sentence says why not and what mends it; auto always finds something. */
static void test_launch_devices(void **state) {
    (void)state;
    launch l;
    const char *missing = ern_backend_missing("cuda");
    launch_line(&l, "/tmp", NULL, NULL);
    assert_string_equal(l.engine.backend->name, missing ? "cpu" : "cuda");
    assert_true(launch_on_gpu(&l) == !missing);
    launch_line(&l, "/tmp --backend ref", NULL, NULL);
    assert_string_equal(l.engine.backend->name, "ref");
    char words[512];
    (void)snprintf(words, sizeof words, "--backend cuda: %s; give --backend cpu", missing ? missing : "");
    launch_line(&l, "/tmp --backend cuda", NULL, missing ? words : NULL);
    launch_line(&l, "/tmp --backend cpu", NULL, NULL);
    assert_true(l.memory_share == 0 && !l.engine.backend_options.no_graph);
    static const char *const graph[] = {"--use-cudagraph", "--graph-optimization-config {\"use_cudagraph\":true}",
                                        "--graph-optimization-config {\"graph_opt_level\":0}"};
    static const char *const none[] = {"--no-use-cudagraph", "--graph-optimization-config {\"use_cudagraph\":false}",
                                       "--use-cudagraph --graph-optimization-config {\"use_cudagraph\":false}"};
    for (int i = 0; i < 3; i++) {
        char line[160];
        (void)snprintf(line, sizeof line, "/tmp %s", graph[i]);
        launch_line(&l, line, NULL, NULL);
        assert_false(l.engine.backend_options.no_graph);
        (void)snprintf(line, sizeof line, "/tmp %s", none[i]);
        launch_line(&l, line, NULL, NULL);
        assert_true(l.engine.backend_options.no_graph);
    }
    launch_line(&l, "/tmp --graph-optimization-config {\"use_cudagraph\":1}", NULL, "must be true or false");
}

/* What a flag offers must be what the server can do. */
static void test_no_more_requests_than_connections(void **state) {
    (void)state;
    const int at = option_find("max-concurrency", strlen("max-concurrency"), CMD_SERVE);
    assert_true(at >= 0 && option_table[at].max == ERN_SERVER_CONNECTIONS_MAX);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_are_whole),
        cmocka_unit_test(test_names_are_unique),
        cmocka_unit_test(test_defaults_and_fine_values_pass),
        cmocka_unit_test(test_fastdeploy_flags_are_known),
        cmocka_unit_test(test_line),
        cmocka_unit_test(test_line_refused),
        cmocka_unit_test(test_pending),
        cmocka_unit_test(test_environment),
        cmocka_unit_test(test_yaml),
        cmocka_unit_test(test_yaml_refused),
        cmocka_unit_test(test_help),
        cmocka_unit_test(test_print_config),
        cmocka_unit_test(test_resolved),
        cmocka_unit_test(test_reference_page),
        cmocka_unit_test(test_launch),
        cmocka_unit_test(test_cache_numbers),
        cmocka_unit_test(test_launch_cache),
        cmocka_unit_test(test_launch_rules),
        cmocka_unit_test(test_launch_devices),
        cmocka_unit_test(test_no_more_requests_than_connections),
    };
    return cmocka_run_group_tests_name("options", tests, NULL, NULL);
}
