"""The demo's examples as HTML: for each direction the input, the model's output, and the real medium.

In: OUT/heldout and OUT/generated (demo_samples.py) with the export's codecs. The samples shown are the first of each
direction, not selected ones. Each output is judged in words: a text by its attributes, a medium by how many real media
of the direction's prompts are nearer to it than its own (the distance of demo_figures.py).
"""

from html import escape
from pathlib import Path
from typing import Any

import demo_words as words
import numpy as np
from demo_figures import attributes, feature
from demo_media import show
from demo_samples import PAIRS, SHOWN, asked, directions, made_file

from megamm.common.errors import UnreadableMedia
from megamm.modalities.protocol import Modality
from megamm.observability.report import page

STYLE = """
.examples { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)) }
.examples.wide { grid-template-columns: minmax(0, 1fr) }
.example { border: 1px solid var(--line); border-radius: 8px; padding: .7rem .8rem; display: flex; flex-wrap: wrap;
           gap: .6rem .8rem; align-items: flex-start; align-content: flex-start; break-inside: avoid; min-width: 0 }
.side { flex: 0 0 auto; max-width: 100% } .words { flex: 1 1 10rem; min-width: 0 } .line { flex: 1 1 100% }
@media (max-width: 36rem) { .words:first-child { flex-basis: 100% } }
.label { color: var(--soft); font-size: .85rem; margin: 0 0 .15rem } .side .said + .label { margin-top: .5rem }
.verdict { flex: 1 1 100%; margin: 0; font-size: .95rem } .right b { color: var(--good) } .wrong b { color: var(--bad) }
@media print { .examples { display: block } .example { margin-bottom: .8rem } section > p { break-after: avoid } }
"""
WIDE = {"points", "video"}
"""Modalities whose media need the page's whole width."""
BELOW = {"audio", "video"}
"""Modalities whose two media, generated and real, fill a line: a text is above them, not next to them."""
REBUILT = 2
"""Number of media of each modality that are shown before and after their tokenizer."""
Verdict = tuple[str, str]
"""RIGHT, RECOGNISED or WRONG, with an explanation."""
RIGHT, RECOGNISED, WRONG = "✓ Right", "✓ Recognised", "✗ Wrong"


def examples(out: Path, codecs: dict[str, Modality], named: dict[str, Any], summary: dict[str, Any]) -> str:
    """Return a section for every direction, on new combinations; named: as returned by demo_samples.write_heldout."""
    found, sections = summary["figures"][words.NEW], []
    for pair, source, target in directions():
        samples = named[words.NEW][pair][: asked(words.NEW, target)]
        name = f"{source}_to_{target}"
        note = words.headline(source, target, found[name]) if name in found else "No sample is held out."
        shown = Direction(out, codecs, source, target, samples).cards() if samples else ""
        sections.append(page.section(words.direction(name).capitalize(), note, shown, name))
    return "".join(sections)


def rebuilt(out: Path, codecs: dict[str, Modality], named: dict[str, Any], summary: dict[str, Any]) -> str:
    """Return held-out media, and the same after encoding and decoding."""
    sections = []
    for name, codec in codecs.items():
        if name == "text":
            continue
        pair = next(f"{a}-{b}" for a, b in PAIRS if name in (a, b))
        cards = []
        for names in named[words.NEW][pair][:REBUILT]:
            medium = _read(codec, out / names[name])
            (ids,) = codec.encode([medium])
            again = show(codec, codec.decode(ids), f"{words.THINGS[name][0]} from its tokens")
            sides = _side("Held out", show(codec, medium, f"held-out {words.THINGS[name][0]}"))
            cards.append(_card(sides + _side(f"From its {len(ids)} tokens", again)))
        values = summary["codecs"][codec.tokenizer_name].items()
        rows = [(key.replace("_", " "), f"{value:.4g}") for key, value in values if isinstance(value, int | float)]
        figures = page.details(
            f"Figures of the {codec.tokenizer_name} tokenizer", page.table(["held-out media", ""], rows)
        )
        sections.append(f"<h3>{escape(name.capitalize())}</h3>{_grid(cards, {name})}{figures}")
    note = "The model reads and writes tokens. No output can be better than these reconstructions of real media."
    return page.section("Tokenizers", note, "".join(sections), "tokenizers")


