/* Attention of sequences with few rows (all rows of a KV head's group fit 16), one kernel: the tiles of all sequences
 * and heads lie in a line, and every block takes its stretch of it, cut where it may be (cu_attn_walk.cuh).
 *
 * A block has groups of four warps, one or as many as a multiprocessor holds. They take the tiles of the stretch in
 * turn, each with shared memory of its own; what comes of a tile is joined to Acc, M and L of its unit in turn again:
 * groups hand those on in shared memory.
 *
 * In a step of such sequences alone the kernel also rotates q and k and stores k and v (a->qkv). It is launched early:
 * keys and values of earlier steps are on their way before the kernel that makes q, k and v is done.
 *
 * Bound by memory: codes in pages of whole runs are brought by the copy engine (BULK), all else by copies of 16 bytes.
 * While a group works on a tile's keys its values are on their way, and the next tile's keys while it works on the
 * values; several groups share a multiprocessor.
 *
 * A tile, by warp w: scores of 16 rows and keys 32 w .. 32 w + 31; maxima meet in shared memory; weights go there as
 * bf16; then dimensions w * C/4 .. of O over all 128 keys in order. */
#include <cuda.h>

#include "backend/cuda/cu_attn_tile.cuh"
#include "backend/cuda/cu_attn_walk.cuh"
#include "backend/cuda/cu_map.cuh"
#include "backend/cuda/cu_tensor.cuh"

enum { THREADS = 128, WARPS = 4 };
enum { POLLS_MOST = 1 << 20, ONCE = 4 }; /* ONCE: results of a thread on their way when it joins */

/* Groups that share a multiprocessor. */
static __host__ __device__ constexpr int groups_each(int C, int codes) { return !codes && C == 128 ? 3 : 4; }

template <int C, int CODES> struct decode_shape : tile_shape<C, CODES, WARPS> {
    static constexpr int floats = tile_shape<C, CODES, WARPS>::warp_units * 8; /* of Acc, a thread's */
    static constexpr int align = CODES ? 1024 : 128;                           /* the copy engine's swizzle, or lines */
    static constexpr int each_bytes = (tile_shape<C, CODES, WARPS>::end_at + align - 1) / align * align; /* a group's */
    static constexpr int bytes(int groups) { /* of a block */
        return groups > 1 ? groups * each_bytes + THREADS * floats * 4 + 2 * ATTN_FEW * 8 : each_bytes;
    }
    static constexpr int q_turns = (ATTN_FEW * (C / 8) + THREADS - 1) / THREADS; /* chunks of q of a thread */
};

/* Threads of a group wait for each other; and groups for their turns, in which they join a tile each. */
template <int GROUPS> static __device__ __forceinline__ void group_sync(void) {
    if (GROUPS == 1)
        __syncthreads();
    else
        asm volatile("bar.sync %0, 128;" ::"r"(1 + threadIdx.y) : "memory");
}
template <int GROUPS> static __device__ __forceinline__ void turn_wait(void) {
    asm volatile("bar.sync %0, 256;" ::"r"(1 + GROUPS + threadIdx.y) : "memory");
}
template <int GROUPS> static __device__ __forceinline__ void turn_pass(void) {
    asm volatile("bar.arrive %0, 256;" ::"r"(1 + GROUPS + (threadIdx.y + 1) % GROUPS) : "memory");
}

/* A key (which 0) or value of this step that a warp makes: what the lane has of it, of a key with its angles. */
template <int C> struct made {
    static constexpr int per = C >= 128 ? 4 : 2;
    float x[per], turn[per];
    int32_t cell;
};
template <int C>
static __device__ __forceinline__ void made_read(const attn_args *a, made<C> *m, int32_t which, const unit *u,
                                                 int32_t t) {
    constexpr int per = made<C>::per;
    const int32_t lane = threadIdx.x & 31, first = lane * per < C ? lane * per : 0, row = u->row0 + t;
    const int32_t head = a->n_head + which * a->n_kv_head + u->head;
    attn_read<per>(m->x, a->qkv + ((int64_t)row * (a->n_head + 2 * a->n_kv_head) + head) * C + first);
    if (which == 0) attn_read<per>(m->turn, (const float *)(a->turn + (int64_t)row * (C / 2)) + first);
    m->cell = a->cell[row];
}
/* Rotated, to its cell and to shared memory, as number `at` of the tile. scale_to: of codes. */
template <int C, int CODES>
static __device__ __forceinline__ void made_put(const attn_args *a, unsigned char *smem, float *scale_to, made<C> *m,
                                                int32_t which, const unit *u, int32_t at) {
    typedef decode_shape<C, CODES> sh;
    constexpr int per = made<C>::per;
    const int lane = threadIdx.x & 31;
    const bool mine = lane * per < C;
    const int32_t first = mine ? lane * per : 0, cell = m->cell;
    float *x = m->x;
    if (which == 0) {
#pragma unroll
        for (int i = 0; i < per; i += 2) {
            const float2 turned = attn_turn(x[i], x[i + 1], make_float2(m->turn[i], m->turn[i + 1]));
            x[i] = turned.x, x[i + 1] = turned.y;
        }
    }
    if (!mine)
        for (int i = 0; i < per; i++) x[i] = 0.0f;
    const int32_t nth = cell / a->n_page_cell, in_page = cell - nth * a->n_page_cell, byte = first * (CODES ? 1 : 2);
    unsigned char *plane = a->kv + nth * a->page_bytes + u->head * a->plane_bytes + which * a->value;
    unsigned char *to = plane + (int64_t)in_page * sh::row_bytes + byte;
    unsigned char *near = smem + (which ? sh::v_at : sh::k_at) + attn_at<sh::chunks>(at, byte / 16) + byte % 16;
    if (CODES) {
        float scale;
        const uint32_t word = attn_codes<per, CODES>(x, &scale);
        if (mine) attn_put_codes<per>(near, word);
        if (mine && cell >= 0) attn_put_codes<per>(to, word);
        if (lane == 0) *scale_to = scale;
        if (lane == 0 && cell >= 0) ((float *)(plane + a->scale_at))[in_page] = scale;
    } else if (mine) {
        attn_put_bf16<per>(near, x);
        if (cell >= 0) attn_put_bf16<per>(to, x);
    }
}
/* Keys and values (kinds 2), keys or values (1, from `kind` on) of this step in a tile, a warp a row. scales
 * [][CU_KEYS]: in shared memory, of the first kind and the next. */
