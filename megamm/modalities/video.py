"""Videos: mp4, webm, mkv or mov bytes <-> uint8 `[F, Y, X, 3]` (sRGB) <-> token ids `[T]` of the visual codec.

Frames are sampled by time at the codec's frame_rate, starting with the first, and limited to F = 1 + n *
frames_per_step, at most max_frames. Each becomes a square as an image does: aspect kept, rotation applied, padded with
white. Ids are in the order of time, rows and columns over the latent frames.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from megamm.common.sample import IntArray
from megamm.media.video_file import FrameArray, digest_of_frames, video_frames, write_mp4
from megamm.modalities.protocol import CPU
from megamm.tokenizers.load import load_visual_codec
from megamm.tokenizers.visual.model import VisualCodec, batches_of_one_length


class VideoModality:
    """The video modality; build it with `VideoModality.load(folder)`."""

    name: ClassVar[str] = "video"
    tokenizer_name: ClassVar[str] = "visual"
    extensions: ClassVar[tuple[str, ...]] = ("mp4", "webm", "mkv", "mov")

    def __init__(self, codec: VisualCodec, codec_id: str, device: torch.device) -> None:
        self.codec = codec.to(device).eval()
        self.codec_id = codec_id
        self.device = device
        self.vocabulary_size = codec.codebook_size
        self.tokens_per_item: int | None = None
        self.stride = codec.grid_size**2

    @classmethod
    def load(cls, codec: Path, device: torch.device = CPU) -> "VideoModality":
        """Load a visual codec folder onto a device. Raises UserError if it is not one."""
        module, codec_id = load_visual_codec(codec)
        return cls(module, codec_id, device)

    @staticmethod
    def check_media(data: bytes, extension: str) -> str:
        """Decode every frame; digest of all. Raises UnreadableMedia if broken, truncated, too large or misnamed."""
        return digest_of_frames(data, extension)

    def read_media(self, data: bytes, extension: str) -> FrameArray:
        """Video bytes to uint8 `[F, Y, X, 3]`, Y = X = the codec's image_size; decodes no more than necessary."""
        return video_frames(data, extension, self.codec)

    def write_media(self, media: FrameArray) -> bytes:
        """uint8 `[F, Y, X, 3]` to mp4 at the codec's frame rate (lossy)."""
        return write_mp4(media, self.codec.frame_rate)

    def encode(self, media: Sequence[FrameArray]) -> list[IntArray]:
        """Videos `[F, Y, X, 3]` to ids `[T]` each, on the codec's device; videos of one length form a batch."""
        # Results come in order of length and are returned in the order of `media`.
        ids: dict[int, IntArray] = {}
        for numbers in batches_of_one_length([len(frames) for frames in media]):
            videos_BFYX3 = torch.from_numpy(np.stack([media[i] for i in numbers])).to(self.device)
            ids |= zip(numbers, self.codec.encode(videos_BFYX3).cpu().numpy(), strict=True)
        return [ids[i] for i in range(len(media))]

    def decode(self, ids: IntArray) -> FrameArray:
        """Ids `[T]` to uint8 `[F, Y, X, 3]`. Raises ValueError for incomplete frames or an id out of range."""
        videos_BFYX3 = self.codec.decode(torch.from_numpy(np.asarray(ids, dtype=np.int64))[None].to(self.device))
        return videos_BFYX3[0].cpu().numpy()

    def positions(self, length: int) -> IntArray:
        """`[3, length]`: t is the latent frame, (h, w) row-major over its grid."""
        t, cell = np.divmod(np.arange(length, dtype=np.int64), self.stride)
        return np.stack([t, *np.divmod(cell, self.codec.grid_size)])

    def valid_token_ids(self, index: int) -> range:
        """All ids, at every index."""
        return range(self.vocabulary_size)
