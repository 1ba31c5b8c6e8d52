/* Linears, plain and of experts, for GPUs without wgmma and copy engine: one kernel for any number of rows, in three
 * shapes. Weights that meet rows of 8 bits are not here.
 *
 * A block has a tile of bands of 16 outputs by rows of x, and eight warps: WM by WN of them share the tile, WK have
 * segments of inputs of their own. Weights and rows come by copies of 16 bytes, a group of 64 inputs of WK segments at
 * a time, into a few buffers in turn:
 *
 *   shape   bands   rows   warps (WM WN WK)   for
 *   few     1       8      1 1 8              up to 8 rows; it also norms them (x_f32)
 *           2       8      2 1 4              the same of pairs
 *   mid     1       32     1 2 4              some
 *           2       32     2 2 2              the same of pairs
 *   large   8       128    4 2 1              many: where the chip has enough tiles of them
 *
 * Every segment is a chain of eight products from zero by one warp, and segments are added up first to last: in
 * registers where WK is 1, else by way of shared memory, where the WK of a round meet. The bits are those that
 * cu_kernels.h promises, whatever the shape.
 *
 *   shared: [stages] { weights [bands][WK] groups | x [WK][rows][8 pieces of 8 inputs, piece p at p ^ (row & 7)] },
 *           then segments [WK][bands][rows][16] f32 */
#include "backend/cuda/cu_device.cuh"
#include "backend/cuda/cu_launch.cuh"
#include "backend/cuda/cu_skinny_unit.cuh"

enum { THREADS = 256, INPUTS = 64, PIECES = 8, SHARED_MOST = 99 * 1024 }; /* what the smallest of these GPUs has */

typedef struct linear_args {
    const unsigned char *pack;
    const float *scale;
    int32_t n_out, n_in, n_band, n_seg, n_row;
    bool pairs;
    cu_epilogue epilogue;
    const cu_bf16 *x;
    int64_t ldx;
    const float *x_f32;
    const cu_bf16 *norm_w;
    float eps;
    float *y;
    int64_t ldy;
    cu_bf16 *h;
    int64_t ldh;
    /* of experts: tiles of n_row places */
    const cu_linear *experts; /* NULL: a plain linear */
    const int32_t *tile_expert, *tile_place, *n_tile, *first;
    const int32_t *place_entry; /* NULL: rows of x by place */
    int32_t n_used;
} linear_args;

/* MB bands and NT tiles of 8 rows of a warp. As many stages as leave room for a second block in most of these GPUs. */
template <cu_format F, int MB, int NT, int WM, int WN, int WK> struct linear_shape {
    static const int bands = MB * WM, rows = 8 * NT * WN;
    static const int group = F == CU_BF16 ? 2048 : F == CU_I4 ? 512 : 1024; /* bytes of a group of 64 inputs */
    static const int x_at = bands * WK * group, stage = x_at + rows * WK * INPUTS * 2;
    static const int part = WK > 1 ? WK *bands *CU_BAND *rows * 4 : 0;
    static const int room = ((WK > 1 ? 80 : 96) * 1024 - part) / stage, stages = room < 4 ? room : 4;
    static const int part_at = stages * stage, bytes = part_at + part;
    static_assert(WM * WN * WK * 32 == THREADS, "warps");
    static_assert(stages > 1 && bytes + 1024 <= SHARED_MOST, "shared memory");
};

static __device__ __forceinline__ uint32_t shared_at(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
static __device__ __forceinline__ void copy16(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
/* Two products' B operand, of 8 rows: lane 8 i + r gives the address of piece i of row r. */
static __device__ __forceinline__ void load_rows(uint32_t b[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(at)
                 : "memory");
}
/* A operand of products 2 half and 2 half + 1 of a group. at: with the lane's 16 bytes added. */
template <cu_format F>
static __device__ __forceinline__ void load_codes(uint32_t a[2][4], const unsigned char *at, int half) {
    if (F == CU_BF16) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const uint4 v = *(const uint4 *)(at + (2 * half + k) * 512);
            a[k][0] = v.x, a[k][1] = v.y, a[k][2] = v.z, a[k][3] = v.w;
        }
    } else {
        skinny_codes_half<F>(a, at, half);
    }
}

