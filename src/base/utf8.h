/* UTF-8, strictly by RFC 3629: no overlong forms, no surrogates, nothing above U+10FFFF. */
#ifndef ERN_BASE_UTF8_H
#define ERN_BASE_UTF8_H

#include <stdbool.h>
#include <stddef.h>

/* Bytes of the valid character that starts at s (1..4), or 0 when there is none within len bytes. */
size_t ern_utf8_len(const char *s, size_t len);
/* True when the len bytes at s are a proper beginning of some character but not yet a whole one (1..3 bytes). */
bool ern_utf8_is_prefix(const char *s, size_t len);
/* True when all of it is valid. */
bool ern_utf8_valid(const char *s, size_t len);

#endif
