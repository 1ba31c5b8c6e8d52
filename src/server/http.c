/* libmicrohttpd behind http.h.
 *
 * Locks: http_server.lock guards the lists and the watcher's epoll set; held.lock one request. Order: server, request.
 * A connection is suspended exactly while held.suspended is set, which only happens under held.lock. */
#include "server/http.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/sockios.h>
#include <microhttpd.h>
#include <netdb.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/os.h"
#include "server/api_error.h"
#include "server/server.h"

enum { HEADERS_MAX = 12, TICK_MS = 250, SEND_BUFFER_BYTES = 64 * 1024 };

typedef enum reply_kind { REPLY_NONE, REPLY_WHOLE, REPLY_STREAM } reply_kind;

/* One TCP connection, to bound the time a client may take to send a request. */
typedef struct peer {
    struct peer *next, *prev;
    int fd;
    int64_t since_us; /* opened, or the last request ended; 0 while a request is being answered */
    int64_t left_us;  /* since_us of the wait in which a sweep found that the client has left; 0: none did */
} peer;

typedef struct held {
    ern_http_request pub;
    http_server *server;
    struct MHD_Connection *conn;
    peer *peer;
    struct held *next, *prev; /* list of kept requests, under server->lock */
    bool listed;
    int watch_fd; /* dup of the socket in the watcher's epoll, -1: none */
    bool half_closed;
    char path[512];
    ern_buf body;
    size_t body_counted; /* bytes taken from the server's total */
    size_t discarded;
    bool closes, dispatched; /* closes: nothing more is read from this connection */
    atomic_int refs;
    atomic_bool gone;

    pthread_mutex_t lock; /* everything below */
    reply_kind reply;
    int status;
    char content_type[64];
    struct {
        const char *name; /* static */
        char *value;
    } header[HEADERS_MAX];
    int n_header;
    ern_buf out; /* out.data[out_at..] is unsent */
    size_t out_at;
    bool kept, ended, completed, suspended;
    void *job;
    int ping_s;
    int64_t write_us, drain_us; /* last time bytes came in, went out (towards the client, as far as can be seen) */
    int outq;                   /* bytes the kernel still held at the last sweep */
} held;

struct http_server {
    http_options o;
    struct MHD_Daemon *daemon;
    int listen_fd, port;
    atomic_int n_in_flight;
    atomic_size_t body_total;
    atomic_bool closing;
    pthread_mutex_t lock;
    held *kept;
    peer *peers;
    int epoll_fd, wake_fd;
    pthread_t watcher;
};

static held *held_of(const ern_http_request *r) { return (held *)(uintptr_t)r; }

/* The path of a request target. Proxies send the absolute form (http://host/path), which a server must accept. */
static const char *target_path(const char *url) {
    size_t scheme = strncasecmp(url, "http://", 7) == 0 ? 7 : strncasecmp(url, "https://", 8) == 0 ? 8 : 0;
    if (!scheme) return url;
    const char *path = strchr(url + scheme, '/');
    return path ? path : "/";
}

/* ---- requests -------------------------------------------------------------------------------------------------- */

static held *held_new(http_server *h, struct MHD_Connection *conn, const char *url, const char *method) {
    held *r = calloc(1, sizeof *r);
    if (!r) return NULL;
    r->server = h;
    r->conn = conn;
    r->watch_fd = -1;
    atomic_init(&r->refs, 1);
    pthread_mutex_init(&r->lock, NULL);
    ern_buf_init(&r->body, h->o.body_max_bytes);
    ern_buf_init(&r->out, HTTP_OUT_MAX_BYTES);
    (void)snprintf(r->path, sizeof r->path, "%s", target_path(url));
    r->pub.path = r->path;
    r->pub.method = method;
    r->pub.body = "";
    r->pub.begin_us = ern_now_us();
    r->pub.route = -1;
    atomic_fetch_add(&h->n_in_flight, 1);
    return r;
}

