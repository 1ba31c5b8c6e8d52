/* Quantized checkpoints: quantizing while loading, ernest quantize and make-model --quantization give the same bytes
 * from either layout; what is broken in a quantized checkpoint is refused by the names of file and tensor. */
#include "st_edit.h"

#include <dirent.h>
#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <cmocka.h>

#include "base/os.h"
#include "model/quant.h"

static const char *const format[] = {
    "wint8",
    "wint4",
    "block_wise_fp8",
    "{\"quantization\":\"mix_quant\",\"dense_quant_type\":\"wint4\",\"moe_quant_type\":\"block_wise_fp8\"}",
    "{\"quantization\":\"mix_quant\",\"dense_quant_type\":\"none\",\"moe_quant_type\":\"wint8\"}",
};
enum { N_FORMAT = sizeof format / sizeof *format };

static ern_quant_plan plan_of(const char *text, const char *head) {
    ern_quant_plan p;
    ern_err err;
    made_check(ern_quant_parse(&p, text, head, &err), &err, "reading a plan");
    return p;
}

static ern_model *open_as(const char *dir, const ern_quant_plan *p) {
    ern_model *m;
    ern_err err;
    made_check(ern_model_open(&m, &(ern_model_options){.dir = dir, .quant = p}, &err), &err, "opening");
    return m;
}

static void make(const char *shape, bool paddle, const char *dir, const ern_quant_plan *p, uint64_t shard_bytes) {
    ern_err err;
    ern_synth_options o = {
        .shape = shape, .dir = dir, .paddle = paddle, .seed = 11, .quant = p, .shard_bytes = shard_bytes};
    made_check(ern_synth_write(&o, &err), &err, "making");
}

static ern_status quantize(const char *from, const char *to, const ern_quant_plan *p, ern_err *err) {
    return ern_quantize(&(ern_quantize_options){.dir = from, .out = to, .plan = *p}, err);
}

/* ---- comparing ---------------------------------------------------------------------------------------------------
 */

/* Same numbers; of quantized linears the same bytes, of which the files of tiles have no others. */
static void same_linear(const ern_linear *a, const ern_linear *b) {
    assert_int_equal(a->n_out, b->n_out);
    assert_int_equal(a->n_in, b->n_in);
    assert_int_equal(a->dtype, b->dtype);
    assert_int_equal(a->order == ERN_ORDER_TILED, b->order == ERN_ORDER_TILED);
    if (a->order == ERN_ORDER_TILED) {
        assert_int_equal((uintptr_t)a->data % 64, 0);
        assert_int_equal((uintptr_t)b->data % 64, 0);
        assert_memory_equal(a->data, b->data, quant_tile_bytes(a->dtype, a->n_out, a->n_in));
        assert_memory_equal(a->scale, b->scale, quant_scale_bytes(a->dtype, a->n_out, a->n_in));
        return;
    }
    for (int32_t o = 0; o < a->n_out; o++)
        for (int32_t i = 0; i < a->n_in; i++)
            assert_true(memcmp(&(float){ern_linear_at(a, o, i)}, &(float){ern_linear_at(b, o, i)}, 4) == 0);
}

static void same_ffn(const ern_ffn *a, const ern_ffn *b) {
    same_linear(&a->gate, &b->gate);
    same_linear(&a->up, &b->up);
    same_linear(&a->down, &b->down);
}

static void same_layer(const ern_config *c, const ern_layer *a, const ern_layer *b) {
    const size_t d = (size_t)c->n_hidden, e = (size_t)c->n_expert;
    assert_memory_equal(a->attn_norm, b->attn_norm, d * sizeof(ern_bf16));
    assert_memory_equal(a->ffn_norm, b->ffn_norm, d * sizeof(ern_bf16));
    const ern_linear *const x[] = {&a->q, &a->k, &a->v, &a->o}, *const y[] = {&b->q, &b->k, &b->v, &b->o};
    for (int i = 0; i < 4; i++) same_linear(x[i], y[i]);
    assert_int_equal(a->is_moe, b->is_moe);
    if (!a->is_moe) {
        same_ffn(&a->ffn, &b->ffn);
        return;
    }
    assert_memory_equal(a->router, b->router, e * d * sizeof(float));
    assert_memory_equal(a->router_bias, b->router_bias, e * sizeof(float));
    for (size_t k = 0; k < e; k++) same_ffn(&a->expert[k], &b->expert[k]);
    same_ffn(&a->shared, &b->shared);
}

