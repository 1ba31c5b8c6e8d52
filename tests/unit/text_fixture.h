/* Shared by the tests of room text: a made tokenizer in a temporary folder, and small conveniences. */
#ifndef TESTS_UNIT_TEXT_FIXTURE_H
#define TESTS_UNIT_TEXT_FIXTURE_H

#include <stddef.h>
#include <stdint.h>

#include "text/text.h"

enum { TEXT_TINY = 1024 };

typedef struct text_fixture {
    char dir[64]; /* below /tmp */
    ern_tokenizer *t;
} text_fixture;

/* Make a tokenizer for n_vocab rows and open it; the test fails when that fails. */
void text_fixture_open(text_fixture *f, int32_t n_vocab);
void text_fixture_close(text_fixture *f); /* removes the folder too */
/* Make or replace a file of the folder. */
void text_fixture_write(const text_fixture *f, const char *name, const void *data, size_t len);

/* The ids of a text, which must encode. */
ern_tokens text_fixture_encode(const ern_tokenizer *t, const char *text, size_t len, bool parse_special);
/* Compare with ids up to a -1. */
void text_fixture_expect(const ern_tokenizer *t, const char *text, bool parse_special, const int32_t *want);

/* Random bits from a printed seed: the same on every machine. */
typedef struct text_random {
    uint64_t seed, at;
} text_random;
text_random text_random_start(const char *test, uint64_t seed);
uint32_t text_random_below(text_random *r, uint32_t n);
/* Append one random character, often one that tokenizers treat specially. */
void text_random_char(text_random *r, ern_buf *out);

#endif
