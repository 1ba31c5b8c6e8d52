/* The requests of `ernest bench serve`: bodies made from a seed, or from a file of prompts. Owner: the command; one
 * thread. */
#ifndef ERN_CLI_BENCH_PROMPTS_H
#define ERN_CLI_BENCH_PROMPTS_H

#include "base/buf.h"
#include "base/jsonr.h"
#include "cli/options.h"

enum { BENCH_BODY_MAX = 16 << 20 };

typedef struct bench_prompts {
    bool chat; /* messages rather than a prompt */
    const char *model;
    uint64_t seed;
    int32_t n_in, n_out, n_vocab; /* random lengths, and the default length of a reply */
    double ratio;
    bool ignore_eos;
    double temperature, top_p; /* top_p NaN: not said */
    int64_t top_k;             /* -1: not said */
    json_t *row;               /* of a file: an array of {"prompt" or "messages", "max_tokens"?}; NULL: random */
} bench_prompts;

/* From the options; model is borrowed. Errors: ERN_ERR_USAGE, ERN_ERR_FILE naming the line. */
ERN_MUST_CHECK ern_status bench_prompts_open(bench_prompts *p, const options *o, const char *model, ern_err *err);
void bench_prompts_close(bench_prompts *p);
/* The i-th request's body: a pure function of the prompts and i. */
void bench_prompts_body(const bench_prompts *p, int64_t i, ern_buf *out);

/* Read prompts from text: a ShareGPT array, or one prompt a line, as JSON where it begins with '{'. Returns a new
 * array, or NULL with *err. `what` names the source. */
json_t *bench_prompts_parse(const char *text, size_t len, const char *what, ern_err *err);

#endif
