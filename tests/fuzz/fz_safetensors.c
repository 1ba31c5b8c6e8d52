/* The safetensors header: whatever is accepted tiles its file, with unique names and sizes that multiply out. The first
 * two bytes of the input choose the number of data bytes; the rest is the header. */
#include <stdint.h>
#include <string.h>

#include "model/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2) return 0;
    uint64_t data_bytes = (uint64_t)data[0] | (uint64_t)data[1] << 8, len = size - 2, at = 8 + len;
    ern_arena arena;
    st_tensor *t;
    int32_t n;
    ern_err err = {0};
    ern_arena_open(&arena, 0);
    ern_status s =
        st_header_scan(&t, &n, &arena, (const char *)data + 2, len, at + data_bytes, "fuzz.safetensors", &err);
    if (s != ERN_OK) {
        ERN_ASSERT(s == ERN_ERR_FILE && n == 0 && strlen(err.text) > 16 && !strchr(err.text, '\n'));
    } else {
        for (int32_t i = 0; i < n; i++) {
            uint64_t bytes = st_dtype_bytes(t[i].dtype);
            for (int32_t k = 0; k < t[i].n_dim; k++) bytes *= (uint64_t)t[i].dim[k];
            ERN_ASSERT(t[i].from == at && t[i].bytes == bytes && st_name_ok(t[i].name, strlen(t[i].name)));
            at += bytes;
            for (int32_t k = 0; k < i && i < 64; k++) ERN_ASSERT(strcmp(t[i].name, t[k].name) != 0);
        }
        ERN_ASSERT(at == 8 + len + data_bytes);
    }
    ern_arena_close(&arena);
    return 0;
}
