/* The feed-forward half of a layer of experts for few rows of 8 bits, as cu_step.c has it: router, experts, shared
 * experts beside them (of one row beside the router, too), their sum; layer upon layer, each kernel reading what the
 * one before wrote. Kernels that begin early must not see, or change, too much: the bits are those of one kernel after
 * the other, with shared experts behind the router and a wait after each, also where others take room and memory.
 * `half speed` prints times and checks nothing. */
#include "check.h"

enum { NAME = 112, DRAWN = 4 << 20 };

static void *take(size_t bytes) {
    void *p = calloc(bytes + 1, 1);
    if (!p) abort();
    return p;
}

/* ---- weights ----------------------------------------------------------------------------------------------------- */

/* Matrices of one shape, one after the other, and a device array of them. */
typedef struct set {
    cu_linear first;
    int64_t n_scale;
    cu_linear *all;
} set;

static cu_linear set_at(const set *s, int64_t i) {
    cu_linear w = s->first;
    w.pack = (const unsigned char *)w.pack + i * cu_pack_bytes(&w);
    w.scale += i * s->n_scale;
    return w;
}

/* Codes are drawn up to DRAWN bytes, and those again. */
static set set_new(cu_format f, int32_t n_out, int32_t n_in, bool pairs, int32_t n) {
    set s = {.first = {.format = f, .n_out = n_out, .n_in = n_in, .pairs = pairs}};
    s.first.n_band = CU_BANDS(n_out) * (pairs ? 2 : 1);
    s.first.n_seg = CU_PAD(n_in) / CU_SEGMENT;
    s.n_scale = cu_scale_count(&s.first);
    const int64_t bytes = cu_pack_bytes(&s.first) * n;
    unsigned char *some = take(DRAWN), *pack;
    for (int32_t i = 0; i < DRAWN && i < bytes; i += 8) {
        const uint64_t any = check_a8_random(f);
        memcpy(some + i, &any, 8);
    }
    CHECK_CUDA(cudaMalloc((void **)&pack, (size_t)bytes));
    for (int64_t at = 0; at < bytes; at += DRAWN)
        CHECK_CUDA(cudaMemcpy(pack + at, at ? pack : some, (size_t)(bytes - at < DRAWN ? bytes - at : DRAWN),
                              at ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice));
    float *scale = take((size_t)(s.n_scale * n) * sizeof *scale);
    for (int64_t i = 0; i < s.n_scale * n; i++) scale[i] = 0x1p-10f * (1.0f + 0.5f * check_random());
    s.first.pack = pack;
    s.first.scale = check_new(scale, (size_t)(s.n_scale * n) * sizeof *scale);
    cu_linear *all = take((size_t)n * sizeof *all);
    for (int32_t i = 0; i < n; i++) all[i] = set_at(&s, i);
    s.all = check_new(all, (size_t)n * sizeof *all);
    free(some), free(scale), free(all);
    return s;
}
static void set_free(set *s) {
    CHECK_CUDA(cudaFree((void *)(uintptr_t)s->first.pack));
    check_free((void *)(uintptr_t)s->first.scale);
    check_free(s->all);
}

/* ---- layers ------------------------------------------------------------------------------------------------------ */

typedef struct half {
    int32_t n_row, n_hidden, n_layer, n_expert;
    set shared_up, shared_down, up, down;
    float *x, *router, *bias, *shared_y, *expert_y;
    cu_bf16 *norm_w, *xn, *shared_hid, *expert_hid;
    cu_bf16 *other_x; /* what the others compute from, and to */
    float *other_y;
    cu_x8 x8;
    check_lists lists;
    int32_t *told;
    cudaStream_t stream, side, other;
    cudaEvent_t fork, join;
    bool wait; /* after each kernel */
} half;

