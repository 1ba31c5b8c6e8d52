/* Shared by the tests of room text. See text_fixture.h. */
#include "text_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/counter.h"
#include "model/synth_tokenizer.h"

static const char *const file_name[] = {"tokenizer.model", "added_tokens.json", "special_tokens_map.json",
                                        "tokenizer_config.json", "chat_template.jinja"};

void text_fixture_open(text_fixture *f, int32_t n_vocab) {
    ern_err err = {0};
    strcpy(f->dir, "/tmp/ernest-text-XXXXXX");
    assert_non_null(mkdtemp(f->dir));
    if (synth_tokenizer_write(f->dir, n_vocab, &err) != ERN_OK || ern_tokenizer_open(&f->t, f->dir, &err) != ERN_OK)
        fail_msg("%s", err.text);
}

void text_fixture_close(text_fixture *f) {
    ern_tokenizer_close(f->t);
    for (size_t i = 0; i < sizeof file_name / sizeof file_name[0]; i++) {
        char path[128];
        snprintf(path, sizeof path, "%s/%s", f->dir, file_name[i]);
        unlink(path);
    }
    assert_int_equal(rmdir(f->dir), 0);
}

void text_fixture_write(const text_fixture *f, const char *name, const void *data, size_t len) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", f->dir, name);
    FILE *out = fopen(path, "wb");
    assert_non_null(out);
    assert_int_equal(fwrite(data, 1, len, out), len);
    assert_int_equal(fclose(out), 0);
}

ern_tokens text_fixture_encode(const ern_tokenizer *t, const char *text, size_t len, bool parse_special) {
    ern_tokens ids;
    ern_err err = {0};
    ern_tokens_init(&ids, 1 << 24);
    if (ern_tokenizer_encode(t, text, len, parse_special, &ids, &err) != ERN_OK) fail_msg("%s", err.text);
    return ids;
}

void text_fixture_expect(const ern_tokenizer *t, const char *text, bool parse_special, const int32_t *want) {
    ern_tokens ids = text_fixture_encode(t, text, strlen(text), parse_special);
    size_t n = 0;
    while (want[n] >= 0) n++;
    for (size_t i = 0; i < n && i < ids.n; i++)
        if (ids.id[i] != want[i]) fail_msg("\"%s\": token %zu is %d, expected %d", text, i, ids.id[i], want[i]);
    if (ids.n != n) fail_msg("\"%s\": %zu tokens, expected %zu", text, ids.n, n);
    ern_tokens_free(&ids);
}

text_random text_random_start(const char *test, uint64_t seed) {
    print_message("%s: seed %llu\n", test, (unsigned long long)seed);
    return (text_random){.seed = seed};
}

uint32_t text_random_below(text_random *r, uint32_t n) {
    return (uint32_t)((ern_counter64(r->seed, r->at++) >> 32) % n);
}

void text_random_char(text_random *r, ern_buf *out) {
    static const char *const often[] = {
        " ",  "  ",   "\n", "\t",           "7",         "<s>",          "<think>", "e",
        "th", "</s>", "<",  "\xe2\x96\x81", "\xc3\xa9",  "<|im_end|>",   "The ",    "0",
        ".",  "ing",  "\r", "<0x41>",       "<|LOC_1|>", "\xe4\xbd\xa0", "\x7f",    "\x01"};
    if (text_random_below(r, 3)) {
        ern_buf_text(out, often[text_random_below(r, sizeof often / sizeof often[0])]);
        return;
    }
    uint32_t c = text_random_below(r, 4) ? text_random_below(r, 0x3000) : text_random_below(r, 0x110000);
    if (c >= 0xd800 && c < 0xe000) c = 'x';
    char s[4];
    size_t n = 0;
    if (c < 0x80) {
        s[n++] = (char)c;
    } else if (c < 0x800) {
        s[n++] = (char)(0xc0 | c >> 6);
    } else if (c < 0x10000) {
        s[n++] = (char)(0xe0 | c >> 12);
        s[n++] = (char)(0x80 | (c >> 6 & 63));
    } else {
        s[n++] = (char)(0xf0 | c >> 18);
        s[n++] = (char)(0x80 | (c >> 12 & 63));
        s[n++] = (char)(0x80 | (c >> 6 & 63));
    }
    if (c >= 0x80) s[n++] = (char)(0x80 | (c & 63));
    ern_buf_add(out, s, n);
}
