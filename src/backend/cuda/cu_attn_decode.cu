/* Attention of sequences with few rows (all rows of a KV head's group fit 16), one kernel: the tiles of all sequences
 * and heads lie in a line, and every block of four warps takes its stretch of it, cut where it may be. A stretch has
 * parts, one a sequence and head: a part that holds all of the sequence's tiles goes to the output; the part with the
 * first tiles joins them and leaves that in scratch, and later tiles leave their own results there, each by itself; the
 * block that is done with its part last joins them in order.
 *
 * In a step of such sequences alone the kernel also rotates q and k and stores k and v (a->qkv). It is launched early:
 * keys and values of earlier steps are on their way before the kernel that makes q, k and v is done.
 *
 * Bound by memory: while the block works on a tile's keys its values are on their way, and the next tile's keys while
 * it works on the values; several blocks share a multiprocessor.
 *
 * A tile, by warp w: scores of 16 rows and keys 32 w .. 32 w + 31; maxima meet in shared memory; weights go there as
 * bf16; then dimensions w * C/4 .. of O over all 128 keys in order. */
#include "backend/cuda/cu_attn_tile.cuh"

enum { THREADS = 128, WARPS = 4, BLOCKS_MOST = 640 };
enum { JOIN_FEW = 16, HELP_POLLS = 2000 }; /* pieces that one block joins by itself; how often a helper looks */

template <int C, bool I8> struct decode_shape : tile_shape<C, I8, WARPS> {
    static constexpr int blocks = !I8 && C == 128 ? 3 : 4;           /* on a multiprocessor */
    static constexpr int told_at = tile_shape<C, I8, WARPS>::end_at; /* what one thread tells the others */
    static constexpr int bytes = told_at + 32;
    static constexpr int q_turns = (ATTN_FEW * (C / 8) + THREADS - 1) / THREADS; /* chunks of q of a thread */
};

/* Floats of a slot, which is copied by 16 bytes: [row_max][2] M and L, [row_max][C] Acc. C is a multiple of 4. */
static __host__ __device__ __forceinline__ int32_t slot_floats(int32_t row_max, int32_t C) {
    return (2 * row_max + 3) / 4 * 4 + row_max * C;
}

/* The stretches: the first `more` blocks have each + 1 tiles, the others each. */
typedef struct stretch {
    int32_t n_tile, n_block, each, more;
    int32_t cap;           /* slots of a block: the tiles of a part without a first tile, and last the part with one */
    int32_t row_max, slot; /* floats of a slot */
    bool cut; /* false: slots do not fit scratch, and a block takes all tiles of those whose first is in its stretch */
} stretch;

static __device__ __forceinline__ stretch stretch_of(const attn_args *a, int C) {
    const int4 head = __ldcg((const int4 *)a->work); /* ATTN_N_DEC, ATTN_N_TILE, ATTN_ROW_MAX, ATTN_LONGEST */
    stretch s = {};
    s.n_tile = head.y;
    s.n_block = min((int32_t)gridDim.x, s.n_tile);
    s.each = s.n_tile / max(s.n_block, 1);
    s.more = s.n_tile - s.each * s.n_block;
    s.cap = min(s.each + (s.more > 0), head.w) + 1;
    s.row_max = head.z;
    s.slot = slot_floats(s.row_max, C);
    s.cut = (int64_t)s.n_block * s.cap * s.slot <= a->n_scratch;
    return s;
}
static __device__ __forceinline__ int32_t stretch_start(const stretch *s, int32_t block) {
    return block * s->each + min(block, s->more);
}
static __device__ __forceinline__ int32_t stretch_block(const stretch *s, int32_t x) {
    const int32_t longer = s->more * (s->each + 1);
    return x < longer ? x / (s->each + 1) : s->more + (x - longer) / s->each;
}
/* A sequence and head. */
typedef struct unit {
    int32_t k, head; /* place among the short sequences */
    int32_t seq, len, row0, n_row, pos0;
    int32_t n_tile, x0; /* tiles; place of the first in the line */
} unit;

