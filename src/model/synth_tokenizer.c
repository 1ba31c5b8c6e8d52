/* The tokenizer files of a made checkpoint. See synth_tokenizer.h.
 *
 * Learned pieces come from two sources, in order: the substrings of the words of a paragraph below, most frequent
 * first (so that English and a little Chinese text takes few tokens), then letter strings by enumeration, until the
 * map is full. A candidate is taken only if the pieces taken before it encode it as exactly two symbols: since merges
 * run best score first and scores fall with the id, those two then merge into the candidate and into nothing else,
 * whatever is taken later. So every learned piece is the encoding of its own text. */
#include "model/synth_tokenizer.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/jsonw.h"
#include "base/os.h"
#include "base/proto.h"
#include "base/utf8.h"

enum {
    FIRST_DIGIT = 3,
    FIRST_BYTE = 13,
    FIRST_LEARNED = 269,
    NAME_MAX_CHARS = 16,
    NAME_MAX_BYTES = 3 * NAME_MAX_CHARS,
    CANDIDATE_MAX_CHARS = 10,
    N_ADDED_FIXED = 8, /* added tokens that are not <|LOC_k|> */
};

/* SentencePiece's piece types, as its file format numbers them. */
enum { TYPE_NORMAL = 1, TYPE_UNKNOWN = 2, TYPE_CONTROL = 3, TYPE_USER_DEFINED = 4, TYPE_BYTE = 6 };

#define SPACE "\xe2\x96\x81" /* U+2581, which stands for a space */

/* The specials between the single characters and the added tokens; the first two are where ERNIE has them. The tags
 * that a reply contains are user-defined, so that they decode as text; the frame of a prompt is control. */
static const struct {
    const char *name;
    int type;
} special[] = {
    {"<|end_of_sentence|>", TYPE_CONTROL},
    {"<|begin_of_sentence|>", TYPE_CONTROL},
    {"<mask:0>", TYPE_CONTROL},
    {"<mask:1>", TYPE_CONTROL},
    {"<mask:2>", TYPE_CONTROL},
    {"<mask:3>", TYPE_CONTROL},
    {"<mask:4>", TYPE_CONTROL},
    {"<mask:5>", TYPE_CONTROL},
    {"<mask:6>", TYPE_CONTROL},
    {"<mask:7>", TYPE_CONTROL},
    {"<mask:8>", TYPE_CONTROL},
    {"<mask:9>", TYPE_CONTROL},
    {"<mask:10>", TYPE_CONTROL},
    {"<mask:11>", TYPE_CONTROL},
    {"<mask:12>", TYPE_CONTROL},
    {"<|im_start|>", TYPE_CONTROL},
    {"<|im_end|>", TYPE_CONTROL},
    {"<think>", TYPE_USER_DEFINED},
    {"</think>", TYPE_USER_DEFINED},
    {"<response>", TYPE_USER_DEFINED},
    {"</response>", TYPE_USER_DEFINED},
    {"<tool_call>", TYPE_USER_DEFINED},
    {"</tool_call>", TYPE_USER_DEFINED},
};
enum { N_SPECIAL = sizeof special / sizeof special[0] };

