/* The forward pass of ERNIE-4.5 as docs/model.md has it, sections 3 to 6, in the order of the text.
 *
 * Numbers: activations are f32, or quantized row by row where the weights are (section 9); bf16 weights widen exactly;
 * every dot product, mean and softmax is summed in double in index order and rounded to f32 once. A row never meets
 * another row except through the KV cache, so nothing here can depend on how rows are batched. */
#include <math.h>
#include <string.h>

#include "backend/ref/ref_state.h"
#include "model/quant.h"

static void show(const ref *b, const char *stage, int32_t layer, int32_t row, const float *data, int32_t n_row,
                 int32_t n_col) {
    if (b->probe) b->probe(b->probe_ud, stage, layer, row, data, n_row, n_col);
}

/* ---- leaves ----------------------------------------------------------------------------------------------------- */

/* 9.3: both sides quantized. Over each group of 128 inputs the codes' products add up exactly (integers, or e4m3 values
 * whose products are multiples of 2^-18 below 2^25); y = sum over groups of (scale of x * scale of W * that sum), in
 * double, in order. An integer weight's scale is one for all groups. */
static void linear_quantized(const ref *b, float *y, const float *x, int32_t n_row, const ern_linear *w) {
    const bool f8 = w->dtype == ERN_DTYPE_F8E4M3;
    const size_t n_in = (size_t)w->n_in, n_group = (n_in + ERN_ACT_GROUP - 1) / ERN_ACT_GROUP;
    for (size_t t = 0; t < (size_t)n_row; t++) {
        float *scale = b->act_scale + t * n_group, *code = b->act_code + t * n_in;
        if (f8)
            quant_act_fp8(b->act_row, scale, x + t * n_in, w->n_in);
        else
            quant_act_int8((int8_t *)b->act_row, scale, x + t * n_in, w->n_in);
        for (size_t i = 0; i < n_in; i++) code[i] = f8 ? ern_e4m3_to_f32(b->act_row[i]) : (float)(int8_t)b->act_row[i];
    }
    for (int32_t o = 0; o < w->n_out; o++) {
        for (int32_t i = 0; i < w->n_in; i++) b->weight_row[i] = (double)quant_code_at(w, o, i);
        for (size_t t = 0; t < (size_t)n_row; t++) {
            const float *code = b->act_code + t * n_in;
            double sum = 0.0;
            for (size_t g = 0; g < n_group; g++) {
                const size_t end = (g + 1) * ERN_ACT_GROUP < n_in ? (g + 1) * ERN_ACT_GROUP : n_in;
                double part = 0.0;
                for (size_t i = g * ERN_ACT_GROUP; i < end; i++) part += b->weight_row[i] * (double)code[i];
                sum += (double)b->act_scale[t * n_group + g] * (double)quant_scale_at(w, o, (int32_t)g) * part;
            }
            y[t * (size_t)w->n_out + (size_t)o] = (float)sum;
        }
    }
}

/* y[n_row, n_out] = x[n_row, n_in] W^T. */
static void linear(const ref *b, float *y, const float *x, int32_t n_row, const ern_linear *w) {
    if (w->order == ERN_ORDER_TILED && !b->o.act_exact) {
        linear_quantized(b, y, x, n_row, w);
        return;
    }
    bool plain = w->dtype == ERN_DTYPE_BF16 && w->order == ERN_ORDER_OUT_IN;
    for (int32_t o = 0; o < w->n_out; o++) {
        double *row = b->weight_row;
        const ern_bf16 *stored = plain ? (const ern_bf16 *)w->data + o * w->stride : NULL;
        for (int32_t i = 0; i < w->n_in; i++)
            row[i] = (double)(plain ? ern_bf16_to_f32(stored[i]) : ern_linear_at(w, o, i));
        for (int32_t t = 0; t < n_row; t++) {
            const float *in = x + (size_t)t * (size_t)w->n_in;
            double sum = 0.0;
            for (int32_t i = 0; i < w->n_in; i++) sum += row[i] * (double)in[i];
            y[(size_t)t * (size_t)w->n_out + (size_t)o] = (float)sum;
        }
    }
}

