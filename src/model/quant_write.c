/* Writing a quantized checkpoint by several threads, in bounded memory. See quant_write.h.
 *
 *   a group of items: read in -> workers take chunks of 128 outputs: rows -> tiles and scales -> pwrite -> let go */
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/pool.h"
#include "model/config.h"
#include "model/quant.h"
#include "model/quant_list.h"
#include "model/quant_plan.h"
#include "model/synth.h"

enum { GROUP_BYTES = 64 << 20, CHUNK_OUT = ERN_F8_BLOCK, WORKERS_MAX = 64, HEADER_BYTES_MAX = 64 << 20 };
enum { CONFIG_BYTES_MAX = 1 << 20 };

typedef struct write_work {
    const quant_source *source;
    const quant_item *item; /* of this group */
    int32_t n_item;
    int fd;
    uint64_t data_from;
    unsigned char *buffer; /* [workers][buffer_bytes] */
    size_t buffer_bytes, row_bytes;
    atomic_int next;   /* the first chunk that nobody has */
    atomic_int broken; /* 1 + an item that is not finite */
    atomic_int error;  /* errno of the first failed write */
} write_work;

static int32_t chunks(const quant_item *t) { return (t->w.n_out + CHUNK_OUT - 1) / CHUNK_OUT; }
static size_t each_bytes(const quant_item *t) { return t->f32 ? sizeof(float) : sizeof(ern_bf16); }
static uint64_t source_bytes(const quant_item *t) { return (uint64_t)t->w.n_out * (uint64_t)t->w.n_in * each_bytes(t); }

/* ---- one chunk --------------------------------------------------------------------------------------------------- */

static bool write_at(write_work *k, const unsigned char *data, size_t bytes, uint64_t at) {
    while (bytes) {
        ssize_t put = pwrite(k->fd, data, bytes, (off_t)at);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) {
            int none = 0;
            atomic_compare_exchange_strong(&k->error, &none, put < 0 ? errno : EIO);
            return false;
        }
        data += put;
        at += (uint64_t)put;
        bytes -= (size_t)put;
    }
    return true;
}

/* Outputs from..to-1 as a linear of their own: a window of the source, or made in `rows`. */
static ern_linear chunk_of(const write_work *k, const quant_item *t, int32_t from, int32_t to, void *rows) {
    ern_linear w = t->w;
    w.n_out = to - from;
    if (w.data) {
        const int64_t skip = w.order == ERN_ORDER_OUT_IN ? from * w.stride : from;
        w.data = (const unsigned char *)w.data + skip * (int64_t)each_bytes(t);
        return w;
    }
    const uint64_t first = (uint64_t)from * (uint64_t)w.n_in, n = (uint64_t)w.n_out * (uint64_t)w.n_in;
    synth_rows_fill(k->source->seed, t->made, w.n_in, t->f32, first, n, rows);
    w.data = rows;
    w.order = ERN_ORDER_OUT_IN;
    w.stride = w.n_in;
    return w;
}

/* Rows in PyTorch's order: where they lie, or gathered into `rows`. */
static const unsigned char *rows_of(const ern_linear *w, unsigned char *rows) {
    if (w->order == ERN_ORDER_OUT_IN && w->stride == w->n_in) return w->data;
    ERN_ASSERT(w->dtype == ERN_DTYPE_BF16);
    const ern_bf16 *data = w->data;
    ern_bf16 *to = (ern_bf16 *)(void *)rows;
    const int64_t by_out = w->order == ERN_ORDER_OUT_IN ? w->stride : 1,
                  by_in = w->order == ERN_ORDER_OUT_IN ? 1 : w->stride;
    for (int32_t i = 0; i < w->n_in; i++)
        for (int32_t o = 0; o < w->n_out; o++) to[(int64_t)o * w->n_in + i] = data[o * by_out + i * by_in];
    return rows;
}

static bool chunk_write(write_work *k, int32_t i, int32_t from, unsigned char *buffer) {
    const quant_item *t = &k->item[i];
    const int32_t to = t->w.n_out - from < CHUNK_OUT ? t->w.n_out : from + CHUNK_OUT;
    const ern_linear w = chunk_of(k, t, from, to, buffer);
    if (t->as == ERN_QUANT_NONE) {
        const size_t row = (size_t)w.n_in * each_bytes(t);
        return write_at(k, rows_of(&w, buffer), (size_t)w.n_out * row, k->data_from + t->from + (uint64_t)from * row);
    }
    const ern_dtype as = ern_quant_dtype(t->as);
    const size_t tile_bytes = (size_t)quant_tile_bytes(as, w.n_out, w.n_in);
    const size_t scale_bytes = (size_t)quant_scale_bytes(as, w.n_out, w.n_in);
    unsigned char *tile = buffer + k->row_bytes, *scale = tile + tile_bytes;
    if (!quant_weights(tile, scale, as, &w, 0, w.n_out)) {
        int none = 0;
        atomic_compare_exchange_strong(&k->broken, &none, i + 1);
        return false;
    }
    return write_at(k, tile, tile_bytes, k->data_from + t->from + quant_tile_bytes(as, from, w.n_in)) &&
           write_at(k, scale, scale_bytes, k->data_from + t->scale_from + quant_scale_bytes(as, from, w.n_in));
}

