/* Counting a step. See bench_count.h. */
#include "cli/bench_count.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

typedef struct weighed {
    double bytes, numbers;
} weighed;

static void weigh(weighed *t, const ern_linear *w) {
    if (!w->data) return;
    t->bytes += (double)ern_linear_bytes(w);
    t->numbers += (double)w->n_out * (double)w->n_in;
}

static void weigh_ffn(weighed *t, const ern_ffn *f) {
    weigh(t, &f->gate);
    weigh(t, &f->up);
    weigh(t, &f->down);
}

/* All but the keys and values of a layer that a row passes, attention and routed experts aside: what only wanted rows
 * pass of the last layer where the others leave. */
static void weigh_rest(weighed *t, const ern_model *m, const ern_layer *l) {
    weigh(t, &l->q);
    weigh(t, &l->o);
    if (!l->is_moe) {
        weigh_ffn(t, &l->ffn);
        return;
    }
    weigh_ffn(t, &l->shared);
    const double router = (double)m->config.n_expert * (double)m->config.n_hidden;
    t->bytes += router * sizeof(float);
    t->numbers += router;
}

static weighed last_rest(const ern_model *m) {
    weighed t = {0};
    weigh_rest(&t, m, &m->layer[m->config.n_layer - 1]);
    return t;
}

/* All that every row passes in the layers: attention, dense and shared feed-forwards, routers. */
static weighed dense_part(const ern_model *m) {
    weighed t = {0};
    for (int32_t i = 0; i < m->config.n_layer; i++) {
        weigh(&t, &m->layer[i].k);
        weigh(&t, &m->layer[i].v);
        weigh_rest(&t, m, &m->layer[i]);
    }
    return t;
}

/* One routed expert, and how many layers have them. */
static weighed expert_part(const ern_model *m, int32_t *n_layer) {
    weighed t = {0};
    *n_layer = 0;
    for (int32_t i = 0; i < m->config.n_layer; i++) {
        if (!m->layer[i].is_moe) continue;
        if ((*n_layer)++ == 0) weigh_ffn(&t, &m->layer[i].expert[0]);
    }
    return t;
}

double bench_bytes(const ern_model *m, const bench_work *w) {
    int32_t n_moe;
    weighed head = {0};
    weigh(&head, &m->head);
    const double spared = /* nobody looks behind the last layer's keys and values: only their writing is left */
        w->leaves && w->n_want <= 0 ? last_rest(m).bytes + w->kv_read * w->kv_bytes / m->config.n_layer : 0;
    return dense_part(m).bytes + (w->n_want > 0 ? head.bytes : 0) + w->experts * expert_part(m, &n_moe).bytes +
           (w->kv_read + w->kv_write) * w->kv_bytes - spared;
}

double bench_operations(const ern_model *m, const bench_work *w) {
    int32_t n_moe;
    weighed head = {0};
    weigh(&head, &m->head);
    const double experts = expert_part(m, &n_moe).numbers * m->config.n_expert_used; /* of a row in a layer */
    const double last = last_rest(m).numbers + (m->layer[m->config.n_layer - 1].is_moe ? experts : 0);
    const double attention = 2.0 * m->config.n_head * m->config.n_head_dim; /* multiply-adds a pair and layer */
    const double spared = w->leaves ? (w->n_row - w->n_want) * last + (w->pairs - w->want_pairs) * attention : 0;
    return 2 * (w->n_row * (dense_part(m).numbers + experts * n_moe) + w->n_want * head.numbers +
                w->pairs * attention * m->config.n_layer - spared);
}

/* Of a layer's routed experts where there are such, of the last layer's feed-forward otherwise. */
static const ern_linear *typical(const ern_model *m, bool expert) {
    for (int32_t i = m->config.n_layer - 1; i >= 0; i--) {
        const ern_layer *l = &m->layer[i];
        if (l->is_moe && expert) return &l->expert[0].gate;
        if (!expert) return &l->q;
    }
    return NULL;
}

double bench_share_added(double bytes, double more_s, double read) {
    if (!(more_s > 0 && read > 0)) return (double)INFINITY;
    const double share = bytes / more_s / read;
    return share <= BENCH_SHARE_MOST ? share : (double)INFINITY;
}

ern_dtype bench_dtype(const ern_model *m) {
    const ern_linear *expert = typical(m, true);
    return expert ? expert->dtype : typical(m, false)->dtype;
}

const char *bench_format(const ern_model *m, char out[96]) {
    const ern_linear *expert = typical(m, true);
    const ern_dtype dense = typical(m, false)->dtype;
    int n = snprintf(out, 96, "%s", ern_dtype_name(dense));
    if (expert && expert->dtype != dense)
        n += snprintf(out + n, 96 - (size_t)n, ", experts %s", ern_dtype_name(expert->dtype));
    if (m->head.dtype != dense) (void)snprintf(out + n, 96 - (size_t)n, ", head %s", ern_dtype_name(m->head.dtype));
    return out;
}

int32_t bench_touch_experts(const ern_model *m, int32_t layer, const float *logits, int32_t n_row, bool *touched) {
    const int32_t E = m->config.n_expert;
    const float *bias = m->layer[layer].router_bias;
    int32_t n = 0;
    for (int32_t r = 0; r < n_row; r++, logits += E) {
        double score[ERN_EXPERTS_MAX], sum = 0, top = (double)logits[0];
        for (int32_t e = 1; e < E; e++) top = fmax(top, (double)logits[e]);
        for (int32_t e = 0; e < E; e++) sum += score[e] = exp((double)logits[e] - top);
        for (int32_t e = 0; e < E; e++) score[e] = score[e] / sum + (bias ? (double)bias[e] : 0);
        for (int32_t k = 0; k < m->config.n_expert_used; k++) {
            int32_t best = 0;
            for (int32_t e = 1; e < E; e++)
                if (score[e] > score[best]) best = e;
            score[best] = -INFINITY;
            n += !touched[best];
            touched[best] = true;
        }
    }
    return n;
}
