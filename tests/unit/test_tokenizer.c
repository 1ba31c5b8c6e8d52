/* Text to ids: ERNIE's rules on a made tokenizer, against a naive BPE and against the library on the uncut text; bad
 * files; the published golden pairs when ERNEST_TEST_TOKENIZER names a real tokenizer.model. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/os.h"
#include "base/proto.h"
#include "base/utf8.h"
#include "model/synth_tokenizer.h"
#include "text/tokenizer.h"
#include "text_fixture.h"

#define SPACE "\xe2\x96\x81"

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

static int32_t id_of(const char *name) {
    int32_t id = ern_tokenizer_id(tiny.t, name);
    if (id < 0) fail_msg("the made tokenizer has no \"%s\"", name);
    return id;
}

/* ---- golden pairs ---------------------------------------------------------------------------------------------- */

static void golden_pairs(void **state) {
    (void)state;
    const char *path = getenv("ERNEST_TEST_TOKENIZER");
    if (!path) {
        print_message("no real tokenizer: set ERNEST_TEST_TOKENIZER to a tokenizer.model to run the published pairs\n");
        skip();
    }
    ern_tokenizer *t;
    ern_err err;
    if (ern_tokenizer_open(&t, path, &err) != ERN_OK) fail_msg("%s", err.text);
    static const struct {
        const char *text;
        int32_t id[64];
    } pair[] = {
        {"The following string should be properly encoded: Hello.",
         {700, 1997, 1530, 1189, 390, 10962, 20622, 93963, 30802, 93937, -1}},
        {"But ird and \xe0\xb8\x9b\xe0\xb8\xb5   ird   \xe0\xb8\x94",
         {2398, 93919, 2080, 326, 93919, 81175, 1111, 2080, 1111, 95676, -1}},
        {"A sample test", {93957, 3983, 1167, -1}},
        {"This is a test", {1720, 357, 274, 1167, -1}},
        {"Hey<eos>. \t\t \n\nyou  \xc3\xa9  @#\xf0\x9f\x98\x88  \xf0\x9f\xa4\x97!       , 1234 15 5,61",
         {25027, 93953, 92335, 6140, 93919, 22,    22,  93919, 23,    23,  5557,  269,   94039, 269,
          94027, 93993, 253,   172,  165,   149,   269, 253,   172,   177, 164,   94018, 426,   1089,
          93919, 4,     5,     6,    7,     93919, 4,   8,     93919, 8,   93938, 9,     4,     -1}},
        {"", {-1}},
        {" ", {93919, -1}},
        {"  ", {269, -1}},
        {" Hello", {30802, -1}},
        {"hello", {18830, -1}},
        {"<s>", {1, -1}},
        {"<s> Hello<s>how", {1, 30802, 1, 7413, -1}},
        {" <s> Hello<s> how", {93919, 1, 30802, 1, 1299, -1}},
        {"lekacy", {17289, 3004, -1}},
    };
    for (size_t i = 0; i < sizeof pair / sizeof pair[0]; i++) text_fixture_expect(t, pair[i].text, true, pair[i].id);
    ern_buf out;
    ern_buf_init(&out, 64);
    assert_int_equal(ern_tokenizer_decode(t, (int32_t[]){94014, 663}, 2, false, &out, NULL), ERN_OK);
    assert_string_equal(out.data, "\xd8\xa7 .");
    ern_buf_free(&out);
    ern_tokenizer_close(t);
}

/* ---- the rules ------------------------------------------------------------------------------------------------- */

