/* The table of weights: both layouts and every published variation give the same elements; every broken variant is
 * refused by the names of the file and the tensor, with what was expected and found. */
#include "st_edit.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <time.h>
#include <cmocka.h>

#include "base/os.h"
#include "model/checkpoint.h"

/* ---- comparing models ----------------------------------------------------------------------------------------------
 */

static void same_linear(const ern_linear *a, const ern_linear *b) {
    assert_int_equal(a->n_out, b->n_out);
    assert_int_equal(a->n_in, b->n_in);
    for (int32_t o = 0; o < a->n_out; o++)
        for (int32_t i = 0; i < a->n_in; i++)
            if (memcmp(&(float){ern_linear_at(a, o, i)}, &(float){ern_linear_at(b, o, i)}, sizeof(float)) != 0)
                fail_msg("element (%d, %d): %g and %g", o, i, (double)ern_linear_at(a, o, i),
                         (double)ern_linear_at(b, o, i));
}

static void same_ffn(const ern_ffn *a, const ern_ffn *b) {
    same_linear(&a->gate, &b->gate);
    same_linear(&a->up, &b->up);
    same_linear(&a->down, &b->down);
}

static void same_layer(const ern_config *c, const ern_layer *a, const ern_layer *b) {
    size_t d = (size_t)c->n_hidden, e = (size_t)c->n_expert;
    assert_memory_equal(a->attn_norm, b->attn_norm, d * sizeof(ern_bf16));
    assert_memory_equal(a->ffn_norm, b->ffn_norm, d * sizeof(ern_bf16));
    same_linear(&a->q, &b->q);
    same_linear(&a->k, &b->k);
    same_linear(&a->v, &b->v);
    same_linear(&a->o, &b->o);
    assert_int_equal(a->is_moe, b->is_moe);
    if (!a->is_moe) {
        same_ffn(&a->ffn, &b->ffn);
        return;
    }
    assert_memory_equal(a->router, b->router, e * d * sizeof(float));
    assert_int_equal(a->router_bias != NULL, b->router_bias != NULL);
    if (a->router_bias) assert_memory_equal(a->router_bias, b->router_bias, e * sizeof(float));
    for (size_t k = 0; k < e; k++) same_ffn(&a->expert[k], &b->expert[k]);
    same_ffn(&a->shared, &b->shared);
}

static void same_model(const ern_model *a, const ern_model *b) {
    const ern_config *c = &a->config;
    size_t d = (size_t)c->n_hidden;
    assert_int_equal(c->n_layer, b->config.n_layer);
    assert_memory_equal(a->embed, b->embed, (size_t)c->n_vocab * d * sizeof(ern_bf16));
    assert_memory_equal(a->norm, b->norm, d * sizeof(ern_bf16));
    same_linear(&a->head, &b->head);
    for (int32_t i = 0; i < c->n_layer; i++) same_layer(c, &a->layer[i], &b->layer[i]);
    assert_int_equal(a->has_mtp, b->has_mtp);
    if (!a->has_mtp) return;
    assert_memory_equal(a->mtp.emb_norm, b->mtp.emb_norm, d * sizeof(ern_bf16));
    assert_memory_equal(a->mtp.hidden_norm, b->mtp.hidden_norm, d * sizeof(ern_bf16));
    same_linear(&a->mtp.proj, &b->mtp.proj);
    same_layer(c, &a->mtp.layer, &b->mtp.layer);
}

/* ---- a folder to edit ----------------------------------------------------------------------------------------------
 */

/* A made tiny-moe, its weights as a list, and a second folder with the same config to write variants into. */
typedef struct bench {
    made_model made;
    st_list list, mtp; /* mtp: of the mtp/ folder; empty in the PyTorch layout */
    char dir[64];
    bool paddle;
} bench;

static void copy_config(const char *from, const char *to, const char *cut, const char *put) {
    char path[128], text[4096] = {0}, out[4200];
    snprintf(path, sizeof path, "%s/config.json", from);
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    assert_true(fread(text, 1, sizeof text - 1, f) > 0);
    fclose(f);
    const char *at = cut ? strstr(text, cut) : text;
    assert_non_null(at);
    snprintf(out, sizeof out, "%.*s%s%s", (int)(at - text), text, put ? put : "", at + (cut ? strlen(cut) : 0));
    text_write(to, "config.json", out);
}

static bench bench_open(bool paddle) {
    bench b = {
        .made = made_model_open("tiny-moe", paddle, 5), .list = st_list_new(), .mtp = st_list_new(), .paddle = paddle};
    st_list_read(&b.list, b.made.dir, "model.safetensors");
    if (paddle) st_list_read(&b.mtp, b.made.dir, "mtp/model.safetensors");
    made_dir(b.dir);
    copy_config(b.made.dir, b.dir, NULL, NULL);
    return b;
}

static void bench_close(bench *b) {
    made_dir_remove(b->dir);
    st_list_free(&b->list);
    st_list_free(&b->mtp);
    made_model_close(&b->made);
}