template <int C, int CODES>
static __device__ __forceinline__ void make_rows(const attn_args *a, unsigned char *smem, float *scales, int kind,
                                                 int kinds, const unit *u, int32_t tile) {
    const int warp = threadIdx.x >> 5;
    const int32_t begin = tile * CU_KEYS - u->pos0;
    const int32_t end = min(attn_token(a, u->n_row - 1) + 1, begin + CU_KEYS);
#pragma unroll 1
    for (int32_t i = max(begin, 0) * kinds + warp; i < end * kinds; i += WARPS) {
        const int32_t t = kinds == 2 ? i / 2 : i, which = kinds == 2 ? i % 2 : kind, at = t - begin;
        made<C> m;
        made_read<C>(a, &m, which, u, t);
        made_put<C, CODES>(a, smem, scales + (which - kind) * CU_KEYS + at, &m, which, u, at);
    }
}

/* Eight numbers of a row of q; codes: in the order of the codes, places of cu_attn.cuh. */
template <int C, int CODES>
static __device__ __forceinline__ void put_q(unsigned char *smem, int r, int chunk, uint4 x) {
    typedef decode_shape<C, CODES> sh;
    unsigned char *q = smem + sh::q_at;
    if (!CODES) {
        *(uint4 *)(q + attn_at<sh::q_chunks>(r, chunk)) = x;
        return;
    }
    const int half = chunk & 1 ? 8 : 0;
    *(uint2 *)(q + attn_at<sh::q_chunks>(r, chunk & ~1) + half) =
        make_uint2(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410));
    *(uint2 *)(q + attn_at<sh::q_chunks>(r, chunk | 1) + half) =
        make_uint2(__byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632));
}

/* Angles of a thread's chunk i of q. */
template <int C, int CODES>
static __device__ __forceinline__ void q_turns(const attn_args *a, const unit *u, int i, float4 turn[2]) {
    typedef decode_shape<C, CODES> sh;
    const int n = threadIdx.x + i * THREADS, r = n / sh::q_chunks, chunk = n % sh::q_chunks;
    const int32_t row = u->row0 + (r < u->n_row ? attn_token(a, r) : 0);
    const float4 *from = (const float4 *)(a->turn + (int64_t)row * (C / 2) + chunk * 4);
    turn[0] = from[0], turn[1] = from[1];
}
/* The chunk as it is. */
template <int C, int CODES>
static __device__ __forceinline__ void read_q(const attn_args *a, const unit *u, int i, float4 x[2]) {
    typedef decode_shape<C, CODES> sh;
    const int n = threadIdx.x + i * THREADS, r = n / sh::q_chunks, chunk = n % sh::q_chunks;
    const int32_t safe = r < u->n_row ? r : 0, t = attn_token(a, safe), h = u->head * a->group + safe - t * a->group;
    const int64_t row = (int64_t)(u->row0 + t) * (a->n_head + 2 * a->n_kv_head) + h;
    const float4 *from = (const float4 *)(a->qkv + row * C + chunk * 8);
    x[0] = from[0], x[1] = from[1];
}
/* Whether the chunk is of a row that the sequence has, for any thread. */
template <int C, int CODES> static __device__ __forceinline__ bool q_there(const unit *u, int i) {
    return i * THREADS < u->n_row * decode_shape<C, CODES>::q_chunks;
}
/* Rotated, to shared memory; zeros of rows that the sequence lacks. */
template <int C, int CODES>
static __device__ __forceinline__ void make_q(unsigned char *smem, const unit *u, int i, const float4 turn[2],
                                              const float4 from[2]) {
    typedef decode_shape<C, CODES> sh;
    const int n = threadIdx.x + i * THREADS, r = n / sh::q_chunks, chunk = n % sh::q_chunks;
    if (n >= ATTN_FEW * sh::q_chunks) return;
    uint4 out = make_uint4(0, 0, 0, 0);
    if (r < u->n_row) {
        const float4 lo = from[0], hi = from[1];
        float2 x = attn_turn(lo.x, lo.y, make_float2(turn[0].x, turn[0].y));
        out.x = cu_round2(x.x, x.y);
        x = attn_turn(lo.z, lo.w, make_float2(turn[0].z, turn[0].w));
        out.y = cu_round2(x.x, x.y);
        x = attn_turn(hi.x, hi.y, make_float2(turn[1].x, turn[1].y));
        out.z = cu_round2(x.x, x.y);
        x = attn_turn(hi.z, hi.w, make_float2(turn[1].z, turn[1].w));
        out.w = cu_round2(x.x, x.y);
    }
    put_q<C, CODES>(smem, r, chunk, out);
}

/* Rows of q that are rotated already. */
template <int C, int CODES>
static __device__ __forceinline__ void load_q(const attn_args *a, unsigned char *smem, const unit *u) {
    typedef decode_shape<C, CODES> sh;
#pragma unroll 1
    for (int n = threadIdx.x; n < ATTN_FEW * sh::q_chunks; n += THREADS) {
        const int r = n / sh::q_chunks, chunk = n % sh::q_chunks;
        const int32_t t = attn_token(a, r), h = u->head * a->group + r - t * a->group;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (r < u->n_row) x = *(const uint4 *)(a->q + ((int64_t)(u->row0 + t) * a->n_head + h) * C + chunk * 8);
        put_q<C, CODES>(smem, r, chunk, x);
    }
}

