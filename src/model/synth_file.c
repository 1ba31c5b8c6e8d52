/* Writing the weight files of a made checkpoint, by several threads, in bounded memory. See synth.h.
 *
 *   a region = REGION_BYTES of one file; each worker fills and writes pieces of its share of it, so that making and
 *   writing overlap and no buffer is larger than a piece. */
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/os.h"
#include "base/pool.h"
#include "model/making.h"
#include "model/synth.h"

enum { PIECE_BYTES = 1 << 20, REGION_BYTES = 64 << 20, WORKERS_MAX = 64, HEADER_BYTES_MAX = 64 << 20 };

typedef struct file_job {
    const synth_tensor *tensor; /* of this file, by offset */
    int32_t n_tensor;
    int fd;
    uint64_t data_from;    /* where the data begin in the file */
    int64_t from, to;      /* the region, in bytes of the data */
    unsigned char *buffer; /* [workers][PIECE_BYTES + 8] */
    atomic_int error;      /* errno of the first failed write */
} file_job;

/* The tensor that holds byte `at` of the data. */
static int32_t tensor_at(const file_job *j, uint64_t at) {
    int32_t low = 0, high = j->n_tensor;
    while (high - low > 1) {
        int32_t mid = low + (high - low) / 2;
        if (j->tensor[mid].from <= at)
            low = mid;
        else
            high = mid;
    }
    return low;
}

static bool write_at(file_job *j, const unsigned char *data, size_t bytes, uint64_t at) {
    while (bytes) {
        ssize_t put = pwrite(j->fd, data, bytes, (off_t)at);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) {
            int none = 0;
            atomic_compare_exchange_strong(&j->error, &none, put < 0 ? errno : EIO);
            return false;
        }
        data += put;
        at += (uint64_t)put;
        bytes -= (size_t)put;
    }
    return true;
}

/* Fill and write the elements whose first byte lies in [from, to): they are contiguous, because tensors are. */
static bool piece_write(file_job *j, unsigned char *buffer, uint64_t from, uint64_t to) {
    size_t bytes = 0;
    uint64_t begin = 0;
    for (int32_t i = tensor_at(j, from); i < j->n_tensor && j->tensor[i].from < to; i++) {
        const synth_tensor *t = &j->tensor[i];
        uint64_t each = t->f32 ? sizeof(float) : sizeof(ern_bf16), n = synth_tensor_bytes(t) / each;
        uint64_t first = from > t->from ? (from - t->from + each - 1) / each : 0,
                 end = (to - t->from + each - 1) / each;
        if (end > n) end = n;
        if (first >= end) continue;
        if (bytes == 0) begin = t->from + first * each;
        synth_tensor_fill(t, first, end - first, buffer + bytes);
        bytes += (end - first) * each;
    }
    return write_at(j, buffer, bytes, j->data_from + begin);
}

static void region_work(void *ud, int worker, int n_worker) {
    file_job *j = ud;
    unsigned char *buffer = j->buffer + (size_t)worker * (PIECE_BYTES + 8);
    int64_t from, to;
    ern_pool_share(j->to - j->from, 4096, worker, n_worker, &from, &to);
    for (int64_t at = from; at < to && atomic_load(&j->error) == 0; at += PIECE_BYTES) {
        int64_t end = at + PIECE_BYTES < to ? at + PIECE_BYTES : to;
        if (!piece_write(j, buffer, (uint64_t)(j->from + at), (uint64_t)(j->from + end))) return;
    }
}

