/* ernest bench step: prefill and decode of a model without a server; on the cpu backend, beside the limits of the same
 * rounds. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/os.h"
#include "cli/bench_book.h"
#include "cli/bench_stats.h"
#include "cli/bench_work.h"
#include "cli/command.h"
#include "cli/console.h"

enum { LIST_MAX = 16, LEN_TOP = 131072, BATCH_TOP = 512, QUICK_LEN = 2048 };

typedef struct lists {
    double context[LIST_MAX], batch[LIST_MAX], prompt[LIST_MAX], job[3]; /* job: sequences, tokens in, tokens out */
    int n_context, n_batch, n_prompt, n_job;
} lists;

typedef struct stepping {
    const options *o;
    bench_book *book;
    const ern_backend_ops *backend;
    ern_model *model;
    bench_steps *steps;
    int threads; /* 0: another backend than cpu, which has no limits beside it */
    char format[96];
} stepping;

/* ---- opening --------------------------------------------------------------------------------------------------- */

static bool show_load(void *ud, const char *what, uint64_t done_bytes, uint64_t all_bytes) {
    console_bar_show(ud, what, done_bytes, all_bytes);
    return true;
}

static ern_status open_model(stepping *s, ern_err *err) {
    char dir[1024];
    ern_quant_plan plan;
    console_bar bar;
    ERN_TRY(command_positional(s->o, 1, err));
    ERN_TRY(command_backend(s->o, &s->backend, err));
    if (options_flag(s->o, "table") && strcmp(s->backend->name, "cpu") != 0)
        return ERN_FAIL(err, ERN_ERR_USAGE, "--table is of the cpu backend, and %s computes; give --backend cpu",
                        s->backend->name);
    ERN_TRY(command_model_dir(s->o, dir, sizeof dir, err));
    const char *text = options_text(s->o, "quantization"), *head = options_text(s->o, "lm-head-quantization");
    ERN_TRY(ern_quant_parse(&plan, text, head, err));
    console_bar_open(&bar);
    const ern_status status = ern_model_open(
        &s->model,
        &(ern_model_options){
            .dir = dir, .quant = text || head ? &plan : NULL, .touch = true, .progress = show_load, .ud = &bar},
        err);
    console_bar_close(&bar);
    if (status != ERN_OK) return status;
    char size[32];
    (void)bench_format(s->model, s->format);
    (void)printf("%s: weights %s (%s, %s order)\n", dir, console_bytes(size, s->model->weight_bytes), s->format,
                 s->model->is_paddle ? "Paddle" : "PyTorch");
    return ERN_OK;
}

static int level_of(const options *o) {
    const char *name = options_text(o, "cpu-level");
    for (int l = 0; l <= (int)ERN_CPU_AMX; l++)
        if (strcmp(name, ern_cpu_level_name((ern_cpu_level)l)) == 0) return l;
    return -1;
}

/* Room for the largest batch at the longest context, which is what the KV cache costs, or for the longest prompt. */
static ern_status open_steps(stepping *s, int32_t n_seq, int32_t n_context, int32_t n_prompt, ern_err *err) {
    const int level = level_of(s->o);
    if (level > (int)ern_cpu_level_here())
        return ERN_FAIL(err, ERN_ERR_USAGE, "--cpu-level %s is above what this processor has, %s",
                        options_text(s->o, "cpu-level"), ern_cpu_level_name(ern_cpu_level_here()));
    const int32_t most = (int32_t)options_int(s->o, "max-num-batched-tokens");
    const bool act_exact = strcmp(options_text(s->o, "activation-quantization"), "none") == 0;
    bench_steps_close(s->steps);
    s->steps = NULL;
    ERN_TRY(bench_steps_open(&s->steps,
                             &(bench_steps_options){.model = s->model,
                                                    .backend = s->backend,
                                                    .n_thread = (int32_t)options_int(s->o, "threads"),
                                                    .level = level,
                                                    .kv_dtype = command_kv_dtype(s->o, s->model->kv_codes),
                                                    .act_exact = act_exact,
                                                    .n_row_max = n_prompt < 1      ? 1
                                                                 : n_prompt < most ? n_prompt
                                                                                   : most,
                                                    .n_seq_max = n_seq,
                                                    .n_context_max = n_context,
                                                    .n_prompt_max = n_prompt,
                                                    .n_round = (int32_t)options_int(s->o, "rounds"),
                                                    .sampled = options_flag(s->o, "sampled"),
                                                    .quick = options_flag(s->o, "quick")},
                             err));
    s->threads = bench_steps_threads(s->steps);
    return ERN_OK;
}

