"""The demo's inputs for its model: held-out samples of every two modalities, and what is generated from each part.

OUT/heldout/<rule>/<a>-<b>/000.<a>.<ext>, 000.<b>.<ext>, ...   both parts of samples held out by a rule
OUT/generated/<a>_to_<b>/000.<ext>, ...       made from the first parts alone, of new combinations (build/heldout.py)
OUT/generated/nouns/<a>_to_<b>/000.<ext>, ... the same for unseen nouns
OUT/requests-*.jsonl                          the input of `megamm generate --requests`
"""

import json
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from megamm.evaluation.losses import heldout_rules
from megamm.modalities import REGISTRY
from megamm.shards.folder import ShardFolder

PAIRS = (("text", "image"), ("text", "audio"), ("text", "points"), ("image", "points"), ("text", "video"))
"""Pairs of modalities that are tried in both directions."""
SHOWN = 4
"""Number of samples of each pair in the report."""
REQUESTS = ("audio-video", "image-points", "text")
"""Files of requests, by the modalities that they make; each is one process, the longest first."""
ASKED = {"combination": {"text": 96, "other": 48}, "noun": {"text": 24, "other": 24}}
"""Maximum samples of each direction, by rule: into text, which takes few tokens, and into media."""
FOLDERS = {"combination": ".", "noun": "nouns"}
"""Folder below OUT/generated."""
OPTIONS = {
    "text": ("--temperature", "0", "--max-tokens", "24"),
    "media": ("--temperature", "0.4"),
}
"""Captions are the most likely words; media are sampled with little noise."""


@dataclass(frozen=True)
class Member:
    """One part of a held-out sample: its bytes and extension."""

    data: bytes
    extension: str


def choose(sources: list[Path], rule: str, a: str, b: str, count: int) -> list[tuple[Member, Member]]:
    """Return parts a and b of at most `count` samples held out by this rule, of all sources in turn."""
    found = [_members(source, rule, a, b) for source in sources]
    in_turn = [pair for pair in chain.from_iterable(zip_longest(*found)) if pair is not None]
    return in_turn[:count]


def _members(source: Path, rule: str, a: str, b: str) -> list[tuple[Member, Member]]:
    """Return parts a and b of one source's samples that have both, one of each caption, in the order of a hash."""
    split = source / "heldout"
    if not ((split / a).is_dir() and (split / b).is_dir()):
        return []
    rules, texts = heldout_rules(source), ShardFolder(split / "text")
    first, second = ShardFolder(split / a), ShardFolder(split / b)
    number = {key: j for j, key in enumerate(second.keys)}
    caption = {key: texts.read(k) for k, key in enumerate(texts.keys)}
    chosen: dict[bytes, tuple[int, int]] = {}
    for i, key in enumerate(first.keys):
        if key in number and rules.get(key) == rule:
            chosen.setdefault(caption[key], (i, number[key]))
    return [
        (Member(first.read(i), first.extensions[i]), Member(second.read(j), second.extensions[j]))
        for i, j in chosen.values()
    ]


def write_heldout(sources: list[Path], out: Path) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Write OUT/heldout; return its files below OUT: {rule: {"text-image": [{"text": path, "image": path}, ...]}}."""
    named: dict[str, dict[str, list[dict[str, str]]]] = {}
    for rule, counts in ASKED.items():
        named[rule] = {}
        for a, b in PAIRS:
            folder = out / "heldout" / rule / f"{a}-{b}"
            folder.mkdir(parents=True)
            files = []
            for i, members in enumerate(choose(sources, rule, a, b, max(counts.values()))):
                names = {}
                for name, member in zip((a, b), members, strict=True):
                    file = folder / f"{i:03d}.{name}.{member.extension}"
                    file.write_bytes(member.data)
                    names[name] = str(file.relative_to(out))
                files.append(names)
            named[rule][f"{a}-{b}"] = files
    return named


def directions() -> list[tuple[str, str, str]]:
    """Return (name of the pair, source, target) of both directions of every pair."""
    return [(f"{a}-{b}", x, y) for a, b in PAIRS for x, y in ((a, b), (b, a))]


def made_file(rule: str, source: str, target: str, number: int) -> str:
    """Return the path below OUT of item `number` of a direction."""
    folder = Path("generated") / FOLDERS[rule] / f"{source}_to_{target}"
    return str(folder / f"{number:03d}.{REGISTRY[target].extensions[0]}")


def asked(rule: str, target: str) -> int:
    """Return the maximum number of samples of a direction."""
    return ASKED[rule]["text" if target == "text" else "other"]


def write_requests(export: Path, out: Path, named: dict[str, Any], seed: int) -> tuple[tuple[str, ...], ...]:
    """Write OUT/requests-*.jsonl and return the `megamm generate` commands for them, the longest first."""
    lines: dict[str, list[str]] = {name: [] for name in REQUESTS}
    for rule, pairs in named.items():
        for pair, source, target in directions():
            file = next(name for name in lines if target in name)
            for i, names in enumerate(pairs[pair][: asked(rule, target)]):
                given = {"prompt": (out / names["text"]).read_text()} if source == "text" else {"from": names[source]}
                request = given | {"to": target, "out": made_file(rule, source, target, i)}
                lines[file].append(json.dumps(request, ensure_ascii=False) + "\n")
    commands = []
    for name, requests in lines.items():
        path = out / f"requests-{name}.jsonl"
        path.write_text("".join(requests), encoding="utf-8")
        options = OPTIONS["text" if name == "text" else "media"]
        commands.append(("generate", str(export), "--requests", str(path), "--seed", str(seed), *options))
    return tuple(commands)
