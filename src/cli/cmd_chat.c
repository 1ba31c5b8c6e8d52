/* ernest chat: a conversation in the terminal, with a server that runs or with one started for a model's folder. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/jsonw.h"
#include "base/os.h"
#include "cli/client.h"
#include "cli/command.h"
#include "cli/console.h"

enum { HISTORY_LIMIT = 8 << 20, REPLY_LIMIT = 4 << 20, MODEL_MAX = 512 };

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number) {
    (void)signal_number;
    interrupted = 1;
}

typedef struct talk {
    const options *o;
    client *c;
    char model[MODEL_MAX];
    ern_buf history; /* messages as JSON objects, ',' between */
    ern_buf reply;
    bool tty, dim; /* dim: reasoning is being shown */
    int64_t first_us, last_us;
    int64_t n_output, n_prompt;
    char finish[32];
} talk;

static void add_message(talk *t, const char *role, const char *text, size_t len) {
    if (t->history.len) (void)ern_buf_text(&t->history, ",");
    ern_jsonw w;
    ern_jsonw_init(&w, &t->history);
    ern_jsonw_object(&w);
    ern_jsonw_key(&w, "role");
    ern_jsonw_text(&w, role);
    ern_jsonw_key(&w, "content");
    ern_jsonw_text_n(&w, text, len);
    ern_jsonw_object_end(&w);
}

static void begin_history(talk *t) {
    ern_buf_clear(&t->history);
    const char *system = options_text(t->o, "system-prompt");
    if (system) add_message(t, "system", system, strlen(system));
}

/* Switch the terminal between reasoning (dim) and content. */
static void set_dim(talk *t, bool dim) {
    if (t->dim == dim) return;
    t->dim = dim;
    if (t->tty) (void)fputs(dim ? "\033[2m" : "\033[0m\n", stdout);
}

static void on_event(void *ud, const json_t *event) {
    talk *t = ud;
    const json_t *usage = json_object_get(event, "usage");
    if (json_is_object(usage)) {
        t->n_prompt = json_integer_value(json_object_get(usage, "prompt_tokens"));
        t->n_output = json_integer_value(json_object_get(usage, "completion_tokens"));
    }
    const json_t *choice = json_array_get(json_object_get(event, "choices"), 0);
    const json_t *delta = json_object_get(choice, "delta");
    const char *finish = json_string_value(json_object_get(choice, "finish_reason"));
    if (finish) (void)snprintf(t->finish, sizeof t->finish, "%s", finish);
    const json_t *reasoning = json_object_get(delta, "reasoning_content");
    const json_t *content = json_object_get(delta, "content");
    t->last_us = ern_now_us();
    if (json_string_length(reasoning) || json_string_length(content))
        if (!t->first_us) t->first_us = t->last_us;
    if (json_string_length(reasoning) && t->tty) {
        set_dim(t, true);
        console_text(json_string_value(reasoning), json_string_length(reasoning), t->tty);
    }
    if (json_string_length(content)) {
        set_dim(t, false);
        (void)ern_buf_add(&t->reply, json_string_value(content), json_string_length(content));
        console_text(json_string_value(content), json_string_length(content), t->tty);
    }
    (void)fflush(stdout);
}

static void print_body(const talk *t, ern_buf *out) {
    ern_jsonw w;
    ern_jsonw_init(&w, out);
    ern_jsonw_object(&w);
    ern_jsonw_key(&w, "model");
    ern_jsonw_text(&w, t->model);
    ern_jsonw_key(&w, "messages");
    ern_jsonw_array(&w);
    ern_jsonw_raw(&w, t->history.data, t->history.len);
    ern_jsonw_array_end(&w);
    if (options_given(t->o, "max-tokens")) {
        ern_jsonw_key(&w, "max_tokens");
        ern_jsonw_int(&w, options_int(t->o, "max-tokens"));
    }
    if (options_given(t->o, "temperature")) {
        ern_jsonw_key(&w, "temperature");
        ern_jsonw_real(&w, options_real(t->o, "temperature"));
    }
    ern_jsonw_key(&w, "stream");
    ern_jsonw_bool(&w, true);
    ern_jsonw_key(&w, "stream_options");
    ern_jsonw_raw(&w, "{\"include_usage\":true}", 22);
    ern_jsonw_object_end(&w);
}

/* One dim line under an answer: how much, how fast, why it ended when it did not end by itself. */
static void print_numbers(const talk *t, int64_t asked_us) {
    double decode_s = (double)(t->last_us - t->first_us) / 1e6;
    (void)printf("\033[2m%lld tokens", (long long)t->n_output);
    if (t->n_output > 1 && decode_s > 0) (void)printf(", %.1f per second", (double)(t->n_output - 1) / decode_s);
    if (t->first_us) (void)printf(", first after %.2f s", (double)(t->first_us - asked_us) / 1e6);
    if (strcmp(t->finish, "length") == 0) (void)printf(", cut by the token limit");
    (void)printf("\033[0m\n");
}

