/* Percentiles, arrivals, lists. See bench_stats.h. */
#include "cli/bench_stats.h"

#include <math.h>
#include <stdlib.h>

#include "base/counter.h"

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_percentile(const double *sorted, size_t n, double p) {
    if (n == 0) return 0;
    const double at = p / 100 * (double)(n - 1);
    const size_t low = (size_t)at, high = low + 1 < n ? low + 1 : n - 1;
    return sorted[low] + (sorted[high] - sorted[low]) * (at - (double)low);
}

bench_summary bench_summarize(double *value, size_t n) {
    bench_summary s = {.n = n};
    if (n == 0) return s;
    qsort(value, n, sizeof *value, by_value);
    for (size_t i = 0; i < n; i++) s.mean += value[i] / (double)n;
    double square = 0;
    for (size_t i = 0; i < n; i++) square += (value[i] - s.mean) * (value[i] - s.mean) / (double)n;
    s.std = sqrt(square);
    s.median = bench_percentile(value, n, 50);
    s.least = value[0];
    s.most = value[n - 1];
    return s;
}

/* ---- arrivals -------------------------------------------------------------------------------------------------- */

/* Draw k of stream i; in (0, 1). */
static double uniform(uint64_t seed, uint64_t i, uint64_t k) {
    const uint64_t bits = ern_counter64(ern_counter64(seed, i), k);
    return ((double)(bits >> 11) + 0.5) * 0x1p-53;
}

static double normal(uint64_t seed, uint64_t i, uint64_t k) {
    return sqrt(-2 * log(uniform(seed, i, k))) * cos(6.283185307179586 * uniform(seed, i, k + 1));
}

/* Gamma of mean `shape`. A shape below 1 is drawn as shape + 1 and scaled by a power of a uniform. */
static double gamma_draw(uint64_t seed, uint64_t i, double shape) {
    const double d = (shape < 1 ? shape + 1 : shape) - 1.0 / 3, c = 1 / sqrt(9 * d);
    double v = 1;
    for (uint64_t k = 1; k < 3000; k += 3) { /* each try succeeds with more than 95% */
        const double x = normal(seed, i, k);
        v = (1 + c * x) * (1 + c * x) * (1 + c * x);
        if (v > 0 && log(uniform(seed, i, k + 2)) < 0.5 * x * x + d - d * v + d * log(v)) break;
        v = 1;
    }
    return d * v * (shape < 1 ? pow(uniform(seed, i, 0), 1 / shape) : 1);
}

double bench_arrival_gap_s(uint64_t seed, uint64_t i, double rate, double burstiness) {
    if (isinf(rate)) return 0;
    return gamma_draw(seed, i, burstiness) / (rate * burstiness);
}

int32_t bench_length(uint64_t seed, uint64_t i, int32_t length, double ratio) {
    /* 100 * 1.1 is a little more than 110 */
    const double low = floor(length * (1 - ratio) + 1e-9), high = ceil(length * (1 + ratio) - 1e-9);
    const double drawn = low + floor(uniform(seed, i, 0) * (high - low + 1));
    return drawn < 1 ? 1 : (int32_t)drawn;
}

/* ---- lists ----------------------------------------------------------------------------------------------------- */

ern_status bench_list(const char *flag, const char *text, double least, double top, double *out, int most, int *n,
                      ern_err *err) {
    *n = 0;
    for (const char *at = text;; at++) {
        char *end = NULL;
        const double v = strtod(at, &end);
        if (end == at || (*end && *end != ',') || !(v >= least) || !(v <= top))
            return ERN_FAIL(err, ERN_ERR_USAGE, "--%s wants numbers from %g to %g with commas between, not '%.60s'",
                            flag, least, top, text);
        if (*n == most) return ERN_FAIL(err, ERN_ERR_USAGE, "--%s holds more than %d numbers", flag, most);
        out[(*n)++] = v;
        if (!*end) return ERN_OK;
        at = end;
    }
}
