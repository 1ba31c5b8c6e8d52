/* A SentencePiece file of any bytes: refused, or opened and then honest: what it encodes it decodes to the same text,
 * and no text spells a special. */
#include <sys/mman.h>

#include "fuzz_text.h"

static const char sample[] = "The sea,  12 ships\n<s><think>ab \xc3\xa9\xe4\xbd\xa0\xf0\x9f\x98\x80";

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int fd = -1;
    static char path[64];
    if (fd < 0) {
        fd = memfd_create("fuzz", 0);
        ERN_ASSERT(fd >= 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    ERN_ASSERT(ftruncate(fd, 0) == 0 && pwrite(fd, data, size, 0) == (ssize_t)size);
    ern_tokenizer *t;
    ern_err err = {0};
    ern_status s = ern_tokenizer_open(&t, path, &err);
    ERN_ASSERT(s == ERN_OK || (s == ERN_ERR_FILE && err.text[0]));
    if (s != ERN_OK) return 0;
    for (int parse = 0; parse < 2; parse++) {
        ern_tokens ids;
        ern_buf out;
        ern_tokens_init(&ids, 4096);
        ern_buf_init(&out, 1 << 16);
        ERN_ASSERT(ern_tokenizer_encode(t, sample, sizeof sample - 1, parse, &ids, &err) == ERN_OK);
        ERN_ASSERT(ern_tokenizer_decode(t, ids.id, ids.n, false, &out, &err) == ERN_OK);
        ERN_ASSERT(fuzz_same_text(out.data, out.len, sample, sizeof sample - 1));
        for (size_t i = 0; i < ids.n && !parse; i++) ERN_ASSERT(!ern_tokenizer_is_special(t, ids.id[i]));
        ern_tokens_free(&ids);
        ern_buf_free(&out);
    }
    ern_tokenizer_close(t);
    return 0;
}
