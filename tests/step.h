/* For tests of backends: build a step row by row. Fixed room, no allocation; a step lives in static memory. */
#ifndef ERN_TESTS_STEP_H
#define ERN_TESTS_STEP_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/backend.h"

enum { STEP_ROWS = 640, STEP_SEQS = 32, STEP_PAGES = 64 };

typedef struct step {
    ern_batch in;
    int32_t token[STEP_ROWS], next[STEP_ROWS], pos[STEP_ROWS], cell[STEP_ROWS], want[STEP_ROWS];
    int32_t row0[STEP_SEQS + 1], kv_len[STEP_SEQS], page[STEP_SEQS * STEP_PAGES];
    ern_sample sample[STEP_ROWS];
} step;

static inline void step_clear(step *s) {
    memset(s, 0, sizeof *s);
    s->in = (ern_batch){.n_page_max = STEP_PAGES,
                        .token = s->token,
                        .next = s->next,
                        .pos = s->pos,
                        .cell = s->cell,
                        .row0 = s->row0,
                        .kv_len = s->kv_len,
                        .page = s->page,
                        .want = s->want,
                        .sample = s->sample};
}

/* Want the last row added, greedily. */
static inline void step_want_last(step *s) {
    int32_t row = s->in.n_row - 1;
    s->want[s->in.n_want] = row;
    s->sample[s->in.n_want++] =
        (ern_sample){.top_p = 1, .repetition = 1, .forced = -1, .n_top = -1, .position = s->pos[row] + 1, .choice = 0};
}

/* Rows from..to-1 of a sequence whose tokens are text[0..], text[to] included; page is its table for cells of P. */
static inline void step_add(step *s, const int32_t *text, int32_t from, int32_t to, const int32_t *page, int32_t P,
                            bool want_all) {
    int32_t q = s->in.n_seq++;
    for (int32_t i = 0; i < STEP_PAGES; i++) s->page[q * STEP_PAGES + i] = page[i];
    for (int32_t p = from; p < to; p++) {
        int32_t r = s->in.n_row++;
        s->token[r] = text[p];
        s->next[r] = text[p + 1];
        s->pos[r] = p;
        s->cell[r] = page[p / P] * P + p % P;
        if (want_all || p + 1 == to) step_want_last(s);
    }
    s->kv_len[q] = to;
    s->row0[q + 1] = s->in.n_row;
}

/* Check, submit and wait; aborts on an invalid batch or a failed step. */
static inline ern_result step_run(ern_backend *b, const step *s, const ern_backend_options *o, int32_t n_vocab) {
    ern_result out;
    ern_err err = {.text = ""};
    const char *why = "";
    if (!ern_batch_valid(&s->in, o, n_vocab, &why)) {
        fprintf(stderr, "step: %s\n", why);
        abort();
    }
    b->ops->submit(b, &s->in);
    if (b->ops->wait(b, &out, &err) != ERN_OK) {
        fprintf(stderr, "step: %s\n", err.text);
        abort();
    }
    return out;
}

#endif
