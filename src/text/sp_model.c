/* A SentencePiece file as data. See sp_model.h. */
#include "text/sp_model.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/proto.h"
#include "base/utf8.h"

/* ModelProto, ModelProto.SentencePiece, TrainerSpec and NormalizerSpec, as far as we care. */
enum { MODEL_PIECES = 1, MODEL_TRAINER = 2, MODEL_NORMALIZER = 3 };
enum { PIECE_NAME = 1, PIECE_SCORE = 2, PIECE_TYPE = 3 };
enum { TRAINER_MODEL_TYPE = 3, TRAINER_VOCAB_SIZE = 4, TRAINER_BYTE_FALLBACK = 35, MODEL_TYPE_BPE = 2 };
enum { NORMALIZER_NAME = 1, NORMALIZER_DUMMY_PREFIX = 3, NORMALIZER_REMOVE_SPACES = 4, NORMALIZER_ESCAPE_SPACES = 5 };

int sp_piece_byte(const sp_piece *p) {
    static const char hex[] = "0123456789ABCDEF";
    if (p->len != 6 || memcmp(p->name, "<0x", 3) != 0 || p->name[5] != '>') return -1;
    const char *hi = memchr(hex, p->name[3], 16), *lo = memchr(hex, p->name[4], 16);
    return hi && lo ? (int)(hi - hex) * 16 + (int)(lo - hex) : -1;
}

static ern_status read_piece(sp_piece *p, int32_t id, const ern_proto_field *message, const char *what, ern_err *err) {
    ern_proto_reader r;
    ern_proto_field f;
    ern_proto_step step;
    uint64_t type = SP_NORMAL;
    *p = (sp_piece){.name = ""};
    ern_proto_read(&r, message->data, message->len);
    while ((step = ern_proto_next(&r, &f)) == ERN_PROTO_FIELD) {
        if (f.number == PIECE_NAME && f.wire == ERN_WIRE_BYTES) {
            if (f.len > SP_PIECE_BYTES_MAX)
                return ERN_FAIL(err, ERN_ERR_FILE, "%s: piece %d is %zu bytes long; at most %d are allowed", what, id,
                                f.len, SP_PIECE_BYTES_MAX);
            p->name = (const char *)f.data;
            p->len = (uint32_t)f.len;
        } else if (f.number == PIECE_SCORE && f.wire == ERN_WIRE_32) {
            p->score = ern_proto_float(&f);
        } else if (f.number == PIECE_TYPE && f.wire == ERN_WIRE_VARINT) {
            type = f.value;
        }
    }
    if (step == ERN_PROTO_BAD) return ERN_FAIL(err, ERN_ERR_FILE, "%s: piece %d is malformed", what, id);
    if (p->len == 0) return ERN_FAIL(err, ERN_ERR_FILE, "%s: piece %d has no text", what, id);
    if (!ern_utf8_valid(p->name, p->len) || memchr(p->name, 0, p->len))
        return ERN_FAIL(err, ERN_ERR_FILE, "%s: the text of piece %d is not UTF-8", what, id);
    if (!isfinite(p->score)) return ERN_FAIL(err, ERN_ERR_FILE, "%s: the score of piece %d is not finite", what, id);
    if (type < SP_NORMAL || type > SP_BYTE)
        return ERN_FAIL(err, ERN_ERR_FILE, "%s: piece %d has the unknown type %llu", what, id,
                        (unsigned long long)type);
    p->type = (sp_type)type;
    return ERN_OK;
}

typedef struct trainer {
    uint64_t model_type, byte_fallback;
} trainer;

static ern_status read_trainer(trainer *t, const ern_proto_field *message, const char *what, ern_err *err) {
    ern_proto_reader r;
    ern_proto_field f;
    ern_proto_step step;
    ern_proto_read(&r, message->data, message->len);
    while ((step = ern_proto_next(&r, &f)) == ERN_PROTO_FIELD) {
        if (f.wire != ERN_WIRE_VARINT) continue;
        if (f.number == TRAINER_MODEL_TYPE) t->model_type = f.value;
        if (f.number == TRAINER_BYTE_FALLBACK) t->byte_fallback = f.value;
    }
    return step == ERN_PROTO_END ? ERN_OK : ERN_FAIL(err, ERN_ERR_FILE, "%s: its trainer_spec is malformed", what);
}

/* The rules that hold between pieces. */
static ern_status check_pieces(const sp_model *m, const char *what, ern_err *err) {
    bool byte[256] = {false};
    bool space = false;
    int n_byte = 0, n_unknown = 0;
    for (int32_t i = 0; i < m->n; i++) {
        const sp_piece *p = &m->piece[i];
        n_unknown += p->type == SP_UNKNOWN;
        if (p->type == SP_NORMAL && p->len == 3 && memcmp(p->name, "\xe2\x96\x81", 3) == 0) space = true;
        if (p->type != SP_BYTE) continue;
        int b = sp_piece_byte(p);
        if (b < 0 || byte[b])
            return ERN_FAIL(err, ERN_ERR_FILE, "%s: piece %d, \"%.*s\", is no byte piece or a second one for its byte",
                            what, i, (int)p->len, p->name);
        byte[b] = true;
        n_byte++;
    }
    if (n_unknown != 1) return ERN_FAIL(err, ERN_ERR_FILE, "%s: has %d unknown pieces, expected one", what, n_unknown);
    /* Without it a space would become the bytes of its mark, and come back as the mark. */
    if (!space) return ERN_FAIL(err, ERN_ERR_FILE, "%s: has no piece for a space, U+2581", what);
    if (n_byte != 256) return ERN_FAIL(err, ERN_ERR_FILE, "%s: has %d byte pieces, expected 256", what, n_byte);
    return ERN_OK;
}

