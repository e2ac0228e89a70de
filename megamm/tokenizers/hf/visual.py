"""Adapters for transformers' pretrained image codecs: uint8 `[B, F, Y, X, 3]` <-> ids `[B, T]`, like our own codecs.

Emu3 (Wang et al. 2024), Chameleon (2024) and Janus (Wu et al. 2024) are VQGANs with one code per cell of a square
grid, row by row. All were trained on pixels in [-1, 1] (mean and standard deviation 0.5), so they get these.
An image is F = 1; a video F = 1 + n * frames_per_step, and T = (1 + n) * grid_size^2 in the order of time, rows,
columns. Chameleon and Janus see one frame at a time. Emu3 sees `temporal_downsample_factor` frames, and an image
repeated that many times. So a video is its first frame as an image, then clips of that many frames, each coded
separately, as in Emu3's example for videos (autoencode.py). So ids never depend on later frames, nor on the batch.
"""

import logging
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megamm.common.errors import UserError
from megamm.tokenizers.io import CodecConfig
from megamm.tokenizers.visual.model import check_ids, to_frames, to_pixels

logger = logging.getLogger(__name__)

EMU3_IMAGE_SIZE = 512
"""Pixels. Emu3 takes any size and its config has none; add `resolution` to config.json for another size."""
LATENT_FRAME_RATE = 2.0
"""Latent frames per second of a video. Each costs 576 tokens (Janus) to 4,096 tokens (Emu3)."""
MAX_LATENT_FRAMES = 5
CLIPS_AT_ONCE = 8
"""More would take gigabytes: one layer has 256 channels at full resolution."""


class HFVisualConfig(CodecConfig):
    """Properties of a codec that are known without its weights; `kind` is transformers' model_type. Our units."""

    codebook_size: int
    image_size: int
    grid_size: int
    frames_per_step: int
    frame_rate: float
    max_frames: int