/* Words of a slot: written for other blocks, looked at until they are there, made 0 again. */
static __device__ __forceinline__ void publish(uint32_t *to, float x, float y) {
    asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(~__float_as_uint(x)),
                 "r"(~__float_as_uint(y))
                 : "memory");
}
static __device__ __forceinline__ void clear2(uint32_t *to) {
    asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1, %1};" ::"l"(to), "r"(0) : "memory");
}
static __device__ __forceinline__ void clear4(uint32_t *to) {
    asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %1, %1, %1};" ::"l"(to), "r"(0) : "memory");
}

/* Results of a part or tile: to out, or to a slot (>= 0), of the rows of whom there is one. */
template <int C, int CODES>
static __device__ __forceinline__ void finish(const attn_args *a, const stretch *s, const unit *p, int32_t slot,
                                              const bool is[2], const float acc[][2][4], const float M[2],
                                              const float L[2], int warp, int lane) {
    typedef decode_shape<C, CODES> sh;
    constexpr int slices = slices_of(C);
    const int g = lane >> 2, c = lane & 3;
    uint32_t *at = (uint32_t *)a->scratch + slot;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = g + 8 * i;
        if (r >= p->n_row || !is[i]) continue;
        if (slot >= 0 && warp == 0 && c < slices) publish(at + 2 * (r * slices + c), M[i], L[i]);
        const int32_t t = attn_token(a, r), h = p->head * a->group + r - t * a->group;
        cu_bf16 *out = a->out + (int64_t)(p->row0 + t) * a->ldo + (int64_t)h * C;
        uint32_t *part = at + slot_acc(s->row_max, C) + r * C;
#pragma unroll
        for (int u = 0; u < sh::warp_units; u++) {
            const int unit = warp * sh::warp_units + u;
            if (unit >= sh::units) continue;
            /* two pairs of dimensions that lie together */
            float x[4] = {acc[u][0][2 * i], acc[u][CODES ? 1 : 0][2 * i + (CODES ? 0 : 1)],
                          acc[u][CODES ? 0 : 1][2 * i + (CODES ? 1 : 0)], acc[u][1][2 * i + 1]};
            const int first = unit * 16 + (CODES ? 4 * c : 2 * c), second = first + (CODES ? 2 : 8);
            if (slot >= 0) {
                publish(part + first, x[0], x[1]);
                publish(part + second, x[2], x[3]);
            } else {
                *(uint32_t *)(out + first) = cu_round2(__fdiv_rn(x[0], L[i]), __fdiv_rn(x[1], L[i]));
                *(uint32_t *)(out + second) = cu_round2(__fdiv_rn(x[2], L[i]), __fdiv_rn(x[3], L[i]));
            }
        }
    }
}

/* Go on from what the block before this one left of a unit: the words that the same threads of it wrote. */
template <int C, int CODES, int GROUPS>
static __device__ __forceinline__ void take_up(const attn_args *a, const stretch *s, const unit *p, float acc[][2][4],
                                               float M[2], float L[2], int warp, int lane) {
    typedef decode_shape<C, CODES> sh;
    constexpr int slices = slices_of(C);
    const int g = lane >> 2, c = lane & 3;
    uint32_t *at = (uint32_t *)a->scratch + (s->line.n_tile + unit_index(a, p)) * s->slot;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = g + 8 * i;
        uint32_t *part = at + slot_acc(s->row_max, C) + r * C, least = 0;
        if (r >= p->n_row || warp * sh::warp_units >= sh::units) continue;
        uint2 ml, x[sh::warp_units][2];
        for (int polls = 0; least == 0; polls++) {
            ml = cu_look2(at + 2 * (r * slices + c % slices)); /* the same in every slice; below each is cleared */
            least = min(ml.x, ml.y);
#pragma unroll
            for (int u = 0; u < sh::warp_units; u++) {
                const int first = (warp * sh::warp_units + u) * 16 + (CODES ? 4 * c : 2 * c);
                x[u][0] = cu_look2(part + first), x[u][1] = cu_look2(part + first + (CODES ? 2 : 8));
            }
#pragma unroll
            for (int u = 0; u < sh::warp_units; u++)
                least = min(least, min(min(x[u][0].x, x[u][0].y), min(x[u][1].x, x[u][1].y)));
            if (polls == POLLS_MOST) __trap(); /* not a hang: the block before begins with it */
        }
        M[i] = __uint_as_float(~ml.x), L[i] = __uint_as_float(~ml.y);
#pragma unroll
        for (int u = 0; u < sh::warp_units; u++) {
            const int first = (warp * sh::warp_units + u) * 16 + (CODES ? 4 * c : 2 * c);
            acc[u][0][2 * i] = __uint_as_float(~x[u][0].x);
            acc[u][CODES ? 1 : 0][2 * i + (CODES ? 0 : 1)] = __uint_as_float(~x[u][0].y);
            acc[u][CODES ? 0 : 1][2 * i + (CODES ? 1 : 0)] = __uint_as_float(~x[u][1].x);
            acc[u][1][2 * i + 1] = __uint_as_float(~x[u][1].y);
            clear2(part + first), clear2(part + first + (CODES ? 2 : 8));
        }
    }
    group_sync<GROUPS>(); /* all have M and L */
    if (warp == 0 && c < slices)
        for (int r = g; r < p->n_row; r += 8) clear2(at + 2 * (r * slices + c));
}

/* Join the block's share of its last unit, which was cut: the blocks whose stretch ends in the unit or with it share
 * its rows and slices, in turn. All results of a block are out before it waits here, and all blocks are on the chip at
 * once (the next kernel's come when all of these have begun, and attn_prefill's wait for none of them), so what is
 * waited for comes.
 *
 * Words come to shared memory (`room`), where `lanes` threads a row and slice join them. Every word has one reader, who
 * makes it 0 for the next launch. */
