/* HTTP as the server sees it: whole requests in, whole replies or event streams out, and one word when a client is
 * gone.
 *
 * Hides libmicrohttpd, its thread, suspension, and its traps: hang-ups of suspended connections (a watcher with its own
 * epoll over dup'ed sockets), the abort when a daemon stops with suspended connections (the drain order in http_close),
 * suspended connections that never time out (the watcher's sweep), a stream whose client left and a hang-up whose edge
 * was missed, which both would keep their socket until the idle timeout (stream_read, sweep_peer).
 * Threads: one HTTP thread (epoll) and one watcher. Owner: server.c; a request is freed when both sides let go. */
#ifndef ERN_SERVER_HTTP_H
#define ERN_SERVER_HTTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct http_server http_server;

/* One request. Everything is NUL-ended and lives until http_release (kept) or the end of on_request. */
typedef struct ern_http_request {
    const char *method, *path; /* path without the query */
    const char *body;          /* body_len bytes and a NUL; "" when there is none */
    size_t body_len;
    int64_t begin_us; /* headers were there */
    int route;        /* the server's own, for metrics */
} ern_http_request;

/* What the server is told. None may block. */
typedef struct http_handlers {
    void *ud;
    /* Headers are there, the body is not: add headers of the reply, refuse early with http_reply. HTTP thread. */
    void (*on_headers)(void *ud, ern_http_request *r);
    /* The whole request is there: http_reply at once, or http_keep and answer later from any thread. HTTP thread. */
    void (*on_request)(void *ud, ern_http_request *r);
    /* A kept request's client is gone, or was given up because it took nothing for idle_s (stalled): at most once, any
     * thread, never after http_release. Runs with the request locked: no http_* call from inside. */
    void (*on_gone)(void *ud, void *job, bool stalled);
    /* A kept stream's unsent bytes fell below the low mark, or are all sent. Same rules as on_gone. */
    void (*on_drained)(void *ud, void *job);
    /* A request ended with this status, for metrics. */
    void (*on_done)(void *ud, const ern_http_request *r, int status);
} http_handlers;

typedef struct http_options {
    const char *host;
    int port;
    size_t body_max_bytes;       /* one body */
    size_t body_total_max_bytes; /* all bodies at once */
    int idle_s;                  /* silence on a connection, a reader that takes nothing: closed */
    int receive_s;               /* a request that is not whole after so long: closed */
    http_handlers on;
} http_options;

enum {
    HTTP_HEADER_MAX_BYTES = 32 * 1024, /* request line and headers; above: 431 */
    HTTP_VALUE_MAX_BYTES = 4096,       /* one header's value in a reply */
    HTTP_LOW_BYTES = 64 * 1024,        /* a stream with fewer unsent bytes is not stalling */
    /* Hard end of a stream's buffer. Parking ends it far below: HTTP_LOW_BYTES and the ERN_EVENT_CREDIT events that may
     * still come, which is about 140 KiB for plain text (300 bytes an event) and 600 KiB with 20 logprobs a token (2
     * KiB an event); choices share the credit, each has 5/8 of it. */
    HTTP_OUT_MAX_BYTES = 64 * 1024 * 1024,
};

/* Listen and start. Errors: ERN_ERR_NET naming address and port. */
ERN_MUST_CHECK ern_status http_open(http_server **out, const http_options *o, ern_err *err);
int http_port(const http_server *h);
/* Requests being answered right now. Any thread. */
int http_in_flight(http_server *h);
/* Stop listening, end what is left, join. Every kept request must have been released. */
void http_close(http_server *h);

/* A request header's value, or NULL. Only in on_headers and on_request. */
const char *http_header(const ern_http_request *r, const char *name);
/* Add a header to the reply, before it begins; the name is static, the value copied. One above HTTP_VALUE_MAX_BYTES is
 * left out, never cut. At most 12. */
void http_add_header(ern_http_request *r, const char *name, const char *value);
/* Answer with a whole body, copied. Any thread. Ignored when the client is gone. */
void http_reply(ern_http_request *r, int status, const char *content_type, const void *body, size_t len);

/* Keep the request beyond on_request; `job` comes back in on_gone and on_drained. */
void http_keep(ern_http_request *r, void *job);
/* Change the job of a kept request; on_gone is called at once if the client left before. */
void http_set_job(ern_http_request *r, void *job);
bool http_is_gone(const ern_http_request *r);
/* Begin a 200 event stream with the headers of docs/api.md; write parts; end it. Any thread. */
void http_stream_begin(ern_http_request *r, int ping_s);
/* False when the client is gone or the buffer's hard end was met (the stream is then dead). */
bool http_stream_write(ern_http_request *r, const void *data, size_t len);
size_t http_stream_unsent(ern_http_request *r);
void http_stream_end(ern_http_request *r);
/* Let go of a kept request; no callback follows. A request released unanswered is closed. */
void http_release(ern_http_request *r);

#endif
