/* Bearer keys: kept and compared as SHA-256 digests, every key looked at every time, so that neither length nor first
 * difference shows in the time taken. A caller's digest also keeps its cached prompts apart from others'. Source: FIPS
 * 180-4. */
#ifndef ERN_SERVER_AUTH_H
#define ERN_SERVER_AUTH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct auth_keys {
    uint8_t (*digest)[32]; /* [n] */
    int n;
} auth_keys;

void auth_sha256(const void *data, size_t len, uint8_t out[32]);
/* False when out of memory. */
bool auth_open(auth_keys *k, const char *const *key, int n);
void auth_close(auth_keys *k);
/* True when no key is set, or the Authorization header's value (NULL: none) is "Bearer <one of them>". */
bool auth_allows(const auth_keys *k, const char *authorization);
/* The digest of the key in an Authorization header: who calls. False: no keys are set, or there is none in it. */
bool auth_caller(const auth_keys *k, const char *authorization, uint8_t out[32]);
/* ern_request.salt: who may share cached KV. The first half of SHA-256 over the caller's digest (NULL: none) and the
 * request's cache_salt (n 0: none), each with its length in front; all zero where there is neither. The same after a
 * restart, whatever the order of the keys. */
void auth_salt(uint8_t out[16], const uint8_t *caller, const char *cache_salt, size_t n);

#endif
