/* Options and memory of the engine. See engine_plan.h and engine.h.
 *
 * Memory: all = weights' copies + backend scratch + engine tables + n_page pages, rounded up to what the backend takes
 * at a time. Told how much there is
 * (memory_bytes), the pages get what the rest leaves. Asked to find out, we take nine tenths of what the machine has
 * available, less the mapped weights, which must stay in memory too or every step reads the disk.
 *
 * Where the backend computes on a device with memory of its own, that is what memory_bytes and the pages are about:
 * nine tenths of it by default, less what is in use there. Tables and the host tier are then the machine's affair. */
#include "engine/engine_plan.h"

#include "base/os.h"

enum {
    PAGE_CELLS = 64,     /* --block-size */
    PAGES_AUTO = 40000,  /* FastDeploy's cap of the automatic value */
    PAGES_HEAD_ROOM = 2, /* pages beyond one longest request (FD_ENC_DEC_BLOCK_NUM) */
    QUEUE_MAX = 4096,
    SPARE_BYTES = 32 << 20, /* of token buffers for sequences that ran and wait for their readers */
    MODEL_LEN_MIN = 16,
};

static int32_t least(int64_t a, int64_t b) { return (int32_t)(a < b ? a : b); }

static ern_status check(const ern_engine_options *o, ern_err *err) {
    int32_t seqs = o->max_num_seqs, rows = o->max_batched_tokens, len = o->max_model_len;
    int32_t n_position = o->model->config.n_position, cells = o->backend_options.n_page_cell;
    if (seqs < 1 || seqs > ERN_SEQS_MAX)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--max-num-seqs is %d; it must be 1 to %d", seqs, ERN_SEQS_MAX);
    if (len < MODEL_LEN_MIN)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--max-model-len is %d; it must be at least %d", len, MODEL_LEN_MIN);
    if (n_position > 0 && len > n_position)
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--max-model-len is %d; the model's positions end at %d (max_position_embeddings)", len,
                        n_position);
    if (cells < 1 || cells > 4096)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--block-size is %d; it must be 1 to 4096", cells);
    if (rows < seqs)
        return ERN_FAIL(
            err, ERN_ERR_USAGE,
            "--max-num-batched-tokens is %d, less than --max-num-seqs %d: each running request needs a token "
            "per step",
            rows, seqs);
    if (rows > (int64_t)len * seqs)
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--max-num-batched-tokens is %d, more than --max-model-len %d x --max-num-seqs %d = %lld can "
                        "ever use",
                        rows, len, seqs, (long long)len * seqs);
    if (o->chunked_prefill && rows < cells)
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--max-num-batched-tokens is %d, less than --block-size %d; with chunked prefill a step must "
                        "hold a block",
                        rows, cells);
    if (!o->chunked_prefill && rows < len)
        return ERN_FAIL(
            err, ERN_ERR_USAGE,
            "--max-num-batched-tokens is %d, less than --max-model-len %d; without --enable-chunked-prefill "
            "a prompt is computed in one step and must fit",
            rows, len);
    if (o->chunk_tokens < 0 || o->queue_max < 1 || o->queue_max > 1 << 20 || o->queue_prompt_max < 0)
        return ERN_FAIL(err, ERN_ERR_USAGE, "a queue or chunk limit is out of range (chunk %d, queue %d of 1 to %d)",
                        o->chunk_tokens, o->queue_max, 1 << 20);
    return ERN_OK;
}

ern_status engine_options_fill(ern_engine_options *out, const ern_engine_options *o, ern_err *err) {
    *out = *o;
    ern_backend_options *b = &out->backend_options;
    if (b->n_page_cell == 0) b->n_page_cell = PAGE_CELLS;
    if (out->queue_max == 0) out->queue_max = QUEUE_MAX;
    if (out->prompt_share <= 0) out->prompt_share = 1;
    if (!out->prefix_cache) out->swap_bytes = 0, out->store_dir = NULL;
    ERN_TRY(check(out, err));
    b->n_row_max = out->max_batched_tokens;
    b->n_seq_max = out->max_num_seqs;
    b->n_len_max = out->max_model_len;
    /* Beside one row per sequence, prompts that report logprobs: as many rows as a reader may be behind. An unchunked
     * prompt reports all of its rows at once. */
    int64_t wants = out->chunked_prefill ? (int64_t)out->max_num_seqs + ERN_EVENT_CREDIT : out->max_batched_tokens;
    b->n_want_max = least(wants, out->max_batched_tokens);
    return ERN_OK;
}

/* As many waiting sequences as may keep their tokens: all of them unless contexts are long. */
static int32_t spare_slots(const ern_engine_options *full, int32_t n_seq) {
    int64_t n_hold = full->max_model_len / full->backend_options.n_page_cell + 1;
    int64_t each = (int64_t)sizeof(int32_t) * (full->max_model_len + ERN_BAN_MAX + ERN_STOP_MAX) +
                   (int64_t)sizeof(page_hold) * n_hold;
    return least(SPARE_BYTES / each, n_seq - full->max_num_seqs);
}

