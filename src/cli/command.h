/* What the sub-commands share: their entry points, how they fail, and how they find a model. */
#ifndef ERN_CLI_COMMAND_H
#define ERN_CLI_COMMAND_H

#include <stddef.h>

#include "backend/backend.h"
#include "base/status.h"
#include "cli/options.h"

int cmd_serve(int argc, char **argv, char **envp);
int cmd_chat(int argc, char **argv, char **envp);
int cmd_complete(int argc, char **argv, char **envp);
int cmd_tokenize(int argc, char **argv, char **envp);
int cmd_make_model(int argc, char **argv, char **envp);
int cmd_quantize(int argc, char **argv, char **envp);
int cmd_bench(int argc, char **argv, char **envp);
int cmd_bench_limits(int argc, char **argv, char **envp);
int cmd_bench_kernels(int argc, char **argv, char **envp);
int cmd_bench_step(int argc, char **argv, char **envp);
int cmd_bench_serve(int argc, char **argv, char **envp);
int cmd_collect_env(int argc, char **argv, char **envp);
int cmd_docs(int argc, char **argv, char **envp);
int cmd_version(int argc, char **argv, char **envp);
int cmd_help(int argc, char **argv, char **envp);

/* Print "ernest: <the sentence>" to stderr; returns the exit code that belongs to it. */
int command_fail(const ern_err *err);
/* Read the options of argv[0] and answer --help. True: go on. False: *exit_code is what to return, and the options are
 * closed. */
bool command_begin(options *o, unsigned options_of, int argc, char **argv, char **envp, int *exit_code);
/* Refuse words without a flag beyond the first `most`. */
ERN_MUST_CHECK ern_status command_positional(const options *o, int most, ern_err *err);
/* The model's folder: --model as a path or as a hub id below FD_MODEL_CACHE. `out` holds
 * `size` bytes. Errors: ERN_ERR_USAGE, ERN_ERR_FILE naming the flag and where it was looked for. */
ERN_MUST_CHECK ern_status command_model_dir(const options *o, char *out, size_t size, ern_err *err);
/* What --backend names; auto: cuda where it can run, else cpu. Errors: ERN_ERR_DEVICE saying why it cannot run here. */
ERN_MUST_CHECK ern_status command_backend(const options *o, const ern_backend_ops **out, ern_err *err);
/* What --kv-cache-dtype names; auto: what the checkpoint wishes. */
ern_kv_dtype command_kv_dtype(const options *o, ern_kv_codes wish);
/* Write a buffer to stdout and free it; 0, or 1 when stdout is gone. */
int command_print(ern_buf *b);

#endif
