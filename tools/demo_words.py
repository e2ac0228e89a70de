"""The demo's figures in words, as plain text, from summary.json alone (tools/demo_figures.py, tools/demo.py).

A figure is `{"n", "right", "share", "interval"}`; without samples its share and interval are None. A gain is
`{"mean", "standard_error", "samples", ...}` in nats per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

THINGS = {
    "text": ("caption", "captions"),
    "image": ("image", "images"),
    "audio": ("audio clip", "audio clips"),
    "video": ("video", "videos"),
    "points": ("point cloud", "point clouds"),
}
"""Names of one and of several media of a modality."""
NEW = "combination"
"""The rule whose figures count: new combinations of words that all occur in training."""
UNSEEN = "noun"
"""The rule of subjects that are not in training."""


FIGURES = {
    "exact": "exactly right",
    "attributes": "every attribute right",
    "retrieval r1": "real one the nearest",
    "retrieval r5": "real one among the five nearest",
}
"""Names of figures in targets, in words."""


@dataclass(frozen=True)
class Row:
    """One figure: what was right, how often, how often by chance, and the reading of real media."""

    name: str
    """Text with "{}" for the counts."""
    value: dict[str, Any]
    chance: float | None = None
    reading: dict[str, Any] | None = None

    def count(self) -> str:
        """ "5 of 47 captions exactly right"."""
        return self.name.format(f"{self.value['right']} of {self.value['n']}")

    def share(self) -> str:
        """ "11 % (5 to 23 %)", with the chance level or the reading."""
        text = share(self.value)
        if self.chance is not None:
            text += f"; by chance {percent(self.chance)}"
        if self.reading is not None:
            text += f"; read off real media: {percent(self.reading['share'])}"
        return text


def percent(value: float) -> str:
    return f"{100 * value:.0f}\u00a0%"


def share(value: dict[str, Any]) -> str:
    """ "11 % (5 to 23 %)": the interval is the 95 % one."""
    if value["share"] is None:
        return "no samples"
    low, high = value["interval"]
    return f"{percent(value['share'])} ({100 * low:.0f} to {percent(high)})"


def direction(name: str) -> str:
    """ "image_to_text" as "image to text"."""
    return name.replace("_", " ")


def listed(parts: list[str]) -> str:
    """ "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def rows(target: str, found: dict[str, Any]) -> Iterator[Row]:
    """Return the figures of one direction, the simplest first."""
    one, several = THINGS[target]
    if "exact" in found:
        yield Row(f"{{}} {several} exactly right", found["exact"])
    if "retrieval" in found:
        retrieval = found["retrieval"]
        yield Row(f"for {{}} the real {one} is among the five nearest", retrieval["r5"], retrieval["chance_r5"])
        yield Row(f"for {{}} the real {one} is the nearest", retrieval["r1"], retrieval["chance_r1"])
    for name, value in found.get("attributes", {}).items():
        reading = found["reading"][name] if "reading" in found else None
        yield Row(f"{name} right in {{}}", value, reading=reading)


def headline(source: str, target: str, found: dict[str, Any]) -> str:
    """Return the figures of one direction as one or two sentences."""
    several = THINGS[target][1]
    sentences = []
    if "exact" in found:
        value = found["exact"]
        sentences.append(f"{value['right']} of {value['n']} {several} are exactly right.")
    if "retrieval" in found:
        r5, chance = found["retrieval"]["r5"], found["retrieval"]["chance_r5"]
        sentences.append(
            f"For {r5['right']} of {r5['n']} {several} made from {THINGS[source][1]}, the real one is among the five "
            f"nearest (by chance {percent(chance)})."
        )
    return " ".join(sentences)


def gain(value: dict[str, Any]) -> str:
    """ "+0.1694 nats per token (standard error 0.0256, 195 samples)"."""
    error = value["standard_error"]
    spread = "no standard error" if error is None else f"standard error {error:.4f}"
    return f"{value['mean']:+.4f} nats per token ({spread}, {value['samples']} samples)"


def target(one: dict[str, Any]) -> str:
    """Return one target with the result."""
    name, _, aim = one["target"].partition(": ")
    value, aim = one["value"], FIGURES.get(aim, aim)
    if "mean" in value:
        return f"{direction(name)}, {aim}: {gain(value)}"
    attribute = f", least often {value['attribute']}" if "attribute" in value else ""
    reached = f"{value['right']} of {value['n']}, {share(value)}"
    return f"{direction(name)}, {aim}{attribute}: {reached}; aimed at {percent(one['least'])}"


def story(summary: dict[str, Any]) -> list[str]:
    """Return the summary in five sentences."""
    seconds, killed, resumed = summary["seconds"], summary["killed_at_step"], summary["resumed_from_step"]
    training = f" ({seconds['train'] / 60:.1f} of them pretraining)" if "train" in seconds else ""
    return [
        "This machine fetched public data, trained tokenizers, and pretrained one model that reads and generates "
        f"{listed([THINGS[modality][1] for modality in summary['loss']])}.",
        f"It took {seconds['total'] / 60:.1f} minutes{training} at {summary['tokens_per_s']:,.0f} tokens per second, "
        f"and at most {summary['peak_rss_gib']:.1f} GiB of memory.",
        _learnt(summary),
        f"One of the two training processes was killed (SIGKILL) after step {killed}: the run resumed automatically "
        f"from its checkpoint of step {resumed}, repeated {killed - resumed} steps, and lost nothing.",
        "Stock transformers loads the exported model and computes the same logits as megamm within "
        f"{summary['logits_max_abs_diff']:.1e}.",
    ]


def _learnt(summary: dict[str, Any]) -> str:
    """Return what is right for new combinations, the best direction first, and how many targets are reached."""
    found = summary["figures"][NEW]
    exact = {name.partition("_to_")[0]: one["exact"] for name, one in found.items() if one.get("exact", {}).get("n")}
    best_first = sorted(exact, key=lambda source: -exact[source]["share"])
    right = listed([f"{exact[s]['right']} of {exact[s]['n']} {THINGS[s][1]}" for s in best_first])
    reached = sum(one["reached"] for one in summary["targets"])
    return (
        f"On combinations of words that are not in training, it writes the caption exactly right for {right}; "
        f"{reached} of {len(summary['targets'])} targets are reached."
    )
