/* From options to what the server and the engine are opened with: the start-up checks, done before any weight is read.
 * Owner: `ernest serve`. The strings are borrowed from the options. */
#ifndef ERN_CLI_LAUNCH_H
#define ERN_CLI_LAUNCH_H

#include "base/log.h"
#include "cli/options.h"
#include "engine/engine.h"
#include "server/server.h"

typedef struct launch {
    char model_dir[1024], tokenizer_path[1024];
    char host[64];
    const char *model_name;   /* as the user named it */
    const char *chat_format;  /* NULL: look at the tokenizer */
    const char *config_name;  /* of the file in model_dir */
    const char *log_dir;      /* NULL: none */
    const char *backend_name; /* "cpu", "ref", "cuda" */
    ern_log_level log_level;
    int ready_fd; /* -1: none */
    ern_server_options server;
    ern_engine_options engine; /* model is filled in by serve */
    double memory_share;       /* --gpu-memory-utilization, when it decides; 0: it does not */
    bool backend_auto;         /* --backend auto */
    bool gpu_left;             /* and the GPU's backend does not take this model */
    ern_quant_plan quant;      /* what the flags ask for */
    bool quant_asked;          /* a flag was given */
} launch;

/* Every rule that needs no file but the model's folder. Errors: ERN_ERR_USAGE naming the flag, the value, the limit and
 * what mends it; ERN_ERR_FILE for a model that is not there. Source: FastDeploy's start-up checks. */
ERN_MUST_CHECK ern_status launch_check(launch *l, const options *o, ern_err *err);
/* What the model's config.json adds. */
ERN_MUST_CHECK ern_status launch_check_config(const launch *l, const ern_config *c, ern_err *err);
/* What the opened model decides where no flag does: the dtype of the KV cache. */
void launch_take_model(launch *l, const options *o, const ern_model *m);
/* Turn a share of the machine's or the GPU's memory into the engine's bytes, once the model's size is known. Errors:
 * ERN_ERR_MEMORY naming --gpu-memory-utilization; ERN_ERR_USAGE for a --memory that the GPU has not free. */
ERN_MUST_CHECK ern_status launch_fit_memory(launch *l, const ern_model *m, ern_err *err);
/* Compute on the processors instead, all that follows from where we compute decided anew. For --backend auto, when the
 * GPU's backend refuses the opened model m. */
ERN_MUST_CHECK ern_status launch_leave_gpu(launch *l, const options *o, const ern_model *m, ern_err *err);
/* The engine's plan, and what the size of the KV cache adds to the rules. Where memory is short and flags take a part
 * of it, the error names them too. */
ERN_MUST_CHECK ern_status launch_plan(const launch *l, ern_engine_plan *out, ern_err *err);
ERN_MUST_CHECK ern_status launch_check_plan(const launch *l, const ern_engine_plan *p, ern_err *err);
/* Pages that prompts may take: FastDeploy's prefill_kvcache_block_num. */
int32_t launch_prompt_pages(const launch *l, const ern_engine_plan *p);
/* Whether the tokenizer's ids fit the model's and it has the marks of the chat format. Errors: ERN_ERR_FILE. */
ERN_MUST_CHECK ern_status launch_check_text(const launch *l, const ern_config *c, const ern_tokenizer *t,
                                            ern_chat_format f, ern_err *err);
/* True when the memory that the plan speaks of is a GPU's. */
bool launch_on_gpu(const launch *l);
/* True when the address can be reached from other machines. */
bool launch_is_public(const launch *l);

#endif