static void rules(void **state) {
    (void)state;
    const int32_t space = id_of(SPACE), lf = 23;
    const ern_tokenizer *t = tiny.t;
    text_fixture_expect(t, "", true, (int32_t[]){-1});
    text_fixture_expect(t, " ", true, (int32_t[]){space, -1});
    text_fixture_expect(t, "  ", true, (int32_t[]){269, -1});
    text_fixture_expect(t, SPACE, true, (int32_t[]){space, -1}); /* the mark, typed, is a space */
    text_fixture_expect(t, "\n\n\t", true, (int32_t[]){lf, lf, 22, -1});
    text_fixture_expect(t, "1234 15", true, (int32_t[]){4, 5, 6, 7, space, 4, 8, -1});
    text_fixture_expect(t, "<s>", true, (int32_t[]){1, -1});
    text_fixture_expect(t, " <s> ", true, (int32_t[]){space, 1, space, -1}); /* nothing stripped, nothing added */
    text_fixture_expect(t, "<s>>", true, (int32_t[]){1, id_of(">"), -1});
    text_fixture_expect(t, "<s>", false, (int32_t[]){id_of("<"), id_of("s"), id_of(">"), -1});
    text_fixture_expect(t, "<s> the<s>the", true, (int32_t[]){1, id_of(SPACE "the"), 1, id_of("the"), -1});
    text_fixture_expect(t, "\xf0\x9f\x98\x88", true, (int32_t[]){13 + 0xf0, 13 + 0x9f, 13 + 0x98, 13 + 0x88, -1});
    text_fixture_expect(t, "<0x41>", true, /* the name of a byte piece is text */
                        (int32_t[]){id_of("<"), 3, id_of("x"), 7, 4, id_of(">"), -1});
    ern_tokens ids = text_fixture_encode(t, "a\0b", 3, false);
    assert_int_equal(ids.n, 3);
    assert_int_equal(ids.id[1], 13);
    ern_tokens_free(&ids);
}

static void special_names(void **state) {
    (void)state;
    const ern_tokenizer *t = tiny.t;
    int n_name = 0;
    for (int32_t id = 0; id < ern_tokenizer_n_token(t); id++) {
        if (!t->table.token[id].split) continue;
        const char *name = ern_tokenizer_name(t, id);
        text_fixture_expect(t, name, true, (int32_t[]){id, -1});
        /* A user who types it gets text: no special token, and the same letters back. */
        ern_tokens ids = text_fixture_encode(t, name, strlen(name), false);
        ern_buf out;
        ern_buf_init(&out, 4096);
        for (size_t i = 0; i < ids.n; i++) assert_false(t->table.token[ids.id[i]].split);
        assert_int_equal(ern_tokenizer_decode(t, ids.id, ids.n, true, &out, NULL), ERN_OK);
        assert_string_equal(out.data, name);
        ern_buf_free(&out);
        ern_tokens_free(&ids);
        n_name++;
    }
    assert_int_equal(n_name, 3 + 23 + 16);
    /* Longest first, and what is cut short is text. */
    text_fixture_expect(
        t, "<|LOC_1|><|LOC_", true,
        (int32_t[]){id_of("<|LOC_1|>"), id_of("<"), id_of("|"), id_of("L"), id_of("O"), id_of("C"), id_of("_"), -1});
    /* Tags of a reply stay when specials are skipped; the frame of a prompt goes. */
    assert_false(ern_tokenizer_is_special(t, id_of("</think>")));
    assert_false(ern_tokenizer_is_special(t, id_of("<tool_call>")));
    assert_true(ern_tokenizer_is_special(t, id_of("<|im_end|>")));
    assert_true(ern_tokenizer_is_special(t, id_of("<|LOC_1|>")));
    assert_true(ern_tokenizer_is_special(t, 2));
    assert_false(ern_tokenizer_is_special(t, id_of("the")));
}

static void unused_ids(void **state) {
    (void)state;
    size_t len;
    const int32_t n = ern_tokenizer_n_token(tiny.t);
    assert_string_equal(ern_tokenizer_name(tiny.t, n), "");
    assert_string_equal(ern_tokenizer_name(tiny.t, -1), "");
    (void)ern_tokenizer_bytes(tiny.t, n, &len);
    assert_int_equal(len, 0);
    assert_int_equal(ern_tokenizer_id(tiny.t, "no such piece"), -1);
}

/* ---- against a naive BPE and the uncut library ----------------------------------------------------------------- */