static void write_run(void *ud, int worker, int n_worker) {
    write_work *k = ud;
    unsigned char *buffer = k->buffer + (size_t)worker * k->buffer_bytes;
    (void)n_worker;
    int32_t i = 0, before = 0; /* chunks before item i */
    for (int32_t mine = atomic_fetch_add(&k->next, 1); i < k->n_item; mine = atomic_fetch_add(&k->next, 1)) {
        while (i < k->n_item && mine - before >= chunks(&k->item[i])) before += chunks(&k->item[i++]);
        if (i < k->n_item && !chunk_write(k, i, (mine - before) * CHUNK_OUT, buffer)) return;
    }
}

/* ---- groups -------------------------------------------------------------------------------------------------------
 */

typedef struct writer {
    const quant_source *source;
    const quant_writing *w;
    quant_list list;
    ern_pool *pool;
    write_work work;
    void *scratch; /* st_file_touch */
    uint64_t done_bytes, all_bytes;
} writer;

/* The mapped file that holds an item's source, and the range of it. NULL: it is not mapped. */
static const st_file *file_of(const quant_source *source, const ern_linear *w, uint64_t *from, uint64_t *bytes) {
    if (!source->model || !w->data) return NULL;
    const bool plain = w->order == ERN_ORDER_OUT_IN;
    const uint64_t each = w->dtype == ERN_DTYPE_F32 ? sizeof(float) : sizeof(ern_bf16);
    *bytes =
        ((uint64_t)((plain ? w->n_out : w->n_in) - 1) * (uint64_t)w->stride + (uint64_t)(plain ? w->n_in : w->n_out)) *
        each;
    const checkpoint *set[] = {&source->model->files->main, &source->model->files->mtp};
    for (int k = 0; k < 2; k++) {
        for (int32_t i = 0; i < set[k]->n_file; i++) {
            const uintptr_t map = (uintptr_t)set[k]->file[i].map.data, at = (uintptr_t)w->data;
            *from = at - map;
            if (at >= map && at - map < set[k]->file[i].map.size_bytes) return &set[k]->file[i];
        }
    }
    return NULL;
}

static ern_status group_write(writer *r, int32_t first, int32_t end, const char *path, ern_err *err) {
    write_work *k = &r->work;
    uint64_t from, bytes;
    for (int32_t i = first; i < end; i++) {
        const st_file *f = file_of(r->source, &r->list.item[i].w, &from, &bytes);
        if (f) ERN_TRY(st_file_touch(f, from, bytes, &r->scratch, NULL, NULL, err));
    }
    k->item = &r->list.item[first];
    k->n_item = end - first;
    atomic_store(&k->next, 0);
    ern_pool_run(r->pool, write_run, k);
    if (atomic_load(&k->error))
        return ERN_FAIL(err, ERN_ERR_FILE, "cannot write %.300s: %s", path, strerror(atomic_load(&k->error)));
    if (atomic_load(&k->broken))
        return ERN_FAIL(err, ERN_ERR_FILE, "tensor %s: expected finite weights to quantize, found NaN or infinity",
                        k->item[atomic_load(&k->broken) - 1].name);
    for (int32_t i = first; i < end; i++) {
        const st_file *f = file_of(r->source, &r->list.item[i].w, &from, &bytes);
        if (f) st_file_release(f, from, bytes);
        r->done_bytes += source_bytes(&r->list.item[i]);
    }
    if (r->w->progress && !r->w->progress(r->w->ud, "quantizing", r->done_bytes, r->all_bytes))
        return ERN_FAIL(err, ERN_ERR_CANCELLED, "quantizing was stopped");
    return ERN_OK;
}

/* Items first..end-1, which are the file's. */
static ern_status file_write(writer *r, int32_t first, int32_t end, const char *path, ern_err *err) {
    ern_buf header;
    ern_buf_init(&header, HEADER_BYTES_MAX);
    quant_list_header(&r->list, r->list.item[first].file, &header);
    r->work.data_from = header.len;
    r->work.fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    ern_status s = ERN_OK;
    if (header.full)
        s = ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the header of %.300s", path);
    else if (r->work.fd < 0)
        s = ERN_FAIL(err, ERN_ERR_FILE, "cannot make %.300s: %s", path, strerror(errno));
    else if (!write_at(&r->work, (const unsigned char *)header.data, header.len, 0))
        s = ERN_FAIL(err, ERN_ERR_FILE, "cannot write %.300s: %s", path, strerror(atomic_load(&r->work.error)));
    while (first < end && s == ERN_OK) {
        int32_t to = first;
        for (uint64_t bytes = 0; to < end && bytes < GROUP_BYTES; to++) bytes += source_bytes(&r->list.item[to]);
        s = group_write(r, first, to, path, err);
        first = to;
    }
    if (r->work.fd >= 0 && close(r->work.fd) != 0 && s == ERN_OK)
        s = ERN_FAIL(err, ERN_ERR_FILE, "cannot finish %.300s: %s", path, strerror(errno));
    ern_buf_free(&header);
    return s;
}