/* The scale of output o of a band. */
template <cu_format F>
static __device__ __forceinline__ float output_scale(const linear_args *a, const float *scale, int32_t band, int o) {
    return (F == CU_I8 || F == CU_I4) && band < a->n_band ? scale[band * CU_BAND + o] : 1.0f;
}
static __device__ __forceinline__ int32_t output_of(const linear_args *a, int32_t band, int o) {
    const int32_t out = (a->pairs ? band / 2 : band) * CU_BAND + o;
    return band < a->n_band && out < a->n_out ? out : -1;
}
/* What output `out` of a row was, where that is asked for. */
static __device__ __forceinline__ float output_before(const linear_args *a, int32_t out, int64_t row) {
    return a->epilogue == CU_ADD && out >= 0 ? a->y[row * a->ldy + out] : 0.0f;
}
/* One number of the result; up: of pairs. by, by_up: scales of the outputs. */
template <cu_format F>
static __device__ __forceinline__ void finish(const linear_args *a, int32_t out, int64_t row, float before, float z,
                                              float by, float up, float by_up) {
    if (out < 0) return;
    if (F == CU_I8 || F == CU_I4) z = __fmul_rn(z, by), up = __fmul_rn(up, by_up);
    if (a->epilogue == CU_SWIGLU)
        a->h[row * a->ldh + out] = cu_round(cu_swiglu(z, up));
    else
        a->y[row * a->ldy + out] = a->epilogue == CU_ADD ? __fadd_rn(before, z) : z;
}
template <cu_format F> static __device__ __forceinline__ float add_segment(float total, float segment, float by) {
    return F == CU_F8 ? __fmaf_rn(by, segment, total) : __fadd_rn(segment, total);
}

