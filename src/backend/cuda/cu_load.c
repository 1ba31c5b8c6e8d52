/* Weights from the mapped files to the device, packed there. See cu_state.h.
 *
 *   mapped file --threads--> pinned buffer --copy engine--> raw --cu_pack or a copy--> the weight's place
 *
 * What is stored is one long stream of windows (rows of bytes at a pitch, made dense on the way). It is cut into pinned
 * buffers without regard to windows; raw is filled from its start until the next linear does not fit as a whole, then
 * from its start again. Everything after the threads is queued on one stream, so raw needs no other lock, and a buffer
 * waits for its own last copy alone. The same walk over the model, run over no memory, gives places and sizes.
 * q, k and v become one linear, gate and up one of alternating bands; an embedding that is the head too is read once.
 */
#include "backend/cuda/cu_state.h"

#include <stdlib.h>
#include <string.h>

#include "base/os.h"
#include "base/pool.h"
#include "model/quant.h"

enum {
    BUFFERS = 4,
    BUFFER_BYTES = 64 << 20,
    BUFFER_STEP = 1 << 20,
    THREADS = 8, /* one copies about 10 GB/s, the bus takes five times that */
    PIECES = 512,
    AFTERS = 512,
    ALIGN = 256,
};

/* Rows of bytes at a pitch. */
typedef struct window {
    const unsigned char *from;
    size_t row_bytes, pitch, bytes; /* of all rows, dense */
} window;

/* Bytes at..at+bytes-1 of a window, and where in the buffer they go. */
typedef struct piece {
    window w;
    size_t at, bytes, to;
} piece;

/* What follows once a window is in raw: packing, or a copy to its place. */
typedef struct after {
    cu_linear dst; /* pack NULL: a copy of `bytes` to `to` */
    ern_linear src;
    const unsigned char *raw, *raw_scale;
    int32_t first_band, band_step;
    void *to;
    size_t bytes;
} after;

typedef struct loader {
    cu_backend *b;
    cu_cut place;
    bool fill; /* else only lay and count */
    size_t raw_most;
    uint64_t all_bytes, done_bytes;
    /* filling */
    ern_pool *pool;
    cudaStream_t stream;
    unsigned char *pinned;
    size_t buffer_bytes, raw_bytes;
    cudaEvent_t sent[BUFFERS];
    unsigned n_sent; /* buffers sent */
    unsigned char *raw;
    size_t raw_at, flush_at; /* of raw: the next free byte; where the buffer being filled begins */
    piece *piece;            /* [PIECES] of this buffer */
    after *after;            /* [AFTERS] of windows that end in this buffer */
    int32_t n_piece, n_after;
    cudaError_t error;
    const char *error_where;
    bool stopped;
} loader;

#define LOAD(l, call)                                                                                    \
    do {                                                                                                 \
        if ((l)->error == cudaSuccess && ((l)->error = (call)) != cudaSuccess) (l)->error_where = #call; \
    } while (0)

static size_t align_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

/* ---- the stream of bytes ----------------------------------------------------------------------------------------- */

static void window_copy(unsigned char *to, const window *w, size_t at, size_t bytes) {
    if (w->row_bytes == w->pitch) {
        memcpy(to, w->from + at, bytes);
        return;
    }
    while (bytes > 0) {
        const size_t row = at / w->row_bytes, in_row = at % w->row_bytes, rest = w->row_bytes - in_row;
        const size_t n = rest < bytes ? rest : bytes;
        memcpy(to, w->from + row * w->pitch + in_row, n);
        to += n, at += n, bytes -= n;
    }
}

typedef struct fill_job {
    const loader *l;
    unsigned char *to;
} fill_job;

/* A worker's share of the buffer, whatever pieces that meets. */
static void fill_share(void *ud, int worker, int n_worker) {
    const fill_job *j = ud;
    const loader *l = j->l;
    int64_t from, to;
    ern_pool_share((int64_t)(l->raw_at - l->flush_at), 4096, worker, n_worker, &from, &to);
    for (int32_t i = 0; i < l->n_piece; i++) {
        const piece *p = &l->piece[i];
        const size_t a = p->to > (size_t)from ? p->to : (size_t)from;
        const size_t end = p->to + p->bytes, z = end < (size_t)to ? end : (size_t)to;
        if (a < z) window_copy(j->to + a, &p->w, p->at + (a - p->to), z - a);
    }
}

static void after_run(loader *l, const after *a) {
    if (a->dst.pack)
        LOAD(l, cu_pack(l->stream, &a->dst, &a->src, a->raw, a->raw_scale, a->first_band, a->band_step));
    else
        LOAD(l, cudaMemcpyAsync(a->to, a->raw, a->bytes, cudaMemcpyDeviceToDevice, l->stream));
}

