/* Shared by the fuzz targets of room text: a made tokenizer, opened once; bytes taken from the input. */
#ifndef TESTS_FUZZ_FUZZ_TEXT_H
#define TESTS_FUZZ_FUZZ_TEXT_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/status.h"
#include "model/synth_tokenizer.h"
#include "text/text.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A made tokenizer of 1024 rows; its folder is removed at once. Lives as long as the process. */
static inline const ern_tokenizer *fuzz_tokenizer(void) {
    static ern_tokenizer *t;
    if (t) return t;
    static const char *const name[] = {"tokenizer.model", "added_tokens.json", "special_tokens_map.json",
                                       "tokenizer_config.json"};
    char dir[] = "/tmp/ernest-fuzz-XXXXXX", path[64];
    ERN_ASSERT(mkdtemp(dir) != NULL);
    ERN_ASSERT(synth_tokenizer_write(dir, 1024, NULL) == ERN_OK);
    ERN_ASSERT(ern_tokenizer_open(&t, dir, NULL) == ERN_OK);
    for (size_t i = 0; i < sizeof name / sizeof name[0]; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, name[i]);
        unlink(path);
    }
    rmdir(dir);
    return t;
}

/* The next byte of the input, 0 when it is used up. */
static inline unsigned fuzz_byte(const uint8_t **data, size_t *size) {
    if (*size == 0) return 0;
    --*size;
    return *(*data)++;
}

/* The next n bytes at most; *len says how many. */
static inline const char *fuzz_bytes(const uint8_t **data, size_t *size, size_t n, size_t *len) {
    const char *s = (const char *)*data;
    *len = n < *size ? n : *size;
    *data += *len;
    *size -= *len;
    return s;
}

/* a == b, where "▁" in b reads as the space it is encoded as. */
static inline int fuzz_same_text(const char *a, size_t n_a, const char *b, size_t n_b) {
    size_t i = 0;
    for (size_t k = 0; k < n_b; i++) {
        const int mark = n_b - k >= 3 && memcmp(b + k, "\xe2\x96\x81", 3) == 0;
        if (i >= n_a || a[i] != (mark ? ' ' : b[k])) return 0;
        k += mark ? 3 : 1;
    }
    return i == n_a;
}

#endif