/* Head 0 of short sequence k. */
static __device__ __forceinline__ unit unit_of(const attn_args *a, int32_t k) {
    const int4 *from = (const int4 *)(attn_shorts(a->work) + k), lo = __ldcg(from), hi = __ldcg(from + 1);
    unit u = {};
    u.k = k;
    u.seq = lo.x, u.len = lo.y, u.row0 = lo.z, u.n_row = lo.w, u.pos0 = hi.x;
    u.n_tile = (u.len + CU_KEYS - 1) / CU_KEYS;
    u.x0 = hi.y;
    return u;
}
static __device__ __forceinline__ unit unit_after(const attn_args *a, const unit *u) {
    if (u->head + 1 == a->n_kv_head) return unit_of(a, u->k + 1);
    unit next = *u;
    next.head++;
    next.x0 += u->n_tile;
    return next;
}
/* The last short sequence whose first tile is not beyond x; by a whole warp, 32 at a time. */
static __device__ __forceinline__ int32_t find_short(const attn_args *a, int32_t x, int lane) {
    int32_t low = 0, count = __ldcg(a->work + ATTN_N_DEC);
    while (count > 1) {
        const int32_t step = (count + 31) / 32, at = lane * step;
        const bool good = at < count && __ldcg(&attn_shorts(a->work)[low + at].before) <= x;
        const int32_t i = __popc(__ballot_sync(0xffffffffu, good)) - 1;
        low += i * step;
        count = min(step, count - i * step);
    }
    return low;
}

/* Keys and values (kinds 2), keys or values (1, from `kind` on) of this step in a tile: rotated, to their cells and to
 * shared memory; a warp a row. scales [][CU_KEYS]: in shared memory, of the first kind and the next. */
template <int C, bool I8>
static __device__ __forceinline__ void make_rows(const attn_args *a, unsigned char *smem, float *scales, int kind,
                                                 int kinds, const unit *u, int32_t tile) {
    typedef decode_shape<C, I8> sh;
    constexpr int per = C >= 128 ? 4 : 2;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const bool mine = lane * per < C;
    const int32_t first = mine ? lane * per : 0, begin = tile * CU_KEYS - u->pos0;
    const int32_t end = min(attn_token(a, u->n_row - 1) + 1, begin + CU_KEYS);
#pragma unroll 1
    for (int32_t i = max(begin, 0) * kinds + warp; i < end * kinds; i += WARPS) {
        const int32_t t = kinds == 2 ? i / 2 : i, which = kinds == 2 ? i % 2 : kind;
        const int32_t row = u->row0 + t, head = a->n_head + which * a->n_kv_head + u->head, at = t - begin;
        const int32_t cell = a->cell[row];
        float x[per], turn[per];
        attn_read<per>(x, a->qkv + ((int64_t)row * (a->n_head + 2 * a->n_kv_head) + head) * C + first);
        if (which == 0) {
            attn_read<per>(turn, (const float *)(a->turn + (int64_t)row * (C / 2)) + first);
#pragma unroll
            for (int i = 0; i < per; i += 2) {
                const float2 turned = attn_turn(x[i], x[i + 1], make_float2(turn[i], turn[i + 1]));
                x[i] = turned.x, x[i + 1] = turned.y;
            }
        }
        if (!mine)
            for (int i = 0; i < per; i++) x[i] = 0.0f;
        const int32_t nth = cell / a->n_page_cell, in_page = cell - nth * a->n_page_cell, byte = first * (I8 ? 1 : 2);
        unsigned char *plane = a->kv + nth * a->page_bytes + u->head * a->plane_bytes + which * a->value;
        unsigned char *to = plane + (int64_t)in_page * sh::row_bytes + byte;
        unsigned char *near = smem + (which ? sh::v_at : sh::k_at) + attn_at<sh::chunks>(at, byte / 16) + byte % 16;
        if (I8) {
            float scale;
            const uint32_t word = attn_codes<per>(x, &scale);
            if (mine) attn_put_codes<per>(near, word);
            if (mine && cell >= 0) attn_put_codes<per>(to, word);
            if (lane == 0) scales[(which - kind) * CU_KEYS + at] = scale;
            if (lane == 0 && cell >= 0) ((float *)(plane + a->scale_at))[in_page] = scale;
        } else if (mine) {
            attn_put_bf16<per>(near, x);
            if (cell >= 0) attn_put_bf16<per>(to, x);
        }
    }
}

/* Eight numbers of a row of q; I8: in the order of the codes, places of cu_attn.cuh. */
template <int C, bool I8> static __device__ __forceinline__ void put_q(unsigned char *smem, int r, int chunk, uint4 x) {
    typedef decode_shape<C, I8> sh;
    unsigned char *q = smem + sh::q_at;
    if (!I8) {
        *(uint4 *)(q + attn_at<sh::q_chunks>(r, chunk)) = x;
        return;
    }
    const int half = chunk & 1 ? 8 : 0;
    *(uint2 *)(q + attn_at<sh::q_chunks>(r, chunk & ~1) + half) =
        make_uint2(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410));
    *(uint2 *)(q + attn_at<sh::q_chunks>(r, chunk | 1) + half) =
        make_uint2(__byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632));
}

