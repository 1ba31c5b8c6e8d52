/* The HTTP layer with handlers of its own: who is cut off for taking nothing, and who is not; calls among signals. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <cmocka.h>

#include "base/os.h"
#include "raw_http.h"
#include "server/http.h"

enum { IDLE_S = 4, STREAM_BYTES = 1 << 20 };

/* What became of one stream, by its path /0 and /1. */
static struct { atomic_bool over, stalled; } fate[2];
static _Atomic(ern_http_request *) kept[2];

static void on_headers(void *ud, ern_http_request *r) { (void)ud, (void)r; }

static void on_request(void *ud, ern_http_request *r) {
    (void)ud;
    static char part[4096];
    if (strcmp(r->path, "/plain") == 0) {
        http_reply(r, 200, "text/plain", "plain", 5);
        return;
    }
    int i = r->path[1] - '0';
    if (i != 0 && i != 1) abort();
    memset(part, 'x', sizeof part);
    kept[i] = r;
    http_keep(r, &fate[i]);
    http_stream_begin(r, 0);
    for (int sent = 0; sent < STREAM_BYTES; sent += (int)sizeof part)
        if (!http_stream_write(r, part, sizeof part)) abort();
    http_stream_end(r);
}

static void on_gone(void *ud, void *job, bool stalled) {
    (void)ud;
    int i = job == &fate[1];
    atomic_store(&fate[i].stalled, stalled);
    atomic_store(&fate[i].over, true);
}

static void on_drained(void *ud, void *job) { (void)ud, (void)job; }
static void on_done(void *ud, const ern_http_request *r, int status) { (void)ud, (void)r, (void)status; }

static void nap_ms(int ms) { (void)nanosleep(&(struct timespec){.tv_nsec = ms * 1000000}, NULL); }

static int ask(int port, const char *path) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), small = 4096;
    assert_true(fd >= 0);
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    assert_int_equal(connect(fd, (struct sockaddr *)&a, sizeof a), 0);
    raw_request(fd, "GET", path, "Connection: close\r\n", "");
    return fd;
}

/* Two clients of a stream that sockets cannot hold: one takes a kilobyte four times a second, at which the kernel asks
 * us for more every ten seconds or so, and gets all of it; the other takes nothing and is cut off. */
static void steady_readers_are_not_stalled(void **state) {
    (void)state;
    http_options o = {.host = "127.0.0.1",
                      .body_max_bytes = 4096,
                      .body_total_max_bytes = 65536,
                      .idle_s = IDLE_S,
                      .receive_s = 60,
                      .on = {NULL, on_headers, on_request, on_gone, on_drained, on_done}};
    http_server *h;
    ern_err err;
    if (http_open(&h, &o, &err) != ERN_OK) fail_msg("%s", err.text);
    int steady = ask(http_port(h), "/0"), silent = ask(http_port(h), "/1");
    char some[65536];
    size_t got = 0;
    int64_t begin = ern_now_us();
    while (ern_now_us() - begin < 5 * IDLE_S * 1000000) {
        ssize_t n = raw_recv(steady, some, 1024, 60000);
        if (n <= 0) fail_msg("the steady reader was cut off after %zu bytes", got);
        got += (size_t)n;
        nap_ms(250);
    }
    while (!atomic_load(&fate[1].over)) nap_ms(10);
    assert_true(atomic_load(&fate[1].stalled));
    assert_false(atomic_load(&fate[0].over));
    assert_true(got < STREAM_BYTES / 2); /* or it was no slow reader */
    for (ssize_t n; (n = raw_recv(steady, some, sizeof some, 60000)) > 0;) got += (size_t)n;
    assert_true(got > STREAM_BYTES);
    close(steady);
    close(silent);
    for (int i = 0; i < 2; i++) http_release(kept[i]);
    while (http_in_flight(h) > 0) nap_ms(10);
    http_close(h);
}

static void on_alarm(int sig) { (void)sig; }

/* A signal now and then, as a fuzzer's timer or a profiler sends, breaks no call, on neither side of the socket. */
static void calls_outlive_signals(void **state) {
    (void)state;
    http_options o = {.host = "127.0.0.1",
                      .body_max_bytes = 4096,
                      .body_total_max_bytes = 65536,
                      .idle_s = 60,
                      .receive_s = 60,
                      .on = {NULL, on_headers, on_request, on_gone, on_drained, on_done}};
    http_server *h;
    ern_err err;
    if (http_open(&h, &o, &err) != ERN_OK) fail_msg("%s", err.text);
    struct sigaction alarmed = {.sa_handler = on_alarm}, before; /* no SA_RESTART: calls are interrupted */
    assert_int_equal(sigaction(SIGALRM, &alarmed, &before), 0);
    struct itimerval each = {{.tv_usec = 500}, {.tv_usec = 500}}, none = {0};
    assert_int_equal(setitimer(ITIMER_REAL, &each, NULL), 0);
    for (int i = 0; i < 1000; i++) {
        raw_answer a = raw_call(http_port(h), "GET", "/plain", "", "");
        if (a.status != 200 || !a.whole || strcmp(a.body, "plain") != 0)
            fail_msg("call %d: status %d, \"%s\"", i, a.status, a.head);
        raw_free(&a);
    }
    assert_int_equal(setitimer(ITIMER_REAL, &none, NULL), 0);
    assert_int_equal(sigaction(SIGALRM, &before, NULL), 0);
    http_close(h);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(calls_outlive_signals),
                                       cmocka_unit_test(steady_readers_are_not_stalled)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
