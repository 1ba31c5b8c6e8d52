/* The sampling rule: from one row of logits to one token and its logprobs. Used by every backend whose logits are on
 * the host, and the law for those whose are not.
 *
 * Everything is a function of the row, the struct and the position: token weights are integers, so their sums have no
 * order; exact top-k/top-p by (logit, then lower id); counter-based random numbers keyed by (seed, choice, position).
 * Order of operations: docs/model.md 7. Thread: any; the scratch belongs to one caller. */
#ifndef ERN_MODEL_SAMPLE_H
#define ERN_MODEL_SAMPLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    ERN_TOP_MAX = 20,        /* most top_logprobs per token */
    ERN_VOCAB_MAX = 1 << 18, /* largest vocabulary: the sum of its masses stays below 2^63 */
};

typedef struct ern_bias {
    int32_t id;
    float add;
} ern_bias;

typedef enum ern_logprobs_mode {
    ERN_LOGPROBS_RAW, /* log-softmax before penalties and temperature (default) */
    ERN_LOGPROBS_RAW_LOGITS,
    ERN_LOGPROBS_PROCESSED, /* after penalties, temperature, bans */
    ERN_LOGPROBS_PROCESSED_LOGITS,
} ern_logprobs_mode;

/* How one wanted row is sampled. Plain data; pointers are borrowed until the step's wait returns. */
typedef struct ern_sample {
    float temperature;         /* 0: exact arg-max, ties to the lowest id */
    float top_p;               /* (0, 1]; 1: off */
    float min_p;               /* [0, 1]; 0: off */
    int32_t top_k;             /* <= 0: off */
    float repetition;          /* 1: off */
    float frequency, presence; /* 0: off */
    uint64_t seed;
    int32_t choice;   /* which of n choices */
    int32_t position; /* position of the token to be sampled in its sequence (prompt counted) */
    /* The tokens so far, without those still in flight: seen[0..n_seen) has n_prompt prompt ids first. The backend adds
     * the tokens of this sequence's rows up to and including the wanted one whose position is >= n_seen. */
    const int32_t *seen;
    int32_t n_seen, n_prompt;
    const ern_bias *bias; /* [n_bias] added to the logits (OpenAI logit_bias) */
    int32_t n_bias;
    const int32_t *ban; /* [n_ban] never sampled: bad words; stop ids while the reply is too short */
    int32_t n_ban;
    const uint32_t *mask; /* [ceil(V/32)] bit set: allowed; NULL: all. Grammars and allowed_token_ids */
    int32_t forced;       /* >= 0: sample nothing, report this id's logprob (echo, prompt_logprobs); -1: sample */
    int32_t n_top;        /* -1: no logprobs; 0: the chosen token's; k: and the top k (<= ERN_TOP_MAX) */
    ern_logprobs_mode mode;
    bool logprob_scaled;     /* temp_scaled_logprobs: divide raw logits by the temperature first */
    bool logprob_normalized; /* top_p_normalized_logprobs: renormalise inside the nucleus */
} ern_sample;

typedef struct ern_sampled {
    int32_t token;
    bool bad;      /* a logit was NaN or infinite where it may not be: the request must end with numerical_error */
    float logprob; /* of token; 0 when n_top < 0 */
    int32_t n_top; /* filled entries below, best first, ties to the lower id */
    int32_t rank;  /* 1-based rank of token among all by the logprobs' values; 0 when n_top < 0 */
    int32_t top_id[ERN_TOP_MAX];
    float top_logprob[ERN_TOP_MAX];
} ern_sampled;

/* Bytes of scratch for a vocabulary of n_vocab (at most ERN_VOCAB_MAX); must be aligned to 8. */
size_t ern_sample_scratch_bytes(int32_t n_vocab);

/* Sample one row.
 * Shapes:  logits [n_vocab] f32, overwritten; tail [n_tail] the row's own tokens that `seen` lacks (may be NULL).
 * Owns:    nothing. Errors: none; non-finite logits set out->bad. Source: docs/model.md 7. */
void ern_sample_row(float *logits, int32_t n_vocab, const ern_sample *s, const int32_t *tail, int32_t n_tail,
                    void *scratch, ern_sampled *out);

/* The uniform number in [0, 1) that position draws with: 24 bits, exact in f32. */
float ern_sample_uniform(uint64_t seed, int32_t choice, int32_t position);

#endif
