/* ernest make-model: a checkpoint of random weights in the published format. */
#include <stdio.h>
#include <string.h>

#include "cli/command.h"
#include "cli/console.h"
#include "model/model.h"

/* --out, or the one word that stands alone. */
static ern_status target(const options *o, const char **dir, ern_err *err) {
    const char *out = options_text(o, "out"), *word = o->n_positional ? o->positional[0] : NULL;
    ERN_TRY(command_positional(o, 1, err));
    if (out && word)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--out %.100s and '%.100s' are two folders; name one", out, word);
    *dir = out ? out : word;
    return *dir ? ERN_OK : ERN_FAIL(err, ERN_ERR_USAGE, "make-model needs --out and the folder to write");
}

int cmd_make_model(int argc, char **argv, char **envp) {
    options o;
    int exit_code;
    if (!command_begin(&o, CMD_MAKE_MODEL, argc, argv, envp, &exit_code)) return exit_code;
    console_bar bar;
    console_bar_open(&bar);
    ern_err err;
    const char *dir = NULL;
    char text[ERN_QUANT_TEXT_BYTES];
    ern_status s = target(&o, &dir, &err);
    ern_synth_options synth = {
        .shape = options_text(&o, "shape"),
        .dir = dir,
        .paddle = strcmp(options_text(&o, "layout"), "paddle") == 0,
        .seed = (uint64_t)options_int(&o, "seed"),
        .n_layer = (int32_t)options_int(&o, "layers"),
        .shard_bytes = (uint64_t)options_int(&o, "shard-mib") << 20,
        .force = options_flag(&o, "force"),
        .progress = console_bar_progress,
        .ud = &bar,
    };
    ern_quant_plan quant;
    if (s == ERN_OK)
        s = ern_quant_parse(&quant, options_text(&o, "quantization"), options_text(&o, "lm-head-quantization"), &err);
    if (s == ERN_OK && ern_quant_any(&quant)) synth.quant = &quant;
    console_watch_interrupts();
    if (s == ERN_OK) s = ern_synth_write(&synth, &err);
    console_bar_close(&bar);
    exit_code = s == ERN_OK ? 0 : command_fail(&err);
    if (s == ERN_OK)
        printf("%s: %s, %s, seed %llu; random weights, so its replies are noise\n", dir, synth.shape,
               synth.quant    ? ern_quant_text(text, &quant)
               : synth.paddle ? "paddle layout"
                              : "pt layout",
               (unsigned long long)synth.seed);
    options_close(&o);
    return exit_code;
}
