/* What `ernest serve` tells people and their scripts: the summary, the plan, the log files, the ready signals.
 * Owner: cmd_serve.c. One thread. */
#ifndef ERN_CLI_SERVE_REPORT_H
#define ERN_CLI_SERVE_REPORT_H

#include "cli/launch.h"

/* Make the log folder and open the log below it. Errors: ERN_ERR_FILE naming FD_LOG_DIR. */
ERN_MUST_CHECK ern_status report_open_log(const launch *l, ern_err *err);
/* One log line per option that is accepted and changes nothing here, and per variable of FastDeploy's that is not
 * known: at warn, since somebody set it for a reason. */
void report_ignored(const launch *l, const options *o, char **envp);
/* Those that only a Thinking model gives a meaning to. */
void report_ignored_by_format(const options *o, ern_chat_format f);
/* One log line per word of ern_model.unknown_keys. */
void report_unknown_keys(const char *keys);
/* One log line when the config announces an MTP layer that the files do not hold. */
void report_missing_mtp(const ern_model *m);
/* The memory plan, to stdout (--dry-run). */
void report_plan(const launch *l, const ern_model *m, const ern_engine_plan *p);
/* Ready: eight lines to stdout, the lines that FastDeploy's scripts look for to the log, the file descriptor and the
 * service manager told. `url` has no trailing slash. */
void report_ready(const launch *l, const options *o, const ern_model *m, const ern_engine_plan *p, ern_chat_format f,
                  const char *url, char **envp);
/* Tell the service manager (NOTIFY_SOCKET) a state such as "STOPPING=1". */
void report_state(char **envp, const char *state);
/* One line about what was done since the last one; nothing when idle. */
typedef struct report_numbers {
    int64_t at_us;
    ern_engine_stats then;
} report_numbers;
void report_stats(report_numbers *r, ern_engine *e);

#endif
