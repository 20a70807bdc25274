"""Charts of a comparison, as SVG: intervals, profiles, and return against time. Told apart by shape as well as colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from mbrl.experiments.charts import axis_of, tick_text
from mbrl.experiments.statistics import Array, Estimate

WIDTH = 520
DASHES = ("", "7 3", "2 2", "9 3 2 3")


def forest_chart(
    rows: Mapping[str, Mapping[str, Estimate]],
    *,
    series: Sequence[str],
    xlabel: str,
    reference: Mapping[str, float] | None = None,
) -> str:
    """Values with intervals, one line per row and one mark per series, best first.

    Args:
        rows: label -> series -> value.
        series: all of them, in order: a mark means the same in every chart.
        reference: dashed vertical lines, by name.
    """
    reference = dict(reference or {})
    values = [v for marks in rows.values() for e in marks.values() for v in (e.value, e.low, e.high)]
    known = [v for v in (*values, *reference.values()) if v is not None and math.isfinite(v)]
    if not known:
        return ""
    low, high, ticks = axis_of(min(known), max(known), False)
    left, top, pitch = 8 + 7.2 * max(map(len, rows)), 10, 8 + 9 * len(series)
    bottom = top + pitch * len(rows)

    def x(v: float) -> float:
        return left + (WIDTH - 16 - left) * (v - low) / (high - low)

    parts = [_gridline(x(t), top, bottom, tick_text(t, False)) for t in ticks]
    for name, v in reference.items():
        parts.append(
            f'<line class="limit" x1="{x(v):.1f}" x2="{x(v):.1f}" y1="{top}" y2="{bottom}">'
            f"<title>{escape(name)}: {v:.4g}</title></line>"
        )
    for i, (label, marks) in enumerate(rows.items()):
        middle = top + pitch * (i + 0.5)
        parts.append(
            f'<text class="rowname" x="{left - 8:.1f}" y="{middle + 4:.1f}" text-anchor="end">{escape(label)}</text>'
        )
        for name, e in marks.items():
            s = series.index(name)
            y = middle + 9 * (s - (len(series) - 1) / 2)
            told = f"{label}, {name}: {_words(e)}"
            if e.low is not None and e.high is not None:
                parts.append(
                    f'<line class="bar{s}" x1="{x(e.low):.1f}" x2="{x(e.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
                )
            parts.append(_mark(s, x(e.value), y, told))
    return _drawing(
        parts, WIDTH, bottom + 36, xlabel, (left + WIDTH - 16) / 2, dict(enumerate(series)), _mark_key
    )


def profile_chart(
    thresholds: Array, profiles: Mapping[str, Array], *, names: Sequence[str], xlabel: str
) -> str:
    """The share of runs above each threshold, a line per name.

    Args:
        names: all that any chart shows, in order: a line looks the same in every chart.
    """
    if not profiles:
        return ""
    left, top, bottom = 46, 10, 250

    def place(t: float, share: float) -> tuple[float, float]:
        across = (t - thresholds[0]) / (thresholds[-1] - thresholds[0])
        return left + (WIDTH - 16 - left) * across, bottom - (bottom - top) * share

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        _, y = place(thresholds[0], share)
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        )
    for t in axis_of(float(thresholds[0]), float(thresholds[-1]), False)[2]:
        if not thresholds[0] <= t <= thresholds[-1]:
            continue
        x, _ = place(t, 0.0)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{t:.2g}</text>')
    looks = [names.index(name) for name in profiles]
    for i, (name, shares) in zip(looks, profiles.items(), strict=True):
        points = [place(float(t), float(v)) for t, v in zip(thresholds, shares, strict=True)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(
            f'<path class="line p{i % 11}" stroke-dasharray="{DASHES[i % 4]}" d="{path}"><title>{escape(name)}</title></path>'
        )
    return _drawing(
        parts,
        WIDTH,
        bottom + 36,
        xlabel,
        (left + WIDTH - 16) / 2,
        dict(zip(looks, profiles, strict=True)),
        _line_key,
    )


def pareto_chart(
    points: Mapping[str, Mapping[str, tuple[float, Estimate]]],
    *,
    series: Sequence[str],
    xlabel: str,
    label: str,
    fronts: Mapping[str, Sequence[str]],
) -> str:
    """Values against a positive cost on a logarithmic axis; the members of each front are joined.

    Args:
        points: name -> series -> (cost, value).
        series: as in `forest_chart`.
        fronts: series -> names, by rising cost.
    """
    flat = [(cost, e) for each in points.values() for cost, e in each.values() if cost > 0]
    if not flat:
        return ""
    first, last, decades = axis_of(min(c for c, _ in flat), max(c for c, _ in flat), True)
    ends = [v for _, e in flat for v in (e.value, e.low, e.high) if v is not None]
    low, high, ticks = axis_of(min(ends), max(ends), False)
    left, top, bottom = 46, 10, 290

    def place(cost: float, v: float) -> tuple[float, float]:
        across = (math.log10(cost) - first) / (last - first)
        return left + (WIDTH - 30 - left) * across, bottom - (bottom - top) * (v - low) / (high - low)

    parts = []
    for t in ticks:
        _, y = place(10.0**first, t)
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick_text(t, False)}</text>'
        )
    for d in decades:
        x, _ = place(10.0**d, low)
        parts.append(_gridline(x, top, bottom, f"{10.0**d:g}"))
    for s, name in enumerate(series):
        members = [points[member][name] for member in fronts.get(name, ())]
        if len(members) > 1:
            path = "L".join("{:.1f} {:.1f}".format(*place(cost, e.value)) for cost, e in members)
            parts.append(f'<path class="bar{s}" fill="none" d="M{path}"/>')
    taken: list[tuple[float, float]] = []  # where labels begin
    for planner, each in points.items():
        for name, (cost, e) in each.items():
            x, y = place(cost, e.value)
            parts.append(_mark(series.index(name), x, y, f"{planner}, {name}: {_words(e)} in {cost:.3g}"))
            if planner in fronts.get(name, ()):
                level = y - 7
                while any(abs(x - a) < 90 and abs(level - b) < 12 for a, b in taken):
                    level += 12
                taken.append((x, level))
                end = x > WIDTH - 130
                parts.append(
                    f'<text class="tick" x="{x + (-8 if end else 8):.1f}" y="{level:.1f}" '
                    f'text-anchor="{"end" if end else "start"}">{escape(planner)}</text>'
                )
    chart = _drawing(
        parts, WIDTH, bottom + 36, xlabel, (left + WIDTH - 16) / 2, dict(enumerate(series)), _mark_key
    )
    return f'<p class="axisname">{escape(label)}</p>{chart}'


def _gridline(x: float, top: float, bottom: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>'
        f'<text class="tick" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{text}</text>'
    )


def _mark(s: int, x: float, y: float, told: str) -> str:
    """A circle, a triangle, a square or a diamond."""
    r = 4.0
    if s % 4 == 0:
        shape = f'<circle class="mark{s % 4}" cx="{x:.1f}" cy="{y:.1f}" r="{r}">'
        return f"{shape}<title>{escape(told)}</title></circle>"
    corners = {
        1: ((0, -r - 0.5), (r + 0.5, r), (-r - 0.5, r)),
        2: ((-r, -r), (r, -r), (r, r), (-r, r)),
        3: ((0, -r - 1), (r + 1, 0), (0, r + 1), (-r - 1, 0)),
    }[s % 4]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="mark{s % 4}" points="{points}"><title>{escape(told)}</title></polygon>'


def _mark_key(s: int) -> str:
    return f'<svg class="swatch" viewBox="0 0 14 12">{_mark(s, 7, 6, "")}</svg>'


def _line_key(i: int) -> str:
    return (
        f'<svg class="swatch wide" viewBox="0 0 30 12"><path class="line p{i % 11}" '
        f'stroke-dasharray="{DASHES[i % 4]}" d="M0 6H30"/></svg>'
    )


def _words(e: Estimate) -> str:
    return f"{e.value:.4g}" + ("" if e.low is None else f" [{e.low:.4g}, {e.high:.4g}]")


def _drawing(
    parts: list[str],
    width: float,
    height: float,
    xlabel: str,
    middle: float,
    names: Mapping[int, str],
    key: Callable[[int], str],
) -> str:
    legend = ""
    if len(names) > 1:
        items = "".join(f"<span>{key(i)}{escape(name)}</span>" for i, name in names.items())
        legend = f'<div class="legend">{items}</div>'
    axis = f'<text class="axis" x="{middle:.1f}" y="{height - 4:.1f}" text-anchor="middle">{escape(xlabel)}</text>'
    return (
        f'{legend}<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(xlabel)}">'
        f"{''.join(parts)}{axis}</svg>"
    )