static void same_model(const ern_model *a, const ern_model *b) {
    const ern_config *c = &a->config;
    assert_memory_equal(&a->quant, &b->quant, sizeof a->quant);
    assert_memory_equal(a->embed, b->embed, (size_t)c->n_vocab * (size_t)c->n_hidden * sizeof(ern_bf16));
    assert_memory_equal(a->norm, b->norm, (size_t)c->n_hidden * sizeof(ern_bf16));
    same_linear(&a->head, &b->head);
    for (int32_t i = 0; i < c->n_layer; i++) same_layer(c, &a->layer[i], &b->layer[i]);
    assert_int_equal(a->has_mtp, b->has_mtp);
    if (!a->has_mtp) return;
    assert_memory_equal(a->mtp.emb_norm, b->mtp.emb_norm, (size_t)c->n_hidden * sizeof(ern_bf16));
    assert_memory_equal(a->mtp.hidden_norm, b->mtp.hidden_norm, (size_t)c->n_hidden * sizeof(ern_bf16));
    same_linear(&a->mtp.proj, &b->mtp.proj);
    same_layer(c, &a->mtp.layer, &b->mtp.layer);
}

static void as_planned(const ern_model *m) {
    const ern_linear *const head = &m->head, *const q = &m->layer[0].q;
    assert_int_equal(head->order == ERN_ORDER_TILED, m->quant.head != ERN_QUANT_NONE);
    assert_int_equal(q->order == ERN_ORDER_TILED, m->quant.dense != ERN_QUANT_NONE);
    if (m->quant.dense) assert_int_equal(q->dtype, ern_quant_dtype(m->quant.dense));
    if (m->config.n_expert) {
        const ern_linear *const e = &m->layer[1].expert[0].down, *const s = &m->layer[1].shared.up;
        assert_int_equal(e->order == ERN_ORDER_TILED, m->quant.expert != ERN_QUANT_NONE);
        if (m->quant.expert) assert_int_equal(e->dtype, ern_quant_dtype(m->quant.expert));
        assert_int_equal(s->dtype, q->dtype);
    }
    if (m->has_mtp) assert_true(m->mtp.layer.q.dtype == ERN_DTYPE_BF16 && m->mtp.proj.dtype == ERN_DTYPE_BF16);
}

static size_t file_text(const char *dir, const char *name, char **out) {
    char path[256];
    ern_err err;
    size_t len;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    made_check(ern_file_read(out, &len, path, 64 << 20, &err), &err, "reading a file");
    return len;
}

/* The two folders hold the same plain files with the same bytes. */
static void same_folder(const char *a, const char *b) {
    int n[2] = {0, 0};
    for (int side = 0; side < 2; side++) {
        DIR *d = opendir(side ? b : a);
        assert_non_null(d);
        for (struct dirent *e; (e = readdir(d));) {
            char *x, *y;
            if (e->d_name[0] == '.' || e->d_type == DT_DIR) continue;
            n[side]++;
            if (side) continue;
            const size_t len = file_text(a, e->d_name, &x);
            if (len != file_text(b, e->d_name, &y) || memcmp(x, y, len) != 0) fail_msg("%s differs", e->d_name);
            free(x);
            free(y);
        }
        closedir(d);
    }
    assert_int_equal(n[0], n[1]);
}

/* ---- the three ways ----------------------------------------------------------------------------------------------
 */

static void three_ways(const char *shape, bool paddle, const char *text, const char *head) {
    char plain[64], offline[64], made[64];
    const ern_quant_plan p = plan_of(text, head);
    ern_err err;
    made_dir(plain), made_dir(offline), made_dir(made);
    make(shape, paddle, plain, NULL, 0);
    make(shape, paddle, made, &p, 0);
    made_check(quantize(plain, offline, &p, &err), &err, "quantizing");
    same_folder(offline, made);
    ern_model *a = open_as(plain, &p), *b = open_as(offline, NULL);
    as_planned(a);
    assert_int_equal(a->is_paddle, paddle);
    assert_false(b->is_paddle);
    same_model(a, b);
    assert_true(a->owned_bytes > 0 && b->owned_bytes == 0);
    assert_int_equal(a->weight_bytes, b->weight_bytes);
    const ern_quant_plan other = plan_of("wint8", "none");
    ern_model *c = open_as(offline, &other); /* its own format wins */
    assert_memory_equal(&c->quant, &p, sizeof p);
    ern_model_close(a), ern_model_close(b), ern_model_close(c);
    made_dir_remove(plain), made_dir_remove(offline), made_dir_remove(made);
}