/* What the learned pieces are made of: any plain text would do. */
static const char paragraph[] =
    "The house stands on a hill above the river, and in the morning the light comes in through the kitchen window. "
    "She makes coffee, opens the door and looks at the road that goes down to the village. There is not much there: a "
    "school, a small shop, the station where two trains stop each day, and the workshop where her brother repairs "
    "clocks and radios. People bring him things that others have given up. He likes to say that nothing is broken for "
    "ever, it is only waiting for someone who will listen to it long enough. When I was a child I would sit with him "
    "after school and ask what every part was for. He would answer every question, and if he did not know the answer "
    "he would say so, and then we would look for it together. That is how I learned to think about machines, and I "
    "believe it is also how I learned to think about people. You can help them only when you understand what they "
    "need. Can you tell me more about this? Yes, of course. First write down what you know, then what you want to "
    "know, and then the steps between them. If one of the steps is too large, make it smaller. Check the result, "
    "explain the reason, and show your work to another person before you call it finished. This is the whole method. "
    "The numbers in the table are in the same order as the words in the list. A language model reads some text and "
    "gives back the next word, again and again, until the answer is complete. Hello, how are you today? Thank you, I "
    "am well. Please write a short story about the sea, the weather and an old ship. User and Assistant are talking. "
    "\xe4\xbd\xa0\xe5\xa5\xbd\xef\xbc\x8c\xe4\xb8\x96\xe7\x95\x8c\xe3\x80\x82\xe4\xbb\x8a\xe5\xa4\xa9\xe5\xa4\xa9"
    "\xe6\xb0\x94\xe5\xbe\x88\xe5\xa5\xbd\xef\xbc\x8c\xe6\x88\x91\xe4\xbb\xac\xe5\x8e\xbb\xe5\x85\xac\xe5\x9b\xad"
    "\xe8\xb5\xb0\xe4\xb8\x80\xe8\xb5\xb0\xe5\x90\xa7\xe3\x80\x82\xe4\xbd\xa0\xe5\xa5\xbd\xe5\x90\x97\xef\xbc\x9f"
    "\xe6\x88\x91\xe5\xbe\x88\xe5\xa5\xbd\xe3\x80\x82\xe6\x88\x91\xe4\xbb\xac\xe7\x9a\x84\xe4\xb8\x96\xe7\x95\x8c"
    "\xe5\xbe\x88\xe5\xa4\xa7\xe3\x80\x82";

/* Letters of English, common ones first, for the enumeration. */
static const char letters[] = "etaoinshrdlcumwfgypbvkjxqz";

synth_tokenizer_map synth_tokenizer_layout(int32_t n_vocab) {
    ERN_ASSERT(n_vocab >= SYNTH_TOKENIZER_MIN && n_vocab <= SYNTH_TOKENIZER_REAL);
    if (n_vocab == SYNTH_TOKENIZER_REAL)
        return (synth_tokenizer_map){.single = 93919, .special = 100272, .added = 100295, .n_token = 101304};
    synth_tokenizer_map m;
    m.n_token = n_vocab - n_vocab / 50; /* as in the real one, about 2% of the rows are unused */
    m.added = m.n_token - N_ADDED_FIXED - 8;
    m.special = m.added - N_SPECIAL;
    /* 85 are "▁" and the characters of ASCII; a fifth of the rest is for other scripts. */
    m.single = m.special - 85 - (m.special - FIRST_LEARNED - 85) / 5;
    return m;
}

/* ---- the set of pieces ----------------------------------------------------------------------------------------- */

typedef struct piece {
    char name[NAME_MAX_BYTES];
    uint8_t len; /* bytes */
    uint8_t type;
} piece;

typedef struct vocab {
    piece *piece; /* [n] by id */
    int32_t n;
    int32_t *slot; /* [n_slot] hash of names to ids, -1 empty; linear probing, at most half full */
    uint32_t n_slot;
    bool out_of_memory;
} vocab;

static uint32_t hash_name(const char *s, size_t len) {
    uint32_t h = 2166136261u;
    for (size_t i = 0; i < len; i++) h = (h ^ (unsigned char)s[i]) * 16777619u;
    return h ^ h >> 15;
}

/* The slot of a name: its own, or the empty one where it would go. */
static uint32_t vocab_slot(const vocab *v, const char *s, size_t len) {
    uint32_t i = hash_name(s, len) & (v->n_slot - 1);
    for (;; i = (i + 1) & (v->n_slot - 1)) {
        int32_t id = v->slot[i];
        if (id < 0 || (v->piece[id].len == len && memcmp(v->piece[id].name, s, len) == 0)) return i;
    }
}

static int32_t vocab_find(const vocab *v, const char *s, size_t len) { return v->slot[vocab_slot(v, s, len)]; }

static void vocab_add(vocab *v, const char *s, size_t len, int type) {
    uint32_t i = vocab_slot(v, s, len);
    ERN_ASSERT(v->slot[i] < 0 && len <= NAME_MAX_BYTES);
    piece *p = &v->piece[v->n];
    memcpy(p->name, s, len);
    p->len = (uint8_t)len;
    p->type = (uint8_t)type;
    v->slot[i] = v->n++;
}

