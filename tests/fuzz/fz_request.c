/* Bodies of every endpoint through the whole front: JSON, the field table, messages, prompts, sampling, choices. The
 * first byte picks the endpoint and the chat format. What is accepted must be what an engine can take. */
#include <stdlib.h>

#include "base/log.h"
#include "made_model.h"
#include "server/job.h"

static made_model made;
static ern_server server;

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void clean(void) { made_dir_remove(made.dir); }

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    static ern_tokenizer *tokenizer;
    ern_err err;
    made_check(ern_log_open(ERN_LOG_OFF, NULL, &err), &err, "log");
    made = made_model_open("tiny-dense", false, 1);
    (void)atexit(clean);
    made_check(ern_tokenizer_open(&tokenizer, made.dir, &err), &err, "tokenizer");
    ern_engine_options e = {.backend = ern_backend_find("ref"),
                            .model = made.model,
                            .backend_options = {.n_thread = 1},
                            .max_model_len = 256,
                            .max_num_seqs = 2,
                            .max_batched_tokens = 64,
                            .chunked_prefill = true,
                            .memory_bytes = 64u << 20,
                            .queue_max = 4,
                            .overlap = true};
    made_check(ern_engine_open(&server.engine, &e, &err), &err, "engine");
    server.o = (ern_server_options){.max_logprobs = 20,
                                    .enable_logprob = true,
                                    .split_reasoning = true,
                                    .parse_tools = true,
                                    .max_stop = 16,
                                    .max_stop_bytes = 1024,
                                    .max_stop_tokens = 8,
                                    .body_max_bytes = 1 << 20};
    server.tokenizer = tokenizer;
    server.config = &made.model->config;
    pthread_mutex_init(&server.lock, NULL);
    return 0;
}

static void check(const job *j) {
    ERN_ASSERT(j->n_choice >= 1 && j->n_choice <= JOB_CHOICES_MAX);
    for (int i = 0; i < j->n_choice; i++) {
        const ern_request *r = &j->choice[i].request;
        ERN_ASSERT(r->n_prompt >= 1 && r->max_tokens >= 1 && r->n_prompt + r->max_tokens <= 256);
        ERN_ASSERT(r->min_tokens >= 0 && r->min_tokens <= r->max_tokens);
        ERN_ASSERT(r->n_stop <= ERN_STOP_MAX && r->sample.n_ban <= ERN_BAN_MAX && r->n_prompt_top <= ERN_TOP_MAX);
        ERN_ASSERT(r->sample.temperature >= 0 && r->sample.temperature <= 2);
        ERN_ASSERT(r->sample.top_p > 0 && r->sample.top_p <= 1);
        for (int k = 0; k < r->n_prompt; k++)
            ERN_ASSERT(r->prompt[k] >= 0 && r->prompt[k] < made.model->config.n_vocab);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 1 || size > 1 << 16) return 0;
    char *body = malloc(size);
    job *j = calloc(1, sizeof *j);
    if (!body || !j) abort();
    memcpy(body, data + 1, size - 1);
    body[size - 1] = 0;
    server.format = data[0] & 2 ? ERN_CHAT_THINKING : ERN_CHAT_ERNIE;
    server.o.strict_fastdeploy = (data[0] & 4) != 0;
    ern_http_request http = {.method = "POST", .path = "/", .body = body, .body_len = size - 1};
    job_open(j, &server, &http, data[0] & 1 ? JOB_CHAT : JOB_COMPLETION);
    if (request_build(j))
        check(j);
    else
        ERN_ASSERT(j->error.status >= 400 && j->error.status < 500 && j->error.message[0]);
    job_free(j);
    free(body);
    return 0;
}
