/* The door of `server`: the street. HTTP, the OpenAI protocol with FastDeploy's additions, SSE, metrics.
 *
 * The port listens at once and answers 503 with progress until an engine is attached. Hides: libmicrohttpd, validation,
 * framing, connections. Never sees a tensor.
 * Owner: the cli. Threads of its own: HTTP (epoll), front (parse, validate, tokenize), events (engine to sockets). */
#ifndef ERN_SERVER_SERVER_H
#define ERN_SERVER_SERVER_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "engine/engine.h"
#include "text/text.h"

typedef struct ern_server ern_server;

enum { ERN_SERVER_CONNECTIONS_MAX = 20000 }; /* and so requests at once, whatever max_concurrency allows */

typedef struct ern_server_options {
    const char *host;           /* address to bind */
    int port;                   /* 0: any free one, see ern_server_port */
    int metrics_port;           /* -1: /metrics is on the API port */
    const char *const *api_key; /* [n_api_key] accepted bearer keys; none: open */
    int n_api_key;
    const char *const *cors_origin; /* [n_cors_origin] allowed origins ("*": any); none: off */
    int n_cors_origin;
    const char *served_model_name; /* NULL: any model name is accepted and model_path is shown */
    const char *model_path;
    int max_concurrency;             /* requests at once; above: 429 */
    int max_logprobs;                /* top_logprobs limit, 0..20 */
    ern_logprobs_mode logprobs_mode; /* what logprobs are taken from, of replies and of prompts */
    bool enable_logprob;             /* false: logprobs are refused (FastDeploy's default); ernest's default is true */
    bool strict_fastdeploy; /* FastDeploy's behaviour where it differs from OpenAI's (docs/api.md lists where) */
    bool split_reasoning;   /* fill reasoning_content (on when the chat format reasons) */
    bool parse_tools;
    bool share_cache;        /* requests of different API keys may find one another's cached prompts */
    bool debug_endpoints;    /* answer /debug/kv; else it is 404 */
    int sse_ping_s;          /* comment after so many silent seconds (15); 0: never */
    int drain_s;             /* --timeout-graceful-shutdown, default 30 */
    int64_t seed;            /* engine-level seed: requests without one draw from it */
    uint64_t body_max_bytes; /* 8 MiB */
    int max_stop,
        max_stop_bytes; /* 16, 1024; under strict_fastdeploy FD_MAX_STOP_SEQS_NUM, FD_STOP_SEQS_MAX_LEN tokens */
    int max_stop_tokens;
    const char *config_info_json; /* body of /config-info: the options in force; borrowed */
} ern_server_options;

/* Listen. Errors: ERN_ERR_NET naming the address, the port and, when it is taken, --port. */
ERN_MUST_CHECK ern_status ern_server_open(ern_server **out, const ern_server_options *o, ern_err *err);
/* The port in use. */
int ern_server_port(const ern_server *s);
/* While loading: what /health's 503 says. Any thread. */
void ern_server_loading(ern_server *s, const char *what, uint64_t done_bytes, uint64_t all_bytes);
/* Ready: from here on requests are served. Everything is borrowed until close. */
ERN_MUST_CHECK ern_status ern_server_attach(ern_server *s, ern_engine *e, const ern_tokenizer *t, ern_chat_format f,
                                            const ern_config *c, ern_err *err);
/* Stop accepting work (503), let running and queued requests finish for at most drain_s, end the rest with an error
 * event. Returns when all are done. */
void ern_server_drain(ern_server *s);
/* Make a drain in progress end now (second SIGTERM). Async-signal unsafe; any thread. */
void ern_server_hurry(ern_server *s);
/* docs/api.md: the reference page printed from the validator's table. */
void ern_server_write_docs(ern_buf *out);
void ern_server_close(ern_server *s); /* NULL is fine; before the engine is closed */

#endif