/* Into how many symbols do the pieces taken so far encode a string of at most NAME_MAX_CHARS characters? Plain BPE, as
 * the tokenizer does it: merge the neighbours whose union has the lowest id, leftmost first, until none. Single
 * characters count as symbols whether or not they are pieces yet. */
static int encoded_count(const vocab *v, const char *s, size_t len) {
    size_t at[NAME_MAX_CHARS + 1];
    int n = 0;
    for (size_t i = 0; i < len; i += ern_utf8_len(s + i, len - i)) at[n++] = i;
    at[n] = len;
    while (n > 1) {
        int best = -1;
        int32_t best_id = INT32_MAX;
        for (int i = 0; i + 1 < n; i++) {
            int32_t id = vocab_find(v, s + at[i], at[i + 2] - at[i]);
            if (id < FIRST_LEARNED || id >= best_id) continue;
            best = i;
            best_id = id;
        }
        if (best < 0) break;
        memmove(at + best + 1, at + best + 2, sizeof at[0] * (size_t)(n - best - 1));
        n--;
    }
    return n;
}

/* Take a candidate if there is room and it is the union of two symbols. */
static void learn(vocab *v, int32_t end, const char *s, size_t len) {
    if (v->n < end && vocab_find(v, s, len) < 0 && encoded_count(v, s, len) == 2) vocab_add(v, s, len, TYPE_NORMAL);
}

/* ---- learned pieces -------------------------------------------------------------------------------------------- */

typedef struct substring {
    const char *s;
    int len, count;
} substring;

static int by_text(const void *a, const void *b) {
    const substring *x = a, *y = b;
    int d = memcmp(x->s, y->s, (size_t)(x->len < y->len ? x->len : y->len));
    return d ? d : x->len - y->len;
}

static int by_count(const void *a, const void *b) {
    const substring *x = a, *y = b;
    if (x->count != y->count) return y->count - x->count;
    if (x->len != y->len) return x->len - y->len;
    return memcmp(x->s, y->s, (size_t)x->len);
}

/* A letter of a word: ASCII letters and everything of three bytes but punctuation of the CJK and full-width blocks. */
static bool is_letter(const char *s) {
    unsigned char c = (unsigned char)s[0];
    if (c < 0x80) return (c | 32) >= 'a' && (c | 32) <= 'z';
    return c >= 0xe4 && c <= 0xe9;
}

/* Every substring of 2..CANDIDATE_MAX_CHARS characters of every word, a word's first letter with the space before it
 * too. Returns how many were written to out. */
static int substrings_of(const char *text, size_t len, substring *out) {
    int n = 0;
    for (size_t i = 0; i < len; i += ern_utf8_len(text + i, len - i)) {
        size_t end = i;
        bool space = strncmp(text + i, SPACE, 3) == 0;
        if (!space && !is_letter(text + i)) continue;
        for (int chars = 1; chars <= CANDIDATE_MAX_CHARS; chars++) {
            end += ern_utf8_len(text + end, len - end);
            if (chars > 1) out[n++] = (substring){.s = text + i, .len = (int)(end - i), .count = 1};
            if (end >= len || !is_letter(text + end)) break;
        }
    }
    return n;
}

static void learn_from_paragraph(vocab *v, int32_t end) {
    ern_buf text;
    ern_buf_init(&text, 1 << 16);
    for (const char *s = paragraph; *s; s++) ern_buf_text(&text, *s == ' ' ? SPACE : (const char[2]){*s, 0});
    substring *sub = calloc(text.len, CANDIDATE_MAX_CHARS * sizeof *sub);
    if (!sub || text.full) {
        v->out_of_memory = true;
    } else {
        int n = substrings_of(text.data, text.len, sub), distinct = 0;
        qsort(sub, (size_t)n, sizeof *sub, by_text);
        for (int i = 0; i < n; i++) {
            if (distinct && by_text(&sub[distinct - 1], &sub[i]) == 0)
                sub[distinct - 1].count++;
            else
                sub[distinct++] = sub[i];
        }
        qsort(sub, (size_t)distinct, sizeof *sub, by_count);
        for (int i = 0; i < distinct && sub[i].count > 1; i++) learn(v, end, sub[i].s, (size_t)sub[i].len);
    }
    free(sub);
    ern_buf_free(&text);
}

