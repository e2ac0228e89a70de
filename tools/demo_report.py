"""The demo's report: one self-contained HTML page (inline style, media as data URIs), for screen, phone and print.

    python tools/demo_report.py out/demo

In: what tools/demo.py left in that folder. Out: report.html in it. Losses and gains in nats per token, memory in GiB
(summed over the process tree), time in seconds; what a codec's figures are says its training module.
"""

import io
import json
import platform
import sys
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from demo_media import show, uri
from demo_samples import PAIRS
from matplotlib.figure import Figure

from megamm import metrics
from megamm.data.run_data import load_modalities
from megamm.modalities.base import Modality, UnreadableMedia

STYLE = """
:root { --ink: #1c2126; --soft: #5b6670; --line: #dfe3e6; --good: #1a7f4b }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 60rem; margin: 0 auto;
       padding: 1.5rem 1rem 3rem }
h1 { font-size: 1.7rem; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem }
p { margin: .3rem 0 .8rem } .soft, figcaption { color: var(--soft); font-size: .9rem }
.cards, .grid { display: grid; gap: .8rem } .cards { grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)) }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem }
.card b { display: block; font-size: 1.25rem } .card span { color: var(--soft); font-size: .85rem }
.grid { grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)) }
figure { margin: 0; break-inside: avoid } figcaption { line-height: 1.35; overflow-wrap: anywhere }
figcaption b { color: var(--ink); font-weight: 600 }
.pair { display: flex; gap: 6px; align-items: flex-start } .pair > div { flex: 1; min-width: 0 }
.said { margin: 0; font-weight: 600; overflow-wrap: anywhere } audio, video { width: 100%; display: block }
.pixels { width: 100%; image-rendering: pixelated; border: 1px solid var(--line) }
.plot { width: 100%; height: auto } .plots { grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums } .scroll { overflow-x: auto }
th, td { text-align: right; padding: .3rem .4rem; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left } th { color: var(--soft); font-weight: 500; font-size: .9rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .75rem; color: var(--soft) }
@media print { body { max-width: none; padding: 0; font-size: 11pt } h2 { break-after: avoid } }
"""
COLOURS = ("#2457c5", "#c2541b", "#2b8a57", "#8a3ab9", "#9b2c3f")


def loss_plot(lines: list[dict[str, Any]], modality: str, colour: str, killed: int, resumed: int) -> str:
    """An SVG data URI: training and held-out loss of one modality over steps, with the kill and the resume."""
    figure = Figure(figsize=(5, 3.1), layout="constrained")
    axes = figure.add_subplot()
    for key, style, label in (
        (f"loss/{modality}", {"lw": 1.3}, "training"),
        (f"heldout/{modality}", {"lw": 1, "ls": "--", "marker": "o", "ms": 5, "mfc": "white"}, "held-out"),
    ):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=label, **style)
    axes.axvline(resumed, color="#444", lw=1, ls=":", label=f"killed after {killed}, resumed at {resumed}")
    axes.set(xlabel="step", ylabel="nats per token", title=modality)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9eb")
    axes.legend(frameon=False, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return uri("image/svg+xml", file.getvalue())


def _figure(shown: list[str], caption: str = "") -> str:
    sides = "".join(f"<div>{one}</div>" for one in shown)
    return f'<figure><div class="pair">{sides}</div><figcaption>{caption}</figcaption></figure>'


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells}</tr>{body}</table></div>'


def _section(title: str, note: str, content: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="soft">{note}</p>{content}</section>'


def _cards(summary: dict[str, Any]) -> str:
    cards = [
        (f"{summary['seconds']['total'] / 60:.1f} min", "everything, downloads included"),
        (f"{summary['peak_rss_gib']:.1f} GiB", "memory at most, all processes"),
        (f"{summary['tokens_per_s']:,.0f}", "tokens/s in training (median)"),
        (f"{summary['logits_max_abs_diff']:.0e}", "largest difference of logits to transformers"),
        (f"{summary['padding_share']:.1%}", "padding in the rows"),
        (f"step {summary['resumed_from_step']}", f"resumed there after kill -9 at step {summary['killed_at_step']}"),
    ]
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{b}</b><span>{s}</span></div>' for b, s in cards)
        + "</div>"
    )


def _losses(out: Path, run: Path, summary: dict[str, Any]) -> str:
    lines = metrics.read_lines(run)
    killed, resumed = summary["killed_at_step"], summary["resumed_from_step"]
    plots = [
        f'<img class="plot" alt="loss of {m}" src="{loss_plot(lines, m, COLOURS[i % len(COLOURS)], killed, resumed)}">'
        for i, m in enumerate(summary["loss"])
    ]
    rows = [
        [m, f"{loss['first']:.3f}", f"{loss['last']:.3f}", f"{summary['heldout_loss'][m]:.3f}"]
        for m, loss in summary["loss"].items()
    ]
    table = _table(["modality", "first step", "last step", "all held-out samples, at the end"], rows)
    note = (
        "Mean cross entropy in nats per token. One rank was killed where the dotted line is; the run went on by itself."
    )
    return _section("Loss", note, f'<div class="grid plots">{"".join(plots)}</div>{table}')


