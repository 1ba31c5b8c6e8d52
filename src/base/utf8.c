/* UTF-8. See utf8.h. */
#include "base/utf8.h"

/* The character's length by its first byte, and the allowed range of the second; 0 when s[0] starts nothing. */
static size_t shape(unsigned char c, unsigned char *lo, unsigned char *hi) {
    *lo = 0x80;
    *hi = 0xbf;
    if (c < 0x80) return 1;
    if (c >= 0xc2 && c <= 0xdf) return 2;
    if (c >= 0xe0 && c <= 0xef) {
        if (c == 0xe0) *lo = 0xa0;
        if (c == 0xed) *hi = 0x9f;
        return 3;
    }
    if (c >= 0xf0 && c <= 0xf4) {
        if (c == 0xf0) *lo = 0x90;
        if (c == 0xf4) *hi = 0x8f;
        return 4;
    }
    return 0;
}

/* How many of the need bytes at s fit the shape. */
static size_t matched(const char *s, size_t len, size_t need, unsigned char lo, unsigned char hi) {
    size_t i = 1;
    for (; i < need && i < len; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c < (i == 1 ? lo : 0x80) || c > (i == 1 ? hi : 0xbf)) break;
    }
    return i;
}

size_t ern_utf8_len(const char *s, size_t len) {
    unsigned char lo, hi;
    if (len == 0) return 0;
    size_t need = shape((unsigned char)s[0], &lo, &hi);
    if (need == 0 || need > len) return 0;
    return matched(s, len, need, lo, hi) == need ? need : 0;
}

bool ern_utf8_is_prefix(const char *s, size_t len) {
    unsigned char lo, hi;
    if (len == 0 || len > 3) return false;
    size_t need = shape((unsigned char)s[0], &lo, &hi);
    return need > len && matched(s, len, need, lo, hi) == len;
}

bool ern_utf8_valid(const char *s, size_t len) {
    while (len) {
        size_t n = ern_utf8_len(s, len);
        if (n == 0) return false;
        s += n;
        len -= n;
    }
    return true;
}
