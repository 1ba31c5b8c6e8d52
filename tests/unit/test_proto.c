/* The protobuf wire format: what is written reads back; what is malformed is refused without reading past its bytes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "base/proto.h"
#include "text_fixture.h"

static void round_trip(void **state) {
    (void)state;
    static const uint64_t value[] = {0, 1, 127, 128, 300, 1ull << 35, UINT64_MAX - 1, UINT64_MAX};
    ern_buf b;
    ern_proto_reader r;
    ern_proto_field f;
    ern_buf_init(&b, 1 << 16);
    for (size_t i = 0; i < sizeof value / sizeof value[0]; i++) {
        ern_proto_put_varint(&b, (uint32_t)i + 1, value[i]);
        ern_proto_put_float(&b, 1000, -1.5f);
        ern_proto_put_bytes(&b, 0x1fffffff, "abc", i % 4);
    }
    ern_proto_read(&r, b.data, b.len);
    for (size_t i = 0; i < sizeof value / sizeof value[0]; i++) {
        assert_int_equal(ern_proto_next(&r, &f), ERN_PROTO_FIELD);
        assert_true(f.number == i + 1 && f.wire == ERN_WIRE_VARINT && f.value == value[i]);
        assert_int_equal(ern_proto_next(&r, &f), ERN_PROTO_FIELD);
        assert_true(f.number == 1000 && f.wire == ERN_WIRE_32 && ern_proto_float(&f) == -1.5f);
        assert_int_equal(ern_proto_next(&r, &f), ERN_PROTO_FIELD);
        assert_true(f.number == 0x1fffffff && f.wire == ERN_WIRE_BYTES && f.len == i % 4);
        assert_memory_equal(f.data, "abc", f.len);
    }
    assert_int_equal(ern_proto_next(&r, &f), ERN_PROTO_END);
    assert_int_equal(ern_proto_next(&r, &f), ERN_PROTO_END);
    ern_buf_free(&b);
}

/* Read all fields of exactly these bytes, from an allocation that ends with them, so that asan sees a read beyond. */
static ern_proto_step read_all(const char *bytes, size_t len, int *n_field) {
    char *copy = malloc(len ? len : 1);
    assert_non_null(copy);
    memcpy(copy, bytes, len);
    ern_proto_reader r;
    ern_proto_field f;
    ern_proto_step step;
    ern_proto_read(&r, copy, len);
    for (*n_field = 0; (step = ern_proto_next(&r, &f)) == ERN_PROTO_FIELD; ++*n_field)
        assert_true(f.number > 0 && (f.wire != ERN_WIRE_BYTES || (f.data >= (unsigned char *)copy && f.len <= len)));
    free(copy);
    return step;
}

static void malformed(void **state) {
    (void)state;
    static const struct {
        const char *bytes;
        size_t len;
        ern_proto_step want;
    } list[] = {
        {"", 0, ERN_PROTO_END},
        {"\x08", 1, ERN_PROTO_BAD},                                              /* no value */
        {"\x08\x80", 2, ERN_PROTO_BAD},                                          /* half a varint */
        {"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 11, ERN_PROTO_END},     /* 64 bits of it */
        {"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02", 11, ERN_PROTO_BAD},     /* 65 bits */
        {"\x08\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00", 12, ERN_PROTO_BAD}, /* 11 bytes */
        {"\x0a\x03"
         "ab",
         4, ERN_PROTO_BAD}, /* one byte short */
        {"\x0a\x02"
         "ab",
         4, ERN_PROTO_END},
        {"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 11, ERN_PROTO_BAD}, /* 2^64-1 bytes */
        {"\x0d\x01\x02\x03", 4, ERN_PROTO_BAD},                              /* 3 of 4 bytes */
        {"\x09\x01\x02\x03\x04\x05\x06\x07", 8, ERN_PROTO_BAD},              /* 7 of 8 bytes */
        {"\x0b\x0c", 2, ERN_PROTO_BAD},                                      /* a group */
        {"\x0f\x00", 2, ERN_PROTO_BAD},                                      /* wire type 7 */
        {"\x00\x00", 2, ERN_PROTO_BAD},                                      /* field 0 */
        {"\x80\x80\x80\x80\x10\x00", 6, ERN_PROTO_BAD},                      /* field 2^29 */
    };
    int n;
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++)
        assert_int_equal(read_all(list[i].bytes, list[i].len, &n), list[i].want);
}

static void random_bytes(void **state) {
    (void)state;
    text_random r = text_random_start("proto random_bytes", 8);
    int n, n_good = 0;
    for (int i = 0; i < 200000; i++) {
        char bytes[24];
        size_t len = text_random_below(&r, sizeof bytes);
        for (size_t k = 0; k < len; k++) bytes[k] = (char)text_random_below(&r, text_random_below(&r, 2) ? 256 : 24);
        n_good += read_all(bytes, len, &n) == ERN_PROTO_END && n > 1;
    }
    assert_true(n_good > 1000); /* else the bytes never got past the first key */
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(round_trip), cmocka_unit_test(malformed),
                                       cmocka_unit_test(random_bytes)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