/* Angles of a thread's chunks of q. */
template <int C, bool I8>
static __device__ __forceinline__ void q_turns(const attn_args *a, const unit *u, float4 turn[][2]) {
    typedef decode_shape<C, I8> sh;
#pragma unroll
    for (int i = 0; i < sh::q_turns; i++) {
        const int n = threadIdx.x + i * THREADS, r = n / sh::q_chunks, chunk = n % sh::q_chunks;
        const int32_t row = u->row0 + (r < u->n_row ? attn_token(a, r) : 0);
        const float4 *from = (const float4 *)(a->turn + (int64_t)row * (C / 2) + chunk * 4);
        turn[i][0] = from[0], turn[i][1] = from[1];
    }
}
/* The chunks as they are. */
template <int C, bool I8>
static __device__ __forceinline__ void read_q(const attn_args *a, const unit *u, float4 x[][2]) {
    typedef decode_shape<C, I8> sh;
#pragma unroll
    for (int i = 0; i < sh::q_turns; i++) {
        const int n = threadIdx.x + i * THREADS, r = n / sh::q_chunks, chunk = n % sh::q_chunks;
        const int32_t safe = r < u->n_row ? r : 0, t = attn_token(a, safe),
                      h = u->head * a->group + safe - t * a->group;
        const int64_t row = (int64_t)(u->row0 + t) * (a->n_head + 2 * a->n_kv_head) + h;
        const float4 *from = (const float4 *)(a->qkv + row * C + chunk * 8);
        x[i][0] = from[0], x[i][1] = from[1];
    }
}
/* Rows of q, rotated; those that the sequence lacks are zero. */
template <int C, bool I8>
static __device__ __forceinline__ void make_q(const attn_args *a, unsigned char *smem, const unit *u,
                                              const float4 turn[][2], const float4 from[][2]) {
    typedef decode_shape<C, I8> sh;
#pragma unroll
    for (int i = 0; i < sh::q_turns; i++) {
        const int n = threadIdx.x + i * THREADS, r = n / sh::q_chunks, chunk = n % sh::q_chunks;
        if (n >= ATTN_FEW * sh::q_chunks) break;
        uint4 out = make_uint4(0, 0, 0, 0);
        if (r < u->n_row) {
            const float4 lo = from[i][0], hi = from[i][1];
            float2 x = attn_turn(lo.x, lo.y, make_float2(turn[i][0].x, turn[i][0].y));
            out.x = cu_round2(x.x, x.y);
            x = attn_turn(lo.z, lo.w, make_float2(turn[i][0].z, turn[i][0].w));
            out.y = cu_round2(x.x, x.y);
            x = attn_turn(hi.x, hi.y, make_float2(turn[i][1].x, turn[i][1].y));
            out.z = cu_round2(x.x, x.y);
            x = attn_turn(hi.z, hi.w, make_float2(turn[i][1].z, turn[i][1].w));
            out.w = cu_round2(x.x, x.y);
        }
        put_q<C, I8>(smem, r, chunk, out);
    }
}

/* Rows of q that are rotated already. */
template <int C, bool I8>
static __device__ __forceinline__ void load_q(const attn_args *a, unsigned char *smem, const unit *u) {
    typedef decode_shape<C, I8> sh;
#pragma unroll 1
    for (int n = threadIdx.x; n < ATTN_FEW * sh::q_chunks; n += THREADS) {
        const int r = n / sh::q_chunks, chunk = n % sh::q_chunks;
        const int32_t t = attn_token(a, r), h = u->head * a->group + r - t * a->group;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (r < u->n_row) x = *(const uint4 *)(a->q + ((int64_t)(u->row0 + t) * a->n_head + h) * C + chunk * 8);
        put_q<C, I8>(smem, r, chunk, x);
    }
}

