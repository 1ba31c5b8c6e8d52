/* libsentencepiece behind C: load a model from memory, encode. Private to room text; nothing else sees the library.
 * No C++ exception leaves it. Owner: the tokenizer. Thread: an open one may be used from any thread. */
#ifndef ERN_TEXT_SP_SHIM_H
#define ERN_TEXT_SP_SHIM_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sp_shim sp_shim;

/* Load a serialized ModelProto. NULL on failure, with the library's words in why. */
sp_shim *sp_shim_open(const char *proto, size_t len, char *why, size_t why_size);
void sp_shim_close(sp_shim *s); /* NULL is fine */

/* Take n ids. */
typedef void sp_shim_fn(void *ud, const int *id, size_t n);
/* Encode valid UTF-8 and hand all ids to fn at once. False when the library failed or was out of memory. */
bool sp_shim_encode(const sp_shim *s, const char *text, size_t len, sp_shim_fn *fn, void *ud);

#ifdef __cplusplus
}
#endif

#endif
