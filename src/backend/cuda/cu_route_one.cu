/* cu_route_few of one row: norm, router, choice and lists, and the normed row in 8 bits, in a launch of its own. All
 * else of a layer waits for the choice, and at one row nothing of it is work: what takes time is code that is not there
 * yet and words on their way.
 *
 * One cluster. A warp has a logit: its row of the router and the norm's weights are in registers before the kernel in
 * front is done, and then it only waits for x. Of rank 0 one servant has the row's scale meanwhile, and the other
 * chooses. The servants of the other ranks make the row's codes. */
#include "backend/cuda/cu_a8_device.cuh"
#include "backend/cuda/cu_cluster.cuh"
#include "backend/cuda/cu_launch.cuh"
#include "backend/cuda/cu_route.cuh"

enum {
    RANKS = 8,
    LOGIT_WARPS = 8,
    SERVANTS = 2,
    THREADS = (LOGIT_WARPS + SERVANTS) * 32,
    EXPERTS_MAX = RANKS * LOGIT_WARPS,
    USED_MAX = 16,
    STEPS = 20, /* runs of 32 columns of a part */
    BATCH = 4,  /* of them at once */
    INPUTS_MAX = STEPS * 32 * PARTS
};

typedef struct one_args {
    cu_route_job j;
    cu_routes r;
    cu_x8 out;
    cu_codes codes;
    cu_bf16 *xn;
} one_args;

typedef struct one_shared {
    __align__(16) float x[INPUTS_MAX];
    float sum[EXPERTS_MAX], bias[EXPERTS_MAX]; /* logits but for the scale; of rank 0 */
    uint64_t row, came;                        /* x; all logits and their scale */
    float scale;
} one_shared;

/* ---- a logit ----------------------------------------------------------------------------------------------------- */

/* The lane's share but for the row's scale, as route_logits adds it. x: from the lane's first column on. */
static __device__ __forceinline__ float share_of(const float *x, const float4 w[STEPS], const uint2 norm[STEPS],
                                                 int32_t n_step) {
    float sum = 0.0f;
#pragma unroll
    for (int k0 = 0; k0 < STEPS; k0 += BATCH) {
        float4 v[BATCH];
        if (k0 >= n_step) break;
#pragma unroll
        for (int k = 0; k < BATCH; k++) v[k] = *(const float4 *)(x + (k0 + k) * 32);
#pragma unroll
        for (int k = 0; k < BATCH; k++) sum = add_products(times(v[k], norm[k0 + k]), w[k0 + k], sum);
    }
    return sum;
}

/* ---- the row to codes -------------------------------------------------------------------------------------------- */

/* The nth of all servants of ranks but the first: its segments. */
template <cu_codes C>
static __device__ __forceinline__ void quantize_row(const one_args *a, const float *x, int32_t nth, int lane) {
    const int32_t D = a->j.n_hidden, n_seg = D / CU_SEGMENT;
    const float scale = cu_norm_scale(cu_sum_squares(x, D), D, a->j.eps);
#pragma unroll 1
    for (int32_t seg = nth; seg < n_seg; seg += (RANKS - 1) * SERVANTS) {
        const int32_t i = seg * CU_SEGMENT + lane * 4;
        const float4 f = *(const float4 *)(x + i);
        const uint2 w = __ldg((const uint2 *)(a->j.norm_w + i));
        uint2 bits;
        bits.x = cu_round2(cu_normed(f.x, scale, (cu_bf16)w.x), cu_normed(f.y, scale, (cu_bf16)(w.x >> 16)));
        bits.y = cu_round2(cu_normed(f.z, scale, (cu_bf16)w.y), cu_normed(f.w, scale, (cu_bf16)(w.y >> 16)));
        if (a->xn) *(uint2 *)(a->xn + i) = bits;
        const float v[4] = {__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u),
                            __uint_as_float(bits.y << 16), __uint_as_float(bits.y & 0xffff0000u)};
        float of_codes;
        if constexpr (C != CU_CODES_NONE) {
            *(uint32_t *)(a->out.code + i) = a8_quantize<C>(&of_codes, v);
            if (lane == 0) a->out.scale[seg * a->out.ld_scale] = of_codes;
        }
    }
}

/* ---- choice ------------------------------------------------------------------------------------------------------ */

/* The lists of the only row from its logits. Each chosen expert has one entry. */
static __device__ __forceinline__ void choose_one(const one_shared *s, const one_args *a, int lane) {
    const cu_routes *r = &a->r;
    const int32_t E = r->n_expert, K = r->n_used;
    float logit[2], share;
#pragma unroll
    for (int q = 0; q < 2; q++) logit[q] = __fmul_rn(s->sum[lane + 32 * q], s->scale);
    const int32_t mine = choose_row<2>(&share, logit, a->j.bias ? s->bias : NULL, a->j.norm_min, E, K);
    uint32_t chosen[2];
#pragma unroll
    for (int q = 0; q < 2; q++)
        chosen[q] = __reduce_or_sync(0xffffffffu, lane < K && mine / 32 == q ? 1u << mine % 32 : 0u);
    const uint32_t below = (1u << lane) - 1, below_mine = (1u << mine % 32) - 1;
    const int32_t n_low = __popc(chosen[0]);
    const int32_t place = mine < 32 ? __popc(chosen[0] & below_mine) : n_low + __popc(chosen[1] & below_mine);
    if (lane < K) {
        if (r->told)
            asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(r->told + place), "r"(mine + 1) : "memory");
        r->tile_expert[place] = mine;
        r->tile_place[place] = place;
        r->place_entry[place] = lane;
        r->entry_place[lane] = place;
        r->chosen[lane] = mine;
        r->share[lane] = share;
    }