/* Results of a part or tile: to out, or to a slot (>= 0). */
template <int C, bool I8>
static __device__ __forceinline__ void finish(const attn_args *a, const stretch *s, const unit *p, int32_t slot,
                                              const float acc[][2][4], const float M[2], const float L[2], int warp,
                                              int lane) {
    typedef decode_shape<C, I8> sh;
    const int g = lane >> 2, c = lane & 3;
    float *at = a->scratch + (int64_t)slot * s->slot;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = g + 8 * i;
        if (r >= p->n_row) continue;
        if (slot >= 0 && warp == 0 && c == 0) *(float2 *)(at + 2 * r) = make_float2(M[i], L[i]);
        const int32_t t = attn_token(a, r), h = p->head * a->group + r - t * a->group;
        cu_bf16 *out = a->out + (int64_t)(p->row0 + t) * a->ldo + (int64_t)h * C;
        float *part = at + s->slot + (r - s->row_max) * C;
#pragma unroll
        for (int u = 0; u < sh::warp_units; u++) {
            const int unit = warp * sh::warp_units + u;
            if (unit >= sh::units) continue;
            /* two pairs of dimensions that lie together */
            float x[4] = {acc[u][0][2 * i], acc[u][I8 ? 1 : 0][2 * i + (I8 ? 0 : 1)],
                          acc[u][I8 ? 0 : 1][2 * i + (I8 ? 1 : 0)], acc[u][1][2 * i + 1]};
            const int first = unit * 16 + (I8 ? 4 * c : 2 * c), second = first + (I8 ? 2 : 8);
            if (slot >= 0) {
                *(float2 *)(part + first) = make_float2(x[0], x[1]);
                *(float2 *)(part + second) = make_float2(x[2], x[3]);
            } else {
                *(uint32_t *)(out + first) = cu_round2(__fdiv_rn(x[0], L[i]), __fdiv_rn(x[1], L[i]));
                *(uint32_t *)(out + second) = cu_round2(__fdiv_rn(x[2], L[i]), __fdiv_rn(x[3], L[i]));
            }
        }
    }
}

/* What one thread tells the others: of the part that the block works on, the first block of its unit and how many
 * blocks have a part of it; then the launch (counts run on from one to the next) and whether the block is the last. */
enum { TOLD_FIRST, TOLD_PARTS, TOLD_LAUNCH, TOLD_LAST, TOLD_ALL };

static __device__ __forceinline__ void begin_part(const stretch *s, const unit *u, int32_t *told) {
    if (threadIdx.x > 0) return;
    told[TOLD_FIRST] = stretch_block(s, u->x0);
    told[TOLD_PARTS] = stretch_block(s, u->x0 + u->n_tile - 1) - told[TOLD_FIRST] + 1;
}
/* This block is done with its part. */
static __device__ __forceinline__ void arrive(int32_t *count, int32_t *told) {
    __syncthreads();
    if (threadIdx.x == 0) {
        int32_t before, parts = told[TOLD_PARTS];
        asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
        told[TOLD_LAUNCH] = before / parts;
        told[TOLD_LAST] = before - told[TOLD_LAUNCH] * parts == parts - 1;
    }
    __syncthreads();
}
/* Wait until all have arrived, but not for long: true if they have. */
static __device__ __forceinline__ bool all_arrived(const int32_t *count, int32_t n, int32_t *told) {
    if (threadIdx.x == 0) {
        int32_t now = 0;
        for (int i = 0; i < HELP_POLLS; i++) {
            asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(count) : "memory");
            if (now >= n) break;
            __nanosleep(50);
        }
        told[TOLD_ALL] = now >= n;
    }
    __syncthreads();
    return told[TOLD_ALL];
}

/* Join the results of a unit of many pieces: a warp 32 dimensions of a row, a lane a dimension. Warps of any block that
 * is still there take rows and dimensions by the counter `taken`; the last to arrive would do all alone. */
