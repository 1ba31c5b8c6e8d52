/* For tests: HTTP over a bare socket, so that odd requests and half-sent ones can be made. Failures print and abort. A
 * signal (libFuzzer's timer sends one every few seconds) interrupts none of these calls. */
#ifndef ERN_TESTS_RAW_HTTP_H
#define ERN_TESTS_RAW_HTTP_H

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

typedef struct raw_answer {
    int status; /* 0: the connection closed without an answer */
    char *head; /* status line and headers, NUL-ended */
    char *body; /* chunked coding undone, NUL-ended */
    size_t len; /* of body */
    bool whole; /* the body ended as announced */
} raw_answer;

static inline void raw_die(const char *what) {
    perror(what);
    abort();
}

static inline int64_t raw_now_ms(void) {
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* True when one of the events is there within timeout_ms. */
static inline bool raw_wait(int fd, short events, int timeout_ms) {
    struct pollfd p = {.fd = fd, .events = events};
    for (int64_t end = raw_now_ms() + timeout_ms, left = timeout_ms; left >= 0; left = end - raw_now_ms()) {
        int n = poll(&p, 1, (int)left);
        if (n >= 0 || errno != EINTR) return n > 0;
    }
    return false;
}

static inline struct sockaddr_in raw_loopback(uint32_t address, int port) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    a.sin_addr.s_addr = htonl(address);
    return a;
}

/* connect(2) through signals: 0 or an errno. One that a signal interrupts goes on by itself; to call it again would be
 * another error. */
static inline int raw_try_connect(int fd, const struct sockaddr_in *to) {
    int why = 0;
    socklen_t len = sizeof why;
    if (connect(fd, (const struct sockaddr *)to, sizeof *to) == 0) return 0;
    if (errno != EINTR) return errno;
    if (!raw_wait(fd, POLLOUT, 60000)) return ETIMEDOUT;
    return getsockopt(fd, SOL_SOCKET, SO_ERROR, &why, &len) == 0 ? why : errno;
}

/* Closed connections keep their port for a minute where the system does not reuse them sooner, and an address has
 * 28,000 of them: when they are used up, the next address of this machine (127.0.0.2, ..) has its own. */
static inline int raw_connect(int port) {
    static _Thread_local uint32_t from = INADDR_LOOPBACK;
    const struct sockaddr_in to = raw_loopback(INADDR_LOOPBACK, port);
    for (int i = 0, one = 1; i < 200; i++, from = from < INADDR_LOOPBACK + 200 ? from + 1 : INADDR_LOOPBACK) {
        const struct sockaddr_in me = raw_loopback(from, 0);
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0) raw_die("socket");
        if (from != INADDR_LOOPBACK && (setsockopt(fd, SOL_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one) != 0 ||
                                        bind(fd, (const struct sockaddr *)&me, sizeof me) != 0))
            raw_die("bind");
        errno = raw_try_connect(fd, &to);
        if (errno == 0) return fd;
        if (errno != EADDRNOTAVAIL) break;
        close(fd);
    }
    raw_die("connect");
    return -1;
}

