/* golden_check: a made checkpoint on a backend against golden vectors, for the shapes too large for every test run.
 *     golden_check --backend ref|cpu|cuda --model DIR --vectors FILE [--kv f32|bf16]
 * Prints one line with the largest errors and their bounds. Exit code 0: all within; 1: not; 2: usage or files. */
#include <stdio.h>
#include <string.h>

#include "base/os.h"
#include "golden/golden.h"

static const char *value_of(int argc, char **argv, const char *flag, const char *otherwise) {
    for (int i = 1; i + 1 < argc; i += 2)
        if (strcmp(argv[i], flag) == 0) return argv[i + 1];
    return otherwise;
}

int main(int argc, char **argv) {
    const char *backend = value_of(argc, argv, "--backend", "cpu"), *dir = value_of(argc, argv, "--model", NULL);
    const char *vectors = value_of(argc, argv, "--vectors", NULL);
    const char *kv = value_of(argc, argv, "--kv", strcmp(backend, "ref") == 0 ? "f32" : "bf16");
    const ern_backend_ops *ops = ern_backend_find(backend);
    if (!dir || !vectors || !ops || (strcmp(kv, "f32") != 0 && strcmp(kv, "bf16") != 0)) {
        fprintf(stderr, "usage: golden_check --backend ref|cpu|cuda --model DIR --vectors FILE [--kv f32|bf16]\n");
        return 2;
    }
    ern_err err;
    ern_model *m = NULL;
    ern_model_options o = {.dir = dir};
    if (ern_model_open(&m, &o, &err) != ERN_OK) {
        fprintf(stderr, "golden_check: %s\n", err.text);
        return 2;
    }
    golden g = golden_open(vectors);
    golden_report r = {.ok = false};
    int64_t begin_us = ern_now_us();
    if (golden_weights(&g, r.why)) r = golden_compare(&g, ops, m, strcmp(kv, "f32") == 0 ? ERN_KV_F32 : ERN_KV_BF16);
    double took_s = (double)(ern_now_us() - begin_us) * 1e-6;
    printf("%s %s kv=%s %s in %.1f s, %lld numbers: logits %.3g (bound %.3g), their rms %.3g (other kv %.3g), ",
           g.shape, backend, kv, r.ok ? "ok" : "FAILED", took_s, (long long)r.n_compared, r.logit_error, r.logit_bound,
           r.logit_rms, r.other_rms);
    printf("resid %.3g (bound %.3g), mtp %.3g, %d of %d rows beyond%s%s\n", r.resid_error, r.resid_bound, r.mtp_error,
           r.n_flipped_row, g.n_row, r.ok ? "" : ": ", r.ok ? "" : r.why);
    golden_close(&g);
    ern_model_close(m);
    return r.ok ? 0 : 1;
}