template <int C> static __device__ __noinline__ void join_many(const attn_args *a, stretch s, unit u, int32_t *taken) {
    const int lane = threadIdx.x & 31;
    constexpr int slices = C > 32 ? C / 32 : 1;
    const int32_t run = min(u.n_tile, stretch_start(&s, stretch_block(&s, u.x0) + 1) - u.x0);
    for (;;) {
        int32_t task = 0;
        if (lane == 0) task = atomicAdd(taken, 1);
        task = __shfl_sync(0xffffffffu, task, 0);
        if (task >= u.n_row * slices) break;
        const int32_t r = task / slices, t = attn_token(a, r), h = u.head * a->group + r - t * a->group;
        const int dim = task % slices * 32 + lane;
        /* piece 0 is the first tiles, piece i > 0 tile run + i - 1; as many as the row sees */
        const int32_t n_piece = max((u.pos0 + t) / CU_KEYS + 1 - run, 0) + 1;
        const float *acc_at = a->scratch + s.slot + (r - s.row_max) * C + (dim < C ? dim : 0);
        float M = -INFINITY, L = 0.0f, acc = 0.0f;
#pragma unroll 1
        for (int32_t from = 0; from < n_piece; from += 32) {
            /* Factors of 32 pieces at once: a largest value has no order. */
            const int32_t count = min(32, n_piece - from), mine = from + min(lane, count - 1);
            const int32_t x = mine ? u.x0 + run + mine - 1 : u.x0, block = stretch_block(&s, x);
            const int32_t slot = block * s.cap + (mine ? x - stretch_start(&s, block) : s.cap - 1);
            float2 ml = __ldcg((const float2 *)(a->scratch + (int64_t)slot * s.slot + 2 * r));
            float o[32];
#pragma unroll
            for (int j = 0; j < 32; j++) o[j] = __ldcg(acc_at + (int64_t)__shfl_sync(0xffffffffu, slot, j) * s.slot);
            if (lane >= count) ml = make_float2(-INFINITY, 0.0f);
            float up_to = fmaxf(M, ml.x);
            for (int d = 1; d < 32; d <<= 1) {
                const float other = __shfl_up_sync(0xffffffffu, up_to, d);
                if (lane >= d) up_to = fmaxf(up_to, other);
            }
            float before = __shfl_up_sync(0xffffffffu, up_to, 1), f, b;
            if (lane == 0) before = M;
            attn_factors(&before, ml.x, &f, &b);
            M = __shfl_sync(0xffffffffu, before, count - 1);
#pragma unroll
            for (int j = 0; j < 32; j++) {
                const float fj = __shfl_sync(0xffffffffu, f, j), bj = __shfl_sync(0xffffffffu, b, j);
                const float lj = __shfl_sync(0xffffffffu, ml.y, j);
                if (j >= count) continue;
                L = attn_join(L, lj, fj, bj);
                acc = attn_join(acc, o[j], fj, bj);
            }
        }
        if (dim < C) a->out[(int64_t)(u.row0 + t) * a->ldo + (int64_t)h * C + dim] = cu_round(__fdiv_rn(acc, L));
    }
}

/* Join the results of a unit, as many at a time as `room` bytes of shared memory hold; a thread four dimensions of a
 * row. */
