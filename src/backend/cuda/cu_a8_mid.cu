/* Codes of 8 or 4 bits times rows of 8 (CU_F8A8, CU_I8A8, CU_I4A8), 8 to some hundred rows, plain and of experts. The
 * tensor cores take codes of 8 bits as they come, and those of 4 after two instructions, so reading them is all there
 * is to do: weights should never stop coming.
 *
 * A tile is 64 outputs for each of WGS warpgroups times ROWS rows; a warp of a warpgroup has a band. Blocks stay on
 * their multiprocessors and take every n-th tile. Some warps more fill a ring in shared memory, in a tile as in the
 * next: one asks the copy engine for codes, before the kernel in front is done where that does not say which; the
 * others bring rows, by cp.async, or quantize them (INSIDE). Barriers in shared memory count what has come and who is
 * done with a slot. A ring of codes on their way is microseconds of the memory's work, and what is asked for later
 * comes after it: where tiles and rows are is known well before it is needed, and the first rows are asked for before
 * most of the first codes.
 *
 *   slot: SEGMENTS times codes [WGS][4 bands][segment of a band] | rows [ROWS][128], swizzled (cu_a8_device.cuh), of
 *   SEGMENTS segments;   beside: scales of the slot's rows and (F8A8) bands, a segment after the other
 * Rows that are not there are not read: what is computed of them goes nowhere. */
#include "backend/cuda/cu_a8_device.cuh"
#include "backend/cuda/cu_large_kernel.cuh"
#include "backend/cuda/cu_launch.cuh"

enum {
    SLOTS_MAX = 24,
    AHEAD = 2,                /* slots whose codes are asked for before the first rows, of experts */
    LISTED = 32,              /* tiles that a warp finds at once, a lane each */
    SHARED_CORE = 227 * 1024, /* of a multiprocessor, without the kilobyte of its own that every block has */
};

typedef struct a8_args {
    large_args l;
    cu_x8 x;
    int32_t n_expert;
    bool routed; /* down: up waited for the routes before it let the kernel behind it begin */
} a8_args;

/* What a kernel is made for. */
template <cu_format F_, int ROWS_, int WGS_, bool INSIDE_> struct a8_shape {
    static constexpr cu_format F = F_;
    static constexpr int ROWS = ROWS_, WGS = WGS_;
    static constexpr bool INSIDE = INSIDE_;
    static constexpr int SEGMENTS = F == CU_I4A8 ? 2 : 1; /* of a slot */
    static constexpr int BANDS = WGS * A8_TILE_BANDS;
    static constexpr int CODES = BANDS * a8_band_bytes(F), X = ROWS * CU_SEGMENT; /* bytes of a segment */
    static constexpr int SLOT = SEGMENTS * (CODES + X);
    static constexpr int SCALES = ROWS + (F == CU_F8A8 ? BANDS : 0); /* of a segment */
    /* Warps that bring rows. */
    static constexpr int FILLERS = INSIDE ? 4 : ROWS == 64 || (ROWS == 32 && WGS == 2) ? 2 : 1;
    static constexpr int THREADS = WGS * 128 + 32 + FILLERS * 32;
    static constexpr int BLOCKS = ROWS == 64 || WGS == 2 ? 1 : ROWS == 32 || INSIDE ? 2 : 3; /* of a multiprocessor */
    /* Half of a tile's totals. */
    static constexpr int HALVES = WGS * 2 * CU_BAND * ROWS * 4;
    /* Blocks that memory has room for: down's of few rows lie beside two of up, and up's of int4, whose slots bring
     * more numbers, come while shared experts' are still there. */
    static constexpr int BESIDE = INSIDE ? 3 : ROWS == 8 && F == CU_I4A8 ? 4 : BLOCKS;
    static constexpr int ROOM = (SHARED_CORE / BESIDE - HALVES - 2048) / (SLOT + SEGMENTS * SCALES * 4);
    static constexpr int SLOTS = ROOM < SLOTS_MAX ? ROOM : SLOTS_MAX;
};

/* ---- tiles ---------------------------------------------------------------------------------------------------------
 */

