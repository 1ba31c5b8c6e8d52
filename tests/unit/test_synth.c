/* Made checkpoints: the formula against one written here from docs/model.md 8, the published geometry to the letter,
 * and the behaviour of ern_synth_write as a command. */
#include "st_edit.h"

#include <dirent.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#include "model/config.h"
#include "model/synth.h"

/* ---- the formula again, in integers and doubles --------------------------------------------------------------------
 */

static uint64_t mix(uint64_t key, uint64_t index) {
    uint64_t z = key + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static float formula(uint64_t seed, const char *name, uint64_t index, double scale, double offset) {
    uint64_t key = 0xcbf29ce484222325u ^ mix(seed, 0);
    for (; *name; name++) key = (key ^ (uint64_t)(unsigned char)*name) * 0x100000001b3u;
    double u = (2.0 * (double)(mix(key, index) >> 41) + 1.0 - 8388608.0) / 8388608.0;
    return (float)(offset + (double)(float)((double)(float)scale * u));
}

static uint32_t bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

/* To nearest, ties to even, by comparing the two neighbours. */
static uint16_t half(float f) {
    uint32_t down = bits(f) >> 16, rest = bits(f) & 0xffff;
    return (uint16_t)(rest > 0x8000 || (rest == 0x8000 && down % 2) ? down + 1 : down);
}

static void golden(void **state) {
    (void)state;
    /* From the Python lines of docs/model.md 8. */
    assert_int_equal(half(formula(7, "model.embed_tokens.weight", 0, sqrt(18.75 / 64), 0)), 0xbbab);
    assert_int_equal(half(formula(7, "model.layers.1.mlp.experts.3.down_proj.weight", 80 * 44 - 1, sqrt(3.0 / 44), 0)),
                     0xbd3a);
    assert_int_equal(half(formula(7, "model.norm.weight", 5, 0.25, 1)), 0x3f66);
    assert_int_equal(bits(formula(7, "model.layers.1.mlp.gate.weight", 17, sqrt(3.0 / 80), 0)), 0xbe141e8f);
    assert_int_equal(bits(formula(7, "model.layers.1.mlp.moe_statics.e_score_correction_bias", 2, 0.02, 0)),
                     0xbc0bee73);
    const struct {
        const char *name;
        int32_t n_in;
        double scale, offset;
    } t[] = {{"model.embed_tokens.weight", 80, sqrt(18.75 / 80), 0},
             {"lm_head.weight", 80, sqrt(18.75 / 80), 0},
             {"model.layers.0.self_attn.o_proj.weight", 160, sqrt(3.0 / 160), 0},
             {"model.layers.1.mlp.gate.weight", 80, sqrt(3.0 / 80), 0},
             {"model.mtp_linear_proj.0.weight", 160, sqrt(3.0 / 160), 0},
             {"model.mtp_emb_norm.0.weight", 80, 0.25, 1},
             {"model.mtp_block.0.post_attention_layernorm.weight", 80, 0.25, 1},
             {"model.layers.1.mlp.moe_statics.e_score_correction_bias", 8, 0.02, 0}};
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        float scale, offset;
        ern_synth_scale(t[i].name, t[i].n_in, &scale, &offset);
        assert_int_equal(bits(scale), bits((float)t[i].scale));
        assert_int_equal(bits(offset), bits((float)t[i].offset));
        for (uint64_t k = 0; k < 2000; k++) {
            float expected = formula(99, t[i].name, k * k * k, t[i].scale, t[i].offset);
            assert_int_equal(bits(ern_synth_f32(99, t[i].name, k * k * k, scale, offset)), bits(expected));
            assert_int_equal(ern_synth_bf16(99, t[i].name, k * k * k, scale, offset), half(expected));
        }
    }
}

/* ---- the files -----------------------------------------------------------------------------------------------------
 */

