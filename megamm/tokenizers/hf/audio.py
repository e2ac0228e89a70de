"""Adapters for transformers' pretrained audio codecs: float32 `[B, samples]` mono <-> ids `[T]`, like our own codecs.

Mimi (Défossez et al. 2024, "Moshi", section 3.3), EnCodec (Défossez et al. 2022), DAC (Kumar et al. 2023). A latent
frame of `frame_samples` samples is Q ids: T = Q * frames, ordered by frame, then by level. Level q has the ids
q * K .. (q + 1) * K - 1. frames = ceil(samples / frame_samples).

All codebooks of the config are used; for EnCodec those of its highest bandwidth. Their levels refine each other, so you
can use fewer: lower `num_quantizers` (Mimi), the last of `target_bandwidths` (EnCodec) or `n_codebooks` (DAC) in
config.json; the weights need no change.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megamm.tokenizers.io import CodecConfig

MAX_SECONDS = 20.0
"""Maximum length of a clip. The codecs accept any; this limits rows: 20 s of Mimi with 8 codebooks are 2,000 tokens."""


class HFAudioConfig(CodecConfig):
    """Properties of a codec that are known without its weights; `kind` is transformers' model_type."""

    sample_rate: int
    codebooks: int
    codebook_size: int
    frame_samples: int
    max_seconds: float = MAX_SECONDS


class HFAudioCodec(nn.Module):
    """An audio codec around a transformers model; subclasses implement the model's calls."""

    model_class: ClassVar[str]
    """Name of the model in transformers."""

    def __init__(self, model: Any, config: HFAudioConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.sample_rate, self.codebooks, self.max_seconds = config.sample_rate, config.codebooks, config.max_seconds
        self.codebook_size, self.frame_samples = config.codebook_size, config.frame_samples

    @classmethod
    def sizes(cls, config: Any) -> HFAudioConfig:
        """Sizes from the model's own config. Raises ValueError if the adapter does not support such a model."""
        raise NotImplementedError

    def to_codes(self, clip: Tensor) -> Tensor:
        """float32 `[1, 1, samples]` to codes `[Q, frames]`."""
        raise NotImplementedError

    def to_waveform(self, codes: Tensor) -> Tensor:
        """Codes `[1, Q, frames]` to about frames * frame_samples samples, `[..., samples]`."""
        raise NotImplementedError

    @torch.inference_mode()
    def encode(self, waveform: Tensor, lengths: list[int]) -> list[Tensor]:
        """Encode float32 `[B, samples]`, where clip i has lengths[i] samples, to ids `[T]` each, int64.

        Each clip is computed separately: these models pad a clip at its end, and some look ahead into the padding of a
        batch, so ids would depend on the other clips. Raises ValueError if a length is not in [1, samples].
        """
        if len(lengths) != len(waveform) or not all(1 <= length <= waveform.shape[1] for length in lengths):
            raise ValueError(f"lengths {lengths} for waveforms {list(waveform.shape)}")
        clips = [clip[None, None, :length] for clip, length in zip(waveform, lengths, strict=True)]
        return [(self.to_codes(clip) + self._first_ids(waveform.device)).T.flatten() for clip in clips]

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        """Ids `[T]` to float32 `[frames * frame_samples]`, clipped to [-1, 1].

        Raises ValueError if they are not whole latent frames, or an id is not in the range of its level.
        """
        if not len(ids) or len(ids) % self.codebooks:
            raise ValueError(f"{len(ids)} ids are not a multiple of {self.codebooks} (whole frames)")
        codes = ids.view(-1, self.codebooks).T - self._first_ids(ids.device)
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise ValueError(
                f"the ids of level q must be in [q * {self.codebook_size}, (q + 1) * {self.codebook_size})"
            )
        samples = codes.shape[1] * self.frame_samples
        waveform = self.to_waveform(codes[None]).flatten()[:samples]
        return nn.functional.pad(waveform, (0, samples - len(waveform))).clamp(-1, 1)

    def _first_ids(self, device: torch.device) -> Tensor:
        """The first id of each level, `[Q, 1]`."""
        return torch.arange(self.codebooks, device=device)[:, None] * self.codebook_size


class MimiCodec(HFAudioCodec):
    """Mimi; its first levels carry the words, the others the sound."""

    model_class = "MimiModel"

    @classmethod
    def sizes(cls, config: Any) -> HFAudioConfig:
        """Raises ValueError unless it is mono, has both halves, and a whole number of samples per frame."""
        _check_mono(config.audio_channels)
        if config.encoder_config is None or config.decoder_config is None:
            raise ValueError("saved without its encoder or its decoder")
        frame_samples = round(config.sampling_rate / config.frame_rate)
        if not math.isclose(frame_samples * config.frame_rate, config.sampling_rate):
            rates = f"{config.sampling_rate} Hz at {config.frame_rate} frames/s"
            raise ValueError(f"{rates} is not a whole number of samples per frame")
        return HFAudioConfig(
            kind="mimi",
            sample_rate=config.sampling_rate,
            codebooks=config.num_quantizers,
            codebook_size=config.codebook_size,
            frame_samples=frame_samples,
        )

    def to_codes(self, clip: Tensor) -> Tensor:
        return self.model.encode(clip, use_streaming=False, return_dict=True).audio_codes[0]

    def to_waveform(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes, return_dict=True).audio_values


class EncodecCodec(HFAudioCodec):
    """EnCodec for mono sound (24 and 32 kHz); the 48 kHz model also needs a scale for each chunk."""

    model_class = "EncodecModel"

    @classmethod
    def sizes(cls, config: Any) -> HFAudioConfig:
        """Raises ValueError if it is stereo, chunked or normalised, since then codes alone do not give the sound."""
        _check_mono(config.audio_channels)
        if config.normalize or config.chunk_length_s is not None:
            raise ValueError(
                "its codes need a scale for each chunk; only EnCodec without normalize and chunks is supported"
            )
        return HFAudioConfig(
            kind="encodec",
            sample_rate=config.sampling_rate,
            codebooks=config.num_quantizers,
            codebook_size=config.codebook_size,
            frame_samples=config.hop_length,
        )

    def to_codes(self, clip: Tensor) -> Tensor:
        bandwidth = self.model.config.target_bandwidths[-1]
        return self.model.encode(clip, bandwidth=bandwidth, return_dict=True).audio_codes[0, 0]

    def to_waveform(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes[None], audio_scales=[None], return_dict=True).audio_values


class DacCodec(HFAudioCodec):
    """DAC; clips are padded with zeros to whole latent frames, as its feature extractor does."""

    model_class = "DacModel"

    @classmethod
    def sizes(cls, config: Any) -> HFAudioConfig:
        """DAC is always mono."""
        return HFAudioConfig(
            kind="dac",
            sample_rate=config.sampling_rate,
            codebooks=config.n_codebooks,
            codebook_size=config.codebook_size,
            frame_samples=config.hop_length,
        )

    def to_codes(self, clip: Tensor) -> Tensor:
        padded = nn.functional.pad(clip, (0, -clip.shape[-1] % self.frame_samples))
        return self.model.encode(padded, return_dict=True).audio_codes[0]

    def to_waveform(self, codes: Tensor) -> Tensor:
        return self.model.decode(audio_codes=codes, return_dict=True).audio_values


def _check_mono(channels: int) -> None:
    if channels != 1:
        raise ValueError(f"{channels} channels; only mono is supported")


AUDIO_ADAPTERS: dict[str, type[HFAudioCodec]] = {"mimi": MimiCodec, "encodec": EncodecCodec, "dac": DacCodec}
"""Adapters by transformers' model_type."""
