/* The files of a checkpoint folder. See checkpoint.h. */
#include "model/checkpoint.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/jsonr.h"

enum { INDEX_BYTES_MAX = 64 << 20, INDEX_DEPTH_MAX = 8, PATH_BYTES = 2048 };

/* ---- the index -----------------------------------------------------------------------------------------------------
 */

/* A file beside the index: no folder, no hidden name, nothing but safetensors. Links are followed, because the download
 * cache that people serve from is made of them. */
static bool plain_name(const char *name, size_t len) {
    static const char end[] = ".safetensors";
    if (len != strlen(name) || len <= sizeof end - 1 || len > 255 || name[0] == '.') return false;
    for (const char *p = name; *p; p++)
        if (*p <= 32 || *p >= 127 || *p == '/' || *p == '\\') return false;
    return strcmp(name + len - (sizeof end - 1), end) == 0;
}

static int by_text(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

static ern_status index_fill(ckpt_index *x, ern_arena *arena, json_t *map, const char *what, ern_err *err) {
    size_t n = json_object_size(map), k = 0;
    if (n == 0 || n > ST_TENSORS_MAX)
        return ERN_FAIL(err, ERN_ERR_FILE, "%s: weight_map must name 1 to %d tensors, found %zu", what, ST_TENSORS_MAX,
                        n);
    const char **file = ERN_ARENA_NEW(arena, const char *, n);
    x->name = ERN_ARENA_NEW(arena, const char *, n);
    x->file_of = ERN_ARENA_NEW(arena, int32_t, n);
    if (!file || !x->name || !x->file_of) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory to read %s", what);
    const char *name;
    json_t *value;
    json_object_foreach(map, name, value) {
        if (!st_name_ok(name, strlen(name)))
            return ERN_FAIL(err, ERN_ERR_FILE, "%s: weight_map has a key that is no plain tensor name", what);
        const char *of = json_string_value(value);
        size_t of_len = json_string_length(value);
        if (!of || !plain_name(of, of_len))
            return ERN_FAIL(
                err, ERN_ERR_FILE,
                "%s: tensor %.200s: expected the name of a .safetensors file in the same folder, found %.80s", what,
                name, of && st_name_ok(of, of_len) ? of : "something else");
        x->name[k] = ern_arena_text(arena, name, strlen(name));
        file[k] = ern_arena_text(arena, of, of_len);
        if (!x->name[k] || !file[k]) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory to read %s", what);
        k++;
    }
    qsort(x->name, n, sizeof *x->name, by_text);
    qsort(file, n, sizeof *file, by_text);
    for (size_t i = 0; i < n; i++)
        if (i == 0 || strcmp(file[i], file[i - 1]) != 0) file[x->n_file++] = file[i];
    if (x->n_file > CKPT_FILES_MAX)
        return ERN_FAIL(err, ERN_ERR_FILE, "%s: expected at most %d files, found %d", what, CKPT_FILES_MAX, x->n_file);
    x->file = file;
    x->n_name = (int32_t)n;
    for (size_t i = 0; i < n; i++) {
        const char *of = json_string_value(json_object_get(map, x->name[i]));
        const char **at = bsearch(&of, file, (size_t)x->n_file, sizeof *file, by_text);
        ERN_ASSERT(at);
        x->file_of[i] = (int32_t)(at - file);
    }
    return ERN_OK;
}

ern_status ckpt_index_parse(ckpt_index *out, ern_arena *arena, const char *text, size_t len, const char *what,
                            ern_err *err) {
    json_t *root;
    *out = (ckpt_index){0};
    ern_status s = ern_json_parse(&root, text, len, INDEX_DEPTH_MAX, what, err);
    if (s == ERN_ERR_INPUT && err) err->code = ERN_ERR_FILE;
    if (s != ERN_OK) return s == ERN_ERR_INPUT ? ERN_ERR_FILE : s;
    json_t *map = json_object_get(root, "weight_map");
    json_t *total = json_object_get(json_object_get(root, "metadata"), "total_size");
    out->total_bytes = json_number_value(total);
    if (total && !(json_is_number(total) && out->total_bytes >= 0)) {
        json_decref(root);
        return ERN_FAIL(err, ERN_ERR_FILE, "%s: metadata.total_size must be a number of bytes", what);
    }
    s = json_is_object(map) ? index_fill(out, arena, map, what, err)
                            : ERN_FAIL(err, ERN_ERR_FILE, "%s: expected an object with the object weight_map", what);
    json_decref(root);
    return s;
}

/* Every name of the index in the file it says, and no other name in the files. */
static ern_status index_compare(const checkpoint *c, const ckpt_index *x, ern_err *err) {
    for (int32_t i = 0; i < x->n_name; i++) {
        const ckpt_tensor *t = ckpt_find(c, x->name[i]);
        const st_file *of = &c->file[x->file_of[i]];
        if (!t)
            return ERN_FAIL(err, ERN_ERR_FILE, "%s: tensor %.200s: expected it in %s, found it nowhere", c->label,
                            x->name[i], x->file[x->file_of[i]]);
        if (t->file != of)
            return ERN_FAIL(err, ERN_ERR_FILE, "%s: tensor %s: expected it in this file by the index, found it in %s",
                            of->path, x->name[i], x->file[t->file - c->file]);
    }
    for (int32_t i = 0; i < c->n_tensor; i++) {
        const char *name = c->tensor[i].info->name;
        if (!bsearch(&name, x->name, (size_t)x->n_name, sizeof *x->name, by_text))
            return ERN_FAIL(err, ERN_ERR_FILE, "%s: tensor %s is not named by %s", c->tensor[i].file->path, name,
                            CKPT_INDEX);
    }
    return ERN_OK;
}

/* ---- the folder ----------------------------------------------------------------------------------------------------
 */

static int by_name(const void *a, const void *b) {
    return strcmp(((const ckpt_tensor *)a)->info->name, ((const ckpt_tensor *)b)->info->name);
}

ckpt_tensor *ckpt_find(const checkpoint *c, const char *name) {
    int32_t low = 0, high = c->n_tensor;
    while (low < high) {
        int32_t mid = low + (high - low) / 2;
        int d = strcmp(name, c->tensor[mid].info->name);
        if (d == 0) return &c->tensor[mid];
        if (d < 0)
            high = mid;
        else
            low = mid + 1;
    }
    return NULL;
}

/* One table over all files; a name in two files is refused. */
static ern_status table_make(checkpoint *c, ern_arena *arena, ern_err *err) {
    size_t n = 0, k = 0;
    for (int32_t i = 0; i < c->n_file; i++) n += (size_t)c->file[i].n_tensor;
    if (n > ST_TENSORS_MAX)
        return ERN_FAIL(err, ERN_ERR_FILE, "%s: expected at most %d tensors, found %zu", c->label, ST_TENSORS_MAX, n);
    c->tensor = ERN_ARENA_NEW(arena, ckpt_tensor, n);
    if (!c->tensor) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the table of %s", c->label);
    for (int32_t i = 0; i < c->n_file; i++)
        for (int32_t j = 0; j < c->file[i].n_tensor; j++)
            c->tensor[k++] = (ckpt_tensor){.info = &c->file[i].tensor[j], .file = &c->file[i]};
    c->n_tensor = (int32_t)n;
    if (n) qsort(c->tensor, n, sizeof *c->tensor, by_name);
    for (size_t i = 1; i < n; i++)
        if (by_name(&c->tensor[i - 1], &c->tensor[i]) == 0)
            return ERN_FAIL(err, ERN_ERR_FILE, "%s: tensor %s: expected it once, found it in %s too",
                            c->tensor[i - 1].file->path, c->tensor[i].info->name, c->tensor[i].file->path);
    return ERN_OK;
}

static const char *label_make(ern_arena *arena, const char *path) {
    size_t len = strlen(path), cut = len > ST_LABEL_MAX ? len - ST_LABEL_MAX : 0;
    return ern_arena_text(arena, path + cut, len - cut);
}

/* Open the named files; those opened stay counted in c->n_file, so that ckpt_close can undo a failure. */
static ern_status files_open(checkpoint *c, ern_arena *arena, const char *dir, const char *const *name, int32_t n,
                             ern_err *err) {
    c->file = ERN_ARENA_NEW(arena, st_file, (size_t)n);
    if (!c->file) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory to open the files of %s", c->label);
    for (; c->n_file < n; c->n_file++) {
        char path[PATH_BYTES];
        ERN_TRY(ern_path_join(path, sizeof path, dir, name[c->n_file], err));
        ERN_TRY(st_file_open(&c->file[c->n_file], arena, path, err));
    }
    return table_make(c, arena, err);
}

/* Each file is there; of one that is not, a tensor that needs it is named. */
static ern_status files_exist(const checkpoint *c, const char *dir, const ckpt_index *x, ern_err *err) {
    for (int32_t i = 0; i < x->n_name; i++) {
        char path[PATH_BYTES];
        const char *file = x->file[x->file_of[i]];
        ERN_TRY(ern_path_join(path, sizeof path, dir, file, err));
        if (i > 0 && x->file_of[i] == x->file_of[i - 1]) continue;
        if (!ern_file_exists(path))
            return ERN_FAIL(err, ERN_ERR_FILE,
                            "%s: %s is missing, and tensor %.200s is in it; fetch that file of the checkpoint again",
                            c->label, file, x->name[i]);
    }
    return ERN_OK;
}

/* The index may count what is kept apart, such as the MTP layer's weights, and a sixteenth is more than that; beyond it
 * the files are of another checkpoint. Less than there is means only that whoever wrote it counted otherwise. */
static ern_status total_compare(const checkpoint *c, const ckpt_index *x, ern_err *err) {
    double have = 0;
    for (int32_t i = 0; i < c->n_tensor; i++) have += (double)c->tensor[i].info->bytes;
    if (x->total_bytes <= have + have / 16) return ERN_OK;
    return ERN_FAIL(err, ERN_ERR_FILE,
                    "%s: metadata.total_size is %.0f bytes and the files hold %.0f; fetch the checkpoint again",
                    c->label, x->total_bytes, have);
}

/* transformers would read a single file rather than the index beside it, FastDeploy the index: two models in one
 * folder.
 */
static ern_status refuse_stray(const checkpoint *c, const ckpt_index *x, const char *single, ern_err *err) {
    bool named = false;
    for (int32_t i = 0; i < x->n_file; i++) named = named || strcmp(x->file[i], CKPT_SINGLE) == 0;
    if (named || !ern_file_exists(single)) return ERN_OK;
    return ERN_FAIL(err, ERN_ERR_FILE,
                    "%s: the index does not name %s, which is there too; move away the one that is not the model",
                    c->label, CKPT_SINGLE);
}

static ern_status sharded_open(checkpoint *c, ern_arena *arena, const char *dir, const char *index, const char *single,
                               ern_err *err) {
    char *text;
    size_t len;
    ckpt_index x;
    ERN_TRY(ern_file_read(&text, &len, index, INDEX_BYTES_MAX, err));
    ern_status s = ckpt_index_parse(&x, arena, text, len, c->label, err);
    free(text);
    ERN_TRY(s);
    ERN_TRY(refuse_stray(c, &x, single, err));
    ERN_TRY(files_exist(c, dir, &x, err));
    ERN_TRY(files_open(c, arena, dir, x.file, x.n_file, err));
    ERN_TRY(index_compare(c, &x, err));
    return total_compare(c, &x, err);
}

bool ckpt_exists(const char *dir) {
    char path[PATH_BYTES];
    static const char *const name[] = {CKPT_INDEX, CKPT_SINGLE};
    for (int i = 0; i < 2; i++)
        if (ern_path_join(path, sizeof path, dir, name[i], NULL) == ERN_OK && ern_file_exists(path)) return true;
    return false;
}

/* Why a folder has no weights. A link whose target is gone is what a download cache leaves when it was tidied or moved;
 * it looks like a file to the one who lists the folder. */
static ern_status no_weights(const char *dir, const char *index, const char *single, ern_err *err) {
    const char *const path[] = {index, single};
    struct stat st;
    for (int i = 0; i < 2; i++)
        if (lstat(path[i], &st) == 0 && S_ISLNK(st.st_mode))
            return ERN_FAIL(err, ERN_ERR_FILE,
                            "%.300s is a link to a file that is not there; fetch the checkpoint again", path[i]);
    return ERN_FAIL(err, ERN_ERR_FILE, "%.300s holds no weights: expected %s or %s", dir, CKPT_SINGLE, CKPT_INDEX);
}

ern_status ckpt_open(checkpoint *out, ern_arena *arena, const char *dir, ern_err *err) {
    char index[PATH_BYTES], single[PATH_BYTES];
    static const char *const single_name = CKPT_SINGLE;
    *out = (checkpoint){0};
    ERN_TRY(ern_path_join(index, sizeof index, dir, CKPT_INDEX, err));
    ERN_TRY(ern_path_join(single, sizeof single, dir, CKPT_SINGLE, err));
    bool sharded = ern_file_exists(index);
    if (!sharded && !ern_file_exists(single)) return no_weights(dir, index, single, err);
    out->label = label_make(arena, sharded ? index : single);
    if (!out->label) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory to open %.300s", dir);
    ern_status s =
        sharded ? sharded_open(out, arena, dir, index, single, err) : files_open(out, arena, dir, &single_name, 1, err);
    if (s != ERN_OK) ckpt_close(out);
    return s;
}

void ckpt_close(checkpoint *c) {
    for (int32_t i = 0; i < c->n_file; i++) st_file_close(&c->file[i]);
    *c = (checkpoint){0};
}
