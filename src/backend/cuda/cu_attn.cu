/* Attention's doors: rotation and the store of keys and values, the step's lists, and the launch of the two kernels
 * that attend (cu_attn_decode.cu: sequences with few rows, cut along their keys; cu_attn_prefill.cu: the others). The
 * order of their sums is drawn in cu_attn.cuh.
 *
 * Lists are made on the device, because a captured graph runs with lengths that its capture did not know. */
#include "backend/cuda/cu_rope.cuh"

#include <math.h>

/* ---- rotation and store ------------------------------------------------------------------------------------------ */

/* A block a row, a warp a head, `per` neighbouring dimensions a lane; BATCH heads of a warp are on their way at once.
 */
template <int C, int CODES>
static __global__ void __launch_bounds__(256) rope_kernel(const rope_args a, float *qkv, bool write_back) {
    constexpr int per = C >= 128 ? 4 : 2, BATCH = 4;
    __shared__ float2 turn[C / 2];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int32_t row = blockIdx.x, H = a.n_head, G = a.n_kv_head, n = H + 2 * G;
    const bool mine = lane * per < C;
    const int first = mine ? lane * per : 0;
    float *from = qkv + (int64_t)row * n * C + first, x[BATCH][per];
    const auto load = [&](int h0) {
#pragma unroll
        for (int k = 0; k < BATCH; k++)
            if (h0 + 8 * k < n) attn_read<per>(x[k], from + (int64_t)(h0 + 8 * k) * C);
    };
    attn_wait_launch();
    load(warp);
    if (threadIdx.x < C / 2) turn[threadIdx.x] = a.turn[(int64_t)row * (C / 2) + threadIdx.x];
    const int32_t cell = a.cell[row];
    __syncthreads();
    int64_t at;
    unsigned char *page = rope_page(&a, cell, &at);
    for (int h0 = warp; h0 < n; h0 += 8 * BATCH) {
        if (h0 > warp) load(h0);
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            const int h = h0 + 8 * k;
            if (h >= n) break;
            if (h < H + G) {
#pragma unroll
                for (int i = 0; i < per; i += 2) {
                    const float2 turned = attn_turn(x[k][i], x[k][i + 1], turn[(first + i) / 2]);
                    x[k][i] = turned.x, x[k][i + 1] = turned.y;
                }
                if (write_back && mine)
                    for (int i = 0; i < per; i++) from[(int64_t)h * C + i] = x[k][i];
            }
            if (!mine)
                for (int i = 0; i < per; i++) x[k][i] = 0.0f;
            unsigned char *to;
            if (h < H) {
                to = (unsigned char *)(a.q_out + ((int64_t)row * H + h) * C + first);
            } else {
                if (!page) continue;
                unsigned char *plane = rope_plane(&a, page, h - H);
                if (CODES) {
                    float scale;
                    const uint32_t word = attn_codes<per, CODES>(x[k], &scale);
                    if (mine) attn_put_codes<per>(plane + at * C + first, word);
                    if (lane == 0) ((float *)(plane + a.scale_at))[at] = scale;
                    continue;
                }
                to = plane + (at * C + first) * 2;
            }
            if (mine) attn_put_bf16<per>(to, x[k]);
        }
    }
}

cudaError_t cu_rope_store(cudaStream_t s, float *qkv, bool write_back, const cu_rope *r) {
    const cu_cache *c = r->cache;
    rope_args a = rope_args_of(r);
    static const void *const kernels[][3] = {
        {(const void *)rope_kernel<16, 0>, (const void *)rope_kernel<16, ATTN_I8>,
         (const void *)rope_kernel<16, ATTN_F8>},
        {(const void *)rope_kernel<64, 0>, (const void *)rope_kernel<64, ATTN_I8>,
         (const void *)rope_kernel<64, ATTN_F8>},
        {(const void *)rope_kernel<128, 0>, (const void *)rope_kernel<128, ATTN_I8>,
         (const void *)rope_kernel<128, ATTN_F8>},
    };
    const int32_t C = c->n_head_dim;
    if (C != 16 && C != 64 && C != 128) return cudaErrorInvalidValue;
    const void *fn = kernels[C / 64][attn_codes_of(c->dtype)];
    void *args[] = {&a, &qkv, &write_back};
    return cu_launch(s, fn, dim3((unsigned)r->seqs->n_row), 256, 0, true, 1, args);
}

