/* A SentencePiece file as data: read by our own bounded reader, checked whole, and written again for the library, which
 * therefore never sees a byte of the file that was not checked (CVE-2026-1260 and its kin: faults.md, "SentencePiece
 * model"). Private to room text. Owner: the tokenizer, while it opens. Any thread.
 * Source: the fields' numbers are those of sentencepiece_model.proto. */
#ifndef ERN_TEXT_SP_MODEL_H
#define ERN_TEXT_SP_MODEL_H

#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/status.h"

enum { SP_PIECES_MAX = 1 << 20, SP_PIECE_BYTES_MAX = 1024 };

typedef enum sp_type {
    SP_NORMAL = 1,
    SP_UNKNOWN = 2,
    SP_CONTROL = 3,
    SP_USER_DEFINED = 4,
    SP_UNUSED = 5,
    SP_BYTE = 6,
} sp_type;

typedef struct sp_piece {
    const char *name; /* len bytes of valid UTF-8 without NUL, borrowed from the file */
    uint32_t len;     /* 1..SP_PIECE_BYTES_MAX */
    float score;      /* finite; greater merges first */
    sp_type type;
} sp_piece;

typedef struct sp_model {
    sp_piece *piece; /* [n] by id; free() */
    int32_t n;
} sp_model;

/* Read and check a ModelProto: BPE with byte fallback, all 256 byte pieces, one unknown piece, a space. Names may still
 * repeat: the tokenizer's table of names finds that. `what` names the file. Errors: ERN_ERR_FILE, ERN_ERR_MEMORY. */
ERN_MUST_CHECK ern_status sp_model_read(sp_model *out, const void *data, size_t len, const char *what, ern_err *err);
void sp_model_free(sp_model *m);

/* Write it as a ModelProto that holds the pieces and ERNIE's fixed rules: BPE, byte fallback, identity normaliser, no
 * dummy prefix, no white space removed (docs/model.md 5.1). Sets out->full when it does not fit. */
void sp_model_write(const sp_model *m, ern_buf *out);

/* The byte of a byte piece ("<0x0A>"), or -1. */
int sp_piece_byte(const sp_piece *p);

#endif
