/* All layers of a dense model in one launch: which models, what memory, which jobs are whose. See cu_chain_kernel.cuh.
 */
#include "backend/cuda/cu_chain_kernel.cuh"

#include <stdlib.h>
#include <string.h>

enum {
    SHARED_STATIC = 4096, /* at most, of the kernel's own */
    SHARED_BLOCK = 227 * 1024,
    RING_LEAST = 48 * 1024, /* two segments of every warp at once, whatever the format, and some */
    CUT = 512,
};

static int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
static int64_t cut(int64_t n) { return (n + CUT - 1) / CUT * CUT; }

static int32_t qkv_out(const cu_chain *c) { return (c->n_head + 2 * c->n_kv_head) * c->n_head_dim; }

/* Of each linear: segments, and jobs. */
typedef struct chain_cut {
    int32_t n_seg[CHAIN_LINEARS], n_job[CHAIN_LINEARS];
} chain_cut;
static chain_cut cut_of(const cu_chain *c) {
    const int32_t Q = c->n_head * c->n_head_dim;
    return {{c->n_hidden / CU_SEGMENT, Q / CU_SEGMENT, c->n_hidden / CU_SEGMENT, c->n_ffn / CU_SEGMENT},
            {qkv_out(c) / CU_BAND, c->n_hidden / CU_BAND, c->n_ffn / CU_BAND, c->n_hidden / CU_BAND}};
}
static int32_t bands_of(int kind) { return kind == CHAIN_UP ? 2 : 1; }

/* ---- shared memory ----------------------------------------------------------------------------------------------- */

static int32_t slot_bytes(cu_format f) {
    return f == CU_BF16 ? chain_shape<CU_BF16>::SLOT
           : f == CU_I8 ? chain_shape<CU_I8>::SLOT
           : f == CU_I4 ? chain_shape<CU_I4>::SLOT
                        : chain_shape<CU_F8>::SLOT;
}