template <int C, int GROUPS, int ROOM_BYTES>
static __device__ __forceinline__ void join(const attn_args *a, const stretch *s, const unit *u, unsigned char *room) {
    constexpr int wide = C < 32 ? C : 32, lanes = wide / 4, groups = THREADS / lanes, slices = slices_of(C);
    constexpr int lines = ROOM_BYTES / (wide * 4 + 8) / 2 * 2, at_once = lines < groups ? groups / 2 : groups;
    static_assert(lines >= at_once, "room for a line of each");
    float4 *acc_room = (float4 *)room;
    float2 *ml_room = (float2 *)(room + lines * wide * 4);
    const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
    const int32_t tail = u->x0 + u->n_tile, first = attn_line_block(&s->line, u->x0);
    const int32_t end = attn_line_block(&s->line, tail - 1);
    const int32_t n_join = end - first + (attn_line_start(&s->line, end + 1) == tail), n_task = u->n_row * slices;
    /* piece 0 is the first tiles, piece i > 0 tile run + i - 1 */
    const int32_t run = attn_line_start(&s->line, first + 1) - u->x0, n_piece = u->n_tile - run + 1;
    const int32_t slot0 = (s->line.n_tile + unit_index(a, u)) * s->slot, slots = (u->x0 + run - 1) * s->slot;
#pragma unroll 1
    for (int32_t task0 = (int32_t)blockIdx.x - first; task0 < n_task; task0 += at_once * n_join) {
        const int32_t n = min(at_once, (n_task - task0 + n_join - 1) / n_join);
        const int bits = 32 - __clz(n - 1), nth = group & ((1 << bits) - 1), sub = group >> bits, step = groups >> bits;
        const int32_t task = task0 + nth * n_join, r = task / slices, t = attn_token(a, r), each = lines >> bits;
        const int32_t seen = nth < n ? max((u->pos0 + t) / CU_KEYS + 1 - run, 0) + 1 : 0;
        uint32_t *ml_at = (uint32_t *)a->scratch + 2 * task;
        uint32_t *acc_at = (uint32_t *)a->scratch + slot_acc(s->row_max, C) + r * C + task % slices * 32 + lane * 4;
        float M = -INFINITY, L = 0.0f, acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
        for (int32_t piece0 = 0; piece0 < n_piece; piece0 += each) {
            const int32_t count = min(each, seen - piece0);
#pragma unroll 1
            for (int32_t p = sub; p < count; p += ONCE * step) {
                int32_t slot[ONCE];
                uint4 o[ONCE];
                uint2 ml[ONCE];
#pragma unroll
                for (int k = 0; k < ONCE; k++) {
                    const int32_t piece = piece0 + p + (p + k * step < count ? k * step : 0); /* nobody else's */
                    slot[k] = piece ? slots + piece * s->slot : slot0;
                }
                uint32_t least = 0;
                for (int polls = 0; least == 0; polls++) {
                    least = 0xffffffffu;
#pragma unroll
                    for (int k = 0; k < ONCE; k++) {
                        o[k] = cu_look4(acc_at + slot[k]);
                        ml[k] = make_uint2(least, least);
                        if (lane == 0) ml[k] = cu_look2(ml_at + slot[k]);
                    }
#pragma unroll
                    for (int k = 0; k < ONCE; k++) least = min(min(least, min(o[k].x, o[k].y)), min(o[k].z, o[k].w));
#pragma unroll
                    for (int k = 0; k < ONCE; k++) least = min(least, min(ml[k].x, ml[k].y));
                    if (polls == POLLS_MOST) __trap(); /* not a hang, if ever the above is not so */
                }
#pragma unroll
                for (int k = 0; k < ONCE; k++) {
                    const int32_t line = ((p + k * step) << bits) + nth;
                    if (p + k * step >= count) continue;
                    acc_room[line * lanes + lane] = make_float4(__uint_as_float(~o[k].x), __uint_as_float(~o[k].y),
                                                                __uint_as_float(~o[k].z), __uint_as_float(~o[k].w));
                    clear4(acc_at + slot[k]);
                    if (lane > 0) continue;
                    ml_room[line] = make_float2(__uint_as_float(~ml[k].x), __uint_as_float(~ml[k].y));
                    clear2(ml_at + slot[k]);
                }
            }
            group_sync<GROUPS>();
#pragma unroll 8
            for (int32_t p = 0; p < (sub == 0 ? count : 0); p++) {
                const float2 ml = ml_room[(p << bits) + nth];
                const float4 o = acc_room[((p << bits) + nth) * lanes + lane];
                float f, b;
                attn_factors(&M, ml.x, &f, &b);
                L = attn_join(L, ml.y, f, b);
                acc[0] = attn_join(acc[0], o.x, f, b), acc[1] = attn_join(acc[1], o.y, f, b);
                acc[2] = attn_join(acc[2], o.z, f, b), acc[3] = attn_join(acc[3], o.w, f, b);
            }
            group_sync<GROUPS>();
        }
        if (sub > 0 || nth >= n) continue;
        const int32_t h = u->head * a->group + r - t * a->group;
        cu_bf16 *out = a->out + (int64_t)(u->row0 + t) * a->ldo + (int64_t)h * C + task % slices * 32 + lane * 4;
        *(uint2 *)out = make_uint2(cu_round2(__fdiv_rn(acc[0], L), __fdiv_rn(acc[1], L)),
                                   cu_round2(__fdiv_rn(acc[2], L), __fdiv_rn(acc[3], L)));
    }
}

/* BULK, of codes: the copy engine brings a tile's keys (and all its scales) or values, runs of cells that follow one
 * another in a page, a lane of warp 0 each; copies of 16 bytes keep all threads busy for longer than memory takes. It
 * brings what lies in the cells: rows of this step are made when it is done, and what is beyond the end has no weight,
 * for codes are numbers whatever they are. */
