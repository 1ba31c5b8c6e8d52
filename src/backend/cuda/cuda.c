/* The verbs of the door: the device and its memory, steps in and results out, KV pages. See cuda.h.
 *
 * Everything that a step needs is queued by submit, its kernels on one stream, and wait waits for the event behind
 * them; kv_copy goes on the same stream. kv_read and kv_write have a stream and a pinned buffer for each of two
 * threads, and wait. The device is the first that this process sees: CUDA_VISIBLE_DEVICES says which that is. */
#include "backend/cuda/cuda.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/cu_state.h"
#include "base/os.h"

enum { DEVICE = 0 };

static cu_backend *of(ern_backend *base) { return (cu_backend *)(void *)base; }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- the device -------------------------------------------------------------------------------------------------- */

static int version_text(char *out, size_t size, int version) {
    return snprintf(out, size, "%d.%d", version / 1000, version % 1000 / 10);
}

const char *cuda_missing(void) {
    static char text[256];
    int n = 0, driver = 0, runtime = 0, major = 0, minor = 0;
    const cudaError_t e = cudaGetDeviceCount(&n);
    (void)cudaGetLastError(); /* what is told here is not to come up again in a step */
    if (e == cudaErrorInsufficientDriver) {
        char have[16], need[16];
        (void)cudaDriverGetVersion(&driver);
        (void)cudaRuntimeGetVersion(&runtime);
        if (driver == 0) return "no NVIDIA driver is installed on this machine";
        (void)version_text(have, sizeof have, driver);
        (void)version_text(need, sizeof need, runtime);
        snprintf(text, sizeof text, "the NVIDIA driver is made for CUDA %s and this build needs %s; update the driver",
                 have, need);
        return text;
    }
    if (e == cudaErrorNoDevice || (e == cudaSuccess && n == 0))
        return "this process sees no NVIDIA GPU; look at nvidia-smi and at CUDA_VISIBLE_DEVICES";
    if (e != cudaSuccess) {
        snprintf(text, sizeof text, "asking for GPUs failed: %s (%s)", cudaGetErrorName(e), cudaGetErrorString(e));
        return text;
    }
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, DEVICE) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, DEVICE) != cudaSuccess)
        return "the GPU does not tell its compute capability";
    if (CU_PORTABLE ? major >= 8 : major == 9 && minor == 0) return NULL;
    snprintf(text, sizeof text,
             "the GPU has compute capability %d.%d and the cuda backend needs 8.0 (A100) or a later one", major, minor);
    return text;
}

static ern_status device_ready(ern_err *err) {
    const char *why = cuda_missing();
    if (why) return ERN_FAIL(err, ERN_ERR_DEVICE, "the cuda backend cannot run: %s", why);
    CU_TRY(cudaSetDevice(DEVICE), err);
    return ERN_OK;
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

/* All sizes, in *b; no memory of the device. */
static ern_status count_all(cu_backend *b, const ern_model *m, const ern_backend_options *o, size_t *raw_bytes,
                            uint64_t *all_bytes, ern_err *err) {
    ERN_TRY(cu_state_init(b, m, o, err));
    ERN_TRY(cu_weights_open(b, err));
    b->weight_bytes = cu_weights_count(b, raw_bytes, all_bytes);
    cu_layout(b);
    return ERN_OK;
}

/* What CUDA itself takes of the device once kernels have run and graphs are made, beside our blocks and what it holds
 * already when it is first asked: code and stacks of kernels, and each graph's nodes. Upper bounds of what was seen (10
 * MiB; 370 KiB a graph of 18 dense layers, 270 KiB of one dense and three with experts); gpu_model holds them against
 * what is taken. */
static size_t driver_bytes(const cu_backend *b) {
    enum { CODE = 48 << 20, GRAPH = 256 << 10, NODE = 3 << 10, DENSE_NODES = 6, MOE_NODES = 12, OTHER_NODES = 16 };
    size_t nodes = OTHER_NODES;
    for (int32_t i = 0; i < b->model->config.n_layer; i++) nodes += b->model->layer[i].is_moe ? MOE_NODES : DENSE_NODES;
    return CODE + (size_t)cu_graph_sizes(b) * 2 * CU_SLOTS * (GRAPH + NODE * nodes);
}

/* Who computes, and on what: KV that another sort of chip has written is not the same. */
static ern_status kernels_here(const char **out, ern_err *err) {
    static char text[40];
    int device, major, minor;
    *out = "cuda sm_90";
    if (!CU_PORTABLE) return ERN_OK;
    CU_TRY(cudaGetDevice(&device), err);
    CU_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), err);
    CU_TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), err);
    (void)snprintf(text, sizeof text, "cuda sm_80 on %d.%d", major, minor);
    *out = text;
    return ERN_OK;
}

