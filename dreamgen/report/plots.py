"""Plots as inline SVG: text and axes take the page's colours, so they suit light and dark."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 320, 150, 42, 8, 20


class Line(NamedTuple):
    """One curve; `style` is a class of the page's style sheet: a, b, c, d."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str


def number(value: float) -> str:
    """A short label for an axis."""
    return f"{value:.3g}"


def lines(curves: Sequence[Line], *, title: str, x_name: str = "", log: bool = False) -> str:
    """Curves over one pair of axes. log: logarithmic y, for losses; values that are not positive are left out."""
    kept = []
    for curve in curves:
        x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
        fine = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not log))
        if fine.any():
            kept.append((curve, x[fine], np.log10(y[fine]) if log else y[fine]))
    if not kept:
        return ""
    x0, x1 = min(x.min() for _, x, _ in kept), max(x.max() for _, x, _ in kept)
    y0, y1 = min(y.min() for *_, y in kept), max(y.max() for *_, y in kept)
    if y1 - y0 < 1e-9:
        y0, y1 = y0 - 0.5, y1 + 0.5
    margin = 0.04 * (y1 - y0)
    y0, y1 = y0 - margin, y1 + margin
    x1 = x1 if x1 > x0 else x0 + 1

    def place(x: np.ndarray, y: np.ndarray) -> str:
        px = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - 6)
        py = TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px, py, strict=True))

    low, high = (10**y0, 10**y1) if log else (y0, y1)
    parts = [f'<path class="axis" d="M{LEFT},{TOP}V{HEIGHT - BOTTOM}H{WIDTH - 6}"/>',
             f'<text x="{LEFT - 4}" y="{TOP + 8}" text-anchor="end">{number(high)}</text>',
             f'<text x="{LEFT - 4}" y="{HEIGHT - BOTTOM}" text-anchor="end">{number(low)}</text>',
             f'<text x="{LEFT}" y="{HEIGHT - 6}">{number(x0)}</text>',
             f'<text x="{WIDTH - 6}" y="{HEIGHT - 6}" text-anchor="end">{number(x1)} {escape(x_name)}</text>',
             ]  # fmt: skip
    for c, x, y in kept:  # a single value has no line: it is a point
        tip = f"<title>{escape(c.name)}</title>"
        if len(x) == 1:
            px, py = place(x, y).split(",")
            parts.append(f'<circle class="{c.style}" cx="{px}" cy="{py}" r="2.5">{tip}</circle>')
        else:
            parts.append(f'<polyline class="{c.style}" points="{place(x, y)}">{tip}</polyline>')
    label = escape(f"{title}: {', '.join(c.name for c, *_ in kept)}")
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def scatter(points: Sequence[tuple[str, float, float]], *, title: str, x_name: str, y_name: str) -> str:
    """(name, x, y) of shares between 0 and 1 around the diagonal on which both agree."""
    side = 240
    room = side - LEFT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + x * room, TOP + (1 - y) * room

    (x0, y0), (x1, y1) = place(0.0, 0.0), place(1.0, 1.0)
    parts = [f'<path class="axis" d="M{x0},{y1}V{y0}H{x1}M{x0},{y0}L{x1},{y1}"/>',
             f'<text x="{LEFT - 4}" y="{TOP + 8}" text-anchor="end">1</text>',
             f'<text x="{LEFT - 4}" y="{y0}" text-anchor="end">0</text>',
             f'<text x="{x0}" y="{y0 + 14}">{escape(x_name)}</text>',
             f'<text x="{x0 + 4}" y="{TOP + 8}">{escape(y_name)}</text>']  # fmt: skip
    for name, x, y in points:
        px, py = place(float(x), float(y))
        told = f"{escape(name)}: {x:.2f}, {y:.2f}"
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5"><title>{told}</title></circle>')
    label = escape(f"{title}: {len(points)} points")
    box = f'viewBox="0 0 {side} {side}" role="img" aria-label="{label}"'
    return f'<svg class="plot square" {box}>{"".join(parts)}</svg>'


def interval(rate: float, low: float, high: float) -> str:
    """A success rate from 0 to 1 as a bar with its interval as a whisker."""
    return (f'<svg class="bar" viewBox="0 0 200 16" preserveAspectRatio="none" role="img" '
            f'aria-label="{rate:.0%}, {low:.0%} to {high:.0%}"><rect class="track" width="200" height="16"/>'
            f'<rect class="fill" width="{200 * rate:.1f}" height="16"/>'
            f'<path class="whisker" d="M{200 * low:.1f},8H{200 * high:.1f}M{200 * low:.1f},4v8M{200 * high:.1f},4v8"/>'
            f"</svg>")  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds in words: "4 min 05 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(math.floor(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