static void same_bytes_three_ways(void **state) {
    (void)state;
    for (int k = 0; k < N_FORMAT; k++)
        for (int paddle = 0; paddle < 2; paddle++) {
            three_ways("tiny-moe", paddle != 0, format[k], NULL);
            three_ways("tiny-dense", paddle != 0, format[k], k == 0 ? "none" : NULL);
        }
    three_ways("tiny-dense", false, NULL, "wint8");
}

/* The layouts of one seed give one table. */
static void layouts_agree(void **state) {
    (void)state;
    for (int k = 0; k < N_FORMAT; k++) {
        char dir[2][64];
        ern_model *m[2];
        const ern_quant_plan p = plan_of(format[k], NULL);
        for (int i = 0; i < 2; i++) {
            made_dir(dir[i]);
            make("tiny-moe", i == 1, dir[i], NULL, 0);
            m[i] = open_as(dir[i], &p);
        }
        same_model(m[0], m[1]);
        for (int i = 0; i < 2; i++) ern_model_close(m[i]), made_dir_remove(dir[i]);
    }
}

/* In and out in shards: the same table, and an index that the loader believes. */
static void shards(void **state) {
    (void)state;
    char plain[64], offline[64], made[64];
    const ern_quant_plan p = plan_of("wint4", NULL);
    ern_err err;
    made_dir(plain), made_dir(offline), made_dir(made);
    make("tiny-moe", true, plain, NULL, 100000);
    make("tiny-moe", true, made, &p, 50000);
    ern_quantize_options o = {.dir = plain, .out = offline, .plan = p, .shard_bytes = 50000};
    made_check(ern_quantize(&o, &err), &err, "quantizing");
    same_folder(offline, made);
    ern_model *a = open_as(plain, &p), *b = open_as(offline, NULL);
    same_model(a, b);
    ern_model_close(a), ern_model_close(b);
    made_dir_remove(plain), made_dir_remove(offline), made_dir_remove(made);
}

/* ---- refusals ----------------------------------------------------------------------------------------------------
 */

#define refused(dir, quant, code, ...) \
    refused_words(__LINE__, dir, quant, code, (const char *const[]){__VA_ARGS__, NULL})
static void refused_words(int line, const char *dir, const ern_quant_plan *p, ern_status code,
                          const char *const *word) {
    ern_model *m = NULL;
    ern_err err = {.text = ""};
    const ern_status s = ern_model_open(&m, &(ern_model_options){.dir = dir, .quant = p}, &err);
    if (s != code || m) fail_msg("line %d: status %d, %s", line, s, err.text);
    if (strchr(err.text, '\n')) fail_msg("line %d: more than one line: %s", line, err.text);
    for (; *word; word++)
        if (!strstr(err.text, *word)) fail_msg("line %d: expected the words \"%s\" in: %s", line, *word, err.text);
}

/* A quantized tiny-dense to break. */
typedef struct bench {
    char dir[64];
    st_list list;
} bench;

static bench bench_open(const char *text) {
    bench b = {.list = st_list_new()};
    const ern_quant_plan p = plan_of(text, NULL);
    made_dir(b.dir);
    make("tiny-dense", false, b.dir, &p, 0);
    st_list_read(&b.list, b.dir, "model.safetensors");
    return b;
}

static void bench_write(const bench *b) { st_list_write(&b->list, 0, b->list.n, b->dir, "model.safetensors"); }

static void bench_close(bench *b) {
    st_list_free(&b->list);
    made_dir_remove(b->dir);
}

#define Q "model.layers.1.self_attn.q_proj.weight"