static ern_status cuda_plan(ern_backend_plan *out, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    size_t raw_bytes, free_bytes = 0, device_bytes = 0;
    uint64_t all_bytes;
    const char *kernels;
    ERN_TRY(device_ready(err));
    ERN_TRY(kernels_here(&kernels, err));
    CU_TRY(cudaMemGetInfo(&free_bytes, &device_bytes), err);
    cu_backend *b = calloc(1, sizeof *b);
    if (!b) return ERN_FAIL(err, ERN_ERR_MEMORY, "out of memory planning the cuda backend");
    const ern_status status = count_all(b, m, o, &raw_bytes, &all_bytes, err);
    if (status == ERN_OK)
        *out = (ern_backend_plan){.weight_bytes = b->weight_bytes,
                                  .page_bytes = (uint64_t)b->cache.page_bytes,
                                  .scratch_bytes = b->scratch_bytes + driver_bytes(b) +
                                                   (size_t)b->cache.page_bytes, /* the spare page */
                                  .kernels = kernels,
                                  .memory_free_bytes = free_bytes,
                                  .memory_all_bytes = device_bytes};
    cu_weights_close(b);
    free(b);
    return status;
}

/* One block each. The cache lends its memory to the weights as they are stored, while they are packed. */
static ern_status take_blocks(cu_backend *b, size_t raw_bytes, ern_err *err) {
    const size_t kv_bytes = b->kv_bytes > raw_bytes ? b->kv_bytes : raw_bytes;
    const size_t scratch_bytes = b->scratch_bytes + driver_bytes(b), all = b->weight_bytes + kv_bytes + scratch_bytes;
    size_t free_bytes = 0, device_bytes = 0;
    CU_TRY(cudaMemGetInfo(&free_bytes, &device_bytes), err);
    if (all > free_bytes)
        return ERN_FAIL(err, ERN_ERR_MEMORY,
                        "the cuda backend needs %zu MiB (weights %zu, KV cache %zu, scratch %zu) and the GPU has %zu "
                        "MiB free of %zu; lower the KV pages or the batched tokens, or quantize the weights",
                        all >> 20, b->weight_bytes >> 20, kv_bytes >> 20, scratch_bytes >> 20, free_bytes >> 20,
                        device_bytes >> 20);
    CU_TRY(cudaMalloc((void **)&b->weight_block, b->weight_bytes), err);
    CU_TRY(cudaMalloc((void **)&b->cache.kv, kv_bytes), err);
    CU_TRY(cudaMalloc((void **)&b->scratch, b->scratch_bytes), err);
    if (cudaHostAlloc((void **)&b->pinned, b->pinned_bytes, cudaHostAllocDefault) != cudaSuccess) {
        (void)cudaGetLastError();
        return ERN_FAIL(err, ERN_ERR_MEMORY,
                        "the cuda backend needs %zu MiB of pinned host memory and the system gave none; lower the "
                        "batched tokens, or raise the limit of locked memory",
                        b->pinned_bytes >> 20);
    }
    cu_layout(b);
    return ERN_OK;
}

