/* Stop strings: against a naive matcher on random texts, strings and cuts; what is held back is never leaked or lost.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <string.h>

#include "naive_stop.h"
#include "text_fixture.h"

/* One random case: strings over two or three letters, so that they overlap, nest and repeat. */
static void one_case(text_random *r, ern_buf *out) {
    char stop_text[16][12], text[64];
    const char *stop[16];
    size_t stop_len[16], len = text_random_below(r, sizeof text), start = 0, end = 0;
    int n = (int)text_random_below(r, 5);
    const uint32_t n_letter = 2 + text_random_below(r, 2);
    if (text_random_below(r, 8) == 0) n = 16;
    for (int i = 0; i < n; i++) {
        stop_len[i] = 1 + text_random_below(r, 1 + text_random_below(r, 12));
        for (size_t k = 0; k < stop_len[i]; k++) stop_text[i][k] = (char)('a' + text_random_below(r, n_letter));
        stop[i] = stop_text[i];
    }
    for (size_t k = 0; k < len; k++) text[k] = (char)('a' + text_random_below(r, n_letter));
    const bool keep = text_random_below(r, 2);
    const int want = naive_stop(text, len, stop, stop_len, n, &start, &end);
    const size_t want_len = want < 0 ? len : keep ? end : start;

    ern_stop *s;
    assert_int_equal(ern_stop_open(&s, stop, stop_len, n, NULL), ERN_OK);
    ern_buf_clear(out);
    int got = -1;
    for (size_t at = 0; at < len;) {
        size_t step = 1 + text_random_below(r, 7);
        if (step > len - at) step = len - at;
        got = ern_stop_feed(s, text + at, step, keep, out);
        at += step;
        /* Nothing of the string is out before it is found, and what is out is a beginning of what is wanted. */
        assert_true(out->len <= want_len);
        if (got < 0 && at < len && want >= 0) assert_true(out->len <= start);
    }
    assert_int_equal(got, want);
    if (want >= 0) assert_int_equal(ern_stop_feed(s, "ab", 2, keep, out), want); /* found stays found */
    ern_stop_flush(s, out);
    assert_int_equal(out->len, want_len);
    assert_memory_equal(out->data, text, want_len);
    ern_stop_close(s);
}

static void against_naive(void **state) {
    (void)state;
    text_random r = text_random_start("stop against_naive", 6);
    ern_buf out;
    ern_buf_init(&out, 4096);
    ern_buf_text(&out, "");
    for (int i = 0; i < 1000000; i++) one_case(&r, &out);
    ern_buf_free(&out);
}

/* Feed a text in one piece and return what comes out, flushed; *found as fed. */
static void run(ern_stop *s, const char *text, bool keep, int found, const char *want) {
    ern_buf out;
    ern_buf_init(&out, 4096);
    ern_buf_text(&out, "");
    assert_int_equal(ern_stop_feed(s, text, strlen(text), keep, &out), found);
    ern_stop_flush(s, &out);
    assert_string_equal(out.data, want);
    ern_buf_free(&out);
    ern_stop_close(s);
}

static ern_stop *stop_of(const char *a, const char *b) {
    const char *text[] = {a, b};
    const size_t len[] = {strlen(a), b ? strlen(b) : 0};
    ern_stop *s;
    assert_int_equal(ern_stop_open(&s, text, len, b ? 2 : 1, NULL), ERN_OK);
    return s;
}

static void by_hand(void **state) {
    (void)state;
    run(stop_of("\n\n", NULL), "one\ntwo\n\nthree", false, 0, "one\ntwo");
    run(stop_of("\n\n", NULL), "one\ntwo\n\nthree", true, 0, "one\ntwo\n\n");
    run(stop_of("\n\n", NULL), "one\n", false, -1, "one\n");
    run(stop_of("abcd", "bc"), "xabcd", false, 1, "xa"); /* the one that ends first */
    run(stop_of("c", "abc"), "xabcd", false, 1, "x");    /* of those that end here, the longest */
    run(stop_of("ab", "ab"), "ab", false, 0, "");        /* of equals, the first */
    run(stop_of("aab", NULL), "aaab", false, 0, "a");    /* failing back into itself */
    run(stop_of("\xc3\xa9", NULL), "\xc3\xa8\xc3\xa9", false, 0, "\xc3\xa8");
    ern_stop *none;
    assert_int_equal(ern_stop_open(&none, NULL, NULL, 0, NULL), ERN_OK);
    run(none, "anything", false, -1, "anything");
}

static void holds_back(void **state) {
    (void)state;
    ern_stop *s = stop_of("STOP", NULL);
    ern_buf out;
    ern_buf_init(&out, 64);
    assert_int_equal(ern_stop_feed(s, "go ST", 5, false, &out), -1);
    assert_string_equal(out.data, "go ");
    assert_int_equal(ern_stop_feed(s, "ST", 2, false, &out), -1);
    assert_string_equal(out.data, "go ST");
    assert_int_equal(ern_stop_feed(s, "OP!", 3, false, &out), 0);
    assert_string_equal(out.data, "go ST");
    ern_buf_free(&out);
    ern_stop_close(s);
}

static void bounds(void **state) {
    (void)state;
    static char big[1025];
    memset(big, 'a', sizeof big);
    const char *text[17];
    size_t len[17];
    ern_stop *s;
    ern_err err;
    for (int i = 0; i < 17; i++) {
        text[i] = big;
        len[i] = 1024;
    }
    assert_int_equal(ern_stop_open(&s, text, len, 17, &err), ERN_ERR_INPUT);
    assert_int_equal(ern_stop_open(&s, text, (size_t[]){1025}, 1, &err), ERN_ERR_INPUT);
    assert_int_equal(ern_stop_open(&s, text, (size_t[]){0}, 1, &err), ERN_ERR_INPUT);
    assert_null(s);
    assert_int_equal(ern_stop_open(&s, text, len, 16, &err), ERN_OK);
    ern_buf out;
    ern_buf_init(&out, 8192);
    assert_int_equal(ern_stop_feed(s, big, 1023, false, &out), -1);
    assert_int_equal(out.len, 0);
    assert_int_equal(ern_stop_feed(s, "b", 1, false, &out), -1); /* all of it comes out at once */
    assert_int_equal(out.len, 1024);
    assert_int_equal(ern_stop_feed(s, big, 1024, true, &out), 0);
    assert_int_equal(out.len, 2048);
    ern_buf_free(&out);
    ern_stop_close(s);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(against_naive), cmocka_unit_test(by_hand),
                                       cmocka_unit_test(holds_back), cmocka_unit_test(bounds)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