/* Grid: tiles of bands; tiles of rows, or of experts' places; pieces of the latter. */
template <cu_format F, int MB, int NT, int WM, int WN, int WK>
static __global__ void __launch_bounds__(THREADS) linear_kernel(const __grid_constant__ linear_args a) {
    typedef linear_shape<F, MB, NT, WM, WN, WK> sh;
    /* POSITIONS: outputs and rows of a thread, where WK > 1 */
    enum { STAGES = sh::stages, POSITIONS = (CU_BAND * sh::rows + THREADS - 1) / THREADS };
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ float row_scale[8];
    const int thread = threadIdx.x, lane = thread & 31, warp = thread / 32, g = lane / 4, c = lane % 4;
    const int wk = warp % WK, wm = warp / WK % WM, wn = warp / WK / WM;
    const int32_t band0 = (int32_t)blockIdx.x * sh::bands;

    /* which weights, which rows */
    const unsigned char *pack = a.pack;
    const float *scale = a.scale;
    int32_t row0 = (int32_t)blockIdx.y * sh::rows, n_row = a.n_row - row0;
    if (a.experts) {
        if ((int32_t)blockIdx.y >= *a.n_tile) return;
        const int32_t expert = a.tile_expert[blockIdx.y], piece = (int32_t)blockIdx.z * sh::rows;
        row0 = a.tile_place[blockIdx.y] + piece;
        n_row = min(a.first[expert + 1] - row0, a.n_row - piece);
        pack = (const unsigned char *)a.experts[expert].pack;
        scale = a.experts[expert].scale;
    }
    n_row = min(n_row, sh::rows);
    if (n_row <= 0) return;

    /* What this thread copies of every stage: pieces of weights and of rows, from where they are in the first on. What
     * is not there (bands, rows, segments beyond the last) is not copied: whatever lies in its place goes into sums
     * that nobody reads. */
    enum {
        BAND_PIECES = sh::group / 16,
        W_PIECES = sh::bands * WK * BAND_PIECES,
        X_PIECES = sh::rows * WK * PIECES,
        W_EACH = (W_PIECES + THREADS - 1) / THREADS,
        X_EACH = (X_PIECES + THREADS - 1) / THREADS
    };
    const int32_t n_stage = 2 * ((a.n_seg + WK - 1) / WK);
    const bool norms = sh::rows == 8 && a.x_f32 != NULL;
    const unsigned char *w_from[W_EACH];
    const cu_bf16 *x_from[X_EACH];
#pragma unroll
    for (int j = 0; j < W_EACH; j++) {
        const int i = thread + j * THREADS, unit = i / BAND_PIECES;
        const int32_t band = band0 + unit / WK;
        w_from[j] = pack + ((int64_t)band * a.n_seg + unit % WK) * (2 * sh::group) + i % BAND_PIECES * 16;
        if (i >= W_PIECES || band >= a.n_band) w_from[j] = NULL;
    }
    const auto ask_weights = [&](int32_t t) {
        const uint32_t to = shared_at(memory) + t % STAGES * sh::stage;
        const int64_t on = (int64_t)(t / 2 * WK * 2 + (t & 1)) * sh::group;
#pragma unroll
        for (int j = 0; j < W_EACH; j++) {
            const int i = thread + j * THREADS;
            if (w_from[j] && t / 2 * WK + i / BAND_PIECES % WK < a.n_seg) copy16(to + i * 16, w_from[j] + on);
        }
    };
    const auto ask_rows = [&](int32_t t) {
        unsigned char *stage = memory + t % STAGES * sh::stage + sh::x_at;
        const int32_t on = t / 2 * WK * CU_SEGMENT + (t & 1) * INPUTS;
#pragma unroll
        for (int j = 0; j < X_EACH; j++) {
            const int i = thread + j * THREADS, piece = i % PIECES, row = i / PIECES / WK, k = i / PIECES % WK;
            unsigned char *to = stage + (k * sh::rows + row) * (INPUTS * 2) + (piece ^ (row & 7)) * 16;
            if (row >= n_row || t / 2 * WK + k >= a.n_seg) continue;
            if (!norms) {
                copy16(shared_at(to), x_from[j] + on);
                continue;
            }
            const int32_t first = on + k * CU_SEGMENT + piece * 8;
            const float *x = a.x_f32 + (int64_t)row * a.n_in;
            float v[8];
            cu_bf16 w[8];
            uint32_t word[4];
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const int32_t at = min(first + e, a.n_in - 1);
                v[e] = x[at], w[e] = a.norm_w[at];
            }
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = first + e < a.n_in ? cu_normed(v[e], row_scale[row], w[e]) : 0.0f;
#pragma unroll
            for (int e = 0; e < 4; e++) word[e] = cu_round2(v[2 * e], v[2 * e + 1]);
            *(uint4 *)to = make_uint4(word[0], word[1], word[2], word[3]);
        }
        asm volatile("cp.async.commit_group;" ::: "memory"); /* an empty group counts as well */
    };
    for (int t = 0; t < STAGES - 1; t++) ask_weights(t);

#pragma unroll
    for (int j = 0; j < X_EACH; j++) {
        const int i = thread + j * THREADS, row = row0 + min(i / PIECES / WK, n_row - 1);
        const int32_t from = a.place_entry ? a.place_entry[row] / a.n_used : row;
        x_from[j] = a.x + from * a.ldx + i / PIECES % WK * CU_SEGMENT + i % PIECES * 8;
    }
    if (norms) {
        if (warp < n_row) {
            const float sum = cu_sum_squares(a.x_f32 + (int64_t)warp * a.n_in, a.n_in);
            if (lane == 0) row_scale[warp] = cu_norm_scale(sum, a.n_in, a.eps);
        }
        __syncthreads();
    }
    for (int t = 0; t < STAGES - 1; t++) ask_rows(t);

    float acc[MB][NT][4], total[MB][NT][4], by[MB];
    /* of WK > 1: what the thread adds up, output o of rows (thread / 16) + 16 p; and what that needs besides */
    const int o = thread % CU_BAND;
    float sum[POSITIONS][sh::bands], before[POSITIONS][sh::bands], of_out[sh::bands], of[sh::bands][WK];