/* ---- telling --------------------------------------------------------------------------------------------------- */

static void print_heading(const stepping *s) {
    if (!s->threads) {
        char line[200] = "";
        (void)ern_backend_device(s->backend->name, line, sizeof line);
        (void)printf("%s backend%s%s; median of %lld rounds\n%-28s %10s %10s %9s %9s %9s  %s\n", s->backend->name,
                     *line ? ", " : "", line, (long long)options_int(s->o, "rounds"), "", "tokens/s", "ms", "MB", "GOP",
                     "GB/s", "best round");
        return;
    }
    (void)printf("%s, %d thread%s, level %s; median of up to %lld rounds; limits: the mean of looks before and after a "
                 "round, between its prompts and between their long steps, reading in huge pages, arithmetic from L2\n",
                 ern_cpu_name(), s->threads, s->threads == 1 ? "" : "s", ern_cpu_level_name(ern_cpu_level_here()),
                 (long long)options_int(s->o, "rounds"));
    (void)printf("%-28s %10s %10s %9s %9s %9s  %s\n", "", "tokens/s", "ms", "MB", "GOP", "GB/s",
                 "share of the limit that binds (worst..best round)");
}

static const char *row_name(char out[96], const stepping *s, const bench_result *r, const char *more) {
    if (r->prefill)
        (void)snprintf(out, 96, "prefill %d%s", r->context, more);
    else
        (void)snprintf(out, 96, "decode b=%d ctx=%d%s", r->batch, r->context, more);
    (void)s;
    return out;
}

/* The limit that binds, in its own unit. */
static double limit_value(const bench_result *r) { return r->by_read ? r->read : r->compute; }

static void tell(const stepping *s, const bench_result *r, const char *more) {
    char name[96], row[256], limit[48];
    const char *which = !s->threads ? NULL : r->by_read ? "read" : ern_rate_name(r->rate);
    (void)row_name(name, s, r, more);
    (void)printf("%-28s %10.2f %10.2f %9.1f %9.2f %9.1f  ", name, r->tokens_per_s, r->seconds * 1e3, r->bytes * 1e-6,
                 r->operations * 1e-9, r->bytes / r->seconds * 1e-9);
    (void)snprintf(limit, sizeof limit, "%.1f %s", limit_value(r) * 1e-9, r->by_read ? "GB/s" : "GOP/s");
    if (s->threads)
        (void)printf("%3.0f%% of %s, %s (%.0f..%.0f%%)\n", 100 * r->fraction, which, limit, 100 * r->least_fraction,
                     100 * r->best_fraction);
    else
        (void)printf("%.2f\n", r->best_tokens_per_s);
    if (r->experts > 0) (void)printf("%-28s %.0f experts touched, %.1f MB of KV\n", "", r->experts, r->kv_bytes * 1e-6);
    (void)fflush(stdout);
    (void)snprintf(row, sizeof row, "%s%s%s, %s, %s", s->threads ? "" : s->backend->name, s->threads ? "" : ", ",
                   s->model->is_paddle ? "paddle" : "pt", s->format, name);
    bench_book_add(s->book, &(bench_line){.row = row,
                                          .value = r->tokens_per_s,
                                          .unit = "tokens/s",
                                          .threads = s->threads,
                                          .bytes = r->bytes,
                                          .operations = r->operations,
                                          .limit = which,
                                          .limit_value = limit_value(r),
                                          .fraction = r->fraction});
}

/* ---- what was asked for ---------------------------------------------------------------------------------------- */

