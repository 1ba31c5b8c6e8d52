/* A client of the OpenAI protocol, for the terminal commands: libcurl underneath, server-sent events split into their
 * data. Owner: the command. One thread. */
#ifndef ERN_CLI_CLIENT_H
#define ERN_CLI_CLIENT_H

#include <signal.h>
#include <stdbool.h>

#include "base/buf.h"
#include "base/jsonr.h"
#include "base/status.h"
#include "cli/options.h"

typedef struct client client;

/* url: with or without the trailing /v1. key: NULL for none. *stop: set to end a transfer early; borrowed. Opens no
 * connection yet. Errors: ERN_ERR_USAGE for an address that is none. */
ERN_MUST_CHECK ern_status client_open(client **out, const char *url, const char *key, volatile sig_atomic_t *stop,
                                      ern_err *err);
void client_close(client *c); /* NULL is fine */
const char *client_url(const client *c);

/* One event of a stream, parsed; borrowed for the call. */
typedef void client_event_fn(void *ud, const json_t *event);
/* POST body to /v1<path> and hand over every event but [DONE]. Errors: ERN_ERR_NET naming the address or giving the
 * server's own message; ERN_ERR_CANCELLED after *stop. */
ERN_MUST_CHECK ern_status client_stream(client *c, const char *path, const ern_buf *body, client_event_fn *fn, void *ud,
                                        ern_err *err);
/* The first model the server lists, into out. */
ERN_MUST_CHECK ern_status client_first_model(client *c, char *out, size_t size, ern_err *err);

/* ---- a server of our own --------------------------------------------------------------------------------------- */

typedef struct child_server {
    int pid; /* 0: none */
    char url[128];
} child_server;

/* True when a model's folder was named, so that a server of our own is wanted. Errors: ERN_ERR_USAGE when --url was
 * given too, or --max-model-len without a folder. */
ERN_MUST_CHECK ern_status child_server_wanted(bool *out, const options *o, ern_err *err);
/* Start `ernest serve` with the options' model, --max-model-len and key (by the environment, which other users cannot
 * read) on a free port of 127.0.0.1, whatever the environment says, and wait until it is ready; it ends with this
 * process. Its load bar and its errors appear on stderr. Errors: ERN_ERR_CANCELLED with *exit_code set when it ended
 * instead (it has said why). */
ERN_MUST_CHECK ern_status child_server_start(child_server *s, const options *o, int *exit_code, ern_err *err);
/* Ask it to end and wait. */
void child_server_stop(child_server *s);

#endif
