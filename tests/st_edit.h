/* For tests: a safetensors file as a list that can be edited and written again, rightly or wrongly. */
#ifndef ERN_TESTS_ST_EDIT_H
#define ERN_TESTS_ST_EDIT_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "made_model.h"
#include "model/safetensors.h"

enum { ST_LIST_MAX = 8192 };

typedef struct st_entry {
    char name[128], dtype[12];
    int n_dim;
    long long dim[4];
    unsigned char *data; /* NULL: a hole of `bytes` in a sparse file */
    size_t bytes;
} st_entry;

typedef struct st_list {
    st_entry *entry; /* [ST_LIST_MAX] */
    int n;
    int shift; /* spaces more than needed at the header's end: 1 puts all data at odd addresses */
} st_list;

#define ST_EDIT_CHECK(what) ((what) ? (void)0 : (perror(#what), abort()))

static inline st_list st_list_new(void) {
    st_list l = {calloc(ST_LIST_MAX, sizeof(st_entry)), 0, 0};
    ST_EDIT_CHECK(l.entry);
    return l;
}

static inline void st_list_free(st_list *l) {
    for (int i = 0; i < l->n; i++) free(l->entry[i].data);
    free(l->entry);
}

static inline st_entry *st_list_add(st_list *l, const char *name, const char *dtype, int n_dim, const int64_t *dim,
                                    size_t bytes, const void *data) {
    ST_EDIT_CHECK(l->n < ST_LIST_MAX && n_dim <= 4);
    st_entry *e = &l->entry[l->n++];
    memset(e, 0, sizeof *e);
    snprintf(e->name, sizeof e->name, "%s", name);
    snprintf(e->dtype, sizeof e->dtype, "%s", dtype);
    e->n_dim = n_dim;
    for (int i = 0; i < n_dim; i++) e->dim[i] = dim[i];
    e->bytes = bytes;
    if (!data) return e;
    e->data = malloc(bytes ? bytes : 1);
    ST_EDIT_CHECK(e->data);
    memcpy(e->data, data, bytes);
    return e;
}

/* Append all tensors of dir/name. */
static inline void st_list_read(st_list *l, const char *dir, const char *name) {
    char path[256];
    ern_arena arena;
    ern_err err;
    st_file f;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    ern_arena_open(&arena, 0);
    made_check(st_file_open(&f, &arena, path, &err), &err, "reading a made file");
    for (int i = 0; i < f.n_tensor; i++) {
        const st_tensor *t = &f.tensor[i];
        st_list_add(l, t->name, st_dtype_name(t->dtype), t->n_dim, t->dim, (size_t)t->bytes, f.map.data + t->from);
    }
    st_file_close(&f);
    ern_arena_close(&arena);
}

static inline st_entry *st_list_find(const st_list *l, const char *name) {
    for (int i = 0; i < l->n; i++)
        if (strcmp(l->entry[i].name, name) == 0) return &l->entry[i];
    fprintf(stderr, "no tensor %s\n", name);
    abort();
}

static inline void st_list_drop(st_list *l, const char *name) {
    st_entry *e = st_list_find(l, name);
    free(e->data);
    memmove(e, e + 1, (size_t)(l->entry + --l->n - e) * sizeof *e);
}

/* The header's text for entries [from, to), NUL-ended; free() it. */
static inline char *st_list_header(const st_list *l, int from, int to) {
    size_t cap = (size_t)(to - from) * 400 + 256, at = 0;
    unsigned long long offset = 0;
    char *h = malloc(cap);
    ST_EDIT_CHECK(h);
    at += (size_t)snprintf(h, cap, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int i = from; i < to; i++) {
        const st_entry *e = &l->entry[i];
        at += (size_t)snprintf(h + at, cap - at, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", e->name, e->dtype);
        for (int k = 0; k < e->n_dim; k++) at += (size_t)snprintf(h + at, cap - at, "%s%lld", k ? "," : "", e->dim[k]);
        at += (size_t)snprintf(h + at, cap - at, "],\"data_offsets\":[%llu,%llu]}", offset, offset + e->bytes);
        offset += e->bytes;
    }
    h[at++] = '}';
    while ((at + 8) % 64 != 0) h[at++] = ' '; /* data begin at a multiple of 64, as ernest writes them */
    for (int i = 0; i < l->shift; i++) h[at++] = ' ';
    h[at] = 0;
    return h;
}

/* Write entries [from, to) as dir/name. */
static inline void st_list_write(const st_list *l, int from, int to, const char *dir, const char *name) {
    char path[256], *header = st_list_header(l, from, to);
    uint64_t len = strlen(header);
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    ST_EDIT_CHECK(f);
    for (int k = 0; k < 8; k++) fputc((int)(len >> (8 * k) & 0xff), f);
    ST_EDIT_CHECK(fwrite(header, 1, len, f) == len);
    uint64_t at = 8 + len;
    for (int i = from; i < to; at += l->entry[i++].bytes)
        if (l->entry[i].data && l->entry[i].bytes)
            ST_EDIT_CHECK(fseeko(f, (off_t)at, SEEK_SET) == 0 &&
                          fwrite(l->entry[i].data, 1, l->entry[i].bytes, f) == l->entry[i].bytes);
    ST_EDIT_CHECK(fflush(f) == 0 && ftruncate(fileno(f), (off_t)at) == 0 && fclose(f) == 0);
    free(header);
}

static inline void text_write(const char *dir, const char *name, const char *text) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    ST_EDIT_CHECK(f && fputs(text, f) >= 0 && fclose(f) == 0);
}

/* Write the list as shards of `each` tensors with an index. */
static inline void st_list_write_shards(const st_list *l, int each, const char *dir) {
    char name[64], *index = malloc((size_t)l->n * 200 + 256);
    size_t at = 0;
    int n_file = (l->n + each - 1) / each;
    ST_EDIT_CHECK(index);
    at += (size_t)sprintf(index, "{\"metadata\":{\"total_size\":0},\"weight_map\":{");
    for (int i = 0; i < n_file; i++) {
        int to = (i + 1) * each < l->n ? (i + 1) * each : l->n;
        snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", i + 1, n_file);
        st_list_write(l, i * each, to, dir, name);
        for (int k = i * each; k < to; k++)
            at += (size_t)sprintf(index + at, "%s\"%s\":\"%s\"", k ? "," : "", l->entry[k].name, name);
    }
    sprintf(index + at, "}}");
    text_write(dir, "model.safetensors.index.json", index);
    free(index);
}

#endif
