/* Strict reader of safetensors files. See safetensors.h. */
#include "model/safetensors.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/utf8.h"

static const struct {
    const char *name;
    size_t bytes;
} dtype_table[ST_DTYPES] = {
    [ST_BOOL] = {"BOOL", 1},       [ST_U8] = {"U8", 1},   [ST_I8] = {"I8", 1},   [ST_F8_E5M2] = {"F8_E5M2", 1},
    [ST_F8_E4M3] = {"F8_E4M3", 1}, [ST_I16] = {"I16", 2}, [ST_U16] = {"U16", 2}, [ST_F16] = {"F16", 2},
    [ST_BF16] = {"BF16", 2},       [ST_I32] = {"I32", 4}, [ST_U32] = {"U32", 4}, [ST_F32] = {"F32", 4},
    [ST_F64] = {"F64", 8},         [ST_I64] = {"I64", 8}, [ST_U64] = {"U64", 8},
};

const char *st_dtype_name(st_dtype t) { return dtype_table[t].name; }

size_t st_dtype_bytes(st_dtype t) { return dtype_table[t].bytes; }

bool st_name_ok(const char *name, size_t len) {
    bool good = len > 0 && len <= ST_NAME_MAX;
    for (size_t i = 0; good && i < len; i++) good = name[i] > 32 && name[i] < 127 && name[i] != '\\' && name[i] != '"';
    return good;
}

/* ---- the scan ------------------------------------------------------------------------------------------------------
 */

typedef struct text {
    const char *at;
    size_t len;
} text;

typedef struct scan {
    const char *at, *start, *end;
    const char *what;
    ern_err *err;
    uint64_t data_from, file_bytes;
    ern_arena *arena;
    st_tensor *tensor; /* grown with realloc while scanning */
    size_t n_tensor, cap_tensor;
    text *key; /* keys of __metadata__ */
    size_t n_key, cap_key;
    text name; /* of the tensor being read, for messages */
} scan;

static ern_status broken(const scan *s, const char *expected) {
    size_t at = (size_t)(s->at - s->start);
    if (s->at == s->end)
        return ERN_FAIL(s->err, ERN_ERR_FILE, "%s: header byte %zu: expected %s, found the end of the header", s->what,
                        at, expected);
    unsigned char c = (unsigned char)*s->at;
    if (c > 32 && c < 127)
        return ERN_FAIL(s->err, ERN_ERR_FILE, "%s: header byte %zu: expected %s, found '%c'", s->what, at, expected, c);
    return ERN_FAIL(s->err, ERN_ERR_FILE, "%s: header byte %zu: expected %s, found byte 0x%02x", s->what, at, expected,
                    c);
}

#define TENSOR_FAIL(s, ...) tensor_fail((s), __LINE__, __VA_ARGS__)
__attribute__((format(printf, 3, 4))) static ern_status tensor_fail(const scan *s, int line, const char *fmt, ...) {
    char why[200];
    va_list args;
    va_start(args, fmt);
    vsnprintf(why, sizeof why, fmt, args);
    va_end(args);
    return ern_err_set(s->err, ERN_ERR_FILE, __FILE__, line, "%s: tensor %.*s: %s", s->what, (int)s->name.len,
                       s->name.at, why);
}

static void skip_space(scan *s) {
    while (s->at < s->end && (*s->at == ' ' || *s->at == '\n' || *s->at == '\r' || *s->at == '\t')) s->at++;
}

/* Skip white space; true, and past it, when the next character is c. */
static bool next_is(scan *s, char c) {
    skip_space(s);
    if (s->at == s->end || *s->at != c) return false;
    s->at++;
    return true;
}

static ern_status need(scan *s, char c, const char *expected) { return next_is(s, c) ? ERN_OK : broken(s, expected); }

/* A JSON string as it stands between its quotes; escapes are checked, not resolved. */
static ern_status scan_string(scan *s, text *out, const char *expected) {
    ERN_TRY(need(s, '"', expected));
    out->at = s->at;
    for (; s->at < s->end && *s->at != '"'; s->at++) {
        if ((unsigned char)*s->at < 32) return broken(s, "no control character inside a string");
        if (*s->at != '\\') continue;
        if (++s->at == s->end) break;
        if (*s->at == 'u') {
            for (int i = 0; i < 4; i++)
                if (++s->at == s->end || !strchr("0123456789abcdefABCDEF", *s->at) || !*s->at)
                    return broken(s, "four hexadecimal digits");
        } else if (!*s->at || !strchr("\"\\/bfnrt", *s->at)) {
            return broken(s, "a JSON escape");
        }
    }
    out->len = (size_t)(s->at - out->at);
    return need(s, '"', "the end of a string");
}

