/* The terminal. See console.h. */
#include "cli/console.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/os.h"

enum { BAR_CELLS = 24, DRAW_US = 100000, LINE_US = 5000000 };

const char *console_bytes(char out[32], uint64_t bytes) {
    static const char *const unit[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
    double v = (double)bytes;
    int u = 0;
    while (v >= 1024 && u < 4) v /= 1024, u++;
    (void)snprintf(out, 32, u == 0 ? "%.0f %s" : v < 10 ? "%.2f %s" : "%.1f %s", v, unit[u]);
    return out;
}

void console_bar_open(console_bar *b) { *b = (console_bar){.tty = isatty(STDERR_FILENO) == 1}; }

void console_bar_show(console_bar *b, const char *what, uint64_t done_bytes, uint64_t all_bytes) {
    int64_t now = ern_now_us();
    if (strncmp(b->what, what, sizeof b->what - 1) != 0) {
        console_bar_close(b);
        (void)snprintf(b->what, sizeof b->what, "%s", what);
        b->start_us = now;
        b->last_us = b->tty ? 0 : now;
        b->start_bytes = done_bytes;
        b->whole = false;
    }
    if (b->whole) return;
    bool whole = all_bytes > 0 && done_bytes >= all_bytes;
    if (now - b->last_us < (b->tty ? DRAW_US : LINE_US) && !(whole && b->drawn)) return;
    b->whole = whole;
    b->last_us = now;
    double share = all_bytes ? (double)done_bytes / (double)all_bytes : 0;
    if (share > 1) share = 1;
    double seconds = (double)(now - b->start_us) / 1e6;
    double rate = seconds > 0 ? (double)(done_bytes - b->start_bytes) / seconds : 0;
    double left = rate > 0 && all_bytes > done_bytes ? (double)(all_bytes - done_bytes) / rate : 0;
    char bar[BAR_CELLS + 1], size[32], pace[64] = "";
    if (rate > 0) (void)snprintf(pace, sizeof pace, ", %.2f GB/s, %.0f s left", rate / 1e9, left);
    for (int i = 0; i < BAR_CELLS; i++) bar[i] = i < (int)(share * BAR_CELLS) ? '#' : '.';
    bar[BAR_CELLS] = 0;
    (void)fprintf(stderr, "%s%s [%s] %3.0f%% of %s%s%s", b->tty ? "\r" : "", b->what, bar, share * 100,
                  console_bytes(size, all_bytes), pace, b->tty ? "\033[K" : "\n");
    if (whole && b->tty) (void)fputs("\n", stderr);
    b->drawn = !whole;
}

void console_bar_close(console_bar *b) {
    if (b->tty && b->drawn) (void)fputs("\n", stderr);
    b->drawn = false;
    b->what[0] = 0;
}

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number) {
    (void)signal_number;
    interrupted = 1;
}

void console_watch_interrupts(void) {
    struct sigaction on = {.sa_handler = on_interrupt, .sa_flags = (int)SA_RESETHAND};
    (void)sigaction(SIGINT, &on, NULL);
    (void)sigaction(SIGTERM, &on, NULL);
}

bool console_bar_progress(void *ud, const char *what, uint64_t done_bytes, uint64_t all_bytes) {
    console_bar_show(ud, what, done_bytes, all_bytes);
    return !interrupted;
}

void console_lines_open(console_lines *l, volatile sig_atomic_t *stop) {
    *l = (console_lines){.interrupted = stop};
    ern_buf_init(&l->got, CONSOLE_LINE_MAX_BYTES);
}

void console_lines_close(console_lines *l) { ern_buf_free(&l->got); }

/* Read until a line is there, or the last piece of one. SIGINT is blocked but for the mask while it waits, so that one
 * which comes between the prompt and the wait ends the wait. */
static bool lines_read(console_lines *l, const sigset_t *waiting) {
    static char chunk[65536];
    for (size_t seen = l->at; !*l->interrupted;) {
        if (l->got.len > seen && memchr(l->got.data + seen, '\n', l->got.len - seen)) return true;
        if (l->at) ern_buf_drop(&l->got, l->at);
        l->at = 0;
        seen = l->got.len;
        if (seen + sizeof chunk > CONSOLE_LINE_MAX_BYTES) return true;
        struct pollfd p = {.fd = STDIN_FILENO, .events = POLLIN};
        ssize_t n = ppoll(&p, 1, NULL, waiting) < 0 ? -1 : read(STDIN_FILENO, chunk, sizeof chunk);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return seen > 0;
        if (!ern_buf_add(&l->got, chunk, (size_t)n)) return false; /* no memory */
    }
    return false;
}

const char *console_lines_next(console_lines *l, const char *prompt, size_t *len) {
    sigset_t hold, before;
    (void)sigemptyset(&hold);
    (void)sigaddset(&hold, SIGINT);
    (void)pthread_sigmask(SIG_BLOCK, &hold, &before);
    if (prompt) (void)fputs(prompt, stdout), (void)fflush(stdout);
    bool there = lines_read(l, &before);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!there) return NULL;
    char *line = l->got.data + l->at, *end = memchr(line, '\n', l->got.len - l->at);
    size_t n = end ? (size_t)(end - line) : l->got.len - l->at;
    l->at += n + (end != NULL);
    while (n > 0 && line[n - 1] == '\r') n--;
    line[n] = 0;
    *len = n;
    return line;
}

/* Bytes of a control character at text: C0 but newline and tab, DEL, or C1 (U+0080..U+009F). 0: none. */
static size_t control_len(const unsigned char *text, size_t len) {
    if (text[0] < 0x20 || text[0] == 0x7f) return text[0] != '\n' && text[0] != '\t';
    return len > 1 && text[0] == 0xc2 && text[1] >= 0x80 && text[1] <= 0x9f ? 2 : 0;
}

void console_text(const char *text, size_t len, bool tty) {
    size_t from = 0, at = 0;
    while (tty && at < len) {
        size_t n = control_len((const unsigned char *)text + at, len - at);
        if (n) {
            (void)fwrite(text + from, 1, at - from, stdout);
            (void)fputs("\xef\xbf\xbd", stdout);
            from = at + n;
        }
        at += n ? n : 1;
    }
    (void)fwrite(text + from, 1, len - from, stdout);
}