/* Ask, show the answer as it comes, remember both. On failure the question is forgotten. */
static ern_status ask(talk *t, const char *text, size_t len, ern_err *err) {
    size_t before = t->history.len;
    add_message(t, "user", text, len);
    ern_buf body;
    ern_buf_init(&body, HISTORY_LIMIT + 65536);
    print_body(t, &body);
    ern_buf_clear(&t->reply);
    t->first_us = t->n_output = 0;
    t->finish[0] = 0;
    int64_t asked_us = ern_now_us();
    ern_status s = t->history.full || body.full
                       ? ERN_FAIL(err, ERN_ERR_LIMIT,
                                  "the conversation is longer than %d bytes; /reset begins a new one", HISTORY_LIMIT)
                       : client_stream(t->c, "/chat/completions", &body, on_event, t, err);
    ern_buf_free(&body);
    set_dim(t, false);
    bool stopped = s == ERN_ERR_CANCELLED && interrupted;
    if (s == ERN_OK || stopped) {
        (void)fputs(stopped && t->tty ? " [stopped]\n" : "\n", stdout);
        if (t->tty && s == ERN_OK) print_numbers(t, asked_us);
        add_message(t, "assistant", t->reply.data ? t->reply.data : "", t->reply.len);
    } else {
        t->history.len = before;
        t->history.full = false;
        if (t->history.data) t->history.data[before] = 0;
    }
    interrupted = 0;
    return stopped ? ERN_OK : s;
}

static void print_commands(void) {
    (void)puts(
        "/reset  forget the conversation\n/exit   end (so does Ctrl-D)\n/help   this\nCtrl-C stops an answer; at the "
        "prompt it ends the chat.");
}

/* "/word" alone on its line: a command, or one that was mistyped; "/etc/hosts" and whole sentences are for the model.
 */
static bool like_a_command(const char *line) {
    size_t n = line[0] == '/' ? strspn(line + 1, "abcdefghijklmnopqrstuvwxyz") : 0;
    return n > 0 && line[1 + n] == 0;
}

/* Lines until the end of input. Returns the exit code: an answer that fails is shown and the talk goes on when a person
 * is there to read it. */
static int converse(talk *t) {
    console_lines lines;
    console_lines_open(&lines, &interrupted);
    int exit_code = 0;
    if (t->tty) (void)printf("%s at %s. /help shows the commands.\n", t->model, client_url(t->c));
    for (;;) {
        size_t n = 0;
        const char *line = console_lines_next(&lines, t->tty ? "\033[1m> \033[0m" : NULL, &n);
        if (!line) {
            if (t->tty) (void)puts("");
            break;
        }
        if (n == 0) continue;
        if (strcmp(line, "/exit") == 0 || strcmp(line, "/quit") == 0) break;
        if (strcmp(line, "/reset") == 0) {
            begin_history(t);
            if (t->tty) (void)puts("The conversation is forgotten.");
        } else if (strcmp(line, "/help") == 0) {
            print_commands();
        } else if (t->tty && like_a_command(line)) {
            (void)printf("%s is no command; /help lists them.\n", line);
        } else {
            ern_err err;
            ern_status s = ask(t, line, n, &err);
            if (s != ERN_OK) exit_code = command_fail(&err);
            if (s != ERN_OK && !t->tty) break;
        }
    }
    console_lines_close(&lines);
    return t->tty ? 0 : exit_code;
}

static int talk_to(const options *o, const char *url, const char *quick) {
    talk t = {.o = o, .tty = isatty(STDIN_FILENO) == 1 && isatty(STDOUT_FILENO) == 1};
    ern_buf_init(&t.history, HISTORY_LIMIT);
    ern_buf_init(&t.reply, REPLY_LIMIT);
    ern_err err;
    struct sigaction on = {.sa_handler = on_interrupt};
    (void)sigaction(SIGINT, &on, NULL);
    ern_status s = client_open(&t.c, url, options_text(o, "api-key"), &interrupted, &err);
    const char *name = options_text(o, "model-name");
    if (s == ERN_OK && name) (void)snprintf(t.model, sizeof t.model, "%s", name);
    if (s == ERN_OK && !name) s = client_first_model(t.c, t.model, sizeof t.model, &err);
    int exit_code = 0;
    if (s == ERN_OK) {
        begin_history(&t);
        if (quick)
            s = ask(&t, quick, strlen(quick), &err);
        else
            exit_code = converse(&t);
    }
    if (s != ERN_OK) exit_code = command_fail(&err);
    client_close(t.c);
    ern_buf_free(&t.history);
    ern_buf_free(&t.reply);
    return exit_code;
}

int cmd_chat(int argc, char **argv, char **envp) {
    options o;
    int exit_code = 0;
    if (!command_begin(&o, CMD_CHAT, argc, argv, envp, &exit_code)) return exit_code;
    ern_err err;
    ern_status s = command_positional(&o, 1, &err);
    bool own = false;
    if (s == ERN_OK) s = child_server_wanted(&own, &o, &err);
    child_server server = {0};
    if (s == ERN_OK && own) s = child_server_start(&server, &o, &exit_code, &err);
    if (s == ERN_OK)
        exit_code = talk_to(&o, own ? server.url : options_text(&o, "url"), options_text(&o, "quick"));
    else if (s != ERN_ERR_CANCELLED)
        exit_code = command_fail(&err);
    child_server_stop(&server);
    options_close(&o);
    return exit_code;
}
