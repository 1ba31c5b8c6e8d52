/* What a backend shows of one step, kept: the stages that ern_backend_ops.probe names, in the order they came. */
#ifndef ERN_TESTS_RECORDS_H
#define ERN_TESTS_RECORDS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"

enum { RECORDS_MAX = 256 };

typedef struct record {
    char stage[16];
    int32_t layer, row, n_row, n_col;
    float *data; /* [n_row, n_col] */
} record;

typedef struct records {
    record record[RECORDS_MAX];
    int32_t n;
} records;

/* An ern_probe_fn, ud a records. */
static inline void records_keep(void *ud, const char *stage, int32_t layer, int32_t row, const float *data,
                                int32_t n_row, int32_t n_col) {
    records *all = ud;
    ERN_ASSERT(all->n < RECORDS_MAX);
    record *r = &all->record[all->n++];
    const size_t n = (size_t)n_row * (size_t)n_col;
    (void)snprintf(r->stage, sizeof r->stage, "%s", stage);
    r->layer = layer, r->row = row, r->n_row = n_row, r->n_col = n_col;
    r->data = malloc(n * sizeof *r->data);
    ERN_ASSERT(r->data != NULL);
    memcpy(r->data, data, n * sizeof *r->data);
}

/* The one that holds rows row..row+n_row-1 of a stage of a layer; NULL: there is none. */
static inline const record *records_find(const records *all, const char *stage, int32_t layer, int32_t row,
                                         int32_t n_row) {
    for (int32_t i = 0; i < all->n; i++) {
        const record *r = &all->record[i];
        if (!strcmp(r->stage, stage) && r->layer == layer && r->row <= row && row + n_row <= r->row + r->n_row)
            return r;
    }
    return NULL;
}

static inline void records_clear(records *all) {
    for (int32_t i = 0; i < all->n; i++) free(all->record[i].data);
    all->n = 0;
}

#endif
