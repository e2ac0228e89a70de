"""Parts of a self-contained HTML page: style, cards, tables, sections, and small plots as inline SVG.

Text is escaped here, markup is not. Plots (lines over an axis, bands over time) take points in the data's units, scale
with their column and use the page's colours. Nothing needs a library, a script or an extra file.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5b6670; --line: #dfe3e6; --page: #fff; --link: #2457c5;
        --good: #1a7f4b; --bad: #b3261e }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #a3adb6; --line: #3a4147; --page: #15181b; --link: #8fb1f5;
          --good: #5fc992; --bad: #ff8a80 }
  .plot polyline, .plot circle, .plot path, .plot .mark { filter: brightness(1.5) }
}
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 70rem; margin: 0 auto; padding: 1.5rem 1rem 3rem }
h1 { font-size: 1.7rem; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem }
a { color: var(--link) } p { margin: .3rem 0 .8rem } .soft { color: var(--soft); font-size: .9rem }
.cards, .grid { display: grid; gap: .8rem } .cards { grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)) }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem }
.card b { display: block; font-size: 1.25rem } .card span { color: var(--soft); font-size: .85rem }
.grid { grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)) }
.plot { width: 100%; height: auto; display: block } figure { margin: 0 } .empty { padding: .4rem }
.plot text { font: 11px system-ui, sans-serif; fill: var(--soft) }
.plot .title { font-size: 13px; font-weight: 600; fill: var(--ink) }
.plot .title tspan { font-weight: 400; font-size: 11px; fill: var(--soft) }
.plot .grid { stroke: var(--line) } .plot .mark { stroke: #9b2c3f; stroke-dasharray: 2 3; stroke-width: 1.4 }
.plot polyline { fill: none; stroke-width: 1.5; stroke-linejoin: round }
.stack { display: flex; height: 1.6rem; border-radius: 6px; overflow: hidden } .stack i { min-width: 1px }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums } .scroll { overflow-x: auto }
th, td { text-align: right; padding: .3rem .4rem; border-bottom: 1px solid var(--line); vertical-align: top }
th:first-child, td:first-child, .text { text-align: left } th { color: var(--soft); font-weight: 500 }
th, td { font-size: .9rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .75rem; color: var(--soft) }
@media screen and (max-width: 30rem) {
  .plot text, .plot .title tspan { font-size: 14px } .plot .title { font-size: 16px }
}
@media print { body { max-width: none; padding: 0; font-size: 11pt } h2 { break-after: avoid }
               svg { break-inside: avoid } }
"""
WIDTH, HEIGHT = 520.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 20.0, 26.0, 34.0
MAX_POINTS = 800
Point = tuple[float, float]