static half half_new(cu_format shared, cu_format f, int32_t n_row, int32_t n_hidden, int32_t n_ffn, int32_t n_expert,
                     int32_t n_used, int32_t n_layer) {
    half h = {.n_row = n_row, .n_hidden = n_hidden, .n_layer = n_layer, .n_expert = n_expert};
    const int32_t D = n_hidden, F = n_ffn, E = n_expert, n = n_row * n_used;
    const size_t n_x = (size_t)(n_row * D), n_router = (size_t)(n_layer * E * D);
    h.shared_up = set_new(shared, 2 * F, D, true, n_layer);
    h.shared_down = set_new(shared, D, 2 * F, false, n_layer);
    h.up = set_new(f, F, D, true, n_layer * E);
    h.down = set_new(f, D, F, false, n_layer * E);
    float *router = take(n_router * sizeof *router), *bias = take((size_t)E * sizeof *bias);
    cu_bf16 *norm_w = take((size_t)D * sizeof *norm_w);
    for (size_t i = 0; i < n_router; i++) router[i] = 0.05f * check_random();
    for (int32_t e = 0; e < E; e++) bias[e] = 0.01f * check_random();
    for (int32_t i = 0; i < D; i++) norm_w[i] = ern_bf16_from_f32(1.0f + 0.5f * check_random());
    h.router = check_new(router, n_router * sizeof *router);
    h.bias = check_new(bias, (size_t)E * sizeof *bias);
    h.norm_w = check_new(norm_w, (size_t)D * sizeof *norm_w);
    free(router), free(bias), free(norm_w);
    h.x = check_new(NULL, n_x * sizeof(float));
    h.xn = check_new(NULL, n_x * sizeof(cu_bf16));
    h.shared_hid = check_new(NULL, (size_t)(n_row * 2 * F) * sizeof(cu_bf16));
    h.expert_hid = check_new(NULL, (size_t)(n * F) * sizeof(cu_bf16));
    h.shared_y = check_new(NULL, n_x * sizeof(float));
    h.expert_y = check_new(NULL, (size_t)(n * D) * sizeof(float));
    h.other_x = check_new(NULL, (size_t)(n_row * 2 * F) * sizeof(cu_bf16));
    h.other_y = check_new(NULL, n_x * sizeof(float));
    const int64_t ld_scale = (n_row + 3) / 4 * 4;
    h.x8 = (cu_x8){check_new(NULL, n_x), D, check_new(NULL, (size_t)(D / CU_SEGMENT * ld_scale) * sizeof(float)),
                   ld_scale};
    h.lists = check_lists_new(n_row, E, n_used);
    CHECK_CUDA(cudaMemset(h.lists.memory, 0, h.lists.bytes));
    h.told = check_new(NULL, (size_t)n_used * sizeof *h.told);
    CHECK_CUDA(cudaMemset(h.told, 0, (size_t)n_used * sizeof *h.told));
    CHECK_CUDA(cudaStreamCreateWithFlags(&h.stream, cudaStreamNonBlocking));
    CHECK_CUDA(cudaStreamCreateWithFlags(&h.side, cudaStreamNonBlocking));
    CHECK_CUDA(cudaStreamCreateWithFlags(&h.other, cudaStreamNonBlocking));
    CHECK_CUDA(cudaEventCreateWithFlags(&h.fork, cudaEventDisableTiming));
    CHECK_CUDA(cudaEventCreateWithFlags(&h.join, cudaEventDisableTiming));
    return h;
}
static void half_free(half *h) {
    set_free(&h->shared_up), set_free(&h->shared_down), set_free(&h->up), set_free(&h->down);
    check_free(h->x), check_free(h->router), check_free(h->bias), check_free(h->shared_y), check_free(h->expert_y);
    check_free(h->other_x), check_free(h->other_y);
    check_free(h->norm_w), check_free(h->xn), check_free(h->shared_hid), check_free(h->expert_hid);
    check_free(h->x8.code), check_free(h->x8.scale), check_lists_free(&h->lists);
    check_free(h->told);
    CHECK_CUDA(cudaStreamDestroy(h->stream));
    CHECK_CUDA(cudaStreamDestroy(h->side));
    CHECK_CUDA(cudaStreamDestroy(h->other));
    CHECK_CUDA(cudaEventDestroy(h->fork));
    CHECK_CUDA(cudaEventDestroy(h->join));
}