class HFVisualCodec(nn.Module):
    """A visual codec around a transformers model; subclasses implement the model's calls."""

    model_class: ClassVar[str]
    """Name of the model in transformers."""

    def __init__(self, model: Any, config: HFVisualConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.codebook_size, self.grid_size = config.codebook_size, config.grid_size
        self.image_size, self.frames_per_step = config.image_size, config.frames_per_step
        self.frame_rate, self.max_frames = config.frame_rate, config.max_frames

    @classmethod
    def sizes(cls, config: Any) -> HFVisualConfig:
        """Sizes from the model's own config. Raises ValueError if the adapter does not support such a model."""
        raise NotImplementedError

    def to_codes(self, clips: Tensor) -> Tensor:
        """Pixels in [-1, 1] `[N, frames_per_step, 3, Y, X]` to N * grid_size^2 codes, in any shape."""
        raise NotImplementedError

    def to_clips(self, codes: Tensor) -> Tensor:
        """Codes `[N, grid_size, grid_size]` to pixels `[N, frames_per_step, 3, Y, X]`."""
        raise NotImplementedError

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 `[B, F, Y, X, 3]` to ids `[B, T]`, int64. Raises ValueError for an unsupported F or size."""
        batch, count, rows, columns, _ = frames.shape
        step, size = self.frames_per_step, self.image_size
        if not count or (count - 1) % step or rows != size or columns != size:
            raise ValueError(f"frames {list(frames.shape)} are not 1 + n * {step} of {size} x {size}")
        # The first frame is coded as an image: repeated to a whole clip, as Emu3 does with images.
        first = frames[:, :1].expand(-1, step, -1, -1, -1)
        clips = torch.cat([first, frames[:, 1:]], 1).unflatten(1, (-1, step)).flatten(0, 1)
        pixels = (to_pixels(part).permute(0, 1, 4, 2, 3) for part in clips.split(CLIPS_AT_ONCE))
        return torch.cat([self.to_codes(part).flatten() for part in pixels]).view(batch, -1)

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        """Ids `[B, T]` to uint8 `[B, F, Y, X, 3]`. Raises ValueError for incomplete frames or an id out of range."""
        grid = self.grid_size
        check_ids(ids, grid, self.codebook_size)
        codes = ids.reshape(-1, grid, grid).split(CLIPS_AT_ONCE)
        clips = torch.cat([to_frames(self.to_clips(part)).permute(0, 1, 3, 4, 2) for part in codes]).unflatten(
            0, (len(ids), -1)
        )
        # Of the first clip only one frame is kept: it was the image repeated.
        return torch.cat([clips[:, 0, :1], clips[:, 1:].flatten(1, 2)], 1)


class Emu3Codec(HFVisualCodec):
    """Emu3's codec for images and videos."""

    model_class = "Emu3VQVAE"

    @classmethod
    def sizes(cls, config: Any) -> HFVisualConfig:
        size = getattr(config, "resolution", EMU3_IMAGE_SIZE)
        return _sizes(config, size, config.codebook_size, config.temporal_downsample_factor)

    def to_codes(self, clips: Tensor) -> Tensor:
        sizes = torch.tensor([[self.image_size, self.image_size]] * len(clips))
        return torch.stack(self.model.encode(clips, sizes, return_dict=True).image_tokens)

    def to_clips(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes[:, None])


class ChameleonCodec(HFVisualCodec):
    """Chameleon's image codec: input only, because transformers has no decoder for it."""

    model_class = "ChameleonVQVAE"

    def __init__(self, model: Any, config: HFVisualConfig) -> None:
        super().__init__(model, config)
        logger.warning("Chameleon's tokenizer can only read images: transformers has no decoder to generate them")

    @classmethod
    def sizes(cls, config: Any) -> HFVisualConfig:
        return _sizes(config, config.resolution, config.num_embeddings, 1)

    def to_codes(self, clips: Tensor) -> Tensor:
        return self.model.encode(clips[:, 0], return_dict=True).image_tokens

    def to_clips(self, codes: Tensor) -> Tensor:
        """Raise UserError: Chameleon's tokenizer has no decoder."""
        remedy = "use a tokenizer with a decoder to generate images (Emu3, Janus, or one of `megamm tokenizer train`)"
        raise UserError("Chameleon's tokenizer cannot generate images, only read them", remedy=remedy)


class JanusCodec(HFVisualCodec):
    """Janus's image codec.

    Its codebook is used at unit length, in both directions. transformers normalises it only for decoding, but the
    original (deepseek-ai/Janus, janus/models/vq_model.py, l2_norm) also for finding the nearest code.
    """

    model_class = "JanusVQVAE"

    def __init__(self, model: Any, config: HFVisualConfig) -> None:
        super().__init__(model, config)
        codebook = model.quantize.embedding.weight
        codebook.data = nn.functional.normalize(codebook.data, dim=1)  # the length of the latent does not matter

    @classmethod
    def sizes(cls, config: Any) -> HFVisualConfig:
        return _sizes(config, config.num_patches * _downsample(config), config.num_embeddings, 1)

    def to_codes(self, clips: Tensor) -> Tensor:
        return self.model.encode(clips[:, 0], return_dict=True).image_tokens

    def to_clips(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes.flatten(1))[:, None]


def _downsample(config: Any) -> int:
    """Pixels per grid cell, along one side."""
    return 2 ** (len(config.channel_multiplier) - 1)


def _sizes(config: Any, image_size: int, codebook_size: int, frames_per_step: int) -> HFVisualConfig:
    """Sizes of a codec. Raises ValueError if the image does not have whole cells or is not RGB."""
    if image_size < 1 or image_size % _downsample(config):
        raise ValueError(f"resolution {image_size} is not a multiple of {_downsample(config)}")
    if config.in_channels != 3:
        raise ValueError(f"{config.in_channels} channels; only RGB is supported")
    return HFVisualConfig(
        kind=config.model_type,
        codebook_size=codebook_size,
        image_size=image_size,
        grid_size=image_size // _downsample(config),
        frames_per_step=frames_per_step,
        frame_rate=LATENT_FRAME_RATE * frames_per_step,
        max_frames=1 + (MAX_LATENT_FRAMES - 1) * frames_per_step,
    )


VISUAL_ADAPTERS: dict[str, type[HFVisualCodec]] = {
    "emu3_vqgan": Emu3Codec,
    "chameleon_vqgan": ChameleonCodec,
    "janus_vqgan": JanusCodec,
}
"""Adapters by transformers' model_type."""
