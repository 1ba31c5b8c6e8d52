/* Opening a checkpoint: config, files, table, one last look, fingerprint. See model.h. */
#include "model/model.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "model/quant.h"
#include "model/weights.h"

enum { CONFIG_BYTES_MAX = 1 << 20, SAMPLE_BYTES = 64 };

const char *ern_dtype_name(ern_dtype t) {
    static const char *const name[] = {"bf16", "f32", "int8", "int4", "fp8"};
    return name[t];
}

float ern_linear_at(const ern_linear *w, int32_t o, int32_t i) {
    ERN_ASSERT(w->data && o >= 0 && o < w->n_out && i >= 0 && i < w->n_in);
    if (w->order == ERN_ORDER_TILED) return quant_at(w, o, i);
    int64_t at = w->order == ERN_ORDER_OUT_IN ? o * w->stride + i : i * w->stride + o;
    ERN_ASSERT(w->dtype == ERN_DTYPE_BF16 || w->dtype == ERN_DTYPE_F32);
    return w->dtype == ERN_DTYPE_F32 ? ((const float *)w->data)[at] : ern_bf16_to_f32(((const ern_bf16 *)w->data)[at]);
}

/* ---- config --------------------------------------------------------------------------------------------------------
 */

static ern_status path_make(char out[2048], const char *dir, const char *name, const char **label, ern_err *err) {
    ERN_TRY(ern_path_join(out, 2048, dir, name, err));
    size_t len = strlen(out);
    *label = len > ST_LABEL_MAX ? out + len - ST_LABEL_MAX : out;
    return ERN_OK;
}

/* Read config.json and, when it is there, generation_config.json; *hash gets the bytes of the first. */
static ern_status config_read(ern_model *m, config_hints *hints, const char *config_name, XXH64_hash_t *hash,
                              ern_err *err) {
    char path[2048], *text;
    const char *label;
    size_t len;
    ERN_TRY(path_make(path, m->dir, config_name ? config_name : "config.json", &label, err));
    ERN_TRY(ern_file_read(&text, &len, path, CONFIG_BYTES_MAX, err));
    *hash = XXH3_64bits(text, len);
    ern_status s = config_parse(&m->config, hints, text, len, label, err);
    free(text);
    ERN_TRY(s);
    memcpy(m->unknown_keys, hints->unknown, sizeof m->unknown_keys);
    ERN_TRY(path_make(path, m->dir, "generation_config.json", &label, err));
    if (!ern_file_exists(path)) return ERN_OK;
    ERN_TRY(ern_file_read(&text, &len, path, CONFIG_BYTES_MAX, err));
    s = config_parse_generation(&m->config, text, len, label, err);
    free(text);
    return s;
}

/* ---- the last steps of opening -------------------------------------------------------------------------------------
 */

/* The table alone is equal for every fine-tune of one shape, so a few bytes from the middle of each norm and attention
 * output go in: enough to tell two checkpoints apart, cheap on a cold disk. */
static ern_status fingerprint_add(XXH3_state_t *x, const checkpoint *c, ern_err *err) {
    for (int32_t i = 0; i < c->n_tensor; i++) {
        const st_tensor *t = c->tensor[i].info;
        const uint64_t number[] = {(uint64_t)t->dtype, t->from, t->bytes, c->tensor[i].file->map.size_bytes};
        XXH3_64bits_update(x, t->name, strlen(t->name) + 1);
        XXH3_64bits_update(x, number, sizeof number);
        XXH3_64bits_update(x, t->dim, (size_t)t->n_dim * sizeof t->dim[0]);
        if (!strstr(t->name, "norm") && !strstr(t->name, "o_proj")) continue;
        unsigned char sample[SAMPLE_BYTES];
        size_t n = t->bytes < sizeof sample ? (size_t)t->bytes : sizeof sample;
        ERN_TRY(st_file_copy(c->tensor[i].file, sample, t->from + (t->bytes - n) / 2, n, err));
        XXH3_64bits_update(x, sample, n);
    }
    return ERN_OK;
}

static ern_status fingerprint_make(ern_model *m, XXH64_hash_t config_hash, ern_err *err) {
    XXH3_state_t *x = XXH3_createState();
    if (!x) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the fingerprint of %.300s", m->dir);
    XXH3_64bits_reset(x);
    XXH3_64bits_update(x, &config_hash, sizeof config_hash);
    const int32_t quant[] = {(int32_t)m->quant.dense, (int32_t)m->quant.expert, (int32_t)m->quant.head};
    if (ern_quant_any(&m->quant)) XXH3_64bits_update(x, quant, sizeof quant);
    ern_status s = fingerprint_add(x, &m->files->main, err);
    if (s == ERN_OK) s = fingerprint_add(x, &m->files->mtp, err);
    m->fingerprint = XXH3_64bits_digest(x);
    XXH3_freeState(x);
    return s;
}

/* Reading in. */
typedef struct touching {
    const ern_model_options *o;
    uint64_t done, all;
} touching;

static ern_status touched(void *ud, uint64_t bytes, ern_err *err) {
    touching *t = ud;
    t->done += bytes;
    if (!t->o->progress || t->o->progress(t->o->ud, "weights", t->done, t->all)) return ERN_OK;
    return ERN_FAIL(err, ERN_ERR_CANCELLED, "loading %.300s was stopped", t->o->dir);
}