static void bench_write(const bench *b) {
    char mtp[80];
    st_list_write(&b->list, 0, b->list.n, b->dir, "model.safetensors");
    if (!b->mtp.n) return;
    snprintf(mtp, sizeof mtp, "%s/mtp", b->dir);
    (void)mkdir(mtp, 0777);
    st_list_write(&b->mtp, 0, b->mtp.n, mtp, "model.safetensors");
}

static ern_model *must_open(const char *dir) {
    ern_model *m;
    ern_err err;
    ern_status s = ern_model_open(&m, &(ern_model_options){.dir = dir}, &err);
    if (s != ERN_OK) fail_msg("%s", err.text);
    return m;
}

/* Write the edited list, open it, compare with the model it came from. */
static void still_same(const bench *b) {
    bench_write(b);
    ern_model *m = must_open(b->dir);
    same_model(m, b->made.model);
    ern_model_close(m);
}

/* Processor time of this process: what an algorithm costs, whoever else uses the machine. */
static int64_t cpu_us(void) {
    struct timespec t;
    (void)clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

/* Opening must fail, in one line that holds all the words, in well under a second of processor time, with nothing left
 * behind. */
#define refused(dir, ...) refused_words(__LINE__, (dir), (const char *const[]){__VA_ARGS__, NULL})
static void refused_words(int line, const char *dir, const char *const *word) {
    ern_model *m = NULL;
    ern_err err = {0};
    int64_t begin = cpu_us();
    ern_status s = ern_model_open(&m, &(ern_model_options){.dir = dir}, &err);
    if (s != ERN_ERR_FILE || m) fail_msg("line %d: status %d, text %s", line, s, err.text);
    int64_t took = cpu_us() - begin;
    if (took > 1000000) fail_msg("line %d: took %lld us", line, (long long)took);
    if (strchr(err.text, '\n')) fail_msg("line %d: more than one line: %s", line, err.text);
    for (; *word; word++)
        if (!strstr(err.text, *word)) fail_msg("line %d: expected the words \"%s\" in: %s", line, *word, err.text);
}

static const char *tensor(const bench *b, const char *tail) {
    static char name[4][128];
    static int turn;
    char *out = name[turn++ % 4];
    snprintf(out, sizeof name[0], "%s.%s", b->paddle ? "ernie" : "model", tail);
    return out;
}

/* Swap the two dims of a matrix and its data with them. */
static void transpose(st_entry *e) {
    size_t rows = (size_t)e->dim[0], cols = (size_t)e->dim[1], each = e->bytes / rows / cols;
    unsigned char *to = malloc(e->bytes);
    assert_non_null(to);
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) memcpy(to + (c * rows + r) * each, e->data + (r * cols + c) * each, each);
    free(e->data);
    e->data = to;
    e->dim[0] = (long long)cols;
    e->dim[1] = (long long)rows;
}

/* ---- what loads ----------------------------------------------------------------------------------------------------
 */

static void layouts_agree(void **state) {
    (void)state;
    static const char *const shape[] = {"tiny-dense", "tiny-moe"};
    for (int i = 0; i < 2; i++) {
        made_model pt = made_model_open(shape[i], false, 11), paddle = made_model_open(shape[i], true, 11);
        made_model other = made_model_open(shape[i], false, 12);
        assert_false(pt.model->is_paddle);
        assert_true(paddle.model->is_paddle);
        same_model(pt.model, paddle.model);
        assert_int_equal(pt.model->weight_bytes, paddle.model->weight_bytes);
        assert_int_equal(pt.model->has_mtp, i == 1);
        assert_true(pt.model->fingerprint != other.model->fingerprint);
        assert_true(pt.model->fingerprint != paddle.model->fingerprint);
        ern_model *again = must_open(pt.dir);
        assert_true(again->fingerprint == pt.model->fingerprint);
        ern_model_close(again);
        made_model_close(&pt);
        made_model_close(&paddle);
        made_model_close(&other);
    }
}

static void windows_are_mapped(void **state) {
    (void)state;
    made_model m = made_model_open("tiny-moe", true, 3);
    const ern_layer *l = &m.model->layer[0];
    const int32_t q = 160, kv = 32, f = 200;
    assert_ptr_equal(l->k.data, (const ern_bf16 *)l->q.data + q);
    assert_ptr_equal(l->v.data, (const ern_bf16 *)l->q.data + q + kv);
    assert_int_equal(l->v.stride, q + 2 * kv);
    assert_ptr_equal(l->ffn.up.data, (const ern_bf16 *)l->ffn.gate.data + f);
    assert_int_equal(l->ffn.up.stride, 2 * f);
    assert_ptr_equal(m.model->head.data, m.model->embed);
    assert_null(l->expert);
    assert_null(l->router);
    assert_null(l->shared.gate.data);
    assert_non_null(m.model->layer[2].shared.gate.data);
    assert_false(m.model->layer[3].is_moe);
    made_model_close(&m);
}