static void check_linear(const ern_linear *w, uint64_t seed, const char *name, double scale) {
    for (int32_t o = 0; o < w->n_out; o += 3)
        for (int32_t i = 0; i < w->n_in; i++) {
            uint64_t index = (uint64_t)o * (uint64_t)w->n_in + (uint64_t)i;
            uint32_t expected = (uint32_t)half(formula(seed, name, index, scale, 0)) << 16;
            assert_int_equal(bits(ern_linear_at(w, o, i)), expected);
        }
}

static void elements(void **state) {
    (void)state;
    for (int paddle = 0; paddle < 2; paddle++) {
        made_model made = made_model_open("tiny-moe", paddle, 41);
        const ern_model *m = made.model;
        check_linear(&m->head, 41, "model.embed_tokens.weight", sqrt(18.75 / 80));
        check_linear(&m->layer[0].q, 41, "model.layers.0.self_attn.q_proj.weight", sqrt(3.0 / 80));
        check_linear(&m->layer[3].v, 41, "model.layers.3.self_attn.v_proj.weight", sqrt(3.0 / 80));
        check_linear(&m->layer[0].ffn.up, 41, "model.layers.0.mlp.up_proj.weight", sqrt(3.0 / 80));
        check_linear(&m->layer[2].expert[7].gate, 41, "model.layers.2.mlp.experts.7.gate_proj.weight", sqrt(3.0 / 80));
        check_linear(&m->layer[2].shared.down, 41, "model.layers.2.mlp.shared_experts.down_proj.weight",
                     sqrt(3.0 / 88));
        check_linear(&m->mtp.proj, 41, "model.mtp_linear_proj.0.weight", sqrt(3.0 / 160));
        check_linear(&m->mtp.layer.o, 41, "model.mtp_block.0.self_attn.o_proj.weight", sqrt(3.0 / 160));
        for (uint64_t i = 0; i < 80; i++) {
            assert_int_equal(m->norm[i], half(formula(41, "model.norm.weight", i, 0.25, 1)));
            assert_int_equal(m->mtp.hidden_norm[i], half(formula(41, "model.mtp_hidden_norm.0.weight", i, 0.25, 1)));
        }
        for (uint64_t i = 0; i < 640; i++)
            assert_int_equal(bits(m->layer[1].router[i]),
                             bits(formula(41, "model.layers.1.mlp.gate.weight", i, sqrt(3.0 / 80), 0)));
        for (uint64_t i = 0; i < 8; i++)
            assert_int_equal(bits(m->layer[1].router_bias[i]),
                             bits(formula(41, "model.layers.1.mlp.moe_statics.e_score_correction_bias", i, 0.02, 0)));
        made_model_close(&made);
    }
}

/* Any cut of any tensor gives the same elements as the whole: what lets threads write pieces. */
static void pieces(void **state) {
    (void)state;
    synth_plan p;
    ern_err err;
    assert_int_equal(synth_plan_make(&p, &(ern_synth_options){.shape = "tiny-moe", .paddle = true, .seed = 3}, &err),
                     ERN_OK);
    unsigned seed = 17;
    for (int32_t k = 0; k < p.main.n_tensor; k++) {
        const synth_tensor *t = &p.main.tensor[k];
        uint64_t bytes = synth_tensor_bytes(t), each = t->f32 ? 4 : 2, n = bytes / each;
        unsigned char *whole = malloc(bytes), *part = malloc(bytes);
        assert_true(whole && part);
        synth_tensor_fill(t, 0, n, whole);
        for (uint64_t at = 0, run; at < n; at += run) {
            run = 1 + (uint64_t)rand_r(&seed) % (n / 3 + 1);
            if (run > n - at) run = n - at;
            synth_tensor_fill(t, at, run, part + at * each);
        }
        assert_memory_equal(whole, part, bytes);
        free(whole);
        free(part);
    }
    synth_plan_free(&p);
}