static ern_status take_streams(cu_backend *b, ern_err *err) {
    CU_TRY(cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking), err);
    CU_TRY(cudaStreamCreateWithFlags(&b->feed, cudaStreamNonBlocking), err);
    CU_TRY(cudaStreamCreateWithFlags(&b->side, cudaStreamNonBlocking), err);
    CU_TRY(cudaEventCreateWithFlags(&b->fork, cudaEventDisableTiming), err);
    CU_TRY(cudaEventCreateWithFlags(&b->join, cudaEventDisableTiming), err);
    CU_TRY(cudaEventCreateWithFlags(&b->copied, cudaEventDisableTiming), err);
    for (int i = 0; i < CU_SLOTS; i++) {
        CU_TRY(cudaEventCreateWithFlags(&b->slot[i].fed, cudaEventDisableTiming), err);
        CU_TRY(cudaEventCreateWithFlags(&b->slot[i].end, cudaEventDisableTiming), err);
    }
    for (int i = 0; i < CU_LANES; i++)
        CU_TRY(cudaStreamCreateWithFlags(&b->lane[i].stream, cudaStreamNonBlocking), err);
    return ERN_OK;
}

/* Pads of every row are zero from here on, and no cell holds what another program left. */
static ern_status clear(cu_backend *b, ern_err *err) {
    const ern_config *m = &b->model->config;
    float inv_freq[ERN_KV_CODE_HEAD_MAX / 2];
    ERN_ASSERT(m->n_head_dim <= ERN_KV_CODE_HEAD_MAX);
    for (int32_t j = 0; j < m->n_head_dim / 2; j++)
        inv_freq[j] = 1.0f / (float)pow(m->rope_theta, (double)((float)(2 * j) / (float)m->n_head_dim));
    CU_TRY(cudaMemsetAsync(b->scratch, 0, b->scratch_bytes, b->stream), err);
    CU_TRY(cudaMemsetAsync(b->cache.kv, 0, b->kv_bytes, b->stream), err);
    CU_TRY(cudaMemcpyAsync(b->inv_freq, inv_freq, (size_t)m->n_head_dim / 2 * sizeof *inv_freq, cudaMemcpyHostToDevice,
                           b->stream),
           err);
    CU_TRY(cudaStreamSynchronize(b->stream), err);
    return ERN_OK;
}

/* What the kernel of all layers wants to know of them. */
static ern_status chain_open(cu_backend *b, ern_err *err) {
    const int32_t L = b->model->config.n_layer;
    if (b->chain.n_row_max == 0) return ERN_OK;
    cu_chain_layer *layer = calloc((size_t)L, sizeof *layer);
    if (!layer) return ERN_FAIL(err, ERN_ERR_MEMORY, "out of memory for the cuda backend's table of %d layers", L);
    for (int32_t i = 0; i < L; i++) {
        const cu_layer *w = &b->weights.layer[i];
        layer[i] = (cu_chain_layer){.qkv = w->qkv,
                                    .o = w->o,
                                    .up = w->ffn.up,
                                    .down = w->ffn.down,
                                    .attn_norm = w->attn_norm,
                                    .ffn_norm = w->ffn_norm};
    }
    const cudaError_t e = cu_chain_open(b->stream, &b->chain, layer);
    free(layer);
    CU_TRY(e, err);
    return ERN_OK;
}

static ern_status take_all(cu_backend *b, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    size_t raw_bytes = 0;
    uint64_t all_bytes = 0;
    ERN_TRY(device_ready(err));
    ERN_TRY(count_all(b, m, o, &raw_bytes, &all_bytes, err));
    ERN_TRY(take_blocks(b, raw_bytes, err));
    ERN_TRY(take_streams(b, err));
    ERN_TRY(cu_weights_fill(b, b->cache.kv, raw_bytes, all_bytes, err));
    ERN_TRY(clear(b, err));
    ERN_TRY(chain_open(b, err));
    if (b->attn_one.n_row_max > 0) CU_TRY(cu_attn_one_open(b->stream, &b->attn_one), err);
    return cu_step_warm(b, err);
}