static void queued(const half *h, cudaError_t e) {
    CHECK_CUDA(e);
    if (h->wait) CHECK_CUDA(cudaDeviceSynchronize());
}

static void queue_shared(const half *h, int32_t layer, bool first) {
    const int64_t ldh = h->shared_up.first.n_out;
    CHECK_CUDA(cudaEventRecord(h->fork, h->stream));
    CHECK_CUDA(cudaStreamWaitEvent(h->side, h->fork, 0));
    cu_job up = {.w = set_at(&h->shared_up, layer),
                 .epilogue = CU_SWIGLU,
                 .n_row = h->n_row,
                 .x = h->xn,
                 .ldx = h->n_hidden,
                 .h = h->shared_hid,
                 .ldh = ldh,
                 .alone = true};
    if (first) up.x_f32 = h->x, up.norm_w = h->norm_w, up.eps = 1e-5f;
    const cu_job down = {.w = set_at(&h->shared_down, layer),
                         .n_row = h->n_row,
                         .x = h->shared_hid,
                         .ldx = ldh,
                         .y = h->shared_y,
                         .ldy = h->n_hidden};
    queued(h, cu_a8_skinny_run(h->side, &up));
    queued(h, cu_a8_skinny_run(h->side, &down));
    CHECK_CUDA(cudaEventRecord(h->join, h->side));
}

static void queue_layer(const half *h, int32_t layer) {
    const bool first = h->n_row == 1 && !h->wait; /* the shared experts begin beside the router */
    const int32_t D = h->n_hidden, E = h->n_expert;
    const cu_route_job route = {.x = h->x,
                                .norm_w = h->norm_w,
                                .eps = 1e-5f,
                                .norm_min = 1e-12f,
                                .router = h->router + (int64_t)layer * E * D,
                                .bias = h->bias,
                                .n_row = h->n_row,
                                .n_hidden = D,
                                .beside = first};
    const int64_t ldh = h->up.first.n_out;
    cu_routes routes = h->lists.r;
    if (cu_route_few_tells(&route, &routes)) routes.told = h->told;
    const cu_grouped_job up = {.shape = h->up.first,
                               .experts = h->up.all + layer * E,
                               .routes = &routes,
                               .n_row = h->n_row,
                               .gather = true,
                               .epilogue = CU_SWIGLU,
                               .x8 = h->x8,
                               .h = h->expert_hid,
                               .ldh = ldh};
    const cu_grouped_job down = {.shape = h->down.first,
                                 .experts = h->down.all + layer * E,
                                 .routes = &routes,
                                 .n_row = h->n_row,
                                 .behind_up = true,
                                 .x = h->expert_hid,
                                 .ldx = ldh,
                                 .y = h->expert_y,
                                 .ldy = D};
    if (first) queue_shared(h, layer, true);
    queued(h, cu_route_few(h->stream, &route, &routes, &h->x8, cu_codes_of(h->up.first.format), h->xn));
    if (!first) queue_shared(h, layer, false);
    queued(h, cu_a8_mid_grouped(h->stream, &up));
    queued(h, cu_a8_mid_grouped(h->stream, &down));
    CHECK_CUDA(cudaStreamWaitEvent(h->stream, h->join, 0));
    queued(h, cu_combine(h->stream, h->x, NULL, h->expert_y, h->shared_y, &routes, h->n_row, D, NULL));
}

/* Up to three kernels of a stream of their own, which take places and memory for a while: kernels of the layers begin
 * and end at other times, and in another order, than alone. */
