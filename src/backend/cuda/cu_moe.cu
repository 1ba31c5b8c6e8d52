/* The router of a layer of experts, the sort of its entries, and the sum of the experts' outputs.
 *
 * A logit is one dot product in f32 whose order depends on n_hidden alone: columns are cut in PARTS = 4 runs of
 * part = 32 ceil(D / 128) columns; in a part, slice j of SLICES = 8 adds columns 4 j .. 4 j + 3 of each run of 32, in
 * order, with fma; slices meet in the tree 4, 2, 1; parts are added first to last; the row's 1 / sqrt(mean + eps) comes
 * last: logit = scale * sum(router * (x * norm_w)). The squares of the row are added in the same order. Few rows: a
 * warp a logit, a lane a (part, slice) (few_logits). Many: a lane a slice, tiles in registers (many_logits). Very many:
 * a warp a slice, larger tiles (wide_logits). Columns beyond the row count as zeros, which change no bit. Launches:
 * logits, choice, places; of few rows the last two are one, of very many the first two (up to 64 experts). n_hidden is
 * a multiple of 4; rows start at multiples of 16 bytes. */
#include "backend/cuda/cu_a8_device.cuh"
#include "backend/cuda/cu_launch.cuh"
#include "backend/cuda/cu_route.cuh"

enum {
    EXPERTS_MAX = 512,
    USED_MAX = 16,
    LIST_THREADS = 256,   /* of a block of choose_many and of place_entries */
    CHOOSE_ROWS = 16,     /* rows of a block of choose_many */
    PLACE_ENTRIES = 1024, /* entries of a block of place_entries */
    FEW_WARPS = 32,       /* most warps of choose_few's one block */
    FEW_ROWS_A_WARP = 4,
    FEW_ROWS = FEW_WARPS * FEW_ROWS_A_WARP,
    TILED_ROWS = 192,   /* from here on, logits are tiled: 16 x 16 */
    WIDE_ROWS = 2048,   /* from here on, 32 x 64, by wide_logits */
    WIDEST_ROWS = 6144, /* from here on, 64 x 64: as many blocks as multiprocessors, nearly */
    COMBINE_THREADS = 128,
    ROW_THREADS = 640 /* of a row at once */
};

static unsigned pieces(int32_t n, int32_t of) { return (unsigned)((n + of - 1) / of); }

/* scratch: entries of an expert [E] and, behind the next free places of experts [E], blocks that are done [1]: zeros at
 * first; place_entries, which comes last, leaves them so. */

/* ---- logits -------------------------------------------------------------------------------------------------------
 */

/* A warp: one expert, ROWS rows; BATCH loads of 16 bytes of each in flight. Grid: experts / warps, rows / ROWS. */
template <int ROWS, int BATCH>
static __global__ void __launch_bounds__(ROWS == 1 ? 64 : 256)
    few_logits(cu_route_job j, float *logit, int32_t n_expert) {
    const int lane = threadIdx.x & 31;
    const int32_t expert = (int32_t)(blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5)), D = j.n_hidden;
    cu_launch_next();
    if (expert < n_expert) route_prefetch(j.router + (int64_t)expert * D, D, lane);
    cu_wait_previous();
    if (expert >= n_expert) return;
    const int32_t row0 = (int32_t)blockIdx.y * ROWS;
    const float *x_row[ROWS];
    float out[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) /* rows beyond the last are the last once more */
        x_row[r] = j.x + (int64_t)(row0 + r < j.n_row ? row0 + r : j.n_row - 1) * D;
    route_logits<ROWS, BATCH>(out, x_row, j.router + (int64_t)expert * D, j.norm_w, D, j.eps);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (lane == 0 && row0 + r < j.n_row) logit[(int64_t)(row0 + r) * n_expert + expert] = out[r];
}

/* 16 bytes from global to shared memory; !in: zeros (from is not read). */
static __device__ __forceinline__ void copy16(float *to, const float *from, bool in) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(in ? 16 : 0)
                 : "memory");
}

/* N sums of each of the eight slices (v of lanes 8 i .. 8 i + 7) to N / 8 sums in each of those lanes: lane with slice
 * s gets numbers s N / 8 .. of v, in v[0 ..]. Additions as slices_sum has them. */
template <int N, int DISTANCE = SLICES / 2> static __device__ __forceinline__ void fold_slices(float *v) {
    const bool up = threadIdx.x & DISTANCE;
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        const float keep = up ? v[k + N / 2] : v[k], give = up ? v[k] : v[k + N / 2];
        v[k] = __fadd_rn(keep, __shfl_xor_sync(0xffffffffu, give, DISTANCE));
    }
    if constexpr (DISTANCE > 1) fold_slices<N / 2, DISTANCE / 2>(v);
}

/* Tiles of R x X logits of a lane's slice; a warp is 8 slices x (2 x 2) tiles, a block WR x WX warps:
 *
 *   lane = slice + 8 (r + 2 x)      rows of a block 2 R WR, experts 2 X WX
 *
 * Columns pass in steps of 32 through STAGES buffers in shared memory, [row or expert][32] f32 (a row is the 32 banks:
 * eight lanes with 16 bytes each read it without conflict). A thread multiplies the numbers of x that it copied by
 * norm_w before the others read them, and adds their squares: it has one row and one slice all the way.
 * Grid: rows, experts. */