/* How many there are. Of experts that is for an earlier kernel to say. */
static __device__ __forceinline__ uint32_t tile_count(const large_args *a) {
    return (uint32_t)(a->experts ? cu_l2i(a->n_tile) : a->n_tile_row) * (uint32_t)a->n_tile_out;
}
/* Tile `index`: those that read the same weights (plain), or the same rows (experts), follow one another. There may be
 * no such tile: then what is found points somewhere that can be read. pack: its first codes; scale: of all bands. */
template <typename S> static __device__ __forceinline__ large_tile tile_find(const a8_args *args, uint32_t index) {
    const large_args *a = &args->l;
    const uint32_t across = (uint32_t)(a->experts ? a->n_tile_out : a->n_tile_row);
    const int32_t major = (int32_t)(index / across), minor = (int32_t)(index % across);
    const cu_linear *w = &a->w;
    large_tile t;
    if (a->experts) {
        const int32_t at = min(major, a->n_tile_row - 1);
        const uint32_t e = min((uint32_t)cu_l2i(a->tile_expert + at), (uint32_t)args->n_expert - 1);
        t.row = cu_l2i(a->tile_place + at);
        t.row_end = min(t.row + S::ROWS, cu_l2i(a->first + e + 1));
        t.band0 = minor * S::BANDS;
        w = a->experts + e;
    } else {
        t.row = minor * S::ROWS;
        t.row_end = min(t.row + S::ROWS, a->n_row);
        t.band0 = major * S::BANDS;
    }
    t.pack = (const unsigned char *)w->pack + a8_at(t.band0, 0, a->w.n_seg) * a8_band_bytes(S::F);
    t.scale = w->scale;
    return t;
}
/* Lane k has this block's k-th tile from `index` on. */
template <typename S> static __device__ __forceinline__ large_tile tiles_find(const a8_args *args, uint32_t index) {
    return tile_find<S>(args, index + threadIdx.x % 32 * gridDim.x);
}

/* ---- the warps that fill the ring ---------------------------------------------------------------------------------
 */

/* Places in shared memory. */
typedef struct a8_ring {
    uint32_t slots, scales, full, empty;
    uint32_t asked; /* the first rows are */
} a8_ring;

/* Codes, and what they are multiplied with where that is of segments. Of a plain linear they depend on no kernel.
 * tiles: for each slot that begins a tile, which. */
template <typename S>
static __device__ __forceinline__ void fill_codes(const a8_args *args, const a8_ring *ring, large_tile *tiles,
                                                  int lane) {
    constexpr int STEP = S::SEGMENTS * CU_A8_BANDS; /* segments of bands from slot to slot */
    const large_args *a = &args->l;
    const int32_t n_seg = a->w.n_seg;
    /* So few rows are one tile, of each expert, too: nobody else reads its weights. */
    const uint64_t policy = S::ROWS == 8 && a->n_row <= 8 ? cu_read_once() : cu_read_often();
    if (a->experts && !args->routed) cu_wait_previous();
    const uint32_t n_tile = tile_count(a);
    large_tile list = tiles_find<S>(args, blockIdx.x);
    int slot = 0, listed = 0, n_asked = 0;
    uint32_t parity = 1; /* the first time round nobody has to leave a slot */
    for (uint32_t index = blockIdx.x; index < n_tile; index += gridDim.x) {
        if (listed == LISTED) list = tiles_find<S>(args, index), listed = 0;
        large_tile t;
        t.pack = (const unsigned char *)__shfl_sync(0xffffffffu, (unsigned long long)list.pack, listed);
        t.scale = (const float *)__shfl_sync(0xffffffffu, (unsigned long long)list.scale, listed);
        t.band0 = __shfl_sync(0xffffffffu, list.band0, listed);
        t.row = __shfl_sync(0xffffffffu, list.row, listed);
        t.row_end = __shfl_sync(0xffffffffu, list.row_end, listed++);
        const unsigned char *from = t.pack;
        const float *scale = t.scale + a8_at(t.band0, 0, n_seg);
        for (int32_t seg = 0; seg < n_seg; seg += S::SEGMENTS) {
            const uint32_t full = ring->full + slot * 8, to = ring->slots + slot * S::SLOT;
            const int n = min(n_seg - seg, S::SEGMENTS);
            bar_wait(ring->empty + slot * 8, parity);
            if (lane == 0) {
                if (seg == 0) tiles[slot] = t;
                bar_arrive_expect(full, n * (S::CODES + (S::F == CU_F8A8 ? S::BANDS * 4 : 0)));
                if (S::BANDS == CU_A8_BANDS) { /* segments lie together */
                    copy_bulk_by(to, from, n * S::CODES, full, policy);
                } else {
#pragma unroll
                    for (int i = 0; i < S::SEGMENTS; i++)
                        if (i < n)
                            copy_bulk_by(to + i * S::CODES, from + i * (CU_A8_BANDS * a8_band_bytes(S::F)), S::CODES,
                                         full, policy);
                }
                if (S::F == CU_F8A8)
                    copy_bulk(ring->scales + (slot * S::SCALES + S::ROWS) * 4, scale, S::BANDS * 4, full);
            }
            __syncwarp();
            from += STEP * a8_band_bytes(S::F);
            scale += STEP;
            if (++slot == S::SLOTS) slot = 0, parity ^= 1;
            if (++n_asked == AHEAD && a->experts) bar_wait(ring->asked, 0);
        }
    }
}