static void held_unref(held *r) {
    if (atomic_fetch_sub(&r->refs, 1) != 1) return;
    atomic_fetch_sub(&r->server->body_total, r->body_counted);
    ern_buf_free(&r->body);
    ern_buf_free(&r->out);
    for (int i = 0; i < r->n_header; i++) free(r->header[i].value);
    pthread_mutex_destroy(&r->lock);
    atomic_fetch_sub(&r->server->n_in_flight, 1);
    free(r);
}

/* Let the HTTP thread look at the connection again. Locked. */
static void wake(held *r) {
    if (!r->suspended) return;
    r->suspended = false;
    MHD_resume_connection(r->conn);
}

/* The client is gone, or we give it up because it takes nothing (stalled). Locked. */
static void give_up(held *r, bool stalled) {
    if (atomic_exchange(&r->gone, true)) return;
    if (r->job) r->server->o.on.on_gone(r->server->o.on.ud, r->job, stalled);
    wake(r);
}

static void set_gone(held *r) { give_up(r, false); }

const char *http_header(const ern_http_request *r, const char *name) {
    return MHD_lookup_connection_value(held_of(r)->conn, MHD_HEADER_KIND, name);
}

void http_add_header(ern_http_request *pub, const char *name, const char *value) {
    held *r = held_of(pub);
    pthread_mutex_lock(&r->lock);
    if (r->reply == REPLY_NONE && r->n_header < HEADERS_MAX && strlen(value) <= HTTP_VALUE_MAX_BYTES) {
        char *copy = strdup(value);
        if (copy) {
            r->header[r->n_header].name = name;
            r->header[r->n_header++].value = copy;
        }
    }
    pthread_mutex_unlock(&r->lock);
}

void http_reply(ern_http_request *pub, int status, const char *content_type, const void *body, size_t len) {
    held *r = held_of(pub);
    pthread_mutex_lock(&r->lock);
    if (r->reply == REPLY_NONE && !r->completed) {
        /* A whole body was bounded by whoever made it; the stream's limit is not its limit. */
        r->out.limit = len;
        if (ern_buf_add(&r->out, body, len)) {
            r->reply = REPLY_WHOLE;
            r->status = status;
            r->drain_us = ern_now_us();
            (void)snprintf(r->content_type, sizeof r->content_type, "%s", content_type ? content_type : "");
            r->ended = true;
            wake(r);
        } else {
            set_gone(r); /* no memory for the answer: close rather than answer half of it */
        }
    }
    pthread_mutex_unlock(&r->lock);
}

void http_keep(ern_http_request *pub, void *job) {
    held *r = held_of(pub);
    atomic_fetch_add(&r->refs, 1);
    pthread_mutex_lock(&r->lock);
    r->kept = true;
    r->job = job;
    pthread_mutex_unlock(&r->lock);
}

void http_set_job(ern_http_request *pub, void *job) {
    held *r = held_of(pub);
    pthread_mutex_lock(&r->lock);
    r->job = job;
    if (job && (atomic_load(&r->gone) || r->completed)) r->server->o.on.on_gone(r->server->o.on.ud, job, false);
    pthread_mutex_unlock(&r->lock);
}

bool http_is_gone(const ern_http_request *pub) { return atomic_load(&held_of(pub)->gone); }

void http_stream_begin(ern_http_request *pub, int ping_s) {
    held *r = held_of(pub);
    pthread_mutex_lock(&r->lock);
    if (r->reply == REPLY_NONE && !r->completed) {
        r->reply = REPLY_STREAM;
        r->status = 200;
        r->ping_s = ping_s;
        r->write_us = r->drain_us = ern_now_us();
        wake(r);
    }
    pthread_mutex_unlock(&r->lock);
}

/* Append to the stream. Locked. */
static bool stream_add(held *r, const void *data, size_t len) {
    if (r->reply != REPLY_STREAM || r->ended || r->completed || atomic_load(&r->gone)) return false;
    if (r->out_at == r->out.len) {
        ern_buf_clear(&r->out);
        r->out_at = 0;
        r->drain_us = ern_now_us(); /* the stall clock starts when there is something to take */
    }
    if (!ern_buf_add(&r->out, data, len)) {
        set_gone(r);
        return false;
    }
    r->write_us = ern_now_us();
    wake(r);
    return true;
}

