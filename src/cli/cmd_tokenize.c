/* ernest tokenize: a model's tokens, both ways. Also `ernest tokenizer` with FastDeploy's flags. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/jsonw.h"
#include "cli/command.h"
#include "text/text.h"

enum { IDS_MAX = 1 << 24, TEXT_MAX = 256 << 20 };

/* One line per token: id, piece as the tokenizer spells it; then the ids as JSON. */
static void print_pieces(const ern_tokenizer *t, const ern_tokens *ids, ern_buf *out) {
    for (size_t i = 0; i < ids->n; i++) {
        const char *name = ern_tokenizer_name(t, ids->id[i]);
        (void)ern_buf_print(out, "%8d  ", ids->id[i]);
        ern_json_quote(out, name, strlen(name));
        (void)ern_buf_print(out, "%s\n", ern_tokenizer_is_special(t, ids->id[i]) ? "  special" : "");
    }
    ern_jsonw w;
    ern_jsonw_init(&w, out);
    ern_jsonw_array(&w);
    for (size_t i = 0; i < ids->n; i++) ern_jsonw_int(&w, ids->id[i]);
    ern_jsonw_array_end(&w);
    (void)ern_buf_text(out, "\n");
}

static ern_status encode(const ern_tokenizer *t, const char *text, size_t len, bool special, ern_buf *out,
                         ern_err *err) {
    ern_tokens ids;
    ern_tokens_init(&ids, IDS_MAX);
    ern_status s = ern_tokenizer_encode(t, text, len, special, &ids, err);
    if (s == ERN_OK) {
        print_pieces(t, &ids, out);
        (void)ern_buf_print(out, "%zu tokens from %zu bytes\n", ids.n, len);
    }
    ern_tokens_free(&ids);
    return s;
}

/* "[1, 2, 3]" or "1 2 3" or "1,2,3". */
static ern_status read_ids(const char *text, ern_tokens *ids, ern_err *err) {
    for (const char *at = text;;) {
        at += strspn(at, "[], \t\n");
        if (!*at) return ERN_OK;
        char *end = NULL;
        long v = strtol(at, &end, 10);
        if (end == at || v < 0 || v > 0x7fffffff)
            return ERN_FAIL(err, ERN_ERR_USAGE, "--decode wants token ids such as '[1, 2, 3]', and '%.40s' is none",
                            at);
        if (!ern_tokens_add(ids, (int32_t)v))
            return ERN_FAIL(err, ERN_ERR_USAGE, "--decode holds more than %d ids", IDS_MAX);
        at = end;
    }
}

static ern_status decode(const ern_tokenizer *t, const char *text, ern_buf *out, ern_err *err) {
    ern_tokens ids;
    ern_tokens_init(&ids, IDS_MAX);
    ern_status s = read_ids(text, &ids, err);
    ern_buf plain;
    ern_buf_init(&plain, TEXT_MAX);
    if (s == ERN_OK) s = ern_tokenizer_decode(t, ids.id, ids.n, false, &plain, err);
    if (s == ERN_OK) {
        print_pieces(t, &ids, out);
        (void)ern_buf_add(out, plain.data, plain.len);
        (void)ern_buf_text(out, "\n");
    }
    ern_buf_free(&plain);
    ern_tokens_free(&ids);
    return s;
}

static ern_status export_vocab(const ern_tokenizer *t, const char *path, ern_err *err) {
    ern_buf b;
    ern_buf_init(&b, TEXT_MAX);
    ern_jsonw w;
    ern_jsonw_init(&w, &b);
    ern_jsonw_array(&w);
    for (int32_t id = 0; id < ern_tokenizer_n_token(t); id++) ern_jsonw_text(&w, ern_tokenizer_name(t, id));
    ern_jsonw_array_end(&w);
    FILE *f = fopen(path, "we");
    bool good = f && !b.full && fwrite(b.data, 1, b.len, f) == b.len;
    if (f) good = fclose(f) == 0 && good;
    ern_buf_free(&b);
    return good ? ERN_OK : ERN_FAIL(err, ERN_ERR_FILE, "--vocab-export: cannot write %s", path);
}

static ern_status encode_stdin(const ern_tokenizer *t, bool special, ern_buf *out, ern_err *err) {
    ern_buf text;
    ern_buf_init(&text, TEXT_MAX);
    char chunk[65536];
    size_t n;
    while ((n = fread(chunk, 1, sizeof chunk, stdin)) > 0 && ern_buf_add(&text, chunk, n)) {
    }
    ern_status s = text.full ? ERN_FAIL(err, ERN_ERR_USAGE, "standard input is longer than %d bytes", TEXT_MAX)
                             : encode(t, text.data ? text.data : "", text.len, special, out, err);
    ern_buf_free(&text);
    return s;
}

static ern_status run(const options *o, const ern_tokenizer *t, ern_buf *out, ern_err *err) {
    const char *text = options_text(o, "encode"), *ids = options_text(o, "decode");
    const char *path = options_text(o, "vocab-export");
    bool special = options_flag(o, "parse-special"), asked = text || ids || path || o->n_positional;
    if (options_flag(o, "vocab-size")) asked = ern_buf_print(out, "%d\n", ern_tokenizer_n_token(t));
    if (options_flag(o, "info"))
        asked = ern_buf_print(
            out, "ids: %d\nbegin: %d %s\nend: %d %s\n", ern_tokenizer_n_token(t), ern_tokenizer_bos(t),
            ern_tokenizer_bos(t) < 0 ? "" : ern_tokenizer_name(t, ern_tokenizer_bos(t)), ern_tokenizer_eos(t),
            ern_tokenizer_eos(t) < 0 ? "" : ern_tokenizer_name(t, ern_tokenizer_eos(t)));
    if (text) ERN_TRY(encode(t, text, strlen(text), special, out, err));
    for (int i = 0; i < o->n_positional; i++)
        ERN_TRY(encode(t, o->positional[i], strlen(o->positional[i]), special, out, err));
    if (ids) ERN_TRY(decode(t, ids, out, err));
    if (path) ERN_TRY(export_vocab(t, path, err));
    return asked ? ERN_OK : encode_stdin(t, special, out, err);
}

int cmd_tokenize(int argc, char **argv, char **envp) {
    options o;
    int exit_code;
    if (!command_begin(&o, CMD_TOKENIZE, argc, argv, envp, &exit_code)) return exit_code;
    char dir[1024];
    ern_err err;
    ern_tokenizer *t = NULL;
    ern_buf out;
    ern_buf_init(&out, (size_t)1 << 30);
    ern_status s = command_model_dir(&o, dir, sizeof dir, &err);
    if (s == ERN_OK) s = ern_tokenizer_open(&t, dir, &err);
    if (s == ERN_OK) s = run(&o, t, &out, &err);
    if (s == ERN_OK)
        exit_code = command_print(&out);
    else
        exit_code = command_fail(&err);
    ern_buf_free(&out);
    ern_tokenizer_close(t);
    options_close(&o);
    return exit_code;
}
