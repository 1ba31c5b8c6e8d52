/* Error objects. See api_error.h. */
#include "server/api_error.h"

#include <stdarg.h>
#include <stdio.h>

#include "base/jsonw.h"

const char *api_error_type(int status) {
    switch (status) {
    case 401: return "authentication_error";
    case 403: return "permission_error";
    case 404: return "not_found_error";
    case 408:
    case 504: return "timeout_error";
    case 429: return "rate_limit_error";
    case 503: return "service_unavailable_error";
    default: return status >= 500 ? "server_error" : "invalid_request_error";
    }
}

bool api_fail(api_error *e, int status, const char *code, const char *param, const char *fmt, ...) {
    e->status = status;
    e->type = api_error_type(status);
    e->code = code;
    e->retry_ms = 0;
    (void)snprintf(e->param, sizeof e->param, "%s", param ? param : "");
    va_list ap;
    va_start(ap, fmt);
    (void)vsnprintf(e->message, sizeof e->message, fmt, ap);
    va_end(ap);
    return false;
}

void api_error_write(ern_buf *out, const api_error *e) {
    ern_jsonw w;
    ern_jsonw_init(&w, out);
    ern_jsonw_object(&w);
    ern_jsonw_key(&w, "error");
    ern_jsonw_object(&w);
    ern_jsonw_key(&w, "message");
    ern_jsonw_text(&w, e->message);
    ern_jsonw_key(&w, "type");
    ern_jsonw_text(&w, e->type);
    ern_jsonw_key(&w, "param");
    ern_jsonw_text(&w, e->param[0] ? e->param : NULL);
    ern_jsonw_key(&w, "code");
    ern_jsonw_text(&w, e->code);
    ern_jsonw_object_end(&w);
    ern_jsonw_object_end(&w);
}
