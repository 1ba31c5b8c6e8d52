/* The tokenizer files of a made checkpoint: a SentencePiece BPE model by ERNIE's id map (docs/model.md 5.2), generated,
 * not copied. Private to room model. The id map for V rows of the embedding, V >= SYNTH_TOKENIZER_MIN:
 *
 *   0 <unk>  1 <s>  2 </s>  3..12 digits  13..268 bytes  269 "▁▁"  270.. learned pieces, each reachable by merges
 *   then "▁" and single characters, then 23 specials, then added tokens; the last ids below V mean nothing.
 *
 * V = 103424, the real shape, has the published counts: "▁" at 93919, 100295 pieces, 101304 tokens. Any thread. */
#ifndef ERN_MODEL_SYNTH_TOKENIZER_H
#define ERN_MODEL_SYNTH_TOKENIZER_H

#include <stdint.h>

#include "base/status.h"

enum { SYNTH_TOKENIZER_MIN = 512, SYNTH_TOKENIZER_REAL = 103424 };

/* Where the parts of the id map begin. */
typedef struct synth_tokenizer_map {
    int32_t single;  /* "▁", then single characters */
    int32_t special; /* <|end_of_sentence|>, then the other specials */
    int32_t added;   /* added tokens; also the number of SentencePiece pieces */
    int32_t n_token; /* ids that mean something; n_token <= n_vocab */
} synth_tokenizer_map;

/* The map for n_vocab rows (SYNTH_TOKENIZER_MIN..SYNTH_TOKENIZER_REAL). */
synth_tokenizer_map synth_tokenizer_layout(int32_t n_vocab);

/* Write tokenizer.model, added_tokens.json, special_tokens_map.json and tokenizer_config.json into dir, which exists.
 * The same n_vocab gives the same bytes. Errors: ERN_ERR_USAGE for n_vocab out of range, ERN_ERR_FILE naming the file
 * that could not be written, ERN_ERR_MEMORY. */
ERN_MUST_CHECK ern_status synth_tokenizer_write(const char *dir, int32_t n_vocab, ern_err *err);

#endif