/* Rows and their scales: of this warp's rows a lane has a piece of every fourth, and the scales of one. */
template <typename S>
static __device__ __forceinline__ void fill_rows(const a8_args *args, const a8_ring *ring, int filler, int lane) {
    constexpr int OWN = S::ROWS / S::FILLERS, EACH = OWN / 4;
    const large_args *a = &args->l;
    const int piece = lane % 8, first = filler * OWN, row0 = first + lane / 8;
    const int32_t last_place = a->n_row * a->n_used - 1;
    cu_wait_previous();
    const uint32_t n_tile = tile_count(a);
    large_tile list = tiles_find<S>(args, blockIdx.x);
    /* What belongs to the lane's row of a tile, which may be beyond its end: a row of x, or an entry. */
    const auto entry_of = [&](int listed) {
        const int32_t p = __shfl_sync(0xffffffffu, list.row, listed) + first + lane % OWN;
        return a->place_entry ? cu_l2i(a->place_entry + max(min(p, last_place), 0)) : p;
    };
    int32_t entry = entry_of(0);
    uint32_t swap[2]; /* places of the lane's piece, which repeat every 8 rows */
#pragma unroll
    for (int i = 0; i < 2; i++) swap[i] = S::SEGMENTS * S::CODES + a8_piece_at(row0 + 4 * i, piece);
    int slot = 0, listed = 0;
    uint32_t parity = 1;
    for (uint32_t index = blockIdx.x; index < n_tile; index += gridDim.x) {
        const int32_t row = a->place_entry ? entry / a->n_used : entry;
        const int32_t n_row =
            __shfl_sync(0xffffffffu, list.row_end, listed) - __shfl_sync(0xffffffffu, list.row, listed);
        if (++listed == LISTED) list = tiles_find<S>(args, index + gridDim.x), listed = 0;
        entry = entry_of(listed);  /* of the next */
        const uint8_t *from[EACH]; /* row row0 + 4 i */
#pragma unroll
        for (int i = 0; i < EACH; i++)
            from[i] = args->x.code + __shfl_sync(0xffffffffu, row, lane / 8 + 4 * i) * args->x.ldx + piece * 16;
        const float *scale = args->x.scale + row;
        const bool scales = lane < OWN && first + lane < n_row;
        for (int32_t seg = 0; seg < a->w.n_seg; seg += S::SEGMENTS) {
            const uint32_t to = ring->slots + slot * S::SLOT, full = ring->full + slot * 8;
            const uint32_t to_scale = ring->scales + (slot * S::SEGMENTS * S::SCALES + first + lane) * 4;
            bar_wait(ring->empty + slot * 8, parity);
#pragma unroll
            for (int k = 0; k < S::SEGMENTS; k++) {
                if (seg + k >= a->w.n_seg) break;
#pragma unroll
                for (int i = 0; i < EACH; i++)
                    if (row0 + 4 * i < n_row)
                        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + k * S::X + i / 2 * 1024 +
                                                                                       swap[i % 2]),
                                     "l"(from[i] + (seg + k) * CU_SEGMENT)
                                     : "memory");
                if (scales) copy4(to_scale + k * S::SCALES * 4, scale);
                scale += args->x.ld_scale;
            }
            copies_arrive(full);
            if (++slot == S::SLOTS) slot = 0, parity ^= 1;
            if (index == blockIdx.x && seg == 0 && lane == 0) bar_arrive(ring->asked);
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* Rows in bf16, quantized by this warp: every fourth slot. */
template <typename S>
static __device__ __forceinline__ void quantize_rows(const a8_args *args, const a8_ring *ring, unsigned char *memory,
                                                     float *scales, int filler, int lane) {
    const large_args *a = &args->l;
    const int32_t n_seg = a->w.n_seg, n_slot = (n_seg + S::SEGMENTS - 1) / S::SEGMENTS;
    cu_wait_previous();
    const uint32_t n_tile = tile_count(a);
    large_tile list = tiles_find<S>(args, blockIdx.x);
    int slot = filler, listed = 0;
    int32_t turn = filler; /* slot of the tile, the next of this warp's */
    uint32_t parity = 1;
    for (uint32_t index = blockIdx.x; index < n_tile; index += gridDim.x) {
        const int32_t row = __shfl_sync(0xffffffffu, list.row, listed);
        const int32_t n_row = __shfl_sync(0xffffffffu, list.row_end, listed) - row;
        if (++listed == LISTED) list = tiles_find<S>(args, index + gridDim.x), listed = 0;
        const cu_bf16 *x = a->x + row * a->ldx + lane * 4;
        uint2 v[2][S::ROWS]; /* of this segment and the next */
        const auto ask = [&](int k, int32_t seg) {
#pragma unroll
            for (int i = 0; i < S::ROWS; i++)
                if (i < n_row && seg < n_seg) v[k][i] = __ldcg((const uint2 *)(x + i * a->ldx + seg * CU_SEGMENT));
        };
        const auto put = [&](int k, int in, int32_t seg) {
            unsigned char *to = memory + slot * S::SLOT + S::SEGMENTS * S::CODES + in * S::X + lane % 4 * 4;
            float *to_scale = scales + (slot * S::SEGMENTS + in) * S::SCALES;
#pragma unroll
            for (int i = 0; i < S::ROWS; i++)
                if (i < n_row && seg < n_seg) {
                    const uint2 w = v[k][i];
                    const float f[4] = {cu_f32((cu_bf16)(w.x & 0xffff)), cu_f32((cu_bf16)(w.x >> 16)),
                                        cu_f32((cu_bf16)(w.y & 0xffff)), cu_f32((cu_bf16)(w.y >> 16))};
                    float scale;
                    const uint32_t code = a8_quantize<a8_codes_of(S::F)>(&scale, f);
                    *(uint32_t *)(to + a8_piece_at(i, lane / 4)) = code;
                    if (lane == 0) to_scale[i] = scale;
                }
        };
        ask(0, turn * S::SEGMENTS);
        if (index == blockIdx.x && lane == 0) bar_arrive(ring->asked);
        for (; turn < n_slot; turn += S::FILLERS) {
            const int32_t seg = turn * S::SEGMENTS, next = seg + S::FILLERS * S::SEGMENTS;
            ask(1, S::SEGMENTS == 2 ? seg + 1 : next);
            bar_wait(ring->empty + slot * 8, parity);
            put(0, 0, seg);
            if (S::SEGMENTS == 2) {
                ask(0, next);
                put(1, 1, seg + 1);
            } else {
#pragma unroll
                for (int i = 0; i < S::ROWS; i++) v[0][i] = v[1][i];
            }
            __syncwarp();
            if (lane == 0) bar_arrive(ring->full + slot * 8);
            slot += S::FILLERS;
            if (slot >= S::SLOTS) slot -= S::SLOTS, parity ^= 1;
        }
        turn -= n_slot;
    }
}

/* ---- the warps that multiply --------------------------------------------------------------------------------------
 */

/* h of output g of the tile's band pair from `out` on, rows 2c and 2c + 1 from `row` on. Lanes of neighbouring outputs
 * trade rows, so that each stores two outputs of one row as a word. All lanes call. */
static __device__ __forceinline__ void put_swiglu(const large_args *a, const large_tile *t, float2 gate, float2 up,
                                                  int32_t out, int32_t row, int lane) {
    const uint32_t mine = cu_round2(cu_swiglu(gate.x, up.x), cu_swiglu(gate.y, up.y));
    const uint32_t got = __shfl_xor_sync(0xffffffffu, mine, 4);
    const bool odd = lane & 4;
    const uint32_t two = odd ? __byte_perm(got, mine, 0x7632) : __byte_perm(mine, got, 0x5410);
    const int32_t r = row + 2 * (lane & 3) + odd;
    out += lane / 4 & 6;
    if (r >= t->row_end || out >= a->w.n_out) return;
    cu_bf16 *h = a->h + r * a->ldh + out;
    if (out + 1 < a->w.n_out)
        *(uint32_t *)h = two;
    else
        *h = (cu_bf16)two;
}

template <typename S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS) a8_mid(const __grid_constant__ a8_args args) {
    extern __shared__ __align__(1024) unsigned char memory[];
    constexpr int N = S::SLOTS, ROWS = S::ROWS, TILES = ROWS / 8;
    __shared__ __align__(8) uint64_t bars[2 * N + 1];
    __shared__ large_tile tiles[N];
    __shared__ __align__(16) float scales[N * S::SEGMENTS * S::SCALES];
    __shared__ float2 halves[S::HALVES / 8];
    const large_args *a = &args.l;
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    const uint32_t bars_at = (uint32_t)__cvta_generic_to_shared(bars);
    const a8_ring ring = {(uint32_t)__cvta_generic_to_shared(memory), (uint32_t)__cvta_generic_to_shared(scales),
                          bars_at, bars_at + N * 8, bars_at + 2 * N * 8};
    const int32_t n_seg = a->w.n_seg;
    const uint32_t zero = cu_hidden_zero(n_seg);

    if (!a->place_entry) cu_launch_next();
    if (threadIdx.x == 0) {
        for (int i = 0; i < N; i++) {
            bar_init(ring.full + i * 8, 1 + (S::INSIDE ? 1 : S::FILLERS * 32)); /* and the bytes of codes */
            bar_init(ring.empty + i * 8, S::WGS * 4);
        }
        bar_init(ring.asked, S::FILLERS);
        bar_init_end();
    }
    if (a->experts) /* where their codes are, close at hand */
        for (int32_t e = (int32_t)threadIdx.x; e < args.n_expert; e += S::THREADS)
            asm volatile("prefetch.global.L1 [%0];" ::"l"(a->experts + e));
    __syncthreads();
    if (warp == S::WGS * 4) {
        fill_codes<S>(&args, &ring, tiles, lane);
        return;
    }
    if (warp > S::WGS * 4) {
        if constexpr (S::INSIDE)
            quantize_rows<S>(&args, &ring, memory, scales, warp - S::WGS * 4 - 1, lane);
        else
            fill_rows<S>(&args, &ring, warp - S::WGS * 4 - 1, lane);
        return;
    }
    cu_wait_previous();
    if (a->place_entry) cu_launch_next(); /* the routes are there: down need not wait for them */

    const uint32_t n_tile = tile_count(a);
    int slot = 0, done = 0; /* the next to be multiplied, to be added */
    uint32_t parity = 0;
    for (uint32_t index = blockIdx.x; index < n_tile; index += gridDim.x) {
        bar_wait(ring.full + slot * 8, parity);
        const large_tile t = tiles[slot];
        const int32_t band = t.band0 + warp;
        float by_out[2] = {}; /* of outputs g, g + 8 */
        if (S::F != CU_F8A8)
#pragma unroll
            for (int k = 0; k < 2; k++)
                if (band < a->w.n_band) by_out[k] = __ldg(t.scale + band * CU_BAND + lane / 4 + 8 * k);
        /* The products of a segment are under way while the sums of the one before are added. */
        a8_sum<S::F> acc[2][ROWS / 2];
        float total[ROWS / 2];
        uint32_t code[2][4][4];
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++) acc[0][i] = acc[1][i] = 0, total[i] = 0.0f;
        /* k: parity of the segment; of two in a slot its place there. */
        const auto multiply = [&](int k) {
            const int in = S::SEGMENTS == 1 ? 0 : k;
            if (in == 0) {
                bar_wait(ring.full + slot * 8, parity);
                a8_show(); /* rows were written as threads write */
            }
            a8_codes<S::F>(code[k], memory + slot * S::SLOT + in * S::CODES + warp * a8_band_bytes(S::F), lane);
            a8_segment<ROWS>(acc[k], code[k], ring.slots + slot * S::SLOT + S::SEGMENTS * S::CODES + in * S::X);
            if (in == S::SEGMENTS - 1 && ++slot == N) slot = 0, parity ^= 1;
        };
        uint32_t read = 0; /* bits of the scales of a slot */
        const auto leave = [&]() {
            __syncwarp();
            if (lane == 0) bar_leave(ring.empty + done * 8, read, zero);
            read = 0;
            if (++done == N) done = 0;
        };
        const auto add = [&](int k) {
            const int in = S::SEGMENTS == 1 ? 0 : k;
            const float *by = scales + (done * S::SEGMENTS + in) * S::SCALES;
            const float by_band = S::F == CU_F8A8 ? by[ROWS + warp] : 1.0f;
            float2 by_row[TILES];
            if (S::F == CU_F8A8) read |= __float_as_uint(by_band);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                by_row[i] = *(const float2 *)(by + i * 8 + 2 * (lane & 3));
                read |= __float_as_uint(by_row[i].x);
            }
            a8_hold<ROWS / 2>(acc[k]);
            wide_hold_codes<4>(code[k]);
#pragma unroll
            for (int i = 0; i < ROWS / 2; i++) {
                const float of_row = i & 1 ? by_row[i / 4].y : by_row[i / 4].x;
                total[i] =
                    __fmaf_rn(S::F == CU_F8A8 ? __fmul_rn(of_row, by_band) : of_row, a8_number(acc[k][i]), total[i]);
            }
            a8_hold<ROWS / 2>(acc[k]);
            if (in == S::SEGMENTS - 1) leave();
        };
        multiply(0);
        int32_t left = n_seg - 1;
        for (; left >= 2; left -= 2) {
            multiply(1);
            wide_wait<1>();
            add(0);
            multiply(0);
            wide_wait<1>();
            add(1);
        }
        if (left) {
            multiply(1);
            wide_wait<1>();
            add(0);
            wide_wait<0>();
            add(1);
        } else {
            wide_wait<0>();
            add(0);
            if (S::SEGMENTS == 2) { /* the slot's second is not there */
                leave();
                if (++slot == N) slot = 0, parity ^= 1;
            }
        }
        if (S::F != CU_F8A8)
