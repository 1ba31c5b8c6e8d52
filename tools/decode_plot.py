#!/usr/bin/env python3
"""Tokens/s against batch, with the roofline, as SVG: decode_plot.py OUT.svg TITLE TBYTES TFLOPS NAME=FILE [NAME=FILE ...]

FILE holds what `ernest bench step` printed. The roofline of a line, dashed, is the slower of its counted bytes and operations at TBYTES
and TFLOPS: what gpu_limits read and multiplied in the same run. Both may be `-` for the cpu, whose rows tell the limits of their own
rounds: then the medians of those are taken, of reading and of whatever else binds."""
import math
import re
import statistics
import sys

LINE = re.compile(r"^decode b=(\d+) ctx=(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) ", re.M)
LIMIT = re.compile(r"% of ([^,]+), ([\d.]+) (GB|GOP)/s")
COLORS = ("#1f6feb", "#d1512d", "#2e8b57", "#8250df")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 78, 150, 40, 52


def main():
    out, title, tbytes, tflops = sys.argv[1:5]
    series = []
    for arg in sys.argv[5:]:
        name, path = arg.split("=", 1)
        text = open(path).read()
        told = [(what == "read", float(v) * 1e9) for what, v, _ in LIMIT.findall(text)]
        read = statistics.median(v for is_read, v in told if is_read) if tbytes == "-" else float(tbytes) * 1e12
        work = statistics.median(v for is_read, v in told if not is_read) if tflops == "-" else float(tflops) * 1e12
        rows = [(int(b), float(t), float(b) / max(float(mb) * 1e6 / read, float(gop) * 1e9 / work)) for b, _, t, _, mb, gop in LINE.findall(text)]
        series.append((name, sorted(rows)))
    batches = sorted({r[0] for _, rows in series for r in rows})
    low = 10 ** math.floor(math.log10(min(r[1] for _, rows in series for r in rows)))
    high = 10 ** math.ceil(math.log10(max(r[2] for _, rows in series for r in rows)))

    def x(batch):
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(batch / batches[0]) / math.log(batches[-1] / batches[0])

    def y(tokens):
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(tokens / low) / math.log(high / low)

    def path(points):
        return "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in points)

    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/><text x="{LEFT}" y="22" font-size="15">{title}</text>']
    for b in batches:
        svg.append(f'<path d="M{x(b):.1f},{TOP}V{HEIGHT - BOTTOM}" stroke="#eee"/><text x="{x(b):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{b}</text>')
    for decade in range(round(math.log10(low)), round(math.log10(high)) + 1):
        for k in (1, 2, 5) if 10 ** decade < high else (1,):
            v = k * 10 ** decade
            svg.append(f'<path d="M{LEFT},{y(v):.1f}H{WIDTH - RIGHT}" stroke="#{"ccc" if k == 1 else "eee"}"/>')
            svg.append(f'<text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:,}</text>')
    for i, (name, rows) in enumerate(series):
        c = COLORS[i % len(COLORS)]
        svg.append(f'<path d="{path([(x(b), y(t)) for b, t, _ in rows])}" fill="none" stroke="{c}" stroke-width="2.2"/>')
        svg.append(f'<path d="{path([(x(b), y(f)) for b, _, f in rows])}" fill="none" stroke="{c}" stroke-dasharray="5 4"/>')
        svg += [f'<circle cx="{x(b):.1f}" cy="{y(t):.1f}" r="3" fill="{c}"/>' for b, t, _ in rows]
        svg.append(f'<text x="{WIDTH - RIGHT + 12}" y="{TOP + 16 + 20 * i}" fill="{c}">{name}</text>')
    svg.append(f'<text x="{WIDTH - RIGHT + 12}" y="{TOP + 16 + 20 * len(series)}" fill="#555">dashed: roofline</text>')
    svg.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 12}" text-anchor="middle">sequences decoded together</text>')
    svg.append(f'<text transform="translate(18 {HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">tokens/s</text></svg>')
    open(out, "w").write("\n".join(svg) + "\n")


if __name__ == "__main__":
    main()