/* Fill in where all lies for n_row rows; returns what is left for the ring. */
static int32_t shared_layout(chain_args *a, const cu_chain *c, int32_t n_row) {
    const chain_cut k = cut_of(c);
    int32_t units = 0, widest = 0;
    for (int i = 0; i < CHAIN_LINEARS; i++) {
        const int32_t n = ceil_div(k.n_job[i], attn_sm_count()) * bands_of(i) * k.n_seg[i];
        if (n > units) units = n;
        if (k.n_seg[i] > widest) widest = k.n_seg[i];
    }
    const int32_t scales = units > CHAIN_JOBS * 2 * CU_BAND ? units : CHAIN_JOBS * 2 * CU_BAND;
    a->f32_at = (c->kv_dtype == ERN_KV_I8 ? tile_shape<CHAIN_HEAD, true, CHAIN_WARPS>::end_at
                                          : tile_shape<CHAIN_HEAD, false, CHAIN_WARPS>::end_at);
    a->x_at = a->f32_at + n_row * c->n_hidden * 4;
    a->pitch = widest * CU_SEGMENT * 2 + 16; /* so that eight rows meet all banks */
    a->norm_at = a->x_at + n_row * a->pitch;
    a->part_at = a->norm_at + 2 * c->n_hidden * 2;
    a->part = units * n_row * CU_BAND;
    a->scale_at = a->part_at + 2 * a->part * 4;
    a->scale = scales;
    a->ring_at = (a->scale_at + 3 * scales * 4 + 127) / 128 * 128;
    return SHARED_BLOCK - SHARED_STATIC - a->ring_at;
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

/* count | weights [L] | jobs [blocks] | two sets of places | two of pieces with their M and L */
typedef struct chain_memory {
    int64_t weights, jobs, set[2], piece[2], piece_ml[2], none, bytes; /* none: where what begins that is CHAIN_NONE */
    chain_places at;
} chain_memory;
static chain_memory memory_of(const cu_chain *c) {
    const int32_t R = c->n_row_max, Q = c->n_head * c->n_head_dim;
    chain_memory m = {};
    m.at.att = R * qkv_out(c);
    m.at.x = m.at.att + R * Q / 2;
    m.at.h = m.at.x + R * c->n_hidden;
    m.at.y = m.at.h + R * c->n_ffn / 2;
    m.at.layer = m.at.y + R * c->n_hidden;
    m.weights = CUT;
    m.jobs = m.weights + cut(c->n_layer * (int64_t)sizeof(chain_weights));
    m.none = m.jobs + cut(attn_sm_count() * (int64_t)sizeof(chain_jobs));
    const int64_t set = cut((int64_t)c->n_layer * m.at.layer * 4), tiles = ceil_div(c->n_len_max, CU_KEYS);
    const int64_t piece = (int64_t)R * c->n_head * tiles;
    int64_t at = m.none;
    for (int i = 0; i < 2; i++) {
        m.set[i] = at;
        m.piece[i] = m.set[i] + set;
        m.piece_ml[i] = m.piece[i] + cut(piece * c->n_head_dim * 4);
        at = m.piece_ml[i] + cut(piece * (CHAIN_HEAD / CHAIN_SLICE) * 8);
    }
    m.bytes = at;
    return m;
}

int64_t cu_chain_bytes(const cu_chain *c) { return memory_of(c).bytes; }

bool cu_chain_fits(const cu_chain *c) {
    const chain_cut k = cut_of(c);
    chain_args a;
    if (c->n_head_dim != CHAIN_HEAD || c->n_head % c->n_kv_head || c->n_head / c->n_kv_head > ATTN_FEW ||
        c->n_hidden != CHAIN_HIDDEN || cu_codes_of(c->format) != CU_CODES_NONE || c->kv_dtype == ERN_KV_F8 ||
        c->n_row_max < 1 || c->n_row_max > CU_SKINNY_MAX)
        return false;
    for (int i = 0; i < CHAIN_LINEARS; i++) {
        const int32_t most = ceil_div(k.n_job[i], attn_sm_count());
        if (k.n_seg[i] % CHAIN_WARPS || most > CHAIN_JOBS || most * bands_of(i) * c->n_row_max > CHAIN_SUMS)
            return false;
    }
    return c->n_ffn % CU_SEGMENT == 0 && shared_layout(&a, c, c->n_row_max) >= RING_LEAST;
}

/* ---- open -------------------------------------------------------------------------------------------------------- */

/* The linears of most bytes first, each job to the block that has least so far. load [n_block]: to work with. */
static void deal(chain_jobs *jobs, int32_t *load, const cu_chain *c, int32_t n_block) {
    static const int order[CHAIN_LINEARS] = {CHAIN_UP, CHAIN_DOWN, CHAIN_O, CHAIN_QKV};
    const chain_cut k = cut_of(c);
    memset(load, 0, (size_t)n_block * sizeof *load);
    memset(jobs, 0, (size_t)n_block * sizeof *jobs);
    for (int i = 0; i < CHAIN_LINEARS; i++) {
        const int kind = order[i];
        const int32_t most = ceil_div(k.n_job[kind], n_block);
        for (int32_t j = 0; j < k.n_job[kind]; j++) {
            int32_t best = -1;
            for (int32_t b = 0; b < n_block; b++)
                if (jobs[b].n[kind] < most && (best < 0 || load[b] < load[best])) best = b;
            jobs[best].job[kind][jobs[best].n[kind]++] = (int16_t)j;
            load[best] += bands_of(kind) * k.n_seg[kind];
        }
    }
    /* Tiles are dealt from the first block on, so the last ones join first. */
    int16_t place = 0;
    for (int o = 0; o <= CHAIN_JOBS; o++)
        for (int32_t b = n_block - 1; b >= 0; b--)
            if (jobs[b].n[CHAIN_O] == o) jobs[b].join = place++;
}

static void weights_of(chain_weights *w, const cu_chain_layer *l) {
    const cu_linear *linear[CHAIN_LINEARS] = {&l->qkv, &l->o, &l->up, &l->down};
    for (int i = 0; i < CHAIN_LINEARS; i++) {
        w->pack[i] = (const unsigned char *)linear[i]->pack;
        w->scale[i] = linear[i]->scale;
    }
    w->attn_norm = l->attn_norm;
    w->ffn_norm = l->ffn_norm;
}

cudaError_t cu_chain_open(cudaStream_t s, const cu_chain *c, const cu_chain_layer *layers) {
    const chain_memory m = memory_of(c);
    const int32_t n_block = attn_sm_count();
    const size_t weights = (size_t)c->n_layer * sizeof(chain_weights), jobs = (size_t)n_block * sizeof(chain_jobs);
    chain_weights *w = (chain_weights *)malloc(weights);
    chain_jobs *j = (chain_jobs *)malloc(jobs);
    int32_t *load = (int32_t *)malloc((size_t)n_block * sizeof *load);
    cudaError_t e = !cu_chain_fits(c) ? cudaErrorInvalidValue
                    : w && j && load  ? cudaSuccess
                                      : cudaErrorMemoryAllocation;
    if (e == cudaSuccess) {
        for (int32_t i = 0; i < c->n_layer; i++) weights_of(&w[i], &layers[i]);
        deal(j, load, c, n_block);
        e = cudaMemsetAsync(c->memory, 0, (size_t)m.none, s);
    }
    if (e == cudaSuccess) e = cudaMemsetAsync(c->memory + m.none, 0xff, (size_t)(m.bytes - m.none), s);
    if (e == cudaSuccess) e = cudaMemcpyAsync(c->memory + m.weights, w, weights, cudaMemcpyHostToDevice, s);
    if (e == cudaSuccess) e = cudaMemcpyAsync(c->memory + m.jobs, j, jobs, cudaMemcpyHostToDevice, s);
    if (e == cudaSuccess) e = cudaStreamSynchronize(s);
    free(w);
    free(j);
    free(load);
    return e;
}

/* ---- a step ------------------------------------------------------------------------------------------------------ */

static const void *const kernels[CU_PLAIN_FORMATS][2] = {
    {(const void *)chain_kernel<CU_BF16, false>, (const void *)chain_kernel<CU_BF16, true>},
    {(const void *)chain_kernel<CU_I8, false>, (const void *)chain_kernel<CU_I8, true>},
    {(const void *)chain_kernel<CU_I4, false>, (const void *)chain_kernel<CU_I4, true>},
    {(const void *)chain_kernel<CU_F8, false>, (const void *)chain_kernel<CU_F8, true>},
};

cudaError_t cu_chain_run(cudaStream_t s, const cu_chain *c, float *x, const cu_cache *cache, const cu_seqs *seqs) {
    static uint64_t ready[CU_PLAIN_FORMATS][2];
    const bool i8 = c->kv_dtype == ERN_KV_I8;
    const void *fn = kernels[c->format][i8];
    const chain_memory m = memory_of(c);
    const chain_cut k = cut_of(c);
    chain_args a = {};
    if (seqs->n_row > c->n_row_max || seqs->n_row != seqs->n_seq || !attn_args_of(&a.att, cache, 0, seqs))
        return cudaErrorInvalidValue;
    a.layer_bytes = 2 * cache->n_kv_head * cache->plane_bytes;
    a.weights = (const chain_weights *)(c->memory + m.weights);
    a.jobs = (const chain_jobs *)(c->memory + m.jobs);
    a.count = (unsigned long long *)c->memory;
    a.x = x;
    for (int i = 0; i < 2; i++) {
        a.set[i] = (uint32_t *)(c->memory + m.set[i]);
        a.piece[i] = (float *)(c->memory + m.piece[i]);
        a.piece_ml[i] = (float2 *)(c->memory + m.piece_ml[i]);
    }
    a.at = m.at;
    a.n_layer = c->n_layer;
    a.n_row = seqs->n_row;
    a.n_row_max = c->n_row_max;
    a.n_tile_max = ceil_div(c->n_len_max, CU_KEYS);
    a.F = c->n_ffn;
    for (int i = 0; i < CHAIN_LINEARS; i++) a.n_seg[i] = k.n_seg[i];
    a.eps = c->eps;
    a.n_slot = shared_layout(&a, c, a.n_row) / slot_bytes(c->format);
    if (a.n_slot > CHAIN_SLOTS) a.n_slot = CHAIN_SLOTS;
    cudaError_t e = cu_shared_bytes(&ready[c->format][i8], fn, SHARED_BLOCK - SHARED_STATIC);
    if (e != cudaSuccess) return e;
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attr[2] = {};
    config.gridDim = dim3((unsigned)attn_sm_count());
    config.blockDim = dim3(CHAIN_THREADS + 32);
    config.dynamicSmemBytes = (size_t)(a.ring_at + a.n_slot * slot_bytes(c->format));
    config.stream = s;
    config.attrs = attr;
    config.numAttrs = 2;
    attr[0].id = cudaLaunchAttributeCooperative; /* all blocks are there at the same time, or none */
    attr[0].val.cooperative = 1;
    attr[1].id = cudaLaunchAttributeProgrammaticStreamSerialization; /* weights are asked for early */
    attr[1].val.programmaticStreamSerializationAllowed = 1;
    void *args[] = {&a};
    e = cudaLaunchKernelExC(&config, fn, args);
    return e != cudaSuccess ? e : cudaGetLastError();
}
