/* The door of `model`: what an ERNIE-4.5 checkpoint is. Config, the table of weights over mapped safetensors, the made
 * checkpoints, and the sampling rule (sample.h). No code here computes fast; docs/model.md is the law.
 *
 * Hides: both published layouts (PyTorch/HF and Paddle), shards, dtypes' spellings, file checks.
 * Owner: the cli opens one ern_model; it stays until the backend is closed. Thread: read-only once open.
 *
 * One letter per dimension, everywhere:
 *   T rows (tokens) of a step    L layers          H query heads      F feed-forward width   V vocabulary rows
 *   S sequences of a step        D hidden size     G KV heads         E routed experts       P cells per KV page
 *   W wanted rows                C head size       Q = H * C          K experts per token */
#ifndef ERN_MODEL_MODEL_H
#define ERN_MODEL_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/half.h"
#include "base/status.h"

/* ---- config ---------------------------------------------------------------------------------------------------- */

enum { ERN_EOS_MAX = 8, ERN_LAYERS_MAX = 128, ERN_EXPERTS_MAX = 512 };

/* config.json and generation_config.json, checked. */
typedef struct ern_config {
    char architecture[64], model_type[32];
    int32_t n_vocab;                           /* V, rows of the embedding */
    int32_t n_hidden;                          /* D */
    int32_t n_layer;                           /* L, without the MTP layer */
    int32_t n_head;                            /* H */
    int32_t n_kv_head;                         /* G; H is a multiple of G */
    int32_t n_head_dim;                        /* C, even */
    int32_t n_ffn;                             /* F of a dense layer */
    int32_t n_expert;                          /* E; 0 when the model is dense */
    int32_t n_expert_used;                     /* K */
    int32_t n_expert_ffn;                      /* F of a routed expert */
    int32_t n_shared_expert;                   /* fused into one FFN of n_shared_expert * n_expert_ffn */
    int32_t moe_first, moe_last, moe_interval; /* layer i is MoE iff (i+1) % interval == 0 and first <= i <= last */
    bool has_bias;                             /* e_score_correction_bias exists (moe_use_aux_free) */
    float moe_norm_min;                        /* clamp of the sum of chosen probabilities */
    float rms_eps;
    double rope_theta;
    int32_t n_position; /* max_position_embeddings */
    bool tied_head;
    int32_t n_mtp; /* MTP layers that the config names; whether there is one is decided by the tensors */
    int32_t bos, pad;
    int32_t eos[ERN_EOS_MAX], n_eos; /* config.json's and generation_config.json's, merged */
    /* generation_config.json; NaN or -1 where absent */
    float temperature, top_p, repetition, frequency, presence;
    int32_t top_k;
} ern_config;

/* True when layer i (0..L-1) has routed experts. */
bool ern_config_is_moe(const ern_config *c, int32_t layer);

/* ---- weights --------------------------------------------------------------------------------------------------- */

typedef enum ern_dtype { ERN_DTYPE_BF16, ERN_DTYPE_F32, ERN_DTYPE_I8, ERN_DTYPE_I4, ERN_DTYPE_F8E4M3 } ern_dtype;
const char *ern_dtype_name(ern_dtype t);

/* One linear layer y[n_out] = W x[n_in]. BF16 and F32 are windows into a stored tensor; element (o, i) is at
 *   ERN_ORDER_OUT_IN (PyTorch):  data[o * stride + i]
 *   ERN_ORDER_IN_OUT (Paddle):   data[i * stride + o]
 * so that q, k, v of a fused Paddle tensor are three windows into it. I8, I4 and F8E4M3 are always whole and
 * ERN_ORDER_TILED (model/quant.h draws the tiles), with their scales. Borrowed from the mapped file, or owned by the
 * model where it was quantized while loading. */
typedef enum ern_order { ERN_ORDER_OUT_IN, ERN_ORDER_IN_OUT, ERN_ORDER_TILED } ern_order;
typedef struct ern_linear {
    const void *data; /* first element of the window; NULL: not there. TILED: aligned to 64 bytes */
    ern_dtype dtype;
    ern_order order;
    int32_t n_out, n_in;
    int64_t stride;    /* in elements; 0 when TILED */
    const void *scale; /* I8, I4: ern_bf16 [n_out]; F8E4M3: float [ceil(n_out/128), ceil(n_in/128)]; else NULL */
} ern_linear;