/* The rule in its plainest form, quadratic: symbols are characters; merge the neighbours whose union has the lowest id,
 * leftmost first; a digit merges with nothing; what is no piece becomes bytes. */
static void naive_encode(const ern_tokenizer *t, const char *text, size_t len, ern_tokens *out) {
    ern_buf s;
    ern_buf_init(&s, 1 << 16);
    for (size_t i = 0; i < len; i++) ern_buf_add(&s, text[i] == ' ' ? SPACE : text + i, text[i] == ' ' ? 3 : 1);
    static size_t at[1 << 16];
    size_t n = 0;
    for (size_t i = 0; i < s.len; i += ern_utf8_len(s.data + i, s.len - i)) at[n++] = i;
    at[n] = s.len;
    for (;;) {
        int32_t best_id = INT32_MAX;
        size_t best = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            int32_t id = token_table_find(&t->table, s.data + at[i], at[i + 2] - at[i]);
            if (id < 269 || t->table.token[id].split || id >= best_id) continue;
            best_id = id;
            best = i;
        }
        if (best_id == INT32_MAX) break;
        memmove(at + best + 1, at + best + 2, (n - best - 1) * sizeof at[0]);
        n--;
    }
    for (size_t i = 0; i < n; i++) {
        int32_t id = token_table_find(&t->table, s.data + at[i], at[i + 1] - at[i]);
        if (id >= 0) ern_tokens_add(out, id);
        for (size_t k = at[i]; id < 0 && k < at[i + 1]; k++) ern_tokens_add(out, 13 + (unsigned char)s.data[k]);
    }
    ern_buf_free(&s);
}

static void take(void *ud, const int *id, size_t n) {
    for (size_t i = 0; i < n; i++) ern_tokens_add(ud, id[i]);
}

static void same_tokens(const ern_tokens *a, const ern_tokens *b) {
    assert_int_equal(a->n, b->n);
    if (a->n) assert_memory_equal(a->id, b->id, a->n * sizeof a->id[0]);
}

static void against_naive(void **state) {
    (void)state;
    text_random r = text_random_start("against_naive", 1);
    ern_buf text;
    ern_buf_init(&text, 1 << 16);
    for (int round = 0; round < 3000; round++) {
        ern_buf_clear(&text);
        for (uint32_t n = 1 + text_random_below(&r, 30); n; n--) text_random_char(&r, &text);
        ern_tokens want, got = text_fixture_encode(tiny.t, text.data, text.len, false);
        ern_tokens_init(&want, 1 << 16);
        naive_encode(tiny.t, text.data, text.len, &want);
        same_tokens(&got, &want);
        /* And back again: the mark of a space reads as a space. */
        ern_buf back, plain;
        ern_buf_init(&back, 1 << 16);
        ern_buf_init(&plain, 1 << 16);
        for (size_t i = 0; i < text.len; i++) {
            bool mark = text.len - i >= 3 && memcmp(text.data + i, SPACE, 3) == 0;
            ern_buf_add(&plain, mark ? " " : text.data + i, 1);
            if (mark) i += 2;
        }
        assert_int_equal(ern_tokenizer_decode(tiny.t, got.id, got.n, true, &back, NULL), ERN_OK);
        assert_int_equal(back.len, plain.len);
        assert_memory_equal(back.data, plain.data, back.len);
        ern_buf_free(&back);
        ern_buf_free(&plain);
        ern_tokens_free(&got);
        ern_tokens_free(&want);
    }
    ern_buf_free(&text);
}

static void cut_like_uncut(void **state) {
    (void)state;
    text_random r = text_random_start("cut_like_uncut", 2);
    ern_buf text;
    ern_buf_init(&text, 1 << 20);
    for (int round = 0; round < 60; round++) {
        ern_buf_clear(&text);
        for (uint32_t n = 1 + text_random_below(&r, 9000); n; n--) text_random_char(&r, &text);
        ern_tokens whole, got = text_fixture_encode(tiny.t, text.data, text.len, false);
        ern_tokens_init(&whole, 1 << 20);
        assert_true(sp_shim_encode(tiny.t->sp, text.data, text.len, take, &whole));
        same_tokens(&got, &whole);
        ern_tokens_free(&got);
        ern_tokens_free(&whole);
    }
    ern_buf_free(&text);
}

