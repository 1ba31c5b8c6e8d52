/* ern_synth_write: the folder of a made checkpoint. See synth.h. */
#include "model/synth.h"

#include "model/making.h"
#include "model/quant_plan.h"
#include "model/quant_write.h"
#include "model/synth_tokenizer.h"

enum { TEXT_BYTES_MAX = 64 * 1024 };

static ern_status set_stage(const synth_plan *p, const synth_set *s, const char *dir, const ern_buf *config,
                            synth_progress *g, ern_err *err) {
    ERN_TRY(synth_set_write(s, dir, p->paddle, g, err));
    return making_text(dir, "config.json", config, err);
}

static ern_status stage_plain(const synth_plan *p, const making *at, const ern_buf *config, synth_progress *g,
                              ern_err *err) {
    for (int32_t i = 0; i < p->main.n_tensor; i++) g->all_bytes += synth_tensor_bytes(&p->main.tensor[i]);
    for (int32_t i = 0; i < p->mtp.n_tensor; i++) g->all_bytes += synth_tensor_bytes(&p->mtp.tensor[i]);
    ERN_TRY(making_space(at, g->all_bytes + (16 << 20), err));
    ERN_TRY(set_stage(p, &p->main, at->stage, config, g, err));
    if (p->mtp.n_tensor == 0) return ERN_OK;
    ERN_TRY(making_mtp(at, err));
    return set_stage(p, &p->mtp, at->stage_mtp, config, g, err);
}

static ern_status stage_all(const synth_plan *p, const ern_synth_options *o, const making *at, ern_buf *config,
                            ern_err *err) {
    synth_progress g = {.fn = o->progress, .ud = o->ud};
    ern_buf generation;
    ern_buf_init(&generation, TEXT_BYTES_MAX);
    synth_generation_text(&generation);
    ern_status s = synth_tokenizer_write(at->stage, p->config.n_vocab, err);
    if (s == ERN_OK) s = making_text(at->stage, "generation_config.json", &generation, err);
    ern_buf_free(&generation);
    ERN_TRY(s);
    synth_config_text(p, config);
    if (!o->quant || !ern_quant_any(o->quant)) return stage_plain(p, at, config, &g, err);
    const quant_source from = {.config = &p->config, .has_mtp = p->config.n_mtp > 0, .seed = o->seed};
    const quant_writing w = {.plan = o->quant, .shard_bytes = o->shard_bytes, .progress = o->progress, .ud = o->ud};
    return quant_write(&from, &w, at, config, err);
}

ern_status ern_synth_write(const ern_synth_options *o, ern_err *err) {
    synth_plan plan;
    making at;
    ern_buf config;
    ERN_TRY(synth_plan_make(&plan, o, err));
    ern_buf_init(&config, TEXT_BYTES_MAX);
    ern_status s = making_begin(&at, o->dir, o->force, err);
    if (s == ERN_OK) s = making_end(&at, stage_all(&plan, o, &at, &config, err), err);
    ern_buf_free(&config);
    synth_plan_free(&plan);
    return s;
}