template <int R, int X, int WR, int WX, int STAGES>
static __global__ void __launch_bounds__(32 * WR * WX, 4) many_logits(cu_route_job j, float *logit, int32_t n_expert) {
    enum { THREADS = 32 * WR * WX, ROWS = 2 * R * WR, EXPERTS = 2 * X * WX, W_COPIES = EXPERTS * SLICES / THREADS };
    static_assert(ROWS * SLICES == THREADS, "a thread copies one piece of x a step");
    static_assert(EXPERTS * SLICES % THREADS == 0 && R * X % SLICES == 0, "");
    __shared__ __align__(16) float xs[STAGES][ROWS * 32];
    __shared__ __align__(16) float ws[STAGES][EXPERTS * 32];
    __shared__ float scales[ROWS];
    cu_launch_next();
    cu_wait_previous();
    const int32_t D = j.n_hidden, n_step = (D + 31) / 32, part_steps = part_columns(D) / 32;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, slice = lane & 7;
    const int32_t row0 = (int32_t)blockIdx.x * ROWS, expert0 = (int32_t)blockIdx.y * EXPERTS;

    /* what this thread copies: piece thread % 8 of row thread / 8, the same of its experts */
    const int32_t copy_column = thread % SLICES * 4, copy_row = row0 + thread / SLICES;
    const bool copy_row_in = copy_row < j.n_row;
    const float *x_from = j.x + (int64_t)(copy_row_in ? copy_row : 0) * D;
    const auto copy_step = [&](int32_t step) {
        if (step < n_step) {
            const int32_t column = step * 32 + copy_column;
            const bool in = column < D;
            float *x_to = xs[step % STAGES], *w_to = ws[step % STAGES];
            copy16(x_to + thread * 4, in ? x_from + column : j.x, in && copy_row_in);
#pragma unroll
            for (int k = 0; k < W_COPIES; k++) {
                const int piece = k * THREADS + thread;
                const int32_t expert = expert0 + piece / SLICES;
                const bool good = in && expert < n_expert;
                copy16(w_to + piece * 4, good ? j.router + (int64_t)expert * D + column : j.router, good);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory"); /* an empty group counts as well */
    };
    const auto norm_of = [&](int32_t step) {
        const int32_t column = step * 32 + copy_column;
        return column < D ? *(const uint2 *)(j.norm_w + column) : make_uint2(0u, 0u);
    };

    /* what this thread adds up */
    const int tile_row = (warp % WR * 2 + ((lane >> 3) & 1)) * R, tile_expert = (warp / WR * 2 + (lane >> 4)) * X;
    float sum[R * X], total[R * X / SLICES], square = 0.0f, square_total = 0.0f;
#pragma unroll
    for (int k = 0; k < R * X; k++) sum[k] = 0.0f;
#pragma unroll
    for (int k = 0; k < R * X / SLICES; k++) total[k] = 0.0f;

    for (int32_t step = 0; step < STAGES - 1; step++) copy_step(step);
    uint2 norm = norm_of(0);
    int32_t left = part_steps; /* of the part */
    for (int32_t step = 0; step < n_step; step++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        float *own = xs[step % STAGES] + thread * 4;
        const float4 x_own = *(const float4 *)own;
        square = cu_add_squares(x_own, square);
        *(float4 *)own = times(x_own, norm);
        __syncthreads(); /* the step is whole; nobody reads the buffer of the step before any more */
        copy_step(step + STAGES - 1);
        norm = norm_of(step + 1);
        const float *xt = xs[step % STAGES] + tile_row * 32 + slice * 4;
        const float *wt = ws[step % STAGES] + tile_expert * 32 + slice * 4;
        float4 w[X];
#pragma unroll
        for (int e = 0; e < X; e++) w[e] = *(const float4 *)(wt + e * 32);
#pragma unroll
        for (int r = 0; r < R; r++) {
            const float4 x = *(const float4 *)(xt + r * 32);
#pragma unroll
            for (int e = 0; e < X; e++) sum[r * X + e] = add_products(x, w[e], sum[r * X + e]);
        }
        if (--left > 0 && step + 1 < n_step) continue;
        left = part_steps;
        fold_slices<R * X>(sum);
#pragma unroll
        for (int k = 0; k < R * X / SLICES; k++) total[k] = __fadd_rn(total[k], sum[k]);
#pragma unroll
        for (int k = 0; k < R * X; k++) sum[k] = 0.0f;
        square_total = __fadd_rn(square_total, slices_sum(square));
        square = 0.0f;
    }

    if (thread % SLICES == 0) scales[thread / SLICES] = cu_norm_scale(square_total, D, j.eps);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < R * X / SLICES; k++) {
        const int at = slice * (R * X / SLICES) + k, r = tile_row + at / X;
        const int32_t row = row0 + r, expert = expert0 + tile_expert + at % X;
        if (row < j.n_row && expert < n_expert)
            logit[(int64_t)row * n_expert + expert] = __fmul_rn(total[k], scales[r]);
    }
}

/* ---- choice, and where experts begin -------------------------------------------------------------------------------
 */

/* choose_rows of rows row .. row + M - 1 of n_row, to r's lists; count [E] shared: one more entry of each. logit: of
 * the first of them, rows ld apart, of which as many are there. */
template <int M, int Q>
static __device__ __forceinline__ void choose_into(const cu_routes &r, int32_t *count, const float *logit, int32_t ld,
                                                   const float *bias, float norm_min, int32_t row, int32_t n_row) {
    if (row >= n_row) return; /* the whole warp */
    const int32_t K = r.n_used, lane = (int32_t)(threadIdx.x & 31);
    int32_t mine[M];
    float share[M], l[M][Q];
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int q = 0; q < Q; q++) {
            const bool in = row + m < n_row && lane + 32 * q < r.n_expert;
            const float v = logit[in ? m * ld + lane + 32 * q : 0];
            l[m][q] = in ? v : 0.0f;
        }
    }
    choose_rows<M, Q>(mine, share, l, bias, norm_min, r.n_expert, K);
