/* Strict reader of safetensors files: private to `model`.
 *
 *   file = u64 little-endian N | N bytes of JSON | data          one tensor = name, dtype, shape, [from, to) of the
 * data
 *
 * The header is scanned once, flat, without recursion, from a copy in memory, so that a file changed under us cannot
 * change what was checked. Accepted means: names unique, dtypes known, every size computed without overflow and equal
 * to its range, ranges sorted and touching cover the data exactly, and the data end where the file ends. Owner: whoever
 * opened it; names and tables live in the caller's arena. */
#ifndef ERN_MODEL_SAFETENSORS_H
#define ERN_MODEL_SAFETENSORS_H

#include "base/arena.h"
#include "base/os.h"
#include "base/status.h"

enum {
    ST_LABEL_MAX = 160, /* characters of a path in a message */
    ST_DIM_MAX = 8,
    ST_NAME_MAX = 255,                 /* bytes of a tensor's name */
    ST_TENSORS_MAX = 1 << 17,          /* of one file */
    ST_HEADER_MAX = 100 * 1000 * 1000, /* bytes; the format's own cap */
    ST_TOUCH_BYTES = 32 << 20          /* read in at once */
};

typedef enum st_dtype {
    ST_BOOL,
    ST_U8,
    ST_I8,
    ST_F8_E5M2,
    ST_F8_E4M3,
    ST_I16,
    ST_U16,
    ST_F16,
    ST_BF16,
    ST_I32,
    ST_U32,
    ST_F32,
    ST_F64,
    ST_I64,
    ST_U64,
    ST_DTYPES
} st_dtype;
const char *st_dtype_name(st_dtype t);
size_t st_dtype_bytes(st_dtype t);

/* A name we can print in one line: 1 to ST_NAME_MAX printable ASCII characters without space, quote and backslash. */
bool st_name_ok(const char *name, size_t len);

typedef struct st_tensor {
    const char *name; /* printable ASCII, NUL-ended */
    st_dtype dtype;
    int32_t n_dim;
    int64_t dim[ST_DIM_MAX];
    uint64_t from, bytes; /* its range, from the start of the file */
} st_tensor;

typedef struct st_file {
    const char *path; /* for messages: the end of the path that was opened */
    ern_map map;
    st_tensor *tensor; /* in the order of the data */
    int32_t n_tensor;
} st_file;

/* Scan the N bytes of a header whose data lie at [data_from, file_bytes) of the file. *tensor is taken from the arena.
 * Errors: ERN_ERR_FILE, naming `what`, the tensor, what was expected and found. */
ERN_MUST_CHECK ern_status st_header_scan(st_tensor **tensor, int32_t *n_tensor, ern_arena *arena, const char *header,
                                         size_t len, uint64_t file_bytes, const char *what, ern_err *err);

/* Map a file and scan its header. The mapping is not touched: everything is read through the descriptor. */
ERN_MUST_CHECK ern_status st_file_open(st_file *out, ern_arena *arena, const char *path, ern_err *err);
/* Copy a range of the file (inside its size) through the descriptor: a file cut short is an error, not a SIGBUS. */
ERN_MUST_CHECK ern_status st_file_copy(const st_file *f, void *to, uint64_t from, size_t bytes, ern_err *err);
/* Read a range of the mapping in, piece by piece; `each` (may be NULL) is told the bytes of each and may stop it.
 * *scratch starts as NULL and is free()d by the caller after its last call. A file cut short is an error. */
typedef ern_status st_touch_fn(void *ud, uint64_t bytes, ern_err *err);
ERN_MUST_CHECK ern_status st_file_touch(const st_file *f, uint64_t from, uint64_t bytes, void **scratch,
                                        st_touch_fn *each, void *ud, ern_err *err);
/* Hints: a range will be read soon; a range will not be read again, so that it need not count as our memory. */
void st_file_want(const st_file *f, uint64_t from, uint64_t bytes);
void st_file_release(const st_file *f, uint64_t from, uint64_t bytes);
/* Fail when the file is no longer as long as when it was mapped. */
ERN_MUST_CHECK ern_status st_file_recheck(const st_file *f, ern_err *err);
void st_file_close(st_file *f);

#endif
