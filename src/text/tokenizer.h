/* What the files of room text know of an open tokenizer. Private to the room; others see text.h. */
#ifndef ERN_TEXT_TOKENIZER_H
#define ERN_TEXT_TOKENIZER_H

#include "text/pair_set.h"
#include "text/sp_shim.h"
#include "text/text.h"
#include "text/token_table.h"

struct ern_tokenizer {
    token_table table;
    pair_set pairs; /* characters that a piece joins */
    size_t longest; /* characters of the longest piece: n characters are at least n / longest tokens */
    sp_shim *sp;    /* knows no special piece by its text: they were retyped as control */
    int32_t bos, eos;
};

#endif
