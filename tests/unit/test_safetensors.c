/* The strict safetensors reader: what it takes, what it refuses, and that no byte and no cut gets past it. */
#include "st_edit.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>
#include <time.h>

#define HEADER(...) #__VA_ARGS__

/* Scan a header of a file with data_bytes of data. */
static ern_status scan(const char *header, size_t len, uint64_t data_bytes, ern_arena *a, st_tensor **t, int32_t *n,
                       ern_err *err) {
    memset(err, 0, sizeof *err);
    return st_header_scan(t, n, a, header, len, 8 + len + data_bytes, "f.safetensors", err);
}

static void taken(void **state) {
    (void)state;
    static const char text[] =
        "{\"b\":{\"shape\":[2,3],\"data_offsets\":[8,20],\"dtype\":\"BF16\"},\n\t \"__metadata__\" : "
        "{\"k\\n\\u00e9\":\"v\"} ,"
        "\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[4,8]},\"z\":{\"dtype\":\"I8\",\"shape\":[0,9],"
        "\"data_offsets\":[4,4]},\"c\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}   ";
    ern_arena a;
    st_tensor *t;
    int32_t n;
    ern_err err;
    ern_arena_open(&a, 0);
    assert_int_equal(scan(text, strlen(text), 20, &a, &t, &n, &err), ERN_OK);
    assert_int_equal(n, 4);
    static const char *const name[] = {"c", "z", "a", "b"};
    static const uint64_t from[] = {0, 4, 4, 8}, bytes[] = {4, 0, 4, 12};
    for (int i = 0; i < 4; i++) {
        assert_string_equal(t[i].name, name[i]);
        assert_int_equal(t[i].from, 8 + strlen(text) + from[i]);
        assert_int_equal(t[i].bytes, bytes[i]);
    }
    assert_int_equal(t[3].dtype, ST_BF16);
    assert_int_equal(t[3].n_dim, 2);
    assert_int_equal(t[3].dim[1], 3);
    assert_int_equal(t[2].n_dim, 0);
    ern_arena_close(&a);
}

typedef struct refused_case {
    const char *header;
    uint64_t data_bytes;
    const char *says;
} refused_case;