static ern_status read_lists(const options *o, const ern_model *m, lists *l, ern_err *err) {
    const double top = m->config.n_position > 128 ? m->config.n_position - 128 : 1;
    ERN_TRY(bench_list("context", options_text(o, "context"), 1, top < LEN_TOP ? top : LEN_TOP, l->context, LIST_MAX,
                       &l->n_context, err));
    const char *job = options_text(o, "job");
    l->n_job = 0;
    if (job) ERN_TRY(bench_list("job", job, 1, top, l->job, 3, &l->n_job, err));
    if (job && (l->n_job != 3 || l->job[0] > BATCH_TOP || l->job[1] + l->job[2] > top ||
                l->job[1] > (double)options_int(o, "max-num-batched-tokens")))
        return ERN_FAIL(
            err, ERN_ERR_USAGE,
            "--job wants sequences (to %d), prompt tokens (to --max-num-batched-tokens) and reply tokens, such as "
            "16,256,128, not '%.60s'",
            BATCH_TOP, job);
    ERN_TRY(bench_list("batch", options_text(o, "batch"), 1, BATCH_TOP, l->batch, LIST_MAX, &l->n_batch, err));
    return bench_list("prompt", options_text(o, "prompt"), 0, top < LEN_TOP ? top : LEN_TOP, l->prompt, LIST_MAX,
                      &l->n_prompt, err);
}

static int32_t most_of(const double *v, int n) {
    double most = 0;
    for (int i = 0; i < n; i++) most = v[i] > most ? v[i] : most;
    return (int32_t)most;
}

static int32_t larger(int32_t a, double b) { return a > (int32_t)b ? a : (int32_t)b; }

/* The best of the rounds, as people compare a server's best minute with it. */
static ern_status run_job(stepping *s, const lists *l, ern_err *err) {
    const int32_t n = (int32_t)l->job[0], n_in = (int32_t)l->job[1], n_out = (int32_t)l->job[2];
    double best = 0, seconds = 0;
    char name[96], row[256];
    for (int64_t i = 0; i < options_int(s->o, "rounds"); i++) {
        ERN_TRY(bench_job(s->steps, n, n_in, n_out, &seconds, err));
        if (n * (double)n_out / seconds > best) best = n * (double)n_out / seconds;
    }
    (void)snprintf(name, sizeof name, "job %d x (%d + %d)", n, n_in, n_out);
    (void)snprintf(row, sizeof row, "%s%s%s, %s, %s, best", s->threads ? "" : s->backend->name, s->threads ? "" : ", ",
                   s->model->is_paddle ? "paddle" : "pt", s->format, name);
    (void)printf("%-28s %10.2f output tokens/s, the best of %lld rounds\n", name, best,
                 (long long)options_int(s->o, "rounds"));
    bench_book_add(s->book, &(bench_line){.row = row, .value = best, .unit = "tokens/s", .threads = s->threads});
    return ERN_OK;
}

static ern_status run_lists(stepping *s, ern_err *err) {
    lists l = {.n_job = 0};
    bench_result r;
    ERN_TRY(read_lists(s->o, s->model, &l, err));
    ERN_TRY(open_steps(s, larger(most_of(l.batch, l.n_batch), l.job[0]),
                       larger(most_of(l.context, l.n_context), l.job[1] + l.job[2]),
                       larger(most_of(l.prompt, l.n_prompt), l.job[1]), err));
    bench_spinners busy;
    ERN_TRY(bench_spin(&busy, (int)options_int(s->o, "busy"), err));
    const char *more = busy.n ? ", busy neighbours" : "";
    ern_status status = ERN_OK;
    print_heading(s);
    for (int i = 0; status == ERN_OK && i < l.n_context; i++) {
        for (int k = 0; status == ERN_OK && k < l.n_batch; k++) {
            status = bench_decode(s->steps, (int32_t)l.batch[k], (int32_t)l.context[i], &r, err);
            if (status == ERN_OK) tell(s, &r, more);
        }
    }
    for (int i = 0; status == ERN_OK && i < l.n_prompt; i++) {
        if (l.prompt[i] < 1) continue;
        status = bench_prefill(s->steps, (int32_t)l.prompt[i], &r, err);
        if (status == ERN_OK) tell(s, &r, more);
    }
    if (status == ERN_OK && l.n_job) status = run_job(s, &l, err);
    bench_spin_end(&busy);
    return status;
}

