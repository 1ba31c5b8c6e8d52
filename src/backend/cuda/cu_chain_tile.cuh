/* Tiles of decode attention as kernels with blocks that stay take them: all rows' heads' tiles lie in a line, each row
 * a sequence's next token, and a block has a stretch of it. */
#ifndef ERN_BACKEND_CUDA_CU_CHAIN_TILE_CUH
#define ERN_BACKEND_CUDA_CU_CHAIN_TILE_CUH

#include "backend/cuda/cu_attn.cuh"

/* A place in the line. */
typedef struct chain_tile {
    int32_t row, head, tile, pos;
} chain_tile;

static __device__ __forceinline__ int32_t chain_tiles(int32_t pos) { return pos / CU_KEYS + 1; }
static __device__ __forceinline__ chain_tile chain_tile_of(const attn_args *a, const int32_t *pos, int32_t x) {
    chain_tile t = {};
    int32_t n = chain_tiles(pos[0]);
#pragma unroll 1
    while (x >= n * a->n_kv_head) {
        x -= n * a->n_kv_head;
        n = chain_tiles(pos[++t.row]);
    }
    t.head = x / n;
    t.tile = x - t.head * n;
    t.pos = pos[t.row];
    return t;
}
/* The page of the thread's key of a tile; -1: none. */
static __device__ __forceinline__ int32_t chain_page(const attn_args *a, const chain_tile *t) {
    const int32_t at = t->tile * CU_KEYS + (int32_t)threadIdx.x;
    return threadIdx.x < CU_KEYS ? attn_page_of<true>(a, t->row, at, t->pos + 1) : -1;
}
/* Four dimensions of a head, rotated. */
static __device__ __forceinline__ void chain_turn(float x[4], uint4 v, float4 turn) {
    const float2 lo = attn_turn(__uint_as_float(v.x), __uint_as_float(v.y), make_float2(turn.x, turn.y));
    const float2 hi = attn_turn(__uint_as_float(v.z), __uint_as_float(v.w), make_float2(turn.z, turn.w));
    x[0] = lo.x, x[1] = lo.y, x[2] = hi.x, x[3] = hi.y;
}

#endif
