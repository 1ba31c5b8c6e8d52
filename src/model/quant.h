/* The law of quantized weights and activations: a second door of `model`, beside model.h. Source: docs/model.md 9.
 *
 * Weights are quantized to tiles: 16 outputs by 64 inputs, the tiles of one band of 16 outputs side by side along K,
 * bands one after the other. What lies beyond n_out or n_in is code zero, so kernels need no tails.
 *
 *                 64 inputs                   I8      1024 bytes: byte 64 (i/4) + 4 o + i%4            = q + 128
 *               +-----------+                 I4       512 bytes: byte 64 (i/8) + 4 o + i%4, low nibble when
 *   16 outputs  |   tile    | ...                                 i%8 < 4, high nibble else            = q + 8
 *               +-----------+                 F8E4M3  1024 bytes: byte 16 i + o                        = e4m3 code
 *                    ...
 *                                             (o, i inside the tile)
 *
 * An I8 tile is what AMX calls a tile of B and AVX-512 reads as 16 lines of 16 outputs by 4 inputs.
 * Everything here is scalar and exact by the letter; a backend's kernels are held against it.
 * Thread: any; no state. */
#ifndef ERN_MODEL_QUANT_H
#define ERN_MODEL_QUANT_H

#include "model/model.h"

enum {
    ERN_TILE_OUT = 16,
    ERN_TILE_IN = 64,
    ERN_ACT_GROUP = 128, /* inputs that share one scale of a quantized activation */
    ERN_F8_BLOCK = 128,  /* outputs and inputs that share one scale of an fp8 weight */
};

/* Bytes of the tiles, and of the scales, of a quantized linear [n_out, n_in]. Tiles are a multiple of 64. */
uint64_t quant_tile_bytes(ern_dtype t, int32_t n_out, int32_t n_in);
uint64_t quant_scale_bytes(ern_dtype t, int32_t n_out, int32_t n_in);

/* Quantize outputs from..to-1 of a BF16 linear of either order; from is a multiple of 16, and for F8E4M3 of 128; to is
 * one or n_out. tile: all tiles, aligned to 64; scale: all scales; only the parts of these outputs are written.
 * int8:  amax = max_k |W[o][k]|; q = round half away (clip(W / amax * 127)), scale = bf16(amax / 127)
 * int4:  the same with 7
 * fp8:   a = max |W| over a block of 128 x 128; f = 448 / a (1 when that is not finite); q = e4m3(W * f), scale = 1 / f
 * A row of zeros: q and scale 0. False: a weight is not finite. Source: docs/model.md 9.1. */
ERN_MUST_CHECK bool quant_weights(void *tile, void *scale, ern_dtype t, const ern_linear *w, int32_t from, int32_t to);
/* Element (o, i) of a TILED linear: code * scale in f32. */
float quant_at(const ern_linear *w, int32_t o, int32_t i);
/* The code of element (o, i) as the integer or e4m3 value it stands for, without the scale. */
float quant_code_at(const ern_linear *w, int32_t o, int32_t i);

/* The scale of output o's weights in group g of 128 inputs. */
float quant_scale_at(const ern_linear *w, int32_t o, int32_t g);

/* One activation row x [n] to int8: for each group g of 128 inputs, amax = max |x|, scale[g] = amax / 127,
 * q = round to even (x * (127 / amax)), all in f32. A group whose scale is below 2^-100 has scale 0 and q 0; one that
 * holds a number that is not finite has scale NaN and q 0, so that the result is NaN as well. q [n], scale
 * [ceil(n/128)]. Source: docs/model.md 9.2. */
void quant_act_int8(int8_t *q, float *scale, const float *x, int32_t n);
/* The same to fp8: a = max(max |x|, 1e-10), q = e4m3(x * (448 / a)), scale[g] = a / 448; not finite: the same. */
void quant_act_fp8(uint8_t *q, float *scale, const float *x, int32_t n);

#endif