/* Send the buffer, then do what its windows waited for. */
static void flush(loader *l) {
    const size_t bytes = l->raw_at - l->flush_at;
    const unsigned k = l->n_sent % BUFFERS;
    unsigned char *buffer = l->pinned + k * l->buffer_bytes;
    if (bytes > 0 && l->error == cudaSuccess && !l->stopped) {
        LOAD(l, cudaEventSynchronize(l->sent[k])); /* good at once where it was never recorded */
        fill_job job = {l, buffer};
        ern_pool_run(l->pool, fill_share, &job);
        LOAD(l, cudaMemcpyAsync(l->raw + l->flush_at, buffer, bytes, cudaMemcpyHostToDevice, l->stream));
        LOAD(l, cudaEventRecord(l->sent[k], l->stream));
        l->n_sent++;
        l->done_bytes += align_up(bytes, ALIGN);
        ern_progress_fn *progress = l->b->o.progress;
        const uint64_t done = l->done_bytes < l->all_bytes ? l->done_bytes : l->all_bytes;
        if (progress && !progress(l->b->o.ud, "weights to the GPU", done, l->all_bytes)) l->stopped = true;
    }
    for (int32_t i = 0; i < l->n_after && !l->stopped; i++) after_run(l, &l->after[i]);
    l->n_piece = l->n_after = 0;
    l->raw_at = align_up(l->raw_at, ALIGN);
    l->flush_at = l->raw_at;
}

/* So many bytes will follow that must lie in raw together. */
static void reserve(loader *l, size_t bytes) {
    if (bytes > l->raw_most) l->raw_most = bytes;
    l->raw_at = align_up(l->raw_at, ALIGN);
    if (!l->fill || l->raw_at + bytes <= l->raw_bytes) return;
    flush(l);
    l->raw_at = l->flush_at = 0;
    ERN_ASSERT(bytes <= l->raw_bytes);
}

/* Append a window; returns where in raw it will lie. */
static const unsigned char *put(loader *l, window w) {
    if (!l->fill) {
        l->all_bytes += align_up(w.bytes, ALIGN);
        return NULL;
    }
    l->raw_at = align_up(l->raw_at, ALIGN);
    const unsigned char *at = l->raw + l->raw_at;
    for (size_t done = 0; done < w.bytes;) {
        const size_t to = l->raw_at - l->flush_at, room = l->buffer_bytes - to;
        if (room == 0 || l->n_piece == PIECES) {
            flush(l);
            continue;
        }
        const size_t n = w.bytes - done < room ? w.bytes - done : room;
        l->piece[l->n_piece++] = (piece){w, done, n, to};
        l->raw_at += n;
        done += n;
    }
    return at;
}

static void put_after(loader *l, const after *a) {
    l->after[l->n_after++] = *a;
    if (l->n_after == AFTERS) flush(l);
}

/* ---- weights ----------------------------------------------------------------------------------------------------- */

static window dense(const void *from, size_t bytes) { return (window){from, bytes, bytes, bytes}; }

/* A copy of an array as it is. */
static const void *place_array(loader *l, const void *from, size_t bytes) {
    if (!from) return NULL;
    void *to = cu_cut_take(&l->place, bytes, 1);
    reserve(l, align_up(bytes, ALIGN));
    const after a = {.raw = put(l, dense(from, bytes)), .to = to, .bytes = bytes};
    if (l->fill) put_after(l, &a);
    return to;
}

/* A linear of n_band bands like w, with its place. */
static cu_linear take_linear(loader *l, const ern_linear *w, int32_t n_out, int32_t n_band, bool pairs) {
    cu_linear d = {.format = cu_format_of(l->b, w),
                   .n_out = n_out,
                   .n_in = w->n_in,
                   .n_band = n_band,
                   .n_seg = CU_PAD(w->n_in) / CU_SEGMENT,
                   .pairs = pairs};
    d.pack = cu_cut_take(&l->place, (size_t)cu_pack_bytes(&d), 1);
    const size_t n_scale = (size_t)cu_scale_count(&d);
    if (n_scale > 0) d.scale = cu_cut_take(&l->place, n_scale, sizeof(float));
    return d;
}

/* Rows of bf16 as they are stored, made dense. */
static window rows_of(const ern_linear *w, int64_t *dense_stride) {
    const bool out_in = w->order == ERN_ORDER_OUT_IN;
    const size_t n = (size_t)(out_in ? w->n_in : w->n_out), n_row = (size_t)(out_in ? w->n_out : w->n_in);
    *dense_stride = (int64_t)n;
    return (window){.from = w->data,
                    .row_bytes = n * sizeof(ern_bf16),
                    .pitch = (size_t)w->stride * sizeof(ern_bf16),
                    .bytes = n_row * n * sizeof(ern_bf16)};
}