def cards(entries: Iterable[tuple[str, str]]) -> str:
    """Return cards, side by side, of (figure, label)."""
    shown = (f'<div class="card"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in entries)
    return f'<div class="cards">{"".join(shown)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[str] = ()) -> str:
    """Return a table; numbers are aligned right, the first column and those in `words` left."""
    sides = [' class="text"' if name in words else "" for name in head]
    cells = "".join(f"<th{side}>{escape(name)}</th>" for name, side in zip(head, sides, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{side}>{escape(cell)}</td>" for cell, side in zip(row, sides, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{cells}</tr>{body}</table></div>'


def section(title: str, note: str, content: str, anchor: str = "") -> str:
    """Return a section. note: plain text; anchor: the section's id, for links within the page."""
    attribute = f' id="{escape(anchor, quote=True)}"' if anchor else ""
    return f'<section{attribute}><h2>{escape(title)}</h2><p class="soft">{escape(note)}</p>{content}</section>'


def details(title: str, content: str) -> str:
    """Return markup that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def folded(title: str, text: str) -> str:
    """Return long text that opens on a click."""
    return details(title, f"<pre>{escape(text)}</pre>")


def write(path: Path, title: str, body: str, style: str = "") -> None:
    """Write the page atomically; it loads no other files. style: CSS rules in addition to STYLE."""
    # A page holds texts from events and prompts; even unescaped markup could then load and run nothing.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{style}</style></head>'
        f"<body>{body}</body></html>\n"
    )
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)


@dataclass(frozen=True)
class Series:
    """A line, or single points if `dots` is true; points that are not finite leave a gap."""

    name: str
    points: Sequence[Point]
    colour: str
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical dotted line with a tooltip."""

    x: float
    text: str


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers in [low, high]; their distance is 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    # The step is the smallest of 1, 2, 5 and 10 times this power that is not below the rough one.
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def thin(points: Sequence[Point], count: int = MAX_POINTS) -> list[Point]:
    """Reduce to about `count` points: the lowest and highest of every bin, so that no spike is lost."""
    finite = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    if len(finite) <= count:
        return list(points)
    size = math.ceil(len(finite) / (count / 2))
    kept: list[Point] = []
    for begin in range(0, len(finite), size):
        part = range(begin, min(begin + size, len(finite)))
        ends = {min(part, key=lambda i: finite[i][1]), max(part, key=lambda i: finite[i][1])}
        kept += [finite[i] for i in sorted(ends)]
    return kept


def number(value: float) -> str:
    """Format a number in short form: 0.001, 12.5, 3,400, 150k, 2.4M, 1e+12."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
    return f"{value:.3g}"


def plot(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
) -> str:
    """Return lines with axes and a legend, or a sentence if there is nothing to draw."""
    finite = [p for s in series for p in s.points if math.isfinite(p[0]) and math.isfinite(p[1])]
    if not finite:
        return f'<figure class="empty"><b>{escape(title)}</b><p class="soft">nothing recorded</p></figure>'
    xs, ys = [p[0] for p in finite], [p[1] for p in finite]
    x_low, x_high = _widened(min(xs), max(xs), 0.0)
    y_low, y_high = _widened(0.0 if from_zero else min(ys), max(ys), 0.06)
    y_low = 0.0 if from_zero else y_low

    def x_of(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="{LEFT}" y="15">{escape(title)} <tspan>{escape(y_label)}</tspan></text>']
    for value in ticks(y_low, y_high):
        y = y_of(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(value)}</text>')
    for value in ticks(x_low, x_high):
        position = f'x="{x_of(value):.1f}" y="{HEIGHT - BOTTOM + 15}"'
        parts.append(f'<text class="tick" {position} text-anchor="middle">{number(value)}</text>')
    parts.append(
        f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    for mark in marks:
        if x_low <= mark.x <= x_high:
            x = x_of(mark.x)
            line = f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
            parts.append(f"{line}<title>{escape(mark.text)}</title></line>")
    parts += [_drawn(one, x_of, y_of) for one in series]
    parts.append(_legend(series))
    label = escape(f"{title} ({y_label}) over {x_label}", quote=True)
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )


def _widened(low: float, high: float, margin: float) -> Point:
    """Return a non-empty range with a margin on both sides."""
    if high <= low:
        half = abs(low) * 0.05 or 0.5
        return low - half, high + half
    return low - (high - low) * margin, high + (high - low) * margin


def _drawn(series: Series, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    """Return the polylines between gaps, or the dots."""
    lines: list[list[str]] = [[]]
    for x, y in thin(series.points):
        if math.isfinite(x) and math.isfinite(y):
            lines[-1].append(f"{x_of(x):.1f},{y_of(y):.1f}")
        else:
            lines.append([])
    drawn = []
    for line in filter(None, lines):
        if not series.dots and len(line) > 1:
            drawn.append(f'<polyline points="{" ".join(line)}" stroke="{series.colour}"/>')
        else:
            dots = (point.split(",") for point in line)
            drawn += [f'<circle cx="{x}" cy="{y}" r="2.6" fill="{series.colour}"/>' for x, y in dots]
    return "".join(drawn)


def _legend(series: Sequence[Series]) -> str:
    """Return the legend, to the right of the title, last series rightmost; empty for a single series."""
    if len(series) < 2:
        return ""
    x, parts = WIDTH - RIGHT, []
    for one in reversed(series):
        parts.append(f'<text class="tick" x="{x:.0f}" y="15" text-anchor="end">{escape(one.name)}</text>')
        x -= 7 * len(one.name) + 8
        sign = f'<circle cx="{x:.0f}" cy="11.5" r="3" fill="{one.colour}"/>'
        line = f'<path d="M{x - 6:.0f} 11.5 h12" stroke="{one.colour}" stroke-width="2"/>'
        parts.append(sign if one.dots else line)
        x -= 14
    return "".join(parts)


@dataclass(frozen=True)
class Band:
    """A piece of a time line, in the unit of its axis; text is its tooltip."""

    begin: float
    end: float
    colour: str
    text: str


def timeline(bands: Sequence[Band], marks: Sequence[tuple[Mark, str]], *, end: float, x_label: str) -> str:
    """Return bands from 0 to `end`, with coloured marks as triangles above them."""
    width, right = 1060.0, 16.0

    def x_of(value: float) -> float:
        return right + value / max(end, 1e-9) * (width - 2 * right)

    parts = []
    for band in bands:
        size = max(x_of(band.end) - x_of(band.begin), 0.6)
        position = f'x="{x_of(band.begin):.1f}" y="18" width="{size:.1f}" height="26"'
        parts.append(f'<rect {position} fill="{band.colour}"><title>{escape(band.text)}</title></rect>')
    for mark, colour in marks:
        x = x_of(mark.x)
        path = f'<path d="M{x:.1f} 16 l-4.5 -9 h9 z" fill="{colour}">'
        parts.append(f"{path}<title>{escape(mark.text)}</title></path>")
    for value in ticks(0.0, end, 8):
        parts.append(f'<text class="tick" x="{x_of(value):.1f}" y="58" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<text class="tick" x="{width / 2}" y="72" text-anchor="middle">{escape(x_label)}</text>')
    return f'<svg class="plot" viewBox="0 0 {width:g} 76" role="img" aria-label="time line">{"".join(parts)}</svg>'
