/* A server of our own for `ernest chat MODEL`: the same program, on a free port, gone when we are. See client.h. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cli/client.h"
#include "cli/command.h"

enum { READY_FD = 3 };

/* In the child: its own process group, so that Ctrl-C in the terminal stops an answer and not the server. */
static _Noreturn void become_server(const char *dir, const options *o, int ready, int parent) {
    (void)setpgid(0, 0);
    (void)prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) _exit(1);
    /* The pipe first: in a parent without stdin or stdout it may be descriptor 0 or 1. */
    if (ready != READY_FD && dup2(ready, READY_FD) < 0) _exit(1);
    if (ready == READY_FD) (void)fcntl(ready, F_SETFD, 0);
    int null = open("/dev/null", O_RDWR);
    if (null < 0 || dup2(null, STDIN_FILENO) < 0 || dup2(null, STDOUT_FILENO) < 0) _exit(1);
    if (null > STDERR_FILENO) (void)close(null);
    /* What the client will say is what the server asks for; FD_API_KEY may hold others. */
    const char *key = options_text(o, "api-key");
    if ((key ? setenv("FD_API_KEY", key, 1) : unsetenv("FD_API_KEY")) != 0) _exit(1);
    (void)execl("/proc/self/exe", "ernest", "serve", "--model", dir, "--host", "127.0.0.1", "--port", "0", "--ready-fd",
                "3", "--log-level", "warn", "--max-model-len", options_text(o, "max-model-len"), (char *)NULL);
    _exit(127);
}

ern_status child_server_wanted(bool *out, const options *o, ern_err *err) {
    *out = options_given(o, "model");
    if (*out && options_given(o, "url"))
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--url and a model's folder exclude each other: talk to a server or start one");
    if (!*out && options_given(o, "max-model-len"))
        return ERN_FAIL(err, ERN_ERR_USAGE,
                        "--max-model-len is the server's, and one that runs has its own; name a model's folder too, or "
                        "leave it out");
    return ERN_OK;
}

ern_status child_server_start(child_server *s, const options *o, int *exit_code, ern_err *err) {
    *s = (child_server){0};
    char dir[1024];
    int end[2];
    ERN_TRY(command_model_dir(o, dir, sizeof dir, err));
    if (pipe2(end, O_CLOEXEC) != 0) return ERN_FAIL(err, ERN_ERR_MEMORY, "no pipe for the server: %s", strerror(errno));
    int parent = (int)getpid();
    (void)fflush(NULL);
    s->pid = (int)fork();
    if (s->pid < 0) {
        (void)close(end[0]), (void)close(end[1]);
        s->pid = 0;
        return ERN_FAIL(err, ERN_ERR_MEMORY, "no process for the server: %s", strerror(errno));
    }
    if (s->pid == 0) become_server(dir, o, end[1], parent);
    (void)close(end[1]);
    size_t n = 0;
    for (ssize_t got; n < sizeof s->url - 1; n += (size_t)got) {
        do got = read(end[0], s->url + n, sizeof s->url - 1 - n);
        while (got < 0 && errno == EINTR);
        if (got <= 0 || memchr(s->url + n, '\n', (size_t)got)) {
            n += got > 0 ? (size_t)got : 0;
            break;
        }
    }
    (void)close(end[0]);
    char *newline = memchr(s->url, '\n', n);
    if (newline) {
        *newline = 0;
        return ERN_OK;
    }
    int status = 0;
    (void)kill(s->pid, SIGTERM);
    while (waitpid(s->pid, &status, 0) < 0 && errno == EINTR) {
    }
    s->pid = 0;
    *exit_code = WIFEXITED(status) && WEXITSTATUS(status) ? WEXITSTATUS(status) : 1;
    return ERN_FAIL(err, ERN_ERR_CANCELLED, "the server did not start");
}

void child_server_stop(child_server *s) {
    if (s->pid <= 0) return;
    (void)kill(s->pid, SIGTERM);
    while (waitpid(s->pid, NULL, 0) < 0 && errno == EINTR) {
    }
    s->pid = 0;
}