/* ---- limits ---------------------------------------------------------------------------------------------------- */

static void limits(void **state) {
    (void)state;
    ern_tokens out;
    ern_err err;
    for (size_t limit = 0; limit < 8; limit++) { /* "1 2<s>3" is five tokens */
        ern_tokens_init(&out, limit);
        ern_status s = ern_tokenizer_encode(tiny.t, "1 2<s>3", 7, true, &out, &err);
        assert_int_equal(s, limit < 5 ? ERN_ERR_LIMIT : ERN_OK);
        assert_int_equal(out.n, limit < 5 ? limit : 5);
        ern_tokens_free(&out);
    }
    /* Far too long a text is refused before it is encoded: 64 MiB of spaces would take minutes. */
    size_t len = (size_t)64 << 20;
    char *text = malloc(len);
    assert_non_null(text);
    memset(text, ' ', len);
    ern_tokens_init(&out, 1000);
    assert_int_equal(ern_tokenizer_encode(tiny.t, text, len, false, &out, &err), ERN_ERR_LIMIT);
    assert_int_equal(out.n, 0);
    ern_tokens_free(&out);
    free(text);
}

/* Processor time of an encoding, the least of three. */
static double seconds_of(const char *text, size_t len) {
    double best = 1e9;
    for (int i = 0; i < 3; i++) {
        struct timespec from, to;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &from);
        ern_tokens ids = text_fixture_encode(tiny.t, text, len, true);
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &to);
        ern_tokens_free(&ids);
        double s = (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
        if (s < best) best = s;
    }
    return best;
}

/* Eight times the text: n log n takes 10 times as long, and up to twice that when it falls out of the cache; n squared
 * takes 64. 36 lies between, a factor of 1.8 from either. */
static void nearly_linear(void **state) {
    (void)state;
    enum { SMALL = 1 << 13, BIG = 1 << 16 };
    text_random r = text_random_start("nearly_linear", 3);
    static char text[BIG];
    for (int kind = 0; kind < 5; kind++) {
        for (size_t i = 0; i < BIG; i++) {
            const char one[] = {'a', ' ', '\n', (char)('a' + text_random_below(&r, 26)), "<|LOC_1"[i % 7]};
            text[i] = one[kind];
        }
        double small = seconds_of(text, SMALL), big = seconds_of(text, BIG);
        if (big > 36 * small) fail_msg("kind %d: %.4f s for %d bytes, %.4f s for %d", kind, small, SMALL, big, BIG);
    }
}

/* ---- bad files ------------------------------------------------------------------------------------------------- */

/* The folder must be refused with ERN_ERR_FILE and a text that holds `says`. */
static void refused(const text_fixture *f, const char *says) {
    ern_tokenizer *t;
    ern_err err = {0};
    ern_status s = ern_tokenizer_open(&t, f->dir, &err);
    if (s != ERN_ERR_FILE) fail_msg("status %d instead of a file error: %s", s, says);
    assert_null(t);
    if (!strstr(err.text, says)) fail_msg("\"%s\" does not say \"%s\"", err.text, says);
}

static void missing_files(void **state) {
    (void)state;
    ern_tokenizer *t;
    ern_err err;
    assert_int_equal(ern_tokenizer_open(&t, "/nonexistent", &err), ERN_ERR_FILE);
    assert_non_null(strstr(err.text, "/nonexistent"));
    assert_int_equal(ern_tokenizer_open(&t, "/tmp", &err), ERN_ERR_FILE);
    assert_non_null(strstr(err.text, "tokenizer.model"));
}

