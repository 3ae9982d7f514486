"""Charts of a report's page. Shapes are SVG that stretches to the width there is; all text is HTML around it, so that no width
cuts a label or lays one over another. Each series has a pattern beside its colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fuyou.core.sizes import format_bytes
from fuyou.report.intervals import clipped, merged
from fuyou.report.words import seconds_text

WIDTH = 1000.0  # of every chart, in its own units
FINEST = 1.0  # shapes that are nearer than this are drawn as one
PATTERNS = {  # name → what is drawn over the colour, in a tile of 8 by 8
    "weights": "",
    "gradients": '<path d="M-2,2 l4,-4 M0,8 l8,-8 M6,10 l4,-4" class="line"/>',
    "optimizer": '<circle cx="4" cy="4" r="1.6" class="dot"/>',
    "activations": '<path d="M0,4 h8" class="line"/>',
    "staging": '<path d="M4,0 v8 M0,4 h8" class="line"/>',
}


def definitions() -> str:
    """The patterns, once a page."""
    tiles = "".join(
        f'<pattern id="p-{name}" width="8" height="8" patternUnits="userSpaceOnUse">'
        f'<rect width="8" height="8" class="c-{name}"/>{shape}</pattern>'
        for name, shape in PATTERNS.items()
    )
    return f'<svg width="0" height="0" class="definitions" aria-hidden="true"><defs>{tiles}</defs></svg>'


def legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 16 16"><rect width="16" height="16" fill="url(#p-{name})"/></svg>'
        f"{escape(name)}</li>"
        for name in names
    )
    return f'<ul class="legend">{items}</ul>'


def memory_chart(
    tier: str, series: Sequence[Sequence[Any]], seconds: float, budget: int, phases: Sequence[Sequence[Any]]
) -> str:
    """Bytes by category, stacked, over a step, with its phases behind and the budget as a line."""
    names = [name for name in PATTERNS if any(held.get(name, 0) for _, held in series)]
    peak = max((sum(held.values()) for _, held in series), default=0)
    shows_budget = 0 < budget <= 4 * peak
    top = (max(peak, budget) if shows_budget else peak) * 1.06 or 1.0
    height = 160.0
    below = [0.0] * len(series)
    shapes = [
        f'<rect x="{_n(WIDTH * a / seconds)}" y="0" width="{_n(WIDTH * (b - a) / seconds)}" height="{_n(height)}" '
        f'class="phase phase-{escape(name)}"/>'
        for name, a, b in phases
    ]
    for name in names:
        above = [low + held.get(name, 0) for low, (_, held) in zip(below, series, strict=True)]
        outline = _steps(series, above, seconds, top, height)
        outline += _steps(series, below, seconds, top, height)[::-1]
        points = " ".join(f"{_n(x)},{_n(y)}" for x, y in outline)
        shapes.append(f'<polygon points="{points}" fill="url(#p-{name})" class="area"/>')
        below = above
    if shows_budget:
        y = _n(height * (1 - budget / top))
        shapes.append(f'<path d="M0,{y} h{_n(WIDTH)}" class="budget"/>')
        said = f"dashed line: the budget, {format_bytes(budget)}"
    else:
        said = f"budget {format_bytes(budget)}, far above this chart" if budget else "no budget"
    picture = _svg(shapes, height, "tall", f"{tier} memory through the step")
    return (
        f"<figure><figcaption><b>{escape(tier)}</b>: at most {format_bytes(peak)} in this step; {said}</figcaption>"
        f"{picture}{_axis(seconds)}{legend(names)}</figure>"
    )


def lane_chart(lanes: Mapping[str, tuple[str, Sequence[Sequence[Any]]]], seconds: float, phases: Sequence[Any]) -> str:
    """One row a lane: {lane: (title, [[began, ended, name, bytes]])}; gaps are where it had nothing to do."""
    rows = []
    for lane, (title, spans) in lanes.items():
        union = merged(clipped(((each[0], each[1]) for each in spans), 0.0, seconds))
        busy = sum(ended - began for began, ended in union)
        shapes = [
            f'<rect x="{_n(x)}" y="2" width="{_n(max(width, 0.6))}" height="20" class="lane lane-{lane}"/>'
            for x, width in _coarse([(WIDTH * a / seconds, WIDTH * b / seconds) for a, b in union])
        ]
        rows.append(
            f'<div class="row"><div class="name">{escape(title)}<span>{busy / seconds:.0%}</span></div>'
            f"{_svg(shapes, 24.0, 'lane-row', title)}</div>"
        )
    bands = [
        f'<rect x="{_n(WIDTH * a / seconds)}" y="2" width="{_n(max(WIDTH * (b - a) / seconds, 0.6))}" height="20" '
        f'class="band band-{escape(name)}"/>'
        for name, a, b in phases
    ]
    keys = "".join(
        f'<li><svg class="key" viewBox="0 0 16 16"><rect width="16" height="16" class="band band-{name}"/></svg>'
        f"{name}</li>"
        for name in dict.fromkeys(each[0] for each in phases)
    )
    first = f'<div class="row"><div class="name">phases</div>{_svg(bands, 24.0, "lane-row", "phases")}</div>'
    return (
        f'<figure class="lanes">{first}{"".join(rows)}'
        f'<div class="row"><div class="name"></div>{_axis(seconds)}</div><ul class="legend">{keys}</ul></figure>'
    )


def curve(title: str, values: Sequence[tuple[float, float]], text: Any) -> str:
    """A line of (x, y), its ends and extremes in words by `text(y)`."""
    first, last = values[0][0], values[-1][0]
    low, high = min(y for _, y in values), max(y for _, y in values)
    values = values[:: max(1, len(values) // 500)]
    across, up, height = last - first or 1.0, high - low or 1.0, 100.0
    points = " ".join(
        f"{_n(WIDTH * (x - first) / across)},{_n(4 + (height - 8) * (1 - (y - low) / up))}" for x, y in values
    )
    picture = _svg([f'<polyline points="{points}" class="curve"/>'], height, "short", title)
    return (
        f"<figure><figcaption><b>{escape(title)}</b>: from {text(values[0][1])} to {text(values[-1][1])}; least "
        f"{text(low)}, most {text(high)}</figcaption>{picture}"
        f'<div class="axis"><span>step {first:.0f}</span><span>step {last:.0f}</span></div></figure>'
    )


def _steps(
    series: Sequence[Sequence[Any]], values: Sequence[float], seconds: float, top: float, height: float
) -> list[tuple[float, float]]:
    """Held bytes stay until the next sample: a line of steps."""
    found: list[tuple[float, float]] = []
    for (at, _), value in zip(series, values, strict=True):
        x, y = WIDTH * at / seconds, height * (1 - value / top)
        if found:
            found.append((x, found[-1][1]))
        found.append((x, y))
    return found


def _coarse(shapes: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(x, width) of shapes given as (from, to), with gaps that nobody would see closed."""
    found: list[list[float]] = []
    for began, ended in shapes:
        if found and began - found[-1][1] < FINEST:
            found[-1][1] = max(found[-1][1], ended)
        else:
            found.append([began, ended])
    return [(began, ended - began) for began, ended in found]


def _axis(seconds: float) -> str:
    marks = "".join(f"<span>{seconds_text(seconds * part / 4) if part else '0'}</span>" for part in range(5))
    return f'<div class="axis">{marks}</div>'


def _svg(shapes: Sequence[str], height: float, kind: str, title: str) -> str:
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {WIDTH:.0f} {height:.0f}" preserveAspectRatio="none" role="img">'
        f"<title>{escape(title)}</title>{''.join(shapes)}</svg>"
    )


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
