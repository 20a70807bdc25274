"""Small SVG charts for reports: no dependency, no script, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

from matplotlib import colormaps

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 34

Series = Mapping[str, Sequence[float | None]]
TIME = "time (s)"


def card(title: str, chart: str, note: str) -> str:
    return f"<div class='card'><h3>{escape(title)}</h3>{chart}<p>{escape(note)}</p></div>" if chart else ""


def line_chart(
    times: Sequence[float],
    series: Series,
    *,
    label: str,
    log: bool = False,
    limits: Sequence[float] = (),
    held: bool = False,
    marked: Sequence[bool] = (),
    xlabel: str = TIME,
) -> str:
    """Lines over time; None is passed over, a number that is not finite leaves a gap. `log`: decades, zeros left out.

    Args:
        times: seconds, rising; or whatever `xlabel` says.
        series: name -> one value per time.
        label: of the vertical axis.
        limits: values to draw a dashed line at; those that are not finite are left out.
        held: each value holds until the next time.
        marked: the times to shade, from half-way to their neighbours.
    """
    usable = {
        name: [math.nan if v is None or not math.isfinite(v) or (log and v <= 0) else v for v in values]
        for name, values in series.items()
    }
    numbers = [v for values in usable.values() for v in values if not math.isnan(v)]
    if not numbers:
        return ""
    limits = [v for v in limits if math.isfinite(v)]
    low, high, ticks = axis_of(min(*numbers, *limits, math.inf), max(*numbers, *limits, -math.inf), log)
    end = max(times[-1], 1e-9)

    def x(t: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * t / end

    def y(v: float) -> float:
        share = (math.log10(v) - low) / (high - low) if log else (v - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [_horizontal(y(10**t if log else t), tick_text(t, log)) for t in ticks]
    parts += [_vertical(x(t), f"{t:g}") for t in _ticks(0, end, 6)]
    edges = [times[0], *((a + b) / 2 for a, b in pairwise(times)), times[-1]]
    for first, last in _runs(marked):
        left, right = x(edges[first]), x(edges[last + 1])
        parts.append(
            f'<rect class="marked" x="{left:.1f}" y="{TOP}" width="{max(right - left, 1):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"/>'
        )
    for i, (name, values) in enumerate(usable.items()):
        path, pen = [], "M"
        for t, v, given in zip(times, values, series[name], strict=True):
            if math.isnan(v):
                pen = pen if given is None else "M"
                continue
            if pen == "M":
                path.append(f"M{x(t):.1f} {y(v):.1f}h0.1")  # a point by itself would be invisible
            else:
                path.append(f"H{x(t):.1f}V{y(v):.1f}" if held else f"L{x(t):.1f} {y(v):.1f}")
            pen = "L"
        parts.append(f'<path class="line s{i}" d="{"".join(path)}"/>')
    for v in limits:
        parts.append(
            f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        )
    if xlabel == TIME:
        parts.append(
            f'<line class="cursor" data-x0="{LEFT}" data-x1="{WIDTH - RIGHT}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
    return _svg(parts, label, xlabel, list(series))


def _runs(marked: Sequence[bool]) -> list[tuple[int, int]]:
    """First and last index of each unbroken run of True."""
    runs = [[i for i, _ in run] for yes, run in groupby(enumerate(marked), key=lambda pair: pair[1]) if yes]
    return [(run[0], run[-1]) for run in runs]


def phase_chart(xs: Sequence[float], ys: Sequence[float], *, xlabel: str, label: str) -> str:
    """The path of (x, y) from a ring to a dot; what is not finite is left out."""
    points = [(a, b) for a, b in zip(xs, ys, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if not points:
        return ""
    left, right, across = axis_of(min(a for a, _ in points), max(a for a, _ in points), False)
    low, high, up = axis_of(min(b for _, b in points), max(b for _, b in points), False)

    def place(a: float, b: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * (a - left) / (right - left),
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (b - low) / (high - low),
        )

    parts = [_horizontal(place(left, t)[1], tick_text(t, False)) for t in up]
    parts += [_vertical(place(t, low)[0], tick_text(t, False)) for t in across]
    path = "L".join("{:.1f} {:.1f}".format(*place(*point)) for point in points)
    parts.append(f'<path class="line s0" d="M{path}"/>')
    for kind, point in (("ring", points[0]), ("dot", points[-1])):
        x, y = place(*point)
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
    return _svg(parts, label, xlabel, [])


@dataclass(frozen=True)
class Dot:
    """A point of `dot_chart`, and what is said of it."""

    x: float
    y: float
    told: str
    hollow: bool = False
    circled: bool = False


def dot_chart(
    dots: Sequence[Dot],
    *,
    label: str,
    xlabel: str,
    log: bool = False,
    names: Sequence[str] = (),
    line: Sequence[tuple[float, float]] = (),
    floor: float = -math.inf,
) -> str:
    """Dots, and a line of steps behind them.

    Args:
        log: a logarithmic horizontal axis.
        names: x is an index of these.
        floor: what is below is drawn at the lower edge.
    """
    if not dots:
        return ""
    low, high, up = axis_of(max(min(dot.y for dot in dots), floor), max(dot.y for dot in dots), False)
    xs = [math.log10(dot.x) if log else dot.x for dot in dots]
    first, last = (-0.5, len(names) - 0.5) if names else (min(xs), max(xs))
    room = 0.04 * (last - first) or 0.5
    first, last = first - room, last + room

    def place(x: float, y: float) -> tuple[float, float]:
        share = (max(y, low) - low) / (high - low)
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * (x - first) / (last - first),
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share,
        )

    parts = [_horizontal(place(first, t)[1], tick_text(t, False)) for t in up]
    if names:
        parts += [_vertical(place(i, low)[0], escape(name)) for i, name in enumerate(names)]
    elif log:
        marks = [
            m * 10.0**d
            for d in range(math.floor(first), math.ceil(last) + 1)
            for m in ((1, 2, 5) if last - first > 1 else (1, 2, 3, 5, 7))
        ]
        inside = [m for m in marks if first <= math.log10(m) <= last]
        parts += [_vertical(place(math.log10(m), low)[0], f"{m:g}") for m in inside]
    else:
        parts += [_vertical(place(t, low)[0], f"{t:g}") for t in _ticks(first, last, 6)]
    if line:
        x, y = place(*line[0])
        path = [f"M{x:.1f} {y:.1f}"]
        for point in line[1:]:
            x, y = place(*point)
            path.append(f"H{x:.1f}V{y:.1f}")
        parts.append(f'<path class="line s0" d="{"".join(path)}"/>')
    for dot, across in zip(dots, xs, strict=True):
        x, y = place(across, dot.y)
        kind = "ring" if dot.hollow else "dot"
        if dot.circled:
            parts.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="8"/>')
        parts.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(dot.told)}</title></circle>'
        )
    return _svg(parts, label, xlabel, [])


def bar_chart(shares: Mapping[str, float]) -> str:
    """Named shares of 1 as bars, one below the other."""
    if not shares:
        return ""
    left, pitch = 130, 24
    most = max(*shares.values(), 1e-9)
    parts = []
    for i, (name, share) in enumerate(shares.items()):
        y, width = 6 + pitch * i, (WIDTH - left - 60) * max(share, 0.0) / most
        parts.append(
            f'<text class="tick" x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="bar" x="{left}" y="{y}" width="{max(width, 1):.1f}" height="{pitch - 7}"/>'
            f'<text class="tick" x="{left + width + 7:.1f}" y="{y + 13}">{share:.2f}</text>'
        )
    return f'<svg viewBox="0 0 {WIDTH} {pitch * len(shares) + 10}" role="img" aria-label="Shares">{"".join(parts)}</svg>'


def histogram(values: Sequence[float], *, label: str, limit: float | None = None) -> str:
    """Counts of values, those beyond the 97th percentile in the last bar; a dashed line at `limit`."""
    if not values:
        return ""
    ordered = sorted(values)
    top = ordered[int(0.97 * (len(ordered) - 1))]
    low, high, _ = axis_of(ordered[0], top, False)
    if limit is not None and limit < 3 * high:
        low, high = min(low, limit), max(high, 1.05 * limit)
    bins = min(30, max(8, round(math.sqrt(len(values)) * 2)))
    counts = [0] * bins
    for value in values:
        counts[max(0, min(bins - 1, int((value - low) / (high - low) * bins)))] += 1
    _, most, levels = axis_of(0, max(counts), False)

    def x(v: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (v - low) / (high - low)

    def y(n: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * n / most

    parts = [_horizontal(y(t), f"{t:g}") for t in levels if t == int(t)]
    parts += [_vertical(x(t), f"{t:g}") for t in _ticks(low, high, 6)]
    step = (high - low) / bins
    for i, n in enumerate(counts):
        if n:
            left, right = x(low + i * step), x(low + (i + 1) * step)
            parts.append(
                f'<rect class="bar" x="{left + 0.5:.1f}" y="{y(n):.1f}" width="{right - left - 1:.1f}" '
                f'height="{y(0) - y(n):.1f}"/>'
            )
    if limit is not None and low <= limit <= high:
        parts.append(f'<line class="limit" x1="{x(limit):.1f}" x2="{x(limit):.1f}" y1="{TOP}" y2="{y(0)}"/>')
    return _svg(parts, "plans", label, [])


def scatter_chart(
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    label: str,
    log: bool = False,
    diagonal: bool = False,
) -> str:
    """Points (x, y) of several names; what is not finite is left out, as is what is not positive on `log` axes.

    Args:
        log: decades along both axes.
        diagonal: a dashed line where y = x, and one range for both axes.
    """
    kept = {
        name: [
            (a, b) for a, b in some if math.isfinite(a) and math.isfinite(b) and not (log and min(a, b) <= 0)
        ]
        for name, some in points.items()
    }
    every = [point for some in kept.values() for point in some]
    if not every:
        return ""
    xs, ys = [a for a, _ in every], [b for _, b in every]
    if diagonal:
        xs = ys = xs + ys
    left, right, across = axis_of(min(xs), max(xs), log)
    low, high, up = axis_of(min(ys), max(ys), log)

    def place(a: float, b: float) -> tuple[float, float]:
        a, b = (math.log10(a), math.log10(b)) if log else (a, b)
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * (a - left) / (right - left),
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (b - low) / (high - low),
        )

    def at(tick: float) -> float:
        return float(10**tick) if log else tick

    parts = [_horizontal(place(at(left), at(t))[1], tick_text(t, log)) for t in up]
    parts += [_vertical(place(at(t), at(low))[0], tick_text(t, log)) for t in across]
    if diagonal:
        (x1, y1), (x2, y2) = place(at(left), at(low)), place(at(right), at(high))
        parts.append(f'<line class="limit" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
    for i, some in enumerate(kept.values()):
        for point in some:
            x, y = place(*point)
            parts.append(_mark(i, x, y))
    return _svg(parts, label, xlabel, list(points))


def _mark(i: int, x: float, y: float) -> str:
    """A dot, a square or a triangle: names can be told apart without their colours."""
    if i % 3 == 1:
        return f'<rect class="mark m{i}" x="{x - 2.6:.1f}" y="{y - 2.6:.1f}" width="5.2" height="5.2"/>'
    if i % 3 == 2:
        corners = f"{x:.1f},{y - 3.6:.1f} {x - 3.3:.1f},{y + 2.4:.1f} {x + 3.3:.1f},{y + 2.4:.1f}"
        return f'<polygon class="mark m{i}" points="{corners}"/>'
    return f'<circle class="mark m{i}" cx="{x:.1f}" cy="{y:.1f}" r="2.8"/>'


def heat_map(
    values: Sequence[Sequence[float]],
    *,
    across: tuple[float, float],
    up: tuple[float, float],
    xlabel: str,
    label: str,
    unit: str,
) -> str:
    """Cells of a grid in the colours of cividis, on a logarithmic scale, with its key; NaN and 0 stay empty.

    Args:
        values: rows from the bottom to the top.
        across, up: limits of the axes.
        unit: what the colours mean.
    """
    shown = [v for row in values for v in row if math.isfinite(v) and v > 0]
    if not shown:
        return ""
    least, most = math.log10(min(shown)), math.log10(max(shown))
    if most - least < 1e-9:
        least, most = least - 0.5, most + 0.5
    right, top = WIDTH - 86, 10
    x0, y0, wide, tall = LEFT, top, right - LEFT, HEIGHT - BOTTOM - top

    def colour(share: float) -> str:
        return "#{:02x}{:02x}{:02x}".format(*(round(255 * v) for v in colormaps["cividis"](share)[:3]))

    parts = [
        f'<rect class="empty" x="{x0}" y="{y0}" width="{wide}" height="{tall}"/>',
    ]
    cell_w, cell_h = wide / len(values[0]), tall / len(values)
    for i, row in enumerate(values):
        for j, v in enumerate(row):
            if math.isfinite(v) and v > 0:
                fill = colour((math.log10(v) - least) / (most - least))
                parts.append(
                    f'<rect x="{x0 + j * cell_w:.1f}" y="{y0 + tall - (i + 1) * cell_h:.1f}" '
                    f'width="{cell_w + 0.3:.1f}" height="{cell_h + 0.3:.1f}" fill="{fill}"/>'
                )
    for t in _ticks(*across, 5):
        parts.append(_vertical(x0 + wide * (t - across[0]) / (across[1] - across[0]), f"{t:g}"))
    for t in _ticks(*up, 4):
        y = y0 + tall * (1 - (t - up[0]) / (up[1] - up[0]))
        parts.append(f'<text class="tick" x="{x0 - 7}" y="{y + 3.5:.1f}" text-anchor="end">{t:g}</text>')
    steps = 24
    for i in range(steps):
        y = y0 + tall * (1 - (i + 1) / steps)
        parts.append(
            f'<rect x="{right + 12}" y="{y:.1f}" width="11" height="{tall / steps + 0.3:.1f}" '
            f'fill="{colour((i + 0.5) / steps)}"/>'
        )
    for share in (0.0, 0.5, 1.0):
        y = y0 + tall * (1 - share) + (3.5 if 0 < share < 1 else 9 if share else -1)
        parts.append(
            f'<text class="tick" x="{right + 27}" y="{y:.1f}">{10 ** (least + share * (most - least)):.2g}</text>'
        )
    parts.append(
        f'<text class="axis" transform="translate({WIDTH - 5} {y0 + tall / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(unit)}</text>'
    )
    return _svg(parts, label, xlabel, [])


def axis_of(low: float, high: float, log: bool) -> tuple[float, float, list[float]]:
    """Limits and ticks around [low, high]; all in decades if `log`."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        last = max(last, first + 1)
        decades = range(first, last + 1, max(1, math.ceil((last - first) / 5)))
        return first, last, [float(t) for t in decades]
    if high - low < 1e-9 * max(1.0, abs(high)):
        room = max(abs(high) * 0.1, 0.5)
        low, high = low - (room if low else 0), high + room
    ticks = _ticks(low, high, 5)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else high - low
    low = math.floor(low / step + 1e-9) * step
    high = math.ceil(high / step - 1e-9) * step
    return low, high, _ticks(low, high, 5)


def _ticks(low: float, high: float, about: int) -> list[float]:
    raw = (high - low) / about
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(tick: float, log: bool) -> str:
    if log:
        return "1" if tick == 0 else f"1e{int(tick)}"
    return f"{tick:g}" if abs(tick) < 1e5 else f"{tick:.1e}"


def _horizontal(y: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>'
    )


def _vertical(x: float, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{text}</text>'


def _svg(parts: list[str], ylabel: str, xlabel: str, names: list[str]) -> str:
    axis = (
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(xlabel)}</text>'
        f'<text class="axis" transform="translate(12 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(ylabel)}</text>'
    )
    legend = ""
    if len(names) > 1:
        items = "".join(f'<span><i class="s{i}"></i>{escape(name)}</span>' for i, name in enumerate(names))
        legend = f'<div class="legend">{items}</div>'
    title = escape(f"{ylabel} against {xlabel}")
    return f'{legend}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}{axis}</svg>'