/* ---- the house's table ----------------------------------------------------------------------------------------- */

/* What a model of a format must reach, in percent of the limit that binds; 0: nothing is asked. */
typedef struct table_row {
    const char *format; /* as bench_format says it, "*": any */
    bool moe, prefill, busy, kv;
    int32_t batch, context, must, aim;
    const char *peers;
} table_row;

/* Source: the issue "The CPU backend at the hardware's limit", section 4. kv: the bytes and the time that this context
 * adds to BASE_LEN. busy: against the rate with all processors free, with one taken. peers: tokens/s of
 * ik_llama.cpp (ik) and llama.cpp (ml) on the machine, 2 cores of a Xeon with AMX, medians of several runs. */
static const table_row table[] = {
    {"int8", .batch = 1, .context = 128, .must = 80, .aim = 92, .peers = "ik Q8_0 35-37, ml Q8_0 49-50"},
    {"int4, head int8", .batch = 1, .context = 128, .must = 70, .aim = 88, .peers = "ik Q4_0 50-51, ml Q4_0 52-65"},
    {"bf16", .batch = 1, .context = 128, .must = 85, .aim = 95, .peers = "ik bf16 25-28, ml bf16 23-25"},
    {"*", .batch = 16, .context = 512, .must = 40, .aim = 60, .peers = "ik Q8_0 139, ml Q8_0 261, at 128"},
    {"*", .batch = 1, .context = 8192, .kv = true, .must = 70, .aim = 85, .peers = "ik Q8_0 21, ml Q8_0 8-9"},
    {"*", .batch = 1, .context = 128, .busy = true, .must = 45, .aim = 60, .peers = "ml keeps 36%, ik 28%"},
    {"*", .prefill = true, .context = 512, .must = 40, .aim = 60, .peers = "ik Q8_0 383-443, ml Q8_0 377-401"},
    {"*", .prefill = true, .context = 2048, .must = 40, .aim = 60, .peers = "ik Q8_0 262-329, ml Q8_0 189-194"},
    {"*", .prefill = true, .context = 8192, .must = 30, .aim = 50, .peers = "ik Q8_0 148, ml Q8_0 66-70"},
    {"*", .moe = true, .batch = 1, .context = 128, .must = 75, .aim = 90, .peers = "ik Q4_0 7-9, ml Q4_0 5.3-5.9"},
    {"*", .moe = true, .batch = 1, .context = 128, .busy = true, .must = 45, .aim = 60,
     .peers = "ml keeps 36%, ik 28%, of 0.3b"},
    {"*", .moe = true, .prefill = true, .context = 512, .must = 25, .aim = 45, .peers = "ik Q4_0 48-54, ml Q4_0 19-20"},
};
enum {
    BASE_LEN = 128, /* context of what rows are held against */
    TABLE_ROWS = sizeof table / sizeof *table
};

/* Rows of this model; a batch 1 row of another format is another model's. Long rows fall out of short models and of
 * quick runs. */
static bool is_ours(const stepping *s, const table_row *t) {
    if (options_flag(s->o, "quick") && t->context > QUICK_LEN) return false;
    if (t->moe != (s->model->config.n_expert > 0) || t->context + 128 > s->model->config.n_position) return false;
    return strcmp(t->format, "*") == 0 || strcmp(t->format, s->format) == 0;
}

typedef struct table_cell {
    double worst, worst_rate;
    const char *limit; /* what the share is of */
    int n;
} table_cell;

static ern_status run_row(stepping *s, const table_row *t, bench_result *r, double *share, ern_err *err) {
    if (t->kv || t->busy) {
        ERN_TRY(bench_decode_against(s->steps, t->context, BASE_LEN, t->busy ? 1 : 0, r, share, err));
    } else {
        ERN_TRY(t->prefill ? bench_prefill(s->steps, t->context, r, err)
                           : bench_decode(s->steps, t->batch, t->context, r, err));
        *share = r->fraction;
    }
    tell(s, r, t->busy ? ", one core busy" : "");
    return ERN_OK;
}

