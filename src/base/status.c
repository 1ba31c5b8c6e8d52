/* Status codes, the error record, and assertions. See status.h. */
#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>

ern_status ern_err_set(ern_err *err, ern_code code, const char *file, int line, const char *fmt, ...) {
    if (!err) return code;
    err->code = code;
    err->file = file;
    err->line = line;
    va_list ap;
    va_start(ap, fmt);
    (void)vsnprintf(err->text, sizeof err->text, fmt, ap);
    va_end(ap);
    return code;
}

void ern_assert_fail(const char *expr, const char *file, int line) {
    fprintf(stderr, "ernest: internal error: %s is false at %s:%d; this is a bug, please report it\n", expr, file,
            line);
    abort();
}

int ern_exit_code(ern_status status) {
    switch (status) {
    case ERN_OK: return 0;
    case ERN_ERR_USAGE:
    case ERN_ERR_FILE:
    case ERN_ERR_INPUT:
    case ERN_ERR_UNSUPPORTED: return 2;
    case ERN_ERR_MEMORY:
    case ERN_ERR_DEVICE: return 3;
    default: return 1;
    }
}