#pragma unroll
            for (int i = 0; i < ROWS / 2; i++) total[i] = __fmul_rn(total[i], by_out[i / 2 & 1]);
        if (a->epilogue == CU_SWIGLU) {
            /* The warp of gate has outputs 0..7, that of up 8..15. */
            const bool high = warp % 2;
            float2 *const give = halves + warp * TILES * 32 + lane;
            const float2 *const take = halves + (warp ^ 1) * TILES * 32 + lane;
            cu_barrier(warp / 2 + 1, 64);
#pragma unroll
            for (int i = 0; i < TILES; i++)
                give[i * 32] = high ? make_float2(total[4 * i], total[4 * i + 1])
                                    : make_float2(total[4 * i + 2], total[4 * i + 3]);
            cu_barrier(warp / 2 + 1, 64);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                if (t.row + i * 8 >= t.row_end) break;
                const float2 got = take[i * 32];
                const float2 own = high ? make_float2(total[4 * i + 2], total[4 * i + 3])
                                        : make_float2(total[4 * i], total[4 * i + 1]);
                put_swiglu(a, &t, high ? got : own, high ? own : got, band / 2 * CU_BAND + high * 8, t.row + i * 8,
                           lane);
            }
        } else {
            float old[ROWS / 2];
            large_old<TILES>(old, a, &t, band, t.row, lane);
            large_put<TILES>(a, &t, total, old, band, t.row, lane);
        }
    }
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