template <int C>
static __device__ __forceinline__ void join(const attn_args *a, const stretch *s, const unit *u, int32_t first,
                                            unsigned char *smem, int32_t room) {
    constexpr int lanes = C / 4, rows = THREADS / lanes, passes = (ATTN_FEW + rows - 1) / rows;
    const int row = threadIdx.x / lanes, dim = threadIdx.x % lanes * 4;
    /* piece 0 is the first tiles, piece i > 0 tile run + i - 1 */
    const int32_t run = stretch_start(s, first + 1) - u->x0, n_piece = u->n_tile - run + 1, fit = room / (s->slot * 4);
    float M[passes], L[passes], acc[passes][4];
    int32_t seen[passes]; /* pieces that the row sees */
#pragma unroll
    for (int i = 0; i < passes; i++) {
        const int r = row + i * rows;
        M[i] = -INFINITY, L[i] = 0.0f;
        for (int e = 0; e < 4; e++) acc[i][e] = 0.0f;
        seen[i] = r < u->n_row ? max((u->pos0 + attn_token(a, r)) / CU_KEYS + 1 - run, 0) + 1 : 0;
    }
    int32_t block = first, nth = s->cap - 1; /* slot of the next piece */
#pragma unroll 1
    for (int32_t from = 0; from < n_piece; from += fit) {
        const int32_t count = min(fit, n_piece - from);
        if (from > 0) __syncthreads();
#pragma unroll 1
        for (int32_t p = 0; p < count; p++) {
            const float *at = a->scratch + (int64_t)(block * s->cap + nth) * s->slot;
            for (int32_t i = threadIdx.x * 4; i < s->slot; i += THREADS * 4)
                attn_copy16(attn_smem(smem) + (p * s->slot + i) * 4, at + i, true);
            nth++;
            if (block == first || nth == s->each + (block < s->more)) block++, nth = 0;
        }
        attn_copy_commit();
        attn_copy_wait<0>();
        __syncthreads();
#pragma unroll 2
        for (int32_t p = 0; p < count; p++) {
            const float *at = (const float *)smem + p * s->slot;
#pragma unroll
            for (int i = 0; i < passes; i++) {
                const int r = row + i * rows;
                if (from + p >= seen[i]) continue;
                const float2 ml = *(const float2 *)(at + 2 * r);
                const float4 o = *(const float4 *)(at + s->slot + (r - s->row_max) * C + dim);
                float f, b;
                attn_factors(&M[i], ml.x, &f, &b);
                L[i] = attn_join(L[i], ml.y, f, b);
                acc[i][0] = attn_join(acc[i][0], o.x, f, b), acc[i][1] = attn_join(acc[i][1], o.y, f, b);
                acc[i][2] = attn_join(acc[i][2], o.z, f, b), acc[i][3] = attn_join(acc[i][3], o.w, f, b);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < passes; i++) {
        const int32_t r = row + i * rows, t = attn_token(a, r), h = u->head * a->group + r - t * a->group;
        if (r >= u->n_row) continue;
        cu_bf16 *out = a->out + (int64_t)(u->row0 + t) * a->ldo + (int64_t)h * C + dim;
        *(uint2 *)out = make_uint2(cu_round2(__fdiv_rn(acc[i][0], L[i]), __fdiv_rn(acc[i][1], L[i])),
                                   cu_round2(__fdiv_rn(acc[i][2], L[i]), __fdiv_rn(acc[i][3], L[i])));
    }
}

template <int C, bool I8>
static __global__ void __launch_bounds__(THREADS, (decode_shape<C, I8>::blocks))
    decode_kernel(const __grid_constant__ attn_args a) {
    typedef decode_shape<C, I8> sh;
    extern __shared__ __align__(128) unsigned char smem[];
    int64_t *cells = (int64_t *)(smem + sh::cell_at);
    float *top = (float *)(smem + sh::top_at), *key_scale = (float *)(smem + sh::scale_at);
    int32_t *told = (int32_t *)(smem + sh::told_at);
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, c = lane & 3;
    const bool makes = a.qkv != NULL;

    cu_launch_next();
    if (!makes) {
        cu_wait_previous();
        if (blockIdx.x == 0 && tid == 0) a.work[ATTN_WIDE_TAKEN] = 0;
    }
    const stretch s = stretch_of(&a, C);
    if ((int32_t)blockIdx.x >= s.n_block) {
        if (blockIdx.x == 0) cu_wait_previous(); /* who waits for this kernel waits for those before */
        return;
    }
    const int32_t start = stretch_start(&s, blockIdx.x), stop = stretch_start(&s, blockIdx.x + 1);
    unit cur = unit_of(&a, find_short(&a, start, lane));
    cur.head = (start - cur.x0) / cur.n_tile;
    cur.x0 += cur.head * cur.n_tile;
    int32_t tile = start - cur.x0;
    if (!s.cut && tile > 0) {
        if (cur.x0 + cur.n_tile >= stop) return; /* block 0 stays */
        cur = unit_after(&a, &cur);
        tile = 0;
    }
    int32_t end = s.cut ? min(cur.n_tile, stop - cur.x0) : cur.n_tile;
    bool alone = tile > 0; /* each tile by itself */

    int turn = 0;
    {
        const int32_t at = tile * CU_KEYS + tid, count = cur.len - tile * CU_KEYS;
        const int32_t own = makes ? cur.pos0 - tile * CU_KEYS : CU_KEYS;
        const attn_cell cell =
            attn_cell_of<C, I8, true>(&a, attn_page_of<true>(&a, cur.seq, at, cur.len), cur.head, at);
        cells[tid] = max(cell.key, (int64_t)0);
        __syncthreads();
        tile_load<C, I8, WARPS>(&a, a.kv, smem, 0, count, own);
        if (I8) tile_load_scales(&a, a.kv, key_scale, key_scale + CU_KEYS, cell, own);
        if (!makes) load_q<C, I8>(&a, smem, &cur);
        attn_copy_commit();
        tile_load<C, I8, WARPS>(&a, a.kv, smem, 1, count, own);
        attn_copy_commit();
        begin_part(&s, &cur, told);
        if (makes) {
            float4 angle[sh::q_turns][2], x[sh::q_turns][2];
            q_turns<C, I8>(&a, &cur, angle);
            cu_wait_previous();
            read_q<C, I8>(&a, &cur, x);
            make_rows<C, I8>(&a, smem, key_scale, 0, 2, &cur, tile);
            make_q<C, I8>(&a, smem, &cur, angle, x);
        }
    }

    float M[2] = {-INFINITY, -INFINITY}, L[2] = {0.0f, 0.0f}, acc[sh::warp_units][2][4];
#pragma unroll
    for (int u = 0; u < sh::warp_units; u++)
        for (int e = 0; e < 8; e++) acc[u][e >> 2][e & 3] = 0.0f;
    const int32_t token[2] = {attn_token(&a, g), attn_token(&a, g + 8)}; /* of the lane's rows */

    for (;;) {
        const bool last = tile + 1 >= end;
        unit next = cur;
        int32_t next_tile = tile + 1;
        bool more = true;
        if (last) {
            more = cur.x0 + cur.n_tile < stop;
            next_tile = 0;
            if (more) next = unit_after(&a, &cur);
        }
        /* asked for early, used after the scores */
        const int32_t next_at = next_tile * CU_KEYS + tid;
        const int32_t page = attn_page_of<true>(&a, next.seq, next_at, more ? next.len : 0);

        int32_t pos[2]; /* of the lane's rows; -1: no such row */
#pragma unroll
        for (int i = 0; i < 2; i++) pos[i] = g + 8 * i < cur.n_row ? cur.pos0 + token[i] : -1;
        const int32_t key0 = tile * CU_KEYS;

        attn_copy_wait<1>();
        __syncthreads(); /* keys and q are there; nobody reads `cells` any more */
        float score[4][4];
        tile_scores<C, I8, WARPS>(score, smem, warp, lane);
        float m[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int in_tile = warp * 32 + j * 8 + 2 * c;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float scale = I8 ? key_scale[in_tile + (e & 1)] : 1.0f;
                score[j][e] = attn_score<I8>(score[j][e], scale, a.scale);
            }
        }
        if (key0 + CU_KEYS - 1 > cur.pos0) { /* else all rows see all keys */
#pragma unroll
            for (int j = 0; j < 4; j++)
                for (int e = 0; e < 4; e++)
                    if (key0 + warp * 32 + j * 8 + 2 * c + (e & 1) > pos[e >> 1]) score[j][e] = -INFINITY;
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            for (int e = 0; e < 4; e++) m[e >> 1] = fmaxf(m[e >> 1], score[j][e]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            m[i] = fmaxf(m[i], __shfl_xor_sync(0xffffffffu, m[i], 1));
            m[i] = fmaxf(m[i], __shfl_xor_sync(0xffffffffu, m[i], 2));
            if (c == 0) top[warp * ATTN_FEW + g + 8 * i] = m[i];
        }
        const attn_cell cell = attn_cell_of<C, I8, true>(&a, page, next.head, next_at);
        cells[tid] = max(cell.key, (int64_t)0);
        __syncthreads(); /* maxima are there; keys and q may be overwritten */
        const int32_t next_count = next.len - next_tile * CU_KEYS;
        const int32_t next_own = makes ? next.pos0 - next_tile * CU_KEYS : CU_KEYS;
        if (more) {
            tile_load<C, I8, WARPS>(&a, a.kv, smem, 0, next_count, next_own);
            if (I8) tile_load_scales(&a, a.kv, key_scale, key_scale + (2 - turn) * CU_KEYS, cell, next_own);
            if (last && !makes) load_q<C, I8>(&a, smem, &next);
        }
        attn_copy_commit();
        if (makes && more) {
            if (last) {
                float4 angle[sh::q_turns][2], x[sh::q_turns][2];
                q_turns<C, I8>(&a, &next, angle);
                read_q<C, I8>(&a, &next, x);
                make_q<C, I8>(&a, smem, &next, angle, x);
            }
            if (next_own < CU_KEYS) make_rows<C, I8>(&a, smem, key_scale, 0, 1, &next, next_tile);
        }

        bool seen[2];
        float base[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            m[i] = top[g + 8 * i];
            for (int w = 1; w < 4; w++) m[i] = fmaxf(m[i], top[w * ATTN_FEW + g + 8 * i]);
            seen[i] = key0 <= pos[i];
            base[i] = seen[i] ? m[i] : 0.0f; /* no -inf - -inf */
        }
        const float *value_scale = key_scale + (1 + turn) * CU_KEYS;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int chunk = warp * 4 + j;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float p0 = attn_ex2(__fsub_rn(score[j][2 * i], base[i]));
                const float p1 = attn_ex2(__fsub_rn(score[j][2 * i + 1], base[i]));
                const uint32_t at = attn_at<16>(g + 8 * i, chunk) + c * 4;
                *(uint32_t *)(smem + sh::l_at + at) = cu_round2(p0, p1);
                if (I8) {
                    const float *scale = value_scale + chunk * 8 + 2 * c;
                    *(uint32_t *)(smem + sh::p_at + at) =
                        cu_round2(attn_scaled(p0, scale[0]), attn_scaled(p1, scale[1]));
                }
            }
        }
        attn_copy_wait<1>();
        __syncthreads(); /* values and weights are there */
        float o[sh::warp_units][2][4], l[4];
        if (warp * sh::warp_units < sh::units) {
            tile_weigh<C, I8, WARPS>(o, l, smem, warp, lane);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (!seen[i]) continue;
                float f, b;
                attn_factors(&M[i], m[i], &f, &b);
                L[i] = attn_join(L[i], l[2 * i], f, b);
#pragma unroll
                for (int u = 0; u < sh::warp_units; u++)
                    for (int e = 0; e < 4; e++)
                        acc[u][e >> 1][2 * i + (e & 1)] =
                            attn_join(acc[u][e >> 1][2 * i + (e & 1)], o[u][e >> 1][2 * i + (e & 1)], f, b);
            }
        }
        if (last || alone) {
            const bool whole = !alone && end == cur.n_tile;
            const int32_t nth = alone ? cur.x0 + tile - start : s.cap - 1;
            if (warp * sh::warp_units < sh::units)
                finish<C, I8>(&a, &s, &cur, whole ? -1 : (int32_t)blockIdx.x * s.cap + nth, acc, M, L, warp, lane);
            if (last && !whole) {
                int32_t *count = a.arrived + 4 * (cur.k * a.n_kv_head + cur.head);
                arrive(count, told);
                const int32_t launch = told[TOLD_LAUNCH], first = told[TOLD_FIRST];
                if (cur.x0 + cur.n_tile - stretch_start(&s, first + 1) < JOIN_FEW) {
                    if (told[TOLD_LAST])
                        join<C>(&a, &s, &cur, first, smem + (more ? sh::v_at : sh::k_at),
                                CU_KEYS * sh::row_bytes * (more ? 1 : 2)); /* where nothing is on its way */
                } else {
                    if (told[TOLD_LAST] && tid == 0) count[1 + (launch + 1) % 2] = 0; /* the next launch's */
                    if (told[TOLD_LAST] || (!more && all_arrived(count, (launch + 1) * told[TOLD_PARTS], told)))
                        join_many<C>(&a, s, cur, count + 1 + launch % 2);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                M[i] = -INFINITY, L[i] = 0.0f;
                for (int u = 0; u < sh::warp_units; u++)
                    for (int e = 0; e < 4; e++) acc[u][e >> 1][2 * i + (e & 1)] = 0.0f;
            }
        }
        if (!more) break;
        __syncthreads(); /* values and weights may be overwritten */
        tile_load<C, I8, WARPS>(&a, a.kv, smem, 1, next_count, next_own);
        attn_copy_commit();
        turn ^= 1;
        if (makes && next_own < CU_KEYS)
            make_rows<C, I8>(&a, smem, key_scale + (1 + turn) * CU_KEYS, 1, 1, &next, next_tile);
        if (last) {
            alone = false;
            end = s.cut ? min(next.n_tile, stop - next.x0) : next.n_tile;
            if (end < next.n_tile) begin_part(&s, &next, told);
        }
        cur = next;
        tile = next_tile;
    }
    attn_copy_wait<0>();
}

