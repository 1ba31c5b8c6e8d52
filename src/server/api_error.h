/* The one shape of every failure a client sees: {"error":{"message","type","param","code"}}, on every status.
 * FastDeploy answers some statuses with a bare string or {"detail"}; SDKs lose the message of those, so we do not. */
#ifndef ERN_SERVER_API_ERROR_H
#define ERN_SERVER_API_ERROR_H

#include <stdint.h>

#include "base/buf.h"

/* A request's own fault or fate. Plain data. */
typedef struct api_error {
    int status;       /* HTTP status; 0: none */
    const char *type; /* static: invalid_request_error, server_error, ... */
    const char *code; /* static or NULL */
    int64_t retry_ms; /* 429, 503: when to come back; 0: in about a second */
    char param[128];  /* the field at fault; "" writes null */
    char message[480];
} api_error;

/* Fill an error; type follows from the status. Returns false, so that a check can `return api_fail(...)`. */
bool api_fail(api_error *e, int status, const char *code, const char *param, const char *fmt, ...)
    __attribute__((format(printf, 5, 6)));
/* Append the JSON object. */
void api_error_write(ern_buf *out, const api_error *e);
/* The type that belongs to a status. Static. */
const char *api_error_type(int status);

#endif