def _gains(summary: dict[str, Any]) -> str:
    rows = []
    for direction, gain in summary["pair_gain"].items():
        error = "?" if gain["standard_error"] is None else f"{gain['standard_error']:.4f}"
        counts = [str(gain["samples"]), str(gain["nouns"]), f"{gain['positive_share']:.0%}"]
        rows.append([direction.replace("_", " "), f"{gain['mean']:+.4f}", error, *counts])
    head = ["direction", "gain, nats/token", "standard error", "samples", "nouns", "samples above 0"]
    note = (
        "Loss of the second part after another sample's first part, minus its loss after its own. Above zero, one part "
        "tells of the other. Subjects (nouns) of held-out samples never occur in training."
    )
    return _section("Pair gain on held-out samples", note, _table(head, rows))


def _shown(modality: Modality, file: Path) -> str:
    """A file's medium, or why there is nothing to show: a model may make silence, or no text."""
    try:
        return show(modality, modality.read_media(file.read_bytes(), file.suffix[1:]), file.name)
    except UnreadableMedia as error:
        return f'<p class="soft">({escape(str(error))})</p>'


def _generated(out: Path, codecs: dict[str, Modality], shown: dict[str, Any]) -> str:
    """Both directions of every pair: what was given, what was made of it, what it really was."""
    sections = []
    for a, b in PAIRS:
        for source, target in ((a, b), (b, a)):
            figures = []
            for i, names in enumerate(shown[f"{a}-{b}"]):
                folder = out / "generated" / f"{source}_to_{target}"
                made = next(folder.glob(f"{i:03d}.*"))
                parts = [(source, out / names[source]), (target, made), (target, out / names[target])]
                figures.append(_figure([_shown(codecs[m], file) for m, file in parts]))
            note = f"Left: a held-out {source}. Middle: the {target} made from it. Right: the real {target}."
            sections.append(_section(f"{source} to {target}", note, f'<div class="grid">{"".join(figures)}</div>'))
    return "".join(sections)


def _rebuilt(out: Path, codecs: dict[str, Modality], shown: dict[str, Any], summary: dict[str, Any]) -> str:
    """Held-out media and what is left of them after encoding and decoding."""
    sections = []
    for name, codec in codecs.items():
        if name == "text":
            continue
        pair = next(f"{a}-{b}" for a, b in PAIRS if name in (a, b))
        figures = []
        for names in shown[pair]:
            file = out / names[name]
            medium = codec.read_media(file.read_bytes(), file.suffix[1:])
            (ids,) = codec.encode([medium])
            again = show(codec, codec.decode(ids), "rebuilt")
            figures.append(_figure([show(codec, medium, "original"), again], f"{len(ids)} tokens"))
        figures_of = summary["codecs"][codec.family]
        shares = [f"{key} {value:.4g}" for key, value in figures_of.items() if isinstance(value, int | float)]
        note = f"Left: held out. Right: the same from its tokens. All held-out media: {escape(', '.join(shares))}."
        sections.append(_section(f"The {name} codec", note, f'<div class="grid">{"".join(figures)}</div>'))
    return "".join(sections)


def _closing(out: Path, summary: dict[str, Any]) -> str:
    marks = {path.stem: json.loads(path.read_text()) for path in (out / "stages").glob("*.json")}
    names = [name for name in summary["seconds"] if name != "total"]
    rows = [[n, f"{summary['seconds'][n]:.1f}", f"{marks[n]['peak_rss_gib']:.1f}"] for n in names]
    rows.append(["total", f"{summary['seconds']['total']:.1f}", f"{summary['peak_rss_gib']:.1f}"])
    versions = json.loads((out / "export" / "megamm.json").read_text())["versions"]
    versions |= {"transformers": transformers.__version__, "python": platform.python_version()}
    line = " · ".join(f"{escape(name)} {escape(version)}" for name, version in sorted(versions.items()))
    credits = (out / "shards" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    origin = f"<details><summary>Origin and licence of the data</summary><pre>{escape(credits)}</pre></details>"
    return _section("Stages", line, _table(["stage", "seconds", "GiB at most"], rows) + origin)


def write_report(out: Path) -> Path:
    """Write OUT/report.html from what the demo left in OUT."""
    summary = json.loads((out / "summary.json").read_text())
    shown = json.loads((out / "stages" / "generate.json").read_text())["details"]
    folders = {folder.name: folder for folder in (out / "export" / "codecs").iterdir()}
    codecs = load_modalities(folders, torch.device("cpu"))
    body = (
        "<h1>megamm: the demo</h1><p>Public text, pictures, speech, animations and 3D models, tokenizers trained on "
        "them, one model over all their tokens, exported and run by stock transformers. All was made on this machine."
        "</p>"
        + _cards(summary)
        + _losses(out, out / "run", summary)
        + _gains(summary)
        + _generated(out, codecs, shown)
        + _rebuilt(out, codecs, shown, summary)
        + _closing(out, summary)
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>megamm demo</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )
    partial = out / ".report.html.partial"
    partial.write_text(page, encoding="utf-8")
    partial.rename(out / "report.html")
    return out / "report.html"


def main() -> None:
    matplotlib.use("agg")
    print(f"  report: {write_report(Path(sys.argv[1]))}")


if __name__ == "__main__":
    main()