static int32_t ceil_div(int64_t a, int64_t b) { return (int32_t)((a + b - 1) / b); }
static int32_t least(int64_t a, int64_t b) { return (int32_t)(a < b ? a : b); }

static bool args_sound(const a8_args *a) {
    return large_sound(&a->l) && cu_codes_of(a->l.w.format) != CU_CODES_NONE && (uintptr_t)a->x.code % 16 == 0 &&
           a->x.ldx % 16 == 0;
}

template <typename S> static cudaError_t launch(cudaStream_t s, a8_args *args, bool early) {
    static uint64_t ready;
    const void *kernel = (const void *)a8_mid<S>;
    constexpr int BYTES = S::SLOTS * S::SLOT;
    large_args *a = &args->l;
    int32_t n_core;
    cudaError_t e = cu_core_count(&n_core);
    if (e == cudaSuccess) e = cu_shared_bytes(&ready, kernel, BYTES);
    if (e != cudaSuccess) return e;
    a->tile_bands = S::BANDS;
    a->n_tile_out = ceil_div(a->w.n_band, a->tile_bands);
    const int64_t n_tile = (int64_t)a->n_tile_out * a->n_tile_row;
    if (n_tile > INT32_MAX) return cudaErrorInvalidValue;
    if (n_tile == 0) return cudaSuccess;
    void *params[] = {args};
    return cu_launch(s, kernel, dim3((unsigned)least(n_tile, (int64_t)n_core * S::BLOCKS)), S::THREADS, BYTES, early, 1,
                     params);
}
template <int ROWS, int WGS, bool INSIDE> static cudaError_t launch_any(cudaStream_t s, a8_args *args, bool early) {
    switch (args->l.w.format) {
    case CU_F8A8: return launch<a8_shape<CU_F8A8, ROWS, WGS, INSIDE>>(s, args, early);
    case CU_I8A8: return launch<a8_shape<CU_I8A8, ROWS, WGS, INSIDE>>(s, args, early);
    default: return launch<a8_shape<CU_I4A8, ROWS, WGS, INSIDE>>(s, args, early);
    }
}