/* All strings of n letters, each followed by itself behind a space. The stride is coprime to 26, so that every string
 * is met once and neighbours in the order share no letters. */
static void learn_letters(vocab *v, int32_t end, int n) {
    uint32_t count = 1;
    for (int i = 0; i < n; i++) count *= 26;
    uint32_t at = 0;
    for (uint32_t i = 0; i < count && v->n < end; i++) {
        char s[3 + NAME_MAX_CHARS] = SPACE;
        uint32_t rest = at;
        for (int k = 0; k < n; k++, rest /= 26) s[3 + k] = letters[rest % 26];
        learn(v, end, s + 3, (size_t)n);
        learn(v, end, s, (size_t)n + 3);
        at = (uint32_t)(((uint64_t)at + 120709) % count);
    }
}

/* ---- single characters ----------------------------------------------------------------------------------------- */

static size_t utf8_put(char out[4], uint32_t c) {
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    if (c < 0x800) {
        out[0] = (char)(0xc0 | c >> 6);
        out[1] = (char)(0x80 | (c & 63));
        return 2;
    }
    out[0] = (char)(0xe0 | c >> 12);
    out[1] = (char)(0x80 | (c >> 6 & 63));
    out[2] = (char)(0x80 | (c & 63));
    return 3;
}

/* "▁", ASCII but space and digits, the paragraph's own characters, then ranges of other scripts until the map is full.
 * Emoji are left out: they show byte fallback. */
static void add_singles(vocab *v, int32_t end) {
    static const uint32_t range[][2] = {{0x21, 0x7e},     {0xa1, 0x17f},    {0x3b1, 0x3c9},   {0x410, 0x44f},
                                        {0x2010, 0x2026}, {0x3001, 0x3002}, {0xff01, 0xff1f}, {0x3041, 0x3093},
                                        {0x30a1, 0x30f6}, {0x4e00, 0x9fa5}};
    vocab_add(v, SPACE, 3, TYPE_NORMAL);
    for (size_t r = 0; r < sizeof range / sizeof range[0]; r++) {
        for (uint32_t c = range[r][0]; c <= range[r][1] && v->n < end; c++) {
            char s[4];
            size_t len = utf8_put(s, c);
            if (vocab_find(v, s, len) < 0) vocab_add(v, s, len, TYPE_NORMAL);
        }
        if (r > 0) continue;
        for (const char *s = paragraph; *s && v->n < end; s += ern_utf8_len(s, 4))
            if (*s & 0x80 && vocab_find(v, s, 3) < 0) vocab_add(v, s, 3, TYPE_NORMAL);
    }
    ERN_ASSERT(v->n == end);
}

/* ---- the whole map --------------------------------------------------------------------------------------------- */

static void vocab_fill(vocab *v, const synth_tokenizer_map *m) {
    vocab_add(v, "<unk>", 5, TYPE_UNKNOWN);
    vocab_add(v, "<s>", 3, TYPE_CONTROL);
    vocab_add(v, "</s>", 4, TYPE_CONTROL);
    for (char d = '0'; d <= '9'; d++) vocab_add(v, &d, 1, TYPE_USER_DEFINED);
    for (int b = 0; b < 256; b++) {
        char s[8];
        int len = snprintf(s, sizeof s, "<0x%02X>", b);
        vocab_add(v, s, (size_t)len, TYPE_BYTE);
    }
    for (int n = 2; n <= NAME_MAX_CHARS; n *= 2) { /* runs of spaces: code is indented */
        char s[3 * NAME_MAX_CHARS];
        for (int i = 0; i < n; i++) memcpy(s + 3 * i, SPACE, 3);
        vocab_add(v, s, 3 * (size_t)n, TYPE_NORMAL);
    }
    learn_from_paragraph(v, m->single);
    for (int n = 2; n <= 4; n++) learn_letters(v, m->single, n);
    if (v->out_of_memory) return;
    ERN_ASSERT(v->n == m->single);
    add_singles(v, m->special);
    for (int i = 0; i < N_SPECIAL; i++) vocab_add(v, special[i].name, strlen(special[i].name), special[i].type);
    ERN_ASSERT(v->n == m->added);
}

static void vocab_free(vocab *v) {
    free(v->slot);
    free(v->piece);
}

