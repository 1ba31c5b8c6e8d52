/* Opening a tokenizer, and what its tokens are. See text.h; encoding is in encode.c, decoding in decode.c. */
#include "text/tokenizer.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/os.h"
#include "base/utf8.h"
#include "text/sp_model.h"
#include "text/token_files.h"

enum { MODEL_FILE_MAX = 64 << 20 };

static const char space_mark[] = "\xe2\x96\x81"; /* U+2581 */

/* The tags a reply is made of. They are text to whoever reads the reply, so skipping specials keeps them, whatever
 * type a file gives them. */
static bool is_reply_tag(const char *name) {
    static const char *const tag[] = {"<think>",     "</think>",    "<response>",
                                      "</response>", "<tool_call>", "</tool_call>"};
    for (size_t i = 0; i < sizeof tag / sizeof tag[0]; i++)
        if (strcmp(name, tag[i]) == 0) return true;
    return false;
}

/* A user-defined piece that is markup ("<think>", "<mask:1>") rather than text that should stay whole (digits). */
static bool is_markup(const sp_piece *p) { return p->len > 2 && p->name[0] == '<' && p->name[p->len - 1] == '>'; }

static ern_status no_memory(const char *what, ern_err *err) {
    return ERN_FAIL(err, ERN_ERR_MEMORY, "%s: no memory for the tokenizer", what);
}

/* ---- tokens from the SentencePiece file ------------------------------------------------------------------------ */

/* The text a piece stands for: a byte, a special's own name, or the name with spaces for their marks. out has room for
 * the name. Returns its length. */
static size_t text_of_piece(const sp_piece *p, char *out) {
    if (p->type == SP_BYTE) {
        out[0] = (char)sp_piece_byte(p);
        return 1;
    }
    size_t n = 0;
    for (size_t i = 0; i < p->len;) {
        if (p->type != SP_CONTROL && p->type != SP_UNKNOWN && p->len - i >= 3 &&
            memcmp(p->name + i, space_mark, 3) == 0) {
            out[n++] = ' ';
            i += 3;
        } else {
            out[n++] = p->name[i++];
        }
    }
    return n;
}

static ern_status add_pieces(ern_tokenizer *t, const sp_model *m, const char *what, ern_err *err) {
    char text[SP_PIECE_BYTES_MAX];
    for (int32_t id = 0; id < m->n; id++) {
        const sp_piece *p = &m->piece[id];
        int32_t other = token_table_find(&t->table, p->name, p->len);
        if (other >= 0)
            return ERN_FAIL(err, ERN_ERR_FILE, "%s: pieces %d and %d have the same text, \"%.*s\"", what, other, id,
                            (int)(p->len < 64 ? p->len : 64), p->name);
        if (!token_table_add(&t->table, id, p->name, p->len, text, text_of_piece(p, text))) return no_memory(what, err);
        token *k = &t->table.token[id];
        k->special = p->type == SP_CONTROL || p->type == SP_UNKNOWN;
        k->split = k->special || (p->type == SP_USER_DEFINED && is_markup(p));
    }
    return ERN_OK;
}

/* ---- tokens from the files beside it --------------------------------------------------------------------------- */

static ern_status take_fact(void *ud, const token_fact *f, ern_err *err) {
    token_table *t = &((ern_tokenizer *)ud)->table;
    int32_t id = token_table_find(t, f->name, f->len);
    if (id < 0 && f->id < 0) return ERN_OK; /* a role for a token that this vocabulary does not have */
    if (id < 0) {
        id = f->id;
        if (id < t->n && t->token[id].name)
            return ERN_FAIL(err, ERN_ERR_FILE, "%s: gives \"%s\" the id %d, which is already \"%s\"", f->what, f->name,
                            id, t->token[id].name);
        if (!token_table_add(t, id, f->name, f->len, f->name, f->len)) return no_memory(f->what, err);
    }
    if (f->id >= 0 && f->id != id)
        return ERN_FAIL(err, ERN_ERR_FILE, "%s: gives \"%s\" the id %d, but it has the id %d already", f->what, f->name,
                        f->id, id);
    t->token[id].special = f->special;
    t->token[id].split = true;
    return ERN_OK;
}

/* ---- open ------------------------------------------------------------------------------------------------------ */

/* The SentencePiece file of a folder, or the path itself when it is a file. *in_dir says which. */
static ern_status find_model(char *out, size_t size, const char *path, bool *in_dir, ern_err *err) {
    static const char *const name[] = {"tokenizer.model", "spm.model", "ernie_token_100k.model"};
    struct stat st;
    if (stat(path, &st) != 0)
        return ERN_FAIL(err, ERN_ERR_FILE, "cannot find the tokenizer: %s: %s", path, strerror(errno));
    *in_dir = S_ISDIR(st.st_mode);
    if (!*in_dir) {
        if (strlen(path) >= size) return ERN_FAIL(err, ERN_ERR_FILE, "the path %s is too long", path);
        strcpy(out, path);
        return ERN_OK;
    }
    for (size_t i = 0; i < sizeof name / sizeof name[0]; i++) {
        ERN_TRY(ern_path_join(out, size, path, name[i], err));
        if (ern_file_exists(out)) return ERN_OK;
    }
    return ERN_FAIL(err, ERN_ERR_FILE,
                    "%s: has no tokenizer.model (nor spm.model, nor ernie_token_100k.model); copy it from the model's "
                    "page, tokenizer.json alone is not enough",
                    path);
}

