/* Stop strings in a stream: Aho-Corasick. See text.h.
 *
 * The string found is the one whose last byte comes first; of those that end there, the longest; of equals, the first
 * given. That depends on the text alone, not on how it was cut into feeds. A state of the automaton is the longest
 * suffix of the text that begins some stop string; its depth is how many bytes must be held back. */
#include <stdlib.h>
#include <string.h>

#include "text/text.h"

enum { STOP_MAX = 16, STOP_BYTES_MAX = 1024 };

typedef struct stop_node {
    int32_t child, sibling; /* node, 0: none; at most STOP_MAX children, since each belongs to another string */
    int32_t fail;           /* the longest proper suffix that is a node */
    int16_t depth;          /* bytes from the root */
    int16_t match;          /* index of the longest string that ends here, or -1 */
    int16_t match_len;
    unsigned char byte;
} stop_node;

struct ern_stop {
    stop_node *node; /* [n_node], 0 is the root */
    int32_t n_node;
    int32_t at;                /* current state */
    int found;                 /* index, or -1 */
    char held[STOP_BYTES_MAX]; /* the last node[at].depth bytes of the text */
};

static int32_t child_of(const ern_stop *s, int32_t node, unsigned char byte) {
    int32_t c = s->node[node].child;
    while (c && s->node[c].byte != byte) c = s->node[c].sibling;
    return c;
}

static void add_string(ern_stop *s, const char *text, size_t len, int index) {
    int32_t at = 0;
    for (size_t i = 0; i < len; i++) {
        unsigned char byte = (unsigned char)text[i];
        int32_t c = child_of(s, at, byte);
        if (!c) {
            c = s->n_node++;
            s->node[c] = (stop_node){
                .sibling = s->node[at].child, .depth = (int16_t)(i + 1), .match = -1, .match_len = 0, .byte = byte};
            s->node[at].child = c;
        }
        at = c;
    }
    if (s->node[at].match >= 0) return; /* given twice: the first one counts */
    s->node[at].match = (int16_t)index;
    s->node[at].match_len = (int16_t)len;
}

/* The state after one more byte. */
static int32_t next_state(const ern_stop *s, int32_t at, unsigned char byte) {
    for (;;) {
        int32_t c = child_of(s, at, byte);
        if (c || at == 0) return c;
        at = s->node[at].fail;
    }
}

/* Failure links, breadth first. queue has room for all nodes. */
static void link_nodes(ern_stop *s, int32_t *queue) {
    int32_t n = 0;
    queue[n++] = 0;
    for (int32_t i = 0; i < n; i++) {
        int32_t parent = queue[i];
        for (int32_t c = s->node[parent].child; c; c = s->node[c].sibling) {
            stop_node *k = &s->node[c];
            k->fail = parent ? next_state(s, s->node[parent].fail, k->byte) : 0;
            if (k->match < 0) {
                k->match = s->node[k->fail].match;
                k->match_len = s->node[k->fail].match_len;
            }
            queue[n++] = c;
        }
    }
}

ern_status ern_stop_open(ern_stop **out, const char *const *text, const size_t *len, int n, ern_err *err) {
    *out = NULL;
    size_t n_node = 1;
    if (n < 0 || n > STOP_MAX)
        return ERN_FAIL(err, ERN_ERR_INPUT, "%d stop strings were given; at most %d are allowed", n, STOP_MAX);
    for (int i = 0; i < n; i++) {
        if (len[i] == 0 || len[i] > STOP_BYTES_MAX)
            return ERN_FAIL(err, ERN_ERR_INPUT, "stop string %d is %zu bytes long; expected 1 to %d", i, len[i],
                            STOP_BYTES_MAX);
        n_node += len[i];
    }
    ern_stop *s = calloc(1, sizeof *s);
    int32_t *queue = calloc(n_node, sizeof *queue);
    if (s) s->node = calloc(n_node, sizeof *s->node);
    if (!s || !queue || !s->node) {
        free(queue);
        ern_stop_close(s);
        return ERN_FAIL(err, ERN_ERR_MEMORY, "no memory for %d stop strings", n);
    }
    s->n_node = 1;
    s->node[0].match = -1;
    s->found = -1;
    for (int i = 0; i < n; i++) add_string(s, text[i], len[i], i);
    link_nodes(s, queue);
    free(queue);
    *out = s;
    return ERN_OK;
}

void ern_stop_close(ern_stop *s) {
    if (!s) return;
    free(s->node);
    free(s);
}

/* Append bytes [0, n) of held + text, of which n_held are held. */
static void put(const ern_stop *s, size_t n_held, const char *text, size_t n, ern_buf *out) {
    size_t n_old = n < n_held ? n : n_held;
    ern_buf_add(out, s->held, n_old);
    ern_buf_add(out, text, n - n_old);
}

int ern_stop_feed(ern_stop *s, const char *text, size_t len, bool keep, ern_buf *out) {
    if (s->found >= 0) return s->found;
    size_t n_held = (size_t)s->node[s->at].depth;
    for (size_t i = 0; i < len; i++) {
        s->at = next_state(s, s->at, (unsigned char)text[i]);
        const stop_node *k = &s->node[s->at];
        if (k->match < 0) continue;
        size_t end = n_held + i + 1;
        put(s, n_held, text, keep ? end : end - (size_t)k->match_len, out);
        s->at = 0;
        s->found = k->match;
        return s->found;
    }
    size_t n_keep = (size_t)s->node[s->at].depth, n = n_held + len - n_keep;
    put(s, n_held, text, n, out);
    /* Keep the last n_keep bytes of held + text. */
    if (n_keep > len) {
        memmove(s->held, s->held + n, n_held - n);
        if (len) memcpy(s->held + (n_held - n), text, len);
    } else if (n_keep) {
        memcpy(s->held, text + (len - n_keep), n_keep);
    }
    return -1;
}

void ern_stop_flush(ern_stop *s, ern_buf *out) {
    ern_buf_add(out, s->held, (size_t)s->node[s->at].depth);
    s->at = 0;
}