#pragma unroll
    for (int m = 0; m < M; m++) {
        if (row + m >= n_row || lane >= K) continue;
        r.chosen[(int64_t)(row + m) * K + lane] = mine[m];
        r.share[(int64_t)(row + m) * K + lane] = share[m];
        atomicAdd(&count[mine[m]], 1);
    }
}

/* By a whole block, from the number of entries of each expert: first (also to `start`, shared), tiles, their number.
 * tile_start [E + 1] shared. Ends with a barrier. */
static __device__ void list_tiles(const cu_routes &r, const int32_t *count, int32_t *start, int32_t *tile_start) {
    const int32_t E = r.n_expert, lane = (int32_t)(threadIdx.x & 31), warp = (int32_t)(threadIdx.x >> 5);
    if (warp == 0) { /* a lane sums a run of experts, then lanes are summed, then it goes over its run again */
        const int32_t run = (E + 31) / 32, low = lane * run < E ? lane * run : E, high = low + run < E ? low + run : E;
        int32_t n = 0, n_tile = 0;
        for (int32_t e = low; e < high; e++) {
            n += count[e];
            n_tile += (count[e] + r.tile_rows - 1) / r.tile_rows;
        }
        int32_t before = n, tiles_before = n_tile;
        for (int d = 1; d < 32; d <<= 1) {
            const int32_t a = __shfl_up_sync(0xffffffffu, before, d), b = __shfl_up_sync(0xffffffffu, tiles_before, d);
            if (lane >= d) {
                before += a;
                tiles_before += b;
            }
        }
        if (lane == 31) {
            start[E] = r.first[E] = before;
            tile_start[E] = *r.n_tile = tiles_before;
        }
        before -= n;
        tiles_before -= n_tile;
        for (int32_t e = low; e < high; e++) {
            start[e] = r.first[e] = before;
            tile_start[e] = tiles_before;
            before += count[e];
            tiles_before += (count[e] + r.tile_rows - 1) / r.tile_rows;
        }
    }
    __syncthreads();
    for (int32_t e = warp; e < E; e += (int32_t)(blockDim.x >> 5)) {
        const int32_t at = tile_start[e], n = tile_start[e + 1] - at;
        for (int32_t i = lane; i < n; i += 32) {
            r.tile_expert[at + i] = e;
            r.tile_place[at + i] = start[e] + i * r.tile_rows;
        }
    }
    __syncthreads();
}

/* By all threads of each block of a grid of one row, once its entries of each expert are counted: the block that is
 * done last lists the tiles. count, start, tile_start as list_tiles has them. */
static __device__ void list_last(const cu_routes &r, int32_t *count, int32_t *start, int32_t *tile_start) {
    __shared__ bool last;
    const int32_t thread = (int32_t)threadIdx.x, E = r.n_expert, n_thread = (int32_t)blockDim.x;
    int32_t *all_count = r.scratch, *next_place = r.scratch + E, *done = r.scratch + 2 * E;
    __syncthreads();
    for (int32_t e = thread; e < E; e += n_thread)
        if (count[e] > 0) atomicAdd(&all_count[e], count[e]);
    __threadfence(); /* the counts are out before the block is counted as done */
    __syncthreads();
    if (thread == 0) last = atomicAdd(done, 1) == (int32_t)gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int32_t e = thread; e < E; e += n_thread) count[e] = atomicAdd(&all_count[e], 0);
    __syncthreads();
    list_tiles(r, count, start, tile_start);
    for (int32_t e = thread; e < E; e += n_thread) next_place[e] = start[e];
}

/* ---- logits of very many rows ------------------------------------------------------------------------------------
 *
 * A warp is a slice; a lane has R x X logits, of 4 R rows and 8 X experts of the block: row group bits 1 and 4 of the
 * lane, expert group bits 0, 2, 3, so that neighbouring lanes read the same pieces. Columns pass in steps of N runs of
 * 32 through STAGES buffers in shared memory, piece p of a row (four columns) at piece p ^ (row & 7). A thread
 * multiplies the numbers of x that it copied by norm_w before the others read them, and adds their squares: it has one
 * slice of its rows all the way. It does so for the next step in the middle of this one, so that behind the barrier
 * between the two nothing is waited for but the first reads. At the end of a part the slices meet in shared memory, one
 * half of the sums after the other, and are added to totals there. Rows and experts beyond the last are the last once
 * more. A block that has all experts chooses, a warp WIDE_CHOICE of its rows at once. Grid: rows, experts. */
