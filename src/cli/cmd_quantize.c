/* ernest quantize: a bf16 checkpoint of either layout to one that holds quantized weights. */
#include <stdio.h>
#include <string.h>

#include "cli/command.h"
#include "cli/console.h"
#include "model/model.h"

/* IN and OUT: words in that order, or --model and --out. A word that is IN stands in --model too. */
static ern_status targets(const options *o, char *in, size_t size, const char **out, ern_err *err) {
    const char *const model = options_text(o, "model"), *const flag_out = options_text(o, "out");
    const bool in_word = o->n_positional > 0 && strcmp(model, o->positional[0]) == 0;
    const int n_word = (in_word ? 1 : 0) + (flag_out ? 0 : 1);
    ERN_TRY(command_positional(o, n_word, err));
    if (!model || o->n_positional < n_word)
        return ERN_FAIL(err, ERN_ERR_USAGE, "quantize needs two folders: the checkpoint to read and the one to write");
    *out = flag_out ? flag_out : o->positional[n_word - 1];
    return command_model_dir(o, in, size, err);
}

static ern_status quantize(const options *o, ern_err *err) {
    char in[1024], text[ERN_QUANT_TEXT_BYTES];
    const char *const format = options_text(o, "quantization");
    ern_quantize_options q = {
        .dir = in,
        .shard_bytes = (uint64_t)options_int(o, "shard-mib") << 20,
        .force = options_flag(o, "force"),
        .progress = console_bar_progress,
    };
    ERN_TRY(ern_quant_parse(&q.plan, format, options_text(o, "lm-head-quantization"), err));
    ERN_TRY(targets(o, in, sizeof in, &q.out, err));
    console_bar bar;
    console_bar_open(&bar);
    q.ud = &bar;
    console_watch_interrupts();
    ern_status s = ern_quantize(&q, err);
    console_bar_close(&bar);
    ERN_TRY(s);
    printf("%s: %s, from %s\n", q.out, ern_quant_text(text, &q.plan), in);
    return ERN_OK;
}

int cmd_quantize(int argc, char **argv, char **envp) {
    options o;
    int exit_code;
    ern_err err;
    if (!command_begin(&o, CMD_QUANTIZE, argc, argv, envp, &exit_code)) return exit_code;
    exit_code = quantize(&o, &err) == ERN_OK ? 0 : command_fail(&err);
    options_close(&o);
    return exit_code;
}
