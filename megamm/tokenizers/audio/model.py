"""The audio codec: residual FSQ of log-mel spectrograms, float32 `[B, samples]` mono <-> ids `[T]`.

`stride` mel frames form one latent frame of `frame_samples` samples, which is coded as Q ids: T = Q * frames, ordered
by frame, then by level. Level q has the ids q * K .. (q + 1) * K - 1, so an id determines its level. A waveform is
padded with zeros to whole latent frames. The decoder predicts the log-mel; `LogMel` converts it to a waveform.

The network works at the resolution of the latent frames, with blocks like those of ConvNeXt and Vocos (Siuzdak 2023,
"Vocos", section 3.3). Source of the quantiser: tokenizers/fsq.py.

`LogMel`: float32 `[B, samples]` in [-1, 1] to the natural logarithm of mel magnitudes `[B, mels, frames]`, one frame
every `hop` samples, centred on sample 0, hop, 2 hop .. (zeros beyond the ends); samples is a multiple of hop and
frames = samples / hop. Filters: Slaney's mel scale and normalisation, 0 Hz to half the sample rate. The inverse has no
weights: magnitudes from the mel bands by non-negative least squares (multiplicative updates, Lee and Seung 2001),
phases by the fast Griffin-Lim algorithm (Perraudin, Balazs and Sondergaard 2013). It starts with the same random phases
for every input, so the same spectrogram gives the same waveform.
"""

import math
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from megamm.tokenizers.fsq import ResidualFSQ
from megamm.tokenizers.io import CodecConfig

FLOOR = 1e-5
"""Smaller magnitudes are silence: the logarithm is at least -11.5."""
PHASE_STEPS = 32
MAGNITUDE_STEPS = 20
MOMENTUM = 0.99
"""Alpha of fast Griffin-Lim, as its authors recommend."""
KIND = "megamm-audio-rfsq"
"""`kind` in config.json, which identifies this codec's folder."""
LOG_MEL_MEAN, LOG_MEL_SCALE = -5.0, 2.5
"""Approximate mean and deviation for speech, which scale log-mel values to about [-3, 3]."""