#pragma unroll
    for (int q = 0; q < 2; q++)
        if (lane + 32 * q < E) {
            r->first[lane + 32 * q] = (q ? n_low : 0) + __popc(chosen[q] & below);
            r->logit[lane + 32 * q] = logit[q];
        }
    if (lane == 0) r->first[E] = *r->n_tile = K;
}

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

static __global__ void __launch_bounds__(THREADS, 1) route_one(const __grid_constant__ one_args a) {
    __shared__ one_shared s;
    const cu_route_job *j = &a.j;
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    const int32_t rank = (int32_t)blockIdx.x, D = j->n_hidden, E = a.r.n_expert, expert = rank + RANKS * warp;
    const uint32_t row = (uint32_t)__cvta_generic_to_shared(&s.row), came = row + 8;

    if (warp == LOGIT_WARPS) {
        if (lane == 0) {
            bar_init(row, 1);
            bar_init(came, 2);
            bar_init_end();
            bar_arrive_expect(came, E * 4);
            bar_arrive_expect(row, D * 4);
        }
        __syncwarp();
    }
    /* Shared experts that begin beside this kernel have their blocks before up's come, which can only wait. That up
     * then comes behind our own wait is what cu_route_few_tells rests upon. */
    if (!j->beside && warp == LOGIT_WARPS) cu_launch_next();
    cluster_arrive_relaxed(); /* barriers are all that the others have to see */

    if (warp < LOGIT_WARPS) {
        const int32_t n_step = D / (32 * PARTS), first = lane / SLICES * (D / PARTS) + lane % SLICES * 4;
        const float *const of = j->router + (int64_t)min(expert, E - 1) * D + first;
        float4 w[STEPS];
        uint2 norm[STEPS];
#pragma unroll
        for (int k = 0; k < STEPS; k++)
            if (k / BATCH * BATCH < n_step) w[k] = __ldg((const float4 *)(of + k * 32));
#pragma unroll
        for (int k = 0; k < STEPS; k++)
            if (k / BATCH * BATCH < n_step) norm[k] = __ldg((const uint2 *)(j->norm_w + first + k * 32));
        cluster_meet(); /* rank 0 can be sent to */
        cu_wait_previous();
        if (warp == 0 && lane == 0) copy_bulk((uint32_t)__cvta_generic_to_shared(s.x), j->x, D * 4, row);
        bar_wait(row, 0);
        if (warp == 0) cu_launch_next();
        const float sum = parts_sum(share_of(s.x + first, w, norm, n_step));
        if (lane == 0 && expert < E)
            send_counted(at_rank((uint32_t)__cvta_generic_to_shared(s.sum + expert), 0), sum, at_rank(came, 0));
        return;
    }
    if (rank > 0 || warp > LOGIT_WARPS) {
        const int32_t nth = (rank - 1) * SERVANTS + warp - LOGIT_WARPS;
        cluster_meet();
        cu_wait_previous();
        bar_wait(row, 0);
        if (rank == 0) {
            const float *const x = s.x + lane / SLICES * (D / PARTS) + lane % SLICES * 4;
            float square = 0.0f;
#pragma unroll BATCH
            for (int32_t i = 0; i < D / PARTS; i += 32) square = cu_add_squares(*(const float4 *)(x + i), square);
            const float scale = cu_norm_scale(parts_sum(square), D, j->eps);
            if (lane == 0) {
                s.scale = scale;
                bar_arrive(came);
            }
            return;
        }
        if (a.codes == CU_CODES_F8)
            quantize_row<CU_CODES_F8>(&a, s.x, nth, lane);
        else if (a.codes == CU_CODES_I8)
            quantize_row<CU_CODES_I8>(&a, s.x, nth, lane);
        else if (a.xn)
            quantize_row<CU_CODES_NONE>(&a, s.x, nth, lane);
        return;
    }
    if (j->bias)
#pragma unroll 1
        for (int32_t e = lane; e < E; e += 32) copy4((uint32_t)__cvta_generic_to_shared(s.bias + e), j->bias + e);
    asm volatile("cp.async.wait_all;" ::: "memory");
    cluster_meet();
    cu_wait_previous();
    hear(came, 0);
    __syncwarp();
    choose_one(&s, &a, lane);
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

static bool takes(const cu_route_job *j, const cu_routes *r) {
    const int32_t E = r->n_expert, K = r->n_used, D = j->n_hidden;
    return j->n_row == 1 && E > 0 && E <= EXPERTS_MAX && K > 0 && K <= USED_MAX && K <= E &&
           D % (32 * PARTS * BATCH) == 0 && D <= INPUTS_MAX && (uintptr_t)j->x % 16 == 0 &&
           (uintptr_t)j->router % 16 == 0 && (uintptr_t)j->norm_w % 8 == 0;
}
/* Only where up comes when all that was before this kernel is done: so is down of the layer before, which left zeros.
 */
bool cu_route_few_tells(const cu_route_job *j, const cu_routes *r) { return j->beside && takes(j, r); }

cudaError_t cu_route_one_run(cudaStream_t s, const cu_route_job *j, const cu_routes *r, const cu_x8 *out,
                             cu_codes codes, cu_bf16 *xn, bool *took) {
    *took = takes(j, r);
    if (!*took) return cudaSuccess;
    one_args a = {*j, *r, {}, codes, xn};
    if (codes != CU_CODES_NONE) a.out = *out;
    void *args[] = {&a};
    return cu_launch(s, (const void *)route_one, RANKS, THREADS, 0, true, RANKS, args);
}