/* The correction bias must matter: without it, some choices of experts differ, but not most. */
static void bias_matters(void **state) {
    (void)state;
    made_model made = made_model_open("tiny-moe", false, 1);
    const ern_layer *l = &made.model->layer[1];
    int changed = 0;
    enum { TRIES = 2000, E = 8, K = 3, D = 80 };
    for (int t = 0; t < TRIES; t++) {
        double p[E], sum = 0;
        unsigned pick[2] = {0, 0};
        for (int e = 0; e < E; e++) {
            double dot = 0; /* an input of variance 1, as a norm gives */
            for (int i = 0; i < D; i++)
                dot += (double)l->router[e * D + i] * (double)formula(5, "x", (uint64_t)(t * D + i), sqrt(3.0), 0);
            sum += p[e] = exp(dot);
        }
        for (int with = 0; with < 2; with++)
            for (int k = 0; k < K; k++) {
                int best = -1;
                double top = -1e9;
                for (int e = 0; e < E; e++) {
                    double score = p[e] / sum + (with ? (double)l->router_bias[e] : 0);
                    if (pick[with] >> e & 1 || score <= top) continue;
                    top = score;
                    best = e;
                }
                pick[with] |= 1u << best;
            }
        changed += pick[0] != pick[1];
    }
    print_message("the correction bias changes %d of %d choices\n", changed, TRIES);
    assert_true(changed > TRIES / 50 && changed < TRIES / 2);
    made_model_close(&made);
}

/* ---- the published geometry ----------------------------------------------------------------------------------------
 */

static uint64_t set_bytes(const synth_set *s) {
    uint64_t sum = 0;
    for (int32_t i = 0; i < s->n_tensor; i++) sum += synth_tensor_bytes(&s->tensor[i]);
    return sum;
}

static void shape_is(const synth_set *s, const char *name, int32_t n_dim, int64_t rows, int64_t cols, bool f32) {
    for (int32_t i = 0; i < s->n_tensor; i++) {
        const synth_tensor *t = &s->tensor[i];
        if (strcmp(t->name, name) != 0) continue;
        assert_int_equal(t->n_dim, n_dim);
        assert_int_equal(t->turned ? t->n_in : t->n_out, rows);
        assert_int_equal(t->turned ? t->n_out : t->n_in, cols);
        assert_int_equal(t->f32, f32);
        return;
    }
    fail_msg("no tensor %s", name);
}

