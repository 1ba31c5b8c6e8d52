/* The fingerprint of what a block of KV depends on. See fingerprint.h. */
#include "cli/fingerprint.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/os.h"

enum { CONFIG_BYTES_MAX = 16 << 20 };

/* Fields are hashed with their length, so that no two lists of fields read the same. */
static void add(XXH3_state_t *x, const void *data, size_t n) {
    const uint64_t len = n;
    XXH3_128bits_update(x, &len, sizeof len);
    XXH3_128bits_update(x, data, n);
}

/* A whole file: this program, or the plugin that computes in its place. */
static ern_status add_program(XXH3_state_t *x, const char *path, ern_err *err) {
    ern_map self;
    ERN_TRY(ern_map_open(&self, path, err));
    add(x, self.data, self.size_bytes);
    ern_map_close(&self);
    return ERN_OK;
}

static ern_status add_config(XXH3_state_t *x, const ern_model *m, const char *name, ern_err *err) {
    char path[2048], *text;
    size_t len;
    ERN_TRY(ern_path_join(path, sizeof path, m->dir, name, err));
    ERN_TRY(ern_file_read(&text, &len, path, CONFIG_BYTES_MAX, err));
    add(x, text, len);
    free(text);
    return ERN_OK;
}

static ern_status add_all(XXH3_state_t *x, const ern_engine_options *o, const char *config_name, ern_err *err) {
    const ern_backend_options *b = &o->backend_options;
    ern_backend_options asked = *b;
    ern_backend_plan p;
    uint8_t weights[16];
    if (asked.n_page == 0) asked.n_page = 1; /* which kernels run does not depend on it */
    ERN_TRY(o->backend->plan(&p, o->model, &asked, err));
    ERN_TRY(add_program(x, "/proc/self/exe", err));
    const char *plugin = ern_backend_file(o->backend->name);
    if (plugin) ERN_TRY(add_program(x, plugin, err));
    add(x, o->backend->name, strlen(o->backend->name));
    add(x, p.kernels, strlen(p.kernels));
    const ern_quant_plan *q = &o->model->quant;
    const int32_t format[] = {(int32_t)b->kv_dtype, b->n_page_cell,        (int32_t)q->dense, (int32_t)q->expert,
                              (int32_t)q->head,     (int32_t)b->act_exact, (int32_t)b->mtp};
    add(x, format, sizeof format);
    add(x, &p.page_bytes, sizeof p.page_bytes);
    ERN_TRY(add_config(x, o->model, config_name, err));
    ERN_TRY(ern_model_fingerprint(o->model, weights, err));
    add(x, weights, sizeof weights);
    return ERN_OK;
}

ern_status fingerprint_make(uint8_t out[16], const ern_engine_options *o, const char *config_name, ern_err *err) {
    XXH3_state_t *x = XXH3_createState();
    if (!x) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the fingerprint of %.300s", o->model->dir);
    XXH3_128bits_reset(x);
    ern_status s = add_all(x, o, config_name, err);
    XXH128_canonical_t digest;
    XXH128_canonicalFromHash(&digest, XXH3_128bits_digest(x));
    XXH3_freeState(x);
    if (s == ERN_OK) memcpy(out, digest.digest, 16);
    return s;
}
