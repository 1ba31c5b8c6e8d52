/* Raw bytes on the wire of a server that is still loading: every request it can make out is answered without an engine,
 * so this is the HTTP layer, the routes, the hang-up watcher and the refusals. The server must answer a plain request
 * after every hundredth input. */
#include <stdlib.h>

#include "base/log.h"
#include "raw_http.h"
#include "server/server.h"

static ern_server *server;

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    static const char *const origin[] = {"*"};
    ern_server_options o = {.host = "127.0.0.1",
                            .metrics_port = -1,
                            .max_concurrency = 8,
                            .cors_origin = origin,
                            .n_cors_origin = 1,
                            .body_max_bytes = 4096,
                            .sse_ping_s = 1};
    ern_err err;
    if (ern_log_open(ERN_LOG_OFF, NULL, &err) != ERN_OK || ern_server_open(&server, &o, &err) != ERN_OK) {
        (void)fprintf(stderr, "%s\n", err.text);
        abort();
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int n;
    if (size > 1 << 16) return 0;
    int fd = raw_connect(ern_server_port(server));
    raw_send(fd, data, size);
    (void)shutdown(fd, SHUT_WR);
    char sink[4096];
    while (raw_recv(fd, sink, sizeof sink, 50) > 0) {
    }
    close(fd);
    if (++n % 100) return 0;
    raw_answer a = raw_call(ern_server_port(server), "GET", "/version", "", "");
    if (a.status != 200) {
        (void)fprintf(stderr, "GET /version: status %d, \"%s\"\n", a.status, a.head);
        abort();
    }
    raw_free(&a);
    return 0;
}
