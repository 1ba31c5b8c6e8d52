/* Attention's doors: rotation and the store of keys and values, the step's lists, and the launch of the two kernels
 * that attend (cu_attn_decode.cu: sequences with few rows, cut along their keys; cu_attn_prefill.cu: the others). The
 * order of their sums is drawn in cu_attn.cuh.
 *
 * Lists are made on the device, because a captured graph runs with lengths that its capture did not know. */
#include "backend/cuda/cu_attn.cuh"

#include <float.h>
#include <math.h>

/* ---- rotation and store ------------------------------------------------------------------------------------------ */

typedef struct rope_args {
    float *qkv;
    cu_bf16 *q_out;
    const float *inv_freq;
    unsigned char *kv; /* keys of the layer, head 0 */
    int64_t page_bytes, plane_bytes, value;
    int32_t scale_at, n_page_cell, n_head, n_kv_head;
    const int32_t *pos, *cell;
    bool write_back;
} rope_args;

/* One vector of C numbers, `per` a lane, as codes and a scale: quant_act_int8 with one group. */
template <int per>
static __device__ __forceinline__ void store_codes(unsigned char *to, float *scale_to, const float x[per], bool mine) {
    float amax = 0.0f;
    bool good = true;
#pragma unroll
    for (int i = 0; i < per; i++) {
        good = good && fabsf(x[i]) <= FLT_MAX;
        amax = fmaxf(amax, fabsf(x[i]));
    }
    good = __all_sync(0xffffffffu, good);
    for (int d = 16; d > 0; d >>= 1) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
    float scale = __fdiv_rn(amax, 127.0f), f = amax > 0.0f ? __fdiv_rn(127.0f, amax) : 0.0f;
    if (scale < 0x1p-100f) f = scale = 0.0f;
    if (!good) {
        f = 0.0f;
        scale = __int_as_float(0x7fc00000);
    }
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < per; i++)
        if (f > 0.0f) word |= ((uint32_t)__float2int_rn(__fmul_rn(x[i], f)) & 0xffu) << (8 * i);
    if (!mine) return;
    if (per == 4)
        *(uint32_t *)to = word;
    else
        *(uint16_t *)to = (uint16_t)word;
    if ((threadIdx.x & 31) == 0) *scale_to = scale;
}

/* A block a row, a warp a head, `per` neighbouring dimensions a lane. */
template <int C, bool I8> static __global__ void __launch_bounds__(256) rope_kernel(const rope_args a) {
    constexpr int per = C >= 128 ? 4 : 2;
    __shared__ float2 turn[C / 2];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int32_t row = blockIdx.x, H = a.n_head, G = a.n_kv_head, n = H + 2 * G;
    attn_wait_launch();
    if (threadIdx.x < C / 2) {
        float s, c;
        sincosf(__fmul_rn((float)a.pos[row], a.inv_freq[threadIdx.x]), &s, &c);
        turn[threadIdx.x] = make_float2(c, s);
    }
    const int32_t cell = a.cell[row];
    __syncthreads();
    const bool mine = lane * per < C;
    const int first = mine ? lane * per : 0;
    unsigned char *page = NULL;
    int64_t at = 0;
    if (cell >= 0) {
        const int32_t nth = cell / a.n_page_cell;
        at = cell - nth * a.n_page_cell;
        page = a.kv + nth * a.page_bytes;
    }
    for (int h = warp; h < n; h += 8) {
        float *from = a.qkv + ((int64_t)row * n + h) * C + first, x[per];
        if (per == 4) {
            const float4 d = *(const float4 *)from;
            x[0] = d.x, x[1] = d.y, x[per - 2] = d.z, x[per - 1] = d.w;
        } else {
            const float2 d = *(const float2 *)from;
            x[0] = d.x, x[1] = d.y;
        }
        if (h < H + G) {
#pragma unroll
            for (int i = 0; i < per; i += 2) {
                const float2 cs = turn[(first + i) / 2];
                const float even = x[i], odd = x[i + 1];
                x[i] = __fsub_rn(__fmul_rn(even, cs.x), __fmul_rn(odd, cs.y));
                x[i + 1] = __fadd_rn(__fmul_rn(odd, cs.x), __fmul_rn(even, cs.y));
            }
            if (a.write_back && mine)
                for (int i = 0; i < per; i++) from[i] = x[i];
        }
        if (!mine)
            for (int i = 0; i < per; i++) x[i] = 0.0f;
        unsigned char *to;
        if (h < H) {
            to = (unsigned char *)(a.q_out + ((int64_t)row * H + h) * C + first);
        } else {
            if (!page) continue; /* a row that only fills a graph */
            unsigned char *plane = page + (h < H + G ? (h - H) * a.plane_bytes : (h - H - G) * a.plane_bytes + a.value);
            if (I8) {
                store_codes<per>(plane + at * C + first, (float *)(plane + a.scale_at) + at, x, mine);
                continue;
            }
            to = plane + (at * C + first) * 2;
        }
        if (!mine) continue;
        if (per == 4)
            *(uint2 *)to = make_uint2(cu_round2(x[0], x[1]), cu_round2(x[per - 2], x[per - 1]));
        else
            *(uint32_t *)to = cu_round2(x[0], x[1]);
    }
}