static const refused_case refused_table[] = {
    {" {}      ", 0, "first byte"},
    {"{}   x   ", 0, "only spaces"},
    {"{        ", 0, "name"},
    {"{}       ", 4, "no tensor owns"},
    {"[[[[[[[[[", 0, "first byte"},
    {HEADER({
         "a" : {"dtype" : "BF16", "shape" : [2], "data_offsets" : [ 0, 4 ]},
         "a" : {"dtype" : "BF16", "shape" : [2], "data_offsets" : [ 4, 8 ]}
     }),
     8, "tensor a is in the header twice"},
    {HEADER({
         "a" : {"dtype" : "BF16", "shape" : [2], "data_offsets" : [ 0, 4 ]},
         "b" : {"dtype" : "BF16", "shape" : [2], "data_offsets" : [ 2, 6 ]}
     }),
     6, "overlap"},
    {HEADER({
         "a" : {"dtype" : "BF16", "shape" : [2], "data_offsets" : [ 0, 4 ]},
         "b" : {"dtype" : "BF16", "shape" : [2], "data_offsets" : [ 6, 10 ]}
     }),
     10, "hole"},
    {HEADER({"a" : {"dtype" : "BF16", "shape" : [2], "data_offsets" : [ 2, 6 ]}}), 6, "hole"},
    {HEADER({"a" : {"dtype" : "BF16", "shape" : [2], "data_offsets" : [ 0, 4 ]}}), 3, "cut short"},
    {HEADER({"a" : {"dtype" : "BF16", "shape" : [2], "data_offsets" : [ 0, 4 ]}}), 5, "no tensor owns"},
    {HEADER({"a" : {"dtype" : "BF16", "shape" : [2], "data_offsets" : [ 0, 6 ]}}), 6, "span 4 bytes"},
    {HEADER({"a" : {"dtype" : "BF16", "shape" : [2], "data_offsets" : [ 4, 0 ]}}), 4, "span 4 bytes"},
    {HEADER({"a" : {"dtype" : "BF17", "shape" : [2], "data_offsets" : [ 0, 4 ]}}), 4, "known dtype"},
    {HEADER({"a" : {"dtype" : "BF16", "shape" : [2]}}), 4, "only some"},
    {HEADER({"a" : {"dtype" : "BF16", "shape" : [2], "data_offsets" : [0]}}), 4, "two data_offsets, found 1"},
    {HEADER({"a" : {"dtype" : "BF16", "shape" : [2], "data_offsets" : [ 0, 2, 4 ]}}), 4, "two offsets"},
    {HEADER({"a" : {"dtype" : "BF16", "shape" : [2], "shape" : [2], "data_offsets" : [ 0, 4 ]}}), 4,
     "shape is there twice"},
    {HEADER({"a" : {"dtype" : "BF16", "shape" : [2], "data_offsets" : [ 0, 4 ], "x" : 1}}), 4, "found x"},
    {HEADER({"a" : {"dtype" : "BF16", "shape" : [-2], "data_offsets" : [ 0, 4 ]}}), 4, "whole number"},
    {HEADER({"a" : {"dtype" : "BF16", "shape" : [2.0], "data_offsets" : [ 0, 4 ]}}), 4, "','"},
    {HEADER({"a" : {"dtype" : "BF16", "shape" : [02], "data_offsets" : [ 0, 4 ]}}), 4, "leading zeros"},
    {HEADER({"a" : {"dtype" : "BF16", "shape" : [[2]], "data_offsets" : [ 0, 4 ]}}), 4, "whole number"},
    {HEADER({"a" : {"dtype" : "BF16", "shape" : [ 1, 1, 1, 1, 1, 1, 1, 1, 2 ], "data_offsets" : [ 0, 4 ]}}), 4,
     "8 dimensions"},
    {HEADER({"a" : {"dtype" : "BF16", "shape" : [ 4294967296, 4294967296 ], "data_offsets" : [ 0, 0 ]}}), 0,
     "larger than any"},
    {HEADER({"a" : {"dtype" : "BF16", "shape" : [99999999999999999999], "data_offsets" : [ 0, 4 ]}}), 4, "2^53"},
    {HEADER({"a" : 1}), 0, "'{' of a tensor"},
    {HEADER({"" : {"dtype" : "BF16", "shape" : [2], "data_offsets" : [ 0, 4 ]}}), 4, "plain characters"},
    {HEADER({"a b" : {"dtype" : "BF16", "shape" : [2], "data_offsets" : [ 0, 4 ]}}), 4, "plain characters"},
    {HEADER({"a\u0041" : {"dtype" : "BF16", "shape" : [2], "data_offsets" : [ 0, 4 ]}}), 4, "plain characters"},
    {HEADER({"__metadata__" : {"a" : 1}}), 0, "string in __metadata__"},
    {HEADER({"__metadata__" : {"a" : {"b" : "c"}}}), 0, "string in __metadata__"},
    {HEADER({"__metadata__" : {"a" : "1", "a" : "2"}}), 0, "__metadata__ twice"},
    {HEADER({"__metadata__" : {}, "__metadata__" : {}}), 0, "only once"},
    {HEADER({"__metadata__" : {"a" : "\x"}}), 0, "JSON escape"},
    {HEADER({"__metadata__" : {"a" : "\u12g4"}}), 0, "hexadecimal"},
    {"{\"__metadata__\":{\"a\":\"\n\"}}", 0, "control character"},
    {"{\"__metadata__\":{\"a\":\"\xff\"}}", 0, "UTF-8"},
    {"{\"__metadata__\":{\"a\":\"\\", 0, "end of"},
};

static void refused(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof refused_table / sizeof *refused_table; i++) {
        const refused_case *c = &refused_table[i];
        ern_arena a;
        st_tensor *t;
        int32_t n;
        ern_err err;
        ern_arena_open(&a, 0);
        ern_status s = scan(c->header, strlen(c->header), c->data_bytes, &a, &t, &n, &err);
        if (s != ERN_ERR_FILE || !strstr(err.text, c->says) || strncmp(err.text, "f.safetensors", 13) != 0 || n != 0)
            fail_msg("case %zu %s: status %d, text %s, expected %s", i, c->header, s, err.text, c->says);
        ern_arena_close(&a);
    }
}