static void variations_load(void **state) {
    (void)state;
    for (int paddle = 0; paddle < 2; paddle++) {
        bench b = bench_open(paddle);
        still_same(&b);                           /* the list itself */
        for (int shift = 1; shift < 8; shift++) { /* data at every address modulo 8 */
            b.list.shift = b.mtp.shift = shift;
            still_same(&b);
        }
        b.list.shift = b.mtp.shift = 0;
        for (int i = 0; i < b.list.n; i++) /* bf16 as numpy spells it */
            if (strcmp(b.list.entry[i].dtype, "BF16") == 0) strcpy(b.list.entry[i].dtype, i % 2 ? "U16" : "I16");
        still_same(&b);
        st_entry *router = st_list_find(&b.list, tensor(&b, "layers.1.mlp.gate.weight")); /* router turned */
        transpose(router);
        still_same(&b);
        st_entry *bias = st_list_find(&b.list, tensor(&b, "layers.1.mlp.moe_statics.e_score_correction_bias"));
        bias->n_dim = 1; /* [E] for [1, E] */
        bias->dim[0] = bias->dim[1];
        still_same(&b);
        st_entry *proj = st_list_find(paddle ? &b.mtp : &b.list, tensor(&b, "mtp_linear_proj.0.weight"));
        transpose(proj); /* [2D, D] or [D, 2D], told by shape */
        still_same(&b);
        const st_entry *embed = st_list_find(&b.list, tensor(&b, "embed_tokens.weight"));
        st_list_add(&b.list, "lm_head.weight", "BF16", 2, (const int64_t[]){1024, 80}, embed->bytes, embed->data);
        still_same(&b); /* tied head stored all the same */
        st_list_add(&b.list, tensor(&b, "layers.1.mlp.experts.0.up_gate_proj.weight_1"), "U8", 1, (const int64_t[]){1},
                    1, "x");
        st_list_add(&b.list, tensor(&b, "resampler_model.mlp.0.weight"), "U8", 1, (const int64_t[]){1}, 1, "x");
        still_same(&b); /* of the vision models */
        if (paddle) {
            embed = st_list_find(&b.list, "ernie.embed_tokens.weight");
            st_list_add(&b.mtp, "ernie.embed_tokens.weight", "BF16", 2, (const int64_t[]){1024, 80}, embed->bytes,
                        embed->data);
            still_same(&b); /* an mtp folder that brings its own copy of the shared tensors */
        }
        bench_close(&b);
    }
}

static void shards_load(void **state) {
    (void)state;
    for (int each = 1; each < 90; each += 29) {
        bench b = bench_open(false);
        st_list_write_shards(&b.list, each, b.dir);
        ern_model *m = must_open(b.dir);
        same_model(m, b.made.model);
        ern_model_close(m);
        bench_close(&b);
    }
}

/* What an index says beside the places of tensors, and what lies beside it. */
static void shards_refused(void **state) {
    (void)state;
    static const char *const total[] = {"-1", "\"much\"", "99999999999"};
    bench b = bench_open(false);
    char path[160], *text;
    size_t len;
    ern_err err;
    st_list_write_shards(&b.list, 30, b.dir);
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", b.dir);
    assert_int_equal(ern_file_read(&text, &len, path, 1 << 20, &err), ERN_OK);
    char *rest = strstr(text, ":0},") + 2, *changed = malloc(len + 64);
    assert_non_null(changed);
    for (size_t i = 0; i < sizeof total / sizeof *total; i++) {
        snprintf(changed, len + 64, "{\"metadata\":{\"total_size\":%s%s", total[i], rest);
        text_write(b.dir, "model.safetensors.index.json", changed);
        refused(b.dir, "index.json", "total_size");
    }
    text_write(b.dir, "model.safetensors.index.json", text);
    st_list_write(&b.list, 0, b.list.n, b.dir, "model.safetensors");
    refused(b.dir, "index.json", "does not name model.safetensors");
    snprintf(path, sizeof path, "%s/model.safetensors", b.dir);
    assert_int_equal(unlink(path), 0);
    ern_model_close(must_open(b.dir));
    snprintf(path, sizeof path, "%s/model-00001-of-%05d.safetensors", b.dir, (b.list.n + 29) / 30);
    assert_int_equal(unlink(path), 0);
    refused(b.dir, "model-00001-of-", "is missing", "tensor model.", "fetch");
    free(changed);
    free(text);
    bench_close(&b);
}

/* An MTP folder of another model whose shapes are the same. */
static void mtp_of_another(void **state) {
    (void)state;
    bench b = bench_open(true);
    char mtp[80];
    bench_write(&b);
    snprintf(mtp, sizeof mtp, "%s/mtp", b.dir);
    text_write(mtp, "config.json", "{\"rope_theta\":1234}");
    refused(b.dir, "mtp/config.json", "rope_theta is 1234", "500000");
    text_write(mtp, "config.json", "{\"rope_theta\":500000}");
    still_same(&b);
    bench_close(&b);
}

