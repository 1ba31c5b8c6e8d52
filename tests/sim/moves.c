/* Scripted transfers. See moves.h. */
#include "sim/moves.h"

#include <stdlib.h>
#include <string.h>

void moves_open(moves *m, uint64_t seed, ern_backend *backend, int32_t page_tokens, int32_t n_host_page) {
    memset(m, 0, sizeof *m);
    m->g.key = seed ^ 0x6d6f766573ull;
    m->backend = backend;
    m->page_tokens = page_tokens;
    m->n_host_page = n_host_page;
    m->host = calloc((size_t)n_host_page * (size_t)page_tokens + 1, sizeof *m->host);
    if (!m->host) abort();
    m->slow = rng_one(&m->g, 2) ? 0 : rng_in(&m->g, 1, 20);
    m->lane_max = rng_one(&m->g, 2) ? TRANSFER_JOBS_MAX : rng_in(&m->g, 1, 4);
    m->fails = rng_one(&m->g, 2) ? 0 : rng_in(&m->g, 2, 10);
    m->eager = rng_one(&m->g, 2);
}

void moves_close(moves *m) { free(m->host); }

static void save(moves *m, transfer_job *j) {
    if (m->fails && rng_one(&m->g, m->fails)) {
        j->ok = false;
        return;
    }
    moves_file *f = &m->file[m->next_file];
    m->next_file = (m->next_file + 1) % MOVES_DISK_MAX;
    if (m->n_file < MOVES_DISK_MAX) m->n_file++;
    f->block = j->block;
    memcpy(f->token, j->block.token, sizeof *f->token * (size_t)m->page_tokens);
    f->block.token = f->token;
    m->backend->ops->kv_read(m->backend, &j->device_page, 1, f->payload);
    m->n_save++;
}

static const moves_file *find(const moves *m, const store_block *b) {
    for (int32_t i = 0; i < m->n_file; i++) {
        const moves_file *f = &m->file[i];
        if (memcmp(f->block.key, b->key, sizeof b->key) == 0 &&
            memcmp(f->block.parent, b->parent, sizeof b->parent) == 0 &&
            memcmp(f->block.salt, b->salt, sizeof b->salt) == 0 &&
            memcmp(f->token, b->token, sizeof *f->token * (size_t)m->page_tokens) == 0)
            return f;
    }
    return NULL;
}

static void load(moves *m, transfer_job *j) {
    const moves_file *f = find(m, &j->block);
    j->ok = f && !(m->fails && rng_one(&m->g, m->fails));
    m->n_failed += !j->ok;
    m->n_load += j->ok;
    if (j->ok) m->backend->ops->kv_write(m->backend, &j->device_page, 1, f->payload);
}

static void run(moves *m, transfer_job *j) {
    uint64_t *host = j->host_page >= 0 ? m->host + (size_t)j->host_page * (size_t)m->page_tokens : NULL;
    j->ok = true;
    switch (j->kind) {
    case TRANSFER_OUT:
        m->backend->ops->kv_read(m->backend, &j->device_page, 1, host);
        m->n_out++;
        break;
    case TRANSFER_IN:
        m->backend->ops->kv_write(m->backend, &j->device_page, 1, host);
        m->n_in++;
        break;
    case TRANSFER_SAVE: save(m, j); break;
    case TRANSFER_LOAD: load(m, j); break;
    }
}

static bool moves_start(void *ud, const transfer_job *job) {
    moves *m = ud;
    bool disk = job->kind == TRANSFER_SAVE || job->kind == TRANSFER_LOAD;
    moves_lane *l = &m->lane[disk];
    if (l->n >= m->lane_max) return false;
    int32_t at = (l->first + l->n) % TRANSFER_JOBS_MAX;
    int64_t due = m->now + (m->slow ? rng_in(&m->g, 0, m->slow) : 0);
    if (l->n > 0) {
        int64_t last = l->due[(l->first + l->n - 1) % TRANSFER_JOBS_MAX];
        if (due < last) due = last;
    }
    l->job[at] = *job;
    l->due[at] = due;
    if (disk) {
        memcpy(l->token[at], job->block.token, sizeof(int32_t) * (size_t)m->page_tokens);
        l->job[at].block.token = l->token[at];
    }
    if (m->eager) run(m, &l->job[at]);
    l->n++;
    return true;
}

void moves_tick(moves *m) {
    m->now++;
    for (int k = 0; k < 2; k++)
        for (moves_lane *l = &m->lane[k]; l->n_done < l->n;) {
            int32_t at = (l->first + l->n_done) % TRANSFER_JOBS_MAX;
            if (l->due[at] > m->now) break;
            if (!m->eager) run(m, &l->job[at]);
            l->n_done++;
        }
}

static int32_t moves_poll(void *ud, transfer_job *done, int32_t n) {
    moves *m = ud;
    int32_t k = 0;
    for (int d = 0; d < 2; d++)
        for (moves_lane *l = &m->lane[d]; l->n_done > 0 && k < n; l->n_done--, l->n--) {
            done[k] = l->job[l->first];
            done[k++].block.token = NULL;
            l->first = (l->first + 1) % TRANSFER_JOBS_MAX;
        }
    return k;
}

bool moves_is_busy(const moves *m) { return m->lane[0].n + m->lane[1].n > 0; }

static bool moves_on_disk(void *ud, const uint64_t key[2]) {
    const moves *m = ud;
    for (int32_t i = 0; i < m->n_file; i++)
        if (memcmp(m->file[i].block.key, key, sizeof m->file[i].block.key) == 0) return true;
    return false;
}

const transfer_ops moves_ops = {.start = moves_start, .poll = moves_poll, .on_disk = moves_on_disk};