enum { WIDE_STAGES = 3, WIDE_X = 8, WIDE_EXPERTS = 8 * WIDE_X, WIDE_THREADS = 32 * SLICES, WIDE_CHOICE = 4 };

static __device__ __forceinline__ int piece_at(int row, int piece) { return row * 32 + (piece ^ (row & 7)) * 4; }
/* at, which the compiler cannot work out once more where it is used: it would, in every step, to spare a register. */
static __device__ __forceinline__ int keep_whole(int at) { return __shfl_sync(0xffffffffu, at, threadIdx.x & 31); }

template <int R, int N>
static __global__ void __launch_bounds__(WIDE_THREADS, R > 8 ? 1 : 2) wide_logits(cu_route_job j, cu_routes routes) {
    enum {
        ROWS = 4 * R,
        COPY_ROWS = WIDE_THREADS / SLICES, /* rows that all threads copy at once */
        X_COPIES = ROWS / COPY_ROWS,
        W_COPIES = WIDE_EXPERTS / COPY_ROWS,
        RUN = (ROWS + WIDE_EXPERTS) * 32,
        SUMS = R * WIDE_X,
        EACH = SUMS / SLICES
    };
    /* [WIDE_STAGES][N][rows, experts][32], [SLICES][SUMS / 2][32], [EACH][threads] */
    extern __shared__ __align__(128) float memory[];
    __shared__ float scales[ROWS];
    float *meet = memory + WIDE_STAGES * N * RUN, *total = meet + SLICES * SUMS / 2 * 32 + threadIdx.x;
    cu_launch_next();
    cu_wait_previous();
    const int32_t D = j.n_hidden, part_steps = part_columns(D) / (32 * N), n_step = (D + 32 * N - 1) / (32 * N);
    const int32_t n_expert = routes.n_expert;
    const int thread = threadIdx.x, lane = thread & 31, slice = thread >> 5;
    const int row_group = (lane >> 1 & 1) | (lane >> 3 & 2), expert_group = (lane & 1) | (lane >> 1 & 6);
    const int32_t row0 = (int32_t)blockIdx.x * ROWS, expert0 = (int32_t)blockIdx.y * WIDE_EXPERTS;

    /* what this thread copies: piece `piece` of rows of, of + COPY_ROWS, ..., the same of experts */
    const int piece = thread % SLICES, of = thread / SLICES, own = keep_whole(piece_at(of, piece));
    const float *x_from[X_COPIES], *w_from[W_COPIES];
#pragma unroll
    for (int k = 0; k < X_COPIES; k++)
        x_from[k] = j.x + (int64_t)min(row0 + of + COPY_ROWS * k, j.n_row - 1) * D + piece * 4;
#pragma unroll
    for (int k = 0; k < W_COPIES; k++)
        w_from[k] = j.router + (int64_t)min(expert0 + of + COPY_ROWS * k, n_expert - 1) * D + piece * 4;
    int32_t copy_left = D - piece * 4; /* columns from what is copied next on */
    /* The next step, or zeros beyond the last. */
    const auto copy_step = [&](int stage) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            float *to = memory + (stage * N + n) * RUN + own;
#pragma unroll
            for (int k = 0; k < X_COPIES; k++) copy16(to + COPY_ROWS * k * 32, x_from[k] + n * 32, n * 32 < copy_left);
#pragma unroll
            for (int k = 0; k < W_COPIES; k++)
                copy16(to + (ROWS + COPY_ROWS * k) * 32, w_from[k] + n * 32, n * 32 < copy_left);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        copy_left -= N * 32;
#pragma unroll
        for (int k = 0; k < X_COPIES; k++) x_from[k] += N * 32;
#pragma unroll
        for (int k = 0; k < W_COPIES; k++) w_from[k] += N * 32;
    };

    float sum[SUMS], square[X_COPIES], square_total[X_COPIES];
#pragma unroll
    for (int k = 0; k < SUMS; k++) sum[k] = 0.0f;
#pragma unroll
    for (int k = 0; k < EACH; k++) total[k * WIDE_THREADS] = 0.0f;
