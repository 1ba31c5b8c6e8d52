/* model.safetensors.index.json: whatever is accepted names plain files beside it, each tensor once. */
#include <stdint.h>
#include <string.h>

#include "model/checkpoint.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    ern_arena arena;
    ckpt_index x;
    ern_err err = {0};
    ern_arena_open(&arena, 0);
    ern_status s = ckpt_index_parse(&x, &arena, (const char *)data, size, "index.json", &err);
    if (s == ERN_OK) {
        ERN_ASSERT(x.n_name > 0 && x.n_file > 0 && x.n_file <= x.n_name);
        for (int32_t i = 0; i < x.n_name; i++) {
            ERN_ASSERT(x.file_of[i] >= 0 && x.file_of[i] < x.n_file && st_name_ok(x.name[i], strlen(x.name[i])));
            ERN_ASSERT(i == 0 || strcmp(x.name[i - 1], x.name[i]) < 0);
        }
        for (int32_t i = 0; i < x.n_file; i++) {
            size_t len = strlen(x.file[i]);
            ERN_ASSERT(!strchr(x.file[i], '/') && x.file[i][0] != '.' && len > 12 && len < 256);
            ERN_ASSERT(strcmp(x.file[i] + len - 12, ".safetensors") == 0);
            ERN_ASSERT(i == 0 || strcmp(x.file[i - 1], x.file[i]) < 0);
        }
    } else {
        ERN_ASSERT(s == ERN_ERR_FILE && strlen(err.text) > 10);
    }
    ern_arena_close(&arena);
    return 0;
}
