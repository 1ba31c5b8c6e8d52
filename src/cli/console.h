/* The terminal: a bar for long work, lines that are typed, sizes as people read them. Owner: the caller's stack. One
 * thread. */
#ifndef ERN_CLI_CONSOLE_H
#define ERN_CLI_CONSOLE_H

#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"

/* Progress of long work on stderr: on a terminal one line redrawn ten times a second, else a line every 5 s. */
typedef struct console_bar {
    bool tty;
    bool drawn; /* a line is begun that close must end */
    bool whole; /* this part is done and said so */
    char what[64];
    int64_t start_us, last_us;
    uint64_t start_bytes; /* done when this part began, so that the rate counts what was really moved */
} console_bar;

void console_bar_open(console_bar *b);
void console_bar_show(console_bar *b, const char *what, uint64_t done_bytes, uint64_t all_bytes);
/* End the line, if one is being drawn. */
void console_bar_close(console_bar *b);

/* Long work that Ctrl-C (or SIGTERM) shall stop: from here on the first one is only noted, for console_bar_progress to
 * stop the work, which then takes away what it made; a second one ends the process where it is. */
void console_watch_interrupts(void);
/* An ern_progress_fn, ud a console_bar: show, and go on until interrupted. */
bool console_bar_progress(void *ud, const char *what, uint64_t done_bytes, uint64_t all_bytes);

/* The lines of standard input, for a talk whose prompt Ctrl-C leaves. */
typedef struct console_lines {
    ern_buf got; /* got.data[at..] is not taken */
    size_t at;
    volatile sig_atomic_t *interrupted; /* borrowed; the caller's handler of SIGINT sets it */
} console_lines;

enum { CONSOLE_LINE_MAX_BYTES = 16 << 20 }; /* a longer line is taken in pieces */

void console_lines_open(console_lines *l, volatile sig_atomic_t *stop);
/* Print the prompt (NULL: none) and wait for a line: *len bytes and a NUL, without its end, valid until the next call.
 * NULL at the end of input and when *stop is set, at whatever moment since it was last cleared. */
const char *console_lines_next(console_lines *l, const char *prompt, size_t *len);
void console_lines_close(console_lines *l);

/* Write a model's text (whole UTF-8 characters) to stdout. On a terminal control characters but newline and tab become
 * U+FFFD: what a model says must not move the cursor, set the title or answer for the terminal. */
void console_text(const char *text, size_t len, bool tty);

/* "1.25 GiB", "512 MiB", "17 bytes" into out; returns out. */
const char *console_bytes(char out[32], uint64_t bytes);

#endif
