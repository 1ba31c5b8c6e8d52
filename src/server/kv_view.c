/* The KV cache as JSON. See kv_view.h. */
#include "server/kv_view.h"

#include "base/jsonw.h"

static void number(ern_jsonw *w, const char *key, uint64_t v) {
    ern_jsonw_key(w, key);
    ern_jsonw_int(w, (int64_t)v);
}

static void part(ern_jsonw *w, const char *key, double v) {
    ern_jsonw_key(w, key);
    ern_jsonw_real(w, v);
}

static void flag(ern_jsonw *w, const char *key, bool v) {
    ern_jsonw_key(w, key);
    ern_jsonw_bool(w, v);
}

static void begin(ern_jsonw *w, const char *key) {
    ern_jsonw_key(w, key);
    ern_jsonw_object(w);
}

static void write_pool(ern_jsonw *w, const ern_engine_stats *st) {
    begin(w, "pool");
    number(w, "pages", (uint64_t)st->n_page);
    number(w, "free", (uint64_t)st->n_page_free);
    number(w, "cached", (uint64_t)st->n_page_cached);
    number(w, "held", (uint64_t)(st->n_page - st->n_page_free - st->n_page_cached));
    ern_jsonw_object_end(w);
}

static void write_tree(ern_jsonw *w, const ern_engine_stats *st) {
    begin(w, "tree");
    number(w, "blocks_cached", st->n_block_cached);
    number(w, "blocks_evicted", st->n_block_evicted);
    ern_jsonw_object_end(w);
}

/* null where there is no such tier. */
static void write_tier(ern_jsonw *w, const char *name, const ern_tier_stats *t) {
    ern_jsonw_key(w, name);
    if (t->n_block_max == 0) {
        ern_jsonw_null(w);
        return;
    }
    ern_jsonw_object(w);
    number(w, "blocks", (uint64_t)t->n_block);
    number(w, "max_blocks", (uint64_t)t->n_block_max);
    number(w, "moved_out", t->n_out);
    number(w, "moved_in", t->n_in);
    number(w, "evicted", t->n_evicted);
    number(w, "errors", t->n_error);
    number(w, "cached_tokens", t->n_cached_token);
    flag(w, "off", t->off);
    ern_jsonw_object_end(w);
}

static void write_requests(ern_jsonw *w, const ern_engine_stats *st) {
    begin(w, "requests");
    number(w, "running", (uint64_t)st->n_running);
    number(w, "waiting", (uint64_t)st->n_waiting);
    number(w, "loading", (uint64_t)st->n_loading);
    number(w, "parked", (uint64_t)st->n_parked);
    ern_jsonw_object_end(w);
}

static void write_hits(ern_jsonw *w, const ern_engine_stats *st, const metrics_hits *h) {
    begin(w, "hits");
    number(w, "cached_tokens", st->n_cached_token);
    part(w, "request_rate", h->request);
    part(w, "token_rate", h->token);
    part(w, "pool_token_rate", h->pool);
    part(w, "host_token_rate", h->host);
    part(w, "disk_token_rate", h->disk);
    ern_jsonw_object_end(w);
}

void kv_view_print(const ern_engine_options *o, const ern_engine_stats *st, const metrics_hits *h, ern_buf *out) {
    ern_jsonw w;
    ern_jsonw_init(&w, out);
    ern_jsonw_object(&w);
    flag(&w, "prefix_caching", o->prefix_cache);
    flag(&w, "output_caching", o->cache_output);
    number(&w, "page_tokens", (uint64_t)o->backend_options.n_page_cell);
    write_pool(&w, st);
    write_tree(&w, st);
    begin(&w, "tiers");
    write_tier(&w, "host", &st->host);
    write_tier(&w, "disk", &st->disk);
    ern_jsonw_object_end(&w);
    write_requests(&w, st);
    write_hits(&w, st, h);
    number(&w, "prefill_ns_per_token", (uint64_t)st->prefill_ns_per_token);
    ern_jsonw_object_end(&w);
}

void kv_view_write(metrics *m, ern_engine *engine, ern_buf *out) {
    ern_engine_stats st;
    metrics_hits h;
    ern_engine_stats_read(engine, &st);
    metrics_hit_rates(m, &h);
    kv_view_print(ern_engine_options_of(engine), &st, &h, out);
}
