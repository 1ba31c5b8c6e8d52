/* The sub-commands' table and what they share. See cli.h and command.h. */
#include "cli/cli.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/os.h"
#include "cli/command.h"

const command command_table[] = {
    {"serve", NULL, "[MODEL] [FLAGS]", "Serve a model over HTTP, as OpenAI and FastDeploy do", CMD_SERVE, cmd_serve},
    {"chat", NULL, "[MODEL] [FLAGS]", "Talk to a model in the terminal, on a server or on one started here", CMD_CHAT,
     cmd_chat},
    {"complete", NULL, "[MODEL] [FLAGS]", "Continue texts, on a server or on one started here", CMD_COMPLETE,
     cmd_complete},
    {"tokenize", "tokenizer", "--model DIR [TEXT ...] [FLAGS]", "Show a model's tokens, both ways", CMD_TOKENIZE,
     cmd_tokenize},
    {"make-model", NULL, "--out DIR [FLAGS]", "Write a checkpoint of random weights in the published format",
     CMD_MAKE_MODEL, cmd_make_model},
    {"quantize", NULL, "IN OUT --quantization FORMAT [FLAGS]",
     "Write a quantized checkpoint, which loads at once and takes less disk and memory", CMD_QUANTIZE, cmd_quantize},
    {"bench", NULL, "limits|step|serve|kernels [FLAGS]",
     "Measure the machine's limits, the model's steps, a server under load, single kernels", CMD_BENCH, cmd_bench},
    {"collect-env", NULL, "", "Print what a bug report needs: build, machine, limits, variables", 0, cmd_collect_env},
    {"docs", NULL, "api|flags|man|completion",
     "Print the page of the API or of the flags, the man page, the bash completion", 0, cmd_docs},
    {"version", NULL, "", "Print the version", 0, cmd_version},
    {"help", NULL, "[COMMAND]", "Print this, or a command's flags", 0, cmd_help},
    {0},
};

static const command *find_command(const char *name) {
    for (const command *c = command_table; c->name; c++)
        if (strcmp(c->name, name) == 0 || (c->alias && strcmp(c->alias, name) == 0)) return c;
    for (const command *c = bench_table; c->name; c++)
        if (strcmp(c->name, name) == 0) return c;
    return NULL;
}

int command_fail(const ern_err *err) {
    (void)fprintf(stderr, "ernest: %s\n", err->text);
    return ern_exit_code(err->code);
}

int command_print(ern_buf *b) {
    bool good = b->len == 0 || fwrite(b->data, 1, b->len, stdout) == b->len;
    good = fflush(stdout) == 0 && good;
    ern_buf_free(b);
    if (!good) (void)fprintf(stderr, "ernest: cannot write to standard output: %s\n", strerror(errno));
    return good ? 0 : 1;
}

static int print_overview(void) {
    ern_buf b;
    ern_buf_init(&b, 1 << 16);
    (void)ern_buf_text(&b,
                       "ernest " ERN_VERSION ": serves ERNIE-4.5 language models\n\nusage: ernest COMMAND [FLAGS]\n\n");
    for (const command *c = command_table; c->name; c++) (void)ern_buf_print(&b, "  %-12s %s\n", c->name, c->help);
    (void)ern_buf_text(&b, "\nernest COMMAND --help shows a command's flags; --help=KEYWORD those that hold a word,\n"
                           "--help=listgroup their headings.\n");
    return command_print(&b);
}

static int print_command_help(const command *c, const char *keyword, char **envp) {
    ern_buf b;
    ern_buf_init(&b, 1 << 20);
    bool groups = strcmp(keyword, "listgroup") == 0;
    if (!groups) (void)ern_buf_print(&b, "usage: ernest %s %s\n%s.\n", c->name, c->usage, c->help);
    if (c->options && option_help_print(&b, c->options, keyword, envp) == 0) {
        ern_buf_free(&b);
        (void)fprintf(stderr, "ernest: no flag of %s holds '%s'; --help=listgroup lists the headings\n", c->name,
                      keyword);
        return 2;
    }
    return command_print(&b);
}

bool command_begin(options *o, unsigned options_of, int argc, char **argv, char **envp, int *exit_code) {
    ern_err err;
    ern_status s = options_read(o, options_of, argc - 1, argv + 1, envp, &err);
    if (s == ERN_OK && !o->help) s = options_check_built(o, &err);
    if (s == ERN_OK && !o->help) return true;
    *exit_code = s == ERN_OK ? print_command_help(find_command(argv[0]), o->help, envp) : command_fail(&err);
    options_close(o);
    return false;
}