core_options engine_core_options(const ern_engine_options *full, int32_t n_page, int32_t n_host_page) {
    /* waiting, running, and as many that ended but whose END nobody has taken yet */
    const int32_t n_seq = full->queue_max + 2 * full->max_num_seqs;
    return (core_options){
        .engine = full,
        .n_seq = n_seq,
        .n_page = n_page,
        .n_host_page = n_host_page,
        .move = n_host_page > 0 || full->store_dir ? &transfer_real_ops : NULL,
        .n_spare_slot = spare_slots(full, n_seq),
        .n_vocab = full->model->config.n_vocab,
        .now_us = ern_now_us,
    };
}

int32_t engine_event_room(const ern_engine_options *full) {
    return 8 * full->backend_options.n_want_max; /* two events a want, two steps in flight, and as much again unread */
}

/* Buffers and index of the disk tier. */
static uint64_t disk_bytes(const ern_engine_options *full, const ern_backend_plan *p) {
    if (!full->store_dir) return 0;
    const store_options o = {
        .limit_bytes = full->store_bytes, .block_bytes = p->page_bytes, .n_token = full->backend_options.n_page_cell};
    return p->page_bytes + store_memory_bytes(&o);
}

/* What the engine itself takes of the machine's memory; n_page because some tables grow with the pool. */
static uint64_t table_bytes(const ern_engine_options *full, const ern_backend_plan *p, int32_t n_page,
                            int32_t n_host_page) {
    core_options c = engine_core_options(full, n_page, n_host_page);
    transfer_options t = {
        .page_bytes = p->page_bytes, .n_host_page = n_host_page, .page_tokens = full->backend_options.n_page_cell};
    uint64_t outbox = (uint64_t)(engine_event_room(full) + 2 * c.n_seq) * sizeof(ern_event);
    return core_bytes(&c) + outbox + transfer_bytes(&t) + disk_bytes(full, p);
}

/* Of n pages, with those that are taken beside them. */
static uint64_t pages_bytes(const ern_backend_plan *p, int32_t n) {
    const uint64_t step = p->page_step > 1 ? (uint64_t)p->page_step : 1;
    return ((uint64_t)n + step - 1) / step * step * p->page_bytes;
}

/* Pages that fit into so many bytes. */
static uint64_t pages_in(const ern_backend_plan *p, uint64_t bytes) {
    const uint64_t step = p->page_step > 1 ? (uint64_t)p->page_step : 1;
    return bytes / (step * p->page_bytes) * step;
}

static bool on_device(const ern_backend_plan *p) { return p->memory_all_bytes > 0; }

/* What is taken beside the pages from the memory that they are in. */
static uint64_t fixed_bytes(const ern_engine_options *full, const ern_backend_plan *p, int32_t n_page,
                            int32_t n_host_page) {
    const uint64_t backend = p->weight_bytes + p->scratch_bytes;
    return on_device(p) ? backend : backend + table_bytes(full, p, n_page, n_host_page);
}

/* n_page pages, asked for or all that fit, are fewer than the n_min of one longest request. */
static ern_status refuse(const ern_engine_options *full, int32_t n_page, int32_t n_min, bool asked,
                         const ern_backend_plan *p, ern_err *err) {
    int64_t fits = ((int64_t)n_page - PAGES_HEAD_ROOM) * full->backend_options.n_page_cell;
    double page_mib = (double)p->page_bytes / (1 << 20);
    if (fits < MODEL_LEN_MIN)
        return ERN_FAIL(
            err, ERN_ERR_MEMORY,
            "the KV cache for one request of --max-model-len %d takes %d blocks of %.3f MiB, but only %d %s; %s",
            full->max_model_len, n_min, page_mib, n_page, asked ? "were asked for" : "fit in memory",
            asked                    ? "raise --num-gpu-blocks-override"
            : full->memory_bytes > 0 ? "raise --memory, or lower --max-num-batched-tokens"
                                     : "lower --max-num-batched-tokens, or run a smaller model");
    return ERN_FAIL(err, ERN_ERR_MEMORY,
                    "the KV cache for one request of --max-model-len %d takes %d blocks of %.3f MiB, but only %d %s; "
                    "--max-model-len %lld would fit",
                    full->max_model_len, n_min, page_mib, n_page,
                    asked ? "were asked for (--num-gpu-blocks-override)" : "fit in memory", (long long)fits);
}

/* Bytes for everything that ernest itself takes. */
static uint64_t memory_bytes(const ern_engine_options *full, const ern_backend_plan *p, uint64_t mapped_bytes) {
    if (on_device(p)) {
        const uint64_t used = p->memory_all_bytes - p->memory_free_bytes, share = p->memory_all_bytes / 10 * 9;
        const uint64_t most = full->memory_bytes > 0 ? full->memory_bytes : share > used ? share - used : 0;
        return most < p->memory_free_bytes ? most : p->memory_free_bytes;
    }
    if (full->memory_bytes > 0) return full->memory_bytes;
    uint64_t have = ern_memory_available_bytes() / 10 * 9;
    return have > mapped_bytes ? have - mapped_bytes : 0;
}

