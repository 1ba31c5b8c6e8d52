/* Which backends there are, and what a batch must obey. */
#include "backend/backend.h"

#include <math.h>
#include <string.h>

#include "backend/cpu/cpu.h"
#include "backend/plugin.h"
#include "backend/ref/ref.h"

static bool is_plugin(const char *name) { return strcmp(name, "cuda") == 0; }

const ern_backend_ops *ern_backend_find(const char *name) {
    static const ern_backend_ops *const all[] = {&ref_backend_ops, &cpu_backend_ops};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (strcmp(all[i]->name, name) == 0) return all[i];
    return is_plugin(name) && plugin_cuda() ? plugin_cuda()->ops : NULL;
}

const char *ern_backend_missing(const char *name) {
    if (is_plugin(name)) return plugin_cuda_missing();
    return ern_backend_find(name) ? NULL : "there is no backend of that name";
}

bool ern_backend_device(const char *name, char *out, size_t size) {
    if (!is_plugin(name) || ern_backend_missing(name)) return false;
    plugin_cuda()->device(out, size);
    return true;
}

const char *ern_backend_file(const char *name) { return is_plugin(name) ? plugin_cuda_file() : NULL; }

/* ---- ern_batch_valid: each check is one rule of backend.h or sample.h; the first broken one is named ----------------
 */

#define RULE(cond, text)   \
    do {                   \
        if (!(cond)) {     \
            *why = (text); \
            return false;  \
        }                  \
    } while (0)

static bool counts_valid(const ern_batch *in, const ern_backend_options *o, const char **why) {
    RULE(in->n_row > 0 && in->n_row <= o->n_row_max, "n_row must be 1..n_row_max");
    RULE(in->n_seq > 0 && in->n_seq <= o->n_seq_max, "n_seq must be 1..n_seq_max");
    RULE(in->n_want >= 0 && in->n_want <= o->n_want_max, "n_want must be 0..n_want_max");
    RULE(in->n_want <= in->n_row, "more rows wanted than there are");
    RULE(in->token && in->pos && in->cell && in->row0 && in->kv_len && in->page, "an array is missing");
    RULE(in->n_want == 0 || (in->want && in->sample), "want or sample is missing");
    RULE(!o->mtp || in->next, "next is missing though the MTP layer runs");
    RULE(in->row0[0] == 0 && in->row0[in->n_seq] == in->n_row, "row0 must run from 0 to n_row");
    return true;
}

static bool rows_valid(const ern_batch *in, const ern_backend_options *o, int32_t n_vocab, const char **why) {
    for (int32_t t = 0; t < in->n_row; t++) {
        RULE(in->token[t] < n_vocab, "a token is not below n_vocab");
        RULE(in->token[t] >= ERN_PREV(o->n_want_max - 1), "an ERN_PREV names no row that could have been wanted");
        RULE(!in->next || (in->next[t] >= -1 && in->next[t] < n_vocab), "next must be -1..n_vocab-1");
    }
    return true;
}

static bool sequence_valid(const ern_batch *in, const ern_backend_options *o, int32_t s, const char **why) {
    int32_t from = in->row0[s], to = in->row0[s + 1], P = o->n_page_cell;
    RULE(from < to && to <= in->n_row, "every sequence needs a row");
    RULE(in->pos[from] >= 0 && in->pos[from] < o->n_len_max, "a position is outside 0..n_len_max-1");
    for (int32_t t = from + 1; t < to; t++) RULE(in->pos[t] == in->pos[t - 1] + 1, "positions must be consecutive");
    RULE(in->kv_len[s] == in->pos[to - 1] + 1, "kv_len must be the last position + 1");
    RULE(in->kv_len[s] <= o->n_len_max, "kv_len is above n_len_max");
    int32_t n_page = (in->kv_len[s] + P - 1) / P;
    RULE(n_page <= in->n_page_max, "the page table is too short for kv_len");
    const int32_t *page = in->page + (size_t)s * (size_t)in->n_page_max;
    for (int32_t i = 0; i < n_page; i++) RULE(page[i] >= 0 && page[i] < o->n_page, "a page is outside the cache");
    for (int32_t t = from; t < to; t++)
        RULE(in->cell[t] == page[in->pos[t] / P] * P + in->pos[t] % P, "a cell is not where the page table says");
    return true;
}

