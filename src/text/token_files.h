/* The JSON files beside a SentencePiece file: which tokens are added to it, and which are special. Private to room
 * text. Any thread. */
#ifndef ERN_TEXT_TOKEN_FILES_H
#define ERN_TEXT_TOKEN_FILES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* One thing a file says of a token. */
typedef struct token_fact {
    const char *what; /* path of the file, for messages */
    const char *name; /* len bytes, NUL-ended */
    size_t len;
    int32_t id;   /* the name has this id (added_tokens.json, added_tokens_decoder); -1: no id is said */
    bool special; /* left out when specials are skipped; only a decoder entry may say no */
} token_fact;

/* Take a fact; a failure stops the reading. */
typedef ern_status token_fact_fn(void *ud, const token_fact *f, ern_err *err);

/* Read the files that are in dir and hand every fact to fn. Errors: ERN_ERR_FILE naming the file and the entry; fn's.
 */
ERN_MUST_CHECK ern_status token_files_read(const char *dir, token_fact_fn *fn, void *ud, ern_err *err);

#endif