typedef struct bulk {
    const CUtensorMap *cells; /* rows of a cell's codes from a->kv on */
    int32_t run;
    uint32_t bar[2]; /* keys or values of a tile are there */
} bulk;
/* What threads wrote where the copy engine writes next. */
static __device__ __forceinline__ void bulk_fence(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* Page of the lane's run, or -1. */

static __device__ __forceinline__ int32_t bulk_page(const attn_args *a, const bulk *b, int32_t seq, int32_t key0,
                                                    int32_t len) {
    const int32_t in_tile = (int32_t)threadIdx.x * b->run;
    return in_tile < CU_KEYS ? attn_page_of<true>(a, seq, key0 + in_tile, len) : -1;
}
template <int C, int CODES>
static __device__ __forceinline__ void bulk_load(const attn_args *a, const bulk *b, unsigned char *smem, int which,
                                                 float *value_scale, int32_t page, int32_t head, int32_t key0,
                                                 int32_t count) {
    typedef decode_shape<C, CODES> sh;
    const int32_t lane = (int32_t)threadIdx.x, in_tile = lane * b->run, at = key0 + in_tile;
    const int32_t n = (min(count, CU_KEYS) + b->run - 1) / b->run * b->run;
    const uint32_t bar = b->bar[which];
    if (lane == 0) bar_arrive_expect(bar, n * (which ? C : C + 8));
    __syncwarp();
    if (page < 0) return;
    const int32_t cell = at - attn_nth_page<true>(a, at) * a->n_page_cell;
    const int64_t plane = page * a->page_bytes + head * a->plane_bytes + (which ? a->value : 0);
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
                 "[%1, {%2, %3}], [%4], %5;" ::"r"(attn_smem(smem + (which ? sh::v_at : sh::k_at)) + in_tile * C),
                 "l"(b->cells), "r"(0), "r"((int32_t)(plane / C) + cell), "r"(bar), "l"(cu_read_once())
                 : "memory");
    if (which) return;
    const unsigned char *scale = a->kv + plane + a->scale_at + cell * 4;
    copy_bulk(attn_smem(smem + sh::scale_at) + in_tile * 4, scale, b->run * 4, bar);
    copy_bulk(attn_smem(value_scale) + in_tile * 4, scale + a->value, b->run * 4, bar);
}