static void cut_and_bent_files(void **state) {
    (void)state;
    text_fixture f;
    char path[128], *data;
    size_t len;
    text_random r = text_random_start("cut_and_bent_files", 4);
    text_fixture_open(&f, SYNTH_TOKENIZER_MIN);
    snprintf(path, sizeof path, "%s/tokenizer.model", f.dir);
    assert_int_equal(ern_file_read(&data, &len, path, 1 << 20, NULL), ERN_OK);
    for (size_t n = 0; n < len; n += 1 + len / 100) { /* every cut is noticed, wherever it falls */
        text_fixture_write(&f, "tokenizer.model", data, n);
        refused(&f, "tokenizer.model");
    }
    int n_open = 0;
    for (int i = 0; i < 600; i++) { /* a bent bit is refused or harmless */
        size_t at = text_random_below(&r, (uint32_t)len);
        char bit = (char)(1 << text_random_below(&r, 8));
        data[at] ^= bit;
        text_fixture_write(&f, "tokenizer.model", data, len);
        ern_tokenizer *t;
        ern_err err;
        ern_status s = ern_tokenizer_open(&t, f.dir, &err);
        assert_true(s == ERN_OK || s == ERN_ERR_FILE);
        n_open += s == ERN_OK;
        ern_tokenizer_close(t);
        data[at] ^= bit;
    }
    assert_true(n_open > 0); /* scores and letters may change: else the loop tested nothing beyond the reader */
    free(data);
    text_fixture_close(&f);
}

/* What a small SentencePiece file may have wrong; the rest is right. */
typedef struct fault {
    const char *says;
    int no_bytes, no_unknown, no_space, twice, unigram, no_fallback, nan_score, long_piece, empty_piece, bad_utf8,
        bad_type;
    const char *tail; /* raw bytes after the good file */
    size_t n_tail;
} fault;

static void put_piece(ern_buf *out, const char *name, size_t len, float score, uint64_t type) {
    ern_buf p;
    ern_buf_init(&p, 1 << 16);
    ern_proto_put_bytes(&p, 1, name, len);
    ern_proto_put_float(&p, 2, score);
    ern_proto_put_varint(&p, 3, type);
    ern_proto_put_bytes(out, 1, p.data, p.len);
    ern_buf_free(&p);
}

static void put_model(ern_buf *out, const fault *x) {
    static char giant[1100];
    memset(giant, 'g', sizeof giant);
    put_piece(out, "<unk>", 5, 0, x->no_unknown ? 3 : 2);
    put_piece(out, "<s>", 3, 0, 3);
    put_piece(out, "</s>", 4, 0, 3);
    for (int b = 0; b < 256 && !x->no_bytes; b++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", b);
        put_piece(out, name, 6, 0, 6);
    }
    put_piece(out, "ab", 2, x->nan_score ? __builtin_nanf("") : 0, x->bad_type ? 7 : 1);
    put_piece(out, "a", 1, -1, 1);
    put_piece(out, x->twice ? "a" : "b", 1, -2, 1);
    if (!x->no_space) put_piece(out, SPACE, 3, -9, 1);
    if (x->long_piece) put_piece(out, giant, 1025, -3, 1);
    if (x->empty_piece) put_piece(out, "", 0, -3, 1);
    if (x->bad_utf8) put_piece(out, "\xff", 1, -3, 1);
    ern_buf spec;
    ern_buf_init(&spec, 64);
    ern_proto_put_varint(&spec, 3, x->unigram ? 1 : 2);
    ern_proto_put_varint(&spec, 35, !x->no_fallback);
    ern_proto_put_bytes(out, 2, spec.data, spec.len);
    ern_buf_free(&spec);
    ern_buf_add(out, x->tail, x->n_tail);
}

