/* Ids to text: the stream joins to the whole, is always valid UTF-8, and bad bytes are replaced as Python does it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdio.h>
#include <string.h>

#include "base/utf8.h"
#include "text_fixture.h"

static text_fixture tiny;

static int open_tiny(void **state) {
    (void)state;
    text_fixture_open(&tiny, TEXT_TINY);
    return 0;
}

static int close_tiny(void **state) {
    (void)state;
    text_fixture_close(&tiny);
    return 0;
}

/* Stream ids one by one and compare with the whole; both into buffers that the caller keeps. */
static void stream_equals_whole(const int32_t *id, size_t n, bool skip, ern_buf *stream, ern_buf *whole) {
    ern_decode d = {0};
    ern_buf_clear(stream);
    ern_buf_clear(whole);
    for (size_t i = 0; i < n; i++) {
        size_t from = stream->len;
        ern_decode_token(&d, tiny.t, id[i], skip, stream);
        assert_true(ern_utf8_valid(stream->data + from, stream->len - from)); /* never half a character */
    }
    ern_decode_flush(&d, stream);
    assert_int_equal(ern_tokenizer_decode(tiny.t, id, n, skip, whole, NULL), ERN_OK);
    assert_int_equal(stream->len, whole->len);
    assert_memory_equal(stream->data, whole->data, whole->len);
    assert_true(ern_utf8_valid(whole->data, whole->len));
}

static void all_pairs(void **state) {
    (void)state;
    ern_buf stream, whole;
    ern_buf_init(&stream, 1 << 12);
    ern_buf_init(&whole, 1 << 12);
    ern_buf_text(&stream, "");
    ern_buf_text(&whole, "");
    const int32_t n = ern_tokenizer_n_token(tiny.t);
    for (int32_t a = 0; a < n; a++)
        for (int32_t b = 0; b < n; b++) stream_equals_whole((int32_t[]){a, b}, 2, false, &stream, &whole);
    ern_buf_free(&stream);
    ern_buf_free(&whole);
}

static void random_streams(void **state) {
    (void)state;
    text_random r = text_random_start("random_streams", 5);
    ern_buf stream, whole;
    ern_buf_init(&stream, 1 << 16);
    ern_buf_init(&whole, 1 << 16);
    ern_buf_text(&stream, "");
    ern_buf_text(&whole, "");
    for (int round = 0; round < 20000; round++) {
        int32_t id[40];
        size_t n = text_random_below(&r, 40);
        for (size_t i = 0; i < n; i++) /* mostly bytes that begin or continue characters */
            id[i] =
                (int32_t)(text_random_below(&r, 4) ? 13 + 0x80 + text_random_below(&r, 0x80)
                                                   : text_random_below(&r, (uint32_t)ern_tokenizer_n_token(tiny.t)));
        stream_equals_whole(id, n, round & 1, &stream, &whole);
    }
    ern_buf_free(&stream);
    ern_buf_free(&whole);
}

/* Values from Python 3.11: bytes.decode("utf-8", "replace"). */
static void like_python(void **state) {
    (void)state;
#define R "\xef\xbf\xbd"
    static const struct {
        const char *bytes, *text;
    } list[] = {
        {"\xf0\x9f\x98\x80", "\xf0\x9f\x98\x80"},
        {"\xe2\x96"
         "A",
         R "A"},
        {"\xf0\x9f\x98", R},
        {"\xff", R},
        {"\xc0\x80", R R},
        {"\xed\xa0\x80", R R R},
        {"\xf0\x90", R},
        {"\xe2\x28\xa1", R "(" R},
        {"\xf4\x90\x80\x80", R R R R},
        {"\xe2\xe2\x82\xac", R "\xe2\x82\xac"},
        {"\xf0\x9f\x98\xf0\x9f\x98\x80", R "\xf0\x9f\x98\x80"},
        {"\x80"
         "a"
         "\xc3",
         R "a" R},
    };
#undef R
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
        int32_t id[8];
        size_t n = strlen(list[i].bytes);
        ern_buf stream, whole;
        ern_buf_init(&stream, 64);
        ern_buf_init(&whole, 64);
        for (size_t k = 0; k < n; k++) id[k] = 13 + (unsigned char)list[i].bytes[k];
        stream_equals_whole(id, n, false, &stream, &whole);
        assert_string_equal(whole.data, list[i].text);
        ern_buf_free(&stream);
        ern_buf_free(&whole);
    }
}

static void specials(void **state) {
    (void)state;
    const int32_t end = ern_tokenizer_id(tiny.t, "<|im_end|>"), think = ern_tokenizer_id(tiny.t, "</think>");
    const int32_t space = ern_tokenizer_id(tiny.t, "\xe2\x96\x81");
    ern_buf stream, whole;
    ern_buf_init(&stream, 64);
    ern_buf_init(&whole, 64);
    stream_equals_whole((int32_t[]){space, 1, 4, end, think}, 5, false, &stream, &whole);
    assert_string_equal(whole.data, " <s>1<|im_end|></think>");
    stream_equals_whole((int32_t[]){space, 1, 4, end, think}, 5, true, &stream, &whole);
    assert_string_equal(whole.data, " 1</think>");
    /* A skipped special is not there: the halves of a character around it join. A shown one parts them. */
    stream_equals_whole((int32_t[]){13 + 0xc3, end, 13 + 0xa9}, 3, true, &stream, &whole);
    assert_string_equal(whole.data, "\xc3\xa9");
    stream_equals_whole((int32_t[]){13 + 0xc3, end, 13 + 0xa9}, 3, false, &stream, &whole);
    assert_string_equal(whole.data, "\xef\xbf\xbd<|im_end|>\xef\xbf\xbd");
    ern_buf_free(&stream);
    ern_buf_free(&whole);
}

static void out_of_range(void **state) {
    (void)state;
    ern_buf out;
    ern_err err;
    ern_buf_init(&out, 64);
    const int32_t n = ern_tokenizer_n_token(tiny.t);
    const int32_t bad[] = {-1, n, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char says[32];
        snprintf(says, sizeof says, "%d", bad[i]);
        assert_int_equal(ern_tokenizer_decode(tiny.t, (int32_t[]){4, bad[i]}, 2, false, &out, &err), ERN_ERR_INPUT);
        assert_non_null(strstr(err.text, says));
        assert_int_equal(out.len, 0);
    }
    ern_buf_free(&out);
}

static void token_array(void **state) {
    (void)state;
    ern_tokens t;
    ern_tokens_init(&t, 100);
    for (int32_t i = 0; i < 100; i++) assert_true(ern_tokens_add(&t, i));
    assert_false(t.full);
    assert_false(ern_tokens_add(&t, 100));
    assert_true(t.full);
    assert_int_equal(t.n, 100);
    for (int32_t i = 0; i < 100; i++) assert_int_equal(t.id[i], i);
    ern_tokens_free(&t);
    assert_int_equal(t.n, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(all_pairs),    cmocka_unit_test(random_streams),
                                       cmocka_unit_test(like_python),  cmocka_unit_test(specials),
                                       cmocka_unit_test(out_of_range), cmocka_unit_test(token_array)};
    return cmocka_run_group_tests(tests, open_tiny, close_tiny);
}