/* Whole files, or where something was quantized from them, the tensors that stay. With scratch NULL only counted. */
static ern_status touch_set(const checkpoint *c, bool whole, touching *t, void **scratch, ern_err *err) {
    for (int32_t i = 0; i < (whole ? c->n_file : c->n_tensor); i++) {
        const st_file *f = whole ? &c->file[i] : c->tensor[i].file;
        uint64_t from = whole ? 0 : c->tensor[i].info->from;
        uint64_t bytes = whole ? f->map.size_bytes : c->tensor[i].released ? 0 : c->tensor[i].info->bytes;
        if (!scratch)
            t->all += bytes;
        else
            ERN_TRY(st_file_touch(f, from, bytes, scratch, touched, t, err));
    }
    return ERN_OK;
}

static ern_status touch_all(const ern_model *m, const ern_model_options *o, ern_err *err) {
    const checkpoint *set[] = {&m->files->main, &m->files->mtp};
    touching t = {.o = o};
    void *scratch = NULL;
    ern_status s = ERN_OK;
    for (int k = 0; k < 2; k++) (void)touch_set(set[k], m->files->n_job == 0, &t, NULL, NULL);
    for (int k = 0; k < 2 && s == ERN_OK; k++) s = touch_set(set[k], m->files->n_job == 0, &t, &scratch, err);
    free(scratch);
    return s;
}

static ern_status recheck(const checkpoint *c, ern_err *err) {
    for (int32_t i = 0; i < c->n_file; i++) ERN_TRY(st_file_recheck(&c->file[i], err));
    return ERN_OK;
}

/* ---- open and close ------------------------------------------------------------------------------------------------
 */

static bool same_folder(const char *a, const char *b) {
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

/* An MTP folder with a config.json of its own must be of this model: its shapes alone do not tell. */
static ern_status mtp_folder_open(ern_model *m, const char *dir, ern_err *err) {
    char path[2048], *text;
    const char *label;
    size_t len;
    ERN_TRY(path_make(path, dir, "config.json", &label, err));
    if (ern_file_exists(path)) {
        ERN_TRY(ern_file_read(&text, &len, path, CONFIG_BYTES_MAX, err));
        ern_status s = config_compare(&m->config, text, len, label, err);
        free(text);
        ERN_TRY(s);
    }
    return ckpt_open(&m->files->mtp, &m->files->arena, dir, err);
}

/* Where the MTP weights are, if in a folder of their own: the one that was asked for, or <dir>/mtp. */
static ern_status mtp_open(ern_model *m, const ern_model_options *o, ern_err *err) {
    char path[2048];
    if (o->mtp_dir && same_folder(o->mtp_dir, m->dir)) return ERN_OK;
    if (o->mtp_dir) return mtp_folder_open(m, o->mtp_dir, err);
    ERN_TRY(ern_path_join(path, sizeof path, m->dir, "mtp", err));
    if (access(path, F_OK) == 0 && access(path, X_OK) != 0)
        return ERN_FAIL(err, ERN_ERR_FILE,
                        "cannot look into %.300s: %s; make the folder readable, or move it away to serve without MTP",
                        path, strerror(errno));
    return ckpt_exists(path) ? mtp_folder_open(m, path, err) : ERN_OK;
}

static ern_status open_all(ern_model *m, const ern_model_options *o, ern_err *err) {
    config_hints hints;
    XXH64_hash_t config_hash;
    ERN_TRY(config_read(m, &hints, o->config_name, &config_hash, err));
    m->kv_codes = hints.kv_codes;
    if (hints.quantized)
        m->quant = hints.quant;
    else if (o->quant)
        m->quant = *o->quant;
    if (o->config_only) return ERN_OK;
    ERN_TRY(ckpt_open(&m->files->main, &m->files->arena, m->dir, err));
    ERN_TRY(mtp_open(m, o, err));
    ERN_TRY(weights_fill(m, &hints, err));
    ERN_TRY(fingerprint_make(m, config_hash, err));
    ERN_TRY(quant_load(m, o, err));
    if (o->touch) ERN_TRY(touch_all(m, o, err));
    ERN_TRY(recheck(&m->files->main, err));
    return recheck(&m->files->mtp, err);
}

ern_status ern_model_open(ern_model **out, const ern_model_options *o, ern_err *err) {
    *out = NULL;
    if (strlen(o->dir) >= sizeof((ern_model *)0)->dir)
        return ERN_FAIL(err, ERN_ERR_FILE, "the path of the model folder is longer than %zu characters",
                        sizeof((ern_model *)0)->dir - 1);
    ern_model *m = calloc(1, sizeof *m);
    if (m) m->files = calloc(1, sizeof *m->files);
    if (!m || !m->files) {
        free(m);
        return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory to open %.300s", o->dir);
    }
    strcpy(m->dir, o->dir);
    m->plan_only = o->plan_only;
    ern_arena_open(&m->files->arena, 0);
    ern_status s = open_all(m, o, err);
    if (s == ERN_OK)
        *out = m;
    else
        ern_model_close(m);
    return s;
}

void ern_model_close(ern_model *m) {
    if (!m) return;
    quant_load_free(m->files);
    ckpt_close(&m->files->main);
    ckpt_close(&m->files->mtp);
    ern_arena_close(&m->files->arena);
    free(m->files);
    free(m);
}
