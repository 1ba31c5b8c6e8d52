/* What a model's text may do to a terminal: nothing. Lines from standard input, and the signal that ends them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cli/console.h"

/* What console_text leaves on stdout. */
static void written(const char *text, size_t len, bool tty, char *out, size_t size) {
    (void)fflush(stdout);
    FILE *f = tmpfile();
    assert_non_null(f);
    int kept = dup(STDOUT_FILENO);
    assert_true(kept >= 0 && dup2(fileno(f), STDOUT_FILENO) >= 0);
    console_text(text, len, tty);
    (void)fflush(stdout);
    (void)dup2(kept, STDOUT_FILENO);
    (void)close(kept);
    rewind(f);
    out[fread(out, 1, size - 1, f)] = 0;
    (void)fclose(f);
}

static void controls(void **state) {
    (void)state;
    static const struct {
        const char *in, *out;
    } row[] = {
        {"plain\n\ttext \xe4\xbd\xa0\xc3\xa9", "plain\n\ttext \xe4\xbd\xa0\xc3\xa9"},
        {"\033[2Jgone", "\xef\xbf\xbd[2Jgone"},
        {"a\rb\b", "a\xef\xbf\xbd"
                   "b\xef\xbf\xbd"},
        {"\xc2\x9b"
         "31m\x7f",
         "\xef\xbf\xbd"
         "31m\xef\xbf\xbd"},
        {"\xc2\xa0", "\xc2\xa0"}, /* a no-break space is text */
        {"", ""},
    };
    char got[128];
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        written(row[i].in, strlen(row[i].in), true, got, sizeof got);
        assert_string_equal(got, row[i].out);
        written(row[i].in, strlen(row[i].in), false, got, sizeof got); /* a file or a pipe gets the bytes as they are */
        assert_string_equal(got, row[i].in);
    }
}

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number) {
    (void)signal_number;
    interrupted = 1;
}

static void lines_in_any_pieces(void **state) {
    (void)state;
    static const char text[] = "one\r\n\ntwo \xc3\xa9\nlast";
    int in[2], kept = dup(STDIN_FILENO);
    assert_true(kept >= 0);
    for (size_t cut = 1; cut < sizeof text; cut++) {
        assert_int_equal(pipe(in), 0);
        assert_true(dup2(in[0], STDIN_FILENO) >= 0);
        console_lines l;
        size_t n = 9;
        console_lines_open(&l, &interrupted);
        assert_int_equal(write(in[1], text, cut), cut);
        if (cut > 5) { /* what is there is taken before more is waited for */
            assert_string_equal(console_lines_next(&l, NULL, &n), "one");
            assert_int_equal(n, 3);
        }
        assert_int_equal(write(in[1], text + cut, sizeof text - 1 - cut), sizeof text - 1 - cut);
        close(in[1]);
        if (cut <= 5) assert_string_equal(console_lines_next(&l, NULL, &n), "one");
        assert_string_equal(console_lines_next(&l, NULL, &n), "");
        assert_int_equal(n, 0);
        assert_string_equal(console_lines_next(&l, NULL, &n), "two \xc3\xa9");
        assert_string_equal(console_lines_next(&l, NULL, &n), "last");
        assert_int_equal(n, 4);
        assert_null(console_lines_next(&l, NULL, &n));
        console_lines_close(&l);
        close(in[0]);
    }
    (void)dup2(kept, STDIN_FILENO);
    close(kept);
}

typedef struct typist {
    pthread_t reader;
    int out; /* where the prompt comes */
} typist;

/* A person quicker than any: Ctrl-C as soon as a prompt stands. */
static void *type_ctrl_c(void *arg) {
    typist *t = arg;
    char c;
    while (read(t->out, &c, 1) == 1)
        if (c == '>' && pthread_kill(t->reader, SIGINT) != 0) break;
    return NULL;
}

static void ctrl_c_at_the_prompt_is_never_lost(void **state) {
    (void)state;
    int in[2], out[2], kept_in = dup(STDIN_FILENO), kept_out = dup(STDOUT_FILENO);
    (void)fflush(stdout);
    assert_true(kept_in >= 0 && kept_out >= 0 && pipe(in) == 0 && pipe(out) == 0);
    assert_true(dup2(in[0], STDIN_FILENO) >= 0 && dup2(out[1], STDOUT_FILENO) >= 0);
    struct sigaction on = {.sa_handler = on_interrupt};
    assert_int_equal(sigaction(SIGINT, &on, NULL), 0);
    typist person = {.reader = pthread_self(), .out = out[0]};
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, type_ctrl_c, &person), 0);
    (void)alarm(60); /* one that is lost would be waited for without end */
    int n_line = 0;
    for (int i = 0; i < 2000; i++) {
        console_lines l;
        size_t n;
        console_lines_open(&l, &interrupted);
        interrupted = 0;
        n_line += console_lines_next(&l, ">", &n) != NULL;
        console_lines_close(&l);
    }
    (void)alarm(0);
    (void)dup2(kept_in, STDIN_FILENO);
    (void)dup2(kept_out, STDOUT_FILENO);
    for (int i = 0; i < 2; i++) close(i ? out[1] : kept_in), close(in[i]);
    (void)pthread_join(thread, NULL);
    close(out[0]);
    close(kept_out);
    interrupted = 0;
    assert_int_equal(n_line, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(controls), cmocka_unit_test(lines_in_any_pieces),
                                       cmocka_unit_test(ctrl_c_at_the_prompt_is_never_lost)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