/* Pack w into bands first, first + step, ... of d. */
static void pack_into(loader *l, const cu_linear *d, const ern_linear *w, int32_t first, int32_t step) {
    after a = {.dst = *d, .src = *w, .first_band = first, .band_step = step};
    a.src.data = a.src.scale = NULL;
    window codes, scales = {0};
    if (w->order == ERN_ORDER_TILED) {
        codes = dense(w->data, (size_t)quant_tile_bytes(w->dtype, w->n_out, w->n_in));
        scales = dense(w->scale, (size_t)quant_scale_bytes(w->dtype, w->n_out, w->n_in));
    } else {
        codes = rows_of(w, &a.src.stride);
    }
    reserve(l, align_up(codes.bytes, ALIGN) + align_up(scales.bytes, ALIGN));
    a.raw = put(l, codes);
    if (scales.bytes > 0) a.raw_scale = put(l, scales);
    if (l->fill) put_after(l, &a);
}

static cu_linear place_linear(loader *l, const ern_linear *w) {
    const cu_linear d = take_linear(l, w, w->n_out, CU_BANDS(w->n_out), false);
    pack_into(l, &d, w, 0, 1);
    return d;
}

/* q, k, v: whole bands each, since a head has 16, 64 or 128 outputs. */
static cu_linear place_qkv(loader *l, const ern_layer *w) {
    const ern_linear *part[] = {&w->q, &w->k, &w->v};
    const int32_t n_out = w->q.n_out + w->k.n_out + w->v.n_out;
    const cu_linear d = take_linear(l, &w->q, n_out, CU_BANDS(n_out), false);
    for (int32_t i = 0, band = 0; i < 3; i++) {
        ERN_ASSERT(part[i]->n_out % CU_BAND == 0);
        pack_into(l, &d, part[i], band, 1);
        band += part[i]->n_out / CU_BAND;
    }
    return d;
}

static cu_ffn place_ffn(loader *l, const ern_ffn *w) {
    cu_ffn f;
    f.up = take_linear(l, &w->gate, w->gate.n_out, 2 * CU_BANDS(w->gate.n_out), true);
    pack_into(l, &f.up, &w->gate, 0, 2);
    pack_into(l, &f.up, &w->up, 1, 2);
    f.down = place_linear(l, &w->down);
    return f;
}

/* host: room for 2 E linears, the tables that the device gets a copy of. */
static void place_experts(loader *l, cu_layer *d, const ern_layer *w, cu_linear *host) {
    const ern_config *m = &l->b->model->config;
    const size_t E = (size_t)m->n_expert, D = (size_t)m->n_hidden;
    d->router = place_array(l, w->router, E * D * sizeof *w->router);
    d->router_bias = place_array(l, w->router_bias, E * sizeof *w->router_bias);
    for (size_t e = 0; e < E; e++) {
        const cu_ffn f = place_ffn(l, &w->expert[e]);
        host[e] = f.up;
        host[E + e] = f.down;
        d->shape = f;
    }
    d->expert_up = place_array(l, host, E * sizeof *host);
    d->expert_down = place_array(l, host + E, E * sizeof *host);
}

static void place_layer(loader *l, cu_layer *d, const ern_layer *w, cu_linear *host) {
    const size_t norm_bytes = (size_t)l->b->model->config.n_hidden * sizeof(ern_bf16);
    *d = (cu_layer){.is_moe = w->is_moe, .has_shared = w->is_moe && w->shared.gate.data};
    d->attn_norm = place_array(l, w->attn_norm, norm_bytes);
    d->ffn_norm = place_array(l, w->ffn_norm, norm_bytes);
    d->qkv = place_qkv(l, w);
    d->o = place_linear(l, &w->o);
    if (w->is_moe) place_experts(l, d, w, host);
    if (!w->is_moe || d->has_shared) d->ffn = place_ffn(l, w->is_moe ? &w->shared : &w->ffn);
}

/* A head that is a window into the embedding is packed from the copy of that on the device. */
static void place_head(loader *l) {
    cu_weights *k = &l->b->weights;
    const ern_model *m = l->b->model;
    const ern_linear *w = &m->head;
    const uintptr_t at = (uintptr_t)w->data, embed = (uintptr_t)m->embed;
    const size_t embed_bytes = (size_t)m->config.n_vocab * (size_t)m->config.n_hidden * sizeof(ern_bf16);
    k->embed = place_array(l, m->embed, embed_bytes);
    if (w->dtype != ERN_DTYPE_BF16 || at < embed || at >= embed + embed_bytes) {
        k->head = place_linear(l, w);
        return;
    }
    k->head = take_linear(l, w, w->n_out, CU_BANDS(w->n_out), false);
    if (!l->fill) return;
    const after a = {.dst = k->head,
                     .src = *w,
                     .raw = (const unsigned char *)k->embed + (at - embed),
                     .first_band = 0,
                     .band_step = 1};
    put_after(l, &a); /* the embedding's own copy stands before it */
}