/* Any header that is accepted tiles its file: the invariant that everything later leans on. */
static void assert_tiles(const st_tensor *t, int32_t n, uint64_t data_from, uint64_t file_bytes) {
    uint64_t at = data_from;
    for (int32_t i = 0; i < n; i++) {
        uint64_t bytes = st_dtype_bytes(t[i].dtype);
        for (int k = 0; k < t[i].n_dim; k++) bytes *= (uint64_t)t[i].dim[k];
        assert_int_equal(t[i].from, at);
        assert_int_equal(t[i].bytes, bytes);
        at += bytes;
        for (int32_t k = 0; k < i; k++) assert_string_not_equal(t[i].name, t[k].name);
    }
    assert_int_equal(at, file_bytes);
}

static void every_byte_mutated(void **state) {
    (void)state;
    st_list l = st_list_new();
    st_list_add(&l, "model.norm.weight", "BF16", 1, (const int64_t[]){5}, 10, "0123456789");
    st_list_add(&l, "model.gate", "F32", 2, (const int64_t[]){1, 2}, 8, "01234567");
    st_list_add(&l, "x", "U8", 3, (const int64_t[]){1, 1, 3}, 3, "012");
    char *good = st_list_header(&l, 0, l.n);
    size_t len = strlen(good);
    int n_taken = 0;
    char *bad = malloc(len); /* exactly as long, so that AddressSanitizer sees a read past the end */
    assert_non_null(bad);
    for (size_t i = 0; i < len; i++) {
        for (int c = 0; c < 256; c++) {
            ern_arena a;
            st_tensor *t;
            int32_t n;
            ern_err err;
            memcpy(bad, good, len);
            bad[i] = (char)c;
            ern_arena_open(&a, 0);
            ern_status s = scan(bad, len, 21, &a, &t, &n, &err);
            if (s == ERN_OK) {
                n_taken++;
                assert_int_equal(n, 3);
                assert_tiles(t, n, 8 + len, 8 + len + 21);
            } else {
                assert_int_equal(s, ERN_ERR_FILE);
                assert_null(strchr(err.text, '\n'));
                assert_true(strlen(err.text) > 20);
            }
            ern_arena_close(&a);
        }
    }
    /* Names and metadata may be anything printable; all the rest is fixed but for white space. */
    assert_true(n_taken > (int)len && n_taken < (int)(len * 256 / 3));
    for (size_t cut = 0; cut < len; cut++) {
        ern_arena a;
        st_tensor *t;
        int32_t n;
        ern_err err;
        char *part = malloc(cut ? cut : 1);
        assert_non_null(part);
        memcpy(part, good, cut);
        ern_arena_open(&a, 0);
        size_t closed = strlen(good);
        while (good[closed - 1] == ' ') closed--;
        assert_int_equal(scan(part, cut, 21, &a, &t, &n, &err), cut >= closed ? ERN_OK : ERN_ERR_FILE);
        ern_arena_close(&a);
        free(part);
    }
    free(bad);
    free(good);
    st_list_free(&l);
}

/* Random splices of the alphabet of headers: never a crash, never an acceptance that does not tile. */
static void random_splices(void **state) {
    (void)state;
    static const char *const word[] = {"{",
                                       "}",
                                       "[",
                                       "]",
                                       ",",
                                       ":",
                                       "\"",
                                       "\"a\"",
                                       "\"b\"",
                                       "\"dtype\"",
                                       "\"BF16\"",
                                       "\"shape\"",
                                       "\"data_offsets\"",
                                       "0",
                                       "1",
                                       "2",
                                       "4",
                                       "\\",
                                       "\"__metadata__\"",
                                       " ",
                                       "{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}",
                                       "9007199254740993"};
    unsigned seed = (unsigned)time(NULL);
    print_message("seed %u\n", seed);
    for (int round = 0; round < 50000; round++) {
        char text[512] = "{";
        int n_word = rand_r(&seed) % 24;
        for (int i = 0; i < n_word && strlen(text) < 400; i++)
            strcat(text, word[(size_t)rand_r(&seed) % (sizeof word / sizeof *word)]);
        ern_arena a;
        st_tensor *t;
        int32_t n;
        ern_err err;
        ern_arena_open(&a, 0);
        uint64_t data = (uint64_t)(rand_r(&seed) % 5);
        if (scan(text, strlen(text), data, &a, &t, &n, &err) == ERN_OK)
            assert_tiles(t, n, 8 + strlen(text), 8 + strlen(text) + data);
        ern_arena_close(&a);
    }
}