#pragma unroll
    for (int m = 0; m < MB; m++) {
        by[m] = 1.0f;
#pragma unroll
        for (int i = 0; i < 4 * NT; i++) total[m][i / 4][i % 4] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < POSITIONS * sh::bands; i++) {
        const int p = i / sh::bands, b = i % sh::bands, r = thread / CU_BAND + p * (THREADS / CU_BAND);
        sum[p][b] = before[p][b] = 0.0f;
        if (WK > 1 && r < n_row) before[p][b] = output_before(&a, output_of(&a, band0 + b, o), row0 + r);
        if (WK > 1 && p == 0) of_out[b] = output_scale<F>(&a, scale, band0 + b, o);
    }

    for (int32_t t = 0; t < n_stage; t++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads(); /* the stage is there; nobody reads the one before any more */
        ask_weights(t + STAGES - 1);
        ask_rows(t + STAGES - 1);
        const unsigned char *stage = memory + t % STAGES * sh::stage;
        const int32_t seg = t / 2 * WK + wk;
        if (t % 2 == 0) {
#pragma unroll
            for (int m = 0; m < MB; m++) {
                const int32_t band = band0 + wm * MB + m;
                if (F == CU_F8 && WK == 1 && band < a.n_band) by[m] = scale[(int64_t)band * a.n_seg + seg];
#pragma unroll
                for (int i = 0; i < 4 * NT; i++) acc[m][i / 4][i % 4] = 0.0f;
            }
#pragma unroll
            for (int i = 0; F == CU_F8 && WK > 1 && i < sh::bands * WK; i++) {
                const int32_t band = min(band0 + i / WK, a.n_band - 1), s = min(t / 2 * WK + i % WK, a.n_seg - 1);
                of[i / WK][i % WK] = scale[(int64_t)band * a.n_seg + s];
            }
        }
        if (seg < a.n_seg) {
            const unsigned char *w = stage + (wm * MB * WK + wk) * sh::group + lane * 16;
            const uint32_t x = shared_at(stage + sh::x_at) + (wk * sh::rows + wn * NT * 8 + (lane & 7)) * (INPUTS * 2);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t code[MB][2][4], b[NT][4];
#pragma unroll
                for (int m = 0; m < MB; m++) load_codes<F>(code[m], w + m * WK * sh::group, half);
#pragma unroll
                for (int n = 0; n < NT; n++)
                    load_rows(b[n], x + n * 8 * (INPUTS * 2) + ((half * 4 + lane / 8) ^ (lane & 7)) * 16);
#pragma unroll
                for (int k = 0; k < 2; k++) /* the second product of a sum long after the first, which it waits for */
#pragma unroll
                    for (int n = 0; n < NT; n++)
#pragma unroll
                        for (int m = 0; m < MB; m++) cu_mma(acc[m][n], code[m][k], b[n][2 * k], b[n][2 * k + 1]);
            }
        }
        if (t % 2 == 0) continue;
        if constexpr (WK == 1) {
#pragma unroll
            for (int m = 0; m < MB; m++)
#pragma unroll
                for (int i = 0; i < 4 * NT; i++)
                    total[m][i / 4][i % 4] = add_segment<F>(total[m][i / 4][i % 4], acc[m][i / 4][i % 4], by[m]);
        } else {
            float *part = (float *)(memory + sh::part_at);
#pragma unroll
            for (int m = 0; m < MB; m++)
#pragma unroll
                for (int n = 0; n < NT; n++)
                    skinny_put(part + ((wk * sh::bands + wm * MB + m) * sh::rows + (wn * NT + n) * 8) * CU_BAND,
                               acc[m][n], 8, g, c);
            __syncthreads();
#pragma unroll
            for (int p = 0; p < POSITIONS; p++) {
                const int r = thread / CU_BAND + p * (THREADS / CU_BAND);
                if (r >= sh::rows) break;
#pragma unroll
                for (int b = 0; b < sh::bands; b++) {
                    float segment[WK];
#pragma unroll
                    for (int k = 0; k < WK; k++)
                        segment[k] = part[(k * sh::bands + b) * sh::rows * CU_BAND + skinny_part_at(r, o)];
#pragma unroll
                    for (int k = 0; k < WK; k++)
                        if (t / 2 * WK + k < a.n_seg)
                            sum[p][b] = add_segment<F>(sum[p][b], segment[k], F == CU_F8 ? of[b][k] : 1.0f);
                }
            }
        }
    }

    const int step = a.pairs ? 2 : 1;
    if constexpr (WK > 1) {
#pragma unroll
        for (int p = 0; p < POSITIONS; p++) {
            const int r = thread / CU_BAND + p * (THREADS / CU_BAND);
#pragma unroll
            for (int b = 0; b < sh::bands; b++) {
                const int up = b + 1 < sh::bands ? b + 1 : b;
                if (r < n_row && b % step == 0)
                    finish<F>(&a, output_of(&a, band0 + b, o), row0 + r, before[p][b], sum[p][b], of_out[b], sum[p][up],
                              of_out[up]);
            }
        }
    } else {
#pragma unroll
        for (int m = 0; m < MB; m++) {
            const int32_t band = band0 + wm * MB + m;
            const int up = m + 1 < MB ? m + 1 : m;
            if (m % step != 0) continue;
#pragma unroll
            for (int half = 0; half < 2; half++) { /* outputs g and g + 8 */
                const int32_t out = output_of(&a, band, g + 8 * half);
                const float of_z = output_scale<F>(&a, scale, band, g + 8 * half);
                const float of_up = a.pairs ? output_scale<F>(&a, scale, band + 1, g + 8 * half) : 1.0f;
#pragma unroll
                for (int i = 0; i < 2 * NT; i++) {
                    const int n = i / 2, e = 2 * half + i % 2, r = (wn * NT + n) * 8 + 2 * c + i % 2;
                    if (r < n_row)
                        finish<F>(&a, out, row0 + r, output_before(&a, out, row0 + r), total[m][n][e], of_z,
                                  total[up][n][e], of_up);
                }
            }
        }
    }
}

