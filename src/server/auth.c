/* SHA-256 and key comparison. See auth.h. */
#include "server/auth.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/status.h"

enum { SALT_MAX_BYTES = 1024 };

static const uint32_t k256[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t rotr(uint32_t x, int n) { return (x >> n) | (x << (32 - n)); }

static void block(uint32_t h[8], const uint8_t *p) {
    uint32_t w[64];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 | (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = rotr(w[i - 15], 7) ^ rotr(w[i - 15], 18) ^ (w[i - 15] >> 3);
        uint32_t b = rotr(w[i - 2], 17) ^ rotr(w[i - 2], 19) ^ (w[i - 2] >> 10);
        w[i] = w[i - 16] + a + w[i - 7] + b;
    }
    uint32_t s[8];
    memcpy(s, h, sizeof s);
    for (int i = 0; i < 64; i++) {
        uint32_t e1 = rotr(s[4], 6) ^ rotr(s[4], 11) ^ rotr(s[4], 25);
        uint32_t t1 = s[7] + e1 + ((s[4] & s[5]) ^ (~s[4] & s[6])) + k256[i] + w[i];
        uint32_t e0 = rotr(s[0], 2) ^ rotr(s[0], 13) ^ rotr(s[0], 22);
        uint32_t t2 = e0 + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 7 * sizeof s[0]);
        s[4] += t1;
        s[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) h[i] += s[i];
}

void auth_sha256(const void *data, size_t len, uint8_t out[32]) {
    uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    const uint8_t *p = data;
    size_t n = len;
    for (; n >= 64; n -= 64, p += 64) block(h, p);
    uint8_t last[128] = {0};
    if (n) memcpy(last, p, n);
    last[n] = 0x80;
    size_t end = n < 56 ? 64 : 128;
    uint64_t bits = (uint64_t)len * 8;
    for (size_t i = 0; i < 8; i++) last[end - 1 - i] = (uint8_t)(bits >> (8 * i));
    for (size_t i = 0; i < end; i += 64) block(h, last + i);
    for (int i = 0; i < 32; i++) out[i] = (uint8_t)(h[i / 4] >> (24 - 8 * (i % 4)));
}

bool auth_open(auth_keys *k, const char *const *key, int n) {
    *k = (auth_keys){0};
    if (n <= 0) return true;
    k->digest = calloc((size_t)n, 32);
    if (!k->digest) return false;
    for (int i = 0; i < n; i++) auth_sha256(key[i], strlen(key[i]), k->digest[i]);
    k->n = n;
    return true;
}

void auth_close(auth_keys *k) {
    free(k->digest);
    *k = (auth_keys){0};
}

/* The key of "Bearer KEY", or NULL. */
static const char *bearer(const char *authorization) {
    if (!authorization || strncasecmp(authorization, "Bearer", 6) != 0 || authorization[6] != ' ') return NULL;
    const char *key = authorization + 7;
    while (*key == ' ') key++;
    return key;
}

bool auth_allows(const auth_keys *k, const char *authorization) {
    if (k->n == 0) return true;
    uint8_t d[32];
    if (!auth_caller(k, authorization, d)) return false;
    unsigned found = 0;
    for (int i = 0; i < k->n; i++) {
        unsigned diff = 0;
        for (int b = 0; b < 32; b++) diff |= (unsigned)(d[b] ^ k->digest[i][b]);
        found |= (diff - 1) >> 31; /* 1 exactly when diff is 0 */
    }
    return found != 0;
}

bool auth_caller(const auth_keys *k, const char *authorization, uint8_t out[32]) {
    const char *key = k->n ? bearer(authorization) : NULL;
    if (key) auth_sha256(key, strlen(key), out);
    return key != NULL;
}

void auth_salt(uint8_t out[16], const uint8_t *caller, const char *cache_salt, size_t n) {
    uint8_t text[3 + 32 + SALT_MAX_BYTES], digest[32];
    memset(out, 0, 16);
    if (!caller && n == 0) return;
    ERN_ASSERT(n <= SALT_MAX_BYTES); /* the validator's limit */
    size_t at = 0;
    text[at++] = caller ? 32 : 0;
    if (caller) memcpy(text + at, caller, 32);
    at += caller ? 32 : 0;
    text[at++] = (uint8_t)(n >> 8);
    text[at++] = (uint8_t)n;
    if (n) memcpy(text + at, cache_salt, n);
    auth_sha256(text, at + n, digest);
    memcpy(out, digest, 16);
}