/* A whole number as JSON writes it, at most 2^53, so that every later sum of two fits in 64 bits. */
static ern_status scan_number(scan *s, uint64_t *out) {
    skip_space(s);
    const char *first = s->at;
    uint64_t v = 0;
    for (; s->at < s->end && *s->at >= '0' && *s->at <= '9'; s->at++) {
        v = v * 10 + (uint64_t)(*s->at - '0');
        if (v > UINT64_C(1) << 53) return broken(s, "a number of at most 2^53");
    }
    if (s->at == first) return broken(s, "a whole number");
    if (*first == '0' && s->at - first > 1) {
        s->at = first;
        return broken(s, "a number without leading zeros");
    }
    *out = v;
    return ERN_OK;
}

/* [n, n, ...] of at most max numbers. */
static ern_status scan_numbers(scan *s, uint64_t *v, int max, int *n) {
    *n = 0;
    ERN_TRY(need(s, '[', "'['"));
    if (next_is(s, ']')) return ERN_OK;
    do {
        if (*n == max) return broken(s, max == 2 ? "two offsets" : "at most 8 dimensions");
        ERN_TRY(scan_number(s, &v[*n]));
        ++*n;
    } while (next_is(s, ','));
    return need(s, ']', "',' or ']'");
}

static bool text_is(text t, const char *word) { return t.len == strlen(word) && memcmp(t.at, word, t.len) == 0; }

/* Room for one more; false when the machine or the limit is out. */
static bool grow(void **array, size_t n, size_t *cap, size_t each_bytes, size_t max) {
    if (n < *cap) return true;
    size_t more = *cap ? *cap * 2 : 256;
    if (*cap >= max) return false;
    if (more > max) more = max;
    void *p = realloc(*array, more * each_bytes);
    if (!p) return false;
    *array = p;
    *cap = more;
    return true;
}

static ern_status scan_metadata(scan *s) {
    if (s->key) return broken(s, "__metadata__ only once");
    ERN_TRY(need(s, '{', "'{' after \"__metadata__\":"));
    if (!grow((void **)&s->key, 0, &s->cap_key, sizeof *s->key, ST_TENSORS_MAX))
        return ERN_FAIL(s->err, ERN_ERR_MEMORY, "no memory to read the header of %s", s->what);
    if (next_is(s, '}')) return ERN_OK;
    do {
        text value;
        if (!grow((void **)&s->key, s->n_key, &s->cap_key, sizeof *s->key, ST_TENSORS_MAX))
            return broken(s, "a smaller __metadata__");
        ERN_TRY(scan_string(s, &s->key[s->n_key++], "a key of __metadata__"));
        ERN_TRY(need(s, ':', "':'"));
        ERN_TRY(scan_string(s, &value, "a string in __metadata__"));
    } while (next_is(s, ','));
    return need(s, '}', "',' or '}'");
}

/* Size and range of a tensor whose three items were read. */
static ern_status tensor_check(scan *s, st_tensor *t, const uint64_t dim[], const uint64_t range[2]) {
    uint64_t bytes = st_dtype_bytes(t->dtype), data_bytes = s->file_bytes - s->data_from;
    for (int i = 0; i < t->n_dim; i++) {
        t->dim[i] = (int64_t)dim[i];
        if (__builtin_mul_overflow(bytes, dim[i], &bytes) || bytes > UINT64_C(1) << 53)
            return TENSOR_FAIL(s, "its shape is larger than any file");
    }
    if (range[1] < range[0] || range[1] - range[0] != bytes)
        return TENSOR_FAIL(s, "expected data_offsets that span %llu bytes for its dtype and shape, found [%llu, %llu]",
                           (unsigned long long)bytes, (unsigned long long)range[0], (unsigned long long)range[1]);
    if (range[1] > data_bytes)
        return TENSOR_FAIL(
            s,
            "expected its data to end within the file's %llu data bytes, found the end at %llu; the file is "
            "cut short or its header is wrong",
            (unsigned long long)data_bytes, (unsigned long long)range[1]);
    t->from = s->data_from + range[0];
    t->bytes = bytes;
    return ERN_OK;
}

static ern_status scan_dtype(scan *s, st_dtype *out) {
    text word;
    ERN_TRY(scan_string(s, &word, "a dtype"));
    for (int i = 0; i < ST_DTYPES; i++) {
        if (!text_is(word, dtype_table[i].name)) continue;
        *out = (st_dtype)i;
        return ERN_OK;
    }
    return TENSOR_FAIL(s, "expected a known dtype such as BF16 or F32, found %.*s",
                       (int)(word.len < 40 ? word.len : 40), word.at);
}

