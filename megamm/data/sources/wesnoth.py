"""Figures of the game The Battle for Wesnoth: pictures with a description, and captioned animations.

In: the unpacked Debian package `wesnoth-1.16-data`; data/core/units/*.cfg name the figures, describe them and name
their picture, and the animations are numbered files beside it: `spearman-attack-s-1.png`. Out: a sample per figure,
picture and text, and a VP9 video per animation of four frames or more (see `sprites`), such as "spearman: attack,
facing south". All samples of a figure share its noun. The magenta that the game replaces by a player's colour is kept.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from megamm.common.errors import UserError
from megamm.data.raw.nouns import normalise_noun
from megamm.data.raw.samples import RawPart, RawSample, clean_caption, fit_key
from megamm.data.sources.media import write_picture
from megamm.data.sources.sprites import on_white, write_animation

_CORE = "usr/share/games/wesnoth/1.16/data/core"
_FRAMES = 4
_FRAME_MS = 100
_LEAST_DESCRIPTION = 40
"""Minimum characters; shorter ones are names of weapons."""
_FIELD = r'^[ \t]*{}[ \t]*=[ \t]*_?[ \t]*"([^"]*)"'
_FACING = {"n": "north", "ne": "north-east", "e": "east", "se": "south-east", "s": "south", "sw": "south-west"} | {
    "w": "west",
    "nw": "north-west",
}
_WORDS = {"defend": "defence", "die": "death", "dying": "death", "stand": "standing", "fly": "flying", "idle": "idling"}


@dataclass(frozen=True)
class Figure:
    """A unit's name, description and picture (path below images/, without extension)."""

    name: str
    description: str
    picture: str


def write_wesnoth(package: Path, target: Path) -> list[RawSample]:
    """Write pictures and videos under target and return the samples, in order of figures."""
    core = package / _CORE
    files = sorted((core / "units").rglob("*.cfg"))
    figures = {figure.picture: figure for file in files if (figure := read_figure(file.read_text(encoding="utf-8")))}
    if not figures:
        raise UserError("no figures in the package", where=core, remedy="use Debian 12")
    for folder in ("images", "video"):
        (target / folder).mkdir()
    animations = _animations(core / "images", figures)
    samples = []
    for figure in sorted(figures.values(), key=lambda figure: figure.picture):
        noun = normalise_noun(figure.name)
        path = core / "images" / f"{figure.picture}.png"
        if path.is_file() and figure.description:
            key = fit_key("wesnoth-" + figure.picture.removeprefix("units/"))
            write_picture(target / f"images/{key}.png", on_white(_open(path)))
            text = f"{figure.name}. {figure.description}"
            samples.append(RawSample(key, noun, (RawPart("image", f"images/{key}.png"), RawPart("text", text))))
        for stem, frames in animations[figure.picture]:
            key = fit_key("wesnoth-" + stem.removeprefix("units/") + "-video")
            caption = action_caption(figure.name, stem.removeprefix(figure.picture))
            pictures = [_open(frame) for frame in frames]
            if len({picture.size for picture in pictures}) > 1:
                continue
            write_animation(target / f"video/{key}.mp4", pictures, _FRAME_MS, loops=True)
            samples.append(RawSample(key, noun, (RawPart("video", f"video/{key}.mp4"), RawPart("text", caption))))
    return samples


def read_figure(text: str) -> Figure | None:
    """The unit that a configuration file describes; None without a name or a plain picture."""
    name, description, image = (
        re.search(_FIELD.format(field), text, re.M) for field in ("name", "description", "image")
    )
    if not name or not image or not re.fullmatch(r"units/[\w/+-]+\.png", image[1]):
        return None
    words = clean_caption(description[1]) if description else ""
    return Figure(clean_caption(name[1]), words if len(words) >= _LEAST_DESCRIPTION else "", image[1][:-4])


def action_caption(name: str, action: str) -> str:
    """Figure and the words of a file's name, such as "-bow-attack-ne-": "Archer: bow attack, facing north-east"."""
    words = [word for word in re.split(r"[-_\d\[\]]+", action) if word]
    facing = [_FACING[word] for word in words if word in _FACING]
    actions = [_WORDS.get(word, word) for word in words if word not in _FACING]
    return f"{name}: {' '.join(actions) or 'moving'}" + (f", facing {facing[0]}" if facing else "")


def _animations(images: Path, figures: dict[str, Figure]) -> dict[str, list[tuple[str, list[Path]]]]:
    """Picture of a figure -> (common start of the files' names, files in order) of its animations."""
    series: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    for path in sorted((images / "units").rglob("*.png")):
        if match := re.fullmatch(r"(.*\D)(\d+)", path.relative_to(images).with_suffix("").as_posix()):
            series[match[1]].append((int(match[2]), path))
    animations: dict[str, list[tuple[str, list[Path]]]] = defaultdict(list)
    for stem, frames in sorted(series.items()):
        owner = max((p for p in figures if stem.startswith(f"{p}-")), key=len, default=None)
        if owner is not None and len(frames) >= _FRAMES:
            animations[owner].append((stem.rstrip("-"), [path for _, path in sorted(frames)]))
    return animations


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGBA")
