"""The demo's report: one self-contained HTML page (inline style, pictures as data URIs), for screen, phone and print.

    python tools/demo_report.py out/demo

In: what tools/demo.py left in that folder. Out: report.html in it. Losses and gains in nats per token, PSNR in dB
(10 log10(255^2 / MSE) over 8-bit values), memory in GiB, time in seconds.
"""

import base64
import io
import json
import math
import platform
import sys
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import transformers
from matplotlib.figure import Figure

from megamm import metrics
from megamm.modalities.image import ImageModality, PixelArray

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
.grid { grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)) }
figure { margin: 0; break-inside: avoid } figcaption { line-height: 1.35; overflow-wrap: anywhere }
figcaption b { color: var(--ink); font-weight: 600 }
.pair { display: flex; gap: 4px } .pair img { width: calc(50% - 2px) }
.pixels { width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated; border: 1px solid var(--line) }
.plot { width: 100%; height: auto } .plots { grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums } .scroll { overflow-x: auto }
th, td { text-align: right; padding: .3rem .4rem; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left } th { color: var(--soft); font-weight: 500; font-size: .9rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .75rem; color: var(--soft) }
@media print { body { max-width: none; padding: 0; font-size: 11pt } h2 { break-after: avoid } }
"""
COLOURS = ("#2457c5", "#c2541b", "#2b8a57", "#8a3ab9")


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
    return _uri("svg+xml", file.getvalue())


def psnr(original: PixelArray, other: PixelArray) -> float:
    """dB between two uint8 images of the same shape; infinite if they are equal."""
    error = np.mean((original.astype(np.float64) - other) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _picture(data: bytes, alt: str) -> str:
    return f'<img class="pixels" src="{_uri("png", data)}" alt="{escape(alt, quote=True)}">'


def _figure(pictures: list[str], caption: str) -> str:
    return f'<figure><div class="pair">{"".join(pictures)}</div><figcaption>{caption}</figcaption></figure>'


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
        (f"{summary['psnr']:.1f} dB", f"PSNR of the image codec, {summary['codebook_use']:.0%} of its codes used"),
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


def _pictures(out: Path, codec: ImageModality, shown: dict[str, Any]) -> str:
    """Generated images, captions and reconstructions of the same held-out samples."""
    generated, captioned, rebuilt = [], [], []
    for i, (caption, image) in enumerate(zip(shown["captions"], shown["images"], strict=True)):
        file = out / image
        original = codec.read_media(file.read_bytes(), file.suffix[1:])
        again = codec.decode(codec.encode([original])[0])
        real = _picture(codec.write_media(original), caption)
        made = _picture((out / "generated" / f"{i:03d}.png").read_bytes(), f"generated: {caption}")
        said = (out / "captions" / f"{i:03d}.txt").read_text()
        generated.append(_figure([made, real], f"<b>{escape(caption)}</b>"))
        captioned.append(_figure([real], f"<b>{escape(said) or '(empty)'}</b><br>true: {escape(caption)}"))
        rebuilt.append(
            _figure([real, _picture(codec.write_media(again), "rebuilt")], f"{psnr(original, again):.1f} dB")
        )
    return "".join(
        _section(title, note, f'<div class="grid">{"".join(figures)}</div>')
        for title, note, figures in (
            ("Images from held-out captions", "Left: generated from the caption. Right: the real image.", generated),
            ("Captions of held-out images", "In bold what the model says (likeliest token each time).", captioned),
            ("The image codec", "Left: a held-out image. Right: the same from its tokens, with its PSNR.", rebuilt),
        )
    )


def _closing(out: Path, summary: dict[str, Any]) -> str:
    marks = {path.stem: json.loads(path.read_text()) for path in (out / "stages").glob("*.json")}
    names = [name for name in summary["seconds"] if name != "total"]
    rows = [[n, f"{summary['seconds'][n]:.1f}", f"{marks[n]['peak_rss_gib']:.1f}"] for n in names]
    rows.append(["total", f"{summary['seconds']['total']:.1f}", f"{summary['peak_rss_gib']:.1f}"])
    versions = json.loads((out / "export" / "megamm.json").read_text())["versions"]
    versions |= {"transformers": transformers.__version__, "python": platform.python_version()}
    line = " · ".join(f"{escape(name)} {escape(version)}" for name, version in sorted(versions.items()))
    credits = (out / "shards" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    origin = f"<details><summary>Origin and licence of the pictures</summary><pre>{escape(credits)}</pre></details>"
    return _section("Stages", line, _table(["stage", "seconds", "GiB at most"], rows) + origin)


def write_report(out: Path) -> Path:
    """Write OUT/report.html from what the demo left in OUT."""
    summary = json.loads((out / "summary.json").read_text())
    shown = json.loads((out / "stages" / "generate.json").read_text())["details"]
    codec = ImageModality.load(out / "export" / "codecs" / "image")
    body = (
        "<h1>megamm: the demo</h1><p>Public pictures with captions, two tokenizers trained on them, one model over "
        "both kinds of tokens, exported and run by stock transformers. Everything was made on this machine.</p>"
        + _cards(summary)
        + _losses(out, out / "run", summary)
        + _gains(summary)
        + _pictures(out, codec, shown)
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
