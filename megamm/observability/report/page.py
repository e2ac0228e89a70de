"""Parts of a self-contained HTML page: style, cards, tables, sections. Text is escaped here, markup is not."""

import os
from collections.abc import Iterable, Sequence
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
