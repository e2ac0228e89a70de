"""Animated sprites of games as short videos with captions, and described pictures: Pingus and Battle for Wesnoth.

In: the unpacked Debian packages `pingus-data`, whose .sprite files define how a picture is cut into frames, and
`wesnoth-1.16-data`, where data/core/units/*.cfg name the figures, describe them and name their picture, and the
animations are numbered files beside it: `spearman-attack-s-1.png`.

Out: VP9 videos, square, on white instead of transparency, enlarged by whole factors. Small pixel art is enlarged
without smoothing so that VP9's halved colour resolution does not smear it. The captions of Pingus (penguins at work,
traps, liquids) are from this file, since the game's sprite names are for programmers ("drownfall"). Of Wesnoth, each
figure is a sample with picture and text, and each animation of four frames or more a video, such as "spearman: attack,
facing south". All samples of a figure share its noun. The magenta that the game replaces by a player's colour is kept.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from megamm.common.errors import UserError
from megamm.data.raw.samples import RawPart, RawSample, clean_caption, fit_key, normalise_noun
from megamm.data.sources.media import write_picture, write_video

SIDE = 128
"""Approximate size in pixels to which a small sprite is enlarged."""
SECONDS = 2
"""Length of a looped animation, by repetition; one that does not loop shows its last frame for the rest."""


def write_animation(path: Path, frames: Sequence[Image.Image], frame_ms: int, *, loops: bool) -> None:
    """Write frames of one size, each shown frame_ms milliseconds, as a VP9 video."""
    pixels = np.stack([on_white(frame) for frame in frames])
    wanted = -(-1000 * SECONDS // frame_ms)
    # A loop is repeated up to SECONDS; another animation holds its last frame.
    numbers = np.arange(max(wanted, len(frames)))
    pixels = pixels[numbers % len(frames) if loops else numbers.clip(max=len(frames) - 1)]
    write_video(path, pixels, Fraction(1000, frame_ms))


def on_white(frame: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 [S, S, 3]: the picture centred on a white square of even side, enlarged to nearly SIDE if smaller."""
    side = max(frame.size)
    # Whole factors: every pixel of the art becomes a square of equal size.
    factor = max(1, SIDE // side)
    side = -(-side * factor // 2) * 2
    enlarged = frame.convert("RGBA").resize((frame.width * factor, frame.height * factor), Image.Resampling.NEAREST)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(enlarged, ((side - enlarged.width) // 2, (side - enlarged.height) // 2))
    return np.asarray(square.convert("RGB"))


# Pingus
_CAPTIONS = {
    "core/buttons/armageddon_anim": "a nuclear explosion",
    "core/cursors/animcross2": "a turning cross",
    "core/worldmap/pingus": "a small penguin walking",
    "entrances/entrance_eyes_anim": "a pair of eyes opening",
    "entrances/space": "a blinking space station entrance",
    "entrances/woodthing_mov": "a wooden lid opening",
    "exits/sortie_anim": "a teddy bear under an exit sign",
    "exits/space": "a space station exit with a blinking light",
    "hotspots/space/engine": "a burning rocket engine",
    "liquids/lava": "flowing lava",
    "liquids/slime": "bubbling green slime",
    "liquids/swater": "calm water",
    "liquids/water": "waves of blue water",
    "liquids/water2": "waves on the water",
    "liquids/water3": "flowing water",
    "liquids/water4": "moving water",
    "liquids/water5": "rippling water",
    "other/laser_kill": "a penguin being hit by a laser",
    "other/splash": "a splash",
    "other/splash_debris": "splashing debris",
    "particles/ground": "a cloud of dust",
    "particles/smoke": "a puff of smoke",
    "particles/smoke2": "grey smoke",
    "pingus/player0/angel": "a penguin angel flying",
    "pingus/player0/basher": "a penguin breaking through a wall",
    "pingus/player0/blocker": "a penguin blocking the way with raised arms",
    "pingus/player0/bomber": "a penguin exploding",
    "pingus/player0/bridger": "a penguin building a bridge",
    "pingus/player0/bridger_walk": "a penguin carrying a brick",
    "pingus/player0/climber": "a penguin climbing",
    "pingus/player0/digger": "a penguin with a helmet digging down",
    "pingus/player0/drownfall": "a penguin falling into water and drowning",
    "pingus/player0/drownwalk": "a penguin walking into water and drowning",
    "pingus/player0/exit": "a penguin going away through a door",
    "pingus/player0/faller": "a penguin falling",
    "pingus/player0/floater": "a penguin floating with a propeller hat",
    "pingus/player0/miner": "a penguin mining with a pickaxe",
    "pingus/player0/rocketlauncher": "a penguin with a rocket on its back",
    "pingus/player0/splat": "a penguin hitting the ground",
    "pingus/player0/superman": "a penguin with a red cape flying",
    "pingus/player0/tumbler": "a penguin tumbling through the air",
    "pingus/player0/waiter": "a penguin waiting",
    "pingus/player0/walker": "a penguin walking",
    "textures/anim_fire": "a burning fire",
    "traps/bumper": "a bumper pushing up",
    "traps/fake_exit": "a false exit with a falling stamp",
    "traps/guillotineidle": "a guillotine with a swinging flag",
    "traps/guillotinekill": "a guillotine catching a penguin",
    "traps/hammer": "a hammer striking down",
    "traps/laser_exit": "a stone exit with a red laser",
    "traps/smasher": "a stone press smashing down",
    "traps/spike": "spikes coming out of the ground",
    "worldobjs/conveyorbelt_left": "the left end of a conveyor belt running",
    "worldobjs/conveyorbelt_middle": "a conveyor belt running",
    "worldobjs/conveyorbelt_right": "the right end of a conveyor belt running",
    "worldobjs/iceblock": "a melting block of ice",
    "worldobjs/teleporter": "a blue teleporter spinning",
    "worldobjs/teleportertarget": "a blue flash of light",
    "XMas/walker": "a penguin with a Christmas hat walking",
}
_DIRECTIONS = {"left": " to the left", "right": " to the right"}
_DEFAULT_MS = 60


def write_pingus(package: Path, target: Path) -> list[RawSample]:
    """Write the animations under target/video and return them with their captions, in order of paths."""
    images = package / "usr/share/games/pingus/data/images"
    files = sorted(images.rglob("*.sprite"))
    if not files:
        raise UserError("no .sprite files in the package", where=images, remedy="use Debian 12")
    (target / "video").mkdir()
    samples = []
    for file in files:
        name = file.relative_to(images).with_suffix("")
        has_side = name.name in _DIRECTIONS
        caption = _CAPTIONS.get(str(name.parent if has_side else name))
        if caption is None:
            continue
        text = file.read_text(encoding="utf-8")
        frames = list(cut_frames(file, text, images.parent))
        if has_side:
            other = file.with_stem("right" if name.name == "left" else "left")
            # Symmetric figures have the same picture for both directions: one sample, and no direction in the caption.
            same = frames == list(cut_frames(other, other.read_text(encoding="utf-8"), images.parent))
            if same and name.name == "right":
                continue
            caption += "" if same else _DIRECTIONS[name.name]
        key = "pingus-" + "-".join(name.parts)
        speed = re.search(r"\(speed (\d+)\)", text)
        frame_ms = int(speed[1]) if speed else _DEFAULT_MS
        write_animation(target / f"video/{key}.mp4", frames, frame_ms, loops="(loop #t)" in text)
        parts = (RawPart("video", f"video/{key}.mp4"), RawPart("text", caption))
        samples.append(RawSample(key, normalise_noun(caption), parts))
    return samples


def cut_frames(file: Path, text: str, root: Path) -> Iterator[Image.Image]:
    """The frames of a sprite, RGBA: a grid `(array COLUMNS ROWS)` of cells `(size W H)` from `(position X Y)` on."""
    picture = re.search(r'\(image "([^"]+)"\)', text)
    columns, rows = _pair(text, "array", (1, 1))
    assert picture, f"{file} names no picture"
    # A leading slash means the game's data folder, not the file system.
    path = root / picture[1][1:] if picture[1].startswith("/") else file.parent / picture[1]
    with Image.open(path) as image:
        sheet = image.convert("RGBA")
    width, height = _pair(text, "size", (sheet.width // columns, sheet.height // rows))
    left, top = _pair(text, "position", (0, 0))
    for row in range(rows):
        for column in range(columns):
            x, y = left + column * width, top + row * height
            yield sheet.crop((x, y, x + width, y + height))


def _pair(text: str, field: str, default: tuple[int, int]) -> tuple[int, int]:
    """The two numbers of a field `(field A B)` of a sprite file, or the default."""
    found = re.search(rf"\({field} (\d+) (\d+)\)", text)
    return (int(found[1]), int(found[2])) if found else default


# The Battle for Wesnoth
_CORE = "usr/share/games/wesnoth/1.16/data/core"
_LEAST_FRAMES = 4
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
            # A video has one size; such series combine different pictures.
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
        # The longest matching name: `elf-captain-bow-1.png` belongs to `elf-captain`, not to `elf`.
        owner = max((p for p in figures if stem.startswith(f"{p}-")), key=len, default=None)
        if owner is not None and len(frames) >= _LEAST_FRAMES:
            animations[owner].append((stem.rstrip("-"), [path for _, path in sorted(frames)]))
    return animations


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGBA")
