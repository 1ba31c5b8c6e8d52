/* The log: one line, one event, `key=value`, monotonic microseconds since start, to stderr and to an optional file.
 *
 * Nothing per token is logged: that is a counter. Only the engine, the server and the cli log; base, text, model and
 * backend return errors. Lines never block the caller for long: a failed write is dropped and counted.
 * Owner: process-wide state set up once by main. Any thread. */
#ifndef ERN_BASE_LOG_H
#define ERN_BASE_LOG_H

#include <stdint.h>

#include "base/status.h"

typedef enum ern_log_level { ERN_LOG_DEBUG, ERN_LOG_INFO, ERN_LOG_WARN, ERN_LOG_ERROR, ERN_LOG_OFF } ern_log_level;

/* Set the least level printed, and a file to append to as well (NULL: none). Call once, before threads start. */
ERN_MUST_CHECK ern_status ern_log_open(ern_log_level level, const char *path, ern_err *err);
void ern_log_close(void);
/* One event: `name` is a dotted word ("engine.preempt"), fmt gives the key=value pairs. */
void ern_log(ern_log_level level, const char *name, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* Lines that could not be written. */
uint64_t ern_log_dropped(void);

#endif
