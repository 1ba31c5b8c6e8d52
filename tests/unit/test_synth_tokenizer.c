/* The made tokenizers: ERNIE's id map, every learned piece reachable, the same bytes every time. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "base/os.h"
#include "model/synth_tokenizer.h"
#include "text_fixture.h"

static void check_front(const ern_tokenizer *t) {
    assert_int_equal(ern_tokenizer_id(t, "<unk>"), 0);
    assert_int_equal(ern_tokenizer_bos(t), 1);
    assert_int_equal(ern_tokenizer_eos(t), 2);
    for (int d = 0; d < 10; d++) assert_int_equal(ern_tokenizer_id(t, (char[2]){(char)('0' + d), 0}), 3 + d);
    for (int b = 0; b < 256; b++) {
        char name[8];
        size_t len;
        snprintf(name, sizeof name, "<0x%02X>", b);
        assert_int_equal(ern_tokenizer_id(t, name), 13 + b);
        assert_int_equal((unsigned char)*ern_tokenizer_bytes(t, 13 + b, &len), b);
        assert_int_equal(len, 1);
    }
    assert_int_equal(ern_tokenizer_id(t, "\xe2\x96\x81\xe2\x96\x81"), 269);
}

/* Each piece from 269 to the specials is the encoding of its own text. */
static void check_reachable(const ern_tokenizer *t, const synth_tokenizer_map *m) {
    for (int32_t id = 269; id < m->special; id++) {
        size_t len;
        const char *s = ern_tokenizer_bytes(t, id, &len);
        ern_tokens ids = text_fixture_encode(t, s, len, false);
        if (ids.n != 1 || ids.id[0] != id)
            fail_msg("piece %d, \"%s\", encodes otherwise", id, ern_tokenizer_name(t, id));
        ern_tokens_free(&ids);
    }
}

static void real_shape(void **state) {
    (void)state;
    text_fixture f;
    synth_tokenizer_map m = synth_tokenizer_layout(SYNTH_TOKENIZER_REAL);
    text_fixture_open(&f, SYNTH_TOKENIZER_REAL);
    check_front(f.t);
    assert_int_equal(m.added, 100295);
    assert_int_equal(ern_tokenizer_n_token(f.t), 101304);
    assert_int_equal(ern_tokenizer_id(f.t, "\xe2\x96\x81"), 93919);
    assert_int_equal(ern_tokenizer_id(f.t, "<|end_of_sentence|>"), 100272);
    assert_int_equal(ern_tokenizer_id(f.t, "<|begin_of_sentence|>"), 100273);
    static const char *const named[] = {"<mask:1>",   "<|im_start|>", "<|im_end|>",  "<think>",     "</think>",
                                        "<response>", "</response>",  "<tool_call>", "</tool_call>"};
    for (size_t i = 0; i < sizeof named / sizeof named[0]; i++) {
        int32_t id = ern_tokenizer_id(f.t, named[i]);
        assert_true(id >= 100274 && id <= 100294);
    }
    assert_int_equal(ern_tokenizer_id(f.t, "<|IMAGE_PLACEHOLDER|>"), 100295);
    assert_int_equal(ern_tokenizer_id(f.t, "<|AUDIO_PLACEHOLDER|>"), 100296);
    assert_int_equal(ern_tokenizer_id(f.t, "<|LOC_0|>"), 100297);
    assert_int_equal(ern_tokenizer_id(f.t, "<|LOC_1000|>"), 101297);
    assert_int_equal(ern_tokenizer_id(f.t, "<|IMAGE_SEP|>"), 101303);
    check_reachable(f.t, &m);
    text_fixture_close(&f);
}

static void tiny_shapes(void **state) {
    (void)state;
    for (int32_t n = SYNTH_TOKENIZER_MIN; n <= 8192; n = n * 3 / 2 + 1) {
        text_fixture f;
        synth_tokenizer_map m = synth_tokenizer_layout(n);
        text_fixture_open(&f, n);
        check_front(f.t);
        assert_int_equal(ern_tokenizer_n_token(f.t), m.n_token);
        assert_true(m.n_token < n); /* some rows are unused, as in the real one */
        assert_int_equal(ern_tokenizer_id(f.t, "\xe2\x96\x81"), m.single);
        assert_int_equal(ern_tokenizer_id(f.t, "<|end_of_sentence|>"), m.special);
        assert_int_equal(ern_tokenizer_id(f.t, "<|IMAGE_PLACEHOLDER|>"), m.added);
        for (char c = 0x21; c < 0x7f; c++) assert_true(ern_tokenizer_id(f.t, (char[2]){c, 0}) >= 0);
        check_reachable(f.t, &m);
        text_fixture_close(&f);
    }
}

static void same_bytes(void **state) {
    (void)state;
    text_fixture f[2];
    static const char *const name[] = {"tokenizer.model", "added_tokens.json", "special_tokens_map.json",
                                       "tokenizer_config.json"};
    for (int i = 0; i < 2; i++) text_fixture_open(&f[i], TEXT_TINY);
    for (size_t k = 0; k < sizeof name / sizeof name[0]; k++) {
        char *data[2], path[128];
        size_t len[2];
        for (int i = 0; i < 2; i++) {
            snprintf(path, sizeof path, "%s/%s", f[i].dir, name[k]);
            assert_int_equal(ern_file_read(&data[i], &len[i], path, 1 << 20, NULL), ERN_OK);
        }
        assert_int_equal(len[0], len[1]);
        assert_memory_equal(data[0], data[1], len[0]);
        for (int i = 0; i < 2; i++) free(data[i]);
    }
    for (int i = 0; i < 2; i++) text_fixture_close(&f[i]);
}

static void bad_sizes(void **state) {
    (void)state;
    ern_err err;
    assert_int_equal(synth_tokenizer_write("/tmp", SYNTH_TOKENIZER_MIN - 1, &err), ERN_ERR_USAGE);
    assert_int_equal(synth_tokenizer_write("/tmp", SYNTH_TOKENIZER_REAL + 1, &err), ERN_ERR_USAGE);
    assert_int_equal(synth_tokenizer_write("/nonexistent/folder", TEXT_TINY, &err), ERN_ERR_FILE);
    assert_non_null(strstr(err.text, "/nonexistent/folder"));
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(real_shape), cmocka_unit_test(tiny_shapes),
                                       cmocka_unit_test(same_bytes), cmocka_unit_test(bad_sizes)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