class Direction:
    """The examples of one direction."""

    def __init__(
        self, out: Path, codecs: dict[str, Modality], source: str, target: str, samples: list[dict[str, str]]
    ) -> None:
        self.source, self.target = source, target
        self.given, self.codec = codecs[source], codecs[target]
        self.inputs = [out / names[source] for names in samples]
        self.reals = [out / names[target] for names in samples]
        self.made = [out / made_file(words.NEW, source, target, i) for i in range(len(samples))]

    def cards(self) -> str:
        """Return the first samples as cards."""
        features = None
        if self.target != "text":
            features = np.stack([feature(self.codec, _read(self.codec, file)) for file in self.reals])
        return _grid([self._one(i, features) for i in range(min(SHOWN, len(self.made)))], {self.source, self.target})

    def _one(self, number: int, features: np.ndarray | None) -> str:
        thing = words.THINGS[self.target][0]
        made, real = _read(self.codec, self.made[number]), _read(self.codec, self.reals[number])
        if isinstance(made, UnreadableMedia):
            output = f'<p class="said">({escape(str(made))})</p>'
            verdict = WRONG, f"no usable output; the real {thing} would be right."
        else:
            output = show(self.codec, made, f"{thing} generated by the model")
            verdict = of_text(made, real) if features is None else self._of_medium(number, made, features)
        given = show(self.given, _read(self.given, self.inputs[number]), f"held-out {words.THINGS[self.source][0]}")
        shown = show(self.codec, real, f"real {thing}")
        if self.target == "text":
            both = f'<p class="label">→ Output</p>{output}<p class="label">Real {thing}</p>{shown}'
            return _card(f'{_side("Input", given)}<div class="side words">{both}</div>', verdict)
        room = "" if self.source != "text" else "line" if self.target in BELOW else "words"
        sides = _side("Input", given, room) + _side("→ Output", output) + _side(f"Real {thing}", shown)
        return _card(sides, verdict)

    def _of_medium(self, number: int, made: Any, features: np.ndarray) -> Verdict:
        """Judge by the rank of its own real medium among those of all prompts, the nearest first."""
        several = words.THINGS[self.target][1]
        distance = np.square(features - feature(self.codec, made)).sum(1)
        nearer, nearest = int((distance < distance[number]).sum()), int(distance.argmin())
        if not nearer:
            return RECOGNISED, f"of {len(distance)} real {several}, the right one is the nearest."
        text = f"nearer to {nearer} of {len(distance)} real {several} than to the right one"
        if self.source == "text":
            found, wanted = (_read(self.given, self.inputs[i]).strip() for i in (nearest, number))
            text += f"; nearest to “{found}”, not to “{wanted}”"
        return WRONG, f"{text}."


def of_text(made: str, real: str) -> Verdict:
    """Judge by each attribute: a text is right if it is identical to the real one."""
    made, real = made.strip(), real.strip()
    if made == real:
        return RIGHT, "letter by letter."
    said, wanted = attributes(made), attributes(real)
    wrong = [
        f"{name} is “{said[name]}”, should be “{value}”" if name in said else f"{name} is missing: “{value}”"
        for name, value in wanted.items()
        if said.get(name) != value
    ]
    wrong += [f"{name} “{value}” was not requested" for name, value in said.items() if name not in wanted]
    kept = [name for name, value in wanted.items() if said.get(name) == value]
    rest = f" Right: {words.listed(kept)}." if kept else " No part is right."
    return WRONG, "; ".join(wrong or [f"should be “{real}”"]) + "." + rest


def _read(codec: Modality, file: Path) -> Any:
    """Return a file's medium, or the error why it is unusable: a model may generate silence, or an empty text."""
    try:
        return codec.read_media(file.read_bytes(), file.suffix[1:])
    except UnreadableMedia as error:
        return error


def _side(label: str, shown: str, room: str = "") -> str:
    return f'<div class="side {room}"><p class="label">{escape(label)}</p>{shown}</div>'


def _card(sides: str, verdict: Verdict | None = None) -> str:
    if verdict is None:
        return f'<div class="example">{sides}</div>'
    sign, text = verdict
    kind = "wrong" if sign == WRONG else "right"
    return f'<div class="example">{sides}<p class="verdict {kind}"><b>{sign}:</b> {escape(text)}</p></div>'


def _grid(cards: list[str], modalities: set[str]) -> str:
    kind = "examples wide" if modalities & WIDE else "examples"
    return f'<div class="{kind}">{"".join(cards)}</div>'