/* A download cache: every file of the folder is a link into a store of blobs. */
static void links_load(void **state) {
    (void)state;
    bench b = bench_open(false);
    char from[96], to[96];
    snprintf(from, sizeof from, "%s/model.safetensors", b.made.dir);
    snprintf(to, sizeof to, "%s/model.safetensors", b.dir);
    assert_int_equal(symlink(from, to), 0);
    ern_model *m = must_open(b.dir);
    same_model(m, b.made.model);
    ern_model_close(m);
    assert_int_equal(unlink(to), 0);
    assert_int_equal(symlink("../blobs/gone", to), 0); /* the store was moved or tidied */
    refused(b.dir, "model.safetensors", "link", "fetch");
    assert_int_equal(unlink(to), 0);
    refused(b.dir, "holds no weights", "model.safetensors");
    bench_close(&b);
}

/* The MTP tensors in the main files (PyTorch habit), in mtp/ (Paddle habit), in a named folder, or nowhere. */
static void mtp_places(void **state) {
    (void)state;
    bench b = bench_open(true);
    char other[64], inside[96];
    ern_err err;
    ern_model *m;
    bench_write(&b);
    made_dir(other);
    st_list_write(&b.mtp, 0, b.mtp.n, other, "model.safetensors");
    snprintf(inside, sizeof inside, "%s/mtp/model.safetensors", b.dir);
    assert_int_equal(unlink(inside), 0);
    m = must_open(b.dir);
    assert_false(m->has_mtp);
    ern_model_close(m);
    assert_int_equal(ern_model_open(&m, &(ern_model_options){.dir = b.dir, .mtp_dir = other}, &err), ERN_OK);
    same_model(m, b.made.model);
    ern_model_close(m);
    assert_int_equal(ern_model_open(&m, &(ern_model_options){.dir = b.dir, .mtp_dir = "/tmp/ernest-test-none"}, &err),
                     ERN_ERR_FILE);
    for (int i = 0; i < b.mtp.n; i++) {
        st_entry *e = &b.mtp.entry[i];
        int64_t dim[2] = {e->dim[0], e->dim[1]};
        st_list_add(&b.list, e->name, e->dtype, e->n_dim, dim, e->bytes, e->data);
    }
    st_list_write(&b.list, 0, b.list.n, b.dir, "model.safetensors");
    m = must_open(b.dir);
    same_model(m, b.made.model);
    ern_model_close(m);
    assert_int_equal(ern_model_open(&m, &(ern_model_options){.dir = b.dir, .mtp_dir = b.dir}, &err), ERN_OK);
    same_model(m, b.made.model); /* a named folder that is the model's own */
    ern_model_close(m);
    assert_int_equal(ern_model_open(&m, &(ern_model_options){.dir = b.dir, .mtp_dir = other}, &err), ERN_OK);
    same_model(m, b.made.model); /* both: the named one */
    ern_model_close(m);
    made_dir_remove(other);
    bench_close(&b);
}

/* A router in bf16 becomes the same numbers in f32. */
static void router_bf16(void **state) {
    (void)state;
    for (int paddle = 0; paddle < 2; paddle++) {
        bench b = bench_open(paddle);
        st_entry *e = st_list_find(&b.list, tensor(&b, "layers.2.mlp.gate.weight"));
        size_t n = e->bytes / sizeof(float);
        for (size_t i = 0; i < n; i++) {
            float v;
            memcpy(&v, e->data + i * sizeof v, sizeof v);
            ern_bf16 h = ern_bf16_from_f32(v);
            memcpy(e->data + i * sizeof h, &h, sizeof h);
        }
        e->bytes = n * sizeof(ern_bf16);
        strcpy(e->dtype, "BF16");
        bench_write(&b);
        ern_model *m = must_open(b.dir);
        for (size_t i = 0; i < n; i++) {
            float expected = ern_bf16_to_f32(ern_bf16_from_f32(b.made.model->layer[2].router[i]));
            assert_memory_equal(&m->layer[2].router[i], &expected, sizeof expected);
        }
        ern_model_close(m);
        bench_close(&b);
    }
}

