/* Numbers about numbers, for the benchmarks: percentiles, the times of arrivals, lists of sizes. Any thread; no state.
 */
#ifndef ERN_CLI_BENCH_STATS_H
#define ERN_CLI_BENCH_STATS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* Of n values; all 0 when n is 0. std is that of the whole population, as numpy's. */
typedef struct bench_summary {
    size_t n;
    double mean, std, median, least, most;
} bench_summary;
/* Sorts value [n] in place. */
bench_summary bench_summarize(double *value, size_t n);
/* The p-th percentile (0..100) of ascending values, linear between neighbours, as numpy's default. 0 when n is 0. */
double bench_percentile(const double *sorted, size_t n, double p);

/* Seconds between request i-1 and request i of an open loop: gamma-distributed with mean 1 / rate and shape
 * `burstiness` (1: exponential, a Poisson process). rate infinite: 0. A pure function of its arguments.
 * Source: Marsaglia and Tsang, A simple method for generating gamma variables, 2000. */
double bench_arrival_gap_s(uint64_t seed, uint64_t i, double rate, double burstiness);
/* Evenly from [floor(length * (1 - ratio)), ceil(length * (1 + ratio))], at least 1. */
int32_t bench_length(uint64_t seed, uint64_t i, int32_t length, double ratio);

/* "1,16,64" into out [most]; each at least `least` and at most `top`. Errors: ERN_ERR_USAGE naming the flag. */
ERN_MUST_CHECK ern_status bench_list(const char *flag, const char *text, double least, double top, double *out,
                                     int most, int *n, ern_err *err);

#endif