template <int C, int CODES, bool BULK, int GROUPS>
static __global__ void __launch_bounds__(THREADS *GROUPS, (groups_each(C, CODES) / GROUPS))
    decode_kernel(const __grid_constant__ attn_args a, const __grid_constant__ CUtensorMap map, int32_t run) {
    typedef decode_shape<C, CODES> sh;
    constexpr bool EARLY = !CODES; /* small reads begin a tile ahead; with codes there are no registers for it */
    extern __shared__ __align__(1024) unsigned char all_smem[];
    __shared__ uint64_t bar_words[GROUPS][2];
    const int group = GROUPS > 1 ? (int)threadIdx.y : 0;
    unsigned char *smem = all_smem + group * sh::each_bytes;
    /* of the unit that the block is at: [][THREADS] float4 of Acc, then M and L of rows, in two places in turn */
    float4 *acc_at = (float4 *)(all_smem + GROUPS * sh::each_bytes) + threadIdx.x;
    float2 *ml_at = (float2 *)(all_smem + GROUPS * sh::each_bytes + THREADS * sh::floats * 4);
    const bulk b = {&map, run, {attn_smem(bar_words[group]), attn_smem(bar_words[group] + 1)}};
    uint32_t parity = 0;
    float *top = (float *)(smem + sh::top_at), *key_scale = (float *)(smem + sh::scale_at);
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, c = lane & 3;
    const bool makes = a.qkv != NULL;

    cu_launch_next();
    if (BULK && tid == 0) {
        bar_init(b.bar[0], 1), bar_init(b.bar[1], 1);
        bar_init_end();
    }
    stretch s = stretch_of(&a, C);
    /* Beside: attn_prefill, in front, has waited for all that is read here before it let this kernel begin; it writes
     * other rows of out and no scratch. The last block waits for it, so that who waits for this kernel waits for both.
     */
    if (!makes && !s.beside) cu_wait_previous();
    const int4 pages = __ldcg((const int4 *)s.start->page);
    const unit end_unit = unit_of(&s.start->last);
    walk w = walk_of(&a, &s);
    if ((int32_t)blockIdx.x >= (s.cut ? s.line.n_block : s.n_unit)) {
        /* who waits for this kernel waits for those before */
        if (blockIdx.x == 0 || (s.beside && blockIdx.x + 1 == gridDim.x)) cu_wait_previous();
        return;
    }
    const bool joins = s.cut && !attn_line_hands(&s.line, end_unit.x0, end_unit.n_tile) &&
                       (end_unit.x0 < s.from || end_unit.x0 + end_unit.n_tile > s.stop);
    bool here = true;
#pragma unroll 1
    for (int i = 0; i < group && here; i++) here = walk_on(&a, &s, &w);

    int turn = 0;
    bool first = true;
    if (here) {
        const unit cur = w.u;
        const int32_t tile = w.tile;
        const int32_t in_tile = BULK ? tid * run : tid, at = tile * CU_KEYS + in_tile, count = cur.len - tile * CU_KEYS;
        const int32_t own = makes ? cur.pos0 - tile * CU_KEYS : CU_KEYS;
        const int32_t nth = attn_nth_page<true>(&a, at) - attn_nth_page<true>(&a, tile * CU_KEYS);
        int32_t page = nth == 0 ? pages.x : nth == 1 ? pages.y : nth == 2 ? pages.z : pages.w;
        if (group > 0 || !s.cut || nth >= ATTN_START_PAGES || in_tile >= count)
            page = attn_page_of<true>(&a, cur.seq, at, cur.len);
        if (in_tile >= CU_KEYS) page = -1;
        const attn_cell cell = attn_cell_of<C, CODES, true>(&a, page, cur.head, at);
        if (BULK) {
            if (warp == 0) {
                bulk_load<C, CODES>(&a, &b, smem, 0, key_scale + CU_KEYS, page, cur.head, tile * CU_KEYS, count);
                bulk_load<C, CODES>(&a, &b, smem, 1, NULL, page, cur.head, tile * CU_KEYS, count);
            }
            group_sync<GROUPS>();
            if (!makes) load_q<C, CODES>(&a, smem, &cur);
        } else {
            tile_put_cell<C, CODES, WARPS>(smem, tid, cell.key);
            group_sync<GROUPS>();
            tile_load<C, CODES, WARPS>(&a, a.kv, smem, 0, count, own);
            if (CODES) tile_load_scales(&a, a.kv, key_scale, key_scale + CU_KEYS, cell, own);
            if (!makes) load_q<C, CODES>(&a, smem, &cur);
            attn_copy_commit();
            tile_load<C, CODES, WARPS>(&a, a.kv, smem, 1, count, own);
            attn_copy_commit();
        }
        if (makes) {
            float4 angle[sh::q_turns][2], x[sh::q_turns][2];
#pragma unroll
            for (int i = 0; i < sh::q_turns; i++) q_turns<C, CODES>(&a, &cur, i, angle[i]);
            cu_wait_previous();
#pragma unroll
            for (int i = 0; i < sh::q_turns; i++) read_q<C, CODES>(&a, &cur, i, x[i]);
            if (BULK && own < CU_KEYS) bar_wait(b.bar[0], 0), bar_wait(b.bar[1], 0);
            make_rows<C, CODES>(&a, smem, key_scale, 0, 2, &cur, tile);
            if (BULK) bulk_fence();
#pragma unroll
            for (int i = 0; i < sh::q_turns; i++) make_q<C, CODES>(smem, &cur, i, angle[i], x[i]);
        }
    }

    float M[2], L[2], acc[sh::warp_units][2][4];
    const int32_t token[2] = {attn_token(&a, g), attn_token(&a, g + 8)}; /* of the lane's rows */

    for (int item = group; here; item += GROUPS) {
        const unit cur = w.u;
        const int32_t tile = w.tile;
        walk to = w;
        bool more = true, follows = false; /* for this group; for the next */
#pragma unroll 1
        for (int i = 0; i < GROUPS && more; i++) {
            more = walk_on(&a, &s, &to);
            if (i == 0) follows = more;
        }
        const unit next = to.u;
        const int32_t next_tile = to.tile;
        const bool last = w.alone || tile + 1 == w.end, changes = more && next.x0 != cur.x0;
        /* asked for early, used after the scores */
        const int32_t next_at = next_tile * CU_KEYS + tid;
        const int32_t page = !BULK               ? attn_page_of<true>(&a, next.seq, next_at, more ? next.len : 0)
                             : more && warp == 0 ? bulk_page(&a, &b, next.seq, next_tile * CU_KEYS, next.len)
                                                 : -1;

        /* The next unit's q, and the only row of this step in the next tile, are on their way meanwhile. */
        const bool one =
            EARLY && makes && more && next.n_row <= a.group && (uint32_t)(next.pos0 - next_tile * CU_KEYS) < CU_KEYS;
        float4 angle[2], x[2];
        made<C> row;
        if (EARLY && makes && changes) {
            q_turns<C, CODES>(&a, &next, 0, angle);
            read_q<C, CODES>(&a, &next, 0, x);
        }
        if (one && warp == 0) made_read<C>(&a, &row, 0, &next, 0);

        int32_t pos[2]; /* of the lane's rows; -1: no such row */
#pragma unroll
        for (int i = 0; i < 2; i++) pos[i] = g + 8 * i < cur.n_row ? cur.pos0 + token[i] : -1;
        const int32_t key0 = tile * CU_KEYS;

        const bool late = BULK && makes && !first && key0 + CU_KEYS > cur.pos0; /* this step's rows are to be made */
        if (BULK) {
            bar_wait(b.bar[0], parity);
            if (late) {
                bar_wait(b.bar[1], parity);
                make_rows<C, CODES>(&a, smem, key_scale, 0, 1, &cur, tile);
                make_rows<C, CODES>(&a, smem, key_scale + (1 + turn) * CU_KEYS, 1, 1, &cur, tile);
                bulk_fence();
            }
        } else {
            attn_copy_wait<1>();
        }
        group_sync<GROUPS>(); /* keys and q are there; nobody reads `cells` any more */
        float score[4][4];
        tile_scores<C, CODES, WARPS>(score, smem, warp, lane);
        float m[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int in_tile = warp * 32 + j * 8 + 2 * c;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float scale = CODES ? key_scale[in_tile + (e & 1)] : 1.0f;
                score[j][e] = attn_score<CODES>(score[j][e], scale);
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
        tile_put_top(m, top, warp, g, c);
        attn_cell cell;
        if (!BULK) {
            cell = attn_cell_of<C, CODES, true>(&a, page, next.head, next_at);
            tile_put_cell<C, CODES, WARPS>(smem, tid, cell.key);
        }
        group_sync<GROUPS>(); /* maxima are there; keys and q may be overwritten */
        const int32_t next_count = next.len - next_tile * CU_KEYS;
        const int32_t next_own = makes ? next.pos0 - next_tile * CU_KEYS : CU_KEYS;
        if (more && BULK) {
            if (warp == 0)
                bulk_load<C, CODES>(&a, &b, smem, 0, key_scale + (2 - turn) * CU_KEYS, page, next.head,
                                    next_tile * CU_KEYS, next_count);
            if (changes && !makes) load_q<C, CODES>(&a, smem, &next);
        } else if (more) {
            tile_load<C, CODES, WARPS>(&a, a.kv, smem, 0, next_count, next_own);
            if (CODES) tile_load_scales(&a, a.kv, key_scale, key_scale + (2 - turn) * CU_KEYS, cell, next_own);
            if (changes && !makes) load_q<C, CODES>(&a, smem, &next);
        }
        if (!BULK) attn_copy_commit();
        if (makes && more) {
            if (changes && EARLY) {
                make_q<C, CODES>(smem, &next, 0, angle, x);
#pragma unroll
                for (int i = 1; i < sh::q_turns; i++) {
                    if (q_there<C, CODES>(&next, i)) {
                        q_turns<C, CODES>(&a, &next, i, angle);
                        read_q<C, CODES>(&a, &next, i, x);
                    }
                    make_q<C, CODES>(smem, &next, i, angle, x);
                }
            } else if (changes) {
                float4 angles[sh::q_turns][2], all[sh::q_turns][2];
#pragma unroll
                for (int i = 0; i < sh::q_turns; i++) {
                    q_turns<C, CODES>(&a, &next, i, angles[i]);
                    read_q<C, CODES>(&a, &next, i, all[i]);
                }
#pragma unroll
                for (int i = 0; i < sh::q_turns; i++) make_q<C, CODES>(smem, &next, i, angles[i], all[i]);
            }
            if (one) {
                if (warp == 0) {
                    made_put<C, CODES>(&a, smem, NULL, &row, 0, &next, next_own);
                    made_read<C>(&a, &row, 1, &next, 0);
                }
            } else if (!BULK && next_own < CU_KEYS) {
                make_rows<C, CODES>(&a, smem, key_scale, 0, 1, &next, next_tile);
            }
        }

        bool seen[2];
        float base[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            m[i] = top[g + 8 * i];
            for (int w = 1; w < 4; w++) m[i] = fmaxf(m[i], top[w * ATTN_FEW + g + 8 * i]);
            m[i] = __fmul_rn(m[i], a.scale);
            seen[i] = key0 <= pos[i];
            base[i] = seen[i] ? m[i] : 0.0f;
        }
        const float *value_scale = key_scale + (1 + turn) * CU_KEYS;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int chunk = warp * 4 + j;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float p0 = attn_weight(score[j][2 * i], a.scale, base[i]);
                const float p1 = attn_weight(score[j][2 * i + 1], a.scale, base[i]);
                const uint32_t at = attn_at<16>(g + 8 * i, chunk) + c * 4;
                *(uint32_t *)(smem + sh::l_at + at) = cu_round2(p0, p1);
                if (CODES) {
                    const float *scale = value_scale + chunk * 8 + 2 * c;
                    *(uint32_t *)(smem + sh::p_at + at) =
                        cu_round2(attn_scaled(p0, scale[0]), attn_scaled(p1, scale[1]));
                }
            }
        }
        if (BULK)
            bar_wait(b.bar[1], parity);
        else
            attn_copy_wait<1>();
        group_sync<GROUPS>(); /* values and weights are there */
        if (w.fresh) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                M[i] = -INFINITY, L[i] = 0.0f;
                for (int u = 0; u < sh::warp_units; u++)
                    for (int e = 0; e < 4; e++) acc[u][e >> 1][2 * i + (e & 1)] = 0.0f;
            }
            if (w.taken) take_up<C, CODES, GROUPS>(&a, &s, &cur, acc, M, L, warp, lane);
        }
        const bool weighs = warp * sh::warp_units < sh::units;
        float o[sh::warp_units][2][4], l[4];
        if (weighs) tile_weigh<C, CODES, WARPS>(o, l, smem, warp, lane);
        if (GROUPS > 1 && item > 0) turn_wait<GROUPS>();
        if (GROUPS > 1 && !w.fresh && weighs) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float2 ml = ml_at[(item & 1) * ATTN_FEW + g + 8 * i];
                M[i] = ml.x, L[i] = ml.y;
            }
