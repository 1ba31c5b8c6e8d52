/* Latency against throughput, drawn. See bench_report.h.
 *
 *   +------------- title -------------+
 *   |  TTFT, ms        TPOT, ms       |      two panels of PANEL_W x PANEL_H, axes from zero,
 *   |  |   .--o 16     |     .--o 16  |      a line through the medians, a dashed one through p99,
 *   |  |o-o--'         |o-o-'         |      the concurrency beside each median
 *   |  +----------     +----------    |
 *   +---------------------------------+ */
#include <math.h>
#include <string.h>

#include "cli/bench_report.h"

enum { PANEL_W = 380, PANEL_H = 260, LEFT = 64, TOP = 56, GAP = 84, TICKS = 5 };

/* The smallest 1, 2 or 5 times a power of ten with at most TICKS steps up to v. */
static double tick_step(double v) {
    if (!(v > 0)) return 1;
    const double least = v / TICKS, power = pow(10, floor(log10(least)));
    const double times = least / power;
    return power * (times <= 1 ? 1 : times <= 2 ? 2 : times <= 5 ? 5 : 10);
}

/* Text as XML wants it. */
static void put_text(ern_buf *out, const char *text) {
    for (; *text; text++) {
        const char *as = *text == '&' ? "&amp;" : *text == '<' ? "&lt;" : *text == '>' ? "&gt;" : NULL;
        if (as)
            (void)ern_buf_text(out, as);
        else if ((unsigned char)*text >= 0x20)
            (void)ern_buf_add(out, text, 1);
    }
}

typedef struct panel {
    double x0, y0;       /* lower left corner, pixels */
    double x_top, y_top; /* values at the ends of the axes */
} panel;

static double px(const panel *p, double x) { return p->x0 + x / p->x_top * PANEL_W; }
static double py(const panel *p, double y) { return p->y0 - y / p->y_top * PANEL_H; }

static void put_axes(ern_buf *out, const panel *p, const char *title) {
    const double dx = tick_step(p->x_top), dy = tick_step(p->y_top);
    (void)ern_buf_print(out, "<text x=\"%.1f\" y=\"%.1f\" font-weight=\"bold\">%s</text>\n", p->x0,
                        p->y0 - PANEL_H - 10, title);
    for (double v = 0; v <= p->y_top * 1.0001; v += dy)
        (void)ern_buf_print(out,
                            "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"#ddd\"/>"
                            "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">%g</text>\n",
                            p->x0, py(p, v), p->x0 + PANEL_W, py(p, v), p->x0 - 6, py(p, v) + 4, v);
    for (double v = 0; v <= p->x_top * 1.0001; v += dx)
        (void)ern_buf_print(out,
                            "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"#888\"/>"
                            "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">%g</text>\n",
                            px(p, v), p->y0, px(p, v), p->y0 + 5, px(p, v), p->y0 + 18, v);
    (void)ern_buf_print(out, "<path d=\"M%.1f %.1fV%.1fH%.1f\" fill=\"none\" stroke=\"#444\"/>\n", p->x0,
                        p->y0 - PANEL_H, p->y0, p->x0 + PANEL_W);
    (void)ern_buf_print(out, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">output tokens/s</text>\n",
                        p->x0 + PANEL_W / 2.0, p->y0 + 36);
}

static void put_series(ern_buf *out, const panel *p, const bench_point *at, int n, bool p99) {
    (void)ern_buf_text(out, "<polyline fill=\"none\" stroke-width=\"2\" points=\"");
    for (int i = 0; i < n; i++)
        (void)ern_buf_print(out, "%s%.1f,%.1f", i ? " " : "", px(p, at[i].x), py(p, p99 ? at[i].y99 : at[i].y50));
    (void)ern_buf_text(out, p99 ? "\" stroke=\"#d95f02\" stroke-dasharray=\"6 4\"/>\n" : "\" stroke=\"#1b6ca8\"/>\n");
    for (int i = 0; i < n && !p99; i++)
        (void)ern_buf_print(out,
                            "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"#1b6ca8\"/>"
                            "<text x=\"%.1f\" y=\"%.1f\">%d</text>\n",
                            px(p, at[i].x), py(p, at[i].y50), px(p, at[i].x) + 6, py(p, at[i].y50) + 14, at[i].label);
}

static void put_panel(ern_buf *out, double x0, const char *title, const bench_point *at, int n) {
    panel p = {.x0 = x0, .y0 = TOP + PANEL_H};
    for (int i = 0; i < n; i++) {
        p.x_top = fmax(p.x_top, at[i].x);
        p.y_top = fmax(p.y_top, fmax(at[i].y50, at[i].y99));
    }
    const double dx = tick_step(p.x_top), dy = tick_step(p.y_top);
    p.x_top = fmax(1, ceil(p.x_top / dx - 1e-9)) * dx;
    p.y_top = fmax(1, ceil(p.y_top / dy - 1e-9)) * dy;
    put_axes(out, &p, title);
    put_series(out, &p, at, n, true);
    put_series(out, &p, at, n, false);
}

void bench_svg(ern_buf *out, const char *title, const bench_point *ttft, const bench_point *tpot, int n) {
    const int w = LEFT + 2 * PANEL_W + GAP + 24, h = TOP + PANEL_H + 56;
    (void)ern_buf_print(out,
                        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" "
                        "font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%%\" height=\"100%%\" "
                        "fill=\"#fff\"/>\n<text x=\"%d\" y=\"22\" font-size=\"14\">",
                        w, h, w, h, LEFT);
    put_text(out, title);
    (void)ern_buf_text(out, "</text>\n");
    put_panel(out, LEFT, "TTFT, ms", ttft, n);
    put_panel(out, LEFT + PANEL_W + GAP, "TPOT, ms", tpot, n);
    (void)ern_buf_print(out,
                        "<text x=\"%d\" y=\"%d\" text-anchor=\"end\"><tspan fill=\"#1b6ca8\">median, with requests in "
                        "flight</tspan> <tspan fill=\"#d95f02\">- - p99</tspan></text>\n</svg>\n",
                        w - 24, h - 6);
}
