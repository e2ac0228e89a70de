"""3D: clouds (npz, ply) and meshes (glb, obj, ply, stl) <-> float32 `[N, 9]` <-> token ids `[T]`.

A cloud is xyz, unit normal and RGB in [0, 1] (media/point_clouds.py), read with the centre of its bounding box at the
origin and its longest side 2, always the same points of the same file (media/points_file.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from megamm.common.sample import IntArray
from megamm.media.point_clouds import CloudArray
from megamm.media.points_file import POINTS_EXTENSIONS, digest_of_points, read_points, write_cloud
from megamm.modalities.protocol import CPU
from megamm.tokenizers.load import load_codec
from megamm.tokenizers.points.model import KIND, PointsCodec, quantile_of_patch


class PointsModality:
    """The points modality; build it with `PointsModality.load(folder)`."""

    name: ClassVar[str] = "points"
    tokenizer_name: ClassVar[str] = "points"
    extensions: ClassVar[tuple[str, ...]] = POINTS_EXTENSIONS

    def __init__(self, codec: PointsCodec, codec_id: str, device: torch.device) -> None:
        self.codec = codec.to(device).eval()
        self.codec_id = codec_id
        self.device = device
        self.vocabulary_size = codec.config.vocabulary_size
        self.tokens_per_item: int | None = codec.tokens
        self.stride = codec.tokens

    @classmethod
    def load(cls, codec: Path, device: torch.device = CPU) -> "PointsModality":
        """Load a points codec folder onto a device. Raises UserError if it is not one."""
        module, codec_id = load_codec(codec, {KIND: PointsCodec}, "points")
        return cls(module, codec_id, device)

    @staticmethod
    def check_media(data: bytes, extension: str) -> str:
        """Digest of the cloud, or of points of the mesh with a fixed seed. Raises UnreadableMedia if unusable."""
        return digest_of_points(data, extension)

    def read_media(self, data: bytes, extension: str) -> CloudArray:
        """Media bytes to a normalised cloud of the codec's N points, `[N, 9]`."""
        return read_points(data, extension, self.codec.points)[0]

    def write_media(self, media: CloudArray) -> bytes:
        """Cloud `[N, 9]` to npz bytes."""
        return write_cloud(media)

    def encode(self, media: Sequence[CloudArray]) -> list[IntArray]:
        """Clouds `[N, 9]` to ids `[T]` each, on the codec's device."""
        if not media:
            return []
        return list(self.codec.encode(torch.from_numpy(np.stack(media)).to(self.device)).cpu().numpy())

    def decode(self, ids: IntArray) -> CloudArray:
        """Ids `[T]` to a cloud `[N, 9]`. Raises ValueError if T is not the codec's or an id is invalid at its index."""
        clouds = self.codec.decode(torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64))[None].to(self.device))
        return clouds[0].cpu().numpy()

    def positions(self, length: int) -> IntArray:
        """`[3, length]`: t counts the tokens; (h, w) are the quantiles of height and width of the patch."""
        # A patch has two tokens, cell and shape, with the same height and width.
        height, width, _ = quantile_of_patch(self.codec.config.patches)[:, np.arange(length) // 2]
        return np.stack([np.arange(length), height, width])

    def valid_token_ids(self, index: int) -> range:
        """Cells at even indices, shapes at odd ones."""
        return self.codec.valid_token_ids(index)