#pragma unroll
            for (int u = 0; u < 2 * sh::warp_units; u++) {
                const float4 x = acc_at[u * THREADS];
                acc[u >> 1][u & 1][0] = x.x, acc[u >> 1][u & 1][1] = x.y;
                acc[u >> 1][u & 1][2] = x.z, acc[u >> 1][u & 1][3] = x.w;
            }
        }
        if (weighs) {
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
        if (GROUPS > 1) {
            if (!last && weighs) {
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (warp == 0 && c == 0) ml_at[((item + 1) & 1) * ATTN_FEW + g + 8 * i] = make_float2(M[i], L[i]);
#pragma unroll
                for (int u = 0; u < 2 * sh::warp_units; u++)
                    acc_at[u * THREADS] = make_float4(acc[u >> 1][u & 1][0], acc[u >> 1][u & 1][1],
                                                      acc[u >> 1][u & 1][2], acc[u >> 1][u & 1][3]);
            }
            if (follows) turn_pass<GROUPS>();
        }
        if (last && weighs) {
            const bool whole = !w.alone && w.end == cur.n_tile;
            const bool is[2] = {!w.alone || seen[0], !w.alone || seen[1]};
            const int32_t slot = whole ? -1 : (w.alone ? cur.x0 + tile : s.line.n_tile + unit_index(&a, &cur)) * s.slot;
            finish<C, CODES>(&a, &s, &cur, slot, is, acc, M, L, warp, lane);
        }
        if (!more) break;
        group_sync<GROUPS>(); /* values and weights may be overwritten */
        if (BULK) {
            if (warp == 0) bulk_load<C, CODES>(&a, &b, smem, 1, NULL, page, next.head, next_tile * CU_KEYS, next_count);
        } else {
            tile_load<C, CODES, WARPS>(&a, a.kv, smem, 1, next_count, next_own);
            attn_copy_commit();
        }
        turn ^= 1;
        parity ^= 1;
        first = false;
        if (one) {
            if (warp == 0) made_put<C, CODES>(&a, smem, NULL, &row, 1, &next, next_own);
        } else if (!BULK && makes && next_own < CU_KEYS) {
            make_rows<C, CODES>(&a, smem, key_scale + (1 + turn) * CU_KEYS, 1, 1, &next, next_tile);
        }
        w = to;
    }
    attn_copy_wait<0>();
    if (!joins) return;
    if (GROUPS > 1) {
        __syncthreads(); /* no other group has anything to leave any more */
        if (group > 0) return;
    }
    if (w.u.x0 + w.u.n_tile < s.stop) w.u = unit_of(&s.start->last);
    group_sync<GROUPS>(); /* nobody reads keys or values any more */
    join<C, GROUPS, sh::q_at - sh::k_at>(&a, &s, &w.u, smem + sh::k_at);
}