static void published_geometry(void **state) {
    (void)state;
    static const struct {
        const char *shape;
        bool paddle;
        int32_t n_main, n_mtp;
        uint64_t bytes; /* with MTP */
    } t[] = {{"0.3b", false, 164, 0, 721496064},
             {"0.3b", true, 110, 0, 721496064},
             {"21b-a3b", false, 5504, 0, 43906162432},
             {"21b-a3b", true, 3680, 9, 43906162432}};
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        synth_plan p;
        ern_err err;
        ern_synth_options o = {.shape = t[i].shape, .paddle = t[i].paddle};
        assert_int_equal(synth_plan_make(&p, &o, &err), ERN_OK);
        assert_int_equal(p.main.n_tensor, t[i].n_main);
        assert_int_equal(p.mtp.n_tensor, t[i].n_mtp);
        assert_int_equal(set_bytes(&p.main) + set_bytes(&p.mtp), t[i].bytes);
        assert_int_equal(p.main.n_file, i < 2 ? 1 : 9);
        if (i == 0) {
            shape_is(&p.main, "model.layers.17.self_attn.q_proj.weight", 2, 2048, 1024, false);
            shape_is(&p.main, "model.layers.17.self_attn.o_proj.weight", 2, 1024, 2048, false);
            shape_is(&p.main, "model.layers.0.mlp.down_proj.weight", 2, 1024, 3072, false);
            shape_is(&p.main, "model.norm.weight", 1, 1, 1024, false);
        } else if (i == 1) {
            shape_is(&p.main, "ernie.embed_tokens.weight", 2, 103424, 1024, false);
            shape_is(&p.main, "ernie.layers.17.self_attn.qkv_proj.weight", 2, 1024, 2560, false);
            shape_is(&p.main, "ernie.layers.17.mlp.up_gate_proj.weight", 2, 1024, 6144, false);
        } else if (i == 2) {
            shape_is(&p.main, "model.layers.1.mlp.gate.weight", 2, 64, 2560, true);
            shape_is(&p.main, "model.layers.27.mlp.moe_statics.e_score_correction_bias", 2, 1, 64, true);
            shape_is(&p.main, "model.layers.27.mlp.experts.63.down_proj.weight", 2, 2560, 1536, false);
            shape_is(&p.main, "model.mtp_linear_proj.0.weight", 2, 2560, 5120, false);
        } else {
            shape_is(&p.main, "ernie.layers.1.mlp.gate.weight", 2, 2560, 64, true);
            shape_is(&p.main, "ernie.layers.27.mlp.shared_experts.up_gate_proj.weight", 2, 2560, 6144, false);
            shape_is(&p.mtp, "ernie.mtp_linear_proj.0.weight", 2, 5120, 2560, false);
            shape_is(&p.mtp, "ernie.mtp_block.0.mlp.up_gate_proj.weight", 2, 2560, 24576, false);
        }
        ern_buf text;
        ern_config c;
        config_hints h;
        ern_buf_init(&text, 1 << 16);
        synth_config_text(&p, &text);
        assert_int_equal(config_parse(&c, &h, text.data, text.len, "made", &err), ERN_OK);
        assert_int_equal(c.n_layer, i < 2 ? 18 : 28);
        assert_int_equal(c.n_head_dim, 128);
        assert_int_equal(c.moe_last, i < 2 ? 0 : 27);
        assert_int_equal(c.n_position, 131072);
        assert_true(c.tied_head && c.rope_theta > 499999 && c.rope_theta < 500001);
        assert_int_equal(h.torch_dtype, !t[i].paddle);
        assert_int_equal(strstr(text.data, "head_dim") == NULL, i == 3); /* absent in the published Paddle file */
        ern_buf_free(&text);
        synth_plan_free(&p);
    }
}

/* ---- the command ---------------------------------------------------------------------------------------------------
 */