bool http_stream_write(ern_http_request *pub, const void *data, size_t len) {
    held *r = held_of(pub);
    pthread_mutex_lock(&r->lock);
    bool ok = stream_add(r, data, len);
    pthread_mutex_unlock(&r->lock);
    return ok;
}

size_t http_stream_unsent(ern_http_request *pub) {
    held *r = held_of(pub);
    pthread_mutex_lock(&r->lock);
    size_t n = r->out.len - r->out_at;
    pthread_mutex_unlock(&r->lock);
    return n;
}

void http_stream_end(ern_http_request *pub) {
    held *r = held_of(pub);
    pthread_mutex_lock(&r->lock);
    r->ended = true;
    wake(r);
    pthread_mutex_unlock(&r->lock);
}

void http_release(ern_http_request *pub) {
    held *r = held_of(pub);
    pthread_mutex_lock(&r->lock);
    r->job = NULL;
    r->kept = false;
    if (r->reply == REPLY_NONE) set_gone(r);
    if (r->reply == REPLY_STREAM && !r->ended) set_gone(r);
    pthread_mutex_unlock(&r->lock);
    held_unref(r);
}

/* ---- the HTTP thread ------------------------------------------------------------------------------------------- */

static ssize_t stream_read(void *cls, uint64_t pos, char *buf, size_t max) {
    (void)pos;
    held *r = cls;
    pthread_mutex_lock(&r->lock);
    ssize_t got;
    size_t unsent = r->out.len - r->out_at;
    if (atomic_load(&r->gone) && r->peer) {
        /* Told of an error here, the library may keep the dead connection until its idle timeout; a send that fails it
         * cleans up after at once. The socket is shut first, so the end of stream is never seen by anyone. */
        (void)shutdown(r->peer->fd, SHUT_RDWR);
        got = MHD_CONTENT_READER_END_OF_STREAM;
    } else if (atomic_load(&r->gone)) {
        got = MHD_CONTENT_READER_END_WITH_ERROR;
    } else if (unsent) {
        size_t n = unsent < max ? unsent : max;
        memcpy(buf, r->out.data + r->out_at, n);
        r->out_at += n;
        r->drain_us = ern_now_us();
        bool low = unsent >= HTTP_LOW_BYTES && unsent - n < HTTP_LOW_BYTES;
        if (r->out_at >= HTTP_LOW_BYTES || r->out_at == r->out.len) {
            ern_buf_drop(&r->out, r->out_at);
            r->out_at = 0;
        }
        if (low && r->job) r->server->o.on.on_drained(r->server->o.on.ud, r->job);
        got = (ssize_t)n;
    } else if (r->ended) {
        got = MHD_CONTENT_READER_END_OF_STREAM;
    } else {
        r->suspended = true;
        MHD_suspend_connection(r->conn);
        got = 0;
    }
    pthread_mutex_unlock(&r->lock);
    return got;
}

/* Queue the reply that is there. */
static enum MHD_Result queue_reply(held *r) {
    struct MHD_Response *m;
    if (r->reply == REPLY_STREAM) {
        m = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 16 * 1024, stream_read, r, NULL);
    } else {
        m = MHD_create_response_from_buffer(r->out.len, r->out.data ? r->out.data : (char *)(uintptr_t) "",
                                            MHD_RESPMEM_PERSISTENT);
    }
    if (!m) return MHD_NO;
    if (r->reply == REPLY_STREAM) {
        (void)MHD_add_response_header(m, "Content-Type", "text/event-stream; charset=utf-8");
        (void)MHD_add_response_header(m, "Cache-Control", "no-cache");
        (void)MHD_add_response_header(m, "X-Accel-Buffering", "no");
    } else if (r->content_type[0]) {
        (void)MHD_add_response_header(m, "Content-Type", r->content_type);
    }
    for (int i = 0; i < r->n_header; i++) (void)MHD_add_response_header(m, r->header[i].name, r->header[i].value);
    if (r->closes || atomic_load(&r->server->closing)) (void)MHD_add_response_header(m, "Connection", "close");
    enum MHD_Result ok = MHD_queue_response(r->conn, (unsigned)r->status, m);
    MHD_destroy_response(m);
    return ok;
}

