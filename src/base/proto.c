/* The protobuf wire format. See proto.h. */
#include "base/proto.h"

#include <string.h>

void ern_proto_read(ern_proto_reader *r, const void *data, size_t len) {
    static const unsigned char none[1];
    r->at = len ? data : none;
    r->end = r->at + len;
}

/* Seven bits a byte, low ones first; at most 10 bytes, of which the tenth carries a single bit. */
static bool take_varint(ern_proto_reader *r, uint64_t *out) {
    uint64_t v = 0;
    for (int i = 0; i < 10 && r->at + i < r->end; i++) {
        unsigned char c = r->at[i];
        if (i == 9 && c > 1) return false;
        v |= (uint64_t)(c & 0x7f) << (7 * i);
        if (c < 0x80) {
            r->at += i + 1;
            *out = v;
            return true;
        }
    }
    return false;
}

/* A little-endian number of n bytes. */
static bool take_fixed(ern_proto_reader *r, int n, uint64_t *out) {
    if (r->end - r->at < n) return false;
    uint64_t v = 0;
    for (int i = 0; i < n; i++) v |= (uint64_t)r->at[i] << (8 * i);
    r->at += n;
    *out = v;
    return true;
}

ern_proto_step ern_proto_next(ern_proto_reader *r, ern_proto_field *out) {
    if (r->at == r->end) return ERN_PROTO_END;
    ern_proto_reader look = *r;
    uint64_t key;
    *out = (ern_proto_field){0};
    if (!take_varint(&look, &key) || key >> 3 == 0 || key >> 3 > 0x1fffffff) return ERN_PROTO_BAD;
    out->number = (uint32_t)(key >> 3);
    bool good = false;
    switch (key & 7) {
    case ERN_WIRE_VARINT: good = take_varint(&look, &out->value); break;
    case ERN_WIRE_64: good = take_fixed(&look, 8, &out->value); break;
    case ERN_WIRE_32: good = take_fixed(&look, 4, &out->value); break;
    case ERN_WIRE_BYTES:
        good = take_varint(&look, &out->value) && out->value <= (uint64_t)(look.end - look.at);
        if (!good) break;
        out->data = look.at;
        out->len = (size_t)out->value;
        look.at += out->len;
        break;
    default: break;
    }
    if (!good) return ERN_PROTO_BAD;
    out->wire = (ern_wire)(key & 7);
    *r = look;
    return ERN_PROTO_FIELD;
}

float ern_proto_float(const ern_proto_field *f) {
    uint32_t u = (uint32_t)f->value;
    float v;
    memcpy(&v, &u, sizeof v);
    return v;
}

static void put_varint(ern_buf *out, uint64_t v) {
    unsigned char b[10];
    size_t n = 0;
    for (; v >= 0x80; v >>= 7) b[n++] = (unsigned char)(v | 0x80);
    b[n++] = (unsigned char)v;
    ern_buf_add(out, b, n);
}

static void put_key(ern_buf *out, uint32_t number, ern_wire wire) {
    put_varint(out, (uint64_t)number << 3 | (uint64_t)wire);
}

void ern_proto_put_varint(ern_buf *out, uint32_t number, uint64_t value) {
    put_key(out, number, ERN_WIRE_VARINT);
    put_varint(out, value);
}

void ern_proto_put_float(ern_buf *out, uint32_t number, float value) {
    uint32_t u;
    memcpy(&u, &value, sizeof u);
    unsigned char b[4] = {(unsigned char)u, (unsigned char)(u >> 8), (unsigned char)(u >> 16),
                          (unsigned char)(u >> 24)};
    put_key(out, number, ERN_WIRE_32);
    ern_buf_add(out, b, sizeof b);
}

void ern_proto_put_bytes(ern_buf *out, uint32_t number, const void *data, size_t len) {
    put_key(out, number, ERN_WIRE_BYTES);
    put_varint(out, len);
    ern_buf_add(out, data, len);
}