/* Element (o, i) as f32, for scalar code: a code times its scale, rounded once. */
float ern_linear_at(const ern_linear *w, int32_t o, int32_t i);
/* Bytes that a pass over the whole layer reads, tiles and scales included. 0 when it is not there. */
uint64_t ern_linear_bytes(const ern_linear *w);

/* How the linears of a class are stored. Source: docs/model.md 9. */
typedef enum ern_quant { ERN_QUANT_NONE, ERN_QUANT_WINT8, ERN_QUANT_WINT4, ERN_QUANT_FP8 } ern_quant;
typedef struct ern_quant_plan {
    ern_quant dense;  /* q, k, v, o, dense feed-forwards, shared experts; never the MTP layer */
    ern_quant expert; /* routed experts */
    ern_quant head;   /* NONE or WINT8; a tied head then has a copy of its own, the embedding stays bf16 */
} ern_quant_plan;

enum { ERN_QUANT_TEXT_BYTES = 96 };
/* "none", "wint8", "wint4", "block_wise_fp8"; and the weights' dtype (not for NONE). */
const char *ern_quant_name(ern_quant q);
ern_dtype ern_quant_dtype(ern_quant q);
/* What a checkpoint asks of the KV cache. */
typedef enum ern_kv_codes { ERN_KV_CODES_NONE, ERN_KV_CODES_INT8, ERN_KV_CODES_FP8 } ern_kv_codes;

/* True when any class is quantized. */
bool ern_quant_any(const ern_quant_plan *p);
/* What --quantization and --lm-head-quantization ask for; NULL where absent. text: none, wint8, wint4 (FastDeploy's
 * meaning: dense wint8, routed experts wint4), block_wise_fp8, or JSON with mix_quant; head: none or wint8 (absent:
 * wint8 when weights are quantized). Errors: ERN_ERR_USAGE, one sentence with the values that there are. */
ERN_MUST_CHECK ern_status ern_quant_parse(ern_quant_plan *out, const char *text, const char *head, ern_err *err);
/* A plan for people: "bf16", "wint8, head wint8", "dense wint8, experts wint4, head bf16". Returns out. */
const char *ern_quant_text(char out[ERN_QUANT_TEXT_BYTES], const ern_quant_plan *p);

/* A SwiGLU feed-forward: y = down( silu(gate x) * up x ). */
typedef struct ern_ffn {
    ern_linear gate, up, down;
} ern_ffn;

typedef struct ern_layer {
    const ern_bf16 *attn_norm, *ffn_norm; /* [D] */
    ern_linear q, k, v, o;
    bool is_moe;
    ern_ffn ffn;              /* dense layers */
    const float *router;      /* [E, D] f32, always in this order: converted at load when the file differs */
    const float *router_bias; /* [E] f32, or NULL */
    const ern_ffn *expert;    /* [E] */
    ern_ffn shared;           /* shared.gate.data == NULL: none */
} ern_layer;

/* The multi-token-prediction layer: docs/model.md 3.7. */
typedef struct ern_mtp {
    const ern_bf16 *emb_norm, *hidden_norm; /* [D] */
    ern_linear proj;                        /* [D, 2D]: input is concat(embedding, hidden) */
    ern_layer layer;                        /* dense */
} ern_mtp;

typedef struct ern_model {
    ern_config config;
    const ern_bf16 *embed;  /* [V, D] */
    const ern_layer *layer; /* [L] */
    const ern_bf16 *norm;   /* [D] */
    ern_linear head;        /* [V, D]; a window into embed when tied */
    bool has_mtp;
    ern_mtp mtp;
    ern_quant_plan quant;  /* what its linears are */
    bool is_paddle;        /* layout found, for messages */
    uint64_t weight_bytes; /* bytes of all weights used, as they are computed with */
    uint64_t owned_bytes;  /* of those, memory of our own beside the files: what is quantized while loading */
    bool plan_only;        /* opened so: that memory is not taken yet */
    ern_kv_codes kv_codes; /* what the checkpoint asks for (kv_cache_quant_type) */
    uint64_t fingerprint;  /* XXH3 over config.json, the tensor table (names, shapes, dtypes, offsets, file sizes)
                            * and a few bytes of every norm and attention output */
    char dir[1024];
    char unknown_keys[512];        /* of config.json, a blank between: for the log */
    struct ern_model_files *files; /* mappings and owned conversions; private */
} ern_model;