static void refuse(held *r, int status, const char *code, const char *message) {
    api_error e;
    (void)api_fail(&e, status, code, NULL, "%s", message);
    ern_buf b;
    ern_buf_init(&b, 4096);
    api_error_write(&b, &e);
    http_reply(&r->pub, status, "application/json", b.data, b.len);
    ern_buf_free(&b);
}

static void refuse_large(held *r) {
    r->closes = true;
    char text[128];
    (void)snprintf(text, sizeof text, "the request body is larger than the limit of %zu bytes",
                   r->server->o.body_max_bytes);
    refuse(r, 413, "request_too_large", text);
}

typedef struct framing {
    const char *length, *coding; /* Content-Length, Transfer-Encoding */
    const char *fault;
    bool encoded; /* a Content-Encoding that changes the body */
} framing;

static enum MHD_Result read_framing(void *cls, enum MHD_ValueKind kind, const char *name, const char *value) {
    (void)kind;
    framing *f = cls;
    if (!value) value = "";
    if (strcasecmp(name, "Content-Length") == 0) {
        if (f->length && strcmp(f->length, value) != 0) f->fault = "two different Content-Length headers";
        f->length = value;
    } else if (strcasecmp(name, "Transfer-Encoding") == 0) {
        if (f->coding || strcasecmp(value, "chunked") != 0) f->fault = "a Transfer-Encoding that is not chunked";
        f->coding = value;
    } else if (strcasecmp(name, "Content-Encoding") == 0) {
        f->encoded |= value[0] && strcasecmp(value, "identity") != 0;
    }
    return MHD_YES;
}

/* Where the body ends must not be open to two readings, or a proxy in front of us sees other requests than we do (RFC
 * 9112 6.3): such a request is refused and nothing after it is read. True when it was refused. */
static bool refuse_framing(held *r) {
    framing f = {0};
    (void)MHD_get_connection_values(r->conn, MHD_HEADER_KIND, read_framing, &f);
    if (!f.fault && f.length && f.coding) f.fault = "both Content-Length and Transfer-Encoding";
    if (f.fault) {
        char text[160];
        (void)snprintf(text, sizeof text, "the request has %s; send one Content-Length, or chunked alone", f.fault);
        r->closes = true;
        refuse(r, 400, "bad_framing", text);
    } else if (f.encoded) {
        refuse(r, 415, "unsupported_content_encoding",
               "the request body has a Content-Encoding and is read as it is only; send it without one");
    }
    return f.fault != NULL;
}

/* The first call for a request: headers only. True when an answer should leave before the body comes. */
static bool begin(held *r) {
    http_server *h = r->server;
    h->o.on.on_headers(h->o.on.ud, &r->pub);
    if (refuse_framing(r)) return true;
    const char *text = http_header(&r->pub, "Content-Length");
    unsigned long long length = text ? strtoull(text, NULL, 10) : 0;
    if (length > h->o.body_max_bytes && r->reply == REPLY_NONE) refuse_large(r);
    if (r->reply == REPLY_NONE) return false;
    /* Reading on keeps a client that is still sending from losing the answer to a reset; not when it waits for our
     * leave, nor when far too much is announced. */
    return http_header(&r->pub, "Expect") != NULL || length > 4 * (unsigned long long)h->o.body_max_bytes;
}

/* A piece of the body. False: close. */
static bool take_body(held *r, const char *data, size_t n) {
    http_server *h = r->server;
    if (r->reply != REPLY_NONE) {
        r->discarded += n;
        return r->discarded <= 4 * h->o.body_max_bytes;
    }
    if (n > h->o.body_max_bytes - r->body.len) {
        refuse_large(r);
        ern_buf_free(&r->body);
        return true;
    }
    r->body_counted += n;
    if (atomic_fetch_add(&h->body_total, n) + n > h->o.body_total_max_bytes || !ern_buf_add(&r->body, data, n)) {
        http_add_header(&r->pub, "Retry-After", "1");
        refuse(r, 503, "overloaded", "too many request bodies are being received at once; try again");
        ern_buf_free(&r->body);
    }
    return true;
}