/* ---- launches ---------------------------------------------------------------------------------------------------- */

enum { FEW, MID, LARGE };
enum { MID_ROWS = 32, LARGE_ROWS = 128, LARGE_BANDS = 8 };

/* n_tile: tiles of experts' places; 0: plain. */
template <cu_format F, int MB, int NT, int WM, int WN, int WK>
static cudaError_t run_shape(cudaStream_t s, const linear_args *a, int64_t n_tile) {
    typedef linear_shape<F, MB, NT, WM, WN, WK> sh;
    static uint64_t ready;
    const void *kernel = (const void *)linear_kernel<F, MB, NT, WM, WN, WK>;
    const cudaError_t e = cu_shared_bytes(&ready, kernel, sh::bytes);
    if (e != cudaSuccess) return e;
    const unsigned bands = (unsigned)((a->n_band + sh::bands - 1) / sh::bands);
    const unsigned rows = (unsigned)((a->n_row + sh::rows - 1) / sh::rows);
    linear_args args = *a;
    void *list[] = {&args};
    return cu_launch(s, kernel, n_tile ? dim3(bands, (unsigned)n_tile, rows) : dim3(bands, rows), THREADS, sh::bytes,
                     false, 1, list);
}
template <cu_format F> static cudaError_t run_format(cudaStream_t s, const linear_args *a, int64_t n_tile, int shape) {
    if (shape == LARGE) return run_shape<F, 2, 8, 4, 2, 1>(s, a, n_tile);
    if (shape == MID)
        return a->pairs ? run_shape<F, 1, 2, 2, 2, 2>(s, a, n_tile) : run_shape<F, 1, 2, 1, 2, 4>(s, a, n_tile);
    return a->pairs ? run_shape<F, 1, 1, 2, 1, 4>(s, a, n_tile) : run_shape<F, 1, 1, 1, 1, 8>(s, a, n_tile);
}
static cudaError_t run(cudaStream_t s, const linear_args *a, cu_format f, int64_t n_tile, int shape) {
    switch (f) {
    case CU_BF16: return run_format<CU_BF16>(s, a, n_tile, shape);
    case CU_I8: return run_format<CU_I8>(s, a, n_tile, shape);
    case CU_I4: return run_format<CU_I4>(s, a, n_tile, shape);
    case CU_F8: return run_format<CU_F8>(s, a, n_tile, shape);
    default: return cudaErrorInvalidValue;
    }
}

static void args_of(linear_args *a, const cu_linear *w) {
    a->pack = (const unsigned char *)w->pack;
    a->scale = w->scale;
    a->n_out = w->n_out;
    a->n_in = w->n_in;
    a->n_band = w->n_band;
    a->n_seg = w->n_seg;
    a->pairs = w->pairs;
}