static void disturb(const half *h) {
    const int32_t n = (int32_t)(fabsf(check_random()) * 3.99f);
    for (int32_t i = 0; i < n; i++) {
        const cu_job down = {.w = set_at(&h->shared_down, (int32_t)(fabsf(check_random()) * 0.99f * (float)h->n_layer)),
                             .n_row = h->n_row,
                             .x = h->other_x,
                             .ldx = h->shared_up.first.n_out,
                             .y = h->other_y,
                             .ldy = h->n_hidden,
                             .alone = true};
        CHECK_CUDA(cu_a8_skinny_run(h->other, &down));
    }
}
/* What kernels leave for one another becomes no numbers. */
static void poison(const half *h) {
    const size_t D = (size_t)h->n_hidden, n = (size_t)h->n_row, n_entry = n * (size_t)h->lists.r.n_used;
    const size_t F = (size_t)h->up.first.n_out;
    CHECK_CUDA(cudaMemset(h->xn, 0xff, n * D * sizeof *h->xn));
    CHECK_CUDA(cudaMemset(h->x8.code, 0xff, n * D));
    CHECK_CUDA(cudaMemset(h->x8.scale, 0xff, D / CU_SEGMENT * (size_t)h->x8.ld_scale * sizeof *h->x8.scale));
    CHECK_CUDA(cudaMemset(h->shared_hid, 0xff, n * 2 * F * sizeof *h->shared_hid));
    CHECK_CUDA(cudaMemset(h->shared_y, 0xff, n * D * sizeof *h->shared_y));
    CHECK_CUDA(cudaMemset(h->expert_hid, 0xff, n_entry * F * sizeof *h->expert_hid));
    CHECK_CUDA(cudaMemset(h->expert_y, 0xff, n_entry * D * sizeof *h->expert_y));
}

/* n_edge: of kernels that wait for another, and how many of them begin before it ends. */
static cudaGraphExec_t graph_of(const half *h, size_t n_edge[2]) {
    enum { EDGES = 256 };
    static cudaGraphNode_t from[EDGES], to[EDGES];
    static cudaGraphEdgeData data[EDGES];
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK_CUDA(cudaStreamBeginCapture(h->stream, cudaStreamCaptureModeThreadLocal));
    for (int32_t k = 0; k < h->n_layer; k++) queue_layer(h, k);
    CHECK_CUDA(cudaStreamEndCapture(h->stream, &graph));
    n_edge[0] = EDGES, n_edge[1] = 0;
    CHECK_CUDA(cudaGraphGetEdges(graph, from, to, data, &n_edge[0]));
    for (size_t i = 0; i < n_edge[0]; i++) n_edge[1] += data[i].type == cudaGraphDependencyTypeProgrammatic;
    CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    CHECK_CUDA(cudaGraphDestroy(graph));
    return exec;
}

static void check_ways(cu_format shared, cu_format f, int32_t n_row, int32_t n_hidden, int32_t n_ffn) {
    enum { WAYS = 3 };
    /* Every other one has company. What goes wrong may do so once in hundreds. */
    const int n_round[WAYS] = {1, check_briefly ? 2 : 100, check_briefly ? 4 : 400};
    char name[NAME], what[2 * NAME] = "";
    static const char *const kind[] = {[CU_F8A8] = "f8", [CU_I8A8] = "i8", [CU_I4A8] = "i4"};
    snprintf(name, sizeof name, "half %s, shared %s, %d x %d, %d rows", kind[f], kind[shared], n_hidden, n_ffn, n_row);
    if (!check_begin(name)) return;
    half h = half_new(shared, f, n_row, n_hidden, n_ffn, 24, 6, 8);
    const size_t n = (size_t)(n_row * n_hidden);
    float *start = take(n * sizeof *start), *want = take(n * sizeof *want), *got = take(n * sizeof *got);
    for (size_t i = 0; i < n; i++) start[i] = check_random();
    size_t n_edge[2];
    cudaGraphExec_t exec = graph_of(&h, n_edge);
    for (int way = 0; way < WAYS; way++) /* 0 waits after each, 1 does not, 2 is a graph */
        for (int round = 0; round < n_round[way]; round++) {
            poison(&h);
            CHECK_CUDA(cudaMemcpy(h.x, start, n * sizeof *start, cudaMemcpyHostToDevice));
            CHECK_CUDA(cudaDeviceSynchronize());
            h.wait = way == 0;
            if (round % 2) disturb(&h);
            for (int32_t k = 0; k < h.n_layer && way < 2; k++) queue_layer(&h, k);
            if (way == 2) CHECK_CUDA(cudaGraphLaunch(exec, h.stream));
            if (round % 2) disturb(&h);
            check_get(way ? got : want, h.x, n * sizeof *got);
            size_t n_wrong = 0, where = 0;
            unsigned rows = 0;
            for (size_t i = n; i-- > 0;)
                if (!isfinite(want[i]) || (way && memcmp(&got[i], &want[i], sizeof *got)))
                    n_wrong++, where = i, rows |= 1u << i / (size_t)n_hidden;
            if (n_wrong && !*what)
                snprintf(what, sizeof what, "%s, round %d: %zu numbers of rows %#x, the first %zu: %g, not %g",
                         way == 2 ? "graph" : "stream", round, n_wrong, rows, where, (double)(way ? got : want)[where],
                         (double)want[where]);
        }
    check_that(name, !*what, what);
    CHECK_CUDA(cudaGraphExecDestroy(exec));
    free(start), free(want), free(got);
    half_free(&h);
}

