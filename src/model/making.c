/* A checkpoint's folder, made aside. See making.h. */
#include "model/making.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/os.h"
#include "model/checkpoint.h"

enum { PATH_BYTES = MAKING_PATH_BYTES, INDEX_BYTES_MAX = 64 << 20 };
#define STAGE "making.part"

static ern_status text_file(const char *path, const ern_buf *text, ern_err *err) {
    FILE *f = fopen(path, "wbxe");
    if (!f) return ERN_FAIL(err, ERN_ERR_FILE, "cannot make %.300s: %s", path, strerror(errno));
    bool good = fwrite(text->data, 1, text->len, f) == text->len;
    good = fclose(f) == 0 && good;
    return good ? ERN_OK : ERN_FAIL(err, ERN_ERR_FILE, "cannot write %.300s: %s", path, strerror(errno));
}

/* ---- folders -------------------------------------------------------------------------------------------------------
 */

ern_status making_each_file(const char *dir, making_file_fn *fn, void *ud, ern_err *err) {
    DIR *d = opendir(dir);
    if (!d) return ERN_OK;
    ern_status s = ERN_OK;
    for (struct dirent *e; s == ERN_OK && (e = readdir(d));) {
        struct stat st;
        if (fstatat(dirfd(d), e->d_name, &st, AT_SYMLINK_NOFOLLOW) != 0 || S_ISDIR(st.st_mode)) continue;
        s = fn(ud, dir, e->d_name, err);
    }
    closedir(d);
    return s;
}

static ern_status remove_file(void *ud, const char *dir, const char *name, ern_err *err) {
    char path[PATH_BYTES];
    (void)ud;
    ERN_TRY(ern_path_join(path, sizeof path, dir, name, err));
    if (unlink(path) != 0) return ERN_FAIL(err, ERN_ERR_FILE, "cannot remove %.300s: %s", path, strerror(errno));
    return ERN_OK;
}

bool making_is_weights(const char *name) {
    static const char end[] = ".safetensors";
    size_t n = strlen(name), k = sizeof end - 1;
    return (n > k && strcmp(name + n - k, end) == 0) || strcmp(name, CKPT_INDEX) == 0;
}

/* What an old checkpoint would mix into the new one. */
static ern_status remove_weights(void *ud, const char *dir, const char *name, ern_err *err) {
    return making_is_weights(name) || strcmp(name, "config.json") == 0 ? remove_file(ud, dir, name, err) : ERN_OK;
}

static ern_status look_for_model(void *ud, const char *dir, const char *name, ern_err *err) {
    (void)ud;
    if (!making_is_weights(name) && strcmp(name, "config.json") != 0) return ERN_OK;
    return ERN_FAIL(err, ERN_ERR_USAGE, "%.300s holds a model already (%.80s); choose another folder, or use --force",
                    dir, name);
}

static ern_status move_file(void *ud, const char *dir, const char *name, ern_err *err) {
    char from[PATH_BYTES], to[PATH_BYTES];
    ERN_TRY(ern_path_join(from, sizeof from, dir, name, err));
    ERN_TRY(ern_path_join(to, sizeof to, ud, name, err));
    if (rename(from, to) != 0)
        return ERN_FAIL(err, ERN_ERR_FILE, "cannot move %.200s to %.200s: %s", from, to, strerror(errno));
    return ERN_OK;
}

static ern_status move_all_but_config(void *ud, const char *dir, const char *name, ern_err *err) {
    return strcmp(name, "config.json") == 0 ? ERN_OK : move_file(ud, dir, name, err);
}

static ern_status folder_make(const char *path, bool *is_new, ern_err *err) {
    *is_new = mkdir(path, 0777) == 0;
    if (*is_new || errno == EEXIST) return ERN_OK;
    return ERN_FAIL(err, ERN_ERR_FILE, "cannot make the folder %.300s: %s", path, strerror(errno));
}

static void stage_remove(const making *at) {
    const char *const dir[] = {at->stage_mtp, at->stage};
    for (int i = 0; i < 2; i++) /* what cannot be removed is met again by the next run, which says so */
        if (making_each_file(dir[i], remove_file, NULL, NULL) == ERN_OK) (void)rmdir(dir[i]);
}