/* The end of the run of rows that starts at t and writes adjacent cells of one page. */
static int32_t run_end(const ern_batch *in, int32_t t, int32_t P) {
    for (t++; t < in->n_row && in->cell[t] == in->cell[t - 1] + 1 && in->cell[t] % P != 0;) t++;
    return t;
}

/* No cell is written twice. Compared run by run: a sequence has about one run a page, so the pairs stay few. */
static bool cells_distinct(const ern_batch *in, int32_t P, const char **why) {
    for (int32_t a = 0, a_end; a < in->n_row; a = a_end) {
        a_end = run_end(in, a, P);
        for (int32_t b = a_end, b_end; b < in->n_row; b = b_end) {
            b_end = run_end(in, b, P);
            RULE(in->cell[a_end - 1] < in->cell[b] || in->cell[b_end - 1] < in->cell[a], "two rows write one cell");
        }
    }
    return true;
}

/* pos and pos0: of the wanted row and of its sequence's first row. */
static bool sample_valid(const ern_sample *p, int32_t pos, int32_t pos0, int32_t n_vocab, const char **why) {
    RULE(p->temperature >= 0 && isfinite(p->temperature), "temperature must be finite and >= 0");
    RULE(p->top_p >= 0 && p->top_p <= 1, "top_p must be 0..1");
    RULE(p->min_p >= 0 && p->min_p <= 1, "min_p must be 0..1");
    RULE(p->repetition > 0 && isfinite(p->repetition), "repetition must be finite and > 0");
    RULE(isfinite(p->frequency) && isfinite(p->presence), "frequency and presence must be finite");
    RULE(p->position == pos + 1, "the sampled token's position must follow its row's");
    RULE(p->n_seen >= 0 && p->n_seen <= pos + 1 && p->n_prompt >= 0, "n_seen must be 0..position");
    RULE(p->n_seen == 0 || p->seen, "seen is missing");
    bool penalised = p->repetition != 1 || p->frequency != 0 || p->presence != 0;
    RULE(!penalised || p->n_seen >= pos0, "a penalty needs every token before the rows in seen");
    for (int32_t i = 0; i < p->n_seen; i++) RULE(p->seen[i] >= 0 && p->seen[i] < n_vocab, "a seen id is out of range");
    RULE(p->n_bias >= 0 && (p->n_bias == 0 || p->bias), "bias is missing");
    for (int32_t i = 0; i < p->n_bias; i++)
        RULE(p->bias[i].id >= 0 && p->bias[i].id < n_vocab && isfinite(p->bias[i].add), "a bias is out of range");
    RULE(p->n_ban >= 0 && (p->n_ban == 0 || p->ban), "ban is missing");
    for (int32_t i = 0; i < p->n_ban; i++) RULE(p->ban[i] >= 0 && p->ban[i] < n_vocab, "a banned id is out of range");
    RULE(p->forced >= -1 && p->forced < n_vocab, "forced must be -1..n_vocab-1");
    RULE(p->n_top >= -1 && p->n_top <= ERN_TOP_MAX, "n_top must be -1..20");
    RULE((int)p->mode >= 0 && p->mode <= ERN_LOGPROBS_PROCESSED_LOGITS, "mode is unknown");
    return true;
}

bool ern_batch_valid(const ern_batch *in, const ern_backend_options *o, int32_t n_vocab, const char **why) {
    if (!counts_valid(in, o, why)) return false;
    if (!rows_valid(in, o, n_vocab, why)) return false;
    for (int32_t s = 0; s < in->n_seq; s++)
        if (!sequence_valid(in, o, s, why)) return false;
    if (!cells_distinct(in, o->n_page_cell, why)) return false;
    for (int32_t w = 0, s = 0; w < in->n_want; w++) {
        RULE(in->want[w] >= (w ? in->want[w - 1] + 1 : 0) && in->want[w] < in->n_row, "want must ascend below n_row");
        while (in->row0[s + 1] <= in->want[w]) s++;
        if (!sample_valid(&in->sample[w], in->pos[in->want[w]], in->pos[in->row0[s]], n_vocab, why)) return false;
    }
    return true;
}
