/* Counter-based random numbers: a pure function of (key, index), so nothing has a state that batching, preemption or
 * a restart could shift. Users: the made weights (model/synth.h), token sampling (model/sample.h), and what benchmarks
 * multiply. Source: the SplitMix64 finalizer (Steele, Lea, Flood 2014). */
#ifndef ERN_BASE_COUNTER_H
#define ERN_BASE_COUNTER_H

#include <stddef.h>
#include <stdint.h>

/* 64 well-mixed bits for (key, index). */
static inline uint64_t ern_counter64(uint64_t key, uint64_t index) {
    uint64_t z = key + (index + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* FNV-1a over bytes, the key of a name. */
static inline uint64_t ern_counter_key(uint64_t seed, const char *name) {
    uint64_t h = 0xcbf29ce484222325ull ^ ern_counter64(seed, 0);
    for (; *name; name++) h = (h ^ (unsigned char)*name) * 0x100000001b3ull;
    return h;
}

#endif
