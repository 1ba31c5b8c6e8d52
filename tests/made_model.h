/* For tests: a made model in a folder of its own under /tmp, opened; made_model_close removes it. A failure prints and
 * aborts: a test that cannot make its model has nothing to say. */
#ifndef ERN_TESTS_MADE_MODEL_H
#define ERN_TESTS_MADE_MODEL_H

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/model.h"

typedef struct made_model {
    char dir[64];
    ern_model *model;
} made_model;

static inline void made_check(ern_status s, const ern_err *err, const char *doing) {
    if (s == ERN_OK) return;
    fprintf(stderr, "%s: %s (%s:%d)\n", doing, err->text, err->file, err->line);
    abort();
}

/* A new empty folder; 64 bytes for its name. */
static inline void made_dir(char dir[64]) {
    strcpy(dir, "/tmp/ernest-test-XXXXXX");
    if (!mkdtemp(dir)) {
        perror("mkdtemp");
        abort();
    }
}

static inline int made_remove_one(const char *path, const struct stat *st, int type, struct FTW *where) {
    (void)st, (void)type, (void)where;
    return remove(path);
}

/* Remove a folder that made_dir made, with all in it. */
static inline void made_dir_remove(const char *dir) {
    if (strncmp(dir, "/tmp/ernest-test-", 17) == 0) (void)nftw(dir, made_remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

/* Make and open; n_layer 0 is the shape's own number. */
static inline made_model made_model_open_layers(const char *shape, bool paddle, uint64_t seed, int32_t n_layer) {
    made_model m;
    ern_err err;
    made_dir(m.dir);
    ern_synth_options make = {.shape = shape, .dir = m.dir, .paddle = paddle, .seed = seed, .n_layer = n_layer};
    made_check(ern_synth_write(&make, &err), &err, "making a model");
    ern_model_options open = {.dir = m.dir};
    made_check(ern_model_open(&m.model, &open, &err), &err, "opening a made model");
    return m;
}

static inline made_model made_model_open(const char *shape, bool paddle, uint64_t seed) {
    return made_model_open_layers(shape, paddle, seed, 0);
}

static inline void made_model_close(made_model *m) {
    ern_model_close(m->model);
    m->model = NULL;
    made_dir_remove(m->dir);
}

#endif
