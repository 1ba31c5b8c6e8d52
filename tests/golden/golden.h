/* Golden vectors (tools/make_goldens.py) against a backend: what test_golden_tiny and tools/golden_check share. */
#ifndef ERN_TESTS_GOLDEN_H
#define ERN_TESTS_GOLDEN_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "backend/backend.h"

typedef struct golden {
    json_t *doc;
    const char *shape;
    uint64_t seed;
    int32_t n_row; /* T; token has one more */
} golden;

/* What was seen. Errors and bounds of logits are absolute; those of resid are relative to the layer's rms. */
typedef struct golden_report {
    double logit_error, logit_bound, resid_error, resid_bound, mtp_error;
    double logit_rms;      /* root mean square of the errors of the fixed ids' logits */
    int32_t n_flipped_row; /* rows outside the bound within what one changed choice of expert does; bf16 on MoE only */
    double other_rms; /* the same against the run with the other kind of KV: far larger where rounding K and V shows */
    int64_t n_compared;
    bool ok;
    char why[256]; /* the first failure */
} golden_report;

/* Read a vectors file; prints and aborts on a malformed one. */
golden golden_open(const char *path);
void golden_close(golden *g);

/* Every stored weight element against ern_synth_bf16 / ern_synth_f32, bit for bit. False: *why names the first. */
bool golden_weights(const golden *g, char why[256]);

/* Run all rows of g on a backend as one step, with the MTP layer where the model has one, and compare. */
golden_report golden_compare(const golden *g, const ern_backend_ops *ops, const ern_model *m, ern_kv_dtype kv);

/* By how much the layers amplify a small relative change of the embedding (f32 KV): the premise of the bounds. */
double golden_growth(const golden *g, const ern_backend_ops *ops, const ern_model *m);

#endif