/* Walk the file once; with m->piece NULL the pieces are only counted. */
static ern_status walk(sp_model *m, trainer *t, const void *data, size_t len, const char *what, ern_err *err) {
    ern_proto_reader r;
    ern_proto_field f;
    ern_proto_step step;
    int32_t n = 0;
    ern_proto_read(&r, data, len);
    while ((step = ern_proto_next(&r, &f)) == ERN_PROTO_FIELD) {
        if (f.wire != ERN_WIRE_BYTES) continue;
        if (f.number == MODEL_PIECES) {
            if (n == SP_PIECES_MAX)
                return ERN_FAIL(err, ERN_ERR_FILE, "%s: has more than %d pieces", what, SP_PIECES_MAX);
            if (m->piece) ERN_TRY(read_piece(&m->piece[n], n, &f, what, err));
            n++;
        } else if (f.number == MODEL_TRAINER && m->piece) {
            ERN_TRY(read_trainer(t, &f, what, err));
        }
    }
    if (step == ERN_PROTO_BAD)
        return ERN_FAIL(err, ERN_ERR_FILE, "%s: not a SentencePiece model, or cut short: malformed at byte %zu of %zu",
                        what, (size_t)(r.at - (const unsigned char *)data), len);
    if (n == 0) return ERN_FAIL(err, ERN_ERR_FILE, "%s: has no pieces; is it a SentencePiece model?", what);
    m->n = n;
    return ERN_OK;
}

ern_status sp_model_read(sp_model *out, const void *data, size_t len, const char *what, ern_err *err) {
    sp_model m = {0};
    trainer t = {.model_type = 1}; /* the format's default: unigram */
    *out = m;
    if (len == 0) return ERN_FAIL(err, ERN_ERR_FILE, "%s: is empty", what);
    ERN_TRY(walk(&m, &t, data, len, what, err));
    m.piece = calloc((size_t)m.n, sizeof *m.piece);
    if (!m.piece) return ERN_FAIL(err, ERN_ERR_MEMORY, "%s: no memory for %d pieces", what, m.n);
    ern_status s = walk(&m, &t, data, len, what, err);
    if (s == ERN_OK && t.model_type != MODEL_TYPE_BPE)
        s = ERN_FAIL(err, ERN_ERR_FILE, "%s: its model_type is %llu, expected 2 (BPE)", what,
                     (unsigned long long)t.model_type);
    if (s == ERN_OK && !t.byte_fallback)
        s = ERN_FAIL(err, ERN_ERR_FILE, "%s: has no byte_fallback, which ERNIE's tokenizers have", what);
    if (s == ERN_OK) s = check_pieces(&m, what, err);
    if (s == ERN_OK)
        *out = m;
    else
        sp_model_free(&m);
    return s;
}

void sp_model_free(sp_model *m) {
    free(m->piece);
    *m = (sp_model){0};
}

void sp_model_write(const sp_model *m, ern_buf *out) {
    ern_buf part;
    ern_buf_init(&part, SP_PIECE_BYTES_MAX + 64);
    for (int32_t i = 0; i < m->n; i++) {
        const sp_piece *p = &m->piece[i];
        ern_buf_clear(&part);
        ern_proto_put_bytes(&part, PIECE_NAME, p->name, p->len);
        ern_proto_put_float(&part, PIECE_SCORE, p->score);
        ern_proto_put_varint(&part, PIECE_TYPE, (uint64_t)p->type);
        ern_proto_put_bytes(out, MODEL_PIECES, part.data, part.len);
        if (part.full) out->full = true;
    }
    ern_buf_clear(&part);
    ern_proto_put_varint(&part, TRAINER_MODEL_TYPE, MODEL_TYPE_BPE);
    ern_proto_put_varint(&part, TRAINER_VOCAB_SIZE, (uint64_t)m->n);
    ern_proto_put_varint(&part, TRAINER_BYTE_FALLBACK, 1);
    ern_proto_put_bytes(out, MODEL_TRAINER, part.data, part.len);
    ern_buf_clear(&part);
    ern_proto_put_bytes(&part, NORMALIZER_NAME, "identity", 8);
    ern_proto_put_varint(&part, NORMALIZER_DUMMY_PREFIX, 0);
    ern_proto_put_varint(&part, NORMALIZER_REMOVE_SPACES, 0);
    ern_proto_put_varint(&part, NORMALIZER_ESCAPE_SPACES, 1);
    ern_proto_put_bytes(out, MODEL_NORMALIZER, part.data, part.len);
    if (part.full) out->full = true;
    ern_buf_free(&part);
}