static void untied_head(void **state) {
    (void)state;
    for (int turned = 0; turned < 2; turned++) {
        for (int paddle = 0; paddle < 2; paddle++) {
            bench b = bench_open(paddle);
            copy_config(b.made.dir, b.dir, "\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
            bench_write(&b);
            refused(b.dir, "model.safetensors", "lm_head.weight", "expected BF16", "tie_word_embeddings", "found none");
            const st_entry *embed = st_list_find(&b.list, tensor(&b, "embed_tokens.weight"));
            st_entry *head = st_list_add(&b.list, "lm_head.weight", "BF16", 2, (const int64_t[]){1024, 80},
                                         embed->bytes, embed->data);
            if (turned) transpose(head);
            bench_write(&b);
            ern_model *m = must_open(b.dir);
            assert_ptr_not_equal(m->head.data, m->embed);
            assert_int_equal(m->head.order, turned ? ERN_ORDER_IN_OUT : ERN_ORDER_OUT_IN);
            same_linear(&m->head, &b.made.model->head);
            ern_model_close(m);
            bench_close(&b);
        }
    }
}

static void bias_said_or_not(void **state) {
    (void)state;
    bench b = bench_open(false);
    copy_config(b.made.dir, b.dir, "  \"moe_use_aux_free\": true,\n", ""); /* the tensors say it */
    still_same(&b);
    copy_config(b.made.dir, b.dir, "\"moe_use_aux_free\": true", "\"moe_use_aux_free\": false");
    bench_write(&b);
    refused(b.dir, "layers.1.mlp.moe_statics.e_score_correction_bias", "no such tensor");
    st_list_drop(&b.list, "model.layers.1.mlp.moe_statics.e_score_correction_bias");
    st_list_drop(&b.list, "model.layers.2.mlp.moe_statics.e_score_correction_bias");
    bench_write(&b);
    ern_model *m = must_open(b.dir);
    assert_null(m->layer[1].router_bias);
    assert_false(m->config.has_bias);
    ern_model_close(m);
    copy_config(b.made.dir, b.dir, NULL, NULL);
    refused(b.dir, "layers.1.mlp.moe_statics.e_score_correction_bias", "expected F32 or BF16 [1, 8], found none");
    bench_close(&b);
}

/* ---- what does not -------------------------------------------------------------------------------------------------
 */

/* Take the data out of a list (NULL: leave holes) or put them back: what only headers decide needs no bytes. */
static unsigned char **list_data(st_list *l, unsigned char **back) {
    unsigned char **out = calloc((size_t)l->n + 1, sizeof *out);
    assert_non_null(out);
    for (int i = 0; i < l->n; i++) {
        out[i] = l->entry[i].data;
        l->entry[i].data = back ? back[i] : NULL;
    }
    free(back);
    return out;
}

static void every_tensor_missed_and_misshaped(void **state) {
    (void)state;
    for (int paddle = 0; paddle < 2; paddle++) {
        bench b = bench_open(paddle);
        for (int which = 0; which < 2; which++) {
            st_list *l = which ? &b.mtp : &b.list;
            unsigned char **main_data = list_data(&b.list, NULL), **mtp_data = list_data(&b.mtp, NULL);
            for (int i = 0; i < l->n; i++) {
                st_entry *e = &l->entry[i], whole = *e;
                char found[64];
                snprintf(e->name, sizeof e->name, "%.100s.other", whole.name); /* missing here, extra there */
                bench_write(&b);
                refused(b.dir, "model.safetensors: tensor ",
                        which || !strstr(whole.name, "mtp_") ? whole.name : "mtp_");
                *e = whole;
                strcpy(e->dtype, strcmp(e->dtype, "F32") == 0 ? "I32" : "F16");
                bench_write(&b);
                refused(b.dir, "model.safetensors: tensor ", whole.name, "expected ", "BF16", "found ", e->dtype);
                *e = whole;
                e->n_dim = whole.n_dim == 1 ? 2 : 1;
                e->dim[0] = whole.n_dim == 1 ? 1 : whole.dim[0] * whole.dim[1];
                if (whole.n_dim == 1) e->dim[1] = whole.dim[0];
                bool flat_bias = strstr(whole.name, "correction_bias") != NULL; /* [E] is fine */
                if (flat_bias) e->dim[0] = 4, e->n_dim = 2, e->dim[1] = 2;
                snprintf(found, sizeof found, "%lld", e->dim[0]);
                bench_write(&b);
                refused(b.dir, whole.name, "expected ", "found ", found);
                *e = whole;
            }
            free(list_data(&b.list, main_data));
            free(list_data(&b.mtp, mtp_data));
        }
        still_same(&b);
        bench_close(&b);
    }
}

static void wrong_tensors(void **state) {
    (void)state;
    bench b = bench_open(false);
    st_list_add(&b.list, "model.layers.4.input_layernorm.weight", "BF16", 1, (const int64_t[]){80}, 160,
                b.list.entry[0].data);
    bench_write(&b);
    refused(b.dir, "model.safetensors: tensor model.layers.4.input_layernorm.weight", "expected no such tensor",
            "4 layers", "found BF16 [80]");
    st_list_drop(&b.list, "model.layers.4.input_layernorm.weight");
    st_entry *q = st_list_find(&b.list, "model.layers.0.self_attn.q_proj.weight");
    transpose(q);
    bench_write(&b);
    refused(b.dir, "q_proj", "expected BF16 [160, 80], found BF16 [80, 160]");
    transpose(q);
    st_list_add(&b.list, "lm_head.weight", "BF16", 2, (const int64_t[]){1, 80}, 160, b.list.entry[0].data);
    bench_write(&b);
    refused(b.dir, "lm_head.weight", "[1024, 80]", "found BF16 [1, 80]");
    st_list_drop(&b.list, "lm_head.weight");
    st_list_add(&b.list, "ernie.norm.weight", "BF16", 1, (const int64_t[]){80}, 160, b.list.entry[0].data);
    bench_write(&b);
    refused(b.dir, "one layout", "model.", "ernie.norm.weight");
    st_list none = st_list_new();
    st_list_add(&none, "transformer.wte.weight", "BF16", 1, (const int64_t[]){1}, 2, "xx");
    st_list_write(&none, 0, 1, b.dir, "model.safetensors");
    refused(b.dir, "model.*", "ernie.*", "found none in 1 tensors");
    text_write(b.dir, "model.safetensors", "version https://git-lfs.github.com/spec/v1\n");
    refused(b.dir, "model.safetensors", "not a safetensors file");
    st_list_free(&none);
    bench_close(&b);
    b = bench_open(true);
    copy_config(b.made.dir, b.dir, "\"dtype\"", "\"torch_dtype\"");
    bench_write(&b);
    refused(b.dir, "torch_dtype", "Paddle names");
    bench_close(&b);
}

static void wrong_folders(void **state) {
    (void)state;
    char dir[64], longname[1100];
    ern_err err;
    ern_model *m;
    made_dir(dir);
    refused(dir, "config.json", "No such file");
    bench b = bench_open(false);
    refused(b.dir, "holds no weights", "model.safetensors");
    assert_int_equal(ern_model_open(&m, &(ern_model_options){.dir = b.dir, .config_only = true}, &err), ERN_OK);
    assert_int_equal(m->config.n_expert, 8);
    assert_null(m->embed);
    ern_model_close(m);
    memset(longname, 'x', sizeof longname - 1);
    longname[sizeof longname - 1] = 0;
    assert_int_equal(ern_model_open(&m, &(ern_model_options){.dir = longname}, &err), ERN_ERR_FILE);
    ern_model_close(NULL);
    made_dir_remove(dir);
    bench_close(&b);
}

static void wrong_indexes(void **state) {
    (void)state;
    static const struct {
        const char *text, *says;
    } bad[] = {
        {"", "JSON"},
        {"[]", "weight_map"},
        {"{}", "weight_map"},
        {"{\"weight_map\":[]}", "weight_map"},
        {"{\"weight_map\":{}}", "1 to"},
        {"{\"weight_map\":{\"a\":1}}", "tensor a"},
        {"{\"weight_map\":{\"a\":\"../model.safetensors\"}}", "same folder, found ../model.safetensors"},
        {"{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "same folder"},
        {"{\"weight_map\":{\"a\":\".safetensors\"}}", "same folder"},
        {"{\"weight_map\":{\"a\":\".x.safetensors\"}}", "same folder"},
        {"{\"weight_map\":{\"a\":\"sub/x.safetensors\"}}", "same folder"},
        {"{\"weight_map\":{\"a\":\"x.safetensors\\u0000\"}}", "same folder"},
        {"{\"weight_map\":{\"a\":\"x.bin\"}}", "same folder, found x.bin"},
        {"{\"weight_map\":{\"a\":\"x\\n.safetensors\"}}", "same folder"},
        {"{\"weight_map\":{\"a\\nb\":\"x.safetensors\"}}", "no plain tensor name"},
        {"{\"weight_map\":{\"a\":\"x.safetensors\",\"a\":\"y.safetensors\"}}", "duplicate"},
        {"{\"weight_map\":{\"a\":\"gone.safetensors\"}}", "gone.safetensors"},
        {"{\"weight_map\":{\"a\":\"here.safetensors\"}}",
         "tensor a: expected it in here.safetensors, found it nowhere"},
        {"{\"weight_map\":{\"x\":\"here.safetensors\"}}", "tensor y is not named by"},
        {"{\"weight_map\":{\"x\":\"here.safetensors\",\"y\":\"here.safetensors\",\"w\":\"and.safetensors\"}}",
         "tensor x: expected it once"},
        {"{\"weight_map\":{\"x\":\"other.safetensors\",\"y\":\"here.safetensors\"}}",
         "other.safetensors: tensor x: expected it in this file by the index, found it in here.safetensors"},
        {"{\"weight_map\":{\"x\":\"a.safetensors\",\"y\":{\"y\":{\"y\":{\"y\":{\"y\":{\"y\":{\"y\":{}}}}}}}}}", "deep"},
    };
    bench b = bench_open(false);
    st_list two = st_list_new();
    st_list_add(&two, "x", "U8", 1, (const int64_t[]){1}, 1, "x");
    st_list_add(&two, "y", "U8", 1, (const int64_t[]){1}, 1, "y");
    st_list_write(&two, 0, 2, b.dir, "here.safetensors");
    st_list_write(&two, 0, 0, b.dir, "other.safetensors");
    st_list_add(&two, "x", "U8", 1, (const int64_t[]){1}, 1, "x");
    st_list_add(&two, "w", "U8", 1, (const int64_t[]){1}, 1, "w");
    st_list_write(&two, 2, 4, b.dir, "and.safetensors");
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        text_write(b.dir, "model.safetensors.index.json", bad[i].text);
        refused(b.dir, bad[i].says);
    }
    st_list_free(&two);
    bench_close(&b);
}

/* One byte of the header changed: the model is refused with a sentence, or is the very same model. */
static void header_bytes(void **state) {
    (void)state;
    made_model m = made_model_open("tiny-dense", false, 9);
    char path[96], index[96];
    unsigned char len[8];
    snprintf(path, sizeof path, "%s/model.safetensors", m.dir);
    snprintf(index, sizeof index, "%s", path);
    FILE *f = fopen(index, "r+b");
    assert_non_null(f);
    setbuf(f, NULL);
    assert_int_equal(fread(len, 1, 8, f), 8);
    long n = len[0] | len[1] << 8;
    int n_same = 0;
    unsigned seed = 1;
    for (long i = 0; i < 8 + n; i++) {
        ern_err err;
        ern_model *other;
        fseek(f, i, SEEK_SET);
        int was = fgetc(f), put = was ^ (1 << rand_r(&seed) % 8);
        fseek(f, i, SEEK_SET);
        fputc(put, f);
        ern_status s = ern_model_open(&other, &(ern_model_options){.dir = m.dir}, &err);
        if (s == ERN_OK) {
            same_model(other, m.model);
            n_same++;
            ern_model_close(other);
        } else {
            assert_int_equal(s, ERN_ERR_FILE);
            assert_non_null(strstr(err.text, "model.safetensors"));
            assert_null(strchr(err.text, '\n'));
        }
        fseek(f, i, SEEK_SET);
        fputc(was, f);
    }
    assert_true(n_same < 40); /* only inside __metadata__ and white space */
    fclose(f);
    ern_model *again = must_open(m.dir);
    same_model(again, m.model);
    ern_model_close(again);
    made_model_close(&m);
}

/* The file cut at a thousand points, from the end down. */
static void cuts(void **state) {
    (void)state;
    made_model m = made_model_open("tiny-moe", false, 9);
    char path[96];
    struct stat st;
    snprintf(path, sizeof path, "%s/model.safetensors", m.dir);
    ern_model_close(m.model); /* its mapping must not outlive its file */
    m.model = NULL;
    assert_int_equal(stat(path, &st), 0);
    for (int i = 1; i <= 1000; i++) {
        off_t size = st.st_size - (i < 20 ? i : st.st_size * i / 1000);
        assert_int_equal(truncate(path, size), 0);
        refused(m.dir, "model.safetensors");
    }
    made_model_close(&m);
}

static bool count_progress(void *ud, const char *what, uint64_t done, uint64_t all) {
    uint64_t *seen = ud;
    assert_non_null(what);
    assert_true(done <= all && done > seen[0]);
    seen[0] = done;
    seen[1] = all;
    return seen[2] == 0;
}

static void touched(void **state) {
    (void)state;
    made_model m = made_model_open("tiny-moe", true, 9);
    uint64_t seen[3] = {0, 0, 0};
    ern_err err;
    ern_model *again;
    ern_model_options o = {.dir = m.dir, .touch = true, .progress = count_progress, .ud = seen};
    assert_int_equal(ern_model_open(&again, &o, &err), ERN_OK);
    assert_true(seen[0] == seen[1] && seen[0] > m.model->weight_bytes);
    same_model(again, m.model);
    ern_model_close(again);
    seen[0] = 0;
    seen[2] = 1;
    assert_int_equal(ern_model_open(&again, &o, &err), ERN_ERR_CANCELLED);
    assert_null(again);
    made_model_close(&m);
}

/* ---- the real size, without its bytes ------------------------------------------------------------------------------
 */

static void add_hole(st_list *l, int64_t rows, int64_t cols, const char *dtype, const char *fmt, ...)
    __attribute__((format(printf, 5, 6)));
static void add_hole(st_list *l, int64_t rows, int64_t cols, const char *dtype, const char *fmt, ...) {
    char name[128];
    va_list args;
    va_start(args, fmt);
    vsnprintf(name, sizeof name, fmt, args);
    va_end(args);
    int64_t dim[2] = {rows ? rows : cols, cols};
    size_t bytes = (size_t)((rows ? rows : 1) * cols) * (strcmp(dtype, "F32") == 0 ? 4 : 2);
    st_list_add(l, name, dtype, rows ? 2 : 1, dim, bytes, NULL);
}

static void add_layer_holes(st_list *l, const char *base, bool moe) {
    static const char *const ffn[] = {"gate_proj", "up_proj"};
    add_hole(l, 0, 2560, "BF16", "%s.input_layernorm.weight", base);
    add_hole(l, 0, 2560, "BF16", "%s.post_attention_layernorm.weight", base);
    add_hole(l, 2560, 2560, "BF16", "%s.self_attn.q_proj.weight", base);
    add_hole(l, 512, 2560, "BF16", "%s.self_attn.k_proj.weight", base);
    add_hole(l, 512, 2560, "BF16", "%s.self_attn.v_proj.weight", base);
    add_hole(l, 2560, 2560, "BF16", "%s.self_attn.o_proj.weight", base);
    for (int i = 0; i < 2 && !moe; i++) add_hole(l, 12288, 2560, "BF16", "%s.mlp.%s.weight", base, ffn[i]);
    if (!moe) {
        add_hole(l, 2560, 12288, "BF16", "%s.mlp.down_proj.weight", base);
        return;
    }
    add_hole(l, 64, 2560, "F32", "%s.mlp.gate.weight", base);
    add_hole(l, 1, 64, "F32", "%s.mlp.moe_statics.e_score_correction_bias", base);
    for (int e = 0; e <= 64; e++) {
        char sub[32];
        int64_t width = e < 64 ? 1536 : 3072;
        snprintf(sub, sizeof sub, e < 64 ? "experts.%d" : "shared_experts", e);
        for (int i = 0; i < 2; i++) add_hole(l, width, 2560, "BF16", "%s.mlp.%s.%s.weight", base, sub, ffn[i]);
        add_hole(l, 2560, width, "BF16", "%s.mlp.%s.down_proj.weight", base, sub);
    }
}

/* The published 21B-A3B PyTorch index (5504 tensors, 43.9 GB) as sparse files: counts, bytes, and time to open. */
static void full_21b_table(void **state) {
    (void)state;
    char dir[64], base[64];
    ern_err err;
    ern_model *m;
    made_dir(dir);
    st_list l = st_list_new();
    add_hole(&l, 103424, 2560, "BF16", "model.embed_tokens.weight");
    for (int i = 0; i < 28; i++) {
        snprintf(base, sizeof base, "model.layers.%d", i);
        add_layer_holes(&l, base, i > 0);
    }
    add_hole(&l, 0, 2560, "BF16", "model.norm.weight");
    assert_int_equal(l.n, 5492);
    add_layer_holes(&l, "model.mtp_block.0", false);
    add_hole(&l, 0, 2560, "BF16", "model.mtp_emb_norm.0.weight");
    add_hole(&l, 0, 2560, "BF16", "model.mtp_hidden_norm.0.weight");
    add_hole(&l, 2560, 5120, "BF16", "model.mtp_linear_proj.0.weight");
    assert_int_equal(l.n, 5504);
    st_list_write_shards(&l, 612, dir);
    text_write(
        dir, "config.json",
        "{\"architectures\":[\"Ernie4_5_MoeForCausalLM\"],\"model_type\":\"ernie4_5_moe\",\"torch_dtype\":\"bfloat16\","
        "\"hidden_size\":2560,\"intermediate_size\":12288,\"num_attention_heads\":20,\"num_key_value_heads\":4,"
        "\"num_hidden_layers\":28,\"vocab_size\":103424,\"moe_num_experts\":64,\"moe_k\":6,"
        "\"moe_num_shared_experts\":2,\"moe_intermediate_size\":1536,\"moe_layer_start_index\":1,"
        "\"tie_word_embeddings\":true,\"rope_theta\":500000}");
    int64_t begin = cpu_us();
    ern_status s = ern_model_open(&m, &(ern_model_options){.dir = dir}, &err);
    int64_t took = cpu_us() - begin;
    if (s != ERN_OK) fail_msg("%s", err.text);
    print_message("5504 tensors opened in %lld us of processor time\n", (long long)took);
    assert_true(took < 10000000); /* a guard against a quadratic table; the time itself is printed, not tested */
    assert_int_equal(m->weight_bytes, 43906162432);
    assert_true(m->has_mtp && m->config.has_bias);
    ern_model_close(m);
    st_list_free(&l);
    made_dir_remove(dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(layouts_agree),
        cmocka_unit_test(windows_are_mapped),
        cmocka_unit_test(variations_load),
        cmocka_unit_test(shards_load),
        cmocka_unit_test(shards_refused),
        cmocka_unit_test(mtp_of_another),
        cmocka_unit_test(mtp_places),
        cmocka_unit_test(router_bf16),
        cmocka_unit_test(untied_head),
        cmocka_unit_test(bias_said_or_not),
        cmocka_unit_test(every_tensor_missed_and_misshaped),
        cmocka_unit_test(wrong_tensors),
        cmocka_unit_test(wrong_folders),
        cmocka_unit_test(wrong_indexes),
        cmocka_unit_test(header_bytes),
        cmocka_unit_test(cuts),
        cmocka_unit_test(touched),
        cmocka_unit_test(full_21b_table),
        cmocka_unit_test(links_load),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