/* ---- the whole ----------------------------------------------------------------------------------------------------
 */

static ern_status index_write(const quant_list *l, const char *dir, ern_err *err) {
    uint64_t total = 0;
    size_t n = 0;
    making_entry *entry = malloc(2 * (size_t)l->n * sizeof *entry);
    if (!entry) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory to write the index in %.300s", dir);
    for (int32_t i = 0; i < l->n; i++) {
        const quant_item *t = &l->item[i];
        total += quant_item_bytes(t) + quant_item_scale_bytes(t);
        entry[n++] = (making_entry){.name = t->name, .tail = "", .file = t->file};
        if (t->as != ERN_QUANT_NONE)
            entry[n++] = (making_entry){.name = t->name, .tail = quant_item_tail(t), .file = t->file};
    }
    ern_status s = making_index(dir, entry, n, l->n_file, total, err);
    free(entry);
    return s;
}

/* The config with our key, read once as the loader will. */
static ern_status config_write(const quant_writing *w, const char *dir, const ern_buf *config, ern_err *err) {
    ern_config c;
    config_hints hints;
    ern_buf b;
    ern_buf_init(&b, CONFIG_BYTES_MAX);
    ern_status s = ERN_OK;
    if (!quant_config_add(&b, config->data, config->len, w->plan, w->kv_codes) || b.full)
        s = ERN_FAIL(err, ERN_ERR_FILE, "config.json: expected one JSON object of at most %d bytes", CONFIG_BYTES_MAX);
    if (s == ERN_OK) s = config_parse(&c, &hints, b.data, b.len, "the config.json to write", err);
    if (s == ERN_OK) s = making_text(dir, "config.json", &b, err);
    ern_buf_free(&b);
    return s;
}

static ern_status buffers_take(writer *r, int n_worker, ern_err *err) {
    size_t widest = 1;
    for (int32_t i = 0; i < r->list.n; i++) {
        const quant_item *t = &r->list.item[i];
        const size_t row = (size_t)t->w.n_in * each_bytes(t);
        if (row > widest) widest = row;
        r->all_bytes += source_bytes(t);
    }
    /* rows, then tiles (at most as many bytes an element, rounded up to whole tiles), then scales */
    const size_t rows = (widest * CHUNK_OUT + 63) / 64 * 64;
    r->work.row_bytes = rows;
    r->work.buffer_bytes =
        2 * rows + (size_t)CHUNK_OUT * ERN_TILE_IN + (size_t)CHUNK_OUT * sizeof(ern_bf16) + widest + 64;
    r->work.buffer_bytes = (r->work.buffer_bytes + 63) / 64 * 64;
    r->work.buffer = aligned_alloc(64, (size_t)n_worker * r->work.buffer_bytes);
    if (r->work.buffer) return ERN_OK;
    return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for %d write buffers", n_worker);
}

static ern_status write_all(writer *r, const making *at, ern_err *err) {
    char name[MAKING_FILE_NAME_BYTES], path[2048];
    uint64_t need = 64 << 20;
    for (int32_t i = 0; i < r->list.n; i++)
        need += quant_item_bytes(&r->list.item[i]) + quant_item_scale_bytes(&r->list.item[i]);
    ERN_TRY(making_space(at, need, err));
    for (int32_t first = 0, end = 0; first < r->list.n; first = end) {
        const int32_t file = r->list.item[first].file;
        while (end < r->list.n && r->list.item[end].file == file) end++;
        making_file_name(name, file, r->list.n_file);
        ERN_TRY(ern_path_join(path, sizeof path, at->stage, name, err));
        ERN_TRY(file_write(r, first, end, path, err));
    }
    return r->list.n_file > 1 ? index_write(&r->list, at->stage, err) : ERN_OK;
}

ern_status quant_write(const quant_source *from, const quant_writing *w, const making *at, const ern_buf *config,
                       ern_err *err) {
    const int n_worker = ern_cpu_count() < WORKERS_MAX ? ern_cpu_count() : WORKERS_MAX;
    writer r = {.source = from, .w = w, .work = {.source = from}};
    ERN_TRY(config_write(w, at->stage, config, err));
    ern_status s = quant_list_make(&r.list, from, w, err);
    if (s == ERN_OK) s = buffers_take(&r, n_worker, err);
    if (s == ERN_OK) s = ern_pool_open(&r.pool, n_worker, false, err);
    if (s == ERN_OK) s = write_all(&r, at, err);
    ern_pool_close(r.pool);
    free(r.scratch);
    free(r.work.buffer);
    quant_list_free(&r.list);
    return s;
}