ern_status command_positional(const options *o, int most, ern_err *err) {
    if (o->n_positional <= most) return ERN_OK;
    return ERN_FAIL(err, ERN_ERR_USAGE, "'%.100s' stands alone without a flag; quote a value that holds blanks",
                    o->positional[most]);
}

static bool is_folder(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

ern_status command_model_dir(const options *o, char *out, size_t size, ern_err *err) {
    const char *name = options_text(o, "model"), *cache = options_text(o, "FD_MODEL_CACHE");
    if (!name && o->command == CMD_TOKENIZE && o->n_positional && is_folder(o->positional[0]))
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "no model named, and words without a flag are texts; write ernest tokenize --model %.200s %s",
                        o->positional[0], o->n_positional > 1 ? "and the text" : "'a text'");
    if (!name)
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "no model named: give --model a checkpoint's folder (ernest make-model makes one)");
    if (strlen(name) >= size) return ERN_FAIL(err, ERN_ERR_USAGE, "--model is longer than %zu bytes", size - 1);
    if (is_folder(name)) return memcpy(out, name, strlen(name) + 1), ERN_OK;
    if (ern_file_exists(name) && o->command == CMD_TOKENIZE) return memcpy(out, name, strlen(name) + 1), ERN_OK;
    if (ern_file_exists(name))
        return ERN_FAIL(err, ERN_ERR_USAGE, "--model %.200s is a file; give the folder that holds config.json", name);
    if (cache) {
        ERN_TRY(ern_path_join(out, size, cache, name, err));
        if (is_folder(out)) return ERN_OK;
        return ERN_FAIL(err, ERN_ERR_FILE, "--model %.150s is no folder, neither here nor below FD_MODEL_CACHE=%.150s",
                        name, cache);
    }
    return ERN_FAIL(err, ERN_ERR_FILE,
                    "--model %.150s is no folder here, and downloading is not built; fetch the checkpoint and give its "
                    "folder, or set FD_MODEL_CACHE to the folder that holds hub ids",
                    name);
}

ern_status command_backend(const options *o, const ern_backend_ops **out, ern_err *err) {
    const char *name = options_text(o, "backend");
    if (strcmp(name, "auto") == 0) name = ern_backend_missing("cuda") ? "cpu" : "cuda";
    const char *missing = ern_backend_missing(name);
    if (missing) return ERN_FAIL(err, ERN_ERR_DEVICE, "--backend %s: %s; give --backend cpu", name, missing);
    *out = ern_backend_find(name);
    return ERN_OK;
}

ern_kv_dtype command_kv_dtype(const options *o, ern_kv_codes wish) {
    static const struct {
        const char *name;
        ern_kv_codes codes;
        ern_kv_dtype dtype;
    } kinds[] = {{"int8", ERN_KV_CODES_INT8, ERN_KV_I8}, {"fp8", ERN_KV_CODES_FP8, ERN_KV_F8}};
    const char *name = options_text(o, "kv-cache-dtype");
    const bool by_wish = strcmp(name, "auto") == 0;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (by_wish ? kinds[i].codes == wish : strcmp(name, kinds[i].name) == 0) return kinds[i].dtype;
    return ERN_KV_BF16;
}

int cmd_version(int argc, char **argv, char **envp) {
    (void)argv;
    (void)envp;
    if (argc > 1) return (void)fprintf(stderr, "ernest: version takes no arguments\n"), 2;
    return puts("ernest " ERN_VERSION) < 0;
}

int cmd_help(int argc, char **argv, char **envp) {
    if (argc < 2) return print_overview();
    char name[64];
    (void)snprintf(name, sizeof name, "%s%s%s", argv[1], argc > 2 ? " " : "", argc > 2 ? argv[2] : "");
    const command *c = find_command(name);
    if (!c) c = find_command(argv[1]);
    if (!c) return (void)fprintf(stderr, "ernest: %.100s is no command; ernest help lists them\n", argv[1]), 2;
    return print_command_help(c, "", envp);
}

int ern_cli_main(int argc, char **argv, char **envp) {
    struct sigaction ignore = {.sa_handler = SIG_IGN};
    (void)sigaction(SIGPIPE, &ignore, NULL);
    if (argc < 2) return print_overview(), 2;
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) return print_overview();
    if (strcmp(argv[1], "--version") == 0 || strcmp(argv[1], "-V") == 0) return puts("ernest " ERN_VERSION) < 0;
    const command *c = find_command(argv[1]);
    if (!c) {
        (void)fprintf(stderr, "ernest: %.100s is no command; ernest help lists them\n", argv[1]);
        return 2;
    }
    for (int i = 2; c->options == 0 && c->run != cmd_help && i < argc; i++)
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) return print_command_help(c, "", envp);
    return c->run(argc - 1, argv + 1, envp);
}
