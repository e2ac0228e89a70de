"""Figures of the demo: shares of correct samples, each with the number of samples and a 95 % interval.

In: OUT/heldout and OUT/generated (demo_samples.py), the shards and the export's codecs. Out, for each direction:
- `exact`: share of the texts that are exactly the real one.
- `attributes`: share of samples whose attribute is right. A text's are its parts between commas, or the words of a
  sequence without commas; a medium's are those of its nearest real medium, of all of the same sources, training and
  held out. `reading`: the same for the real held-out media, encoded and decoded by the codec: how reliable the nearest
  real medium is.
- `retrieval`: share of the generated media whose own real medium is the nearest (`r1`), or among the five nearest
  (`r5`), of the real media of all prompts; `chance_r1`, `chance_r5`.
Nearest means the smallest distance of the features below. Intervals: Wilson 1927.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_samples import asked, directions, made_file

from megamm.common.errors import UnreadableMedia
from megamm.data.pipeline.run_data import load_modalities
from megamm.modalities.protocol import Modality
from megamm.shards.folder import ShardFolder
from megamm.tokenizers.points.model import halve

GENDERS, COLOURS = ("man", "woman"), ("red", "green", "blue", "yellow")
Z = 1.959964
"""Quantile of the normal distribution: 95 % are within."""
_PATCHES, _SPECTRA, _FRAMES = 64, 24, 9


def attributes(caption: str) -> dict[str, str]:
    """Return name -> value of each attribute in a caption of the demo's sources, in order."""
    parts = [part.strip() for part in caption.split(",")]
    if len(parts) == 1:
        return {f"word {i}": word for i, word in enumerate(caption.split(), start=1)}
    return {_name(part): part for part in parts}


def _name(part: str) -> str:
    """Return the kind of attribute of a part of a caption."""
    words = part.split()
    if words[-1:] == ["skin"]:
        return "skin"
    if words[:1] == ["turning"]:
        return "direction"
    for name, values in (("gender", GENDERS), ("colour", COLOURS)):
        if part in values:
            return name
    return "subject"


def share(right: Sequence[bool]) -> dict[str, Any]:
    """Return the count, the total, the share and its Wilson interval."""
    n, hits = len(right), sum(right)
    if n == 0:
        return {"n": 0, "right": 0, "share": None, "interval": None}
    p = hits / n
    middle, width = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    interval = [(middle - width) / (1 + Z**2 / n), (middle + width) / (1 + Z**2 / n)]
    return {"n": n, "right": hits, "share": p, "interval": [max(0.0, interval[0]), min(1.0, interval[1])]}


def of_attributes(real: Sequence[str], read: Sequence[str]) -> dict[str, Any]:
    """Return, for each attribute of the real captions, the share that the captions `read` have, too."""
    right: dict[str, list[bool]] = {}
    for wanted, found in zip(real, read, strict=True):
        values = attributes(found)
        for name, value in attributes(wanted).items():
            right.setdefault(name, []).append(values.get(name) == value)
    return {name: share(values) for name, values in right.items()}


def feature(modality: Modality, medium: Any) -> np.ndarray:
    """A vector of a medium, float32: pixels at half the size, of an image or of frames, log-mel spectra over the
    clip's length, or means of patches of points."""
    if modality.name == "image":
        return _halved(medium[None])
    if modality.name == "video":
        return _halved(medium[np.linspace(0, len(medium) - 1, _FRAMES).round().astype(int)])
    if modality.name == "points":
        patches = halve(torch.from_numpy(np.ascontiguousarray(medium))[None], _PATCHES)[0].mean(1)
        return torch.cat([patches[:, :3], 0.5 * patches[:, 6:]], dim=1).flatten().numpy()
    assert modality.name == "audio", modality.name
    codec: Any = modality
    mel = codec.codec.mel(codec.codec.padded(torch.from_numpy(np.ascontiguousarray(medium)))[None])
    return torch.nn.functional.interpolate(mel, _SPECTRA, mode="linear", align_corners=True)[0].flatten().numpy()


