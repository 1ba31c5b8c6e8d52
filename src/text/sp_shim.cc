/* libsentencepiece behind C. See sp_shim.h. */
#include "text/sp_shim.h"

#include <sentencepiece_processor.h>

#include <cstdio>
#include <exception>
#include <new>
#include <vector>

struct sp_shim {
    sentencepiece::SentencePieceProcessor processor;
};

sp_shim *sp_shim_open(const char *proto, size_t len, char *why, size_t why_size) {
    sp_shim *s = nullptr;
    try {
        s = new sp_shim;
        const auto status = s->processor.LoadFromSerializedProto(absl::string_view(proto, len));
        if (status.ok()) return s;
        std::snprintf(why, why_size, "%s", status.error_message());
    } catch (const std::exception &e) {
        std::snprintf(why, why_size, "%s", e.what());
    }
    delete s;
    return nullptr;
}

void sp_shim_close(sp_shim *s) { delete s; }

bool sp_shim_encode(const sp_shim *s, const char *text, size_t len, sp_shim_fn *fn, void *ud) {
    try {
        std::vector<int> ids;
        if (!s->processor.Encode(absl::string_view(text, len), &ids).ok()) return false;
        fn(ud, ids.data(), ids.size());
        return true;
    } catch (const std::exception &) {
        return false;
    }
}