#pragma unroll
    for (int k = 0; k < X_COPIES; k++) square[k] = square_total[k] = 0.0f;

    uint2 norm[N]; /* of the step that is finished next */
    const auto norm_of = [&](int32_t step) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int32_t column = (step * N + n) * 32 + piece * 4;
            norm[n] = column < D ? *(const uint2 *)(j.norm_w + column) : make_uint2(0u, 0u);
        }
    };
    /* This thread's numbers of x of a step. */
    const auto finish_step = [&](int stage) {
        asm volatile("cp.async.wait_group %0;" ::"n"(WIDE_STAGES - 2) : "memory");
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int k = 0; k < X_COPIES; k++) {
                float4 *x_own = (float4 *)(memory + (stage * N + n) * RUN + own + COPY_ROWS * k * 32);
                const float4 v = *x_own;
                square[k] = cu_add_squares(v, square[k]);
                *x_own = times(v, norm[n]);
            }
    };

    for (int stage = 0; stage < WIDE_STAGES - 1; stage++) copy_step(stage);
    norm_of(0);
    finish_step(0);
    __syncthreads();
    copy_step(WIDE_STAGES - 1);
    const int x_at[2] = {keep_whole(piece_at(row_group, slice)), keep_whole(piece_at(row_group + 4, slice) - 4 * 32)};
    const int w_at = keep_whole(piece_at(ROWS + expert_group, slice));
    int32_t left = part_steps; /* of the part */
    int stage = 0;
    for (int32_t step = 0; step < n_step; step++) { /* the step is whole for all */
        const float *at = memory + stage * N * RUN;
        const int next = stage == WIDE_STAGES - 1 ? 0 : stage + 1;
        const bool ends = left == 1 || step + 1 == n_step; /* a part */
        float square_part[X_COPIES];
        norm_of(step + 1);
#pragma unroll
        for (int n = 0; n < N; n++, at += RUN) {
            if (n == N / 2) {
#pragma unroll
                for (int k = 0; k < X_COPIES; k++) {
                    square_part[k] = square[k];
                    square[k] = ends ? 0.0f : square[k];
                }
                finish_step(next);
            }
            float4 w[WIDE_X];
#pragma unroll
            for (int e = 0; e < WIDE_X; e++) w[e] = *(const float4 *)(at + w_at + 8 * e * 32);
#pragma unroll
            for (int r = 0; r < R; r++) { /* rows 4 r + row_group */
                const float4 x = *(const float4 *)(at + x_at[r % 2] + 4 * r * 32);
#pragma unroll
                for (int e = 0; e < WIDE_X; e++) sum[r * WIDE_X + e] = add_products(x, w[e], sum[r * WIDE_X + e]);
            }
        }
        left--;
        if (ends) {
            left = part_steps;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (half > 0) __syncthreads(); /* the first is read */
#pragma unroll
                for (int k = 0; k < SUMS / 2; k++) {
                    meet[(slice * SUMS / 2 + k) * 32 + lane] = sum[half * SUMS / 2 + k];
                    sum[half * SUMS / 2 + k] = 0.0f;
                }
                __syncthreads();
#pragma unroll
                for (int k = 0; k < EACH / 2; k++) {
                    const float *v = meet + (slice * EACH / 2 + k) * 32 + lane;
                    float of_slice[SLICES], *to = total + (half * EACH / 2 + k) * WIDE_THREADS;
#pragma unroll
                    for (int i = 0; i < SLICES; i++) of_slice[i] = v[i * SUMS / 2 * 32];
#pragma unroll
                    for (int d = SLICES / 2; d > 0; d >>= 1)
#pragma unroll
                        for (int i = 0; i < d; i++) of_slice[i] = __fadd_rn(of_slice[i], of_slice[i + d]);
                    *to = __fadd_rn(*to, of_slice[0]);
                }
            }
#pragma unroll
            for (int k = 0; k < X_COPIES; k++) square_total[k] = __fadd_rn(square_total[k], slices_sum(square_part[k]));
        }
        __syncthreads(); /* nobody reads this buffer any more, and the next step is whole */
        copy_step(stage);
        stage = next;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");

#pragma unroll
    for (int k = 0; k < X_COPIES; k++)
        if (piece == 0) scales[of + COPY_ROWS * k] = cu_norm_scale(square_total[k], D, j.eps);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const int at = k / (EACH / 2) * (SUMS / 2) + slice * EACH / 2 + k % (EACH / 2), r = at / WIDE_X * 4 + row_group;
        const int32_t row = row0 + r, e = at % WIDE_X * 8 + expert_group;
        const float of_both = __fmul_rn(total[k * WIDE_THREADS], scales[r]);
        if (row < j.n_row && expert0 + e < n_expert) routes.logit[(int64_t)row * n_expert + expert0 + e] = of_both;
        meet[r * WIDE_EXPERTS + e] = of_both;
    }
    if (n_expert > WIDE_EXPERTS) return; /* choose_many chooses */
    __shared__ int32_t count[WIDE_EXPERTS], start[WIDE_EXPERTS + 1], tile_start[WIDE_EXPERTS + 1];
    if (thread < WIDE_EXPERTS) count[thread] = 0;
    __syncthreads();
#pragma unroll 1
    for (int r = slice * (ROWS / SLICES); r < (slice + 1) * (ROWS / SLICES); r += WIDE_CHOICE)
        choose_into<WIDE_CHOICE, WIDE_EXPERTS / 32>(routes, count, meet + r * WIDE_EXPERTS, WIDE_EXPERTS, j.bias,
                                                    j.norm_min, row0 + r, j.n_row);
    list_last(routes, count, start, tile_start);
}

