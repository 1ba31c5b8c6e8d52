/* What the engine will take, and which options go together. */
#ifndef ERN_ENGINE_ENGINE_PLAN_H
#define ERN_ENGINE_ENGINE_PLAN_H

#include "engine/core.h"

/* Copy o to *out with every 0-means-default resolved but n_page, and the backend's limits derived; check that the
 * options agree. Errors: ERN_ERR_USAGE naming the flag. */
ERN_MUST_CHECK ern_status engine_options_fill(ern_engine_options *out, const ern_engine_options *o, ern_err *err);
/* The core's options that belong to filled-in engine options and so many pages in the pool and in host memory. */
core_options engine_core_options(const ern_engine_options *full, int32_t n_page, int32_t n_host_page);
/* Token and prompt events that the outbox has room for; beyond these it always has room for two events per request. */
int32_t engine_event_room(const ern_engine_options *full);

#endif
