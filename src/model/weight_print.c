/* The fingerprint of the weight files: enough that another checkpoint, or the same one written again, differs, and
 * cheap at any size. See ern_model_fingerprint. */
#include <string.h>
#include <sys/stat.h>
#include <xxhash.h>

#include "base/os.h"
#include "model/model.h"
#include "model/weights.h"

enum { SAMPLE_BYTES = 4096, PIECE_BYTES = 16 * 1024 };

/* Through the descriptor: a file cut short is an error, not a SIGBUS, and nothing is paged into the mapping. */
static ern_status add_range(XXH3_state_t *x, const st_file *f, uint64_t from, uint64_t bytes, ern_err *err) {
    unsigned char piece[PIECE_BYTES];
    while (bytes) {
        size_t n = bytes < sizeof piece ? (size_t)bytes : sizeof piece;
        ERN_TRY(st_file_copy(f, piece, from, n, err));
        XXH3_128bits_update(x, piece, n);
        from += n;
        bytes -= n;
    }
    return ERN_OK;
}

/* Its name without folders, so that a checkpoint may move; its inode is left out for the same reason. */
static ern_status add_file(XXH3_state_t *x, const st_file *f, ern_err *err) {
    const char *slash = strrchr(f->path, '/'), *name = slash ? slash + 1 : f->path;
    struct stat st;
    if (fstat(f->map.fd, &st) != 0) return ERN_FAIL(err, ERN_ERR_FILE, "%s: cannot look at the file", f->path);
    const int64_t fact[] = {(int64_t)st.st_size, (int64_t)st.st_mtim.tv_sec, (int64_t)st.st_mtim.tv_nsec};
    XXH3_128bits_update(x, name, strlen(name) + 1);
    XXH3_128bits_update(x, fact, sizeof fact);
    uint64_t data = f->map.size_bytes; /* the header ends where the first tensor begins */
    for (int32_t i = 0; i < f->n_tensor; i++)
        if (f->tensor[i].from < data) data = f->tensor[i].from;
    return add_range(x, f, 0, data, err);
}

static ern_status add_tensor(XXH3_state_t *x, const ckpt_tensor *t, ern_err *err) {
    uint64_t from = t->info->from, bytes = t->info->bytes;
    if (bytes <= 2 * SAMPLE_BYTES) return add_range(x, t->file, from, bytes, err);
    ERN_TRY(add_range(x, t->file, from, SAMPLE_BYTES, err));
    return add_range(x, t->file, from + bytes - SAMPLE_BYTES, SAMPLE_BYTES, err);
}

static ern_status add_set(XXH3_state_t *x, const checkpoint *c, ern_err *err) {
    const int32_t n[] = {c->n_file, c->n_tensor};
    XXH3_128bits_update(x, n, sizeof n);
    for (int32_t i = 0; i < c->n_file; i++) ERN_TRY(add_file(x, &c->file[i], err));
    for (int32_t i = 0; i < c->n_tensor; i++) ERN_TRY(add_tensor(x, &c->tensor[i], err));
    return ERN_OK;
}

ern_status ern_model_fingerprint(const ern_model *m, uint8_t out[16], ern_err *err) {
    XXH3_state_t *x = XXH3_createState();
    if (!x) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the fingerprint of %.300s", m->dir);
    XXH3_128bits_reset(x);
    ern_status s = add_set(x, &m->files->main, err);
    if (s == ERN_OK) s = add_set(x, &m->files->mtp, err);
    XXH128_canonical_t digest;
    XXH128_canonicalFromHash(&digest, XXH3_128bits_digest(x));
    XXH3_freeState(x);
    if (s == ERN_OK) memcpy(out, digest.digest, 16);
    return s;
}