/* The 8 bytes of the length, then the header, padded with spaces to a multiple of 8. */
static void header_text(const synth_tensor *t, int32_t n, bool paddle, ern_buf *b) {
    ern_buf_add(b, "\0\0\0\0\0\0\0\0", 8);
    ern_buf_print(b, "{\"__metadata__\":{\"format\":\"%s\"}", paddle ? "np" : "pt");
    for (int32_t i = 0; i < n; i++, t++) {
        unsigned long long end = t->from + synth_tensor_bytes(t);
        ern_buf_print(b, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", t->name, t->f32 ? "F32" : "BF16");
        if (t->n_dim == 2) ern_buf_print(b, "%d,", t->turned ? t->n_in : t->n_out);
        ern_buf_print(b, "%d],\"data_offsets\":[%llu,%llu]}", t->turned ? t->n_out : t->n_in,
                      (unsigned long long)t->from, end);
    }
    ern_buf_text(b, "}");
    while (b->len % 8 != 0 && !b->full) ern_buf_text(b, " ");
    for (uint64_t k = 0, len = b->len - 8; k < 8 && !b->full; k++) b->data[k] = (char)(len >> (8 * k) & 0xff);
}

static ern_status data_write(file_job *j, ern_pool *pool, const char *path, synth_progress *g, ern_err *err) {
    const synth_tensor *last = &j->tensor[j->n_tensor - 1];
    int64_t all = (int64_t)(last->from + synth_tensor_bytes(last));
    for (j->from = 0; j->from < all; j->from = j->to) {
        j->to = all - j->from < REGION_BYTES ? all : j->from + REGION_BYTES;
        ern_pool_run(pool, region_work, j);
        if (atomic_load(&j->error))
            return ERN_FAIL(err, ERN_ERR_FILE, "cannot write %.300s: %s", path, strerror(atomic_load(&j->error)));
        g->done_bytes += (uint64_t)(j->to - j->from);
        if (g->fn && !g->fn(g->ud, "weights", g->done_bytes, g->all_bytes))
            return ERN_FAIL(err, ERN_ERR_CANCELLED, "making the checkpoint was stopped");
    }
    return ERN_OK;
}

static ern_status file_write(const synth_tensor *t, int32_t n, bool paddle, const char *path, ern_pool *pool,
                             unsigned char *buffer, synth_progress *g, ern_err *err) {
    ern_buf header;
    ern_buf_init(&header, HEADER_BYTES_MAX);
    header_text(t, n, paddle, &header);
    file_job j = {.tensor = t, .n_tensor = n, .data_from = header.len, .buffer = buffer};
    j.fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    ern_status s = ERN_OK;
    if (header.full)
        s = ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the header of %.300s", path);
    else if (j.fd < 0)
        s = ERN_FAIL(err, ERN_ERR_FILE, "cannot make %.300s: %s", path, strerror(errno));
    else if (!write_at(&j, (const unsigned char *)header.data, header.len, 0))
        s = ERN_FAIL(err, ERN_ERR_FILE, "cannot write %.300s: %s", path, strerror(atomic_load(&j.error)));
    else
        s = data_write(&j, pool, path, g, err);
    if (j.fd >= 0 && close(j.fd) != 0 && s == ERN_OK)
        s = ERN_FAIL(err, ERN_ERR_FILE, "cannot finish %.300s: %s", path, strerror(errno));
    ern_buf_free(&header);
    return s;
}

static ern_status index_write(const synth_set *s, const char *dir, ern_err *err) {
    uint64_t total = 0;
    making_entry *entry = malloc((size_t)s->n_tensor * sizeof *entry);
    if (!entry) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory to write the index in %.300s", dir);
    for (int32_t i = 0; i < s->n_tensor; i++) {
        total += synth_tensor_bytes(&s->tensor[i]);
        entry[i] = (making_entry){.name = s->tensor[i].name, .tail = "", .file = s->tensor[i].file};
    }
    ern_status status = making_index(dir, entry, (size_t)s->n_tensor, s->n_file, total, err);
    free(entry);
    return status;
}

ern_status synth_set_write(const synth_set *s, const char *dir, bool paddle, synth_progress *g, ern_err *err) {
    int n_worker = ern_cpu_count() < WORKERS_MAX ? ern_cpu_count() : WORKERS_MAX;
    ern_pool *pool;
    ERN_TRY(ern_pool_open(&pool, n_worker, false, err));
    unsigned char *buffer = malloc((size_t)n_worker * (PIECE_BYTES + 8));
    ern_status status = buffer ? ERN_OK : ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for %d write buffers", n_worker);
    for (int32_t file = 0, from = 0, to = 0; file < s->n_file && status == ERN_OK; file++, from = to) {
        char name[MAKING_FILE_NAME_BYTES], path[2048];
        while (to < s->n_tensor && s->tensor[to].file == file) to++;
        making_file_name(name, file, s->n_file);
        status = ern_path_join(path, sizeof path, dir, name, err);
        if (status == ERN_OK) status = file_write(&s->tensor[from], to - from, paddle, path, pool, buffer, g, err);
    }
    free(buffer);
    ern_pool_close(pool);
    if (status == ERN_OK && s->n_file > 1) status = index_write(s, dir, err);
    return status;
}