/* Microseconds of a layer of 21b-a3b in a graph, each layer with weights of its own. */
static void speed(cu_format shared, cu_format f, int32_t n_row) {
    enum { LAYERS = 6, ROUNDS = 30 };
    half h = half_new(shared, f, n_row, 2560, 1536, 64, 6, LAYERS);
    const size_t n = (size_t)n_row * 2560;
    float *start = take(n * sizeof *start), us = 1e30f;
    size_t n_edge[2];
    for (size_t i = 0; i < n; i++) start[i] = check_random();
    cudaEvent_t from, to;
    CHECK_CUDA(cudaEventCreate(&from));
    CHECK_CUDA(cudaEventCreate(&to));
    cudaGraphExec_t exec = graph_of(&h, n_edge);
    for (int round = 0; round < ROUNDS; round++) {
        float ms;
        CHECK_CUDA(cudaMemcpy(h.x, start, n * sizeof *start, cudaMemcpyHostToDevice));
        CHECK_CUDA(cudaDeviceSynchronize());
        CHECK_CUDA(cudaEventRecord(from, h.stream));
        CHECK_CUDA(cudaGraphLaunch(exec, h.stream));
        CHECK_CUDA(cudaEventRecord(to, h.stream));
        CHECK_CUDA(cudaEventSynchronize(to));
        CHECK_CUDA(cudaEventElapsedTime(&ms, from, to));
        us = fminf(us, ms * 1e3f / LAYERS);
    }
    printf("half, format %d, shared %d, %d rows: %.2f us a layer (%zu of %zu edges early)\n", f, shared, n_row,
           (double)us, n_edge[1], n_edge[0]);
    fflush(stdout);
    CHECK_CUDA(cudaGraphExecDestroy(exec));
    CHECK_CUDA(cudaEventDestroy(from));
    CHECK_CUDA(cudaEventDestroy(to));
    free(start);
    half_free(&h);
}

void check_half(void) {
    static const cu_format kinds[][2] = {{CU_F8A8, CU_F8A8}, {CU_I8A8, CU_I8A8}, {CU_I8A8, CU_I4A8}};
    static const int32_t n_rows[] = {1, 2, 3, 5, 8};
    for (int k = 0; k < 3; k++)
        for (int i = 0; i < 5; i++) {
            check_ways(kinds[k][0], kinds[k][1], n_rows[i], 512, 384);
            check_ways(kinds[k][0], kinds[k][1], n_rows[i], 2560, 1536);
            if (check_filter && !strcmp(check_filter, "half speed")) speed(kinds[k][0], kinds[k][1], n_rows[i]);
        }
}
