"""The demo's report: one self-contained HTML page (inline style, media as data URIs), for screen, phone and print.

    python tools/demo_report.py out/demo

In: the output of tools/demo.py in that folder. Out: report.html in it: a summary in five sentences, examples of every
direction, their figures and targets, then losses, tokenizers and stages. Losses and gains in nats per token, memory in
GiB (summed over the process tree), time in seconds; a tokenizer's training module defines its figures.
"""

import json
import platform
import re
import sys
from html import escape
from pathlib import Path
from typing import Any

import demo_gallery as gallery
import demo_media as media
import demo_words as words
import matplotlib
import torch
import transformers
from demo_samples import directions

from megamm.data.pipeline.run_data import load_modalities
from megamm.observability import metrics
from megamm.observability.report import page
from megamm.observability.report.page import Mark, Series, plot

STYLE = """
.story p { font-size: 1.1rem; margin: .6rem 0 } .links { margin: 1rem 0 0; line-height: 1.9 }
.links a { white-space: nowrap; margin-right: .9rem }
h3 { font-size: 1.05rem; margin: 1.2rem 0 .3rem } ul { padding-left: 1.2rem; margin: .3rem 0 }
.figures { display: grid; gap: .2rem 2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)) }
.figures > div { break-inside: avoid; min-width: 0 } .figures p { margin: .2rem 0 }
.bar { margin: .35rem 0; font-size: .9rem } .bar span { color: var(--soft) }
.track { position: relative; height: .5rem; border-radius: 3px; background: var(--line) }
.track i { position: absolute; top: 0; height: 100%; border-radius: 3px }
.track .range { background: #7fa3e8 } .track .share { width: 4px; margin-left: -2px; background: #2457c5 }
.track .chance { width: 2px; top: -3px; height: calc(100% + 6px); background: var(--ink) }
"""
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]\d+)?(?: of \d+)?")
COLOURS = ("#2457c5", "#c2541b", "#2b8a57", "#8a3ab9", "#9b2c3f")


def _opening(summary: dict[str, Any]) -> str:
    """Return the first screen: the summary, and where to read on."""
    sentences = (NUMBER.sub(r"<b>\g<0></b>", escape(sentence)) for sentence in words.story(summary))
    story = "".join(f"<p>{sentence}</p>" for sentence in sentences)
    names = [f"{source}_to_{target}" for _, source, target in directions()]
    places = [(name, words.direction(name)) for name in names]
    places += [(name, name) for name in ("figures", "targets", "losses", "tokenizers", "stages")]
    links = "".join(f'<a href="#{place}">{escape(name)}</a> ' for place, name in places)
    return f'<h1>megamm: the demo</h1><div class="story">{story}</div><p class="links">{links}</p>'


def _examples_note() -> str:
    return (
        "<h2>Examples</h2><p>Every input is held out: its words occur in training, but not in this combination. The "
        "first samples of each direction are shown, not the best ones. The output is what the model generated from the "
        "input alone. A caption is right if it is the real one, letter by letter; a generated medium is recognised if "
        "the right real medium is nearer to it than those of all other prompts.</p>"
    )


def _bar(row: words.Row) -> str:
    """Return a figure in words over its interval, share and chance level."""
    text = f"<b>{escape(row.count())}:</b> <span>{escape(row.share())}</span>"
    if row.value["share"] is None:
        return f'<div class="bar">{text}</div>'
    low, high = (100 * end for end in row.value["interval"])
    marks = f'<i class="range" style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
    if row.chance is not None:
        marks += f'<i class="chance" style="left:{100 * row.chance:.1f}%"></i>'
    marks += f'<i class="share" style="left:{100 * row.value["share"]:.1f}%"></i>'
    return f'<div class="bar">{text}<div class="track">{marks}</div></div>'


def _figures(summary: dict[str, Any]) -> str:
    """Return every direction's figures on new combinations, in words."""
    found, gains = summary["figures"][words.NEW], summary["pair_gain_by_rule"][words.NEW]
    parts = []
    for _, source, target in directions():
        name = f"{source}_to_{target}"
        bars = "".join(_bar(row) for row in words.rows(target, found.get(name, {})))
        gain = f"Pair gain {words.gain(gains[name])}" if name in gains else "No pair gain was measured."
        parts.append(
            f'<div><h3>{words.direction(name).capitalize()}</h3>{bars}<p class="soft">{escape(gain)}</p></div>'
        )
    note = (
        "On new combinations. In brackets and as a light band: the 95 % interval; the thin line across a bar is the "
        "chance level. An attribute of a generated medium is that of the nearest real medium; “read off real media” "
        "is how often this is right for real held-out media, encoded and decoded. Pair gain: how much lower the loss "
        "of the output is after its own input than after another sample's; it is significant above twice its standard "
        "error."
    )
    return page.section("Figures", note, f'<div class="figures">{"".join(parts)}</div>', "figures")