template <int R, int N> static cudaError_t launch_wide(cudaStream_t s, const cu_route_job *j, const cu_routes *r) {
    static uint64_t ready;
    constexpr int BYTES =
        (WIDE_STAGES * N * (4 * R + WIDE_EXPERTS) * 32 + SLICES * R * WIDE_X / 2 * 32 + R * WIDE_X * 32) *
        (int)sizeof(float);
    const cudaError_t e = cu_shared_bytes(&ready, (const void *)wide_logits<R, N>, BYTES);
    if (e != cudaSuccess) return e;
    cu_route_job job = *j;
    cu_routes routes = *r;
    void *args[] = {&job, &routes};
    return cu_launch(s, (const void *)wide_logits<R, N>,
                     dim3(pieces(j->n_row, 4 * R), pieces(r->n_expert, WIDE_EXPERTS)), WIDE_THREADS, BYTES, true, 1,
                     args);
}

/* ---- choice and sort, apart ----------------------------------------------------------------------------------------
 */

/* At most FEW_ROWS rows: choice and sort by one block. */
template <int Q>
static __global__ void __launch_bounds__(32 * FEW_WARPS)
    choose_few(cu_routes r, const float *bias, float norm_min, int32_t n_row) {
    __shared__ int32_t count[EXPERTS_MAX], start[EXPERTS_MAX + 1], tile_start[EXPERTS_MAX + 1];
    cu_launch_next();
    cu_wait_previous();
    const int32_t lane = (int32_t)(threadIdx.x & 31), warp = (int32_t)(threadIdx.x >> 5);
    const int32_t n_warp = (int32_t)(blockDim.x >> 5);
    for (int32_t e = (int32_t)threadIdx.x; e < r.n_expert; e += (int32_t)blockDim.x) count[e] = 0;
    __syncthreads();
    int32_t expert[FEW_ROWS_A_WARP], nth[FEW_ROWS_A_WARP]; /* of lane < K: of the row's entry of that rank */
#pragma unroll
    for (int k = 0; k < FEW_ROWS_A_WARP; k++) {
        const int32_t row = warp + k * n_warp;
        expert[k] = nth[k] = 0;
        if (row >= n_row) continue;
        float share, logit[Q];
#pragma unroll
        for (int q = 0; q < Q; q++)
            logit[q] = lane + 32 * q < r.n_expert ? r.logit[(int64_t)row * r.n_expert + lane + 32 * q] : 0.0f;
        expert[k] = choose_row<Q>(&share, logit, bias, norm_min, r.n_expert, r.n_used);
        if (lane >= r.n_used) continue;
        r.chosen[row * r.n_used + lane] = expert[k];
        r.share[row * r.n_used + lane] = share;
        nth[k] = atomicAdd(&count[expert[k]], 1);
    }
    __syncthreads();
    list_tiles(r, count, start, tile_start);
#pragma unroll
    for (int k = 0; k < FEW_ROWS_A_WARP; k++) {
        const int32_t row = warp + k * n_warp;
        if (row >= n_row || lane >= r.n_used) continue;
        const int32_t entry = row * r.n_used + lane, place = start[expert[k]] + nth[k];
        r.place_entry[place] = entry;
        r.entry_place[entry] = place;
    }
}

/* Any number of rows: a warp two of them. */
template <int Q>
static __global__ void __launch_bounds__(LIST_THREADS)
    choose_many(cu_routes r, const float *bias, float norm_min, int32_t n_row) {
    enum { M = CHOOSE_ROWS * 32 / LIST_THREADS };
    __shared__ int32_t count[EXPERTS_MAX], start[EXPERTS_MAX + 1], tile_start[EXPERTS_MAX + 1];
    cu_launch_next();
    cu_wait_previous();
    const int32_t E = r.n_expert, row = (int32_t)(blockIdx.x * CHOOSE_ROWS + threadIdx.x / 32 * M);
    for (int32_t e = (int32_t)threadIdx.x; e < E; e += LIST_THREADS) count[e] = 0;
    __syncthreads();
    choose_into<M, Q>(r, count, r.logit + (int64_t)row * E, E, bias, norm_min, row, n_row);
    list_last(r, count, start, tile_start);
}

/* Entries to their places: a block takes a run of places of each expert for its entries at once. */
static __global__ void __launch_bounds__(LIST_THREADS) place_entries(cu_routes r, int32_t n_entry) {
    __shared__ int32_t count[EXPERTS_MAX], base[EXPERTS_MAX];
    cu_launch_next();
    cu_wait_previous();
    const int32_t thread = (int32_t)threadIdx.x, E = r.n_expert, entry0 = (int32_t)blockIdx.x * PLACE_ENTRIES + thread;
    int32_t *next_place = r.scratch + E, expert[PLACE_ENTRIES / LIST_THREADS], nth[PLACE_ENTRIES / LIST_THREADS];
    for (int32_t e = thread; e < E; e += LIST_THREADS) {
        count[e] = 0;
        if (blockIdx.x == 0) r.scratch[e] = 0; /* for the next launches */
    }
    if (blockIdx.x == 0 && thread == 0) r.scratch[2 * E] = 0;
#pragma unroll
    for (int k = 0; k < PLACE_ENTRIES / LIST_THREADS; k++) {
        const int32_t entry = entry0 + k * LIST_THREADS;
        expert[k] = entry < n_entry ? r.chosen[entry] : -1;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < PLACE_ENTRIES / LIST_THREADS; k++)
        nth[k] = expert[k] >= 0 ? atomicAdd(&count[expert[k]], 1) : 0;
    __syncthreads();
    for (int32_t e = thread; e < E; e += LIST_THREADS) base[e] = count[e] > 0 ? atomicAdd(&next_place[e], count[e]) : 0;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < PLACE_ENTRIES / LIST_THREADS; k++) {
        if (expert[k] < 0) continue;
        const int32_t entry = entry0 + k * LIST_THREADS, place = base[expert[k]] + nth[k];
        r.place_entry[place] = entry;
        r.entry_place[entry] = place;
    }
}