static void faulty_models(void **state) {
    (void)state;
    static const fault list[] = {
        {.says = "byte pieces", .no_bytes = 1},
        {.says = "unknown pieces", .no_unknown = 1},
        {.says = "U+2581", .no_space = 1},
        {.says = "same text", .twice = 1},
        {.says = "model_type", .unigram = 1},
        {.says = "byte_fallback", .no_fallback = 1},
        {.says = "finite", .nan_score = 1},
        {.says = "1025 bytes", .long_piece = 1},
        {.says = "has no text", .empty_piece = 1},
        {.says = "not UTF-8", .bad_utf8 = 1},
        {.says = "unknown type 7", .bad_type = 1},
        {.says = "malformed", .tail = "\x4b", .n_tail = 1},                                              /* a group */
        {.says = "malformed", .tail = "\x48\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", .n_tail = 12}, /* 11 bytes */
        {.says = "malformed", .tail = "\x4a\xff\xff\xff\xff\x7f", .n_tail = 6}, /* 34 GB long */
        {.says = "malformed", .tail = "\x00\x00", .n_tail = 2},                 /* field 0 */
    };
    text_fixture f;
    text_fixture_open(&f, SYNTH_TOKENIZER_MIN);
    ern_buf b;
    ern_buf_init(&b, 1 << 20);
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
        ern_buf_clear(&b);
        put_model(&b, &list[i]);
        text_fixture_write(&f, "tokenizer.model", b.data, b.len);
        refused(&f, list[i].says);
    }
    /* Without a fault, and with unknown fields of every kind behind it, it opens; the JSON beside it belongs to another
     * vocabulary and must be refused, so take the file alone. */
    fault none = {.tail = "\x48\x01\x49"
                          "12345678\x4a\x02hi\x4d"
                          "1234",
                  .n_tail = 20};
    ern_buf_clear(&b);
    put_model(&b, &none);
    text_fixture_write(&f, "tokenizer.model", b.data, b.len);
    char path[128];
    ern_tokenizer *t;
    ern_err err = {0};
    snprintf(path, sizeof path, "%s/tokenizer.model", f.dir);
    if (ern_tokenizer_open(&t, path, &err) != ERN_OK) fail_msg("%s", err.text);
    text_fixture_expect(t, "abba", false, (int32_t[]){259, 261, 260, -1});
    ern_tokenizer_close(t);
    ern_buf_free(&b);
    text_fixture_close(&f);
}

/* A file that asks for a dummy prefix and for trimming does not get them: ERNIE's rules are fixed. */
static void normalizer_is_fixed(void **state) {
    (void)state;
    text_fixture f;
    char path[128], *data;
    size_t len;
    text_fixture_open(&f, TEXT_TINY);
    snprintf(path, sizeof path, "%s/tokenizer.model", f.dir);
    assert_int_equal(ern_file_read(&data, &len, path, 1 << 20, NULL), ERN_OK);
    ern_buf b;
    ern_buf_init(&b, 1 << 20);
    ern_buf_add(&b, data, len);
    ern_buf_add(&b, "\x1a\x04\x18\x01\x20\x01", 6); /* normalizer_spec: add_dummy_prefix, remove_extra_whitespaces */
    text_fixture_write(&f, "tokenizer.model", b.data, b.len);
    ern_tokenizer *t;
    assert_int_equal(ern_tokenizer_open(&t, f.dir, NULL), ERN_OK);
    text_fixture_expect(t, "the  ", false, (int32_t[]){ern_tokenizer_id(t, "the"), 269, -1});
    ern_tokenizer_close(t);
    ern_buf_free(&b);
    free(data);
    text_fixture_close(&f);
}