/* Also what open left half done: whatever was not taken is zero. */
static void cuda_close(ern_backend *base) {
    if (!base) return;
    cu_backend *b = of(base);
    if (b->stream) (void)cudaDeviceSynchronize(); /* the others too, if a step failed before it waited for them */
    for (int32_t i = 0; i < b->n_graph; i++)
        for (int k = 0; k < 2 * CU_SLOTS; k++)
            if (b->graph[i].exec[k / 2][k % 2]) (void)cudaGraphExecDestroy(b->graph[i].exec[k / 2][k % 2]);
    for (int i = 0; i < CU_SLOTS; i++) {
        if (b->slot[i].fed) (void)cudaEventDestroy(b->slot[i].fed);
        if (b->slot[i].end) (void)cudaEventDestroy(b->slot[i].end);
    }
    for (int i = 0; i < CU_LANES; i++) {
        if (b->lane[i].stream) (void)cudaStreamDestroy(b->lane[i].stream);
        pthread_mutex_destroy(&b->lane[i].lock);
    }
    if (b->fork) (void)cudaEventDestroy(b->fork);
    if (b->join) (void)cudaEventDestroy(b->join);
    if (b->copied) (void)cudaEventDestroy(b->copied);
    if (b->side) (void)cudaStreamDestroy(b->side);
    if (b->feed) (void)cudaStreamDestroy(b->feed);
    if (b->stream) (void)cudaStreamDestroy(b->stream);
    if (b->pinned) (void)cudaFreeHost(b->pinned);
    if (b->scratch) (void)cudaFree(b->scratch);
    if (b->cache.kv) (void)cudaFree(b->cache.kv);
    if (b->weight_block) (void)cudaFree(b->weight_block);
    (void)cudaGetLastError();
    cu_weights_close(b);
    free(b->show);
    free(b);
}

static ern_status cuda_open(ern_backend **out, const ern_model *m, const ern_backend_options *o, ern_err *err) {
    *out = NULL;
    cu_backend *b = calloc(1, sizeof *b);
    if (!b) return ERN_FAIL(err, ERN_ERR_MEMORY, "out of memory opening the cuda backend");
    b->ops = &cuda_backend_ops;
    for (int i = 0; i < CU_LANES; i++) pthread_mutex_init(&b->lane[i].lock, NULL);
    const ern_status status = take_all(b, m, o, err);
    if (status != ERN_OK) {
        cuda_close((ern_backend *)(void *)b);
        return status;
    }
    *out = (ern_backend *)(void *)b;
    return ERN_OK;
}

/* ---- steps ------------------------------------------------------------------------------------------------------- */

static bool failed(cu_backend *b) { return atomic_load_explicit(&b->error, memory_order_acquire) != cudaSuccess; }

static void cuda_submit(ern_backend *base, const ern_batch *in) {
    cu_backend *b = of(base);
    ERN_ASSERT(b->n_submitted - b->n_waited < CU_SLOTS);
    ERN_ASSERT(in->n_row > 0 && in->n_row <= b->o.n_row_max && in->n_seq <= b->o.n_seq_max &&
               in->n_want <= b->o.n_want_max);
    ERN_ASSERT(!b->o.mtp || in->next);
    cu_slot *s = &b->slot[b->n_submitted % CU_SLOTS];
    s->submit_us = ern_now_us();
    cu_step(b, s, in);
    b->n_prev_want = in->n_want;
    b->n_submitted++;
}

static ern_status cuda_wait(ern_backend *base, ern_result *out, ern_err *err) {
    cu_backend *b = of(base);
    ERN_ASSERT(b->n_waited < b->n_submitted);
    const cu_slot *s = &b->slot[b->n_waited++ % CU_SLOTS];
    const size_t W = (size_t)s->n_want;
    CU_DO(b, cudaEventSynchronize(s->end));
    /* by the host's clock: events that keep the device's cost a microsecond between steps */
    const int64_t now_us = ern_now_us(), from_us = larger(s->submit_us, b->waited_us);
    b->waited_us = now_us;
    /* the slot is the next submit's, the result is good until the next wait */
    memcpy(b->sampled, s->sampled, W * sizeof *s->sampled);
    if (b->o.mtp) memcpy(b->draft, s->draft, W * sizeof *s->draft);
    *out = (ern_result){.n_want = s->n_want,
                        .sampled = b->sampled,
                        .draft = b->o.mtp ? b->draft : NULL,
                        .compute_us = now_us - from_us};
    if (!failed(b)) return ERN_OK;
    const char *where = atomic_load(&b->error_where);
    return cu_fail((cudaError_t)atomic_load(&b->error), where ? where : "a step", err);
}

/* ---- KV pages ---------------------------------------------------------------------------------------------------- */

