/* "After start the engine does not call malloc": in builds with ERN_CHECKS, an allocation by a sealed thread (core.h)
 * aborts. Under a sanitizer the allocator calls us; elsewhere we stand before glibc's. */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include "engine/core.h"

#if defined(ERN_CHECKS)

static void look(size_t n_byte) {
    if (!core_sealed) return;
    core_sealed = false;
    fprintf(stderr, "malloc of %zu bytes in the engine thread after start\n", n_byte);
    abort();
}

#if defined(__has_feature)
#define FEATURE(x) __has_feature(x)
#else
#define FEATURE(x) 0
#endif

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || FEATURE(address_sanitizer) || \
    FEATURE(thread_sanitizer)

/* gcc ships the function without its header. */
extern int __sanitizer_install_malloc_and_free_hooks(void (*on_malloc)(const volatile void *, size_t),
                                                     void (*on_free)(const volatile void *));

static void on_malloc(const volatile void *p, size_t n_byte) {
    (void)p;
    look(n_byte);
}
static void on_free(const volatile void *p) { (void)p; }
__attribute__((constructor)) static void install(void) {
    __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
}

#else

extern void *__libc_malloc(size_t n_byte);
extern void *__libc_calloc(size_t n, size_t each_bytes);
extern void *__libc_realloc(void *p, size_t n_byte);

void *malloc(size_t n_byte) {
    look(n_byte);
    return __libc_malloc(n_byte);
}
void *calloc(size_t n, size_t each_bytes) {
    look(n * each_bytes);
    return __libc_calloc(n, each_bytes);
}
void *realloc(void *p, size_t n_byte) {
    look(n_byte);
    return __libc_realloc(p, n_byte);
}

#endif
#endif