/* y = x / sqrt(mean(x^2) + eps) * w, one row; rounded once. */
static void rms_norm(float *y, const float *x, const ern_bf16 *w, int32_t n, float eps) {
    double sum = 0.0;
    for (int32_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    double r = 1.0 / sqrt(sum / n + (double)eps);
    for (int32_t i = 0; i < n; i++) y[i] = (float)((double)x[i] * r * (double)ern_bf16_to_f32(w[i]));
}

static void rms_norm_rows(float *y, const float *x, const ern_bf16 *w, int32_t n_row, int32_t n, float eps) {
    for (int32_t t = 0; t < n_row; t++) rms_norm(y + (size_t)t * (size_t)n, x + (size_t)t * (size_t)n, w, n, eps);
}

static void embed(float *y, const ern_model *m, int32_t token) {
    const ern_bf16 *e = m->embed + (size_t)token * (size_t)m->config.n_hidden;
    for (int32_t i = 0; i < m->config.n_hidden; i++) y[i] = ern_bf16_to_f32(e[i]);
}

static void add(float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

/* ---- 3.3 rotary positions -----------------------------------------------------------------------------------------
 */

/* cos and sin of every row's angles: angle = pos * inv_freq, inv_freq = 1 / theta^(2j/C), both rounded to f32 as in
 * transformers, because at large positions those roundings are part of the model. */
static void rope_table(const ref *b, const ern_batch *in) {
    int32_t C = b->m->config.n_head_dim;
    for (int32_t j = 0; j < C / 2; j++) {
        float power = (float)pow(b->m->config.rope_theta, (double)((float)(2 * j) / (float)C));
        float inv_freq = 1.0f / power;
        for (int32_t t = 0; t < in->n_row; t++) {
            double angle = (double)((float)in->pos[t] * inv_freq);
            b->rope[(size_t)t * (size_t)C + (size_t)(2 * j)] = (float)cos(angle);
            b->rope[(size_t)t * (size_t)C + (size_t)(2 * j + 1)] = (float)sin(angle);
        }
    }
}

/* Rotate the adjacent pairs (2j, 2j+1) of every head. x [n_row, n_head, C]. */
static void rope(float *x, const float *table, int32_t n_row, int32_t n_head, int32_t C) {
    for (int32_t t = 0; t < n_row; t++) {
        const float *cs = table + (size_t)t * (size_t)C;
        for (int32_t h = 0; h < n_head; h++) {
            float *p = x + ((size_t)t * (size_t)n_head + (size_t)h) * (size_t)C;
            for (int32_t i = 0; i < C; i += 2) {
                double even = (double)p[i], odd = (double)p[i + 1], c = (double)cs[i], s = (double)cs[i + 1];
                p[i] = (float)(even * c - odd * s);
                p[i + 1] = (float)(odd * c + even * s);
            }
        }
    }
}

/* ---- 3.4 attention ------------------------------------------------------------------------------------------------
 */

/* The plane of (layer, K or V, head g) in the page of a cell; the cell's place in it. backend.h draws both. */
static unsigned char *kv_plane(const ref *b, int32_t layer, int32_t which, int32_t g, int32_t cell, size_t *in_page) {
    size_t P = (size_t)b->o.n_page_cell, G = (size_t)b->m->config.n_kv_head;
    size_t plane = ((size_t)layer * 2 + (size_t)which) * G + (size_t)g;
    *in_page = (size_t)cell % P;
    return b->kv + (size_t)cell / P * b->page_bytes + plane * b->plane_bytes;
}

/* Element of dimension i. */
static size_t kv_element(const ref *b, int32_t which, size_t cell, size_t i) {
    size_t C = (size_t)b->m->config.n_head_dim, lane = cell % ERN_KV_GROUP, group = (cell - lane) * C;
    if (ern_kv_has_codes(b->o.kv_dtype)) return which == 0 ? group + i * ERN_KV_GROUP + lane : cell * C + i;
    return which == 0 ? group + i / 2 * 2 * ERN_KV_GROUP + lane * 2 + i % 2 : (cell / 2 * C + i) * 2 + cell % 2;
}

/* The scale of a cell of a plane of codes. */
static float *kv_scale(const ref *b, unsigned char *plane, size_t cell) {
    size_t codes = ref_plane_cells(b) * (size_t)b->m->config.n_head_dim;
    return (float *)(void *)(plane + codes) + cell;
}

/* Key (which 0) or value (1) of a cell, widened: out [C]. */
static void kv_get(const ref *b, double *out, int32_t layer, int32_t which, int32_t g, int32_t cell) {
    size_t at;
    unsigned char *plane = kv_plane(b, layer, which, g, cell, &at);
    for (size_t i = 0; i < (size_t)b->m->config.n_head_dim; i++) {
        size_t e = kv_element(b, which, at, i);
        switch (b->o.kv_dtype) {
        case ERN_KV_F32: out[i] = (double)((const float *)(void *)plane)[e]; break;
        case ERN_KV_BF16: out[i] = (double)ern_bf16_to_f32(((const ern_bf16 *)(void *)plane)[e]); break;
        case ERN_KV_I8: out[i] = (double)((const int8_t *)plane)[e] * (double)*kv_scale(b, plane, at); break;
        case ERN_KV_F8: out[i] = (double)ern_e4m3_to_f32(plane[e]) * (double)*kv_scale(b, plane, at); break;
        }
    }
}

static void kv_put(ref *b, const float *x, int32_t layer, int32_t which, int32_t g, int32_t cell) {
    size_t at;
    unsigned char *plane = kv_plane(b, layer, which, g, cell, &at);
    int8_t code[ERN_KV_CODE_HEAD_MAX];
    uint8_t code8[ERN_KV_CODE_HEAD_MAX];
    if (b->o.kv_dtype == ERN_KV_I8) quant_act_int8(code, kv_scale(b, plane, at), x, b->m->config.n_head_dim);
    if (b->o.kv_dtype == ERN_KV_F8) quant_act_fp8(code8, kv_scale(b, plane, at), x, b->m->config.n_head_dim);
    for (size_t i = 0; i < (size_t)b->m->config.n_head_dim; i++) {
        size_t e = kv_element(b, which, at, i);
        switch (b->o.kv_dtype) {
        case ERN_KV_F32: ((float *)(void *)plane)[e] = x[i]; break;
        case ERN_KV_BF16: ((ern_bf16 *)(void *)plane)[e] = ern_bf16_from_f32(x[i]); break;
        case ERN_KV_I8: ((int8_t *)plane)[e] = code[i]; break;
        case ERN_KV_F8: plane[e] = code8[i]; break;
        }
    }
}

static void store_kv(ref *b, const ern_batch *in, int32_t layer) {
    int32_t G = b->m->config.n_kv_head, C = b->m->config.n_head_dim;
    for (int32_t t = 0; t < in->n_row; t++) {
        for (int32_t g = 0; g < G; g++) {
            size_t from = ((size_t)t * (size_t)G + (size_t)g) * (size_t)C;
            kv_put(b, b->k + from, layer, 0, g, in->cell[t]);
            kv_put(b, b->v + from, layer, 1, g, in->cell[t]);
        }
    }
}

/* One row, one query head: softmax(q K^T / sqrt C) V over positions 0..pos. page is the sequence's page table. */
static void attend(const ref *b, float *out, const float *q, const int32_t *page, int32_t pos, int32_t layer,
                   int32_t g) {
    int32_t P = b->o.n_page_cell, C = b->m->config.n_head_dim;
    double scale = 1.0 / sqrt((double)C), top = -INFINITY, sum = 0.0;
    double *kv = b->kv_row, *dot = b->kv_row + C;
    for (int32_t j = 0; j <= pos; j++) {
        kv_get(b, kv, layer, 0, g, page[j / P] * P + j % P);
        double score = 0.0;
        for (int32_t i = 0; i < C; i++) score += (double)q[i] * kv[i];
        b->score[j] = score * scale;
        if (b->score[j] > top) top = b->score[j];
    }
    for (int32_t j = 0; j <= pos; j++) {
        b->score[j] = exp(b->score[j] - top);
        sum += b->score[j];
    }
    for (int32_t i = 0; i < C; i++) dot[i] = 0.0;
    for (int32_t j = 0; j <= pos; j++) {
        kv_get(b, kv, layer, 1, g, page[j / P] * P + j % P);
        for (int32_t i = 0; i < C; i++) dot[i] += b->score[j] * kv[i];
    }
    for (int32_t i = 0; i < C; i++) out[i] = (float)(dot[i] / sum);
}

/* h (normed rows) -> y, through q, k, v, the cache and o. */
static void attention(ref *b, const ern_batch *in, int32_t layer, const ern_layer *w) {
    const ern_config *c = &b->m->config;
    int32_t T = in->n_row, H = c->n_head, G = c->n_kv_head, C = c->n_head_dim;
    linear(b, b->q, b->h, T, &w->q);
    linear(b, b->k, b->h, T, &w->k);
    linear(b, b->v, b->h, T, &w->v);
    rope(b->q, b->rope, T, H, C);
    rope(b->k, b->rope, T, G, C);
    show(b, "q", layer, 0, b->q, T, H * C);
    show(b, "k", layer, 0, b->k, T, G * C);
    show(b, "v", layer, 0, b->v, T, G * C);
    store_kv(b, in, layer);
    for (int32_t s = 0; s < in->n_seq; s++) {
        const int32_t *page = in->page + (size_t)s * (size_t)in->n_page_max;
        for (int32_t t = in->row0[s]; t < in->row0[s + 1]; t++) {
            for (int32_t head = 0; head < H; head++) {
                size_t at = ((size_t)t * (size_t)H + (size_t)head) * (size_t)C;
                attend(b, b->att + at, b->q + at, page, in->pos[t], layer, head / (H / G));
            }
        }
    }
    show(b, "attn", layer, 0, b->att, T, H * C);
    linear(b, b->y, b->att, T, &w->o);
    show(b, "attn_out", layer, 0, b->y, T, c->n_hidden);
}

/* ---- 3.5 dense feed-forward, 3.6 experts ---------------------------------------------------------------------------
 */

/* y = down( silu(gate x) * up x ), silu(z) = z / (1 + e^-z). */
static void feed_forward(const ref *b, float *y, const float *x, int32_t n_row, const ern_ffn *w) {
    linear(b, b->gate, x, n_row, &w->gate);
    linear(b, b->up, x, n_row, &w->up);
    size_t n = (size_t)n_row * (size_t)w->gate.n_out;
    for (size_t i = 0; i < n; i++) {
        double z = (double)b->gate[i];
        b->gate[i] = (float)(z / (1.0 + exp(-z)) * (double)b->up[i]);
    }
    linear(b, y, b->gate, n_row, &w->down);
}

/* One row's router logits -> prob [E] (softmax) and chosen [K]: the largest prob + bias first, ties to the lower id.
 * The bias takes part in the choice only. */
static void route(const ref *b, const float *logit, const ern_layer *w) {
    const ern_config *c = &b->m->config;
    int32_t E = c->n_expert;
    double top = -INFINITY, sum = 0.0;
    for (int32_t e = 0; e < E; e++) top = (double)logit[e] > top ? (double)logit[e] : top;
    for (int32_t e = 0; e < E; e++) sum += exp((double)logit[e] - top);
    for (int32_t e = 0; e < E; e++) b->prob[e] = (float)(exp((double)logit[e] - top) / sum);
    for (int32_t rank = 0; rank < c->n_expert_used; rank++) {
        int32_t best = -1;
        float best_score = 0.0f;
        for (int32_t e = 0; e < E; e++) {
            bool taken = false;
            for (int32_t r = 0; r < rank; r++) taken |= b->chosen[r] == e;
            float score = b->prob[e] + (w->router_bias ? w->router_bias[e] : 0.0f);
            if (taken || (best >= 0 && !(score > best_score))) continue;
            best = e;
            best_score = score;
        }
        b->chosen[rank] = best;
    }
}

/* h -> y: the chosen experts' weighted sum in rank order, then the shared experts. */
static void experts(ref *b, int32_t T, int32_t layer, const ern_layer *w) {
    const ern_config *c = &b->m->config;
    size_t D = (size_t)c->n_hidden, E = (size_t)c->n_expert;
    ern_linear router = {.data = w->router,
                         .dtype = ERN_DTYPE_F32,
                         .order = ERN_ORDER_OUT_IN,
                         .n_out = c->n_expert,
                         .n_in = c->n_hidden,
                         .stride = c->n_hidden};
    linear(b, b->router, b->h, T, &router);
    show(b, "router", layer, 0, b->router, T, c->n_expert);
    for (size_t t = 0; t < (size_t)T; t++) {
        float *y = b->y + t * D;
        route(b, b->router + t * E, w);
        float sum = 0.0f;
        for (int32_t r = 0; r < c->n_expert_used; r++) sum += b->prob[b->chosen[r]];
        if (sum < c->moe_norm_min) sum = c->moe_norm_min;
        memset(y, 0, D * sizeof *y);
        for (int32_t r = 0; r < c->n_expert_used; r++) {
            float share = b->prob[b->chosen[r]] / sum;
            feed_forward(b, b->routed, b->h + t * D, 1, &w->expert[b->chosen[r]]);
            for (size_t i = 0; i < D; i++) y[i] += share * b->routed[i];
        }
    }
    show(b, "experts", layer, 0, b->y, T, c->n_hidden);
    if (!w->shared.gate.data) return;
    for (size_t t = 0; t < (size_t)T; t++) {
        feed_forward(b, b->routed, b->h + t * D, 1, &w->shared);
        add(b->y + t * D, b->routed, D);
    }
}

/* ---- 3.1 one layer, 3.7 the MTP layer, the step ------------------------------------------------------------------ */

/* x -> x; KV goes to cache layer `layer`. */
static void run_layer(ref *b, const ern_batch *in, int32_t layer, const ern_layer *w) {
    const ern_config *c = &b->m->config;
    int32_t T = in->n_row, D = c->n_hidden;
    rms_norm_rows(b->h, b->x, w->attn_norm, T, D, c->rms_eps);
    show(b, "attn_norm", layer, 0, b->h, T, D);
    attention(b, in, layer, w);
    add(b->x, b->y, (size_t)T * (size_t)D);
    rms_norm_rows(b->h, b->x, w->ffn_norm, T, D, c->rms_eps);
    show(b, "ffn_norm", layer, 0, b->h, T, D);
    if (w->is_moe)
        experts(b, T, layer, w);
    else
        feed_forward(b, b->y, b->h, T, &w->ffn);
    add(b->x, b->y, (size_t)T * (size_t)D);
}

/* logits = RMSNorm(x_row, norm) head^T, into b->logits. */
static void row_logits(ref *b, int32_t row) {
    int32_t D = b->m->config.n_hidden;
    rms_norm(b->h, b->x + (size_t)row * (size_t)D, b->m->norm, D, b->m->config.rms_eps);
    linear(b, b->logits, b->h, 1, &b->m->head);
}

static void sample_rows(ref *b, const ern_batch *in, ref_slot *out) {
    const ern_config *c = &b->m->config;
    for (int32_t w = 0, s = 0; w < in->n_want; w++) {
        int32_t row = in->want[w];
        while (in->row0[s + 1] <= row) s++;
        row_logits(b, row);
        show(b, "norm", -1, w, b->h, 1, c->n_hidden);
        show(b, "logits", -1, w, b->logits, 1, c->n_vocab);
        /* the tokens of this sequence's rows up to this one that `seen` does not hold yet */
        const ern_sample *sample = &in->sample[w];
        int32_t n_tail = in->pos[row] + 1 - sample->n_seen, n_own = row + 1 - in->row0[s];
        if (n_tail > n_own) n_tail = n_own;
        if (n_tail < 0) n_tail = 0;
        ern_sample_row(b->logits, c->n_vocab, sample, b->token + row + 1 - n_tail, n_tail, b->sample_scratch,
                       &out->sampled[w]);
    }
}

/* The multi-token-prediction layer, by the training definition: its row t reads the main model's x before the final
 * norm, and the embedding of the token at pos + 1. A row whose next token is neither known nor sampled here is not
 * needed by anyone; it gets token 0. */
static void run_mtp(ref *b, const ern_batch *in, ref_slot *out) {
    const ern_model *m = b->m;
    const ern_config *c = &m->config;
    int32_t T = in->n_row, D = c->n_hidden;
    for (int32_t t = 0, w = 0; t < T; t++) {
        while (w < in->n_want && in->want[w] < t) w++;
        int32_t next = in->next[t];
        if (next < 0) next = w < in->n_want && in->want[w] == t ? out->sampled[w].token : 0;
        float *z = b->h + (size_t)t * 2 * (size_t)D;
        embed(b->y, m, next);
        rms_norm(z, b->y, m->mtp.emb_norm, D, c->rms_eps);
        rms_norm(z + D, b->x + (size_t)t * (size_t)D, m->mtp.hidden_norm, D, c->rms_eps);
    }
    linear(b, b->x, b->h, T, &m->mtp.proj);
    show(b, "mtp_in", -1, 0, b->x, T, D);
    run_layer(b, in, c->n_layer, &m->mtp.layer);
    show(b, "mtp_resid", -1, 0, b->x, T, D);
    for (int32_t w = 0; w < in->n_want; w++) {
        row_logits(b, in->want[w]);
        show(b, "mtp_logits", -1, w, b->logits, 1, c->n_vocab);
        int32_t best = 0;
        for (int32_t i = 1; i < c->n_vocab; i++)
            if (b->logits[i] > b->logits[best]) best = i;
        out->draft[w] = best;
    }
}

void ref_forward(ref *b, const ern_batch *in, const ref_slot *prev, ref_slot *out) {
    const ern_config *c = &b->m->config;
    int32_t T = in->n_row, D = c->n_hidden;
    for (int32_t t = 0; t < T; t++) {
        int32_t token = in->token[t];
        if (token < 0) {
            ERN_ASSERT(prev && -1 - token < prev->n_want); /* ERN_PREV(w) == -1 - w */
            token = prev->sampled[-1 - token].token;
        }
        ERN_ASSERT(token < c->n_vocab);
        b->token[t] = token;
        embed(b->x + (size_t)t * (size_t)D, b->m, token);
    }
    show(b, "embed", -1, 0, b->x, T, D);
    rope_table(b, in);
    for (int32_t layer = 0; layer < c->n_layer; layer++) {
        run_layer(b, in, layer, &b->m->layer[layer]);
        show(b, "resid", layer, 0, b->x, T, D);
    }
    sample_rows(b, in, out);
    if (b->o.mtp) run_mtp(b, in, out);
}