/* Put a request that waits for its answer under the watcher's eyes. The library's own clock is stopped meanwhile: it
 * only sees when the kernel takes bytes from us, which for a slow reader comes in rare large steps. */
static void watch_begin(held *r) {
    http_server *h = r->server;
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(r->conn, MHD_CONNECTION_INFO_CONNECTION_FD);
    pthread_mutex_lock(&h->lock);
    if (!r->listed) {
        r->listed = true;
        r->next = h->kept;
        r->prev = NULL;
        if (h->kept) h->kept->prev = r;
        h->kept = r;
        r->watch_fd = info ? dup(info->connect_fd) : -1;
        struct epoll_event ev = {.events = EPOLLRDHUP, .data.ptr = r};
        if (r->watch_fd >= 0 && epoll_ctl(h->epoll_fd, EPOLL_CTL_ADD, r->watch_fd, &ev) != 0) {
            close(r->watch_fd);
            r->watch_fd = -1;
        }
    }
    bool watched = r->watch_fd >= 0;
    pthread_mutex_unlock(&h->lock);
    if (watched) (void)MHD_set_connection_option(r->conn, MHD_CONNECTION_OPTION_TIMEOUT, 0u);
}

static void watch_end(held *r) {
    http_server *h = r->server;
    if (r->listed) (void)MHD_set_connection_option(r->conn, MHD_CONNECTION_OPTION_TIMEOUT, (unsigned)h->o.idle_s);
    pthread_mutex_lock(&h->lock);
    if (r->listed) {
        r->listed = false;
        if (r->prev)
            r->prev->next = r->next;
        else
            h->kept = r->next;
        if (r->next) r->next->prev = r->prev;
        if (r->watch_fd >= 0) {
            /* Leaves the set explicitly: the socket itself is still open elsewhere. */
            (void)epoll_ctl(h->epoll_fd, EPOLL_CTL_DEL, r->watch_fd, NULL);
            close(r->watch_fd);
        }
        r->watch_fd = -1;
    }
    pthread_mutex_unlock(&h->lock);
}

/* The reply is there: queue it; it is not: wait for it; it never will be: close. */
static enum MHD_Result answer_or_wait(held *r) {
    pthread_mutex_lock(&r->lock);
    bool ready = r->reply != REPLY_NONE;
    bool lost = !ready && (atomic_load(&r->gone) || !r->kept || atomic_load(&r->server->closing));
    if (!ready && !lost) {
        r->suspended = true;
        MHD_suspend_connection(r->conn);
    }
    pthread_mutex_unlock(&r->lock);
    /* Unlocked: the library calls stream_read with its response locked, so we must not ask for that lock under ours.
     * A reply that has begun is not changed any more but for the stream's bytes, which are not read here. */
    if (ready) return queue_reply(r);
    return lost ? MHD_NO : MHD_YES;
}