/* {"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]} in any order, each item once, nothing else. */
static ern_status scan_tensor(scan *s, st_tensor *t) {
    enum { DTYPE = 1, SHAPE = 2, RANGE = 4 };
    uint64_t dim[ST_DIM_MAX], range[2];
    int seen = 0, n = 0;
    ERN_TRY(need(s, '{', "'{' of a tensor"));
    do {
        text item;
        ERN_TRY(scan_string(s, &item, "dtype, shape or data_offsets"));
        ERN_TRY(need(s, ':', "':'"));
        int which = text_is(item, "dtype")          ? DTYPE
                    : text_is(item, "shape")        ? SHAPE
                    : text_is(item, "data_offsets") ? RANGE
                                                    : 0;
        if (!which)
            return TENSOR_FAIL(s, "expected dtype, shape and data_offsets, found %.*s",
                               (int)(item.len < 40 ? item.len : 40), item.at);
        if (seen & which) return TENSOR_FAIL(s, "%.*s is there twice", (int)item.len, item.at);
        seen |= which;
        if (which == DTYPE) ERN_TRY(scan_dtype(s, &t->dtype));
        if (which == SHAPE) ERN_TRY(scan_numbers(s, dim, ST_DIM_MAX, &t->n_dim));
        if (which == RANGE) {
            ERN_TRY(scan_numbers(s, range, 2, &n));
            if (n != 2) return TENSOR_FAIL(s, "expected two data_offsets, found %d", n);
        }
    } while (next_is(s, ','));
    ERN_TRY(need(s, '}', "',' or '}' of a tensor"));
    if (seen != (DTYPE | SHAPE | RANGE))
        return TENSOR_FAIL(s, "expected dtype, shape and data_offsets, found only some of them");
    return tensor_check(s, t, dim, range);
}

static ern_status scan_entry(scan *s) {
    ERN_TRY(scan_string(s, &s->name, "a tensor's name"));
    if (text_is(s->name, "__metadata__")) {
        ERN_TRY(need(s, ':', "':'"));
        return scan_metadata(s);
    }
    if (!st_name_ok(s->name.at, s->name.len))
        return broken(s, "a tensor's name of 1 to 255 plain characters before this place");
    ERN_TRY(need(s, ':', "':'"));
    if (!grow((void **)&s->tensor, s->n_tensor, &s->cap_tensor, sizeof *s->tensor, ST_TENSORS_MAX))
        return ERN_FAIL(s->err, ERN_ERR_FILE, "%s: more than %d tensors, or no memory for them", s->what,
                        ST_TENSORS_MAX);
    st_tensor *t = &s->tensor[s->n_tensor++];
    memset(t, 0, sizeof *t);
    t->name = ern_arena_text(s->arena, s->name.at, s->name.len);
    if (!t->name) return ERN_FAIL(s->err, ERN_ERR_MEMORY, "no memory to read the header of %s", s->what);
    return scan_tensor(s, t);
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const st_tensor *)a)->name, ((const st_tensor *)b)->name);
}

static int by_range(const void *a, const void *b) {
    const st_tensor *x = a, *y = b;
    if (x->from != y->from) return x->from < y->from ? -1 : 1;
    if (x->bytes != y->bytes) return x->bytes < y->bytes ? -1 : 1;
    return strcmp(x->name, y->name);
}

static int by_key(const void *a, const void *b) {
    const text *x = a, *y = b;
    int d = memcmp(x->at, y->at, x->len < y->len ? x->len : y->len);
    return d ? d : (x->len > y->len) - (x->len < y->len);
}

