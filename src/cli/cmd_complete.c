/* ernest complete: the model goes on where each text ends. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/jsonw.h"
#include "cli/client.h"
#include "cli/command.h"
#include "cli/console.h"

enum { BODY_LIMIT = 16 << 20, MODEL_MAX = 512, MAX_TOKENS = 128 };

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number) {
    (void)signal_number;
    interrupted = 1;
}

static void on_event(void *ud, const json_t *event) {
    (void)ud;
    const json_t *text = json_object_get(json_array_get(json_object_get(event, "choices"), 0), "text");
    if (json_string_length(text))
        console_text(json_string_value(text), json_string_length(text), isatty(STDOUT_FILENO));
    (void)fflush(stdout);
}

static ern_status continue_text(const options *o, client *c, const char *model, const char *text, size_t len,
                                ern_err *err) {
    ern_buf body;
    ern_buf_init(&body, BODY_LIMIT);
    ern_jsonw w;
    ern_jsonw_init(&w, &body);
    ern_jsonw_object(&w);
    ern_jsonw_key(&w, "model");
    ern_jsonw_text(&w, model);
    ern_jsonw_key(&w, "prompt");
    ern_jsonw_text_n(&w, text, len);
    ern_jsonw_key(&w, "max_tokens");
    ern_jsonw_int(&w, options_given(o, "max-tokens") ? options_int(o, "max-tokens") : MAX_TOKENS);
    if (options_given(o, "temperature")) {
        ern_jsonw_key(&w, "temperature");
        ern_jsonw_real(&w, options_real(o, "temperature"));
    }
    ern_jsonw_key(&w, "stream");
    ern_jsonw_bool(&w, true);
    ern_jsonw_object_end(&w);
    ern_status s = body.full ? ERN_FAIL(err, ERN_ERR_LIMIT, "the text is longer than %d bytes", BODY_LIMIT)
                             : client_stream(c, "/completions", &body, on_event, NULL, err);
    ern_buf_free(&body);
    if (s == ERN_OK || interrupted) (void)puts("");
    if (s == ERN_ERR_CANCELLED && interrupted) s = ERN_OK;
    interrupted = 0;
    return s;
}

/* One text per line of standard input. */
static ern_status continue_lines(const options *o, client *c, const char *model, ern_err *err) {
    bool tty = isatty(STDIN_FILENO) == 1;
    console_lines lines;
    console_lines_open(&lines, &interrupted);
    ern_status s = ERN_OK;
    size_t n = 0;
    for (const char *line; s == ERN_OK && (line = console_lines_next(&lines, tty ? "> " : NULL, &n)) != NULL;)
        if (n > 0) s = continue_text(o, c, model, line, n, err);
    console_lines_close(&lines);
    return s;
}

int cmd_complete(int argc, char **argv, char **envp) {
    options o;
    int exit_code = 0;
    if (!command_begin(&o, CMD_COMPLETE, argc, argv, envp, &exit_code)) return exit_code;
    struct sigaction on = {.sa_handler = on_interrupt};
    (void)sigaction(SIGINT, &on, NULL);
    ern_err err;
    client *c = NULL;
    char model[MODEL_MAX] = "";
    const char *name = options_text(&o, "model-name"), *quick = options_text(&o, "quick");
    bool own = false;
    child_server server = {0};
    ern_status s = command_positional(&o, 1, &err);
    if (s == ERN_OK) s = child_server_wanted(&own, &o, &err);
    if (s == ERN_OK && own) s = child_server_start(&server, &o, &exit_code, &err);
    if (s == ERN_OK)
        s = client_open(&c, own ? server.url : options_text(&o, "url"), options_text(&o, "api-key"), &interrupted,
                        &err);
    if (s == ERN_OK && name) (void)snprintf(model, sizeof model, "%s", name);
    if (s == ERN_OK && !name) s = client_first_model(c, model, sizeof model, &err);
    if (s == ERN_OK)
        s = quick ? continue_text(&o, c, model, quick, strlen(quick), &err) : continue_lines(&o, c, model, &err);
    if (s == ERN_OK)
        exit_code = 0;
    else if (s != ERN_ERR_CANCELLED || !own || server.pid)
        exit_code = command_fail(&err);
    client_close(c);
    child_server_stop(&server);
    options_close(&o);
    return exit_code;
}