static int count_files(const char *dir) {
    int n = 0;
    DIR *d = opendir(dir);
    if (!d) return -1;
    for (struct dirent *e; (e = readdir(d));) n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

static void sharded(void **state) {
    (void)state;
    char dir[64], path[128];
    ern_err err;
    for (int paddle = 0; paddle < 2; paddle++) {
        made_model single = made_model_open("tiny-moe", paddle, 8);
        made_dir(dir);
        ern_synth_options o = {.shape = "tiny-moe", .dir = dir, .paddle = paddle, .seed = 8, .shard_bytes = 200000};
        assert_int_equal(ern_synth_write(&o, &err), ERN_OK);
        snprintf(path, sizeof path, "%s/model.safetensors.index.json", dir);
        assert_int_equal(access(path, F_OK), 0);
        ern_model *m;
        ern_status s = ern_model_open(&m, &(ern_model_options){.dir = dir}, &err);
        if (s != ERN_OK) fail_msg("%s", err.text);
        assert_int_equal(m->weight_bytes, single.model->weight_bytes);
        assert_memory_equal(m->embed, single.model->embed, 1024 * 80 * sizeof(ern_bf16));
        check_linear(&m->layer[2].expert[5].up, 8, "model.layers.2.mlp.experts.5.up_proj.weight", sqrt(3.0 / 80));
        check_linear(&m->mtp.layer.ffn.down, 8, "model.mtp_block.0.mlp.down_proj.weight", sqrt(3.0 / 200));
        DIR *d = opendir(dir);
        assert_non_null(d);
        for (struct dirent *e; (e = readdir(d));) { /* no file above the limit */
            struct stat st;
            if (strncmp(e->d_name, "model-", 6) != 0) continue;
            assert_int_equal(fstatat(dirfd(d), e->d_name, &st, 0), 0);
            assert_true(st.st_size <= 200000);
        }
        closedir(d);
        ern_model_close(m);
        made_dir_remove(dir);
        made_model_close(&single);
    }
}

static void layers_overridden(void **state) {
    (void)state;
    for (int32_t n = 1; n <= 6; n++) {
        made_model m = made_model_open_layers("tiny-moe", n % 2, 2, n);
        assert_int_equal(m.model->config.n_layer, n);
        assert_int_equal(m.model->layer[n - 1].is_moe, n == 2);
        made_model_close(&m);
    }
}

static bool stop_at_once(void *ud, const char *what, uint64_t done, uint64_t all) {
    (void)what, (void)done, (void)all;
    ++*(int *)ud;
    return false;
}

static void refusals_and_force(void **state) {
    (void)state;
    char dir[64], path[128], inside[160];
    ern_err err;
    int calls = 0;
    made_dir(dir);
    snprintf(path, sizeof path, "%s/new", dir);
    ern_synth_options o = {.shape = "tiny-moe", .dir = path, .paddle = true, .progress = stop_at_once, .ud = &calls};
    assert_int_equal(ern_synth_write(&o, &err), ERN_ERR_CANCELLED);
    assert_int_equal(calls, 1);
    assert_int_equal(count_files(path), -1); /* the folder it made is gone again */
    o.progress = NULL;
    assert_int_equal(ern_synth_write(&o, &err), ERN_OK);
    int n_file = count_files(path);
    assert_int_equal(ern_synth_write(&o, &err), ERN_ERR_USAGE);
    assert_non_null(strstr(err.text, "holds a model already"));
    assert_int_equal(count_files(path), n_file);
    snprintf(inside, sizeof inside, "%s/notes.txt", path);
    text_write(path, "notes.txt", "mine");
    o.force = true;
    o.progress = stop_at_once;
    assert_int_equal(ern_synth_write(&o, &err), ERN_ERR_CANCELLED); /* leaves the old one whole */
    ern_model *m;
    assert_int_equal(ern_model_open(&m, &(ern_model_options){.dir = path}, &err), ERN_OK);
    ern_model_close(m);
    o.progress = NULL;
    o.paddle = false; /* its mtp/ must not stay behind */
    o.shape = "tiny-dense";
    assert_int_equal(ern_synth_write(&o, &err), ERN_OK);
    assert_int_equal(access(inside, F_OK), 0);
    assert_int_equal(ern_model_open(&m, &(ern_model_options){.dir = path}, &err), ERN_OK);
    assert_true(!m->is_paddle && !m->has_mtp);
    ern_model_close(m);
    static const ern_synth_options bad[] = {
        {.shape = "huge", .dir = "/tmp/ernest-test-none"},
        {.shape = NULL, .dir = "/tmp/ernest-test-none"},
        {.shape = "tiny-moe", .dir = ""},
        {.shape = "tiny-moe", .dir = "/tmp/ernest-test-none", .n_layer = 129},
        {.shape = "tiny-moe", .dir = "/tmp/ernest-test-none", .n_layer = -1},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(ern_synth_write(&bad[i], &err), ERN_ERR_USAGE);
    assert_int_equal(access("/tmp/ernest-test-none", F_OK), -1);
    o.dir = "/tmp/ernest-test-none/deeper";
    assert_int_equal(ern_synth_write(&o, &err), ERN_ERR_FILE);
    assert_non_null(strstr(err.text, "No such file"));
    o.dir = "/proc/self";
    assert_int_equal(ern_synth_write(&o, &err), ERN_ERR_FILE);
    made_dir_remove(dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(golden),
        cmocka_unit_test(elements),
        cmocka_unit_test(pieces),
        cmocka_unit_test(bias_matters),
        cmocka_unit_test(published_geometry),
        cmocka_unit_test(sharded),
        cmocka_unit_test(layers_overridden),
        cmocka_unit_test(refusals_and_force),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