static bool vocab_make(vocab *v, const synth_tokenizer_map *m) {
    *v = (vocab){.n_slot = 1u << 18};
    v->piece = calloc((size_t)m->added, sizeof *v->piece);
    v->slot = malloc(v->n_slot * sizeof *v->slot);
    if (v->piece && v->slot) {
        memset(v->slot, 0xff, v->n_slot * sizeof *v->slot);
        vocab_fill(v, m);
        if (!v->out_of_memory) return true;
    }
    vocab_free(v);
    return false;
}

/* ---- files ----------------------------------------------------------------------------------------------------- */

static ern_status write_file(const char *dir, const char *name, const ern_buf *b, ern_err *err) {
    char path[4096];
    ERN_TRY(ern_path_join(path, sizeof path, dir, name, err));
    if (b->full) return ERN_FAIL(err, ERN_ERR_MEMORY, "%s: no memory to write it", path);
    FILE *f = fopen(path, "wb");
    if (!f) return ERN_FAIL(err, ERN_ERR_FILE, "%s: cannot write: %s", path, strerror(errno));
    bool ok = fwrite(b->data, 1, b->len, f) == b->len;
    ok = fclose(f) == 0 && ok;
    return ok ? ERN_OK : ERN_FAIL(err, ERN_ERR_FILE, "%s: cannot write: %s", path, strerror(errno));
}

/* ModelProto: pieces = 1, trainer_spec = 2, normalizer_spec = 3. */
static void write_model(const vocab *v, ern_buf *out) {
    ern_buf part;
    ern_buf_init(&part, 1024);
    for (int32_t i = 0; i < v->n; i++) {
        const piece *p = &v->piece[i];
        ern_buf_clear(&part);
        ern_proto_put_bytes(&part, 1, p->name, p->len);
        ern_proto_put_float(&part, 2, p->type == TYPE_NORMAL ? (float)(FIRST_LEARNED - i) : 0);
        ern_proto_put_varint(&part, 3, p->type);
        ern_proto_put_bytes(out, 1, part.data, part.len);
    }
    ern_buf_clear(&part);
    ern_proto_put_varint(&part, 3, 2);              /* model_type: BPE */
    ern_proto_put_varint(&part, 4, (uint64_t)v->n); /* vocab_size */
    ern_proto_put_varint(&part, 35, 1);             /* byte_fallback */
    ern_proto_put_varint(&part, 40, 0);             /* unk_id */
    ern_proto_put_varint(&part, 41, 1);             /* bos_id */
    ern_proto_put_varint(&part, 42, 2);             /* eos_id */
    ern_proto_put_varint(&part, 43, UINT64_MAX);    /* pad_id: -1, none */
    ern_proto_put_bytes(out, 2, part.data, part.len);
    ern_buf_clear(&part);
    ern_proto_put_bytes(&part, 1, "identity", 8);
    ern_proto_put_varint(&part, 3, 0); /* add_dummy_prefix */
    ern_proto_put_varint(&part, 4, 0); /* remove_extra_whitespaces */
    ern_proto_put_varint(&part, 5, 1); /* escape_whitespaces */
    ern_proto_put_bytes(out, 3, part.data, part.len);
    if (part.full) out->full = true;
    ern_buf_free(&part);
}

static void write_added(const synth_tokenizer_map *m, ern_buf *out) {
    static const char *const tail[] = {"<|LOC_BEGIN|>",    "<|LOC_END|>",      "<|LOC_SEP|>",
                                       "<|CROP_COL_SEP|>", "<|CROP_ROW_SEP|>", "<|IMAGE_SEP|>"};
    ern_jsonw w;
    ern_jsonw_init(&w, out);
    ern_jsonw_object(&w);
    int32_t id = m->added;
    ern_jsonw_key(&w, "<|IMAGE_PLACEHOLDER|>");
    ern_jsonw_int(&w, id++);
    ern_jsonw_key(&w, "<|AUDIO_PLACEHOLDER|>");
    ern_jsonw_int(&w, id++);
    int n_loc = m->n_token - m->added - N_ADDED_FIXED;
    for (int k = 0; k < n_loc; k++) {
        char name[32];
        snprintf(name, sizeof name, "<|LOC_%d|>", k);
        ern_jsonw_key(&w, name);
        ern_jsonw_int(&w, id++);
    }
    for (size_t k = 0; k < sizeof tail / sizeof tail[0]; k++) {
        ern_jsonw_key(&w, tail[k]);
        ern_jsonw_int(&w, id++);
    }
    ERN_ASSERT(id == m->n_token);
    ern_jsonw_object_end(&w);
}