cudaError_t cu_route(cudaStream_t s, const cu_route_job *j, const cu_routes *r) {
    const int32_t T = j->n_row, E = r->n_expert, K = r->n_used;
    if (T <= 0 || E <= 0 || E > EXPERTS_MAX || K <= 0 || K > USED_MAX || K > E || j->n_hidden % 4 != 0)
        return cudaErrorInvalidValue;
    cudaError_t e;
    bool chosen = false;
    if (T <= 4)
        e = cu_launch_args(s, few_logits<1, 10>, dim3(pieces(E, 2), (unsigned)T), 64, true, *j, r->logit, E);
    else if (T < TILED_ROWS)
        e = cu_launch_args(s, few_logits<4, 4>, dim3(pieces(E, 8), pieces(T, 4)), 256, true, *j, r->logit, E);
    else if (T < WIDE_ROWS || CU_PORTABLE) /* wide_logits wants more shared memory than some GPUs have */
        e = cu_launch_args(s, many_logits<4, 4, 2, 2, 8>, dim3(pieces(T, 16), pieces(E, 16)), 128, true, *j, r->logit,
                           E);
    else {
        chosen = E <= WIDE_EXPERTS;
        e = T < WIDEST_ROWS || part_columns(j->n_hidden) % 64 != 0 ? launch_wide<8, 1>(s, j, r)
                                                                   : launch_wide<16, 2>(s, j, r);
    }
    if (e != cudaSuccess) return e;
    if (T <= FEW_ROWS) {
        const unsigned threads = (unsigned)(T < 16 ? 16 : T < FEW_WARPS ? T : FEW_WARPS) * 32u;
        return cu_launch_args(s, E <= 64 ? choose_few<2> : choose_few<EXPERTS_MAX / 32>, 1, threads, true, *r, j->bias,
                              j->norm_min, T);
    }
    if (!chosen)
        e = cu_launch_args(s, E <= 64 ? choose_many<2> : choose_many<EXPERTS_MAX / 32>, pieces(T, CHOOSE_ROWS),
                           LIST_THREADS, true, *r, j->bias, j->norm_min, T);
    if (e != cudaSuccess) return e;
    return cu_launch_args(s, place_entries, pieces(T * K, PLACE_ENTRIES), LIST_THREADS, true, *r, T * K);
}

/* ---- the sum of a row's experts ------------------------------------------------------------------------------------
 */

/* A thread: W (4 or 1) neighbouring numbers of one row. USED: K where it is compiled in, 0: any. */
template <int W, int USED>
static __global__ void __launch_bounds__(COMBINE_THREADS)
    combine_kernel(float *x, float *out, const float *expert_y, const float *shared, const int32_t *entry_place,
                   const float *share, int32_t n_used, int32_t n_hidden) {
    cu_launch_next();
    cu_wait_previous();
    const int32_t K = USED > 0 ? USED : n_used, row = (int32_t)blockIdx.x;
    const int32_t i = (int32_t)(blockIdx.y * COMBINE_THREADS + threadIdx.x) * W;
    if (i >= n_hidden) return;
    const int64_t at = (int64_t)row * n_hidden + i;
    float y[W], old[W], sh[W];
    if (W == 4) {
        *(float4 *)old = *(const float4 *)(x + at);
        *(float4 *)sh = shared ? *(const float4 *)(shared + at) : zero4();
    } else {
        old[0] = x[at];
        sh[0] = shared ? shared[at] : 0.0f;
    }
#pragma unroll
    for (int w = 0; w < W; w++) y[w] = 0.0f;
#pragma unroll(USED > 0 ? USED : 4)
    for (int32_t k = 0; k < K; k++) {
        const float part = share[(int64_t)row * K + k];
        const float *from = expert_y + (int64_t)entry_place[(int64_t)row * K + k] * n_hidden + i;
        float v[W];
        if (W == 4)
            *(float4 *)v = *(const float4 *)from;
        else
            v[0] = from[0];
#pragma unroll
        for (int w = 0; w < W; w++) y[w] = __fmaf_rn(part, v[w], y[w]);
    }
    /* y + 0 is y but for the sign of a zero, which x + y does not show unless x is a zero as well */
#pragma unroll
    for (int w = 0; w < W; w++) old[w] = __fadd_rn(old[w], __fadd_rn(y[w], sh[w]));
    if (W == 4) {
        *(float4 *)(x + at) = *(const float4 *)old;
        if (out) *(float4 *)(out + at) = *(const float4 *)y;
    } else {
        x[at] = old[0];
        if (out) out[at] = y[0];
    }
}

