/* bfloat16 and fp8 (e4m3fn) to float32 and back. bf16 is the upper half of an f32; rounding is to nearest, ties to
 * even; NaN stays NaN. e4m3fn: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity; 0x7f and 0xff are NaN.
 */
#ifndef ERN_BASE_HALF_H
#define ERN_BASE_HALF_H

#include <stdint.h>
#include <string.h>

typedef uint16_t ern_bf16;

static inline float ern_bf16_to_f32(ern_bf16 h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline ern_bf16 ern_bf16_from_f32(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (ern_bf16)((u >> 16) | 0x40u);
    return (ern_bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float ern_e4m3_to_f32(uint8_t c) {
    const uint32_t sign = (uint32_t)(c & 0x80u) << 24, mag = c & 0x7fu;
    uint32_t u = sign | 0x7fc00000u;
    float f;
    if (mag < 8) { /* below the normal range: multiples of 2^-9 */
        f = (float)mag * 0x1p-9f;
        memcpy(&u, &f, sizeof u);
        u |= sign;
    } else if (mag < 0x7f) {
        u = sign | ((mag << 20) + (120u << 23));
    }
    memcpy(&f, &u, sizeof f);
    return f;
}

/* Saturates: what rounds above 448 becomes 448. */
static inline uint8_t ern_e4m3_from_f32(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    const uint8_t sign = (uint8_t)(u >> 24 & 0x80u);
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return sign | 0x7fu;
    if (u >= 0x43e00000u) return sign | 0x7eu; /* >= 448 */
    if (u < 0x3c800000u) {                     /* < 2^-6: multiples of 2^-9; adding 2^14 leaves them in the last bits */
        float a, big = 0x1p14f;
        memcpy(&a, &u, sizeof a);
        a += big;
        memcpy(&u, &a, sizeof u);
        return sign | (uint8_t)(u - 0x46800000u);
    }
    u = u + 0x7ffffu + ((u >> 20) & 1u); /* to 3 bits of mantissa */
    const uint32_t c = (u >> 20) - (120u << 3);
    return sign | (uint8_t)(c > 0x7eu ? 0x7eu : c);
}

#endif
