/* The tensors of a quantized checkpoint and where they lie: private to quant_write.c and quant_list.c.
 *
 * An item is one weight: a vector, a table, a router, or a linear, which becomes two tensors when it is quantized. */
#ifndef ERN_MODEL_QUANT_LIST_H
#define ERN_MODEL_QUANT_LIST_H

#include "model/quant_write.h"

enum { QUANT_NAME_BYTES = 96 };

typedef struct quant_item {
    char name[QUANT_NAME_BYTES];
    const char *made; /* whose values are made weights: the name, or for a tied head the embedding's */
    ern_linear w;     /* the source [n_out, n_in]; data NULL: made weights */
    ern_quant as;
    bool f32;      /* stored plain as f32, else as bf16 */
    int32_t n_dim; /* 1: [n_in] */
    int32_t file;
    uint64_t from, scale_from; /* in the file's data */
} quant_item;

typedef struct quant_list {
    quant_item *item; /* [n] in the order of the model */
    int32_t n, cap, n_file;
    bool full; /* no memory */
} quant_list;

/* Bytes of what is stored: tiles or plain numbers, and scales (0 when plain). */
uint64_t quant_item_bytes(const quant_item *t);
uint64_t quant_item_scale_bytes(const quant_item *t);
/* "", "_scale" or "_scale_inv": what follows the name of the scales' tensor. */
const char *quant_item_tail(const quant_item *t);

/* Every tensor, cut into files. Errors: ERN_ERR_MEMORY. quant_list_free is due in any case. */
ERN_MUST_CHECK ern_status quant_list_make(quant_list *out, const quant_source *from, const quant_writing *w,
                                          ern_err *err);
void quant_list_free(quant_list *l);
/* A file's length, header and padding: 8 bytes, then JSON filled up with spaces to a multiple of 64. */
void quant_list_header(const quant_list *l, int32_t file, ern_buf *out);

#endif
