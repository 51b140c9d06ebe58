"""Plots as SVG text: no drawing library, equal bytes for equal figures, colours from the page (light and dark)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 440, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40
#: Colours of a file that no page gives any; a viewer's dark mode is respected.
_STYLE = (
    ".plot{--text:#59636e;--line:#d1d9e0;--mark:#0969da;--other:#bc4c00;font-family:sans-serif}"
    "@media(prefers-color-scheme:dark){.plot{--text:#9198a1;--line:#3d444d;--mark:#4493f8;--other:#f0883e}}"
    "text{fill:var(--text);font-size:11px}path{fill:none;stroke:var(--text)}.grid{stroke:var(--line)}"
    ".dot{stroke:var(--mark);stroke-width:4;stroke-linecap:round;stroke-opacity:.45}"
    ".fit4,.fit5{stroke:var(--other);stroke-width:2}.fit5{stroke-dasharray:2 3}"
)


class Plot:
    """Axes into which dots, lines and areas are drawn.

    Args:
        x, y: ends of the axes.
        x_label, y_label: texts beside them.
        title: read to those who cannot see it.
    """

    def __init__(self, x: tuple[float, float], y: tuple[float, float], x_label: str, y_label: str, title: str) -> None:
        self.x, self.y = _widened(x), _widened(y)
        self.title = title
        self._parts: list[str] = []
        self._axes(x_label, y_label)

    def dots(self, points: Points, kind: str = "dot") -> Plot:
        """A dot for each point, all in one path: thousands stay small."""
        path = "".join(f"M{self._px(x):.1f} {self._py(y):.1f}h0" for x, y in points)
        self._parts.append(f'<path class="{kind}" d="{path}"/>')
        return self

    def line(self, points: Points, kind: str = "line") -> Plot:
        """A line through points; those outside the axes are left out."""
        low, high = self.y
        inside = [(x, y) for x, y in points if low <= y <= high]
        path = "L".join(f"{self._px(x):.1f} {self._py(y):.1f}" for x, y in inside)
        if path:
            self._parts.append(f'<path class="{kind}" d="M{path}"/>')
        return self

    def bars(self, edges: Sequence[float], heights: Sequence[float]) -> Plot:
        """Bars from 0 up."""
        for left, right, height in zip(edges[:-1], edges[1:], heights, strict=True):
            x, y = self._px(left), self._py(height)
            size = f'width="{self._px(right) - x - 1:.1f}" height="{self._py(0) - y:.1f}"'
            self._parts.append(f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" {size}/>')
        return self

    def __str__(self) -> str:
        body = "".join(self._parts)
        title = escape(self.title)
        return f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{title}</title>{body}</svg>'

    def standalone(self) -> str:
        """The plot as an SVG file of its own, with the colours that a page would give it."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        return f"{head}<style>{_STYLE}</style>{''.join(self._parts)}</svg>\n"

    def _px(self, x: float) -> float:
        return _LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (_WIDTH - _LEFT - _RIGHT)

    def _py(self, y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - self.y[0]) / (self.y[1] - self.y[0]) * (_HEIGHT - _TOP - _BOTTOM)

    def _axes(self, x_label: str, y_label: str) -> None:
        right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        for value in ticks(*self.x):
            at = self._px(value)
            self._parts.append(f'<path class="grid" d="M{at:.1f} {_TOP}V{floor}"/>')
            self._parts.append(f'<text x="{at:.1f}" y="{floor + 14}" text-anchor="middle">{value:g}</text>')
        for value in ticks(*self.y):
            at = self._py(value)
            self._parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right}"/>')
            self._parts.append(f'<text x="{_LEFT - 5}" y="{at + 3:.1f}" text-anchor="end">{value:g}</text>')
        self._parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{floor}H{right}"/>')
        middle_x, middle_y = (_LEFT + right) / 2, (_TOP + floor) / 2
        self._parts.append(
            f'<text x="{middle_x}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
            f'<text x="12" y="{middle_y}" text-anchor="middle" transform="rotate(-90 12 {middle_y})">{escape(y_label)}'
            "</text>"
        )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two ends, about ``count`` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def _widened(ends: tuple[float, float]) -> tuple[float, float]:
    low, high = ends
    margin = 0.03 * (high - low) or 0.5
    return low - margin, high + margin


def histogram(values: Sequence[float], low: float, high: float, bins: int) -> tuple[list[float], list[int]]:
    """Edges and counts of equal bins; the last holds its upper end."""
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, int((value - low) / (high - low) * bins)))] += 1
    return edges, counts
