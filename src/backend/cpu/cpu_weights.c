/* Weights copied into one block of huge pages at open. See cpu_state.h.
 *
 * A file's pages are 4 KiB, and the translation of addresses costs a stream of weights part of its speed
 * (docs/speed.md). Tiles are copied as they are, and only those that a file backs: what was made while loading is the
 * model's own memory. bf16 rows of PyTorch's order become panels (cpu_kernels.h), one stream instead of four short
 * ones. The copy changes no bit of any result, so free memory may decide whether there is one: a model that would take
 * more than its share is read where it lies. */
#include "backend/cpu/cpu_state.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SHARE = 4, /* the copy takes at most this part of the free memory */
    RANGES_MAX = 1024,
};

/* Addresses that a file backs, as /proc/self/maps tells; when it cannot be read there are none. */
struct cpu_file_ranges {
    uintptr_t from[RANGES_MAX], to[RANGES_MAX];
    int n;
};

static void ranges_read(struct cpu_file_ranges *r) {
    char line[512];
    FILE *f = fopen("/proc/self/maps", "re");
    r->n = 0;
    while (f && r->n < RANGES_MAX && fgets(line, sizeof line, f)) {
        uint64_t from, to, inode;
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %*s %*x %*s %" SCNu64, &from, &to, &inode) != 3 || inode == 0)
            continue;
        r->from[r->n] = (uintptr_t)from;
        r->to[r->n++] = (uintptr_t)to;
    }
    if (f) fclose(f);
}

static bool in_file(const struct cpu_file_ranges *r, const ern_linear *w) {
    const uintptr_t at = (uintptr_t)w->data;
    for (int i = 0; i < r->n; i++)
        if (at >= r->from[i] && at < r->to[i]) return true;
    return false;
}

/* Moves linears to `to`, or, where that is NULL, only counts. */
typedef struct mover {
    const struct cpu_file_ranges *files;
    int32_t panel_out; /* outputs of the panels that the kernels read; 0: none */
    ern_pool *pool;
    unsigned char *to;
    size_t used;
} mover;

typedef struct copy {
    unsigned char *to;
    const unsigned char *from;
    size_t bytes;
} copy;

static void copy_part(void *ud, int worker, int n_worker) {
    const copy *c = ud;
    int64_t from, to;
    ern_pool_share((int64_t)c->bytes, 4096, worker, n_worker, &from, &to);
    if (from < to) memcpy(c->to + from, c->from + from, (size_t)(to - from));
}

typedef struct repack {
    ern_bf16 *to;
    int32_t outs;
    const ern_linear *w;
} repack;

static void repack_part(void *ud, int worker, int n_worker) {
    const repack *p = ud;
    int64_t from, to;
    ern_pool_share(cpu_panels(p->outs, p->w->n_out), 8, worker, n_worker, &from, &to);
    cpu_panels_fill(p->to, p->outs, p->w, (int32_t)from, (int32_t)to);
}

static void move_rows(mover *m, ern_linear *w) {
    const size_t panels = (size_t)cpu_panels(m->panel_out, w->n_out);
    const size_t bytes = panels * (size_t)cpu_panel_numbers(m->panel_out, w->n_in) * sizeof(ern_bf16);
    if (m->to) {
        repack p = {(ern_bf16 *)(void *)(m->to + m->used), m->panel_out, w};
        ern_pool_run(m->pool, repack_part, &p);
        w->data = p.to;
        w->stride = 0;
    }
    m->used += bytes;
}

static void move(mover *m, ern_linear *w) {
    if (w->data && m->panel_out && w->dtype == ERN_DTYPE_BF16 && w->order == ERN_ORDER_OUT_IN) {
        move_rows(m, w);
        return;
    }
    if (!w->data || w->order != ERN_ORDER_TILED || !in_file(m->files, w)) return;
    const size_t bytes = (size_t)quant_tile_bytes(w->dtype, w->n_out, w->n_in);
    if (m->to) {
        copy c = {m->to + m->used, w->data, bytes};
        ern_pool_run(m->pool, copy_part, &c);
        w->data = c.to;
    }
    m->used += bytes;
}

static void move_ffn(mover *m, ern_ffn *f) {
    move(m, &f->gate);
    move(m, &f->up);
    move(m, &f->down);
}

static void move_all(mover *m, cpu_weights *k, const ern_config *c) {
    for (int32_t i = 0; i < c->n_layer; i++) {
        ern_layer *l = &k->layer[i];
        move(m, &l->q);
        move(m, &l->k);
        move(m, &l->v);
        move(m, &l->o);
        move_ffn(m, &l->ffn);
        for (int32_t e = 0; l->is_moe && e < c->n_expert; e++) move_ffn(m, &k->expert[(int64_t)i * c->n_expert + e]);
        move_ffn(m, &l->shared);
    }
    move(m, &k->head);
}

bool cpu_weights_open(cpu_weights *k, const ern_model *model, int32_t panel_out) {
    const size_t L = (size_t)model->config.n_layer, E = (size_t)model->config.n_expert;
    memset(k, 0, sizeof *k);
    k->files = malloc(sizeof *k->files);
    k->layer = malloc(L * sizeof *k->layer);
    k->expert = malloc((L * E + 1) * sizeof *k->expert);
    if (!k->files || !k->layer || !k->expert) {
        cpu_weights_close(k);
        return false;
    }
    ranges_read(k->files);
    memcpy(k->layer, model->layer, L * sizeof *k->layer);
    for (size_t i = 0; i < L; i++) {
        if (!k->layer[i].is_moe) continue;
        memcpy(k->expert + i * E, k->layer[i].expert, E * sizeof *k->expert);
        k->layer[i].expert = k->expert + i * E;
    }
    k->head = model->head;
    k->panel_out = panel_out;
    mover m = {.files = k->files, .panel_out = panel_out};
    move_all(&m, k, &model->config);
    k->bytes = m.used <= ern_memory_available_bytes() / SHARE ? m.used : 0;
    return true;
}

void cpu_weights_fill(cpu_weights *k, const ern_model *model, unsigned char *to, ern_pool *pool) {
    mover m = {.files = k->files, .panel_out = k->panel_out, .pool = pool, .to = to};
    move_all(&m, k, &model->config);
}

void cpu_weights_close(cpu_weights *k) {
    free(k->layer);
    free(k->expert);
    free(k->files);
    memset(k, 0, sizeof *k);
}