static void place_all(loader *l) {
    cu_weights *k = &l->b->weights;
    const ern_model *m = l->b->model;
    const size_t norm_bytes = (size_t)m->config.n_hidden * sizeof(ern_bf16);
    place_head(l);
    k->norm = place_array(l, m->norm, norm_bytes);
    for (int32_t i = 0; i < m->config.n_layer; i++)
        place_layer(l, &k->layer[i], &m->layer[i], k->expert_host + (int64_t)i * 2 * m->config.n_expert);
    if (!l->b->o.mtp) return;
    k->emb_norm = place_array(l, m->mtp.emb_norm, norm_bytes);
    k->hidden_norm = place_array(l, m->mtp.hidden_norm, norm_bytes);
    k->proj = place_linear(l, &m->mtp.proj);
    ERN_ASSERT(!m->mtp.layer.is_moe); /* there is no table for its experts */
    place_layer(l, &k->mtp, &m->mtp.layer, k->expert_host);
}

/* ---- the three verbs --------------------------------------------------------------------------------------------- */

ern_status cu_weights_open(cu_backend *b, ern_err *err) {
    const size_t L = (size_t)b->model->config.n_layer, E = (size_t)b->model->config.n_expert;
    b->weights.layer = calloc(L, sizeof *b->weights.layer);
    b->weights.expert_host = calloc(L * 2 * E + 1, sizeof *b->weights.expert_host);
    if (!b->weights.layer || !b->weights.expert_host)
        return ERN_FAIL(err, ERN_ERR_MEMORY, "out of memory for the cuda backend's table of %zu layers", L);
    return ERN_OK;
}

void cu_weights_close(cu_backend *b) {
    free(b->weights.layer);
    free(b->weights.expert_host);
    memset(&b->weights, 0, sizeof b->weights);
}

size_t cu_weights_count(cu_backend *b, size_t *raw_bytes, uint64_t *all_bytes) {
    loader l = {.b = b};
    place_all(&l);
    *raw_bytes = l.raw_most;
    *all_bytes = l.all_bytes;
    return l.place.used;
}

static ern_status loader_open(loader *l, ern_err *err) {
    const int n_cpu = ern_cpu_count();
    l->piece = malloc(PIECES * sizeof *l->piece);
    l->after = malloc(AFTERS * sizeof *l->after);
    if (!l->piece || !l->after) return ERN_FAIL(err, ERN_ERR_MEMORY, "out of memory loading weights to the GPU");
    ERN_TRY(ern_pool_open(&l->pool, n_cpu < THREADS ? n_cpu : THREADS, false, err));
    const size_t share = align_up((size_t)(l->all_bytes / BUFFERS) + 1, BUFFER_STEP);
    l->buffer_bytes = share < BUFFER_BYTES ? share : BUFFER_BYTES;
    CU_TRY(cudaHostAlloc((void **)&l->pinned, BUFFERS * l->buffer_bytes, cudaHostAllocDefault), err);
    CU_TRY(cudaStreamCreateWithFlags(&l->stream, cudaStreamNonBlocking), err);
    for (int i = 0; i < BUFFERS; i++) CU_TRY(cudaEventCreateWithFlags(&l->sent[i], cudaEventDisableTiming), err);
    return ERN_OK;
}

static void loader_close(loader *l) {
    if (l->stream) (void)cudaStreamSynchronize(l->stream); /* nothing may still read the buffers */
    for (int i = 0; i < BUFFERS; i++)
        if (l->sent[i]) (void)cudaEventDestroy(l->sent[i]);
    if (l->stream) (void)cudaStreamDestroy(l->stream);
    if (l->pinned) (void)cudaFreeHost(l->pinned);
    ern_pool_close(l->pool);
    free(l->piece);
    free(l->after);
}

ern_status cu_weights_fill(cu_backend *b, unsigned char *raw, size_t raw_bytes, uint64_t all_bytes, ern_err *err) {
    loader l = {.b = b,
                .place = {b->weight_block, 0},
                .fill = true,
                .all_bytes = all_bytes,
                .raw = raw,
                .raw_bytes = raw_bytes};
    ern_status status = loader_open(&l, err);
    if (status == ERN_OK) {
        place_all(&l);
        flush(&l);
        LOAD(&l, cudaStreamSynchronize(l.stream));
        if (l.error != cudaSuccess)
            status = cu_fail(l.error, l.error_where, err);
        else if (l.stopped)
            status = ERN_FAIL(err, ERN_ERR_CANCELLED, "loading weights to the GPU was stopped");
        ERN_ASSERT(status != ERN_OK || l.place.used == b->weight_bytes);
    }
    loader_close(&l);
    return status;
}