def _targets(summary: dict[str, Any]) -> str:
    """Return the targets with the results."""
    lists = []
    for title, wanted in (("Not reached", False), ("Reached", True)):
        lines = [words.target(one) for one in summary["targets"] if one["reached"] is wanted]
        items = "".join(f"<li>{escape(line)}</li>" for line in lines) or "<li>none</li>"
        lists.append(f"<h3>{title}: {len(lines)} of {len(summary['targets'])}</h3><ul>{items}</ul>")
    note = "On new combinations. Pair gains in nats per token; in brackets the 95 % interval of a share."
    return page.section("Targets", note, "".join(lists), "targets")


def _unseen(summary: dict[str, Any]) -> str:
    """Return the table of subjects that are not in training."""
    found, gains = summary["figures"].get(words.UNSEEN, {}), summary["pair_gain_by_rule"].get(words.UNSEEN, {})
    rows = []
    for name, figures in found.items():
        target = name.partition("_to_")[2]
        rows += [[words.direction(name), row.count(), row.share()] for row in words.rows(target, figures)]
    rows += [[words.direction(name), "pair gain", words.gain(gain)] for name, gain in gains.items()]
    note = (
        "Other samples have a subject whose word and media are not in training. A model this small cannot know their "
        "names. These figures show what it cannot do and are not included in those above."
    )
    head = ["direction", "figure", "share (95 % interval)"]
    table = page.table(head, rows, head) if rows else "<p>No sample has an unseen subject.</p>"
    return page.section("Unseen subjects", note, table, "unseen")


def loss_plot(lines: list[dict[str, Any]], modality: str, colour: str, killed: int, resumed: int) -> str:
    """Plot training and held-out loss of one modality over steps, with the resumption after the kill, as SVG."""
    series = []
    for key, name, dots in ((f"loss/{modality}", "training", False), (f"heldout/{modality}", "held-out", True)):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        series.append(Series(name, points, colour, dots))
    mark = Mark(resumed, f"killed after {killed}, resumed at {resumed}")
    return plot(modality, series, x_label="step", y_label="nats/token", marks=[mark])


def _losses(run: Path, summary: dict[str, Any]) -> str:
    lines = metrics.read_lines(run)
    killed, resumed = summary["killed_at_step"], summary["resumed_from_step"]
    plots = [loss_plot(lines, m, COLOURS[i % len(COLOURS)], killed, resumed) for i, m in enumerate(summary["loss"])]
    rows = [
        [m, f"{loss['first']:.3f}", f"{loss['last']:.3f}", f"{summary['heldout_loss'][m]:.3f}"]
        for m, loss in summary["loss"].items()
    ]
    table = page.table(["modality", "first steps", "last steps", "held-out, at the end"], rows)
    note = (
        "Mean cross entropy in nats per token. The dotted line is the checkpoint from which the run resumed after one "
        "process was killed."
    )
    return page.section("Losses", note, f'<div class="grid">{"".join(plots)}</div>{table}', "losses")


def _stages(out: Path, summary: dict[str, Any]) -> str:
    marks = {path.stem: json.loads(path.read_text()) for path in (out / "stages").glob("*.json")}
    names = [name for name in summary["seconds"] if name != "total"]
    rows = [[n, f"{summary['seconds'][n]:.1f}", f"{marks[n]['peak_rss_gib']:.1f}"] for n in names]
    rows.append(["total", f"{summary['seconds']['total']:.1f}", f"{summary['peak_rss_gib']:.1f}"])
    versions = json.loads((out / "export" / "megamm.json").read_text())["versions"]
    versions |= {"transformers": transformers.__version__, "python": platform.python_version()}
    credits = (out / "shards" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    note = f"{summary['padding_share']:.1%} of the training rows were padding."
    folded = page.folded("Versions", "\n".join(f"{name} {version}" for name, version in sorted(versions.items())))
    folded += page.folded("Origin and licence of the data", credits)
    return page.section("Stages", note, page.table(["stage", "seconds", "GiB at most"], rows) + folded, "stages")


def write_report(out: Path) -> Path:
    """Write OUT/report.html from the demo's output in OUT."""
    summary = json.loads((out / "summary.json").read_text())
    named = json.loads((out / "stages" / "generate.json").read_text())["details"]
    folders = {folder.name: folder for folder in (out / "export" / "codecs").iterdir()}
    codecs = load_modalities(folders, torch.device("cpu"))
    body = (
        _opening(summary)
        + _examples_note()
        + gallery.examples(out, codecs, named, summary)
        + _figures(summary)
        + _targets(summary)
        + _unseen(summary)
        + _losses(out / "run", summary)
        + gallery.rebuilt(out, codecs, named, summary)
        + _stages(out, summary)
    )
    page.write(out / "report.html", "megamm demo", body, media.STYLE + gallery.STYLE + STYLE)
    return out / "report.html"


def main() -> None:
    matplotlib.use("agg")  # it draws spectrograms
    print(f"  report: {write_report(Path(sys.argv[1]))}")


if __name__ == "__main__":
    main()