/* ---- launches ---------------------------------------------------------------------------------------------------- */

/* Mostly one group a block: while the kernel in front runs, each finds room of its own. All groups of a multiprocessor
 * in one block make stretches longer: fewer units are cut, and those that are need not be shared. That pays with bf16,
 * from about as many units as multiprocessors to where units are shorter than anybody's stretch. Codes wait for their
 * arithmetic, and so for each other's turns. */
enum { UNITS_FEW = 95, UNITS_MANY = 1024 };
static constexpr bool may_group(int C, int codes) { return C == 128 && !codes && !CU_PORTABLE; }
static int groups_of(int C, int codes, int64_t n_unit) {
    return may_group(C, codes) && n_unit > UNITS_FEW && n_unit < UNITS_MANY ? groups_each(C, codes) : 1;
}

/* Blocks of one group that a multiprocessor of this device has shared memory for. */
template <int C> static int32_t blocks_each(int codes) {
    static_assert(decode_shape<C, 0>::each_bytes <= 98 << 10, "what the smallest of CU_PORTABLE have");
    const int32_t bytes = codes ? decode_shape<C, ATTN_I8>::each_bytes : decode_shape<C, 0>::each_bytes;
    int32_t n = groups_each(C, codes), device, have;
    if (CU_PORTABLE && cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&have, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) == cudaSuccess &&
        have / (bytes + 1024) < n)
        n = have / (bytes + 1024);
    return n > 0 ? n : 1;
}

/* Give a kernel all the shared memory of a multiprocessor, and see that so many of its blocks are there at once: they
 * wait for one another. */
static cudaError_t all_fit(const void *kernel, int groups, int bytes, int blocks) {
    int n = 0;
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (e == cudaSuccess)
        e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, kernel, THREADS * groups, (size_t)bytes);
    return e != cudaSuccess || n >= blocks ? e : cudaErrorLaunchOutOfResources;
}

template <int C, int CODES, bool BULK, int GROUPS>
static cudaError_t run_groups(cudaStream_t s, const attn_args *a, const CUtensorMap *map, int32_t run) {
    typedef decode_shape<C, CODES> sh;
    const void *kernel = (const void *)decode_kernel<C, CODES, BULK, GROUPS>;
    static uint64_t ready;
    const uint64_t before = ready;
    cudaError_t e = cu_shared_bytes(&ready, kernel, sh::bytes(GROUPS));
    if (e == cudaSuccess && ready != before)
        e = all_fit(kernel, GROUPS, sh::bytes(GROUPS), blocks_each<C>(CODES) / GROUPS);
    if (e != cudaSuccess) return e;
    attn_args args = *a;
    void *list[] = {&args, (void *)map, &run};
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3((unsigned)attn_decode_blocks(C, CODES, (int64_t)a->n_seq * a->n_kv_head));
    config.blockDim = dim3(THREADS, GROUPS);
    config.dynamicSmemBytes = sh::bytes(GROUPS);
    config.stream = s;
    config.attrs = &early, config.numAttrs = !CU_PORTABLE;
    e = cudaLaunchKernelExC(&config, kernel, list);
    return e != cudaSuccess ? e : cudaGetLastError();
}
template <int C, int CODES, bool BULK>
static cudaError_t run_bulk(cudaStream_t s, const attn_args *a, const CUtensorMap *map, int32_t run) {
    if constexpr (may_group(C, CODES))
        if (groups_of(C, CODES, (int64_t)a->n_seq * a->n_kv_head) > 1)
            return run_groups<C, CODES, BULK, groups_each(C, CODES)>(s, a, map, run);
    return run_groups<C, CODES, BULK, 1>(s, a, map, run);
}

template <int C, int CODES> static cudaError_t run_codes(cudaStream_t s, const attn_args *a) {
    CUtensorMap map = {};
    int32_t run = 64;
    while (a->n_page_cell % run) run /= 2;
    if constexpr (C == 128 && CODES != 0 && !CU_PORTABLE) { /* what the 128-byte swizzle is for */
        if (run >= 8 && a->plane_bytes % C == 0) {
            const cudaError_t e = cu_map_rows(&map, a->kv, 64, INT32_MAX, C, 64, (uint32_t)run);
            return e != cudaSuccess ? e : run_bulk<C, CODES, true>(s, a, &map, run);
        }
    }
    return run_bulk<C, CODES, false>(s, a, &map, run);
}
template <int C> static cudaError_t run(cudaStream_t s, const attn_args *a, int codes) {
    return codes == ATTN_I8   ? run_codes<C, ATTN_I8>(s, a)
           : codes == ATTN_F8 ? run_codes<C, ATTN_F8>(s, a)
                              : run_codes<C, 0>(s, a);
}

int32_t attn_decode_blocks(int32_t C, int codes, int64_t n_unit) {
    const int32_t each = C == 128 ? blocks_each<128>(codes) : C == 64 ? blocks_each<64>(codes) : blocks_each<16>(codes);
    const int32_t n = attn_sm_count() * (each / groups_of(C, codes, n_unit));
    return n < ATTN_BLOCKS_MOST ? n : ATTN_BLOCKS_MOST;
}

int64_t attn_decode_floats(int64_t n_tile, int64_t n_unit, int32_t n_row, int32_t C) {
    return (n_tile + n_unit) * slot_words(n_row, C);
}

cudaError_t attn_decode(cudaStream_t s, const attn_args *a, int32_t C, int codes) {
    switch (C) {
    case 16: return run<16>(s, a, codes);
    case 64: return run<64>(s, a, codes);
    case 128: return run<128>(s, a, codes);
    default: return cudaErrorInvalidValue;
    }
}
