"""Audio: sound files <-> float32 `[samples]` mono at the codec's rate <-> token ids `[T]`, by latent frame.

Every latent frame has `stride` ids, one per level of the codec's residual quantiser, coarsest first. Only the first
`max_seconds` of a file are used (both are sizes of the codec).
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from megamm.common.sample import IntArray
from megamm.media.sound_file import SOUND_EXTENSIONS, Waveform, check_sound, read_waveform
from megamm.modalities.protocol import CPU
from megamm.tokenizers.audio.model import KIND, AudioCodec
from megamm.tokenizers.load import load_codec


class AudioModality:
    """The audio modality; build it with `AudioModality.load(folder)`."""

    name: ClassVar[str] = "audio"
    tokenizer_name: ClassVar[str] = "audio"
    extensions: ClassVar[tuple[str, ...]] = SOUND_EXTENSIONS

    def __init__(self, codec: AudioCodec, codec_id: str, device: torch.device) -> None:
        self.codec = codec.to(device).eval()
        self.codec_id = codec_id
        self.device = device
        self.vocabulary_size = codec.codebooks * codec.codebook_size
        self.tokens_per_item: int | None = None
        self.stride = codec.codebooks

    @classmethod
    def load(cls, codec: Path, device: torch.device = CPU) -> "AudioModality":
        """Load an audio codec folder onto a device. Raises UserError if it is not one."""
        module, codec_id = load_codec(codec, {KIND: AudioCodec}, "audio")
        return cls(module, codec_id, device)

    @staticmethod
    def check_media(data: bytes, extension: str) -> str:
        """Digest of the samples. Raises UnreadableMedia if broken, of the wrong format, silent or too short."""
        return check_sound(data, extension)

    def read_media(self, data: bytes, extension: str) -> Waveform:
        """Sound file to float32 `[samples]` in [-1, 1], its channels averaged. Raises UnreadableMedia if broken."""
        return read_waveform(data, extension, self.codec.sample_rate, self.codec.max_seconds)

    def write_media(self, media: Waveform) -> bytes:
        """float32 `[samples]` to FLAC bytes, 16 bits per sample; values beyond [-1, 1] are clipped."""
        import soundfile  # loads a shared library

        samples = (media * 2.0**15).round().clip(-(2**15), 2**15 - 1).astype(np.int16)
        file = io.BytesIO()
        soundfile.write(file, samples, self.codec.sample_rate, format="FLAC", subtype="PCM_16")
        return file.getvalue()

    def encode(self, media: Sequence[Waveform]) -> list[IntArray]:
        """Waveforms `[samples]` to ids `[T]` each, on the codec's device."""
        waveforms = [torch.from_numpy(np.asarray(waveform, dtype=np.float32)).to(self.device) for waveform in media]
        return [self.codec.encode(waveform[None], [len(waveform)])[0].cpu().numpy() for waveform in waveforms]

    def decode(self, ids: IntArray) -> Waveform:
        """Ids `[T]` to float32 `[samples]`. Raises ValueError for incomplete frames or an id of another level."""
        return self.codec.decode(torch.from_numpy(np.asarray(ids, dtype=np.int64)).to(self.device)).cpu().numpy()

    def positions(self, length: int) -> IntArray:
        """`[3, length]`: t = latent frame, h = level, w = 0."""
        t, h = np.divmod(np.arange(length, dtype=np.int64), self.stride)
        return np.stack([t, h, np.zeros_like(t)])

    def valid_token_ids(self, index: int) -> range:
        """The ids of the level at this index."""
        first = index % self.stride * self.codec.codebook_size
        return range(first, first + self.codec.codebook_size)