/* What can be said only about all of them: no name twice, no byte of the data unowned or owned twice. */
static ern_status check_whole(scan *s) {
    if (s->n_key) qsort(s->key, s->n_key, sizeof *s->key, by_key);
    for (size_t i = 1; i < s->n_key; i++)
        if (by_key(&s->key[i - 1], &s->key[i]) == 0)
            return ERN_FAIL(s->err, ERN_ERR_FILE, "%s: the key %.*s is in __metadata__ twice", s->what,
                            (int)(s->key[i].len < 80 ? s->key[i].len : 80), s->key[i].at);
    if (s->n_tensor) qsort(s->tensor, s->n_tensor, sizeof *s->tensor, by_name);
    for (size_t i = 1; i < s->n_tensor; i++)
        if (strcmp(s->tensor[i - 1].name, s->tensor[i].name) == 0)
            return ERN_FAIL(s->err, ERN_ERR_FILE, "%s: tensor %s is in the header twice", s->what, s->tensor[i].name);
    if (s->n_tensor) qsort(s->tensor, s->n_tensor, sizeof *s->tensor, by_range);
    uint64_t at = s->data_from;
    for (size_t i = 0; i < s->n_tensor; i++) {
        const st_tensor *t = &s->tensor[i];
        if (t->from != at)
            return ERN_FAIL(s->err, ERN_ERR_FILE,
                            "%s: tensor %s: expected its data at offset %llu, found it at %llu (%s)", s->what, t->name,
                            (unsigned long long)(at - s->data_from), (unsigned long long)(t->from - s->data_from),
                            t->from < at ? "an overlap" : "a hole");
        at += t->bytes;
    }
    if (at != s->file_bytes)
        return ERN_FAIL(s->err, ERN_ERR_FILE,
                        "%s: expected %llu bytes in the file, found %llu: bytes that no tensor owns", s->what,
                        (unsigned long long)at, (unsigned long long)s->file_bytes);
    return ERN_OK;
}

static ern_status scan_all(scan *s) {
    if (s->at == s->end || *s->at != '{') return broken(s, "'{' as the first byte");
    s->at++;
    if (!next_is(s, '}')) {
        do ERN_TRY(scan_entry(s));
        while (next_is(s, ','));
        ERN_TRY(need(s, '}', "',' or '}'"));
    }
    skip_space(s);
    if (s->at != s->end) return broken(s, "only spaces after the header");
    return check_whole(s);
}

ern_status st_header_scan(st_tensor **tensor, int32_t *n_tensor, ern_arena *arena, const char *header, size_t len,
                          uint64_t file_bytes, const char *what, ern_err *err) {
    *tensor = NULL;
    *n_tensor = 0;
    ERN_ASSERT(len + 8 <= file_bytes);
    if (!ern_utf8_valid(header, len)) return ERN_FAIL(err, ERN_ERR_FILE, "%s: the header is not valid UTF-8", what);
    scan s = {.at = header,
              .start = header,
              .end = header + len,
              .what = what,
              .err = err,
              .data_from = len + 8,
              .file_bytes = file_bytes,
              .arena = arena};
    ern_status status = scan_all(&s);
    if (status == ERN_OK && s.n_tensor) {
        *tensor = ERN_ARENA_NEW(arena, st_tensor, s.n_tensor);
        if (*tensor)
            memcpy(*tensor, s.tensor, s.n_tensor * sizeof **tensor);
        else
            status = ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the table of %s", what);
    }
    if (status == ERN_OK) *n_tensor = (int32_t)s.n_tensor;
    free(s.tensor);
    free(s.key);
    return status;
}

/* ---- files ---------------------------------------------------------------------------------------------------------
 */

ern_status st_file_copy(const st_file *f, void *to, uint64_t from, size_t bytes, ern_err *err) {
    unsigned char *p = to;
    while (bytes) {
        ssize_t got = pread(f->map.fd, p, bytes, (off_t)from);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0)
            return ERN_FAIL(err, ERN_ERR_FILE, "%s: cannot read at byte %llu: %s", f->path, (unsigned long long)from,
                            strerror(errno));
        if (got == 0) return ERN_FAIL(err, ERN_ERR_FILE, "%s: the file became shorter while it was read", f->path);
        p += got;
        from += (uint64_t)got;
        bytes -= (size_t)got;
    }
    return ERN_OK;
}

ern_status st_file_recheck(const st_file *f, ern_err *err) {
    struct stat st;
    if (fstat(f->map.fd, &st) != 0)
        return ERN_FAIL(err, ERN_ERR_FILE, "%s: cannot look at the file again: %s", f->path, strerror(errno));
    if ((uint64_t)st.st_size != f->map.size_bytes)
        return ERN_FAIL(err, ERN_ERR_FILE, "%s: the file changed while it was opened: expected %zu bytes, found %lld",
                        f->path, f->map.size_bytes, (long long)st.st_size);
    return ERN_OK;
}

/* ---- pages of the mapping ------------------------------------------------------------------------------------------
 */

static uint64_t page_mask(void) { return (uint64_t)sysconf(_SC_PAGESIZE) - 1; }

/* Bring one piece of a file into memory and into our page table. A kernel that cannot do both at once is asked through
 * the descriptor for the first alone. Either way a file cut short is an error here, not a SIGBUS. */