/* The special tokens by role, in special_tokens_map.json and again in tokenizer_config.json. */
static void write_roles(ern_jsonw *w) {
    static const char *const role[][2] = {{"bos_token", "<s>"},
                                          {"eos_token", "</s>"},
                                          {"pad_token", "<unk>"},
                                          {"unk_token", "<unk>"},
                                          {"cls_token", "<|begin_of_sentence|>"},
                                          {"sep_token", "<|end_of_sentence|>"},
                                          {"mask_token", "<mask:1>"}};
    for (size_t i = 0; i < sizeof role / sizeof role[0]; i++) {
        ern_jsonw_key(w, role[i][0]);
        ern_jsonw_text(w, role[i][1]);
    }
}

/* docs/model.md 6.1 as a template, for Python users of the made checkpoint. */
static const char chat_template[] =
    "{%- set opening = cls_token if cls_token is defined and cls_token else '<|begin_of_sentence|>' -%}"
    "{%- set closing = sep_token if sep_token is defined and sep_token else '<|end_of_sentence|>' -%}"
    "{{- opening -}}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{{- m.content ~ '\\n' -}}"
    "{%- elif m.role == 'user' -%}{{- 'User: ' ~ m.content ~ '\\n' -}}"
    "{%- elif m.role == 'assistant' -%}{{- 'Assistant: ' ~ m.content ~ closing -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt is not defined or add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}";

static void write_config(ern_buf *out) {
    ern_jsonw w;
    ern_jsonw_init(&w, out);
    ern_jsonw_object(&w);
    write_roles(&w);
    ern_jsonw_key(&w, "tokenizer_class");
    ern_jsonw_text(&w, "LlamaTokenizerFast");
    ern_jsonw_key(&w, "model_max_length");
    ern_jsonw_int(&w, 131072);
    static const char *const off[] = {"add_bos_token", "add_eos_token", "add_prefix_space", "legacy",
                                      "clean_up_tokenization_spaces"};
    for (size_t i = 0; i < sizeof off / sizeof off[0]; i++) {
        ern_jsonw_key(&w, off[i]);
        ern_jsonw_bool(&w, false);
    }
    ern_jsonw_key(&w, "chat_template");
    ern_jsonw_text(&w, chat_template);
    ern_jsonw_object_end(&w);
}

ern_status synth_tokenizer_write(const char *dir, int32_t n_vocab, ern_err *err) {
    if (n_vocab < SYNTH_TOKENIZER_MIN || n_vocab > SYNTH_TOKENIZER_REAL)
        return ERN_FAIL(err, ERN_ERR_USAGE, "a made tokenizer has %d to %d rows, not %d", SYNTH_TOKENIZER_MIN,
                        SYNTH_TOKENIZER_REAL, n_vocab);
    synth_tokenizer_map m = synth_tokenizer_layout(n_vocab);
    vocab v;
    if (!vocab_make(&v, &m)) return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for a tokenizer of %d rows", n_vocab);
    ern_buf b;
    ern_buf_init(&b, 64u << 20);
    write_model(&v, &b);
    vocab_free(&v);
    ern_status s = write_file(dir, "tokenizer.model", &b, err);
    ern_buf_clear(&b);
    write_added(&m, &b);
    if (s == ERN_OK) s = write_file(dir, "added_tokens.json", &b, err);
    ern_buf_clear(&b);
    ern_jsonw w;
    ern_jsonw_init(&w, &b);
    ern_jsonw_object(&w);
    write_roles(&w);
    ern_jsonw_object_end(&w);
    if (s == ERN_OK) s = write_file(dir, "special_tokens_map.json", &b, err);
    ern_buf_clear(&b);
    write_config(&b);
    if (s == ERN_OK) s = write_file(dir, "tokenizer_config.json", &b, err);
    ern_buf_free(&b);
    return s;
}
