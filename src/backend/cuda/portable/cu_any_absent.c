/* What GPUs without clusters, copy engine and wgmma do by other kernels, or not at all: all layers at once, half a
 * layer at once, products with rows of 8 bits. Whoever asks whether something fits is told no, and asks for nothing
 * more. */
#include "backend/cuda/cu_kernels.h"

bool cu_chain_fits(const cu_chain *c) {
    (void)c;
    return false;
}
int64_t cu_chain_bytes(const cu_chain *c) {
    (void)c;
    return 0;
}
cudaError_t cu_chain_open(cudaStream_t s, const cu_chain *c, const cu_chain_layer *layers) {
    (void)s, (void)c, (void)layers;
    return cudaErrorNotSupported;
}
cudaError_t cu_chain_run(cudaStream_t s, const cu_chain *c, float *x, const cu_cache *cache, const cu_seqs *seqs) {
    (void)s, (void)c, (void)x, (void)cache, (void)seqs;
    return cudaErrorNotSupported;
}

bool cu_attn_one_fits(const cu_attn_one *c) {
    (void)c;
    return false;
}
bool cu_attn_one_takes(const cu_linear *w) {
    (void)w;
    return false;
}
int64_t cu_attn_one_bytes(const cu_attn_one *c) {
    (void)c;
    return 0;
}
cudaError_t cu_attn_one_open(cudaStream_t s, const cu_attn_one *c) {
    (void)s, (void)c;
    return cudaErrorNotSupported;
}
cudaError_t cu_attn_one_run(cudaStream_t s, const cu_attn_one *c, const cu_attn_one_layer *l, float *x,
                            const cu_cache *cache, int32_t layer, const cu_seqs *seqs) {
    (void)s, (void)c, (void)l, (void)x, (void)cache, (void)layer, (void)seqs;
    return cudaErrorNotSupported;
}

bool cu_moe_few_fits(const cu_few_job *j) {
    (void)j;
    return false;
}
cudaError_t cu_moe_few(cudaStream_t s, const cu_few_job *j) {
    (void)s, (void)j;
    return cudaErrorNotSupported;
}

/* Tests name these beside their portable siblings. */
cudaError_t cu_a8_large_run(cudaStream_t s, const cu_job *j) {
    (void)s, (void)j;
    return cudaErrorNotSupported;
}
cudaError_t cu_broad_run(cudaStream_t s, const cu_job *j) {
    (void)s, (void)j;
    return cudaErrorNotSupported;
}

bool cu_route_few_fits(int32_t n_hidden, int32_t n_expert) {
    (void)n_hidden, (void)n_expert;
    return true;
}
bool cu_route_few_tells(const cu_route_job *j, const cu_routes *r) {
    (void)j, (void)r;
    return false;
}
cudaError_t cu_route_few(cudaStream_t s, const cu_route_job *j, const cu_routes *r, const cu_x8 *out, cu_codes codes,
                         cu_bf16 *xn) {
    (void)out;
    if (codes != CU_CODES_NONE) return cudaErrorNotSupported;
    const cudaError_t e = xn ? cu_norm(s, xn, j->x, NULL, j->norm_w, j->n_row, j->n_hidden, j->eps) : cudaSuccess;
    return e != cudaSuccess ? e : cu_route(s, j, r);
}
