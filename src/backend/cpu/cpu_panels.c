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

void cpu_panels_fill(ern_bf16 *panel, const ern_linear *w, int32_t from, int32_t to) {
    ERN_ASSERT(w->dtype == ERN_DTYPE_BF16 && w->order == ERN_ORDER_OUT_IN && w->stride > 0);
    const int64_t each = cpu_panel_numbers(w->n_in);
    for (int32_t p = from; p < to; p++) {
        ern_bf16 *at = panel + p * each;
        for (int32_t k = 0; k < w->n_in; k += CPU_LINE) {
            const int32_t n = w->n_in - k < CPU_LINE ? w->n_in - k : CPU_LINE;
            for (int32_t o = p * CPU_PANEL_OUT; o < (p + 1) * CPU_PANEL_OUT; o++, at += CPU_LINE) {
                if (o < w->n_out)
                    fill_line(at, (const ern_bf16 *)w->data + o * w->stride + k, n);
                else
                    memset(at, 0, CPU_LINE * sizeof *at);
            }
        }
    }
}
