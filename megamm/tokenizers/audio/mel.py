"""Waveforms to log-mel spectrograms, which the audio codec compresses, and back to waveforms.

`LogMel`: float32 `[B, samples]` in [-1, 1] to the natural logarithm of mel magnitudes `[B, mels, frames]`, one frame
every `hop` samples, centred on sample 0, hop, 2 hop .. (zeros beyond the ends); samples is a multiple of hop and
frames = samples / hop. Filters: Slaney's mel scale and normalisation, 0 Hz to half the sample rate.

The inverse has no weights: magnitudes from the mel bands by non-negative least squares (multiplicative updates, Lee and
Seung 2001), phases by the fast Griffin-Lim algorithm (Perraudin, Balazs and Sondergaard 2013). It starts with the same
random phases for every input, so the same spectrogram gives the same waveform.
"""

import math

import torch
from torch import Tensor, nn

FLOOR = 1e-5
"""Smaller magnitudes are silence: the logarithm is at least -11.5."""
PHASE_STEPS = 32
MAGNITUDE_STEPS = 20
MOMENTUM = 0.99
"""Alpha of fast Griffin-Lim, as its authors recommend."""


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
            phase = torch.sgn(spectrum + MOMENTUM * (spectrum - last))
            last = spectrum
        return self._inverse(magnitude * phase, samples)

    def _inverse(self, spectrum: Tensor, samples: int) -> Tensor:
        size = len(self.window)
        return torch.istft(spectrum, size, self.hop, window=self.window, center=True, length=samples)