static ern_status touch_piece(const st_file *f, uint64_t from, size_t bytes, void **scratch, ern_err *err) {
#ifdef MADV_POPULATE_READ
    const uint64_t page = from & ~page_mask();
    int tries = *scratch ? 0 : 3; /* once the kernel has said no, it is not asked again */
    while (tries-- > 0) {
        if (madvise((void *)((uintptr_t)f->map.data + page), bytes + (from - page), MADV_POPULATE_READ) == 0)
            return ERN_OK;
        if (errno == EFAULT || errno == EIO || errno == ENOMEM)
            return ERN_FAIL(err, ERN_ERR_FILE, "%s: cannot read %zu bytes at %llu: %s", f->path, bytes,
                            (unsigned long long)from, strerror(errno));
    }
#endif
    if (!*scratch) *scratch = malloc(ST_TOUCH_BYTES);
    if (!*scratch) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory to read %s", f->path);
    return st_file_copy(f, *scratch, from, bytes, err);
}

ern_status st_file_touch(const st_file *f, uint64_t from, uint64_t bytes, void **scratch, st_touch_fn *each, void *ud,
                         ern_err *err) {
    for (uint64_t to = from + bytes; from < to;) {
        size_t n = to - from < ST_TOUCH_BYTES ? (size_t)(to - from) : ST_TOUCH_BYTES;
        ERN_TRY(touch_piece(f, from, n, scratch, err));
        from += n;
        if (each) ERN_TRY(each(ud, n, err));
    }
    return ERN_OK;
}

/* Whole pages inside the range. */
static void advise(const st_file *f, uint64_t from, uint64_t bytes, int how) {
    const uint64_t to = from + bytes < f->map.size_bytes ? from + bytes : f->map.size_bytes;
    const uint64_t first = (from + page_mask()) & ~page_mask(), end = to & ~page_mask();
    if (end > first) (void)madvise((void *)((uintptr_t)f->map.data + first), (size_t)(end - first), how);
}

void st_file_want(const st_file *f, uint64_t from, uint64_t bytes) { advise(f, from, bytes, MADV_WILLNEED); }
void st_file_release(const st_file *f, uint64_t from, uint64_t bytes) { advise(f, from, bytes, MADV_DONTNEED); }

static ern_status header_read(st_file *f, ern_arena *arena, ern_err *err) {
    unsigned char head[8];
    uint64_t n = 0, file_bytes = f->map.size_bytes;
    if (file_bytes < 16)
        return ERN_FAIL(err, ERN_ERR_FILE, "%s: expected a safetensors file, found only %llu bytes", f->path,
                        (unsigned long long)file_bytes);
    ERN_TRY(st_file_copy(f, head, 0, sizeof head, err));
    for (int i = 7; i >= 0; i--) n = n << 8 | head[i];
    if (n < 8 || n > ST_HEADER_MAX || n > file_bytes - 8)
        return ERN_FAIL(err, ERN_ERR_FILE,
                        "%s: expected a header of 8 to %llu bytes, found a length of %llu; not a "
                        "safetensors file, or cut short",
                        f->path, (unsigned long long)(file_bytes - 8 < ST_HEADER_MAX ? file_bytes - 8 : ST_HEADER_MAX),
                        (unsigned long long)n);
    char *header = malloc((size_t)n);
    if (!header) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for the header of %s", f->path);
    ern_status s = st_file_copy(f, header, 8, (size_t)n, err);
    if (s == ERN_OK) s = st_header_scan(&f->tensor, &f->n_tensor, arena, header, (size_t)n, file_bytes, f->path, err);
    free(header);
    return s;
}

ern_status st_file_open(st_file *out, ern_arena *arena, const char *path, ern_err *err) {
    *out = (st_file){.map.fd = -1};
    struct stat st; /* looked at first: opening a FIFO or a device could wait for ever */
    if (stat(path, &st) != 0) return ERN_FAIL(err, ERN_ERR_FILE, "cannot open %s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) return ERN_FAIL(err, ERN_ERR_FILE, "%s is not a plain file", path);
    size_t len = strlen(path), cut = len > ST_LABEL_MAX ? len - ST_LABEL_MAX : 0;
    out->path = ern_arena_text(arena, path + cut, len - cut);
    if (!out->path) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory to open %s", path);
    ERN_TRY(ern_map_open(&out->map, path, err));
    ern_status s = header_read(out, arena, err);
    if (s != ERN_OK) st_file_close(out);
    return s;
}

void st_file_close(st_file *f) {
    ern_map_close(&f->map);
    *f = (st_file){.map.fd = -1};
}
