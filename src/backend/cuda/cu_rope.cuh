/* Rotation and store of a row's heads: q as attention reads it, keys and values in their cells. Whoever has a row of
 * qkv may do it: a kernel of its own (cu_attn.cu), or the warps that store a large linear (cu_wide.cuh). */
#ifndef ERN_BACKEND_CUDA_CU_ROPE_CUH
#define ERN_BACKEND_CUDA_CU_ROPE_CUH

#include "backend/cuda/cu_attn.cuh"

typedef struct rope_args {
    cu_bf16 *q_out;
    const float2 *turn;
    unsigned char *kv; /* keys of the layer, head 0 */
    int64_t page_bytes, plane_bytes, value;
    int32_t scale_at, n_page_cell, n_head, n_kv_head;
    const int32_t *cell;
} rope_args;

static inline rope_args rope_args_of(const cu_rope *r) {
    const cu_cache *c = r->cache;
    rope_args a = {};
    a.q_out = r->q_out;
    a.turn = attn_turns(r->seqs->work, r->seqs->n_row, r->seqs->n_seq);
    a.kv = c->kv + (int64_t)r->layer * 2 * c->n_kv_head * c->plane_bytes;
    a.page_bytes = c->page_bytes;
    a.plane_bytes = c->plane_bytes;
    a.value = c->n_kv_head * c->plane_bytes;
    a.scale_at = attn_plane_cells(c) * c->n_head_dim;
    a.n_page_cell = c->n_page_cell;
    a.n_head = c->n_head;
    a.n_kv_head = c->n_kv_head;
    a.cell = r->seqs->cell;
    return a;
}

/* The cell of a row: its page, from the layer's first plane on, and its place in a plane. NULL: a row that only fills a
 * graph. */
static __device__ __forceinline__ unsigned char *rope_page(const rope_args *a, int32_t cell, int64_t *at) {
    *at = 0;
    if (cell < 0) return NULL;
    const int32_t nth = cell / a->n_page_cell;
    *at = cell - nth * a->n_page_cell;
    return a->kv + nth * a->page_bytes;
}
/* Head h of those of k and v. */
static __device__ __forceinline__ unsigned char *rope_plane(const rope_args *a, unsigned char *page, int32_t h) {
    const int32_t G = a->n_kv_head;
    return page + (h < G ? h * a->plane_bytes : (h - G) * a->plane_bytes + a->value);
}

#endif
