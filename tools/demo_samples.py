"""What the demo shows of its model: held-out samples of every two modalities, and what is generated from each part.

OUT/heldout/<a>-<b>/000.<a>.<ext>, 000.<b>.<ext>, ...   both parts of SHOWN held-out samples
OUT/generated/<a>_to_<b>/000.<ext>, ...                 made from the first parts alone
"""

from pathlib import Path
from typing import Any

from megamm.data.nouns import normalise_noun
from megamm.data.shards import ShardFolder
from megamm.modalities import REGISTRY

PAIRS = (("text", "image"), ("text", "audio"), ("text", "points"), ("image", "points"), ("text", "video"))
"""Whose both directions are shown."""
SHOWN = 4
OPTIONS = {"text": ("--temperature", "0", "--max-tokens", "24")}
"""Captions are the likeliest words. Media are drawn at temperature 1: sharper draws favour empty white."""


def choose(splits: list[Path], a: str, b: str) -> list[tuple[tuple[bytes, str], tuple[bytes, str]]]:
    """(bytes, ending) of parts a and b of SHOWN samples of different nouns, spread evenly over held-out splits."""
    found: dict[str, tuple[ShardFolder, int, ShardFolder, int]] = {}
    for split in splits:
        if not ((split / a).is_dir() and (split / b).is_dir()):
            continue
        first, second = ShardFolder(split / a), ShardFolder(split / b)
        number = {key: i for i, key in enumerate(second.keys) if second.parts[i] < 0}
        texts = ShardFolder(split / "text") if (split / "text").is_dir() else None
        caption = {key: texts.read(i).decode() for i, key in enumerate(texts.keys)} if texts else {}
        for i, key in enumerate(first.keys):
            if key in number:
                noun = normalise_noun(caption[key]) if key in caption else key
                found.setdefault(noun, (first, i, second, number[key]))
    members = list(found.values())
    chosen = members[:: max(1, len(members) // SHOWN)][:SHOWN]
    return [((f.read(i), f.extensions[i]), (s.read(j), s.extensions[j])) for f, i, s, j in chosen]


def write_heldout(shards: list[Path], out: Path) -> dict[str, Any]:
    """Write OUT/heldout and name its files: {"text-image": [{"text": path, "image": path}, ...]}, paths below OUT."""
    details = {}
    for a, b in PAIRS:
        folder = out / "heldout" / f"{a}-{b}"
        folder.mkdir(parents=True)
        files = []
        for i, parts in enumerate(choose([shard / "heldout" for shard in shards], a, b)):
            names = {}
            for name, (data, ending) in zip((a, b), parts, strict=True):
                file = folder / f"{i:03d}.{name}.{ending}"
                file.write_bytes(data)
                names[name] = str(file.relative_to(out))
            files.append(names)
        details[f"{a}-{b}"] = files
    return details


def generation(export: Path, out: Path, shown: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    """The `megamm generate` commands of both directions of every pair."""
    commands = []
    for a, b in PAIRS:
        files = shown[f"{a}-{b}"]
        for source, target in ((a, b), (b, a)):
            given = []
            for names in files:
                file = out / names[source]
                given += ["--prompt", file.read_text()] if source == "text" else ["--from", str(file)]
            made = out / "generated" / f"{source}_to_{target}"
            if len(files) == 1:
                made = made / f"000.{REGISTRY[target].extensions[0]}"
            options = ("--to", target, "--out", str(made), *OPTIONS.get(target, ()))
            commands.append(("generate", str(export), *given, *options))
    return tuple(commands)