/* ---- launches ---------------------------------------------------------------------------------------------------- */

template <int C, bool I8> static cudaError_t run(cudaStream_t s, const attn_args *a) {
    typedef decode_shape<C, I8> sh;
    static bool ready[64];
    int device = 0;
    cudaError_t e = cudaGetDevice(&device);
    if (e != cudaSuccess) return e;
    if (!ready[device & 63]) {
        e = cudaFuncSetAttribute(decode_kernel<C, I8>, cudaFuncAttributeMaxDynamicSharedMemorySize, sh::bytes);
        if (e != cudaSuccess) return e;
        /* room for all blocks that registers allow */
        e = cudaFuncSetAttribute(decode_kernel<C, I8>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
        if (e != cudaSuccess) return e;
        ready[device & 63] = true;
    }
    attn_args args = *a;
    void *list[] = {&args};
    const int32_t n = attn_sm_count() * sh::blocks;
    return cu_launch(s, (const void *)decode_kernel<C, I8>, dim3((unsigned)(n < BLOCKS_MOST ? n : BLOCKS_MOST)),
                     THREADS, sh::bytes, true, 1, list);
}

/* The slots of stretches: n * (min(ceil(n_tile / n), longest) + 1), n blocks. */
int64_t attn_decode_floats(int64_t n_tile, int64_t longest, int32_t n_row, int32_t C) {
    const int64_t most = BLOCKS_MOST * longest;
    return ((n_tile < most ? n_tile : most) + 2 * BLOCKS_MOST) * slot_floats(n_row, C);
}

cudaError_t attn_decode(cudaStream_t s, const attn_args *a, int32_t C, bool i8) {
    switch (C) {
    case 16: return i8 ? run<16, true>(s, a) : run<16, false>(s, a);
    case 64: return i8 ? run<64, true>(s, a) : run<64, false>(s, a);
    case 128: return i8 ? run<128, true>(s, a) : run<128, false>(s, a);
    default: return cudaErrorInvalidValue;
    }
}