static void beside_files(void **state) {
    (void)state;
    static const struct {
        const char *name, *text, *says;
    } bad[] = {
        {"added_tokens.json", "{\"x\": 5}", "already"},
        {"added_tokens.json", "{\"<s>\": 5000}", "has the id 1"},
        {"added_tokens.json", "{\"x\": -1}", "added_tokens.json"},
        {"added_tokens.json", "{\"x\": 99999999}", "99999999"},
        {"added_tokens.json", "{\"x\": \"y\"}", "added_tokens.json"},
        {"added_tokens.json", "{\"\": 5000}", "0 bytes"},
        {"added_tokens.json", "[1]", "not a JSON object"},
        {"added_tokens.json", "{", "added_tokens.json"},
        {"tokenizer_config.json", "{\"added_tokens_decoder\": {\"x\": {\"content\": \"y\"}}}", "added_tokens_decoder"},
        {"tokenizer_config.json", "{\"added_tokens_decoder\": {\"9\": {}}}", "added_tokens_decoder"},
    };
    text_fixture f;
    text_fixture_open(&f, TEXT_TINY);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        text_fixture_write(&f, "added_tokens.json", "{}", 2);
        text_fixture_write(&f, "tokenizer_config.json", "{}", 2);
        text_fixture_write(&f, bad[i].name, bad[i].text, strlen(bad[i].text));
        refused(&f, bad[i].says);
    }
    /* A decoder may name a token that is not special; a role makes a piece special; a gap in the ids means nothing. */
    static const char added[] = "{\"<more>\": 1000}";
    static const char config[] =
        "{\"added_tokens_decoder\": {\"1002\": {\"content\": \"<kept>\", \"special\": false}},"
        "\"mask_token\": {\"content\": \"the\"}, \"x_token\": \"q\", \"pad_token\": \"<nowhere>\"}";
    text_fixture_write(&f, "added_tokens.json", added, strlen(added));
    text_fixture_write(&f, "tokenizer_config.json", config, strlen(config));
    ern_tokenizer *t;
    ern_err err = {0};
    if (ern_tokenizer_open(&t, f.dir, &err) != ERN_OK) fail_msg("%s", err.text);
    assert_int_equal(ern_tokenizer_n_token(t), 1003);
    assert_int_equal(ern_tokenizer_id(t, "<more>"), 1000);
    assert_string_equal(ern_tokenizer_name(t, 1001), "");
    assert_true(ern_tokenizer_is_special(t, 1000));
    assert_false(ern_tokenizer_is_special(t, 1002));
    int32_t the = ern_tokenizer_id(t, "the");
    assert_true(ern_tokenizer_is_special(t, the));
    text_fixture_expect(t, "<kept>the<more>", true, (int32_t[]){1002, the, 1000, -1});
    ern_tokens ids = text_fixture_encode(t, "the<kept>", 9, false);
    for (size_t i = 0; i < ids.n; i++) assert_true(ids.id[i] != the && ids.id[i] < 1000);
    ern_tokens_free(&ids);
    /* A special of a single character, typed, is its byte. */
    text_fixture_expect(t, "q", true, (int32_t[]){ern_tokenizer_id(t, "q"), -1});
    text_fixture_expect(t, "q", false, (int32_t[]){13 + 'q', -1});
    ern_tokenizer_close(t);
    text_fixture_close(&f);
}

static void bad_text(void **state) {
    (void)state;
    static const char *const bad[] = {"\xff", "a\xc3", "\xed\xa0\x80", "\xc0\x80", "\xf4\x90\x80\x80"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        ern_tokens out;
        ern_tokens_init(&out, 100);
        assert_int_equal(ern_tokenizer_encode(tiny.t, bad[i], strlen(bad[i]), true, &out, NULL), ERN_ERR_INPUT);
        assert_int_equal(out.n, 0);
        ern_tokens_free(&out);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(golden_pairs),  cmocka_unit_test(rules),
        cmocka_unit_test(special_names), cmocka_unit_test(unused_ids),
        cmocka_unit_test(against_naive), cmocka_unit_test(cut_like_uncut),
        cmocka_unit_test(limits),        cmocka_unit_test(nearly_linear),
        cmocka_unit_test(missing_files), cmocka_unit_test(cut_and_bent_files),
        cmocka_unit_test(faulty_models), cmocka_unit_test(normalizer_is_fixed),
        cmocka_unit_test(beside_files),  cmocka_unit_test(bad_text),
    };
    return cmocka_run_group_tests(tests, open_tiny, close_tiny);
}
