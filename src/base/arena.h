/* Bump allocation for the three lifetimes (process, request, step): allocate many, free once.
 *
 * An arena is one fixed block (ern_arena_init: never grows, full returns NULL) or a chain of blocks up to a limit
 * (ern_arena_open). Everything taken is zeroed and 64-byte aligned unless asked otherwise.
 * Owner: whoever opened it; memory from it dies with reset or close. One thread at a time. */
#ifndef ERN_BASE_ARENA_H
#define ERN_BASE_ARENA_H

#include <stddef.h>

typedef struct ern_arena_block ern_arena_block;

typedef struct ern_arena {
    ern_arena_block *head; /* newest block first */
    size_t used_bytes;     /* handed out, with padding */
    size_t limit_bytes;    /* most it may hand out; 0: no limit but the machine's */
} ern_arena;

/* Start an empty chain that hands out at most limit_bytes (0: unlimited). Allocates nothing yet. */
void ern_arena_open(ern_arena *a, size_t limit_bytes);
/* Take bytes, zeroed, aligned to `align` (a power of two, 1..4096). NULL when the limit or the machine is out. */
void *ern_arena_take(ern_arena *a, size_t bytes, size_t align);
/* Copy a string of len bytes and end it with a NUL. NULL when out. */
char *ern_arena_text(ern_arena *a, const char *text, size_t len);
/* Give everything back; the arena can be used again. */
void ern_arena_close(ern_arena *a);

/* An array of n zeroed T, or NULL. */
#define ERN_ARENA_NEW(a, T, n) ((T *)ern_arena_take_n((a), (n), sizeof(T)))
void *ern_arena_take_n(ern_arena *a, size_t n, size_t each_bytes);

#endif