static void broken_tensors(void **state) {
    (void)state;
    for (int fault = 0; fault < 9; fault++) {
        const bool f8 = fault >= 7;
        bench b = bench_open(f8 ? "block_wise_fp8" : "wint8");
        st_entry *w = st_list_find(&b.list, Q), *s = st_list_find(&b.list, f8 ? Q "_scale_inv" : Q "_scale");
        const char *found = NULL, *expected = NULL, *name = Q;
        switch (fault) {
        case 0: strcpy(w->dtype, "I8"), expected = "U8 [8, 1, 1024] of int8 tiles", found = "I8 [8, 1, 1024]"; break;
        case 1: w->dim[0] = 4, w->dim[1] = 2, expected = "U8 [8, 1, 1024]", found = "U8 [4, 2, 1024]"; break;
        case 2: w->n_dim = 2, w->dim[1] = 1024, expected = "U8 [8, 1, 1024]", found = "U8 [8, 1024]"; break;
        case 3: st_list_drop(&b.list, Q), expected = "U8 [8, 1, 1024]", found = "none"; break;
        case 4: st_list_drop(&b.list, Q "_scale"), name = Q "_scale", expected = "BF16 [128]", found = "none"; break;
        case 5: strcpy(s->dtype, "F16"), name = Q "_scale", expected = "BF16 [128]", found = "F16 [128]"; break;
        case 6:
            snprintf(s->name, sizeof s->name, "%s", Q "_scale_inv"), name = Q "_scale", expected = "BF16 [128]",
                                                                     found = "none";
            break;
        case 7: s->n_dim = 1, name = Q "_scale_inv", expected = "F32 [1, 1]", found = "F32 [1]"; break;
        default:
            st_list_add(&b.list, "model.layers.7.self_attn.q_proj.weight", "U8", 3, (int64_t[]){1, 1, 1024}, 1024,
                        w->data),
                name = "model.layers.7.self_attn", expected = "no such tensor", found = "U8";
            break;
        }
        bench_write(&b);
        refused(b.dir, NULL, ERN_ERR_FILE, "model.safetensors", name, expected, found);
        bench_close(&b);
    }
}

/* Tiles off the grid of 64 are refused, not copied; other tensors at odd places are taken as ever. */
static void misaligned_tiles(void **state) {
    (void)state;
    bench b = bench_open("wint8");
    b.list.shift = 1;
    bench_write(&b);
    refused(b.dir, NULL, ERN_ERR_FILE, "model.safetensors", "a multiple of 64", "ernest quantize");
    bench_close(&b);
}

static void config_put(const char *dir, const char *cut, const char *put) {
    char *text, out[8192];
    file_text(dir, "config.json", &text);
    char *at = strstr(text, cut);
    assert_non_null(at);
    snprintf(out, sizeof out, "%.*s%s%s", (int)(at - text), text, put, at + strlen(cut));
    text_write(dir, "config.json", out);
    free(text);
}

static void broken_configs(void **state) {
    (void)state;
    static const struct {
        const char *cut, *put, *word;
        ern_status code;
    } row[] = {
        {"\"quant_method\": \"ernest\"", "\"quant_method\": \"fp8\"", "quant_method fp8", ERN_ERR_UNSUPPORTED},
        {"\"quant_method\": \"ernest\",", "", "quant_method absent", ERN_ERR_UNSUPPORTED},
        {"\"format\": 1", "\"format\": 2", "format 1", ERN_ERR_UNSUPPORTED},
        {"\"dense_quant_type\": \"wint8\"", "\"dense_quant_type\": \"wint2\"", "dense_quant_type", ERN_ERR_FILE},
        {"\"dense_quant_type\": \"wint8\"", "\"dense_quant_type\": \"wint4\"", "expected quantization mix_quant",
         ERN_ERR_FILE},
        {"\"lm_head_quant_type\": \"wint8\"", "\"lm_head_quant_type\": \"wint4\"", "head", ERN_ERR_FILE},
        {"\"lm_head_quant_type\": \"wint8\"", "\"lm_head_quant_type\": \"none\"", "lm_head.weight", ERN_ERR_FILE},
        {"\"wint8\",\n    \"is_quantized\": true,\n    \"dense_quant_type\": \"wint8\",\n    \"moe_quant_type\": "
         "\"wint8\"",
         "\"wint4\",\n    \"is_quantized\": true,\n    \"dense_quant_type\": \"wint8\",\n    \"moe_quant_type\": "
         "\"wint4\"",
         NULL, ERN_OK}, /* a dense model has no experts: the same tensors */
        {"\"quant_method\": \"ernest\",", "\"quant_method\": \"ernest\", \"format\": 1,", "", ERN_ERR_FILE},
    };
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        bench b = bench_open("wint8");
        config_put(b.dir, row[i].cut, row[i].put);
        if (row[i].word)
            refused(b.dir, NULL, row[i].code, strchr(row[i].word, '.') ? "model.safetensors" : "config.json",
                    row[i].word);
        else
            ern_model_close(open_as(b.dir, NULL));
        bench_close(&b);
    }
    /* a quantized folder without its key, and a bf16 one with it */
    bench b = bench_open("wint8");
    char *text;
    file_text(b.dir, "config.json", &text);
    char *key = strstr(text, "  \"quantization_config\"");
    strcpy(key, "  \"x\": 1\n}\n");
    text_write(b.dir, "config.json", text);
    free(text);
    refused(b.dir, NULL, ERN_ERR_FILE, "model.safetensors", "expected BF16", "found U8");
    bench_close(&b);
}