static unsigned char *page_at(const cu_backend *b, int32_t page) {
    ERN_ASSERT(page >= 0 && page < b->o.n_page);
    return b->cache.kv + page * b->cache.page_bytes;
}

static void cuda_kv_copy(ern_backend *base, const ern_page_pair *pair, int32_t n) {
    cu_backend *b = of(base);
    for (int32_t i = 0; i < n; i++) {
        if (pair[i].to == pair[i].from) continue;
        CU_DO(b, cudaMemcpyAsync(page_at(b, pair[i].to), page_at(b, pair[i].from), (size_t)b->cache.page_bytes,
                                 cudaMemcpyDeviceToDevice, b->stream));
    }
    CU_DO(b, cudaEventRecord(b->copied, b->stream));
}

static cu_lane *lane_take(cu_backend *b) {
    if (pthread_mutex_trylock(&b->lane[0].lock) == 0) return &b->lane[0];
    pthread_mutex_lock(&b->lane[1].lock);
    return &b->lane[1];
}

/* Bytes of one page, through the lane's buffer. */
static void page_move(cu_backend *b, cu_lane *l, unsigned char *page, unsigned char *read, const unsigned char *write) {
    const size_t all = (size_t)b->cache.page_bytes;
    for (size_t at = 0, n; at < all; at += n) {
        n = all - at < b->lane_bytes ? all - at : b->lane_bytes;
        if (write) memcpy(l->bounce, write + at, n);
        CU_DO(b, write ? cudaMemcpyAsync(page + at, l->bounce, n, cudaMemcpyHostToDevice, l->stream)
                       : cudaMemcpyAsync(l->bounce, page + at, n, cudaMemcpyDeviceToHost, l->stream));
        CU_DO(b, cudaStreamSynchronize(l->stream));
        if (read) memcpy(read + at, l->bounce, n);
    }
}

/* Also after the page copies that were asked for before. read, write: one of them. */
static bool pages_move(cu_backend *b, const int32_t *page, int32_t n, unsigned char *read, const unsigned char *write) {
    const size_t all = (size_t)b->cache.page_bytes;
    cu_lane *l = lane_take(b);
    CU_DO(b, cudaSetDevice(DEVICE));
    CU_DO(b, cudaStreamWaitEvent(l->stream, b->copied, 0));
    for (int32_t i = 0; i < n; i++) {
        const size_t at = (size_t)i * all;
        page_move(b, l, page_at(b, page[i]), read ? read + at : NULL, write ? write + at : NULL);
    }
    pthread_mutex_unlock(&l->lock);
    return !failed(b);
}

static bool cuda_kv_read(ern_backend *base, const int32_t *page, int32_t n, void *host) {
    return pages_move(of(base), page, n, host, NULL);
}

static void cuda_kv_write(ern_backend *base, const int32_t *page, int32_t n, const void *host) {
    (void)pages_move(of(base), page, n, NULL, host);
}

/* ---- probe ------------------------------------------------------------------------------------------------------- */

/* The room for stages is taken here, since only tests look at them. */
static void cuda_probe(ern_backend *base, ern_probe_fn *fn, void *ud) {
    cu_backend *b = of(base);
    const ern_config *m = &b->model->config;
    CU_DO(b, cudaStreamSynchronize(b->stream));
    if (fn && !b->show) {
        const int64_t widest = larger(m->n_hidden, larger((int64_t)m->n_head * m->n_head_dim, m->n_expert));
        const size_t n = (size_t)larger(b->o.n_row_max * widest, m->n_vocab);
        b->show = malloc(n * (sizeof(float) + sizeof(cu_bf16)));
        ERN_ASSERT(b->show);
    }
    b->probe = fn;
    b->probe_ud = ud;
}

const ern_backend_ops cuda_backend_ops = {
    .name = "cuda",
    .plan = cuda_plan,
    .open = cuda_open,
    .close = cuda_close,
    .submit = cuda_submit,
    .wait = cuda_wait,
    .kv_copy = cuda_kv_copy,
    .kv_read = cuda_kv_read,
    .kv_write = cuda_kv_write,
    .probe = cuda_probe,
};