/* Called now and then with bytes done and in all; return false to stop the load (ERN_ERR_CANCELLED). May be NULL. */
typedef bool ern_progress_fn(void *ud, const char *what, uint64_t done_bytes, uint64_t all_bytes);

typedef struct ern_model_options {
    const char *dir;             /* folder with config.json and the weights */
    const char *config_name;     /* NULL: "config.json" */
    const char *mtp_dir;         /* folder of MTP weights; NULL: dir/mtp if there, else the main index */
    bool config_only;            /* read and check the config alone */
    const ern_quant_plan *quant; /* NULL: as the files are; else quantize a bf16 checkpoint so while loading. A
                                  * checkpoint that is quantized keeps its own */
    bool plan_only;              /* take no memory for what would be quantized while loading: the table is right, but
                                  * those weights must not be read. For checks before a load, and --dry-run */
    bool touch;                  /* read every page that stays in now, with progress, rather than on first use */
    ern_progress_fn *progress;
    void *ud;
} ern_model_options;

/* Open a checkpoint: read config, map files, check every tensor (name, shape, dtype, range; nothing missing, nothing
 * extra, no holes) and fill the table. All or nothing.
 * Errors: ERN_ERR_FILE, one line: file, tensor, expected, found. Source: docs/model.md 1, 2. */
ERN_MUST_CHECK ern_status ern_model_open(ern_model **out, const ern_model_options *o, ern_err *err);
void ern_model_close(ern_model *m); /* NULL is fine */
/* XXH3-128 over the weight files of an open model: of each its name, size, time of change and header, of each tensor
 * its first and last 4 KiB; for what is kept on disk beyond this process (m->fingerprint reads less and tells less).
 * Errors: ERN_ERR_FILE. */
ERN_MUST_CHECK ern_status ern_model_fingerprint(const ern_model *m, uint8_t out[16], ern_err *err);

/* ---- quantized checkpoints ------------------------------------------------------------------------------------- */

typedef struct ern_quantize_options {
    const char *dir; /* a bf16 checkpoint of either layout */
    const char *out; /* made if missing; refused when it is dir, or when it holds a model and force is false */
    ern_quant_plan plan;
    uint64_t shard_bytes; /* 0: 5 GB */
    bool force;
    ern_progress_fn *progress;
    void *ud;
} ern_quantize_options;

/* Write a checkpoint that holds what quantizing while loading would make, to be mapped: weights, config.json with our
 * quantization_config, and the files beside them (tokenizer, generation_config.json). Bounded memory at any size; a
 * failure or a stop leaves nothing behind. Errors: ERN_ERR_USAGE, ERN_ERR_FILE, ERN_ERR_CANCELLED, ERN_ERR_MEMORY.
 * Source: docs/model.md 9.4. */
ERN_MUST_CHECK ern_status ern_quantize(const ern_quantize_options *o, ern_err *err);

/* ---- made checkpoints ------------------------------------------------------------------------------------------ */

typedef struct ern_synth_options {
    const char *shape; /* tiny-dense, tiny-moe, 0.3b, 21b-a3b; in tests tiny-wide */
    const char *dir;   /* made if missing; refused when it holds a model and force is false */
    bool paddle;       /* layout */
    uint64_t seed;
    int32_t n_layer;      /* 0: the shape's own; fewer layers of the same shape otherwise */
    uint64_t shard_bytes; /* 0: 5 GB; a file of at most this many bytes each */
    bool force;
    ern_progress_fn *progress;
    void *ud;
    const ern_quant_plan *quant; /* NULL: bf16; else written quantized, with the PyTorch layout's names */
} ern_synth_options;

/* Write a checkpoint of random weights in exactly the published format: config.json, generation_config.json, weights,
 * tokenizer files. Bounded memory at any size. The formula: docs/model.md 8. */
ERN_MUST_CHECK ern_status ern_synth_write(const ern_synth_options *o, ern_err *err);
/* One element of the made weights: tensor by its PyTorch name, index = o * n_in + i. Source: docs/model.md 8. */
ern_bf16 ern_synth_bf16(uint64_t seed, const char *name, uint64_t index, float scale, float offset);
/* The same without the last rounding: the router and the correction bias, which are stored as f32. */
float ern_synth_f32(uint64_t seed, const char *name, uint64_t index, float scale, float offset);
/* The scale and offset that belong to a tensor's name and input width. */
void ern_synth_scale(const char *name, int32_t n_in, float *scale, float *offset);

#endif
