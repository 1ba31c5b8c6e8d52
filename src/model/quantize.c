/* ern_quantize: a bf16 checkpoint of either layout to a quantized one. See model.h. */
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/os.h"
#include "model/quant_write.h"

enum { COPY_BYTES_MAX = 64 << 20, TEXT_BYTES_MAX = 1 << 20 };

static bool same_folder(const char *a, const char *b) {
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

static ern_status refuse_same(const ern_quantize_options *o, ern_err *err) {
    char mtp[2048];
    ERN_TRY(ern_path_join(mtp, sizeof mtp, o->dir, "mtp", err));
    if (!same_folder(o->dir, o->out) && !same_folder(mtp, o->out)) return ERN_OK;
    return ERN_FAIL(err, ERN_ERR_USAGE, "%.300s is the checkpoint that is read; name another folder to write", o->out);
}

/* What belongs to a checkpoint beside its weights and config: tokenizer, generation_config.json, licence. Not hidden
 * files, not what describes the original, not what is too large for any of these. */
static bool is_companion(const char *dir, const char *name) {
    char path[2048];
    struct stat st;
    static const char *const not [] = {"config.json", "README.md", "model.safetensors.index.json"};
    static const char *const end_not[] = {".safetensors", ".bin", ".pdparams", ".index.json"};
    if (name[0] == '.') return false;
    for (size_t i = 0; i < sizeof not / sizeof *not ; i++)
        if (strcmp(name, not [i]) == 0) return false;
    for (size_t i = 0; i < sizeof end_not / sizeof *end_not; i++) {
        const size_t n = strlen(name), k = strlen(end_not[i]);
        if (n >= k && strcmp(name + n - k, end_not[i]) == 0) return false;
    }
    if (ern_path_join(path, sizeof path, dir, name, NULL) != ERN_OK || stat(path, &st) != 0) return false;
    return S_ISREG(st.st_mode) && st.st_size <= COPY_BYTES_MAX;
}

static ern_status copy_one(void *ud, const char *dir, const char *name, ern_err *err) {
    const making *at = ud;
    char from[2048], *data;
    size_t len;
    if (!is_companion(dir, name)) return ERN_OK;
    ERN_TRY(ern_path_join(from, sizeof from, dir, name, err));
    ERN_TRY(ern_file_read(&data, &len, from, COPY_BYTES_MAX, err));
    const ern_buf text = {.data = data, .len = len};
    ern_status s = making_text(at->stage, name, &text, err);
    free(data);
    return s;
}

static ern_status stage(const ern_model *m, const ern_quantize_options *o, const making *at, ern_err *err) {
    char path[2048], *text;
    size_t len;
    ERN_TRY(making_each_file(o->dir, copy_one, (void *)(uintptr_t)at, err));
    ERN_TRY(ern_path_join(path, sizeof path, o->dir, "config.json", err));
    ERN_TRY(ern_file_read(&text, &len, path, TEXT_BYTES_MAX, err));
    const ern_buf config = {.data = text, .len = len};
    const quant_source from = {.config = &m->config, .has_mtp = m->has_mtp, .model = m};
    const quant_writing w = {
        .plan = &o->plan, .kv_codes = m->kv_codes, .shard_bytes = o->shard_bytes, .progress = o->progress, .ud = o->ud};
    ern_status s = quant_write(&from, &w, at, &config, err);
    free(text);
    return s;
}

ern_status ern_quantize(const ern_quantize_options *o, ern_err *err) {
    char text[ERN_QUANT_TEXT_BYTES];
    ern_model *m;
    making at;
    if (!ern_quant_any(&o->plan))
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "nothing is to be quantized; give --quantization wint8, wint4 or "
                        "block_wise_fp8");
    ERN_TRY(refuse_same(o, err));
    ERN_TRY(ern_model_open(&m, &(ern_model_options){.dir = o->dir}, err));
    ern_status s = ERN_OK;
    if (ern_quant_any(&m->quant))
        s = ERN_FAIL(err, ERN_ERR_USAGE, "%.300s is quantized already (%s); give the bf16 checkpoint", o->dir,
                     ern_quant_text(text, &m->quant));
    if (s == ERN_OK) s = making_begin(&at, o->out, o->force, err);
    if (s == ERN_OK) s = making_end(&at, stage(m, o, &at, err), err);
    ern_model_close(m);
    return s;
}
