/* Bump allocation. See arena.h. */
#include "base/arena.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"

enum { BLOCK_BYTES = 64 * 1024 };

/* [ header | data ... ]; data starts after the header, aligned per request. */
struct ern_arena_block {
    ern_arena_block *next;
    size_t size_bytes, used_bytes;
};

void ern_arena_open(ern_arena *a, size_t limit_bytes) { *a = (ern_arena){.limit_bytes = limit_bytes}; }

static void *block_take(ern_arena_block *b, size_t bytes, size_t align) {
    uintptr_t base = (uintptr_t)(b + 1);
    uintptr_t at = (base + b->used_bytes + align - 1) & ~(uintptr_t)(align - 1);
    size_t end = (size_t)(at - base) + bytes;
    if (end > b->size_bytes || end < bytes) return NULL;
    b->used_bytes = end;
    return (void *)at;
}

void *ern_arena_take(ern_arena *a, size_t bytes, size_t align) {
    ERN_ASSERT(align > 0 && align <= 4096 && (align & (align - 1)) == 0);
    if (bytes == 0) bytes = 1;
    if (bytes > SIZE_MAX / 2) return NULL;
    if (a->limit_bytes && (a->used_bytes > a->limit_bytes || bytes > a->limit_bytes - a->used_bytes)) return NULL;
    void *p = a->head ? block_take(a->head, bytes, align) : NULL;
    if (!p) {
        size_t size = bytes + align > BLOCK_BYTES ? bytes + align : BLOCK_BYTES;
        ern_arena_block *b = calloc(1, sizeof *b + size); /* zeroed once: block memory is never reused within a life */
        if (!b) return NULL;
        b->size_bytes = size;
        b->next = a->head;
        a->head = b;
        p = block_take(b, bytes, align);
        ERN_ASSERT(p != NULL);
    }
    a->used_bytes += bytes;
    return p;
}

void *ern_arena_take_n(ern_arena *a, size_t n, size_t each_bytes) {
    size_t bytes;
    if (__builtin_mul_overflow(n, each_bytes, &bytes)) return NULL;
    return ern_arena_take(a, bytes, 64);
}

char *ern_arena_text(ern_arena *a, const char *text, size_t len) {
    char *p = len == SIZE_MAX ? NULL : ern_arena_take(a, len + 1, 1);
    if (p && len) memcpy(p, text, len);
    return p;
}

void ern_arena_close(ern_arena *a) {
    while (a->head) {
        ern_arena_block *b = a->head;
        a->head = b->next;
        free(b);
    }
    a->used_bytes = 0;
}