static inline void raw_send(int fd, const void *data, size_t len) {
    const char *p = data;
    while (len) {
        ssize_t n = send(fd, p, len, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return; /* the server may close early: the answer tells */
        p += n;
        len -= (size_t)n;
    }
}

/* Send a request with a body; `headers` are whole lines each ended by \r\n, or "". */
static inline void raw_request(int fd, const char *method, const char *path, const char *headers, const char *body) {
    char head[4096];
    int n = snprintf(head, sizeof head, "%s %s HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: %zu\r\n\r\n", method,
                     path, headers, strlen(body));
    raw_send(fd, head, (size_t)n);
    raw_send(fd, body, strlen(body));
}

/* One recv of at most timeout_ms: bytes got, 0 at the end, -1 on time-out or reset. */
static inline ssize_t raw_recv(int fd, char *buf, size_t max, int timeout_ms) {
    if (!raw_wait(fd, POLLIN, timeout_ms)) return -1;
    ssize_t n;
    do n = recv(fd, buf, max, 0);
    while (n < 0 && errno == EINTR);
    return n;
}

static inline const char *raw_header(const raw_answer *a, const char *name, char *out, size_t size) {
    size_t n = strlen(name);
    for (const char *p = a->head; p && *p;) {
        const char *end = strstr(p, "\r\n");
        if (!end) end = p + strlen(p);
        if (strncasecmp(p, name, n) == 0 && p[n] == ':') {
            const char *v = p + n + 1;
            while (*v == ' ') v++;
            (void)snprintf(out, size, "%.*s", (int)(end - v), v);
            return out;
        }
        p = *end ? end + 2 : end;
    }
    return NULL;
}

/* Undo the chunked coding in place; true when the last chunk is there. */
static inline bool raw_dechunk(char *body, size_t *len) {
    char *in = body, *out = body, *end = body + *len;
    bool whole = false;
    while (in < end) {
        char *after;
        unsigned long n = strtoul(in, &after, 16);
        if (after == in || after + 2 > end) break;
        after += 2;
        if (n == 0) {
            whole = true;
            break;
        }
        if (after + n + 2 > end) n = (unsigned long)(end - after) > n ? n : (unsigned long)(end - after);
        memmove(out, after, n);
        out += n;
        in = after + n + 2;
    }
    *len = (size_t)(out - body);
    *out = 0;
    return whole;
}

static inline bool raw_complete(const char *got, size_t len) {
    const char *split = strstr(got, "\r\n\r\n");
    if (!split) return false;
    const char *cl = strcasestr(got, "\r\nContent-Length:");
    size_t have = len - (size_t)(split + 4 - got);
    if (cl && cl < split) return have >= strtoul(cl + 17, NULL, 10);
    const char *te = strcasestr(got, "\r\nTransfer-Encoding: chunked");
    if (te && te < split + 2) return len >= 5 && memcmp(got + len - 5, "0\r\n\r\n", 5) == 0;
    return strncmp(got + 9, "204", 3) == 0;
}

/* Read one answer; gives up after timeout_ms without a byte. Free with raw_free. */
static inline raw_answer raw_read(int fd, int timeout_ms) {
    size_t cap = 1 << 16, len = 0;
    char *got = malloc(cap);
    if (!got) raw_die("malloc");
    got[0] = 0;
    while (!raw_complete(got, len)) {
        if (cap - len < 32768) {
            got = realloc(got, cap *= 2);
            if (!got) raw_die("realloc");
        }
        ssize_t n = raw_recv(fd, got + len, cap - len - 1, timeout_ms);
        if (n <= 0) break;
        len += (size_t)n;
        got[len] = 0;
    }
    raw_answer a = {0};
    a.head = got;
    char *split = strstr(got, "\r\n\r\n");
    if (!split || strncmp(got, "HTTP/1.", 7) != 0) {
        a.body = got + len;
        return a;
    }
    a.whole = raw_complete(got, len);
    a.status = atoi(got + 9);
    a.body = split + 4;
    a.len = len - (size_t)(a.body - got);
    split[2] = 0;
    if (strcasestr(a.head, "\r\nTransfer-Encoding: chunked")) a.whole = raw_dechunk(a.body, &a.len);
    return a;
}

static inline void raw_free(raw_answer *a) {
    free(a->head);
    *a = (raw_answer){0};
}

/* One request on a connection of its own. */
static inline raw_answer raw_call(int port, const char *method, const char *path, const char *headers,
                                  const char *body) {
    int fd = raw_connect(port);
    raw_request(fd, method, path, headers, body);
    raw_answer a = raw_read(fd, 120000); /* a sanitizer is slow */
    close(fd);
    return a;
}

#endif
