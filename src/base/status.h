/* Status codes, the error record, and assertions: the one way anything here fails.
 *
 * Three kinds of failure (house rule):
 *   1. the outside world (files, sockets, devices, config): a function returns ern_status and fills an ern_err;
 *   2. a request's own fault or fate: data in that request's answer, never an error;
 *   3. our own mistake: ERN_ASSERT, compiled into every build.
 * Owner: the caller owns the ern_err; it is plain data and may live on the stack. Any thread. */
#ifndef ERN_BASE_STATUS_H
#define ERN_BASE_STATUS_H

#include <stdarg.h>
#include <stdint.h>

typedef enum ern_code {
    ERN_OK = 0,
    ERN_ERR_USAGE = -1,       /* a flag, a config key, an argument: exit code 2 */
    ERN_ERR_FILE = -2,        /* missing, unreadable, malformed file: exit code 2 */
    ERN_ERR_MEMORY = -3,      /* it does not fit: exit code 3 */
    ERN_ERR_DEVICE = -4,      /* no such device, or it is lost: exit code 3 */
    ERN_ERR_NET = -5,         /* socket, port, peer */
    ERN_ERR_LIMIT = -6,       /* a bounded thing is full */
    ERN_ERR_UNSUPPORTED = -7, /* known, and not built yet */
    ERN_ERR_CANCELLED = -8,   /* the user stopped it */
    ERN_ERR_INPUT = -9,       /* text or numbers from outside that break a rule: a request's 400 */
} ern_code;

/* 0 is good; negatives are ern_code. The result must be looked at. */
#define ERN_MUST_CHECK __attribute__((warn_unused_result))
typedef int ern_status;

/* One sentence naming the thing, the value found and what mends it, and where in our code it was noticed. */
typedef struct ern_err {
    ern_code code;
    int line;
    const char *file; /* static string */
    char text[480];
} ern_err;

/* Fill *err (which may be NULL) and return the code. Text is printf-style, cut at the buffer's end. */
ern_status ern_err_set(ern_err *err, ern_code code, const char *file, int line, const char *fmt, ...)
    __attribute__((format(printf, 5, 6)));

#define ERN_FAIL(err, code, ...) ern_err_set((err), (code), __FILE__, __LINE__, __VA_ARGS__)

/* Pass a failure up. */
#define ERN_TRY(expr)                                  \
    do {                                               \
        ern_status try_status_ = (expr);               \
        if (try_status_ != ERN_OK) return try_status_; \
    } while (0)

/* Our own mistake: print what and where, then abort. Always compiled in. */
void ern_assert_fail(const char *expr, const char *file, int line) __attribute__((noreturn));
#define ERN_ASSERT(expr) ((expr) ? (void)0 : ern_assert_fail(#expr, __FILE__, __LINE__))

/* The process exit code that belongs to a status: 0, 2 (usage, file) or 3 (memory, device) or 1. */
int ern_exit_code(ern_status status);

#endif