/* Paddle's wish for an int8 KV cache beside bf16 weights: taken, with its fixed scales left alone, and kept by ernest
 * quantize. */
static void kv_wish(void **state) {
    (void)state;
    char plain[64], out[64], to[80];
    ern_err err;
    made_dir(plain), made_dir(out);
    snprintf(to, sizeof to, "%s/new", out);
    make("tiny-dense", true, plain, NULL, 0);
    config_put(plain, "{",
               "{\n  \"quantization_config\": {\"quantization\": \"kvcache\", \"kv_cache_quant_type\": "
               "\"cachekv_int8\"},");
    ern_model *m = open_as(plain, NULL);
    assert_true(m->kv_codes == ERN_KV_CODES_INT8 && !ern_quant_any(&m->quant));
    ern_model_close(m);
    const ern_quant_plan p = plan_of("wint8", NULL);
    if (quantize(plain, to, &p, &err) != ERN_OK) fail_msg("%s", err.text);
    m = open_as(to, NULL);
    assert_true(m->kv_codes == ERN_KV_CODES_INT8 && m->quant.dense == ERN_QUANT_WINT8);
    ern_model_close(m);
    config_put(to, ",\n    \"kv_cache_quant_type\": \"int8\"", "");
    m = open_as(to, NULL);
    assert_false(m->kv_codes);
    ern_model_close(m);
    config_put(plain, "cachekv_int8", "block_wise_fp8");
    made_dir_remove(to);
    if (quantize(plain, to, &p, &err) != ERN_OK) fail_msg("%s", err.text);
    m = open_as(to, NULL);
    assert_true(m->kv_codes == ERN_KV_CODES_FP8 && m->quant.dense == ERN_QUANT_WINT8);
    ern_model_close(m);
    config_put(plain, "block_wise_fp8", "float8_e4m3fn");
    m = open_as(plain, NULL);
    assert_true(m->kv_codes == ERN_KV_CODES_FP8);
    ern_model_close(m);
    config_put(plain, "float8_e4m3fn", "cachekv_int8");
    st_list l = st_list_new();
    st_list_read(&l, plain, "model.safetensors");
    const float scale[16] = {1};
    st_list_add(&l, "ernie.layers.1.self_attn.cachek_matmul.activation_scale", "F32", 1, (int64_t[]){16}, sizeof scale,
                scale);
    st_list_write(&l, 0, l.n, plain, "model.safetensors");
    ern_model_close(open_as(plain, NULL));
    config_put(plain, "cachekv_int8", "none");
    refused(plain, NULL, ERN_ERR_FILE, "model.safetensors", "cachek_matmul", "no such tensor");
    st_list_free(&l);
    made_dir_remove(plain), made_dir_remove(out);
}

/* NaN in a weight: named, whether loading or writing, and writing leaves nothing. */
static void not_finite(void **state) {
    (void)state;
    for (int paddle = 0; paddle < 2; paddle++) {
        char plain[64], out[64], to[80];
        ern_err err;
        const char *const name =
            paddle ? "ernie.layers.2.mlp.up_gate_proj.weight" : "model.layers.2.mlp.up_proj.weight";
        const ern_quant_plan p = plan_of("wint8", NULL);
        made_dir(plain), made_dir(out);
        snprintf(to, sizeof to, "%s/new", out);
        make("tiny-dense", paddle != 0, plain, NULL, 0);
        st_list l = st_list_new();
        st_list_read(&l, plain, "model.safetensors");
        st_entry *e = st_list_find(&l, name);
        memcpy(e->data + e->bytes - 2, &(uint16_t){0x7f80}, 2);
        st_list_write(&l, 0, l.n, plain, "model.safetensors");
        refused(plain, &p, ERN_ERR_FILE, name, "NaN or infinity");
        assert_int_equal(quantize(plain, to, &p, &err), ERN_ERR_FILE);
        assert_non_null(strstr(err.text, "up_proj.weight"));
        assert_int_not_equal(access(to, F_OK), 0);
        st_list_free(&l);
        made_dir_remove(plain), made_dir_remove(out);
    }
}