static cudaError_t run_plain(cudaStream_t s, const cu_job *j, int shape) {
    if (j->n_row <= 0) return cudaSuccess;
    if (j->rope) return cudaErrorInvalidValue; /* cu_linear_run's */
    if (j->x_f32 && (shape != FEW || j->n_row > CU_SKINNY_MAX)) return cudaErrorInvalidValue;
    linear_args a = {};
    args_of(&a, &j->w);
    a.n_row = j->n_row;
    a.epilogue = j->epilogue;
    a.x = j->x;
    a.ldx = j->ldx;
    a.x_f32 = j->x_f32;
    a.norm_w = j->norm_w;
    a.eps = j->eps;
    a.y = j->y;
    a.ldy = j->ldy;
    a.h = j->h;
    a.ldh = j->ldh;
    return run(s, &a, j->w.format, 0, shape);
}

cudaError_t cu_skinny_run(cudaStream_t s, const cu_job *j) { return run_plain(s, j, FEW); }
cudaError_t cu_mid_run(cudaStream_t s, const cu_job *j) { return run_plain(s, j, MID); }
cudaError_t cu_large_run(cudaStream_t s, const cu_job *j) { return run_plain(s, j, LARGE); }

static cudaError_t run_chosen(cudaStream_t s, const cu_job *j) {
    if (j->n_row <= CU_SKINNY_MAX) return cu_skinny_run(s, j);
    int32_t n_core;
    const cudaError_t e = cu_core_count(&n_core);
    if (e != cudaSuccess) return e;
    const int64_t n_tile =
        (int64_t)((j->n_row + LARGE_ROWS - 1) / LARGE_ROWS) * ((j->w.n_band + LARGE_BANDS - 1) / LARGE_BANDS);
    return j->n_row > MID_ROWS && 2 * n_tile >= n_core ? cu_large_run(s, j) : cu_mid_run(s, j);
}

cudaError_t cu_linear_run(cudaStream_t s, const cu_job *j) {
    cu_job one = *j;
    one.rope = NULL;
    const cudaError_t e = run_chosen(s, &one);
    return e == cudaSuccess && j->rope ? cu_rope_store(s, j->y, false, j->rope) : e;
}

static cudaError_t run_grouped(cudaStream_t s, const cu_grouped_job *j, int shape) {
    const cu_routes *r = j->routes;
    linear_args a = {};
    args_of(&a, &j->shape);
    a.n_row = r->tile_rows;
    a.epilogue = j->epilogue;
    a.x = j->x;
    a.ldx = j->ldx;
    a.y = j->y;
    a.ldy = j->ldy;
    a.h = j->h;
    a.ldh = j->ldh;
    a.experts = j->experts;
    a.tile_expert = r->tile_expert;
    a.tile_place = r->tile_place;
    a.n_tile = r->n_tile;
    a.first = r->first;
    a.place_entry = j->gather ? r->place_entry : NULL;
    a.n_used = r->n_used;
    /* tiles of rows as the caller has them: cu_tiles_max knows only those of cu_tile_rows */
    const int64_t n_place = (int64_t)j->n_row * r->n_used, n_tile = n_place / r->tile_rows + r->n_expert;
    return run(s, &a, j->shape.format, n_tile < n_place ? n_tile : n_place, shape);
}

cudaError_t cu_skinny_grouped(cudaStream_t s, const cu_grouped_job *j) { return run_grouped(s, j, FEW); }
cudaError_t cu_mid_grouped(cudaStream_t s, const cu_grouped_job *j) { return run_grouped(s, j, MID); }
cudaError_t cu_large_grouped(cudaStream_t s, const cu_grouped_job *j) { return run_grouped(s, j, LARGE); }

cudaError_t cu_grouped_run(cudaStream_t s, const cu_grouped_job *j) {
    const int32_t rows = j->routes->tile_rows;
    return rows <= CU_SKINNY_MAX ? cu_skinny_grouped(s, j)
           : rows < LARGE_ROWS   ? cu_mid_grouped(s, j)
                                 : cu_large_grouped(s, j);
}