class LogMel(nn.Module):
    """The transform and its inverse; its buffers are constants and not saved."""

    window: Tensor
    filters: Tensor
    inverse_filters: Tensor

    def __init__(self, sample_rate: int, window: int, hop: int, mels: int) -> None:
        """sample_rate in Hz; window (a Hann window, and the length of the Fourier transform) and hop in samples."""
        super().__init__()
        from transformers.audio_utils import mel_filter_bank  # takes a second to import

        self.hop = hop
        filters = mel_filter_bank(
            num_frequency_bins=window // 2 + 1,
            num_mel_filters=mels,
            min_frequency=0.0,
            max_frequency=sample_rate / 2,
            sampling_rate=sample_rate,
            norm="slaney",
            mel_scale="slaney",
        )
        bands = torch.from_numpy(filters.T).float().contiguous()
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        self.register_buffer("filters", bands, persistent=False)
        self.register_buffer("inverse_filters", torch.linalg.pinv(bands), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """float32 `[B, samples]` to log-mel `[B, mels, samples / hop]`, always computed in float32."""
        with torch.autocast(waveform.device.type, enabled=False):
            mel = self.filters @ self.spectrum(waveform.float()).abs()
            return mel.clamp(min=FLOOR).log()

    def spectrum(self, waveform: Tensor) -> Tensor:
        """Short-time Fourier transform, complex64 `[B, window / 2 + 1, frames]`."""
        size = len(self.window)
        spectrum = torch.stft(
            waveform, size, self.hop, window=self.window, center=True, pad_mode="constant", return_complex=True
        )
        return spectrum[..., : waveform.shape[-1] // self.hop]

    def waveform(self, log_mel: Tensor) -> Tensor:
        """Log-mel `[B, mels, frames]` to float32 `[B, frames * hop]`, within [-1, 1]."""
        return self.griffin_lim(self.magnitude(log_mel.float())).clamp(-1, 1)

    def magnitude(self, log_mel: Tensor) -> Tensor:
        """Log-mel `[B, mels, frames]` to non-negative magnitudes `[B, window / 2 + 1, frames]` with these mel bands."""
        mel = log_mel.exp()
        magnitude = (self.inverse_filters @ mel).clamp(min=FLOOR**2)  # an exact zero could not grow again
        target = self.filters.T @ mel
        for _ in range(MAGNITUDE_STEPS):
            # Multiplicative updates keep magnitudes positive; the floor avoids a division by zero in silence.
            magnitude = magnitude * target / (self.filters.T @ (self.filters @ magnitude)).clamp(min=FLOOR**2)
        return magnitude

    def griffin_lim(self, magnitude: Tensor) -> Tensor:
        """Magnitudes `[B, window / 2 + 1, frames]` to a waveform `[B, frames * hop]` with similar magnitudes."""
        samples = magnitude.shape[-1] * self.hop
        generator = torch.Generator().manual_seed(0)
        angles = 2 * math.pi * torch.rand(magnitude.shape[1:], generator=generator)  # on the CPU: same on all devices
        phase = torch.polar(torch.ones_like(angles), angles).to(magnitude.device).expand(magnitude.shape)
        last = torch.zeros_like(phase)
        for _ in range(PHASE_STEPS):
            spectrum = self.spectrum(self._inverse(magnitude * phase, samples))
            # Take the phase of a consistent spectrum, extrapolated (which makes it fast), with the given magnitudes.
            phase = torch.sgn(spectrum + MOMENTUM * (spectrum - last))
            last = spectrum
        return self._inverse(magnitude * phase, samples)

    def _inverse(self, spectrum: Tensor, samples: int) -> Tensor:
        size = len(self.window)
        return torch.istft(spectrum, size, self.hop, window=self.window, center=True, length=samples)


class AudioCodecConfig(CodecConfig):
    """Sizes of the codec: `window` and `hop` of the spectrogram in samples, `stride` in mel frames."""

    kind: str = Field(default=KIND, pattern=f"^{KIND}$")
    sample_rate: int = Field(default=16_000, ge=4_000, le=192_000)
    window: int = Field(default=1024, ge=64, le=16_384)
    hop: int = Field(default=200, ge=16, le=8_192)
    mels: int = Field(default=80, ge=8, le=512)
    stride: int = Field(default=4, ge=1, le=64)
    codebooks: int = Field(default=4, ge=1, le=64)
    levels: tuple[int, ...] = (8, 5, 5, 5)
    width: int = Field(default=192, ge=16, le=4096)
    encoder_depth: int = Field(default=1, ge=0, le=64)
    decoder_depth: int = Field(default=2, ge=0, le=64)
    max_seconds: float = Field(default=20.0, gt=0, le=3600)

    @model_validator(mode="after")
    def _check(self) -> "AudioCodecConfig":
        if self.hop * 2 > self.window:
            raise ValueError(f"hop {self.hop} is more than half of window {self.window}: frames would miss samples")
        if not self.levels or min(self.levels) < 2 or math.prod(self.levels) > 2**20:
            raise ValueError(f"levels {self.levels} must be 2 or more each, with at most 2^20 codes")
        return self

    @property
    def codebook_size(self) -> int:
        """K, the number of codes of one level."""
        return math.prod(self.levels)

    @property
    def frame_samples(self) -> int:
        """Samples of one latent frame."""
        return self.hop * self.stride


class ConvBlock(nn.Module):
    """A depthwise convolution over time, then an MLP over the channels, with a residual; keeps `[B, D, frames]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time = nn.Conv1d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 3 * width)
        self.mlp_out = nn.Linear(3 * width, width)
        nn.init.zeros_(self.mlp_out.weight)  # starts as the identity, which trains faster

    def forward(self, hidden: Tensor) -> Tensor:
        change = self.norm(self.time(hidden).transpose(1, 2))
        return hidden + self.mlp_out(nn.functional.gelu(self.mlp_in(change))).transpose(1, 2)


class AudioCodec(nn.Module):
    """Encoder, residual FSQ and decoder between log-mel spectrograms, plus the spectrogram and its inverse."""

    Config: ClassVar[type[AudioCodecConfig]] = AudioCodecConfig

    def __init__(self, config: AudioCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.sample_rate, self.codebooks, self.max_seconds = config.sample_rate, config.codebooks, config.max_seconds
        self.codebook_size, self.frame_samples = config.codebook_size, config.frame_samples
        patch, width = config.mels * config.stride, config.width
        self.mel = LogMel(config.sample_rate, config.window, config.hop, config.mels)
        self.encoder = nn.Sequential(
            nn.Conv1d(patch, width, 1), *[ConvBlock(width) for _ in range(config.encoder_depth)]
        )
        self.quantiser = ResidualFSQ(width, config.levels, config.codebooks)
        self.decoder = nn.Sequential(*[ConvBlock(width) for _ in range(config.decoder_depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, patch)

    def forward(self, waveform: Tensor) -> Tensor:
        """The mean absolute error of the log-mel for float32 `[B, samples]`, whole latent frames."""
        log_mel = self.mel(waveform)
        return nn.functional.l1_loss(self.reconstruct(log_mel)[0].float(), log_mel)

    def reconstruct(self, log_mel: Tensor) -> tuple[Tensor, Tensor]:
        """Log-mel `[B, mels, frames * stride]` to (its reconstruction, codes `[B, frames, Q]`)."""
        quantised, codes = self.quantise(log_mel)
        return self.to_log_mel(quantised), codes

    def quantise(self, log_mel: Tensor) -> tuple[Tensor, Tensor]:
        """Log-mel `[B, mels, frames * stride]` to (quantised latents `[B, frames, D]`, codes `[B, frames, Q]`)."""
        normalised = (log_mel - LOG_MEL_MEAN) / LOG_MEL_SCALE
        patches = normalised.unflatten(2, (-1, self.config.stride)).transpose(2, 3).flatten(1, 2)
        return self.quantiser(self.encoder(patches).transpose(1, 2))

    def to_log_mel(self, quantised: Tensor) -> Tensor:
        """Quantised latents `[B, frames, D]` to log-mel `[B, mels, frames * stride]`."""
        hidden = self.head(self.norm(self.decoder(quantised.transpose(1, 2)).transpose(1, 2)))
        patches = hidden.unflatten(2, (self.config.mels, self.config.stride))
        return patches.permute(0, 2, 1, 3).flatten(2) * LOG_MEL_SCALE + LOG_MEL_MEAN

    def padded(self, waveform: Tensor) -> Tensor:
        """Pad `[..., samples]` at the end with zeros to whole latent frames."""
        return nn.functional.pad(waveform, (0, -waveform.shape[-1] % self.frame_samples))

    @torch.inference_mode()
    def encode(self, waveform: Tensor, lengths: list[int]) -> list[Tensor]:
        """Encode float32 `[B, samples]`, where clip i has lengths[i] samples, to ids `[T]` each, int64.

        Each clip is computed separately, so the other clips of a batch cannot change any of its ids. Raises ValueError
        if a length is not in [1, samples].
        """
        if len(lengths) != len(waveform) or not all(1 <= length <= waveform.shape[1] for length in lengths):
            raise ValueError(f"lengths {lengths} for waveforms {list(waveform.shape)}")
        clips = [self.padded(clip[:length]) for clip, length in zip(waveform, lengths, strict=True)]
        return [self.to_ids(self.quantise(self.mel(clip[None]))[1][0]) for clip in clips]

    def to_ids(self, codes: Tensor) -> Tensor:
        """Codes `[frames, Q]` to ids `[T]`, T = Q * frames."""
        return (codes + torch.arange(self.codebooks, device=codes.device) * self.codebook_size).flatten()

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        """Ids `[T]` to float32 `[frames * frame_samples]` in [-1, 1].

        Raises ValueError if they are not whole latent frames, or an id is not in the range of its level.
        """
        if not len(ids) or len(ids) % self.codebooks:
            raise ValueError(f"{len(ids)} ids are not a multiple of {self.codebooks} (whole frames)")
        codes = ids.view(-1, self.codebooks) - torch.arange(self.codebooks, device=ids.device) * self.codebook_size
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise ValueError(
                f"the ids of level q must be in [q * {self.codebook_size}, (q + 1) * {self.codebook_size})"
            )
        return self.mel.waveform(self.to_log_mel(self.quantiser.lookup(codes)[None]))[0]