/* The pages of --swap-space. */
static ern_status plan_host(ern_engine_plan *p, const ern_engine_options *full, ern_err *err) {
    uint64_t n = full->prefix_cache ? full->swap_bytes / p->backend.page_bytes : 0;
    if (full->swap_bytes > 0 && full->prefix_cache && n == 0)
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--swap-space of %.3f GiB holds no block of %.3f MiB; raise it, or leave it out",
                        (double)full->swap_bytes / (1 << 30), (double)p->backend.page_bytes / (1 << 20));
    if (n > INT32_MAX / 2)
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--swap-space of %.1f GiB is %llu blocks, more than can be counted; lower it",
                        (double)full->swap_bytes / (1 << 30), (unsigned long long)n);
    p->n_host_page = (int32_t)n;
    return ERN_OK;
}

/* Beside a device: the machine holds the tables and the host tier. */
static ern_status check_host(const ern_engine_options *full, const ern_engine_plan *p, ern_err *err) {
    const uint64_t need = table_bytes(full, &p->backend, p->n_page, p->n_host_page),
                   have = ern_memory_available_bytes();
    if (!on_device(&p->backend) || need <= have / 10 * 9) return ERN_OK;
    return ERN_FAIL(
        err, ERN_ERR_MEMORY,
        "tables and --swap-space take %.1f GiB of this machine's memory, and %.1f GiB of it are free; lower "
        "--swap-space or --max-num-seqs",
        (double)need / (1 << 30), (double)have / (1 << 30));
}

ern_status ern_engine_plan_make(ern_engine_plan *out, const ern_engine_options *o, ern_err *err) {
    ERN_ASSERT(o->backend && o->model);
    ern_engine_options full;
    ERN_TRY(engine_options_fill(&full, o, err));
    ern_backend_options *b = &full.backend_options;
    int32_t P = b->n_page_cell, asked = b->n_page;
    if (asked < 0 || (int64_t)asked * P > INT32_MAX)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--num-gpu-blocks-override is %d; it must be 1 to %d, or absent", asked,
                        INT32_MAX / P);
    ern_engine_plan p = {0};
    b->n_page = asked > 0 ? asked : 1; /* a page's size does not depend on their number */
    ERN_TRY(o->backend->plan(&p.backend, o->model, b, err));
    b->n_page = asked;
    ERN_TRY(plan_host(&p, &full, err));
    /* Weights that the backend copies are read from the file once and need not stay. */
    uint64_t all_weights = o->model->weight_bytes, copies = p.backend.weight_bytes;
    p.mapped_weight_bytes = all_weights > copies ? all_weights - copies : 0;
    /* What was quantized while loading is ours. Once it is taken, the machine's free memory is without it. */
    uint64_t owned = o->model->owned_bytes < p.mapped_weight_bytes ? o->model->owned_bytes : p.mapped_weight_bytes;
    p.mapped_weight_bytes -= owned;

    int32_t one = (full.max_model_len + P - 1) / P, n_min = full.max_model_len / P + PAGES_HEAD_ROOM;
    int64_t useful = (int64_t)full.max_num_seqs * one + PAGES_HEAD_ROOM; /* more could never be held at once */
    if (full.prefix_cache) useful *= 2;                                  /* but what nobody holds can be found again */
    int32_t n_cap = least(useful, n_min > PAGES_AUTO ? n_min : PAGES_AUTO);
    n_cap = least(n_cap, INT32_MAX / P);
    uint64_t memory = memory_bytes(&full, &p.backend, p.mapped_weight_bytes + (o->model->plan_only ? owned : 0)),
             fixed = fixed_bytes(&full, &p.backend, n_cap, p.n_host_page);
    uint64_t n_fit = memory > fixed ? pages_in(&p.backend, memory - fixed) : 0;
    int32_t n_auto = n_fit > (uint64_t)n_cap ? n_cap : (int32_t)n_fit;
    p.n_page = asked > 0 ? asked : n_auto;
    if (asked > 0 && asked < n_min) return refuse(&full, asked, n_min, true, &p.backend, err);
    if (n_auto < n_min) return refuse(&full, n_auto, n_min, false, &p.backend, err);
    if (asked > 0 && (uint64_t)asked > n_fit)
        return ERN_FAIL(err, ERN_ERR_MEMORY,
                        "--num-gpu-blocks-override %d takes %.1f GiB of KV cache, but only %llu blocks fit in memory; "
                        "give that or less, or leave the flag out",
                        asked, (double)pages_bytes(&p.backend, asked) / (1 << 30), (unsigned long long)n_fit);
    p.kv_bytes = pages_bytes(&p.backend, p.n_page);
    p.host_bytes = (uint64_t)p.n_host_page * p.backend.page_bytes;
    p.total_bytes = p.backend.weight_bytes + p.backend.scratch_bytes +
                    table_bytes(&full, &p.backend, p.n_page, p.n_host_page) + p.kv_bytes;
    ERN_TRY(check_host(&full, &p, err));
    p.kv_tokens = (int64_t)p.n_page * P;
    p.full_concurrency = (double)p.kv_tokens / full.max_model_len;
    *out = p;
    return ERN_OK;
}