def _halved(frames: np.ndarray) -> np.ndarray:
    """Map uint8 `[F, Y, X, 3]`, Y and X even, to a vector of the means of 2 x 2 pixels, in [0, 1]."""
    count, height, width, _ = frames.shape
    blocks = frames.reshape(count, height // 2, 2, width // 2, 2, 3).astype(np.float32)
    return blocks.mean((2, 4)).ravel() / 255


class RealMedia:
    """All real media of a modality that have a caption, of both splits: their features and captions."""

    def __init__(self, modality: Modality, sources: list[Path]) -> None:
        self.modality = modality
        self.captions: list[str] = []
        files: list[tuple[bytes, str]] = []
        for folder in (source / split for source in sources for split in ("train", "heldout")):
            if not (folder / modality.name).is_dir():
                continue
            shards, texts = ShardFolder(folder / modality.name), ShardFolder(folder / "text")
            number = {key: i for i, key in enumerate(texts.keys)}
            for i, key in enumerate(shards.keys):
                files.append((shards.read(i), shards.extensions[i]))
                self.captions.append(texts.read(number[key]).decode())
        with ThreadPoolExecutor() as threads:  # decoding releases the interpreter lock
            self.features = np.stack(list(threads.map(self._feature, files)))
        self.squares = np.square(self.features).sum(1)

    def _feature(self, file: tuple[bytes, str]) -> np.ndarray:
        return feature(self.modality, self.modality.read_media(*file))

    def read(self, medium: Any) -> str:
        """Return the caption of the real medium nearest to this one."""
        distance = self.squares - 2 * self.features @ feature(self.modality, medium)  # and a constant
        return self.captions[int(distance.argmin())]


def retrieval(modality: Modality, made: Sequence[Any], real: Sequence[Any]) -> dict[str, Any]:
    """Count made media whose prompt's own real medium is the nearest, or among the five nearest, of all prompts'."""
    features = np.stack([feature(modality, medium) for medium in real])
    ranks = []
    for i, medium in enumerate(made):
        if medium is None:
            ranks.append(len(real))
            continue
        distance = np.square(features - feature(modality, medium)).sum(1)
        ranks.append(int((distance < distance[i]).sum()))
    n = len(real)
    chances = {"chance_r1": 1 / n, "chance_r5": min(1.0, 5 / n)}
    return {"r1": share([r < 1 for r in ranks]), "r5": share([r < 5 for r in ranks]), **chances}


def figures(out: Path, sources: list[Path], named: dict[str, Any]) -> dict[str, Any]:
    """Return {rule: {direction: figures}} of OUT/generated; named: as returned by demo_samples.write_heldout."""
    torch.set_num_threads(1)  # many small tensors; each core already runs a thread
    folders = {folder.name: folder for folder in (out / "export" / "codecs").iterdir()}
    modalities = load_modalities(folders, torch.device("cpu"))
    galleries: dict[str, RealMedia] = {}
    result: dict[str, Any] = {}
    for rule, pairs in named.items():
        result[rule] = {}
        for pair, source, target in directions():
            samples = pairs[pair][: asked(rule, target)]
            if not samples:
                continue
            files = [out / made_file(rule, source, target, i) for i in range(len(samples))]
            if target == "text":
                result[rule][f"{source}_to_text"] = _of_texts(out, samples, files)
                continue
            if target not in galleries:
                galleries[target] = RealMedia(modalities[target], sources)
            made = _of_media(out, samples, files, modalities[target], galleries[target])
            result[rule][f"{source}_to_{target}"] = made
    return result


def _of_texts(out: Path, samples: list[dict[str, str]], files: list[Path]) -> dict[str, Any]:
    real = [(out / names["text"]).read_text(encoding="utf-8").strip() for names in samples]
    made = [file.read_text(encoding="utf-8").strip() for file in files]
    exact = share([m == r for m, r in zip(made, real, strict=True)])
    return {"exact": exact, "attributes": of_attributes(real, made)}


def _of_media(
    out: Path, samples: list[dict[str, str]], files: list[Path], modality: Modality, gallery: RealMedia
) -> dict[str, Any]:
    real = [_read(modality, out / names[modality.name]) for names in samples]
    made = [_read(modality, file) for file in files]
    result = {"retrieval": retrieval(modality, made, real)}
    if all("text" in names for names in samples):
        captions = [(out / names["text"]).read_text(encoding="utf-8").strip() for names in samples]
        rebuilt = [modality.decode(ids) for ids in modality.encode(real)]
        read = ["" if medium is None else gallery.read(medium) for medium in made]
        result["attributes"] = of_attributes(captions, read)
        result["reading"] = of_attributes(captions, [gallery.read(medium) for medium in rebuilt])
    return result


def _read(modality: Modality, file: Path) -> Any:
    """Return a file's medium; None if it cannot be used, as a model may generate silence."""
    try:
        return modality.read_media(file.read_bytes(), file.suffix[1:])
    except UnreadableMedia:
        return None
