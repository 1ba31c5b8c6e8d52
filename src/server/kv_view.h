/* GET /debug/kv: the state of the KV cache and its tiers as one JSON object, for people. docs/api.md names the fields.
 * Owner: routes.c. Any thread. */
#ifndef ERN_SERVER_KV_VIEW_H
#define ERN_SERVER_KV_VIEW_H

#include "server/metrics.h"

void kv_view_write(metrics *m, ern_engine *engine, ern_buf *out);
/* The same from plain data, for tests. */
void kv_view_print(const ern_engine_options *o, const ern_engine_stats *st, const metrics_hits *h, ern_buf *out);

#endif