static int32_t plane_cells(const cu_cache *c) { return (c->n_page_cell + 15) / 16 * 16; }

cudaError_t cu_rope_store(cudaStream_t s, float *qkv, bool write_back, cu_bf16 *q_out, const float *inv_freq,
                          const cu_cache *c, int32_t layer, const cu_seqs *seqs) {
    rope_args a = {};
    a.qkv = qkv;
    a.q_out = q_out;
    a.inv_freq = inv_freq;
    a.kv = c->kv + (int64_t)layer * 2 * c->n_kv_head * c->plane_bytes;
    a.page_bytes = c->page_bytes;
    a.plane_bytes = c->plane_bytes;
    a.value = c->n_kv_head * c->plane_bytes;
    a.scale_at = plane_cells(c) * c->n_head_dim;
    a.n_page_cell = c->n_page_cell;
    a.n_head = c->n_head;
    a.n_kv_head = c->n_kv_head;
    a.pos = seqs->pos;
    a.cell = seqs->cell;
    a.write_back = write_back;
    const bool i8 = c->dtype == ERN_KV_I8;
    const uint32_t n = (uint32_t)seqs->n_row;
    switch (c->n_head_dim * 2 + i8) {
    case 32: rope_kernel<16, false><<<n, 256, 0, s>>>(a); break;
    case 33: rope_kernel<16, true><<<n, 256, 0, s>>>(a); break;
    case 128: rope_kernel<64, false><<<n, 256, 0, s>>>(a); break;
    case 129: rope_kernel<64, true><<<n, 256, 0, s>>>(a); break;
    case 256: rope_kernel<128, false><<<n, 256, 0, s>>>(a); break;
    case 257: rope_kernel<128, true><<<n, 256, 0, s>>>(a); break;
    default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

/* ---- the step's lists -------------------------------------------------------------------------------------------- */

enum { PLANNERS = 1024, BINS = 1024 };

typedef struct plan_args {
    int32_t n_row, n_seq, group, n_kv_head, blocks; /* blocks of the grid for short sequences */
    const int32_t *pos, *row0, *kv_len;
    int32_t *row_seq, *work;
} plan_args;

/* Sum of x over the threads before this one; *all: over all. */
static __device__ int32_t sum_before(int32_t x, int32_t *all, int32_t *warp_sum) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int32_t sum = x;
    for (int d = 1; d < 32; d <<= 1) {
        const int32_t other = __shfl_up_sync(0xffffffffu, sum, d);
        if (lane >= d) sum += other;
    }
    if (lane == 31) warp_sum[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        int32_t w = warp_sum[lane];
        for (int d = 1; d < 32; d <<= 1) {
            const int32_t other = __shfl_up_sync(0xffffffffu, w, d);
            if (lane >= d) w += other;
        }
        warp_sum[lane] = w;
    }
    __syncthreads();
    sum += warp ? warp_sum[warp - 1] : 0;
    *all = warp_sum[31];
    __syncthreads();
    return sum - x;
}

/* Packed rows of a sequence; 0 when there is nothing to do. */
static __device__ __forceinline__ int32_t packed_rows(const plan_args *a, int32_t s) {
    return a->kv_len[s] > 0 ? (a->row0[s + 1] - a->row0[s]) * a->group : 0;
}

/* Short sequences: how many first tiles one block joins by itself. Every (sequence, head) has one run, and the runs
 * come first; with seven eighths of a block's share of all tiles in runs, single tiles even out the rest, and little
 * goes through scratch. Any number gives the same bits. */
static __device__ __forceinline__ int32_t run_tiles(int64_t n_tile, int64_t n_run, int64_t n_block) {
    if (n_run == 0) return 1;
    const int64_t most = (n_run + n_block - 1) / n_block, run = n_tile * 7 / (8 * n_block * most);
    return run < 1 ? 1 : (int32_t)run;
}

static __device__ void plan_short(const plan_args *a, int32_t *warp_sum) {
    __shared__ int32_t n_dec, n_tile, row_max;
    if (threadIdx.x == 0) n_dec = n_tile = row_max = 0;
    __syncthreads();
    for (int32_t s = threadIdx.x; s < a->n_seq; s += PLANNERS) {
        const int32_t n = packed_rows(a, s);
        if (n < 1 || n > ATTN_FEW) continue;
        atomicAdd(&n_dec, 1);
        atomicAdd(&n_tile, (a->kv_len[s] + CU_KEYS - 1) / CU_KEYS);
        atomicMax(&row_max, n);
    }
    __syncthreads();
    const int32_t G = a->n_kv_head, run = run_tiles((int64_t)n_tile * G, (int64_t)n_dec * G, a->blocks);
    int32_t before_dec = 0, before_single = 0;
    for (int32_t from = 0; from < a->n_seq; from += PLANNERS) {
        const int32_t s = from + threadIdx.x, n = s < a->n_seq ? packed_rows(a, s) : 0;
        const bool mine = n >= 1 && n <= ATTN_FEW;
        const int32_t tiles = mine ? (a->kv_len[s] + CU_KEYS - 1) / CU_KEYS : 0;
        int32_t all_dec, all_single;
        const int32_t k = before_dec + sum_before(mine, &all_dec, warp_sum);
        const int32_t single = before_single + sum_before(tiles > run ? (tiles - run) * G : 0, &all_single, warp_sum);
        if (mine) {
            attn_dec_seq(a->work)[k] = s;
            attn_prefix(a->work, a->n_seq)[k] = single;
        }
        if (s < a->n_seq) attn_dec_index(a->work, a->n_seq)[s] = mine ? k : -1;
        before_dec += all_dec;
        before_single += all_single;
    }
    if (threadIdx.x) return;
    attn_prefix(a->work, a->n_seq)[n_dec] = before_single;
    a->work[ATTN_N_DEC] = n_dec;
    a->work[ATTN_RUN] = run;
    a->work[ATTN_N_ITEM] = n_dec * G + before_single;
    a->work[ATTN_ROW_MAX] = row_max;
    a->work[ATTN_TAKEN] = a->work[ATTN_WIDE_TAKEN] = 0;
}

/* The others: tiles of rows, sorted by the keys that they walk, most first. The order inside a bin is that of arrival:
 * it moves work in time only. */
static __device__ void plan_wide(const plan_args *a, int32_t *warp_sum) {
    __shared__ int32_t place[BINS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    place[threadIdx.x] = 0;
    __syncthreads();
    for (int turn = 0; turn < 2; turn++) {
        for (int32_t s = warp; s < a->n_seq; s += PLANNERS / 32) {
            const int32_t n = packed_rows(a, s);
            if (n <= ATTN_FEW) continue;
            const int32_t pos0 = a->pos[a->row0[s]];
            for (int32_t i = lane; i * ATTN_ROWS < n; i += 32) {
                const int32_t last = min((i + 1) * ATTN_ROWS, n) - 1;
                const int32_t bin = BINS - 1 - min((pos0 + last / a->group) / CU_KEYS, BINS - 1);
                const int32_t at = atomicAdd(&place[bin], 1);
                if (turn == 0) continue;
                attn_wide(a->work, a->n_seq)[2 * at] = s;
                attn_wide(a->work, a->n_seq)[2 * at + 1] = i;
            }
        }
        __syncthreads();
        if (turn == 1) break;
        int32_t all;
        const int32_t mine = place[threadIdx.x], before = sum_before(mine, &all, warp_sum);
        place[threadIdx.x] = before;
        if (threadIdx.x == 0) a->work[ATTN_N_WIDE] = all;
        __syncthreads();
    }
}

/* Block 0 plans; the others fill row_seq. */
static __global__ void __launch_bounds__(PLANNERS) plan_kernel(const plan_args a) {
    __shared__ int32_t warp_sum[32];
    attn_wait_launch();
    if (blockIdx.x == 0) {
        plan_short(&a, warp_sum);
        plan_wide(&a, warp_sum);
        return;
    }
    const int32_t t = (blockIdx.x - 1) * PLANNERS + threadIdx.x;
    if (t >= a.n_row) return;
    int32_t low = 0, high = a.n_seq; /* row0[low] <= t; t < row0[high] or high is the end */
    while (high - low > 1) {
        const int32_t middle = (low + high) / 2;
        if (a.row0[middle] <= t)
            low = middle;
        else
            high = middle;
    }
    a.row_seq[t] = t < a.row0[low + 1] ? low : -1; /* -1: a row that only fills a graph */
}

int64_t cu_attn_work_count(int32_t n_row_max, int32_t n_seq_max) {
    return ATTN_HEAD + 3 * (int64_t)n_seq_max + 1 + 2 * attn_wide_max(n_row_max, n_seq_max);
}

int64_t cu_attn_scratch_bytes(const cu_cache *c, int32_t n_row_max, int32_t n_seq_max, int32_t n_len_max,
                              int64_t limit_bytes) {
    const int64_t tiles = (n_len_max + CU_KEYS - 1) / CU_KEYS, group = c->n_head / c->n_kv_head;
    const int64_t few = ATTN_FEW, rows = n_row_max * group < few ? n_row_max * group : few;
    const int64_t bytes = tiles * n_seq_max * c->n_kv_head * rows * (c->n_head_dim + 2) * (int64_t)sizeof(float);
    return bytes < limit_bytes ? bytes : limit_bytes;
}

int32_t attn_sm_count(void) {
    static int32_t count[64];
    int device = 0, n = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 1;
    if (!count[device & 63])
        count[device & 63] =
            cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device) == cudaSuccess && n > 0 ? n : 1;
    return count[device & 63];
}

cudaError_t cu_attn_plan(cudaStream_t s, const cu_cache *c, const cu_seqs *seqs) {
    plan_args a = {};
    a.n_row = seqs->n_row;
    a.n_seq = seqs->n_seq;
    a.group = c->n_head / c->n_kv_head;
    a.n_kv_head = c->n_kv_head;
    a.blocks = attn_decode_blocks(c->n_head_dim, c->dtype == ERN_KV_I8);
    a.pos = seqs->pos;
    a.row0 = seqs->row0;
    a.kv_len = seqs->kv_len;
    a.row_seq = seqs->row_seq;
    a.work = seqs->work;
    if (c->n_head % c->n_kv_head || a.group > ATTN_FEW) return cudaErrorInvalidValue;
    plan_kernel<<<(uint32_t)(1 + (seqs->n_row + PLANNERS - 1) / PLANNERS), PLANNERS, 0, s>>>(a);
    return cudaGetLastError();
}

cudaError_t cu_attend(cudaStream_t s, cu_bf16 *out, const cu_bf16 *q, const cu_cache *c, int32_t layer,
                      const cu_seqs *seqs, void *scratch, int64_t scratch_bytes, bool decode) {
    attn_args a = {};
    a.q = q;
    a.out = out;
    a.ldo = CU_PAD((int64_t)c->n_head * c->n_head_dim);
    a.kv = c->kv + (int64_t)layer * 2 * c->n_kv_head * c->plane_bytes;
    a.page_bytes = c->page_bytes;
    a.plane_bytes = c->plane_bytes;
    a.value = c->n_kv_head * c->plane_bytes;
    a.scale_at = plane_cells(c) * c->n_head_dim;
    a.n_page_cell = c->n_page_cell;
    a.n_kv_head = c->n_kv_head;
    a.n_head = c->n_head;
    a.group = c->n_head / c->n_kv_head;
    a.n_row = seqs->n_row;
    a.n_seq = seqs->n_seq;
    a.n_page_max = seqs->n_page_max;
    a.pos = seqs->pos;
    a.row0 = seqs->row0;
    a.kv_len = seqs->kv_len;
    a.page = seqs->page;
    a.row_seq = seqs->row_seq;
    a.work = seqs->work;
    a.scratch = (float *)scratch;
    a.n_scratch = scratch_bytes / (int64_t)sizeof(float);
    a.scale = (float)(1.4426950408889634 / sqrt((double)c->n_head_dim));
    const bool i8 = c->dtype == ERN_KV_I8;
    cudaError_t e = attn_decode(s, &a, c->n_head_dim, i8);
    if (e == cudaSuccess && !decode) e = attn_prefill(s, &a, c->n_head_dim, i8);
    return e;
}