static void print_table(const stepping *s, const table_cell *cell, int runs) {
    (void)printf("\nworst of %d runs, %s, %d threads of %s; peers: tokens/s on a Xeon with AMX\n"
                 "%-34s %10s %7s %-12s %5s %5s\n",
                 runs, s->format, s->threads, ern_cpu_name(), "", "tokens/s", "share", "of", "must", "aim");
    bool unclear = false;
    for (int i = 0; i < TABLE_ROWS; i++) {
        const table_row *t = &table[i];
        char name[96], row[256];
        if (cell[i].n == 0) continue;
        (void)row_name(name, s, &(bench_result){.prefill = t->prefill, .batch = t->batch, .context = t->context},
                       t->busy ? ", one core busy"
                       : t->kv ? ", KV bytes added"
                               : "");
        const bool known = isfinite(cell[i].worst);
        char share[16] = "unclear";
        unclear |= !known;
        if (known) (void)snprintf(share, sizeof share, "%.0f%%", 100 * cell[i].worst);
        const char *verdict = !known ? "unclear" : 100 * cell[i].worst < t->must ? "missed" : "";
        (void)printf("%-34s %10.2f %7s %-12s %4d%% %4d%%  %-7s  %s\n", name, cell[i].worst_rate, share, cell[i].limit,
                     t->must, t->aim, verdict, t->peers);
        (void)snprintf(row, sizeof row, "table, worst of %d: %s, %s, %s", runs, s->model->is_paddle ? "paddle" : "pt",
                       s->format, name);
        bench_book_add(s->book, &(bench_line){.row = row,
                                              .value = cell[i].worst_rate,
                                              .unit = "tokens/s",
                                              .threads = s->threads,
                                              .fraction = known ? cell[i].worst : 0});
    }
    if (unclear)
        (void)printf("unclear, neither passed nor missed: in every run the bytes that a context adds added no time, or "
                     "came at more than %.0f%% of the limit, which is noise, or no limit of this machine is known\n",
                     100 * BENCH_SHARE_MOST);
}

static ern_status run_table(stepping *s, ern_err *err) {
    const int runs = options_flag(s->o, "quick") ? 1 : (int)options_int(s->o, "runs");
    table_cell cell[TABLE_ROWS] = {{0}};
    int32_t n_seq = 1, n_len = 128, n_prompt = 0;
    for (int i = 0; i < TABLE_ROWS; i++) {
        if (!is_ours(s, &table[i])) continue;
        n_seq = table[i].batch > n_seq ? table[i].batch : n_seq;
        int32_t *longest = table[i].prefill ? &n_prompt : &n_len;
        if (table[i].context > *longest) *longest = table[i].context;
    }
    ERN_TRY(open_steps(s, n_seq, n_len, n_prompt, err));
    print_heading(s);
    for (int run = 0; run < runs; run++) {
        for (int i = 0; i < TABLE_ROWS; i++) {
            const table_row *t = &table[i];
            bench_result r;
            double share = 0;
            if (!is_ours(s, t)) continue;
            ERN_TRY(run_row(s, t, &r, &share, err));
            /* of runs that are all unclear, too, the slowest */
            const bool worse = share < cell[i].worst || (share == cell[i].worst && r.tokens_per_s < cell[i].worst_rate);
            if (cell[i].n++ == 0 || worse) {
                cell[i].worst = share;
                cell[i].worst_rate = r.tokens_per_s;
                cell[i].limit = t->busy ? "free rate" : t->kv || r.by_read ? "read" : ern_rate_name(r.rate);
            }
        }
    }
    print_table(s, cell, runs);
    return ERN_OK;
}

static ern_status measure(const options *o, bench_book *book, ern_err *err) {
    stepping step = {.o = o, .book = book};
    ern_status s = open_model(&step, err);
    if (s == ERN_OK) s = options_flag(o, "table") ? run_table(&step, err) : run_lists(&step, err);
    bench_steps_close(step.steps);
    ern_model_close(step.model);
    return s;
}

int cmd_bench_step(int argc, char **argv, char **envp) {
    return bench_book_command(CMD_BENCH_STEP, argc, argv, envp, measure);
}