/* The same and the norm of what comes out, as cu_norm has it: a block a row of at most 4 ROW_THREADS numbers. */
template <int USED, cu_codes C>
static __global__ void __launch_bounds__(ROW_THREADS, 2)
    combine_norm(float *x, const cu_norm_job norm, const float *expert_y, const float *shared,
                 const int32_t *entry_place, const float *share, int32_t n_used, int32_t n_hidden) {
    __shared__ __align__(16) float row_x[4 * ROW_THREADS];
    __shared__ float scale;
    cu_launch_next();
    cu_wait_previous();
    const int32_t K = USED > 0 ? USED : n_used, row = (int32_t)blockIdx.x, i = (int32_t)threadIdx.x * 4;
    const bool in = i < n_hidden;
    const int64_t at = (int64_t)row * n_hidden + i;
    float4 v = zero4();
    uint2 w = make_uint2(0u, 0u);
    if (in) {
        const float4 old = *(const float4 *)(x + at), more = shared ? *(const float4 *)(shared + at) : zero4();
        float4 y = zero4();
        w = *(const uint2 *)(norm.w + i);
#pragma unroll(USED > 0 ? USED : 4)
        for (int32_t k = 0; k < K; k++) {
            const float part = share[(int64_t)row * K + k];
            const float4 e = *(const float4 *)(expert_y + (int64_t)entry_place[(int64_t)row * K + k] * n_hidden + i);
            y.x = __fmaf_rn(part, e.x, y.x), y.y = __fmaf_rn(part, e.y, y.y);
            y.z = __fmaf_rn(part, e.z, y.z), y.w = __fmaf_rn(part, e.w, y.w);
        }
        v.x = __fadd_rn(old.x, __fadd_rn(y.x, more.x)), v.y = __fadd_rn(old.y, __fadd_rn(y.y, more.y));
        v.z = __fadd_rn(old.z, __fadd_rn(y.z, more.z)), v.w = __fadd_rn(old.w, __fadd_rn(y.w, more.w));
        *(float4 *)(x + at) = *(float4 *)(row_x + i) = v;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        const float sum = cu_sum_squares(row_x, n_hidden);
        if (threadIdx.x == 0) scale = cu_norm_scale(sum, n_hidden, norm.eps);
    }
    __syncthreads();
    uint2 to;
    to.x = cu_round2(cu_normed(v.x, scale, (cu_bf16)w.x), cu_normed(v.y, scale, (cu_bf16)(w.x >> 16)));
    to.y = cu_round2(cu_normed(v.z, scale, (cu_bf16)w.y), cu_normed(v.w, scale, (cu_bf16)(w.y >> 16)));
    if (norm.xn && in) *(uint2 *)(norm.xn + (int64_t)row * CU_PAD(n_hidden) + i) = to;
    if constexpr (C != CU_CODES_NONE) { /* a warp a segment; beyond the row v and w are zero */
        const float of[4] = {__uint_as_float(to.x << 16), __uint_as_float(to.x & 0xffff0000u),
                             __uint_as_float(to.y << 16), __uint_as_float(to.y & 0xffff0000u)};
        float seg_scale;
        *(uint32_t *)(norm.x8.code + row * norm.x8.ldx + i) = a8_quantize<C>(&seg_scale, of);
        if (threadIdx.x % 32 == 0) norm.x8.scale[threadIdx.x / 32 * norm.x8.ld_scale + row] = seg_scale;
    }
}

template <cu_codes C> static auto combine_norm_of(int32_t n_used) {
    return n_used == 6 ? combine_norm<6, C> : combine_norm<0, C>;
}

cudaError_t cu_combine(cudaStream_t s, float *x, float *out, const float *expert_y, const float *shared,
                       const cu_routes *r, int32_t n_row, int32_t n_hidden, const cu_norm_job *norm) {
    if (n_row <= 0) return cudaSuccess;
    const int32_t K = r->n_used;
    /* `shared` may come from another stream: then more is waited for than the kernel before */
    if (norm && !out && n_hidden % 4 == 0 && n_hidden <= 4 * ROW_THREADS)
        return cu_launch_args(s,
                              norm->codes == CU_CODES_F8   ? combine_norm_of<CU_CODES_F8>(K)
                              : norm->codes == CU_CODES_I8 ? combine_norm_of<CU_CODES_I8>(K)
                                                           : combine_norm_of<CU_CODES_NONE>(K),
                              (unsigned)n_row, (unsigned)(n_hidden + 127) / 128 * 32, !shared, x, *norm, expert_y,
                              shared, r->entry_place, r->share, K, n_hidden);
    const dim3 wide((unsigned)n_row, pieces(n_hidden, 4 * COMBINE_THREADS));
    const bool four = n_hidden % 4 == 0;
    const cudaError_t e =
        cu_launch_args(s,
                       !four    ? combine_kernel<1, 0>
                       : K == 6 ? combine_kernel<4, 6>
                                : combine_kernel<4, 0>,
                       four ? wide : dim3((unsigned)n_row, pieces(n_hidden, COMBINE_THREADS)), COMBINE_THREADS, !shared,
                       x, out, expert_y, shared, r->entry_place, r->share, K, n_hidden);
    if (e != cudaSuccess || !norm) return e;
    return cu_norm_run(s, norm, x, n_row, n_hidden);
}
