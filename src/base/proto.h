/* The protobuf wire format, as much as a SentencePiece file needs: a bounded reader of one message and a writer.
 *
 * The reader never reads past its bytes, allocates nothing and does not recurse: an embedded message is handed out as
 * bytes, and the caller opens another reader on them. Varints longer than 10 bytes, lengths beyond the end, field
 * number 0 and groups (wire types 3 and 4, long deprecated) are malformed. Any thread.
 * Source: the public description of the encoding, protobuf.dev/programming-guides/encoding. */
#ifndef ERN_BASE_PROTO_H
#define ERN_BASE_PROTO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"

typedef enum ern_wire { ERN_WIRE_VARINT = 0, ERN_WIRE_64 = 1, ERN_WIRE_BYTES = 2, ERN_WIRE_32 = 5 } ern_wire;

/* One field as read. `value` holds varints and fixed-width numbers; data and len hold ERN_WIRE_BYTES. */
typedef struct ern_proto_field {
    uint32_t number;
    ern_wire wire;
    uint64_t value;
    const unsigned char *data; /* borrowed from the reader's bytes */
    size_t len;
} ern_proto_field;

typedef struct ern_proto_reader {
    const unsigned char *at, *end;
} ern_proto_reader;

typedef enum ern_proto_step { ERN_PROTO_END, ERN_PROTO_FIELD, ERN_PROTO_BAD } ern_proto_step;

void ern_proto_read(ern_proto_reader *r, const void *data, size_t len);
/* The next field, or the end, or malformed (then the reader stays where the fault is). */
ern_proto_step ern_proto_next(ern_proto_reader *r, ern_proto_field *out);
/* The value of a 32-bit field as a float. */
float ern_proto_float(const ern_proto_field *f);

void ern_proto_put_varint(ern_buf *out, uint32_t number, uint64_t value);
void ern_proto_put_float(ern_buf *out, uint32_t number, float value);
void ern_proto_put_bytes(ern_buf *out, uint32_t number, const void *data, size_t len);

#endif