static enum MHD_Result on_access(void *cls, struct MHD_Connection *conn, const char *url, const char *method,
                                 const char *version, const char *data, size_t *n, void **con_cls) {
    (void)version;
    http_server *h = cls;
    held *r = *con_cls;
    if (!r) {
        r = held_new(h, conn, url, method);
        if (!r) return MHD_NO;
        *con_cls = r;
        const union MHD_ConnectionInfo *info = MHD_get_connection_info(conn, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
        r->peer = info ? info->socket_context : NULL;
        return begin(r) ? answer_or_wait(r) : MHD_YES;
    }
    if (*n) {
        bool ok = take_body(r, data, *n);
        *n = 0;
        return ok ? MHD_YES : MHD_NO;
    }
    if (!r->dispatched) {
        r->dispatched = true;
        if (r->peer) {
            pthread_mutex_lock(&h->lock);
            r->peer->since_us = 0;
            pthread_mutex_unlock(&h->lock);
        }
        if (r->reply == REPLY_NONE) {
            if (r->body.data) r->pub.body = r->body.data;
            r->pub.body_len = r->body.len;
            h->o.on.on_request(h->o.on.ud, &r->pub);
            pthread_mutex_lock(&r->lock);
            bool kept = r->kept; /* another thread may be answering already */
            pthread_mutex_unlock(&r->lock);
            if (kept) watch_begin(r);
        }
    }
    return answer_or_wait(r);
}

static void on_completed(void *cls, struct MHD_Connection *conn, void **con_cls, enum MHD_RequestTerminationCode why) {
    (void)conn;
    (void)why;
    http_server *h = cls;
    held *r = *con_cls;
    if (!r) return;
    *con_cls = NULL;
    watch_end(r);
    pthread_mutex_lock(&r->lock);
    r->completed = true;
    r->suspended = false;
    if (!r->ended) set_gone(r);
    int status = r->reply == REPLY_NONE ? 499 : r->status;
    pthread_mutex_unlock(&r->lock);
    if (r->peer) {
        pthread_mutex_lock(&h->lock);
        r->peer->since_us = ern_now_us();
        pthread_mutex_unlock(&h->lock);
    }
    h->o.on.on_done(h->o.on.ud, &r->pub, status);
    held_unref(r);
}

static void on_connection(void *cls, struct MHD_Connection *conn, void **ctx,
                          enum MHD_ConnectionNotificationCode what) {
    http_server *h = cls;
    if (what == MHD_CONNECTION_NOTIFY_STARTED) {
        const union MHD_ConnectionInfo *info = MHD_get_connection_info(conn, MHD_CONNECTION_INFO_CONNECTION_FD);
        peer *p = info ? calloc(1, sizeof *p) : NULL;
        if (!p) return;
        p->fd = info->connect_fd;
        p->since_us = ern_now_us();
        int bytes = SEND_BUFFER_BYTES; /* what the kernel may hold beyond our own cap */
        (void)setsockopt(p->fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
        pthread_mutex_lock(&h->lock);
        p->next = h->peers;
        if (h->peers) h->peers->prev = p;
        h->peers = p;
        pthread_mutex_unlock(&h->lock);
        *ctx = p;
    } else if (*ctx) {
        peer *p = *ctx;
        *ctx = NULL;
        pthread_mutex_lock(&h->lock);
        if (p->prev)
            p->prev->next = p->next;
        else
            h->peers = p->next;
        if (p->next) p->next->prev = p->prev;
        pthread_mutex_unlock(&h->lock);
        free(p);
    }
}

/* ---- the watcher ----------------------------------------------------------------------------------------------- */

static void watch_event(http_server *h, held *r, uint32_t events) {
    pthread_mutex_lock(&r->lock);
    bool lost = (events & (EPOLLHUP | EPOLLERR)) != 0;
    if (!lost && (events & EPOLLRDHUP)) {
        /* The client will send no more. Before an answer began that is a hang-up; a stream is tried with a comment:
         * a client that is really gone answers with a reset. */
        r->half_closed = true;
        if (r->reply == REPLY_STREAM)
            (void)stream_add(r, ": ping\n\n", 8);
        else
            lost = r->reply == REPLY_NONE;
    }
    if (lost) set_gone(r);
    pthread_mutex_unlock(&r->lock);
    if (r->watch_fd < 0) return;
    struct epoll_event ev = {.events = 0, .data.ptr = r};
    if (lost)
        (void)epoll_ctl(h->epoll_fd, EPOLL_CTL_DEL, r->watch_fd, NULL);
    else
        (void)epoll_ctl(h->epoll_fd, EPOLL_CTL_MOD, r->watch_fd, &ev);
}

/* True when the client has closed its side and nothing that it sent is unread. */
static bool has_left(int fd) {
    char c;
    return recv(fd, &c, 1, MSG_PEEK | MSG_DONTWAIT) == 0;
}

/* A connection between requests. The library is told of a hang-up once, by an edge, and now and then that falls into a
 * moment when it does not listen (2 in 1,000 hang-ups); it would keep the socket until the time for a request is over.
 * So each sweep looks itself, and closes what had left by the sweep before already: between the two the library has
 * read a last request, if there was one. */
static void sweep_peer(http_server *h, peer *p, int64_t now) {
    if (!p->since_us) return;
    bool late = now - p->since_us > (int64_t)h->o.receive_s * 1000000, left = has_left(p->fd);
    if (late || (left && p->left_us == p->since_us)) (void)shutdown(p->fd, SHUT_RDWR);
    p->left_us = left ? p->since_us : 0;
}

/* True when the client has taken nothing for too long. Our own buffer moves only when the kernel has room for a large
 * piece; a client that reads slowly but steadily shows in between by what the kernel still holds. Locked. */
static bool sweep_stalled(http_server *h, held *r, int64_t now) {
    int outq = r->outq;
    if (r->reply == REPLY_NONE || r->completed || r->out.len == r->out_at) return false;
    if (r->watch_fd >= 0 && ioctl(r->watch_fd, SIOCOUTQ, &outq) == 0 && outq != r->outq) {
        r->outq = outq;
        r->drain_us = now;
    }
    return now - r->drain_us > (int64_t)h->o.idle_s * 1000000;
}

/* Once a second: silent streams get a comment, stalled readers and endless senders are cut off. Server locked. */
static void sweep(http_server *h, int64_t now) {
    for (held *r = h->kept; r; r = r->next) {
        pthread_mutex_lock(&r->lock);
        if (r->reply == REPLY_STREAM && !r->ended && !r->completed && !atomic_load(&r->gone)) {
            if (r->ping_s > 0 && now - r->write_us >= (int64_t)r->ping_s * 1000000) {
                (void)stream_add(r, ": ping\n\n", 8);
            }
        }
        bool stalled = sweep_stalled(h, r, now);
        if (stalled) give_up(r, true);
        pthread_mutex_unlock(&r->lock);
        if (stalled && r->watch_fd >= 0) (void)shutdown(r->watch_fd, SHUT_RDWR);
    }
    for (peer *p = h->peers; p; p = p->next) sweep_peer(h, p, now);
}

static void *watcher_main(void *arg) {
    http_server *h = arg;
    int64_t swept_us = 0;
    while (!atomic_load(&h->closing)) {
        struct epoll_event ev[64];
        /* Waits without the lock, then asks again under it, so that every pointer it gets belongs to a live request. */
        (void)epoll_wait(h->epoll_fd, ev, 1, TICK_MS);
        pthread_mutex_lock(&h->lock);
        int n = epoll_wait(h->epoll_fd, ev, 64, 0);
        for (int i = 0; i < n; i++) {
            if (ev[i].data.ptr) watch_event(h, ev[i].data.ptr, ev[i].events);
        }
        int64_t now = ern_now_us();
        if (now - swept_us >= 1000000) {
            swept_us = now;
            sweep(h, now);
        }
        pthread_mutex_unlock(&h->lock);
    }
    return NULL;
}

/* ---- open and close -------------------------------------------------------------------------------------------- */

static ern_status listen_on(http_server *h, ern_err *err) {
    char port[16];
    (void)snprintf(port, sizeof port, "%d", h->o.port);
    struct addrinfo hint = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV}, *found = NULL;
    int rc = getaddrinfo(h->o.host, port, &hint, &found);
    if (rc != 0)
        return ERN_FAIL(err, ERN_ERR_NET, "cannot listen on %s: %s; give an address of this machine with --host",
                        h->o.host, gai_strerror(rc));
    int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int one = 1;
    bool ok = fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0 &&
              bind(fd, found->ai_addr, found->ai_addrlen) == 0 && listen(fd, 1024) == 0;
    int why = errno;
    freeaddrinfo(found);
    struct sockaddr_storage got;
    socklen_t len = sizeof got;
    if (ok) ok = getsockname(fd, (struct sockaddr *)&got, &len) == 0;
    if (!ok) {
        if (fd >= 0) close(fd);
        if (why == EADDRINUSE)
            return ERN_FAIL(err, ERN_ERR_NET,
                            "cannot listen on %s port %d: the port is taken; choose another with --port", h->o.host,
                            h->o.port);
        return ERN_FAIL(err, ERN_ERR_NET, "cannot listen on %s port %d: %s; check --host and --port", h->o.host,
                        h->o.port, strerror(why));
    }
    h->listen_fd = fd;
    if (got.ss_family == AF_INET6) {
        struct sockaddr_in6 in6;
        memcpy(&in6, &got, sizeof in6);
        h->port = ntohs(in6.sin6_port);
    } else {
        struct sockaddr_in in4;
        memcpy(&in4, &got, sizeof in4);
        h->port = ntohs(in4.sin_port);
    }
    return ERN_OK;
}

/* Half the descriptors may be connections: each one being answered needs a second for the watcher. */
static unsigned connection_limit(void) {
    struct rlimit lim;
    if (getrlimit(RLIMIT_NOFILE, &lim) != 0 || lim.rlim_cur == RLIM_INFINITY) return ERN_SERVER_CONNECTIONS_MAX;
    rlim_t n = lim.rlim_cur > 128 ? (lim.rlim_cur - 64) / 2 : lim.rlim_cur / 4;
    return n > ERN_SERVER_CONNECTIONS_MAX ? ERN_SERVER_CONNECTIONS_MAX : n < 4 ? 4 : (unsigned)n;
}

static void http_free(http_server *h) {
    if (h->epoll_fd >= 0) close(h->epoll_fd);
    if (h->wake_fd >= 0) close(h->wake_fd);
    pthread_mutex_destroy(&h->lock);
    free(h);
}

ern_status http_open(http_server **out, const http_options *o, ern_err *err) {
    *out = NULL;
    http_server *h = calloc(1, sizeof *h);
    if (!h) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the HTTP server");
    h->o = *o;
    pthread_mutex_init(&h->lock, NULL);
    h->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    h->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = NULL};
    if (h->epoll_fd < 0 || h->wake_fd < 0 || epoll_ctl(h->epoll_fd, EPOLL_CTL_ADD, h->wake_fd, &ev) != 0) {
        http_free(h);
        return ERN_FAIL(err, ERN_ERR_NET, "cannot make an epoll set: %s; raise the limit of open files",
                        strerror(errno));
    }
    ern_status s = listen_on(h, err);
    if (s != ERN_OK) {
        http_free(h);
        return s;
    }
    h->daemon = MHD_start_daemon(MHD_USE_EPOLL_INTERNAL_THREAD | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_TURBO, 0, NULL,
                                 NULL, on_access, h, MHD_OPTION_LISTEN_SOCKET, h->listen_fd,
                                 MHD_OPTION_STRICT_FOR_CLIENT, 1, MHD_OPTION_CONNECTION_LIMIT, connection_limit(),
                                 MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)HTTP_HEADER_MAX_BYTES,
                                 MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)o->idle_s, MHD_OPTION_NOTIFY_COMPLETED,
                                 on_completed, h, MHD_OPTION_NOTIFY_CONNECTION, on_connection, h, MHD_OPTION_END);
    if (!h->daemon) {
        close(h->listen_fd);
        http_free(h);
        return ERN_FAIL(err, ERN_ERR_NET, "the HTTP library did not start: %s", strerror(errno));
    }
    if (pthread_create(&h->watcher, NULL, watcher_main, h) != 0) {
        MHD_stop_daemon(h->daemon);
        http_free(h);
        return ERN_FAIL(err, ERN_ERR_MEMORY, "cannot start a thread for the HTTP server");
    }
    *out = h;
    return ERN_OK;
}

int http_port(const http_server *h) { return h->port; }
int http_in_flight(http_server *h) { return atomic_load(&h->n_in_flight); }

void http_close(http_server *h) {
    if (!h) return;
    /* The order matters: the library aborts the process when it stops with a suspended connection. */
    MHD_socket fd = MHD_quiesce_daemon(h->daemon);
    atomic_store(&h->closing, true);
    uint64_t one = 1;
    (void)!write(h->wake_fd, &one, sizeof one);
    (void)pthread_join(h->watcher, NULL);
    pthread_mutex_lock(&h->lock);
    for (held *r = h->kept; r; r = r->next) {
        pthread_mutex_lock(&r->lock);
        if (!r->ended) set_gone(r);
        wake(r);
        pthread_mutex_unlock(&r->lock);
    }
    pthread_mutex_unlock(&h->lock);
    MHD_stop_daemon(h->daemon);
    if (fd != MHD_INVALID_SOCKET) close(fd);
    http_free(h);
}
