"""The demo's report: one self-contained HTML page (inline style, media as data URIs), for screen, phone and print.

    python tools/demo_report.py out/demo

In: what tools/demo.py left in that folder. Out: report.html in it. Losses and gains in nats per token, memory in GiB
(summed over the process tree), time in seconds; what a codec's figures are says its training module.
"""

import json
import platform
import sys
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from demo_media import show
from demo_samples import PAIRS, SHOWN

from megamm import metrics
from megamm.data.run_data import load_modalities
from megamm.modalities.base import Modality, UnreadableMedia
from megamm.report import page
from megamm.report.svg import Mark, Series, plot

STYLE = """
figcaption { color: var(--soft); font-size: .9rem; line-height: 1.35; overflow-wrap: anywhere }
figcaption b { color: var(--ink); font-weight: 600 } figure { break-inside: avoid }
.media { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)) }
.pair { display: flex; gap: 6px; align-items: flex-start } .pair > div { flex: 1; min-width: 0 }
.said { margin: 0; font-weight: 600; overflow-wrap: anywhere } audio, video { width: 100%; display: block }
.pixels { width: 100%; image-rendering: pixelated; border: 1px solid var(--line) }
"""
COLOURS = ("#2457c5", "#c2541b", "#2b8a57", "#8a3ab9", "#9b2c3f")


def loss_plot(lines: list[dict[str, Any]], modality: str, colour: str, killed: int, resumed: int) -> str:
    """Training and held-out loss of one modality over steps, with the resumption after the kill, as SVG."""
    series = []
    for key, name, dots in ((f"loss/{modality}", "training", False), (f"heldout/{modality}", "held-out", True)):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        series.append(Series(name, points, colour, dots))
    mark = Mark(resumed, f"killed after {killed}, resumed at {resumed}")
    return plot(modality, series, x_label="step", y_label="nats/token", marks=[mark])


def _figure(shown: list[str], caption: str = "") -> str:
    sides = "".join(f"<div>{one}</div>" for one in shown)
    return f'<figure><div class="pair">{sides}</div><figcaption>{caption}</figcaption></figure>'


def _cards(summary: dict[str, Any]) -> str:
    cards = [
        (f"{summary['seconds']['total'] / 60:.1f} min", "everything, downloads included"),
        (f"{summary['peak_rss_gib']:.1f} GiB", "memory at most, all processes"),
        (f"{summary['tokens_per_s']:,.0f}", "tokens/s in training (median)"),
        (f"{summary['logits_max_abs_diff']:.0e}", "largest difference of logits to transformers"),
        (f"{summary['padding_share']:.1%}", "padding in the rows"),
        (f"step {summary['resumed_from_step']}", f"resumed there after kill -9 at step {summary['killed_at_step']}"),
    ]
    return page.cards(cards)


def _losses(out: Path, run: Path, summary: dict[str, Any]) -> str:
    lines = metrics.read_lines(run)
    killed, resumed = summary["killed_at_step"], summary["resumed_from_step"]
    plots = [loss_plot(lines, m, COLOURS[i % len(COLOURS)], killed, resumed) for i, m in enumerate(summary["loss"])]
    rows = [
        [m, f"{loss['first']:.3f}", f"{loss['last']:.3f}", f"{summary['heldout_loss'][m]:.3f}"]
        for m, loss in summary["loss"].items()
    ]
    table = page.table(["modality", "first step", "last step", "all held-out samples, at the end"], rows)
    note = (
        "Mean cross entropy in nats per token. One rank was killed where the dotted line is; the run went on by itself."
    )
    return page.section("Loss", note, f'<div class="grid">{"".join(plots)}</div>{table}')


def _gains(summary: dict[str, Any]) -> str:
    rows = []
    for direction, gain in summary["pair_gain"].items():
        error = "?" if gain["standard_error"] is None else f"{gain['standard_error']:.4f}"
        counts = [str(gain["samples"]), str(gain["nouns"]), f"{gain['positive_share']:.0%}"]
        rows.append([direction.replace("_", " "), f"{gain['mean']:+.4f}", error, *counts])
    head = ["direction", "gain, nats/token", "standard error", "samples", "nouns", "samples above 0"]
    note = (
        "Loss of the second part after another sample's first part, minus its loss after its own. Above zero, one part "
        "tells of the other. Held out are new combinations of words that all occur in training."
    )
    return page.section("Pair gain on held-out samples", note, page.table(head, rows))


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
            sections.append(page.section(f"{source} to {target}", note, f'<div class="media">{"".join(figures)}</div>'))
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
        note = f"Left: held out. Right: the same from its tokens. All held-out media: {', '.join(shares)}."
        sections.append(page.section(f"The {name} codec", note, f'<div class="media">{"".join(figures)}</div>'))
    return "".join(sections)


def _closing(out: Path, summary: dict[str, Any]) -> str:
    marks = {path.stem: json.loads(path.read_text()) for path in (out / "stages").glob("*.json")}
    names = [name for name in summary["seconds"] if name != "total"]
    rows = [[n, f"{summary['seconds'][n]:.1f}", f"{marks[n]['peak_rss_gib']:.1f}"] for n in names]
    rows.append(["total", f"{summary['seconds']['total']:.1f}", f"{summary['peak_rss_gib']:.1f}"])
    versions = json.loads((out / "export" / "megamm.json").read_text())["versions"]
    versions |= {"transformers": transformers.__version__, "python": platform.python_version()}
    line = " · ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    credits = (out / "shards" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    origin = page.folded("Origin and licence of the data", credits)
    return page.section("Stages", line, page.table(["stage", "seconds", "GiB at most"], rows) + origin)


def write_report(out: Path) -> Path:
    """Write OUT/report.html from what the demo left in OUT."""
    summary = json.loads((out / "summary.json").read_text())
    named = json.loads((out / "stages" / "generate.json").read_text())["details"]["combination"]
    shown = {pair: files[:SHOWN] for pair, files in named.items()}
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
    page.write(out / "report.html", "megamm demo", body, STYLE)
    return out / "report.html"


def main() -> None:
    matplotlib.use("agg")  # point clouds are drawn by it
    print(f"  report: {write_report(Path(sys.argv[1]))}")


if __name__ == "__main__":
    main()