/* ---- the step's lists -------------------------------------------------------------------------------------------- */

enum { PLANNERS = 1024, BINS = 1024 };

typedef struct plan_args {
    int32_t n_row, n_seq, group, n_kv_head, half; /* half: C / 2 */
    int32_t n_block;                              /* of the kernel for short sequences */
    int32_t n_core;                               /* multiprocessors */
    int32_t n_page_cell, n_page_max;
    const int32_t *pos, *row0, *kv_len, *page;
    const float *inv_freq;
    int32_t *work;
    float2 *turn;
} plan_args;

/* Sum of x over the threads before this one; *all: over all. */
static __device__ int64_t sum_before(int64_t x, int64_t *all, int64_t *warp_sum) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int64_t sum = x;
    for (int d = 1; d < 32; d <<= 1) {
        const int64_t other = __shfl_up_sync(0xffffffffu, sum, d);
        if (lane >= d) sum += other;
    }
    if (lane == 31) warp_sum[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        int64_t w = warp_sum[lane];
        for (int d = 1; d < 32; d <<= 1) {
            const int64_t other = __shfl_up_sync(0xffffffffu, w, d);
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

static __device__ __forceinline__ int32_t unit_tiles(const attn_short *u) { return (u->len + CU_KEYS - 1) / CU_KEYS; }
/* The unit of place x in the line of n_dec sequences, whose places begin at `begin`, `stride` bytes apart. */
static __device__ attn_short unit_at(const plan_args *a, int32_t x, int32_t n_dec, const int32_t *begin,
                                     int32_t stride) {
    int32_t low = 0, high = n_dec; /* the last that does not begin beyond x */
    while (high - low > 1) {
        const int32_t mid = (low + high) / 2;
        if (*(const int32_t *)((const char *)begin + (int64_t)mid * stride) <= x)
            low = mid;
        else
            high = mid;
    }
    attn_short one = attn_shorts(a->work)[low];
    one.head = (x - one.x0) / unit_tiles(&one);
    one.x0 += one.head * unit_tiles(&one);
    return one;
}
/* What each block begins with. */
static __device__ void plan_starts(const plan_args *a, int32_t n_tile, int32_t n_dec, int32_t n_block,
                                   const int32_t *begin, int32_t stride) {
    const attn_line line = attn_line_of(n_tile, n_dec * a->n_kv_head, n_block);
    static_assert(PLANNERS >= ATTN_BLOCKS_MOST, "a thread a block");
    if ((int32_t)threadIdx.x < line.n_block) {
        const int32_t x = attn_line_start(&line, threadIdx.x), stop = attn_line_start(&line, threadIdx.x + 1);
        attn_start *to = attn_starts(a->turn, a->n_row, 2 * a->half) + threadIdx.x;
        to->begin = unit_at(a, x, n_dec, begin, stride);
        to->last = unit_at(a, stop - 1, n_dec, begin, stride);
        const int32_t after = to->begin.x0 + unit_tiles(&to->begin), n_last = unit_tiles(&to->last);
        attn_short one = to->begin;
        if (to->last.x0 > x && to->last.x0 + n_last > stop && attn_line_hands(&line, to->last.x0, n_last))
            one = to->last;
        else if (x > one.x0 && attn_line_hands(&line, one.x0, after - one.x0))
            one = unit_at(a, after, n_dec, begin, stride); /* the stretch is longer */
        to->at = one;
        const int32_t first = max(x - one.x0, 0) * CU_KEYS / a->n_page_cell;
        for (int32_t i = 0; i < ATTN_START_PAGES; i++)
            to->page[i] = a->page[(int64_t)one.seq * a->n_page_max + min(first + i, a->n_page_max - 1)];
    }
}

/* Blocks for n_tile tiles of short sequences. A piece of a prompt leaves multiprocessors free: the short sequences get
 * these, at the same time, if they are done there before the piece is: it has n_wide tiles of rows, the longest of
 * which walks so many tiles of keys, and a tile of a short sequence takes as long as two of these at most. */
static __device__ int32_t plan_blocks(const plan_args *a, int32_t n_tile, int32_t n_wide, int32_t longest) {
    const int32_t left = a->n_core - n_wide * a->n_kv_head, n = left * (a->n_block / a->n_core);
    if (CU_PORTABLE || n_wide == 0 || n <= 0 || n_tile > (int64_t)left * longest / 2) return a->n_block;
    return n;
}

/* Short sequences; returns how many tiles of ATTN_ROWS_LESS rows the others have. */
static __device__ int32_t plan_short(const plan_args *a, int64_t *warp_sum) {
    __shared__ int32_t n_wide, longest, row_max, begin[PLANNERS];
    if (threadIdx.x == 0) n_wide = longest = row_max = 0;
    __syncthreads();
    int32_t before_dec = 0, before_tile = 0;
    for (int32_t from = 0; from < a->n_seq; from += PLANNERS) {
        const int32_t s = from + threadIdx.x;
        attn_short one = {};
        if (s < a->n_seq) {
            one.seq = s;
            one.len = a->kv_len[s];
            one.row0 = a->row0[s];
            one.n_row = one.len > 0 ? (a->row0[s + 1] - one.row0) * a->group : 0;
        }
        const bool mine = one.n_row >= 1 && one.n_row <= ATTN_FEW;
        if (one.n_row > ATTN_FEW) {
            atomicAdd(&n_wide, (one.n_row + ATTN_ROWS_LESS - 1) / ATTN_ROWS_LESS);
            atomicMax(&longest, (one.len + CU_KEYS - 1) / CU_KEYS);
        }
        if (mine) one.pos0 = a->pos[one.row0];
        const int32_t tiles = mine ? (one.len + CU_KEYS - 1) / CU_KEYS : 0;
        const int32_t most_rows = __reduce_max_sync(0xffffffffu, mine ? one.n_row : 0);
        if ((threadIdx.x & 31) == 0 && most_rows > 0) atomicMax(&row_max, most_rows);
        int64_t all; /* two sums at once */
        const int64_t before = sum_before((int64_t)mine << 40 | (int64_t)tiles * a->n_kv_head, &all, warp_sum);
        one.k = before_dec + (int32_t)(before >> 40);
        one.x0 = before_tile + (int32_t)before;
        if (mine) attn_shorts(a->work)[one.k] = one;
        if (mine && one.k < PLANNERS) begin[one.k] = one.x0;
        before_dec += (int32_t)(all >> 40);
        before_tile += (int32_t)all;
    }
    const int32_t n_block = plan_blocks(a, before_tile, n_wide, longest);
    if (threadIdx.x == 0) *(int4 *)a->work = make_int4(before_dec, before_tile, row_max, n_block); /* ATTN_N_DEC .. */
    __syncthreads();
    if (before_dec <= PLANNERS)
        plan_starts(a, before_tile, before_dec, n_block, begin, (int32_t)sizeof *begin);
    else
        plan_starts(a, before_tile, before_dec, n_block, &attn_shorts(a->work)->x0, (int32_t)sizeof(attn_short));
    return n_wide;
}

/* The others: tiles of so many rows, sorted by the keys that they walk, most first. The order inside a bin is that of
 * arrival: it moves work in time only. */
static __device__ void plan_wide(const plan_args *a, int32_t rows, int64_t *warp_sum) {
    __shared__ int32_t place[BINS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    place[threadIdx.x] = 0;
    __syncthreads();
    for (int turn = 0; turn < 2; turn++) {
        for (int32_t s = warp; s < a->n_seq; s += PLANNERS / 32) {
            const int32_t n = packed_rows(a, s);
            if (n <= ATTN_FEW) continue;
            const int32_t pos0 = a->pos[a->row0[s]];
            for (int32_t i = lane; i * rows < n; i += 32) {
                const int32_t last = min((i + 1) * rows, n) - 1;
                const int32_t bin = BINS - 1 - min((pos0 + last / a->group) / CU_KEYS, BINS - 1);
                const int32_t at = atomicAdd(&place[bin], 1);
                if (turn == 0) continue;
                attn_wide(a->work, a->n_seq)[2 * at] = s;
                attn_wide(a->work, a->n_seq)[2 * at + 1] = i;
            }
        }
        __syncthreads();
        if (turn == 1) break;
        int64_t all;
        const int64_t before = sum_before(place[threadIdx.x], &all, warp_sum);
        place[threadIdx.x] = (int32_t)before;
        if (threadIdx.x == 0) a->work[ATTN_N_WIDE] = (int32_t)all;
        __syncthreads();
    }
}

/* Block 0 plans; the others turn positions into angles. No cu_launch_next: kernels behind this one begin when all of it
 * is done, so that they may read it before their own wait. */
static __global__ void __launch_bounds__(PLANNERS) plan_kernel(const plan_args a) {
    __shared__ int64_t warp_sum[32];
    if (blockIdx.x == 0) {
        const int32_t n_wide = plan_short(&a, warp_sum);
        const int32_t rows = n_wide * a.n_kv_head <= a.n_core ? ATTN_ROWS_LESS : ATTN_ROWS;
        if (threadIdx.x == 0) a.work[ATTN_N_WIDE] = a.work[ATTN_WIDE_TAKEN] = a.work[ATTN_WIDE_DONE] = 0;
        if (threadIdx.x == 0) a.work[ATTN_WIDE_ROWS] = rows;
        if (n_wide) plan_wide(&a, rows, warp_sum);
        __threadfence();
        return;
    }
    const int64_t n = (blockIdx.x - 1) * (int64_t)PLANNERS + threadIdx.x;
    const int32_t row = (int32_t)(n / a.half), i = (int32_t)(n - row * (int64_t)a.half);
    if (row < a.n_row) a.turn[n] = attn_angle(a.pos[row], a.inv_freq[i]);
    __threadfence();
}

int64_t cu_attn_work_count(const cu_cache *c, int32_t n_row_max, int32_t n_seq_max) {
    const attn_start *starts = attn_starts(attn_turns(NULL, n_row_max, n_seq_max), n_row_max, c->n_head_dim);
    return (const int32_t *)(starts + ATTN_BLOCKS_MOST) - (const int32_t *)NULL;
}

int64_t cu_attn_scratch_bytes(const cu_cache *c, int32_t n_row_max, int32_t n_seq_max, int32_t n_len_max,
                              int64_t limit_bytes) {
    const int64_t tiles = (n_len_max + CU_KEYS - 1) / CU_KEYS, group = c->n_head / c->n_kv_head;
    const int32_t rows = n_row_max * group < ATTN_FEW ? (int32_t)(n_row_max * group) : ATTN_FEW;
    const int64_t bytes =
        attn_decode_floats(tiles * n_seq_max * c->n_kv_head, (int64_t)n_seq_max * c->n_kv_head, rows, c->n_head_dim) *
        (int64_t)sizeof(float);
    return bytes < limit_bytes ? bytes : limit_bytes;
}

int32_t attn_sm_count(void) {
    int32_t n;
    return cu_core_count(&n) == cudaSuccess && n > 0 ? n : 1;
}

cudaError_t cu_attn_plan(cudaStream_t s, const cu_cache *c, const cu_seqs *seqs, const float *inv_freq) {
    plan_args a = {};
    a.n_row = seqs->n_row;
    a.n_seq = seqs->n_seq;
    a.group = c->n_head / c->n_kv_head;
    a.n_kv_head = c->n_kv_head;
    a.half = c->n_head_dim / 2;
    a.n_core = attn_sm_count();
    a.n_block = attn_decode_blocks(c->n_head_dim, attn_codes_of(c->dtype), (int64_t)seqs->n_seq * c->n_kv_head);
    a.pos = seqs->pos;
    a.row0 = seqs->row0;
    a.kv_len = seqs->kv_len;
    a.n_page_cell = c->n_page_cell;
    a.n_page_max = seqs->n_page_max;
    a.page = seqs->page;
    a.inv_freq = inv_freq;
    a.work = seqs->work;
    a.turn = attn_turns(seqs->work, seqs->n_row, seqs->n_seq);
    if (c->n_head % c->n_kv_head || a.group > ATTN_FEW) return cudaErrorInvalidValue;
    const int64_t n_angle = (int64_t)seqs->n_row * a.half;
    plan_kernel<<<(uint32_t)(1 + (n_angle + PLANNERS - 1) / PLANNERS), PLANNERS, 0, s>>>(a);
    return cudaGetLastError();
}

bool attn_args_of(attn_args *out, const cu_cache *c, int32_t layer, const cu_seqs *seqs) {
    attn_args a = {};
    a.ldo = CU_PAD((int64_t)c->n_head * c->n_head_dim);
    a.kv = c->kv + (int64_t)layer * 2 * c->n_kv_head * c->plane_bytes;
    a.page_bytes = c->page_bytes;
    a.plane_bytes = c->plane_bytes;
    a.value = c->n_kv_head * c->plane_bytes;
    a.scale_at = attn_plane_cells(c) * c->n_head_dim;
    a.n_page_cell = c->n_page_cell;
    a.per_group = (255 + (uint32_t)(c->n_head / c->n_kv_head)) / (uint32_t)(c->n_head / c->n_kv_head);
    a.per_page = (0x7fffffffu + (uint32_t)c->n_page_cell) / (uint32_t)c->n_page_cell;
    if ((int64_t)(seqs->n_page_max + CU_KEYS) * c->n_page_cell * c->n_page_cell >= INT32_MAX) return false;
    a.n_kv_head = c->n_kv_head;
    a.n_head = c->n_head;
    a.group = c->n_head / c->n_kv_head;
    a.n_row = seqs->n_row;
    a.n_seq = seqs->n_seq;
    a.n_page_max = seqs->n_page_max;
    a.pos = seqs->pos;
    a.cell = seqs->cell;
    a.row0 = seqs->row0;
    a.kv_len = seqs->kv_len;
    a.page = seqs->page;
    a.work = seqs->work;
    a.turn = attn_turns(seqs->work, seqs->n_row, seqs->n_seq);
    a.scale = (float)(1.4426950408889634 / sqrt((double)c->n_head_dim));
    *out = a;
    return true;
}

cudaError_t cu_attend(cudaStream_t s, cu_bf16 *out, const cu_bf16 *q, const float *qkv, const cu_cache *c,
                      int32_t layer, const cu_seqs *seqs, void *scratch, int64_t scratch_bytes, bool decode) {
    attn_args a;
    if ((!q && !decode) || !attn_args_of(&a, c, layer, seqs)) return cudaErrorInvalidValue;
    a.q = q;
    a.qkv = q ? NULL : qkv;
    a.out = out;
    a.scratch = (float *)scratch;
    a.n_scratch = scratch_bytes / (int64_t)sizeof(float);
    const int codes = attn_codes_of(c->dtype);
    a.behind = !decode;
    cudaError_t e = decode ? cudaSuccess : attn_prefill(s, &a, c->n_head_dim, codes);
    return e != cudaSuccess ? e : attn_decode(s, &a, c->n_head_dim, codes);
}

cudaError_t cu_attend_codes(cudaStream_t s, const cu_x8 *out, cu_codes codes, const cu_bf16 *q, const cu_cache *c,
                            int32_t layer, const cu_seqs *seqs) {
    attn_args a;
    if (CU_PORTABLE) return cudaErrorNotSupported;
    if (!cu_attend_codes_fits(c) || codes == CU_CODES_NONE || !attn_args_of(&a, c, layer, seqs))
        return cudaErrorInvalidValue;
    a.q = q;
    a.out8 = *out;
    a.out_codes = codes;
    return attn_prefill(s, &a, c->n_head_dim, attn_codes_of(c->dtype));
}
