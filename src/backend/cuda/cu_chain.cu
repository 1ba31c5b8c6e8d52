/* All layers of a dense model in one launch: which models, what memory, which jobs are whose. See cu_chain_kernel.cuh.
 */
#include "backend/cuda/cu_chain_kernel.cuh"

#include <stdlib.h>
#include <string.h>

enum {
    SHARED_STATIC = 4096, /* at most, of the kernel's own */
    SHARED_BLOCK = 227 * 1024,
    RING_LEAST = 66 * 1024, /* two octets, whatever the format */
    CUT = 512,
    JOIN_NOT = 20, /* blocks with nothing of o that do not join: they have tiles, most likely */
    JOIN_LEAST = 32,
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
    const int32_t per = c->format == CU_BF16 ? chain_shape<CU_BF16>::PER : 1; /* slots of an octet */
    int32_t units = 0, widest = 0, fills = 0, sums = 0;
    for (int i = 0; i < CHAIN_LINEARS; i++) {
        const int32_t n = ceil_div(k.n_job[i], attn_sm_count()) * bands_of(i) * k.n_seg[i];
        if (n > units) units = n;
        fills += n / CHAIN_WARPS * per;
        if (n / k.n_seg[i] > sums) sums = n / k.n_seg[i];
        if (k.n_seg[i] > widest) widest = k.n_seg[i];
    }
    a->f32_at = (c->kv_dtype == ERN_KV_I8 ? tile_shape<CHAIN_HEAD, true, CHAIN_WARPS>::end_at
                                          : tile_shape<CHAIN_HEAD, false, CHAIN_WARPS>::end_at);
    a->x_at = a->f32_at + n_row * c->n_hidden * 4;
    a->pitch = widest * CU_SEGMENT * 2 + 16; /* so that eight rows meet all banks */
    a->norm_at = (a->x_at + n_row * a->pitch + 7) / 8 * 8;
    a->sum_at = a->norm_at + 2 * c->n_layer * (int32_t)sizeof(void *);
    a->n_sum = (sums * n_row * CU_BAND + 31) / 32 * 32;
    a->fill_at = a->sum_at + CHAIN_LINEARS * a->n_sum * (int32_t)sizeof(chain_sum);
    a->n_fill = c->n_layer * fills;
    a->part_at = a->fill_at + a->n_fill * (c->format == CU_BF16 ? 1 : 2) * (int32_t)sizeof(void *);
    a->part = units * n_row * CU_BAND;
    a->scale_at = a->part_at + 2 * a->part * 4;
    a->scale = units;
    a->ring_at = (a->scale_at + 3 * units * 4 + 127) / 128 * 128;
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
        c->n_row_max < 1 || c->n_row_max > CHAIN_ROWS)
        return false;
    for (int i = 0; i < CHAIN_LINEARS; i++) {
        const int32_t most = ceil_div(k.n_job[i], attn_sm_count());
        if (k.n_seg[i] % CHAIN_WARPS || most > CHAIN_JOBS || most * bands_of(i) * c->n_row_max > CHAIN_SUMS)
            return false;
    }
    return c->n_ffn % CU_SEGMENT == 0 && shared_layout(&a, c, c->n_row_max) >= RING_LEAST;
}

/* ---- open -------------------------------------------------------------------------------------------------------- */

/* Stages follow one another, and a block that has much to do in one is late for the next: o and down go to blocks with
 * few jobs of gate/up, second jobs of qkv to those with nothing of down. Tiles are dealt from the first block on, so
 * the others go to the last. */
