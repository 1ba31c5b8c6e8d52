/* Reading JSON with jansson, made strict: depth bounded before parsing, duplicate keys refused, NUL allowed in strings,
 * errors as one sentence with line and column. The caller owns the result (json_decref). Any thread. */
#ifndef ERN_BASE_JSONR_H
#define ERN_BASE_JSONR_H

#include <jansson.h>
#include <stddef.h>

#include "base/status.h"

/* Parse len bytes; nesting deeper than max_depth (1..512) is refused. `what` names the source in the error text. */
ERN_MUST_CHECK ern_status ern_json_parse(json_t **out, const char *text, size_t len, int max_depth, const char *what,
                                         ern_err *err);
/* Read and parse a file of at most limit_bytes. */
ERN_MUST_CHECK ern_status ern_json_parse_file(json_t **out, const char *path, size_t limit_bytes, int max_depth,
                                              ern_err *err);

#endif
