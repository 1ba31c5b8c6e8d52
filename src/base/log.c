/* The log. See log.h. */
#include "base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/os.h"

static ern_log_level log_level = ERN_LOG_INFO;
static int log_fd = -1;
static atomic_uint_fast64_t log_dropped;

ern_status ern_log_open(ern_log_level level, const char *path, ern_err *err) {
    log_level = level;
    if (!path) return ERN_OK;
    log_fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (log_fd < 0)
        return ERN_FAIL(err, ERN_ERR_FILE, "cannot write the log file %s: %s; set FD_LOG_DIR to a writable folder",
                        path, strerror(errno));
    return ERN_OK;
}

void ern_log_close(void) {
    if (log_fd >= 0) close(log_fd);
    log_fd = -1;
}

void ern_log(ern_log_level level, const char *name, const char *fmt, ...) {
    static const char *const word[] = {"debug", "info", "warn", "error"};
    if (level < log_level || level >= ERN_LOG_OFF) return;
    char line[2048];
    int n = snprintf(line, sizeof line, "t_us=%lld level=%s event=%s ", (long long)ern_now_us(), word[level], name);
    va_list ap;
    va_start(ap, fmt);
    int m = vsnprintf(line + n, sizeof line - (size_t)n - 1, fmt, ap);
    va_end(ap);
    size_t len = (size_t)n + (m < 0 ? 0 : (size_t)m);
    if (len > sizeof line - 2) len = sizeof line - 2;
    line[len++] = '\n';
    if (write(STDERR_FILENO, line, len) != (ssize_t)len) atomic_fetch_add(&log_dropped, 1);
    if (log_fd >= 0 && write(log_fd, line, len) != (ssize_t)len) atomic_fetch_add(&log_dropped, 1);
}

uint64_t ern_log_dropped(void) { return atomic_load(&log_dropped); }