static ern_status open_bytes(const char *dir, const void *bytes, size_t len, ern_err *err) {
    char path[128];
    snprintf(path, sizeof path, "%s/f.safetensors", dir);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, len, f), len);
    fclose(f);
    ern_arena a;
    st_file file;
    ern_arena_open(&a, 0);
    ern_status s = st_file_open(&file, &a, path, err);
    if (s == ERN_OK) st_file_close(&file);
    ern_arena_close(&a);
    return s;
}

static void lengths(void **state) {
    (void)state;
    char dir[64];
    ern_err err;
    made_dir(dir);
    unsigned char file[64] = {8, 0, 0, 0, 0, 0, 0, 0, '{', '}', ' ', ' ', ' ', ' ', ' ', ' '};
    assert_int_equal(open_bytes(dir, file, 16, &err), ERN_OK);
    for (size_t n = 0; n < 16; n++) {
        assert_int_equal(open_bytes(dir, file, n, &err), ERN_ERR_FILE);
        assert_non_null(strstr(err.text, "f.safetensors"));
    }
    for (int i = 0; i < 8; i++) { /* a length larger than the file, up to 2^64 - 1 */
        file[i] = 0xff;
        assert_int_equal(open_bytes(dir, file, sizeof file, &err), ERN_ERR_FILE);
        assert_non_null(strstr(err.text, "found a length of"));
    }
    memset(file, 0, 8);
    file[0] = 7;
    assert_int_equal(open_bytes(dir, file, sizeof file, &err), ERN_ERR_FILE);
    st_file f;
    ern_arena a;
    ern_arena_open(&a, 0);
    assert_int_equal(st_file_open(&f, &a, dir, &err), ERN_ERR_FILE);
    assert_non_null(strstr(err.text, "not a plain file"));
    char fifo[96];
    snprintf(fifo, sizeof fifo, "%s/fifo", dir); /* must not wait for a writer */
    assert_int_equal(mkfifo(fifo, 0600), 0);
    assert_int_equal(st_file_open(&f, &a, fifo, &err), ERN_ERR_FILE);
    assert_non_null(strstr(err.text, "not a plain file"));
    assert_int_equal(st_file_open(&f, &a, "/tmp/ernest-test-no-such-file", &err), ERN_ERR_FILE);
    ern_arena_close(&a);
    made_dir_remove(dir);
}

/* A file that shrinks between the mapping and the end of the load is noticed, by the size and by every copy. */
static void shrinking(void **state) {
    (void)state;
    char dir[64], path[128], copy[40];
    ern_err err;
    ern_arena a;
    st_file f;
    made_dir(dir);
    snprintf(path, sizeof path, "%s/f.safetensors", dir);
    st_list l = st_list_new();
    st_list_add(&l, "x", "U8", 1, (const int64_t[]){40}, 40, "0123456789012345678901234567890123456789");
    st_list_write(&l, 0, 1, dir, "f.safetensors");
    ern_arena_open(&a, 0);
    assert_int_equal(st_file_open(&f, &a, path, &err), ERN_OK);
    assert_int_equal(st_file_copy(&f, copy, f.tensor[0].from, 40, &err), ERN_OK);
    assert_memory_equal(copy, l.entry[0].data, 40);
    assert_int_equal(st_file_recheck(&f, &err), ERN_OK);
    assert_int_equal(truncate(path, (off_t)f.map.size_bytes - 1), 0);
    assert_int_equal(st_file_copy(&f, copy, f.tensor[0].from, 40, &err), ERN_ERR_FILE);
    assert_non_null(strstr(err.text, "shorter"));
    assert_int_equal(st_file_recheck(&f, &err), ERN_ERR_FILE);
    assert_non_null(strstr(err.text, "changed while it was opened"));
    st_file_close(&f);
    ern_arena_close(&a);
    st_list_free(&l);
    made_dir_remove(dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(taken),          cmocka_unit_test(refused), cmocka_unit_test(every_byte_mutated),
        cmocka_unit_test(random_splices), cmocka_unit_test(lengths), cmocka_unit_test(shrinking),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