/* As many rows a tile as leave most of the chip something to do. */
cudaError_t cu_a8_mid_run(cudaStream_t s, const cu_job *j) {
    a8_args args = {};
    int32_t n_core;
    bool took = false;
    cudaError_t e = cu_core_count(&n_core);
    args.l = large_plain(j);
    args.l.x = NULL;
    args.x = j->x8;
    if (e == cudaSuccess && !args_sound(&args)) e = cudaErrorInvalidValue;
    if (e == cudaSuccess) e = cu_a8_split_run(s, j, &took);
    if (took || e != cudaSuccess) return e;
    const int32_t n_out = ceil_div(j->w.n_band, A8_TILE_BANDS);
    int rows = 16;
    while (rows < 64 && rows < j->n_row && (int64_t)n_out * ceil_div(j->n_row, 2 * rows) * 10 >= n_core * 7) rows *= 2;
    args.l.n_tile_row = ceil_div(j->n_row, rows);
    switch (rows) {
    case 16: return launch_any<16, 1, false>(s, &args, !j->alone);
    case 32: return launch_any<32, 1, false>(s, &args, !j->alone);
    }
    return launch_any<64, 1, false>(s, &args, !j->alone);
}

cudaError_t cu_a8_mid_grouped(cudaStream_t s, const cu_grouped_job *j) {
    a8_args args = {};
    const bool inside = !j->x8.code;
    bool took = false;
    const cudaError_t e = cu_a8_entry_run(s, j, &took);
    if (took || e != cudaSuccess) return e;
    if (j->routes->told && j->n_row == 1 && !j->gather) return cudaErrorInvalidValue; /* nobody would leave zeros */
    args.l = large_experts(j);
    if (!inside) args.l.x = NULL;
    args.x = j->x8;
    args.n_expert = j->routes->n_expert;
    args.routed = j->behind_up;
    if (!args_sound(&args) || (inside && (j->gather || !j->x || j->routes->tile_rows != 8)))
        return cudaErrorInvalidValue;
    switch (j->routes->tile_rows) {
    case 8: return inside ? launch_any<8, 1, true>(s, &args, true) : launch_any<8, 1, false>(s, &args, true);
    case 16: return launch_any<16, 1, false>(s, &args, true);
    case 32: return launch_any<32, 2, false>(s, &args, true);
    case 64: return launch_any<64, 2, false>(s, &args, true);
    }
    return cudaErrorInvalidValue;
}