static void deal(chain_jobs *jobs, const cu_chain *c, int32_t n_block) {
    static const int order[CHAIN_LINEARS] = {CHAIN_UP, CHAIN_DOWN, CHAIN_O, CHAIN_QKV};
    static const int beside[CHAIN_LINEARS] = {CHAIN_UP, CHAIN_UP, CHAIN_UP, CHAIN_DOWN};
    const chain_cut k = cut_of(c);
    memset(jobs, 0, (size_t)n_block * sizeof *jobs);
    for (int i = 0; i < CHAIN_LINEARS; i++) {
        const int kind = order[i];
        for (int32_t j = 0; j < k.n_job[kind]; j++) {
            int32_t best = 0, least = INT32_MAX;
            for (int32_t b = 0; b < n_block; b++) {
                const int32_t load = jobs[b].n[kind] * (CHAIN_JOBS + 1) + jobs[b].n[beside[i]];
                if (kind == CHAIN_UP ? load < least : load <= least) best = b, least = load;
            }
            jobs[best].job[kind][jobs[best].n[kind]++] = (int16_t)j;
        }
    }
    int16_t place = 0; /* who joins has nothing of o, if possible, and little of gate/up */
    for (int o = 0; o <= CHAIN_JOBS; o++)
        for (int up = 0; up <= CHAIN_JOBS; up++)
            for (int32_t b = n_block - 1; b >= 0; b--)
                if (jobs[b].n[CHAIN_O] == o && jobs[b].n[CHAIN_UP] == up) jobs[b].join = place++;
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
    cudaError_t e = !cu_chain_fits(c) ? cudaErrorInvalidValue : w && j ? cudaSuccess : cudaErrorMemoryAllocation;
    if (e == cudaSuccess) {
        for (int32_t i = 0; i < c->n_layer; i++) weights_of(&w[i], &layers[i]);
        deal(j, c, n_block);
        e = cudaMemsetAsync(c->memory, 0, (size_t)m.none, s);
    }
    if (e == cudaSuccess) e = cudaMemsetAsync(c->memory + m.none, 0xff, (size_t)(m.bytes - m.none), s);
    if (e == cudaSuccess) e = cudaMemcpyAsync(c->memory + m.weights, w, weights, cudaMemcpyHostToDevice, s);
    if (e == cudaSuccess) e = cudaMemcpyAsync(c->memory + m.jobs, j, jobs, cudaMemcpyHostToDevice, s);
    if (e == cudaSuccess) e = cudaStreamSynchronize(s);
    free(w);
    free(j);
    return e;
}

/* ---- a step ------------------------------------------------------------------------------------------------------ */

#define KERNELS(f)                                                                                            \
    {                                                                                                         \
        {(const void *)chain_kernel<f, false, 1>, (const void *)chain_kernel<f, true, 1>}, {                  \
            (const void *)chain_kernel<f, false, CHAIN_ROWS>, (const void *)chain_kernel<f, true, CHAIN_ROWS> \
        }                                                                                                     \
    }
static const void *const kernels[CU_PLAIN_FORMATS][2][2] = {KERNELS(CU_BF16), KERNELS(CU_I8), KERNELS(CU_I4),
                                                            KERNELS(CU_F8)};

cudaError_t cu_chain_run(cudaStream_t s, const cu_chain *c, float *x, const cu_cache *cache, const cu_seqs *seqs) {
    static uint64_t ready[CU_PLAIN_FORMATS][2][2];
    const bool i8 = c->kv_dtype == ERN_KV_I8, rows = seqs->n_row > 1;
    const void *fn = kernels[c->format][rows][i8];
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
    a.n_join = attn_sm_count() - k.n_job[CHAIN_O] - JOIN_NOT;
    if (a.n_join < JOIN_LEAST) a.n_join = attn_sm_count();
    const int32_t per = c->format == CU_BF16 ? chain_shape<CU_BF16>::PER : 1;
    int32_t octets = shared_layout(&a, c, a.n_row) / slot_bytes(c->format) / per;
    if (octets > CHAIN_SLOTS / per) octets = CHAIN_SLOTS / per;
    a.n_slot = octets * per;
    a.most = octets < CHAIN_MOST ? octets : CHAIN_MOST;
    cudaError_t e = cu_shared_bytes(&ready[c->format][rows][i8], fn, SHARED_BLOCK - SHARED_STATIC);
    if (e != cudaSuccess) return e;
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attr[2] = {};
    config.gridDim = dim3((unsigned)attn_sm_count());
    config.blockDim = dim3(CHAIN_THREADS);
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