static ern_status begin(making *at, const char *dir, bool force, ern_err *err) {
    bool stage_is_new;
    *at = (making){0};
    if (strlen(dir) == 0 || strlen(dir) > 1000)
        return ERN_FAIL(err, ERN_ERR_USAGE, "the output folder must have a name of 1 to 1000 characters, found %zu",
                        strlen(dir));
    ERN_TRY(ern_path_join(at->mtp, PATH_BYTES, dir, "mtp", err));
    ERN_TRY(ern_path_join(at->stage, PATH_BYTES, dir, STAGE, err));
    ERN_TRY(ern_path_join(at->stage_mtp, PATH_BYTES, at->stage, "mtp", err));
    strcpy(at->dir, dir);
    ERN_TRY(folder_make(at->dir, &at->dir_is_new, err));
    if (!force) ERN_TRY(making_each_file(at->dir, look_for_model, NULL, err));
    ERN_TRY(folder_make(at->stage, &stage_is_new, err));
    if (stage_is_new) return ERN_OK;
    stage_remove(at); /* what a killed run left */
    return folder_make(at->stage, &stage_is_new, err);
}

ern_status making_begin(making *at, const char *dir, bool force, ern_err *err) {
    ern_status s = begin(at, dir, force, err);
    if (s != ERN_OK && at->dir_is_new) (void)rmdir(at->dir);
    return s;
}

ern_status making_text(const char *dir, const char *name, const ern_buf *text, ern_err *err) {
    char path[PATH_BYTES];
    if (text->full) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for %s", name);
    ERN_TRY(ern_path_join(path, sizeof path, dir, name, err));
    return text_file(path, text, err);
}

ern_status making_space(const making *at, uint64_t need, ern_err *err) {
    struct statvfs v;
    if (statvfs(at->dir, &v) != 0) return ERN_OK; /* the writes will say */
    uint64_t there = (uint64_t)v.f_bavail * v.f_frsize;
    if (there >= need) return ERN_OK;
    return ERN_FAIL(err, ERN_ERR_FILE, "%.300s has %.1f GB free, the checkpoint needs %.1f GB", at->dir,
                    (double)there / 1e9, (double)need / 1e9);
}

ern_status making_mtp(const making *at, ern_err *err) {
    bool is_new;
    return folder_make(at->stage_mtp, &is_new, err);
}

/* Everything is made: take away what would mix, move in what was staged, the config last. */
static ern_status settle(const making *at, ern_err *err) {
    bool is_new;
    struct stat st;
    ERN_TRY(making_each_file(at->dir, remove_weights, NULL, err));
    ERN_TRY(making_each_file(at->mtp, remove_weights, NULL, err));
    if (stat(at->stage_mtp, &st) == 0) {
        ERN_TRY(folder_make(at->mtp, &is_new, err));
        ERN_TRY(making_each_file(at->stage_mtp, move_file, (void *)(uintptr_t)at->mtp, err));
    }
    ERN_TRY(making_each_file(at->stage, move_all_but_config, (void *)(uintptr_t)at->dir, err));
    return making_each_file(at->stage, move_file, (void *)(uintptr_t)at->dir, err);
}

ern_status making_end(making *at, ern_status s, ern_err *err) {
    if (s == ERN_OK) s = settle(at, err);
    stage_remove(at);
    if (s != ERN_OK && at->dir_is_new) (void)rmdir(at->dir);
    return s;
}

/* ---- files of weights --------------------------------------------------------------------------------------------
 */

void making_file_name(char out[MAKING_FILE_NAME_BYTES], int32_t file, int32_t n_file) {
    if (n_file == 1)
        snprintf(out, MAKING_FILE_NAME_BYTES, "%s", CKPT_SINGLE);
    else
        snprintf(out, MAKING_FILE_NAME_BYTES, "model-%05d-of-%05d.safetensors", file + 1, n_file);
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const making_entry *)a)->name, ((const making_entry *)b)->name);
}

ern_status making_index(const char *dir, making_entry *entry, size_t n, int32_t n_file, uint64_t total, ern_err *err) {
    char file[MAKING_FILE_NAME_BYTES];
    ern_buf b;
    ern_buf_init(&b, INDEX_BYTES_MAX);
    qsort(entry, n, sizeof *entry, by_name);
    ern_buf_print(&b, "{\n  \"metadata\": {\n    \"total_size\": %llu\n  },\n  \"weight_map\": {",
                  (unsigned long long)total);
    for (size_t i = 0; i < n; i++) {
        making_file_name(file, entry[i].file, n_file);
        ern_buf_print(&b, "%s\n    \"%s%s\": \"%s\"", i ? "," : "", entry[i].name, entry[i].tail, file);
    }
    ern_buf_text(&b, "\n  }\n}\n");
    ern_status s = making_text(dir, CKPT_INDEX, &b, err);
    ern_buf_free(&b);
    return s;
}