/* Make a special a control piece, which no text merges into. One of a single character needs another name too: the
 * library looks such up by itself, and chokes on finding a control piece. */
static bool hide_special(ern_tokenizer *t, sp_piece *p, int32_t id) {
    p->type = SP_CONTROL;
    if (ern_utf8_len(p->name, p->len) != p->len) return true;
    char name[32];
    p->len = (uint32_t)snprintf(name, sizeof name, "<special %d>", id);
    p->name = ern_arena_text(&t->table.arena, name, p->len);
    return p->name != NULL;
}

/* Hand the library a model in which no text can spell a special, and note what its pieces join. */
static ern_status open_library(ern_tokenizer *t, sp_model *m, const char *what, ern_err *err) {
    for (int32_t id = 0; id < m->n; id++) {
        sp_piece *p = &m->piece[id];
        if (t->table.token[id].split && p->type != SP_UNKNOWN && p->type != SP_BYTE && !hide_special(t, p, id))
            return no_memory(what, err);
        if (p->type != SP_NORMAL && p->type != SP_USER_DEFINED && p->type != SP_UNUSED) continue;
        if (!pair_set_add(&t->pairs, p->name, p->len)) return no_memory(what, err);
        size_t n_char = 0;
        for (size_t i = 0; i < p->len; i += ern_utf8_len(p->name + i, p->len - i)) n_char++;
        if (n_char > t->longest) t->longest = n_char;
    }
    ern_buf proto;
    ern_buf_init(&proto, (size_t)MODEL_FILE_MAX * 2);
    sp_model_write(m, &proto);
    char why[256] = "";
    if (!proto.full) t->sp = sp_shim_open(proto.data, proto.len, why, sizeof why);
    bool full = proto.full;
    ern_buf_free(&proto);
    if (full) return no_memory(what, err);
    return t->sp ? ERN_OK : ERN_FAIL(err, ERN_ERR_FILE, "%s: libsentencepiece refuses it: %s", what, why);
}

/* Everything from the checked pieces on. dir is NULL when there is only a SentencePiece file. */
static ern_status build(ern_tokenizer *t, sp_model *m, const char *what, const char *dir, ern_err *err) {
    ERN_TRY(add_pieces(t, m, what, err));
    if (dir) ERN_TRY(token_files_read(dir, take_fact, t, err));
    for (int32_t id = 0; id < t->table.n; id++)
        if (t->table.token[id].name && is_reply_tag(t->table.token[id].name)) t->table.token[id].special = false;
    if (!token_table_seal(&t->table)) return no_memory(what, err);
    t->bos = ern_tokenizer_id(t, "<s>");
    t->eos = ern_tokenizer_id(t, "</s>");
    return open_library(t, m, what, err);
}

ern_status ern_tokenizer_open(ern_tokenizer **out, const char *path, ern_err *err) {
    char file[4096], *data;
    size_t len;
    bool in_dir = false;
    sp_model m;
    *out = NULL;
    ERN_TRY(find_model(file, sizeof file, path, &in_dir, err));
    ERN_TRY(ern_file_read(&data, &len, file, MODEL_FILE_MAX, err));
    ern_status s = sp_model_read(&m, data, len, file, err);
    if (s != ERN_OK) {
        free(data);
        return s;
    }
    ern_tokenizer *t = calloc(1, sizeof *t);
    if (t) {
        token_table_init(&t->table);
        t->longest = 1;
        s = build(t, &m, file, in_dir ? path : NULL, err);
    } else {
        s = no_memory(file, err);
    }
    sp_model_free(&m);
    free(data);
    if (s == ERN_OK)
        *out = t;
    else
        ern_tokenizer_close(t);
    return s;
}

void ern_tokenizer_close(ern_tokenizer *t) {
    if (!t) return;
    sp_shim_close(t->sp);
    pair_set_free(&t->pairs);
    token_table_free(&t->table);
    free(t);
}

/* ---- what the tokens are --------------------------------------------------------------------------------------- */

/* The token of an id that means something, or NULL. */
static const token *token_at(const ern_tokenizer *t, int32_t id) {
    return id >= 0 && id < t->table.n && t->table.token[id].name ? &t->table.token[id] : NULL;
}

int32_t ern_tokenizer_n_token(const ern_tokenizer *t) { return t->table.n; }
int32_t ern_tokenizer_id(const ern_tokenizer *t, const char *name) {
    return token_table_find(&t->table, name, strlen(name));
}
const char *ern_tokenizer_name(const ern_tokenizer *t, int32_t id) {
    const token *k = token_at(t, id);
    return k ? k->name : "";
}
bool ern_tokenizer_is_special(const ern_tokenizer *t, int32_t id) {
    const token *k = token_at(t, id);
    return k && k->special;
}
const char *ern_tokenizer_bytes(const ern_tokenizer *t, int32_t id, size_t *len) {
    const token *k = token_at(t, id);
    *len = k ? k->n_bytes : 0;
    return k ? k->bytes : "";
}
int32_t ern_tokenizer_bos(const ern_tokenizer *t) { return t->bos; }
int32_t ern_tokenizer_eos(const ern_tokenizer *t) { return t->eos; }
