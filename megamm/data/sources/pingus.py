"""Animated sprites with captions, from the game Pingus: penguins at work, traps, liquids.

In: the unpacked Debian package `pingus-data`, whose .sprite files define how a picture is cut into frames. Out: VP9
videos (see `sprites`) with captions from this file, since the game's sprite names are for programmers ("drownfall").
Sprites with identical left and right pictures count once, without a direction.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megamm.common.errors import UserError
from megamm.data.raw.nouns import normalise_noun
from megamm.data.raw.samples import RawPart, RawSample
from megamm.data.sources.sprites import write_animation

if TYPE_CHECKING:
    from PIL.Image import Image

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


def cut_frames(file: Path, text: str, root: Path) -> Iterator["Image"]:
    """The frames of a sprite, RGBA: a grid `(array COLUMNS ROWS)` of cells `(size W H)` from `(position X Y)` on."""
    from PIL import Image

    picture = re.search(r'\(image "([^"]+)"\)', text)
    columns, rows = _pair(text, "array", (1, 1))
    assert picture, f"{file} names no picture"
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
    found = re.search(rf"\({field} (\d+) (\d+)\)", text)
    return (int(found[1]), int(found[2])) if found else default
