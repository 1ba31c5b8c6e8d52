/* bf16 weights into panels. See cpu_kernels.h. */
#include <string.h>

#include "backend/cpu/cpu_kernels.h"

/* One line of n <= CPU_LINE inputs: neighbours are 16 apart. */
static void fill_line(ern_bf16 *to, const ern_bf16 *from, int32_t n) {
    ern_bf16 room[CPU_LINE] = {0};
    if (n < CPU_LINE) from = memcpy(room, from, (size_t)n * sizeof *room);
    uint32_t pair[CPU_LINE / 2];
    for (int i = 0; i < CPU_LINE / 2; i++) pair[i] = from[i] | (uint32_t)from[i + CPU_LINE / 2] << 16;
    memcpy(to, pair, sizeof pair);
}

/* Inputs k..k+31 of outputs o..o+3. */
static void fill_lines(ern_bf16 *at, const ern_linear *w, int32_t o, int32_t k) {
    const int32_t n = w->n_in - k < CPU_LINE ? w->n_in - k : CPU_LINE;
    for (int i = 0; i < CPU_PANEL_LINES; i++, o++, at += CPU_LINE) {
        if (o < w->n_out)
            fill_line(at, (const ern_bf16 *)w->data + o * w->stride + k, n);
        else
            memset(at, 0, CPU_LINE * sizeof *at);
    }
}

/* Inputs k..k+31 of outputs o..o+31. */
static void fill_tiles(ern_bf16 *at, const ern_linear *w, int32_t o, int32_t k) {
    const int32_t n = w->n_in - k < CPU_LINE ? w->n_in - k : CPU_LINE;
    for (int i = 0; i < CPU_PANEL_TILES; i++, o++) {
        ern_bf16 line[CPU_LINE] = {0}, *to = at + i / 16 * (16 * CPU_LINE) + i % 16 * 2;
        if (o < w->n_out) memcpy(line, (const ern_bf16 *)w->data + o * w->stride + k, (size_t)n * sizeof *line);
        for (int p = 0; p < CPU_LINE / 2; p++) memcpy(to + p * CPU_LINE, line + 2 * p, 2 * sizeof *line);
    }
}

void cpu_panels_fill(ern_bf16 *panel, int32_t outs, const ern_linear *w, int32_t from, int32_t to) {
    ERN_ASSERT(w->dtype == ERN_DTYPE_BF16 && w->order == ERN_ORDER_OUT_IN && w->stride > 0);
    const int64_t each = cpu_panel_numbers(outs, w->n_in);
    for (int32_t p = from; p < to; p++) {
        ern_bf16 *at = panel + p * each;
        for (int32_t k = 0; k < w->n_in; k += CPU_LINE, at += CPU_LINE * outs) {
            if (outs == CPU_PANEL_TILES)
                fill_tiles(at, w, p * outs, k);
            else
                fill_lines(at, w, p * outs, k);
        }
    }
}