static bool stop_at_once(void *ud, const char *what, uint64_t done, uint64_t all) {
    (void)ud, (void)done, (void)all;
    return strcmp(what, "quantizing") != 0;
}

/* Where OUT may not be, and what a stop leaves behind. */
static void folders(void **state) {
    (void)state;
    char plain[64], out[64], to[80];
    ern_err err;
    const ern_quant_plan p = plan_of("wint8", NULL), none = plan_of("none", NULL);
    made_dir(plain), made_dir(out);
    make("tiny-dense", false, plain, NULL, 0);
    snprintf(to, sizeof to, "%s/.", plain);
    ern_quantize_options o = {.dir = plain, .out = to, .plan = p, .force = true};
    assert_int_equal(ern_quantize(&o, &err), ERN_ERR_USAGE);
    assert_non_null(strstr(err.text, "name another folder"));
    o.out = out, o.plan = none;
    assert_int_equal(ern_quantize(&o, &err), ERN_ERR_USAGE);
    assert_non_null(strstr(err.text, "nothing is to be quantized"));
    o.plan = p, o.force = false, o.progress = stop_at_once;
    assert_int_equal(ern_quantize(&o, &err), ERN_ERR_CANCELLED);
    assert_int_equal(rmdir(out), 0); /* nothing is left in it */
    assert_int_equal(ern_quantize(&o, &err), ERN_ERR_CANCELLED);
    assert_int_not_equal(access(out, F_OK), 0); /* nor the folder, where it was not there */
    o.progress = NULL;
    made_check(ern_quantize(&o, &err), &err, "quantizing");
    assert_int_equal(ern_quantize(&o, &err), ERN_ERR_USAGE);
    assert_non_null(strstr(err.text, "--force"));
    o.force = true;
    made_check(ern_quantize(&o, &err), &err, "quantizing again");
    o.dir = out, o.out = to;
    assert_int_equal(ern_quantize(&o, &err), ERN_ERR_USAGE);
    assert_non_null(strstr(err.text, "quantized already (wint8, head wint8)"));
    char *text;
    free((file_text(out, "tokenizer.model", &text), text));
    free((file_text(out, "generation_config.json", &text), text));
    ern_model *m = NULL;
    ern_model_options mo = {.dir = plain, .quant = &p, .progress = stop_at_once};
    assert_int_equal(ern_model_open(&m, &mo, &err), ERN_ERR_CANCELLED);
    made_dir_remove(plain), made_dir_remove(out);
}

/* A plan takes no memory and has the sizes of what is loaded later. */
static void plan_only(void **state) {
    (void)state;
    char dir[64];
    ern_err err;
    made_dir(dir);
    make("tiny-moe", true, dir, NULL, 0);
    for (int k = 0; k < N_FORMAT; k++) {
        const ern_quant_plan p = plan_of(format[k], NULL);
        ern_model *a = open_as(dir, &p), *b;
        ern_model_options o = {.dir = dir, .quant = &p, .plan_only = true};
        made_check(ern_model_open(&b, &o, &err), &err, "planning");
        assert_int_equal(a->weight_bytes, b->weight_bytes);
        assert_int_equal(a->owned_bytes, b->owned_bytes);
        assert_true(b->plan_only && !a->plan_only);
        assert_int_equal(ern_linear_bytes(&a->head), ern_linear_bytes(&b->head));
        assert_int_equal(a->fingerprint, b->fingerprint);
        ern_model_close(a), ern_model_close(b);
    }
    ern_model *m = open_as(dir, NULL), *q = open_as(dir, &(ern_quant_plan){.head = ERN_QUANT_WINT8});
    assert_true(q->weight_bytes ==
                m->weight_bytes + ern_linear_bytes(&q->head)); /* tied: a copy beside the embedding */
    assert_true(q->fingerprint != m->fingerprint);
    ern_model_close(m), ern_model_close(q);
    made_dir_remove(dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_bytes_three_ways),
        cmocka_unit_test(layouts_agree),
        cmocka_unit_test(shards),
        cmocka_unit_test(broken_tensors),
        cmocka_unit_test(misaligned_tiles),
        cmocka_unit_test(broken_configs),
        cmocka_unit_test(kv_wish),
        cmocka_unit_test(not_finite),
        cmocka_unit_test(folders),
        cmocka_unit_test(plan_only),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
